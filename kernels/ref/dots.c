/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dots.c - reductions of one leaf in sixteen lanes, and the tree above leaves.
 *
 * The shape depends on the element index only: which thread computed a leaf,
 * how large a tile was and how wide the registers are does not matter.
 *
 *   lane 0   1   2  ...  15      element i goes to lane i & 15, in order
 *        \_______ ... _/         0+8, 1+9, ... ; 0+4, ... ; 0+2, 1+3 ; 0+1
 *
 *   leaves 0 1 2 3 4  ->  ((0+1)+(2+3))+4
 */
#include "rows.h"
#include "lanes.h"

#include <assert.h>
#include <math.h>

static void dots(struct tvk_dots *out, const float *a, const float *b, size_t n)
{
    double aa[TVK_LANES] = {0};
    double bb[TVK_LANES] = {0};
    double ab[TVK_LANES] = {0};

    assert(n <= TVK_LEAF);
    for (size_t i = 0; i < n; i++) {
        const double p = (double)a[i];
        const double q = (double)b[i];
        aa[i % TVK_LANES] += p * p;
        bb[i % TVK_LANES] += q * q;
        ab[i % TVK_LANES] += p * q;
    }
    out->aa = tvk_lanes_sum(aa);
    out->bb = tvk_lanes_sum(bb);
    out->ab = tvk_lanes_sum(ab);
}

static double abs_sum(const float *x, const float *b, const uint64_t *mask,
                      size_t n)
{
    double lane[TVK_LANES] = {0};

    assert(n <= TVK_LEAF);
    for (size_t i = 0; i < n; i++) {
        if (mask != NULL && !(mask[i >> 6] >> (i & 63) & 1u))
            continue;
        const float d = b != NULL ? x[i] - b[i] : x[i];
        lane[i % TVK_LANES] += (double)fabsf(d);
    }
    return tvk_lanes_sum(lane);
}

static void abs_sums(double *all, double *kept, const float *x, const float *b,
                     const uint64_t *mask, size_t n)
{
    *all = abs_sum(x, b, NULL, n);
    *kept = abs_sum(x, b, mask, n);
}

static double square_sum(const float *x, const float *b, const uint64_t *mask,
                         size_t n)
{
    double lane[TVK_LANES] = {0};

    assert(n <= TVK_LEAF);
    for (size_t i = 0; i < n; i++) {
        if (mask != NULL && !(mask[i >> 6] >> (i & 63) & 1u))
            continue;
        const float d = b != NULL ? x[i] - b[i] : x[i];
        lane[i % TVK_LANES] += (double)d * (double)d;
    }
    return tvk_lanes_sum(lane);
}

void tvk_ref_dots(struct tvk_table *t)
{
    t->abs_sums = abs_sums;
    t->square_sum = square_sum;
    t->dots = dots;
    t->abs_sum = abs_sum;
}

/* Largest power of two below n; n >= 2. */
static size_t left_part(size_t n)
{
    size_t p = 1;
    while (p < n - p)
        p *= 2;
    return p;
}

struct tvk_dots tvk_dots_tree(const struct tvk_dots *leaves, size_t n)
{
    struct tvk_dots l = {0.0, 0.0, 0.0};

    if (n == 0)
        return l;
    if (n == 1)
        return leaves[0];
    const size_t p = left_part(n);
    l = tvk_dots_tree(leaves, p);
    const struct tvk_dots r = tvk_dots_tree(leaves + p, n - p);
    l.aa = l.aa + r.aa;
    l.bb = l.bb + r.bb;
    l.ab = l.ab + r.ab;
    return l;
}

double tvk_sum_tree(const double *leaves, size_t n)
{
    if (n == 0)
        return 0.0;
    if (n == 1)
        return leaves[0];
    const size_t p = left_part(n);
    const double l = tvk_sum_tree(leaves, p);
    return l + tvk_sum_tree(leaves + p, n - p);
}
