/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_ops.c - what each operation of the reference row means.
 *
 * Cases worked out by hand, naive oracles in long double, and top-k from the
 * two histograms to the mask against a sort. The other rows are held against
 * the reference in test_variants.c.
 */
#include "test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "rng.h"
#include "tv/kernels.h"
#include "ulp.h"

static const struct tvk_table *k;

static int row_open(void **state)
{
    (void)state;
    k = tvk_table_for(TVK_REF);
    return 0;
}

static void assert_floats(const float *got, const float *want, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (memcmp(got + i, want + i, sizeof(*got)) != 0)
            fail_msg("element %zu is %a, expected %a", i, (double)got[i],
                     (double)want[i]);
}

/* ---- linear ---- */

static void test_weighted_sum(void **state)
{
    (void)state;
    const float a[3] = {1.0f, 2.0f, -3.0f};
    const float b[3] = {5.0f, 6.0f, 7.0f};
    const float *const x[2] = {a, b};
    const double w[2] = {0.25, 0.75};
    float y[3];

    k->weighted_sum(y, x, w, 2, 1.0, 3);
    assert_floats(y, (const float[]){4.0f, 5.0f, 4.5f}, 3);
    k->weighted_sum(y, x, w, 2, 0.5, 3);
    assert_floats(y, (const float[]){8.0f, 10.0f, 9.0f}, 3);
    k->weighted_sum(y, x, w, 1, 1.0, 3);
    assert_floats(y, (const float[]){0.25f, 0.5f, -0.75f}, 3);
    k->weighted_sum(y, x, w, 2, 1.0, 0);
    assert_floats(y, (const float[]){0.25f, 0.5f, -0.75f}, 3);
}

/* In recipe order, in fp64, rounded once. */
static void test_weighted_sum_order(void **state)
{
    (void)state;
    const float big[1] = {1e20f};
    const float one[1] = {1.0f};
    const float *const lost[3] = {big, one, big};
    const float *const kept[3] = {big, big, one};
    const double w[3] = {1.0, 1.0, -1.0};
    const double v[3] = {1.0, -1.0, 1.0};
    float y[1];

    k->weighted_sum(y, lost, w, 3, 1.0, 1);
    assert_floats(y, (const float[]){0.0f}, 1);
    k->weighted_sum(y, kept, v, 3, 1.0, 1);
    assert_floats(y, (const float[]){1.0f}, 1);

    /* fp32 accumulation would lose the 1 in 2^24 + 1. */
    const float p24[1] = {16777216.0f};
    const float *const near[3] = {p24, one, p24};
    k->weighted_sum(y, near, w, 3, 1.0, 1);
    assert_floats(y, (const float[]){1.0f}, 1);
}

/* One input of weight one is the input, subnormals and -0 included. */
static void test_weighted_sum_identity(void **state)
{
    (void)state;
    const float a[6] = {-0.0f, 1e-45f, -1e-40f, 3.4e38f, -INFINITY, 0.1f};
    const float *const x[1] = {a};
    const double w[1] = {1.0};
    float y[6];
    k->weighted_sum(y, x, w, 1, 1.0, 6);
    assert_floats(y, a, 6);
}

static void test_weighted_sum_oracle(void **state)
{
    (void)state;
    enum { N = 2000, INPUTS = 7 };
    static float x[INPUTS][N], y[N], want[N];
    const float *px[INPUTS];
    double w[INPUTS];
    struct rng r;

    rng_open(&r, 4);
    for (int j = 0; j < INPUTS; j++) {
        px[j] = x[j];
        w[j] = (double)rng_unit(&r);
        for (int i = 0; i < N; i++)
            x[j][i] = rng_normal(&r);
    }
    k->weighted_sum(y, px, w, INPUTS, 2.3, N);
    for (int i = 0; i < N; i++) {
        long double sum = 0.0L;
        for (int j = 0; j < INPUTS; j++)
            sum += (long double)w[j] * (long double)x[j][i];
        want[i] = (float)(sum / 2.3L);
    }
    assert_ulp_f32("weighted_sum", y, want, N, 1);
}

static void test_delta(void **state)
{
    (void)state;
    const float x[4] = {1.5f, -0.0f, 0x1.000002p0f, INFINITY};
    const float b[4] = {1.0f, 0.0f, 1.0f, 1.0f};
    float y[4];
    k->delta(y, x, b, 4);
    assert_floats(y, (const float[]){0.5f, -0.0f, 0x1p-23f, INFINITY}, 4);
}

/* ---- generalised task arithmetic ---- */

/* One element with up to three donors. */
static float gta1(float b, const float *x, const uint64_t *keep,
                  const double *coef, const double *weight, size_t n_donors,
                  int consensus, int normalize, double lambda)
{
    const float *const px[3] = {x, x + 1, x + 2};
    static const uint64_t all = UINT64_MAX;
    const uint64_t *const pm[3] = {keep != NULL ? keep : &all,
                                   keep != NULL ? keep + 1 : NULL,
                                   keep != NULL ? keep + 2 : NULL};
    const struct tvk_gta g = {n_donors,  coef,      weight,
                              consensus, normalize, lambda};
    float y = NAN;
    k->gta(&y, &b, px, keep != NULL || consensus ? pm : NULL, &g, 1);
    return y;
}

static void assert_bits(float got, float want)
{
    assert_floats(&got, &want, 1);
}

static void test_gta_sum(void **state)
{
    (void)state;
    const float x[3] = {2.0f, 4.0f, 0.0f};
    const double w[3] = {0.5, 0.25, 1.0};

    /* 1 + 0.5 * 1 + 0.25 * 3 + 1 * -1 */
    assert_bits(gta1(1.0f, x, NULL, w, w, 2, 0, 0, 1.0), 2.25f);
    assert_bits(gta1(1.0f, x, NULL, w, w, 3, 0, 0, 1.0), 1.25f);
    assert_bits(gta1(1.0f, x, NULL, w, w, 2, 0, 0, 2.0), 3.5f);
    assert_bits(gta1(1.0f, x, NULL, w, w, 2, 0, 1, 1.0),
                (float)(1.0 + 1.25 / 0.75));
    assert_bits(gta1(1.0f, x, NULL, w, w, 2, 0, 1, 3.0),
                (float)(1.0 + 1.25 / 0.75 * 3.0));
    assert_bits(gta1(7.0f, x, NULL, w, w, 0, 0, 1, 3.0), 7.0f);
}

/* coef carries the rescaling, weight alone is the divisor. */
static void test_gta_coef_and_weight(void **state)
{
    (void)state;
    const float x[2] = {3.0f, 5.0f};
    const double coef[2] = {2.0, 4.0};
    const double weight[2] = {1.0, 2.0};
    /* (2 * 2 + 4 * 4) / 3 */
    assert_bits(gta1(1.0f, x, NULL, coef, weight, 2, 0, 1, 1.0),
                (float)(1.0 + 20.0 / 3.0));
}

static void test_gta_masks(void **state)
{
    (void)state;
    const float x[3] = {2.0f, 4.0f, 8.0f};
    const double w[3] = {1.0, 1.0, 1.0};
    const uint64_t keep[3] = {0, 1, ~UINT64_C(1)};

    assert_bits(gta1(1.0f, x, keep, w, w, 3, 0, 0, 1.0), 4.0f);
    /* Dropped entries still count in the divisor without consensus... */
    assert_bits(gta1(1.0f, x, keep, w, w, 3, 0, 1, 1.0), 2.0f);
    /* ... and not with it. */
    assert_bits(gta1(1.0f, x, keep, w, w, 3, 1, 1, 1.0), 4.0f);
    /* What is dropped is not looked at. */
    const float nan[3] = {NAN, 4.0f, INFINITY};
    assert_bits(gta1(1.0f, nan, keep, w, w, 3, 1, 1, 1.0), 4.0f);
}

static void test_gta_zero_divisors(void **state)
{
    (void)state;
    const float x[2] = {3.0f, 4.0f};
    const double opposite[2] = {1.0, -1.0};
    const double nearly[2] = {1.0, -1.0 + 9e-9};
    const double enough[2] = {1.0, -1.0 + 2e-8};

    assert_bits(gta1(1.0f, x, NULL, opposite, opposite, 2, 0, 1, 1.0), 0.0f);
    assert_bits(gta1(1.0f, x, NULL, opposite, nearly, 2, 0, 1, 1.0), 0.0f);
    assert_bits(gta1(1.0f, x, NULL, opposite, enough, 2, 0, 1, 1.0),
                (float)(1.0 - 1.0 / (1.0 + enough[1])));
    /* Consensus: agreeing weights that add up to zero count as one. */
    const float both[2] = {3.0f, 3.0f};
    const double coef[2] = {1.0, 1.0};
    assert_bits(gta1(1.0f, both, NULL, coef, opposite, 2, 1, 1, 1.0), 5.0f);
}

static void test_gta_consensus(void **state)
{
    (void)state;
    const double w[3] = {1.0, 1.0, 1.0};

    /* Changes 3, -1, -1: the sum is positive, one agrees. */
    const float one_up[3] = {4.0f, 0.0f, 0.0f};
    assert_bits(gta1(1.0f, one_up, NULL, w, w, 3, 1, 0, 1.0), 4.0f);
    assert_bits(gta1(1.0f, one_up, NULL, w, w, 3, 1, 1, 1.0), 4.0f);
    /* 2, 4, -1: the mean of the two that agree. */
    const float two_up[3] = {3.0f, 5.0f, 0.0f};
    assert_bits(gta1(1.0f, two_up, NULL, w, w, 3, 1, 0, 1.0), 7.0f);
    assert_bits(gta1(1.0f, two_up, NULL, w, w, 3, 1, 1, 1.0), 4.0f);
    /* -4, -2, 1, scaled at last. */
    const float down[3] = {-3.0f, -1.0f, 2.0f};
    assert_bits(gta1(1.0f, down, NULL, w, w, 3, 1, 1, 0.5), -0.5f);
    /* 2, -2: a tie is positive. */
    const float tie[3] = {3.0f, -1.0f, 1.0f};
    assert_bits(gta1(1.0f, tie, NULL, w, w, 2, 1, 0, 1.0), 3.0f);
    /* 2, -2, 0: zero changes agree with nobody. */
    assert_bits(gta1(1.0f, tie, NULL, w, w, 3, 1, 1, 1.0), 3.0f);
    /* A negative weight turns its donor round before the election. */
    const double turned[3] = {1.0, -1.0, 1.0};
    assert_bits(gta1(1.0f, two_up, NULL, turned, turned, 2, 1, 0, 1.0), -3.0f);
}

/* Unweighted count is not what divides: the weights of those that agree. */
static void test_gta_consensus_weights(void **state)
{
    (void)state;
    const float x[3] = {3.0f, 5.0f, 0.0f};
    const double coef[3] = {0.5, 1.5, 1.0};
    /* 1, 6, -1 with weights 0.5, 1.5, 1: 7 / 2 */
    assert_bits(gta1(1.0f, x, NULL, coef, coef, 3, 1, 1, 1.0), 4.5f);
}

static void test_gta_no_change_is_base(void **state)
{
    (void)state;
    static const float bases[4] = {-0.0f, 0.0f, 1e-45f, -3.4e38f};
    const double w[2] = {0.7, -0.2};

    for (int b = 0; b < 4; b++) {
        const float x[3] = {bases[b], bases[b], bases[b]};
        for (int mode = 0; mode < 4; mode++)
            assert_bits(
                gta1(bases[b], x, NULL, w, w, 2, mode & 1, mode >> 1, 0.9),
                bases[b]);
        const float far[3] = {1.0f, 2.0f, 3.0f};
        assert_bits(gta1(bases[b], far, NULL, w, w, 2, 0, 0, 0.0), bases[b]);
        const uint64_t none[3] = {0, 0, 0};
        assert_bits(gta1(bases[b], far, none, w, w, 2, 1, 1, 1.0), bases[b]);
    }
}

static void test_gta_nan_shows(void **state)
{
    (void)state;
    const float x[2] = {NAN, 2.0f};
    const double w[2] = {1.0, 1.0};
    assert_true(isnan(gta1(1.0f, x, NULL, w, w, 2, 0, 0, 1.0)));
    const float inf[2] = {INFINITY, 2.0f};
    assert_bits(gta1(1.0f, inf, NULL, w, w, 2, 1, 0, 1.0), INFINITY);
}

static void test_gta_oracle(void **state)
{
    (void)state;
    enum { N = 3000, DONORS = 5 };
    static float b[N], x[DONORS][N], y[N], want[N];
    static uint64_t masks[DONORS][N / 64 + 1];
    const float *px[DONORS];
    const uint64_t *pm[DONORS];
    double coef[DONORS], weight[DONORS];
    struct rng r;

    rng_open(&r, 5);
    for (int i = 0; i < N; i++)
        b[i] = rng_normal(&r);
    for (int j = 0; j < DONORS; j++) {
        px[j] = x[j];
        pm[j] = masks[j];
        weight[j] = 0.2 + (double)rng_below(&r, 100) / 100.0;
        coef[j] = weight[j] / 0.7;
        rng_bytes(&r, masks[j], sizeof(masks[j]));
        for (int i = 0; i < N; i++)
            x[j][i] = b[i] + 0.1f * rng_normal(&r);
    }
    for (int mode = 0; mode < 4; mode++) {
        const struct tvk_gta g = {DONORS,   coef,      weight,
                                  mode & 1, mode >> 1, 0.8};
        k->gta(y, b, px, pm, &g, N);
        for (int i = 0; i < N; i++) {
            long double sum = 0.0L, up = 0.0L, down = 0.0L;
            long double w_all = 0.0L, w_up = 0.0L, w_down = 0.0L;
            for (int j = 0; j < DONORS; j++) {
                long double d = ((long double)x[j][i] - (long double)b[i]) *
                                (long double)coef[j];
                if (!(masks[j][i / 64] >> (i % 64) & 1))
                    d = 0.0L;
                sum += d;
                w_all += (long double)weight[j];
                up += d > 0 ? d : 0.0L;
                w_up += d > 0 ? (long double)weight[j] : 0.0L;
                down += d < 0 ? d : 0.0L;
                w_down += d < 0 ? (long double)weight[j] : 0.0L;
            }
            long double m = sum;
            long double divisor = w_all;
            if (g.consensus) {
                m = sum >= 0 ? up : down;
                divisor = sum >= 0 ? w_up : w_down;
                divisor = divisor == 0 ? 1.0L : divisor;
            }
            if (g.normalize)
                m /= divisor;
            want[i] = (float)((long double)b[i] + m * 0.8L);
        }
        assert_ulp_f32("gta", y, want, N, 1);
    }
}

/* Weights that cancel but for their rounding divide nothing, as those do whose
 * sum is 0. */
static void test_gta_cancels(void **state)
{
    (void)state;
    enum { N = 37, DONORS = 3 };
    static const double weight[DONORS] = {0.1, 0.2, -0.3};
    static float b[N], x[DONORS][N], y[N];
    const float *px[DONORS] = {x[0], x[1], x[2]};
    const struct tvk_gta g = {DONORS, weight, weight, 1, 1, 1.0};

    for (int i = 0; i < N; i++) {
        x[0][i] = x[1][i] = (float)(i + 1);
        x[2][i] = (float)-(i + 1);
    }
    k->gta(y, b, px, NULL, &g, N);
    for (int i = 0; i < N; i++)
        assert_true(fabs((double)y[i] - 0.6 * (i + 1)) < 1e-4);
}

/* A tiny weight that stands alone is one: there is nothing that cancels. */
static void test_gta_tiny_weight(void **state)
{
    (void)state;
    enum { N = 37, DONORS = 2 };
    static const double weight[DONORS] = {1.0, 5e-14};
    static float b[N], x[DONORS][N], y[N];
    const float *px[DONORS] = {x[0], x[1]};
    const struct tvk_gta g = {DONORS, weight, weight, 1, 1, 1.0};

    for (int i = 0; i < N; i++)
        x[1][i] = (float)(i + 1);
    k->gta(y, b, px, NULL, &g, N);
    for (int i = 0; i < N; i++)
        assert_true(fabs((double)y[i] - (i + 1)) < 1e-4);
}

/* ---- top-k ---- */

struct item {
    uint32_t m;
    size_t i;
};

static int by_magnitude(const void *a, const void *b)
{
    const struct item *const p = a;
    const struct item *const q = b;
    if (p->m != q->m)
        return p->m > q->m ? -1 : 1;
    return p->i < q->i ? -1 : p->i > q->i;
}

/* The whole selection in blocks, as a caller does it. */
static uint64_t select_top(const float *x, const float *b, size_t n,
                           size_t n_keep, size_t block, uint64_t *mask)
{
    static uint32_t hi[TVK_HIST_HI], lo[TVK_HIST_LO];
    uint64_t above = 0;
    uint64_t kept = 0;
    uint64_t seen = 0;
    uint32_t bucket = TVK_HIST_HI;
    uint32_t low = TVK_HIST_LO;

    memset(hi, 0, sizeof(hi));
    memset(lo, 0, sizeof(lo));
    for (size_t i = 0; i < n; i += block)
        k->hist_hi(hi, x + i, b != NULL ? b + i : NULL,
                   n - i < block ? n - i : block);
    do
        above += hi[--bucket];
    while (above < n_keep && bucket > 0);
    above -= hi[bucket];
    for (size_t i = 0; i < n; i += block)
        k->hist_lo(lo, bucket, x + i, b != NULL ? b + i : NULL,
                   n - i < block ? n - i : block);
    do
        above += lo[--low];
    while (above < n_keep && low > 0);
    above -= lo[low];
    const uint32_t pattern = bucket << 15 | low;
    assert_true(k->count_eq(x, b, pattern, n) == lo[low]);
    for (size_t i = 0; i < n; i += block)
        kept += k->topk_mask(mask + i / 64, x + i, b != NULL ? b + i : NULL,
                             pattern, &seen, n_keep - above,
                             n - i < block ? n - i : block);
    assert_true(seen == lo[low]);
    return kept;
}

static void check_selection(const float *x, const float *b, size_t n,
                            size_t n_keep)
{
    enum { MOST = 5000 };
    static struct item items[MOST];
    static uint64_t mask[MOST / 64 + 1], want[MOST / 64 + 1];
    uint64_t n_want = 0;

    assert_true(n <= MOST);
    for (size_t i = 0; i < n; i++) {
        const float d = b != NULL ? x[i] - b[i] : x[i];
        memcpy(&items[i].m, &d, sizeof(d));
        items[i].m &= 0x7fffffffu;
        if (isnan(d))
            items[i].m = 0x7f800001u;
        items[i].i = i;
    }
    qsort(items, n, sizeof(items[0]), by_magnitude);
    memset(want, 0, sizeof(want));
    for (size_t i = 0; i < n_keep && i < n; i++) {
        if (items[i].m == 0)
            break;
        want[items[i].i / 64] |= UINT64_C(1) << items[i].i % 64;
        n_want++;
    }
    static const size_t blocks[] = {64, 448, 8192};
    for (size_t s = 0; s < 3; s++) {
        memset(mask, 0xff, sizeof(mask));
        assert_true(select_top(x, b, n, n_keep, blocks[s], mask) == n_want);
        assert_memory_equal(mask, want, (n + 63) / 64 * 8);
    }
}

static void test_topk_against_sort(void **state)
{
    (void)state;
    enum { N = 3000 };
    static float x[N], b[N];
    static const size_t keeps[] = {1, 2, 63, 600, 1500, 2999, 3000};
    struct rng r;

    rng_open(&r, 6);
    for (int kind = 0; kind < 4; kind++) {
        for (int i = 0; i < N; i++) {
            b[i] = rng_normal(&r);
            x[i] = b[i] + 0.01f * rng_normal(&r);
            if (kind == 1) { /* many ties, a third of them zero */
                b[i] = (float)rng_below(&r, 3);
                x[i] = (float)rng_below(&r, 3);
            } else if (kind == 2) { /* all equal */
                b[i] = 0.0f;
                x[i] = rng_below(&r, 2) ? 0.25f : -0.25f;
            } else if (kind == 3) { /* anything */
                x[i] = rng_any_f32(&r);
            }
        }
        for (size_t s = 0; s < sizeof(keeps) / sizeof(keeps[0]); s++) {
            check_selection(x, b, N, keeps[s]);
            check_selection(x, NULL, N, keeps[s]);
        }
    }
}

static void test_topk_zeros_never_kept(void **state)
{
    (void)state;
    const float x[5] = {0.0f, -0.0f, 1e-45f, 0.0f, -2.0f};
    check_selection(x, NULL, 5, 1);
    check_selection(x, NULL, 5, 2);
    check_selection(x, NULL, 5, 4);
    uint64_t mask = 0;
    uint64_t seen = 0;
    assert_true(k->topk_mask(&mask, x, NULL, 0, &seen, 5, 5) == 2);
    assert_true(mask == 0x14);
    assert_true(seen == 3);
    check_selection(x, x, 5, 3);
}

static void test_topk_eq_limit(void **state)
{
    (void)state;
    const float x[6] = {1.0f, -2.0f, 1.0f, -1.0f, 0.5f, 1.0f};
    uint32_t one = 0;
    memcpy(&one, x, sizeof(one));
    uint64_t mask = 0;
    uint64_t seen = 0;

    assert_true(k->topk_mask(&mask, x, NULL, one, &seen, 2, 6) == 3);
    assert_true(mask == 0x07);
    assert_true(seen == 4);
    /* Equal elements of earlier blocks use up the limit. */
    seen = 1;
    assert_true(k->topk_mask(&mask, x, NULL, one, &seen, 2, 6) == 2);
    assert_true(mask == 0x03);
    assert_true(seen == 5);
    seen = 9;
    assert_true(k->topk_mask(&mask, x, NULL, one, &seen, 2, 6) == 1);
    assert_true(mask == 0x02);
    assert_true(k->count_eq(x, NULL, one, 6) == 4);
}

/* NaN is larger than infinity, whatever its payload. */
static void test_topk_nan_on_top(void **state)
{
    (void)state;
    static const uint32_t bits[6] = {0x7f800000, 0x7fc00000, 0xff800001,
                                     0x7f7fffff, 0xffffffff, 0xff800000};
    float x[6];
    uint64_t mask = 0;
    uint64_t seen = 0;

    memcpy(x, bits, sizeof(x));
    assert_true(k->topk_mask(&mask, x, NULL, 0x7f800000, &seen, 0, 6) == 3);
    assert_true(mask == 0x16);
    assert_true(k->count_eq(x, NULL, 0x7f800001, 6) == 3);
    check_selection(x, NULL, 6, 4);
}

/* ---- reductions ---- */

static void test_dots_exact(void **state)
{
    (void)state;
    enum { N = 1001 };
    static float a[N], b[N];
    double aa = 0.0, bb = 0.0, ab = 0.0;
    struct tvk_dots d;

    for (int i = 0; i < N; i++) {
        a[i] = (float)(i % 37 - 18);
        b[i] = (float)(i % 23 - 11);
        aa += (double)a[i] * (double)a[i];
        bb += (double)b[i] * (double)b[i];
        ab += (double)a[i] * (double)b[i];
    }
    k->dots(&d, a, b, N);
    assert_true(d.aa == aa && d.bb == bb && d.ab == ab);
    k->dots(&d, a, a, N);
    assert_true(d.aa == aa && d.bb == aa && d.ab == aa);
    k->dots(&d, a, b, 0);
    assert_true(d.aa == 0.0 && d.bb == 0.0 && d.ab == 0.0);
}

/* Values of very different size, so that another order gives other bits. */
static void test_dots_lanes(void **state)
{
    (void)state;
    enum { N = 3 * 16 + 5 };
    float a[N], b[N];
    double lane[16] = {0.0};
    struct tvk_dots d;
    struct rng r;

    rng_open(&r, 7);
    for (int i = 0; i < N; i++) {
        a[i] = ldexpf(rng_unit(&r), (int)rng_below(&r, 60) - 30);
        b[i] = ldexpf(rng_unit(&r), (int)rng_below(&r, 60) - 30);
        lane[i & 15] += (double)a[i] * (double)b[i];
    }
    double s[8], q[4];
    for (int i = 0; i < 8; i++)
        s[i] = lane[i] + lane[i + 8];
    for (int i = 0; i < 4; i++)
        q[i] = s[i] + s[i + 4];
    k->dots(&d, a, b, N);
    assert_true(d.ab == (q[0] + q[2]) + (q[1] + q[3]));
}

static void test_abs_sum(void **state)
{
    (void)state;
    const float x[4] = {1.0f, -2.0f, 4.0f, -8.0f};
    const float b[4] = {0.5f, 1.0f, 4.0f, 8.0f};
    const uint64_t mask = 0xfffffffffffffff5;

    assert_true(k->abs_sum(x, NULL, NULL, 4) == 15.0);
    assert_true(k->abs_sum(x, b, NULL, 4) == 19.5);
    assert_true(k->abs_sum(x, NULL, &mask, 4) == 5.0);
    assert_true(k->abs_sum(x, b, &mask, 4) == 0.5);
    assert_true(k->abs_sum(x, b, &mask, 0) == 0.0);
}

/* The tree, by merging equal neighbours as leaves arrive, then the rest from
 * the right: another algorithm, same shape. */
static double counter_tree(const double *leaves, size_t n)
{
    double sum[64];
    size_t size[64];
    size_t depth = 0;

    for (size_t i = 0; i < n; i++) {
        sum[depth] = leaves[i];
        size[depth++] = 1;
        while (depth > 1 && size[depth - 1] == size[depth - 2]) {
            sum[depth - 2] += sum[depth - 1];
            size[depth - 2] *= 2;
            depth--;
        }
    }
    for (; depth > 1; depth--)
        sum[depth - 2] += sum[depth - 1];
    return n == 0 ? 0.0 : sum[0];
}

static void test_trees(void **state)
{
    (void)state;
    enum { MOST = 200 };
    double leaves[MOST];
    struct tvk_dots dots[MOST];
    struct rng r;

    rng_open(&r, 8);
    for (int i = 0; i < MOST; i++) {
        leaves[i] = ldexp((double)rng_unit(&r), (int)rng_below(&r, 80) - 40);
        dots[i].aa = leaves[i];
        dots[i].bb = -leaves[i];
        dots[i].ab = 2.0 * leaves[i];
    }
    for (size_t n = 0; n <= MOST; n++) {
        const double want = counter_tree(leaves, n);
        const struct tvk_dots d = tvk_dots_tree(dots, n);
        assert_true(tvk_sum_tree(leaves, n) == want);
        assert_true(d.aa == want && d.bb == -want && d.ab == 2.0 * want);
    }
}

static void test_stats(void **state)
{
    (void)state;
    const float x[8] = {1.0f,     -3.0f, NAN,  0.0f,
                        INFINITY, -0.0f, 2.0f, -INFINITY};
    struct tvk_stats s, t;

    k->stats(&s, x, 8);
    assert_true(s.sum == 0.0);
    assert_true(s.sum_sq == 14.0);
    assert_true(s.min == -3.0f && s.max == 2.0f);
    assert_true(s.n_nonfinite == 3 && s.n_zero == 2);
    assert_true(k->count_nonfinite(x, 8) == 3);
    assert_true(k->count_nonfinite(x, 2) == 0);

    k->stats(&t, x + 2, 1);
    assert_true(t.min == INFINITY && t.max == -INFINITY);
    assert_true(t.sum == 0.0 && t.n_nonfinite == 1);
    tvk_stats_merge(&t, &s);
    assert_true(t.min == -3.0f && t.max == 2.0f);
    assert_true(t.sum_sq == 14.0 && t.n_nonfinite == 4 && t.n_zero == 2);

    k->stats(&s, x + 5, 1);
    assert_bits(s.min, 0.0f);
    assert_bits(s.max, 0.0f);
}

/* ---- low rank ---- */

/* exp and log of our own against the C library's, which are good to less than
 * one unit in the last place. */
static void test_exp_and_log(void **state)
{
    enum { N = 4000 };
    static float x[N];
    static double e[N], f[N];
    (void)state;
    double worst_exp = 0.0;
    double worst_log = 0.0;

    for (size_t i = 0; i < N; i++)
        x[i] = -(float)(i < N / 2 ? 1e-3 * (double)i
                                  : 698.0 * (double)(i - N / 2) / (N / 2));
    x[N - 1] = -701.0f;
    (void)k->softmax(e, x, 0.0, N);
    for (size_t i = 0; i + 1 < N; i++) {
        const double want = exp((double)x[i]);
        worst_exp = fmax(worst_exp, fabs(e[i] - want) / want);
    }
    assert_true(e[N - 1] == 0.0 && e[0] == 1.0);
    assert_true(worst_exp < 1e-15);

    /* One element at a time, sums of 1: p log(p/q) alone. */
    for (size_t i = 0; i < N; i++) {
        e[i] = pow(2.0, -25.0 + 27.0 * (double)(i % 997) / 997.0);
        f[i] = i % 2 ? e[i] * (1.0 + 1e-3 * ((double)i / N - 0.5))
                     : pow(2.0, -25.0 + 27.0 * (double)(i % 991) / 991.0);
        const double p = e[i] + 1e-8;
        const double q = f[i] + 1e-8;
        /* p / q near 1 has lost what matters. */
        const double off = (p - q) / q;
        const double want = p * (fabs(off) < 0.5 ? log1p(off) : log(p / q));
        const double got = k->divergence(e + i, f + i, 1.0, 1.0, 1);
        worst_log = fmax(worst_log, fabs(got - want) / (fabs(want) + 1e-300));
    }
    assert_true(worst_log < 2e-15);
}

static void test_divergence(void **state)
{
    (void)state;
    const float x[3] = {0.0f, NAN, -INFINITY};
    const float rows[2][3] = {{0.1f, 0.2f, 0.4f}, {0.3f, -0.1f, 0.2f}};
    double e[3], f[3];

    assert_true(k->highest(x, 3) == 0.0f);
    assert_true(k->highest(x + 1, 2) == -INFINITY);
    assert_true(k->highest(x, 0) == -INFINITY);
    assert_true(isnan(k->softmax(e, x, 0.0, 3)));
    assert_true(e[2] == 0.0);

    const double sum_e = k->softmax(e, rows[0], (double)rows[0][2], 3);
    const double sum_f = k->softmax(f, rows[1], (double)rows[1][0], 3);
    double want = 0.0;
    for (size_t i = 0; i < 3; i++) {
        const double p = e[i] / sum_e + 1e-8;
        const double q = f[i] / sum_f + 1e-8;
        want += p * log(p / q);
    }
    assert_true(fabs(k->divergence(e, f, sum_e, sum_f, 3) - want) < 1e-15);
    /* A row and itself. */
    assert_true(k->divergence(e, e, sum_e, sum_e, 3) == 0.0);
    for (float y = 1e-40f; y < 1e38f; y *= 1.37f) {
        const double right = log((double)y);
        assert_true(fabs(tvk_log(y) - right) <= 1e-15 * fabs(right));
    }
    assert_true(tvk_log(1.0f) == 0.0 && tvk_log(0.0f) == -(double)INFINITY);
    assert_true(isnan(tvk_log(-1.0f)) && isnan(tvk_log(NAN)));
    assert_true(tvk_log(INFINITY) == (double)INFINITY);
}

static void test_variance(void **state)
{
    (void)state;
    const float b[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    const float x0[4] = {1.5f, 3.0f, 1.0f, 1.1f};
    const float x1[4] = {0.5f, 3.0f, 2.0f, 1.2f};
    const float x2[4] = {1.0f, 3.0f, 4.0f, NAN};
    const float *const x[3] = {x0, x1, x2};
    float v[4];

    k->variance(v, b, x, 1, 4);
    for (int i = 0; i < 3; i++)
        assert_true(v[i] == 0.0f);
    k->variance(v, b, x, 3, 4);
    assert_true(v[0] == (float)(0.5 / 3.0));
    assert_true(v[1] == 0.0f);
    assert_true(v[2] == (float)(14.0 / 9.0));
    assert_true(isnan(v[3]));
}

static void test_elect(void **state)
{
    (void)state;
    const float b[5] = {1.0f, 1.0f, 1.0f, -0.0f, 1.0f};
    const float x0[5] = {2.0f, 2.0f, -2.0f, -0.0f, NAN};
    const float x1[5] = {3.0f, -1.0f, 2.0f, -0.0f, 2.0f};
    const float *const x[2] = {x0, x1};
    const double w[2] = {0.75, 0.25};
    const double none[2] = {0.0, 0.0};
    const uint64_t mask = 0x1e;
    float y[5];

    k->elect(y, b, x, NULL, w, 2, 5);
    assert_true(y[0] == 1.0f + 0.75f * 1.0f + 0.25f * 2.0f);
    /* Votes are not weighted: -2 beats 1; only it is taken, whole. */
    assert_true(y[1] == -1.0f);
    assert_true(y[2] == -2.0f);
    assert_bits(y[3], -0.0f);
    assert_true(isnan(y[4]));
    k->elect(y, b, x, &mask, w, 2, 5);
    assert_true(y[0] == 1.0f && y[1] == -1.0f);
    /* No weight at all: nothing is taken over. */
    k->elect(y, b, x, NULL, none, 2, 4);
    for (int i = 0; i < 4; i++)
        assert_bits(y[i], b[i]);
}

static void test_lowrank_add(void **state)
{
    (void)state;
    /* [2, 2] x [2, 3] = [[9, 12, 15], [19, 26, 33]] */
    const float l[4] = {1.0f, 2.0f, 3.0f, 4.0f};
    const float r[6] = {1.0f, 2.0f, 3.0f, 4.0f, 5.0f, 6.0f};
    float y[6] = {1.0f, 1.0f, 1.0f, 1.0f, 1.0f, 1.0f};

    k->lowrank_add(y, l, r, 0.5, 2, 3, 0, 6);
    assert_floats(y, (const float[]){5.5f, 7.0f, 8.5f, 10.5f, 14.0f, 17.5f}, 6);
    /* From the middle of the first row into the second. */
    float part[3] = {0.0f, 0.0f, 0.0f};
    k->lowrank_add(part, l, r, 1.0, 2, 3, 2, 3);
    assert_floats(part, (const float[]){15.0f, 19.0f, 26.0f}, 3);
    k->lowrank_add(part, l, r, 1.0, 0, 3, 2, 3);
    assert_floats(part, (const float[]){15.0f, 19.0f, 26.0f}, 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_weighted_sum),
        cmocka_unit_test(test_weighted_sum_order),
        cmocka_unit_test(test_weighted_sum_identity),
        cmocka_unit_test(test_weighted_sum_oracle),
        cmocka_unit_test(test_delta),
        cmocka_unit_test(test_gta_sum),
        cmocka_unit_test(test_gta_coef_and_weight),
        cmocka_unit_test(test_gta_masks),
        cmocka_unit_test(test_gta_zero_divisors),
        cmocka_unit_test(test_gta_consensus),
        cmocka_unit_test(test_gta_consensus_weights),
        cmocka_unit_test(test_gta_no_change_is_base),
        cmocka_unit_test(test_gta_nan_shows),
        cmocka_unit_test(test_gta_oracle),
        cmocka_unit_test(test_gta_cancels),
        cmocka_unit_test(test_gta_tiny_weight),
        cmocka_unit_test(test_topk_against_sort),
        cmocka_unit_test(test_topk_zeros_never_kept),
        cmocka_unit_test(test_topk_eq_limit),
        cmocka_unit_test(test_topk_nan_on_top),
        cmocka_unit_test(test_exp_and_log),
        cmocka_unit_test(test_divergence),
        cmocka_unit_test(test_variance),
        cmocka_unit_test(test_elect),
        cmocka_unit_test(test_dots_exact),
        cmocka_unit_test(test_dots_lanes),
        cmocka_unit_test(test_abs_sum),
        cmocka_unit_test(test_trees),
        cmocka_unit_test(test_stats),
        cmocka_unit_test(test_lowrank_add),
    };
    return cmocka_run_group_tests(tests, row_open, NULL);
}
