/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_passthrough.c - one input as it is, or scaled: y = scale * x.
 *
 * No paper: the tool of layer stacking ("frankenmerges"), as in mergekit,
 * Goddard et al. 2024, arXiv 2403.13257. Without a scale the plan copies the
 * bytes, whatever their dtype.
 */
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
};
