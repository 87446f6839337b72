/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cu_hd.h - how a kernel is written once for the device and for the host
 * (private to kernels/cuda; read by nvcc as C++ and by C compilers).
 *
 * A kernel is one or more phases: functions of the place of a thread in the
 * grid, of the block's shared memory and of the arguments. On the device every
 * thread runs them one after the other with a barrier in between (the .cu
 * files); on the host loops over blocks, phases and threads do (fake_cuda.c).
 * A phase may read what other threads of its block wrote in an earlier one,
 * and never what is written in its own, so both orders give the same.
 *
 * Arithmetic: what kernels/ref does, operation by operation; nvcc is told not
 * to fuse. Sums of integers may run in any order (TVK_ADD), sums of floats
 * have the order of tv/kernels.h.
 */
#ifndef TVK_CU_HD_H
#define TVK_CU_HD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __CUDACC__
#define TVK_HD static __host__ __device__ __forceinline__
#else
#define TVK_HD static inline
#endif

/* Where a thread is: a grid of one dimension. */
struct tvk_cu_place {
    uint32_t block, thread, n_blocks, n_threads;
};

/* The number of the thread in the whole grid, and of all threads: a loop from
 * the one in steps of the other touches neighbours in neighbouring threads. */
TVK_HD uint64_t tvk_cu_first(const struct tvk_cu_place *at)
{
    return (uint64_t)at->block * at->n_threads + at->thread;
}

TVK_HD uint64_t tvk_cu_step(const struct tvk_cu_place *at)
{
    return (uint64_t)at->n_blocks * at->n_threads;
}

TVK_HD void tvk_cu_add32(uint32_t *to, uint32_t value)
{
#ifdef __CUDA_ARCH__
    (void)atomicAdd(to, value);
#else
    *to += value;
#endif
}

TVK_HD void tvk_cu_add64(uint64_t *to, uint64_t value)
{
#ifdef __CUDA_ARCH__
    (void)atomicAdd((unsigned long long *)to, (unsigned long long)value);
#else
    *to += value;
#endif
}

TVK_HD uint32_t tvk_cu_bits(float f)
{
#ifdef __CUDA_ARCH__
    return __float_as_uint(f);
#else
    union {
        float f;
        uint32_t u;
    } x;
    x.f = f;
    return x.u;
#endif
}

TVK_HD float tvk_cu_float(uint32_t u)
{
#ifdef __CUDA_ARCH__
    return __uint_as_float(u);
#else
    union {
        float f;
        uint32_t u;
    } x;
    x.u = u;
    return x.f;
#endif
}

#endif
