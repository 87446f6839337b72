/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exec_memory.c - how a run spends its memory budget.
 *
 * One tensor at least must fit, with one worker and the smallest tiles; what is
 * over goes to more of what saves time, in this order: workers, larger tiles,
 * passes that a method can save (roomy), then slots for further tensors and the
 * cache. exec_plan_memory() takes these away again from the other end until the
 * sum fits. Nothing of it changes a result: tiles are runs of whole leaves.
 */
#include "exec_parts.h"

#include "calibrated.h"
#include "mt.h"
#include "tv/pool.h"

#define BUF_BYTES_MAX (2u << 20)

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
    const uint64_t n = buf_bytes / exec_out_bytes_each(t) / unit * unit;
    return n > unit ? n : unit;
}

struct tvm_job exec_job_of(const struct tvm_tensor *t,
                           const struct exec_geometry *g)
{
    struct tvm_job job = {
        .tensor = t,
        .n_leaves = exec_round_up(t->n_elems, TVK_LEAF) / TVK_LEAF,
        .tile_elems = tile_elems(t, g->buf_bytes),
        .roomy = g->roomy,
    };
    job.n_tiles = exec_round_up(t->n_elems, job.tile_elems) / job.tile_elems;
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

size_t exec_row_floats(const struct tvm_tensor *t, uint64_t row_elems)
{
    return (t->n_sources + 1) * (size_t)exec_round_up(row_elems, 16);
}

uint64_t exec_sum_bytes(const struct tvm_plan *p, const struct tvm_tensor *t)
{
    uint64_t bytes = 0;
    for (size_t i = 0; t->action == TVM_MERGE && i < t->n_sources; i++)
        if (tvm_sums_wanted(p, &t->sources[i]))
            bytes += tv_leaf_count(t->sources[i].tensor->bytes) *
                     sizeof(struct tv_hash);
    return bytes > 0 ? bytes + t->n_sources * sizeof(struct tv_hash *) : 0;
}

struct exec_slot_layout exec_lay_out(const struct tvm_plan *p,
                                     const struct tvm_tensor *t,
                                     const struct tvm_job *job,
                                     unsigned n_workers)
{
    struct exec_slot_layout l = {.readers = 0};
    size_t at =
        (size_t)exec_round_up(t->n_sources * sizeof(struct tvm_reader), 64);

    l.leaves = at;
    at += (size_t)exec_round_up(
        tv_leaf_count(t->bytes) * sizeof(struct tv_hash), 64);
    l.local = at;
    at += (size_t)exec_round_up(n_workers * sizeof(uint32_t), 64);
    l.sums = at;
    at += (size_t)exec_round_up(exec_sum_bytes(p, t), 64);
    l.state = at;
    if (t->action == TVM_MERGE && t->n_elems > 0) {
        if (t->method->state_bytes)
            l.state_bytes =
                (size_t)exec_round_up(t->method->state_bytes(job), 64);
        if (t->method->tile_bytes)
            l.tile_state_bytes =
                (size_t)exec_round_up(t->method->tile_bytes(job), 64);
    }
    at += l.state_bytes;
    l.tile_state = at;
    at += l.tile_state_bytes * (size_t)job->n_tiles;
    l.rows = at;
    l.row_elems = row_elems_of(t);
    /* One row of every source and one of the result, a worker. */
    at += job->n_workers * exec_row_floats(t, l.row_elems) * sizeof(float);
    l.end = at;
    return l;
}

uint64_t exec_reader_bytes(const struct tvm_tensor *t)
{
    uint64_t bytes = 0;
    for (size_t s = 0; s < t->n_sources; s++)
        bytes += tvm_source_bytes(t, s);
    return bytes;
}

static uint64_t slot_bytes(const struct tvm_plan *p, const struct tvm_tensor *t,
                           const struct exec_geometry *g)
{
    if (t->action == TVM_COPY)
        return 4096 + exec_reader_bytes(t) +
               tv_leaf_count(t->bytes) * sizeof(struct tv_hash) +
               g->n_workers * sizeof(uint32_t);
    const struct tvm_job job = exec_job_of(t, g);
    return 4096 + exec_reader_bytes(t) +
           exec_lay_out(p, t, &job, g->n_workers).end;
}

/* Buffer of the smallest tile that any tensor allows. */
static size_t least_buf(const struct tvm_plan *p)
{
    size_t least = TV_LEAF_BYTES;
    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *t = &p->tensors[i];
        if (t->action != TVM_MERGE)
            continue;
        const size_t bytes = (size_t)(tile_unit(t) * exec_out_bytes_each(t));
        if (bytes > least)
            least = bytes;
    }
    return least;
}

static void measure_workers(const struct tvm_plan *p, struct exec_geometry *g)
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
    g->mask_words = most * (2 * EXEC_BLOCK_WORDS + 2);
    g->l_floats = (size_t)exec_round_up(g->l_floats, 16);
    g->worker_bytes = (g->src_floats + g->l_floats) * sizeof(float) +
                      g->mask_words * sizeof(uint64_t) + 1024;
}

static uint64_t most_slot(const struct tvm_plan *p,
                          const struct exec_geometry *g)
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
static uint64_t weigh(const struct tvm_plan *p, struct exec_geometry *g)
{
    g->n_bufs = exec_is_into(p) ? g->n_workers + 2 : g->n_workers;
    g->most_slot_bytes = most_slot(p, g);
    return g->other_bytes + g->n_workers * g->worker_bytes +
           (uint64_t)g->n_bufs * (g->buf_bytes + 64u) + g->most_slot_bytes;
}

uint64_t exec_plan_memory(const struct tvm_plan *p, struct exec_geometry *g,
                          bool *fits)
{
    const uint64_t budget = p->options.memory_bytes;
    const unsigned asked =
        p->options.threads > 0 ? p->options.threads : tv_cpu_count();
    const size_t least = least_buf(p);
    uint64_t total = 0;

    *g = (struct exec_geometry){.n_workers = asked, .roomy = true};
    g->other_bytes = exec_is_into(p) ? budget / 4 : 1u << 20;
    if (exec_is_into(p) && g->other_bytes > (64u << 20))
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
    struct exec_geometry g;
    const uint64_t total = exec_plan_memory(p, &g, fits);
    struct tvm_plan least = *p;
    bool unused = false;

    least.options.memory_bytes = 0;
    struct exec_geometry small;
    *needed = exec_plan_memory(&least, &small, &unused);
    if (exec_is_into(p))
        /* A quarter of the budget is for dirty pages. */
        *needed = *needed / 3 * 4 + 4;
    uint64_t slots = g.most_slot_bytes * (g.n_slots - 1);
    if (slots > g.window_bytes - g.most_slot_bytes)
        slots = g.window_bytes - g.most_slot_bytes;
    return total + slots + g.cache_bytes;
}

uint64_t tvm_exec_part_plan(const struct tvm_plan *p, struct tvm_plan *part)
{
    const uint64_t all = p->options.memory_bytes;
    struct exec_geometry g;
    bool fits = false;

    *part = *p;
    part->options.into = NULL; /* nobody writes into a store meanwhile */
    part->options.memory_bytes = all - all / 4;
    (void)exec_plan_memory(part, &g, &fits);
    if (!fits)
        part->options.memory_bytes = all;
    return all - part->options.memory_bytes;
}
