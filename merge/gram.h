/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gram.h - all pairwise dot products of a tensor's inputs, streamed (private to
 * merge/).
 *
 * Methods that interpolate on a sphere or compare directions (karcher,
 * multislerp, nuslerp, model_stock) end in a linear combination of their
 * inputs, and the coefficients follow from the Gram matrix <v_i, v_j> alone.
 * So they need one pass over the inputs to measure and one to combine, and
 * never hold a tensor.
 *
 * Sums are fp64 over blocks of TVM_BLOCK elements (tvk_table::dots), joined in
 * the tree of tvk_sum_tree over leaves: a function of the tensor only.
 */
#ifndef TVM_GRAM_H
#define TVM_GRAM_H

#include <stddef.h>

#include "method.h"

struct tvm_gram {
    size_t n;       /* vectors */
    size_t n_pairs; /* i <= j */
    double *leaf;   /* [n_pairs][n_leaves] */
    double *block;  /* [n_workers][n_pairs][blocks of a leaf] */
    float *delta;   /* [n_workers][n][TVM_BLOCK], with a base */
    double *matrix; /* [n * n], symmetric; tvm_gram_sum fills it */
};

/* Lays g out for n vectors in a job's zeroed state; `deltas`: the vectors are
 * differences to the base. */
void tvm_gram_carve(struct tvm_gram *g, struct tvm_carver *c,
                    const struct tvm_job *job, size_t n, bool deltas);
/* A block of a tile: v[i] [n]. base NULL: the vectors as they are. */
void tvm_gram_add(const struct tvm_gram *g, const struct tvm_job *job,
                  const struct tvm_tile *tile, const float *const *v,
                  const float *base, size_t n);
/* Joins all leaves; returns g->matrix, the caller's to change. */
double *tvm_gram_sum(const struct tvm_gram *g, const struct tvm_job *job);

/* The same of one row [n] in memory at once; scratch [n_vectors][TVM_BLOCK]
 * with a base, else NULL. At most TVM_GRAM_ROW_VECTORS. */
#define TVM_GRAM_ROW_VECTORS 16u
void tvm_gram_row(const struct tvk_table *k, const float *const *v,
                  size_t n_vectors, const float *base, size_t n, float *scratch,
                  double *out);

/* sum_ij c_i c_j G_ij, at least 0. */
double tvm_gram_norm_sq(const double *gram, size_t n, const double *c);

#endif
