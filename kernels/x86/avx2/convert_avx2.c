/* SPDX-License-Identifier: Apache-2.0 */
/*
 * convert_avx2.c - 16-bit conversions, 8 elements at a time.
 *
 * f16 uses the F16C instructions, bf16 integer arithmetic as in ref/convert.c.
 */
#include "x86/x86_rows.h"
#include "avx2_util.h"

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

/* Elements of 16 bits whose exponent is all ones, as lane masks. */
TVK_INLINE __m256i nonfinite_half(__m256i h, short inf)
{
    const __m256i exponent = _mm256_set1_epi16(inf);
    return _mm256_cmpeq_epi16(_mm256_and_si256(h, exponent), exponent);
}

/* How many of 8 such elements. */
TVK_INLINE uint64_t count_half(__m128i h, short inf)
{
    const __m256i bad = nonfinite_half(_mm256_zextsi128_si256(h), inf);
    return tvk_popcount((unsigned)_mm256_movemask_epi8(bad)) / 2u;
}

TVK_INLINE __m256i load_halves(const void *src, size_t i)
{
    return _mm256_loadu_si256(
        (const __m256i *)(const void *)((const unsigned char *)src + 2 * i));
}

/* bf16 without a NaN among them, which would have to become quiet. */
TVK_INLINE void widen_numbers(float *dst, __m256i h)
{
    store8(dst, 8,
           _mm256_castsi256_ps(_mm256_slli_epi32(
               _mm256_cvtepu16_epi32(_mm256_castsi256_si128(h)), 16)));
    store8(dst + 8, 8,
           _mm256_castsi256_ps(_mm256_slli_epi32(
               _mm256_cvtepu16_epi32(_mm256_extracti128_si256(h, 1)), 16)));
}

TVK_INLINE uint64_t widen_any(float *dst, const void *src, size_t i, size_t n)
{
    uint64_t bad = 0;

    for (; i < n; i += 8) {
        const size_t count = n - i < 8 ? n - i : 8;
        const __m128i h = load_half(count, src, i);
        store8(dst + i, count, widen_bf16(h));
        bad += count_half(h, 0x7f80);
    }
    return bad;
}

static uint64_t bf16_to_f32(float *TVK_RESTRICT dst,
                            const void *TVK_RESTRICT src, size_t n)
{
    uint64_t bad = 0;
    size_t i = 0;

    for (; i + 32 <= n; i += 32) {
        const __m256i h = load_halves(src, i);
        const __m256i g = load_halves(src, i + 16);
        tvk_read_ahead((const unsigned char *)src + 2 * i);
        const __m256i any = _mm256_or_si256(nonfinite_half(h, 0x7f80),
                                            nonfinite_half(g, 0x7f80));
        if (!_mm256_testz_si256(any, any)) {
            bad += widen_any(dst, src, i, i + 32);
            continue;
        }
        widen_numbers(dst + i, h);
        widen_numbers(dst + i + 16, g);
    }
    return bad + widen_any(dst, src, i, n);
}

static uint64_t f16_to_f32(float *TVK_RESTRICT dst,
                           const void *TVK_RESTRICT src, size_t n)
{
    uint64_t bad = 0;

    for (size_t i = 0; i < n; i += 8) {
        const size_t count = n - i < 8 ? n - i : 8;
        const __m128i h = load_half(count, src, i);
        tvk_read_ahead((const unsigned char *)src + 2 * i);
        tvk_read_ahead(dst + i);
        store8(dst + i, count, _mm256_cvtph_ps(h));
        bad += count_half(h, 0x7c00);
    }
    return bad;
}

TVK_INLINE uint64_t narrow_any(void *dst, const float *src, size_t i, size_t n)
{
    uint64_t bad = 0;

    for (; i < n; i += 8) {
        const size_t count = n - i < 8 ? n - i : 8;
        const __m128i h = narrow_bf16(load8(count, src + i));
        store_half(dst, i, count, h);
        bad += count_half(h, 0x7f80);
    }
    return bad;
}

/* Rounded to bf16 in the upper half of each lane, which holds no NaN. */
TVK_INLINE __m256i round_number(__m256i u)
{
    const __m256i odd =
        _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(
        _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))),
        16);
}

/* Lanes that become infinite or are not finite before. */
TVK_INLINE __m256i over_bf16(__m256i u)
{
    const __m256i m = _mm256_and_si256(u, _mm256_set1_epi32(0x7fffffff));
    return _mm256_cmpgt_epi32(m, _mm256_set1_epi32(0x7f7f7fff));
}

static uint64_t f32_to_bf16(void *TVK_RESTRICT dst,
                            const float *TVK_RESTRICT src, size_t n)
{
    uint64_t bad = 0;
    size_t i = 0;

    for (; i + 16 <= n; i += 16) {
        const __m256i u = _mm256_castps_si256(load8(8, src + i));
        const __m256i v = _mm256_castps_si256(load8(8, src + i + 8));
        tvk_read_ahead(src + i);
        const __m256i any = _mm256_or_si256(over_bf16(u), over_bf16(v));
        if (!_mm256_testz_si256(any, any)) {
            bad += narrow_any(dst, src, i, i + 16);
            continue;
        }
        /* Packs within halves: 0 2 1 3 puts the quarters in order. */
        const __m256i h = _mm256_permute4x64_epi64(
            _mm256_packus_epi32(round_number(u), round_number(v)), 0xd8);
        _mm256_storeu_si256((__m256i *)(void *)((unsigned char *)dst + 2 * i),
                            h);
    }
    return bad + narrow_any(dst, src, i, n);
}

static uint64_t f32_to_f16(void *TVK_RESTRICT dst,
                           const float *TVK_RESTRICT src, size_t n)
{
    uint64_t bad = 0;

    for (size_t i = 0; i < n; i += 8) {
        const size_t count = n - i < 8 ? n - i : 8;
        const __m128i h =
            _mm256_cvtps_ph(load8(count, src + i), _MM_FROUND_TO_NEAREST_INT);
        tvk_read_ahead(src + i);
        store_half(dst, i, count, h);
        bad += count_half(h, 0x7c00);
    }
    return bad;
}

void tvk_avx2_convert(struct tvk_table *t)
{
    t->bf16_to_f32 = bf16_to_f32;
    t->f16_to_f32 = f16_to_f32;
    t->f32_to_bf16 = f32_to_bf16;
    t->f32_to_f16 = f32_to_f16;
}
