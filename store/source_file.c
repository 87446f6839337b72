/* SPDX-License-Identifier: Apache-2.0 */
/*
 * source_file.c - files that linked tensors point into.
 *
 * A linked file is mapped once per store handle. Its size, time and inode are
 * asked for at every view and its header is hashed when it is mapped: a file
 * that is not what was registered is refused by name before a byte of it is
 * used. What cannot be seen that way (a file cut short while it is being read)
 * ends in SIGBUS; the extents registered here let the handler name the tensor.
 */
#include "store_priv.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"

static uint64_t mtime_ns(const struct stat *st)
{
    return (uint64_t)st->st_mtim.tv_sec * 1000000000u +
           (uint64_t)st->st_mtim.tv_nsec;
}

void tv_source_describe(const tv_map *map, const char *path,
                        uint64_t header_bytes, struct tv_source_desc *out)
{
    const struct stat *st = tv_map_stat(map);
    *out = (struct tv_source_desc){
        .path = path,
        .bytes = tv_map_bytes(map),
        .mtime_ns = mtime_ns(st),
        .inode = st->st_ino,
        .header_digest = tv_hash128(tv_map_data(map), (size_t)header_bytes),
        .header_bytes = header_bytes};
}

enum tv_err source_get(const struct txn *t, uint64_t id, bool *found,
                       struct rec_source *r, struct tv_error *err)
{
    struct rec_key k;
    struct rec_body body;
    const char *why = NULL;
    key_id(&k, id);
    const enum tv_err rc =
        db_get_rec(t, DB_SOURCE, REC_SOURCE, &k, found, &body,
                   "the record of a linked file", err);
    if (rc != TV_OK || !*found)
        return rc;
    if (!rec_source_get(body, r, &why))
        return rec_damaged(t->s, "the record of a linked file", why, err);
    return TV_OK;
}

enum tv_err tv_source_put(tv_batch *b, const struct tv_source_desc *d,
                          uint64_t *source_id, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key k;
    struct tv_buf buf;
    bool more = false;
    uint64_t id = 0;
    const uint64_t before = b->n_writes;
    const struct rec_source mine = {
        .bytes = d->bytes,
        .mtime_ns = d->mtime_ns,
        .inode = d->inode,
        .header_bytes = d->header_bytes,
        .header_digest = d->header_digest,
        .path = {.s = d->path, .n = strlen(d->path)}};
    TV_TRY(batch_check(b, err));
    if (d->path[0] != '/' || d->header_bytes > d->bytes ||
        mine.path.n > (64u << 10)) {
        rc = tv_error_set(err, TV_E_INTERNAL,
                          "a linked file needs an absolute path and a header "
                          "within it");
        goto out;
    }
    TV_TRY(walk_begin(&w, &b->t, DB_SOURCE, NULL, err));
    for (;;) {
        struct rec_body body;
        struct rec_source r;
        const char *why = NULL;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        TV_TRY(walk_rec(&w, REC_SOURCE, &body, err));
        if (!rec_source_get(body, &r, &why)) {
            rc = rec_damaged(b->t.s, "the record of a linked file", why, err);
            goto out;
        }
        if (r.bytes == mine.bytes && r.mtime_ns == mine.mtime_ns &&
            r.inode == mine.inode && r.header_bytes == mine.header_bytes &&
            tv_hash_equal(r.header_digest, mine.header_digest) &&
            r.path.n == mine.path.n &&
            memcmp(r.path.s, mine.path.s, r.path.n) == 0) {
            *source_id = key_get_id(&w.key, 0);
            goto out;
        }
    }
    walk_end(&w);
    TV_TRY(next_id(b, &id, err));
    key_id(&k, id);
    rec_begin(&buf);
    rec_source_put(&buf, &mine);
    TV_TRY(db_put_rec(b, DB_SOURCE, REC_SOURCE, &k, &buf, err));
    *source_id = id;
out:
    walk_end(&w);
    return batch_end(b, before, rc);
}

/* ---- maps -----------------------------------------------------------------
 */

static void source_free(struct source_map *m)
{
    if (m == NULL)
        return;
    tv_map_close(m->map);
    tv_free(m->extents);
    tv_free(m->extent_names);
    tv_free(m->path);
    tv_free(m);
}

void source_close_all(tv_store *s)
{
    while (s->sources != NULL) {
        struct source_map *next = s->sources->next;
        source_free(s->sources);
        s->sources = next;
    }
}

static enum tv_err missing(const struct txn *t, struct tv_error *err)
{
    return rec_damaged(t->s, "the record of a linked file", "it is missing",
                       err);
}

/* The cache entry of a source; caller holds the mutex. */
static enum tv_err source_entry(const struct txn *t, uint64_t id,
                                struct source_map **out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_source r;
    bool found = false;
    struct source_map *m = t->s->sources;
    while (m != NULL && m->id != id)
        m = m->next;
    if (m != NULL) {
        *out = m;
        return TV_OK;
    }
    TV_TRY(source_get(t, id, &found, &r, err));
    if (!found) {
        rc = missing(t, err);
        goto out;
    }
    m = (struct source_map *)tv_calloc(1, sizeof *m);
    if (m == NULL || (m->path = tv_strndup(r.path.s, r.path.n)) == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "no memory for a linked file");
        goto out;
    }
    m->id = id;
    m->next = t->s->sources;
    t->s->sources = m;
    *out = m;
    m = NULL;
out:
    source_free(m);
    return rc;
}

enum tv_err tv_source_path(tv_read *r, uint64_t source_id, struct tv_error *err,
                           const char **path)
{
    struct source_map *m = NULL;
    tv_store *s = r->t.s;
    (void)pthread_mutex_lock(&s->mutex);
    const enum tv_err rc = source_entry(&r->t, source_id, &m, err);
    (void)pthread_mutex_unlock(&s->mutex);
    if (rc == TV_OK)
        *path = m->path;
    return rc;
}

enum tv_err tv_source_is_used(tv_read *r, const char *path, bool *used,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct stat st, source;
    bool more = false;
    *used = false;
    if (tv_sys()->stat(path, &st) != 0)
        return TV_OK;
    TV_TRY(walk_begin(&w, &r->t, DB_SOURCE, NULL, err));
    while (!*used) {
        struct rec_body body;
        struct rec_source s;
        const char *why = NULL;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        TV_TRY(walk_rec(&w, REC_SOURCE, &body, err));
        if (!rec_source_get(body, &s, &why)) {
            rc = rec_damaged(r->t.s, "the record of a linked file", why, err);
            goto out;
        }
        if (s.inode != st.st_ino)
            continue;
        /* Numbers of inodes are only unique within a device. */
        char *name = tv_strndup(s.path.s, s.path.n);
        if (name == NULL) {
            rc = tv_error_set(err, TV_E_NOMEM, "no memory for a path");
            goto out;
        }
        *used = tv_sys()->stat(name, &source) == 0 &&
                source.st_dev == st.st_dev && source.st_ino == st.st_ino;
        tv_free(name);
    }
out:
    walk_end(&w);
    return rc;
}

static enum tv_err changed(const char *path, const char *how,
                           struct tv_error *err)
{
    tv_error_set(err, TV_E_CORRUPT, "linked file %s %s", path, how);
    tv_error_hint(err, "put the file back, or import it again with --force");
    return TV_E_CORRUPT;
}

/* Is the file the cause, or the system? */
static bool is_gone(int e)
{
    return e == ENOENT || e == ENOTDIR || e == EACCES || e == EPERM ||
           e == ELOOP;
}

static enum tv_err stat_check(const char *path, const struct stat *st,
                              const struct rec_source *r, struct tv_error *err)
{
    char how[120];
    if (!S_ISREG(st->st_mode))
        return changed(path, "is no longer a regular file", err);
    if ((uint64_t)st->st_size != r->bytes) {
        (void)snprintf(
            how, sizeof how, "has %llu bytes; it had %llu when it was linked",
            (unsigned long long)st->st_size, (unsigned long long)r->bytes);
        return changed(path, how, err);
    }
    if (mtime_ns(st) != r->mtime_ns || st->st_ino != r->inode)
        return changed(path, "was changed or replaced since it was linked",
                       err);
    return TV_OK;
}

struct named { /* a tensor of a linked file */
    uint64_t source, offset, bytes;
    size_t name; /* its place in the texts */
};

static int named_compare(const void *x, const void *y)
{
    const struct named *a = (const struct named *)x;
    const struct named *b = (const struct named *)y;
    if (a->source != b->source)
        return a->source < b->source ? -1 : 1;
    return (a->offset > b->offset) - (a->offset < b->offset);
}

/* Gives a file its extents; without memory it goes without names. */
static void source_name(struct source_map *m, const struct named *list,
                        size_t n, const char *texts)
{
    size_t bytes = 0, at = 0;
    for (size_t i = 0; i < n; i++)
        bytes += strlen(texts + list[i].name) + 1;
    m->extents = (struct tv_extent *)tv_calloc(n, sizeof *m->extents);
    m->extent_names = (char *)tv_alloc(bytes);
    if (m->extents == NULL || m->extent_names == NULL)
        return;
    for (size_t i = 0; i < n; i++) {
        const char *name = texts + list[i].name;
        const size_t n_name = strlen(name) + 1;
        memcpy(m->extent_names + at, name, n_name);
        m->extents[i] = (struct tv_extent){.offset = list[i].offset,
                                           .bytes = list[i].bytes,
                                           .name = m->extent_names + at};
        at += n_name;
    }
    m->n_extents = n;
}

/* Names the tensors of all linked files for a SIGBUS handler: one walk, however
 * many files there are. Going without names is no failure. */
static void name_extents(const struct txn *t)
{
    struct walk w = {0};
    struct tv_buf texts;
    struct named *list = NULL;
    size_t n = 0, cap = 0;
    bool more = false;
    tv_buf_init(&texts, (size_t)1 << 30);
    if (walk_begin(&w, t, DB_TENSOR, NULL, NULL) != TV_OK)
        goto out;
    while (walk_next(&w, &more, NULL) == TV_OK && more) {
        struct rec_body body;
        struct rec_tensor r;
        const char *why = NULL;
        if (!rec_open(REC_TENSOR, w.key.mv_data, w.key.mv_size, w.val.mv_data,
                      w.val.mv_size, &body, &why) ||
            !rec_tensor_get(body, &r, &why) || r.t.storage != TV_LINKED)
            continue;
        if (n == cap) {
            cap = cap == 0 ? 64 : cap * 2;
            struct named *p =
                (struct named *)tv_realloc(list, cap * sizeof *list);
            if (p == NULL)
                goto out;
            list = p;
        }
        list[n++] = (struct named){.source = r.t.source_id,
                                   .offset = r.t.offset,
                                   .bytes = r.t.bytes,
                                   .name = texts.n_bytes};
        tv_buf_add(&texts, r.name.s, r.name.n);
        tv_buf_add(&texts, "", 1);
    }
    if (n == 0 || tv_buf_ok(&texts, NULL) != TV_OK)
        goto out;
    qsort(list, n, sizeof *list, named_compare);
    for (size_t i = 0, end = 0; i < n; i = end) {
        struct source_map *m = NULL;
        for (end = i + 1; end < n && list[end].source == list[i].source; end++)
            ;
        if (source_entry(t, list[i].source, &m, NULL) != TV_OK || m->named)
            continue;
        source_name(m, list + i, end - i, texts.data);
        m->named = true;
    }
out:
    walk_end(&w);
    tv_free(list);
    tv_buf_free(&texts);
}

static enum tv_err source_map_open(const struct txn *t, struct source_map *m,
                                   const struct rec_source *r,
                                   struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_map *map = NULL;
    struct tv_error own;
    tv_error_clear(&own);
    rc = tv_map_open(m->path, &own, &map);
    if (rc == TV_E_INPUT || (rc == TV_E_IO && is_gone(own.sys_errno))) {
        rc = changed(m->path,
                     own.sys_errno == ENOENT ? "is gone" : "cannot be opened",
                     err);
        goto out;
    }
    if (rc != TV_OK) {
        if (err != NULL)
            *err = own;
        goto out;
    }
    TV_TRY(stat_check(m->path, tv_map_stat(map), r, err));
    if (!tv_hash_equal(tv_hash128(tv_map_data(map), (size_t)r->header_bytes),
                       r->header_digest)) {
        rc =
            changed(m->path, "has another header than when it was linked", err);
        goto out;
    }
    if (!m->named)
        name_extents(t);
    m->named = true;
    m->map = map;
    map = NULL;
    tv_map_set_extents(m->map, m->extents, m->n_extents);
out:
    tv_map_close(map);
    return rc;
}

enum tv_err source_view(tv_read *r, const struct tv_tensor *t,
                        struct tv_view *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct source_map *m = NULL;
    struct rec_source rec;
    struct stat st;
    bool found = false;
    tv_store *s = r->t.s;
    const unsigned char **chunks =
        (const unsigned char **)arena_alloc(&r->arena, sizeof *chunks);
    if (chunks == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a view");
    (void)pthread_mutex_lock(&s->mutex);
    TV_TRY(source_entry(&r->t, t->source_id, &m, err));
    TV_TRY(source_get(&r->t, t->source_id, &found, &rec, err));
    if (!found) {
        rc = missing(&r->t, err);
        goto out;
    }
    if (m->map == NULL)
        TV_TRY(source_map_open(&r->t, m, &rec, err));
    if (tv_sys()->stat(m->path, &st) != 0) {
        const int e = errno;
        rc = e == ENOENT  ? changed(m->path, "is gone", err)
             : is_gone(e) ? changed(m->path, "cannot be reached", err)
                          : tv_error_sys(err, e,
                                         "cannot examine linked file "
                                         "%s",
                                         m->path);
        goto out;
    }
    TV_TRY(stat_check(m->path, &st, &rec, err));
    if (t->offset > rec.bytes || t->bytes > rec.bytes - t->offset) {
        rc = changed(m->path, "is shorter than its tensors", err);
        goto out;
    }
    chunks[0] = tv_map_data(m->map) + (t->bytes > 0 ? t->offset : 0);
    memset(out, 0, sizeof *out);
    out->dtype = t->dtype;
    out->rank = t->rank;
    memcpy(out->shape, t->shape, sizeof out->shape);
    out->n_elems = t->n_elems;
    out->bytes = t->bytes;
    out->chunk_bytes = t->bytes > 0 ? t->bytes : 1;
    out->n_chunks = t->bytes > 0 ? 1 : 0;
    out->chunks = chunks;
out:
    (void)pthread_mutex_unlock(&s->mutex);
    return rc;
}
