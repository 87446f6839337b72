/* SPDX-License-Identifier: Apache-2.0 */
/*
 * topk_avx512.c - histograms and masks of magnitudes.
 *
 * Buckets are computed 16 at a time into a small buffer and counted by scalar
 * increments; there is no room for several histograms in the contract. Zeros,
 * where there are many, pile up in one bucket and would wait for each other's
 * store: then they are counted aside. Other neighbours rarely meet. The order
 * of counting is free, so the buckets of two vectors are interleaved, which is
 * cheaper than one after the other.
 */
#include "x86/x86_rows.h"
#include "avx512_util.h"
#include "x86/topk_parts.h"

#include <assert.h>

/* Elements per round of hist_hi; the buffer stays in the L1 cache. */
#define ROUND 1024u
/* More zeros than that among 32 are many. */
#define ZEROS 8u

TVK_INLINE __m512i bucket16(__mmask16 lanes, const float *x, const float *b,
                            size_t i)
{
    return _mm512_srli_epi32(
        magnitude16(lanes, x + i, b != NULL ? b + i : NULL), 15);
}

/* Appends the buckets of up to 16 elements but for zeros; returns how many. */
TVK_INLINE size_t append_some(uint16_t *bucket, __m512i hi)
{
    const __mmask16 some = _mm512_test_epi32_mask(hi, hi);

    _mm256_storeu_si256(
        (__m256i *)(void *)bucket,
        _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(some, hi)));
    return tvk_popcount(some);
}

TVK_INLINE void hist_hi_any(uint32_t *TVK_RESTRICT hist, const float *x,
                            const float *b, size_t n)
{
    uint16_t bucket[ROUND + 32];

    for (size_t at = 0; at < n; at += ROUND) {
        const size_t end = n - at < ROUND ? n : at + ROUND;
        size_t n_buckets = 0;
        size_t n_aside = 0;
        size_t i = at;
        for (; i + 32 <= end; i += 32) {
            const __m512i first = bucket16(0xffff, x, b, i);
            const __m512i second = bucket16(0xffff, x, b, i + 16);
            const uint32_t zeros =
                _mm512_testn_epi32_mask(first, first) |
                (uint32_t)_mm512_testn_epi32_mask(second, second) << 16;
            if (tvk_popcount(zeros) > ZEROS) {
                n_buckets += append_some(bucket + n_buckets, first);
                n_buckets += append_some(bucket + n_buckets, second);
                n_aside += tvk_popcount(zeros);
                continue;
            }
            _mm512_storeu_si512(
                bucket + n_buckets,
                _mm512_or_si512(first, _mm512_slli_epi32(second, 16)));
            n_buckets += 32;
        }
        for (; i < end; i += 16) {
            const size_t some = append_some(bucket + n_buckets,
                                            bucket16(lanes16(i, end), x, b, i));
            n_buckets += some;
            n_aside += (end - i < 16 ? end - i : 16) - some;
        }
        tvk_count_buckets(hist, bucket, n_buckets, x + at,
                          b != NULL ? b + at : NULL);
        hist[0] += (uint32_t)n_aside;
    }
}

TVK_INLINE void hist_lo_any(uint32_t *TVK_RESTRICT hist, uint32_t hi,
                            const float *x, const float *b, size_t n)
{
    const __m512i wanted = _mm512_set1_epi32((int)hi);
    uint32_t low[16];
    uint32_t n_zero = 0;

    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        const __m512i m = magnitude16(lanes, x + i, b != NULL ? b + i : NULL);
        __mmask16 hit = _mm512_mask_cmpeq_epi32_mask(
            lanes, _mm512_srli_epi32(m, 15), wanted);
        const __mmask16 zero = _mm512_mask_testn_epi32_mask(hit, m, m);
        n_zero += tvk_popcount(zero);
        hit = (__mmask16)(hit & ~zero);
        if (hit == 0)
            continue;
        _mm512_storeu_si512(
            low, _mm512_maskz_compress_epi32(
                     hit, _mm512_and_si512(m, _mm512_set1_epi32(0x7fff))));
        const unsigned n_hits = tvk_popcount(hit);
        for (unsigned k = 0; k < n_hits; k++)
            hist[low[k]]++;
    }
    hist[0] += n_zero;
}

TVK_INLINE __m512i magnitude_at(__mmask16 lanes, const void *x, const void *b,
                                enum values values, size_t i)
{
    if (values == MINUS_BF16)
        return magnitude16_bf16(lanes, (const unsigned char *)x + 2 * i,
                                (const unsigned char *)b + 2 * i);
    return magnitude16(lanes, (const float *)x + i,
                       values == MINUS ? (const float *)b + i : NULL);
}

/* Counts 16 elements; returns how many lie above the range. */
TVK_INLINE unsigned range16(uint32_t *TVK_RESTRICT hist, __m512i m,
                            __m512i from, __m512i to)
{
    /* Absent lanes are 0, which lies below any range. */
    const __mmask16 not_below = _mm512_cmpge_epu32_mask(m, from);
    const __mmask16 hit = _mm512_mask_cmplt_epu32_mask(not_below, m, to);
    uint32_t at[16];

    if (hit == 0)
        return tvk_popcount(not_below);
    _mm512_storeu_si512(
        at, _mm512_maskz_compress_epi32(hit, _mm512_sub_epi32(m, from)));
    const unsigned n_hits = tvk_popcount(hit);
    for (unsigned k = 0; k < n_hits; k++)
        hist[at[k]]++;
    return tvk_popcount(not_below) - n_hits;
}

TVK_INLINE uint64_t hist_range_any(uint32_t *TVK_RESTRICT hist, uint32_t first,
                                   uint32_t width, const void *x, const void *b,
                                   enum values values, size_t n)
{
    const __m512i from = _mm512_set1_epi32((int)first);
    const __m512i to = _mm512_set1_epi32((int)(first + width));
    uint64_t above = 0;
    size_t i = 0;

    assert(first > 0 && width > 0 && width <= 0x80000000u - first);
    for (; i + 32 <= n; i += 32) {
        if (values == MINUS_BF16) {
            tvk_read_ahead((const unsigned char *)x + 2 * i);
            tvk_read_ahead((const unsigned char *)b + 2 * i);
        }
        above += range16(hist, magnitude_at(0xffff, x, b, values, i), from, to);
        above +=
            range16(hist, magnitude_at(0xffff, x, b, values, i + 16), from, to);
    }
    for (; i < n; i += 16)
        above += range16(hist, magnitude_at(lanes16(i, n), x, b, values, i),
                         from, to);
    return above;
}

TVK_INLINE uint64_t count_eq_any(const float *x, const float *b,
                                 uint32_t pattern, size_t n)
{
    const __m512i wanted = _mm512_set1_epi32((int)pattern);
    uint64_t count = 0;

    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        const __m512i m = magnitude16(lanes, x + i, b != NULL ? b + i : NULL);
        count += tvk_popcount(_mm512_mask_cmpeq_epi32_mask(lanes, m, wanted));
    }
    return count;
}

TVK_INLINE uint32_t magnitudes_any(uint32_t *TVK_RESTRICT dst, const float *x,
                                   const float *b, size_t n)
{
    __m512i most = _mm512_setzero_si512();

    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        const __m512i m = magnitude16(lanes, x + i, b != NULL ? b + i : NULL);
        most = _mm512_max_epu32(most, m);
        _mm512_mask_storeu_epi32(dst + i, lanes, m);
    }
    return (uint32_t)_mm512_reduce_max_epu32(most);
}

/* The word of elements [i, i + 64), of which there are n - i. */
TVK_INLINE uint64_t topk_word(struct topk *t, const void *x, const void *b,
                              enum values values, size_t i, size_t n,
                              int is_whole)
{
    const __m512i limit = _mm512_set1_epi32((int)t->pattern);
    uint64_t above = 0;
    uint64_t equal = 0;

    for (unsigned q = 0; q < 64 && (is_whole || i + q < n); q += 16) {
        const __mmask16 lanes = is_whole ? 0xffff : lanes16(i + q, n);
        const __m512i m = magnitude_at(lanes, x, b, values, i + q);
        above |= (uint64_t)_mm512_mask_cmpgt_epu32_mask(lanes, m, limit) << q;
        equal |= (uint64_t)_mm512_mask_cmpeq_epu32_mask(lanes, m, limit) << q;
    }
    return equal != 0 ? above | topk_keep_equal(t, equal) : above;
}

#include "x86/topk_entries.h"

void tvk_avx512_topk(struct tvk_table *t)
{
    topk_fill(t);
}
