/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_values.c - the parameters of one output tensor: each resolved through
 * the levels of the recipe, its filters and gradients, then looked at by the
 * method as a whole.
 */
#include "plan_build.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "params.h"
#include "tv/alloc.h"
#include "tv/text.h"

enum { N_LEVELS = 4 }; /* source, slice, module, recipe */

/* Where a value may be written, the nearest first; source SIZE_MAX: of a shared
 * parameter. What the recipe does not speak of has none of its parameters. */
static void fill_levels(const struct plan_build *b, size_t source,
                        const struct tvm_node **levels)
{
    const struct plan_slice *const s = b->slice;
    memset(levels, 0, N_LEVELS * sizeof(*levels));
    if (s->is_copy)
        return;
    levels[0] = source == SIZE_MAX ? NULL : s->parameters[source];
    levels[1] = s->recipe->parameters;
    levels[2] = s->of == NULL ? NULL : s->of->parameters;
    levels[3] = b->pl->r->parameters;
}

/* Is it written, but only for what filters match? */
static bool filtered_out(const struct plan_build *b, size_t source,
                         const char *name)
{
    const struct tvm_node *levels[N_LEVELS];

    fill_levels(b, source, levels);
    for (size_t i = 0; i < N_LEVELS; i++) {
        const struct tvm_node *const n =
            levels[i] == NULL ? NULL : tvm_node_find(levels[i], name);
        if (n != NULL && n->kind == TVM_NODE_LIST && n->first != NULL &&
            n->first->kind == TVM_NODE_MAP)
            return true;
    }
    return false;
}

static void missing_parameter(struct plan_build *b, const struct tvm_param *p,
                              size_t source)
{
    char cause[320];
    struct planner *const pl = b->pl;
    const char *const filtered =
        filtered_out(b, source == SIZE_MAX ? SIZE_MAX : b->at[source], p->name)
            ? "; no filter matches it: add an entry without one, {value: ...}"
            : "";
    const size_t s = source == SIZE_MAX ? 0 : b->at[source];
    const bool appended =
        source != SIZE_MAX && s >= b->slice->recipe->n_sources;

    if (source == SIZE_MAX) {
        const struct tvm_recipe_ref at = {"", pl->r->method_line,
                                          pl->r->method_col};
        (void)snprintf(cause, sizeof(cause), "missing parameter '%s'", p->name);
        plan_report(pl, cause, 1, true, TV_E_USAGE, plan_where(pl, &at),
                    "missing required parameter '%s' of %s (first needed for "
                    "%s%s)",
                    p->name, b->t->method->name, b->t->name, filtered);
        return;
    }
    (void)snprintf(cause, sizeof(cause), "missing parameter '%s' for '%.200s'",
                   p->name, plan_source_ref(b, source));
    plan_report(
        pl, cause, 1, true, TV_E_USAGE,
        plan_where(pl, appended ? pl->refs[b->slice->input[s]].where
                                : &b->slice->recipe->sources[s].model),
        "missing required parameter '%s' for '%s' (first needed for %s%s)%s",
        p->name, plan_source_ref(b, source), b->t->name, filtered,
        appended ? "; base_model is not among the models and counts as one "
                   "more input"
                 : "");
}

/* Leaves out the levels whose setting of p was refused with the recipe; true
 * when there are any. */
static bool drop_refused(const struct plan_build *b, const struct tvm_param *p,
                         size_t source, const struct tvm_node **levels)
{
    const struct tvm_recipe *const r = b->pl->r;
    const struct tvm_recipe_slice *const rs = b->slice->recipe;
    bool any = false;
    if (!r->has_errors)
        return false;
    any = r->bad_parameters || rs->bad_parameters ||
          (b->slice->of != NULL && b->slice->of->bad_parameters) ||
          (source < rs->n_sources && rs->sources[source].bad_parameters);
    for (size_t i = 0; i < N_LEVELS; i++) {
        const struct tvm_node *const e = tvm_node_find(levels[i], p->name);
        if (e == NULL || tvm_setting_ok(r, p, e))
            continue;
        levels[i] = NULL;
        any = true;
    }
    return any;
}

static double take(struct plan_build *b, const struct tvm_param *p,
                   const struct tvm_value *v, size_t source, bool refused,
                   bool *set)
{
    *set = v->set;
    if (refused && p->has_default) {
        b->refused = true;
    } else if (refused) {
        b->ok = false;
    } else if (!v->set && p->required) {
        b->ok = false;
        missing_parameter(b, p, source);
    }
    if (v->set && v->fraction) {
        char cause[128];
        const struct tvm_recipe_ref at = {"", v->from->line, v->from->col};
        b->ok = false;
        (void)snprintf(cause, sizeof(cause), "fractions for '%s'", p->name);
        plan_report(b->pl, cause, 3, true, TV_E_USAGE, plan_where(b->pl, &at),
                    "parameter '%s' takes integers, but between the values of "
                    "this list it becomes %g for %s",
                    p->name, v->value, b->t->name);
    }
    return v->value;
}

enum tv_err plan_resolve_parameters(struct plan_build *b, int64_t k,
                                    int64_t n_k)
{
    struct tvm_tensor *const t = b->t;
    struct planner *const pl = b->pl;
    const size_t n = t->method == NULL ? 0 : t->method->n_params;
    const double at = tvm_gradient_at(k, n_k);

    t->per_source =
        tvm_arena_get(plan_arena(pl), t->n_sources * n, sizeof(double));
    t->per_source_set =
        tvm_arena_get(plan_arena(pl), t->n_sources * n, sizeof(bool));
    b->from = tv_calloc((b->slice->n + 1) * n + 1, sizeof(*b->from));
    if (t->per_source == NULL || t->per_source_set == NULL || b->from == NULL)
        return plan_oom(pl);
    for (size_t i = 0; i < n && i < TVM_PARAMS_MAX; i++) {
        const struct tvm_param *const p = &t->method->params[i];
        const struct tvm_node *levels[N_LEVELS] = {NULL};
        if (p->scope == TVM_SHARED) {
            fill_levels(b, SIZE_MAX, levels);
            const bool refused = drop_refused(b, p, SIZE_MAX, levels);
            const struct tvm_value v =
                tvm_param_resolve(p, levels, N_LEVELS, t->name, at);
            t->shared[i] = take(b, p, &v, SIZE_MAX, refused, &t->shared_set[i]);
            b->from[b->slice->n * n + i] = v.from;
            continue;
        }
        for (size_t s = 0; s < t->n_sources; s++) {
            const char *name = t->sources[s].tensor->name;
            if (p->scope == TVM_NON_BASE && t->sources[s].is_base)
                continue;
            /* A tied input lends its embedding; filters still see the head. */
            if (b->is_head)
                name = t->name;
            fill_levels(b, b->at[s], levels);
            const bool refused = drop_refused(b, p, b->at[s], levels);
            const struct tvm_value v =
                tvm_param_resolve(p, levels, N_LEVELS, name, at);
            t->per_source[s * n + i] =
                take(b, p, &v, s, refused, &t->per_source_set[s * n + i]);
            b->from[s * n + i] = v.from;
        }
    }
    return TV_OK;
}

/* ---- the method ---------------------------------------------------------- */

/* Of a value of a parameter: where it was written, or what has it as a default:
 * the model, or the method. */
static const char *param_where(struct plan_build *b,
                               const struct tvm_problem *p)
{
    struct planner *const pl = b->pl;
    const size_t row = p->source == SIZE_MAX ? b->slice->n : p->source;
    const struct tvm_node *const from =
        b->from[row * b->t->method->n_params + p->param];
    const struct tvm_recipe_slice *const rs = b->slice->recipe;
    struct tvm_recipe_ref at = {"", pl->r->method_line, pl->r->method_col};
    if (from != NULL) {
        at.line = from->line;
        at.col = from->col;
    } else if (p->source != SIZE_MAX && b->at[p->source] < rs->n_sources &&
               rs->sources[b->at[p->source]].model.line > 0) {
        at = rs->sources[b->at[p->source]].model;
    }
    return plan_where(pl, &at);
}

void plan_ask_method(struct plan_build *b)
{
    struct tvm_problems found;
    if (b->t->method->check == NULL)
        return;
    tvm_problems_init(&found);
    b->t->method->check(b->t, &found);
    for (size_t i = 0; i < found.n; i++) {
        const struct tvm_problem *const p = &found.items[i];
        if (p->of_param) {
            const char *const where = param_where(b, p);
            const char *const cause =
                tvm_arena_fmt(plan_arena(b->pl), "%s %s", where, p->message);
            if (cause == NULL)
                b->pl->oom = true;
            else
                plan_report(b->pl, cause, 1, true, p->code, where,
                            "%s (first for %s)", p->message, p->where);
            continue;
        }
        if (p->is_note)
            plan_note(b->pl, p->message, 1, "", "%s", p->message);
        else
            plan_report(b->pl, p->message, p->is_error ? 3 : 1, p->is_error,
                        p->code, p->is_error ? p->where : "", "%s", p->message);
    }
    if (found.n_errors > 0)
        b->ok = false;
    if (found.n_errors > found.n)
        b->pl->oom = true;
    tvm_problems_free(&found);
}
