/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_convert.c - 16-bit conversions against formulas of their own.
 *
 * Widening: every one of the 65,536 patterns, against sign * mantissa * 2^e.
 * Narrowing: every midpoint between two neighbours and the fp32 numbers on
 * both sides of it, and random ones, against a search for the nearest value
 * in the list of all values, with distances that are exact in fp64.
 */
#include "test.h"

#include <math.h>
#include <string.h>

#include "rng.h"
#include "tv/kernels.h"

/* A 16-bit format: bits of mantissa, bias, and the pattern of +infinity. */
struct format {
    const char *name;
    int mantissa;
    int bias;
    uint32_t infinity;
    enum tv_dtype dtype;
};

static const struct format bf16 = {"bf16", 7, 127, 0x7f80, TV_BF16};
static const struct format f16 = {"f16", 10, 15, 0x7c00, TV_F16};

/* Value of a pattern without sign, infinity read as the next power of two. */
static double value_of(const struct format *f, uint32_t h)
{
    const int exponent = (int)(h >> f->mantissa);
    const double low = (double)(h & ((1u << f->mantissa) - 1u));
    const double one = (double)(1u << f->mantissa);
    if (exponent == 0)
        return ldexp(low / one, 1 - f->bias);
    return ldexp(1.0 + low / one, exponent - f->bias);
}

static uint32_t nearest(const struct format *f, float v)
{
    const double a = fabs((double)v);
    const uint32_t sign = signbit(v) ? 0x8000u : 0;
    uint32_t lo = 0;
    uint32_t hi = f->infinity;

    if (a >= value_of(f, hi))
        return sign | hi;
    while (hi - lo > 1) {
        const uint32_t mid = (lo + hi) / 2;
        if (value_of(f, mid) <= a)
            lo = mid;
        else
            hi = mid;
    }
    const double below = a - value_of(f, lo);
    const double above = value_of(f, hi) - a;
    if (below != above)
        return sign | (below < above ? lo : hi);
    return sign | (lo % 2 == 0 ? lo : hi);
}

static uint32_t bits_of(float v)
{
    uint32_t u = 0;
    memcpy(&u, &v, sizeof(u));
    return u;
}

static void every_pattern(const struct tvk_table *k, const struct format *f)
{
    static uint16_t src[65536], back[65536];
    static float dst[65536];
    const uint32_t quiet = 1u << (f->mantissa - 1);

    for (uint32_t h = 0; h < 65536; h++)
        src[h] = (uint16_t)h;
    const uint64_t n_nonfinite = 2 * (0x8000 - f->infinity);
    assert_int_equal(tvk_to_f32(k, f->dtype, dst, src, 65536), n_nonfinite);
    assert_int_equal(tvk_from_f32(k, f->dtype, back, dst, 65536), n_nonfinite);
    for (uint32_t h = 0; h < 65536; h++) {
        const uint32_t a = h & 0x7fffu;
        const uint32_t sign = h & 0x8000u;
        if (a > f->infinity) {
            const uint32_t payload = (a & (2 * quiet - 1)) | quiet;
            assert_int_equal(bits_of(dst[h]),
                             sign << 16 | 0x7f800000u |
                                 payload << (23 - f->mantissa));
            assert_int_equal(back[h], h | quiet);
            continue;
        }
        double want = a == f->infinity ? INFINITY : value_of(f, a);
        if (sign)
            want = -want;
        assert_int_equal(bits_of(dst[h]), bits_of((float)want));
        assert_int_equal(back[h], h);
    }
}

static void narrow_one(const struct tvk_table *k, const struct format *f,
                       float v)
{
    uint16_t got = 0;
    const uint64_t bad = tvk_from_f32(k, f->dtype, &got, &v, 1);
    assert_int_equal(bad, (nearest(f, v) & 0x7fffu) == f->infinity);
    if (got != nearest(f, v))
        fail_msg("%s: %a (%08x) became %04x, expected %04x", f->name, (double)v,
                 (unsigned)bits_of(v), (unsigned)got, (unsigned)nearest(f, v));
}

static void every_midpoint(const struct tvk_table *k, const struct format *f)
{
    for (uint32_t h = 0; h < f->infinity; h++) {
        const double mid = (value_of(f, h) + value_of(f, h + 1)) / 2.0;
        const float v = (float)mid;
        /* bf16 subnormals are fp32 subnormals, midpoints included. */
        assert_true((double)v == mid);
        for (int sign = 0; sign < 2; sign++) {
            const float s = sign ? -v : v;
            narrow_one(k, f, s);
            narrow_one(k, f, nextafterf(s, INFINITY));
            narrow_one(k, f, nextafterf(s, -INFINITY));
        }
    }
}

static void random_values(const struct tvk_table *k, const struct format *f)
{
    struct rng r;
    rng_open(&r, 2);
    for (int i = 0; i < 100000; i++) {
        const float any = rng_any_f32(&r);
        if (!isnan(any))
            narrow_one(k, f, any);
        narrow_one(k, f, ldexpf(rng_unit(&r), (int)rng_below(&r, 50) - 30));
    }
    narrow_one(k, f, INFINITY);
    narrow_one(k, f, -INFINITY);
}

/* Sign kept, payload cut, quiet bit set: also where the cut leaves nothing. */
static void nans_stay_nans(const struct tvk_table *k, const struct format *f)
{
    static const uint32_t nans[] = {0x7f800001, 0x7fc00000, 0x7fffffff,
                                    0xff800001, 0xffc12345, 0x7fa5a5a5,
                                    0x7f80ffff, 0xff801fff};
    const uint32_t quiet = 1u << (f->mantissa - 1);
    for (size_t i = 0; i < sizeof(nans) / sizeof(nans[0]); i++) {
        float v = 0.0f;
        uint16_t got = 0;
        memcpy(&v, &nans[i], sizeof(v));
        tvk_from_f32(k, f->dtype, &got, &v, 1);
        const uint32_t payload =
            nans[i] >> (23 - f->mantissa) & (2 * quiet - 1);
        assert_int_equal(got, (nans[i] >> 16 & 0x8000u) | f->infinity |
                                  payload | quiet);
    }
}

static void on_all_rows(const struct format *f,
                        void (*check)(const struct tvk_table *,
                                      const struct format *))
{
    for (int i = 0; i < TVK_ISA_COUNT; i++)
        if (tvk_isa_supported((enum tvk_isa)i))
            check(tvk_table_for((enum tvk_isa)i), f);
}

static void test_widen(void **state)
{
    (void)state;
    on_all_rows(&bf16, every_pattern);
    on_all_rows(&f16, every_pattern);
}

static void test_narrow_midpoints(void **state)
{
    (void)state;
    on_all_rows(&bf16, every_midpoint);
    on_all_rows(&f16, every_midpoint);
}

static void test_narrow_random(void **state)
{
    (void)state;
    on_all_rows(&bf16, random_values);
    on_all_rows(&f16, random_values);
}

static void test_narrow_nans(void **state)
{
    (void)state;
    on_all_rows(&bf16, nans_stay_nans);
    on_all_rows(&f16, nans_stay_nans);
}

static void test_f32_is_copied(void **state)
{
    (void)state;
    static const uint32_t bits[] = {0x7f800001, 0x00000001, 0x80000000,
                                    0xffffffff, 0x3f800000};
    float src[5], there[5] = {0}, back[5] = {0};
    memcpy(src, bits, sizeof(src));
    tvk_to_f32(tvk_table_best(), TV_F32, there, src, 5);
    tvk_from_f32(tvk_table_best(), TV_F32, back, there, 5);
    assert_memory_equal(there, bits, sizeof(bits));
    assert_memory_equal(back, bits, sizeof(bits));
    tvk_to_f32(tvk_table_best(), TV_F32, there, NULL, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_widen),
        cmocka_unit_test(test_narrow_midpoints),
        cmocka_unit_test(test_narrow_random),
        cmocka_unit_test(test_narrow_nans),
        cmocka_unit_test(test_f32_is_copied),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
