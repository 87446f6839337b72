/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_pool.c - every item once, workers in range, nothing left running.
 */
#include "test.h"

#include <errno.h>
#include <signal.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#include "faults.h"
#include "tv/alloc.h"
#include "tv/pool.h"

struct job {
    unsigned n_threads;
    unsigned *seen; /* [n_items]; plain memory, so that TSan sees misuse */
    uint64_t *sums; /* [n_threads] */
    atomic_uint bad_workers;
};

static void count_item(void *arg, size_t item, unsigned worker)
{
    struct job *j = arg;
    if (worker >= j->n_threads) {
        atomic_fetch_add(&j->bad_workers, 1);
        return;
    }
    j->seen[item]++;
    j->sums[worker] += item;
}

static void test_every_item_once(void **state)
{
    (void)state;
    struct tv_error err;
    static const size_t sizes[] = {0, 1, 2, 3, 7, 64, 1000, 20000};
    for (unsigned threads = 1; threads <= 9; threads += 2) {
        tv_pool *pool = NULL;
        assert_ok(tv_pool_open(threads, &err, &pool), &err);
        assert_int_equal(tv_pool_threads(pool), threads);
        for (size_t k = 0; k < sizeof sizes / sizeof *sizes; k++) {
            const size_t n = sizes[k];
            struct job j = {.n_threads = threads};
            j.seen = tv_calloc(n, sizeof *j.seen);
            j.sums = tv_calloc(threads, sizeof *j.sums);
            tv_pool_run(pool, n, count_item, &j);
            uint64_t sum = 0;
            for (unsigned t = 0; t < threads; t++)
                sum += j.sums[t];
            for (size_t i = 0; i < n; i++)
                assert_int_equal(j.seen[i], 1);
            assert_int_equal(atomic_load(&j.bad_workers), 0);
            if (n > 0)
                assert_true(sum == (uint64_t)n * (n - 1) / 2);
            tv_free(j.seen);
            tv_free(j.sums);
        }
        tv_pool_close(pool);
    }
}

static void test_many_small_runs(void **state)
{
    (void)state;
    struct tv_error err;
    tv_pool *pool = NULL;
    unsigned seen[5] = {0};
    uint64_t sums[4] = {0};
    struct job j = {.n_threads = 4, .seen = seen, .sums = sums};
    assert_ok(tv_pool_open(4, &err, &pool), &err);
    for (unsigned i = 0; i < 3000; i++)
        tv_pool_run(pool, 2 + i % 4, count_item, &j);
    assert_int_equal(seen[0], 3000);
    assert_int_equal(seen[1], 3000);
    assert_int_equal(seen[2], 2250);
    assert_int_equal(seen[4], 750);
    tv_pool_close(pool);
}

static void test_open_and_close_without_work(void **state)
{
    (void)state;
    struct tv_error err;
    for (unsigned i = 0; i < 100; i++) {
        tv_pool *pool = NULL;
        assert_ok(tv_pool_open(1 + i % 4, &err, &pool), &err);
        tv_pool_close(pool);
    }
    tv_pool_close(NULL);
}

static void test_refusals(void **state)
{
    (void)state;
    struct tv_error err;
    tv_pool *pool = (tv_pool *)&err;
    assert_code(tv_pool_open(0, &err, &pool), TV_E_USAGE, &err);
    assert_null(pool);
    assert_code(tv_pool_open(4000000000u, &err, &pool), TV_E_USAGE, &err);
    assert_code(tv_pool_open(0, NULL, &pool), TV_E_USAGE, NULL);
}

static enum tv_err work_open(void *arg, struct tv_error *err)
{
    tv_pool *pool = NULL;
    const enum tv_err rc = tv_pool_open(3, err, &pool);
    (void)arg;
    if (rc != TV_OK)
        assert_null(pool);
    tv_pool_close(pool);
    return rc;
}

static void test_open_faults(void **state)
{
    (void)state;
    assert_int_equal(faults_loop_alloc(work_open, NULL, false), 2);
}

struct signal_job {
    atomic_uint n_open[64]; /* workers that would take signal i */
    atomic_uint n_workers;
};

static void look_at_signals(void *arg, size_t item, unsigned worker)
{
    struct signal_job *j = arg;
    sigset_t set;
    (void)item;
    if (worker == 0)
        return;
    (void)sigemptyset(&set);
    (void)pthread_sigmask(SIG_SETMASK, NULL, &set);
    atomic_fetch_add(&j->n_workers, 1);
    for (int s = 1; s < 32; s++)
        if (sigismember(&set, s) == 0)
            atomic_fetch_add(&j->n_open[s], 1);
}

static void test_workers_leave_signals_to_the_caller(void **state)
{
    (void)state;
    struct tv_error err;
    tv_pool *pool = NULL;
    sigset_t before, after;
    static struct signal_job j;
    (void)sigemptyset(&before);
    (void)sigemptyset(&after);
    (void)pthread_sigmask(SIG_SETMASK, NULL, &before);
    assert_ok(tv_pool_open(3, &err, &pool), &err);
    (void)pthread_sigmask(SIG_SETMASK, NULL, &after);
    assert_int_equal(sigismember(&before, SIGINT), sigismember(&after, SIGINT));
    for (int i = 0; i < 10000 && atomic_load(&j.n_workers) == 0; i++)
        tv_pool_run(pool, 100, look_at_signals, &j);
    const unsigned n = atomic_load(&j.n_workers);
    assert_true(n > 0);
    assert_int_equal(atomic_load(&j.n_open[SIGINT]), 0);
    assert_int_equal(atomic_load(&j.n_open[SIGTERM]), 0);
    assert_int_equal(atomic_load(&j.n_open[SIGBUS]), n);
    assert_int_equal(atomic_load(&j.n_open[SIGSEGV]), n);
    tv_pool_close(pool);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_every_item_once),
        cmocka_unit_test(test_many_small_runs),
        cmocka_unit_test(test_open_and_close_without_work),
        cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_open_faults),
        cmocka_unit_test(test_workers_leave_signals_to_the_caller),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
