/* SPDX-License-Identifier: Apache-2.0 */
/*
 * swap_avx2.c - nearswap, four elements at a time in fp64.
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

void tvk_avx2_swap(struct tvk_table *t)
{
    t->nearswap = nearswap;
}
