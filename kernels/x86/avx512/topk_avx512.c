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

static void hist_hi(uint32_t *TVK_RESTRICT hist, const float *x, const float *b,
                    size_t n)
{
    if (b != NULL)
        hist_hi_any(hist, x, b, n);
    else
        hist_hi_any(hist, x, NULL, n);
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

static void hist_lo(uint32_t *TVK_RESTRICT hist, uint32_t hi, const float *x,
                    const float *b, size_t n)
{
    if (b != NULL)
        hist_lo_any(hist, hi, x, b, n);
    else
        hist_lo_any(hist, hi, x, NULL, n);
}

/* Values to compare: x, x - b, or x - b of bf16. */
enum values { PLAIN, MINUS, MINUS_BF16 };

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

static uint64_t hist_range(uint32_t *TVK_RESTRICT hist, uint32_t first,
                           uint32_t width, const float *x, const float *b,
                           size_t n)
{
    return b != NULL ? hist_range_any(hist, first, width, x, b, MINUS, n)
                     : hist_range_any(hist, first, width, x, b, PLAIN, n);
}

static uint64_t hist_range_bf16(uint32_t *TVK_RESTRICT hist, uint32_t first,
                                uint32_t width, const void *x, const void *b,
                                size_t n)
{
    return hist_range_any(hist, first, width, x, b, MINUS_BF16, n);
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

static uint64_t count_eq(const float *x, const float *b, uint32_t pattern,
                         size_t n)
{
    return b != NULL ? count_eq_any(x, b, pattern, n)
                     : count_eq_any(x, NULL, pattern, n);
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

static uint32_t magnitudes(uint32_t *TVK_RESTRICT dst, const float *x,
                           const float *b, size_t n)
{
    return b != NULL ? magnitudes_any(dst, x, b, n)
                     : magnitudes_any(dst, x, NULL, n);
}

struct topk {
    uint32_t pattern;
    uint64_t seen, limit;
};

/* The equal ones of a word that are kept. */
static uint64_t keep_equal(struct topk *t, uint64_t equal)
{
    const unsigned n_equal = tvk_popcount(equal);
    const uint64_t room = t->seen < t->limit ? t->limit - t->seen : 0;

    t->seen += n_equal;
    if (t->pattern == 0 || room == 0)
        return 0;
    return room < n_equal ? tvk_lowest_set(equal, room) : equal;
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
    return equal != 0 ? above | keep_equal(t, equal) : above;
}

TVK_INLINE uint64_t topk_mask_any(uint64_t *TVK_RESTRICT mask, const void *x,
                                  const void *b, enum values values,
                                  uint32_t pattern, uint64_t *eq_seen,
                                  uint64_t eq_limit, size_t n)
{
    struct topk t = {pattern, *eq_seen, eq_limit};
    uint64_t kept = 0;
    size_t i = 0;

    for (; i + 64 <= n; i += 64) {
        mask[i >> 6] = topk_word(&t, x, b, values, i, n, 1);
        kept += tvk_popcount(mask[i >> 6]);
    }
    if (i < n) {
        mask[i >> 6] = topk_word(&t, x, b, values, i, n, 0);
        kept += tvk_popcount(mask[i >> 6]);
    }
    *eq_seen = t.seen;
    return kept;
}

static uint64_t topk_mask(uint64_t *TVK_RESTRICT mask, const float *x,
                          const float *b, uint32_t pattern, uint64_t *eq_seen,
                          uint64_t eq_limit, size_t n)
{
    return b != NULL
               ? topk_mask_any(mask, x, b, MINUS, pattern, eq_seen, eq_limit, n)
               : topk_mask_any(mask, x, b, PLAIN, pattern, eq_seen, eq_limit,
                               n);
}

static uint64_t topk_mask_bf16(uint64_t *TVK_RESTRICT mask, const void *x,
                               const void *b, uint32_t pattern,
                               uint64_t *eq_seen, uint64_t eq_limit, size_t n)
{
    return topk_mask_any(mask, x, b, MINUS_BF16, pattern, eq_seen, eq_limit, n);
}

void tvk_avx512_topk(struct tvk_table *t)
{
    t->hist_hi = hist_hi;
    t->hist_lo = hist_lo;
    t->hist_range = hist_range;
    t->hist_range_bf16 = hist_range_bf16;
    t->count_eq = count_eq;
    t->magnitudes = magnitudes;
    t->topk_mask = topk_mask;
    t->topk_mask_bf16 = topk_mask_bf16;
}
