/* SPDX-License-Identifier: Apache-2.0 */
/*
 * evict.c - ticks, groups, and making room by dropping derived data.
 *
 * The file must not grow past the quota, and LMDB grows it whenever it finds no
 * run of free pages that is long enough for a value. So before anything is put,
 * the growth is computed from LMDB's own list of free pages: those that no
 * reader can see any more, joined to runs, used up first fit like LMDB does.
 * Pages freed by one commit can be used by the commit after the next; so
 * eviction is followed by a commit that changes nothing but a counter.
 */
#include "derived_priv.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

#define EVICT_CHUNKS  256u
#define DISK_LEAST    ((uint64_t)64 << 20)
#define IN_LEAF_BYTES 1900u /* larger values get pages of their own */

uint64_t value_pages(uint64_t bytes, size_t page_bytes)
{
    const uint64_t total = bytes + TV_CHUNK_HEADER;
    if (total < IN_LEAF_BYTES)
        return 1;
    return (total + 16 + page_bytes - 1) / page_bytes;
}

/* ---- ticks ----------------------------------------------------------------
 */

enum tv_err next_tick(tv_batch *b, uint64_t *tick, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    struct rec_body body;
    struct tv_buf buf;
    bool found = false;
    const char *why = NULL;
    uint64_t v = 0;
    key_str(&k, META_TICK);
    TV_TRY(db_get_rec(&b->t, DB_META, REC_NUMBER, &k, &found, &body,
                      "the tick counter", err));
    if (found && !rec_number_get(body, &v, &why)) {
        rc = rec_damaged(b->t.s, "the tick counter", why, err);
        goto out;
    }
    rec_begin(&buf);
    rec_number_put(&buf, v + 1);
    TV_TRY(db_put_rec(b, DB_META, REC_NUMBER, &k, &buf, err));
    *tick = v + 1;
out:
    return rc;
}

enum tv_err derived_touch(tv_batch *b, enum tv_derived_kind kind,
                          const struct rec_key *k, struct rec_derived *r,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key use;
    struct tv_buf buf;
    const struct rec_use u = {.kind = (uint8_t)kind, .item = *k};
    if (r->used != 0) {
        key_id(&use, r->used);
        TV_TRY(db_del(b, DB_USE, &use, NULL, err));
    }
    TV_TRY(next_tick(b, &r->used, err));
    if (r->created == 0)
        r->created = r->used;
    key_id(&use, r->used);
    rec_begin(&buf);
    rec_use_put(&buf, &u);
    TV_TRY(db_put_rec(b, DB_USE, REC_USE, &use, &buf, err));
    rc = derived_put(b, kind, k, r, err);
out:
    return rc;
}

/* ---- groups ---------------------------------------------------------------
 */

enum tv_err derived_group_get(const struct txn *t, uint64_t id, bool *found,
                              struct rec_group *g, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    struct rec_body body;
    const char *why = NULL;
    key_id(&k, id);
    TV_TRY(db_get_rec(t, DB_GROUP, REC_GROUP, &k, found, &body,
                      "the description of derived data", err));
    if (*found && !rec_group_get(body, g, &why))
        rc = rec_damaged(t->s, "the description of derived data", why, err);
out:
    return rc;
}

enum tv_err derived_group_put(tv_batch *b, uint64_t id, const char *about,
                              size_t n, uint64_t n_items, struct tv_error *err)
{
    struct rec_key k;
    struct tv_buf buf;
    const struct rec_group g = {.n_items = n_items,
                                .about = {.s = about, .n = n}};
    key_id(&k, id);
    rec_begin(&buf);
    rec_group_put(&buf, &g);
    return db_put_rec(b, DB_GROUP, REC_GROUP, &k, &buf, err);
}

enum tv_err derived_group_join(tv_batch *b, const char *about, uint64_t *id,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_group g = {.n_items = 0};
    const size_t n = strlen(about);
    bool found = true;
    uint64_t at = tv_hash64(about, n);
    /* Another document with this hash: the next number. */
    for (;; at++) {
        TV_TRY(derived_group_get(&b->t, at, &found, &g, err));
        if (!found || (g.about.n == n && memcmp(g.about.s, about, n) == 0))
            break;
    }
    TV_TRY(derived_group_put(b, at, about, n, found ? g.n_items + 1 : 1, err));
    *id = at;
out:
    return rc;
}

static enum tv_err group_leave(tv_batch *b, uint64_t id, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_group g;
    struct rec_key k;
    bool found = false;
    char *about = NULL;
    rc = derived_group_get(&b->t, id, &found, &g, err);
    if (rc == TV_E_CORRUPT) { /* gc makes it right */
        tv_error_clear(err);
        return TV_OK;
    }
    TV_TRY(rc);
    if (!found)
        goto out;
    if (g.n_items <= 1) {
        key_id(&k, id);
        rc = db_del(b, DB_GROUP, &k, NULL, err);
        goto out;
    }
    about = tv_strndup(g.about.s, g.about.n);
    if (about == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "no memory for a description");
        goto out;
    }
    rc = derived_group_put(b, id, about, strlen(about), g.n_items - 1, err);
out:
    tv_free(about);
    return rc;
}

/* ---- dropping -------------------------------------------------------------
 */

enum tv_err derived_drop_one(tv_batch *b, enum tv_derived_kind kind,
                             const struct rec_key *k,
                             const struct rec_derived *r, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key key;
    const uint64_t n = derived_chunks(r);
    for (uint64_t i = 0; i < n; i++) {
        key_derived_chunk(&key, k, (uint32_t)i);
        TV_TRY(db_del(b, derived_db(kind), &key, NULL, err));
    }
    key_id(&key, r->used);
    TV_TRY(db_del(b, DB_USE, &key, NULL, err));
    TV_TRY(group_leave(b, r->group, err));
    rc = db_del(b, derived_db(kind), k, NULL, err);
out:
    return rc;
}

enum tv_err derived_drop(tv_batch *b, enum tv_derived_kind kind,
                         const struct rec_key *k, const struct rec_derived *r,
                         struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_derived delta;
    bool found = false;
    if (kind == TV_MASK) {
        /* Without its mask a task vector is noise. */
        rc = derived_get(&b->t, TV_DELTA, k, &found, &delta, err);
        if (rc == TV_E_CORRUPT)
            tv_error_clear(err);
        else
            TV_TRY(rc);
        if (found)
            TV_TRY(derived_drop_one(b, TV_DELTA, k, &delta, err));
    }
    rc = derived_drop_one(b, kind, k, r, err);
out:
    return rc;
}

/* ---- eviction -------------------------------------------------------------
 */

struct evict {
    uint64_t pages_wanted, pages_freed; /* roughly */
    uint64_t chunks;                    /* dropped in this batch */
    uint64_t n_items;
    bool spare_own; /* what this handle has stored stays */
    bool all;
};

static bool may_go(const tv_store *s, const struct evict *e,
                   const struct derived_pins *pins, const struct rec_derived *r)
{
    if (derived_pinned(pins, r->id))
        return false;
    if (r->state != REC_COMPLETE)
        return r->session != s->session && !session_alive(s, r->session);
    return !e->spare_own || r->session != s->session;
}

/* The next item in the order of last use that may go; entries of `use` that
 * point to nothing are dropped on the way. */
static enum tv_err next_victim(tv_batch *b, const struct evict *e,
                               const struct derived_pins *pins, uint64_t *after,
                               struct rec_use *u, struct rec_derived *r,
                               bool *found, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    bool more = false;
    *found = false;
    while (!*found) {
        struct rec_body body;
        const char *why = NULL;
        bool there = false;
        uint64_t tick = 0;
        /* Begun again each time: the batch may have deleted in between. */
        TV_TRY(walk_begin(&w, &b->t, DB_USE, NULL, err));
        do {
            TV_TRY(walk_next(&w, &more, err));
            tick = more ? key_get_id(&w.key, 0) : 0;
        } while (more && tick <= *after);
        if (!more)
            break;
        *after = tick;
        if (!rec_open(REC_USE, w.key.mv_data, w.key.mv_size, w.val.mv_data,
                      w.val.mv_size, &body, &why) ||
            !rec_use_get(body, u, &why)) {
            walk_end(&w);
            continue;
        }
        walk_end(&w);
        if (!derived_kind_known(u->kind))
            continue;
        const enum tv_derived_kind kind = (enum tv_derived_kind)u->kind;
        rc = derived_get(&b->t, kind, &u->item, &there, r, err);
        if (rc == TV_E_CORRUPT) {
            tv_error_clear(err);
            rc = TV_OK;
            continue;
        }
        TV_TRY(rc);
        if (!there || r->used != tick)
            continue;
        struct rec_derived delta;
        if (kind == TV_MASK) { /* it takes its task vector along */
            TV_TRY(derived_get(&b->t, TV_DELTA, &u->item, &there, &delta, err));
            if (there && !may_go(b->t.s, e, pins, &delta))
                continue;
        }
        *found = may_go(b->t.s, e, pins, r);
    }
out:
    walk_end(&w);
    return rc;
}

static enum tv_err evict_some(tv_batch *b, struct evict *e,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct derived_pins pins = {.ids = NULL};
    uint64_t after = 0;
    TV_TRY(derived_pins_read(&b->t, &pins, err));
    e->chunks = 0;
    while ((e->all || e->pages_freed < e->pages_wanted) &&
           e->chunks < EVICT_CHUNKS) {
        struct rec_use u;
        struct rec_derived r;
        bool found = false;
        TV_TRY(next_victim(b, e, &pins, &after, &u, &r, &found, err));
        if (!found)
            break;
        TV_TRY(derived_drop(b, (enum tv_derived_kind)u.kind, &u.item, &r, err));
        e->pages_freed += r.bytes / b->t.s->page_bytes + 1;
        e->chunks += derived_chunks(&r) + 1;
        e->n_items++;
    }
out:
    derived_pins_free(&pins);
    return batch_result(b, rc);
}

/* Room of a batch that has just begun, before it has changed anything. */
static enum tv_err read_space(tv_batch *b, struct space *out,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    MDB_txn *reader = NULL;
    TV_TRY(txn_begin(b->t.s, MDB_RDONLY, &reader, err));
    rc = space_runs(b->t.s, reader, false, out, err);
out:
    if (reader != NULL) {
        tv_lmdb()->txn_abort(reader);
        atomic_fetch_sub(&b->t.s->n_txns, 1);
    }
    return rc;
}

struct want { /* what shall fit */
    const uint64_t *pages;
    size_t n;
    uint64_t n_single, keep;
    uint64_t spare; /* of keep: what can be done without */
};

/* How many of so many missing pages there must be. */
static uint64_t least(const struct want *w, uint64_t pages)
{
    return pages > w->spare ? pages - w->spare : 0;
}

/* By how many pages it does not fit; when it does, takes it out of the space.
 */
static uint64_t shortage(const tv_batch *b, struct space *sp,
                         const struct want *w)
{
    const uint64_t limit = quota_pages(b);
    if (limit == UINT64_MAX)
        return 0;
    const uint64_t growth =
        space_growth(sp, w->pages, w->n, w->n_single + TREE_PAGES);
    const uint64_t singles = w->n_single + TREE_PAGES;
    const uint64_t lost = singles + (w->keep > 0 ? space_loss(sp) : 0);
    const uint64_t left = sp->n_free > lost ? sp->n_free - lost : 0;
    /* Pages past the limit, of a quota that was lowered, are never used. */
    const uint64_t over = sp->end > limit ? sp->end - limit : 0;
    const uint64_t keep = w->keep + over > left ? w->keep + over - left : 0;
    const uint64_t may_grow = limit > sp->end ? limit - sp->end : 0;
    sp->end += growth;
    sp->n_free = left;
    return growth + keep > may_grow ? growth + keep - may_grow : 0;
}

static bool disk_has(const tv_store *s, const struct want *w)
{
    uint64_t left = 0, pages = w->n_single + w->keep;
    for (size_t i = 0; i < w->n; i++)
        pages += w->pages[i];
    return tv_disk_free(s->path, &left, NULL) == TV_OK && left > DISK_LEAST &&
           (left - DISK_LEAST) / s->page_bytes > pages;
}

/* Commits a counter, so that pages freed before become usable. */
static enum tv_err bump(tv_store *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    uint64_t tick = 0;
    TV_TRY(tv_batch_begin(s, true, err, &b));
    TV_TRY(next_tick(b, &tick, err));
    rc = tv_batch_commit(b, err);
    b = NULL;
out:
    tv_batch_abort(b);
    return rc;
}

/* Pages that eviction could give back, at most. */
struct reach {
    const tv_store *s;
    const struct evict *e;
    const struct derived_pins *pins;
    uint64_t pages;
};

static enum tv_err add_reach(void *arg, enum tv_derived_kind kind,
                             const struct rec_key *k,
                             const struct rec_derived *r, const char *why,
                             struct tv_error *err)
{
    struct reach *a = (struct reach *)arg;
    (void)kind;
    (void)k;
    (void)why;
    (void)err;
    /* A last page, a header and entries of the tree for every chunk. */
    if (r != NULL && may_go(a->s, a->e, a->pins, r))
        a->pages += r->bytes / a->s->page_bytes + 2 * (derived_chunks(r) + 1);
    return TV_OK;
}

/* May eviction do, when so many pages are missing? What cannot help is not
 * dropped. Of rows nobody can tell: gaps that close make longer ones. */
static enum tv_err can_do(tv_batch *b, const struct evict *e,
                          const struct want *w, uint64_t more, bool *yes,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct derived_pins pins = {.ids = NULL};
    struct reach a = {.s = b->t.s, .e = e, .pins = &pins, .pages = more};
    *yes = true;
    if (w->n > 0)
        return TV_OK;
    TV_TRY(derived_pins_read(&b->t, &pins, err));
    TV_TRY(derived_each_kind(&b->t, add_reach, &a, err));
    *yes = a.pages >= least(w, e->pages_wanted);
out:
    derived_pins_free(&pins);
    return rc;
}

/* Begins a batch in which it fits; *missing pages when there is none. */
static enum tv_err make_room(tv_store *s, const struct want *w, bool spare_own,
                             tv_batch **out, struct space *space,
                             uint64_t *missing, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    struct space sp = {.runs = NULL};
    bool dry = false; /* nothing left to evict */
    *out = NULL;
    *missing = 0;
    for (int bumps = 0;;) {
        struct evict e = {.spare_own = spare_own};
        TV_TRY(tv_batch_begin(s, true, err, &b));
        TV_TRY(read_space(b, &sp, err));
        const uint64_t later = sp.later, lost = space_loss(&sp);
        e.pages_wanted = shortage(b, &sp, w);
        if (e.pages_wanted == 0) {
            *out = b;
            b = NULL;
            *space = sp;
            sp.runs = NULL;
            goto out;
        }
        space_free(&sp);
        *missing = least(w, e.pages_wanted);
        if (dry || later >= e.pages_wanted) {
            if (later == 0 || bumps == 3)
                break; /* readers hold what is free already */
            /* Freed, but maybe by the last commit only. */
            tv_batch_abort(b);
            b = NULL;
            TV_TRY(bump(s, err));
            bumps++;
            continue;
        }
        bool can = true;
        TV_TRY(can_do(b, &e, w, lost + later, &can, err));
        if (!can)
            break;
        TV_TRY(evict_some(b, &e, err));
        if (e.n_items == 0) {
            dry = true;
            tv_batch_abort(b);
            b = NULL;
            continue;
        }
        rc = tv_batch_commit(b, err);
        b = NULL;
        TV_TRY(rc);
        bumps = 0;
    }
out:
    space_free(&sp);
    tv_batch_abort(b);
    return rc;
}

enum tv_err derived_batch(tv_store *s, const uint64_t *pages, size_t n,
                          uint64_t n_single, uint64_t keep_pages,
                          tv_batch **out, struct space *space,
                          struct tv_error *err)
{
    const struct want w = {
        .pages = pages, .n = n, .n_single = n_single, .keep = keep_pages};
    uint64_t missing = 0;
    *out = NULL;
    if (!disk_has(s, &w))
        return TV_OK;
    return make_room(s, &w, true, out, space, &missing, err);
}

/* ---- the public side ------------------------------------------------------
 */

struct adding {
    const struct derived_pins *pins;
    struct tv_derived_room *out;
    const tv_store *s;
    uint64_t pages; /* that eviction frees, at least */
};

static enum tv_err add_room(void *arg, enum tv_derived_kind kind,
                            const struct rec_key *k,
                            const struct rec_derived *r, const char *why,
                            struct tv_error *err)
{
    struct adding *a = (struct adding *)arg;
    (void)kind;
    (void)k;
    (void)why;
    (void)err;
    if (r == NULL)
        return TV_OK;
    const struct evict e = {.all = true};
    if (!may_go(a->s, &e, a->pins, r)) {
        a->out->pinned += r->bytes;
        return TV_OK;
    }
    a->out->evictable += r->bytes;
    /* Of several chunks, and of those that share pages, at least. */
    a->pages += derived_chunks(r) == 1 && r->bytes >= IN_LEAF_BYTES
                    ? value_pages(r->bytes - TV_CHUNK_HEADER, a->s->page_bytes)
                    : r->bytes / a->s->page_bytes;
    return TV_OK;
}

/* The counterpart of shortage(): the limit, less what stays. */
static enum tv_err user_room(const struct txn *t, uint64_t gone, uint64_t dead,
                             uint64_t *bytes, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t page_bytes = t->s->page_bytes;
    uint64_t quota = 0, bound = 0, end = 0, unused = 0;
    struct space sp = {.runs = NULL};
    *bytes = UINT64_MAX;
    TV_TRY(quota_bound(t, &quota, &bound, err));
    if (quota == 0)
        goto out;
    TV_TRY(space_read(t->s, t->mdb, &end, &unused, err));
    const uint64_t limit = quota_limit(quota, bound, page_bytes);
    const uint64_t full = (end - (unused < end ? unused : end)) / page_bytes;
    /* LMDB lists what is freed on pages, too. */
    const uint64_t list = gone / 512 + 8;
    const uint64_t go = dead + (gone > list ? gone - list : 0);
    TV_TRY(space_runs(t->s, t->mdb, true, &sp, err));
    /* What is evicted may lie in pieces, too; trash is cut already. */
    const uint64_t stays =
        (full > go ? full - go : 0) + TREE_PAGES + space_loss(&sp) + gone / 40;
    const uint64_t room = limit > stays ? limit - stays : 0;
    /* One more, since a reserve begins a page with its last byte. */
    *bytes = room > 1 ? (room - 1) * page_bytes : 0;
out:
    space_free(&sp);
    return rc;
}

enum tv_err tv_derived_room(tv_read *r, struct tv_derived_room *out,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct derived_pins pins = {.ids = NULL};
    struct adding a = {.pins = &pins, .out = out, .s = r->t.s};
    uint64_t dead = 0;
    memset(out, 0, sizeof *out);
    TV_TRY(derived_pins_read(&r->t, &pins, err));
    TV_TRY(derived_each_kind(&r->t, add_room, &a, err));
    TV_TRY(trash_pages(&r->t, &dead, err));
    out->trash = dead * r->t.s->page_bytes;
    rc = user_room(&r->t, a.pages, dead, &out->user, err);
out:
    derived_pins_free(&pins);
    return rc;
}

static enum tv_err no_room(tv_store *s, uint64_t missing, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_read *r = NULL;
    struct tv_derived_room room;
    char a[32], b[32];
    TV_TRY(tv_read_begin(s, err, &r));
    TV_TRY(tv_derived_room(r, &room, err));
    rc = tv_error_set(err, TV_E_NOSPACE,
                      "store %s: %s are missing to stay within its quota",
                      s->path, tv_format_bytes(missing, a, sizeof a));
    if (room.evictable > 0)
        tv_error_hint(err,
                      "the %s of derived data that could go would not make it: "
                      "remove an object ('tvstore rm') or raise the quota "
                      "('tvstore quota')",
                      tv_format_bytes(room.evictable, b, sizeof b));
    else if (room.pinned > 0)
        tv_error_hint(err,
                      "%s of derived data are in use by running merges and "
                      "could go when these end; else remove an object "
                      "('tvstore rm') or raise the quota ('tvstore quota')",
                      tv_format_bytes(room.pinned, b, sizeof b));
    else
        tv_error_hint(err,
                      "derived data are gone already: remove an object "
                      "('tvstore rm') or raise the quota ('tvstore quota')");
out:
    tv_read_end(r);
    return rc;
}

uint64_t tv_derived_long(uint64_t bytes)
{
    return long_bytes(bytes);
}

enum tv_err tv_derived_reserve(tv_store *s, uint64_t bytes, uint64_t spare,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    struct space sp = {.runs = NULL};
    uint64_t missing = 0;
    /* Chunks find room in what runs there are (quota_chunks), other values in
     * pieces: what counts is the number of pages. */
    struct want w = {.keep = (bytes + spare) / s->page_bytes + 1};
    w.spare = w.keep - (bytes / s->page_bytes + 1);
    if (s->read_only)
        return TV_OK;
    TV_TRY(make_room(s, &w, false, &b, &sp, &missing, err));
    if (b == NULL && missing > 0)
        rc = no_room(s, missing * s->page_bytes, err);
out:
    space_free(&sp);
    tv_batch_abort(b);
    return rc;
}

enum tv_err tv_derived_evict_all(tv_store *s, uint64_t *n_items,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    *n_items = 0;
    for (;;) {
        struct evict e = {.all = true};
        TV_TRY(tv_batch_begin(s, false, err, &b));
        TV_TRY(evict_some(b, &e, err));
        rc = tv_batch_commit(b, err);
        b = NULL;
        TV_TRY(rc);
        *n_items += e.n_items;
        if (e.n_items == 0)
            break;
    }
out:
    tv_batch_abort(b);
    return rc;
}

static enum tv_err free_bytes_now(tv_store *s, uint64_t *bytes,
                                  struct tv_error *err)
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

enum tv_err derived_free(tv_store *s, uint64_t bytes, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    for (;;) {
        uint64_t now = 0;
        TV_TRY(free_bytes_now(s, &now, err));
        if (now >= bytes)
            break;
        struct evict e = {.pages_wanted = (bytes - now) / s->page_bytes + 1};
        TV_TRY(tv_batch_begin(s, true, err, &b));
        TV_TRY(evict_some(b, &e, err));
        rc = tv_batch_commit(b, err);
        b = NULL;
        TV_TRY(rc);
        if (e.n_items == 0)
            break;
    }
out:
    tv_batch_abort(b);
    return rc;
}
