/* SPDX-License-Identifier: Apache-2.0 */
/*
 * validate_entries.c - one function per table: the record decodes, its key is
 * the one that it would get, and what it refers to is there and refers back.
 */
#include "validate_parts.h"

#include <inttypes.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

static enum tv_err meta_entry(struct verify *v, const struct walk *w,
                              struct tv_error *err)
{
    struct rec_body body;
    const bool store = w->key.mv_size == strlen(META_STORE) &&
                       memcmp(w->key.mv_data, META_STORE, w->key.mv_size) == 0;
    return verify_note(v,
                       walk_rec(w, store ? REC_STORE : REC_NUMBER, &body, err),
                       "", "", err);
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
        rc = verify_note(v, rc, object, "", err);
    else if (!found)
        verify_problem(v, object, "", "%s is missing", what);
    else if (body.n != f->bytes ||
             !tv_hash_equal(tv_hash128(body.p, body.n), f->digest))
        verify_problem(v, object, "", "%s: checksum mismatch", what);
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
        return verify_note(v, rc, name, "", err);
    if (!rec_object_get(body, &o, &why)) {
        verify_problem(v, name, "", "its record is damaged: %s", why);
        return TV_OK;
    }
    key_object(&k, name, o.state == REC_PARTIAL);
    if (!verify_key_is(w, &k) || !verify_known_id(v, o.id))
        verify_problem(v, name, "",
                       "its record is filed under a wrong name or id");
    rc = object_id_get(&v->t, o.id, &found, &rid, id_name, err);
    if (rc != TV_OK)
        return verify_note(v, rc, name, "", err);
    if (!found || rid.state != o.state || strcmp(id_name, name) != 0)
        verify_problem(v, name, "", "its two records do not agree");
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
        return verify_note(v, rc, "", "", err);
    if (rid.state == REC_DOOMED)
        return TV_OK;
    key_object(&k, name, rid.state == REC_PARTIAL);
    rc = db_get(&v->t, DB_OBJECT, &k, &found, &val, err);
    if (rc != TV_OK)
        return verify_note(v, rc, name, "", err);
    if (!found) {
        verify_problem(v, name, "", "its name record is missing");
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
            rc = verify_note(v, rc, name, "", err);
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
        verify_problem(v, name, "",
                       "%" PRIu64
                       " tensors are there, but its record says %" PRIu64,
                       n, rid.n_tensors);
    else if (bytes != rid.bytes || n_linked != rid.n_linked)
        verify_problem(v, name, "", "its tensors do not add up to its record");
out:
    walk_end(&tensors);
    return rc;
}

/* ---- tensors ------------------------------------------------------------- */

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
        return verify_note(v, rc, object, name, err);
    if (!found)
        verify_problem(v, object, name, "its payload is missing");
    else if (p.state != REC_COMPLETE || !t->checksum_known ||
             !tv_hash_equal(p.checksum, t->checksum) || p.dtype != t->dtype ||
             p.rank != t->rank ||
             memcmp(p.shape, t->shape, sizeof p.shape) != 0)
        verify_problem(v, object, name,
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
        return verify_note(v, rc, object, name, err);
    if (t->checksum_known) {
        const uint64_t n = tv_leaf_count(view.bytes);
        struct tv_hash *leaves =
            (struct tv_hash *)tv_calloc((size_t)n, sizeof *leaves);
        if (leaves == NULL)
            return tv_error_set(err, TV_E_NOMEM, "no memory for checksums");
        for (uint64_t i = 0; i < n; i++)
            leaves[i] = tv_view_leaf(&view, i);
        if (!tv_hash_equal(tv_leaves_checksum(leaves, (size_t)n), t->checksum))
            verify_problem(v, object, name, "linked bytes: checksum mismatch");
        tv_free(leaves);
        verify_advance(v, t->bytes);
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
        return verify_note(v, rc, object, "", err);
    if (!rec_tensor_get(body, &r, &why)) {
        verify_problem(v, object, "", "a tensor record is damaged: %s", why);
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
    if (!verify_key_is(w, &k))
        verify_problem(v, object, name,
                       "its record is filed under a wrong key");
    r.t.name = name;
    rc = r.t.storage == TV_INLINE ? inline_check(v, object, name, &r.t, err)
                                  : linked_check(v, object, name, &r.t, err);
    tv_free(name);
out:
    return rc;
}

/* ---- payloads and the rest ----------------------------------------------- */

enum tv_err verify_payload_problem(struct verify *v, uint64_t id,
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
        verify_problem(v, object, name, "%s", what);
        tv_free(name);
        named = true;
    }
    if (!named)
        verify_problem(v, "", "", "%s", what);
out:
    walk_end(&w);
    return rc;
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
        verify_problem(v, "", "",
                       "an entry of the content table names no payload");
    return verify_note(v, rc, "", "", err);
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
        return verify_note(v, rc, "", "", err);
    memcpy(k.b, w->key.mv_data, k.n);
    const enum tv_err seen = db_get(&v->t, w->db, &k, &found, &val, err);
    if (seen == TV_OK &&
        (!found || !piece_belongs(&k, &val, w->key.mv_data, w->key.mv_size)))
        verify_problem(v, "", "", "a piece of '%s' belongs to nothing",
                       db_name(w->db));
    return verify_note(v, seen, "", "", err);
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
        verify_problem(v, "", "", "a record of '%s' has a long key",
                       db_name(w->db));
        return TV_OK;
    }
    memcpy(k.b, w->key.mv_data, k.n);
    (void)snprintf(what, sizeof what, "a record of '%s'", db_name(w->db));
    const enum tv_err rc =
        long_open(&v->t, w->db, type, &k, &w->val, &a, what, &body, err);
    if (rc == TV_OK && digest &&
        (k.n != 16 ||
         !tv_hash_equal(tv_hash128(body.p, body.n), tv_hash_get(k.b))))
        verify_problem(v, "", "", "a side file: checksum mismatch");
    arena_clear(&a);
    return verify_note(v, rc, "", "", err);
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
        verify_problem(v, "", "", "chunk of payload %" PRIu64 ": %s",
                       key_get_id(&w->key, 0), why);
    else if (w->key.mv_size != 12 ||
             tv_get_be32((const unsigned char *)w->key.mv_data + 8) != c.number)
        verify_problem(v, "", "", "a chunk is filed under a wrong number");
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
        verify_problem(v, "", "", "the record of a linked file is damaged: %s",
                       why);
    return verify_note(v, rc, "", "", err);
}

static enum tv_err trash_entry(struct verify *v, const struct walk *w,
                               struct tv_error *err)
{
    struct rec_body body;
    return verify_note(v, walk_rec(w, REC_TRASH, &body, err), "", "", err);
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
        verify_problem(v, "", "", "a journal record is damaged: %s", why);
    return verify_note(v, rc, "", "", err);
}

static enum tv_err pin_entry(struct verify *v, const struct walk *w,
                             struct tv_error *err)
{
    struct rec_body body;
    return verify_note(v, walk_rec(w, REC_PIN, &body, err), "", "", err);
}

enum tv_err verify_no_entry(struct verify *v, const struct walk *w,
                            struct tv_error *err)
{
    (void)v;
    (void)w;
    (void)err;
    return TV_OK;
}

verify_fn verify_entry_of(enum db db)
{
    static const verify_fn fns[] = {
        [DB_META] = meta_entry,           [DB_OBJECT] = object_entry,
        [DB_OBJECT_ID] = object_id_entry, [DB_SOURCE] = source_entry,
        [DB_TENSOR] = tensor_entry,       [DB_PAYLOAD] = verify_payload_entry,
        [DB_LEAF] = leaf_entry,           [DB_CONTENT] = content_entry,
        [DB_CHUNK] = chunk_entry,         [DB_BLOB] = blob_entry,
        [DB_TRASH] = trash_entry,         [DB_RUN] = run_entry,
        [DB_DONE] = done_entry,           [DB_PIN] = pin_entry,
        [DB_MASK] = verify_no_entry,      [DB_DELTA] = verify_no_entry,
        [DB_GROUP] = verify_no_entry,     [DB_USE] = verify_no_entry,
        [DB_CHARGE] = verify_no_entry,    [DB_STAT] = verify_no_entry,
    };
    _Static_assert(sizeof fns / sizeof fns[0] == DB_COUNT, "all tables");
    return fns[db];
}
