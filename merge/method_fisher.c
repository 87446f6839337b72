/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_fisher.c - average weighted by given Fisher information.
 *
 *   y = sum_i w_i F_i x_i / sum_i w_i F_i     element by element
 *
 * F_i (diagonal Fisher information: mean squared gradients; second moments of
 * Adam do too) comes as one more entry of the recipe with the tensors of its
 * model, marked by fisher_of: the number of that model in the list, from 1.
 * Negative values count as 0; `floor` is added to all. Where no model has any,
 * y is the average by w_i alone.
 *
 * Matena and Raffel, "Merging models with Fisher-weighted averaging", NeurIPS
 * 2022, arXiv 2111.09832.
 */
#include "method.h"

#include <math.h>
#include <stddef.h>

enum { P_WEIGHT, P_FISHER_OF, P_FLOOR, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    [P_WEIGHT] = {.name = "weight",
                  .scope = TVM_INPUT,
                  .type = TVM_FLOAT,
                  .has_default = true,
                  .fallback = 1.0,
                  TVM_FROM(0.0),
                  .help = "factor of this model's Fisher information"},
    [P_FISHER_OF] = {.name = "fisher_of",
                     .scope = TVM_INPUT,
                     .type = TVM_INT,
                     .has_default = true,
                     .fallback = 0.0,
                     TVM_FROM(0.0),
                     .help = "this is no model, but the Fisher information of "
                             "the model of this number"},
    [P_FLOOR] = {.name = "floor",
                 .scope = TVM_SHARED,
                 .type = TVM_FLOAT,
                 .has_default = true,
                 .fallback = 0.0,
                 TVM_FROM(0.0),
                 .help = "added to all Fisher information"},
};

#define NONE SIZE_MAX

static bool is_fisher(const struct tvm_tensor *t, size_t source)
{
    return tvm_of(t, source, P_FISHER_OF, N_PARAMS) != 0.0;
}

/* The source with the Fisher information of a model; NONE when there is none or
 * more than one. */
static size_t fisher_of(const struct tvm_tensor *t, size_t model)
{
    const double number = (double)t->sources[model].position + 1.0;
    size_t found = NONE;

    for (size_t s = 0; s < t->n_sources; s++) {
        if (tvm_of(t, s, P_FISHER_OF, N_PARAMS) != number)
            continue;
        if (found != NONE)
            return NONE;
        found = s;
    }
    return found;
}

static bool names_a_model(const struct tvm_tensor *t, size_t fisher)
{
    for (size_t s = 0; s < t->n_sources; s++)
        if (!is_fisher(t, s) && (double)t->sources[s].position + 1.0 ==
                                    tvm_of(t, fisher, P_FISHER_OF, N_PARAMS))
            return true;
    return false;
}

static void check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    double sum = 0.0;
    size_t first = NONE; /* model */

    tvm_check_finite(t, problems);
    for (size_t s = 0; s < t->n_sources; s++) {
        const size_t number = t->sources[s].position + 1;
        if (is_fisher(t, s)) {
            if (!names_a_model(t, s))
                tvm_param_problem(t, P_FISHER_OF, s, problems,
                                  "entry %zu is the Fisher information of "
                                  "entry %g, which is no model with this "
                                  "tensor",
                                  number, tvm_of(t, s, P_FISHER_OF, N_PARAMS));
            continue;
        }
        first = first == NONE ? s : first;
        sum += tvm_of(t, s, P_WEIGHT, N_PARAMS);
        if (fisher_of(t, s) == NONE)
            tvm_param_problem(t, P_FISHER_OF, s, problems,
                              "entry %zu needs its Fisher information, once: "
                              "another entry with fisher_of: %zu",
                              number, number);
    }
    if (sum == 0.0)
        tvm_param_problem(t, P_WEIGHT, first == NONE ? 0 : first, problems,
                          "the weights sum to 0");
}

static int fold(const struct tvm_tensor *t)
{
    int only = -1;

    for (size_t s = 0; s < t->n_sources; s++) {
        if (is_fisher(t, s) || tvm_of(t, s, P_WEIGHT, N_PARAMS) == 0.0)
            continue;
        if (only >= 0)
            return -1;
        only = (int)s;
    }
    return only;
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const struct tvm_tensor *t = job->tensor;
    const double floor_ = tvm_shared(t, P_FLOOR);
    double top[TVM_BLOCK] = {0.0};
    double by[TVM_BLOCK] = {0.0};
    double plain[TVM_BLOCK] = {0.0};
    double weights = 0.0;

    (void)tile;
    for (size_t s = 0; s < t->n_sources; s++) {
        if (is_fisher(t, s))
            continue;
        const double w = tvm_of(t, s, P_WEIGHT, N_PARAMS);
        const float *f = x[fisher_of(t, s)];
        weights += w;
        for (size_t i = 0; i < n; i++) {
            const double own =
                w * ((f[i] < 0.0f ? 0.0 : (double)f[i]) + floor_);
            top[i] += own * (double)x[s][i];
            by[i] += own;
            plain[i] += w * (double)x[s][i];
        }
    }
    for (size_t i = 0; i < n; i++)
        dst[i] = (float)(by[i] != 0.0 ? top[i] / by[i] : plain[i] / weights);
}

const struct tvm_method tvm_method_fisher = {
    .name = "fisher",
    .summary = "average weighted by given Fisher information",
    .paper = "Fisher merging, Matena and Raffel 2022, arXiv 2111.09832",
    .base = TVM_BASE_NONE,
    .min_donors = 2,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_PARAMS,
    .check = check,
    .fold = fold,
    .combine = combine,
    .aside = is_fisher,
};
