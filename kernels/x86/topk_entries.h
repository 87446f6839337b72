/* SPDX-License-Identifier: Apache-2.0 */
/*
 * topk_entries.h - what topk_avx2.c and topk_avx512.c do in the same way: the
 * words of a mask one after the other, and the entries of the table, each of
 * which is an inline body called with what is a constant there (private; to be
 * included behind these bodies).
 *
 * Of the including file:
 *   hist_hi_any, hist_lo_any, count_eq_any, magnitudes_any   b may be NULL
 *   hist_range_any   with values
 *   topk_word        elements [i, i + 64) as a word, of which there are n - i;
 *                    is_whole: all of them
 */
#ifndef TVK_TOPK_ENTRIES_H
#define TVK_TOPK_ENTRIES_H

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

static void hist_hi(uint32_t *TVK_RESTRICT hist, const float *x, const float *b,
                    size_t n)
{
    if (b != NULL)
        hist_hi_any(hist, x, b, n);
    else
        hist_hi_any(hist, x, NULL, n);
}

static void hist_lo(uint32_t *TVK_RESTRICT hist, uint32_t hi, const float *x,
                    const float *b, size_t n)
{
    if (b != NULL)
        hist_lo_any(hist, hi, x, b, n);
    else
        hist_lo_any(hist, hi, x, NULL, n);
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

static uint64_t count_eq(const float *x, const float *b, uint32_t pattern,
                         size_t n)
{
    return b != NULL ? count_eq_any(x, b, pattern, n)
                     : count_eq_any(x, NULL, pattern, n);
}

static uint32_t magnitudes(uint32_t *TVK_RESTRICT dst, const float *x,
                           const float *b, size_t n)
{
    return b != NULL ? magnitudes_any(dst, x, b, n)
                     : magnitudes_any(dst, x, NULL, n);
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

static void topk_fill(struct tvk_table *t)
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

#endif
