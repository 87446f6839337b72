/* SPDX-License-Identifier: Apache-2.0 */
/*
 * divergence_avx2.c - rows as distributions, four elements at a time in fp64.
 *
 * The steps are those of ref/divergence.c, one by one; the lanes of its sums
 * are four vectors. Tails go through a small buffer and add +0.
 */
#include "x86/x86_rows.h"
#include "avx2_util.h"
#include "ref/divergence.h"

#include <math.h>

TVK_INLINE __m256d set(double v)
{
    return _mm256_set1_pd(v);
}

/* c + x y */
TVK_INLINE __m256d step(double c, __m256d x, __m256d y)
{
    return _mm256_add_pd(set(c), _mm256_mul_pd(x, y));
}

TVK_INLINE __m256d exp4(__m256d x)
{
    const __m256d t = step(TVK_MAGIC, x, set(TVK_LOG2_E));
    const __m256d k = _mm256_sub_pd(t, set(TVK_MAGIC));
    const __m256d r =
        _mm256_sub_pd(_mm256_sub_pd(x, _mm256_mul_pd(k, set(TVK_LN2_HI))),
                      _mm256_mul_pd(k, set(TVK_LN2_LO)));
    const __m256d r2 = _mm256_mul_pd(r, r);
    __m256d even = step(TVK_Q6, r2, set(TVK_Q8));
    __m256d odd = step(TVK_Q7, r2, set(TVK_Q9));
    even = step(TVK_Q4, r2, even);
    odd = step(TVK_Q5, r2, odd);
    even = step(TVK_Q2, r2, even);
    odd = step(TVK_Q3, r2, odd);
    even = step(TVK_Q0, r2, even);
    odd = step(TVK_Q1, r2, odd);
    const __m256d q = _mm256_add_pd(even, _mm256_mul_pd(r, odd));
    const __m256d y =
        _mm256_add_pd(set(1.0), _mm256_add_pd(r, _mm256_mul_pd(r2, q)));
    const __m256i scale = _mm256_slli_epi64(
        _mm256_add_epi64(_mm256_castpd_si256(t),
                         _mm256_set1_epi64x((long long)TVK_BIAS)),
        52);
    const __m256d low = _mm256_cmp_pd(x, set(TVK_EXP_MIN), _CMP_LT_OQ);
    return _mm256_andnot_pd(low, _mm256_mul_pd(y, _mm256_castsi256_pd(scale)));
}

TVK_INLINE __m256d log_of_ratio4(__m256d p, __m256d q)
{
    const __m256i e = _mm256_srli_epi64(
        _mm256_add_epi64(
            _mm256_sub_epi64(_mm256_castpd_si256(p), _mm256_castpd_si256(q)),
            _mm256_set1_epi64x((long long)TVK_RATIO_BIAS)),
        52);
    const __m256i scale = _mm256_slli_epi64(
        _mm256_sub_epi64(_mm256_set1_epi64x((long long)TVK_RATIO_SCALE), e),
        52);
    const __m256d a = _mm256_mul_pd(p, _mm256_castsi256_pd(scale));
    const __m256d s = _mm256_div_pd(_mm256_sub_pd(a, q), _mm256_add_pd(a, q));
    const __m256d z = _mm256_mul_pd(s, s);
    const __m256d z2 = _mm256_mul_pd(z, z);
    const __m256d low =
        step(TVK_P0, z, step(TVK_P1, z, step(TVK_P2, z, set(TVK_P3))));
    const __m256d high = step(TVK_P4, z, step(TVK_P5, z, set(TVK_P6)));
    const __m256d s2 = _mm256_add_pd(s, s);
    /* e has 12 bits: below 2^52 its bits are the mantissa of 2^52 + e. */
    const __m256d k =
        _mm256_sub_pd(_mm256_sub_pd(_mm256_castsi256_pd(_mm256_or_si256(
                                        e, _mm256_castpd_si256(set(0x1p52)))),
                                    set(0x1p52)),
                      set(TVK_RATIO_ZERO));
    const __m256d tail = _mm256_mul_pd(
        s2,
        _mm256_mul_pd(
            z, _mm256_add_pd(low, _mm256_mul_pd(_mm256_mul_pd(z2, z2), high))));
    return _mm256_add_pd(
        _mm256_mul_pd(k, set(TVK_LN2_HI)),
        _mm256_add_pd(s2,
                      _mm256_add_pd(tail, _mm256_mul_pd(k, set(TVK_LN2_LO)))));
}

static float highest(const float *x, size_t n)
{
    __m256 most = _mm256_set1_ps(-INFINITY);
    float lane[8];
    float m = -INFINITY;
    size_t i = 0;

    /* max gives its second operand when the first is a NaN. */
    for (; i + 8 <= n; i += 8)
        most = _mm256_max_ps(_mm256_loadu_ps(x + i), most);
    _mm256_storeu_ps(lane, most);
    for (; i < n; i++)
        m = x[i] > m ? x[i] : m;
    for (unsigned j = 0; j < 8; j++)
        m = lane[j] > m ? lane[j] : m;
    return m + 0.0f;
}

/* The first `count` of four 64-bit lanes. */
TVK_INLINE __m256i first4_64(size_t count)
{
    return _mm256_cvtepi32_epi64(first4(count));
}

static double softmax(double *TVK_RESTRICT e, const float *TVK_RESTRICT x,
                      double most, size_t n)
{
    const __m256d vm = set(most);
    __m256d sum[4];
    size_t i = 0;

    for (size_t v = 0; v < 4; v++)
        sum[v] = _mm256_setzero_pd();
    for (; i + 16 <= n; i += 16) {
        for (size_t v = 0; v < 4; v++) {
            const __m256d y = exp4(_mm256_sub_pd(load4(4, x + i + 4 * v), vm));
            _mm256_storeu_pd(e + i + 4 * v, y);
            sum[v] = _mm256_add_pd(sum[v], y);
        }
    }
    for (size_t v = 0; i < n; v++, i += 4) {
        const __m256i here = first4_64(n - i);
        const __m256d y =
            _mm256_and_pd(exp4(_mm256_sub_pd(load4(n - i, x + i), vm)),
                          _mm256_castsi256_pd(here));
        _mm256_maskstore_pd(e + i, here, y);
        sum[v] = _mm256_add_pd(sum[v], y);
    }
    return lanes_total(sum);
}

static double divergence(const double *e, const double *f, double sum_e,
                         double sum_f, size_t n)
{
    const __m256d by_e = set(1.0 / sum_e);
    const __m256d by_f = set(1.0 / sum_f);
    __m256d sum[4];
    size_t i = 0;

    for (size_t v = 0; v < 4; v++)
        sum[v] = _mm256_setzero_pd();
    for (; i + 16 <= n; i += 16) {
        for (size_t v = 0; v < 4; v++) {
            const size_t at = i + 4 * v;
            const __m256d p = step(TVK_SMALL, _mm256_loadu_pd(e + at), by_e);
            const __m256d q = step(TVK_SMALL, _mm256_loadu_pd(f + at), by_f);
            sum[v] =
                _mm256_add_pd(sum[v], _mm256_mul_pd(p, log_of_ratio4(p, q)));
        }
    }
    for (size_t v = 0; i < n; v++, i += 4) {
        const __m256i here = first4_64(n - i);
        const __m256d p =
            step(TVK_SMALL, _mm256_maskload_pd(e + i, here), by_e);
        const __m256d q =
            step(TVK_SMALL, _mm256_maskload_pd(f + i, here), by_f);
        const __m256d term = _mm256_mul_pd(p, log_of_ratio4(p, q));
        sum[v] = _mm256_add_pd(sum[v],
                               _mm256_and_pd(term, _mm256_castsi256_pd(here)));
    }
    return lanes_total(sum);
}

static void change_by(float *TVK_RESTRICT dst, const float *TVK_RESTRICT x,
                      const float *TVK_RESTRICT b, double by, size_t n)
{
    const __m256d sign = set(-0.0);
    const __m256d factor = set(by);

    for (size_t i = 0; i < n; i += 4) {
        const __m256d d =
            _mm256_sub_pd(load4(n - i, x + i), load4(n - i, b + i));
        store4(
            dst + i, n - i,
            _mm256_cvtpd_ps(_mm256_mul_pd(_mm256_andnot_pd(sign, d), factor)));
    }
}

void tvk_avx2_divergence(struct tvk_table *t)
{
    t->highest = highest;
    t->softmax = softmax;
    t->divergence = divergence;
    t->change_by = change_by;
}
