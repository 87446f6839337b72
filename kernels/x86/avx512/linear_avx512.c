/* SPDX-License-Identifier: Apache-2.0 */
/*
 * linear_avx512.c - weighted sums, 32 elements at a time in four fp64 vectors.
 */
#include "x86/x86_rows.h"
#include "avx512_util.h"

#include <assert.h>

#define BLOCK 4u /* vectors */

TVK_INLINE __m512d finish(__m512d sum, const struct tvk_divide *div)
{
    if (div->is_none)
        return sum;
    if (div->is_reciprocal)
        return _mm512_mul_pd(sum, _mm512_set1_pd(div->by));
    return _mm512_div_pd(sum, _mm512_set1_pd(div->by));
}

/* `vectors` vectors of 8, the last one cut to `lanes`. */
TVK_INLINE void sum_block(float *TVK_RESTRICT dst, const float *const *x,
                          const double *w, size_t n_inputs,
                          const struct tvk_divide *div, size_t i,
                          size_t vectors, __mmask8 lanes)
{
    __m512d sum[BLOCK];

    for (size_t v = 0; v < vectors; v++)
        sum[v] =
            _mm512_mul_pd(_mm512_set1_pd(w[0]), load8(lanes, x[0] + i + 8 * v));
    for (size_t j = 1; j < n_inputs; j++) {
        const __m512d wj = _mm512_set1_pd(w[j]);
        const float *const xj = x[j] + i;
        for (size_t v = 0; v < vectors; v++)
            sum[v] = _mm512_add_pd(sum[v],
                                   _mm512_mul_pd(wj, load8(lanes, xj + 8 * v)));
    }
    for (size_t v = 0; v < vectors; v++)
        _mm256_mask_storeu_ps(dst + i + 8 * v, lanes,
                              _mm512_cvtpd_ps(finish(sum[v], div)));
}

TVK_INLINE void sum_all(float *TVK_RESTRICT dst, const float *const *x,
                        const double *w, size_t n_inputs,
                        const struct tvk_divide *div, size_t n)
{
    size_t i = 0;

    for (; i + 8 * BLOCK <= n; i += 8 * BLOCK)
        sum_block(dst, x, w, n_inputs, div, i, BLOCK, 0xff);
    for (; i + 8 <= n; i += 8)
        sum_block(dst, x, w, n_inputs, div, i, 1, 0xff);
    if (i < n)
        sum_block(dst, x, w, n_inputs, div, i, 1, lanes8(i, n));
}

static void weighted_sum(float *TVK_RESTRICT dst, const float *const *x,
                         const double *w, size_t n_inputs, double divisor,
                         size_t n)
{
    const struct tvk_divide div = tvk_divide_by(divisor);

    assert(n_inputs >= 1);
    if (n_inputs == 2)
        sum_all(dst, x, w, 2, &div, n);
    else
        sum_all(dst, x, w, n_inputs, &div, n);
}

static void delta(float *TVK_RESTRICT dst, const float *TVK_RESTRICT x,
                  const float *TVK_RESTRICT b, size_t n)
{
    for (size_t i = 0; i < n; i += 16) {
        const __mmask16 lanes = lanes16(i, n);
        const __m512 d = _mm512_sub_ps(_mm512_maskz_loadu_ps(lanes, x + i),
                                       _mm512_maskz_loadu_ps(lanes, b + i));
        _mm512_mask_storeu_ps(dst + i, lanes, d);
    }
}

void tvk_avx512_linear(struct tvk_table *t)
{
    t->weighted_sum = weighted_sum;
    t->delta = delta;
}
