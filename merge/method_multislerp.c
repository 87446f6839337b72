/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_multislerp.c - barycentric interpolation of any number of models on
 * the sphere.
 *
 * With u_i = x_i / (|x_i| + eps), m = sum w_i u_i brought to length 1 and
 * T = sum w_i (u_i - <u_i, m> m), a = |T| + eps:
 *
 *   y = (m cos a + T sin(a) / a) * sum w_i |x_i|
 *
 * With a base, x_i are task vectors and the base is added (Goddard,
 * "MultiSLERP", goddard.blog 2024; mergekit). When the u_i cancel (|m| < eps)
 * two inputs are averaged; more are refused by mergekit in the middle of the
 * merge, here the weighted average is taken for any number. All of it follows
 * from the Gram matrix: one pass to measure, one to combine.
 */
#include "method.h"

#include <math.h>
#include <stddef.h>

#include "gram.h"

enum { P_WEIGHT, P_NORMALIZE, P_EPS, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    [P_WEIGHT] = {.name = "weight",
                  .scope = TVM_NON_BASE,
                  .type = TVM_FLOAT,
                  .required = true,
                  .help = "share of this input"},
    [P_NORMALIZE] = {.name = "normalize_weights",
                     .scope = TVM_SHARED,
                     .type = TVM_BOOL,
                     .has_default = true,
                     .fallback = 1.0,
                     .help = "divide the weights by their sum"},
    [P_EPS] = {.name = "eps",
               .scope = TVM_SHARED,
               .type = TVM_FLOAT,
               .has_default = true,
               .fallback = 1e-8,
               TVM_FROM(0.0),
               .help = "added to lengths before dividing by them"},
};

#define N_MAX (TVK_DONORS_MAX + 1u)

struct multislerp_state {
    struct tvm_gram gram;
    size_t n;
    double coef[N_MAX];
};

static int fold(const struct tvm_tensor *t)
{
    if (tvm_donor_count(t) == 0)
        return t->base;
    return tvm_donor_count(t) == 1 ? (t->base == 0 ? 1 : 0) : -1;
}

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct multislerp_state *st)
{
    struct tvm_carver c = {base, 0};

    (void)tvm_carve(&c, 1, sizeof *st);
    tvm_gram_carve(&st->gram, &c, job, tvm_donor_count(job->tensor),
                   job->tensor->base >= 0);
    return c.used;
}

static size_t state_bytes(const struct tvm_job *job)
{
    struct multislerp_state st;

    return lay_out(job, NULL, &st);
}

static void weights_of(const struct tvm_tensor *t, double *w)
{
    size_t n = 0;
    double sum = 0.0;

    for (size_t s = 0; s < t->n_sources; s++)
        if ((int)s != t->base) {
            w[n] = tvm_of(t, s, P_WEIGHT, N_PARAMS);
            sum += w[n++];
        }
    for (size_t i = 0; tvm_shared(t, P_NORMALIZE) != 0.0 && i < n; i++)
        w[i] /= sum;
}

static void solve(const struct tvm_tensor *t, double *g, size_t n, double *coef)
{
    const double eps = tvm_shared(t, P_EPS);
    double w[N_MAX];
    double length[N_MAX];
    double m[N_MAX];
    double tangent[N_MAX];
    double scale = 0.0;
    double along = 0.0;

    weights_of(t, w);
    for (size_t i = 0; i < n; i++) {
        const double norm = sqrt(g[i * n + i]);
        length[i] = norm + eps;
        scale += w[i] * norm;
    }
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++) {
            const double d = length[i] * length[j];
            g[i * n + j] = d > 0.0 ? g[i * n + j] / d : 0.0;
        }
    const double norm = sqrt(tvm_gram_norm_sq(g, n, w));
    if (!(norm >= eps) || norm == 0.0) {
        for (size_t i = 0; i < n; i++)
            coef[i] = w[i];
        return;
    }
    for (size_t i = 0; i < n; i++)
        m[i] = w[i] / norm;
    for (size_t i = 0; i < n; i++) {
        double dot = 0.0;
        for (size_t j = 0; j < n; j++)
            dot += m[j] * g[i * n + j];
        along += w[i] * dot;
    }
    for (size_t i = 0; i < n; i++)
        tangent[i] = w[i] - along * m[i];
    const double a = sqrt(tvm_gram_norm_sq(g, n, tangent)) + eps;
    const double f = a > 0.0 ? sin(a) / a : 1.0;
    for (size_t i = 0; i < n; i++)
        coef[i] = length[i] > 0.0
                      ? scale * (m[i] * cos(a) + tangent[i] * f) / length[i]
                      : 0.0;
}

static bool next_phase(struct tvm_job *job)
{
    struct multislerp_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;

    st->n = tvm_donor_count(t);
    if (st->n < 2) {
        st->coef[0] = 1.0;
        return false;
    }
    if (job->phase == 0) {
        (void)lay_out(job, st, st);
        return true;
    }
    solve(t, tvm_gram_sum(&st->gram, job), st->n, st->coef);
    return false;
}

static void measure(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, size_t n)
{
    const struct multislerp_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const float *v[N_MAX];

    (void)tvm_donors(t, x, v);
    tvm_gram_add(&st->gram, job, tile, v, t->base >= 0 ? x[t->base] : NULL, n);
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const struct multislerp_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const float *v[N_MAX];
    const struct tvk_gta sum = {
        .n_donors = st->n, .coef = st->coef, .weight = st->coef, .lambda = 1.0};

    (void)tile;
    (void)tvm_donors(t, x, v);
    if (t->base >= 0)
        job->k->gta(dst, x[t->base], v, NULL, &sum, n);
    else
        job->k->weighted_sum(dst, v, st->coef, st->n, 1.0, n);
}

static size_t first_donor(const struct tvm_tensor *t)
{
    return t->base == 0 && t->n_sources > 1 ? 1 : 0;
}

static void check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    double sum = 0.0;

    tvm_check_finite(t, problems);
    for (size_t s = 0; s < t->n_sources; s++)
        if ((int)s != t->base)
            sum += tvm_of(t, s, P_WEIGHT, N_PARAMS);
    if (tvm_shared(t, P_NORMALIZE) != 0.0 && sum == 0.0)
        tvm_param_problem(t, P_WEIGHT, first_donor(t), problems,
                          "the weights sum to 0 and cannot be normalized; "
                          "change a weight or set normalize_weights: false");
}

const struct tvm_method tvm_method_multislerp = {
    .name = "multislerp",
    .summary = "spherical interpolation of any number of models",
    .paper = "Goddard 2024, goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    .base = TVM_BASE_OPTIONAL,
    .min_donors = 1,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_PARAMS,
    .check = check,
    .fold = fold,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .measure = measure,
    .combine = combine,
};
