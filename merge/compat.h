/* SPDX-License-Identifier: Apache-2.0 */
/*
 * compat.h - mergekit's arithmetic: what --compat mergekit variants share.
 *
 * mergekit computes with torch in the compute dtype of a tensor: the recipe's
 * `dtype`, else what the inputs promote to. Every operation rounds to it, so a
 * bf16 merge loses bits at every step. A variant (tvm_method::compat) does the
 * same operations in the same order; for torch, an operation on bf16 or fp16 is
 * the fp32 one with its result rounded, and a Python number beside a tensor is
 * an fp32 number.
 */
#ifndef TVM_COMPAT_H
#define TVM_COMPAT_H

#include "method.h"

/* The block of a source as mergekit loads it: adapters merged into the
 * checkpoint's dtype, then cast to the compute dtype. Returns x, or scratch
 * [n], which may be x. n <= TVM_BLOCK. */
const float *tvm_compat_input(const struct tvk_table *k,
                              const struct tvm_tensor *t, size_t source,
                              const float *x, float *scratch, size_t n);
/* Rounds to the dtype in place. n <= TVM_BLOCK. */
void tvm_compat_round(const struct tvk_table *k, enum tv_dtype dtype, float *x,
                      size_t n);
/* One number; through fp32, as torch does. */
float tvm_compat_round1(const struct tvk_table *k, enum tv_dtype dtype,
                        double v);
/* torch.sum of a contiguous fp32 vector; exact below 8 elements. */
float tvm_compat_sum(const float *v, size_t n);

#endif
