/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cu_ops.cu - the kernels of cu_ops.h: every thread of the grid runs the body.
 *
 * nvcc sees -fmad=false: a multiply and an add stay two roundings, as in
 * kernels/ref. No fast mathematics, no flushing of subnormals.
 */
#include "cu_ops.h"

__device__ static struct tvk_cu_place here(void)
{
    struct tvk_cu_place at;

    at.block = blockIdx.x;
    at.thread = threadIdx.x;
    at.n_blocks = gridDim.x;
    at.n_threads = blockDim.x;
    return at;
}

#define ELEMENTS(name, args, body)                                             \
    extern "C" __global__ void name(const struct args a)                       \
    {                                                                          \
        const struct tvk_cu_place at = here();                                 \
        body(&at, &a);                                                         \
    }
#define BLOCKS2(name, args, type, n, phase0, phase1)                           \
    extern "C" __global__ void name(const struct args a)                       \
    {                                                                          \
        __shared__ type shared[n];                                             \
        const struct tvk_cu_place at = here();                                 \
        phase0(&at, shared, &a);                                               \
        __syncthreads();                                                       \
        phase1(&at, shared, &a);                                               \
    }
#define BLOCKS3(name, args, type, n, phase0, phase1, phase2)                   \
    extern "C" __global__ void name(const struct args a)                       \
    {                                                                          \
        __shared__ type shared[n];                                             \
        const struct tvk_cu_place at = here();                                 \
        phase0(&at, shared, &a);                                               \
        __syncthreads();                                                       \
        phase1(&at, shared, &a);                                               \
        __syncthreads();                                                       \
        phase2(&at, shared, &a);                                               \
    }
TVK_CU_KERNELS(ELEMENTS, BLOCKS2, BLOCKS3)
