/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gram.c - see gram.h. A pair (i, j), i <= j, has index j (j + 1) / 2 + i.
 */
#include "gram.h"

#include <assert.h>
#include <string.h>

#define BLOCKS_PER_LEAF (TVK_LEAF / TVM_BLOCK)

static size_t pair_of(size_t i, size_t j)
{
    return j * (j + 1) / 2 + i;
}

void tvm_gram_carve(struct tvm_gram *g, struct tvm_carver *c,
                    const struct tvm_job *job, size_t n, bool deltas)
{
    const size_t workers = job->n_workers;

    g->n = n;
    g->n_pairs = n * (n + 1) / 2;
    g->matrix = tvm_carve(c, n * n, sizeof *g->matrix);
    g->leaf = tvm_carve(c, g->n_pairs * job->n_leaves, sizeof *g->leaf);
    g->block =
        tvm_carve(c, workers * g->n_pairs * BLOCKS_PER_LEAF, sizeof *g->block);
    g->delta = NULL;
    if (deltas)
        g->delta = tvm_carve(c, workers * n * TVM_BLOCK, sizeof *g->delta);
}

/* Of one run of at most TVK_LEAF elements: pair p goes to out[p * stride]. */
static void dots_of(const struct tvk_table *k, const float *const *v,
                    size_t n_vectors, size_t n, double *out, size_t stride)
{
    struct tvk_dots d;

    if (n_vectors == 1) {
        k->dots(&d, v[0], v[0], n);
        out[0] = d.aa;
    }
    for (size_t j = 1; j < n_vectors; j++)
        for (size_t i = 0; i < j; i++) {
            k->dots(&d, v[i], v[j], n);
            out[pair_of(i, j) * stride] = d.ab;
            if (i + 1 < j)
                continue;
            out[pair_of(i, i) * stride] = d.aa;
            out[pair_of(j, j) * stride] = d.bb;
        }
}

void tvm_gram_add(const struct tvm_gram *g, const struct tvm_job *job,
                  const struct tvm_tile *tile, const float *const *v,
                  const float *base, size_t n)
{
    const float *vectors[TVK_DONORS_MAX + 1];
    double *block =
        g->block + (size_t)tile->worker * g->n_pairs * BLOCKS_PER_LEAF;
    const size_t in_leaf = (size_t)(tile->start % TVK_LEAF / TVM_BLOCK);
    const size_t leaf = (size_t)(tile->start / TVK_LEAF);

    for (size_t i = 0; i < g->n; i++) {
        vectors[i] = v[i];
        if (base) {
            float *d = g->delta + ((size_t)tile->worker * g->n + i) * TVM_BLOCK;
            job->k->delta(d, v[i], base, n);
            vectors[i] = d;
        }
    }
    dots_of(job->k, vectors, g->n, n, block + in_leaf, BLOCKS_PER_LEAF);
    if (in_leaf + 1 != BLOCKS_PER_LEAF &&
        tile->start + n != job->tensor->n_elems)
        return;
    /* A leaf is a power of two of blocks, so the shape of the tree stays. */
    for (size_t p = 0; p < g->n_pairs; p++)
        g->leaf[p * (size_t)job->n_leaves + leaf] =
            tvk_sum_tree(block + p * BLOCKS_PER_LEAF, in_leaf + 1);
}

static void mirror(const double *pairs, size_t n, double *out)
{
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i <= j; i++)
            out[i * n + j] = out[j * n + i] = pairs[pair_of(i, j)];
}

double *tvm_gram_sum(const struct tvm_gram *g, const struct tvm_job *job)
{
    for (size_t j = 0; j < g->n; j++)
        for (size_t i = 0; i <= j; i++)
            g->matrix[i * g->n + j] = g->matrix[j * g->n + i] =
                tvk_sum_tree(g->leaf + pair_of(i, j) * (size_t)job->n_leaves,
                             (size_t)job->n_leaves);
    return g->matrix;
}

void tvm_gram_row(const struct tvk_table *k, const float *const *v,
                  size_t n_vectors, const float *base, size_t n, float *scratch,
                  double *out)
{
    const size_t n_pairs = n_vectors * (n_vectors + 1) / 2;
    double sum[TVM_GRAM_ROW_VECTORS * (TVM_GRAM_ROW_VECTORS + 1) / 2];
    double part[TVM_GRAM_ROW_VECTORS * (TVM_GRAM_ROW_VECTORS + 1) / 2];
    const float *vectors[TVM_GRAM_ROW_VECTORS];

    assert(n_vectors <= TVM_GRAM_ROW_VECTORS);
    memset(sum, 0, sizeof(sum));
    for (size_t at = 0; at < n; at += TVM_BLOCK) {
        const size_t m = n - at < TVM_BLOCK ? n - at : TVM_BLOCK;
        for (size_t i = 0; i < n_vectors; i++) {
            vectors[i] = v[i] + at;
            if (base) {
                float *d = scratch + i * TVM_BLOCK;
                k->delta(d, v[i] + at, base + at, m);
                vectors[i] = d;
            }
        }
        dots_of(k, vectors, n_vectors, m, part, 1);
        for (size_t p = 0; p < n_pairs; p++)
            sum[p] += part[p];
    }
    mirror(sum, n_vectors, out);
}

double tvm_gram_norm_sq(const double *gram, size_t n, const double *c)
{
    double sum = 0.0;

    for (size_t i = 0; i < n; i++)
        for (size_t j = 0; j < n; j++)
            sum += c[i] * c[j] * gram[i * n + j];
    return sum > 0.0 ? sum : 0.0;
}
