/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gta_quick.h - merges of bf16 with election in fp32, where that is enough to
 * know what fp64 gives (private; no intrinsics here).
 *
 * The result has 8 bits, fp32 has 24: nearly always an fp32 estimate and a
 * bound of its error say which bf16 the reference (kernels.h) rounds to. fp32
 * has twice the lanes of fp64, and a bf16 is one as it stands. Elements that
 * stay in doubt are put aside and merged in fp64, together.
 *
 * With u = 2^-24, n donors, c_j the coefficient in fp32:
 * - d_j = x_j - b is 0 or has the right sign, and is within u of it (times its
 *   size, as all that follows); D_j = d_j * c_j within 3 u.
 * - S = sum of D_j is within n (n + 2) u of the largest |D_j|. Let the largest
 *   without the last be L. |S| of at least 2^-16 L has the sign of the exact
 *   sum: for |D_n| up to 4 L its error is below that, and larger ones outweigh
 *   all others. The sign says who agrees, and that is the divisor.
 * - All that agree have one sign: their sum is within (n + 2) u. It is
 *   multiplied by lambda / divisor, from a table of all sets of donors: within
 *   (n + 4) u, both roundings included. There are two tables, TVK_QUICK_ULPS u
 *   too low and too high.
 * - So m of the reference lies between the two, with more than u of it to
 *   spare, and b + m between the estimates, as rounding keeps order. (To round
 *   to fp64 first moves it by 2^-53, less than what is spared, unless m is
 *   below 2^-28 b: then all three are b in fp32.) Where both estimates round to
 *   the same bf16, that is the result.
 * - A sum of nobody is +0, and its factor -1: so b stays as it is, -0 too.
 * - Sure are therefore elements with a sure sign (no NaN has one), estimates
 *   that round alike, and a product of the estimates that is finite and above
 *   2^-100, or where nobody agrees just finite. What underflow takes away then
 *   does not matter: coefficients and factors are between 2^-16 and 2^16, so it
 *   does only where D is below 2^-126 and m below 2^-92, thus b above 2^-51,
 *   and what it takes (2^-150) is less than u of any x - b but 0. Nor does D
 *   underflow to 0: d is at least 2^-133.
 */
#ifndef TVK_GTA_QUICK_H
#define TVK_GTA_QUICK_H

#include "tv/kernels.h"

#define TVK_QUICK_DONORS      4u
#define TVK_QUICK_DONORS_AVX2 3u
#define TVK_QUICK_SETS        (1u << TVK_QUICK_DONORS)
#define TVK_QUICK_ULPS(n)     ((double)(n) + 6.0)
/* |S| of this much of L has a sign. */
#define TVK_QUICK_SURE        0x1p-16f
/* To be added to the product of the estimates, which is to be above 0 then. */
#define TVK_QUICK_NOBODY      1.0f
#define TVK_QUICK_SOMEBODY    (-0x1p-100f)

/* Elements in doubt, laid out for a row's gta. */
#define TVK_DOUBTS            64u

struct tvk_doubts {
    size_t count;
    size_t at[TVK_DOUBTS];
    uint64_t kept[TVK_QUICK_DONORS];
    float b[TVK_DOUBTS], x[TVK_QUICK_DONORS][TVK_DOUBTS];
};

/* A call of gta_bf16. */
struct tvk_quick {
    enum tvk_isa row;
    unsigned char *dst;
    const unsigned char *b;
    const unsigned char *const *x;
    const uint64_t *const *masks;
    const struct tvk_gta *p;
    /* Factors by who agrees, donor j being bit j. */
    float coef[TVK_QUICK_DONORS];
    float low[TVK_QUICK_SETS], high[TVK_QUICK_SETS];
    struct tvk_doubts *doubts;
    size_t n_doubts; /* in all */
    uint64_t bad;    /* of those settled: NaN or infinite */
};

/* What a row brings along. */
struct tvk_quick_row {
    enum tvk_isa isa;
    size_t most_donors;
    /* How many elements, a multiple of 64, it did; the rest is left. */
    size_t (*quick)(struct tvk_quick *q, size_t n);
    /* In fp64, elements from `from`, a multiple of 64, to n; how many results
     * are NaN or infinite. */
    uint64_t (*in_fp64)(void *TVK_RESTRICT dst, const void *b,
                        const void *const *x, const uint64_t *const *masks,
                        const struct tvk_gta *p, size_t from, size_t n);
};

/* gta_bf16 of a row: quick where that can be, in fp64 else. */
uint64_t tvk_quick_gta(const struct tvk_quick_row *row, void *TVK_RESTRICT dst,
                       const void *b, const void *const *x,
                       const uint64_t *const *masks, const struct tvk_gta *p,
                       size_t n);

/* Those of elements i .. i+15 are in doubt whose bit is set. */
void tvk_quick_doubt(struct tvk_quick *q, unsigned which, size_t i);

/* Writes the results of all in doubt. */
void tvk_quick_settle(struct tvk_quick *q);

/* Is fp64 for all better, as n elements have shown? One in doubt costs some
 * forty times what a sure one does, and fp64 twice. */
static inline int tvk_quick_is_slow(const struct tvk_quick *q, size_t n)
{
    return q->n_doubts > 16 + n / 48;
}

/* `quick` of the rows. */
size_t tvk_avx512_quick(struct tvk_quick *q, size_t n);
size_t tvk_avx2_quick(struct tvk_quick *q, size_t n);

#endif
