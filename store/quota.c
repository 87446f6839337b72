/* SPDX-License-Identifier: Apache-2.0 */
/*
 * quota.c - how much the store holds and may hold.
 *
 * The quota bounds the allocated bytes of the store directory. Two fences keep
 * it: LMDB's map is made no larger than the quota allows, so that no page can
 * ever be written past it, and before a payload is put its size is compared
 * with what is left, so that the refusal is a sentence with a number. The
 * second fence keeps a reserve, without which a full store could not even
 * remove something: removal writes pages too.
 */
#include "derived_priv.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

/* lock.mdb, the other locks and the directory itself. */
#define BESIDE_BYTES ((uint64_t)64 << 10)
#define RESERVE_MAX  ((uint64_t)4 << 20)
#define CHARGE_SLACK ((uint64_t)256 << 10) /* for records of a run */
#define SHRINK_LEAST ((uint64_t)64 << 20)
#define QUOTA_LEAST  ((uint64_t)256 << 10)
#define SHORT_RUN    64u /* pages: of SCARCE_CHUNK in payload.c */
#define CHUNKS_SPARE 2u  /* the tree takes pages of runs, too */

uint64_t quota_file_max(uint64_t quota, size_t page_bytes)
{
    if (quota == 0)
        return UINT64_MAX;
    const uint64_t n = quota > BESIDE_BYTES ? quota - BESIDE_BYTES : 0;
    return n - n % page_bytes;
}

static uint64_t reserve_of(uint64_t quota)
{
    return quota / 16 < RESERVE_MAX ? quota / 16 : RESERVE_MAX;
}

enum tv_err quota_read(const struct txn *t, uint64_t *bytes,
                       struct tv_error *err)
{
    struct rec_key k;
    struct rec_body body;
    bool found = false;
    const char *why = NULL;
    *bytes = 0;
    key_str(&k, META_QUOTA);
    const enum tv_err rc =
        db_get_rec(t, DB_META, REC_NUMBER, &k, &found, &body, "the quota", err);
    if (rc != TV_OK || !found)
        return rc;
    if (!rec_number_get(body, bytes, &why))
        return rec_damaged(t->s, "the quota", why, err);
    return TV_OK;
}

/* ---- charges -------------------------------------------------------------
 */

/* Has a run left its state in that directory, or does the session live? */
static bool is_unfinished(const tv_store *s, struct rec_text path)
{
    uint64_t session = 0;
    if (session_named(path.s, path.n, &session))
        return session_alive(s, session);
    char *dir = tv_strndup(path.s, path.n);
    char *state = dir != NULL ? tv_path_join(dir, ".tvmerge") : NULL;
    /* Out of memory: better to count it. */
    const bool yes = state == NULL || tv_path_exists(state);
    tv_free(state);
    tv_free(dir);
    return yes;
}

static enum tv_err charges_read(const struct txn *t, uint64_t *bytes,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    bool more = false;
    *bytes = 0;
    TV_TRY(walk_begin(&w, t, DB_CHARGE, NULL, err));
    for (;;) {
        struct rec_body body;
        struct rec_charge c;
        const char *why = NULL;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        TV_TRY(walk_rec(&w, REC_CHARGE, &body, err));
        if (!rec_charge_get(body, &c, &why)) {
            rc = rec_damaged(t->s, "a charge to the quota", why, err);
            goto out;
        }
        /* A scratch file has no name and goes with its process. A run that is
         * killed when its output is finished leaves its charge behind. */
        if (!is_unfinished(t->s, c.path))
            continue;
        if (!tv_add_u64(*bytes, c.bytes, bytes))
            *bytes = UINT64_MAX;
    }
out:
    walk_end(&w);
    return rc;
}

enum tv_err quota_bound(const struct txn *t, uint64_t *quota, uint64_t *bound,
                        struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    uint64_t charged = 0;
    *bound = 0;
    TV_TRY(quota_read(t, quota, err));
    if (*quota == 0)
        goto out;
    TV_TRY(charges_read(t, &charged, err));
    *bound = charged < *quota ? *quota - charged : 1;
out:
    return rc;
}

/* Drops charges of directories that are not in the making (any more), and that
 * of `key`. */
static enum tv_err charges_drop(tv_batch *b, const struct rec_key *key,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key gone[16];
    size_t n = 0;
    bool more = false;
    TV_TRY(walk_begin(&w, &b->t, DB_CHARGE, NULL, err));
    while (n < sizeof gone / sizeof gone[0]) {
        struct rec_body body;
        struct rec_charge c;
        const char *why = NULL;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        const bool mine = w.key.mv_size == key->n &&
                          memcmp(w.key.mv_data, key->b, key->n) == 0;
        if (!mine &&
            rec_open(REC_CHARGE, w.key.mv_data, w.key.mv_size, w.val.mv_data,
                     w.val.mv_size, &body, &why) &&
            rec_charge_get(body, &c, &why) && is_unfinished(b->t.s, c.path))
            continue;
        gone[n].n = w.key.mv_size <= sizeof gone[n].b ? w.key.mv_size : 0;
        memcpy(gone[n].b, w.key.mv_data, gone[n].n);
        n++;
    }
    walk_end(&w);
    for (size_t i = 0; i < n; i++)
        TV_TRY(db_del(b, DB_CHARGE, &gone[i], NULL, err));
out:
    walk_end(&w);
    return rc;
}

/* The store, the other charges and this one must fit. The file never shrinks by
 * itself: what is free inside it is no room for a directory. */
static enum tv_err charge_admit(tv_batch *b, const char *dir, uint64_t bytes,
                                uint64_t *missing, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_store *s = b->t.s;
    uint64_t used = 0, charged = 0, want = 0;
    char a[32], q[32], f[32];
    if (b->quota == 0)
        goto out;
    TV_TRY(charges_read(&b->t, &charged, err));
    TV_TRY(tv_disk_used(s->path, &used, err));
    if (!tv_add_u64(used + CHARGE_SLACK, charged, &want) ||
        !tv_add_u64(want, bytes, &want))
        want = UINT64_MAX;
    if (want <= b->quota)
        goto out;
    *missing = want - b->quota;
    (void)tv_format_bytes(b->quota, q, sizeof q);
    (void)tv_format_bytes(want - b->quota, a, sizeof a);
    if (dir[0] == '@')
        rc = tv_error_set(err, TV_E_NOSPACE,
                          "store %s: its quota of %s has no room for a scratch "
                          "file of %s: %s are missing",
                          s->path, q, tv_format_bytes(bytes, f, sizeof f), a);
    else
        rc = tv_error_set(err, TV_E_NOSPACE,
                          "store %s: its quota of %s has no room for the "
                          "output in %s: %s are missing",
                          s->path, q, dir, a);
    tv_error_hint(err,
                  "the store takes %s; 'tvstore gc --derived' and 'tvstore "
                  "compact' give back what it does not need, 'tvstore quota' "
                  "raises the limit",
                  tv_format_bytes(used, f, sizeof f));
out:
    return rc;
}

static enum tv_err charge_write(tv_store *s, const char *dir, uint64_t bytes,
                                uint64_t *missing, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    struct rec_key k;
    struct tv_buf buf;
    const struct rec_charge c = {.bytes = bytes,
                                 .path = {.s = dir, .n = strlen(dir)}};
    key_digest(&k, tv_hash128(dir, strlen(dir)));
    TV_TRY(tv_batch_begin(s, false, err, &b));
    TV_TRY(charges_drop(b, &k, err));
    if (bytes != 0) {
        TV_TRY(charge_admit(b, dir, bytes, missing, err));
        rec_begin(&buf);
        rec_charge_put(&buf, &c);
        TV_TRY(db_put_rec(b, DB_CHARGE, REC_CHARGE, &k, &buf, err));
    }
    rc = tv_batch_commit(b, err);
    b = NULL;
out:
    tv_batch_abort(b);
    return rc;
}

static enum tv_err charge_set(tv_store *s, const char *dir, uint64_t bytes,
                              struct tv_error *err)
{
    const uint64_t charged = bytes;
    uint64_t missing = 0;
    bool done = false;
    enum tv_err rc = charge_write(s, dir, bytes, &missing, err);
    if (rc != TV_E_NOSPACE || missing == 0)
        return rc;
    /* Free pages and derived data may go before anybody is refused, but not for
     * nothing. */
    struct tv_error own;
    uint64_t still = 0;
    tv_error_clear(&own);
    if (tv_store_charge_check(s, bytes, &still, &own) != TV_OK || still > 0)
        return rc;
    if (bytes < SHRINK_LEAST)
        bytes = SHRINK_LEAST; /* worth a copy of so much */
    rc = store_shrink(s, missing, bytes, &done, &own);
    if (rc != TV_OK && err != NULL)
        *err = own;
    if (rc != TV_OK)
        return rc;
    return done ? charge_write(s, dir, charged, &missing, err) : TV_E_NOSPACE;
}

enum tv_err tv_store_charge_set(tv_store *s, const char *dir, uint64_t bytes,
                                struct tv_error *err)
{
    return charge_set(s, dir, bytes, err);
}

enum tv_err tv_store_scratch_set(tv_store *s, uint64_t bytes,
                                 struct tv_error *err)
{
    char name[PIN_HEAD + 1];
    uint64_t quota = 0;
    enum tv_err rc = tv_store_quota_get(s, &quota, err);
    if (rc != TV_OK || s->read_only || quota == 0 || !session_hold(s))
        return rc;
    derived_pin_name(s->session, name);
    return charge_set(s, name, bytes, err);
}

enum tv_err tv_store_charge_check(tv_store *s, uint64_t bytes,
                                  uint64_t *missing, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_store_stat st;
    uint64_t want = 0;
    *missing = 0;
    TV_TRY(tv_store_stat(s, &st, err));
    if (st.quota_bytes == 0)
        goto out;
    if (!tv_add_u64(st.used_bytes + CHARGE_SLACK, bytes, &want))
        want = UINT64_MAX;
    uint64_t spare = st.free_bytes + st.masks + st.task_vectors + st.statistics;
    const uint64_t most = bytes < SHRINK_LEAST ? SHRINK_LEAST : bytes;
    if (st.file_bytes - (spare < st.file_bytes ? spare : st.file_bytes) > most)
        spare = 0;
    if (want > st.quota_bytes && want - st.quota_bytes > spare)
        *missing = want - st.quota_bytes - spare;
out:
    return rc;
}

enum tv_err tv_store_charge_clear(tv_store *s, const char *dir,
                                  struct tv_error *err)
{
    uint64_t missing = 0;
    return charge_write(s, dir, 0, &missing, err);
}

/* ---- pages ----------------------------------------------------------------
 */

struct oldest { /* the oldest snapshot that some reader holds */
    size_t txn;
};

static int oldest_reader(const char *line, void *arg)
{
    struct oldest *o = (struct oldest *)arg;
    unsigned long long pid = 0, thread = 0;
    size_t txn = 0;
    /* A reader without a snapshot has '-' in the last place. */
    if (sscanf(line, "%llu %llx %zu", &pid, &thread, &txn) == 3 && txn < o->txn)
        o->txn = txn;
    return 0;
}

#define FREE_PAGES_MAX ((size_t)4 << 20) /* more are left out of account */

static int page_compare(const void *x, const void *y)
{
    const size_t a = *(const size_t *)x, b = *(const size_t *)y;
    return (a > b) - (a < b);
}

/* Joins neighbours of a sorted list. */
static enum tv_err make_runs(struct space *sp, const size_t *pages, size_t n,
                             struct tv_error *err)
{
    size_t n_runs = 0;
    for (size_t i = 0; i < n; i++)
        n_runs += i == 0 || pages[i] != pages[i - 1] + 1;
    sp->runs = (struct page_run *)tv_calloc(n_runs + 1, sizeof *sp->runs);
    if (sp->runs == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a page list");
    for (size_t i = 0; i < n; i++) {
        if (i == 0 || pages[i] != pages[i - 1] + 1)
            sp->runs[sp->n_runs++] = (struct page_run){.page = pages[i]};
        sp->runs[sp->n_runs - 1].n++;
    }
    sp->n_free = n;
    return TV_OK;
}

enum tv_err space_runs(tv_store *s, MDB_txn *reader, bool all,
                       struct space *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    MDB_envinfo info;
    MDB_cursor *cur = NULL;
    MDB_val key = {0, NULL}, val = {0, NULL};
    struct oldest oldest = {.txn = SIZE_MAX};
    size_t *pages = NULL;
    size_t n = 0, cap = 0;
    memset(out, 0, sizeof *out);
    /* `reader` holds the last snapshot and is among them. */
    (void)tv_lmdb()->reader_list(s->env, oldest_reader, &oldest);
    int e = tv_lmdb()->env_info(s->env, &info);
    if (e == 0)
        e = tv_lmdb()->cursor_open(reader, TV_LMDB_FREE_DBI, &cur);
    while (e == 0) {
        size_t txn = 0, count = 0;
        e = tv_lmdb()->cursor_get(cur, &key, &val, MDB_NEXT);
        if (e != 0)
            break;
        if (key.mv_size != sizeof txn || val.mv_size < sizeof count)
            continue;
        memcpy(&txn, key.mv_data, sizeof txn);
        memcpy(&count, val.mv_data, sizeof count);
        if (count > val.mv_size / sizeof count - 1)
            continue;
        if (!all && txn >= oldest.txn) {
            out->later += count;
            continue;
        }
        if (count > FREE_PAGES_MAX - n)
            break;
        if (n + count > cap) {
            const size_t more = (n + count) * 2;
            size_t *p = (size_t *)tv_realloc(pages, more * sizeof *pages);
            if (p == NULL) {
                rc = tv_error_set(err, TV_E_NOMEM, "no memory for a page list");
                goto out;
            }
            pages = p;
            cap = more;
        }
        if (count > 0)
            memcpy(pages + n, (const char *)val.mv_data + sizeof count,
                   count * sizeof *pages);
        n += count;
    }
    if (e != 0 && e != MDB_NOTFOUND) {
        rc = tv_lmdb_error(err, e, s->path, "counting its free pages");
        goto out;
    }
    out->end = (uint64_t)info.me_last_pgno + 1;
    if (n > 0)
        qsort(pages, n, sizeof *pages, page_compare);
    TV_TRY(make_runs(out, pages, n, err));
out:
    if (cur != NULL)
        tv_lmdb()->cursor_close(cur);
    tv_free(pages);
    if (rc != TV_OK)
        space_free(out);
    return rc;
}

void space_free(struct space *sp)
{
    tv_free(sp->runs);
    *sp = (struct space){.runs = NULL};
}

/* The first run of so many pages. Values of a payload are alike, so that all of
 * them together look at each run a few times, not each at all. */
static size_t first_run(struct space *sp, uint64_t pages)
{
    unsigned bits = 0;
    while (bits < 63 && pages >> (bits + 1) != 0)
        bits++;
    size_t at = pages >= sp->seek[bits].pages ? sp->seek[bits].at : 0;
    while (at < sp->n_runs && sp->runs[at].n < pages)
        at++;
    sp->seek[bits].pages = pages;
    sp->seek[bits].at = at;
    return at;
}

uint64_t space_growth(struct space *sp, const uint64_t *pages, size_t n,
                      uint64_t n_single)
{
    uint64_t growth = 0;
    for (size_t i = 0; i < n; i++) {
        const size_t at = first_run(sp, pages[i]);
        if (at == sp->n_runs) {
            growth += pages[i];
            continue;
        }
        sp->runs[at].n -= pages[i];
        sp->runs[at].page += pages[i];
        sp->n_free -= pages[i];
    }
    return growth + (n_single > sp->n_free ? n_single - sp->n_free : 0);
}

uint64_t space_loss(const struct space *sp)
{
    uint64_t pages = 0;
    for (size_t i = 0; i < sp->n_runs; i++)
        pages += sp->runs[i].n < SHORT_RUN ? sp->runs[i].n : 0;
    /* At worst a header and an entry of the tree for every page. */
    return pages / 40;
}

/* Do so many chunks of so many pages fit? The tree takes its pages first. */
static bool chunks_fit(struct space *sp, uint64_t chunks, uint64_t pages,
                       uint64_t limit)
{
    uint64_t n = limit > sp->end ? (limit - sp->end) / pages : 0;
    uint64_t skip = TREE_PAGES;
    for (size_t i = first_run(sp, 1); n < chunks && i < sp->n_runs; i++) {
        const uint64_t taken = skip < sp->runs[i].n ? skip : sp->runs[i].n;
        skip -= taken;
        n += (sp->runs[i].n - taken) / pages;
    }
    return n >= chunks;
}

static void space_take(struct space *sp, uint64_t pages)
{
    sp->end += space_growth(sp, &pages, 1, 0);
}

/* What is free for this batch, less what it has put so far. */
static enum tv_err batch_space(tv_batch *b, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    MDB_txn *reader = NULL;
    if (b->space_known)
        return TV_OK;
    TV_TRY(tv_buf_ok(&b->puts, err));
    TV_TRY(txn_begin(b->t.s, MDB_RDONLY, &reader, err));
    TV_TRY(space_runs(b->t.s, reader, false, &b->space, err));
    b->space_known = true;
    for (size_t at = 0; at < b->puts.n_bytes; at += 8)
        space_take(&b->space, tv_get_le64(b->puts.data + at));
    tv_buf_free(&b->puts);
out:
    if (reader != NULL) {
        tv_lmdb()->txn_abort(reader);
        atomic_fetch_sub(&b->t.s->n_txns, 1);
    }
    return rc;
}

void quota_put(tv_batch *b, uint64_t bytes)
{
    if (b->quota == 0)
        return;
    const uint64_t pages = value_pages(bytes, b->t.s->page_bytes);
    b->put_pages += pages;
    if (b->space_known)
        space_take(&b->space, pages);
    else
        tv_buf_le64(&b->puts, pages);
}

bool quota_full(const tv_batch *b, uint64_t bytes)
{
    const uint64_t pages = value_pages(bytes, b->t.s->page_bytes);
    return b->quota != 0 && pages > 1 &&
           b->end_pages + b->put_pages + pages + TREE_PAGES > quota_pages(b);
}

enum tv_err quota_chunks(tv_batch *b, struct rec_payload *r,
                         struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t page_bytes = b->t.s->page_bytes;
    const uint64_t limit = quota_pages(b);
    if (b->quota == 0 || r->n_chunks == 0)
        return TV_OK;
    const uint64_t chunk =
        r->bytes < r->chunk_bytes ? r->bytes : r->chunk_bytes;
    uint64_t pages = value_pages(chunk, page_bytes);
    if (!b->space_known &&
        b->end_pages + b->put_pages + r->n_chunks * pages + TREE_PAGES <= limit)
        return TV_OK; /* the file may grow by all of it */
    TV_TRY(batch_space(b, err));
    while (pages > 1 &&
           !chunks_fit(&b->space, r->n_chunks + CHUNKS_SPARE, pages, limit)) {
        pages /= 2;
        /* The head of a run of pages has 16 bytes. */
        rec_geometry_cut(r, pages * page_bytes - 16 - TV_CHUNK_HEADER);
    }
out:
    return rc;
}

uint64_t quota_limit(uint64_t quota, uint64_t bound, size_t page_bytes)
{
    if (bound == 0)
        return UINT64_MAX;
    const uint64_t max = quota_file_max(bound, page_bytes);
    const uint64_t reserve =
        reserve_of(bound) + (bound != quota ? 2 * CHARGE_SLACK : 0);
    return max > reserve ? (max - reserve) / page_bytes : 0;
}

uint64_t quota_pages(const tv_batch *b)
{
    return quota_limit(b->quota, b->bound, b->t.s->page_bytes);
}

enum tv_err space_read(tv_store *s, MDB_txn *reader, uint64_t *end_bytes,
                       uint64_t *free_bytes, struct tv_error *err)
{
    MDB_envinfo info;
    MDB_cursor *cur = NULL;
    MDB_val key = {0, NULL}, val = {0, NULL};
    uint64_t pages = 0;
    int e = tv_lmdb()->env_info(s->env, &info);
    if (e == 0)
        e = tv_lmdb()->cursor_open(reader, TV_LMDB_FREE_DBI, &cur);
    while (e == 0) {
        e = tv_lmdb()->cursor_get(cur, &key, &val, MDB_NEXT);
        if (e == 0 && val.mv_size >= sizeof(size_t)) {
            /* LMDB's own list: a count, then that many page numbers. */
            size_t n = 0;
            memcpy(&n, val.mv_data, sizeof n);
            pages += n;
        }
    }
    if (cur != NULL)
        tv_lmdb()->cursor_close(cur);
    if (e != MDB_NOTFOUND)
        return tv_lmdb_error(err, e, s->path, "counting its free pages");
    *end_bytes = ((uint64_t)info.me_last_pgno + 1) * s->page_bytes;
    *free_bytes = pages * s->page_bytes;
    return TV_OK;
}

enum tv_err quota_apply(tv_store *s, uint64_t quota, struct tv_error *err)
{
    MDB_envinfo info;
    int e = tv_lmdb()->env_info(s->env, &info);
    if (e != 0)
        return tv_lmdb_error(err, e, s->path, "asking for its size");
    const uint64_t used = ((uint64_t)info.me_last_pgno + 1) * s->page_bytes;
    uint64_t want = quota_file_max(quota, s->page_bytes);
    /* A quota set below what is there stops growth; removal needs a little
     * room even so. */
    if (want < used)
        want = used + RESERVE_MAX;
    if (want > s->map_bytes)
        want = s->map_bytes;
    if (atomic_load(&s->n_txns) != 0)
        return TV_OK; /* something is borrowed: the next batch tries again */
    if (want != info.me_mapsize) {
        e = tv_lmdb()->env_set_mapsize(s->env, (size_t)want);
        store_name_map(s);
        if (e != 0)
            return tv_lmdb_error(err, e, s->path, "sizing its map");
    }
    s->map_quota = quota;
    return TV_OK;
}

enum tv_err quota_room(tv_batch *b, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_store *s = b->t.s;
    MDB_txn *reader = NULL;
    uint64_t end = 0, unused = 0;
    b->room = UINT64_MAX;
    TV_TRY(quota_bound(&b->t, &b->quota, &b->bound, err));
    if (b->quota == 0)
        goto out;
    /* LMDB shows its list of free pages to read transactions only. */
    TV_TRY(txn_begin(s, MDB_RDONLY, &reader, err));
    TV_TRY(space_read(s, reader, &end, &unused, err));
    b->end_pages = end / s->page_bytes;
    const uint64_t max = quota_file_max(b->bound, s->page_bytes);
    const uint64_t used = end - unused + reserve_of(b->bound);
    b->room = max > used ? max - used : 0;
out:
    if (reader != NULL) {
        tv_lmdb()->txn_abort(reader);
        atomic_fetch_sub(&s->n_txns, 1);
    }
    return rc;
}

enum tv_err quota_check(tv_batch *b, uint64_t bytes, struct tv_error *err)
{
    uint64_t want = 0;
    if (b->room == UINT64_MAX)
        return TV_OK;
    if (tv_add_u64(b->dirty, bytes, &want) && want <= b->room)
        return TV_OK;
    char quota[32], missing[32];
    tv_format_bytes(b->quota, quota, sizeof quota);
    tv_format_bytes(want - b->room, missing, sizeof missing);
    tv_error_set(err, TV_E_NOSPACE,
                 "store %s: %s are missing to stay within its quota of %s",
                 b->t.s->path, missing, quota);
    tv_error_hint(err, "remove an object ('tvstore rm'), run 'tvstore gc', or "
                       "raise the quota ('tvstore quota')");
    return TV_E_NOSPACE;
}

enum tv_err tv_store_quota_get(tv_store *s, uint64_t *bytes,
                               struct tv_error *err)
{
    struct txn t = {.s = s, .mdb = NULL};
    enum tv_err rc = txn_begin(s, MDB_RDONLY, &t.mdb, err);
    if (rc != TV_OK)
        return rc;
    rc = quota_read(&t, bytes, err);
    tv_lmdb()->txn_abort(t.mdb);
    atomic_fetch_sub(&s->n_txns, 1);
    return rc;
}

/* A quota little above the size of the file leaves LMDB no pages to write a
 * removal with, and nothing could go any more. So derived data go before, as
 * far as the reserve asks. A quota below that size is no such limit
 * (quota_apply). */
static enum tv_err room_to_remove(tv_store *s, uint64_t quota,
                                  struct tv_error *err)
{
    MDB_envinfo info;
    const int e = tv_lmdb()->env_info(s->env, &info);
    if (e != 0)
        return tv_lmdb_error(err, e, s->path, "asking for its size");
    const uint64_t used = ((uint64_t)info.me_last_pgno + 1) * s->page_bytes;
    const uint64_t max = quota_file_max(quota, s->page_bytes);
    if (quota == 0 || max < used || max - used >= reserve_of(quota))
        return TV_OK;
    return derived_free(s, reserve_of(quota) - (max - used), err);
}

enum tv_err tv_store_quota_set(tv_store *s, uint64_t bytes,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    struct rec_key k;
    struct tv_buf buf;
    if (bytes != 0 && bytes < QUOTA_LEAST)
        return tv_error_set(err, TV_E_USAGE,
                            "a quota of %" PRIu64 " bytes is too small; the "
                            "least is %" PRIu64,
                            bytes, QUOTA_LEAST);
    TV_TRY(room_to_remove(s, bytes, err));
    TV_TRY(tv_batch_begin(s, false, err, &b));
    key_str(&k, META_QUOTA);
    rec_begin(&buf);
    rec_number_put(&buf, bytes);
    TV_TRY(db_put_rec(b, DB_META, REC_NUMBER, &k, &buf, err));
    rc = tv_batch_commit(b, err);
    b = NULL;
    if (rc == TV_OK)
        TV_TRY(quota_apply(s, bytes, err));
out:
    tv_batch_abort(b);
    return rc;
}

/* ---- stat -----------------------------------------------------------------
 */

struct use { /* one tensor entry: what it uses, for whom */
    uint64_t payload;
    uint64_t bytes;
    int kind;
};

static int use_compare(const void *x, const void *y)
{
    const struct use *a = (const struct use *)x;
    const struct use *b = (const struct use *)y;
    if (a->payload != b->payload)
        return a->payload < b->payload ? -1 : 1;
    return (a->kind > b->kind) - (a->kind < b->kind);
}

/* Adds the uses of one object to a growing array. */
static enum tv_err uses_of(const struct txn *t, uint64_t id, int kind,
                           struct use **uses, size_t *n, size_t *cap,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key k;
    bool more = false;
    key_id(&k, id);
    TV_TRY(walk_begin(&w, t, DB_TENSOR, &k, err));
    for (;;) {
        struct rec_body body;
        struct rec_tensor rt;
        const char *why = NULL;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        TV_TRY(walk_rec(&w, REC_TENSOR, &body, err));
        if (!rec_tensor_get(body, &rt, &why)) {
            rc = rec_damaged(t->s, "a tensor record", why, err);
            goto out;
        }
        if (rt.t.storage != TV_INLINE)
            continue;
        if (*n == *cap) {
            const size_t more_cap = *cap == 0 ? 256 : *cap * 2;
            struct use *p =
                (struct use *)tv_realloc(*uses, more_cap * sizeof **uses);
            if (p == NULL) {
                rc = tv_error_set(err, TV_E_NOMEM, "no memory for a list");
                goto out;
            }
            *uses = p;
            *cap = more_cap;
        }
        (*uses)[(*n)++] = (struct use){
            .payload = rt.t.payload_id, .bytes = rt.t.bytes, .kind = kind};
    }
out:
    walk_end(&w);
    return rc;
}

static int count_reader(const char *line, void *arg)
{
    /* LMDB prints a heading, then one line per reader beginning with its
     * process id; or one sentence when there is none. */
    uint64_t *n = (uint64_t *)arg;
    while (*line == ' ')
        line++;
    if (*line >= '0' && *line <= '9')
        (*n)++;
    return 0;
}

static enum tv_err pages_of(const struct txn *t, enum db db, uint64_t *bytes,
                            struct tv_error *err)
{
    MDB_stat st;
    if (!t->s->has[db])
        return TV_OK;
    const int e = tv_lmdb()->stat(t->mdb, t->s->dbi[db], &st);
    if (e != 0)
        return tv_lmdb_error(err, e, t->s->path, "measuring '%s'", db_name(db));
    *bytes += ((uint64_t)st.ms_branch_pages + st.ms_leaf_pages +
               st.ms_overflow_pages) *
              st.ms_psize;
    return TV_OK;
}

enum tv_err tv_store_stat(tv_store *s, struct tv_store_stat *out,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_store_stat st;
    struct txn t = {.s = s, .mdb = NULL};
    struct walk w = {0};
    struct use *uses = NULL;
    size_t n = 0, cap = 0;
    bool more = false;
    struct stat file;
    uint64_t end = 0, readers = 0;
    memset(&st, 0, sizeof st);
    /* Counted before our own transaction becomes one of them. */
    (void)tv_lmdb()->reader_list(s->env, count_reader, &readers);
    st.n_readers = readers;
    TV_TRY(txn_begin(s, MDB_RDONLY, &t.mdb, err));
    TV_TRY(quota_read(&t, &st.quota_bytes, err));
    TV_TRY(charges_read(&t, &st.charged_bytes, err));
    TV_TRY(derived_stat(&t, &st, err));
    TV_TRY(tv_disk_used(s->path, &st.used_bytes, err));
    memset(&file, 0, sizeof file);
    if (tv_sys()->stat(s->data_path, &file) == 0)
        st.file_bytes = (uint64_t)file.st_size;
    TV_TRY(space_read(s, t.mdb, &end, &st.free_bytes, err));
    /* What a killed writer wrote behind the last page that counts. */
    const uint64_t on_disk = (uint64_t)file.st_blocks * 512u;
    const uint64_t whole = on_disk < st.file_bytes ? on_disk : st.file_bytes;
    if (whole > end)
        st.free_bytes += whole - end;
    TV_TRY(pages_of(&t, DB_RUN, &st.journal, err));
    TV_TRY(pages_of(&t, DB_DONE, &st.journal, err));
    TV_TRY(pages_of(&t, DB_PIN, &st.journal, err));

    TV_TRY(walk_begin(&w, &t, DB_OBJECT, NULL, err));
    for (;;) {
        struct rec_body body;
        struct rec_object o;
        const char *why = NULL;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        TV_TRY(walk_rec(&w, REC_OBJECT, &body, err));
        if (!rec_object_get(body, &o, &why)) {
            rc = rec_damaged(s, "an object record", why, err);
            goto out;
        }
        st.n_objects += o.state == REC_COMPLETE;
        TV_TRY(uses_of(&t, o.id, o.kind, &uses, &n, &cap, err));
    }
    if (n > 0)
        qsort(uses, n, sizeof *uses, use_compare);
    for (size_t i = 0; i < n; i++) {
        if (i > 0 && uses[i].payload == uses[i - 1].payload) {
            st.dedup_saved_bytes += uses[i].bytes;
            continue;
        }
        if (uses[i].kind == TV_KIND_MODEL)
            st.weights += uses[i].bytes;
        else if (uses[i].kind == TV_KIND_ADAPTER)
            st.adapters += uses[i].bytes;
        else
            st.outputs += uses[i].bytes;
    }
    *out = st;
out:
    walk_end(&w);
    if (t.mdb != NULL) {
        tv_lmdb()->txn_abort(t.mdb);
        atomic_fetch_sub(&s->n_txns, 1);
    }
    tv_free(uses);
    return rc;
}
