/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_sys.c - file helpers: content, refusals, faults at every call.
 */
#include "test.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "faults.h"
#include "rng.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/sys.h"

struct fixture {
    char *dir;
};

static int set_up(void **state)
{
    static struct fixture f;
    f.dir = tmpdir_make();
    *state = &f;
    return 0;
}

static int tear_down(void **state)
{
    struct fixture *f = *state;
    faults_sys_off();
    tmpdir_remove(f->dir);
    return 0;
}

/* dir/name, for short: one at a time. */
static const char *in(const struct fixture *f, const char *name)
{
    static char path[4096];
    assert_true(snprintf(path, sizeof path, "%s/%s", f->dir, name) <
                (int)sizeof path);
    return path;
}

static void put(const struct fixture *f, const char *name, const void *data,
                size_t n)
{
    tv_free(tmpdir_write(f->dir, name, data, n));
}

static void test_read_whole_file(void **state)
{
    const struct fixture *f = *state;
    struct tv_error err;
    struct rng r;
    static unsigned char want[300000];
    rng_open(&r, 1);
    rng_bytes(&r, want, sizeof want);
    static const size_t sizes[] = {0, 1, 4095, 4096, 4097, sizeof want};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (size_t at_most = 0; at_most < 8000; at_most += 7001) {
            char *data = NULL;
            size_t n = 99;
            put(f, "x", want, sizes[i]);
            faults_sys_arm(FAULT_ANY, 0, 0, 0);
            faults_sys_short(at_most);
            assert_ok(tv_file_read(in(f, "x"), sizes[i], &err, &data, &n),
                      &err);
            faults_sys_off();
            assert_int_equal(n, sizes[i]);
            assert_memory_equal(data, want, n);
            assert_int_equal(data[n], 0);
            tv_free(data);
        }
    }
    /* A file of the kernel says that it is empty. */
    char *data = NULL;
    size_t n = 0;
    assert_ok(tv_file_read("/proc/self/status", 1 << 20, &err, &data, &n),
              &err);
    assert_true(n > 100);
    tv_free(data);
    assert_code(tv_file_read("/proc/self/status", 50, &err, &data, &n),
                TV_E_CORRUPT, &err);
}

static void test_read_refuses(void **state)
{
    const struct fixture *f = *state;
    struct tv_error err;
    char *data = NULL;
    size_t n = 42;
    put(f, "x", "12345", 5);
    assert_code(tv_file_read(in(f, "x"), 4, &err, &data, &n), TV_E_CORRUPT,
                &err);
    assert_message(&err, "5 bytes");
    assert_code(tv_file_read(in(f, "none"), 4, &err, &data, &n), TV_E_INPUT,
                &err);
    assert_int_equal(err.sys_errno, ENOENT);
    assert_message(&err, "none");
    assert_code(tv_file_read(in(f, "x/y"), 4, &err, &data, &n), TV_E_INPUT,
                &err);
    assert_code(tv_file_read(f->dir, 4, &err, &data, &n), TV_E_INPUT, &err);
    /* Must not wait for somebody to write into it. */
    assert_int_equal(mkfifo(in(f, "fifo"), 0600), 0);
    assert_code(tv_file_read(in(f, "fifo"), 4, &err, &data, &n), TV_E_INPUT,
                &err);
    assert_code(tv_file_read(in(f, "none"), 4, NULL, &data, &n), TV_E_INPUT,
                NULL);
    assert_null(data);
    assert_int_equal(n, 42);
}

static enum tv_err work_read(void *arg, struct tv_error *err)
{
    char *data = NULL;
    size_t n = 0;
    const enum tv_err rc = tv_file_read(arg, 1 << 20, err, &data, &n);
    tv_free(data);
    return rc;
}

static void test_read_faults(void **state)
{
    const struct fixture *f = *state;
    put(f, "x", "12345", 5);
    char *path = tv_strdup(in(f, "x"));
    assert_true(faults_loop_alloc(work_read, path, false) >= 1);
    assert_int_equal(faults_loop_sys(work_read, path,
                                     FAULT_OPEN | FAULT_FSTAT | FAULT_PREAD,
                                     EIO, TV_E_IO, false),
                     4);
    /* Interrupted reads are repeated. */
    assert_true(
        faults_loop_sys(work_read, path, FAULT_PREAD, EINTR, TV_OK, true) >= 2);
    tv_free(path);
}

static void test_pwrite_all(void **state)
{
    const struct fixture *f = *state;
    struct tv_error err;
    unsigned char want[5000];
    struct rng r;
    rng_open(&r, 2);
    rng_bytes(&r, want, sizeof want);
    const int fd = open(in(f, "x"), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    assert_true(fd >= 0);

    faults_sys_arm(FAULT_PWRITE, 3, 4, EINTR);
    faults_sys_short(77);
    assert_ok(tv_pwrite_all(fd, want, sizeof want, 1000, "x", &err), &err);
    assert_int_equal(faults_sys_fired(), 4);
    faults_sys_off();
    unsigned char got[6001];
    assert_int_equal(pread(fd, got, sizeof got, 0), 6000);
    assert_memory_equal(got + 1000, want, sizeof want);

    assert_ok(tv_pwrite_all(fd, NULL, 0, 0, "x", &err), &err);
    faults_sys_arm(FAULT_PWRITE, 2, 1, ENOSPC);
    faults_sys_short(77);
    assert_code(tv_pwrite_all(fd, want, 100, 0, "the file", &err), TV_E_NOSPACE,
                &err);
    assert_message(&err, "the file");
    faults_sys_off();
    assert_code(tv_pwrite_all(fd, want, 100, UINT64_MAX - 10, "x", &err),
                TV_E_NOSPACE, &err);
    assert_int_equal(err.sys_errno, EFBIG);
    assert_code(tv_pwrite_all(fd, want, 100, (uint64_t)INT64_MAX, "x", &err),
                TV_E_NOSPACE, &err);
    (void)close(fd);
}

struct write_work {
    const char *path;
    bool do_sync;
};

static enum tv_err work_write(void *arg, struct tv_error *err)
{
    const struct write_work *w = arg;
    return tv_file_write_atomic(w->path, "new", 3, w->do_sync, err);
}

/* After any failure, the old or the new content is there, never anything
 * else, and no temporary file. */
static void check_old_or_new(const struct fixture *f)
{
    char *data = NULL;
    size_t n = 0;
    assert_ok(tv_file_read(in(f, "x"), 100, NULL, &data, &n), NULL);
    assert_true((n == 3 && memcmp(data, "new", 3) == 0) ||
                (n == 5 && memcmp(data, "older", 5) == 0));
    tv_free(data);
    assert_false(tv_path_exists(in(f, "x.tmp")));
}

static void test_write_atomic(void **state)
{
    const struct fixture *f = *state;
    struct tv_error err;
    char path[4096];
    (void)snprintf(path, sizeof path, "%s", in(f, "x"));
    struct write_work w = {path, true};

    assert_ok(tv_file_write_atomic(path, "older", 5, false, &err), &err);
    check_old_or_new(f);
    faults_sys_arm(FAULT_FSYNC, 0, 0, 0);
    assert_ok(work_write(&w, &err), &err);
    assert_int_equal(faults_sys_calls(), 2); /* the file, the directory */
    faults_sys_off();
    check_old_or_new(f);

    const unsigned each[] = {FAULT_OPEN, FAULT_PWRITE, FAULT_FSYNC, FAULT_CLOSE,
                             FAULT_RENAME};
    for (size_t i = 0; i < sizeof each / sizeof *each; i++) {
        put(f, "x", "older", 5);
        /* The second close is of the directory, and loses nothing. */
        assert_true(faults_loop_sys(work_write, &w, each[i], ENOSPC,
                                    TV_E_NOSPACE, each[i] == FAULT_CLOSE) > 0);
        check_old_or_new(f);
    }
    faults_sys_arm(FAULT_CLOSE, 1, 1, EIO);
    put(f, "x", "older", 5);
    assert_code(work_write(&w, &err), TV_E_IO, &err);
    faults_sys_off();
    check_old_or_new(f);
    assert_true(faults_loop_alloc(work_write, &w, false) >= 2);
    check_old_or_new(f);

    w.path = in(f, "none/x");
    assert_code(work_write(&w, &err), TV_E_INPUT, &err);
    /* A planted link in place of the temporary file is not written through. */
    put(f, "victim", "keep", 4);
    char victim[4096];
    (void)snprintf(victim, sizeof victim, "%s", in(f, "victim"));
    assert_int_equal(symlink(victim, in(f, "x.tmp")), 0);
    w.path = path;
    assert_int_not_equal(work_write(&w, &err), TV_OK);
    struct stat st;
    assert_int_equal(stat(victim, &st), 0);
    assert_int_equal(st.st_size, 4);
}

static void test_write_atomic_here(void **state)
{
    const struct fixture *f = *state;
    struct tv_error err;
    char here[4096];
    assert_non_null(getcwd(here, sizeof here));
    assert_int_equal(chdir(f->dir), 0);
    assert_ok(tv_file_write_atomic("plain", "a", 1, true, &err), &err);
    assert_true(tv_path_exists("plain"));
    assert_int_equal(chdir(here), 0);
}

static void test_dir_make(void **state)
{
    const struct fixture *f = *state;
    struct tv_error err;
    assert_ok(tv_dir_make(in(f, "a/b//c/"), &err), &err);
    assert_true(tv_path_is_dir(in(f, "a/b/c")));
    assert_ok(tv_dir_make(in(f, "a/b//c/"), &err), &err);
    assert_ok(tv_dir_make("/", &err), &err);
    put(f, "file", "", 0);
    assert_false(tv_path_is_dir(in(f, "file")));
    assert_code(tv_dir_make(in(f, "file"), &err), TV_E_INPUT, &err);
    assert_message(&err, "file");
    assert_code(tv_dir_make(in(f, "file/sub"), &err), TV_E_INPUT, &err);
    assert_code(tv_dir_make("", &err), TV_E_INPUT, &err);
    faults_sys_arm(FAULT_MKDIR, 1, UINT64_MAX, EROFS);
    assert_code(tv_dir_make(in(f, "new"), &err), TV_E_IO, &err);
    /* What exists does not care. */
    assert_ok(tv_dir_make(in(f, "a/b"), &err), &err);
    faults_sys_arm(FAULT_MKDIR, 1, UINT64_MAX, ENOSPC);
    assert_code(tv_dir_make(in(f, "new"), &err), TV_E_NOSPACE, &err);
    faults_sys_off();
    assert_code(tv_dir_sync(in(f, "none"), &err), TV_E_INPUT, &err);
    assert_ok(tv_dir_sync(f->dir, &err), &err);
    faults_sys_arm(FAULT_FSYNC, 1, 1, EIO);
    assert_code(tv_dir_sync(f->dir, &err), TV_E_IO, &err);
    faults_sys_arm(FAULT_FSYNC, 1, 1, EINVAL);
    assert_ok(tv_dir_sync(f->dir, &err), &err);
}

static enum tv_err work_list(void *arg, struct tv_error *err)
{
    char **names = NULL;
    size_t n = 0;
    const enum tv_err rc = tv_dir_list(arg, err, &names, &n);
    tv_dir_list_free(names, n);
    return rc;
}

static void test_dir_list(void **state)
{
    const struct fixture *f = *state;
    struct tv_error err;
    char **names = NULL;
    size_t n = 5;
    assert_ok(tv_dir_list(f->dir, &err, &names, &n), &err);
    assert_int_equal(n, 0);
    tv_dir_list_free(names, n);
    for (int i = 99; i >= 0; i--) {
        char name[16];
        (void)snprintf(name, sizeof name, "f%02d", i);
        put(f, name, "", 0);
    }
    put(f, ".hidden", "", 0);
    assert_ok(tv_dir_list(f->dir, &err, &names, &n), &err);
    assert_int_equal(n, 101);
    assert_string_equal(names[0], ".hidden");
    for (size_t i = 1; i < n; i++)
        assert_true(strcmp(names[i - 1], names[i]) < 0);
    tv_dir_list_free(names, n);
    assert_code(tv_dir_list(in(f, "none"), &err, &names, &n), TV_E_INPUT, &err);
    assert_code(tv_dir_list(in(f, "f00"), &err, &names, &n), TV_E_INPUT, &err);
    assert_true(faults_loop_alloc(work_list, f->dir, false) > 101);
    assert_int_equal(
        faults_loop_sys(work_list, f->dir, FAULT_OPEN, EMFILE, TV_E_IO, false),
        1);
    tv_dir_list_free(NULL, 0);
}

static void test_dir_remove(void **state)
{
    const struct fixture *f = *state;
    struct tv_error err;
    char outside[4096];
    assert_ok(tv_dir_make(in(f, "outside"), &err), &err);
    put(f, "outside/keep", "k", 1);
    (void)snprintf(outside, sizeof outside, "%s", in(f, "outside"));

    assert_ok(tv_dir_make(in(f, "gone/sub/deep"), &err), &err);
    put(f, "gone/a", "a", 1);
    put(f, "gone/sub/deep/b", "b", 1);
    assert_int_equal(symlink(outside, in(f, "gone/link_dir")), 0);
    assert_int_equal(symlink("nowhere", in(f, "gone/sub/dangling")), 0);
    assert_int_equal(mkfifo(in(f, "gone/fifo"), 0600), 0);
    assert_int_equal(symlink(outside, in(f, "link")), 0);

    /* The directory itself must not be a link, or a file. */
    assert_code(tv_dir_remove(in(f, "link"), &err), TV_E_INPUT, &err);
    assert_code(tv_dir_remove(in(f, "outside/keep"), &err), TV_E_INPUT, &err);
    assert_true(tv_path_exists(in(f, "outside/keep")));

    /* Each removal that fails is reported; the rest can be done later. */
    faults_sys_arm(FAULT_UNLINK, 1, 1, EACCES);
    assert_code(tv_dir_remove(in(f, "gone"), &err), TV_E_IO, &err);
    faults_sys_arm(FAULT_RMDIR, 2, 1, EBUSY);
    assert_code(tv_dir_remove(in(f, "gone"), &err), TV_E_IO, &err);
    faults_sys_arm(FAULT_OPEN, 2, 1, EACCES);
    assert_code(tv_dir_remove(in(f, "gone"), &err), TV_E_IO, &err);
    faults_sys_off();
    assert_true(tv_path_is_dir(in(f, "gone")));
    assert_ok(tv_dir_remove(in(f, "gone"), &err), &err);
    assert_false(tv_path_exists(in(f, "gone")));
    assert_true(tv_path_exists(in(f, "outside/keep")));
    assert_ok(tv_dir_remove(in(f, "gone"), &err), &err);
}

static enum tv_err work_remove(void *arg, struct tv_error *err)
{
    const struct fixture *f = arg;
    struct stat st;
    if (stat(in(f, "t"), &st) != 0) {
        assert_int_equal(mkdir(in(f, "t"), 0700), 0);
        assert_int_equal(mkdir(in(f, "t/u"), 0700), 0);
        assert_int_equal(mkdir(in(f, "t/u/v"), 0700), 0);
    }
    return tv_dir_remove(in(f, "t"), err);
}

static void test_dir_remove_faults(void **state)
{
    const struct fixture *f = *state;
    assert_true(faults_loop_alloc(work_remove, (void *)(uintptr_t)f, false) >
                5);
    assert_true(faults_loop_sys(work_remove, (void *)(uintptr_t)f, FAULT_RMDIR,
                                EBUSY, TV_E_IO, false) >= 1);
}

static void test_path_join(void **state)
{
    (void)state;
    static const char *const cases[][3] = {
        {"a", "b", "a/b"},
        {"a/", "b", "a/b"},
        {"/", "b", "/b"},
        {"", "b", "b"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char *p = tv_path_join(cases[i][0], cases[i][1]);
        assert_string_equal(p, cases[i][2]);
        tv_free(p);
    }
    tv_alloc_fail_at(1, 1);
    assert_null(tv_path_join("a", "b"));
    tv_alloc_fail_at(0, 0);
}

static void test_disk_space(void **state)
{
    const struct fixture *f = *state;
    struct tv_error err;
    uint64_t n = 5;
    assert_ok(tv_disk_used(in(f, "none"), &n, &err), &err);
    assert_int_equal(n, 0);
    assert_ok(tv_dir_make(in(f, "d/e"), &err), &err);
    uint64_t before = 0;
    assert_ok(tv_disk_used(in(f, "d"), &before, &err), &err);
    static char data[300000];
    memset(data, 1, sizeof data);
    put(f, "d/e/x", data, sizeof data);
    assert_ok(tv_disk_used(in(f, "d"), &n, &err), &err);
    assert_true(n >= before + sizeof data);
    /* A hole takes no room; what a link points to is not ours. */
    const uint64_t full = n;
    assert_int_equal(truncate(in(f, "d/e/x"), 1 << 30), 0);
    assert_int_equal(symlink("/usr", in(f, "d/link")), 0);
    assert_ok(tv_disk_used(in(f, "d"), &n, &err), &err);
    assert_true(n >= full && n < full + 100000);

    assert_ok(tv_disk_free(f->dir, &n, &err), &err);
    assert_true(n > 0);
    assert_code(tv_disk_free(in(f, "none"), &n, &err), TV_E_INPUT, &err);
}

static enum tv_err work_used(void *arg, struct tv_error *err)
{
    uint64_t n = 0;
    return tv_disk_used(arg, &n, err);
}

static void test_disk_used_faults(void **state)
{
    const struct fixture *f = *state;
    struct tv_error err;
    assert_ok(tv_dir_make(in(f, "a/b"), &err), &err);
    put(f, "a/x", "x", 1);
    assert_true(faults_loop_alloc(work_used, f->dir, false) > 3);
}

static void test_open_is_close_on_exec(void **state)
{
    (void)state;
    const int fd = tv_sys()->open("/", O_RDONLY | O_DIRECTORY, 0);
    assert_true(fd >= 0);
    assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    assert_int_equal(tv_sys()->close(fd), 0);
}

#define T(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_read_whole_file),  T(test_read_refuses),
        T(test_read_faults),      T(test_pwrite_all),
        T(test_write_atomic),     T(test_write_atomic_here),
        T(test_dir_make),         T(test_dir_list),
        T(test_dir_remove),       T(test_dir_remove_faults),
        T(test_path_join),        T(test_disk_space),
        T(test_disk_used_faults), T(test_open_is_close_on_exec),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
