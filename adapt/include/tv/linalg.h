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
#endif
