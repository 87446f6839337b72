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
 * The writer is one more thread of the pool: it makes groups of finished
 * tensors durable, reports progress and watches the cancel flag. For an ordered
 * sink (a store) it also takes the tiles, in order: combine tiles are then
 * handed out in the order of tensors and tiles, and a worker holds a buffer
 * before it takes one; hence the tile that the writer waits for always has a
 * buffer, and there is no deadlock.
 *
 * All scheduling state is guarded by one mutex; a tile is about a millisecond
 * of work, so it is not contended.
 */
#include "exec.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#include "cache.h"
#include "calibrated.h"
#include "compat.h"
#include "gather.h"
#include "method.h"
#include "mt.h"
#include "room.h"
#include "source.h"
#include "sums.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/pool.h"

#define BUF_BYTES_MAX   (2u << 20)
#define COPY_TILE_BYTES (4u << 20)
#define COMMIT_SECONDS  2.0
#define WAKE_MS         50
#define BLOCK_WORDS     (TVM_BLOCK / 64)
#define NO_WORKER       UINT32_MAX

/* ---- geometry ------------------------------------------------------------ */

struct geometry { /* how the memory budget is spent */
    unsigned n_workers, n_bufs;
    bool roomy; /* methods may spend memory to save passes */
    size_t n_slots;
    size_t buf_bytes;                        /* output of one tile */
    size_t src_floats, mask_words, l_floats; /* of a worker */
    uint64_t worker_bytes; /* everything of a worker but its buffer */
    uint64_t window_bytes; /* for all slots together */
    uint64_t other_bytes;  /* journal or dirty pages, staging */
    uint64_t most_slot_bytes;
    uint64_t cache_bytes; /* masks and task vectors of the store */
};

/* Parts of a slot's memory, in order. */
struct slot_layout {
    size_t readers, leaves, local, sums, state, tile_state, rows, end;
    size_t state_bytes, tile_state_bytes;
    uint64_t row_elems; /* 0: fed in blocks */
};

static uint64_t round_up(uint64_t n, uint64_t to)
{
    return (n + to - 1) / to * to;
}

static size_t out_bytes_each(const struct tvm_tensor *t)
{
    return tv_dtype_bits(t->dtype) / 8u;
}

/* Elements in whole leaves of checksums, of the output and of every input. */
static uint64_t tile_unit(const struct tvm_tensor *t)
{
    unsigned least = tv_dtype_bits(t->dtype);
    for (size_t s = 0; s < t->n_sources; s++) {
        const unsigned bits = tv_dtype_bits(t->sources[s].tensor->dtype);
        if (bits < least)
            least = bits;
    }
    return (uint64_t)TV_LEAF_BYTES * 8u / least;
}

static uint64_t tile_elems(const struct tvm_tensor *t, size_t buf_bytes)
{
    const uint64_t unit = tile_unit(t);
    const uint64_t n = buf_bytes / out_bytes_each(t) / unit * unit;
    return n > unit ? n : unit;
}

static struct tvm_job job_of(const struct tvm_tensor *t,
                             const struct geometry *g)
{
    struct tvm_job job = {
        .tensor = t,
        .n_leaves = round_up(t->n_elems, TVK_LEAF) / TVK_LEAF,
        .tile_elems = tile_elems(t, g->buf_bytes),
        .roomy = g->roomy,
    };
    job.n_tiles = round_up(t->n_elems, job.tile_elems) / job.tile_elems;
    job.n_workers = g->n_workers;
    if (job.n_tiles < g->n_workers)
        job.n_workers = job.n_tiles > 0 ? (unsigned)job.n_tiles : 1;
    return job;
}

static uint64_t row_elems_of(const struct tvm_tensor *t)
{
    if (t->action != TVM_MERGE || t->n_elems == 0 || !t->method->row_elems)
        return 0;
    return t->method->row_elems(t);
}

/* Of one worker. */
static size_t row_floats(const struct tvm_tensor *t, uint64_t row_elems)
{
    return (t->n_sources + 1) * (size_t)round_up(row_elems, 16);
}

/* Leaves of linked inputs, whose checksums are taken while they are read: a
 * table for every source that has none, NULL for others, then the leaves. A
 * copy's leaves are those of its source. */
static uint64_t sum_bytes(const struct tvm_plan *p, const struct tvm_tensor *t)
{
    uint64_t bytes = 0;
    for (size_t i = 0; t->action == TVM_MERGE && i < t->n_sources; i++)
        if (tvm_sums_wanted(p, &t->sources[i]))
            bytes += tv_leaf_count(t->sources[i].tensor->bytes) *
                     sizeof(struct tv_hash);
    return bytes > 0 ? bytes + t->n_sources * sizeof(struct tv_hash *) : 0;
}

static struct slot_layout lay_out(const struct tvm_plan *p,
                                  const struct tvm_tensor *t,
                                  const struct tvm_job *job, unsigned n_workers)
{
    struct slot_layout l = {.readers = 0};
    size_t at = (size_t)round_up(t->n_sources * sizeof(struct tvm_reader), 64);

    l.leaves = at;
    at +=
        (size_t)round_up(tv_leaf_count(t->bytes) * sizeof(struct tv_hash), 64);
    l.local = at;
    at += (size_t)round_up(n_workers * sizeof(uint32_t), 64);
    l.sums = at;
    at += (size_t)round_up(sum_bytes(p, t), 64);
    l.state = at;
    if (t->action == TVM_MERGE && t->n_elems > 0) {
        if (t->method->state_bytes)
            l.state_bytes = (size_t)round_up(t->method->state_bytes(job), 64);
        if (t->method->tile_bytes)
            l.tile_state_bytes =
                (size_t)round_up(t->method->tile_bytes(job), 64);
    }
    at += l.state_bytes;
    l.tile_state = at;
    at += l.tile_state_bytes * (size_t)job->n_tiles;
    l.rows = at;
    l.row_elems = row_elems_of(t);
    /* One row of every source and one of the result, a worker. */
    at += job->n_workers * row_floats(t, l.row_elems) * sizeof(float);
    l.end = at;
    return l;
}

/* Bytes that the readers of a tensor allocate themselves. */
static uint64_t reader_bytes(const struct tvm_tensor *t)
{
    uint64_t bytes = 0;
    for (size_t s = 0; s < t->n_sources; s++)
        bytes += tvm_source_bytes(t, s);
    return bytes;
}

static uint64_t slot_bytes(const struct tvm_plan *p, const struct tvm_tensor *t,
                           const struct geometry *g)
{
    if (t->action == TVM_COPY)
        return 4096 + reader_bytes(t) +
               tv_leaf_count(t->bytes) * sizeof(struct tv_hash) +
               g->n_workers * sizeof(uint32_t);
    const struct tvm_job job = job_of(t, g);
    return 4096 + reader_bytes(t) + lay_out(p, t, &job, g->n_workers).end;
}

static bool is_into(const struct tvm_plan *p)
{
    return p->options.into != NULL;
}

/* Buffer of the smallest tile that any tensor allows. */
static size_t least_buf(const struct tvm_plan *p)
{
    size_t least = TV_LEAF_BYTES;
    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *t = &p->tensors[i];
        if (t->action != TVM_MERGE)
            continue;
        const size_t bytes = (size_t)(tile_unit(t) * out_bytes_each(t));
        if (bytes > least)
            least = bytes;
    }
    return least;
}

static void measure_workers(const struct tvm_plan *p, struct geometry *g)
{
    size_t most = 1;
    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *t = &p->tensors[i];
        if (t->n_sources > most)
            most = t->n_sources;
        for (size_t s = 0; s < t->n_sources; s++) {
            const size_t l = tvm_source_l_floats(t, s);
            if (l > g->l_floats)
                g->l_floats = l;
        }
    }
    g->src_floats = (most + 1) * TVM_BLOCK;
    /* Made ones, known ones, pointers to both. */
    g->mask_words = most * (2 * BLOCK_WORDS + 2);
    g->l_floats = (size_t)round_up(g->l_floats, 16);
    g->worker_bytes = (g->src_floats + g->l_floats) * sizeof(float) +
                      g->mask_words * sizeof(uint64_t) + 1024;
}

static uint64_t most_slot(const struct tvm_plan *p, const struct geometry *g)
{
    uint64_t most = 0;
    for (size_t i = 0; i < p->n_tensors; i++) {
        const uint64_t bytes = slot_bytes(p, &p->tensors[i], g);
        if (bytes > most)
            most = bytes;
    }
    return most;
}

/* Sets the parts that follow from n_workers and buf_bytes; returns their sum
 * with the largest slot alone. */
static uint64_t weigh(const struct tvm_plan *p, struct geometry *g)
{
    g->n_bufs = is_into(p) ? g->n_workers + 2 : g->n_workers;
    g->most_slot_bytes = most_slot(p, g);
    return g->other_bytes + g->n_workers * g->worker_bytes +
           (uint64_t)g->n_bufs * (g->buf_bytes + 64u) + g->most_slot_bytes;
}

/* Returns the least memory that would do; *fits says if the budget has it. */
static uint64_t plan_memory(const struct tvm_plan *p, struct geometry *g,
                            bool *fits)
{
    const uint64_t budget = p->options.memory_bytes;
    const unsigned asked =
        p->options.threads > 0 ? p->options.threads : tv_cpu_count();
    const size_t least = least_buf(p);
    uint64_t total = 0;

    *g = (struct geometry){.n_workers = asked, .roomy = true};
    g->other_bytes = is_into(p) ? budget / 4 : 1u << 20;
    if (is_into(p) && g->other_bytes > (64u << 20))
        g->other_bytes = 64u << 20;
    g->other_bytes += tvm_mt_stream_bytes(p->n_draws);
    if (p->options.cuda)
        g->other_bytes += tvk_cuda_staging(p->options.cuda);
    measure_workers(p, g);
    g->buf_bytes = least > BUF_BYTES_MAX ? least : BUF_BYTES_MAX;
    for (;;) {
        total = weigh(p, g);
        *fits = total <= budget;
        if (*fits)
            break;
        if (g->roomy)
            g->roomy = false;
        else if (g->buf_bytes > least)
            g->buf_bytes = least;
        else if (g->n_workers > 1)
            g->n_workers--;
        else
            break;
    }
    g->n_slots = (size_t)g->n_workers + 2;
    g->window_bytes = g->most_slot_bytes;
    if (*fits) {
        /* The cache lives on what is over: it must not make a merge fail. */
        if (p->options.store && !p->options.no_cache)
            g->cache_bytes = (budget - total) / 2;
        g->window_bytes += budget - total - g->cache_bytes;
    }
    return total;
}

uint64_t tvm_exec_scratch(const struct tvm_plan *p, bool *fits,
                          uint64_t *needed)
{
    struct geometry g;
    const uint64_t total = plan_memory(p, &g, fits);
    struct tvm_plan least = *p;
    bool unused = false;

    least.options.memory_bytes = 0;
    struct geometry small;
    *needed = plan_memory(&least, &small, &unused);
    if (is_into(p))
        /* A quarter of the budget is for dirty pages. */
        *needed = *needed / 3 * 4 + 4;
    uint64_t slots = g.most_slot_bytes * (g.n_slots - 1);
    if (slots > g.window_bytes - g.most_slot_bytes)
        slots = g.window_bytes - g.most_slot_bytes;
    return total + slots + g.cache_bytes;
}

/* ---- state --------------------------------------------------------------- */

enum pass {
    PASS_NONE,
    PASS_SETUP,
    PASS_MEASURE,
    PASS_WORK,
    PASS_COMBINE,
    PASS_COPY,
    PASS_WRITING
};

struct slot { /* a tensor being worked on */
    enum pass pass;
    bool first;   /* no pass over all elements yet (see is_first) */
    size_t index; /* of the tensor in the plan */
    const struct tvm_tensor *t;
    uint64_t seq; /* order of starting */
    struct tvm_job job;
    uint64_t tile_bytes; /* PASS_COPY */
    uint64_t n_tiles, next_tile, n_tiles_done, n_tiles_put;
    struct slot_layout layout;
    struct tvm_reader *readers;
    size_t n_open; /* readers opened */
    struct tv_hash *leaves;
    struct tv_hash **sums; /* [n_sources] leaves of linked inputs, or NULL */
    uint32_t *local;       /* [n_workers] numbers within this pass */
    uint32_t n_local;
    _Atomic uint64_t n_nonfinite_in, n_nonfinite_out;
    unsigned char *mem;
    uint64_t cap, extra; /* bytes of mem; bytes of readers */
    struct tvm_cached cached;
};

struct put { /* a tile on its way to an ordered sink */
    struct slot *slot;
    uint64_t tile;
    unsigned char *buf;
    size_t n;
};

struct worker {
    float *src; /* [n_sources][TVM_BLOCK], then dst */
    float *dst, *l;
    uint64_t *mask, *known_words;   /* [n_sources][BLOCK_WORDS] each */
    const uint64_t **known, **made; /* [n_sources] */
    unsigned char *buf;
    uint64_t bytes_read, bytes_written;
    double t_read, t_compute, t_write;
};

struct exec {
    struct tvm_plan *p;
    struct tvm_sink *sink;
    const struct tvm_run_hooks *hooks;
    const struct tvk_table *k;
    struct tvm_cache *cache;
    struct tvm_calibrated *calibrated;
    bool part; /* of a plan: cache and masks are somebody else's */
    struct tvm_mt_stream *stream;
    struct geometry g;
    struct worker *workers;

    pthread_mutex_t mutex;
    pthread_cond_t wake_workers, wake_writer;
    bool stop;
    enum tv_err rc;
    struct tv_error err;
    struct slot *slots; /* [n_slots] */
    size_t next_tensor; /* to be started */
    uint64_t next_seq, combine_seq, write_seq;
    unsigned n_working;   /* workers that have not left */
    unsigned char **bufs; /* free buffers of an ordered sink */
    unsigned n_bufs;
    struct put *puts; /* [g.n_bufs] */
    unsigned n_puts;
    size_t *finished; /* [n_tensors]: in order of finishing */
    size_t n_finished, n_committed;
    uint64_t bytes_finished, bytes_committed, bytes_read;
    double t_first_pending, t_sync;
    bool changed;             /* an input, under our hands; the writer's */
    struct tvm_sums sums;     /* of linked tensors read until now */
    struct tvm_sums for_sink; /* the writer's part of them */
    size_t n_reported;
    uint64_t bytes_reported, bytes_resumed;
    size_t n_resumed;
};

static double now(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

static void lock(struct exec *ex)
{
    (void)pthread_mutex_lock(&ex->mutex);
}

static void unlock(struct exec *ex)
{
    (void)pthread_mutex_unlock(&ex->mutex);
}

/* Keeps the first error and lets everybody leave. */
static void fail(struct exec *ex, enum tv_err rc, const struct tv_error *err)
{
    lock(ex);
    if (ex->rc == TV_OK) {
        ex->rc = rc;
        ex->err = *err;
    }
    ex->stop = true;
    (void)pthread_cond_broadcast(&ex->wake_workers);
    (void)pthread_cond_signal(&ex->wake_writer);
    unlock(ex);
}

static bool cancelled(const struct exec *ex)
{
    return ex->hooks && ex->hooks->cancel && *ex->hooks->cancel != 0;
}

/* ---- slots --------------------------------------------------------------- */

static void close_readers(struct slot *s)
{
    for (size_t i = 0; i < s->n_open; i++)
        tvm_reader_close(&s->readers[i]);
    s->n_open = 0;
}

/* Mutex held, readers closed. */
static void release_slot(struct exec *ex, struct slot *s)
{
    s->pass = PASS_NONE;
    s->extra = 0;
    (void)pthread_cond_broadcast(&ex->wake_workers);
}

static uint64_t window_used(const struct exec *ex)
{
    uint64_t used = 0;
    for (size_t i = 0; i < ex->g.n_slots; i++)
        used += ex->slots[i].cap + ex->slots[i].extra;
    return used;
}

/* Finds a slot for a tensor that needs `mem` + `extra` bytes, or NULL. Mutex
 * held. Keeps memory of idle slots as long as it is not in the way. */
static struct slot *find_slot(struct exec *ex, uint64_t mem, uint64_t extra)
{
    struct slot *best = NULL;
    bool busy = false;

    for (size_t i = 0; i < ex->g.n_slots; i++) {
        struct slot *s = &ex->slots[i];
        if (s->pass != PASS_NONE) {
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
        struct slot *s = i < ex->g.n_slots ? &ex->slots[i] : best;
        if (s->pass == PASS_NONE && (s != best || i == ex->g.n_slots)) {
            tv_free(s->mem);
            s->mem = NULL;
            s->cap = 0;
        }
    }
    if (busy && window_used(ex) + mem + extra > ex->g.window_bytes)
        return NULL;
    return best;
}

static void prepare_pass(const struct exec *ex, struct slot *s, enum pass pass)
{
    for (unsigned w = 0; w < ex->g.n_workers; w++)
        s->local[w] = NO_WORKER;
    s->n_local = 0;
    s->next_tile = 0;
    s->n_tiles_done = 0;
    s->pass = pass;
}

/* Next pass of a tensor whose tiles are all done, and how many it has. No lock:
 * nobody takes a tile meanwhile, and the slot itself is changed with it held.
 */
static enum pass choose_pass(struct slot *s, uint64_t *n_tiles)
{
    if (s->t->action == TVM_COPY)
        return PASS_COPY;
    s->job.sample = 0;
    if (s->t->n_elems > 0 && s->t->method->next_phase &&
        s->t->method->next_phase(&s->job)) {
        const size_t n =
            s->t->method->work_items ? s->t->method->work_items(&s->job) : 0;
        *n_tiles = n > 0 ? n : s->job.n_tiles;
        return n > 0 ? PASS_WORK : PASS_MEASURE;
    }
    *n_tiles = s->job.n_tiles;
    return PASS_COMBINE;
}

/* Gives every linked input its place for leaves. */
static void lay_sums(const struct exec *ex, struct slot *s)
{
    const struct tvm_tensor *t = s->t;

    s->sums = NULL;
    if (sum_bytes(ex->p, t) == 0)
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

static enum tv_err open_slot(struct exec *ex, struct slot *s,
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

/* Reserves a slot for the next tensor, or returns NULL. Mutex held. */
static struct slot *reserve_next(struct exec *ex)
{
    while (ex->next_tensor < ex->p->n_tensors &&
           ex->sink->done[ex->next_tensor].done)
        ex->next_tensor++;
    if (ex->next_tensor == ex->p->n_tensors)
        return NULL;
    const struct tvm_tensor *t = &ex->p->tensors[ex->next_tensor];
    struct tvm_job job = {.tensor = t, .n_workers = 1};
    if (t->action == TVM_MERGE)
        job = job_of(t, &ex->g);
    const struct slot_layout layout = lay_out(ex->p, t, &job, ex->g.n_workers);
    const uint64_t extra = reader_bytes(t);
    struct slot *s = find_slot(ex, layout.end, extra);
    if (!s)
        return NULL;
    if (s->cap < layout.end) {
        tv_free(s->mem);
        s->mem = NULL;
        s->cap = layout.end;
    }
    s->extra = extra;
    s->pass = PASS_SETUP;
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
        s->n_tiles = round_up(t->bytes, s->tile_bytes) / s->tile_bytes;
    }
    atomic_store(&s->n_nonfinite_in, 0);
    atomic_store(&s->n_nonfinite_out, 0);
    return s;
}

/* ---- finishing ----------------------------------------------------------- */

/* Records a finished tensor for the writer. Mutex held. */
static void add_finished(struct exec *ex, struct slot *s)
{
    if (ex->n_finished == ex->n_committed)
        ex->t_first_pending = now();
    ex->finished[ex->n_finished++] = s->index;
    ex->bytes_finished += s->t->bytes;
    release_slot(ex, s);
    (void)pthread_cond_signal(&ex->wake_writer);
}

/* Is a source read from its task vector? */
static bool is_replaced(const struct slot *s, size_t source)
{
    return s->cached.n > 0 &&
           (s->cached.src[source].delta || s->cached.src[source].fixed_values);
}

static void fill_done(struct exec *ex, const struct slot *s)
{
    struct tvm_tensor_done *d = &ex->sink->done[s->index];

    d->checksum =
        tv_leaves_checksum(s->leaves, (size_t)tv_leaf_count(s->t->bytes));
    d->n_nonfinite_in = atomic_load(&s->n_nonfinite_in);
    for (size_t i = 0; i < s->cached.n; i++)
        if (is_replaced(s, i))
            d->n_nonfinite_in += atomic_load(&s->cached.src[i].n_nonfinite);
    d->n_nonfinite_out = atomic_load(&s->n_nonfinite_out);
}

static bool is_output(enum pass p)
{
    return p == PASS_COMBINE || p == PASS_COPY;
}

/* Lets the next tensor give out its output tiles once the one before it has
 * given out all of its own. Mutex held. */
static void move_order(struct exec *ex)
{
    bool moved = true;
    while (moved) {
        moved = false;
        for (size_t i = 0; i < ex->g.n_slots; i++) {
            const struct slot *s = &ex->slots[i];
            if (s->seq == ex->combine_seq && s->pass != PASS_NONE &&
                (s->pass == PASS_WRITING ||
                 (is_output(s->pass) && s->next_tile == s->n_tiles))) {
                ex->combine_seq++;
                moved = true;
            }
        }
    }
}

/* Goes on with a tensor all of whose tiles of a pass are done, or that has just
 * been opened. Called without the lock. */
static void advance(struct exec *ex, struct slot *s)
{
    enum pass pass = PASS_WRITING;
    uint64_t n_tiles = s->n_tiles;

    if (!is_output(s->pass))
        pass = choose_pass(s, &n_tiles);
    if (is_output(pass) && n_tiles == 0)
        pass = PASS_WRITING;
    if (pass == PASS_WRITING) {
        fill_done(ex, s);
        tvm_cached_end(ex->cache, s->index, &s->cached, !ex->part);
        if (!ex->sink->ordered)
            close_readers(s);
    }
    lock(ex);
    s->n_tiles = n_tiles;
    prepare_pass(ex, s, pass);
    if (pass == PASS_WRITING && !ex->sink->ordered)
        add_finished(ex, s);
    move_order(ex);
    (void)pthread_cond_broadcast(&ex->wake_workers);
    (void)pthread_cond_signal(&ex->wake_writer);
    unlock(ex);
}

/* All of a tensor's inputs have been read: checks and keeps the checksums of
 * the linked ones. */
static enum tv_err take_sums(struct exec *ex, const struct slot *s,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_tensor *t = s->t;

    for (size_t i = 0; i < t->n_sources; i++) {
        const struct tvm_source *from = &t->sources[i];
        const struct tv_hash *leaves = s->sums ? s->sums[i] : NULL;
        if (is_replaced(s, i))
            leaves = NULL;
        if (t->action == TVM_COPY && i == t->copy_of &&
            tvm_sums_wanted(ex->p, from))
            leaves = s->leaves;
        if (!leaves)
            continue;
        const struct tv_hash sum = tv_leaves_checksum(
            leaves, (size_t)tv_leaf_count(from->tensor->bytes));
        lock(ex);
        rc = tvm_sums_take(&ex->sums, ex->p, from, sum, err);
        unlock(ex);
        TV_TRY(rc);
    }
out:
    return rc;
}

/* ---- tiles --------------------------------------------------------------- */

static void hash_out(struct slot *s, uint64_t off, const unsigned char *data,
                     size_t n)
{
    for (size_t at = 0; at < n; at += TV_LEAF_BYTES) {
        const size_t left = n - at;
        s->leaves[(off + at) / TV_LEAF_BYTES] =
            tv_hash128(data + at, left < TV_LEAF_BYTES ? left : TV_LEAF_BYTES);
    }
}

/* Leaves of bytes [off, off + n) of a linked input. */
static void hash_in(struct slot *s, size_t source, uint64_t off, uint64_t n)
{
    for (uint64_t at = off; at < off + n; at += TV_LEAF_BYTES)
        s->sums[source][at / TV_LEAF_BYTES] =
            tv_view_leaf(&s->readers[source].view, at / TV_LEAF_BYTES);
}

/* Hands the tile in w->buf over. */
static enum tv_err deliver(struct exec *ex, struct worker *w, struct slot *s,
                           uint64_t tile, uint64_t off, size_t n,
                           struct tv_error *err)
{
    if (!ex->sink->ordered)
        return ex->sink->ops->write(ex->sink, s->index, off, w->buf, n, err);
    lock(ex);
    ex->puts[ex->n_puts++] = (struct put){s, tile, w->buf, n};
    w->buf = NULL;
    (void)pthread_cond_signal(&ex->wake_writer);
    unlock(ex);
    return TV_OK;
}

/* Is the pass at hand the first over all elements? Then inputs are verified and
 * counted. */
static bool is_first(const struct slot *s)
{
    return s->first && s->job.sample == 0;
}

/* NaN and infinity that a block of a source has. */
static void note_bad(struct slot *s, size_t source, uint64_t n, uint64_t *bad)
{
    *bad += n;
    if (n > 0 && s->cached.n > 0)
        atomic_fetch_add(&s->cached.src[source].n_nonfinite, n);
}

/* Values of one source in a block, at `at` [n] or where they are, and what is
 * known of its mask. NULL when nobody will look at them. */
static const float *read_block(struct exec *ex, struct worker *w,
                               struct slot *s, size_t source, uint64_t start,
                               size_t n, float *at, uint64_t *bad)
{
    const struct tvk_table *k = ex->k;
    const uint64_t *mask = tvm_cached_mask(
        &s->cached, source, start, n, w->known_words + source * BLOCK_WORDS);

    w->known[source] = mask;
    w->made[source] = NULL;
    if (is_replaced(s, source)) {
        if (s->pass != PASS_COMBINE)
            return NULL;
        w->bytes_read += tvm_cached_expand(&s->cached, source, k, start, n,
                                           mask, w->dst, at);
        return at;
    }
    if (mask && !is_first(s) && s->pass != PASS_COMBINE)
        return NULL;
    uint64_t here = 0;
    const float *x = tvm_reader_block(&s->readers[source], k, start, n, at,
                                      w->l, is_first(s) ? &here : NULL);
    note_bad(s, source, here, bad);
    if (s->t->compute != TV_DTYPE_NONE)
        x = tvm_compat_input(k, s->t, source, x, at, n);
    if (mask && s->pass == PASS_COMBINE)
        tvm_cached_keep_values(&s->cached, source, k, start, n, mask, x,
                               w->dst);
    return x;
}

/* Whole rows that a tile has elements of. */
static void run_rows(struct exec *ex, struct worker *w, struct slot *s,
                     struct tvm_tile *tile, bool combine, uint64_t *bad_in,
                     uint64_t *bad_out)
{
    const struct tvm_tensor *t = s->t;
    const uint64_t len = s->layout.row_elems;
    const size_t stride = (size_t)round_up(len, 16);
    const size_t each = out_bytes_each(t);
    const uint64_t end = tile->first + tile->n;
    float *const rows = (float *)(void *)(s->mem + s->layout.rows) +
                        tile->worker * row_floats(t, len);
    float *const dst = rows + t->n_sources * stride;
    const float *x[TVK_DONORS_MAX + 1];

    for (size_t i = 0; i < t->n_sources; i++)
        x[i] = rows + i * stride;
    for (uint64_t row = tile->first / len; row * len < end; row++) {
        const uint64_t at = row * len;
        const bool own = at >= tile->first;
        uint64_t unused = 0;
        if (!combine && !own)
            continue;
        for (uint64_t done = 0; done < len; done += TVM_BLOCK) {
            const size_t n =
                len - done < TVM_BLOCK ? (size_t)(len - done) : TVM_BLOCK;
            for (size_t i = 0; i < t->n_sources; i++) {
                float *to = rows + i * stride + done;
                const float *from = read_block(ex, w, s, i, at + done, n, to,
                                               own ? bad_in : &unused);
                if (from != to)
                    memcpy(to, from, n * sizeof *to);
            }
        }
        tile->start = at;
        if (!combine) {
            t->method->measure_row(&s->job, tile, row, x, (size_t)len);
            continue;
        }
        t->method->combine_row(&s->job, tile, row, x, dst, (size_t)len);
        const uint64_t from = own ? at : tile->first;
        const uint64_t to = at + len < end ? at + len : end;
        for (uint64_t e = from; e < to; e += TVM_BLOCK) {
            const size_t n = to - e < TVM_BLOCK ? (size_t)(to - e) : TVM_BLOCK;
            unsigned char *out = w->buf + (size_t)(e - tile->first) * each;
            *bad_out += tvk_from_f32(ex->k, t->dtype, out, dst + (e - at), n);
        }
    }
}

/* Is the pass at hand one over bf16 as it is (struct tvm_method)? */
static bool takes_bf16(const struct exec *ex, const struct slot *s)
{
    const struct tvm_tensor *t = s->t;
    const bool combine = s->pass == PASS_COMBINE;

    if (!t->method->takes_bf16 || ex->k->trouble || s->job.sample > 0 ||
        t->compute != TV_DTYPE_NONE || (combine && t->dtype != TV_BF16))
        return false;
    for (size_t i = 0; i < t->n_sources; i++)
        if (!tvm_reader_is_bf16(&s->readers[i]) || is_replaced(s, i) ||
            (s->job.trim && s->job.trim[i].known))
            return false;
    return t->method->takes_bf16(&s->job, combine);
}

static void run_bf16(struct exec *ex, struct worker *w, struct slot *s,
                     struct tvm_tile *tile, uint64_t *bad_in, uint64_t *bad_out)
{
    const struct tvm_tensor *t = s->t;
    const void *x[TVK_DONORS_MAX + 1];

    for (uint64_t done = 0; done < tile->n; done += TVM_BLOCK) {
        const size_t n =
            tile->n - done < TVM_BLOCK ? (size_t)(tile->n - done) : TVM_BLOCK;
        tile->start = tile->first + done;
        for (size_t i = 0; i < t->n_sources; i++) {
            x[i] = tvm_reader_bf16(&s->readers[i], tile->start, n,
                                   w->src + i * TVM_BLOCK);
            w->known[i] = NULL;
            w->made[i] = NULL;
        }
        if (s->pass == PASS_COMBINE) {
            *bad_out += t->method->combine_bf16(&s->job, tile, x,
                                                w->buf + 2 * (size_t)done, n);
            for (size_t i = 0; i < s->cached.n; i++)
                tvm_cached_keep_mask(&s->cached, i, tile->start, n, w->made[i]);
        } else {
            t->method->measure_bf16(&s->job, tile, x, n);
        }
        /* Last: by now they are in the cache. */
        for (size_t i = 0; is_first(s) && i < t->n_sources; i++)
            note_bad(s, i, ex->k->count_nonfinite_bf16(x[i], n), bad_in);
    }
}

static enum tv_err run_math_tile(struct exec *ex, struct worker *w,
                                 struct slot *s, uint64_t number,
                                 unsigned local, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_job *job = &s->job;
    const struct tvm_tensor *t = s->t;
    const struct tvk_table *k = ex->k;
    const float *x[TVK_DONORS_MAX + 1];
    const size_t each = out_bytes_each(t);
    const bool combine = s->pass == PASS_COMBINE;
    uint64_t bad_in = 0;
    uint64_t bad_out = 0;
    struct tvm_tile tile = {
        .tile = number,
        .first = number * job->tile_elems,
        .worker = local,
        .mask_words = w->mask,
        .known = w->known,
        .made = w->made,
        .tile_state = s->layout.tile_state_bytes > 0
                          ? s->mem + s->layout.tile_state +
                                s->layout.tile_state_bytes * (size_t)number
                          : NULL,
    };
    tile.n = t->n_elems - tile.first;
    if (tile.n > job->tile_elems)
        tile.n = job->tile_elems;
    tile.start = tile.first;

    double t0 = now();
    for (size_t i = 0; is_first(s) && i < t->n_sources; i++) {
        const size_t in_each = s->readers[i].elem_bytes;
        if (is_replaced(s, i))
            continue;
        w->bytes_read += tile.n * in_each;
        if (!ex->p->options.verify_reads)
            continue;
        if (s->readers[i].gather)
            TV_TRY(tvm_gather_verify(&s->readers[i], number, s->n_tiles, err));
        else
            TV_TRY(tvm_reader_verify(&s->readers[i], tile.first * in_each,
                                     tile.n * in_each, err));
        if (s->sums && s->sums[i])
            hash_in(s, i, tile.first * in_each, tile.n * in_each);
    }
    double t1 = now();
    w->t_read += t1 - t0;
    t0 = t1;
    if (t->method->tile_begin)
        t->method->tile_begin(job, &tile);
    const bool rows = s->layout.row_elems > 0 &&
                      (!t->method->row_pass || t->method->row_pass(job));
    const bool bf16 = !rows && takes_bf16(ex, s);
    if (rows)
        run_rows(ex, w, s, &tile, combine, &bad_in, &bad_out);
    if (bf16)
        run_bf16(ex, w, s, &tile, &bad_in, &bad_out);
    for (uint64_t done = rows || bf16 ? tile.n : 0; done < tile.n;
         done += TVM_BLOCK) {
        size_t n =
            tile.n - done < TVM_BLOCK ? (size_t)(tile.n - done) : TVM_BLOCK;
        if (job->sample > 0 && n > job->sample)
            n = job->sample;
        tile.start = tile.first + done;
        for (size_t i = 0; i < t->n_sources; i++)
            x[i] = read_block(ex, w, s, i, tile.start, n,
                              w->src + i * TVM_BLOCK, &bad_in);
        if (!combine) {
            t->method->measure(job, &tile, x, n);
            continue;
        }
        unsigned char *at = w->buf + (size_t)done * each;
        float *dst = t->dtype == TV_F32 ? (float *)(void *)at : w->dst;
        t->method->combine(job, &tile, x, dst, n);
        for (size_t i = 0; i < s->cached.n; i++)
            tvm_cached_keep_mask(&s->cached, i, tile.start, n, w->made[i]);
        bad_out += t->dtype != TV_F32 ? tvk_from_f32(k, t->dtype, at, dst, n)
                                      : k->count_nonfinite(dst, n);
    }
    /* What was computed is right, but a merge does not go on without the device
     * that it was told to use. */
    if (k->trouble)
        TV_TRY(k->trouble(err));
    if (combine)
        hash_out(s, tile.first * each, w->buf, (size_t)tile.n * each);
    t1 = now();
    w->t_compute += t1 - t0;
    if (bad_in > 0)
        atomic_fetch_add(&s->n_nonfinite_in, bad_in);
    if (bad_out > 0)
        atomic_fetch_add(&s->n_nonfinite_out, bad_out);
    if (combine) {
        const size_t n = (size_t)tile.n * each;
        w->bytes_written += n;
        TV_TRY(deliver(ex, w, s, number, tile.first * each, n, err));
        w->t_write += now() - t1;
    }
out:
    return rc;
}

/* A share of a matrix method's work, which reads its state only. */
static enum tv_err run_item_of_work(struct worker *w, struct slot *s,
                                    uint64_t item, unsigned local,
                                    struct tv_error *err)
{
    const double t0 = now();
    const enum tv_err rc =
        s->t->method->work(&s->job, (size_t)item, local, err);

    if (rc != TV_OK)
        tv_error_context(err, "%s", s->t->name);
    w->t_compute += now() - t0;
    return rc;
}

/* Copied values count like merged ones. */
static uint64_t count_copied(const struct exec *ex, struct worker *w,
                             const struct tv_view *v, const unsigned char *data,
                             size_t n)
{
    uint64_t bad = 0;
    if (!tv_dtype_is_math(v->dtype))
        return 0;
    const size_t each = tv_dtype_bits(v->dtype) / 8u;
    for (size_t at = 0; at < n / each; at += TVM_BLOCK) {
        const size_t left = n / each - at;
        const size_t some = left < TVM_BLOCK ? left : TVM_BLOCK;
        bad += tvk_to_f32(ex->k, v->dtype, w->dst, data + at * each, some);
    }
    return bad;
}

static enum tv_err run_copy_tile(struct exec *ex, struct worker *w,
                                 struct slot *s, uint64_t number,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_reader *r = &s->readers[s->t->copy_of];
    const bool verify = ex->p->options.verify_reads && r->view.leaves != NULL;
    const uint64_t first = number * s->tile_bytes;
    uint64_t end = first + s->tile_bytes;
    uint64_t bad = 0;

    if (end > s->t->bytes)
        end = s->t->bytes;
    for (uint64_t off = first; off < end; off += TV_LEAF_BYTES) {
        const uint64_t leaf = off / TV_LEAF_BYTES;
        const size_t n =
            end - off < TV_LEAF_BYTES ? (size_t)(end - off) : TV_LEAF_BYTES;
        uint64_t run = 0;
        const double t0 = now();
        const unsigned char *data = tv_view_at(&r->view, off, &run);
        if (ex->sink->ordered || run < n) {
            unsigned char *at =
                w->buf + (ex->sink->ordered ? (size_t)(off - first) : 0);
            tv_view_copy(&r->view, off, n, at);
            data = at;
        }
        s->leaves[leaf] = tv_hash128(data, n);
        if (verify && !tv_hash_equal(s->leaves[leaf], r->view.leaves[leaf])) {
            rc = tvm_reader_damaged(r, leaf, err);
            goto out;
        }
        bad += count_copied(ex, w, &r->view, data, n);
        const double t1 = now();
        w->t_read += t1 - t0;
        if (!ex->sink->ordered)
            TV_TRY(ex->sink->ops->write(ex->sink, s->index, off, data, n, err));
        w->t_write += now() - t1;
    }
    if (bad > 0) {
        atomic_fetch_add(&s->n_nonfinite_in, bad);
        atomic_fetch_add(&s->n_nonfinite_out, bad);
    }
    w->bytes_read += end - first;
    w->bytes_written += end - first;
    if (ex->sink->ordered)
        rc = deliver(ex, w, s, number, first, (size_t)(end - first), err);
out:
    return rc;
}

/* ---- workers ------------------------------------------------------------- */

/* A slot with a tile for this worker to take, the oldest tensor first. Mutex
 * held. */
static struct slot *find_tile(struct exec *ex, unsigned worker)
{
    struct slot *best = NULL;
    for (size_t i = 0; i < ex->g.n_slots; i++) {
        struct slot *s = &ex->slots[i];
        if (s->pass != PASS_MEASURE && s->pass != PASS_WORK &&
            !is_output(s->pass))
            continue;
        if (s->next_tile == s->n_tiles)
            continue;
        /* The state has room for as many workers as the tensor has tiles, and
         * there may be more items of work. */
        if (s->pass == PASS_WORK && s->local[worker] == NO_WORKER &&
            s->n_local == s->job.n_workers)
            continue;
        if (ex->sink->ordered && is_output(s->pass) &&
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
        if (ex->slots[i].pass != PASS_NONE && ex->slots[i].pass != PASS_WRITING)
            return true;
    return ex->next_tensor < ex->p->n_tensors;
}

/* Takes a tile and runs it. Called with the lock held, returns with it. */
static void take_tile(struct exec *ex, struct worker *w, unsigned worker,
                      struct slot *s)
{
    struct tv_error err = {.code = TV_OK};
    enum tv_err rc = TV_OK;
    const uint64_t tile = s->next_tile++;

    if (s->local[worker] == NO_WORKER)
        s->local[worker] = s->n_local++;
    const unsigned local = s->local[worker];
    if (ex->sink->ordered && is_output(s->pass))
        move_order(ex);
    const uint64_t read_before = w->bytes_read;
    unlock(ex);
    if (s->pass == PASS_COPY)
        rc = run_copy_tile(ex, w, s, tile, &err);
    else if (s->pass == PASS_WORK)
        rc = run_item_of_work(w, s, tile, local, &err);
    else
        rc = run_math_tile(ex, w, s, tile, local, &err);
    if (rc != TV_OK)
        fail(ex, rc, &err);
    lock(ex);
    ex->bytes_read += w->bytes_read - read_before;
    /* A tile that failed never counts, else whoever does the others would call
     * the tensor finished. */
    if (rc == TV_OK && ++s->n_tiles_done == s->n_tiles) {
        unlock(ex);
        if (is_first(s))
            rc = take_sums(ex, s, &err);
        s->first = s->first && s->job.sample > 0;
        s->job.phase++;
        if (rc == TV_OK)
            advance(ex, s);
        else
            fail(ex, rc, &err);
        lock(ex);
    }
}

static void start_tensor(struct exec *ex, struct slot *s)
{
    struct tv_error err = {.code = TV_OK};

    unlock(ex);
    const enum tv_err rc = open_slot(ex, s, &err);
    if (rc != TV_OK)
        fail(ex, rc, &err);
    else
        advance(ex, s);
    lock(ex);
}

static void work(struct exec *ex, unsigned worker)
{
    struct worker *w = &ex->workers[worker];

    lock(ex);
    while (!ex->stop) {
        struct slot *s = NULL;
        if (!w->buf && ex->n_bufs > 0)
            w->buf = ex->bufs[--ex->n_bufs];
        if (w->buf && (s = find_tile(ex, worker)) != NULL) {
            take_tile(ex, w, worker, s);
            continue;
        }
        if ((s = reserve_next(ex)) != NULL) {
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
    unlock(ex);
}

/* ---- writer -------------------------------------------------------------- */

/* Takes the tile that an ordered sink needs next. Mutex held. */
static bool next_put(struct exec *ex, struct put *out)
{
    for (unsigned i = 0; i < ex->n_puts; i++) {
        struct put *p = &ex->puts[i];
        if (p->slot->seq == ex->write_seq && p->tile == p->slot->n_tiles_put) {
            *out = *p;
            *p = ex->puts[--ex->n_puts];
            return true;
        }
    }
    return false;
}

static struct slot *slot_to_end(struct exec *ex)
{
    for (size_t i = 0; i < ex->g.n_slots; i++) {
        struct slot *s = &ex->slots[i];
        if (s->pass == PASS_WRITING && s->seq == ex->write_seq &&
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
    struct put put;

    if (ex->stop)
        return false;
    if (next_put(ex, &put)) {
        struct slot *s = put.slot;
        const uint64_t each = s->t->action == TVM_COPY
                                  ? s->tile_bytes
                                  : s->job.tile_elems * out_bytes_each(s->t);
        unlock(ex);
        rc = ex->sink->ops->write(ex->sink, s->index, put.tile * each, put.buf,
                                  put.n, &err);
        if (rc != TV_OK)
            fail(ex, rc, &err);
        lock(ex);
        s->n_tiles_put++;
        ex->bufs[ex->n_bufs++] = put.buf;
        (void)pthread_cond_broadcast(&ex->wake_workers);
        return true;
    }
    struct slot *s = slot_to_end(ex);
    if (!s)
        return false;
    unlock(ex);
    rc = ex->sink->ops->end_tensor(ex->sink, s->index, s->leaves,
                                   (size_t)tv_leaf_count(s->t->bytes), &err);
    close_readers(s);
    if (rc != TV_OK)
        fail(ex, rc, &err);
    lock(ex);
    if (rc == TV_OK) {
        ex->write_seq++;
        add_finished(ex, s);
    }
    return true;
}

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
        fail(ex, rc, &err);
    return !ex->changed;
}

/* A merge into a directory only reads the store, but for what it learns. Where
 * another process writes, or there is no room, it is not kept. */
static void note_sums(struct exec *ex)
{
    tv_store *store = ex->p->options.store;
    struct tvm_sums *sums = &ex->for_sink;
    tv_batch *b = NULL;

    tvm_sums_move(sums, &ex->sums);
    if (sums->n == 0 || is_into(ex->p) || ex->changed ||
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
    unlock(ex);
    const double t0 = now();
    const bool hold = inputs_hold(ex);
    enum tv_err rc = TV_E_CORRUPT;
    if (hold)
        rc = ex->sink->ops->commit(ex->sink, ex->finished + from, to - from,
                                   &err);
    if (hold && rc != TV_OK)
        fail(ex, rc, &err);
    lock(ex);
    ex->t_sync += now() - t0;
    if (rc != TV_OK)
        return;
    for (size_t i = from; i < to; i++)
        ex->sink->done[ex->finished[i]].done = true;
    ex->n_committed = to;
    ex->bytes_committed = bytes;
    ex->t_first_pending = now();
}

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
        unlock(ex);
        ex->hooks->progress(ex->hooks->arg, &progress);
        lock(ex);
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

static void write_loop(struct exec *ex)
{
    bool failed = false;
    bool ended = false;

    lock(ex);
    for (;;) {
        const uint64_t pending = ex->bytes_finished - ex->bytes_committed;
        const bool over =
            ex->n_working == 0 &&
            (!ex->sink->ordered || ex->stop || ex->write_seq == ex->next_seq);
        if (!ex->stop && cancelled(ex)) {
            struct tv_error err;
            unlock(ex);
            (void)tv_error_set(&err, TV_E_INTERRUPTED, "interrupted");
            fail(ex, TV_E_INTERRUPTED, &err);
            lock(ex);
            continue;
        }
        if (ex->sink->ordered && write_ordered(ex))
            continue;
        report(ex);
        if (ex->n_finished > ex->n_committed && !failed &&
            (over || pending >= ex->sink->commit_bytes ||
             now() - ex->t_first_pending >= COMMIT_SECONDS)) {
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
            const uint64_t left =
                is_into(ex->p) && ex->p->bytes_written > ex->bytes_committed
                    ? tvm_room_spare(ex->p->bytes_written - ex->bytes_committed)
                    : 0;
            unlock(ex);
            if (inputs_hold(ex))
                tvm_cache_flush(ex->cache, left);
            lock(ex);
            continue;
        }
        if (over)
            break;
        wait_writer(ex);
    }
    unlock(ex);
}

/* Item 0 is the writer: it is taken first and stays until all is done, so the
 * others find a thread each. */
static void run_item(void *arg, size_t item, unsigned thread)
{
    (void)thread;
    if (item == 0)
        write_loop(arg);
    else
        work(arg, (unsigned)item - 1);
}

/* ---- all ----------------------------------------------------------------- */

static enum tv_err set_up(struct exec *ex, struct tv_error *err)
{
    const struct geometry *g = &ex->g;
    const size_t n = ex->p->n_tensors;

    ex->workers = tv_calloc(g->n_workers, sizeof *ex->workers);
    ex->slots = tv_calloc(g->n_slots, sizeof *ex->slots);
    ex->bufs = tv_calloc(g->n_bufs, sizeof *ex->bufs);
    ex->puts = tv_calloc(g->n_bufs, sizeof *ex->puts);
    ex->finished = tv_calloc(n + 1, sizeof *ex->finished);
    if (!ex->workers || !ex->slots || !ex->bufs || !ex->puts || !ex->finished)
        goto no_memory;
    for (unsigned i = 0; i < g->n_workers; i++) {
        struct worker *w = &ex->workers[i];
        w->src = tv_alloc_aligned(g->src_floats * sizeof(float) +
                                  g->l_floats * sizeof(float) +
                                  g->mask_words * sizeof(uint64_t));
        if (!w->src)
            goto no_memory;
        w->dst = w->src + g->src_floats - TVM_BLOCK;
        w->l = w->src + g->src_floats;
        w->mask = (uint64_t *)(void *)(w->l + g->l_floats);
        const size_t most = g->mask_words / (2 * BLOCK_WORDS + 2);
        w->known_words = w->mask + most * BLOCK_WORDS;
        w->known =
            (const uint64_t **)(void *)(w->known_words + most * BLOCK_WORDS);
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
        close_readers(&ex->slots[i]);
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
        const struct worker *w = &ex->workers[i];
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
    const uint64_t needed = plan_memory(ex->p, &ex->g, &fits);

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

uint64_t tvm_exec_part_plan(const struct tvm_plan *p, struct tvm_plan *part)
{
    const uint64_t all = p->options.memory_bytes;
    struct geometry g;
    bool fits = false;

    *part = *p;
    part->options.into = NULL; /* nobody writes into a store meanwhile */
    part->options.memory_bytes = all - all / 4;
    (void)plan_memory(part, &g, &fits);
    if (!fits)
        part->options.memory_bytes = all;
    return all - part->options.memory_bytes;
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
    struct geometry g;
    bool fits = false;

    if (!tvm_calibrated_walks(ex->p))
        return ex->g.cache_bytes;
    (void)tvm_exec_part_plan(ex->p, &part);
    (void)plan_memory(&part, &g, &fits);
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
    note_sums(&ex);
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
