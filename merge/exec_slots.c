/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exec_slots.c - a tensor's way through a run: a slot is reserved (if its
 * memory fits into the window), opened, taken from pass to pass, finished.
 *
 * Memory of idle slots is kept for the next tensor as long as it is in nobody's
 * way. Who finishes a pass's last tile is alone with the slot until it has
 * chosen the next pass; the slot itself is only changed with the mutex held.
 */
#include "exec_parts.h"

#include <string.h>

#include "calibrated.h"
#include "tv/alloc.h"

#define COPY_TILE_BYTES (4u << 20)

void exec_close_readers(struct exec_slot *s)
{
    for (size_t i = 0; i < s->n_open; i++)
        tvm_reader_close(&s->readers[i]);
    s->n_open = 0;
}

/* Mutex held, readers closed. */
static void release_slot(struct exec *ex, struct exec_slot *s)
{
    s->pass = EXEC_NONE;
    s->extra = 0;
    (void)pthread_cond_broadcast(&ex->wake_workers);
}

/* ---- opening ------------------------------------------------------------- */

static uint64_t window_used(const struct exec *ex)
{
    uint64_t used = 0;
    for (size_t i = 0; i < ex->g.n_slots; i++)
        used += ex->slots[i].cap + ex->slots[i].extra;
    return used;
}

/* Finds a slot for a tensor that needs `mem` + `extra` bytes, or NULL. Mutex
 * held. Keeps memory of idle slots as long as it is not in the way. */
static struct exec_slot *find_slot(struct exec *ex, uint64_t mem,
                                   uint64_t extra)
{
    struct exec_slot *best = NULL;
    bool busy = false;

    for (size_t i = 0; i < ex->g.n_slots; i++) {
        struct exec_slot *s = &ex->slots[i];
        if (s->pass != EXEC_NONE) {
            busy = true;
            continue;
        }
        if (!best || (best->cap < mem && s->cap > best->cap) ||
            (s->cap >= mem && s->cap < best->cap))
            best = s;
    }
    if (!best)
        return NULL;
    for (size_t i = 0; i <= ex->g.n_slots; i++) {
        const uint64_t grown = best->cap > mem ? best->cap : mem;
        if (window_used(ex) - best->cap + grown + extra <= ex->g.window_bytes)
            return best;
        struct exec_slot *s = i < ex->g.n_slots ? &ex->slots[i] : best;
        if (s->pass == EXEC_NONE && (s != best || i == ex->g.n_slots)) {
            tv_free(s->mem);
            s->mem = NULL;
            s->cap = 0;
        }
    }
    if (busy && window_used(ex) + mem + extra > ex->g.window_bytes)
        return NULL;
    return best;
}

/* Gives every linked input its place for leaves. */
static void lay_sums(const struct exec *ex, struct exec_slot *s)
{
    const struct tvm_tensor *t = s->t;

    s->sums = NULL;
    if (exec_sum_bytes(ex->p, t) == 0)
        return;
    s->sums = (struct tv_hash **)(void *)(s->mem + s->layout.sums);
    struct tv_hash *at = (struct tv_hash *)(void *)(s->sums + t->n_sources);
    for (size_t i = 0; i < t->n_sources; i++) {
        s->sums[i] = NULL;
        if (!tvm_sums_wanted(ex->p, &t->sources[i]))
            continue;
        s->sums[i] = at;
        at += tv_leaf_count(t->sources[i].tensor->bytes);
    }
}

enum tv_err exec_open_slot(struct exec *ex, struct exec_slot *s,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_tensor *t = s->t;
    const bool verify = ex->p->options.verify_reads;

    if (!s->mem) {
        s->mem = tv_alloc_aligned((size_t)s->cap);
        if (!s->mem) {
            rc = tv_error_set(err, TV_E_NOMEM,
                              "%s: out of memory (%llu bytes of state)",
                              t->name, (unsigned long long)s->cap);
            goto out;
        }
    }
    s->cached = (struct tvm_cached){.n = 0};
    s->readers = (struct tvm_reader *)(void *)(s->mem + s->layout.readers);
    s->leaves = (struct tv_hash *)(void *)(s->mem + s->layout.leaves);
    s->local = (uint32_t *)(void *)(s->mem + s->layout.local);
    memset(s->readers, 0, t->n_sources * sizeof *s->readers);
    memset(s->mem + s->layout.state, 0, s->layout.end - s->layout.state);
    lay_sums(ex, s);
    s->job.state = s->mem + s->layout.state;
    s->job.k = ex->k;
    s->job.seed = ex->p->options.seed;
    s->job.stream = ex->stream;
    s->job.index = s->index;
    s->job.calibrated = ex->calibrated;
    TV_TRY(tvm_cached_begin(ex->cache, s->index, &s->cached, err));
    TV_TRY(tvm_calibrated_attach(ex->calibrated, ex->p, s->index, &s->cached,
                                 err));
    s->job.trim = s->cached.trim;
    for (size_t i = 0; i < t->n_sources; i++) {
        if (t->action == TVM_COPY && i != t->copy_of)
            continue;
        s->n_open = i + 1;
        TV_TRY(
            tvm_reader_open(&s->readers[i], ex->p, t, i, ex->k, verify, err));
    }
    if (t->action == TVM_COPY &&
        s->readers[t->copy_of].view.bytes != t->bytes) {
        rc = tv_error_set(
            err, TV_E_INTERNAL, "%s: a copy of %llu bytes planned, %llu found",
            t->name, (unsigned long long)t->bytes,
            (unsigned long long)s->readers[t->copy_of].view.bytes);
        goto out;
    }
out:
    return rc;
}

struct exec_slot *exec_reserve_next(struct exec *ex)
{
    while (ex->next_tensor < ex->p->n_tensors &&
           ex->sink->done[ex->next_tensor].done)
        ex->next_tensor++;
    if (ex->next_tensor == ex->p->n_tensors)
        return NULL;
    const struct tvm_tensor *t = &ex->p->tensors[ex->next_tensor];
    struct tvm_job job = {.tensor = t, .n_workers = 1};
    if (t->action == TVM_MERGE)
        job = exec_job_of(t, &ex->g);
    const struct exec_slot_layout layout =
        exec_lay_out(ex->p, t, &job, ex->g.n_workers);
    const uint64_t extra = exec_reader_bytes(t);
    struct exec_slot *s = find_slot(ex, layout.end, extra);
    if (!s)
        return NULL;
    if (s->cap < layout.end) {
        tv_free(s->mem);
        s->mem = NULL;
        s->cap = layout.end;
    }
    s->extra = extra;
    s->pass = EXEC_SETUP;
    s->first = true;
    s->index = ex->next_tensor++;
    s->t = t;
    s->seq = ex->next_seq++;
    s->job = job;
    s->layout = layout;
    s->n_open = 0;
    s->n_tiles = job.n_tiles;
    s->n_tiles_put = 0;
    s->tile_bytes = COPY_TILE_BYTES;
    if (t->action == TVM_COPY) {
        if (ex->sink->ordered)
            s->tile_bytes = ex->g.buf_bytes / TV_LEAF_BYTES * TV_LEAF_BYTES;
        s->n_tiles = exec_round_up(t->bytes, s->tile_bytes) / s->tile_bytes;
    }
    atomic_store(&s->n_nonfinite_in, 0);
    atomic_store(&s->n_nonfinite_out, 0);
    return s;
}

/* ---- passes -------------------------------------------------------------- */

static void prepare_pass(const struct exec *ex, struct exec_slot *s,
                         enum exec_pass pass)
{
    for (unsigned w = 0; w < ex->g.n_workers; w++)
        s->local[w] = EXEC_NO_WORKER;
    s->n_local = 0;
    s->next_tile = 0;
    s->n_tiles_done = 0;
    s->pass = pass;
}

/* Next pass of a tensor whose tiles are all done, and how many it has. No lock:
 * nobody takes a tile meanwhile, and the slot itself is changed with it held.
 */
static enum exec_pass choose_pass(struct exec_slot *s, uint64_t *n_tiles)
{
    if (s->t->action == TVM_COPY)
        return EXEC_COPY;
    s->job.sample = 0;
    if (s->t->n_elems > 0 && s->t->method->next_phase &&
        s->t->method->next_phase(&s->job)) {
        const size_t n =
            s->t->method->work_items ? s->t->method->work_items(&s->job) : 0;
        *n_tiles = n > 0 ? n : s->job.n_tiles;
        return n > 0 ? EXEC_WORK : EXEC_MEASURE;
    }
    *n_tiles = s->job.n_tiles;
    return EXEC_COMBINE;
}

void exec_add_finished(struct exec *ex, struct exec_slot *s)
{
    if (ex->n_finished == ex->n_committed)
        ex->t_first_pending = exec_now();
    ex->finished[ex->n_finished++] = s->index;
    ex->bytes_finished += s->t->bytes;
    release_slot(ex, s);
    (void)pthread_cond_signal(&ex->wake_writer);
}

static void fill_done(struct exec *ex, const struct exec_slot *s)
{
    struct tvm_tensor_done *d = &ex->sink->done[s->index];

    d->checksum =
        tv_leaves_checksum(s->leaves, (size_t)tv_leaf_count(s->t->bytes));
    d->n_nonfinite_in = atomic_load(&s->n_nonfinite_in);
    for (size_t i = 0; i < s->cached.n; i++)
        if (exec_is_replaced(s, i))
            d->n_nonfinite_in += atomic_load(&s->cached.src[i].n_nonfinite);
    d->n_nonfinite_out = atomic_load(&s->n_nonfinite_out);
}

void exec_move_order(struct exec *ex)
{
    bool moved = true;
    while (moved) {
        moved = false;
        for (size_t i = 0; i < ex->g.n_slots; i++) {
            const struct exec_slot *s = &ex->slots[i];
            if (s->seq == ex->combine_seq && s->pass != EXEC_NONE &&
                (s->pass == EXEC_WRITING ||
                 (exec_is_output(s->pass) && s->next_tile == s->n_tiles))) {
                ex->combine_seq++;
                moved = true;
            }
        }
    }
}

void exec_advance(struct exec *ex, struct exec_slot *s)
{
    enum exec_pass pass = EXEC_WRITING;
    uint64_t n_tiles = s->n_tiles;

    if (!exec_is_output(s->pass))
        pass = choose_pass(s, &n_tiles);
    if (exec_is_output(pass) && n_tiles == 0)
        pass = EXEC_WRITING;
    if (pass == EXEC_WRITING) {
        fill_done(ex, s);
        tvm_cached_end(ex->cache, s->index, &s->cached, !ex->part);
        if (!ex->sink->ordered)
            exec_close_readers(s);
    }
    exec_lock(ex);
    s->n_tiles = n_tiles;
    prepare_pass(ex, s, pass);
    if (pass == EXEC_WRITING && !ex->sink->ordered)
        exec_add_finished(ex, s);
    exec_move_order(ex);
    (void)pthread_cond_broadcast(&ex->wake_workers);
    (void)pthread_cond_signal(&ex->wake_writer);
    exec_unlock(ex);
}

enum tv_err exec_take_sums(struct exec *ex, const struct exec_slot *s,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_tensor *t = s->t;

    for (size_t i = 0; i < t->n_sources; i++) {
        const struct tvm_source *from = &t->sources[i];
        const struct tv_hash *leaves = s->sums ? s->sums[i] : NULL;
        if (exec_is_replaced(s, i))
            leaves = NULL;
        if (t->action == TVM_COPY && i == t->copy_of &&
            tvm_sums_wanted(ex->p, from))
            leaves = s->leaves;
        if (!leaves)
            continue;
        const struct tv_hash sum = tv_leaves_checksum(
            leaves, (size_t)tv_leaf_count(from->tensor->bytes));
        exec_lock(ex);
        rc = tvm_sums_take(&ex->sums, ex->p, from, sum, err);
        exec_unlock(ex);
        TV_TRY(rc);
    }
out:
    return rc;
}
