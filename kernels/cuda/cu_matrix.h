/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cu_matrix.h - the work between products of tv/cuda_math.h as kernels:
 * arguments and phases (private to kernels/cuda; see cu_hd.h).
 *
 * Choosing and spreading errors (tv_obs_*) is kernels/layer.c's loop with rows
 * given to threads: the same operations in the same order for each row, and the
 * same choice among equal scores. Refinement (tv_cg_*) has a block for each row
 * and sums in the order of lanes, then of a lane's elements.
 */
#ifndef TVK_CU_MATRIX_H
#define TVK_CU_MATRIX_H

#include "cu_hd.h"

/* Columns of a block of the loop, row stride of its errors (TVK_OBS_GROUP). */
#define TVK_CU_OBS_BLOCK   128u
#define TVK_CU_OBS_LD      512u
#define TVK_CU_OBS_BUCKETS 65536u
/* Threads of a block: over rows; of the search and the scan; of a row. */
#define TVK_CU_ROWS        32u
#define TVK_CU_FIND        256u
#define TVK_CU_LINE        128u

/* ---- Gram matrices ------------------------------------------------------- */

/* Offset of row i of a packed upper triangle with rows of n, n - 1, ... */
TVK_HD uint64_t tvk_cu_packed(uint64_t n, uint64_t i)
{
    return i * n - i * (i - (i > 0)) / 2;
}

struct tvk_cu_gram_sum {
    double *sums; /* packed rows, from `row` on */
    const float
        *product; /* [height, width], of rows from `row` on and columns */
    uint64_t height, width; /* from `col` on, of a matrix [n, n] */
    uint64_t row, col, n;
};

TVK_HD void tvk_cu_gram_sum_body(const struct tvk_cu_place *at,
                                 const struct tvk_cu_gram_sum *a)
{
    const uint64_t n = a->height * a->width;

    for (uint64_t e = tvk_cu_first(at); e < n; e += tvk_cu_step(at)) {
        const uint64_t i = e / a->width;
        const uint64_t r = a->row + i;
        const uint64_t c = a->col + e % a->width;
        if (c >= r) {
            double *const to =
                a->sums + tvk_cu_packed(a->n - a->row, i) + (c - r);
            *to = *to + (double)a->product[e];
        }
    }
}

struct tvk_cu_unpack {
    float *h; /* [n, n] */
    const float *packed;
    const float *diagonal; /* [n], NULL: that of packed */
    uint64_t n;
};

TVK_HD void tvk_cu_unpack_body(const struct tvk_cu_place *at,
                               const struct tvk_cu_unpack *a)
{
    const uint64_t n = a->n * a->n;

    for (uint64_t e = tvk_cu_first(at); e < n; e += tvk_cu_step(at)) {
        uint64_t i = e / a->n;
        uint64_t j = e % a->n;
        if (i > j) {
            const uint64_t x = i;
            i = j;
            j = x;
        }
        a->h[e] = i == j && a->diagonal
                      ? a->diagonal[i]
                      : a->packed[tvk_cu_packed(a->n, i) + (j - i)];
    }
}

struct tvk_cu_square {
    float *dst;
    const float *src; /* [n, n] */
    uint64_t n;
};

struct tvk_cu_wide { /* fp64 out of fp32 */
    double *dst;
    const float *src; /* [n, n] */
    uint64_t n;
};

/* dst: src with rows and columns from the last. */
TVK_HD void tvk_cu_flip(const struct tvk_cu_place *at,
                        const struct tvk_cu_wide *a)
{
    const uint64_t n = a->n * a->n;

    for (uint64_t e = tvk_cu_first(at); e < n; e += tvk_cu_step(at))
        a->dst[e] = (double)a->src[n - 1 - e];
}

struct tvk_cu_inverse { /* columns [from, to) of R^-1, R upper [n, n] */
    double *tile;       /* by columns, `to` rows: those below are 0 */
    float *u;           /* [n, n]: R^-1 with rows and columns from the last */
    uint64_t n, from, to;
};

/* The tile of the identity. */
TVK_HD void tvk_cu_unit(const struct tvk_cu_place *at,
                        const struct tvk_cu_inverse *a)
{
    const uint64_t n = (a->to - a->from) * a->to;

    for (uint64_t e = tvk_cu_first(at); e < n; e += tvk_cu_step(at))
        a->tile[e] = e % a->to == a->from + e / a->to ? 1.0 : 0.0;
}

/* Its rows of u, 0 left of the diagonal. */
TVK_HD void tvk_cu_take(const struct tvk_cu_place *at,
                        const struct tvk_cu_inverse *a)
{
    const uint64_t n = (a->to - a->from) * a->n;

    for (uint64_t e = tvk_cu_first(at); e < n; e += tvk_cu_step(at)) {
        const uint64_t k = e / a->n;
        const uint64_t j = e % a->n;
        const uint64_t i = a->n - 1 - (a->from + k);
        a->u[i * a->n + j] =
            j >= i ? (float)a->tile[k * a->to + (a->n - 1 - j)] : 0.0f;
    }
}

/* dst [n]: the diagonal. */
TVK_HD void tvk_cu_diagonal(const struct tvk_cu_place *at,
                            const struct tvk_cu_square *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at))
        a->dst[i] = a->src[i * a->n + i];
}

/* ---- the loop ------------------------------------------------------------ */

struct tvk_cu_obs_limit { /* scores below bits are pruned, and the first left */
    uint32_t bits, left;  /* that have exactly them */
};

struct tvk_cu_obs {
    float *t;          /* at the block's first column */
    const float *u;    /* at its first row and column */
    float *err;        /* at its first column; row stride OBS_LD */
    uint32_t *buckets; /* [OBS_BUCKETS], 0 before they are counted */
    uint32_t *equal;   /* [rows]: scores at the limit, then those before */
    struct tvk_cu_obs_limit *limit;
    uint64_t rows, cols;
    uint64_t ldt;      /* row stride of t; that of u is cols */
    uint32_t width;    /* of the block */
    uint32_t n_prune;  /* of the block's entries */
    uint32_t lower;    /* buckets are of the lower half of the bits */
    uint32_t from, to; /* columns of a strip */
    uint32_t group;    /* n:m: columns of a group, 0: none */
    uint32_t n_pruned; /* and how many of them go */
    uint32_t unused;
};

/* Bits of a score: not negative, so they order like it; NaN above all. */
TVK_HD uint32_t tvk_cu_obs_score(float w, float u)
{
    const double q = (double)w / (double)u;
    const float score = (float)(q * q);

    return tvk_cu_bits(score) & 0x7fffffffu;
}

TVK_HD uint32_t tvk_cu_obs_bits(const struct tvk_cu_obs *a, uint64_t r,
                                uint64_t j)
{
    return tvk_cu_obs_score(a->t[r * a->ldt + j], a->u[j * a->cols + j]);
}

TVK_HD void tvk_cu_obs_count(const struct tvk_cu_place *at,
                             const struct tvk_cu_obs *a)
{
    const uint64_t n = a->rows * a->width;

    for (uint64_t e = tvk_cu_first(at); e < n; e += tvk_cu_step(at)) {
        const uint32_t bits = tvk_cu_obs_bits(a, e / a->width, e % a->width);
        if (!a->lower)
            tvk_cu_add32(&a->buckets[bits >> 16], 1);
        else if (bits >> 16 == a->limit->bits >> 16)
            tvk_cu_add32(&a->buckets[bits & 0xffffu], 1);
    }
}

/* One block of FIND threads; shared [FIND]: what a thread's buckets hold. */
TVK_HD void tvk_cu_obs_find0(const struct tvk_cu_place *at, uint32_t *shared,
                             const struct tvk_cu_obs *a)
{
    const uint32_t each = TVK_CU_OBS_BUCKETS / TVK_CU_FIND;
    uint32_t sum = 0;

    for (uint32_t i = 0; i < each; i++)
        sum += a->buckets[at->thread * each + i];
    shared[at->thread] = sum;
}

TVK_HD void tvk_cu_obs_find1(const struct tvk_cu_place *at,
                             const uint32_t *shared, const struct tvk_cu_obs *a)
{
    const uint32_t each = TVK_CU_OBS_BUCKETS / TVK_CU_FIND;
    uint32_t left = a->lower ? a->limit->left : a->n_prune;
    uint32_t part = 0;

    if (at->thread != 0)
        return;
    while (part < TVK_CU_FIND - 1 && left > shared[part])
        left -= shared[part++];
    uint32_t i = part * each;
    while (i < TVK_CU_OBS_BUCKETS - 1 && left > a->buckets[i])
        left -= a->buckets[i++];
    a->limit->bits = a->lower ? a->limit->bits | i : i << 16;
    a->limit->left = left;
}

TVK_HD void tvk_cu_obs_equal(const struct tvk_cu_place *at,
                             const struct tvk_cu_obs *a)
{
    const uint64_t n = a->rows * a->width;

    for (uint64_t e = tvk_cu_first(at); e < n; e += tvk_cu_step(at)) {
        const uint64_t r = e / a->width;
        if (tvk_cu_obs_bits(a, r, e % a->width) == a->limit->bits)
            tvk_cu_add32(&a->equal[r], 1);
    }
}

/* equal [rows] becomes the sum of those before; one block of FIND threads. */
TVK_HD uint64_t tvk_cu_obs_share(const struct tvk_cu_obs *a)
{
    return (a->rows + TVK_CU_FIND - 1) / TVK_CU_FIND;
}

TVK_HD void tvk_cu_obs_scan0(const struct tvk_cu_place *at, uint32_t *shared,
                             const struct tvk_cu_obs *a)
{
    const uint64_t each = tvk_cu_obs_share(a);
    const uint64_t end = (at->thread + 1) * each;
    uint32_t sum = 0;

    for (uint64_t r = at->thread * each; r < end && r < a->rows; r++)
        sum += a->equal[r];
    shared[at->thread] = sum;
}

TVK_HD void tvk_cu_obs_scan1(const struct tvk_cu_place *at, uint32_t *shared,
                             const struct tvk_cu_obs *a)
{
    uint32_t before = 0;

    (void)a;
    if (at->thread != 0)
        return;
    for (uint32_t i = 0; i < TVK_CU_FIND; i++) {
        const uint32_t mine = shared[i];
        shared[i] = before;
        before += mine;
    }
}

TVK_HD void tvk_cu_obs_scan2(const struct tvk_cu_place *at,
                             const uint32_t *shared, const struct tvk_cu_obs *a)
{
    const uint64_t each = tvk_cu_obs_share(a);
    const uint64_t end = (at->thread + 1) * each;
    uint32_t before = shared[at->thread];

    for (uint64_t r = at->thread * each; r < end && r < a->rows; r++) {
        const uint32_t mine = a->equal[r];
        a->equal[r] = before;
        before += mine;
    }
}

/* Errors of the block are 1 where pruned, 0 where kept; a thread has a row. */
TVK_HD void tvk_cu_obs_mark(const struct tvk_cu_place *at,
                            const struct tvk_cu_obs *a)
{
    for (uint64_t r = tvk_cu_first(at); r < a->rows; r += tvk_cu_step(at)) {
        uint32_t rank = a->equal[r];
        for (uint32_t j = 0; j < a->width; j++) {
            const uint32_t bits = tvk_cu_obs_bits(a, r, j);
            int pruned = bits < a->limit->bits;
            if (bits == a->limit->bits)
                pruned = rank++ < a->limit->left;
            a->err[r * TVK_CU_OBS_LD + j] = pruned ? 1.0f : 0.0f;
        }
    }
}

/* Marks n_pruned of the columns from..to of a row with values v. */
TVK_HD void tvk_cu_obs_mark_group(const struct tvk_cu_obs *a, const float *v,
                                  float *err, uint32_t from, uint32_t to)
{
    for (uint32_t j = from; j < to; j++) {
        const uint32_t mine = tvk_cu_obs_score(v[j], a->u[j * a->cols + j]);
        uint32_t n_less = 0;
        for (uint32_t k = from; k < to; k++) {
            const uint32_t other =
                tvk_cu_obs_score(v[k], a->u[k * a->cols + k]);
            n_less += other < mine || (other == mine && k < j);
        }
        err[j] = n_less < a->n_pruned ? 1.0f : 0.0f;
    }
}

/* Columns from..to of the block, errors spread inside them; a thread has a
 * row. v lies in local memory, where neighbours' entries lie side by side. */
TVK_HD void tvk_cu_obs_strip(const struct tvk_cu_place *at,
                             const struct tvk_cu_obs *a)
{
    for (uint64_t r = tvk_cu_first(at); r < a->rows; r += tvk_cu_step(at)) {
        float *const t = a->t + r * a->ldt;
        float *const err = a->err + r * TVK_CU_OBS_LD;
        float v[TVK_CU_OBS_BLOCK];
        for (uint32_t j = a->from; j < a->to; j++)
            v[j] = t[j];
        for (uint32_t j = a->from; j < a->to; j++) {
            const float *const u = a->u + j * a->cols;
            if (a->group > 0 && j % a->group == 0) {
                const uint32_t end = j + a->group;
                tvk_cu_obs_mark_group(a, v, err, j, end < a->to ? end : a->to);
            }
            if (err[j] == 0.0f)
                continue;
            const float e = v[j] / u[j];
            for (uint32_t k = j + 1; k < a->to; k++)
                v[k] = v[k] - e * u[k];
            v[j] = 0.0f;
            err[j] = e;
        }
        for (uint32_t j = a->from; j < a->to; j++)
            t[j] = v[j];
    }
}

/* ---- refinement ---------------------------------------------------------- */

struct tvk_cu_cg {
    float *p; /* [rows, cols] */
    const float *t;
    float *res, *dir;      /* residual where kept, direction */
    const float *dir_h;    /* dir H */
    const float *diagonal; /* [cols] of H */
    uint8_t *keep;         /* [rows, cols] */
    double *first;         /* [rows]: norms at the start */
    const double *rz;      /* [rows]: norms of the residuals before the step */
    double *rz_next;       /* and behind it */
    uint64_t rows, cols;
};

/* dir = t - p; what is kept. */
TVK_HD void tvk_cu_cg_begin(const struct tvk_cu_place *at,
                            const struct tvk_cu_cg *a)
{
    const uint64_t n = a->rows * a->cols;

    for (uint64_t i = tvk_cu_first(at); i < n; i += tvk_cu_step(at)) {
        a->dir[i] = a->t[i] - a->p[i];
        a->keep[i] = a->p[i] != 0.0f;
    }
}

TVK_HD double tvk_cu_cg_total(const double *lanes)
{
    double sum = 0.0;

    for (uint32_t i = 0; i < TVK_CU_LINE; i++)
        sum = sum + lanes[i];
    return sum;
}

/* The first residual and direction; a block has a row. shared [LINE]. */
TVK_HD void tvk_cu_cg_first0(const struct tvk_cu_place *at, double *shared,
                             const struct tvk_cu_cg *a)
{
    const uint64_t row = at->block * a->cols;
    double sum = 0.0;

    for (uint64_t j = at->thread; j < a->cols; j += TVK_CU_LINE) {
        const float d = a->diagonal[j];
        const float r = a->keep[row + j] ? a->res[row + j] : 0.0f;
        a->res[row + j] = r;
        a->dir[row + j] = r / d;
        sum = sum + (double)r * (double)r / (double)d;
    }
    shared[at->thread] = sum;
}

TVK_HD void tvk_cu_cg_first1(const struct tvk_cu_place *at,
                             const double *shared, const struct tvk_cu_cg *a)
{
    if (at->thread != 0)
        return;
    const double sum = tvk_cu_cg_total(shared);
    a->first[at->block] = sum;
    a->rz_next[at->block] = sum;
}

/* A step; a block has a row. shared [2 LINE]: of dir dir_h, of the norm. */
TVK_HD void tvk_cu_cg_step0(const struct tvk_cu_place *at, double *shared,
                            const struct tvk_cu_cg *a)
{
    const uint64_t row = at->block * a->cols;
    double sum = 0.0;

    for (uint64_t j = at->thread; j < a->cols; j += TVK_CU_LINE)
        sum = sum + (double)a->dir[row + j] * (double)a->dir_h[row + j];
    shared[at->thread] = sum;
}

/* Below this the residual is rounding: a step could go up. */
TVK_HD int tvk_cu_cg_goes_on(const struct tvk_cu_cg *a, uint64_t row,
                             double curve)
{
    return a->rz[row] > 1e-12 * a->first[row] && curve > 0.0;
}

TVK_HD void tvk_cu_cg_step1(const struct tvk_cu_place *at, double *shared,
                            const struct tvk_cu_cg *a)
{
    const uint64_t row = at->block * a->cols;
    const double curve = tvk_cu_cg_total(shared);
    const int goes_on = tvk_cu_cg_goes_on(a, at->block, curve);
    const double alpha = goes_on ? a->rz[at->block] / curve : 0.0;
    double sum = 0.0;

    for (uint64_t j = at->thread; goes_on && j < a->cols; j += TVK_CU_LINE) {
        const uint64_t i = row + j;
        if (a->keep[i]) {
            a->p[i] = (float)((double)a->p[i] + alpha * (double)a->dir[i]);
            a->res[i] =
                (float)((double)a->res[i] - alpha * (double)a->dir_h[i]);
        }
        sum = sum +
              (double)a->res[i] * (double)a->res[i] / (double)a->diagonal[j];
    }
    shared[TVK_CU_LINE + at->thread] = sum;
}

TVK_HD void tvk_cu_cg_step2(const struct tvk_cu_place *at, const double *shared,
                            const struct tvk_cu_cg *a)
{
    const uint64_t row = at->block * a->cols;
    const double curve = tvk_cu_cg_total(shared);
    const int goes_on = tvk_cu_cg_goes_on(a, at->block, curve);
    const double next = tvk_cu_cg_total(shared + TVK_CU_LINE);
    const double beta = goes_on ? next / a->rz[at->block] : 0.0;

    for (uint64_t j = at->thread; j < a->cols; j += TVK_CU_LINE) {
        const uint64_t i = row + j;
        a->dir[i] = goes_on
                        ? (float)((double)a->res[i] / (double)a->diagonal[j] +
                                  beta * (double)a->dir[i])
                        : 0.0f;
    }
    if (at->thread == 0)
        a->rz_next[at->block] = goes_on ? next : 0.0;
}

struct tvk_cu_traces {
    const float *t, *p, *th, *ph; /* [rows, cols] */
    double *sums;                 /* [rows][3]: t th, th p, p ph */
    uint64_t cols;
};

/* A block has a row. shared [3 LINE]. */
TVK_HD void tvk_cu_traces0(const struct tvk_cu_place *at, double *shared,
                           const struct tvk_cu_traces *a)
{
    const uint64_t row = at->block * a->cols;
    double tt = 0.0, tp = 0.0, pp = 0.0;

    for (uint64_t j = at->thread; j < a->cols; j += TVK_CU_LINE) {
        const uint64_t i = row + j;
        tt = tt + (double)a->t[i] * (double)a->th[i];
        tp = tp + (double)a->th[i] * (double)a->p[i];
        pp = pp + (double)a->p[i] * (double)a->ph[i];
    }
    shared[at->thread] = tt;
    shared[TVK_CU_LINE + at->thread] = tp;
    shared[2 * TVK_CU_LINE + at->thread] = pp;
}

TVK_HD void tvk_cu_traces1(const struct tvk_cu_place *at, const double *shared,
                           const struct tvk_cu_traces *a)
{
    if (at->thread < 3)
        a->sums[at->block * 3 + at->thread] =
            tvk_cu_cg_total(shared + at->thread * TVK_CU_LINE);
}

/* ---- all of them --------------------------------------------------------- */

/* As TVK_CU_KERNELS. */
#define TVK_CU_MATRIX_KERNELS(ELEMENTS, BLOCKS2, BLOCKS3)                      \
    ELEMENTS(tv_gram_sum, tvk_cu_gram_sum, tvk_cu_gram_sum_body)               \
    ELEMENTS(tv_unpack, tvk_cu_unpack, tvk_cu_unpack_body)                     \
    ELEMENTS(tv_flip, tvk_cu_wide, tvk_cu_flip)                                \
    ELEMENTS(tv_unit, tvk_cu_inverse, tvk_cu_unit)                             \
    ELEMENTS(tv_take, tvk_cu_inverse, tvk_cu_take)                             \
    ELEMENTS(tv_diagonal, tvk_cu_square, tvk_cu_diagonal)                      \
    ELEMENTS(tv_obs_count, tvk_cu_obs, tvk_cu_obs_count)                       \
    BLOCKS2(tv_obs_find, tvk_cu_obs, uint32_t, TVK_CU_FIND, tvk_cu_obs_find0,  \
            tvk_cu_obs_find1)                                                  \
    ELEMENTS(tv_obs_equal, tvk_cu_obs, tvk_cu_obs_equal)                       \
    BLOCKS3(tv_obs_scan, tvk_cu_obs, uint32_t, TVK_CU_FIND, tvk_cu_obs_scan0,  \
            tvk_cu_obs_scan1, tvk_cu_obs_scan2)                                \
    ELEMENTS(tv_obs_mark, tvk_cu_obs, tvk_cu_obs_mark)                         \
    ELEMENTS(tv_obs_strip, tvk_cu_obs, tvk_cu_obs_strip)                       \
    ELEMENTS(tv_cg_begin, tvk_cu_cg, tvk_cu_cg_begin)                          \
    BLOCKS2(tv_cg_first, tvk_cu_cg, double, TVK_CU_LINE, tvk_cu_cg_first0,     \
            tvk_cu_cg_first1)                                                  \
    BLOCKS3(tv_cg_step, tvk_cu_cg, double, 2 * TVK_CU_LINE, tvk_cu_cg_step0,   \
            tvk_cu_cg_step1, tvk_cu_cg_step2)                                  \
    BLOCKS2(tv_traces, tvk_cu_traces, double, 3 * TVK_CU_LINE, tvk_cu_traces0, \
            tvk_cu_traces1)

#endif
