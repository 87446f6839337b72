/* SPDX-License-Identifier: Apache-2.0 */
/*
 * faults.c - a table of system calls that fails on demand, and the loops.
 */
#include "faults.h"

#include <errno.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <sys/mman.h>

#include "test.h"
#include "tv/alloc.h"
#include "tv/sys.h"

/* More steps than any sensible piece of work needs. */
#define STEPS_MAX 100000u

static struct {
    const struct tv_sys_table *real;
    unsigned mask;
    uint64_t from, until; /* numbers of the failing calls */
    int sys_errno;
    size_t short_bytes;
} plan;
static atomic_uint_fast64_t n_calls;
static atomic_uint_fast64_t n_fired;

static bool fails(enum fault_call call)
{
    if (!(plan.mask & (unsigned)call))
        return false;
    const uint64_t number = atomic_fetch_add(&n_calls, 1) + 1;
    if (number < plan.from || number >= plan.until)
        return false;
    atomic_fetch_add(&n_fired, 1);
    errno = plan.sys_errno;
    return true;
}

static size_t shortened(size_t n)
{
    return plan.short_bytes && n > plan.short_bytes ? plan.short_bytes : n;
}

static int f_open(const char *path, int flags, mode_t mode)
{
    return fails(FAULT_OPEN) ? -1 : plan.real->open(path, flags, mode);
}

static int f_close(int fd)
{
    const int r = plan.real->close(fd);
    return fails(FAULT_CLOSE) ? -1 : r;
}

static ssize_t f_pread(int fd, void *buf, size_t n, off_t off)
{
    return fails(FAULT_PREAD) ? -1
                              : plan.real->pread(fd, buf, shortened(n), off);
}

static ssize_t f_pwrite(int fd, const void *buf, size_t n, off_t off)
{
    return fails(FAULT_PWRITE) ? -1
                               : plan.real->pwrite(fd, buf, shortened(n), off);
}

static int f_fstat(int fd, struct stat *st)
{
    return fails(FAULT_FSTAT) ? -1 : plan.real->fstat(fd, st);
}

static int f_stat(const char *path, struct stat *st)
{
    return fails(FAULT_STAT) ? -1 : plan.real->stat(path, st);
}

static int f_lstat(const char *path, struct stat *st)
{
    return fails(FAULT_STAT) ? -1 : plan.real->lstat(path, st);
}

static int f_ftruncate(int fd, off_t n)
{
    return fails(FAULT_FTRUNCATE) ? -1 : plan.real->ftruncate(fd, n);
}

static int f_fallocate(int fd, int mode, off_t off, off_t n)
{
    return fails(FAULT_FALLOCATE) ? -1 : plan.real->fallocate(fd, mode, off, n);
}

static int f_fsync(int fd)
{
    return fails(FAULT_FSYNC) ? -1 : plan.real->fsync(fd);
}

static int f_fdatasync(int fd)
{
    return fails(FAULT_FDATASYNC) ? -1 : plan.real->fdatasync(fd);
}

static int f_sync_file_range(int fd, off_t off, off_t n, unsigned flags)
{
    return fails(FAULT_SYNC_FILE_RANGE)
               ? -1
               : plan.real->sync_file_range(fd, off, n, flags);
}

static int f_rename(const char *from, const char *to)
{
    return fails(FAULT_RENAME) ? -1 : plan.real->rename(from, to);
}

static int f_unlink(const char *path)
{
    return fails(FAULT_UNLINK) ? -1 : plan.real->unlink(path);
}

static int f_mkdir(const char *path, mode_t mode)
{
    return fails(FAULT_MKDIR) ? -1 : plan.real->mkdir(path, mode);
}

static int f_rmdir(const char *path)
{
    return fails(FAULT_RMDIR) ? -1 : plan.real->rmdir(path);
}

static void *f_mmap(void *at, size_t n, int prot, int flags, int fd, off_t off)
{
    return fails(FAULT_MMAP) ? MAP_FAILED
                             : plan.real->mmap(at, n, prot, flags, fd, off);
}

static int f_munmap(void *at, size_t n)
{
    const int r = plan.real->munmap(at, n);
    return fails(FAULT_MUNMAP) ? -1 : r;
}

static const struct tv_sys_table failing_table = {
    .open = f_open,
    .close = f_close,
    .pread = f_pread,
    .pwrite = f_pwrite,
    .fstat = f_fstat,
    .stat = f_stat,
    .lstat = f_lstat,
    .ftruncate = f_ftruncate,
    .fallocate = f_fallocate,
    .fsync = f_fsync,
    .fdatasync = f_fdatasync,
    .sync_file_range = f_sync_file_range,
    .rename = f_rename,
    .unlink = f_unlink,
    .mkdir = f_mkdir,
    .rmdir = f_rmdir,
    .mmap = f_mmap,
    .munmap = f_munmap,
};

void faults_sys_arm(unsigned mask, uint64_t n, uint64_t repeat, int sys_errno)
{
    tv_sys_replace(NULL);
    plan.real = tv_sys();
    plan.mask = mask;
    plan.from = n == 0 ? UINT64_MAX : n;
    plan.until = n == 0 || repeat > UINT64_MAX - n ? UINT64_MAX : n + repeat;
    plan.sys_errno = sys_errno;
    atomic_store(&n_calls, 0);
    atomic_store(&n_fired, 0);
    tv_sys_replace(&failing_table);
}

void faults_sys_off(void)
{
    tv_sys_replace(NULL);
    plan.short_bytes = 0;
}

uint64_t faults_sys_calls(void)
{
    return atomic_load(&n_calls);
}

uint64_t faults_sys_fired(void)
{
    return atomic_load(&n_fired);
}

void faults_sys_short(size_t max_bytes)
{
    plan.short_bytes = max_bytes;
}

/* One step's verdict; the fault is off already. */
static void check_step(const char *kind, uint64_t step, bool fired,
                       enum tv_err rc, enum tv_err want, bool may_succeed,
                       const struct tv_error *err, uint64_t heap, unsigned fds)
{
    if (test_heap_bytes() != heap)
        fail_msg("%s fault %" PRIu64 " (%s) left %" PRId64 " bytes of heap",
                 kind, step, tv_err_name(rc),
                 (int64_t)(test_heap_bytes() - heap));
    if (test_open_fds() != fds)
        fail_msg("%s fault %" PRIu64 " (%s) left %d open files", kind, step,
                 tv_err_name(rc), (int)test_open_fds() - (int)fds);
    if (!fired) {
        if (rc != TV_OK)
            fail_msg("fails without a fault: %s: %s", tv_err_name(rc),
                     err->msg);
        return;
    }
    if (rc == TV_OK && may_succeed)
        return;
    if (rc != want)
        fail_msg("%s fault %" PRIu64 " gave %s, expected %s: %s", kind, step,
                 tv_err_name(rc), tv_err_name(want), err->msg);
    if (err->code != rc || err->msg[0] == '\0')
        fail_msg("%s fault %" PRIu64 " returned %s, but the error says %s, "
                 "'%s'",
                 kind, step, tv_err_name(rc), tv_err_name(err->code), err->msg);
}

uint64_t faults_loop_alloc(fault_work work, void *arg, bool may_succeed)
{
    for (uint64_t step = 1; step < STEPS_MAX; step++) {
        struct tv_error err;
        tv_error_clear(&err);
        const uint64_t heap = test_heap_bytes();
        const unsigned fds = test_open_fds();
        tv_alloc_fail_at(step, 1);
        const enum tv_err rc = work(arg, &err);
        const bool fired = tv_alloc_fired() > 0;
        tv_alloc_fail_at(0, 0);
        check_step("allocation", step, fired, rc, TV_E_NOMEM, may_succeed, &err,
                   heap, fds);
        if (!fired)
            return step - 1;
    }
    fail_msg("still faults after %u steps", STEPS_MAX);
    return 0;
}

uint64_t faults_loop_sys(fault_work work, void *arg, unsigned mask,
                         int sys_errno, enum tv_err want, bool may_succeed)
{
    for (uint64_t step = 1; step < STEPS_MAX; step++) {
        struct tv_error err;
        tv_error_clear(&err);
        const uint64_t heap = test_heap_bytes();
        const unsigned fds = test_open_fds();
        faults_sys_arm(mask, step, 1, sys_errno);
        const enum tv_err rc = work(arg, &err);
        const bool fired = faults_sys_fired() > 0;
        faults_sys_off();
        check_step("system call", step, fired, rc, want, may_succeed, &err,
                   heap, fds);
        if (!fired)
            return step - 1;
    }
    fail_msg("still faults after %u steps", STEPS_MAX);
    return 0;
}
