/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gram_factor.c - U with U^T U = H^-1 (tv/layer.h).
 *
 * U without inverting H: the index reversal J H J = L L^T, so H = R R^T with
 * R = J L J upper, and U = R^-1 = J L^-1 J: one potrf and one trtri.
 *
 * potrf is where precision is lost: in fp32 U^T U would be off H^-1 by some
 * 1e-8 of the condition number. So it is done in fp64, in the same memory:
 * half of H becomes fp64 in LAPACK's rectangular full packed form (Gustavson et
 * al., ACM TOMS 37(2), 2010), half of a square of twice the width. R is rounded
 * to fp32 and inverted in that, unless H is so nearly singular that this would
 * show; then trtri is in fp64 too.
 *
 *        k columns                 m = 2k rows of H, n or n + 1 (then the last
 *      +----------+                is one by itself)
 *      | 33 43 53 |  m = 6: the    element (i, j), i >= j, of J H J is
 *      | 00 44 54 |  digits are      j <  k: row i + 1, column j
 *      | 10 11 55 |  those of        j >= k: row j - k, column i - k
 *      | 20 21 22 |  J H J
 *      | 30 31 32 |                so of H: row r, column c >= r, are
 *      | 40 41 42 |                  c >= k: row m - r, column m - 1 - c
 *      | 50 51 52 |                  c <  k: row k - 1 - c, column k - 1 - r
 *      +----------+
 *
 * The way there and back moves floats inside the square:
 *
 *      +---+---+   A  rows below k
 *      | A |   |   B  k x k, column c of U stands in row c
 *      +---+---+   C  triangle; D its rest
 *      | B |C\D|
 *      +---+---+
 *
 * There: C and B go straight to their columns, A waits in D meanwhile. Back:
 * the same the other way round.
 */
#include "tv/layer.h"

#ifdef TVK_HAVE_OPENBLAS

#include <assert.h>
#include <math.h>
#include <string.h>

#include <cblas.h>

void strtri_(const char *uplo, const char *diag, const blasint *n, float *a,
             const blasint *lda, blasint *info);
void dpftrf_(const char *transr, const char *uplo, const blasint *n, double *a,
             blasint *info);
void dtftri_(const char *transr, const char *uplo, const char *diag,
             const blasint *n, double *a, blasint *info);

/* Below, all is in fp64: there is no time to save. */
#define SMALL      512u
#define TILE       32u
/* H_jj over the square of R's pivot: how much of an input is not what others
 * say already. At 1e3 an inverse in fp32 leaves about 5e-6. */
#define NEARLY_ALL 400.0

size_t tvk_gram_floats(size_t cols)
{
    const size_t m = cols + cols % 2;

    return m * m + m;
}

size_t tvk_gram_work(size_t cols)
{
    return cols + cols % 2; /* the diagonal */
}

/* The diagonal lies at d, `step` apart. */
static double damp(float *d, size_t step, size_t cols, double damping)
{
    double sum = 0;
    size_t n_live = 0;

    for (size_t j = 0; j < cols; j++)
        if (d[j * step] > 0) {
            sum += (double)d[j * step];
            n_live++;
        }
    const double mean = n_live > 0 ? sum / (double)n_live : 1.0;
    const double amount = damping * mean;
    for (size_t j = 0; j < cols; j++) {
        const double live = d[j * step] <= 0 ? mean : (double)d[j * step];

        d[j * step] = (float)(live + amount);
    }
    return amount;
}

double tvk_gram_damp(float *h, size_t cols, double damping)
{
    return damp(h, cols + 1, cols, damping);
}

double tvk_diagonal_damp(float *diagonal, size_t cols, double damping)
{
    return damp(diagonal, 1, cols, damping);
}

/* ---- packing ------------------------------------------------------------- */

/* Rows of n to rows of m = n + 1, with a 1 by itself at the end. */
static void widen_rows(float *h, size_t n)
{
    const size_t m = n + 1;

    for (size_t i = n; i-- > 0;)
        memmove(h + i * m, h + i * n, n * sizeof *h);
    memset(h + n * m, 0, m * sizeof *h);
    h[n * m + n] = 1;
}

/* What is below the diagonal of h [m, m], and diag, to packed fp64 there. */
static void pack(float *h, const float *diag, size_t m)
{
    const size_t k = m / 2;
    const size_t n_packed = m / 2 * (m + 1);
    float *const first = h + m * m; /* row k, which F runs into */

    for (size_t c = 1; c < k; c++)
        memcpy(h + (m - 1 - c) * m + (m - c), h + c * m, c * sizeof *h);
    memcpy(first, h + k * m, k * sizeof *h);
    for (size_t c = m; c-- > k;) {
        const float *const row = c == k ? first : h + c * m;
        float *const to = h + (m - 1 - c) * (m + 1);

        for (size_t r = 0; r < c; r++)
            to[m - r] = row[r];
        to[m - c] = diag[c];
    }
    for (size_t r = 0; r < k; r++) {
        float *const to = h + (k - 1 - r) * (m + 1);

        to[k - 1 - r] = diag[r];
        for (size_t c = r + 1; c < k; c++)
            to[k - 1 - c] = h[(m - 1 - c) * m + (m - c) + r];
    }
    float *const from = h + n_packed;
    memmove(from, h, n_packed * sizeof *h);
    for (size_t i = 0; i < n_packed; i++) {
        const double wide = (double)from[i];

        memcpy(h + 2 * i, &wide, sizeof wide);
    }
}

/* Packed fp64 R or U to rows of n in the upper triangle, 0 below. */
static void unpack(float *h, size_t m, size_t n)
{
    const size_t k = m / 2;
    const size_t n_packed = m / 2 * (m + 1);
    float *const first = h + m * m;
    float *const diag = first + k; /* of A */

    for (size_t i = 0; i < n_packed; i++) {
        double wide;

        memcpy(&wide, h + 2 * i, sizeof wide);
        h[i] = (float)wide;
    }
    /* C: rows and columns behind k, in tiles, as one of both is far apart. */
    for (size_t r0 = k; r0 < m; r0 += TILE)
        for (size_t c0 = r0; c0 < m; c0 += TILE)
            for (size_t c = c0; c < m && c < c0 + TILE; c++) {
                const float *const from = h + (m - 1 - c) * (m + 1);

                for (size_t r = r0; r < r0 + TILE && r <= c; r++)
                    h[r * m + c] = from[m - r];
            }
    /* B: column k of U is where F ends; it comes last. */
    for (size_t r = 0; r < k; r++)
        first[r] = h[(m - r) + (m - 1 - k) * (m + 1)];
    for (size_t c = k + 1; c < m; c++)
        for (size_t r = 0; r < k; r++)
            h[c * m + r] = h[(m - r) + (m - 1 - c) * (m + 1)];
    /* A: into what is free of rows behind k. */
    for (size_t r = 0; r < k; r++) {
        const float *const row = h + (k - 1 - r) * (m + 1);

        diag[r] = row[k - 1 - r];
        for (size_t c = r + 1; c < k; c++)
            h[(m - 1 - r) * m + k + (c - r - 1)] = row[k - 1 - c];
    }
    for (size_t r = 0; r < k; r++) {
        float *const row = h + r * m;

        memset(row, 0, r * sizeof *row);
        row[r] = diag[r];
        memcpy(row + r + 1, h + (m - 1 - r) * m + k, (k - 1 - r) * sizeof *row);
        row[k] = first[r];
    }
    for (size_t r0 = 0; r0 < k; r0 += TILE)
        for (size_t c0 = k + 1; c0 < m; c0 += TILE)
            for (size_t r = r0; r < k && r < r0 + TILE; r++)
                for (size_t c = c0; c < m && c < c0 + TILE; c++)
                    h[r * m + c] = h[c * m + r];
    for (size_t r = k; r < m; r++)
        memset(h + r * m, 0, r * sizeof *h);
    for (size_t r = 1; r < n && n < m; r++)
        memmove(h + r * n, h + r * m, n * sizeof *h);
}

/* ---- factors ------------------------------------------------------------- */

static int is_nearly_singular(const double *packed, const float *diag, size_t m)
{
    const size_t k = m / 2;

    for (size_t j = 0; j < m; j++) {
        const size_t at = j < k ? (k - 1 - j) + (k - 1 - j) * (m + 1)
                                : (m - j) + (m - 1 - j) * (m + 1);
        const double pivot = packed[at] * packed[at];

        if (!(NEARLY_ALL * pivot > (double)diag[j]))
            return 1;
    }
    return 0;
}

static int factor(float *h, const float *diag, size_t n)
{
    const size_t m = n + n % 2;
    const blasint order = (blasint)m, rows = (blasint)n;
    double *const packed = (double *)(void *)h;
    blasint info = 0;

    if (m > n)
        widen_rows(h, n);
    pack(h, diag, m);
    dpftrf_("N", "L", &order, packed, &info);
    if (info != 0)
        return -1;
    if (n < SMALL || is_nearly_singular(packed, diag, m)) {
        dtftri_("N", "L", "N", &order, packed, &info);
        unpack(h, m, n);
    } else {
        unpack(h, m, n);
        /* LAPACK's lower triangle by columns is ours, upper, by rows. */
        strtri_("L", "N", &rows, h, &rows, &info);
    }
    return info == 0 ? 0 : -1;
}

int tvk_gram_factor(float *h, size_t cols, float *work)
{
    assert(cols <= TVK_LAYER_COLS);
    if (cols == 0)
        return 0;
    openblas_set_num_threads(1);
    for (size_t i = 0; i < cols; i++) {
        work[i] = h[i * cols + i];
        if (!isfinite(work[i]))
            return -1;
    }
    if (cols % 2)
        work[cols] = 1; /* of the row that makes it even */
    if (factor(h, work, cols) != 0)
        return -1;
    /* potrf lets a NaN through; it always reaches the diagonal. */
    for (size_t i = 0; i < cols; i++)
        if (!isfinite(h[i * cols + i]) || h[i * cols + i] <= 0)
            return -1;
    return 0;
}

#endif
