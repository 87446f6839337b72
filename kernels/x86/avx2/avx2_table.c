/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avx2_table.c - the AVX2 row: one line per operation file that exists.
 */
#include "x86/x86_rows.h"

void tvk_row_avx2(struct tvk_table *t)
{
    tvk_avx2_convert(t);
    tvk_avx2_linear(t);
    tvk_avx2_gta(t);
    tvk_avx2_topk(t);
    tvk_avx2_philox(t);
    tvk_avx2_dots(t);
    tvk_avx2_stats(t);
    tvk_avx2_lowrank(t);
    tvk_avx2_rank(t);
    tvk_avx2_swap(t);
    tvk_avx2_variance(t);
    tvk_avx2_divergence(t);
}
