/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method.h - what a merge method is to the engine (private to merge/).
 *
 * A method is one static const struct tvm_method in its own method_<name>.c and
 * one line in method_registry.c. It never reads files, threads or memory
 * limits: the engine (exec.c) feeds it blocks of fp32 values (or of bf16 as it
 * lies in the inputs, where a method has passes for that).
 *
 *   plan time   check(): method-specific errors for one tensor (wrong number of
 *               inputs, values out of range); fold(): which source may be
 *               copied bit for bit instead of merged, or -1
 *   run time    per tensor: state_bytes(), then for phase = 0, 1, ... while
 *               next_phase() says MEASURE: every tile -> measure(); then
 *               combine() for every tile. A tile is a run of whole leaves
 *               (TVK_LEAF elements; only the last is shorter), fed in blocks of
 *               at most TVM_BLOCK elements in order by one worker. Different
 *               tiles run at the same time in different workers.
 *   Results may depend on the element index and on sums over leaves in
 *   tvk_*_tree order, never on tile borders, workers or timing.
 */
#ifndef TVM_METHOD_H
#define TVM_METHOD_H

#include "tv/kernels.h"
#include "tv/merge.h"

#define TVM_BLOCK                                                              \
    2048u /* elements per block; a power of two below TVK_LEAF                 \
           */

/* What to do with a tensor that only some inputs have. */
enum tvm_missing {
    TVM_MISSING_MERGE = 0,     /* merge what is present (base must be there) */
    TVM_MISSING_COPY_ONLY = 1, /* slerp: exactly one has it: copy it */
    TVM_MISSING_COPY_BASE = 2, /* too few donors have it: copy the base's */
};

/* What is known of the trimming of one source before the first phase, or found
 * by the last one. */
struct tvm_trim {
    bool known;    /* the mask is given with each tile: do not look for it */
    bool has_sums; /* of |x - base| over all and over kept elements */
    double sum_all, sum_kept;
};

/* How a source is reduced to the entries that count most. */
enum tvm_score { /* of entry t in column j of the layer's inputs */
                 TVM_SCORE_MAGNITUDE = 0, /* |t| */
                 TVM_SCORE_DIAGONAL = 1,  /* t^2 (X^T X)_jj */
                 TVM_SCORE_CHOLESKY = 2   /* t^2 / U_jj^2 */
};
enum tvm_correct { /* what makes up for the entries that are dropped */
                   TVM_CORRECT_NONE = 0,
                   TVM_CORRECT_OBS = 1, /* SparseGPT's loop, chooses as it goes
                                         */
                   TVM_CORRECT_CG = 2,  /* conjugate gradients */
                   TVM_CORRECT_OBS_CG = 3
};
enum tvm_compare { /* entries that are compared with each other */
                   TVM_COMPARE_LAYER = 0,
                   TVM_COMPARE_ROW = 1,   /* of one output */
                   TVM_COMPARE_BLOCK = 2, /* of 128 inputs */
                   /* Those too, as SparseGPT's loop has corrected them by then;
                    * TVM_SCORE_CHOLESKY alone. */
                   TVM_COMPARE_LOOP = 3
};
enum tvm_inputs_of { /* the model whose inputs are looked at */
                     TVM_INPUTS_OWN = 0,
                     TVM_INPUTS_BASE = 1,
                     /* Its own block behind the merged ones (sequential.h). */
                     TVM_INPUTS_MERGED = 2
};
struct tvm_trim_rule {
    double density;
    bool needs_sums;
    bool calibrated; /* by input statistics, before the run (calibrated.h):
                      * the following; else the method itself finds the largest
                      */
    enum tvm_score score;
    enum tvm_compare compare;
    unsigned n_kept, group; /* n:m patterns; 0: none */
    enum tvm_correct correct;
    bool rescale;      /* by the least-squares factor */
    bool as_sparsegpt; /* counts and ties: n - floor(n (1 - density)) are kept,
                        * of equal ones the last */
    bool counts;       /* of a token embedding: DIAGONAL, over all of it */
    bool gram_only;    /* nothing is chosen: the method looks at X^T X itself */
    double damping;
    unsigned cg_steps;
    enum tvm_inputs_of inputs;
};

struct tvm_calibrated;

/* Per-tensor run state: the method's own bytes, zeroed before phase 0. */
struct tvm_job {
    const struct tvm_tensor *tensor;
    size_t index;                            /* of the tensor in the plan */
    const struct tvm_calibrated *calibrated; /* calibrated.h; may be NULL */
    const struct tvk_table *k;
    uint64_t seed;
    const struct tvm_mt_stream *stream; /* mt.h; NULL: nobody draws from it */
    uint64_t n_leaves;                  /* of TVK_LEAF elements */
    uint64_t tile_elems;                /* elements per tile of this tensor */
    uint64_t n_tiles;
    unsigned n_workers; /* highest worker index + 1 */
    bool roomy;         /* memory may be spent to save a pass (state_bytes) */
    void *state;        /* state_bytes(job) of zeroed memory */
    unsigned phase;
    /* Set by next_phase for the pass to come: feed only so many elements at the
     * head of every block (a sample; inputs are neither checked nor counted),
     * 0: all. In passes of blocks only. */
    size_t sample;
    struct tvm_trim *trim; /* [n_sources], or NULL: nothing is known */
};

/* A worker's place in one tile. */
struct tvm_tile {
    uint64_t tile;     /* number */
    uint64_t start;    /* first element of the block being fed */
    uint64_t first, n; /* first element and elements of the tile */
    unsigned worker;
    uint64_t *mask_words; /* [n_sources][TVM_BLOCK / 64] of scratch */
    void *tile_state;     /* tile_bytes() of zeroed memory per tile */
    /* Of the block at hand: masks of the sources whose trim is known, and where
     * combine notes those that it has made (may be NULL). */
    const uint64_t *const *known;
    const uint64_t **made;
};

/* How much has to be looked at before a tensor is merged. */
enum tvm_reach {
    TVM_REACH_TENSOR = 0, /* only the tensor */
    TVM_REACH_LAYER = 1,  /* all of its layer; outside layers: the tensor */
    TVM_REACH_MODEL = 2   /* the whole output */
};

/* What that found out of one source. */
struct tvm_cut {
    uint32_t pattern;         /* of the smallest magnitude that is kept, ... */
    uint64_t eq_limit;        /* ... the first so many of that one in this
                                 tensor; UINT64_MAX: all */
    double sum_all, sum_kept; /* of magnitudes, over the population */
};

/* A population while it is looked at (survey.c). */
struct tvm_group {
    const struct tvm_plan *plan;
    const struct tvk_table *k;
    const size_t *tensors; /* [n] index into plan->tensors, in output order */
    size_t n;
    uint64_t most_leaves; /* of the tensor that has the most */
    unsigned n_workers;
    unsigned phase;
    void *state; /* survey_bytes() of zeroed memory */
};

/* Measuring a population: as state_bytes, next_phase and measure do for a
 * tensor. Tensors come in order, one after the other; the tiles of one at the
 * same time in different workers, each tile a run of whole leaves. */
struct tvm_surveyor {
    size_t (*bytes)(const struct tvm_group *g);
    bool (*next)(struct tvm_group *g);
    /* Does the pass to come look at this source (never asked of the base)? */
    bool (*wants)(const struct tvm_group *g, const struct tvm_tensor *t,
                  size_t source);
    /* x[s] is NULL for what was not wanted. */
    void (*measure)(struct tvm_group *g, size_t at, uint64_t start,
                    unsigned worker, const float *const *x, size_t n);
    /* All tiles of tensors[at] are done; may be NULL. */
    void (*end_tensor)(struct tvm_group *g, size_t at);
    /* After the last pass; cuts [n_sources] of tensors[at]. */
    void (*give)(struct tvm_group *g, size_t at, struct tvm_cut *cuts);
};

struct tvm_method {
    const char *name, *summary, *paper;
    enum tvm_base base;
    bool needs_statistics;
    size_t min_donors, max_donors; /* inputs that are not the base; for methods
                                      without a base role: all inputs */
    bool base_counts;              /* the base is one of the donors (linear,
                                      slerp, passthrough) */
    const struct tvm_param *params;
    size_t n_params;
    enum tvm_missing missing;
    const void *detail; /* constants of a family of methods that share
                           code (method_gta.h); NULL for the others */

    void (*check)(const struct tvm_tensor *t, struct tvm_problems *problems);
    int (*fold)(const struct tvm_tensor *t);
    /* Is a source no model, but something about one? It then has no say in
     * the dtype of the output. NULL: none is. */
    bool (*aside)(const struct tvm_tensor *t, size_t source);

    /* Bytes of job->state and of tile_state; may be NULL for 0. The worst case
     * over phases; used by the plan's peak_scratch as well (n_workers given).
     */
    size_t (*state_bytes)(const struct tvm_job *job);
    size_t (*tile_bytes)(const struct tvm_job *job);

    /* NULL: no measuring. Called once, single-threaded, before each phase with
     * job->phase = 0, 1, ...; returns true to run a measure pass, false to go
     * on to combine. Reduces what the phase before gathered. */
    bool (*next_phase)(struct tvm_job *job);
    /* x[s] are n values of source s from element tile->start. */
    void (*measure)(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, size_t n);
    /* dst [n] is what the output tensor gets, before rounding to its dtype. */
    void (*combine)(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n);
    /* The same passes over bf16 as it lies in the inputs, with nothing widened
     * in between; same results. Asked before every pass but samples when all
     * sources are plain bf16 with unknown masks, nothing is rounded for a peer
     * and, to combine, the output is bf16 too: should it be one? NULL: never.
     * x[s] [n] and dst [n] are bf16 of any alignment; combine_bf16 returns how
     * many of dst are not finite. */
    bool (*takes_bf16)(const struct tvm_job *job, bool combine);
    void (*measure_bf16)(struct tvm_job *job, struct tvm_tile *tile,
                         const void *const *x, size_t n);
    uint64_t (*combine_bf16)(struct tvm_job *job, struct tvm_tile *tile,
                             const void *const *x, void *dst, size_t n);
    /* Is a source reduced to the entries in which it differs most from the
     * base, so that the result depends on which these are, and never on the
     * others? *rule says how. NULL: none ever is. */
    bool (*trims)(const struct tvm_tensor *t, size_t source,
                  struct tvm_trim_rule *rule);
    /* Methods that may look at several tensors first; NULL: never do. */
    enum tvm_reach (*reach)(const struct tvm_tensor *t);
    const struct tvm_surveyor *surveyor;
    /* Methods that need whole rows: elements of a row of this tensor (all rows
     * are as long), or 0 when it is fed in blocks after all. NULL: always 0.
     * In such a pass not measure and combine are called, but measure_row and
     * combine_row, each row by one worker; a row that lies in several tiles is
     * measured once (with the tile of its first element) and combined once for
     * each. x[s] [n] and dst [n] are the row. */
    uint64_t (*row_elems)(const struct tvm_tensor *t);
    /* Is the pass to come one of rows? NULL: all are. */
    bool (*row_pass)(const struct tvm_job *job);
    void (*measure_row)(struct tvm_job *job, struct tvm_tile *tile,
                        uint64_t row, const float *const *x, size_t n);
    void (*combine_row)(struct tvm_job *job, struct tvm_tile *tile,
                        uint64_t row, const float *const *x, float *dst,
                        size_t n);
    /* Methods of matrix scope (matrix.h): after passes that measured, passes of
     * work on the state alone. next_phase said true; how many items has the
     * pass, in any order, each done by one worker? 0: it measures. NULL: always
     * 0. At most job->n_workers work at a time. */
    size_t (*work_items)(const struct tvm_job *job);
    enum tv_err (*work)(struct tvm_job *job, size_t item, unsigned worker,
                        struct tv_error *err);
    /* Does it look at X^T X of the inputs of this tensor's layer in every model
     * but the base (tvm_calibrated_gram)? NULL: never. */
    bool (*needs_gram)(const struct tvm_tensor *t);
    enum tvm_inputs_of gram_inputs; /* of which inputs */
    /* Called at the start of each tile of each pass; may be NULL. */
    void (*tile_begin)(struct tvm_job *job, struct tvm_tile *tile);

    /* The same method in mergekit's arithmetic (compat.h), with the same
     * parameters; NULL: the engine rounds the inputs to the compute dtype and
     * the rest stays as it is. Its functions round every step to
     * tensor->compute and give dst in it. It may be the method itself when its
     * functions go by tensor->compute. */
    const struct tvm_method *compat;
    /* Of such a variant: mergekit promotes the result to fp32, so that is the
     * output's dtype when the recipe names none for outputs. */
    bool compat_wide;
    /* Of such a variant: how many numbers of the stream a tensor takes. */
    uint64_t (*draws)(const struct tvm_tensor *t);
};

/* Elements of a row of a matrix; of a vector: all. At least 1. */
static inline uint64_t tvm_row_elems(const struct tvm_tensor *t)
{
    return t->rank == 0 || t->n_elems == 0 ? 1 : t->shape[t->rank - 1];
}

/* Sources but the base, and their values in order. */
static inline size_t tvm_donor_count(const struct tvm_tensor *t)
{
    return t->n_sources - (t->base >= 0);
}

static inline size_t tvm_donors(const struct tvm_tensor *t,
                                const float *const *x, const float **out)
{
    size_t n = 0;

    for (size_t s = 0; s < t->n_sources; s++)
        if ((int)s != t->base)
            out[n++] = x[s];
    return n;
}

/* Hands out 64-byte aligned parts of a job's state; with base NULL only counts
 * what they take. */
struct tvm_carver {
    unsigned char *base;
    size_t used;
};

static inline void *tvm_carve(struct tvm_carver *c, uint64_t n, size_t each)
{
    void *at = c->base ? c->base + c->used : NULL;
    c->used += ((size_t)n * each + 63u) & ~(size_t)63u;
    return at;
}

static inline bool tvm_rule_needs_gram(const struct tvm_trim_rule *r)
{
    return r->gram_only || r->score == TVM_SCORE_CHOLESKY ||
           r->correct != TVM_CORRECT_NONE || r->rescale;
}

/* Are the values of kept entries other ones than the donor's? */
static inline bool tvm_rule_makes_values(const struct tvm_trim_rule *r)
{
    return r->calibrated && (r->correct != TVM_CORRECT_NONE || r->rescale);
}

/* A problem for every parameter value that is not a finite number. */
void tvm_check_finite(const struct tvm_tensor *t,
                      struct tvm_problems *problems);
/* Do the weights (parameter p) of the inputs that have one add up to 0, but for
 * rounding (0.1 + 0.2 - 0.3)? */
bool tvm_weights_cancel(const struct tvm_tensor *t, size_t p);
/* What check() finds wrong with the value of parameter p, of one source or
 * (SIZE_MAX) shared: a USAGE error, which the planner reports once and with the
 * place in the recipe. What one value alone makes wrong is a matter of its
 * bounds (struct tvm_param) and found with the recipe. */
void tvm_param_problem(const struct tvm_tensor *t, size_t p, size_t source,
                       struct tvm_problems *problems, const char *fmt, ...)
    TV_PRINTF(5, 6);

extern const struct tvm_method tvm_method_linear;
extern const struct tvm_method tvm_method_tsv;
extern const struct tvm_method tvm_method_iso_c;
extern const struct tvm_method tvm_method_wudi;
extern const struct tvm_method tvm_method_regmean;
extern const struct tvm_method tvm_method_regmean_plus;
extern const struct tvm_method tvm_method_slerp;
extern const struct tvm_method tvm_method_nuslerp;
extern const struct tvm_method tvm_method_multislerp;
extern const struct tvm_method tvm_method_karcher;
extern const struct tvm_method tvm_method_model_stock;
extern const struct tvm_method tvm_method_sce;
extern const struct tvm_method tvm_method_consensus;
extern const struct tvm_method tvm_method_emr;
extern const struct tvm_method tvm_method_cabs;
extern const struct tvm_method tvm_method_fisher;
extern const struct tvm_method tvm_method_ram;
extern const struct tvm_method tvm_method_ramplus_tl;
extern const struct tvm_method tvm_method_nearswap;
extern const struct tvm_method tvm_method_arcee_fusion;
extern const struct tvm_method tvm_method_passthrough;
extern const struct tvm_method tvm_method_task_arithmetic;
extern const struct tvm_method tvm_method_ties;
extern const struct tvm_method tvm_method_sparsegpt_ties;
extern const struct tvm_method tvm_method_sparsegpt_linear;
extern const struct tvm_method tvm_method_breadcrumbs;
extern const struct tvm_method tvm_method_breadcrumbs_ties;
extern const struct tvm_method tvm_method_della;
extern const struct tvm_method tvm_method_della_linear;
extern const struct tvm_method tvm_method_dare_linear;
extern const struct tvm_method tvm_method_dare_ties;

/* Value of parameter p (index into method->params). */
static inline double tvm_shared(const struct tvm_tensor *t, size_t p)
{
    return t->shared[p];
}

static inline double tvm_of(const struct tvm_tensor *t, size_t source, size_t p,
                            size_t n_params)
{
    return t->per_source[source * n_params + p];
}

#endif
