/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rank.c - random thinning whose odds rise with the rank of an element (DELLA,
 * Deep et al. 2024, 2406.11617): the row is sorted, stable, by three counting
 * passes over 11 bits of the keys each.
 */
#include "rows.h"

#include <string.h>

#include "ref/rank.h"

#define RADIX_BITS    11u
#define RADIX_BUCKETS (1u << RADIX_BITS)

_Static_assert(2 * sizeof(struct tvk_ranked) == TVK_RANK_EACH, "see kernels.h");

const struct tvk_ranked *tvk_rank_sort(struct tvk_ranked *entries,
                                       const uint32_t *keys, size_t n)
{
    struct tvk_ranked *from = entries;
    struct tvk_ranked *to = entries + n;
    uint32_t count[RADIX_BUCKETS];

    for (size_t i = 0; i < n; i++)
        from[i] = (struct tvk_ranked){keys[i], (uint32_t)i};
    for (unsigned shift = 0; shift < 31; shift += RADIX_BITS) {
        uint32_t before = 0;
        memset(count, 0, sizeof count);
        for (size_t i = 0; i < n; i++)
            count[from[i].key >> shift & (RADIX_BUCKETS - 1)]++;
        for (size_t b = 0; b < RADIX_BUCKETS; b++) {
            const uint32_t here = count[b];
            count[b] = before;
            before += here;
        }
        for (size_t i = 0; i < n; i++)
            to[count[from[i].key >> shift & (RADIX_BUCKETS - 1)]++] = from[i];
        struct tvk_ranked *const other = from;
        from = to;
        to = other;
    }
    return from;
}

void tvk_rank_mask(uint64_t *TVK_RESTRICT mask, const uint32_t *keys,
                   const uint32_t *words, const struct tvk_odds *odds,
                   void *TVK_RESTRICT scratch, uint32_t most, size_t n)
{
    const struct tvk_ranked *sorted = tvk_rank_sort(scratch, keys, n);

    (void)most;
    memset(mask, 0, (n + 63) / 64 * sizeof *mask);
    for (size_t r = 0; r < n; r++) {
        const size_t i = sorted[r].at;
        if (keys[i] != 0 && words[i] < tvk_odds_limit(odds, r, n))
            mask[i / 64] |= UINT64_C(1) << (i % 64);
    }
}

void tvk_ref_rank(struct tvk_table *t)
{
    t->rank_mask = tvk_rank_mask;
}
