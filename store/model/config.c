/* SPDX-License-Identifier: Apache-2.0 */
/*
 * config.c - config.json to numbers. One quantity has several spellings; they
 * are tried in order. A multimodal model keeps those of its language model in
 * "text_config", which goes before the top level. Both spellings of
 * transformers 4 ("torch_dtype") and 5 ("dtype") are read.
 *
 * Everything here is hostile until checked: numbers must be whole, in range,
 * and fit each other; else CORRUPT.
 */
#include <jansson.h>
#include <math.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/format.h"

#include "family.h"

static const char *const keys_layers[] = {"num_hidden_layers", "n_layer",
                                          "num_layers", "n_layers", NULL};
static const char *const keys_hidden[] = {"hidden_size", "n_embd", "n_embed",
                                          "d_model", NULL};
static const char *const keys_heads[] = {"num_attention_heads", "n_head",
                                         "n_heads", "num_heads", NULL};
static const char *const keys_kv[] = {"num_key_value_heads", "num_kv_heads",
                                      NULL};
static const char *const keys_head_dim[] = {"head_dim", NULL};
/* Of models whose heads are no equal shares of the hidden size. */
static const char *const keys_own_dim[] = {"qk_nope_head_dim",
                                           "qk_rope_head_dim",
                                           "v_head_dim",
                                           "attention_head_dim",
                                           "kv_channels",
                                           "d_kv",
                                           NULL};
static const char *const keys_inner[] = {"intermediate_size", "ffn_dim",
                                         "n_inner", "ffn_hidden_size", NULL};
static const char *const keys_vocab[] = {"vocab_size", "padded_vocab_size",
                                         NULL};
static const char *const keys_positions[] = {"max_position_embeddings",
                                             "n_positions",
                                             "seq_length",
                                             "n_ctx",
                                             "max_seq_len",
                                             NULL};
static const char *const keys_beyond[] = {"num_nextn_predict_layers", NULL};
static const char *const keys_embed[] = {"word_embed_proj_dim", NULL};

struct scopes {
    json_t *text, *top; /* text may be NULL */
};

static json_t *find(const struct scopes *s, const char *const *keys,
                    const char **key)
{
    for (int which = 0; which < 2; which++) {
        json_t *const o = which ? s->top : s->text;
        for (size_t i = 0; o && keys[i]; i++) {
            json_t *const v = json_object_get(o, keys[i]);
            if (v && !json_is_null(v)) {
                *key = keys[i];
                return v;
            }
        }
    }
    return NULL;
}

/* One value per layer (Gemma 3n, OpenELM): no number of the model. */
static bool is_list_of_numbers(const json_t *v)
{
    for (size_t i = 0; i < json_array_size(v); i++)
        if (!json_is_integer(json_array_get(v, i)))
            return false;
    return json_array_size(v) > 0;
}

static enum tv_err get_number(const struct scopes *s, const char *const *keys,
                              int64_t min, int64_t max, int64_t *out,
                              const char **key_out, struct tv_error *err)
{
    const char *key = NULL;
    json_t *const v = find(s, keys, &key);
    int64_t n = 0;

    *out = 0;
    if (!v || is_list_of_numbers(v))
        return TV_OK;
    if (json_is_integer(v)) {
        n = json_integer_value(v);
    } else if (json_is_real(v) && json_real_value(v) >= 0 &&
               json_real_value(v) <= (double)TV_DIM_MAX &&
               json_real_value(v) == floor(json_real_value(v))) {
        n = (int64_t)json_real_value(v);
    } else {
        return tv_error_set(err, TV_E_CORRUPT,
                            "config.json: \"%s\" is not a whole number", key);
    }
    if (n < min || n > max)
        return tv_error_set(err, TV_E_CORRUPT,
                            "config.json: \"%s\" is %lld, expected %lld to "
                            "%lld",
                            key, (long long)n, (long long)min, (long long)max);
    *out = n;
    if (key_out)
        *key_out = key;
    return TV_OK;
}

/* Owned copy of a string under key (top level first), "" when absent. */
static enum tv_err get_string(const struct scopes *s, const char *key,
                              char **out, struct tv_error *err)
{
    json_t *v = json_object_get(s->top, key);

    if (!json_is_string(v) && s->text)
        v = json_object_get(s->text, key);
    *out = tv_strdup(json_is_string(v) ? json_string_value(v) : "");
    if (!*out)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    return TV_OK;
}

static enum tv_err check_dims(const struct tv_config *c, const struct scopes *s,
                              struct tv_error *err)
{
    const char *own = NULL;

    if (c->n_heads && c->hidden && !c->head_dim && c->hidden % c->n_heads &&
        !find(s, keys_own_dim, &own))
        return tv_error_set(err, TV_E_CORRUPT,
                            "config.json: hidden size %lld is no multiple of "
                            "%lld attention heads",
                            (long long)c->hidden, (long long)c->n_heads);
    if (c->n_heads && c->n_kv_heads && c->n_heads % c->n_kv_heads)
        return tv_error_set(err, TV_E_CORRUPT,
                            "config.json: %lld attention heads cannot share "
                            "%lld key/value heads",
                            (long long)c->n_heads, (long long)c->n_kv_heads);
    return TV_OK;
}

enum tv_err tv_config_read(const char *data, size_t n, struct tv_config *out,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_config c = {.present = true};
    struct scopes s = {NULL, NULL};
    json_t *v = NULL;

    TV_TRY(tv_json_parse(data, n, "config.json", err, &s.top));
    s.text = json_object_get(s.top, "text_config");
    if (!json_is_object(s.text))
        s.text = NULL;

    TV_TRY(get_number(&s, keys_layers, 0, TV_LAYERS_MAX, &c.n_layers,
                      &c.layers_key, err));
    if (c.layers_key && s.text && json_object_get(s.text, c.layers_key)) {
        c.text_layers_key = c.layers_key;
        c.layers_key = NULL; /* nested: no top-level edit reaches it */
    }
    TV_TRY(
        get_number(&s, keys_beyond, 0, TV_LAYERS_MAX, &c.n_beyond, NULL, err));
    TV_TRY(get_number(&s, keys_hidden, 1, TV_DIM_MAX, &c.hidden, NULL, err));
    TV_TRY(get_number(&s, keys_heads, 1, TV_DIM_MAX, &c.n_heads, NULL, err));
    TV_TRY(get_number(&s, keys_kv, 1, TV_DIM_MAX, &c.n_kv_heads, NULL, err));
    TV_TRY(
        get_number(&s, keys_head_dim, 1, TV_DIM_MAX, &c.head_dim, NULL, err));
    TV_TRY(
        get_number(&s, keys_inner, 1, TV_DIM_MAX, &c.intermediate, NULL, err));
    TV_TRY(get_number(&s, keys_vocab, 1, TV_DIM_MAX, &c.vocab, NULL, err));
    TV_TRY(get_number(&s, keys_positions, 1, TV_DIM_MAX, &c.max_positions, NULL,
                      err));
    TV_TRY(get_number(&s, keys_embed, 1, TV_DIM_MAX, &c.embed_dim, NULL, err));
    TV_TRY(check_dims(&c, &s, err));

    TV_TRY(get_string(&s, "model_type", &c.model_type, err));
    c.has_parts = s.text != NULL ||
                  json_is_object(json_object_get(s.top, "vision_config")) ||
                  json_is_object(json_object_get(s.top, "audio_config"));
    v = s.text ? json_object_get(s.text, "model_type") : NULL;
    c.text_type = tv_strdup(json_is_string(v) ? json_string_value(v) : "");
    if (!c.text_type) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    v = json_object_get(s.top, "architectures");
    v = json_is_array(v) ? json_array_get(v, 0) : NULL;
    c.architecture = tv_strdup(json_is_string(v) ? json_string_value(v) : "");
    if (!c.architecture) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(get_string(&s, "dtype", &c.dtype, err));
    c.dtype_key_new = c.dtype[0] != '\0';
    if (!c.dtype_key_new) {
        tv_free(c.dtype);
        c.dtype = NULL;
        TV_TRY(get_string(&s, "torch_dtype", &c.dtype, err));
    }
    v = json_object_get(s.top, "tie_word_embeddings");
    if (!json_is_boolean(v) && s.text)
        v = json_object_get(s.text, "tie_word_embeddings");
    c.has_tied = json_is_boolean(v);
    c.tied = json_is_true(v);
    c.root = json_incref(s.top);
    *out = c;
    memset(&c, 0, sizeof(c));
out:
    tv_config_free(&c);
    json_decref(s.top);
    return rc;
}

int64_t tv_config_layers(const struct tv_config *c, const char *scope,
                         const char *const *keys, const char **key)
{
    const json_t *const o = scope ? json_object_get(c->root, scope) : c->root;

    for (; *keys; keys++) {
        const json_t *const v = json_object_get(o, *keys);
        if (!json_is_integer(v) || json_integer_value(v) < 0 ||
            json_integer_value(v) > TV_LAYERS_MAX)
            continue;
        if (key)
            *key = *keys;
        return json_integer_value(v);
    }
    return -1;
}

void tv_config_free(struct tv_config *c)
{
    json_decref(c->root);
    tv_free(c->text_type);
    tv_free(c->model_type);
    tv_free(c->architecture);
    tv_free(c->dtype);
    memset(c, 0, sizeof(*c));
}
