/* SPDX-License-Identifier: Apache-2.0 */
/*
 * linear.c - weighted sums and differences, carried in fp64, rounded once.
 */
#include "rows.h"

#include <assert.h>

static void weighted_sum(float *TVK_RESTRICT dst, const float *const *x,
                         const double *w, size_t n_inputs, double divisor,
                         size_t n)
{
    assert(n_inputs >= 1);
    for (size_t i = 0; i < n; i++) {
        double sum = w[0] * (double)x[0][i];
        for (size_t j = 1; j < n_inputs; j++)
            sum = sum + w[j] * (double)x[j][i];
        if (divisor != 1.0)
            sum = sum / divisor;
        dst[i] = (float)sum;
    }
}

static void delta(float *TVK_RESTRICT dst, const float *TVK_RESTRICT x,
                  const float *TVK_RESTRICT b, size_t n)
{
    /* One fp32 subtraction rounds like the fp64 one followed by a rounding to
     * fp32: 53 >= 2 * 24 + 2 bits make double rounding harmless (Figueroa,
     * "When is double rounding innocuous?", 1995). */
    for (size_t i = 0; i < n; i++)
        dst[i] = x[i] - b[i];
}

void tvk_ref_linear(struct tvk_table *t)
{
    t->weighted_sum = weighted_sum;
    t->delta = delta;
}
