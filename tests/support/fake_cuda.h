/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fake_cuda.h - how a test steers and watches the driver of fake_cuda.c, which
 * it finds as its own libcuda.so.1 does: with dlsym.
 */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stddef.h>

struct fake_cuda {
    /* Set by the test, in force at once. */
    size_t total_bytes;    /* of a device */
    unsigned long lose_at; /* lost at this launch, counted from now; 0: never */
    /* Told to the test. */
    size_t used_bytes, most_bytes, n_pinned;
    unsigned long n_launches; /* done, since the last set */
    unsigned most_streams;    /* with work waiting at the same time */
};
/* Symbols of the library. `set` also brings a lost device back. */
typedef void fake_cuda_set_fn(const struct fake_cuda *f);
typedef void fake_cuda_get_fn(struct fake_cuda *f);

#endif
