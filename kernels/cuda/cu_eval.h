/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cu_eval.h - what a forward pass does between its products as kernels:
 * arguments and phases (private to kernels/cuda; see cu_hd.h).
 *
 * The arithmetic of eval/blocks.c and eval/attention.c. A row has a block of
 * LANES threads; sums are fp64, a thread's elements first, then the threads in
 * order. Other kernels give rows to blocks and columns to threads, so that
 * nothing is divided. Row numbers and offsets are 64 bits wide.
 */
#ifndef TVK_CU_EVAL_H
#define TVK_CU_EVAL_H

#include "cu_ops.h"

#include "tv/exp_float.h"

/* Threads of a row: of reductions, of the rest. */
#define TVK_CU_ROW_LANES 64u
#define TVK_CU_ROW_WIDE  128u

TVK_HD float tvk_cu_infinity(void)
{
    return tvk_cu_float(0x7f800000u);
}

TVK_HD float tvk_cu_sigmoid(float x)
{
    return 1.0f / (1.0f + tvk_exp_float(-x));
}

TVK_HD float tvk_cu_cap(float x, float cap)
{
    return (1.0f - 2.0f / (1.0f + tvk_exp_float(2.0f * (x / cap)))) * cap;
}

TVK_HD double tvk_cu_row_total(const double *lanes)
{
    double sum = 0.0;

    for (uint32_t i = 0; i < TVK_CU_ROW_LANES; i++)
        sum = sum + lanes[i];
    return sum;
}

TVK_HD float tvk_cu_row_max(const double *lanes)
{
    double max = lanes[0];

    for (uint32_t i = 1; i < TVK_CU_ROW_LANES; i++)
        max = lanes[i] > max ? lanes[i] : max;
    return (float)max;
}

/* ---- norms --------------------------------------------------------------- */

#define TVK_CU_NORM_RMS      0u
#define TVK_CU_NORM_PLUS_ONE 1u
#define TVK_CU_NORM_LAYER    2u

struct tvk_cu_norm { /* block: part `block % parts` of row `block / parts` */
    const float *x;
    float *dst;         /* may be x */
    const float *w, *b; /* [n], NULL: none */
    uint64_t ldx, ld;
    uint64_t parts, step; /* of a row: n elements every `step` */
    uint64_t n;
    float eps;
    uint32_t type;
};

TVK_HD uint64_t tvk_cu_norm_at(const struct tvk_cu_place *at,
                               const struct tvk_cu_norm *a, uint64_t ld)
{
    return at->block / a->parts * ld + at->block % a->parts * a->step;
}

/* shared [2 LANES]: of the elements, of their squares around the mean. */
TVK_HD void tvk_cu_norm0(const struct tvk_cu_place *at, double *shared,
                         const struct tvk_cu_norm *a)
{
    const float *const x = a->x + tvk_cu_norm_at(at, a, a->ldx);
    double sum = 0.0;

    if (a->type == TVK_CU_NORM_LAYER)
        for (uint64_t i = at->thread; i < a->n; i += TVK_CU_ROW_LANES)
            sum = sum + (double)x[i];
    shared[at->thread] = sum;
}

TVK_HD void tvk_cu_norm1(const struct tvk_cu_place *at, double *shared,
                         const struct tvk_cu_norm *a)
{
    const float *const x = a->x + tvk_cu_norm_at(at, a, a->ldx);
    const double mean = a->type == TVK_CU_NORM_LAYER
                            ? tvk_cu_row_total(shared) / (double)a->n
                            : 0.0;
    double sum = 0.0;

    for (uint64_t i = at->thread; i < a->n; i += TVK_CU_ROW_LANES) {
        const double d = (double)x[i] - mean;
        sum = sum + d * d;
    }
    shared[TVK_CU_ROW_LANES + at->thread] = sum;
}

/* A thread writes what only it reads: dst may be x. */
TVK_HD void tvk_cu_norm2(const struct tvk_cu_place *at, const double *shared,
                         const struct tvk_cu_norm *a)
{
    const float *const x = a->x + tvk_cu_norm_at(at, a, a->ldx);
    float *const dst = a->dst + tvk_cu_norm_at(at, a, a->ld);
    const double mean = a->type == TVK_CU_NORM_LAYER
                            ? tvk_cu_row_total(shared) / (double)a->n
                            : 0.0;
    const double var =
        tvk_cu_row_total(shared + TVK_CU_ROW_LANES) / (double)a->n;
    const float inv = (float)(1.0 / sqrt(var + (double)a->eps));

    for (uint64_t i = at->thread; i < a->n; i += TVK_CU_ROW_LANES) {
        float y = (float)((double)x[i] - mean) * inv;
        if (a->w)
            y = y *
                (a->type == TVK_CU_NORM_PLUS_ONE ? 1.0f + a->w[i] : a->w[i]);
        if (a->b)
            y = y + a->b[i];
        dst[i] = y;
    }
}

/* ---- rows ---------------------------------------------------------------- */

struct tvk_cu_rows {
    float *dst;
    const float *src;
    uint64_t rows, n;
    uint64_t ld, lds; /* lds 0: the same row for all */
};

TVK_HD void tvk_cu_rows_add(const struct tvk_cu_place *at,
                            const struct tvk_cu_rows *a)
{
    for (uint64_t r = at->block; r < a->rows; r += at->n_blocks)
        for (uint64_t i = at->thread; i < a->n; i += at->n_threads)
            a->dst[r * a->ld + i] =
                a->dst[r * a->ld + i] + a->src[r * a->lds + i];
}

TVK_HD void tvk_cu_rows_copy(const struct tvk_cu_place *at,
                             const struct tvk_cu_rows *a)
{
    for (uint64_t r = at->block; r < a->rows; r += at->n_blocks)
        for (uint64_t i = at->thread; i < a->n; i += at->n_threads)
            a->dst[r * a->ld + i] = a->src[r * a->lds + i];
}

struct tvk_cu_take_rows { /* row r is row index[r] of src */
    float *dst;
    const float *src;
    const uint32_t *index;
    uint64_t rows, n, ld, lds;
    uint32_t add; /* to what is there */
    uint32_t unused;
};

TVK_HD void tvk_cu_rows_take(const struct tvk_cu_place *at,
                             const struct tvk_cu_take_rows *a)
{
    for (uint64_t r = at->block; r < a->rows; r += at->n_blocks) {
        const float *const src = a->src + a->index[r] * a->lds;
        float *const dst = a->dst + r * a->ld;
        for (uint64_t i = at->thread; i < a->n; i += at->n_threads)
            dst[i] = a->add ? dst[i] + src[i] : src[i];
    }
}

struct tvk_cu_lookup { /* row r is row index[r] of the table, scaled */
    float *dst;        /* [rows, n] */
    const void *table; /* [.., n] of fp32 (0), bf16 (1) or fp16 (2) */
    const uint32_t *index;
    uint64_t rows, n;
    float scale;
    uint32_t type;
};

TVK_HD void tvk_cu_look_up(const struct tvk_cu_place *at,
                           const struct tvk_cu_lookup *a)
{
    for (uint64_t r = at->block; r < a->rows; r += at->n_blocks) {
        const uint64_t from = a->index[r] * a->n;
        float *const dst = a->dst + r * a->n;
        for (uint64_t i = at->thread; i < a->n; i += at->n_threads) {
            float x = 0.0f;
            if (a->type == 0) {
                x = ((const float *)a->table)[from + i];
            } else {
                const uint16_t h = ((const uint16_t *)a->table)[from + i];
                x = tvk_cu_float(a->type == 1 ? tvk_cu_of_bf16(h)
                                              : tvk_cu_of_f16(h));
            }
            dst[i] = a->scale == 1.0f ? x : x * a->scale;
        }
    }
}

/* ---- activations --------------------------------------------------------- */

#define TVK_CU_ACT_SILU       0u
#define TVK_CU_ACT_GELU       1u
#define TVK_CU_ACT_GELU_TANH  2u
#define TVK_CU_ACT_RELU       3u
#define TVK_CU_ACT_QUICK_GELU 4u

struct tvk_cu_act {
    float *x;
    const float *gate_by; /* NULL: none; row stride ld as x's */
    uint64_t rows, n, ld;
    uint32_t act, unused;
};

TVK_HD float tvk_cu_act_one(uint32_t act, float x)
{
    if (act == TVK_CU_ACT_SILU)
        return x * tvk_cu_sigmoid(x);
    if (act == TVK_CU_ACT_QUICK_GELU)
        return x * tvk_cu_sigmoid(1.702f * x);
    if (act == TVK_CU_ACT_GELU_TANH) {
        const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
        return x * tvk_cu_sigmoid(2.0f * u);
    }
    if (act == TVK_CU_ACT_GELU)
        return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
    return x > 0.0f ? x : 0.0f;
}

TVK_HD void tvk_cu_act_body(const struct tvk_cu_place *at,
                            const struct tvk_cu_act *a)
{
    for (uint64_t r = at->block; r < a->rows; r += at->n_blocks)
        for (uint64_t i = at->thread; i < a->n; i += at->n_threads) {
            const uint64_t e = r * a->ld + i;
            const float y = tvk_cu_act_one(a->act, a->x[e]);
            a->x[e] = a->gate_by ? y * a->gate_by[e] : y;
        }
}

/* ---- rotation ------------------------------------------------------------ */

struct tvk_cu_rotate { /* the first 2 half dimensions of all heads of a row */
    float *x;
    const uint32_t *position;   /* [rows] */
    const float *cosine, *sine; /* [positions, half] */
    uint64_t rows, ld;
    uint64_t n_heads, step; /* heads begin every `step` */
    uint64_t half;
};

TVK_HD void tvk_cu_rotate_body(const struct tvk_cu_place *at,
                               const struct tvk_cu_rotate *a)
{
    const uint32_t n = (uint32_t)(a->n_heads * a->half);
    const uint32_t half = (uint32_t)a->half;

    for (uint64_t r = at->block; r < a->rows; r += at->n_blocks) {
        const uint64_t pos = a->position[r] * a->half;
        for (uint32_t i = at->thread; i < n; i += at->n_threads) {
            float *const x = a->x + r * a->ld + i / half * a->step;
            const uint32_t k = i % half;
            const float c = a->cosine[pos + k], s = a->sine[pos + k];
            const float p = x[k], q = x[k + half];
            x[k] = p * c - q * s;
            x[k + half] = q * c + p * s;
        }
    }
}

/* ---- attention ----------------------------------------------------------- */

/* Problems: heads of windows, all of one length, and one block of queries.
 * Problem i is head i % n_heads of window i / n_heads. */
struct tvk_cu_heads {
    const float *qkv;          /* at the first window's first row */
    float *out;                /* the same */
    float *scores;             /* [problems at hand][n_queries, n_keys] */
    const float **q, **k, **v; /* [problems at hand] */
    float **s, **o;            /* the same */
    const float *slopes;       /* [n_heads], NULL: no ALiBi */
    uint64_t ld, ld_out;
    uint64_t q0, q_step, k0, k_step, v0, v_step; /* floats inside a row */
    uint64_t head_dim, n_heads, share; /* heads that share keys and values */
    uint64_t length, window;           /* ids; keys that a query sees, 0: all */
    uint64_t first, n;                 /* problems at hand */
    uint64_t query, n_queries;         /* positions in the window */
    uint64_t key, n_keys;
    float cap; /* 0: none */
    uint32_t unused;
};

TVK_HD void tvk_cu_heads_body(const struct tvk_cu_place *at,
                              const struct tvk_cu_heads *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at)) {
        const uint64_t window = (a->first + i) / a->n_heads;
        const uint64_t head = (a->first + i) % a->n_heads;
        const uint64_t kv = head / a->share;
        const uint64_t row = window * a->length;
        a->q[i] = a->qkv + (row + a->query) * a->ld + a->q0 + head * a->q_step;
        a->k[i] = a->qkv + (row + a->key) * a->ld + a->k0 + kv * a->k_step;
        a->v[i] = a->qkv + (row + a->key) * a->ld + a->v0 + kv * a->v_step;
        a->s[i] = a->scores + i * a->n_queries * a->n_keys;
        a->o[i] = a->out + (row + a->query) * a->ld_out + head * a->head_dim;
    }
}

/* Keys [*from, *to) of the row's own are seen, counted from `key`. */
TVK_HD void tvk_cu_seen(const struct tvk_cu_place *at,
                        const struct tvk_cu_heads *a, uint64_t *from,
                        uint64_t *to)
{
    const uint64_t query = a->query + at->block % a->n_queries;
    uint64_t first = a->key;

    if (a->window > 0 && query + 1 > a->window && query + 1 - a->window > first)
        first = query + 1 - a->window;
    *from = first - a->key;
    *to = query + 1 - a->key;
}

/* Scores become weights; a block has a row of them. shared [2 LANES]: of the
 * greatest, of the sum. */
TVK_HD void tvk_cu_softmax0(const struct tvk_cu_place *at, double *shared,
                            const struct tvk_cu_heads *a)
{
    float *const s = a->scores + at->block * a->n_keys;
    const uint64_t head = (a->first + at->block / a->n_queries) % a->n_heads;
    const float slope = a->slopes ? a->slopes[head] : 0.0f;
    uint64_t from = 0, to = 0;
    float max = -tvk_cu_infinity();

    tvk_cu_seen(at, a, &from, &to);
    for (uint64_t i = from + at->thread; i < to; i += TVK_CU_ROW_LANES) {
        float x = s[i];
        if (a->cap > 0.0f)
            x = tvk_cu_cap(x, a->cap);
        if (a->slopes)
            x = x + slope * (float)(a->key + i);
        s[i] = x;
        max = x > max ? x : max;
    }
    shared[at->thread] = (double)max;
}

TVK_HD void tvk_cu_softmax1(const struct tvk_cu_place *at, double *shared,
                            const struct tvk_cu_heads *a)
{
    float *const s = a->scores + at->block * a->n_keys;
    const float max = tvk_cu_row_max(shared);
    uint64_t from = 0, to = 0;
    double sum = 0.0;

    tvk_cu_seen(at, a, &from, &to);
    for (uint64_t i = from + at->thread; i < to; i += TVK_CU_ROW_LANES) {
        s[i] = tvk_exp_float(s[i] - max);
        sum = sum + (double)s[i];
    }
    shared[TVK_CU_ROW_LANES + at->thread] = sum;
}

TVK_HD void tvk_cu_softmax2(const struct tvk_cu_place *at, const double *shared,
                            const struct tvk_cu_heads *a)
{
    float *const s = a->scores + at->block * a->n_keys;
    const float inv =
        (float)(1.0 / tvk_cu_row_total(shared + TVK_CU_ROW_LANES));
    uint64_t from = 0, to = 0;

    tvk_cu_seen(at, a, &from, &to);
    for (uint64_t i = from + at->thread; i < to; i += TVK_CU_ROW_LANES)
        s[i] = s[i] * inv;
    for (uint64_t i = at->thread; i < from; i += TVK_CU_ROW_LANES)
        s[i] = 0.0f;
    for (uint64_t i = to + at->thread; i < a->n_keys; i += TVK_CU_ROW_LANES)
        s[i] = 0.0f;
}

/* ---- losses -------------------------------------------------------------- */

struct tvk_cu_loss {   /* of a row, over the tiles of logits until now */
    double sum;        /* of exp(logit - max) */
    float max, target; /* logit of the target, once its tile was there */
};

struct tvk_cu_losses {
    float *logits; /* [rows, n] of a tile, row stride ld */
    struct tvk_cu_loss *rows;
    const uint32_t *targets; /* [rows] */
    uint64_t n, ld;
    uint64_t from; /* id of column 0; 0: the first tile */
    float cap;     /* 0: none */
    uint32_t unused;
};

/* A block has a row; shared [2 LANES]: of the greatest, of the sum. */
TVK_HD void tvk_cu_losses0(const struct tvk_cu_place *at, double *shared,
                           const struct tvk_cu_losses *a)
{
    float *const x = a->logits + at->block * a->ld;
    float max = -tvk_cu_infinity();

    for (uint64_t i = at->thread; i < a->n; i += TVK_CU_ROW_LANES) {
        if (a->cap > 0.0f)
            x[i] = tvk_cu_cap(x[i], a->cap);
        max = x[i] > max ? x[i] : max;
    }
    shared[at->thread] = (double)max;
}

TVK_HD void tvk_cu_losses1(const struct tvk_cu_place *at, double *shared,
                           const struct tvk_cu_losses *a)
{
    const float *const x = a->logits + at->block * a->ld;
    const float max = tvk_cu_row_max(shared);
    double sum = 0.0;

    for (uint64_t i = at->thread; i < a->n; i += TVK_CU_ROW_LANES)
        sum = sum + (double)tvk_exp_float(x[i] - max);
    shared[TVK_CU_ROW_LANES + at->thread] = sum;
}

TVK_HD void tvk_cu_losses2(const struct tvk_cu_place *at, const double *shared,
                           const struct tvk_cu_losses *a)
{
    struct tvk_cu_loss *const row = a->rows + at->block;
    const uint64_t target = a->targets[at->block];

    if (at->thread != 0)
        return;
    const float max = tvk_cu_row_max(shared);
    const double sum = tvk_cu_row_total(shared + TVK_CU_ROW_LANES);
    if (a->from == 0) {
        row->max = max;
        row->sum = sum;
    } else {
        const float both = max > row->max ? max : row->max;
        row->sum = row->sum * exp((double)row->max - (double)both) +
                   sum * exp((double)max - (double)both);
        row->max = both;
    }
    if (target >= a->from && target < a->from + a->n)
        row->target = a->logits[at->block * a->ld + (target - a->from)];
}

/* ---- statistics ---------------------------------------------------------- */

/* A thread has a channel, and adds row by row. Rows are asked for SQUARES_AHEAD
 * at a time, so that it does not wait for each. */
#define TVK_CU_SQUARES       32u /* threads of a block: for many blocks */
#define TVK_CU_SQUARES_AHEAD 16u

struct tvk_cu_squares {
    double *sums;   /* [n] */
    const float *x; /* [rows, ld] */
    uint64_t rows, n, ld;
};

TVK_HD void tvk_cu_squares_body(const struct tvk_cu_place *at,
                                const struct tvk_cu_squares *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at)) {
        double sum = a->sums[i];
        uint64_t r = 0;
        for (; a->rows - r >= TVK_CU_SQUARES_AHEAD; r += TVK_CU_SQUARES_AHEAD) {
            float v[TVK_CU_SQUARES_AHEAD];
            for (uint32_t k = 0; k < TVK_CU_SQUARES_AHEAD; k++)
                v[k] = a->x[(r + k) * a->ld + i];
            for (uint32_t k = 0; k < TVK_CU_SQUARES_AHEAD; k++)
                sum = sum + (double)v[k] * (double)v[k];
        }
        for (; r < a->rows; r++) {
            const double v = (double)a->x[r * a->ld + i];
            sum = sum + v * v;
        }
        a->sums[i] = sum;
    }
}

/* ---- all of them --------------------------------------------------------- */

/* As TVK_CU_KERNELS. */
#define TVK_CU_EVAL_KERNELS(ELEMENTS, BLOCKS2, BLOCKS3)                        \
    BLOCKS3(tv_norm, tvk_cu_norm, double, 2 * TVK_CU_ROW_LANES, tvk_cu_norm0,  \
            tvk_cu_norm1, tvk_cu_norm2)                                        \
    ELEMENTS(tv_rows_add, tvk_cu_rows, tvk_cu_rows_add)                        \
    ELEMENTS(tv_rows_copy, tvk_cu_rows, tvk_cu_rows_copy)                      \
    ELEMENTS(tv_rows_take, tvk_cu_take_rows, tvk_cu_rows_take)                 \
    ELEMENTS(tv_look_up, tvk_cu_lookup, tvk_cu_look_up)                        \
    ELEMENTS(tv_act, tvk_cu_act, tvk_cu_act_body)                              \
    ELEMENTS(tv_rotate, tvk_cu_rotate, tvk_cu_rotate_body)                     \
    ELEMENTS(tv_heads, tvk_cu_heads, tvk_cu_heads_body)                        \
    BLOCKS3(tv_softmax, tvk_cu_heads, double, 2 * TVK_CU_ROW_LANES,            \
            tvk_cu_softmax0, tvk_cu_softmax1, tvk_cu_softmax2)                 \
    ELEMENTS(tv_squares, tvk_cu_squares, tvk_cu_squares_body)                  \
    BLOCKS3(tv_losses, tvk_cu_losses, double, 2 * TVK_CU_ROW_LANES,            \
            tvk_cu_losses0, tvk_cu_losses1, tvk_cu_losses2)

#endif
