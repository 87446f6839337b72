/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ref_table.c - the reference row: every entry, scalar, on any processor.
 */
#include "rows.h"

#include <float.h>

/* Excess precision (x87) would break the bit-for-bit promise of kernels.h. */
_Static_assert(FLT_EVAL_METHOD == 0, "float and double must not be widened");
_Static_assert(sizeof(float) == 4 && FLT_MANT_DIG == 24, "IEEE binary32");
_Static_assert(sizeof(double) == 8 && DBL_MANT_DIG == 53, "IEEE binary64");

void tvk_row_ref(struct tvk_table *t)
{
    t->isa = TVK_REF;
    t->name = "ref";
    tvk_ref_convert(t);
    tvk_ref_linear(t);
    tvk_ref_gta(t);
    tvk_ref_topk(t);
    tvk_ref_philox(t);
    tvk_ref_dots(t);
    tvk_ref_stats(t);
    tvk_ref_lowrank(t);
    tvk_ref_rank(t);
    tvk_ref_swap(t);
    tvk_ref_variance(t);
    tvk_ref_divergence(t);
}
