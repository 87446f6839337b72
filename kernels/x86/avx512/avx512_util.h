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

/* Are they all there, known when this is compiled? */
TVK_INLINE int all16(__mmask16 lanes)
{
    return __builtin_constant_p(lanes) && lanes == 0xffff;
}

TVK_INLINE __m512 load16(__mmask16 lanes, const float *p)
{
    return all16(lanes) ? _mm512_loadu_ps(p) : _mm512_maskz_loadu_ps(lanes, p);
}

/* Of bf16; a signalling NaN stays one. */
TVK_INLINE __m512 load16_bf16(__mmask16 lanes, const void *p)
{
    const __m256i h = all16(lanes) ? _mm256_loadu_si256((const __m256i *)p)
                                   : _mm256_maskz_loadu_epi16(lanes, p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

TVK_INLINE __m256i load_half(__mmask16 lanes, const void *src, size_t i)
{
    return _mm256_maskz_loadu_epi16(lanes, (const unsigned char *)src + 2 * i);
}

TVK_INLINE void store_half(void *dst, size_t i, __mmask16 lanes, __m256i v)
{
    _mm256_mask_storeu_epi16((unsigned char *)dst + 2 * i, lanes, v);
}

/* How many of 16 have an exponent of ones. */
TVK_INLINE unsigned nonfinite_half(__m256i h, short inf)
{
    const __m256i exponent = _mm256_set1_epi16(inf);
    return tvk_popcount(
        _mm256_cmpeq_epi16_mask(_mm256_and_si256(h, exponent), exponent));
}

/* fp32 whose upper halves are the bf16 that v rounds to. */
TVK_INLINE __m512i round_bf16(__m512 v)
{
    const __m512i u = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(u, _mm512_set1_epi32(0x10000));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i up = _mm512_add_epi32(u, _mm512_set1_epi32(0x7fff));
    const __m512i r = _mm512_mask_add_epi32(up, odd, up, _mm512_set1_epi32(1));
    return _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x00400000));
}

/* table.f32_to_bf16 */
TVK_INLINE uint64_t narrow_bf16(void *dst, const float *src, size_t n)
{
    const __m512i from = _mm512_castsi256_si512(_mm256_setr_epi16(
        1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
    uint64_t bad = 0;
    size_t i = 0;

    /* One shuffle where a shift and a narrowing would take three. */
    for (; i + 16 <= n; i += 16) {
        const __m512i r = round_bf16(_mm512_loadu_ps(src + i));
        const __m256i h =
            _mm512_castsi512_si256(_mm512_permutexvar_epi16(from, r));
        _mm256_storeu_si256((__m256i *)(void *)((unsigned char *)dst + 2 * i),
                            h);
        bad += nonfinite_half(h, 0x7f80);
    }
    if (i < n) {
        const __mmask16 lanes = lanes16(i, n);
        const __m512i r = round_bf16(_mm512_maskz_loadu_ps(lanes, src + i));
        const __m256i h = _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
        store_half(dst, i, lanes, h);
        bad += nonfinite_half(h, 0x7f80);
    }
    return bad;
}

TVK_INLINE __m512i magnitude_of(__m512 v)
{
    const __m512i m =
        _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
    return _mm512_min_epu32(m, _mm512_set1_epi32(0x7f800001));
}

/* m(i) of kernels.h, b may be NULL. Absent lanes give 0. */
TVK_INLINE __m512i magnitude16(__mmask16 lanes, const float *x, const float *b)
{
    const __m512 v = load16(lanes, x);
    return magnitude_of(b != NULL ? _mm512_sub_ps(v, load16(lanes, b)) : v);
}

/* The same of bf16. */
TVK_INLINE __m512i magnitude16_bf16(__mmask16 lanes, const void *x,
                                    const void *b)
{
    return magnitude_of(
        _mm512_sub_ps(load16_bf16(lanes, x), load16_bf16(lanes, b)));
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
