/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exec_parts.h - what the files that run tensors share (private to exec*.c).
 *
 *   exec.c         the workers, and a run from its begin to its end
 *   exec_memory.c  how --memory is spent: buffers, slots, the cache
 *   exec_slots.c   a tensor's way: opened, its passes, finished
 *   exec_tiles.c   one tile: read, computed or copied, hashed, handed over
 *   exec_writer.c  the writer: order, commits, progress, cancelling
 *
 * All scheduling state of struct exec is guarded by its one mutex; a tile is
 * about a millisecond of work, so it is not contended. "Mutex held" says that a
 * function wants it held.
 */
#ifndef TVM_EXEC_PARTS_H
#define TVM_EXEC_PARTS_H

#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "cache.h"
#include "exec.h"
#include "method.h"
#include "source.h"
#include "sums.h"

#define EXEC_BLOCK_WORDS (TVM_BLOCK / 64)
#define EXEC_NO_WORKER   UINT32_MAX

struct exec_geometry { /* how the memory budget is spent */
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
struct exec_slot_layout {
    size_t readers, leaves, local, sums, state, tile_state, rows, end;
    size_t state_bytes, tile_state_bytes;
    uint64_t row_elems; /* 0: fed in blocks */
};

enum exec_pass {
    EXEC_NONE,
    EXEC_SETUP,
    EXEC_MEASURE,
    EXEC_WORK,
    EXEC_COMBINE,
    EXEC_COPY,
    EXEC_WRITING
};

struct exec_slot { /* a tensor being worked on */
    enum exec_pass pass;
    bool first;   /* no pass over all elements yet (see exec_is_first) */
    size_t index; /* of the tensor in the plan */
    const struct tvm_tensor *t;
    uint64_t seq; /* order of starting */
    struct tvm_job job;
    uint64_t tile_bytes; /* EXEC_COPY */
    uint64_t n_tiles, next_tile, n_tiles_done, n_tiles_put;
    struct exec_slot_layout layout;
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

struct exec_put { /* a tile on its way to an ordered sink */
    struct exec_slot *slot;
    uint64_t tile;
    unsigned char *buf;
    size_t n;
};

struct exec_worker {
    float *src; /* [n_sources][TVM_BLOCK], then dst */
    float *dst, *l;
    uint64_t *mask, *known_words;   /* [n_sources][EXEC_BLOCK_WORDS] each */
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
    struct exec_geometry g;
    struct exec_worker *workers;

    pthread_mutex_t mutex;
    pthread_cond_t wake_workers, wake_writer;
    bool stop;
    enum tv_err rc;
    struct tv_error err;
    struct exec_slot *slots; /* [n_slots] */
    size_t next_tensor;      /* to be started */
    uint64_t next_seq, combine_seq, write_seq;
    unsigned n_working;   /* workers that have not left */
    unsigned char **bufs; /* free buffers of an ordered sink */
    unsigned n_bufs;
    struct exec_put *puts; /* [g.n_bufs] */
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

static inline uint64_t exec_round_up(uint64_t n, uint64_t to)
{
    return (n + to - 1) / to * to;
}

static inline size_t exec_out_bytes_each(const struct tvm_tensor *t)
{
    return tv_dtype_bits(t->dtype) / 8u;
}

static inline bool exec_is_into(const struct tvm_plan *p)
{
    return p->options.into != NULL;
}

/* Does a pass make output? */
static inline bool exec_is_output(enum exec_pass p)
{
    return p == EXEC_COMBINE || p == EXEC_COPY;
}

/* Is the pass at hand the first over all elements? Then inputs are verified and
 * counted. */
static inline bool exec_is_first(const struct exec_slot *s)
{
    return s->first && s->job.sample == 0;
}

/* Is a source read from its task vector? */
static inline bool exec_is_replaced(const struct exec_slot *s, size_t source)
{
    return s->cached.n > 0 &&
           (s->cached.src[source].delta || s->cached.src[source].fixed_values);
}

static inline double exec_now(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

static inline void exec_lock(struct exec *ex)
{
    (void)pthread_mutex_lock(&ex->mutex);
}

static inline void exec_unlock(struct exec *ex)
{
    (void)pthread_mutex_unlock(&ex->mutex);
}

/* ---- exec.c -------------------------------------------------------------- */

/* Keeps the first error and lets everybody leave. */
void exec_fail(struct exec *ex, enum tv_err rc, const struct tv_error *err);

/* ---- exec_memory.c ------------------------------------------------------- */

/* Returns the least memory that would do; *fits says if the budget has it. */
uint64_t exec_plan_memory(const struct tvm_plan *p, struct exec_geometry *g,
                          bool *fits);
/* What a method is told of a merged tensor before it has state. */
struct tvm_job exec_job_of(const struct tvm_tensor *t,
                           const struct exec_geometry *g);
/* Where what is in a slot's memory. */
struct exec_slot_layout exec_lay_out(const struct tvm_plan *p,
                                     const struct tvm_tensor *t,
                                     const struct tvm_job *job,
                                     unsigned n_workers);
/* Of one worker. */
size_t exec_row_floats(const struct tvm_tensor *t, uint64_t row_elems);
/* Leaves of linked inputs, whose checksums are taken while they are read: a
 * table for every source that has none, NULL for others, then the leaves. A
 * copy's leaves are those of its source. */
uint64_t exec_sum_bytes(const struct tvm_plan *p, const struct tvm_tensor *t);
/* Bytes that the readers of a tensor allocate themselves. */
uint64_t exec_reader_bytes(const struct tvm_tensor *t);

/* ---- exec_slots.c -------------------------------------------------------- */

/* Reserves a slot for the next tensor, or returns NULL. Mutex held. */
struct exec_slot *exec_reserve_next(struct exec *ex);
/* Opens what a reserved tensor reads. No lock. */
TV_NODISCARD enum tv_err exec_open_slot(struct exec *ex, struct exec_slot *s,
                                        struct tv_error *err);
/* Goes on with a tensor all of whose tiles of a pass are done, or that has just
 * been opened. Called without the lock. */
void exec_advance(struct exec *ex, struct exec_slot *s);
/* All of a tensor's inputs have been read: checks and keeps the checksums of
 * the linked ones. */
TV_NODISCARD enum tv_err exec_take_sums(struct exec *ex,
                                        const struct exec_slot *s,
                                        struct tv_error *err);
/* Lets the next tensor give out its output tiles once the one before it has
 * given out all of its own. Mutex held. */
void exec_move_order(struct exec *ex);
/* Records a finished tensor for the writer. Mutex held. */
void exec_add_finished(struct exec *ex, struct exec_slot *s);
void exec_close_readers(struct exec_slot *s);

/* ---- exec_tiles.c -------------------------------------------------------- */

/* One tile of a pass over elements; `local` numbers the worker in this pass. */
TV_NODISCARD enum tv_err exec_math_tile(struct exec *ex, struct exec_worker *w,
                                        struct exec_slot *s, uint64_t number,
                                        unsigned local, struct tv_error *err);
/* A share of a matrix method's work, which reads its state only. */
TV_NODISCARD enum tv_err exec_work_item(struct exec_worker *w,
                                        struct exec_slot *s, uint64_t item,
                                        unsigned local, struct tv_error *err);
/* One tile of a copied tensor. */
TV_NODISCARD enum tv_err exec_copy_tile(struct exec *ex, struct exec_worker *w,
                                        struct exec_slot *s, uint64_t number,
                                        struct tv_error *err);

/* ---- exec_writer.c ------------------------------------------------------- */

/* The writer's whole life. No lock. */
void exec_write_loop(struct exec *ex);
/* After a merge into a directory: its store, which it else only reads, learns
 * the checksums of linked tensors. Where another process writes, or there is no
 * room, they are not kept. No thread runs any more. */
void exec_note_sums(struct exec *ex);

#endif
