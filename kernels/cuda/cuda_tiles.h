/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_tiles.h - runs an operation on host memory through the device, tile by
 * tile (private to kernels/cuda).
 *
 *   host      [x0 .....|.....|.....]
 *               \ pack
 *   pinned    [fixed|x0|x1|mask|..|out]
 *               | upload         ^ download
 *   device    [fixed|x0|x1|mask|..|out]
 *               '--- kernels ----'
 *
 * Tile k of every operand is packed into a slot of pinned memory, goes up in
 * one copy, and what comes out goes down in one. There are two slots with a
 * stream each, so that packing and copies of one tile run beside the kernels of
 * the other.
 *
 * A lane is two slots. A call takes a free lane, or waits for one. Slots grow
 * to what a call needs, within the staging limit and the device's budget; when
 * the device has no memory left, tiles are halved down to the smallest that
 * the operation allows.
 */
#ifndef TVK_CUDA_TILES_H
#define TVK_CUDA_TILES_H

#include "cuda/cuda_parts.h"

/* Most operands of an operation: donors, their masks, base, factors. */
#define TVK_TILE_PARTS (2u * TVK_DONORS_MAX + 8u)

struct tvk_tile_part {
    const void *host; /* of element 0 of the call */
    uint32_t bits;    /* of an element: 1, 16, 32; 0: `bytes` in every tile */
    size_t bytes;
};

/* Where a tile is. */
struct tvk_tile {
    uint64_t first, n;      /* elements of the call */
    const tvk_cuda_ptr *in; /* [n_in] */
    tvk_cuda_ptr result;    /* [result_bytes], zero before the kernels */
    tvk_cuda_ptr out, scratch;
    tvk_cuda_stream *stream;
};

struct tvk_tile_op {
    const char *name;
    const struct tvk_tile_part *in; /* [n_in] */
    size_t n_in;
    void *out;             /* written, may be NULL */
    uint32_t out_bits;     /* of an element: 1, 16, 32 */
    uint32_t scratch_bits; /* of device memory beside, an element; 0 or 1 */
    size_t result_bytes;
    uint64_t n;
    bool whole;    /* cannot be cut into tiles */
    bool heavy;    /* computes much for what it moves (cuda_row.c) */
    bool in_order; /* a tile needs what `take` got from the one before */
    enum tv_err (*launch)(void *arg, const struct tvk_tile *t,
                          struct tv_error *err);
    void (*take)(void *arg, const void *result); /* tiles in order; or NULL */
    void *arg;
};

struct tvk_tiles;                              /* the lanes of a device */
struct tvk_tiles *tvk_tiles_open(tvk_cuda *d); /* NULL: out of memory */
/* Host memory that all lanes pin at most. */
size_t tvk_tiles_staging(const struct tvk_tiles *t);
void tvk_tiles_close(struct tvk_tiles *t); /* NULL allowed */
/* Slots of lanes that are free give their memory back. */
void tvk_tiles_reclaim(struct tvk_tiles *t);
/* Can a tile of the operation be staged at all? */
bool tvk_tiles_fit(const struct tvk_tiles *t, const struct tvk_tile_op *op);
/* BUDGET: not even the smallest tile fits the device. Others break it. */
TV_NODISCARD enum tv_err tvk_tiles_run(struct tvk_tiles *t,
                                       const struct tvk_tile_op *op,
                                       struct tv_error *err);

#endif
