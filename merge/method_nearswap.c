/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_nearswap.c - moves towards another model where it is near already.
 *
 *   y = w x + (1 - w) b,   w = clamp(t / max(|b - x|, 1e-6), 0, 1)
 *
 * alchemonaut, QuartetAnemoi-70B-t0.0001 (model card, 2024); mergekit. A tensor
 * that only the base has is copied.
 */
#include "compat.h"
#include "method.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

enum { P_T, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    [P_T] = {.name = "t",
             .scope = TVM_SHARED,
             .type = TVM_FLOAT,
             .required = true,
             TVM_FROM(0.0),
             .help = "distance up to which the other model is taken over"},
};

static int fold(const struct tvm_tensor *t)
{
    return t->n_sources == 1 || tvm_shared(t, P_T) <= 0.0 ? t->base : -1;
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const size_t base = (size_t)job->tensor->base;

    (void)tile;
    job->k->nearswap(dst, x[base], x[1 - base], tvm_shared(job->tensor, P_T),
                     n);
}

/* ---- --compat mergekit ----------------------------------------------------
 * A number divided by a tensor is, for torch, its reciprocal times the number.
 */

static void compat_combine(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, float *dst, size_t n)
{
    const struct tvm_tensor *const t = job->tensor;
    const struct tvk_table *const k = job->k;
    const enum tv_dtype c = t->compute;
    const float *const base = x[t->base];
    const float *const other = x[1 - t->base];
    const float least = tvm_compat_round1(k, c, 1e-6);
    const float reach = (float)tvm_shared(t, P_T);
    float w[TVM_BLOCK];
    float part[TVM_BLOCK];

    (void)tile;
    for (size_t i = 0; i < n; i++)
        w[i] = fabsf(base[i] - other[i]);
    tvm_compat_round(k, c, w, n);
    for (size_t i = 0; i < n; i++)
        w[i] = 1.0f / (w[i] < least ? least : w[i]);
    tvm_compat_round(k, c, w, n);
    for (size_t i = 0; i < n; i++)
        w[i] *= reach;
    tvm_compat_round(k, c, w, n);
    for (size_t i = 0; i < n; i++) {
        w[i] = w[i] < 0.0f ? 0.0f : w[i] > 1.0f ? 1.0f : w[i];
        dst[i] = w[i] * other[i];
        part[i] = 1.0f - w[i];
    }
    tvm_compat_round(k, c, dst, n);
    tvm_compat_round(k, c, part, n);
    for (size_t i = 0; i < n; i++)
        part[i] *= base[i];
    tvm_compat_round(k, c, part, n);
    for (size_t i = 0; i < n; i++)
        dst[i] += part[i];
    tvm_compat_round(k, c, dst, n);
}

/* A tensor that only the base has. */
static int compat_fold(const struct tvm_tensor *t)
{
    return t->n_sources == 1 && t->sources[0].tensor->dtype == t->compute
               ? t->base
               : -1;
}

static void compat_one(struct tvm_job *job, struct tvm_tile *tile,
                       const float *const *x, float *dst, size_t n)
{
    if (job->tensor->n_sources > 1)
        compat_combine(job, tile, x, dst, n);
    else
        memcpy(dst, x[0], n * sizeof *dst);
}

static const struct tvm_method compat = {
    .name = "nearswap",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 1,
    .max_donors = 1,
    .params = params,
    .n_params = N_PARAMS,
    .missing = TVM_MISSING_COPY_BASE,
    .check = tvm_check_finite,
    .fold = compat_fold,
    .combine = compat_one,
};

const struct tvm_method tvm_method_nearswap = {
    .name = "nearswap",
    .summary = "towards the other model where the two are near",
    .paper = "alchemonaut 2024, QuartetAnemoi-70B-t0.0001; mergekit",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 1,
    .max_donors = 1,
    .params = params,
    .n_params = N_PARAMS,
    .missing = TVM_MISSING_COPY_BASE,
    .check = tvm_check_finite,
    .fold = fold,
    .combine = combine,
    .compat = &compat,
};
