/* SPDX-License-Identifier: Apache-2.0 */
/*
 * family.h - what a family table is made of, and the seams between the files
 * of this folder.
 *
 * A family lists the modules of its models, relative to a name prefix. In a
 * module name '#' stands for the layer number and '*' for any other number
 * (experts). A tensor matches a module when it is MODULE.weight or MODULE.bias;
 * rows marked `exact` give the whole tensor name (buffers, fused parameters
 * without a suffix). Where several rows match, the first one counts.
 */
#ifndef TV_FAMILY_H
#define TV_FAMILY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/model.h"

#define TV_LAYERS_MAX 100000             /* layers of a model */
#define TV_DIM_MAX    (INT64_C(1) << 40) /* any other number of a config */

struct tv_family_row {
    const char *name;
    enum tv_role role;
    enum tv_part part;
    bool exact;
    bool optional; /* biases of optional modules and buffers */
};

struct tv_family_type {
    const char *model_type;
    const char *architecture; /* class of the causal language model, "": only
                               * within another model */
    bool tied;                /* default of tie_word_embeddings */
};

/* One of several modules of a family, each with layers of its own. */
struct tv_family_stack {
    const char *module;
    const char *const *layers_keys; /* in config.json; the first one found */
    const char *const *prefixes;    /* as of a family */
    const char *layers;
    const struct tv_family_row *rows;
};

struct tv_family {
    const char *name;
    const struct tv_family_type *types; /* ends with a NULL model_type */
    const char *const *prefixes;        /* longest first, "" last, then NULL */
    const char *layers;                 /* "layers." in front of the number */
    const struct tv_family_row *rows;   /* ends with a NULL name */
    /* Several stacks in place of prefixes, layers and rows; ends with a NULL
     * module. Its last one takes what no prefix matches. */
    const struct tv_family_stack *stacks;
    bool linear_transposed;
    bool bias_optional;   /* linear layers may come with and without bias */
    bool embed_is_hidden; /* embedding rows are `hidden` wide */
    int64_t inner_factor; /* intermediate / hidden when not configured, or 0 */
};

extern const struct tv_family tv_family_llama;
extern const struct tv_family tv_family_gpt2;
extern const struct tv_family tv_family_gpt_neox;
extern const struct tv_family tv_family_bloom;
extern const struct tv_family tv_family_opt;
extern const struct tv_family tv_family_gpt_bigcode;
extern const struct tv_family tv_family_falcon;
extern const struct tv_family tv_family_phi;
extern const struct tv_family tv_family_mamba;
extern const struct tv_family tv_family_bert;
extern const struct tv_family tv_family_t5;
extern const struct tv_family tv_family_whisper;

/* By model_type, else by architecture class; NULL when no table knows it.
 * *type is its row of `types`. */
const struct tv_family *tv_family_find(const char *model_type,
                                       const char *architecture,
                                       const struct tv_family_type **type);

/* What config.json says; numbers are 0 when absent. Owned strings. */
struct tv_config {
    bool present;
    char *model_type, *architecture, *dtype; /* "" when absent */
    bool dtype_key_new;
    const char *layers_key; /* top-level key that holds the layer count */
    int64_t n_layers, hidden, n_heads, n_kv_heads, head_dim, intermediate,
        vocab, max_positions, embed_dim;
    int64_t n_beyond; /* layers behind the last one that count as none */
    bool has_tied, tied;
    bool has_parts;  /* a model of several modalities, whose language model has
                      * its numbers in "text_config" or, first, at the top */
    char *text_type; /* its model_type, "" when absent */
    const char *text_layers_key; /* in it, or NULL */
    struct json_t *root;
};
TV_NODISCARD enum tv_err tv_config_read(const char *data, size_t n,
                                        struct tv_config *out,
                                        struct tv_error *err);
void tv_config_free(struct tv_config *c);
/* A whole number from 0 to TV_LAYERS_MAX under one of the keys of the object
 * `scope` (NULL: top level), -1 when there is none; *key, if not NULL, is the
 * one that has it. */
int64_t tv_config_layers(const struct tv_config *c, const char *scope,
                         const char *const *keys, const char **key);

/* Fills role, part, layer... of every tensor from its name alone, and
 * *n_layers with the largest layer index + 1 (0: no layers found). */
TV_NODISCARD enum tv_err tv_infer(struct tv_arch_tensor *tensors,
                                  const struct tv_arch_name *names, size_t n,
                                  int64_t vocab, int64_t *n_layers,
                                  struct tv_error *err);

/* What a model of a type calls its head when it has one of its own. */
const char *tv_head_name(const char *model_type);

/* How a checkpoint's weights are quantised, by config.json or the names; NULL:
 * they are not. Borrowed from the config, or constant. *at is the first tensor
 * that shows it, SIZE_MAX when none does. *before: config.json alone says so,
 * under a top-level key, and every tensor is of floats. */
const char *tv_quantized_by(const struct tv_config *c,
                            const struct tv_arch_name *names, size_t n,
                            size_t *at, bool *before);

/* The part of a model of several modalities that a tensor is in: NULL for its
 * language model, else the component's name, *n_name long. */
const char *tv_modality_of(const char *name, size_t *n_name);

/* A run of digits at s that fits a layer index; its length, 0 when none. */
size_t tv_layer_number(const char *s, int64_t *value);
#endif
