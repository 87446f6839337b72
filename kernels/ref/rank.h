/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rank.h - the odds of a rank, and the reference of rank_mask, which other rows
 * fall back to (private).
 */
#ifndef TVK_REF_RANK_H
#define TVK_REF_RANK_H

#include "tv/kernels.h"

/* Words below it stay; p is from 0 to 1. Rounds half up. */
static inline uint64_t tvk_odds_limit(const struct tvk_odds *odds, size_t rank,
                                      size_t n)
{
    const double p =
        n == 1 ? odds->least
               : odds->least + odds->span * (double)rank / (double)(n - 1);
    const double v = p * 4294967296.0;
    const uint64_t whole = (uint64_t)v;
    return whole + (v - (double)whole >= 0.5);
}

void tvk_rank_mask(uint64_t *TVK_RESTRICT mask, const uint32_t *keys,
                   const uint32_t *words, const struct tvk_odds *odds,
                   void *TVK_RESTRICT scratch, uint32_t most, size_t n);

#endif
