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
    size_t pinned_bytes, most_pinned_bytes;
    unsigned long n_launches; /* done, since the last set */
    size_t uploaded_bytes;    /* asked for, since the last set */
    unsigned most_streams;    /* with work waiting at the same time */
};
/* An image that the driver is too old for; it takes every other string. */
#define FAKE_CUDA_NEWER "of a newer compiler"

/* Symbols of the library. `set` also brings a lost device back. */
typedef void fake_cuda_set_fn(const struct fake_cuda *f);
typedef void fake_cuda_get_fn(struct fake_cuda *f);

/* For the libraries beside it (fake_cublas.c, fake_cusolver.c): work on a
 * stream, done when the stream gets to it; it counts as a launch. args are
 * copied. Returns the driver's code. */
typedef void fake_cuda_work(const void *args);
typedef int fake_cuda_call_fn(void *stream, fake_cuda_work *work,
                              const void *args, size_t bytes);
/* Is all of this device memory? */
typedef int fake_cuda_holds_fn(const void *p, size_t bytes);

#endif
