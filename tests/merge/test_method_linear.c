/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The weighted average: values, and what it must leave alone.
 */
#include "test.h"

#include <stdlib.h>
#include <string.h>

#include "fixture.h"
#include "tv/alloc.h"

static const struct fx_tensor shapes[] = {{"w", TV_F32, 2, {300, 257}},
                                          {"v", TV_BF16, 1, {1000}}};

static void weights_are_applied(void **state)
{
    static const struct fx_param params[] = {{"weight", 0, 0.25},
                                             {"weight", 1, -1.5},
                                             {"weight", 2, 3.0},
                                             {"normalize", FX_ALL, 0}};
    static const double w[] = {0.25, -1.5, 3.0};
    struct fx f;
    uint64_t n = 0;
    float *x[3];

    (void)state;
    fx_open(&f);
    for (int i = 0; i < 3; i++)
        fx_model(&f, shapes, 2, NULL);
    for (size_t i = 0; i < 3; i++)
        x[i] = fx_values(&f, i, "w", &n);
    for (int normalize = 0; normalize < 2; normalize++) {
        struct fx_param p[4];
        memcpy(p, params, sizeof p);
        p[3].value = normalize;
        fx_plan(&f, "linear", -1, p, 4, TV_DTYPE_NONE);
        float *y = fx_merged(&f, "w", &n);
        for (uint64_t i = 0; i < n; i++) {
            double sum = w[0] * (double)x[0][i] + w[1] * (double)x[1][i];
            sum = sum + w[2] * (double)x[2][i];
            if (normalize)
                sum = sum / 1.75;
            assert_true(y[i] == (float)sum);
        }
        tv_free(y);
    }
    for (size_t i = 0; i < 3; i++)
        tv_free(x[i]);
    fx_close(&f);
}

/* The mean of equal models is that model; one weight alone gives its model. */
static float same(size_t model, size_t tensor, uint64_t i)
{
    (void)model;
    return (float)(tensor + 1) / (float)(i + 3);
}

static void equal_models_give_themselves(void **state)
{
    static const struct fx_param params[] = {{"weight", FX_ALL, 0.3}};
    static const char *const names[] = {"w", "v"};
    struct fx f;

    (void)state;
    fx_open(&f);
    for (int i = 0; i < 3; i++)
        fx_model(&f, shapes, 2, same);
    fx_plan(&f, "linear", -1, params, 1, TV_DTYPE_NONE);
    (void)fx_run(&f);
    for (size_t t = 0; t < 2; t++) {
        uint64_t n = 0;
        float *y = fx_read(f.plan.options.out_dir, names[t], &n);
        float *x = fx_values(&f, 0, names[t], &n);
        assert_memory_equal(x, y, n * sizeof *x);
        tv_free(x);
        tv_free(y);
    }
    fx_close(&f);
}

static void weight_one_gives_its_model(void **state)
{
    static const struct fx_param params[] = {{"weight", 0, 0},
                                             {"weight", 1, 1}};
    struct fx f;
    uint64_t n = 0;

    (void)state;
    fx_open(&f);
    for (int i = 0; i < 2; i++)
        fx_model(&f, shapes, 2, NULL);
    fx_plan(&f, "linear", -1, params, 2, TV_DTYPE_NONE);
    float *y = fx_merged(&f, "w", &n);
    float *x = fx_values(&f, 1, "w", &n);
    assert_memory_equal(x, y, n * sizeof *x);
    tv_free(x);
    tv_free(y);
    fx_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(weights_are_applied),
        cmocka_unit_test(equal_models_give_themselves),
        cmocka_unit_test(weight_one_gives_its_model),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
