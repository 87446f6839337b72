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
