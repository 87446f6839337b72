/* SPDX-License-Identifier: Apache-2.0 */
/*
 * select.h - order statistics of a stream of magnitudes in two passes (private
 * to merge/).
 *
 * The bits of |v| order like the numbers. HIGH counts the upper 16 bits (bucket
 * of the wanted entry), LOW the lower 15 bits inside that bucket: its exact
 * pattern. Histograms are per worker and joined; integers, so any order.
 */
#ifndef TVM_SELECT_H
#define TVM_SELECT_H

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

#endif
