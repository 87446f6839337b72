/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_slices.c - what the recipe names: every model opened once, its slices
 * with sources and layers, and what the method asks of their number and of the
 * parameters that must be given.
 */
#include "plan_vocab.h"

#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"

enum tv_err plan_add_inputs(struct planner *pl)
{
    const struct tvm_recipe *const r = pl->r;
    size_t n = 1;
    size_t index = 0;
    enum tv_err rc = TV_OK;

    for (size_t s = 0; s < r->n_slices; s++)
        n += r->slices[s].n_sources + 1;
    n += r->vocab.n_tokens + 1;
    pl->cap_refs = n;
    pl->refs = tvm_arena_get(plan_arena(pl), n, sizeof(*pl->refs));
    pl->plan->inputs =
        tvm_arena_get(plan_arena(pl), n, sizeof(*pl->plan->inputs));
    if (pl->refs == NULL || pl->plan->inputs == NULL)
        return plan_oom(pl);
    for (size_t s = 0; s < r->n_slices; s++) {
        for (size_t i = 0; i < r->slices[s].n_sources; i++) {
            if (r->slices[s].sources[i].model.text != NULL)
                TV_TRY(
                    plan_input_add(pl, &r->slices[s].sources[i].model, &index));
        }
        if (r->slices[s].base.text != NULL)
            TV_TRY(plan_input_add(pl, &r->slices[s].base, &index));
    }
    if (r->base.text != NULL)
        TV_TRY(plan_input_add(pl, &r->base, &index));
    if (r->vocab.model.text != NULL)
        TV_TRY(plan_input_add(pl, &r->vocab.model, &index));
    for (size_t i = 0; i < r->vocab.n_tokens; i++) {
        if (r->vocab.tokens[i].model.text != NULL)
            TV_TRY(plan_input_add(pl, &r->vocab.tokens[i].model, &index));
    }
out:
    return rc;
}

size_t plan_input_index(const struct planner *pl, const char *ref)
{
    size_t i = 0;
    while (i < pl->plan->n_inputs && strcmp(pl->plan->inputs[i].ref, ref) != 0)
        i++;
    return i;
}

/* Two spellings of one place are two models to a recipe; hardly ever meant. */
static void warn_same_place(struct planner *pl, const struct plan_slice *s,
                            const struct tvm_recipe_ref *base)
{
    const struct tvm_plan_input *const in = pl->plan->inputs;
    const size_t b = plan_input_index(pl, base->text);
    if (!pl->refs[b].usable || in[b].n_adapters != 0)
        return;
    for (size_t i = 0; i < s->n; i++) {
        const size_t o = s->input[i];
        if (o == b || o == SIZE_MAX || !pl->refs[o].usable ||
            in[o].n_adapters != 0 || in[o].input != in[b].input)
            continue;
        plan_report(pl, base->text, 1, false, TV_OK, plan_where(pl, base),
                    "base_model '%s' and model '%s' are the same files, but "
                    "count as two models because they are written differently",
                    in[b].ref, in[o].ref);
    }
}

static enum tv_err slice_sources(struct planner *pl, struct plan_slice *s,
                                 const struct tvm_recipe_ref *base)
{
    const struct tvm_recipe_slice *const rs = s->recipe;
    const size_t cap = rs->n_sources + 1;

    s->input = tvm_arena_get(plan_arena(pl), cap, sizeof(*s->input));
    s->from = tvm_arena_get(plan_arena(pl), cap, sizeof(*s->from));
    s->parameters = tvm_arena_get(plan_arena(pl), cap, sizeof(*s->parameters));
    s->usable = tvm_arena_get(plan_arena(pl), cap, sizeof(*s->usable));
    if (s->input == NULL || s->from == NULL || s->parameters == NULL ||
        s->usable == NULL)
        return plan_oom(pl);
    s->base = -1;
    for (size_t i = 0; i < rs->n_sources; i++) {
        const char *const ref = rs->sources[i].model.text;
        s->input[i] = ref == NULL ? SIZE_MAX : plan_input_index(pl, ref);
        s->from[i] = rs->sources[i].from;
        s->parameters[i] = rs->sources[i].parameters;
        if (base->text != NULL && ref != NULL && strcmp(ref, base->text) == 0)
            s->base = (int)i;
    }
    s->n = rs->n_sources;
    if (base->text != NULL && s->base < 0 && rs->whole) {
        s->base = (int)s->n;
        s->input[s->n++] = plan_input_index(pl, base->text);
    }
    for (size_t i = 0; i < s->n; i++)
        s->usable[i] = s->input[i] != SIZE_MAX && pl->refs[s->input[i]].usable;
    if (base->text != NULL)
        warn_same_place(pl, s, base);
    return TV_OK;
}

/* The first module (or the one of that name) whose depth differs between two
 * models of one architecture; NULL: none. *other is b's. */
static const struct tv_arch_module *
other_depth(const struct tv_arch *a, const struct tv_arch *b,
            const char *module, const struct tv_arch_module **other)
{
    for (size_t i = 0; i < a->n_modules; i++) {
        if (module != NULL && strcmp(module, a->modules[i].name) != 0)
            continue;
        for (size_t k = 0; k < b->n_modules; k++) {
            *other = &b->modules[k];
            if (strcmp(a->modules[i].name, b->modules[k].name) == 0 &&
                a->modules[i].n_layers != b->modules[k].n_layers)
                return &a->modules[i];
        }
    }
    return NULL;
}

/* `models:`: every model is used whole, so all need the same depth. */
static void whole_layers(struct planner *pl, struct plan_slice *s)
{
    size_t first = s->n;
    for (size_t i = 0; i < s->n; i++) {
        if (!s->usable[i])
            continue;
        const struct tvm_plan_input *const in = &pl->plan->inputs[s->input[i]];
        const struct tv_arch_module *m = NULL;
        const struct tv_arch_module *o = NULL;
        if (first == s->n) {
            first = i;
            s->n_layers = plan_slice_depth(s, in->arch);
            continue;
        }
        m = other_depth(in->arch, pl->plan->inputs[s->input[first]].arch,
                        s->module, &o);
        if (m == NULL)
            continue;
        s->usable[i] = false;
        if (pl->agree)
            plan_report(pl, "layer counts", 20, true, TV_E_INPUT,
                        plan_where(pl, pl->refs[s->input[i]].where),
                        "'%s' has %lld layers%s%s, '%s' has %lld", in->ref,
                        (long long)m->n_layers,
                        m->name[0] == '\0' ? "" : " of ", m->name,
                        pl->plan->inputs[s->input[first]].ref,
                        (long long)o->n_layers);
    }
}

static void ranged_layers(struct planner *pl, struct plan_slice *s)
{
    const struct tvm_recipe_slice *const rs = s->recipe;
    for (size_t i = s->n; i-- > 0;) {
        if (rs->sources[i].has_range)
            s->n_layers = rs->sources[i].to - rs->sources[i].from;
    }
    for (size_t i = 0; i < s->n; i++) {
        const struct tvm_recipe_source *const src = &rs->sources[i];
        if (!src->has_range) /* reported with the recipe */
            s->usable[i] = false;
        if (!s->usable[i])
            continue;
        if (src->to - src->from != s->n_layers) /* reported too */
            s->usable[i] = false;
        const struct tv_arch *const a = pl->plan->inputs[s->input[i]].arch;
        if (s->module == NULL && !a->modules[0].is_main) {
            s->usable[i] = false;
            plan_report(pl, "stacks of several", 1, true, TV_E_UNSUPPORTED,
                        plan_where(pl, &pl->r->slices[0].sources[0].model),
                        "'%s' has several stacks of layers (%s, %s, ...), and "
                        "'slices:' does not say which; use 'modules:'",
                        src->model.text, a->modules[0].name,
                        a->modules[a->n_modules > 1 ? 1 : 0].name);
            continue;
        }
        const int64_t n = plan_slice_depth(s, a);
        if (src->to <= n)
            continue;
        const struct tvm_recipe_ref at = {"", src->range_line, src->range_col};
        s->usable[i] = false;
        plan_report(pl, "layer ranges", 20, true, TV_E_INPUT,
                    plan_where(pl, &at),
                    "layer_range [%lld, %lld] goes past the end of '%s', "
                    "which has %lld layers%s%s",
                    (long long)src->from, (long long)src->to, src->model.text,
                    (long long)n, s->module == NULL ? "" : " of ",
                    s->module == NULL ? "" : s->module);
    }
}

static const char *count_rule(size_t min, size_t max, char *dst, size_t cap)
{
    if (min == max)
        (void)snprintf(dst, cap, "exactly %zu model%s", min,
                       min == 1 ? "" : "s");
    else if (max >= TVK_DONORS_MAX)
        (void)snprintf(dst, cap, "at least %zu model%s", min,
                       min == 1 ? "" : "s");
    else
        (void)snprintf(dst, cap, "%zu to %zu models", min, max);
    return dst;
}

/* Base and number of models, for the whole slice. */
static void check_roles(struct planner *pl, struct plan_slice *s,
                        const struct tvm_recipe_ref *base)
{
    const struct tvm_method *const m = pl->r->method;
    const struct tvm_recipe_ref slice_at = {"", s->recipe->line,
                                            s->recipe->col};
    const struct tvm_recipe_ref method_at = {"", pl->r->method_line,
                                             pl->r->method_col};
    char rule[64];
    size_t n = s->n;

    if (m == NULL || (base->line != 0 && base->text == NULL) ||
        s->recipe->n_sources == 0 || s->recipe->n_sources > TVK_DONORS_MAX) {
        /* Reported with the recipe. */
        s->broken = true;
        return;
    }
    if (m->base == TVM_BASE_REQUIRED && base->text == NULL) {
        s->broken = true;
        plan_report(pl, "no base model", 1, true, TV_E_USAGE,
                    plan_where(pl, &method_at),
                    "%s needs base_model, the model that the others were made "
                    "from",
                    m->name);
        return;
    }
    if (base->text != NULL && s->base < 0 && !m->base_counts &&
        m->base != TVM_BASE_NONE) {
        s->broken = true;
        plan_report(pl, "slices without the base", 20, true, TV_E_USAGE,
                    plan_where(pl, &slice_at),
                    "base_model '%s' must be one of the sources of this slice",
                    base->text);
        return;
    }
    if (!m->base_counts && m->base != TVM_BASE_NONE && s->base >= 0)
        n--;
    if (n >= m->min_donors && n <= m->max_donors)
        return;
    s->broken = true;
    plan_report(pl, "numbers of models", 20, true, TV_E_USAGE,
                plan_where(pl, &slice_at), "%s takes %s%s, there %s %zu%s",
                m->name,
                count_rule(m->min_donors, m->max_donors, rule, sizeof(rule)),
                m->base == TVM_BASE_NONE         ? ""
                : m->base_counts && s->base >= 0 ? ", the base counted"
                : s->base >= 0                   ? " beside the base"
                                                 : "",
                n == 1 ? "is" : "are", n,
                s->base >= 0 && (size_t)s->base >= s->recipe->n_sources &&
                        m->base_counts
                    ? " (base_model is not in the list and counts as one more)"
                    : "");
}

/* Layers of the modules in the output; that of the main one is the model's. */
static enum tv_err count_layers(struct planner *pl)
{
    const struct tv_arch *const a =
        pl->plan->n_inputs > 0 && pl->refs[pl->st->donor].usable
            ? pl->plan->inputs[pl->st->donor].arch
            : NULL;
    int64_t n = 0;

    for (size_t i = 0; i < pl->n_slices; i++) {
        struct plan_slice *const s = &pl->slices[i];
        if (s->is_first)
            n = 0;
        s->out_from = n;
        if (n > INT64_MAX - s->n_layers)
            return tv_error_set(pl->err, TV_E_USAGE, "too many layers");
        n += s->n_layers;
        for (size_t k = i; s->is_last; k--) {
            pl->slices[k].n_out = n;
            if (pl->slices[k].is_first)
                break;
        }
        if (s->is_last && (s->module == NULL || a == NULL ||
                           strcmp(s->module, a->modules[0].name) == 0))
            pl->n_layers = n;
    }
    return TV_OK;
}

enum tv_err plan_make_slices(struct planner *pl)
{
    const struct tvm_recipe *const r = pl->r;
    enum tv_err rc = TV_OK;

    TV_TRY(plan_modules_make(pl));
    for (size_t i = 0; i < pl->n_slices; i++) {
        static const struct tvm_recipe_ref none = {NULL, 0, 0};
        struct plan_slice *const s = &pl->slices[i];
        const struct tvm_recipe_ref *const base = s->is_copy ? &none
                                                  : s->recipe->base.line != 0
                                                      ? &s->recipe->base
                                                      : &r->base;
        TV_TRY(slice_sources(pl, s, base));
        if (s->recipe->whole)
            whole_layers(pl, s);
        else
            ranged_layers(pl, s);
        for (size_t k = 0; k < s->n; k++)
            s->broken = s->broken || !s->usable[k];
        if (s->is_copy)
            continue;
        check_roles(pl, s, base);
        if (r->method != NULL && r->method->base == TVM_BASE_NONE)
            s->base = -1;
    }
    TV_TRY(count_layers(pl));
out:
    return rc;
}

/* Is a parameter given at some level, whatever its filters match? */
static bool is_given(const struct planner *pl, const struct plan_slice *s,
                     size_t source, const char *name)
{
    const struct tvm_recipe_slice *const rs = s->recipe;
    return (source < rs->n_sources &&
            (rs->sources[source].bad_parameters ||
             !tvm_node_is_null(tvm_node_find(s->parameters[source], name)))) ||
           rs->bad_parameters || pl->r->bad_parameters ||
           (s->of != NULL &&
            (s->of->bad_parameters ||
             !tvm_node_is_null(tvm_node_find(s->of->parameters, name)))) ||
           !tvm_node_is_null(tvm_node_find(rs->parameters, name)) ||
           !tvm_node_is_null(tvm_node_find(pl->r->parameters, name));
}

void plan_check_required(struct planner *pl)
{
    const struct tvm_method *const m = pl->r->method;
    if (m == NULL)
        return;
    for (size_t i = 0; i < pl->n_slices; i++) {
        const struct plan_slice *const s = &pl->slices[i];
        if (s->is_copy)
            continue;
        for (size_t k = 0; k < s->recipe->n_sources; k++) {
            const struct tvm_recipe_ref *const ref =
                &s->recipe->sources[k].model;
            if (ref->text == NULL || (pl->agree && s->usable[k]))
                continue;
            for (size_t j = 0; j < m->n_params; j++) {
                const struct tvm_param *const p = &m->params[j];
                if (!p->required || p->scope == TVM_SHARED ||
                    (p->scope == TVM_NON_BASE && s->base == (int)k) ||
                    is_given(pl, s, k, p->name))
                    continue;
                plan_report(pl, "missing parameters", 20, true, TV_E_USAGE,
                            plan_where(pl, ref),
                            "missing required parameter '%s' for '%s'", p->name,
                            ref->text);
            }
        }
        bool any = false;
        for (size_t k = 0; k < s->n; k++)
            any = any || (pl->agree && s->usable[k]);
        for (size_t j = 0; j < m->n_params && !any; j++) {
            const struct tvm_param *const p = &m->params[j];
            const struct tvm_recipe_ref at = {"", pl->r->method_line,
                                              pl->r->method_col};
            char cause[128];
            if (!p->required || p->scope != TVM_SHARED ||
                is_given(pl, s, SIZE_MAX, p->name))
                continue;
            (void)snprintf(cause, sizeof(cause), "missing parameter '%s'",
                           p->name);
            plan_report(pl, cause, 1, true, TV_E_USAGE, plan_where(pl, &at),
                        "missing required parameter '%s' of %s", p->name,
                        m->name);
        }
    }
}
