/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_nearswap.c - moves towards another model where it is near already.
 *
 *   y = w x + (1 - w) b,   w = clamp(t / max(|b - x|, 1e-6), 0, 1)
 *
 * alchemonaut, QuartetAnemoi-70B-t0.0001 (model card, 2024); mergekit. A tensor
 * that only the base has is copied.
 */
#include "method.h"

#include <stddef.h>

enum { P_T, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    [P_T] = {.name = "t",
             .scope = TVM_SHARED,
             .type = TVM_FLOAT,
             .required = true,
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
};
