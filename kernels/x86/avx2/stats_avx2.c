/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stats_avx2.c - range, moments and counts, 8 elements at a time.
 */
#include "x86/x86_rows.h"
#include "avx2_util.h"

#include <assert.h>
#include <math.h>

TVK_INLINE __m256i nonfinite8(__m256 v)
{
    const __m256i exponent = _mm256_set1_epi32(0x7f800000);
    return _mm256_cmpeq_epi32(
        _mm256_and_si256(_mm256_castps_si256(v), exponent), exponent);
}

static uint64_t count_nonfinite(const float *x, size_t n)
{
    uint64_t total = 0;
    size_t i = 0;

    for (; i + 16 <= n; i += 16) {
        tvk_read_ahead(x + i);
        /* 16-bit lanes in no order, which a count does not need. */
        const __m256i bad =
            _mm256_packs_epi32(nonfinite8(_mm256_loadu_ps(x + i)),
                               nonfinite8(_mm256_loadu_ps(x + i + 8)));
        total += tvk_popcount((unsigned)_mm256_movemask_epi8(bad)) / 2;
    }
    for (; i < n; i += 8)
        total += tvk_popcount(bits8(nonfinite8(load8(n - i, x + i))));
    return total;
}

static uint64_t count_nonfinite_bf16(const void *x, size_t n)
{
    const __m128i exponent = _mm_set1_epi16(0x7f80);
    uint64_t bytes = 0;

    for (size_t i = 0; i < n; i += 8) {
        const __m128i h = load_half(n - i, x, i);
        bytes += tvk_popcount((unsigned)_mm_movemask_epi8(
            _mm_cmpeq_epi16(_mm_and_si128(h, exponent), exponent)));
    }
    return bytes / 2;
}

struct sums {
    __m256d sum[4], sq[4];
    __m256 min, max;
    uint64_t n_nonfinite, n_zero;
};

/* Elements of lanes 0..7 (half 0) or 8..15 (half 1). */
TVK_INLINE void add8(struct sums *s, const float *x, size_t half, size_t count)
{
    const __m256i present = first8(count);
    const __m256 raw = load8(count, x);
    const __m256i bad = nonfinite8(raw);
    const __m256 finite =
        _mm256_castsi256_ps(_mm256_andnot_si256(bad, present));
    const __m256 v = _mm256_and_ps(raw, finite);
    const __m256d v0 = low4(v);
    const __m256d v1 = high4(v);
    const __m256 zero = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_EQ_OQ);

    s->sum[2 * half] = _mm256_add_pd(s->sum[2 * half], v0);
    s->sum[2 * half + 1] = _mm256_add_pd(s->sum[2 * half + 1], v1);
    s->sq[2 * half] = _mm256_add_pd(s->sq[2 * half], _mm256_mul_pd(v0, v0));
    s->sq[2 * half + 1] =
        _mm256_add_pd(s->sq[2 * half + 1], _mm256_mul_pd(v1, v1));
    s->min = _mm256_blendv_ps(s->min, _mm256_min_ps(v, s->min), finite);
    s->max = _mm256_blendv_ps(s->max, _mm256_max_ps(v, s->max), finite);
    s->n_nonfinite += tvk_popcount(bits8(bad));
    s->n_zero +=
        tvk_popcount(bits8(_mm256_castps_si256(_mm256_and_ps(zero, finite))));
}

static void stats(struct tvk_stats *out, const float *x, size_t n)
{
    struct sums s;
    float lane_min[8], lane_max[8];
    size_t i = 0;

    assert(n <= TVK_LEAF);
    for (size_t v = 0; v < 4; v++)
        s.sum[v] = s.sq[v] = _mm256_setzero_pd();
    s.min = _mm256_set1_ps(INFINITY);
    s.max = _mm256_set1_ps(-INFINITY);
    s.n_nonfinite = 0;
    s.n_zero = 0;
    for (; i + 16 <= n; i += 16) {
        add8(&s, x + i, 0, 8);
        add8(&s, x + i + 8, 1, 8);
    }
    if (i < n)
        add8(&s, x + i, 0, n - i < 8 ? n - i : 8);
    if (i + 8 < n)
        add8(&s, x + i + 8, 1, n - i - 8);

    _mm256_storeu_ps(lane_min, s.min);
    _mm256_storeu_ps(lane_max, s.max);
    for (size_t v = 1; v < 8; v++) {
        lane_min[0] = lane_min[v] < lane_min[0] ? lane_min[v] : lane_min[0];
        lane_max[0] = lane_max[v] > lane_max[0] ? lane_max[v] : lane_max[0];
    }
    out->sum = lanes_total(s.sum);
    out->sum_sq = lanes_total(s.sq);
    out->min = lane_min[0] + 0.0f;
    out->max = lane_max[0] + 0.0f;
    out->n_nonfinite = s.n_nonfinite;
    out->n_zero = s.n_zero;
}

void tvk_avx2_stats(struct tvk_table *t)
{
    t->count_nonfinite = count_nonfinite;
    t->count_nonfinite_bf16 = count_nonfinite_bf16;
    t->stats = stats;
}
