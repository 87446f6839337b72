/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_store_faults.c - every allocation, system call and LMDB call of ordinary
 * work fails once: right code, a message, nothing held, the store undamaged.
 */
#include "store_fixture.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "faults.h"
#include "lmdb_seam.h"
#include "store_priv.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/sys.h"

/* ---- the LMDB table with a countdown --------------------------------------
 */

static struct {
    uint64_t calls, from, until, fired;
    int code;
} seam;

static int seam_fault(void)
{
    const uint64_t n = ++seam.calls;
    if (n < seam.from || n >= seam.until)
        return 0;
    seam.fired++;
    return seam.code;
}

/* Wrapper of a call that gives an int. */
#define SEAM(name, params, args)                                               \
    static int seam_##name params                                              \
    {                                                                          \
        const int e = seam_fault();                                            \
        return e != 0 ? e : mdb_##name args;                                   \
    }

SEAM(env_create, (MDB_env * *env), (env))
SEAM(env_open,
     (MDB_env * env, const char *path, unsigned flags, mdb_mode_t mode),
     (env, path, flags, mode))
SEAM(env_sync, (MDB_env * env, int force), (env, force))
SEAM(env_set_flags, (MDB_env * env, unsigned flags, int on), (env, flags, on))
SEAM(env_set_mapsize, (MDB_env * env, size_t n), (env, n))
SEAM(env_set_maxdbs, (MDB_env * env, MDB_dbi n), (env, n))
SEAM(env_set_maxreaders, (MDB_env * env, unsigned n), (env, n))
SEAM(env_stat, (MDB_env * env, MDB_stat *st), (env, st))
SEAM(env_get_fd, (MDB_env * env, mdb_filehandle_t *fd), (env, fd))
SEAM(env_info, (MDB_env * env, MDB_envinfo *info), (env, info))
SEAM(txn_begin, (MDB_env * env, MDB_txn *up, unsigned flags, MDB_txn **txn),
     (env, up, flags, txn))
SEAM(txn_renew, (MDB_txn * txn), (txn))
SEAM(dbi_open, (MDB_txn * txn, const char *name, unsigned flags, MDB_dbi *dbi),
     (txn, name, flags, dbi))
SEAM(stat, (MDB_txn * txn, MDB_dbi dbi, MDB_stat *st), (txn, dbi, st))
SEAM(get, (MDB_txn * txn, MDB_dbi dbi, MDB_val *k, MDB_val *v),
     (txn, dbi, k, v))
SEAM(put, (MDB_txn * txn, MDB_dbi dbi, MDB_val *k, MDB_val *v, unsigned flags),
     (txn, dbi, k, v, flags))
SEAM(del, (MDB_txn * txn, MDB_dbi dbi, MDB_val *k, MDB_val *v),
     (txn, dbi, k, v))
SEAM(cursor_open, (MDB_txn * txn, MDB_dbi dbi, MDB_cursor **cur),
     (txn, dbi, cur))
SEAM(cursor_get, (MDB_cursor * cur, MDB_val *k, MDB_val *v, MDB_cursor_op op),
     (cur, k, v, op))

/* A failed commit frees the transaction all the same. */
static int seam_txn_commit(MDB_txn *txn)
{
    const int e = seam_fault();
    if (e == 0)
        return mdb_txn_commit(txn);
    mdb_txn_abort(txn);
    return e;
}

static struct tv_lmdb_table seam_table;

static void seam_arm(uint64_t n, uint64_t repeat, int code)
{
    tv_lmdb_replace(NULL);
    seam_table = *tv_lmdb();
    seam_table.env_create = seam_env_create;
    seam_table.env_open = seam_env_open;
    seam_table.env_sync = seam_env_sync;
    seam_table.env_set_flags = seam_env_set_flags;
    seam_table.env_set_mapsize = seam_env_set_mapsize;
    seam_table.env_set_maxdbs = seam_env_set_maxdbs;
    seam_table.env_set_maxreaders = seam_env_set_maxreaders;
    seam_table.env_stat = seam_env_stat;
    seam_table.env_get_fd = seam_env_get_fd;
    seam_table.env_info = seam_env_info;
    seam_table.txn_begin = seam_txn_begin;
    seam_table.txn_commit = seam_txn_commit;
    seam_table.txn_renew = seam_txn_renew;
    seam_table.dbi_open = seam_dbi_open;
    seam_table.stat = seam_stat;
    seam_table.get = seam_get;
    seam_table.put = seam_put;
    seam_table.del = seam_del;
    seam_table.cursor_open = seam_cursor_open;
    seam_table.cursor_get = seam_cursor_get;
    seam.calls = seam.fired = 0;
    seam.from = n;
    seam.until = n > UINT64_MAX - repeat ? UINT64_MAX : n + repeat;
    seam.code = code;
    tv_lmdb_replace(&seam_table);
}

/* ---- work -----------------------------------------------------------------
 */

struct job {
    struct fx *f;
    char *file;  /* a linked file */
    char *fresh; /* path for new stores */
    bool made;   /* there is a store at it */
};

/* A creation that failed must not be in the way of another try. */
static enum tv_err work_create(void *arg, struct tv_error *err)
{
    struct job *j = (struct job *)arg;
    enum tv_err rc = TV_OK;
    if (!j->made) {
        TV_TRY(tv_store_create(j->fresh, 1u << 20, err));
        j->made = true;
    }
    TV_TRY(tv_dir_remove(j->fresh, err));
    j->made = false;
out:
    return rc;
}

static enum tv_err work_open(void *arg, struct tv_error *err)
{
    const struct job *j = (const struct job *)arg;
    tv_store *s = NULL;
    uint64_t quota = 0;
    enum tv_err rc = TV_OK;
    TV_TRY(tv_store_open(j->f->path, NULL, err, &s));
    TV_TRY(tv_store_lock(s, "test", 0, err));
    TV_TRY(tv_store_quota_get(s, &quota, err));
    TV_TRY(tv_store_sync(s, err));
out:
    tv_store_close(s);
    return rc;
}

static enum tv_err work_read(void *arg, struct tv_error *err)
{
    const struct job *j = (const struct job *)arg;
    enum tv_err rc = TV_OK;
    tv_store *s = NULL;
    tv_read *r = NULL;
    struct tv_object *o = NULL, **list = NULL;
    struct tv_tensor_list *tl = NULL;
    struct tv_done_list *dl = NULL;
    struct tv_store_stat st;
    struct tv_hash digest;
    struct tv_view v;
    char *doc = NULL, **runs = NULL;
    size_t n = 0, n_doc = 0, n_runs = 0;
    bool found = false;
    const char *path = NULL;
    TV_TRY(tv_store_open(j->f->path, NULL, err, &s));
    TV_TRY(tv_read_begin(s, err, &r));
    TV_TRY(tv_object_list(r, true, err, &list, &n));
    TV_TRY(tv_object_find(r, "base", false, err, &o));
    TV_TRY(tv_tensor_list(r, o->id, err, &tl));
    TV_TRY(fx_compare(r, o->id, "w", 1, err));
    TV_TRY(tv_object_digest(r, o->id, &digest, err));
    TV_TRY(tv_read_renew(r, err));
    tv_object_free(o);
    o = NULL;
    tv_tensor_list_free(tl);
    tl = NULL;
    TV_TRY(tv_object_find(r, "linked", false, err, &o));
    TV_TRY(tv_tensor_list(r, o->id, err, &tl));
    TV_TRY(tv_tensor_view(r, &tl->items[0], err, &v));
    TV_TRY(tv_source_path(r, tl->items[0].source_id, err, &path));
    TV_TRY(tv_run_get(r, "run", &found, &doc, &n_doc, err));
    TV_TRY(tv_run_list(r, err, &runs, &n_runs));
    TV_TRY(tv_done_list(r, "run", err, &dl));
    TV_TRY(tv_store_stat(s, &st, err));
    TV_TRY(tv_store_verify(s, 0, NULL, NULL, NULL, err));
out:
    for (size_t i = 0; i < n; i++)
        tv_object_free(list[i]);
    tv_free(list);
    tv_dir_list_free(runs, n_runs);
    tv_free(doc);
    tv_done_list_free(dl);
    tv_tensor_list_free(tl);
    tv_object_free(o);
    tv_read_end(r);
    tv_store_close(s);
    return rc;
}

/* All kinds of writes in one batch that is given up: no waiting for disks. */
static enum tv_err work_write(void *arg, struct tv_error *err)
{
    const struct job *j = (const struct job *)arg;
    enum tv_err rc = TV_OK;
    tv_store *s = NULL;
    tv_batch *b = NULL;
    uint64_t id = 0, shape[2], src = 0;
    bool resumed = false, more = false;
    tv_map *map = NULL;
    struct tv_source_desc sd;
    TV_TRY(tv_store_open(j->f->path, NULL, err, &s));
    TV_TRY(tv_store_lock(s, "test", 0, err));
    TV_TRY(tv_batch_begin(s, true, err, &b));
    TV_TRY(tv_object_create_over(b, "base", TV_KIND_MODEL, "A", "/s",
                                 (struct tv_hash){9, 9}, &id, &resumed, err));
    TV_TRY(tv_object_file_put(b, id, "config.json", "{}", 2, err));
    TV_TRY(tv_object_file_put(b, id, "config.json", "[]", 2, err));
    struct tv_tensor_desc d = fx_desc("w", TV_F32, 40, 50, shape);
    TV_TRY(fx_copy_in(&b, id, &d, 1, err));
    TV_TRY(fx_copy_in(&b, id, &d, 2, err));
    d = fx_desc("w2", TV_F32, 40, 50, shape);
    TV_TRY(fx_copy_in(&b, id, &d, 2, err));
    TV_TRY(tv_map_open(j->file, err, &map));
    tv_source_describe(map, j->file, 100, &sd);
    sd.mtime_ns++; /* another source than the one that is there */
    TV_TRY(tv_source_put(b, &sd, &src, err));
    d = fx_desc("l", TV_U8, 77, 0, shape);
    TV_TRY(tv_tensor_link(b, id, &d, src, 3, err));
    TV_TRY(tv_tensor_checksum_put(b, id, "l", (struct tv_hash){1, 1}, err));
    TV_TRY(tv_object_complete(b, id, true, err));
    TV_TRY(tv_run_put(b, "r2", "x", 1, err));
    TV_TRY(tv_pin_put(b, "r2", id, err));
    const struct tv_done dn = {.name = "t"};
    TV_TRY(tv_done_put(b, "r2", &dn, err));
    TV_TRY(tv_run_drop(b, "r2", err));
    TV_TRY(tv_object_remove(b, "base", &more, err));
out:
    tv_map_close(map);
    tv_batch_abort(b);
    tv_store_close(s);
    return rc;
}

/* The same for good: import in lazy batches, publish, remove, gc. */
static enum tv_err work_commit(void *arg, struct tv_error *err)
{
    const struct job *j = (const struct job *)arg;
    enum tv_err rc = TV_OK;
    tv_store *s = NULL;
    uint64_t freed = 0;
    TV_TRY(tv_store_open(j->f->path, NULL, err, &s));
    TV_TRY(tv_store_lock(s, "test", 0, err));
    TV_TRY(fx_object(s, "new", 5, 50, err));
    TV_TRY(fx_object_compare(s, "new", 5, err));
    TV_TRY(fx_object(s, "new", 6, 50, err));
    TV_TRY(fx_object_compare(s, "new", 6, err));
    TV_TRY(fx_remove(s, "new", err));
    TV_TRY(tv_store_gc(s, &freed, err));
out:
    tv_store_close(s);
    return rc;
}

/* ---- fixture --------------------------------------------------------------
 */

static int setup(void **state)
{
    struct job *j = (struct job *)test_calloc(1, sizeof *j);
    tv_batch *b = NULL;
    uint64_t id = 0, src = 0, shape[2];
    bool resumed = false;
    tv_map *map = NULL;
    struct tv_source_desc sd;
    char bytes[1000];
    fx_setup(state);
    struct fx *f = j->f = (struct fx *)*state;
    fx_bytes(7, bytes, sizeof bytes);
    j->file = tmpdir_write(f->dir, "linked.bin", bytes, sizeof bytes);
    j->fresh = tv_path_join(f->dir, "fresh");
    assert_ok(fx_object(f->s, "base", 1, 30, &f->err), &f->err);
    assert_ok(tv_map_open(j->file, &f->err, &map), &f->err);
    tv_source_describe(map, j->file, 100, &sd);
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(tv_object_create(b, "linked", TV_KIND_MODEL, "", "",
                               (struct tv_hash){1, 1}, &id, &resumed, &f->err),
              &f->err);
    assert_ok(tv_source_put(b, &sd, &src, &f->err), &f->err);
    const struct tv_tensor_desc d = fx_desc("l", TV_U8, 500, 0, shape);
    assert_ok(tv_tensor_link(b, id, &d, src, 100, &f->err), &f->err);
    assert_ok(tv_object_complete(b, id, false, &f->err), &f->err);
    assert_ok(tv_run_put(b, "run", "{}", 2, &f->err), &f->err);
    const struct tv_done dn = {.name = "t"};
    assert_ok(tv_done_put(b, "run", &dn, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    tv_map_close(map);
    fx_close(f);
    *state = j;
    return 0;
}

static int teardown(void **state)
{
    struct job *j = (struct job *)*state;
    void *f = j->f;
    tv_lmdb_replace(NULL);
    tv_free(j->file);
    tv_free(j->fresh);
    test_free(j);
    return fx_teardown(&f);
}

static void sound(struct job *j)
{
    fx_open(j->f, NULL);
    fx_verify(j->f);
    assert_ok(fx_object_compare(j->f->s, "base", 1, &j->f->err), &j->f->err);
    fx_close(j->f);
}

/* ---- loops ----------------------------------------------------------------
 */

static uint64_t loop_seam(struct job *j, fault_work work, int code,
                          enum tv_err want, uint64_t repeat, uint64_t step)
{
    uint64_t n = 1, n_failed = 0;
    for (;; n += step) {
        struct tv_error err;
        tv_error_clear(&err);
        const uint64_t heap = test_heap_bytes();
        const unsigned fds = test_open_fds();
        seam_arm(n, repeat, code);
        const enum tv_err rc = work(j, &err);
        const uint64_t fired = seam.fired;
        tv_lmdb_replace(NULL);
        assert_int_equal(test_heap_bytes(), heap);
        assert_int_equal(test_open_fds(), fds);
        if (fired == 0) {
            assert_ok(rc, &err);
            break;
        }
        if (rc != TV_OK) {
            if (rc != want)
                print_error("call %llu: %s\n", (unsigned long long)n, err.msg);
            assert_int_equal(rc, want);
            assert_int_equal(err.code, rc);
            assert_true(err.msg[0] != '\0');
            n_failed++;
        }
    }
    sound(j);
    assert_true(n_failed * step * 10 >= n * 8); /* few can be done without */
    return n;
}

static const fault_work works[] = {work_open, work_read, work_write};

static void allocations(void **state)
{
    struct job *j = (struct job *)*state;
    uint64_t n = 0;
    for (size_t i = 0; i < 3; i++)
        n += faults_loop_alloc(works[i], j, true);
    n += faults_loop_alloc(work_create, j, true);
    print_message("%llu allocations failed\n", (unsigned long long)n);
    assert_true(n > 100);
    sound(j);
}

static void allocations_of_commits(void **state)
{
    struct job *j = (struct job *)*state;
    assert_true(faults_loop_alloc(work_commit, j, true) > 50);
    sound(j);
}

static void system_calls(void **state)
{
    struct job *j = (struct job *)*state;
    const unsigned mask = FAULT_ANY & ~(unsigned)(FAULT_CLOSE | FAULT_MUNMAP);
    uint64_t n = 0;
    for (size_t i = 0; i < 3; i++)
        n += faults_loop_sys(works[i], j, mask, EIO, TV_E_IO, true);
    /* tv_dir_make takes a directory that cannot be examined for none. */
    n += faults_loop_sys(work_create, j, mask & ~(unsigned)FAULT_STAT, EIO,
                         TV_E_IO, true);
    assert_true(n > 20);
    sound(j);
}

static void lmdb_calls(void **state)
{
    struct job *j = (struct job *)*state;
    uint64_t n = 0;
    for (size_t i = 0; i < 3; i++) {
        n += loop_seam(j, works[i], EIO, TV_E_IO, 1, 1);
        n += loop_seam(j, works[i], EIO, TV_E_IO, UINT64_MAX, 1);
    }
    print_message("%llu LMDB calls failed\n", (unsigned long long)n);
    assert_true(n > 500);
}

static void lmdb_calls_of_commits(void **state)
{
    struct job *j = (struct job *)*state;
    assert_true(loop_seam(j, work_commit, EIO, TV_E_IO, 1, 7) > 100);
    assert_true(loop_seam(j, work_create, EIO, TV_E_IO, 1, 1) > 20);
}

/* The codes that LMDB has for what may happen. */
static void codes_are_mapped(void **state)
{
    struct job *j = (struct job *)*state;
    static const struct {
        int code;
        enum tv_err want;
    } map[] = {
        {ENOSPC, TV_E_NOSPACE},
        {EDQUOT, TV_E_NOSPACE},
        {EFBIG, TV_E_NOSPACE},
        {MDB_MAP_FULL, TV_E_NOSPACE},
        {ENOMEM, TV_E_NOMEM},
        {MDB_CORRUPTED, TV_E_CORRUPT},
        {MDB_PAGE_NOTFOUND, TV_E_CORRUPT},
        {MDB_PANIC, TV_E_IO},
        {MDB_BAD_TXN, TV_E_INTERNAL},
        {MDB_READERS_FULL, TV_E_LOCKED},
        {MDB_TXN_FULL, TV_E_INTERNAL},
    };
    struct tv_error err;
    for (size_t i = 0; i < sizeof map / sizeof map[0]; i++) {
        assert_code(tv_lmdb_error(&err, map[i].code, j->f->path, "t"),
                    map[i].want, &err);
        assert_message(&err, j->f->path);
    }
    (void)loop_seam(j, work_write, MDB_MAP_FULL, TV_E_NOSPACE, 1, 7);
    (void)loop_seam(j, work_write, ENOMEM, TV_E_NOMEM, 1, 7);
}

/* As the real one: from the failure of a meta page on, nothing but panic. */
static int commit_code;
static bool panics;

static int panic_txn_commit(MDB_txn *txn)
{
    mdb_txn_abort(txn);
    if (panics)
        return MDB_PANIC;
    panics = commit_code == EIO || commit_code == ENOSPC;
    return commit_code;
}

static int panic_txn_begin(MDB_env *env, MDB_txn *parent, unsigned flags,
                           MDB_txn **txn)
{
    return panics ? MDB_PANIC : mdb_txn_begin(env, parent, flags, txn);
}

static enum tv_err empty_commit(tv_store *s, struct tv_error *err)
{
    tv_batch *b = NULL;
    const enum tv_err rc = tv_batch_begin(s, false, err, &b);
    return rc == TV_OK ? tv_batch_commit(b, err) : rc;
}

/* Who hears of a panic is told what began it, whoever saw that; failures that
 * LMDB survives are not taken for it. */
static void panic_tells_its_cause(void **state)
{
    struct job *j = (struct job *)*state;
    struct fx *f = j->f;
    static const struct {
        int code;
        enum tv_err want;
    } causes[] = {{ENOSPC, TV_E_NOSPACE}, {EIO, TV_E_IO}};
    for (size_t i = 0; i < sizeof causes / sizeof causes[0]; i++) {
        tv_read *r = NULL;
        fx_open(f, NULL);
        seam_table = *tv_lmdb();
        seam_table.txn_commit = panic_txn_commit;
        seam_table.txn_begin = panic_txn_begin;
        panics = false;
        tv_lmdb_replace(&seam_table);
        commit_code = MDB_CORRUPTED;
        assert_code(empty_commit(f->s, &f->err), TV_E_CORRUPT, &f->err);
        commit_code = causes[i].code;
        assert_int_equal(empty_commit(f->s, NULL), causes[i].want);
        assert_true(panics);
        assert_code(empty_commit(f->s, &f->err), causes[i].want, &f->err);
        assert_code(tv_read_begin(f->s, &f->err, &r), causes[i].want, &f->err);
        tv_lmdb_replace(NULL);
        fx_close(f);
        fx_open(f, NULL); /* another environment: it is over */
        assert_ok(empty_commit(f->s, &f->err), &f->err);
        fx_close(f);
    }
    sound(j);
}

/* After a failed renewal the read is of no use until one succeeds, and it is
 * counted off once. */
static void failed_renewal(void **state)
{
    struct job *j = (struct job *)*state;
    struct fx *f = j->f;
    tv_read *r = NULL;
    fx_open(f, NULL);
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    for (int i = 0; i < 3; i++) {
        seam_arm(1, UINT64_MAX, EIO);
        assert_code(tv_read_renew(r, &f->err), TV_E_IO, &f->err);
        tv_lmdb_replace(NULL);
    }
    assert_int_equal(atomic_load(&f->s->n_txns), 0);
    assert_ok(tv_read_renew(r, &f->err), &f->err);
    assert_int_equal(atomic_load(&f->s->n_txns), 1);
    assert_ok(tv_read_renew(r, &f->err), &f->err);
    tv_read_end(r);
    assert_int_equal(atomic_load(&f->s->n_txns), 0);
    fx_close(f);
}

/* A caller who goes on after a failed write cannot publish half of it. */
static void half_a_change_is_not_committed(void **state)
{
    struct job *j = (struct job *)*state;
    struct fx *f = j->f;
    uint64_t refused = 0, n = 1;
    for (;; n++) {
        tv_batch *b = NULL;
        bool more = false;
        fx_open(f, NULL);
        assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
        seam_arm(n, 1, EIO);
        const enum tv_err rc = tv_object_remove(b, "base", &more, &f->err);
        const uint64_t fired = seam.fired;
        tv_lmdb_replace(NULL);
        if (fired == 0) {
            tv_batch_abort(b);
            fx_close(f);
            break;
        }
        assert_int_not_equal(rc, TV_OK);
        refused += tv_batch_commit(b, &f->err) != TV_OK;
        fx_verify(f);
        assert_ok(fx_object_compare(f->s, "base", 1, &f->err), &f->err);
        fx_close(f);
    }
    assert_true(n > 20 && refused > 10);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(allocations),           T(allocations_of_commits),
        T(system_calls),          T(lmdb_calls),
        T(lmdb_calls_of_commits), T(codes_are_mapped),
        T(failed_renewal),        T(half_a_change_is_not_committed),
        T(panic_tells_its_cause),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
