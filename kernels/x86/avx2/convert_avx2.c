/* SPDX-License-Identifier: Apache-2.0 */
/*
 * convert_avx2.c - 16-bit conversions, 8 elements at a time.
 *
 * f16 uses the F16C instructions, bf16 integer arithmetic as in ref/convert.c.
 */
#include "x86/x86_rows.h"
#include "avx2_util.h"

TVK_INLINE __m128i load_half(size_t count, const void *src, size_t i)
{
    const unsigned char *const p = (const unsigned char *)src + 2 * i;
    __m128i v = _mm_setzero_si128();

    if (count >= 8)
        return _mm_loadu_si128((const __m128i *)(const void *)p);
    memcpy(&v, p, 2 * count);
    return v;
}

TVK_INLINE void store_half(void *dst, size_t i, size_t count, __m128i v)
{
    unsigned char *const p = (unsigned char *)dst + 2 * i;

    if (count >= 8)
        _mm_storeu_si128((__m128i *)(void *)p, v);
    else
        memcpy(p, &v, 2 * count);
}

TVK_INLINE __m256 widen_bf16(__m128i h)
{
    const __m256 v =
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 quiet = _mm256_castsi256_ps(_mm256_set1_epi32(0x00400000));
    return _mm256_or_ps(v, _mm256_and_ps(nan, quiet));
}

TVK_INLINE __m128i narrow_bf16(__m256 v)
{
    const __m256i u = _mm256_castps_si256(v);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i odd =
        _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x00400000));
    const __m256i r =
        _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    /* Values fit 16 bits, so the saturation of the pack never acts. */
    return _mm_packus_epi32(_mm256_castsi256_si128(r),
                            _mm256_extracti128_si256(r, 1));
}

static void bf16_to_f32(float *TVK_RESTRICT dst, const void *TVK_RESTRICT src,
                        size_t n)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        store8(dst + i, 8, widen_bf16(load_half(8, src, i)));
    if (i < n)
        store8(dst + i, n - i, widen_bf16(load_half(n - i, src, i)));
}

static void f16_to_f32(float *TVK_RESTRICT dst, const void *TVK_RESTRICT src,
                       size_t n)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        store8(dst + i, 8, _mm256_cvtph_ps(load_half(8, src, i)));
    if (i < n)
        store8(dst + i, n - i, _mm256_cvtph_ps(load_half(n - i, src, i)));
}

static void f32_to_bf16(void *TVK_RESTRICT dst, const float *TVK_RESTRICT src,
                        size_t n)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        store_half(dst, i, 8, narrow_bf16(load8(8, src + i)));
    if (i < n)
        store_half(dst, i, n - i, narrow_bf16(load8(n - i, src + i)));
}

static void f32_to_f16(void *TVK_RESTRICT dst, const float *TVK_RESTRICT src,
                       size_t n)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        store_half(
            dst, i, 8,
            _mm256_cvtps_ph(load8(8, src + i), _MM_FROUND_TO_NEAREST_INT));
    if (i < n)
        store_half(
            dst, i, n - i,
            _mm256_cvtps_ph(load8(n - i, src + i), _MM_FROUND_TO_NEAREST_INT));
}

void tvk_avx2_convert(struct tvk_table *t)
{
    t->bf16_to_f32 = bf16_to_f32;
    t->f16_to_f32 = f16_to_f32;
    t->f32_to_bf16 = f32_to_bf16;
    t->f32_to_f16 = f32_to_f16;
}
