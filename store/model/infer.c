/* SPDX-License-Identifier: Apache-2.0 */
/*
 * infer.c - layer, role and part of tensors of an unknown family, from names.
 *
 * Layers: of each name, every ".N." (or a leading "N.") is a candidate; its key
 * is the text in front of N. The key that most tensors have in common holds the
 * layers; between equal keys the shorter, then the first in byte order wins (so
 * "layers." beats "layers.0.experts."). Tensors without that key stand outside
 * the layers.
 *
 * Roles: by substrings of the module name, the most telling ones first. What
 * nothing matches has role OTHER.
 *
 * Parts outside the layers: embeddings, positions and their norm, and whatever
 * else has "embed" in its name, are PRE; everything else is POST. (Merging then
 * gives final norms and heads the last slice's parameters, unknown tensors
 * too.)
 */
#include <ctype.h>
#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"

#include "family.h"

size_t tv_layer_number(const char *s, int64_t *value)
{
    int64_t v = 0;
    size_t n = 0;

    while (isdigit((unsigned char)s[n])) {
        if (n >= 9)
            return 0;
        v = v * 10 + (s[n] - '0');
        n++;
    }
    *value = v;
    return n;
}

struct key { /* text in front of a candidate number */
    const char *name;
    size_t n;
};

static int key_compare(const void *pa, const void *pb)
{
    const struct key *const a = pa, *const b = pb;

    if (a->n != b->n)
        return a->n < b->n ? -1 : 1;
    return memcmp(a->name, b->name, a->n);
}

/* Start of the next candidate number at or after `at`; false when none. */
static bool next_number(const char *name, size_t at, size_t *start,
                        size_t *n_digits)
{
    for (size_t i = at; name[i]; i++) {
        int64_t v = 0;
        if (i > 0 && name[i - 1] != '.')
            continue;
        const size_t n = tv_layer_number(name + i, &v);
        if (n > 0 && name[i + n] == '.') {
            *start = i;
            *n_digits = n;
            return true;
        }
    }
    return false;
}

static enum tv_err find_layers(const struct tv_arch_name *names, size_t n,
                               struct key *best, size_t *n_best,
                               struct tv_error *err)
{
    struct key *keys = NULL;
    size_t n_keys = 0, start = 0, digits = 0;

    *n_best = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t at = 0; next_number(names[i].name, at, &start, &digits);
             at = start + digits)
            n_keys++;
    if (n_keys == 0)
        return TV_OK;
    keys = tv_calloc(n_keys, sizeof(*keys));
    if (!keys)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    n_keys = 0;
    for (size_t i = 0; i < n; i++)
        for (size_t at = 0; next_number(names[i].name, at, &start, &digits);
             at = start + digits)
            keys[n_keys++] = (struct key){names[i].name, start};
    qsort(keys, n_keys, sizeof(*keys), key_compare);
    for (size_t i = 0, j = 0; i < n_keys; i = j) {
        while (j < n_keys && key_compare(&keys[i], &keys[j]) == 0)
            j++;
        if (j - i > *n_best) {
            *n_best = j - i;
            *best = keys[i];
        }
    }
    tv_free(keys);
    return TV_OK;
}

struct hint {
    const char *part; /* substring of the lower-case module name */
    enum tv_role role;
};

/* Anywhere in a model: not weights. */
static const struct hint hints_buffer[] = {
    {"inv_freq", TV_ROLE_BUFFER},       {"masked_bias", TV_ROLE_BUFFER},
    {"causal_mask", TV_ROLE_BUFFER},    {"rotary_emb.cos", TV_ROLE_BUFFER},
    {"rotary_emb.sin", TV_ROLE_BUFFER}, {NULL, TV_ROLE_OTHER},
};

static const struct hint hints_layer[] = {
    {"q_norm", TV_ROLE_OTHER_NORM},
    {"k_norm", TV_ROLE_OTHER_NORM},
    {"q_ln", TV_ROLE_OTHER_NORM},
    {"k_ln", TV_ROLE_OTHER_NORM},
    {"q_layernorm", TV_ROLE_OTHER_NORM},
    {"k_layernorm", TV_ROLE_OTHER_NORM},
    {"input_layernorm", TV_ROLE_INPUT_NORM},
    {"input_norm", TV_ROLE_INPUT_NORM},
    {"attention_norm", TV_ROLE_INPUT_NORM},
    {"attn_norm", TV_ROLE_INPUT_NORM},
    {"self_attn_layer_norm", TV_ROLE_INPUT_NORM},
    {"ln_1", TV_ROLE_INPUT_NORM},
    {"norm1", TV_ROLE_INPUT_NORM},
    {"norm_1", TV_ROLE_INPUT_NORM},
    {"post_attention", TV_ROLE_POST_ATTN_NORM},
    {"ffn_norm", TV_ROLE_POST_ATTN_NORM},
    {"mlp_norm", TV_ROLE_POST_ATTN_NORM},
    {"ln_2", TV_ROLE_POST_ATTN_NORM},
    {"norm2", TV_ROLE_POST_ATTN_NORM},
    {"norm_2", TV_ROLE_POST_ATTN_NORM},
    {"norm", TV_ROLE_OTHER_NORM},
    {"ln_", TV_ROLE_OTHER_NORM},
    {"query_key_value", TV_ROLE_ATTN_QKV},
    {"qkv", TV_ROLE_ATTN_QKV},
    {"c_attn", TV_ROLE_ATTN_QKV},
    {"q_proj", TV_ROLE_ATTN_Q},
    {"k_proj", TV_ROLE_ATTN_K},
    {"v_proj", TV_ROLE_ATTN_V},
    {"attention.wq", TV_ROLE_ATTN_Q},
    {"attention.wk", TV_ROLE_ATTN_K},
    {"attention.wv", TV_ROLE_ATTN_V},
    {"attention.wo", TV_ROLE_ATTN_O},
    {"o_proj", TV_ROLE_ATTN_O},
    {"out_proj", TV_ROLE_ATTN_O},
    {"attn.c_proj", TV_ROLE_ATTN_O},
    {"attention.dense", TV_ROLE_ATTN_O},
    {"attn.dense", TV_ROLE_ATTN_O},
    {"router", TV_ROLE_ROUTER},
    {"moe.gate", TV_ROLE_ROUTER},
    {"gate_up", TV_ROLE_MLP_GATE_UP},
    {"gate_proj", TV_ROLE_MLP_GATE},
    {"up_proj", TV_ROLE_MLP_UP},
    {"down_proj", TV_ROLE_MLP_DOWN},
    {"dense_h_to_4h", TV_ROLE_MLP_UP},
    {"dense_4h_to_h", TV_ROLE_MLP_DOWN},
    {"c_fc", TV_ROLE_MLP_UP},
    {"mlp.c_proj", TV_ROLE_MLP_DOWN},
    {"fc1", TV_ROLE_MLP_UP},
    {"fc_in", TV_ROLE_MLP_UP},
    {"fc2", TV_ROLE_MLP_DOWN},
    {"fc_out", TV_ROLE_MLP_DOWN},
    {".w1", TV_ROLE_MLP_GATE},
    {".w2", TV_ROLE_MLP_DOWN},
    {".w3", TV_ROLE_MLP_UP},
    {NULL, TV_ROLE_OTHER},
};

static const struct hint hints_outside[] = {
    {"lm_head", TV_ROLE_LM_HEAD},
    {"embed_out", TV_ROLE_LM_HEAD},
    {"unembed", TV_ROLE_LM_HEAD},
    {"output_layer", TV_ROLE_LM_HEAD}, /* ChatGLM */
    {"position", TV_ROLE_POSITION},
    {"pos_emb", TV_ROLE_POSITION},
    {"wpe", TV_ROLE_POSITION},
    {"emb_norm", TV_ROLE_EMBED_NORM},
    {"emb_ln", TV_ROLE_EMBED_NORM},
    {"embeddings_layernorm", TV_ROLE_EMBED_NORM},
    {"embedding_norm", TV_ROLE_EMBED_NORM},
    {"norm", TV_ROLE_FINAL_NORM},
    {"ln_f", TV_ROLE_FINAL_NORM},
    {"embed", TV_ROLE_EMBED},
    {"wte", TV_ROLE_EMBED},
    {"tok_emb", TV_ROLE_EMBED},
    {"token_emb", TV_ROLE_EMBED},
    {"word_emb", TV_ROLE_EMBED},
    {NULL, TV_ROLE_OTHER},
};

static enum tv_role match(const struct hint *hints, const char *lower)
{
    for (; hints->part; hints++)
        if (strstr(lower, hints->part))
            return hints->role;
    return TV_ROLE_OTHER;
}

static bool ends_with(const char *s, const char *end)
{
    const size_t n = strlen(s), m = strlen(end);

    return n >= m && !strcmp(s + n - m, end);
}

/* A causal mask is called a bias, but has the dimensions of one. */
static bool is_mask(const char *lower, unsigned rank)
{
    return rank >= 3 && (ends_with(lower, "attn.bias") ||
                         ends_with(lower, "attention.bias"));
}

/* Heads whose names say too little to be looked for within others. */
static bool is_head(const char *lower)
{
    static const char *const heads[] = {"output", "head", "output_projection",
                                        "decoder", "lm_loss"};

    for (size_t i = 0; i < sizeof(heads) / sizeof(heads[0]); i++) {
        const size_t n = strlen(heads[i]);
        if (!strncmp(lower, heads[i], n) &&
            (!strcmp(lower + n, ".weight") || !strcmp(lower + n, ".bias")))
            return true;
    }
    return false;
}

const char *tv_head_name(const char *model_type)
{
    static const char *const others[][2] = {
        {"biogpt", "output_projection.weight"},
        {"modernbert-decoder", "decoder.weight"},
        {"rwkv", "head.weight"},
        {"gpt_neox_japanese", "embed_out.weight"},
        {"xlnet", "lm_loss.weight"},
    };

    for (size_t i = 0; i < sizeof(others) / sizeof(others[0]); i++)
        if (!strcmp(model_type, others[i][0]))
            return others[i][1];
    return "lm_head.weight";
}

static enum tv_err infer_role(struct tv_arch_tensor *t, unsigned rank,
                              struct tv_error *err)
{
    char *const lower = tv_strdup(t->name);

    if (!lower)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (char *p = lower; *p; p++)
        *p = (char)tolower((unsigned char)*p);
    t->is_bias = ends_with(lower, ".bias");
    t->role =
        is_mask(lower, rank) ? TV_ROLE_BUFFER : match(hints_buffer, lower);
    t->is_bias = t->is_bias && t->role != TV_ROLE_BUFFER;
    if (t->role == TV_ROLE_OTHER) {
        if (t->layer >= 0) {
            t->role = match(hints_layer, lower + t->layer_at);
            if (t->role == TV_ROLE_OTHER && ends_with(lower, "mlp.gate.weight"))
                t->role = TV_ROLE_ROUTER;
        } else {
            t->role = match(hints_outside, lower);
            if (t->role == TV_ROLE_OTHER && is_head(lower))
                t->role = TV_ROLE_LM_HEAD;
        }
    }
    /* A token table has rows: "embed_scale" and the like are not one. */
    if (t->role == TV_ROLE_EMBED && rank != 2)
        t->role = TV_ROLE_OTHER;
    if (t->layer >= 0)
        t->part = TV_PART_LAYER;
    else if (t->role == TV_ROLE_EMBED || t->role == TV_ROLE_POSITION ||
             t->role == TV_ROLE_EMBED_NORM || t->role == TV_ROLE_BUFFER ||
             (t->role == TV_ROLE_OTHER && strstr(lower, "embed")))
        t->part = TV_PART_PRE;
    else
        t->part = TV_PART_POST;
    tv_free(lower);
    return TV_OK;
}

const char *tv_modality_of(const char *name, size_t *n_name)
{
    /* What components of such models are called; the text decoder's names
     * begin otherwise. */
    static const char *const parts[] = {
        "vision",  "visual",  "image",     "img",       "audio",
        "sound",   "speech",  "video",     "projector", "connector",
        "adapter", "qformer", "perceiver", "merger"};
    size_t n = 0;

    if (!strncmp(name, "model.", 6))
        name += 6;
    n = strcspn(name, ".");
    for (size_t i = 0; i < sizeof(parts) / sizeof(parts[0]); i++) {
        const char *const at = strstr(name, parts[i]);
        if (at && at < name + n) {
            *n_name = n;
            return name;
        }
    }
    return NULL;
}

enum tv_err tv_infer(struct tv_arch_tensor *tensors,
                     const struct tv_arch_name *names, size_t n, int64_t vocab,
                     int64_t *n_layers, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct key layers = {NULL, 0};
    size_t n_in_layers = 0;
    uint64_t rows = vocab > 0 ? (uint64_t)vocab : 0;

    *n_layers = 0;
    TV_TRY(find_layers(names, n, &layers, &n_in_layers, err));
    for (size_t i = 0; i < n; i++) {
        struct tv_arch_tensor *const t = &tensors[i];
        size_t digits = 0;
        int64_t layer = 0;

        if (n_in_layers > 0 && !strncmp(t->name, layers.name, layers.n))
            digits = tv_layer_number(t->name + layers.n, &layer);
        if (digits > 0 && t->name[layers.n + digits] == '.' &&
            layer < TV_LAYERS_MAX) {
            t->layer = layer;
            t->layer_at = layers.n;
            t->layer_len = digits;
            if (layer >= *n_layers)
                *n_layers = layer + 1;
        }
        TV_TRY(infer_role(t, names[i].rank, err));
        if (!vocab && t->role == TV_ROLE_EMBED && names[i].shape[0] > rows)
            rows = names[i].shape[0];
    }
    for (size_t i = 0; i < n; i++) {
        struct tv_arch_tensor *const t = &tensors[i];

        if (t->role != TV_ROLE_EMBED && t->role != TV_ROLE_LM_HEAD)
            continue;
        /* Smaller tables (token types, ...) do not count tokens, nor do other
         * layers of a head (RoBERTa's lm_head.dense). */
        if (names[i].rank == (t->is_bias ? 1 : 2) && names[i].shape[0] >= rows)
            t->vocab_dim = 0;
        else
            t->role = TV_ROLE_OTHER;
    }
out:
    return rc;
}
