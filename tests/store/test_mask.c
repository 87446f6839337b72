/* SPDX-License-Identifier: Apache-2.0 */
/* test_mask.c - bit sets survive roaring, in place, and stay small. */
#include "test.h"

#include <malloc.h>
#include <stdio.h>
#include <string.h>

#include "mask.h"
#include "rng.h"
#include "tv/alloc.h"

enum pattern { RANDOM, RUNS, TAIL_ONLY };

/* Owned words of n elements, and the number of set ones. */
static uint64_t *make(uint64_t n, double density, enum pattern pattern,
                      uint64_t seed, uint64_t *n_set)
{
    uint64_t *w = (uint64_t *)tv_calloc((size_t)(n / 64 + 1), sizeof *w);
    struct rng r;
    assert_non_null(w);
    rng_open(&r, seed);
    *n_set = 0;
    for (uint64_t i = 0; i < n; i++) {
        double u = ((double)rng_unit(&r) + 1.0) / 2.0;
        bool set = u < density;
        if (pattern == RUNS)
            set = (double)(i % 5000) < density * 5000;
        if (pattern == TAIL_ONLY)
            set = i + 3 >= n;
        if (set) {
            w[i / 64] |= UINT64_C(1) << (i % 64);
            (*n_set)++;
        }
    }
    return w;
}

static void compare(const struct mask_chunk *c, const uint64_t *words,
                    uint64_t n, uint32_t step)
{
    uint64_t scratch[MASK_CONTAINER / 64];
    for (uint64_t at = 0; at < n; at += step) {
        const uint64_t left = n - at;
        const uint32_t some = left < step ? (uint32_t)left : step;
        const uint64_t *got = mask_chunk_words(c, (uint32_t)at, some, scratch);
        for (uint32_t i = 0; i < some; i++) {
            const uint64_t e = at + i;
            if ((got[i / 64] >> (i % 64) & 1) !=
                (words[e / 64] >> (e % 64) & 1))
                fail_msg("element %llu of %llu differs", (unsigned long long)e,
                         (unsigned long long)n);
        }
    }
}

static void round_trip(uint64_t n, double density, enum pattern pattern)
{
    struct tv_error err;
    struct mask_bytes m;
    struct mask_chunk c;
    const char *why = NULL;
    uint64_t n_set = 0;
    uint64_t *words = make(n, density, pattern, n, &n_set);
    tv_error_clear(&err);
    assert_ok(mask_encode(words, n, &m, &err), &err);
    assert_int_equal(m.n_set, n_set);
    /* Never more than 1.01 bit per element, whatever the form. */
    assert_true((double)m.n <= 1.01 * (double)((n + 63) / 64 * 8));
    assert_int_equal(mask_chunk_open(m.data, m.n, m.flags, n, &c, &why), TV_OK);
    assert_int_equal(c.n_set, n_set);
    compare(&c, words, n, 4096);
    compare(&c, words, n, MASK_CONTAINER);
    compare(&c, words, n, 64);
    mask_chunk_close(&c);
    mask_bytes_free(&m);
    tv_free(words);
}

static void round_trips(void **state)
{
    static const uint64_t sizes[] = {1,     63,     64,     65,
                                     4095,  4096,   65535,  65536,
                                     65537, 131072, 200000, 300 * 300};
    static const double densities[] = {0,   0.001, 0.01, 0.05, 0.0625,
                                       0.2, 0.5,   0.9,  1.0};
    (void)state;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        for (size_t d = 0; d < sizeof densities / sizeof *densities; d++) {
            round_trip(sizes[s], densities[d], RANDOM);
            round_trip(sizes[s], densities[d], RUNS);
        }
        round_trip(sizes[s], 0, TAIL_ONLY);
    }
}

static void sparse_is_small_and_dense_is_in_place(void **state)
{
    const uint64_t n = 1u << 20;
    struct tv_error err;
    struct mask_bytes m;
    struct mask_chunk c;
    const char *why = NULL;
    uint64_t n_set = 0, types[3], scratch[MASK_CONTAINER / 64];
    (void)state;
    tv_error_clear(&err);

    uint64_t *words = make(n, 0.2, RANDOM, 7, &n_set);
    assert_ok(mask_encode(words, n, &m, &err), &err);
    assert_true(m.flags == mask_flags(MASK_FROZEN));
    assert_int_equal(mask_chunk_open(m.data, m.n, m.flags, n, &c, &why), TV_OK);
    mask_chunk_types(&c, types);
    assert_int_equal(types[0], n / MASK_CONTAINER);
    for (uint32_t at = 0; at < n; at += 4096) {
        const uint64_t *p = mask_chunk_words(&c, at, 4096, scratch);
        const unsigned char *b = (const unsigned char *)p;
        assert_true(b >= m.data && b < m.data + m.n);
        assert_int_equal((uintptr_t)b % 64, 0);
    }
    mask_chunk_close(&c);
    mask_bytes_free(&m);
    tv_free(words);

    words = make(n, 0.01, RANDOM, 8, &n_set);
    assert_ok(mask_encode(words, n, &m, &err), &err);
    assert_true(m.n < n / 8 / 4); /* 16 bits per element that is set */
    assert_int_equal(mask_chunk_open(m.data, m.n, m.flags, n, &c, &why), TV_OK);
    mask_chunk_types(&c, types);
    assert_int_equal(types[1], n / MASK_CONTAINER);
    mask_chunk_close(&c);
    mask_bytes_free(&m);
    tv_free(words);

    words = make(n, 0.5, RUNS, 9, &n_set);
    assert_ok(mask_encode(words, n, &m, &err), &err);
    assert_true(m.n < 4096);
    assert_int_equal(mask_chunk_open(m.data, m.n, m.flags, n, &c, &why), TV_OK);
    mask_chunk_types(&c, types);
    assert_int_equal(types[2], n / MASK_CONTAINER);
    mask_chunk_close(&c);
    mask_bytes_free(&m);
    tv_free(words);
}

static void intersections(void **state)
{
    static const double densities[] = {0.003, 0.2, 0.95};
    const uint64_t n = 150000; /* the last container makes it MASK_WORDS */
    struct tv_error err;
    (void)state;
    tv_error_clear(&err);
    for (int forms = 0; forms < 4; forms++)
        for (int i = 0; i < 3; i++) {
            struct mask_bytes m[2];
            struct mask_chunk c[2];
            uint64_t *w[2], n_set = 0, both = 0;
            const uint64_t elems = forms < 2 ? 131072 : n;
            for (int k = 0; k < 2; k++) {
                const char *why = NULL;
                w[k] =
                    make(elems, densities[(i + k) % 3],
                         forms % 2 == k ? RUNS : RANDOM, (uint64_t)k, &n_set);
                assert_ok(mask_encode(w[k], elems, &m[k], &err), &err);
                assert_int_equal(mask_chunk_open(m[k].data, m[k].n, m[k].flags,
                                                 elems, &c[k], &why),
                                 TV_OK);
            }
            for (uint64_t e = 0; e < (elems + 63) / 64; e++)
                both += (uint64_t)__builtin_popcountll(w[0][e] & w[1][e]);
            assert_int_equal(mask_chunk_and(&c[0], &c[1]), both);
            for (int k = 0; k < 2; k++) {
                mask_chunk_close(&c[k]);
                mask_bytes_free(&m[k]);
                tv_free(w[k]);
            }
        }
}

static void what_is_no_mask_is_refused(void **state)
{
    const uint64_t n = 131072;
    struct tv_error err;
    struct mask_bytes m;
    struct mask_chunk c;
    const char *why = NULL;
    uint64_t n_set = 0;
    (void)state;
    tv_error_clear(&err);
    uint64_t *words = make(n, 0.2, RANDOM, 3, &n_set);
    assert_ok(mask_encode(words, n, &m, &err), &err);
    /* Fewer elements than it has. */
    assert_int_equal(mask_chunk_open(m.data, m.n, m.flags, 70000, &c, &why),
                     TV_E_CORRUPT);
    assert_non_null(strstr(why, "elements"));
    assert_int_equal(mask_chunk_open(m.data, m.n - 1, m.flags, n, &c, &why),
                     TV_E_CORRUPT);
    assert_int_equal(mask_chunk_open(m.data, m.n - 32, m.flags, n, &c, &why),
                     TV_E_CORRUPT);
    assert_int_equal(mask_chunk_open(m.data, m.n, 77, n, &c, &why),
                     TV_E_CORRUPT);
    /* Written by another version of the library. */
    assert_int_equal(mask_chunk_open(m.data, m.n, m.flags + 256, n, &c, &why),
                     TV_E_CORRUPT);
    assert_false(mask_flags_known(m.flags + 256));
    assert_int_equal(
        mask_chunk_open(m.data, m.n, mask_flags(MASK_WORDS), n, &c, &why),
        TV_E_CORRUPT);
    assert_int_equal(mask_chunk_open(m.data + 1, m.n, m.flags, n, &c, &why),
                     TV_E_INTERNAL);
    mask_bytes_free(&m);
    tv_free(words);

    words = make(100, 0.5, RANDOM, 3, &n_set);
    words[1] |= UINT64_C(1) << 35; /* element 99 */
    assert_ok(mask_encode(words, 100, &m, &err), &err);
    assert_int_equal(m.flags, mask_flags(MASK_WORDS));
    assert_int_equal(mask_chunk_open(m.data, m.n, m.flags, 90, &c, &why),
                     TV_E_CORRUPT);
    assert_int_equal(mask_chunk_open(m.data, m.n, m.flags, 200, &c, &why),
                     TV_E_CORRUPT);
    mask_bytes_free(&m);
    tv_free(words);
    assert_code(mask_encode(NULL, MASK_CHUNK_ELEMS + 1, &m, &err),
                TV_E_INTERNAL, &err);
}

/* mask.h says how much: CRoaring does not use our allocator. */
static void open_chunks_take_little(void **state)
{
#if TEST_SANITIZED
    (void)state;
    skip(); /* their allocators do not fill mallinfo2 */
#else
    struct tv_error err;
    struct mask_bytes m;
    struct mask_chunk c;
    const char *why = NULL;
    uint64_t n_set = 0;
    (void)state;
    tv_error_clear(&err);
    uint64_t *words = make(MASK_CHUNK_ELEMS, 0.065, RANDOM, 4, &n_set);
    assert_ok(mask_encode(words, MASK_CHUNK_ELEMS, &m, &err), &err);
    const size_t before = mallinfo2().uordblks;
    assert_int_equal(
        mask_chunk_open(m.data, m.n, m.flags, MASK_CHUNK_ELEMS, &c, &why),
        TV_OK);
    const size_t took = mallinfo2().uordblks - before;
    mask_chunk_close(&c);
    assert_true(took > 0 && took < 8192);
    mask_bytes_free(&m);
    tv_free(words);
#endif
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(round_trips),
        cmocka_unit_test(sparse_is_small_and_dense_is_in_place),
        cmocka_unit_test(intersections),
        cmocka_unit_test(what_is_no_mask_is_refused),
        cmocka_unit_test(open_chunks_take_little),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
