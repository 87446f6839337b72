/* SPDX-License-Identifier: Apache-2.0 */
/*
 * convert.c - bf16 and f16 to and from fp32, by integer arithmetic.
 *
 * Widening is exact. Narrowing rounds to nearest, ties to even, overflows to
 * infinity and keeps subnormals. A NaN keeps its sign and the leading bits of
 * its payload and becomes quiet, in both directions: what the F16C
 * instructions do (Intel SDM, VCVTPH2PS and VCVTPS2PH), for bf16 as well.
 *
 *   fp32  s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm   bias 127
 *   bf16  s eeeeeeee mmmmmmm                   bias 127
 *   f16   s eeeee    mmmmmmmmmm                bias 15
 */
#include "rows.h"

#include <assert.h>
#include <string.h>

#define F32_INF   0x7f800000u
#define F32_QUIET 0x00400000u
#define BF16_INF  0x7f80u
#define F16_INF   0x7c00u

static uint16_t load16(const void *src, size_t i)
{
    uint16_t v = 0;
    memcpy(&v, (const unsigned char *)src + 2 * i, sizeof(v));
    return v;
}

static void store16(void *dst, size_t i, uint32_t v)
{
    const uint16_t h = (uint16_t)v;
    memcpy((unsigned char *)dst + 2 * i, &h, sizeof(h));
}

static uint32_t f32_bits_of_bf16(uint16_t h)
{
    const uint32_t u = (uint32_t)h << 16;
    return (u & 0x7fffffffu) > F32_INF ? u | F32_QUIET : u;
}

static uint32_t bf16_of_f32_bits(uint32_t u)
{
    if ((u & 0x7fffffffu) > F32_INF)
        return (u | F32_QUIET) >> 16;
    return (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
}

static uint32_t f32_bits_of_f16(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = h >> 10 & 0x1fu;
    uint32_t mantissa = h & 0x3ffu;

    if (exponent == 0x1f) {
        const uint32_t quiet = mantissa != 0 ? F32_QUIET : 0;
        return sign | F32_INF | quiet | mantissa << 13;
    }
    if (exponent == 0) {
        if (mantissa == 0)
            return sign;
        /* Subnormal: fp32 has the range to hold it normalised. */
        exponent = 1;
        while (!(mantissa & 0x400u)) {
            mantissa <<= 1;
            exponent--;
        }
        mantissa &= 0x3ffu;
    }
    return sign | (exponent + 112) << 23 | mantissa << 13;
}

static uint32_t f16_of_f32_bits(uint32_t u)
{
    const uint32_t sign = u >> 16 & 0x8000u;
    const uint32_t a = u & 0x7fffffffu;

    if (a > F32_INF)
        return sign | 0x7e00u | (a >> 13 & 0x3ffu);
    /* 65520, half-way between the largest f16 and 2^16, rounds up. */
    if (a >= 0x477ff000u)
        return sign | 0x7c00u;
    if (a >= 0x38800000u) /* 2^-14, the smallest normal */
        return sign | (((a + 0xfffu + (a >> 13 & 1u)) >> 13) - (112u << 10));
    if (a <= 0x33000000u) /* 2^-25, half the smallest, ties to zero */
        return sign;

    const uint32_t shift = 126u - (a >> 23); /* 14..24 */
    const uint32_t m = (a & 0x7fffffu) | 0x800000u;
    const uint32_t rest = m & ((1u << shift) - 1u);
    const uint32_t half = 1u << (shift - 1);
    uint32_t q = m >> shift;
    if (rest > half || (rest == half && (q & 1u)))
        q++;
    return sign | q;
}

static uint64_t bf16_to_f32(float *TVK_RESTRICT dst,
                            const void *TVK_RESTRICT src, size_t n)
{
    uint64_t bad = 0;

    for (size_t i = 0; i < n; i++) {
        const uint32_t u = f32_bits_of_bf16(load16(src, i));
        memcpy(dst + i, &u, sizeof(u));
        bad += (u & F32_INF) == F32_INF;
    }
    return bad;
}

static uint64_t f16_to_f32(float *TVK_RESTRICT dst,
                           const void *TVK_RESTRICT src, size_t n)
{
    uint64_t bad = 0;

    for (size_t i = 0; i < n; i++) {
        const uint32_t u = f32_bits_of_f16(load16(src, i));
        memcpy(dst + i, &u, sizeof(u));
        bad += (u & F32_INF) == F32_INF;
    }
    return bad;
}

static uint64_t f32_to_bf16(void *TVK_RESTRICT dst,
                            const float *TVK_RESTRICT src, size_t n)
{
    uint64_t bad = 0;

    for (size_t i = 0; i < n; i++) {
        uint32_t u = 0;
        memcpy(&u, src + i, sizeof(u));
        const uint32_t h = bf16_of_f32_bits(u);
        store16(dst, i, h);
        bad += (h & BF16_INF) == BF16_INF;
    }
    return bad;
}

static uint64_t f32_to_f16(void *TVK_RESTRICT dst,
                           const float *TVK_RESTRICT src, size_t n)
{
    uint64_t bad = 0;

    for (size_t i = 0; i < n; i++) {
        uint32_t u = 0;
        memcpy(&u, src + i, sizeof(u));
        const uint32_t h = f16_of_f32_bits(u);
        store16(dst, i, h);
        bad += (h & F16_INF) == F16_INF;
    }
    return bad;
}

static float float_of(uint32_t u)
{
    float v = 0;
    memcpy(&v, &u, sizeof(v));
    return v;
}

static uint32_t bits_of(float v)
{
    uint32_t u = 0;
    memcpy(&u, &v, sizeof(u));
    return u;
}

static void split_bf16(uint16_t *TVK_RESTRICT dst, size_t plane,
                       const float *TVK_RESTRICT src, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const uint32_t u = bits_of(src[i]);
        const uint32_t a = u & 0x7fffffffu;
        uint32_t p[3] = {bf16_of_f32_bits(u), 0, 0};

        if (a < F32_INF) {
            if ((p[0] & BF16_INF) == BF16_INF)
                p[0] = u >> 16;
            const float r1 = src[i] - float_of(p[0] << 16);
            p[1] = bf16_of_f32_bits(bits_of(r1));
            const float r2 = r1 - float_of(p[1] << 16);
            p[2] = bf16_of_f32_bits(bits_of(r2));
        }
        for (size_t j = 0; j < 3; j++)
            dst[j * plane + i] = (uint16_t)p[j];
    }
}

void tvk_ref_convert(struct tvk_table *t)
{
    t->bf16_to_f32 = bf16_to_f32;
    t->f16_to_f32 = f16_to_f32;
    t->f32_to_bf16 = f32_to_bf16;
    t->f32_to_f16 = f32_to_f16;
    t->split_bf16 = split_bf16;
}

uint64_t tvk_to_f32(const struct tvk_table *k, enum tv_dtype t, float *dst,
                    const void *src, size_t n)
{
    assert(t == TV_F32 || t == TV_F16 || t == TV_BF16);
    if (t == TV_BF16)
        return k->bf16_to_f32(dst, src, n);
    if (t == TV_F16)
        return k->f16_to_f32(dst, src, n);
    if (n > 0)
        memcpy(dst, src, n * sizeof(float));
    return k->count_nonfinite(dst, n);
}

uint64_t tvk_from_f32(const struct tvk_table *k, enum tv_dtype t, void *dst,
                      const float *src, size_t n)
{
    assert(t == TV_F32 || t == TV_F16 || t == TV_BF16);
    if (t == TV_BF16)
        return k->f32_to_bf16(dst, src, n);
    if (t == TV_F16)
        return k->f32_to_f16(dst, src, n);
    if (n > 0)
        memcpy(dst, src, n * sizeof(float));
    return k->count_nonfinite(src, n);
}
