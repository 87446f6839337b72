/* SPDX-License-Identifier: Apache-2.0 */
/*
 * avx512_table.c - the AVX-512 row: one line per operation file that exists.
 */
#include "x86/x86_rows.h"

void tvk_row_avx512(struct tvk_table *t)
{
    tvk_avx512_convert(t);
    tvk_avx512_linear(t);
    tvk_avx512_gta(t);
    tvk_avx512_topk(t);
    tvk_avx512_philox(t);
    tvk_avx512_dots(t);
    tvk_avx512_stats(t);
    tvk_avx512_lowrank(t);
    tvk_avx512_rank(t);
    tvk_avx512_variance(t);
    tvk_avx512_swap(t);
    tvk_avx512_divergence(t);
}
