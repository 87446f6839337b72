/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/view.h - a borrowed, zero-copy look at one tensor's bytes.
 *
 * A tensor of a safetensors file is one run of bytes; a stored tensor is a
 * sequence of chunks, each chunk_bytes long except the last. Bytes inside a
 * chunk are contiguous, chunks are not: walk them with tv_view_at. Pointers of
 * stored tensors are 64-byte aligned at chunk starts; those of linked or
 * directory tensors may be unaligned to their element.
 *
 * Lifetime: until the read transaction (or input) that gave it ends or is
 * renewed. Never writable. Any thread may read.
 */
#ifndef TV_VIEW_H
#define TV_VIEW_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/dtype.h"
#include "tv/hash.h"

struct tv_view {
    enum tv_dtype dtype;
    unsigned rank;
    uint64_t shape[TV_RANK_MAX];
    uint64_t n_elems, bytes;
    uint64_t chunk_bytes; /* bytes of every chunk but the last; > 0 */
    size_t n_chunks;      /* 0 when bytes == 0 */
    const unsigned char *const *chunks; /* [n_chunks] payload starts */
    /* Checksums of the payload's leaves (tv/hash.h), NULL while unknown.
     * Stored tensors have them: whoever reads a leaf checks it. */
    const struct tv_hash *leaves;
    void *owner;     /* private to whoever made the view */
    const void *one; /* private: chunk table of a one-chunk view */
};

/* Bytes from byte offset `off` (< bytes) that are contiguous: pointer, and in
 * *n how many. */
static inline const unsigned char *tv_view_at(const struct tv_view *v,
                                              uint64_t off, uint64_t *n)
{
    const uint64_t chunk = off / v->chunk_bytes;
    const uint64_t in = off - chunk * v->chunk_bytes;
    uint64_t end = v->bytes - chunk * v->chunk_bytes;
    if (end > v->chunk_bytes)
        end = v->chunk_bytes;
    *n = end - in;
    return v->chunks[chunk] + in;
}

/* Copies [off, off+n) into dst, over chunk borders. */
void tv_view_copy(const struct tv_view *v, uint64_t off, uint64_t n, void *dst);
/* Do both have the same bytes? Chunks may be cut differently. */
bool tv_view_equal(const struct tv_view *a, const struct tv_view *b);
/* XXH3-128 of leaf i as the bytes are now. */
struct tv_hash tv_view_leaf(const struct tv_view *v, uint64_t i);
#endif
