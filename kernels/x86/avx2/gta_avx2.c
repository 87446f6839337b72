/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gta_avx2.c - generalised task arithmetic, 4 fp64 lanes at a time.
 *
 * As gta_avx512.c, with lane masks in vectors. Sums may start from the first
 * term instead of +0: that differs from the reference only in the sign of a
 * zero, and a zero change returns the base.
 */
#include "rows.h"
#include "x86/gta_quick.h"
#include "x86/x86_rows.h"
#include "avx2_util.h"

#include <assert.h>

#define BLOCK 2u /* vectors */

struct job {
    const float *b;
    const float *const *x;
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

TVK_INLINE __m256d change(const struct job *g, __m256d b, size_t j, size_t i,
                          size_t count, int masked)
{
    const __m256d d = _mm256_mul_pd(_mm256_sub_pd(load4(count, g->x[j] + i), b),
                                    _mm256_set1_pd(g->coef[j]));
    if (masked && g->masks[j] != NULL)
        return _mm256_and_pd(d, kept4(g->masks[j], i));
    return d;
}

TVK_INLINE __m256d agreeing(const struct job *g, __m256d m, __m256d divisor)
{
    const __m256d none =
        _mm256_cmp_pd(_mm256_andnot_pd(_mm256_set1_pd(-0.0), divisor),
                      _mm256_set1_pd(g->least), _CMP_LE_OQ);
    const __m256d by = _mm256_blendv_pd(divisor, _mm256_set1_pd(1.0), none);

    if (!g->by_powers)
        return _mm256_div_pd(m, by);
    /* Sign and exponent alone: the difference is those of 1 / by. */
    return _mm256_mul_pd(
        m, _mm256_castsi256_pd(_mm256_sub_epi64(
               _mm256_set1_epi64x(TVK_POWER_BITS), _mm256_castpd_si256(by))));
}

TVK_INLINE void elect(const struct job *g, __m256d (*d)[BLOCK], __m256d *m,
                      size_t n_donors, size_t vectors)
{
    const __m256d zero = _mm256_setzero_pd();
    __m256d turn[BLOCK], divisor[BLOCK];

    for (size_t v = 0; v < vectors; v++) {
        /* Turns agreement, above zero or below, into "above" everywhere. */
        turn[v] = _mm256_andnot_pd(_mm256_cmp_pd(m[v], zero, _CMP_GE_OQ),
                                   _mm256_set1_pd(-0.0));
        divisor[v] = zero;
    }
    for (size_t j = 0; j < n_donors; j++) {
        const __m256d weight = _mm256_set1_pd(g->weight[j]);
        for (size_t v = 0; v < vectors; v++) {
            const __m256d agree = _mm256_cmp_pd(_mm256_xor_pd(d[j][v], turn[v]),
                                                zero, _CMP_GT_OQ);
            const __m256d part = _mm256_and_pd(agree, d[j][v]);
            const __m256d share = _mm256_and_pd(agree, weight);
            /* Sums that started at +0 are never -0: adding +0 is no change. */
            m[v] = j == 0 ? part : _mm256_add_pd(m[v], part);
            divisor[v] = j == 0 ? share : _mm256_add_pd(divisor[v], share);
        }
    }
    if (g->normalize)
        for (size_t v = 0; v < vectors; v++)
            m[v] = agreeing(g, m[v], divisor[v]);
}

TVK_INLINE __m256d divide(const struct tvk_divide *div, __m256d m)
{
    if (div->is_none)
        return m;
    if (div->is_reciprocal)
        return _mm256_mul_pd(m, _mm256_set1_pd(div->by));
    return _mm256_div_pd(m, _mm256_set1_pd(div->by));
}

/* `vectors` vectors of 4 elements, the last one cut to `count`. */
TVK_INLINE void merge_block(float *TVK_RESTRICT dst, const struct job *g,
                            size_t i, size_t vectors, size_t count,
                            size_t n_donors, int consensus, int masked)
{
    __m256d d[TVK_DONORS_MAX][BLOCK];
    __m256d b[BLOCK], m[BLOCK];

    for (size_t v = 0; v < vectors; v++) {
        b[v] = load4(count, g->b + i + 4 * v);
        m[v] = change(g, b[v], 0, i + 4 * v, count, masked);
        if (consensus)
            d[0][v] = m[v];
    }
    for (size_t j = 1; j < n_donors; j++)
        for (size_t v = 0; v < vectors; v++) {
            const __m256d next = change(g, b[v], j, i + 4 * v, count, masked);
            if (consensus)
                d[j][v] = next;
            m[v] = _mm256_add_pd(m[v], next);
        }
    if (consensus)
        elect(g, d, m, n_donors, vectors);
    for (size_t v = 0; v < vectors; v++) {
        const float *const from = g->b + i + 4 * v;
        const __m128 base = count >= 4 ? _mm_loadu_ps(from)
                                       : _mm_maskload_ps(from, first4(count));
        if (!consensus && g->normalize)
            m[v] = divide(&g->total, m[v]);
        if (g->has_lambda)
            m[v] = _mm256_mul_pd(m[v], _mm256_set1_pd(g->lambda));
        const __m256d same =
            _mm256_cmp_pd(m[v], _mm256_setzero_pd(), _CMP_EQ_OQ);
        store4(dst + i + 4 * v, count,
               _mm_blendv_ps(_mm256_cvtpd_ps(_mm256_add_pd(b[v], m[v])), base,
                             narrow4(same)));
    }
}

TVK_INLINE void merge_all(float *TVK_RESTRICT dst, const struct job *g,
                          size_t n_donors, int consensus, int masked, size_t n)
{
    size_t i = 0;

    for (; i + 4 * BLOCK <= n; i += 4 * BLOCK) {
        if (i % 16 == 0) {
            tvk_read_ahead(g->b + i);
            /* What is written only is read before, line by line. */
            tvk_read_ahead(dst + i);
            for (size_t j = 0; j < n_donors; j++)
                tvk_read_ahead(g->x[j] + i);
        }
        merge_block(dst, g, i, BLOCK, 4, n_donors, consensus, masked);
    }
    for (; i < n; i += 4)
        merge_block(dst, g, i, 1, n - i, n_donors, consensus, masked);
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
    default:
        merge_donors(dst, g, n_donors, 1, n);
    }
}

static void gta(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                const float *const *x, const uint64_t *const *masks,
                const struct tvk_gta *p, size_t n)
{
    double total = 0.0;

    assert(p->n_donors <= TVK_DONORS_MAX);
    if (p->n_donors == 0) {
        if (n > 0)
            memcpy(dst, b, n * sizeof(*dst));
        return;
    }
    for (size_t j = 0; j < p->n_donors; j++)
        total = total + p->weight[j];
    if (total > -1e-8 && total < 1e-8)
        total = 1.0;
    const struct job g = {.b = b,
                          .x = x,
                          .masks = masks,
                          .coef = p->coef,
                          .weight = p->weight,
                          .total = tvk_divide_by(total),
                          .normalize = p->normalize,
                          .by_powers = tvk_by_powers(p->weight, p->n_donors),
                          .has_lambda = p->lambda != 1.0,
                          .lambda = p->lambda,
                          .least = tvk_gta_least_divisor(p)};
    if (p->consensus)
        merge_consensus(dst, &g, p->n_donors, n);
    else
        merge_sum(dst, &g, p->n_donors, n);
}

/* Elements from `from`, a multiple of 64, to n. */
static uint64_t by_pieces(void *TVK_RESTRICT dst, const void *b,
                          const void *const *x, const uint64_t *const *masks,
                          const struct tvk_gta *p, size_t from, size_t n)
{
    const void *rest_x[TVK_DONORS_MAX];
    const uint64_t *rest_masks[TVK_DONORS_MAX];

    assert(p->n_donors <= TVK_DONORS_MAX);
    for (size_t j = 0; j < p->n_donors; j++) {
        rest_x[j] = (const unsigned char *)x[j] + 2 * from;
        rest_masks[j] =
            masks != NULL && masks[j] != NULL ? masks[j] + from / 64 : NULL;
    }
    return tvk_gta_by_pieces(TVK_AVX2, (unsigned char *)dst + 2 * from,
                             (const unsigned char *)b + 2 * from, rest_x,
                             masks != NULL ? rest_masks : NULL, p, n - from);
}

static uint64_t gta_bf16(void *TVK_RESTRICT dst, const void *b,
                         const void *const *x, const uint64_t *const *masks,
                         const struct tvk_gta *p, size_t n)
{
    static const struct tvk_quick_row row = {TVK_AVX2, TVK_QUICK_DONORS_AVX2,
                                             tvk_avx2_quick, by_pieces};
    return tvk_quick_gta(&row, dst, b, x, masks, p, n);
}

void tvk_avx2_gta(struct tvk_table *t)
{
    t->gta = gta;
    t->gta_bf16 = gta_bf16;
}
