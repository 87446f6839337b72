/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_math_parts.h - what the files behind tv/cuda_math.h share (private).
 */
#ifndef TVK_CUDA_MATH_PARTS_H
#define TVK_CUDA_MATH_PARTS_H

#include "cuda/cuda_blas_abi.h"
#include "cuda/cuda_parts.h"
#include "tv/cuda_math.h"

/* Device memory that a handle takes: cuBLAS's workspace, a counter. */
uint64_t tvk_cuda_workspace(const tvk_cuda *d);

struct tvk_cuda_math {
    tvk_cuda *device;
    const struct tvk_cublas_api *blas;
    const struct tvk_cusolver_api *solver;
    tvk_cb_handle blas_handle;
    tvk_cb_solver solver_handle;
    tvk_cuda_stream *stream; /* of the libraries and of kernels */
    tvk_cuda_stream *copies; /* of uploads beside them */
    tvk_cuda_ptr workspace;
};

/* The device's address as the libraries take it. */
static inline void *tvk_cuda_address(tvk_cuda_ptr at)
{
    return (void *)(uintptr_t)at;
}

/* Result of a call of a library as an error. */
enum tv_err tvk_cuda_blas_done(tvk_cuda_math *m, int code, const char *call,
                               struct tv_error *err);
enum tv_err tvk_cuda_solver_done(tvk_cuda_math *m, int code, const char *call,
                                 struct tv_error *err);

#endif
