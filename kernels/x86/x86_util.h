/* SPDX-License-Identifier: Apache-2.0 */
/*
 * x86_util.h - small helpers of the x86-64 rows; no intrinsics here.
 */
#ifndef TVK_X86_UTIL_H
#define TVK_X86_UTIL_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* For bodies whose flags become constants in each caller. */
#define TVK_INLINE static inline __attribute__((always_inline))

/* How to divide by a number that is the same for all elements. */
struct tvk_divide {
    int is_none;       /* by one: leave the value alone */
    int is_reciprocal; /* multiply by `by` instead */
    double by;
};

/*
 * A power of two has an exact reciprocal, so the product and the quotient are
 * the same real number, rounded once: same bits, without the slow division.
 */
static inline struct tvk_divide tvk_divide_by(double divisor)
{
    struct tvk_divide r = {divisor == 1.0, 0, divisor};
    uint64_t bits = 0;

    memcpy(&bits, &divisor, sizeof(bits));
    const uint64_t exponent = bits >> 52 & 0x7ffu;
    if ((bits & 0xfffffffffffffu) == 0 && exponent >= 2 && exponent <= 2044) {
        r.is_reciprocal = 1;
        r.by = 1.0 / divisor;
    }
    return r;
}

/* Bits of a power of two p and of 1 / p add up to this. */
#define TVK_POWER_BITS INT64_C(0x7fe0000000000000)

/* Does adding up any of a few weights, in order, give 0 or a power of two that
 * tvk_divide_by can multiply by? Two equal weights do when one does. */
static inline int tvk_by_powers(const double *weight, size_t n)
{
    if (n > 3)
        return 0;
    for (unsigned some = 1; some < 1u << n; some++) {
        double sum = 0.0;
        for (size_t j = 0; j < n; j++)
            if (some >> j & 1u)
                sum = sum + weight[j];
        const struct tvk_divide d = tvk_divide_by(sum);
        if (sum != 0.0 && !d.is_none && !d.is_reciprocal)
            return 0;
    }
    return 1;
}

/* Bits i .. i+7 of a mask; i is a multiple of 8. */
static inline uint8_t tvk_mask_8(const uint64_t *mask, size_t i)
{
    uint8_t v = 0;
    memcpy(&v, (const unsigned char *)mask + i / 8, sizeof(v));
    return v;
}

/* Bits i .. i+15 of a mask; i is a multiple of 16. */
static inline uint16_t tvk_mask_16(const uint64_t *mask, size_t i)
{
    uint16_t v = 0;
    memcpy(&v, (const unsigned char *)mask + i / 8, sizeof(v));
    return v;
}

/* The lowest n bits set, n from 0 to 64. */
static inline uint64_t tvk_low_bits(size_t n)
{
    return n >= 64 ? ~UINT64_C(0) : (UINT64_C(1) << n) - 1;
}

/*
 * Begins to bring in what the next call will read. Models are read through
 * mappings in blocks of several inputs by turns, so the processor, which looks
 * ahead within a page only, sees a new stream every 4 KiB. Reading ahead never
 * faults: the address may lie behind the end of the array, or nowhere.
 */
#define TVK_AHEAD_BYTES 4096u

static inline void tvk_read_ahead(const void *at)
{
    __builtin_prefetch(
        (const void *)((uintptr_t)at + TVK_AHEAD_BYTES)); /* not an object */
}

/* Counts four buckets, every other one in `other`, which may be hist. */
TVK_INLINE void tvk_count_four(uint32_t *hist, uint32_t *other,
                               const uint16_t *bucket)
{
    uint64_t four = 0;

    memcpy(&four, bucket, sizeof(four));
    hist[four & 0xffff]++;
    other[four >> 16 & 0xffff]++;
    hist[four >> 32 & 0xffff]++;
    other[four >> 48]++;
}

/* Counting waits for nothing, so memory brings what comes next meanwhile: x and
 * b (NULL: none) are where these buckets come from. */
TVK_INLINE void tvk_count_buckets(uint32_t *TVK_RESTRICT hist,
                                  const uint16_t *bucket, size_t n,
                                  const float *x, const float *b)
{
    size_t i = 0;

    for (; i + 16 <= n; i += 16) {
        tvk_read_ahead(x + i);
        if (b != NULL)
            tvk_read_ahead(b + i);
        for (size_t k = 0; k < 16; k += 4)
            tvk_count_four(hist, hist, bucket + i + k);
    }
    for (; i < n; i++)
        hist[bucket[i]]++;
}

static inline unsigned tvk_popcount(uint64_t v)
{
    return (unsigned)__builtin_popcountll(v);
}

/* The lowest n bits that are set in v. */
static inline uint64_t tvk_lowest_set(uint64_t v, uint64_t n)
{
    uint64_t kept = 0;
    for (; n > 0 && v != 0; n--) {
        kept |= v & (~v + 1);
        v &= v - 1;
    }
    return kept;
}

#endif
