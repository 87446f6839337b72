/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cpu_count.c - how many cores we may use: affinity and the cgroup CPU quota.
 *
 * A container with a quota of two cores still shows every core of its host in
 * the affinity mask; threads beyond the quota only get throttled. The quota is
 * looked up along the whole path of our cgroup, since any ancestor may hold
 * the tightest one: cpu.max in cgroup v2, cpu.cfs_quota_us over
 * cpu.cfs_period_us in v1. Inside a container the path in /proc/self/cgroup
 * may be that of the host; then only the top directory exists and is read.
 * Whatever cannot be read does not limit.
 */
#include "tv/pool.h"

#include <errno.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/sys.h"

#define CGROUP_TOP     "/sys/fs/cgroup"
#define SMALL_FILE_MAX 65536u
#define CPUS_MAX       65536

static unsigned affinity_count(void)
{
    for (size_t n = 1024; n <= CPUS_MAX; n *= 2) {
        const size_t bytes = CPU_ALLOC_SIZE(n);
        cpu_set_t *set = tv_calloc(1, bytes);
        if (!set)
            return 1;
        const int r = sched_getaffinity(0, bytes, set);
        const int why = errno;
        const int count = r == 0 ? CPU_COUNT_S(bytes, set) : 0;
        tv_free(set);
        if (r == 0)
            return count < 1 ? 1 : (unsigned)count;
        if (why != EINVAL)
            break;
    }
    return 1;
}

/* ceil(quota / period), at least 1. */
static unsigned cores_of(long long quota, long long period)
{
    if (quota <= 0 || period <= 0)
        return UINT32_MAX;
    const long long n = quota / period + (quota % period != 0);
    return n > (long long)CPUS_MAX ? UINT32_MAX : (unsigned)n;
}

/* The one or two (second not NULL) numbers in dir/name; false when they are
 * not there, which "max" for "no limit" is, too. */
static bool read_numbers(const char *dir, const char *name, long long *first,
                         long long *second)
{
    bool good = false;
    char *text = NULL;
    size_t n = 0;
    char *path = tv_path_join(dir, name);
    if (path && tv_file_read(path, SMALL_FILE_MAX, NULL, &text, &n) == TV_OK) {
        char *end = text;
        *first = strtoll(text, &end, 10);
        good = end != text;
        if (good && second) {
            const char *from = end;
            *second = strtoll(from, &end, 10);
            good = end != from;
        }
    }
    tv_free(text);
    tv_free(path);
    return good;
}

static unsigned quota_in(const char *dir, bool v2)
{
    long long quota = 0;
    long long period = 0;
    if (v2)
        return read_numbers(dir, "cpu.max", &quota, &period)
                   ? cores_of(quota, period)
                   : UINT32_MAX;
    return read_numbers(dir, "cpu.cfs_quota_us", &quota, NULL) &&
                   read_numbers(dir, "cpu.cfs_period_us", &period, NULL)
               ? cores_of(quota, period)
               : UINT32_MAX;
}

/* The tightest quota from top + path up to top. */
static unsigned quota_along(const char *top, const char *path, bool v2)
{
    unsigned best = UINT32_MAX;
    char *dir = tv_asprintf("%s%s", top, path);
    if (!dir)
        return best;
    const size_t n_top = strlen(top);
    size_t n = strlen(dir);
    for (;;) {
        while (n > n_top && dir[n - 1] == '/')
            n--;
        dir[n] = '\0';
        const unsigned cores = quota_in(dir, v2);
        if (cores < best)
            best = cores;
        if (n <= n_top)
            break;
        while (n > n_top && dir[n - 1] != '/')
            n--;
    }
    tv_free(dir);
    return best;
}

/* Whether the comma-separated list has `word`. */
static bool list_has(const char *list, const char *word)
{
    const size_t n = strlen(word);
    for (const char *p = list;; p++) {
        const size_t m = strcspn(p, ",");
        if (m == n && strncmp(p, word, n) == 0)
            return true;
        p += m;
        if (*p == '\0')
            return false;
    }
}

/* One line of /proc/self/cgroup: "hierarchy:controllers:path". */
static unsigned quota_of_line(char *line)
{
    char *controllers = strchr(line, ':');
    char *path = controllers ? strchr(controllers + 1, ':') : NULL;
    if (!path)
        return UINT32_MAX;
    *path++ = '\0';
    controllers++;
    if (controllers[0] == '\0') {
        const unsigned plain = quota_along(CGROUP_TOP, path, true);
        /* Where v1 and v2 live side by side, v2 is mounted one level down. */
        const unsigned mixed = quota_along(CGROUP_TOP "/unified", path, true);
        return plain < mixed ? plain : mixed;
    }
    if (!list_has(controllers, "cpu"))
        return UINT32_MAX;
    char *top = tv_asprintf("%s/%s", CGROUP_TOP, controllers);
    if (!top)
        return UINT32_MAX;
    const unsigned joint = quota_along(top, path, false);
    const unsigned alone = quota_along(CGROUP_TOP "/cpu", path, false);
    tv_free(top);
    return joint < alone ? joint : alone;
}

static unsigned quota_count(void)
{
    unsigned best = UINT32_MAX;
    char *text = NULL;
    size_t n = 0;
    if (tv_file_read("/proc/self/cgroup", SMALL_FILE_MAX, NULL, &text, &n) !=
        TV_OK)
        return best;
    char *rest = NULL;
    for (char *line = strtok_r(text, "\n", &rest); line;
         line = strtok_r(NULL, "\n", &rest)) {
        const unsigned cores = quota_of_line(line);
        if (cores < best)
            best = cores;
    }
    tv_free(text);
    return best;
}

unsigned tv_cpu_count(void)
{
    const unsigned allowed = affinity_count();
    const unsigned paid = quota_count();
    return paid < allowed ? paid : allowed;
}
