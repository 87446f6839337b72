/* SPDX-License-Identifier: Apache-2.0 */
/*
 * compat_sums.h - what --compat mergekit variants of reducing methods share
 * (compat.h): steps over a block, each rounded to the compute dtype, and sums
 * over a tensor.
 *
 * torch adds up in fp32, in an order that depends on the CPU and its threads;
 * here sums are fp64 in the usual tree and rounded once. That is the part of
 * mergekit's arithmetic that is not reproduced: in bf16 the rounding hides it,
 * in fp32 it shows in the last bits of the factors that depend on it.
 */
#ifndef TVM_COMPAT_SUMS_H
#define TVM_COMPAT_SUMS_H

#include "compat.h"

/* dst may be an input. n <= TVM_BLOCK, as everywhere. */
void tvm_compat_sub(const struct tvm_job *job, float *dst, const float *a,
                    const float *b, size_t n);
void tvm_compat_add(const struct tvm_job *job, float *dst, const float *a,
                    const float *b, size_t n);
void tvm_compat_mul(const struct tvm_job *job, float *dst, const float *a,
                    const float *b, size_t n);
void tvm_compat_mul1(const struct tvm_job *job, float *dst, const float *a,
                     float by, size_t n);
void tvm_compat_div1(const struct tvm_job *job, float *dst, const float *a,
                     float by, size_t n);
/* A number in the tensor's compute dtype. */
float tvm_compat_one(const struct tvm_job *job, double v);

double tvm_compat_total(const float *x, size_t n);   /* sum x */
double tvm_compat_squares(const float *x, size_t n); /* sum x^2 */

struct tvm_compat_sums {
    size_t n;      /* at most so many sums in a pass */
    double *leaf;  /* [n][n_leaves] */
    double *block; /* [n_workers][n][blocks of a leaf] */
};

void tvm_compat_sums_carve(struct tvm_compat_sums *s, struct tvm_carver *c,
                           const struct tvm_job *job, size_t n);
/* Of the block at hand [n]: its share of a sum. */
void tvm_compat_sums_put(const struct tvm_compat_sums *s,
                         const struct tvm_job *job, const struct tvm_tile *tile,
                         size_t which, double share, size_t n);
double tvm_compat_sums_get(const struct tvm_compat_sums *s,
                           const struct tvm_job *job, size_t which);

#endif
