/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_kernels.cu - all device code of the binary, as one unit for nvcc.
 */
#include "cu_ops.cu"
#include "cu_matrix.h"
TVK_CU_MATRIX_KERNELS(ELEMENTS, BLOCKS2, BLOCKS3)
#include "cu_eval.h"
TVK_CU_EVAL_KERNELS(ELEMENTS, BLOCKS2, BLOCKS3)
