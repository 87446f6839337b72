/* SPDX-License-Identifier: Apache-2.0 */
/* test_cache.c - a merge is the same whatever its store remembers. */
#include "test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "fixture.h"
#include "rng.h"
#include "tv/alloc.h"
#include "tv/derived.h"
#include "tv/sys.h"

static const struct fx_tensor tensors[] = {
    {"layers.0.w", TV_BF16, 2, {600, 512}},
    {"layers.1.w", TV_F32, 2, {70, 1000}},
    {"layers.2.w", TV_F16, 2, {131, 1024}},
    {"layers.3.w", TV_F16, 2, {256, 512}},
    {"norm", TV_BF16, 1, {640}},
};
#define N_TENSORS (sizeof tensors / sizeof *tensors)
#define N_DONORS  2u
#define N_MASKS   (N_TENSORS * N_DONORS)

struct both { /* models and a store */
    struct fx f;
    char *path;
    tv_store *s;
    struct tv_error err;
};

/* Deltas of model m; some weights are infinite, many changes are alike, so that
 * the threshold cuts through equals. */
static float value(size_t model, size_t tensor, uint64_t i)
{
    const uint64_t h = (i + 1) * 0x9e3779b97f4a7c15u + tensor * 77u;
    const float base = (float)(h >> 40) / 16777216.0f;
    const uint64_t d =
        (h ^ (model * 0xd1342543de82ef95u)) * 0x2545f4914f6cdd1du;
    if (model == 0)
        return base;
    if (tensor == 1 && i % 9000 == 17)
        return model == 1 ? INFINITY : NAN;
    return base + (float)((int64_t)(d >> 59) - 16) / 64.0f;
}

static void both_open(struct both *b, uint64_t quota)
{
    memset(b, 0, sizeof *b);
    fx_open(&b->f);
    for (size_t m = 0; m <= N_DONORS; m++)
        fx_model(&b->f, tensors, N_TENSORS, value);
    b->path = tv_path_join(b->f.dir, "store");
    assert_ok(tv_store_create(b->path, quota, &b->err), &b->err);
    assert_ok(tv_store_open(b->path, NULL, &b->err, &b->s), &b->err);
}

static void both_close(struct both *b)
{
    tv_store_close(b->s);
    tv_free(b->path);
    fx_close(&b->f);
}

static void reopen(struct both *b, bool read_only)
{
    const struct tv_store_options o = {.read_only = read_only};
    tv_store_close(b->s);
    b->s = NULL;
    assert_ok(tv_store_open(b->path, &o, &b->err, &b->s), &b->err);
}

static void plan(struct both *b, const char *method, double density,
                 double rescale, double weight)
{
    const struct fx_param params[] = {{"weight", FX_ALL, weight},
                                      {"density", FX_ALL, density},
                                      {"rescale", FX_ALL, rescale},
                                      {"weight", 2, -0.5}};
    fx_plan(&b->f, method, 0, params, 4, TV_DTYPE_NONE);
    b->f.plan.options.store = b->s;
}

static struct tvm_result run(struct both *b, unsigned threads)
{
    static unsigned n;
    struct tvm_result r;
    char name[32];
    (void)snprintf(name, sizeof name, "r%u", n++);
    fx_out(&b->f, name);
    b->f.plan.options.threads = threads;
    b->f.plan.options.store = b->s;
    assert_ok(tvm_run(&b->f.plan, NULL, &r, &b->err), &b->err);
    return r;
}

static void same(const struct tvm_result *a, const struct tvm_result *b)
{
    assert_true(tv_hash_equal(a->digest, b->digest));
    assert_int_equal(a->n_nonfinite_in, b->n_nonfinite_in);
    assert_int_equal(a->n_nonfinite_out, b->n_nonfinite_out);
}

static void check_use(const struct tvm_result *r, size_t masks_used,
                      size_t masks_stored, size_t used, size_t stored)
{
    assert_int_equal(r->cache.masks_used, masks_used);
    assert_int_equal(r->cache.masks_stored, masks_stored);
    assert_int_equal(r->cache.task_vectors_used, used);
    assert_int_equal(r->cache.task_vectors_stored, stored);
}

static void cold_warm_and_evicted(double density, double rescale, bool vectors)
{
    struct both b;
    uint64_t n = 0;
    both_open(&b, 0);
    plan(&b, "ties", density, rescale, 0.7);
    const size_t v = vectors ? N_MASKS : 0;
    b.f.plan.options.no_cache = true;
    const struct tvm_result want = run(&b, 2);
    check_use(&want, 0, 0, 0, 0);
    assert_true(want.n_nonfinite_in > 0);
    b.f.plan.options.no_cache = false;

    struct tvm_result r = run(&b, 2);
    same(&r, &want);
    check_use(&r, 0, N_MASKS, 0, 0);
    r = run(&b, 1);
    same(&r, &want);
    check_use(&r, N_MASKS, 0, 0, v);
    const uint64_t read_before = r.bytes_read;
    reopen(&b, false);
    r = run(&b, 3);
    same(&r, &want);
    check_use(&r, N_MASKS, 0, v, 0);
    assert_true(!vectors || r.bytes_read < read_before);
    reopen(&b, true);
    r = run(&b, 2);
    same(&r, &want);
    check_use(&r, N_MASKS, 0, v, 0);
    reopen(&b, false);

    /* Other weights are a sweep over the same task vectors. */
    plan(&b, "ties", density, rescale, -1.25);
    b.f.plan.options.no_cache = true;
    const struct tvm_result other = run(&b, 2);
    b.f.plan.options.no_cache = false;
    r = run(&b, 2);
    same(&r, &other);
    check_use(&r, N_MASKS, 0, v, 0);

    assert_ok(tv_derived_evict_all(b.s, &n, &b.err), &b.err);
    r = run(&b, 2);
    same(&r, &other);
    check_use(&r, 0, N_MASKS, 0, 0);
    assert_ok(tv_store_verify(b.s, 0, NULL, NULL, NULL, &b.err), &b.err);
    both_close(&b);
}

static void results_do_not_depend_on_it(void **state)
{
    (void)state;
    cold_warm_and_evicted(0.2, 0, true);
    cold_warm_and_evicted(0.03, 0, true);
    cold_warm_and_evicted(0.8, 0, false); /* vectors would not pay */
}

static void nor_with_rescaling(void **state)
{
    (void)state;
    cold_warm_and_evicted(0.3, 1, true);
}

/* A mask of a run without rescaling has no sums: it is made again with them,
 * and serves both from then on. */
static void sums_are_added(void **state)
{
    struct both b;
    (void)state;
    both_open(&b, 0);
    plan(&b, "ties", 0.2, 1, 1);
    b.f.plan.options.no_cache = true;
    const struct tvm_result with = run(&b, 2);
    plan(&b, "ties", 0.2, 0, 1);
    struct tvm_result r = run(&b, 2);
    const struct tvm_result without = r;
    check_use(&r, 0, N_MASKS, 0, 0);
    assert_false(tv_hash_equal(with.digest, without.digest));
    plan(&b, "ties", 0.2, 1, 1);
    r = run(&b, 2);
    same(&r, &with);
    check_use(&r, 0, N_MASKS, 0, 0);
    r = run(&b, 2);
    same(&r, &with);
    check_use(&r, N_MASKS, 0, 0, N_MASKS);
    plan(&b, "ties", 0.2, 0, 1);
    r = run(&b, 2);
    same(&r, &without);
    check_use(&r, N_MASKS, 0, N_MASKS, 0);
    both_close(&b);
}

/* Some masks there, some not: only these are looked for. */
static void halves(void **state)
{
    struct both b;
    (void)state;
    both_open(&b, 0);
    plan(&b, "ties", 0.2, 1, 1);
    (void)run(&b, 2);
    const struct fx_param params[] = {{"weight", FX_ALL, 1},
                                      {"density", 1, 0.2},
                                      {"density", 2, 0.4},
                                      {"rescale", FX_ALL, 1}};
    fx_plan(&b.f, "ties", 0, params, 4, TV_DTYPE_NONE);
    b.f.plan.options.no_cache = true;
    const struct tvm_result want = run(&b, 2);
    b.f.plan.options.no_cache = false;
    struct tvm_result r = run(&b, 2);
    same(&r, &want);
    check_use(&r, N_TENSORS, N_TENSORS, 0, N_TENSORS);
    r = run(&b, 1);
    same(&r, &want);
    check_use(&r, N_MASKS, 0, N_TENSORS, N_TENSORS);
    r = run(&b, 4);
    same(&r, &want);
    check_use(&r, N_MASKS, 0, N_MASKS, 0);
    both_close(&b);
}

static void masks_cost_a_bit(void **state)
{
    struct both b;
    struct tv_store_stat st;
    uint64_t n = 0;
    (void)state;
    both_open(&b, 0);
    plan(&b, "ties", 0.2, 0, 1);
    (void)run(&b, 2);
    for (size_t i = 0; i < N_TENSORS; i++)
        n += b.f.plan.tensors[i].n_elems * N_DONORS;
    assert_ok(tv_store_stat(b.s, &st, &b.err), &b.err);
    assert_int_equal(st.n_masks, N_MASKS);
    assert_true((double)st.masks * 8 <= 1.01 * 1.02 * (double)n);
    both_close(&b);
}

static void random_masks_are_not_kept(void **state)
{
    struct both b;
    (void)state;
    both_open(&b, 0);
    plan(&b, "dare_ties", 0.4, 0, 1);
    const struct tvm_result r = run(&b, 2);
    check_use(&r, 0, 0, 0, 0);
    plan(&b, "ties", 1.0, 0, 1);
    const struct tvm_result all = run(&b, 2);
    check_use(&all, 0, 0, 0, 0);
    both_close(&b);
}

static void changed_inputs_are_other_keys(void **state)
{
    struct both b;
    char *data = NULL;
    size_t n = 0;
    (void)state;
    both_open(&b, 0);
    plan(&b, "ties", 0.2, 0, 1);
    (void)run(&b, 2);
    /* The same bytes in another file: nothing is known of them. */
    char *path = tv_path_join(b.f.model[2], "model.safetensors");
    assert_ok(tv_file_read(path, 1u << 30, &b.err, &data, &n), &b.err);
    tv_input_close(b.f.input[2]);
    assert_ok(tv_file_write_atomic(path, data, n, false, &b.err), &b.err);
    assert_ok(tv_input_open_path(b.f.model[2], &b.err, &b.f.input[2]), &b.err);
    plan(&b, "ties", 0.2, 0, 1);
    const struct tvm_result r = run(&b, 2);
    check_use(&r, N_TENSORS, N_TENSORS, 0, N_TENSORS);
    tv_free(data);
    tv_free(path);
    both_close(&b);
}

static void little_memory_and_little_room(void **state)
{
    struct both b;
    struct tv_store_stat st;
    (void)state;
    both_open(&b, 256u << 10);
    plan(&b, "ties", 0.2, 0, 1);
    b.f.plan.options.no_cache = true;
    const struct tvm_result want = run(&b, 1);
    b.f.plan.options.no_cache = false;
    for (int i = 0; i < 3; i++) {
        uint64_t used = 0;
        /* The outputs count as well: they have to go out of the way. */
        assert_ok(tv_store_quota_set(b.s, i == 0 ? 8u << 20 : 0, &b.err),
                  &b.err);
        const struct tvm_result r = run(&b, 1);
        same(&r, &want);
        assert_ok(tv_disk_used(b.path, &used, &b.err), &b.err);
        assert_true(i > 0 || used <= 8u << 20);
        b.f.plan.options.memory_bytes = i == 0 ? 16u << 20 : 9u << 20;
    }
    assert_ok(tv_store_stat(b.s, &st, &b.err), &b.err);
    assert_int_equal(st.charged_bytes, 0);
    both_close(&b);
}

/* Flips a bit in the first place where the file holds it. */
static void damage(const char *path, const void *needle, size_t n)
{
    struct tv_error err;
    char *data = NULL;
    size_t bytes = 0;
    assert_ok(tv_file_read(path, 1u << 30, &err, &data, &bytes), &err);
    char *at = memmem(data, bytes, needle, n);
    assert_non_null(at);
    *at = (char)(*at ^ 1);
    FILE *f = fopen(path, "r+b");
    assert_non_null(f);
    assert_int_equal(fseek(f, at - data, SEEK_SET), 0);
    assert_int_equal(fwrite(at, 1, 1, f), 1);
    assert_int_equal(fclose(f), 0);
    tv_free(data);
}

static void damage_stops_the_merge(void **state)
{
    struct both b;
    struct tvm_result r;
    tv_read *read = NULL;
    struct tv_derived_list *l = NULL;
    tv_mask *m = NULL;
    bool found = false;
    uint64_t scratch[32], copy[32], n = 0;
    (void)state;
    both_open(&b, 0);
    plan(&b, "ties", 0.2, 0, 1);
    const struct tvm_result want = run(&b, 2);
    assert_ok(tv_read_begin(b.s, &b.err, &read), &b.err);
    assert_ok(tv_derived_list(read, &b.err, &l), &b.err);
    assert_string_equal(l->items[0].key.tensor, "layers.0.w");
    assert_ok(tv_mask_open(read, l->items[0].key.score, "layers.0.w", &found,
                           &b.err, &m),
              &b.err);
    memcpy(copy, tv_mask_words(m, 0, 2048, scratch), sizeof copy);
    tv_mask_close(m);
    tv_derived_list_free(l);
    tv_read_end(read);
    char *file = tv_path_join(b.path, "data.mdb");
    tv_store_close(b.s);
    b.s = NULL;
    damage(file, copy, sizeof copy);
    assert_ok(tv_store_open(b.path, NULL, &b.err, &b.s), &b.err);
    b.f.plan.options.store = b.s;
    fx_out(&b.f, "damaged");
    assert_code(tvm_run(&b.f.plan, NULL, &r, &b.err), TV_E_CORRUPT, &b.err);
    assert_message(&b.err, "layers.0.w");
    assert_ok(tv_derived_evict_all(b.s, &n, &b.err), &b.err);
    r = run(&b, 2);
    same(&r, &want);
    tv_free(file);
    both_close(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(results_do_not_depend_on_it),
        cmocka_unit_test(nor_with_rescaling),
        cmocka_unit_test(sums_are_added),
        cmocka_unit_test(halves),
        cmocka_unit_test(masks_cost_a_bit),
        cmocka_unit_test(random_masks_are_not_kept),
        cmocka_unit_test(changed_inputs_are_other_keys),
        cmocka_unit_test(little_memory_and_little_room),
        cmocka_unit_test(damage_stops_the_merge),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
