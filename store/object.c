/* SPDX-License-Identifier: Apache-2.0 */
/*
 * object.c - objects and their side files.
 *
 * An object has two records: `object`, found by name, with what is said once,
 * and `object_id`, found by id, with what changes with every tensor. While it
 * is unfinished its name carries a suffix, so that a complete object of the
 * same name stays visible until the swap of tv_object_complete.
 *
 * Removal makes the object unfindable at once and leaves its id in `trash`;
 * trash.c frees the space in bounded batches.
 *
 * Side files are found by the digest of their bytes and not counted: objects
 * are few, so whether another one uses a file is asked of them all.
 */
#include "store_priv.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

#define FILES_MAX      4096u
#define FILE_NAME_MAX  255u
#define FILE_BYTES_MAX ((size_t)512 << 20)
#define TEXT_MAX       ((size_t)64 << 10)

static bool name_ok(const char *name)
{
    size_t n = 0;
    for (; name[n] != '\0'; n++) {
        const char c = name[n];
        if (!((c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
              (c >= '0' && c <= '9') || c == '.' || c == '_' || c == '-'))
            return false;
    }
    return n >= 1 && n <= TV_OBJECT_NAME_MAX;
}

static enum tv_err name_check(const char *name, struct tv_error *err)
{
    if (name_ok(name))
        return TV_OK;
    char shown[SHOW_BYTES];
    return tv_error_set(err, TV_E_USAGE,
                        "object name '%s': 1 to %u letters, digits, '.', '_' "
                        "or '-' are allowed",
                        show(name, shown), TV_OBJECT_NAME_MAX);
}

/* ---- records --------------------------------------------------------------
 */

static void copy_name(char dst[TV_OBJECT_NAME_MAX + 1], struct rec_text name)
{
    const size_t n = name.n <= TV_OBJECT_NAME_MAX ? name.n : TV_OBJECT_NAME_MAX;
    memcpy(dst, name.s, n);
    dst[n] = '\0';
}

enum tv_err object_id_get(const struct txn *t, uint64_t id, bool *found,
                          struct rec_object_id *r,
                          char name[TV_OBJECT_NAME_MAX + 1],
                          struct tv_error *err)
{
    struct rec_key k;
    struct rec_body body;
    const char *why = NULL;
    key_id(&k, id);
    const enum tv_err rc = db_get_rec(t, DB_OBJECT_ID, REC_OBJECT_ID, &k, found,
                                      &body, "an object record", err);
    if (rc != TV_OK || !*found)
        return rc;
    if (!rec_object_id_get(body, r, &why))
        return rec_damaged(t->s, "an object record", why, err);
    copy_name(name, r->name);
    r->name = (struct rec_text){.s = name, .n = strlen(name)};
    return TV_OK;
}

enum tv_err object_id_put(tv_batch *b, uint64_t id,
                          const struct rec_object_id *r, struct tv_error *err)
{
    struct rec_key k;
    struct tv_buf buf;
    key_id(&k, id);
    rec_begin(&buf);
    rec_object_id_put(&buf, r);
    return db_put_rec(b, DB_OBJECT_ID, REC_OBJECT_ID, &k, &buf, err);
}

enum tv_err object_writable(tv_batch *b, uint64_t id, struct rec_object_id *r,
                            char name[TV_OBJECT_NAME_MAX + 1],
                            struct tv_error *err)
{
    bool found = false;
    enum tv_err rc = batch_check(b, err);
    if (rc == TV_OK)
        rc = object_id_get(&b->t, id, &found, r, name, err);
    if (rc != TV_OK)
        return rc;
    if (!found || r->state == REC_DOOMED)
        return tv_error_set(err, TV_E_NOTFOUND,
                            "store %s: no object with id %" PRIu64,
                            b->t.s->path, id);
    if (r->state != REC_PARTIAL)
        return tv_error_set(err, TV_E_INTERNAL,
                            "store %s: object '%s' is complete and cannot be "
                            "written to",
                            b->t.s->path, name);
    return TV_OK;
}

/* The record under a name; borrowed until the next write. */
static enum tv_err object_get(const struct txn *t, const char *name,
                              bool partial, bool *found, struct rec_object *o,
                              struct tv_error *err)
{
    struct rec_key k;
    struct rec_body body;
    const char *why = NULL;
    char what[TV_OBJECT_NAME_MAX + 32];
    key_object(&k, name, partial);
    (void)snprintf(what, sizeof what, "the record of object '%s'", name);
    const enum tv_err rc =
        db_get_rec(t, DB_OBJECT, REC_OBJECT, &k, found, &body, what, err);
    if (rc != TV_OK || !*found)
        return rc;
    if (!rec_object_get(body, o, &why) ||
        o->state != (partial ? REC_PARTIAL : REC_COMPLETE))
        return rec_damaged(t->s, what, why != NULL ? why : "wrong state", err);
    return TV_OK;
}

/* ---- reading --------------------------------------------------------------
 */

struct object_box { /* what tv_object_free gets */
    struct tv_object o;
    char *text; /* name, architecture, source path, file names */
};

void tv_object_free(struct tv_object *o)
{
    if (o == NULL)
        return;
    struct object_box *box = (struct object_box *)(void *)o;
    tv_free(box->o.files);
    tv_free(box->text);
    tv_free(box);
}

static char *put_text(char **at, struct rec_text t)
{
    char *s = *at;
    memcpy(s, t.s, t.n);
    s[t.n] = '\0';
    *at += t.n + 1;
    return s;
}

static enum tv_err object_make(const struct txn *t, const char *name,
                               const struct rec_object *rec,
                               struct tv_error *err, struct tv_object **out)
{
    enum tv_err rc = TV_OK;
    struct rec_object_id rid;
    char id_name[TV_OBJECT_NAME_MAX + 1];
    bool found = false;
    struct object_box *box = (struct object_box *)tv_calloc(1, sizeof *box);
    if (box == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for object '%s'", name);
    struct tv_object *o = &box->o;
    TV_TRY(object_id_get(t, rec->id, &found, &rid, id_name, err));
    if (!found || rid.state != rec->state || strcmp(id_name, name) != 0) {
        char what[TV_OBJECT_NAME_MAX + 32];
        (void)snprintf(what, sizeof what, "object '%s'", name);
        rc = rec_damaged(t->s, what, "its two records do not agree", err);
        goto out;
    }
    o->files =
        (struct tv_side_file *)tv_calloc(rec->n_files + 1u, sizeof *o->files);
    /* Every stored text is shorter than the record it came from. */
    box->text = (char *)tv_alloc(strlen(name) + rec->architecture.n +
                                 rec->source_path.n + rec->files_bytes + 16);
    if (o->files == NULL || box->text == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "no memory for object '%s'", name);
        goto out;
    }
    char *at = box->text;
    o->id = rec->id;
    o->kind = (enum tv_kind)rec->kind;
    o->complete = rec->state == REC_COMPLETE;
    o->linked = rid.n_linked > 0;
    o->name = put_text(&at, (struct rec_text){.s = name, .n = strlen(name)});
    o->architecture = put_text(&at, rec->architecture);
    o->source_path = put_text(&at, rec->source_path);
    o->source_fingerprint = rec->fingerprint;
    o->n_tensors = rid.n_tensors;
    o->bytes = rid.bytes;
    struct rec_body files = {.p = rec->files, .n = rec->files_bytes};
    struct rec_file f;
    while (o->n_files < rec->n_files && rec_file_next(&files, &f)) {
        struct tv_side_file *to = &o->files[o->n_files++];
        to->name = put_text(&at, f.name);
        to->bytes = f.bytes;
        to->digest = f.digest;
    }
    *out = o;
    box = NULL;
out:
    if (box != NULL)
        tv_object_free(&box->o);
    return rc;
}

/* Says what is there instead. */
static enum tv_err not_found(const struct txn *t, const char *name,
                             struct tv_error *err)
{
    enum tv_err rc = TV_E_NOTFOUND;
    struct walk w = {0};
    struct tv_buf words;
    const char **list = NULL;
    size_t n = 0;
    bool more = false;
    tv_buf_init(&words, 1u << 24);
    tv_error_set(err, TV_E_NOTFOUND, "store %s has no object '%s'", t->s->path,
                 name);
    if (walk_begin(&w, t, DB_OBJECT, NULL, NULL) != TV_OK)
        goto out;
    while (walk_next(&w, &more, NULL) == TV_OK && more) {
        if (memchr(w.key.mv_data, '\0', w.key.mv_size) != NULL)
            continue;
        tv_buf_add(&words, w.key.mv_data, w.key.mv_size);
        tv_buf_add(&words, "", 1);
        n++;
    }
    if (n == 0 || tv_buf_ok(&words, NULL) != TV_OK)
        goto out;
    list = (const char **)tv_calloc(n, sizeof *list);
    if (list == NULL)
        goto out;
    const char *at = words.data;
    for (size_t i = 0; i < n; i++) {
        list[i] = at;
        at += strlen(at) + 1;
    }
    const char *near = tv_suggest(name, list, n);
    if (near != NULL)
        tv_error_hint(err, "did you mean '%s'?", near);
    else
        tv_error_hint(err, "'tvstore ls %s' lists its objects", t->s->path);
out:
    walk_end(&w);
    tv_buf_free(&words);
    tv_free((void *)list);
    return rc;
}

enum tv_err tv_object_find(tv_read *r, const char *name, bool partial,
                           struct tv_error *err, struct tv_object **out)
{
    enum tv_err rc = TV_OK;
    struct rec_object rec;
    bool found = false;
    *out = NULL;
    TV_TRY(name_check(name, err));
    TV_TRY(object_get(&r->t, name, false, &found, &rec, err));
    if (!found && partial)
        TV_TRY(object_get(&r->t, name, true, &found, &rec, err));
    if (!found)
        return not_found(&r->t, name, err);
    TV_TRY(object_make(&r->t, name, &rec, err, out));
out:
    return rc;
}

enum tv_err tv_object_list(tv_read *r, bool partial, struct tv_error *err,
                           struct tv_object ***out, size_t *n_out)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct tv_object **list = NULL;
    size_t n = 0, cap = 0;
    bool more = false;
    *out = NULL;
    *n_out = 0;
    TV_TRY(walk_begin(&w, &r->t, DB_OBJECT, NULL, err));
    for (;;) {
        struct rec_body body;
        struct rec_object rec;
        const char *why = NULL;
        char name[TV_OBJECT_NAME_MAX + 1];
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        TV_TRY(walk_rec(&w, REC_OBJECT, &body, err));
        if (!rec_object_get(body, &rec, &why)) {
            rc = rec_damaged(r->t.s, "an object record", why, err);
            goto out;
        }
        if (rec.state != REC_COMPLETE && !partial)
            continue;
        copy_name(name,
                  (struct rec_text){.s = (const char *)w.key.mv_data,
                                    .n = strnlen((const char *)w.key.mv_data,
                                                 w.key.mv_size)});
        if (n == cap) {
            cap = cap == 0 ? 16 : cap * 2;
            struct tv_object **p =
                (struct tv_object **)tv_realloc(list, cap * sizeof *list);
            if (p == NULL) {
                rc = tv_error_set(err, TV_E_NOMEM, "no memory for a list");
                goto out;
            }
            list = p;
        }
        TV_TRY(object_make(&r->t, name, &rec, err, &list[n]));
        n++;
    }
    if (list == NULL) {
        list = (struct tv_object **)tv_alloc(0);
        if (list == NULL)
            rc = tv_error_set(err, TV_E_NOMEM, "no memory for a list");
    }
    if (rc == TV_OK) {
        *out = list;
        *n_out = n;
        list = NULL;
        n = 0;
    }
out:
    walk_end(&w);
    for (size_t i = 0; i < n; i++)
        tv_object_free(list[i]);
    tv_free(list);
    return rc;
}

enum tv_err tv_blob_get(tv_read *r, struct tv_hash digest, const void **data,
                        size_t *n, struct tv_error *err)
{
    struct rec_key k;
    struct rec_body body;
    bool found = false;
    char hex[33], what[64];
    key_digest(&k, digest);
    (void)snprintf(what, sizeof what, "side file %s", tv_hash_hex(digest, hex));
    const enum tv_err rc = long_get(&r->t, DB_BLOB, REC_BLOB, &k, &r->arena,
                                    &found, &body, what, err);
    if (rc != TV_OK)
        return rc;
    if (!found)
        return rec_damaged(r->t.s, what, "it is missing", err);
    if (!tv_hash_equal(tv_hash128(body.p, body.n), digest))
        return rec_damaged(r->t.s, what, "checksum mismatch", err);
    *data = body.p;
    *n = body.n;
    return TV_OK;
}

/* ---- writing --------------------------------------------------------------
 */

static struct rec_text text_of(const char *s)
{
    return (struct rec_text){.s = s != NULL ? s : "",
                             .n = s != NULL ? strlen(s) : 0};
}

static enum tv_err object_put(tv_batch *b, const char *name, bool partial,
                              const struct rec_object *o, struct tv_error *err)
{
    struct rec_key k;
    struct tv_buf buf;
    key_object(&k, name, partial);
    rec_begin(&buf);
    rec_object_put(&buf, o);
    return db_put_rec(b, DB_OBJECT, REC_OBJECT, &k, &buf, err);
}

/* The run of the same name is the making of this object (journal.c) and goes
 * with it: what it reads may be what it replaces. */
static enum tv_err pin_check(tv_batch *b, uint64_t id, const char *name,
                             struct tv_error *err)
{
    bool pinned = false;
    char run[TV_REC_KEY_MAX + 1], shown[SHOW_BYTES];
    const enum tv_err rc = pin_find(&b->t, id, name, &pinned, run, err);
    if (rc != TV_OK || !pinned)
        return rc;
    if (run[0] == '@') { /* no run: somebody reads it (hold.c) */
        tv_error_set(err, TV_E_LOCKED,
                     "store %s: object '%s' is being read by another command",
                     b->t.s->path, name);
        tv_error_hint(err, "wait until it has ended");
        return TV_E_LOCKED;
    }
    tv_error_set(err, TV_E_LOCKED,
                 "store %s: object '%s' is used by the unfinished run '%s'",
                 b->t.s->path, name, show(run, shown));
    if (name_ok(run))
        tv_error_hint(err, "finish that run, or drop it: 'tvstore rm %s %s'",
                      b->t.s->path, run);
    else
        tv_error_hint(err, "finish that run, or remove what it has made");
    return TV_E_LOCKED;
}

/* Is a side file used by an object other than the one under `skip`? */
static enum tv_err blob_used(const struct txn *t, struct tv_hash digest,
                             uint64_t skip, bool *used, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    bool more = false;
    *used = false;
    TV_TRY(walk_begin(&w, t, DB_OBJECT, NULL, err));
    while (!*used) {
        struct rec_body body;
        struct rec_object o;
        struct rec_file f;
        const char *why = NULL;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        TV_TRY(walk_rec(&w, REC_OBJECT, &body, err));
        if (!rec_object_get(body, &o, &why)) {
            rc = rec_damaged(t->s, "an object record", why, err);
            goto out;
        }
        if (o.id == skip)
            continue;
        struct rec_body files = {.p = o.files, .n = o.files_bytes};
        while (!*used && rec_file_next(&files, &f))
            *used = tv_hash_equal(f.digest, digest) != 0;
    }
out:
    walk_end(&w);
    return rc;
}

/* Drops the blobs that only this object uses. */
static enum tv_err files_release(tv_batch *b, uint64_t id, const void *files,
                                 size_t files_bytes, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    /* A copy: deleting moves what the record points at. */
    unsigned char *copy = (unsigned char *)tv_alloc(files_bytes + 1);
    if (copy == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a file list");
    memcpy(copy, files, files_bytes);
    struct rec_body left = {.p = copy, .n = files_bytes};
    struct rec_file f;
    while (rec_file_next(&left, &f)) {
        bool used = false;
        TV_TRY(blob_used(&b->t, f.digest, id, &used, err));
        if (!used) {
            struct rec_key k;
            key_digest(&k, f.digest);
            TV_TRY(long_del(b, DB_BLOB, &k, err));
        }
    }
out:
    tv_free(copy);
    return rc;
}

/* Makes an object unfindable; its tensors go by and by. */
static enum tv_err object_doom(tv_batch *b, const char *name, bool partial,
                               const struct rec_object *o, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_object_id rid;
    char id_name[TV_OBJECT_NAME_MAX + 1];
    struct rec_key k;
    bool found = false;
    const uint64_t id = o->id;
    const bool merge = o->kind == TV_KIND_MERGE;
    TV_TRY(files_release(b, id, o->files, o->files_bytes, err));
    TV_TRY(object_id_get(&b->t, id, &found, &rid, id_name, err));
    if (found) {
        rid.state = REC_DOOMED;
        TV_TRY(object_id_put(b, id, &rid, err));
        TV_TRY(trash_put(b, 'o', id, 0, err));
    }
    key_object(&k, name, partial);
    TV_TRY(db_del(b, DB_OBJECT, &k, NULL, err));
    /* The journal of an unfinished merge is worth nothing without it. */
    if (merge && partial)
        TV_TRY(tv_run_drop(b, name, err));
out:
    return rc;
}

static enum tv_err create(tv_batch *b, const char *name, enum tv_kind kind,
                          const char *architecture, const char *source_path,
                          struct tv_hash fingerprint, bool over,
                          uint64_t *object_id, bool *resumed,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_object o;
    bool found = false, more = false;
    const uint64_t before = b->n_writes;
    TV_TRY(batch_check(b, err));
    TV_TRY(name_check(name, err));
    const struct rec_text arch = text_of(architecture);
    const struct rec_text path = text_of(source_path);
    if (arch.n > TEXT_MAX || path.n > TEXT_MAX) {
        rc =
            tv_error_set(err, TV_E_USAGE,
                         "object '%s': architecture or path is too long", name);
        goto out;
    }
    TV_TRY(object_get(&b->t, name, false, &found, &o, err));
    if (found && !over) {
        rc = tv_error_set(err, TV_E_EXISTS, "store %s has an object '%s'",
                          b->t.s->path, name);
        tv_error_hint(err, "choose another name, or replace it with --force");
        goto out;
    }
    if (found)
        TV_TRY(pin_check(b, o.id, name, err));

    /* Whoever holds the writer lock is alone: unfinished payloads of others
     * are what killed writers left. */
    if (b->t.s->lock_fd >= 0) {
        TV_TRY(trash_step(b, false, &more, err));
        b->cleanup = b->cleanup || more;
    }
    TV_TRY(object_get(&b->t, name, true, &found, &o, err));
    if (found && o.kind == kind && tv_hash_equal(o.fingerprint, fingerprint)) {
        *object_id = o.id;
        *resumed = true;
        goto out;
    }
    if (found) {
        TV_TRY(pin_check(b, o.id, name, err));
        TV_TRY(object_doom(b, name, true, &o, err));
        b->cleanup = true;
    }
    uint64_t id = 0;
    TV_TRY(next_id(b, &id, err));
    const struct rec_object fresh = {.id = id,
                                     .kind = (uint8_t)kind,
                                     .state = REC_PARTIAL,
                                     .fingerprint = fingerprint,
                                     .architecture = arch,
                                     .source_path = path};
    const struct rec_object_id rid = {.state = REC_PARTIAL,
                                      .name = text_of(name)};
    TV_TRY(object_put(b, name, true, &fresh, err));
    TV_TRY(object_id_put(b, id, &rid, err));
    *object_id = id;
    *resumed = false;
out:
    return batch_end(b, before, rc);
}

enum tv_err tv_object_create(tv_batch *b, const char *name, enum tv_kind kind,
                             const char *architecture, const char *source_path,
                             struct tv_hash source_fingerprint,
                             uint64_t *object_id, bool *resumed,
                             struct tv_error *err)
{
    return create(b, name, kind, architecture, source_path, source_fingerprint,
                  false, object_id, resumed, err);
}

enum tv_err tv_object_create_over(tv_batch *b, const char *name,
                                  enum tv_kind kind, const char *architecture,
                                  const char *source_path,
                                  struct tv_hash source_fingerprint,
                                  uint64_t *object_id, bool *resumed,
                                  struct tv_error *err)
{
    return create(b, name, kind, architecture, source_path, source_fingerprint,
                  true, object_id, resumed, err);
}

enum tv_err tv_object_complete(tv_batch *b, uint64_t object_id, bool replace,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_object_id rid;
    char name[TV_OBJECT_NAME_MAX + 1];
    struct rec_object o, old;
    struct rec_key k, pk;
    struct rec_body body;
    struct tv_buf buf;
    bool found = false, taken = false, more = false;
    const char *why = NULL;
    const uint64_t before = b->n_writes;
    TV_TRY(object_writable(b, object_id, &rid, name, err));
    TV_TRY(object_get(&b->t, name, false, &taken, &old, err));
    if (taken && !replace) {
        rc = tv_error_set(err, TV_E_EXISTS, "store %s has an object '%s'",
                          b->t.s->path, name);
        goto out;
    }
    if (taken) {
        TV_TRY(pin_check(b, old.id, name, err));
        TV_TRY(object_doom(b, name, false, &old, err));
    }
    key_object(&pk, name, true);
    TV_TRY(db_get_rec(&b->t, DB_OBJECT, REC_OBJECT, &pk, &found, &body,
                      "an object record", err));
    if (!found || !rec_object_get(body, &o, &why) || o.id != object_id) {
        rc = rec_damaged(b->t.s, "an unfinished object",
                         why != NULL ? why : "its records do not agree", err);
        goto out;
    }
    o.state = REC_COMPLETE;
    key_object(&k, name, false);
    rec_begin(&buf);
    rec_object_put(&buf, &o); /* copies what o borrows before the writes */
    TV_TRY(db_put_rec(b, DB_OBJECT, REC_OBJECT, &k, &buf, err));
    TV_TRY(db_del(b, DB_OBJECT, &pk, NULL, err));
    rid.state = REC_COMPLETE;
    TV_TRY(object_id_put(b, object_id, &rid, err));
    if (taken) {
        TV_TRY(trash_step(b, false, &more, err));
        b->cleanup = b->cleanup || more;
    }
out:
    return batch_end(b, before, rc);
}

/* Is there a doomed object of this name whose tensors are still there? */
static enum tv_err doomed_left(const struct txn *t, const char *name,
                               bool *found, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk w = {0};
    struct rec_key prefix;
    bool more = false;
    *found = false;
    prefix.n = 1;
    prefix.b[0] = 'o';
    TV_TRY(walk_begin(&w, t, DB_TRASH, &prefix, err));
    while (!*found) {
        struct rec_object_id rid;
        char id_name[TV_OBJECT_NAME_MAX + 1];
        bool there = false;
        TV_TRY(walk_next(&w, &more, err));
        if (!more)
            break;
        TV_TRY(object_id_get(t, key_get_id(&w.key, 1), &there, &rid, id_name,
                             err));
        *found = there && strcmp(id_name, name) == 0;
    }
out:
    walk_end(&w);
    return rc;
}

/* first: 0 the complete object too, 1 the unfinished one alone. */
static enum tv_err object_remove(tv_batch *b, const char *name, int first,
                                 bool *more, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_object o;
    bool any = false;
    const uint64_t before = b->n_writes;
    *more = false;
    TV_TRY(batch_check(b, err));
    TV_TRY(name_check(name, err));
    bool found[2] = {false, false};
    for (int i = first; i < 2; i++) {
        TV_TRY(object_get(&b->t, name, i == 1, &found[i], &o, err));
        if (found[i])
            TV_TRY(pin_check(b, o.id, name, err));
        any = any || found[i];
    }
    for (int i = first; i < 2; i++) {
        if (!found[i])
            continue;
        TV_TRY(object_get(&b->t, name, i == 1, &found[i], &o, err));
        TV_TRY(object_doom(b, name, i == 1, &o, err));
    }
    if (!any)
        TV_TRY(doomed_left(&b->t, name, &any, err));
    if (!any) {
        rc = not_found(&b->t, name, err);
        goto out;
    }
    bool trash = false;
    TV_TRY(trash_step(b, false, &trash, err));
    /* A commit that cleans up goes on with the object, too; payloads that
     * nothing refers to are no business of the caller's anyway. */
    if (trash && !b->cleanup) {
        TV_TRY(doomed_left(&b->t, name, more, err));
        b->cleanup = !*more;
    }
out:
    return batch_end(b, before, rc);
}

enum tv_err tv_object_remove(tv_batch *b, const char *name, bool *more,
                             struct tv_error *err)
{
    return object_remove(b, name, 0, more, err);
}

enum tv_err tv_object_drop_partial(tv_batch *b, const char *name, bool *more,
                                   struct tv_error *err)
{
    return object_remove(b, name, 1, more, err);
}

static bool file_name_ok(const char *name, size_t n)
{
    return n >= 1 && n <= FILE_NAME_MAX && strchr(name, '/') == NULL &&
           strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
}

/* Is the side file there already, and sound? */
static enum tv_err blob_find(tv_batch *b, const struct rec_key *k,
                             struct tv_hash digest, const void *data, size_t n,
                             bool *found, struct tv_error *err)
{
    struct rec_body body;
    struct arena a = {NULL};
    enum tv_err rc = long_get(&b->t, DB_BLOB, REC_BLOB, k, &a, found, &body,
                              "a side file", err);
    if (rc == TV_E_CORRUPT) { /* a damaged one is replaced */
        tv_error_clear(err);
        *found = false;
        rc = TV_OK;
    }
    if (rc != TV_OK || !*found)
        goto out;
    *found = body.n == n && (n == 0 || memcmp(body.p, data, n) == 0);
    if (!*found && tv_hash_equal(tv_hash128(body.p, body.n), digest))
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "store %s: two different side files have the same "
                          "checksum",
                          b->t.s->path);
out:
    arena_clear(&a);
    return rc;
}

static enum tv_err blob_put(tv_batch *b, struct tv_hash digest,
                            const void *data, size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_key k;
    bool found = false;
    key_digest(&k, digest);
    TV_TRY(blob_find(b, &k, digest, data, n, &found, err));
    if (found)
        goto out;
    TV_TRY(quota_check(b, n + TV_REC_HEAD, err));
    TV_TRY(long_put(b, DB_BLOB, REC_BLOB, &k, data, n, err));
    b->dirty += n;
out:
    return rc;
}

enum tv_err tv_object_file_put(tv_batch *b, uint64_t object_id,
                               const char *name, const void *data, size_t n,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_object_id rid;
    char object[TV_OBJECT_NAME_MAX + 1], shown[SHOW_BYTES];
    struct rec_object o;
    struct rec_file f;
    struct tv_buf files;
    bool found = false;
    struct tv_hash old_digest = {0, 0};
    bool replaced = false;
    const uint64_t before = b->n_writes;
    const size_t name_bytes = strlen(name);
    tv_buf_init(&files, TV_REC_BODY_MAX / 2);
    TV_TRY(object_writable(b, object_id, &rid, object, err));
    if (!file_name_ok(name, name_bytes)) {
        rc = tv_error_set(err, TV_E_USAGE,
                          "object '%s': '%s' is no side file name", object,
                          show(name, shown));
        goto out;
    }
    if (n > FILE_BYTES_MAX) {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "object '%s': side file %s has %zu bytes; the store "
                          "takes up to %zu",
                          object, show(name, shown), n, FILE_BYTES_MAX);
        goto out;
    }
    const struct tv_hash digest = tv_hash128(data, n);
    TV_TRY(blob_put(b, digest, data, n, err));
    TV_TRY(object_get(&b->t, object, true, &found, &o, err));
    if (!found) {
        rc = rec_damaged(b->t.s, "an unfinished object",
                         "its name record is missing", err);
        goto out;
    }
    uint32_t count = 0;
    struct rec_body left = {.p = o.files, .n = o.files_bytes};
    while (rec_file_next(&left, &f)) {
        if (f.name.n == name_bytes && memcmp(f.name.s, name, name_bytes) == 0) {
            replaced = true;
            old_digest = f.digest;
            continue;
        }
        rec_file_put(&files, &f);
        count++;
    }
    if (count >= FILES_MAX) {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "object '%s': more than %u side files", object,
                          FILES_MAX);
        goto out;
    }
    const struct rec_file mine = {
        .digest = digest, .bytes = n, .name = text_of(name)};
    rec_file_put(&files, &mine);
    TV_TRY(tv_buf_ok(&files, err));
    o.files = (const unsigned char *)files.data;
    o.files_bytes = files.n_bytes;
    o.n_files = count + 1;
    TV_TRY(object_put(b, object, true, &o, err));
    if (replaced && !tv_hash_equal(old_digest, digest)) {
        bool used = false;
        struct rec_key k;
        TV_TRY(blob_used(&b->t, old_digest, 0, &used, err));
        key_digest(&k, old_digest);
        if (!used)
            TV_TRY(long_del(b, DB_BLOB, &k, err));
    }
out:
    tv_buf_free(&files);
    return batch_end(b, before, rc);
}
