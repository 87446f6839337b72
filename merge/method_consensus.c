/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_consensus.c - keeps what matters to several models (consensus task
 * arithmetic).
 *
 * With weighted task vectors D_i = w_i (x_i - b) and their sum S, entry e
 * matters to model i when |D_i(e)| >= mask_lambda_i |S(e) - D_i(e)|.
 *
 *   y = b + lambda S where it matters to at least `agree` models, else b
 *
 * Wang et al., "Localizing Task Information for Improved Model Merging and
 * Compression" (TALL masks), ICML 2024, arXiv 2405.07813, whose task vectors
 * have weight 1. Their masks need no order statistic, so one pass suffices.
 */
#include "method.h"

#include <math.h>
#include <stddef.h>

enum { P_WEIGHT, P_MASK_LAMBDA, P_LAMBDA, P_AGREE, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    [P_WEIGHT] = {.name = "weight",
                  .scope = TVM_NON_BASE,
                  .type = TVM_FLOAT,
                  .has_default = true,
                  .fallback = 1.0,
                  .help = "factor of the task vector"},
    [P_MASK_LAMBDA] = {.name = "mask_lambda",
                       .scope = TVM_NON_BASE,
                       .type = TVM_FLOAT,
                       .has_default = true,
                       .fallback = 0.4,
                       TVM_FROM(0.0),
                       .help = "larger: fewer entries matter to the model"},
    [P_LAMBDA] = {.name = "lambda",
                  .scope = TVM_SHARED,
                  .type = TVM_FLOAT,
                  .has_default = true,
                  .fallback = 1.0,
                  .help = "factor of the merged task vector"},
    [P_AGREE] = {.name = "agree",
                 .scope = TVM_SHARED,
                 .type = TVM_INT,
                 .has_default = true,
                 .fallback = 2.0,
                 TVM_FROM(0.0),
                 .help = "models to which a kept entry matters, at least"},
};

static void check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    const size_t n_donors = t->n_sources - (t->base >= 0);
    const double agree = tvm_shared(t, P_AGREE);

    tvm_check_finite(t, problems);
    if (n_donors > 0 && agree > (double)n_donors)
        tvm_problem_add(problems, false, TV_OK, t->name,
                        "agree is more than the models that have this tensor: "
                        "it stays the base's");
}

static int fold(const struct tvm_tensor *t)
{
    return t->base >= 0 && t->n_sources == 1 ? t->base : -1;
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const struct tvm_tensor *t = job->tensor;
    const float *base = x[t->base];
    const double lambda = tvm_shared(t, P_LAMBDA);
    const double agree = tvm_shared(t, P_AGREE);
    double sum[TVM_BLOCK] = {0.0};
    unsigned short count[TVM_BLOCK] = {0};

    (void)tile;
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        const double w = tvm_of(t, s, P_WEIGHT, N_PARAMS);
        for (size_t i = 0; i < n; i++)
            sum[i] += w * ((double)x[s][i] - (double)base[i]);
    }
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        const double w = tvm_of(t, s, P_WEIGHT, N_PARAMS);
        const double l = tvm_of(t, s, P_MASK_LAMBDA, N_PARAMS);
        for (size_t i = 0; i < n; i++) {
            const double d = w * ((double)x[s][i] - (double)base[i]);
            count[i] =
                (unsigned short)(count[i] + (fabs(d) >= l * fabs(sum[i] - d)));
        }
    }
    for (size_t i = 0; i < n; i++) {
        /* What is not a number must not vanish because it compares as false. */
        const bool kept = (double)count[i] >= agree || !isfinite(sum[i]);
        /* Without a change the base's own bits, the sign of zero included. */
        dst[i] = kept && sum[i] != 0.0
                     ? (float)((double)base[i] + lambda * sum[i])
                     : base[i];
    }
}

const struct tvm_method tvm_method_consensus = {
    .name = "consensus",
    .summary = "sum of task vectors where it matters to several models",
    .paper = "TALL masks, Wang et al. 2024, arXiv 2405.07813",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 0,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_PARAMS,
    .check = check,
    .fold = fold,
    .combine = combine,
};
