/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rows.h - how the rows of the kernel table are put together (private).
 *
 * Each operation file keeps its functions static and exports one function that
 * writes its entries into a table. The reference row sets every entry; a row
 * of a wider ISA starts as a copy of the row below it and overrides what it
 * has, so an operation without a vector version falls back by itself.
 */
#ifndef TVK_ROWS_H
#define TVK_ROWS_H

#include "tv/kernels.h"

/* kernels/ref */
void tvk_ref_convert(struct tvk_table *t);
void tvk_ref_linear(struct tvk_table *t);
void tvk_ref_gta(struct tvk_table *t);
void tvk_ref_topk(struct tvk_table *t);
void tvk_ref_philox(struct tvk_table *t);
void tvk_ref_dots(struct tvk_table *t);
void tvk_ref_stats(struct tvk_table *t);
void tvk_ref_lowrank(struct tvk_table *t);
void tvk_ref_rank(struct tvk_table *t);
void tvk_ref_swap(struct tvk_table *t);
void tvk_ref_variance(struct tvk_table *t);
void tvk_ref_divergence(struct tvk_table *t);
/* Elements of a piece of gta_bf16 that stays in the L1 cache; floats of it, of
 * all inputs together. */
#define TVK_PIECE_ELEMS  256u
#define TVK_PIECE_FLOATS ((TVK_DONORS_MAX + 1) * 64u)
static inline size_t tvk_piece_elems(size_t n_donors)
{
    const size_t most = TVK_PIECE_FLOATS / (n_donors + 1) / 64 * 64;
    return most < TVK_PIECE_ELEMS ? most : TVK_PIECE_ELEMS;
}
/* The gta_bf16 of a row by its conversions and its gta. */
uint64_t tvk_gta_by_pieces(enum tvk_isa row, void *TVK_RESTRICT dst,
                           const void *b, const void *const *x,
                           const uint64_t *const *masks,
                           const struct tvk_gta *p, size_t n);
/* Sums of weights up to this are what rounding leaves of weights that cancel
 * (0.1 + 0.2 - 0.3): they divide nothing, as 0 does. Weights of one sign cancel
 * never: 0. */
double tvk_gta_least_divisor(const struct tvk_gta *p);
/* Fills the whole row. */
void tvk_row_ref(struct tvk_table *t);

/* cpu_<arch>.c: what this processor and its operating system can run. */
int tvk_cpu_supports(enum tvk_isa isa);
/* Overrides the entries of *t with those of a supported isa. */
void tvk_cpu_override(enum tvk_isa isa, struct tvk_table *t);
/* Name of the i-th feature that is present, NULL when i is past the last. */
const char *tvk_cpu_feature(unsigned i);

#endif
