/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mask_decode.c - words out of roaring bitmaps, in place where they lie there.
 *
 * CRoaring has no call for "the words of this container", so this file looks
 * into its container structs. A bitset container of a frozen view points into
 * the viewed bytes: its words are handed out as they are. Arrays and runs are
 * expanded, only the part that is asked for.
 */
#include "mask.h"

#include <string.h>

#include <roaring/roaring.h>

#define CONTAINER_WORDS (MASK_CONTAINER / 64u)

static const roaring_array_t *parts_of(const struct mask_chunk *c)
{
    const roaring_bitmap_t *r = (const roaring_bitmap_t *)c->bitmap;
    return &r->high_low_container;
}

static bool bad(const char **why, const char *reason)
{
    *why = reason;
    return false;
}

/* The highest element of a container, -1 for what cannot be one. */
static int64_t last_of(const roaring_array_t *a, int32_t i)
{
    const void *c = a->containers[i];
    switch (a->typecodes[i]) {
    case BITSET_CONTAINER_TYPE_CODE: {
        const uint64_t *w = ((const bitset_container_t *)c)->array;
        for (size_t at = CONTAINER_WORDS; at-- > 0;)
            if (w[at] != 0)
                return (int64_t)(at * 64 + 63 - (size_t)__builtin_clzll(w[at]));
        return -1;
    }
    case ARRAY_CONTAINER_TYPE_CODE: {
        const array_container_t *x = (const array_container_t *)c;
        return x->cardinality > 0 ? x->array[x->cardinality - 1] : -1;
    }
    case RUN_CONTAINER_TYPE_CODE: {
        const run_container_t *x = (const run_container_t *)c;
        if (x->n_runs <= 0)
            return -1;
        const rle16_t last = x->runs[x->n_runs - 1];
        return (int64_t)last.value + last.length;
    }
    default:
        return -1;
    }
}

/* Bytes with a good checksum were written by us; this guards against an old bug
 * of ours, which must not make a kernel read or write out of bounds. */
static bool check_bitmap(const struct mask_chunk *c, const char **why)
{
    const roaring_array_t *a = parts_of(c);
    for (int32_t i = 0; i < a->size; i++) {
        const int64_t last = last_of(a, i);
        if (i > 0 && a->keys[i] <= a->keys[i - 1])
            return bad(why, "its containers are not in order");
        if (last < 0 || last >= (int64_t)MASK_CONTAINER)
            return bad(why, "a container of it is damaged");
        if ((uint64_t)a->keys[i] * MASK_CONTAINER + (uint64_t)last >=
            c->n_elems)
            return bad(why, "it has elements that its tensor has not");
    }
    return true;
}

static bool open_words(const void *data, size_t n, struct mask_chunk *c,
                       const char **why)
{
    const uint64_t n_words = (c->n_elems + 63) / 64;
    if (n != n_words * sizeof(uint64_t))
        return bad(why, "wrong size");
    c->words = (const uint64_t *)data;
    for (uint64_t i = 0; i < n_words; i++)
        c->n_set += (uint64_t)__builtin_popcountll(c->words[i]);
    if (c->n_elems % 64 != 0 && c->words[n_words - 1] >> (c->n_elems % 64) != 0)
        return bad(why, "it has elements that its tensor has not");
    return true;
}

enum tv_err mask_chunk_open(const void *data, size_t n, uint32_t flags,
                            uint64_t n_elems, struct mask_chunk *out,
                            const char **why)
{
    struct mask_chunk c = {.n_elems = n_elems};
    *out = (struct mask_chunk){.n_elems = 0};
    *why = "it is of a form that this program does not read";
    if (!mask_flags_known(flags))
        return TV_E_CORRUPT;
    if ((uintptr_t)data % 32 != 0) {
        *why = "it is not aligned";
        return TV_E_INTERNAL;
    }
    if (flags == mask_flags(MASK_WORDS)) {
        if (!open_words(data, n, &c, why))
            return TV_E_CORRUPT;
        *out = c;
        return TV_OK;
    }
    const roaring_bitmap_t *r =
        roaring_bitmap_frozen_view((const char *)data, n);
    if (r == NULL) {
        /* It says no more than this; memory is the other reason. */
        *why = "it is no frozen bitmap";
        return TV_E_CORRUPT;
    }
    c.bitmap = r;
    if (!check_bitmap(&c, why)) {
        mask_chunk_close(&c);
        return TV_E_CORRUPT;
    }
    c.n_set = roaring_bitmap_get_cardinality(r);
    *out = c;
    return TV_OK;
}

void mask_chunk_close(struct mask_chunk *c)
{
    if (c->bitmap != NULL)
        roaring_bitmap_free((const roaring_bitmap_t *)c->bitmap);
    *c = (struct mask_chunk){.n_elems = 0};
}

/* ---- words ----------------------------------------------------------------
 */

/* Sets bits [from, to] of scratch, whose first bit is element `start`. */
static void set_range(uint64_t *scratch, uint32_t from, uint32_t to)
{
    const uint32_t a = from / 64, b = to / 64;
    const uint64_t low = ~UINT64_C(0) << (from % 64);
    const uint64_t high = ~UINT64_C(0) >> (63 - to % 64);
    if (a == b) {
        scratch[a] |= low & high;
        return;
    }
    scratch[a] |= low;
    for (uint32_t i = a + 1; i < b; i++)
        scratch[i] = ~UINT64_C(0);
    scratch[b] |= high;
}

/* Index of the first array element that is not below `from`. */
static int32_t lower_bound(const uint16_t *v, int32_t n, uint32_t from)
{
    int32_t lo = 0, hi = n;
    while (lo < hi) {
        const int32_t mid = lo + (hi - lo) / 2;
        if (v[mid] < from)
            lo = mid + 1;
        else
            hi = mid;
    }
    return lo;
}

static void expand_array(const array_container_t *c, uint32_t start, uint32_t n,
                         uint64_t *scratch)
{
    const uint32_t end = start + n;
    for (int32_t i = lower_bound(c->array, c->cardinality, start);
         i < c->cardinality && c->array[i] < end; i++) {
        const uint32_t at = c->array[i] - start;
        scratch[at / 64] |= UINT64_C(1) << (at % 64);
    }
}

static void expand_runs(const run_container_t *c, uint32_t start, uint32_t n,
                        uint64_t *scratch)
{
    const uint32_t last = start + n - 1;
    int32_t lo = 0, hi = c->n_runs;
    while (lo < hi) { /* the first run that does not end before start */
        const int32_t mid = lo + (hi - lo) / 2;
        if ((uint32_t)c->runs[mid].value + c->runs[mid].length < start)
            lo = mid + 1;
        else
            hi = mid;
    }
    for (int32_t i = lo; i < c->n_runs && c->runs[i].value <= last; i++) {
        const uint32_t from = c->runs[i].value;
        const uint32_t to = from + c->runs[i].length;
        set_range(scratch, (from > start ? from : start) - start,
                  (to < last ? to : last) - start);
    }
}

static int32_t find_container(const roaring_array_t *a, uint32_t key)
{
    const int32_t i = lower_bound(a->keys, a->size, key);
    return i < a->size && a->keys[i] == key ? i : -1;
}

const uint64_t *mask_chunk_words(const struct mask_chunk *c, uint32_t start,
                                 uint32_t n, uint64_t *scratch)
{
    if (c->words != NULL)
        return c->words + start / 64;
    const uint32_t in = start % MASK_CONTAINER;
    const roaring_array_t *a = parts_of(c);
    const int32_t i = find_container(a, start / MASK_CONTAINER);
    if (i >= 0 && a->typecodes[i] == BITSET_CONTAINER_TYPE_CODE)
        return ((const bitset_container_t *)a->containers[i])->array + in / 64;
    memset(scratch, 0, (n + 63) / 64 * sizeof *scratch);
    if (i < 0 || n == 0)
        return scratch;
    if (a->typecodes[i] == ARRAY_CONTAINER_TYPE_CODE)
        expand_array((const array_container_t *)a->containers[i], in, n,
                     scratch);
    else
        expand_runs((const run_container_t *)a->containers[i], in, n, scratch);
    return scratch;
}

uint64_t mask_chunk_and(const struct mask_chunk *a, const struct mask_chunk *b)
{
    uint64_t count = 0;
    if (a->bitmap != NULL && b->bitmap != NULL)
        return roaring_bitmap_and_cardinality(
            (const roaring_bitmap_t *)a->bitmap,
            (const roaring_bitmap_t *)b->bitmap);
    for (uint64_t at = 0; at < a->n_elems; at += MASK_CONTAINER) {
        uint64_t sa[CONTAINER_WORDS], sb[CONTAINER_WORDS];
        const uint64_t left = a->n_elems - at;
        const uint32_t n =
            left < MASK_CONTAINER ? (uint32_t)left : MASK_CONTAINER;
        const uint64_t *x = mask_chunk_words(a, (uint32_t)at, n, sa);
        const uint64_t *y = mask_chunk_words(b, (uint32_t)at, n, sb);
        for (uint32_t i = 0; i < (n + 63) / 64; i++)
            count += (uint64_t)__builtin_popcountll(x[i] & y[i]);
    }
    return count;
}

void mask_chunk_types(const struct mask_chunk *c, uint64_t n[3])
{
    n[0] = n[1] = n[2] = 0;
    if (c->bitmap == NULL)
        return;
    const roaring_array_t *a = parts_of(c);
    for (int32_t i = 0; i < a->size; i++) {
        const uint8_t type = a->typecodes[i];
        n[type == BITSET_CONTAINER_TYPE_CODE  ? 0
          : type == ARRAY_CONTAINER_TYPE_CODE ? 1
                                              : 2]++;
    }
}
