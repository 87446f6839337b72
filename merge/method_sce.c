/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_sce.c - select, calculate, erase: keep the positions in which the task
 * vectors differ most, weigh each by its energy, drop minority signs.
 *
 *   select     k = trunc(nonzero variances * select_topk) positions with the
 *              largest variance over the task vectors, in all of them; none
 *              when k is 0 (select_topk 1: everything)
 *   calculate  g_i = mean(d_i^2) / sum_j mean(d_j^2), 1/n when that sum is
 *              below 1e-6
 *   erase      per position the sign of sum_i d_i; M_i = [sign d_i is it]
 *   y = base + sum g_i M_i d_i / max(sum g_i M_i, 1e-6)
 *
 * Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv 2408.07990.
 * Variances are fp64, compared as fp32; equal ones are taken by lowest index.
 * The formulas of both are tvk_table::variance and elect.
 */
#include "compat_sums.h"
#include "method.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "select.h"

enum { P_TOPK, P_INT8_MASK, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    [P_TOPK] = {.name = "select_topk",
                .scope = TVM_SHARED,
                .type = TVM_FLOAT,
                .has_default = true,
                .fallback = 1.0,
                TVM_WITHIN(0.0, 1.0),
                .help = "fraction of the positions that differ to keep"},
    [P_INT8_MASK] = {.name = "int8_mask",
                     .scope = TVM_SHARED,
                     .type = TVM_BOOL,
                     .has_default = true,
                     .fallback = 0.0,
                     .help = "accepted for mergekit; changes nothing"},
};

#define BLOCKS_PER_LEAF (TVK_LEAF / TVM_BLOCK)
#define BLOCK_WORDS     (TVM_BLOCK / 64)
#define SUM_MIN         1e-6
/* A range of eight buckets of HIGH: squares of magnitudes are twice as far
 * apart as those (gta_parts.h). */
#define RANGE_WIDTH     (UINT32_C(8) << 15)
#define RANGE_ELEMS_MIN ((uint64_t)2 << 20)
#define SAMPLE_ELEMS    ((uint64_t)8 << 20) /* fewer: sampled twice as densely */
#define SAMPLE          (TVM_BLOCK / 16)
#define N_ATOMS         tvm_atoms(RANGE_WIDTH)

enum step {
    STEP_SAMPLE,
    STEP_RANGE,
    STEP_HIGH,
    STEP_LOW,
    STEP_COUNT,
    STEP_SQUARES
};
enum keep { KEEP_ALL, KEEP_NONE, KEEP_TOP };

struct sce_state {
    enum step step;
    enum keep keep;
    size_t n_donors;
    uint64_t k;
    uint32_t hi, pattern, first; /* first: of the range */
    uint64_t eq_limit;
    double weight[TVK_DONORS_MAX];
    uint32_t *hist;    /* [n_workers][hist_words] */
    uint32_t *atoms;   /* [n_tiles][N_ATOMS], with a sample */
    uint64_t *above;   /* [n_workers]: over the range */
    uint64_t *nonzero; /* [n_workers] */
    uint64_t *eq;      /* [n_tiles]: count, then prefix */
    uint64_t *eq_seen; /* [n_workers] */
    double *square;    /* [n_donors][n_leaves] */
    double *block;     /* [n_workers][n_donors][BLOCKS_PER_LEAF] */
};

static enum keep keep_of(const struct tvm_tensor *t)
{
    const double top = tvm_shared(t, P_TOPK);

    return top >= 1.0 ? KEEP_ALL : top > 0.0 ? KEEP_TOP : KEEP_NONE;
}

static int fold(const struct tvm_tensor *t)
{
    if (t->base >= 0 && (tvm_donor_count(t) == 0 || keep_of(t) == KEEP_NONE))
        return t->base;
    return -1;
}

static bool takes_sample(const struct tvm_job *job)
{
    return job->tensor->n_elems >= RANGE_ELEMS_MIN;
}

/* Of one worker. */
static size_t hist_words(const struct tvm_job *job)
{
    return takes_sample(job) ? RANGE_WIDTH : TVK_HIST_HI;
}

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct sce_state *st)
{
    struct tvm_carver c = {base, 0};
    const size_t w = job->n_workers;
    const size_t n = tvm_donor_count(job->tensor);

    (void)tvm_carve(&c, 1, sizeof *st);
    if (keep_of(job->tensor) == KEEP_TOP) {
        st->hist = tvm_carve(&c, w * hist_words(job), sizeof *st->hist);
        if (takes_sample(job))
            st->atoms =
                tvm_carve(&c, job->n_tiles * N_ATOMS, sizeof *st->atoms);
        st->above = tvm_carve(&c, w, sizeof *st->above);
        st->nonzero = tvm_carve(&c, w, sizeof *st->nonzero);
        st->eq = tvm_carve(&c, (size_t)job->n_tiles, sizeof *st->eq);
        st->eq_seen = tvm_carve(&c, w, sizeof *st->eq_seen);
    }
    st->square = tvm_carve(&c, n * (size_t)job->n_leaves, sizeof *st->square);
    st->block = tvm_carve(&c, w * n * BLOCKS_PER_LEAF, sizeof *st->block);
    return c.used;
}

static size_t state_bytes(const struct tvm_job *job)
{
    struct sce_state st = {.n_donors = 0};

    return lay_out(job, NULL, &st);
}

static void check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    tvm_check_finite(t, problems);
    if (keep_of(t) == KEEP_TOP && t->n_elems > UINT32_MAX)
        tvm_problem_add(problems, true, TV_E_UNSUPPORTED, t->name,
                        "sce of a tensor with more than 2^32 elements is not "
                        "supported");
}

/* Does the tensor go by mergekit's roundings? */
static bool is_compat(const struct tvm_job *job)
{
    return job->tensor->compute != TV_DTYPE_NONE;
}

/* ---- passes -------------------------------------------------------------- */

static const uint32_t *joined(const struct tvm_job *job, uint32_t n_buckets)
{
    const struct sce_state *st = job->state;

    tvm_hist_join(st->hist, hist_words(job), job->n_workers, n_buckets);
    return st->hist;
}

static void clear_hist(const struct tvm_job *job)
{
    const struct sce_state *st = job->state;

    memset(st->hist, 0, job->n_workers * hist_words(job) * sizeof *st->hist);
}

/* How many of so many variances are kept. */
static uint64_t share_of(const struct tvm_job *job, uint64_t nonzero)
{
    const double top = tvm_shared(job->tensor, P_TOPK);

    return is_compat(job) ? (uint64_t)((float)nonzero * (float)top)
                          : (uint64_t)((double)nonzero * top);
}

/* Sets how many are kept; false when none is. */
static bool find_k(const struct tvm_job *job, struct sce_state *st)
{
    uint64_t nonzero = 0;

    for (unsigned w = 0; w < job->n_workers; w++)
        nonzero += st->nonzero[w];
    st->k = share_of(job, nonzero);
    if (st->k == 0)
        st->keep = KEEP_NONE;
    return st->k > 0;
}

/* Returns true when there is a range to look into. */
static bool after_sample(const struct tvm_job *job, struct sce_state *st)
{
    const uint32_t *hist = joined(job, TVK_HIST_HI);
    uint64_t nonzero = 0;

    for (size_t i = 1; i < TVK_HIST_HI; i++)
        nonzero += hist[i];
    const bool found =
        tvm_range_find(hist, share_of(job, nonzero), RANGE_WIDTH, &st->first);
    clear_hist(job);
    return found;
}

/* Takes note of a threshold, `count` entries of which st->k are still to be
 * kept. Returns true when these are only some: which, is to be found. */
static bool set_pattern(struct sce_state *st, uint32_t pattern, uint64_t count)
{
    st->pattern = pattern;
    st->eq_limit = UINT64_MAX;
    if (st->k == count || pattern == 0)
        return false;
    st->eq_limit = st->k;
    return true;
}

static void after_count(const struct tvm_job *job, struct sce_state *st)
{
    uint64_t before = 0;

    for (size_t i = 0; i < (size_t)job->n_tiles; i++) {
        const uint64_t here = st->eq[i];
        st->eq[i] = before;
        before += here;
    }
}

/* Returns the step to follow. */
static enum step after_range(const struct tvm_job *job, struct sce_state *st)
{
    const uint32_t *hist = joined(job, RANGE_WIDTH);
    uint64_t above = 0;
    uint64_t within = 0;
    uint64_t count = 0;
    size_t atom = 0;

    if (!find_k(job, st))
        return STEP_SQUARES;
    for (unsigned w = 0; w < job->n_workers; w++)
        above += st->above[w];
    for (size_t i = 0; i < RANGE_WIDTH; i++)
        within += hist[i];
    if (st->k <= above || st->k > above + within) {
        memset(st->nonzero, 0, job->n_workers * sizeof *st->nonzero);
        clear_hist(job);
        return STEP_HIGH;
    }
    st->k -= above;
    const uint32_t at = tvm_hist_find(hist, RANGE_WIDTH, &st->k, &count);
    if (!set_pattern(st, st->first + at, count))
        return STEP_SQUARES;
    if (!tvm_atom_find(st->first, st->pattern, &atom))
        return STEP_COUNT;
    for (size_t i = 0; i < (size_t)job->n_tiles; i++)
        st->eq[i] = st->atoms[i * N_ATOMS + atom];
    after_count(job, st);
    return STEP_SQUARES;
}

static enum step after_high(const struct tvm_job *job, struct sce_state *st)
{
    uint64_t count = 0;

    if (!find_k(job, st))
        return STEP_SQUARES;
    st->hi =
        tvm_hist_find(joined(job, TVK_HIST_HI), TVK_HIST_HI, &st->k, &count);
    st->pattern = st->hi << 15;
    st->eq_limit = UINT64_MAX;
    clear_hist(job);
    return st->k < count ? STEP_LOW : STEP_SQUARES;
}

static enum step after_low(const struct tvm_job *job, struct sce_state *st)
{
    uint64_t count = 0;
    const uint32_t low =
        tvm_hist_find(joined(job, TVK_HIST_LO), TVK_HIST_LO, &st->k, &count);

    return set_pattern(st, st->pattern | low, count) ? STEP_COUNT
                                                     : STEP_SQUARES;
}

static void after_squares(const struct tvm_job *job, struct sce_state *st)
{
    const size_t n_leaves = (size_t)job->n_leaves;
    const double n = (double)job->tensor->n_elems;
    double sum = 0.0;

    for (size_t j = 0; j < st->n_donors; j++) {
        st->weight[j] = tvk_sum_tree(st->square + j * n_leaves, n_leaves) / n;
        sum += st->weight[j];
    }
    for (size_t j = 0; j < st->n_donors; j++)
        st->weight[j] = fabs(sum) < SUM_MIN ? 1.0 / (double)st->n_donors
                                            : st->weight[j] / sum;
}

static void compat_after_squares(const struct tvm_job *job,
                                 struct sce_state *st)
{
    const size_t n_leaves = (size_t)job->n_leaves;
    const double n = (double)job->tensor->n_elems;
    float sum = 0.0f;

    for (size_t j = 0; j < st->n_donors; j++) {
        const float w = tvm_compat_one(
            job, tvk_sum_tree(st->square + j * n_leaves, n_leaves) / n);
        st->weight[j] = (double)w;
        sum += w;
    }
    sum = tvm_compat_one(job, (double)sum);
    for (size_t j = 0; j < st->n_donors; j++)
        st->weight[j] = (double)tvm_compat_one(
            job,
            (double)(fabs((double)sum) < SUM_MIN ? 1.0f / (float)st->n_donors
                                                 : (float)st->weight[j] / sum));
}

static bool next_phase(struct tvm_job *job)
{
    struct sce_state *st = job->state;

    if (job->phase == 0) {
        (void)lay_out(job, st, st);
        st->n_donors = tvm_donor_count(job->tensor);
        st->keep = keep_of(job->tensor);
        if (st->n_donors == 0 || st->keep == KEEP_NONE)
            return false;
        st->step = st->keep == KEEP_TOP ? STEP_HIGH : STEP_SQUARES;
        if (st->keep == KEEP_TOP && takes_sample(job)) {
            st->step = STEP_SAMPLE;
            job->sample =
                job->tensor->n_elems < SAMPLE_ELEMS ? 2 * SAMPLE : SAMPLE;
        }
        return true;
    }
    switch (st->step) {
    case STEP_SAMPLE:
        st->step = after_sample(job, st) ? STEP_RANGE : STEP_HIGH;
        break;
    case STEP_RANGE:
        st->step = after_range(job, st);
        break;
    case STEP_HIGH:
        st->step = after_high(job, st);
        break;
    case STEP_LOW:
        st->step = after_low(job, st);
        break;
    case STEP_COUNT:
        after_count(job, st);
        st->step = STEP_SQUARES;
        break;
    case STEP_SQUARES:
        if (is_compat(job))
            compat_after_squares(job, st);
        else
            after_squares(job, st);
        return false;
    }
    return st->keep != KEEP_NONE;
}

/* ---- tiles --------------------------------------------------------------- */

static void tile_begin(struct tvm_job *job, struct tvm_tile *tile)
{
    const struct sce_state *st = job->state;

    if (st->keep == KEEP_TOP && st->step == STEP_SQUARES)
        st->eq_seen[tile->worker] = st->eq[tile->tile];
    if (st->step == STEP_RANGE)
        tvm_atoms_begin(st->atoms + (size_t)tile->tile * N_ATOMS,
                        st->hist + (size_t)tile->worker * RANGE_WIDTH,
                        st->first, RANGE_WIDTH);
}

/* Population variances of rounded task vectors, and rounded. */
static void compat_variances(const struct tvm_job *job, const float *base,
                             const float *const *x, size_t n_donors, float *v,
                             size_t n)
{
    double sum[TVM_BLOCK] = {0.0};
    double mean[TVM_BLOCK] = {0.0};
    float d[TVM_BLOCK];

    for (size_t j = 0; j < n_donors; j++) {
        tvm_compat_sub(job, d, x[j], base, n);
        for (size_t i = 0; i < n; i++) {
            const double off = (double)d[i] - mean[i];
            mean[i] += off / (double)(j + 1);
            sum[i] += off * ((double)d[i] - mean[i]);
        }
    }
    for (size_t i = 0; i < n; i++)
        v[i] = (float)(sum[i] / (double)n_donors);
    tvm_compat_round(job->k, job->tensor->compute, v, n);
}

static void spread(const struct tvm_job *job, const float *base,
                   const float *const *x, float *v, size_t n)
{
    const struct sce_state *st = job->state;

    if (is_compat(job))
        compat_variances(job, base, x, st->n_donors, v, n);
    else
        job->k->variance(v, base, x, st->n_donors, n);
}

static void select_mask(const struct tvm_job *job, const struct tvm_tile *tile,
                        const float *v, uint64_t *mask, size_t n)
{
    const struct sce_state *st = job->state;

    (void)job->k->topk_mask(mask, v, NULL, st->pattern,
                            &st->eq_seen[tile->worker], st->eq_limit, n);
}

static void squares(const struct tvm_job *job, const struct tvm_tile *tile,
                    const float *base, const float *const *x,
                    const uint64_t *mask, size_t n)
{
    const struct sce_state *st = job->state;
    const size_t in_leaf = (size_t)(tile->start % TVK_LEAF / TVM_BLOCK);
    const size_t leaf = (size_t)(tile->start / TVK_LEAF);
    float d[TVM_BLOCK];

    for (size_t j = 0; j < st->n_donors; j++) {
        double *block =
            st->block + (tile->worker * st->n_donors + j) * BLOCKS_PER_LEAF;
        if (is_compat(job)) {
            tvm_compat_sub(job, d, x[j], base, n);
            if (mask)
                job->k->keep(d, mask, n);
            tvm_compat_mul(job, d, d, d, n);
            block[in_leaf] = tvm_compat_total(d, n);
        } else {
            block[in_leaf] = job->k->square_sum(x[j], base, mask, n);
        }
        if (in_leaf + 1 == BLOCKS_PER_LEAF ||
            tile->start + n == job->tensor->n_elems)
            st->square[j * (size_t)job->n_leaves + leaf] =
                tvk_sum_tree(block, in_leaf + 1);
    }
}

static void measure(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, size_t n)
{
    const struct sce_state *st = job->state;
    const float *base = x[job->tensor->base];
    uint32_t *hist = NULL;
    const float *d[TVK_DONORS_MAX];
    uint64_t *mask = tile->mask_words;
    float v[TVM_BLOCK];

    (void)tvm_donors(job->tensor, x, d);
    if (st->keep == KEEP_TOP) {
        hist = st->hist + (size_t)tile->worker * hist_words(job);
        spread(job, base, d, v, n);
    }
    switch (st->step) {
    case STEP_SAMPLE:
        job->k->hist_hi(hist, v, NULL, n);
        break;
    case STEP_RANGE:
        st->nonzero[tile->worker] += n - job->k->count_eq(v, NULL, 0, n);
        st->above[tile->worker] +=
            job->k->hist_range(hist, st->first, RANGE_WIDTH, v, NULL, n);
        if (tile->start + n == tile->first + tile->n)
            tvm_atoms_end(st->atoms + (size_t)tile->tile * N_ATOMS, hist,
                          st->first, RANGE_WIDTH);
        break;
    case STEP_HIGH:
        st->nonzero[tile->worker] += n - job->k->count_eq(v, NULL, 0, n);
        job->k->hist_hi(hist, v, NULL, n);
        break;
    case STEP_LOW:
        job->k->hist_lo(hist, st->hi, v, NULL, n);
        break;
    case STEP_COUNT:
        st->eq[tile->tile] += job->k->count_eq(v, NULL, st->pattern, n);
        break;
    case STEP_SQUARES:
        if (st->keep == KEEP_TOP)
            select_mask(job, tile, v, mask, n);
        squares(job, tile, base, d, st->keep == KEEP_TOP ? mask : NULL, n);
        break;
    }
}

/* The merge of a block with mergekit's roundings. */
static void compat_erase(const struct tvm_job *job, const float *base,
                         const float *const *x, const uint64_t *mask,
                         float *dst, size_t n)
{
    const struct sce_state *st = job->state;
    const enum tv_dtype c = job->tensor->compute;
    const float least = tvm_compat_one(job, SUM_MIN);
    float vote[TVM_BLOCK] = {0.0f};
    float by[TVM_BLOCK] = {0.0f};
    float d[TVM_BLOCK];

    memset(dst, 0, n * sizeof *dst);
    for (unsigned round = 0; round < 2; round++) {
        for (size_t j = 0; j < st->n_donors; j++) {
            tvm_compat_sub(job, d, x[j], base, n);
            if (mask)
                job->k->keep(d, mask, n);
            if (round == 0) {
                for (size_t i = 0; i < n; i++)
                    vote[i] += d[i];
                continue;
            }
            for (size_t i = 0; i < n; i++) {
                const bool in = vote[i] >= 0.0f ? d[i] > 0.0f : d[i] < 0.0f;
                const float w = in ? (float)st->weight[j] : 0.0f;
                by[i] += w;
                d[i] *= w;
            }
            tvm_compat_round(job->k, c, d, n);
            for (size_t i = 0; i < n; i++)
                dst[i] += d[i];
        }
        tvm_compat_round(job->k, c, round == 0 ? vote : by, n);
    }
    tvm_compat_round(job->k, c, dst, n);
    for (size_t i = 0; i < n; i++)
        dst[i] /= by[i] > least ? by[i] : least;
    tvm_compat_round(job->k, c, dst, n);
    tvm_compat_add(job, dst, base, dst, n);
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const struct sce_state *st = job->state;
    const float *base = x[job->tensor->base];
    const float *d[TVK_DONORS_MAX];
    uint64_t *mask = tile->mask_words;
    float v[TVM_BLOCK];

    if (st->keep == KEEP_NONE || st->n_donors == 0) {
        memcpy(dst, base, n * sizeof *dst);
        return;
    }
    (void)tvm_donors(job->tensor, x, d);
    if (st->keep == KEEP_TOP) {
        spread(job, base, d, v, n);
        select_mask(job, tile, v, mask, n);
    }
    if (is_compat(job)) {
        compat_erase(job, base, d, st->keep == KEEP_TOP ? mask : NULL, dst, n);
        return;
    }
    job->k->elect(dst, base, d, st->keep == KEEP_TOP ? mask : NULL, st->weight,
                  st->n_donors, n);
}

const struct tvm_method tvm_method_sce = {
    .name = "sce",
    .summary = "positions that differ most, weighed by energy, majority signs",
    .paper = "FuseChat, Wan et al. 2024, arXiv 2408.07990",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 0,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_PARAMS,
    .check = check,
    .fold = fold,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .tile_begin = tile_begin,
    .measure = measure,
    .combine = combine,
    /* is_compat() says how; which of equal variances are kept is torch's affair
     * there. */
    .compat = &tvm_method_sce,
};
