/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guard_buffer.c - memory between two pages that must not be touched.
 *
 * The canary differs from byte to byte, so that copying a neighbour over it is
 * noticed too.
 */
#include "guard_buffer.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "test.h"

/* Canary bytes kept on each side: more than any vector register is wide. */
#define CANARY_BYTES 256u

static unsigned char canary_at(const unsigned char *p)
{
    return (unsigned char)(0xa5u ^ (unsigned)((uintptr_t)p * 37u));
}

/* The canary range below and above the data. */
static void ranges(const struct guard_buffer *g, unsigned char *from[2],
                   size_t n[2])
{
    unsigned char *const end = g->data + g->n_bytes;
    const size_t below = (size_t)(g->data - g->room);
    const size_t above = (size_t)(g->room + g->room_bytes - end);
    n[0] = below < CANARY_BYTES ? below : CANARY_BYTES;
    n[1] = above < CANARY_BYTES ? above : CANARY_BYTES;
    from[0] = g->data - n[0];
    from[1] = end;
}

void guard_buffer_open(struct guard_buffer *g, size_t max_bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    const size_t room = (max_bytes / page + 1) * page;
    unsigned char *map = mmap(NULL, room + 2 * page, PROT_NONE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(map != MAP_FAILED);
    g->room = map + page;
    g->room_bytes = room;
    g->data = g->room;
    g->n_bytes = 0;
    assert_int_equal(mprotect(g->room, room, PROT_READ | PROT_WRITE), 0);
}

void *guard_buffer_place(struct guard_buffer *g, size_t n_bytes,
                         enum guard_side side, size_t offset)
{
    unsigned char *from[2];
    size_t n[2];
    assert_true(offset <= g->room_bytes && n_bytes <= g->room_bytes - offset);
    g->data = side == GUARD_BEFORE ? g->room + offset
                                   : g->room + g->room_bytes - offset - n_bytes;
    g->n_bytes = n_bytes;
    ranges(g, from, n);
    for (int k = 0; k < 2; k++)
        for (size_t i = 0; i < n[k]; i++)
            from[k][i] = canary_at(from[k] + i);
    return g->data;
}

void guard_buffer_check(const struct guard_buffer *g)
{
    unsigned char *from[2];
    size_t n[2];
    ranges(g, from, n);
    for (int k = 0; k < 2; k++)
        for (size_t i = 0; i < n[k]; i++)
            if (from[k][i] != canary_at(from[k] + i))
                fail_msg("the byte %zu %s the data of %zu bytes was written",
                         k == 0 ? n[k] - i : i + 1, k == 0 ? "before" : "after",
                         g->n_bytes);
}

void guard_buffer_close(struct guard_buffer *g)
{
    if (!g->room)
        return;
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    (void)munmap(g->room - page, g->room_bytes + 2 * page);
    memset(g, 0, sizeof *g);
}
