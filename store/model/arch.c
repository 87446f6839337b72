/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arch.c - puts config.json, family table and tensor names together.
 *
 * A tensor of a known family is looked up as PREFIX ROW (.weight | .bias); one
 * that no row matches keeps role OTHER, is in its layer if its name says so,
 * and otherwise stands before the layers when "embed" is in its name, else
 * behind them. Families without a table go through infer.c.
 *
 * Modules: a family may have several stacks (T5's encoder and decoder). A model
 * of several modalities has a text decoder, whose family its text_config
 * names, and one module for every other component (vision_tower,
 * multi_modal_projector, ...); those are inferred, each by itself, so that
 * their layers are never taken for the decoder's.
 */
#include <ctype.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

#include "family.h"

/* Length of the longest of s that is a number, for '#' and '*'. */
static size_t match_number(const char *s, int64_t *value)
{
    const size_t n = tv_layer_number(s, value);

    return n > 0 && s[n] == '.' ? n : 0;
}

/* Matches name against a row; on success fills the layer's place, relative to
 * name, when the row has one. */
static bool match_row(const char *name, const struct tv_family_row *row,
                      struct tv_arch_tensor *t)
{
    const char *p = row->name, *s = name;
    int64_t number = 0;

    t->layer = -1;
    for (; *p; p++) {
        if (*p == '#' || *p == '*') {
            const size_t n = match_number(s, &number);
            if (n == 0)
                return false;
            if (*p == '#') {
                t->layer = number;
                t->layer_at = (size_t)(s - name);
                t->layer_len = n;
            }
            s += n;
        } else if (*s++ != *p) {
            return false;
        }
    }
    if (row->exact) {
        const size_t n = strlen(name);
        t->is_bias = row->role == TV_ROLE_LM_HEAD && n >= 5 &&
                     !strcmp(name + n - 5, ".bias");
        return *s == '\0';
    }
    t->is_bias = !strcmp(s, ".bias");
    return t->is_bias || !strcmp(s, ".weight");
}

static void unknown_tensor(const struct tv_family_stack *stack, size_t skip,
                           struct tv_arch_tensor *t)
{
    const size_t n_layers_text = strlen(stack->layers);
    const size_t n_name = strlen(t->name);

    t->role = TV_ROLE_OTHER;
    t->layer = -1;
    t->layer_at = t->layer_len = 0;
    t->is_bias = n_name >= 5 && !strcmp(t->name + n_name - 5, ".bias");
    t->part = strstr(t->name, "embed") ? TV_PART_PRE : TV_PART_POST;
    for (const char *const *p = stack->prefixes; *p && n_layers_text; p++) {
        const size_t n = skip + strlen(*p);
        int64_t layer = 0;
        size_t digits = 0;

        if (strncmp(t->name + skip, *p, n - skip) ||
            strncmp(t->name + n, stack->layers, n_layers_text))
            continue;
        digits = match_number(t->name + n + n_layers_text, &layer);
        if (digits > 0) {
            t->layer = layer;
            t->layer_at = n + n_layers_text;
            t->layer_len = digits;
            t->part = TV_PART_LAYER;
            return;
        }
    }
}

static bool is_linear(enum tv_role r)
{
    return r >= TV_ROLE_ATTN_Q && r <= TV_ROLE_ROUTER;
}

/* Looks t's name from `skip` on up in one stack. */
static bool stack_tensor(const struct tv_family *f,
                         const struct tv_family_stack *stack, size_t skip,
                         struct tv_arch_tensor *t)
{
    for (const char *const *p = stack->prefixes; *p; p++) {
        const size_t n = skip + strlen(*p);

        if (strncmp(t->name + skip, *p, n - skip))
            continue;
        for (const struct tv_family_row *r = stack->rows; r->name; r++) {
            if (!match_row(t->name + n, r, t))
                continue;
            t->layer_at = t->layer < 0 ? 0 : t->layer_at + n;
            t->role = r->role;
            t->part = r->part;
            t->optional = r->optional || (t->is_bias && f->bias_optional &&
                                          is_linear(r->role));
            if (r->role == TV_ROLE_EMBED || r->role == TV_ROLE_LM_HEAD)
                t->vocab_dim = 0;
            return true;
        }
    }
    return false;
}

/* The stacks of a family; `one` stands for those of a family without. */
static const struct tv_family_stack *stacks_of(const struct tv_family *f,
                                               struct tv_family_stack one[2])
{
    if (f->stacks)
        return f->stacks;
    memset(one, 0, 2 * sizeof(*one));
    one[0].module = "";
    one[0].prefixes = f->prefixes;
    one[0].layers = f->layers;
    one[0].rows = f->rows;
    return one;
}

/* In front of a language model's own names when it is part of a larger one;
 * the longest first. */
static const char *const text_prefixes[] = {
    "model.language_model.",
    "model.text_model.",
    "language_model.",
    "text_model.",
    "",
    NULL,
};

static void known_tensor(const struct tv_family *f, bool within,
                         struct tv_arch_tensor *t)
{
    struct tv_family_stack one[2];
    const struct tv_family_stack *const stacks = stacks_of(f, one);
    const char *const *p = within ? text_prefixes : &text_prefixes[4];
    size_t last = 0;

    for (; *p; p++) {
        const size_t skip = strlen(*p);
        if (strncmp(t->name, *p, skip))
            continue;
        for (size_t i = 0; stacks[i].module; i++) {
            t->module = i;
            if (stack_tensor(f, &stacks[i], skip, t))
                return;
        }
    }
    while (stacks[last + 1].module)
        last++;
    for (p = within ? text_prefixes : &text_prefixes[4]; *p; p++) {
        const size_t skip = strlen(*p);
        if (strncmp(t->name, *p, skip))
            continue;
        for (size_t i = 0; stacks[i].module; i++) {
            unknown_tensor(&stacks[i], skip, t);
            t->module = i;
            if (t->layer >= 0)
                return;
        }
    }
    t->module = last;
}

/* Layers behind the last one are errors, but for those that count as none. */
static enum tv_err check_layers(const struct tv_arch *a, int64_t n_beyond,
                                struct tv_error *err)
{
    for (size_t i = 0; i < a->n_tensors; i++) {
        struct tv_arch_tensor *const t = &a->tensors[i];
        const struct tv_arch_module *const m = &a->modules[t->module];

        if (t->layer < m->n_layers)
            continue;
        if (t->module == 0 && t->layer - m->n_layers < n_beyond) {
            t->beyond = t->layer - m->n_layers;
            t->layer = -1;
            t->part = TV_PART_POST;
            continue;
        }
        return tv_error_set(
            err, TV_E_INPUT,
            "tensor \"%s\" is in layer %lld, but config.json counts %lld "
            "layers%s%s",
            t->name, (long long)t->layer, (long long)m->n_layers,
            m->name[0] ? " of its " : "", m->name);
    }
    return TV_OK;
}

static enum tv_err check_embedding(const struct tv_arch *a,
                                   const struct tv_family *f,
                                   const struct tv_config *c,
                                   const struct tv_arch_name *names,
                                   struct tv_error *err)
{
    for (size_t i = 0; i < a->n_tensors; i++) {
        const struct tv_arch_tensor *const t = &a->tensors[i];
        const struct tv_arch_name *const n = &names[i];

        if (t->vocab_dim != 0 || t->is_bias)
            continue;
        if (n->rank != 2)
            return tv_error_set(err, TV_E_INPUT,
                                "tensor \"%s\" has %u dimensions, a %s has 2",
                                t->name, n->rank, tv_role_name(t->role));
        if (c->vocab > 0 && n->shape[0] < (uint64_t)c->vocab)
            return tv_error_set(err, TV_E_INPUT,
                                "tensor \"%s\" has %llu rows, but config.json "
                                "has vocab_size %lld",
                                t->name, (unsigned long long)n->shape[0],
                                (long long)c->vocab);
        if (f && f->embed_is_hidden && c->hidden > 0 &&
            n->shape[1] != (uint64_t)c->hidden)
            return tv_error_set(err, TV_E_INPUT,
                                "tensor \"%s\" is %llu wide, but config.json "
                                "has hidden size %lld",
                                t->name, (unsigned long long)n->shape[1],
                                (long long)c->hidden);
    }
    return TV_OK;
}

/* The description, its tensors and copies of all names in one block each. */
static enum tv_err copy_names(struct tv_arch *a,
                              const struct tv_arch_name *names, size_t n,
                              struct tv_error *err)
{
    size_t bytes = 0;
    char *p = NULL;

    for (size_t i = 0; i < n; i++)
        if (!tv_add_size(bytes, strlen(names[i].name) + 1, &bytes))
            return tv_error_set(err, TV_E_NOMEM, "out of memory");
    a->tensors = tv_calloc(n ? n : 1, sizeof(*a->tensors));
    a->storage = tv_alloc(bytes ? bytes : 1);
    if (!a->tensors || !a->storage)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    p = a->storage;
    for (size_t i = 0; i < n; i++) {
        const size_t len = strlen(names[i].name) + 1;
        memcpy(p, names[i].name, len);
        a->tensors[i].name = p;
        a->tensors[i].layer = -1;
        a->tensors[i].beyond = -1;
        a->tensors[i].vocab_dim = -1;
        p += len;
    }
    a->n_tensors = n;
    return TV_OK;
}

static void link_head(struct tv_arch *a)
{
    const char *embed = NULL;

    for (size_t i = 0; i < a->n_tensors && !embed; i++)
        if (a->tensors[i].role == TV_ROLE_EMBED && !a->tensors[i].is_bias)
            embed = a->tensors[i].name;
    for (size_t i = 0; i < a->n_tensors; i++) {
        struct tv_arch_tensor *const t = &a->tensors[i];
        if (t->role != TV_ROLE_LM_HEAD)
            continue;
        t->optional = true;
        t->tied_to = t->is_bias ? NULL : embed;
    }
}

static bool has_head(const struct tv_arch *a)
{
    for (size_t i = 0; i < a->n_tensors; i++)
        if (a->tensors[i].role == TV_ROLE_LM_HEAD)
            return true;
    return false;
}

static enum tv_err fill_config(struct tv_arch *a, struct tv_config *c,
                               const struct tv_family *f, struct tv_error *err)
{
    a->family = tv_strdup(f ? f->name : "inferred");
    a->architecture = c->architecture ? c->architecture : tv_strdup("");
    a->model_type = c->model_type ? c->model_type : tv_strdup("");
    a->dtype = c->dtype ? c->dtype : tv_strdup("");
    c->architecture = c->model_type = c->dtype = NULL;
    if (!a->family || !a->architecture || !a->model_type || !a->dtype)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    a->inferred = !f;
    a->head_name = tv_head_name(a->model_type);
    a->has_config = c->present;
    a->dtype_key_new = c->dtype_key_new;
    a->n_layers = c->n_layers;
    a->hidden = c->hidden;
    a->n_heads = c->n_heads;
    a->n_kv_heads = c->n_kv_heads ? c->n_kv_heads : c->n_heads;
    a->head_dim = c->head_dim;
    if (!a->head_dim && a->n_heads > 0)
        a->head_dim = a->hidden / a->n_heads;
    a->intermediate = c->intermediate;
    if (!a->intermediate && f && a->hidden <= TV_DIM_MAX / 16)
        a->intermediate = a->hidden * f->inner_factor;
    a->vocab = c->vocab;
    a->max_positions = c->max_positions;
    a->linear_transposed = f && f->linear_transposed;
    a->layers_key = c->layers_key;
    return TV_OK;
}

/* ---- modules --------------------------------------------------------------
 */

static enum tv_err add_module(struct tv_arch *a, const char *name,
                              size_t n_name, struct tv_error *err)
{
    struct tv_arch_module *const more =
        tv_realloc(a->modules, (a->n_modules + 1) * sizeof(*more));

    if (!more)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    a->modules = more;
    memset(&more[a->n_modules], 0, sizeof(*more));
    more[a->n_modules].name = tv_strndup(name, n_name);
    if (!more[a->n_modules].name)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    a->n_modules++;
    return TV_OK;
}

/* Index of the module of a modality, made when it is new. */
static enum tv_err find_module(struct tv_arch *a, const char *name, size_t n,
                               size_t *out, struct tv_error *err)
{
    for (size_t i = 0; i < a->n_modules; i++) {
        if (strlen(a->modules[i].name) == n &&
            !strncmp(a->modules[i].name, name, n)) {
            *out = i;
            return TV_OK;
        }
    }
    *out = a->n_modules;
    return add_module(a, name, n, err);
}

/* Where config.json has the layer count of a modality, if it is `n`. */
static void find_count(struct tv_arch_module *m, const struct tv_config *c,
                       int64_t n)
{
    static const char *const scopes[] = {"vision_config", "audio_config", NULL};
    static const char *const keys[] = {"num_hidden_layers", "depth",
                                       "num_layers",        "encoder_layers",
                                       "n_layers",          NULL};

    m->n_layers = n;
    for (size_t i = 0; scopes[i] && n > 0; i++) {
        for (size_t k = 0; keys[k]; k++) {
            const char *const one[] = {keys[k], NULL};
            if (tv_config_layers(c, scopes[i], one, &m->layers_key) == n) {
                m->scope = scopes[i];
                return;
            }
        }
    }
    m->layers_key = NULL;
}

/* Describes tensors of `module` (all of them: ALL_MODULES) from their
 * names alone. */
#define ALL_MODULES SIZE_MAX
static enum tv_err infer_module(struct tv_arch *a,
                                const struct tv_arch_name *names, size_t module,
                                int64_t vocab, int64_t *n_layers,
                                struct tv_error *err)
{
    struct tv_arch_tensor *part = NULL;
    struct tv_arch_name *part_names = NULL;
    size_t n = 0;
    enum tv_err rc = TV_OK;

    *n_layers = 0;
    part = tv_calloc(a->n_tensors + 1, sizeof(*part));
    part_names = tv_calloc(a->n_tensors + 1, sizeof(*part_names));
    if (!part || !part_names) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < a->n_tensors; i++) {
        if (module != ALL_MODULES && a->tensors[i].module != module)
            continue;
        part[n] = a->tensors[i];
        part_names[n++] = names[i];
    }
    TV_TRY(tv_infer(part, part_names, n, vocab, n_layers, err));
    n = 0;
    for (size_t i = 0; i < a->n_tensors; i++) {
        if (module == ALL_MODULES || a->tensors[i].module == module)
            a->tensors[i] = part[n++];
    }
out:
    tv_free(part);
    tv_free(part_names);
    return rc;
}

/* Modules of a model of several modalities: sets tensor->module. */
static enum tv_err split_modalities(struct tv_arch *a, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    TV_TRY(add_module(a, "text_decoder", strlen("text_decoder"), err));
    for (size_t i = 0; i < a->n_tensors; i++) {
        size_t n = 0;
        const char *const at = tv_modality_of(a->tensors[i].name, &n);
        if (at)
            TV_TRY(find_module(a, at, n, &a->tensors[i].module, err));
    }
out:
    return rc;
}

static enum tv_err describe_modalities(struct tv_arch *a,
                                       const struct tv_config *c,
                                       const struct tv_arch_name *names,
                                       struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    int64_t n = 0;

    for (size_t m = 1; m < a->n_modules; m++) {
        TV_TRY(infer_module(a, names, m, 0, &n, err));
        find_count(&a->modules[m], c, n);
        /* Their tables of positions and the like count no tokens. */
        for (size_t i = 0; i < a->n_tensors; i++) {
            struct tv_arch_tensor *const t = &a->tensors[i];
            if (t->module != m)
                continue;
            t->vocab_dim = -1;
            if (t->role == TV_ROLE_EMBED || t->role == TV_ROLE_LM_HEAD)
                t->role = TV_ROLE_OTHER;
        }
    }
out:
    return rc;
}

static enum tv_err describe_known(struct tv_arch *a, const struct tv_family *f,
                                  const struct tv_config *c,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_family_stack one[2];
    const struct tv_family_stack *const stacks = stacks_of(f, one);

    /* Those of other modalities are not the family's. */
    for (size_t i = 0; i < a->n_tensors; i++) {
        if (a->tensors[i].module == 0)
            known_tensor(f, a->n_modules > 0, &a->tensors[i]);
    }
    for (size_t i = 0; f->stacks && stacks[i].module; i++) {
        struct tv_arch_module *m = NULL;
        const char *key = NULL;
        int64_t n = 0;

        TV_TRY(add_module(a, stacks[i].module, strlen(stacks[i].module), err));
        m = &a->modules[a->n_modules - 1];
        n = tv_config_layers(c, NULL, stacks[i].layers_keys, &key);
        m->n_layers = n > 0 ? n : 0;
        m->layers_key = key;
    }
    if (f->stacks) {
        a->n_layers = a->modules[0].n_layers;
        a->layers_key = NULL; /* several counts: none is the model's */
        rc = check_layers(a, 0, err);
        goto out;
    }
    if (a->n_modules == 0)
        TV_TRY(add_module(a, "", 0, err));
    a->modules[0].is_main = true;
    a->modules[0].n_layers = a->n_layers;
    if (c->text_layers_key) {
        a->modules[0].scope = "text_config";
        a->modules[0].layers_key = c->text_layers_key;
    } else {
        a->modules[0].layers_key = a->layers_key;
    }
    TV_TRY(check_layers(a, c->n_beyond, err));
out:
    return rc;
}

static enum tv_err describe_unknown(struct tv_arch *a,
                                    const struct tv_config *c,
                                    const struct tv_arch_name *names,
                                    struct tv_error *err)
{
    int64_t n_seen = 0;
    enum tv_err rc = TV_OK;

    TV_TRY(infer_module(a, names, a->n_modules > 0 ? 0 : ALL_MODULES, a->vocab,
                        &n_seen, err));
    if (a->n_modules == 0)
        TV_TRY(add_module(a, "", 0, err));
    a->modules[0].is_main = true;
    /* Guessed layers cannot refute a config, but only a count that fits them is
     * one that stacking may change. */
    if (n_seen == a->n_layers) {
        a->modules[0].scope = c->text_layers_key ? "text_config" : NULL;
        a->modules[0].layers_key =
            c->text_layers_key ? c->text_layers_key : a->layers_key;
    } else {
        a->layers_key = NULL;
    }
    if (n_seen > 0)
        a->n_layers = n_seen;
    a->modules[0].n_layers = a->n_layers;
out:
    return rc;
}

/* The family of the model, or of the language model within it. */
static const struct tv_family *find_family(const struct tv_config *c,
                                           const struct tv_family_type **type)
{
    const struct tv_family *f =
        tv_family_find(c->model_type, c->architecture, type);

    if (!f && c->text_type[0])
        f = tv_family_find(c->text_type, "", type);
    return f && c->has_parts && f->stacks ? NULL : f;
}

enum tv_err tv_arch_describe(const char *config, size_t n_config,
                             const struct tv_arch_name *names, size_t n_names,
                             struct tv_error *err, struct tv_arch **out)
{
    enum tv_err rc = TV_OK;
    struct tv_arch *a = NULL;
    struct tv_config c = {.present = false};
    const struct tv_family *f = NULL;
    const struct tv_family_type *type = NULL;
    const char *quantized = NULL;

    *out = NULL;
    if (config)
        TV_TRY(tv_config_read(config, n_config, &c, err));
    if (c.present)
        f = find_family(&c, &type);
    if (f && !c.n_layers && !f->stacks) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "config.json of a %s model has no layer count",
                          f->name);
        goto out;
    }

    a = tv_calloc(1, sizeof(*a));
    if (!a) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(copy_names(a, names, n_names, err));
    TV_TRY(fill_config(a, &c, f, err));
    if (c.has_parts)
        TV_TRY(split_modalities(a, err));
    if (f)
        TV_TRY(describe_known(a, f, &c, err));
    else
        TV_TRY(describe_unknown(a, &c, names, err));
    if (c.has_parts)
        TV_TRY(describe_modalities(a, &c, names, err));
    TV_TRY(check_embedding(a, f, &c, names, err));
    if (c.has_tied)
        a->tied = c.tied;
    else
        a->tied = type ? type->tied : !has_head(a);
    link_head(a);
    quantized = tv_quantized_by(&c, names, n_names, &a->quantized_at,
                                &a->quantized_before);
    if (quantized) {
        a->quantized = tv_strdup(quantized);
        if (!a->quantized) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
            goto out;
        }
    }
    *out = a;
    a = NULL;
out:
    tv_arch_free(a);
    tv_config_free(&c);
    return rc;
}

void tv_arch_free(struct tv_arch *a)
{
    if (!a)
        return;
    tv_free(a->family);
    tv_free(a->architecture);
    tv_free(a->model_type);
    tv_free(a->dtype);
    tv_free(a->quantized);
    for (size_t i = 0; i < a->n_modules; i++)
        tv_free(a->modules[i].name);
    tv_free(a->modules);
    tv_free(a->tensors);
    tv_free(a->storage);
    tv_free(a);
}

char *tv_arch_rename(const struct tv_arch_tensor *t, int64_t layer)
{
    return tv_asprintf("%.*s%lld%s", (int)t->layer_at, t->name,
                       (long long)layer, t->name + t->layer_at + t->layer_len);
}
