/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gta.c - generalised task arithmetic: base plus a combination of scaled,
 * masked differences, with or without sign election.
 *
 * Covers task arithmetic (Ilharco et al., 2212.04089), TIES (Yadav et al.,
 * 2306.01708, steps "elect" and "disjoint merge") and DARE (Yu et al.,
 * 2311.03099); trimming and dropping are done by whoever makes the masks.
 * Signs are elected by mass, an exact zero sum counts as positive, and the
 * weights take part in the election, as in mergekit.
 */
#include "rows.h"

#include <assert.h>
#include <math.h>

static int is_kept(const uint64_t *const *masks, size_t j, size_t i)
{
    if (masks == NULL || masks[j] == NULL)
        return 1;
    return (int)(masks[j][i >> 6] >> (i & 63) & 1u);
}

static double total_weight(const struct tvk_gta *p)
{
    double sum = 0.0;
    for (size_t j = 0; j < p->n_donors; j++)
        sum = sum + p->weight[j];
    return sum > -1e-8 && sum < 1e-8 ? 1.0 : sum;
}

double tvk_gta_least_divisor(const struct tvk_gta *p)
{
    double above = 0.0, below = 0.0;
    for (size_t j = 0; j < p->n_donors; j++) {
        if (p->weight[j] > 0.0)
            above = above + p->weight[j];
        else
            below = below - p->weight[j];
    }
    return (above < below ? above : below) * 0x1p-44;
}

static void gta(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                const float *const *x, const uint64_t *const *masks,
                const struct tvk_gta *p, size_t n)
{
    double d[TVK_DONORS_MAX];
    const double total = total_weight(p);
    const double least = tvk_gta_least_divisor(p);

    assert(p->n_donors <= TVK_DONORS_MAX);
    for (size_t i = 0; i < n; i++) {
        double sum = 0.0;
        for (size_t j = 0; j < p->n_donors; j++) {
            d[j] = 0.0;
            if (is_kept(masks, j, i))
                d[j] = ((double)x[j][i] - (double)b[i]) * p->coef[j];
            sum = sum + d[j];
        }

        double m = sum;
        double divisor = total;
        if (p->consensus) {
            const int positive = sum >= 0.0;
            m = 0.0;
            divisor = 0.0;
            for (size_t j = 0; j < p->n_donors; j++) {
                if (positive ? d[j] > 0.0 : d[j] < 0.0) {
                    m = m + d[j];
                    divisor = divisor + p->weight[j];
                }
            }
            if (fabs(divisor) <= least)
                divisor = 1.0;
        }
        if (p->normalize)
            m = m / divisor;
        if (p->lambda != 1.0)
            m = m * p->lambda;
        /* Adding zero would turn a base of -0 into +0. */
        dst[i] = m == 0.0 ? b[i] : (float)((double)b[i] + m);
    }
}

static uint64_t gta_bf16(void *TVK_RESTRICT dst, const void *b,
                         const void *const *x, const uint64_t *const *masks,
                         const struct tvk_gta *p, size_t n)
{
    return tvk_gta_by_pieces(TVK_REF, dst, b, x, masks, p, n);
}

void tvk_ref_gta(struct tvk_table *t)
{
    t->gta = gta;
    t->gta_bf16 = gta_bf16;
}
