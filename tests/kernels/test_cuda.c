/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_cuda.c - the device handle and the staging of the CUDA row: budgets,
 * tiles, overlap, running out of memory, losing the device, threads, failing
 * allocations. That kernels compute the right thing is test_variants' matter.
 *
 * Needs the driver of tests/support/fake_cuda.c in LD_LIBRARY_PATH, which CTest
 * sees to: a real device cannot be lost on purpose.
 */
#include "test.h"

#include <pthread.h>
#include <string.h>

#include "cuda_fixture.h"
#include "rng.h"
#include "tv/alloc.h"
#include "tv/cuda.h"
#include "ulp.h"

enum { N = 200003, N_DONORS = 3, N_THREADS = 12 };

static float base[N], donor[N_DONORS][N], want[N], got[N];
static uint64_t mask[N / 64 + 1];
static const float *const donors[N_DONORS] = {donor[0], donor[1], donor[2]};
static const uint64_t *const masks[N_DONORS] = {mask, NULL, mask};
static const double weights[N_DONORS] = {0.5, 0.75, 1.25};
static const struct tvk_gta ties = {N_DONORS, weights, weights, 1, 1, 0.9};

static int fixture(void **state)
{
    struct rng rng;

    (void)state;
    if (!fake_cuda_is_there())
        return -1;
    rng_open(&rng, 3);
    for (size_t i = 0; i < N; i++) {
        base[i] = rng_normal(&rng);
        for (size_t j = 0; j < N_DONORS; j++)
            donor[j][i] = base[i] + 0.1f * rng_normal(&rng);
    }
    for (size_t i = 0; i < sizeof mask / sizeof *mask; i++)
        mask[i] = rng_u64(&rng);
    tvk_table_for(TVK_REF)->gta(want, base, donors, masks, &ties, N);
    return 0;
}

/* A device of so many bytes that is lost at a launch (0: never). */
static void fake(size_t total_bytes, unsigned long lose_at)
{
    const struct fake_cuda f = {.total_bytes = total_bytes, .lose_at = lose_at};
    fake_set(&f);
}

static struct fake_cuda seen(void)
{
    struct fake_cuda f;
    fake_get(&f);
    return f;
}

static struct tvk_cuda_options options(void)
{
    struct tvk_cuda_options o = cuda_device_options();

    o.least_elems = 0;
    return o;
}

static tvk_cuda *device_open(const struct tvk_cuda_options *o,
                             const struct tvk_table **k)
{
    struct tv_error err = {.code = TV_OK};
    tvk_cuda *d = NULL;

    assert_ok(tvk_cuda_open(o, &err, &d), &err);
    if (k)
        assert_ok(tvk_cuda_table(d, tvk_table_for(TVK_REF), &err, k), &err);
    return d;
}

/* Everything was given back. */
static void device_close(tvk_cuda *d)
{
    tvk_cuda_close(d);
    const struct fake_cuda f = seen();
    assert_int_equal(f.used_bytes, 0);
    assert_int_equal(f.n_pinned, 0);
}

static void gta_is_right(const struct tvk_table *k)
{
    memset(got, 0x5a, sizeof got);
    k->gta(got, base, donors, masks, &ties, N);
    assert_same_bytes("gta", got, want, sizeof want);
}

/* ---- the handle ---------------------------------------------------------- */

static void test_open(void **state)
{
    struct tv_error err = {.code = TV_OK};
    struct tvk_cuda_options o = options();
    tvk_cuda *d = NULL;

    (void)state;
    fake(1u << 20, 0);
    o.index = 1;
    assert_int_equal(tvk_cuda_open(&o, &err, &d), TV_E_UNSUPPORTED);
    assert_null(d);
    assert_non_null(strstr(err.msg, "no CUDA device 1: 1 found"));
    o.index = 0;
    d = device_open(&o, NULL);
    const struct tvk_cuda_info *info = tvk_cuda_about(d);
    assert_string_equal(info->name, "Fake GPU 0");
    assert_int_equal(info->total_bytes, 1u << 20);
    /* 80% of what is free. */
    assert_int_equal(info->budget_bytes, (uint64_t)(0.8 * (1u << 20)));
    assert_int_equal(tvk_cuda_trouble(d, &err), TV_OK);
    device_close(d);
    tvk_cuda_close(NULL);
    assert_int_equal(tvk_cuda_trouble(NULL, &err), TV_OK);
    o.image = FAKE_CUDA_NEWER;
    assert_int_equal(tvk_cuda_open(&o, &err, &d), TV_E_UNSUPPORTED);
    assert_null(d);
    assert_non_null(strstr(err.msg, "its driver (of CUDA 12.4) does not take"));
}

static void test_budget(void **state)
{
    struct tv_error err = {.code = TV_OK};
    struct tvk_cuda_options o = options();
    tvk_cuda_ptr a = 0, b = 0;

    (void)state;
    fake(1u << 20, 0);
    o.memory_bytes = 100000;
    tvk_cuda *d = device_open(&o, NULL);
    assert_ok(tvk_cuda_alloc(d, 60000, "one", &err, &a), &err);
    assert_true(a != 0);
    assert_int_equal(tvk_cuda_left(d), 40000);
    assert_int_equal(tvk_cuda_alloc(d, 50000, "two", &err, &b), TV_E_BUDGET);
    assert_int_equal(b, 0);
    assert_string_equal(err.msg,
                        "two needs 50000 bytes of device memory, 40000 "
                        "of 100000 are left (--device-memory)");
    /* Nothing is broken by it. */
    assert_int_equal(tvk_cuda_trouble(d, &err), TV_OK);
    tvk_cuda_free(d, a, 60000);
    assert_ok(tvk_cuda_alloc(d, 100000, "two", &err, &b), &err);
    tvk_cuda_free(d, b, 100000);
    assert_ok(tvk_cuda_alloc(d, 0, "none", &err, &a), &err);
    assert_int_equal(a, 0);
    device_close(d);

    /* The budget may be more than there is. */
    o.memory_bytes = 1u << 30;
    d = device_open(&o, NULL);
    assert_int_equal(tvk_cuda_alloc(d, 2u << 20, "all", &err, &a), TV_E_BUDGET);
    assert_int_equal(tvk_cuda_left(d), 1u << 30);
    assert_int_equal(tvk_cuda_trouble(d, &err), TV_OK);
    device_close(d);
}

static void test_copies(void **state)
{
    struct tv_error err = {.code = TV_OK};
    const struct tvk_cuda_options o = options();
    tvk_cuda_stream *s = NULL;
    tvk_cuda_ptr at = 0;
    void *pinned = NULL;

    (void)state;
    fake(1u << 20, 0);
    tvk_cuda *d = device_open(&o, NULL);
    assert_ok(tvk_cuda_alloc(d, 3000, "copies", &err, &at), &err);
    assert_ok(tvk_cuda_pin(d, 1000, &err, &pinned), &err);
    assert_ok(tvk_cuda_stream_open(d, &err, &s), &err);
    memset(pinned, 7, 1000);
    assert_ok(tvk_cuda_upload(s, at, pinned, 1000, &err), &err);
    assert_ok(tvk_cuda_copy(s, at + 1000, at, 1000, &err), &err);
    assert_ok(tvk_cuda_fill(s, at, 9, 500, &err), &err);
    assert_ok(tvk_cuda_copy(s, at + 2000, at, 1000, &err), &err);
    assert_ok(tvk_cuda_sync(s, &err), &err);
    assert_ok(tvk_cuda_download(s, pinned, at + 1000, 1000, &err), &err);
    assert_ok(tvk_cuda_sync(s, &err), &err);
    for (size_t i = 0; i < 1000; i++)
        assert_int_equal(((unsigned char *)pinned)[i], 7);
    assert_ok(tvk_cuda_download(s, pinned, at + 2000, 1000, &err), &err);
    assert_ok(tvk_cuda_sync(s, &err), &err);
    for (size_t i = 0; i < 1000; i++)
        assert_int_equal(((unsigned char *)pinned)[i], i < 500 ? 9 : 7);
    tvk_cuda_stream_close(s);
    tvk_cuda_unpin(d, pinned);
    tvk_cuda_free(d, at, 3000);
    device_close(d);
}

/* What the driver refuses breaks the device: later calls say the same. */
static void test_refusal(void **state)
{
    struct tv_error err = {.code = TV_OK}, again = {.code = TV_OK};
    const struct tvk_cuda_options o = options();
    tvk_cuda_stream *s = NULL;
    tvk_cuda_ptr at = 0;
    char args[8] = {0};

    (void)state;
    fake(1u << 20, 0);
    tvk_cuda *d = device_open(&o, NULL);
    assert_ok(tvk_cuda_stream_open(d, &err, &s), &err);
    assert_int_equal(tvk_cuda_launch(s, "tv_nothing", 1, 1, 32, 0, args, &err),
                     TV_E_IO);
    assert_non_null(strstr(err.msg, "Fake GPU 0"));
    assert_non_null(strstr(err.msg, "tv_nothing"));
    assert_int_equal(tvk_cuda_alloc(d, 100, "more", &again, &at), TV_E_IO);
    assert_string_equal(again.msg, err.msg);
    assert_int_equal(tvk_cuda_sync(s, &again), TV_E_IO);
    assert_int_equal(tvk_cuda_trouble(d, &again), TV_E_IO);
    tvk_cuda_stream_close(s);
    device_close(d);
}

static void test_one_table(void **state)
{
    struct tv_error err = {.code = TV_OK};
    const struct tvk_cuda_options o = options();
    const struct tvk_table *k = NULL, *k2 = NULL;

    (void)state;
    fake(1u << 20, 0);
    tvk_cuda *d = device_open(&o, &k);
    tvk_cuda *d2 = device_open(&o, NULL);
    assert_ok(tvk_cuda_table(d, tvk_table_for(TVK_REF), &err, &k2), &err);
    assert_ptr_equal(k, k2);
    assert_int_equal(tvk_cuda_table(d2, k, &err, &k2), TV_E_INTERNAL);
    assert_null(k2);
    tvk_cuda_close(d);
    assert_ok(tvk_cuda_table(d2, tvk_table_for(TVK_REF), &err, &k2), &err);
    gta_is_right(k2);
    device_close(d2);
}

/* ---- tiles --------------------------------------------------------------- */

static void test_tiles(void **state)
{
    struct tvk_cuda_options o = options();
    const struct tvk_table *k = NULL;

    (void)state;
    o.staging_bytes = 200000;
    fake(1u << 24, 0);
    tvk_cuda *d = device_open(&o, NULL);
    assert_int_equal(tvk_cuda_staging(d), 0);
    tvk_cuda_close(d);
    d = device_open(&o, &k);
    gta_is_right(k);
    const struct fake_cuda f = seen();
    /* What plans count is what is pinned, but for whole pages. */
    assert_true(tvk_cuda_staging(d) <= 200000);
    assert_true(f.most_pinned_bytes <= tvk_cuda_staging(d) + 2 * 4096);
    assert_true(f.most_pinned_bytes > 0);
    /* 17.5 bytes an element, 100,000 a slot at most: cut, and two at a time. */
    assert_true(f.n_launches >= 35);
    assert_int_equal(f.most_streams, 2);
    assert_true(f.most_bytes <= 200000);
    device_close(d);
}

/* What the device does not gain by, the CPU does. */
static void test_left_to_cpu(void **state)
{
    struct tvk_cuda_options o = options();
    const struct tvk_table *k = NULL;
    static uint32_t words[N], expected[N];

    (void)state;
    tvk_table_for(TVK_REF)->philox_words(expected, 5, 1, 2, N);
    o.least_elems = 1000;
    fake(1u << 24, 0);
    tvk_cuda *d = device_open(&o, &k);
    gta_is_right(k);
    k->philox_words(words, 5, 1, 2, 999);
    assert_int_equal(tvk_cuda_launches(d), 0);
    k->philox_words(words, 5, 1, 2, N);
    assert_true(tvk_cuda_launches(d) > 0);
    assert_same_bytes("philox_words", words, expected, sizeof expected);
    device_close(d);
}

/* A device that has less than the budget says gets smaller tiles. */
static void test_smaller_tiles(void **state)
{
    struct tv_error err = {.code = TV_OK};
    struct tvk_cuda_options o = options();
    const struct tvk_table *k = NULL;

    (void)state;
    o.memory_bytes = 1u << 30;
    fake(60000, 0);
    tvk_cuda *d = device_open(&o, &k);
    gta_is_right(k);
    const struct fake_cuda f = seen();
    assert_int_equal(k->trouble(&err), TV_OK);
    assert_true(f.n_launches >= 17 * N / 60000);
    assert_true(f.most_bytes <= 60000);
    device_close(d);
}

/* Too small for any tile: the CPU finishes, and the caller is told. */
static void test_no_tile(void **state)
{
    struct tv_error err = {.code = TV_OK};
    struct tvk_cuda_options o = options();
    const struct tvk_table *k = NULL;

    (void)state;
    o.memory_bytes = 1u << 30;
    fake(1000, 0);
    tvk_cuda *d = device_open(&o, &k);
    gta_is_right(k);
    assert_int_equal(k->trouble(&err), TV_E_BUDGET);
    assert_non_null(strstr(err.msg, "bytes of device memory"));
    assert_int_equal(seen().n_launches, 0);
    device_close(d);
}

/* Lost at every launch of a call in turn. */
static void test_lost(void **state)
{
    struct tv_error err = {.code = TV_OK};
    struct tvk_cuda_options o = options();
    const struct tvk_table *k = NULL;
    unsigned long at = 1;

    (void)state;
    o.staging_bytes = 2000000;
    for (;; at++) {
        fake(1u << 24, at);
        tvk_cuda *d = device_open(&o, &k);
        gta_is_right(k);
        const enum tv_err rc = k->trouble(&err);
        if (rc == TV_OK) {
            device_close(d);
            break;
        }
        assert_int_equal(rc, TV_E_IO);
        assert_non_null(strstr(err.msg, "CUDA device 0 (Fake GPU 0)"));
        assert_non_null(strstr(err.msg, "CUDA_ERROR_LAUNCH_FAILED"));
        gta_is_right(k);
        device_close(d);
    }
    assert_true(at > 3);
}

/* Histograms are added to, so a lost device must not have them counted twice.
 */
static void test_lost_sums(void **state)
{
    struct tv_error err = {.code = TV_OK};
    const struct tvk_cuda_options o = options();
    const struct tvk_table *k = NULL;
    static uint32_t hist[TVK_HIST_HI], expected[TVK_HIST_HI];
    static float y[N], right[N];

    (void)state;
    memset(expected, 0, sizeof expected);
    memset(hist, 0, sizeof hist);
    tvk_table_for(TVK_REF)->hist_hi(expected, base, NULL, N);
    fake(1u << 24, 1);
    tvk_cuda *d = device_open(&o, &k);
    k->hist_hi(hist, base, NULL, N);
    assert_int_equal(k->trouble(&err), TV_E_IO);
    assert_same_bytes("hist_hi", hist, expected, sizeof expected);
    device_close(d);

    memcpy(right, base, sizeof right);
    memcpy(y, base, sizeof y);
    tvk_table_for(TVK_REF)->lowrank_add(right, donor[0], donor[1], 0.5, 4, 1000,
                                        0, N);
    fake(1u << 24, 1);
    d = device_open(&o, &k);
    k->lowrank_add(y, donor[0], donor[1], 0.5, 4, 1000, 0, N);
    assert_same_bytes("lowrank_add", y, right, sizeof right);
    device_close(d);
}

/* ---- threads and memory -------------------------------------------------- */

static const struct tvk_table *shared_table;

static void *call_often(void *arg)
{
    float *const out = arg;

    for (size_t i = 0; i < 3; i++)
        shared_table->gta(out, base, donors, masks, &ties, 30011);
    return NULL;
}

static void test_threads(void **state)
{
    struct tv_error err = {.code = TV_OK};
    struct tvk_cuda_options o = options();
    pthread_t thread[N_THREADS];
    static float out[N_THREADS][30011];

    (void)state;
    fake(1u << 24, 0);
    tvk_cuda *d = device_open(&o, &shared_table);
    for (size_t i = 0; i < N_THREADS; i++)
        assert_int_equal(pthread_create(&thread[i], NULL, call_often, out[i]),
                         0);
    for (size_t i = 0; i < N_THREADS; i++)
        assert_int_equal(pthread_join(thread[i], NULL), 0);
    assert_int_equal(shared_table->trouble(&err), TV_OK);
    for (size_t i = 0; i < N_THREADS; i++)
        assert_same_bytes("a thread's gta", out[i], want, sizeof out[i]);
    assert_int_equal(seen().n_launches, 3 * N_THREADS);
    device_close(d);
}

/* Every allocation fails once: an error or the CPU's work, never a leak. */
static void test_no_memory(void **state)
{
    struct tvk_cuda_options o = options();
    const struct tvk_table *k = NULL;
    bool fired = true;

    (void)state;
    o.staging_bytes = 2000000;
    fake(1u << 24, 0);
    for (uint64_t n = 1; fired; n++) {
        struct tv_error err = {.code = TV_OK};
        const uint64_t before = tv_alloc_now();
        tvk_cuda *d = NULL;
        assert_true(n < 100);
        tv_alloc_fail_at(n, 1);
        enum tv_err rc = tvk_cuda_open(&o, &err, &d);
        if (rc == TV_OK)
            rc = tvk_cuda_table(d, tvk_table_for(TVK_REF), &err, &k);
        if (rc == TV_OK) {
            gta_is_right(k);
            assert_int_equal(k->trouble(&err), TV_OK);
        } else {
            assert_int_equal(rc, TV_E_NOMEM);
        }
        fired = tv_alloc_fired() > 0;
        tv_alloc_fail_at(0, 0);
        device_close(d);
        assert_int_equal(tv_alloc_now(), before);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_open),
        cmocka_unit_test(test_budget),
        cmocka_unit_test(test_copies),
        cmocka_unit_test(test_refusal),
        cmocka_unit_test(test_one_table),
        cmocka_unit_test(test_tiles),
        cmocka_unit_test(test_left_to_cpu),
        cmocka_unit_test(test_smaller_tiles),
        cmocka_unit_test(test_no_tile),
        cmocka_unit_test(test_lost),
        cmocka_unit_test(test_lost_sums),
        cmocka_unit_test(test_threads),
        cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests(tests, fixture, NULL);
}
