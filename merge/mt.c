/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mt.c - MT19937 and places in its stream.
 *
 * Matsumoto and Nishimura, "Mersenne Twister: a 623-dimensionally
 * equidistributed uniform pseudo-random number generator", TOMACS 8 (1998).
 */
#include "mt.h"

#include <string.h>

#include "tv/alloc.h"

#define MIDDLE     397u
#define PLACES_MAX 512u /* 1.3 MB of states */

struct tvm_mt_stream {
    uint64_t n_draws, step; /* numbers between two places */
    size_t n_places;
    struct tvm_mt place[];
};

void tvm_mt_seed(struct tvm_mt *mt, uint32_t seed)
{
    mt->word[0] = seed;
    for (uint32_t i = 1; i < TVM_MT_WORDS; i++)
        mt->word[i] =
            1812433253u * (mt->word[i - 1] ^ (mt->word[i - 1] >> 30)) + i;
    mt->next = TVM_MT_WORDS;
}

static uint32_t twisted(uint32_t high, uint32_t low, uint32_t middle)
{
    const uint32_t y = (high & 0x80000000u) | (low & 0x7fffffffu);
    return middle ^ (y >> 1) ^ ((0u - (y & 1u)) & 0x9908b0dfu);
}

static void refill(struct tvm_mt *mt)
{
    uint32_t *const w = mt->word;
    uint32_t i = 0;

    for (; i < TVM_MT_WORDS - MIDDLE; i++)
        w[i] = twisted(w[i], w[i + 1], w[i + MIDDLE]);
    for (; i < TVM_MT_WORDS - 1; i++)
        w[i] = twisted(w[i], w[i + 1], w[i + MIDDLE - TVM_MT_WORDS]);
    w[i] = twisted(w[i], w[0], w[MIDDLE - 1]);
    mt->next = 0;
}

uint32_t tvm_mt_next(struct tvm_mt *mt)
{
    if (mt->next >= TVM_MT_WORDS)
        refill(mt);
    uint32_t y = mt->word[mt->next++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

void tvm_mt_skip(struct tvm_mt *mt, uint64_t n)
{
    while (n > 0) {
        if (mt->next >= TVM_MT_WORDS)
            refill(mt);
        const uint32_t left = TVM_MT_WORDS - mt->next;
        const uint32_t some = n < left ? (uint32_t)n : left;
        mt->next += some;
        n -= some;
    }
}

static uint64_t drawn(struct tvm_mt *mt, float p)
{
    const float u = (float)(tvm_mt_next(mt) & 0xffffffu) * 0x1p-24f;
    return u < p;
}

void tvm_mt_mask(struct tvm_mt *mt, uint64_t *mask, float p, size_t n)
{
    memset(mask, 0, (n + 63) / 64 * sizeof *mask);
    for (size_t i = 0; i < n; i++)
        mask[i / 64] |= drawn(mt, p) << (i % 64);
}

void tvm_mt_mask_each(struct tvm_mt *mt, uint64_t *mask, const float *p,
                      size_t n)
{
    memset(mask, 0, (n + 63) / 64 * sizeof *mask);
    for (size_t i = 0; i < n; i++)
        mask[i / 64] |= drawn(mt, p[i]) << (i % 64);
}

/* ---- places -------------------------------------------------------------- */

static size_t places_of(uint64_t n_draws, uint64_t *step)
{
    *step = n_draws / PLACES_MAX + 1;
    return n_draws == 0 ? 0 : (size_t)(n_draws / *step) + 1;
}

uint64_t tvm_mt_stream_bytes(uint64_t n_draws)
{
    uint64_t step = 0;
    const size_t n = places_of(n_draws, &step);
    return n == 0 ? 0
                  : sizeof(struct tvm_mt_stream) + n * sizeof(struct tvm_mt);
}

enum tv_err tvm_mt_stream_open(uint64_t seed, uint64_t n_draws,
                               struct tv_error *err, struct tvm_mt_stream **out)
{
    struct tvm_mt_stream *s = NULL;
    struct tvm_mt mt;

    *out = NULL;
    if (n_draws == 0)
        return TV_OK;
    s = tv_alloc((size_t)tvm_mt_stream_bytes(n_draws));
    if (s == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    s->n_draws = n_draws;
    s->n_places = places_of(n_draws, &s->step);
    /* torch takes the low 32 bits of a seed. */
    tvm_mt_seed(&mt, (uint32_t)seed);
    for (size_t i = 0; i < s->n_places; i++) {
        s->place[i] = mt;
        if (i + 1 < s->n_places)
            tvm_mt_skip(&mt, s->step);
    }
    *out = s;
    return TV_OK;
}

void tvm_mt_stream_close(struct tvm_mt_stream *s)
{
    tv_free(s);
}

void tvm_mt_stream_seek(const struct tvm_mt_stream *s, uint64_t at,
                        struct tvm_mt *out)
{
    const size_t i = (size_t)(at / s->step);
    *out = s->place[i];
    tvm_mt_skip(out, at - i * s->step);
}
