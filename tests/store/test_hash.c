/* SPDX-License-Identifier: Apache-2.0 */
/* test_hash.c - values, hex form, streams, leaves and the model digest. */
#include "test.h"

#include <string.h>

#include "rng.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/hash.h"

/* The published values of xxHash 0.8 for the empty input. */
static void known_values(void **state)
{
    (void)state;
    char hex[33];
    assert_true(tv_hash64("", 0) == 0x2d06800538d394c2u);
    assert_string_equal(tv_hash_hex(tv_hash128("", 0), hex),
                        "99aa06d3014798d86001c324468d497f");
}

static void hex_round_trip(void **state)
{
    (void)state;
    const struct tv_hash h = {.lo = 0x0123456789abcdefu,
                              .hi = 0xfedcba9876543210u};
    struct tv_hash back = {0, 0};
    char hex[33];
    unsigned char wire[16];
    assert_string_equal(tv_hash_hex(h, hex),
                        "fedcba98765432100123456789abcdef");
    assert_int_equal(tv_hash_from_hex(hex, &back), 0);
    assert_true(tv_hash_equal(h, back));
    assert_int_equal(
        tv_hash_from_hex("FEDCBA98765432100123456789ABCDEF", &back), 0);
    assert_true(tv_hash_equal(h, back));
    assert_int_equal(tv_hash_from_hex("", &back), -1);
    assert_int_equal(tv_hash_from_hex("fedcba98765432100123456789abcde", &back),
                     -1);
    assert_int_equal(
        tv_hash_from_hex("fedcba98765432100123456789abcdef0", &back), -1);
    assert_int_equal(
        tv_hash_from_hex("gedcba98765432100123456789abcdef", &back), -1);
    tv_hash_put(wire, h);
    assert_int_equal(wire[0], 0xef);
    assert_int_equal(wire[8], 0x10);
    assert_true(tv_hash_equal(tv_hash_get(wire), h));
}

static void stream_equals_one_shot(void **state)
{
    (void)state;
    struct tv_error err;
    struct rng r;
    tv_hasher *h = NULL;
    static unsigned char bytes[10000];
    rng_open(&r, 1);
    rng_bytes(&r, bytes, sizeof bytes);
    assert_ok(tv_hasher_open(&err, &h), &err);
    for (int round = 0; round < 50; round++) {
        const size_t n = (size_t)rng_below(&r, sizeof bytes + 1);
        size_t off = 0;
        tv_hasher_reset(h);
        while (off < n) {
            const size_t part = 1 + (size_t)rng_below(&r, n - off);
            tv_hasher_add(h, bytes + off, part);
            off += part;
        }
        assert_true(tv_hash_equal(tv_hasher_value(h), tv_hash128(bytes, n)));
    }
    tv_hasher_close(h);
    tv_hasher_close(NULL);
}

static void leaves(void **state)
{
    (void)state;
    struct tv_hash l[3] = {{1, 2}, {3, 4}, {5, 6}};
    unsigned char wire[48];
    assert_int_equal(tv_leaf_count(0), 0);
    assert_int_equal(tv_leaf_count(1), 1);
    assert_int_equal(tv_leaf_count(TV_LEAF_BYTES), 1);
    assert_int_equal(tv_leaf_count(TV_LEAF_BYTES + 1), 2);
    assert_true(tv_leaf_count(UINT64_MAX) == (uint64_t)1 << 44);
    for (int i = 0; i < 3; i++)
        tv_hash_put(wire + 16 * i, l[i]);
    assert_true(tv_hash_equal(tv_leaves_checksum(l, 3), tv_hash128(wire, 48)));
    assert_true(tv_hash_equal(tv_leaves_checksum(NULL, 0), tv_hash128("", 0)));
}

/* The layout of design.md, written out by hand. */
/* One pass gives what two give, wherever leaves begin and end. */
static void chunk_and_leaves_at_once(void **state)
{
    enum { N = 3 * TV_LEAF_BYTES + 777 };
    static const size_t skips[] = {0, 1, 1000, TV_LEAF_BYTES - 1};
    struct tv_hash want[4];
    size_t n_same = 9;
    unsigned char *data = tv_alloc(N);
    (void)state;
    assert_non_null(data);
    for (size_t i = 0; i < N; i++)
        data[i] = (unsigned char)(i * 7 + (i >> 12));
    const uint64_t hash = tv_hash64(data, N);
    for (size_t s = 0; s < sizeof skips / sizeof *skips; s++) {
        const size_t skip = skips[s];
        size_t n = 0;
        for (size_t at = skip; at < N; at += TV_LEAF_BYTES, n++)
            want[n] = tv_hash128(
                data + at, N - at < TV_LEAF_BYTES ? N - at : TV_LEAF_BYTES);
        assert_true(tv_hash64_leaves(data, N, skip, want, n, &n_same) == hash);
        assert_int_equal(n_same, n);
        want[1].lo ^= 1;
        assert_true(tv_hash64_leaves(data, N, skip, want, n, &n_same) == hash);
        assert_int_equal(n_same, 1);
        assert_true(tv_hash64_leaves(data, N, skip, want, 0, &n_same) == hash);
        assert_int_equal(n_same, 0);
    }
    assert_true(tv_hash64_leaves(data, 0, 0, NULL, 0, &n_same) ==
                tv_hash64("", 0));
    tv_free(data);
}

static void model_digest(void **state)
{
    (void)state;
    struct tv_error err;
    tv_hasher *h = NULL;
    const uint64_t shape[2] = {3, 5};
    const struct tv_hash sum = {7, 9};
    unsigned char w[4 + 3 + 16 + 4 + 16 + 16];
    memset(w, 0, sizeof w);
    tv_put_le32(w, 3);
    memcpy(w + 4, "a.b", 3);
    memcpy(w + 7, "BF16", 4);
    tv_put_le32(w + 23, 2);
    tv_put_le64(w + 27, 3);
    tv_put_le64(w + 35, 5);
    tv_hash_put(w + 43, sum);
    assert_ok(tv_hasher_open(&err, &h), &err);
    tv_digest_add(h, "a.b", TV_BF16, shape, 2, sum);
    assert_true(tv_hash_equal(tv_hasher_value(h), tv_hash128(w, sizeof w)));
    tv_hasher_close(h);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(known_values),
        cmocka_unit_test(hex_round_trip),
        cmocka_unit_test(stream_equals_one_shot),
        cmocka_unit_test(leaves),
        cmocka_unit_test(chunk_and_leaves_at_once),
        cmocka_unit_test(model_digest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
