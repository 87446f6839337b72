/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exec_tiles.c - one tile of a pass: inputs are verified and counted the first
 * time that they are read, blocks go to the method (as fp32, whole rows, or
 * bf16 as it is), the result is hashed and handed over.
 *
 * No lock is held but to hand a tile to the writer: a tile belongs to its
 * worker, and what it adds to the slot is atomic or its own.
 */
#include "exec_parts.h"

#include <string.h>

#include "compat.h"
#include "gather.h"

static void hash_out(struct exec_slot *s, uint64_t off,
                     const unsigned char *data, size_t n)
{
    for (size_t at = 0; at < n; at += TV_LEAF_BYTES) {
        const size_t left = n - at;
        s->leaves[(off + at) / TV_LEAF_BYTES] =
            tv_hash128(data + at, left < TV_LEAF_BYTES ? left : TV_LEAF_BYTES);
    }
}

/* Leaves of bytes [off, off + n) of a linked input. */
static void hash_in(struct exec_slot *s, size_t source, uint64_t off,
                    uint64_t n)
{
    for (uint64_t at = off; at < off + n; at += TV_LEAF_BYTES)
        s->sums[source][at / TV_LEAF_BYTES] =
            tv_view_leaf(&s->readers[source].view, at / TV_LEAF_BYTES);
}

/* Every NaN becomes the quiet one without payload: which operand's payload and
 * sign a sum of two NaN has is the instruction set's choice. */
static void quiet_nans(enum tv_dtype dtype, unsigned char *data, uint64_t n)
{
    const uint32_t quiet = 0x7fc00000u, infinity = 0x7f800000u;
    const uint16_t quiet16 = dtype == TV_F16 ? 0x7e00u : 0x7fc0u;
    const uint16_t infinity16 = dtype == TV_F16 ? 0x7c00u : 0x7f80u;

    for (uint64_t i = 0; i < n; i++) {
        uint32_t u;
        uint16_t h;
        if (dtype == TV_F32) {
            memcpy(&u, data + 4 * i, sizeof u);
            if ((u & 0x7fffffffu) > infinity)
                memcpy(data + 4 * i, &quiet, sizeof quiet);
        } else {
            memcpy(&h, data + 2 * i, sizeof h);
            if ((h & 0x7fffu) > infinity16)
                memcpy(data + 2 * i, &quiet16, sizeof quiet16);
        }
    }
}

/* Hands the tile in w->buf over. */
static enum tv_err deliver(struct exec *ex, struct exec_worker *w,
                           struct exec_slot *s, uint64_t tile, uint64_t off,
                           size_t n, struct tv_error *err)
{
    if (!ex->sink->ordered)
        return ex->sink->ops->write(ex->sink, s->index, off, w->buf, n, err);
    exec_lock(ex);
    ex->puts[ex->n_puts++] = (struct exec_put){s, tile, w->buf, n};
    w->buf = NULL;
    (void)pthread_cond_signal(&ex->wake_writer);
    exec_unlock(ex);
    return TV_OK;
}

/* NaN and infinity that a block of a source has. */
static void note_bad(struct exec_slot *s, size_t source, uint64_t n,
                     uint64_t *bad)
{
    *bad += n;
    if (n > 0 && s->cached.n > 0)
        atomic_fetch_add(&s->cached.src[source].n_nonfinite, n);
}

/* Values of one source in a block, at `at` [n] or where they are, and what is
 * known of its mask. NULL when nobody will look at them. */
static const float *read_block(const struct exec *ex, struct exec_worker *w,
                               struct exec_slot *s, size_t source,
                               uint64_t start, size_t n, float *at,
                               uint64_t *bad)
{
    const struct tvk_table *k = ex->k;
    const uint64_t *mask =
        tvm_cached_mask(&s->cached, source, start, n,
                        w->known_words + source * EXEC_BLOCK_WORDS);

    w->known[source] = mask;
    w->made[source] = NULL;
    if (exec_is_replaced(s, source)) {
        if (s->pass != EXEC_COMBINE)
            return NULL;
        w->bytes_read += tvm_cached_expand(&s->cached, source, k, start, n,
                                           mask, w->dst, at);
        return at;
    }
    if (mask && !exec_is_first(s) && s->pass != EXEC_COMBINE)
        return NULL;
    uint64_t here = 0;
    const float *x = tvm_reader_block(&s->readers[source], k, start, n, at,
                                      w->l, exec_is_first(s) ? &here : NULL);
    note_bad(s, source, here, bad);
    if (s->t->compute != TV_DTYPE_NONE)
        x = tvm_compat_input(k, s->t, source, x, at, n);
    if (mask && s->pass == EXEC_COMBINE)
        tvm_cached_keep_values(&s->cached, source, k, start, n, mask, x,
                               w->dst);
    return x;
}

/* The row that begins at element `at`, of every source, into `rows`. */
static void read_row(const struct exec *ex, struct exec_worker *w,
                     struct exec_slot *s, uint64_t at, float *rows,
                     uint64_t *bad)
{
    const uint64_t len = s->layout.row_elems;
    const size_t stride = (size_t)exec_round_up(len, 16);

    for (uint64_t done = 0; done < len; done += TVM_BLOCK) {
        const size_t n =
            len - done < TVM_BLOCK ? (size_t)(len - done) : TVM_BLOCK;
        for (size_t i = 0; i < s->t->n_sources; i++) {
            float *to = rows + i * stride + done;
            const float *from = read_block(ex, w, s, i, at + done, n, to, bad);
            if (from != to)
                memcpy(to, from, n * sizeof *to);
        }
    }
}

/* Elements [from, to) of the result, which begin at `row`, into the tile. */
static void write_row(const struct exec *ex, const struct exec_worker *w,
                      const struct exec_slot *s, const struct tvm_tile *tile,
                      uint64_t from, uint64_t to, const float *row,
                      uint64_t *bad)
{
    const enum tv_dtype dtype = s->t->dtype;
    const size_t each = exec_out_bytes_each(s->t);

    for (uint64_t e = from; e < to; e += TVM_BLOCK) {
        const size_t n = to - e < TVM_BLOCK ? (size_t)(to - e) : TVM_BLOCK;
        unsigned char *at = w->buf + (size_t)(e - tile->first) * each;
        *bad += tvk_from_f32(ex->k, dtype, at, row + (e - from), n);
    }
}

/* Whole rows that a tile has elements of. */
static void run_rows(const struct exec *ex, struct exec_worker *w,
                     struct exec_slot *s, struct tvm_tile *tile,
                     uint64_t *bad_in, uint64_t *bad_out)
{
    const struct tvm_method *m = s->t->method;
    const uint64_t len = s->layout.row_elems;
    const size_t n = (size_t)len;
    const size_t stride = (size_t)exec_round_up(len, 16);
    const uint64_t end = tile->first + tile->n;
    float *const rows = (float *)(void *)(s->mem + s->layout.rows) +
                        tile->worker * exec_row_floats(s->t, len);
    float *const dst = rows + s->t->n_sources * stride;
    const float *x[TVK_DONORS_MAX + 1];

    for (size_t i = 0; i < s->t->n_sources; i++)
        x[i] = rows + i * stride;
    for (uint64_t row = tile->first / len; row * len < end; row++) {
        const uint64_t at = row * len;
        const bool own = at >= tile->first; /* else the tile before counts it */
        uint64_t unused = 0;
        if (s->pass != EXEC_COMBINE && !own)
            continue;
        read_row(ex, w, s, at, rows, own ? bad_in : &unused);
        tile->start = at;
        if (s->pass != EXEC_COMBINE) {
            m->measure_row(&s->job, tile, row, x, n);
            continue;
        }
        m->combine_row(&s->job, tile, row, x, dst, n);
        const uint64_t from = own ? at : tile->first;
        const uint64_t to = at + len < end ? at + len : end;
        write_row(ex, w, s, tile, from, to, dst + (from - at), bad_out);
    }
}

/* Is the pass at hand one over bf16 as it is (struct tvm_method)? */
static bool takes_bf16(const struct exec *ex, const struct exec_slot *s)
{
    const struct tvm_tensor *t = s->t;
    const bool combine = s->pass == EXEC_COMBINE;

    if (!t->method->takes_bf16 || ex->k->trouble || s->job.sample > 0 ||
        t->compute != TV_DTYPE_NONE || (combine && t->dtype != TV_BF16))
        return false;
    for (size_t i = 0; i < t->n_sources; i++)
        if (!tvm_reader_is_bf16(&s->readers[i]) || exec_is_replaced(s, i) ||
            (s->job.trim && s->job.trim[i].known))
            return false;
    return t->method->takes_bf16(&s->job, combine);
}

static void run_bf16(const struct exec *ex, struct exec_worker *w,
                     struct exec_slot *s, struct tvm_tile *tile,
                     uint64_t *bad_in, uint64_t *bad_out)
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
        if (s->pass == EXEC_COMBINE) {
            *bad_out += t->method->combine_bf16(&s->job, tile, x,
                                                w->buf + 2 * (size_t)done, n);
            for (size_t i = 0; i < s->cached.n; i++)
                tvm_cached_keep_mask(&s->cached, i, tile->start, n, w->made[i]);
        } else {
            t->method->measure_bf16(&s->job, tile, x, n);
        }
        /* Last: by now they are in the cache. */
        for (size_t i = 0; exec_is_first(s) && i < t->n_sources; i++)
            note_bad(s, i, ex->k->count_nonfinite_bf16(x[i], n), bad_in);
    }
}

static struct tvm_tile tile_of(const struct exec_slot *s,
                               const struct exec_worker *w, uint64_t number,
                               unsigned local)
{
    const struct exec_slot_layout *l = &s->layout;
    struct tvm_tile tile = {
        .tile = number,
        .first = number * s->job.tile_elems,
        .worker = local,
        .mask_words = w->mask,
        .known = w->known,
        .made = w->made,
        .tile_state =
            l->tile_state_bytes > 0
                ? s->mem + l->tile_state + l->tile_state_bytes * (size_t)number
                : NULL,
    };

    tile.n = s->t->n_elems - tile.first;
    if (tile.n > s->job.tile_elems)
        tile.n = s->job.tile_elems;
    tile.start = tile.first;
    return tile;
}

/* Before a tile's inputs are used for the first time. */
static enum tv_err check_inputs(const struct exec *ex, struct exec_worker *w,
                                struct exec_slot *s,
                                const struct tvm_tile *tile,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < s->t->n_sources; i++) {
        const size_t each = s->readers[i].elem_bytes;
        if (exec_is_replaced(s, i))
            continue;
        w->bytes_read += tile->n * each;
        if (!ex->p->options.verify_reads)
            continue;
        if (s->readers[i].gather)
            TV_TRY(
                tvm_gather_verify(&s->readers[i], tile->tile, s->n_tiles, err));
        else
            TV_TRY(tvm_reader_verify(&s->readers[i], tile->first * each,
                                     tile->n * each, err));
        if (s->sums && s->sums[i])
            hash_in(s, i, tile->first * each, tile->n * each);
    }
out:
    return rc;
}

/* Blocks of fp32 values, whatever the inputs are. */
static void run_blocks(const struct exec *ex, struct exec_worker *w,
                       struct exec_slot *s, struct tvm_tile *tile,
                       uint64_t *bad_in, uint64_t *bad_out)
{
    struct tvm_job *job = &s->job;
    const struct tvm_tensor *t = s->t;
    const struct tvk_table *k = ex->k;
    const float *x[TVK_DONORS_MAX + 1];

    for (uint64_t done = 0; done < tile->n; done += TVM_BLOCK) {
        size_t n =
            tile->n - done < TVM_BLOCK ? (size_t)(tile->n - done) : TVM_BLOCK;
        if (job->sample > 0 && n > job->sample)
            n = job->sample;
        tile->start = tile->first + done;
        for (size_t i = 0; i < t->n_sources; i++)
            x[i] = read_block(ex, w, s, i, tile->start, n,
                              w->src + i * TVM_BLOCK, bad_in);
        if (s->pass != EXEC_COMBINE) {
            t->method->measure(job, tile, x, n);
            continue;
        }
        unsigned char *at = w->buf + (size_t)done * exec_out_bytes_each(t);
        float *dst = t->dtype == TV_F32 ? (float *)(void *)at : w->dst;
        t->method->combine(job, tile, x, dst, n);
        for (size_t i = 0; i < s->cached.n; i++)
            tvm_cached_keep_mask(&s->cached, i, tile->start, n, w->made[i]);
        *bad_out += t->dtype != TV_F32 ? tvk_from_f32(k, t->dtype, at, dst, n)
                                       : k->count_nonfinite(dst, n);
    }
}

static void compute(const struct exec *ex, struct exec_worker *w,
                    struct exec_slot *s, struct tvm_tile *tile)
{
    const struct tvm_method *m = s->t->method;
    const bool rows =
        s->layout.row_elems > 0 && (!m->row_pass || m->row_pass(&s->job));
    uint64_t bad_in = 0;
    uint64_t bad_out = 0;

    if (m->tile_begin)
        m->tile_begin(&s->job, tile);
    if (rows)
        run_rows(ex, w, s, tile, &bad_in, &bad_out);
    else if (takes_bf16(ex, s))
        run_bf16(ex, w, s, tile, &bad_in, &bad_out);
    else
        run_blocks(ex, w, s, tile, &bad_in, &bad_out);
    if (bad_in > 0)
        atomic_fetch_add(&s->n_nonfinite_in, bad_in);
    if (bad_out > 0) {
        atomic_fetch_add(&s->n_nonfinite_out, bad_out);
        quiet_nans(s->t->dtype, w->buf, tile->n);
    }
}

enum tv_err exec_math_tile(struct exec *ex, struct exec_worker *w,
                           struct exec_slot *s, uint64_t number, unsigned local,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const bool combine = s->pass == EXEC_COMBINE;
    const size_t each = exec_out_bytes_each(s->t);
    struct tvm_tile tile = tile_of(s, w, number, local);
    const size_t n = (size_t)tile.n * each;

    const double t0 = exec_now();
    if (exec_is_first(s))
        TV_TRY(check_inputs(ex, w, s, &tile, err));
    const double t1 = exec_now();
    w->t_read += t1 - t0;
    compute(ex, w, s, &tile);
    /* What was computed is right, but a merge does not go on without the device
     * that it was told to use. */
    if (ex->k->trouble)
        TV_TRY(ex->k->trouble(err));
    if (combine)
        hash_out(s, tile.first * each, w->buf, n);
    const double t2 = exec_now();
    w->t_compute += t2 - t1;
    if (combine) {
        w->bytes_written += n;
        TV_TRY(deliver(ex, w, s, number, tile.first * each, n, err));
        w->t_write += exec_now() - t2;
    }
out:
    return rc;
}

enum tv_err exec_work_item(struct exec_worker *w, struct exec_slot *s,
                           uint64_t item, unsigned local, struct tv_error *err)
{
    const double t0 = exec_now();
    const enum tv_err rc =
        s->t->method->work(&s->job, (size_t)item, local, err);

    if (rc != TV_OK)
        tv_error_context(err, "%s", s->t->name);
    w->t_compute += exec_now() - t0;
    return rc;
}

/* Copied values count like merged ones. */
static uint64_t count_copied(const struct exec *ex, struct exec_worker *w,
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

enum tv_err exec_copy_tile(struct exec *ex, struct exec_worker *w,
                           struct exec_slot *s, uint64_t number,
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
        const double t0 = exec_now();
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
        const double t1 = exec_now();
        w->t_read += t1 - t0;
        if (!ex->sink->ordered)
            TV_TRY(ex->sink->ops->write(ex->sink, s->index, off, data, n, err));
        w->t_write += exec_now() - t1;
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
