/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dots_avx2.c - one leaf; the sixteen lanes are four fp64 vectors.
 *
 * Absent lanes add +0, which leaves an accumulator that started at +0
 * unchanged.
 */
#include "x86/x86_rows.h"
#include "avx2_util.h"

#include <assert.h>

TVK_INLINE __m256d add_product(__m256d sum, __m256d a, __m256d b)
{
    return _mm256_add_pd(sum, _mm256_mul_pd(a, b));
}

/* Elements of the four vectors that start at i + 4v, from 0 to 4. */
TVK_INLINE size_t left4(size_t i, size_t v, size_t n)
{
    const size_t at = i + 4 * v;
    return at >= n ? 0 : n - at < 4 ? n - at : 4;
}

static void dots(struct tvk_dots *out, const float *a, const float *b, size_t n)
{
    __m256d aa[4], bb[4], ab[4];
    size_t i = 0;

    assert(n <= TVK_LEAF);
    for (size_t v = 0; v < 4; v++)
        aa[v] = bb[v] = ab[v] = _mm256_setzero_pd();
    for (; i + 16 <= n; i += 16) {
        for (size_t v = 0; v < 4; v++) {
            const __m256d p = load4(4, a + i + 4 * v);
            const __m256d q = load4(4, b + i + 4 * v);
            aa[v] = add_product(aa[v], p, p);
            bb[v] = add_product(bb[v], q, q);
            ab[v] = add_product(ab[v], p, q);
        }
    }
    for (size_t v = 0; v < 4; v++) {
        const size_t count = left4(i, v, n);
        if (count == 0)
            break;
        const __m256d p = load4(count, a + i + 4 * v);
        const __m256d q = load4(count, b + i + 4 * v);
        aa[v] = add_product(aa[v], p, p);
        bb[v] = add_product(bb[v], q, q);
        ab[v] = add_product(ab[v], p, q);
    }
    out->aa = lanes_total(aa);
    out->bb = lanes_total(bb);
    out->ab = lanes_total(ab);
}

TVK_INLINE void add_abs(__m256d *sum, const float *x, const float *b,
                        unsigned kept, size_t count)
{
    const __m256 no_sign = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
    __m256 d = load8(count, x);

    if (b != NULL)
        d = _mm256_sub_ps(d, load8(count, b));
    d = _mm256_and_ps(d, no_sign);
    if (kept != 0xff)
        d = _mm256_and_ps(d, _mm256_castsi256_ps(spread8(kept)));
    sum[0] = _mm256_add_pd(sum[0], low4(d));
    sum[1] = _mm256_add_pd(sum[1], high4(d));
}

static double abs_sum(const float *x, const float *b, const uint64_t *mask,
                      size_t n)
{
    __m256d sum[4];

    assert(n <= TVK_LEAF);
    for (size_t v = 0; v < 4; v++)
        sum[v] = _mm256_setzero_pd();
    for (size_t i = 0; i < n; i += 8) {
        const size_t count = n - i < 8 ? n - i : 8;
        const unsigned kept = mask != NULL ? tvk_mask_8(mask, i) : 0xff;
        add_abs(sum + (i & 8) / 4, x + i, b != NULL ? b + i : NULL, kept,
                count);
    }
    return lanes_total(sum);
}

static void abs_sums(double *all, double *kept, const float *x, const float *b,
                     const uint64_t *mask, size_t n)
{
    *all = abs_sum(x, b, NULL, n);
    *kept = abs_sum(x, b, mask, n);
}

static double square_sum(const float *x, const float *b, const uint64_t *mask,
                         size_t n)
{
    __m256d sum[4];

    assert(n <= TVK_LEAF);
    for (size_t v = 0; v < 4; v++)
        sum[v] = _mm256_setzero_pd();
    for (size_t i = 0; i < n; i += 8) {
        const size_t count = n - i < 8 ? n - i : 8;
        __m256 d = load8(count, x + i);
        if (b != NULL)
            d = _mm256_sub_ps(d, load8(count, b + i));
        if (mask != NULL)
            d = _mm256_and_ps(
                d, _mm256_castsi256_ps(spread8(tvk_mask_8(mask, i))));
        __m256d *const s = sum + (i & 8) / 4;
        s[0] = add_product(s[0], low4(d), low4(d));
        s[1] = add_product(s[1], high4(d), high4(d));
    }
    return lanes_total(sum);
}

void tvk_avx2_dots(struct tvk_table *t)
{
    t->abs_sums = abs_sums;
    t->square_sum = square_sum;
    t->dots = dots;
    t->abs_sum = abs_sum;
}
