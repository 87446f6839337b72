/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/alloc.h - the only way to the heap: counted, and able to fail on demand.
 *
 * Counting gives `peak_scratch_bytes`; the countdown lets tests fail the N-th
 * allocation. Thread rule: all functions are thread-safe; arming is not (arm
 * before threads start).
 */
#ifndef TV_ALLOC_H
#define TV_ALLOC_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Owned memory, released by tv_free. NULL when out of memory; 0 bytes is legal
 * and gives a unique pointer. tv_calloc zeroes and checks the product. */
void *tv_alloc(size_t bytes);
void *tv_calloc(size_t n, size_t each_bytes);
void *tv_realloc(void *p, size_t bytes);
/* 64-byte aligned, released by tv_free too. */
void *tv_alloc_aligned(size_t bytes);
char *tv_strdup(const char *s);
char *tv_strndup(const char *s, size_t n);
/* Formatted string, owned. */
char *tv_asprintf(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void tv_free(void *p); /* NULL allowed */

uint64_t tv_alloc_now(void);  /* bytes held at this moment */
uint64_t tv_alloc_peak(void); /* highest value since the last reset */
void tv_alloc_peak_reset(void);
uint64_t tv_alloc_calls(void); /* allocations attempted so far */
/* The n-th allocation from now (1 = next) fails, and `repeat`-1 after it;
 * n = 0 disarms. tv_alloc_fired says how many failed since arming. */
void tv_alloc_fail_at(uint64_t n, uint64_t repeat);
uint64_t tv_alloc_fired(void);

#ifdef __cplusplus
}
#endif
#endif
