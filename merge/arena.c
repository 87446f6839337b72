/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arena.c - bump allocation in blocks; large pieces get a block of their own.
 */
#include "arena.h"

#include <stdarg.h>
#include <stdalign.h>
#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

#define BLOCK_BYTES 16384u

struct tvm_arena_block {
    struct tvm_arena_block *next;
    alignas(max_align_t) unsigned char data[];
};

static void *block_new(struct tvm_arena *a, size_t n)
{
    size_t bytes = 0;
    struct tvm_arena_block *b = NULL;
    if (!tv_add_size(n, sizeof(*b), &bytes))
        return NULL;
    b = tv_calloc(1, bytes);
    if (b == NULL)
        return NULL;
    b->next = a->head;
    a->head = b;
    return b->data;
}

void *tvm_arena_get(struct tvm_arena *a, size_t n, size_t each)
{
    size_t bytes = 0;
    if (!tv_mul_size(n, each, &bytes) ||
        !tv_add_size(bytes, alignof(max_align_t) - 1, &bytes))
        return NULL;
    bytes &= ~(alignof(max_align_t) - 1);
    if (bytes == 0)
        bytes = alignof(max_align_t);
    if (bytes > BLOCK_BYTES / 4) {
        /* Behind the head, so that the rest of the head stays usable. */
        struct tvm_arena_block *const head = a->head;
        void *const p = block_new(a, bytes);
        if (p != NULL && head != NULL) {
            struct tvm_arena_block *const own = a->head;
            own->next = head->next;
            head->next = own;
            a->head = head;
        } else if (p != NULL) {
            a->used = a->cap = 0;
        }
        return p;
    }
    if (a->head == NULL || bytes > a->cap - a->used) {
        if (block_new(a, BLOCK_BYTES) == NULL)
            return NULL;
        a->used = 0;
        a->cap = BLOCK_BYTES;
    }
    void *const p = a->head->data + a->used;
    a->used += bytes;
    return p;
}

char *tvm_arena_strndup(struct tvm_arena *a, const char *s, size_t n)
{
    size_t bytes = 0;
    if (!tv_add_size(n, 1, &bytes))
        return NULL;
    char *const p = tvm_arena_get(a, bytes, 1);
    if (p != NULL)
        memcpy(p, s, n);
    return p;
}

char *tvm_arena_strdup(struct tvm_arena *a, const char *s)
{
    return tvm_arena_strndup(a, s, strlen(s));
}

char *tvm_arena_fmt(struct tvm_arena *a, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    const int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (n < 0)
        return NULL;
    char *const p = tvm_arena_get(a, (size_t)n + 1, 1);
    if (p == NULL)
        return NULL;
    va_start(ap, fmt);
    (void)vsnprintf(p, (size_t)n + 1, fmt, ap);
    va_end(ap);
    return p;
}

void tvm_arena_free(struct tvm_arena *a)
{
    while (a->head != NULL) {
        struct tvm_arena_block *const next = a->head->next;
        tv_free(a->head);
        a->head = next;
    }
    a->used = a->cap = 0;
}
