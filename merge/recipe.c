/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recipe.c - mergekit's recipe language: tree -> checked recipe.
 *
 * Everything that can be judged without opening a model is judged here, with
 * line and column. What mergekit ignores silently (unknown keys) is a warning
 * with a suggestion; what it reads and we do not is refused, because the result
 * would differ.
 */
#include "recipe.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "chat.h"
#include "params.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"

#define N_OF(a) (sizeof(a) / sizeof((a)[0]))

struct reader {
    struct tvm_recipe *r;
    struct tvm_problems *problems;
    bool several; /* documents in the file */
    bool oom;
};

/* ---- messages -------------------------------------------------------------
 */

static void error_at(struct reader *rd, enum tv_err code, unsigned line,
                     unsigned col, const char *message)
{
    char where[TVM_WHERE_MAX];
    tvm_problem_add(rd->problems, true, code,
                    tvm_where(where, sizeof(where), rd->r->path, line, col),
                    "%s", message);
}

static void error_node(struct reader *rd, const struct tvm_node *node,
                       const char *message)
{
    error_at(rd, TV_E_USAGE, node->line, node->col, message);
}

static void error_key(struct reader *rd, enum tv_err code,
                      const struct tvm_node *entry, const char *message)
{
    error_at(rd, code, entry->key_line, entry->key_col, message);
}

static void unknown_key(struct reader *rd, const struct tvm_node *e,
                        const char *const *known, size_t n_known)
{
    char where[TVM_WHERE_MAX];
    char name[80];
    const char *like = NULL;
    (void)tvm_where(where, sizeof(where), rd->r->path, e->key_line, e->key_col);
    (void)tv_text_printable(e->key, name, sizeof(name));
    if (tvm_dead_key(e->key)) {
        tvm_problem_add(rd->problems, false, TV_OK, where,
                        "'%s' has no effect (nor in mergekit)", name);
        return;
    }
    for (size_t i = 0; i < rd->r->info.n_params; i++) {
        if (strcmp(rd->r->info.params[i].name, e->key) == 0) {
            tvm_problem_add(rd->problems, false, TV_OK, where,
                            "'%s' is ignored here; parameters belong under "
                            "'parameters:'",
                            name);
            return;
        }
    }
    like = tv_suggest(e->key, known, n_known);
    tvm_problem_add(rd->problems, false, TV_OK, where,
                    "unknown key '%s' is ignored%s%s%s", name,
                    like == NULL ? "" : "; did you mean '",
                    like == NULL ? "" : like, like == NULL ? "" : "'?");
}

static void unknown_keys(struct reader *rd, const struct tvm_node *map,
                         const char *const *known, size_t n_known)
{
    for (const struct tvm_node *e = map->first; e != NULL; e = e->next) {
        bool found = false;
        for (size_t i = 0; i < n_known && !found; i++)
            found = strcmp(e->key, known[i]) == 0;
        if (!found)
            unknown_key(rd, e, known, n_known);
    }
}

/* A present, non-null entry. */
static const struct tvm_node *given(const struct tvm_node *map, const char *key)
{
    const struct tvm_node *const e = tvm_node_find(map, key);
    return tvm_node_is_null(e) ? NULL : e;
}

/* Two of what a recipe has one of: for mergekit an empty one is not there. */
static void leave_filled(const struct tvm_node **a, const struct tvm_node **b)
{
    if (*a == NULL || *b == NULL)
        return;
    if ((*b)->kind != TVM_NODE_SCALAR && (*b)->n == 0)
        *b = NULL;
    else if ((*a)->kind != TVM_NODE_SCALAR && (*a)->n == 0)
        *a = NULL;
}

/* ---- pieces ---------------------------------------------------------------
 */

static bool is_text(const struct tvm_node *node)
{
    return node->kind == TVM_NODE_SCALAR && node->n_text > 0 &&
           memchr(node->text, '\0', node->n_text) == NULL;
}

/* "path" or {path, revision}; NULL after a problem. */
static const char *read_ref_part(struct reader *rd, const struct tvm_node *node)
{
    static const char *const keys[] = {"path", "revision"};
    const struct tvm_node *path = NULL;
    const struct tvm_node *revision = NULL;
    const char *s = NULL;
    if (node->kind == TVM_NODE_SCALAR) {
        if (is_text(node))
            return node->text;
        error_node(rd, node, "a model reference is empty");
        return NULL;
    }
    if (node->kind != TVM_NODE_MAP) {
        error_node(rd, node, "a model reference is a name or {path, revision}");
        return NULL;
    }
    unknown_keys(rd, node, keys, N_OF(keys));
    path = given(node, "path");
    revision = given(node, "revision");
    if (path == NULL || !is_text(path)) {
        error_node(rd, path == NULL ? node : path,
                   "a model reference needs 'path'");
        return NULL;
    }
    if (revision == NULL)
        return path->text;
    if (!is_text(revision)) {
        error_node(rd, revision, "'revision' must be a name");
        return NULL;
    }
    s = tvm_arena_fmt(&rd->r->arena, "%s@%s", path->text, revision->text);
    rd->oom = rd->oom || s == NULL;
    return s;
}

/* mergekit takes one adapter, no factor and no store object. */
static void note_syntax(struct reader *rd, const char *ref)
{
    const char *const plus = strchr(ref, '+');
    if (strncmp(ref, "store:", 6) == 0 ||
        (plus != NULL &&
         (strchr(plus + 1, '+') != NULL || strchr(plus + 1, '*') != NULL ||
          strncmp(plus + 1, "store:", 6) == 0)))
        rd->r->mergekit_syntax = false;
}

const struct tvm_recipe_override *
tvm_recipe_override_of(const struct tvm_recipe *r, const char *ref)
{
    const struct tvm_recipe_override *o = r->overrides;
    while (o != NULL && strcmp(o->ref, ref) != 0)
        o = o->next;
    return o;
}

/* References compare as strings, so a model is of one class throughout. */
static void add_override(struct reader *rd, const char *ref,
                         const struct tvm_node *arch)
{
    const struct tvm_recipe_override *const known =
        tvm_recipe_override_of(rd->r, ref);
    struct tvm_recipe_override *o = NULL;

    if (known != NULL && strcmp(known->architecture, arch->text) != 0)
        error_node(rd, arch,
                   "this model is given another 'override_architecture' "
                   "elsewhere");
    if (known != NULL)
        return;
    o = tvm_arena_get(&rd->r->arena, 1, sizeof(*o));
    if (o == NULL) {
        rd->oom = true;
        return;
    }
    o->ref = ref;
    o->architecture = arch->text;
    o->line = arch->line;
    o->col = arch->col;
    o->next = rd->r->overrides;
    rd->r->overrides = o;
}

static struct tvm_recipe_ref read_ref(struct reader *rd,
                                      const struct tvm_node *node)
{
    static const char *const keys[] = {"model", "lora", "override_architecture",
                                       "path", "revision"};
    struct tvm_recipe_ref ref = {NULL, node->line, node->col};
    const struct tvm_node *model = NULL;
    const struct tvm_node *lora = NULL;
    const struct tvm_node *arch = NULL;
    const char *second = NULL;

    if (node->kind != TVM_NODE_MAP || tvm_node_find(node, "path") != NULL) {
        ref.text = read_ref_part(rd, node);
    } else {
        unknown_keys(rd, node, keys, 3);
        model = given(node, "model");
        lora = given(node, "lora");
        arch = given(node, "override_architecture");
        if (arch != NULL && !is_text(arch))
            error_node(rd, arch, "'override_architecture' must be a name");
        if (model == NULL) {
            error_node(rd, node, "a model reference needs 'model'");
            return ref;
        }
        ref.text = read_ref_part(rd, model);
        if (ref.text != NULL && lora != NULL) {
            second = read_ref_part(rd, lora);
            ref.text = second == NULL ? NULL
                                      : tvm_arena_fmt(&rd->r->arena, "%s+%s",
                                                      ref.text, second);
            rd->oom = rd->oom || (second != NULL && ref.text == NULL);
        }
        if (arch != NULL && is_text(arch) && ref.text != NULL)
            add_override(rd, ref.text, arch);
    }
    if (ref.text != NULL)
        note_syntax(rd, ref.text);
    return ref;
}

static const struct tvm_node *
read_parameters(struct reader *rd, const struct tvm_node *map, bool *bad)
{
    const struct tvm_node *const p = given(map, "parameters");
    if (p == NULL)
        return NULL;
    if (p->kind != TVM_NODE_MAP) {
        *bad = true;
        error_node(rd, p, "'parameters' must be a map of names to settings");
        return NULL;
    }
    tvm_params_check(rd->r, p, rd->problems);
    return p;
}

static enum tv_dtype read_dtype(struct reader *rd, const struct tvm_node *node)
{
    static const char *const often[][2] = {
        {"bf16", "bfloat16"},  {"fp16", "float16"}, {"half", "float16"},
        {"f16", "float16"},    {"fp32", "float32"}, {"f32", "float32"},
        {"float", "float32"},  {"fp64", "float64"}, {"f64", "float64"},
        {"double", "float64"}, {"auto", NULL}};
    static const char *const names[] = {"float16", "bfloat16", "float32",
                                        "float64"};
    char text[48];
    char message[200];
    const char *name = node->text;
    const char *like = NULL;

    if (node->kind != TVM_NODE_SCALAR) {
        error_node(rd, node, "a dtype is float16, bfloat16 or float32");
        return TV_DTYPE_NONE;
    }
    if (strncmp(name, "torch.", 6) == 0)
        name += 6;
    if (strcmp(name, "float16") == 0)
        return TV_F16;
    if (strcmp(name, "bfloat16") == 0)
        return TV_BF16;
    if (strcmp(name, "float32") == 0)
        return TV_F32;
    if (strcmp(name, "float64") == 0)
        return TV_F64;
    if (strcmp(name, "int64") == 0) {
        error_at(rd, TV_E_UNSUPPORTED, node->line, node->col,
                 "dtype int64 would cut every weight to a whole number: use "
                 "float16, bfloat16 or float32");
        return TV_DTYPE_NONE;
    }
    for (size_t i = 0; i < N_OF(often) && like == NULL; i++) {
        if (strcmp(name, often[i][0]) == 0)
            like = often[i][1];
    }
    if (like == NULL)
        like = tv_suggest(name, names, N_OF(names));
    (void)snprintf(message, sizeof(message),
                   "unknown dtype '%s': use float16, bfloat16, float32 or "
                   "float64%s%s%s",
                   tv_text_printable(node->text, text, sizeof(text)),
                   like == NULL ? "" : "; did you mean '",
                   like == NULL ? "" : like, like == NULL ? "" : "'?");
    error_node(rd, node, message);
    return TV_DTYPE_NONE;
}

/* Sums run in fp64 whatever a recipe says; files hold at most float32. */
static void note_float64(struct reader *rd, const struct tvm_node *root)
{
    const struct tvm_recipe *const r = rd->r;
    const struct tvm_node *const e =
        r->out_dtype == TV_F64 ? given(root, "out_dtype")
        : r->dtype == TV_F64 && r->out_dtype == TV_DTYPE_NONE && !r->bad_dtype
            ? given(root, "dtype")
            : NULL;
    char where[TVM_WHERE_MAX];
    if (e != NULL)
        tvm_problem_add(
            rd->problems, false, TV_OK,
            tvm_where(where, sizeof(where), r->path, e->line, e->col),
            "float64: sums run in fp64 in any case, the result is stored as "
            "float32");
}

static bool read_layer(const struct tvm_node *node, int64_t *out)
{
    double v = 0;
    if (!tvm_node_number(node, &v) || v != floor(v) || fabs(v) > 1e9)
        return false;
    *out = (int64_t)v;
    return true;
}

static void read_range(struct reader *rd, const struct tvm_node *map,
                       struct tvm_recipe_source *s)
{
    const struct tvm_node *const range = given(map, "layer_range");
    if (range == NULL) {
        error_node(rd, map,
                   "a source of a slice needs layer_range: [from, to]");
        return;
    }
    s->range_line = range->line;
    s->range_col = range->col;
    if (range->kind != TVM_NODE_LIST || range->n != 2 ||
        !read_layer(range->first, &s->from) ||
        !read_layer(range->first->next, &s->to)) {
        error_node(rd, range,
                   "layer_range takes two whole numbers, [from, to]; the "
                   "second is not included");
        return;
    }
    if (s->from < 0 || s->to < s->from) {
        error_node(rd, range,
                   "layer_range must not be negative or run backwards");
        return;
    }
    s->has_range = true;
}

static void read_count(struct reader *rd, const struct tvm_node *map,
                       const char *key, uint64_t least, uint64_t *out)
{
    const struct tvm_node *const e = given(map, key);
    char message[120];
    int64_t n = 0;
    if (e == NULL)
        return;
    if (read_layer(e, &n) && n >= (int64_t)least && n <= 1 << 24) {
        *out = (uint64_t)n;
        return;
    }
    (void)snprintf(message, sizeof(message),
                   "'%s' must be a whole number from %llu to 16777216", key,
                   (unsigned long long)least);
    error_node(rd, e, message);
}

static void read_texts(struct reader *rd, const struct tvm_node *node,
                       struct tvm_calibration *c)
{
    const size_t n = node->kind == TVM_NODE_LIST ? node->n : 1;
    const struct tvm_node *e = node->kind == TVM_NODE_LIST ? node->first : node;
    c->texts = tvm_arena_get(&rd->r->arena, n + 1, sizeof(*c->texts));
    c->places = tvm_arena_get(&rd->r->arena, n + 1, sizeof(*c->places));
    if (c->texts == NULL || c->places == NULL) {
        rd->oom = true;
        return;
    }
    for (size_t i = 0; i < n; i++, e = e->next) {
        char where[TVM_WHERE_MAX];
        if (!is_text(e)) {
            error_node(rd, e, "'text' is the name of a file or a list of them");
            return;
        }
        c->texts[i] = e->text;
        c->places[i] = tvm_arena_strdup(
            &rd->r->arena,
            tvm_where(where, sizeof(where), rd->r->path, e->line, e->col));
        if (c->places[i] == NULL) {
            rd->oom = true;
            return;
        }
        c->n_texts++;
    }
    if (n == 0)
        error_node(rd, node, "'text' names no file");
}

/* calibration: {text: FILE | [FILE, ...], samples, context} or {random: true}
 */
static const struct tvm_calibration *
read_calibration(struct reader *rd, const struct tvm_node *map)
{
    static const char *const keys[] = {"text", "samples", "context", "random"};
    const struct tvm_node *const node = given(map, "calibration");
    struct tvm_calibration *c = NULL;
    if (node == NULL)
        return NULL;
    if (node->kind != TVM_NODE_MAP) {
        error_node(rd, node,
                   "'calibration' is a map: {text: [FILE, ...], samples: 128, "
                   "context: 512}");
        return NULL;
    }
    unknown_keys(rd, node, keys, N_OF(keys));
    c = tvm_arena_get(&rd->r->arena, 1, sizeof(*c));
    if (c == NULL) {
        rd->oom = true;
        return NULL;
    }
    const struct tvm_node *const text = given(node, "text");
    const struct tvm_node *const random = given(node, "random");
    if (random != NULL && !tvm_node_bool(random, &c->random))
        error_node(rd, random, "'random' is true or false");
    if (text != NULL)
        read_texts(rd, text, c);
    if ((text != NULL) == c->random)
        error_node(rd, node,
                   c->random ? "'calibration' has either 'text' or 'random: "
                               "true', not both"
                             : "'calibration' needs 'text': the name of a file "
                               "or a list of them");
    /* What is wrong with a number hides nothing of the texts. */
    read_count(rd, node, "samples", 1, &c->samples);
    read_count(rd, node, "context", 2, &c->context);
    return c;
}

/* ---- models and slices ----------------------------------------------------
 */

static void read_source(struct reader *rd, const struct tvm_node *node,
                        bool whole, struct tvm_recipe_source *out)
{
    static const char *const keys[] = {"model", "parameters", "calibration",
                                       "layer_range"};
    const struct tvm_node *model = NULL;
    if (node->kind != TVM_NODE_MAP) {
        error_node(rd, node, "an entry is a map: '- model: NAME'");
        return;
    }
    for (const struct tvm_node *e = node->first; e != NULL; e = e->next) {
        if (strcmp(e->key, "model") == 0 || strcmp(e->key, "parameters") == 0 ||
            strcmp(e->key, "calibration") == 0)
            continue;
        if (strcmp(e->key, "layer_range") != 0) {
            unknown_key(rd, e, keys, whole ? 3 : 4);
        } else if (whole) {
            char where[TVM_WHERE_MAX];
            tvm_problem_add(rd->problems, false, TV_OK,
                            tvm_where(where, sizeof(where), rd->r->path,
                                      e->key_line, e->key_col),
                            "layer_range is ignored here; it belongs to the "
                            "sources of 'slices:'");
        }
    }
    model = given(node, "model");
    if (model == NULL)
        error_node(rd, node, "an entry needs 'model'");
    else
        out->model = read_ref(rd, model);
    if (!whole)
        read_range(rd, node, out);
    out->parameters = read_parameters(rd, node, &out->bad_parameters);
    out->calibration = read_calibration(rd, node);
}

/* The list of one slice; duplicates are found here since references compare as
 * strings. */
static void read_sources(struct reader *rd, const struct tvm_node *list,
                         bool whole, struct tvm_recipe_slice *slice)
{
    size_t n = 0;
    if (list->kind != TVM_NODE_LIST || list->n == 0) {
        error_node(rd, list,
                   whole ? "'models' must be a list of {model, parameters}"
                         : "'sources' must be a list of {model, layer_range}");
        return;
    }
    slice->sources =
        tvm_arena_get(&rd->r->arena, list->n, sizeof(*slice->sources));
    if (slice->sources == NULL) {
        rd->oom = true;
        return;
    }
    for (const struct tvm_node *e = list->first; e != NULL; e = e->next, n++) {
        struct tvm_recipe_source *const s = &slice->sources[n];
        read_source(rd, e, whole, s);
        if (n >= TVK_DONORS_MAX)
            continue;
        for (size_t i = 0; i < n && s->model.text != NULL; i++) {
            char name[200];
            char message[320];
            if (slice->sources[i].model.text == NULL ||
                strcmp(slice->sources[i].model.text, s->model.text) != 0)
                continue;
            (void)snprintf(message, sizeof(message),
                           "model '%s' is listed twice%s (first in line %u)",
                           tv_text_printable(s->model.text, name, sizeof(name)),
                           whole ? "" : " in this slice",
                           slice->sources[i].model.line);
            error_at(rd, TV_E_USAGE, s->model.line, s->model.col, message);
            break;
        }
    }
    slice->n_sources = n;
    if (n > TVK_DONORS_MAX)
        error_node(rd, list, "too many models: at most 128 can be merged");
}

static void read_models(struct reader *rd, const struct tvm_node *models)
{
    struct tvm_recipe_slice *const s = &rd->r->slices[rd->r->n_slices++];
    s->line = models->line;
    s->col = models->col;
    s->whole = true;
    read_sources(rd, models, true, s);
}

static void read_slice(struct reader *rd, const struct tvm_node *node,
                       struct tvm_recipe_slice *slice)
{
    static const char *const keys[] = {"sources", "base_model", "parameters",
                                       "residual_weight"};
    const struct tvm_node *sources = NULL;
    const struct tvm_node *base = NULL;
    slice->line = node->line;
    slice->col = node->col;
    if (node->kind != TVM_NODE_MAP) {
        error_node(rd, node, "a slice is a map: '- sources: [...]'");
        return;
    }
    unknown_keys(rd, node, keys, N_OF(keys));
    sources = given(node, "sources");
    base = given(node, "base_model");
    if (sources == NULL)
        error_node(rd, node, "a slice needs 'sources'");
    else
        read_sources(rd, sources, false, slice);
    if (base != NULL)
        slice->base = read_ref(rd, base);
    slice->parameters = read_parameters(rd, node, &slice->bad_parameters);
    for (size_t i = 1; i < slice->n_sources; i++) {
        const struct tvm_recipe_source *const a = &slice->sources[0];
        const struct tvm_recipe_source *const b = &slice->sources[i];
        char message[200];
        if (!a->has_range || !b->has_range ||
            a->to - a->from == b->to - b->from)
            continue;
        (void)snprintf(message, sizeof(message),
                       "sources of one slice need ranges of equal length: "
                       "this one has %lld layers, the first has %lld",
                       (long long)(b->to - b->from),
                       (long long)(a->to - a->from));
        error_at(rd, TV_E_USAGE, b->range_line, b->range_col, message);
    }
}

static void read_slices(struct reader *rd, const struct tvm_node *slices)
{
    if (slices->kind != TVM_NODE_LIST || slices->n == 0) {
        error_node(rd, slices, "'slices' must be a list of {sources: [...]}");
        return;
    }
    for (const struct tvm_node *e = slices->first; e != NULL; e = e->next)
        read_slice(rd, e, &rd->r->slices[rd->r->n_slices++]);
}

/* How many slices a map with `models` or `slices` makes, at most. */
static size_t count_slices(const struct tvm_node *map)
{
    const struct tvm_node *const slices = given(map, "slices");
    return 1 +
           (slices != NULL && slices->kind == TVM_NODE_LIST ? slices->n : 0);
}

/* `models` or `slices` of a recipe or a module, into room made before. */
static void read_parts(struct reader *rd, const struct tvm_node *map,
                       const char *what)
{
    const struct tvm_node *models = given(map, "models");
    const struct tvm_node *slices = given(map, "slices");
    char message[80];

    leave_filled(&models, &slices);
    if (models != NULL && slices != NULL) {
        (void)snprintf(message, sizeof(message),
                       "a %s has either 'models' or 'slices', not both", what);
        error_key(rd, TV_E_USAGE, slices, message);
    }
    if (models != NULL)
        read_models(rd, models);
    else if (slices != NULL)
        read_slices(rd, slices);
    else
        error_node(rd, map, "'models' or 'slices' is missing");
}

static void read_modules(struct reader *rd, const struct tvm_node *modules)
{
    static const char *const keys[] = {"models", "slices", "parameters"};
    struct tvm_recipe *const r = rd->r;
    size_t n = 0;

    if (modules->kind != TVM_NODE_MAP || modules->n == 0) {
        error_node(rd, modules,
                   "'modules' must be a map of names to {models} or {slices}");
        return;
    }
    for (const struct tvm_node *e = modules->first; e != NULL; e = e->next)
        n += count_slices(e);
    r->modules = tvm_arena_get(&r->arena, modules->n, sizeof(*r->modules));
    r->slices = tvm_arena_get(&r->arena, n, sizeof(*r->slices));
    if (r->modules == NULL || r->slices == NULL) {
        rd->oom = true;
        return;
    }
    for (const struct tvm_node *e = modules->first; e != NULL; e = e->next) {
        struct tvm_recipe_module *const m = &r->modules[r->n_modules++];
        m->name = e->key;
        m->line = e->key_line;
        m->col = e->key_col;
        m->first = r->n_slices;
        if (e->kind != TVM_NODE_MAP) {
            error_node(rd, e, "a module takes a map: {models} or {slices}");
            continue;
        }
        unknown_keys(rd, e, keys, N_OF(keys));
        read_parts(rd, e, "module");
        m->parameters = read_parameters(rd, e, &m->bad_parameters);
        m->n = r->n_slices - m->first;
    }
}

static void read_what(struct reader *rd, const struct tvm_node *root)
{
    struct tvm_recipe *const r = rd->r;
    const struct tvm_node *modules = given(root, "modules");
    const struct tvm_node *models = given(root, "models");
    const struct tvm_node *slices = given(root, "slices");

    leave_filled(&models, &slices);
    leave_filled(&models, &modules);
    leave_filled(&slices, &modules);
    if (modules != NULL) {
        const struct tvm_node *const other = models != NULL ? models : slices;
        if (other != NULL)
            error_key(rd, TV_E_USAGE, other,
                      "a recipe has either 'modules' or 'models' or 'slices'");
        read_modules(rd, modules);
        return;
    }
    r->whole_models = models != NULL;
    r->slices =
        tvm_arena_get(&r->arena, count_slices(root), sizeof(*r->slices));
    if (r->slices == NULL)
        rd->oom = true;
    else
        read_parts(rd, root, "recipe");
}

/* ---- vocabulary -----------------------------------------------------------
 */

static void read_vocab_source(struct reader *rd, const struct tvm_node *node)
{
    struct tvm_recipe_vocab *const v = &rd->r->vocab;
    v->line = node->line;
    v->col = node->col;
    if (node->kind == TVM_NODE_SCALAR && strcmp(node->text, "union") == 0) {
        v->source = TVM_VOCAB_UNION;
    } else if (node->kind == TVM_NODE_SCALAR &&
               strcmp(node->text, "base") == 0) {
        v->source = TVM_VOCAB_BASE;
    } else {
        v->source = TVM_VOCAB_MODEL;
        v->model = read_ref(rd, node);
    }
}

/* {kind: zero} or {kind: model_token, model, token | token_id} */
static void read_token_kind(struct reader *rd, const struct tvm_node *node,
                            struct tvm_recipe_token *t)
{
    static const char *const keys[] = {"kind", "model", "token", "token_id"};
    const struct tvm_node *const kind = given(node, "kind");
    const struct tvm_node *const model = given(node, "model");
    const struct tvm_node *const token = given(node, "token");
    const struct tvm_node *const id = given(node, "token_id");

    unknown_keys(rd, node, keys, N_OF(keys));
    if (kind->kind == TVM_NODE_SCALAR && strcmp(kind->text, "zero") == 0) {
        t->from = TVM_TOKEN_ZERO;
        return;
    }
    if (kind->kind != TVM_NODE_SCALAR ||
        strcmp(kind->text, "model_token") != 0) {
        error_node(rd, kind, "'kind' is zero or model_token");
        return;
    }
    t->from = TVM_TOKEN_OTHER;
    if (model == NULL)
        error_node(rd, node, "model_token needs 'model'");
    else
        t->model = read_ref(rd, model);
    if ((token == NULL) == (id == NULL)) {
        error_node(rd, node, "model_token needs either 'token' or 'token_id'");
    } else if (token != NULL) {
        if (is_text(token))
            t->other = token->text;
        else
            error_node(rd, token, "'token' must be a text");
    } else if (!read_layer(id, &t->other_id) || t->other_id < 0) {
        error_node(rd, id, "'token_id' must be a whole number from 0");
    }
}

static void read_token(struct reader *rd, const struct tvm_node *node,
                       struct tvm_recipe_token *t)
{
    static const char *const keys[] = {"source", "force"};
    const struct tvm_node *source = NULL;
    const struct tvm_node *force = NULL;

    t->token = node->key;
    t->line = node->key_line;
    t->col = node->key_col;
    if (node->key[0] == '\0')
        error_key(rd, TV_E_USAGE, node, "a token is empty");
    if (tvm_node_is_null(node))
        return;
    if (node->kind != TVM_NODE_MAP) {
        error_node(rd, node, "a token takes a map: {source, force}");
        return;
    }
    unknown_keys(rd, node, keys, N_OF(keys));
    source = given(node, "source");
    force = given(node, "force");
    if (force != NULL && !tvm_node_bool(force, &t->force))
        error_node(rd, force, "'force' is true or false");
    if (source == NULL)
        return;
    if (source->kind == TVM_NODE_MAP && given(source, "kind") != NULL) {
        read_token_kind(rd, source, t);
        return;
    }
    t->from = TVM_TOKEN_MODEL;
    t->model = read_ref(rd, source);
}

static void read_tokens(struct reader *rd, const struct tvm_node *map)
{
    struct tvm_recipe_vocab *const v = &rd->r->vocab;
    if (map->kind != TVM_NODE_MAP) {
        error_node(rd, map, "'tokens' must be a map of tokens to {source}");
        return;
    }
    v->tokens = tvm_arena_get(&rd->r->arena, map->n, sizeof(*v->tokens));
    if (v->tokens == NULL) {
        rd->oom = true;
        return;
    }
    for (const struct tvm_node *e = map->first; e != NULL; e = e->next)
        read_token(rd, e, &v->tokens[v->n_tokens++]);
}

static void read_chat_template(struct reader *rd, const struct tvm_node *node)
{
    struct tvm_recipe_vocab *const v = &rd->r->vocab;
    const char *const names[] = {"auto",
                                 tvm_chat_templates[0],
                                 tvm_chat_templates[1],
                                 tvm_chat_templates[2],
                                 tvm_chat_templates[3],
                                 tvm_chat_templates[4]};
    const char *like = NULL;
    char message[300];
    char text[64];

    v->chat_line = node->line;
    v->chat_col = node->col;
    if (!is_text(node)) {
        error_node(rd, node, "'chat_template' must be a text");
        return;
    }
    if (strcmp(node->text, "auto") == 0 ||
        tvm_chat_template(node->text) != NULL || strchr(node->text, '{')) {
        v->chat_template = node->text;
        return;
    }
    like = tv_suggest(node->text, names, N_OF(names));
    (void)snprintf(message, sizeof(message),
                   "chat_template '%s' is neither auto, alpaca, chatml, "
                   "exaone, llama3 or mistral nor a Jinja template%s%s%s",
                   tv_text_printable(node->text, text, sizeof(text)),
                   like == NULL ? "" : "; did you mean '",
                   like == NULL ? "" : like, like == NULL ? "" : "'?");
    error_node(rd, node, message);
}

static void read_vocab(struct reader *rd, const struct tvm_node *root)
{
    static const char *const keys[] = {"source", "tokens",
                                       "pad_to_multiple_of"};
    struct tvm_recipe_vocab *const v = &rd->r->vocab;
    const struct tvm_node *const block = given(root, "tokenizer");
    const struct tvm_node *const legacy = given(root, "tokenizer_source");
    const struct tvm_node *const chat = given(root, "chat_template");
    const struct tvm_node *e = NULL;

    if (chat != NULL)
        read_chat_template(rd, chat);
    if (block != NULL && legacy != NULL)
        error_key(rd, TV_E_USAGE, legacy,
                  "a recipe has either 'tokenizer' or 'tokenizer_source', not "
                  "both");
    if (legacy != NULL && block == NULL)
        read_vocab_source(rd, legacy);
    if (block == NULL)
        return;
    if (block->kind != TVM_NODE_MAP) {
        error_node(rd, block,
                   "'tokenizer' is a map: {source, tokens, "
                   "pad_to_multiple_of}; the short form is "
                   "'tokenizer_source: union'");
        return;
    }
    unknown_keys(rd, block, keys, N_OF(keys));
    v->source = TVM_VOCAB_UNION;
    v->line = block->line;
    v->col = block->col;
    e = given(block, "source");
    if (e != NULL)
        read_vocab_source(rd, e);
    e = given(block, "tokens");
    if (e != NULL)
        read_tokens(rd, e);
    e = given(block, "pad_to_multiple_of");
    if (e != NULL &&
        (!read_layer(e, &v->pad_to) || v->pad_to < 1 || v->pad_to > 1 << 20)) {
        v->pad_to = 0;
        error_node(rd, e,
                   "'pad_to_multiple_of' must be a whole number from 1 to "
                   "1048576");
    }
}

/* ---- the document ---------------------------------------------------------
 */

static void read_method(struct reader *rd, const struct tvm_node *root)
{
    const struct tvm_node *const m = given(root, "merge_method");
    struct tv_buf list;
    char name[64];
    char where[TVM_WHERE_MAX];
    const char *like = NULL;
    if (m == NULL && given(root, "experts") != NULL) {
        error_node(rd, root,
                   "this is a recipe for mergekit-moe: mixtures of experts are "
                   "not made here");
        return;
    }
    if (m == NULL && given(root, "genome") != NULL) {
        error_node(rd, root,
                   "this is a recipe for mergekit-evolve: there is no search "
                   "for parameters here");
        return;
    }
    if (m == NULL) {
        error_node(rd, root, "'merge_method' is missing");
        return;
    }
    rd->r->method_line = m->line;
    rd->r->method_col = m->col;
    if (m->kind != TVM_NODE_SCALAR) {
        error_node(rd, m, "'merge_method' must be a name");
        return;
    }
    rd->r->method = tvm_method_find(m->text);
    if (rd->r->method != NULL) {
        tvm_method_info(rd->r->method, &rd->r->info);
        return;
    }
    tv_buf_init(&list, 8192);
    for (size_t i = 0; i < tvm_method_count(); i++) {
        struct tvm_method_info info;
        tvm_method_info(tvm_method_at(i), &info);
        tv_buf_fmt(&list, "%s%s", i == 0 ? "" : ", ", info.name);
    }
    like = tvm_method_suggest(m->text);
    /* The rest is checked as if the likely method had been meant. */
    if (like != NULL)
        rd->r->method = tvm_method_find(like);
    if (rd->r->method != NULL)
        tvm_method_info(rd->r->method, &rd->r->info);
    tvm_problem_add(
        rd->problems, true, TV_E_USAGE,
        tvm_where(where, sizeof(where), rd->r->path, m->line, m->col),
        "unknown merge_method '%s'%s%s%s (known: %s)",
        tv_text_printable(m->text, name, sizeof(name)),
        like == NULL ? "" : "; did you mean '", like == NULL ? "" : like,
        like == NULL ? "" : "'?", list.failed ? "" : list.data);
    tv_buf_free(&list);
}

/* Methods that mergekit has under these names, for mergekit_config.yml. */
static bool mergekit_knows(const char *method)
{
    static const char *const names[] = {
        "linear",           "slerp",       "nuslerp",      "multislerp",
        "karcher",          "ties",        "dare_ties",    "dare_linear",
        "breadcrumbs",      "della",       "della_linear", "model_stock",
        "breadcrumbs_ties", "sce",         "ram",          "ramplus_tl",
        "task_arithmetic",  "passthrough", "nearswap",     "arcee_fusion"};
    for (size_t i = 0; i < N_OF(names); i++) {
        if (strcmp(names[i], method) == 0)
            return true;
    }
    return false;
}

/* A document's name becomes the name of a directory. */
static void read_name(struct reader *rd, const struct tvm_node *root)
{
    static const char safe[] = "abcdefghijklmnopqrstuvwxyz"
                               "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    const struct tvm_node *const e = given(root, "name");
    if (!rd->several || e == NULL)
        return;
    if (!is_text(e) || e->text[0] == '.' || e->n_text > 128 ||
        strspn(e->text, safe) != e->n_text) {
        error_node(rd, e,
                   "the name of a document has up to 128 letters, digits, '_', "
                   "'-' and '.', and does not begin with a '.'");
        return;
    }
    rd->r->name.text = e->text;
    rd->r->name.line = e->line;
    rd->r->name.col = e->col;
}

static void read_document(struct reader *rd, const struct tvm_node *root)
{
    static const char *const keys[] = {
        "merge_method", "models", "slices", "modules", "base_model", "dtype",
        "out_dtype", "parameters", "tokenizer", "chat_template",
        "tokenizer_source", "calibration",
        /* of adapters, adapter_merge.c */
        "output", "rank", "svd_rank",
        /* of several documents */
        "name"};
    struct tvm_recipe *const r = rd->r;
    const struct tvm_node *e = NULL;

    if (root->kind != TVM_NODE_MAP) {
        error_node(rd, root, "a recipe is a map: merge_method, models, ...");
        return;
    }
    /* First: the method decides which parameters are known. */
    read_method(rd, root);
    read_name(rd, root);
    unknown_keys(rd, root, keys, N_OF(keys) - (rd->several ? 0 : 1));
    if (rd->several && given(root, "output") != NULL)
        error_key(rd, TV_E_UNSUPPORTED, given(root, "output"),
                  "adapters are not merged in a file of several documents");
    r->mergekit_syntax =
        !rd->several && r->method != NULL && mergekit_knows(r->info.name);

    read_vocab(rd, root);
    read_what(rd, root);

    e = given(root, "base_model");
    if (e != NULL)
        r->base = read_ref(rd, e);
    e = given(root, "dtype");
    if (e != NULL) {
        r->dtype = read_dtype(rd, e);
        r->bad_dtype = r->dtype == TV_DTYPE_NONE;
    }
    e = given(root, "out_dtype");
    if (e != NULL) {
        r->out_dtype = read_dtype(rd, e);
        r->bad_dtype = r->bad_dtype || r->out_dtype == TV_DTYPE_NONE;
    }
    note_float64(rd, root);
    r->parameters = read_parameters(rd, root, &r->bad_parameters);
    r->calibration = read_calibration(rd, root);
}

/* ---- another method in the same text --------------------------------------
 */

/* Where line and column (from 1, in characters) are in the text. */
static size_t offset_of(const struct tvm_recipe *r, unsigned line, unsigned col)
{
    size_t at = 0;
    for (unsigned l = 1; l < line && at < r->n_text; at++)
        l += r->text[at] == '\n';
    for (unsigned c = 1; c < col && at < r->n_text; c++) {
        at++;
        while (at < r->n_text && ((unsigned char)r->text[at] & 0xc0u) == 0x80u)
            at++;
    }
    return at;
}

/* Puts `value` in the place of a scalar, quotes included. */
static enum tv_err replace_scalar(struct tvm_recipe *r,
                                  const struct tvm_node *node,
                                  const char *value, struct tv_error *err)
{
    const size_t at = offset_of(r, node->line, node->col);
    const size_t n = strlen(value);
    size_t from = at;
    size_t old = node->n_text;
    const bool quoted =
        at < r->n_text && (r->text[at] == '"' || r->text[at] == '\'');

    if (quoted) {
        from++;
        old += 2;
    }
    if (node->kind != TVM_NODE_SCALAR || from + node->n_text > r->n_text ||
        memcmp(r->text + from, node->text, node->n_text) != 0 ||
        (quoted && r->text[from + node->n_text] != r->text[at]))
        return tv_error_set(err, TV_E_USAGE,
                            "%s:%u:%u: this value cannot be replaced by '%s'; "
                            "write it plainly",
                            r->path, node->line, node->col, value);
    char *const text = tv_alloc(r->n_text - old + n + 1);
    if (text == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    memcpy(text, r->text, at);
    memcpy(text + at, value, n);
    memcpy(text + at + n, r->text + at + old, r->n_text - at - old + 1);
    tv_free(r->text);
    r->text = text;
    r->n_text += n - old;
    return TV_OK;
}

/* Replaces the last value of key in the tree first, so that places of those
 * before it stay what they are. */
static enum tv_err replace_all(struct tvm_recipe *r,
                               const struct tvm_node *node, const char *key,
                               const char *value, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_node *list[64];
    size_t n = 0;

    if (node == NULL)
        return TV_OK;
    if (node->key != NULL && strcmp(node->key, key) == 0 &&
        node->kind == TVM_NODE_SCALAR)
        return replace_scalar(r, node, value, err);
    /* Children in pieces from the last one: a list has no way back. */
    for (size_t end = node->n; end > 0 && rc == TV_OK;) {
        const size_t from = end > N_OF(list) ? end - N_OF(list) : 0;
        size_t i = 0;
        n = 0;
        for (const struct tvm_node *e = node->first; e != NULL && i < end;
             e = e->next, i++)
            if (i >= from)
                list[n++] = e;
        while (n > 0 && rc == TV_OK)
            rc = replace_all(r, list[--n], key, value, err);
        end = from;
    }
    return rc;
}

/* Puts `add` into the text. */
static enum tv_err insert(struct tvm_recipe *r, size_t at, const char *add,
                          struct tv_error *err)
{
    const size_t n = strlen(add);
    char *const text = tv_alloc(r->n_text + n + 1);

    if (text == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    memcpy(text, r->text, at);
    memcpy(text + at, add, n);
    memcpy(text + at + n, r->text + at, r->n_text - at + 1);
    tv_free(r->text);
    r->text = text;
    r->n_text += n;
    return TV_OK;
}

/* Gives a map that has entries one more, before its first: `key: value` as the
 * map is written, in braces or by indentation. */
static enum tv_err add_entry(struct tvm_recipe *r, const struct tvm_node *map,
                             const char *entry, struct tv_error *err)
{
    const size_t at = offset_of(r, map->line, map->col);
    const bool braces = at < r->n_text && r->text[at] == '{';
    char text[160];

    if (braces)
        (void)snprintf(text, sizeof(text), "%s, ", entry);
    else
        (void)snprintf(text, sizeof(text), "%s\n%*s", entry,
                       (int)(map->first->key_col - 1), "");
    return insert(r,
                  braces
                      ? at + 1
                      : offset_of(r, map->first->key_line, map->first->key_col),
                  text, err);
}

/* Is there a value of this key anywhere? */
static bool has_key(const struct tvm_node *node, const char *key)
{
    if (node->key != NULL && strcmp(node->key, key) == 0)
        return true;
    for (const struct tvm_node *e = node->first; e != NULL; e = e->next)
        if (has_key(e, key))
            return true;
    return false;
}

/* A parameter that the recipe does not mention. */
static enum tv_err add_parameter(struct tvm_recipe *r,
                                 const struct tvm_node *root, const char *key,
                                 const char *value, struct tv_error *err)
{
    const struct tvm_node *const p = tvm_node_find(root, "parameters");
    char entry[100];

    if (root->kind != TVM_NODE_MAP || root->first == NULL)
        return TV_OK;
    if (p != NULL && p->kind == TVM_NODE_MAP && p->first != NULL) {
        (void)snprintf(entry, sizeof(entry), "\"%s\": \"%s\"", key, value);
        return add_entry(r, p, entry, err);
    }
    if (p != NULL)
        return tv_error_set(err, TV_E_USAGE,
                            "%s:%u:%u: no place for '%s: %s' here", r->path,
                            p->line, p->col, key, value);
    (void)snprintf(entry, sizeof(entry), "\"parameters\": {\"%s\": \"%s\"}",
                   key, value);
    return add_entry(r, root, entry, err);
}

/* A text that is no recipe stays as it is: reading it says why. */
static enum tv_err replace_in_text(struct tvm_recipe *r, const char *key,
                                   const char *value, bool add,
                                   struct tv_error *err)
{
    struct tvm_arena arena;
    struct tvm_problems unused;
    const struct tvm_node *root = NULL;
    enum tv_err rc = TV_OK;

    if (value == NULL)
        return TV_OK;
    memset(&arena, 0, sizeof(arena));
    tvm_problems_init(&unused);
    TV_TRY(tvm_yaml_parse(r->path, r->text, r->n_text, &arena, &unused, err,
                          &root));
    if (root != NULL && add && !has_key(root, key))
        TV_TRY(add_parameter(r, root, key, value, err));
    else
        TV_TRY(replace_all(r, root, key, value, err));
out:
    tvm_problems_free(&unused);
    tvm_arena_free(&arena);
    return rc;
}

/* ---- several documents ----------------------------------------------------
 */

/* Does a reference mean the document of this name? mergekit-multi puts it in
 * the place of a model, whatever adapter or revision is behind it. */
bool tvm_recipe_means(const char *ref, const char *name)
{
    const size_t n = strlen(name);
    return strncmp(ref, name, n) == 0 &&
           (ref[n] == '\0' || ref[n] == '+' || ref[n] == '@');
}

static void need(struct reader *rd, struct tvm_recipe *first,
                 const struct tvm_recipe_ref *ref)
{
    struct tvm_recipe *const r = rd->r;
    if (ref->text == NULL)
        return;
    for (struct tvm_recipe *o = first; o != NULL; o = o->next) {
        bool known = false;
        if (o->name.text == NULL || !tvm_recipe_means(ref->text, o->name.text))
            continue;
        for (size_t i = 0; i < r->n_needs; i++)
            known = known || r->needs[i] == o;
        if (!known)
            r->needs[r->n_needs++] = o;
    }
}

/* The documents that one refers to. */
static void find_needs(struct reader *rd, struct tvm_recipe *first)
{
    struct tvm_recipe *const r = rd->r;
    r->needs = tvm_arena_get(&r->arena, TVM_YAML_DOCS_MAX, sizeof(*r->needs));
    if (r->needs == NULL) {
        rd->oom = true;
        return;
    }
    for (size_t s = 0; s < r->n_slices; s++) {
        for (size_t i = 0; i < r->slices[s].n_sources; i++)
            need(rd, first, &r->slices[s].sources[i].model);
        need(rd, first, &r->slices[s].base);
    }
    need(rd, first, &r->base);
    need(rd, first, &r->vocab.model);
    for (size_t i = 0; i < r->vocab.n_tokens; i++)
        need(rd, first, &r->vocab.tokens[i].model);
}

/* Is `to` needed, directly or not, by `from`? Looks at each document once. */
static bool leads_to(struct tvm_recipe *from, const struct tvm_recipe *to)
{
    if (from->seen)
        return false;
    from->seen = true;
    for (size_t i = 0; i < from->n_needs; i++) {
        if (from->needs[i] == to || leads_to(from->needs[i], to))
            return true;
    }
    return false;
}

static bool needs_itself(struct tvm_recipe *first, struct tvm_recipe *r)
{
    for (struct tvm_recipe *o = first; o != NULL; o = o->next)
        o->seen = false;
    return leads_to(r, r);
}

static void check_documents(struct reader *rd, struct tvm_recipe *first)
{
    const struct tvm_recipe *unnamed = NULL;
    char message[320];
    for (struct tvm_recipe *r = first; r != NULL && !rd->oom; r = r->next) {
        rd->r = r;
        find_needs(rd, first);
        if (r->name.text == NULL && unnamed != NULL) {
            (void)snprintf(message, sizeof(message),
                           "only one document may have no 'name', the one that "
                           "gives the output; the one in line %u has none "
                           "either",
                           unnamed->line);
            error_at(rd, TV_E_USAGE, r->line, 1, message);
        }
        if (r->name.text == NULL) {
            unnamed = r;
            continue;
        }
        for (const struct tvm_recipe *o = first; o != r; o = o->next) {
            if (o->name.text == NULL || strcmp(o->name.text, r->name.text) != 0)
                continue;
            (void)snprintf(message, sizeof(message),
                           "two documents are called '%s' (first in line %u)",
                           r->name.text, o->name.line);
            error_at(rd, TV_E_USAGE, r->name.line, r->name.col, message);
            break;
        }
    }
    for (struct tvm_recipe *r = first; r != NULL && !rd->oom; r = r->next) {
        rd->r = r;
        if (r->name.text == NULL || !needs_itself(first, r))
            continue;
        (void)snprintf(
            message, sizeof(message), "document '%s' needs its own result%s",
            r->name.text,
            r->n_needs == 1 && r->needs[0] == r ? "" : ", by way of others");
        error_at(rd, TV_E_USAGE, r->name.line, r->name.col, message);
    }
}

tvm_recipe *tvm_recipe_next(const tvm_recipe *r)
{
    return r->next;
}

/* ---- loading --------------------------------------------------------------
 */

static enum tv_err read_all(struct reader *rd, struct tvm_recipe *first,
                            const struct tvm_node *root, struct tv_error *err)
{
    struct tvm_recipe *r = first;
    rd->several = root->next != NULL;
    for (const struct tvm_node *n = root; n != NULL; n = n->next) {
        if (n != root) {
            r->next = tv_calloc(1, sizeof(*r));
            if (r->next == NULL)
                return tv_error_set(err, TV_E_NOMEM, "out of memory");
            r = r->next;
            r->path = first->path;
            r->text = first->text;
            r->n_text = first->n_text;
        }
        r->line = n->line;
        rd->r = r;
        read_document(rd, n);
    }
    if (rd->several)
        check_documents(rd, first);
    return TV_OK;
}

enum tv_err tvm_recipe_load(const char *path, struct tvm_problems *problems,
                            struct tv_error *err, tvm_recipe **out)
{
    return tvm_recipe_load_as(path, NULL, NULL, problems, err, out);
}

/* Must a recipe of the method be told? */
static bool says_more(const char *method, const char *sparsify)
{
    if (strstr(method, "sparsegpt") != NULL)
        return false;
    return strcmp(sparsify,
                  strcmp(method, "ties") == 0 ? "magnitude" : "none") != 0;
}

enum tv_err tvm_recipe_load_as(const char *path, const char *method,
                               const char *sparsify,
                               struct tvm_problems *problems,
                               struct tv_error *err, tvm_recipe **out)
{
    struct tvm_recipe *r = NULL;
    const struct tvm_node *root = NULL;
    struct reader rd = {NULL, problems, false, false};
    const size_t errors_before = problems->n_errors;
    enum tv_err rc = TV_OK;

    *out = NULL;
    r = tv_calloc(1, sizeof(*r));
    if (r == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    r->is_first = true;
    r->other_method = method != NULL;
    r->path = tv_strdup(path);
    if (r->path == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (tv_path_is_dir(path)) {
        rc =
            tv_error_set(err, TV_E_INPUT, "%s is a directory, no recipe", path);
        tv_error_hint(err, "the recipe comes first, then where the result "
                           "goes: RECIPE OUT");
        goto out;
    }
    rc = tv_file_read(path, TVM_YAML_BYTES_MAX, err, &r->text, &r->n_text);
    if (rc == TV_E_CORRUPT)
        rc = tv_error_set(err, TV_E_USAGE, "%s is no recipe: larger than 1 MiB",
                          path);
    if (rc != TV_OK)
        goto out;
    TV_TRY(replace_in_text(r, "merge_method", method, false, err));
    /* Without one it is what most methods do anyway. */
    TV_TRY(replace_in_text(r, "sparsify", sparsify,
                           sparsify != NULL && method != NULL &&
                               says_more(method, sparsify),
                           err));
    TV_TRY(tvm_yaml_parse(path, r->text, r->n_text, &r->arena, problems, err,
                          &root));
    if (root != NULL)
        TV_TRY(read_all(&rd, r, root, err));
    if (rd.oom)
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory while reading %s",
                          path);
    else if (problems->n_errors > errors_before)
        rc = tvm_problems_code(problems);
    if (rc != TV_OK) {
        for (size_t i = 0; i < problems->n; i++) {
            if (!rd.oom && problems->items[i].is_error &&
                problems->items[i].code == rc) {
                rc = tv_error_set(err, rc, "%s: %s", problems->items[i].where,
                                  problems->items[i].message);
                break;
            }
        }
        for (struct tvm_recipe *d = r; d != NULL; d = d->next)
            d->has_errors = true;
        if (rd.oom || root == NULL || root->kind != TVM_NODE_MAP)
            goto out;
    }
    *out = r;
    r = NULL;
out:
    tvm_recipe_free(r);
    return rc;
}

void tvm_recipe_free(tvm_recipe *r)
{
    while (r != NULL) {
        struct tvm_recipe *const next = r->next;
        tvm_arena_free(&r->arena);
        if (r->is_first) {
            tv_free(r->text);
            tv_free(r->path);
        }
        tv_free(r);
        r = next;
    }
}

const char *tvm_recipe_text(const tvm_recipe *r, size_t *n)
{
    *n = r->n_text;
    return r->text;
}
