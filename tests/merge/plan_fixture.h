/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_fixture.h - plans a recipe given as text, and looks into the plan.
 */
#ifndef PLAN_FIXTURE_H
#define PLAN_FIXTURE_H

#include "test.h"

#include "tinymodel.h"
#include "tmpdir.h"
#include "tv/merge.h"

struct planned {
    tvm_recipe *recipe;
    struct tvm_plan *plan;
    struct tvm_problems problems;
    struct tv_error err;
};

/* Every '$' of the text stands for dir. o may be NULL: the defaults. Fails the
 * test when the recipe cannot be planned at all or planning breaks. */
void plan_text(struct planned *p, const char *dir, const char *text,
               const struct tvm_options *o);
/* The same, and it must have no errors. */
void plan_good(struct planned *p, const char *dir, const char *text,
               const struct tvm_options *o);
void planned_free(struct planned *p);

/* Fails the test when the plan has no such tensor. */
const struct tvm_tensor *planned_tensor(const struct planned *p,
                                        const char *name);
bool planned_has(const struct planned *p, const char *name);
/* Values of parameters, which must be set. */
double planned_shared(const struct planned *p, const char *tensor,
                      const char *param);
double planned_of(const struct planned *p, const char *tensor, size_t source,
                  const char *param);
/* NULL when the output has no such side file. */
const struct tvm_side_file *planned_file(const struct planned *p,
                                         const char *name);
/* A problem of this kind with `where` and `message` as substrings. */
void expect_problem(const struct planned *p, bool is_error, enum tv_err code,
                    const char *where, const char *message);
size_t count_problems(const struct planned *p, bool is_error,
                      const char *message);
void print_problems(const struct tvm_problems *p);

#endif
