/* SPDX-License-Identifier: Apache-2.0 */
/*
 * trash.c - giving space back in bounded batches.
 *
 * `trash` lists what is on its way out: doomed objects ('o'), doomed payloads
 * and unfinished payloads ('p', with the session that writes them). One step
 * drops at most 256 chunks (4 GiB of nominal ones: LMDB notes every freed page
 * in memory) and 4096 tensor entries, so removal needs little memory, little
 * room for its own pages, and can be cut off anywhere.
 *
 * gc does the same for everything, and then looks for records that nothing
 * refers to, which only a bug or damage can leave.
 */
#include "derived_priv.h"

#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

#define ENTRY_BYTES 64u /* of a chunk, in the tree */

enum tv_err trash_put(tv_batch *b, char what, uint64_t id, uint64_t session,
                      struct tv_error *err)
{
    struct rec_key k;
    struct tv_buf buf;
    key_trash(&k, what, id);
    rec_begin(&buf);
    rec_number_put(&buf, session);
    return db_put_rec(b, DB_TRASH, REC_TRASH, &k, &buf, err);
}

/* Deletes up to *budget entries with an 'id' prefix; *left when some remain. */
static enum tv_err drop_prefix(tv_batch *b, enum db db, uint64_t id,
                               uint64_t *budget, bool *left,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key prefix, k;
    bool more = true;
    key_id(&prefix, id);
    *left = false;
    while (more) {
        /* Begun again each time: deleting moves what a cursor stands on. */
        TV_TRY(walk_begin(&w, &b->t, db, &prefix, err));
        TV_TRY(walk_next(&w, &more, err));
        if (more) {
            k.n = w.key.mv_size <= sizeof k.b ? w.key.mv_size : 0;
            memcpy(k.b, w.key.mv_data, k.n);
        }
        walk_end(&w);
        if (!more)
            break;
        if (*budget == 0) {
            *left = true;
            break;
        }
        (*budget)--;
        TV_TRY(db_del(b, db, &k, NULL, err));
    }
out:
    walk_end(&w);
    return rc;
}

static enum tv_err payload_drop(tv_batch *b, uint64_t id, uint64_t *chunks,
                                bool *left, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    struct rec_payload r;
    bool found = false;
    const enum tv_err seen = payload_get(&b->t, id, &found, &r, err);
    if (seen == TV_E_CORRUPT)
        tv_error_clear(err); /* a damaged record is dropped like another */
    else
        TV_TRY(seen);
    if (seen == TV_OK && found && r.state == REC_COMPLETE) {
        key_content(&k, r.checksum, id);
        TV_TRY(db_del(b, DB_CONTENT, &k, NULL, err));
    }
    if (seen == TV_OK && found && r.state != REC_DOOMED) {
        /* Not to be found half gone by whoever comes next. */
        r.state = REC_DOOMED;
        TV_TRY(payload_put(b, id, &r, err));
    }
    TV_TRY(drop_prefix(b, DB_CHUNK, id, chunks, left, err));
    if (*left)
        goto out;
    key_id(&k, id);
    TV_TRY(long_del(b, DB_LEAF, &k, err));
    TV_TRY(db_del(b, DB_PAYLOAD, &k, NULL, err));
    key_trash(&k, 'p', id);
    TV_TRY(db_del(b, DB_TRASH, &k, NULL, err));
out:
    return rc;
}

static enum tv_err object_drop(tv_batch *b, uint64_t id, uint64_t *tensors,
                               bool *left, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key prefix, k;
    bool more = true;
    key_id(&prefix, id);
    *left = false;
    while (more) {
        struct rec_body body;
        struct rec_tensor t;
        const char *why = NULL;
        bool sound = false;
        TV_TRY(walk_begin(&w, &b->t, DB_TENSOR, &prefix, err));
        TV_TRY(walk_next(&w, &more, err));
        if (more) {
            k.n = w.key.mv_size <= sizeof k.b ? w.key.mv_size : 0;
            memcpy(k.b, w.key.mv_data, k.n);
            sound = rec_open(REC_TENSOR, k.b, k.n, w.val.mv_data, w.val.mv_size,
                             &body, &why) &&
                    rec_tensor_get(body, &t, &why);
        }
        walk_end(&w);
        if (!more)
            break;
        if (*tensors == 0) {
            *left = true;
            goto out;
        }
        (*tensors)--;
        if (sound)
            TV_TRY(tensor_release(b, &t.t, err));
        TV_TRY(db_del(b, DB_TENSOR, &k, NULL, err));
    }
    key_id(&k, id);
    TV_TRY(db_del(b, DB_OBJECT_ID, &k, NULL, err));
    key_trash(&k, 'o', id);
    TV_TRY(db_del(b, DB_TRASH, &k, NULL, err));
out:
    walk_end(&w);
    return rc;
}

/* The first entry after `after` (empty: from the start) that may go. */
static enum tv_err next_trash(tv_batch *b, bool all, struct rec_key *after,
                              bool *found, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    bool more = false;
    *found = false;
    TV_TRY(walk_begin(&w, &b->t, DB_TRASH, NULL, err));
    while (!*found) {
        struct rec_body body;
        const char *why = NULL;
        uint64_t session = 0;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        if (w.key.mv_size != 9 ||
            (after->n == 9 && memcmp(w.key.mv_data, after->b, 9) <= 0))
            continue;
        /* A damaged entry says nothing about its writer: let gc decide. */
        const bool sound =
            rec_open(REC_TRASH, w.key.mv_data, w.key.mv_size, w.val.mv_data,
                     w.val.mv_size, &body, &why) &&
            rec_number_get(body, &session, &why);
        const bool mine = session == b->t.s->session;
        const bool foreign = session != 0 && !mine && b->t.s->lock_fd >= 0;
        *found = all || (sound && (session == 0 || foreign));
        if (*found) {
            after->n = 9;
            memcpy(after->b, w.key.mv_data, 9);
        }
    }
out:
    walk_end(&w);
    return rc;
}

enum tv_err trash_step(tv_batch *b, bool all, bool *more, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    uint64_t chunks = TRASH_CHUNKS, tensors = TRASH_TENSORS;
    struct rec_key at = {.n = 0};
    bool found = true, left = false;
    const uint64_t before = b->n_writes;
    *more = false;
    for (;;) {
        TV_TRY(next_trash(b, all, &at, &found, err));
        if (!found)
            break;
        const uint64_t id = tv_get_be64(at.b + 1);
        if (at.b[0] == 'o')
            TV_TRY(object_drop(b, id, &tensors, &left, err));
        else
            TV_TRY(payload_drop(b, id, &chunks, &left, err));
        *more = *more || left;
        if (left && at.b[0] == 'p')
            break;
    }
out:
    return batch_end(b, before, rc);
}

enum tv_err trash_pages(const struct txn *t, uint64_t *pages,
                        struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    uint64_t n = 0;
    struct walk w = {0}, c = {0};
    struct rec_key prefix;
    bool more = false, chunks = false;
    *pages = 0;
    key_str(&prefix, "p");
    TV_TRY(walk_begin(&w, t, DB_TRASH, &prefix, err));
    for (;;) {
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        key_id(&prefix, key_get_id(&w.key, 1));
        TV_TRY(walk_begin(&c, t, DB_CHUNK, &prefix, err));
        for (;;) {
            TV_TRY(walk_next(&c, &chunks, err));
            if (!chunks)
                break;
            n++;
            if (c.val.mv_size >= TV_CHUNK_HEADER)
                *pages += value_pages(c.val.mv_size - TV_CHUNK_HEADER,
                                      t->s->page_bytes);
        }
        walk_end(&c);
    }
    *pages += n * ENTRY_BYTES / t->s->page_bytes;
out:
    walk_end(&c);
    walk_end(&w);
    return rc;
}

/* ---- gc -------------------------------------------------------------------
 */

/* Sorted set of ids. */
struct ids {
    uint64_t *v;
    size_t n, cap;
};

static enum tv_err ids_add(struct ids *s, uint64_t id, struct tv_error *err)
{
    if (s->n == s->cap) {
        const size_t cap = s->cap == 0 ? 256 : s->cap * 2;
        uint64_t *p = (uint64_t *)tv_realloc(s->v, cap * sizeof *p);
        if (p == NULL)
            return tv_error_set(err, TV_E_NOMEM, "no memory for a list");
        s->v = p;
        s->cap = cap;
    }
    s->v[s->n++] = id;
    return TV_OK;
}

static int id_compare(const void *x, const void *y)
{
    const uint64_t a = *(const uint64_t *)x, b = *(const uint64_t *)y;
    return (a > b) - (a < b);
}

static void ids_sort(struct ids *s)
{
    if (s->n > 0)
        qsort(s->v, s->n, sizeof *s->v, id_compare);
}

static bool ids_has(const struct ids *s, uint64_t id)
{
    return s->n > 0 &&
           bsearch(&id, s->v, s->n, sizeof *s->v, id_compare) != NULL;
}

/* Ids at byte `at` of all keys of a sub-database. */
static enum tv_err ids_of(const struct txn *t, enum db db, size_t at,
                          struct ids *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    bool more = false;
    TV_TRY(walk_begin(&w, t, db, NULL, err));
    for (;;) {
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        const uint64_t id = key_get_id(&w.key, at);
        if (out->n == 0 || out->v[out->n - 1] != id)
            TV_TRY(ids_add(out, id, err));
    }
    ids_sort(out);
out:
    walk_end(&w);
    return rc;
}

/* What tensors and objects refer to. */
struct refs {
    struct ids payloads, sources, objects;
    struct tv_buf digests; /* 16 bytes each */
};

static void refs_free(struct refs *r)
{
    tv_free(r->payloads.v);
    tv_free(r->sources.v);
    tv_free(r->objects.v);
    tv_buf_free(&r->digests);
}

/* A damaged record may refer to anything, hence stops the search. */
static enum tv_err refs_read(const struct txn *t, struct refs *r,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_body body;
    const char *why = NULL;
    bool more = false;
    TV_TRY(walk_begin(&w, t, DB_TENSOR, NULL, err));
    for (;;) {
        struct rec_tensor rt;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        TV_TRY(walk_rec(&w, REC_TENSOR, &body, err));
        if (!rec_tensor_get(body, &rt, &why)) {
            rc = rec_damaged(t->s, "a tensor record", why, err);
            goto out;
        }
        TV_TRY(rt.t.storage == TV_INLINE
                   ? ids_add(&r->payloads, rt.t.payload_id, err)
                   : ids_add(&r->sources, rt.t.source_id, err));
    }
    walk_end(&w);
    TV_TRY(walk_begin(&w, t, DB_OBJECT, NULL, err));
    for (;;) {
        struct rec_object o;
        struct rec_file f;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        TV_TRY(walk_rec(&w, REC_OBJECT, &body, err));
        if (!rec_object_get(body, &o, &why)) {
            rc = rec_damaged(t->s, "an object record", why, err);
            goto out;
        }
        TV_TRY(ids_add(&r->objects, o.id, err));
        struct rec_body files = {.p = o.files, .n = o.files_bytes};
        while (rec_file_next(&files, &f)) {
            unsigned char d[16];
            tv_hash_put(d, f.digest);
            tv_buf_add(&r->digests, d, sizeof d);
        }
    }
    TV_TRY(tv_buf_ok(&r->digests, err));
    ids_sort(&r->payloads);
    ids_sort(&r->sources);
    ids_sort(&r->objects);
out:
    walk_end(&w);
    return rc;
}

/* Puts payloads and objects that nothing refers to on the trash list. */
static enum tv_err find_orphans(tv_batch *b, const struct refs *r,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct ids there = {0};
    static const struct {
        enum db db;
        size_t at;
    } places[] = {{DB_PAYLOAD, 0}, {DB_CHUNK, 0}, {DB_LEAF, 0}};
    for (size_t i = 0; i < 3; i++)
        TV_TRY(ids_of(&b->t, places[i].db, places[i].at, &there, err));
    ids_sort(&there);
    for (size_t i = 0; i < there.n; i++)
        if ((i == 0 || there.v[i] != there.v[i - 1]) &&
            !ids_has(&r->payloads, there.v[i]))
            TV_TRY(trash_put(b, 'p', there.v[i], 0, err));
    there.n = 0;
    TV_TRY(ids_of(&b->t, DB_TENSOR, 0, &there, err));
    TV_TRY(ids_of(&b->t, DB_OBJECT_ID, 0, &there, err));
    ids_sort(&there);
    for (size_t i = 0; i < there.n; i++)
        if ((i == 0 || there.v[i] != there.v[i - 1]) &&
            !ids_has(&r->objects, there.v[i]))
            TV_TRY(trash_put(b, 'o', there.v[i], 0, err));
out:
    tv_free(there.v);
    return rc;
}

enum stray { STRAY_BLOB, STRAY_SOURCE, STRAY_CONTENT, STRAY_PIN, STRAY_DONE };

static enum tv_err is_stray(tv_batch *b, enum stray what, const struct refs *r,
                            const MDB_val *key, bool *stray,
                            struct tv_error *err)
{
    const unsigned char *kb = (const unsigned char *)key->mv_data;
    *stray = false;
    switch (what) {
    case STRAY_BLOB:
        *stray = true;
        if (key->mv_size != 16 && !piece_key(DB_BLOB, kb, key->mv_size))
            return TV_OK;
        for (size_t i = 0; *stray && i + 16 <= r->digests.n_bytes; i += 16)
            *stray = memcmp(r->digests.data + i, kb, 16) != 0;
        return TV_OK;
    case STRAY_SOURCE:
        *stray = !ids_has(&r->sources, key_get_id(key, 0));
        return TV_OK;
    case STRAY_CONTENT:
        *stray = !ids_has(&r->payloads, key_get_id(key, 16));
        return TV_OK;
    case STRAY_PIN:
    case STRAY_DONE: {
        uint64_t session = 0;
        if (what == STRAY_PIN && derived_pin_session(key, &session))
            return TV_OK; /* derived_gc knows */
        struct rec_key run = {.n = strnlen((const char *)kb, key->mv_size)};
        MDB_val val;
        bool found = false;
        memcpy(run.b, kb, run.n);
        const enum tv_err rc = db_get(&b->t, DB_RUN, &run, &found, &val, err);
        *stray = rc == TV_OK && !found;
        return rc;
    }
    }
    return TV_OK;
}

static enum tv_err drop_strays(tv_batch *b, enum db db, enum stray what,
                               const struct refs *r, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct tv_buf keys; /* u32 length, key */
    bool more = false;
    tv_buf_init(&keys, (size_t)1 << 30);
    TV_TRY(walk_begin(&w, &b->t, db, NULL, err));
    for (;;) {
        bool stray = false;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        TV_TRY(is_stray(b, what, r, &w.key, &stray, err));
        if (stray) {
            tv_buf_le32(&keys, (uint32_t)w.key.mv_size);
            tv_buf_add(&keys, w.key.mv_data, w.key.mv_size);
        }
    }
    walk_end(&w);
    TV_TRY(tv_buf_ok(&keys, err));
    for (size_t at = 0; at + 4 <= keys.n_bytes;) {
        struct rec_key k;
        k.n = tv_get_le32(keys.data + at);
        memcpy(k.b, keys.data + at + 4, k.n);
        at += 4 + k.n;
        TV_TRY(db_del(b, db, &k, NULL, err));
    }
out:
    walk_end(&w);
    tv_buf_free(&keys);
    return rc;
}

static enum tv_err free_now(tv_store *s, uint64_t *bytes, struct tv_error *err)
{
    MDB_txn *txn = NULL;
    uint64_t end = 0;
    enum tv_err rc = txn_begin(s, MDB_RDONLY, &txn, err);
    if (rc != TV_OK)
        return rc;
    rc = space_read(s, txn, &end, bytes, err);
    tv_lmdb()->txn_abort(txn);
    atomic_fetch_sub(&s->n_txns, 1);
    return rc;
}

enum tv_err tv_store_gc(tv_store *s, uint64_t *freed_bytes,
                        struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    struct refs r;
    uint64_t begin = 0, end = 0;
    bool more = true, first = true;
    memset(&r, 0, sizeof r);
    tv_buf_init(&r.digests, (size_t)1 << 30);
    TV_TRY(free_now(s, &begin, err));
    TV_TRY(tv_batch_begin(s, false, err, &b));
    TV_TRY(refs_read(&b->t, &r, err));
    TV_TRY(find_orphans(b, &r, err));
    TV_TRY(drop_strays(b, DB_BLOB, STRAY_BLOB, &r, err));
    TV_TRY(drop_strays(b, DB_SOURCE, STRAY_SOURCE, &r, err));
    TV_TRY(drop_strays(b, DB_CONTENT, STRAY_CONTENT, &r, err));
    TV_TRY(drop_strays(b, DB_PIN, STRAY_PIN, &r, err));
    TV_TRY(drop_strays(b, DB_DONE, STRAY_DONE, &r, err));
    TV_TRY(derived_gc(b, err));
    while (more) {
        if (!first)
            TV_TRY(tv_batch_begin(s, false, err, &b));
        first = false;
        TV_TRY(trash_step(b, true, &more, err));
        b->cleanup = false;
        rc = tv_batch_commit(b, err);
        b = NULL;
        TV_TRY(rc);
    }
    TV_TRY(free_now(s, &end, err));
    *freed_bytes = end > begin ? end - begin : 0;
out:
    tv_batch_abort(b);
    refs_free(&r);
    return rc;
}
