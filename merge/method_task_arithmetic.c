/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_task_arithmetic.c - y = base + lambda * sum_i w_i (x_i - base).
 *
 * Ilharco et al., "Editing models with task arithmetic", ICLR 2023, arXiv
 * 2212.04089. density and rescale are accepted, as in mergekit, and change
 * nothing unless `sparsify` names what to drop.
 */
#include "method_gta.h"

static const struct tvm_param params[GTA_N_CHOOSE] =
    GTA_CHOOSE_PARAMS(0.0, GTA_CHOICE_NONE);
static const struct gta_detail detail = {GTA_NONE, false, false, true, false};
static const struct gta_detail compat_detail = {GTA_NONE, false, true, true,
                                                false};

static const struct tvm_method compat = {
    .name = "task_arithmetic",
    .params = params,
    .detail = &compat_detail,
    GTA_COMPAT_CHOOSE_FUNCTIONS,
};

const struct tvm_method tvm_method_task_arithmetic = {
    .name = "task_arithmetic",
    .summary = "base plus a weighted sum of task vectors",
    .paper = "Task arithmetic, Ilharco et al. 2023, arXiv 2212.04089",
    .params = params,
    .detail = &detail,
    .compat = &compat,
    GTA_CHOOSE_FUNCTIONS,
};

static const struct tvm_param sparsegpt_params[GTA_N_CHOOSE] =
    GTA_CHOOSE_PARAMS(0.0, GTA_CHOICE_SPARSEGPT);
static const struct gta_detail sparsegpt_detail = {GTA_SPARSEGPT, false, false,
                                                   true, false};

const struct tvm_method tvm_method_sparsegpt_linear = {
    .name = "sparsegpt_linear",
    .summary = "task vectors pruned by SparseGPT, summed",
    .paper = "SparseGPT, Frantar and Alistarh 2023, arXiv 2301.00774",
    .needs_statistics = true,
    .params = sparsegpt_params,
    .detail = &sparsegpt_detail,
    GTA_CHOOSE_FUNCTIONS,
};
