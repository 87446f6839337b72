/* SPDX-License-Identifier: Apache-2.0 */
/*
 * derive.c - storing masks, task vectors and statistics.
 *
 * Items are small change: nothing is lost without them. So what finds no room
 * is left out, and a full map in the middle only ends the batch. Every commit
 * leaves whole items or one unfinished one that belongs to a living session.
 */
#include "derived_priv.h"

#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

struct writing {
    tv_store *s;
    struct tv_derived_new *items;
    uint64_t dirty_max, keep_pages;
    tv_batch *b;
    struct space space; /* of the batch, what is left of it */
    uint64_t growth;
    size_t first;    /* item of this batch that is not committed yet */
    size_t at;       /* item at hand */
    uint64_t *pages; /* [cap_pages] of the item's chunks */
    size_t cap_pages;
};

static void drop_batch(struct writing *w)
{
    tv_batch_abort(w->b);
    w->b = NULL;
    space_free(&w->space);
    w->growth = 0;
}

/* Commits; what was put so far counts as stored. */
static enum tv_err end_batch(struct writing *w, size_t done,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = w->b;
    w->b = NULL;
    space_free(&w->space);
    w->growth = 0;
    if (b != NULL)
        rc = tv_batch_commit(b, err);
    for (size_t i = w->first; rc == TV_OK && i < done; i++)
        w->items[i].stored = !w->items[i].left_out;
    w->first = done;
    return rc;
}

static uint64_t chunk_elems_of(const struct tv_derived_new *p)
{
    switch (p->key.kind) {
    case TV_MASK:
        return MASK_CHUNK_ELEMS;
    case TV_DELTA:
        return DELTA_CHUNK_ELEMS;
    case TV_STAT:
        break;
    }
    return STAT_CHUNK_ELEMS;
}

static uint64_t values_in(const struct tv_derived_new *p, uint64_t chunk,
                          size_t *n_blocks)
{
    const uint64_t first = chunk * (DELTA_CHUNK_ELEMS / TV_DELTA_BLOCK);
    const uint64_t all = (p->n_elems + TV_DELTA_BLOCK - 1) / TV_DELTA_BLOCK;
    const uint64_t left = all - first;
    const uint64_t most = DELTA_CHUNK_ELEMS / TV_DELTA_BLOCK;
    *n_blocks = (size_t)(left < most ? left : most);
    return p->before[first + *n_blocks] - p->before[first];
}

/* Most bytes of a chunk's payload. */
static uint64_t chunk_bound(const struct tv_derived_new *p, uint64_t i)
{
    const uint64_t each = chunk_elems_of(p);
    const uint64_t left = p->n_elems - i * each;
    const uint64_t n = left < each ? left : each;
    if (p->key.kind == TV_MASK) {
        const uint64_t plain = (n + 63) / 64 * 8;
        return plain + plain / 100;
    }
    if (p->key.kind == TV_STAT)
        return n * (tv_dtype_bits(p->dtype) / 8);
    size_t n_blocks = 0;
    const uint64_t values = values_in(p, i, &n_blocks);
    return delta_table_bytes(n_blocks) + values * (tv_dtype_bits(p->dtype) / 8);
}

static uint64_t n_chunks_of(const struct tv_derived_new *p)
{
    const uint64_t each = chunk_elems_of(p);
    return p->n_elems / each + (p->n_elems % each != 0);
}

static enum tv_err count_pages(struct writing *w, uint64_t from, size_t *n,
                               struct tv_error *err)
{
    const struct tv_derived_new *p = &w->items[w->at];
    const uint64_t all = n_chunks_of(p);
    *n = (size_t)(all - from);
    if (*n > w->cap_pages) {
        uint64_t *more = (uint64_t *)tv_realloc(w->pages, *n * sizeof *more);
        if (more == NULL)
            return tv_error_set(err, TV_E_NOMEM, "no memory for a mask");
        w->pages = more;
        w->cap_pages = *n;
    }
    for (size_t i = 0; i < *n; i++)
        w->pages[i] = value_pages(chunk_bound(p, from + i), w->s->page_bytes);
    return TV_OK;
}

/* Has the batch at hand room for pages[n] more? */
static bool fits_batch(struct writing *w, size_t n)
{
    const uint64_t limit = quota_pages(w->b);
    if (limit == UINT64_MAX)
        return true;
    const uint64_t growth = space_growth(&w->space, w->pages, n, 4);
    w->space.n_free -= w->space.n_free < 4 ? w->space.n_free : 4;
    w->growth += growth;
    const uint64_t keep =
        w->keep_pages > w->space.n_free ? w->keep_pages - w->space.n_free : 0;
    return w->growth + keep == 0 || w->space.end + w->growth + keep <= limit;
}

/* A batch with room for the item from chunk `from` on; w->b NULL when there is
 * none. */
static enum tv_err need_batch(struct writing *w, uint64_t from,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    size_t n = 0;
    TV_TRY(count_pages(w, from, &n, err));
    if (w->b != NULL && fits_batch(w, n))
        goto out;
    if (w->b != NULL)
        TV_TRY(end_batch(w, w->at, err));
    w->first = w->at;
    rc = derived_batch(w->s, w->pages, n, 4, w->keep_pages, &w->b, &w->space,
                       err);
out:
    return rc;
}

/* ---- chunks ---------------------------------------------------------------
 */

static enum tv_err put_part(struct writing *w, const struct rec_key *item,
                            struct rec_part *p, const void *head, size_t n_head,
                            const void *body, size_t n_body, uint64_t *bytes,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    void *at = NULL;
    const size_t total = TV_CHUNK_HEADER + n_head + n_body;
    key_derived_chunk(&k, item, p->c.number);
    TV_TRY(db_reserve(w->b, derived_db(w->items[w->at].key.kind), &k, total,
                      &at, err));
    unsigned char *to = (unsigned char *)at + TV_CHUNK_HEADER;
    if (n_head > 0)
        memcpy(to, head, n_head);
    if (n_body > 0)
        memcpy(to + n_head, body, n_body);
    p->c.bytes = n_head + n_body;
    p->c.payload_hash = tv_hash64(to, n_head + n_body);
    rec_part_put(at, p);
    w->b->dirty += total;
    *bytes += total;
out:
    return rc;
}

static enum tv_err put_mask_chunk(struct writing *w, const struct rec_key *k,
                                  struct rec_derived *r, uint64_t i,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_derived_new *p = &w->items[w->at];
    const uint64_t first = i * MASK_CHUNK_ELEMS;
    const uint64_t left = p->n_elems - first;
    const uint64_t n = left < MASK_CHUNK_ELEMS ? left : MASK_CHUNK_ELEMS;
    struct mask_bytes m = {.data = NULL};
    TV_TRY(mask_encode(p->words + first / 64, n, &m, err));
    struct rec_part part = {.kind = TV_CHUNK_MASK,
                            .flags = m.flags,
                            .c = {.number = (uint32_t)i, .n_elems = n}};
    TV_TRY(put_part(w, k, &part, NULL, 0, m.data, m.n, &r->bytes, err));
    r->n_set += m.n_set;
out:
    mask_bytes_free(&m);
    return rc;
}

static enum tv_err put_delta_chunk(struct writing *w, const struct rec_key *k,
                                   struct rec_derived *r, uint64_t i,
                                   struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_derived_new *p = &w->items[w->at];
    const uint64_t first = i * (DELTA_CHUNK_ELEMS / TV_DELTA_BLOCK);
    const size_t each = tv_dtype_bits(p->dtype) / 8u;
    unsigned char table[(DELTA_CHUNK_ELEMS / TV_DELTA_BLOCK + 17) * 4] = {0};
    size_t n_blocks = 0;
    const uint64_t n_values = values_in(p, i, &n_blocks);
    const uint64_t left = p->n_elems - i * DELTA_CHUNK_ELEMS;
    for (size_t b = 0; b <= n_blocks; b++)
        tv_put_le32(table + 4 * b,
                    (uint32_t)(p->before[first + b] - p->before[first]));
    struct rec_part part = {
        .kind = TV_CHUNK_DELTA,
        .c = {.dtype = p->dtype,
              .number = (uint32_t)i,
              .n_elems = left < DELTA_CHUNK_ELEMS ? left : DELTA_CHUNK_ELEMS}};
    TV_TRY(put_part(w, k, &part, table, delta_table_bytes(n_blocks),
                    (const unsigned char *)p->values + p->before[first] * each,
                    (size_t)(n_values * each), &r->bytes, err));
    r->n_set += n_values;
out:
    return rc;
}

static enum tv_err put_stat_chunk(struct writing *w, const struct rec_key *k,
                                  struct rec_derived *r, uint64_t i,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_derived_new *p = &w->items[w->at];
    const uint64_t first = i * STAT_CHUNK_ELEMS;
    const uint64_t left = p->n_elems - first;
    const uint64_t n = left < STAT_CHUNK_ELEMS ? left : STAT_CHUNK_ELEMS;
    const size_t each = tv_dtype_bits(p->dtype) / 8u;
    struct rec_part part = {
        .kind = TV_CHUNK_STAT,
        .c = {.dtype = p->dtype, .number = (uint32_t)i, .n_elems = n}};
    TV_TRY(put_part(w, k, &part, NULL, 0,
                    (const unsigned char *)p->values + first * each,
                    (size_t)(n * each), &r->bytes, err));
    r->n_set += n;
out:
    return rc;
}

static enum tv_err put_chunk(struct writing *w, const struct rec_key *k,
                             struct rec_derived *r, uint64_t i,
                             struct tv_error *err)
{
    switch (w->items[w->at].key.kind) {
    case TV_MASK:
        return put_mask_chunk(w, k, r, i, err);
    case TV_DELTA:
        return put_delta_chunk(w, k, r, i, err);
    case TV_STAT:
        break;
    }
    return put_stat_chunk(w, k, r, i, err);
}

/* ---- items ----------------------------------------------------------------
 */

/* What is there already: *skip when it stays, *stored when it will do. */
static enum tv_err meet_old(struct writing *w, const struct rec_key *k,
                            bool *skip, bool *stored, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_derived_new *p = &w->items[w->at];
    struct rec_derived r;
    bool found = false;
    *skip = *stored = false;
    rc = derived_get(&w->b->t, p->key.kind, k, &found, &r, err);
    if (rc == TV_E_CORRUPT) { /* gc's business */
        tv_error_clear(err);
        *skip = true;
        return TV_OK;
    }
    TV_TRY(rc);
    if (!found)
        goto out;
    const bool same = r.name.n == strlen(p->key.tensor) &&
                      memcmp(r.name.s, p->key.tensor, r.name.n) == 0;
    const bool live = r.state != REC_COMPLETE && r.session != w->s->session &&
                      session_alive(w->s, r.session);
    *stored = same && r.state == REC_COMPLETE &&
              (!p->has_sums || r.has_sums || p->key.kind != TV_MASK);
    if (*stored && p->key.kind == TV_MASK && r.n_elems > 0) {
        struct rec_key first;
        struct rec_part part;
        MDB_val val = {0, NULL};
        const char *why = NULL;
        bool there = false;
        key_derived_chunk(&first, k, 0);
        TV_TRY(db_get(&w->b->t, DB_MASK, &first, &there, &val, err));
        *stored = there &&
                  rec_part_get(val.mv_data, val.mv_size, &part, &why) &&
                  mask_flags_known(part.flags);
    }
    *skip = !same || live || *stored;
    if (!*skip)
        rc = derived_drop(w->b, p->key.kind, k, &r, err);
out:
    return rc;
}

/* Begins a batch in the middle of an item and sees that it is still ours. */
static enum tv_err go_on(struct writing *w, const struct rec_key *k,
                         uint64_t from, bool *lost, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_derived now;
    bool found = false;
    *lost = true;
    TV_TRY(need_batch(w, from, err));
    if (w->b == NULL)
        goto out;
    TV_TRY(
        derived_get(&w->b->t, w->items[w->at].key.kind, k, &found, &now, err));
    *lost = !found || now.state != REC_PARTIAL || now.session != w->s->session;
out:
    return rc;
}

/* Drops our unfinished item again, as far as it goes. */
static void give_up(struct writing *w, const struct rec_key *k)
{
    const enum tv_derived_kind kind = w->items[w->at].key.kind;
    struct rec_derived r;
    bool found = false;
    drop_batch(w);
    if (tv_batch_begin(w->s, true, NULL, &w->b) != TV_OK)
        return;
    if (derived_get(&w->b->t, kind, k, &found, &r, NULL) == TV_OK && found &&
        r.state == REC_PARTIAL && r.session == w->s->session &&
        derived_drop(w->b, kind, k, &r, NULL) == TV_OK) {
        tv_batch *b = w->b;
        w->b = NULL;
        if (tv_batch_commit(b, NULL) != TV_OK)
            return; /* gc drops it when this process is gone */
    }
    drop_batch(w);
}

static enum tv_err put_item(struct writing *w, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_derived_new *p = &w->items[w->at];
    const uint64_t n = n_chunks_of(p);
    struct rec_key k;
    bool skip = false, stored = false, lost = false;
    struct rec_derived r = {
        .state = REC_PARTIAL,
        .dtype = p->key.kind == TV_MASK ? TV_DTYPE_NONE : p->dtype,
        .has_sums = p->has_sums,
        .session = w->s->session,
        .n_elems = p->n_elems,
        .chunk_elems = chunk_elems_of(p),
        /* one field of the record, for what each kind has to say */
        .n_nonfinite = p->key.kind == TV_STAT ? p->n_rows : p->n_nonfinite,
        .sum_all = p->sum_all,
        .sum_kept = p->sum_kept,
        .name = {.s = p->key.tensor, .n = strlen(p->key.tensor)}};
    key_derived(&k, p->key.score, p->key.tensor);
    TV_TRY(need_batch(w, 0, err));
    if (w->b == NULL) {
        p->left_out = true;
        goto out;
    }
    TV_TRY(meet_old(w, &k, &skip, &stored, err));
    if (skip) {
        if (!stored)
            p->left_out = true;
        goto out;
    }
    TV_TRY(next_id(w->b, &r.id, err));
    TV_TRY(derived_group_join(w->b, p->about, &r.group, err));
    TV_TRY(derived_touch(w->b, p->key.kind, &k, &r, err));
    for (uint64_t i = 0; i < n; i++) {
        if (w->b->dirty > 0 && w->b->dirty + chunk_bound(p, i) > w->dirty_max) {
            TV_TRY(derived_put(w->b, p->key.kind, &k, &r, err));
            TV_TRY(end_batch(w, w->at, err));
            TV_TRY(go_on(w, &k, i, &lost, err));
            if (lost) {
                give_up(w, &k);
                p->left_out = true;
                goto out;
            }
        }
        TV_TRY(put_chunk(w, &k, &r, i, err));
    }
    r.state = REC_COMPLETE;
    TV_TRY(derived_put(w->b, p->key.kind, &k, &r, err));
    w->b->dirty += TV_CHUNK_HEADER;
out:
    return rc;
}

enum tv_err tv_derived_store(tv_store *s, struct tv_derived_new *items,
                             size_t n, uint64_t dirty_bytes, uint64_t keep_free,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct writing w = {.s = s,
                        .items = items,
                        .dirty_max = dirty_bytes < s->dirty_max ? dirty_bytes
                                                                : s->dirty_max,
                        .keep_pages = keep_free / s->page_bytes};
    for (size_t i = 0; i < n; i++)
        items[i].stored = items[i].left_out = false;
    if (s->read_only || !session_hold(s))
        return TV_OK;
    for (w.at = 0; w.at < n; w.at++) {
        rc = put_item(&w, err);
        if (rc != TV_OK) {
            struct rec_key k;
            key_derived(&k, items[w.at].key.score, items[w.at].key.tensor);
            give_up(&w, &k);
            break;
        }
        if (w.b != NULL && w.b->dirty > w.dirty_max)
            TV_TRY(end_batch(&w, w.at + 1, err));
    }
    if (rc == TV_OK)
        rc = end_batch(&w, n, err);
out:
    drop_batch(&w);
    tv_free(w.pages);
    if (rc == TV_E_NOSPACE) { /* LMDB's own fence: left out */
        tv_error_clear(err);
        rc = TV_OK;
    }
    return rc;
}
