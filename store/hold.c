/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hold.c - objects that are kept while this process reads them.
 *
 * A merge that may go on tomorrow pins what it reads under its run (journal.c).
 * Who only reads has no run: its pins are records '@' session 0 object id like
 * those of derived items (evict.c; objects and items are numbered by one
 * counter), and count as long as the session lives. So kill -9 leaves nothing
 * that holds anybody up, and gc sweeps what is left of it.
 */
#include "derived_priv.h"

#include <inttypes.h>

/* Behind the lock of long work, without waiting: readers never wait. */
static enum tv_err put_pins(tv_store *s, const uint64_t *ids, size_t n,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    char name[PIN_HEAD + 1];
    derived_pin_name(s->session, name);
    TV_TRY(tv_batch_begin(s, true, err, &b));
    for (size_t i = 0; i < n; i++)
        TV_TRY(tv_pin_put(b, name, ids[i], err));
    rc = tv_batch_commit(b, err);
    b = NULL;
out:
    tv_batch_abort(b);
    return rc;
}

enum tv_err tv_object_hold(tv_store *s, const uint64_t *ids, size_t n,
                           bool *held, struct tv_error *err)
{
    *held = n == 0;
    if (n == 0 || s->read_only || !session_hold(s) ||
        tv_store_lock(s, "reading", 0, NULL) != TV_OK)
        return TV_OK;
    const enum tv_err rc = put_pins(s, ids, n, err);
    tv_store_unlock(s);
    *held = rc == TV_OK;
    if (rc == TV_E_NOTFOUND)
        return rc;
    /* A full store is no reason not to read it. */
    tv_error_clear(err);
    return TV_OK;
}

void tv_object_let_go(tv_store *s, const uint64_t *ids, size_t n)
{
    tv_batch *b = NULL;
    char name[PIN_HEAD + 1];
    bool good = true;
    /* What cannot be dropped now counts no more once the session ends. */
    if (n == 0 || s->read_only || tv_store_lock(s, "reading", 0, NULL) != TV_OK)
        return;
    derived_pin_name(s->session, name);
    good = tv_batch_begin(s, true, NULL, &b) == TV_OK;
    for (size_t i = 0; good && i < n; i++) {
        struct rec_key k;
        key_pin(&k, name, ids[i]);
        good = db_del(b, DB_PIN, &k, NULL, NULL) == TV_OK;
    }
    if (good) {
        good = tv_batch_commit(b, NULL) == TV_OK;
        b = NULL;
    }
    tv_batch_abort(b);
    tv_store_unlock(s);
    (void)good;
}
