/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recipe_sources.c - what is merged: `models:`, `slices:` or `modules:`, all of
 * which end up as a list of slices (recipe.h).
 */
#include "recipe_read.h"

#include <stdio.h>
#include <string.h>

#include "tv/text.h"

static void read_source(struct recipe_reader *rd, const struct tvm_node *node,
                        bool whole, struct tvm_recipe_source *out)
{
    static const char *const keys[] = {"model", "parameters", "calibration",
                                       "layer_range"};
    const struct tvm_node *model = NULL;
    if (node->kind != TVM_NODE_MAP) {
        recipe_error_node(rd, node, "an entry is a map: '- model: NAME'");
        return;
    }
    for (const struct tvm_node *e = node->first; e != NULL; e = e->next) {
        if (strcmp(e->key, "model") == 0 || strcmp(e->key, "parameters") == 0 ||
            strcmp(e->key, "calibration") == 0)
            continue;
        if (strcmp(e->key, "layer_range") != 0) {
            recipe_unknown_key(rd, e, keys, whole ? 3 : 4);
        } else if (whole) {
            char where[TVM_WHERE_MAX];
            tvm_problem_add(rd->problems, false, TV_OK,
                            tvm_where(where, sizeof(where), rd->r->path,
                                      e->key_line, e->key_col),
                            "layer_range is ignored here; it belongs to the "
                            "sources of 'slices:'");
        }
    }
    model = recipe_given(node, "model");
    if (model == NULL)
        recipe_error_node(rd, node, "an entry needs 'model'");
    else
        out->model = recipe_read_ref(rd, model);
    if (!whole)
        recipe_read_range(rd, node, out);
    out->parameters = recipe_read_parameters(rd, node, &out->bad_parameters);
    out->calibration = recipe_read_calibration(rd, node);
}

/* The list of one slice; duplicates are found here since references compare as
 * strings. */
static void read_sources(struct recipe_reader *rd, const struct tvm_node *list,
                         bool whole, struct tvm_recipe_slice *slice)
{
    size_t n = 0;
    if (list->kind != TVM_NODE_LIST || list->n == 0) {
        recipe_error_node(
            rd, list,
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
            recipe_error_at(rd, TV_E_USAGE, s->model.line, s->model.col,
                            message);
            break;
        }
    }
    slice->n_sources = n;
    if (n > TVK_DONORS_MAX)
        recipe_error_node(rd, list,
                          "too many models: at most 128 can be merged");
}

static void read_models(struct recipe_reader *rd, const struct tvm_node *models)
{
    struct tvm_recipe_slice *const s = &rd->r->slices[rd->r->n_slices++];
    s->line = models->line;
    s->col = models->col;
    s->whole = true;
    read_sources(rd, models, true, s);
}

static void read_slice(struct recipe_reader *rd, const struct tvm_node *node,
                       struct tvm_recipe_slice *slice)
{
    static const char *const keys[] = {"sources", "base_model", "parameters",
                                       "residual_weight"};
    const struct tvm_node *sources = NULL;
    const struct tvm_node *base = NULL;
    slice->line = node->line;
    slice->col = node->col;
    if (node->kind != TVM_NODE_MAP) {
        recipe_error_node(rd, node, "a slice is a map: '- sources: [...]'");
        return;
    }
    recipe_unknown_keys(rd, node, keys, N_OF(keys));
    sources = recipe_given(node, "sources");
    base = recipe_given(node, "base_model");
    if (sources == NULL)
        recipe_error_node(rd, node, "a slice needs 'sources'");
    else
        read_sources(rd, sources, false, slice);
    if (base != NULL)
        slice->base = recipe_read_ref(rd, base);
    slice->parameters =
        recipe_read_parameters(rd, node, &slice->bad_parameters);
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
        recipe_error_at(rd, TV_E_USAGE, b->range_line, b->range_col, message);
    }
}

static void read_slices(struct recipe_reader *rd, const struct tvm_node *slices)
{
    if (slices->kind != TVM_NODE_LIST || slices->n == 0) {
        recipe_error_node(rd, slices,
                          "'slices' must be a list of {sources: [...]}");
        return;
    }
    for (const struct tvm_node *e = slices->first; e != NULL; e = e->next)
        read_slice(rd, e, &rd->r->slices[rd->r->n_slices++]);
}

/* How many slices a map with `models` or `slices` makes, at most. */
static size_t count_slices(const struct tvm_node *map)
{
    const struct tvm_node *const slices = recipe_given(map, "slices");
    return 1 +
           (slices != NULL && slices->kind == TVM_NODE_LIST ? slices->n : 0);
}

/* `models` or `slices` of a recipe or a module, into room made before. */
static void read_parts(struct recipe_reader *rd, const struct tvm_node *map,
                       const char *what)
{
    const struct tvm_node *models = recipe_given(map, "models");
    const struct tvm_node *slices = recipe_given(map, "slices");
    char message[80];

    recipe_leave_filled(&models, &slices);
    if (models != NULL && slices != NULL) {
        (void)snprintf(message, sizeof(message),
                       "a %s has either 'models' or 'slices', not both", what);
        recipe_error_key(rd, TV_E_USAGE, slices, message);
    }
    if (models != NULL)
        read_models(rd, models);
    else if (slices != NULL)
        read_slices(rd, slices);
    else
        recipe_error_node(rd, map, "'models' or 'slices' is missing");
}

static void read_modules(struct recipe_reader *rd,
                         const struct tvm_node *modules)
{
    static const char *const keys[] = {"models", "slices", "parameters"};
    struct tvm_recipe *const r = rd->r;
    size_t n = 0;

    if (modules->kind != TVM_NODE_MAP || modules->n == 0) {
        recipe_error_node(
            rd, modules,
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
            recipe_error_node(rd, e,
                              "a module takes a map: {models} or {slices}");
            continue;
        }
        recipe_unknown_keys(rd, e, keys, N_OF(keys));
        read_parts(rd, e, "module");
        m->parameters = recipe_read_parameters(rd, e, &m->bad_parameters);
        m->n = r->n_slices - m->first;
    }
}

void recipe_read_what(struct recipe_reader *rd, const struct tvm_node *root)
{
    struct tvm_recipe *const r = rd->r;
    const struct tvm_node *modules = recipe_given(root, "modules");
    const struct tvm_node *models = recipe_given(root, "models");
    const struct tvm_node *slices = recipe_given(root, "slices");

    recipe_leave_filled(&models, &slices);
    recipe_leave_filled(&models, &modules);
    recipe_leave_filled(&slices, &modules);
    if (modules != NULL) {
        const struct tvm_node *const other = models != NULL ? models : slices;
        if (other != NULL)
            recipe_error_key(
                rd, TV_E_USAGE, other,
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
