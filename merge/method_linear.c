/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_linear.c - weighted average of models.
 *
 *   y = sum_i w_i x_i   (normalize: divided by sum_i w_i)
 *
 * Wortsman et al., "Model soups: averaging weights of multiple fine-tuned
 * models improves accuracy without increasing inference time", ICML 2022,
 * arXiv 2203.05482. Deviation from mergekit: sums are carried in fp64 and
 * rounded once, and weights that sum to zero are refused, not divided by.
 */
#include "compat.h"
#include "method.h"

#include <math.h>
#include <stddef.h>

enum { P_WEIGHT, P_NORMALIZE, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    [P_WEIGHT] = {.name = "weight",
                  .scope = TVM_INPUT,
                  .type = TVM_FLOAT,
                  .required = true,
                  .help = "share of this input"},
    [P_NORMALIZE] = {.name = "normalize",
                     .scope = TVM_SHARED,
                     .type = TVM_BOOL,
                     .has_default = true,
                     .fallback = 1.0,
                     .help = "divide by the sum of the weights"},
};

struct linear_state {
    double divisor;
    double weight[TVK_DONORS_MAX + 1];
};

static double weight_sum(const struct tvm_tensor *t)
{
    double sum = 0.0;
    for (size_t s = 0; s < t->n_sources; s++)
        sum += tvm_of(t, s, P_WEIGHT, N_PARAMS);
    return sum;
}

static void check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    tvm_check_finite(t, problems);
    if (tvm_shared(t, P_NORMALIZE) != 0.0 && tvm_weights_cancel(t, P_WEIGHT))
        tvm_param_problem(t, P_WEIGHT, 0, problems,
                          "the weights sum to 0 and cannot be normalized; "
                          "change a weight or set normalize: false");
}

static int fold(const struct tvm_tensor *t)
{
    const double w = tvm_of(t, 0, P_WEIGHT, N_PARAMS);

    if (t->n_sources != 1)
        return -1;
    return w == 1.0 || (tvm_shared(t, P_NORMALIZE) != 0.0 && w != 0.0) ? 0 : -1;
}

static size_t state_bytes(const struct tvm_job *job)
{
    (void)job;
    return sizeof(struct linear_state);
}

static bool next_phase(struct tvm_job *job)
{
    struct linear_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;

    for (size_t s = 0; s < t->n_sources; s++)
        st->weight[s] = tvm_of(t, s, P_WEIGHT, N_PARAMS);
    st->divisor = tvm_shared(t, P_NORMALIZE) != 0.0 ? weight_sum(t) : 1.0;
    return false;
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const struct linear_state *st = job->state;

    (void)tile;
    job->k->weighted_sum(dst, x, st->weight, job->tensor->n_sources,
                         st->divisor, n);
}

/* ---- --compat mergekit ----------------------------------------------------
 * fp32 with fused multiply-add in the order of the inputs, one rounding. */

static void compat_combine(struct tvm_job *job, struct tvm_tile *tile,
                           const float *const *x, float *dst, size_t n)
{
    const struct linear_state *st = job->state;
    const size_t n_sources = job->tensor->n_sources;
    float weight[TVK_DONORS_MAX + 1];
    float divisor = 1.0f;

    (void)tile;
    for (size_t s = 0; s < n_sources; s++)
        weight[s] = (float)st->weight[s];
    if (tvm_shared(job->tensor, P_NORMALIZE) != 0.0)
        divisor = tvm_compat_sum(weight, n_sources);
    for (size_t i = 0; i < n; i++) {
        float sum = 0.0f;
        for (size_t s = 0; s < n_sources; s++)
            sum = fmaf(x[s][i], weight[s], sum);
        dst[i] = sum / divisor;
    }
    tvm_compat_round(job->k, job->tensor->compute, dst, n);
}

static const struct tvm_method compat = {
    .name = "linear",
    .base = TVM_BASE_OPTIONAL,
    .min_donors = 1,
    .max_donors = TVK_DONORS_MAX,
    .base_counts = true,
    .params = params,
    .n_params = N_PARAMS,
    .check = check,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .combine = compat_combine,
};

const struct tvm_method tvm_method_linear = {
    .name = "linear",
    .summary = "weighted average of the inputs",
    .paper = "Model soups, Wortsman et al. 2022, arXiv 2203.05482",
    .base = TVM_BASE_OPTIONAL,
    .min_donors = 1,
    .max_donors = TVK_DONORS_MAX,
    .base_counts = true,
    .params = params,
    .n_params = N_PARAMS,
    .check = check,
    .fold = fold,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .combine = combine,
    .compat = &compat,
};
