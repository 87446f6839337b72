/* SPDX-License-Identifier: Apache-2.0 */
/*
 * blocks.c - what happens to single rows: norms, activations, exp, rotation.
 *
 * Compiled once per instruction set (TVE_ROWS names the table); model.c takes
 * the one of the kernels in use. Plain loops that compilers vectorise; sums run
 * in sixteen fp64 lanes that are added in a fixed order, so that no vector
 * width changes a bit. exp is tv/exp_float.h's, because libm's is called one
 * element at a time.
 */
#include <math.h>
#include <string.h>

#include "decoder.h"
#include "tv/exp_float.h"

#ifndef TVE_ROWS
#define TVE_ROWS tve_rows_ref
#endif

#define LANES 16

static double lanes_sum(const double *s)
{
    double t[LANES];

    memcpy(t, s, sizeof(t));
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++)
            t[i] += t[i + half];
    return t[0];
}

static double sum_of(const float *x, size_t n)
{
    double sum[LANES] = {0};
    size_t i = 0;

    for (; i + LANES <= n; i += LANES)
        for (size_t k = 0; k < LANES; k++)
            sum[k] += (double)x[i + k];
    for (size_t k = 0; i < n; i++, k++)
        sum[k] += (double)x[i];
    return lanes_sum(sum);
}

static double squares_of(const float *x, size_t n, double mean)
{
    double sum[LANES] = {0};
    size_t i = 0;

    for (; i + LANES <= n; i += LANES) {
        for (size_t k = 0; k < LANES; k++) {
            const double d = (double)x[i + k] - mean;
            sum[k] += d * d;
        }
    }
    for (size_t k = 0; i < n; i++, k++) {
        const double d = (double)x[i] - mean;
        sum[k] += d * d;
    }
    return lanes_sum(sum);
}

static double exp_row(float *x, size_t n, float max)
{
    for (size_t i = 0; i < n; i++)
        x[i] = tvk_exp_float(x[i] - max);
    return sum_of(x, n);
}

static float max_row(const float *x, size_t n)
{
    float best[LANES];
    size_t i = 0;

    for (size_t k = 0; k < LANES; k++)
        best[k] = -INFINITY;
    for (; i + LANES <= n; i += LANES)
        for (size_t k = 0; k < LANES; k++)
            best[k] = x[i + k] > best[k] ? x[i + k] : best[k];
    for (size_t k = 0; i < n; i++, k++)
        best[k] = x[i] > best[k] ? x[i] : best[k];
    for (size_t k = 1; k < LANES; k++)
        best[0] = best[k] > best[0] ? best[k] : best[0];
    return best[0];
}

static void norm_row(enum tve_norm_type type, float eps, const float *w,
                     const float *b, const float *x, float *dst, size_t n)
{
    const double mean = type == TVE_LAYER_NORM ? sum_of(x, n) / (double)n : 0;
    const double var = squares_of(x, n, mean) / (double)n;
    float inv = 0;

    inv = (float)(1.0 / sqrt(var + (double)eps));
    for (size_t i = 0; i < n; i++)
        dst[i] = (float)((double)x[i] - mean) * inv;
    if (w && type == TVE_RMS_PLUS_ONE)
        for (size_t i = 0; i < n; i++)
            dst[i] *= 1.0f + w[i];
    else if (w)
        for (size_t i = 0; i < n; i++)
            dst[i] *= w[i];
    if (b)
        for (size_t i = 0; i < n; i++)
            dst[i] += b[i];
}

static inline float sigmoid(float x)
{
    return 1.0f / (1.0f + tvk_exp_float(-x));
}

static void act_row(enum tve_act act, float *x, const float *gate_by, size_t n)
{
    switch (act) {
    case TVE_SILU:
        for (size_t i = 0; i < n; i++)
            x[i] = x[i] * sigmoid(x[i]);
        break;
    case TVE_QUICK_GELU:
        for (size_t i = 0; i < n; i++)
            x[i] = x[i] * sigmoid(1.702f * x[i]);
        break;
    case TVE_GELU_TANH:
        /* (1 + tanh u) / 2 is the sigmoid of 2u */
        for (size_t i = 0; i < n; i++) {
            const float v = x[i];
            const float u = 0.7978845608028654f * (v + 0.044715f * v * v * v);
            x[i] = v * sigmoid(2.0f * u);
        }
        break;
    case TVE_GELU:
        for (size_t i = 0; i < n; i++)
            x[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678118654752f));
        break;
    case TVE_RELU:
        for (size_t i = 0; i < n; i++)
            x[i] = x[i] > 0.0f ? x[i] : 0.0f;
        break;
    }
    if (gate_by)
        for (size_t i = 0; i < n; i++)
            x[i] *= gate_by[i];
}

static void rotate(float *x, const float *cos_row, const float *sin_row,
                   size_t half)
{
    for (size_t i = 0; i < half; i++) {
        const float a = x[i], b = x[i + half];

        x[i] = a * cos_row[i] - b * sin_row[i];
        x[i + half] = b * cos_row[i] + a * sin_row[i];
    }
}

/* cap * tanh(x / cap); its error is absolute, 1e-7 of cap. */
static void cap_row(float *x, size_t n, float cap)
{
    for (size_t i = 0; i < n; i++)
        x[i] =
            (1.0f - 2.0f / (1.0f + tvk_exp_float(2.0f * (x[i] / cap)))) * cap;
}

const struct tve_row_ops TVE_ROWS = {
    .exp_row = exp_row,
    .max_row = max_row,
    .norm_row = norm_row,
    .act_row = act_row,
    .rotate = rotate,
    .cap_row = cap_row,
};
