/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rank_avx512.c - rank_mask by buckets (rank_parts.h), 16 elements at a time.
 */
#include "x86/x86_rows.h"
#include "avx512_util.h"
#include "x86/rank_parts.h"

/* Keys of one round, whose buckets stay in the L1 cache. */
#define ROUND 1024u
/* More zeros than that among 32 would wait for each other in bucket 0. */
#define ZEROS 8u

/* Keys that equal `key` or, with `lower`, are below it. */
TVK_INLINE size_t count_keys(const uint32_t *keys, uint32_t key, size_t n,
                             int lower)
{
    const __m512i wanted = _mm512_set1_epi32((int)key);
    const __m512i one = _mm512_set1_epi32(1);
    __m512i count = _mm512_setzero_si512();

    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        const __m512i k = _mm512_maskz_loadu_epi32(lanes, keys + i);
        const __mmask16 some =
            lower ? _mm512_mask_cmplt_epu32_mask(lanes, k, wanted)
                  : _mm512_mask_cmpeq_epi32_mask(lanes, k, wanted);
        count = _mm512_mask_add_epi32(count, some, count, one);
    }
    return (uint32_t)_mm512_reduce_add_epi32(count);
}

TVK_INLINE size_t count_equal(const uint32_t *keys, uint32_t key, size_t n)
{
    return count_keys(keys, key, n, 0);
}

TVK_INLINE size_t count_lower(const uint32_t *keys, uint32_t key, size_t n)
{
    return count_keys(keys, key, n, 1);
}

TVK_INLINE __m512i buckets16(const struct rank_row *r, __m512i keys)
{
    const __m512i first = _mm512_set1_epi32((int)r->first);
    return _mm512_sub_epi32(
        _mm512_max_epu32(_mm512_srli_epi32(keys, RANK_SHIFT), first), first);
}

/* Appends the buckets of up to 16 keys but for zeros; returns how many. */
TVK_INLINE size_t append_some(const struct rank_row *r, uint16_t *bucket,
                              __m512i keys)
{
    const __mmask16 some = _mm512_test_epi32_mask(keys, keys);

    _mm256_storeu_si256((__m256i *)(void *)bucket,
                        _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(
                            some, buckets16(r, keys))));
    return tvk_popcount(some);
}

/* Counts the keys by bucket, but those that are 0: returns how many. As hist_hi
 * of topk_avx512.c. */
TVK_INLINE size_t fill_buckets(const struct rank_row *r)
{
    uint16_t bucket[ROUND + 32];
    size_t n_zero = 0;
    uint32_t counted = 0; /* zeros that went into bucket 0 */

    for (size_t b = 0; b < 2 * RANK_BUCKETS; b += 16)
        _mm512_store_si512(r->hist + b, _mm512_setzero_si512());
    for (size_t at = 0; at < r->n; at += ROUND) {
        const size_t end = r->n - at < ROUND ? r->n : at + ROUND;
        size_t n_buckets = 0;
        size_t i = at;
        for (; i + 32 <= end; i += 32) {
            const __m512i first = _mm512_loadu_si512(r->keys + i);
            const __m512i second = _mm512_loadu_si512(r->keys + i + 16);
            const uint32_t zeros =
                _mm512_testn_epi32_mask(first, first) |
                (uint32_t)_mm512_testn_epi32_mask(second, second) << 16;
            const uint32_t n_here = tvk_popcount(zeros);
            n_zero += n_here;
            if (n_here > ZEROS) {
                n_buckets += append_some(r, bucket + n_buckets, first);
                n_buckets += append_some(r, bucket + n_buckets, second);
                continue;
            }
            counted += n_here;
            _mm512_storeu_si512(
                bucket + n_buckets,
                _mm512_or_si512(buckets16(r, first),
                                _mm512_slli_epi32(buckets16(r, second), 16)));
            n_buckets += 32;
        }
        for (; i < end; i += 16) {
            const size_t some = append_some(
                r, bucket + n_buckets,
                _mm512_maskz_loadu_epi32(lanes16(i, end), r->keys + i));
            n_buckets += some;
            n_zero += (end - i < 16 ? end - i : 16) - some;
        }
        rank_count_buckets(r, bucket, n_buckets);
    }
    r->hist[0] -= counted; /* modulo 2^32: the other part may hold them */
    return n_zero;
}

/* Turns counts into numbers of entries before. */
TVK_INLINE void add_up(const struct rank_row *r, size_t n_zero)
{
    const __m512i zero = _mm512_setzero_si512();
    const __m512i last = _mm512_set1_epi32(15);
    __m512i sum = _mm512_set1_epi32((int)(uint32_t)n_zero);

    for (size_t b = 0; b < RANK_BUCKETS; b += 16) {
        const __m512i here =
            _mm512_add_epi32(_mm512_loadu_si512(r->hist + b),
                             _mm512_loadu_si512(r->hist + RANK_BUCKETS + b));
        __m512i v = here;
        v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 15));
        v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 14));
        v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 12));
        v = _mm512_add_epi32(v, _mm512_alignr_epi32(v, zero, 8));
        _mm512_store_si512(r->counted + b, zero);
        _mm512_storeu_si512(r->before + b,
                            _mm512_add_epi32(sum, _mm512_sub_epi32(v, here)));
        sum = _mm512_add_epi32(sum, _mm512_permutexvar_epi32(last, v));
    }
    r->before[RANK_BUCKETS] = (uint32_t)r->n;
}

/* Words whose fate the rank decides, in order. */
struct candidates {
    uint32_t *key, *word; /* [n + 16], key: then all ones for what stays */
    uint64_t *of;         /* which elements, as a mask */
    size_t n;
};

/* The candidates, and in mask what stays whatever its rank. */
TVK_INLINE void find_candidates(const struct rank_row *r, struct candidates *c,
                                uint64_t *mask, uint64_t low, uint64_t high)
{
    const __m512i under = _mm512_set1_epi32((int)(uint32_t)low);
    const __m512i last = _mm512_set1_epi32((int)(uint32_t)(high - 1));
    size_t n = 0;

    for (size_t i = 0; i < r->n; i += 64) {
        uint64_t word = 0;
        uint64_t open = 0;
        for (unsigned q = 0; q < 64 && i + q < r->n; q += 16) {
            const __mmask16 lanes = lanes16(i + q, r->n);
            const __m512i k = _mm512_maskz_loadu_epi32(lanes, r->keys + i + q);
            const __m512i w = _mm512_maskz_loadu_epi32(lanes, r->words + i + q);
            const __mmask16 some = _mm512_test_epi32_mask(k, k);
            const __mmask16 in = _mm512_mask_cmplt_epu32_mask(some, w, under);
            const __mmask16 maybe =
                (__mmask16)(_mm512_mask_cmple_epu32_mask(some, w, last) & ~in);
            word |= (uint64_t)in << q;
            open |= (uint64_t)maybe << q;
            _mm512_storeu_si512(c->key + n,
                                _mm512_maskz_compress_epi32(maybe, k));
            _mm512_storeu_si512(c->word + n,
                                _mm512_maskz_compress_epi32(maybe, w));
            n += tvk_popcount(maybe);
        }
        mask[i >> 6] = word;
        c->of[i >> 6] = open;
    }
    c->n = n;
}

/* The element that a candidate is; *word and *before say where the one before
 * was found. */
TVK_INLINE size_t element_of(const struct candidates *c, size_t candidate,
                             size_t *word, size_t *before)
{
    uint64_t left = c->of[*word];

    for (size_t n = tvk_popcount(left); candidate - *before >= n;
         n = tvk_popcount(left)) {
        *before += n;
        left = c->of[++*word];
    }
    for (size_t n = candidate - *before; n > 0; n--)
        left &= left - 1;
    return 64 * *word + (size_t)__builtin_ctzll(left);
}

/* Decides the candidates; 0 where sorting is faster. */
TVK_INLINE int decide(struct rank_row *r, const struct candidates *c)
{
    const __m512 by = _mm512_set1_ps(r->by);
    const __m512 from = _mm512_set1_ps(r->from);
    const __m512 slack = _mm512_set1_ps(r->slack);
    size_t word = 0;
    size_t before = 0;

    for (size_t i = 0; i < c->n; i += 16) {
        const __mmask16 lanes = lanes16(i, c->n);
        const __m512i b = _mm512_maskz_mov_epi32(
            lanes, buckets16(r, _mm512_loadu_si512(c->key + i)));
        const __m512 rank = _mm512_add_ps(
            _mm512_mul_ps(by,
                          _mm512_cvtepu32_ps(_mm512_loadu_si512(c->word + i))),
            from);
        const __m512 least =
            _mm512_cvtepi32_ps(_mm512_i32gather_epi32(b, r->before, 4));
        const __m512 beyond =
            _mm512_cvtepi32_ps(_mm512_i32gather_epi32(b, r->before + 1, 4));
        uint32_t stay = _mm512_mask_cmp_ps_mask(
            lanes, least, _mm512_add_ps(rank, slack), _CMP_GT_OQ);
        const __mmask16 go = _mm512_mask_cmp_ps_mask(
            lanes, beyond, _mm512_sub_ps(rank, slack), _CMP_LT_OQ);
        for (uint32_t open = lanes & ~(stay | go); open != 0;
             open &= open - 1) {
            const unsigned lane = (unsigned)__builtin_ctz(open);
            const int stays =
                rank_stays(r, element_of(c, i + lane, &word, &before));
            if (stays < 0)
                return 0;
            stay |= (uint32_t)stays << lane;
        }
        _mm512_storeu_si512(c->key + i, _mm512_movm_epi32((__mmask16)stay));
    }
    return 1;
}

static void rank_mask(uint64_t *TVK_RESTRICT mask, const uint32_t *keys,
                      const uint32_t *words, const struct tvk_odds *odds,
                      void *TVK_RESTRICT scratch, uint32_t most, size_t n)
{
    if (n == 0)
        return;
    const uint64_t low = tvk_odds_limit(odds, 0, n);
    const uint64_t high = tvk_odds_limit(odds, n - 1, n);
    if (high == 0 || low > UINT32_MAX || n > INT32_MAX) {
        tvk_rank_mask(mask, keys, words, odds, scratch, most, n);
        return;
    }
    struct rank_row r = rank_row_of(keys, words, odds, scratch, most, n);
    struct candidates c = {.n = 0};

    c.key = rank_part(&r.rest, n + 16);
    c.word = rank_part(&r.rest, n + 16);
    c.of = rank_part(&r.rest, 2 * ((n + 63) / 64));
    add_up(&r, fill_buckets(&r));
    find_candidates(&r, &c, mask, low, high);
    if (!decide(&r, &c)) {
        tvk_rank_mask(mask, keys, words, odds, scratch, most, n);
        return;
    }
    const uint32_t *at = c.key;
    for (size_t i = 0; i < n; i += 64) {
        uint64_t stay = 0;
        for (unsigned q = 0; q < 64; q += 16) {
            const __mmask16 of = (__mmask16)(c.of[i >> 6] >> q);
            const __m512i v =
                _mm512_maskz_expand_epi32(of, _mm512_loadu_si512(at));
            stay |= (uint64_t)_mm512_movepi32_mask(v) << q;
            at += tvk_popcount(of);
        }
        mask[i >> 6] |= stay;
    }
}

void tvk_avx512_rank(struct tvk_table *t)
{
    t->rank_mask = rank_mask;
}
