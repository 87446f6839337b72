/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_cpu_count.c - cores under affinity and cgroup quotas. The cgroup files
 * are ours: the table of system calls sends /proc/self/cgroup and
 * /sys/fs/cgroup into a scratch directory.
 */
#include "test.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>

#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/pool.h"
#include "tv/sys.h"

static char *top;
static const struct tv_sys_table *real;

static int open_in_scratch(const char *path, int flags, mode_t mode)
{
    char moved[8192];
    if (strncmp(path, "/proc/", 6) != 0 && strncmp(path, "/sys/", 5) != 0)
        return real->open(path, flags, mode); /* our own scratch files */
    (void)snprintf(moved, sizeof moved, "%s%s", top, path);
    return real->open(moved, flags, mode);
}

static int set_up(void **state)
{
    static struct tv_sys_table table;
    (void)state;
    top = tmpdir_make();
    real = tv_sys();
    table = *real;
    table.open = open_in_scratch;
    tv_sys_replace(&table);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    tv_sys_replace(NULL);
    tmpdir_remove(top);
    return 0;
}

/* Writes one file of the scratch /proc or /sys. */
static void put(const char *path, const char *text)
{
    char dir[8192];
    (void)snprintf(dir, sizeof dir, "%s%s", top, path);
    *strrchr(dir, '/') = '\0';
    assert_ok(tv_dir_make(dir, NULL), NULL);
    tv_free(tmpdir_write(top, path + 1, text, strlen(text)));
}

static unsigned affinity(void)
{
    cpu_set_t set;
    assert_int_equal(sched_getaffinity(0, sizeof set, &set), 0);
    return (unsigned)CPU_COUNT(&set);
}

static void test_no_cgroup_no_limit(void **state)
{
    (void)state;
    assert_int_equal(tv_cpu_count(), affinity());
    put("/proc/self/cgroup", "0::/\n");
    assert_int_equal(tv_cpu_count(), affinity());
    put("/proc/self/cgroup", "nonsense\n\n:\n::\n5:cpu\n");
    assert_int_equal(tv_cpu_count(), affinity());
    put("/proc/self/cgroup", "");
    assert_int_equal(tv_cpu_count(), affinity());
}

static void test_affinity_counts(void **state)
{
    (void)state;
    cpu_set_t before, one;
    assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
    CPU_ZERO(&one);
    for (size_t i = 0; i < CPU_SETSIZE; i++) {
        if (CPU_ISSET(i, &before)) {
            CPU_SET(i, &one);
            break;
        }
    }
    assert_int_equal(sched_setaffinity(0, sizeof one, &one), 0);
    const unsigned n = tv_cpu_count();
    assert_int_equal(sched_setaffinity(0, sizeof before, &before), 0);
    assert_int_equal(n, 1);
}

static void test_v2_quota(void **state)
{
    (void)state;
    put("/proc/self/cgroup", "0::/a/b\n");
    put("/sys/fs/cgroup/a/b/cpu.max", "max 100000\n");
    assert_int_equal(tv_cpu_count(), affinity());
    put("/sys/fs/cgroup/a/b/cpu.max", "100000 100000\n");
    assert_int_equal(tv_cpu_count(), 1);
    put("/sys/fs/cgroup/a/b/cpu.max", "50000 100000\n");
    assert_int_equal(tv_cpu_count(), 1);
    put("/sys/fs/cgroup/a/b/cpu.max", "900000000 100000\n");
    assert_int_equal(tv_cpu_count(), affinity());
    /* Broken contents limit nothing. */
    put("/sys/fs/cgroup/a/b/cpu.max", "5\n");
    assert_int_equal(tv_cpu_count(), affinity());
    put("/sys/fs/cgroup/a/b/cpu.max", "-5 100\n");
    assert_int_equal(tv_cpu_count(), affinity());
    put("/sys/fs/cgroup/a/b/cpu.max", "5 0\n");
    assert_int_equal(tv_cpu_count(), affinity());
    /* An ancestor may be tighter. */
    put("/sys/fs/cgroup/a/cpu.max", "100000 100000\n");
    assert_int_equal(tv_cpu_count(), 1);
}

static void test_round_up(void **state)
{
    (void)state;
    if (affinity() < 2)
        skip();
    put("/proc/self/cgroup", "0::/\n");
    put("/sys/fs/cgroup/cpu.max", "150000 100000\n");
    assert_int_equal(tv_cpu_count(), 2);
}

static void test_v2_path_of_the_host(void **state)
{
    (void)state;
    put("/proc/self/cgroup", "0::/docker/0123/not/here\n");
    put("/sys/fs/cgroup/cpu.max", "10000 100000\n");
    assert_int_equal(tv_cpu_count(), 1);
}

static void test_v1_quota(void **state)
{
    (void)state;
    put("/proc/self/cgroup",
        "12:memory:/m\n3:cpu,cpuacct:/job\n1:name=systemd:/x\n");
    put("/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "-1\n");
    put("/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us", "100000\n");
    assert_int_equal(tv_cpu_count(), affinity());
    put("/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us", "100000\n");
    assert_int_equal(tv_cpu_count(), 1);

    put("/proc/self/cgroup", "3:cpuset:/job\n4:cpuacct:/job\n");
    put("/sys/fs/cgroup/cpuset/job/cpu.cfs_quota_us", "100000\n");
    put("/sys/fs/cgroup/cpuset/job/cpu.cfs_period_us", "100000\n");
    assert_int_equal(tv_cpu_count(), affinity());
    put("/proc/self/cgroup", "3:cpuacct,cpu:/job\n");
    put("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "1000\n");
    put("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n");
    assert_int_equal(tv_cpu_count(), 1);
}

static void test_memory_faults_do_no_harm(void **state)
{
    (void)state;
    put("/proc/self/cgroup", "3:cpu,cpuacct:/job\n0::/a\n");
    const uint64_t heap = test_heap_bytes();
    for (uint64_t n = 1;; n++) {
        tv_alloc_fail_at(n, 1);
        const unsigned count = tv_cpu_count();
        const bool fired = tv_alloc_fired() > 0;
        tv_alloc_fail_at(0, 0);
        assert_true(count >= 1 && count <= affinity());
        assert_true(test_heap_bytes() == heap);
        if (!fired)
            break;
    }
}

#define T(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_no_cgroup_no_limit),
        T(test_affinity_counts),
        T(test_v2_quota),
        T(test_round_up),
        T(test_v2_path_of_the_host),
        T(test_v1_quota),
        T(test_memory_faults_do_no_harm),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
