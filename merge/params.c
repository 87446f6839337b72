/* SPDX-License-Identifier: Apache-2.0 */
/*
 * params.c - settings: checking once per recipe, resolving once per tensor.
 *
 * The language is mergekit's (its parameter_resolver and conditional/gradient
 * settings): filters are plain substrings, the first match in a list wins, an
 * empty list or no match counts as absent. Checking visits every value with its
 * position, so resolving can only meet one error: an interpolated value that
 * is no integer.
 */
#include "params.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tv/text.h"

static const char *type_name(enum tvm_type type)
{
    switch (type) {
    case TVM_INT:
        return "an integer";
    case TVM_BOOL:
        return "true or false";
    case TVM_CHOICE:
        return "one of its choices";
    default:
        return "a number";
    }
}

bool tvm_dead_key(const char *key)
{
    static const char *const dead[] = {"input_model_parameters", "embed_slerp",
                                       "consensus_method", "name"};
    for (size_t i = 0; i < sizeof(dead) / sizeof(dead[0]); i++) {
        if (strcmp(key, dead[i]) == 0)
            return true;
    }
    return false;
}

/* A scalar as the declared type; bools count as 0 and 1 for numbers, and 0 and
 * 1 as bools, as pydantic's lax mode has it. */
static bool coerce(const struct tvm_node *node, const struct tvm_param *p,
                   double *out)
{
    const enum tvm_type type = p->type;
    bool b = false;
    double v = 0;
    if (type == TVM_CHOICE) {
        for (size_t i = 0; p->choices[i] != NULL; i++) {
            if (strcmp(p->choices[i], node->text) != 0)
                continue;
            *out = (double)i;
            return true;
        }
        return false;
    }
    if (tvm_node_bool(node, &b)) {
        *out = b ? 1 : 0;
        return true;
    }
    if (!tvm_node_number(node, &v))
        return false;
    if (type == TVM_BOOL && v != 0 && v != 1)
        return false;
    if (type == TVM_INT && (v != floor(v) || fabs(v) > 9007199254740992.0))
        return false;
    *out = v;
    return true;
}

/* ---- checking -------------------------------------------------------------
 */

struct check {
    const struct tvm_recipe *r;
    struct tvm_problems *problems;
    const struct tvm_param *param;
};

static void complain(const struct check *c, const struct tvm_node *at,
                     const char *what)
{
    char where[TVM_WHERE_MAX];
    tvm_problem_add(
        c->problems, true, TV_E_USAGE,
        tvm_where(where, sizeof(where), c->r->path, at->line, at->col),
        "parameter '%s': %s", c->param->name, what);
}

static void complain_choice(const struct check *c, const struct tvm_node *at,
                            const char *text)
{
    const char *const *const names = c->param->choices;
    struct tv_buf message;
    size_t n = 0;
    tv_buf_init(&message, 1024);
    tv_buf_fmt(&message, "'%s' is not one of ", text);
    for (; names[n] != NULL; n++)
        tv_buf_fmt(&message, "%s%s", n == 0 ? "" : ", ", names[n]);
    const char *const like = tv_suggest(text, names, n);
    if (like != NULL)
        tv_buf_fmt(&message, "; did you mean '%s'?", like);
    complain(c, at, message.failed ? "not one of its choices" : message.data);
    tv_buf_free(&message);
}

/* Values between those of a list lie between them, so this finds every value
 * that a tensor could get. */
static void check_bounds(const struct check *c, const struct tvm_node *node,
                         double v)
{
    const struct tvm_param *const p = c->param;
    char message[160];
    if ((!p->has_min || v >= p->min) && (!p->has_max || v <= p->max))
        return;
    if (strcmp(p->name, "density") == 0 && p->has_min && p->has_max)
        (void)snprintf(message, sizeof(message),
                       "%.10g is not between %.10g and %.10g; mergekit takes "
                       "it as %.10g: write that",
                       v, p->min, p->max, v < p->min ? p->min : p->max);
    else if (p->has_min && p->has_max)
        (void)snprintf(message, sizeof(message),
                       "%.10g is not between %.10g and %.10g", v, p->min,
                       p->max);
    else if (p->has_min)
        (void)snprintf(message, sizeof(message), "%.10g is less than %.10g", v,
                       p->min);
    else
        (void)snprintf(message, sizeof(message), "%.10g is more than %.10g", v,
                       p->max);
    complain(c, node, message);
}

static void check_scalar(const struct check *c, const struct tvm_node *node)
{
    char text[64];
    char message[160];
    double v = 0;
    if (node->kind != TVM_NODE_SCALAR) {
        complain(c, node,
                 "a list of values must hold numbers only, or only "
                 "{value, filter} entries");
        return;
    }
    if (coerce(node, c->param, &v)) {
        check_bounds(c, node, v);
        return;
    }
    (void)tv_text_printable(node->text, text, sizeof(text));
    if (c->param->type == TVM_CHOICE) {
        complain_choice(c, node, text);
        return;
    }
    (void)snprintf(message, sizeof(message), "'%s' is not %s", text,
                   type_name(c->param->type));
    complain(c, node, message);
}

static void check_value(const struct check *c, const struct tvm_node *node)
{
    if (node->kind == TVM_NODE_LIST) {
        for (const struct tvm_node *v = node->first; v != NULL; v = v->next)
            check_scalar(c, v);
    } else if (node->kind == TVM_NODE_SCALAR) {
        check_scalar(c, node);
    } else {
        complain(c, node, "'value' must be a scalar or a list");
    }
}

static void check_conditional(const struct check *c,
                              const struct tvm_node *node)
{
    static const char *const keys[] = {"value", "filter"};
    const struct tvm_node *const value = tvm_node_find(node, "value");
    char where[TVM_WHERE_MAX];
    char text[64];
    for (const struct tvm_node *e = node->first; e != NULL; e = e->next) {
        const char *like = NULL;
        if (strcmp(e->key, "value") == 0)
            continue;
        if (strcmp(e->key, "filter") == 0) {
            if (e->kind != TVM_NODE_SCALAR)
                complain(c, e, "'filter' must be a piece of a tensor name");
            continue;
        }
        like = tv_suggest(e->key, keys, 2);
        tvm_problem_add(c->problems, false, TV_OK,
                        tvm_where(where, sizeof(where), c->r->path, e->key_line,
                                  e->key_col),
                        "unknown key '%s' in a setting is ignored%s%s%s",
                        tv_text_printable(e->key, text, sizeof(text)),
                        like == NULL ? "" : "; did you mean '",
                        like == NULL ? "" : like, like == NULL ? "" : "'?");
    }
    if (value == NULL)
        complain(c, node, "an entry with a filter needs 'value'");
    else
        check_value(c, value);
}

static void check_setting(const struct check *c, const struct tvm_node *node)
{
    if (tvm_node_is_null(node))
        return;
    if (node->kind == TVM_NODE_MAP) {
        check_conditional(c, node);
    } else if (node->kind == TVM_NODE_LIST && node->first != NULL &&
               node->first->kind == TVM_NODE_MAP) {
        for (const struct tvm_node *e = node->first; e != NULL; e = e->next) {
            if (e->kind == TVM_NODE_MAP)
                check_conditional(c, e);
            else
                complain(c, e,
                         "a list holds either plain values or {value, "
                         "filter} entries, not both; for a last resort "
                         "write '- value: ...'");
        }
    } else {
        check_value(c, node);
    }
}

/* A recipe that several methods take has what only some of them know. */
static bool is_of_another(const char *key)
{
    for (size_t i = 0; i < tvm_method_count(); i++) {
        struct tvm_method_info m;
        tvm_method_info(tvm_method_at(i), &m);
        for (size_t k = 0; k < m.n_params; k++)
            if (strcmp(m.params[k].name, key) == 0)
                return true;
    }
    return false;
}

static void unknown_parameter(const struct tvm_recipe *r,
                              const struct tvm_node *e,
                              struct tvm_problems *problems)
{
    const char *names[TVM_PARAMS_MAX] = {NULL};
    char where[TVM_WHERE_MAX];
    char text[64];
    struct tv_buf list;
    const char *like = NULL;
    const size_t n =
        r->info.n_params < TVM_PARAMS_MAX ? r->info.n_params : TVM_PARAMS_MAX;
    (void)tvm_where(where, sizeof(where), r->path, e->key_line, e->key_col);
    (void)tv_text_printable(e->key, text, sizeof(text));
    if (tvm_dead_key(e->key)) {
        tvm_problem_add(problems, false, TV_OK, where,
                        "'%s' has no effect (nor in mergekit)", text);
        return;
    }
    tv_buf_init(&list, 4096);
    for (size_t i = 0; i < n; i++) {
        names[i] = r->info.params[i].name;
        tv_buf_fmt(&list, "%s%s", i == 0 ? "" : ", ", names[i]);
    }
    like = tv_suggest(e->key, names, n);
    if (like == NULL && r->other_method && is_of_another(e->key)) {
        tv_buf_free(&list);
        return;
    }
    if (like != NULL)
        tvm_problem_add(problems, false, TV_OK, where,
                        "%s has no parameter '%s', it is ignored; did you "
                        "mean '%s'?",
                        r->info.name, text, like);
    else
        tvm_problem_add(problems, false, TV_OK, where,
                        "%s has no parameter '%s', it is ignored (it takes: "
                        "%s)",
                        r->info.name, text,
                        list.failed || n == 0 ? "none" : list.data);
    tv_buf_free(&list);
}

bool tvm_setting_ok(const struct tvm_recipe *r, const struct tvm_param *p,
                    const struct tvm_node *setting)
{
    struct tvm_problems found;
    const struct check c = {r, &found, p};
    bool ok = true;
    tvm_problems_init(&found);
    check_setting(&c, setting);
    ok = found.n_errors == 0;
    tvm_problems_free(&found);
    return ok;
}

/* Without a method: wrong is what no method with such a parameter takes. */
static void check_for_any(const struct tvm_recipe *r, const struct tvm_node *e,
                          struct tvm_problems *problems)
{
    struct check c = {r, problems, NULL};
    for (size_t m = 0; m < tvm_method_count(); m++) {
        struct tvm_method_info info;
        tvm_method_info(tvm_method_at(m), &info);
        for (size_t i = 0; i < info.n_params; i++) {
            if (strcmp(info.params[i].name, e->key) != 0)
                continue;
            if (tvm_setting_ok(r, &info.params[i], e))
                return;
            c.param = &info.params[i];
        }
    }
    if (c.param != NULL)
        check_setting(&c, e);
}

void tvm_params_check(const struct tvm_recipe *r, const struct tvm_node *map,
                      struct tvm_problems *problems)
{
    struct check c = {r, problems, NULL};
    if (r->method == NULL) {
        for (const struct tvm_node *e = map->first; e != NULL; e = e->next)
            check_for_any(r, e, problems);
        return;
    }
    for (const struct tvm_node *e = map->first; e != NULL; e = e->next) {
        c.param = NULL;
        for (size_t i = 0; i < r->info.n_params && c.param == NULL; i++) {
            if (strcmp(r->info.params[i].name, e->key) == 0)
                c.param = &r->info.params[i];
        }
        if (c.param == NULL)
            unknown_parameter(r, e, problems);
        else
            check_setting(&c, e);
    }
}

/* ---- resolving ------------------------------------------------------------
 */

double tvm_gradient_at(int64_t k, int64_t n_layers)
{
    if (k < 0)
        return 0;
    if (n_layers <= 1)
        return 1;
    return (double)k / (double)(n_layers - 1);
}

static const struct tvm_node *nth(const struct tvm_node *list, size_t i)
{
    const struct tvm_node *c = list->first;
    for (; i > 0 && c != NULL; i--)
        c = c->next;
    return c;
}

/* A scalar or gradient; false when it is an empty list. */
static bool evaluate(const struct tvm_param *p, const struct tvm_node *node,
                     double t, struct tvm_value *out)
{
    if (node->kind == TVM_NODE_SCALAR) {
        out->from = node;
        return coerce(node, p, &out->value);
    }
    if (node->kind != TVM_NODE_LIST || node->n == 0)
        return false;
    const double s = t * (double)(node->n - 1);
    const double floor_s = floor(s);
    const size_t i = floor_s < 0                       ? 0
                     : floor_s > (double)(node->n - 1) ? node->n - 1
                                                       : (size_t)floor_s;
    const struct tvm_node *const a = nth(node, i);
    const struct tvm_node *const b = a->next == NULL ? a : a->next;
    double va = 0;
    double vb = 0;
    out->from = a;
    if (!coerce(a, p, &va) || !coerce(b, p, &vb))
        return false;
    if (p->type == TVM_BOOL || p->type == TVM_CHOICE) {
        out->value = va;
        return true;
    }
    const double f = s - floor_s;
    out->value = (1 - f) * va + f * vb;
    out->fraction = p->type == TVM_INT && out->value != floor(out->value);
    return true;
}

static bool filter_matches(const struct tvm_node *entry, const char *name)
{
    const struct tvm_node *const filter = tvm_node_find(entry, "filter");
    if (tvm_node_is_null(filter))
        return true;
    return strcmp(filter->text, "*") == 0 || strstr(name, filter->text) != NULL;
}

static bool resolve_setting(const struct tvm_param *p,
                            const struct tvm_node *node, const char *name,
                            double t, struct tvm_value *out)
{
    if (tvm_node_is_null(node))
        return false;
    if (node->kind == TVM_NODE_MAP)
        return filter_matches(node, name) &&
               evaluate(p, tvm_node_find(node, "value"), t, out);
    if (node->kind == TVM_NODE_LIST && node->first != NULL &&
        node->first->kind == TVM_NODE_MAP) {
        for (const struct tvm_node *e = node->first; e != NULL; e = e->next) {
            if (filter_matches(e, name))
                return evaluate(p, tvm_node_find(e, "value"), t, out);
        }
        return false;
    }
    return evaluate(p, node, t, out);
}

struct tvm_value tvm_param_resolve(const struct tvm_param *p,
                                   const struct tvm_node *const *levels,
                                   size_t n_levels, const char *name, double t)
{
    struct tvm_value v = {false, 0, NULL, false};
    for (size_t i = 0; i < n_levels; i++) {
        if (levels[i] != NULL &&
            resolve_setting(p, tvm_node_find(levels[i], p->name), name, t,
                            &v)) {
            v.set = true;
            return v;
        }
    }
    v.from = NULL;
    v.fraction = false;
    v.value = p->has_default ? p->fallback : 0;
    v.set = p->has_default;
    return v;
}
