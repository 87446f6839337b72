/* SPDX-License-Identifier: Apache-2.0 */
/*
 * linear_parts.h - what linear_layer.c and linear_cuda.c share: weights ready
 * to be cut into tiles, and a run over them (private to these two).
 */
#ifndef TVE_LINEAR_PARTS_H
#define TVE_LINEAR_PARTS_H

#include "decoder.h"

struct tve_job { /* one weight, ready to be cut into tiles */
    const struct tve_linear *item;
    struct tve_rows rows;
    float *bias;
    size_t in, out, tile_rows, n_tiles, first_tile;
    bool columns; /* stored [in, out] */
};

struct tve_run {
    const tve_model *m;
    struct tve_job *jobs;
    size_t n_jobs;
    const struct tve_group *groups;
    size_t n_groups;
    float **tiles; /* per worker */
    float **logits;
    tve_head_fn head;
    void *arg;
};

void tve_add_bias(float *y, size_t ldy, size_t rows, const float *bias,
                  size_t n);
/* All jobs of the run on the device. */
TV_NODISCARD enum tv_err tve_device_run(struct tve_device *d, struct tve_run *r,
                                        struct tv_error *err);

#endif
