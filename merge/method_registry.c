/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_registry.c - the one list of merge methods.
 *
 * A new method is a file of its own and one line in `methods`. The order is
 * that of `tvmerge methods`.
 */
#include "method.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "tv/text.h"

static const struct tvm_method *const methods[] = {
    &tvm_method_linear,
    &tvm_method_slerp,
    &tvm_method_nuslerp,
    &tvm_method_multislerp,
    &tvm_method_karcher,
    &tvm_method_task_arithmetic,
    &tvm_method_ties,
    &tvm_method_sparsegpt_ties,
    &tvm_method_sparsegpt_linear,
    &tvm_method_dare_linear,
    &tvm_method_dare_ties,
    &tvm_method_breadcrumbs,
    &tvm_method_breadcrumbs_ties,
    &tvm_method_della,
    &tvm_method_della_linear,
    &tvm_method_model_stock,
    &tvm_method_sce,
    &tvm_method_ram,
    &tvm_method_ramplus_tl,
    &tvm_method_nearswap,
    &tvm_method_arcee_fusion,
    &tvm_method_passthrough,
    &tvm_method_consensus,
    &tvm_method_tsv,
    &tvm_method_iso_c,
    &tvm_method_wudi,
    &tvm_method_emr,
    &tvm_method_cabs,
    &tvm_method_fisher,
    &tvm_method_regmean,
    &tvm_method_regmean_plus,
};
#define N_METHODS (sizeof methods / sizeof *methods)

size_t tvm_method_count(void)
{
    return N_METHODS;
}

const struct tvm_method *tvm_method_at(size_t i)
{
    return i < N_METHODS ? methods[i] : NULL;
}

/* Other names that recipes use. */
static const char *const aliases[][2] = {
    {"ties_sparsegpt", "sparsegpt_ties"},
    {"dare_sparsegpt", "sparsegpt_linear"},
};

const struct tvm_method *tvm_method_find(const char *name)
{
    for (size_t i = 0; i < sizeof aliases / sizeof *aliases; i++)
        if (strcmp(aliases[i][0], name) == 0)
            name = aliases[i][1];
    for (size_t i = 0; i < N_METHODS; i++)
        if (strcmp(methods[i]->name, name) == 0)
            return methods[i];
    return NULL;
}

const char *tvm_method_suggest(const char *name)
{
    const char *names[N_METHODS];
    char folded[64];
    size_t n = 0;

    for (size_t i = 0; i < N_METHODS; i++)
        names[i] = methods[i]->name;
    /* Case and dashes are the usual mistakes and may cost many edits. */
    for (; name[n] != '\0' && n + 1 < sizeof folded; n++) {
        const char c = name[n];
        folded[n] = c;
        if (c >= 'A' && c <= 'Z')
            folded[n] = (char)(c - 'A' + 'a');
        if (c == '-' || c == ' ')
            folded[n] = '_';
    }
    folded[n] = '\0';
    return tv_suggest(folded, names, N_METHODS);
}

void tvm_method_info(const struct tvm_method *m, struct tvm_method_info *out)
{
    *out = (struct tvm_method_info){
        .name = m->name,
        .summary = m->summary,
        .paper = m->paper,
        .base = m->base,
        .needs_statistics = m->needs_statistics,
        .params = m->params,
        .n_params = m->n_params,
    };
}

void tvm_param_problem(const struct tvm_tensor *t, size_t p, size_t source,
                       struct tvm_problems *problems, const char *fmt, ...)
{
    const size_t before = problems->n;
    char message[512];
    va_list ap;

    va_start(ap, fmt);
    (void)vsnprintf(message, sizeof message, fmt, ap);
    va_end(ap);
    tvm_problem_add(problems, true, TV_E_USAGE, t->name, "%s", message);
    if (problems->n == before)
        return;
    problems->items[before].of_param = true;
    problems->items[before].param = p;
    problems->items[before].source = source;
}

bool tvm_weights_cancel(const struct tvm_tensor *t, size_t p)
{
    double sum = 0.0, size = 0.0;

    for (size_t s = 0; s < t->n_sources; s++) {
        const double w = tvm_of(t, s, p, t->method->n_params);
        if ((int)s == t->base && !t->method->base_counts)
            continue;
        sum += w;
        size += fabs(w);
    }
    return fabs(sum) <= size * 0x1p-44;
}

void tvm_check_finite(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    const struct tvm_method *m = t->method;

    for (size_t p = 0; p < m->n_params; p++) {
        const char *name = m->params[p].name;
        if (m->params[p].scope == TVM_SHARED) {
            if (t->shared_set[p] && !isfinite(t->shared[p]))
                tvm_param_problem(t, p, SIZE_MAX, problems,
                                  "parameter '%s' is not a finite number",
                                  name);
            continue;
        }
        for (size_t s = 0; s < t->n_sources; s++) {
            const size_t at = s * m->n_params + p;
            if (t->per_source_set[at] && !isfinite(t->per_source[at]))
                tvm_param_problem(t, p, s, problems,
                                  "parameter '%s' is not a finite number",
                                  name);
        }
    }
}
