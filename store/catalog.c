/* SPDX-License-Identifier: Apache-2.0 */
/*
 * catalog.c - the tensors of objects: lists in layer order, lookup, entries.
 *
 * Keys sort almost as names do (record.c); a list is checked against the exact
 * order once it is read, and sorted when a name was cut or differs only in
 * leading zeros. The full name in the record is compared on every lookup, so
 * two names can never be confused; that two names of one object get the same
 * key (a 64-bit hash collision) is refused when the second is put.
 */
#include "store_priv.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

static enum tv_err tensor_damaged(const tv_store *s, const char *name,
                                  const char *why, struct tv_error *err)
{
    char shown[SHOW_BYTES], what[SHOW_BYTES + 32];
    (void)snprintf(what, sizeof what, "the record of tensor '%s'",
                   show(name, shown));
    return rec_damaged(s, what, why, err);
}

/* Decodes a record and compares its full name. */
static enum tv_err tensor_find(const struct txn *t, uint64_t object_id,
                               const char *name, bool *found, bool *collides,
                               struct tv_tensor *out, struct tv_error *err)
{
    struct rec_key k;
    MDB_val val = {0, NULL};
    struct rec_body body;
    struct rec_tensor r;
    const char *why = NULL;
    *collides = false;
    key_tensor(&k, object_id, name);
    const enum tv_err rc = db_get(t, DB_TENSOR, &k, found, &val, err);
    if (rc != TV_OK || !*found)
        return rc;
    if (!rec_open(REC_TENSOR, k.b, k.n, val.mv_data, val.mv_size, &body,
                  &why) ||
        !rec_tensor_get(body, &r, &why))
        return tensor_damaged(t->s, name, why, err);
    if (r.name.n != strlen(name) || memcmp(r.name.s, name, r.name.n) != 0) {
        *found = false;
        *collides = true;
        return TV_OK;
    }
    *out = r.t;
    out->name = name;
    return TV_OK;
}

enum tv_err tv_tensor_get(tv_read *r, uint64_t object_id, const char *name,
                          bool *found, struct tv_tensor *out,
                          struct tv_error *err)
{
    bool collides = false;
    *found = false;
    if (name[0] == '\0' || strlen(name) > TV_NAME_MAX)
        return TV_OK;
    return tensor_find(&r->t, object_id, name, found, &collides, out, err);
}

/* ---- lists ----------------------------------------------------------------
 */

static int tensor_compare(const void *x, const void *y)
{
    return tv_name_compare(((const struct tv_tensor *)x)->name,
                           ((const struct tv_tensor *)y)->name);
}

void tv_tensor_list_free(struct tv_tensor_list *l)
{
    if (l == NULL)
        return;
    tv_free(l->items);
    tv_free(l->storage);
    tv_free(l);
}

enum tv_err tv_tensor_list(tv_read *r, uint64_t object_id, struct tv_error *err,
                           struct tv_tensor_list **out)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key prefix;
    struct tv_buf names;
    struct tv_tensor *items = NULL;
    struct tv_tensor_list *list = NULL;
    size_t n = 0, cap = 0;
    bool more = false;
    *out = NULL;
    tv_buf_init(&names, (size_t)1 << 32);
    key_id(&prefix, object_id);
    TV_TRY(walk_begin(&w, &r->t, DB_TENSOR, &prefix, err));
    for (;;) {
        struct rec_body body;
        struct rec_tensor rec;
        const char *why = NULL;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        TV_TRY(walk_rec(&w, REC_TENSOR, &body, err));
        if (!rec_tensor_get(body, &rec, &why)) {
            rc = rec_damaged(r->t.s, "a tensor record", why, err);
            goto out;
        }
        if (n == cap) {
            cap = cap == 0 ? 64 : cap * 2;
            struct tv_tensor *p =
                (struct tv_tensor *)tv_realloc(items, cap * sizeof *items);
            if (p == NULL) {
                rc = tv_error_set(err, TV_E_NOMEM, "no memory for a list");
                goto out;
            }
            items = p;
        }
        items[n++] = rec.t;
        tv_buf_add(&names, rec.name.s, rec.name.n);
        tv_buf_add(&names, "", 1);
    }
    TV_TRY(tv_buf_ok(&names, err));
    list = (struct tv_tensor_list *)tv_calloc(1, sizeof *list);
    if (list == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "no memory for a list");
        goto out;
    }
    bool sorted = true;
    const char *at = names.data;
    for (size_t i = 0; i < n; i++) {
        items[i].name = at;
        at += strlen(at) + 1;
        if (i > 0 && tv_name_compare(items[i - 1].name, items[i].name) >= 0)
            sorted = false;
    }
    if (!sorted)
        qsort(items, n, sizeof *items, tensor_compare);
    list->items = items;
    list->n = n;
    list->storage = names.data;
    items = NULL;
    names.data = NULL;
    *out = list;
    list = NULL;
out:
    walk_end(&w);
    tv_free(items);
    tv_free(list);
    tv_buf_free(&names);
    return rc;
}

/* ---- views ----------------------------------------------------------------
 */

static bool same_shape(enum tv_dtype dtype, unsigned rank,
                       const uint64_t *shape, const struct rec_payload *p)
{
    return dtype == p->dtype && rank == p->rank &&
           memcmp(shape, p->shape, rank * sizeof *shape) == 0;
}

enum tv_err tv_tensor_view(tv_read *r, const struct tv_tensor *t,
                           struct tv_error *err, struct tv_view *out)
{
    enum tv_err rc = TV_OK;
    struct rec_payload p;
    bool found = false;
    char shown[SHOW_BYTES];
    if (t->storage == TV_LINKED) {
        rc = source_view(r, t, out, err);
        goto out;
    }
    TV_TRY(payload_get(&r->t, t->payload_id, &found, &p, err));
    if (!found) {
        rc = rec_damaged(r->t.s, "its payload", "it is missing", err);
        goto out;
    }
    if (p.state != REC_COMPLETE ||
        !same_shape(t->dtype, t->rank, t->shape, &p) ||
        !tv_hash_equal(p.checksum, t->checksum)) {
        rc = rec_damaged(r->t.s, "its payload",
                         "the records of tensor and payload do not agree", err);
        goto out;
    }
    TV_TRY(payload_view(&r->t, t->payload_id, &p, true, &r->arena, out, err));
    TV_TRY(
        payload_leaves(&r->t, t->payload_id, &p, &r->arena, &out->leaves, err));
out:
    if (rc != TV_OK)
        tv_error_context(err, "tensor '%s'", show(t->name, shown));
    return rc;
}

static int name_bytes_compare(const void *x, const void *y)
{
    return strcmp(((const struct tv_tensor *)x)->name,
                  ((const struct tv_tensor *)y)->name);
}

static enum tv_err checksum_of(tv_read *r, struct tv_tensor *t,
                               struct tv_error *err)
{
    struct tv_view v;
    enum tv_err rc = tv_tensor_view(r, t, err, &v);
    if (rc != TV_OK)
        return rc;
    const uint64_t n = tv_leaf_count(v.bytes);
    struct tv_hash *leaves = (struct tv_hash *)tv_calloc(n, sizeof *leaves);
    if (leaves == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for checksums");
    for (uint64_t i = 0; i < n; i++)
        leaves[i] = tv_view_leaf(&v, i);
    t->checksum = tv_leaves_checksum(leaves, (size_t)n);
    t->checksum_known = true;
    tv_free(leaves);
    return rc;
}

enum tv_err tv_object_digest(tv_read *r, uint64_t object_id,
                             struct tv_hash *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_tensor_list *l = NULL;
    tv_hasher *h = NULL;
    TV_TRY(tv_tensor_list(r, object_id, err, &l));
    TV_TRY(tv_hasher_open(err, &h));
    if (l->n > 0)
        qsort(l->items, l->n, sizeof *l->items, name_bytes_compare);
    for (size_t i = 0; i < l->n; i++) {
        struct tv_tensor *t = &l->items[i];
        if (!t->checksum_known)
            TV_TRY(checksum_of(r, t, err));
        tv_digest_add(h, t->name, t->dtype, t->shape, t->rank, t->checksum);
    }
    *out = tv_hasher_value(h);
out:
    tv_hasher_close(h);
    tv_tensor_list_free(l);
    return rc;
}

/* ---- writing --------------------------------------------------------------
 */

static enum tv_err name_check(const char *name, struct tv_error *err)
{
    const size_t n = strlen(name);
    if (n >= 1 && n <= TV_NAME_MAX)
        return TV_OK;
    return tv_error_set(err, TV_E_CORRUPT,
                        "a tensor name of %zu bytes: 1 to %u are allowed", n,
                        TV_NAME_MAX);
}

static enum tv_err tensor_put(tv_batch *b, uint64_t object_id,
                              const struct tv_tensor *t, struct tv_error *err)
{
    struct rec_key k;
    struct tv_buf buf;
    const struct rec_tensor r = {.t = *t,
                                 .name = {.s = t->name, .n = strlen(t->name)}};
    key_tensor(&k, object_id, t->name);
    rec_begin(&buf);
    rec_tensor_put(&buf, &r);
    return db_put_rec(b, DB_TENSOR, REC_TENSOR, &k, &buf, err);
}

enum tv_err tensor_release(tv_batch *b, const struct tv_tensor *t,
                           struct tv_error *err)
{
    return t->storage == TV_INLINE ? payload_unref(b, t->payload_id, err)
                                   : TV_OK;
}

/* Puts an entry, taking the place of an older one of that name. */
static enum tv_err entry_put(tv_batch *b, uint64_t object_id,
                             const struct tv_tensor *t, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_object_id rid;
    char object[TV_OBJECT_NAME_MAX + 1];
    struct tv_tensor old;
    bool found = false, collides = false;
    TV_TRY(name_check(t->name, err));
    TV_TRY(object_writable(b, object_id, &rid, object, err));
    TV_TRY(
        tensor_find(&b->t, object_id, t->name, &found, &collides, &old, err));
    if (collides) {
        char shown[SHOW_BYTES];
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "object '%s': tensor '%s' has the same key as "
                          "another tensor",
                          object, show(t->name, shown));
        goto out;
    }
    if (found) {
        TV_TRY(tensor_release(b, &old, err));
        rid.n_tensors--;
        rid.bytes -= old.bytes;
        rid.n_linked -= old.storage == TV_LINKED;
    }
    rid.n_tensors++;
    rid.n_linked += t->storage == TV_LINKED;
    if (!tv_add_u64(rid.bytes, t->bytes, &rid.bytes)) {
        rc =
            tv_error_set(err, TV_E_CORRUPT, "object '%s' is too large", object);
        goto out;
    }
    TV_TRY(tensor_put(b, object_id, t, err));
    TV_TRY(object_id_put(b, object_id, &rid, err));
out:
    return rc;
}

/* Copies a description; sizes are computed and checked. */
static enum tv_err tensor_from_desc(const struct tv_tensor_desc *d,
                                    struct tv_tensor *t, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    memset(t, 0, sizeof *t);
    if (d->rank > TV_RANK_MAX)
        return tv_error_set(err, TV_E_CORRUPT,
                            "a tensor of rank %u: %u is "
                            "the most",
                            d->rank, TV_RANK_MAX);
    t->name = d->name;
    t->dtype = d->dtype;
    t->rank = d->rank;
    for (unsigned i = 0; i < d->rank; i++)
        t->shape[i] = d->shape[i];
    TV_TRY(tv_shape_elems(d->shape, d->rank, &t->n_elems, err));
    TV_TRY(tv_dtype_bytes(d->dtype, t->n_elems, &t->bytes, err));
out:
    return rc;
}

enum tv_err tv_tensor_put(tv_batch *b, uint64_t object_id,
                          const struct tv_tensor_desc *d, uint64_t payload_id,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_tensor t;
    struct rec_payload p;
    struct rec_object_id rid;
    char object[TV_OBJECT_NAME_MAX + 1];
    const uint64_t before = b->n_writes;
    TV_TRY(object_writable(b, object_id, &rid, object, err));
    TV_TRY(name_check(d->name, err));
    TV_TRY(tensor_from_desc(d, &t, err));
    /* Counted before an older entry of the name is released: it may be the
     * last user of this very payload. */
    TV_TRY(payload_ref(b, payload_id, d, &p, err));
    t.storage = TV_INLINE;
    t.checksum_known = true;
    t.checksum = p.checksum;
    t.payload_id = payload_id;
    TV_TRY(entry_put(b, object_id, &t, err));
out:
    return batch_end(b, before, rc);
}

enum tv_err tv_tensor_link(tv_batch *b, uint64_t object_id,
                           const struct tv_tensor_desc *d, uint64_t source_id,
                           uint64_t offset, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_tensor t;
    struct rec_source src;
    bool found = false;
    char shown[SHOW_BYTES];
    const uint64_t before = b->n_writes;
    TV_TRY(batch_check(b, err));
    TV_TRY(name_check(d->name, err));
    TV_TRY(tensor_from_desc(d, &t, err));
    TV_TRY(source_get(&b->t, source_id, &found, &src, err));
    if (!found) {
        rc = tv_error_set(err, TV_E_INTERNAL,
                          "store %s: no source with id %" PRIu64, b->t.s->path,
                          source_id);
        goto out;
    }
    if (offset > src.bytes || t.bytes > src.bytes - offset) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "tensor '%s': bytes %" PRIu64 " to %" PRIu64
                          " lie outside its file of %" PRIu64 " bytes",
                          show(d->name, shown), offset, offset + t.bytes,
                          src.bytes);
        goto out;
    }
    t.storage = TV_LINKED;
    t.source_id = source_id;
    t.offset = offset;
    TV_TRY(entry_put(b, object_id, &t, err));
out:
    return batch_end(b, before, rc);
}

enum tv_err tv_tensor_checksum_put(tv_batch *b, uint64_t object_id,
                                   const char *name, struct tv_hash checksum,
                                   struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_tensor t;
    bool found = false, collides = false;
    char shown[SHOW_BYTES];
    const uint64_t before = b->n_writes;
    TV_TRY(batch_check(b, err));
    TV_TRY(name_check(name, err));
    TV_TRY(tensor_find(&b->t, object_id, name, &found, &collides, &t, err));
    if (!found || t.storage != TV_LINKED) {
        rc = tv_error_set(err, TV_E_NOTFOUND,
                          "store %s: no linked tensor '%s' in that object",
                          b->t.s->path, show(name, shown));
        goto out;
    }
    if (t.checksum_known) {
        if (!tv_hash_equal(t.checksum, checksum)) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "store %s: linked tensor '%s' has other bytes "
                              "than when it was read first",
                              b->t.s->path, show(name, shown));
            tv_error_hint(err, "import it again with --force");
        }
        goto out;
    }
    t.checksum_known = true;
    t.checksum = checksum;
    TV_TRY(tensor_put(b, object_id, &t, err));
out:
    return batch_end(b, before, rc);
}
