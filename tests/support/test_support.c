/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_support.c - the test helpers themselves: a comparer that cannot fail
 * would make every test above it worthless.
 */
#include "test.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <signal.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faults.h"
#include "guard_buffer.h"
#include "rng.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "ulp.h"

static void test_ulp_distances(void **state)
{
    (void)state;
    const float one = 1.0f;
    assert_int_equal(ulp_f32(one, one), 0);
    assert_int_equal(ulp_f32(one, nextafterf(one, 2.0f)), 1);
    assert_int_equal(ulp_f32(0.0f, -0.0f), 0);
    assert_int_equal(ulp_f32(nextafterf(0.0f, 1.0f), nextafterf(0.0f, -1.0f)),
                     2);
    assert_int_equal(ulp_f32(INFINITY, 3.40282347e38f), 1);
    assert_true(ulp_f32(NAN, 1.0f) == ULP_FAR);
    assert_int_equal(ulp_f32(NAN, -NAN), 0);
    assert_int_equal(ulp_bf16(0x3f80, 0x3f82), 2);
    assert_int_equal(ulp_bf16(0x8001, 0x0001), 2);
    assert_true(ulp_bf16(0x7f81, 0x3f80) == ULP_FAR);
    assert_int_equal(ulp_f16(0x7c00, 0x7bff), 1);
    assert_true(ulp_f16(0x7c01, 0x7c00) == ULP_FAR);
}

/* Runs body in a child and returns its wait status. */
static int in_child(void (*body)(void *arg), void *arg)
{
    const pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        /* A fault is what we wait for: no report of it, please. */
        (void)signal(SIGSEGV, SIG_DFL);
        (void)signal(SIGBUS, SIG_DFL);
        body(arg);
        _exit(0);
    }
    int status = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    return status;
}

static void read_byte(void *arg)
{
    const volatile unsigned char *p = arg;
    (void)*p;
}

static void test_guard_pages_fault(void **state)
{
    (void)state;
    struct guard_buffer g;
    guard_buffer_open(&g, 10000);
    for (size_t n = 0; n < 200; n += 7) {
        unsigned char *p = guard_buffer_place(&g, n, GUARD_AFTER, 0);
        if (n > 0)
            memset(p, 1, n);
        guard_buffer_check(&g);
        if (n % 49 == 0) {
            assert_int_equal(in_child(read_byte, p - 1), 0);
            assert_int_not_equal(in_child(read_byte, p + n), 0);
        }
        p = guard_buffer_place(&g, n, GUARD_BEFORE, 0);
        if (n > 0)
            memset(p, 1, n);
        guard_buffer_check(&g);
        if (n % 49 == 0) {
            assert_int_equal(in_child(read_byte, p + n), 0);
            assert_int_not_equal(in_child(read_byte, p - 1), 0);
        }
    }
    unsigned char *p = guard_buffer_place(&g, 100, GUARD_BEFORE, 3);
    assert_int_equal((uintptr_t)p % 64, 3);
    p = guard_buffer_place(&g, 100, GUARD_AFTER, 28);
    assert_int_equal((uintptr_t)p % 64, 0);
    guard_buffer_close(&g);
    guard_buffer_close(&g);
}

static void test_random_is_repeatable(void **state)
{
    (void)state;
    struct rng a, b, c;
    rng_open(&a, 1);
    rng_open(&b, 1);
    rng_open(&c, 2);
    unsigned same = 0;
    for (int i = 0; i < 100; i++) {
        const uint64_t x = rng_u64(&a);
        assert_true(x == rng_u64(&b));
        same += x == rng_u64(&c);
    }
    assert_int_equal(same, 0);
    double sum = 0;
    double squares = 0;
    for (int i = 0; i < 20000; i++) {
        assert_true(rng_below(&a, 7) < 7);
        const float u = rng_unit(&a);
        assert_true(u >= -1.0f && u < 1.0f);
        const double v = (double)rng_normal(&a);
        sum += v;
        squares += v * v;
    }
    assert_true(fabs(sum / 20000) < 0.05);
    assert_true(fabs(squares / 20000 - 1) < 0.05);
}

static void test_tmpdir_goes_away(void **state)
{
    (void)state;
    char *dir = tmpdir_make();
    char *file = tmpdir_write(dir, "x", "abc", 3);
    char *copy = tv_strdup(dir);
    struct stat st;
    assert_int_equal(stat(file, &st), 0);
    assert_int_equal(st.st_size, 3);
    tmpdir_remove(dir);
    assert_int_not_equal(stat(copy, &st), 0);
    tv_free(file);
    tv_free(copy);
}

static enum tv_err two_steps(void *arg, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *a = tv_strdup("a");
    char *b = tv_strdup("b");
    size_t *const n_runs = arg;
    ++*n_runs;
    if (!a || !b)
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
    tv_free(a);
    tv_free(b);
    return rc;
}

static void test_alloc_loop_hits_each_step(void **state)
{
    (void)state;
    size_t n_runs = 0;
    assert_int_equal(faults_loop_alloc(two_steps, &n_runs, false), 2);
    assert_int_equal(n_runs, 3);
    assert_int_equal(tv_alloc_fired(), 0);
}

static void test_sys_table_fails_and_counts(void **state)
{
    (void)state;
    struct stat st;
    faults_sys_arm(FAULT_STAT, 2, 2, EACCES);
    assert_int_equal(tv_sys()->stat("/", &st), 0);
    errno = 0;
    assert_int_equal(tv_sys()->stat("/", &st), -1);
    assert_int_equal(errno, EACCES);
    assert_int_equal(tv_sys()->stat("/", &st), -1);
    assert_int_equal(tv_sys()->stat("/", &st), 0);
    const int fd = tv_sys()->open("/", O_RDONLY | O_DIRECTORY, 0);
    assert_true(fd >= 0);
    assert_int_equal(tv_sys()->close(fd), 0);
    assert_int_equal(faults_sys_calls(), 4);
    assert_int_equal(faults_sys_fired(), 2);
    faults_sys_off();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ulp_distances),
        cmocka_unit_test(test_guard_pages_fault),
        cmocka_unit_test(test_random_is_repeatable),
        cmocka_unit_test(test_tmpdir_goes_away),
        cmocka_unit_test(test_alloc_loop_hits_each_step),
        cmocka_unit_test(test_sys_table_fails_and_counts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
