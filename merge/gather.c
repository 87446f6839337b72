/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gather.c - see gather.h.
 *
 * Means are sums in double in the order of rows (or of the recipe's models),
 * rounded once. The mean of all rows takes one pass over the source when the
 * tensor is opened, and only where padding rows ask for it.
 */
#include "gather.h"

#include <string.h>

#include "method.h"
#include "tv/alloc.h"
#include "tv/checked.h"

#define PIECE 256u

static uint64_t pad_bytes(const struct tvm_gather *g)
{
    uint64_t bytes = 0;
    if (!g->rows->pads)
        return 0;
    if (!tv_mul_u64(g->cols, sizeof(double) + sizeof(float), &bytes))
        return UINT64_MAX / 4;
    return bytes + TVM_BLOCK * sizeof(float) +
           tvm_gather_l_floats(g) * sizeof(float);
}

uint64_t tvm_gather_bytes(const struct tvm_gather *g)
{
    uint64_t bytes = g->n_from * sizeof(struct tvm_reader) + pad_bytes(g);
    for (size_t i = 0; i < g->n_from; i++)
        bytes += tvm_source_bytes_of(&g->from[i]);
    return bytes;
}

size_t tvm_gather_l_floats(const struct tvm_gather *g)
{
    size_t most = 0;
    for (size_t i = 0; i < g->n_from; i++) {
        const size_t n = tvm_source_l_floats_of(&g->from[i]);
        if (n > most)
            most = n;
    }
    return most;
}

/* ---- rows ---------------------------------------------------------------- */

static size_t run_at(const struct tvm_rows *rows, uint64_t row)
{
    size_t lo = 0;
    size_t hi = rows->n_runs;
    while (hi - lo > 1) {
        const size_t mid = lo + (hi - lo) / 2;
        if (rows->runs[mid].first <= row)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

/* Columns [col, col + n) of the mean of some rows. */
static void mean_of(const struct tvm_reader *r, const struct tvk_table *k,
                    const struct tvm_run *run, uint64_t col, size_t n,
                    float *dst, float *l_scratch)
{
    const struct tvm_gather *const g = r->gather;
    const struct tvm_row *const items = g->rows->items + run->row;
    float piece[PIECE];
    double sum[PIECE];

    for (size_t done = 0; done < n; done += PIECE) {
        const size_t some = n - done < PIECE ? n - done : PIECE;
        memset(sum, 0, sizeof(sum));
        for (uint32_t i = 0; i < run->n_items; i++) {
            const float *const x =
                tvm_reader_block(&r->below[items[i].from], k,
                                 items[i].row * g->cols + col + done, some,
                                 piece, l_scratch, NULL);
            for (size_t e = 0; e < some; e++)
                sum[e] += (double)x[e];
        }
        for (size_t e = 0; e < some; e++)
            dst[done + e] = (float)(sum[e] / run->n_items);
    }
}

const float *tvm_gather_block(const struct tvm_reader *r,
                              const struct tvk_table *k, uint64_t start,
                              size_t n, float *scratch, float *l_scratch)
{
    const struct tvm_gather *const g = r->gather;
    const uint64_t cols = g->cols;
    size_t at = run_at(g->rows, start / cols);

    for (size_t done = 0; done < n; at++) {
        const struct tvm_run *const run = &g->rows->runs[at];
        const uint64_t in = start + done - run->first * cols;
        const uint64_t left = run->n * cols - in;
        const size_t some = left < n - done ? (size_t)left : n - done;
        float *const dst = scratch + done;

        if (run->kind == TVM_RUN_ROWS) {
            const float *const x =
                tvm_reader_block(&r->below[run->from], k, run->row * cols + in,
                                 some, dst, l_scratch, NULL);
            if (some == n)
                return x;
            if (x != dst)
                memcpy(dst, x, some * sizeof(float));
        } else if (run->kind == TVM_RUN_ZERO) {
            memset(dst, 0, some * sizeof(float));
        } else if (run->kind == TVM_RUN_MEAN) {
            mean_of(r, k, run, in, some, dst, l_scratch);
        } else {
            for (size_t e = 0; e < some; e++)
                dst[e] = r->pad[(in + e) % cols];
        }
        done += some;
    }
    return scratch;
}

/* ---- opening ------------------------------------------------------------- */

static enum tv_err make_pad(struct tvm_reader *r, const struct tvk_table *k,
                            struct tv_error *err)
{
    const struct tvm_gather *const g = r->gather;
    const struct tvm_rows *const rows = g->rows;
    const size_t cols = (size_t)g->cols;
    double *const sum = tv_calloc(cols, sizeof(*sum));
    float *const scratch = (float *)tv_alloc_aligned(
        (TVM_BLOCK + tvm_gather_l_floats(g)) * sizeof(float));

    r->pad = tv_calloc(cols, sizeof(*r->pad));
    if (sum == NULL || scratch == NULL || r->pad == NULL) {
        tv_free(sum);
        tv_free(scratch);
        return tv_error_set(err, TV_E_NOMEM,
                            "out of memory for padding rows of %zu elements",
                            cols);
    }
    for (size_t i = 0; i < rows->n_runs; i++) {
        const struct tvm_run *const run = &rows->runs[i];
        const uint64_t end = (run->first + run->n) * cols;
        size_t col = 0;
        for (uint64_t e = run->first * cols; run->is_token && e < end;) {
            const size_t n =
                end - e < TVM_BLOCK ? (size_t)(end - e) : TVM_BLOCK;
            const float *const x =
                tvm_gather_block(r, k, e, n, scratch, scratch + TVM_BLOCK);
            for (size_t j = 0; j < n; j++) {
                sum[col] += (double)x[j];
                col = col + 1 == cols ? 0 : col + 1;
            }
            e += n;
        }
    }
    for (size_t j = 0; j < cols && rows->n_tokens > 0; j++)
        r->pad[j] = (float)(sum[j] / (double)rows->n_tokens);
    tv_free(sum);
    tv_free(scratch);
    return TV_OK;
}

enum tv_err tvm_gather_open(struct tvm_reader *out, const struct tvm_plan *plan,
                            const struct tvm_tensor *t,
                            const struct tvm_gather *g,
                            const struct tvk_table *k, bool verify,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    out->gather = g;
    out->below = tv_calloc(g->n_from, sizeof(*out->below));
    if (out->below == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory for %zu readers",
                            g->n_from);
    for (size_t i = 0; i < g->n_from; i++) {
        out->n_below = i + 1;
        TV_TRY(tvm_reader_open_source(&out->below[i], plan, t, &g->from[i], k,
                                      verify, err));
    }
    if (g->rows->pads && g->cols > 0)
        TV_TRY(make_pad(out, k, err));
out:
    return rc;
}

void tvm_gather_close(struct tvm_reader *r)
{
    for (size_t i = 0; i < r->n_below; i++)
        tvm_reader_close(&r->below[i]);
    tv_free(r->below);
    tv_free(r->pad);
}

enum tv_err tvm_gather_verify(const struct tvm_reader *r, uint64_t tile,
                              uint64_t n_tiles, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    for (size_t i = 0; i < r->n_below; i++) {
        const struct tvm_reader *const b = &r->below[i];
        const struct tvm_gather *const g = r->gather;
        uint64_t first = 0;
        uint64_t end = tv_leaf_count(b->view.bytes);
        if (g->n_used > 0) {
            first = g->used_from * b->elem_bytes / TV_LEAF_BYTES;
            end = ((g->used_from + g->n_used) * b->elem_bytes - 1) /
                      TV_LEAF_BYTES +
                  1;
        }
        const uint64_t leaves = end - first;
        const uint64_t per = (leaves + n_tiles - 1) / n_tiles;
        const uint64_t skip = tile * per < leaves ? tile * per : leaves;
        const uint64_t from = first + skip;
        const uint64_t to = leaves - skip > per ? from + per : end;
        if (b->view.leaves == NULL || from == to)
            continue;
        TV_TRY(tvm_reader_verify(b, from * TV_LEAF_BYTES,
                                 (to - from) * TV_LEAF_BYTES, err));
    }
out:
    return rc;
}
