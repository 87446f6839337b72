/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lowrank_avx2.c - adds a low-rank product, vectorised over columns.
 *
 * A strip of 32 columns keeps eight fp64 accumulators in registers over all k,
 * so that each L[r,k] is broadcast once per strip.
 */
#include "x86/x86_rows.h"
#include "avx2_util.h"

#define STRIP 8u /* vectors */

/* One strip; its last vector has `last` columns. */
TVK_INLINE void add_strip(float *TVK_RESTRICT y, const float *TVK_RESTRICT l,
                          const float *TVK_RESTRICT r, double scale,
                          size_t rank, size_t cols, size_t vectors, size_t last)
{
    __m256d sum[STRIP];
    const __m256d s = _mm256_set1_pd(scale);

    for (size_t v = 0; v < vectors; v++)
        sum[v] = _mm256_setzero_pd();
    for (size_t k = 0; k < rank; k++) {
        const __m256d lk = _mm256_set1_pd((double)l[k]);
        for (size_t v = 0; v < vectors; v++) {
            const size_t count = v + 1 < vectors ? 4 : last;
            const __m256d rv = load4(count, r + k * cols + 4 * v);
            sum[v] = _mm256_add_pd(sum[v], _mm256_mul_pd(lk, rv));
        }
    }
    for (size_t v = 0; v < vectors; v++) {
        const size_t count = v + 1 < vectors ? 4 : last;
        const __m256d sv = _mm256_mul_pd(s, sum[v]);
        const __m256d out = _mm256_add_pd(load4(count, y + 4 * v), sv);
        store4(y + 4 * v, count, _mm256_cvtpd_ps(out));
    }
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
        const size_t width = n < stride - col ? n : stride - col;
        const float *const lr = l + row * rank;
        size_t c = 0;
        for (; c + 4 * STRIP <= width; c += 4 * STRIP)
            add_strip(y + c, lr, r + col + c, scale, rank, stride, STRIP, 4);
        for (; c + 8 <= width; c += 8)
            add_strip(y + c, lr, r + col + c, scale, rank, stride, 2, 4);
        for (; c < width; c += 4)
            add_strip(y + c, lr, r + col + c, scale, rank, stride, 1,
                      width - c < 4 ? width - c : 4);
        y += width;
        n -= width;
        row++;
        col = 0;
    }
}

void tvk_avx2_lowrank(struct tvk_table *t)
{
    t->lowrank_add = lowrank_add;
}
