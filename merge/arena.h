/* SPDX-License-Identifier: Apache-2.0 */
/*
 * arena.h - many small pieces of memory with one lifetime.
 *
 * A recipe tree and a plan are thousands of little objects that live and die
 * together. Pieces are zeroed and never freed alone; addresses never move.
 */
#ifndef TVM_ARENA_H
#define TVM_ARENA_H

#include <stddef.h>

#include "tv/error.h"

struct tvm_arena_block;
struct tvm_arena {
    struct tvm_arena_block *head;
    size_t used, cap; /* bytes of the head block */
};

/* Zeroed, aligned for any type; NULL when out of memory or n * each
 * overflows. */
void *tvm_arena_get(struct tvm_arena *a, size_t n, size_t each);
char *tvm_arena_strndup(struct tvm_arena *a, const char *s, size_t n);
char *tvm_arena_strdup(struct tvm_arena *a, const char *s);
char *tvm_arena_fmt(struct tvm_arena *a, const char *fmt, ...) TV_PRINTF(2, 3);
void tvm_arena_free(struct tvm_arena *a);

#endif
