/* SPDX-License-Identifier: Apache-2.0 */
/*
 * attention.c - causal attention of whole windows. One item is a window, a head
 * and a block of queries:
 *
 *      keys    lo ......... q1
 *   queries q0 |xxxxxxx\      |   scores = Q K^T (sgemm), masked softmax row by
 *           q1 |xxxxxxxxxx\   |   row, out = P V (sgemm)
 *
 * lo is 0, or where the sliding window of the first query begins. Blocks are
 * cut by position alone, so the result does not depend on the workers.
 */
#include <math.h>
#include <string.h>

#include <cblas.h>

#include "tv/alloc.h"

#include "decoder.h"

#define QUERIES 128u

struct run {
    const struct tve_row_ops *ops;
    const struct tve_attention *a;
    const size_t *starts;
    const size_t *first_item; /* [n_windows + 1] */
    size_t n_windows;
    float **scores; /* per worker: [QUERIES, longest window] */
};

static void softmax_row(const struct tve_row_ops *ops,
                        const struct tve_attention *a, float *s, size_t lo,
                        size_t hi, size_t query, float slope)
{
    size_t first = lo;
    double sum = 0;
    float inv = 0;

    if (a->window > 0 && query + 1 > a->window && query + 1 - a->window > lo)
        first = query + 1 - a->window;
    float *const row = s + (first - lo);
    const size_t n = query + 1 - first;

    if (a->cap > 0)
        ops->cap_row(row, n, a->cap);
    if (slope != 0)
        for (size_t i = 0; i < n; i++)
            row[i] += slope * (float)(first + i);
    sum = ops->exp_row(row, n, ops->max_row(row, n));
    inv = (float)(1.0 / sum);
    for (size_t i = 0; i < n; i++)
        row[i] *= inv;
    memset(s, 0, (first - lo) * sizeof(*s));
    memset(row + n, 0, (hi - query - 1) * sizeof(*row));
}

static void run_item(void *arg, size_t item, unsigned worker)
{
    const struct run *const r = arg;
    const struct tve_attention *const a = r->a;
    float *const s = r->scores[worker];
    size_t w = 0, hi_w = r->n_windows;

    while (hi_w - w > 1) { /* the window that holds this item */
        const size_t mid = w + (hi_w - w) / 2;
        if (r->first_item[mid] <= item)
            w = mid;
        else
            hi_w = mid;
    }
    item -= r->first_item[w];
    const size_t head = item % a->n_heads;
    const size_t q0 = item / a->n_heads * QUERIES;
    const size_t len = r->starts[w + 1] - r->starts[w];
    const size_t q1 = len - q0 < QUERIES ? len : q0 + QUERIES;
    const size_t kv = head / (a->n_heads / a->n_kv);
    const size_t lo =
        a->window > 0 && q0 + 1 > a->window ? q0 + 1 - a->window : 0;
    const float *const base = a->qkv + r->starts[w] * a->ld;
    const float *const q = base + q0 * a->ld + a->q0 + head * a->q_step;
    const float *const k = base + lo * a->ld + a->k0 + kv * a->k_step;
    const float *const v = base + lo * a->ld + a->v0 + kv * a->v_step;
    float *const out =
        a->out + (r->starts[w] + q0) * a->ld_out + head * a->head_dim;
    const size_t n_keys = q1 - lo, n_queries = q1 - q0;

    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, (blasint)n_queries,
                (blasint)n_keys, (blasint)a->head_dim, a->scale, q,
                (blasint)a->ld, k, (blasint)a->ld, 0.0f, s, (blasint)n_keys);
    for (size_t i = 0; i < n_queries; i++)
        softmax_row(r->ops, a, s + i * n_keys, lo, q1, q0 + i,
                    a->slopes ? a->slopes[head] : 0.0f);
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (blasint)n_queries,
                (blasint)a->head_dim, (blasint)n_keys, 1.0f, s, (blasint)n_keys,
                v, (blasint)a->ld, 0.0f, out, (blasint)a->ld_out);
}

uint64_t tve_attention_floats(size_t n)
{
    return (uint64_t)QUERIES * n;
}

enum tv_err tve_attention_run(tve_model *m, const struct tve_attention *a,
                              const size_t *starts, size_t n_windows,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const unsigned n_workers = tv_pool_threads(m->pool);
    size_t *const first = tv_calloc(n_windows + 1, sizeof(*first));
    float **const scores = tv_calloc(n_workers, sizeof(*scores));
    size_t longest = 1;

    if (!first || !scores) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t w = 0; w < n_windows; w++) {
        const size_t len = starts[w + 1] - starts[w];

        first[w + 1] = first[w] + (len + QUERIES - 1) / QUERIES * a->n_heads;
        longest = len > longest ? len : longest;
    }
    for (unsigned i = 0; i < n_workers; i++) {
        scores[i] = tv_alloc_aligned(QUERIES * longest * sizeof(float));
        if (!scores[i]) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
            goto out;
        }
    }
    struct run r = {m->rows, a, starts, first, n_windows, scores};
    tv_pool_run(m->pool, first[n_windows], run_item, &r);
out:
    for (unsigned i = 0; scores && i < n_workers; i++)
        tv_free(scores[i]);
    tv_free(scores);
    tv_free(first);
    return rc;
}
