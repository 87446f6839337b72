/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/model.h - what a checkpoint is: config.json and tensor names turned into
 * family, dimensions, and role and layer of every tensor. Tables, no
 * arithmetic. Families live in family_<name>.c; anything else is inferred from
 * the names, and nothing is ever dropped: a tensor that no table knows keeps
 * role OTHER and its place.
 *
 * Thread rule: immutable after tv_arch_describe.
 */
#ifndef TV_MODEL_H
#define TV_MODEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/dtype.h"
#include "tv/error.h"

enum tv_role {
    TV_ROLE_OTHER = 0,
    TV_ROLE_EMBED,      /* token embedding [vocab, hidden] */
    TV_ROLE_POSITION,   /* learned positions */
    TV_ROLE_EMBED_NORM, /* BLOOM: norm behind the embedding */
    TV_ROLE_LM_HEAD,    /* [vocab, hidden] */
    TV_ROLE_FINAL_NORM,
    TV_ROLE_INPUT_NORM,     /* before attention */
    TV_ROLE_POST_ATTN_NORM, /* before the MLP */
    TV_ROLE_OTHER_NORM,     /* q/k norms, Gemma's extra norms */
    TV_ROLE_ATTN_Q,
    TV_ROLE_ATTN_K,
    TV_ROLE_ATTN_V,
    TV_ROLE_ATTN_QKV, /* fused */
    TV_ROLE_ATTN_O,
    TV_ROLE_MLP_GATE,
    TV_ROLE_MLP_UP,
    TV_ROLE_MLP_GATE_UP, /* fused */
    TV_ROLE_MLP_DOWN,
    TV_ROLE_ROUTER,
    TV_ROLE_BUFFER, /* rotary caches, causal masks: not weights */
    TV_ROLE_COUNT
};
const char *tv_role_name(enum tv_role role); /* "embed", "attn_q", ... */

/* Where a tensor stands relative to the layers (mergekit's pre/post weights):
 * decides which slice's parameters it follows. */
enum tv_part { TV_PART_PRE = 0, TV_PART_LAYER = 1, TV_PART_POST = 2 };

struct tv_arch_tensor {
    const char *name; /* borrowed from the description */
    enum tv_role role;
    enum tv_part part;
    size_t module;              /* index into the modules */
    int64_t layer;              /* in its module, -1 outside layers */
    size_t layer_at, layer_len; /* where the layer number stands in name */
    int64_t beyond; /* of layers behind the last one that count as none
                     * (DeepSeek's for predicting further tokens): 0, 1, ...;
                     * else -1 */
    bool is_bias;
    int vocab_dim;       /* dimension that counts tokens, -1 when none */
    bool optional;       /* may be absent (tied lm_head, biases) */
    const char *tied_to; /* tensor that supplies it when absent, or NULL */
};

/* A part of a model that has layers of its own, or none: text decoder, vision
 * tower, encoder, decoder. Most models are one module without a name. */
struct tv_arch_module {
    char *name;             /* "", "text_decoder", "vision_tower", ... */
    const char *scope;      /* object in config.json, NULL: its top level */
    const char *layers_key; /* key there with the layer count, or NULL */
    int64_t n_layers;
    bool is_main; /* whose layers a recipe means that names no module */
};

struct tv_arch {        /* owned: tv_arch_free */
    char *family;       /* "llama", "gpt2", ..., "inferred" */
    char *architecture; /* class name of config.json, "" when none */
    char *model_type;
    bool inferred; /* no table knew it: names only */
    bool has_config;
    struct tv_arch_module *modules; /* at least one; the main one, or the
                                     * first of several equal ones, is [0] */
    size_t n_modules;
    int64_t n_layers; /* of modules[0], checked against the tensors */
    int64_t hidden, n_heads, n_kv_heads, head_dim, intermediate, vocab,
        max_positions;      /* 0 when unknown */
    bool tied;              /* tie_word_embeddings in effect */
    const char *head_name;  /* of a head of its own, whether stored or not */
    bool linear_transposed; /* GPT-2 Conv1D: weights stored [in, out] */
    const char *layers_key; /* config key with the layer count at the top
                             * level, or NULL */
    char *dtype;            /* config's dtype/torch_dtype, "" when none */
    bool dtype_key_new;     /* the key is "dtype" (transformers 5) */
    /* How the weights are quantised ("fp8", "gptq", ...), NULL: they are not.
     * Then its tensors are codes and scales, no numbers to merge. */
    char *quantized;
    size_t quantized_at; /* tensor that shows it, SIZE_MAX: only the config */
    /* config.json says that the weights are quantised, but all are ordinary
     * floats: it was left behind by whoever dequantised them. */
    bool quantized_before;
    struct tv_arch_tensor *tensors; /* in the order of names[] */
    size_t n_tensors;
    void *storage;
};

struct tv_arch_name { /* input of tv_arch_describe */
    const char *name;
    unsigned rank;
    const uint64_t *shape;
    enum tv_dtype dtype; /* TV_DTYPE_NONE: not known */
};

/* config may be NULL (a single file): then everything is inferred. CORRUPT for
 * a config that is no JSON object or has impossible numbers; INPUT when the
 * tensors contradict the config (layer index beyond the count, vocabulary of
 * the embedding below vocab_size). */
TV_NODISCARD enum tv_err tv_arch_describe(const char *config, size_t n_config,
                                          const struct tv_arch_name *names,
                                          size_t n_names, struct tv_error *err,
                                          struct tv_arch **out);
void tv_arch_free(struct tv_arch *a);
/* INPUT when the weights are quantised: nothing can be computed from its
 * tensors as they are. label names the model in the message. */
TV_NODISCARD enum tv_err tv_arch_check_plain(const struct tv_arch *a,
                                             const char *label,
                                             struct tv_error *err);
/* Name of the same tensor in another layer, owned; t->layer >= 0. */
char *tv_arch_rename(const struct tv_arch_tensor *t, int64_t layer);

/* ---- experts ----------------------------------------------------------------
 *
 * One model's experts are stored in several ways: a tensor for every expert, or
 * all experts of a layer packed into one, gate and up on top of each other.
 *
 *   one each   ...layers.3.mlp.experts.7.gate_proj.weight   [inner, hidden]
 *   packed     ...layers.3.mlp.experts.gate_up_proj  [experts, 2 inner, hidden]
 */
enum tv_expert_part {
    TV_EXPERT_NONE = 0,
    TV_EXPERT_ROUTER,
    TV_EXPERT_GATE, /* one each */
    TV_EXPERT_UP,
    TV_EXPERT_DOWN,
    TV_EXPERT_GATE_UP, /* packed */
    TV_EXPERT_DOWNS,   /* packed */
    TV_EXPERT_STATICS, /* ERNIE's correction of the router, in both */
    TV_EXPERT_PARTS
};
struct tv_expert_layout;
struct tv_expert {
    enum tv_expert_part part; /* NONE: no tensor of a mixture of experts */
    const struct tv_expert_layout *layout; /* NULL: a router of several ones */
    int64_t number;                        /* of the expert, -1 otherwise */
    size_t name_at; /* where the layout's own part of the name begins */
};
/* What a tensor of a layer is, from its name. */
struct tv_expert tv_expert_of(const struct tv_arch_tensor *t);
/* Does a model pack its experts as [experts, in, out] (Llama 4; gpt-oss, its
 * gate and up in turns)? Their rows are no rows of one expert's matrices. */
bool tv_expert_in_first(const struct tv_arch *a);
bool tv_expert_packed(const struct tv_expert_layout *layout);
/* Name of a part in a layout, owned, in the layer of t; number is for those
 * that are one each. NULL: out of memory, or the layout has no such part. */
char *tv_expert_name(const struct tv_arch_tensor *t,
                     const struct tv_expert_layout *layout,
                     enum tv_expert_part part, int64_t number);

/* Names of the families with a table, for --help and messages. */
size_t tv_arch_families(const char *const **names);
#endif
