/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_dtype.c - spellings, sizes, and shapes that overflow.
 */
#include "test.h"

#include <string.h>

#include "tv/dtype.h"

static void test_names_round_trip(void **state)
{
    (void)state;
    for (int t = 1; t < TV_DTYPE_COUNT; t++) {
        const enum tv_dtype d = (enum tv_dtype)t;
        assert_true(tv_dtype_bits(d) > 0);
        assert_int_equal(tv_dtype_from_name(tv_dtype_name(d)), d);
        const char *torch = tv_dtype_torch_name(d);
        if (torch) {
            char prefixed[64] = "torch.";
            strncat(prefixed, torch, sizeof prefixed - 7);
            assert_int_equal(tv_dtype_from_torch(torch), d);
            assert_int_equal(tv_dtype_from_torch(prefixed), d);
        }
    }
}

static void test_spellings_of_the_formats(void **state)
{
    (void)state;
    static const struct {
        enum tv_dtype t;
        const char *name;
        unsigned bits;
    } want[] = {
        {TV_BOOL, "BOOL", 8},       {TV_U8, "U8", 8},
        {TV_I8, "I8", 8},           {TV_I16, "I16", 16},
        {TV_U16, "U16", 16},        {TV_I32, "I32", 32},
        {TV_U32, "U32", 32},        {TV_I64, "I64", 64},
        {TV_U64, "U64", 64},        {TV_F16, "F16", 16},
        {TV_BF16, "BF16", 16},      {TV_F32, "F32", 32},
        {TV_F64, "F64", 64},        {TV_C64, "C64", 64},
        {TV_F8_E4M3, "F8_E4M3", 8}, {TV_F8_E5M2, "F8_E5M2", 8},
        {TV_F8_E8M0, "F8_E8M0", 8}, {TV_F8_E4M3FNUZ, "F8_E4M3FNUZ", 8},
        {TV_F6_E2M3, "F6_E2M3", 6}, {TV_F8_E5M2FNUZ, "F8_E5M2FNUZ", 8},
        {TV_F6_E3M2, "F6_E3M2", 6}, {TV_F4, "F4", 4},
    };
    assert_int_equal(sizeof want / sizeof *want, TV_DTYPE_COUNT - 1);
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        assert_string_equal(tv_dtype_name(want[i].t), want[i].name);
        assert_int_equal(tv_dtype_bits(want[i].t), want[i].bits);
    }
    assert_string_equal(tv_dtype_torch_name(TV_BF16), "bfloat16");
    assert_string_equal(tv_dtype_torch_name(TV_F8_E4M3), "float8_e4m3fn");
}

static void test_unknown_names(void **state)
{
    (void)state;
    assert_int_equal(tv_dtype_from_name("bf16"), TV_DTYPE_NONE);
    assert_int_equal(tv_dtype_from_name("BF16 "), TV_DTYPE_NONE);
    assert_int_equal(tv_dtype_from_name(""), TV_DTYPE_NONE);
    assert_int_equal(tv_dtype_from_name("NONE"), TV_DTYPE_NONE);
    assert_int_equal(tv_dtype_from_name(NULL), TV_DTYPE_NONE);
    assert_int_equal(tv_dtype_from_torch("bf16"), TV_DTYPE_NONE);
    assert_int_equal(tv_dtype_from_torch("torch."), TV_DTYPE_NONE);
    assert_int_equal(tv_dtype_from_torch("torch.torch.float32"), TV_DTYPE_NONE);
    assert_int_equal(tv_dtype_from_torch(NULL), TV_DTYPE_NONE);
    assert_int_equal(tv_dtype_bits((enum tv_dtype)1000), 0);
    assert_non_null(tv_dtype_name((enum tv_dtype)1000));
    assert_null(tv_dtype_torch_name((enum tv_dtype)1000));
}

static void test_classes(void **state)
{
    (void)state;
    unsigned n_math = 0;
    unsigned n_float = 0;
    for (int t = 0; t < TV_DTYPE_COUNT; t++) {
        n_math += tv_dtype_is_math((enum tv_dtype)t);
        n_float += tv_dtype_is_float((enum tv_dtype)t);
    }
    assert_int_equal(n_math, 3);
    assert_int_equal(n_float, 12);
    assert_true(tv_dtype_is_math(TV_BF16));
    assert_false(tv_dtype_is_math(TV_F64));
    assert_true(tv_dtype_is_float(TV_F64));
    assert_false(tv_dtype_is_float(TV_I64));
}

static void test_elements_of_shapes(void **state)
{
    (void)state;
    struct tv_error err;
    uint64_t n = 77;
    assert_ok(tv_shape_elems(NULL, 0, &n, &err), &err);
    assert_int_equal(n, 1);
    assert_ok(tv_shape_elems((uint64_t[]){3, 0, 5}, 3, &n, &err), &err);
    assert_int_equal(n, 0);
    assert_ok(tv_shape_elems((uint64_t[]){2048, 192}, 2, &n, &err), &err);
    assert_int_equal(n, 393216);
    assert_ok(tv_shape_elems((uint64_t[]){UINT64_MAX, 1, 1}, 3, &n, &err),
              &err);
    assert_true(n == UINT64_MAX);

    n = 77;
    const uint64_t big[] = {UINT64_C(1) << 32, UINT64_C(1) << 32};
    assert_code(tv_shape_elems(big, 2, &n, &err), TV_E_CORRUPT, &err);
    assert_message(&err, "[4294967296, 4294967296]");
    const uint64_t late[] = {UINT64_MAX, 2, 0};
    assert_code(tv_shape_elems(late, 3, &n, &err), TV_E_CORRUPT, &err);
    const uint64_t ones[TV_RANK_MAX + 1] = {1};
    assert_code(tv_shape_elems(ones, TV_RANK_MAX + 1, &n, &err), TV_E_CORRUPT,
                &err);
    assert_code(tv_shape_elems(big, 2, &n, NULL), TV_E_CORRUPT, NULL);
    assert_int_equal(n, 77);
}

static void test_bytes_of_elements(void **state)
{
    (void)state;
    struct tv_error err;
    uint64_t n = 77;
    assert_ok(tv_dtype_bytes(TV_BF16, 5, &n, &err), &err);
    assert_int_equal(n, 10);
    assert_ok(tv_dtype_bytes(TV_F4, 6, &n, &err), &err);
    assert_int_equal(n, 3);
    assert_ok(tv_dtype_bytes(TV_F6_E2M3, 4, &n, &err), &err);
    assert_int_equal(n, 3);
    assert_ok(tv_dtype_bytes(TV_F64, 0, &n, &err), &err);
    assert_int_equal(n, 0);
    assert_ok(tv_dtype_bytes(TV_U8, UINT64_MAX / 8, &n, &err), &err);
    assert_true(n == UINT64_MAX / 8);

    n = 77;
    assert_code(tv_dtype_bytes(TV_F4, 5, &n, &err), TV_E_CORRUPT, &err);
    assert_code(tv_dtype_bytes(TV_F6_E3M2, 3, &n, &err), TV_E_CORRUPT, &err);
    assert_code(tv_dtype_bytes(TV_F32, UINT64_MAX / 8, &n, &err), TV_E_CORRUPT,
                &err);
    assert_code(tv_dtype_bytes(TV_DTYPE_NONE, 1, &n, &err), TV_E_CORRUPT, &err);
    assert_code(tv_dtype_bytes((enum tv_dtype)99, 1, &n, &err), TV_E_CORRUPT,
                &err);
    assert_int_equal(n, 77);
}

static void test_shape_text(void **state)
{
    (void)state;
    char text[24 * TV_RANK_MAX + 3];
    assert_string_equal(tv_shape_format(NULL, 0, text, sizeof text), "[]");
    assert_string_equal(
        tv_shape_format((uint64_t[]){2048}, 1, text, sizeof text), "[2048]");
    assert_string_equal(
        tv_shape_format((uint64_t[]){2048, 192}, 2, text, sizeof text),
        "[2048, 192]");
    uint64_t most[TV_RANK_MAX];
    for (unsigned i = 0; i < TV_RANK_MAX; i++)
        most[i] = UINT64_MAX;
    tv_shape_format(most, TV_RANK_MAX, text, sizeof text);
    assert_int_equal(text[strlen(text) - 1], ']');
    /* Too small: still a string, and nothing written behind it. */
    char small[9] = "........";
    tv_shape_format((uint64_t[]){2048, 192}, 2, small, 8);
    assert_true(strlen(small) < 8);
    assert_int_equal(small[8], '\0');
    tv_shape_format((uint64_t[]){1}, 1, small, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names_round_trip),
        cmocka_unit_test(test_spellings_of_the_formats),
        cmocka_unit_test(test_unknown_names),
        cmocka_unit_test(test_classes),
        cmocka_unit_test(test_elements_of_shapes),
        cmocka_unit_test(test_bytes_of_elements),
        cmocka_unit_test(test_shape_text),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
