/* SPDX-License-Identifier: Apache-2.0 */
/*
 * topk_parts.h - what the words of a mask of magnitudes are made with, in each
 * ISA (private to topk_avx2.c and topk_avx512.c).
 */
#ifndef TVK_TOPK_PARTS_H
#define TVK_TOPK_PARTS_H

#include "x86/x86_util.h"

/* Values to compare: x, x - b, or x - b of bf16. */
enum values { PLAIN, MINUS, MINUS_BF16 };

struct topk {
    uint32_t pattern;
    uint64_t seen, limit; /* of elements equal to it */
};

/* The equal ones of a word that are kept. */
TVK_INLINE uint64_t topk_keep_equal(struct topk *t, uint64_t equal)
{
    const unsigned n_equal = tvk_popcount(equal);
    const uint64_t room = t->seen < t->limit ? t->limit - t->seen : 0;

    t->seen += n_equal;
    if (t->pattern == 0 || room == 0)
        return 0;
    return room < n_equal ? tvk_lowest_set(equal, room) : equal;
}

#endif
