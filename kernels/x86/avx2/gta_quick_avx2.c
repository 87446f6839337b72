/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gta_quick_avx2.c - the estimates of gta_quick.h, 8 elements at a time: those
 * with even numbers of 16, then those with odd ones. Either are fp32 after one
 * instruction, and their results meet without a shuffle.
 *
 * Without fused multiplication: the factor's product is rounded, which
 * TVK_QUICK_ULPS allows for. Tables have 8 places, so donors are 3 at most.
 */
#include "rows.h"
#include "x86/gta_quick.h"
#include "x86/x86_rows.h"
#include "avx2_util.h"

#include <math.h>

#define LEAST_SIZE 0x0d800001u /* bits of what is just above 2^-100 */

/* What stays the same, in all lanes. */
struct lanes {
    __m256 sign, sure;
    __m256 coef[TVK_QUICK_DONORS_AVX2];
    /* By the sum of what agrees says, -1 or 0 for donor 0, -2 or 0 for 1, ...
     */
    __m256 low, high;
    __m256i upper, odd, half, from_least, most;
    __m256i bit[4]; /* of 32: even ones of the first 16, odd ones, ... */
    /* Bits of the masks: at byte i / 8 & span, which is 0 for all ones. */
    const unsigned char *mask[TVK_QUICK_DONORS_AVX2];
    size_t span[TVK_QUICK_DONORS_AVX2];
};

/* Not inlined: constants that the compiler does not know stay where they are,
 * in memory, there being few registers. */
static __attribute__((noinline)) void lanes_init(struct lanes *c,
                                                 const struct tvk_quick *q)
{
    static const unsigned char ones[4] = {0xff, 0xff, 0xff, 0xff};
    float low[8] = {0}, high[8] = {0};

    for (size_t set = 0; set < (size_t)1 << q->p->n_donors; set++) {
        const size_t at = (8 - set) % 8;
        low[at] = q->low[set];
        high[at] = q->high[set];
    }
    c->low = _mm256_loadu_ps(low);
    c->high = _mm256_loadu_ps(high);
    c->sign = _mm256_set1_ps(-0.0f);
    c->sure = _mm256_set1_ps(TVK_QUICK_SURE);
    c->upper = _mm256_set1_epi32(-0x10000);
    c->odd = _mm256_set1_epi32(1);
    c->half = _mm256_set1_epi32(0x7fff);
    /* Above 2^-100, also where nobody agrees, and finite, by one signed
     * comparison: bits from LEAST_SIZE on are moved to the least integer on. */
    c->from_least = _mm256_set1_epi32((int)(0x80000000u - LEAST_SIZE));
    c->most = _mm256_set1_epi32((int)(0xff800000u - LEAST_SIZE));
    for (int v = 0; v < 4; v++)
        c->bit[v] = _mm256_sllv_epi32(
            _mm256_set1_epi32(1),
            _mm256_add_epi32(_mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14),
                             _mm256_set1_epi32(v / 2 * 16 + v % 2)));
    for (size_t j = 0; j < q->p->n_donors; j++) {
        const int has_mask = q->masks != NULL && q->masks[j] != NULL;
        c->coef[j] = _mm256_set1_ps(q->coef[j]);
        c->mask[j] = has_mask ? (const unsigned char *)q->masks[j] : ones;
        c->span[j] = has_mask ? SIZE_MAX : 0;
    }
}

TVK_INLINE __m256i load16_half(const unsigned char *p)
{
    return _mm256_loadu_si256((const __m256i *)(const void *)p);
}

/* The even or odd ones of 16 bf16 as fp32. */
TVK_INLINE __m256 wide8(const struct lanes *c, __m256i h, int odd)
{
    return _mm256_castsi256_ps(odd ? _mm256_and_si256(h, c->upper)
                                   : _mm256_slli_epi32(h, 16));
}

/* The upper halves are the bf16 that v rounds to; v is no NaN. */
TVK_INLINE __m256i round8(const struct lanes *c, __m256 v)
{
    const __m256i u = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), c->odd);
    return _mm256_add_epi32(_mm256_add_epi32(u, c->half), odd);
}

/* d has the sign that turn has as its only bit. */
TVK_INLINE __m256 agrees(__m256 d, __m256 turn)
{
    return _mm256_cmp_ps(_mm256_xor_ps(d, turn), _mm256_setzero_ps(),
                         _CMP_GT_OQ);
}

/* 8 of the 16 elements of h, where kept[j] has the mask's bits of 32 and v says
 * which of them these are. Returns results in upper halves; *sure has signs for
 * those that are. */
TVK_INLINE __m256i merge8(const struct lanes *c, __m256i h_b,
                          const __m256i *h_x, const __m256i *kept, size_t v,
                          size_t n_donors, int masked, __m256i *sure)
{
    const __m256 b = wide8(c, h_b, v & 1);
    __m256 d[TVK_QUICK_DONORS_AVX2], part[TVK_QUICK_DONORS_AVX2];
    __m256 sum = _mm256_setzero_ps();
    __m256 largest = _mm256_setzero_ps();

    for (size_t j = 0; j < n_donors; j++) {
        d[j] = _mm256_sub_ps(wide8(c, h_x[j], v & 1), b);
        if (masked)
            d[j] = _mm256_and_ps(
                d[j], _mm256_castsi256_ps(_mm256_cmpeq_epi32(
                          _mm256_and_si256(kept[j], c->bit[v]), c->bit[v])));
        part[j] = _mm256_mul_ps(d[j], c->coef[j]);
        sum = j == 0 ? part[0] : _mm256_add_ps(sum, part[j]);
        if (j + 1 < n_donors) {
            const __m256 size = _mm256_andnot_ps(c->sign, part[j]);
            largest = j == 0 ? size : _mm256_max_ps(size, largest);
        }
    }
    /* A NaN among the first makes the sum one, whatever max says. */
    const __m256 voted =
        _mm256_cmp_ps(_mm256_andnot_ps(c->sign, sum),
                      _mm256_mul_ps(largest, c->sure), _CMP_GE_OQ);
    const __m256 turn = _mm256_and_ps(sum, c->sign);
    __m256 m = _mm256_setzero_ps();
    __m256i who = _mm256_setzero_si256();
    for (size_t j = n_donors; j-- > 0;) {
        const __m256 agree = agrees(d[j], turn);
        const __m256i one = _mm256_castps_si256(agree);
        who = j + 1 == n_donors
                  ? one
                  : _mm256_add_epi32(_mm256_add_epi32(who, who), one);
        m = j + 1 == n_donors ? _mm256_and_ps(agree, part[j])
                              : _mm256_add_ps(m, _mm256_and_ps(agree, part[j]));
    }
    const __m256 low = _mm256_add_ps(
        b, _mm256_mul_ps(m, _mm256_permutevar8x32_ps(c->low, who)));
    const __m256 high = _mm256_add_ps(
        b, _mm256_mul_ps(m, _mm256_permutevar8x32_ps(c->high, who)));
    const __m256i size = _mm256_castps_si256(_mm256_mul_ps(low, high));
    const __m256i normal =
        _mm256_cmpgt_epi32(c->most, _mm256_add_epi32(size, c->from_least));
    const __m256i r = round8(c, high);
    *sure =
        _mm256_and_si256(_mm256_and_si256(_mm256_castps_si256(voted), normal),
                         _mm256_cmpeq_epi16(round8(c, low), r));
    return r;
}

/* 8 bits to every other of 16. */
static unsigned apart(unsigned bits)
{
    bits = (bits | bits << 4) & 0x0f0fu;
    bits = (bits | bits << 2) & 0x3333u;
    return (bits | bits << 1) & 0x5555u;
}

/* Elements i .. i+15, the first or the second (v is 2) of 32. */
TVK_INLINE void merge16(struct tvk_quick *whole, const struct lanes *c,
                        const struct tvk_quick *q, const __m256i *kept,
                        size_t i, size_t v, size_t n_donors, int masked)
{
    const __m256i h_b = load16_half(q->b + 2 * i);
    __m256i h_x[TVK_QUICK_DONORS_AVX2], even, odd;

    for (size_t j = 0; j < n_donors; j++)
        h_x[j] = load16_half(q->x[j] + 2 * i);
    const __m256i r0 = merge8(c, h_b, h_x, kept, v, n_donors, masked, &even);
    const __m256i r1 = merge8(c, h_b, h_x, kept, v + 1, n_donors, masked, &odd);
    _mm256_storeu_si256(
        (__m256i *)(void *)(q->dst + 2 * i),
        _mm256_blend_epi16(_mm256_srli_epi32(r0, 16), r1, 0xaa));
    if (__builtin_expect(bits8(_mm256_and_si256(even, odd)) != 0xff, 0))
        tvk_quick_doubt(
            whole, (apart(bits8(even)) | apart(bits8(odd)) << 1) ^ 0xffffu, i);
}

TVK_INLINE size_t merge_all(struct tvk_quick *q, const struct lanes *c,
                            size_t n_donors, int masked, size_t n)
{
    /* Known to stay the same whatever is written through dst. */
    const unsigned char *x[TVK_QUICK_DONORS_AVX2];
    const struct tvk_quick here = {
        .dst = q->dst, .b = q->b, .x = x, .masks = q->masks};
    __m256i kept[TVK_QUICK_DONORS_AVX2];
    size_t i = 0;

    for (size_t j = 0; j < n_donors; j++)
        x[j] = q->x[j];
    for (; i + 64 <= n && !tvk_quick_is_slow(q, i); i += 64) {
        for (size_t k = i; k < i + 64; k += 32) {
            tvk_read_ahead(here.b + 2 * k);
            /* What is written only is read before, line by line. */
            tvk_read_ahead(here.dst + 2 * k);
            for (size_t j = 0; j < n_donors; j++) {
                int all = 0;
                tvk_read_ahead(x[j] + 2 * k);
                memcpy(&all, c->mask[j] + (k / 8 & c->span[j]), sizeof(all));
                kept[j] = _mm256_set1_epi32(all);
            }
            merge16(q, c, &here, kept, k, 0, n_donors, masked);
            merge16(q, c, &here, kept, k + 16, 2, n_donors, masked);
        }
    }
    return i;
}

TVK_INLINE size_t merge_donors(struct tvk_quick *q, const struct lanes *c,
                               size_t n_donors, size_t n)
{
    if (q->masks != NULL)
        return merge_all(q, c, n_donors, 1, n);
    return merge_all(q, c, n_donors, 0, n);
}

size_t tvk_avx2_quick(struct tvk_quick *q, size_t n)
{
    struct lanes c;
    size_t done = 0;

    lanes_init(&c, q);
    if (q->p->n_donors == 2)
        done = merge_donors(q, &c, 2, n);
    else
        done = merge_donors(q, &c, 3, n);
    tvk_quick_settle(q);
    return done;
}
