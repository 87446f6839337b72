/* SPDX-License-Identifier: Apache-2.0 */
/*
 * product_sum.h - factors of sums of low-rank products (private to merge/).
 */
#ifndef TVM_PRODUCT_SUM_H
#define TVM_PRODUCT_SUM_H

#include <stdbool.h>
#include <stddef.h>

#include "tv/error.h"

/* Orthonormal bases of two stacks of factors, and the stacks in them:
 * stack_b = ub rb, stack_a^T = ua ra; column-major, fp64. */
struct tvm_core {
    size_t out, in, cols; /* cols: sum of ranks */
    size_t kb, ka;        /* columns of ub, ua */
    double *ub, *rb;      /* [out, kb], [kb, cols] */
    double *ua, *ra;      /* [in, ka], [ka, cols] */
};
/* b [out, cols] and a_t [in, cols] (owned, taken over) -> bases by QR and an
 * SVD of the triangle, so that they do not depend on the order of the stack but
 * for signs. */
TV_NODISCARD enum tv_err tvm_core_make(struct tvm_core *c, double *b,
                                       double *a_t, size_t out, size_t in,
                                       size_t cols, struct tv_error *err);
void tvm_core_free(struct tvm_core *c);
/* m [kb, ka] = sum over columns [from, to) of rb_i ra_i^T. */
void tvm_core_product(const struct tvm_core *c, size_t from, size_t to,
                      double *m);
/* ub m ua^T at rank r <= min(kb, ka): A [r, in] and B [out, r], row-major;
 * singular values on B alone (`left`) or their roots on both. m is destroyed.
 */
TV_NODISCARD enum tv_err tvm_core_factor(const struct tvm_core *c, double *m,
                                         size_t r, bool left, float *a,
                                         float *b, struct tv_error *err);
#endif
