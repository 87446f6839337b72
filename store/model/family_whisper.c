/* SPDX-License-Identifier: Apache-2.0 */
/*
 * family_whisper.c - names of Whisper: an encoder of sound, a decoder of text
 * whose embedding is the output projection.
 */
#include "family.h"

static const struct tv_family_type types[] = {
    {"whisper", "WhisperForConditionalGeneration", true},
    {NULL, NULL, false},
};

static const char *const encoder_prefixes[] = {"model.encoder.", "encoder.",
                                               NULL};
static const char *const decoder_prefixes[] = {"model.decoder.", "decoder.", "",
                                               NULL};
static const char *const encoder_keys[] = {"encoder_layers", NULL};
static const char *const decoder_keys[] = {"decoder_layers", NULL};

#define IN_LAYER(name, role)                                                   \
    {                                                                          \
        "layers.#." name, TV_ROLE_##role, TV_PART_LAYER, false, false          \
    }
#define STACK                                                                  \
    {"embed_positions", TV_ROLE_POSITION, TV_PART_PRE, false, false},          \
        IN_LAYER("self_attn.q_proj", ATTN_Q),                                  \
        IN_LAYER("self_attn.k_proj", ATTN_K),                                  \
        IN_LAYER("self_attn.v_proj", ATTN_V),                                  \
        IN_LAYER("self_attn.out_proj", ATTN_O),                                \
        IN_LAYER("self_attn_layer_norm", INPUT_NORM), IN_LAYER("fc1", MLP_UP), \
        IN_LAYER("fc2", MLP_DOWN),                                             \
        IN_LAYER("final_layer_norm", POST_ATTN_NORM),                          \
    {                                                                          \
        "layer_norm", TV_ROLE_FINAL_NORM, TV_PART_POST, false, false           \
    }

static const struct tv_family_row encoder_rows[] = {
    {"conv1", TV_ROLE_OTHER, TV_PART_PRE, false, false},
    {"conv2", TV_ROLE_OTHER, TV_PART_PRE, false, false},
    STACK,
    {NULL, TV_ROLE_OTHER, TV_PART_PRE, false, false},
};

static const struct tv_family_row decoder_rows[] = {
    {"embed_tokens", TV_ROLE_EMBED, TV_PART_PRE, false, false},
    STACK,
    IN_LAYER("encoder_attn.q_proj", ATTN_Q),
    IN_LAYER("encoder_attn.k_proj", ATTN_K),
    IN_LAYER("encoder_attn.v_proj", ATTN_V),
    IN_LAYER("encoder_attn.out_proj", ATTN_O),
    IN_LAYER("encoder_attn_layer_norm", OTHER_NORM),
    {"proj_out", TV_ROLE_LM_HEAD, TV_PART_POST, false, true},
    {NULL, TV_ROLE_OTHER, TV_PART_PRE, false, false},
};

static const struct tv_family_stack stacks[] = {
    {"encoder", encoder_keys, encoder_prefixes, "layers.", encoder_rows},
    {"decoder", decoder_keys, decoder_prefixes, "layers.", decoder_rows},
    {NULL, NULL, NULL, NULL, NULL},
};

const struct tv_family tv_family_whisper = {
    .name = "whisper",
    .types = types,
    .stacks = stacks,
    .embed_is_hidden = true,
};
