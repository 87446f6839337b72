/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_breadcrumbs.c - task vectors without their smallest and their largest
 * entries.
 *
 * Of n entries in ascending order of magnitude, the trunc(gamma n) largest are
 * dropped as outliers, and of the rest the trunc(density n) largest are kept.
 * Davari and Belilovsky, "Model Breadcrumbs: scaling multi-task model merging
 * with sparse masks", ECCV 2024, arXiv 2312.06795. Equal magnitudes at either
 * border are taken by lowest index.
 */
#include "method_gta.h"

static const struct tvm_param params[GTA_N_PARAMS + 1] = {
    GTA_PARAM_LIST(0.0, 0.0)[GTA_EXTRA] = {
        .name = "gamma",
        .scope = TVM_NON_BASE,
        .type = TVM_FLOAT,
        .has_default = true,
        .fallback = 0.01,
        TVM_WITHIN(0.0, 1.0),
        .help = "fraction of the largest entries to drop"}};
static const struct gta_detail linear = {GTA_OUTLIERS, false, false, false,
                                         false};
static const struct gta_detail linear_compat = {GTA_OUTLIERS, false, true,
                                                false, false};
static const struct gta_detail ties_compat = {GTA_OUTLIERS, true, true, false,
                                              false};
static const struct gta_detail ties = {GTA_OUTLIERS, true, false, false, false};

static const struct tvm_method compat_linear = {
    .name = "breadcrumbs",
    .params = params,
    .detail = &linear_compat,
    GTA_COMPAT_SHARED_FUNCTIONS,
    .n_params = GTA_N_PARAMS + 1,
};

static const struct tvm_method compat_ties = {
    .name = "breadcrumbs_ties",
    .params = params,
    .detail = &ties_compat,
    GTA_COMPAT_SHARED_FUNCTIONS,
    .n_params = GTA_N_PARAMS + 1,
};

const struct tvm_method tvm_method_breadcrumbs = {
    .name = "breadcrumbs",
    .summary = "task vectors without smallest and largest entries, summed",
    .paper = "Model Breadcrumbs, Davari and Belilovsky 2024, arXiv 2312.06795",
    .params = params,
    .detail = &linear,
    .compat = &compat_linear,
    GTA_SHARED_FUNCTIONS,
    .n_params = GTA_N_PARAMS + 1,
    .check = gta_check,
};

const struct tvm_method tvm_method_breadcrumbs_ties = {
    .name = "breadcrumbs_ties",
    .summary = "breadcrumbs, merged where signs agree",
    .paper = "Model Breadcrumbs, Davari and Belilovsky 2024, arXiv 2312.06795; "
             "TIES-Merging, Yadav et al. 2023, arXiv 2306.01708",
    .params = params,
    .detail = &ties,
    .compat = &compat_ties,
    GTA_SHARED_FUNCTIONS,
    .n_params = GTA_N_PARAMS + 1,
    .check = gta_check,
};
