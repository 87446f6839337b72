/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_della.c - task vectors thinned at random, small entries more often.
 *
 * In every row (a vector is one row; rows run along the last dimension) the
 * entries are ranked by magnitude, 1 to n, equal ones by index; entry j stays
 * with probability
 *
 *   p_j = (density - epsilon) + 2 epsilon (rank_j - 1) / (n - 1)
 *
 * (a row of one entry: density). Deep et al., "DELLA-Merging: reducing
 * interference in model merging through magnitude-based sampling", 2024, arXiv
 * 2406.11617, in mergekit's form: with rescale, what is left of a task vector
 * is brought back to the L1 norm of the whole. The draw of an element is a pure
 * function of seed, donor, tensor name and index (design.md, "Random masks"):
 * entry e stays iff its Philox word is below p_j 2^32.
 *
 * Rows are what is held: the ranks of one row and one donor at a time. With
 * rescale there are two passes, and each ranks anew.
 */
#include "method_gta.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "tv/checked.h"

#define RADIX_BITS    11u
#define RADIX_BUCKETS (1u << RADIX_BITS)
#define RESCALE_MIN   1e-7

static const struct tvm_param params_normalized[GTA_N_PARAMS + 1] = {
    GTA_PARAM_LIST(1.0, 1.0)[GTA_EXTRA] = {
        .name = "epsilon",
        .scope = TVM_NON_BASE,
        .type = TVM_FLOAT,
        .has_default = true,
        .fallback = 0.15,
        TVM_WITHIN(0.0, 1.0),
        .help = "how far the odds of smallest and largest are from density"}};
static const struct tvm_param params_summed[GTA_N_PARAMS + 1] = {
    GTA_PARAM_LIST(0.0, 1.0)[GTA_EXTRA] = {
        .name = "epsilon",
        .scope = TVM_NON_BASE,
        .type = TVM_FLOAT,
        .has_default = true,
        .fallback = 0.15,
        TVM_WITHIN(0.0, 1.0),
        .help = "how far the odds of smallest and largest are from density"}};

static const struct gta_detail summed = {GTA_NONE, false, false, false, false};
static const struct gta_detail elected = {GTA_NONE, true, false, false, false};

struct entry {
    uint32_t key, at;
};

struct della_state {
    struct tvk_gta call;
    size_t n_donors;
    size_t source[TVK_DONORS_MAX];
    double density[TVK_DONORS_MAX], epsilon[TVK_DONORS_MAX];
    uint64_t key[TVK_DONORS_MAX];
    double coef[TVK_DONORS_MAX], weight[TVK_DONORS_MAX];
    double *sum_all, *sum_kept; /* [n_donors][n_rows], with rescale */
    /* Of a worker: */
    struct entry *entries; /* [2][row] */
    uint32_t *words;       /* [row] */
    uint64_t *masks;       /* [n_donors][mask words of a row] */
};

static double value_of(const struct tvm_tensor *t, size_t source, size_t p)
{
    return tvm_of(t, source, p, t->method->n_params);
}

static bool is_thinned(const struct tvm_tensor *t, size_t source)
{
    const double density = value_of(t, source, GTA_DENSITY);
    return density > 0.0 && density < 1.0;
}

static bool any_thinned(const struct tvm_tensor *t)
{
    for (size_t s = 0; s < t->n_sources; s++)
        if ((int)s != t->base && is_thinned(t, s))
            return true;
    return false;
}

static bool rescales(const struct tvm_tensor *t)
{
    return tvm_shared(t, GTA_RESCALE) != 0.0 && any_thinned(t);
}

static void check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    tvm_check_finite(t, problems);
    for (size_t s = 0; s < t->n_sources; s++) {
        const double d = value_of(t, s, GTA_DENSITY);
        const double e = value_of(t, s, GTA_EXTRA);
        if ((int)s == t->base || !is_thinned(t, s))
            continue;
        if (!(e >= 0.0) || d + e >= 1.0 || d - e <= 0.0)
            tvm_param_problem(t, GTA_DENSITY, s, problems,
                              "density %g and epsilon %g: density +/- epsilon "
                              "must stay between 0 and 1",
                              d, e);
    }
    if (any_thinned(t) && tvm_row_elems(t) > UINT32_MAX)
        tvm_problem_add(problems, true, TV_E_UNSUPPORTED, t->name,
                        "rows of more than 2^32 elements are not supported");
    if (any_thinned(t) && t->rank > 2)
        tvm_problem_note(problems, t->name,
                         "entries are ranked along the last dimension; "
                         "mergekit ranks along the second");
}

static int fold(const struct tvm_tensor *t)
{
    bool none = true;

    if (t->base < 0)
        return -1;
    for (size_t s = 0; s < t->n_sources; s++)
        if ((int)s != t->base)
            none = none && (value_of(t, s, GTA_WEIGHT) == 0.0 ||
                            value_of(t, s, GTA_DENSITY) <= 0.0);
    return none || tvm_shared(t, GTA_LAMBDA) == 0.0 ? t->base : -1;
}

static uint64_t row_elems(const struct tvm_tensor *t)
{
    return any_thinned(t) ? tvm_row_elems(t) : 0;
}

/* ---- state --------------------------------------------------------------- */

static size_t mask_words(uint64_t row)
{
    return (size_t)((row + 63) / 64);
}

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct della_state *st)
{
    const struct tvm_tensor *t = job->tensor;
    const size_t row = (size_t)row_elems(t);
    const size_t w = job->n_workers;
    const size_t k = t->n_sources;
    struct tvm_carver c = {base, 0};

    (void)tvm_carve(&c, 1, sizeof *st);
    if (row == 0)
        return c.used;
    st->entries = tvm_carve(&c, w * 2 * row, sizeof *st->entries);
    st->words = tvm_carve(&c, w * row, sizeof *st->words);
    st->masks = tvm_carve(&c, w * k * mask_words(row), sizeof *st->masks);
    if (rescales(t)) {
        const size_t rows = (size_t)(t->n_elems / row);
        st->sum_all = tvm_carve(&c, k * rows, sizeof *st->sum_all);
        st->sum_kept = tvm_carve(&c, k * rows, sizeof *st->sum_kept);
    }
    return c.used;
}

static size_t state_bytes(const struct tvm_job *job)
{
    struct della_state st = {.n_donors = 0};

    return lay_out(job, NULL, &st);
}

static void set_up(struct tvm_job *job)
{
    struct della_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const struct gta_detail *detail = t->method->detail;
    unsigned char bytes[12];

    (void)lay_out(job, st, st);
    tv_put_le64(bytes, job->seed);
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        const size_t j = st->n_donors++;
        st->source[j] = s;
        st->density[j] = value_of(t, s, GTA_DENSITY);
        st->epsilon[j] = value_of(t, s, GTA_EXTRA);
        st->weight[j] = value_of(t, s, GTA_WEIGHT);
        st->coef[j] = st->density[j] > 0.0 ? st->weight[j] : 0.0;
        tv_put_le32(bytes + 8, (uint32_t)t->sources[s].position);
        st->key[j] = tv_hash64(bytes, sizeof bytes);
    }
    st->call = (struct tvk_gta){
        .n_donors = st->n_donors,
        .coef = st->coef,
        .weight = st->weight,
        .consensus = detail->consensus,
        .normalize = tvm_shared(t, GTA_NORMALIZE) != 0.0,
        .lambda = tvm_shared(t, GTA_LAMBDA),
    };
}

static void rescale(struct tvm_job *job)
{
    struct della_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const size_t rows = (size_t)(t->n_elems / row_elems(t));

    for (size_t j = 0; j < st->n_donors; j++) {
        if (!is_thinned(t, st->source[j]))
            continue;
        const double all = tvk_sum_tree(st->sum_all + j * rows, rows);
        const double kept = tvk_sum_tree(st->sum_kept + j * rows, rows);
        if (all >= RESCALE_MIN && kept >= RESCALE_MIN && isfinite(all))
            st->coef[j] = st->weight[j] * (all / kept);
    }
}

static bool next_phase(struct tvm_job *job)
{
    if (job->phase == 0) {
        set_up(job);
        return rescales(job->tensor);
    }
    rescale(job);
    return false;
}

/* ---- rows ---------------------------------------------------------------- */

static uint32_t magnitude(float x, float b)
{
    const float d = x - b;
    uint32_t bits = 0;

    memcpy(&bits, &d, sizeof bits);
    bits &= 0x7fffffffu;
    return bits > 0x7f800001u ? 0x7f800001u : bits;
}

/* Sorts by magnitude, equal ones by index: three stable counting passes. The
 * result is in the returned half of entries. */
static const struct entry *sort_row(struct entry *entries, const float *x,
                                    const float *base, size_t n)
{
    struct entry *from = entries;
    struct entry *to = entries + n;
    uint32_t count[RADIX_BUCKETS];

    for (size_t i = 0; i < n; i++)
        from[i] = (struct entry){magnitude(x[i], base[i]), (uint32_t)i};
    for (unsigned shift = 0; shift < 31; shift += RADIX_BITS) {
        uint32_t before = 0;
        memset(count, 0, sizeof count);
        for (size_t i = 0; i < n; i++)
            count[from[i].key >> shift & (RADIX_BUCKETS - 1)]++;
        for (size_t b = 0; b < RADIX_BUCKETS; b++) {
            const uint32_t here = count[b];
            count[b] = before;
            before += here;
        }
        for (size_t i = 0; i < n; i++)
            to[count[from[i].key >> shift & (RADIX_BUCKETS - 1)]++] = from[i];
        struct entry *const other = from;
        from = to;
        to = other;
    }
    return from;
}

/* round() of a number from 0 to 2^32, without the call. */
static uint64_t rounded(double v)
{
    const uint64_t whole = (uint64_t)v;
    return whole + (v - (double)whole >= 0.5);
}

/* The entries of donor j that stay in a row. */
static void thin(const struct tvm_job *job, const struct tvm_tile *tile,
                 size_t j, uint64_t row, const float *x, const float *base,
                 uint64_t *mask, size_t n)
{
    const struct della_state *st = job->state;
    struct entry *entries = st->entries + (size_t)tile->worker * 2 * n;
    uint32_t *words = st->words + (size_t)tile->worker * n;
    const struct entry *sorted = sort_row(entries, x, base, n);
    const double least = st->density[j] - st->epsilon[j];

    job->k->philox_words(words, row * n, st->key[j], job->tensor->name_hash, n);
    memset(mask, 0, mask_words(n) * sizeof *mask);
    for (size_t r = 0; r < n; r++) {
        const double p =
            n == 1 ? st->density[j]
                   : least + 2.0 * st->epsilon[j] * (double)r / (double)(n - 1);
        const uint32_t at = sorted[r].at;
        if (words[at] < rounded(p * 4294967296.0))
            mask[at / 64] |= UINT64_C(1) << (at % 64);
    }
}

static uint64_t *mask_of(const struct tvm_job *job, const struct tvm_tile *tile,
                         size_t j, size_t n)
{
    const struct della_state *st = job->state;
    return st->masks +
           ((size_t)tile->worker * job->tensor->n_sources + j) * mask_words(n);
}

static void measure_row(struct tvm_job *job, struct tvm_tile *tile,
                        uint64_t row, const float *const *x, size_t n)
{
    const struct della_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const float *base = x[t->base];
    const size_t rows = (size_t)(t->n_elems / n);

    for (size_t j = 0; j < st->n_donors; j++) {
        const float *xj = x[st->source[j]];
        uint64_t *mask = mask_of(job, tile, j, n);
        double all = 0.0;
        double kept = 0.0;
        if (!is_thinned(t, st->source[j]))
            continue;
        thin(job, tile, j, row, xj, base, mask, n);
        for (size_t at = 0; at < n; at += TVM_BLOCK) {
            const size_t m = n - at < TVM_BLOCK ? n - at : TVM_BLOCK;
            all += job->k->abs_sum(xj + at, base + at, NULL, m);
            kept += job->k->abs_sum(xj + at, base + at, mask + at / 64, m);
        }
        st->sum_all[j * rows + (size_t)row] = all;
        st->sum_kept[j * rows + (size_t)row] = kept;
    }
}

static void combine_row(struct tvm_job *job, struct tvm_tile *tile,
                        uint64_t row, const float *const *x, float *dst,
                        size_t n)
{
    const struct della_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const float *donors[TVK_DONORS_MAX];
    const uint64_t *masks[TVK_DONORS_MAX];

    for (size_t j = 0; j < st->n_donors; j++) {
        const size_t s = st->source[j];
        donors[j] = x[s];
        masks[j] = NULL;
        if (!is_thinned(t, s) && st->density[j] > 0.0)
            continue;
        uint64_t *mask = mask_of(job, tile, j, n);
        if (is_thinned(t, s))
            thin(job, tile, j, row, x[s], x[t->base], mask, n);
        else
            memset(mask, 0, mask_words(n) * sizeof *mask);
        masks[j] = mask;
    }
    job->k->gta(dst, x[t->base], donors, masks, &st->call, n);
}

/* Nothing is thinned: whole task vectors, or none of a donor. */
static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    static const uint64_t none[TVM_BLOCK / 64];
    const struct della_state *st = job->state;
    const float *donors[TVK_DONORS_MAX];
    const uint64_t *masks[TVK_DONORS_MAX];

    (void)tile;
    for (size_t j = 0; j < st->n_donors; j++) {
        donors[j] = x[st->source[j]];
        masks[j] = st->density[j] > 0.0 ? NULL : none;
    }
    job->k->gta(dst, x[job->tensor->base], donors, masks, &st->call, n);
}

#define DELLA_FUNCTIONS                                                        \
    .base = TVM_BASE_REQUIRED, .min_donors = 0, .max_donors = TVK_DONORS_MAX,  \
    .n_params = GTA_N_PARAMS + 1, .check = check, .fold = fold,                \
    .state_bytes = state_bytes, .next_phase = next_phase, .combine = combine,  \
    .row_elems = row_elems, .measure_row = measure_row,                        \
    .combine_row = combine_row

const struct tvm_method tvm_method_della = {
    .name = "della",
    .summary = "task vectors thinned by rank, merged where signs agree",
    .paper = "DELLA-Merging, Deep et al. 2024, arXiv 2406.11617",
    .params = params_normalized,
    .detail = &elected,
    DELLA_FUNCTIONS,
};

const struct tvm_method tvm_method_della_linear = {
    .name = "della_linear",
    .summary = "task vectors thinned by rank, summed",
    .paper = "DELLA-Merging, Deep et al. 2024, arXiv 2406.11617",
    .params = params_summed,
    .detail = &summed,
    DELLA_FUNCTIONS,
};
