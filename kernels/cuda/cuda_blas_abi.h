/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_blas_abi.h - the parts of cuBLAS and cuSOLVER that are used, and the
 * tables that dlopen fills (private to kernels/cuda).
 *
 * Declared here for the reason given in cuda_abi.h, and compared with CUDA's
 * headers by cuda_blas_abi_check.c. Calls of both are the same in CUDA 12 and
 * 13.
 */
#ifndef TVK_CUDA_BLAS_ABI_H
#define TVK_CUDA_BLAS_ABI_H

#include <stddef.h>

#ifndef TVK_CUDA_BLAS_ABI_TYPES /* set by cuda_blas_abi_check.c */
typedef int tvk_cb_status;
typedef int tvk_cb_solver_status;
typedef int tvk_cb_op;
typedef int tvk_cb_fill;
typedef int tvk_cb_side;
typedef int tvk_cb_diag;
typedef int tvk_cb_math;
typedef void *tvk_cb_stream;
typedef void *tvk_cb_handle;
typedef void *tvk_cb_solver;
#endif

/* Values of CUDA's enumerations. */
#define TVK_CB_OK               0
#define TVK_CB_NO_MEMORY        3
#define TVK_CB_N                0
#define TVK_CB_T                1
#define TVK_CB_UPPER            1
#define TVK_CB_LEFT             0
#define TVK_CB_NON_UNIT         0
#define TVK_CB_PEDANTIC         2 /* CUBLAS_PEDANTIC_MATH: no TF32, whatever */
#define TVK_CB_SOLVER_NO_MEMORY 2 /* NVIDIA_TF32_OVERRIDE says */

/* F(field, symbol, (parameters)) */
#define TVK_CUDA_CUBLAS(F)                                                     \
    F(create, cublasCreate_v2, (tvk_cb_handle * h))                            \
    F(destroy, cublasDestroy_v2, (tvk_cb_handle h))                            \
    F(set_stream, cublasSetStream_v2, (tvk_cb_handle h, tvk_cb_stream s))      \
    F(set_workspace, cublasSetWorkspace_v2,                                    \
      (tvk_cb_handle h, void *at, size_t bytes))                               \
    F(set_math, cublasSetMathMode, (tvk_cb_handle h, tvk_cb_math mode))        \
    F(sgemm, cublasSgemm_v2,                                                   \
      (tvk_cb_handle h, tvk_cb_op ta, tvk_cb_op tb, int m, int n, int k,       \
       const float *alpha, const float *a, int lda, const float *b, int ldb,   \
       const float *beta, float *c, int ldc))                                  \
    F(sgemm_batched, cublasSgemmBatched,                                       \
      (tvk_cb_handle h, tvk_cb_op ta, tvk_cb_op tb, int m, int n, int k,       \
       const float *alpha, const float *const *a, int lda,                     \
       const float *const *b, int ldb, const float *beta, float *const *c,     \
       int ldc, int n_problems))                                               \
    F(dtrsm, cublasDtrsm_v2,                                                   \
      (tvk_cb_handle h, tvk_cb_side side, tvk_cb_fill fill, tvk_cb_op ta,      \
       tvk_cb_diag diag, int m, int n, const double *alpha, const double *a,   \
       int lda, double *b, int ldb))

#define TVK_CUDA_CUSOLVER(F)                                                   \
    F(create, cusolverDnCreate, (tvk_cb_solver * h))                           \
    F(destroy, cusolverDnDestroy, (tvk_cb_solver h))                           \
    F(set_stream, cusolverDnSetStream, (tvk_cb_solver h, tvk_cb_stream s))     \
    F(dpotrf_size, cusolverDnDpotrf_bufferSize,                                \
      (tvk_cb_solver h, tvk_cb_fill fill, int n, double *a, int lda,           \
       int *n_work))                                                           \
    F(dpotrf, cusolverDnDpotrf,                                                \
      (tvk_cb_solver h, tvk_cb_fill fill, int n, double *a, int lda,           \
       double *work, int n_work, int *info))

struct tvk_cublas_api {
#define TVK_CUDA_FIELD(field, symbol, params) tvk_cb_status(*field) params;
    TVK_CUDA_CUBLAS(TVK_CUDA_FIELD)
#undef TVK_CUDA_FIELD
};
struct tvk_cusolver_api {
#define TVK_CUDA_FIELD(field, symbol, params)                                  \
    tvk_cb_solver_status(*field) params;
    TVK_CUDA_CUSOLVER(TVK_CUDA_FIELD)
#undef TVK_CUDA_FIELD
};

#endif
