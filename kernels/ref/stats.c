/* SPDX-License-Identifier: Apache-2.0 */
/*
 * stats.c - what a tensor looks like: range, moments, NaN and infinity.
 */
#include "rows.h"
#include "lanes.h"

#include <assert.h>
#include <math.h>
#include <string.h>

static uint64_t count_nonfinite(const float *x, size_t n)
{
    uint64_t count = 0;
    for (size_t i = 0; i < n; i++)
        count += isfinite(x[i]) ? 0 : 1;
    return count;
}

static uint64_t count_nonfinite_bf16(const void *x, size_t n)
{
    uint64_t count = 0;
    for (size_t i = 0; i < n; i++) {
        uint16_t h = 0;
        memcpy(&h, (const unsigned char *)x + 2 * i, sizeof(h));
        count += (h & 0x7f80u) == 0x7f80u;
    }
    return count;
}

static void stats(struct tvk_stats *out, const float *x, size_t n)
{
    double sum[TVK_LANES] = {0};
    double sum_sq[TVK_LANES] = {0};
    float min = INFINITY;
    float max = -INFINITY;

    assert(n <= TVK_LEAF);
    out->n_nonfinite = 0;
    out->n_zero = 0;
    for (size_t i = 0; i < n; i++) {
        if (!isfinite(x[i])) {
            out->n_nonfinite++;
            continue;
        }
        const double v = (double)x[i];
        sum[i % TVK_LANES] += v;
        sum_sq[i % TVK_LANES] += v * v;
        min = x[i] < min ? x[i] : min;
        max = x[i] > max ? x[i] : max;
        out->n_zero += x[i] == 0.0f;
    }
    out->sum = tvk_lanes_sum(sum);
    out->sum_sq = tvk_lanes_sum(sum_sq);
    /* Which zero wins would depend on the order of comparison: +0 it is. */
    out->min = min + 0.0f;
    out->max = max + 0.0f;
}

void tvk_ref_stats(struct tvk_table *t)
{
    t->count_nonfinite = count_nonfinite;
    t->count_nonfinite_bf16 = count_nonfinite_bf16;
    t->stats = stats;
}

void tvk_stats_merge(struct tvk_stats *into, const struct tvk_stats *more)
{
    into->sum = into->sum + more->sum;
    into->sum_sq = into->sum_sq + more->sum_sq;
    into->min = more->min < into->min ? more->min : into->min;
    into->max = more->max > into->max ? more->max : into->max;
    into->n_nonfinite += more->n_nonfinite;
    into->n_zero += more->n_zero;
}
