/* SPDX-License-Identifier: Apache-2.0 */
/*
 * swap_avx2.c - nearswap and RAM, four elements at a time in fp64.
 */
#include "x86/x86_rows.h"
#include "avx2_util.h"

static void nearswap(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                     const float *TVK_RESTRICT x, double t, size_t n)
{
    const __m256d least = _mm256_set1_pd(1e-6);
    const __m256d one = _mm256_set1_pd(1.0);
    const __m256d sign = _mm256_set1_pd(-0.0);
    const __m256d vt = _mm256_set1_pd(t);

    for (size_t i = 0; i < n; i += 4) {
        const __m256d vb = load4(n - i, b + i);
        const __m256d d = _mm256_sub_pd(load4(n - i, x + i), vb);
        /* max and min give their second operand when one is a NaN: it passes
         * through, as in the reference. */
        const __m256d m = _mm256_max_pd(least, _mm256_andnot_pd(sign, d));
        const __m256d w = _mm256_min_pd(one, _mm256_div_pd(vt, m));
        store4(dst + i, n - i,
               _mm256_cvtpd_ps(_mm256_add_pd(vb, _mm256_mul_pd(w, d))));
    }
}

/* Halving is exact, so two donors need no division. */
TVK_INLINE void ram_two(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                        const float *const *x, const double *alone,
                        double epsilon, size_t n)
{
    const __m256d zero = _mm256_setzero_pd();
    const __m256d sign = _mm256_set1_pd(-0.0);
    const __m256d least = _mm256_set1_pd(epsilon);
    const __m256d half = _mm256_set1_pd(0.5);
    const __m256d alone0 = _mm256_set1_pd(alone[0]);
    const __m256d alone1 = _mm256_set1_pd(alone[1]);
    const float *const x0 = x[0];
    const float *const x1 = x[1];

    for (size_t i = 0; i < n; i += 4) {
        const size_t here = n - i;
        if (i % 16 == 0) {
            tvk_read_ahead(b + i);
            tvk_read_ahead(x0 + i);
            tvk_read_ahead(x1 + i);
        }
        const __m128 base = here >= 4 ? _mm_loadu_ps(b + i)
                                      : _mm_maskload_ps(b + i, first4(here));
        const __m256d vb = _mm256_cvtps_pd(base);
        const __m256d d0 = _mm256_sub_pd(load4(here, x0 + i), vb);
        const __m256d d1 = _mm256_sub_pd(load4(here, x1 + i), vb);
        /* A NaN is active. */
        const __m256d a0 =
            _mm256_cmp_pd(_mm256_andnot_pd(sign, d0), least, _CMP_NLE_UQ);
        const __m256d a1 =
            _mm256_cmp_pd(_mm256_andnot_pd(sign, d1), least, _CMP_NLE_UQ);
        const __m256d mean =
            _mm256_mul_pd(_mm256_add_pd(_mm256_add_pd(zero, d0), d1), half);
        const __m256d change = _mm256_or_pd(
            _mm256_and_pd(_mm256_and_pd(a0, a1), mean),
            _mm256_or_pd(
                _mm256_andnot_pd(a1,
                                 _mm256_and_pd(a0, _mm256_mul_pd(alone0, d0))),
                _mm256_andnot_pd(
                    a0, _mm256_and_pd(a1, _mm256_mul_pd(alone1, d1)))));
        store4(dst + i, here,
               _mm_blendv_ps(base, _mm256_cvtpd_ps(_mm256_add_pd(vb, change)),
                             narrow4(_mm256_or_pd(a0, a1))));
    }
}

TVK_INLINE void ram_of(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                       const float *const *x, const double *alone,
                       size_t n_donors, double epsilon, size_t n)
{
    const __m256d zero = _mm256_setzero_pd();
    const __m256d one = _mm256_set1_pd(1.0);
    const __m256d sign = _mm256_set1_pd(-0.0);
    const __m256d least = _mm256_set1_pd(epsilon);

    for (size_t i = 0; i < n; i += 4) {
        const size_t here = n - i;
        const __m128 base = here >= 4 ? _mm_loadu_ps(b + i)
                                      : _mm_maskload_ps(b + i, first4(here));
        const __m256d vb = _mm256_cvtps_pd(base);
        __m256d sum = zero;
        __m256d single = zero;
        __m256d count = zero;
        for (size_t j = 0; j < n_donors; j++) {
            const __m256d d = _mm256_sub_pd(load4(here, x[j] + i), vb);
            /* A NaN is active. */
            const __m256d active =
                _mm256_cmp_pd(_mm256_andnot_pd(sign, d), least, _CMP_NLE_UQ);
            /* Sums that started at +0 are never -0: adding +0 is no change. */
            sum = _mm256_add_pd(sum, _mm256_and_pd(active, d));
            single = _mm256_blendv_pd(
                single, _mm256_mul_pd(_mm256_set1_pd(alone[j]), d), active);
            count = _mm256_add_pd(count, _mm256_and_pd(active, one));
        }
        const __m256d mean = _mm256_div_pd(sum, _mm256_max_pd(count, one));
        const __m256d change = _mm256_blendv_pd(
            mean, single, _mm256_cmp_pd(count, one, _CMP_EQ_OQ));
        const __m256d any = _mm256_cmp_pd(count, zero, _CMP_GT_OQ);
        store4(dst + i, here,
               _mm_blendv_ps(base, _mm256_cvtpd_ps(_mm256_add_pd(vb, change)),
                             narrow4(any)));
    }
}

static void ram(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                const float *const *x, const double *alone, size_t n_donors,
                double epsilon, size_t n)
{
    if (n_donors == 2)
        ram_two(dst, b, x, alone, epsilon, n);
    else
        ram_of(dst, b, x, alone, n_donors, epsilon, n);
}

void tvk_avx2_swap(struct tvk_table *t)
{
    t->nearswap = nearswap;
    t->ram = ram;
}
