/* SPDX-License-Identifier: Apache-2.0 */
/*
 * family_falcon.c - names of Falcon: norms before attention and MLP are one or
 * two, depending on the generation.
 */
#include "family.h"

static const struct tv_family_type types[] = {
    {"falcon", "FalconForCausalLM", true},
    {"RefinedWeb", "RWForCausalLM", true},
    {"RefinedWebModel", "RWForCausalLM", true},
    {NULL, NULL, false},
};

static const char *const prefixes[] = {"transformer.", "", NULL};

#define IN_LAYER(name, role)                                                   \
    {                                                                          \
        "h.#." name, TV_ROLE_##role, TV_PART_LAYER, false, false               \
    }

static const struct tv_family_row rows[] = {
    {"word_embeddings", TV_ROLE_EMBED, TV_PART_PRE, false, false},
    IN_LAYER("input_layernorm", INPUT_NORM),
    IN_LAYER("ln_attn", INPUT_NORM),
    IN_LAYER("ln_mlp", POST_ATTN_NORM),
    IN_LAYER("self_attention.query_key_value", ATTN_QKV),
    IN_LAYER("self_attention.dense", ATTN_O),
    IN_LAYER("post_attention_layernorm", POST_ATTN_NORM),
    IN_LAYER("mlp.dense_h_to_4h", MLP_UP),
    IN_LAYER("mlp.dense_4h_to_h", MLP_DOWN),
    {"ln_f", TV_ROLE_FINAL_NORM, TV_PART_POST, false, false},
    {"lm_head", TV_ROLE_LM_HEAD, TV_PART_POST, false, true},
    {NULL, TV_ROLE_OTHER, TV_PART_PRE, false, false},
};

const struct tv_family tv_family_falcon = {
    .name = "falcon",
    .types = types,
    .prefixes = prefixes,
    .layers = "h.",
    .rows = rows,
    .bias_optional = true, /* bias: false */
    .embed_is_hidden = true,
    .inner_factor = 4,
};
