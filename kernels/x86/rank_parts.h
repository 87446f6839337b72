/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rank_parts.h - rank_mask without sorting (private; no intrinsics).
 *
 * The odds rise with the rank, so a word below those of the first rank stays
 * whatever the rank, and one from those of the last rank on goes. Of the
 * others, the candidates, buckets of equal upper key bits tell between which
 * ranks they lie, which decides nearly all: a word stays from some rank on,
 * which a linear function gives to within `slack`.
 *
 *      first rank that stays  R(word) = by word + from
 *      stays  when the lowest rank of the bucket is above R + slack
 *      goes   when the highest is below R - slack
 *
 * The rest have their rank counted: of equal keys with nothing but zeros below
 * the bucket's bits (differences of bf16 numbers mostly are) none of the bucket
 * is lower, so the equal ones ahead are the rank, and each such key is counted
 * through the row once. Other ones are compared with the whole row. Where that
 * comes to more than sorting the row, the row is sorted.
 */
#ifndef TVK_RANK_PARTS_H
#define TVK_RANK_PARTS_H

#include "ref/rank.h"
#include "x86/x86_util.h"

/* Upper 15 key bits, counted down from the largest key; what is smaller than
 * 2^-8 of that shares bucket 0. */
#define RANK_BUCKETS 1024u
#define RANK_SHIFT   16u
#define RANK_LOW     0xffffu
/* Keys that may be looked at for ranks, per element of the row: about what
 * sorting costs. */
#define RANK_LOOKS   128u

_Static_assert(TVK_RANK_FIXED >= 5 * RANK_BUCKETS * sizeof(uint32_t) + 1024 &&
                   TVK_RANK_EACH >= 2 * sizeof(uint32_t) + 1,
               "see struct rank_row");

struct rank_row {
    const uint32_t *keys, *words;
    const struct tvk_odds *odds;
    size_t n, looks; /* looks: left */
    uint32_t first;  /* upper bits of bucket 1, less one */
    float by, from, slack;
    uint32_t *hist;   /* [2][RANK_BUCKETS], to be cleared, then added */
    uint32_t *before; /* [RANK_BUCKETS + 1] entries of lower buckets */
    /* Of the key of a bucket whose lower bits are zeros: entries counted among
     * the first so many. */
    uint32_t *n_equal, *counted; /* [RANK_BUCKETS], n_equal where counted */
    unsigned char *rest;         /* of scratch, aligned to 64 */
};

/* Number of n keys that equal `key`, which is not 0; that are below it. */
TVK_INLINE size_t count_equal(const uint32_t *keys, uint32_t key, size_t n);
TVK_INLINE size_t count_lower(const uint32_t *keys, uint32_t key, size_t n);

static inline void *rank_part(unsigned char **at, size_t n)
{
    void *const p = *at;
    *at += (n * sizeof(uint32_t) + 63) & ~(size_t)63;
    return p;
}

TVK_INLINE struct rank_row rank_row_of(const uint32_t *keys,
                                       const uint32_t *words,
                                       const struct tvk_odds *odds,
                                       void *scratch, uint32_t most, size_t n)
{
    unsigned char *at = scratch;
    const uint32_t top = most >> RANK_SHIFT;
    /* Ranks of a row from the smallest to the largest odds. */
    const double ranks = (double)(n - 1) / odds->span;
    struct rank_row r = {
        .keys = keys,
        .words = words,
        .odds = odds,
        .n = n,
        .looks = RANK_LOOKS * n,
        .first = top < RANK_BUCKETS ? 0 : top - (RANK_BUCKETS - 1),
        .by = (float)(ranks / 4294967296.0),
        .from = (float)(-odds->least * ranks),
        /* Some 16 times what roundings to fp32 and of the limits come to. */
        .slack = (float)(((ranks * (1.0 + odds->least) + (double)n)) * 0x1p-20 +
                         ranks * 0x1p-30 + 0x1p-8),
    };

    r.hist = rank_part(&at, (size_t)2 * RANK_BUCKETS);
    r.before = rank_part(&at, RANK_BUCKETS + 1);
    r.n_equal = rank_part(&at, RANK_BUCKETS);
    r.counted = rank_part(&at, RANK_BUCKETS);
    r.rest = at;
    return r;
}

TVK_INLINE uint32_t rank_bucket(const struct rank_row *r, uint32_t key)
{
    const uint32_t high = key >> RANK_SHIFT;
    return high > r->first ? high - r->first : 0;
}

/* Neighbours of one bucket, as they are where few values occur, would wait for
 * each other's store: hence two histograms. */
TVK_INLINE void rank_count_buckets(const struct rank_row *r,
                                   const uint16_t *bucket, size_t n)
{
    size_t i = 0;

    for (; i + 4 <= n; i += 4)
        tvk_count_four(r->hist, r->hist + RANK_BUCKETS, bucket + i);
    for (; i < n; i++)
        r->hist[bucket[i]]++;
}

/* Does entry i, of a key that is not 0, stay? Its rank is counted. Negative:
 * that would take too long. */
TVK_INLINE int rank_stays(struct rank_row *r, size_t i)
{
    const uint32_t key = r->keys[i];
    const uint32_t b = rank_bucket(r, key);
    size_t rank = 0;
    size_t looks = 0;

    if (b > 0 && (key & RANK_LOW) == 0) {
        const size_t from = r->counted[b]; /* never above i: see rank_mask */
        looks = i - from;
        if (looks > r->looks)
            return -1;
        if (from == 0)
            r->n_equal[b] = 0;
        r->n_equal[b] += (uint32_t)count_equal(r->keys + from, key, looks);
        r->counted[b] = (uint32_t)i;
        rank = r->before[b] + r->n_equal[b];
    } else {
        looks = r->n;
        if (looks > r->looks)
            return -1;
        rank = count_lower(r->keys, key + 1, i) +
               count_lower(r->keys + i + 1, key, r->n - i - 1);
    }
    r->looks -= looks;
    return r->words[i] < tvk_odds_limit(r->odds, rank, r->n);
}

#endif
