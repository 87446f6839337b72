/* SPDX-License-Identifier: Apache-2.0 */
/*
 * payload.c - content: chunks, leaves, sharing, and views of it.
 *
 * A payload lives in four sub-databases: `payload` (geometry, state, number of
 * users), `chunk` (its bytes), `leaf` (their checksums) and `content` (how to
 * find it by checksum). Its states:
 *
 *     PARTIAL   chunks are being written; listed in `trash` with the session
 *               that writes it, so that it goes when that was killed
 *     COMPLETE  finished; leaves `trash` with its first user
 *     DOOMED    no user is left; in `trash` until its chunks are gone
 *
 * A value of at least half a page lies on pages of its own, from byte 16 on;
 * with 48 bytes of chunk header the payload starts at a multiple of 64.
 */
#include "store_priv.h"

#include <inttypes.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

#define SCARCE_CHUNK ((uint64_t)256 << 10)

/* ---- records --------------------------------------------------------------
 */

enum tv_err payload_get(const struct txn *t, uint64_t id, bool *found,
                        struct rec_payload *r, struct tv_error *err)
{
    struct rec_key k;
    struct rec_body body;
    const char *why = NULL;
    char what[64];
    (void)snprintf(what, sizeof what, "the record of payload %" PRIu64, id);
    key_id(&k, id);
    const enum tv_err rc =
        db_get_rec(t, DB_PAYLOAD, REC_PAYLOAD, &k, found, &body, what, err);
    if (rc != TV_OK || !*found)
        return rc;
    if (!rec_payload_get(body, r, &why))
        return rec_damaged(t->s, what, why, err);
    return TV_OK;
}

enum tv_err payload_put(tv_batch *b, uint64_t id, const struct rec_payload *r,
                        struct tv_error *err)
{
    struct rec_key k;
    struct tv_buf buf;
    key_id(&k, id);
    rec_begin(&buf);
    rec_payload_put(&buf, r);
    return db_put_rec(b, DB_PAYLOAD, REC_PAYLOAD, &k, &buf, err);
}

static uint64_t chunk_bytes_at(const struct rec_payload *r, uint64_t chunk)
{
    const uint64_t left = r->bytes - chunk * r->chunk_bytes;
    return left < r->chunk_bytes ? left : r->chunk_bytes;
}

static uint64_t elems_in(const struct rec_payload *r, uint64_t bytes)
{
    /* Chunks hold whole elements; bytes * 8 cannot overflow below 2^31. */
    return bytes * 8 / tv_dtype_bits(r->dtype);
}

/* ---- views ----------------------------------------------------------------
 */

static enum tv_err chunk_damaged(const tv_store *s, uint64_t id, uint64_t chunk,
                                 const char *why, struct tv_error *err)
{
    char what[96];
    (void)snprintf(what, sizeof what, "chunk %" PRIu64 " of payload %" PRIu64,
                   chunk, id);
    return rec_damaged(s, what, why, err);
}

enum tv_err payload_view(const struct txn *t, uint64_t id,
                         const struct rec_payload *r, bool align,
                         struct arena *a, struct tv_view *out,
                         struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key prefix;
    const unsigned char **chunks = NULL;
    bool more = false;
    size_t bytes = 0;
    if (!tv_mul_size((size_t)r->n_chunks, sizeof *chunks, &bytes) ||
        (chunks = (const unsigned char **)arena_alloc(a, bytes)) == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a view");
    key_id(&prefix, id);
    TV_TRY(walk_begin(&w, t, DB_CHUNK, &prefix, err));
    for (uint64_t i = 0; i < r->n_chunks; i++) {
        struct rec_chunk c;
        const char *why = NULL;
        TV_TRY(walk_next(&w, &more, err));
        if (!more || w.key.mv_size != 12 ||
            tv_get_be32((const unsigned char *)w.key.mv_data + 8) != i) {
            rc = chunk_damaged(t->s, id, i, "it is missing", err);
            goto out;
        }
        if (!rec_chunk_get(w.val.mv_data, w.val.mv_size, &c, &why)) {
            rc = chunk_damaged(t->s, id, i, why, err);
            goto out;
        }
        const uint64_t want = chunk_bytes_at(r, i);
        if (c.number != i || c.dtype != r->dtype || c.bytes != want ||
            c.n_elems != elems_in(r, want)) {
            rc = chunk_damaged(t->s, id, i,
                               "its header belongs to another chunk", err);
            goto out;
        }
        const unsigned char *p =
            (const unsigned char *)w.val.mv_data + TV_CHUNK_HEADER;
        if (align && (uintptr_t)p % 64 != 0) {
            unsigned char *copy = (unsigned char *)arena_alloc(a, want);
            if (copy == NULL) {
                rc = tv_error_set(err, TV_E_NOMEM, "no memory for a chunk");
                goto out;
            }
            memcpy(copy, p, (size_t)want);
            p = copy;
        }
        chunks[i] = p;
    }
    memset(out, 0, sizeof *out);
    out->dtype = r->dtype;
    out->rank = r->rank;
    memcpy(out->shape, r->shape, sizeof out->shape);
    out->n_elems = r->n_elems;
    out->bytes = r->bytes;
    out->chunk_bytes = r->chunk_bytes;
    out->n_chunks = (size_t)r->n_chunks;
    out->chunks = chunks;
out:
    walk_end(&w);
    return rc;
}

enum tv_err payload_leaves(const struct txn *t, uint64_t id,
                           const struct rec_payload *r, struct arena *a,
                           const struct tv_hash **leaves, struct tv_error *err)
{
    struct rec_key k;
    struct rec_body body;
    bool found = false;
    char what[64];
    (void)snprintf(what, sizeof what, "the checksums of payload %" PRIu64, id);
    key_id(&k, id);
    const enum tv_err rc =
        long_get(t, DB_LEAF, REC_LEAVES, &k, a, &found, &body, what, err);
    if (rc != TV_OK)
        return rc;
    const uint64_t n = tv_leaf_count(r->bytes);
    if (!found || body.n / 16 != n || body.n % 16 != 0)
        return rec_damaged(t->s, what, found ? "wrong size" : "missing", err);
    struct tv_hash *list =
        (struct tv_hash *)arena_alloc(a, n * sizeof(struct tv_hash));
    if (list == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for checksums");
    for (uint64_t i = 0; i < n; i++)
        list[i] = tv_hash_get(body.p + 16 * i);
    if (!tv_hash_equal(tv_leaves_checksum(list, (size_t)n), r->checksum))
        return rec_damaged(t->s, what, "they do not add up", err);
    *leaves = list;
    return TV_OK;
}

/* ---- users ----------------------------------------------------------------
 */

static bool desc_fits(const struct tv_tensor_desc *d,
                      const struct rec_payload *r)
{
    return d->dtype == r->dtype && d->rank == r->rank &&
           (d->rank == 0 ||
            memcmp(d->shape, r->shape, d->rank * sizeof *d->shape) == 0);
}

static enum tv_err no_payload(tv_batch *b, uint64_t id, const char *why,
                              struct tv_error *err)
{
    return tv_error_set(err, TV_E_INTERNAL, "store %s: payload %" PRIu64 " %s",
                        b->t.s->path, id, why);
}

enum tv_err payload_ref(tv_batch *b, uint64_t id,
                        const struct tv_tensor_desc *d, struct rec_payload *r,
                        struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    bool found = false;
    struct rec_key k;
    TV_TRY(payload_get(&b->t, id, &found, r, err));
    if (!found || r->state != REC_COMPLETE) {
        rc = no_payload(b, id, found ? "is not finished" : "does not exist",
                        err);
        goto out;
    }
    if (!desc_fits(d, r)) {
        rc = no_payload(b, id, "has another dtype or shape", err);
        goto out;
    }
    if (r->refs == 0) {
        key_trash(&k, 'p', id);
        TV_TRY(db_del(b, DB_TRASH, &k, NULL, err));
    }
    r->refs++;
    TV_TRY(payload_put(b, id, r, err));
out:
    return rc;
}

enum tv_err payload_doom(tv_batch *b, uint64_t id, struct rec_payload *r,
                         struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    if (r->state == REC_COMPLETE) {
        key_content(&k, r->checksum, id);
        TV_TRY(db_del(b, DB_CONTENT, &k, NULL, err));
    }
    r->state = REC_DOOMED;
    r->refs = 0;
    TV_TRY(payload_put(b, id, r, err));
    TV_TRY(trash_put(b, 'p', id, 0, err));
out:
    return rc;
}

enum tv_err payload_unref(tv_batch *b, uint64_t id, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_payload r;
    bool found = false;
    TV_TRY(payload_get(&b->t, id, &found, &r, err));
    /* A missing payload is damage that verify reports; removal goes on. */
    if (!found || r.refs == 0)
        goto out;
    if (r.refs == 1) {
        TV_TRY(payload_doom(b, id, &r, err));
        b->cleanup = true;
        goto out;
    }
    r.refs--;
    TV_TRY(payload_put(b, id, &r, err));
out:
    return rc;
}

/* ---- writing --------------------------------------------------------------
 */

enum tv_err tv_payload_begin(tv_batch *b, const struct tv_tensor_desc *d,
                             uint64_t chunk_bytes_max, struct tv_payload *out,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_payload r;
    uint64_t id = 0;
    const uint64_t before = b->n_writes;
    TV_TRY(batch_check(b, err));
    if (chunk_bytes_max == 0) {
        chunk_bytes_max = TV_CHUNK_BYTES;
        if (chunk_bytes_max > b->t.s->dirty_max)
            chunk_bytes_max = b->t.s->dirty_max;
    }
    /* LMDB needs neighbouring pages for a chunk. Where space is scarce, small
     * chunks find room between what lives on; quota_chunks makes them smaller
     * where even these would not. */
    if (b->quota != 0 && chunk_bytes_max > b->quota / 64)
        chunk_bytes_max =
            b->quota / 64 > SCARCE_CHUNK ? b->quota / 64 : SCARCE_CHUNK;
    TV_TRY(rec_geometry(d, chunk_bytes_max, &r, err));
    TV_TRY(quota_chunks(b, &r, err));
    TV_TRY(next_id(b, &id, err));
    TV_TRY(payload_put(b, id, &r, err));
    TV_TRY(trash_put(b, 'p', id, b->t.s->session, err));
    memset(out, 0, sizeof *out);
    out->id = id;
    out->dtype = r.dtype;
    out->rank = r.rank;
    memcpy(out->shape, r.shape, sizeof out->shape);
    out->n_elems = r.n_elems;
    out->bytes = r.bytes;
    out->chunk_bytes = r.chunk_bytes;
    out->n_chunks = (size_t)r.n_chunks;
out:
    return batch_end(b, before, rc);
}

static struct rec_payload geometry_of(const struct tv_payload *p)
{
    struct rec_payload r = {.dtype = p->dtype,
                            .rank = p->rank,
                            .n_elems = p->n_elems,
                            .bytes = p->bytes,
                            .chunk_bytes = p->chunk_bytes,
                            .n_chunks = p->n_chunks};
    memcpy(r.shape, p->shape, sizeof r.shape);
    return r;
}

enum tv_err tv_chunk_reserve(tv_batch *b, const struct tv_payload *p,
                             size_t chunk, void **data, size_t *n,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct rec_payload r = geometry_of(p);
    struct rec_key k;
    void *value = NULL;
    const uint64_t before = b->n_writes;
    TV_TRY(batch_check(b, err));
    if (chunk >= p->n_chunks) {
        rc = no_payload(b, p->id, "has no such chunk", err);
        goto out;
    }
    const uint64_t bytes = chunk_bytes_at(&r, chunk);
    const uint64_t total = rec_chunk_value_bytes(bytes, b->t.s->page_bytes);
    TV_TRY(quota_check(b, total, err));
    key_chunk(&k, p->id, (uint32_t)chunk);
    TV_TRY(db_reserve(b, DB_CHUNK, &k, (size_t)total, &value, err));
    unsigned char *v = (unsigned char *)value;
    memset(v, 0, TV_CHUNK_HEADER);
    memset(v + TV_CHUNK_HEADER + bytes, 0,
           (size_t)(total - TV_CHUNK_HEADER - bytes));
    b->dirty += total;
    quota_put(b, total - TV_CHUNK_HEADER);
    b->pending = true;
    b->pending_id = p->id;
    b->pending_chunk = chunk;
    b->pending_bytes = bytes;
    b->pending_value = v;
    *data = v + TV_CHUNK_HEADER;
    *n = (size_t)bytes;
out:
    return batch_end(b, before, rc);
}

static bool is_pending(const tv_batch *b, const struct tv_payload *p,
                       size_t chunk)
{
    return b->pending && b->pending_id == p->id && b->pending_chunk == chunk;
}

enum tv_err tv_chunk_seal(tv_batch *b, const struct tv_payload *p, size_t chunk,
                          struct tv_error *err)
{
    uint64_t hash = 0;
    if (is_pending(b, p, chunk))
        hash = tv_hash64(b->pending_value + TV_CHUNK_HEADER,
                         (size_t)b->pending_bytes);
    return chunk_seal(b, p, chunk, hash, err);
}

enum tv_err chunk_seal(tv_batch *b, const struct tv_payload *p, size_t chunk,
                       uint64_t hash, struct tv_error *err)
{
    if (!is_pending(b, p, chunk))
        return batch_result(
            b, no_payload(b, p->id, "has no such chunk reserved", err));
    const struct rec_payload r = geometry_of(p);
    const struct rec_chunk c = {.dtype = p->dtype,
                                .number = (uint32_t)chunk,
                                .bytes = b->pending_bytes,
                                .n_elems = elems_in(&r, b->pending_bytes),
                                .payload_hash = hash};
    rec_chunk_put(b->pending_value, &c);
    b->pending = false;
    b->pending_value = NULL;
    return TV_OK;
}

/* Finds finished content equal to `same`, leaving out one payload. */
static enum tv_err content_find(tv_batch *b, const struct tv_tensor_desc *d,
                                struct tv_hash sum, const struct tv_view *same,
                                uint64_t except, bool *found, uint64_t *id,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct arena a = {NULL};
    struct rec_key prefix;
    bool more = false;
    *found = false;
    key_digest(&prefix, sum);
    TV_TRY(walk_begin(&w, &b->t, DB_CONTENT, &prefix, err));
    while (!*found) {
        struct rec_payload r;
        struct tv_view v;
        bool there = false;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        const uint64_t other = key_get_id(&w.key, 16);
        if (other == except)
            continue;
        TV_TRY(payload_get(&b->t, other, &there, &r, err));
        if (!there || r.state != REC_COMPLETE || !desc_fits(d, &r))
            continue;
        const enum tv_err seen =
            payload_view(&b->t, other, &r, false, &a, &v, err);
        if (seen == TV_E_CORRUPT) {
            /* Damaged content is not shared: a sound copy is written. */
            tv_error_clear(err);
            continue;
        }
        TV_TRY(seen);
        if (tv_view_equal(&v, same)) {
            *found = true;
            *id = other;
        }
    }
out:
    walk_end(&w);
    arena_clear(&a);
    return rc;
}

enum tv_err tv_payload_lookup(tv_batch *b, const struct tv_tensor_desc *d,
                              struct tv_hash checksum,
                              const struct tv_view *same, bool *found,
                              uint64_t *id, struct tv_error *err)
{
    *found = false;
    const enum tv_err rc = batch_check(b, err);
    if (rc != TV_OK)
        return rc;
    return content_find(b, d, checksum, same, 0, found, id, err);
}

enum tv_err tv_payload_finish(tv_batch *b, const struct tv_payload *p,
                              const struct tv_hash *leaves, uint64_t *id,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_payload r;
    struct rec_key k;
    struct tv_buf buf;
    struct tv_view v;
    struct arena a = {NULL};
    bool found = false, more = false;
    uint64_t other = 0;
    const uint64_t before = b->n_writes;
    TV_TRY(batch_check(b, err));
    TV_TRY(payload_get(&b->t, p->id, &found, &r, err));
    if (!found || r.state != REC_PARTIAL) {
        rc = no_payload(b, p->id, "is not being written", err);
        goto out;
    }
    const size_t n_leaves = (size_t)tv_leaf_count(r.bytes);
    r.checksum = tv_leaves_checksum(leaves, n_leaves);
    TV_TRY(payload_view(&b->t, p->id, &r, false, &a, &v, err));
    const struct tv_tensor_desc d = {
        .name = "", .dtype = r.dtype, .rank = r.rank, .shape = r.shape};
    TV_TRY(content_find(b, &d, r.checksum, &v, p->id, &found, &other, err));
    if (found) {
        TV_TRY(payload_doom(b, p->id, &r, err));
        TV_TRY(trash_step(b, false, &more, err));
        b->cleanup = b->cleanup || more;
        *id = other;
        goto out;
    }
    key_id(&k, p->id);
    tv_buf_init(&buf, TV_REC_BODY_MAX);
    rec_leaves_put(&buf, leaves, n_leaves);
    rc = tv_buf_ok(&buf, err);
    if (rc == TV_OK)
        rc = long_put(b, DB_LEAF, REC_LEAVES, &k, buf.data, buf.n_bytes, err);
    tv_buf_free(&buf);
    TV_TRY(rc);
    r.state = REC_COMPLETE;
    TV_TRY(payload_put(b, p->id, &r, err));
    key_content(&k, r.checksum, p->id);
    rec_begin(&buf);
    TV_TRY(db_put_rec(b, DB_CONTENT, REC_CONTENT, &k, &buf, err));
    *id = p->id;
out:
    arena_clear(&a);
    return batch_end(b, before, rc);
}
