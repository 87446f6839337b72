/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_karcher.c - the Karcher (Riemannian) mean of directions.
 *
 * The point m of the unit sphere that minimises the squared geodesic distances
 * to the unit vectors u_i = x_i / |x_i|, found by the fixed point
 *
 *   T = sum_i a_i theta_i / sin theta_i (u_i - cos theta_i m),
 *   m <- cos|T| m + sin|T| T / |T|        until |T| < tol,
 *
 * theta_i = acos <u_i, m>, all a_i equal; y = mean|x_i| m. Karcher, "Riemannian
 * center of mass and mollifier smoothing", CPAM 1977; for models arXiv
 * 2603.04972. Inputs no longer than tol have no direction: they take part in
 * the length only. Every iterate is a combination of the u_i, so the iteration
 * runs on their Gram matrix in fp64 and the tensor is read twice in all.
 */
#include "method.h"

#include <math.h>
#include <stddef.h>

#include "gram.h"

enum { P_MAX_ITER, P_TOL, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    [P_MAX_ITER] = {.name = "max_iter",
                    .scope = TVM_SHARED,
                    .type = TVM_INT,
                    .has_default = true,
                    .fallback = 10,
                    TVM_WITHIN(0, 1000000),
                    .help = "most iterations"},
    [P_TOL] = {.name = "tol",
               .scope = TVM_SHARED,
               .type = TVM_FLOAT,
               .has_default = true,
               .fallback = 1e-5,
               TVM_FROM(0.0),
               .help = "shorter steps end the iteration"},
};

#define N_MAX (TVK_DONORS_MAX + 1u)

struct karcher_state {
    struct tvm_gram gram;
    double coef[N_MAX];
};

static int fold(const struct tvm_tensor *t)
{
    return t->n_sources == 1 ? 0 : -1;
}

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct karcher_state *st)
{
    struct tvm_carver c = {base, 0};

    (void)tvm_carve(&c, 1, sizeof *st);
    tvm_gram_carve(&st->gram, &c, job, job->tensor->n_sources, false);
    return c.used;
}

static size_t state_bytes(const struct tvm_job *job)
{
    struct karcher_state st;

    return lay_out(job, NULL, &st);
}

/* <m, u_i> for m = sum_j c_j u_j; g is the Gram matrix of the u. */
static double cosine(const double *g, size_t n, const double *c, size_t i)
{
    double sum = 0.0;

    for (size_t j = 0; j < n; j++)
        sum += c[j] * g[i * n + j];
    return sum > 1.0 ? 1.0 : sum < -1.0 ? -1.0 : sum;
}

/* One step of the iteration; false when it was too short to be taken. */
static bool step(const double *g, size_t n, const bool *valid, double alpha,
                 double tol, double *c)
{
    double tangent[N_MAX] = {0};
    double along = 0.0; /* factor of -m */

    for (size_t i = 0; i < n; i++) {
        if (!valid[i])
            continue;
        const double dot = cosine(g, n, c, i);
        const double theta = acos(dot);
        if (!(theta >= tol))
            continue;
        const double s = sin(theta);
        const double f = alpha * (s > 0.0 ? theta / s : 1.0);
        tangent[i] += f;
        along += f * dot;
    }
    for (size_t i = 0; i < n; i++)
        tangent[i] -= along * c[i];
    const double length = sqrt(tvm_gram_norm_sq(g, n, tangent));
    if (!(length >= tol))
        return false;
    for (size_t i = 0; i < n; i++)
        c[i] = cos(length) * c[i] + sin(length) * tangent[i] / length;
    const double norm = sqrt(tvm_gram_norm_sq(g, n, c));
    for (size_t i = 0; norm > tol && i < n; i++)
        c[i] /= norm;
    return true;
}

/* Turns the Gram matrix of the x into the coefficients of the result. */
static void solve(double *g, size_t n, double tol, unsigned max_iter,
                  double *coef)
{
    double norm[N_MAX];
    double c[N_MAX] = {0};
    bool valid[N_MAX];
    size_t n_valid = 0;
    size_t first = 0;
    double scale = 0.0;

    for (size_t i = 0; i < n; i++) {
        norm[i] = sqrt(g[i * n + i]);
        scale += norm[i] / (double)n;
        valid[i] = norm[i] > tol;
        first = valid[i] && n_valid == 0 ? i : first;
        n_valid += valid[i];
    }
    for (size_t i = 0; i < n; i++)
        coef[i] = 0.0;
    if (n_valid == 0)
        return;
    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++)
            g[i * n + j] =
                valid[i] && valid[j] ? g[i * n + j] / norm[i] / norm[j] : 0.0;
    const double alpha = 1.0 / (double)n_valid;
    for (size_t i = 0; i < n; i++)
        c[i] = valid[i] ? alpha : 0.0;
    const double length = sqrt(tvm_gram_norm_sq(g, n, c));
    for (size_t i = 0; i < n; i++)
        c[i] = length < tol ? (double)(i == first) : c[i] / length;
    for (unsigned k = 0; k < max_iter; k++)
        if (!step(g, n, valid, alpha, tol, c))
            break;
    for (size_t i = 0; i < n; i++)
        coef[i] = valid[i] ? scale * c[i] / norm[i] : 0.0;
}

static bool next_phase(struct tvm_job *job)
{
    struct karcher_state *st = job->state;
    const size_t n = job->tensor->n_sources;

    if (n == 1) {
        st->coef[0] = 1.0;
        return false;
    }
    if (job->phase == 0) {
        (void)lay_out(job, st, st);
        return true;
    }
    const double most = tvm_shared(job->tensor, P_MAX_ITER);
    solve(tvm_gram_sum(&st->gram, job), n, tvm_shared(job->tensor, P_TOL),
          most > 0 ? (unsigned)most : 0, st->coef);
    return false;
}

static void measure(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, size_t n)
{
    const struct karcher_state *st = job->state;

    tvm_gram_add(&st->gram, job, tile, x, NULL, n);
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const struct karcher_state *st = job->state;

    (void)tile;
    job->k->weighted_sum(dst, x, st->coef, job->tensor->n_sources, 1.0, n);
}

const struct tvm_method tvm_method_karcher = {
    .name = "karcher",
    .summary = "mean direction on the sphere, mean length",
    .paper = "Karcher 1977, doi 10.1002/cpa.3160300502; arXiv 2603.04972",
    .base = TVM_BASE_OPTIONAL,
    .min_donors = 1,
    .max_donors = TVK_DONORS_MAX,
    .base_counts = true,
    .params = params,
    .n_params = N_PARAMS,
    .check = tvm_check_finite,
    .fold = fold,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .measure = measure,
    .combine = combine,
};
