/* SPDX-License-Identifier: Apache-2.0 */
/*
 * validate_walk.c - a table entry by entry, each beside what LMDB should know
 * of it: that keys rise, that a search finds what a walk finds, that the page
 * is in use, and that there are as many as it counts.
 */
#include "validate_parts.h"

#include <inttypes.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

/* ---- pages --------------------------------------------------------------- */

enum tv_err verify_free_read(struct verify *v, struct tv_error *err)
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
            verify_problem(v, "", "", "the list of free pages is damaged");
            break;
        }
        for (size_t i = 1; i <= n; i++) {
            size_t page = 0;
            memcpy(&page, (const char *)val.mv_data + i * sizeof page,
                   sizeof page);
            if (page < 2 || page >= v->n_pages ||
                (v->free_pages[page / 8] >> (page % 8) & 1) != 0) {
                verify_problem(v, "", "", "the list of free pages is damaged");
                goto out;
            }
            v->free_pages[page / 8] |= (unsigned char)(1u << (page % 8));
        }
    }
    if (e != 0 && e != MDB_NOTFOUND)
        rc = verify_note(
            v, tv_lmdb_error(err, e, s->path, "the list of free pages"), "", "",
            err);
out:
    if (cur != NULL)
        tv_lmdb()->cursor_close(cur);
    return rc;
}

bool verify_on_free_page(const struct verify *v, const MDB_val *val)
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

/* ---- tables -------------------------------------------------------------- */

static int key_order(const void *x, size_t nx, const void *y, size_t ny)
{
    const int c = memcmp(x, y, nx < ny ? nx : ny);
    return c != 0 ? c : (nx > ny) - (nx < ny);
}

enum tv_err verify_each(struct verify *v, enum db db, verify_fn fn,
                        struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key last = {.n = 0};
    uint64_t n = 0, want = 0;
    bool more = false;
    TV_TRY(verify_note(v, db_count(&v->t, db, &want, err), "", "", err));
    TV_TRY(walk_begin(&w, &v->t, db, NULL, err));
    for (;;) {
        rc = walk_next(&w, &more, err);
        if (rc == TV_E_CORRUPT) {
            rc = verify_note(v, rc, "", "", err);
            goto out; /* the tree cannot be followed any further */
        }
        TV_TRY(rc);
        if (!more)
            break;
        if (w.key.mv_size > TV_REC_KEY_MAX ||
            (n > 0 &&
             key_order(last.b, last.n, w.key.mv_data, w.key.mv_size) >= 0) ||
            ++n > want) {
            verify_problem(v, "", "", "table '%s': its tree is damaged",
                           db_name(db));
            goto out;
        }
        last.n = w.key.mv_size;
        memcpy(last.b, w.key.mv_data, last.n);
        /* A search must find what a walk finds. */
        MDB_val again = {0, NULL};
        bool found = false;
        TV_TRY(verify_note(v, db_get(&v->t, db, &last, &found, &again, err), "",
                           "", err));
        if (!found || again.mv_data != w.val.mv_data ||
            again.mv_size != w.val.mv_size || !page_head_ok(v, &w.val))
            verify_problem(v, "", "", "table '%s': its tree is damaged",
                           db_name(db));
        if (verify_on_free_page(v, &w.val))
            verify_problem(
                v, "", "",
                "table '%s': an entry lies on a page that is listed as "
                "free",
                db_name(db));
        TV_TRY(fn(v, &w, err));
    }
    if (n != want)
        verify_problem(v, "", "",
                       "table '%s': %" PRIu64
                       " entries, but LMDB counts %" PRIu64,
                       db_name(db), n, want);
out:
    walk_end(&w);
    return rc;
}

bool verify_key_is(const struct walk *w, const struct rec_key *k)
{
    return w->key.mv_size == k->n && memcmp(w->key.mv_data, k->b, k->n) == 0;
}

bool verify_known_id(struct verify *v, uint64_t id)
{
    return id != 0 && id < v->next_id;
}
