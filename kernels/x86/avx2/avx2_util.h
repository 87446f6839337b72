/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avx2_util.h - loads, stores and reductions shared by the AVX2 row.
 *
 * AVX2 has masked moves of 32-bit elements: tails use the same arithmetic as
 * whole vectors; absent lanes are neither read nor written, and read as 0.
 * 16-bit tails go through a small buffer.
 */
#ifndef TVK_AVX2_UTIL_H
#define TVK_AVX2_UTIL_H

#include <immintrin.h>

#include "tv/kernels.h"
#include "ref/lanes.h"
#include "x86/x86_util.h"

#define TVK_BITS_4(i)                                                          \
    UINT64_C(1) << (i), UINT64_C(2) << (i), UINT64_C(4) << (i),                \
        UINT64_C(8) << (i)

static const uint64_t tvk_bit[64] = {
    TVK_BITS_4(0),  TVK_BITS_4(4),  TVK_BITS_4(8),  TVK_BITS_4(12),
    TVK_BITS_4(16), TVK_BITS_4(20), TVK_BITS_4(24), TVK_BITS_4(28),
    TVK_BITS_4(32), TVK_BITS_4(36), TVK_BITS_4(40), TVK_BITS_4(44),
    TVK_BITS_4(48), TVK_BITS_4(52), TVK_BITS_4(56), TVK_BITS_4(60)};

/* The first `count` of 4 or 8 lanes, as 32-bit masks. */
TVK_INLINE __m128i first4(size_t count)
{
    return _mm_cmpgt_epi32(_mm_set1_epi32(count < 4 ? (int)count : 4),
                           _mm_setr_epi32(0, 1, 2, 3));
}

TVK_INLINE __m256i first8(size_t count)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count < 8 ? (int)count : 8),
                              _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/* Up to 4 elements as fp64; `count` of at least 4 takes the plain load. */
TVK_INLINE __m256d load4(size_t count, const float *p)
{
    if (count >= 4)
        return _mm256_cvtps_pd(_mm_loadu_ps(p));
    return _mm256_cvtps_pd(_mm_maskload_ps(p, first4(count)));
}

TVK_INLINE void store4(float *p, size_t count, __m128 v)
{
    if (count >= 4)
        _mm_storeu_ps(p, v);
    else
        _mm_maskstore_ps(p, first4(count), v);
}

TVK_INLINE __m256 load8(size_t count, const float *p)
{
    if (count >= 8)
        return _mm256_loadu_ps(p);
    return _mm256_maskload_ps(p, first8(count));
}

TVK_INLINE void store8(float *p, size_t count, __m256 v)
{
    if (count >= 8)
        _mm256_storeu_ps(p, v);
    else
        _mm256_maskstore_ps(p, first8(count), v);
}

TVK_INLINE __m256d low4(__m256 v)
{
    return _mm256_cvtps_pd(_mm256_castps256_ps128(v));
}

TVK_INLINE __m256d high4(__m256 v)
{
    return _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1));
}

/* One bit per lane. */
TVK_INLINE unsigned bits8(__m256i lane_mask)
{
    return (unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(lane_mask));
}

/* The other way round, from the low 8 bits. */
TVK_INLINE __m256i spread8(unsigned bits)
{
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32((int)bits);
    return _mm256_cmpeq_epi32(_mm256_and_si256(all, bit), bit);
}

/* 64-bit lane masks of elements i .. i+3; i is a multiple of 4. Both operands
 * come from memory as they are: moving bits of a register to all lanes takes
 * the shuffles that conversions need. */
TVK_INLINE __m256d kept4(const uint64_t *mask, size_t i)
{
    const __m256i bit =
        _mm256_loadu_si256((const __m256i *)(const void *)&tvk_bit[i & 60]);
    const __m256i all = _mm256_set1_epi64x((long long)mask[i >> 6]);
    return _mm256_castsi256_pd(
        _mm256_cmpeq_epi64(_mm256_and_si256(all, bit), bit));
}

/* 64-bit lane masks as 32-bit ones. */
TVK_INLINE __m128 narrow4(__m256d lane_mask)
{
    const __m256i even =
        _mm256_permutevar8x32_epi32(_mm256_castpd_si256(lane_mask),
                                    _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6));
    return _mm_castsi128_ps(_mm256_castsi256_si128(even));
}

TVK_INLINE __m256i magnitude_of(__m256 v)
{
    const __m256i m =
        _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
    return _mm256_min_epu32(m, _mm256_set1_epi32(0x7f800001));
}

/* m(i) of kernels.h, b may be NULL. Absent lanes give 0. */
TVK_INLINE __m256i magnitude8(size_t count, const float *x, const float *b)
{
    const __m256 v = load8(count, x);
    return magnitude_of(b != NULL ? _mm256_sub_ps(v, load8(count, b)) : v);
}

/* Up to 8 elements of 16 bits. */
TVK_INLINE __m128i load_half(size_t count, const void *src, size_t i)
{
    const unsigned char *const p = (const unsigned char *)src + 2 * i;
    __m128i v = _mm_setzero_si128();

    if (count >= 8)
        return _mm_loadu_si128((const __m128i *)(const void *)p);
    memcpy(&v, p, 2 * count);
    return v;
}

/* Of bf16; a signalling NaN stays one. */
TVK_INLINE __m256 load8_bf16(size_t count, const void *src, size_t i)
{
    return _mm256_castsi256_ps(
        _mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half(count, src, i)), 16));
}

/* Sum of sixteen lanes, four per vector, in the fixed order. */
static inline double lanes_total(const __m256d *v)
{
    double lane[TVK_LANES];
    for (unsigned i = 0; i < 4; i++)
        _mm256_storeu_pd(lane + 4 * i, v[i]);
    return tvk_lanes_sum(lane);
}

#endif
