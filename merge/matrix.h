/* SPDX-License-Identifier: Apache-2.0 */
/*
 * matrix.h - what methods of matrix scope share (private to merge/).
 *
 * A method of matrix scope looks at the task vector of a linear layer as a
 * matrix, so it holds all of it: one measuring pass copies the weighted task
 * vectors w_t (x_t - base) into the state as fp32, passes of work turn them
 * into the merged one, and
 *
 *   y = base + lambda merged
 *
 * All that it needs lies in the state, where planning sees it; nothing is
 * allocated while it runs. Products, eigenvectors and solutions are fp64 by
 * BLAS and LAPACK, one thread each, over panels of TVM_PANEL rows whose borders
 * depend on the shape alone: same bytes for any number of workers on one kind
 * of processor.
 *
 * What is no matrix of a linear layer (embeddings, output head, norms, biases,
 * stacks of experts) gets the mean of the weighted task vectors instead, as the
 * papers do; so does a matrix with a value that is no number, which would spoil
 * all of the result instead of its own place.
 */
#ifndef TVM_MATRIX_H
#define TVM_MATRIX_H

#include <stdatomic.h>

#include "method.h"

#define TVM_PANEL 256u

/* First parameters of every method of matrix scope. */
enum { TVM_MATRIX_WEIGHT, TVM_MATRIX_LAMBDA, TVM_MATRIX_PARAMS };
#define TVM_MATRIX_PARAM_ROWS                                                  \
    [TVM_MATRIX_WEIGHT] = {.name = "weight",                                   \
                           .scope = TVM_NON_BASE,                              \
                           .type = TVM_FLOAT,                                  \
                           .has_default = true,                                \
                           .fallback = 1.0,                                    \
                           .help = "factor of the task vector"},               \
    [TVM_MATRIX_LAMBDA] = {.name = "lambda",                                   \
                           .scope = TVM_SHARED,                                \
                           .type = TVM_FLOAT,                                  \
                           .has_default = true,                                \
                           .fallback = 1.0,                                    \
                           .help = "factor of the merged task vector"}

/* tvm_method::detail of such a method, NULL: all false. */
struct tvm_matrix_detail {
    bool weighs_models; /* a weight counts a model, not its task vector: these
                         * are kept as they are, and their mean is weighted */
};

/* Elements (i, j) of a matrix [m, n] at x[i * n + j], or at x[j * m + i]. */
struct tvm_matrix {
    float *x;
    size_t m, n;
    bool flip;
};

struct tvm_matrices { /* of a job: the first thing in its state */
    size_t n;         /* task vectors */
    float *delta;     /* [n][elements]; the first becomes the merged one */
    float *sum;       /* or their sum, in the place of the first */
    _Atomic unsigned n_bad; /* blocks with what is no number */
};

/* Does this tensor go the way of matrices at all? With statistics: only where
 * inputs can be looked at. */
bool tvm_matrix_is(const struct tvm_tensor *t);
/* Lays m out in a job's zeroed state; sum_only: the task vectors are added up
 * while they are measured. */
void tvm_matrix_carve(struct tvm_matrices *m, struct tvm_carver *c,
                      const struct tvm_job *job, bool sum_only);
/* The task vector at `x` so that m >= n. */
struct tvm_matrix tvm_matrix_tall(const struct tvm_tensor *t, float *x);
/* The task vector at `x` as [out, in]. */
struct tvm_matrix tvm_matrix_out_in(const struct tvm_tensor *t, float *x);
size_t tvm_matrix_panels(const struct tvm_matrix *a);
/* Rows of panel i, the first of which is *from. */
size_t tvm_matrix_panel(const struct tvm_matrix *a, size_t i, size_t *from);
/* Rows [from, from + count) to or from panel [count][n]. */
void tvm_matrix_get(const struct tvm_matrix *a, size_t from, size_t count,
                    double *panel);
void tvm_matrix_put(const struct tvm_matrix *a, size_t from, size_t count,
                    const double *panel);
/* g [n, n] += scale a^T a, lower triangle; panel [TVM_PANEL][n]. */
void tvm_matrix_gram(const struct tvm_matrix *a, double scale, double *g,
                     double *panel);

/* For the vtable. check, fold, measure and combine of all; next_phase is
 * tvm_matrix_next_phase with the number of passes of work. */
void tvm_matrix_check(const struct tvm_tensor *t,
                      struct tvm_problems *problems);
int tvm_matrix_fold(const struct tvm_tensor *t);
bool tvm_matrix_next_phase(struct tvm_job *job, unsigned n_passes);
void tvm_matrix_measure(struct tvm_job *job, struct tvm_tile *tile,
                        const float *const *x, size_t n);
void tvm_matrix_combine(struct tvm_job *job, struct tvm_tile *tile,
                        const float *const *x, float *dst, size_t n);

#endif
