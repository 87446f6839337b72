/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_parts.h - what the files of kernels/cuda share (private).
 */
#ifndef TVK_CUDA_PARTS_H
#define TVK_CUDA_PARTS_H

#include <pthread.h>
#include <stdbool.h>

#include "cuda/cuda_abi.h"
#include "tv/cuda.h"

/* The device code in this binary (cuda_image.c), or NULL and why there is none
 * (cuda_none.c). */
const void *tvk_cuda_image(void);
const char *tvk_cuda_image_missing(void);

/* The driver's functions, loaded by the first call; NULL and the reason in
 * *why (static, or kept as long as the process) when there is no driver.
 * Thread-safe. The library is never unloaded: it has threads of its own. */
const struct tvk_cuda_api *tvk_cuda_driver(const char **why);

#define TVK_CUDA_FUNCTIONS_MAX 64u

struct tvk_cuda_row;  /* cuda_row.c */
struct tvk_cuda_math; /* cuda_blas.c */

struct tvk_cuda {
    const struct tvk_cuda_api *api;
    struct tvk_cuda_info info;
    struct tvk_cuda_options options;
    tvk_cu_device device;
    tvk_cu_context context;
    tvk_cu_module module;
    struct tvk_cuda_row *row;   /* owned: tvk_cuda_row_free */
    struct tvk_cuda_math *math; /* owned: tvk_cuda_math_close */

    pthread_mutex_t mutex; /* guards what follows */
    uint64_t used_bytes, n_launches;
    struct {
        const char *name;
        tvk_cu_function function;
    } functions[TVK_CUDA_FUNCTIONS_MAX];
    unsigned n_functions;
    struct tv_error trouble; /* the first error that broke the device */
};

struct tvk_cuda_stream {
    tvk_cuda *device;
    tvk_cu_stream raw;
};

/* A refusal of the driver as an error: BUDGET when out of memory, else IO,
 * which breaks the device. Returns the code. */
enum tv_err tvk_cuda_refused(tvk_cuda *d, tvk_cu_result code, const char *call,
                             struct tv_error *err);
/* The same for a call of a library whose codes are its own. Returns IO. */
enum tv_err tvk_cuda_broken(tvk_cuda *d, const char *call, int code,
                            struct tv_error *err);
/* Waits for what may still use memory that is about to go; errors show in the
 * next call that can tell. */
void tvk_cuda_settle(tvk_cuda_stream *s);
void tvk_cuda_row_free(struct tvk_cuda_row *r);
/* Gives back the device memory that nobody uses at the moment. */
void tvk_cuda_row_reclaim(struct tvk_cuda_row *r);
void tvk_cuda_math_close(struct tvk_cuda_math *m);

#endif
