/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exec.c - the scheduler: tensors, passes, tiles, workers, one writer.
 *
 * A tensor being worked on sits in a slot. Its passes (measure 0, 1, ...; then
 * combine; or copy) run one after the other, and the tiles of a pass are taken
 * by any worker. Who finishes the last tile of a pass prepares the next one. A
 * worker that finds no tile starts the next tensor, if a slot is free and its
 * state fits into the memory left; so a large tensor is shared by all workers
 * and small ones run side by side. Nothing here may influence a result: tiles
 * are runs of whole leaves, sums are joined in the order of leaves, and a
 * tensor's passes see only that tensor.
 *
 *   workers --(tile written / tensor finished)--> writer: commits groups
 *
 * The writer (exec_writer.c) is one more thread of the pool. An ordered sink (a
 * store) takes tiles from it, in order: combine tiles are then handed out in
 * the order of tensors and tiles, and a worker holds a buffer before it takes
 * one; hence the tile that the writer waits for always has a buffer, and there
 * is no deadlock.
 */
#include "exec.h"

#include <assert.h>

#include "calibrated.h"
#include "exec_parts.h"
#include "mt.h"
#include "tv/alloc.h"
#include "tv/pool.h"

void exec_fail(struct exec *ex, enum tv_err rc, const struct tv_error *err)
{
    exec_lock(ex);
    if (ex->rc == TV_OK) {
        ex->rc = rc;
        ex->err = *err;
    }
    ex->stop = true;
    (void)pthread_cond_broadcast(&ex->wake_workers);
    (void)pthread_cond_signal(&ex->wake_writer);
    exec_unlock(ex);
}

/* ---- workers ------------------------------------------------------------- */

/* A slot with a tile for this worker to take, the oldest tensor first. Mutex
 * held. */
static struct exec_slot *find_tile(struct exec *ex, unsigned worker)
{
    struct exec_slot *best = NULL;
    for (size_t i = 0; i < ex->g.n_slots; i++) {
        struct exec_slot *s = &ex->slots[i];
        if (s->pass != EXEC_MEASURE && s->pass != EXEC_WORK &&
            !exec_is_output(s->pass))
            continue;
        if (s->next_tile == s->n_tiles)
            continue;
        /* The state has room for as many workers as the tensor has tiles, and
         * there may be more items of work. */
        if (s->pass == EXEC_WORK && s->local[worker] == EXEC_NO_WORKER &&
            s->n_local == s->job.n_workers)
            continue;
        if (ex->sink->ordered && exec_is_output(s->pass) &&
            s->seq != ex->combine_seq)
            continue;
        if (!best || s->seq < best->seq)
            best = s;
    }
    return best;
}

static bool any_active(const struct exec *ex)
{
    for (size_t i = 0; i < ex->g.n_slots; i++)
        if (ex->slots[i].pass != EXEC_NONE && ex->slots[i].pass != EXEC_WRITING)
            return true;
    return ex->next_tensor < ex->p->n_tensors;
}

/* Takes a tile and runs it. Called with the lock held, returns with it. */
static void take_tile(struct exec *ex, struct exec_worker *w, unsigned worker,
                      struct exec_slot *s)
{
    struct tv_error err = {.code = TV_OK};
    enum tv_err rc = TV_OK;
    const uint64_t tile = s->next_tile++;

    if (s->local[worker] == EXEC_NO_WORKER)
        s->local[worker] = s->n_local++;
    const unsigned local = s->local[worker];
    if (ex->sink->ordered && exec_is_output(s->pass))
        exec_move_order(ex);
    const uint64_t read_before = w->bytes_read;
    exec_unlock(ex);
    if (s->pass == EXEC_COPY)
        rc = exec_copy_tile(ex, w, s, tile, &err);
    else if (s->pass == EXEC_WORK)
        rc = exec_work_item(w, s, tile, local, &err);
    else
        rc = exec_math_tile(ex, w, s, tile, local, &err);
    if (rc != TV_OK)
        exec_fail(ex, rc, &err);
    exec_lock(ex);
    ex->bytes_read += w->bytes_read - read_before;
    /* A tile that failed never counts, else whoever does the others would call
     * the tensor finished. */
    if (rc == TV_OK && ++s->n_tiles_done == s->n_tiles) {
        exec_unlock(ex);
        if (exec_is_first(s))
            rc = exec_take_sums(ex, s, &err);
        s->first = s->first && s->job.sample > 0;
        s->job.phase++;
        if (rc == TV_OK)
            exec_advance(ex, s);
        else
            exec_fail(ex, rc, &err);
        exec_lock(ex);
    }
}

static void start_tensor(struct exec *ex, struct exec_slot *s)
{
    struct tv_error err = {.code = TV_OK};

    exec_unlock(ex);
    const enum tv_err rc = exec_open_slot(ex, s, &err);
    if (rc != TV_OK)
        exec_fail(ex, rc, &err);
    else
        exec_advance(ex, s);
    exec_lock(ex);
}

static void work(struct exec *ex, unsigned worker)
{
    struct exec_worker *w = &ex->workers[worker];

    exec_lock(ex);
    while (!ex->stop) {
        struct exec_slot *s = NULL;
        if (!w->buf && ex->n_bufs > 0)
            w->buf = ex->bufs[--ex->n_bufs];
        if (w->buf && (s = find_tile(ex, worker)) != NULL) {
            take_tile(ex, w, worker, s);
            continue;
        }
        if ((s = exec_reserve_next(ex)) != NULL) {
            start_tensor(ex, s);
            continue;
        }
        if (!any_active(ex))
            break;
        (void)pthread_cond_wait(&ex->wake_workers, &ex->mutex);
    }
    ex->n_working--;
    (void)pthread_cond_broadcast(&ex->wake_workers);
    (void)pthread_cond_signal(&ex->wake_writer);
    exec_unlock(ex);
}

/* ---- writer -------------------------------------------------------------- */

/* Item 0 is the writer: it is taken first and stays until all is done, so the
 * others find a thread each. */
static void run_item(void *arg, size_t item, unsigned thread)
{
    (void)thread;
    if (item == 0)
        exec_write_loop(arg);
    else
        work(arg, (unsigned)item - 1);
}

/* ---- all ----------------------------------------------------------------- */

static enum tv_err set_up(struct exec *ex, struct tv_error *err)
{
    const struct exec_geometry *g = &ex->g;
    const size_t n = ex->p->n_tensors;

    ex->workers = tv_calloc(g->n_workers, sizeof *ex->workers);
    ex->slots = tv_calloc(g->n_slots, sizeof *ex->slots);
    ex->bufs = tv_calloc(g->n_bufs, sizeof *ex->bufs);
    ex->puts = tv_calloc(g->n_bufs, sizeof *ex->puts);
    ex->finished = tv_calloc(n + 1, sizeof *ex->finished);
    if (!ex->workers || !ex->slots || !ex->bufs || !ex->puts || !ex->finished)
        goto no_memory;
    for (unsigned i = 0; i < g->n_workers; i++) {
        struct exec_worker *w = &ex->workers[i];
        w->src = tv_alloc_aligned(g->src_floats * sizeof(float) +
                                  g->l_floats * sizeof(float) +
                                  g->mask_words * sizeof(uint64_t));
        if (!w->src)
            goto no_memory;
        w->dst = w->src + g->src_floats - TVM_BLOCK;
        w->l = w->src + g->src_floats;
        w->mask = (uint64_t *)(void *)(w->l + g->l_floats);
        const size_t most = g->mask_words / (2 * EXEC_BLOCK_WORDS + 2);
        w->known_words = w->mask + most * EXEC_BLOCK_WORDS;
        w->known = (const uint64_t **)(void *)(w->known_words +
                                               most * EXEC_BLOCK_WORDS);
        w->made = w->known + most;
    }
    for (unsigned i = 0; i < g->n_bufs; i++) {
        ex->bufs[i] = tv_alloc_aligned(g->buf_bytes);
        if (!ex->bufs[i])
            goto no_memory;
        ex->n_bufs++;
    }
    return TV_OK;
no_memory:
    return tv_error_set(err, TV_E_NOMEM, "out of memory for %u workers",
                        g->n_workers);
}

static void tear_down(struct exec *ex)
{
    for (size_t i = 0; ex->slots && i < ex->g.n_slots; i++) {
        tvm_cached_end(ex->cache, ex->slots[i].index, &ex->slots[i].cached,
                       false);
        exec_close_readers(&ex->slots[i]);
        tv_free(ex->slots[i].mem);
    }
    for (unsigned i = 0; ex->workers && i < ex->g.n_workers; i++) {
        tv_free(ex->workers[i].src);
        tv_free(ex->workers[i].buf);
    }
    for (unsigned i = 0; i < ex->n_puts; i++)
        tv_free(ex->puts[i].buf);
    for (unsigned i = 0; i < ex->n_bufs; i++)
        tv_free(ex->bufs[i]);
    ex->sink->sums = NULL;
    tvm_sums_free(&ex->sums);
    tvm_sums_free(&ex->for_sink);
    tv_free(ex->workers);
    tv_free(ex->slots);
    tv_free(ex->bufs);
    tv_free(ex->puts);
    tv_free(ex->finished);
    (void)pthread_cond_destroy(&ex->wake_writer);
    (void)pthread_cond_destroy(&ex->wake_workers);
    (void)pthread_mutex_destroy(&ex->mutex);
}

static void fill_stats(const struct exec *ex, struct tvm_exec_stats *stats)
{
    stats->t_sync = ex->t_sync;
    for (unsigned i = 0; i < ex->g.n_workers; i++) {
        const struct exec_worker *w = &ex->workers[i];
        stats->bytes_read += w->bytes_read;
        stats->bytes_written += w->bytes_written;
        stats->t_read += w->t_read;
        stats->t_compute += w->t_compute;
        stats->t_write += w->t_write;
    }
}

static void begin(struct exec *ex)
{
    const struct tvm_plan *p = ex->p;

    ex->k = p->options.kernels ? p->options.kernels : tvk_table_best();
    (void)pthread_mutex_init(&ex->mutex, NULL);
    (void)pthread_cond_init(&ex->wake_workers, NULL);
    (void)pthread_cond_init(&ex->wake_writer, NULL);
}

static enum tv_err find_room(struct exec *ex, struct tv_error *err)
{
    bool fits = false;
    const uint64_t needed = exec_plan_memory(ex->p, &ex->g, &fits);

    if (fits)
        return TV_OK;
    return tv_error_set(err, TV_E_BUDGET,
                        "the merge needs %llu bytes of memory, --memory "
                        "allows %llu",
                        (unsigned long long)needed,
                        (unsigned long long)ex->p->options.memory_bytes);
}

static enum tv_err run_tensors(struct exec *ex, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_pool *pool = NULL;

    TV_TRY(set_up(ex, err));
    ex->n_working = ex->g.n_workers;
    ex->sink->sums = &ex->for_sink;
    TV_TRY(tv_pool_open(ex->g.n_workers + 1, err, &pool));
    tv_pool_run(pool, (size_t)ex->g.n_workers + 1, run_item, ex);
out:
    tv_pool_close(pool);
    return rc;
}

enum tv_err tvm_exec_part(struct tvm_plan *part, struct tvm_sink *sink,
                          struct tvm_cache *cache,
                          struct tvm_calibrated *calibrated,
                          const struct tvm_run_hooks *hooks,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_run_hooks quiet = {.cancel = hooks ? hooks->cancel : NULL};
    struct exec ex = {.p = part,
                      .sink = sink,
                      .hooks = &quiet,
                      .cache = cache,
                      .calibrated = calibrated,
                      .part = true};

    assert(!sink->ordered && part->n_draws == 0);
    begin(&ex);
    TV_TRY(find_room(&ex, err));
    TV_TRY(run_tensors(&ex, err));
    rc = ex.rc;
    if (rc != TV_OK && err)
        *err = ex.err;
out:
    tear_down(&ex);
    return rc;
}

/* Bytes for the cache, which also lives while parts run. */
static uint64_t cache_budget(const struct exec *ex)
{
    struct tvm_plan part;
    struct exec_geometry g;
    bool fits = false;

    if (!tvm_calibrated_walks(ex->p))
        return ex->g.cache_bytes;
    (void)tvm_exec_part_plan(ex->p, &part);
    (void)exec_plan_memory(&part, &g, &fits);
    return g.cache_bytes < ex->g.cache_bytes ? g.cache_bytes
                                             : ex->g.cache_bytes;
}

enum tv_err tvm_exec(struct tvm_plan *p, struct tvm_sink *sink,
                     const struct tvm_run_hooks *hooks,
                     struct tvm_exec_stats *stats, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct exec ex = {.p = p, .sink = sink, .hooks = hooks};

    begin(&ex);
    TV_TRY(find_room(&ex, err));
    for (size_t i = 0; i < p->n_tensors; i++)
        if (sink->done[i].done) {
            ex.n_resumed++;
            ex.bytes_resumed += p->tensors[i].bytes;
        }
    TV_TRY(tvm_cache_open(p, cache_budget(&ex), err, &ex.cache));
    TV_TRY(tvm_calibrated_make(p, sink, ex.cache, hooks, &stats->calibration,
                               err, &ex.calibrated));
    if (ex.n_resumed < p->n_tensors)
        TV_TRY(
            tvm_mt_stream_open(p->options.seed, p->n_draws, err, &ex.stream));
    TV_TRY(run_tensors(&ex, err));
    exec_note_sums(&ex);
    fill_stats(&ex, stats);
    tvm_cache_stats(ex.cache, &stats->cache);
    rc = ex.rc;
    if (rc != TV_OK && err)
        *err = ex.err;
out:
    tvm_mt_stream_close(ex.stream);
    tear_down(&ex);
    tvm_cache_close(ex.cache, !sink->busy);
    tvm_calibrated_free(ex.calibrated);
    return rc;
}
