/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rank_avx2.c - rank_mask by buckets (rank_parts.h): comparisons 8 elements at
 * a time, candidates one by one.
 */
#include "x86/x86_rows.h"
#include "avx2_util.h"
#include "x86/rank_parts.h"

/* Keys of one round, whose buckets stay in the L1 cache. */
#define ROUND 1024u

TVK_INLINE __m256i load_words(size_t count, const uint32_t *p)
{
    if (count >= 8)
        return _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm256_maskload_epi32((const int *)(const void *)p, first8(count));
}

TVK_INLINE size_t total(__m256i count)
{
    uint32_t lane[8];
    size_t sum = 0;

    _mm256_storeu_si256((__m256i *)(void *)lane, count);
    for (unsigned i = 0; i < 8; i++)
        sum += lane[i];
    return sum;
}

/* Keys are below 2^31, so signed comparisons do. Absent lanes are 0, which
 * `key` is not. */
TVK_INLINE size_t count_equal(const uint32_t *keys, uint32_t key, size_t n)
{
    const __m256i wanted = _mm256_set1_epi32((int)key);
    __m256i count = _mm256_setzero_si256();

    for (size_t i = 0; i < n; i += 8)
        count = _mm256_sub_epi32(
            count, _mm256_cmpeq_epi32(load_words(n - i, keys + i), wanted));
    return total(count);
}

TVK_INLINE size_t count_lower(const uint32_t *keys, uint32_t key, size_t n)
{
    const __m256i limit = _mm256_set1_epi32((int)key);
    const size_t absent = -n & 7;
    __m256i count = _mm256_setzero_si256();

    for (size_t i = 0; i < n; i += 8)
        count = _mm256_sub_epi32(
            count, _mm256_cmpgt_epi32(limit, load_words(n - i, keys + i)));
    return total(count) - absent; /* those were lower */
}

/* Counts the keys by bucket, but those that are 0: returns how many. */
TVK_INLINE size_t fill_buckets(const struct rank_row *r)
{
    const __m256i first = _mm256_set1_epi32((int)r->first);
    uint16_t bucket[ROUND + 8];
    size_t n_zero = 0;
    uint32_t counted = 0; /* zeros that went into bucket 0 */

    memset(r->hist, 0, 2 * RANK_BUCKETS * sizeof *r->hist);
    memset(r->counted, 0, RANK_BUCKETS * sizeof *r->counted);
    for (size_t at = 0; at < r->n; at += ROUND) {
        const size_t end = r->n - at < ROUND ? r->n : at + ROUND;
        size_t n_buckets = 0;
        for (size_t i = at; i < end; i += 8) {
            const size_t count = end - i < 8 ? end - i : 8;
            const __m256i k = load_words(count, r->keys + i);
            const unsigned zeros =
                bits8(_mm256_cmpeq_epi32(k, _mm256_setzero_si256())) &
                (unsigned)tvk_low_bits(count);
            const unsigned n = tvk_popcount(zeros);
            n_zero += n;
            if (n == count)
                continue;
            counted += n;
            const __m256i b = _mm256_sub_epi32(
                _mm256_max_epu32(_mm256_srli_epi32(k, RANK_SHIFT), first),
                first);
            _mm_storeu_si128((__m128i *)(void *)(bucket + n_buckets),
                             _mm_packus_epi32(_mm256_castsi256_si128(b),
                                              _mm256_extracti128_si256(b, 1)));
            n_buckets += count;
        }
        rank_count_buckets(r, bucket, n_buckets);
    }
    r->hist[0] -= counted; /* modulo 2^32: the other part may hold them */
    return n_zero;
}

/* Turns counts into numbers of entries before. */
TVK_INLINE void add_up(const struct rank_row *r, size_t n_zero)
{
    uint32_t before = (uint32_t)n_zero;

    for (size_t b = 0; b < RANK_BUCKETS; b++) {
        r->before[b] = before;
        before += r->hist[b] + r->hist[RANK_BUCKETS + b];
    }
    r->before[RANK_BUCKETS] = before;
}

/* Does candidate i stay? As rank_stays. */
TVK_INLINE int candidate_stays(struct rank_row *r, size_t i)
{
    const float rank = r->by * (float)r->words[i] + r->from;
    const uint32_t b = rank_bucket(r, r->keys[i]);

    if ((float)r->before[b] > rank + r->slack)
        return 1;
    if ((float)r->before[b + 1] < rank - r->slack)
        return 0;
    return rank_stays(r, i);
}

static void rank_mask(uint64_t *TVK_RESTRICT mask, const uint32_t *keys,
                      const uint32_t *words, const struct tvk_odds *odds,
                      void *TVK_RESTRICT scratch, uint32_t most, size_t n)
{
    const __m256i flip = _mm256_set1_epi32((int)0x80000000u);

    if (n == 0)
        return;
    const uint64_t low = tvk_odds_limit(odds, 0, n);
    const uint64_t high = tvk_odds_limit(odds, n - 1, n);
    if (high == 0 || low > UINT32_MAX || n > INT32_MAX) {
        tvk_rank_mask(mask, keys, words, odds, scratch, most, n);
        return;
    }
    struct rank_row r = rank_row_of(keys, words, odds, scratch, most, n);
    const __m256i under = _mm256_set1_epi32((int)((uint32_t)low ^ 0x80000000u));
    const __m256i last =
        _mm256_set1_epi32((int)((uint32_t)(high - 1) ^ 0x80000000u));

    add_up(&r, fill_buckets(&r));
    for (size_t i = 0; i < n; i += 64) {
        uint64_t word = 0;
        for (unsigned q = 0; q < 64 && i + q < n; q += 8) {
            const size_t left = n - i - q;
            const __m256i k = load_words(left, keys + i + q);
            const __m256i w =
                _mm256_xor_si256(load_words(left, words + i + q), flip);
            const unsigned some =
                ~bits8(_mm256_cmpeq_epi32(k, _mm256_setzero_si256()));
            const unsigned in = bits8(_mm256_cmpgt_epi32(under, w));
            const unsigned over = bits8(_mm256_cmpgt_epi32(w, last));
            uint64_t stay = in & some;
            for (unsigned open = some & ~(in | over) & 0xffu; open != 0;
                 open &= open - 1) {
                const unsigned lane = (unsigned)__builtin_ctz(open);
                const int stays = candidate_stays(&r, i + q + lane);
                if (stays < 0) {
                    tvk_rank_mask(mask, keys, words, odds, scratch, most, n);
                    return;
                }
                stay |= (uint64_t)(unsigned)stays << lane;
            }
            word |= stay << q;
        }
        mask[i >> 6] = word;
    }
}

void tvk_avx2_rank(struct tvk_table *t)
{
    t->rank_mask = rank_mask;
}
