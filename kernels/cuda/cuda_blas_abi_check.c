/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_blas_abi_check.c - the compiler compares cuda_blas_abi.h with the
 * headers of cuBLAS and cuSOLVER; see cuda_abi_check.c.
 */
#include <cublas_v2.h>
#include <cusolverDn.h>

#define TVK_CUDA_BLAS_ABI_TYPES
typedef cublasStatus_t tvk_cb_status;
typedef cusolverStatus_t tvk_cb_solver_status;
typedef cublasOperation_t tvk_cb_op;
typedef cublasFillMode_t tvk_cb_fill;
typedef cublasSideMode_t tvk_cb_side;
typedef cublasDiagType_t tvk_cb_diag;
typedef cublasMath_t tvk_cb_math;
typedef cudaStream_t tvk_cb_stream;
typedef cublasHandle_t tvk_cb_handle;
typedef cusolverDnHandle_t tvk_cb_solver;
#include "cuda/cuda_blas_abi.h"

#include "tv/error.h"

_Static_assert(sizeof(cublasStatus_t) == sizeof(int), "status");
_Static_assert(sizeof(cusolverStatus_t) == sizeof(int), "status");
_Static_assert(sizeof(cublasOperation_t) == sizeof(int), "enumeration");
_Static_assert(sizeof(cublasFillMode_t) == sizeof(int), "enumeration");
_Static_assert(sizeof(cublasMath_t) == sizeof(int), "enumeration");
_Static_assert(sizeof(cublasHandle_t) == sizeof(void *), "handle");
_Static_assert(TVK_CB_OK == CUBLAS_STATUS_SUCCESS, "value");
_Static_assert(TVK_CB_OK == CUSOLVER_STATUS_SUCCESS, "value");
_Static_assert(TVK_CB_NO_MEMORY == CUBLAS_STATUS_ALLOC_FAILED, "value");
_Static_assert(TVK_CB_SOLVER_NO_MEMORY == CUSOLVER_STATUS_ALLOC_FAILED,
               "value");
_Static_assert(TVK_CB_N == CUBLAS_OP_N, "value");
_Static_assert(TVK_CB_T == CUBLAS_OP_T, "value");
_Static_assert(TVK_CB_UPPER == CUBLAS_FILL_MODE_UPPER, "value");
_Static_assert(TVK_CB_LEFT == CUBLAS_SIDE_LEFT, "value");
_Static_assert(TVK_CB_NON_UNIT == CUBLAS_DIAG_NON_UNIT, "value");
_Static_assert(TVK_CB_PEDANTIC == CUBLAS_PEDANTIC_MATH, "value");

/* Types only: what `symbol` would be assigned to. */
#define CHECK_BLAS(field, symbol, params)                                      \
    _Static_assert(__builtin_types_compatible_p(                               \
                       __typeof__(((struct tvk_cublas_api *)0)->field),        \
                       __typeof__(&symbol)),                                   \
                   #symbol);
#define CHECK_SOLVER(field, symbol, params)                                    \
    _Static_assert(__builtin_types_compatible_p(                               \
                       __typeof__(((struct tvk_cusolver_api *)0)->field),      \
                       __typeof__(&symbol)),                                   \
                   #symbol);
TVK_CUDA_CUBLAS(CHECK_BLAS)
TVK_CUDA_CUSOLVER(CHECK_SOLVER)
