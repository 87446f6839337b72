/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_slerp.c - spherical interpolation between two models.
 *
 * With A the base and B the other input, each a whole tensor seen as one
 * vector, c = <A, B> / (|A| |B|) and theta = acos c:
 *
 *   y = (sin((1-t) theta) A + sin(t theta) B) / sin theta
 *   y = (1-t) A + t B                        when |c| > 0.9995
 *
 * Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985, in
 * mergekit's form (norms up to 1e-8 count as 1). The dot products are fp64 over
 * blocks of TVM_BLOCK elements, joined in the tree of tvk_dots_tree; a block
 * is a power of two and so is a leaf, hence joining inside each leaf first
 * leaves the shape of the tree as it is.
 */
#include "compat.h"
#include "method.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#define BLOCKS_PER_LEAF (TVK_LEAF / TVM_BLOCK)
#define LERP_ABOVE      0.9995
#define NORM_MIN        1e-8

enum { P_T, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    [P_T] = {.name = "t",
             .scope = TVM_SHARED,
             .type = TVM_FLOAT,
             .required = true,
             .help = "0 gives the base, 1 the other input"},
};

struct slerp_state {
    double coef[2];        /* of A and B */
    struct tvk_dots *leaf; /* [n_leaves] */
    struct tvk_dots
        *block; /* [n_workers][BLOCKS_PER_LEAF] of the leaf at hand */
};

static size_t base_at(const struct tvm_tensor *t)
{
    return t->base > 0 ? (size_t)t->base : 0;
}

static int fold(const struct tvm_tensor *t)
{
    const double at = tvm_shared(t, P_T);
    const size_t a = base_at(t);

    if (t->n_sources == 1)
        return 0;
    if (at == 0.0)
        return (int)a;
    return at == 1.0 ? (int)(1 - a) : -1;
}

static size_t state_bytes(const struct tvm_job *job)
{
    return sizeof(struct slerp_state) +
           sizeof(struct tvk_dots) * ((size_t)job->n_leaves +
                                      (size_t)job->n_workers * BLOCKS_PER_LEAF);
}

static void set_coefs(struct slerp_state *st, struct tvk_dots d, double t)
{
    double na = sqrt(d.aa);
    double nb = sqrt(d.bb);

    if (na <= NORM_MIN)
        na = 1.0;
    if (nb <= NORM_MIN)
        nb = 1.0;
    double c = d.ab / na / nb;
    c = c > 1.0 ? 1.0 : c < -1.0 ? -1.0 : c;
    /* Written so that a NaN takes this branch: then only the elements that are
     * not finite spoil their own results. */
    if (!(fabs(c) <= LERP_ABOVE)) {
        st->coef[0] = 1.0 - t;
        st->coef[1] = t;
        return;
    }
    const double theta = acos(c);
    const double s = sin(theta);
    st->coef[0] = sin((1.0 - t) * theta) / s;
    st->coef[1] = sin(t * theta) / s;
}

static bool next_phase(struct tvm_job *job)
{
    struct slerp_state *st = job->state;

    if (job->tensor->n_sources != 2)
        return false;
    if (job->phase == 0) {
        st->leaf = (struct tvk_dots *)(void *)(st + 1);
        st->block = st->leaf + job->n_leaves;
        return true;
    }
    set_coefs(st, tvk_dots_tree(st->leaf, (size_t)job->n_leaves),
              tvm_shared(job->tensor, P_T));
    return false;
}

static void measure(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, size_t n)
{
    struct slerp_state *st = job->state;
    const size_t a = base_at(job->tensor);
    struct tvk_dots *block = st->block + (size_t)tile->worker * BLOCKS_PER_LEAF;
    const size_t in_leaf = (size_t)(tile->start % TVK_LEAF / TVM_BLOCK);

    job->k->dots(&block[in_leaf], x[a], x[1 - a], n);
    if (in_leaf + 1 == BLOCKS_PER_LEAF ||
        tile->start + n == job->tensor->n_elems)
        st->leaf[tile->start / TVK_LEAF] = tvk_dots_tree(block, in_leaf + 1);
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const struct slerp_state *st = job->state;
    const size_t a = base_at(job->tensor);
    const double t = tvm_shared(job->tensor, P_T);

    (void)tile;
    /* The ends are exact, also where 0 * x would be NaN or -0 + 0 be +0. */
    if (job->tensor->n_sources == 1 || t == 0.0 || t == 1.0) {
        memcpy(dst,
               x[job->tensor->n_sources == 1 ? 0
                 : t == 0.0                  ? a
                                             : 1 - a],
               n * sizeof *dst);
        return;
    }
    const float *const pair[2] = {x[a], x[1 - a]};
    job->k->weighted_sum(dst, pair, st->coef, 2, 1.0, n);
}

/* ---- --compat mergekit ----------------------------------------------------
 * fp32 factors, products and sum; torch's own dot products in fp32, of which
 * only the factors depend, are not reproduced. */

static void compat_combine(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, float *dst, size_t n)
{
    const struct slerp_state *st = job->state;
    const size_t a = base_at(job->tensor);
    const float by[2] = {(float)st->coef[0], (float)st->coef[1]};

    (void)tile;
    if (job->tensor->n_sources == 1) {
        memcpy(dst, x[0], n * sizeof *dst);
        return;
    }
    for (size_t i = 0; i < n; i++)
        dst[i] = by[0] * x[a][i] + by[1] * x[1 - a][i];
    tvm_compat_round(job->k, job->tensor->compute, dst, n);
}

static const struct tvm_method compat = {
    .name = "slerp",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 2,
    .max_donors = 2,
    .base_counts = true,
    .params = params,
    .n_params = N_PARAMS,
    .missing = TVM_MISSING_COPY_ONLY,
    .check = tvm_check_finite,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .measure = measure,
    .combine = compat_combine,
};

const struct tvm_method tvm_method_slerp = {
    .name = "slerp",
    .summary = "spherical interpolation between two models",
    .paper = "Shoemake 1985, doi 10.1145/325334.325242",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 2,
    .max_donors = 2,
    .base_counts = true,
    .params = params,
    .n_params = N_PARAMS,
    .missing = TVM_MISSING_COPY_ONLY,
    .check = tvm_check_finite,
    .fold = fold,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .measure = measure,
    .combine = combine,
    .compat = &compat,
};
