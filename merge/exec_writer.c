/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exec_writer.c - the one thread that makes groups of finished tensors durable,
 * reports progress and watches the cancel flag; of an ordered sink also the one
 * that writes.
 *
 * Before anything is kept, in the output, the cache or the store, the inputs
 * are asked if they are what they were: a group of tensors of which one was
 * read from a changed file is not committed.
 */
#include "exec_parts.h"

#include "room.h"

#define COMMIT_SECONDS 2.0
#define WAKE_MS        50

static bool cancelled(const struct exec *ex)
{
    return ex->hooks && ex->hooks->cancel && *ex->hooks->cancel != 0;
}

/* ---- ordered sinks ------------------------------------------------------- */

/* Takes the tile that an ordered sink needs next. Mutex held. */
static bool next_put(struct exec *ex, struct exec_put *out)
{
    for (unsigned i = 0; i < ex->n_puts; i++) {
        struct exec_put *p = &ex->puts[i];
        if (p->slot->seq == ex->write_seq && p->tile == p->slot->n_tiles_put) {
            *out = *p;
            *p = ex->puts[--ex->n_puts];
            return true;
        }
    }
    return false;
}

static struct exec_slot *slot_to_end(struct exec *ex)
{
    for (size_t i = 0; i < ex->g.n_slots; i++) {
        struct exec_slot *s = &ex->slots[i];
        if (s->pass == EXEC_WRITING && s->seq == ex->write_seq &&
            s->n_tiles_put == s->n_tiles)
            return s;
    }
    return NULL;
}

/* One step of an ordered sink; false when there is nothing to do. Mutex held,
 * released in between. */
static bool write_ordered(struct exec *ex)
{
    struct tv_error err = {.code = TV_OK};
    enum tv_err rc = TV_OK;
    struct exec_put put;

    if (ex->stop)
        return false;
    if (next_put(ex, &put)) {
        struct exec_slot *s = put.slot;
        const uint64_t each =
            s->t->action == TVM_COPY
                ? s->tile_bytes
                : s->job.tile_elems * exec_out_bytes_each(s->t);
        exec_unlock(ex);
        rc = ex->sink->ops->write(ex->sink, s->index, put.tile * each, put.buf,
                                  put.n, &err);
        if (rc != TV_OK)
            exec_fail(ex, rc, &err);
        exec_lock(ex);
        s->n_tiles_put++;
        ex->bufs[ex->n_bufs++] = put.buf;
        (void)pthread_cond_broadcast(&ex->wake_workers);
        return true;
    }
    struct exec_slot *s = slot_to_end(ex);
    if (!s)
        return false;
    exec_unlock(ex);
    rc = ex->sink->ops->end_tensor(ex->sink, s->index, s->leaves,
                                   (size_t)tv_leaf_count(s->t->bytes), &err);
    exec_close_readers(s);
    if (rc != TV_OK)
        exec_fail(ex, rc, &err);
    exec_lock(ex);
    if (rc == TV_OK) {
        ex->write_seq++;
        exec_add_finished(ex, s);
    }
    return true;
}

/* ---- committing ---------------------------------------------------------- */

/* Is what has been read of one state of the inputs? Once it is not, nothing
 * more is kept, even if the files come back as they were. Writer thread, no
 * lock. */
static bool inputs_hold(struct exec *ex)
{
    struct tv_error err = {.code = TV_OK};

    if (ex->changed)
        return false;
    const enum tv_err rc = tvm_inputs_unchanged(ex->p, &err);
    ex->changed = rc != TV_OK;
    if (ex->changed)
        exec_fail(ex, rc, &err);
    return !ex->changed;
}

void exec_note_sums(struct exec *ex)
{
    tv_store *store = ex->p->options.store;
    struct tvm_sums *sums = &ex->for_sink;
    tv_batch *b = NULL;

    tvm_sums_move(sums, &ex->sums);
    if (sums->n == 0 || exec_is_into(ex->p) || ex->changed ||
        ex->p->options.no_cache || tv_store_is_read_only(store) ||
        tvm_inputs_unchanged(ex->p, NULL) != TV_OK ||
        tv_store_lock(store, "tvmerge run", 0, NULL) != TV_OK)
        return;
    if (tv_batch_begin(store, true, NULL, &b) == TV_OK &&
        tvm_sums_put(sums, b, NULL) == TV_OK) {
        const enum tv_err rc = tv_batch_commit(b, NULL);
        (void)rc; /* the next merge finds out again */
        b = NULL;
    }
    tv_batch_abort(b);
    tv_store_unlock(store);
}

/* Mutex held, released in between. */
static void commit(struct exec *ex)
{
    struct tv_error err = {.code = TV_OK};
    const size_t from = ex->n_committed;
    const size_t to = ex->n_finished;
    const uint64_t bytes = ex->bytes_finished;

    ex->sink->stopping = ex->stop;
    tvm_sums_move(&ex->for_sink, &ex->sums);
    exec_unlock(ex);
    const double t0 = exec_now();
    const bool hold = inputs_hold(ex);
    enum tv_err rc = TV_E_CORRUPT;
    if (hold)
        rc = ex->sink->ops->commit(ex->sink, ex->finished + from, to - from,
                                   &err);
    if (hold && rc != TV_OK)
        exec_fail(ex, rc, &err);
    exec_lock(ex);
    ex->t_sync += exec_now() - t0;
    if (rc != TV_OK)
        return;
    for (size_t i = from; i < to; i++)
        ex->sink->done[ex->finished[i]].done = true;
    ex->n_committed = to;
    ex->bytes_committed = bytes;
    ex->t_first_pending = exec_now();
}

/* ---- the loop ------------------------------------------------------------ */

/* Mutex held, released in between. */
static void report(struct exec *ex)
{
    if (!ex->hooks || !ex->hooks->progress)
        return;
    while (ex->n_reported < ex->n_finished) {
        const struct tvm_tensor *t =
            &ex->p->tensors[ex->finished[ex->n_reported++]];
        ex->bytes_reported += t->bytes;
        const struct tvm_progress progress = {
            .n_done = ex->n_resumed + ex->n_reported,
            .n_tensors = ex->p->n_tensors,
            .bytes_done = ex->bytes_resumed + ex->bytes_reported,
            .bytes_total = ex->p->bytes_written,
            .bytes_read = ex->bytes_read,
            .tensor = t->name,
        };
        exec_unlock(ex);
        ex->hooks->progress(ex->hooks->arg, &progress);
        exec_lock(ex);
    }
}

static void wait_writer(struct exec *ex)
{
    struct timespec until;

    (void)clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += WAKE_MS * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_nsec -= 1000000000L;
        until.tv_sec++;
    }
    (void)pthread_cond_timedwait(&ex->wake_writer, &ex->mutex, &until);
}

void exec_write_loop(struct exec *ex)
{
    bool failed = false;
    bool ended = false;

    exec_lock(ex);
    for (;;) {
        const uint64_t pending = ex->bytes_finished - ex->bytes_committed;
        const bool over =
            ex->n_working == 0 &&
            (!ex->sink->ordered || ex->stop || ex->write_seq == ex->next_seq);
        if (!ex->stop && cancelled(ex)) {
            struct tv_error err;
            exec_unlock(ex);
            (void)tv_error_set(&err, TV_E_INTERRUPTED, "interrupted");
            exec_fail(ex, TV_E_INTERRUPTED, &err);
            exec_lock(ex);
            continue;
        }
        if (ex->sink->ordered && write_ordered(ex))
            continue;
        report(ex);
        if (ex->n_finished > ex->n_committed && !failed &&
            (over || pending >= ex->sink->commit_bytes ||
             exec_now() - ex->t_first_pending >= COMMIT_SECONDS)) {
            const size_t before = ex->n_committed;
            commit(ex);
            failed = ex->n_committed == before;
            continue;
        }
        if (over && ex->stop && ex->sink->ordered && !ended) {
            /* An earlier commit may have waited for a chunk to fill. */
            ended = true;
            commit(ex);
            continue;
        }
        if (!ex->part && !ex->sink->busy && !ex->changed &&
            tvm_cache_pending(ex->cache, over)) {
            /* What the output still needs of the same store comes first. */
            const uint64_t left = tvm_room_rest(
                ex->p, ex->p->bytes_written > ex->bytes_committed
                           ? ex->p->bytes_written - ex->bytes_committed
                           : 0);
            exec_unlock(ex);
            if (inputs_hold(ex))
                tvm_cache_flush(ex->cache, left);
            exec_lock(ex);
            continue;
        }
        if (over)
            break;
        wait_writer(ex);
    }
    exec_unlock(ex);
}
