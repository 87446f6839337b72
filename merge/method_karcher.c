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
#include "compat_sums.h"
#include "method.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

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

/* ---- --compat mergekit ----------------------------------------------------
 * There the mean is a tensor in the compute dtype, rounded in every step, and
 * no combination of the inputs any more. Nothing of it is kept: each pass makes
 * an element's mean again by all the steps whose factors are known. Lengths are
 * fp32 numbers in any dtype: so torch divides by them, but rounds one that
 * stands in front of a product. */

struct turn {                   /* of the iteration */
    float cosine, sine, length; /* of the tangent's length, which is the last */
    float norm;                 /* the new mean is divided by it; 0: is not */
};

enum { LENGTHS, MEAN, COSINES, TANGENT, NORM };

struct compat_state {
    struct tvm_compat_sums sums;
    unsigned step;
    bool valid[N_MAX];
    float norm[N_MAX];
    float alpha, mean_norm; /* mean_norm 0: the first direction is the mean */
    float scale;            /* of the result; 0: there is no direction */
    size_t first, n_turns, most_turns;
    struct turn *turns; /* [most_turns] */
    float *factors;     /* [most_turns + 1][n][2]: of u and of the mean in it */
};

static size_t most_turns(const struct tvm_tensor *t)
{
    return (size_t)fmax(tvm_shared(t, P_MAX_ITER), 0.0);
}

static size_t compat_lay_out(const struct tvm_job *job, void *base,
                             struct compat_state *st)
{
    struct tvm_carver c = {base, 0};
    const size_t n = job->tensor->n_sources;

    (void)tvm_carve(&c, 1, sizeof *st);
    st->most_turns = most_turns(job->tensor);
    st->turns = tvm_carve(&c, st->most_turns, sizeof *st->turns);
    st->factors =
        tvm_carve(&c, (st->most_turns + 1) * n * 2, sizeof *st->factors);
    tvm_compat_sums_carve(&st->sums, &c, job, n);
    return c.used;
}

static size_t compat_state_bytes(const struct tvm_job *job)
{
    struct compat_state st;

    return compat_lay_out(job, NULL, &st);
}

/* T of turn k. A factor of 0 stands for a direction that is left out. */
static void compat_tangent(const struct tvm_job *job, size_t k,
                           const float *const *x, const float *mean, float *out,
                           size_t n)
{
    const struct compat_state *st = job->state;
    float u[TVM_BLOCK];
    float along[TVM_BLOCK];

    memset(out, 0, n * sizeof *out);
    for (size_t i = 0; i < st->sums.n; i++) {
        const float *f = st->factors + (k * st->sums.n + i) * 2;
        if (!st->valid[i] || f[0] == 0.0f)
            continue;
        tvm_compat_div1(job, u, x[i], st->norm[i], n);
        tvm_compat_mul1(job, along, mean, f[1], n);
        tvm_compat_sub(job, u, u, along, n);
        tvm_compat_mul1(job, u, u, f[0], n);
        tvm_compat_add(job, out, out, u, n);
    }
}

/* The mean before turn k, or behind the last one whose norm is not known. */
static void compat_mean(const struct tvm_job *job, const float *const *x,
                        float *mean, size_t n)
{
    const struct compat_state *st = job->state;
    float tangent[TVM_BLOCK];

    memset(mean, 0, n * sizeof *mean);
    for (size_t i = 0; i < st->sums.n; i++) {
        if (!st->valid[i])
            continue;
        tvm_compat_div1(job, tangent, x[i], st->norm[i], n);
        tvm_compat_mul1(job, tangent, tangent, st->alpha, n);
        tvm_compat_add(job, mean, mean, tangent, n);
    }
    if (st->step == MEAN)
        return;
    if (st->mean_norm > 0.0f)
        tvm_compat_div1(job, mean, mean, st->mean_norm, n);
    else
        tvm_compat_div1(job, mean, x[st->first], st->norm[st->first], n);
    for (size_t k = 0; k < st->n_turns; k++) {
        const struct turn *turn = &st->turns[k];
        compat_tangent(job, k, x, mean, tangent, n);
        tvm_compat_div1(job, tangent, tangent, turn->length, n);
        tvm_compat_mul1(job, mean, mean, turn->cosine, n);
        tvm_compat_mul1(job, tangent, tangent, turn->sine, n);
        tvm_compat_add(job, mean, mean, tangent, n);
        if (turn->norm > 0.0f)
            tvm_compat_div1(job, mean, mean, turn->norm, n);
    }
}

/* Returns false where no input has a direction. */
static bool compat_lengths(const struct tvm_job *job)
{
    struct compat_state *st = job->state;
    const double tol = tvm_shared(job->tensor, P_TOL);
    const float share = (float)(1.0 / (double)st->sums.n);
    size_t n_valid = 0;

    for (size_t i = 0; i < st->sums.n; i++) {
        st->norm[i] = (float)sqrt(tvm_compat_sums_get(&st->sums, job, i));
        st->scale += share * st->norm[i];
        st->valid[i] = (double)st->norm[i] > tol;
        st->first = st->valid[i] && n_valid == 0 ? i : st->first;
        n_valid += st->valid[i];
    }
    if (n_valid == 0) {
        st->scale = 0.0f;
        return false;
    }
    st->alpha = (float)(1.0 / (double)n_valid);
    return true;
}

static void compat_cosines(const struct tvm_job *job)
{
    struct compat_state *st = job->state;
    const double tol = tvm_shared(job->tensor, P_TOL);

    for (size_t i = 0; i < st->sums.n; i++) {
        float *f = st->factors + (st->n_turns * st->sums.n + i) * 2;
        float c = tvm_compat_one(job, tvm_compat_sums_get(&st->sums, job, i));
        c = c > 1.0f ? 1.0f : c < -1.0f ? -1.0f : c;
        const float theta = tvm_compat_one(job, (double)acosf(c));
        const float sine = tvm_compat_one(job, (double)sinf(theta));
        const float ratio = tvm_compat_one(job, (double)(theta / sine));
        f[0] = (double)theta < tol
                   ? 0.0f
                   : tvm_compat_one(job, (double)(st->alpha * ratio));
        f[1] = c;
    }
}

static bool compat_next_phase(struct tvm_job *job)
{
    struct compat_state *st = job->state;
    const double tol = tvm_shared(job->tensor, P_TOL);
    float norm = 0.0f;

    if (job->phase == 0) {
        (void)compat_lay_out(job, st, st);
        return st->sums.n > 1;
    }
    if (st->step == LENGTHS) {
        st->step = MEAN;
        return compat_lengths(job);
    }
    norm = (float)sqrt(tvm_compat_sums_get(&st->sums, job, 0));
    switch (st->step) {
    case MEAN:
        st->mean_norm = (double)norm < tol ? 0.0f : norm;
        st->step = COSINES;
        return st->n_turns < st->most_turns;
    case COSINES:
        compat_cosines(job);
        st->step = TANGENT;
        return true;
    case TANGENT:
        st->step = NORM;
        if ((double)norm < tol)
            return false;
        st->turns[st->n_turns++] =
            (struct turn){tvm_compat_one(job, (double)cosf(norm)),
                          tvm_compat_one(job, (double)sinf(norm)), norm, 0.0f};
        return true;
    default:
        st->turns[st->n_turns - 1].norm = (double)norm > tol ? norm : 0.0f;
        st->step = COSINES;
        return st->n_turns < st->most_turns;
    }
}

static void compat_measure(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, size_t n)
{
    const struct compat_state *st = job->state;
    float mean[TVM_BLOCK];
    float other[TVM_BLOCK];

    if (st->step != LENGTHS)
        compat_mean(job, x, mean, n);
    if (st->step == TANGENT)
        compat_tangent(job, st->n_turns, x, mean, other, n);
    for (size_t i = 0; i < st->sums.n; i++) {
        double sum = 0.0;
        if (st->step == LENGTHS) {
            sum = tvm_compat_squares(x[i], n);
        } else if (st->step == COSINES && st->valid[i]) {
            tvm_compat_div1(job, other, x[i], st->norm[i], n);
            for (size_t e = 0; e < n; e++)
                sum += (double)other[e] * (double)mean[e];
        } else if (i == 0 && st->step != COSINES) {
            sum = tvm_compat_squares(st->step == TANGENT ? other : mean, n);
        }
        tvm_compat_sums_put(&st->sums, job, tile, i, sum, n);
    }
}

static void compat_combine(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, float *dst, size_t n)
{
    const struct compat_state *st = job->state;

    (void)tile;
    if (st->sums.n == 1) {
        memcpy(dst, x[0], n * sizeof *dst);
        return;
    }
    if (st->scale == 0.0f) {
        memset(dst, 0, n * sizeof *dst);
        return;
    }
    compat_mean(job, x, dst, n);
    tvm_compat_mul1(job, dst, dst, tvm_compat_one(job, (double)st->scale), n);
}

static const struct tvm_method compat = {
    .name = "karcher",
    .base = TVM_BASE_OPTIONAL,
    .min_donors = 1,
    .max_donors = TVK_DONORS_MAX,
    .base_counts = true,
    .params = params,
    .n_params = N_PARAMS,
    .check = tvm_check_finite,
    .fold = fold,
    .state_bytes = compat_state_bytes,
    .next_phase = compat_next_phase,
    .measure = compat_measure,
    .combine = compat_combine,
};

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
    .compat = &compat,
};
