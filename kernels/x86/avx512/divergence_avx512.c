/* SPDX-License-Identifier: Apache-2.0 */
/*
 * divergence_avx512.c - rows as distributions, eight elements at a time in
 * fp64.
 *
 * The steps are those of ref/divergence.c, one by one; the lanes of its sums
 * are two vectors. Tails are masked and add +0.
 */
#include "x86/x86_rows.h"
#include "avx512_util.h"
#include "ref/divergence.h"

#include <math.h>

TVK_INLINE __m512d set(double v)
{
    return _mm512_set1_pd(v);
}

/* c + x y */
TVK_INLINE __m512d step(double c, __m512d x, __m512d y)
{
    return _mm512_add_pd(set(c), _mm512_mul_pd(x, y));
}

TVK_INLINE __m512d exp8(__m512d x)
{
    const __m512d t = step(TVK_MAGIC, x, set(TVK_LOG2_E));
    const __m512d k = _mm512_sub_pd(t, set(TVK_MAGIC));
    const __m512d r =
        _mm512_sub_pd(_mm512_sub_pd(x, _mm512_mul_pd(k, set(TVK_LN2_HI))),
                      _mm512_mul_pd(k, set(TVK_LN2_LO)));
    const __m512d r2 = _mm512_mul_pd(r, r);
    __m512d even = step(TVK_Q6, r2, set(TVK_Q8));
    __m512d odd = step(TVK_Q7, r2, set(TVK_Q9));
    even = step(TVK_Q4, r2, even);
    odd = step(TVK_Q5, r2, odd);
    even = step(TVK_Q2, r2, even);
    odd = step(TVK_Q3, r2, odd);
    even = step(TVK_Q0, r2, even);
    odd = step(TVK_Q1, r2, odd);
    const __m512d q = _mm512_add_pd(even, _mm512_mul_pd(r, odd));
    const __m512d y =
        _mm512_add_pd(set(1.0), _mm512_add_pd(r, _mm512_mul_pd(r2, q)));
    const __m512i scale = _mm512_slli_epi64(
        _mm512_add_epi64(_mm512_castpd_si512(t),
                         _mm512_set1_epi64((long long)TVK_BIAS)),
        52);
    /* A NaN is not low: it passes through. */
    const __mmask8 kept = _mm512_cmp_pd_mask(x, set(TVK_EXP_MIN), _CMP_NLT_UQ);
    return _mm512_maskz_mul_pd(kept, y, _mm512_castsi512_pd(scale));
}

TVK_INLINE __m512d log_of_ratio8(__m512d p, __m512d q)
{
    const __m512i e = _mm512_srli_epi64(
        _mm512_add_epi64(
            _mm512_sub_epi64(_mm512_castpd_si512(p), _mm512_castpd_si512(q)),
            _mm512_set1_epi64((long long)TVK_RATIO_BIAS)),
        52);
    const __m512i scale = _mm512_slli_epi64(
        _mm512_sub_epi64(_mm512_set1_epi64((long long)TVK_RATIO_SCALE), e), 52);
    const __m512d a = _mm512_mul_pd(p, _mm512_castsi512_pd(scale));
    const __m512d s = _mm512_div_pd(_mm512_sub_pd(a, q), _mm512_add_pd(a, q));
    const __m512d z = _mm512_mul_pd(s, s);
    const __m512d z2 = _mm512_mul_pd(z, z);
    const __m512d low =
        step(TVK_P0, z, step(TVK_P1, z, step(TVK_P2, z, set(TVK_P3))));
    const __m512d high = step(TVK_P4, z, step(TVK_P5, z, set(TVK_P6)));
    const __m512d s2 = _mm512_add_pd(s, s);
    const __m512d k = _mm512_sub_pd(_mm512_cvtepu64_pd(e), set(TVK_RATIO_ZERO));
    const __m512d tail = _mm512_mul_pd(
        s2,
        _mm512_mul_pd(
            z, _mm512_add_pd(low, _mm512_mul_pd(_mm512_mul_pd(z2, z2), high))));
    return _mm512_add_pd(
        _mm512_mul_pd(k, set(TVK_LN2_HI)),
        _mm512_add_pd(s2,
                      _mm512_add_pd(tail, _mm512_mul_pd(k, set(TVK_LN2_LO)))));
}

static float highest(const float *x, size_t n)
{
    __m512 most = _mm512_set1_ps(-INFINITY);
    float lane[16];
    float m = -INFINITY;
    size_t i = 0;

    /* max gives its second operand when the first is a NaN. */
    for (; i + 16 <= n; i += 16)
        most = _mm512_max_ps(_mm512_loadu_ps(x + i), most);
    _mm512_storeu_ps(lane, most);
    for (; i < n; i++)
        m = x[i] > m ? x[i] : m;
    for (unsigned j = 0; j < 16; j++)
        m = lane[j] > m ? lane[j] : m;
    return m + 0.0f;
}

/* e = exp(x - most); absent lanes are not stored and give 0. */
TVK_INLINE __m512d exponential8(double *TVK_RESTRICT e,
                                const float *TVK_RESTRICT x, __m512d most,
                                __mmask8 lanes)
{
    const __m512d y = exp8(_mm512_sub_pd(load8(lanes, x), most));

    _mm512_mask_storeu_pd(e, lanes, y);
    return _mm512_maskz_mov_pd(lanes, y);
}

static double softmax(double *TVK_RESTRICT e, const float *TVK_RESTRICT x,
                      double most, size_t n)
{
    const __m512d vm = set(most);
    __m512d lo = _mm512_setzero_pd();
    __m512d hi = lo;
    size_t i = 0;

    for (; i + 16 <= n; i += 16) {
        lo = _mm512_add_pd(lo, exponential8(e + i, x + i, vm, 0xff));
        hi = _mm512_add_pd(hi, exponential8(e + i + 8, x + i + 8, vm, 0xff));
    }
    if (i < n)
        lo = _mm512_add_pd(lo, exponential8(e + i, x + i, vm, lanes8(i, n)));
    if (i + 8 < n)
        hi = _mm512_add_pd(
            hi, exponential8(e + i + 8, x + i + 8, vm, lanes8(i + 8, n)));
    return lanes_total(lo, hi);
}

TVK_INLINE __m512d term8(const double *e, const double *f, __m512d by_e,
                         __m512d by_f, __mmask8 lanes)
{
    const __m512d p = step(TVK_SMALL, _mm512_maskz_loadu_pd(lanes, e), by_e);
    const __m512d q = step(TVK_SMALL, _mm512_maskz_loadu_pd(lanes, f), by_f);

    return _mm512_maskz_mul_pd(lanes, p, log_of_ratio8(p, q));
}

static double divergence(const double *e, const double *f, double sum_e,
                         double sum_f, size_t n)
{
    const __m512d by_e = set(1.0 / sum_e);
    const __m512d by_f = set(1.0 / sum_f);
    __m512d lo = _mm512_setzero_pd();
    __m512d hi = lo;
    size_t i = 0;

    for (; i + 16 <= n; i += 16) {
        lo = _mm512_add_pd(lo, term8(e + i, f + i, by_e, by_f, 0xff));
        hi = _mm512_add_pd(hi, term8(e + i + 8, f + i + 8, by_e, by_f, 0xff));
    }
    if (i < n)
        lo = _mm512_add_pd(lo, term8(e + i, f + i, by_e, by_f, lanes8(i, n)));
    if (i + 8 < n)
        hi = _mm512_add_pd(
            hi, term8(e + i + 8, f + i + 8, by_e, by_f, lanes8(i + 8, n)));
    return lanes_total(lo, hi);
}

static void change_by(float *TVK_RESTRICT dst, const float *TVK_RESTRICT x,
                      const float *TVK_RESTRICT b, double by, size_t n)
{
    const __m512d factor = set(by);

    for (size_t i = 0; i < n; i += 8) {
        const __mmask8 lanes = lanes8(i, n);
        const __m512d d =
            _mm512_sub_pd(load8(lanes, x + i), load8(lanes, b + i));
        _mm256_mask_storeu_ps(
            dst + i, lanes,
            _mm512_cvtpd_ps(_mm512_mul_pd(_mm512_abs_pd(d), factor)));
    }
}

void tvk_avx512_divergence(struct tvk_table *t)
{
    t->highest = highest;
    t->softmax = softmax;
    t->divergence = divergence;
    t->change_by = change_by;
}
