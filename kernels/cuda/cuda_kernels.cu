/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_kernels.cu - all device code of the binary, as one unit for nvcc.
 */
#include "cu_ops.cu"
