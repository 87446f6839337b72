/* SPDX-License-Identifier: Apache-2.0 */
/*
 * family_mamba.c - names of Mamba, Mamba 2 and Falcon Mamba. No attention: a
 * layer is a norm and a mixer; its projections have roles of an MLP, the state
 * space's own parameters none.
 */
#include "family.h"

static const struct tv_family_type types[] = {
    {"mamba", "MambaForCausalLM", true},
    {"mamba2", "Mamba2ForCausalLM", false},
    {"falcon_mamba", "FalconMambaForCausalLM", true},
    {NULL, NULL, false},
};

static const char *const prefixes[] = {"backbone.", "model.", "", NULL};

#define IN_LAYER(name, role)                                                   \
    {                                                                          \
        "layers.#." name, TV_ROLE_##role, TV_PART_LAYER, false, false          \
    }
#define EXACT(name)                                                            \
    {                                                                          \
        "layers.#.mixer." name, TV_ROLE_OTHER, TV_PART_LAYER, true, false      \
    }

static const struct tv_family_row rows[] = {
    {"embeddings", TV_ROLE_EMBED, TV_PART_PRE, false, false},
    {"embedding", TV_ROLE_EMBED, TV_PART_PRE, false, false},
    IN_LAYER("norm", INPUT_NORM),
    IN_LAYER("mixer.in_proj", MLP_UP),
    IN_LAYER("mixer.out_proj", MLP_DOWN),
    IN_LAYER("mixer.norm", OTHER_NORM),
    IN_LAYER("mixer.conv1d", OTHER),
    IN_LAYER("mixer.x_proj", OTHER),
    IN_LAYER("mixer.dt_proj", OTHER),
    EXACT("A_log"),
    EXACT("D"),
    EXACT("dt_bias"),
    {"norm_f", TV_ROLE_FINAL_NORM, TV_PART_POST, false, false},
    {"lm_head", TV_ROLE_LM_HEAD, TV_PART_POST, false, true},
    {NULL, TV_ROLE_OTHER, TV_PART_PRE, false, false},
};

const struct tv_family tv_family_mamba = {
    .name = "mamba",
    .types = types,
    .prefixes = prefixes,
    .layers = "layers.",
    .rows = rows,
    .bias_optional = true, /* use_bias */
    .embed_is_hidden = true,
};
