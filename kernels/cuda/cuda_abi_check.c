/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_abi_check.c - the compiler compares cuda_abi.h with CUDA's own header.
 *
 * Built only where the toolkit is; nothing calls it and nothing of it is kept
 * by the linker. Drivers are asked for versioned symbols by name, so the check
 * is of types and values, not of the library.
 */
#include <cuda.h>

#define TVK_CUDA_ABI_TYPES
typedef CUresult tvk_cu_result;
typedef CUdevice tvk_cu_device;
typedef CUdevice_attribute tvk_cu_attribute;
typedef CUdeviceptr tvk_cu_ptr;
typedef CUcontext tvk_cu_context;
typedef CUmodule tvk_cu_module;
typedef CUfunction tvk_cu_function;
typedef CUstream tvk_cu_stream;
typedef CUevent tvk_cu_event;
#include "cuda/cuda_abi.h"

#include "cuda/cuda_parts.h"

/* What cuda_abi.h declares where this header is not there. */
_Static_assert(sizeof(CUresult) == sizeof(int), "result");
_Static_assert(sizeof(CUdevice) == sizeof(int), "device");
_Static_assert(sizeof(CUdevice_attribute) == sizeof(int), "attribute");
_Static_assert(sizeof(CUdeviceptr) == sizeof(unsigned long long), "address");
_Static_assert(sizeof(CUstream) == sizeof(void *), "handles");
_Static_assert(TVK_CU_OK == CUDA_SUCCESS, "value");
_Static_assert(TVK_CU_NO_MEMORY == CUDA_ERROR_OUT_OF_MEMORY, "value");
_Static_assert(TVK_CU_NO_DEVICE == CUDA_ERROR_NO_DEVICE, "value");
_Static_assert(TVK_CU_NO_CODE == CUDA_ERROR_NO_BINARY_FOR_GPU, "value");
_Static_assert(TVK_CU_NOT_FOUND == CUDA_ERROR_NOT_FOUND, "value");
_Static_assert(TVK_CU_ATTR_MAJOR ==
                   CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
               "value");
_Static_assert(TVK_CU_ATTR_MINOR ==
                   CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
               "value");
_Static_assert(TVK_CU_STREAM_APART == CU_STREAM_NON_BLOCKING, "value");
_Static_assert(TVK_CU_EVENT_UNTIMED == CU_EVENT_DISABLE_TIMING, "value");
_Static_assert(TVK_CU_HOST_PORTABLE == CU_MEMHOSTREGISTER_PORTABLE, "value");

/* Types only: what `symbol` would be assigned to. */
#define CHECK(field, symbol, params)                                           \
    _Static_assert(__builtin_types_compatible_p(                               \
                       __typeof__(((struct tvk_cuda_api *)0)->field),          \
                       __typeof__(&symbol)),                                   \
                   #symbol);
TVK_CUDA_DRIVER(CHECK)
