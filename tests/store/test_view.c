/* SPDX-License-Identifier: Apache-2.0 */
/* test_view.c - walking and hashing over chunk borders. */
#include "test.h"

#include <string.h>

#include "rng.h"
#include "tv/alloc.h"
#include "tv/view.h"

/* One buffer, seen as chunks of any length that are not neighbours. */
static void every_chunk_length(void **state)
{
    (void)state;
    enum { N = 257 };
    unsigned char flat[N], got[N];
    struct rng r;
    rng_open(&r, 1);
    rng_bytes(&r, flat, N);
    for (size_t len = 1; len <= N + 3; len++) {
        const size_t n = (N + len - 1) / len;
        const unsigned char *chunks[N];
        unsigned char *copies[N];
        for (size_t i = 0; i < n; i++) {
            const size_t part = i + 1 < n ? len : N - i * len;
            copies[i] = (unsigned char *)test_malloc(part);
            memcpy(copies[i], flat + i * len, part);
            chunks[i] = copies[i];
        }
        const struct tv_view v = {
            .bytes = N, .chunk_bytes = len, .n_chunks = n, .chunks = chunks};
        for (size_t off = 0; off < N; off += 13) {
            uint64_t run = 0;
            assert_int_equal(*tv_view_at(&v, off, &run), flat[off]);
            const size_t to_border = len - off % len;
            assert_int_equal(run, to_border < N - off ? to_border : N - off);
            for (size_t m = 0; m <= N - off; m += 31) {
                memset(got, 0, sizeof got);
                tv_view_copy(&v, off, m, got);
                assert_memory_equal(got, flat + off, m);
            }
        }
        assert_true(tv_hash_equal(tv_view_leaf(&v, 0), tv_hash128(flat, N)));
        for (size_t i = 0; i < n; i++)
            test_free(copies[i]);
    }
}

/* Leaves of a tensor whose chunks do not end where leaves do. */
static void leaves_over_borders(void **state)
{
    (void)state;
    const size_t n = 2 * TV_LEAF_BYTES + 12345;
    unsigned char *flat = (unsigned char *)test_malloc(n);
    struct rng r;
    rng_open(&r, 2);
    rng_bytes(&r, flat, n);
    static const size_t lengths[] = {TV_LEAF_BYTES, TV_LEAF_BYTES - 192,
                                     TV_LEAF_BYTES + 64, 300001};
    for (size_t k = 0; k < sizeof lengths / sizeof lengths[0]; k++) {
        const unsigned char *chunks[16];
        const size_t len = lengths[k];
        const size_t n_chunks = (n + len - 1) / len;
        assert_true(n_chunks <= 16);
        for (size_t i = 0; i < n_chunks; i++)
            chunks[i] = flat + i * len;
        const struct tv_view v = {.bytes = n,
                                  .chunk_bytes = len,
                                  .n_chunks = n_chunks,
                                  .chunks = chunks};
        for (uint64_t i = 0; i < 3; i++) {
            const size_t off = (size_t)i * TV_LEAF_BYTES;
            const size_t part =
                n - off < TV_LEAF_BYTES ? n - off : TV_LEAF_BYTES;
            assert_true(tv_hash_equal(tv_view_leaf(&v, i),
                                      tv_hash128(flat + off, part)));
        }
    }
    test_free(flat);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_chunk_length),
        cmocka_unit_test(leaves_over_borders),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
