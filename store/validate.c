/* SPDX-License-Identifier: Apache-2.0 */
/*
 * validate.c - verify: does everything that is kept still add up?
 *
 * Every record of every sub-database is decoded, every key is compared with the
 * key its record would get, references are followed both ways, users are
 * counted again, and every byte of every payload, side file and linked tensor
 * with a known checksum is hashed. LMDB has no page checksums; what it believes
 * about its pages is checked as far as it can be seen from outside: number of
 * entries, order of keys, and that no page in use is on the list of free ones.
 *
 * Trees that LMDB could not walk do not get here: tree_check.c refuses them
 * when the store is opened. What is damaged later may still end the process:
 * whoever calls this on a store that is not trusted does so in a child.
 *
 * Orphans (records that nothing refers to, of killed writers) are not damage;
 * gc drops them.
 */
#include "store_priv.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/pool.h"

struct verify {
    struct txn t;
    tv_read *read; /* lends its snapshot to t */
    tv_verify_fn on_problem;
    tv_bytes_fn progress;
    void *arg;
    uint64_t done, total, n_problems, next_id;
    uint64_t *uses; /* payload ids of all inline tensors, sorted */
    size_t n_uses, cap_uses;
    unsigned char *free_pages; /* a bit per page, NULL when unknown */
    uint64_t n_pages;
    tv_pool *pool;             /* NULL: no threads could be had */
    struct gathered *gathered; /* [GATHER_PAYLOADS] */
    size_t n_gathered;
    uint64_t gathered_bytes;
    struct piece *pieces;
    size_t n_pieces, cap_pieces;
};

static void problem(struct verify *v, const char *object, const char *tensor,
                    const char *fmt, ...) TV_PRINTF(4, 5);

static void problem(struct verify *v, const char *object, const char *tensor,
                    const char *fmt, ...)
{
    char what[768];
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(what, sizeof what, fmt, ap);
    va_end(ap);
    v->n_problems++;
    if (v->on_problem != NULL)
        v->on_problem(v->arg, object, tensor, what);
}

static void advance(struct verify *v, uint64_t bytes)
{
    v->done += bytes;
    if (v->progress != NULL)
        v->progress(v->arg, v->done, v->total);
}

/* Damage becomes a problem and the walk goes on; anything else ends it. */
static enum tv_err note(struct verify *v, enum tv_err rc, const char *object,
                        const char *tensor, struct tv_error *err)
{
    if (rc != TV_E_CORRUPT)
        return rc;
    problem(v, object, tensor, "%s", err->msg);
    tv_error_clear(err);
    return TV_OK;
}

/* ---- pages ----------------------------------------------------------------
 */

/* Reads the list of free pages into a bitmap, checking its own rules. */
static enum tv_err free_read(struct verify *v, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_store *s = v->t.s;
    MDB_envinfo info;
    MDB_cursor *cur = NULL;
    MDB_val key = {0, NULL}, val = {0, NULL};
    uint64_t n_seen = 0;
    int e = tv_lmdb()->env_info(s->env, &info);
    if (e != 0) {
        rc = tv_lmdb_error(err, e, s->path, "asking for its size");
        goto out;
    }
    v->n_pages = (uint64_t)info.me_last_pgno + 1;
    v->free_pages = (unsigned char *)tv_calloc((size_t)(v->n_pages / 8 + 1), 1);
    if (v->free_pages == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "no memory for a page map");
        goto out;
    }
    e = tv_lmdb()->cursor_open(v->t.mdb, TV_LMDB_FREE_DBI, &cur);
    while (e == 0) {
        e = tv_lmdb()->cursor_get(cur, &key, &val, MDB_NEXT);
        if (e != 0)
            break;
        size_t n = 0;
        if (val.mv_size >= sizeof n)
            memcpy(&n, val.mv_data, sizeof n);
        if (val.mv_size < sizeof n || n > val.mv_size / sizeof n - 1 ||
            ++n_seen > v->n_pages) {
            problem(v, "", "", "the list of free pages is damaged");
            break;
        }
        for (size_t i = 1; i <= n; i++) {
            size_t page = 0;
            memcpy(&page, (const char *)val.mv_data + i * sizeof page,
                   sizeof page);
            if (page < 2 || page >= v->n_pages ||
                (v->free_pages[page / 8] >> (page % 8) & 1) != 0) {
                problem(v, "", "", "the list of free pages is damaged");
                goto out;
            }
            v->free_pages[page / 8] |= (unsigned char)(1u << (page % 8));
        }
    }
    if (e != 0 && e != MDB_NOTFOUND)
        rc = note(v, tv_lmdb_error(err, e, s->path, "the list of free pages"),
                  "", "", err);
out:
    if (cur != NULL)
        tv_lmdb()->cursor_close(cur);
    return rc;
}

/* True when a value lies on a page that LMDB would give away. */
static bool on_free_page(const struct verify *v, const MDB_val *val)
{
    const tv_store *s = v->t.s;
    const uintptr_t p = (uintptr_t)val->mv_data;
    if (v->free_pages == NULL || s->map_from == 0 || val->mv_size == 0 ||
        p < s->map_from)
        return false;
    uint64_t page = (p - s->map_from) / s->page_bytes;
    const uint64_t last = (p - s->map_from + val->mv_size - 1) / s->page_bytes;
    for (; page <= last && page < v->n_pages; page++)
        if ((v->free_pages[page / 8] >> (page % 8) & 1) != 0)
            return true;
    return false;
}

/* A value of its own pages must lie behind LMDB's page head, which says the
 * page's number and how many there are: removal believes it. */
static bool page_head_ok(const struct verify *v, const MDB_val *val)
{
    const tv_store *s = v->t.s;
    const uintptr_t p = (uintptr_t)val->mv_data;
    if (s->map_from == 0 || p < s->map_from ||
        val->mv_size < s->page_bytes / 2 || s->page_bytes == 0)
        return true;
    const uint64_t off = p - s->map_from;
    if (off % s->page_bytes != 16)
        return false;
    const unsigned char *head = (const unsigned char *)val->mv_data - 16;
    uint64_t number = 0;
    uint32_t pages = 0;
    memcpy(&number, head, sizeof number);
    memcpy(&pages, head + 12, sizeof pages);
    return number == off / s->page_bytes &&
           pages == (val->mv_size + 16 + s->page_bytes - 1) / s->page_bytes;
}

/* ---- walking a table ------------------------------------------------------
 */

typedef enum tv_err (*entry_fn)(struct verify *v, const struct walk *w,
                                struct tv_error *err);

static int key_order(const void *x, size_t nx, const void *y, size_t ny)
{
    const int c = memcmp(x, y, nx < ny ? nx : ny);
    return c != 0 ? c : (nx > ny) - (nx < ny);
}

static enum tv_err each(struct verify *v, enum db db, entry_fn fn,
                        struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key last = {.n = 0};
    uint64_t n = 0, want = 0;
    bool more = false;
    TV_TRY(note(v, db_count(&v->t, db, &want, err), "", "", err));
    TV_TRY(walk_begin(&w, &v->t, db, NULL, err));
    for (;;) {
        rc = walk_next(&w, &more, err);
        if (rc == TV_E_CORRUPT) {
            rc = note(v, rc, "", "", err);
            goto out; /* the tree cannot be followed any further */
        }
        TV_TRY(rc);
        if (!more)
            break;
        if (w.key.mv_size > TV_REC_KEY_MAX ||
            (n > 0 &&
             key_order(last.b, last.n, w.key.mv_data, w.key.mv_size) >= 0) ||
            ++n > want) {
            problem(v, "", "", "table '%s': its tree is damaged", db_name(db));
            goto out;
        }
        last.n = w.key.mv_size;
        memcpy(last.b, w.key.mv_data, last.n);
        /* A search must find what a walk finds. */
        MDB_val again = {0, NULL};
        bool found = false;
        TV_TRY(note(v, db_get(&v->t, db, &last, &found, &again, err), "", "",
                    err));
        if (!found || again.mv_data != w.val.mv_data ||
            again.mv_size != w.val.mv_size || !page_head_ok(v, &w.val))
            problem(v, "", "", "table '%s': its tree is damaged", db_name(db));
        if (on_free_page(v, &w.val))
            problem(v, "", "",
                    "table '%s': an entry lies on a page that is listed as "
                    "free",
                    db_name(db));
        TV_TRY(fn(v, &w, err));
    }
    if (n != want)
        problem(v, "", "",
                "table '%s': %" PRIu64 " entries, but LMDB counts %" PRIu64,
                db_name(db), n, want);
out:
    walk_end(&w);
    return rc;
}

static bool key_is(const struct walk *w, const struct rec_key *k)
{
    return w->key.mv_size == k->n && memcmp(w->key.mv_data, k->b, k->n) == 0;
}

static bool known_id(struct verify *v, uint64_t id)
{
    return id != 0 && id < v->next_id;
}

/* ---- entries --------------------------------------------------------------
 */

static enum tv_err meta_entry(struct verify *v, const struct walk *w,
                              struct tv_error *err)
{
    struct rec_body body;
    const bool store = w->key.mv_size == strlen(META_STORE) &&
                       memcmp(w->key.mv_data, META_STORE, w->key.mv_size) == 0;
    return note(v, walk_rec(w, store ? REC_STORE : REC_NUMBER, &body, err), "",
                "", err);
}

static enum tv_err blob_check(struct verify *v, const char *object,
                              const struct rec_file *f, struct tv_error *err)
{
    struct rec_key k;
    struct rec_body body;
    struct arena a = {NULL};
    bool found = false;
    char shown[SHOW_BYTES], what[SHOW_BYTES + 16];
    key_digest(&k, f->digest);
    (void)snprintf(what, sizeof what, "side file %s",
                   show_text(f->name, shown));
    enum tv_err rc =
        long_get(&v->t, DB_BLOB, REC_BLOB, &k, &a, &found, &body, what, err);
    if (rc != TV_OK)
        rc = note(v, rc, object, "", err);
    else if (!found)
        problem(v, object, "", "%s is missing", what);
    else if (body.n != f->bytes ||
             !tv_hash_equal(tv_hash128(body.p, body.n), f->digest))
        problem(v, object, "", "%s: checksum mismatch", what);
    arena_clear(&a);
    return rc;
}

static enum tv_err object_entry(struct verify *v, const struct walk *w,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_body body;
    struct rec_object o;
    struct rec_object_id rid;
    struct rec_file f;
    struct rec_key k;
    const char *why = NULL;
    bool found = false;
    char name[TV_OBJECT_NAME_MAX + 1] = "", id_name[TV_OBJECT_NAME_MAX + 1];
    const size_t n = strnlen((const char *)w->key.mv_data, w->key.mv_size);
    if (n <= TV_OBJECT_NAME_MAX) {
        memcpy(name, w->key.mv_data, n);
        name[n] = '\0';
    }
    rc = walk_rec(w, REC_OBJECT, &body, err);
    if (rc != TV_OK)
        return note(v, rc, name, "", err);
    if (!rec_object_get(body, &o, &why)) {
        problem(v, name, "", "its record is damaged: %s", why);
        return TV_OK;
    }
    key_object(&k, name, o.state == REC_PARTIAL);
    if (!key_is(w, &k) || !known_id(v, o.id))
        problem(v, name, "", "its record is filed under a wrong name or id");
    rc = object_id_get(&v->t, o.id, &found, &rid, id_name, err);
    if (rc != TV_OK)
        return note(v, rc, name, "", err);
    if (!found || rid.state != o.state || strcmp(id_name, name) != 0)
        problem(v, name, "", "its two records do not agree");
    struct rec_body files = {.p = o.files, .n = o.files_bytes};
    while (rc == TV_OK && rec_file_next(&files, &f))
        rc = blob_check(v, name, &f, err);
    return rc;
}

static enum tv_err object_id_entry(struct verify *v, const struct walk *w,
                                   struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_object_id rid;
    struct rec_key k;
    struct walk tensors = {0};
    bool found = false, more = false;
    char name[TV_OBJECT_NAME_MAX + 1];
    uint64_t n = 0, n_linked = 0, bytes = 0;
    MDB_val val;
    const uint64_t id = key_get_id(&w->key, 0);
    rc = object_id_get(&v->t, id, &found, &rid, name, err);
    if (rc != TV_OK || !found)
        return note(v, rc, "", "", err);
    if (rid.state == REC_DOOMED)
        return TV_OK;
    key_object(&k, name, rid.state == REC_PARTIAL);
    rc = db_get(&v->t, DB_OBJECT, &k, &found, &val, err);
    if (rc != TV_OK)
        return note(v, rc, name, "", err);
    if (!found) {
        problem(v, name, "", "its name record is missing");
        return TV_OK;
    }
    key_id(&k, id);
    TV_TRY(walk_begin(&tensors, &v->t, DB_TENSOR, &k, err));
    for (;;) {
        struct rec_body body;
        struct rec_tensor t;
        const char *why = NULL;
        rc = walk_next(&tensors, &more, err);
        if (rc != TV_OK || !more) {
            rc = note(v, rc, name, "", err);
            break;
        }
        n++;
        if (rec_open(REC_TENSOR, tensors.key.mv_data, tensors.key.mv_size,
                     tensors.val.mv_data, tensors.val.mv_size, &body, &why) &&
            rec_tensor_get(body, &t, &why)) {
            bytes += t.t.bytes;
            n_linked += t.t.storage == TV_LINKED;
        }
    }
    if (n != rid.n_tensors)
        problem(v, name, "",
                "%" PRIu64 " tensors are there, but its record says %" PRIu64,
                n, rid.n_tensors);
    else if (bytes != rid.bytes || n_linked != rid.n_linked)
        problem(v, name, "", "its tensors do not add up to its record");
out:
    walk_end(&tensors);
    return rc;
}

static void owner_name(struct verify *v, uint64_t object_id,
                       char name[TV_OBJECT_NAME_MAX + 1])
{
    struct rec_object_id rid;
    bool found = false;
    if (object_id_get(&v->t, object_id, &found, &rid, name, NULL) != TV_OK ||
        !found)
        name[0] = '\0';
}

static enum tv_err use_add(struct verify *v, uint64_t payload,
                           struct tv_error *err)
{
    if (v->n_uses == v->cap_uses) {
        const size_t cap = v->cap_uses == 0 ? 256 : v->cap_uses * 2;
        uint64_t *p = (uint64_t *)tv_realloc(v->uses, cap * sizeof *p);
        if (p == NULL)
            return tv_error_set(err, TV_E_NOMEM, "no memory for a list");
        v->uses = p;
        v->cap_uses = cap;
    }
    v->uses[v->n_uses++] = payload;
    return TV_OK;
}

static enum tv_err inline_check(struct verify *v, const char *object,
                                const char *name, const struct tv_tensor *t,
                                struct tv_error *err)
{
    struct rec_payload p;
    bool found = false;
    const enum tv_err rc = payload_get(&v->t, t->payload_id, &found, &p, err);
    if (rc != TV_OK)
        return note(v, rc, object, name, err);
    if (!found)
        problem(v, object, name, "its payload is missing");
    else if (p.state != REC_COMPLETE || !t->checksum_known ||
             !tv_hash_equal(p.checksum, t->checksum) || p.dtype != t->dtype ||
             p.rank != t->rank ||
             memcmp(p.shape, t->shape, sizeof p.shape) != 0)
        problem(v, object, name,
                "the records of tensor and payload do not agree");
    return TV_OK;
}

static enum tv_err linked_check(struct verify *v, const char *object,
                                const char *name, const struct tv_tensor *t,
                                struct tv_error *err)
{
    struct tv_view view;
    enum tv_err rc = source_view(v->read, t, &view, err);
    if (rc != TV_OK)
        return note(v, rc, object, name, err);
    if (t->checksum_known) {
        const uint64_t n = tv_leaf_count(view.bytes);
        struct tv_hash *leaves =
            (struct tv_hash *)tv_calloc((size_t)n, sizeof *leaves);
        if (leaves == NULL)
            return tv_error_set(err, TV_E_NOMEM, "no memory for checksums");
        for (uint64_t i = 0; i < n; i++)
            leaves[i] = tv_view_leaf(&view, i);
        if (!tv_hash_equal(tv_leaves_checksum(leaves, (size_t)n), t->checksum))
            problem(v, object, name, "linked bytes: checksum mismatch");
        tv_free(leaves);
        advance(v, t->bytes);
    }
    arena_clear(&v->read->arena);
    return rc;
}

static enum tv_err tensor_entry(struct verify *v, const struct walk *w,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_body body;
    struct rec_tensor r;
    struct rec_key k;
    const char *why = NULL;
    char object[TV_OBJECT_NAME_MAX + 1];
    const uint64_t id = key_get_id(&w->key, 0);
    owner_name(v, id, object);
    rc = walk_rec(w, REC_TENSOR, &body, err);
    if (rc != TV_OK)
        return note(v, rc, object, "", err);
    if (!rec_tensor_get(body, &r, &why)) {
        problem(v, object, "", "a tensor record is damaged: %s", why);
        return TV_OK;
    }
    if (r.t.storage == TV_INLINE)
        TV_TRY(use_add(v, r.t.payload_id, err));
    if (object[0] == '\0')
        return TV_OK; /* an orphan */
    char *name = tv_strndup(r.name.s, r.name.n);
    if (name == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a name");
    key_tensor(&k, id, name);
    if (!key_is(w, &k))
        problem(v, object, name, "its record is filed under a wrong key");
    r.t.name = name;
    rc = r.t.storage == TV_INLINE ? inline_check(v, object, name, &r.t, err)
                                  : linked_check(v, object, name, &r.t, err);
    tv_free(name);
out:
    return rc;
}

/* Reports a damaged payload under the name of every tensor that uses it. */
static enum tv_err payload_problem(struct verify *v, uint64_t id,
                                   const char *what, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    bool more = false, named = false;
    TV_TRY(walk_begin(&w, &v->t, DB_TENSOR, NULL, err));
    for (;;) {
        struct rec_body body;
        struct rec_tensor r;
        const char *why = NULL;
        char object[TV_OBJECT_NAME_MAX + 1];
        if (walk_next(&w, &more, NULL) != TV_OK || !more)
            break;
        if (!rec_open(REC_TENSOR, w.key.mv_data, w.key.mv_size, w.val.mv_data,
                      w.val.mv_size, &body, &why) ||
            !rec_tensor_get(body, &r, &why) || r.t.storage != TV_INLINE ||
            r.t.payload_id != id)
            continue;
        char *name = tv_strndup(r.name.s, r.name.n);
        if (name == NULL) {
            rc = tv_error_set(err, TV_E_NOMEM, "no memory for a name");
            goto out;
        }
        owner_name(v, key_get_id(&w.key, 0), object);
        problem(v, object, name, "%s", what);
        tv_free(name);
        named = true;
    }
    if (!named)
        problem(v, "", "", "%s", what);
out:
    walk_end(&w);
    return rc;
}

/* ---- bytes ------------------------------------------------------------------
 * Every byte is hashed twice over: chunks against their headers, leaves against
 * the leaf table. That is nearly all of the work, so payloads are gathered and
 * their chunks hashed by all cores; a leaf belongs to the chunk that it starts
 * in. Findings are reported in the order of payloads. */

#define GATHER_PAYLOADS 256u
#define GATHER_BYTES    ((uint64_t)512 << 20)

struct gathered { /* a payload whose bytes are to be looked at */
    uint64_t id;
    struct rec_payload p;
    struct arena arena;
    struct tv_view view;
    const struct tv_hash *leaves;
    size_t first_piece;
    bool seen; /* the view could be had; else `what` says why not */
    char what[sizeof((struct tv_error *)NULL)->msg];
};

struct piece { /* a chunk of it */
    const struct gathered *of;
    size_t chunk;
    bool bad_chunk;
    uint64_t bad_leaf; /* UINT64_MAX: none */
};

static void hash_piece(void *arg, size_t item, unsigned worker)
{
    struct piece *piece = (struct piece *)arg + item;
    const struct tv_view *view = &piece->of->view;
    const struct tv_hash *leaves = piece->of->leaves;
    const uint64_t from = piece->chunk * view->chunk_bytes;
    struct rec_chunk c;
    const char *why = NULL;
    uint64_t n = 0;
    size_t n_same = 0;
    (void)worker;
    const unsigned char *bytes = tv_view_at(view, from, &n);
    const uint64_t to = from + n;
    const uint64_t first = from / TV_LEAF_BYTES + (from % TV_LEAF_BYTES != 0);
    uint64_t end = to / TV_LEAF_BYTES;
    if (to == view->bytes)
        end = tv_leaf_count(view->bytes);
    const bool any = first < end;
    const size_t skip = any ? (size_t)(first * TV_LEAF_BYTES - from) : 0;
    const uint64_t hash =
        tv_hash64_leaves(bytes, (size_t)n, skip, any ? leaves + first : NULL,
                         any ? (size_t)(end - first) : 0, &n_same);
    piece->bad_chunk = !rec_chunk_get(bytes - TV_CHUNK_HEADER,
                                      (size_t)n + TV_CHUNK_HEADER, &c, &why) ||
                       hash != c.payload_hash;
    piece->bad_leaf = UINT64_MAX;
    if (any && n_same < end - first)
        piece->bad_leaf = first + n_same;
    /* One that starts here and ends in a later chunk. */
    const uint64_t over = any ? end : first;
    if (piece->bad_leaf == UINT64_MAX && over * TV_LEAF_BYTES < to &&
        to < view->bytes &&
        !tv_hash_equal(tv_view_leaf(view, over), leaves[over]))
        piece->bad_leaf = over;
}

static enum tv_err pieces_add(struct verify *v, const struct gathered *g,
                              struct tv_error *err)
{
    const size_t n = v->n_pieces + g->view.n_chunks;
    if (n > v->cap_pieces) {
        size_t cap = v->cap_pieces == 0 ? 64 : v->cap_pieces * 2;
        if (cap < n)
            cap = n;
        struct piece *p =
            (struct piece *)tv_realloc(v->pieces, cap * sizeof *p);
        if (p == NULL)
            return tv_error_set(err, TV_E_NOMEM, "no memory for a list");
        v->pieces = p;
        v->cap_pieces = cap;
    }
    for (size_t i = 0; i < g->view.n_chunks; i++)
        v->pieces[v->n_pieces++] = (struct piece){.of = g, .chunk = i};
    return TV_OK;
}

/* What is wrong with the bytes of a payload; false: nothing. */
static bool bytes_bad(const struct verify *v, struct gathered *g)
{
    if (!g->seen)
        return true;
    const struct piece *pieces = v->pieces + g->first_piece;
    uint64_t leaf = UINT64_MAX;
    for (size_t i = 0; i < g->view.n_chunks; i++) {
        uint64_t n = 0;
        const unsigned char *at =
            tv_view_at(&g->view, i * g->view.chunk_bytes, &n);
        const MDB_val val = {.mv_size = (size_t)n,
                             .mv_data = (void *)(uintptr_t)at};
        if (pieces[i].bad_chunk) {
            (void)snprintf(g->what, sizeof g->what,
                           "chunk %zu: checksum mismatch", i);
            return true;
        }
        if (on_free_page(v, &val)) {
            (void)snprintf(g->what, sizeof g->what,
                           "chunk %zu lies on free pages", i);
            return true;
        }
        if (pieces[i].bad_leaf < leaf)
            leaf = pieces[i].bad_leaf;
    }
    if (leaf != UINT64_MAX)
        (void)snprintf(g->what, sizeof g->what,
                       "checksum mismatch in MiB %" PRIu64, leaf);
    return leaf != UINT64_MAX;
}

static int id_compare(const void *x, const void *y)
{
    const uint64_t a = *(const uint64_t *)x, b = *(const uint64_t *)y;
    return (a > b) - (a < b);
}

static uint64_t uses_of(const struct verify *v, uint64_t id)
{
    size_t lo = 0, hi = v->n_uses;
    while (lo < hi) {
        const size_t mid = lo + (hi - lo) / 2;
        if (v->uses[mid] < id)
            lo = mid + 1;
        else
            hi = mid;
    }
    uint64_t n = 0;
    while (lo + n < v->n_uses && v->uses[lo + n] == id)
        n++;
    return n;
}

/* The bytes of a payload have been looked at: what was found, then what else
 * its record says. */
static enum tv_err payload_end(struct verify *v, struct gathered *g,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    struct rec_body body;
    bool found = false;
    const uint64_t n_uses = uses_of(v, g->id);
    if (bytes_bad(v, g))
        TV_TRY(payload_problem(v, g->id, g->what, err));
    if (g->p.refs != n_uses) {
        (void)snprintf(g->what, sizeof g->what,
                       "payload %" PRIu64 " has %" PRIu64
                       " users, but its record says %" PRIu64,
                       g->id, n_uses, g->p.refs);
        TV_TRY(payload_problem(v, g->id, g->what, err));
    }
    key_content(&k, g->p.checksum, g->id);
    rc = db_get_rec(&v->t, DB_CONTENT, REC_CONTENT, &k, &found, &body,
                    "an entry of the content table", err);
    if (rc == TV_OK && !found)
        problem(v, "", "", "payload %" PRIu64 " cannot be found by content",
                g->id);
    rc = note(v, rc, "", "", err);
    advance(v, g->p.bytes);
out:
    return rc;
}

/* Looks at what is gathered. */
static enum tv_err payloads_end(struct verify *v, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    if (v->pool != NULL)
        tv_pool_run(v->pool, v->n_pieces, hash_piece, v->pieces);
    else
        for (size_t i = 0; i < v->n_pieces; i++)
            hash_piece(v->pieces, i, 0);
    for (size_t i = 0; i < v->n_gathered; i++) {
        if (rc == TV_OK)
            rc = payload_end(v, &v->gathered[i], err);
        arena_clear(&v->gathered[i].arena);
    }
    v->n_gathered = 0;
    v->n_pieces = 0;
    v->gathered_bytes = 0;
    return rc;
}

static enum tv_err payload_gather(struct verify *v, uint64_t id,
                                  const struct rec_payload *p,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct gathered *g = &v->gathered[v->n_gathered];
    memset(g, 0, sizeof *g);
    g->id = id;
    g->p = *p;
    g->first_piece = v->n_pieces;
    v->n_gathered++;
    rc = payload_view(&v->t, id, p, false, &g->arena, &g->view, err);
    if (rc == TV_OK)
        rc = payload_leaves(&v->t, id, p, &g->arena, &g->leaves, err);
    if (rc == TV_E_CORRUPT) {
        (void)snprintf(g->what, sizeof g->what, "%s", err->msg);
        tv_error_clear(err);
        rc = TV_OK;
        goto out;
    }
    TV_TRY(rc);
    g->seen = true;
    TV_TRY(pieces_add(v, g, err));
    v->gathered_bytes += p->bytes;
    if (v->n_gathered == GATHER_PAYLOADS || v->gathered_bytes >= GATHER_BYTES)
        rc = payloads_end(v, err);
out:
    return rc;
}

static enum tv_err payload_entry(struct verify *v, const struct walk *w,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_payload p;
    struct rec_key k;
    bool found = false;
    const uint64_t id = key_get_id(&w->key, 0);
    key_id(&k, id);
    if (!key_is(w, &k) || !known_id(v, id)) {
        problem(v, "", "", "a payload is filed under a wrong id");
        return TV_OK;
    }
    rc = payload_get(&v->t, id, &found, &p, err);
    if (rc == TV_E_CORRUPT) {
        char what[sizeof err->msg];
        (void)snprintf(what, sizeof what, "%s", err->msg);
        tv_error_clear(err);
        return payload_problem(v, id, what, err);
    }
    if (rc != TV_OK || !found || p.state != REC_COMPLETE)
        return rc;
    return payload_gather(v, id, &p, err);
}

static enum tv_err content_entry(struct verify *v, const struct walk *w,
                                 struct tv_error *err)
{
    struct rec_body body;
    struct rec_payload p;
    bool found = false;
    enum tv_err rc = walk_rec(w, REC_CONTENT, &body, err);
    if (rc == TV_OK)
        rc = payload_get(&v->t, key_get_id(&w->key, 16), &found, &p, err);
    if (rc == TV_OK &&
        (!found || p.state != REC_COMPLETE ||
         !tv_hash_equal(tv_hash_get(w->key.mv_data), p.checksum)))
        problem(v, "", "", "an entry of the content table names no payload");
    return note(v, rc, "", "", err);
}

/* One of the pieces of a long value: its own checksum, and its owner. What is
 * missing of a value is noticed where it is joined. */
static enum tv_err piece_entry(struct verify *v, const struct walk *w,
                               struct tv_error *err)
{
    struct rec_body body;
    struct rec_key k = {.n = piece_owner(w->key.mv_size)};
    MDB_val val = {0, NULL};
    bool found = false;
    const enum tv_err rc = walk_rec(w, REC_PIECE, &body, err);
    if (rc != TV_OK)
        return note(v, rc, "", "", err);
    memcpy(k.b, w->key.mv_data, k.n);
    const enum tv_err seen = db_get(&v->t, w->db, &k, &found, &val, err);
    if (seen == TV_OK && (!found || val.mv_size == 0 ||
                          *(const unsigned char *)val.mv_data != REC_PIECES))
        problem(v, "", "", "a piece of '%s' belongs to nothing",
                db_name(w->db));
    return note(v, seen, "", "", err);
}

/* A value that may lie in pieces; with `digest` its key is its checksum. */
static enum tv_err long_entry(struct verify *v, const struct walk *w,
                              enum rec_type type, bool digest,
                              struct tv_error *err)
{
    struct rec_body body;
    struct arena a = {NULL};
    struct rec_key k = {.n = w->key.mv_size};
    char what[64];
    if (piece_key(w->db, w->key.mv_data, w->key.mv_size))
        return piece_entry(v, w, err);
    if (k.n > TV_REC_KEY_MAX) {
        problem(v, "", "", "a record of '%s' has a long key", db_name(w->db));
        return TV_OK;
    }
    memcpy(k.b, w->key.mv_data, k.n);
    (void)snprintf(what, sizeof what, "a record of '%s'", db_name(w->db));
    const enum tv_err rc =
        long_open(&v->t, w->db, type, &k, &w->val, &a, what, &body, err);
    if (rc == TV_OK && digest &&
        (k.n != 16 ||
         !tv_hash_equal(tv_hash128(body.p, body.n), tv_hash_get(k.b))))
        problem(v, "", "", "a side file: checksum mismatch");
    arena_clear(&a);
    return note(v, rc, "", "", err);
}

static enum tv_err leaf_entry(struct verify *v, const struct walk *w,
                              struct tv_error *err)
{
    return long_entry(v, w, REC_LEAVES, false, err);
}

static enum tv_err chunk_entry(struct verify *v, const struct walk *w,
                               struct tv_error *err)
{
    struct rec_chunk c;
    const char *why = NULL;
    (void)err;
    if (!rec_chunk_get(w->val.mv_data, w->val.mv_size, &c, &why))
        problem(v, "", "", "chunk of payload %" PRIu64 ": %s",
                key_get_id(&w->key, 0), why);
    else if (w->key.mv_size != 12 ||
             tv_get_be32((const unsigned char *)w->key.mv_data + 8) != c.number)
        problem(v, "", "", "a chunk is filed under a wrong number");
    return TV_OK;
}

static enum tv_err blob_entry(struct verify *v, const struct walk *w,
                              struct tv_error *err)
{
    return long_entry(v, w, REC_BLOB, true, err);
}

static enum tv_err source_entry(struct verify *v, const struct walk *w,
                                struct tv_error *err)
{
    struct rec_body body;
    struct rec_source r;
    const char *why = NULL;
    const enum tv_err rc = walk_rec(w, REC_SOURCE, &body, err);
    if (rc == TV_OK && !rec_source_get(body, &r, &why))
        problem(v, "", "", "the record of a linked file is damaged: %s", why);
    return note(v, rc, "", "", err);
}

static enum tv_err trash_entry(struct verify *v, const struct walk *w,
                               struct tv_error *err)
{
    struct rec_body body;
    return note(v, walk_rec(w, REC_TRASH, &body, err), "", "", err);
}

static enum tv_err run_entry(struct verify *v, const struct walk *w,
                             struct tv_error *err)
{
    return long_entry(v, w, REC_RUN, false, err);
}

static enum tv_err done_entry(struct verify *v, const struct walk *w,
                              struct tv_error *err)
{
    struct rec_body body;
    struct rec_done r;
    const char *why = NULL;
    const enum tv_err rc = walk_rec(w, REC_DONE, &body, err);
    if (rc == TV_OK && !rec_done_get(body, &r, &why))
        problem(v, "", "", "a journal record is damaged: %s", why);
    return note(v, rc, "", "", err);
}

static enum tv_err pin_entry(struct verify *v, const struct walk *w,
                             struct tv_error *err)
{
    struct rec_body body;
    return note(v, walk_rec(w, REC_PIN, &body, err), "", "", err);
}

/* Only LMDB's own part: derived_verify looks inside. */
static enum tv_err derived_entry(struct verify *v, const struct walk *w,
                                 struct tv_error *err)
{
    (void)v;
    (void)w;
    (void)err;
    return TV_OK;
}

static void derived_found(void *arg, const char *tensor, const char *what)
{
    problem((struct verify *)arg, "", tensor, "%s", what);
}

/* ---- the whole ------------------------------------------------------------
 */

static enum tv_err meta_read(struct verify *v, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    struct rec_body body;
    bool found = false;
    const char *why = NULL;
    v->next_id = UINT64_MAX;
    key_str(&k, META_NEXT_ID);
    rc = db_get_rec(&v->t, DB_META, REC_NUMBER, &k, &found, &body,
                    "the id counter", err);
    if (rc == TV_OK && (!found || !rec_number_get(body, &v->next_id, &why)))
        problem(v, "", "", "the id counter is missing or damaged");
    return note(v, rc, "", "", err);
}

/* Bytes that will be hashed, for progress; damage is met again later. */
static enum tv_err total_read(struct verify *v, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    bool more = false;
    TV_TRY(walk_begin(&w, &v->t, DB_PAYLOAD, NULL, err));
    uint64_t guard = 0, count = 0;
    TV_TRY(note(v, db_count(&v->t, DB_PAYLOAD, &count, err), "", "", err));
    while (guard++ <= count && walk_next(&w, &more, NULL) == TV_OK && more) {
        struct rec_body body;
        struct rec_payload p;
        const char *why = NULL;
        if (rec_open(REC_PAYLOAD, w.key.mv_data, w.key.mv_size, w.val.mv_data,
                     w.val.mv_size, &body, &why) &&
            rec_payload_get(body, &p, &why) && p.state == REC_COMPLETE)
            v->total += p.bytes;
    }
    walk_end(&w);
    TV_TRY(walk_begin(&w, &v->t, DB_TENSOR, NULL, err));
    TV_TRY(note(v, db_count(&v->t, DB_TENSOR, &count, err), "", "", err));
    guard = 0;
    while (guard++ <= count && walk_next(&w, &more, NULL) == TV_OK && more) {
        struct rec_body body;
        struct rec_tensor t;
        const char *why = NULL;
        if (rec_open(REC_TENSOR, w.key.mv_data, w.key.mv_size, w.val.mv_data,
                     w.val.mv_size, &body, &why) &&
            rec_tensor_get(body, &t, &why) && t.t.storage == TV_LINKED &&
            t.t.checksum_known)
            v->total += t.t.bytes;
    }
out:
    walk_end(&w);
    return rc;
}

static enum tv_err no_entry(struct verify *v, const struct walk *w,
                            struct tv_error *err)
{
    (void)v;
    (void)w;
    (void)err;
    return TV_OK;
}

enum tv_err tv_store_check_trees(tv_store *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct verify v;
    struct tv_error own;
    memset(&v, 0, sizeof v);
    tv_error_clear(&own);
    TV_TRY(tv_read_begin(s, &own, &v.read));
    v.t = v.read->t;
    TV_TRY(free_read(&v, &own));
    for (int db = 0; db < DB_COUNT; db++)
        TV_TRY(each(&v, (enum db)db, no_entry, &own));
    if (v.n_problems > 0) {
        rc = tv_error_set(&own, TV_E_CORRUPT, "store %s: its trees are damaged",
                          s->path);
        tv_error_hint(&own,
                      "'tvstore verify' lists everything that is damaged");
    }
out:
    tv_read_end(v.read);
    tv_free(v.free_pages);
    if (rc != TV_OK && err != NULL)
        *err = own;
    return rc;
}

enum tv_err tv_store_verify(tv_store *s, unsigned n_threads,
                            tv_verify_fn on_problem, tv_bytes_fn progress,
                            void *arg, struct tv_error *err)
{
    static const struct {
        enum db db;
        entry_fn fn;
    } tables[] = {
        {DB_META, meta_entry},           {DB_OBJECT, object_entry},
        {DB_OBJECT_ID, object_id_entry}, {DB_SOURCE, source_entry},
        {DB_TENSOR, tensor_entry},       {DB_PAYLOAD, payload_entry},
        {DB_LEAF, leaf_entry},           {DB_CONTENT, content_entry},
        {DB_CHUNK, chunk_entry},         {DB_BLOB, blob_entry},
        {DB_TRASH, trash_entry},         {DB_RUN, run_entry},
        {DB_DONE, done_entry},           {DB_PIN, pin_entry},
        {DB_MASK, derived_entry},        {DB_DELTA, derived_entry},
        {DB_GROUP, derived_entry},       {DB_USE, derived_entry},
        {DB_CHARGE, derived_entry},      {DB_STAT, derived_entry},
    };
    _Static_assert(sizeof tables / sizeof tables[0] == DB_COUNT, "all tables");
    enum tv_err rc = TV_OK;
    struct verify v;
    struct tv_error own; /* problems are read from it even without err */
    memset(&v, 0, sizeof v);
    tv_error_clear(&own);
    v.on_problem = on_problem;
    v.progress = progress;
    v.arg = arg;
    v.gathered =
        (struct gathered *)tv_calloc(GATHER_PAYLOADS, sizeof *v.gathered);
    if (v.gathered == NULL) {
        rc = tv_error_set(&own, TV_E_NOMEM, "no memory for a list");
        goto out;
    }
    if (tv_pool_open(n_threads > 0 ? n_threads : tv_cpu_count(), NULL,
                     &v.pool) != TV_OK)
        v.pool = NULL; /* it takes longer */
    TV_TRY(tv_read_begin(s, &own, &v.read));
    v.t = v.read->t;
    TV_TRY(meta_read(&v, &own));
    TV_TRY(free_read(&v, &own));
    TV_TRY(total_read(&v, &own));
    for (size_t i = 0; i < DB_COUNT; i++) {
        TV_TRY(each(&v, tables[i].db, tables[i].fn, &own));
        if (tables[i].db == DB_TENSOR && v.n_uses > 0)
            qsort(v.uses, v.n_uses, sizeof *v.uses, id_compare);
        if (tables[i].db == DB_PAYLOAD)
            TV_TRY(payloads_end(&v, &own));
    }
    TV_TRY(derived_verify(&v.t, derived_found, &v, &own));
    if (v.n_problems > 0)
        rc = tv_error_set(&own, TV_E_CORRUPT,
                          "store %s: %" PRIu64 " problem%s found", s->path,
                          v.n_problems, v.n_problems == 1 ? "" : "s");
out:
    for (size_t i = 0; i < v.n_gathered; i++)
        arena_clear(&v.gathered[i].arena);
    tv_read_end(v.read);
    tv_pool_close(v.pool);
    tv_free(v.pieces);
    tv_free(v.gathered);
    tv_free(v.uses);
    tv_free(v.free_pages);
    if (rc != TV_OK && err != NULL)
        *err = own;
    return rc;
}
