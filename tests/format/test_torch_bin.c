/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_torch_bin.c - tensors of torch.save archives: zero-copy extents, copies
 * of strided tensors, tied tensors; mutations of a whole archive.
 */
#include <stdlib.h>
#include <string.h>

#include "format_files.h"
#include "rng.h"
#include "test.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/parse.h"
#include "tv/sys.h"

/* Storage 0 of the hand-made archives holds bytes 0, 1, ... 63. */
static unsigned char value(uint64_t elem, uint64_t byte)
{
    return (unsigned char)(4 * elem + byte);
}

static void test_transposed(void **state)
{
    char *dir = tmpdir_make();
    tv_input *in = NULL;
    struct tv_error err;
    const struct tv_input_tensor *t = NULL;
    struct tv_view v;

    (void)state;
    ff_copy("good/torch/transposed.bin", dir, "pytorch_model.bin");
    assert_ok(tv_input_open_path(dir, &err, &in), &err);
    t = tv_input_find(in, "w");
    assert_non_null(t);
    assert_false(t->contiguous);
    assert_ok(tv_input_view(in, t, &err, &v), &err);
    assert_int_equal(v.bytes, 64);
    assert_int_equal((uintptr_t)v.chunks[0] % 64, 0);
    for (uint64_t i = 0; i < 4; i++) {
        for (uint64_t j = 0; j < 4; j++) {
            for (uint64_t b = 0; b < 4; b++)
                assert_int_equal(v.chunks[0][(4 * i + j) * 4 + b],
                                 value(4 * j + i, b));
        }
    }
    tv_input_release(in, &v);
    tv_input_close(in);
    tmpdir_remove(dir);
}

static void test_tied(void **state)
{
    char *dir = tmpdir_make();
    tv_input *in = NULL;
    struct tv_error err;
    struct tv_view a;
    struct tv_view b;
    struct tv_view c;

    (void)state;
    ff_copy("good/torch/tied.bin", dir, "pytorch_model.bin");
    assert_ok(tv_input_open_path(dir, &err, &in), &err);
    assert_int_equal(tv_input_count(in), 3);
    assert_int_equal(tv_input_file(in, 0)->header_bytes, 0);
    assert_ok(tv_input_view(in, tv_input_find(in, "a"), &err, &a), &err);
    assert_ok(tv_input_view(in, tv_input_find(in, "b"), &err, &b), &err);
    assert_ok(tv_input_view(in, tv_input_find(in, "c"), &err, &c), &err);
    assert_ptr_equal(a.chunks[0], b.chunks[0]); /* one storage, no copy */
    for (uint64_t i = 0; i < 64; i++)
        assert_int_equal(a.chunks[0][i], i);
    /* c is [[3, 7], [4, 8]] of the storage's elements. */
    assert_int_equal(c.bytes, 16);
    assert_int_equal(c.chunks[0][0], value(3, 0));
    assert_int_equal(c.chunks[0][4], value(7, 0));
    assert_int_equal(c.chunks[0][8], value(4, 0));
    assert_int_equal(c.chunks[0][12], value(8, 0));
    tv_input_release(in, &a);
    tv_input_release(in, &b);
    tv_input_release(in, &c);
    tv_input_close(in);
    tmpdir_remove(dir);
}

static void test_mutations(void **state)
{
    char *path = test_data("good/torch/tied.bin");
    char *good = NULL;
    size_t n = 0;
    struct tv_error err;
    struct rng r;
    size_t accepted = 0;
    const int rounds = 5000;

    (void)state;
    assert_ok(tv_file_read(path, 1 << 20, &err, &good, &n), &err);
    rng_open(&r, 3);
    for (int i = 0; i < rounds; i++) {
        unsigned char *exact = malloc(n);
        struct tv_parsed_file *p = NULL;
        const size_t edits = 1 + (size_t)rng_below(&r, 3);
        enum tv_err rc = TV_OK;

        assert_non_null(exact);
        memcpy(exact, good, n);
        for (size_t k = 0; k < edits; k++) {
            /* Mostly the directory: the last 400 bytes. */
            const size_t at = rng_below(&r, 3) != 0
                                  ? n - 1 - (size_t)rng_below(&r, 400)
                                  : (size_t)rng_below(&r, n);

            if (rng_below(&r, 2) != 0)
                exact[at] = (unsigned char)rng_u32(&r);
            else
                exact[at] ^= (unsigned char)(1u << rng_below(&r, 8));
        }
        tv_error_clear(&err);
        rc = tv_torch_parse(exact, n, "f", &err, &p);
        if (rc == TV_OK) {
            for (size_t k = 0; k < p->n; k++)
                assert_true(p->items[k].offset <= n &&
                            p->items[k].span <= n - p->items[k].offset);
            accepted++;
        } else {
            assert_int_equal(rc, TV_E_CORRUPT);
            assert_true(err.msg[0] != '\0');
        }
        tv_parsed_free(p);
        free(exact);
    }
    assert_true(accepted > 10 && accepted < (size_t)rounds - 10);
    tv_free(good);
    tv_free(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_transposed),
        cmocka_unit_test(test_tied),
        cmocka_unit_test(test_mutations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
