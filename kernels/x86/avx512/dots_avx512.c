/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dots_avx512.c - one leaf; the sixteen lanes are two fp64 vectors.
 *
 * The product of two fp32 numbers is exact in fp64 (48 bits), so the fused
 * multiply-add rounds exactly where the separate addition does. Absent lanes
 * add +0, which leaves an accumulator that started at +0 unchanged.
 */
#include "x86/x86_rows.h"
#include "avx512_util.h"

#include <assert.h>

static void dots(struct tvk_dots *out, const float *a, const float *b, size_t n)
{
    __m512d aa0 = _mm512_setzero_pd(), aa1 = aa0;
    __m512d bb0 = aa0, bb1 = aa0, ab0 = aa0, ab1 = aa0;
    size_t i = 0;

    assert(n <= TVK_LEAF);
    for (; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        const __m512d a0 = load8((__mmask8)lanes, a + i);
        const __m512d b0 = load8((__mmask8)lanes, b + i);
        aa0 = _mm512_fmadd_pd(a0, a0, aa0);
        bb0 = _mm512_fmadd_pd(b0, b0, bb0);
        ab0 = _mm512_fmadd_pd(a0, b0, ab0);
        if (lanes >> 8 == 0)
            continue;
        const __m512d a1 = load8((__mmask8)(lanes >> 8), a + i + 8);
        const __m512d b1 = load8((__mmask8)(lanes >> 8), b + i + 8);
        aa1 = _mm512_fmadd_pd(a1, a1, aa1);
        bb1 = _mm512_fmadd_pd(b1, b1, bb1);
        ab1 = _mm512_fmadd_pd(a1, b1, ab1);
    }
    out->aa = lanes_total(aa0, aa1);
    out->bb = lanes_total(bb0, bb1);
    out->ab = lanes_total(ab0, ab1);
}

static double abs_sum(const float *x, const float *b, const uint64_t *mask,
                      size_t n)
{
    const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
    __m512d lo = _mm512_setzero_pd(), hi = lo;

    assert(n <= TVK_LEAF);
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 lanes = lanes16(i, n);
        __m512 d = _mm512_maskz_loadu_ps(lanes, x + i);
        if (b != NULL)
            d = _mm512_sub_ps(d, _mm512_maskz_loadu_ps(lanes, b + i));
        if (mask != NULL)
            lanes = (__mmask16)(lanes & tvk_mask_16(mask, i));
        d = _mm512_castsi512_ps(
            _mm512_maskz_and_epi32(lanes, _mm512_castps_si512(d), no_sign));
        lo = _mm512_add_pd(lo, low8(d));
        hi = _mm512_add_pd(hi, high8(d));
    }
    return lanes_total(lo, hi);
}

static void abs_sums(double *all, double *kept, const float *x, const float *b,
                     const uint64_t *mask, size_t n)
{
    const __m512i no_sign = _mm512_set1_epi32(0x7fffffff);
    __m512d lo = _mm512_setzero_pd(), hi = lo, kept_lo = lo, kept_hi = lo;

    assert(n <= TVK_LEAF);
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        __m512 d = _mm512_maskz_loadu_ps(lanes, x + i);
        if (b != NULL)
            d = _mm512_sub_ps(d, _mm512_maskz_loadu_ps(lanes, b + i));
        const __mmask16 in =
            mask != NULL ? (__mmask16)(lanes & tvk_mask_16(mask, i)) : lanes;
        d = _mm512_castsi512_ps(
            _mm512_and_epi32(_mm512_castps_si512(d), no_sign));
        const __m512d l = low8(d);
        const __m512d h = high8(d);
        lo = _mm512_add_pd(lo, l);
        hi = _mm512_add_pd(hi, h);
        kept_lo = _mm512_mask_add_pd(kept_lo, (__mmask8)in, kept_lo, l);
        kept_hi = _mm512_mask_add_pd(kept_hi, (__mmask8)(in >> 8), kept_hi, h);
    }
    *all = lanes_total(lo, hi);
    *kept = lanes_total(kept_lo, kept_hi);
}

static double square_sum(const float *x, const float *b, const uint64_t *mask,
                         size_t n)
{
    __m512d lo = _mm512_setzero_pd(), hi = lo;

    assert(n <= TVK_LEAF);
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        __m512 d = _mm512_maskz_loadu_ps(lanes, x + i);
        if (b != NULL)
            d = _mm512_sub_ps(d, _mm512_maskz_loadu_ps(lanes, b + i));
        if (mask != NULL)
            d = _mm512_maskz_mov_ps(tvk_mask_16(mask, i), d);
        lo = _mm512_fmadd_pd(low8(d), low8(d), lo);
        hi = _mm512_fmadd_pd(high8(d), high8(d), hi);
    }
    return lanes_total(lo, hi);
}

void tvk_avx512_dots(struct tvk_table *t)
{
    t->abs_sums = abs_sums;
    t->square_sum = square_sum;
    t->dots = dots;
    t->abs_sum = abs_sum;
}
