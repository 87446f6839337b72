/* SPDX-License-Identifier: Apache-2.0 */
/*
 * txn.c - reads, batches, and the few shapes in which records are accessed.
 *
 * A batch that meets an error in the middle of a change is marked as failed, so
 * that a caller who ignores the error cannot commit half a change: records of
 * several sub-databases only make sense together.
 *
 * Lazy batches skip the sync of LMDB's meta page. That flag belongs to the
 * environment, not to a transaction; it is set before every commit, while
 * LMDB's writer mutex is ours, hence never seen by another commit.
 */
#include "store_priv.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

/* ---- small things ---------------------------------------------------------
 */

struct arena_node {
    struct arena_node *next;
    unsigned char pad[56]; /* keeps what follows 64-byte aligned */
};
_Static_assert(sizeof(struct arena_node) == 64, "alignment of arena memory");

void *arena_alloc(struct arena *a, uint64_t n)
{
    size_t total = 0;
    if (n > SIZE_MAX ||
        !tv_add_size((size_t)n, sizeof(struct arena_node), &total))
        return NULL;
    struct arena_node *node = (struct arena_node *)tv_alloc_aligned(total);
    if (node == NULL)
        return NULL;
    node->next = a->head;
    a->head = node;
    return node + 1;
}

void arena_clear(struct arena *a)
{
    while (a->head != NULL) {
        struct arena_node *next = a->head->next;
        tv_free(a->head);
        a->head = next;
    }
}

const char *show_text(struct rec_text name, char *dst)
{
    char raw[SHOW_BYTES];
    size_t n = name.n < sizeof raw - 4 ? name.n : sizeof raw - 4;
    memcpy(raw, name.s, n);
    memcpy(raw + n, n < name.n ? "..." : "", n < name.n ? 4 : 1);
    return tv_text_printable(raw, dst, SHOW_BYTES);
}

const char *show(const char *name, char *dst)
{
    return show_text((struct rec_text){.s = name, .n = strlen(name)}, dst);
}

uint64_t key_get_id(const MDB_val *key, size_t at)
{
    if (key->mv_size < at + 8)
        return 0;
    return tv_get_be64((const unsigned char *)key->mv_data + at);
}

enum tv_err rec_damaged(const tv_store *s, const char *what, const char *why,
                        struct tv_error *err)
{
    tv_error_set(err, TV_E_CORRUPT, "store %s: %s is damaged: %s", s->path,
                 what, why);
    tv_error_hint(err, "'tvstore verify' lists everything that is damaged");
    return TV_E_CORRUPT;
}

/* ---- transactions ---------------------------------------------------------
 */

/* After a meta page that could not be written LMDB answers everything with
 * MDB_PANIC. Whoever hears that need not be the one whose commit failed: some
 * commits may fail without harm (last use, trash), and their callers go on. */
static int cause_of(tv_store *s, int e)
{
    const int cause = atomic_load(&s->commit_failure);
    return e == MDB_PANIC && cause != 0 ? cause : e;
}

int txn_commit(tv_store *s, MDB_txn *txn)
{
    const int e = tv_lmdb()->txn_commit(txn);
    if (e != 0 && e != MDB_PANIC)
        atomic_store(&s->commit_failure, e);
    return cause_of(s, e);
}

enum tv_err txn_begin(tv_store *s, unsigned flags, MDB_txn **out,
                      struct tv_error *err)
{
    MDB_txn *txn = NULL;
    if (s->env == NULL)
        return tv_error_set(err, TV_E_IO, "store %s could not be opened again",
                            s->path);
    int e = tv_lmdb()->txn_begin(s->env, NULL, flags, &txn);
    if (e == MDB_MAP_RESIZED && atomic_load(&s->n_txns) == 0) {
        /* Nothing is borrowed from the old map, so it may move. */
        e = tv_lmdb()->env_set_mapsize(s->env, 0);
        store_name_map(s);
        if (e == 0)
            e = tv_lmdb()->txn_begin(s->env, NULL, flags, &txn);
    }
    if (e != 0)
        return tv_lmdb_error(err, cause_of(s, e), s->path,
                             "cannot begin a transaction");
    atomic_fetch_add(&s->n_txns, 1);
    *out = txn;
    return TV_OK;
}

enum tv_err tv_read_begin(tv_store *s, struct tv_error *err, tv_read **out)
{
    enum tv_err rc = TV_OK;
    *out = NULL;
    tv_read *r = (tv_read *)tv_calloc(1, sizeof *r);
    if (r == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a read");
    r->t.s = s;
    TV_TRY(txn_begin(s, MDB_RDONLY, &r->t.mdb, err));
    *out = r;
    r = NULL;
out:
    tv_free(r);
    return rc;
}

enum tv_err tv_read_renew(tv_read *r, struct tv_error *err)
{
    arena_clear(&r->arena);
    if (r->t.mdb == NULL) /* the last renewal failed and counted it off */
        return txn_begin(r->t.s, MDB_RDONLY, &r->t.mdb, err);
    tv_lmdb()->txn_reset(r->t.mdb);
    const int e = tv_lmdb()->txn_renew(r->t.mdb);
    if (e == 0)
        return TV_OK;
    /* The handle is reset and useless: replace it by a new one if we can. */
    enum tv_err rc = TV_OK;
    tv_lmdb()->txn_abort(r->t.mdb);
    r->t.mdb = NULL;
    atomic_fetch_sub(&r->t.s->n_txns, 1);
    if (e == MDB_MAP_RESIZED)
        rc = txn_begin(r->t.s, MDB_RDONLY, &r->t.mdb, err);
    else
        rc = tv_lmdb_error(err, cause_of(r->t.s, e), r->t.s->path,
                           "cannot renew a read");
    return rc;
}

void tv_read_end(tv_read *r)
{
    if (r == NULL)
        return;
    arena_clear(&r->arena);
    if (r->t.mdb != NULL) {
        tv_lmdb()->txn_abort(r->t.mdb);
        atomic_fetch_sub(&r->t.s->n_txns, 1);
    }
    tv_free(r);
}

enum tv_err tv_batch_begin(tv_store *s, bool lazy, struct tv_error *err,
                           tv_batch **out)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    *out = NULL;
    if (s->read_only)
        return tv_error_set(err, TV_E_IO, "store %s is open read-only",
                            s->path);
    /* Slots of killed readers would keep freed pages from being reused. */
    (void)tv_lmdb()->reader_check(s->env, NULL);
    b = (tv_batch *)tv_calloc(1, sizeof *b);
    if (b == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a batch");
    b->t.s = s;
    b->lazy = lazy;
    tv_buf_init(&b->puts, (size_t)1 << 30);
    TV_TRY(txn_begin(s, 0, &b->t.mdb, err));
    TV_TRY(quota_room(b, err));
    if (b->bound != s->map_quota && atomic_load(&s->n_txns) == 1) {
        /* Another process has set another quota. */
        tv_lmdb()->txn_abort(b->t.mdb);
        b->t.mdb = NULL;
        atomic_fetch_sub(&s->n_txns, 1);
        TV_TRY(quota_apply(s, b->bound, err));
        TV_TRY(txn_begin(s, 0, &b->t.mdb, err));
        TV_TRY(quota_room(b, err));
    }
    *out = b;
    b = NULL;
out:
    tv_batch_abort(b);
    return rc;
}

void tv_batch_abort(tv_batch *b)
{
    if (b == NULL)
        return;
    if (b->t.mdb != NULL) {
        tv_lmdb()->txn_abort(b->t.mdb);
        atomic_fetch_sub(&b->t.s->n_txns, 1);
    }
    space_free(&b->space);
    tv_buf_free(&b->puts);
    tv_free(b);
}

/* Space of what was dropped comes back in batches of its own. Failing here
 * loses nothing: the trash list is durable and gc goes on with it. */
static void reap_after(tv_store *s, bool lazy)
{
    bool more = true;
    while (more) {
        tv_batch *b = NULL;
        if (tv_batch_begin(s, lazy, NULL, &b) != TV_OK)
            return;
        if (trash_step(b, false, &more, NULL) != TV_OK) {
            tv_batch_abort(b);
            return;
        }
        b->cleanup = false;
        if (tv_batch_commit(b, NULL) != TV_OK)
            return;
    }
}

enum tv_err tv_batch_commit(tv_batch *b, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_store *s = b->t.s;
    const bool lazy = b->lazy;
    bool cleanup = false;
    if (b->failed) {
        rc = tv_error_set(err, TV_E_INTERNAL,
                          "store %s: commit of a batch in which a write failed",
                          s->path);
        goto out;
    }
    if (b->pending) {
        rc = tv_error_set(err, TV_E_INTERNAL,
                          "store %s: commit with chunk %zu of payload %llu "
                          "reserved but not sealed",
                          s->path, b->pending_chunk,
                          (unsigned long long)b->pending_id);
        goto out;
    }
    int e = tv_lmdb()->env_set_flags(s->env, MDB_NOMETASYNC, lazy);
    if (e == 0) {
        MDB_txn *txn = b->t.mdb;
        struct write_back early;
        b->t.mdb = NULL; /* freed by commit, whatever it returns */
        write_back_begin(&early, s, b->dirty);
        e = txn_commit(s, txn);
        write_back_end(&early);
        atomic_fetch_sub(&s->n_txns, 1);
    }
    if (e == MDB_MAP_FULL && b->quota != 0)
        rc = tv_error_set(err, TV_E_NOSPACE,
                          "store %s: its quota of %llu bytes is used up",
                          s->path, (unsigned long long)b->quota);
    else if (e != 0)
        rc = tv_lmdb_error(err, e, s->path, "commit failed");
    cleanup = rc == TV_OK && b->cleanup;
out:
    tv_batch_abort(b);
    if (cleanup)
        reap_after(s, lazy);
    return rc;
}

uint64_t tv_batch_dirty(const tv_batch *b)
{
    return b->dirty;
}

enum tv_err batch_result(tv_batch *b, enum tv_err rc)
{
    if (rc != TV_OK)
        b->failed = true;
    return rc;
}

enum tv_err batch_end(tv_batch *b, uint64_t before, enum tv_err rc)
{
    if (rc != TV_OK && b->n_writes != before)
        b->failed = true;
    return rc;
}

enum tv_err batch_check(tv_batch *b, struct tv_error *err)
{
    if (b->failed)
        return tv_error_set(err, TV_E_INTERNAL,
                            "store %s: write after a failed write in one batch",
                            b->t.s->path);
    if (b->pending)
        return tv_error_set(err, TV_E_INTERNAL,
                            "store %s: write while chunk %zu of payload %llu "
                            "is not sealed",
                            b->t.s->path, b->pending_chunk,
                            (unsigned long long)b->pending_id);
    return TV_OK;
}

/* ---- access ---------------------------------------------------------------
 */

static MDB_val mdb_key(const struct rec_key *k)
{
    /* LMDB takes keys by non-const pointer but never writes them. */
    return (MDB_val){.mv_size = k->n, .mv_data = (void *)(uintptr_t)k->b};
}

enum tv_err db_get(const struct txn *t, enum db db, const struct rec_key *k,
                   bool *found, MDB_val *val, struct tv_error *err)
{
    *found = false;
    if (t->mdb == NULL)
        return tv_error_set(err, TV_E_INTERNAL,
                            "store %s: read after a failed renewal",
                            t->s->path);
    if (!t->s->has[db])
        return TV_OK;
    MDB_val key = mdb_key(k);
    const int e = tv_lmdb()->get(t->mdb, t->s->dbi[db], &key, val);
    if (e == MDB_NOTFOUND)
        return TV_OK;
    if (e != 0)
        return tv_lmdb_error(err, e, t->s->path, "reading from '%s'",
                             db_name(db));
    *found = true;
    return TV_OK;
}

enum tv_err db_get_rec(const struct txn *t, enum db db, enum rec_type type,
                       const struct rec_key *k, bool *found,
                       struct rec_body *body, const char *what,
                       struct tv_error *err)
{
    MDB_val val = {0, NULL};
    const char *why = NULL;
    const enum tv_err rc = db_get(t, db, k, found, &val, err);
    if (rc != TV_OK || !*found)
        return rc;
    if (!rec_open(type, k->b, k->n, val.mv_data, val.mv_size, body, &why))
        return rec_damaged(t->s, what, why, err);
    return TV_OK;
}

static enum tv_err put_error(tv_batch *b, enum db db, int e,
                             struct tv_error *err)
{
    b->failed = true;
    if (e == MDB_MAP_FULL && b->quota != 0)
        return tv_error_set(err, TV_E_NOSPACE,
                            "store %s: its quota of %llu bytes is used up",
                            b->t.s->path, (unsigned long long)b->quota);
    return tv_lmdb_error(err, e, b->t.s->path, "writing to '%s'", db_name(db));
}

enum tv_err db_put(tv_batch *b, enum db db, const struct rec_key *k,
                   const void *data, size_t n, struct tv_error *err)
{
    MDB_val key = mdb_key(k);
    MDB_val val = {.mv_size = n, .mv_data = (void *)(uintptr_t)data};
    b->n_writes++;
    const int e = tv_lmdb()->put(b->t.mdb, b->t.s->dbi[db], &key, &val, 0);
    return e == 0 ? TV_OK : put_error(b, db, e, err);
}

enum tv_err db_put_rec(tv_batch *b, enum db db, enum rec_type type,
                       const struct rec_key *k, struct tv_buf *buf,
                       struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    rec_end(buf, type, k);
    rc = tv_buf_ok(buf, err);
    if (rc != TV_OK)
        b->failed = true;
    else
        rc = db_put(b, db, k, buf->data, buf->n_bytes, err);
    tv_buf_free(buf);
    return rc;
}

enum tv_err db_reserve(tv_batch *b, enum db db, const struct rec_key *k,
                       size_t n, void **data, struct tv_error *err)
{
    MDB_val key = mdb_key(k);
    MDB_val val = {.mv_size = n, .mv_data = NULL};
    b->n_writes++;
    const int e =
        tv_lmdb()->put(b->t.mdb, b->t.s->dbi[db], &key, &val, MDB_RESERVE);
    if (e != 0)
        return put_error(b, db, e, err);
    *data = val.mv_data;
    return TV_OK;
}

enum tv_err db_del(tv_batch *b, enum db db, const struct rec_key *k,
                   bool *found, struct tv_error *err)
{
    MDB_val key = mdb_key(k);
    b->n_writes++;
    const int e = tv_lmdb()->del(b->t.mdb, b->t.s->dbi[db], &key, NULL);
    if (found != NULL)
        *found = e == 0;
    if (e != 0 && e != MDB_NOTFOUND)
        return put_error(b, db, e, err);
    return TV_OK;
}

enum tv_err db_count(const struct txn *t, enum db db, uint64_t *n,
                     struct tv_error *err)
{
    *n = 0;
    if (!t->s->has[db])
        return TV_OK;
    MDB_stat st;
    const int e = tv_lmdb()->stat(t->mdb, t->s->dbi[db], &st);
    if (e != 0)
        return tv_lmdb_error(err, e, t->s->path, "counting '%s'", db_name(db));
    *n = st.ms_entries;
    return TV_OK;
}

enum tv_err walk_begin(struct walk *w, const struct txn *t, enum db db,
                       const struct rec_key *prefix, struct tv_error *err)
{
    memset(w, 0, sizeof *w);
    w->t = t;
    w->db = db;
    if (prefix != NULL)
        w->prefix = *prefix;
    if (t->mdb == NULL)
        return tv_error_set(err, TV_E_INTERNAL,
                            "store %s: read after a failed renewal",
                            t->s->path);
    if (!t->s->has[db])
        return TV_OK;
    const int e = tv_lmdb()->cursor_open(t->mdb, t->s->dbi[db], &w->cur);
    if (e != 0)
        return tv_lmdb_error(err, e, t->s->path, "walking '%s'", db_name(db));
    return TV_OK;
}

enum tv_err walk_next(struct walk *w, bool *more, struct tv_error *err)
{
    *more = false;
    if (w->cur == NULL)
        return TV_OK;
    MDB_cursor_op op = MDB_NEXT;
    if (!w->started) {
        w->started = true;
        op = w->prefix.n == 0 ? MDB_FIRST : MDB_SET_RANGE;
        w->key = mdb_key(&w->prefix);
    }
    const int e = tv_lmdb()->cursor_get(w->cur, &w->key, &w->val, op);
    if (e == MDB_NOTFOUND)
        return TV_OK;
    if (e != 0)
        return tv_lmdb_error(err, e, w->t->s->path, "walking '%s'",
                             db_name(w->db));
    *more = w->key.mv_size >= w->prefix.n &&
            memcmp(w->key.mv_data, w->prefix.b, w->prefix.n) == 0;
    return TV_OK;
}

void walk_end(struct walk *w)
{
    if (w->cur != NULL)
        tv_lmdb()->cursor_close(w->cur);
    w->cur = NULL;
}

enum tv_err walk_rec(const struct walk *w, enum rec_type type,
                     struct rec_body *body, struct tv_error *err)
{
    const char *why = NULL;
    if (rec_open(type, w->key.mv_data, w->key.mv_size, w->val.mv_data,
                 w->val.mv_size, body, &why))
        return TV_OK;
    char what[64];
    (void)snprintf(what, sizeof what, "a record of '%s'", db_name(w->db));
    return rec_damaged(w->t->s, what, why, err);
}

enum tv_err next_id(tv_batch *b, uint64_t *id, struct tv_error *err)
{
    struct rec_key k;
    struct rec_body body;
    struct tv_buf buf;
    bool found = false;
    const char *why = "missing";
    uint64_t next = 0;
    key_str(&k, META_NEXT_ID);
    enum tv_err rc = db_get_rec(&b->t, DB_META, REC_NUMBER, &k, &found, &body,
                                "the id counter", err);
    if (rc != TV_OK)
        return rc;
    if (!found || !rec_number_get(body, &next, &why) || next == 0)
        return rec_damaged(b->t.s, "the id counter", why, err);
    rec_begin(&buf);
    rec_number_put(&buf, next + 1);
    rc = db_put_rec(b, DB_META, REC_NUMBER, &k, &buf, err);
    if (rc == TV_OK)
        *id = next;
    return rc;
}
