/* SPDX-License-Identifier: Apache-2.0 */
/*
 * family_gpt2.c - names of GPT-2 and GPT-BigCode. Linear layers of the first
 * are Conv1D modules, whose weights are stored [in, out]. The original
 * checkpoints lack the "transformer." prefix and carry causal masks as
 * attn.bias.
 */
#include "family.h"

static const struct tv_family_type types[] = {
    {"gpt2", "GPT2LMHeadModel", true},
    {NULL, NULL, false},
};

static const struct tv_family_type types_bigcode[] = {
    {"gpt_bigcode", "GPTBigCodeForCausalLM", true},
    {NULL, NULL, false},
};

static const char *const prefixes[] = {"transformer.", "", NULL};

#define IN_LAYER(name, role)                                                   \
    {                                                                          \
        "h.#." name, TV_ROLE_##role, TV_PART_LAYER, false, false               \
    }

static const struct tv_family_row rows[] = {
    {"wte", TV_ROLE_EMBED, TV_PART_PRE, false, false},
    {"wpe", TV_ROLE_POSITION, TV_PART_PRE, false, false},
    /* before the modules: "attn.bias" is a mask, not a bias */
    {"h.#.attn.bias", TV_ROLE_BUFFER, TV_PART_LAYER, true, true},
    {"h.#.attn.masked_bias", TV_ROLE_BUFFER, TV_PART_LAYER, true, true},
    IN_LAYER("ln_1", INPUT_NORM),
    IN_LAYER("attn.c_attn", ATTN_QKV),
    IN_LAYER("attn.c_proj", ATTN_O),
    IN_LAYER("ln_2", POST_ATTN_NORM),
    IN_LAYER("mlp.c_fc", MLP_UP),
    IN_LAYER("mlp.c_proj", MLP_DOWN),
    {"ln_f", TV_ROLE_FINAL_NORM, TV_PART_POST, false, false},
    {"lm_head", TV_ROLE_LM_HEAD, TV_PART_POST, false, true},
    {NULL, TV_ROLE_OTHER, TV_PART_PRE, false, false},
};

const struct tv_family tv_family_gpt2 = {
    .name = "gpt2",
    .types = types,
    .prefixes = prefixes,
    .layers = "h.",
    .rows = rows,
    .linear_transposed = true,
    .embed_is_hidden = true,
    .inner_factor = 4,
};

const struct tv_family tv_family_gpt_bigcode = {
    .name = "gpt_bigcode",
    .types = types_bigcode,
    .prefixes = prefixes,
    .layers = "h.",
    .rows = rows,
    .embed_is_hidden = true,
    .inner_factor = 4,
};
