/* SPDX-License-Identifier: Apache-2.0 */
/*
 * family_phi.c - names of Phi 1, 1.5 and 2: one norm in front of attention and
 * MLP, a head with bias. (Phi-3 is named like Llama.)
 */
#include "family.h"

static const struct tv_family_type types[] = {
    {"phi", "PhiForCausalLM", false},
    {NULL, NULL, false},
};

static const char *const prefixes[] = {"model.", "", NULL};

#define IN_LAYER(name, role)                                                   \
    {                                                                          \
        "layers.#." name, TV_ROLE_##role, TV_PART_LAYER, false, false          \
    }

static const struct tv_family_row rows[] = {
    {"embed_tokens", TV_ROLE_EMBED, TV_PART_PRE, false, false},
    IN_LAYER("input_layernorm", INPUT_NORM),
    IN_LAYER("self_attn.q_proj", ATTN_Q),
    IN_LAYER("self_attn.k_proj", ATTN_K),
    IN_LAYER("self_attn.v_proj", ATTN_V),
    IN_LAYER("self_attn.dense", ATTN_O),
    IN_LAYER("self_attn.q_layernorm", OTHER_NORM),
    IN_LAYER("self_attn.k_layernorm", OTHER_NORM),
    IN_LAYER("mlp.fc1", MLP_UP),
    IN_LAYER("mlp.fc2", MLP_DOWN),
    {"final_layernorm", TV_ROLE_FINAL_NORM, TV_PART_POST, false, false},
    {"lm_head", TV_ROLE_LM_HEAD, TV_PART_POST, false, true},
    {NULL, TV_ROLE_OTHER, TV_PART_PRE, false, false},
};

const struct tv_family tv_family_phi = {
    .name = "phi",
    .types = types,
    .prefixes = prefixes,
    .layers = "layers.",
    .rows = rows,
    .embed_is_hidden = true,
};
