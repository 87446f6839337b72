/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_model_stock.c - how far to go from the base to the average of the
 * fine-tunes, by the angle between them.
 *
 * With task vectors d_i, n of them, c the mean over pairs of
 * cos(d_i, d_j) = <d_i, d_j> / max(|d_i| |d_j|, 1e-6), each clamped to [-1, 1]:
 *
 *   t = n c / (1 + (n - 1) c),   0 when the divisor is below 1e-6 in size
 *   y = base + t mean(d_i)
 *
 * per tensor, or per row with filter_wise (a vector is one row). Jang et al.,
 * "Model Stock: all we need is just a few fine-tuned models", ECCV 2024, arXiv
 * 2403.19522. A tensor that fewer than two fine-tunes have is the base's
 * (mergekit leaves it out of the output).
 */
#include "compat_sums.h"
#include "method.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "gram.h"

enum { P_FILTER_WISE, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    [P_FILTER_WISE] = {.name = "filter_wise",
                       .scope = TVM_SHARED,
                       .type = TVM_BOOL,
                       .has_default = true,
                       .fallback = 0.0,
                       .help = "one ratio for each row, not for the tensor"},
};

#define NORMS_MIN   1e-6
#define DIVISOR_MIN 1e-6

struct stock_state {
    struct tvm_gram gram;
    size_t n;
    float *row_delta; /* [n_workers][n][TVM_BLOCK], by rows */
    double coef[TVK_DONORS_MAX];
};

static bool by_row(const struct tvm_tensor *t)
{
    return tvm_shared(t, P_FILTER_WISE) != 0.0 && t->rank > 1 &&
           tvm_donor_count(t) >= 2;
}

static void check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    const size_t n = tvm_donor_count(t);

    tvm_check_finite(t, problems);
    if (n < 2)
        tvm_problem_add(problems, false, TV_OK, t->name,
                        "fewer than two fine-tunes have this tensor: the "
                        "base's is copied");
    if (by_row(t) && n > TVM_GRAM_ROW_VECTORS)
        tvm_problem_add(problems, true, TV_E_UNSUPPORTED, t->name,
                        "filter_wise takes at most %u fine-tunes",
                        TVM_GRAM_ROW_VECTORS);
}

static int fold(const struct tvm_tensor *t)
{
    return tvm_donor_count(t) < 2 ? t->base : -1;
}

static uint64_t row_elems(const struct tvm_tensor *t)
{
    return by_row(t) ? tvm_row_elems(t) : 0;
}

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct stock_state *st)
{
    struct tvm_carver c = {base, 0};
    const size_t n = tvm_donor_count(job->tensor);

    (void)tvm_carve(&c, 1, sizeof *st);
    if (by_row(job->tensor))
        st->row_delta = tvm_carve(&c, (uint64_t)job->n_workers * n * TVM_BLOCK,
                                  sizeof *st->row_delta);
    else
        tvm_gram_carve(&st->gram, &c, job, n, true);
    return c.used;
}

static size_t state_bytes(const struct tvm_job *job)
{
    struct stock_state st;

    return lay_out(job, NULL, &st);
}

/* Factor of the sum of the task vectors. */
static double ratio(const double *g, size_t n)
{
    double sum = 0.0;
    size_t pairs = 0;

    for (size_t i = 0; i < n; i++)
        for (size_t j = i + 1; j < n; j++, pairs++) {
            const double norms = sqrt(g[i * n + i]) * sqrt(g[j * n + j]);
            const double c =
                g[i * n + j] / (norms > NORMS_MIN ? norms : NORMS_MIN);
            sum += c > 1.0 ? 1.0 : c < -1.0 ? -1.0 : c;
        }
    const double c = sum / (double)pairs;
    const double divisor = 1.0 + ((double)n - 1.0) * c;
    return fabs(divisor) < DIVISOR_MIN ? 0.0 : c / divisor;
}

static bool next_phase(struct tvm_job *job)
{
    struct stock_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;

    if (job->phase == 0) {
        st->n = tvm_donor_count(t);
        (void)lay_out(job, st, st);
        return !by_row(t) && st->n >= 2;
    }
    const double c = ratio(tvm_gram_sum(&st->gram, job), st->n);
    for (size_t i = 0; i < st->n; i++)
        st->coef[i] = c;
    return false;
}

static void measure(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, size_t n)
{
    const struct stock_state *st = job->state;
    const float *v[TVK_DONORS_MAX];

    (void)tvm_donors(job->tensor, x, v);
    tvm_gram_add(&st->gram, job, tile, v, x[job->tensor->base], n);
}

static void add(const struct tvm_job *job, const double *coef,
                const float *const *x, float *dst, size_t n)
{
    const float *v[TVK_DONORS_MAX];
    const struct tvk_gta sum = {.n_donors = tvm_donors(job->tensor, x, v),
                                .coef = coef,
                                .weight = coef,
                                .lambda = 1.0};

    job->k->gta(dst, x[job->tensor->base], v, NULL, &sum, n);
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const struct stock_state *st = job->state;

    (void)tile;
    add(job, st->coef, x, dst, n);
}

static void combine_row(struct tvm_job *job, struct tvm_tile *tile,
                        uint64_t row, const float *const *x, float *dst,
                        size_t n)
{
    const struct stock_state *st = job->state;
    float *scratch = st->row_delta + tile->worker * st->n * TVM_BLOCK;
    const float *v[TVK_DONORS_MAX];
    double g[TVM_GRAM_ROW_VECTORS * TVM_GRAM_ROW_VECTORS];
    double coef[TVM_GRAM_ROW_VECTORS];

    (void)row;
    (void)tvm_donors(job->tensor, x, v);
    tvm_gram_row(job->k, v, st->n, x[job->tensor->base], n, scratch, g);
    const double c = ratio(g, st->n);
    for (size_t i = 0; i < st->n; i++)
        coef[i] = c;
    add(job, coef, x, dst, n);
}

/* ---- --compat mergekit ----------------------------------------------------
 */

struct compat_state {
    struct tvm_compat_sums sums; /* of pairs, as in gram.c */
    float *delta;                /* [n_workers][n][TVM_BLOCK] */
    double *pairs;               /* [n_pairs] */
    float t;
};

static size_t pair_of(size_t i, size_t j)
{
    return j * (j + 1) / 2 + i;
}

static size_t compat_lay_out(const struct tvm_job *job, void *base,
                             struct compat_state *st)
{
    struct tvm_carver c = {base, 0};
    const size_t n = tvm_donor_count(job->tensor);
    const size_t n_pairs = n * (n + 1) / 2;

    (void)tvm_carve(&c, 1, sizeof *st);
    if (n < 2)
        return c.used;
    st->delta = tvm_carve(&c, (uint64_t)job->n_workers * n * TVM_BLOCK,
                          sizeof *st->delta);
    if (!by_row(job->tensor)) {
        st->pairs = tvm_carve(&c, n_pairs, sizeof *st->pairs);
        tvm_compat_sums_carve(&st->sums, &c, job, n_pairs);
    }
    return c.used;
}

static size_t compat_state_bytes(const struct tvm_job *job)
{
    struct compat_state st;

    return compat_lay_out(job, NULL, &st);
}

/* Task vectors of a block. */
static const float *compat_deltas(const struct tvm_job *job,
                                  const struct tvm_tile *tile,
                                  const float *const *x, size_t at, size_t n)
{
    const struct compat_state *st = job->state;
    const float *v[TVK_DONORS_MAX];
    const size_t n_donors = tvm_donors(job->tensor, x, v);
    float *d = st->delta + (size_t)tile->worker * n_donors * TVM_BLOCK;

    for (size_t i = 0; i < n_donors; i++)
        tvm_compat_sub(job, d + i * TVM_BLOCK, v[i] + at,
                       x[job->tensor->base] + at, n);
    return d;
}

/* Square of task vector i, or product of two. */
static double compat_share(const struct tvm_job *job, const float *d, size_t i,
                           size_t j, size_t n)
{
    float product[TVM_BLOCK];

    if (i == j)
        return tvm_compat_squares(d + i * TVM_BLOCK, n);
    tvm_compat_mul(job, product, d + i * TVM_BLOCK, d + j * TVM_BLOCK, n);
    return tvm_compat_total(product, n);
}

static float compat_t(const struct tvm_job *job, const double *pairs, size_t n)
{
    const float least = tvm_compat_one(job, NORMS_MIN);
    float sum = 0.0f;

    for (size_t i = 0; i < n; i++)
        for (size_t j = i + 1; j < n; j++) {
            const float a = tvm_compat_one(job, sqrt(pairs[pair_of(i, i)]));
            const float b = tvm_compat_one(job, sqrt(pairs[pair_of(j, j)]));
            const float norms = tvm_compat_one(job, (double)(a * b));
            const float dot = tvm_compat_one(job, pairs[pair_of(i, j)]);
            const float c = tvm_compat_one(
                job, (double)(dot / (norms > least ? norms : least)));
            sum += c > 1.0f ? 1.0f : c < -1.0f ? -1.0f : c;
        }
    const float many = (float)(n * (n - 1) / 2);
    const float c = tvm_compat_one(job, (double)(sum / many));
    const float others = tvm_compat_one(job, (double)((float)(n - 1) * c));
    const float divisor = tvm_compat_one(job, (double)(1.0f + others));
    if (fabsf(divisor) < tvm_compat_one(job, DIVISOR_MIN))
        return 0.0f;
    const float all = tvm_compat_one(job, (double)((float)n * c));
    return tvm_compat_one(job, (double)(all / divisor));
}

static bool compat_next_phase(struct tvm_job *job)
{
    struct compat_state *st = job->state;
    const size_t n = tvm_donor_count(job->tensor);

    if (job->phase == 0) {
        (void)compat_lay_out(job, st, st);
        return n >= 2 && !by_row(job->tensor);
    }
    for (size_t p = 0; p < n * (n + 1) / 2; p++)
        st->pairs[p] = tvm_compat_sums_get(&st->sums, job, p);
    st->t = compat_t(job, st->pairs, n);
    return false;
}

static void compat_measure(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, size_t n)
{
    const struct compat_state *st = job->state;
    const float *d = compat_deltas(job, tile, x, 0, n);
    const size_t n_donors = tvm_donor_count(job->tensor);

    for (size_t j = 0; j < n_donors; j++)
        for (size_t i = 0; i <= j; i++)
            tvm_compat_sums_put(&st->sums, job, tile, pair_of(i, j),
                                compat_share(job, d, i, j, n), n);
}

/* t mean(x) + (1 - t) b of elements [at, at + n). */
static void compat_mix(const struct tvm_job *job, float t,
                       const float *const *x, float *dst, size_t at, size_t n)
{
    const float *v[TVK_DONORS_MAX];
    const size_t n_donors = tvm_donors(job->tensor, x, v);
    float rest[TVM_BLOCK];

    memset(dst, 0, n * sizeof *dst);
    for (size_t i = 0; i < n_donors; i++)
        tvm_compat_add(job, dst, dst, v[i] + at, n);
    tvm_compat_div1(job, dst, dst, (float)n_donors, n);
    tvm_compat_mul1(job, dst, dst, t, n);
    tvm_compat_mul1(job, rest, x[job->tensor->base] + at,
                    tvm_compat_one(job, (double)(1.0f - t)), n);
    tvm_compat_add(job, dst, dst, rest, n);
}

static void compat_combine(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, float *dst, size_t n)
{
    const struct compat_state *st = job->state;

    (void)tile;
    if (tvm_donor_count(job->tensor) < 2)
        memcpy(dst, x[job->tensor->base], n * sizeof *dst);
    else
        compat_mix(job, st->t, x, dst, 0, n);
}

static void compat_combine_row(struct tvm_job *job, struct tvm_tile *tile,
                               uint64_t row, const float *const *x, float *dst,
                               size_t n)
{
    const size_t n_donors = tvm_donor_count(job->tensor);
    double pairs[TVM_GRAM_ROW_VECTORS * (TVM_GRAM_ROW_VECTORS + 1) / 2] = {0};

    (void)row;
    for (size_t at = 0; at < n; at += TVM_BLOCK) {
        const size_t m = n - at < TVM_BLOCK ? n - at : TVM_BLOCK;
        const float *d = compat_deltas(job, tile, x, at, m);
        for (size_t j = 0; j < n_donors; j++)
            for (size_t i = 0; i <= j; i++)
                pairs[pair_of(i, j)] += compat_share(job, d, i, j, m);
    }
    const float t = compat_t(job, pairs, n_donors);
    for (size_t at = 0; at < n; at += TVM_BLOCK)
        compat_mix(job, t, x, dst + at, at,
                   n - at < TVM_BLOCK ? n - at : TVM_BLOCK);
}

static const struct tvm_method compat = {
    .name = "model_stock",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 2,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_PARAMS,
    .missing = TVM_MISSING_COPY_BASE,
    .check = check,
    .fold = fold,
    .state_bytes = compat_state_bytes,
    .next_phase = compat_next_phase,
    .measure = compat_measure,
    .combine = compat_combine,
    .row_elems = row_elems,
    .combine_row = compat_combine_row,
};

const struct tvm_method tvm_method_model_stock = {
    .name = "model_stock",
    .summary = "base plus the average task vector, scaled by its agreement",
    .paper = "Model Stock, Jang et al. 2024, arXiv 2403.19522",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 2,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_PARAMS,
    .missing = TVM_MISSING_COPY_BASE,
    .check = check,
    .fold = fold,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .measure = measure,
    .combine = combine,
    .row_elems = row_elems,
    .combine_row = combine_row,
    .compat = &compat,
};
