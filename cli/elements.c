/* SPDX-License-Identifier: Apache-2.0 */
/*
 * elements.c - the table behind elements.h. Little-endian, as safetensors.
 */
#include "elements.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tv/checked.h"
#include "tv/kernels.h"

static void text_special(char dst[80], double x)
{
    (void)snprintf(dst, 80, "%s", isnan(x) ? "nan" : x < 0 ? "-inf" : "inf");
}

void tvc_text_f32(char dst[80], float x)
{
    if (!isfinite(x)) {
        text_special(dst, (double)x);
        return;
    }
    for (int digits = 6; digits <= 9; digits++) {
        (void)snprintf(dst, 80, "%.*g", digits, (double)x);
        if (strtof(dst, NULL) == x)
            return;
    }
}

void tvc_text_f64(char dst[80], double x)
{
    if (!isfinite(x)) {
        text_special(dst, x);
        return;
    }
    for (int digits = 15; digits <= 17; digits++) {
        (void)snprintf(dst, 80, "%.*g", digits, x);
        if (strtod(dst, NULL) == x)
            return;
    }
}

static float load_f32(const unsigned char *p)
{
    const uint32_t bits = tv_get_le32(p);
    float x = 0;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static double load_f64(const unsigned char *p)
{
    const uint64_t bits = tv_get_le64(p);
    double x = 0;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static float load_bf16(const unsigned char *p)
{
    float x = 0;
    tvk_table_for(TVK_REF)->bf16_to_f32(&x, p, 1);
    return x;
}

static float load_f16(const unsigned char *p)
{
    float x = 0;
    tvk_table_for(TVK_REF)->f16_to_f32(&x, p, 1);
    return x;
}

static double value_f32(const unsigned char *p)
{
    return (double)load_f32(p);
}
static double value_bf16(const unsigned char *p)
{
    return (double)load_bf16(p);
}
static double value_f16(const unsigned char *p)
{
    return (double)load_f16(p);
}
static double value_u8(const unsigned char *p)
{
    return p[0];
}
static double value_i8(const unsigned char *p)
{
    return (int8_t)p[0];
}
static double value_u16(const unsigned char *p)
{
    return tv_get_le16(p);
}
static double value_i16(const unsigned char *p)
{
    return (int16_t)tv_get_le16(p);
}
static double value_u32(const unsigned char *p)
{
    return tv_get_le32(p);
}
static double value_i32(const unsigned char *p)
{
    return (int32_t)tv_get_le32(p);
}
static double value_u64(const unsigned char *p)
{
    return (double)tv_get_le64(p);
}
static double value_i64(const unsigned char *p)
{
    return (double)(int64_t)tv_get_le64(p);
}

static void text_f32(char dst[80], const unsigned char *p)
{
    tvc_text_f32(dst, load_f32(p));
}
static void text_bf16(char dst[80], const unsigned char *p)
{
    tvc_text_f32(dst, load_bf16(p));
}
static void text_f16(char dst[80], const unsigned char *p)
{
    tvc_text_f32(dst, load_f16(p));
}
static void text_f64(char dst[80], const unsigned char *p)
{
    tvc_text_f64(dst, load_f64(p));
}
static void text_c64(char dst[80], const unsigned char *p)
{
    char re[80];
    char im[80];
    tvc_text_f32(re, load_f32(p));
    tvc_text_f32(im, load_f32(p + 4));
    (void)snprintf(dst, 80, "(%.36s,%.36s)", re, im);
}
static void text_bool(char dst[80], const unsigned char *p)
{
    (void)snprintf(dst, 80, "%d", p[0] != 0);
}
static void text_u8(char dst[80], const unsigned char *p)
{
    (void)snprintf(dst, 80, "%u", p[0]);
}
static void text_i8(char dst[80], const unsigned char *p)
{
    (void)snprintf(dst, 80, "%d", (int8_t)p[0]);
}
static void text_u16(char dst[80], const unsigned char *p)
{
    (void)snprintf(dst, 80, "%u", tv_get_le16(p));
}
static void text_i16(char dst[80], const unsigned char *p)
{
    (void)snprintf(dst, 80, "%d", (int16_t)tv_get_le16(p));
}
static void text_u32(char dst[80], const unsigned char *p)
{
    (void)snprintf(dst, 80, "%" PRIu32, tv_get_le32(p));
}
static void text_i32(char dst[80], const unsigned char *p)
{
    (void)snprintf(dst, 80, "%" PRId32, (int32_t)tv_get_le32(p));
}
static void text_u64(char dst[80], const unsigned char *p)
{
    (void)snprintf(dst, 80, "%" PRIu64, tv_get_le64(p));
}
static void text_i64(char dst[80], const unsigned char *p)
{
    (void)snprintf(dst, 80, "%" PRId64, (int64_t)tv_get_le64(p));
}
/* The narrow floats have no conversion here: their bits are shown. */
static void text_hex8(char dst[80], const unsigned char *p)
{
    (void)snprintf(dst, 80, "0x%02x", p[0]);
}

static const struct tvc_element rows[TV_DTYPE_COUNT] = {
    [TV_BOOL] = {"|b1", "|u1", 1, value_u8, text_bool},
    [TV_U8] = {"|u1", "|u1", 1, value_u8, text_u8},
    [TV_I8] = {"|i1", "|u1", 1, value_i8, text_i8},
    [TV_I16] = {"<i2", "<u2", 2, value_i16, text_i16},
    [TV_U16] = {"<u2", "<u2", 2, value_u16, text_u16},
    [TV_I32] = {"<i4", "<u4", 4, value_i32, text_i32},
    [TV_U32] = {"<u4", "<u4", 4, value_u32, text_u32},
    [TV_I64] = {"<i8", "<u8", 8, value_i64, text_i64},
    [TV_U64] = {"<u8", "<u8", 8, value_u64, text_u64},
    [TV_F16] = {"<f2", "<u2", 2, value_f16, text_f16},
    [TV_BF16] = {"<f4", "<u2", 2, value_bf16, text_bf16},
    [TV_F32] = {"<f4", "<u4", 4, value_f32, text_f32},
    [TV_F64] = {"<f8", "<u8", 8, load_f64, text_f64},
    [TV_C64] = {"<c8", "<u8", 8, NULL, text_c64},
    [TV_F8_E4M3] = {NULL, "|u1", 1, NULL, text_hex8},
    [TV_F8_E5M2] = {NULL, "|u1", 1, NULL, text_hex8},
    [TV_F8_E8M0] = {NULL, "|u1", 1, NULL, text_hex8},
    [TV_F8_E4M3FNUZ] = {NULL, "|u1", 1, NULL, text_hex8},
    [TV_F8_E5M2FNUZ] = {NULL, "|u1", 1, NULL, text_hex8},
};

const struct tvc_element *tvc_element(enum tv_dtype t)
{
    return &rows[t < TV_DTYPE_COUNT ? t : TV_DTYPE_NONE];
}
