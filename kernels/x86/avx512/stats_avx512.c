/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stats_avx512.c - range, moments and counts, 16 elements at a time.
 *
 * Squares of fp32 are exact in fp64, so fusing changes nothing (see
 * dots_avx512.c).
 */
#include "x86/x86_rows.h"
#include "avx512_util.h"

#include <assert.h>
#include <math.h>

TVK_INLINE __mmask16 finite_lanes(__mmask16 lanes, __m512 v)
{
    const __m512i u = _mm512_castps_si512(v);
    const __m512i exponent = _mm512_set1_epi32(0x7f800000);
    return _mm512_mask_cmpneq_epi32_mask(lanes, _mm512_and_si512(u, exponent),
                                         exponent);
}

static uint64_t count_nonfinite(const float *x, size_t n)
{
    uint64_t n_finite = 0;
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        const __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
        tvk_read_ahead(x + i);
        n_finite += tvk_popcount(finite_lanes(lanes, v));
    }
    return n - n_finite;
}

static uint64_t count_nonfinite_bf16(const void *x, size_t n)
{
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    const unsigned char *const at = x;
    uint64_t count = 0;

    for (size_t i = 0; i < n; i += 32) {
        const __mmask32 lanes =
            n - i >= 32 ? 0xffffffffu : (__mmask32)tvk_low_bits(n - i);
        const __m512i h = _mm512_maskz_loadu_epi16(lanes, at + 2 * i);
        count += tvk_popcount(
            _mm512_cmpeq_epi16_mask(_mm512_and_si512(h, exponent), exponent));
    }
    return count;
}

static void stats(struct tvk_stats *out, const float *x, size_t n)
{
    __m512d sum0 = _mm512_setzero_pd(), sum1 = sum0, sq0 = sum0, sq1 = sum0;
    __m512 min = _mm512_set1_ps(INFINITY);
    __m512 max = _mm512_set1_ps(-INFINITY);
    uint64_t n_finite = 0;
    uint64_t n_zero = 0;

    assert(n <= TVK_LEAF);
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        const __m512 raw = _mm512_maskz_loadu_ps(lanes, x + i);
        const __mmask16 finite = finite_lanes(lanes, raw);
        const __m512 v = _mm512_maskz_mov_ps(finite, raw);
        const __m512d v0 = low8(v);
        const __m512d v1 = high8(v);
        sum0 = _mm512_add_pd(sum0, v0);
        sum1 = _mm512_add_pd(sum1, v1);
        sq0 = _mm512_fmadd_pd(v0, v0, sq0);
        sq1 = _mm512_fmadd_pd(v1, v1, sq1);
        min = _mm512_mask_min_ps(min, finite, v, min);
        max = _mm512_mask_max_ps(max, finite, v, max);
        n_finite += tvk_popcount(finite);
        n_zero += tvk_popcount(_mm512_mask_cmp_ps_mask(
            finite, v, _mm512_setzero_ps(), _CMP_EQ_OQ));
    }
    out->sum = lanes_total(sum0, sum1);
    out->sum_sq = lanes_total(sq0, sq1);
    out->min = _mm512_reduce_min_ps(min) + 0.0f;
    out->max = _mm512_reduce_max_ps(max) + 0.0f;
    out->n_nonfinite = n - n_finite;
    out->n_zero = n_zero;
}

void tvk_avx512_stats(struct tvk_table *t)
{
    t->count_nonfinite = count_nonfinite;
    t->count_nonfinite_bf16 = count_nonfinite_bf16;
    t->stats = stats;
}
