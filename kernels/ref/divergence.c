/* SPDX-License-Identifier: Apache-2.0 */
/*
 * divergence.c - rows of weights as distributions, and how far these are apart.
 *
 * exp and log are written out here because a C library's differ in their last
 * bits between versions and, with FMA, between processors; results may depend
 * on neither. Both are polynomials after an exact change of scale:
 *
 *   exp(x) = 2^k e^r,  k = x/ln 2 to the nearest integer, |r| <= ln 2 / 2,
 *            e^r = 1 + (r + r^2 Q(r)), Q of degree 9
 *   log(p/q) = e ln 2 + 2 artanh(s), s = (p 2^-e - q) / (p 2^-e + q),
 *            artanh(s) = s + s^3 P(s^2), P of degree 6
 *
 * e is a guess from the bits of p and q, off by at most 0.09, which keeps |s|
 * below 0.2005; there is one division, and no cancellation where p is near q.
 * Q and P interpolate at Chebyshev nodes, with errors of 1.6e-17 and 5.6e-17 of
 * the result; what remains are a few roundings (test_ops.c: below 1e-15).
 */
#include "rows.h"
#include "lanes.h"
#include "divergence.h"

#include <math.h>
#include <string.h>

static double exp_of(double x)
{
    if (x < TVK_EXP_MIN)
        return 0.0;
    const double t = x * TVK_LOG2_E + TVK_MAGIC;
    const double k = t - TVK_MAGIC;
    const double r = (x - k * TVK_LN2_HI) - k * TVK_LN2_LO;
    const double r2 = r * r;
    const double even =
        TVK_Q0 + r2 * (TVK_Q2 + r2 * (TVK_Q4 + r2 * (TVK_Q6 + r2 * TVK_Q8)));
    const double odd =
        TVK_Q1 + r2 * (TVK_Q3 + r2 * (TVK_Q5 + r2 * (TVK_Q7 + r2 * TVK_Q9)));
    const double y = 1.0 + (r + r2 * (even + r * odd));
    uint64_t bits = 0;
    double scale = 0.0;

    /* The low bits of t are k. */
    memcpy(&bits, &t, sizeof(bits));
    bits = (bits + TVK_BIAS) << 52;
    memcpy(&scale, &bits, sizeof(scale));
    return y * scale;
}

static double log_of_ratio(double p, double q)
{
    uint64_t up = 0;
    uint64_t uq = 0;
    memcpy(&up, &p, sizeof(up));
    memcpy(&uq, &q, sizeof(uq));
    /* The difference of logarithms, piecewise linear, plus 1024 and a half. */
    const uint64_t e = (up - uq + TVK_RATIO_BIAS) >> 52;
    const uint64_t down = (TVK_RATIO_SCALE - e) << 52;
    double scale = 0.0;
    memcpy(&scale, &down, sizeof(scale));
    const double a = p * scale;
    const double s = (a - q) / (a + q);
    const double z = s * s;
    const double low = TVK_P0 + z * (TVK_P1 + z * (TVK_P2 + z * TVK_P3));
    const double high = TVK_P4 + z * (TVK_P5 + z * TVK_P6);
    const double s2 = s + s;
    const double k = (double)e - TVK_RATIO_ZERO;
    const double tail = s2 * (z * (low + ((z * z) * (z * z)) * high));
    return k * TVK_LN2_HI + (s2 + (tail + k * TVK_LN2_LO));
}

double tvk_log(float x)
{
    if (isnan(x) || x < 0.0f)
        return (double)NAN;
    if (x == 0.0f)
        return -(double)INFINITY;
    return isinf(x) ? (double)x : log_of_ratio((double)x, 1.0);
}

static float highest(const float *x, size_t n)
{
    float most = -INFINITY;

    for (size_t i = 0; i < n; i++)
        most = x[i] > most ? x[i] : most;
    return most + 0.0f;
}

static double softmax(double *TVK_RESTRICT e, const float *TVK_RESTRICT x,
                      double most, size_t n)
{
    double lane[TVK_LANES] = {0};

    for (size_t i = 0; i < n; i++) {
        e[i] = exp_of((double)x[i] - most);
        lane[i % TVK_LANES] += e[i];
    }
    return tvk_lanes_sum(lane);
}

static double divergence(const double *e, const double *f, double sum_e,
                         double sum_f, size_t n)
{
    const double by_e = 1.0 / sum_e;
    const double by_f = 1.0 / sum_f;
    double lane[TVK_LANES] = {0};

    for (size_t i = 0; i < n; i++) {
        const double p = e[i] * by_e + TVK_SMALL;
        const double q = f[i] * by_f + TVK_SMALL;
        lane[i % TVK_LANES] += p * log_of_ratio(p, q);
    }
    return tvk_lanes_sum(lane);
}

static void change_by(float *TVK_RESTRICT dst, const float *TVK_RESTRICT x,
                      const float *TVK_RESTRICT b, double by, size_t n)
{
    for (size_t i = 0; i < n; i++)
        dst[i] = (float)(fabs((double)x[i] - (double)b[i]) * by);
}

void tvk_ref_divergence(struct tvk_table *t)
{
    t->highest = highest;
    t->softmax = softmax;
    t->divergence = divergence;
    t->change_by = change_by;
}
