/* SPDX-License-Identifier: Apache-2.0 */
/*
 * ulp.h - comparing floating-point results in units in the last place.
 *
 * The distance of two numbers is how many representable values lie from one to
 * the other: +0 and -0 are 0 apart, the largest finite number and infinity 1.
 * Two NaNs are 0 apart, a NaN and a number ULP_FAR.
 */
#ifndef ULP_H
#define ULP_H

#include <stddef.h>
#include <stdint.h>

#define ULP_FAR UINT64_MAX

uint64_t ulp_f32(float a, float b);
uint64_t ulp_bf16(uint16_t a, uint16_t b);
uint64_t ulp_f16(uint16_t a, uint16_t b);

/* Fail the test at the first element that is further off than max_ulp, and say
 * which, with both values. `what` is put in front. */
void assert_ulp_f32(const char *what, const float *got, const float *want,
                    size_t n, uint64_t max_ulp);
void assert_ulp_bf16(const char *what, const uint16_t *got,
                     const uint16_t *want, size_t n, uint64_t max_ulp);
void assert_ulp_f16(const char *what, const uint16_t *got, const uint16_t *want,
                    size_t n, uint64_t max_ulp);
/* Every byte equal; says the first that is not. */
void assert_same_bytes(const char *what, const void *got, const void *want,
                       size_t n_bytes);

#endif
