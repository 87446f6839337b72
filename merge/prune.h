/* SPDX-License-Identifier: Apache-2.0 */
/*
 * prune.h - which entries of one layer's task vector are kept, and what becomes
 * of them (private to merge/).
 *
 * T [rows, cols] as y = T x uses it, fp32, row-major; the inputs' statistics
 * are the diagonal of X^T X or all of it. Pure functions of their arguments but
 * for the heap; one thread. Of equal scores the entry with the lowest index is
 * kept; entries that are 0 never are.
 */
#ifndef TVM_PRUNE_H
#define TVM_PRUNE_H

#include "method.h"
#include "tv/cuda.h"
#include "tv/error.h"

struct tvm_stats { /* of one input; any positive factor is the same to all */
    size_t n;
    const double *diag; /* [n], or NULL: */
    const float *gram;  /* [n (n + 1) / 2]: upper triangle, row by row */
    tvk_cuda *cuda;     /* computes what takes a Gram matrix; NULL: the CPU */
};

/* Rows [row, row + n) of T once more, into dst [n, cols]. */
struct tvm_prune_again {
    void (*rows)(void *arg, size_t row, size_t n, float *dst);
    void *arg;
};

#define TVM_LADDER_MAX 4u /* times that damping is raised tenfold */

struct tvm_pruned {
    uint64_t n_kept;
    double damping;    /* that it took; 0: none was asked for */
    unsigned n_raised; /* times ten */
    size_t n_unseen;   /* inputs whose statistics are 0 */
    bool uncorrected;  /* no damping was enough: a mask by the diagonal */
};

/* Bytes of heap that tvm_prune takes with that device (NULL: none), T not
 * counted. */
uint64_t tvm_prune_bytes(const struct tvm_trim_rule *r, size_t rows,
                         size_t cols, const tvk_cuda *cuda);
/* t in: T; out: what is kept, else +0. NOMEM; of a device: BUDGET, IO. */
TV_NODISCARD enum tv_err
tvm_prune(const struct tvm_trim_rule *r, float *t, size_t rows, size_t cols,
          const struct tvm_stats *stats, const struct tvm_prune_again *again,
          struct tvm_pruned *out, struct tv_error *err);
/* Of a token embedding [n, cols], by the counts of its n tokens (stats->diag):
 * the words of the mask, zeroed before, for t^2 counts_j over all of it. Reads
 * it three times, a part at a time; of equal scores the one stored first is
 * kept. */
struct tvm_prune_table {
    /* Elements [start, start + n) as they are stored, n at most at_once. */
    void (*read)(void *arg, uint64_t start, size_t n, float *dst);
    void *arg;
    float *block; /* [at_once] of scratch */
    size_t at_once;
};
TV_NODISCARD enum tv_err
tvm_prune_by_counts(const struct tvm_trim_rule *r, uint64_t n_elems,
                    size_t cols, const struct tvm_stats *stats,
                    const struct tvm_prune_table *table, uint64_t *words,
                    struct tvm_pruned *out, struct tv_error *err);
/* The upper triangle as h [n, n], both triangles. */
void tvm_gram_unpack(float *h, const float *gram, size_t n);

#endif
