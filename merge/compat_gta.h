/* SPDX-License-Identifier: Apache-2.0 */
/*
 * compat_gta.h - generalised task arithmetic with mergekit's roundings
 * (compat.h); which entries are kept is decided in gta_tiles.c.
 */
#ifndef TVM_COMPAT_GTA_H
#define TVM_COMPAT_GTA_H

#include "compat.h"

struct gta_mix {
    enum tv_dtype compute;
    enum tv_dtype thin; /* dtype in which entries are dropped and rescaled */
    size_t n_donors;
    const double *weight; /* [n_donors] */
    const float *scale;   /* [n_donors] factor of what is kept; 0: none */
    bool consensus, normalize;
    double lambda;
};

/* d = x - b. n <= TVM_BLOCK, as everywhere here. */
void gta_compat_delta(const struct tvk_table *k, enum tv_dtype compute,
                      float *d, const float *x, const float *b, size_t n);
/* The factor that gives what is kept the L1 norm of the whole; 0: none. */
float gta_compat_scale(const struct tvk_table *k, enum tv_dtype thin,
                       double all, double kept);
/* The merge. delta [n_donors] is overwritten; masks[j] NULL keeps all. */
void gta_compat_mix(const struct tvk_table *k, const struct gta_mix *m,
                    float *dst, const float *base, float *const *delta,
                    const uint64_t *const *masks, size_t n);

#endif
