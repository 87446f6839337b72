/* SPDX-License-Identifier: Apache-2.0 */
/*
 * linear_avx2.c - weighted sums 8 elements at a time, as two fp64 vectors.
 *
 * The number of inputs becomes a constant for the common small ones, so that
 * pointers and weights stay in registers.
 */
#include "x86/x86_rows.h"
#include "avx2_util.h"

#include <assert.h>

TVK_INLINE __m256d finish(__m256d sum, const struct tvk_divide *div)
{
    if (div->is_none)
        return sum;
    if (div->is_reciprocal)
        return _mm256_mul_pd(sum, _mm256_set1_pd(div->by));
    return _mm256_div_pd(sum, _mm256_set1_pd(div->by));
}

TVK_INLINE __m128 sum4(const float *const *x, const double *w, size_t n_inputs,
                       const struct tvk_divide *div, size_t i, size_t count)
{
    __m256d sum = _mm256_mul_pd(_mm256_set1_pd(w[0]), load4(count, x[0] + i));
    for (size_t j = 1; j < n_inputs; j++)
        sum = _mm256_add_pd(
            sum, _mm256_mul_pd(_mm256_set1_pd(w[j]), load4(count, x[j] + i)));
    return _mm256_cvtpd_ps(finish(sum, div));
}

TVK_INLINE void sum_all(float *TVK_RESTRICT dst, const float *const *x,
                        const double *w, size_t n_inputs,
                        const struct tvk_divide *div, size_t n)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8) {
        _mm_storeu_ps(dst + i, sum4(x, w, n_inputs, div, i, 4));
        _mm_storeu_ps(dst + i + 4, sum4(x, w, n_inputs, div, i + 4, 4));
    }
    for (; i < n; i += 4)
        store4(dst + i, n - i, sum4(x, w, n_inputs, div, i, n - i));
}

static void weighted_sum(float *TVK_RESTRICT dst, const float *const *x,
                         const double *w, size_t n_inputs, double divisor,
                         size_t n)
{
    const struct tvk_divide div = tvk_divide_by(divisor);

    assert(n_inputs >= 1);
    if (n_inputs == 1) {
        sum_all(dst, x, w, 1, &div, n);
    } else if (n_inputs == 2) {
        const float *const p[2] = {x[0], x[1]};
        const double v[2] = {w[0], w[1]};
        sum_all(dst, p, v, 2, &div, n);
    } else if (n_inputs == 3) {
        const float *const p[3] = {x[0], x[1], x[2]};
        const double v[3] = {w[0], w[1], w[2]};
        sum_all(dst, p, v, 3, &div, n);
    } else {
        sum_all(dst, x, w, n_inputs, &div, n);
    }
}

static void delta(float *TVK_RESTRICT dst, const float *TVK_RESTRICT x,
                  const float *TVK_RESTRICT b, size_t n)
{
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        store8(dst + i, 8, _mm256_sub_ps(load8(8, x + i), load8(8, b + i)));
    if (i < n)
        store8(dst + i, n - i,
               _mm256_sub_ps(load8(n - i, x + i), load8(n - i, b + i)));
}

void tvk_avx2_linear(struct tvk_table *t)
{
    t->weighted_sum = weighted_sum;
    t->delta = delta;
}
