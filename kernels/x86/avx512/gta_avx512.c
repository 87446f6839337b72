/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gta_avx512.c - generalised task arithmetic, 8 fp64 lanes at a time.
 *
 * The D_j of one vector stay in registers for up to four donors and in a small
 * stack array above; consensus reads them twice. Sums may start from the first
 * term instead of +0: that differs from the reference only in the sign of a
 * zero, and a zero change returns the base.
 */
#include "rows.h"
#include "x86/gta_quick.h"
#include "x86/x86_rows.h"
#include "avx512_util.h"

#include <assert.h>

#define BLOCK 2u /* vectors */

struct job {
    const float *b;
    const float *const *x;
    /* What comes next in memory is asked for a line at a time, else computing
     * would wait for it: where element 0 of the inputs lies, and its size. */
    const unsigned char *from_b;
    const unsigned char *const *from_x;
    size_t each;
    const uint64_t *const *masks;
    const double *coef;
    const double *weight;
    struct tvk_divide total;
    int normalize;
    int by_powers; /* every sum of weights is 0 or a power of two */
    int has_lambda;
    double lambda;
    double least; /* divisors up to it are 0 */
};

/* Election and disjoint merge: the sum of those that agree goes to m. */
TVK_INLINE void elect(const struct job *g, __m512d (*d)[BLOCK], __m512d *m,
                      size_t n_donors, size_t vectors)
{
    const __m512d zero = _mm512_setzero_pd();
    __m512d turn[BLOCK], divisor[BLOCK];

    for (size_t v = 0; v < vectors; v++) {
        /* Turns agreement, above zero or below, into "above" everywhere. */
        turn[v] = _mm512_mask_mov_pd(_mm512_set1_pd(-0.0),
                                     _mm512_cmp_pd_mask(m[v], zero, _CMP_GE_OQ),
                                     zero);
        m[v] = zero;
        divisor[v] = zero;
    }
    for (size_t j = 0; j < n_donors; j++) {
        const __m512d weight = _mm512_set1_pd(g->weight[j]);
        for (size_t v = 0; v < vectors; v++) {
            const __mmask8 agree = _mm512_cmp_pd_mask(
                _mm512_xor_pd(d[j][v], turn[v]), zero, _CMP_GT_OQ);
            m[v] = _mm512_mask_add_pd(m[v], agree, m[v], d[j][v]);
            divisor[v] =
                _mm512_mask_add_pd(divisor[v], agree, divisor[v], weight);
        }
    }
    if (!g->normalize)
        return;
    for (size_t v = 0; v < vectors; v++) {
        const __mmask8 none = _mm512_cmp_pd_mask(
            _mm512_abs_pd(divisor[v]), _mm512_set1_pd(g->least), _CMP_LE_OQ);
        const __m512d by =
            _mm512_mask_mov_pd(divisor[v], none, _mm512_set1_pd(1.0));
        /* Sign and exponent alone: the difference is those of 1 / by. */
        if (g->by_powers)
            m[v] = _mm512_mul_pd(m[v], _mm512_castsi512_pd(_mm512_sub_epi64(
                                           _mm512_set1_epi64(TVK_POWER_BITS),
                                           _mm512_castpd_si512(by))));
        else
            m[v] = _mm512_div_pd(m[v], by);
    }
}

TVK_INLINE __m512d divide(const struct tvk_divide *div, __m512d m)
{
    if (div->is_none)
        return m;
    if (div->is_reciprocal)
        return _mm512_mul_pd(m, _mm512_set1_pd(div->by));
    return _mm512_div_pd(m, _mm512_set1_pd(div->by));
}

/* `vectors` vectors of 8 elements, the last one cut to `lanes`. */
TVK_INLINE void merge_block(float *TVK_RESTRICT dst, const struct job *g,
                            size_t i, size_t vectors, __mmask8 lanes,
                            size_t n_donors, int consensus, int masked)
{
    __m512d d[TVK_DONORS_MAX][BLOCK];
    __m512d b[BLOCK], m[BLOCK];

    tvk_read_ahead(g->from_b + i * g->each);
    for (size_t v = 0; v < vectors; v++) {
        b[v] = load8(lanes, g->b + i + 8 * v);
        m[v] = _mm512_setzero_pd();
    }
    for (size_t j = 0; j < n_donors; j++) {
        const float *const x = g->x[j] + i;
        const __m512d coef = _mm512_set1_pd(g->coef[j]);
        unsigned keep = 0xffff;
        tvk_read_ahead(g->from_x[j] + i * g->each);
        if (masked && g->masks[j] != NULL)
            keep = vectors > 1 ? tvk_mask_16(g->masks[j], i)
                               : tvk_mask_8(g->masks[j], i);
        for (size_t v = 0; v < vectors; v++) {
            const __m512d diff = _mm512_sub_pd(load8(lanes, x + 8 * v), b[v]);
            const __m512d next =
                masked ? _mm512_maskz_mul_pd((__mmask8)(keep >> (8 * v)), diff,
                                             coef)
                       : _mm512_mul_pd(diff, coef);
            if (consensus)
                d[j][v] = next;
            m[v] = j == 0 ? next : _mm512_add_pd(m[v], next);
        }
    }
    if (consensus)
        elect(g, d, m, n_donors, vectors);
    for (size_t v = 0; v < vectors; v++) {
        if (!consensus && g->normalize)
            m[v] = divide(&g->total, m[v]);
        if (g->has_lambda)
            m[v] = _mm512_mul_pd(m[v], _mm512_set1_pd(g->lambda));
        const __mmask8 same =
            _mm512_cmp_pd_mask(m[v], _mm512_setzero_pd(), _CMP_EQ_OQ);
        const __m256 r = _mm512_cvtpd_ps(_mm512_add_pd(b[v], m[v]));
        const __m256 base = _mm256_maskz_loadu_ps(lanes, g->b + i + 8 * v);
        _mm256_mask_storeu_ps(dst + i + 8 * v, lanes,
                              _mm256_mask_mov_ps(r, same, base));
    }
}

TVK_INLINE void merge_all(float *TVK_RESTRICT dst, const struct job *g,
                          size_t n_donors, int consensus, int masked, size_t n)
{
    size_t i = 0;

    for (; i + 8 * BLOCK <= n; i += 8 * BLOCK)
        merge_block(dst, g, i, BLOCK, 0xff, n_donors, consensus, masked);
    for (; i < n; i += 8)
        merge_block(dst, g, i, 1, lanes8(i, n), n_donors, consensus, masked);
}

TVK_INLINE void merge_donors(float *TVK_RESTRICT dst, const struct job *g,
                             size_t n_donors, int consensus, size_t n)
{
    if (g->masks != NULL)
        merge_all(dst, g, n_donors, consensus, 1, n);
    else
        merge_all(dst, g, n_donors, consensus, 0, n);
}

static void merge_sum(float *TVK_RESTRICT dst, const struct job *g,
                      size_t n_donors, size_t n)
{
    switch (n_donors) {
    case 1:
        merge_donors(dst, g, 1, 0, n);
        break;
    case 2:
        merge_donors(dst, g, 2, 0, n);
        break;
    case 3:
        merge_donors(dst, g, 3, 0, n);
        break;
    case 4:
        merge_donors(dst, g, 4, 0, n);
        break;
    default:
        merge_donors(dst, g, n_donors, 0, n);
    }
}

static void merge_consensus(float *TVK_RESTRICT dst, const struct job *g,
                            size_t n_donors, size_t n)
{
    switch (n_donors) {
    case 1:
        merge_donors(dst, g, 1, 1, n);
        break;
    case 2:
        merge_donors(dst, g, 2, 1, n);
        break;
    case 3:
        merge_donors(dst, g, 3, 1, n);
        break;
    case 4:
        merge_donors(dst, g, 4, 1, n);
        break;
    default:
        merge_donors(dst, g, n_donors, 1, n);
    }
}

static struct job job_of(const struct tvk_gta *p)
{
    double total = 0.0;

    assert(p->n_donors <= TVK_DONORS_MAX);
    for (size_t j = 0; j < p->n_donors; j++)
        total = total + p->weight[j];
    if (total > -1e-8 && total < 1e-8)
        total = 1.0;
    return (struct job){.coef = p->coef,
                        .weight = p->weight,
                        .total = tvk_divide_by(total),
                        .normalize = p->normalize,
                        .by_powers = tvk_by_powers(p->weight, p->n_donors),
                        .has_lambda = p->lambda != 1.0,
                        .lambda = p->lambda,
                        .least = tvk_gta_least_divisor(p)};
}

static void merge(float *TVK_RESTRICT dst, const struct job *g,
                  const struct tvk_gta *p, size_t n)
{
    if (p->n_donors == 0) {
        if (n > 0)
            memcpy(dst, g->b, n * sizeof(*dst));
        return;
    }
    if (p->consensus)
        merge_consensus(dst, g, p->n_donors, n);
    else
        merge_sum(dst, g, p->n_donors, n);
}

static void gta(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                const float *const *x, const uint64_t *const *masks,
                const struct tvk_gta *p, size_t n)
{
    struct job g = job_of(p);

    g.b = b;
    g.x = x;
    g.masks = masks;
    g.from_b = (const unsigned char *)b;
    g.from_x = (const unsigned char *const *)(const void *)x;
    g.each = sizeof(*dst);
    merge(dst, &g, p, n);
}

TVK_INLINE void widen_piece(float *dst, const unsigned char *src, size_t n)
{
    size_t i = 0;

    for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(dst + i, load16_bf16(0xffff, src + 2 * i));
    if (i < n)
        _mm512_mask_storeu_ps(dst + i, lanes16(i, n),
                              load16_bf16(lanes16(i, n), src + 2 * i));
}

/* Elements from `from`, a multiple of 64, to n. Pieces are widened into the L1
 * cache: fp32 in memory fills vectors of fp64 with fewer instructions. */
static uint64_t by_pieces(void *TVK_RESTRICT dst, const void *b,
                          const void *const *x, const uint64_t *const *masks,
                          const struct tvk_gta *p, size_t from, size_t n)
{
    const size_t each = tvk_piece_elems(p->n_donors);
    float in[TVK_PIECE_FLOATS], out[TVK_PIECE_ELEMS];
    const float *donors[TVK_DONORS_MAX];
    const unsigned char *from_x[TVK_DONORS_MAX];
    const uint64_t *kept[TVK_DONORS_MAX];
    struct job g = job_of(p);
    uint64_t bad = 0;

    g.b = in;
    g.x = donors;
    g.masks = masks != NULL ? kept : NULL;
    g.from_x = from_x;
    g.each = 2;
    for (size_t i = from; i < n; i += each) {
        const size_t some = n - i < each ? n - i : each;
        /* What is written only is read before, line by line. */
        for (size_t k = i; k < i + some; k += 32)
            tvk_read_ahead((const unsigned char *)dst + 2 * k);
        g.from_b = (const unsigned char *)b + 2 * i;
        widen_piece(in, g.from_b, some);
        for (size_t j = 0; j < p->n_donors; j++) {
            float *const to = in + (j + 1) * each;
            donors[j] = to;
            from_x[j] = (const unsigned char *)x[j] + 2 * i;
            widen_piece(to, from_x[j], some);
            if (masks != NULL)
                kept[j] = masks[j] != NULL ? masks[j] + i / 64 : NULL;
        }
        merge(out, &g, p, some);
        bad += narrow_bf16((unsigned char *)dst + 2 * i, out, some);
    }
    return bad;
}

static uint64_t gta_bf16(void *TVK_RESTRICT dst, const void *b,
                         const void *const *x, const uint64_t *const *masks,
                         const struct tvk_gta *p, size_t n)
{
    static const struct tvk_quick_row row = {TVK_AVX512, TVK_QUICK_DONORS,
                                             tvk_avx512_quick, by_pieces};
    return tvk_quick_gta(&row, dst, b, x, masks, p, n);
}

void tvk_avx512_gta(struct tvk_table *t)
{
    t->gta = gta;
    t->gta_bf16 = gta_bf16;
}
