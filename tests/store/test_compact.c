/* SPDX-License-Identifier: Apache-2.0 */
/* test_compact.c - smaller, the same, alone, and safe from kill -9. */
#include "store_fixture.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lmdb_seam.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/sys.h"

/* Two objects, of which one goes: about half of the file is free. */
static void half_empty(struct fx *f)
{
    assert_ok(fx_object(f->s, "gone", 5, 3000, &f->err), &f->err);
    assert_ok(fx_object(f->s, "here", 9, 3000, &f->err), &f->err);
    assert_ok(fx_remove(f->s, "gone", &f->err), &f->err);
}

static void check_here(struct fx *f)
{
    fx_open(f, NULL);
    assert_ok(fx_object_compare(f->s, "here", 9, &f->err), &f->err);
    fx_verify(f);
}

/* Nothing but what belongs into a store. */
static void check_tidy(const char *path)
{
    struct tv_error err;
    char **names = NULL;
    size_t n = 0;
    assert_ok(tv_dir_list(path, &err, &names, &n), &err);
    for (size_t i = 0; i < n; i++)
        assert_true(strcmp(names[i], "data.mdb") == 0 ||
                    strcmp(names[i], "lock.mdb") == 0 ||
                    strcmp(names[i], "open.lock") == 0 ||
                    strcmp(names[i], "writer.lock") == 0);
    tv_dir_list_free(names, n);
}

static void free_pages_go(void **state)
{
    struct fx *f = (struct fx *)*state;
    char *scratch = tv_path_join(f->dir, "scratch");
    assert_ok(tv_dir_make(scratch, &f->err), &f->err);
    for (int way = 0; way < 2; way++) {
        struct tv_compact r;
        half_empty(f);
        fx_close(f);
        assert_ok(tv_store_compact(f->path, way == 0 ? NULL : scratch, 100, &r,
                                   &f->err),
                  &f->err);
        assert_true(r.before_bytes > r.after_bytes + 300000);
        check_tidy(f->path);
        check_here(f);
        assert_ok(fx_object(f->s, "new", 77, 100, &f->err), &f->err);
        assert_ok(fx_object_compare(f->s, "new", 77, &f->err), &f->err);
        assert_ok(fx_remove(f->s, "new", &f->err), &f->err);
        assert_ok(fx_remove(f->s, "here", &f->err), &f->err);
    }
    char **names = NULL;
    size_t n = 0;
    assert_ok(tv_dir_list(scratch, &f->err, &names, &n), &f->err);
    assert_int_equal(n, 0);
    tv_dir_list_free(names, n);
    tv_free(scratch);
}

/* Of a store that was made where there was no limit. */
static void works_in_a_limited_address_space(void **state)
{
    struct fx *f = (struct fx *)*state;
    if (TEST_SANITIZED)
        skip(); /* sanitizers need more address space than the limit */
    half_empty(f);
    fx_close(f);
    const pid_t pid = fork();
    if (pid == 0) {
        const struct rlimit lim = {(rlim_t)1 << 31, (rlim_t)1 << 31};
        struct tv_compact r;
        _exit(setrlimit(RLIMIT_AS, &lim) == 0 &&
                      tv_store_compact(f->path, NULL, 100, &r, NULL) == TV_OK
                  ? 0
                  : 1);
    }
    int status = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_int_equal(status, 0);
    check_here(f);
}

static void nobody_else_may_have_it_open(void **state)
{
    struct fx *f = (struct fx *)*state;
    struct tv_compact r;
    int up[2], down[2];
    char byte = 0;
    half_empty(f);
    fx_close(f);
    assert_int_equal(pipe(up), 0);
    assert_int_equal(pipe(down), 0);
    const pid_t pid = fork();
    if (pid == 0) {
        tv_store *s = NULL;
        const struct tv_store_options ro = {.read_only = true};
        if (tv_store_open(f->path, &ro, NULL, &s) != TV_OK ||
            write(up[1], "o", 1) != 1)
            _exit(1);
        (void)!read(down[0], &byte, 1);
        _exit(0); /* without closing it: like a crash */
    }
    assert_int_equal(read(up[0], &byte, 1), 1);
    assert_code(tv_store_compact(f->path, NULL, 100, &r, &f->err), TV_E_LOCKED,
                &f->err);
    assert_message(&f->err, "open in another process");
    assert_int_equal(write(down[1], "x", 1), 1);
    assert_int_equal(waitpid(pid, NULL, 0), pid);
    assert_ok(tv_store_compact(f->path, NULL, 100, &r, &f->err), &f->err);
    check_here(f);
    /* This handle counts too. */
    assert_code(tv_store_compact(f->path, NULL, 100, &r, &f->err), TV_E_LOCKED,
                &f->err);
    for (int i = 0; i < 2; i++) {
        (void)close(up[i]);
        (void)close(down[i]);
    }
}

static void quota_counts_the_copy(void **state)
{
    struct fx *f = (struct fx *)*state;
    struct tv_compact r;
    uint64_t used = 0;
    char *scratch = tv_path_join(f->dir, "scratch");
    assert_ok(tv_dir_make(scratch, &f->err), &f->err);
    half_empty(f);
    assert_ok(tv_disk_used(f->path, &used, &f->err), &f->err);
    assert_ok(tv_store_quota_set(f->s, used + 300000, &f->err), &f->err);
    fx_close(f);
    assert_code(tv_store_compact(f->path, NULL, 100, &r, &f->err), TV_E_NOSPACE,
                &f->err);
    assert_message(&f->err, "missing");
    assert_non_null(strstr(f->err.hint, "--scratch"));
    assert_non_null(strstr(f->err.hint, "raise the quota"));
    check_tidy(f->path);
    assert_code(tv_store_compact(f->path, f->path, 100, &r, &f->err),
                TV_E_USAGE, &f->err);
    assert_ok(tv_store_compact(f->path, scratch, 100, &r, &f->err), &f->err);
    assert_true(r.after_bytes <= used);
    check_here(f);
    tv_free(scratch);
}

/* ---- kill ------------------------------------------------------------------
 * The child dies right before, or right after, system call k of those that
 * change something. */
static unsigned countdown;
static bool die_after;

static void before_call(void)
{
    if (countdown == 1 && !die_after)
        _exit(42);
}

static void after_call(void)
{
    if (countdown == 1)
        _exit(42);
    if (countdown > 0)
        countdown--;
}

static const struct tv_sys_table *real_sys;

static int k_open(const char *path, int flags, mode_t mode)
{
    before_call();
    const int r = real_sys->open(path, flags, mode);
    after_call();
    return r;
}

static ssize_t k_pwrite(int fd, const void *buf, size_t n, off_t off)
{
    before_call();
    const ssize_t r = real_sys->pwrite(fd, buf, n, off);
    after_call();
    return r;
}

static int k_fsync(int fd)
{
    before_call();
    const int r = real_sys->fsync(fd);
    after_call();
    return r;
}

static int k_rename(const char *from, const char *to)
{
    before_call();
    const int r = real_sys->rename(from, to);
    after_call();
    return r;
}

static int k_unlink(const char *path)
{
    before_call();
    const int r = real_sys->unlink(path);
    after_call();
    return r;
}

static int dying_copy(MDB_env *env, mdb_filehandle_t fd, unsigned flags)
{
    before_call();
    const int r = mdb_env_copyfd2(env, fd, flags);
    after_call();
    return r;
}

static void compact_and_die(struct fx *f, const char *scratch, unsigned k,
                            bool after)
{
    struct tv_sys_table sys = *tv_sys();
    struct tv_lmdb_table lmdb = *tv_lmdb();
    struct tv_compact r;
    real_sys = tv_sys();
    countdown = k;
    die_after = after;
    sys.open = k_open;
    sys.pwrite = k_pwrite;
    sys.fsync = k_fsync;
    sys.rename = k_rename;
    sys.unlink = k_unlink;
    lmdb.env_copyfd2 = dying_copy;
    tv_sys_replace(&sys);
    tv_lmdb_replace(&lmdb);
    _exit(tv_store_compact(f->path, scratch, 1000, &r, NULL) == TV_OK ? 0 : 1);
}

static void killed_anywhere(void **state)
{
    struct fx *f = (struct fx *)*state;
    char *scratch = tv_path_join(f->dir, "scratch");
    unsigned n_kills = 0;
    assert_ok(tv_dir_make(scratch, &f->err), &f->err);
    half_empty(f);
    fx_close(f);
    for (int way = 0; way < 4; way++) {
        bool done = false;
        for (unsigned k = 1; !done; k++) {
            int status = 0;
            const pid_t pid = fork();
            if (pid == 0)
                compact_and_die(f, way < 2 ? NULL : scratch, k, way % 2 == 1);
            assert_int_equal(waitpid(pid, &status, 0), pid);
            assert_true(WIFEXITED(status));
            done = WEXITSTATUS(status) == 0;
            assert_true(done || WEXITSTATUS(status) == 42);
            n_kills += !done;
            check_here(f);
            fx_close(f);
            check_tidy(f->path);
        }
    }
    assert_true(n_kills > 40);
    struct tv_compact r;
    assert_ok(tv_store_compact(f->path, NULL, 1000, &r, &f->err), &f->err);
    check_here(f);
    tv_free(scratch);
}

static void a_lost_copy_is_named(void **state)
{
    struct fx *f = (struct fx *)*state;
    char *scratch = tv_path_join(f->dir, "scratch");
    char **names = NULL;
    size_t n = 0;
    assert_ok(tv_dir_make(scratch, &f->err), &f->err);
    half_empty(f);
    fx_close(f);
    for (unsigned k = 1; !tv_path_exists(scratch) || n == 0; k++) {
        /* Killed when the data file is gone. */
        int status = 0;
        char *data = tv_path_join(f->path, "data.mdb");
        const pid_t pid = fork();
        if (pid == 0)
            compact_and_die(f, scratch, k, true);
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_int_equal(WEXITSTATUS(status), 42);
        if (!tv_path_exists(data))
            n = 1;
        tv_free(data);
        if (n == 0) {
            fx_open(f, NULL);
            fx_close(f);
        }
    }
    assert_ok(tv_dir_list(scratch, &f->err, &names, &n), &f->err);
    assert_int_equal(n, 1);
    char *copy = tv_path_join(scratch, names[0]);
    char *away = tv_path_join(f->dir, "away");
    assert_int_equal(rename(copy, away), 0);
    assert_code(tv_store_open(f->path, NULL, &f->err, &f->s), TV_E_IO, &f->err);
    assert_message(&f->err, names[0]);
    assert_int_equal(rename(away, copy), 0);
    /* Not the copy that was made. */
    const int fd = open(copy, O_RDWR);
    char byte = 0;
    assert_int_equal(pread(fd, &byte, 1, 5000), 1);
    byte = (char)(byte ^ 1);
    assert_int_equal(pwrite(fd, &byte, 1, 5000), 1);
    assert_code(tv_store_open(f->path, NULL, &f->err, &f->s), TV_E_CORRUPT,
                &f->err);
    byte = (char)(byte ^ 1);
    assert_int_equal(pwrite(fd, &byte, 1, 5000), 1);
    assert_int_equal(close(fd), 0);
    check_here(f);
    tv_free(away);
    tv_free(copy);
    tv_dir_list_free(names, n);
    tv_free(scratch);
}

int main(void)
{
#define T(fn) cmocka_unit_test_setup_teardown(fn, fx_setup, fx_teardown)
    const struct CMUnitTest tests[] = {
        T(free_pages_go),
        T(works_in_a_limited_address_space),
        T(nobody_else_may_have_it_open),
        T(quota_counts_the_copy),
        T(killed_anywhere),
        T(a_lost_copy_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
