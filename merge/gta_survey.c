/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gta_survey.c - trimming by magnitude over a layer or a whole model, out of
 * core: exactly k of all entries of a donor's task vector, wherever they lie.
 *
 * The passes are those of gta_select.c, over the tensors of the population
 * instead of the tiles of one tensor:
 *
 *   HIGH    histogram of the upper 16 magnitude bits -> bucket of the k-th
 *   LOW     histogram of the lower 15 bits inside it -> its exact pattern
 *   COUNT   entries equal to the pattern, per tensor -> how many each may
 *           keep, the first tensors first; and what is kept, to rescale
 *
 * A donor is an input of the plan: in a stack of layers of several models each
 * has a population of its own. Its tensors may have different densities (k is
 * the sum of their shares); those that are kept or dropped whole do not count.
 * At most GROUP_MAX donors are looked at at a time. Counts are of 64 bits over
 * the population and of 32 bits in a worker's histogram, which is emptied
 * before it can overflow.
 */
#include "method_gta.h"
#include "select.h"

#include <string.h>

#define GROUP_MAX ((size_t)8)

enum step { STEP_HIGH, STEP_LOW, STEP_COUNT };

struct pool { /* of one donor */
    size_t input;
    double share;         /* density times elements, summed */
    double density;       /* when all tensors have the same ... */
    bool uniform;         /* ... they do */
    uint64_t n, k, count; /* elements; still to be found; equal to pattern */
    uint32_t hi, pattern;
    bool needs_low, needs_count;
    double sum_all, sum_kept;
};

struct survey_state {
    enum step step;
    bool rescale;
    size_t n_pools, first; /* of the group being measured */
    struct pool *pool;     /* [n_pools] */
    size_t *pool_of;       /* [plan->n_inputs] */
    uint64_t *total;       /* [GROUP_MAX][TVK_HIST_HI] */
    uint32_t *hist;        /* [n_workers][GROUP_MAX][TVK_HIST_HI] */
    uint64_t *fed;         /* [n_workers] elements in it */
    uint64_t *eq;          /* [n][n_pools] of each tensor */
    uint64_t *eq_worker;   /* [n_workers][GROUP_MAX] */
    double *leaves;        /* [GROUP_MAX][most_leaves] */
};

static bool is_trimmed(const struct tvm_tensor *t, size_t source)
{
    return (int)source != t->base && gta_keep_of(t, source) == GTA_KEEP_TOP;
}

static const struct tvm_tensor *tensor_of(const struct tvm_group *g, size_t at)
{
    return &g->plan->tensors[g->tensors[at]];
}

static size_t count_pools(const struct tvm_group *g)
{
    size_t n = 0;

    for (size_t at = 0; at < g->n; at++) {
        const struct tvm_tensor *t = tensor_of(g, at);
        for (size_t s = 0; s < t->n_sources; s++)
            n += is_trimmed(t, s);
    }
    return n < g->plan->n_inputs ? n : g->plan->n_inputs;
}

static size_t lay_out(const struct tvm_group *g, void *base,
                      struct survey_state *st)
{
    struct tvm_carver c = {base, 0};
    const uint64_t w = g->n_workers;
    /* A donor too many costs a struct, not a histogram. */
    const size_t cap = count_pools(g);
    const size_t group = cap < GROUP_MAX ? cap : GROUP_MAX;

    (void)tvm_carve(&c, 1, sizeof *st);
    st->pool = tvm_carve(&c, cap, sizeof *st->pool);
    st->pool_of = tvm_carve(&c, g->plan->n_inputs, sizeof *st->pool_of);
    st->total = tvm_carve(&c, group * TVK_HIST_HI, sizeof *st->total);
    st->hist = tvm_carve(&c, w * group * TVK_HIST_HI, sizeof *st->hist);
    st->fed = tvm_carve(&c, w, sizeof *st->fed);
    st->eq = tvm_carve(&c, g->n * cap, sizeof *st->eq);
    st->eq_worker = tvm_carve(&c, w * GROUP_MAX, sizeof *st->eq_worker);
    st->leaves = tvm_carve(&c, GROUP_MAX * g->most_leaves, sizeof *st->leaves);
    return c.used;
}

static size_t bytes(const struct tvm_group *g)
{
    struct survey_state st = {.n_pools = 0};
    return lay_out(g, NULL, &st);
}

/* ---- the populations ----------------------------------------------------- */

static void add_share(struct pool *p, const struct tvm_tensor *t,
                      double density)
{
    p->uniform = p->n == 0 || (p->uniform && p->density == density);
    p->density = density;
    p->share += density * (double)t->n_elems;
    p->n += t->n_elems;
}

static void set_up(struct tvm_group *g)
{
    struct survey_state *st = g->state;

    (void)lay_out(g, st, st);
    for (size_t i = 0; i < g->plan->n_inputs; i++)
        st->pool_of[i] = SIZE_MAX;
    for (size_t at = 0; at < g->n; at++) {
        const struct tvm_tensor *t = tensor_of(g, at);
        st->rescale = st->rescale || tvm_shared(t, GTA_RESCALE) != 0.0;
        for (size_t s = 0; s < t->n_sources; s++) {
            if (!is_trimmed(t, s))
                continue;
            size_t *i = &st->pool_of[t->sources[s].input];
            if (*i == SIZE_MAX) {
                *i = st->n_pools++;
                st->pool[*i].input = t->sources[s].input;
            }
            add_share(&st->pool[*i], t,
                      tvm_of(t, s, GTA_DENSITY, t->method->n_params));
        }
    }
    for (size_t i = 0; i < st->n_pools; i++) {
        struct pool *p = &st->pool[i];
        /* One product rounds less than a sum of them. */
        p->k = (uint64_t)(p->uniform ? p->density * (double)p->n : p->share);
        if (p->k == 0)
            p->k = 1;
        if (p->k > p->n)
            p->k = p->n;
    }
}

static bool in_group(const struct survey_state *st, size_t pool)
{
    return pool >= st->first && pool - st->first < GROUP_MAX;
}

static size_t group_size(const struct survey_state *st)
{
    return st->n_pools < GROUP_MAX ? st->n_pools : GROUP_MAX;
}

static uint32_t *hist_of(const struct survey_state *st, unsigned worker,
                         size_t pool)
{
    return st->hist +
           ((size_t)worker * group_size(st) + pool - st->first) * TVK_HIST_HI;
}

/* ---- selection ----------------------------------------------------------- */

/* Adds all workers' histograms to the totals and empties them; between
 * tensors, so nobody counts. */
static void gather(const struct tvm_group *g)
{
    const struct survey_state *st = g->state;
    const size_t n = group_size(st) * TVK_HIST_HI;

    for (unsigned w = 0; w < g->n_workers; w++) {
        uint32_t *hist = st->hist + (size_t)w * n;
        if (st->fed[w] == 0)
            continue;
        for (size_t i = 0; i < n; i++)
            st->total[i] += hist[i];
        memset(hist, 0, n * sizeof *hist);
        st->fed[w] = 0;
    }
}

static uint32_t find(const uint64_t *total, uint32_t n_buckets, uint64_t *k,
                     uint64_t *count)
{
    for (uint32_t i = n_buckets; i-- > 1;) {
        if (*k <= total[i]) {
            *count = total[i];
            return i;
        }
        *k -= total[i];
    }
    *count = total[0];
    return 0;
}

static const uint64_t *total_of(const struct survey_state *st, size_t pool)
{
    return st->total + (pool - st->first) * TVK_HIST_HI;
}

static void empty_totals(const struct survey_state *st)
{
    memset(st->total, 0, group_size(st) * TVK_HIST_HI * sizeof *st->total);
}

static bool after_high(struct tvm_group *g)
{
    struct survey_state *st = g->state;
    bool again = false;

    gather(g);
    for (size_t i = st->first; i < st->n_pools && in_group(st, i); i++) {
        struct pool *p = &st->pool[i];
        p->hi = find(total_of(st, i), TVK_HIST_HI, &p->k, &p->count);
        p->pattern = p->hi << 15;
        p->needs_low = p->k < p->count;
        again = again || p->needs_low;
    }
    empty_totals(st);
    return again;
}

/* Is there anything to count? */
static bool after_low(struct tvm_group *g)
{
    struct survey_state *st = g->state;
    bool again = st->rescale;

    gather(g);
    for (size_t i = st->first; i < st->n_pools && in_group(st, i); i++) {
        struct pool *p = &st->pool[i];
        if (p->needs_low) {
            p->pattern |= find(total_of(st, i), TVK_HIST_LO, &p->k, &p->count);
            /* Zeros are dropped anyway: no need to know which. */
            p->needs_count = p->k < p->count && p->pattern != 0;
        }
        p->needs_low = false;
        again = again || p->needs_count;
    }
    empty_totals(st);
    return again;
}

static void after_count(struct tvm_group *g)
{
    struct survey_state *st = g->state;

    for (size_t i = st->first; i < st->n_pools && in_group(st, i); i++) {
        struct pool *p = &st->pool[i];
        float value = 0.0f;
        if (!p->needs_count)
            continue;
        memcpy(&value, &p->pattern, sizeof value);
        p->sum_kept += (double)p->k * (double)value;
    }
}

static bool next_group(struct survey_state *st)
{
    st->first += GROUP_MAX;
    st->step = STEP_HIGH;
    return st->first < st->n_pools;
}

static bool next(struct tvm_group *g)
{
    struct survey_state *st = g->state;

    if (g->phase == 0) {
        set_up(g);
        st->step = STEP_HIGH;
        return true;
    }
    if (st->step == STEP_HIGH) {
        st->step = STEP_LOW;
        if (after_high(g))
            return true;
    }
    if (st->step == STEP_LOW) {
        st->step = STEP_COUNT;
        if (after_low(g))
            return true;
        return next_group(st);
    }
    after_count(g);
    return next_group(st);
}

/* ---- tensors ------------------------------------------------------------- */

static bool wants(const struct tvm_group *g, const struct tvm_tensor *t,
                  size_t source)
{
    const struct survey_state *st = g->state;

    if (!is_trimmed(t, source))
        return false;
    const size_t pool = st->pool_of[t->sources[source].input];
    const struct pool *p = &st->pool[pool];
    if (!in_group(st, pool))
        return false;
    return st->step == STEP_HIGH || (st->step == STEP_LOW && p->needs_low) ||
           (st->step == STEP_COUNT && (p->needs_count || st->rescale));
}

/* A leaf is read in order by one worker, so its sum does not depend on who. */
static void add_leaf(const struct tvm_group *g, size_t pool, uint64_t start,
                     double sum)
{
    const struct survey_state *st = g->state;
    double *leaf = &st->leaves[(pool - st->first) * (size_t)g->most_leaves +
                               (size_t)(start / TVK_LEAF)];
    *leaf = start % TVK_LEAF == 0 ? sum : *leaf + sum;
}

static void count(struct tvm_group *g, size_t pool, uint64_t start,
                  unsigned worker, const float *x, const float *b, size_t n)
{
    const struct survey_state *st = g->state;
    const struct pool *p = &st->pool[pool];
    uint64_t mask[TVM_BLOCK / 64];
    uint64_t seen = 0;

    if (p->needs_count)
        st->eq_worker[(size_t)worker * GROUP_MAX + pool - st->first] +=
            g->k->count_eq(x, b, p->pattern, n);
    if (!st->rescale)
        return;
    /* Those that equal the pattern are added when their number is known. */
    (void)g->k->topk_mask(mask, x, b, p->pattern, &seen,
                          p->needs_count ? 0 : UINT64_MAX, n);
    add_leaf(g, pool, start, g->k->abs_sum(x, b, mask, n));
}

static void measure(struct tvm_group *g, size_t at, uint64_t start,
                    unsigned worker, const float *const *x, size_t n)
{
    const struct survey_state *st = g->state;
    const struct tvm_tensor *t = tensor_of(g, at);
    const float *b = x[t->base];

    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base || x[s] == NULL)
            continue;
        const size_t pool = st->pool_of[t->sources[s].input];
        switch (st->step) {
        case STEP_HIGH:
            g->k->hist_hi(hist_of(st, worker, pool), x[s], b, n);
            if (st->rescale)
                add_leaf(g, pool, start, g->k->abs_sum(x[s], b, NULL, n));
            break;
        case STEP_LOW:
            g->k->hist_lo(hist_of(st, worker, pool), st->pool[pool].hi, x[s], b,
                          n);
            break;
        case STEP_COUNT:
            count(g, pool, start, worker, x[s], b, n);
            break;
        }
    }
    st->fed[worker] += n;
}

static void end_tensor(struct tvm_group *g, size_t at)
{
    struct survey_state *st = g->state;
    const struct tvm_tensor *t = tensor_of(g, at);
    const size_t n_leaves =
        (size_t)(t->n_elems / TVK_LEAF + (t->n_elems % TVK_LEAF != 0));
    const uint64_t more = at + 1 < g->n ? tensor_of(g, at + 1)->n_elems : 0;
    bool full = false;

    for (unsigned w = 0; w < g->n_workers; w++)
        full = full || st->fed[w] > UINT32_MAX - more;
    if (full && st->step != STEP_COUNT)
        gather(g);
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base || !wants(g, t, s))
            continue;
        const size_t pool = st->pool_of[t->sources[s].input];
        struct pool *p = &st->pool[pool];
        const double sum =
            !st->rescale || st->step == STEP_LOW
                ? 0.0
                : tvk_sum_tree(st->leaves +
                                   (pool - st->first) * (size_t)g->most_leaves,
                               n_leaves);
        if (st->step == STEP_HIGH)
            p->sum_all += sum;
        if (st->step != STEP_COUNT)
            continue;
        p->sum_kept += sum;
        for (unsigned w = 0; w < g->n_workers; w++) {
            uint64_t *here =
                &st->eq_worker[(size_t)w * GROUP_MAX + pool - st->first];
            st->eq[at * st->n_pools + pool] += *here;
            *here = 0;
        }
    }
}

static void give(struct tvm_group *g, size_t at, struct tvm_cut *cuts)
{
    struct survey_state *st = g->state;
    const struct tvm_tensor *t = tensor_of(g, at);

    for (size_t s = 0; s < t->n_sources; s++) {
        if (!is_trimmed(t, s))
            continue;
        const size_t pool = st->pool_of[t->sources[s].input];
        struct pool *p = &st->pool[pool];
        const uint64_t eq = st->eq[at * st->n_pools + pool];
        cuts[s] = (struct tvm_cut){.pattern = p->pattern,
                                   .eq_limit = UINT64_MAX,
                                   .sum_all = p->sum_all,
                                   .sum_kept = p->sum_kept};
        if (!p->needs_count)
            continue;
        /* The first tensors keep all that they have, until k are found. */
        if (p->k < eq)
            cuts[s].eq_limit = p->k;
        p->k -= p->k < eq ? p->k : eq;
    }
}

const struct tvm_surveyor gta_surveyor = {
    .bytes = bytes,
    .next = next,
    .wants = wants,
    .measure = measure,
    .end_tensor = end_tensor,
    .give = give,
};
