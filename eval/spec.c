/* SPDX-License-Identifier: Apache-2.0 */
/*
 * spec.c - config.json to the numbers of the forward pass. One function per
 * family says what its architecture fixes; the rest are keys. Absent keys take
 * the defaults of transformers' configuration classes.
 */
#include <math.h>
#include <string.h>

#include "tv/alloc.h"

#include "decoder.h"

struct loader {
    const json_t *top, *text; /* text: where the language model's keys are */
    const struct tv_arch *arch;
    struct tve_spec *s;
    struct tv_error *err;
};

static double number(const struct loader *l, const char *key, double otherwise)
{
    const json_t *const v = json_object_get(l->text, key);

    return json_is_number(v) ? json_number_value(v) : otherwise;
}

/* A count; what is none becomes one that no tensor has. */
static size_t whole(const struct loader *l, const char *key, double otherwise)
{
    const double most = 1099511627776.0; /* 2^40 */
    const double v = number(l, key, otherwise);

    return v >= 0 && v <= most ? (size_t)v : (size_t)most;
}

/* What norms add to a variance: a number that is not negative. */
static enum tv_err epsilon(const struct loader *l, const char *key,
                           double otherwise)
{
    const json_t *const v = json_object_get(l->text, key);
    const double eps = number(l, key, otherwise);

    if ((v && !json_is_null(v) && !json_is_number(v)) || !(eps >= 0) ||
        !(eps <= 1))
        return tv_error_set(l->err, TV_E_CORRUPT,
                            "config.json: \"%s\" is no number from 0 to 1",
                            key);
    l->s->eps = (float)eps;
    return TV_OK;
}

static bool boolean(const struct loader *l, const char *key, bool otherwise)
{
    const json_t *const v = json_object_get(l->text, key);

    return json_is_boolean(v) ? json_is_true(v) : otherwise;
}

static enum tv_err act(const struct loader *l, const char *const *keys,
                       enum tve_act otherwise)
{
    static const struct {
        const char *name;
        enum tve_act act;
    } known[] = {
        {"silu", TVE_SILU},
        {"swish", TVE_SILU},
        {"gelu", TVE_GELU},
        {"gelu_python", TVE_GELU},
        {"gelu_new", TVE_GELU_TANH},
        {"gelu_fast", TVE_GELU_TANH},
        {"gelu_pytorch_tanh", TVE_GELU_TANH},
        {"gelu_python_tanh", TVE_GELU_TANH},
        {"relu", TVE_RELU},
        {"quick_gelu", TVE_QUICK_GELU},
    };
    const char *name = NULL;

    l->s->act = otherwise;
    for (; *keys && !name; keys++)
        name = json_string_value(json_object_get(l->text, *keys));
    if (!name)
        return TV_OK;
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        if (!strcmp(name, known[i].name)) {
            l->s->act = known[i].act;
            return TV_OK;
        }
    }
    return tv_error_set(l->err, TV_E_UNSUPPORTED,
                        "config.json: activation \"%.60s\" is not supported",
                        name);
}

static const char *const hidden_act[] = {"hidden_act", NULL};

/* Sliding windows: layer_types where given, else every layer or a pattern:
 * `period` 0: all; k: all but every k-th. */
static void windows(const struct loader *l, size_t window, size_t first,
                    size_t period)
{
    const json_t *const types = json_object_get(l->text, "layer_types");

    for (size_t i = 0; window > 0 && i < l->s->n_layers; i++) {
        const char *const type = json_string_value(json_array_get(types, i));
        bool sliding = i >= first && (!period || (i + 1) % period != 0);

        if (type)
            sliding = !strcmp(type, "sliding_attention");
        if (sliding)
            l->s->layers[i].window = window;
    }
}

static void attn_scale(const struct loader *l, double scale)
{
    for (size_t i = 0; i < l->s->n_layers; i++)
        l->s->layers[i].attn_scale = (float)scale;
}

static enum tv_err rope(const struct loader *l)
{
    l->s->positions = TVE_ROPE;
    return tve_rope_load(l->text, false, l->s->head_dim,
                         (double)l->s->max_positions, &l->s->rope[0], l->err);
}

static enum tv_err spec_llama(const struct loader *l)
{
    enum tv_err rc = TV_OK;
    struct tve_spec *const s = l->s;
    const char *const type = l->arch->model_type;
    const size_t window = whole(l, "sliding_window", 0);

    s->norm = TVE_RMS;
    TV_TRY(epsilon(l, "rms_norm_eps", 1e-6));
    s->gated = true;
    s->residual = TVE_PRE_NORM;
    s->qk_norm = !strcmp(type, "qwen3");
    TV_TRY(act(l, hidden_act, TVE_SILU));
    TV_TRY(rope(l));
    if (window > 0 && !strncmp(type, "qwen", 4)) {
        if (boolean(l, "use_sliding_window", false))
            windows(l, window, whole(l, "max_window_layers", 0), 0);
    } else if (window > 0 && strcmp(type, "llama") != 0) {
        windows(l, window, 0, 0);
    }
out:
    return rc;
}

static enum tv_err spec_gemma(const struct loader *l)
{
    static const char *const acts[] = {"hidden_activation", "hidden_act", NULL};
    enum tv_err rc = TV_OK;
    struct tve_spec *const s = l->s;
    const bool is2 = !strcmp(l->arch->model_type, "gemma2");
    const bool is3 = !strncmp(l->arch->model_type, "gemma3", 6);
    const size_t window = whole(l, "sliding_window", 4096);

    s->norm = TVE_RMS_PLUS_ONE;
    TV_TRY(epsilon(l, "rms_norm_eps", 1e-6));
    s->gated = true;
    s->residual = is2 || is3 ? TVE_SANDWICH : TVE_PRE_NORM;
    s->embed_scale = (float)sqrt((double)s->hidden);
    s->qk_norm = is3;
    TV_TRY(act(l, acts, TVE_GELU_TANH));
    TV_TRY(rope(l));
    if (is2 || is3) {
        const double scalar = number(l, "query_pre_attn_scalar", 256);

        if (!(scalar > 0)) {
            rc = tv_error_set(l->err, TV_E_CORRUPT,
                              "config.json: query_pre_attn_scalar is not "
                              "positive");
            goto out;
        }
        attn_scale(l, 1.0 / sqrt(scalar));
        s->attn_cap = (float)number(l, "attn_logit_softcapping", 0);
        s->logit_cap = (float)number(l, "final_logit_softcapping", 0);
        windows(l, window, 0, is2 ? 2 : whole(l, "sliding_window_pattern", 6));
    }
    if (is3) {
        TV_TRY(tve_rope_load(l->text, true, s->head_dim,
                             (double)s->max_positions, &s->rope[1], l->err));
        for (size_t i = 0; i < s->n_layers; i++)
            s->layers[i].rope = s->layers[i].window > 0;
    }
out:
    return rc;
}

static enum tv_err spec_gpt2(const struct loader *l)
{
    enum tv_err rc = TV_OK;
    static const char *const acts[] = {"activation_function", NULL};
    struct tve_spec *const s = l->s;

    s->norm = TVE_LAYER_NORM;
    TV_TRY(epsilon(l, "layer_norm_epsilon", 1e-5));
    s->positions = TVE_LEARNED;
    s->residual = TVE_PRE_NORM;
    s->transposed = true;
    s->inner = whole(l, "n_inner", 4.0 * (double)s->hidden);
    if (!boolean(l, "scale_attn_weights", true))
        attn_scale(l, 1.0);
    if (boolean(l, "scale_attn_by_inverse_layer_idx", false))
        for (size_t i = 0; i < s->n_layers; i++)
            s->layers[i].attn_scale /= (float)(i + 1);
    rc = act(l, acts, TVE_GELU_TANH);
out:
    return rc;
}

static enum tv_err spec_gpt_neox(const struct loader *l)
{
    enum tv_err rc = TV_OK;
    struct tve_spec *const s = l->s;
    const json_t *const p = json_object_get(l->text, "rope_parameters");

    s->norm = TVE_LAYER_NORM;
    TV_TRY(epsilon(l, "layer_norm_eps", 1e-5));
    s->qkv = TVE_QKV_HEADS;
    s->residual =
        boolean(l, "use_parallel_residual", true) ? TVE_PARALLEL : TVE_PRE_NORM;
    TV_TRY(rope(l));
    if (!json_object_get(p, "partial_rotary_factor") &&
        !json_object_get(l->text, "partial_rotary_factor") &&
        !json_object_get(l->text, "rotary_pct")) {
        s->rope[0].dims = s->head_dim / 4;
        if (s->rope[0].dims == 0) {
            rc = tv_error_set(l->err, TV_E_CORRUPT,
                              "config.json: heads of %zu are too small for "
                              "rotary_pct 0.25",
                              s->head_dim);
            goto out;
        }
    }
    rc = act(l, hidden_act, TVE_GELU);
out:
    return rc;
}

static enum tv_err spec_bloom(const struct loader *l)
{
    enum tv_err rc = TV_OK;
    struct tve_spec *const s = l->s;

    s->norm = TVE_LAYER_NORM;
    TV_TRY(epsilon(l, "layer_norm_epsilon", 1e-5));
    s->positions = TVE_ALIBI;
    s->max_positions = 0; /* ALiBi has no last position */
    s->qkv = TVE_QKV_HEADS;
    s->residual = boolean(l, "apply_residual_connection_post_layernorm", false)
                      ? TVE_NORM_RESIDUAL
                      : TVE_PRE_NORM;
    s->act = TVE_GELU_TANH;
    s->inner = 4 * s->hidden;
out:
    return rc;
}

static enum tv_err spec_opt(const struct loader *l)
{
    static const char *const acts[] = {"activation_function", NULL};
    struct tve_spec *const s = l->s;

    s->norm = TVE_LAYER_NORM;
    s->eps = 1e-5f;
    s->norm_affine = boolean(l, "layer_norm_elementwise_affine", true);
    s->positions = TVE_LEARNED;
    s->position_offset = 2;
    s->residual =
        boolean(l, "do_layer_norm_before", true) ? TVE_PRE_NORM : TVE_POST_NORM;
    s->embed_dim = whole(l, "word_embed_proj_dim", (double)s->hidden);
    return act(l, acts, TVE_RELU);
}

static const struct {
    const char *model_type;
    enum tv_err (*load)(const struct loader *l);
    int64_t head_dim; /* when the config has none; 0: hidden / heads */
    bool no_groups;   /* every head has its own keys, whatever keys say */
} families[] = {
    {"llama", spec_llama, 0, false},
    {"mistral", spec_llama, 0, false},
    {"qwen2", spec_llama, 0, false},
    {"qwen3", spec_llama, 128, false},
    {"phi3", spec_llama, 0, false},
    {"gemma", spec_gemma, 256, false},
    {"gemma2", spec_gemma, 256, false},
    {"gemma3_text", spec_gemma, 256, false},
    {"gemma3", spec_gemma, 256, false},
    {"gpt2", spec_gpt2, 0, true},
    {"gpt_neox", spec_gpt_neox, 0, true},
    {"bloom", spec_bloom, 0, true},
    {"opt", spec_opt, 0, true},
};

static enum tv_err need(const struct tv_arch *a, int64_t v, const char *what,
                        struct tv_error *err)
{
    if (v > 0)
        return TV_OK;
    return tv_error_set(err, TV_E_CORRUPT,
                        "config.json of a %s model has no %s", a->model_type,
                        what);
}

static enum tv_err common(const struct loader *l, int64_t head_dim)
{
    enum tv_err rc = TV_OK;
    const struct tv_arch *const a = l->arch;
    struct tve_spec *const s = l->s;

    TV_TRY(need(a, a->n_layers, "layer count", l->err));
    TV_TRY(need(a, a->hidden, "hidden size", l->err));
    TV_TRY(need(a, a->n_heads, "attention head count", l->err));
    TV_TRY(need(a, a->intermediate, "intermediate size", l->err));
    TV_TRY(need(a, a->vocab, "vocabulary size", l->err));
    if (!json_is_number(json_object_get(l->text, "head_dim")) && head_dim > 0)
        s->head_dim = (size_t)head_dim;
    else
        s->head_dim = (size_t)a->head_dim;
    if (s->head_dim == 0 || s->head_dim > 65536 || a->n_heads > 65536 ||
        a->hidden > (1 << 24) || a->intermediate > (1 << 26) ||
        a->vocab > INT32_MAX || a->max_positions > (INT64_C(1) << 40)) {
        rc = tv_error_set(l->err, TV_E_CORRUPT,
                          "config.json has impossible dimensions");
        goto out;
    }
    s->n_layers = (size_t)a->n_layers;
    s->hidden = s->embed_dim = (size_t)a->hidden;
    s->n_heads = (size_t)a->n_heads;
    s->n_kv = (size_t)a->n_kv_heads;
    s->inner = (size_t)a->intermediate;
    s->vocab = (size_t)a->vocab;
    s->max_positions = (size_t)a->max_positions;
    s->tied = a->tied;
    s->norm_affine = true;
    s->embed_scale = 1;
    s->layers = tv_calloc(s->n_layers, sizeof(*s->layers));
    if (!s->layers) {
        rc = tv_error_set(l->err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    attn_scale(l, 1.0 / sqrt((double)s->head_dim));
out:
    return rc;
}

enum tv_err tve_spec_load(const char *config, size_t n,
                          const struct tv_arch *arch, struct tve_spec *out,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    json_error_t je;
    json_t *const j = json_loadb(config, n, JSON_REJECT_DUPLICATES, &je);
    struct loader l = {j, json_object_get(j, "text_config"), arch, out, err};
    bool known = false;

    if (!j) {
        rc = json_error_code(&je) == json_error_out_of_memory
                 ? tv_error_set(err, TV_E_NOMEM, "out of memory")
                 : tv_error_set(err, TV_E_CORRUPT, "config.json, line %d: %s",
                                je.line, je.text);
        goto out;
    }
    if (!json_is_object(l.text))
        l.text = j;
    for (size_t i = 0; i < sizeof(families) / sizeof(families[0]); i++) {
        if (strcmp(arch->model_type, families[i].model_type))
            continue;
        known = true;
        TV_TRY(common(&l, families[i].head_dim));
        if (families[i].no_groups)
            out->n_kv = out->n_heads;
        TV_TRY(families[i].load(&l));
        break;
    }
    if (!known) {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "models of type \"%.60s\" cannot be evaluated",
                          arch->model_type[0] ? arch->model_type : "unknown");
        goto out;
    }
out:
    json_decref(j);
    return rc;
}

void tve_spec_free(struct tve_spec *s)
{
    tve_rope_free(&s->rope[0]);
    tve_rope_free(&s->rope[1]);
    tv_free(s->layers);
    memset(s, 0, sizeof(*s));
}
