/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/layer.h - choosing and correcting what is kept of one layer's task vector.
 *
 * All matrices are row-major fp32. T [rows, cols] is the task vector as y = T x
 * uses it, cols = input channels. H [cols, cols] = X^T X of the layer's inputs
 * (any positive scale), symmetric, both triangles filled. The loss of keeping P
 * instead of T is tr((T-P) H (T-P)^T).
 *
 * Frantar and Alistarh, "SparseGPT", arXiv:2301.00774, algorithm 1, with T in
 * place of the weights. Differences: exactly floor(elements * (1 - density))
 * entries of a block are pruned; U comes from one Cholesky factorisation of the
 * index-reversed H in fp64 and one triangular inverse.
 *
 * Pure functions: no allocation, no globals but OpenBLAS's thread count, which
 * is set to 1. Shapes of BLAS calls depend on the arguments only, so equal
 * arguments give equal bytes on one BLAS core type. Without OpenBLAS in the
 * build tvk_layer_built() is 0 and the other functions must not be called.
 */
#ifndef TV_LAYER_H
#define TV_LAYER_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Columns that share one threshold. */
#define TVK_OBS_BLOCK  128u
/* Columns whose errors reach the rest of the matrix in one product. */
#define TVK_OBS_GROUP  512u
/* Most columns of one layer: LAPACK counts in int, elements too. */
#define TVK_LAYER_COLS 46340u
/* Rows that one call of tvk_cg_rows takes. */
#define TVK_CG_ROWS    64u

struct tvk_obs {
    double density;           /* kept part of a block, 0..1; n:m ignores it */
    unsigned n_pruned, group; /* prune n_pruned of every `group` columns of a
                               * row; group divides TVK_OBS_BLOCK; 0: none */
};

/* Is OpenBLAS there? The rest is built with it only. */
int tvk_layer_built(void);

/* Adds amount = damping * mean of the diagonal over live columns to the
 * diagonal; a dead column (H_jj <= 0) first gets that mean, so it competes by
 * magnitude. Returns amount. A matrix without live columns becomes the
 * identity times (1 + damping). */
double tvk_gram_damp(float *h, size_t cols, double damping);
/* The same for its diagonal [cols] alone. */
double tvk_diagonal_damp(float *diagonal, size_t cols, double damping);

/* Floats that h needs for tvk_gram_factor (a little more than cols^2), and
 * those of its `work`, aligned to 8 bytes both. */
size_t tvk_gram_floats(size_t cols);
size_t tvk_gram_work(size_t cols);
/* h [cols, cols] -> U in place: upper, U^T U = H^-1, below the diagonal 0.
 * |U^T U - H^-1| <= 1e-5 |H^-1|, spectral norms, H being h as it came.
 * Returns 0, or -1 when H is not positive definite in fp64 or not finite (h is
 * destroyed: read it again with more damping). */
int tvk_gram_factor(float *h, size_t cols, float *work);

/* Floats of `work` for tvk_obs_prune, whatever the density. */
size_t tvk_obs_work(size_t rows, size_t cols);
/* t [rows, cols] in: T; out: P, pruned entries +0. u from tvk_gram_factor.
 * Returns the number of entries kept. */
uint64_t tvk_obs_prune(float *t, const float *u, size_t rows, size_t cols,
                       const struct tvk_obs *how, float *work);

/* Floats of `work` for tvk_cg_rows and tvk_gram_product. */
size_t tvk_cg_work(size_t cols);
/* Conjugate gradients on the kept values of up to TVK_CG_ROWS rows, each row by
 * itself, preconditioned by the diagonal of h (damped). p in: any start whose
 * pruned entries are 0; out: refined. keep [rows * cols] bytes, not 0 = kept.
 * A row stops early when a step no longer lowers its loss. */
void tvk_cg_rows(float *p, const float *t, const uint8_t *keep, const float *h,
                 size_t rows, size_t cols, unsigned n_steps, float *work);
/* *tt += tr(T H T^T), *tp += tr(T H P^T), *pp += tr(P H P^T) over up to
 * TVK_CG_ROWS rows. The loss is tt - 2 tp + pp only in exact arithmetic: pass
 * T - P as t to measure a small one. tp / pp is the best factor for P. */
void tvk_gram_product(const float *t, const float *p, const float *h,
                      size_t rows, size_t cols, double *tt, double *tp,
                      double *pp, float *work);

#ifdef __cplusplus
}
#endif
#endif
