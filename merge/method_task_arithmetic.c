/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_task_arithmetic.c - y = base + lambda * sum_i w_i (x_i - base).
 *
 * Ilharco et al., "Editing models with task arithmetic", ICLR 2023, arXiv
 * 2212.04089. density and rescale are accepted, as in mergekit, and change
 * nothing: nothing is dropped.
 */
#include "method_gta.h"

static const struct tvm_param params[GTA_N_PARAMS] = GTA_PARAMS(0.0, 0.0);
static const struct gta_detail detail = {GTA_NONE, false, false};
static const struct gta_detail compat_detail = {GTA_NONE, false, true};

static const struct tvm_method compat = {
    .name = "task_arithmetic",
    .params = params,
    .detail = &compat_detail,
    GTA_COMPAT_FUNCTIONS,
};

const struct tvm_method tvm_method_task_arithmetic = {
    .name = "task_arithmetic",
    .summary = "base plus a weighted sum of task vectors",
    .paper = "Task arithmetic, Ilharco et al. 2023, arXiv 2212.04089",
    .params = params,
    .detail = &detail,
    .compat = &compat,
    GTA_FUNCTIONS,
};
