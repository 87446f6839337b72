/* SPDX-License-Identifier: Apache-2.0 */
/*
 * compat_gta.c - the steps of mergekit's generalised task arithmetic, each
 * rounded to the compute dtype:
 *
 *   d_i = x_i - b;  dropped entries times 0;  times the L1 factor
 *   D_i = d_i w_i;  elected sign: that of sum D_i, zero counts as +
 *   mixed = sum D_i M_i;  / sum w_i M_i;  * lambda;  y = b + mixed
 *
 * Sums over the models are carried in fp32 in recipe order and rounded once,
 * as torch does for up to four models; with more it adds a few elements at the
 * end of a tensor in another order.
 */
#include "compat_gta.h"

#include <math.h>
#include <string.h>

#define RESCALE_MIN 1e-7
#define DIVISOR_MIN 1e-8

void gta_compat_delta(const struct tvk_table *k, enum tv_dtype compute,
                      float *d, const float *x, const float *b, size_t n)
{
    for (size_t i = 0; i < n; i++)
        d[i] = x[i] - b[i];
    tvm_compat_round(k, compute, d, n);
}

float gta_compat_scale(const struct tvk_table *k, enum tv_dtype thin,
                       double all, double kept)
{
    const float a = tvm_compat_round1(k, thin, all);
    const float b = tvm_compat_round1(k, thin, kept);

    if ((double)a < RESCALE_MIN || (double)b < RESCALE_MIN)
        return 0.0f;
    return tvm_compat_round1(k, thin, (double)(a / b));
}

/* d -> D */
static void thin_and_weigh(const struct tvk_table *k, const struct gta_mix *m,
                           size_t j, float *d, const uint64_t *mask, size_t n)
{
    const float w = tvm_compat_round1(k, m->compute, m->weight[j]);

    for (size_t i = 0; mask != NULL && i < n; i++)
        d[i] *= (float)(mask[i / 64] >> (i % 64) & 1u);
    if (m->scale[j] != 0.0f) {
        for (size_t i = 0; i < n; i++)
            d[i] *= m->scale[j];
        tvm_compat_round(k, m->thin, d, n);
        tvm_compat_round(k, m->compute, d, n);
    }
    for (size_t i = 0; i < n; i++)
        d[i] *= w;
    tvm_compat_round(k, m->compute, d, n);
}

static void add_up(const struct tvk_table *k, const struct gta_mix *m,
                   float *sum, float *const *d, size_t n)
{
    memset(sum, 0, n * sizeof *sum);
    for (size_t j = 0; j < m->n_donors; j++)
        for (size_t i = 0; i < n; i++)
            sum[i] += d[j][i];
    tvm_compat_round(k, m->compute, sum, n);
}

/* Zeroes what does not have the elected sign; divisor[i] = weights that did. */
static void elect(const struct tvk_table *k, const struct gta_mix *m,
                  float *const *d, float *divisor, size_t n)
{
    float sign[TVM_BLOCK];

    add_up(k, m, sign, d, n);
    for (size_t i = 0; i < n; i++)
        sign[i] = sign[i] >= 0.0f ? 1.0f : -1.0f;
    memset(divisor, 0, n * sizeof *divisor);
    for (size_t j = 0; j < m->n_donors; j++) {
        const float w = tvm_compat_round1(k, m->compute, m->weight[j]);
        for (size_t i = 0; i < n; i++) {
            const float own = (float)((d[j][i] > 0.0f) - (d[j][i] < 0.0f));
            const float in = own == sign[i] ? 1.0f : 0.0f;
            d[j][i] *= in;
            divisor[i] += w * in;
        }
    }
    tvm_compat_round(k, m->compute, divisor, n);
    for (size_t i = 0; i < n; i++)
        divisor[i] = divisor[i] == 0.0f ? 1.0f : divisor[i];
}

static float plain_divisor(const struct tvk_table *k, const struct gta_mix *m)
{
    float weight[TVK_DONORS_MAX];

    for (size_t j = 0; j < m->n_donors; j++)
        weight[j] = tvm_compat_round1(k, m->compute, m->weight[j]);
    const float sum = tvm_compat_round1(
        k, m->compute, (double)tvm_compat_sum(weight, m->n_donors));
    return fabs((double)sum) < DIVISOR_MIN ? 1.0f : sum;
}

void gta_compat_mix(const struct tvk_table *k, const struct gta_mix *m,
                    float *dst, const float *base, float *const *delta,
                    const uint64_t *const *masks, size_t n)
{
    float divisor[TVM_BLOCK];
    const float lambda = (float)m->lambda;

    if (m->n_donors == 0) {
        memcpy(dst, base, n * sizeof *dst);
        return;
    }
    for (size_t j = 0; j < m->n_donors; j++)
        thin_and_weigh(k, m, j, delta[j], masks == NULL ? NULL : masks[j], n);
    if (m->consensus)
        elect(k, m, delta, divisor, n);
    add_up(k, m, dst, delta, n);
    if (m->normalize) {
        const float all = m->consensus ? 1.0f : plain_divisor(k, m);
        for (size_t i = 0; i < n; i++)
            dst[i] /= m->consensus ? divisor[i] : all;
        tvm_compat_round(k, m->compute, dst, n);
    }
    if (m->lambda != 1.0) {
        for (size_t i = 0; i < n; i++)
            dst[i] *= lambda;
        tvm_compat_round(k, m->compute, dst, n);
    }
    for (size_t i = 0; i < n; i++)
        dst[i] = base[i] + dst[i];
    tvm_compat_round(k, m->compute, dst, n);
}
