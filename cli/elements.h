/* SPDX-License-Identifier: Apache-2.0 */
/*
 * elements.h - how one element of each dtype looks to people and to numpy.
 *
 * One row per dtype, no arithmetic beyond reading a value: kernels convert.
 */
#ifndef TVC_ELEMENTS_H
#define TVC_ELEMENTS_H

#include <stddef.h>
#include <stdint.h>

#include "tv/dtype.h"

struct tvc_element {
    const char *npy;      /* numpy's descr; NULL: numpy has no such type */
    const char *npy_bits; /* unsigned integers of that width; NULL: none */
    size_t bytes;         /* 0: elements share bytes */
    /* Value as a number; NULL where there is none. p: any alignment. */
    double (*value)(const unsigned char *p);
    /* Text that reads back as the same value, at most 79 bytes. */
    void (*text)(char dst[80], const unsigned char *p);
};
/* The row of t; never NULL. */
const struct tvc_element *tvc_element(enum tv_dtype t);
/* Shortest text of x that reads back as the same float or double. */
void tvc_text_f32(char dst[80], float x);
void tvc_text_f64(char dst[80], double x);

#endif
