/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lanes.h - the sixteen accumulators of a reduction and their fixed sum.
 */
#ifndef TVK_LANES_H
#define TVK_LANES_H

#define TVK_LANES 16u

/* 0+8, 1+9, ...; 0+4, ...; 0+2, 1+3; 0+1. Destroys lane[]. */
static inline double tvk_lanes_sum(double *lane)
{
    for (unsigned width = TVK_LANES / 2; width > 0; width /= 2)
        for (unsigned i = 0; i < width; i++)
            lane[i] = lane[i] + lane[i + width];
    return lane[0];
}

#endif
