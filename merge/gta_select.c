/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gta_select.c - the passes of a tensor whose donors are trimmed by magnitude.
 *
 * Trimming keeps exactly k = max(1, trunc(density * n)) entries of a tensor
 * without ever holding it. Up to four passes over the tiles:
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
 * HIGH and LOW go over at most GTA_GROUP_MAX donors at a time, as every worker
 * has a histogram for each; more donors take more passes, not more memory.
 * LOW and COUNT are left out for donors whose bucket or pattern is kept whole.
 * Outlier trimming (breadcrumbs) takes the largest entries off again: a second
 * selection from the same histogram. Zeros are never kept. Random thinning
 * needs no pass, nor does a donor whose mask is known from an earlier run. With
 * trim_scope the pattern is that of a layer or of the model, found before
 * (gta_survey.c), and only COUNT is left.
 */
#include "gta_parts.h"

#include <string.h>

#include "compat_gta.h"

#define SAMPLE_ELEMS ((uint64_t)8 << 20) /* fewer: sampled twice as densely */
#define SAMPLE       (TVM_BLOCK / 16)

uint32_t *gta_hist_of(const struct gta_state *st, unsigned worker, size_t slot)
{
    return st->hist + ((size_t)worker * gta_group_size(st) + slot - st->first) *
                          st->hist_words;
}

/* Joins the workers' counts of a slot. */
static const uint32_t *joined(const struct tvm_job *job, size_t slot,
                              uint32_t n_buckets)
{
    const struct gta_state *st = job->state;
    uint32_t *hist = gta_hist_of(st, 0, slot);

    tvm_hist_join(hist, gta_group_size(st) * st->hist_words, job->n_workers,
                  n_buckets);
    return hist;
}

static void clear_hist(const struct tvm_job *job)
{
    const struct gta_state *st = job->state;

    memset(st->hist, 0,
           job->n_workers * gta_group_size(st) * st->hist_words *
               sizeof *st->hist);
}

static bool find_range(const struct tvm_job *job, struct gta_donor *d,
                       const uint32_t *hist)
{
    uint64_t n = 0;

    for (size_t i = 0; i < TVK_HIST_HI; i++)
        n += hist[i];
    const double share = (double)d->k / (double)job->tensor->n_elems;
    return tvm_range_find(hist, (uint64_t)(share * (double)n), GTA_RANGE_WIDTH,
                          &d->first);
}

/* Returns true when every selection has a range to look into. */
static bool after_sample(struct tvm_job *job)
{
    struct gta_state *st = job->state;
    bool all = true;

    for (size_t j = 0; j < st->n_donors; j++) {
        struct gta_donor *d = &st->donor[j];
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
static void set_pattern(struct gta_state *st, struct gta_donor *d,
                        uint32_t pattern, uint64_t k, uint64_t count)
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

uint32_t *gta_atoms_of(const struct gta_state *st, uint64_t tile,
                       const struct gta_donor *d)
{
    return st->atoms + ((size_t)tile * st->n_hist + d->slot) * GTA_N_ATOMS;
}

/* The same of a pattern in a range; it need not be counted where each tile has
 * done that. */
static void set_range_pattern(const struct tvm_job *job, struct gta_donor *d,
                              uint32_t pattern, uint64_t k, uint64_t count)
{
    struct gta_state *st = job->state;
    const bool any = st->any_count;
    size_t atom = 0;

    set_pattern(st, d, pattern, k, count);
    if (!d->needs_count || !tvm_atom_find(d->first, pattern, &atom))
        return;
    for (uint64_t i = 0; i < job->n_tiles; i++)
        st->eq[(size_t)i * st->n_top + d->slot] = gta_atoms_of(st, i, d)[atom];
    d->needs_count = false;
    st->any_count = any;
}

/* Returns true when all patterns are found. */
static bool after_range(struct tvm_job *job)
{
    struct gta_state *st = job->state;
    bool all = true;

    for (size_t j = 0; j < st->n_select; j++) {
        struct gta_donor *d = &st->donor[j];
        uint64_t above = 0;
        uint64_t count = 0;
        uint64_t within = 0;
        if (d->keep != GTA_KEEP_TOP)
            continue;
        const uint32_t *hist = joined(job, d->slot, GTA_RANGE_WIDTH);
        for (unsigned w = 0; w < job->n_workers; w++)
            above += st->above[w * st->n_top + d->slot];
        for (size_t i = 0; i < GTA_RANGE_WIDTH; i++)
            within += hist[i];
        if (d->k <= above || d->k > above + within) {
            all = false;
            continue;
        }
        uint64_t k = d->k - above;
        const uint32_t at = tvm_hist_find(hist, GTA_RANGE_WIDTH, &k, &count);
        d->found = true;
        set_range_pattern(job, d, d->first + at, k, count);
    }
    clear_hist(job);
    return all;
}

static bool find_high(struct gta_donor *d, const uint32_t *hist)
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
        struct gta_donor *d = &st->donor[j];
        if (!gta_in_group(st, d))
            continue;
        const uint32_t *hist = joined(job, d->slot, TVK_HIST_HI);
        if (!d->found)
            again = find_high(d, hist) || again;
        if (d->less > 0 && !st->donor[d->less].found)
            again = find_high(&st->donor[d->less], hist) || again;
        for (unsigned w = 0; w < job->n_workers; w++)
            memset(gta_hist_of(st, w, d->slot), 0,
                   TVK_HIST_LO * sizeof(uint32_t));
    }
    return again;
}

/* Returns true when there is another group to measure. */
static bool after_low(struct tvm_job *job)
{
    struct gta_state *st = job->state;

    for (size_t j = 0; j < st->n_select; j++) {
        struct gta_donor *d = &st->donor[j];
        if (!d->needs_low)
            continue;
        uint64_t count = 0;
        uint64_t k = d->k;
        const uint32_t low = tvm_hist_find(joined(job, d->slot, TVK_HIST_LO),
                                           TVK_HIST_LO, &k, &count);
        d->needs_low = false;
        set_pattern(st, d, d->pattern | low, k, count);
    }
    st->first += GTA_GROUP_MAX;
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

enum tv_dtype gta_thin_dtype(const struct tvm_tensor *t)
{
    const bool random = gta_sparsify_of(t) == GTA_RANDOM;
    return random && t->compute == TV_F16 ? TV_F32 : t->compute;
}

bool gta_has_slot(const struct tvm_job *job, const struct gta_donor *d)
{
    return d->keep == GTA_KEEP_TOP ||
           (d->keep == GTA_KEEP_RANDOM && gta_detail_of(job->tensor)->mergekit);
}

static void after_kept(struct tvm_job *job)
{
    struct gta_state *st = job->state;
    const size_t n = (size_t)job->n_leaves;

    for (size_t j = 0; j < st->n_donors; j++) {
        const struct gta_donor *d = &st->donor[j];
        if (!gta_has_slot(job, d))
            continue;
        const double all = tvk_sum_tree(st->sum_all + d->slot * n, n);
        const double kept = tvk_sum_tree(st->sum_kept + d->slot * n, n);
        if (gta_detail_of(job->tensor)->mergekit) {
            st->scale[j] = gta_compat_scale(job->k, gta_thin_dtype(job->tensor),
                                            all, kept);
            continue;
        }
        st->coef[j] = gta_rescaled(st->weight[j], all, kept);
        if (job->trim)
            job->trim[d->source] = (struct tvm_trim){
                .has_sums = true, .sum_all = all, .sum_kept = kept};
    }
}

bool gta_next_phase(struct tvm_job *job)
{
    struct gta_state *st = job->state;

    if (job->phase == 0) {
        gta_set_up(job);
        st->step = GTA_STEP_HIGH;
        if (st->n_measured > 0) {
            if (gta_takes_sample(job->tensor, st)) {
                st->step = GTA_STEP_SAMPLE;
                job->sample =
                    job->tensor->n_elems < SAMPLE_ELEMS ? 2 * SAMPLE : SAMPLE;
            }
            return true;
        }
        if (st->any_count) {
            st->step = GTA_STEP_COUNT;
            return true;
        }
        if (!gta_detail_of(job->tensor)->mergekit || !st->match_l1)
            return false;
        st->step = GTA_STEP_KEPT; /* of random masks */
        return true;
    }
    if (st->step == GTA_STEP_SAMPLE) {
        st->step = after_sample(job) ? GTA_STEP_RANGE : GTA_STEP_HIGH;
        return true;
    }
    if (st->step == GTA_STEP_RANGE) {
        if (!after_range(job)) {
            st->step = GTA_STEP_HIGH;
            return true;
        }
        st->step = GTA_STEP_COUNT;
        if (st->any_count)
            return true;
    }
    if (st->step == GTA_STEP_HIGH) {
        st->step = GTA_STEP_LOW;
        if (after_high(job))
            return true;
    }
    if (st->step == GTA_STEP_LOW) {
        st->step = GTA_STEP_HIGH;
        if (after_low(job))
            return true;
        st->step = GTA_STEP_COUNT;
        if (st->any_count)
            return true;
    }
    if (st->step == GTA_STEP_COUNT) {
        st->step = GTA_STEP_KEPT;
        after_count(job);
        if (st->match_l1)
            return true;
    }
    if (st->match_l1)
        after_kept(job);
    return false;
}
