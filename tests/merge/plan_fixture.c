/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_fixture.c - see plan_fixture.h.
 */
#include "plan_fixture.h"

#include <string.h>

#include "method.h"
#include "tv/alloc.h"
#include "tv/text.h"

void print_problems(const struct tvm_problems *p)
{
    for (size_t i = 0; i < p->n; i++)
        print_message("  %s [%s] %s: %s\n",
                      p->items[i].is_error ? "error" : "note",
                      tv_err_name(p->items[i].code), p->items[i].where,
                      p->items[i].message);
}

void plan_text(struct planned *p, const char *dir, const char *text,
               const struct tvm_options *o)
{
    struct tvm_options defaults;
    struct tv_buf b;
    char *path = NULL;
    enum tv_err rc = TV_OK;

    memset(p, 0, sizeof(*p));
    tvm_options_init(&defaults);
    tvm_problems_init(&p->problems);
    tv_buf_init(&b, 1u << 20);
    for (; *text != '\0'; text++) {
        if (*text == '$')
            tv_buf_str(&b, dir);
        else
            tv_buf_add(&b, text, 1);
    }
    assert_false(b.failed);
    path = tmpdir_write(dir, "recipe.yml", b.data, b.n_bytes);
    tv_buf_free(&b);
    rc = tvm_recipe_load(path, &p->problems, &p->err, &p->recipe);
    if (p->recipe == NULL) {
        print_problems(&p->problems);
        assert_ok(rc, &p->err);
    }
    tv_free(path);
    rc = tvm_plan_make(p->recipe, o == NULL ? &defaults : o, &p->problems,
                       &p->err, &p->plan);
    assert_ok(rc, &p->err);
    assert_non_null(p->plan);
}

void plan_good(struct planned *p, const char *dir, const char *text,
               const struct tvm_options *o)
{
    plan_text(p, dir, text, o);
    if (p->problems.n_errors != 0)
        print_problems(&p->problems);
    assert_int_equal(p->problems.n_errors, 0);
}

void planned_free(struct planned *p)
{
    tvm_plan_free(p->plan);
    tvm_recipe_free(p->recipe);
    tvm_problems_free(&p->problems);
}

static const struct tvm_tensor *find(const struct planned *p, const char *name)
{
    for (size_t i = 0; i < p->plan->n_tensors; i++) {
        if (strcmp(p->plan->tensors[i].name, name) == 0)
            return &p->plan->tensors[i];
    }
    return NULL;
}

bool planned_has(const struct planned *p, const char *name)
{
    return find(p, name) != NULL;
}

const struct tvm_tensor *planned_tensor(const struct planned *p,
                                        const char *name)
{
    const struct tvm_tensor *const t = find(p, name);
    if (t == NULL)
        fail_msg("the plan has no tensor %s", name);
    return t;
}

static size_t param_index(const struct tvm_tensor *t, const char *param)
{
    size_t i = 0;
    while (i < t->method->n_params &&
           strcmp(t->method->params[i].name, param) != 0)
        i++;
    assert_true(i < t->method->n_params);
    return i;
}

double planned_shared(const struct planned *p, const char *tensor,
                      const char *param)
{
    const struct tvm_tensor *const t = planned_tensor(p, tensor);
    const size_t i = param_index(t, param);
    assert_true(t->shared_set[i]);
    return t->shared[i];
}

double planned_of(const struct planned *p, const char *tensor, size_t source,
                  const char *param)
{
    const struct tvm_tensor *const t = planned_tensor(p, tensor);
    const size_t i = source * t->method->n_params + param_index(t, param);
    assert_true(source < t->n_sources);
    assert_true(t->per_source_set[i]);
    return t->per_source[i];
}

const struct tvm_side_file *planned_file(const struct planned *p,
                                         const char *name)
{
    for (size_t i = 0; i < p->plan->n_files; i++) {
        if (strcmp(p->plan->files[i].name, name) == 0)
            return &p->plan->files[i];
    }
    return NULL;
}

size_t count_problems(const struct planned *p, bool is_error,
                      const char *message)
{
    size_t n = 0;
    for (size_t i = 0; i < p->problems.n; i++) {
        if (p->problems.items[i].is_error == is_error &&
            strstr(p->problems.items[i].message, message) != NULL)
            n++;
    }
    return n;
}

void expect_problem(const struct planned *p, bool is_error, enum tv_err code,
                    const char *where, const char *message)
{
    for (size_t i = 0; i < p->problems.n; i++) {
        const struct tvm_problem *const q = &p->problems.items[i];
        if (q->is_error == is_error && q->code == (is_error ? code : TV_OK) &&
            strstr(q->where, where) != NULL &&
            strstr(q->message, message) != NULL)
            return;
    }
    print_problems(&p->problems);
    fail_msg("no %s [%s] at '%s' with '%s'", is_error ? "error" : "warning",
             tv_err_name(code), where, message);
}
