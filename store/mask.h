/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mask.h - bit sets as roaring bitmaps (private to store/).
 *
 * One chunk of a mask covers up to MASK_CHUNK_ELEMS elements, so that positions
 * fit 32 bits whatever the size of the tensor. mask.c turns words (element i is
 * bit i & 63 of word i >> 6) into bytes, mask_decode.c gives words back without
 * copying where it can. No other file knows CRoaring.
 *
 * Forms of a chunk's bytes:
 *   MASK_FROZEN  CRoaring's frozen format, a memory image that it can view in
 *                place at a 32-byte aligned address; trusted input only, hence
 *                looked at after its checksum, never before
 *   MASK_WORDS   the words themselves: chosen when the other form would cost
 *                more than 1.01 bit per element, as it does for tails, whose
 *                last container has 8 KiB for few elements
 *
 * Memory: CRoaring takes its own with malloc, which tv_alloc does not count. At
 * most one chunk's containers while mask_encode runs (128 of 8 KiB and their
 * heads, below 1.1 MiB; measured 1.02 MiB at density 0.065), and below 8 KiB
 * for each MASK_FROZEN chunk that is open (measured 3.1 KiB).
 *
 * Lemire et al., "Roaring bitmaps: implementation of an optimized software
 * library", arXiv 1709.07821.
 */
#ifndef TV_MASK_H
#define TV_MASK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/error.h"

#define MASK_CONTAINER   65536u
#define MASK_CHUNK_ELEMS (1u << 23)

enum mask_form { MASK_FROZEN = 1, MASK_WORDS = 2 };

/* Form and library version, as kept in a chunk's flags. */
uint32_t mask_flags(enum mask_form form);
/* False when this program cannot read a chunk with these flags. */
bool mask_flags_known(uint32_t flags);

struct mask_bytes {      /* owned: mask_bytes_free */
    unsigned char *data; /* 64-byte aligned */
    size_t n;
    uint32_t flags;
    uint64_t n_set;
};
/* Bits past n_elems must be 0. n_elems up to MASK_CHUNK_ELEMS. */
TV_NODISCARD enum tv_err mask_encode(const uint64_t *words, uint64_t n_elems,
                                     struct mask_bytes *out,
                                     struct tv_error *err);
void mask_bytes_free(struct mask_bytes *m);

struct mask_chunk { /* a look at such bytes; mask_chunk_close */
    uint64_t n_elems, n_set;
    const uint64_t *words; /* MASK_WORDS */
    const void *bitmap;    /* MASK_FROZEN: roaring_bitmap_t */
};
/* Borrows data (64-byte aligned, checksum already verified). CORRUPT with a
 * reason in *why when it is no mask of n_elems. */
TV_NODISCARD enum tv_err mask_chunk_open(const void *data, size_t n,
                                         uint32_t flags, uint64_t n_elems,
                                         struct mask_chunk *out,
                                         const char **why);
void mask_chunk_close(struct mask_chunk *c); /* a zeroed one is fine */

/* Words of elements [start, start + n); start is a multiple of 64 and the range
 * lies in one container. A pointer into the bytes, or to `scratch`
 * [n / 64 rounded up] filled. Bits past n in the last word are unspecified
 * when they are elements of the mask. */
const uint64_t *mask_chunk_words(const struct mask_chunk *c, uint32_t start,
                                 uint32_t n, uint64_t *scratch);
/* Elements set in both; the chunks cover the same elements. */
uint64_t mask_chunk_and(const struct mask_chunk *a, const struct mask_chunk *b);
/* Containers by type: bitset, array, run. */
void mask_chunk_types(const struct mask_chunk *c, uint64_t n[3]);

#endif
