/* SPDX-License-Identifier: Apache-2.0 */
/*
 * layer.c - see tv/layer.h; what kernels/ has BLAS do is here and in
 * gram_factor.c.
 *
 *            i1   i2        g2
 *      +-----+----+---------+-----------+   a block i1..i2 is pruned and its
 *   T  |done |blk |group    |rest       |   errors reach the group at once, the
 *      +-----+----+---------+-----------+   rest once per group: products with
 *                                           an inner size of 512, not 128.
 */
#include "tv/layer.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#ifdef TVK_HAVE_OPENBLAS

#include <cblas.h>

/* Columns of a block whose errors are spread one by one. */
#define STRIP     32u
/* Buckets of the upper and of the lower half of a score's bits. */
#define N_BUCKETS 65536u

int tvk_layer_built(void)
{
    return 1;
}

/* ---- the loop ---- */

/* Bits of a score: not negative, so they order like it; NaN above all. */
static uint32_t score_bits(float w, float u)
{
    const double q = (double)w / (double)u;
    const float score = (float)(q * q);
    uint32_t bits;

    memcpy(&bits, &score, sizeof bits);
    return bits & 0x7fffffffu;
}

struct block {
    float *t;       /* at the block's first column */
    const float *u; /* at the block's first row and column */
    float *err;     /* at the block's first column; row stride TVK_OBS_GROUP */
    size_t rows, cols, width;
};

/* The smallest `n_prune` scores lie below bits *limit, or are among the first
 * *n_equal (in row-major order) that have exactly them. */
static void find_limit(const struct block *b, uint64_t n_prune,
                       uint32_t *buckets, uint32_t *limit, uint64_t *n_equal)
{
    uint32_t hi = 0, lo = 0;

    memset(buckets, 0, N_BUCKETS * sizeof *buckets);
    for (size_t r = 0; r < b->rows; r++)
        for (size_t j = 0; j < b->width; j++)
            buckets[score_bits(b->t[r * b->cols + j], b->u[j * b->cols + j]) >>
                    16]++;
    while (n_prune > buckets[hi])
        n_prune -= buckets[hi++];
    memset(buckets, 0, N_BUCKETS * sizeof *buckets);
    for (size_t r = 0; r < b->rows; r++)
        for (size_t j = 0; j < b->width; j++) {
            const uint32_t bits =
                score_bits(b->t[r * b->cols + j], b->u[j * b->cols + j]);

            if (bits >> 16 == hi)
                buckets[bits & 0xffffu]++;
        }
    while (n_prune > buckets[lo])
        n_prune -= buckets[lo++];
    *limit = hi << 16 | lo;
    *n_equal = n_prune;
}

/* Marks of a whole block: its errors are 1 where pruned, 0 where kept. */
static void mark_block(const struct block *b, double density, uint32_t *buckets)
{
    const uint64_t n = (uint64_t)b->rows * b->width;
    const uint64_t n_prune = (uint64_t)floor((double)n * (1.0 - density));
    uint32_t limit = 0;
    uint64_t n_equal = 0;

    if (n_prune > 0)
        find_limit(b, n_prune, buckets, &limit, &n_equal);
    for (size_t r = 0; r < b->rows; r++)
        for (size_t j = 0; j < b->width; j++) {
            const uint32_t bits =
                score_bits(b->t[r * b->cols + j], b->u[j * b->cols + j]);
            int pruned = bits < limit;

            if (bits == limit && n_equal > 0) {
                pruned = 1;
                n_equal--;
            }
            b->err[r * TVK_OBS_GROUP + j] = pruned ? 1.0f : 0.0f;
        }
}

/* Marks n_pruned of the columns from..to of one row by current values. */
static void mark_row(const struct block *b, size_t r, size_t from, size_t to,
                     unsigned n_pruned)
{
    const float *t = b->t + r * b->cols;
    float *err = b->err + r * TVK_OBS_GROUP;

    for (size_t j = from; j < to; j++) {
        const uint32_t mine = score_bits(t[j], b->u[j * b->cols + j]);
        unsigned n_less = 0;

        for (size_t k = from; k < to; k++) {
            const uint32_t other = score_bits(t[k], b->u[k * b->cols + k]);

            n_less += other < mine || (other == mine && k < j);
        }
        err[j] = n_less < n_pruned ? 1.0f : 0.0f;
    }
}

/* Prunes columns from..to of the block, spreading errors inside them. */
static uint64_t prune_strip(const struct block *b, size_t from, size_t to,
                            const struct tvk_obs *how)
{
    uint64_t n_kept = 0;

    for (size_t r = 0; r < b->rows; r++) {
        float *t = b->t + r * b->cols;
        float *err = b->err + r * TVK_OBS_GROUP;

        for (size_t j = from; j < to; j++) {
            const float *u = b->u + j * b->cols;

            if (how->group > 0 && j % how->group == 0) {
                const size_t end = j + how->group;

                mark_row(b, r, j, end < to ? end : to, how->n_pruned);
            }
            if (err[j] == 0) {
                n_kept++;
                continue;
            }
            const float e = t[j] / u[j];
            for (size_t k = j + 1; k < to; k++)
                t[k] -= e * u[k];
            t[j] = 0;
            err[j] = e;
        }
    }
    return n_kept;
}

/* t[:, to..end) -= err[:, from..to) u[from..to, to..end), columns of the
 * matrix; err's column 0 is the matrix's column `origin`. */
static void spread(float *t, const float *u, const float *err, size_t rows,
                   size_t cols, size_t origin, size_t from, size_t to,
                   size_t end)
{
    if (to >= end || rows == 0)
        return;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (blasint)rows,
                (blasint)(end - to), (blasint)(to - from), -1.0f,
                err + (from - origin), (blasint)TVK_OBS_GROUP,
                u + from * cols + to, (blasint)cols, 1.0f, t + to,
                (blasint)cols);
}

static size_t min_size(size_t a, size_t b)
{
    return a < b ? a : b;
}

size_t tvk_obs_work(size_t rows, size_t cols)
{
    (void)cols;
    return N_BUCKETS + rows * TVK_OBS_GROUP;
}

uint64_t tvk_obs_prune(float *t, const float *u, size_t rows, size_t cols,
                       const struct tvk_obs *how, float *work)
{
    uint32_t *buckets = (uint32_t *)(void *)work;
    float *err = work + N_BUCKETS;
    uint64_t n_kept = 0;

    _Static_assert(sizeof(float) == sizeof(uint32_t), "one buffer for both");
    assert(cols <= TVK_LAYER_COLS);
    assert(how->density >= 0 && how->density <= 1);
    /* A group within one strip, or strips widen to the block. */
    assert(how->group == 0 || TVK_OBS_BLOCK % how->group == 0);
    const size_t strip = how->group > STRIP ? TVK_OBS_BLOCK : STRIP;

    openblas_set_num_threads(1);
    for (size_t g = 0; g < cols; g += TVK_OBS_GROUP) {
        const size_t g_end = min_size(g + TVK_OBS_GROUP, cols);

        for (size_t i = g; i < g_end; i += TVK_OBS_BLOCK) {
            const size_t i_end = min_size(i + TVK_OBS_BLOCK, cols);
            const struct block b = {.t = t + i,
                                    .u = u + i * cols + i,
                                    .err = err + (i - g),
                                    .rows = rows,
                                    .cols = cols,
                                    .width = i_end - i};

            if (how->group == 0)
                mark_block(&b, how->density, buckets);
            for (size_t s = i; s < i_end; s += strip) {
                const size_t s_end = min_size(s + strip, i_end);

                n_kept += prune_strip(&b, s - i, s_end - i, how);
                spread(t, u, err, rows, cols, g, s, s_end, i_end);
            }
            spread(t, u, err, rows, cols, g, i, i_end, g_end);
        }
        spread(t, u, err, rows, cols, g, g, g_end, cols);
    }
    return n_kept;
}

/* ---- refinement ---- */

size_t tvk_cg_work(size_t cols)
{
    return 3 * TVK_CG_ROWS * cols;
}

/* y [rows, cols] = x h */
static void times_gram(float *y, const float *x, const float *h, size_t rows,
                       size_t cols)
{
    if (rows == 0 || cols == 0)
        return;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, (blasint)rows,
                (blasint)cols, (blasint)cols, 1.0f, x, (blasint)cols, h,
                (blasint)cols, 0.0f, y, (blasint)cols);
}

static double dot(const float *a, const float *b, size_t n)
{
    double sum = 0;

    for (size_t i = 0; i < n; i++)
        sum += (double)a[i] * (double)b[i];
    return sum;
}

/* Sum of r[i]^2 / h_ii: the preconditioned norm of a residual. */
static double norm_by_diagonal(const float *r, const float *h, size_t cols)
{
    double sum = 0;

    for (size_t j = 0; j < cols; j++)
        sum += (double)r[j] * (double)r[j] / (double)h[j * cols + j];
    return sum;
}

void tvk_cg_rows(float *p, const float *t, const uint8_t *keep, const float *h,
                 size_t rows, size_t cols, unsigned n_steps, float *work)
{
    float *res = work; /* ((T - P) H) where kept */
    float *dir = res + TVK_CG_ROWS * cols;
    float *dir_h = dir + TVK_CG_ROWS * cols;
    double rz[TVK_CG_ROWS], first[TVK_CG_ROWS];

    assert(rows <= TVK_CG_ROWS && cols <= TVK_LAYER_COLS);
    openblas_set_num_threads(1);
    for (size_t i = 0; i < rows * cols; i++)
        dir[i] = t[i] - p[i];
    times_gram(res, dir, h, rows, cols);
    for (size_t r = 0; r < rows; r++) {
        for (size_t j = 0; j < cols; j++) {
            const size_t i = r * cols + j;

            res[i] = keep[i] ? res[i] : 0.0f;
            dir[i] = res[i] / h[j * cols + j];
        }
        first[r] = rz[r] = norm_by_diagonal(res + r * cols, h, cols);
    }
    for (unsigned step = 0; step < n_steps; step++) {
        times_gram(dir_h, dir, h, rows, cols);
        for (size_t r = 0; r < rows; r++) {
            float *pr = p + r * cols, *rr = res + r * cols;
            float *dr = dir + r * cols, *hr = dir_h + r * cols;
            const double curve = dot(dr, hr, cols);

            /* Below this the residual is rounding: a step could go up. */
            if (!(rz[r] > 1e-12 * first[r]) || !(curve > 0)) {
                memset(dr, 0, cols * sizeof *dr);
                rz[r] = 0;
                continue;
            }
            const double alpha = rz[r] / curve;
            for (size_t j = 0; j < cols; j++) {
                if (!keep[r * cols + j])
                    continue;
                pr[j] = (float)((double)pr[j] + alpha * (double)dr[j]);
                rr[j] = (float)((double)rr[j] - alpha * (double)hr[j]);
            }
            const double next = norm_by_diagonal(rr, h, cols);
            const double beta = next / rz[r];
            for (size_t j = 0; j < cols; j++)
                dr[j] = (float)((double)rr[j] / (double)h[j * cols + j] +
                                beta * (double)dr[j]);
            rz[r] = next;
        }
    }
}

void tvk_gram_product(const float *t, const float *p, const float *h,
                      size_t rows, size_t cols, double *tt, double *tp,
                      double *pp, float *work)
{
    float *th = work, *ph = work + TVK_CG_ROWS * cols;

    assert(rows <= TVK_CG_ROWS && cols <= TVK_LAYER_COLS);
    openblas_set_num_threads(1);
    times_gram(th, t, h, rows, cols);
    times_gram(ph, p, h, rows, cols);
    for (size_t r = 0; r < rows; r++) {
        const size_t at = r * cols;

        *tt += dot(t + at, th + at, cols);
        *tp += dot(th + at, p + at, cols);
        *pp += dot(p + at, ph + at, cols);
    }
}

#else

int tvk_layer_built(void)
{
    return 0;
}

#endif
