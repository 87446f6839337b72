/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lowrank_avx512.c - adds a low-rank product, vectorised over columns.
 *
 * A strip of 64 columns keeps eight fp64 accumulators per row in registers over
 * all k. Where the range holds two whole rows they share the loads and
 * conversions of R, which is half of the work. Products of two fp32
 * numbers are exact in fp64, so the fused multiply-add rounds exactly where
 * the separate addition does.
 */
#include "x86/x86_rows.h"
#include "avx512_util.h"

#define STRIP 8u /* vectors */
#define ROWS  2u

/* One strip of `rows` rows and `vectors` vectors, the last cut to `lanes`. */
TVK_INLINE void add_strip(float *TVK_RESTRICT y, const float *TVK_RESTRICT l,
                          const float *TVK_RESTRICT r, double scale,
                          size_t rank, size_t cols, size_t rows, size_t vectors,
                          __mmask8 lanes)
{
    __m512d sum[ROWS][STRIP];
    const __m512d s = _mm512_set1_pd(scale);

    for (size_t q = 0; q < rows; q++)
        for (size_t v = 0; v < vectors; v++)
            sum[q][v] = _mm512_setzero_pd();
    for (size_t k = 0; k < rank; k++) {
        __m512d lk[ROWS];
        for (size_t q = 0; q < rows; q++)
            lk[q] = _mm512_set1_pd((double)l[q * rank + k]);
        for (size_t v = 0; v < vectors; v++) {
            const __m512d rv = load8(lanes, r + k * cols + 8 * v);
            for (size_t q = 0; q < rows; q++)
                sum[q][v] = _mm512_fmadd_pd(lk[q], rv, sum[q][v]);
        }
    }
    for (size_t q = 0; q < rows; q++) {
        for (size_t v = 0; v < vectors; v++) {
            float *const at = y + q * cols + 8 * v;
            const __m512d sv = _mm512_mul_pd(s, sum[q][v]);
            const __m512d out = _mm512_add_pd(load8(lanes, at), sv);
            _mm256_mask_storeu_ps(at, lanes, _mm512_cvtpd_ps(out));
        }
    }
}

/* `width` columns of `rows` rows. */
TVK_INLINE void add_rows(float *TVK_RESTRICT y, const float *TVK_RESTRICT l,
                         const float *TVK_RESTRICT r, double scale, size_t rank,
                         size_t cols, size_t rows, size_t width)
{
    size_t c = 0;

    for (; c + 8 * STRIP <= width; c += 8 * STRIP)
        add_strip(y + c, l, r + c, scale, rank, cols, rows, STRIP, 0xff);
    for (; c + 16 <= width; c += 16)
        add_strip(y + c, l, r + c, scale, rank, cols, rows, 2, 0xff);
    for (; c < width; c += 8)
        add_strip(y + c, l, r + c, scale, rank, cols, rows, 1,
                  lanes8(c, width));
}

static void lowrank_add(float *TVK_RESTRICT y, const float *TVK_RESTRICT l,
                        const float *TVK_RESTRICT r, double scale, size_t rank,
                        uint64_t cols, uint64_t start, size_t n)
{
    const size_t stride = (size_t)cols;

    if (n == 0)
        return;
    size_t row = (size_t)(start / cols);
    size_t col = (size_t)(start % cols);
    while (n > 0) {
        const float *const lr = l + row * rank;
        size_t width = n < stride - col ? n : stride - col;
        size_t rows = 1;
        if (col == 0 && n / ROWS >= stride) {
            rows = ROWS;
            add_rows(y, lr, r, scale, rank, stride, ROWS, stride);
        } else {
            add_rows(y, lr, r + col, scale, rank, stride, 1, width);
        }
        width *= rows;
        y += width;
        n -= width;
        row += rows;
        col = 0;
    }
}

void tvk_avx512_lowrank(struct tvk_table *t)
{
    t->lowrank_add = lowrank_add;
}
