/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_merge.c - the merges of a BPE model and what they make of one word.
 *
 * The pair with the lowest rank, leftmost of equals, is merged until no pair
 * has a rank. Words of up to 64 symbols keep one number per position,
 *
 *     key[i] = rank of (symbol i, its right neighbour) * 64 + i
 *
 * of which the smallest is what comes next; a symbol that was merged away
 * leaves its place empty and its bit in `alive` cleared, so nothing moves.
 * Longer words keep a heap over a linked list.
 *
 * Pairs stand in buckets of four, one cache line each. A look at a bucket
 * compares all four without a branch, since whether a pair merges cannot be
 * foreseen; only a bucket that is full sends the search on to the next. Most
 * pairs do not merge, and a filter of some 16 bits per pair, small enough to
 * stay near the processor, turns nearly all of those away.
 */
#include <string.h>

#include "tv/alloc.h"

#include "tok.h"

#define PLACES    64u /* symbols of a word that is scanned */
#define IN_LINE   4u
#define LINE_BITS 32u        /* of the filter, for each bucket */
#define NO_PAIR   UINT64_MAX /* ids are below 2^31 */
#define NO_KEY    INT32_MAX
#define HEAP_MAX  (INT32_MAX / 4)

struct value {
    uint32_t rank; /* TVE_MERGES_MAX: does not merge */
    int32_t id;
};

struct bucket {
    uint64_t pair[IN_LINE]; /* left << 32 | right; filled from the front */
    struct value value[IN_LINE];
};
_Static_assert(sizeof(struct bucket) == 64, "a bucket is a cache line");
_Static_assert(TVE_MERGES_MAX <= INT32_MAX / PLACES, "a key is an int32_t");

struct symbol {
    int32_t id; /* -1: gone */
    int32_t prev, next;
};

struct heap_item {
    uint32_t rank;
    int32_t at, id;
};

struct tve_merges {
    struct bucket *buckets;
    size_t n_buckets; /* a power of two */
    uint8_t *filter;  /* [n_buckets * LINE_BITS] bits */
    struct symbol *symbols;
    struct heap_item *heap;
    size_t cap_symbols;
};

/* ---- table --------------------------------------------------------------- */

enum tv_err tve_merges_open(size_t n, struct tv_error *err, tve_merges **out)
{
    tve_merges *m = tv_calloc(1, sizeof(*m));

    *out = NULL;
    if (!m)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (m->n_buckets = 16; m->n_buckets < n / 2; m->n_buckets *= 2)
        ;
    m->buckets = tv_alloc_aligned(m->n_buckets * sizeof(*m->buckets));
    m->filter = tv_calloc(m->n_buckets, LINE_BITS / 8);
    if (!m->buckets || !m->filter) {
        tve_merges_close(m);
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    }
    for (size_t i = 0; i < m->n_buckets; i++)
        for (size_t k = 0; k < IN_LINE; k++)
            m->buckets[i].pair[k] = NO_PAIR;
    *out = m;
    return TV_OK;
}

void tve_merges_close(tve_merges *m)
{
    if (!m)
        return;
    tv_free(m->buckets);
    tv_free(m->filter);
    tv_free(m->symbols);
    tv_free(m->heap);
    tv_free(m);
}

static inline uint64_t pair_of(int32_t left, int32_t right)
{
    return (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
}

/* Fibonacci hashing of small integers; the upper bits are good. */
static inline uint64_t mix(uint64_t pair)
{
    return pair * UINT64_C(0x9e3779b97f4a7c15) >> 24;
}

static inline size_t bucket_of(const tve_merges *m, uint64_t mixed)
{
    return (size_t)(mixed >> 5) & (m->n_buckets - 1);
}

static inline size_t filter_bit(const tve_merges *m, uint64_t mixed)
{
    return (size_t)mixed & (m->n_buckets * LINE_BITS - 1);
}

void tve_merges_put(tve_merges *m, int32_t left, int32_t right, uint32_t rank,
                    int32_t id)
{
    const uint64_t pair = pair_of(left, right);
    const size_t bit = filter_bit(m, mix(pair));

    m->filter[bit / 8] |= (uint8_t)(1u << bit % 8);
    for (size_t i = bucket_of(m, mix(pair));;
         i = (i + 1) & (m->n_buckets - 1)) {
        struct bucket *const b = &m->buckets[i];

        for (size_t k = 0; k < IN_LINE; k++) {
            if (b->pair[k] != pair && b->pair[k] != NO_PAIR)
                continue;
            b->pair[k] = pair;
            b->value[k] = (struct value){rank, id};
            return;
        }
    }
}

static inline struct value find(const tve_merges *m, int32_t left,
                                int32_t right)
{
    const struct value none = {TVE_MERGES_MAX, -1};
    const uint64_t pair = pair_of(left, right), mixed = mix(pair);
    const size_t bit = filter_bit(m, mixed);

    if (!(m->filter[bit / 8] >> bit % 8 & 1))
        return none;
    for (size_t i = bucket_of(m, mixed);; i = (i + 1) & (m->n_buckets - 1)) {
        const struct bucket *const b = &m->buckets[i];
        struct value v = none;

        for (size_t k = 0; k < IN_LINE; k++)
            v = b->pair[k] == pair ? b->value[k] : v;
        if (b->pair[IN_LINE - 1] == NO_PAIR || v.id >= 0)
            return v;
    }
}

/* ---- short words --------------------------------------------------------- */

static inline void look(const tve_merges *m, const int32_t *ids, int32_t *key,
                        int32_t *to, unsigned at, unsigned right)
{
    const struct value v = find(m, ids[at], ids[right]);

    key[at] = v.id >= 0 ? (int32_t)(v.rank * PLACES + at) : NO_KEY;
    to[at] = v.id;
}

/* n is a multiple of 4. */
static inline int32_t smallest(const int32_t *key, unsigned n)
{
    int32_t a = key[0], b = key[1], c = key[2], d = key[3];

    for (unsigned i = 4; i < n; i += 4) {
        a = key[i] < a ? key[i] : a;
        b = key[i + 1] < b ? key[i + 1] : b;
        c = key[i + 2] < c ? key[i + 2] : c;
        d = key[i + 3] < d ? key[i + 3] : d;
    }
    a = b < a ? b : a;
    c = d < c ? d : c;
    return c < a ? c : a;
}

static size_t merge_by_scan(const tve_merges *m, int32_t *ids, unsigned n)
{
    int32_t key[PLACES], to[PLACES];
    const unsigned n_keys = (n + 3) / 4 * 4;
    uint64_t alive = UINT64_MAX >> (PLACES - n);
    size_t kept = 0;

    for (unsigned i = 0; i + 1 < n; i++)
        look(m, ids, key, to, i, i + 1);
    for (unsigned i = n - 1; i < n_keys; i++)
        key[i] = NO_KEY;
    for (;;) {
        const int32_t best = smallest(key, n_keys);
        const unsigned at = (unsigned)best % PLACES;
        const uint64_t before = alive & ((UINT64_C(1) << at) - 1);
        uint64_t after = alive & ~before & ~(UINT64_C(1) << at);

        if (best == NO_KEY)
            break;
        /* There is a right one, or the pair would have no key. */
        const unsigned right = (unsigned)__builtin_ctzll(after);
        after &= after - 1;
        alive &= ~(UINT64_C(1) << right);
        ids[at] = to[at];
        key[at] = key[right] = NO_KEY;
        if (after)
            look(m, ids, key, to, at, (unsigned)__builtin_ctzll(after));
        if (before)
            look(m, ids, key, to, 63u - (unsigned)__builtin_clzll(before), at);
    }
    for (; alive; alive &= alive - 1)
        ids[kept++] = ids[__builtin_ctzll(alive)];
    return kept;
}

/* ---- long words ---------------------------------------------------------- */

static bool heap_before(const struct heap_item *a, const struct heap_item *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(tve_merges *m, size_t *n, struct heap_item x)
{
    size_t i = (*n)++;

    while (i > 0 && heap_before(&x, &m->heap[(i - 1) / 2])) {
        m->heap[i] = m->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    m->heap[i] = x;
}

static struct heap_item heap_pop(tve_merges *m, size_t *n)
{
    const struct heap_item top = m->heap[0];
    const struct heap_item x = m->heap[--*n];
    size_t i = 0;

    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= *n)
            break;
        if (child + 1 < *n && heap_before(&m->heap[child + 1], &m->heap[child]))
            child++;
        if (!heap_before(&m->heap[child], &x))
            break;
        m->heap[i] = m->heap[child];
        i = child;
    }
    m->heap[i] = x;
    return top;
}

static void push_pair(tve_merges *m, size_t *n_heap, int32_t at)
{
    const struct symbol *const s = &m->symbols[at];

    if (s->next < 0)
        return;
    const struct value v = find(m, s->id, m->symbols[s->next].id);
    if (v.id >= 0)
        heap_push(m, n_heap, (struct heap_item){v.rank, at, v.id});
}

static enum tv_err heap_room(tve_merges *m, size_t n, struct tv_error *err)
{
    struct symbol *symbols = NULL;
    struct heap_item *heap = NULL;

    if (n > HEAP_MAX)
        return tv_error_set(err, TV_E_UNSUPPORTED,
                            "a word of %zu characters is too long", n);
    if (n <= m->cap_symbols)
        return TV_OK;
    symbols = tv_realloc(m->symbols, n * sizeof(*symbols));
    if (symbols) {
        m->symbols = symbols;
        /* Each merge pushes at most two pairs. */
        heap = tv_realloc(m->heap, 3 * n * sizeof(*heap));
    }
    if (!heap)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    m->heap = heap;
    m->cap_symbols = n;
    return TV_OK;
}

static size_t merge_by_heap(tve_merges *m, int32_t *ids, size_t n)
{
    struct symbol *const s = m->symbols;
    size_t n_heap = 0, kept = 0;

    for (size_t i = 0; i < n; i++)
        s[i] = (struct symbol){ids[i], (int32_t)i - 1,
                               i + 1 < n ? (int32_t)i + 1 : -1};
    for (size_t i = 0; i + 1 < n; i++)
        push_pair(m, &n_heap, (int32_t)i);
    while (n_heap > 0) {
        const struct heap_item top = heap_pop(m, &n_heap);
        struct symbol *const left = &s[top.at];

        if (left->id < 0 || left->next < 0)
            continue;
        /* Stale unless the pair still gives what it promised. */
        struct symbol *const right = &s[left->next];
        if (find(m, left->id, right->id).id != top.id)
            continue;
        left->id = top.id;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0)
            s[left->next].prev = top.at;
        if (left->prev >= 0)
            push_pair(m, &n_heap, left->prev);
        push_pair(m, &n_heap, top.at);
    }
    for (size_t i = 0; i < n; i++)
        if (s[i].id >= 0)
            ids[kept++] = s[i].id;
    return kept;
}

enum tv_err tve_merges_run(tve_merges *m, int32_t *ids, size_t *n,
                           struct tv_error *err)
{
    if (*n < 2)
        return TV_OK;
    if (*n <= PLACES) {
        *n = merge_by_scan(m, ids, (unsigned)*n);
        return TV_OK;
    }
    const enum tv_err rc = heap_room(m, *n, err);
    if (rc == TV_OK)
        *n = merge_by_heap(m, ids, *n);
    return rc;
}
