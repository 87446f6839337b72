/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gta_parts.h - what the files of generalised task arithmetic share (private to
 * method_gta.c and gta_*.c).
 *
 *   method_gta.c  what the parameters of a tensor ask for
 *   gta_state.c   the state of a tensor: donors, thresholds, sums
 *   gta_select.c  from pass to pass: which entries are the largest
 *   gta_tiles.c   blocks of a tile: measured, or combined
 *   gta_survey.c  one threshold for a layer or the model
 */
#ifndef TVM_GTA_PARTS_H
#define TVM_GTA_PARTS_H

#include "method_gta.h"
#include "mt.h"
#include "select.h"

#define GTA_BLOCKS_PER_LEAF (TVK_LEAF / TVM_BLOCK)
#define GTA_BLOCK_WORDS     (TVM_BLOCK / 64)
#define GTA_GROUP_MAX       ((size_t)32) /* 8 MiB of histograms per worker */
/* A range of four buckets of HIGH: some 0.2 to 0.35% of normally distributed
 * entries on either side of its middle, four or more standard deviations of the
 * rank in a sample of 2^19. */
#define GTA_RANGE_BUCKETS   4u
#define GTA_RANGE_WIDTH     (GTA_RANGE_BUCKETS << 15)
#define GTA_N_ATOMS         tvm_atoms(GTA_RANGE_WIDTH)

enum gta_step {
    GTA_STEP_SAMPLE,
    GTA_STEP_RANGE,
    GTA_STEP_HIGH,
    GTA_STEP_LOW,
    GTA_STEP_COUNT,
    GTA_STEP_KEPT
};

struct gta_donor {
    size_t source; /* index into the tensor's sources */
    enum gta_keep keep;
    size_t slot; /* GTA_KEEP_TOP: place in the arrays of struct gta_state */
    size_t less; /* index of what is taken off the mask again, 0: none */
    bool found, needs_low, needs_count;
    uint64_t key, threshold; /* GTA_KEEP_RANDOM */
    float p;                 /* ... of mergekit's stream */
    size_t draw;             /* ... place in mt_tile */
    uint64_t k; /* GTA_KEEP_TOP: entries still to be found at this step */
    uint32_t hi, pattern, first; /* first: of its range */
    uint64_t eq_limit; /* of the entries equal to pattern, the first so many */
};

struct gta_state {
    enum gta_step step;
    size_t n_donors, n_top; /* n_top: with a slot */
    size_t n_select;        /* donors, then what is taken off again */
    size_t n_hist;          /* GTA_KEEP_TOP at first: histograms */
    size_t n_random;        /* GTA_KEEP_RANDOM from mergekit's stream */
    size_t n_measured; /* GTA_KEEP_TOP; the rest of n_top is GTA_KEEP_KNOWN */
    bool match_l1;
    struct tvk_gta call;
    double *coef, *weight;   /* [n_donors] */
    struct gta_donor *donor; /* [n_select] */
    size_t first;            /* slot of the group being measured */
    bool any_count;          /* some donor needs the COUNT pass */
    uint32_t *hist;          /* [n_workers][gta_group_size][hist_words] */
    size_t hist_words;
    uint32_t *atoms;   /* [n_tiles][n_hist][GTA_N_ATOMS], with a sample */
    uint64_t *above;   /* [n_workers][n_top]: over the range */
    uint64_t *eq;      /* [n_tiles][n_top]: count, then prefix */
    uint64_t *eq_seen; /* [n_workers][n_top]: in the tile at hand */
    double *sum_all;   /* [n_top][n_leaves] */
    double *sum_kept;  /* [n_top][n_leaves] */
    double *block;     /* [n_workers][n_top][2][GTA_BLOCKS_PER_LEAF] */
    /* Only with gta_detail::mergekit: */
    float *scale;           /* [n_donors] */
    float *delta;           /* [n_workers][n_donors][TVM_BLOCK] */
    struct tvm_mt *mt_tile; /* [n_tiles][n_random]: at its start */
    struct tvm_mt *mt;      /* [n_workers][n_random] */
};

/* ---- method_gta.c -------------------------------------------------------- */

const struct gta_detail *gta_detail_of(const struct tvm_tensor *t);
enum gta_sparsify gta_sparsify_of(const struct tvm_tensor *t);
double gta_weight_of(const struct tvm_tensor *t, size_t source);
bool gta_by_statistics(const struct tvm_tensor *t);
bool gta_is_scoped(const struct tvm_tensor *t);
/* Sources but the base. */
size_t gta_count_donors(const struct tvm_tensor *t, size_t *n_top,
                        size_t *n_random);

/* ---- gta_state.c --------------------------------------------------------- */

/* Before the first pass. */
void gta_set_up(struct tvm_job *job);
/* Do the selections of a tensor begin with a sample? */
bool gta_takes_sample(const struct tvm_tensor *t, const struct gta_state *st);
/* Donors that have a histogram at a time. */
size_t gta_group_size(const struct gta_state *st);
/* Is a donor one of these now? */
bool gta_in_group(const struct gta_state *st, const struct gta_donor *d);
/* The factor that gives what is kept the magnitude of the whole. */
double gta_rescaled(double weight, double all, double kept);

/* ---- gta_select.c -------------------------------------------------------- */

/* Of a worker, for the donor in `slot`. */
uint32_t *gta_hist_of(const struct gta_state *st, unsigned worker, size_t slot);
/* Counts of patterns that heap up in the range of a donor, of a tile. */
uint32_t *gta_atoms_of(const struct gta_state *st, uint64_t tile,
                       const struct gta_donor *d);
/* Is a donor measured in passes over all elements? */
bool gta_has_slot(const struct tvm_job *job, const struct gta_donor *d);
/* torch has no bernoulli for fp16 on a CPU: that is thinned in fp32. */
enum tv_dtype gta_thin_dtype(const struct tvm_tensor *t);

#endif
