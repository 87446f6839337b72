/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_dare.c - drop random entries of task vectors, scale the rest up.
 *
 * Yu et al., "Language models are Super Mario: absorbing abilities from
 * homologous models as a free lunch", ICML 2024, arXiv 2311.03099. Kept entries
 * are scaled by 1 / density, the paper's unbiased estimator (mergekit matches
 * L1 norms instead). The mask is a pure function of seed, position of the donor
 * in the recipe, tensor name and element index (design.md, "Random masks").
 */
#include "method_gta.h"

static const struct tvm_param params[GTA_N_PARAMS] = GTA_PARAMS(0.0, 1.0);
static const struct gta_detail linear = {GTA_RANDOM, false, false, false,
                                         false};
static const struct gta_detail linear_compat = {GTA_RANDOM, false, true, false,
                                                false};
static const struct gta_detail ties = {GTA_RANDOM, true, false, false, false};
static const struct gta_detail ties_compat = {GTA_RANDOM, true, true, false,
                                              false};

static const struct tvm_method compat_linear = {
    .name = "dare_linear",
    .params = params,
    .detail = &linear_compat,
    GTA_COMPAT_FUNCTIONS,
};

const struct tvm_method tvm_method_dare_linear = {
    .name = "dare_linear",
    .summary = "randomly thinned task vectors, summed",
    .paper = "DARE, Yu et al. 2024, arXiv 2311.03099",
    .params = params,
    .detail = &linear,
    .compat = &compat_linear,
    GTA_FUNCTIONS,
};

static const struct tvm_method compat_ties = {
    .name = "dare_ties",
    .params = params,
    .detail = &ties_compat,
    GTA_COMPAT_FUNCTIONS,
};

const struct tvm_method tvm_method_dare_ties = {
    .name = "dare_ties",
    .summary = "randomly thinned task vectors, merged where signs agree",
    .paper = "DARE, Yu et al. 2024, arXiv 2311.03099; "
             "TIES-Merging, Yadav et al. 2023, arXiv 2306.01708",
    .params = params,
    .detail = &ties,
    .compat = &compat_ties,
    GTA_FUNCTIONS,
};
