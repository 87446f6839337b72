/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_dispatch.c - rows are complete, capped, named, and built once.
 */
#include "test.h"

#include <pthread.h>
#include <string.h>

#include "tv/kernels.h"

static void test_rows_are_complete(void **state)
{
    (void)state;
    for (int i = 0; i < TVK_ISA_COUNT; i++) {
        const struct tvk_table *const k = tvk_table_for((enum tvk_isa)i);
        void (*entry[(sizeof(*k) - offsetof(struct tvk_table, bf16_to_f32)) /
                     sizeof(void (*)(void))])(void);
        memcpy(entry, (const char *)k + offsetof(struct tvk_table, bf16_to_f32),
               sizeof(entry));
        for (size_t e = 0; e < sizeof(entry) / sizeof(entry[0]); e++)
            assert_true(entry[e] != NULL);
        assert_true((int)k->isa <= i);
        enum tvk_isa back = TVK_ISA_COUNT;
        assert_int_equal(tvk_isa_from_name(k->name, &back), 0);
        assert_int_equal(back, k->isa);
    }
}

static void test_cap(void **state)
{
    (void)state;
    assert_int_equal(tvk_table_for(TVK_REF)->isa, TVK_REF);
    assert_true(tvk_isa_supported(TVK_REF));
    enum tvk_isa best = TVK_REF;
    for (int i = 0; i < TVK_ISA_COUNT; i++) {
        const enum tvk_isa isa = (enum tvk_isa)i;
        if (tvk_isa_supported(isa)) {
            best = isa;
            assert_int_equal(tvk_table_for(isa)->isa, isa);
        } else {
            assert_int_equal(tvk_table_for(isa)->isa, best);
        }
    }
    assert_ptr_equal(tvk_table_best(), tvk_table_for(best));
    assert_ptr_equal(tvk_table_for(TVK_ISA_COUNT), tvk_table_best());
    assert_false(tvk_isa_supported(TVK_ISA_COUNT));
}

static void test_names(void **state)
{
    (void)state;
    enum tvk_isa isa = TVK_ISA_COUNT;
    assert_int_equal(tvk_isa_from_name("ref", &isa), 0);
    assert_int_equal(isa, TVK_REF);
    assert_int_equal(tvk_isa_from_name("avx2", &isa), 0);
    assert_int_equal(isa, TVK_AVX2);
    assert_int_equal(tvk_isa_from_name("avx512", &isa), 0);
    assert_int_equal(isa, TVK_AVX512);
    assert_int_equal(tvk_isa_from_name("amx", &isa), 0);
    assert_int_equal(isa, TVK_AMX);
    static const char *const bad[] = {"", "AVX2", "avx", "avx512 ", "native"};
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++)
        assert_int_equal(tvk_isa_from_name(bad[i], &isa), -1);
    assert_int_equal(isa, TVK_AMX);
}

static void test_features_fit(void **state)
{
    (void)state;
    char whole[256];
    assert_ptr_equal(tvk_cpu_features(whole, sizeof(whole)), whole);
    assert_true(strlen(whole) + 1 < sizeof(whole));
    if (tvk_isa_supported(TVK_AVX2))
        assert_non_null(strstr(whole, "avx2"));
    if (tvk_isa_supported(TVK_AVX512))
        assert_non_null(strstr(whole, "avx512f"));
    if (tvk_isa_supported(TVK_AMX))
        assert_non_null(strstr(whole, "amx_bf16"));
    for (size_t cap = 1; cap < sizeof(whole); cap++) {
        char part[sizeof(whole) + 1];
        memset(part, '#', sizeof(part));
        tvk_cpu_features(part, cap);
        const size_t len = strlen(part);
        assert_true(len < cap);
        assert_int_equal(part[cap], '#');
        /* Whole words from the front. */
        assert_memory_equal(part, whole, len);
        assert_true(whole[len] == '\0' || whole[len] == ' ' || len == 0);
    }
}

static void *ask(void *arg)
{
    const struct tvk_table **const got = arg;
    *got = tvk_table_best();
    return NULL;
}

static void test_threads_agree(void **state)
{
    (void)state;
    pthread_t id[8];
    const struct tvk_table *got[8] = {NULL};
    for (int i = 0; i < 8; i++)
        assert_int_equal(pthread_create(&id[i], NULL, ask, &got[i]), 0);
    for (int i = 0; i < 8; i++) {
        assert_int_equal(pthread_join(id[i], NULL), 0);
        assert_ptr_equal(got[i], tvk_table_best());
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        /* First, so that the race is about building the table. */
        cmocka_unit_test(test_threads_agree),
        cmocka_unit_test(test_rows_are_complete),
        cmocka_unit_test(test_cap),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_features_fit),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
