/* SPDX-License-Identifier: Apache-2.0 */
/*
 * export.c - writes an object of a store as a directory that transformers or
 * PEFT load.
 *
 * Every file is written as NAME.partial first. When all of them are complete
 * (and synced), they are renamed, the configuration last: a directory without
 * config.json is not a model, so nobody loads half of one. Every leaf is
 * compared with its checksum before its bytes are written.
 */
#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>

#include "hf_dir.h"
#include "json_util.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/sys.h"

static const char partial[] = ".partial";

struct export
{
    tv_store *store;
    const char *name;
    const char *dir;
    tv_input *in;
    struct tv_transfer *t;
    struct tv_error *err;
    struct tv_st_entry *entries;
    size_t n_entries;
    struct tv_shards *shards;
    const char *stem;
    char *index; /* name of the index file */
    bool made_dir;
    uint64_t done, total;
};

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory during export");
}

static bool ends_with(const char *s, const char *suffix)
{
    const size_t n = strlen(s);
    const size_t k = strlen(suffix);

    return n >= k && strcmp(s + n - k, suffix) == 0;
}

static bool is_side(const char *name)
{
    size_t n = 0;
    const char *const *names = tv_side_names(&n);

    for (size_t i = 0; i < n; i++) {
        if (strcmp(names[i], name) == 0)
            return true;
    }
    return false;
}

/* What a killed export leaves behind. */
static bool is_leftover(const char *name)
{
    char base[256];
    const size_t n = strlen(name);

    if (!ends_with(name, partial) || n >= sizeof base)
        return false;
    memcpy(base, name, n - (sizeof partial - 1));
    base[n - (sizeof partial - 1)] = '\0';
    return tv_out_is_weights(base) || is_side(base);
}

/* ---- the directory
 * ------------------------------------------------------------- */

static enum tv_err unlink_in(const struct export *x, const char *name)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(x->dir, name);

    if (path == NULL)
        return no_memory(x->err);
    if (tv_sys()->unlink(path) != 0 && errno != ENOENT)
        rc = tv_error_sys(x->err, errno, "cannot remove %s", path);
    tv_free(path);
    return rc;
}

static enum tv_err prepare_dir(struct export *x)
{
    enum tv_err rc = TV_OK;
    char **names = NULL;
    size_t n = 0;
    bool exists = false;

    TV_TRY(tv_out_dir_check(x->dir, x->err, &exists));
    if (!exists) {
        TV_TRY(tv_dir_make(x->dir, x->err));
        x->made_dir = true;
        goto out;
    }
    TV_TRY(tv_dir_list(x->dir, x->err, &names, &n));
    for (size_t i = 0; i < n && !x->t->force; i++) {
        if (is_leftover(names[i]))
            continue;
        rc = tv_error_set(x->err, TV_E_EXISTS, "the directory %s is not empty",
                          x->dir);
        tv_error_hint(x->err, "choose another, or write into it with --force");
        goto out;
    }
    /* Objects linked from a file that is replaced would be lost. */
    TV_TRY(tv_out_dir_links(x->dir, x->store, x->err));
    for (size_t i = 0; i < n; i++) {
        if (is_leftover(names[i]))
            TV_TRY(unlink_in(x, names[i]));
    }
out:
    tv_dir_list_free(names, n);
    return rc;
}

/* ---- writing
 * ---------------------------------------------------------------------- */

static enum tv_err open_partial(const struct export *x, const char *name,
                                uint64_t bytes, char **path, int *fd)
{
    enum tv_err rc = TV_OK;
    char *p = tv_asprintf("%s/%s%s", x->dir, name, partial);

    *path = p;
    *fd = -1;
    if (p == NULL)
        return no_memory(x->err);
    *fd = tv_sys()->open(p, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (*fd < 0)
        return tv_error_sys(x->err, errno, "cannot create %s", p);
    /* A full disk shows before the work. */
    if (bytes > 0 && tv_sys()->fallocate(*fd, 0, 0, (off_t)bytes) != 0 &&
        (errno == ENOSPC || errno == EDQUOT || errno == EFBIG || errno == EIO))
        rc = tv_error_sys(x->err, errno,
                          "cannot reserve %" PRIu64 " bytes for %s", bytes, p);
    return rc;
}

static enum tv_err close_partial(const struct export *x, const char *path,
                                 int fd, enum tv_err rc)
{
    if (fd < 0)
        return rc;
    if (rc == TV_OK && x->t->sync && tv_sys()->fsync(fd) != 0)
        rc = tv_error_sys(x->err, errno, "cannot sync %s", path);
    if (tv_sys()->close(fd) != 0 && rc == TV_OK)
        rc = tv_error_sys(x->err, errno, "cannot close %s", path);
    return rc;
}

static enum tv_err write_small(const struct export *x, const char *name,
                               const void *data, size_t n)
{
    enum tv_err rc = TV_OK;
    char *path = NULL;
    int fd = -1;

    TV_TRY(open_partial(x, name, n, &path, &fd));
    TV_TRY(tv_pwrite_all(fd, data, n, 0, path, x->err));
out:
    rc = close_partial(x, path, fd, rc);
    tv_free(path);
    return rc;
}

static enum tv_err write_tensor(const struct export *x, int fd,
                                const char *path, const struct tv_st_entry *e)
{
    enum tv_err rc = TV_OK;
    const struct tv_input_tensor *t = tv_input_find(x->in, e->name);
    struct tv_view v;
    struct tv_hash *leaves = NULL; /* of a linked tensor, whose sum is known */
    struct tv_shown shown;

    memset(&v, 0, sizeof v);
    assert(t != NULL);
    TV_TRY(tv_input_view(x->in, t, x->err, &v));
    if (t->linked && t->checksum_known) {
        leaves = (struct tv_hash *)tv_calloc((size_t)tv_leaf_count(v.bytes) + 1,
                                             sizeof *leaves);
        if (leaves == NULL) {
            rc = tv_error_set(x->err, TV_E_NOMEM, "no memory for checksums");
            goto out;
        }
    }
    for (uint64_t i = 0; i < tv_leaf_count(v.bytes); i++) {
        uint64_t at = i * TV_LEAF_BYTES;
        uint64_t left = v.bytes - at;

        if (left > TV_LEAF_BYTES)
            left = TV_LEAF_BYTES;
        if (leaves != NULL)
            leaves[i] = tv_view_leaf(&v, i);
        if (v.leaves != NULL &&
            !tv_hash_equal(tv_view_leaf(&v, i), v.leaves[i])) {
            rc = tv_error_set(x->err, TV_E_CORRUPT,
                              "%s: tensor '%s' is damaged (MiB %" PRIu64
                              " does not match its checksum)",
                              x->name, tv_show(e->name, &shown), i);
            goto out;
        }
        while (left > 0) {
            uint64_t n = 0;
            const unsigned char *p = tv_view_at(&v, at, &n);

            if (n > left)
                n = left;
            TV_TRY(
                tv_pwrite_all(fd, p, (size_t)n, e->offset + at, path, x->err));
            at += n;
            left -= n;
        }
    }
    if (leaves != NULL &&
        !tv_hash_equal(
            tv_leaves_checksum(leaves, (size_t)tv_leaf_count(v.bytes)),
            t->checksum))
        rc = tv_error_set(x->err, TV_E_CORRUPT,
                          "%s: linked tensor '%s' is damaged: its file has "
                          "other bytes than when it was read first",
                          x->name, tv_show(e->name, &shown));
out:
    tv_free(leaves);
    tv_input_release(x->in, &v);
    return rc;
}

static enum tv_err write_shard(struct export *x, size_t shard)
{
    enum tv_err rc = TV_OK;
    const struct tv_shards *s = x->shards;
    char *path = NULL;
    int fd = -1;

    TV_TRY(open_partial(x, s->file_names[shard], s->file_bytes[shard], &path,
                        &fd));
    TV_TRY(tv_pwrite_all(fd, s->headers[shard], s->header_bytes[shard], 0, path,
                         x->err));
    for (size_t i = 0; i < x->n_entries; i++) {
        const struct tv_st_entry *e = &x->entries[i];

        if (e->shard != shard)
            continue;
        if (x->t->cancel != NULL && *x->t->cancel != 0) {
            rc = tv_error_set(x->err, TV_E_INTERRUPTED,
                              "export of '%s' interrupted", x->name);
            goto out;
        }
        TV_TRY(write_tensor(x, fd, path, e));
        x->t->n_tensors++;
        x->t->bytes += e->bytes;
        x->done += e->bytes;
        if (x->t->progress != NULL)
            x->t->progress(x->t->progress_arg, x->done, x->total);
    }
out:
    rc = close_partial(x, path, fd, rc);
    tv_free(path);
    return rc;
}

static enum tv_err write_sides(const struct export *x)
{
    enum tv_err rc = TV_OK;
    char *data = NULL;

    for (size_t i = 0; i < tv_input_side_count(x->in); i++) {
        const char *name = tv_input_side_name(x->in, i);
        size_t n = 0;
        bool found = false;

        if (!tv_plain_name(name) || tv_out_is_weights(name)) {
            struct tv_shown shown;

            rc = tv_error_set(x->err, TV_E_CORRUPT,
                              "%s: '%s' is no name of a side file", x->name,
                              tv_show(name, &shown));
            goto out;
        }
        TV_TRY(tv_input_side_read(x->in, name, &found, &data, &n, x->err));
        TV_TRY(write_small(x, name, data, n));
        tv_free(data);
        data = NULL;
    }
out:
    tv_free(data);
    return rc;
}

/* ---- publishing
 * --------------------------------------------------------------------- */

/* Calls fn for every file of the output; configurations when `configs`. */
static enum tv_err each_file(const struct export *x, bool configs,
                             enum tv_err (*fn)(const struct export *x,
                                               const char *name))
{
    enum tv_err rc = TV_OK;

    for (size_t i = 0; !configs && i < x->shards->n; i++)
        TV_TRY(fn(x, x->shards->file_names[i]));
    if (!configs && x->shards->index_json != NULL)
        TV_TRY(fn(x, x->index));
    for (size_t i = 0; i < tv_input_side_count(x->in); i++) {
        const char *name = tv_input_side_name(x->in, i);

        if (tv_out_is_config(name) == configs)
            TV_TRY(fn(x, name));
    }
out:
    return rc;
}

static enum tv_err rename_in(const struct export *x, const char *name)
{
    enum tv_err rc = TV_OK;
    char *from = tv_asprintf("%s/%s%s", x->dir, name, partial);
    char *to = tv_path_join(x->dir, name);

    if (from == NULL || to == NULL)
        rc = no_memory(x->err);
    else if (tv_sys()->rename(from, to) != 0)
        rc = tv_error_sys(x->err, errno, "cannot rename %s", from);
    tv_free(from);
    tv_free(to);
    return rc;
}

static bool is_ours(const struct export *x, const char *name)
{
    bool yes = x->shards->index_json != NULL && strcmp(x->index, name) == 0;

    for (size_t i = 0; i < x->shards->n && !yes; i++)
        yes = strcmp(x->shards->file_names[i], name) == 0;
    for (size_t i = 0; i < tv_input_side_count(x->in) && !yes; i++)
        yes = strcmp(tv_input_side_name(x->in, i), name) == 0;
    return yes;
}

/* Files of the model that was in the directory before. */
static enum tv_err remove_stale(const struct export *x, bool configs)
{
    enum tv_err rc = TV_OK;
    char **names = NULL;
    size_t n = 0;

    TV_TRY(tv_dir_list(x->dir, x->err, &names, &n));
    for (size_t i = 0; i < n; i++) {
        if (configs ? tv_out_is_config(names[i])
                    : (tv_out_is_weights(names[i]) || is_side(names[i])) &&
                          !is_ours(x, names[i]))
            TV_TRY(unlink_in(x, names[i]));
    }
out:
    tv_dir_list_free(names, n);
    return rc;
}

static enum tv_err publish(const struct export *x)
{
    enum tv_err rc = TV_OK;

    if (x->t->force)
        TV_TRY(remove_stale(x, true));
    TV_TRY(each_file(x, false, rename_in));
    if (x->t->force)
        TV_TRY(remove_stale(x, false));
    if (x->t->sync)
        TV_TRY(tv_dir_sync(x->dir, x->err));
    TV_TRY(each_file(x, true, rename_in));
    if (x->t->sync)
        TV_TRY(tv_dir_sync(x->dir, x->err));
out:
    return rc;
}

/* After a failure: no .partial stays, and in a directory that was new or empty
 * nothing does. */
static void clean_up(const struct export *x)
{
    char **names = NULL;
    size_t n = 0;
    struct tv_error ignored;

    if (tv_path_is_dir(x->dir) &&
        tv_dir_list(x->dir, &ignored, &names, &n) == TV_OK) {
        for (size_t i = 0; i < n; i++) {
            const bool remove =
                is_leftover(names[i]) || (!x->t->force && is_ours(x, names[i]));
            char *path = remove ? tv_path_join(x->dir, names[i]) : NULL;

            if (path != NULL)
                (void)tv_sys()->unlink(path);
            tv_free(path);
        }
    }
    tv_dir_list_free(names, n);
    if (x->made_dir)
        (void)tv_sys()->rmdir(x->dir);
}

static enum tv_err plan(struct export *x)
{
    enum tv_err rc = TV_OK;
    const bool adapter = tv_input_kind(x->in) == TV_KIND_ADAPTER;

    x->stem = adapter ? "adapter_model" : "model";
    x->n_entries = tv_input_count(x->in);
    x->entries =
        (struct tv_st_entry *)tv_calloc(x->n_entries + 1, sizeof *x->entries);
    x->index = tv_asprintf("%s.safetensors.index.json", x->stem);
    if (x->entries == NULL || x->index == NULL)
        return no_memory(x->err);
    for (size_t i = 0; i < x->n_entries; i++) {
        const struct tv_input_tensor *t = tv_input_tensor(x->in, i);

        x->entries[i].name = t->name;
        x->entries[i].dtype = t->dtype;
        x->entries[i].rank = t->rank;
        x->entries[i].shape = t->shape;
        x->entries[i].bytes = t->bytes;
        x->total += t->bytes;
    }
    /* PEFT reads adapters from one file only. */
    TV_TRY(tv_shards_plan(x->entries, x->n_entries, x->stem,
                          adapter ? UINT64_MAX : x->t->shard_bytes, x->err,
                          &x->shards));
out:
    return rc;
}

enum tv_err tv_export(tv_store *s, const char *name, const char *dir,
                      struct tv_transfer *t, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct export x;
    struct tv_ref_part part;
    char *object = tv_strdup(name);
    bool prepared = false;

    memset(&x, 0, sizeof x);
    memset(&part, 0, sizeof part);
    x.store = s;
    x.name = name;
    x.dir = dir;
    x.t = t;
    x.err = err;
    t->n_tensors = 0;
    t->n_resumed = 0;
    t->bytes = 0;
    t->bytes_shared = 0;
    if (object == NULL) {
        rc = no_memory(err);
        goto out;
    }
    part.object = object;
    TV_TRY(tv_input_open(&part, s, err, &x.in));
    TV_TRY(plan(&x));
    TV_TRY(prepare_dir(&x));
    prepared = true;
    for (size_t i = 0; i < x.shards->n; i++)
        TV_TRY(write_shard(&x, i));
    if (x.shards->index_json != NULL)
        TV_TRY(write_small(&x, x.index, x.shards->index_json,
                           x.shards->index_bytes));
    TV_TRY(write_sides(&x));
    TV_TRY(publish(&x));
out:
    if (rc != TV_OK && prepared)
        clean_up(&x);
    tv_free(x.index);
    tv_shards_free(x.shards);
    tv_free(x.entries);
    tv_input_close(x.in);
    tv_free(object);
    return rc;
}
