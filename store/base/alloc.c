/* SPDX-License-Identifier: Apache-2.0 */
/*
 * alloc.c - malloc with a meter and a fuse.
 *
 * The meter counts what the C library really set aside (malloc_usable_size),
 * so no header is needed in front of a block and aligned blocks are freed like
 * any other. The fuse is a window [fail_from, fail_until) of allocation
 * numbers; outside tests it is empty.
 *
 * This is the only file that may call malloc and its relatives. Its counters
 * are the process's: the meter would mean nothing per handle.
 */
#include "tv/alloc.h"

#include <malloc.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tv/checked.h"

#define ALIGNMENT 64u

static atomic_uint_fast64_t bytes_now;
static atomic_uint_fast64_t bytes_peak;
static atomic_uint_fast64_t n_calls;
static atomic_uint_fast64_t fail_from = UINT64_MAX;
static atomic_uint_fast64_t fail_until = UINT64_MAX;
static atomic_uint_fast64_t n_fired;

/* A place for a breakpoint: the moment just before a fault is delivered. */
static void note_fault(void)
{
    atomic_fetch_add_explicit(&n_fired, 1, memory_order_relaxed);
}

static bool must_fail(void)
{
    const uint64_t number =
        atomic_fetch_add_explicit(&n_calls, 1, memory_order_relaxed) + 1;
    if (number < atomic_load_explicit(&fail_from, memory_order_relaxed) ||
        number >= atomic_load_explicit(&fail_until, memory_order_relaxed))
        return false;
    note_fault();
    return true;
}

static void count_in(size_t bytes)
{
    const uint64_t now =
        atomic_fetch_add_explicit(&bytes_now, bytes, memory_order_relaxed) +
        bytes;
    uint64_t peak = atomic_load_explicit(&bytes_peak, memory_order_relaxed);
    while (now > peak && !atomic_compare_exchange_weak_explicit(
                             &bytes_peak, &peak, now, memory_order_relaxed,
                             memory_order_relaxed))
        continue;
}

static void count_out(size_t bytes)
{
    atomic_fetch_sub_explicit(&bytes_now, bytes, memory_order_relaxed);
}

void *tv_alloc(size_t bytes)
{
    if (must_fail())
        return NULL;
    void *p = malloc(bytes ? bytes : 1);
    if (p)
        count_in(malloc_usable_size(p));
    return p;
}

void *tv_calloc(size_t n, size_t each_bytes)
{
    if (must_fail())
        return NULL;
    size_t bytes = 0;
    if (!tv_mul_size(n, each_bytes, &bytes))
        return NULL;
    void *p = calloc(1, bytes ? bytes : 1);
    if (p)
        count_in(malloc_usable_size(p));
    return p;
}

void *tv_realloc(void *p, size_t bytes)
{
    if (must_fail())
        return NULL;
    const size_t before = p ? malloc_usable_size(p) : 0;
    void *q = realloc(p, bytes ? bytes : 1);
    if (q) {
        count_out(before);
        count_in(malloc_usable_size(q));
    }
    return q;
}

void *tv_alloc_aligned(size_t bytes)
{
    if (must_fail())
        return NULL;
    size_t padded = 0;
    if (!tv_add_size(bytes ? bytes : 1, ALIGNMENT - 1, &padded))
        return NULL;
    padded -= padded % ALIGNMENT;
    void *p = aligned_alloc(ALIGNMENT, padded);
    if (p)
        count_in(malloc_usable_size(p));
    return p;
}

char *tv_strndup(const char *s, size_t n)
{
    const size_t have = strnlen(s, n);
    size_t bytes = 0;
    if (!tv_add_size(have, 1, &bytes))
        return NULL;
    char *copy = tv_alloc(bytes);
    if (!copy)
        return NULL;
    memcpy(copy, s, have);
    copy[have] = '\0';
    return copy;
}

char *tv_strdup(const char *s)
{
    return tv_strndup(s, SIZE_MAX);
}

char *tv_asprintf(const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    const int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (n < 0)
        return NULL;
    char *text = tv_alloc((size_t)n + 1);
    if (!text)
        return NULL;
    va_start(ap, fmt);
    (void)vsnprintf(text, (size_t)n + 1, fmt, ap);
    va_end(ap);
    return text;
}

void tv_free(void *p)
{
    if (!p)
        return;
    count_out(malloc_usable_size(p));
    free(p);
}

uint64_t tv_alloc_now(void)
{
    return atomic_load_explicit(&bytes_now, memory_order_relaxed);
}

uint64_t tv_alloc_peak(void)
{
    return atomic_load_explicit(&bytes_peak, memory_order_relaxed);
}

void tv_alloc_peak_reset(void)
{
    atomic_store_explicit(&bytes_peak, tv_alloc_now(), memory_order_relaxed);
}

uint64_t tv_alloc_calls(void)
{
    return atomic_load_explicit(&n_calls, memory_order_relaxed);
}

void tv_alloc_fail_at(uint64_t n, uint64_t repeat)
{
    uint64_t from = UINT64_MAX;
    uint64_t until = UINT64_MAX;
    if (n != 0 && !tv_add_u64(tv_alloc_calls(), n, &from))
        from = UINT64_MAX;
    if (n != 0 && !tv_add_u64(from, repeat, &until))
        until = UINT64_MAX;
    atomic_store_explicit(&n_fired, 0, memory_order_relaxed);
    atomic_store_explicit(&fail_from, from, memory_order_relaxed);
    atomic_store_explicit(&fail_until, until, memory_order_relaxed);
}

uint64_t tv_alloc_fired(void)
{
    return atomic_load_explicit(&n_fired, memory_order_relaxed);
}
