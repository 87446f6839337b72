/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_write_back.c - the disk is asked to begin during a large commit, not
 * after it, not for a small one; and a disk that refuses harms nothing.
 */
#include "store_fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "store_priv.h"
#include "tv/sys.h"

#define LARGE ((uint64_t)12 << 20)
#define SMALL ((uint64_t)1 << 20)
#define FUSE  5000 /* ms until a test gives up */

static struct {
    const struct tv_sys_table *sys;
    const struct tv_lmdb_table *lmdb;
    atomic_int asked, wrong; /* calls; those of another file or kind */
    atomic_bool committing;
    int fd, refuse; /* errno, 0: passed on */
    bool wait;      /* the commit goes on when the disk was asked */
} seen;

static int count_range(int fd, off_t off, off_t n, unsigned flags)
{
    if (fd != seen.fd || off != 0 || n != 0 || flags != SYNC_FILE_RANGE_WRITE ||
        !atomic_load(&seen.committing))
        atomic_fetch_add(&seen.wrong, 1);
    atomic_fetch_add(&seen.asked, 1);
    if (seen.refuse != 0) {
        errno = seen.refuse;
        return -1;
    }
    return seen.sys->sync_file_range(fd, off, n, flags);
}

static void pause_ms(long ms)
{
    const struct timespec t = {.tv_nsec = ms * 1000000};
    (void)nanosleep(&t, NULL);
}

static int slow_commit(MDB_txn *txn)
{
    for (int ms = 0; seen.wait && ms < FUSE && atomic_load(&seen.asked) == 0;
         ms++)
        pause_ms(1);
    if (seen.refuse != 0)
        pause_ms(20); /* time to ask again */
    return seen.lmdb->txn_commit(txn);
}

static void commit_of(struct fx *f, uint64_t bytes, int refuse, bool wait)
{
    static struct tv_sys_table sys;
    static struct tv_lmdb_table lmdb;
    uint64_t shape[2];
    uint64_t object = 0;
    bool resumed = false;
    tv_batch *b = NULL;
    tv_read *r = NULL;
    const struct tv_tensor_desc d =
        fx_desc("w", TV_F32, bytes / 4096, 1024, shape);

    sys = *tv_sys();
    lmdb = *tv_lmdb();
    seen.sys = tv_sys();
    seen.lmdb = tv_lmdb();
    seen.refuse = refuse;
    seen.wait = wait;
    atomic_store(&seen.asked, 0);
    atomic_store(&seen.wrong, 0);
    sys.sync_file_range = count_range;
    assert_int_equal(tv_lmdb()->env_get_fd(f->s->env, &seen.fd), 0);
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(tv_object_create(b, "m", TV_KIND_MODEL, "", "", tv_hash128("", 0),
                               &object, &resumed, &f->err),
              &f->err);
    assert_ok(fx_copy_in(&b, object, &d, 7, &f->err), &f->err);
    assert_ok(tv_object_complete(b, object, false, &f->err), &f->err);
    lmdb.txn_commit = slow_commit;
    tv_sys_replace(&sys);
    tv_lmdb_replace(&lmdb);
    atomic_store(&seen.committing, true);
    const enum tv_err rc = tv_batch_commit(b, &f->err);
    atomic_store(&seen.committing, false);
    tv_lmdb_replace(NULL);
    tv_sys_replace(NULL);
    assert_ok(rc, &f->err);
    pause_ms(10); /* a thread that was left behind would ask again */
    assert_int_equal(atomic_load(&seen.wrong), 0);
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(fx_compare(r, object, "w", 7, &f->err), &f->err);
    tv_read_end(r);
}

static void a_large_commit_asks_while_it_runs(void **state)
{
    commit_of(*state, LARGE, 0, true);
    assert_true(atomic_load(&seen.asked) > 0);
}

static void a_small_commit_does_not(void **state)
{
    commit_of(*state, SMALL, 0, false);
    assert_int_equal(atomic_load(&seen.asked), 0);
}

/* The file system knows no such call, or the disk fails: asked once. */
static void a_refusal_is_harmless(void **state)
{
    static const int codes[] = {ENOSYS, ESPIPE, EIO, ENOSPC};
    struct fx *f = *state;

    for (size_t i = 0; i < sizeof codes / sizeof codes[0]; i++) {
        commit_of(f, LARGE, codes[i], true);
        assert_int_equal(atomic_load(&seen.asked), 1);
        assert_ok(fx_remove(f->s, "m", &f->err), &f->err);
    }
}

#define T(name) cmocka_unit_test_setup_teardown(name, fx_setup, fx_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(a_large_commit_asks_while_it_runs),
        T(a_small_commit_does_not),
        T(a_refusal_is_harmless),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
