/* SPDX-License-Identifier: Apache-2.0 */
/*
 * room.c - see room.h.
 *
 * The quota of a store bounds the store and the output directory of its
 * unfinished run together. The store keeps the charge across a kill; it forgets
 * one whose directory has no .tvmerge (tv_store_charge_set).
 */
#include "room.h"

#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/derived.h"
#include "tv/sys.h"

#define SPARE_BYTES (1u << 20)

static bool has(const char *dir, const char *name)
{
    char *path = tv_path_join(dir, name);
    const bool yes = path && tv_path_exists(path);
    tv_free(path);
    return yes;
}

bool tvm_room_is_finished(const struct tvm_plan *p)
{
    const char *out = p->options.out_dir;
    return out && !p->options.force && has(out, "tvmerge.json") &&
           !has(out, ".tvmerge");
}

/* OUT as one name, whatever way it was written; it need not exist yet. Owned,
 * NULL when out of memory. */
static char *whole_path(const char *out)
{
    char real[PATH_MAX];
    if (realpath(out, real))
        return tv_strdup(real);
    size_t n = strlen(out);
    while (n > 1 && out[n - 1] == '/')
        n--;
    size_t dir = n;
    while (dir > 0 && out[dir - 1] != '/')
        dir--;
    char *parent = dir > 0 ? tv_strndup(out, dir) : tv_strdup(".");
    char *name = tv_strndup(out + dir, n - dir);
    char *path = NULL;
    if (parent && name)
        path = realpath(parent, real) ? tv_path_join(real, name)
                                      : tv_strndup(out, n);
    tv_free(parent);
    tv_free(name);
    return path;
}

enum tv_err tvm_room_take(const struct tvm_plan *p, struct tv_error *err,
                          char **charged)
{
    enum tv_err rc = TV_OK;
    tv_store *s = p->options.store;
    uint64_t quota = 0;
    char *path = NULL;

    *charged = NULL;
    if (!s || tv_store_is_read_only(s) || !p->options.out_dir ||
        tvm_room_is_finished(p))
        return TV_OK;
    TV_TRY(tv_store_quota_get(s, &quota, err));
    if (quota == 0)
        goto out;
    path = whole_path(p->options.out_dir);
    if (!path) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(tv_store_charge_set(s, path, p->peak_disk_bytes, err));
    *charged = path;
    path = NULL;
out:
    tv_free(path);
    return rc;
}

void tvm_room_give(const struct tvm_plan *p, char *charged, bool done)
{
    /* A charge that stays behind is dropped by the next run. */
    if (charged && (done || !has(charged, ".tvmerge")) &&
        tv_store_charge_clear(p->options.store, charged, NULL) != TV_OK)
        done = false;
    tv_free(charged);
}

uint64_t tvm_room_left(const struct tvm_plan *p,
                       const struct tvm_tensor_done *done)
{
    uint64_t bytes = 0;

    for (size_t i = 0; p->options.into && i < p->n_tensors; i++)
        if (!done[i].done)
            bytes += p->tensors[i].bytes + 4096;
    return bytes;
}

uint64_t tvm_room_spare(uint64_t bytes)
{
    return bytes > 0 ? bytes + bytes / 16 + SPARE_BYTES : 0;
}

enum tv_err tvm_room_files(const struct tvm_plan *p, struct tv_error *err,
                           uint64_t **bytes, size_t *n)
{
    enum tv_err rc = TV_OK;
    tv_read *r = NULL;
    struct tv_error why;

    *n = 0;
    *bytes = tv_calloc(p->n_files + 1, sizeof **bytes);
    if (!*bytes)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    TV_TRY(tv_read_begin(p->options.store, err, &r));
    for (size_t i = 0; i < p->n_files; i++) {
        const struct tvm_side_file *f = &p->files[i];
        const void *data = NULL;
        size_t there = 0;
        tv_error_clear(&why);
        if (tv_blob_get(r, tv_hash128(f->data, f->n), &data, &there, &why) !=
            TV_OK)
            (*bytes)[(*n)++] = f->n;
    }
out:
    tv_read_end(r);
    if (rc != TV_OK) {
        tv_free(*bytes);
        *bytes = NULL;
    }
    return rc;
}

enum tv_err tvm_room_into(const struct tvm_plan *p,
                          const struct tvm_tensor_done *done,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const uint64_t bytes = tvm_room_left(p, done);
    uint64_t *files = NULL;
    size_t n = 0;

    if (bytes == 0)
        return TV_OK;
    TV_TRY(tvm_room_files(p, err, &files, &n));
    /* With room to spare, since values want pages in a row; without, when that
     * is all there is. */
    if (tv_derived_reserve(p->options.store, tvm_room_spare(bytes), files, n,
                           NULL) != TV_OK)
        rc = tv_derived_reserve(p->options.store, bytes, files, n, err);
out:
    tv_free(files);
    return rc;
}
