/* SPDX-License-Identifier: Apache-2.0 */
/*
 * derived_pins.c - which derived items a process is going to use, so that
 * nobody evicts them: records '@' session 0 item id, which count as long as the
 * session lives (session.c).
 */
#include "derived_priv.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

void derived_pin_name(uint64_t session, char name[PIN_HEAD + 1])
{
    (void)snprintf(name, PIN_HEAD + 1, "@%016" PRIx64, session);
}

bool session_named(const char *name, size_t n, uint64_t *session)
{
    char digits[17];
    if (n != PIN_HEAD || name[0] != '@')
        return false;
    memcpy(digits, name + 1, 16);
    digits[16] = '\0';
    char *end = NULL;
    *session = strtoull(digits, &end, 16);
    return *end == '\0';
}

bool derived_pin_session(const MDB_val *key, uint64_t *session)
{
    const char *s = (const char *)key->mv_data;
    return key->mv_size == PIN_HEAD + 9 && s[PIN_HEAD] == '\0' &&
           session_named(s, PIN_HEAD, session);
}

static int id_compare(const void *x, const void *y)
{
    const uint64_t a = *(const uint64_t *)x, b = *(const uint64_t *)y;
    return (a > b) - (a < b);
}

void derived_pins_free(struct derived_pins *p)
{
    tv_free(p->ids);
    *p = (struct derived_pins){.ids = NULL};
}

enum tv_err derived_pins_read(const struct txn *t, struct derived_pins *out,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key prefix;
    uint64_t last = 0;
    bool more = false, alive = false, asked = false;
    *out = (struct derived_pins){.ids = NULL};
    key_str(&prefix, "@");
    TV_TRY(walk_begin(&w, t, DB_PIN, &prefix, err));
    for (;;) {
        uint64_t session = 0;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        if (!derived_pin_session(&w.key, &session))
            continue;
        if (!asked || session != last)
            alive = session_alive(t->s, session);
        asked = true;
        last = session;
        if (!alive)
            continue;
        if (out->n == out->cap) {
            const size_t cap = out->cap == 0 ? 64 : out->cap * 2;
            uint64_t *p = (uint64_t *)tv_realloc(out->ids, cap * sizeof *p);
            if (p == NULL) {
                rc = tv_error_set(err, TV_E_NOMEM, "no memory for a list");
                goto out;
            }
            out->ids = p;
            out->cap = cap;
        }
        out->ids[out->n++] = key_get_id(&w.key, PIN_HEAD + 1);
    }
    if (out->n > 0)
        qsort(out->ids, out->n, sizeof *out->ids, id_compare);
out:
    walk_end(&w);
    if (rc != TV_OK)
        derived_pins_free(out);
    return rc;
}

bool derived_pinned(const struct derived_pins *p, uint64_t id)
{
    return p->n > 0 &&
           bsearch(&id, p->ids, p->n, sizeof *p->ids, id_compare) != NULL;
}

enum tv_err tv_derived_pin(tv_store *s, const struct tv_derived_key *keys,
                           size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    char name[PIN_HEAD + 1];
    if (n == 0 || s->read_only || !session_hold(s))
        return TV_OK;
    derived_pin_name(s->session, name);
    TV_TRY(tv_batch_begin(s, true, err, &b));
    for (size_t i = 0; i < n; i++) {
        struct rec_key k;
        struct rec_derived r;
        struct tv_buf buf;
        bool found = false;
        key_derived(&k, keys[i].score, keys[i].tensor);
        TV_TRY(derived_get(&b->t, keys[i].kind, &k, &found, &r, err));
        if (!found || r.state != REC_COMPLETE)
            continue;
        key_pin(&k, name, r.id);
        rec_begin(&buf);
        TV_TRY(db_put_rec(b, DB_PIN, REC_PIN, &k, &buf, err));
    }
    rc = tv_batch_commit(b, err);
    b = NULL;
out:
    tv_batch_abort(b);
    return rc;
}

enum tv_err derived_drop_pins(tv_batch *b, bool own, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key prefix;
    struct tv_buf keys;
    bool more = false;
    tv_buf_init(&keys, (size_t)1 << 30);
    key_str(&prefix, "@");
    TV_TRY(walk_begin(&w, &b->t, DB_PIN, &prefix, err));
    for (;;) {
        uint64_t session = 0;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        if (w.key.mv_size == PIN_HEAD + 9 &&
            derived_pin_session(&w.key, &session) &&
            (own ? session == b->t.s->session
                 : !session_alive(b->t.s, session)))
            tv_buf_add(&keys, w.key.mv_data, w.key.mv_size);
    }
    walk_end(&w);
    TV_TRY(tv_buf_ok(&keys, err));
    for (size_t at = 0; at < keys.n_bytes; at += PIN_HEAD + 9) {
        struct rec_key k = {.n = PIN_HEAD + 9};
        memcpy(k.b, keys.data + at, k.n);
        TV_TRY(db_del(b, DB_PIN, &k, NULL, err));
    }
out:
    walk_end(&w);
    tv_buf_free(&keys);
    return rc;
}

static enum tv_err note_use(tv_store *s, const struct tv_derived_key *keys,
                            size_t n, bool unpin, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    if (s->read_only || (n == 0 && !unpin))
        return TV_OK;
    TV_TRY(tv_batch_begin(s, false, err, &b));
    if (unpin)
        TV_TRY(derived_drop_pins(b, true, err));
    for (size_t i = 0; i < n; i++) {
        struct rec_key k;
        struct rec_derived r;
        bool found = false;
        key_derived(&k, keys[i].score, keys[i].tensor);
        TV_TRY(derived_get(&b->t, keys[i].kind, &k, &found, &r, err));
        if (found && r.state == REC_COMPLETE) {
            char name[TV_NAME_MAX + 1];
            /* The record is rewritten: its text must not lie in it. */
            memcpy(name, r.name.s, r.name.n);
            r.name.s = name;
            TV_TRY(derived_touch(b, keys[i].kind, &k, &r, err));
        }
    }
    rc = tv_batch_commit(b, err);
    b = NULL;
out:
    tv_batch_abort(b);
    return rc;
}

enum tv_err tv_derived_used(tv_store *s, const struct tv_derived_key *keys,
                            size_t n, struct tv_error *err)
{
    return note_use(s, keys, n, false, err);
}

enum tv_err tv_derived_release(tv_store *s, const struct tv_derived_key *keys,
                               size_t n, struct tv_error *err)
{
    return note_use(s, keys, n, true, err);
}
