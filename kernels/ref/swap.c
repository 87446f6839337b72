/* SPDX-License-Identifier: Apache-2.0 */
/*
 * swap.c - element-wise rules that look at how large a change is: nearswap and
 * RAM.
 */
#include "rows.h"

#include <math.h>

static void nearswap(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                     const float *TVK_RESTRICT x, double t, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const double d = (double)x[i] - (double)b[i];
        const double m = fabs(d);
        double w = t / (m < 1e-6 ? 1e-6 : m);
        w = w > 1.0 ? 1.0 : w;
        dst[i] = (float)((double)b[i] + w * d);
    }
}

static void ram(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                const float *const *x, const double *alone, size_t n_donors,
                double epsilon, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        double sum = 0.0;
        double single = 0.0;
        size_t count = 0;
        for (size_t j = 0; j < n_donors; j++) {
            const double d = (double)x[j][i] - (double)b[i];
            if (fabs(d) <= epsilon)
                continue;
            sum = sum + d;
            single = alone[j] * d;
            count++;
        }
        if (count == 1)
            sum = single;
        else if (count > 1)
            sum = sum / (double)count;
        dst[i] = count > 0 ? (float)((double)b[i] + sum) : b[i];
    }
}

void tvk_ref_swap(struct tvk_table *t)
{
    t->nearswap = nearswap;
    t->ram = ram;
}
