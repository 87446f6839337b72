/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_passthrough.c - one input as it is, or scaled: y = scale * x.
 *
 * No paper: the tool of layer stacking ("frankenmerges"), as in mergekit,
 * Goddard et al. 2024, arXiv 2403.13257. Without a scale the plan copies the
 * bytes, whatever their dtype.
 */
#include "compat.h"
#include "method.h"

#include <stddef.h>
#include <string.h>

enum { P_SCALE, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    [P_SCALE] = {.name = "scale",
                 .scope = TVM_INPUT,
                 .type = TVM_FLOAT,
                 .help = "factor; the bytes are copied when it is not set"},
};

static double scale_of(const struct tvm_tensor *t)
{
    return t->per_source_set[P_SCALE] ? tvm_of(t, 0, P_SCALE, N_PARAMS) : 1.0;
}

static int fold(const struct tvm_tensor *t)
{
    return t->n_sources == 1 && scale_of(t) == 1.0 ? 0 : -1;
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const double scale = scale_of(job->tensor);

    (void)tile;
    if (scale == 1.0)
        memcpy(dst, x[0], n * sizeof *dst);
    else
        job->k->weighted_sum(dst, x, &scale, 1, 1.0, n);
}

/* --compat mergekit: the factor is an fp32 number. A value that is not scaled
 * may still be cast by the recipe's dtype on its way. */

static int compat_fold(const struct tvm_tensor *t)
{
    if (t->n_sources != 1 || t->sources[0].tensor->dtype != t->compute)
        return -1;
    return fold(t);
}

static void compat_combine(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, float *dst, size_t n)
{
    const float scale = (float)scale_of(job->tensor);

    (void)tile;
    for (size_t i = 0; i < n; i++)
        dst[i] = x[0][i] * scale;
    tvm_compat_round(job->k, job->tensor->compute, dst, n);
}

static const struct tvm_method compat = {
    .name = "passthrough",
    .base = TVM_BASE_OPTIONAL,
    .min_donors = 1,
    .max_donors = 1,
    .base_counts = true,
    .params = params,
    .n_params = N_PARAMS,
    .check = tvm_check_finite,
    .fold = compat_fold,
    .combine = compat_combine,
};

const struct tvm_method tvm_method_passthrough = {
    .name = "passthrough",
    .summary = "one input unchanged or scaled, for stacking layers",
    .paper = "mergekit, Goddard et al. 2024, arXiv 2403.13257",
    .base = TVM_BASE_OPTIONAL,
    .min_donors = 1,
    .max_donors = 1,
    .base_counts = true,
    .params = params,
    .n_params = N_PARAMS,
    .check = tvm_check_finite,
    .fold = fold,
    .combine = combine,
    .compat = &compat,
};
