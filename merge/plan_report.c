/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_report.c - problems of planning, listed once per cause.
 *
 * One mistake in a recipe can touch every tensor of a model. Each cause is
 * listed up to its limit; what is left is counted.
 */
#include "plan_parts.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"

enum tv_err plan_oom(struct planner *pl)
{
    return tv_error_set(pl->err, TV_E_NOMEM, "out of memory while planning");
}

bool plan_fatal(enum tv_err code)
{
    return code == TV_E_NOMEM || code == TV_E_INTERNAL;
}

const char *plan_where(struct planner *pl, const struct tvm_recipe_ref *ref)
{
    const char *const s = tvm_arena_fmt(plan_arena(pl), "%s:%u:%u", pl->r->path,
                                        ref->line, ref->col);
    pl->oom = pl->oom || s == NULL;
    return s == NULL ? "" : s;
}

static struct plan_cause *cause_find(struct planner *pl, const char *key,
                                     size_t limit)
{
    for (size_t i = 0; i < pl->n_causes; i++) {
        if (strcmp(pl->causes[i].key, key) == 0)
            return &pl->causes[i];
    }
    if (pl->n_causes == pl->cap_causes) {
        const size_t cap = pl->cap_causes == 0 ? 16 : 2 * pl->cap_causes;
        struct plan_cause *const more =
            tv_realloc(pl->causes, cap * sizeof(*more));
        if (more == NULL)
            return NULL;
        pl->causes = more;
        pl->cap_causes = cap;
    }
    struct plan_cause *const c = &pl->causes[pl->n_causes];
    memset(c, 0, sizeof(*c));
    c->key = tvm_arena_strdup(plan_arena(pl), key);
    c->limit = limit;
    if (c->key == NULL)
        return NULL;
    pl->n_causes++;
    return c;
}

static void report(struct planner *pl, const char *cause, size_t limit,
                   const struct plan_cause *what, const char *where,
                   const char *fmt, va_list ap)
{
    char *message = NULL;
    va_list again;
    int n = 0;
    struct plan_cause *const c = cause_find(pl, cause, limit);

    if (c == NULL) {
        pl->oom = true;
        return;
    }
    c->is_error = what->is_error;
    c->is_note = what->is_note;
    c->code = what->code;
    c->n++;
    if (c->n > limit)
        return;
    va_copy(again, ap);
    n = vsnprintf(NULL, 0, fmt, again);
    va_end(again);
    message = tv_alloc(n < 0 ? 1 : (size_t)n + 1);
    if (message == NULL) {
        pl->oom = true;
        return;
    }
    (void)vsnprintf(message, n < 0 ? 1 : (size_t)n + 1, fmt, ap);
    if (what->is_note)
        tvm_problem_note(pl->problems, where, "%s", message);
    else
        tvm_problem_add(pl->problems, what->is_error, what->code, where, "%s",
                        message);
    tv_free(message);
}

void plan_report(struct planner *pl, const char *cause, size_t limit,
                 bool is_error, enum tv_err code, const char *where,
                 const char *fmt, ...)
{
    const struct plan_cause what = {.is_error = is_error, .code = code};
    va_list ap;

    va_start(ap, fmt);
    report(pl, cause, limit, &what, where, fmt, ap);
    va_end(ap);
}

void plan_note(struct planner *pl, const char *cause, size_t limit,
               const char *where, const char *fmt, ...)
{
    const struct plan_cause what = {.is_note = true};
    va_list ap;

    va_start(ap, fmt);
    report(pl, cause, limit, &what, where, fmt, ap);
    va_end(ap);
}

void plan_report_rest(struct planner *pl)
{
    for (size_t i = 0; i < pl->n_causes; i++) {
        const struct plan_cause *const c = &pl->causes[i];
        /* What is given once has said everything. */
        if (c->n <= c->limit || c->limit <= 1)
            continue;
        if (c->is_note)
            tvm_problem_note(pl->problems, "", "\xe2\x80\xa6 and %zu more: %s",
                             c->n - c->limit, c->key);
        else
            tvm_problem_add(pl->problems, c->is_error, c->code, "",
                            "\xe2\x80\xa6 and %zu more: %s", c->n - c->limit,
                            c->key);
    }
}

const char *tvm_plan_choice(const struct tvm_plan *p, const char *name)
{
    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *const t = &p->tensors[i];
        if (t->action != TVM_MERGE || t->method == NULL)
            continue;
        for (size_t k = 0; k < t->method->n_params; k++) {
            const struct tvm_param *const of = &t->method->params[k];
            if (of->type == TVM_CHOICE && of->scope == TVM_SHARED &&
                strcmp(of->name, name) == 0)
                return of->choices[(size_t)t->shared[k]];
        }
        break;
    }
    return NULL;
}
