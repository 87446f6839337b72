/* SPDX-License-Identifier: Apache-2.0 */
/*
 * variance_avx2.c - variances and elections of task vectors, four positions at
 * a time in fp64.
 */
#include "x86/x86_rows.h"
#include "avx2_util.h"

#include <assert.h>

TVK_INLINE __m256d divide(const struct tvk_divide *div, __m256d v)
{
    if (div->is_none)
        return v;
    if (div->is_reciprocal)
        return _mm256_mul_pd(v, _mm256_set1_pd(div->by));
    return _mm256_div_pd(v, _mm256_set1_pd(div->by));
}

TVK_INLINE void variance_of(float *TVK_RESTRICT dst,
                            const float *TVK_RESTRICT b, const float *const *x,
                            size_t n_donors, size_t n)
{
    const struct tvk_divide count = tvk_divide_by((double)n_donors);

    for (size_t i = 0; i < n; i += 4) {
        const size_t here = n - i;
        const __m256d vb = load4(here, b + i);
        const __m256d first = _mm256_sub_pd(load4(here, x[0] + i), vb);
        __m256d mean = _mm256_setzero_pd();
        for (size_t j = 1; j < n_donors; j++)
            mean = _mm256_add_pd(
                mean,
                _mm256_sub_pd(_mm256_sub_pd(load4(here, x[j] + i), vb), first));
        mean = divide(&count, mean);
        __m256d sum = _mm256_setzero_pd();
        for (size_t j = 0; j < n_donors; j++) {
            const __m256d d = _mm256_sub_pd(
                _mm256_sub_pd(_mm256_sub_pd(load4(here, x[j] + i), vb), first),
                mean);
            sum = _mm256_add_pd(sum, _mm256_mul_pd(d, d));
        }
        store4(dst + i, here, _mm256_cvtpd_ps(divide(&count, sum)));
    }
}

static void variance(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                     const float *const *x, size_t n_donors, size_t n)
{
    if (n_donors == 2)
        variance_of(dst, b, x, 2, n);
    else
        variance_of(dst, b, x, n_donors, n);
}

TVK_INLINE void elect_of(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                         const float *const *x, const uint64_t *mask,
                         const double *weight, size_t n_donors, size_t n)
{
    const __m256d zero = _mm256_setzero_pd();
    const __m256d least = _mm256_set1_pd(1e-6);

    for (size_t i = 0; i < n; i += 4) {
        const size_t here = n - i;
        const __m128 base = here >= 4 ? _mm_loadu_ps(b + i)
                                      : _mm_maskload_ps(b + i, first4(here));
        const __m256d vb = _mm256_cvtps_pd(base);
        __m256d vote = zero;
        __m256d sum = zero;
        __m256d by = zero;
        for (size_t j = 0; j < n_donors; j++)
            vote =
                _mm256_add_pd(vote, _mm256_sub_pd(load4(here, x[j] + i), vb));
        /* Turns "below zero" into "above" where the vote is negative. */
        const __m256d turn = _mm256_andnot_pd(
            _mm256_cmp_pd(vote, zero, _CMP_GE_OQ), _mm256_set1_pd(-0.0));
        for (size_t j = 0; j < n_donors; j++) {
            const __m256d d = _mm256_sub_pd(load4(here, x[j] + i), vb);
            const __m256d w = _mm256_set1_pd(weight[j]);
            const __m256d agree =
                _mm256_cmp_pd(_mm256_xor_pd(d, turn), zero, _CMP_GT_OQ);
            /* Sums that started at +0 are never -0: adding +0 is no change. */
            sum = _mm256_add_pd(sum, _mm256_and_pd(agree, _mm256_mul_pd(w, d)));
            by = _mm256_add_pd(by, _mm256_and_pd(agree, w));
        }
        sum = _mm256_blendv_pd(sum, vote,
                               _mm256_cmp_pd(vote, vote, _CMP_UNORD_Q));
        /* max gives its second operand when the first is a NaN. */
        const __m256d change = _mm256_div_pd(sum, _mm256_max_pd(by, least));
        __m256d other = _mm256_cmp_pd(sum, zero, _CMP_NEQ_UQ);
        if (mask != NULL)
            other = _mm256_and_pd(other, kept4(mask, i));
        store4(dst + i, here,
               _mm_blendv_ps(base, _mm256_cvtpd_ps(_mm256_add_pd(vb, change)),
                             narrow4(other)));
    }
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
    for (size_t i = 0; i < n; i += 8)
        store8(y + i, n - i,
               _mm256_and_ps(load8(n - i, y + i), _mm256_castsi256_ps(spread8(
                                                      tvk_mask_8(mask, i)))));
}

void tvk_avx2_variance(struct tvk_table *t)
{
    t->variance = variance;
    t->elect = elect;
    t->keep = keep;
}
