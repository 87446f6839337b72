/* SPDX-License-Identifier: Apache-2.0 */
/*
 * family_gpt_neox.c - names of GPT-NeoX and Pythia. Old checkpoints carry
 * causal masks (attention.bias) and rotary frequencies.
 */
#include "family.h"

static const struct tv_family_type types[] = {
    {"gpt_neox", "GPTNeoXForCausalLM", false},
    {NULL, NULL, false},
};

static const char *const prefixes[] = {"gpt_neox.", "", NULL};

#define IN_LAYER(name, role)                                                   \
    {                                                                          \
        "layers.#." name, TV_ROLE_##role, TV_PART_LAYER, false, false          \
    }
#define BUFFER(name)                                                           \
    {                                                                          \
        "layers.#.attention." name, TV_ROLE_BUFFER, TV_PART_LAYER, true, true  \
    }

static const struct tv_family_row rows[] = {
    {"embed_in", TV_ROLE_EMBED, TV_PART_PRE, false, false},
    {"rotary_emb.inv_freq", TV_ROLE_BUFFER, TV_PART_PRE, true, true},
    BUFFER("bias"),
    BUFFER("masked_bias"),
    BUFFER("rotary_emb.inv_freq"),
    IN_LAYER("input_layernorm", INPUT_NORM),
    IN_LAYER("attention.query_key_value", ATTN_QKV),
    IN_LAYER("attention.dense", ATTN_O),
    IN_LAYER("post_attention_layernorm", POST_ATTN_NORM),
    IN_LAYER("mlp.dense_h_to_4h", MLP_UP),
    IN_LAYER("mlp.dense_4h_to_h", MLP_DOWN),
    {"final_layer_norm", TV_ROLE_FINAL_NORM, TV_PART_POST, false, false},
    {"embed_out", TV_ROLE_LM_HEAD, TV_PART_POST, false, true},
    {"lm_head", TV_ROLE_LM_HEAD, TV_PART_POST, false,
     true}, /* transformers 5 */
    {NULL, TV_ROLE_OTHER, TV_PART_PRE, false, false},
};

const struct tv_family tv_family_gpt_neox = {
    .name = "gpt_neox",
    .types = types,
    .prefixes = prefixes,
    .layers = "layers.",
    .rows = rows,
    .bias_optional = true, /* attention_bias: false */
    .embed_is_hidden = true,
    .inner_factor = 4,
};
