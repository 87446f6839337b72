/* SPDX-License-Identifier: Apache-2.0 */
/*
 * model.c - opens a model: description, weights by slot, shapes checked before
 * anything runs, adapters bound to the weights they change.
 */
#include <stdio.h>
#include <string.h>

#include <cblas.h>

#include "tv/alloc.h"
#include "tv/checked.h"

#include "decoder.h"

#define MEMORY_DEFAULT (UINT64_C(512) << 20)

/* ---- slots --------------------------------------------------------------- */

static int slot_of_role(enum tv_role role)
{
    switch (role) {
    case TV_ROLE_INPUT_NORM:
        return TVE_N1;
    case TV_ROLE_POST_ATTN_NORM:
        return TVE_N2;
    case TV_ROLE_ATTN_Q:
        return TVE_Q;
    case TV_ROLE_ATTN_K:
        return TVE_K;
    case TV_ROLE_ATTN_V:
        return TVE_V;
    case TV_ROLE_ATTN_QKV:
        return TVE_QKV;
    case TV_ROLE_ATTN_O:
        return TVE_O;
    case TV_ROLE_MLP_GATE:
        return TVE_GATE;
    case TV_ROLE_MLP_UP:
        return TVE_UP;
    case TV_ROLE_MLP_GATE_UP:
        return TVE_GATE_UP;
    case TV_ROLE_MLP_DOWN:
        return TVE_DOWN;
    default:
        return -1;
    }
}

/* Norms that share one role are told apart by their module. */
static int slot_of_norm(const char *rest)
{
    static const struct {
        const char *module;
        int slot;
    } known[] = {
        {".self_attn.q_norm.", TVE_NQ},
        {".self_attn.k_norm.", TVE_NK},
        {".pre_feedforward_layernorm.", TVE_N3},
        {".post_feedforward_layernorm.", TVE_N4},
    };

    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++)
        if (!strncmp(rest, known[i].module, strlen(known[i].module)))
            return known[i].slot;
    return -1;
}

static int slot_of_global(const struct tv_arch_tensor *t)
{
    switch (t->role) {
    case TV_ROLE_EMBED:
        return TVE_EMBED;
    case TV_ROLE_POSITION:
        return TVE_POSITION;
    case TV_ROLE_EMBED_NORM:
        return TVE_EMBED_NORM;
    case TV_ROLE_FINAL_NORM:
        return TVE_FINAL_NORM;
    case TV_ROLE_LM_HEAD:
        return TVE_HEAD;
    default:
        if (strstr(t->name, "project_in."))
            return TVE_PROJECT_IN;
        if (strstr(t->name, "project_out."))
            return TVE_PROJECT_OUT;
        return -1;
    }
}

static enum tv_err put(struct tve_model *m, struct tve_param *p,
                       const struct tv_arch_tensor *at, struct tv_error *err)
{
    struct tve_weight *const w = at->is_bias ? &p->b : &p->w;
    const struct tv_input_tensor *const t = tv_input_find(m->in, at->name);

    if (!t)
        return tv_error_set(err, TV_E_INTERNAL, "tensor \"%s\" vanished",
                            at->name);
    if (w->t)
        return tv_error_set(err, TV_E_INPUT,
                            "tensors \"%s\" and \"%s\" stand for the same "
                            "weight",
                            w->t->name, t->name);
    if (!tv_dtype_is_math(t->dtype))
        return tv_error_set(err, TV_E_UNSUPPORTED,
                            "tensor \"%s\" is %s; only F32, F16 and BF16 can "
                            "be evaluated",
                            t->name, tv_dtype_name(t->dtype));
    if (t->rank < 1 || t->rank > 2)
        return tv_error_set(err, TV_E_INPUT, "tensor \"%s\" has %u dimensions",
                            t->name, t->rank);
    w->t = t;
    w->rows = (size_t)t->shape[0];
    w->cols = t->rank == 2 ? (size_t)t->shape[1] : 1;
    return TV_OK;
}

static enum tv_err fill_slots(struct tve_model *m, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < m->arch->n_tensors; i++) {
        const struct tv_arch_tensor *const t = &m->arch->tensors[i];
        int slot = -1;

        if (t->role == TV_ROLE_BUFFER)
            continue;
        if (t->layer >= 0) {
            slot = t->role == TV_ROLE_OTHER_NORM
                       ? slot_of_norm(t->name + t->layer_at + t->layer_len)
                       : slot_of_role(t->role);
            if (slot < 0) {
                rc = tv_error_set(err, TV_E_UNSUPPORTED,
                                  "tensor \"%s\" has no place in the forward "
                                  "pass of %s models",
                                  t->name, m->arch->model_type);
                goto out;
            }
            TV_TRY(put(
                m, tve_layer_param(m, (size_t)t->layer, (enum tve_slot)slot), t,
                err));
            continue;
        }
        slot = slot_of_global(t);
        if (slot >= 0)
            TV_TRY(put(m, &m->globals[slot], t, err));
    }
out:
    return rc;
}

/* ---- shapes -------------------------------------------------------------- */

static enum tv_err missing(const struct tve_model *m, const char *what,
                           size_t layer, struct tv_error *err)
{
    return tv_error_set(err, TV_E_INPUT, "%s: layer %zu has no %s",
                        tv_input_label(m->in), layer, what);
}

static enum tv_err check_shape(const struct tve_weight *w, size_t rows,
                               size_t cols, struct tv_error *err)
{
    if (!w->t || (w->rows == rows && w->cols == cols))
        return TV_OK;
    return tv_error_set(err, TV_E_INPUT,
                        "tensor \"%s\" is [%zu, %zu], the config asks for "
                        "[%zu, %zu]",
                        w->t->name, w->rows, w->cols, rows, cols);
}

struct shape {
    enum tve_slot slot;
    const char *what;
    size_t out, in; /* in 0: a norm */
    bool required;
};

static enum tv_err check_layer(const struct tve_model *m, size_t layer,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_spec *const s = &m->spec;
    const size_t q = s->n_heads * s->head_dim, kv = s->n_kv * s->head_dim;
    const bool fused = tve_layer_param(m, layer, TVE_QKV)->w.t != NULL;
    const bool fused_mlp = tve_layer_param(m, layer, TVE_GATE_UP)->w.t != NULL;
    const bool sandwich = s->residual == TVE_SANDWICH;
    const struct shape shapes[] = {
        {TVE_N1, "norm before attention", s->hidden, 0, s->norm_affine},
        {TVE_N2, "norm before the MLP", s->hidden, 0, s->norm_affine},
        {TVE_N3, "pre_feedforward_layernorm", s->hidden, 0, sandwich},
        {TVE_N4, "post_feedforward_layernorm", s->hidden, 0, sandwich},
        {TVE_NQ, "q_norm", s->head_dim, 0, s->qk_norm},
        {TVE_NK, "k_norm", s->head_dim, 0, s->qk_norm},
        {TVE_Q, "query projection", q, s->hidden, !fused},
        {TVE_K, "key projection", kv, s->hidden, !fused},
        {TVE_V, "value projection", kv, s->hidden, !fused},
        {TVE_QKV, "fused projection", q + 2 * kv, s->hidden, fused},
        {TVE_O, "output projection", s->hidden, q, true},
        {TVE_GATE, "gate projection", s->inner, s->hidden,
         s->gated && !fused_mlp},
        {TVE_UP, "up projection", s->inner, s->hidden, !fused_mlp},
        {TVE_GATE_UP, "fused gate and up projection", 2 * s->inner, s->hidden,
         false},
        {TVE_DOWN, "down projection", s->hidden, s->inner, true},
    };

    for (size_t i = 0; i < sizeof(shapes) / sizeof(shapes[0]); i++) {
        const struct shape *const x = &shapes[i];
        const struct tve_param *const p = tve_layer_param(m, layer, x->slot);

        if (x->required && !p->w.t) {
            rc = missing(m, x->what, layer, err);
            goto out;
        }
        if (x->in == 0)
            TV_TRY(check_shape(&p->w, x->out, 1, err));
        else if (s->transposed)
            TV_TRY(check_shape(&p->w, x->in, x->out, err));
        else
            TV_TRY(check_shape(&p->w, x->out, x->in, err));
        TV_TRY(check_shape(&p->b, x->out, 1, err));
    }
    if ((fused && tve_layer_param(m, layer, TVE_Q)->w.t) ||
        (fused_mlp && (!s->gated || tve_layer_param(m, layer, TVE_UP)->w.t)))
        rc = tv_error_set(err, TV_E_INPUT,
                          "%s: layer %zu has fused and separate projections",
                          tv_input_label(m->in), layer);
out:
    return rc;
}

static enum tv_err check_globals(struct tve_model *m, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_spec *const s = &m->spec;
    struct tve_param *const g = m->globals;

    if (!g[TVE_EMBED].w.t) {
        rc = tv_error_set(err, TV_E_INPUT, "%s has no token embedding",
                          tv_input_label(m->in));
        goto out;
    }
    /* Tables may have spare rows (padding); ids reach vocab_size only. */
    TV_TRY(
        check_shape(&g[TVE_EMBED].w, g[TVE_EMBED].w.rows, s->embed_dim, err));
    if (!g[TVE_HEAD].w.t && !s->tied) {
        rc = tv_error_set(err, TV_E_INPUT,
                          "%s has no output head, and its config does not tie "
                          "it to the embedding",
                          tv_input_label(m->in));
        goto out;
    }
    if (!g[TVE_HEAD].w.t)
        g[TVE_HEAD].w = g[TVE_EMBED].w;
    TV_TRY(check_shape(&g[TVE_HEAD].w, g[TVE_HEAD].w.rows, s->embed_dim, err));
    if (g[TVE_HEAD].w.rows < s->vocab || g[TVE_EMBED].w.rows < s->vocab) {
        rc = tv_error_set(err, TV_E_INPUT,
                          "%s has fewer rows than vocab_size %zu",
                          g[TVE_HEAD].w.t->name, s->vocab);
        goto out;
    }
    TV_TRY(check_shape(&g[TVE_HEAD].b, g[TVE_HEAD].w.rows, 1, err));
    TV_TRY(check_shape(&g[TVE_EMBED_NORM].w, s->hidden, 1, err));
    TV_TRY(check_shape(&g[TVE_EMBED_NORM].b, s->hidden, 1, err));
    TV_TRY(check_shape(&g[TVE_FINAL_NORM].w, s->hidden, 1, err));
    TV_TRY(check_shape(&g[TVE_FINAL_NORM].b, s->hidden, 1, err));
    TV_TRY(check_shape(&g[TVE_PROJECT_IN].w, s->hidden, s->embed_dim, err));
    TV_TRY(check_shape(&g[TVE_PROJECT_OUT].w, s->embed_dim, s->hidden, err));
    if (s->embed_dim != s->hidden &&
        (!g[TVE_PROJECT_IN].w.t || !g[TVE_PROJECT_OUT].w.t)) {
        rc = tv_error_set(err, TV_E_INPUT,
                          "%s embeds in %zu dimensions but has no projections "
                          "to its hidden size %zu",
                          tv_input_label(m->in), s->embed_dim, s->hidden);
        goto out;
    }
    if (s->positions == TVE_LEARNED) {
        const struct tve_weight *const w = &g[TVE_POSITION].w;

        if (!w->t || w->rows <= s->position_offset) {
            rc = tv_error_set(err, TV_E_INPUT, "%s has no position embedding",
                              tv_input_label(m->in));
            goto out;
        }
        TV_TRY(check_shape(w, w->rows, s->hidden, err));
        if (!s->max_positions ||
            s->max_positions > w->rows - s->position_offset)
            s->max_positions = w->rows - s->position_offset;
    }
    if (s->residual != TVE_POST_NORM && s->norm_affine &&
        !g[TVE_FINAL_NORM].w.t && s->norm != TVE_LAYER_NORM)
        rc = tv_error_set(err, TV_E_INPUT, "%s has no final norm",
                          tv_input_label(m->in));
out:
    return rc;
}

/* ---- adapters ------------------------------------------------------------ */

static struct tve_weight *in_param(struct tve_param *p,
                                   const struct tv_input_tensor *t)
{
    if (p->w.t == t)
        return &p->w;
    return p->b.t == t ? &p->b : NULL;
}

/* A tied head is the embedding; add_adapter's caller shares its changes. */
static struct tve_weight *weight_of(struct tve_model *m,
                                    const struct tv_input_tensor *t)
{
    struct tve_weight *w = NULL;

    for (size_t i = 0; i < m->spec.n_layers * TVE_SLOTS && !w; i++)
        w = in_param(&m->layers[i], t);
    for (size_t i = 0; i < TVE_GLOBALS && !w; i++)
        w = in_param(&m->globals[i], t);
    return w;
}

static bool is_head_tied(const struct tve_model *m)
{
    return m->globals[TVE_HEAD].w.t == m->globals[TVE_EMBED].w.t;
}

static enum tv_err add_adapter(struct tve_model *m, tv_adapter *a,
                               double weight, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n = tv_adapter_count(a);
    size_t *targets = tv_calloc(n ? n : 1, sizeof(*targets));

    if (!targets) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(tv_adapter_bind(a, m->in, targets, err));
    TV_TRY(tva_adapter_check(a, m->kernels, err));
    for (size_t i = 0; i < n; i++) {
        const struct tv_adapter_module *const mod = tv_adapter_module(a, i);
        struct tve_weight *const w =
            weight_of(m, tv_input_tensor(m->in, targets[i]));
        struct tv_adapter_use *p = NULL;

        if (!w) {
            rc = tv_error_set(err, TV_E_UNSUPPORTED,
                              "adapter module \"%s\" changes no weight of the "
                              "forward pass",
                              mod->module);
            goto out;
        }
        if (weight == 0)
            continue;
        p = tv_realloc(w->changes, (w->n_changes + 1) * sizeof(*p));
        if (!p) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
            goto out;
        }
        w->changes = p;
        p[w->n_changes++] =
            (struct tv_adapter_use){mod, tv_adapter_input(a), weight};
    }
out:
    tv_free(targets);
    return rc;
}

static const struct tve_row_ops *rows_for(enum tvk_isa isa)
{
#ifdef TVE_ROWS_X86
    if (isa >= TVK_AVX512)
        return &tve_rows_avx512;
    if (isa == TVK_AVX2)
        return &tve_rows_avx2;
#endif
    (void)isa;
    return &tve_rows_ref;
}

/* ---- opening ------------------------------------------------------------- */

static enum tv_err describe(struct tve_model *m, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n = tv_input_count(m->in);
    struct tv_arch_name *names = tv_calloc(n ? n : 1, sizeof(*names));
    char *config = NULL;
    size_t n_config = 0;
    bool found = false;

    if (!names) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(tv_input_side_read(m->in, "config.json", &found, &config, &n_config,
                              err));
    if (!found) {
        rc = tv_error_set(err, TV_E_INPUT,
                          "%s has no config.json, so its arithmetic is unknown",
                          tv_input_label(m->in));
        goto out;
    }
    for (size_t i = 0; i < n; i++) {
        const struct tv_input_tensor *const t = tv_input_tensor(m->in, i);
        names[i] = (struct tv_arch_name){t->name, t->rank, t->shape, t->dtype};
    }
    TV_TRY(tv_arch_describe(config, n_config, names, n, err, &m->arch));
    TV_TRY(tv_arch_check_plain(m->arch, tv_input_label(m->in), err));
    TV_TRY(tve_spec_load(config, n_config, m->arch, &m->spec, err));
out:
    if (rc != TV_OK)
        tv_error_context(err, "%s", tv_input_label(m->in));
    tv_free(config);
    tv_free(names);
    return rc;
}

enum tv_err tve_model_open(tv_input *in,
                           const struct tve_model_adapter *adapters,
                           size_t n_adapters,
                           const struct tve_model_options *opt,
                           struct tv_error *err, tve_model **out)
{
    static const struct tve_model_options none = {.n_threads = 0};
    enum tv_err rc = TV_OK;
    struct tve_model *m = tv_calloc(1, sizeof(*m));
    const size_t n = tv_input_count(in);

    *out = NULL;
    if (!m) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (!opt)
        opt = &none;
    m->in = in;
    m->kernels = opt->kernels ? opt->kernels : tvk_table_best();
    /* What is converted here is used here. */
    if (opt->cuda)
        m->kernels = tvk_table_for(m->kernels->isa);
    m->rows = rows_for(m->kernels->isa);
    m->memory_bytes = opt->memory_bytes ? opt->memory_bytes : MEMORY_DEFAULT;
    m->skip_verify = opt->skip_verify;
    m->quota_of = opt->quota_of;
    m->scratch_dir = tv_strdup(opt->scratch_dir ? opt->scratch_dir : P_tmpdir);
    m->verified = tv_calloc(n ? n : 1, 1);
    if (!m->scratch_dir || !m->verified) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(describe(m, err));
    m->layers = tv_calloc(m->spec.n_layers * TVE_SLOTS, sizeof(*m->layers));
    if (!m->layers) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(fill_slots(m, err));
    for (size_t i = 0; i < m->spec.n_layers; i++)
        TV_TRY(check_layer(m, i, err));
    TV_TRY(check_globals(m, err));
    m->adapters = tv_calloc(n_adapters ? n_adapters : 1, sizeof(*m->adapters));
    if (!m->adapters) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    m->n_adapters = n_adapters;
    for (size_t i = 0; i < n_adapters; i++)
        m->adapters[i] = adapters[i];
    for (size_t i = 0; i < n_adapters; i++)
        TV_TRY(add_adapter(m, adapters[i].adapter, adapters[i].weight, err));
    if (is_head_tied(m))
        m->globals[TVE_HEAD].w = m->globals[TVE_EMBED].w;
    TV_TRY(tv_pool_open(opt->n_threads ? opt->n_threads : tv_cpu_count(), err,
                        &m->pool));
    if (opt->cuda)
        TV_TRY(tve_device_open(opt->cuda, err, &m->device));
    else if (m->kernels->isa >= TVK_AMX)
        TV_TRY(tve_splits_open(err, &m->splits));
    /* Our workers call BLAS side by side; more threads inside would only change
     * how sums are split. */
    openblas_set_num_threads(1);
    *out = m;
    m = NULL;
out:
    tve_model_close(m);
    return rc;
}

void tve_model_close(tve_model *m)
{
    if (!m)
        return;
    /* Else the end of the process says so. */
    if (m->charged_bytes > 0)
        (void)!tv_store_scratch_set(m->quota_of, 0, NULL);
    tve_device_close(m->device);
    tve_splits_close(m->splits);
    for (size_t i = 0; m->layers && i < m->spec.n_layers * TVE_SLOTS; i++) {
        tv_free(m->layers[i].w.changes);
        tv_free(m->layers[i].b.changes);
    }
    for (size_t i = 0; i < TVE_GLOBALS; i++) {
        if (i != TVE_HEAD || !is_head_tied(m))
            tv_free(m->globals[i].w.changes);
        tv_free(m->globals[i].b.changes);
    }
    tv_free(m->layers);
    tv_free(m->adapters);
    tv_free(m->replaced);
    tve_spec_free(&m->spec);
    tv_arch_free(m->arch);
    tv_pool_close(m->pool);
    tv_free(m->scratch_dir);
    tv_free(m->verified);
    tv_free(m);
}

static bool holds(const struct tve_param *p, const struct tv_input_tensor *t)
{
    return p->w.t == t || p->b.t == t;
}

size_t tve_model_stage(const tve_model *m, const char *tensor)
{
    static const enum tve_slot_global first[] = {
        TVE_EMBED, TVE_POSITION, TVE_EMBED_NORM, TVE_PROJECT_IN};
    const struct tv_input_tensor *const t = tv_input_find(m->in, tensor);

    if (!t)
        return SIZE_MAX;
    for (size_t i = 0; i < sizeof(first) / sizeof(first[0]); i++)
        if (holds(&m->globals[first[i]], t))
            return 0;
    for (size_t i = 0; i < m->spec.n_layers * TVE_SLOTS; i++)
        if (holds(&m->layers[i], t))
            return 1 + i / TVE_SLOTS;
    return SIZE_MAX;
}

size_t tve_model_vocab(const tve_model *m)
{
    return m->spec.vocab;
}

size_t tve_model_positions(const tve_model *m)
{
    return m->spec.max_positions;
}

bool tve_model_takes(const tve_model *m, size_t n_positions)
{
    const struct tve_spec *const s = &m->spec;
    const bool stretches =
        s->positions == TVE_ROPE && s->rope[0].type == TVE_ROPE_DYNAMIC;

    return s->max_positions == 0 || n_positions <= s->max_positions ||
           stretches;
}
