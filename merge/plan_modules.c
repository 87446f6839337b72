/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_modules.c - which slices make which module of the output.
 *
 * A recipe without `modules:` means all modules of its models at once. With
 * it, each module is made by its own models or slices, its layers counted by
 * itself, and what the recipe does not name is copied from the base (or the
 * first model): mergekit would leave it out.
 */
#include "plan_parts.h"

#include <string.h>

#include "tv/text.h"

#define N_OF(a) (sizeof(a) / sizeof((a)[0]))

/* Names that mean the same part of a model of several modalities. */
static const char *const aliases[][2] = {
    {"vision_model", "vision_tower"},
    {"visual", "vision_tower"},
    {"vision_encoder", "vision_tower"},
    {"language_model", "text_decoder"},
    {"text_model", "text_decoder"},
    {"connector", "multi_modal_projector"},
    {"projector", "multi_modal_projector"},
    {"merger", "multi_modal_projector"},
};

static bool same_module(const char *a, const char *b)
{
    for (size_t i = 0; i < N_OF(aliases); i++) {
        if (strcmp(a, aliases[i][0]) == 0)
            a = aliases[i][1];
        if (strcmp(b, aliases[i][0]) == 0)
            b = aliases[i][1];
    }
    return strcmp(a, b) == 0;
}

/* The module whose tensors begin with `name`, as mergekit calls the modules of
 * models that it has no table for; SIZE_MAX when none or several do. */
static size_t by_prefix(const struct tv_arch *a, const char *name)
{
    const size_t n = strlen(name);
    size_t found = SIZE_MAX;
    for (size_t i = 0; i < a->n_tensors && n > 0; i++) {
        const struct tv_arch_tensor *const t = &a->tensors[i];
        if (strncmp(t->name, name, n) != 0 ||
            (t->name[n] != '.' && name[n - 1] != '.'))
            continue;
        if (found != SIZE_MAX && found != t->module)
            return SIZE_MAX;
        found = t->module;
    }
    return found;
}

/* Index of the architecture's module that a recipe calls `name`. */
static size_t find_module(const struct tv_arch *a, const char *name)
{
    for (size_t i = 0; i < a->n_modules; i++) {
        if (same_module(a->modules[i].name, name))
            return i;
    }
    /* A model of one stack has one module without a name. */
    if (a->n_modules == 1)
        return strcmp(name, "default") == 0 || same_module(name, "text_decoder")
                   ? 0
                   : SIZE_MAX;
    return by_prefix(a, name);
}

const struct tv_arch_module *plan_module_of(const struct tv_arch *a,
                                            const char *name)
{
    for (size_t i = 0; i < a->n_modules; i++) {
        if (strcmp(a->modules[i].name, name) == 0)
            return &a->modules[i];
    }
    /* A language model alone is the text module of a larger one. */
    return a->n_modules == 1 && a->modules[0].name[0] == '\0' &&
                   strcmp(name, "text_decoder") == 0
               ? &a->modules[0]
               : NULL;
}

/* Every name that find_module takes but prefixes of tensor names. */
static const char *module_list(struct planner *pl, const struct tv_arch *a)
{
    const char *list = "";
    for (size_t i = 0; i < a->n_modules && list != NULL; i++) {
        const bool unnamed = a->modules[i].name[0] == '\0';
        const char *const name = unnamed ? "text_decoder" : a->modules[i].name;
        bool any = false;
        list = tvm_arena_fmt(plan_arena(pl), "%s%s%s", list, i == 0 ? "" : ", ",
                             unnamed ? "default or text_decoder" : name);
        for (size_t k = 0; k < N_OF(aliases) && list != NULL; k++) {
            const char *const *const two = aliases[k];
            const char *const also = strcmp(two[0], name) == 0   ? two[1]
                                     : same_module(two[0], name) ? two[0]
                                                                 : NULL;
            if (also == NULL)
                continue;
            list = tvm_arena_fmt(plan_arena(pl), "%s%s%s", list,
                                 any ? ", " : " (also ", also);
            any = true;
        }
        if (any && list != NULL)
            list = tvm_arena_fmt(plan_arena(pl), "%s)", list);
    }
    pl->oom = pl->oom || list == NULL;
    return list == NULL ? "" : list;
}

/* For each module of the architecture the one of the recipe that makes it,
 * SIZE_MAX: none. */
static void match_modules(struct planner *pl, const struct tv_arch *a,
                          size_t *by)
{
    const struct tvm_recipe *const r = pl->r;
    size_t rest = SIZE_MAX;

    for (size_t i = 0; i < a->n_modules; i++)
        by[i] = SIZE_MAX;
    for (size_t i = 0; i < r->n_modules; i++) {
        const struct tvm_recipe_module *const m = &r->modules[i];
        const struct tvm_recipe_ref at = {"", m->line, m->col};
        const size_t found = find_module(a, m->name);
        char text[80];
        if (found != SIZE_MAX && by[found] == SIZE_MAX) {
            by[found] = i;
            continue;
        }
        /* mergekit's name for what stands outside the stacks it has found. */
        if (found == SIZE_MAX && strcmp(m->name, "default") == 0) {
            rest = i;
            continue;
        }
        if (found != SIZE_MAX)
            plan_report(pl, "modules named twice", 20, true, TV_E_USAGE,
                        plan_where(pl, &at), "'%s' and '%s' are one module",
                        tv_text_printable(m->name, text, sizeof(text)),
                        r->modules[by[found]].name);
        else
            plan_report(pl, "unknown modules", 20, true, TV_E_INPUT,
                        plan_where(pl, &at),
                        "there is no module '%s' in '%s'; it has: %s",
                        tv_text_printable(m->name, text, sizeof(text)),
                        pl->plan->inputs[pl->st->donor].ref,
                        module_list(pl, a));
    }
    for (size_t i = 0; i < a->n_modules && rest != SIZE_MAX; i++) {
        if (by[i] == SIZE_MAX)
            by[i] = rest;
    }
}

/* A slice that copies a module of the donor. */
static enum tv_err add_copy(struct planner *pl, const char *module)
{
    struct plan_slice *const s = &pl->slices[pl->n_slices++];
    struct tvm_recipe_slice *const rs =
        tvm_arena_get(plan_arena(pl), 1, sizeof(*rs));
    const char *const ref = pl->plan->inputs[pl->st->donor].ref;

    if (rs == NULL)
        return plan_oom(pl);
    rs->sources = tvm_arena_get(plan_arena(pl), 1, sizeof(*rs->sources));
    if (rs->sources == NULL)
        return plan_oom(pl);
    rs->whole = true;
    rs->n_sources = 1;
    rs->sources[0].model = *pl->refs[pl->st->donor].where;
    rs->sources[0].model.text = ref;
    s->recipe = rs;
    s->module = module;
    s->is_copy = s->is_first = s->is_last = true;
    plan_note(pl, module, 1, "",
              "module '%s' is not in the recipe: it is copied from '%s' "
              "(mergekit leaves it out)",
              module, ref);
    return TV_OK;
}

static void add_slices(struct planner *pl, const struct tvm_recipe_module *m,
                       const char *module)
{
    for (size_t i = 0; i < m->n; i++) {
        struct plan_slice *const s = &pl->slices[pl->n_slices++];
        s->recipe = &pl->r->slices[m->first + i];
        s->of = m;
        s->module = module;
        s->is_first = i == 0;
        s->is_last = i + 1 == m->n;
    }
}

enum tv_err plan_modules_make(struct planner *pl)
{
    const struct tvm_recipe *const r = pl->r;
    const struct tv_arch *const a =
        pl->plan->n_inputs > 0 && pl->refs[pl->st->donor].usable
            ? pl->plan->inputs[pl->st->donor].arch
            : NULL;
    const size_t n_modules = a == NULL ? 1 : a->n_modules;
    size_t *by = NULL;
    enum tv_err rc = TV_OK;

    pl->slices = tvm_arena_get(plan_arena(pl), (r->n_slices + 1) * n_modules,
                               sizeof(*pl->slices));
    by = tvm_arena_get(plan_arena(pl), n_modules, sizeof(*by));
    if (pl->slices == NULL || by == NULL)
        return plan_oom(pl);
    if (r->n_modules == 0 || a == NULL) {
        /* Without a model to ask, modules are what the recipe calls them. */
        for (size_t i = 0; i < r->n_modules; i++)
            add_slices(pl, &r->modules[i], r->modules[i].name);
        for (size_t i = 0; i < r->n_slices && r->n_modules == 0; i++) {
            struct plan_slice *const s = &pl->slices[pl->n_slices++];
            s->recipe = &r->slices[i];
            s->is_first = i == 0;
            s->is_last = i + 1 == r->n_slices;
        }
        return TV_OK;
    }
    match_modules(pl, a, by);
    for (size_t i = 0; i < a->n_modules; i++) {
        if (by[i] != SIZE_MAX)
            add_slices(pl, &r->modules[by[i]], a->modules[i].name);
        else
            TV_TRY(add_copy(pl, a->modules[i].name));
    }
out:
    return rc;
}

/* ---- what others ask ------------------------------------------------------
 */

bool plan_in_slice(const struct plan_slice *s, const struct tv_arch *a,
                   const struct tv_arch_tensor *t)
{
    return s->module == NULL ||
           plan_module_of(a, s->module) == &a->modules[t->module];
}

int64_t plan_slice_depth(const struct plan_slice *s, const struct tv_arch *a)
{
    const struct tv_arch_module *const m =
        s->module == NULL ? NULL : plan_module_of(a, s->module);
    return m != NULL ? m->n_layers : s->module == NULL ? a->n_layers : 0;
}
