/* SPDX-License-Identifier: Apache-2.0 */
/*
 * select.h - order statistics of a stream of magnitudes in two passes (private
 * to merge/).
 *
 * The bits of |v| order like the numbers. HIGH counts the upper 16 bits (bucket
 * of the wanted entry), LOW the lower 15 bits inside that bucket: its exact
 * pattern. Histograms are per worker and joined; integers, so any order.
 *
 * In one pass, mostly: a histogram of HIGH over a sample tells about where the
 * wanted entry lies, and a RANGE of patterns around there is counted one by
 * one, with what lies above. A sample decides how long it takes, never what is
 * found: outside the range the other two passes follow.
 *
 * Which of the entries equal to the pattern found are kept depends on how many
 * each tile has. A pass to count them is saved for patterns with nine zeros at
 * the end, ATOMS: differences of 16-bit numbers heap up there, and nowhere else
 * are many equal. What a worker's histogram gains at each atom of the range
 * while it is busy with a tile is kept for the tile.
 */
#ifndef TVM_SELECT_H
#define TVM_SELECT_H

#include <stdbool.h>
#include <stdint.h>

#include "method.h"

/* Adds the histograms of workers 1.. to that of worker 0; hist [n_workers]
 * [stride]. */
void tvm_hist_join(uint32_t *hist, size_t stride, unsigned n_workers,
                   uint32_t n_buckets);
/* The bucket of the k-th largest entry, k from 1; *k becomes its rank inside
 * the bucket, *count the bucket's population. */
uint32_t tvm_hist_find(const uint32_t *hist, uint32_t n_buckets, uint64_t *k,
                       uint64_t *count);

/* The range of `width` patterns around the entry that has the rank'th place
 * (from 1) in the sample that hist [TVK_HIST_HI] is of; false where it would
 * reach down to zeros, of which there may be very many. */
bool tvm_range_find(const uint32_t *hist, uint64_t rank, uint32_t width,
                    uint32_t *first);

#define TVM_ATOM_SHIFT 9u

/* Atoms of any range of `width` patterns, a multiple of 2^TVM_ATOM_SHIFT. */
static inline size_t tvm_atoms(uint32_t width)
{
    return width >> TVM_ATOM_SHIFT;
}
/* Around a tile: atoms [tvm_atoms(width)] become what hist, the worker's counts
 * of the range, gains in between. */
void tvm_atoms_begin(uint32_t *atoms, const uint32_t *hist, uint32_t first,
                     uint32_t width);
void tvm_atoms_end(uint32_t *atoms, const uint32_t *hist, uint32_t first,
                   uint32_t width);
/* Place of a pattern of the range among its atoms; false when it is none. */
bool tvm_atom_find(uint32_t first, uint32_t pattern, size_t *at);

#endif
