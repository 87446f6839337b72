/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_philox.c - random masks are Philox4x32-10, element by element.
 *
 * The oracle is written out here from the paper (Salmon et al., SC 2011), is
 * itself held against the known answers that come with Random123, and then
 * against every row's masks.
 */
#include "test.h"

#include <math.h>

#include "rng.h"
#include "tv/kernels.h"

struct words {
    uint32_t v[4];
};

static struct words philox(struct words c, uint32_t k0, uint32_t k1)
{
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = UINT64_C(0xD2511F53) * c.v[0];
        const uint64_t p1 = UINT64_C(0xCD9E8D57) * c.v[2];
        const struct words next = {
            {(uint32_t)(p1 >> 32) ^ c.v[1] ^ k0, (uint32_t)p1,
             (uint32_t)(p0 >> 32) ^ c.v[3] ^ k1, (uint32_t)p0}};
        c = next;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c;
}

static uint32_t word_of(uint64_t element, uint64_t key, uint64_t name)
{
    const uint64_t c = element >> 2;
    const struct words counter = {{(uint32_t)c, (uint32_t)(c >> 32),
                                   (uint32_t)name, (uint32_t)(name >> 32)}};
    return philox(counter, (uint32_t)key, (uint32_t)(key >> 32)).v[element & 3];
}

/* Random123 1.14, tests/kat_vectors, lines "philox4x32 10". */
static void test_known_answers(void **state)
{
    (void)state;
    static const struct {
        struct words counter;
        uint32_t key[2];
        struct words answer;
    } known[] = {
        {{{0, 0, 0, 0}},
         {0, 0},
         {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
        {{{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}},
         {0xffffffff, 0xffffffff},
         {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
        {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}},
         {0xa4093822, 0x299f31d0},
         {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
    };
    for (size_t i = 0; i < sizeof(known) / sizeof(known[0]); i++) {
        const struct words got =
            philox(known[i].counter, known[i].key[0], known[i].key[1]);
        assert_memory_equal(&got, &known[i].answer, sizeof(got));
    }
}

static void check_mask(const struct tvk_table *k, uint64_t start, uint64_t key,
                       uint64_t name, uint64_t threshold, size_t n)
{
    uint64_t mask[64];
    uint64_t n_kept = 0;

    assert_true(n <= 64 * 64);
    const uint64_t got = k->philox_mask(mask, start, key, name, threshold, n);
    for (size_t i = 0; i < n; i++) {
        const unsigned bit = (unsigned)(mask[i / 64] >> (i % 64) & 1u);
        assert_int_equal(bit, word_of(start + i, key, name) < threshold);
        n_kept += bit;
    }
    if (n % 64 != 0)
        assert_true(mask[n / 64] >> (n % 64) == 0);
    assert_true(got == n_kept);
}

static void each_row(void (*check)(const struct tvk_table *k))
{
    for (int i = 0; i < TVK_ISA_COUNT; i++)
        if (tvk_isa_supported((enum tvk_isa)i))
            check(tvk_table_for((enum tvk_isa)i));
}

/* The threshold right at and right above a word finds the word itself. */
static void known_words(const struct tvk_table *k)
{
    static const uint32_t want[4] = {0x6627e8d5, 0xe169c58d, 0xbc57ac4c,
                                     0x9b00dbd8};
    for (unsigned e = 0; e < 4; e++) {
        uint64_t mask = 0;
        k->philox_mask(&mask, 0, 0, 0, want[e], 4);
        assert_int_equal(mask >> e & 1, 0);
        k->philox_mask(&mask, 0, 0, 0, (uint64_t)want[e] + 1, 4);
        assert_int_equal(mask >> e & 1, 1);
    }
}

static void every_element(const struct tvk_table *k)
{
    struct rng r;
    rng_open(&r, 3);
    for (int i = 0; i < 40; i++) {
        const uint64_t start = rng_u64(&r) / 64 * 64;
        check_mask(k, start, rng_u64(&r), rng_u64(&r), rng_u32(&r),
                   (size_t)rng_below(&r, 700));
    }
    check_mask(k, 0, 1, 2, 0x80000000, 4096);
    /* The counter carries from its low into its high word here. */
    check_mask(k, (UINT64_C(1) << 34) - 640, 5, 6, 0x80000000, 2000);
}

static void extremes(const struct tvk_table *k)
{
    uint64_t mask[16];
    assert_true(k->philox_mask(mask, 0, 1, 2, 0, 1000) == 0);
    for (int i = 0; i < 16; i++)
        assert_true(mask[i] == 0);
    assert_true(k->philox_mask(mask, 0, 1, 2, UINT64_C(1) << 32, 1000) == 1000);
    for (int i = 0; i < 15; i++)
        assert_true(mask[i] == UINT64_MAX);
    assert_true(mask[15] == (UINT64_C(1) << 40) - 1);
}

/* Lower thresholds keep subsets; kept shares are within five sigma. */
static void nested_and_fair(const struct tvk_table *k)
{
    enum { N = 1 << 18 };
    static uint64_t mask[N / 64], before[N / 64];

    for (int i = 0; i < N / 64; i++)
        before[i] = 0;
    for (int step = 1; step <= 8; step++) {
        const double p = step / 8.0 - 0.03;
        const uint64_t kept =
            k->philox_mask(mask, 0, 77, 99, (uint64_t)(p * 4294967296.0), N);
        for (int i = 0; i < N / 64; i++) {
            assert_true((before[i] & ~mask[i]) == 0);
            before[i] = mask[i];
        }
        assert_true(fabs((double)kept - N * p) < 5.0 * sqrt(N * p * (1.0 - p)));
    }
}

static void test_known_words(void **state)
{
    (void)state;
    each_row(known_words);
}

static void test_every_element(void **state)
{
    (void)state;
    each_row(every_element);
}

static void test_extremes(void **state)
{
    (void)state;
    each_row(extremes);
}

static void test_nested_and_fair(void **state)
{
    (void)state;
    each_row(nested_and_fair);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_known_answers),
        cmocka_unit_test(test_known_words),
        cmocka_unit_test(test_every_element),
        cmocka_unit_test(test_extremes),
        cmocka_unit_test(test_nested_and_fair),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
