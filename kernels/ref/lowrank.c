/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lowrank.c - a scaled product of two thin matrices, added on the fly.
 *
 * LoRA (Hu et al., 2106.09685): W + (alpha / r) B A, here with L = B, R = A.
 * Works on any flat range of W, so that adapters need no merged copy.
 */
#include "rows.h"

static void lowrank_add(float *TVK_RESTRICT y, const float *TVK_RESTRICT l,
                        const float *TVK_RESTRICT r, double scale, size_t rank,
                        uint64_t cols, uint64_t start, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const size_t row = (size_t)((start + i) / cols);
        const size_t col = (size_t)((start + i) % cols);
        double sum = 0.0;
        for (size_t k = 0; k < rank; k++)
            sum = sum +
                  (double)l[row * rank + k] * (double)r[k * (size_t)cols + col];
        y[i] = (float)((double)y[i] + scale * sum);
    }
}

void tvk_ref_lowrank(struct tvk_table *t)
{
    t->lowrank_add = lowrank_add;
}
