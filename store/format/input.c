/* SPDX-License-Identifier: Apache-2.0 */
/*
 * input.c - one opened model or adapter: files that are mapped, or an object of
 * a store that is read through one snapshot.
 *
 * Invariants
 *  - items is sorted by tv_name_compare, which is a total order: find is a
 *    binary search in it.
 *  - a contiguous file tensor is one chunk, whose pointer lives in its item, so
 *    views may be copied by value.
 *  - store views borrow arrays of the tv_read. It is renewed, under the mutex,
 *    before a view is given when none is out, so that long merges do not keep
 *    freed pages of the store alive.
 */
#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "hf_dir.h"
#include "json_util.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/format.h"
#include "tv/parse.h"
#include "tv/sys.h"

struct item {
    struct tv_input_tensor pub; /* first: tv_input_tensor * is an item * */
    uint64_t stride[TV_RANK_MAX];
    const unsigned char *chunk; /* element 0 in the map */
    char *name;                 /* owned; NULL for store objects */
};

struct file {
    struct tv_input_file pub;
    char *path;
    tv_map *map;
    struct tv_extent *extents;
};

struct tv_input {
    enum tv_kind kind;
    char *label;
    struct item *items;
    size_t n_items;
    /* files */
    char *dir;
    struct file *files;
    size_t n_files;
    char **sides;
    size_t n_sides;
    /* store */
    tv_store *store;
    struct snapshot *now;    /* for the next view, NULL: none is held */
    struct snapshot *frozen; /* the only one from tv_input_freeze on */
    struct tv_object *object;
    struct tv_tensor_list *list;
    size_t *linked; /* [n_linked] into list: one tensor of every linked file */
    size_t n_linked;
    pthread_mutex_t lock; /* guards now and its users */
    bool have_lock;
};

/* A read of the store with its views. Freed pages of the store can only be used
 * again when no read sees them any more: so none lives longer than its views,
 * and views that overlap without end get a younger one now and then. What they
 * read is kept by pins, not by the age of a read. */
struct snapshot {
    tv_read *read;
    size_t n_users;
    struct timespec begun;
};
#define SNAPSHOT_SECONDS 0.2

static enum tv_err no_memory(const char *label, struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
}

static int compare_items(const void *a, const void *b)
{
    const struct item *x = (const struct item *)a;
    const struct item *y = (const struct item *)b;

    return tv_name_compare(x->pub.name, y->pub.name);
}

/* Lock held, by this and the next. */
static enum tv_err snapshot_take(tv_input *in, struct tv_error *err,
                                 struct snapshot **out)
{
    enum tv_err rc = TV_OK;
    struct snapshot *s = in->frozen != NULL ? in->frozen : in->now;
    struct timespec t = {0, 0};

    if (in->frozen != NULL) {
        s->n_users++;
        *out = s;
        return TV_OK;
    }
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    if (s != NULL && (double)(t.tv_sec - s->begun.tv_sec) +
                             (double)(t.tv_nsec - s->begun.tv_nsec) * 1e-9 <
                         SNAPSHOT_SECONDS) {
        s->n_users++;
        *out = s;
        return TV_OK;
    }
    s = (struct snapshot *)tv_calloc(1, sizeof *s);
    if (s == NULL)
        return no_memory(in->label, err);
    rc = tv_read_begin(in->store, err, &s->read);
    if (rc != TV_OK) {
        tv_free(s);
        return rc;
    }
    s->n_users = 1;
    s->begun = t;
    in->now = s;
    *out = s;
    return TV_OK;
}

static void snapshot_give(tv_input *in, struct snapshot *s)
{
    if (s == NULL || --s->n_users > 0)
        return;
    if (in->now == s)
        in->now = NULL;
    tv_read_end(s->read);
    tv_free(s);
}

void tv_input_close(tv_input *in)
{
    if (in == NULL)
        return;
    if (in->frozen != NULL)
        snapshot_give(in, in->frozen);
    assert(in->now == NULL);
    for (size_t i = 0; in->items != NULL && i < in->n_items; i++)
        tv_free(in->items[i].name);
    tv_free(in->items);
    for (size_t i = 0; in->files != NULL && i < in->n_files; i++) {
        tv_map_close(in->files[i].map);
        tv_free(in->files[i].extents);
        tv_free(in->files[i].path);
    }
    tv_free(in->files);
    for (size_t i = 0; in->sides != NULL && i < in->n_sides; i++)
        tv_free(in->sides[i]);
    tv_free(in->sides);
    tv_free(in->linked);
    tv_tensor_list_free(in->list);
    tv_object_free(in->object);
    if (in->have_lock)
        pthread_mutex_destroy(&in->lock);
    tv_free(in->dir);
    tv_free(in->label);
    tv_free(in);
}

/* ---- opening files ---------------------------------------------------------
 */

static uint64_t mtime_ns(const struct stat *st)
{
    return (uint64_t)st->st_mtim.tv_sec * UINT64_C(1000000000) +
           (uint64_t)st->st_mtim.tv_nsec;
}

static enum tv_err set_extents(struct file *f, const struct tv_parsed_file *p,
                               const struct item *items, const char *label,
                               struct tv_error *err)
{
    if (p->n == 0)
        return TV_OK;
    f->extents = (struct tv_extent *)tv_calloc(p->n, sizeof *f->extents);
    if (f->extents == NULL)
        return no_memory(label, err);
    for (size_t i = 0; i < p->n; i++) {
        f->extents[i].offset = p->items[i].offset;
        f->extents[i].bytes = p->items[i].span;
        f->extents[i].name = items[i].name;
    }
    tv_map_set_extents(f->map, f->extents, p->n);
    return TV_OK;
}

/* Maps file k and appends its tensors. */
static enum tv_err open_file(tv_input *in, size_t k, const char *path,
                             bool torch, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct file *f = &in->files[k];
    struct tv_parsed_file *p = NULL;
    struct item *grown = NULL;
    size_t total = 0;

    TV_TRY(tv_map_open(path, err, &f->map));
    f->path = tv_absolute_path(path);
    if (f->path == NULL) {
        rc = no_memory(path, err);
        goto out;
    }
    if (torch)
        TV_TRY(tv_torch_parse(tv_map_data(f->map), tv_map_bytes(f->map), path,
                              err, &p));
    else
        TV_TRY(tv_safetensors_parse(tv_map_data(f->map), tv_map_bytes(f->map),
                                    path, err, &p));
    f->pub.path = f->path;
    f->pub.bytes = tv_map_bytes(f->map);
    f->pub.mtime_ns = mtime_ns(tv_map_stat(f->map));
    f->pub.inode = (uint64_t)tv_map_stat(f->map)->st_ino;
    f->pub.header_bytes = p->header_bytes;
    f->pub.header_digest = p->header_digest;

    total = in->n_items + p->n;
    if (total > TV_INDEX_TENSORS_MAX) {
        rc = tv_error_set(err, TV_E_CORRUPT, "%s: more than %u tensors",
                          in->label, TV_INDEX_TENSORS_MAX);
        goto out;
    }
    grown = (struct item *)tv_realloc(in->items, (total + 1) * sizeof *grown);
    if (grown == NULL) {
        rc = no_memory(path, err);
        goto out;
    }
    in->items = grown;
    for (size_t i = 0; i < p->n; i++) {
        struct tv_parsed_tensor *t = &p->items[i];
        struct item *it = &in->items[in->n_items + i];

        memset(it, 0, sizeof *it);
        it->name = t->name;
        t->name = NULL;
        it->pub.name = it->name;
        it->pub.dtype = t->dtype;
        it->pub.rank = t->rank;
        memcpy(it->pub.shape, t->shape, sizeof t->shape);
        memcpy(it->stride, t->stride, sizeof t->stride);
        it->pub.n_elems = t->n_elems;
        it->pub.bytes = t->bytes;
        it->pub.contiguous = t->contiguous;
        it->pub.file = k;
        it->pub.offset = t->offset;
        it->chunk = t->bytes == 0 ? NULL : tv_map_data(f->map) + t->offset;
    }
    /* Names must be owned by items before extents borrow them. */
    in->n_items = total;
    TV_TRY(set_extents(f, p, in->items + (total - p->n), path, err));
out:
    tv_parsed_free(p);
    return rc;
}

static enum tv_err check_unique(const tv_input *in, struct tv_error *err)
{
    for (size_t i = 1; i < in->n_items; i++) {
        struct tv_shown shown;

        if (strcmp(in->items[i - 1].name, in->items[i].name) == 0)
            return tv_error_set(err, TV_E_CORRUPT,
                                "%s: tensor '%s' is in %s and in %s", in->label,
                                tv_show(in->items[i].name, &shown),
                                in->files[in->items[i - 1].pub.file].path,
                                in->files[in->items[i].pub.file].path);
    }
    return TV_OK;
}

/* Index and files must agree exactly. */
static enum tv_err check_index(const tv_input *in,
                               const struct tv_model_files *found,
                               struct tv_error *err)
{
    const struct tv_index *x = found->index;
    struct tv_shown shown;

    for (size_t i = 0; i < x->n; i++) {
        const struct tv_input_tensor *t = tv_input_find(in, x->items[i].name);

        if (t == NULL || t->file != x->items[i].file)
            return tv_error_set(
                err, TV_E_CORRUPT,
                "%s: the index puts tensor '%s' into %s, which does not hold "
                "it",
                in->label, tv_show(x->items[i].name, &shown),
                x->files[x->items[i].file]);
    }
    if (in->n_items == x->n)
        return TV_OK;
    for (size_t i = 0; i < in->n_items; i++) {
        size_t lo = 0;
        size_t hi = x->n;

        while (lo < hi) {
            const size_t mid = lo + (hi - lo) / 2;

            if (strcmp(x->items[mid].name, in->items[i].name) < 0)
                lo = mid + 1;
            else
                hi = mid;
        }
        if (lo == x->n || strcmp(x->items[lo].name, in->items[i].name) != 0)
            return tv_error_set(
                err, TV_E_CORRUPT,
                "%s: tensor '%s' of %s is not listed in the index", in->label,
                tv_show(in->items[i].name, &shown),
                x->files[in->items[i].pub.file]);
    }
    return TV_OK;
}

enum tv_err tv_input_open_path(const char *path, struct tv_error *err,
                               tv_input **out)
{
    enum tv_err rc = TV_OK;
    tv_input *in = (tv_input *)tv_calloc(1, sizeof *in);
    struct tv_model_files *found = NULL;

    *out = NULL;
    if (in == NULL || (in->label = tv_strdup(path)) == NULL) {
        rc = no_memory(path, err);
        goto out;
    }
    TV_TRY(tv_model_files_find(path, err, &found));
    in->kind = found->kind;
    in->dir = found->dir;
    found->dir = NULL;
    in->sides = found->sides;
    in->n_sides = found->n_sides;
    found->sides = NULL;
    in->files = (struct file *)tv_calloc(found->n_paths, sizeof *in->files);
    if (in->files == NULL) {
        rc = no_memory(path, err);
        goto out;
    }
    in->n_files = found->n_paths;
    for (size_t i = 0; i < found->n_paths; i++)
        TV_TRY(open_file(in, i, found->paths[i], found->torch, err));
    qsort(in->items, in->n_items, sizeof *in->items, compare_items);
    TV_TRY(check_unique(in, err));
    if (found->index != NULL)
        TV_TRY(check_index(in, found, err));
    *out = in;
    in = NULL;
out:
    tv_model_files_free(found);
    tv_input_close(in);
    return rc;
}

/* ---- opening store objects --------------------------------------------------
 */

static int compare_sources(const void *a, const void *b)
{
    const struct tv_tensor *const x = *(const struct tv_tensor *const *)a;
    const struct tv_tensor *const y = *(const struct tv_tensor *const *)b;

    return (x->source_id > y->source_id) - (x->source_id < y->source_id);
}

/* Picks one tensor for every linked file. */
static enum tv_err pick_linked(tv_input *in, struct tv_error *err)
{
    const struct tv_tensor **all =
        (const struct tv_tensor **)tv_calloc(in->list->n + 1, sizeof *all);
    size_t n = 0;

    in->linked = (size_t *)tv_calloc(in->list->n + 1, sizeof *in->linked);
    if (all == NULL || in->linked == NULL) {
        tv_free(all);
        return no_memory(in->label, err);
    }
    for (size_t i = 0; i < in->list->n; i++) {
        if (in->list->items[i].storage == TV_LINKED)
            all[n++] = &in->list->items[i];
    }
    qsort(all, n, sizeof *all, compare_sources);
    for (size_t i = 0; i < n; i++) {
        if (i == 0 || all[i]->source_id != all[i - 1]->source_id)
            in->linked[in->n_linked++] = (size_t)(all[i] - in->list->items);
    }
    tv_free(all);
    return TV_OK;
}

static enum tv_err open_object(const char *name, tv_store *store,
                               struct tv_error *err, tv_input **out)
{
    enum tv_err rc = TV_OK;
    tv_read *read = NULL;
    tv_input *in = (tv_input *)tv_calloc(1, sizeof *in);

    *out = NULL;
    if (in == NULL || (in->label = tv_asprintf("store:%s", name)) == NULL) {
        rc = no_memory(name, err);
        goto out;
    }
    if (store == NULL) {
        rc = tv_error_set(err, TV_E_USAGE, "%s needs a store", in->label);
        tv_error_hint(err, "name one with --store or TV_STORE");
        goto out;
    }
    if (pthread_mutex_init(&in->lock, NULL) != 0) {
        rc = no_memory(name, err);
        goto out;
    }
    in->have_lock = true;
    in->store = store;
    TV_TRY(tv_read_begin(store, err, &read));
    TV_TRY(tv_object_find(read, name, false, err, &in->object));
    TV_TRY(tv_tensor_list(read, in->object->id, err, &in->list));
    TV_TRY(pick_linked(in, err));
    in->kind = in->object->kind;
    in->items = (struct item *)tv_calloc(in->list->n + 1, sizeof *in->items);
    in->sides = (char **)tv_calloc(in->object->n_files + 1, sizeof *in->sides);
    if (in->items == NULL || in->sides == NULL) {
        rc = no_memory(name, err);
        goto out;
    }
    for (size_t i = 0; i < in->list->n; i++) {
        const struct tv_tensor *t = &in->list->items[i];
        struct tv_input_tensor *p = &in->items[i].pub;

        p->name = t->name;
        p->dtype = t->dtype;
        p->rank = t->rank;
        memcpy(p->shape, t->shape, sizeof p->shape);
        p->n_elems = t->n_elems;
        p->bytes = t->bytes;
        p->contiguous = true;
        p->linked = t->storage == TV_LINKED;
        p->checksum_known = t->checksum_known;
        p->checksum = t->checksum;
        p->offset = t->offset;
        /* The list is sorted already; the item finds its entry by index. */
        p->file = i;
        in->n_items++;
    }
    for (size_t i = 0; i < in->object->n_files; i++) {
        in->sides[i] = tv_strdup(in->object->files[i].name);
        if (in->sides[i] == NULL) {
            rc = no_memory(name, err);
            goto out;
        }
        in->n_sides++;
    }
    qsort(in->items, in->n_items, sizeof *in->items, compare_items);
    *out = in;
    in = NULL;
out:
    tv_read_end(read);
    tv_input_close(in);
    return rc;
}

enum tv_err tv_input_freeze(tv_input *in, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct snapshot *s = NULL;
    struct tv_object *o = NULL;

    if (in->store == NULL || in->frozen != NULL)
        return TV_OK;
    pthread_mutex_lock(&in->lock);
    TV_TRY(snapshot_take(in, err, &s));
    /* It may be younger than what the list was read from. */
    TV_TRY(tv_object_find(s->read, in->object->name, false, err, &o));
    if (o->id != in->object->id) {
        rc = tv_error_set(err, TV_E_CHANGED,
                          "%s was replaced while it was being opened",
                          in->label);
        goto out;
    }
    in->frozen = s;
    s = NULL;
out:
    snapshot_give(in, s);
    pthread_mutex_unlock(&in->lock);
    tv_object_free(o);
    return rc;
}

enum tv_err tv_input_open(const struct tv_ref_part *part, tv_store *store,
                          struct tv_error *err, tv_input **out)
{
    *out = NULL;
    if (part->object != NULL)
        return open_object(part->object, store, err, out);
    if (part->path == NULL)
        return tv_error_set(err, TV_E_INTERNAL, "%s: reference not resolved",
                            part->text == NULL ? "?" : part->text);
    return tv_input_open_path(part->path, err, out);
}

/* ---- asking
 * ------------------------------------------------------------------ */

enum tv_kind tv_input_kind(const tv_input *in)
{
    return in->kind;
}

const char *tv_input_label(const tv_input *in)
{
    return in->label;
}

bool tv_input_is_store(const tv_input *in)
{
    return in->store != NULL;
}

uint64_t tv_input_object_id(const tv_input *in)
{
    return in->object != NULL ? in->object->id : 0;
}

const char *tv_input_dir(const tv_input *in)
{
    return in->dir;
}

size_t tv_input_count(const tv_input *in)
{
    return in->n_items;
}

const struct tv_input_tensor *tv_input_tensor(const tv_input *in, size_t i)
{
    assert(i < in->n_items);
    return &in->items[i].pub;
}

const struct tv_input_tensor *tv_input_find(const tv_input *in,
                                            const char *name)
{
    size_t lo = 0;
    size_t hi = in->n_items;

    while (lo < hi) {
        const size_t mid = lo + (hi - lo) / 2;
        const int c = tv_name_compare(in->items[mid].pub.name, name);

        if (c == 0)
            return &in->items[mid].pub;
        if (c < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return NULL;
}

size_t tv_input_file_count(const tv_input *in)
{
    return in->n_files;
}

const struct tv_input_file *tv_input_file(const tv_input *in, size_t i)
{
    assert(i < in->n_files);
    return &in->files[i].pub;
}

/* ---- views
 * ------------------------------------------------------------------- */

/* Copies a strided tensor of a .bin into row-major order. */
static void gather(const struct item *it, size_t width, unsigned char *dst)
{
    uint64_t at[TV_RANK_MAX] = {0};
    uint64_t pos = 0;

    for (uint64_t e = 0; e < it->pub.n_elems; e++) {
        memcpy(dst + e * width, it->chunk + pos * width, width);
        for (unsigned d = it->pub.rank; d-- > 0;) {
            pos += it->stride[d];
            if (++at[d] < it->pub.shape[d])
                break;
            pos -= it->stride[d] * it->pub.shape[d];
            at[d] = 0;
        }
    }
}

static enum tv_err file_view(tv_input *in, const struct item *it,
                             struct tv_error *err, struct tv_view *out)
{
    const struct tv_input_tensor *t = &it->pub;
    struct tv_view v;

    memset(&v, 0, sizeof v);
    v.dtype = t->dtype;
    v.rank = t->rank;
    memcpy(v.shape, t->shape, sizeof v.shape);
    v.n_elems = t->n_elems;
    v.bytes = t->bytes;
    v.chunk_bytes = t->bytes == 0 ? 1 : t->bytes;
    v.n_chunks = t->bytes == 0 ? 0 : 1;
    v.chunks = &it->chunk;
    if (!t->contiguous) {
        /* The chunk table stands in front of the copy. */
        const size_t table = 64;
        unsigned char *block = NULL;
        size_t n = 0;

        if (!tv_add_size((size_t)t->bytes, table, &n) ||
            (block = (unsigned char *)tv_alloc_aligned(n)) == NULL)
            return no_memory(in->label, err);
        {
            const unsigned char *payload = block + table;

            memcpy(block, &payload, sizeof payload);
        }
        gather(it, tv_dtype_bits(t->dtype) / 8, block + table);
        v.chunks = (const unsigned char *const *)(const void *)block;
        v.owner = block;
    }
    *out = v;
    return TV_OK;
}

static enum tv_err store_view(tv_input *in, const struct item *it,
                              struct tv_error *err, struct tv_view *out)
{
    enum tv_err rc = TV_OK;
    struct tv_view v;
    struct snapshot *s = NULL;

    memset(&v, 0, sizeof v);
    pthread_mutex_lock(&in->lock);
    TV_TRY(snapshot_take(in, err, &s));
    TV_TRY(tv_tensor_view(s->read, &in->list->items[it->pub.file], err, &v));
    v.owner = s;
    s = NULL;
    *out = v;
out:
    snapshot_give(in, s);
    pthread_mutex_unlock(&in->lock);
    return rc;
}

enum tv_err tv_input_view(tv_input *in, const struct tv_input_tensor *t,
                          struct tv_error *err, struct tv_view *out)
{
    const struct item *it = (const struct item *)(const void *)t;

    assert(it >= in->items && it < in->items + in->n_items);
    if (in->store != NULL)
        return store_view(in, it, err, out);
    return file_view(in, it, err, out);
}

void tv_input_release(tv_input *in, struct tv_view *v)
{
    if (v->chunk_bytes == 0)
        return;
    if (in->store != NULL) {
        pthread_mutex_lock(&in->lock);
        snapshot_give(in, (struct snapshot *)v->owner);
        pthread_mutex_unlock(&in->lock);
    } else {
        tv_free(v->owner);
    }
    memset(v, 0, sizeof *v);
}

/* ---- side files
 * ---------------------------------------------------------------- */

size_t tv_input_side_count(const tv_input *in)
{
    return in->n_sides;
}

const char *tv_input_side_name(const tv_input *in, size_t i)
{
    assert(i < in->n_sides);
    return in->sides[i];
}

static enum tv_err store_side(tv_input *in, const char *name, char **data,
                              size_t *n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const void *bytes = NULL;
    size_t n_bytes = 0;
    struct tv_hash digest = {0, 0};
    char *copy = NULL;
    struct snapshot *s = NULL;

    for (size_t i = 0; i < in->object->n_files; i++) {
        if (strcmp(in->object->files[i].name, name) == 0)
            digest = in->object->files[i].digest;
    }
    pthread_mutex_lock(&in->lock);
    TV_TRY(snapshot_take(in, err, &s));
    TV_TRY(tv_blob_get(s->read, digest, &bytes, &n_bytes, err));
    copy = (char *)tv_alloc(n_bytes + 1);
    if (copy == NULL) {
        rc = no_memory(in->label, err);
        goto out;
    }
    if (n_bytes > 0)
        memcpy(copy, bytes, n_bytes);
    copy[n_bytes] = '\0';
    *data = copy;
    *n = n_bytes;
out:
    snapshot_give(in, s);
    pthread_mutex_unlock(&in->lock);
    return rc;
}

enum tv_err tv_input_side_read(tv_input *in, const char *name, bool *found,
                               char **data, size_t *n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = NULL;
    bool known = false;

    for (size_t i = 0; i < in->n_sides && !known; i++)
        known = strcmp(in->sides[i], name) == 0;
    if (!known) {
        *found = false;
        *data = NULL;
        *n = 0;
        return TV_OK;
    }
    if (in->store != NULL) {
        TV_TRY(store_side(in, name, data, n, err));
    } else {
        path = tv_path_join(in->dir, name);
        if (path == NULL) {
            rc = no_memory(in->label, err);
            goto out;
        }
        TV_TRY(tv_file_read(path, TV_JSON_MAX, err, data, n));
    }
    *found = true;
out:
    tv_free(path);
    return rc;
}

/* ---- identity
 * -------------------------------------------------------------------- */

static void add_u64(tv_hasher *h, uint64_t v)
{
    unsigned char b[8];

    tv_put_le64(b, v);
    tv_hasher_add(h, b, sizeof b);
}

static void add_string(tv_hasher *h, const char *s)
{
    add_u64(h, strlen(s));
    tv_hasher_add(h, s, strlen(s));
}

static void add_hash(tv_hasher *h, struct tv_hash v)
{
    unsigned char b[16];

    tv_hash_put(b, v);
    tv_hasher_add(h, b, sizeof b);
}

static void add_file(tv_hasher *h, const struct file *f)
{
    const char *slash = strrchr(f->path, '/');

    add_string(h, slash == NULL ? f->path : slash + 1);
    add_u64(h, f->pub.bytes);
    add_u64(h, f->pub.mtime_ns);
    add_u64(h, f->pub.inode);
    add_hash(h, f->pub.header_digest);
}

/* A linked tensor counts by its source, never by its checksum: that may become
 * known between a run and its continuation. */
static enum tv_err add_linked(tv_input *in, tv_hasher *h,
                              const struct tv_tensor *t, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const char *path = NULL;
    struct tv_view view;
    struct stat st;
    struct snapshot *s = NULL;

    pthread_mutex_lock(&in->lock);
    /* Asking for the bytes checks the file: a merge must not begin with one
     * that is not what was linked. */
    TV_TRY(snapshot_take(in, err, &s));
    TV_TRY(tv_tensor_view(s->read, t, err, &view));
    TV_TRY(tv_source_path(s->read, t->source_id, err, &path));
    if (tv_sys()->stat(path, &st) != 0) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "%s: the linked file %s cannot be found", in->label,
                          path);
        goto out;
    }
    add_u64(h, (uint64_t)st.st_size);
    add_u64(h, mtime_ns(&st));
    add_u64(h, (uint64_t)st.st_ino);
    add_u64(h, t->offset);
out:
    snapshot_give(in, s);
    pthread_mutex_unlock(&in->lock);
    return rc;
}

static enum tv_err add_config(tv_input *in, tv_hasher *h, const char *name,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *data = NULL;
    size_t n = 0;
    bool found = false;

    TV_TRY(tv_input_side_read(in, name, &found, &data, &n, err));
    add_u64(h, found ? 1 : 0);
    if (found) {
        add_u64(h, n);
        tv_hasher_add(h, data, n);
    }
out:
    tv_free(data);
    return rc;
}

enum tv_err tv_input_fingerprint(tv_input *in, struct tv_hash *out,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_hasher *h = NULL;

    TV_TRY(tv_hasher_open(err, &h));
    for (size_t i = 0; i < in->n_files; i++)
        add_file(h, &in->files[i]);
    for (size_t i = 0; in->store != NULL && i < in->n_items; i++) {
        const struct tv_input_tensor *t = &in->items[i].pub;
        const struct tv_tensor *s = &in->list->items[t->file];

        add_string(h, t->name);
        add_u64(h, (uint64_t)t->dtype);
        add_u64(h, t->rank);
        for (unsigned d = 0; d < t->rank; d++)
            add_u64(h, t->shape[d]);
        if (s->storage == TV_LINKED)
            TV_TRY(add_linked(in, h, s, err));
        else
            add_hash(h, s->checksum);
    }
    TV_TRY(add_config(in, h, "config.json", err));
    TV_TRY(add_config(in, h, "adapter_config.json", err));
    *out = tv_hasher_value(h);
out:
    tv_hasher_close(h);
    return rc;
}

enum tv_err tv_input_tensor_identity(tv_input *in,
                                     const struct tv_input_tensor *t,
                                     struct tv_hash *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_hasher *h = NULL;
    const bool stored = in->store != NULL;
    const struct tv_tensor *s = stored ? &in->list->items[t->file] : NULL;

    TV_TRY(tv_hasher_open(err, &h));
    add_u64(h, (uint64_t)t->dtype);
    add_u64(h, t->rank);
    for (unsigned d = 0; d < t->rank; d++)
        add_u64(h, t->shape[d]);
    if (stored && s->storage == TV_INLINE) {
        add_u64(h, 1);
        add_hash(h, s->checksum);
    } else if (stored) {
        add_u64(h, 2);
        TV_TRY(add_linked(in, h, s, err));
    } else {
        /* As for a linked tensor: linking a file changes nothing. */
        const struct tv_input_file *f = &in->files[t->file].pub;
        add_u64(h, 2);
        add_u64(h, f->bytes);
        add_u64(h, f->mtime_ns);
        add_u64(h, f->inode);
        add_u64(h, t->offset);
        /* Strides are not told: a name stands for them. */
        if (!t->contiguous)
            add_string(h, t->name);
    }
    *out = tv_hasher_value(h);
out:
    tv_hasher_close(h);
    return rc;
}

static enum tv_err file_unchanged(const tv_input *in, const struct file *f,
                                  struct tv_error *err)
{
    const char *how = "was changed";
    struct stat st;

    if (tv_sys()->stat(f->path, &st) != 0) {
        if (errno != ENOENT && errno != ENOTDIR)
            return tv_error_sys(err, errno, "%s: cannot look at %s", in->label,
                                f->path);
        how = "was removed";
    } else if ((uint64_t)st.st_size == f->pub.bytes &&
               mtime_ns(&st) == f->pub.mtime_ns &&
               (uint64_t)st.st_ino == f->pub.inode) {
        return TV_OK;
    }
    return tv_error_set(err, TV_E_CORRUPT, "%s %s while it was being merged",
                        f->path, how);
}

enum tv_err tv_input_unchanged(tv_input *in, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < in->n_files; i++) {
        rc = file_unchanged(in, &in->files[i], err);
        if (rc != TV_OK)
            return rc;
    }
    for (size_t i = 0; i < in->n_linked && rc == TV_OK; i++) {
        struct tv_view view;
        struct snapshot *s = NULL;

        /* The store looks at the file whenever it gives a view. */
        pthread_mutex_lock(&in->lock);
        rc = snapshot_take(in, err, &s);
        if (rc == TV_OK)
            rc = tv_tensor_view(s->read, &in->list->items[in->linked[i]], err,
                                &view);
        snapshot_give(in, s);
        pthread_mutex_unlock(&in->lock);
    }
    if (rc == TV_E_CORRUPT)
        tv_error_context(err, "%s was changed while it was being merged",
                         in->label);
    return rc;
}

static enum tv_err tensor_checksum(tv_input *in,
                                   const struct tv_input_tensor *t,
                                   struct tv_hash *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_view v;
    struct tv_hash *leaves = NULL;
    const uint64_t n = tv_leaf_count(t->bytes);

    memset(&v, 0, sizeof v);
    TV_TRY(tv_input_view(in, t, err, &v));
    leaves = (struct tv_hash *)tv_calloc((size_t)n + 1, sizeof *leaves);
    if (leaves == NULL) {
        rc = no_memory(in->label, err);
        goto out;
    }
    for (uint64_t i = 0; i < n; i++) {
        leaves[i] = tv_view_leaf(&v, i);
        if (v.leaves != NULL && !tv_hash_equal(leaves[i], v.leaves[i])) {
            struct tv_shown shown;

            rc = tv_error_set(err, TV_E_CORRUPT,
                              "%s: tensor '%s' is damaged (MiB %" PRIu64
                              " does not match its checksum)",
                              in->label, tv_show(t->name, &shown), i);
            goto out;
        }
    }
    *out = tv_leaves_checksum(leaves, (size_t)n);
    if (t->checksum_known && !tv_hash_equal(*out, t->checksum)) {
        struct tv_shown shown;

        rc = tv_error_set(err, TV_E_CORRUPT,
                          "%s: tensor '%s' does not match its checksum",
                          in->label, tv_show(t->name, &shown));
    }
out:
    tv_free(leaves);
    tv_input_release(in, &v);
    return rc;
}

static int compare_bytewise(const void *a, const void *b)
{
    const struct tv_input_tensor *const *x =
        (const struct tv_input_tensor *const *)a;
    const struct tv_input_tensor *const *y =
        (const struct tv_input_tensor *const *)b;

    return strcmp((*x)->name, (*y)->name);
}

enum tv_err tv_input_digest(tv_input *in, struct tv_hash *out,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_hasher *h = NULL;
    const struct tv_input_tensor **order = NULL;

    TV_TRY(tv_hasher_open(err, &h));
    order = (const struct tv_input_tensor **)tv_calloc(in->n_items + 1,
                                                       sizeof *order);
    if (order == NULL) {
        rc = no_memory(in->label, err);
        goto out;
    }
    for (size_t i = 0; i < in->n_items; i++)
        order[i] = &in->items[i].pub;
    qsort(order, in->n_items, sizeof *order, compare_bytewise);
    for (size_t i = 0; i < in->n_items; i++) {
        struct tv_hash sum = {0, 0};

        TV_TRY(tensor_checksum(in, order[i], &sum, err));
        tv_digest_add(h, order[i]->name, order[i]->dtype, order[i]->shape,
                      order[i]->rank, sum);
    }
    *out = tv_hasher_value(h);
out:
    tv_free(order);
    tv_hasher_close(h);
    return rc;
}
