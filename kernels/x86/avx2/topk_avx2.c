/* SPDX-License-Identifier: Apache-2.0 */
/*
 * topk_avx2.c - histograms and masks of magnitudes, 8 elements at a time.
 *
 * Without a compressing store, vectors that are all zero (frequent where a
 * fine-tune left the base alone) are counted at once and all others go through
 * the bucket buffer whole.
 */
#include "x86/x86_rows.h"
#include "avx2_util.h"
#include "x86/topk_parts.h"

#include <assert.h>

/* Elements per round of hist_hi; the buffer stays in the L1 cache. */
#define ROUND 1024u

TVK_INLINE void hist_hi_any(uint32_t *TVK_RESTRICT hist, const float *x,
                            const float *b, size_t n)
{
    uint16_t bucket[ROUND + 8];

    for (size_t at = 0; at < n; at += ROUND) {
        const size_t end = n - at < ROUND ? n : at + ROUND;
        size_t n_buckets = 0;
        size_t n_zero = 0;
        for (size_t i = at; i < end; i += 8) {
            const size_t count = end - i < 8 ? end - i : 8;
            const __m256i hi = _mm256_srli_epi32(
                magnitude8(count, x + i, b != NULL ? b + i : NULL), 15);
            if (_mm256_testz_si256(hi, hi)) {
                n_zero += count;
                continue;
            }
            _mm_storeu_si128((__m128i *)(void *)(bucket + n_buckets),
                             _mm_packus_epi32(_mm256_castsi256_si128(hi),
                                              _mm256_extracti128_si256(hi, 1)));
            n_buckets += count;
        }
        tvk_count_buckets(hist, bucket, n_buckets, x + at,
                          b != NULL ? b + at : NULL);
        hist[0] += (uint32_t)n_zero;
    }
}

TVK_INLINE void hist_lo_any(uint32_t *TVK_RESTRICT hist, uint32_t hi,
                            const float *x, const float *b, size_t n)
{
    const __m256i wanted = _mm256_set1_epi32((int)hi);
    uint32_t low[8];
    uint32_t n_zero = 0;

    for (size_t i = 0; i < n; i += 8) {
        const size_t count = n - i < 8 ? n - i : 8;
        const __m256i m = magnitude8(count, x + i, b != NULL ? b + i : NULL);
        unsigned hit =
            bits8(_mm256_cmpeq_epi32(_mm256_srli_epi32(m, 15), wanted)) &
            (unsigned)tvk_low_bits(count);
        if (hit == 0)
            continue;
        const unsigned zero =
            hit & bits8(_mm256_cmpeq_epi32(m, _mm256_setzero_si256()));
        n_zero += tvk_popcount(zero);
        hit &= ~zero;
        _mm256_storeu_si256((__m256i *)(void *)low, m);
        for (; hit != 0; hit &= hit - 1)
            hist[low[__builtin_ctz(hit)] & 0x7fffu]++;
    }
    hist[0] += n_zero;
}

TVK_INLINE __m256i magnitude_at(size_t count, const void *x, const void *b,
                                enum values values, size_t i)
{
    if (values == MINUS_BF16)
        return magnitude_of(
            _mm256_sub_ps(load8_bf16(count, x, i), load8_bf16(count, b, i)));
    return magnitude8(count, (const float *)x + i,
                      values == MINUS ? (const float *)b + i : NULL);
}

TVK_INLINE uint64_t hist_range_any(uint32_t *TVK_RESTRICT hist, uint32_t first,
                                   uint32_t width, const void *x, const void *b,
                                   enum values values, size_t n)
{
    /* Magnitudes are below 2^31, so differences do not wrap; absent lanes are
     * 0, which lies below any range. */
    const __m256i from = _mm256_set1_epi32((int)first);
    const __m256i last = _mm256_set1_epi32((int)width - 1);
    const __m256i below = _mm256_set1_epi32(-1);
    uint32_t at[8];
    uint64_t above = 0;

    assert(first > 0 && width > 0 && width <= 0x80000000u - first);
    for (size_t i = 0; i < n; i += 8) {
        const size_t count = n - i < 8 ? n - i : 8;
        if (values == MINUS_BF16 && i % 32 == 0) {
            tvk_read_ahead((const unsigned char *)x + 2 * i);
            tvk_read_ahead((const unsigned char *)b + 2 * i);
        }
        const __m256i m =
            _mm256_sub_epi32(magnitude_at(count, x, b, values, i), from);
        const unsigned high = bits8(_mm256_cmpgt_epi32(m, last));
        unsigned hit = bits8(_mm256_cmpgt_epi32(m, below)) & ~high;
        above += tvk_popcount(high);
        if (hit == 0)
            continue;
        _mm256_storeu_si256((__m256i *)(void *)at, m);
        for (; hit != 0; hit &= hit - 1)
            hist[at[__builtin_ctz(hit)]]++;
    }
    return above;
}

TVK_INLINE uint64_t count_eq_any(const float *x, const float *b,
                                 uint32_t pattern, size_t n)
{
    const __m256i wanted = _mm256_set1_epi32((int)pattern);
    uint64_t total = 0;

    for (size_t i = 0; i < n; i += 8) {
        const size_t count = n - i < 8 ? n - i : 8;
        const __m256i m = magnitude8(count, x + i, b != NULL ? b + i : NULL);
        total += tvk_popcount(bits8(_mm256_cmpeq_epi32(m, wanted)) &
                              tvk_low_bits(count));
    }
    return total;
}

TVK_INLINE uint32_t magnitudes_any(uint32_t *TVK_RESTRICT dst, const float *x,
                                   const float *b, size_t n)
{
    __m256i most = _mm256_setzero_si256();
    uint32_t lane[8];
    uint32_t m = 0;

    for (size_t i = 0; i < n; i += 8) {
        const size_t count = n - i < 8 ? n - i : 8;
        const __m256i v = magnitude8(count, x + i, b != NULL ? b + i : NULL);
        most = _mm256_max_epu32(most, v);
        if (count == 8)
            _mm256_storeu_si256((__m256i *)(void *)(dst + i), v);
        else
            _mm256_maskstore_epi32((int *)(void *)(dst + i), first8(count), v);
    }
    _mm256_storeu_si256((__m256i *)(void *)lane, most);
    for (unsigned i = 0; i < 8; i++)
        m = lane[i] > m ? lane[i] : m;
    return m;
}

/* The word of elements [i, i + 64), of which there are n - i. */
TVK_INLINE uint64_t topk_word(struct topk *t, const void *x, const void *b,
                              enum values values, size_t i, size_t n,
                              int is_whole)
{
    /* Compares are signed: a pattern above all magnitudes must not wrap. */
    const __m256i limit = _mm256_set1_epi32(
        t->pattern > 0x7fffffffu ? 0x7fffffff : (int)t->pattern);
    uint64_t above = 0;
    uint64_t equal = 0;

    for (unsigned q = 0; q < 64 && (is_whole || i + q < n); q += 8) {
        const size_t left = n - i - q;
        const size_t count = is_whole || left > 8 ? 8 : left;
        const __m256i m = magnitude_at(count, x, b, values, i + q);
        above |= (uint64_t)bits8(_mm256_cmpgt_epi32(m, limit)) << q;
        equal |= (bits8(_mm256_cmpeq_epi32(m, limit)) & tvk_low_bits(count))
                 << q;
    }
    return equal != 0 ? above | topk_keep_equal(t, equal) : above;
}

#include "x86/topk_entries.h"

void tvk_avx2_topk(struct tvk_table *t)
{
    topk_fill(t);
}
