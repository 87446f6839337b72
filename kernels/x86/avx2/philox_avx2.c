/* SPDX-License-Identifier: Apache-2.0 */
/*
 * philox_avx2.c - Philox4x32-10 (Salmon et al., SC 2011), 16 counters, that is
 * one mask word, at a time, as four vectors of four.
 *
 * Layout as in philox_avx512.c: 32-bit values in the low half of 64-bit lanes,
 * counters dealt to lanes 0 2 1 3.
 */
#include "x86/x86_rows.h"
#include "avx2_util.h"

#include <assert.h>

/* Multipliers and Weyl increments of the paper, section 4.3. */
#define MUL_0  0xD2511F53u
#define MUL_1  0xCD9E8D57u
#define WEYL_0 0x9E3779B9u
#define WEYL_1 0xBB67AE85u
#define ROUNDS 10u

struct state {
    __m256i c0, c1, c2, c3;
};

TVK_INLINE __m256i set64(uint32_t v)
{
    return _mm256_set1_epi64x((long long)v);
}

TVK_INLINE __m256i xor3(__m256i a, __m256i b, __m256i c)
{
    return _mm256_xor_si256(a, _mm256_xor_si256(b, c));
}

TVK_INLINE void next_round(struct state *s, __m256i k0, __m256i k1)
{
    const __m256i p0 = _mm256_mul_epu32(s->c0, set64(MUL_0));
    const __m256i p1 = _mm256_mul_epu32(s->c2, set64(MUL_1));
    s->c0 = xor3(_mm256_srli_epi64(p1, 32), s->c1, k0);
    s->c2 = xor3(_mm256_srli_epi64(p0, 32), s->c3, k1);
    s->c1 = p1;
    s->c3 = p0;
}

/* Bit 4c + w: word w of counter c is below the threshold. Compares are signed:
 * both sides come with their top bit flipped. */
TVK_INLINE uint32_t state_below(const struct state *s, __m256i threshold)
{
    const __m256i flip = _mm256_set1_epi32((int)0x80000000u);
    const __m256i a = _mm256_xor_si256(
        flip, _mm256_blend_epi32(s->c0, _mm256_slli_epi64(s->c1, 32), 0xaa));
    const __m256i b = _mm256_xor_si256(
        flip, _mm256_blend_epi32(s->c2, _mm256_slli_epi64(s->c3, 32), 0xaa));
    const __m256i lo = _mm256_unpacklo_epi64(a, b);
    const __m256i hi = _mm256_unpackhi_epi64(a, b);
    return bits8(_mm256_cmpgt_epi32(threshold, lo)) |
           bits8(_mm256_cmpgt_epi32(threshold, hi)) << 8;
}

static uint64_t philox_mask(uint64_t *TVK_RESTRICT mask, uint64_t start,
                            uint64_t key, uint64_t name_hash,
                            uint64_t threshold, size_t n)
{
    const __m256i lane = _mm256_setr_epi64x(0, 2, 1, 3);
    const __m256i c2 = set64((uint32_t)name_hash);
    const __m256i c3 = set64((uint32_t)(name_hash >> 32));
    const __m256i limit =
        _mm256_set1_epi32((int)((uint32_t)threshold ^ 0x80000000u));
    __m256i k0[ROUNDS], k1[ROUNDS];
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
            const __m256i c1 = set64((uint32_t)(c >> 32));
            word = 0;
            for (uint32_t q = 0; q < 16; q += 8) {
                const uint32_t c0 = (uint32_t)c + q;
                struct state s = {_mm256_add_epi64(set64(c0), lane), c1, c2,
                                  c3};
                struct state t = {_mm256_add_epi64(set64(c0 + 4), lane), c1, c2,
                                  c3};
                for (uint32_t r = 0; r < ROUNDS; r++) {
                    next_round(&s, k0[r], k1[r]);
                    next_round(&t, k0[r], k1[r]);
                }
                const uint32_t half =
                    state_below(&s, limit) | state_below(&t, limit) << 16;
                word |= (uint64_t)half << (4 * q);
            }
        }
        if (left < 64)
            word &= tvk_low_bits(left);
        mask[i >> 6] = word;
        kept += tvk_popcount(word);
    }
    return kept;
}

static void philox_words(uint32_t *TVK_RESTRICT dst, uint64_t start,
                         uint64_t key, uint64_t name_hash, size_t n)
{
    const __m256i lane = _mm256_setr_epi64x(0, 2, 1, 3);
    const __m256i c2 = set64((uint32_t)name_hash);
    const __m256i c3 = set64((uint32_t)(name_hash >> 32));
    /* Up to a multiple of 16, so adding a lane number never carries. */
    size_t i = (size_t)(-start & 15);

    if (i > n)
        i = n;
    tvk_philox_words(dst, start, key, name_hash, i);
    for (; i + 16 <= n; i += 16) {
        const uint64_t c = (start + i) >> 2;
        struct state s = {_mm256_add_epi64(set64((uint32_t)c), lane),
                          set64((uint32_t)(c >> 32)), c2, c3};
        for (uint32_t r = 0; r < ROUNDS; r++)
            next_round(&s, set64((uint32_t)key + r * WEYL_0),
                       set64((uint32_t)(key >> 32) + r * WEYL_1));
        const __m256i a =
            _mm256_blend_epi32(s.c0, _mm256_slli_epi64(s.c1, 32), 0xaa);
        const __m256i b =
            _mm256_blend_epi32(s.c2, _mm256_slli_epi64(s.c3, 32), 0xaa);
        __m256i *const to = (__m256i *)(void *)(dst + i);
        _mm256_storeu_si256(to, _mm256_unpacklo_epi64(a, b));
        _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi64(a, b));
    }
    tvk_philox_words(dst + i, start + i, key, name_hash, n - i);
}

void tvk_avx2_philox(struct tvk_table *t)
{
    t->philox_mask = philox_mask;
    t->philox_words = philox_words;
}
