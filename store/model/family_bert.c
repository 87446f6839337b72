/* SPDX-License-Identifier: Apache-2.0 */
/*
 * family_bert.c - names of BERT, RoBERTa, XLM-RoBERTa and DistilBERT, with
 * their heads. A prediction head's biases count tokens as its weight does; the
 * weight is the embedding unless the config says otherwise.
 */
#include "family.h"

static const struct tv_family_type types[] = {
    {"bert", "BertForMaskedLM", true},
    {"roberta", "RobertaForMaskedLM", true},
    {"xlm-roberta", "XLMRobertaForMaskedLM", true},
    {"camembert", "CamembertForMaskedLM", true},
    {"distilbert", "DistilBertForMaskedLM", true},
    {NULL, NULL, false},
};

static const char *const prefixes[] = {"bert.", "roberta.", "distilbert.", "",
                                       NULL};

/* BERT and RoBERTa: "encoder.layer.", DistilBERT: "transformer.layer." */
#define IN_LAYER(name, role)                                                   \
    {                                                                          \
        "encoder.layer.#." name, TV_ROLE_##role, TV_PART_LAYER, false, false   \
    }
#define IN_DISTIL(name, role)                                                  \
    {                                                                          \
        "transformer.layer.#." name, TV_ROLE_##role, TV_PART_LAYER, false,     \
            false                                                              \
    }
#define HEAD(name, exact)                                                      \
    {                                                                          \
        name, TV_ROLE_LM_HEAD, TV_PART_POST, exact, true                       \
    }

static const struct tv_family_row rows[] = {
    {"embeddings.position_ids", TV_ROLE_BUFFER, TV_PART_PRE, true, true},
    {"embeddings.word_embeddings", TV_ROLE_EMBED, TV_PART_PRE, false, false},
    {"embeddings.position_embeddings", TV_ROLE_POSITION, TV_PART_PRE, false,
     false},
    {"embeddings.token_type_embeddings", TV_ROLE_OTHER, TV_PART_PRE, false,
     false},
    {"embeddings.LayerNorm", TV_ROLE_EMBED_NORM, TV_PART_PRE, false, false},
    IN_LAYER("attention.self.query", ATTN_Q),
    IN_LAYER("attention.self.key", ATTN_K),
    IN_LAYER("attention.self.value", ATTN_V),
    IN_LAYER("attention.output.dense", ATTN_O),
    IN_LAYER("attention.output.LayerNorm", POST_ATTN_NORM),
    IN_LAYER("intermediate.dense", MLP_UP),
    IN_LAYER("output.dense", MLP_DOWN),
    IN_LAYER("output.LayerNorm", OTHER_NORM),
    IN_DISTIL("attention.q_lin", ATTN_Q),
    IN_DISTIL("attention.k_lin", ATTN_K),
    IN_DISTIL("attention.v_lin", ATTN_V),
    IN_DISTIL("attention.out_lin", ATTN_O),
    IN_DISTIL("sa_layer_norm", POST_ATTN_NORM),
    IN_DISTIL("ffn.lin1", MLP_UP),
    IN_DISTIL("ffn.lin2", MLP_DOWN),
    IN_DISTIL("output_layer_norm", OTHER_NORM),
    {"pooler.dense", TV_ROLE_OTHER, TV_PART_POST, false, true},
    /* BERT */
    {"cls.predictions.transform.dense", TV_ROLE_OTHER, TV_PART_POST, false,
     false},
    {"cls.predictions.transform.LayerNorm", TV_ROLE_FINAL_NORM, TV_PART_POST,
     false, false},
    HEAD("cls.predictions.decoder", false),
    HEAD("cls.predictions.bias", true),
    /* RoBERTa */
    {"lm_head.dense", TV_ROLE_OTHER, TV_PART_POST, false, false},
    {"lm_head.layer_norm", TV_ROLE_FINAL_NORM, TV_PART_POST, false, false},
    HEAD("lm_head.decoder", false),
    HEAD("lm_head.bias", true),
    /* DistilBERT */
    {"vocab_transform", TV_ROLE_OTHER, TV_PART_POST, false, false},
    {"vocab_layer_norm", TV_ROLE_FINAL_NORM, TV_PART_POST, false, false},
    HEAD("vocab_projector", false),
    {NULL, TV_ROLE_OTHER, TV_PART_PRE, false, false},
};

const struct tv_family tv_family_bert = {
    .name = "bert",
    .types = types,
    .prefixes = prefixes,
    .layers = "encoder.layer.",
    .rows = rows,
};
