/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sink.c - a merge into a directory.
 *
 *   OUT/.tvmerge/lock       flock: one run at a time
 *   OUT/.tvmerge/journal/   store: state of the run, finished tensors
 *   OUT/.tvmerge/<shard>    shards in the making, at their whole size
 *   OUT/.tvmerge/previous.json  the tvmerge.json that --force will replace
 *   OUT/tvmerge.json        of a finished merge: what it was made of
 *
 * Order of events, each step durable before the next (but with --no-sync):
 *   1. journal with state          4. state: publishing = true
 *   2. shards at full size         5. old files go, shards are renamed into OUT
 *   3. per group: data, then the   6. index and side files but config.json
 *      `done` records              7. tvmerge.json   8. .tvmerge is removed
 *                                  9. config.json
 * Killed before 7, the same command goes on: a shard that has been renamed is
 * moved back and published again. Killed after it, the merge is complete but
 * for config.json, which the same command adds. So OUT never holds both
 * config.json and .tvmerge, unless an older model is there that --force will
 * replace.
 */
#include "sink.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <time.h>
#include <unistd.h>

#include "pins.h"
#include "state.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/lock.h"
#include "tv/sys.h"

#define STATE_DIR    ".tvmerge"
#define LOCK_FILE    "lock"
#define JOURNAL_DIR  "journal"
#define JOURNAL_NEW  "journal.new"
#define PREVIOUS     "previous.json"
#define RECORD_FILE  "tvmerge.json"
#define CONFIG_FILE  "config.json"
#define RUN_ID       "run"
#define INDEX_FILE   "model.safetensors.index.json"
#define RECORD_MAX   (64u << 20)
#define COMMIT_BYTES (256u << 20)
#define POLL_MS      20

struct dir_sink {
    struct tvm_sink base;
    char *out, *dir; /* OUT and OUT/.tvmerge */
    int lock_fd;
    tv_store *journal;
    bool made_out; /* OUT did not exist before */
    bool fresh;    /* nothing of value yet: undo on failure */
    bool replace, publishing;
    bool add_config; /* complete but for config.json */
    bool sync;
    char *pins;            /* run of the store that holds our inputs, or NULL */
    pthread_mutex_t mutex; /* guards opening of fd */
    int *fd;               /* [n_shards], -1: closed */
    bool *touched;         /* [n_shards] since the last sync */
    size_t *n_left;        /* [n_shards] tensors not committed */
};

static size_t n_shards(const struct dir_sink *s)
{
    return s->base.plan->shards ? s->base.plan->shards->n : 0;
}

static struct dir_sink *dir_of(struct tvm_sink *s)
{
    return (struct dir_sink *)(void *)s;
}

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory");
}

/* ---- small file operations ----------------------------------------------- */

/* Size of a regular file, or -1. */
static int64_t file_bytes(const char *dir, const char *name)
{
    struct stat st;
    char *path = tv_path_join(dir, name);
    int64_t n = -1;

    if (path && tv_sys()->stat(path, &st) == 0 && S_ISREG(st.st_mode))
        n = (int64_t)st.st_size;
    tv_free(path);
    return n;
}

/* Is it there? A disk that fails must not be taken for an empty directory. */
static enum tv_err probe(const char *dir, const char *name, bool *found,
                         struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct stat st;
    char *path = tv_path_join(dir, name);

    *found = false;
    if (!path)
        return no_memory(err);
    if (tv_sys()->stat(path, &st) == 0)
        *found = true;
    else if (errno != ENOENT && errno != ENOTDIR)
        rc = tv_error_sys(err, errno, "cannot look at %s", path);
    tv_free(path);
    return rc;
}

static enum tv_err rename_file(const char *from_dir, const char *from,
                               const char *to_dir, const char *to,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *a = tv_path_join(from_dir, from);
    char *b = tv_path_join(to_dir, to);

    if (!a || !b)
        rc = no_memory(err);
    else if (tv_sys()->rename(a, b) != 0)
        rc = tv_error_sys(err, errno, "cannot rename %s to %s", a, b);
    tv_free(a);
    tv_free(b);
    return rc;
}

/* Missing is fine. */
static enum tv_err remove_file(const char *dir, const char *name,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(dir, name);

    if (!path)
        rc = no_memory(err);
    else if (tv_sys()->unlink(path) != 0 && errno != ENOENT)
        rc = tv_error_sys(err, errno, "cannot remove %s", path);
    tv_free(path);
    return rc;
}

static enum tv_err remove_entry(const char *dir, const char *name,
                                struct tv_error *err)
{
    char *path = tv_path_join(dir, name);
    enum tv_err rc = TV_OK;

    if (!path)
        return no_memory(err);
    if (tv_path_is_dir(path))
        rc = tv_dir_remove(path, err);
    else
        rc = remove_file(dir, name, err);
    tv_free(path);
    return rc;
}

/* Before anything that makes OUT less than a model (or less than the adapter
 * that it was): what loads it must not find it, also after a power cut. */
static enum tv_err remove_config(struct dir_sink *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    /* Synced even when there is none: a killed run may have removed it. */
    TV_TRY(remove_file(s->out, CONFIG_FILE, err));
    TV_TRY(remove_file(s->out, "adapter_config.json", err));
    if (s->sync)
        rc = tv_dir_sync(s->out, err);
out:
    return rc;
}

/* Everything in OUT/.tvmerge but the lock that we hold and `keep`. */
static enum tv_err clear_state(struct dir_sink *s, const char *keep,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char **names = NULL;
    size_t n = 0;

    TV_TRY(tv_dir_list(s->dir, err, &names, &n));
    for (size_t i = 0; i < n; i++)
        if (strcmp(names[i], LOCK_FILE) != 0 &&
            (!keep || strcmp(names[i], keep) != 0))
            TV_TRY(remove_entry(s->dir, names[i], err));
out:
    tv_dir_list_free(names, n);
    return rc;
}

/* ---- lock ---------------------------------------------------------------- */

static void nap(void)
{
    const struct timespec ts = {0, POLL_MS * 1000000L};
    (void)nanosleep(&ts, NULL);
}

/* Is fd still the file that the path names? A run that ends removes it. */
static bool is_same_file(int fd, const char *path)
{
    struct stat a;
    struct stat b;
    return tv_sys()->fstat(fd, &a) == 0 && tv_sys()->stat(path, &b) == 0 &&
           a.st_ino == b.st_ino && a.st_dev == b.st_dev;
}

static enum tv_err in_use(const struct dir_sink *s, const char *holder,
                          struct tv_error *err)
{
    (void)tv_error_set(err, TV_E_LOCKED, "%s is being written by %s", s->out,
                       holder);
    tv_error_hint(err, "'tvmerge status' says how far it is; wait until it "
                       "ends, or give a longer --lock-timeout");
    return TV_E_LOCKED;
}

static enum tv_err take_lock(struct dir_sink *s,
                             const struct tvm_run_hooks *hooks,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const unsigned timeout = s->base.plan->options.lock_timeout_ms;
    char *path = tv_path_join(s->dir, LOCK_FILE);
    char holder[160] = "another run";
    int fd = -1;

    if (!path)
        return no_memory(err);
    for (unsigned waited = 0;; waited += POLL_MS) {
        if (tv_sys()->mkdir(s->dir, 0777) != 0 && errno != EEXIST) {
            rc = tv_error_sys(err, errno, "cannot create %s", s->dir);
            break;
        }
        fd = tv_sys()->open(path, O_RDWR | O_CREAT, 0666);
        if (fd < 0 && errno != ENOENT) {
            rc = tv_error_sys(err, errno, "cannot open %s", path);
            break;
        }
        if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0 &&
            is_same_file(fd, path)) {
            tv_lock_sign(fd, "tvmerge run");
            s->lock_fd = fd;
            fd = -1;
            break;
        }
        if (fd >= 0) {
            tv_lock_holder(fd, holder, sizeof holder);
            (void)tv_sys()->close(fd);
        }
        fd = -1;
        if (waited >= timeout) {
            rc = in_use(s, holder, err);
            break;
        }
        if (waited == 0 && hooks && hooks->wait.fn)
            hooks->wait.fn(hooks->wait.arg, s->out, holder, timeout);
        if (hooks && hooks->cancel && *hooks->cancel) {
            rc = tv_error_set(err, TV_E_INTERRUPTED, "interrupted");
            break;
        }
        nap();
    }
    tv_free(path);
    return rc;
}

/* ---- what is there ------------------------------------------------------- */

static enum tv_err load_record(struct dir_sink *s, bool *found,
                               struct tvm_record *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(s->out, RECORD_FILE);
    char *text = NULL;
    size_t n = 0;

    *found = false;
    if (!path)
        return no_memory(err);
    TV_TRY(probe(s->out, RECORD_FILE, found, err));
    if (*found) {
        *found = false;
        TV_TRY(tv_file_read(path, RECORD_MAX, err, &text, &n));
        rc = tvm_record_parse(text, n, out, err);
        if (rc != TV_OK)
            tv_error_context(err, "%s", path);
        *found = rc == TV_OK;
    }
out:
    tv_free(text);
    tv_free(path);
    return rc;
}

/* First file of the record that is not as it was, or NULL. The last one to be
 * written is only reported as *no_config. */
static const char *missing_file(const struct dir_sink *s,
                                const struct tvm_record *r, bool *no_config)
{
    *no_config = false;
    for (size_t i = 0; i < r->n_files; i++) {
        const char *name = r->files[i].name;
        const int64_t bytes = file_bytes(s->out, name);
        if (bytes < 0 && strcmp(name, CONFIG_FILE) == 0)
            *no_config = true;
        else if (bytes != (int64_t)r->files[i].bytes)
            return name;
    }
    return NULL;
}

/* A finished merge that --force does not replace: the same, or another
 * (CHANGED)? */
static enum tv_err judge_record(const struct dir_sink *s,
                                const struct tvm_record *r, bool *no_config,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_plan *p = s->base.plan;
    char why[512];
    bool numerics = false;

    if (!tv_hash_equal(r->plan_hash, p->hash) &&
        !tvm_identity_accept(p, r->plan_hash, r->identity, &numerics)) {
        rc = tv_error_set(
            err, TV_E_CHANGED, "%s holds the result of another merge: %s",
            s->out,
            tvm_identity_difference(r->identity, p->identity, why, sizeof why));
        tv_error_hint(err, numerics ? "--force replaces it, --accept-numerics "
                                      "takes it as it is"
                                    : "--force replaces it");
        goto out;
    }
    const char *name = missing_file(s, r, no_config);
    if (name) {
        rc = tv_error_set(err, TV_E_EXISTS,
                          "%s holds this merge, but %s is missing or has "
                          "another size",
                          s->out, name);
        tv_error_hint(err, "--force makes it again");
    }
out:
    return rc;
}

static enum tv_err meet_record(struct dir_sink *s, const struct tvm_record *r,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    bool no_config = false;

    if (s->base.plan->options.force) {
        /* From here on OUT counts as unfinished. */
        rc = rename_file(s->out, RECORD_FILE, s->dir, PREVIOUS, err);
        goto out;
    }
    TV_TRY(judge_record(s, r, &no_config, err));
    s->add_config = no_config; /* killed between steps 7 and 9 */
    s->base.already_done = true;
    s->base.totals = r->totals;
out:
    return rc;
}

/* Anything in OUT that is not ours to overwrite? */
static enum tv_err meet_files(const struct dir_sink *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char **names = NULL;
    size_t n = 0;

    TV_TRY(tv_dir_list(s->out, err, &names, &n));
    for (size_t i = 0; i < n; i++) {
        if (strcmp(names[i], STATE_DIR) == 0)
            continue;
        rc = tv_error_set(err, TV_E_EXISTS,
                          "%s is not empty and not made by tvmerge (it holds "
                          "%s)",
                          s->out, names[i]);
        tv_error_hint(err, "choose another directory, or use --force");
        break;
    }
out:
    tv_dir_list_free(names, n);
    return rc;
}

/* ---- journal ------------------------------------------------------------- */

static enum tv_err put_state(struct dir_sink *s, tv_store *store,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    char *text = tvm_state_make(s->base.plan, s->publishing, s->replace,
                                s->base.calibration);

    if (!text) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(tv_batch_begin(store, !s->sync, err, &b));
    TV_TRY(tv_run_put(b, RUN_ID, text, strlen(text), err));
    rc = tv_batch_commit(b, err);
    b = NULL;
out:
    tv_batch_abort(b);
    tv_free(text);
    return rc;
}

/* The journal appears under its name with its state inside or not at all. */
static enum tv_err make_journal(struct dir_sink *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_store *store = NULL;
    char *path = tv_path_join(s->dir, JOURNAL_NEW);

    if (!path) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(tv_store_create(path, 0, err));
    TV_TRY(tv_store_open(path, NULL, err, &store));
    TV_TRY(put_state(s, store, err));
    tv_store_close(store);
    store = NULL;
    TV_TRY(rename_file(s->dir, JOURNAL_NEW, s->dir, JOURNAL_DIR, err));
    /* The journal counts for nothing while the name of its directory may be
     * lost. */
    if (s->sync) {
        TV_TRY(tv_dir_sync(s->dir, err));
        TV_TRY(tv_dir_sync(s->out, err));
    }
out:
    tv_store_close(store);
    tv_free(path);
    return rc;
}

static enum tv_err open_journal(struct dir_sink *s, bool read_only,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_store_options opt = {.read_only = read_only};
    char *path = tv_path_join(s->dir, JOURNAL_DIR);

    if (!path)
        return no_memory(err);
    rc = tv_store_open(path, &opt, err, &s->journal);
    if (rc != TV_OK)
        tv_error_context(err, "the journal of an unfinished merge in %s",
                         s->out);
    tv_free(path);
    return rc;
}

/* Takes over what an earlier run of the same plan has done. CHANGED when it was
 * another plan. */
static enum tv_err read_journal(struct dir_sink *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_plan *p = s->base.plan;
    struct tvm_state state = {.n_tensors = 0};
    bool numerics = false;
    tv_read *r = NULL;
    char *text = NULL;
    size_t n = 0;
    bool found = false;
    char why[512];

    TV_TRY(tv_read_begin(s->journal, err, &r));
    TV_TRY(tv_run_get(r, RUN_ID, &found, &text, &n, err));
    if (!found) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "the journal in %s has no state of a merge", s->dir);
        goto out;
    }
    TV_TRY(tvm_state_parse(text, n, &state, err));
    if (!tv_hash_equal(state.plan_hash, p->hash) &&
        !tvm_identity_accept(p, state.plan_hash, state.identity, &numerics)) {
        rc = tv_error_set(err, TV_E_CHANGED,
                          "%s holds an unfinished merge of another plan: %s",
                          s->out,
                          tvm_identity_difference(state.identity, p->identity,
                                                  why, sizeof why));
        tv_error_hint(err, numerics ? TVM_NUMERICS_HINT
                                    : "repeat the earlier command to finish "
                                      "it, or --force to start anew");
        goto out;
    }
    s->publishing = state.publishing;
    s->replace = state.replace;
    s->base.calibration = state.calibration;
    state.calibration = NULL;
out:
    tvm_state_free(&state);
    tv_free(text);
    tv_read_end(r);
    return rc;
}

struct by_name {
    const char *name;
    size_t index;
};

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const struct by_name *)a)->name,
                  ((const struct by_name *)b)->name);
}

/* Marks the tensors of the journal whose shard is there. */
static enum tv_err read_done(struct dir_sink *s, const bool *shard_ok,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;
    struct by_name *names = NULL;
    struct tv_done_list *list = NULL;
    tv_read *r = NULL;

    names = tv_calloc(p->n_tensors + 1, sizeof *names);
    if (!names) {
        rc = no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < p->n_tensors; i++)
        names[i] = (struct by_name){p->tensors[i].name, i};
    qsort(names, p->n_tensors, sizeof *names, compare_names);
    TV_TRY(tv_read_begin(s->journal, err, &r));
    TV_TRY(tv_done_list(r, RUN_ID, err, &list));
    for (size_t i = 0; i < list->n; i++) {
        const struct tv_done *d = &list->items[i];
        const struct by_name key = {d->name, 0};
        const struct by_name *at =
            bsearch(&key, names, p->n_tensors, sizeof *names, compare_names);
        const struct tvm_tensor *t = at ? &p->tensors[at->index] : NULL;
        if (!t || t->shard != d->shard || t->offset != d->offset ||
            t->bytes != d->bytes) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "the journal in %s lists %s, which is not where "
                              "the plan has it",
                              s->dir, d->name);
            goto out;
        }
        if (shard_ok[t->shard])
            s->base.done[at->index] = (struct tvm_tensor_done){
                .done = true,
                .resumed = true,
                .checksum = d->checksum,
                .n_nonfinite_in = d->n_nonfinite_in,
                .n_nonfinite_out = d->n_nonfinite_out,
            };
    }
out:
    tv_done_list_free(list);
    tv_read_end(r);
    tv_free(names);
    return rc;
}

static struct tv_hash checksum_of(tv_hasher *leaves, const unsigned char *data,
                                  uint64_t n)
{
    unsigned char raw[16];

    tv_hasher_reset(leaves);
    for (uint64_t at = 0; at < n; at += TV_LEAF_BYTES) {
        const size_t some =
            (size_t)(n - at < TV_LEAF_BYTES ? n - at : TV_LEAF_BYTES);
        tv_hash_put(raw, tv_hash128(data + at, some));
        tv_hasher_add(leaves, raw, sizeof raw);
    }
    return tv_hasher_value(leaves);
}

/* Are the bytes that the journal calls finished the ones it has checksums of?
 * A disk may have turned one, and no later step would look at them again. What
 * is not is made again. */
static enum tv_err recheck(struct dir_sink *s,
                           const struct tvm_run_hooks *hooks,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;
    struct tvm_progress now = {.n_tensors = p->n_tensors,
                               .bytes_total = p->bytes_written};
    tv_map *map = NULL;
    tv_hasher *leaves = NULL;
    size_t shard = SIZE_MAX;

    if (!p->options.verify_reads)
        return TV_OK;
    TV_TRY(tv_hasher_open(err, &leaves));
    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *t = &p->tensors[i];
        struct tvm_tensor_done *d = &s->base.done[i];
        if (!d->done)
            continue;
        if (hooks && hooks->cancel && *hooks->cancel) {
            rc = tv_error_set(err, TV_E_INTERRUPTED, "interrupted");
            goto out;
        }
        if (t->shard != shard) {
            char *path = tv_path_join(s->dir, p->shards->file_names[t->shard]);
            tv_map_close(map);
            map = NULL;
            rc = path ? tv_map_open(path, err, &map) : no_memory(err);
            tv_free(path);
            TV_TRY(rc);
            shard = t->shard;
        }
        if (t->offset > tv_map_bytes(map) ||
            t->bytes > tv_map_bytes(map) - t->offset) {
            rc = tv_error_set(err, TV_E_CORRUPT, "%s has been cut off",
                              tv_map_path(map));
            goto out;
        }
        if (!tv_hash_equal(
                checksum_of(leaves, tv_map_data(map) + t->offset, t->bytes),
                d->checksum)) {
            *d = (struct tvm_tensor_done){.done = false};
            s->base.n_remade++;
        }
        now.n_done++;
        now.bytes_done += t->bytes;
        if (hooks && hooks->progress)
            hooks->progress(hooks->arg, &now);
    }
out:
    tv_hasher_close(leaves);
    tv_map_close(map);
    return rc;
}

/* ---- shards -------------------------------------------------------------- */

static enum tv_err shard_fd(struct dir_sink *s, size_t shard, int *fd,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = NULL;

    (void)pthread_mutex_lock(&s->mutex);
    if (s->fd[shard] < 0) {
        path = tv_path_join(s->dir, s->base.plan->shards->file_names[shard]);
        s->fd[shard] = path ? tv_sys()->open(path, O_RDWR, 0) : -1;
        if (!path)
            rc = no_memory(err);
        else if (s->fd[shard] < 0)
            rc = tv_error_sys(err, errno, "cannot open %s", path);
    }
    s->touched[shard] = true;
    *fd = s->fd[shard];
    (void)pthread_mutex_unlock(&s->mutex);
    tv_free(path);
    return rc;
}

static enum tv_err close_shard(struct dir_sink *s, size_t shard,
                               struct tv_error *err)
{
    const int fd = s->fd[shard];

    s->fd[shard] = -1;
    if (fd >= 0 && tv_sys()->close(fd) != 0)
        return tv_error_sys(err, errno, "cannot write %s",
                            s->base.plan->shards->file_names[shard]);
    return TV_OK;
}

/* Opens a shard in the making, at its whole size with its header. The header of
 * one that is there already is written again: a power cut may have kept the
 * size and lost it. */
static enum tv_err make_shard(struct dir_sink *s, size_t i, bool is_there,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_shards *shards = s->base.plan->shards;
    char *path = tv_path_join(s->dir, shards->file_names[i]);
    const uint64_t bytes = shards->file_bytes[i];
    int fd = -1;

    if (!path) {
        rc = no_memory(err);
        goto out;
    }
    fd =
        tv_sys()->open(path, O_RDWR | O_CREAT | (is_there ? 0 : O_TRUNC), 0666);
    if (fd < 0) {
        rc = tv_error_sys(err, errno, "cannot create %s", path);
        goto out;
    }
    if (!is_there && bytes > 0 &&
        tv_sys()->fallocate(fd, 0, 0, (off_t)bytes) != 0) {
        /* Not every file system can; then a full disk shows later. */
        if (errno != EOPNOTSUPP && errno != ENOSYS) {
            rc = tv_error_sys(err, errno,
                              "cannot reserve %" PRIu64 " bytes for %s", bytes,
                              path);
            goto out;
        }
        if (tv_sys()->ftruncate(fd, (off_t)bytes) != 0) {
            rc = tv_error_sys(err, errno, "cannot extend %s", path);
            goto out;
        }
    }
    rc = tv_pwrite_all(fd, shards->headers[i], shards->header_bytes[i], 0, path,
                       err);
out:
    if (fd >= 0 && tv_sys()->close(fd) != 0 && rc == TV_OK)
        rc = tv_error_sys(err, errno, "cannot write %s", path);
    tv_free(path);
    return rc;
}

/* Makes the shards that are not there; ok[i] tells which were. */
static enum tv_err prepare_shards(struct dir_sink *s, bool *ok,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_shards *shards = s->base.plan->shards;
    bool made = false;

    for (size_t i = 0; i < n_shards(s); i++) {
        const char *name = shards->file_names[i];
        const int64_t bytes = (int64_t)shards->file_bytes[i];
        ok[i] = file_bytes(s->dir, name) == bytes;
        if (!ok[i] && s->publishing && file_bytes(s->out, name) == bytes) {
            TV_TRY(remove_config(s, err));
            TV_TRY(rename_file(s->out, name, s->dir, name, err));
            ok[i] = true;
        }
        made = made || !ok[i];
        TV_TRY(make_shard(s, i, ok[i], err));
    }
    if (made && s->sync)
        rc = tv_dir_sync(s->dir, err);
out:
    return rc;
}

static enum tv_err dir_write(struct tvm_sink *sink, size_t t, uint64_t off,
                             const void *data, size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct dir_sink *s = dir_of(sink);
    const struct tvm_tensor *tensor = &sink->plan->tensors[t];
    const uint64_t at = tensor->offset + off;
    int fd = -1;

    TV_TRY(shard_fd(s, tensor->shard, &fd, err));
    TV_TRY(tv_pwrite_all(fd, data, n, at,
                         sink->plan->shards->file_names[tensor->shard], err));
    /* Only a hint, so that the later fdatasync has little left to do. */
    if (s->sync)
        (void)tv_sys()->sync_file_range(fd, (off_t)at, (off_t)n,
                                        SYNC_FILE_RANGE_WRITE);
out:
    return rc;
}

static enum tv_err sync_touched(struct dir_sink *s, struct tv_error *err)
{
    for (size_t i = 0; i < n_shards(s); i++) {
        (void)pthread_mutex_lock(&s->mutex);
        const bool touched = s->touched[i];
        const int fd = s->fd[i];
        s->touched[i] = false;
        (void)pthread_mutex_unlock(&s->mutex);
        if (touched && s->sync && tv_sys()->fdatasync(fd) != 0)
            return tv_error_sys(err, errno, "cannot write %s to disk",
                                s->base.plan->shards->file_names[i]);
    }
    return TV_OK;
}

static enum tv_err dir_commit(struct tvm_sink *sink, const size_t *tensors,
                              size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct dir_sink *s = dir_of(sink);
    tv_batch *b = NULL;

    TV_TRY(sync_touched(s, err));
    TV_TRY(tv_batch_begin(s->journal, !s->sync, err, &b));
    for (size_t i = 0; i < n; i++) {
        const struct tvm_tensor *t = &sink->plan->tensors[tensors[i]];
        const struct tvm_tensor_done *d = &sink->done[tensors[i]];
        const struct tv_done done = {
            .name = t->name,
            .shard = t->shard,
            .offset = t->offset,
            .bytes = t->bytes,
            .checksum = d->checksum,
            .n_nonfinite_in = d->n_nonfinite_in,
            .n_nonfinite_out = d->n_nonfinite_out,
        };
        TV_TRY(tv_done_put(b, RUN_ID, &done, err));
    }
    rc = tv_batch_commit(b, err);
    b = NULL;
    for (size_t i = 0; rc == TV_OK && i < n; i++) {
        const size_t shard = sink->plan->tensors[tensors[i]].shard;
        if (--s->n_left[shard] == 0)
            rc = close_shard(s, shard, err);
    }
out:
    tv_batch_abort(b);
    return rc;
}

static enum tv_err dir_note(struct tvm_sink *sink, const char *calibration,
                            struct tv_error *err)
{
    char *copy = tv_strdup(calibration);

    if (!copy)
        return no_memory(err);
    tv_free(sink->calibration);
    sink->calibration = copy;
    return put_state(dir_of(sink), dir_of(sink)->journal, err);
}

/* ---- publishing ---------------------------------------------------------- */

static bool is_ours(const struct tvm_plan *p, const char *name)
{
    for (size_t i = 0; i < p->shards->n; i++)
        if (strcmp(p->shards->file_names[i], name) == 0)
            return true;
    for (size_t i = 0; i < p->n_files; i++)
        if (strcmp(p->files[i].name, name) == 0)
            return true;
    return p->shards->index_json && strcmp(name, INDEX_FILE) == 0;
}

/* What --force replaces: files that the earlier merge made, weights of whatever
 * model was there, and its config.json first of all. */
static enum tv_err remove_stale(struct dir_sink *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;
    struct tvm_record old = {.n_files = 0};
    char *path = tv_path_join(s->dir, PREVIOUS);
    char *text = NULL;
    char **names = NULL;
    size_t n_names = 0;
    size_t n = 0;

    if (!path) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(remove_config(s, err));
    TV_TRY(remove_file(s->out, INDEX_FILE, err));
    if (tv_path_exists(path)) {
        TV_TRY(tv_file_read(path, RECORD_MAX, err, &text, &n));
        /* A damaged list is no reason to stop: it only says what to tidy. */
        if (tvm_record_parse(text, n, &old, NULL) != TV_OK)
            old.n_files = 0;
    }
    for (size_t i = 0; i < old.n_files; i++)
        if (!is_ours(p, old.files[i].name))
            TV_TRY(remove_file(s->out, old.files[i].name, err));
    TV_TRY(tv_dir_list(s->out, err, &names, &n_names));
    for (size_t i = 0; i < n_names; i++)
        if (tv_out_is_weights(names[i]) && !is_ours(p, names[i]))
            TV_TRY(remove_file(s->out, names[i], err));
out:
    tv_dir_list_free(names, n_names);
    tvm_record_free(&old);
    tv_free(text);
    tv_free(path);
    return rc;
}

/* A file of OUT; its name is durable after the next sync of OUT. */
static enum tv_err replace_file(struct dir_sink *s, const char *name,
                                const char *data, size_t n,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(s->out, name);

    if (!path)
        return no_memory(err);
    rc = tv_file_replace(path, data, n, s->sync, err);
    tv_free(path);
    return rc;
}

static enum tv_err write_file(struct dir_sink *s, const char *name,
                              const char *data, size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    TV_TRY(replace_file(s, name, data, n, err));
    if (s->sync)
        rc = tv_dir_sync(s->out, err);
out:
    return rc;
}

static enum tv_err write_side_files(struct dir_sink *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;

    if (p->shards->index_json)
        TV_TRY(replace_file(s, INDEX_FILE, p->shards->index_json,
                            p->shards->index_bytes, err));
    for (size_t i = 0; i < p->n_files; i++) {
        const struct tvm_side_file *f = &p->files[i];
        if (strcmp(f->name, CONFIG_FILE) != 0)
            TV_TRY(replace_file(s, f->name, f->data, f->n, err));
    }
    if (s->sync)
        rc = tv_dir_sync(s->out, err);
out:
    return rc;
}

static enum tv_err write_config(struct dir_sink *s, struct tv_error *err)
{
    const struct tvm_plan *p = s->base.plan;

    for (size_t i = 0; i < p->n_files; i++)
        if (strcmp(p->files[i].name, CONFIG_FILE) == 0)
            return write_file(s, CONFIG_FILE, p->files[i].data, p->files[i].n,
                              err);
    return TV_OK;
}

static enum tv_err write_record(struct dir_sink *s,
                                const struct tvm_totals *totals,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;
    struct tvm_record_file *files = NULL;
    char *text = NULL;
    size_t n = 0;

    files = tv_calloc(p->shards->n + p->n_files + 1, sizeof *files);
    if (!files) {
        rc = no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < p->shards->n; i++)
        files[n++] = (struct tvm_record_file){p->shards->file_names[i],
                                              p->shards->file_bytes[i]};
    if (p->shards->index_json)
        files[n++] =
            (struct tvm_record_file){INDEX_FILE, p->shards->index_bytes};
    for (size_t i = 0; i < p->n_files; i++)
        files[n++] = (struct tvm_record_file){p->files[i].name, p->files[i].n};
    text = tvm_record_make(p, totals, s->base.calibration, files, n);
    if (!text) {
        rc = no_memory(err);
        goto out;
    }
    rc = write_file(s, RECORD_FILE, text, strlen(text), err);
out:
    tv_free(text);
    tv_free(files);
    return rc;
}

static enum tv_err sync_shards(struct dir_sink *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    int fd = -1;

    for (size_t i = 0; i < n_shards(s); i++) {
        TV_TRY(shard_fd(s, i, &fd, err));
        if (s->sync && tv_sys()->fdatasync(fd) != 0) {
            rc = tv_error_sys(err, errno, "cannot write %s to disk",
                              s->base.plan->shards->file_names[i]);
            goto out;
        }
        TV_TRY(close_shard(s, i, err));
    }
out:
    return rc;
}

static enum tv_err dir_finish(struct tvm_sink *sink,
                              const struct tvm_totals *totals,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct dir_sink *s = dir_of(sink);
    const struct tv_shards *shards = sink->plan->shards;

    TV_TRY(sync_shards(s, err));
    s->publishing = true;
    TV_TRY(put_state(s, s->journal, err));
    if (s->replace)
        TV_TRY(remove_stale(s, err));
    for (size_t i = 0; i < n_shards(s); i++)
        TV_TRY(rename_file(s->dir, shards->file_names[i], s->out,
                           shards->file_names[i], err));
    if (s->sync) {
        TV_TRY(tv_dir_sync(s->dir, err));
        TV_TRY(tv_dir_sync(s->out, err));
    }
    TV_TRY(write_side_files(s, err));
    TV_TRY(write_record(s, totals, err));
    tv_store_close(s->journal);
    s->journal = NULL;
    TV_TRY(tv_dir_remove(s->dir, err));
    rc = write_config(s, err);
out:
    return rc;
}

/* ---- opening ------------------------------------------------------------- */

static void dir_close(struct tvm_sink *sink)
{
    struct dir_sink *s = dir_of(sink);

    for (size_t i = 0; s->fd && i < n_shards(s); i++)
        if (s->fd[i] >= 0)
            (void)tv_sys()->close(s->fd[i]);
    tv_store_close(s->journal);
    if (s->fresh && s->lock_fd >= 0 && tv_dir_remove(s->dir, NULL) == TV_OK &&
        s->made_out)
        (void)tv_sys()->rmdir(s->out);
    /* Nothing is left to go on with: published, or undone. */
    if (s->pins && !tv_path_exists(s->dir))
        (void)!tvm_pins_drop(s->base.plan->options.store, s->pins, NULL);
    if (s->lock_fd >= 0)
        (void)tv_sys()->close(s->lock_fd);
    (void)pthread_mutex_destroy(&s->mutex);
    tv_free(s->pins);
    tv_free(s->n_left);
    tv_free(s->touched);
    tv_free(s->fd);
    tv_free(s->dir);
    tv_free(s->out);
    tv_free(s->base.calibration);
    tv_free(s->base.done);
    tv_free(s);
}

static const struct tvm_sink_ops dir_ops = {
    .write = dir_write,
    .commit = dir_commit,
    .note = dir_note,
    .finish = dir_finish,
    .close = dir_close,
};

/* Decides with the lock held whether this is a new merge, one to go on with, or
 * one that is complete. */
static enum tv_err meet_state(struct dir_sink *s, bool *resume,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const bool force = s->base.plan->options.force;
    struct tvm_record record = {.n_files = 0};
    bool found = false;

    *resume = false;
    rc = load_record(s, &found, &record, err);
    if (rc == TV_E_CORRUPT && force) {
        TV_TRY(remove_file(s->out, RECORD_FILE, err));
        rc = TV_OK;
    }
    TV_TRY(rc);
    if (found) {
        TV_TRY(meet_record(s, &record, err));
        /* A run that was killed while tidying up. */
        TV_TRY(clear_state(s, PREVIOUS, err));
        s->replace = true;
        goto out;
    }
    TV_TRY(probe(s->dir, JOURNAL_DIR, &found, err));
    if (found) {
        rc = open_journal(s, false, err);
        if (rc == TV_OK)
            rc = read_journal(s, err);
        *resume = rc == TV_OK;
        if (rc == TV_OK || !force || rc == TV_E_NOMEM)
            goto out;
        /* The older state goes, finished or not. */
        tv_store_close(s->journal);
        s->journal = NULL;
        rc = clear_state(s, PREVIOUS, err);
        s->replace = true;
        goto out;
    }
    TV_TRY(clear_state(s, PREVIOUS, err));
    TV_TRY(probe(s->dir, PREVIOUS, &found, err));
    if (force || found)
        s->replace = true;
    else
        rc = meet_files(s, err);
out:
    tvm_record_free(&record);
    return rc;
}

/* The names of OUT and of .tvmerge in it are as durable as what they hold. */
static enum tv_err sync_parents(struct dir_sink *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *parent = NULL;

    if (!s->sync)
        return TV_OK;
    TV_TRY(tv_dir_sync(s->out, err));
    if (!s->made_out)
        goto out;
    parent = tv_path_join(s->out, "..");
    rc = parent ? tv_dir_sync(parent, err) : no_memory(err);
out:
    tv_free(parent);
    return rc;
}

static enum tv_err prepare(struct dir_sink *s,
                           const struct tvm_run_hooks *hooks,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;
    bool resume = false;
    bool *ok = NULL;

    TV_TRY(meet_state(s, &resume, err));
    if (s->add_config) {
        TV_TRY(tv_dir_remove(s->dir, err));
        TV_TRY(write_config(s, err));
    }
    if (s->base.already_done)
        goto out;
    ok = tv_calloc(n_shards(s) + 1, sizeof *ok);
    if (!ok) {
        rc = no_memory(err);
        goto out;
    }
    s->fresh = !resume && !s->replace;
    if (!resume) {
        TV_TRY(make_journal(s, err));
        TV_TRY(open_journal(s, false, err));
        TV_TRY(sync_parents(s, err));
    }
    TV_TRY(tvm_pins_put(p, s->out, err, &s->pins));
    TV_TRY(prepare_shards(s, ok, err));
    s->fresh = false;
    if (s->publishing) {
        s->publishing = false;
        TV_TRY(put_state(s, s->journal, err));
    }
    if (resume) {
        TV_TRY(read_done(s, ok, err));
        TV_TRY(recheck(s, hooks, err));
    }
    for (size_t i = 0; i < p->n_tensors; i++)
        if (!s->base.done[i].done)
            s->n_left[p->tensors[i].shard]++;
out:
    tv_free(ok);
    return rc;
}

/* Refuses a directory of somebody else without leaving a trace in it. */
static enum tv_err look_before(struct dir_sink *s, bool *had_state,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    bool found = false;

    rc = tv_out_dir_check(s->out, err, &found);
    if (rc == TV_E_EXISTS && file_bytes(s->out, "data.mdb") >= 0)
        tv_error_hint(err,
                      "'--into NAME --store %s' in place of OUT merges into an "
                      "object of it",
                      s->out);
    TV_TRY(rc);
    s->made_out = !found;
    if (s->made_out)
        goto out;
    TV_TRY(probe(s->out, STATE_DIR, had_state, err));
    TV_TRY(probe(s->out, RECORD_FILE, &found, err));
    if (!s->base.plan->options.force && !*had_state && !found)
        rc = meet_files(s, err);
out:
    return rc;
}

static enum tv_err dir_new(struct tvm_plan *plan, struct tv_error *err,
                           struct dir_sink **out)
{
    struct dir_sink *s = tv_calloc(1, sizeof *s);

    *out = NULL;
    if (!s)
        return no_memory(err);
    s->base.ops = &dir_ops;
    s->base.plan = plan;
    s->base.commit_bytes =
        plan->options.group_bytes ? plan->options.group_bytes : COMMIT_BYTES;
    s->lock_fd = -1;
    s->sync = plan->options.sync;
    (void)pthread_mutex_init(&s->mutex, NULL);
    s->out = tv_strdup(plan->options.out_dir);
    s->dir = tv_path_join(plan->options.out_dir, STATE_DIR);
    s->base.done = tv_calloc(plan->n_tensors + 1, sizeof *s->base.done);
    s->fd = tv_alloc((n_shards(s) + 1) * sizeof *s->fd);
    s->touched = tv_calloc(n_shards(s) + 1, sizeof *s->touched);
    s->n_left = tv_calloc(n_shards(s) + 1, sizeof *s->n_left);
    for (size_t i = 0; s->fd && i < n_shards(s); i++)
        s->fd[i] = -1;
    if (!s->out || !s->dir || !s->base.done || !s->fd || !s->touched ||
        !s->n_left) {
        dir_close(&s->base);
        return no_memory(err);
    }
    *out = s;
    return TV_OK;
}

enum tv_err tvm_sink_dir_open(struct tvm_plan *plan,
                              const struct tvm_run_hooks *hooks,
                              struct tv_error *err, struct tvm_sink **out)
{
    enum tv_err rc = TV_OK;
    struct dir_sink *s = NULL;
    bool had_state = false;

    *out = NULL;
    TV_TRY(dir_new(plan, err, &s));
    TV_TRY(look_before(s, &had_state, err));
    if (s->made_out)
        TV_TRY(tv_dir_make(s->out, err));
    TV_TRY(take_lock(s, hooks, err));
    rc = prepare(s, hooks, err);
    /* Nothing of ours was here and nothing has begun: leave it as it was. */
    if ((rc != TV_OK && !had_state && !s->journal && !s->replace) ||
        s->base.already_done)
        s->fresh = true;
    TV_TRY(rc);
    *out = &s->base;
    s = NULL;
out:
    if (s)
        dir_close(&s->base);
    return rc;
}

/* LOCKED while another run holds OUT. */
static enum tv_err check_lock(const struct dir_sink *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(s->dir, LOCK_FILE);
    char holder[160];

    if (!path)
        return no_memory(err);
    const int fd = tv_sys()->open(path, O_RDONLY, 0);
    if (fd >= 0 && flock(fd, LOCK_SH | LOCK_NB) != 0) {
        tv_lock_holder(fd, holder, sizeof holder);
        rc = in_use(s, holder, err);
    }
    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_free(path);
    return rc;
}

enum tv_err tvm_sink_dir_check(struct tvm_plan *plan, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const bool force = plan->options.force;
    struct dir_sink *s = NULL;
    struct tvm_record record = {.n_files = 0};
    bool had_state = false;
    bool found = false;
    bool no_config = false;

    TV_TRY(dir_new(plan, err, &s));
    TV_TRY(look_before(s, &had_state, err));
    if (s->made_out)
        goto out;
    TV_TRY(check_lock(s, err));
    /* Whatever is there otherwise. */
    if (force)
        goto out;
    TV_TRY(load_record(s, &found, &record, err));
    if (found) {
        rc = judge_record(s, &record, &no_config, err);
        goto out;
    }
    TV_TRY(probe(s->dir, JOURNAL_DIR, &found, err));
    if (found) {
        TV_TRY(open_journal(s, true, err));
        rc = read_journal(s, err);
        goto out;
    }
    TV_TRY(probe(s->dir, PREVIOUS, &found, err));
    if (!found)
        rc = meet_files(s, err);
out:
    tvm_record_free(&record);
    if (s)
        dir_close(&s->base);
    return rc;
}

void tvm_sink_close(struct tvm_sink *s)
{
    if (s)
        s->ops->close(s);
}
