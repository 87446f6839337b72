/* SPDX-License-Identifier: Apache-2.0 */
/*
 * derived_gc.c - derived data that killed writers left half done, and groups
 * and uses that do not add up with the items that are there.
 */
#include "derived_priv.h"

#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

struct leftovers {      /* keys of what nothing needs, one list per kind */
    struct tv_buf keys; /* u32 length, key */
    const tv_batch *b;
    uint64_t n;
};

static enum tv_err find_leftover(void *arg, enum tv_derived_kind kind,
                                 const struct rec_key *k,
                                 const struct rec_derived *r, const char *why,
                                 struct tv_error *err)
{
    struct leftovers *l = (struct leftovers *)arg;
    const tv_store *s = l->b->t.s;
    bool keep = r != NULL;
    (void)why;
    if (keep && r->state != REC_COMPLETE)
        keep = session_alive(s, r->session);
    else if (keep && kind == TV_DELTA) {
        struct rec_derived mask;
        const enum tv_err rc =
            derived_get(&l->b->t, TV_MASK, k, &keep, &mask, err);
        if (rc == TV_E_CORRUPT)
            tv_error_clear(err);
        else if (rc != TV_OK)
            return rc;
    }
    if (keep)
        return TV_OK;
    tv_buf_le32(&l->keys, (uint32_t)k->n);
    tv_buf_add(&l->keys, k->b, k->n);
    l->n++;
    return TV_OK;
}

static enum tv_err drop_leftovers(tv_batch *b, enum tv_derived_kind kind,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct leftovers l = {.b = b};
    tv_buf_init(&l.keys, (size_t)1 << 30);
    TV_TRY(derived_each(&b->t, kind, find_leftover, &l, err));
    TV_TRY(tv_buf_ok(&l.keys, err));
    for (size_t at = 0; at + 4 <= l.keys.n_bytes;) {
        struct rec_key k;
        struct rec_derived r;
        bool found = false;
        k.n = tv_get_le32(l.keys.data + at);
        memcpy(k.b, l.keys.data + at + 4, k.n);
        at += 4 + k.n;
        const enum tv_err seen = derived_get(&b->t, kind, &k, &found, &r, err);
        if (seen == TV_OK && found) {
            TV_TRY(derived_drop_one(b, kind, &k, &r, err));
            continue;
        }
        if (seen != TV_E_CORRUPT)
            TV_TRY(seen);
        tv_error_clear(err);
        /* A record that says nothing, or a chunk without one. */
        TV_TRY(db_del(b, derived_db(kind), &k, NULL, err));
    }
out:
    tv_buf_free(&l.keys);
    return rc;
}

struct counts { /* items per group */
    uint64_t id, n;
};

static enum tv_err count_item(void *arg, enum tv_derived_kind kind,
                              const struct rec_key *k,
                              const struct rec_derived *r, const char *why,
                              struct tv_error *err)
{
    struct counts *c = (struct counts *)arg;
    (void)kind;
    (void)k;
    (void)why;
    (void)err;
    c->n += r != NULL && r->group == c->id;
    return TV_OK;
}

/* Documents without items go, the others get their count. */
static enum tv_err mend_groups(tv_batch *b, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    uint64_t after = 0;
    bool first = true;
    for (;;) {
        struct counts c = {.n = 0};
        struct rec_group g = {.n_items = 0};
        struct rec_key k;
        bool more = false, found = false;
        TV_TRY(walk_begin(&w, &b->t, DB_GROUP, NULL, err));
        do {
            TV_TRY(walk_next(&w, &more, err));
            c.id = more ? key_get_id(&w.key, 0) : 0;
        } while (more && !first && c.id <= after);
        walk_end(&w);
        if (!more)
            break;
        first = false;
        after = c.id;
        TV_TRY(derived_each_kind(&b->t, count_item, &c, err));
        rc = derived_group_get(&b->t, c.id, &found, &g, err);
        if (rc == TV_E_CORRUPT)
            tv_error_clear(err);
        else
            TV_TRY(rc);
        if (c.n == 0 || rc == TV_E_CORRUPT) {
            key_id(&k, c.id);
            TV_TRY(db_del(b, DB_GROUP, &k, NULL, err));
        } else if (g.n_items != c.n) {
            char *about = tv_strndup(g.about.s, g.about.n);
            if (about == NULL) {
                rc = tv_error_set(err, TV_E_NOMEM, "no memory for a text");
                goto out;
            }
            rc = derived_group_put(b, c.id, about, strlen(about), c.n, err);
            tv_free(about);
            TV_TRY(rc);
        }
        rc = TV_OK;
    }
out:
    walk_end(&w);
    return rc;
}

/* Entries of `use` whose item says another tick. */
static enum tv_err mend_uses(tv_batch *b, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct tv_buf keys;
    bool more = false;
    tv_buf_init(&keys, (size_t)1 << 30);
    TV_TRY(walk_begin(&w, &b->t, DB_USE, NULL, err));
    for (;;) {
        struct rec_body body;
        struct rec_use u;
        struct rec_derived r;
        const char *why = NULL;
        bool found = false;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        if (w.key.mv_size != 8)
            continue;
        if (rec_open(REC_USE, w.key.mv_data, w.key.mv_size, w.val.mv_data,
                     w.val.mv_size, &body, &why) &&
            rec_use_get(body, &u, &why) && derived_kind_known(u.kind)) {
            rc = derived_get(&b->t, (enum tv_derived_kind)u.kind, &u.item,
                             &found, &r, err);
            if (rc == TV_E_CORRUPT)
                tv_error_clear(err);
            else
                TV_TRY(rc);
            rc = TV_OK;
            if (found && r.used == key_get_id(&w.key, 0))
                continue;
        }
        tv_buf_add(&keys, w.key.mv_data, 8);
    }
    walk_end(&w);
    TV_TRY(tv_buf_ok(&keys, err));
    for (size_t at = 0; at < keys.n_bytes; at += 8) {
        struct rec_key k = {.n = 8};
        memcpy(k.b, keys.data + at, 8);
        TV_TRY(db_del(b, DB_USE, &k, NULL, err));
    }
out:
    walk_end(&w);
    tv_buf_free(&keys);
    return rc;
}

enum tv_err derived_gc(tv_batch *b, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    for (size_t i = 0; i < DERIVED_KINDS; i++)
        TV_TRY(drop_leftovers(b, derived_kinds[i], err));
    TV_TRY(mend_uses(b, err));
    TV_TRY(mend_groups(b, err));
    TV_TRY(derived_drop_pins(b, false, err));
out:
    return rc;
}
