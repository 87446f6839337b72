/* SPDX-License-Identifier: Apache-2.0 */
/*
 * select.c - see select.h.
 */
#include "select.h"

void tvm_hist_join(uint32_t *hist, size_t stride, unsigned n_workers,
                   uint32_t n_buckets)
{
    for (unsigned w = 1; w < n_workers; w++) {
        const uint32_t *more = hist + (size_t)w * stride;
        for (uint32_t i = 0; i < n_buckets; i++)
            hist[i] += more[i];
    }
}

uint32_t tvm_hist_find(const uint32_t *hist, uint32_t n_buckets, uint64_t *k,
                       uint64_t *count)
{
    for (uint32_t i = n_buckets; i-- > 1;) {
        if (*k <= hist[i]) {
            *count = hist[i];
            return i;
        }
        *k -= hist[i];
    }
    *count = hist[0];
    return 0;
}

bool tvm_range_find(const uint32_t *hist, uint64_t rank, uint32_t width,
                    uint32_t *first)
{
    const uint32_t half = width >> 16; /* buckets of HIGH */
    uint64_t n = 0;
    uint64_t count = 0;

    for (size_t i = 0; i < TVK_HIST_HI; i++)
        n += hist[i];
    if (rank > n)
        rank = n;
    if (rank < 1)
        rank = 1;
    const uint32_t hi = tvm_hist_find(hist, TVK_HIST_HI, &rank, &count);
    if (hi <= half)
        return false;
    /* Ranks count from the top of the bucket. */
    const double down = (double)rank / (double)count;
    *first = ((hi - half + 1) << 15) - (uint32_t)(down * (double)(1u << 15));
    return true;
}

/* ---- atoms ---------------------------------------------------------------
 * All multiples of 2^TVM_ATOM_SHIFT in the range. */

static uint32_t first_atom(uint32_t first)
{
    const uint32_t step = 1u << TVM_ATOM_SHIFT;

    return (first + step - 1) & ~(step - 1);
}

void tvm_atoms_begin(uint32_t *atoms, const uint32_t *hist, uint32_t first,
                     uint32_t width)
{
    const uint32_t *at = hist + (first_atom(first) - first);

    for (size_t i = 0; i < tvm_atoms(width); i++)
        atoms[i] = 0 - at[i << TVM_ATOM_SHIFT];
}

void tvm_atoms_end(uint32_t *atoms, const uint32_t *hist, uint32_t first,
                   uint32_t width)
{
    const uint32_t *at = hist + (first_atom(first) - first);

    for (size_t i = 0; i < tvm_atoms(width); i++)
        atoms[i] += at[i << TVM_ATOM_SHIFT];
}

bool tvm_atom_find(uint32_t first, uint32_t pattern, size_t *at)
{
    *at = (pattern - first_atom(first)) >> TVM_ATOM_SHIFT;
    return pattern == first_atom(pattern);
}
