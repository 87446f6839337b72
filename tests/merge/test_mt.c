/* SPDX-License-Identifier: Apache-2.0 */
/* MT19937 against its authors' numbers, and places in its stream. */
#include "test.h"

#include "mt.h"

static void gives_the_authors_numbers(void **state)
{
    struct tvm_mt mt;
    (void)state;
    tvm_mt_seed(&mt, 5489);
    assert_int_equal(tvm_mt_next(&mt), 3499211612u);
    tvm_mt_skip(&mt, 9998);
    assert_int_equal(tvm_mt_next(&mt), 4123659995u); /* the 10000th */
}

static void finds_every_place(void **state)
{
    static const uint64_t at[] = {0, 1, 623, 624, 99999, 7654321, 7654322};
    const uint64_t n = 7654322;
    struct tv_error err;
    struct tvm_mt_stream *s = NULL;
    (void)state;
    assert_int_equal(tvm_mt_stream_open(42, n, &err, &s), TV_OK);
    for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
        struct tvm_mt walked;
        struct tvm_mt found;
        tvm_mt_seed(&walked, 42);
        tvm_mt_skip(&walked, at[i]);
        tvm_mt_stream_seek(s, at[i], &found);
        for (size_t j = 0; j < 700; j++)
            assert_int_equal(tvm_mt_next(&found), tvm_mt_next(&walked));
    }
    tvm_mt_stream_close(s);
}

static void masks_as_bernoulli(void **state)
{
    struct tvm_mt a;
    struct tvm_mt b;
    uint64_t mask[2] = {~0u, ~0u};
    (void)state;
    tvm_mt_seed(&a, 1);
    tvm_mt_seed(&b, 1);
    tvm_mt_mask(&a, mask, 0.25f, 100);
    for (size_t i = 0; i < 100; i++) {
        const bool keep = (tvm_mt_next(&b) & 0xffffffu) < 0x400000u;
        assert_int_equal(mask[i / 64] >> (i % 64) & 1u, keep);
    }
    assert_int_equal(mask[1] >> 36, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gives_the_authors_numbers),
        cmocka_unit_test(finds_every_place),
        cmocka_unit_test(masks_as_bernoulli),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
