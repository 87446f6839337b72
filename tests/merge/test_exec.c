/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The engine: the same bytes whatever the threads, memory and instruction set.
 */
#include "test.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "fixture.h"
#include "tv/alloc.h"
#include "tv/sys.h"

static const struct fx_tensor shapes[] = {
    {"model.embed_tokens.weight", TV_BF16, 2, {1500, 1024}},
    {"model.layers.0.mlp.up_proj.weight", TV_BF16, 2, {700, 333}},
    {"model.layers.0.norm.weight", TV_BF16, 1, {77}},
    {"model.layers.0.empty", TV_BF16, 2, {0, 5}},
    {"model.layers.1.f32", TV_F32, 2, {513, 1025}},
    {"model.layers.1.f16", TV_F16, 2, {100, 101}},
    {"model.layers.10.scalar", TV_F32, 0, {0}},
    {"model.layers.2.ids", TV_I64, 1, {300000}},
};
#define N_SHAPES (sizeof shapes / sizeof *shapes)

static const struct fx_param half[] = {{"weight", FX_ALL, 0.5},
                                       {"density", FX_ALL, 0.3},
                                       {"t", FX_ALL, 0.3},
                                       {"rescale", FX_ALL, 1}};

static struct tv_hash run(struct fx *f, const char *out, unsigned threads,
                          uint64_t memory, enum tvk_isa isa)
{
    struct tv_error err;
    struct tvm_result r;

    fx_out(f, out);
    f->plan.options.threads = threads;
    f->plan.options.memory_bytes = memory;
    f->plan.options.kernels = tvk_table_for(isa);
    assert_ok(tvm_run(&f->plan, NULL, &r, &err), &err);
    assert_int_equal(r.n_resumed, 0);
    assert_int_equal(r.n_tensors, N_SHAPES);
    assert_int_equal(r.bytes_written, f->plan.bytes_written);
    assert_true(r.peak_scratch_bytes > 0);
    return r.digest;
}

static void digest_is_invariant(void **state)
{
    static const char *const methods[] = {"linear", "task_arithmetic", "ties",
                                          "dare_linear", "dare_ties"};
    struct fx f;

    (void)state;
    fx_open(&f);
    for (int i = 0; i < 3; i++)
        fx_model(&f, shapes, N_SHAPES, NULL);
    for (size_t m = 0; m < sizeof methods / sizeof *methods; m++) {
        char out[32];
        fx_plan(&f, methods[m], m == 0 ? -1 : 0, half, 4, TV_DTYPE_NONE);
        const struct {
            unsigned threads;
            uint64_t memory;
            enum tvk_isa isa;
        } runs[] = {{1, 512u << 20, TVK_REF},
                    {2, 512u << 20, TVK_AVX512},
                    {3, 16u << 20, TVK_AVX2},
                    {1, 16u << 20, TVK_AVX512}};
        struct tv_hash first = {0, 0};
        for (size_t i = 0; i < 4; i++) {
            (void)snprintf(out, sizeof out, "out%zu.%zu", m, i);
            const struct tv_hash h =
                run(&f, out, runs[i].threads, runs[i].memory, runs[i].isa);
            if (i == 0)
                first = h;
            assert_true(tv_hash_equal(h, first));
        }
    }
    fx_close(&f);
}

/* The digest of the result is that of what is on disk. */
static void digest_is_of_the_files(void **state)
{
    struct fx f;
    struct tv_error err;
    struct tv_hash on_disk;
    tv_input *in = NULL;

    (void)state;
    fx_open(&f);
    for (int i = 0; i < 2; i++)
        fx_model(&f, shapes, N_SHAPES, NULL);
    fx_plan(&f, "slerp", 0, half, 4, TV_F32);
    const struct tv_hash h = run(&f, "out", 2, 64u << 20, TVK_AVX512);
    assert_ok(tv_input_open_path(f.plan.options.out_dir, &err, &in), &err);
    assert_ok(tv_input_digest(in, &on_disk, &err), &err);
    assert_true(tv_hash_equal(h, on_disk));
    tv_input_close(in);
    fx_close(&f);
}

/* ---- steady state ---------------------------------------------------------
 */

static float cheap(size_t model, size_t tensor, uint64_t i)
{
    (void)tensor;
    return (float)((i * 2654435761u + model * 40503u) % 8191u) / 8192.0f - 0.5f;
}

/* Allocations of a whole run, of three models that hold one tensor. */
static uint64_t allocations(const char *method, uint64_t rows)
{
    static const char *const no_base[] = {"linear", "karcher"};
    const struct fx_tensor one = {
        "model.layers.0.mlp.up_proj.weight", TV_BF16, 2, {rows, 1024}};
    int base = 0;
    struct fx f;

    for (size_t i = 0; i < sizeof no_base / sizeof *no_base; i++)
        if (strcmp(method, no_base[i]) == 0)
            base = -1;
    fx_open(&f);
    for (int i = 0; i < 3; i++)
        fx_model(&f, &one, 1, cheap);
    fx_plan(&f, method, base, half, 4, TV_DTYPE_NONE);
    fx_out(&f, "out");
    f.plan.options.threads = 1;
    f.plan.options.memory_bytes = 512u << 20;
    const uint64_t before = tv_alloc_calls();
    struct tv_error err;
    struct tvm_result r;
    assert_ok(tvm_run(&f.plan, NULL, &r, &err), &err);
    const uint64_t n = tv_alloc_calls() - before;
    fx_close(&f);
    return n;
}

/* What a merge allocates, it allocates for a tensor or once: tiles none. */
static void tiles_allocate_nothing(void **state)
{
    static const char *const methods[] = {
        "linear",      "task_arithmetic", "dare_ties",   "ties",
        "breadcrumbs", "della",           "consensus",   "ram",
        "nuslerp",     "karcher",         "model_stock", "sce"};

    (void)state;
    for (size_t m = 0; m < sizeof methods / sizeof *methods; m++) {
        const uint64_t small = allocations(methods[m], 512); /* one tile */
        const uint64_t large = allocations(methods[m], 4096);
        assert_true(small > 0);
        if (large != small)
            fail_msg("%s: %llu allocations for one tile, %llu for several",
                     methods[m], (unsigned long long)small,
                     (unsigned long long)large);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(digest_is_invariant),
        cmocka_unit_test(digest_is_of_the_files),
        cmocka_unit_test(tiles_allocate_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
