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
#include "compat_sums.h"
#include "method.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

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
    tvm_check_finite(t, problems);
    if (tvm_shared(t, P_NORMALIZE) != 0.0 && tvm_weights_cancel(t, P_WEIGHT))
        tvm_param_problem(t, P_WEIGHT, first_donor(t), problems,
                          "the weights sum to 0 and cannot be normalized; "
                          "change a weight or set normalize_weights: false");
}

/* ---- --compat mergekit ----------------------------------------------------
 * Nothing between the steps is kept: every pass makes an element's chain of
 * roundings again, as far as the sums are known. */

enum { NORMS, MEAN, DOTS, TANGENT, KNOWN };

struct compat_state {
    struct tvm_compat_sums sums;
    unsigned step;
    bool cancels; /* the mean has no direction */
    float weight[N_MAX], norm[N_MAX], dot[N_MAX]; /* norm: as measured */
    float mean_norm, tangent_norm, length;
    float *delta; /* [n_workers][TVM_BLOCK] */
};

static size_t compat_lay_out(const struct tvm_job *job, void *base,
                             struct compat_state *st)
{
    struct tvm_carver c = {base, 0};

    (void)tvm_carve(&c, 1, sizeof *st);
    st->delta =
        tvm_carve(&c, (uint64_t)job->n_workers * TVM_BLOCK, sizeof *st->delta);
    tvm_compat_sums_carve(&st->sums, &c, job, tvm_donor_count(job->tensor));
    return c.used;
}

static size_t compat_state_bytes(const struct tvm_job *job)
{
    struct compat_state st;

    return compat_lay_out(job, NULL, &st);
}

/* Vector i of a block. */
static const float *compat_vector(const struct tvm_job *job,
                                  const struct tvm_tile *tile,
                                  const float *const *x, size_t i, size_t n)
{
    const struct compat_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    float *d = st->delta + (size_t)tile->worker * TVM_BLOCK;
    const float *v[N_MAX];

    (void)tvm_donors(t, x, v);
    if (t->base < 0)
        return v[i];
    tvm_compat_sub(job, d, v[i], x[t->base], n);
    return d;
}

static float compat_eps(const struct tvm_job *job, float norm)
{
    const float eps = (float)tvm_shared(job->tensor, P_EPS);
    return tvm_compat_one(job, (double)(norm + eps));
}

/* out = sum w_i u_i, brought to length 1 once that is known. */
static void compat_mean(const struct tvm_job *job, const struct tvm_tile *tile,
                        const float *const *x, float *out, size_t n)
{
    const struct compat_state *st = job->state;
    float u[TVM_BLOCK];

    memset(out, 0, n * sizeof *out);
    for (size_t i = 0; i < st->sums.n; i++) {
        tvm_compat_div1(job, u, compat_vector(job, tile, x, i, n),
                        compat_eps(job, st->norm[i]), n);
        tvm_compat_mul1(job, u, u, st->weight[i], n);
        for (size_t e = 0; e < n; e++)
            out[e] += u[e];
    }
    tvm_compat_round(job->k, job->tensor->compute, out, n);
    if (st->step > MEAN)
        tvm_compat_div1(job, out, out, st->mean_norm, n);
}

/* out = sum w_i (u_i - dot_i mean) */
static void compat_tangent(const struct tvm_job *job,
                           const struct tvm_tile *tile, const float *const *x,
                           const float *mean, float *out, size_t n)
{
    const struct compat_state *st = job->state;
    float u[TVM_BLOCK];
    float along[TVM_BLOCK];

    memset(out, 0, n * sizeof *out);
    for (size_t i = 0; i < st->sums.n; i++) {
        tvm_compat_div1(job, u, compat_vector(job, tile, x, i, n),
                        compat_eps(job, st->norm[i]), n);
        tvm_compat_mul1(job, along, mean, st->dot[i], n);
        tvm_compat_sub(job, u, u, along, n);
        tvm_compat_mul1(job, u, u, st->weight[i], n);
        for (size_t e = 0; e < n; e++)
            out[e] += u[e];
    }
    tvm_compat_round(job->k, job->tensor->compute, out, n);
}

static void compat_weights(const struct tvm_job *job)
{
    struct compat_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    size_t n = 0;

    for (size_t s = 0; s < t->n_sources; s++)
        if ((int)s != t->base)
            st->weight[n++] =
                tvm_compat_one(job, tvm_of(t, s, P_WEIGHT, N_PARAMS));
    const float sum =
        tvm_compat_one(job, (double)tvm_compat_sum(st->weight, n));
    for (size_t i = 0; tvm_shared(t, P_NORMALIZE) != 0.0 && i < n; i++)
        st->weight[i] = tvm_compat_one(job, (double)(st->weight[i] / sum));
}

static void compat_length(const struct tvm_job *job)
{
    struct compat_state *st = job->state;
    float sum = 0.0f;

    for (size_t i = 0; i < st->sums.n; i++)
        sum += tvm_compat_one(job, (double)(st->norm[i] * st->weight[i]));
    st->length = tvm_compat_one(job, (double)sum);
}

static bool compat_next_phase(struct tvm_job *job)
{
    struct compat_state *st = job->state;

    if (job->phase == 0) {
        (void)compat_lay_out(job, st, st);
        if (tvm_donor_count(job->tensor) < 2)
            return false;
        compat_weights(job);
        return true;
    }
    for (size_t i = 0; i < st->sums.n; i++) {
        const double sum = tvm_compat_sums_get(&st->sums, job, i);
        const float root = tvm_compat_one(job, sqrt(sum));
        switch (st->step) {
        case NORMS:
            st->norm[i] = root;
            break;
        case MEAN:
            st->mean_norm = i == 0 ? root : st->mean_norm;
            break;
        case DOTS:
            st->dot[i] = tvm_compat_one(job, sum);
            break;
        default:
            st->tangent_norm =
                i == 0 ? compat_eps(job, root) : st->tangent_norm;
            break;
        }
    }
    if (st->step == NORMS)
        compat_length(job);
    if (st->step == MEAN) {
        st->cancels =
            st->mean_norm < tvm_compat_one(job, tvm_shared(job->tensor, P_EPS));
        if (st->cancels)
            return false;
    }
    st->step++;
    return st->step < KNOWN;
}

static void compat_measure(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, size_t n)
{
    const struct compat_state *st = job->state;
    float mean[TVM_BLOCK];
    float other[TVM_BLOCK];

    if (st->step != NORMS)
        compat_mean(job, tile, x, mean, n);
    if (st->step == TANGENT)
        compat_tangent(job, tile, x, mean, other, n);
    for (size_t i = 0; i < st->sums.n; i++) {
        double sum = 0.0;
        const float *v = compat_vector(job, tile, x, i, n);
        if (st->step == NORMS)
            sum = tvm_compat_squares(v, n);
        if (st->step == MEAN && i == 0)
            sum = tvm_compat_squares(mean, n);
        if (st->step == DOTS) {
            tvm_compat_div1(job, other, v, compat_eps(job, st->norm[i]), n);
            tvm_compat_mul(job, other, other, mean, n);
            sum = tvm_compat_total(other, n);
        }
        if (st->step == TANGENT && i == 0)
            sum = tvm_compat_squares(other, n);
        tvm_compat_sums_put(&st->sums, job, tile, i, sum, n);
    }
}

/* mergekit averages two inputs that cancel and refuses more in the middle of
 * the merge; here any number is averaged. */
static void compat_average(const struct tvm_job *job,
                           const struct tvm_tile *tile, const float *const *x,
                           float *dst, size_t n)
{
    const struct compat_state *st = job->state;
    float v[TVM_BLOCK];

    for (size_t i = 0; i < st->sums.n; i++) {
        tvm_compat_mul1(job, i == 0 ? dst : v,
                        compat_vector(job, tile, x, i, n), st->weight[i], n);
        if (i > 0)
            tvm_compat_add(job, dst, dst, v, n);
    }
}

static void compat_combine(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, float *dst, size_t n)
{
    const struct compat_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    float tangent[TVM_BLOCK];

    if (tvm_donor_count(t) < 2) {
        memcpy(dst, x[fold(t)], n * sizeof *dst);
        return;
    }
    if (st->cancels) {
        compat_average(job, tile, x, dst, n);
    } else {
        const float a = st->tangent_norm;
        const float s = tvm_compat_one(job, (double)sinf(a));
        compat_mean(job, tile, x, dst, n);
        compat_tangent(job, tile, x, dst, tangent, n);
        tvm_compat_mul1(job, dst, dst, tvm_compat_one(job, (double)cosf(a)), n);
        tvm_compat_mul1(job, tangent, tangent,
                        tvm_compat_one(job, (double)(s / a)), n);
        tvm_compat_add(job, dst, dst, tangent, n);
        tvm_compat_mul1(job, dst, dst, st->length, n);
    }
    if (t->base >= 0)
        tvm_compat_add(job, dst, dst, x[t->base], n);
}

static const struct tvm_method compat = {
    .name = "multislerp",
    .base = TVM_BASE_OPTIONAL,
    .min_donors = 1,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_PARAMS,
    .check = check,
    .fold = fold,
    .state_bytes = compat_state_bytes,
    .next_phase = compat_next_phase,
    .measure = compat_measure,
    .combine = compat_combine,
};

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
    .compat = &compat,
};
