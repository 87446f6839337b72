/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_recipe.c - any bytes are a recipe or an error with a message, and what
 * can be read is planned, against tiny models, or refused with a reason.
 *
 * Every '$' of the input stands for a directory with the models base, ft1, ft2
 * and the adapter lora.
 */
#include "fuzz.h"

#include <string.h>

#include "tinymodel.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/merge.h"
#include "tv/stages.h"
#include "tv/text.h"

#define RECIPE_BYTES_MAX (1u << 20)

static const char *models(void)
{
    static char *dir;

    if (dir == NULL) {
        static const char *const names[] = {"base", "ft1", "ft2"};
        struct tiny_model m;
        tiny_model_init(&m);
        m.tokenizer = true;
        dir = tmpdir_make();
        FUZZ_CHECK(dir != NULL);
        for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
            m.seed = i;
            tv_free(tiny_model_write(dir, names[i], &m));
        }
        tv_free(tiny_adapter_write(dir, "lora", &m, 2, 4.0, 7));
    }
    return dir;
}

static void check_plan(const struct tvm_plan *p)
{
    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *t = &p->tensors[i];
        FUZZ_CHECK(t->name[0] != '\0' && t->rank <= TV_RANK_MAX);
        FUZZ_CHECK(t->n_sources > 0);
        if (t->action == TVM_COPY)
            FUZZ_CHECK(t->copy_of < t->n_sources);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const char *dir = models();
    struct tvm_problems problems;
    struct tvm_options options;
    struct tvm_plan *plan = NULL;
    struct tvm_stages *stages = NULL;
    tvm_recipe *recipe = NULL;
    struct tv_error err;
    struct tv_buf b;

    tv_buf_init(&b, RECIPE_BYTES_MAX);
    for (size_t i = 0; i < size; i++) {
        if (data[i] == '$')
            tv_buf_str(&b, dir);
        else
            tv_buf_add(&b, &data[i], 1);
    }
    if (b.failed) {
        tv_buf_free(&b);
        return 0;
    }
    char *path = tmpdir_write(dir, "recipe.yml", b.data, b.n_bytes);
    tv_buf_free(&b);
    tv_error_clear(&err);
    tvm_problems_init(&problems);
    tvm_options_init(&options);
    options.threads = 1;
    const enum tv_err rc = tvm_recipe_load(path, &problems, &err, &recipe);
    FUZZ_CHECK(rc == TV_OK || problems.n_errors > 0 || err.msg[0] != '\0');
    FUZZ_CHECK(rc != TV_OK || recipe != NULL);
    if (recipe != NULL && tvm_recipe_next(recipe) != NULL) {
        if (tvm_stages_make(recipe, &options, NULL, &problems, &err, &stages) !=
            TV_OK)
            FUZZ_CHECK(err.msg[0] != '\0');
        tvm_stages_free(stages);
    } else if (recipe != NULL &&
               tvm_plan_make(recipe, &options, &problems, &err, &plan) != TV_OK)
        FUZZ_CHECK(err.msg[0] != '\0');
    for (size_t i = 0; i < problems.n; i++)
        FUZZ_CHECK(problems.items[i].message[0] != '\0');
    if (plan != NULL && problems.n_errors == 0)
        check_plan(plan);
    tvm_plan_free(plan);
    tvm_recipe_free(recipe);
    tvm_problems_free(&problems);
    tv_free(path);
    return 0;
}
