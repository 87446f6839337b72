/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mask.c - words to roaring bitmaps.
 *
 * Containers are made directly from words: 1024 of them are copied into a
 * bitset container, or their set bits become the sorted array that roaring
 * keeps for at most 4096 of 65,536, or runs where these are smaller. Adding ids
 * one by one would cost a search each, and roaring's own run_optimize (0.2)
 * crashes where memory is short.
 */
#include "mask.h"

#include <string.h>

#include <roaring/roaring.h>

#include "tv/alloc.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "frozen bitmaps and words are memory images");

#define CONTAINER_WORDS (MASK_CONTAINER / 64u)
#define ARRAY_MAX       4096u

static uint32_t library_version(void)
{
    return (uint32_t)ROARING_VERSION_MAJOR << 24 |
           (uint32_t)ROARING_VERSION_MINOR << 16 |
           (uint32_t)ROARING_VERSION_REVISION << 8;
}

uint32_t mask_flags(enum mask_form form)
{
    return (form == MASK_FROZEN ? library_version() : 0) | (uint32_t)form;
}

bool mask_flags_known(uint32_t flags)
{
    return flags == mask_flags(MASK_FROZEN) || flags == mask_flags(MASK_WORDS);
}

static uint32_t count_bits(const uint64_t *words, size_t n)
{
    uint32_t count = 0;
    for (size_t i = 0; i < n; i++)
        count += (uint32_t)__builtin_popcountll(words[i]);
    return count;
}

static void *array_of(const uint64_t *words, size_t n, uint32_t count)
{
    array_container_t *a =
        array_container_create_given_capacity((int32_t)count);
    if (a == NULL)
        return NULL;
    for (size_t i = 0; i < n; i++)
        for (uint64_t w = words[i]; w != 0; w &= w - 1)
            a->array[a->cardinality++] =
                (uint16_t)(i * 64 + (size_t)__builtin_ctzll(w));
    return a;
}

/* The first word of the next container may go on with a run: it ends here. */
static uint32_t count_runs(const uint64_t *words, size_t n)
{
    uint32_t count = 0;
    uint64_t before = 0; /* the last bit of the word before */
    for (size_t i = 0; i < n; i++) {
        const uint64_t starts = words[i] & ~(words[i] << 1 | before);
        count += (uint32_t)__builtin_popcountll(starts);
        before = words[i] >> 63;
    }
    return count;
}

static void *runs_of(const uint64_t *words, size_t n, uint32_t n_runs)
{
    run_container_t *r = run_container_create_given_capacity((int32_t)n_runs);
    bool inside = false;
    if (r == NULL)
        return NULL;
    for (size_t i = 0; i < n; i++) {
        uint64_t edges = words[i] ^ (words[i] << 1 | (inside ? 1u : 0u));
        for (; edges != 0; edges &= edges - 1) {
            const size_t at = i * 64 + (size_t)__builtin_ctzll(edges);
            inside = !inside;
            if (inside)
                r->runs[r->n_runs++].value = (uint16_t)at;
            else
                r->runs[r->n_runs - 1].length =
                    (uint16_t)(at - 1 - r->runs[r->n_runs - 1].value);
        }
    }
    if (inside)
        r->runs[r->n_runs - 1].length =
            (uint16_t)(n * 64 - 1 - r->runs[r->n_runs - 1].value);
    return r;
}

static void *bitset_of(const uint64_t *words, size_t n, uint32_t count)
{
    bitset_container_t *b = bitset_container_create();
    if (b == NULL)
        return NULL;
    memcpy(b->array, words, n * sizeof *words);
    memset(b->array + n, 0, (CONTAINER_WORDS - n) * sizeof *words);
    b->cardinality = (int32_t)count;
    return b;
}

/* NULL when out of memory. */
static roaring_bitmap_t *bitmap_of(const uint64_t *words, size_t n_words,
                                   uint64_t *n_set)
{
    roaring_bitmap_t *r = roaring_bitmap_create_with_capacity(
        (uint32_t)(n_words / CONTAINER_WORDS + 1));
    if (r == NULL)
        return NULL;
    *n_set = 0;
    for (size_t at = 0; at < n_words; at += CONTAINER_WORDS) {
        const size_t left = n_words - at;
        const size_t n = left < CONTAINER_WORDS ? left : CONTAINER_WORDS;
        const uint32_t count = count_bits(words + at, n);
        if (count == 0)
            continue;
        const bool sparse = count <= ARRAY_MAX;
        const uint32_t n_runs = count_runs(words + at, n);
        const uint32_t plain = sparse ? 2 * count : 8 * CONTAINER_WORDS;
        uint8_t type = RUN_CONTAINER_TYPE_CODE;
        void *c = NULL;
        if (4 * n_runs < plain) {
            c = runs_of(words + at, n, n_runs);
        } else if (sparse) {
            c = array_of(words + at, n, count);
            type = ARRAY_CONTAINER_TYPE_CODE;
        } else {
            c = bitset_of(words + at, n, count);
            type = BITSET_CONTAINER_TYPE_CODE;
        }
        if (c == NULL) {
            roaring_bitmap_free(r);
            return NULL;
        }
        ra_append(&r->high_low_container, (uint16_t)(at / CONTAINER_WORDS), c,
                  type);
        *n_set += count;
    }
    return r;
}

enum tv_err mask_encode(const uint64_t *words, uint64_t n_elems,
                        struct mask_bytes *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n_words = (size_t)((n_elems + 63) / 64);
    const size_t plain = n_words * sizeof *words;
    *out = (struct mask_bytes){.data = NULL};
    if (n_elems > MASK_CHUNK_ELEMS)
        return tv_error_set(err, TV_E_INTERNAL, "a mask chunk of %llu elements",
                            (unsigned long long)n_elems);
    roaring_bitmap_t *r = bitmap_of(words, n_words, &out->n_set);
    if (r == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "no memory for a mask");
        goto out;
    }
    const size_t frozen = roaring_bitmap_frozen_size_in_bytes(r);
    const bool as_words = frozen > plain + plain / 100;
    out->n = as_words ? plain : frozen;
    out->flags = mask_flags(as_words ? MASK_WORDS : MASK_FROZEN);
    out->data = (unsigned char *)tv_alloc_aligned(out->n);
    if (out->data == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "no memory for a mask");
        goto out;
    }
    if (as_words)
        memcpy(out->data, words, plain);
    else
        roaring_bitmap_frozen_serialize(r, (char *)out->data);
out:
    if (r != NULL)
        roaring_bitmap_free(r);
    return rc;
}

void mask_bytes_free(struct mask_bytes *m)
{
    tv_free(m->data);
    *m = (struct mask_bytes){.data = NULL};
}
