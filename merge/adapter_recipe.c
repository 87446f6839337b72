/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_recipe.c - a recipe that gives an adapter: is it one, what does it
 * ask for, and the adapters that it names, opened.
 *
 * cat, svd and PEFT's types know few keys, which are read here; a method in
 * Core Space has the reader of recipes for models (recipe.c) for the rest.
 */
#include "adapter_merge.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <jansson.h>

#include "tv/adapt.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"

#define RANK_MAX 65536u

void am_problem(struct tvm_adapters *a, const struct tvm_node *at,
                enum tv_err code, const char *message)
{
    char where[TVM_WHERE_MAX];

    tvm_problem_add(
        a->problems, true, code,
        at ? tvm_where(where, sizeof where, a->path, at->line, at->col) : "",
        "%s", message);
}

/* The reference of an entry of `models:`, a name or {model: name}. */
static const struct tvm_node *model_of(const struct tvm_node *entry)
{
    const struct tvm_node *m = tvm_node_find(entry, "model");

    if (m && m->kind == TVM_NODE_MAP)
        m = tvm_node_find(m, "path");
    return m && m->kind == TVM_NODE_SCALAR ? m : NULL;
}

/* Is it one? What cannot be opened is as `unopened` says. */
static bool is_adapter(const char *ref, tv_store *store, bool unopened)
{
    struct tv_ref *parsed = NULL;
    tv_input *in = NULL;
    struct tv_error e;
    bool yes = unopened;

    if (tv_ref_resolve(ref, &e, &parsed) == TV_OK) {
        if (parsed->n_adapters > 0)
            yes = false;
        else if (tv_input_open(&parsed->model, store, &e, &in) == TV_OK)
            yes = tv_input_kind(in) == TV_KIND_ADAPTER;
    }
    tv_input_close(in);
    tv_ref_free(parsed);
    return yes;
}

enum tv_err am_parse(const char *path, struct tvm_arena *arena,
                     struct tvm_problems *problems, struct tv_error *err,
                     char **text, size_t *n, const struct tvm_node **root)
{
    enum tv_err rc = TV_OK;

    *root = NULL;
    TV_TRY(tv_file_read(path, TVM_YAML_BYTES_MAX, err, text, n));
    TV_TRY(tvm_yaml_parse(path, *text, *n, arena, problems, err, root));
out:
    return rc;
}

enum tv_err tvm_adapters_wanted(const char *path, const struct tvm_options *o,
                                bool *yes, struct tv_error *err)
{
    struct tvm_arena arena = {.used = 0};
    struct tvm_problems ignored;
    const struct tvm_node *root = NULL, *models = NULL, *output = NULL;
    const struct tvm_node *method = NULL;
    char *text = NULL;
    size_t n = 0;
    enum tv_err rc = TV_OK;

    *yes = false;
    tvm_problems_init(&ignored);
    rc = am_parse(path, &arena, &ignored, err, &text, &n, &root);
    if (rc != TV_OK && rc != TV_E_NOMEM) {
        rc = TV_OK; /* the recipe's reader says it */
        goto out;
    }
    TV_TRY(rc);
    if (root && root->next)
        goto out; /* of models only */
    output = tvm_node_find(root, "output");
    models = tvm_node_find(root, "models");
    if (output) {
        *yes = output->kind == TVM_NODE_SCALAR &&
               strcmp(output->text, "adapter") == 0;
        goto out;
    }
    if (!models || models->kind != TVM_NODE_LIST || models->n == 0 ||
        !tvm_node_is_null(tvm_node_find(root, "base_model")))
        goto out;
    /* With a method that only adapters have, what is damaged or missing is an
     * adapter: as such it is complained of. */
    method = tvm_node_find(root, "merge_method");
    const bool only = method && method->kind == TVM_NODE_SCALAR &&
                      tvm_adapter_method_find(method->text) != NULL;
    *yes = true;
    for (const struct tvm_node *e = models->first; e && *yes; e = e->next) {
        const struct tvm_node *m = model_of(e);
        *yes = m && is_adapter(m->text, o->store, only);
    }
out:
    tvm_problems_free(&ignored);
    tvm_arena_free(&arena);
    tv_free(text);
    return rc;
}

/* A plain number under `key` of a parameters map. */
static double number_of(struct tvm_adapters *a, const struct tvm_node *map,
                        const char *key, double fallback)
{
    const struct tvm_node *v = tvm_node_find(map, key);
    double x = fallback;
    char text[160];

    if (tvm_node_is_null(v))
        return fallback;
    if (!tvm_node_number(v, &x)) {
        (void)snprintf(text, sizeof text, "'%s' must be one number here", key);
        am_problem(a, v, TV_E_USAGE, text);
        return fallback;
    }
    return x;
}

static void read_rank(struct tvm_adapters *a, const struct tvm_node *root)
{
    const struct tvm_node *v = tvm_node_find(root, "rank");
    double x = 0;

    if (tvm_node_is_null(v))
        v = tvm_node_find(root, "svd_rank");
    if (tvm_node_is_null(v))
        return;
    if (!tvm_node_number(v, &x) || x < 1 || x > RANK_MAX || x != floor(x))
        am_problem(a, v, TV_E_USAGE,
                   "'rank' must be an integer from 1 to 65536");
    else
        a->rank = (uint64_t)x;
}

static void read_dtype(struct tvm_adapters *a, const struct tvm_node *root)
{
    const struct tvm_node *v = tvm_node_find(root, "out_dtype");

    a->dtype = TV_F32;
    if (tvm_node_is_null(v))
        v = tvm_node_find(root, "dtype");
    if (tvm_node_is_null(v))
        return;
    a->dtype = v->kind == TVM_NODE_SCALAR ? tv_dtype_from_torch(v->text)
                                          : TV_DTYPE_NONE;
    if (!tv_dtype_is_math(a->dtype))
        am_problem(a, v, TV_E_USAGE,
                   "the dtype of an adapter is float32, float16 or bfloat16");
}

static void read_method(struct tvm_adapters *a, const struct tvm_node *root)
{
    const struct tvm_node *v = tvm_node_find(root, "merge_method");
    char text[400];

    if (a->peft && tvm_node_is_null(v))
        v = tvm_node_find(root, "combination_type");
    if (!v || v->kind != TVM_NODE_SCALAR) {
        am_problem(a, v ? v : root, TV_E_USAGE,
                   "'merge_method' is missing, or no name");
        return;
    }
    a->method = v->text;
    if (a->peft) {
        a->kind = AM_PEFT;
        if (!tvm_peft_type(v->text, &a->type)) {
            (void)snprintf(text, sizeof text,
                           "'%s' is no combination type of PEFT (known: %s)",
                           v->text, TVM_PEFT_TYPES);
            am_problem(a, v, TV_E_USAGE, text);
        }
        return;
    }
    a->kind = strcmp(v->text, "cat") == 0   ? AM_CAT
              : strcmp(v->text, "svd") == 0 ? AM_SVD
                                            : AM_CORE;
    if (a->kind == AM_CORE && !tvm_method_find(v->text)) {
        struct tvm_peft_type type;
        (void)snprintf(text, sizeof text,
                       tvm_peft_type(v->text, &type)
                           ? "'%s' is a combination type of PEFT: add "
                             "--compat peft"
                           : "'%s' merges no adapters: cat, svd, or a method "
                             "of 'tvmerge methods' in Core Space",
                       v->text);
        am_problem(a, v, TV_E_USAGE, text);
    }
    if (a->kind == AM_CAT && a->rank > 0)
        am_problem(a, tvm_node_find(root, "rank"), TV_E_USAGE,
                   "cat keeps every rank; 'svd' gives the sum at a rank");
}

static void read_peft(struct tvm_adapters *a, const struct tvm_node *root)
{
    const struct tvm_node *p = tvm_node_find(root, "parameters");
    const struct tvm_node *v = tvm_node_find(p, "majority_sign_method");

    a->density = number_of(a, p, "density", 1);
    if (a->density < 0)
        am_problem(a, tvm_node_find(p, "density"), TV_E_USAGE,
                   "'density' must not be negative");
    if (tvm_node_is_null(tvm_node_find(p, "density")) && a->type.prunes)
        am_problem(a, root, TV_E_USAGE,
                   "this combination type needs 'density' in 'parameters'");
    if (tvm_node_is_null(v))
        return;
    a->frequency =
        v->kind == TVM_NODE_SCALAR && strcmp(v->text, "frequency") == 0;
    if (!a->frequency &&
        (v->kind != TVM_NODE_SCALAR || strcmp(v->text, "total") != 0))
        am_problem(a, v, TV_E_USAGE,
                   "'majority_sign_method' is total or frequency");
}

/* Warns of the keys of a map that nothing here reads. */
static void warn_unknown(struct tvm_adapters *a, const struct tvm_node *map,
                         const char *what, const char *const *known, size_t n)
{
    for (const struct tvm_node *e = map ? map->first : NULL; e; e = e->next) {
        char where[TVM_WHERE_MAX];
        char name[80];
        const char *like = NULL;
        bool found = map->kind != TVM_NODE_MAP;
        for (size_t i = 0; i < n && !found; i++)
            found = strcmp(known[i], e->key) == 0;
        if (found)
            continue;
        like = tv_suggest(e->key, known, n);
        tvm_problem_add(
            a->problems, false, TV_OK,
            tvm_where(where, sizeof where, a->path, e->key_line, e->key_col),
            "unknown %s '%s' is ignored%s%s%s", what,
            tv_text_printable(e->key, name, sizeof name),
            like ? "; did you mean '" : "", like ? like : "", like ? "'?" : "");
    }
}

/* Of cat, svd and PEFT's types; a method in Core Space has a recipe's reader
 * for it. */
static void known_parameters(struct tvm_adapters *a,
                             const struct tvm_node *root)
{
    static const char *const entry[] = {"model", "parameters"};
    static const char *const weight[] = {"weight"};
    static const char *const of_all[] = {"density", "majority_sign_method"};
    const struct tvm_node *models = tvm_node_find(root, "models");

    if (a->kind == AM_CORE)
        return;
    warn_unknown(a, tvm_node_find(root, "parameters"), "parameter", of_all,
                 a->peft ? 2 : 0);
    for (const struct tvm_node *e =
             models && models->kind == TVM_NODE_LIST ? models->first : NULL;
         e; e = e->next) {
        if (e->kind != TVM_NODE_MAP)
            continue;
        warn_unknown(a, e, "key", entry, 2);
        warn_unknown(a, tvm_node_find(e, "parameters"), "parameter", weight, 1);
    }
}

static void known_keys(struct tvm_adapters *a, const struct tvm_node *root)
{
    static const char *const known[] = {
        "merge_method", "combination_type", "output",     "rank",
        "svd_rank",     "models",           "base_model", "dtype",
        "out_dtype",    "parameters"};
    const size_t n = sizeof known / sizeof *known;

    for (const struct tvm_node *e = root->first; e; e = e->next) {
        if (strcmp(e->key, "slices") == 0 || strcmp(e->key, "modules") == 0)
            am_problem(a, e, TV_E_USAGE,
                       "adapters are merged whole: 'models', not 'slices' or "
                       "'modules'");
    }
    if (a->kind != AM_CORE)
        warn_unknown(a, root, "key", known, n);
    known_parameters(a, root);
}

void am_recipe_read(struct tvm_adapters *a, const struct tvm_node *root)
{
    read_rank(a, root);
    read_dtype(a, root);
    read_method(a, root);
    known_keys(a, root);
    if (a->kind == AM_PEFT)
        read_peft(a, root);
}

/* ---- inputs -------------------------------------------------------------- */

static enum tv_err refuse_changes(const tv_adapter *ad, struct tv_error *err)
{
    const char *label = tv_input_label(tv_adapter_input(ad));

    for (size_t i = 0; i < tv_adapter_count(ad); i++) {
        const struct tv_adapter_module *m = tv_adapter_module(ad, i);
        if (m->kind == TV_CHANGE_LOW_RANK && !m->magnitude && !m->n_experts)
            continue;
        return tv_error_set(
            err, TV_E_UNSUPPORTED,
            "%s: tensor '%s': %s cannot be merged into an adapter; merge it "
            "into its base instead (MODEL+ADAPTER)",
            label, m->magnitude ? m->magnitude->name : m->a->name,
            m->magnitude                ? "DoRA"
            : m->n_experts              ? "LoRA on expert parameters"
            : m->kind == TV_CHANGE_ADD  ? "a bias of lora_B"
            : m->kind == TV_CHANGE_ROWS ? "trained tokens"
                                        : "a fully trained tensor");
    }
    return TV_OK;
}

static enum tv_err open_input(struct tvm_adapters *a, struct am_input *in,
                              const char *ref, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    bool found = false;
    char *text = NULL;
    size_t n = 0;

    TV_TRY(tv_ref_resolve(ref, err, &in->ref));
    if (in->ref->n_adapters > 0) {
        rc = tv_error_set(err, TV_E_INPUT,
                          "'%s' is a model with adapters; with an adapter as "
                          "output every input is an adapter alone",
                          ref);
        goto out;
    }
    TV_TRY(tv_input_open(&in->ref->model, a->options.store, err, &in->in));
    if (tv_input_kind(in->in) != TV_KIND_ADAPTER) {
        rc = tv_error_set(err, TV_E_INPUT,
                          "'%s' is no adapter, but the output is one", ref);
        goto out;
    }
    TV_TRY(tv_adapter_open(in->in, err, &in->adapter));
    TV_TRY(refuse_changes(in->adapter, err));
    TV_TRY(tva_adapter_check(in->adapter, a->kernels, err));
    TV_TRY(tv_input_fingerprint(in->in, &in->fingerprint, err));
    TV_TRY(tv_input_side_read(in->in, "adapter_config.json", &found, &text, &n,
                              err));
    TV_TRY(tv_json_parse(text, n, ref, err, &in->config));
out:
    tv_free(text);
    return rc;
}

enum tv_err am_open_inputs(struct tvm_adapters *a, const struct tvm_node *root,
                           struct tv_error *err)
{
    const struct tvm_node *models = tvm_node_find(root, "models");

    if (!models || models->kind != TVM_NODE_LIST || models->n == 0) {
        am_problem(a, models ? models : root, TV_E_USAGE,
                   "'models' must be a list of adapters");
        return TV_OK;
    }
    a->inputs = tv_calloc(models->n, sizeof *a->inputs);
    if (!a->inputs)
        return am_no_memory(err);
    for (const struct tvm_node *e = models->first; e; e = e->next) {
        const struct tvm_node *m = model_of(e);
        struct am_input *in = &a->inputs[a->n_inputs];
        struct tv_error why;
        enum tv_err rc = TV_OK;

        if (!m) {
            am_problem(a, e, TV_E_USAGE, "an entry of 'models' needs 'model'");
            continue;
        }
        a->n_inputs++;
        in->weight =
            a->kind == AM_CORE
                ? 1
                : number_of(a, tvm_node_find(e, "parameters"), "weight", 1);
        tv_error_clear(&why);
        rc = open_input(a, in, m->text, &why);
        if (rc == TV_E_NOMEM)
            return am_no_memory(err);
        if (rc != TV_OK) {
            char text[sizeof why.msg + sizeof why.hint + 4];
            (void)snprintf(text, sizeof text, "%s%s%s%s", why.msg,
                           why.hint[0] ? " (" : "", why.hint,
                           why.hint[0] ? ")" : "");
            am_problem(a, m, rc == TV_E_NOTFOUND ? TV_E_INPUT : rc, text);
        }
    }
    return TV_OK;
}
