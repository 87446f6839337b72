/* SPDX-License-Identifier: Apache-2.0 */
/*
 * family_t5.c - names of T5, mT5, UMT5 and Flan-T5: two stacks of blocks, an
 * embedding that both share. A block is two or three layers of its own: self
 * attention, in the decoder attention over the encoder, MLP.
 */
#include "family.h"

static const struct tv_family_type types[] = {
    {"t5", "T5ForConditionalGeneration", true},
    {"mt5", "MT5ForConditionalGeneration", false},
    {"umt5", "UMT5ForConditionalGeneration", false},
    {NULL, NULL, false},
};

static const char *const encoder_prefixes[] = {"encoder.", NULL};
static const char *const decoder_prefixes[] = {"decoder.", NULL};
static const char *const shared_prefixes[] = {"", NULL};
static const char *const encoder_keys[] = {"num_layers", NULL};
static const char *const decoder_keys[] = {"num_decoder_layers", "num_layers",
                                           NULL};
static const char *const no_keys[] = {NULL};

#define IN_LAYER(name, role)                                                   \
    {                                                                          \
        "block.#." name, TV_ROLE_##role, TV_PART_LAYER, false, false           \
    }
#define ATTENTION(layer, name)                                                 \
    IN_LAYER("layer." layer "." name ".q", ATTN_Q),                            \
        IN_LAYER("layer." layer "." name ".k", ATTN_K),                        \
        IN_LAYER("layer." layer "." name ".v", ATTN_V),                        \
        IN_LAYER("layer." layer "." name ".o", ATTN_O)
#define MLP(layer)                                                             \
    IN_LAYER("layer." layer ".DenseReluDense.wi", MLP_UP),                     \
        IN_LAYER("layer." layer ".DenseReluDense.wi_0", MLP_GATE),             \
        IN_LAYER("layer." layer ".DenseReluDense.wi_1", MLP_UP),               \
        IN_LAYER("layer." layer ".DenseReluDense.wo", MLP_DOWN),               \
        IN_LAYER("layer." layer ".layer_norm", POST_ATTN_NORM)
#define STACK                                                                  \
    {"embed_tokens", TV_ROLE_EMBED, TV_PART_PRE, false, true},                 \
        ATTENTION("0", "SelfAttention"),                                       \
        IN_LAYER("layer.0.SelfAttention.relative_attention_bias", POSITION),   \
        IN_LAYER("layer.0.layer_norm", INPUT_NORM),                            \
    {                                                                          \
        "final_layer_norm", TV_ROLE_FINAL_NORM, TV_PART_POST, false, false     \
    }

static const struct tv_family_row encoder_rows[] = {
    STACK,
    MLP("1"),
    {NULL, TV_ROLE_OTHER, TV_PART_PRE, false, false},
};

static const struct tv_family_row decoder_rows[] = {
    STACK,
    ATTENTION("1", "EncDecAttention"),
    IN_LAYER("layer.1.layer_norm", OTHER_NORM),
    MLP("2"),
    {NULL, TV_ROLE_OTHER, TV_PART_PRE, false, false},
};

static const struct tv_family_row shared_rows[] = {
    {"shared", TV_ROLE_EMBED, TV_PART_PRE, false, false},
    {"lm_head", TV_ROLE_LM_HEAD, TV_PART_POST, false, true},
    {NULL, TV_ROLE_OTHER, TV_PART_PRE, false, false},
};

static const struct tv_family_stack stacks[] = {
    {"encoder", encoder_keys, encoder_prefixes, "block.", encoder_rows},
    {"decoder", decoder_keys, decoder_prefixes, "block.", decoder_rows},
    {"shared", no_keys, shared_prefixes, "", shared_rows},
    {NULL, NULL, NULL, NULL, NULL},
};

const struct tv_family tv_family_t5 = {
    .name = "t5",
    .types = types,
    .stacks = stacks,
    .embed_is_hidden = true,
};
