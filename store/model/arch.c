/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arch.c - puts config.json, family table and tensor names together.
 *
 * A tensor of a known family is looked up as PREFIX ROW (.weight | .bias); one
 * that no row matches keeps role OTHER, is in its layer if its name says so,
 * and otherwise stands before the layers when "embed" is in its name, else
 * behind them. Families without a table go through infer.c.
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
    if (row->exact)
        return *s == '\0';
    t->is_bias = !strcmp(s, ".bias");
    return t->is_bias || !strcmp(s, ".weight");
}

static void unknown_tensor(const struct tv_family *f, struct tv_arch_tensor *t)
{
    const size_t n_layers_text = strlen(f->layers);
    const size_t n_name = strlen(t->name);

    t->role = TV_ROLE_OTHER;
    t->layer = -1;
    t->is_bias = n_name >= 5 && !strcmp(t->name + n_name - 5, ".bias");
    t->part = strstr(t->name, "embed") ? TV_PART_PRE : TV_PART_POST;
    for (const char *const *p = f->prefixes; *p; p++) {
        const size_t n = strlen(*p);
        int64_t layer = 0;
        size_t digits = 0;

        if (strncmp(t->name, *p, n) ||
            strncmp(t->name + n, f->layers, n_layers_text))
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

static void known_tensor(const struct tv_family *f, struct tv_arch_tensor *t)
{
    for (const char *const *p = f->prefixes; *p; p++) {
        const size_t n = strlen(*p);

        if (strncmp(t->name, *p, n))
            continue;
        for (const struct tv_family_row *r = f->rows; r->name; r++) {
            if (!match_row(t->name + n, r, t))
                continue;
            t->layer_at = t->layer < 0 ? 0 : t->layer_at + n;
            t->role = r->role;
            t->part = r->part;
            t->optional = r->optional || (t->is_bias && f->bias_optional &&
                                          is_linear(r->role));
            if (r->role == TV_ROLE_EMBED || r->role == TV_ROLE_LM_HEAD)
                t->vocab_dim = 0;
            return;
        }
    }
    unknown_tensor(f, t);
}

static enum tv_err check_layers(const struct tv_arch *a, struct tv_error *err)
{
    for (size_t i = 0; i < a->n_tensors; i++) {
        const struct tv_arch_tensor *const t = &a->tensors[i];

        if (t->layer >= a->n_layers)
            return tv_error_set(err, TV_E_INPUT,
                                "tensor \"%s\" is in layer %lld, but "
                                "config.json counts %lld layers",
                                t->name, (long long)t->layer,
                                (long long)a->n_layers);
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

enum tv_err tv_arch_describe(const char *config, size_t n_config,
                             const struct tv_arch_name *names, size_t n_names,
                             struct tv_error *err, struct tv_arch **out)
{
    enum tv_err rc = TV_OK;
    struct tv_arch *a = NULL;
    struct tv_config c = {.present = false};
    const struct tv_family *f = NULL;
    const struct tv_family_type *type = NULL;
    int64_t n_seen = 0;

    *out = NULL;
    if (config)
        TV_TRY(tv_config_read(config, n_config, &c, err));
    if (c.present)
        f = tv_family_find(c.model_type, c.architecture, &type);
    if (f && !c.n_layers) {
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
    if (f) {
        for (size_t i = 0; i < n_names; i++)
            known_tensor(f, &a->tensors[i]);
        TV_TRY(check_layers(a, err));
    } else {
        TV_TRY(tv_infer(a->tensors, names, n_names, a->vocab, &n_seen, err));
        /* Guessed layers cannot refute a config, but only a count that fits
         * them is one that stacking may change. */
        if (n_seen != a->n_layers)
            a->layers_key = NULL;
        if (n_seen > 0)
            a->n_layers = n_seen;
    }
    TV_TRY(check_embedding(a, f, &c, names, err));
    if (c.has_tied)
        a->tied = c.tied;
    else
        a->tied = type ? type->tied : !has_head(a);
    link_head(a);
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
    tv_free(a->tensors);
    tv_free(a->storage);
    tv_free(a);
}

char *tv_arch_rename(const struct tv_arch_tensor *t, int64_t layer)
{
    return tv_asprintf("%.*s%lld%s", (int)t->layer_at, t->name,
                       (long long)layer, t->name + t->layer_at + t->layer_len);
}
