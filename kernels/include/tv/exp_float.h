/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/exp_float.h - e^x for a float, in operations that compilers turn into
 * vectors and that give the same bits wherever multiply and add are not fused:
 * the CPU's forward pass and the device's use it.
 *
 * Cephes' expf: x = n log 2 + r, log 2 in two parts, e^r by a polynomial of
 * degree 5, times 2^n; within 2 ulp. Below -87 the result is 0, above 88
 * infinity; NaN stays NaN.
 */
#ifndef TV_EXP_FLOAT_H
#define TV_EXP_FLOAT_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define TVK_EXP static __host__ __device__ __forceinline__
#else
#define TVK_EXP static inline
#endif

TVK_EXP float tvk_exp_float(float x)
{
    const float lo = -87.0f, hi = 88.0f;
    const float c = x < lo ? lo : x > hi ? hi : x;
    /* adding 1.5 * 2^23 rounds to a whole number in the low bits */
    const float shifted = c * 1.44269504088896341f + 12582912.0f;
    const float n = shifted - 12582912.0f;
    float r = c - n * 0.693359375f;
    float p = 1.9875691500e-4f;
    uint32_t bits = 0;
    float scale = 0;

    r = r - n * -2.12194440e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23; /* the low bits of `shifted` are n */
    memcpy(&scale, &bits, sizeof scale);
    p = p * scale;
    p = x < lo ? 0.0f : p;
    return x > hi ? INFINITY : p;
}

#undef TVK_EXP
#endif
