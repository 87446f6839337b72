/* SPDX-License-Identifier: Apache-2.0 */
/*
 * divergence.h - the constants of divergence.c, which all rows share.
 */
#ifndef TVK_DIVERGENCE_H
#define TVK_DIVERGENCE_H

#include <stdint.h>

/* What a probability has added. */
#define TVK_SMALL       1e-8

/* exp: smaller arguments give 0, so that 2^k is a normal number. */
#define TVK_EXP_MIN     (-700.0)
#define TVK_LOG2_E      0x1.71547652b82fep+0
#define TVK_LN2_HI      0x1.62e42fec00000p-1 /* 31 bits */
#define TVK_LN2_LO      0x1.d1cf79abc9e3bp-32
#define TVK_MAGIC       0x1.8p52 /* adding it rounds to an integer */
#define TVK_BIAS        1023u

/* (e^r - 1 - r) / r^2 */
#define TVK_Q0          0x1.0000000000001p-1
#define TVK_Q1          0x1.5555555555556p-3
#define TVK_Q2          0x1.5555555553d63p-5
#define TVK_Q3          0x1.11111111109b3p-7
#define TVK_Q4          0x1.6c16c1788bd90p-10
#define TVK_Q5          0x1.a01a01a7c41d5p-13
#define TVK_Q6          0x1.a019b90d2ae7ap-16
#define TVK_Q7          0x1.71de0dae63bb3p-19
#define TVK_Q8          0x1.289185613a3d6p-22
#define TVK_Q9          0x1.af38a9b0ec855p-26

/* (artanh(s)/s - 1) / s^2 in s^2 */
#define TVK_P0          0x1.555555555556ep-2
#define TVK_P1          0x1.999999997c163p-3
#define TVK_P2          0x1.2492495269147p-3
#define TVK_P3          0x1.c71c3c7b1ee96p-4
#define TVK_P4          0x1.746bcda380812p-4
#define TVK_P5          0x1.3900d27f191ffp-4
#define TVK_P6          0x1.35b0c267a5237p-4

/* log: exponents are counted from 1024; half a one more to round. */
#define TVK_RATIO_ZERO  1024.0
#define TVK_RATIO_BIAS  ((UINT64_C(1024) << 52) + (UINT64_C(1) << 51))
#define TVK_RATIO_SCALE UINT64_C(2047) /* 1024 + 1023 */

#endif
