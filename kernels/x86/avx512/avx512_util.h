/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avx512_util.h - loads, stores and reductions shared by the AVX-512 row.
 *
 * Tails are masked: lanes past n are neither read nor written, and read as 0.
 */
#ifndef TVK_AVX512_UTIL_H
#define TVK_AVX512_UTIL_H

#include <immintrin.h>

#include "tv/kernels.h"
#include "ref/lanes.h"
#include "x86/x86_util.h"

/* Lanes of element i and on, at most 8 or 16. */
TVK_INLINE __mmask8 lanes8(size_t i, size_t n)
{
    return (__mmask8)(n - i >= 8 ? 0xffu : (1u << (n - i)) - 1u);
}

TVK_INLINE __mmask16 lanes16(size_t i, size_t n)
{
    return (__mmask16)(n - i >= 16 ? 0xffffu : (1u << (n - i)) - 1u);
}

/* A plain load folds into the conversion and saves a shuffle. */
TVK_INLINE __m512d load8(__mmask8 lanes, const float *p)
{
    if (__builtin_constant_p(lanes) && lanes == 0xff)
        return _mm512_cvtps_pd(_mm256_loadu_ps(p));
    return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(lanes, p));
}

TVK_INLINE __m512d low8(__m512 v)
{
    return _mm512_cvtps_pd(_mm512_castps512_ps256(v));
}

TVK_INLINE __m512d high8(__m512 v)
{
    return _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1));
}

/* m(i) of kernels.h, b may be NULL. Absent lanes give 0. */
TVK_INLINE __m512i magnitude16(__mmask16 lanes, const float *x, const float *b)
{
    __m512 v = _mm512_maskz_loadu_ps(lanes, x);
    if (b != NULL)
        v = _mm512_sub_ps(v, _mm512_maskz_loadu_ps(lanes, b));
    const __m512i m =
        _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    return _mm512_min_epu32(m, _mm512_set1_epi32(0x7f800001));
}

/* Sum of lanes 0..7 in lo and 8..15 in hi, in the fixed order. */
static inline double lanes_total(__m512d lo, __m512d hi)
{
    double lane[TVK_LANES];
    _mm512_storeu_pd(lane, lo);
    _mm512_storeu_pd(lane + 8, hi);
    return tvk_lanes_sum(lane);
}

#endif
