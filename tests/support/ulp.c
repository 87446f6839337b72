/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ulp.c - comparing floating-point results in units in the last place.
 *
 * Sign and magnitude patterns are mapped to integers that keep the order of
 * the numbers; the distance is then a subtraction.
 */
#include "ulp.h"

#include <inttypes.h>
#include <string.h>

#include "test.h"

static uint64_t distance(uint32_t a, uint32_t b, uint32_t sign, uint32_t inf)
{
    const uint32_t x = a & ~sign;
    const uint32_t y = b & ~sign;
    if (x > inf || y > inf)
        return x > inf && y > inf ? 0 : ULP_FAR;
    const int64_t i = (a & sign) ? -(int64_t)x : (int64_t)x;
    const int64_t j = (b & sign) ? -(int64_t)y : (int64_t)y;
    return (uint64_t)(i > j ? i - j : j - i);
}

static uint32_t bits_of(float v)
{
    uint32_t bits = 0;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

uint64_t ulp_f32(float a, float b)
{
    return distance(bits_of(a), bits_of(b), UINT32_C(0x80000000),
                    UINT32_C(0x7f800000));
}

uint64_t ulp_bf16(uint16_t a, uint16_t b)
{
    return distance(a, b, 0x8000, 0x7f80);
}

uint64_t ulp_f16(uint16_t a, uint16_t b)
{
    return distance(a, b, 0x8000, 0x7c00);
}

void assert_ulp_f32(const char *what, const float *got, const float *want,
                    size_t n, uint64_t max_ulp)
{
    for (size_t i = 0; i < n; i++) {
        const uint64_t d = ulp_f32(got[i], want[i]);
        if (d > max_ulp)
            fail_msg("%s: element %zu of %zu is %.9g (%08" PRIx32
                     "), expected %.9g (%08" PRIx32 "): %" PRIu64 " ulp",
                     what, i, n, (double)got[i], bits_of(got[i]),
                     (double)want[i], bits_of(want[i]), d);
    }
}

static void check_16(const char *what, const uint16_t *got,
                     const uint16_t *want, size_t n, uint64_t max_ulp,
                     uint64_t (*ulp)(uint16_t a, uint16_t b))
{
    for (size_t i = 0; i < n; i++) {
        const uint64_t d = ulp(got[i], want[i]);
        if (d > max_ulp)
            fail_msg("%s: element %zu of %zu has the bits %04x, expected "
                     "%04x: %" PRIu64 " ulp",
                     what, i, n, (unsigned)got[i], (unsigned)want[i], d);
    }
}

void assert_ulp_bf16(const char *what, const uint16_t *got,
                     const uint16_t *want, size_t n, uint64_t max_ulp)
{
    check_16(what, got, want, n, max_ulp, ulp_bf16);
}

void assert_ulp_f16(const char *what, const uint16_t *got, const uint16_t *want,
                    size_t n, uint64_t max_ulp)
{
    check_16(what, got, want, n, max_ulp, ulp_f16);
}

void assert_same_bytes(const char *what, const void *got, const void *want,
                       size_t n_bytes)
{
    const unsigned char *a = got;
    const unsigned char *b = want;
    if (n_bytes == 0 || memcmp(a, b, n_bytes) == 0)
        return;
    size_t i = 0;
    while (a[i] == b[i])
        i++;
    fail_msg("%s: byte %zu of %zu is %02x, expected %02x", what, i, n_bytes,
             (unsigned)a[i], (unsigned)b[i]);
}
