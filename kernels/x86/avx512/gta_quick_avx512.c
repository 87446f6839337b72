/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gta_quick_avx512.c - the estimates of gta_quick.h, 16 elements at a time.
 *
 * Arithmetic and moves to and from masks share two ports: what counts is the
 * number of instructions, 37 for two donors.
 */
#include "rows.h"
#include "x86/gta_quick.h"
#include "x86/x86_rows.h"
#include "avx512_util.h"

#include <math.h>

/* What stays the same, in all lanes. */
struct lanes {
    __m512 sign, sure, infinity, low, high;
    __m512 coef[TVK_QUICK_DONORS];
    __m512i nobody, others, odd, half, one, upper;
    __m512i somebody[TVK_QUICK_DONORS];
    /* Bits of the masks: at byte i / 8 & span, which is 0 for all ones. */
    const unsigned char *mask[TVK_QUICK_DONORS];
    size_t span[TVK_QUICK_DONORS];
};

/* v in all lanes, not known to the compiler: it would make constants anew for
 * each use, by instructions that wait for what arithmetic needs. */
TVK_INLINE __m512i held(__m512i v)
{
    __asm__("" : "+v"(v));
    return v;
}

TVK_INLINE __m512i held_int(int v)
{
    return held(_mm512_set1_epi32(v));
}

TVK_INLINE __m512 held_float(float v)
{
    return _mm512_castsi512_ps(held(_mm512_castps_si512(_mm512_set1_ps(v))));
}

static void lanes_init(struct lanes *c, const struct tvk_quick *q)
{
    static const unsigned char ones[2] = {0xff, 0xff};

    c->sign = held_float(-0.0f);
    c->sure = held_float(TVK_QUICK_SURE);
    c->infinity = held_float(INFINITY);
    c->low = _mm512_loadu_ps(q->low);
    c->high = _mm512_loadu_ps(q->high);
    c->nobody = _mm512_castps_si512(held_float(TVK_QUICK_NOBODY));
    c->others = held_int((int)TVK_QUICK_SETS - 1);
    c->odd = held_int(0x10000);
    c->half = held_int(0x7fff);
    c->one = held_int(1);
    c->upper = held_int(-0x10000);
    for (size_t j = 0; j < q->p->n_donors; j++) {
        const int has_mask = q->masks != NULL && q->masks[j] != NULL;
        c->coef[j] = held_float(q->coef[j]);
        c->somebody[j] =
            _mm512_or_si512(_mm512_castps_si512(held_float(TVK_QUICK_SOMEBODY)),
                            held_int(1 << j));
        c->mask[j] = has_mask ? (const unsigned char *)q->masks[j] : ones;
        c->span[j] = has_mask ? SIZE_MAX : 0;
    }
}

/* 16 bf16 as fp32, by one shuffle. */
TVK_INLINE __m512 wide16(const void *p)
{
    const __m512i to =
        _mm512_setr_epi32(0, 1 << 16, 2 << 16, 3 << 16, 4 << 16, 5 << 16,
                          6 << 16, 7 << 16, 8 << 16, 9 << 16, 10 << 16,
                          11 << 16, 12 << 16, 13 << 16, 14 << 16, 15 << 16);
    const __m256i h = _mm256_loadu_si256((const __m256i *)p);
    return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(
        0xaaaaaaaa, to, _mm512_castsi256_si512(h)));
}

/* The upper halves are the bf16 that v rounds to; v is no NaN. */
TVK_INLINE __m512i round16(const struct lanes *c, __m512 v)
{
    const __m512i u = _mm512_castps_si512(v);
    const __mmask16 odd = _mm512_test_epi32_mask(u, c->odd);
    const __m512i r = _mm512_add_epi32(u, c->half);
    return _mm512_mask_add_epi32(r, odd, r, c->one);
}

TVK_INLINE void store_upper16(void *dst, __m512i v)
{
    const __m512i from = _mm512_castsi256_si512(_mm256_setr_epi16(
        1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
    const __m512i h = _mm512_permutexvar_epi16(from, v);
    _mm256_storeu_si256((__m256i *)dst, _mm512_castsi512_si256(h));
}

/* The one whose size is larger, with the sign of the first; of a NaN and a
 * number the number. */
TVK_INLINE __m512 larger(__m512 a, __m512 b)
{
    return _mm512_range_ps(a, b, 3);
}

/* d has the sign of sum. */
TVK_INLINE __mmask16 agrees(const struct lanes *c, __m512 d, __m512 sum)
{
    /* d ^ (sum & sign) */
    const __m512i turned = _mm512_ternarylogic_epi32(
        _mm512_castps_si512(d), _mm512_castps_si512(sum),
        _mm512_castps_si512(c->sign), 0x78);
    return _mm512_cmp_ps_mask(_mm512_castsi512_ps(turned), _mm512_setzero_ps(),
                              _CMP_GT_OQ);
}

TVK_INLINE __m512 change(const struct lanes *c, const struct tvk_quick *q,
                         size_t i, size_t j, __m512 b, int masked)
{
    const __m512 x = wide16(q->x[j] + 2 * i);
    uint16_t keep = 0;

    if (!masked)
        return _mm512_sub_ps(x, b);
    memcpy(&keep, c->mask[j] + (i / 8 & c->span[j]), sizeof(keep));
    return _mm512_maskz_sub_ps(keep, x, b);
}

/* Elements i .. i+15; returns those that are sure. */
TVK_INLINE __mmask16 merge16(const struct lanes *c, const struct tvk_quick *q,
                             size_t i, size_t n_donors, int masked)
{
    const size_t last = n_donors - 1;
    const __m512 b = wide16(q->b + 2 * i);
    __m512 d[TVK_QUICK_DONORS], part[TVK_QUICK_DONORS];

    d[0] = change(c, q, i, 0, b, masked);
    part[0] = _mm512_mul_ps(d[0], c->coef[0]);
    __m512 sum = part[0];
    __m512 largest = part[0];
    for (size_t j = 1; j < last; j++) {
        d[j] = change(c, q, i, j, b, masked);
        part[j] = _mm512_mul_ps(d[j], c->coef[j]);
        sum = _mm512_add_ps(sum, part[j]);
        largest = larger(largest, part[j]);
    }
    d[last] = change(c, q, i, last, b, masked);
    sum = _mm512_fmadd_ps(d[last], c->coef[last], sum);

    /* `who` is the index into the tables and, as a number, what TVK_QUICK_
     * NOBODY and SOMEBODY say. */
    __mmask16 agree = agrees(c, d[0], sum);
    __m512 m = _mm512_maskz_mov_ps(agree, part[0]);
    __m512i who = _mm512_mask_mov_epi32(c->nobody, agree, c->somebody[0]);
    for (size_t j = 1; j < n_donors; j++) {
        agree = agrees(c, d[j], sum);
        m = j < last ? _mm512_mask_add_ps(m, agree, m, part[j])
                     : _mm512_mask3_fmadd_ps(d[j], c->coef[j], m, agree);
        /* (who & others) | somebody */
        who = _mm512_mask_ternarylogic_epi32(who, agree, c->others,
                                             c->somebody[j], 0xea);
    }
    const __m512 low =
        _mm512_fmadd_ps(m, _mm512_permutexvar_ps(who, c->low), b);
    const __m512 high =
        _mm512_fmadd_ps(m, _mm512_permutexvar_ps(who, c->high), b);
    const __m512 size = _mm512_fmadd_ps(low, high, _mm512_castsi512_ps(who));
    const __m512i r = round16(c, high);
    store_upper16(q->dst + 2 * i, r);

    __mmask16 sure = _mm512_cmp_ps_mask(
        larger(sum, _mm512_mul_ps(largest, c->sure)), sum, _CMP_EQ_OQ);
    sure = _mm512_mask_cmp_ps_mask(sure, size, _mm512_setzero_ps(), _CMP_GT_OQ);
    sure = _mm512_mask_cmp_ps_mask(sure, size, c->infinity, _CMP_LT_OQ);
    return _mm512_mask_testn_epi32_mask(
        sure, _mm512_xor_si512(round16(c, low), r), c->upper);
}

TVK_INLINE size_t merge_all(struct tvk_quick *q, const struct lanes *c,
                            size_t n_donors, int masked, size_t n)
{
    /* Known to stay the same whatever is written through dst. */
    const unsigned char *x[TVK_QUICK_DONORS];
    const struct tvk_quick here = {
        .dst = q->dst, .b = q->b, .x = x, .masks = q->masks};
    size_t i = 0;

    for (size_t j = 0; j < n_donors; j++)
        x[j] = q->x[j];
    for (; i + 64 <= n && !tvk_quick_is_slow(q, i); i += 64) {
        for (size_t k = i; k < i + 64; k += 32) {
            tvk_read_ahead(here.b + 2 * k);
            /* What is written only is read before, line by line. */
            tvk_read_ahead(here.dst + 2 * k);
            for (size_t j = 0; j < n_donors; j++)
                tvk_read_ahead(x[j] + 2 * k);
        }
        for (size_t k = i; k < i + 64; k += 16) {
            const __mmask16 sure = merge16(c, &here, k, n_donors, masked);
            if (__builtin_expect(!_kortestc_mask16_u8(sure, sure), 0))
                tvk_quick_doubt(q, sure ^ 0xffffu, k);
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

size_t tvk_avx512_quick(struct tvk_quick *q, size_t n)
{
    struct lanes c;
    size_t done = 0;

    lanes_init(&c, q);
    switch (q->p->n_donors) {
    case 2:
        done = merge_donors(q, &c, 2, n);
        break;
    case 3:
        done = merge_donors(q, &c, 3, n);
        break;
    default:
        done = merge_donors(q, &c, 4, n);
    }
    tvk_quick_settle(q);
    return done;
}
