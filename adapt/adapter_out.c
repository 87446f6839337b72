/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_out.c - an adapter directory, published all at once.
 *
 * Tensors are appended to OUT/.tvmerge/data as they come, because ranks may be
 * known only then; finishing lays them out in name order, copies them behind
 * the header into .tvmerge/adapter_model.safetensors and renames.
 */
#include "tv/adapter_out.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>

#include <jansson.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/format.h"
#include "tv/lock.h"
#include "tv/sys.h"
#include "tv/text.h"

#define WEIGHTS  "adapter_model.safetensors"
#define CONFIG   "adapter_config.json"
#define RECORD   "tvmerge.json"
#define STATE    ".tvmerge"
#define LOCK     "lock"
#define PREVIOUS "previous.json" /* of a merge that is replaced, in STATE */
#define PIECE    (1u << 20)

#ifndef TV_VERSION
#define TV_VERSION "unknown"
#endif

struct tensor {
    char *name;
    uint64_t shape[TV_RANK_MAX];
    unsigned rank;
    enum tv_dtype dtype;
    uint64_t at, bytes; /* in the data file */
    struct tv_hash checksum;
};

struct side { /* a file beside the weights */
    char *name;
    uint64_t bytes;
};

struct tva_out {
    char *dir, *work, *data_path;
    int lock, data;
    bool sync;
    bool made_dir; /* OUT was not there */
    bool fresh;    /* nothing was in it: undone when it is not finished */
    struct tv_hash plan;
    struct tensor *tensors;
    size_t n, cap;
    struct side *sides;
    size_t n_sides;
    uint64_t end;
};

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory");
}

/* ---- a finished directory ------------------------------------------------ */

struct record {  /* what a merge says of its output */
    json_t *doc; /* NULL: there is none */
    struct tv_hash plan;
};

static enum tv_err record_read(const char *dir, const char *name,
                               struct record *r, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(dir, name);
    char *text = NULL;
    size_t n = 0;
    const char *plan = NULL;

    *r = (struct record){.doc = NULL};
    if (!path)
        return no_memory(err);
    if (!tv_path_exists(path))
        goto out;
    TV_TRY(tv_file_read(path, 64u << 20, err, &text, &n));
    TV_TRY(tv_json_parse(text, n, path, err, &r->doc));
    plan = json_string_value(json_object_get(r->doc, "plan_hash"));
    if (!plan || tv_hash_from_hex(plan, &r->plan) != 0)
        rc =
            tv_error_set(err, TV_E_CORRUPT, "%s is no record of a merge", path);
out:
    if (rc != TV_OK) {
        json_decref(r->doc);
        r->doc = NULL;
    }
    tv_free(text);
    tv_free(path);
    return rc;
}

/* The i-th file that it lists, NULL behind the last one. Names that would lead
 * out of the directory are none. */
static const char *record_file(const struct record *r, size_t i,
                               uint64_t *bytes)
{
    const json_t *f = json_array_get(json_object_get(r->doc, "files"), i);
    const char *name = json_string_value(json_object_get(f, "name"));

    if (bytes)
        *bytes = (uint64_t)json_integer_value(json_object_get(f, "bytes"));
    if (f && (!name || *name == '\0' || *name == '.' || strchr(name, '/')))
        return "";
    return name;
}

static bool holds(const char *dir, const char *name)
{
    char *path = tv_path_join(dir, name);
    const bool yes = path && tv_path_exists(path);

    tv_free(path);
    return yes;
}

/* First file of the record that is not there as it was, or NULL. Records of
 * adapters once listed nothing. */
static const char *missing_file(const char *dir, const struct record *r)
{
    const char *name = NULL;
    uint64_t bytes = 0;

    if (!record_file(r, 0, NULL))
        return !holds(dir, WEIGHTS)  ? WEIGHTS
               : !holds(dir, CONFIG) ? CONFIG
                                     : NULL;
    for (size_t i = 0; (name = record_file(r, i, &bytes)) != NULL; i++) {
        char *path = *name ? tv_path_join(dir, name) : NULL;
        struct stat st;
        const bool same = path && tv_sys()->stat(path, &st) == 0 &&
                          S_ISREG(st.st_mode) && (uint64_t)st.st_size == bytes;
        tv_free(path);
        if (!same && *name)
            return name;
    }
    return NULL;
}

enum tv_err tva_out_apart(const char *dir, const char *input_dir,
                          const char *label, struct tv_error *err)
{
    struct stat out, in;

    if (!input_dir || tv_sys()->stat(dir, &out) != 0 ||
        tv_sys()->stat(input_dir, &in) != 0 || out.st_dev != in.st_dev ||
        out.st_ino != in.st_ino)
        return TV_OK;
    return tv_error_set(err, TV_E_INPUT,
                        "OUT '%s' is the directory of the input '%s'", dir,
                        label);
}

static enum tv_err in_use(const char *dir, int fd, struct tv_error *err)
{
    char holder[160];

    tv_lock_holder(fd, holder, sizeof holder);
    (void)tv_error_set(err, TV_E_LOCKED, "%s is being written by %s", dir,
                       holder);
    tv_error_hint(err, "wait until it ends");
    return TV_E_LOCKED;
}

/* LOCKED while another run holds it. */
static enum tv_err check_lock(const char *dir, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_asprintf("%s/" STATE "/" LOCK, dir);

    if (!path)
        return no_memory(err);
    const int fd = tv_sys()->open(path, O_RDONLY | O_CLOEXEC, 0);
    if (fd >= 0 && flock(fd, LOCK_SH | LOCK_NB) != 0)
        rc = in_use(dir, fd, err);
    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_free(path);
    return rc;
}

/* What a finished output says of this one: it is this one, or in its way, or
 * (nothing set) unfinished. */
static enum tv_err meet_record(const char *dir, const struct record *r,
                               struct tv_hash plan, struct tva_out_done *done,
                               struct tv_error *err)
{
    const char *digest = json_string_value(json_object_get(r->doc, "digest"));
    const char *missing = missing_file(dir, r);
    const bool begun = holds(dir, STATE);

    if (!tv_hash_equal(r->plan, plan)) {
        if (begun && missing) /* another --force was killed here */
            return TV_OK;
        (void)tv_error_set(err, TV_E_CHANGED,
                           "%s holds the result of another recipe, options or "
                           "inputs",
                           dir);
        tv_error_hint(err, "--force replaces it");
        return TV_E_CHANGED;
    }
    if (!missing) {
        if (!digest || tv_hash_from_hex(digest, &done->digest) != 0)
            return tv_error_set(err, TV_E_CORRUPT,
                                "%s/" RECORD " has no digest", dir);
        done->complete = true;
        done->n_tensors =
            (size_t)json_integer_value(json_object_get(r->doc, "n_tensors"));
        return TV_OK;
    }
    if (begun)
        return TV_OK;
    (void)tv_error_set(err, TV_E_EXISTS,
                       "%s holds this adapter, but %s is missing or has "
                       "another size",
                       dir, missing);
    tv_error_hint(err, "--force makes it again");
    return TV_E_EXISTS;
}

/* May the directory be written? */
static enum tv_err check_place(const char *dir, struct tv_hash plan, bool force,
                               struct tva_out_done *done, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct record r = {.doc = NULL};
    char **names = NULL;
    size_t n = 0;
    bool exists = false;

    *done = (struct tva_out_done){.complete = false};
    TV_TRY(tv_out_dir_check(dir, err, &exists));
    if (!exists)
        goto out;
    TV_TRY(check_lock(dir, err));
    if (force)
        goto out;
    TV_TRY(record_read(dir, RECORD, &r, err));
    if (r.doc)
        TV_TRY(meet_record(dir, &r, plan, done, err));
    if (done->complete)
        goto out;
    if (holds(dir, STATE "/journal")) {
        rc = tv_error_set(err, TV_E_CHANGED,
                          "%s holds an unfinished merge of models", dir);
        tv_error_hint(err, "repeat the earlier command to finish it, or "
                           "--force to start anew");
        goto out;
    }
    if (holds(dir, STATE)) /* an interrupted run like this one */
        goto out;
    TV_TRY(tv_dir_list(dir, err, &names, &n));
    if (n > 0) {
        rc = tv_error_set(err, TV_E_EXISTS, "%s is not empty (it holds %s)",
                          dir, names[0]);
        tv_error_hint(err, "choose another directory, or use --force");
    }
out:
    tv_dir_list_free(names, n);
    json_decref(r.doc);
    return rc;
}

enum tv_err tva_out_check(const char *dir, struct tv_hash plan, bool force,
                          struct tv_error *err)
{
    struct tva_out_done done;
    char *there = NULL;
    enum tv_err rc = TV_OK;

    TV_TRY(check_place(dir, plan, force, &done, err));
    if (done.complete)
        goto out;
    there = tv_path_existing(dir);
    if (!there) {
        rc = no_memory(err);
        goto out;
    }
    rc = tv_dir_check_writable(there, err);
    if (rc != TV_OK)
        tv_error_context(err, "OUT '%s'", dir);
out:
    tv_free(there);
    return rc;
}

/* A run that was killed after its last rename left its state behind. */
static enum tv_err sweep(const char *dir, struct tv_error *err)
{
    char *work = tv_path_join(dir, STATE);
    enum tv_err rc = TV_OK;

    if (!work)
        return no_memory(err);
    if (tv_path_exists(work))
        rc = tv_dir_remove(work, err);
    tv_free(work);
    return rc;
}

static bool is_empty(const char *dir)
{
    char **names = NULL;
    size_t n = 0;
    const bool yes = tv_dir_list(dir, NULL, &names, &n) == TV_OK && n == 0;

    tv_dir_list_free(names, n);
    return yes;
}

/* ---- opening ------------------------------------------------------------- */

static enum tv_err take_lock(tva_out *o, struct tv_error *err)
{
    char *path = tv_path_join(o->work, LOCK);

    if (!path)
        return no_memory(err);
    o->lock = tv_sys()->open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (o->lock < 0) {
        const enum tv_err rc = tv_error_sys(err, errno, "cannot open %s", path);
        tv_free(path);
        return rc;
    }
    tv_free(path);
    if (flock(o->lock, LOCK_EX | LOCK_NB) != 0) {
        o->fresh = false; /* another's */
        return in_use(o->dir, o->lock, err);
    }
    tv_lock_sign(o->lock, "tvmerge");
    return TV_OK;
}

enum tv_err tva_out_open(const char *dir, struct tv_hash plan, bool force,
                         bool sync, struct tva_out_done *done,
                         struct tv_error *err, tva_out **out)
{
    enum tv_err rc = TV_OK;
    tva_out *o = NULL;

    *out = NULL;
    TV_TRY(check_place(dir, plan, force, done, err));
    if (done->complete) {
        rc = sweep(dir, err);
        goto out;
    }
    o = tv_calloc(1, sizeof *o);
    if (!o) {
        rc = no_memory(err);
        goto out;
    }
    o->lock = o->data = -1;
    o->sync = sync;
    o->plan = plan;
    o->dir = tv_strdup(dir);
    o->work = tv_path_join(dir, STATE);
    o->data_path = o->work ? tv_path_join(o->work, "data") : NULL;
    if (!o->dir || !o->work || !o->data_path) {
        rc = no_memory(err);
        goto out;
    }
    o->made_dir = !tv_path_exists(dir);
    o->fresh = o->made_dir || is_empty(dir);
    TV_TRY(tv_dir_make(o->work, err));
    TV_TRY(take_lock(o, err));
    o->data = tv_sys()->open(o->data_path,
                             O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (o->data < 0) {
        rc = tv_error_sys(err, errno, "cannot write %s", o->data_path);
        goto out;
    }
    *out = o;
    o = NULL;
out:
    tva_out_close(o);
    return rc;
}

static void undo(const tva_out *o)
{
    for (size_t i = 0; i < o->n_sides; i++) {
        char *path = tv_path_join(o->dir, o->sides[i].name);
        if (path)
            (void)tv_sys()->unlink(path);
        tv_free(path);
    }
    if (tv_dir_remove(o->work, NULL) == TV_OK && o->made_dir)
        (void)tv_sys()->rmdir(o->dir);
}

void tva_out_close(tva_out *o)
{
    if (!o)
        return;
    if (o->fresh && o->lock >= 0)
        undo(o);
    for (size_t i = 0; i < o->n; i++)
        tv_free(o->tensors[i].name);
    tv_free(o->tensors);
    for (size_t i = 0; i < o->n_sides; i++)
        tv_free(o->sides[i].name);
    tv_free(o->sides);
    if (o->data >= 0)
        (void)tv_sys()->close(o->data);
    if (o->lock >= 0)
        (void)tv_sys()->close(o->lock);
    tv_free(o->data_path);
    tv_free(o->work);
    tv_free(o->dir);
    tv_free(o);
}

uint64_t tva_out_bytes(const tva_out *o)
{
    return o->end;
}

/* ---- tensors ------------------------------------------------------------- */

static enum tv_err grow(tva_out *o, struct tv_error *err)
{
    const size_t cap = o->cap ? 2 * o->cap : 64;
    struct tensor *more = NULL;

    if (o->n < o->cap)
        return TV_OK;
    more = tv_realloc(o->tensors, cap * sizeof *more);
    if (!more)
        return no_memory(err);
    o->tensors = more;
    o->cap = cap;
    return TV_OK;
}

/* Writes the values and takes the checksum over whole leaves. */
static enum tv_err put_values(tva_out *o, const struct tvk_table *k,
                              struct tensor *t, uint64_t n_elems,
                              const float *data, struct tv_error *err)
{
    const size_t each = tv_dtype_bits(t->dtype) / 8u;
    const size_t n_leaves = (size_t)tv_leaf_count(t->bytes);
    struct tv_hash *leaves = tv_calloc(n_leaves + 1, sizeof *leaves);
    unsigned char *buf = tv_alloc_aligned(TV_LEAF_BYTES);
    enum tv_err rc = TV_OK;

    if (!leaves || !buf) {
        rc = no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < n_leaves; i++) {
        const uint64_t first = (uint64_t)i * (TV_LEAF_BYTES / each);
        const uint64_t left = n_elems - first;
        const size_t n =
            left < TV_LEAF_BYTES / each ? (size_t)left : TV_LEAF_BYTES / each;
        tvk_from_f32(k, t->dtype, buf, data + first, n);
        leaves[i] = tv_hash128(buf, n * each);
        TV_TRY(tv_pwrite_all(o->data, buf, n * each, t->at + first * each,
                             o->data_path, err));
    }
    t->checksum = tv_leaves_checksum(leaves, n_leaves);
out:
    tv_free(buf);
    tv_free(leaves);
    return rc;
}

enum tv_err tva_out_tensor(tva_out *o, const struct tvk_table *k,
                           const char *name, unsigned rank,
                           const uint64_t *shape, enum tv_dtype dtype,
                           const float *data, struct tv_error *err)
{
    enum tv_err rc = grow(o, err);
    uint64_t n = 1;
    struct tensor *t = NULL;

    if (rc != TV_OK)
        return rc;
    t = &o->tensors[o->n];
    *t = (struct tensor){.rank = rank, .dtype = dtype, .at = o->end};
    for (unsigned d = 0; d < rank; d++) {
        t->shape[d] = shape[d];
        if (!tv_mul_u64(n, shape[d], &n))
            return tv_error_set(err, TV_E_INTERNAL, "%s is too large", name);
    }
    TV_TRY(tv_dtype_bytes(dtype, n, &t->bytes, err));
    t->name = tv_strdup(name);
    if (!t->name)
        return no_memory(err);
    o->n++;
    o->end += t->bytes;
    rc = put_values(o, k, t, n, data, err);
out:
    return rc;
}

/* Remembers a file for the record. */
static enum tv_err add_side(tva_out *o, const char *name, uint64_t bytes,
                            struct tv_error *err)
{
    struct side *more = NULL;

    for (size_t i = 0; i < o->n_sides; i++)
        if (strcmp(o->sides[i].name, name) == 0) {
            o->sides[i].bytes = bytes;
            return TV_OK;
        }
    more = tv_realloc(o->sides, (o->n_sides + 1) * sizeof *more);
    if (!more)
        return no_memory(err);
    o->sides = more;
    more[o->n_sides] = (struct side){.name = tv_strdup(name), .bytes = bytes};
    if (!more[o->n_sides].name)
        return no_memory(err);
    o->n_sides++;
    return TV_OK;
}

static enum tv_err write_file(const tva_out *o, const char *name,
                              const char *data, size_t n, struct tv_error *err)
{
    char *path = tv_path_join(o->dir, name);
    enum tv_err rc = TV_OK;

    if (!path)
        return no_memory(err);
    rc = tv_file_write_atomic(path, data, n, o->sync, err);
    tv_free(path);
    return rc;
}

static enum tv_err remove_file(const tva_out *o, const char *name,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(o->dir, name);

    if (!path)
        return no_memory(err);
    if (tv_sys()->unlink(path) != 0 && errno != ENOENT)
        rc = tv_error_sys(err, errno, "cannot remove %s", path);
    tv_free(path);
    return rc;
}

/* What is there loads no more, before any of its files changes: a mixture of
 * two outputs must not look like one. */
static enum tv_err withdraw(const tva_out *o, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    TV_TRY(remove_file(o, CONFIG, err));
    TV_TRY(remove_file(o, "config.json", err));
    if (o->sync)
        TV_TRY(tv_dir_sync(o->dir, err));
out:
    return rc;
}

enum tv_err tva_out_file(tva_out *o, const char *name, const char *data,
                         size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    TV_TRY(withdraw(o, err));
    TV_TRY(add_side(o, name, n, err));
    rc = write_file(o, name, data, n, err);
out:
    return rc;
}

/* ---- publishing ---------------------------------------------------------- */

static int by_layer(const void *a, const void *b)
{
    return tv_name_compare(((const struct tensor *)a)->name,
                           ((const struct tensor *)b)->name);
}

static int by_bytes(const void *a, const void *b)
{
    return strcmp((*(const struct tensor *const *)a)->name,
                  (*(const struct tensor *const *)b)->name);
}

static enum tv_err digest_of(const tva_out *o, struct tv_hash *out,
                             struct tv_error *err)
{
    const struct tensor **order = tv_calloc(o->n + 1, sizeof *order);
    tv_hasher *h = NULL;
    enum tv_err rc = TV_OK;

    if (!order) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(tv_hasher_open(err, &h));
    for (size_t i = 0; i < o->n; i++)
        order[i] = &o->tensors[i];
    qsort(order, o->n, sizeof *order, by_bytes);
    for (size_t i = 0; i < o->n; i++)
        tv_digest_add(h, order[i]->name, order[i]->dtype, order[i]->shape,
                      order[i]->rank, order[i]->checksum);
    *out = tv_hasher_value(h);
out:
    tv_hasher_close(h);
    tv_free(order);
    return rc;
}

static enum tv_err copy_tensor(const tva_out *o, const struct tensor *t, int fd,
                               uint64_t to, const char *path,
                               unsigned char *buf, struct tv_error *err)
{
    for (uint64_t at = 0; at < t->bytes;) {
        const size_t n =
            t->bytes - at < PIECE ? (size_t)(t->bytes - at) : PIECE;
        const ssize_t got =
            tv_sys()->pread(o->data, buf, n, (off_t)(t->at + at));
        enum tv_err rc = TV_OK;

        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return tv_error_sys(err, got < 0 ? errno : EIO, "cannot read %s",
                                o->data_path);
        rc = tv_pwrite_all(fd, buf, (size_t)got, to + at, path, err);
        if (rc != TV_OK)
            return rc;
        at += (uint64_t)got;
    }
    return TV_OK;
}

static enum tv_err write_weights(tva_out *o, const char *path,
                                 const struct tv_st_entry *e,
                                 const struct tv_shards *s,
                                 struct tv_error *err)
{
    unsigned char *buf = tv_alloc(PIECE);
    enum tv_err rc = TV_OK;
    const int fd =
        tv_sys()->open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);

    if (fd < 0 || !buf) {
        rc = buf ? tv_error_sys(err, errno, "cannot write %s", path)
                 : no_memory(err);
        goto out;
    }
    TV_TRY(tv_pwrite_all(fd, s->headers[0], s->header_bytes[0], 0, path, err));
    for (size_t i = 0; i < o->n; i++)
        TV_TRY(copy_tensor(o, &o->tensors[i], fd, e[i].offset, path, buf, err));
    if (o->sync && tv_sys()->fsync(fd) != 0)
        rc = tv_error_sys(err, errno, "cannot sync %s", path);
out:
    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_free(buf);
    return rc;
}

static enum tv_err publish_weights(tva_out *o, struct tv_error *err)
{
    struct tv_st_entry *e = tv_calloc(o->n + 1, sizeof *e);
    struct tv_shards *s = NULL;
    char *from = tv_path_join(o->work, WEIGHTS);
    char *to = tv_path_join(o->dir, WEIGHTS);
    enum tv_err rc = TV_OK;

    if (!e || !from || !to) {
        rc = no_memory(err);
        goto out;
    }
    qsort(o->tensors, o->n, sizeof *o->tensors, by_layer);
    for (size_t i = 0; i < o->n; i++)
        e[i] = (struct tv_st_entry){.name = o->tensors[i].name,
                                    .dtype = o->tensors[i].dtype,
                                    .rank = o->tensors[i].rank,
                                    .shape = o->tensors[i].shape,
                                    .bytes = o->tensors[i].bytes};
    /* PEFT reads one file. */
    TV_TRY(tv_shards_plan(e, o->n, "adapter_model", UINT64_MAX / 2, err, &s));
    TV_TRY(write_weights(o, from, e, s, err));
    if (tv_sys()->rename(from, to) != 0)
        rc = tv_error_sys(err, errno, "cannot rename %s", from);
    else
        rc = add_side(o, WEIGHTS, s->file_bytes[0], err);
out:
    tv_shards_free(s);
    tv_free(to);
    tv_free(from);
    tv_free(e);
    return rc;
}

/* ---- what the directory held before -------------------------------------- */

static bool is_ours(const tva_out *o, const char *name)
{
    for (size_t i = 0; i < o->n_sides; i++)
        if (strcmp(o->sides[i].name, name) == 0)
            return true;
    return strcmp(name, WEIGHTS) == 0 || strcmp(name, CONFIG) == 0;
}

/* Files that an earlier merge made, as its record lists them. A damaged list is
 * no reason to stop: it only says what to tidy. */
static enum tv_err remove_listed(const tva_out *o, const char *dir,
                                 const char *record, struct tv_error *err)
{
    struct record r = {.doc = NULL};
    const char *name = NULL;
    enum tv_err rc = TV_OK;

    if (record_read(dir, record, &r, NULL) != TV_OK)
        return TV_OK;
    for (size_t i = 0; (name = record_file(&r, i, NULL)) != NULL; i++)
        if (*name && !is_ours(o, name))
            TV_TRY(remove_file(o, name, err));
out:
    json_decref(r.doc);
    return rc;
}

/* What --force replaces: the files that an earlier merge made and the weights
 * of whatever model or adapter was there. */
static enum tv_err remove_stale(const tva_out *o, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char **names = NULL;
    size_t n = 0;

    TV_TRY(remove_listed(o, o->dir, RECORD, err));
    TV_TRY(remove_listed(o, o->work, PREVIOUS, err));
    TV_TRY(tv_dir_list(o->dir, err, &names, &n));
    for (size_t i = 0; i < n; i++)
        if (tv_out_is_weights(names[i]) && !is_ours(o, names[i]))
            TV_TRY(remove_file(o, names[i], err));
out:
    tv_dir_list_free(names, n);
    return rc;
}

/* ---- the record ---------------------------------------------------------- */

static json_t *files_json(const tva_out *o)
{
    json_t *list = json_array();

    for (size_t i = 0; i < o->n_sides; i++)
        (void)json_array_append_new(
            list, json_pack("{s:s, s:I}", "name", o->sides[i].name, "bytes",
                            (json_int_t)o->sides[i].bytes));
    return list;
}

static enum tv_err put_record(tva_out *o, const struct tva_out_done *done,
                              struct tv_error *err)
{
    char plan[33], digest[33];
    enum tv_err rc = TV_OK;
    char *text = NULL, *line = NULL;
    json_t *doc = json_pack(
        "{s:s, s:s, s:s, s:s, s:i, s:I, s:I, s:i, s:i, s:o, s:{}}", "schema",
        "tvmerge.out/1", "plan_hash", tv_hash_hex(o->plan, plan), "version",
        TV_VERSION, "digest", tv_hash_hex(done->digest, digest), "seed", 0,
        "n_tensors", (json_int_t)o->n, "bytes_total", (json_int_t)o->end,
        "n_nonfinite_in", 0, "n_nonfinite_out", 0, "files", files_json(o),
        "identity");

    text = doc ? tv_json_text(doc, JSON_INDENT(2)) : NULL;
    line = text ? tv_asprintf("%s\n", text) : NULL;
    rc = line ? write_file(o, RECORD, line, strlen(line), err) : no_memory(err);
    tv_free(line);
    tv_free(text);
    json_decref(doc);
    return rc;
}

enum tv_err tva_out_finish(tva_out *o, const char *config, size_t n_config,
                           struct tva_out_done *done, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    TV_TRY(withdraw(o, err));
    done->n_tensors = o->n;
    TV_TRY(digest_of(o, &done->digest, err));
    TV_TRY(publish_weights(o, err));
    TV_TRY(add_side(o, CONFIG, n_config, err));
    TV_TRY(remove_stale(o, err));
    TV_TRY(put_record(o, done, err));
    if (o->sync)
        TV_TRY(tv_dir_sync(o->dir, err));
    TV_TRY(write_file(o, CONFIG, config, n_config, err));
    o->fresh = false;
    TV_TRY(tv_dir_remove(o->work, err));
    if (o->sync)
        TV_TRY(tv_dir_sync(o->dir, err));
out:
    return rc;
}
