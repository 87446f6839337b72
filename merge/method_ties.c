/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_ties.c - trim task vectors by magnitude, elect signs, merge what
 * agrees.
 *
 * Yadav et al., "TIES-Merging: resolving interference when merging models",
 * NeurIPS 2023, arXiv 2306.01708. Conventions are mergekit's where they differ
 * from the paper: trimming per tensor, votes on weighted task vectors, a zero
 * vote counts as positive, the divisor is the weight of those that agree.
 * Elements of equal magnitude at the cut are kept by lowest index.
 *
 * trim_scope: layer takes all tensors of a layer for one population, model (as
 * in the paper) the whole task vector: exactly k = max(1, trunc(sum of density
 * times elements)) of its entries stay, ties going to the first tensors of the
 * output. Not in mergekit.
 */
#include "method_gta.h"

#define N_PARAMS (GTA_N_CHOOSE + 1)

/* Values of enum tvm_reach. */
static const char *const scopes[] = {"tensor", "layer", "model", NULL};
static const struct tvm_param params[N_PARAMS] = {
    GTA_CHOOSE_LIST(1.0, GTA_CHOICE_MAGNITUDE)[GTA_SCOPE] = {
        .name = "trim_scope",
        .scope = TVM_SHARED,
        .type = TVM_CHOICE,
        .choices = scopes,
        .has_default = true,
        .fallback = 0.0,
        .help = "trim over a tensor, layer or model"}};
static const struct gta_detail detail = {GTA_MAGNITUDE, true, false, true,
                                         true};
static const struct gta_detail compat_detail = {GTA_MAGNITUDE, true, true, true,
                                                true};

static const struct tvm_method compat = {
    .name = "ties",
    .params = params,
    .detail = &compat_detail,
    GTA_COMPAT_SHARED_FUNCTIONS,
    .n_params = N_PARAMS,
};

const struct tvm_method tvm_method_ties = {
    .name = "ties",
    .summary = "trimmed task vectors, merged where their signs agree",
    .paper = "TIES-Merging, Yadav et al. 2023, arXiv 2306.01708",
    .params = params,
    .detail = &detail,
    .compat = &compat,
    GTA_SHARED_FUNCTIONS,
    .n_params = N_PARAMS,
    .check = gta_check,
    .reach = gta_reach,
    .surveyor = &gta_surveyor,
};

static const struct tvm_param sparsegpt_params[GTA_N_CHOOSE] =
    GTA_CHOOSE_PARAMS(1.0, GTA_CHOICE_SPARSEGPT);
static const struct gta_detail sparsegpt_detail = {GTA_SPARSEGPT, true, false,
                                                   true, false};

const struct tvm_method tvm_method_sparsegpt_ties = {
    .name = "sparsegpt_ties",
    .summary = "task vectors pruned by SparseGPT, merged where signs agree",
    .paper = "SparseGPT, Frantar and Alistarh 2023, arXiv 2301.00774; "
             "TIES-Merging, Yadav et al. 2023, arXiv 2306.01708",
    .needs_statistics = true,
    .params = sparsegpt_params,
    .detail = &sparsegpt_detail,
    GTA_CHOOSE_FUNCTIONS,
};
