/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/cuda.h - one CUDA device: memory within a budget, streams, kernels.
 *
 * The driver (libcuda.so.1) is loaded when a device is first asked for, so one
 * binary runs on machines without driver or GPU; there is no link-time
 * dependency, and this header includes none of CUDA's. The kernels travel in
 * the binary (kernels/cuda/, one code per architecture). Built without the CUDA
 * toolkit, everything here exists and tvk_cuda_open says why it cannot work.
 *
 *   device --- budget: what tvk_cuda_alloc hands out in all
 *     |------- stream: copies and launches in order; several run side by side
 *     '------- table:  the row of tv/kernels.h, host pointers in and out
 *
 * Errors: BUDGET when device memory does not suffice (asked for less, the call
 * may succeed: nothing is broken). Anything else that the driver refuses is
 * IO, names device, call and CUDA's own code, and is remembered: from then on
 * every call fails with it (tvk_cuda_trouble), because a lost device does not
 * come back in this process.
 *
 * Thread rule: all functions may be called from any thread at any time, but
 * open, close and table; one stream belongs to one thread at a time. Memory
 * and streams must be given back before close.
 */
#ifndef TV_CUDA_H
#define TV_CUDA_H

#include <stddef.h>
#include <stdint.h>

#include "tv/error.h"
#include "tv/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tvk_cuda tvk_cuda;
/* An address in device memory; 0 is none. Never followed on the host. */
typedef unsigned long long tvk_cuda_ptr;
typedef struct tvk_cuda_stream tvk_cuda_stream;

struct tvk_cuda_options {
    int index;             /* as the driver counts; default 0 */
    uint64_t memory_bytes; /* most device memory; 0: 80% of what is free */
    /* What tvk_cuda_layer_factors goes by (tv/cuda_math.h), so that work can go
     * on as it began; 0: the same. */
    uint64_t factor_bytes;
    /* Calls of the table that would not gain (fewer elements than this, or
     * little work for the data moved) are done by the row below it, which
     * gives the same bits. 0: the device does every call. Default
     * TVK_CUDA_LEAST. */
    size_t least_elems;
    /* Most host memory that the table pins for staging; it is taken with
     * tv_alloc. Default TVK_CUDA_STAGING. */
    size_t staging_bytes;
    /* Code instead of the one in this binary (cubin, fatbin or PTX); borrowed
     * for the call. NULL: the binary's. */
    const void *image;
};
#define TVK_CUDA_LEAST   65536u
#define TVK_CUDA_STAGING (16u << 20)
void tvk_cuda_options_init(struct tvk_cuda_options *o);

/* "NVIDIA H100 (compute 9.0, 81559 MiB, driver 12.4)", or "none (REASON)".
 * Makes no context, so costs little. Filled, returns dst. */
const char *tvk_cuda_describe(int index, char *dst, size_t cap);
/* TV_OK when device `index` exists and this binary has code; else UNSUPPORTED
 * with the reason. Makes no context. */
TV_NODISCARD enum tv_err tvk_cuda_find(int index, struct tv_error *err);

/* Opens a device: its primary context and the kernels. UNSUPPORTED: no driver,
 * no such device, no code for it; BUDGET: no memory left on it. Owned, closed
 * by tvk_cuda_close. */
TV_NODISCARD enum tv_err tvk_cuda_open(const struct tvk_cuda_options *o,
                                       struct tv_error *err, tvk_cuda **out);
void tvk_cuda_close(tvk_cuda *d); /* NULL allowed */

struct tvk_cuda_info {
    char name[128];                          /* "NVIDIA H100 80GB HBM3" */
    int index, major, minor, driver_version; /* 12040: 12.4 */
    uint64_t total_bytes, budget_bytes, factor_bytes;
};
/* Borrowed until close. */
const struct tvk_cuda_info *tvk_cuda_about(const tvk_cuda *d);
/* Bytes of the budget not handed out, at this moment. */
uint64_t tvk_cuda_left(tvk_cuda *d);
/* Kernels launched until now: what a run did on the device. */
uint64_t tvk_cuda_launches(tvk_cuda *d);
/* TV_OK, or the first error that broke the device (NULL device: TV_OK). */
enum tv_err tvk_cuda_trouble(tvk_cuda *d, struct tv_error *err);

/* Device memory of the budget, at least 256-byte aligned; `what` is for the
 * message. 0 bytes give address 0. Owned, given back by tvk_cuda_free with the
 * same size. BUDGET: over the budget, or the device has none left. */
TV_NODISCARD enum tv_err tvk_cuda_alloc(tvk_cuda *d, size_t bytes,
                                        const char *what, struct tv_error *err,
                                        tvk_cuda_ptr *out);
void tvk_cuda_free(tvk_cuda *d, tvk_cuda_ptr at, size_t bytes); /* 0 allowed */

/* Host memory that copies overlap with (page-locked), whole pages of
 * tv_alloc's. Owned, given back by tvk_cuda_unpin. NOMEM, or as above. */
TV_NODISCARD enum tv_err tvk_cuda_pin(tvk_cuda *d, size_t bytes,
                                      struct tv_error *err, void **out);
void tvk_cuda_unpin(tvk_cuda *d, void *p); /* NULL allowed */

/* A stream; owned, closed (after waiting for it) by tvk_cuda_stream_close. */
TV_NODISCARD enum tv_err tvk_cuda_stream_open(tvk_cuda *d, struct tv_error *err,
                                              tvk_cuda_stream **out);
void tvk_cuda_stream_close(tvk_cuda_stream *s); /* NULL allowed */
/* The driver's handle (CUstream), for libraries that take one; the calling
 * thread then also needs tvk_cuda_enter. */
void *tvk_cuda_stream_raw(const tvk_cuda_stream *s);
/* Makes the device's context the calling thread's. All functions here do so
 * by themselves. */
TV_NODISCARD enum tv_err tvk_cuda_enter(tvk_cuda *d, struct tv_error *err);

/* The following return at once and happen in the order of the stream. Host
 * memory must stay as it is until tvk_cuda_sync; copies from memory that is
 * not pinned may wait. Errors of earlier work may be reported by later calls.
 */
TV_NODISCARD enum tv_err tvk_cuda_upload(tvk_cuda_stream *s, tvk_cuda_ptr to,
                                         const void *from, size_t bytes,
                                         struct tv_error *err);
TV_NODISCARD enum tv_err tvk_cuda_download(tvk_cuda_stream *s, void *to,
                                           tvk_cuda_ptr from, size_t bytes,
                                           struct tv_error *err);
/* Device to device; the ranges must not overlap. */
TV_NODISCARD enum tv_err tvk_cuda_copy(tvk_cuda_stream *s, tvk_cuda_ptr to,
                                       tvk_cuda_ptr from, size_t bytes,
                                       struct tv_error *err);
TV_NODISCARD enum tv_err tvk_cuda_fill(tvk_cuda_stream *s, tvk_cuda_ptr at,
                                       unsigned char value, size_t bytes,
                                       struct tv_error *err);
/* Launches the kernel `name` (a string that lives as long as the device) of
 * the image with one parameter, the struct at args, on grid_x * grid_y blocks
 * of `block` threads and `shared` bytes of dynamic shared memory. */
TV_NODISCARD enum tv_err tvk_cuda_launch(tvk_cuda_stream *s, const char *name,
                                         unsigned grid_x, unsigned grid_y,
                                         unsigned block, size_t shared,
                                         void *args, struct tv_error *err);
/* Waits until everything on the stream is done. */
TV_NODISCARD enum tv_err tvk_cuda_sync(tvk_cuda_stream *s,
                                       struct tv_error *err);

/* The row of the kernel table that computes on the device, over `below`, the
 * CPU's row: arguments and results are host memory as in every row, same bits.
 * Its calls cannot fail: where the device does, they finish on the CPU, and
 * `trouble` of the table says so (see tv/kernels.h). Also below's are calls
 * that would not gain (least_elems), and those whose operands cannot be cut
 * into tiles of the staging memory. One device at a time has the table; it is
 * borrowed until tvk_cuda_close. `isa` is below's, `name` is "cuda". */
TV_NODISCARD enum tv_err tvk_cuda_table(tvk_cuda *d,
                                        const struct tvk_table *below,
                                        struct tv_error *err,
                                        const struct tvk_table **out);
/* Host memory that the table may pin, all in all; 0 before it is made. */
size_t tvk_cuda_staging(const tvk_cuda *d);

#ifdef __cplusplus
}
#endif
#endif
