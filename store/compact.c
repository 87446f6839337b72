/* SPDX-License-Identifier: Apache-2.0 */
/*
 * compact.c - giving free pages back to the file system.
 *
 * LMDB's file never shrinks; the only way is a copy that leaves the free pages
 * out, taking the place of the file. Nobody else may have the store open then
 * (open.lock, session.c): LMDB keeps its table of readers by transaction
 * numbers, and the copy begins to count anew.
 *
 * Beside the store, in one step:
 *     copy to STORE/data.mdb.compact, sync, rename to data.mdb, sync directory
 *     (killed before the rename, the copy is dropped by the next opening)
 *
 * By way of another disk (--scratch), when there is no room for both:
 *     copy to SCRATCH, sync; STORE/compact.job says so, durably; data.mdb goes;
 *     copy back to data.mdb.compact, sync, rename, sync; the job goes
 *     (killed: whoever opens the store next sees the job. With data.mdb there,
 *     old or new, it only tidies up; without, it copies back)
 */
#include "store_priv.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tv/alloc.h"
#include "tv/checked.h"

#define COPY_FILE "data.mdb.compact"
#define JOB_FILE  "compact.job"
#define JOB_FRESH "compact.job.new"
#define JOB_HEAD  "tvstore-compact/1"
#define JOB_MAX   (64u << 10)
#define PIECE     ((size_t)1 << 20)
#define SLACK     ((uint64_t)64 << 10)

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "no memory to compact a store");
}

/* ---- room -----------------------------------------------------------------
 */

static enum tv_err live_bytes(tv_store *s, uint64_t *live, uint64_t *quota,
                              uint64_t *bound, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct txn t = {.s = s, .mdb = NULL};
    uint64_t end = 0, unused = 0;
    TV_TRY(txn_begin(s, MDB_RDONLY, &t.mdb, err));
    TV_TRY(space_read(s, t.mdb, &end, &unused, err));
    TV_TRY(quota_bound(&t, quota, bound, err));
    *live = end - (unused < end ? unused : end);
out:
    if (t.mdb != NULL) {
        tv_lmdb()->txn_abort(t.mdb);
        atomic_fetch_sub(&s->n_txns, 1);
    }
    return rc;
}

static enum tv_err admit(tv_store *s, const char *scratch,
                         struct tv_compact *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    uint64_t live = 0, quota = 0, bound = 0, used = 0, disk = 0;
    char a[32], b[32], c[32];
    TV_TRY(live_bytes(s, &live, &quota, &bound, err));
    TV_TRY(tv_disk_used(s->path, &used, err));
    out->before_bytes = used;
    TV_TRY(tv_disk_free(scratch != NULL ? scratch : s->path, &disk, err));
    if (disk < live + SLACK) {
        rc = tv_error_set(err, TV_E_NOSPACE,
                          "compacting store %s needs %s for a copy in %s: %s "
                          "are free there",
                          s->path, tv_format_bytes(live, a, sizeof a),
                          scratch != NULL ? scratch : s->path,
                          tv_format_bytes(disk, b, sizeof b));
        goto out;
    }
    if (scratch == NULL && quota != 0 && used + live > bound) {
        rc = tv_error_set(err, TV_E_NOSPACE,
                          "compacting store %s needs %s for a copy beside the "
                          "%s it has: %s are missing in its quota",
                          s->path, tv_format_bytes(live, a, sizeof a),
                          tv_format_bytes(used, b, sizeof b),
                          tv_format_bytes(used + live - bound, c, sizeof c));
        tv_error_hint(err, "--scratch DIR makes the copy elsewhere, outside "
                           "the quota; or raise the quota ('tvstore quota') "
                           "while it runs");
        return rc;
    }
out:
    if (rc == TV_E_NOSPACE)
        tv_error_hint(err, "--scratch DIR makes the copy on another disk");
    return rc;
}

/* ---- copying --------------------------------------------------------------
 */

/* Every table of the copy must have what the store has. */
static enum tv_err check_copy(tv_store *s, const char *path,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    MDB_env *env = NULL;
    MDB_txn *txn = NULL;
    struct txn t = {.s = s, .mdb = NULL};
    struct stat st;
    TV_TRY(txn_begin(s, MDB_RDONLY, &t.mdb, err));
    if (tv_sys()->stat(path, &st) != 0) {
        rc = tv_error_sys(err, errno, "cannot look at %s", path);
        goto out;
    }
    int e = tv_lmdb()->env_create(&env);
    if (e == 0)
        e = tv_lmdb()->env_set_maxdbs(env, DB_COUNT + 1);
    /* Not the map that the copy's meta page asks for, which is the store's: two
     * of that size may be more than the address space that we have. */
    if (e == 0)
        e = tv_lmdb()->env_set_mapsize(env, (size_t)st.st_size);
    if (e == 0)
        e = tv_lmdb()->env_open(env, path,
                                MDB_NOSUBDIR | MDB_RDONLY | MDB_NOLOCK, 0600);
    if (e == 0)
        e = tv_lmdb()->txn_begin(env, NULL, MDB_RDONLY, &txn);
    for (int i = 0; e == 0 && i < DB_COUNT; i++) {
        MDB_dbi dbi = 0;
        MDB_stat a = {0}, b = {0};
        if (!s->has[i])
            continue;
        e = tv_lmdb()->stat(t.mdb, s->dbi[i], &a);
        if (e == 0)
            e = tv_lmdb()->dbi_open(txn, db_name((enum db)i), 0, &dbi);
        if (e == 0)
            e = tv_lmdb()->stat(txn, dbi, &b);
        if (e == 0 && a.ms_entries != b.ms_entries)
            e = MDB_CORRUPTED;
    }
    if (e != 0)
        rc = tv_lmdb_error(err, e, s->path, "its compacted copy is not good");
out:
    if (txn != NULL)
        tv_lmdb()->txn_abort(txn);
    if (env != NULL)
        tv_lmdb()->env_close(env);
    if (t.mdb != NULL) {
        tv_lmdb()->txn_abort(t.mdb);
        atomic_fetch_sub(&s->n_txns, 1);
    }
    return rc;
}

static enum tv_err write_copy(tv_store *s, const char *path,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    int fd = tv_sys()->open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0)
        return tv_error_sys(err, errno, "cannot create %s", path);
    const int e = tv_lmdb()->env_copyfd2(s->env, fd, MDB_CP_COMPACT);
    if (e != 0)
        rc = tv_lmdb_error(err, e, s->path, "copying it to %s", path);
    else if (tv_sys()->fsync(fd) != 0)
        rc = tv_error_sys(err, errno, "cannot sync %s", path);
    if (tv_sys()->close(fd) != 0 && rc == TV_OK)
        rc = tv_error_sys(err, errno, "cannot close %s", path);
    if (rc == TV_OK)
        rc = check_copy(s, path, err);
    if (rc != TV_OK)
        (void)tv_sys()->unlink(path);
    return rc;
}

/* Copies a file and syncs it; the hash of what was read. to NULL: only hash. */
static enum tv_err copy_file(const char *from, const char *to, uint64_t *bytes,
                             struct tv_hash *hash, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_hasher *h = NULL;
    unsigned char *piece = (unsigned char *)tv_alloc(PIECE);
    int in = -1, out = -1;
    ssize_t n = 0;
    *bytes = 0;
    TV_TRY(tv_hasher_open(err, &h));
    if (piece == NULL) {
        rc = no_memory(err);
        goto out;
    }
    in = tv_sys()->open(from, O_RDONLY | O_CLOEXEC, 0);
    if (in < 0) {
        rc = tv_error_sys(err, errno, "cannot open %s", from);
        goto out;
    }
    if (to != NULL) {
        out =
            tv_sys()->open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
        if (out < 0) {
            rc = tv_error_sys(err, errno, "cannot create %s", to);
            goto out;
        }
    }
    while ((n = tv_sys()->pread(in, piece, PIECE, (off_t)*bytes)) > 0) {
        tv_hasher_add(h, piece, (size_t)n);
        if (to != NULL)
            TV_TRY(tv_pwrite_all(out, piece, (size_t)n, *bytes, to, err));
        *bytes += (uint64_t)n;
    }
    if (n < 0) {
        rc = tv_error_sys(err, errno, "cannot read %s", from);
        goto out;
    }
    if (to != NULL && tv_sys()->fsync(out) != 0) {
        rc = tv_error_sys(err, errno, "cannot sync %s", to);
        goto out;
    }
    *hash = tv_hasher_value(h);
out:
    if (out >= 0 && tv_sys()->close(out) != 0 && rc == TV_OK)
        rc = tv_error_sys(err, errno, "cannot close %s", to);
    if (in >= 0)
        (void)tv_sys()->close(in);
    tv_hasher_close(h);
    tv_free(piece);
    return rc;
}

/* ---- the job --------------------------------------------------------------
 */

struct job {
    char *from; /* absolute path of the copy */
    uint64_t bytes;
    struct tv_hash hash;
};

/* By way of `fresh`, which compact_tidy knows, so that a kill leaves nothing.
 */
static enum tv_err job_write(const char *fresh, const char *path,
                             const struct job *j, struct tv_error *err)
{
    int fd = -1;
    enum tv_err rc = TV_OK;
    struct tv_buf b;
    char hex[33];
    tv_buf_init(&b, JOB_MAX);
    tv_buf_fmt(&b, "%s\n%" PRIu64 "\n%s\n%s\n", JOB_HEAD, j->bytes,
               tv_hash_hex(j->hash, hex), j->from);
    TV_TRY(tv_buf_ok(&b, err));
    fd = tv_sys()->open(fresh, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) {
        rc = tv_error_sys(err, errno, "cannot create %s", fresh);
        goto out;
    }
    TV_TRY(tv_pwrite_all(fd, b.data, b.n_bytes, 0, fresh, err));
    if (tv_sys()->fsync(fd) != 0 || tv_sys()->rename(fresh, path) != 0)
        rc = tv_error_sys(err, errno, "cannot write %s", path);
out:
    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_buf_free(&b);
    return rc;
}

static enum tv_err job_read(const char *path, struct job *j,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *text = NULL, *save = NULL;
    size_t n = 0;
    TV_TRY(tv_file_read(path, JOB_MAX, err, &text, &n));
    const char *head = strtok_r(text, "\n", &save);
    const char *bytes = strtok_r(NULL, "\n", &save);
    const char *hex = strtok_r(NULL, "\n", &save);
    const char *from = strtok_r(NULL, "\n", &save);
    if (from == NULL || strcmp(head, JOB_HEAD) != 0 || from[0] != '/' ||
        tv_hash_from_hex(hex, &j->hash) != 0) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "%s does not say where the data of the store are",
                          path);
        goto out;
    }
    j->bytes = strtoull(bytes, NULL, 10);
    j->from = tv_strdup(from);
    if (j->from == NULL)
        rc = no_memory(err);
out:
    tv_free(text);
    return rc;
}

/* Puts the copy into the place of data.mdb, which may be gone already. */
static enum tv_err bring_back(const char *store, const struct job *j,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *data = tv_path_join(store, "data.mdb");
    char *copy = tv_path_join(store, COPY_FILE);
    struct job now = {.from = NULL};
    if (data == NULL || copy == NULL) {
        rc = no_memory(err);
        goto out;
    }
    rc = copy_file(j->from, copy, &now.bytes, &now.hash, err);
    if (rc == TV_OK &&
        (now.bytes != j->bytes || !tv_hash_equal(now.hash, j->hash)))
        rc = tv_error_set(err, TV_E_CORRUPT, "%s is not the copy that was made",
                          j->from);
    if (rc != TV_OK) {
        tv_error_context(err,
                         "store %s: an interrupted 'tvstore compact' left its "
                         "data in %s",
                         store, j->from);
        goto out;
    }
    if (tv_sys()->rename(copy, data) != 0) {
        rc = tv_error_sys(err, errno, "cannot rename %s", copy);
        goto out;
    }
    rc = tv_dir_sync(store, err);
out:
    tv_free(data);
    tv_free(copy);
    return rc;
}

/* Removes the job, then what it points to. */
static enum tv_err end_job(const char *store, const char *path,
                           const struct job *j, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    if (tv_sys()->unlink(path) != 0 && errno != ENOENT)
        return tv_error_sys(err, errno, "cannot remove %s", path);
    rc = tv_dir_sync(store, err);
    /* A copy that stays behind costs room on a scratch disk, no more. */
    if (rc == TV_OK)
        (void)tv_sys()->unlink(j->from);
    return rc;
}

enum tv_err compact_recover(tv_store *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct job j = {.from = NULL};
    struct stat st;
    char *path = tv_path_join(s->path, JOB_FILE);
    if (path == NULL)
        return no_memory(err);
    if (tv_sys()->stat(path, &st) != 0)
        goto out;
    TV_TRY(session_open(s, err));
    TV_TRY(session_exclusive(s, err));
    /* Somebody may have been faster. */
    if (tv_sys()->stat(path, &st) != 0)
        goto out;
    TV_TRY(job_read(path, &j, err));
    if (tv_sys()->stat(s->data_path, &st) != 0)
        TV_TRY(bring_back(s->path, &j, err));
    TV_TRY(end_job(s->path, path, &j, err));
out:
    session_close(s);
    tv_free(j.from);
    tv_free(path);
    return rc;
}

void compact_tidy(const tv_store *s)
{
    static const char *const names[] = {COPY_FILE, JOB_FRESH};
    for (size_t i = 0; i < 2 && !s->read_only; i++) {
        char *path = tv_path_join(s->path, names[i]);
        if (path != NULL)
            (void)tv_sys()->unlink(path);
        tv_free(path);
    }
}

/* ---- the two ways ---------------------------------------------------------
 */

static enum tv_err beside(tv_store *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *copy = tv_path_join(s->path, COPY_FILE);
    if (copy == NULL)
        return no_memory(err);
    TV_TRY(write_copy(s, copy, err));
    if (tv_sys()->rename(copy, s->data_path) != 0) {
        rc = tv_error_sys(err, errno, "cannot rename %s", copy);
        (void)tv_sys()->unlink(copy);
        goto out;
    }
    rc = tv_dir_sync(s->path, err);
out:
    tv_free(copy);
    return rc;
}

static enum tv_err by_scratch(tv_store *s, const char *scratch,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char dir[PATH_MAX], own[PATH_MAX];
    struct job j = {.from = NULL};
    char *path = tv_path_join(s->path, JOB_FILE);
    char *fresh = tv_path_join(s->path, JOB_FRESH);
    if (realpath(scratch, dir) == NULL || realpath(s->path, own) == NULL) {
        rc = tv_error_sys(err, errno, "cannot use %s", scratch);
        goto out;
    }
    if (strcmp(dir, own) == 0) {
        rc = tv_error_set(err, TV_E_USAGE, "--scratch %s is the store itself",
                          scratch);
        goto out;
    }
    /* The same name each time: what a kill leaves there is written over. */
    j.from = tv_asprintf("%s/tvstore-%016" PRIx64 ".mdb", dir,
                         tv_hash64(own, strlen(own)));
    if (path == NULL || fresh == NULL || j.from == NULL) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(write_copy(s, j.from, err));
    TV_TRY(copy_file(j.from, NULL, &j.bytes, &j.hash, err));
    TV_TRY(tv_dir_sync(dir, err));
    TV_TRY(job_write(fresh, path, &j, err));
    TV_TRY(tv_dir_sync(s->path, err));
    /* From here on the copy is the store. */
    if (tv_sys()->unlink(s->data_path) != 0) {
        rc = tv_error_sys(err, errno, "cannot remove %s", s->data_path);
        goto out;
    }
    store_close_data(s); /* else its pages stay allocated */
    TV_TRY(bring_back(s->path, &j, err));
    rc = end_job(s->path, path, &j, err);
out:
    tv_free(fresh);
    tv_free(j.from);
    tv_free(path);
    return rc;
}

enum tv_err store_shrink(tv_store *s, uint64_t bytes, uint64_t live_max,
                         bool *done, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    uint64_t live = 0, quota = 0, bound = 0, used = 0, disk = 0;
    *done = false;
    if (s->read_only || atomic_load(&s->n_txns) != 0)
        return TV_OK;
    /* Some pages stay with any copy. */
    TV_TRY(derived_free(s, bytes + SLACK, err));
    TV_TRY(live_bytes(s, &live, &quota, &bound, err));
    TV_TRY(tv_disk_used(s->path, &used, err));
    TV_TRY(tv_disk_free(s->path, &disk, err));
    if (live > live_max || disk < live + SLACK ||
        (quota != 0 && used + live + SLACK > bound))
        goto out;
    if (session_exclusive(s, NULL) != TV_OK)
        goto out;
    rc = beside(s, err);
    if (rc == TV_OK) {
        store_close_data(s);
        rc = store_open_data(s, err);
        *done = rc == TV_OK;
    }
    session_share(s);
out:
    return rc;
}

enum tv_err tv_store_compact(const char *path, const char *scratch,
                             unsigned lock_timeout_ms, struct tv_compact *out,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_store *s = NULL;
    memset(out, 0, sizeof *out);
    TV_TRY(tv_store_open(path, NULL, err, &s));
    TV_TRY(tv_store_lock(s, "compact", lock_timeout_ms, err));
    TV_TRY(session_exclusive(s, err));
    TV_TRY(admit(s, scratch, out, err));
    rc = scratch != NULL ? by_scratch(s, scratch, err) : beside(s, err);
out:
    if (s != NULL) {
        tv_store_close(s);
        if (rc == TV_OK)
            rc = tv_disk_used(path, &out->after_bytes, err);
    }
    return rc;
}
