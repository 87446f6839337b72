/* SPDX-License-Identifier: Apache-2.0 */
/*
 * variance.c - how far task vectors are from each other, and their merge by
 * majority sign and given weights: the element-wise parts of SCE (Wan et al.,
 * "FuseChat", 2408.07990).
 *
 * Unlike in gta, all task vectors vote alike, whatever their weight. Deviations
 * are from the first one, so that equal ones have a variance of exactly 0.
 */
#include "rows.h"

#include <math.h>

#define WEIGHT_MIN 1e-6

static int is_set(const uint64_t *mask, size_t i)
{
    return (int)(mask[i >> 6] >> (i & 63) & 1u);
}

static void variance(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                     const float *const *x, size_t n_donors, size_t n)
{
    const double count = (double)n_donors;

    for (size_t i = 0; i < n; i++) {
        const double vb = (double)b[i];
        const double first = (double)x[0][i] - vb;
        double mean = 0.0;
        double sum = 0.0;
        for (size_t j = 1; j < n_donors; j++)
            mean = mean + (((double)x[j][i] - vb) - first);
        mean = mean / count;
        for (size_t j = 0; j < n_donors; j++) {
            const double d = (((double)x[j][i] - vb) - first) - mean;
            sum = sum + d * d;
        }
        dst[i] = (float)(sum / count);
    }
}

static void elect(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                  const float *const *x, const uint64_t *mask,
                  const double *weight, size_t n_donors, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const double vb = (double)b[i];
        double vote = 0.0;
        double sum = 0.0;
        double by = 0.0;
        dst[i] = b[i];
        if (mask != NULL && !is_set(mask, i))
            continue;
        for (size_t j = 0; j < n_donors; j++)
            vote = vote + ((double)x[j][i] - vb);
        for (size_t j = 0; j < n_donors; j++) {
            const double d = (double)x[j][i] - vb;
            if (vote >= 0.0 ? !(d > 0.0) : !(d < 0.0))
                continue;
            sum = sum + weight[j] * d;
            by = by + weight[j];
        }
        if (isnan(vote))
            sum = vote;
        if (sum != 0.0)
            dst[i] = (float)(vb + sum / (by > WEIGHT_MIN ? by : WEIGHT_MIN));
    }
}

static void keep(float *TVK_RESTRICT y, const uint64_t *mask, size_t n)
{
    for (size_t i = 0; i < n; i++)
        y[i] = is_set(mask, i) ? y[i] : 0.0f;
}

void tvk_ref_variance(struct tvk_table *t)
{
    t->variance = variance;
    t->elect = elect;
    t->keep = keep;
}
