/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recipe_pieces.c - the smallest parts of a recipe, and what is said when one
 * is wrong.
 */
#include "recipe_read.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "params.h"
#include "tv/text.h"

/* ---- messages ------------------------------------------------------------ */

void recipe_error_at(struct recipe_reader *rd, enum tv_err code, unsigned line,
                     unsigned col, const char *message)
{
    char where[TVM_WHERE_MAX];
    tvm_problem_add(rd->problems, true, code,
                    tvm_where(where, sizeof(where), rd->r->path, line, col),
                    "%s", message);
}

void recipe_error_node(struct recipe_reader *rd, const struct tvm_node *node,
                       const char *message)
{
    recipe_error_at(rd, TV_E_USAGE, node->line, node->col, message);
}

void recipe_error_key(struct recipe_reader *rd, enum tv_err code,
                      const struct tvm_node *entry, const char *message)
{
    recipe_error_at(rd, code, entry->key_line, entry->key_col, message);
}

void recipe_unknown_key(struct recipe_reader *rd, const struct tvm_node *e,
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

void recipe_unknown_keys(struct recipe_reader *rd, const struct tvm_node *map,
                         const char *const *known, size_t n_known)
{
    for (const struct tvm_node *e = map->first; e != NULL; e = e->next) {
        bool found = false;
        for (size_t i = 0; i < n_known && !found; i++)
            found = strcmp(e->key, known[i]) == 0;
        if (!found)
            recipe_unknown_key(rd, e, known, n_known);
    }
}

/* ---- pieces -------------------------------------------------------------- */

const struct tvm_node *recipe_given(const struct tvm_node *map, const char *key)
{
    const struct tvm_node *const e = tvm_node_find(map, key);
    return tvm_node_is_null(e) ? NULL : e;
}

void recipe_leave_filled(const struct tvm_node **a, const struct tvm_node **b)
{
    if (*a == NULL || *b == NULL)
        return;
    if ((*b)->kind != TVM_NODE_SCALAR && (*b)->n == 0)
        *b = NULL;
    else if ((*a)->kind != TVM_NODE_SCALAR && (*a)->n == 0)
        *a = NULL;
}

bool recipe_is_text(const struct tvm_node *node)
{
    return node->kind == TVM_NODE_SCALAR && node->n_text > 0 &&
           memchr(node->text, '\0', node->n_text) == NULL;
}

/* "path" or {path, revision}; NULL after a problem. */
static const char *read_ref_part(struct recipe_reader *rd,
                                 const struct tvm_node *node)
{
    static const char *const keys[] = {"path", "revision"};
    const struct tvm_node *path = NULL;
    const struct tvm_node *revision = NULL;
    const char *s = NULL;
    if (node->kind == TVM_NODE_SCALAR) {
        if (recipe_is_text(node))
            return node->text;
        recipe_error_node(rd, node, "a model reference is empty");
        return NULL;
    }
    if (node->kind != TVM_NODE_MAP) {
        recipe_error_node(rd, node,
                          "a model reference is a name or {path, revision}");
        return NULL;
    }
    recipe_unknown_keys(rd, node, keys, N_OF(keys));
    path = recipe_given(node, "path");
    revision = recipe_given(node, "revision");
    if (path == NULL || !recipe_is_text(path)) {
        recipe_error_node(rd, path == NULL ? node : path,
                          "a model reference needs 'path'");
        return NULL;
    }
    if (revision == NULL)
        return path->text;
    if (!recipe_is_text(revision)) {
        recipe_error_node(rd, revision, "'revision' must be a name");
        return NULL;
    }
    s = tvm_arena_fmt(&rd->r->arena, "%s@%s", path->text, revision->text);
    rd->oom = rd->oom || s == NULL;
    return s;
}

/* mergekit takes one adapter, no factor and no store object. */
static void note_syntax(struct recipe_reader *rd, const char *ref)
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
static void add_override(struct recipe_reader *rd, const char *ref,
                         const struct tvm_node *arch)
{
    const struct tvm_recipe_override *const known =
        tvm_recipe_override_of(rd->r, ref);
    struct tvm_recipe_override *o = NULL;

    if (known != NULL && strcmp(known->architecture, arch->text) != 0)
        recipe_error_node(
            rd, arch,
            "this model is recipe_given another 'override_architecture' "
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

struct tvm_recipe_ref recipe_read_ref(struct recipe_reader *rd,
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
        recipe_unknown_keys(rd, node, keys, 3);
        model = recipe_given(node, "model");
        lora = recipe_given(node, "lora");
        arch = recipe_given(node, "override_architecture");
        if (arch != NULL && !recipe_is_text(arch))
            recipe_error_node(rd, arch,
                              "'override_architecture' must be a name");
        if (model == NULL) {
            recipe_error_node(rd, node, "a model reference needs 'model'");
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
        if (arch != NULL && recipe_is_text(arch) && ref.text != NULL)
            add_override(rd, ref.text, arch);
    }
    if (ref.text != NULL)
        note_syntax(rd, ref.text);
    return ref;
}

const struct tvm_node *recipe_read_parameters(struct recipe_reader *rd,
                                              const struct tvm_node *map,
                                              bool *bad)
{
    const struct tvm_node *const p = recipe_given(map, "parameters");
    if (p == NULL)
        return NULL;
    if (p->kind != TVM_NODE_MAP) {
        *bad = true;
        recipe_error_node(rd, p,
                          "'parameters' must be a map of names to settings");
        return NULL;
    }
    tvm_params_check(rd->r, p, rd->problems);
    return p;
}

enum tv_dtype recipe_read_dtype(struct recipe_reader *rd,
                                const struct tvm_node *node)
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
        recipe_error_node(rd, node, "a dtype is float16, bfloat16 or float32");
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
        recipe_error_at(
            rd, TV_E_UNSUPPORTED, node->line, node->col,
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
    recipe_error_node(rd, node, message);
    return TV_DTYPE_NONE;
}

void recipe_note_float64(struct recipe_reader *rd, const struct tvm_node *root)
{
    const struct tvm_recipe *const r = rd->r;
    const struct tvm_node *const e =
        r->out_dtype == TV_F64 ? recipe_given(root, "out_dtype")
        : r->dtype == TV_F64 && r->out_dtype == TV_DTYPE_NONE && !r->bad_dtype
            ? recipe_given(root, "dtype")
            : NULL;
    char where[TVM_WHERE_MAX];
    if (e != NULL)
        tvm_problem_add(
            rd->problems, false, TV_OK,
            tvm_where(where, sizeof(where), r->path, e->line, e->col),
            "float64: sums run in fp64 in any case, the result is stored as "
            "float32");
}

bool recipe_read_layer(const struct tvm_node *node, int64_t *out)
{
    double v = 0;
    if (!tvm_node_number(node, &v) || v != floor(v) || fabs(v) > 1e9)
        return false;
    *out = (int64_t)v;
    return true;
}

void recipe_read_range(struct recipe_reader *rd, const struct tvm_node *map,
                       struct tvm_recipe_source *s)
{
    const struct tvm_node *const range = recipe_given(map, "layer_range");
    if (range == NULL) {
        recipe_error_node(rd, map,
                          "a source of a slice needs layer_range: [from, to]");
        return;
    }
    s->range_line = range->line;
    s->range_col = range->col;
    if (range->kind != TVM_NODE_LIST || range->n != 2 ||
        !recipe_read_layer(range->first, &s->from) ||
        !recipe_read_layer(range->first->next, &s->to)) {
        recipe_error_node(
            rd, range,
            "layer_range takes two whole numbers, [from, to]; the "
            "second is not included");
        return;
    }
    if (s->from < 0 || s->to < s->from) {
        recipe_error_node(rd, range,
                          "layer_range must not be negative or run backwards");
        return;
    }
    s->has_range = true;
}

void recipe_read_count(struct recipe_reader *rd, const struct tvm_node *map,
                       const char *key, uint64_t least, uint64_t *out)
{
    const struct tvm_node *const e = recipe_given(map, key);
    char message[120];
    int64_t n = 0;
    if (e == NULL)
        return;
    if (recipe_read_layer(e, &n) && n >= (int64_t)least && n <= 1 << 24) {
        *out = (uint64_t)n;
        return;
    }
    (void)snprintf(message, sizeof(message),
                   "'%s' must be a whole number from %llu to 16777216", key,
                   (unsigned long long)least);
    recipe_error_node(rd, e, message);
}

static void read_texts(struct recipe_reader *rd, const struct tvm_node *node,
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
        if (!recipe_is_text(e)) {
            recipe_error_node(rd, e,
                              "'text' is the name of a file or a list of them");
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
        recipe_error_node(rd, node, "'text' names no file");
}

const struct tvm_calibration *
recipe_read_calibration(struct recipe_reader *rd, const struct tvm_node *map)
{
    static const char *const keys[] = {"text", "samples", "context", "random"};
    const struct tvm_node *const node = recipe_given(map, "calibration");
    struct tvm_calibration *c = NULL;
    if (node == NULL)
        return NULL;
    if (node->kind != TVM_NODE_MAP) {
        recipe_error_node(
            rd, node,
            "'calibration' is a map: {text: [FILE, ...], samples: 128, "
            "context: 512}");
        return NULL;
    }
    recipe_unknown_keys(rd, node, keys, N_OF(keys));
    c = tvm_arena_get(&rd->r->arena, 1, sizeof(*c));
    if (c == NULL) {
        rd->oom = true;
        return NULL;
    }
    const struct tvm_node *const text = recipe_given(node, "text");
    const struct tvm_node *const random = recipe_given(node, "random");
    if (random != NULL && !tvm_node_bool(random, &c->random))
        recipe_error_node(rd, random, "'random' is true or false");
    if (text != NULL)
        read_texts(rd, text, c);
    if ((text != NULL) == c->random)
        recipe_error_node(
            rd, node,
            c->random ? "'calibration' has either 'text' or 'random: "
                        "true', not both"
                      : "'calibration' needs 'text': the name of a file "
                        "or a list of them");
    /* What is wrong with a number hides nothing of the texts. */
    recipe_read_count(rd, node, "samples", 1, &c->samples);
    recipe_read_count(rd, node, "context", 2, &c->context);
    return c;
}
