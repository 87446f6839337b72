/* SPDX-License-Identifier: Apache-2.0 */
/*
 * journal.c - runs, their finished tensors, and what they pin.
 *
 * `run` holds a document of merge/ that this folder does not read. `done` is
 * written in the batch that makes a tensor durable, so that what it says is
 * true after any interruption. A pin keeps an object from removal for as long
 * as its run is there.
 */
#include "store_priv.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

#define RUN_NAME_MAX    128u
#define STATE_BYTES_MAX ((size_t)256 << 20)

static enum tv_err run_check(const char *run, struct tv_error *err)
{
    const size_t n = strlen(run);
    if (n >= 1 && n <= RUN_NAME_MAX)
        return TV_OK;
    return tv_error_set(err, TV_E_INTERNAL,
                        "a run id of %zu bytes: 1 to %u are allowed", n,
                        RUN_NAME_MAX);
}

enum tv_err tv_run_put(tv_batch *b, const char *run, const void *state,
                       size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    const uint64_t before = b->n_writes;
    TV_TRY(batch_check(b, err));
    TV_TRY(run_check(run, err));
    if (n > STATE_BYTES_MAX) {
        rc = tv_error_set(err, TV_E_INTERNAL, "state of run '%s' has %zu bytes",
                          run, n);
        goto out;
    }
    key_str(&k, run);
    TV_TRY(long_put(b, DB_RUN, REC_RUN, &k, state, n, err));
    b->dirty += n;
out:
    return batch_end(b, before, rc);
}

enum tv_err tv_run_get(tv_read *r, const char *run, bool *found, char **state,
                       size_t *n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    struct rec_body body;
    struct arena a = {NULL};
    char what[RUN_NAME_MAX + 32];
    *found = false;
    *state = NULL;
    *n = 0;
    TV_TRY(run_check(run, err));
    key_str(&k, run);
    (void)snprintf(what, sizeof what, "the state of run '%s'", run);
    TV_TRY(long_get(&r->t, DB_RUN, REC_RUN, &k, &a, found, &body, what, err));
    if (!*found)
        goto out;
    *state = (char *)tv_alloc(body.n + 1);
    if (*state == NULL) {
        *found = false;
        rc = tv_error_set(err, TV_E_NOMEM, "no memory for a run's state");
        goto out;
    }
    memcpy(*state, body.p, body.n);
    (*state)[body.n] = '\0'; /* not counted; spares text readers a copy */
    *n = body.n;
out:
    arena_clear(&a);
    return rc;
}

/* Deletes every key that starts with a run's prefix. */
static enum tv_err drop_all(tv_batch *b, enum db db, const char *run,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key prefix, k;
    bool more = true;
    key_run_prefix(&prefix, run);
    while (more) {
        TV_TRY(walk_begin(&w, &b->t, db, &prefix, err));
        TV_TRY(walk_next(&w, &more, err));
        if (more) {
            k.n = w.key.mv_size <= sizeof k.b ? w.key.mv_size : 0;
            memcpy(k.b, w.key.mv_data, k.n);
        }
        walk_end(&w);
        if (more)
            TV_TRY(db_del(b, db, &k, NULL, err));
    }
out:
    walk_end(&w);
    return rc;
}

enum tv_err tv_run_drop(tv_batch *b, const char *run, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    const uint64_t before = b->n_writes;
    TV_TRY(batch_check(b, err));
    TV_TRY(run_check(run, err));
    key_str(&k, run);
    TV_TRY(long_del(b, DB_RUN, &k, err));
    TV_TRY(drop_all(b, DB_DONE, run, err));
    TV_TRY(drop_all(b, DB_PIN, run, err));
out:
    return batch_end(b, before, rc);
}

enum tv_err tv_run_list(tv_read *r, struct tv_error *err, char ***names,
                        size_t *n_out)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    char **list = NULL;
    size_t n = 0, cap = 0;
    bool more = true;
    *names = NULL;
    *n_out = 0;
    TV_TRY(walk_begin(&w, &r->t, DB_RUN, NULL, err));
    while (more || list == NULL) {
        if (n == cap) {
            cap = cap == 0 ? 8 : cap * 2;
            char **p = (char **)tv_realloc(list, cap * sizeof *list);
            if (p == NULL) {
                rc = tv_error_set(err, TV_E_NOMEM, "no memory for a list");
                goto out;
            }
            list = p;
        }
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        if (piece_key(DB_RUN, w.key.mv_data, w.key.mv_size))
            continue;
        list[n] = tv_strndup((const char *)w.key.mv_data, w.key.mv_size);
        if (list[n] == NULL) {
            rc = tv_error_set(err, TV_E_NOMEM, "no memory for a list");
            goto out;
        }
        n++;
    }
    *names = list;
    *n_out = n;
    list = NULL;
out:
    walk_end(&w);
    if (list != NULL)
        tv_dir_list_free(list, n);
    return rc;
}

/* ---- finished tensors -----------------------------------------------------
 */

enum tv_err tv_done_put(tv_batch *b, const char *run, const struct tv_done *d,
                        struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    struct tv_buf buf;
    MDB_val val = {0, NULL};
    bool found = false;
    const uint64_t before = b->n_writes;
    const struct rec_done r = {.shard = d->shard,
                               .offset = d->offset,
                               .bytes = d->bytes,
                               .n_nonfinite_in = d->n_nonfinite_in,
                               .n_nonfinite_out = d->n_nonfinite_out,
                               .checksum = d->checksum,
                               .name = {.s = d->name, .n = strlen(d->name)}};
    TV_TRY(batch_check(b, err));
    TV_TRY(run_check(run, err));
    if (r.name.n == 0 || r.name.n > TV_NAME_MAX) {
        rc = tv_error_set(err, TV_E_INTERNAL, "a tensor name of %zu bytes",
                          r.name.n);
        goto out;
    }
    key_done(&k, run, d->name);
    TV_TRY(db_get(&b->t, DB_DONE, &k, &found, &val, err));
    if (found) {
        struct rec_body body;
        struct rec_done old;
        const char *why = NULL;
        if (rec_open(REC_DONE, k.b, k.n, val.mv_data, val.mv_size, &body,
                     &why) &&
            rec_done_get(body, &old, &why) &&
            (old.name.n != r.name.n ||
             memcmp(old.name.s, r.name.s, r.name.n) != 0)) {
            char shown[SHOW_BYTES];
            rc = tv_error_set(err, TV_E_UNSUPPORTED,
                              "tensor '%s' has the same key as another tensor",
                              show(d->name, shown));
            goto out;
        }
    }
    rec_begin(&buf);
    rec_done_put(&buf, &r);
    TV_TRY(db_put_rec(b, DB_DONE, REC_DONE, &k, &buf, err));
out:
    return batch_end(b, before, rc);
}

void tv_done_list_free(struct tv_done_list *l)
{
    if (l == NULL)
        return;
    tv_free(l->items);
    tv_free(l->storage);
    tv_free(l);
}

static int done_compare(const void *x, const void *y)
{
    return tv_name_compare(((const struct tv_done *)x)->name,
                           ((const struct tv_done *)y)->name);
}

enum tv_err tv_done_list(tv_read *r, const char *run, struct tv_error *err,
                         struct tv_done_list **out)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key prefix;
    struct tv_buf names;
    struct tv_done *items = NULL;
    struct tv_done_list *list = NULL;
    size_t n = 0, cap = 0;
    bool more = false;
    *out = NULL;
    tv_buf_init(&names, (size_t)1 << 32);
    TV_TRY(run_check(run, err));
    key_run_prefix(&prefix, run);
    TV_TRY(walk_begin(&w, &r->t, DB_DONE, &prefix, err));
    for (;;) {
        struct rec_body body;
        struct rec_done d;
        const char *why = NULL;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        TV_TRY(walk_rec(&w, REC_DONE, &body, err));
        if (!rec_done_get(body, &d, &why)) {
            rc = rec_damaged(r->t.s, "a journal record", why, err);
            goto out;
        }
        if (n == cap) {
            cap = cap == 0 ? 64 : cap * 2;
            struct tv_done *p =
                (struct tv_done *)tv_realloc(items, cap * sizeof *items);
            if (p == NULL) {
                rc = tv_error_set(err, TV_E_NOMEM, "no memory for a list");
                goto out;
            }
            items = p;
        }
        items[n++] = (struct tv_done){.shard = d.shard,
                                      .offset = d.offset,
                                      .bytes = d.bytes,
                                      .checksum = d.checksum,
                                      .n_nonfinite_in = d.n_nonfinite_in,
                                      .n_nonfinite_out = d.n_nonfinite_out};
        tv_buf_add(&names, d.name.s, d.name.n);
        tv_buf_add(&names, "", 1);
    }
    TV_TRY(tv_buf_ok(&names, err));
    list = (struct tv_done_list *)tv_calloc(1, sizeof *list);
    if (list == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "no memory for a list");
        goto out;
    }
    const char *at = names.data;
    for (size_t i = 0; i < n; i++) {
        items[i].name = at;
        at += strlen(at) + 1;
    }
    if (n > 0)
        qsort(items, n, sizeof *items, done_compare);
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

/* ---- pins -----------------------------------------------------------------
 */

enum tv_err tv_pin_put(tv_batch *b, const char *run, uint64_t object_id,
                       struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    struct tv_buf buf;
    struct rec_object_id rid;
    char name[TV_OBJECT_NAME_MAX + 1];
    bool found = false;
    const uint64_t before = b->n_writes;
    TV_TRY(batch_check(b, err));
    TV_TRY(run_check(run, err));
    TV_TRY(object_id_get(&b->t, object_id, &found, &rid, name, err));
    if (!found || rid.state == REC_DOOMED) {
        rc = tv_error_set(err, TV_E_NOTFOUND,
                          "store %s: no object with id %" PRIu64
                          " to pin (was it removed?)",
                          b->t.s->path, object_id);
        goto out;
    }
    key_pin(&k, run, object_id);
    rec_begin(&buf);
    TV_TRY(db_put_rec(b, DB_PIN, REC_PIN, &k, &buf, err));
out:
    return batch_end(b, before, rc);
}

enum tv_err pin_find(const struct txn *t, uint64_t object_id,
                     const char *except, bool *pinned,
                     char run[TV_REC_KEY_MAX + 1], struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    bool more = false;
    *pinned = false;
    TV_TRY(walk_begin(&w, t, DB_PIN, NULL, err));
    while (!*pinned) {
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        if (w.key.mv_size < 10 || w.key.mv_size > TV_REC_KEY_MAX)
            continue;
        const size_t n = w.key.mv_size - 9;
        if (key_get_id(&w.key, n + 1) != object_id)
            continue;
        memcpy(run, w.key.mv_data, n);
        run[n] = '\0';
        uint64_t session = 0;
        *pinned = derived_pin_session(&w.key, &session)
                      ? session_alive(t->s, session)
                      : strcmp(run, except) != 0;
    }
out:
    walk_end(&w);
    return rc;
}
