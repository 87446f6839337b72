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
#include "validate_parts.h"

#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"

void verify_problem(struct verify *v, const char *object, const char *tensor,
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

void verify_advance(struct verify *v, uint64_t bytes)
{
    v->done += bytes;
    if (v->progress != NULL)
        v->progress(v->arg, v->done, v->total);
}

enum tv_err verify_note(struct verify *v, enum tv_err rc, const char *object,
                        const char *tensor, struct tv_error *err)
{
    if (rc != TV_E_CORRUPT)
        return rc;
    verify_problem(v, object, tensor, "%s", err->msg);
    tv_error_clear(err);
    return TV_OK;
}

static int id_compare(const void *x, const void *y)
{
    const uint64_t a = *(const uint64_t *)x, b = *(const uint64_t *)y;
    return (a > b) - (a < b);
}

static void derived_found(void *arg, const char *tensor, const char *what)
{
    verify_problem((struct verify *)arg, "", tensor, "%s", what);
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
        verify_problem(v, "", "", "the id counter is missing or damaged");
    return verify_note(v, rc, "", "", err);
}

/* Bytes that will be hashed, for progress; damage is met again later. */
static enum tv_err total_read(struct verify *v, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    bool more = false;
    TV_TRY(walk_begin(&w, &v->t, DB_PAYLOAD, NULL, err));
    uint64_t guard = 0, count = 0;
    TV_TRY(
        verify_note(v, db_count(&v->t, DB_PAYLOAD, &count, err), "", "", err));
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
    TV_TRY(
        verify_note(v, db_count(&v->t, DB_TENSOR, &count, err), "", "", err));
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

enum tv_err tv_store_check_trees(tv_store *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct verify v;
    struct tv_error own;
    memset(&v, 0, sizeof v);
    tv_error_clear(&own);
    TV_TRY(tv_read_begin(s, &own, &v.read));
    v.t = v.read->t;
    TV_TRY(verify_free_read(&v, &own));
    for (int db = 0; db < DB_COUNT; db++)
        TV_TRY(verify_each(&v, (enum db)db, verify_no_entry, &own));
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
    static const enum db tables[] = {
        DB_META,    DB_OBJECT, DB_OBJECT_ID, DB_SOURCE, DB_TENSOR,
        DB_PAYLOAD, DB_LEAF,   DB_CONTENT,   DB_CHUNK,  DB_BLOB,
        DB_TRASH,   DB_RUN,    DB_DONE,      DB_PIN,    DB_MASK,
        DB_DELTA,   DB_GROUP,  DB_USE,       DB_CHARGE, DB_STAT};
    _Static_assert(sizeof tables / sizeof tables[0] == DB_COUNT, "all tables");
    enum tv_err rc = TV_OK;
    struct verify v;
    struct tv_error own; /* problems are read from it even without err */
    memset(&v, 0, sizeof v);
    tv_error_clear(&own);
    v.on_problem = on_problem;
    v.progress = progress;
    v.arg = arg;
    TV_TRY(verify_bytes_begin(&v, n_threads, &own));
    TV_TRY(tv_read_begin(s, &own, &v.read));
    v.t = v.read->t;
    TV_TRY(meta_read(&v, &own));
    TV_TRY(verify_free_read(&v, &own));
    TV_TRY(total_read(&v, &own));
    for (size_t i = 0; i < DB_COUNT; i++) {
        TV_TRY(verify_each(&v, tables[i], verify_entry_of(tables[i]), &own));
        if (tables[i] == DB_TENSOR && v.n_uses > 0)
            qsort(v.uses, v.n_uses, sizeof *v.uses, id_compare);
        if (tables[i] == DB_PAYLOAD)
            TV_TRY(verify_payloads_end(&v, &own));
    }
    TV_TRY(derived_verify(&v.t, derived_found, &v, &own));
    if (v.n_problems > 0)
        rc = tv_error_set(&own, TV_E_CORRUPT,
                          "store %s: %" PRIu64 " verify_problem%s found",
                          s->path, v.n_problems, v.n_problems == 1 ? "" : "s");
out:
    verify_bytes_end(&v);
    tv_read_end(v.read);
    tv_free(v.uses);
    tv_free(v.free_pages);
    if (rc != TV_OK && err != NULL)
        *err = own;
    return rc;
}
