/* SPDX-License-Identifier: Apache-2.0 */
/*
 * x86_rows.h - the operation files of the x86-64 rows (private).
 *
 * Only code that runs after tvk_cpu_supports said yes may call these.
 */
#ifndef TVK_X86_ROWS_H
#define TVK_X86_ROWS_H

#include "tv/kernels.h"

/* Needs POPCNT, F16C, AVX2. */
void tvk_row_avx2(struct tvk_table *t);
void tvk_avx2_convert(struct tvk_table *t);
void tvk_avx2_linear(struct tvk_table *t);
void tvk_avx2_gta(struct tvk_table *t);
void tvk_avx2_topk(struct tvk_table *t);
void tvk_avx2_philox(struct tvk_table *t);
void tvk_avx2_dots(struct tvk_table *t);
void tvk_avx2_stats(struct tvk_table *t);
void tvk_avx2_lowrank(struct tvk_table *t);
void tvk_avx2_rank(struct tvk_table *t);
void tvk_avx2_swap(struct tvk_table *t);
void tvk_avx2_variance(struct tvk_table *t);
void tvk_avx2_divergence(struct tvk_table *t);

/* Needs the above and AVX512F, BW, DQ, VL. */
void tvk_row_avx512(struct tvk_table *t);
void tvk_avx512_convert(struct tvk_table *t);
void tvk_avx512_linear(struct tvk_table *t);
void tvk_avx512_gta(struct tvk_table *t);
void tvk_avx512_topk(struct tvk_table *t);
void tvk_avx512_philox(struct tvk_table *t);
void tvk_avx512_dots(struct tvk_table *t);
void tvk_avx512_stats(struct tvk_table *t);
void tvk_avx512_lowrank(struct tvk_table *t);
void tvk_avx512_rank(struct tvk_table *t);
void tvk_avx512_variance(struct tvk_table *t);
void tvk_avx512_swap(struct tvk_table *t);
void tvk_avx512_divergence(struct tvk_table *t);

#endif
