/* SPDX-License-Identifier: Apache-2.0 */
/*
 * topk.c - exact selection of the largest magnitudes in bounded memory.
 *
 * The bits of |x| order like the numbers, so two histograms (bits 30..15, then
 * bits 14..0 of the one bucket that holds the k-th) name the exact threshold
 * pattern; equal elements are then admitted by lowest index.
 *
 * All NaNs have one magnitude, the pattern right above infinity, so that no
 * payload (which differs between processors) can decide what is kept.
 */
#include "rows.h"

#include <assert.h>
#include <string.h>

#define INF_BITS 0x7f800000u

static uint32_t magnitude(const float *x, const float *b, size_t i)
{
    const float f = b != NULL ? x[i] - b[i] : x[i];
    uint32_t u = 0;
    memcpy(&u, &f, sizeof(u));
    u &= 0x7fffffffu;
    return u > INF_BITS ? INF_BITS + 1u : u;
}

static void hist_hi(uint32_t *TVK_RESTRICT hist, const float *x, const float *b,
                    size_t n)
{
    for (size_t i = 0; i < n; i++)
        hist[magnitude(x, b, i) >> 15]++;
}

static void hist_lo(uint32_t *TVK_RESTRICT hist, uint32_t hi, const float *x,
                    const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const uint32_t m = magnitude(x, b, i);
        if (m >> 15 == hi)
            hist[m & 0x7fffu]++;
    }
}

static uint64_t hist_range(uint32_t *TVK_RESTRICT hist, uint32_t first,
                           uint32_t width, const float *x, const float *b,
                           size_t n)
{
    uint64_t above = 0;

    assert(first > 0 && width <= 0x80000000u - first);
    for (size_t i = 0; i < n; i++) {
        const uint32_t m = magnitude(x, b, i);
        if (m < first)
            continue;
        if (m - first < width)
            hist[m - first]++;
        else
            above++;
    }
    return above;
}

static uint64_t count_eq(const float *x, const float *b, uint32_t pattern,
                         size_t n)
{
    uint64_t count = 0;
    for (size_t i = 0; i < n; i++)
        count += magnitude(x, b, i) == pattern;
    return count;
}

static uint32_t magnitudes(uint32_t *TVK_RESTRICT dst, const float *x,
                           const float *b, size_t n)
{
    uint32_t most = 0;
    for (size_t i = 0; i < n; i++) {
        dst[i] = magnitude(x, b, i);
        most = dst[i] > most ? dst[i] : most;
    }
    return most;
}

static uint64_t topk_mask(uint64_t *TVK_RESTRICT mask, const float *x,
                          const float *b, uint32_t pattern, uint64_t *eq_seen,
                          uint64_t eq_limit, size_t n)
{
    uint64_t seen = *eq_seen;
    uint64_t kept = 0;

    for (size_t i = 0; i < n; i++) {
        if (i % 64 == 0)
            mask[i >> 6] = 0;
        const uint32_t m = magnitude(x, b, i);
        int keep = m > pattern;
        if (m == pattern) {
            keep = seen < eq_limit;
            seen++;
        }
        if (keep && m != 0) {
            mask[i >> 6] |= UINT64_C(1) << (i & 63);
            kept++;
        }
    }
    *eq_seen = seen;
    return kept;
}

/* A word's worth of numbers, widened. */
static size_t widen(float *dst, const void *src, size_t from, size_t n)
{
    const size_t some = n - from < 64 ? n - from : 64;

    for (size_t i = 0; i < some; i++) {
        uint16_t h = 0;
        memcpy(&h, (const unsigned char *)src + 2 * (from + i), sizeof(h));
        const uint32_t u = (uint32_t)h << 16;
        memcpy(&dst[i], &u, sizeof(u));
    }
    return some;
}

static uint64_t hist_range_bf16(uint32_t *TVK_RESTRICT hist, uint32_t first,
                                uint32_t width, const void *x, const void *b,
                                size_t n)
{
    float xs[64], bs[64];
    uint64_t above = 0;

    for (size_t i = 0; i < n; i += 64) {
        (void)widen(xs, x, i, n);
        const size_t some = widen(bs, b, i, n);
        above += hist_range(hist, first, width, xs, bs, some);
    }
    return above;
}

static uint64_t topk_mask_bf16(uint64_t *TVK_RESTRICT mask, const void *x,
                               const void *b, uint32_t pattern,
                               uint64_t *eq_seen, uint64_t eq_limit, size_t n)
{
    float xs[64], bs[64];
    uint64_t kept = 0;

    for (size_t i = 0; i < n; i += 64) {
        (void)widen(xs, x, i, n);
        const size_t some = widen(bs, b, i, n);
        kept +=
            topk_mask(mask + i / 64, xs, bs, pattern, eq_seen, eq_limit, some);
    }
    return kept;
}

void tvk_ref_topk(struct tvk_table *t)
{
    t->hist_range_bf16 = hist_range_bf16;
    t->topk_mask_bf16 = topk_mask_bf16;
    t->hist_hi = hist_hi;
    t->hist_lo = hist_lo;
    t->hist_range = hist_range;
    t->count_eq = count_eq;
    t->magnitudes = magnitudes;
    t->topk_mask = topk_mask;
}
