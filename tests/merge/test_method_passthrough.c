/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copies stay bitwise, a scale is applied.
 */
#include "test.h"

#include <string.h>

#include "fixture.h"
#include "tv/alloc.h"

static const struct fx_tensor shapes[] = {{"w", TV_F32, 2, {300, 257}},
                                          {"v", TV_BF16, 1, {1000}},
                                          {"ids", TV_I64, 1, {200000}}};

static void scale_is_optional(void **state)
{
    static const struct fx_param scales[] = {{"scale", 0, -0.3}};
    struct fx f;
    uint64_t n = 0;

    (void)state;
    fx_open(&f);
    fx_model(&f, shapes, 3, NULL);
    float *x = fx_values(&f, 0, "w", &n);
    for (size_t scaled = 0; scaled < 2; scaled++) {
        fx_plan(&f, "passthrough", -1, scales, scaled, TV_DTYPE_NONE);
        float *y = fx_merged(&f, "w", &n);
        for (uint64_t i = 0; i < n; i++) {
            const double want = (scaled ? -0.3 : 1.0) * (double)x[i];
            assert_true(y[i] == (float)want);
        }
        tv_free(y);
    }
    tv_free(x);
    fx_close(&f);
}

/* Copies and unscaled merges of everything give the input's digest. */
static void copies_are_bitwise(void **state)
{
    struct fx f;
    struct tv_error err;
    struct tv_hash in;

    (void)state;
    fx_open(&f);
    fx_model(&f, shapes, 3, NULL);
    assert_ok(tv_input_digest(f.input[0], &in, &err), &err);
    for (int copy = 0; copy < 2; copy++) {
        fx_plan(&f, "passthrough", -1, NULL, 0, TV_DTYPE_NONE);
        for (size_t i = 0; copy && i < f.plan.n_tensors; i++)
            f.plan.tensors[i].action = TVM_COPY;
        assert_true(tv_hash_equal(fx_run(&f), in));
    }
    fx_close(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(scale_is_optional),
        cmocka_unit_test(copies_are_bitwise),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
