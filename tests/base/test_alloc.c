/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_alloc.c - the meter, the fuse, alignment, and sizes that overflow.
 */
#include "test.h"

#include <pthread.h>
#include <string.h>

#include "tv/alloc.h"

static void test_meter_goes_up_and_down(void **state)
{
    (void)state;
    const uint64_t start = tv_alloc_now();
    tv_alloc_peak_reset();
    assert_true(tv_alloc_peak() == start);
    char *a = tv_alloc(1000);
    assert_non_null(a);
    assert_true(tv_alloc_now() >= start + 1000);
    char *b = tv_calloc(100, 20);
    assert_non_null(b);
    for (int i = 0; i < 2000; i++)
        assert_int_equal(b[i], 0);
    const uint64_t both = tv_alloc_now();
    assert_true(both >= start + 3000);
    assert_true(tv_alloc_peak() == both);
    tv_free(a);
    assert_true(tv_alloc_now() <= both - 1000);
    assert_true(tv_alloc_peak() == both);
    tv_free(b);
    tv_free(NULL);
    assert_true(tv_alloc_now() == start);
    assert_true(tv_alloc_peak() == both);
    tv_alloc_peak_reset();
    assert_true(tv_alloc_peak() == start);
}

static void test_zero_bytes_are_a_pointer(void **state)
{
    (void)state;
    void *p[5] = {tv_alloc(0), tv_alloc(0), tv_calloc(0, 8),
                  tv_alloc_aligned(0), tv_realloc(NULL, 0)};
    for (int i = 0; i < 5; i++) {
        assert_non_null(p[i]);
        for (int k = 0; k < i; k++)
            assert_ptr_not_equal(p[i], p[k]);
    }
    for (int i = 0; i < 5; i++)
        tv_free(p[i]);
}

static void test_realloc_keeps_content_and_count(void **state)
{
    (void)state;
    const uint64_t start = tv_alloc_now();
    unsigned char *p = NULL;
    for (size_t n = 1; n < 100000; n *= 3) {
        unsigned char *q = tv_realloc(p, n);
        assert_non_null(q);
        p = q;
        for (size_t i = 0; i < n / 3; i++)
            assert_int_equal(p[i], i % 251);
        for (size_t i = 0; i < n; i++)
            p[i] = (unsigned char)(i % 251);
        assert_true(tv_alloc_now() >= start + n);
    }
    tv_alloc_fail_at(1, 1);
    assert_null(tv_realloc(p, 1000000));
    tv_alloc_fail_at(0, 0);
    assert_int_equal(p[17], 17);
    tv_free(p);
    assert_true(tv_alloc_now() == start);
}

static void test_alignment(void **state)
{
    (void)state;
    for (size_t n = 1; n < 5000; n += 97) {
        unsigned char *p = tv_alloc_aligned(n);
        assert_non_null(p);
        assert_int_equal((uintptr_t)p % 64, 0);
        memset(p, 1, n);
        tv_free(p);
    }
}

static void test_impossible_sizes(void **state)
{
    (void)state;
    /* volatile: the compiler warns of what we want to try. */
    volatile size_t huge = SIZE_MAX;
    const uint64_t start = tv_alloc_now();
    assert_null(tv_calloc(huge / 2, 3));
    assert_null(tv_calloc(huge, huge));
    assert_null(tv_alloc_aligned(huge));
    assert_null(tv_alloc_aligned(huge - 62));
    assert_null(tv_alloc(huge / 2));
    char *p = tv_alloc(10);
    assert_null(tv_realloc(p, huge / 2));
    tv_free(p);
    assert_true(tv_alloc_now() == start);
}

static void test_strings(void **state)
{
    (void)state;
    char *a = tv_strdup("héllo");
    assert_string_equal(a, "héllo");
    tv_free(a);
    a = tv_strdup("");
    assert_string_equal(a, "");
    tv_free(a);
    a = tv_strndup("hello", 3);
    assert_string_equal(a, "hel");
    tv_free(a);
    a = tv_strndup("hi", 300);
    assert_string_equal(a, "hi");
    tv_free(a);
    const char raw[3] = {'x', 'y', 'z'};
    a = tv_strndup(raw, 3);
    assert_string_equal(a, "xyz");
    tv_free(a);
    a = tv_asprintf("%s-%d-%0500d", "a", 42, 7);
    assert_int_equal(strlen(a), 505);
    assert_memory_equal(a, "a-42-000", 8);
    tv_free(a);
}

static void test_fuse_window(void **state)
{
    (void)state;
    const uint64_t before = tv_alloc_calls();
    tv_alloc_fail_at(3, 2);
    bool got[6];
    for (int i = 0; i < 6; i++) {
        void *p = i % 2 ? tv_alloc(8) : tv_calloc(1, 8);
        got[i] = p != NULL;
        tv_free(p);
    }
    assert_true(got[0] && got[1] && !got[2] && !got[3] && got[4] && got[5]);
    assert_int_equal(tv_alloc_fired(), 2);
    assert_int_equal(tv_alloc_calls() - before, 6);

    tv_alloc_fail_at(1, 1);
    assert_null(tv_strdup("x"));
    tv_alloc_fail_at(1, 1);
    assert_null(tv_asprintf("x"));
    tv_alloc_fail_at(1, 1);
    assert_null(tv_alloc_aligned(1));
    tv_alloc_fail_at(2, UINT64_MAX);
    void *p = tv_alloc(1);
    assert_non_null(p);
    for (int i = 0; i < 100; i++)
        assert_null(tv_alloc(1));
    assert_int_equal(tv_alloc_fired(), 100);
    tv_alloc_fail_at(0, 0);
    assert_int_equal(tv_alloc_fired(), 0);
    tv_free(p);
    p = tv_alloc(1);
    assert_non_null(p);
    tv_free(p);
}

static void *churn(void *arg)
{
    (void)arg;
    for (size_t i = 0; i < 20000; i++) {
        void *p = tv_alloc(i % 3000);
        tv_free(p);
    }
    return NULL;
}

static void test_threads_keep_the_count(void **state)
{
    (void)state;
    const uint64_t start = tv_alloc_now();
    const uint64_t calls = tv_alloc_calls();
    tv_alloc_peak_reset();
    pthread_t t[4];
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_create(&t[i], NULL, churn, NULL), 0);
    for (int i = 0; i < 4; i++)
        assert_int_equal(pthread_join(t[i], NULL), 0);
    assert_true(tv_alloc_now() == start);
    assert_int_equal(tv_alloc_calls() - calls, 80000);
    assert_true(tv_alloc_peak() >= start + 2999);
    assert_true(tv_alloc_peak() <= start + UINT64_C(4) * 4096);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_meter_goes_up_and_down),
        cmocka_unit_test(test_zero_bytes_are_a_pointer),
        cmocka_unit_test(test_realloc_keeps_content_and_count),
        cmocka_unit_test(test_alignment),
        cmocka_unit_test(test_impossible_sizes),
        cmocka_unit_test(test_strings),
        cmocka_unit_test(test_fuse_window),
        cmocka_unit_test(test_threads_keep_the_count),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
