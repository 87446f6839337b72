/* SPDX-License-Identifier: Apache-2.0 */
/*
 * swap_avx512.c - nearswap and RAM, eight elements at a time in fp64.
 */
#include "x86/x86_rows.h"
#include "avx512_util.h"

TVK_INLINE void store8(float *dst, __mmask8 lanes, __m512d v)
{
    _mm256_mask_storeu_ps(dst, lanes, _mm512_cvtpd_ps(v));
}

TVK_INLINE void nearswap8(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                          const float *TVK_RESTRICT x, __m512d t,
                          __mmask8 lanes)
{
    const __m512d one = _mm512_set1_pd(1.0);
    const __m512d vb = load8(lanes, b);
    const __m512d d = _mm512_sub_pd(load8(lanes, x), vb);
    /* max and min give their second operand when one is a NaN: it passes
     * through, as in the reference. */
    const __m512d m = _mm512_max_pd(_mm512_set1_pd(1e-6), _mm512_abs_pd(d));
    const __m512d w = _mm512_min_pd(one, _mm512_div_pd(t, m));
    store8(dst, lanes, _mm512_add_pd(vb, _mm512_mul_pd(w, d)));
}

static void nearswap(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                     const float *TVK_RESTRICT x, double t, size_t n)
{
    const __m512d vt = _mm512_set1_pd(t);
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        nearswap8(dst + i, b + i, x + i, vt, 0xff);
    if (i < n)
        nearswap8(dst + i, b + i, x + i, vt, lanes8(i, n));
}

/* Which changes count: larger than epsilon, or a NaN. */
TVK_INLINE __mmask8 is_active(__m512d d, __m512d epsilon)
{
    return _mm512_cmp_pd_mask(_mm512_abs_pd(d), epsilon, _CMP_NLE_UQ);
}

/* Halving is exact, so two donors need no division. */
TVK_INLINE __m512d change_of_two(const double *alone, __m512d d0, __m512d d1,
                                 __m512d epsilon, __mmask8 *any)
{
    const __mmask8 a0 = is_active(d0, epsilon);
    const __mmask8 a1 = is_active(d1, epsilon);
    __m512d change =
        _mm512_mul_pd(_mm512_add_pd(_mm512_add_pd(_mm512_setzero_pd(), d0), d1),
                      _mm512_set1_pd(0.5));

    change = _mm512_mask_mul_pd(change, (__mmask8)(a0 & ~a1),
                                _mm512_set1_pd(alone[0]), d0);
    *any = a0 | a1;
    return _mm512_mask_mul_pd(change, (__mmask8)(a1 & ~a0),
                              _mm512_set1_pd(alone[1]), d1);
}

TVK_INLINE __m512d change_of_all(const float *const *x, const double *alone,
                                 size_t n_donors, size_t i, __mmask8 lanes,
                                 __m512d b, __m512d epsilon, __mmask8 *any)
{
    const __m512d one = _mm512_set1_pd(1.0);
    __m512d sum = _mm512_setzero_pd();
    __m512d single = sum;
    __m512d count = sum;

    for (size_t j = 0; j < n_donors; j++) {
        const __m512d d = _mm512_sub_pd(load8(lanes, x[j] + i), b);
        const __mmask8 active = is_active(d, epsilon);
        sum = _mm512_mask_add_pd(sum, active, sum, d);
        single =
            _mm512_mask_mul_pd(single, active, _mm512_set1_pd(alone[j]), d);
        count = _mm512_mask_add_pd(count, active, count, one);
    }
    *any = _mm512_cmp_pd_mask(count, _mm512_setzero_pd(), _CMP_GT_OQ);
    return _mm512_mask_mov_pd(_mm512_div_pd(sum, _mm512_max_pd(count, one)),
                              _mm512_cmp_pd_mask(count, one, _CMP_EQ_OQ),
                              single);
}

TVK_INLINE void ram8(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                     const float *const *x, const double *alone,
                     size_t n_donors, __m512d epsilon, size_t i, __mmask8 lanes)
{
    const __m256 base = _mm256_maskz_loadu_ps(lanes, b + i);
    const __m512d vb = _mm512_cvtps_pd(base);
    __mmask8 any = 0;
    __m512d change;

    if (n_donors == 2)
        change = change_of_two(alone, _mm512_sub_pd(load8(lanes, x[0] + i), vb),
                               _mm512_sub_pd(load8(lanes, x[1] + i), vb),
                               epsilon, &any);
    else
        change = change_of_all(x, alone, n_donors, i, lanes, vb, epsilon, &any);
    /* Where nothing changes the base keeps its bits. */
    const __m256 r = _mm512_cvtpd_ps(_mm512_add_pd(vb, change));
    _mm256_mask_storeu_ps(dst + i, lanes, _mm256_mask_mov_ps(base, any, r));
}

TVK_INLINE void ram_all(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                        const float *const *x, const double *alone,
                        size_t n_donors, double epsilon, size_t n)
{
    const __m512d least = _mm512_set1_pd(epsilon);
    size_t i = 0;

    for (; i + 8 <= n; i += 8)
        ram8(dst, b, x, alone, n_donors, least, i, 0xff);
    if (i < n)
        ram8(dst, b, x, alone, n_donors, least, i, lanes8(i, n));
}

static void ram(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                const float *const *x, const double *alone, size_t n_donors,
                double epsilon, size_t n)
{
    if (n_donors == 2)
        ram_all(dst, b, x, alone, 2, epsilon, n);
    else
        ram_all(dst, b, x, alone, n_donors, epsilon, n);
}

void tvk_avx512_swap(struct tvk_table *t)
{
    t->nearswap = nearswap;
    t->ram = ram;
}
