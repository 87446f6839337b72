/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sink_into.c - a merge into an object of a store.
 *
 * Chunks are written in order by the one writer thread. A finished tensor, its
 * entry in the object and its `done` record enter the same transaction; large
 * tensors span several, bounded by the dirty limit. The object becomes visible
 * in the last transaction, which also drops the run. A payload that a killed
 * run has begun is dropped by the store when the object is taken up again. What
 * the merge was made of becomes its side file tvmerge.json, the same document
 * that a directory gets.
 *
 * Journal: the run of the object's name in the target store; its state is that
 * of state.h, inputs in the same store are pinned.
 */
#include "sink.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pins.h"
#include "source.h"
#include "state.h"
#include "tv/alloc.h"
#include "tv/derived.h"

#define CHUNK_BYTES_MAX (16u << 20)
#define RECORD_FILE     TVM_RECORD_FILE

struct into_sink {
    struct tvm_sink base;
    tv_store *store;
    const char *name;
    uint64_t object_id;
    uint64_t dirty_max;
    bool locked, replace, sync;
    bool lost; /* an input has changed: nothing more is written */
    tv_batch *b;
    bool in_payload;
    struct tv_payload payload;
    size_t chunk;        /* being filled */
    unsigned char *data; /* of it; NULL: not reserved yet */
    size_t chunk_n, chunk_used;
};

static struct into_sink *into_of(struct tvm_sink *s)
{
    return (struct into_sink *)(void *)s;
}

static enum tv_err need_batch(struct into_sink *s, struct tv_error *err)
{
    if (s->b)
        return TV_OK;
    if (s->lost)
        return tv_error_set(err, TV_E_CORRUPT,
                            "an input was changed while it was being merged");
    const enum tv_err rc = tv_batch_begin(s->store, !s->sync, err, &s->b);
    s->base.busy = rc == TV_OK;
    return rc;
}

/* A batch in the middle of a tensor ends here too: what it says is finished
 * must be of one state of the inputs. */
static enum tv_err end_batch(struct into_sink *s, struct tv_error *err)
{
    tv_batch *b = s->b;

    if (!b)
        return TV_OK;
    s->b = NULL;
    s->base.busy = false;
    const enum tv_err rc = tvm_inputs_unchanged(s->base.plan, err);
    if (rc == TV_OK)
        return tv_batch_commit(b, err);
    s->data = NULL; /* it was memory of the batch */
    s->lost = true;
    tv_batch_abort(b);
    return rc;
}

static struct tv_tensor_desc desc_of(const struct tvm_tensor *t)
{
    return (struct tv_tensor_desc){
        .name = t->name, .dtype = t->dtype, .rank = t->rank, .shape = t->shape};
}

static enum tv_err begin_payload(struct into_sink *s, size_t t,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_tensor_desc d = desc_of(&s->base.plan->tensors[t]);
    uint64_t chunk = s->base.plan->options.memory_bytes / 8;

    if (chunk > CHUNK_BYTES_MAX)
        chunk = CHUNK_BYTES_MAX;
    if (chunk > s->dirty_max)
        chunk = s->dirty_max;
    TV_TRY(need_batch(s, err));
    TV_TRY(tv_payload_begin(s->b, &d, chunk, &s->payload, err));
    s->in_payload = true;
    s->chunk = 0;
    s->data = NULL;
out:
    return rc;
}

/* Seals a full chunk; the batch ends when it has grown enough. */
static enum tv_err end_chunk(struct into_sink *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    TV_TRY(tv_chunk_seal(s->b, &s->payload, s->chunk, err));
    s->data = NULL;
    s->chunk++;
    if (tv_batch_dirty(s->b) + s->payload.chunk_bytes > s->dirty_max)
        rc = end_batch(s, err);
out:
    return rc;
}

static enum tv_err into_write(struct tvm_sink *sink, size_t t, uint64_t off,
                              const void *data, size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct into_sink *s = into_of(sink);
    const unsigned char *from = data;
    void *at = NULL;

    (void)off;
    if (!s->in_payload)
        TV_TRY(begin_payload(s, t, err));
    while (n > 0) {
        if (!s->data) {
            TV_TRY(need_batch(s, err));
            TV_TRY(tv_chunk_reserve(s->b, &s->payload, s->chunk, &at,
                                    &s->chunk_n, err));
            s->data = at;
            s->chunk_used = 0;
        }
        const size_t room = s->chunk_n - s->chunk_used;
        const size_t some = n < room ? n : room;
        memcpy(s->data + s->chunk_used, from, some);
        s->chunk_used += some;
        from += some;
        n -= some;
        if (s->chunk_used == s->chunk_n)
            TV_TRY(end_chunk(s, err));
    }
out:
    return rc;
}

static enum tv_err into_end_tensor(struct tvm_sink *sink, size_t t,
                                   const struct tv_hash *leaves,
                                   size_t n_leaves, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct into_sink *s = into_of(sink);
    const struct tvm_tensor *tensor = &sink->plan->tensors[t];
    const struct tvm_tensor_done *d = &sink->done[t];
    const struct tv_tensor_desc desc = desc_of(tensor);
    uint64_t id = 0;

    (void)n_leaves;
    if (!s->in_payload)
        TV_TRY(begin_payload(s, t, err));
    TV_TRY(need_batch(s, err));
    TV_TRY(tv_payload_finish(s->b, &s->payload, leaves, &id, err));
    s->in_payload = false;
    TV_TRY(tv_tensor_put(s->b, s->object_id, &desc, id, err));
    const struct tv_done done = {
        .name = tensor->name,
        .shard = id,
        .bytes = tensor->bytes,
        .checksum = d->checksum,
        .n_nonfinite_in = d->n_nonfinite_in,
        .n_nonfinite_out = d->n_nonfinite_out,
    };
    TV_TRY(tv_done_put(s->b, s->name, &done, err));
out:
    return rc;
}

static enum tv_err into_commit(struct tvm_sink *sink, const size_t *tensors,
                               size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct into_sink *s = into_of(sink);

    (void)tensors;
    (void)n;
    /* A chunk that is reserved but not full cannot be committed: the group
     * waits for it. When nobody will fill it, its payload is lost anyway. */
    if (s->data && !sink->stopping)
        return TV_OK;
    if (s->data) {
        memset(s->data + s->chunk_used, 0, s->chunk_n - s->chunk_used);
        s->data = NULL;
        TV_TRY(tv_chunk_seal(s->b, &s->payload, s->chunk, err));
    }
    if (s->base.sums && s->base.sums->n > 0) {
        TV_TRY(need_batch(s, err));
        TV_TRY(tvm_sums_put(s->base.sums, s->b, err));
    }
    rc = end_batch(s, err);
out:
    return rc;
}

static enum tv_err into_note(struct tvm_sink *sink, const char *calibration,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct into_sink *s = into_of(sink);
    char *copy = tv_strdup(calibration);
    char *text = NULL;

    if (!copy)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    tv_free(sink->calibration);
    sink->calibration = copy;
    text = tvm_state_make(sink->plan, false, s->replace, copy);
    if (!text) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(need_batch(s, err));
    TV_TRY(tv_run_put(s->b, s->name, text, strlen(text), err));
    rc = end_batch(s, err);
out:
    tv_free(text);
    return rc;
}

/* Before the tensors, so that what cannot be put is known early. */
static enum tv_err into_files(struct tvm_sink *sink, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct into_sink *s = into_of(sink);
    const struct tvm_plan *p = sink->plan;

    if (p->n_files == 0)
        return TV_OK;
    TV_TRY(need_batch(s, err));
    for (size_t i = 0; i < p->n_files; i++)
        TV_TRY(tv_object_file_put(s->b, s->object_id, p->files[i].name,
                                  p->files[i].data, p->files[i].n, err));
    rc = end_batch(s, err);
out:
    return rc;
}

static enum tv_err into_finish(struct tvm_sink *sink,
                               const struct tvm_totals *totals,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct into_sink *s = into_of(sink);
    const struct tvm_plan *p = sink->plan;
    char *record = tvm_record_make(p, totals, sink->calibration, NULL, 0);

    if (!record) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(end_batch(s, err));
    TV_TRY(tv_batch_begin(s->store, false, err, &s->b));
    TV_TRY(tv_object_file_put(s->b, s->object_id, RECORD_FILE, record,
                              strlen(record), err));
    TV_TRY(tv_run_drop(s->b, s->name, err));
    TV_TRY(tv_object_complete(s->b, s->object_id, s->replace, err));
    rc = end_batch(s, err);
out:
    tv_free(record);
    return rc;
}

/* ---- opening ------------------------------------------------------------- */

static void into_close(struct tvm_sink *sink)
{
    struct into_sink *s = into_of(sink);

    tv_batch_abort(s->b);
    if (s->locked)
        tv_store_unlock(s->store);
    tv_free(s->base.calibration);
    tv_free(s->base.done);
    tv_free(s);
}

static const struct tvm_sink_ops into_ops = {
    .files = into_files,
    .write = into_write,
    .end_tensor = into_end_tensor,
    .commit = into_commit,
    .note = into_note,
    .finish = into_finish,
    .close = into_close,
};

void tvm_into_purpose(const char *name, char dst[TVM_PURPOSE_MAX])
{
    (void)snprintf(dst, TVM_PURPOSE_MAX, "tvmerge run --into %s", name);
}

/* Is the object there, and is it this very merge? */
static enum tv_err meet_object(struct into_sink *s, tv_read *r,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_plan *p = s->base.plan;
    struct tv_object *o = NULL;
    struct tvm_record record = {.n_files = 0};
    bool found = false;
    bool numerics = false;
    char why[512];

    rc = tv_object_find(r, s->name, false, err, &o);
    if (rc == TV_E_NOTFOUND) {
        tv_error_clear(err);
        rc = TV_OK;
        goto out;
    }
    TV_TRY(rc);
    if (p->options.force) {
        s->replace = true;
        goto out;
    }
    TV_TRY(tvm_record_of(r, o, &found, &record, err));
    if (o->kind != TV_KIND_MERGE) {
        rc = tv_error_set(err, TV_E_EXISTS,
                          "store %s has an object '%s', which is no merge",
                          tv_store_path(s->store), s->name);
    } else if (!tv_hash_equal(o->source_fingerprint, p->hash) &&
               !(found && tvm_identity_accept(p, o->source_fingerprint,
                                              record.identity, &numerics))) {
        rc =
            tv_error_set(err, TV_E_CHANGED,
                         "store %s has an object '%s', the result of another "
                         "merge: %s",
                         tv_store_path(s->store), s->name,
                         tvm_identity_difference(found ? record.identity : NULL,
                                                 p->identity, why, sizeof why));
    }
    if (rc != TV_OK) {
        tv_error_hint(err, numerics ? "--force replaces it, --accept-numerics "
                                      "takes it as it is"
                                    : "choose another name, or replace it "
                                      "with --force");
        goto out;
    }
    if (found)
        s->base.totals = record.totals;
    else
        TV_TRY(tv_object_digest(r, o->id, &s->base.totals.digest, err));
    s->base.already_done = true;
out:
    tvm_record_free(&record);
    tv_object_free(o);
    return rc;
}

void tvm_into_device(tv_store *store, const char *name, struct tvm_device *dst)
{
    enum tv_err rc = TV_OK;
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    struct tvm_state state = {.n_tensors = 0};
    struct tvm_record record = {.n_files = 0};
    char *text = NULL;
    size_t n = 0;
    bool found = false;

    *dst = (struct tvm_device){.memory_bytes = 0};
    TV_TRY(tv_read_begin(store, NULL, &r));
    TV_TRY(tv_run_get(r, name, &found, &text, &n, NULL));
    if (found) {
        TV_TRY(tvm_state_parse(text, n, &state, NULL));
        *dst = state.device;
        goto out;
    }
    TV_TRY(tv_object_find(r, name, false, NULL, &o));
    TV_TRY(tvm_record_of(r, o, &found, &record, NULL));
    if (found)
        *dst = record.device;
out:
    (void)rc; /* who comes to merge says what is wrong there */
    tvm_record_free(&record);
    tvm_state_free(&state);
    tv_object_free(o);
    tv_free(text);
    tv_read_end(r);
}

static enum tv_err meet_run(struct into_sink *s, tv_read *r, bool *resume,
                            bool *stale, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_plan *p = s->base.plan;
    struct tvm_state state = {.n_tensors = 0};
    bool numerics = false;
    char *text = NULL;
    size_t n = 0;
    bool found = false;
    char why[512];

    *resume = *stale = false;
    TV_TRY(tv_run_get(r, s->name, &found, &text, &n, err));
    if (!found)
        goto out;
    rc = tvm_state_parse(text, n, &state, err);
    if (rc == TV_OK &&
        (tv_hash_equal(state.plan_hash, p->hash) ||
         tvm_identity_accept(p, state.plan_hash, state.identity, &numerics))) {
        *resume = true;
        s->replace = s->replace || state.replace;
        s->base.calibration = state.calibration;
        state.calibration = NULL;
        goto out;
    }
    *stale = true;
    if (p->options.force && rc != TV_E_NOMEM) {
        tv_error_clear(err);
        rc = TV_OK;
        goto out;
    }
    TV_TRY(rc);
    rc = tv_error_set(
        err, TV_E_CHANGED,
        "store %s holds an unfinished merge '%s' of another "
        "plan: %s",
        tv_store_path(s->store), s->name,
        tvm_identity_difference(state.identity, p->identity, why, sizeof why));
    tv_error_hint(err, numerics ? TVM_NUMERICS_HINT
                                : "repeat the earlier command to finish it, or "
                                  "--force to start anew");
out:
    tvm_state_free(&state);
    tv_free(text);
    return rc;
}

static enum tv_err read_done(struct into_sink *s, tv_read *r,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;
    struct tv_done_list *list = NULL;

    TV_TRY(tv_done_list(r, s->name, err, &list));
    for (size_t i = 0, j = 0; i < list->n; i++) {
        const struct tv_done *d = &list->items[i];
        /* Both are in the order of tv_name_compare, or nearly so. */
        size_t tried = 0;
        while (tried < p->n_tensors &&
               strcmp(p->tensors[j].name, d->name) != 0) {
            j = j + 1 == p->n_tensors ? 0 : j + 1;
            tried++;
        }
        if (tried == p->n_tensors || p->tensors[j].bytes != d->bytes) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "store %s: the journal of '%s' lists %s, which "
                              "is not in the plan",
                              tv_store_path(s->store), s->name, d->name);
            goto out;
        }
        s->base.done[j] = (struct tvm_tensor_done){
            .done = true,
            .resumed = true,
            .checksum = d->checksum,
            .n_nonfinite_in = d->n_nonfinite_in,
            .n_nonfinite_out = d->n_nonfinite_out,
        };
    }
out:
    tv_done_list_free(list);
    return rc;
}

static enum tv_err start(struct into_sink *s, bool resume, bool stale,
                         struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;
    char *text = tvm_state_make(p, false, s->replace, s->base.calibration);
    bool resumed = false;

    if (!text) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    /* Derived data make room for the state; where that does not do, putting it
     * says so. What follows has its own admission (room.h). */
    if (tv_derived_reserve(s->store, tv_derived_long(strlen(text)), 0, NULL) ==
        TV_E_NOMEM) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(need_batch(s, err));
    if (stale)
        TV_TRY(tv_run_drop(s->b, s->name, err));
    if (s->replace)
        TV_TRY(tv_object_create_over(s->b, s->name, TV_KIND_MERGE,
                                     p->architecture, "", p->hash,
                                     &s->object_id, &resumed, err));
    else
        TV_TRY(tv_object_create(s->b, s->name, TV_KIND_MERGE, p->architecture,
                                "", p->hash, &s->object_id, &resumed, err));
    /* Without the object its journal is worth nothing. */
    if (resume && !resumed) {
        memset(s->base.done, 0, p->n_tensors * sizeof *s->base.done);
        TV_TRY(tv_run_drop(s->b, s->name, err));
    }
    TV_TRY(tv_run_put(s->b, s->name, text, strlen(text), err));
    TV_TRY(tvm_pins_add(s->b, s->name, p, err));
    rc = end_batch(s, err);
out:
    tv_free(text);
    return rc;
}

static enum tv_err prepare(struct into_sink *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_read *r = NULL;
    bool resume = false;
    bool stale = false;

    TV_TRY(tv_read_begin(s->store, err, &r));
    TV_TRY(meet_object(s, r, err));
    if (s->base.already_done)
        goto out;
    TV_TRY(meet_run(s, r, &resume, &stale, err));
    if (resume)
        TV_TRY(read_done(s, r, err));
    TV_TRY(start(s, resume, stale, err));
out:
    tv_read_end(r);
    return rc;
}

static struct into_sink *into_new(struct tvm_plan *plan)
{
    struct into_sink *s = tv_calloc(1, sizeof *s);

    if (!s)
        return NULL;
    s->base.ops = &into_ops;
    s->base.plan = plan;
    s->base.ordered = true;
    s->store = plan->options.store;
    s->name = plan->options.into;
    s->sync = plan->options.sync;
    s->dirty_max = tv_store_dirty_max(s->store);
    if (s->dirty_max > plan->options.memory_bytes / 4)
        s->dirty_max = plan->options.memory_bytes / 4;
    if (plan->options.group_bytes && s->dirty_max > plan->options.group_bytes)
        s->dirty_max = plan->options.group_bytes;
    s->base.commit_bytes = s->dirty_max;
    s->base.done = tv_calloc(plan->n_tensors + 1, sizeof *s->base.done);
    if (!s->base.done) {
        tv_free(s);
        s = NULL;
    }
    return s;
}

enum tv_err tvm_sink_into_open(struct tvm_plan *plan, struct tv_error *err,
                               struct tvm_sink **out)
{
    enum tv_err rc = TV_OK;
    struct into_sink *s = NULL;
    char purpose[TVM_PURPOSE_MAX];

    *out = NULL;
    if (!plan->options.store)
        return tv_error_set(err, TV_E_USAGE, "--into needs a store");
    s = into_new(plan);
    if (!s)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    tvm_into_purpose(s->name, purpose);
    TV_TRY(
        tv_store_lock(s->store, purpose, plan->options.lock_timeout_ms, err));
    s->locked = true;
    if (plan->options.force) /* dead pins do not keep what it replaces */
        TV_TRY(tvm_runs_sweep(s->store, err));
    TV_TRY(prepare(s, err));
    *out = &s->base;
    s = NULL;
out:
    if (s)
        into_close(&s->base);
    return rc;
}

enum tv_err tvm_sink_into_check(struct tvm_plan *plan, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct into_sink *s = NULL;
    tv_read *r = NULL;
    bool resume = false;
    bool stale = false;

    if (!plan->options.store)
        return tv_error_set(err, TV_E_USAGE, "--into needs a store");
    s = into_new(plan);
    if (!s)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    TV_TRY(tv_store_lock_check(s->store, err));
    TV_TRY(tv_read_begin(s->store, err, &r));
    TV_TRY(meet_object(s, r, err));
    if (!s->base.already_done)
        rc = meet_run(s, r, &resume, &stale, err);
out:
    tv_read_end(r);
    into_close(&s->base);
    return rc;
}
