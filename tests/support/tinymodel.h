/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tinymodel.h - Llama-shaped model and adapter directories of a few kilobytes.
 *
 * Written by hand (not by store/format) so that readers are tested against
 * something else than our own writer. Values are multiples of 1/64 in [-1, 1]
 * that depend on seed, tensor name and index alone: exact in every dtype.
 */
#ifndef TINYMODEL_H
#define TINYMODEL_H

#include <stdbool.h>
#include <stdint.h>

#include "tv/dtype.h"

struct tiny_extra { /* one more tensor */
    const char *name;
    enum tv_dtype dtype;
    unsigned rank;
    uint64_t shape[4];
    const void *data; /* NULL: zeros */
};

struct tiny_model {
    const char *architecture; /* "LlamaForCausalLM" */
    const char *model_type;   /* "llama" */
    bool config;              /* write config.json */
    const char *config_more;  /* members to add: "\"a\": 1", or NULL */
    const char *dtype_key;    /* "torch_dtype"; NULL: no such key */
    bool tokenizer;           /* write tokenizer.json and its config */
    unsigned layers, hidden, inner, vocab;
    enum tv_dtype dtype; /* F16, BF16 or F32 */
    bool tied;           /* tie_word_embeddings and no lm_head */
    bool keep_head;      /* tied, but lm_head is stored all the same */
    uint64_t seed;
    const char *skip;   /* a tensor that is left out, or NULL */
    const char *narrow; /* a tensor with one row less, or NULL */
    const struct tiny_extra *extra;
    unsigned n_extra;
};

/* 2 layers, hidden 8, inner 12, vocab 16, BF16, untied, with config. */
void tiny_model_init(struct tiny_model *m);
/* Writes parent/name/; fails the test on errors. Returns the path, owned. */
char *tiny_model_write(const char *parent, const char *name,
                       const struct tiny_model *m);
/* Value of an element as written. */
double tiny_value(uint64_t seed, const char *tensor, uint64_t i);

/* A LoRA of rank r and alpha on q_proj and v_proj of a tiny model, F32. */
char *tiny_adapter_write(const char *parent, const char *name,
                         const struct tiny_model *base, unsigned r,
                         double alpha, uint64_t seed);

#endif
