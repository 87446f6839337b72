/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pieces.c - long values: in one row of pages, or in pieces of a page each.
 *
 * LMDB wants a value's pages side by side and lets the file grow where no free
 * run is long enough. Where a quota forbids that, a side file, the state of a
 * run or a list of checksums is cut, so that it fits whenever there are pages
 * enough, wherever they lie:
 *
 *     key              type PIECES: type of the value u8, its bytes, of a piece
 *     key 0 number u32 type PIECE: bytes of the value; only the last is shorter
 *
 * Keys of these tables have one length each, or (run) no zero byte, so that no
 * other key looks like a piece's. Each has its own checksum, which covers the
 * key. A store becomes one of format 2 with its first pieces: programs that do
 * not know of them say so.
 */
#include "derived_priv.h"

#include <string.h>

#include "tv/checked.h"

#define ROW_HEAD   16u /* of a run of LMDB's pages */
#define KEY_SUFFIX 5u  /* 0, number u32 */
#define PAGE_LEAST ((uint64_t)4096)

static void key_piece(struct rec_key *k, const struct rec_key *owner,
                      uint32_t number)
{
    *k = *owner;
    k->b[k->n++] = 0;
    tv_put_be32(k->b + k->n, number);
    k->n += 4;
}

bool piece_key(enum db db, const void *key, size_t n)
{
    const unsigned char *k = (const unsigned char *)key;
    if (n <= KEY_SUFFIX || k[n - KEY_SUFFIX] != 0)
        return false;
    switch (db) {
    case DB_BLOB:
        return n == 16 + KEY_SUFFIX;
    case DB_LEAF:
        return n == 8 + KEY_SUFFIX;
    default: /* the name of a run ends at the first zero */
        return memchr(k, 0, n) == k + n - KEY_SUFFIX;
    }
}

size_t piece_owner(size_t key_bytes)
{
    return key_bytes - KEY_SUFFIX;
}

static uint64_t pieces_of(const struct rec_pieces *p)
{
    return (p->bytes + p->piece_bytes - 1) / p->piece_bytes;
}

bool piece_belongs(const struct rec_key *owner, const MDB_val *head,
                   const void *key, size_t n)
{
    struct rec_pieces p;
    struct rec_body body;
    const char *why = NULL;
    return rec_open(REC_PIECES, owner->b, owner->n, head->mv_data,
                    head->mv_size, &body, &why) &&
           rec_pieces_get(body, &p, &why) &&
           tv_get_be32((const unsigned char *)key + n - 4) < pieces_of(&p);
}

static size_t piece_bytes(const tv_store *s)
{
    return s->page_bytes - ROW_HEAD - TV_REC_HEAD;
}

uint64_t long_bytes(uint64_t bytes)
{
    const uint64_t pieces = bytes / (PAGE_LEAST - ROW_HEAD - TV_REC_HEAD) + 1;
    /* A page, and an entry of the tree with a key. */
    return pieces * (PAGE_LEAST + 64);
}

/* ---- writing --------------------------------------------------------------
 */

/* Programs that know format 1 alone must not take pieces for damage. */
static enum tv_err raise_format(tv_batch *b, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    struct rec_body body;
    struct rec_store r;
    struct tv_buf buf;
    const char *why = "it is missing";
    bool found = false;
    key_str(&k, META_STORE);
    TV_TRY(db_get_rec(&b->t, DB_META, REC_STORE, &k, &found, &body,
                      "the store record", err));
    if (!found || !rec_store_get(body, &r, &why)) {
        rc = rec_damaged(b->t.s, "the store record", why, err);
        goto out;
    }
    if (r.format >= TV_STORE_FORMAT)
        goto out;
    r.format = TV_STORE_FORMAT;
    rec_begin(&buf);
    rec_store_put(&buf, &r);
    rc = db_put_rec(b, DB_META, REC_STORE, &k, &buf, err);
out:
    return rc;
}

static enum tv_err put_pieces(tv_batch *b, enum db db, enum rec_type type,
                              const struct rec_key *k, const void *data,
                              size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_buf buf;
    const struct rec_pieces head = {.type = (uint8_t)type,
                                    .bytes = n,
                                    .piece_bytes =
                                        (uint32_t)piece_bytes(b->t.s)};
    TV_TRY(raise_format(b, err));
    rec_begin(&buf);
    rec_pieces_put(&buf, &head);
    TV_TRY(db_put_rec(b, db, REC_PIECES, k, &buf, err));
    for (size_t at = 0; at < n; at += head.piece_bytes) {
        struct rec_key pk;
        const size_t some =
            n - at < head.piece_bytes ? n - at : head.piece_bytes;
        key_piece(&pk, k, (uint32_t)(at / head.piece_bytes));
        rec_begin(&buf);
        tv_buf_add(&buf, (const unsigned char *)data + at, some);
        TV_TRY(db_put_rec(b, db, REC_PIECE, &pk, &buf, err));
        quota_put(b, some);
    }
out:
    return rc;
}

/* All pieces under a key, whatever its head says: one that is damaged must not
 * leave them to the value that takes its place. */
static enum tv_err drop_pieces(tv_batch *b, enum db db, const struct rec_key *k,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key prefix = *k, piece;
    bool more = true;
    prefix.b[prefix.n++] = 0;
    while (more) {
        TV_TRY(walk_begin(&w, &b->t, db, &prefix, err));
        TV_TRY(walk_next(&w, &more, err));
        if (more) {
            piece.n = w.key.mv_size <= sizeof piece.b ? w.key.mv_size : 0;
            memcpy(piece.b, w.key.mv_data, piece.n);
        }
        walk_end(&w);
        if (more)
            TV_TRY(db_del(b, db, &piece, NULL, err));
    }
out:
    walk_end(&w);
    return rc;
}

enum tv_err long_put(tv_batch *b, enum db db, enum rec_type type,
                     const struct rec_key *k, const void *data, size_t n,
                     struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_buf buf;
    TV_TRY(drop_pieces(b, db, k, err));
    if (quota_full(b, n)) {
        rc = put_pieces(b, db, type, k, data, n, err);
        goto out;
    }
    rec_begin(&buf);
    tv_buf_add(&buf, data, n);
    TV_TRY(db_put_rec(b, db, type, k, &buf, err));
    if (value_pages(n, b->t.s->page_bytes) > 1)
        quota_put(b, n);
out:
    return rc;
}

enum tv_err long_del(tv_batch *b, enum db db, const struct rec_key *k,
                     struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    TV_TRY(drop_pieces(b, db, k, err));
    rc = db_del(b, db, k, NULL, err);
out:
    return rc;
}

/* ---- reading --------------------------------------------------------------
 */

/* The pieces of a value, joined in memory of the arena. */
static enum tv_err join(const struct txn *t, enum db db,
                        const struct rec_key *k, const struct rec_pieces *p,
                        struct arena *a, const char *what, struct rec_body *out,
                        struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key prefix = *k, pk;
    MDB_val last = {0, NULL};
    const uint64_t n = pieces_of(p);
    bool more = false;
    key_piece(&pk, k, n > 0 ? (uint32_t)(n - 1) : 0);
    /* Asked before the memory: a damaged length is not believed. */
    TV_TRY(db_get(t, db, &pk, &more, &last, err));
    unsigned char *data =
        n == 0 || more ? (unsigned char *)arena_alloc(a, p->bytes) : NULL;
    if (data == NULL) {
        rc = n == 0 || more
                 ? tv_error_set(err, TV_E_NOMEM, "no memory for %s", what)
                 : rec_damaged(t->s, what, "a piece is missing", err);
        goto out;
    }
    prefix.b[prefix.n++] = 0;
    TV_TRY(walk_begin(&w, t, db, &prefix, err));
    for (uint64_t i = 0; i < n; i++) {
        struct rec_body piece;
        const char *why = "a piece is missing";
        const uint64_t at = i * p->piece_bytes;
        const uint64_t want =
            p->bytes - at < p->piece_bytes ? p->bytes - at : p->piece_bytes;
        TV_TRY(walk_next(&w, &more, err));
        key_piece(&pk, k, (uint32_t)i);
        if (!more || w.key.mv_size != pk.n ||
            memcmp(w.key.mv_data, pk.b, pk.n) != 0 ||
            !rec_open(REC_PIECE, pk.b, pk.n, w.val.mv_data, w.val.mv_size,
                      &piece, &why) ||
            piece.n != want) {
            rc = rec_damaged(t->s, what, why, err);
            goto out;
        }
        memcpy(data + at, piece.p, (size_t)want);
    }
    *out = (struct rec_body){.p = data, .n = (size_t)p->bytes};
out:
    walk_end(&w);
    return rc;
}

enum tv_err long_open(const struct txn *t, enum db db, enum rec_type type,
                      const struct rec_key *k, const MDB_val *val,
                      struct arena *a, const char *what, struct rec_body *body,
                      struct tv_error *err)
{
    struct rec_pieces p;
    struct rec_body head;
    const char *why = NULL, *other = NULL;
    if (rec_open(type, k->b, k->n, val->mv_data, val->mv_size, body, &why))
        return TV_OK;
    if (!rec_open(REC_PIECES, k->b, k->n, val->mv_data, val->mv_size, &head,
                  &other))
        return rec_damaged(t->s, what, why, err);
    if (!rec_pieces_get(head, &p, &why))
        return rec_damaged(t->s, what, why, err);
    if (p.type != (uint8_t)type)
        return rec_damaged(t->s, what, "record of another type", err);
    if (k->n > TV_REC_KEY_MAX - KEY_SUFFIX)
        return rec_damaged(t->s, what, "its key is too long for pieces", err);
    return join(t, db, k, &p, a, what, body, err);
}

enum tv_err long_get(const struct txn *t, enum db db, enum rec_type type,
                     const struct rec_key *k, struct arena *a, bool *found,
                     struct rec_body *body, const char *what,
                     struct tv_error *err)
{
    MDB_val val = {0, NULL};
    const enum tv_err rc = db_get(t, db, k, found, &val, err);
    if (rc != TV_OK || !*found)
        return rc;
    return long_open(t, db, type, k, &val, a, what, body, err);
}
