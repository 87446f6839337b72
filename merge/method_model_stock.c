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
#include "method.h"

#include <math.h>
#include <stddef.h>

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
};
