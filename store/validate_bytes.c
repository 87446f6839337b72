/* SPDX-License-Identifier: Apache-2.0 */
/*
 * validate_bytes.c - the bytes of payloads.
 *
 * Every byte is hashed twice over: chunks against their headers, leaves against
 * the leaf table. That is nearly all of the work, so payloads are gathered and
 * their chunks hashed by all cores; a leaf belongs to the chunk that it starts
 * in. Findings are reported in the order of payloads.
 */
#include "validate_parts.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"

#define GATHERED     256u                  /* payloads looked at together ... */
#define GATHER_BYTES ((uint64_t)512 << 20) /* ... and bytes */

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

enum tv_err verify_bytes_begin(struct verify *v, unsigned n_threads,
                               struct tv_error *err)
{
    v->gathered = tv_calloc(GATHERED, sizeof *v->gathered);
    if (v->gathered == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a list");
    if (tv_pool_open(n_threads > 0 ? n_threads : tv_cpu_count(), NULL,
                     &v->pool) != TV_OK)
        v->pool = NULL; /* it takes longer */
    return TV_OK;
}

void verify_bytes_end(struct verify *v)
{
    for (size_t i = 0; i < v->n_gathered; i++)
        arena_clear(&v->gathered[i].arena);
    tv_pool_close(v->pool);
    tv_free(v->pieces);
    tv_free(v->gathered);
}

/* ---- findings ------------------------------------------------------------ */

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
        if (verify_on_free_page(v, &val)) {
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
        TV_TRY(verify_payload_problem(v, g->id, g->what, err));
    if (g->p.refs != n_uses) {
        (void)snprintf(g->what, sizeof g->what,
                       "payload %" PRIu64 " has %" PRIu64
                       " users, but its record says %" PRIu64,
                       g->id, n_uses, g->p.refs);
        TV_TRY(verify_payload_problem(v, g->id, g->what, err));
    }
    key_content(&k, g->p.checksum, g->id);
    rc = db_get_rec(&v->t, DB_CONTENT, REC_CONTENT, &k, &found, &body,
                    "an entry of the content table", err);
    if (rc == TV_OK && !found)
        verify_problem(v, "", "",
                       "payload %" PRIu64 " cannot be found by content", g->id);
    rc = verify_note(v, rc, "", "", err);
    verify_advance(v, g->p.bytes);
out:
    return rc;
}

enum tv_err verify_payloads_end(struct verify *v, struct tv_error *err)
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
    if (v->n_gathered == GATHERED || v->gathered_bytes >= GATHER_BYTES)
        rc = verify_payloads_end(v, err);
out:
    return rc;
}

enum tv_err verify_payload_entry(struct verify *v, const struct walk *w,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_payload p;
    struct rec_key k;
    bool found = false;
    const uint64_t id = key_get_id(&w->key, 0);
    key_id(&k, id);
    if (!verify_key_is(w, &k) || !verify_known_id(v, id)) {
        verify_problem(v, "", "", "a payload is filed under a wrong id");
        return TV_OK;
    }
    rc = payload_get(&v->t, id, &found, &p, err);
    if (rc == TV_E_CORRUPT) {
        char what[sizeof err->msg];
        (void)snprintf(what, sizeof what, "%s", err->msg);
        tv_error_clear(err);
        return verify_payload_problem(v, id, what, err);
    }
    if (rc != TV_OK || !found || p.state != REC_COMPLETE)
        return rc;
    return payload_gather(v, id, &p, err);
}
