/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz.h - what a fuzz target defines and what it may use.
 *
 * A target checks one property of one reader. The input is a heap block of
 * exactly `size` bytes, so that reading past it is found. FUZZ_CHECK ends the
 * program also in release builds.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define FUZZ_CHECK(condition)                                                  \
    do {                                                                       \
        if (!(condition)) {                                                    \
            (void)fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, \
                          #condition);                                         \
            abort();                                                           \
        }                                                                      \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#endif
