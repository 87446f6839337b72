/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibrated_entries.h - what the files that make calibrated masks share
 * (private to calibrated*.c).
 *
 *   calibrated.c        the plan's entries, made one group after the other
 *   calibrated_rules.c  what is to be made of a source (also where eval/ is not
 *                       built)
 *   calibrated_needs.c  whose text and model; memory and disk, for planning
 *   calibrated_run.c    a model runs over its text, alone or behind merged
 *                       blocks
 *   calibrated_masks.c  one entry from the statistics of a layer's inputs
 *   calibrated_kept.c   the scratch file; what an interrupted run has made
 *   calibrated_layer.c  task vectors of one layer, models (calibrated_parts.h)
 *
 * One thread uses all of this, before the tiles of a run.
 */
#ifndef TVM_CALIBRATED_ENTRIES_H
#define TVM_CALIBRATED_ENTRIES_H

#include <time.h>

#include "calibrated.h"
#include "calibrated_parts.h"
#include "calibration_state.h"
#include "prune.h"

#define CALIBRATED_ALIGN 4096u /* of what is in the scratch file */

struct calibrated_entry {
    size_t tensor, source;
    struct tvm_trim_rule rule;
    size_t model, owner; /* inputs */
    bool made;           /* or not needed */
    bool lacking;        /* of those that wait for merged blocks: it is for it
                          * that models run */
    bool in_scratch, has_values;
    /* In the scratch file: words, or X^T X for gram_only. */
    struct tvm_kept_mask at;
    struct tvm_damped damped; /* with tensor: it took more damping */
};

struct tvm_calibrated {
    struct calibrated_entry *entries; /* by tensor, source */
    size_t n;
    size_t *first; /* [n_tensors + 1] */
    int fd;
    bool named; /* a later run may go on with it */
    uint64_t used;
    const unsigned char *map;
    uint64_t mapped; /* bytes */
};

struct calibrated_work { /* of one group */
    struct tvm_calibrated *c;
    const struct tvm_plan *p;
    struct tvm_cache *cache;
    struct tvm_sink *sink;
    const struct tvm_run_hooks *hooks;
    struct tvm_calibration_use *use;
    bool news;      /* since the journal was told */
    double t_noted; /* then */
    size_t model, owner;
    bool gram, merged; /* merged: behind merged blocks */
    uint64_t n_rows;   /* of the input at hand */
    const char *ref;
};

static inline double calibrated_now(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

/* ---- calibrated_needs.c -------------------------------------------------- */

/* Bytes for one entry of a plan; statistics as tvm_prune takes them included.
 */
uint64_t calibrated_entry_bytes(const struct tvm_plan *p,
                                const struct tvm_tensor *t,
                                const struct tvm_trim_rule *r);

/* ---- calibrated_run.c ---------------------------------------------------- */

/* All entries of w->model over the text of w->owner with statistics w->gram. */
TV_NODISCARD enum tv_err calibrated_run_group(struct calibrated_work *w,
                                              struct tv_error *err);
/* All entries behind merged blocks. */
TV_NODISCARD enum tv_err calibrated_run_merged(struct calibrated_work *w,
                                               struct tv_error *err);

/* ---- calibrated_masks.c -------------------------------------------------- */

/* Is an entry one of the group at hand? */
bool calibrated_wants(const struct calibrated_work *w,
                      const struct calibrated_entry *e);
/* The tensor, of the model that runs, whose inputs an entry needs. */
const char *calibrated_weight(const struct calibrated_work *w,
                              const struct calibrated_entry *e);
/* Makes every entry of the group that has one of these tensors. */
TV_NODISCARD enum tv_err calibrated_see(struct calibrated_work *w,
                                        const struct tvm_stats *stats,
                                        const char *const *tensors,
                                        size_t n_tensors, struct tv_error *err);

/* ---- calibrated_kept.c --------------------------------------------------- */

/* The file, at its first use. */
TV_NODISCARD enum tv_err calibrated_open(struct tvm_calibrated *c,
                                         const struct tvm_plan *p,
                                         struct tv_error *err);
/* Appends; *at is where it begins. */
TV_NODISCARD enum tv_err calibrated_put(struct tvm_calibrated *c,
                                        const void *data, uint64_t n,
                                        uint64_t *at, struct tv_error *err);
/* Maps what was written until now. */
TV_NODISCARD enum tv_err calibrated_map(struct tvm_calibrated *c,
                                        struct tv_error *err);
void calibrated_unmap(struct tvm_calibrated *c);
/* Says which layer it is that took more damping. */
void calibrated_name_damped(const struct tvm_plan *p,
                            struct calibrated_entry *e);
/* Marks as made what the journal of an interrupted run has, and is as it was.
 */
TV_NODISCARD enum tv_err calibrated_take_over(struct tvm_calibrated *c,
                                              const struct tvm_plan *p,
                                              const struct tvm_sink *sink,
                                              struct tvm_calibration_use *use,
                                              struct tv_error *err);
/* Tells the journal: `at_once`, or when there is news after a second. */
TV_NODISCARD enum tv_err calibrated_tell(struct calibrated_work *w,
                                         bool at_once, struct tv_error *err);

#endif
