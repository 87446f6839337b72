/* SPDX-License-Identifier: Apache-2.0 */
/*
 * problems.c - the list of everything wrong with a recipe or plan.
 *
 * A user repairs a recipe in one round when all problems are listed at once.
 * Out of memory while adding still counts the error, so that a list can never
 * look clean by accident.
 */
#include "tv/merge.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"

void tvm_problems_init(struct tvm_problems *p)
{
    memset(p, 0, sizeof(*p));
}

void tvm_problems_free(struct tvm_problems *p)
{
    if (p == NULL)
        return;
    for (size_t i = 0; i < p->n; i++) {
        tv_free(p->items[i].where);
        tv_free(p->items[i].message);
    }
    tv_free(p->items);
    memset(p, 0, sizeof(*p));
}

void tvm_problem_add(struct tvm_problems *p, bool is_error, enum tv_err code,
                     const char *where, const char *fmt, ...)
{
    char *at = NULL;
    char *message = NULL;
    va_list ap;
    int n = 0;

    if (is_error)
        p->n_errors++;
    if (p->n == p->cap) {
        const size_t cap = p->cap == 0 ? 16 : 2 * p->cap;
        struct tvm_problem *const more =
            tv_realloc(p->items, cap * sizeof(*more));
        if (more == NULL)
            return;
        p->items = more;
        p->cap = cap;
    }
    va_start(ap, fmt);
    n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (n < 0)
        n = 0;
    message = tv_alloc((size_t)n + 1);
    at = tv_strdup(where == NULL ? "" : where);
    if (message == NULL || at == NULL) {
        tv_free(message);
        tv_free(at);
        return;
    }
    va_start(ap, fmt);
    (void)vsnprintf(message, (size_t)n + 1, fmt, ap);
    va_end(ap);
    p->items[p->n].is_error = is_error;
    p->items[p->n].code = is_error ? code : TV_OK;
    p->items[p->n].where = at;
    p->items[p->n].message = message;
    p->items[p->n].is_note = false;
    p->items[p->n].of_param = false;
    p->n++;
}

void tvm_problem_note(struct tvm_problems *p, const char *where,
                      const char *fmt, ...)
{
    const size_t before = p->n;
    char message[512];
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(message, sizeof(message), fmt, ap);
    va_end(ap);
    tvm_problem_add(p, false, TV_OK, where, "%s", message);
    if (p->n > before)
        p->items[before].is_note = true;
}

/* Place of a code in the order of exit statuses 2, 4, 12, 5, others. */
static int code_order(enum tv_err code)
{
    switch (code) {
    case TV_E_USAGE:
        return 0;
    case TV_E_INPUT:
    case TV_E_CHANGED:
    case TV_E_EXISTS:
    case TV_E_UNSUPPORTED:
    case TV_E_NUMERICS:
        return 1;
    case TV_E_CORRUPT:
        return 2;
    case TV_E_NOSPACE:
    case TV_E_BUDGET:
        return 3;
    default:
        return 4;
    }
}

enum tv_err tvm_problems_code(const struct tvm_problems *p)
{
    enum tv_err best = TV_OK;
    if (p->n_errors == 0)
        return TV_OK;
    for (size_t i = 0; i < p->n; i++) {
        if (!p->items[i].is_error)
            continue;
        if (best == TV_OK || code_order(p->items[i].code) < code_order(best))
            best = p->items[i].code;
    }
    return best == TV_OK ? TV_E_NOMEM : best;
}
