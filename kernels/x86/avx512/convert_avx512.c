/* SPDX-License-Identifier: Apache-2.0 */
/*
 * convert_avx512.c - 16-bit conversions, 16 elements at a time.
 *
 * f16 uses the conversion instructions. bf16 is integer arithmetic as in
 * ref/convert.c: VCVTNEPS2BF16 flushes subnormals and is no option.
 */
#include "x86/x86_rows.h"
#include "avx512_util.h"

TVK_INLINE __m512i quieten(__m512i u)
{
    const __m512 v = _mm512_castsi512_ps(u);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_mask_or_epi32(u, nan, u, _mm512_set1_epi32(0x00400000));
}

/* How many of the lanes have an exponent of ones; absent lanes are 0. */
TVK_INLINE unsigned nonfinite16(__m512i u)
{
    const __m512i exponent = _mm512_set1_epi32(0x7f800000);
    return tvk_popcount(
        _mm512_cmpeq_epi32_mask(_mm512_and_si512(u, exponent), exponent));
}

TVK_INLINE uint64_t widen_any(float *dst, const void *src, size_t i, size_t n)
{
    uint64_t bad = 0;

    for (; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        const __m512i h = _mm512_cvtepu16_epi32(load_half(lanes, src, i));
        const __m512i u = quieten(_mm512_slli_epi32(h, 16));
        _mm512_mask_storeu_ps(dst + i, lanes, _mm512_castsi512_ps(u));
        bad += nonfinite16(u);
    }
    return bad;
}

TVK_INLINE void widen_numbers(float *dst, __m256i h)
{
    _mm512_storeu_si512(dst, _mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}

static uint64_t bf16_to_f32(float *TVK_RESTRICT dst,
                            const void *TVK_RESTRICT src, size_t n)
{
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    uint64_t bad = 0;
    size_t i = 0;

    for (; i + 32 <= n; i += 32) {
        const unsigned char *const from = (const unsigned char *)src + 2 * i;
        const __m512i h = _mm512_loadu_si512(from);
        tvk_read_ahead(from);
        if (_mm512_cmpeq_epi16_mask(_mm512_and_si512(h, exponent), exponent)) {
            bad += widen_any(dst, src, i, i + 32);
            continue;
        }
        widen_numbers(dst + i, _mm512_castsi512_si256(h));
        widen_numbers(dst + i + 16, _mm512_extracti64x4_epi64(h, 1));
    }
    return bad + widen_any(dst, src, i, n);
}

static uint64_t f16_to_f32(float *TVK_RESTRICT dst,
                           const void *TVK_RESTRICT src, size_t n)
{
    uint64_t bad = 0;

    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        tvk_read_ahead((const unsigned char *)src + 2 * i);
        const __m512 v = _mm512_cvtph_ps(load_half(lanes, src, i));
        _mm512_mask_storeu_ps(dst + i, lanes, v);
        bad += nonfinite16(_mm512_castps_si512(v));
    }
    return bad;
}

static uint64_t f32_to_bf16(void *TVK_RESTRICT dst,
                            const float *TVK_RESTRICT src, size_t n)
{
    return narrow_bf16(dst, src, n);
}

static uint64_t f32_to_f16(void *TVK_RESTRICT dst,
                           const float *TVK_RESTRICT src, size_t n)
{
    uint64_t bad = 0;

    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        const __m512 v = _mm512_maskz_loadu_ps(lanes, src + i);
        const __m256i h = _mm512_maskz_cvtps_ph(
            lanes, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        store_half(dst, i, lanes, h);
        bad += nonfinite_half(h, 0x7c00);
    }
    return bad;
}

/* To nearest, ties to even, left in the high half; numbers below infinity. */
TVK_INLINE __m512i round_high(__m512 v)
{
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd =
        _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i r =
        _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    return _mm512_and_si512(r, _mm512_set1_epi32(-0x10000));
}

TVK_INLINE void store_high(uint16_t *dst, __mmask16 lanes, __m512i v)
{
    store_half(dst, 0, lanes, _mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16)));
}

static void split_bf16(uint16_t *TVK_RESTRICT dst, size_t plane,
                       const float *TVK_RESTRICT src, size_t n)
{
    const __m512i exponent = _mm512_set1_epi32(0x7f800000);
    const __m512i high = _mm512_set1_epi32(-0x10000);

    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        const __m512 v = _mm512_maskz_loadu_ps(lanes, src + i);
        const __m512i u = _mm512_castps_si512(v);
        const __mmask16 number =
            _mm512_cmpneq_epi32_mask(_mm512_and_si512(u, exponent), exponent);
        __m512i p0 = round_high(v);
        const __mmask16 over =
            _mm512_cmpeq_epi32_mask(_mm512_and_si512(p0, exponent), exponent);

        p0 = _mm512_mask_and_epi32(p0, over, u, high);
        p0 = _mm512_mask_and_epi32(p0, (__mmask16)~number, quieten(u), high);
        const __m512 r1 =
            _mm512_maskz_sub_ps(number, v, _mm512_castsi512_ps(p0));
        const __m512i p1 = round_high(r1);
        const __m512 r2 = _mm512_sub_ps(r1, _mm512_castsi512_ps(p1));

        store_high(dst + i, lanes, p0);
        store_high(dst + plane + i, lanes, p1);
        store_high(dst + 2 * plane + i, lanes, round_high(r2));
    }
}

void tvk_avx512_convert(struct tvk_table *t)
{
    t->bf16_to_f32 = bf16_to_f32;
    t->f16_to_f32 = f16_to_f32;
    t->f32_to_bf16 = f32_to_bf16;
    t->f32_to_f16 = f32_to_f16;
    t->split_bf16 = split_bf16;
}
