/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_abi.h - the part of the CUDA driver's interface that is used, and the
 * table that dlopen fills (private to kernels/cuda).
 *
 * Declared here so that the device handle builds and is tested on machines
 * without the toolkit. With the toolkit, cuda_abi_check.c compiles this list
 * against CUDA's own header. Symbols carry the version that drivers of CUDA 12
 * and 13 both export.
 */
#ifndef TVK_CUDA_ABI_H
#define TVK_CUDA_ABI_H

#include <stddef.h>

#ifndef TVK_CUDA_ABI_TYPES /* set by cuda_abi_check.c, with CUDA's types */
typedef int tvk_cu_result;
typedef int tvk_cu_device;
typedef int tvk_cu_attribute;
typedef unsigned long long tvk_cu_ptr;
typedef void *tvk_cu_context;
typedef void *tvk_cu_module;
typedef void *tvk_cu_function;
typedef void *tvk_cu_stream;
typedef void *tvk_cu_event;
#endif

/* Values of CUDA's enumerations. */
#define TVK_CU_OK            0
#define TVK_CU_NO_MEMORY     2
#define TVK_CU_NO_DEVICE     100
#define TVK_CU_NO_CODE       209
#define TVK_CU_NOT_FOUND     500
#define TVK_CU_ATTR_MAJOR    75
#define TVK_CU_ATTR_MINOR    76
#define TVK_CU_STREAM_APART  1 /* CU_STREAM_NON_BLOCKING */
#define TVK_CU_EVENT_UNTIMED 2 /* CU_EVENT_DISABLE_TIMING */
#define TVK_CU_HOST_PORTABLE 1 /* CU_MEMHOSTREGISTER_PORTABLE */

/* F(field, symbol, (parameters)) */
#define TVK_CUDA_DRIVER(F)                                                     \
    F(init, cuInit, (unsigned flags))                                          \
    F(driver_version, cuDriverGetVersion, (int *version))                      \
    F(error_name, cuGetErrorName, (tvk_cu_result code, const char **name))     \
    F(device_count, cuDeviceGetCount, (int *n))                                \
    F(device_get, cuDeviceGet, (tvk_cu_device * d, int index))                 \
    F(device_name, cuDeviceGetName, (char *name, int cap, tvk_cu_device d))    \
    F(device_attribute, cuDeviceGetAttribute,                                  \
      (int *value, tvk_cu_attribute which, tvk_cu_device d))                   \
    F(device_total, cuDeviceTotalMem_v2, (size_t * bytes, tvk_cu_device d))    \
    F(context_retain, cuDevicePrimaryCtxRetain,                                \
      (tvk_cu_context * c, tvk_cu_device d))                                   \
    F(context_release, cuDevicePrimaryCtxRelease_v2, (tvk_cu_device d))        \
    F(context_use, cuCtxSetCurrent, (tvk_cu_context c))                        \
    F(mem_info, cuMemGetInfo_v2, (size_t * free_bytes, size_t * total))        \
    F(mem_alloc, cuMemAlloc_v2, (tvk_cu_ptr * at, size_t bytes))               \
    F(mem_free, cuMemFree_v2, (tvk_cu_ptr at))                                 \
    F(host_register, cuMemHostRegister_v2,                                     \
      (void *p, size_t bytes, unsigned flags))                                 \
    F(host_unregister, cuMemHostUnregister, (void *p))                         \
    F(upload, cuMemcpyHtoDAsync_v2,                                            \
      (tvk_cu_ptr to, const void *from, size_t bytes, tvk_cu_stream s))        \
    F(download, cuMemcpyDtoHAsync_v2,                                          \
      (void *to, tvk_cu_ptr from, size_t bytes, tvk_cu_stream s))              \
    F(copy, cuMemcpyDtoDAsync_v2,                                              \
      (tvk_cu_ptr to, tvk_cu_ptr from, size_t bytes, tvk_cu_stream s))         \
    F(fill, cuMemsetD8Async,                                                   \
      (tvk_cu_ptr at, unsigned char value, size_t bytes, tvk_cu_stream s))     \
    F(stream_create, cuStreamCreate, (tvk_cu_stream * s, unsigned flags))      \
    F(stream_destroy, cuStreamDestroy_v2, (tvk_cu_stream s))                   \
    F(stream_sync, cuStreamSynchronize, (tvk_cu_stream s))                     \
    F(module_load, cuModuleLoadData, (tvk_cu_module * m, const void *image))   \
    F(module_unload, cuModuleUnload, (tvk_cu_module m))                        \
    F(module_function, cuModuleGetFunction,                                    \
      (tvk_cu_function * f, tvk_cu_module m, const char *name))                \
    F(launch, cuLaunchKernel,                                                  \
      (tvk_cu_function f, unsigned grid_x, unsigned grid_y, unsigned grid_z,   \
       unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,  \
       tvk_cu_stream s, void **params, void **extra))

struct tvk_cuda_api {
#define TVK_CUDA_FIELD(field, symbol, params) tvk_cu_result(*field) params;
    TVK_CUDA_DRIVER(TVK_CUDA_FIELD)
#undef TVK_CUDA_FIELD
};

#endif
