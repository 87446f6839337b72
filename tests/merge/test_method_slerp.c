/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Spherical interpolation against hand-computed cases and the formula.
 */
#include "test.h"

#include <math.h>

#include "fixture.h"
#include "tv/alloc.h"

static const struct fx_tensor shapes[] = {{"w", TV_F32, 2, {700, 257}},
                                          {"u", TV_F32, 1, {2}}};

/* Tensor u: (1, 0) and (0, 1); t = 1/2 gives (1, 1) / sqrt 2. Tensor w: two
 * unrelated vectors. */
static float vectors(size_t model, size_t tensor, uint64_t i)
{
    if (tensor == 1)
        return i == model ? 1.0f : 0.0f;
    return (float)sin((double)(i + 1) * (model == 0 ? 0.7 : 1.3)) * 0.1f;
}

static float parallel(size_t model, size_t tensor, uint64_t i)
{
    return vectors(0, tensor, i) * (model == 0 ? 1.0f : 3.0f);
}

static void plan(struct fx *f, double t, int base)
{
    const struct fx_param params[] = {{"t", FX_ALL, t}};
    fx_plan(f, "slerp", base, params, 1, TV_DTYPE_NONE);
}

static void quarter_circle(void **state)
{
    struct fx f;
    uint64_t n = 0;

    (void)state;
    fx_open(&f);
    fx_model(&f, shapes, 2, vectors);
    fx_model(&f, shapes, 2, vectors);
    plan(&f, 0.5, 0);
    float *y = fx_merged(&f, "u", &n);
    assert_true(fabs((double)y[0] - sqrt(0.5)) < 1e-7);
    assert_true(fabs((double)y[1] - sqrt(0.5)) < 1e-7);
    tv_free(y);
    fx_close(&f);
}

static void agrees_with_formula(void **state)
{
    struct fx f;
    uint64_t n = 0;
    double aa = 0;
    double bb = 0;
    double ab = 0;

    (void)state;
    fx_open(&f);
    fx_model(&f, shapes, 2, vectors);
    fx_model(&f, shapes, 2, vectors);
    float *x0 = fx_values(&f, 0, "w", &n);
    float *x1 = fx_values(&f, 1, "w", &n);
    for (uint64_t i = 0; i < n; i++) {
        aa += (double)x0[i] * (double)x0[i];
        bb += (double)x1[i] * (double)x1[i];
        ab += (double)x0[i] * (double)x1[i];
    }
    const double theta = acos(ab / sqrt(aa) / sqrt(bb));
    /* The base may stand second in the recipe. */
    for (int base = 0; base < 2; base++) {
        const double t = base == 0 ? 0.3 : 0.7;
        plan(&f, t, base);
        float *y = fx_merged(&f, "w", &n);
        for (uint64_t i = 0; i < n; i++) {
            const double want = (sin(0.7 * theta) * (double)x0[i] +
                                 sin(0.3 * theta) * (double)x1[i]) /
                                sin(theta);
            assert_true(fabs((double)y[i] - want) <= 1e-7 * fabs(want) + 1e-12);
        }
        tv_free(y);
    }
    tv_free(x0);
    tv_free(x1);
    fx_close(&f);
}

static void colinear_models_are_interpolated(void **state)
{
    struct fx f;
    uint64_t n = 0;

    (void)state;
    fx_open(&f);
    fx_model(&f, shapes, 2, parallel);
    fx_model(&f, shapes, 2, parallel);
    plan(&f, 0.25, 0);
    float *y = fx_merged(&f, "w", &n);
    float *x = fx_values(&f, 0, "w", &n);
    for (uint64_t i = 0; i < n; i++)
        assert_true(fabsf(y[i] - 1.5f * x[i]) <= 1e-6f * fabsf(x[i]));
    tv_free(x);
    tv_free(y);
    fx_close(&f);
}

static void ends_are_exact(void **state)
{
    struct fx f;
    uint64_t n = 0;

    (void)state;
    fx_open(&f);
    fx_model(&f, shapes, 2, vectors);
    fx_model(&f, shapes, 2, vectors);
    for (int t = 0; t < 2; t++) {
        plan(&f, t, 0);
        float *y = fx_merged(&f, "w", &n);
        float *x = fx_values(&f, (size_t)t, "w", &n);
        assert_memory_equal(x, y, n * sizeof *x);
        tv_free(x);
        tv_free(y);
    }
    fx_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(quarter_circle),
        cmocka_unit_test(agrees_with_formula),
        cmocka_unit_test(colinear_models_are_interpolated),
        cmocka_unit_test(ends_are_exact),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
