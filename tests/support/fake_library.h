/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fake_library.h - what fake_cublas.c and fake_cusolver.c share: the way to the
 * fake driver, which is loaded already when somebody calls them.
 */
#ifndef FAKE_LIBRARY_H
#define FAKE_LIBRARY_H

#include <dlfcn.h>
#include <stdbool.h>
#include <stddef.h>
#include <string.h>

#include "fake_cuda.h"

#define EXPORT __attribute__((visibility("default")))

static fake_cuda_call_fn *fake_call;
static fake_cuda_holds_fn *fake_holds;

static inline bool find_driver(void)
{
    void *const driver = dlopen("libcuda.so.1", RTLD_NOW);
    void *const call = driver ? dlsym(driver, "fake_cuda_call") : NULL;
    void *const holds = driver ? dlsym(driver, "fake_cuda_holds") : NULL;

    if (!call || !holds)
        return false;
    memcpy(&fake_call, &call, sizeof fake_call);
    memcpy(&fake_holds, &holds, sizeof fake_holds);
    return true;
}

/* Is a column-major matrix [rows, cols] of such elements in device memory, its
 * stride right? */
static inline bool is_matrix(const void *a, size_t each, int rows, int cols,
                             int ld)
{
    return rows >= 0 && cols >= 0 && ld >= (rows > 1 ? rows : 1) &&
           (rows == 0 || cols == 0 ||
            fake_holds(a, ((size_t)(cols - 1) * (size_t)ld + (size_t)rows) *
                              each));
}

#endif
