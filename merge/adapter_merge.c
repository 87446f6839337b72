/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_merge.c - adapters in, an adapter out.
 *
 *   recipe -> adapters -> modules: the union of what they change, with the
 *   factors of each. cat and svd work on the stacks; a method of the registry
 *   sees small square tensors, one per module, that a plan and run of their own
 *   merge in OUT/.tvmerge (so filters, gradients, seeds and everything else
 *   hold as for models); PEFT's combination types are adapter_peft.c's.
 *
 * A module is held in memory whole, as fp64 factors, and nothing larger.
 */
#include "adapter_merge.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include <jansson.h>

#include "recipe.h"
#include "tv/adapt.h"
#include "tv/adapter_out.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/linalg.h"
#include "tv/sys.h"
#include "tv/text.h"

#define RANK_MAX 65536u

static double now(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory");
}

/* ---- the recipe ---------------------------------------------------------- */

static void problem(struct tvm_adapters *a, const struct tvm_node *at,
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

static bool is_adapter(const char *ref, tv_store *store)
{
    struct tv_ref *parsed = NULL;
    tv_input *in = NULL;
    struct tv_error e;
    bool yes = false;

    if (tv_ref_resolve(ref, &e, &parsed) == TV_OK && parsed->n_adapters == 0 &&
        tv_input_open(&parsed->model, store, &e, &in) == TV_OK)
        yes = tv_input_kind(in) == TV_KIND_ADAPTER;
    tv_input_close(in);
    tv_ref_free(parsed);
    return yes;
}

static enum tv_err parse(const char *path, struct tvm_arena *arena,
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
    char *text = NULL;
    size_t n = 0;
    enum tv_err rc = TV_OK;

    *yes = false;
    tvm_problems_init(&ignored);
    rc = parse(path, &arena, &ignored, err, &text, &n, &root);
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
    *yes = true;
    for (const struct tvm_node *e = models->first; e && *yes; e = e->next) {
        const struct tvm_node *m = model_of(e);
        *yes = m && is_adapter(m->text, o->store);
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
        problem(a, v, TV_E_USAGE, text);
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
        problem(a, v, TV_E_USAGE, "'rank' must be an integer from 1 to 65536");
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
        problem(a, v, TV_E_USAGE,
                "the dtype of an adapter is float32, float16 or bfloat16");
}

static void read_method(struct tvm_adapters *a, const struct tvm_node *root)
{
    const struct tvm_node *v = tvm_node_find(root, "merge_method");
    char text[400];

    if (a->peft && tvm_node_is_null(v))
        v = tvm_node_find(root, "combination_type");
    if (!v || v->kind != TVM_NODE_SCALAR) {
        problem(a, v ? v : root, TV_E_USAGE,
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
            problem(a, v, TV_E_USAGE, text);
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
        problem(a, v, TV_E_USAGE, text);
    }
    if (a->kind == AM_CAT && a->rank > 0)
        problem(a, tvm_node_find(root, "rank"), TV_E_USAGE,
                "cat keeps every rank; 'svd' gives the sum at a rank");
}

static void read_peft(struct tvm_adapters *a, const struct tvm_node *root)
{
    const struct tvm_node *p = tvm_node_find(root, "parameters");
    const struct tvm_node *v = tvm_node_find(p, "majority_sign_method");

    a->density = number_of(a, p, "density", 1);
    if (a->density < 0)
        problem(a, tvm_node_find(p, "density"), TV_E_USAGE,
                "'density' must not be negative");
    if (tvm_node_is_null(tvm_node_find(p, "density")) && a->type.prunes)
        problem(a, root, TV_E_USAGE,
                "this combination type needs 'density' in 'parameters'");
    if (tvm_node_is_null(v))
        return;
    a->frequency =
        v->kind == TVM_NODE_SCALAR && strcmp(v->text, "frequency") == 0;
    if (!a->frequency &&
        (v->kind != TVM_NODE_SCALAR || strcmp(v->text, "total") != 0))
        problem(a, v, TV_E_USAGE,
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
            problem(a, e, TV_E_USAGE,
                    "adapters are merged whole: 'models', not 'slices' or "
                    "'modules'");
    }
    if (a->kind != AM_CORE)
        warn_unknown(a, root, "key", known, n);
    known_parameters(a, root);
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

static enum tv_err open_inputs(struct tvm_adapters *a,
                               const struct tvm_node *root,
                               struct tv_error *err)
{
    const struct tvm_node *models = tvm_node_find(root, "models");

    if (!models || models->kind != TVM_NODE_LIST || models->n == 0) {
        problem(a, models ? models : root, TV_E_USAGE,
                "'models' must be a list of adapters");
        return TV_OK;
    }
    a->inputs = tv_calloc(models->n, sizeof *a->inputs);
    if (!a->inputs)
        return no_memory(err);
    for (const struct tvm_node *e = models->first; e; e = e->next) {
        const struct tvm_node *m = model_of(e);
        struct am_input *in = &a->inputs[a->n_inputs];
        struct tv_error why;
        enum tv_err rc = TV_OK;

        if (!m) {
            problem(a, e, TV_E_USAGE, "an entry of 'models' needs 'model'");
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
            return no_memory(err);
        if (rc != TV_OK)
            problem(a, m, rc == TV_E_NOTFOUND ? TV_E_INPUT : rc, why.msg);
    }
    return TV_OK;
}

/* ---- modules ------------------------------------------------------------- */

static int by_target(const void *x, const void *y)
{
    return tv_name_compare(
        (*(const struct tv_adapter_module *const *)x)->target,
        (*(const struct tv_adapter_module *const *)y)->target);
}

static bool same_shape(const struct tv_adapter_module *x,
                       const struct tv_adapter_module *y)
{
    bool same = x->in_features == y->in_features &&
                x->out_features == y->out_features &&
                x->transposed == y->transposed && x->a->rank == y->a->rank;

    for (unsigned d = 1; same && d < x->a->rank; d++)
        same = x->a->shape[d] == y->a->shape[d];
    return same;
}

/* The union of all modules; a module that an adapter lacks counts as zero. */
static enum tv_err collect_modules(struct tvm_adapters *a, struct tv_error *err)
{
    const struct tv_adapter_module **all = NULL;
    size_t n = 0, at = 0;

    for (size_t i = 0; i < a->n_inputs; i++)
        n += tv_adapter_count(a->inputs[i].adapter);
    all = tv_calloc(n + 1, sizeof *all);
    a->modules = tv_calloc(n + 1, sizeof *a->modules);
    a->of = tv_calloc((n + 1) * a->n_inputs, sizeof *a->of);
    if (!all || !a->modules || !a->of) {
        tv_free(all);
        return no_memory(err);
    }
    for (size_t i = 0; i < a->n_inputs; i++)
        for (size_t k = 0; k < tv_adapter_count(a->inputs[i].adapter); k++)
            all[at++] = tv_adapter_module(a->inputs[i].adapter, k);
    qsort(all, n, sizeof *all, by_target);
    for (size_t i = 0; i < n; i++)
        if (i == 0 || strcmp(all[i]->target, all[i - 1]->target) != 0)
            a->modules[a->n_modules++].like = all[i];
    tv_free(all);
    for (size_t m = 0; m < a->n_modules; m++) {
        struct am_module *x = &a->modules[m];
        x->of = &a->of[m * a->n_inputs];
        for (size_t i = 0; i < a->n_inputs; i++) {
            const tv_adapter *ad = a->inputs[i].adapter;
            for (size_t k = 0; k < tv_adapter_count(ad) && !x->of[i]; k++)
                if (strcmp(tv_adapter_module(ad, k)->target, x->like->target) ==
                    0)
                    x->of[i] = tv_adapter_module(ad, k);
            if (!x->of[i])
                continue;
            if (x->cols == 0)
                x->like = x->of[i]; /* names as the first one writes them */
            x->cols += (size_t)x->of[i]->r;
            if (x->of[i]->r > x->max_rank)
                x->max_rank = x->of[i]->r;
            if (!same_shape(x->like, x->of[i]))
                tvm_problem_add(
                    a->problems, true, TV_E_INPUT, "",
                    "%s: module '%s' changes another shape ([%" PRIu64
                    ", %" PRIu64 "]) than in '%s' ([%" PRIu64 ", %" PRIu64 "])",
                    a->inputs[i].ref->text, x->like->module,
                    x->of[i]->out_features, x->of[i]->in_features,
                    a->inputs[0].ref->text, x->like->out_features,
                    x->like->in_features);
        }
    }
    return TV_OK;
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* Rank of every module in the output, and of the adapter. */
static void choose_ranks(struct tvm_adapters *a)
{
    uint64_t widest = 0;

    for (size_t i = 0; i < a->n_modules; i++)
        if (a->modules[i].max_rank > widest)
            widest = a->modules[i].max_rank;
    for (size_t i = 0; i < a->n_modules; i++) {
        struct am_module *m = &a->modules[i];
        const uint64_t full =
            least(m->cols, least(m->like->in_features, m->like->out_features));
        if (a->kind == AM_PEFT)
            m->rank = tvm_peft_rank(a, m, widest);
        else if (a->kind == AM_CAT)
            m->rank = m->cols;
        else if (a->kind == AM_SVD)
            m->rank = least(full, a->rank > 0 ? a->rank : widest);
        else
            m->rank = a->rank > 0 ? least(full, a->rank) : full;
        if (m->rank > a->out_rank)
            a->out_rank = m->rank;
    }
    if (a->kind == AM_PEFT) /* one rank for all, zeros where there is less */
        for (size_t i = 0; i < a->n_modules; i++)
            a->modules[i].rank = a->out_rank;
}

/* Bytes that one module takes at most. */
static uint64_t module_bytes(const struct tvm_adapters *a,
                             const struct am_module *m)
{
    const uint64_t sides = m->like->in_features + m->like->out_features;
    const uint64_t cols = m->cols;
    uint64_t n = 8 * (4 * sides * cols + 12 * cols * cols) +
                 4 * sides * (m->rank + m->max_rank) + (1u << 20);

    if (a->kind == AM_PEFT)
        n += tvm_peft_bytes(a, m);
    return n;
}

static enum tv_err measure(struct tvm_adapters *a, struct tv_error *err)
{
    const uint64_t each = tv_dtype_bits(a->dtype) / 8u;

    (void)err;
    for (size_t i = 0; i < a->n_modules; i++) {
        const struct am_module *m = &a->modules[i];
        const uint64_t bytes = module_bytes(a, m);
        if (bytes > a->scratch)
            a->scratch = bytes;
        a->bytes_written +=
            (m->like->in_features + m->like->out_features) * m->rank * each;
        for (size_t k = 0; k < a->n_inputs; k++)
            if (m->of[k])
                a->bytes_read += m->of[k]->a->bytes + m->of[k]->b->bytes;
    }
    if (a->scratch > a->options.memory_bytes) {
        char b[32], c[32];
        tvm_problem_add(a->problems, true, TV_E_BUDGET, "",
                        "this merge needs at least --memory %s, it is %s",
                        tv_format_bytes_up(a->scratch, b, sizeof b),
                        tv_format_bytes(a->options.memory_bytes, c, sizeof c));
    }
    return TV_OK;
}

/* ---- the plan of cores --------------------------------------------------- */

static enum tv_err core_paths(struct tvm_adapters *a, const char *dir,
                              struct tvm_recipe *r, struct tv_error *err)
{
    const size_t n = r->n_slices > 0 ? r->slices[0].n_sources : 0;

    for (size_t i = 0; i < n && i < a->n_inputs; i++) {
        r->slices[0].sources[i].model.text = tvm_arena_fmt(
            &r->arena, "%s/core-%zu/adapter_model.safetensors", dir, i);
        if (!r->slices[0].sources[i].model.text)
            return no_memory(err);
    }
    r->base.text = NULL;
    r->base.line = 0;
    if (r->method && r->info.base == TVM_BASE_REQUIRED) {
        r->base.text = tvm_arena_fmt(
            &r->arena, "%s/core-base/adapter_model.safetensors", dir);
        r->base.line = r->method_line;
        r->base.col = r->method_col;
        if (!r->base.text)
            return no_memory(err);
    }
    r->dtype = r->out_dtype = TV_F32;
    return TV_OK;
}

static size_t core_rows(const struct am_module *m)
{
    return (size_t)least(m->cols, m->like->out_features);
}

static size_t core_cols(const struct am_module *m)
{
    return (size_t)least(m->cols, m->like->in_features);
}

/* b [out, r] row-major -> columns; `scale` times. */
static enum tv_err load_b(struct tvm_adapters *a, size_t input,
                          const struct tv_adapter_module *m, double *to,
                          struct tv_error *err)
{
    const size_t out = (size_t)m->out_features, r = (size_t)m->r;
    struct tv_view v = {.n_chunks = 0};
    float *row = tv_alloc((r + 1) * sizeof *row);
    enum tv_err rc = TV_OK;

    if (!row) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(tv_input_view(a->inputs[input].in, m->b, err, &v));
    for (size_t o = 0; o < out; o++) {
        tva_view_f32(a->kernels, &v, o * r, r, row);
        for (size_t k = 0; k < r; k++)
            to[k * out + o] = (double)row[k];
    }
out:
    tv_input_release(a->inputs[input].in, &v);
    tv_free(row);
    return rc;
}

/* a [r, in] row-major is its transpose column-major; `scale` times. */
static enum tv_err load_a(struct tvm_adapters *a, size_t input,
                          const struct tv_adapter_module *m, double scale,
                          double *to, struct tv_error *err)
{
    const size_t in = (size_t)m->in_features;
    struct tv_view v = {.n_chunks = 0};
    float *row = tv_alloc((in + 1) * sizeof *row);
    enum tv_err rc = TV_OK;

    if (!row) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(tv_input_view(a->inputs[input].in, m->a, err, &v));
    for (size_t k = 0; k < m->r; k++) {
        tva_view_f32(a->kernels, &v, k * in, in, row);
        for (size_t j = 0; j < in; j++)
            to[k * in + j] = scale * (double)row[j];
    }
out:
    tv_input_release(a->inputs[input].in, &v);
    tv_free(row);
    return rc;
}

/* Both stacks of a module; with weights, each adapter's factor of the sum, else
 * its scaling alone. */
static enum tv_err stacks(struct tvm_adapters *a, const struct am_module *m,
                          bool weights, double **b, double **at,
                          struct tv_error *err)
{
    const size_t out = (size_t)m->like->out_features;
    const size_t in = (size_t)m->like->in_features;
    size_t col = 0;
    enum tv_err rc = TV_OK;

    *b = tv_alloc_aligned((out * m->cols + 8) * sizeof **b);
    *at = tv_alloc_aligned((in * m->cols + 8) * sizeof **at);
    if (!*b || !*at) {
        rc = no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < a->n_inputs; i++) {
        const struct tv_adapter_module *x = m->of[i];
        if (!x)
            continue;
        TV_TRY(load_b(a, i, x, *b + col * out, err));
        TV_TRY(load_a(a, i, x, x->scaling * (weights ? a->inputs[i].weight : 1),
                      *at + col * in, err));
        col += (size_t)x->r;
    }
out:
    if (rc != TV_OK) {
        tv_free(*b);
        tv_free(*at);
        *b = *at = NULL;
    }
    return rc;
}

static enum tv_err core_of(struct tvm_adapters *a, const struct am_module *m,
                           bool weights, struct tvm_core *c,
                           struct tv_error *err)
{
    double *b = NULL, *at = NULL;
    enum tv_err rc = stacks(a, m, weights, &b, &at, err);

    if (rc != TV_OK)
        return rc;
    return tvm_core_make(c, b, at, (size_t)m->like->out_features,
                         (size_t)m->like->in_features, m->cols, err);
}

/* Writes the cores of one adapter (SIZE_MAX: zeros) as a small model. `real`:
 * values, else zeros, for planning. */
static enum tv_err write_core(struct tvm_adapters *a, tva_out *o,
                              const struct am_module *m, size_t input,
                              const struct tvm_core *c, struct tv_error *err)
{
    const size_t rows = core_rows(m), cols = core_cols(m);
    const uint64_t shape[2] = {rows, cols};
    double *x = tv_calloc(rows * cols + 1, sizeof *x);
    float *y = tv_calloc(rows * cols + 1, sizeof *y);
    size_t from = 0;
    enum tv_err rc = TV_OK;

    if (!x || !y) {
        rc = no_memory(err);
        goto out;
    }
    if (c && input != SIZE_MAX && m->of[input]) {
        for (size_t i = 0; i < input; i++)
            from += m->of[i] ? (size_t)m->of[i]->r : 0;
        tvm_core_product(c, from, from + (size_t)m->of[input]->r, x);
    }
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++)
            y[i * cols + j] = (float)x[j * rows + i];
    TV_TRY(tva_out_tensor(o, a->kernels, m->like->target, 2, shape, TV_F32, y,
                          err));
out:
    tv_free(y);
    tv_free(x);
    return rc;
}

static enum tv_err write_cores(struct tvm_adapters *a, const char *dir,
                               bool real, struct tv_error *err)
{
    const struct tv_hash none = {0, 0};
    const size_t n = a->n_inputs + 1;
    tva_out **o = tv_calloc(n, sizeof(tva_out *));
    struct tva_out_done done;
    enum tv_err rc = TV_OK;

    if (!o)
        return no_memory(err);
    for (size_t i = 0; i < n; i++) {
        char *sub = i + 1 < n ? tv_asprintf("%s/core-%zu", dir, i)
                              : tv_asprintf("%s/core-base", dir);
        rc = sub ? tva_out_open(sub, none, true, false, &done, err, &o[i])
                 : no_memory(err);
        tv_free(sub);
        if (rc != TV_OK)
            goto out;
    }
    for (size_t m = 0; m < a->n_modules; m++) {
        struct tvm_core c = {.out = 0};
        if (real)
            rc = core_of(a, &a->modules[m], false, &c, err);
        for (size_t i = 0; i < n && rc == TV_OK; i++)
            rc = write_core(a, o[i], &a->modules[m], i + 1 < n ? i : SIZE_MAX,
                            real ? &c : NULL, err);
        tvm_core_free(&c);
        if (rc != TV_OK)
            goto out;
    }
    for (size_t i = 0; i < n; i++)
        TV_TRY(tva_out_finish(o[i], "{}\n", 3, &done, err));
out:
    for (size_t i = 0; i < n; i++)
        tva_out_close(o[i]);
    tv_free(o);
    return rc;
}

static void core_options(const struct tvm_adapters *a, const char *out,
                         struct tvm_options *o)
{
    *o = a->options;
    o->store = NULL;
    o->no_cache = true;
    o->into = NULL;
    o->out_dir = out;
    o->sync = false;
    o->write_model_card = false;
    o->copy_tokenizer = false;
    o->quota_bytes = 0;
    o->shard_bytes = UINT64_MAX / 2;
    o->force = true;
}

/* Messages of the inner plan that say nothing to who wrote the recipe: warnings
 * without a place in it. */
static bool is_inner(const struct tvm_adapters *a, const struct tvm_problem *p)
{
    const size_t n = strlen(a->path);
    return !p->is_error &&
           (strncmp(p->where, a->path, n) != 0 || p->where[n] != ':');
}

/* What is wrong with method and parameters, found with cores of zeros. */
static enum tv_err plan_cores(struct tvm_adapters *a, struct tv_error *err)
{
    char *dir = tv_asprintf("%s/tvmerge-XXXXXX", P_tmpdir);
    struct tvm_problems found;
    struct tvm_recipe *r = NULL;
    struct tvm_plan *p = NULL;
    struct tvm_options o;
    bool made = false;
    enum tv_err rc = TV_OK;

    tvm_problems_init(&found);
    if (!dir) {
        rc = no_memory(err);
        goto out;
    }
    made = mkdtemp(dir) != NULL;
    if (!made) {
        rc = tv_error_set(err, TV_E_IO, "cannot make a directory %s", dir);
        goto out;
    }
    TV_TRY(write_cores(a, dir, false, err));
    rc = tvm_recipe_load(a->path, &found, err, &r);
    if (r) {
        TV_TRY(core_paths(a, dir, r, err));
        core_options(a, NULL, &o);
        rc = tvm_plan_make(r, &o, &found, err, &p);
    }
    if (found.n_errors > 0)
        rc = TV_OK;
    for (size_t i = 0; i < found.n; i++)
        if (!is_inner(a, &found.items[i]))
            tvm_problem_add(a->problems, found.items[i].is_error,
                            found.items[i].code, found.items[i].where, "%s",
                            found.items[i].message);
    if (p && p->peak_scratch_bytes > a->scratch)
        a->scratch = p->peak_scratch_bytes;
out:
    tvm_plan_free(p);
    tvm_recipe_free(r);
    tvm_problems_free(&found);
    if (made && tv_dir_remove(dir, NULL) != TV_OK && rc == TV_OK)
        rc = tv_error_set(err, TV_E_IO, "cannot remove %s", dir);
    tv_free(dir);
    return rc;
}

/* ---- planning ------------------------------------------------------------ */

static void identify(struct tvm_adapters *a)
{
    struct tv_buf b;

    tv_buf_init(&b, 64u << 20);
    tv_buf_str(&b, "tvmerge.adapter/1");
    tv_buf_le64(&b, a->peft);
    tv_buf_le64(&b, a->options.seed);
    for (size_t i = 0; i < a->n_inputs; i++) {
        tv_buf_le64(&b, a->inputs[i].fingerprint.lo);
        tv_buf_le64(&b, a->inputs[i].fingerprint.hi);
    }
    tv_buf_add(&b, a->text, a->n_text);
    a->hash = tv_hash128(b.data ? b.data : "", b.n_bytes);
    tv_buf_free(&b);
}

static uint64_t disk_of(const struct tvm_adapters *a)
{
    return 2 * a->bytes_written + (1u << 20);
}

static void too_little(struct tvm_adapters *a, const char *what, uint64_t have)
{
    char text[160], need[32], there[32];

    (void)snprintf(text, sizeof text,
                   "%s: the output needs %s (%llu bytes), %s are available",
                   what, tv_format_bytes_up(disk_of(a), need, sizeof need),
                   (unsigned long long)disk_of(a),
                   tv_format_bytes(have, there, sizeof there));
    problem(a, NULL, TV_E_NOSPACE, text);
}

static enum tv_err check_room(struct tvm_adapters *a, struct tv_error *err)
{
    const uint64_t quota = a->options.quota_bytes;
    uint64_t disk = 0;
    char *place = NULL;

    if (quota != 0 && disk_of(a) > quota)
        too_little(a, "quota", quota);
    if (!a->options.out_dir)
        return TV_OK;
    place = tv_path_existing(a->options.out_dir);
    if (!place)
        return no_memory(err);
    if (tv_disk_free(place, &disk, NULL) == TV_OK && disk_of(a) > disk)
        too_little(a, "disk", disk);
    tv_free(place);
    return TV_OK;
}

enum tv_err tvm_adapters_plan(const char *path, const struct tvm_options *o,
                              bool peft, struct tvm_problems *problems,
                              struct tv_error *err, struct tvm_adapters **out)
{
    struct tvm_adapters *a = tv_calloc(1, sizeof *a);
    const struct tvm_node *root = NULL;
    enum tv_err rc = TV_OK;

    *out = NULL;
    if (!a)
        return no_memory(err);
    a->options = *o;
    a->problems = problems;
    a->peft = peft;
    a->kernels = o->kernels ? o->kernels : tvk_table_best();
    a->path = tv_strdup(path);
    if (!a->path) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(parse(path, &a->arena, problems, err, &a->text, &a->n_text, &root));
    if (!root || root->kind != TVM_NODE_MAP)
        goto out;
    read_rank(a, root);
    read_dtype(a, root);
    read_method(a, root);
    known_keys(a, root);
    if (a->kind == AM_PEFT)
        read_peft(a, root);
    if (o->into)
        problem(a, NULL, TV_E_UNSUPPORTED,
                "--into takes models; write the adapter to OUT, then 'tvstore "
                "import'");
    if (!tva_linalg_built() && a->kind != AM_CAT)
        problem(a, NULL, TV_E_UNSUPPORTED,
                "this build has no OpenBLAS, which QR and SVD need");
    TV_TRY(open_inputs(a, root, err));
    if (problems->n_errors > 0)
        goto done;
    TV_TRY(collect_modules(a, err));
    if (a->kind == AM_PEFT)
        tvm_peft_check(a);
    choose_ranks(a);
    TV_TRY(measure(a, err));
    if (a->kind == AM_CORE && problems->n_errors == 0)
        TV_TRY(plan_cores(a, err));
    TV_TRY(check_room(a, err));
    identify(a);
done:
    *out = a;
    a = NULL;
out:
    tvm_adapters_free(a);
    return rc;
}

void tvm_adapters_free(struct tvm_adapters *a)
{
    if (!a)
        return;
    for (size_t i = 0; i < a->n_inputs; i++) {
        json_decref(a->inputs[i].config);
        tv_adapter_close(a->inputs[i].adapter);
        tv_input_close(a->inputs[i].in);
        tv_ref_free(a->inputs[i].ref);
    }
    tv_free(a->inputs);
    tv_free(a->modules);
    tv_free(a->of);
    for (size_t i = 0; i < 2; i++)
        tv_free(a->shown[i]);
    tvm_arena_free(&a->arena);
    tv_free(a->text);
    tv_free(a->path);
    tv_free(a);
}

void tvm_adapters_info(const struct tvm_adapters *a,
                       struct tvm_adapters_info *out)
{
    *out = (struct tvm_adapters_info){
        .method = a->method ? a->method : "",
        .n_inputs = a->n_inputs,
        .n_modules = a->n_modules,
        .n_tensors = 2 * a->n_modules,
        .bytes_read = a->bytes_read,
        .bytes_written = a->bytes_written,
        .peak_scratch_bytes = a->scratch,
        .peak_disk_bytes = disk_of(a),
    };
}

/* Name of a factor without the adapter's name in it, owned. */
static char *factor_name(const struct tv_input_tensor *t)
{
    static const char part[] = ".default";
    char *s = tv_strdup(t->name);
    char *hit = s ? strstr(s, part) : NULL;

    if (hit && (hit[sizeof part - 1] == '.' || hit[sizeof part - 1] == '\0') &&
        strstr(s, "lora_") < hit)
        memmove(hit, hit + sizeof part - 1, strlen(hit + sizeof part - 1) + 1);
    return s;
}

static void factor_shape(const struct am_module *m, bool b, uint64_t *shape)
{
    const struct tv_input_tensor *t = b ? m->like->b : m->like->a;

    memcpy(shape, t->shape, t->rank * sizeof *shape);
    shape[b ? 1 : 0] = m->rank;
}

void tvm_adapters_tensor(const struct tvm_adapters *a, size_t i,
                         struct tvm_adapters_tensor *out)
{
    struct am_module *m = &a->modules[i / 2];
    const bool b = i % 2 != 0;
    char **keep = &((struct tvm_adapters *)(uintptr_t)a)->shown[b];

    tv_free(*keep);
    *keep = factor_name(b ? m->like->b : m->like->a);
    *out = (struct tvm_adapters_tensor){.name = *keep ? *keep : "",
                                        .dtype = a->dtype,
                                        .rank = b ? m->like->b->rank
                                                  : m->like->a->rank};
    factor_shape(m, b, out->shape);
}

/* ---- running ------------------------------------------------------------- */

/* Factors side by side: A rows times the weight, B as it is. */
static enum tv_err make_cat(struct tvm_adapters *a, const struct am_module *m,
                            float *fa, float *fb, struct tv_error *err)
{
    const size_t out = (size_t)m->like->out_features;
    const size_t in = (size_t)m->like->in_features;
    double *b = NULL, *at = NULL;
    enum tv_err rc = stacks(a, m, true, &b, &at, err);

    if (rc != TV_OK)
        return rc;
    for (size_t k = 0; k < m->cols; k++) {
        for (size_t j = 0; j < in; j++)
            fa[k * in + j] = (float)at[k * in + j];
        for (size_t o = 0; o < out; o++)
            fb[o * m->rank + k] = (float)b[k * out + o];
    }
    tv_free(b);
    tv_free(at);
    return TV_OK;
}

enum tv_err tvm_adapters_svd(struct tvm_adapters *a, const struct am_module *m,
                             bool left, float *fa, float *fb,
                             struct tv_error *err)
{
    struct tvm_core c = {.out = 0};
    double *core = NULL;
    const size_t k = (size_t)least(core_rows(m), core_cols(m));
    enum tv_err rc = TV_OK;

    TV_TRY(core_of(a, m, true, &c, err));
    core = tv_alloc_aligned((c.kb * c.ka + 8) * sizeof *core);
    if (!core) {
        rc = no_memory(err);
        goto out;
    }
    tvm_core_product(&c, 0, c.cols, core);
    if (m->rank <= k) {
        TV_TRY(tvm_core_factor(&c, core, (size_t)m->rank, left, fa, fb, err));
        goto out;
    }
    /* Zeros behind what there is; the caller's memory is zeroed. */
    const size_t out = (size_t)m->like->out_features;
    float *narrow = tv_alloc((out * k + 1) * sizeof *narrow);
    if (!narrow) {
        rc = no_memory(err);
        goto out;
    }
    rc = tvm_core_factor(&c, core, k, left, fa, narrow, err);
    for (size_t o = 0; rc == TV_OK && o < out; o++)
        memcpy(fb + o * m->rank, narrow + o * k, k * sizeof *fb);
    tv_free(narrow);
out:
    tv_free(core);
    tvm_core_free(&c);
    return rc;
}

/* Factors of the core that the method gave. */
static enum tv_err make_core(struct tvm_adapters *a, const struct am_module *m,
                             tv_input *merged, float *fa, float *fb,
                             struct tv_error *err)
{
    const struct tv_input_tensor *t = tv_input_find(merged, m->like->target);
    const size_t rows = core_rows(m), cols = core_cols(m);
    struct tvm_core c = {.out = 0};
    struct tv_view v = {.n_chunks = 0};
    double *core = tv_alloc_aligned((rows * cols + 8) * sizeof *core);
    float *row = tv_alloc((cols + 1) * sizeof *row);
    enum tv_err rc = TV_OK;

    if (!core || !row) {
        rc = no_memory(err);
        goto out;
    }
    if (!t || t->rank != 2 || t->shape[0] != rows || t->shape[1] != cols) {
        rc = tv_error_set(err, TV_E_INTERNAL, "%s: the merged core is missing",
                          m->like->target);
        goto out;
    }
    TV_TRY(tv_input_view(merged, t, err, &v));
    for (size_t i = 0; i < rows; i++) {
        tva_view_f32(a->kernels, &v, i * cols, cols, row);
        for (size_t j = 0; j < cols; j++) {
            core[j * rows + i] = (double)row[j];
            if (!isfinite(row[j])) {
                rc = tv_error_set(err, TV_E_NONFINITE,
                                  "%s: the merged core is not finite",
                                  m->like->target);
                goto out;
            }
        }
    }
    TV_TRY(core_of(a, m, false, &c, err));
    TV_TRY(tvm_core_factor(&c, core, (size_t)m->rank, false, fa, fb, err));
out:
    tvm_core_free(&c);
    tv_input_release(merged, &v);
    tv_free(row);
    tv_free(core);
    return rc;
}

static enum tv_err put_module(struct tvm_adapters *a, struct am_module *m,
                              tv_input *merged, tva_out *o,
                              struct tv_error *err)
{
    const size_t rank = (size_t)m->rank;
    float *fa = tv_calloc((size_t)m->like->in_features * rank + 1, sizeof *fa);
    float *fb = tv_calloc((size_t)m->like->out_features * rank + 1, sizeof *fb);
    char *na = factor_name(m->like->a), *nb = factor_name(m->like->b);
    uint64_t shape[TV_RANK_MAX];
    enum tv_err rc = TV_OK;

    if (!fa || !fb || !na || !nb) {
        rc = no_memory(err);
        goto out;
    }
    if (a->kind == AM_PEFT)
        rc = tvm_peft_module(a, m, fa, fb, err);
    else if (a->kind == AM_CAT)
        rc = make_cat(a, m, fa, fb, err);
    else if (a->kind == AM_SVD)
        rc = tvm_adapters_svd(a, m, false, fa, fb, err);
    else
        rc = make_core(a, m, merged, fa, fb, err);
    TV_TRY(rc);
    factor_shape(m, false, shape);
    TV_TRY(tva_out_tensor(o, a->kernels, na, m->like->a->rank, shape, a->dtype,
                          fa, err));
    factor_shape(m, true, shape);
    TV_TRY(tva_out_tensor(o, a->kernels, nb, m->like->b->rank, shape, a->dtype,
                          fb, err));
out:
    tv_free(nb);
    tv_free(na);
    tv_free(fb);
    tv_free(fa);
    return rc;
}

/* Runs the method over the cores; *out is its result. */
static enum tv_err merge_cores(struct tvm_adapters *a, tv_input **out,
                               struct tvm_problems *problems,
                               struct tv_error *err)
{
    char *work = tv_path_join(a->options.out_dir, ".tvmerge");
    char *merged = work ? tv_path_join(work, "merged") : NULL;
    char *file = merged ? tv_path_join(merged, "model.safetensors") : NULL;
    struct tvm_recipe *r = NULL;
    struct tvm_plan *p = NULL;
    struct tvm_options o;
    struct tvm_result result;
    const struct tvm_run_hooks none = {.cancel = NULL};
    enum tv_err rc = TV_OK;

    if (!work || !merged || !file) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(write_cores(a, work, true, err));
    TV_TRY(tvm_recipe_load(a->path, problems, err, &r));
    TV_TRY(core_paths(a, work, r, err));
    core_options(a, merged, &o);
    TV_TRY(tvm_plan_make(r, &o, problems, err, &p));
    if (problems->n_errors > 0) {
        rc = tv_error_set(err, tvm_problems_code(problems), "%s",
                          problems->items[problems->n - 1].message);
        goto out;
    }
    TV_TRY(tvm_run(p, &none, &result, err));
    TV_TRY(tv_input_open_path(file, err, out));
out:
    tvm_plan_free(p);
    tvm_recipe_free(r);
    tv_free(file);
    tv_free(merged);
    tv_free(work);
    return rc;
}

static void report(const struct tvm_adapters *a,
                   const struct tvm_run_hooks *hooks, size_t n,
                   const char *name)
{
    if (!hooks || !hooks->progress)
        return;
    const struct tvm_progress p = {
        .n_done = 2 * n,
        .n_tensors = 2 * a->n_modules,
        .bytes_done = a->n_modules ? a->bytes_written * n / a->n_modules : 0,
        .bytes_total = a->bytes_written,
        .tensor = name};
    hooks->progress(hooks->arg, &p);
}

enum tv_err tvm_adapters_check(const struct tvm_adapters *a,
                               struct tv_error *err)
{
    const char *const out = a->options.out_dir;
    enum tv_err rc = TV_OK;

    if (!out)
        return TV_OK;
    for (size_t i = 0; i < a->n_inputs; i++)
        TV_TRY(tva_out_apart(out, tv_input_dir(a->inputs[i].in),
                             a->inputs[i].ref->text, err));
    if (a->options.force)
        TV_TRY(tv_out_dir_links(out, a->options.store, err));
    rc = tva_out_check(out, a->hash, a->options.force, err);
out:
    return rc;
}

enum tv_err tvm_adapters_run(struct tvm_adapters *a,
                             const struct tvm_run_hooks *hooks,
                             struct tvm_result *result, struct tv_error *err)
{
    struct tva_out_done done;
    struct tvm_problems problems;
    tva_out *o = NULL;
    tv_input *merged = NULL;
    char *config = NULL;
    const double t0 = now();
    enum tv_err rc = TV_OK;

    *result = (struct tvm_result){.n_tensors = 2 * a->n_modules};
    tvm_problems_init(&problems);
    tv_alloc_peak_reset();
    if (!a->options.out_dir) {
        rc = tv_error_set(err, TV_E_USAGE, "no output named");
        goto out;
    }
    TV_TRY(tvm_adapters_check(a, err));
    TV_TRY(tva_out_open(a->options.out_dir, a->hash, a->options.force,
                        a->options.sync, &done, err, &o));
    if (done.complete) {
        result->already_done = true;
        result->n_resumed = result->n_tensors = done.n_tensors;
        goto out;
    }
    if (a->kind == AM_CORE)
        TV_TRY(merge_cores(a, &merged, &problems, err));
    for (size_t i = 0; i < a->n_modules; i++) {
        if (hooks && hooks->cancel && *hooks->cancel != 0) {
            rc = tv_error_set(err, TV_E_INTERRUPTED, "interrupted");
            goto out;
        }
        TV_TRY(put_module(a, &a->modules[i], merged, o, err));
        report(a, hooks, i + 1, a->modules[i].like->module);
    }
    for (size_t i = 0; i < a->n_inputs; i++)
        TV_TRY(tv_input_unchanged(a->inputs[i].in, err));
    result->bytes_read = a->bytes_read;
    result->bytes_written = tva_out_bytes(o);
    TV_TRY(tvm_adapters_config(a, &config, err));
    TV_TRY(tva_out_file(o, "tvmerge_config.yml", a->text, a->n_text, err));
    tv_input_close(merged);
    merged = NULL;
    TV_TRY(tva_out_finish(o, config, strlen(config), &done, err));
out:
    if (rc == TV_OK)
        result->digest = done.digest;
    tv_input_close(merged);
    tva_out_close(o);
    tv_free(config);
    tvm_problems_free(&problems);
    result->seconds = now() - t0;
    result->peak_scratch_bytes = tv_alloc_peak();
    return rc;
}
