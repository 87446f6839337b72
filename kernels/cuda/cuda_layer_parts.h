/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_layer_parts.h - what cuda_layer.c, cuda_obs.c and cuda_stage.c share
 * (private).
 */
#ifndef TVK_CUDA_LAYER_PARTS_H
#define TVK_CUDA_LAYER_PARTS_H

#include "cuda/cuda_math_parts.h"

#define TVK_CUDA_THREADS  256u
#define TVK_CUDA_GRID_MAX 4096u

/* ---- matrices of the host, a few rows at a time -------------------------- */

/* Two pinned buffers with a stream each: while one is on its way, the other is
 * packed or unpacked. Calls return when all has arrived. */
struct tvk_cuda_stage {
    tvk_cuda *device;
    size_t floats; /* of a buffer */
    void *host[2];
    tvk_cuda_stream *stream[2];
};

/* Closed by tvk_cuda_stage_close whatever the result. */
TV_NODISCARD enum tv_err tvk_cuda_stage_open(tvk_cuda *d, size_t floats,
                                             struct tv_error *err,
                                             struct tvk_cuda_stage *s);
void tvk_cuda_stage_close(struct tvk_cuda_stage *s);
/* to [rows, width], packed, on the device = from [rows, width] with row stride
 * ld. A row must fit a buffer. */
TV_NODISCARD enum tv_err tvk_cuda_stage_up(struct tvk_cuda_stage *s,
                                           tvk_cuda_ptr to, const float *from,
                                           size_t ld, size_t rows, size_t width,
                                           struct tv_error *err);
/* The way back. What makes `from` must be done. */
TV_NODISCARD enum tv_err tvk_cuda_stage_down(struct tvk_cuda_stage *s,
                                             float *to, size_t ld,
                                             tvk_cuda_ptr from, size_t rows,
                                             size_t width,
                                             struct tv_error *err);

/* ---- a layer ------------------------------------------------------------- */

struct tvk_cuda_layer {
    tvk_cuda_math *math;
    tvk_cuda *device;
    tvk_cuda_stream *stream;
    size_t rows, cols;
    bool on_host;        /* H and U are, and come in panels */
    const float *square; /* then: the one that counts */
    size_t from, to;     /* rows of it that h holds */
    unsigned n_tiles;    /* of T on the device; 0: all of T is there */
    tvk_cuda_ptr h, m, err, small;
    size_t h_bytes, m_bytes, err_bytes, small_bytes;
    /* parts of small */
    tvk_cuda_ptr diagonal, buckets, equal, limit, info, doubles;
    struct tvk_cuda_stage stage; /* of panels and tiles */
};

/* Rows [from, to) of H or U on the device, row stride cols. */
TV_NODISCARD enum tv_err tvk_cuda_layer_panel(tvk_cuda_layer *l, size_t from,
                                              size_t to, struct tv_error *err,
                                              tvk_cuda_ptr *at);
/* Waits: the host's memory may change again. Returns rc, or what waiting
 * found. */
enum tv_err tvk_cuda_layer_finish(tvk_cuda_layer *l, enum tv_err rc,
                                  struct tv_error *err);

/* ---- small things -------------------------------------------------------- */

/* Enough blocks of `threads` for n items, which the kernel loops over. */
static inline enum tv_err tvk_cuda_over(tvk_cuda_stream *s, const char *name,
                                        uint64_t n, unsigned threads,
                                        void *args, struct tv_error *err)
{
    const uint64_t blocks = (n + threads - 1) / threads;

    if (n == 0)
        return TV_OK;
    return tvk_cuda_launch(s, name,
                           blocks < TVK_CUDA_GRID_MAX ? (unsigned)blocks
                                                      : TVK_CUDA_GRID_MAX,
                           1, threads, 0, args, err);
}

static inline size_t tvk_cuda_least(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* Floats behind an address. */
static inline tvk_cuda_ptr tvk_cuda_float(tvk_cuda_ptr p, size_t n)
{
    return p + n * sizeof(float);
}

#endif
