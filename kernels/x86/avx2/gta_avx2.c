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

struct job {
    const float *b;
    const float *const *x;
    const uint64_t *const *masks;
    const double *coef;
    const double *weight;
    struct tvk_divide total;
    int normalize;
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

TVK_INLINE __m256d elect(const struct job *g, const __m256d *d, __m256d sum,
                         size_t n_donors)
{
    const __m256d zero = _mm256_setzero_pd();
    /* Turns agreement, above zero or below it, into "above" for all lanes. */
    const __m256d turn = _mm256_andnot_pd(_mm256_cmp_pd(sum, zero, _CMP_GE_OQ),
                                          _mm256_set1_pd(-0.0));
    __m256d m = zero;
    __m256d divisor = zero;

    for (size_t j = 0; j < n_donors; j++) {
        const __m256d agree =
            _mm256_cmp_pd(_mm256_xor_pd(d[j], turn), zero, _CMP_GT_OQ);
        /* Sums that started at +0 are never -0: adding +0 is no change. */
        m = _mm256_add_pd(m, _mm256_and_pd(agree, d[j]));
        divisor = _mm256_add_pd(
            divisor, _mm256_and_pd(agree, _mm256_set1_pd(g->weight[j])));
    }
    if (g->normalize) {
        const __m256d none =
            _mm256_cmp_pd(_mm256_andnot_pd(_mm256_set1_pd(-0.0), divisor),
                          _mm256_set1_pd(g->least), _CMP_LE_OQ);
        m = _mm256_div_pd(m,
                          _mm256_blendv_pd(divisor, _mm256_set1_pd(1.0), none));
    }
    return m;
}

TVK_INLINE __m256d divide(const struct tvk_divide *div, __m256d m)
{
    if (div->is_none)
        return m;
    if (div->is_reciprocal)
        return _mm256_mul_pd(m, _mm256_set1_pd(div->by));
    return _mm256_div_pd(m, _mm256_set1_pd(div->by));
}

TVK_INLINE __m128 merge4(const struct job *g, size_t i, size_t count,
                         size_t n_donors, int consensus, int masked)
{
    __m256d d[TVK_DONORS_MAX];
    const __m128 base = count >= 4 ? _mm_loadu_ps(g->b + i)
                                   : _mm_maskload_ps(g->b + i, first4(count));
    const __m256d b = _mm256_cvtps_pd(base);

    d[0] = change(g, b, 0, i, count, masked);
    __m256d m = d[0];
    for (size_t j = 1; j < n_donors; j++) {
        const __m256d next = change(g, b, j, i, count, masked);
        if (consensus)
            d[j] = next;
        m = _mm256_add_pd(m, next);
    }
    if (consensus)
        m = elect(g, d, m, n_donors);
    else if (g->normalize)
        m = divide(&g->total, m);
    if (g->lambda != 1.0)
        m = _mm256_mul_pd(m, _mm256_set1_pd(g->lambda));

    const __m256d same = _mm256_cmp_pd(m, _mm256_setzero_pd(), _CMP_EQ_OQ);
    return _mm_blendv_ps(_mm256_cvtpd_ps(_mm256_add_pd(b, m)), base,
                         narrow4(same));
}

TVK_INLINE void merge_all(float *TVK_RESTRICT dst, const struct job *g,
                          size_t n_donors, int consensus, int masked, size_t n)
{
    size_t i = 0;

    for (; i + 4 <= n; i += 4)
        _mm_storeu_ps(dst + i, merge4(g, i, 4, n_donors, consensus, masked));
    if (i < n)
        store4(dst + i, n - i,
               merge4(g, i, n - i, n_donors, consensus, masked));
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
    const struct job g = {b,
                          x,
                          masks,
                          p->coef,
                          p->weight,
                          tvk_divide_by(total),
                          p->normalize,
                          p->lambda,
                          tvk_gta_least_divisor(p)};
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
    struct tvk_quick q = {.row = TVK_AVX2,
                          .dst = dst,
                          .b = b,
                          .x = (const unsigned char *const *)(const void *)x,
                          .masks = masks,
                          .p = p};
    struct tvk_doubts doubts;
    size_t done = 0;

    if (n >= 64 && tvk_quick_begin(&q, &doubts, TVK_QUICK_DONORS_AVX2))
        done = tvk_avx2_quick(&q, n);
    if (done < n)
        q.bad += by_pieces(dst, b, x, masks, p, done, n);
    return q.bad;
}

void tvk_avx2_gta(struct tvk_table *t)
{
    t->gta = gta;
    t->gta_bf16 = gta_bf16;
}
