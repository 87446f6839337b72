/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store.c - creating, opening and closing a store, and its writer lock.
 *
 *     STORE/data.mdb     LMDB environment: everything that is kept
 *     STORE/lock.mdb     LMDB's table of readers
 *     STORE/writer.lock  flock of whoever does long work; says who that is
 *     STORE/open.lock    who has it open (session.c)
 *
 * Invariants
 *   - LMDB runs with its durable defaults and NOTLS. WRITEMAP turns a full disk
 *     into SIGBUS, NOSYNC corrupts on power loss, NORDAHEAD is many times
 *     slower cold: none is ever set.
 *   - The map is reserved once, large, and does not move while a transaction of
 *     this handle lives: views point into it.
 *   - A store whose creation was cut off has no "store" record; it opens as
 *     "no store" and can be created again.
 *   - One handle per store and process, since closing a second one would drop
 *     the POSIX locks of the first. There is no global list of handles; a
 *     second opening is found in the list of this process's maps.
 */
#include "store_priv.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "tree_check.h"
#include "tv/alloc.h"
#include "tv/checked.h"

#define FORMAT_FIRST   1u
#define DATA_FILE      "data.mdb"
#define LOCK_FILE      "lock.mdb"
#define WRITER_FILE    "writer.lock"
#define OPEN_FILE      "open.lock"

#define MAP_DEFAULT    ((uint64_t)1 << 40)
#define MAP_LEAST      ((uint64_t)1 << 24)
#define DIRTY_DEFAULT  ((uint64_t)64 << 20)
#define DIRTY_LEAST    ((uint64_t)64 << 10)
#define CREATE_LOCK_MS 10000u /* of another that creates it */
#define MAX_READERS    254u
#define MAX_DBS        32u
#define QUOTA_LEAST    ((uint64_t)256 << 10)

static const char *const db_names[DB_COUNT] = {
    [DB_META] = "meta",
    [DB_OBJECT] = "object",
    [DB_OBJECT_ID] = "object_id",
    [DB_TENSOR] = "tensor",
    [DB_PAYLOAD] = "payload",
    [DB_LEAF] = "leaf",
    [DB_CONTENT] = "content",
    [DB_CHUNK] = "chunk",
    [DB_BLOB] = "blob",
    [DB_SOURCE] = "source",
    [DB_TRASH] = "trash",
    [DB_PIN] = "pin",
    [DB_RUN] = "run",
    [DB_DONE] = "done",
    [DB_MASK] = "mask",
    [DB_DELTA] = "delta",
    [DB_GROUP] = "group",
    [DB_USE] = "use",
    [DB_CHARGE] = "charge",
    [DB_STAT] = "stat",
};

const char *db_name(enum db db)
{
    return db_names[db];
}

const char *tv_kind_name(enum tv_kind kind)
{
    switch (kind) {
    case TV_KIND_MODEL:
        return "model";
    case TV_KIND_ADAPTER:
        return "adapter";
    case TV_KIND_MERGE:
        return "merge";
    }
    return "unknown";
}

const char *tv_store_path(const tv_store *s)
{
    return s->path;
}

uint64_t tv_store_dirty_max(const tv_store *s)
{
    return s->dirty_max;
}

bool tv_store_is_read_only(const tv_store *s)
{
    return s->read_only;
}

/* ---- the map of a file in this process ------------------------------------
 */

static enum tv_err read_all(const char *path, struct tv_buf *b)
{
    const int fd = tv_sys()->open(path, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0)
        return TV_E_IO;
    char part[4096];
    ssize_t n = 0;
    off_t off = 0;
    while ((n = tv_sys()->pread(fd, part, sizeof part, off)) > 0) {
        tv_buf_add(b, part, (size_t)n);
        off += n;
    }
    (void)tv_sys()->close(fd);
    return n == 0 && tv_buf_ok(b, NULL) == TV_OK ? TV_OK : TV_E_IO;
}

/* Looks a file up among our maps; false when absent or the list is unreadable
 * (then we only know less: no second-opening check, no name in a SIGBUS). */
static bool find_map(const struct stat *st, uintptr_t *from, uintptr_t *to)
{
    struct tv_buf b;
    bool found = false;
    tv_buf_init(&b, 64u << 20);
    if (read_all("/proc/self/maps", &b) == TV_OK && b.n_bytes > 0) {
        char *save = NULL;
        for (char *line = strtok_r(b.data, "\n", &save); line != NULL && !found;
             line = strtok_r(NULL, "\n", &save)) {
            uintptr_t lo = 0, hi = 0;
            unsigned major_no = 0, minor_no = 0;
            unsigned long long inode = 0;
            if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %*s %*x %x:%x %llu",
                       &lo, &hi, &major_no, &minor_no, &inode) == 5 &&
                inode == st->st_ino && major(st->st_dev) == major_no &&
                minor(st->st_dev) == minor_no) {
                *from = lo;
                *to = hi;
                found = true;
            }
        }
    }
    tv_buf_free(&b);
    return found;
}

/* ---- open -----------------------------------------------------------------
 */

void store_close_data(tv_store *s)
{
    if (s->map_slot >= 0)
        tv_map_unregister(s->map_slot);
    s->map_slot = -1;
    if (s->env != NULL)
        tv_lmdb()->env_close(s->env);
    s->env = NULL;
    atomic_store(&s->commit_failure, 0);
}

static void store_free(tv_store *s)
{
    if (s == NULL)
        return;
    tv_store_unlock(s);
    source_close_all(s);
    store_close_data(s);
    session_close(s);
    pthread_mutex_destroy(&s->mutex);
    tv_free(s->path);
    tv_free(s->data_path);
    tv_free(s);
}

static enum tv_err store_new(const char *path,
                             const struct tv_store_options *opt,
                             struct tv_error *err, tv_store **out)
{
    tv_store *s = (tv_store *)tv_calloc(1, sizeof *s);
    if (s == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a store handle");
    s->lock_fd = -1;
    s->open_fd = -1;
    s->map_slot = -1;
    atomic_init(&s->n_txns, 0);
    atomic_init(&s->commit_failure, 0);
    (void)pthread_mutex_init(&s->mutex, NULL);
    s->path = tv_strdup(path);
    s->data_path = tv_path_join(path, DATA_FILE);
    s->map_max = MAP_DEFAULT;
    s->dirty_max = DIRTY_DEFAULT;
    if (opt != NULL) {
        s->read_only = opt->read_only;
        s->check_all = opt->check_all;
        if (opt->map_bytes != 0)
            s->map_max = opt->map_bytes;
        s->wait = opt->wait;
        if (opt->dirty_bytes_max != 0)
            s->dirty_max = opt->dirty_bytes_max;
    }
    if (s->dirty_max < DIRTY_LEAST)
        s->dirty_max = DIRTY_LEAST;
    if (s->map_max < MAP_LEAST)
        s->map_max = MAP_LEAST;
    if (s->path == NULL || s->data_path == NULL) {
        store_free(s);
        return tv_error_set(err, TV_E_NOMEM, "no memory for a store handle");
    }
    /* Not a secret: it only has to differ from that of a killed process. */
    if (getrandom(&s->session, sizeof s->session, GRND_NONBLOCK) !=
            (ssize_t)sizeof s->session ||
        s->session == 0)
        s->session = ((uint64_t)getpid() << 32) ^ (uint64_t)time(NULL);
    *out = s;
    return TV_OK;
}

/* One attempt; returns LMDB's code. */
static int env_try(tv_store *s, uint64_t map_bytes, unsigned flags)
{
    MDB_env *env = NULL;
    int e = tv_lmdb()->env_create(&env);
    if (e != 0)
        return e;
    e = tv_lmdb()->env_set_maxdbs(env, MAX_DBS);
    if (e == 0)
        e = tv_lmdb()->env_set_maxreaders(env, MAX_READERS);
    if (e == 0)
        e = tv_lmdb()->env_set_mapsize(env, (size_t)map_bytes);
    if (e == 0)
        e = tv_lmdb()->env_open(env, s->path, flags, 0644);
    if (e != 0) {
        tv_lmdb()->env_close(env);
        return e;
    }
    s->env = env;
    s->map_bytes = map_bytes;
    return 0;
}

static bool no_permission(int e)
{
    return e == EROFS || e == EACCES || e == EPERM;
}

static enum tv_err env_open(tv_store *s, uint64_t file_bytes,
                            struct tv_error *err)
{
    uint64_t map = s->map_max;
    struct rlimit lim;
    if (getrlimit(RLIMIT_AS, &lim) == 0 && lim.rlim_cur != RLIM_INFINITY &&
        map > lim.rlim_cur / 2)
        map = lim.rlim_cur / 2; /* leave room for maps of inputs */
    map -= map % (1u << 16);
    if (map < MAP_LEAST)
        map = MAP_LEAST;
    if (map < file_bytes)
        map = file_bytes;
    unsigned flags = MDB_NOTLS | (s->read_only ? (unsigned)MDB_RDONLY : 0u);
    const enum tv_err rc = store_header_check(s, err);
    if (rc != TV_OK)
        return rc;
    for (;;) {
        const int e = env_try(s, map, flags);
        if (e == 0)
            return store_tree_check(s, err);
        if (e == ENOMEM && map / 2 >= MAP_LEAST && map / 2 >= file_bytes) {
            map /= 2;
            continue;
        }
        if (no_permission(e) && (flags & MDB_NOLOCK) == 0) {
            /* First with the reader table, since somebody else may be able to
             * write; without it only where it cannot be written either. */
            flags = (flags & MDB_RDONLY) == 0 ? (MDB_NOTLS | MDB_RDONLY)
                                              : (flags | MDB_NOLOCK);
            s->read_only = true;
            continue;
        }
        return tv_lmdb_error(err, e, s->path, "cannot open it");
    }
}

/* Opens the sub-databases inside txn; those that do not exist are left out. */
static int dbis_open(tv_store *s, MDB_txn *txn, unsigned flags)
{
    for (int i = 0; i < DB_COUNT; i++) {
        if (s->has[i])
            continue;
        const int e = tv_lmdb()->dbi_open(txn, db_names[i], flags, &s->dbi[i]);
        if (e == MDB_NOTFOUND)
            continue;
        if (e != 0)
            return e;
        s->has[i] = true;
    }
    return 0;
}

static enum tv_err dbis_begin(tv_store *s, bool create, struct tv_error *err)
{
    MDB_txn *txn = NULL;
    enum tv_err rc = txn_begin(s, create ? 0 : MDB_RDONLY, &txn, err);
    if (rc != TV_OK)
        return rc;
    int e = dbis_open(s, txn, create ? MDB_CREATE : 0);
    if (e == 0) {
        e = txn_commit(s, txn);
        txn = NULL;
    }
    if (txn != NULL)
        tv_lmdb()->txn_abort(txn);
    atomic_fetch_sub(&s->n_txns, 1);
    if (e != 0) {
        memset(s->has, 0, sizeof s->has);
        return tv_lmdb_error(err, e, s->path, "opening its tables");
    }
    return TV_OK;
}

/* Of the pages [have, end), how many does LMDB's own list call free? */
static int count_free_tail(tv_store *s, uint64_t have, uint64_t end,
                           uint64_t *n_free)
{
    MDB_txn *reader = NULL;
    MDB_cursor *cur = NULL;
    MDB_val key = {0, NULL}, val = {0, NULL};
    *n_free = 0;
    int e = tv_lmdb()->txn_begin(s->env, NULL, MDB_RDONLY, &reader);
    if (e == 0)
        e = tv_lmdb()->cursor_open(reader, TV_LMDB_FREE_DBI, &cur);
    while (e == 0) {
        e = tv_lmdb()->cursor_get(cur, &key, &val, MDB_NEXT);
        size_t n = 0;
        if (e == 0 && val.mv_size >= sizeof n)
            memcpy(&n, val.mv_data, sizeof n);
        if (e == 0 &&
            (val.mv_size < sizeof n || n > val.mv_size / sizeof n - 1))
            e = MDB_CORRUPTED;
        for (size_t i = 1; e == 0 && i <= n; i++) {
            size_t page = 0;
            memcpy(&page, (const char *)val.mv_data + i * sizeof page,
                   sizeof page);
            *n_free += page >= have && page < end;
        }
    }
    if (cur != NULL)
        tv_lmdb()->cursor_close(cur);
    if (reader != NULL)
        tv_lmdb()->txn_abort(reader);
    return e == MDB_NOTFOUND ? 0 : e;
}

/* What the header asks for and what the file has. */
static enum tv_err lengths(tv_store *s, uint64_t *need, uint64_t *have,
                           struct tv_error *err)
{
    MDB_envinfo info;
    MDB_stat ms;
    struct stat st;
    int e = tv_lmdb()->env_info(s->env, &info);
    if (e == 0)
        e = tv_lmdb()->env_stat(s->env, &ms);
    if (e != 0)
        return tv_lmdb_error(err, e, s->path, "asking for its size");
    s->page_bytes = ms.ms_psize;
    if (!tv_mul_u64((uint64_t)info.me_last_pgno + 1, ms.ms_psize, need))
        *need = UINT64_MAX;
    /* After the header: a writer makes the file grow first. */
    if (tv_sys()->stat(s->data_path, &st) != 0)
        return tv_error_sys(err, errno, "cannot open store %s", s->path);
    *have = (uint64_t)st.st_size;
    return TV_OK;
}

/* LMDB does not write a page that one transaction both took and gave back, so a
 * sound file may end early: then all that is missing is in its free list. The
 * file is made as long as its header says before the list is read (a page of
 * zeros is an error to LMDB, a missing one a SIGBUS), and stays so if all is
 * well. All inside a write transaction, so that nobody makes the file grow
 * meanwhile; hence the lengths are asked for again. */
static enum tv_err mend_length(tv_store *s, uint64_t *need, uint64_t *have,
                               bool *sound, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    MDB_txn *writer = NULL;
    uint64_t n_free = 0;
    int fd = -1;
    *sound = false;
    const int e = tv_lmdb()->txn_begin(s->env, NULL, 0, &writer);
    if (e != 0)
        return tv_lmdb_error(err, e, s->path, "checking its length");
    TV_TRY(lengths(s, need, have, err));
    if (*need <= *have) {
        *sound = true;
        goto out;
    }
    fd = tv_sys()->open(s->data_path, O_RDWR | O_CLOEXEC, 0);
    if (fd < 0 || tv_sys()->ftruncate(fd, (off_t)*need) != 0) {
        rc = tv_error_sys(err, errno, "cannot extend %s", s->data_path);
        goto out;
    }
    const uint64_t first = *have / s->page_bytes;
    const uint64_t end = *need / s->page_bytes;
    *sound =
        count_free_tail(s, first, end, &n_free) == 0 && n_free == end - first;
    if (!*sound && tv_sys()->ftruncate(fd, (off_t)*have) != 0)
        rc = tv_error_sys(err, errno, "cannot restore the length of %s",
                          s->data_path);
out:
    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_lmdb()->txn_abort(writer);
    return rc;
}

/* A file cut short would raise SIGBUS instead of an error. A read-only handle
 * cannot tell a missing page that is free from one that is not: there the
 * SIGBUS handler has the last word, and the map has its name early. */
static enum tv_err check_length(tv_store *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    uint64_t need = 0, have = 0;
    bool sound = true;
    TV_TRY(lengths(s, &need, &have, err));
    store_name_map(s);
    if (need > have && !s->read_only)
        TV_TRY(mend_length(s, &need, &have, &sound, err));
    /* Not even the two pages of the header. */
    if (have < 2 * s->page_bytes)
        sound = false;
    if (!sound)
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "store %s: %s is cut short: %" PRIu64
                          " bytes, but its header says %" PRIu64,
                          s->path, DATA_FILE, have, need);
out:
    return rc;
}

static enum tv_err store_record(tv_store *s, bool *found, struct rec_store *rec,
                                uint64_t *quota, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct txn t = {.s = s, .mdb = NULL};
    struct rec_key k;
    struct rec_body body;
    const char *why = NULL;
    TV_TRY(txn_begin(s, MDB_RDONLY, &t.mdb, err));
    key_str(&k, META_STORE);
    TV_TRY(db_get_rec(&t, DB_META, REC_STORE, &k, found, &body,
                      "the store record", err));
    if (!*found)
        goto out;
    if (!rec_store_get(body, rec, &why)) {
        rc = rec_damaged(s, "the store record", why, err);
        goto out;
    }
    /* The rest of a newer store is not ours to read. */
    if (rec->format <= TV_STORE_FORMAT) {
        uint64_t whole = 0;
        TV_TRY(quota_bound(&t, &whole, quota, err));
    }
out:
    if (t.mdb != NULL) {
        tv_lmdb()->txn_abort(t.mdb);
        atomic_fetch_sub(&s->n_txns, 1);
    }
    return rc;
}

void store_name_map(tv_store *s)
{
    struct stat st;
    uintptr_t from = 0, to = 0;
    if (s->map_slot >= 0)
        tv_map_unregister(s->map_slot);
    s->map_slot = -1;
    s->map_from = 0;
    if (tv_sys()->stat(s->data_path, &st) != 0 || !find_map(&st, &from, &to))
        return;
    /* A child does not inherit the map, which LMDB forbids it to use, and may
     * open the store for itself. */
    (void)madvise((void *)from, to - from, MADV_DONTFORK);
    s->map_from = from;
    s->map_slot = tv_map_register((const void *)from, to - from, s->data_path);
}

/* True when a directory has nothing but what a cut-off creation leaves. */
static enum tv_err dir_is_ours(const char *path, bool *ours, bool *has_data,
                               struct tv_error *err)
{
    char **names = NULL;
    size_t n = 0;
    const enum tv_err rc = tv_dir_list(path, err, &names, &n);
    if (rc != TV_OK)
        return rc;
    *ours = true;
    *has_data = false;
    for (size_t i = 0; i < n; i++) {
        if (strcmp(names[i], DATA_FILE) == 0)
            *has_data = true;
        else if (strcmp(names[i], LOCK_FILE) != 0 &&
                 strcmp(names[i], WRITER_FILE) != 0 &&
                 strcmp(names[i], OPEN_FILE) != 0)
            *ours = false;
    }
    tv_dir_list_free(names, n);
    return TV_OK;
}

static bool holds(const char *dir, const char *name)
{
    char *path = tv_path_join(dir, name);
    const bool yes = path && tv_path_exists(path);

    tv_free(path);
    return yes;
}

/* Could a store be made there? */
static bool is_free(const char *path)
{
    bool ours = false, has_data = false;

    return !tv_path_exists(path) ||
           (dir_is_ours(path, &ours, &has_data, NULL) == TV_OK && ours);
}

/* One that is there and has almost this name. */
static void hint_store(const char *path, struct tv_error *err)
{
    char *near = tv_path_suggest(path);
    char *data = near ? tv_path_join(near, DATA_FILE) : NULL;

    if (data && tv_path_exists(data))
        tv_error_hint(err, "did you mean '%s'?", near);
    tv_free(data);
    tv_free(near);
}

static enum tv_err not_a_store(const char *path, struct tv_error *err)
{
    tv_error_set(err, TV_E_NOTFOUND, "no store at %s", path);
    if (holds(path, "config.json") || holds(path, "adapter_config.json"))
        tv_error_hint(err,
                      "%s is a model: 'tvstore import STORE NAME %s' puts it "
                      "into a store",
                      path, path);
    else if (tv_path_exists(path) && !tv_path_is_dir(path))
        tv_error_hint(err, "a store is a directory, %s is none", path);
    else if (!is_free(path))
        tv_error_hint(err,
                      "%s holds other files; 'tvstore init' makes a store in a "
                      "new directory",
                      path);
    else
        tv_error_hint(err, "create one with: tvstore init %s", path);
    if (!tv_path_exists(path))
        hint_store(path, err);
    return TV_E_NOTFOUND;
}

enum tv_err tv_store_open(const char *path, const struct tv_store_options *opt,
                          struct tv_error *err, tv_store **out)
{
    enum tv_err rc = TV_OK;
    tv_store *s = NULL;
    struct stat st;
    bool found = false;
    struct rec_store rec;
    uint64_t quota = 0;
    uintptr_t from = 0, to = 0;
    *out = NULL;
    TV_TRY(store_new(path, opt, err, &s));
    TV_TRY(compact_recover(s, err));
    if (tv_sys()->stat(s->data_path, &st) != 0) {
        const int e = errno;
        rc = e == ENOENT || e == ENOTDIR
                 ? not_a_store(path, err)
                 : tv_error_sys(err, e, "cannot open store %s", path);
        goto out;
    }
    if (!S_ISREG(st.st_mode) || tv_lmdb_is_unborn(s->data_path)) {
        rc = not_a_store(path, err);
        goto out;
    }
    if (find_map(&st, &from, &to)) {
        rc = tv_error_set(err, TV_E_LOCKED,
                          "store %s is already open in this process", path);
        goto out;
    }
    TV_TRY(session_open(s, err));
    compact_tidy(s);
    TV_TRY(env_open(s, (uint64_t)st.st_size, err));
    TV_TRY(check_length(s, err));
    (void)tv_lmdb()->reader_check(s->env, NULL);
    TV_TRY(dbis_begin(s, false, err));
    if (!s->has[DB_META]) {
        rc = not_a_store(path, err);
        goto out;
    }
    TV_TRY(store_record(s, &found, &rec, &quota, err));
    if (!found) {
        rc = not_a_store(path, err);
        goto out;
    }
    if (rec.format > TV_STORE_FORMAT) {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "store %s has format %u; this program knows up to %u",
                          path, rec.format, TV_STORE_FORMAT);
        goto out;
    }
    for (int i = 0; i < DB_REQUIRED; i++) {
        if (!s->has[i]) {
            char what[64];
            (void)snprintf(what, sizeof what, "table '%s'", db_names[i]);
            rc = rec_damaged(s, what, "it is missing", err);
            goto out;
        }
    }
    if (!s->read_only) {
        bool all = true;
        for (int i = DB_REQUIRED; i < DB_COUNT; i++)
            all = all && s->has[i];
        if (!all)
            TV_TRY(dbis_begin(s, true, err));
        TV_TRY(quota_apply(s, quota, err));
    }
    store_name_map(s);
    *out = s;
    s = NULL;
out:
    store_free(s);
    return rc;
}

void tv_store_close(tv_store *s)
{
    assert(s == NULL || atomic_load(&s->n_txns) == 0);
    store_free(s);
}

enum tv_err store_open_data(tv_store *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct stat st;
    uint64_t quota = 0;
    bool found = false;
    struct rec_store rec;
    memset(s->has, 0, sizeof s->has);
    if (tv_sys()->stat(s->data_path, &st) != 0)
        return tv_error_sys(err, errno, "cannot open store %s", s->path);
    TV_TRY(env_open(s, (uint64_t)st.st_size, err));
    TV_TRY(check_length(s, err));
    TV_TRY(dbis_begin(s, true, err));
    TV_TRY(store_record(s, &found, &rec, &quota, err));
    TV_TRY(quota_apply(s, quota, err));
    store_name_map(s);
out:
    if (rc != TV_OK)
        store_close_data(s);
    return rc;
}

/* ---- create ---------------------------------------------------------------
 */

static enum tv_err put_first(tv_store *s, uint64_t quota, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    struct rec_key k;
    struct tv_buf buf;
    struct timespec now = {0, 0};
    /* pieces.c makes it the newest. */
    struct rec_store rec = {.format = FORMAT_FIRST};
    (void)clock_gettime(CLOCK_REALTIME, &now);
    rec.created_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
    rec.page_bytes = (uint32_t)s->page_bytes;
    if (getrandom(rec.uuid, sizeof rec.uuid, 0) != (ssize_t)sizeof rec.uuid)
        return tv_error_sys(err, errno, "no random bytes for store %s",
                            s->path);
    TV_TRY(tv_batch_begin(s, false, err, &b));
    key_str(&k, META_STORE);
    rec_begin(&buf);
    rec_store_put(&buf, &rec);
    TV_TRY(db_put_rec(b, DB_META, REC_STORE, &k, &buf, err));
    key_str(&k, META_QUOTA);
    rec_begin(&buf);
    rec_number_put(&buf, quota);
    TV_TRY(db_put_rec(b, DB_META, REC_NUMBER, &k, &buf, err));
    key_str(&k, META_NEXT_ID);
    rec_begin(&buf);
    rec_number_put(&buf, 1);
    TV_TRY(db_put_rec(b, DB_META, REC_NUMBER, &k, &buf, err));
    rc = tv_batch_commit(b, err);
    b = NULL;
out:
    tv_batch_abort(b);
    return rc;
}

static enum tv_err sync_parent(const char *path, struct tv_error *err)
{
    char *parent = tv_strdup(path);
    if (parent == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a path");
    size_t n = strlen(parent);
    while (n > 1 && parent[n - 1] == '/')
        n--;
    while (n > 0 && parent[n - 1] != '/')
        n--;
    while (n > 1 && parent[n - 1] == '/')
        n--;
    parent[n] = '\0';
    const enum tv_err rc = tv_dir_sync(n == 0 ? "." : parent, err);
    tv_free(parent);
    return rc;
}

enum tv_err tv_store_create(const char *path, uint64_t quota_bytes,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_store *s = NULL;
    bool ours = false, has_data = false, found = false;
    struct rec_store rec;
    uint64_t quota = 0;
    uintptr_t from = 0, to = 0;
    struct stat st;
    if (quota_bytes != 0 && quota_bytes < QUOTA_LEAST)
        return tv_error_set(err, TV_E_USAGE,
                            "a quota of %" PRIu64 " bytes is too small; the "
                            "least is %" PRIu64,
                            quota_bytes, QUOTA_LEAST);
    if (tv_path_exists(path) && !tv_path_is_dir(path))
        return tv_error_set(err, TV_E_EXISTS, "%s exists and is no directory",
                            path);
    TV_TRY(tv_dir_make(path, err));
    TV_TRY(dir_is_ours(path, &ours, &has_data, err));
    if (!ours) {
        rc = has_data
                 ? tv_error_set(err, TV_E_EXISTS,
                                "%s is a store already, and holds other files",
                                path)
                 : tv_error_set(err, TV_E_EXISTS, "directory %s is not empty",
                                path);
        goto out;
    }
    TV_TRY(store_new(path, NULL, err, &s));
    if (has_data && tv_sys()->stat(s->data_path, &st) == 0 &&
        find_map(&st, &from, &to)) {
        rc = tv_error_set(err, TV_E_EXISTS, "%s is a store, and open", path);
        goto out;
    }
    TV_TRY(tv_store_lock(s, "tvstore init", CREATE_LOCK_MS, err));
    if (tv_lmdb_is_unborn(s->data_path) &&
        tv_sys()->unlink(s->data_path) != 0) {
        rc = tv_error_sys(err, errno, "cannot create store %s", path);
        goto out;
    }
    TV_TRY(env_open(s, 0, err));
    if (s->read_only) {
        rc = tv_error_sys(err, EROFS, "cannot create store %s", path);
        goto out;
    }
    TV_TRY(dbis_begin(s, false, err));
    if (s->has[DB_META])
        TV_TRY(store_record(s, &found, &rec, &quota, err));
    if (found) {
        rc = tv_error_set(err, TV_E_EXISTS, "%s is a store already", path);
        goto out;
    }
    if (tv_sys()->stat(s->data_path, &st) != 0) {
        rc = tv_error_sys(err, errno, "cannot create store %s", path);
        goto out;
    }
    TV_TRY(check_length(s, err));
    /* The first pages are durable before the file grows: so a creation that a
     * power cut ends is told from a store that is damaged. */
    TV_TRY(tv_store_sync(s, err));
    TV_TRY(dbis_begin(s, true, err));
    /* LMDB syncs its file, not the names that lead to it. Its first record
     * comes last: a creation that fails has created nothing. */
    TV_TRY(tv_dir_sync(path, err));
    TV_TRY(sync_parent(path, err));
    TV_TRY(put_first(s, quota_bytes, err));
out:
    store_free(s);
    return rc;
}

/* ---- durability and locks -------------------------------------------------
 */

enum tv_err tv_store_sync(tv_store *s, struct tv_error *err)
{
    if (s->read_only)
        return TV_OK;
    const int e = tv_lmdb()->env_sync(s->env, 1);
    return e == 0 ? TV_OK : tv_lmdb_error(err, e, s->path, "sync failed");
}

static uint64_t now_ms(void)
{
    struct timespec t = {0, 0};
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000u + (uint64_t)t.tv_nsec / 1000000u;
}

enum tv_err tv_store_lock(tv_store *s, const char *purpose, unsigned timeout_ms,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    int fd = -1;
    char *path = NULL;
    char holder[256];
    bool told = false;
    if (s->read_only)
        return tv_error_set(err, TV_E_IO, "store %s is open read-only",
                            s->path);
    if (s->lock_fd >= 0)
        return tv_error_set(err, TV_E_INTERNAL,
                            "store %s: this handle holds its lock already",
                            s->path);
    path = tv_path_join(s->path, WRITER_FILE);
    if (path == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a path");
    fd = tv_sys()->open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) {
        rc = tv_error_sys(err, errno, "cannot open %s", path);
        goto out;
    }
    const uint64_t begin = now_ms();
    while (flock(fd, LOCK_EX | LOCK_NB) != 0) {
        const int e = errno;
        if (e == EINTR)
            continue;
        if (e != EWOULDBLOCK) {
            rc = tv_error_sys(err, e, "cannot lock %s", path);
            goto out;
        }
        const uint64_t waited = now_ms() - begin;
        if (waited >= timeout_ms) {
            tv_lock_holder(fd, holder, sizeof holder);
            rc = tv_error_set(err, TV_E_LOCKED,
                              "store %s is locked by %s (waited %.1f s)",
                              s->path, holder, (double)waited / 1000.0);
            tv_error_hint(err, "wait until it ends, or give a longer "
                               "--lock-timeout");
            goto out;
        }
        if (!told && s->wait.fn != NULL) {
            tv_lock_holder(fd, holder, sizeof holder);
            s->wait.fn(s->wait.arg, s->path, holder, timeout_ms);
        }
        told = true;
        const uint64_t left = timeout_ms - waited;
        const struct timespec nap = {
            .tv_sec = 0, .tv_nsec = (long)(left < 20 ? left : 20) * 1000000L};
        (void)nanosleep(&nap, NULL);
    }
    tv_lock_sign(fd, purpose);
    s->lock_fd = fd;
    fd = -1;
out:
    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_free(path);
    return rc;
}

bool tv_store_lock_holder(const tv_store *s, char *dst, size_t cap)
{
    char *const path = tv_path_join(s->path, WRITER_FILE);
    const int fd = path == NULL || s->lock_fd >= 0
                       ? -1
                       : tv_sys()->open(path, O_RDONLY | O_CLOEXEC, 0);
    const bool held = fd >= 0 && flock(fd, LOCK_SH | LOCK_NB) != 0;

    dst[0] = '\0';
    if (held)
        tv_lock_holder(fd, dst, cap);
    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_free(path);
    return held;
}

enum tv_err tv_store_lock_check(const tv_store *s, struct tv_error *err)
{
    char holder[256];

    if (!tv_store_lock_holder(s, holder, sizeof holder))
        return TV_OK;
    (void)tv_error_set(err, TV_E_LOCKED, "store %s is locked by %s", s->path,
                       holder);
    tv_error_hint(err, "wait until it ends, or give a longer --lock-timeout");
    return TV_E_LOCKED;
}

void tv_store_unlock(tv_store *s)
{
    if (s->lock_fd < 0)
        return;
    /* Closing the only descriptor releases the flock. */
    (void)tv_sys()->ftruncate(s->lock_fd, 0);
    (void)tv_sys()->close(s->lock_fd);
    s->lock_fd = -1;
}
