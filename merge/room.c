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
#include "tv/checked.h"
#include "tv/derived.h"
#include "tv/sys.h"

#define SPARE_BYTES   (1u << 20)
#define RECORD_BYTES  (16u << 10) /* of a record, beside its identity */
#define JOURNAL_BYTES 1024u
#define BEGUN_BYTES   (128u << 10)
/* Of each tensor in a store: its last page, its header and entries, journal. */
#define TENSOR_BYTES  (2 * 4096u + JOURNAL_BYTES)

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

static uint64_t add_capped(uint64_t a, uint64_t b)
{
    uint64_t sum = UINT64_MAX;
    (void)tv_add_u64(a, b, &sum);
    return sum;
}

/* An LMDB store of the run's state and one small record per tensor; records of
 * a copy-on-write tree take about two pages each while they are written. */
static uint64_t journal_bytes(const struct tvm_plan *p)
{
    const uint64_t state = p->identity ? strlen(p->identity) : 0;
    return add_capped(
        (uint64_t)256 << 10,
        add_capped(2 * state, JOURNAL_BYTES * (uint64_t)p->n_tensors));
}

/* tvmerge.json says what the identity says, with more white space. */
static uint64_t record_bytes(const struct tvm_plan *p)
{
    const uint64_t identity = p->identity ? strlen(p->identity) : 0;
    return tv_derived_long(2 * identity + RECORD_BYTES);
}

static uint64_t files_bytes(const struct tvm_plan *p)
{
    uint64_t n = 0;
    for (size_t i = 0; i < p->n_files; i++)
        n = add_capped(n, p->options.into ? tv_derived_long(p->files[i].n)
                                          : ((uint64_t)p->files[i].n + 4095) &
                                                ~(uint64_t)4095);
    return n;
}

/* What the store's admission does not know (space_loss): a tensor that must go
 * on where chunks have to be cut has them cut from its beginning, at worst to a
 * page each, with a header and an entry of the tree. One at a time does so. */
static uint64_t cut_bytes(const struct tvm_plan *p)
{
    uint64_t most = 0;
    for (size_t i = 0; i < p->n_tensors; i++)
        most = p->tensors[i].bytes > most ? p->tensors[i].bytes : most;
    return most / 40;
}

uint64_t tvm_room_output(const struct tvm_plan *p)
{
    uint64_t n = add_capped(journal_bytes(p), files_bytes(p));

    if (!p->shards) {
        /* Chunks in LMDB end on whole pages, with a header each. */
        n = add_capped(n, add_capped(record_bytes(p), cut_bytes(p)));
        n = add_capped(n, p->bytes_written);
        n = add_capped(n, p->bytes_written / TV_CHUNK_BYTES * 4096 +
                              (TENSOR_BYTES - JOURNAL_BYTES) * p->n_tensors);
        return n;
    }
    for (size_t i = 0; i < p->shards->n; i++)
        n = add_capped(n, (p->shards->file_bytes[i] + 4095) & ~(uint64_t)4095);
    return add_capped(n, p->shards->index_bytes);
}

/* What tvm_room_output has counted of a partial object: at least what its pages
 * are, so that a run that was killed is admitted again. */
static uint64_t partial_bytes(const struct tvm_plan *p,
                              const struct tv_object *o)
{
    /* The state, and first pages of tables. */
    uint64_t n = (p->identity ? strlen(p->identity) : 0) + BEGUN_BYTES;
    for (size_t f = 0; f < o->n_files; f++)
        n = add_capped(n, tv_derived_long(o->files[f].bytes));
    n = add_capped(n, o->bytes);
    return add_capped(n, TENSOR_BYTES * o->n_tensors +
                             o->bytes / TV_CHUNK_BYTES * 4096);
}

uint64_t tvm_room_there(const struct tvm_plan *p)
{
    tv_read *r = NULL;
    struct tv_object **list = NULL;
    size_t n = 0;
    uint64_t bytes = 0;
    if (tv_read_begin(p->options.store, NULL, &r) == TV_OK &&
        tv_object_list(r, true, NULL, &list, &n) == TV_OK) {
        for (size_t i = 0; i < n; i++) {
            const bool same = strcmp(list[i]->name, p->options.into) == 0;
            if (same && list[i]->complete && !p->options.force)
                bytes = UINT64_MAX; /* nothing will be written */
            else if (same && !list[i]->complete)
                bytes = add_capped(bytes, partial_bytes(p, list[i]));
            tv_object_free(list[i]);
        }
        tv_free(list);
    }
    tv_read_end(r);
    return bytes;
}

uint64_t tvm_room_inside(const struct tvm_plan *p)
{
    const uint64_t output = tvm_room_output(p);
    const uint64_t there = tvm_room_there(p);
    return output > there ? output - there : 0;
}

uint64_t tvm_room_left(const struct tvm_plan *p,
                       const struct tvm_tensor_done *done)
{
    uint64_t bytes = 0;

    if (!p->options.into)
        return 0;
    for (size_t i = 0; i < p->n_tensors; i++)
        if (!done[i].done)
            bytes += p->tensors[i].bytes + 4096;
    return tvm_room_rest(p, bytes);
}

uint64_t tvm_room_rest(const struct tvm_plan *p, uint64_t bytes)
{
    if (!p->options.into)
        return 0;
    bytes += record_bytes(p);
    return bytes + bytes / 16 + SPARE_BYTES;
}

enum tv_err tvm_room_into(const struct tvm_plan *p, struct tv_error *err)
{
    const uint64_t bytes = p->options.into ? tvm_room_inside(p) : 0;

    if (bytes == 0)
        return TV_OK;
    return tv_derived_reserve(p->options.store, bytes, bytes / 16 + SPARE_BYTES,
                              err);
}
