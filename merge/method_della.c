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
 * That is tvk_table::rank_mask. Unchanged entries are left out: keeping nothing
 * changes nothing.
 *
 * Rows are what is held. With rescale there are two passes; masks of the first
 * are kept for the second where the memory budget has room for them, else made
 * again.
 */
#include "compat_gta.h"
#include "compat_sums.h"
#include "method_gta.h"
#include "mt.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "tv/checked.h"

#define BLOCK_WORDS (TVM_BLOCK / 64)
#define RESCALE_MIN 1e-7
#define MASKS_MAX   ((uint64_t)128 << 20) /* bytes of masks kept, a tensor */

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

struct della_state {
    struct tvk_gta call;
    size_t n_donors;
    size_t source[TVK_DONORS_MAX];
    double density[TVK_DONORS_MAX];
    struct tvk_odds odds[TVK_DONORS_MAX];
    uint64_t key[TVK_DONORS_MAX];
    double coef[TVK_DONORS_MAX], weight[TVK_DONORS_MAX];
    double *sum_all, *sum_kept; /* [n_donors][n_rows], with rescale */
    uint64_t *kept; /* [n_donors][rows][mask words of a row], or NULL */
    /* Of a worker: */
    unsigned char *scratch; /* of rank_mask */
    uint32_t *words, *keys; /* [row] */
    uint64_t *masks;        /* [n_donors][mask words of a row] */
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

/* Scratch of rank_mask, and the next worker's as well aligned. */
static size_t rank_bytes(size_t row)
{
    return (TVK_RANK_EACH * row + TVK_RANK_FIXED + 63) & ~(size_t)63;
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
    const size_t rows = (size_t)(t->n_elems / row);
    st->scratch = tvm_carve(&c, w, rank_bytes(row));
    st->words = tvm_carve(&c, w * row, sizeof *st->words);
    st->keys = tvm_carve(&c, w * row, sizeof *st->keys);
    st->masks = tvm_carve(&c, w * k * mask_words(row), sizeof *st->masks);
    if (rescales(t)) {
        st->sum_all = tvm_carve(&c, k * rows, sizeof *st->sum_all);
        st->sum_kept = tvm_carve(&c, k * rows, sizeof *st->sum_kept);
        if (job->roomy && k * rows * mask_words(row) <= MASKS_MAX / 8)
            st->kept =
                tvm_carve(&c, k * rows * mask_words(row), sizeof *st->kept);
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
        const double epsilon = value_of(t, s, GTA_EXTRA);
        st->odds[j] =
            (struct tvk_odds){st->density[j] - epsilon, 2.0 * epsilon};
        if (row_elems(t) == 1)
            st->odds[j] = (struct tvk_odds){st->density[j], 0.0};
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

/* The entries of donor j that stay in a row. */
static void thin(const struct tvm_job *job, const struct tvm_tile *tile,
                 size_t j, uint64_t row, const float *x, const float *base,
                 uint64_t *mask, size_t n)
{
    const struct della_state *st = job->state;
    const size_t w = tile->worker;
    uint32_t *words = st->words + w * n;
    uint32_t *keys = st->keys + w * n;

    job->k->philox_words(words, row * n, st->key[j], job->tensor->name_hash, n);
    const uint32_t most = job->k->magnitudes(keys, x, base, n);
    job->k->rank_mask(mask, keys, words, &st->odds[j],
                      st->scratch + w * rank_bytes(n), most, n);
}

/* Where the mask of a row of donor j is. */
static uint64_t *mask_of(const struct tvm_job *job, const struct tvm_tile *tile,
                         size_t j, uint64_t row, size_t n)
{
    const struct della_state *st = job->state;
    const size_t rows = (size_t)(job->tensor->n_elems / n);

    if (st->kept)
        return st->kept + (j * rows + (size_t)row) * mask_words(n);
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
        uint64_t *mask = mask_of(job, tile, j, row, n);
        double all = 0.0;
        double kept = 0.0;
        if (!is_thinned(t, st->source[j]))
            continue;
        thin(job, tile, j, row, xj, base, mask, n);
        for (size_t at = 0; at < n; at += TVM_BLOCK) {
            const size_t m = n - at < TVM_BLOCK ? n - at : TVM_BLOCK;
            double all_here = 0.0;
            double kept_here = 0.0;
            job->k->abs_sums(&all_here, &kept_here, xj + at, base + at,
                             mask + at / 64, m);
            all += all_here;
            kept += kept_here;
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
        uint64_t *mask = mask_of(job, tile, j, row, n);
        if (is_thinned(t, s) && !st->kept)
            thin(job, tile, j, row, x[s], x[t->base], mask, n);
        else if (!is_thinned(t, s) && !st->kept) /* those are 0 */
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

/* ---- --compat mergekit ----------------------------------------------------
 * Ranks and odds in the compute dtype, in which bf16 knows some 500 ranks of a
 * row; draws from mergekit's stream, a donor's all in order and then the next
 * one's. A row of one entry keeps it by density (mergekit divides 0 by 0). */

struct compat_donor {
    size_t source, draw; /* draw: place among the donors that draw */
    double density, epsilon;
    bool thinned;
};

struct compat_state {
    size_t n_donors, n_draw;
    struct compat_donor donor[TVK_DONORS_MAX];
    double weight[TVK_DONORS_MAX];
    float scale[TVK_DONORS_MAX];
    double *sum_all, *sum_kept; /* [n_donors][n_rows], with rescale */
    struct tvm_mt *mt_tile;     /* [n_tiles][n_draw]: at its first row */
    /* Of a worker: */
    struct tvm_mt *mt;          /* [n_draw] */
    uint64_t *row;              /* that mt stands at */
    struct tvk_ranked *entries; /* [2][row] */
    uint32_t *keys;             /* [row] */
    float *delta;               /* [n_donors][row] */
    float *odds;                /* [row] */
    uint64_t *masks;            /* [n_donors][mask words of a row] */
};

static size_t count_thinned(const struct tvm_tensor *t)
{
    size_t n = 0;

    for (size_t s = 0; s < t->n_sources; s++)
        n += (int)s != t->base && is_thinned(t, s);
    return n;
}

static uint64_t compat_draws(const struct tvm_tensor *t)
{
    return count_thinned(t) * t->n_elems;
}

/* torch has no bernoulli for fp16 on a CPU: that is thinned in fp32. */
static enum tv_dtype thin_dtype(const struct tvm_job *job)
{
    return job->tensor->compute == TV_F16 ? TV_F32 : job->tensor->compute;
}

static size_t compat_row(const struct tvm_tensor *t)
{
    return any_thinned(t) ? (size_t)tvm_row_elems(t) : TVM_BLOCK;
}

static size_t compat_lay_out(const struct tvm_job *job, void *base,
                             struct compat_state *st)
{
    const struct tvm_tensor *t = job->tensor;
    const size_t row = compat_row(t);
    const size_t w = job->n_workers;
    const size_t k = tvm_donor_count(t);
    const size_t n_draw = count_thinned(t);
    struct tvm_carver c = {base, 0};

    (void)tvm_carve(&c, 1, sizeof *st);
    st->delta = tvm_carve(&c, w * k * row, sizeof *st->delta);
    if (n_draw == 0)
        return c.used;
    st->mt_tile = tvm_carve(&c, job->n_tiles * n_draw, sizeof *st->mt_tile);
    st->mt = tvm_carve(&c, w * n_draw, sizeof *st->mt);
    st->row = tvm_carve(&c, w, sizeof *st->row);
    st->entries = tvm_carve(&c, w * 2 * row, sizeof *st->entries);
    st->keys = tvm_carve(&c, w * row, sizeof *st->keys);
    st->odds = tvm_carve(&c, w * row, sizeof *st->odds);
    st->masks = tvm_carve(&c, w * k * mask_words(row), sizeof *st->masks);
    if (rescales(t)) {
        const size_t rows = (size_t)(t->n_elems / row);
        st->sum_all = tvm_carve(&c, k * rows, sizeof *st->sum_all);
        st->sum_kept = tvm_carve(&c, k * rows, sizeof *st->sum_kept);
    }
    return c.used;
}

static size_t compat_state_bytes(const struct tvm_job *job)
{
    struct compat_state st;

    return compat_lay_out(job, NULL, &st);
}

/* The generator at the first row of every tile. */
static void compat_find_draws(const struct tvm_job *job,
                              const struct compat_donor *d)
{
    const struct compat_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const uint64_t row = compat_row(t);
    uint64_t at = 0;
    struct tvm_mt mt;

    tvm_mt_stream_seek(job->stream, t->draw_at + d->draw * t->n_elems, &mt);
    for (uint64_t i = 0; i < job->n_tiles; i++) {
        const uint64_t first = i * job->tile_elems / row * row;
        tvm_mt_skip(&mt, first - at);
        at = first;
        st->mt_tile[(size_t)i * st->n_draw + d->draw] = mt;
    }
}

static void compat_set_up(struct tvm_job *job)
{
    struct compat_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;

    (void)compat_lay_out(job, st, st);
    st->n_draw = count_thinned(t);
    for (size_t s = 0, draw = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        const size_t j = st->n_donors++;
        st->weight[j] = value_of(t, s, GTA_WEIGHT);
        st->donor[j] = (struct compat_donor){
            .source = s,
            .density = value_of(t, s, GTA_DENSITY),
            .epsilon = value_of(t, s, GTA_EXTRA),
            .thinned = is_thinned(t, s),
        };
        if (!st->donor[j].thinned)
            continue;
        st->donor[j].draw = draw++;
        compat_find_draws(job, &st->donor[j]);
    }
}

static bool compat_next_phase(struct tvm_job *job)
{
    struct compat_state *st = job->state;
    const size_t row = compat_row(job->tensor);
    const size_t rows = (size_t)(job->tensor->n_elems / row);

    if (job->phase == 0) {
        compat_set_up(job);
        return rescales(job->tensor);
    }
    for (size_t j = 0; j < st->n_donors; j++)
        if (st->donor[j].thinned)
            st->scale[j] =
                gta_compat_scale(job->k, thin_dtype(job),
                                 tvk_sum_tree(st->sum_all + j * rows, rows),
                                 tvk_sum_tree(st->sum_kept + j * rows, rows));
    return false;
}

static void compat_tile_begin(struct tvm_job *job, struct tvm_tile *tile)
{
    const struct compat_state *st = job->state;

    if (st->n_draw == 0)
        return;
    memcpy(st->mt + (size_t)tile->worker * st->n_draw,
           st->mt_tile + (size_t)tile->tile * st->n_draw,
           st->n_draw * sizeof *st->mt);
    st->row[tile->worker] = tile->first / compat_row(job->tensor);
}

/* Brings a worker's generators to a row: some are passed over. */
static void go_to_row(const struct tvm_job *job, const struct tvm_tile *tile,
                      uint64_t row, size_t n)
{
    const struct compat_state *st = job->state;
    struct tvm_mt *mt = st->mt + (size_t)tile->worker * st->n_draw;

    for (size_t i = 0; i < st->n_draw; i++)
        tvm_mt_skip(&mt[i], (row - st->row[tile->worker]) * n);
    st->row[tile->worker] = row + 1;
}

/* Odds of a row by rank, in the order of the row. */
static void find_odds(const struct tvm_job *job, const struct compat_donor *d,
                      const struct tvk_ranked *sorted, float *odds, size_t n)
{
    const struct tvk_table *k = job->k;
    const enum tv_dtype c = thin_dtype(job);
    /* torch rounds a number that is added, not one that is a factor. */
    const float least = tvm_compat_round1(k, c, d->density - d->epsilon);
    const float eps = (float)d->epsilon;
    /* Both twice: torch has the rank and 1 added to it. */
    const float top = tvm_compat_round1(
        k, c, (double)(tvm_compat_round1(k, c, (double)(n - 1)) + 1.0f));
    const float span = tvm_compat_round1(k, c, (double)(top - 1.0f));

    for (size_t r = 0; r < n; r++) {
        float rank = tvm_compat_round1(k, c, (double)r);
        rank = tvm_compat_round1(k, c, (double)(rank + 1.0f));
        rank = tvm_compat_round1(k, c, (double)(rank - 1.0f));
        rank = tvm_compat_round1(k, c, (double)(rank / span));
        rank = tvm_compat_round1(k, c, (double)(rank * 2.0f * eps));
        odds[sorted[r].at] =
            n == 1 ? (float)d->density
                   : tvm_compat_round1(k, c, (double)(least + rank));
    }
}

/* Ordered like the magnitudes. */
static uint32_t bits_of(float d)
{
    uint32_t bits = 0;

    memcpy(&bits, &d, sizeof bits);
    bits &= 0x7fffffffu;
    return bits > 0x7f800001u ? 0x7f800001u : bits;
}

/* Task vectors of a row and what stays of them. */
static void thin_row(const struct tvm_job *job, const struct tvm_tile *tile,
                     uint64_t row, const float *const *x, float **delta,
                     const uint64_t **masks, size_t n)
{
    const struct compat_state *st = job->state;
    const size_t worker = tile->worker;
    const float *base = x[job->tensor->base];
    struct tvk_ranked *entries = st->entries + worker * 2 * n;
    uint32_t *keys = st->keys + worker * n;
    float *odds = st->odds + worker * n;

    go_to_row(job, tile, row, n);
    for (size_t j = 0; j < st->n_donors; j++) {
        const struct compat_donor *d = &st->donor[j];
        uint64_t *mask =
            st->masks + (worker * st->n_donors + j) * mask_words(n);
        delta[j] = st->delta + (worker * st->n_donors + j) * n;
        masks[j] = d->thinned || d->density <= 0.0 ? mask : NULL;
        for (size_t at = 0; at < n; at += TVM_BLOCK)
            tvm_compat_sub(job, delta[j] + at, x[d->source] + at, base + at,
                           n - at < TVM_BLOCK ? n - at : TVM_BLOCK);
        if (!d->thinned) {
            memset(mask, 0, mask_words(n) * sizeof *mask);
            continue;
        }
        for (size_t i = 0; i < n; i++)
            keys[i] = bits_of(delta[j][i]);
        find_odds(job, d, tvk_rank_sort(entries, keys, n), odds, n);
        tvm_mt_mask_each(&st->mt[worker * st->n_draw + d->draw], mask, odds, n);
    }
}

static void compat_measure_row(struct tvm_job *job, struct tvm_tile *tile,
                               uint64_t row, const float *const *x, size_t n)
{
    const struct compat_state *st = job->state;
    const size_t rows = (size_t)(job->tensor->n_elems / n);
    float *delta[TVK_DONORS_MAX];
    const uint64_t *masks[TVK_DONORS_MAX];

    thin_row(job, tile, row, x, delta, masks, n);
    for (size_t j = 0; j < st->n_donors; j++) {
        double all = 0.0;
        double kept = 0.0;
        for (size_t at = 0; st->donor[j].thinned && at < n; at += TVM_BLOCK) {
            const size_t m = n - at < TVM_BLOCK ? n - at : TVM_BLOCK;
            all += job->k->abs_sum(delta[j] + at, NULL, NULL, m);
            kept += job->k->abs_sum(delta[j] + at, NULL, masks[j] + at / 64, m);
        }
        st->sum_all[j * rows + (size_t)row] = all;
        st->sum_kept[j * rows + (size_t)row] = kept;
    }
}

static struct gta_mix mix_of(const struct tvm_job *job)
{
    const struct compat_state *st = job->state;
    const struct gta_detail *detail = job->tensor->method->detail;

    return (struct gta_mix){
        .compute = job->tensor->compute,
        .thin = thin_dtype(job),
        .n_donors = st->n_donors,
        .weight = st->weight,
        .scale = st->scale,
        .consensus = detail->consensus,
        .normalize = tvm_shared(job->tensor, GTA_NORMALIZE) != 0.0,
        .lambda = tvm_shared(job->tensor, GTA_LAMBDA),
    };
}

static void compat_combine_row(struct tvm_job *job, struct tvm_tile *tile,
                               uint64_t row, const float *const *x, float *dst,
                               size_t n)
{
    const struct compat_state *st = job->state;
    const struct gta_mix m = mix_of(job);
    float *delta[TVK_DONORS_MAX];
    const uint64_t *masks[TVK_DONORS_MAX];

    thin_row(job, tile, row, x, delta, masks, n);
    for (size_t at = 0; at < n; at += TVM_BLOCK) {
        const size_t here = n - at < TVM_BLOCK ? n - at : TVM_BLOCK;
        gta_compat_mix(job->k, &m, dst + at, x[job->tensor->base] + at, delta,
                       masks, here);
        for (size_t j = 0; j < st->n_donors; j++) {
            delta[j] += here;
            masks[j] += masks[j] == NULL ? 0 : BLOCK_WORDS;
        }
    }
}

/* Nothing is thinned. */
static void compat_combine(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, float *dst, size_t n)
{
    static const uint64_t none[BLOCK_WORDS];
    const struct compat_state *st = job->state;
    const struct gta_mix m = mix_of(job);
    const float *base = x[job->tensor->base];
    float *delta[TVK_DONORS_MAX];
    const uint64_t *masks[TVK_DONORS_MAX];

    for (size_t j = 0; j < st->n_donors; j++) {
        delta[j] =
            st->delta + ((size_t)tile->worker * st->n_donors + j) * TVM_BLOCK;
        tvm_compat_sub(job, delta[j], x[st->donor[j].source], base, n);
        masks[j] = st->donor[j].density > 0.0 ? NULL : none;
    }
    gta_compat_mix(job->k, &m, dst, base, delta, masks, n);
}

#define DELLA_COMPAT_FUNCTIONS                                                 \
    .base = TVM_BASE_REQUIRED, .min_donors = 0, .max_donors = TVK_DONORS_MAX,  \
    .n_params = GTA_N_PARAMS + 1, .check = check,                              \
    .state_bytes = compat_state_bytes, .next_phase = compat_next_phase,        \
    .tile_begin = compat_tile_begin, .combine = compat_combine,                \
    .row_elems = row_elems, .measure_row = compat_measure_row,                 \
    .combine_row = compat_combine_row, .draws = compat_draws

static const struct tvm_method compat_elected = {
    .name = "della",
    .params = params_normalized,
    .detail = &elected,
    DELLA_COMPAT_FUNCTIONS,
};

static const struct tvm_method compat_summed = {
    .name = "della_linear",
    .params = params_summed,
    .detail = &summed,
    DELLA_COMPAT_FUNCTIONS,
};

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
    .compat = &compat_elected,
    DELLA_FUNCTIONS,
};

const struct tvm_method tvm_method_della_linear = {
    .name = "della_linear",
    .summary = "task vectors thinned by rank, summed",
    .paper = "DELLA-Merging, Deep et al. 2024, arXiv 2406.11617",
    .params = params_summed,
    .detail = &summed,
    .compat = &compat_summed,
    DELLA_FUNCTIONS,
};
