/* SPDX-License-Identifier: Apache-2.0 */
/*
 * import.c - copies or links a model into a store.
 *
 * The object is invisible until its last tensor is there, so readers see all of
 * it or nothing. Batches are lazy; they become durable together, just before
 * the object turns visible. A killed import leaves an unfinished object that
 * carries the fingerprint of its source: the same import goes on with the
 * tensors that are missing, and another source starts afresh (the store drops
 * the leftover).
 */
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "hash_ahead.h"
#include "hf_dir.h"
#include "json_util.h"
#include "tv/alloc.h"
#include "tv/derived.h"
#include "tv/format.h"
#include "tv/sys.h"
#include "tv/text.h"

/* Entries per batch when no payload limits it. */
#define LINKS_PER_BATCH 4096u
/* Records, and pages that cannot be used in a row. */
#define ADMIT_SLACK     ((uint64_t)1 << 20)
/* More than the store keeps back of a quota. */
#define RESERVE_BYTES   ((uint64_t)5 << 20)
/* What a tensor takes beside its bytes: records, and the rest of a page. */
#define SMALL_BYTES     2048u /* such share pages */
#define SMALL_COST      2560u
#define TENSOR_COST     8192u

struct import {
    tv_store *store;
    const char *name;
    tv_input *from;
    struct tv_transfer *t;
    struct tv_error *err;
    tv_batch *batch;
    uint64_t object;
    bool resumed;
    char *architecture;
    char *source_path;
    uint64_t *sources; /* source id per file, 0 until put */
    uint64_t done, total;
    uint64_t quota;  /* of the store, 0: there is none */
    uint64_t enough; /* one that all of it fits */
    size_t pending;  /* links in the batch */
    size_t *todo;    /* [n_todo] tensors that are not there, in order */
    size_t n_todo;
};

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory during import");
}

/* First name in config.json's "architectures", "" when there is none. */
static enum tv_err read_architecture(tv_input *in, char **out,
                                     struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *text = NULL;
    size_t n = 0;
    bool found = false;
    json_t *root = NULL;
    const char *name = NULL;
    char *label = tv_asprintf("%s: config.json", tv_input_label(in));

    if (label == NULL) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(tv_input_side_read(in, "config.json", &found, &text, &n, err));
    if (found) {
        TV_TRY(
            tv_json_load(text, n, label, 0, &tv_json_side_limits, err, &root));
        name = json_string_value(
            json_array_get(json_object_get(root, "architectures"), 0));
    }
    *out = tv_strdup(name == NULL || strlen(name) > 256 ? "" : name);
    if (*out == NULL)
        rc = no_memory(err);
out:
    json_decref(root);
    tv_free(text);
    tv_free(label);
    return rc;
}

static enum tv_err read_source_path(tv_input *in, char **out,
                                    struct tv_error *err)
{
    *out = tv_input_is_store(in) ? NULL : tv_absolute_path(tv_input_label(in));
    if (*out == NULL)
        *out = tv_strdup(tv_input_label(in));
    return *out == NULL ? no_memory(err) : TV_OK;
}

static void describe(const struct tv_input_tensor *t, struct tv_tensor_desc *d)
{
    d->name = t->name;
    d->dtype = t->dtype;
    d->rank = t->rank;
    d->shape = t->shape;
}

static enum tv_err check_linkable(const tv_input *in, struct tv_error *err)
{
    if (tv_input_is_store(in))
        return tv_error_set(err, TV_E_UNSUPPORTED,
                            "%s: only files can be linked, not objects of a "
                            "store",
                            tv_input_label(in));
    for (size_t i = 0; i < tv_input_file_count(in); i++) {
        const struct tv_input_file *f = tv_input_file(in, i);

        if (f->header_bytes == 0) {
            tv_error_set(err, TV_E_UNSUPPORTED,
                         "%s: only safetensors files can be linked", f->path);
            tv_error_hint(err, "import it without --link");
            return TV_E_UNSUPPORTED;
        }
    }
    return TV_OK;
}

/* A malformed adapter is refused now, not by the merge that needs it. One that
 * is merely of an unknown kind may be kept. */
static enum tv_err check_adapter(tv_input *in, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_adapter *a = NULL;
    struct tv_error own;

    if (tv_input_kind(in) != TV_KIND_ADAPTER || tv_input_is_store(in))
        return TV_OK;
    tv_error_clear(&own);
    rc = tv_adapter_open(in, &own, &a);
    tv_adapter_close(a);
    if (rc == TV_OK || rc == TV_E_UNSUPPORTED)
        return TV_OK;
    if (err != NULL)
        *err = own;
    return rc;
}

/* A file that changed while it was read may have given a mixture. */
static enum tv_err check_unchanged(const tv_input *in, struct tv_error *err)
{
    for (size_t i = 0; i < tv_input_file_count(in); i++) {
        const struct tv_input_file *f = tv_input_file(in, i);
        struct stat st;

        if (tv_sys()->stat(f->path, &st) != 0)
            return tv_error_set(err, TV_E_CHANGED,
                                "%s went away while it was imported", f->path);
        if ((uint64_t)st.st_size != f->bytes ||
            (uint64_t)st.st_ino != f->inode ||
            (uint64_t)st.st_mtim.tv_sec * UINT64_C(1000000000) +
                    (uint64_t)st.st_mtim.tv_nsec !=
                f->mtime_ns)
            return tv_error_set(err, TV_E_CHANGED,
                                "%s changed while it was imported", f->path);
    }
    return TV_OK;
}

/* Commits and begins a new batch. */
static enum tv_err turn_batch(struct import *m)
{
    enum tv_err rc = tv_batch_commit(m->batch, m->err);

    m->batch = NULL; /* commit consumes it either way */
    m->pending = 0;
    if (rc == TV_OK)
        rc = tv_batch_begin(m->store, true, m->err, &m->batch);
    return rc;
}

static enum tv_err link_tensor(struct import *m,
                               const struct tv_input_tensor *t)
{
    enum tv_err rc = TV_OK;
    const struct tv_input_file *f = tv_input_file(m->from, t->file);
    struct tv_tensor_desc d;

    if (m->sources[t->file] == 0) {
        const struct tv_source_desc s = {.path = f->path,
                                         .bytes = f->bytes,
                                         .mtime_ns = f->mtime_ns,
                                         .inode = f->inode,
                                         .header_digest = f->header_digest,
                                         .header_bytes = f->header_bytes};

        TV_TRY(tv_source_put(m->batch, &s, &m->sources[t->file], m->err));
    }
    describe(t, &d);
    TV_TRY(tv_tensor_link(m->batch, m->object, &d, m->sources[t->file],
                          t->offset, m->err));
    if (++m->pending >= LINKS_PER_BATCH)
        TV_TRY(turn_batch(m));
out:
    return rc;
}

/* Stored sources are checked leaf by leaf before their bytes go on. */
static enum tv_err check_leaves(const struct import *m,
                                const struct tv_input_tensor *t,
                                const struct tv_view *v)
{
    const uint64_t n = v->leaves == NULL ? 0 : tv_leaf_count(v->bytes);

    for (uint64_t i = 0; i < n; i++) {
        struct tv_shown shown;

        if (!tv_hash_equal(tv_view_leaf(v, i), v->leaves[i]))
            return tv_error_set(m->err, TV_E_CORRUPT,
                                "%s: tensor '%s' is damaged (MiB %" PRIu64
                                " does not match its checksum)",
                                tv_input_label(m->from),
                                tv_show(t->name, &shown), i);
    }
    return TV_OK;
}

static enum tv_err copy_tensor(struct import *m,
                               const struct tv_input_tensor *t,
                               const struct tv_hash *known)
{
    enum tv_err rc = TV_OK;
    struct tv_tensor_desc d;
    struct tv_view v;

    memset(&v, 0, sizeof v);
    TV_TRY(tv_input_view(m->from, t, m->err, &v));
    TV_TRY(check_leaves(m, t, &v));
    describe(t, &d);
    TV_TRY(tv_tensor_copy_in(&m->batch, m->object, &d, &v, known, m->err));
out:
    tv_input_release(m->from, &v);
    return rc;
}

static enum tv_err put_sides(struct import *m)
{
    enum tv_err rc = TV_OK;
    char *data = NULL;

    for (size_t i = 0; i < tv_input_side_count(m->from); i++) {
        const char *name = tv_input_side_name(m->from, i);
        size_t n = 0;
        bool found = false;

        TV_TRY(tv_input_side_read(m->from, name, &found, &data, &n, m->err));
        if (found)
            TV_TRY(
                tv_object_file_put(m->batch, m->object, name, data, n, m->err));
        tv_free(data);
        data = NULL;
        if (tv_batch_dirty(m->batch) >= tv_store_dirty_max(m->store) / 2)
            TV_TRY(turn_batch(m));
    }
out:
    tv_free(data);
    return rc;
}

/* Tensors of the unfinished object that are there already. */
static enum tv_err list_present(const struct import *m, tv_read **read,
                                struct tv_tensor_list **out)
{
    enum tv_err rc = TV_OK;

    TV_TRY(tv_read_begin(m->store, m->err, read));
    TV_TRY(tv_tensor_list(*read, m->object, m->err, out));
out:
    return rc;
}

static bool is_present(const struct tv_tensor_list *list,
                       const struct tv_input_tensor *t)
{
    size_t lo = 0;
    size_t hi = list->n;

    while (lo < hi) {
        const size_t mid = lo + (hi - lo) / 2;
        const struct tv_tensor *x = &list->items[mid];
        const int c = tv_name_compare(x->name, t->name);

        if (c == 0)
            return x->dtype == t->dtype && x->rank == t->rank &&
                   memcmp(x->shape, t->shape, t->rank * sizeof t->shape[0]) ==
                       0;
        if (c < 0)
            lo = mid + 1;
        else
            hi = mid;
    }
    return false;
}

static enum tv_err interrupted(struct import *m, size_t at)
{
    enum tv_err rc = TV_OK;

    TV_TRY(turn_batch(m));
    TV_TRY(tv_store_sync(m->store, m->err));
    rc = tv_error_set(m->err, TV_E_INTERRUPTED,
                      "import of '%s' interrupted after %zu of %zu tensors",
                      m->name, at, tv_input_count(m->from));
    tv_error_hint(m->err, "the same command continues");
out:
    return rc;
}

/* All tensors in order; m->todo are those that are not there yet. */
static enum tv_err put_all(void *arg, struct tv_hash_ahead *ahead)
{
    enum tv_err rc = TV_OK;
    struct import *m = arg;
    size_t k = 0;

    for (size_t i = 0; i < tv_input_count(m->from); i++) {
        const struct tv_input_tensor *t = tv_input_tensor(m->from, i);

        if (m->t->cancel != NULL && *m->t->cancel != 0) {
            rc = interrupted(m, i);
            goto out;
        }
        if (k == m->n_todo || m->todo[k] != i) {
            m->t->n_resumed++;
        } else {
            const struct tv_hash *known = tv_hash_ahead_take(ahead, k++);
            if (m->t->link)
                TV_TRY(link_tensor(m, t));
            else
                TV_TRY(copy_tensor(m, t, known));
        }
        m->t->n_tensors++;
        m->t->bytes += t->bytes;
        m->done += t->bytes;
        if (m->t->progress != NULL)
            m->t->progress(m->t->progress_arg, m->done, m->total);
    }
out:
    return rc;
}

static enum tv_err put_tensors(struct import *m)
{
    enum tv_err rc = TV_OK;
    const size_t n = tv_input_count(m->from);
    tv_read *read = NULL;
    struct tv_tensor_list *present = NULL;

    m->todo = (size_t *)tv_calloc(n + 1, sizeof *m->todo);
    if (m->todo == NULL) {
        rc = no_memory(m->err);
        goto out;
    }
    TV_TRY(list_present(m, &read, &present));
    for (size_t i = 0; i < n; i++)
        if (!is_present(present, tv_input_tensor(m->from, i)))
            m->todo[m->n_todo++] = i;
    tv_tensor_list_free(present);
    present = NULL;
    tv_read_end(read);
    read = NULL;
    rc = m->t->link ? put_all(m, NULL)
                    : tv_hash_ahead_run(m->from, m->todo, m->n_todo, put_all, m,
                                        m->err);
out:
    tv_tensor_list_free(present);
    tv_read_end(read);
    return rc;
}

/* What was begun with links does not go on as a copy, nor the other way. */
static struct tv_hash linked_fingerprint(struct tv_hash source)
{
    unsigned char text[22] = "linked";

    tv_hash_put(text + 6, source);
    return tv_hash128(text, sizeof text);
}

static enum tv_err create(struct import *m)
{
    enum tv_err rc = TV_OK;
    struct tv_hash fingerprint = {0, 0};

    TV_TRY(tv_input_fingerprint(m->from, &fingerprint, m->err));
    if (m->t->link)
        fingerprint = linked_fingerprint(fingerprint);
    TV_TRY(tv_batch_begin(m->store, true, m->err, &m->batch));
    rc = (m->t->force ? tv_object_create_over : tv_object_create)(
        m->batch, m->name, tv_input_kind(m->from), m->architecture,
        m->source_path, fingerprint, &m->object, &m->resumed, m->err);
    if (rc == TV_OK)
        rc = turn_batch(m);
out:
    return rc;
}

/* A quota that lets the import through when `bytes` of it are new. */
static uint64_t enough_for(const struct import *m,
                           const struct tv_store_stat *st, uint64_t bytes)
{
    const uint64_t gone =
        st->free_bytes + st->masks + st->task_vectors + st->statistics;
    uint64_t want = st->used_bytes > gone ? st->used_bytes - gone : 0;

    want += st->charged_bytes + bytes + bytes / 64 + ADMIT_SLACK;
    for (size_t i = 0; i < tv_input_count(m->from); i++)
        want += tv_input_tensor(m->from, i)->bytes < SMALL_BYTES ? SMALL_COST
                                                                 : TENSOR_COST;
    return want + (want / 15 < RESERVE_BYTES ? want / 15 : RESERVE_BYTES);
}

/* Says how much was asked for. What nothing has become durable of would only
 * be in the way: it goes. */
static void refused(struct import *m)
{
    struct tv_tensor_list *present = NULL;
    tv_read *read = NULL;
    tv_batch *b = NULL;
    bool more = true;
    char bytes[32];

    tv_error_context(m->err, "'%s' takes up to %s", m->name,
                     tv_format_bytes(m->total, bytes, sizeof bytes));
    if (m->quota > 0 && m->enough > m->quota)
        tv_error_hint(m->err,
                      "'tvstore quota %s %" PRIu64 "MiB' gives it enough room; "
                      "removing objects ('tvstore rm') makes some",
                      tv_store_path(m->store), (m->enough >> 20) + 1);
    if (m->resumed || m->object == 0)
        return;
    if (tv_read_begin(m->store, NULL, &read) != TV_OK)
        return;
    const bool empty =
        tv_tensor_list(read, m->object, NULL, &present) == TV_OK &&
        present->n == 0;
    tv_tensor_list_free(present);
    tv_read_end(read);
    while (empty && more) {
        enum tv_err rc = tv_batch_begin(m->store, false, NULL, &b);
        if (rc == TV_OK) {
            rc = tv_object_drop_partial(b, m->name, &more, NULL);
            if (rc == TV_OK)
                rc = tv_batch_commit(b, NULL);
            else
                tv_batch_abort(b);
        }
        if (rc != TV_OK)
            break;
    }
}

/* ---- admission ------------------------------------------------------------
 */

struct content { /* of a tensor that the store does not have yet */
    struct tv_hash checksum;
    uint64_t bytes;
};

static int compare_content(const void *x, const void *y)
{
    return memcmp(x, y, sizeof(struct tv_hash));
}

/* Reads one tensor; *c has no bytes when the store holds the same already. */
static enum tv_err look_up(struct import *m, const struct tv_input_tensor *t,
                           struct content *c)
{
    enum tv_err rc = TV_OK;
    struct tv_hash *leaves = NULL;
    struct tv_tensor_desc d;
    struct tv_view v;
    bool found = false;
    uint64_t id = 0;
    const uint64_t n = tv_leaf_count(t->bytes);

    memset(&v, 0, sizeof v);
    leaves = (struct tv_hash *)tv_calloc((size_t)n + 1, sizeof *leaves);
    if (leaves == NULL) {
        rc = no_memory(m->err);
        goto out;
    }
    TV_TRY(tv_input_view(m->from, t, m->err, &v));
    for (uint64_t i = 0; i < n; i++)
        leaves[i] = tv_view_leaf(&v, i);
    c->checksum = tv_leaves_checksum(leaves, (size_t)n);
    describe(t, &d);
    TV_TRY(
        tv_payload_lookup(m->batch, &d, c->checksum, &v, &found, &id, m->err));
    c->bytes = found ? 0 : t->bytes;
out:
    tv_input_release(m->from, &v);
    tv_free(leaves);
    return rc;
}

/* Bytes of what the store does not hold, each content once. When there are more
 * than `most`, the rest is not read and counts whole. */
static enum tv_err count_new(struct import *m, uint64_t most, uint64_t *out)
{
    enum tv_err rc = TV_OK;
    const size_t n = tv_input_count(m->from);
    struct content *list = NULL;
    uint64_t bytes = 0, shared = 0;
    size_t n_sorted = 0;

    list = (struct content *)tv_calloc(n + 1, sizeof *list);
    if (list == NULL) {
        rc = no_memory(m->err);
        goto out;
    }
    TV_TRY(tv_batch_begin(m->store, true, m->err, &m->batch));
    for (size_t i = 0; i < n; i++) {
        if (m->t->cancel != NULL && *m->t->cancel != 0) {
            rc = tv_error_set(m->err, TV_E_INTERRUPTED,
                              "import of '%s' interrupted before it began",
                              m->name);
            goto out;
        }
        TV_TRY(look_up(m, tv_input_tensor(m->from, i), &list[i]));
        bytes += list[i].bytes;
        /* What is in it twice is found by sorting, so only now and then. */
        if ((bytes - shared > most && i >= 2 * n_sorted) || i + 1 == n) {
            n_sorted = i + 1;
            qsort(list, i + 1, sizeof *list, compare_content);
            shared = 0;
            for (size_t k = 1; k <= i; k++)
                if (compare_content(&list[k - 1], &list[k]) == 0)
                    shared += list[k].bytes;
            if (bytes - shared > most) {
                while (++i < n)
                    bytes += tv_input_tensor(m->from, i)->bytes;
                break;
            }
        }
    }
    *out = bytes - shared;
out:
    tv_batch_abort(m->batch);
    m->batch = NULL;
    tv_free(list);
    return rc;
}

static enum tv_err too_big(const struct import *m,
                           const struct tv_store_stat *st)
{
    char a[32], q[32];

    return tv_error_set(
        m->err, TV_E_NOSPACE,
        "store %s: %s are missing to stay within its quota of %s",
        tv_store_path(m->store),
        tv_format_bytes_up(m->enough - st->quota_bytes, a, sizeof a),
        tv_format_bytes(st->quota_bytes, q, sizeof q));
}

/* Under a quota there is room for all of it before anything is written; derived
 * data go for it. What the store has already takes no room, which only content
 * tells: where the whole does not fit, the input is read once before. */
static enum tv_err admit(struct import *m, const struct tv_store_stat *st)
{
    enum tv_err rc = TV_OK;
    const uint64_t derived = st->masks + st->task_vectors + st->statistics;
    const uint64_t taken = st->used_bytes + st->charged_bytes;
    uint64_t need = m->total;

    if (st->quota_bytes == 0 || m->t->link)
        goto out;
    const uint64_t room =
        st->free_bytes +
        (st->quota_bytes > taken ? st->quota_bytes - taken : 0);
    m->quota = st->quota_bytes;
    m->enough = enough_for(m, st, need);
    if (need + need / 16 + ADMIT_SLACK + RESERVE_BYTES <= room)
        goto out;
    /* Pages around derived data go with them. */
    const uint64_t most = room + derived + derived / 16 + ADMIT_SLACK;
    TV_TRY(count_new(m, most, &need));
    m->enough = enough_for(m, st, need);
    if (need > most) {
        rc = too_big(m, st);
        goto out;
    }
    if (need == 0)
        goto out;
    rc = tv_derived_reserve(m->store, need + need / 64, need / 16 + ADMIT_SLACK,
                            m->err);
    if (rc == TV_E_NOSPACE && m->enough > st->quota_bytes)
        rc = too_big(m, st);
out:
    return rc;
}

/* Derived data go for side files that the store does not have. Where that does
 * not do, putting them says what is missing. */
static enum tv_err admit_sides(struct import *m, const struct tv_store_stat *st)
{
    enum tv_err rc = TV_OK;
    const size_t count = tv_input_side_count(m->from);
    tv_read *r = NULL;
    char *data = NULL;
    uint64_t bytes = 0;

    if (st->quota_bytes == 0 || st->masks + st->task_vectors == 0)
        return TV_OK;
    TV_TRY(tv_read_begin(m->store, m->err, &r));
    for (size_t i = 0; i < count; i++) {
        const char *name = tv_input_side_name(m->from, i);
        const void *there = NULL;
        size_t n = 0, n_there = 0;
        bool found = false;

        TV_TRY(tv_input_side_read(m->from, name, &found, &data, &n, m->err));
        if (found && tv_blob_get(r, tv_hash128(data, n), &there, &n_there,
                                 NULL) != TV_OK)
            bytes += tv_derived_long(n);
        tv_free(data);
        data = NULL;
    }
    tv_read_end(r);
    r = NULL;
    if (bytes > 0 && tv_derived_reserve(m->store, bytes, 0, NULL) == TV_E_NOMEM)
        rc = no_memory(m->err);
out:
    tv_read_end(r);
    tv_free(data);
    return rc;
}

static enum tv_err publish(struct import *m)
{
    enum tv_err rc = TV_OK;

    TV_TRY(check_unchanged(m->from, m->err));
    rc = tv_batch_commit(m->batch, m->err);
    m->batch = NULL;
    if (rc != TV_OK)
        goto out;
    TV_TRY(tv_store_sync(m->store, m->err));
    TV_TRY(tv_batch_begin(m->store, false, m->err, &m->batch));
    TV_TRY(tv_object_complete(m->batch, m->object, m->t->force, m->err));
    rc = tv_batch_commit(m->batch, m->err);
    m->batch = NULL;
out:
    return rc;
}

enum tv_err tv_import(tv_store *s, const char *name, tv_input *from,
                      struct tv_transfer *t, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct import m;
    bool locked = false;
    uint64_t shared_before = 0;
    struct tv_store_stat stat;

    memset(&m, 0, sizeof m);
    m.store = s;
    m.name = name;
    m.from = from;
    m.t = t;
    m.err = err;
    t->n_tensors = 0;
    t->n_resumed = 0;
    t->bytes = 0;
    t->bytes_shared = 0;
    if (t->link)
        TV_TRY(check_linkable(from, err));
    TV_TRY(check_adapter(from, err));
    TV_TRY(read_architecture(from, &m.architecture, err));
    TV_TRY(read_source_path(from, &m.source_path, err));
    m.sources =
        (uint64_t *)tv_calloc(tv_input_file_count(from) + 1, sizeof *m.sources);
    if (m.sources == NULL) {
        rc = no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < tv_input_count(from); i++)
        m.total += tv_input_tensor(from, i)->bytes;

    TV_TRY(tv_store_lock(s, "import", t->lock_timeout_ms, err));
    locked = true;
    TV_TRY(tv_store_stat(s, &stat, err));
    shared_before = stat.dedup_saved_bytes;
    TV_TRY(admit(&m, &stat));
    TV_TRY(admit_sides(&m, &stat));
    TV_TRY(create(&m));
    TV_TRY(put_sides(&m));
    TV_TRY(put_tensors(&m));
    TV_TRY(publish(&m));
    /* It is done: a failure to count must not be one of the import. */
    if (tv_store_stat(s, &stat, NULL) == TV_OK &&
        stat.dedup_saved_bytes > shared_before)
        t->bytes_shared = stat.dedup_saved_bytes - shared_before;
out:
    tv_batch_abort(m.batch);
    if (rc == TV_E_NOSPACE && locked && !t->link)
        refused(&m);
    if (locked)
        tv_store_unlock(s);
    tv_free(m.todo);
    tv_free(m.sources);
    tv_free(m.source_path);
    tv_free(m.architecture);
    return rc;
}
