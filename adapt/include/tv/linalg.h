/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/linalg.h - dense algebra on small fp64 matrices, over LAPACK.
 *
 * All matrices are column-major with leading dimension = rows. One BLAS thread:
 * the same bytes on one BLAS core type whatever else runs. Without OpenBLAS in
 * the build every call gives UNSUPPORTED.
 */
#ifndef TV_LINALG_H
#define TV_LINALG_H

#include <stdbool.h>
#include <stddef.h>

#include "tv/error.h"

bool tva_linalg_built(void);

/* c [m, n] = op(a) op(b), op(a) [m, k], op(b) [k, n]; transposed: a is [k, m],
 * b is [n, k]. Plain loops in index order without OpenBLAS. */
void tva_gemm(const double *a, bool ta, const double *b, bool tb, size_t m,
              size_t n, size_t k, double *c);
/* m [rows, cols] -> an orthonormal basis of its columns in place, [rows, k],
 * and r [k, cols] with m = q r; k = min(rows, cols). */
TV_NODISCARD enum tv_err tva_qr(double *m, size_t rows, size_t cols, double *r,
                                struct tv_error *err);
/* m [rows, cols] (destroyed) = u s vt; u [rows, k], s [k] descending, vt
 * [k, cols]; k = min(rows, cols). */
TV_NODISCARD enum tv_err tva_svd(double *m, size_t rows, size_t cols, double *u,
                                 double *s, double *vt, struct tv_error *err);

/* For who plans memory ahead: nothing below allocates. */

/* c [m, n] += alpha op(a) op(b), as tva_gemm. */
void tva_gemm_add(double alpha, const double *a, bool ta, const double *b,
                  bool tb, size_t m, size_t n, size_t k, double *c);
/* c [n, n] += alpha a a^T, a [n, k]; transposed: a^T a, a [k, n]. Only the
 * lower triangle of c is touched. */
void tva_syrk_add(double alpha, const double *a, bool transposed, size_t n,
                  size_t k, double *c);
/* The other triangle from the lower one. */
void tva_mirror(double *c, size_t n);
/* Doubles of `work` for tva_eigh. */
size_t tva_eigh_work(size_t n);
/* a [n, n] symmetric, lower triangle read -> its eigenvectors as columns, by
 * ascending eigenvalue w [n]. */
TV_NODISCARD enum tv_err tva_eigh(double *a, size_t n, double *w, double *work,
                                  struct tv_error *err);
/* a [n, n] symmetric positive definite, lower triangle read -> its Cholesky
 * factor there. INPUT when it is not positive definite. */
TV_NODISCARD enum tv_err tva_cholesky(double *a, size_t n,
                                      struct tv_error *err);
/* b [n, k] -> a^-1 b, with the factor of a. */
TV_NODISCARD enum tv_err tva_cholesky_solve(const double *factor, size_t n,
                                            double *b, size_t k,
                                            struct tv_error *err);
/* Name of the BLAS kernels in use, which bytes depend on; "" without any. */
const char *tva_linalg_core(void);
#endif
