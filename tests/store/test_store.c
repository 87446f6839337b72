/* SPDX-License-Identifier: Apache-2.0 */
/* test_store.c - creation, opening, read-only media, locks, processes. */
#include "store_fixture.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "lmdb_seam.h"
#include "record.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/pool.h"
#include "tv/sys.h"

static void create_refuses_what_is_there(void **state)
{
    struct fx *f = (struct fx *)*state;
    assert_code(tv_store_create(f->path, 0, &f->err), TV_E_EXISTS, &f->err);
    fx_close(f);
    assert_code(tv_store_create(f->path, 0, &f->err), TV_E_EXISTS, &f->err);
    char *other = tv_path_join(f->dir, "full");
    assert_ok(tv_dir_make(other, &f->err), &f->err);
    tv_free(tmpdir_write(other, "file", "x", 1));
    assert_code(tv_store_create(other, 0, &f->err), TV_E_EXISTS, &f->err);
    assert_message(&f->err, "not empty");
    char *file = tv_path_join(other, "file");
    assert_code(tv_store_create(file, 0, &f->err), TV_E_EXISTS, &f->err);
    tv_free(file);
    tv_free(other);
    fx_open(f, NULL);
}

static void open_says_what_is_missing(void **state)
{
    struct fx *f = (struct fx *)*state;
    tv_store *s = NULL;
    char *p = tv_path_join(f->dir, "nowhere");
    assert_code(tv_store_open(p, NULL, &f->err, &s), TV_E_NOTFOUND, &f->err);
    assert_message(&f->err, "nowhere");
    assert_null(s);
    assert_false(tv_path_exists(p)); /* looking creates nothing */
    tv_free(p);
    /* An empty data file is what a creation cut off at once leaves. */
    p = tv_path_join(f->dir, "cut");
    assert_ok(tv_dir_make(p, &f->err), &f->err);
    tv_free(tmpdir_write(p, "data.mdb", "", 0));
    assert_code(tv_store_open(p, NULL, &f->err, &s), TV_E_NOTFOUND, &f->err);
    assert_ok(tv_store_create(p, 0, &f->err), &f->err);
    assert_ok(tv_store_open(p, NULL, &f->err, &s), &f->err);
    tv_store_close(s);
    tv_free(p);
    /* Something else under that name. */
    p = tv_path_join(f->dir, "other");
    assert_ok(tv_dir_make(p, &f->err), &f->err);
    char junk[20000];
    fx_bytes(1, junk, sizeof junk);
    tv_free(tmpdir_write(p, "data.mdb", junk, sizeof junk));
    assert_code(tv_store_open(p, NULL, &f->err, &s), TV_E_CORRUPT, &f->err);
    tv_free(p);
}

static void second_opening_is_refused(void **state)
{
    struct fx *f = (struct fx *)*state;
    tv_store *s = NULL;
    assert_code(tv_store_open(f->path, NULL, &f->err, &s), TV_E_LOCKED,
                &f->err);
    assert_message(&f->err, "already open");
    fx_close(f);
    fx_open(f, NULL);
}

static void newer_format_is_refused(void **state)
{
    struct fx *f = (struct fx *)*state;
    tv_store *s = NULL;
    fx_close(f);
    /* Written with the seam alone, as a later program would. */
    MDB_env *env = NULL;
    MDB_txn *txn = NULL;
    MDB_dbi dbi = 0;
    assert_int_equal(tv_lmdb()->env_create(&env), 0);
    assert_int_equal(tv_lmdb()->env_set_maxdbs(env, 32), 0);
    /* Not the terabyte that the store had: sanitizers leave less room. */
    assert_int_equal(tv_lmdb()->env_set_mapsize(env, (size_t)16 << 20), 0);
    assert_int_equal(tv_lmdb()->env_open(env, f->path, 0, 0644), 0);
    assert_int_equal(tv_lmdb()->txn_begin(env, NULL, 0, &txn), 0);
    assert_int_equal(tv_lmdb()->dbi_open(txn, "meta", 0, &dbi), 0);
    struct rec_key k;
    struct tv_buf buf;
    const struct rec_store rec = {.format = TV_STORE_FORMAT + 1};
    key_str(&k, "store");
    rec_begin(&buf);
    rec_store_put(&buf, &rec);
    tv_buf_str(&buf, "and more");
    rec_end(&buf, REC_STORE, &k);
    MDB_val key = {k.n, k.b}, val = {buf.n_bytes, buf.data};
    assert_int_equal(tv_lmdb()->put(txn, dbi, &key, &val, 0), 0);
    assert_int_equal(tv_lmdb()->txn_commit(txn), 0);
    tv_lmdb()->env_close(env);
    tv_buf_free(&buf);
    assert_code(tv_store_open(f->path, NULL, &f->err, &s), TV_E_UNSUPPORTED,
                &f->err);
    assert_message(&f->err, "format 3");
}

static void truncated_file_is_an_error(void **state)
{
    struct fx *f = (struct fx *)*state;
    struct tv_store *s = NULL;
    assert_ok(fx_object(f->s, "m", 1, 2000, &f->err), &f->err);
    fx_close(f);
    char *data = tv_path_join(f->path, "data.mdb");
    struct stat st;
    assert_int_equal(stat(data, &st), 0);
    /* A tail that is only free pages may be missing (cli/signals has one): the
     * cuts go through the payload. */
    const off_t cuts[] = {st.st_size / 2, 8192, 5000};
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++) {
        assert_int_equal(truncate(data, cuts[i]), 0);
        assert_code(tv_store_open(f->path, NULL, &f->err, &s), TV_E_CORRUPT,
                    &f->err);
    }
    tv_free(data);
}

static void survives_reopening(void **state)
{
    struct fx *f = (struct fx *)*state;
    assert_ok(fx_object(f->s, "m", 5, 300, &f->err), &f->err);
    fx_close(f);
    fx_open(f, NULL);
    assert_ok(fx_object_compare(f->s, "m", 5, &f->err), &f->err);
    fx_verify(f);
}

/* ---- read-only ------------------------------------------------------------
 */

static void read_only_handle(void **state)
{
    struct fx *f = (struct fx *)*state;
    const struct tv_store_options opt = {.read_only = true};
    tv_batch *b = NULL;
    assert_ok(fx_object(f->s, "m", 5, 300, &f->err), &f->err);
    fx_close(f);
    fx_open(f, &opt);
    assert_ok(fx_object_compare(f->s, "m", 5, &f->err), &f->err);
    fx_verify(f);
    assert_code(tv_batch_begin(f->s, false, &f->err, &b), TV_E_IO, &f->err);
    assert_null(b);
    assert_code(tv_store_lock(f->s, "x", 0, &f->err), TV_E_IO, &f->err);
    assert_ok(tv_store_sync(f->s, &f->err), &f->err);
}

static struct tv_lmdb_table media;
static int media_open_errno[2];
static unsigned media_flags[4];
static int media_calls;

static int media_open(MDB_env *env, const char *path, unsigned flags,
                      mdb_mode_t mode)
{
    const int call = media_calls++;
    media_flags[call < 3 ? call : 3] = flags;
    if (call < 2 && media_open_errno[call] != 0)
        return media_open_errno[call];
    tv_lmdb_replace(NULL);
    const int e = tv_lmdb()->env_open(env, path, flags, mode);
    tv_lmdb_replace(&media);
    media_calls -= e == ENOMEM; /* the store tries a smaller map */
    return e;
}

/* Read-only media refuse the data file; then even the lock file. */
static void read_only_media(void **state)
{
    struct fx *f = (struct fx *)*state;
    static const int cases[3][2] = {{EROFS, 0}, {EACCES, EACCES}, {EPERM, 0}};
    assert_ok(fx_object(f->s, "m", 5, 300, &f->err), &f->err);
    fx_close(f);
    media = *tv_lmdb();
    media.env_open = media_open;
    for (int i = 0; i < 3; i++) {
        media_calls = 0;
        memcpy(media_open_errno, cases[i], sizeof media_open_errno);
        tv_lmdb_replace(&media);
        fx_open(f, NULL);
        tv_lmdb_replace(NULL);
        assert_true((media_flags[0] & MDB_RDONLY) == 0);
        assert_true((media_flags[1] & MDB_RDONLY) != 0);
        assert_true((media_flags[1] & MDB_NOLOCK) == 0);
        if (cases[i][1] != 0)
            assert_true((media_flags[2] & MDB_NOLOCK) != 0);
        assert_int_equal(media_calls, cases[i][1] != 0 ? 3 : 2);
        tv_batch *b = NULL;
        assert_code(tv_batch_begin(f->s, false, &f->err, &b), TV_E_IO, &f->err);
        assert_ok(fx_object_compare(f->s, "m", 5, &f->err), &f->err);
        fx_close(f);
    }
    /* Never a flag that trades safety for speed. */
    for (int i = 0; i < 3; i++)
        assert_int_equal(media_flags[i] & (MDB_WRITEMAP | MDB_NOSYNC |
                                           MDB_NORDAHEAD | MDB_MAPASYNC),
                         0);
}

/* ---- processes ------------------------------------------------------------
 */

/* Runs fn in a child with pipes: the child writes one byte when ready and then
 * waits for one byte. */
struct child {
    pid_t pid;
    int ready, go;
};

static struct child child_start(int (*fn)(const char *path, int ready, int go),
                                const char *path)
{
    int up[2], down[2];
    struct child c = {.pid = -1, .ready = -1, .go = -1};
    assert_int_equal(pipe(up), 0);
    assert_int_equal(pipe(down), 0);
    c.pid = fork();
    assert_true(c.pid >= 0);
    if (c.pid == 0) {
        close(up[0]);
        close(down[1]);
        _exit(fn(path, up[1], down[0]));
    }
    close(up[1]);
    close(down[0]);
    c.ready = up[0];
    c.go = down[1];
    char byte = 0;
    assert_int_equal(read(c.ready, &byte, 1), 1);
    return c;
}

static int child_end(struct child *c)
{
    int status = 0;
    (void)!write(c->go, "x", 1);
    close(c->go);
    close(c->ready);
    assert_int_equal(waitpid(c->pid, &status, 0), c->pid);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 100;
}

/* The same with real permissions; root becomes nobody first. */
static int open_as_nobody(const char *path, int ready, int go)
{
    tv_store *s = NULL;
    struct tv_error err;
    tv_batch *b = NULL;
    (void)go;
    if (write(ready, "r", 1) != 1 ||
        (geteuid() == 0 && setresuid(65534, 65534, 65534) != 0))
        return 1;
    if (tv_store_open(path, NULL, &err, &s) != TV_OK)
        return 2;
    if (fx_object_compare(s, "m", 5, &err) != TV_OK)
        return 3;
    if (tv_batch_begin(s, false, &err, &b) != TV_E_IO)
        return 4;
    tv_store_close(s);
    return 0;
}

static void read_only_directory(void **state)
{
    struct fx *f = (struct fx *)*state;
    assert_ok(fx_object(f->s, "m", 5, 300, &f->err), &f->err);
    fx_close(f);
    char *data = tv_path_join(f->path, "data.mdb");
    char *lock = tv_path_join(f->path, "lock.mdb");
    assert_int_equal(unlink(lock), 0);
    assert_int_equal(chmod(data, 0444), 0);
    assert_int_equal(chmod(f->dir, 0755), 0);
    assert_int_equal(chmod(f->path, 0555), 0);
    struct child c = child_start(open_as_nobody, f->path);
    assert_int_equal(child_end(&c), 0);
    assert_false(tv_path_exists(lock));
    assert_int_equal(chmod(f->path, 0755), 0);
    tv_free(data);
    tv_free(lock);
}

static int open_and_compare(const char *path, int ready, int go)
{
    tv_store *s = NULL;
    char byte = 0;
    if (write(ready, "r", 1) != 1 || read(go, &byte, 1) != 1)
        return 1;
    if (tv_store_open(path, NULL, NULL, &s) != TV_OK)
        return 2;
    if (fx_object_compare(s, "m", 5, NULL) != TV_OK)
        return 3;
    tv_store_close(s);
    return 0;
}

/* A child of a process that has the store open may open it too. */
static void child_opens_for_itself(void **state)
{
    struct fx *f = (struct fx *)*state;
    assert_ok(fx_object(f->s, "m", 5, 300, &f->err), &f->err);
    struct child c = child_start(open_and_compare, f->path);
    assert_int_equal(child_end(&c), 0);
    assert_ok(fx_object(f->s, "m", 6, 300, &f->err), &f->err);
    fx_verify(f);
}

static int hold_lock(const char *path, int ready, int go)
{
    tv_store *s = NULL;
    char byte = 0;
    if (tv_store_open(path, NULL, NULL, &s) != TV_OK ||
        tv_store_lock(s, "import of big-model", 0, NULL) != TV_OK)
        return 1;
    if (write(ready, "r", 1) != 1 || read(go, &byte, 1) != 1)
        return 2;
    tv_store_close(s);
    return 0;
}

static void writer_lock_between_processes(void **state)
{
    struct fx *f = (struct fx *)*state;
    char pid[32];
    fx_close(f); /* a child must not inherit an open environment */
    struct child c = child_start(hold_lock, f->path);
    fx_open(f, NULL);
    assert_code(tv_store_lock(f->s, "rm", 0, &f->err), TV_E_LOCKED, &f->err);
    assert_code(tv_store_lock(f->s, "rm", 60, &f->err), TV_E_LOCKED, &f->err);
    assert_message(&f->err, "import of big-model");
    (void)snprintf(pid, sizeof pid, "process %ld", (long)c.pid);
    assert_message(&f->err, pid);
    /* Readers do not care. */
    tv_read *r = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    tv_read_end(r);
    assert_int_equal(child_end(&c), 0);
    assert_ok(tv_store_lock(f->s, "rm", 1000, &f->err), &f->err);
    assert_code(tv_store_lock(f->s, "rm", 0, &f->err), TV_E_INTERNAL, &f->err);
    tv_store_unlock(f->s);
    tv_store_unlock(f->s);
    assert_ok(tv_store_lock(f->s, "gc", 0, &f->err), &f->err);
}

static int wait_for_lock(const char *path, int ready, int go)
{
    tv_store *s = NULL;
    char byte = 0;
    (void)byte;
    (void)go;
    if (tv_store_open(path, NULL, NULL, &s) != TV_OK)
        return 1;
    if (write(ready, "r", 1) != 1)
        return 2;
    if (tv_store_lock(s, "patient", 5000, NULL) != TV_OK)
        return 3;
    tv_store_close(s);
    return 0;
}

static void lock_is_waited_for(void **state)
{
    struct fx *f = (struct fx *)*state;
    fx_close(f);
    struct child c = child_start(wait_for_lock, f->path);
    /* The child may have got it before us: then we wait. */
    fx_open(f, NULL);
    assert_ok(tv_store_lock(f->s, "quick", 5000, &f->err), &f->err);
    usleep(50000);
    tv_store_unlock(f->s);
    assert_int_equal(child_end(&c), 0);
}

static int hold_batch(const char *path, int ready, int go)
{
    tv_store *s = NULL;
    tv_batch *b = NULL;
    char byte = 0;
    uint64_t id = 0;
    bool resumed = false;
    if (tv_store_open(path, NULL, NULL, &s) != TV_OK ||
        tv_batch_begin(s, false, NULL, &b) != TV_OK ||
        tv_object_create(b, "other", TV_KIND_MODEL, "", "",
                         (struct tv_hash){1, 1}, &id, &resumed,
                         NULL) != TV_OK ||
        tv_object_complete(b, id, false, NULL) != TV_OK)
        return 1;
    if (write(ready, "r", 1) != 1 || read(go, &byte, 1) != 1)
        return 2;
    if (tv_batch_commit(b, NULL) != TV_OK)
        return 3;
    tv_store_close(s);
    return 0;
}

/* A reader sees the state before a batch of another process until it renews. */
static void reader_beside_writer(void **state)
{
    struct fx *f = (struct fx *)*state;
    struct tv_object *o = NULL;
    tv_read *r = NULL;
    assert_ok(fx_object(f->s, "m", 5, 300, &f->err), &f->err);
    fx_close(f);
    struct child c = child_start(hold_batch, f->path);
    fx_open(f, NULL);
    assert_ok(fx_object_compare(f->s, "m", 5, &f->err), &f->err);
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_code(tv_object_find(r, "other", true, &f->err, &o), TV_E_NOTFOUND,
                &f->err);
    assert_int_equal(child_end(&c), 0);
    assert_code(tv_object_find(r, "other", true, &f->err, &o), TV_E_NOTFOUND,
                &f->err);
    assert_ok(tv_read_renew(r, &f->err), &f->err);
    assert_ok(tv_object_find(r, "other", false, &f->err, &o), &f->err);
    tv_object_free(o);
    tv_read_end(r);
}

static int open_in_small_space(const char *path, int ready, int go)
{
    tv_store *s = NULL;
    struct tv_error err;
    const struct rlimit lim = {(rlim_t)1 << 31, (rlim_t)1 << 31};
    (void)go;
    if (setrlimit(RLIMIT_AS, &lim) != 0 || write(ready, "r", 1) != 1)
        return 1;
    if (tv_store_open(path, NULL, &err, &s) != TV_OK)
        return 2;
    const int rc = fx_object_compare(s, "m", 5, &err) == TV_OK ? 0 : 3;
    tv_store_close(s);
    return rc;
}

static void map_fits_an_address_space_limit(void **state)
{
    struct fx *f = (struct fx *)*state;
    if (TEST_SANITIZED)
        skip(); /* sanitizers need more address space than the limit */
    assert_ok(fx_object(f->s, "m", 5, 300, &f->err), &f->err);
    fx_close(f);
    struct child c = child_start(open_in_small_space, f->path);
    assert_int_equal(child_end(&c), 0);
}

struct crowd {
    tv_store *s;
    atomic_int bad;
};

static void read_often(void *arg, size_t item, unsigned worker)
{
    struct crowd *c = (struct crowd *)arg;
    (void)worker;
    for (int i = 0; i < 10; i++)
        if (fx_object_compare(c->s, item % 2 == 0 ? "m" : "n", item % 2 + 5,
                              NULL) != TV_OK)
            atomic_fetch_add(&c->bad, 1);
}

static void *write_often(void *arg)
{
    struct crowd *c = (struct crowd *)arg;
    for (uint64_t i = 0; i < 10; i++)
        if (fx_object(c->s, "other", 100 + i, 200, NULL) != TV_OK)
            atomic_fetch_add(&c->bad, 1);
    return NULL;
}

/* Reads of many threads, each its own, beside a writer. */
static void threads_read_beside_a_writer(void **state)
{
    struct fx *f = (struct fx *)*state;
    tv_pool *pool = NULL;
    pthread_t writer;
    assert_ok(fx_object(f->s, "m", 5, 300, &f->err), &f->err);
    assert_ok(fx_object(f->s, "n", 6, 300, &f->err), &f->err);
    struct crowd c = {.s = f->s};
    atomic_init(&c.bad, 0);
    assert_ok(tv_pool_open(4, &f->err, &pool), &f->err);
    assert_int_equal(pthread_create(&writer, NULL, write_often, &c), 0);
    tv_pool_run(pool, 12, read_often, &c);
    assert_int_equal(pthread_join(writer, NULL), 0);
    tv_pool_close(pool);
    assert_int_equal(atomic_load(&c.bad), 0);
    fx_verify(f);
}

static void sigbus_registry_knows_the_map(void **state)
{
    struct fx *f = (struct fx *)*state;
    const char *file = NULL, *extent = NULL;
    const void *data = NULL;
    size_t n = 0;
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    assert_ok(fx_object(f->s, "m", 5, 300, &f->err), &f->err);
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_object_find(r, "m", false, &f->err, &o), &f->err);
    assert_ok(tv_blob_get(r, o->files[0].digest, &data, &n, &f->err), &f->err);
    assert_true(tv_map_describe(data, &file, &extent));
    assert_non_null(strstr(file, "data.mdb"));
    tv_object_free(o);
    tv_read_end(r);
    fx_close(f);
    assert_false(tv_map_describe(data, &file, &extent));
}

#define T(name) cmocka_unit_test_setup_teardown(name, fx_setup, fx_teardown)

int main(void)
{
    (void)signal(SIGPIPE, SIG_IGN); /* a child may be gone already */
    const struct CMUnitTest tests[] = {
        T(create_refuses_what_is_there),
        T(open_says_what_is_missing),
        T(second_opening_is_refused),
        T(newer_format_is_refused),
        T(truncated_file_is_an_error),
        T(survives_reopening),
        T(read_only_handle),
        T(read_only_media),
        T(read_only_directory),
        T(child_opens_for_itself),
        T(writer_lock_between_processes),
        T(lock_is_waited_for),
        T(reader_beside_writer),
        T(map_fits_an_address_space_limit),
        T(threads_read_beside_a_writer),
        T(sigbus_registry_knows_the_map),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
