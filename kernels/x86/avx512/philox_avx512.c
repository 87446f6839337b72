/* SPDX-License-Identifier: Apache-2.0 */
/*
 * philox_avx512.c - Philox4x32-10 (Salmon et al., SC 2011), 16 counters, that
 * is one mask word, at a time.
 *
 * Each 32-bit value sits in the low half of a 64-bit lane: VPMULUDQ reads only
 * that half and its product holds both results, so the upper halves may carry
 * garbage until the end. Counters are dealt to lanes 0 4 1 5 2 6 3 7, which
 * makes the final interleaving one unpack per four counters:
 *
 *   a = w0 w1 per counter, b = w2 w3      unpacklo -> counters 0 1 2 3
 *                                         unpackhi -> counters 4 5 6 7
 */
#include "x86/x86_rows.h"
#include "avx512_util.h"

#include <assert.h>

/* Multipliers and Weyl increments of the paper, section 4.3. */
#define MUL_0  0xD2511F53u
#define MUL_1  0xCD9E8D57u
#define WEYL_0 0x9E3779B9u
#define WEYL_1 0xBB67AE85u
#define ROUNDS 10u

struct state {
    __m512i c0, c1, c2, c3;
};

TVK_INLINE __m512i set64(uint32_t v)
{
    return _mm512_set1_epi64((long long)v);
}

TVK_INLINE void next_round(struct state *s, __m512i k0, __m512i k1)
{
    const __m512i p0 = _mm512_mul_epu32(s->c0, set64(MUL_0));
    const __m512i p1 = _mm512_mul_epu32(s->c2, set64(MUL_1));
    /* 0x96 is the truth table of a three-way exclusive or. */
    s->c0 =
        _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), s->c1, k0, 0x96);
    s->c2 =
        _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), s->c3, k1, 0x96);
    s->c1 = p1;
    s->c3 = p0;
}

/* Bit 4c + w: word w of counter c is below the threshold. */
TVK_INLINE uint32_t below(const struct state *s, __m512i threshold)
{
    const __m512i a =
        _mm512_mask_blend_epi32(0xaaaa, s->c0, _mm512_slli_epi64(s->c1, 32));
    const __m512i b =
        _mm512_mask_blend_epi32(0xaaaa, s->c2, _mm512_slli_epi64(s->c3, 32));
    const uint32_t lo =
        _mm512_cmplt_epu32_mask(_mm512_unpacklo_epi64(a, b), threshold);
    const uint32_t hi =
        _mm512_cmplt_epu32_mask(_mm512_unpackhi_epi64(a, b), threshold);
    return lo | hi << 16;
}

static uint64_t philox_mask(uint64_t *TVK_RESTRICT mask, uint64_t start,
                            uint64_t key, uint64_t name_hash,
                            uint64_t threshold, size_t n)
{
    const __m512i lane = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    const __m512i c2 = set64((uint32_t)name_hash);
    const __m512i c3 = set64((uint32_t)(name_hash >> 32));
    const __m512i limit = _mm512_set1_epi32((int)(uint32_t)threshold);
    __m512i k0[ROUNDS], k1[ROUNDS];
    uint64_t kept = 0;

    assert(start % 64 == 0);
    for (uint32_t r = 0; r < ROUNDS; r++) {
        k0[r] = set64((uint32_t)key + r * WEYL_0);
        k1[r] = set64((uint32_t)(key >> 32) + r * WEYL_1);
    }
    for (size_t i = 0; i < n; i += 64) {
        const size_t left = n - i;
        uint64_t word = ~UINT64_C(0);
        if (threshold >> 32 == 0) {
            /* A multiple of 16, so adding a lane number never carries. */
            const uint64_t c = (start + i) >> 2;
            const __m512i c1 = set64((uint32_t)(c >> 32));
            struct state s = {_mm512_add_epi64(set64((uint32_t)c), lane), c1,
                              c2, c3};
            struct state t = {_mm512_add_epi64(set64((uint32_t)c + 8), lane),
                              c1, c2, c3};
            for (uint32_t r = 0; r < ROUNDS; r++) {
                next_round(&s, k0[r], k1[r]);
                next_round(&t, k0[r], k1[r]);
            }
            word = below(&s, limit) | (uint64_t)below(&t, limit) << 32;
        }
        if (left < 64)
            word &= tvk_low_bits(left);
        mask[i >> 6] = word;
        kept += tvk_popcount(word);
    }
    return kept;
}

TVK_INLINE void store_words(uint32_t *dst, const struct state *s)
{
    const __m512i a =
        _mm512_mask_blend_epi32(0xaaaa, s->c0, _mm512_slli_epi64(s->c1, 32));
    const __m512i b =
        _mm512_mask_blend_epi32(0xaaaa, s->c2, _mm512_slli_epi64(s->c3, 32));
    _mm512_storeu_si512(dst, _mm512_unpacklo_epi64(a, b));
    _mm512_storeu_si512(dst + 16, _mm512_unpackhi_epi64(a, b));
}

static void philox_words(uint32_t *TVK_RESTRICT dst, uint64_t start,
                         uint64_t key, uint64_t name_hash, size_t n)
{
    const __m512i lane = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    const __m512i c2 = set64((uint32_t)name_hash);
    const __m512i c3 = set64((uint32_t)(name_hash >> 32));
    __m512i k0[ROUNDS], k1[ROUNDS];
    uint32_t part[64];

    for (uint32_t r = 0; r < ROUNDS; r++) {
        k0[r] = set64((uint32_t)key + r * WEYL_0);
        k1[r] = set64((uint32_t)(key >> 32) + r * WEYL_1);
    }
    for (size_t i = 0; i < n;) {
        /* From a multiple of 64, so adding a lane number never carries. */
        const size_t skip = (size_t)((start + i) & 63);
        const size_t here = n - i < 64 - skip ? n - i : 64 - skip;
        uint32_t *const to = here == 64 ? dst + i : part;
        const uint64_t c = (start + i - skip) >> 2;
        const __m512i c1 = set64((uint32_t)(c >> 32));
        struct state s = {_mm512_add_epi64(set64((uint32_t)c), lane), c1, c2,
                          c3};
        struct state t = {_mm512_add_epi64(set64((uint32_t)c + 8), lane), c1,
                          c2, c3};
        for (uint32_t r = 0; r < ROUNDS; r++) {
            next_round(&s, k0[r], k1[r]);
            next_round(&t, k0[r], k1[r]);
        }
        store_words(to, &s);
        store_words(to + 32, &t);
        if (here < 64)
            memcpy(dst + i, part + skip, here * sizeof *dst);
        i += here;
    }
}

void tvk_avx512_philox(struct tvk_table *t)
{
    t->philox_mask = philox_mask;
    t->philox_words = philox_words;
}
