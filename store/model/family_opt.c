/* SPDX-License-Identifier: Apache-2.0 */
/*
 * family_opt.c - names of OPT. Its 350M model embeds in a narrower space and
 * projects in and out of the hidden size (word_embed_proj_dim).
 */
#include "family.h"

static const struct tv_family_type types[] = {
    {"opt", "OPTForCausalLM", true},
    {NULL, NULL, false},
};

static const char *const prefixes[] = {"model.decoder.", "decoder.", "", NULL};

#define IN_LAYER(name, role)                                                   \
    {                                                                          \
        "layers.#." name, TV_ROLE_##role, TV_PART_LAYER, false, false          \
    }

static const struct tv_family_row rows[] = {
    {"embed_tokens", TV_ROLE_EMBED, TV_PART_PRE, false, false},
    {"embed_positions", TV_ROLE_POSITION, TV_PART_PRE, false, false},
    {"project_in", TV_ROLE_OTHER, TV_PART_PRE, false, false},
    IN_LAYER("self_attn_layer_norm", INPUT_NORM),
    IN_LAYER("self_attn.q_proj", ATTN_Q),
    IN_LAYER("self_attn.k_proj", ATTN_K),
    IN_LAYER("self_attn.v_proj", ATTN_V),
    IN_LAYER("self_attn.out_proj", ATTN_O),
    IN_LAYER("final_layer_norm", POST_ATTN_NORM),
    IN_LAYER("fc1", MLP_UP),
    IN_LAYER("fc2", MLP_DOWN),
    {"final_layer_norm", TV_ROLE_FINAL_NORM, TV_PART_POST, false, false},
    {"project_out", TV_ROLE_OTHER, TV_PART_POST, false, false},
    {"lm_head", TV_ROLE_LM_HEAD, TV_PART_POST, false, true},
    {NULL, TV_ROLE_OTHER, TV_PART_PRE, false, false},
};

const struct tv_family tv_family_opt = {
    .name = "opt",
    .types = types,
    .prefixes = prefixes,
    .layers = "layers.",
    .rows = rows,
    .bias_optional = true, /* enable_bias: false */
    .inner_factor = 4,
};
