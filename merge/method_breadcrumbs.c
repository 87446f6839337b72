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
        .help = "fraction of the largest entries to drop"}};
static const struct gta_detail linear = {GTA_OUTLIERS, false, false, false,
                                         false};
static const struct gta_detail linear_compat = {GTA_OUTLIERS, false, true,
                                                false, false};
static const struct gta_detail ties_compat = {GTA_OUTLIERS, true, true, false,
                                              false};
static const struct gta_detail ties = {GTA_OUTLIERS, true, false, false, false};

static void check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    gta_check(t, problems);
    for (size_t s = 0; s < t->n_sources; s++) {
        const double gamma = tvm_of(t, s, GTA_EXTRA, t->method->n_params);
        if ((int)s != t->base && !(gamma >= 0.0 && gamma <= 1.0))
            tvm_problem_add(problems, true, TV_E_USAGE, t->name,
                            "gamma of input %zu is not within 0 and 1", s + 1);
    }
}

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
    .check = check,
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
    .check = check,
};
