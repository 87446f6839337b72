/* SPDX-License-Identifier: Apache-2.0 */
/*
 * derived.c - masks, task vectors, statistics: records, chunks, reading.
 *
 * An item is a record in `mask`, `delta` or `stat`, followed by its chunks:
 *
 *     score [16] | tensor key              struct rec_derived
 *     score [16] | tensor key | 0, 1, ...  48-byte header, then
 *         mask   what mask.c has made of up to 2^23 elements
 *         delta  u32 values before each block of 1024 elements, and their sum;
 *                padded to 64 bytes; the values, packed; up to 2^20 elements
 *         stat   the values; up to 2^20 elements
 *
 * The record is written first, as unfinished, and completed in the batch of the
 * last chunk. `use` lists items by the tick of their last use; a record holds
 * that tick too. `group` counts the items of a document. Small chunks lie among
 * other records at any address: they are copied when they are opened.
 */
#include "derived_priv.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

_Static_assert(MASK_CHUNK_ELEMS % MASK_CONTAINER == 0, "whole containers");
_Static_assert(DELTA_CHUNK_ELEMS % TV_DELTA_BLOCK == 0, "whole blocks");

enum db derived_db(enum tv_derived_kind kind)
{
    switch (kind) {
    case TV_MASK:
        return DB_MASK;
    case TV_DELTA:
        return DB_DELTA;
    case TV_STAT:
        break;
    }
    return DB_STAT;
}

bool derived_kind_known(uint8_t kind)
{
    return kind >= TV_MASK && kind <= TV_STAT;
}

uint8_t derived_chunk_kind(enum tv_derived_kind kind)
{
    switch (kind) {
    case TV_MASK:
        return TV_CHUNK_MASK;
    case TV_DELTA:
        return TV_CHUNK_DELTA;
    case TV_STAT:
        break;
    }
    return TV_CHUNK_STAT;
}

const char *derived_word(enum tv_derived_kind kind)
{
    switch (kind) {
    case TV_MASK:
        return "mask";
    case TV_DELTA:
        return "task vector";
    case TV_STAT:
        break;
    }
    return "statistic";
}

uint64_t derived_chunks(const struct rec_derived *r)
{
    return r->n_elems / r->chunk_elems + (r->n_elems % r->chunk_elems != 0);
}

static uint64_t chunk_elems_at(const struct rec_derived *r, uint64_t i)
{
    const uint64_t left = r->n_elems - i * r->chunk_elems;
    return left < r->chunk_elems ? left : r->chunk_elems;
}

static enum tv_err damaged(const tv_store *s, enum tv_derived_kind kind,
                           struct rec_text name, const char *why,
                           struct tv_error *err)
{
    char shown[SHOW_BYTES], what[SHOW_BYTES + 48];
    (void)snprintf(what, sizeof what, "the %s of tensor '%s'",
                   derived_word(kind), show_text(name, shown));
    (void)rec_damaged(s, what, why, err);
    tv_error_hint(err, "'tvstore gc --derived' drops it; it will be made "
                       "again when it is needed");
    return TV_E_CORRUPT;
}

enum tv_err derived_get(const struct txn *t, enum tv_derived_kind kind,
                        const struct rec_key *k, bool *found,
                        struct rec_derived *r, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_body body;
    MDB_val val = {0, NULL};
    const char *why = NULL;
    static const char no_name[] = "?";
    TV_TRY(db_get(t, derived_db(kind), k, found, &val, err));
    if (!*found)
        goto out;
    if (!rec_open(REC_DERIVED, k->b, k->n, val.mv_data, val.mv_size, &body,
                  &why) ||
        !rec_derived_get(body, r, &why))
        rc = damaged(t->s, kind, (struct rec_text){.s = no_name, .n = 1}, why,
                     err);
out:
    return rc;
}

enum tv_err derived_put(tv_batch *b, enum tv_derived_kind kind,
                        const struct rec_key *k, const struct rec_derived *r,
                        struct tv_error *err)
{
    struct tv_buf buf;
    rec_begin(&buf);
    rec_derived_put(&buf, r);
    return db_put_rec(b, derived_db(kind), REC_DERIVED, k, &buf, err);
}

/* ---- parts ----------------------------------------------------------------
 */

/* Chunk i of an item, checked to the last byte; *data 64-byte aligned, owned in
 * *copy when it does not lie so in the map. */
static enum tv_err part_open(const struct txn *t, enum tv_derived_kind kind,
                             const struct rec_key *item,
                             const struct rec_derived *r, uint64_t i,
                             struct rec_part *p, const unsigned char **data,
                             unsigned char **copy, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    MDB_val val = {0, NULL};
    bool found = false;
    const char *why = NULL;
    *copy = NULL;
    key_derived_chunk(&k, item, (uint32_t)i);
    TV_TRY(db_get(t, derived_db(kind), &k, &found, &val, err));
    if (!found) {
        rc = damaged(t->s, kind, r->name, "a chunk is missing", err);
        goto out;
    }
    if (!rec_part_get(val.mv_data, val.mv_size, p, &why)) {
        rc = damaged(t->s, kind, r->name, why, err);
        goto out;
    }
    const unsigned char *from =
        (const unsigned char *)val.mv_data + TV_CHUNK_HEADER;
    if (p->kind != derived_chunk_kind(kind) || p->c.number != i ||
        p->c.n_elems != chunk_elems_at(r, i) || p->c.dtype != r->dtype) {
        rc = damaged(t->s, kind, r->name,
                     "a chunk's header belongs to another chunk", err);
        goto out;
    }
    if (tv_hash64(from, (size_t)p->c.bytes) != p->c.payload_hash) {
        rc = damaged(t->s, kind, r->name, "a chunk's checksum is wrong", err);
        goto out;
    }
    if ((uintptr_t)from % 64 != 0) {
        *copy = (unsigned char *)tv_alloc_aligned((size_t)p->c.bytes);
        if (*copy == NULL) {
            rc = tv_error_set(err, TV_E_NOMEM, "no memory for a mask");
            goto out;
        }
        memcpy(*copy, from, (size_t)p->c.bytes);
        from = *copy;
    }
    *data = from;
out:
    return rc;
}

/* ---- finding --------------------------------------------------------------
 */

static bool same_name(struct rec_text name, const char *tensor)
{
    return name.n == strlen(tensor) && memcmp(name.s, tensor, name.n) == 0;
}

static void info_fill(struct tv_derived *out, enum tv_derived_kind kind,
                      struct tv_hash score, const char *tensor,
                      const struct rec_derived *r)
{
    *out = (struct tv_derived){
        .key = {.kind = kind, .score = score, .tensor = tensor},
        .id = r->id,
        .group = r->group,
        .n_elems = r->n_elems,
        .n_set = r->n_set,
        .bytes = r->bytes,
        .created = r->created,
        .used = r->used,
        .dtype = r->dtype,
        .has_sums = r->has_sums,
        .sum_all = r->sum_all,
        .sum_kept = r->sum_kept,
        .n_nonfinite = kind == TV_STAT ? 0 : r->n_nonfinite,
        .n_rows = kind == TV_STAT ? r->n_nonfinite : 0,
    };
}

/* Finished items whose mask this program can read. */
static enum tv_err find(const struct txn *t, const struct tv_derived_key *key,
                        struct rec_key *k, bool *found, struct rec_derived *r,
                        struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    key_derived(k, key->score, key->tensor);
    TV_TRY(derived_get(t, key->kind, k, found, r, err));
    if (!*found)
        goto out;
    *found = r->state == REC_COMPLETE && same_name(r->name, key->tensor);
    if (*found && key->kind == TV_MASK && r->n_elems > 0) {
        struct rec_key first;
        struct rec_part p;
        MDB_val val = {0, NULL};
        const char *why = NULL;
        bool there = false;
        key_derived_chunk(&first, k, 0);
        TV_TRY(db_get(t, DB_MASK, &first, &there, &val, err));
        *found = !there || !rec_part_get(val.mv_data, val.mv_size, &p, &why) ||
                 mask_flags_known(p.flags);
    }
out:
    return rc;
}

enum tv_err tv_derived_find(tv_read *r, const struct tv_derived_key *key,
                            bool *found, struct tv_derived *out,
                            struct tv_error *err)
{
    struct rec_key k;
    struct rec_derived rec;
    const enum tv_err rc = find(&r->t, key, &k, found, &rec, err);
    if (rc == TV_OK && *found)
        info_fill(out, key->kind, key->score, key->tensor, &rec);
    return rc;
}

/* ---- masks ----------------------------------------------------------------
 */

struct tv_mask {
    uint64_t n_elems, n_set;
    size_t n_chunks;
    struct mask_chunk *chunks;
    unsigned char **copies;
};

/* What CRoaring allocates to view a chunk: a pointer and a struct per
 * container. */
#define VIEW_BYTES (MASK_CHUNK_ELEMS / MASK_CONTAINER * 48u + 256u)

uint64_t tv_mask_open_bytes(uint64_t n_elems)
{
    const uint64_t n = n_elems / MASK_CHUNK_ELEMS + 1;
    return sizeof(tv_mask) +
           n * (sizeof(struct mask_chunk) + sizeof(unsigned char *) +
                VIEW_BYTES) +
           4096;
}

void tv_mask_close(tv_mask *m)
{
    if (m == NULL)
        return;
    for (size_t i = 0; i < m->n_chunks; i++) {
        if (m->chunks != NULL)
            mask_chunk_close(&m->chunks[i]);
        if (m->copies != NULL)
            tv_free(m->copies[i]);
    }
    tv_free(m->chunks);
    tv_free(m->copies);
    tv_free(m);
}

static enum tv_err mask_open(const struct txn *t, const struct rec_key *k,
                             const struct rec_derived *r, struct tv_error *err,
                             tv_mask **out)
{
    enum tv_err rc = TV_OK;
    tv_mask *m = (tv_mask *)tv_calloc(1, sizeof *m);
    const size_t n = (size_t)derived_chunks(r);
    *out = NULL;
    if (m == NULL)
        goto no_memory;
    m->n_elems = r->n_elems;
    m->chunks = (struct mask_chunk *)tv_calloc(n + 1, sizeof *m->chunks);
    m->copies = (unsigned char **)tv_calloc(n + 1, sizeof *m->copies);
    m->n_chunks = n;
    if (m->chunks == NULL || m->copies == NULL)
        goto no_memory;
    for (size_t i = 0; i < n; i++) {
        struct rec_part p;
        const unsigned char *data = NULL;
        const char *why = NULL;
        TV_TRY(part_open(t, TV_MASK, k, r, i, &p, &data, &m->copies[i], err));
        const enum tv_err seen = mask_chunk_open(
            data, (size_t)p.c.bytes, p.flags, p.c.n_elems, &m->chunks[i], &why);
        if (seen != TV_OK) {
            rc = damaged(t->s, TV_MASK, r->name, why, err);
            goto out;
        }
        m->n_set += m->chunks[i].n_set;
    }
    if (m->n_set != r->n_set) {
        rc = damaged(t->s, TV_MASK, r->name,
                     "its chunks do not add up to what it says", err);
        goto out;
    }
    *out = m;
    m = NULL;
    goto out;
no_memory:
    rc = tv_error_set(err, TV_E_NOMEM, "no memory for a mask");
out:
    tv_mask_close(m);
    return rc;
}

enum tv_err tv_mask_open(tv_read *r, struct tv_hash score, const char *tensor,
                         bool *found, struct tv_error *err, tv_mask **out)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    struct rec_derived rec;
    const struct tv_derived_key key = {TV_MASK, score, tensor};
    *out = NULL;
    TV_TRY(find(&r->t, &key, &k, found, &rec, err));
    if (*found)
        rc = mask_open(&r->t, &k, &rec, err, out);
out:
    return rc;
}

uint64_t tv_mask_set(const tv_mask *m)
{
    return m->n_set;
}

const uint64_t *tv_mask_words(const tv_mask *m, uint64_t start, uint32_t n,
                              uint64_t *scratch)
{
    return mask_chunk_words(&m->chunks[start / MASK_CHUNK_ELEMS],
                            (uint32_t)(start % MASK_CHUNK_ELEMS), n, scratch);
}

uint64_t tv_mask_and(const tv_mask *a, const tv_mask *b)
{
    uint64_t n = 0;
    for (size_t i = 0; i < a->n_chunks && i < b->n_chunks; i++)
        n += mask_chunk_and(&a->chunks[i], &b->chunks[i]);
    return n;
}

void tv_mask_containers(const tv_mask *m, uint64_t n[3])
{
    n[0] = n[1] = n[2] = 0;
    for (size_t i = 0; i < m->n_chunks; i++) {
        uint64_t one[3];
        mask_chunk_types(&m->chunks[i], one);
        for (int k = 0; k < 3; k++)
            n[k] += one[k];
    }
}

/* ---- task vectors ---------------------------------------------------------
 */

struct delta_chunk {
    const uint32_t *before; /* [n_blocks + 1] */
    const unsigned char *values;
    size_t n_blocks;
};

struct tv_delta {
    enum tv_dtype dtype;
    size_t each;
    size_t n_chunks;
    struct delta_chunk *chunks;
    unsigned char **copies;
};

void tv_delta_close(tv_delta *d)
{
    if (d == NULL)
        return;
    for (size_t i = 0; d->copies != NULL && i < d->n_chunks; i++)
        tv_free(d->copies[i]);
    tv_free(d->chunks);
    tv_free(d->copies);
    tv_free(d);
}

static bool delta_chunk_check(const unsigned char *data, uint64_t bytes,
                              uint64_t n_elems, size_t each,
                              struct delta_chunk *c)
{
    c->n_blocks = (size_t)((n_elems + TV_DELTA_BLOCK - 1) / TV_DELTA_BLOCK);
    const size_t table = delta_table_bytes(c->n_blocks);
    if (bytes < table)
        return false;
    c->before = (const uint32_t *)(const void *)data;
    c->values = data + table;
    if (c->before[0] != 0)
        return false;
    for (size_t i = 0; i < c->n_blocks; i++)
        if (c->before[i + 1] < c->before[i] ||
            c->before[i + 1] - c->before[i] > TV_DELTA_BLOCK)
            return false;
    return bytes - table == (uint64_t)c->before[c->n_blocks] * each;
}

static enum tv_err delta_open(const struct txn *t, const struct rec_key *k,
                              const struct rec_derived *r, struct tv_error *err,
                              tv_delta **out)
{
    enum tv_err rc = TV_OK;
    tv_delta *d = (tv_delta *)tv_calloc(1, sizeof *d);
    const size_t n = (size_t)derived_chunks(r);
    uint64_t n_values = 0;
    *out = NULL;
    if (d == NULL)
        goto no_memory;
    d->dtype = r->dtype;
    d->each = tv_dtype_bits(r->dtype) / 8u;
    d->chunks = (struct delta_chunk *)tv_calloc(n + 1, sizeof *d->chunks);
    d->copies = (unsigned char **)tv_calloc(n + 1, sizeof *d->copies);
    d->n_chunks = n;
    if (d->chunks == NULL || d->copies == NULL)
        goto no_memory;
    for (size_t i = 0; i < n; i++) {
        struct rec_part p;
        const unsigned char *data = NULL;
        TV_TRY(part_open(t, TV_DELTA, k, r, i, &p, &data, &d->copies[i], err));
        if (d->each == 0 || r->chunk_elems != DELTA_CHUNK_ELEMS ||
            !delta_chunk_check(data, p.c.bytes, p.c.n_elems, d->each,
                               &d->chunks[i])) {
            rc = damaged(t->s, TV_DELTA, r->name, "its table is wrong", err);
            goto out;
        }
        n_values += d->chunks[i].before[d->chunks[i].n_blocks];
    }
    if (n_values != r->n_set) {
        rc = damaged(t->s, TV_DELTA, r->name,
                     "its chunks do not add up to what it says", err);
        goto out;
    }
    *out = d;
    d = NULL;
    goto out;
no_memory:
    rc = tv_error_set(err, TV_E_NOMEM, "no memory for a task vector");
out:
    tv_delta_close(d);
    return rc;
}

enum tv_err tv_delta_open(tv_read *r, struct tv_hash score, const char *tensor,
                          bool *found, struct tv_error *err, tv_delta **out)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    struct rec_derived rec;
    const struct tv_derived_key key = {TV_DELTA, score, tensor};
    *out = NULL;
    TV_TRY(find(&r->t, &key, &k, found, &rec, err));
    if (*found)
        rc = delta_open(&r->t, &k, &rec, err, out);
out:
    return rc;
}

enum tv_dtype tv_delta_dtype(const tv_delta *d)
{
    return d->dtype;
}

const void *tv_delta_values(const tv_delta *d, uint64_t start, size_t n_elems,
                            size_t *n)
{
    const struct delta_chunk *c = &d->chunks[start / DELTA_CHUNK_ELEMS];
    const size_t block = (size_t)(start % DELTA_CHUNK_ELEMS / TV_DELTA_BLOCK);
    const size_t last = block + (n_elems + TV_DELTA_BLOCK - 1) / TV_DELTA_BLOCK;
    *n = c->before[last] - c->before[block];
    return c->values + (size_t)c->before[block] * d->each;
}

/* ---- statistics -----------------------------------------------------------
 */

/* dst NULL: only the checks. */
static enum tv_err stat_values(const struct txn *t, const struct rec_key *k,
                               const struct rec_derived *r, unsigned char *dst,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const uint64_t n = derived_chunks(r);
    const size_t each = tv_dtype_bits(r->dtype) / 8u;
    unsigned char *copy = NULL;
    for (uint64_t i = 0; i < n; i++) {
        struct rec_part p;
        const unsigned char *data = NULL;
        TV_TRY(part_open(t, TV_STAT, k, r, i, &p, &data, &copy, err));
        if (each == 0 || r->chunk_elems != STAT_CHUNK_ELEMS ||
            p.c.bytes != p.c.n_elems * each) {
            rc = damaged(t->s, TV_STAT, r->name, "a chunk has another size",
                         err);
            goto out;
        }
        if (dst != NULL)
            memcpy(dst + i * STAT_CHUNK_ELEMS * each, data, (size_t)p.c.bytes);
        tv_free(copy);
        copy = NULL;
    }
out:
    tv_free(copy);
    return rc;
}

enum tv_err tv_stat_read(tv_read *r, struct tv_hash score, const char *tensor,
                         enum tv_dtype dtype, uint64_t n_elems, bool *found,
                         uint64_t *n_rows, void *dst, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    struct rec_derived rec;
    const struct tv_derived_key key = {TV_STAT, score, tensor};
    TV_TRY(find(&r->t, &key, &k, found, &rec, err));
    *found = *found && rec.dtype == dtype && rec.n_elems == n_elems;
    if (!*found)
        goto out;
    TV_TRY(stat_values(&r->t, &k, &rec, (unsigned char *)dst, err));
    *n_rows = rec.n_nonfinite;
out:
    return rc;
}

/* What derived_each says of a chunk whose record is gone. */
static const char orphan[] = "it belongs to no record";

/* ---- walking --------------------------------------------------------------
 */

/* Is the entry at a walk a chunk of the item with this key? */
bool derived_is_chunk(const MDB_val *key, const struct rec_key *item)
{
    return item->n > 0 && key->mv_size == item->n + 4 &&
           memcmp(key->mv_data, item->b, item->n) == 0;
}

void derived_key_copy(struct rec_key *k, const MDB_val *key)
{
    k->n = key->mv_size <= sizeof k->b ? key->mv_size : 0;
    memcpy(k->b, key->mv_data, k->n);
}

enum tv_err derived_each(const struct txn *t, enum tv_derived_kind kind,
                         derived_fn fn, void *arg, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key item = {.n = 0};
    bool more = false;
    TV_TRY(walk_begin(&w, t, derived_db(kind), NULL, err));
    for (;;) {
        struct rec_body body;
        struct rec_derived r;
        struct rec_key k;
        const char *why = NULL;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        if (derived_is_chunk(&w.key, &item))
            continue;
        derived_key_copy(&k, &w.key);
        if (!rec_open(REC_DERIVED, w.key.mv_data, w.key.mv_size, w.val.mv_data,
                      w.val.mv_size, &body, &why) ||
            !rec_derived_get(body, &r, &why)) {
            struct rec_part p;
            const char *unused = NULL;
            if (rec_part_get(w.val.mv_data, w.val.mv_size, &p, &unused))
                why = orphan;
            TV_TRY(fn(arg, kind, &k, NULL, why, err));
            continue;
        }
        item = k;
        TV_TRY(fn(arg, kind, &k, &r, NULL, err));
    }
out:
    walk_end(&w);
    return rc;
}

enum tv_err derived_each_kind(const struct txn *t, derived_fn fn, void *arg,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    for (size_t i = 0; i < DERIVED_KINDS; i++)
        TV_TRY(derived_each(t, derived_kinds[i], fn, arg, err));
out:
    return rc;
}

/* ---- listing --------------------------------------------------------------
 */

struct listing {
    const struct txn *t;
    struct tv_derived *items;
    size_t n, cap;
    struct tv_buf names; /* NUL-terminated, one after the other */
    const struct derived_pins *pins;
};

static enum tv_err list_item(void *arg, enum tv_derived_kind kind,
                             const struct rec_key *k,
                             const struct rec_derived *r, const char *why,
                             struct tv_error *err)
{
    struct listing *l = (struct listing *)arg;
    (void)why;
    if (r == NULL || r->state != REC_COMPLETE)
        return TV_OK; /* verify tells of damage, gc drops it */
    if (l->n == l->cap) {
        const size_t cap = l->cap == 0 ? 64 : l->cap * 2;
        struct tv_derived *p =
            (struct tv_derived *)tv_realloc(l->items, cap * sizeof *p);
        if (p == NULL)
            return tv_error_set(err, TV_E_NOMEM, "no memory for a list");
        l->items = p;
        l->cap = cap;
    }
    info_fill(&l->items[l->n], kind, tv_hash_get(k->b), NULL, r);
    l->items[l->n++].pinned = derived_pinned(l->pins, r->id);
    tv_buf_add(&l->names, r->name.s, r->name.n);
    tv_buf_add(&l->names, "", 1);
    return TV_OK;
}

static int list_compare(const void *x, const void *y)
{
    const struct tv_derived *a = (const struct tv_derived *)x;
    const struct tv_derived *b = (const struct tv_derived *)y;
    if (a->group != b->group)
        return a->group < b->group ? -1 : 1;
    if (a->key.kind != b->key.kind)
        return a->key.kind < b->key.kind ? -1 : 1;
    return tv_name_compare(a->key.tensor, b->key.tensor);
}

void tv_derived_list_free(struct tv_derived_list *l)
{
    if (l == NULL)
        return;
    tv_free(l->items);
    tv_free(l->storage);
    tv_free(l);
}

/* Adds the documents of all groups behind the names. */
static enum tv_err add_groups(struct listing *l, size_t at_names,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    size_t *about = (size_t *)tv_calloc(l->n + 1, sizeof *about);
    if (about == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a list");
    const size_t empty = l->names.n_bytes;
    tv_buf_add(&l->names, "", 1);
    for (size_t i = 0; i < l->n; i++) {
        struct rec_group g;
        bool found = false;
        about[i] = empty;
        if (i > 0 && l->items[i].group == l->items[i - 1].group) {
            about[i] = about[i - 1];
            continue;
        }
        TV_TRY(derived_group_get(l->t, l->items[i].group, &found, &g, err));
        if (!found)
            continue;
        about[i] = l->names.n_bytes;
        tv_buf_add(&l->names, g.about.s, g.about.n);
        tv_buf_add(&l->names, "", 1);
    }
    TV_TRY(tv_buf_ok(&l->names, err));
    const char *name = l->names.data + at_names;
    for (size_t i = 0; i < l->n; i++) {
        l->items[i].about = l->names.data + about[i];
        l->items[i].key.tensor = name;
        name += strlen(name) + 1;
    }
out:
    tv_free(about);
    return rc;
}

enum tv_err tv_derived_list(tv_read *r, struct tv_error *err,
                            struct tv_derived_list **out)
{
    enum tv_err rc = TV_OK;
    struct derived_pins pins = {.ids = NULL};
    struct listing l = {.t = &r->t, .pins = &pins};
    struct tv_derived_list *list = NULL;
    *out = NULL;
    tv_buf_init(&l.names, (size_t)1 << 32);
    TV_TRY(derived_pins_read(&r->t, &pins, err));
    TV_TRY(derived_each_kind(&r->t, list_item, &l, err));
    TV_TRY(add_groups(&l, 0, err));
    if (l.n > 0)
        qsort(l.items, l.n, sizeof *l.items, list_compare);
    list = (struct tv_derived_list *)tv_calloc(1, sizeof *list);
    if (list == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "no memory for a list");
        goto out;
    }
    list->items = l.items;
    list->n = l.n;
    list->storage = l.names.data;
    l.items = NULL;
    l.names.data = NULL;
    *out = list;
out:
    derived_pins_free(&pins);
    tv_free(l.items);
    tv_buf_free(&l.names);
    return rc;
}

/* ---- stat, verify ---------------------------------------------------------
 */

static enum tv_err stat_item(void *arg, enum tv_derived_kind kind,
                             const struct rec_key *k,
                             const struct rec_derived *r, const char *why,
                             struct tv_error *err)
{
    struct tv_store_stat *st = (struct tv_store_stat *)arg;
    (void)k;
    (void)why;
    (void)err;
    if (r == NULL)
        return TV_OK;
    const bool complete = r->state == REC_COMPLETE;
    switch (kind) {
    case TV_MASK:
        st->masks += r->bytes;
        st->n_masks += complete;
        break;
    case TV_DELTA:
        st->task_vectors += r->bytes;
        st->n_task_vectors += complete;
        break;
    case TV_STAT:
        st->statistics += r->bytes;
        st->n_statistics += complete;
        break;
    }
    return TV_OK;
}

enum tv_err derived_stat(const struct txn *t, struct tv_store_stat *out,
                         struct tv_error *err)
{
    return derived_each_kind(t, stat_item, out, err);
}

struct verifying {
    const struct txn *t;
    derived_problem problem;
    void *arg;
};

static enum tv_err verify_item(void *arg, enum tv_derived_kind kind,
                               const struct rec_key *k,
                               const struct rec_derived *r, const char *why,
                               struct tv_error *err)
{
    struct verifying *v = (struct verifying *)arg;
    enum tv_err rc = TV_OK;
    tv_mask *m = NULL;
    tv_delta *d = NULL;
    char name[TV_NAME_MAX + 1] = "";
    char what[160];
    if (r == NULL && why == orphan)
        return TV_OK; /* no damage of its own; gc drops it */
    if (r == NULL) {
        (void)snprintf(what, sizeof what, "the record of a %s is damaged: %s",
                       derived_word(kind), why);
        v->problem(v->arg, "", what);
        return TV_OK;
    }
    if (r->state != REC_COMPLETE)
        return TV_OK; /* of a killed writer: gc drops it */
    memcpy(name, r->name.s, r->name.n);
    name[r->name.n] = '\0';
    struct rec_key want;
    key_derived(&want, tv_hash_get(k->b), name);
    if (want.n != k->n || memcmp(want.b, k->b, k->n) != 0)
        v->problem(v->arg, name, "its mask is filed under another tensor");
    switch (kind) {
    case TV_MASK:
        rc = mask_open(v->t, k, r, err, &m);
        break;
    case TV_DELTA:
        rc = delta_open(v->t, k, r, err, &d);
        break;
    case TV_STAT:
        rc = stat_values(v->t, k, r, NULL, err);
        break;
    }
    if (rc == TV_E_CORRUPT) {
        v->problem(v->arg, name, err->msg);
        tv_error_clear(err);
        rc = TV_OK;
    }
    tv_mask_close(m);
    tv_delta_close(d);
    return rc;
}

enum tv_err derived_verify(const struct txn *t, derived_problem problem,
                           void *arg, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct verifying v = {.t = t, .problem = problem, .arg = arg};
    struct tv_error own; /* problems are read from it */
    static const struct {
        enum db db;
        enum rec_type type;
    } small[] = {
        {DB_GROUP, REC_GROUP}, {DB_USE, REC_USE}, {DB_CHARGE, REC_CHARGE}};
    struct walk w = {0};
    tv_error_clear(&own);
    TV_TRY(derived_each_kind(t, verify_item, &v, &own));
    for (size_t i = 0; i < 3; i++) {
        bool more = true;
        TV_TRY(walk_begin(&w, t, small[i].db, NULL, &own));
        for (;;) {
            struct rec_body body;
            TV_TRY(walk_next(&w, &more, &own));
            if (!more)
                break;
            if (walk_rec(&w, small[i].type, &body, &own) != TV_OK) {
                problem(arg, "", own.msg);
                tv_error_clear(&own);
            }
        }
        walk_end(&w);
    }
out:
    walk_end(&w);
    if (rc != TV_OK && err != NULL)
        *err = own;
    return rc;
}
