/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_checked.c - overflow at its very edge, and byte orders.
 */
#include "test.h"

#include <string.h>

#include "rng.h"
#include "tv/checked.h"

static void test_overflow_edges(void **state)
{
    (void)state;
    uint64_t u = 5;
    size_t z = 5;
    assert_true(tv_mul_u64(UINT64_C(1) << 32, (UINT64_C(1) << 32) - 1, &u));
    assert_true(u == (UINT64_MAX - UINT32_MAX));
    u = 5;
    assert_false(tv_mul_u64(UINT64_C(1) << 32, UINT64_C(1) << 32, &u));
    assert_false(tv_add_u64(UINT64_MAX, 1, &u));
    assert_int_equal(u, 5);
    assert_true(tv_add_u64(UINT64_MAX, 0, &u));
    assert_true(u == UINT64_MAX);
    assert_false(tv_mul_size(SIZE_MAX, 2, &z));
    assert_false(tv_add_size(SIZE_MAX, 1, &z));
    assert_int_equal(z, 5);
    assert_true(tv_mul_size(SIZE_MAX, 1, &z));
    assert_true(z == SIZE_MAX);
    assert_true(tv_mul_size(SIZE_MAX, 0, &z));
    assert_int_equal(z, 0);
    assert_true(tv_add_size(SIZE_MAX - 1, 1, &z));
    assert_true(z == SIZE_MAX);
}

static void test_byte_orders(void **state)
{
    (void)state;
    unsigned char b[8];
    tv_put_le64(b, UINT64_C(0x8877665544332211));
    assert_memory_equal(b, "\x11\x22\x33\x44\x55\x66\x77\x88", 8);
    tv_put_be64(b, UINT64_C(0x8877665544332211));
    assert_memory_equal(b, "\x88\x77\x66\x55\x44\x33\x22\x11", 8);
    tv_put_le32(b, UINT32_C(0xf4332211));
    assert_memory_equal(b, "\x11\x22\x33\xf4", 4);
    tv_put_be32(b, UINT32_C(0xf4332211));
    assert_memory_equal(b, "\xf4\x33\x22\x11", 4);
    tv_put_le16(b, 0xf211);
    assert_memory_equal(b, "\x11\xf2", 2);

    struct rng r;
    rng_open(&r, 0);
    unsigned char odd[9];
    for (int i = 0; i < 1000; i++) {
        const uint64_t v = rng_u64(&r);
        tv_put_le64(odd + 1, v);
        assert_true(tv_get_le64(odd + 1) == v);
        tv_put_be64(odd + 1, v);
        assert_true(tv_get_be64(odd + 1) == v);
        tv_put_le32(odd + 1, (uint32_t)v);
        assert_true(tv_get_le32(odd + 1) == (uint32_t)v);
        tv_put_be32(odd + 1, (uint32_t)v);
        assert_true(tv_get_be32(odd + 1) == (uint32_t)v);
        tv_put_le16(odd + 1, (uint16_t)v);
        assert_true(tv_get_le16(odd + 1) == (uint16_t)v);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_overflow_edges),
        cmocka_unit_test(test_byte_orders),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
