/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cu_ops.h - the operations of tv/kernels.h as kernels: arguments and phases
 * (private to kernels/cuda; see cu_hd.h).
 *
 * Each is kernels/ref's loop with the iterations given to threads; what ties
 * iterations together is named at the operation. Reductions of a leaf have one
 * block: lane l is thread l and takes the elements l, l + 16, ... in order.
 * Pointers are to device memory.
 */
#ifndef TVK_CU_OPS_H
#define TVK_CU_OPS_H

#include "cu_hd.h"

#include <math.h>

#include <Random123/philox.h>

#define TVK_CU_INF   0x7f800000u
#define TVK_CU_QUIET 0x00400000u
#define TVK_CU_LANES 16u
/* Threads of a block: of element-wise kernels, of a leaf, of the scan. */
#define TVK_CU_BLOCK 256u
#define TVK_CU_LEAF  32u
#define TVK_CU_SCAN  256u

/* ---- conversion (kernels/ref/convert.c) ---------------------------------- */

struct tvk_cu_convert {
    void *dst;
    const void *src;
    uint64_t *n_bad;
    uint64_t n;
};

TVK_HD uint32_t tvk_cu_of_bf16(uint16_t h)
{
    const uint32_t u = (uint32_t)h << 16;
    return (u & 0x7fffffffu) > TVK_CU_INF ? u | TVK_CU_QUIET : u;
}

TVK_HD uint16_t tvk_cu_to_bf16(uint32_t u)
{
    if ((u & 0x7fffffffu) > TVK_CU_INF)
        return (uint16_t)((u | TVK_CU_QUIET) >> 16);
    return (uint16_t)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}

TVK_HD uint32_t tvk_cu_of_f16(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16;
    uint32_t exponent = h >> 10 & 0x1fu;
    uint32_t mantissa = h & 0x3ffu;

    if (exponent == 0x1f)
        return sign | TVK_CU_INF | (mantissa != 0 ? TVK_CU_QUIET : 0u) |
               mantissa << 13;
    if (exponent == 0) {
        if (mantissa == 0)
            return sign;
        exponent = 1;
        while (!(mantissa & 0x400u)) {
            mantissa <<= 1;
            exponent--;
        }
        mantissa &= 0x3ffu;
    }
    return sign | (exponent + 112) << 23 | mantissa << 13;
}

TVK_HD uint16_t tvk_cu_to_f16(uint32_t u)
{
    const uint32_t sign = u >> 16 & 0x8000u;
    const uint32_t a = u & 0x7fffffffu;

    if (a > TVK_CU_INF)
        return (uint16_t)(sign | 0x7e00u | (a >> 13 & 0x3ffu));
    if (a >= 0x477ff000u)
        return (uint16_t)(sign | 0x7c00u);
    if (a >= 0x38800000u)
        return (uint16_t)(sign | (((a + 0xfffu + (a >> 13 & 1u)) >> 13) -
                                  (112u << 10)));
    if (a <= 0x33000000u)
        return (uint16_t)sign;

    const uint32_t shift = 126u - (a >> 23);
    const uint32_t m = (a & 0x7fffffu) | 0x800000u;
    const uint32_t rest = m & ((1u << shift) - 1u);
    const uint32_t half = 1u << (shift - 1);
    uint32_t q = m >> shift;
    if (rest > half || (rest == half && (q & 1u)))
        q++;
    return (uint16_t)(sign | q);
}

/* dst = what `store` makes of u, u = `bits` of x, an element of src; counted
 * where u's exponent is all ones. */
#define TVK_CU_CONVERSION(name, from, to, bits, store, exponent)               \
    TVK_HD void name(const struct tvk_cu_place *at,                            \
                     const struct tvk_cu_convert *a)                           \
    {                                                                          \
        const from *src = (const from *)a->src;                                \
        to *dst = (to *)a->dst;                                                \
        for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at)) {  \
            const from x = src[i];                                             \
            const uint32_t u = bits;                                           \
            dst[i] = store;                                                    \
            if ((u & (exponent)) == (exponent))                                \
                tvk_cu_add64(a->n_bad, 1);                                     \
        }                                                                      \
    }
TVK_CU_CONVERSION(tvk_cu_bf16_to_f32, uint16_t, float, tvk_cu_of_bf16(x),
                  tvk_cu_float(u), TVK_CU_INF)
TVK_CU_CONVERSION(tvk_cu_f16_to_f32, uint16_t, float, tvk_cu_of_f16(x),
                  tvk_cu_float(u), TVK_CU_INF)
TVK_CU_CONVERSION(tvk_cu_f32_to_bf16, float, uint16_t,
                  tvk_cu_to_bf16(tvk_cu_bits(x)), (uint16_t)u, 0x7f80u)
TVK_CU_CONVERSION(tvk_cu_f32_to_f16, float, uint16_t,
                  tvk_cu_to_f16(tvk_cu_bits(x)), (uint16_t)u, 0x7c00u)

/* ---- linear (linear.c) --------------------------------------------------- */

struct tvk_cu_sum {
    float *dst;
    const float *x;  /* input j at x + j * stride */
    const double *w; /* [n_inputs] */
    uint64_t stride, n_inputs, n;
    double divisor;
};

TVK_HD void tvk_cu_weighted_sum(const struct tvk_cu_place *at,
                                const struct tvk_cu_sum *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at)) {
        double sum = a->w[0] * (double)a->x[i];
        for (uint64_t j = 1; j < a->n_inputs; j++)
            sum = sum + a->w[j] * (double)a->x[j * a->stride + i];
        if (a->divisor != 1.0)
            sum = sum / a->divisor;
        a->dst[i] = (float)sum;
    }
}

struct tvk_cu_pair { /* of delta and nearswap */
    float *dst;
    const float *x, *b;
    uint64_t n;
    double t;
};

TVK_HD void tvk_cu_delta(const struct tvk_cu_place *at,
                         const struct tvk_cu_pair *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at))
        a->dst[i] = a->x[i] - a->b[i];
}

/* ---- task vectors (gta.c, swap.c) ---------------------------------------- */

#define TVK_CU_NO_MASK (~(uint64_t)0)

struct tvk_cu_gta {
    float *dst;
    const float *b, *x;          /* donor j at x + j * stride */
    const uint64_t *masks;       /* mask m at masks + m * mask_stride */
    const uint64_t *mask_at;     /* [n_donors] m, or TVK_CU_NO_MASK */
    const double *coef, *weight; /* [n_donors] */
    uint64_t stride, mask_stride, n_donors, n;
    double total, lambda; /* total: the divisor without consensus */
    double least;         /* divisors up to it are 0 */
    int32_t consensus, normalize;
};

/* The scaled, masked difference of donor j; computed again where it is needed
 * again, which costs less than a place for every donor. */
TVK_HD double tvk_cu_donor(const struct tvk_cu_gta *a, uint64_t j, uint64_t i)
{
    const uint64_t m = a->mask_at[j];

    if (m != TVK_CU_NO_MASK &&
        !(a->masks[m * a->mask_stride + (i >> 6)] >> (i & 63) & 1u))
        return 0.0;
    return ((double)a->x[j * a->stride + i] - (double)a->b[i]) * a->coef[j];
}

TVK_HD void tvk_cu_gta_body(const struct tvk_cu_place *at,
                            const struct tvk_cu_gta *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at)) {
        double sum = 0.0;
        for (uint64_t j = 0; j < a->n_donors; j++)
            sum = sum + tvk_cu_donor(a, j, i);

        double m = sum;
        double divisor = a->total;
        if (a->consensus) {
            const int positive = sum >= 0.0;
            m = 0.0;
            divisor = 0.0;
            for (uint64_t j = 0; j < a->n_donors; j++) {
                const double d = tvk_cu_donor(a, j, i);
                if (positive ? d > 0.0 : d < 0.0) {
                    m = m + d;
                    divisor = divisor + a->weight[j];
                }
            }
            if (fabs(divisor) <= a->least)
                divisor = 1.0;
        }
        if (a->normalize)
            m = m / divisor;
        if (a->lambda != 1.0)
            m = m * a->lambda;
        a->dst[i] = m == 0.0 ? a->b[i] : (float)((double)a->b[i] + m);
    }
}

TVK_HD void tvk_cu_nearswap(const struct tvk_cu_place *at,
                            const struct tvk_cu_pair *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at)) {
        const double d = (double)a->x[i] - (double)a->b[i];
        const double m = fabs(d);
        double w = a->t / (m < 1e-6 ? 1e-6 : m);
        w = w > 1.0 ? 1.0 : w;
        a->dst[i] = (float)((double)a->b[i] + w * d);
    }
}

struct tvk_cu_ram {
    float *dst;
    const float *b, *x;  /* donor j at x + j * stride */
    const double *alone; /* [n_donors] */
    uint64_t stride, n_donors, n;
    double epsilon;
};

TVK_HD void tvk_cu_ram_body(const struct tvk_cu_place *at,
                            const struct tvk_cu_ram *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at)) {
        double sum = 0.0;
        double single = 0.0;
        uint64_t count = 0;
        for (uint64_t j = 0; j < a->n_donors; j++) {
            const double d = (double)a->x[j * a->stride + i] - (double)a->b[i];
            if (fabs(d) <= a->epsilon)
                continue;
            sum = sum + d;
            single = a->alone[j] * d;
            count++;
        }
        if (count == 1)
            sum = single;
        else if (count > 1)
            sum = sum / (double)count;
        a->dst[i] = count > 0 ? (float)((double)a->b[i] + sum) : a->b[i];
    }
}

/* ---- exact top-k (topk.c) ------------------------------------------------ */

struct tvk_cu_hist { /* also of count_eq: number == how many are `first` */
    uint32_t *hist;
    uint64_t *number;   /* above the range, equal */
    const float *x, *b; /* b may be NULL */
    uint64_t n;
    uint32_t first, width;
};

TVK_HD uint32_t tvk_cu_magnitude(const float *x, const float *b, uint64_t i)
{
    const float f = b != NULL ? x[i] - b[i] : x[i];
    const uint32_t u = tvk_cu_bits(f) & 0x7fffffffu;
    return u > TVK_CU_INF ? TVK_CU_INF + 1u : u;
}

TVK_HD void tvk_cu_hist_hi(const struct tvk_cu_place *at,
                           const struct tvk_cu_hist *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at))
        tvk_cu_add32(&a->hist[tvk_cu_magnitude(a->x, a->b, i) >> 15], 1);
}

TVK_HD void tvk_cu_hist_lo(const struct tvk_cu_place *at,
                           const struct tvk_cu_hist *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at)) {
        const uint32_t m = tvk_cu_magnitude(a->x, a->b, i);
        if (m >> 15 == a->first)
            tvk_cu_add32(&a->hist[m & 0x7fffu], 1);
    }
}

TVK_HD void tvk_cu_hist_range(const struct tvk_cu_place *at,
                              const struct tvk_cu_hist *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at)) {
        const uint32_t m = tvk_cu_magnitude(a->x, a->b, i);
        if (m < a->first)
            continue;
        if (m - a->first < a->width)
            tvk_cu_add32(&a->hist[m - a->first], 1);
        else
            tvk_cu_add64(a->number, 1);
    }
}

TVK_HD void tvk_cu_count_eq(const struct tvk_cu_place *at,
                            const struct tvk_cu_hist *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at))
        if (tvk_cu_magnitude(a->x, a->b, i) == a->first)
            tvk_cu_add64(a->number, 1);
}

/* Which equal elements are kept depends on how many come before: a word of the
 * mask counts its own (topk_count), one block turns the counts into sums of
 * those before (topk_scan), then every word knows where it starts. */
struct tvk_cu_topk {
    uint64_t *mask;
    uint32_t *counts;         /* [words] */
    uint64_t *kept, *n_equal; /* results */
    const float *x, *b;       /* b may be NULL */
    uint64_t n, seen, limit;
    uint32_t pattern;
};

TVK_HD uint64_t tvk_cu_words(uint64_t n)
{
    return (n + 63) / 64;
}

TVK_HD void tvk_cu_topk_count(const struct tvk_cu_place *at,
                              const struct tvk_cu_topk *a)
{
    const uint64_t words = tvk_cu_words(a->n);

    for (uint64_t w = tvk_cu_first(at); w < words; w += tvk_cu_step(at)) {
        const uint64_t end = a->n - 64 * w < 64 ? a->n : 64 * w + 64;
        uint32_t count = 0;
        for (uint64_t i = 64 * w; i < end; i++)
            count += tvk_cu_magnitude(a->x, a->b, i) == a->pattern;
        a->counts[w] = count;
    }
}

/* One block. Its shared memory: a number for each thread. */
TVK_HD void tvk_cu_scan_part(const struct tvk_cu_place *at, uint64_t words,
                             uint64_t *from, uint64_t *to)
{
    const uint64_t each = (words + at->n_threads - 1) / at->n_threads;

    *from = each * at->thread < words ? each * at->thread : words;
    *to = *from + each < words ? *from + each : words;
}

TVK_HD void tvk_cu_topk_scan0(const struct tvk_cu_place *at, uint32_t *shared,
                              const struct tvk_cu_topk *a)
{
    uint64_t from = 0, to = 0;
    uint32_t sum = 0;

    tvk_cu_scan_part(at, tvk_cu_words(a->n), &from, &to);
    for (uint64_t w = from; w < to; w++)
        sum += a->counts[w];
    shared[at->thread] = sum;
}

TVK_HD void tvk_cu_topk_scan1(const struct tvk_cu_place *at, uint32_t *shared,
                              const struct tvk_cu_topk *a)
{
    uint32_t sum = 0;

    if (at->thread != 0)
        return;
    for (uint32_t t = 0; t < at->n_threads; t++) {
        const uint32_t own = shared[t];
        shared[t] = sum;
        sum += own;
    }
    *a->n_equal = sum;
}

TVK_HD void tvk_cu_topk_scan2(const struct tvk_cu_place *at, uint32_t *shared,
                              const struct tvk_cu_topk *a)
{
    uint64_t from = 0, to = 0;
    uint32_t sum = shared[at->thread];

    tvk_cu_scan_part(at, tvk_cu_words(a->n), &from, &to);
    for (uint64_t w = from; w < to; w++) {
        const uint32_t own = a->counts[w];
        a->counts[w] = sum;
        sum += own;
    }
}

TVK_HD void tvk_cu_topk_mask(const struct tvk_cu_place *at,
                             const struct tvk_cu_topk *a)
{
    const uint64_t words = tvk_cu_words(a->n);

    for (uint64_t w = tvk_cu_first(at); w < words; w += tvk_cu_step(at)) {
        const uint64_t end = a->n - 64 * w < 64 ? a->n : 64 * w + 64;
        uint64_t seen = a->seen + a->counts[w];
        uint64_t bits = 0;
        uint64_t kept = 0;
        for (uint64_t i = 64 * w; i < end; i++) {
            const uint32_t m = tvk_cu_magnitude(a->x, a->b, i);
            int keep = m > a->pattern;
            if (m == a->pattern) {
                keep = seen < a->limit;
                seen++;
            }
            if (keep && m != 0) {
                bits |= (uint64_t)1 << (i & 63);
                kept++;
            }
        }
        a->mask[w] = bits;
        tvk_cu_add64(a->kept, kept);
    }
}

/* ---- random masks (philox.c) --------------------------------------------- */

struct tvk_cu_philox {
    uint64_t *mask;
    uint32_t *words;
    uint64_t *kept;
    uint64_t start, key, name_hash, threshold, n;
};

/* Words of the elements 4 * group .. 4 * group + 3. */
TVK_HD philox4x32_ctr_t tvk_cu_random(const struct tvk_cu_philox *a,
                                      uint64_t group)
{
    philox4x32_key_t k;
    philox4x32_ctr_t c;

    k.v[0] = (uint32_t)a->key;
    k.v[1] = (uint32_t)(a->key >> 32);
    c.v[0] = (uint32_t)group;
    c.v[1] = (uint32_t)(group >> 32);
    c.v[2] = (uint32_t)a->name_hash;
    c.v[3] = (uint32_t)(a->name_hash >> 32);
    return philox4x32_R(10, c, k);
}

/* A thread makes a word of the mask: start is a multiple of 64. */
TVK_HD void tvk_cu_philox_mask(const struct tvk_cu_place *at,
                               const struct tvk_cu_philox *a)
{
    const uint64_t words = tvk_cu_words(a->n);

    for (uint64_t w = tvk_cu_first(at); w < words; w += tvk_cu_step(at)) {
        const uint64_t left = a->n - 64 * w < 64 ? a->n - 64 * w : 64;
        uint64_t bits = 0;
        uint64_t kept = 0;
        for (uint64_t i = 0; i < left; i += 4) {
            const philox4x32_ctr_t r =
                tvk_cu_random(a, (a->start + 64 * w + i) >> 2);
            for (uint64_t q = 0; q < 4 && i + q < left; q++)
                if (r.v[q] < a->threshold) {
                    bits |= (uint64_t)1 << (i + q);
                    kept++;
                }
        }
        a->mask[w] = bits;
        tvk_cu_add64(a->kept, kept);
    }
}

/* A thread makes the up to four elements of one counter. */
TVK_HD void tvk_cu_philox_words(const struct tvk_cu_place *at,
                                const struct tvk_cu_philox *a)
{
    const uint64_t end = a->start + a->n;
    const uint64_t groups = (end + 3) / 4 - a->start / 4;

    for (uint64_t g = tvk_cu_first(at); g < groups; g += tvk_cu_step(at)) {
        const uint64_t group = a->start / 4 + g;
        const philox4x32_ctr_t r = tvk_cu_random(a, group);
        for (uint64_t q = 0; q < 4; q++) {
            const uint64_t e = 4 * group + q;
            if (e >= a->start && e < end)
                a->words[e - a->start] = r.v[q];
        }
    }
}

/* ---- reductions (dots.c, stats.c) ---------------------------------------- */

struct tvk_cu_reduce {
    double *out; /* [3] of dots, [1] of abs_sum */
    struct tvk_cu_stats *stats;
    uint64_t *n_bad;
    const float *a, *b;   /* b of abs_sum may be NULL */
    const uint64_t *mask; /* of abs_sum, may be NULL */
    uint64_t n;
};
struct tvk_cu_stats {
    double sum, sum_sq;
    float min, max;
    uint64_t n_nonfinite, n_zero;
};
struct tvk_cu_lanes { /* shared memory of a block */
    double v[3][TVK_CU_LANES];
    float min[TVK_CU_LANES], max[TVK_CU_LANES];
    uint32_t n_nonfinite[TVK_CU_LANES], n_zero[TVK_CU_LANES];
};

/* As tvk_lanes_sum in kernels/ref/lanes.h. */
TVK_HD double tvk_cu_lanes_sum(double *lane)
{
    for (unsigned width = TVK_CU_LANES / 2; width > 0; width /= 2)
        for (unsigned i = 0; i < width; i++)
            lane[i] = lane[i] + lane[i + width];
    return lane[0];
}

TVK_HD void tvk_cu_dots0(const struct tvk_cu_place *at, struct tvk_cu_lanes *s,
                         const struct tvk_cu_reduce *a)
{
    double aa = 0.0, bb = 0.0, ab = 0.0;

    if (at->thread >= TVK_CU_LANES)
        return;
    for (uint64_t i = at->thread; i < a->n; i += TVK_CU_LANES) {
        const double p = (double)a->a[i];
        const double q = (double)a->b[i];
        aa += p * p;
        bb += q * q;
        ab += p * q;
    }
    s->v[0][at->thread] = aa;
    s->v[1][at->thread] = bb;
    s->v[2][at->thread] = ab;
}

TVK_HD void tvk_cu_dots1(const struct tvk_cu_place *at, struct tvk_cu_lanes *s,
                         const struct tvk_cu_reduce *a)
{
    if (at->thread < 3)
        a->out[at->thread] = tvk_cu_lanes_sum(s->v[at->thread]);
}

TVK_HD void tvk_cu_abs_sum0(const struct tvk_cu_place *at,
                            struct tvk_cu_lanes *s,
                            const struct tvk_cu_reduce *a)
{
    double sum = 0.0;

    if (at->thread >= TVK_CU_LANES)
        return;
    for (uint64_t i = at->thread; i < a->n; i += TVK_CU_LANES) {
        if (a->mask != NULL && !(a->mask[i >> 6] >> (i & 63) & 1u))
            continue;
        const float d = a->b != NULL ? a->a[i] - a->b[i] : a->a[i];
        sum += (double)fabsf(d);
    }
    s->v[0][at->thread] = sum;
}

TVK_HD void tvk_cu_abs_sum1(const struct tvk_cu_place *at,
                            struct tvk_cu_lanes *s,
                            const struct tvk_cu_reduce *a)
{
    if (at->thread == 0)
        a->out[0] = tvk_cu_lanes_sum(s->v[0]);
}

TVK_HD int tvk_cu_is_finite(float x)
{
    return (tvk_cu_bits(x) & TVK_CU_INF) != TVK_CU_INF;
}

TVK_HD void tvk_cu_count_nonfinite(const struct tvk_cu_place *at,
                                   const struct tvk_cu_reduce *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at))
        if (!tvk_cu_is_finite(a->a[i]))
            tvk_cu_add64(a->n_bad, 1);
}

TVK_HD void tvk_cu_stats0(const struct tvk_cu_place *at, struct tvk_cu_lanes *s,
                          const struct tvk_cu_reduce *a)
{
    double sum = 0.0, sum_sq = 0.0;
    float min = tvk_cu_float(TVK_CU_INF);
    float max = tvk_cu_float(TVK_CU_INF | 0x80000000u);
    uint32_t n_nonfinite = 0, n_zero = 0;

    if (at->thread >= TVK_CU_LANES)
        return;
    for (uint64_t i = at->thread; i < a->n; i += TVK_CU_LANES) {
        const float x = a->a[i];
        if (!tvk_cu_is_finite(x)) {
            n_nonfinite++;
            continue;
        }
        const double v = (double)x;
        sum += v;
        sum_sq += v * v;
        min = x < min ? x : min;
        max = x > max ? x : max;
        n_zero += x == 0.0f;
    }
    s->v[0][at->thread] = sum;
    s->v[1][at->thread] = sum_sq;
    s->min[at->thread] = min;
    s->max[at->thread] = max;
    s->n_nonfinite[at->thread] = n_nonfinite;
    s->n_zero[at->thread] = n_zero;
}

TVK_HD void tvk_cu_stats1(const struct tvk_cu_place *at, struct tvk_cu_lanes *s,
                          const struct tvk_cu_reduce *a)
{
    if (at->thread != 0)
        return;
    float min = s->min[0];
    float max = s->max[0];
    uint64_t n_nonfinite = 0, n_zero = 0;
    for (unsigned i = 0; i < TVK_CU_LANES; i++) {
        min = s->min[i] < min ? s->min[i] : min;
        max = s->max[i] > max ? s->max[i] : max;
        n_nonfinite += s->n_nonfinite[i];
        n_zero += s->n_zero[i];
    }
    a->stats->sum = tvk_cu_lanes_sum(s->v[0]);
    a->stats->sum_sq = tvk_cu_lanes_sum(s->v[1]);
    /* Which zero wins would depend on the order of comparison: +0 it is. */
    a->stats->min = min + 0.0f;
    a->stats->max = max + 0.0f;
    a->stats->n_nonfinite = n_nonfinite;
    a->stats->n_zero = n_zero;
}

/* ---- low rank (lowrank.c) ------------------------------------------------ */

struct tvk_cu_lowrank {
    float *dst;
    const float *y;
    const float *l, *r; /* l: from the row of the first element on */
    double scale;
    uint64_t rank, cols;
    uint64_t start; /* of the first element in its row: below cols */
    uint64_t n;
};

TVK_HD void tvk_cu_lowrank_add(const struct tvk_cu_place *at,
                               const struct tvk_cu_lowrank *a)
{
    for (uint64_t i = tvk_cu_first(at); i < a->n; i += tvk_cu_step(at)) {
        const uint64_t row = (a->start + i) / a->cols;
        const uint64_t col = (a->start + i) % a->cols;
        double sum = 0.0;
        for (uint64_t k = 0; k < a->rank; k++)
            sum = sum + (double)a->l[row * a->rank + k] *
                            (double)a->r[k * a->cols + col];
        a->dst[i] = (float)((double)a->y[i] + a->scale * sum);
    }
}

/* ---- all of them --------------------------------------------------------- */

/* One phase: ELEMENTS(name, arguments, body). A block with shared memory:
 * BLOCKS2(name, arguments, shared, phase, phase), BLOCKS3. */
#define TVK_CU_KERNELS(ELEMENTS, BLOCKS2, BLOCKS3)                             \
    ELEMENTS(tv_bf16_to_f32, tvk_cu_convert, tvk_cu_bf16_to_f32)               \
    ELEMENTS(tv_f16_to_f32, tvk_cu_convert, tvk_cu_f16_to_f32)                 \
    ELEMENTS(tv_f32_to_bf16, tvk_cu_convert, tvk_cu_f32_to_bf16)               \
    ELEMENTS(tv_f32_to_f16, tvk_cu_convert, tvk_cu_f32_to_f16)                 \
    ELEMENTS(tv_weighted_sum, tvk_cu_sum, tvk_cu_weighted_sum)                 \
    ELEMENTS(tv_delta, tvk_cu_pair, tvk_cu_delta)                              \
    ELEMENTS(tv_gta, tvk_cu_gta, tvk_cu_gta_body)                              \
    ELEMENTS(tv_nearswap, tvk_cu_pair, tvk_cu_nearswap)                        \
    ELEMENTS(tv_ram, tvk_cu_ram, tvk_cu_ram_body)                              \
    ELEMENTS(tv_hist_hi, tvk_cu_hist, tvk_cu_hist_hi)                          \
    ELEMENTS(tv_hist_lo, tvk_cu_hist, tvk_cu_hist_lo)                          \
    ELEMENTS(tv_hist_range, tvk_cu_hist, tvk_cu_hist_range)                    \
    ELEMENTS(tv_count_eq, tvk_cu_hist, tvk_cu_count_eq)                        \
    ELEMENTS(tv_topk_count, tvk_cu_topk, tvk_cu_topk_count)                    \
    BLOCKS3(tv_topk_scan, tvk_cu_topk, uint32_t, TVK_CU_SCAN,                  \
            tvk_cu_topk_scan0, tvk_cu_topk_scan1, tvk_cu_topk_scan2)           \
    ELEMENTS(tv_topk_mask, tvk_cu_topk, tvk_cu_topk_mask)                      \
    ELEMENTS(tv_philox_mask, tvk_cu_philox, tvk_cu_philox_mask)                \
    ELEMENTS(tv_philox_words, tvk_cu_philox, tvk_cu_philox_words)              \
    BLOCKS2(tv_dots, tvk_cu_reduce, struct tvk_cu_lanes, 1, tvk_cu_dots0,      \
            tvk_cu_dots1)                                                      \
    BLOCKS2(tv_abs_sum, tvk_cu_reduce, struct tvk_cu_lanes, 1,                 \
            tvk_cu_abs_sum0, tvk_cu_abs_sum1)                                  \
    ELEMENTS(tv_count_nonfinite, tvk_cu_reduce, tvk_cu_count_nonfinite)        \
    BLOCKS2(tv_stats, tvk_cu_reduce, struct tvk_cu_lanes, 1, tvk_cu_stats0,    \
            tvk_cu_stats1)                                                     \
    ELEMENTS(tv_lowrank_add, tvk_cu_lowrank, tvk_cu_lowrank_add)

#endif
