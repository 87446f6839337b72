/* SPDX-License-Identifier: Apache-2.0 */
/*
 * npy.h - reads the arrays that numpy saved as test data (version 1, C order,
 * little-endian).
 */
#ifndef TV_TEST_NPY_H
#define TV_TEST_NPY_H

#include <stddef.h>
#include <stdint.h>

struct npy {
    char *file; /* whole file, tv_free */
    const void *data;
    size_t shape[3], n_dims;
};
/* Fails the test unless path holds an array of that type ("<f4"). */
void npy_read(const char *path, const char *type, struct npy *out);
#endif
