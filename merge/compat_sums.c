/* SPDX-License-Identifier: Apache-2.0 */
/*
 * compat_sums.c - see compat_sums.h.
 */
#include "compat_sums.h"

#define BLOCKS_PER_LEAF (TVK_LEAF / TVM_BLOCK)

static void rounded(const struct tvm_job *job, float *x, size_t n)
{
    tvm_compat_round(job->k, job->tensor->compute, x, n);
}

void tvm_compat_sub(const struct tvm_job *job, float *dst, const float *a,
                    const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = a[i] - b[i];
    rounded(job, dst, n);
}

void tvm_compat_add(const struct tvm_job *job, float *dst, const float *a,
                    const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = a[i] + b[i];
    rounded(job, dst, n);
}

void tvm_compat_mul(const struct tvm_job *job, float *dst, const float *a,
                    const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = a[i] * b[i];
    rounded(job, dst, n);
}

void tvm_compat_mul1(const struct tvm_job *job, float *dst, const float *a,
                     float by, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = a[i] * by;
    rounded(job, dst, n);
}

void tvm_compat_div1(const struct tvm_job *job, float *dst, const float *a,
                     float by, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = a[i] / by;
    rounded(job, dst, n);
}

float tvm_compat_one(const struct tvm_job *job, double v)
{
    return tvm_compat_round1(job->k, job->tensor->compute, v);
}

double tvm_compat_total(const float *x, size_t n)
{
    double sum = 0.0;

    for (size_t i = 0; i < n; i++)
        sum += (double)x[i];
    return sum;
}

double tvm_compat_squares(const float *x, size_t n)
{
    double sum = 0.0;

    for (size_t i = 0; i < n; i++)
        sum += (double)x[i] * (double)x[i];
    return sum;
}

void tvm_compat_sums_carve(struct tvm_compat_sums *s, struct tvm_carver *c,
                           const struct tvm_job *job, size_t n)
{
    s->n = n;
    s->leaf = tvm_carve(c, n * job->n_leaves, sizeof *s->leaf);
    s->block = tvm_carve(c, (uint64_t)job->n_workers * n * BLOCKS_PER_LEAF,
                         sizeof *s->block);
}

void tvm_compat_sums_put(const struct tvm_compat_sums *s,
                         const struct tvm_job *job, const struct tvm_tile *tile,
                         size_t which, double share, size_t n)
{
    double *const block =
        s->block + (tile->worker * s->n + which) * BLOCKS_PER_LEAF;
    const size_t in_leaf = (size_t)(tile->start % TVK_LEAF / TVM_BLOCK);

    block[in_leaf] = share;
    /* A leaf is a power of two of blocks, so the shape of the tree stays. */
    if (in_leaf + 1 == BLOCKS_PER_LEAF ||
        tile->start + n == job->tensor->n_elems)
        s->leaf[which * (size_t)job->n_leaves +
                (size_t)(tile->start / TVK_LEAF)] =
            tvk_sum_tree(block, in_leaf + 1);
}

double tvm_compat_sums_get(const struct tvm_compat_sums *s,
                           const struct tvm_job *job, size_t which)
{
    return tvk_sum_tree(s->leaf + which * (size_t)job->n_leaves,
                        (size_t)job->n_leaves);
}
