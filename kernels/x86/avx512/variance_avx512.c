/* SPDX-License-Identifier: Apache-2.0 */
/*
 * variance_avx512.c - variances and elections of task vectors, eight positions
 * at a time in fp64.
 */
#include "x86/x86_rows.h"
#include "avx512_util.h"

#include <assert.h>

TVK_INLINE __m512d divide(const struct tvk_divide *div, __m512d v)
{
    if (div->is_none)
        return v;
    if (div->is_reciprocal)
        return _mm512_mul_pd(v, _mm512_set1_pd(div->by));
    return _mm512_div_pd(v, _mm512_set1_pd(div->by));
}

TVK_INLINE void variance8(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                          const float *const *x, size_t n_donors,
                          const struct tvk_divide *count, size_t i,
                          __mmask8 lanes)
{
    const __m512d vb = load8(lanes, b + i);
    const __m512d first = _mm512_sub_pd(load8(lanes, x[0] + i), vb);
    __m512d mean = _mm512_setzero_pd();
    __m512d sum = mean;

    for (size_t j = 1; j < n_donors; j++)
        mean = _mm512_add_pd(
            mean,
            _mm512_sub_pd(_mm512_sub_pd(load8(lanes, x[j] + i), vb), first));
    mean = divide(count, mean);
    for (size_t j = 0; j < n_donors; j++) {
        const __m512d d = _mm512_sub_pd(
            _mm512_sub_pd(_mm512_sub_pd(load8(lanes, x[j] + i), vb), first),
            mean);
        sum = _mm512_add_pd(sum, _mm512_mul_pd(d, d));
    }
    _mm256_mask_storeu_ps(dst + i, lanes, _mm512_cvtpd_ps(divide(count, sum)));
}

TVK_INLINE void variance_of(float *TVK_RESTRICT dst,
                            const float *TVK_RESTRICT b, const float *const *x,
                            size_t n_donors, size_t n)
{
    const struct tvk_divide count = tvk_divide_by((double)n_donors);
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        variance8(dst, b, x, n_donors, &count, i, 0xff);
    if (i < n)
        variance8(dst, b, x, n_donors, &count, i, lanes8(i, n));
}

/* Of two: e_0 is 0 and its deviation the mean itself. Where that is not so, of
 * values that are not finite, the other deviation is a NaN as well. */
TVK_INLINE void pair8(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                      const float *const *x, size_t i, __mmask8 lanes)
{
    const __m512d half = _mm512_set1_pd(0.5);
    const __m512d vb = load8(lanes, b + i);
    const __m512d e = _mm512_sub_pd(_mm512_sub_pd(load8(lanes, x[1] + i), vb),
                                    _mm512_sub_pd(load8(lanes, x[0] + i), vb));
    const __m512d mean = _mm512_mul_pd(e, half);
    const __m512d d = _mm512_sub_pd(e, mean);
    const __m512d sum =
        _mm512_add_pd(_mm512_mul_pd(mean, mean), _mm512_mul_pd(d, d));

    _mm256_mask_storeu_ps(dst + i, lanes,
                          _mm512_cvtpd_ps(_mm512_mul_pd(sum, half)));
}

static void variance_of_pair(float *TVK_RESTRICT dst,
                             const float *TVK_RESTRICT b, const float *const *x,
                             size_t n)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        pair8(dst, b, x, i, 0xff);
    if (i < n)
        pair8(dst, b, x, i, lanes8(i, n));
}

static void variance(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                     const float *const *x, size_t n_donors, size_t n)
{
    if (n_donors == 2)
        variance_of_pair(dst, b, x, n);
    else
        variance_of(dst, b, x, n_donors, n);
}

TVK_INLINE void elect8(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                       const float *const *x, const uint64_t *mask,
                       const double *weight, size_t n_donors, size_t i,
                       __mmask8 lanes)
{
    const __m512d zero = _mm512_setzero_pd();
    const __m256 base = _mm256_maskz_loadu_ps(lanes, b + i);
    const __m512d vb = _mm512_cvtps_pd(base);
    __m512d vote = zero;
    __m512d sum = zero;
    __m512d by = zero;

    for (size_t j = 0; j < n_donors; j++)
        vote = _mm512_add_pd(vote, _mm512_sub_pd(load8(lanes, x[j] + i), vb));
    /* Turns "below zero" into "above" where the vote is negative. */
    const __m512d turn = _mm512_mask_mov_pd(
        _mm512_set1_pd(-0.0), _mm512_cmp_pd_mask(vote, zero, _CMP_GE_OQ), zero);
    for (size_t j = 0; j < n_donors; j++) {
        const __m512d d = _mm512_sub_pd(load8(lanes, x[j] + i), vb);
        const __m512d w = _mm512_set1_pd(weight[j]);
        const __mmask8 agree =
            _mm512_cmp_pd_mask(_mm512_xor_pd(d, turn), zero, _CMP_GT_OQ);
        sum = _mm512_mask_add_pd(sum, agree, sum, _mm512_mul_pd(w, d));
        by = _mm512_mask_add_pd(by, agree, by, w);
    }
    sum = _mm512_mask_mov_pd(sum, _mm512_cmp_pd_mask(vote, vote, _CMP_UNORD_Q),
                             vote);
    /* max gives its second operand when the first is a NaN. */
    const __m512d change =
        _mm512_div_pd(sum, _mm512_max_pd(by, _mm512_set1_pd(1e-6)));
    __mmask8 other = _mm512_cmp_pd_mask(sum, zero, _CMP_NEQ_UQ);
    if (mask != NULL)
        other = (__mmask8)(other & tvk_mask_8(mask, i));
    _mm256_mask_storeu_ps(
        dst + i, lanes,
        _mm256_mask_mov_ps(base, other,
                           _mm512_cvtpd_ps(_mm512_add_pd(vb, change))));
}

TVK_INLINE void elect_of(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                         const float *const *x, const uint64_t *mask,
                         const double *weight, size_t n_donors, size_t n)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        elect8(dst, b, x, mask, weight, n_donors, i, 0xff);
    if (i < n)
        elect8(dst, b, x, mask, weight, n_donors, i, lanes8(i, n));
}

static void elect(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                  const float *const *x, const uint64_t *mask,
                  const double *weight, size_t n_donors, size_t n)
{
    if (n_donors == 2)
        elect_of(dst, b, x, mask, weight, 2, n);
    else
        elect_of(dst, b, x, mask, weight, n_donors, n);
}

static void keep(float *TVK_RESTRICT y, const uint64_t *mask, size_t n)
{
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        const __mmask16 kept = (__mmask16)(lanes & tvk_mask_16(mask, i));
        _mm512_mask_storeu_ps(y + i, lanes, _mm512_maskz_loadu_ps(kept, y + i));
    }
}

void tvk_avx512_variance(struct tvk_table *t)
{
    t->variance = variance;
    t->elect = elect;
    t->keep = keep;
}
