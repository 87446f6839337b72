/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_gta.c - generalised task arithmetic: base plus a combination of
 * sparsified, weighted task vectors d_i = x_i - base, with or without sign
 * election (the formula is tvk_table::gta).
 *
 * Rows of the family: task arithmetic, TIES, DARE; each file cites its paper.
 * The names of the common parameters and their meaning are mergekit's (Goddard
 * et al. 2024, arXiv 2403.13257).
 *
 * Trimming by magnitude keeps exactly k = max(1, trunc(density * n)) entries of
 * a tensor without ever holding it. Up to four passes over the tiles:
 *
 *   HIGH    histogram of the upper 16 magnitude bits -> bucket of the k-th
 *   LOW     histogram of the lower 15 bits inside it -> its exact pattern
 *   COUNT   entries equal to the pattern, per tile   -> which of them to keep
 *           (of patterns that heap up RANGE has counted them: select.h)
 *   KEPT    sum of kept magnitudes (only to rescale)
 *
 * Where that is known to pay, HIGH and LOW become one pass: SAMPLE fills the
 * histogram of HIGH from the head of every block, which tells about where the
 * k-th entry lies; RANGE counts what lies above a range of patterns around
 * there, and each pattern inside. If the k-th is not inside after all, HIGH and
 * LOW follow as ever: a sample decides how long it takes, never what is kept.
 *
 * HIGH and LOW go over at most GROUP_MAX donors at a time, as every worker has
 * a histogram for each; more donors take more passes, not more memory.
 * LOW and COUNT are left out for donors whose bucket or pattern is kept whole.
 * Outlier trimming (breadcrumbs) takes the largest entries off again: a second
 * selection from the same histogram. Zeros are never kept. Random thinning
 * needs no pass, nor does a donor whose mask is known from an earlier run. With
 * trim_scope the pattern is that of a layer or of the model, found before
 * (gta_survey.c), and only COUNT is left.
 */
#include "method_gta.h"

#include "compat_gta.h"
#include "mt.h"
#include "select.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "tv/checked.h"

#define BLOCKS_PER_LEAF (TVK_LEAF / TVM_BLOCK)
#define BLOCK_WORDS     (TVM_BLOCK / 64)
#define GROUP_MAX       ((size_t)32) /* 8 MiB of histograms per worker */
/* A range of four buckets of HIGH: some 0.2 to 0.35% of normally distributed
 * entries on either side of its middle, four or more standard deviations of the
 * rank in a sample of 2^19. */
#define RANGE_BUCKETS   4u
#define RANGE_WIDTH     (RANGE_BUCKETS << 15)
#define N_ATOMS         tvm_atoms(RANGE_WIDTH)
#define RANGE_MAX       ((size_t)8) /* selections; 4 MiB per worker */
#define RANGE_ELEMS_MIN ((uint64_t)2 << 20)
#define SAMPLE_ELEMS    ((uint64_t)8 << 20) /* fewer: sampled twice as densely */
#define SAMPLE          (TVM_BLOCK / 16)
#define RESCALE_MIN     1e-7 /* mergekit: smaller sums are not rescaled */

enum step {
    STEP_SAMPLE,
    STEP_RANGE,
    STEP_HIGH,
    STEP_LOW,
    STEP_COUNT,
    STEP_KEPT
};

struct donor {
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
    enum step step;
    size_t n_donors, n_top; /* n_top: with a slot */
    size_t n_select;        /* donors, then what is taken off again */
    size_t n_hist;          /* GTA_KEEP_TOP at first: histograms */
    size_t n_random;        /* GTA_KEEP_RANDOM from mergekit's stream */
    size_t n_measured; /* GTA_KEEP_TOP; the rest of n_top is GTA_KEEP_KNOWN */
    bool match_l1;
    struct tvk_gta call;
    double *coef, *weight; /* [n_donors] */
    struct donor *donor;   /* [n_select] */
    size_t first;          /* slot of the group being measured */
    bool any_count;        /* some donor needs the COUNT pass */
    uint32_t *hist;        /* [n_workers][group_size][hist_words] */
    size_t hist_words;
    uint32_t *atoms;   /* [n_tiles][n_hist][N_ATOMS], with a sample */
    uint64_t *above;   /* [n_workers][n_top]: over the range */
    uint64_t *eq;      /* [n_tiles][n_top]: count, then prefix */
    uint64_t *eq_seen; /* [n_workers][n_top]: in the tile at hand */
    double *sum_all;   /* [n_top][n_leaves] */
    double *sum_kept;  /* [n_top][n_leaves] */
    double *block;     /* [n_workers][n_top][2][BLOCKS_PER_LEAF] */
    /* Only with gta_detail::mergekit: */
    float *scale;           /* [n_donors] */
    float *delta;           /* [n_workers][n_donors][TVM_BLOCK] */
    struct tvm_mt *mt_tile; /* [n_tiles][n_random]: at its start */
    struct tvm_mt *mt;      /* [n_workers][n_random] */
};

const char *const gta_sparsifiers[] = {"none",       "magnitude", "random",
                                       "importance", "sparsegpt", NULL};
const char *const gta_corrections[] = {"auto", "none",   "obs",
                                       "cg",   "obs+cg", NULL};
const char *const gta_compares[] = {"auto",  "layer", "row",
                                    "block", "loop",  NULL};
const char *const gta_inputs[] = {"own", "base", "merged", NULL};
const char *const gta_others[] = {"dense", "magnitude", NULL};
const char *const gta_embeddings[] = {"others", "counts", NULL};
const char *const gta_patterns[] = {"none", "1:2",  "1:4",  "2:4",   "3:4",
                                    "1:8",  "2:8",  "4:8",  "6:8",   "2:16",
                                    "4:16", "8:16", "8:32", "16:32", NULL};
static const unsigned patterns[][2] = {
    {0, 0}, {1, 2}, {1, 4},  {2, 4},  {3, 4},  {1, 8},  {2, 8},
    {4, 8}, {6, 8}, {2, 16}, {4, 16}, {8, 16}, {8, 32}, {16, 32}};

static const struct gta_detail *detail_of(const struct tvm_tensor *t)
{
    return t->method->detail;
}

static enum gta_sparsify sparsify_of(const struct tvm_tensor *t)
{
    static const enum gta_sparsify by_choice[] = {
        GTA_NONE, GTA_MAGNITUDE, GTA_RANDOM, GTA_IMPORTANCE, GTA_SPARSEGPT};

    if (!detail_of(t)->choose || !t->shared_set[GTA_SPARSIFY])
        return detail_of(t)->sparsify;
    return by_choice[(size_t)tvm_shared(t, GTA_SPARSIFY)];
}

static double weight_of(const struct tvm_tensor *t, size_t source)
{
    return tvm_of(t, source, GTA_WEIGHT, t->method->n_params);
}

static bool by_statistics(const struct tvm_tensor *t)
{
    return sparsify_of(t) == GTA_IMPORTANCE || sparsify_of(t) == GTA_SPARSEGPT;
}

/* Is it thinned by statistics of what comes in? */
static bool has_statistics(const struct tvm_tensor *t)
{
    return by_statistics(t) &&
           (t->has_inputs ||
            (t->is_embedding && tvm_shared(t, GTA_EMBEDDINGS) != 0.0));
}

static double density_of(const struct tvm_tensor *t, size_t source)
{
    if (by_statistics(t) && t->has_inputs) {
        const unsigned *p = patterns[(size_t)tvm_shared(t, GTA_PATTERN)];
        if (p[1] > 0)
            return (double)p[0] / (double)p[1];
    }
    return tvm_of(t, source, GTA_DENSITY, t->method->n_params);
}

enum gta_keep gta_keep_of(const struct tvm_tensor *t, size_t source)
{
    const double density = density_of(t, source);

    if (sparsify_of(t) == GTA_NONE || density >= 1.0)
        return GTA_KEEP_ALL;
    if (by_statistics(t) && !has_statistics(t) &&
        tvm_shared(t, GTA_OTHERS) == 0.0)
        return GTA_KEEP_ALL;
    if (!(density > 0.0))
        return GTA_KEEP_NONE;
    if (sparsify_of(t) == GTA_OUTLIERS && density * (double)t->n_elems < 1.0)
        return GTA_KEEP_NONE;
    return sparsify_of(t) == GTA_RANDOM ? GTA_KEEP_RANDOM : GTA_KEEP_TOP;
}

enum tvm_reach gta_reach(const struct tvm_tensor *t)
{
    if (!detail_of(t)->scoped || sparsify_of(t) != GTA_MAGNITUDE ||
        tvm_shared(t, GTA_SCOPE) == 0.0)
        return TVM_REACH_TENSOR;
    for (size_t s = 0; s < t->n_sources; s++)
        if ((int)s != t->base && gta_keep_of(t, s) == GTA_KEEP_TOP)
            return (enum tvm_reach)tvm_shared(t, GTA_SCOPE);
    return TVM_REACH_TENSOR;
}

static bool is_scoped(const struct tvm_tensor *t)
{
    return gta_reach(t) != TVM_REACH_TENSOR;
}

/* Sources but the base. */
static size_t count_donors(const struct tvm_tensor *t, size_t *n_top,
                           size_t *n_random)
{
    size_t n = 0;
    *n_top = 0;
    *n_random = 0;
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        n++;
        if (gta_keep_of(t, s) == GTA_KEEP_TOP)
            *n_top += sparsify_of(t) == GTA_OUTLIERS ? 2 : 1;
        if (gta_keep_of(t, s) == GTA_KEEP_RANDOM)
            (*n_random)++;
    }
    return n;
}

static void check_statistics(const struct tvm_tensor *t,
                             struct tvm_problems *problems)
{
    if (!by_statistics(t))
        return;
    const double correct = tvm_shared(t, GTA_CORRECT);

    if (detail_of(t)->mergekit)
        tvm_param_problem(t, GTA_SPARSIFY, SIZE_MAX, problems,
                          "--compat mergekit: mergekit has no sparsify: %s",
                          gta_sparsifiers[(size_t)tvm_shared(t, GTA_SPARSIFY)]);
    if (sparsify_of(t) == GTA_IMPORTANCE &&
        (correct == 1.0 + TVM_CORRECT_OBS ||
         correct == 1.0 + TVM_CORRECT_OBS_CG))
        tvm_param_problem(t, GTA_CORRECT, SIZE_MAX, problems,
                          "error_correction: obs chooses entries itself: write "
                          "sparsify: sparsegpt");
    if (sparsify_of(t) == GTA_IMPORTANCE &&
        tvm_shared(t, GTA_COMPARE) == 1.0 + TVM_COMPARE_LOOP)
        tvm_param_problem(
            t, GTA_COMPARE, SIZE_MAX, problems,
            "importance_scope: loop is SparseGPT's: write sparsify: "
            "sparsegpt");
}

void gta_check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    size_t n_top = 0;
    size_t n_random = 0;

    tvm_check_finite(t, problems);
    (void)count_donors(t, &n_top, &n_random);
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base || detail_of(t)->mergekit ||
            gta_keep_of(t, s) != GTA_KEEP_RANDOM ||
            tvm_shared(t, GTA_RESCALE) == 0.0)
            continue;
        tvm_problem_note(problems, t->name,
                         "rescale divides by density, as in the DARE paper; "
                         "mergekit since 0.1.5 matches L1 norms instead");
        break;
    }
    check_statistics(t, problems);
    if (detail_of(t)->mergekit && is_scoped(t))
        tvm_param_problem(t, GTA_SCOPE, SIZE_MAX, problems,
                          "mergekit has no trim_scope: it cannot be combined "
                          "with --compat mergekit");
    /* The histograms count in 32 bits. */
    if (n_top > 0 && t->n_elems > UINT32_MAX)
        tvm_problem_add(problems, true, TV_E_UNSUPPORTED, t->name,
                        "%s of a tensor with more than 2^32 elements is not "
                        "supported",
                        t->method->name);
}

int gta_fold(const struct tvm_tensor *t)
{
    const double lambda = tvm_shared(t, GTA_LAMBDA);
    const bool normalize = tvm_shared(t, GTA_NORMALIZE) != 0.0;
    size_t n_donors = 0;
    size_t donor = 0;
    bool none = true;

    if (t->base < 0)
        return -1;
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        n_donors++;
        donor = s;
        none = none &&
               (weight_of(t, s) == 0.0 || gta_keep_of(t, s) == GTA_KEEP_NONE);
    }
    if (none || lambda == 0.0)
        return t->base;
    if (n_donors != 1 || gta_keep_of(t, donor) != GTA_KEEP_ALL)
        return -1;
    const double w = weight_of(t, donor);
    if (normalize)
        return lambda == 1.0 && fabs(w) >= 1e-8 ? (int)donor : -1;
    return w * lambda == 1.0 ? (int)donor : -1;
}

/* ---- state --------------------------------------------------------------- */

static size_t group_size(const struct gta_state *st)
{
    return st->n_hist < GROUP_MAX ? st->n_hist : GROUP_MAX;
}

static bool in_group(const struct gta_state *st, const struct donor *d)
{
    return d->keep == GTA_KEEP_TOP && d->slot >= st->first &&
           d->slot - st->first < GROUP_MAX;
}

/* Do the selections of a tensor begin with a sample? */
static bool takes_sample(const struct tvm_tensor *t, const struct gta_state *st)
{
    return st->n_hist > 0 && st->n_hist <= RANGE_MAX &&
           t->n_elems >= RANGE_ELEMS_MIN;
}

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct gta_state *st)
{
    struct tvm_carver c = {base, 0};
    const size_t k = st->n_donors;
    const size_t top = st->n_top;
    const uint64_t w = job->n_workers;

    (void)tvm_carve(&c, 1, sizeof *st);
    st->coef = tvm_carve(&c, k, sizeof *st->coef);
    st->weight = tvm_carve(&c, k, sizeof *st->weight);
    st->donor = tvm_carve(&c, st->n_select, sizeof *st->donor);
    st->hist_words = takes_sample(job->tensor, st) ? RANGE_WIDTH : TVK_HIST_HI;
    st->hist =
        tvm_carve(&c, w * group_size(st) * st->hist_words, sizeof *st->hist);
    if (takes_sample(job->tensor, st))
        st->atoms = tvm_carve(&c, job->n_tiles * st->n_hist * N_ATOMS,
                              sizeof *st->atoms);
    st->above = tvm_carve(&c, w * top, sizeof *st->above);
    st->eq = tvm_carve(&c, job->n_tiles * top, sizeof *st->eq);
    st->eq_seen = tvm_carve(&c, w * top, sizeof *st->eq_seen);
    if (st->match_l1) {
        st->sum_all = tvm_carve(&c, top * job->n_leaves, sizeof *st->sum_all);
        st->sum_kept = tvm_carve(&c, top * job->n_leaves, sizeof *st->sum_kept);
        st->block =
            tvm_carve(&c, 2 * w * top * BLOCKS_PER_LEAF, sizeof *st->block);
    }
    if (detail_of(job->tensor)->mergekit) {
        st->scale = tvm_carve(&c, k, sizeof *st->scale);
        st->delta =
            tvm_carve(&c, w * st->n_select * TVM_BLOCK, sizeof *st->delta);
        st->mt_tile =
            tvm_carve(&c, job->n_tiles * st->n_random, sizeof *st->mt_tile);
        st->mt = tvm_carve(&c, w * st->n_random, sizeof *st->mt);
    }
    return c.used;
}

static void count_parts(const struct tvm_tensor *t, struct gta_state *st)
{
    st->n_donors = count_donors(t, &st->n_hist, &st->n_random);
    st->n_top = st->n_hist;
    if (is_scoped(t)) /* the thresholds are given */
        st->n_hist = 0;
    st->n_select = st->n_donors;
    if (sparsify_of(t) == GTA_OUTLIERS)
        st->n_select += st->n_top / 2;
    if (detail_of(t)->mergekit)
        st->n_top += st->n_random;
    /* With statistics the factor is a least-squares one, made before. */
    st->match_l1 = st->n_top > 0 && !is_scoped(t) && !by_statistics(t) &&
                   tvm_shared(t, GTA_RESCALE) != 0.0;
}

size_t gta_state_bytes(const struct tvm_job *job)
{
    struct gta_state st = {.n_donors = 0};

    count_parts(job->tensor, &st);
    return lay_out(job, NULL, &st);
}

static void set_random(const struct tvm_job *job, struct donor *d,
                       size_t position, double density)
{
    unsigned char bytes[12];

    tv_put_le64(bytes, job->seed);
    tv_put_le32(bytes + 8, (uint32_t)position);
    d->key = tv_hash64(bytes, sizeof bytes);
    d->threshold = (uint64_t)round(density * 4294967296.0);
}

static void set_top(const struct tvm_job *job, struct donor *d, size_t *slot,
                    double density)
{
    d->slot = (*slot)++;
    d->k = (uint64_t)(density * (double)job->tensor->n_elems);
    if (d->k == 0)
        d->k = 1;
    d->eq_limit = UINT64_MAX;
}

/* The factor that gives what is kept the magnitude of the whole. */
static double rescaled(double weight, double all, double kept)
{
    /* Not finite: an infinite entry must not turn the others into NaN. */
    if (all >= RESCALE_MIN && kept >= RESCALE_MIN && isfinite(all))
        return weight * (all / kept);
    return weight;
}

/* A threshold that several tensors have in common. */
static void set_scoped(const struct tvm_job *job, struct donor *d, size_t j,
                       size_t *slot)
{
    struct gta_state *st = job->state;
    const struct tvm_cut *cut = &job->tensor->cuts[d->source];

    d->slot = (*slot)++;
    d->pattern = cut->pattern;
    d->eq_limit = cut->eq_limit;
    d->needs_count = cut->eq_limit != UINT64_MAX;
    st->any_count = st->any_count || d->needs_count;
    if (tvm_shared(job->tensor, GTA_RESCALE) != 0.0)
        st->coef[j] = rescaled(st->weight[j], cut->sum_all, cut->sum_kept);
}

/* Ascending positions [bot, bot + target) of n, top above them: the target +
 * top largest but the top largest. */
static void set_outliers(const struct tvm_job *job, struct donor *d,
                         struct donor *less, size_t *slot, double density)
{
    const struct tvm_tensor *t = job->tensor;
    const double n = (double)t->n_elems;
    const double gamma = tvm_of(t, d->source, GTA_EXTRA, t->method->n_params);
    const uint64_t target = (uint64_t)(density * n);
    const uint64_t top = (uint64_t)(gamma * n);

    d->slot = *slot;
    d->k = top < t->n_elems - target ? target + top : t->n_elems;
    d->eq_limit = UINT64_MAX;
    if (d->k > target) {
        *less = *d;
        less->slot = *slot + 1;
        less->k = d->k - target;
        d->less = (size_t)(less - ((struct gta_state *)job->state)->donor);
    }
    /* Two slots always: a pair then never falls into two groups. */
    *slot += 2;
}

uint64_t gta_draws(const struct tvm_tensor *t)
{
    uint64_t n = 0;

    if (sparsify_of(t) != GTA_RANDOM)
        return 0;
    /* A density of 0 draws as well. */
    for (size_t s = 0; s < t->n_sources; s++)
        if ((int)s != t->base &&
            tvm_of(t, s, GTA_DENSITY, t->method->n_params) < 1.0)
            n += t->n_elems;
    return n;
}

/* mergekit's order: all of one donor, then all of the next. */
static void find_draws(const struct tvm_job *job)
{
    struct gta_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    uint64_t at = t->draw_at;
    size_t draw = 0;

    for (size_t j = 0; j < st->n_donors; j++) {
        struct donor *d = &st->donor[j];
        const double density =
            tvm_of(t, d->source, GTA_DENSITY, t->method->n_params);
        struct tvm_mt mt;
        if (!(density < 1.0))
            continue;
        if (d->keep == GTA_KEEP_RANDOM) {
            d->draw = draw++;
            d->slot = d->draw;
            d->p = t->compute == TV_BF16
                       ? tvm_compat_round1(job->k, TV_BF16, density)
                       : (float)density;
            tvm_mt_stream_seek(job->stream, at, &mt);
            for (uint64_t i = 0; i < job->n_tiles; i++) {
                st->mt_tile[(size_t)i * st->n_random + d->draw] = mt;
                tvm_mt_skip(&mt, job->tile_elems);
            }
        }
        at += t->n_elems;
    }
}

static enum tvm_correct correct_of(const struct tvm_tensor *t)
{
    const size_t c = (size_t)tvm_shared(t, GTA_CORRECT);

    if (c > 0)
        return (enum tvm_correct)(c - 1);
    return sparsify_of(t) == GTA_SPARSEGPT ? TVM_CORRECT_OBS : TVM_CORRECT_NONE;
}

static enum tvm_compare compare_of(const struct tvm_tensor *t)
{
    const size_t c = (size_t)tvm_shared(t, GTA_COMPARE);

    if (c > 0)
        return (enum tvm_compare)(c - 1);
    return sparsify_of(t) == GTA_SPARSEGPT ? TVM_COMPARE_LOOP
                                           : TVM_COMPARE_LAYER;
}

/* Not what several tensors trim together: masks are of one by itself. */
bool gta_trims(const struct tvm_tensor *t, size_t source,
               struct tvm_trim_rule *rule)
{
    if (t->base < 0 || (int)source == t->base ||
        gta_keep_of(t, source) != GTA_KEEP_TOP ||
        sparsify_of(t) == GTA_OUTLIERS || is_scoped(t))
        return false;
    *rule = (struct tvm_trim_rule){.density = density_of(t, source)};
    if (!has_statistics(t)) {
        rule->needs_sums =
            tvm_shared(t, GTA_RESCALE) != 0.0 && !by_statistics(t);
        return true;
    }
    const unsigned *p = patterns[(size_t)tvm_shared(t, GTA_PATTERN)];
    rule->calibrated = true;
    if (!t->has_inputs) {
        /* One-hot inputs: X^T X is its diagonal, the counts, so all ways to
         * prune by it come to the same mask, and no block changes it. */
        rule->counts = true;
        rule->score = TVM_SCORE_DIAGONAL;
        rule->inputs = tvm_shared(t, GTA_INPUTS) == TVM_INPUTS_BASE
                           ? TVM_INPUTS_BASE
                           : TVM_INPUTS_OWN;
        return true;
    }
    rule->score = sparsify_of(t) == GTA_SPARSEGPT ? TVM_SCORE_CHOLESKY
                                                  : TVM_SCORE_DIAGONAL;
    rule->compare = compare_of(t);
    rule->n_kept = p[0];
    rule->group = p[1];
    rule->correct = correct_of(t);
    rule->rescale = tvm_shared(t, GTA_RESCALE) != 0.0;
    rule->damping = tvm_shared(t, GTA_DAMPING);
    if (tvm_shared(t, GTA_CG_STEPS) >= 1.0)
        rule->cg_steps = (unsigned)fmin(tvm_shared(t, GTA_CG_STEPS), 1000.0);
    rule->inputs = (enum tvm_inputs_of)tvm_shared(t, GTA_INPUTS);
    return true;
}

static void set_up(struct tvm_job *job)
{
    struct gta_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    size_t slot = 0;
    size_t j = 0;

    count_parts(t, st);
    (void)lay_out(job, st, st);
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        struct donor *d = &st->donor[j];
        const double density = tvm_of(t, s, GTA_DENSITY, t->method->n_params);
        d->source = s;
        d->keep = gta_keep_of(t, s);
        st->weight[j] = weight_of(t, s);
        st->coef[j] = st->weight[j];
        if (d->keep == GTA_KEEP_RANDOM && !detail_of(t)->mergekit) {
            set_random(job, d, t->sources[s].position, density);
            if (tvm_shared(t, GTA_RESCALE) != 0.0)
                st->coef[j] = st->weight[j] / density;
        }
        if (d->keep == GTA_KEEP_TOP && job->trim && job->trim[s].known) {
            d->keep = GTA_KEEP_KNOWN;
            if (st->match_l1)
                st->coef[j] = rescaled(st->weight[j], job->trim[s].sum_all,
                                       job->trim[s].sum_kept);
        }
        if (d->keep == GTA_KEEP_TOP && is_scoped(t))
            set_scoped(job, d, j, &slot);
        else if (d->keep == GTA_KEEP_TOP && sparsify_of(t) == GTA_OUTLIERS)
            set_outliers(job, d, &st->donor[st->n_donors + slot / 2], &slot,
                         density);
        else if (d->keep == GTA_KEEP_TOP)
            set_top(job, d, &slot, density);
        j++;
    }
    st->n_measured = is_scoped(t) ? 0 : slot;
    if (detail_of(t)->mergekit && st->n_random > 0)
        find_draws(job);
    st->call = (struct tvk_gta){
        .n_donors = st->n_donors,
        .coef = st->coef,
        .weight = st->weight,
        .consensus = detail_of(t)->consensus,
        .normalize = tvm_shared(t, GTA_NORMALIZE) != 0.0,
        .lambda = tvm_shared(t, GTA_LAMBDA),
    };
}

/* ---- selection ----------------------------------------------------------- */

static uint32_t *hist_of(const struct gta_state *st, unsigned worker,
                         size_t slot)
{
    return st->hist + ((size_t)worker * group_size(st) + slot - st->first) *
                          st->hist_words;
}

/* Joins the workers' counts of a slot. */
static const uint32_t *joined(const struct tvm_job *job, size_t slot,
                              uint32_t n_buckets)
{
    const struct gta_state *st = job->state;
    uint32_t *hist = hist_of(st, 0, slot);

    tvm_hist_join(hist, group_size(st) * st->hist_words, job->n_workers,
                  n_buckets);
    return hist;
}

static void clear_hist(const struct tvm_job *job)
{
    const struct gta_state *st = job->state;

    memset(st->hist, 0,
           job->n_workers * group_size(st) * st->hist_words * sizeof *st->hist);
}

static bool find_range(const struct tvm_job *job, struct donor *d,
                       const uint32_t *hist)
{
    uint64_t n = 0;

    for (size_t i = 0; i < TVK_HIST_HI; i++)
        n += hist[i];
    const double share = (double)d->k / (double)job->tensor->n_elems;
    return tvm_range_find(hist, (uint64_t)(share * (double)n), RANGE_WIDTH,
                          &d->first);
}

/* Returns true when every selection has a range to look into. */
static bool after_sample(struct tvm_job *job)
{
    struct gta_state *st = job->state;
    bool all = true;

    for (size_t j = 0; j < st->n_donors; j++) {
        struct donor *d = &st->donor[j];
        if (d->keep != GTA_KEEP_TOP)
            continue;
        const uint32_t *hist = joined(job, d->slot, TVK_HIST_HI);
        all = find_range(job, d, hist) && all;
        if (d->less > 0)
            all = find_range(job, &st->donor[d->less], hist) && all;
    }
    clear_hist(job);
    return all;
}

/* Takes note of a pattern, `k` of the `count` entries that have it still to be
 * kept. */
static void set_pattern(struct gta_state *st, struct donor *d, uint32_t pattern,
                        uint64_t k, uint64_t count)
{
    d->k = k;
    d->pattern = pattern;
    /* Zeros are dropped anyway: no need to know which. */
    if (k < count && pattern != 0) {
        d->eq_limit = k;
        d->needs_count = true;
        st->any_count = true;
    }
}

static uint32_t *atoms_of(const struct gta_state *st, uint64_t tile,
                          const struct donor *d)
{
    return st->atoms + ((size_t)tile * st->n_hist + d->slot) * N_ATOMS;
}

/* The same of a pattern in a range; it need not be counted where each tile has
 * done that. */
static void set_range_pattern(const struct tvm_job *job, struct donor *d,
                              uint32_t pattern, uint64_t k, uint64_t count)
{
    struct gta_state *st = job->state;
    const bool any = st->any_count;
    size_t atom = 0;

    set_pattern(st, d, pattern, k, count);
    if (!d->needs_count || !tvm_atom_find(d->first, pattern, &atom))
        return;
    for (uint64_t i = 0; i < job->n_tiles; i++)
        st->eq[(size_t)i * st->n_top + d->slot] = atoms_of(st, i, d)[atom];
    d->needs_count = false;
    st->any_count = any;
}

/* Returns true when all patterns are found. */
static bool after_range(struct tvm_job *job)
{
    struct gta_state *st = job->state;
    bool all = true;

    for (size_t j = 0; j < st->n_select; j++) {
        struct donor *d = &st->donor[j];
        uint64_t above = 0;
        uint64_t count = 0;
        uint64_t within = 0;
        if (d->keep != GTA_KEEP_TOP)
            continue;
        const uint32_t *hist = joined(job, d->slot, RANGE_WIDTH);
        for (unsigned w = 0; w < job->n_workers; w++)
            above += st->above[w * st->n_top + d->slot];
        for (size_t i = 0; i < RANGE_WIDTH; i++)
            within += hist[i];
        if (d->k <= above || d->k > above + within) {
            all = false;
            continue;
        }
        uint64_t k = d->k - above;
        const uint32_t at = tvm_hist_find(hist, RANGE_WIDTH, &k, &count);
        d->found = true;
        set_range_pattern(job, d, d->first + at, k, count);
    }
    clear_hist(job);
    return all;
}

static bool find_high(struct donor *d, const uint32_t *hist)
{
    uint64_t count = 0;

    d->hi = tvm_hist_find(hist, TVK_HIST_HI, &d->k, &count);
    d->pattern = d->hi << 15;
    d->needs_low = d->k < count;
    return d->needs_low;
}

/* Returns true when some donor needs the LOW pass. */
static bool after_high(struct tvm_job *job)
{
    struct gta_state *st = job->state;
    bool again = false;

    for (size_t j = 0; j < st->n_donors; j++) {
        struct donor *d = &st->donor[j];
        if (!in_group(st, d))
            continue;
        const uint32_t *hist = joined(job, d->slot, TVK_HIST_HI);
        if (!d->found)
            again = find_high(d, hist) || again;
        if (d->less > 0 && !st->donor[d->less].found)
            again = find_high(&st->donor[d->less], hist) || again;
        for (unsigned w = 0; w < job->n_workers; w++)
            memset(hist_of(st, w, d->slot), 0, TVK_HIST_LO * sizeof(uint32_t));
    }
    return again;
}

/* Returns true when there is another group to measure. */
static bool after_low(struct tvm_job *job)
{
    struct gta_state *st = job->state;

    for (size_t j = 0; j < st->n_select; j++) {
        struct donor *d = &st->donor[j];
        if (!d->needs_low)
            continue;
        uint64_t count = 0;
        uint64_t k = d->k;
        const uint32_t low = tvm_hist_find(joined(job, d->slot, TVK_HIST_LO),
                                           TVK_HIST_LO, &k, &count);
        d->needs_low = false;
        set_pattern(st, d, d->pattern | low, k, count);
    }
    st->first += GROUP_MAX;
    if (st->first >= st->n_measured)
        return false;
    clear_hist(job);
    return true;
}

static void after_count(struct tvm_job *job)
{
    struct gta_state *st = job->state;

    for (size_t slot = 0; slot < st->n_top; slot++) {
        uint64_t before = 0;
        for (uint64_t i = 0; i < job->n_tiles; i++) {
            uint64_t *at = &st->eq[(size_t)i * st->n_top + slot];
            const uint64_t here = *at;
            *at = before;
            before += here;
        }
    }
}

/* torch has no bernoulli for fp16 on a CPU: that is thinned in fp32. */
static enum tv_dtype thin_dtype(const struct tvm_tensor *t)
{
    const bool random = sparsify_of(t) == GTA_RANDOM;
    return random && t->compute == TV_F16 ? TV_F32 : t->compute;
}

static bool has_slot(const struct tvm_job *job, const struct donor *d)
{
    return d->keep == GTA_KEEP_TOP ||
           (d->keep == GTA_KEEP_RANDOM && detail_of(job->tensor)->mergekit);
}

static void after_kept(struct tvm_job *job)
{
    struct gta_state *st = job->state;
    const size_t n = (size_t)job->n_leaves;

    for (size_t j = 0; j < st->n_donors; j++) {
        const struct donor *d = &st->donor[j];
        if (!has_slot(job, d))
            continue;
        const double all = tvk_sum_tree(st->sum_all + d->slot * n, n);
        const double kept = tvk_sum_tree(st->sum_kept + d->slot * n, n);
        if (detail_of(job->tensor)->mergekit) {
            st->scale[j] =
                gta_compat_scale(job->k, thin_dtype(job->tensor), all, kept);
            continue;
        }
        st->coef[j] = rescaled(st->weight[j], all, kept);
        if (job->trim)
            job->trim[d->source] = (struct tvm_trim){
                .has_sums = true, .sum_all = all, .sum_kept = kept};
    }
}

bool gta_next_phase(struct tvm_job *job)
{
    struct gta_state *st = job->state;

    if (job->phase == 0) {
        set_up(job);
        st->step = STEP_HIGH;
        if (st->n_measured > 0) {
            if (takes_sample(job->tensor, st)) {
                st->step = STEP_SAMPLE;
                job->sample =
                    job->tensor->n_elems < SAMPLE_ELEMS ? 2 * SAMPLE : SAMPLE;
            }
            return true;
        }
        if (st->any_count) {
            st->step = STEP_COUNT;
            return true;
        }
        if (!detail_of(job->tensor)->mergekit || !st->match_l1)
            return false;
        st->step = STEP_KEPT; /* of random masks */
        return true;
    }
    if (st->step == STEP_SAMPLE) {
        st->step = after_sample(job) ? STEP_RANGE : STEP_HIGH;
        return true;
    }
    if (st->step == STEP_RANGE) {
        if (!after_range(job)) {
            st->step = STEP_HIGH;
            return true;
        }
        st->step = STEP_COUNT;
        if (st->any_count)
            return true;
    }
    if (st->step == STEP_HIGH) {
        st->step = STEP_LOW;
        if (after_high(job))
            return true;
    }
    if (st->step == STEP_LOW) {
        st->step = STEP_HIGH;
        if (after_low(job))
            return true;
        st->step = STEP_COUNT;
        if (st->any_count)
            return true;
    }
    if (st->step == STEP_COUNT) {
        st->step = STEP_KEPT;
        after_count(job);
        if (st->match_l1)
            return true;
    }
    if (st->match_l1)
        after_kept(job);
    return false;
}

/* ---- tiles --------------------------------------------------------------- */

void gta_tile_begin(struct tvm_job *job, struct tvm_tile *tile)
{
    const struct gta_state *st = job->state;

    for (size_t j = 0; st->step == STEP_RANGE && j < st->n_select; j++) {
        const struct donor *d = &st->donor[j];
        if (d->keep == GTA_KEEP_TOP)
            tvm_atoms_begin(atoms_of(st, tile->tile, d),
                            hist_of(st, tile->worker, d->slot), d->first,
                            RANGE_WIDTH);
    }
    if (st->n_top > 0 && st->step == STEP_KEPT)
        memcpy(st->eq_seen + (size_t)tile->worker * st->n_top,
               st->eq + (size_t)tile->tile * st->n_top,
               st->n_top * sizeof *st->eq_seen);
    if (detail_of(job->tensor)->mergekit && st->n_random > 0)
        memcpy(st->mt + (size_t)tile->worker * st->n_random,
               st->mt_tile + (size_t)tile->tile * st->n_random,
               st->n_random * sizeof *st->mt);
}

/* Joins |d| of the blocks of a leaf; a leaf is a power of two of blocks, so the
 * shape of the tree is that of tvk_sum_tree over all blocks. */
static void put_sum(const struct tvm_job *job, const struct tvm_tile *tile,
                    size_t slot, double *leaves, double sum, size_t n)
{
    const struct gta_state *st = job->state;
    double *block = st->block + (2 * ((size_t)tile->worker * st->n_top + slot) +
                                 (leaves == st->sum_kept)) *
                                    BLOCKS_PER_LEAF;
    const size_t in_leaf = (size_t)(tile->start % TVK_LEAF / TVM_BLOCK);

    block[in_leaf] = sum;
    if (in_leaf + 1 == BLOCKS_PER_LEAF ||
        tile->start + n == job->tensor->n_elems)
        leaves[slot * (size_t)job->n_leaves +
               (size_t)(tile->start / TVK_LEAF)] =
            tvk_sum_tree(block, in_leaf + 1);
}

/* What a donor's mask is made from; base NULL: nothing to be taken off. */
struct values {
    const void *x, *base;
    bool is_bf16;
};

static void top_mask(const struct tvm_job *job, const struct tvm_tile *tile,
                     const struct donor *d, uint64_t *mask,
                     const struct values *v, size_t n)
{
    const struct gta_state *st = job->state;
    const struct tvk_table *k = job->k;
    uint64_t *const seen =
        &st->eq_seen[(size_t)tile->worker * st->n_top + d->slot];

    if (v->is_bf16)
        (void)k->topk_mask_bf16(mask, v->x, v->base, d->pattern, seen,
                                d->eq_limit, n);
    else
        (void)k->topk_mask(mask, v->x, v->base, d->pattern, seen, d->eq_limit,
                           n);
}

/* What a donor's mask is made from: its values with *base to be taken off, or
 * with mergekit's roundings the difference itself and no base. */
static const float *donor_values(const struct tvm_job *job,
                                 const struct tvm_tile *tile, size_t j,
                                 const float *const *x, size_t n,
                                 const float **base)
{
    const struct gta_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const float *xj = x[st->donor[j].source];

    *base = x[t->base];
    if (!detail_of(t)->mergekit)
        return xj;
    float *d =
        st->delta + ((size_t)tile->worker * st->n_select + j) * TVM_BLOCK;
    gta_compat_delta(job->k, t->compute, d, xj, *base, n);
    *base = NULL;
    return d;
}

/* The entries of a donor that are kept. */
static void kept_mask(const struct tvm_job *job, const struct tvm_tile *tile,
                      const struct donor *d, uint64_t *mask,
                      const struct values *v, size_t n)
{
    const struct gta_state *st = job->state;
    uint64_t less[BLOCK_WORDS];

    top_mask(job, tile, d, mask, v, n);
    if (d->less == 0)
        return;
    top_mask(job, tile, &st->donor[d->less], less, v, n);
    for (size_t i = 0; i < (n + 63) / 64; i++)
        mask[i] &= ~less[i];
}

static void random_mask(const struct tvm_job *job, const struct tvm_tile *tile,
                        const struct donor *d, uint64_t *mask, size_t n)
{
    const struct gta_state *st = job->state;

    if (detail_of(job->tensor)->mergekit)
        tvm_mt_mask(&st->mt[(size_t)tile->worker * st->n_random + d->draw],
                    mask, d->p, n);
    else
        (void)job->k->philox_mask(mask, tile->start, d->key,
                                  job->tensor->name_hash, d->threshold, n);
}

/* After the last block of a tile. */
static void end_range(const struct tvm_job *job, const struct tvm_tile *tile,
                      const struct donor *d, size_t n)
{
    const struct gta_state *st = job->state;

    if (tile->start + n == tile->first + tile->n)
        tvm_atoms_end(atoms_of(st, tile->tile, d),
                      hist_of(st, tile->worker, d->slot), d->first,
                      RANGE_WIDTH);
}

void gta_measure(struct tvm_job *job, struct tvm_tile *tile,
                 const float *const *x, size_t n)
{
    const struct gta_state *st = job->state;
    const struct tvk_table *k = job->k;
    const float *base = NULL;

    for (size_t j = 0; j < st->n_select; j++) {
        const struct donor *d = &st->donor[j];
        uint64_t *mask = tile->mask_words + j * BLOCK_WORDS;
        if (!has_slot(job, d))
            continue;
        /* What is taken off has the histogram of its donor, and no sums. */
        if (j >= st->n_donors &&
            (st->step == STEP_SAMPLE || st->step == STEP_HIGH ||
             st->step == STEP_KEPT))
            break;
        const float *xj = donor_values(job, tile, j, x, n, &base);
        switch (st->step) {
        case STEP_SAMPLE:
            k->hist_hi(hist_of(st, tile->worker, d->slot), xj, base, n);
            break;
        case STEP_RANGE:
            st->above[(size_t)tile->worker * st->n_top + d->slot] +=
                k->hist_range(hist_of(st, tile->worker, d->slot), d->first,
                              RANGE_WIDTH, xj, base, n);
            end_range(job, tile, d, n);
            if (st->match_l1 && j < st->n_donors)
                put_sum(job, tile, d->slot, st->sum_all,
                        k->abs_sum(xj, base, NULL, n), n);
            break;
        case STEP_HIGH:
            if (!in_group(st, d))
                break;
            k->hist_hi(hist_of(st, tile->worker, d->slot), xj, base, n);
            if (st->match_l1)
                put_sum(job, tile, d->slot, st->sum_all,
                        k->abs_sum(xj, base, NULL, n), n);
            break;
        case STEP_LOW:
            if (d->needs_low)
                k->hist_lo(hist_of(st, tile->worker, d->slot), d->hi, xj, base,
                           n);
            break;
        case STEP_COUNT:
            if (d->needs_count)
                st->eq[(size_t)tile->tile * st->n_top + d->slot] +=
                    k->count_eq(xj, base, d->pattern, n);
            break;
        case STEP_KEPT:
            if (d->keep == GTA_KEEP_RANDOM) {
                random_mask(job, tile, d, mask, n);
                put_sum(job, tile, d->slot, st->sum_all,
                        k->abs_sum(xj, base, NULL, n), n);
            } else {
                const struct values v = {xj, base, false};
                kept_mask(job, tile, d, mask, &v, n);
            }
            put_sum(job, tile, d->slot, st->sum_kept,
                    k->abs_sum(xj, base, mask, n), n);
            break;
        }
    }
}

static void mix(const struct tvm_job *job, const struct tvm_tile *tile,
                const float *base, const uint64_t *const *masks, float *dst,
                size_t n)
{
    const struct gta_state *st = job->state;
    float *delta[TVK_DONORS_MAX];
    const struct gta_mix m = {
        .compute = job->tensor->compute,
        .thin = thin_dtype(job->tensor),
        .n_donors = st->n_donors,
        .weight = st->weight,
        .scale = st->scale,
        .consensus = st->call.consensus != 0,
        .normalize = st->call.normalize != 0,
        .lambda = st->call.lambda,
    };

    for (size_t j = 0; j < st->n_donors; j++)
        delta[j] =
            st->delta + ((size_t)tile->worker * st->n_select + j) * TVM_BLOCK;
    gta_compat_mix(job->k, &m, dst, base, delta, masks, n);
}

/* Masks of all donors; masks[j] NULL: all is kept. False when all of all is. */
static bool make_masks(const struct tvm_job *job, const struct tvm_tile *tile,
                       const struct values *v, const uint64_t **masks, size_t n)
{
    const struct gta_state *st = job->state;
    bool any = false;

    for (size_t j = 0; j < st->n_donors; j++) {
        const struct donor *d = &st->donor[j];
        uint64_t *mask = tile->mask_words + j * BLOCK_WORDS;
        masks[j] = mask;
        any = any || d->keep != GTA_KEEP_ALL;
        switch (d->keep) {
        case GTA_KEEP_ALL:
            masks[j] = NULL;
            break;
        case GTA_KEEP_NONE:
            memset(mask, 0, BLOCK_WORDS * sizeof *mask);
            break;
        case GTA_KEEP_TOP:
            kept_mask(job, tile, d, mask, &v[j], n);
            if (tile->made && d->less == 0)
                tile->made[d->source] = mask;
            break;
        case GTA_KEEP_KNOWN:
            masks[j] = tile->known[d->source];
            break;
        case GTA_KEEP_RANDOM:
            random_mask(job, tile, d, mask, n);
            break;
        }
    }
    return any;
}

void gta_combine(struct tvm_job *job, struct tvm_tile *tile,
                 const float *const *x, float *dst, size_t n)
{
    const struct gta_state *st = job->state;
    const float *base = NULL;
    const float *donors[TVK_DONORS_MAX];
    const uint64_t *masks[TVK_DONORS_MAX];
    struct values v[TVK_DONORS_MAX];

    for (size_t j = 0; j < st->n_donors; j++) {
        donors[j] = donor_values(job, tile, j, x, n, &base);
        v[j] = (struct values){donors[j], base, false};
    }
    const bool any = make_masks(job, tile, v, masks, n);
    if (detail_of(job->tensor)->mergekit)
        mix(job, tile, x[job->tensor->base], any ? masks : NULL, dst, n);
    else
        job->k->gta(dst, x[job->tensor->base], donors, any ? masks : NULL,
                    &st->call, n);
}

/* ---- bf16 as it is ------------------------------------------------------- */

/* Measuring: only what takes one look at most elements. */
bool gta_takes_bf16(const struct tvm_job *job, bool combine)
{
    const struct gta_state *st = job->state;

    return combine || (st->step == STEP_RANGE && !st->match_l1);
}

void gta_measure_bf16(struct tvm_job *job, struct tvm_tile *tile,
                      const void *const *x, size_t n)
{
    const struct gta_state *st = job->state;

    for (size_t j = 0; j < st->n_select; j++) {
        const struct donor *d = &st->donor[j];
        if (d->keep != GTA_KEEP_TOP)
            continue;
        st->above[(size_t)tile->worker * st->n_top + d->slot] +=
            job->k->hist_range_bf16(hist_of(st, tile->worker, d->slot),
                                    d->first, RANGE_WIDTH, x[d->source],
                                    x[job->tensor->base], n);
        end_range(job, tile, d, n);
    }
}

uint64_t gta_combine_bf16(struct tvm_job *job, struct tvm_tile *tile,
                          const void *const *x, void *dst, size_t n)
{
    const struct gta_state *st = job->state;
    const void *base = x[job->tensor->base];
    const void *donors[TVK_DONORS_MAX];
    const uint64_t *masks[TVK_DONORS_MAX];
    struct values v[TVK_DONORS_MAX];

    for (size_t j = 0; j < st->n_donors; j++) {
        donors[j] = x[st->donor[j].source];
        v[j] = (struct values){donors[j], base, true};
    }
    const bool any = make_masks(job, tile, v, masks, n);
    return job->k->gta_bf16(dst, base, donors, any ? masks : NULL, &st->call,
                            n);
}
