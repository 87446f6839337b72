/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_variants.c - every row of the kernel table against the reference row.
 *
 * For each operation and row: n = 0..65 and some larger ones, the data at every
 * element-aligned offset in 64 bytes, right behind and right in front of a page
 * that faults, three kinds of values (weights and fine-tunes of them; coarsely
 * rounded numbers with many ties and zeros; infinities, NaNs, subnormals and
 * arbitrary bits). Results must be bit-identical to what the reference gives on
 * ordinary memory; only NaNs of arithmetic may differ in their payload. Where
 * the contract promises it, a call must equal two calls on its parts.
 * The reference row goes through the same mill, for its memory accesses.
 *
 * The CUDA row takes part where a device is found, every call of it however
 * small. With tests' own driver (tests/support/fake_cuda.c) in LD_LIBRARY_PATH
 * it is the same row, its kernels under an emulated grid: CTest runs this
 * program a second time so, with the argument "cuda" that picks its rows.
 */
#include "test.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_fixture.h"
#include "guard_buffer.h"
#include "rng.h"
#include "tv/cuda.h"
#include "tv/kernels.h"
#include "ulp.h"

enum {
    N_DONORS = 9,
    N_LARGEST = 4099,
    N_POOL = N_LARGEST + 64,
    N_WORDS = N_LARGEST / 64 + 1,
    N_KINDS = 3
};

/* What the kernels under test read and write. */
static struct guard_buffer in[N_DONORS], base, out, bits[N_DONORS], hist,
    exps[2];
/* What the inputs are copied from, per kind of values, and the expectation. */
static float pool_x[N_KINDS][N_DONORS][N_POOL];
static float pool_b[N_KINDS][N_POOL];
static uint64_t pool_mask[N_DONORS][N_WORDS];
static float want[N_LARGEST];
static uint64_t want_mask[N_WORDS];
static uint32_t want_hist[TVK_HIST_HI];
static float leaf_a[TVK_LEAF], leaf_b[TVK_LEAF];
static struct rng rng;

/* One call to be tested. */
struct place {
    int kind;
    size_t n;
    enum guard_side side;
    size_t offset; /* bytes */
    size_t from;   /* where in the pools the values start */
};

/* Rows under test: those of the CPU by their enum tvk_isa, then the device's.
 */
enum { ROW_CUDA = TVK_ISA_COUNT, N_ROWS };

/* The device of the CUDA row, NULL without one. */
static tvk_cuda *device;
static const struct tvk_table *device_table;

typedef void place_fn(const struct tvk_table *k, const struct place *p);

static float special(void)
{
    static const uint32_t some[] = {
        0x00000000, 0x00000001, 0x007fffff, 0x00800000, 0x33000000, 0x33000001,
        0x38800000, 0x387fffff, 0x3f800000, 0x477fefff, 0x477ff000, 0x7f7f7fff,
        0x7f7f8000, 0x7f7fffff, 0x7f800000, 0x7f800001, 0x7fc00000, 0x7fffffff,
        0x3f808000, 0x3f818000, 0x00008000, 0x00018000, 0x0d000000, 0x73000000};
    const uint64_t r = rng_below(&rng, 4 * sizeof(some) / sizeof(some[0]));
    uint32_t u = rng_u32(&rng);
    float v = 0.0f;

    if (r < sizeof(some) / sizeof(some[0]))
        u = some[r] | (u & 0x80000000u);
    memcpy(&v, &u, sizeof(v));
    return v;
}

static float value(int kind, float around)
{
    switch (kind) {
    case 0:
        if (rng_below(&rng, 5) == 0)
            return around;
        return around + 0.002f * rng_normal(&rng);
    case 1:
        return ((float)rng_below(&rng, 17) - 8.0f) / 8.0f;
    default:
        return special();
    }
}

static void device_open(void)
{
    struct tv_error err = {.code = TV_OK};
    struct tvk_cuda_options o = cuda_device_options();

    o.least_elems = 0;
    if (tvk_cuda_open(&o, &err, &device) != TV_OK) {
        print_message("CUDA row: skipped: %s\n", err.msg);
        return;
    }
    print_message("CUDA row: %s\n", tvk_cuda_about(device)->name);
    assert_int_equal(
        tvk_cuda_table(device, tvk_table_for(TVK_REF), &err, &device_table),
        TV_OK);
}

/* The row that a test is to look at; skips the test where there is none. */
static const struct tvk_table *row_of(void **state)
{
    const int row = *(const int *)*state;

    if (row == ROW_CUDA) {
        if (!device_table)
            skip();
        return device_table;
    }
    if (!tvk_isa_supported((enum tvk_isa)row)) {
        print_message("this processor has no such instructions\n");
        skip();
    }
    const struct tvk_table *const k = tvk_table_for((enum tvk_isa)row);
    assert_int_equal(k->isa, row);
    return k;
}

/* A device that stopped working leaves right results, made by the CPU. */
static void still_works(const struct tvk_table *k)
{
    struct tv_error err = {.code = TV_OK};

    if (k->trouble && k->trouble(&err) != TV_OK)
        fail_msg("%s: %s", k->name, err.msg);
}

static int fixture_open(void **state)
{
    (void)state;
    const size_t room = N_LARGEST * 3 * sizeof(uint16_t) + 64;

    device_open();
    rng_open(&rng, 1);
    for (int j = 0; j < N_DONORS; j++) {
        guard_buffer_open(&in[j], room);
        guard_buffer_open(&bits[j], N_WORDS * sizeof(uint64_t) + 64);
        for (int i = 0; i < N_WORDS; i++)
            pool_mask[j][i] = rng_u64(&rng);
    }
    guard_buffer_open(&base, room);
    guard_buffer_open(&out, room);
    guard_buffer_open(&hist, sizeof(want_hist));
    for (int j = 0; j < 2; j++)
        guard_buffer_open(&exps[j], N_LARGEST * sizeof(double));
    for (int kind = 0; kind < N_KINDS; kind++) {
        for (int i = 0; i < N_POOL; i++) {
            const float b = value(kind, 0.02f * rng_normal(&rng));
            pool_b[kind][i] = b;
            for (int j = 0; j < N_DONORS; j++)
                pool_x[kind][j][i] = value(kind, b);
        }
    }
    for (size_t i = 0; i < TVK_LEAF; i++) {
        leaf_a[i] = rng_normal(&rng);
        leaf_b[i] = rng_normal(&rng);
    }
    return 0;
}

static int fixture_close(void **state)
{
    (void)state;
    for (int j = 0; j < N_DONORS; j++) {
        guard_buffer_close(&in[j]);
        guard_buffer_close(&bits[j]);
    }
    guard_buffer_close(&base);
    guard_buffer_close(&out);
    guard_buffer_close(&hist);
    tvk_cuda_close(device);
    for (int j = 0; j < 2; j++)
        guard_buffer_close(&exps[j]);
    return 0;
}

/* Calls fn for all kinds, sizes and places; offsets are multiples of align. */
static void everywhere(void **state, size_t align, place_fn *fn)
{
    static const size_t larger[] = {100, 127, 128, 129, 1023, N_LARGEST};
    const struct tvk_table *const k = row_of(state);

    for (int kind = 0; kind < N_KINDS; kind++) {
        for (size_t s = 0; s < 66 + sizeof(larger) / sizeof(larger[0]); s++) {
            struct place p = {kind, s < 66 ? s : larger[s - 66], GUARD_AFTER, 0,
                              0};
            p.from = (size_t)rng_below(&rng, N_POOL - N_LARGEST);
            fn(k, &p);
            p.side = GUARD_BEFORE;
            /* A few offsets do for long inputs: their ends look the same. The
             * conversions have 64 offsets and are tried once at each. */
            const int dense = p.n < 66 && (align > 1 || kind == 0);
            const size_t step = dense ? align : 5 * align;
            for (p.offset = 0; p.offset < 64; p.offset += step) {
                p.from = (size_t)rng_below(&rng, N_POOL - N_LARGEST);
                fn(k, &p);
            }
        }
    }
}

/* Copies n values into a buffer; the second and further ones of a call are
 * shifted against the first, so that relative alignments vary too. */
static float *put(struct guard_buffer *g, const struct place *p, unsigned which,
                  const float *from)
{
    size_t offset = p->offset;
    if (p->side == GUARD_BEFORE)
        offset = (p->offset + which * 20u) % 64u;
    float *const dst =
        guard_buffer_place(g, p->n * sizeof(float), p->side, offset);
    if (p->n > 0)
        memcpy(dst, from + p->from, p->n * sizeof(float));
    return dst;
}

static float *put_x(const struct place *p, unsigned j)
{
    return put(&in[j], p, j, pool_x[p->kind][j]);
}

static float *put_b(const struct place *p)
{
    return put(&base, p, 5, pool_b[p->kind]);
}

static const float *raw_x(const struct place *p, unsigned j)
{
    return pool_x[p->kind][j] + p->from;
}

static const float *raw_b(const struct place *p)
{
    return pool_b[p->kind] + p->from;
}

/* Where the result goes: filled with what no kernel writes. */
static void *put_out(const struct place *p, size_t n_bytes, size_t align)
{
    const size_t offset =
        p->side == GUARD_BEFORE ? (p->offset + 28) / align * align % 64 : 0;
    void *const dst = guard_buffer_place(&out, n_bytes, p->side, offset);
    if (n_bytes > 0)
        memset(dst, 0x5a, n_bytes);
    return dst;
}

static size_t words(size_t n)
{
    return (n + 63) / 64;
}

static uint64_t *put_mask(const struct place *p, unsigned j)
{
    uint64_t *const dst = guard_buffer_place(
        &bits[j], words(p->n) * sizeof(uint64_t), p->side, p->offset / 8 * 8);
    if (p->n > 0)
        memcpy(dst, pool_mask[j], words(p->n) * sizeof(uint64_t));
    return dst;
}

static uint32_t bits_of(float v)
{
    uint32_t u = 0;
    memcpy(&u, &v, sizeof(u));
    return u;
}

static void same_floats(const char *what, const struct tvk_table *k,
                        const struct place *p, const float *got,
                        const float *expected, int nan_payloads)
{
    for (size_t i = 0; i < p->n; i++) {
        if (bits_of(got[i]) == bits_of(expected[i]))
            continue;
        if (!nan_payloads && isnan(got[i]) && isnan(expected[i]))
            continue;
        fail_msg("%s %s: kind %d, n %zu, offset %zu: element %zu is %08x, the "
                 "reference says %08x",
                 k->name, what, p->kind, p->n, p->offset, i,
                 (unsigned)bits_of(got[i]), (unsigned)bits_of(expected[i]));
    }
    guard_buffer_check(&out);
}

static void same_double(const char *what, const struct tvk_table *k,
                        const struct place *p, double got, double expected)
{
    if (memcmp(&got, &expected, sizeof(got)) == 0)
        return;
    if (isnan(got) && isnan(expected))
        return;
    fail_msg("%s %s: kind %d, n %zu, offset %zu: %.17g, the reference says "
             "%.17g",
             k->name, what, p->kind, p->n, p->offset, got, expected);
}

static const struct tvk_table *ref(void)
{
    return tvk_table_for(TVK_REF);
}

/* ---- conversion ---- */

typedef uint64_t widen_fn(float *TVK_RESTRICT dst, const void *TVK_RESTRICT src,
                          size_t n);
typedef uint64_t narrow_fn(void *TVK_RESTRICT dst,
                           const float *TVK_RESTRICT src, size_t n);

static void check_widen(const char *what, const struct tvk_table *k,
                        const struct place *p, widen_fn *fn, widen_fn *spec)
{
    uint16_t raw[N_LARGEST];
    void *const src = guard_buffer_place(&in[0], 2 * p->n, p->side, p->offset);
    float *const dst = put_out(p, p->n * sizeof(float), sizeof(float));

    rng_bytes(&rng, raw, 2 * p->n);
    if (p->n > 0)
        memcpy(src, raw, 2 * p->n);
    assert_int_equal(fn(dst, src, p->n), spec(want, raw, p->n));
    same_floats(what, k, p, dst, want, 1);
}

static void check_narrow(const char *what, const struct tvk_table *k,
                         const struct place *p, narrow_fn *fn, narrow_fn *spec)
{
    uint16_t expected[N_LARGEST];
    struct place aligned = *p;
    aligned.offset = p->offset / 4 * 4;
    const float *const src = put_x(&aligned, 0);
    void *const dst = put_out(p, 2 * p->n, 1);

    assert_int_equal(fn(dst, src, p->n), spec(expected, raw_x(p, 0), p->n));
    assert_same_bytes(what, dst, expected, 2 * p->n);
    guard_buffer_check(&out);
    (void)k;
}

static void one_convert(const struct tvk_table *k, const struct place *p)
{
    check_widen("bf16_to_f32", k, p, k->bf16_to_f32, ref()->bf16_to_f32);
    check_widen("f16_to_f32", k, p, k->f16_to_f32, ref()->f16_to_f32);
    check_narrow("f32_to_bf16", k, p, k->f32_to_bf16, ref()->f32_to_bf16);
    check_narrow("f32_to_f16", k, p, k->f32_to_f16, ref()->f32_to_f16);
}

static void test_convert(void **state)
{
    everywhere(state, 1, one_convert);
}

static void one_split_bf16(const struct tvk_table *k, const struct place *p)
{
    uint16_t expected[3 * N_LARGEST];
    const float *const src = put_x(p, 0);
    uint16_t *const dst = put_out(p, 3 * p->n * sizeof(*dst), sizeof(uint16_t));

    k->split_bf16(dst, p->n, src, p->n);
    ref()->split_bf16(expected, p->n, raw_x(p, 0), p->n);
    assert_same_bytes("split_bf16", dst, expected,
                      3 * p->n * sizeof(*expected));
    guard_buffer_check(&out);
}

static void test_split_bf16(void **state)
{
    everywhere(state, sizeof(float), one_split_bf16);
}

/* ---- linear ---- */

static void one_linear(const struct tvk_table *k, const struct place *p)
{
    static const double divisors[] = {1.0,    2.0,       -0.25,    1.7, 3.0,
                                      1e-310, 0x1p-1022, 0x1p1023, -1.0};
    const size_t n_inputs = 1 + (size_t)rng_below(&rng, N_DONORS);
    const double divisor =
        divisors[rng_below(&rng, sizeof(divisors) / sizeof(divisors[0]))];
    const float *x[N_DONORS];
    const float *plain[N_DONORS];
    double w[N_DONORS];

    for (unsigned j = 0; j < n_inputs; j++) {
        x[j] = put_x(p, j);
        plain[j] = raw_x(p, j);
        w[j] = 2.0 * (double)rng_unit(&rng);
    }
    float *dst = put_out(p, p->n * sizeof(float), sizeof(float));
    k->weighted_sum(dst, x, w, n_inputs, divisor, p->n);
    ref()->weighted_sum(want, plain, w, n_inputs, divisor, p->n);
    same_floats("weighted_sum", k, p, dst, want, 0);

    const float *const b = put_b(p);
    dst = put_out(p, p->n * sizeof(float), sizeof(float));
    k->delta(dst, x[0], b, p->n);
    ref()->delta(want, plain[0], raw_b(p), p->n);
    same_floats("delta", k, p, dst, want, 0);

    const double t = 0.01 * (double)rng_unit(&rng);
    dst = put_out(p, p->n * sizeof(float), sizeof(float));
    k->nearswap(dst, b, x[0], t, p->n);
    ref()->nearswap(want, raw_b(p), plain[0], t, p->n);
    same_floats("nearswap", k, p, dst, want, 0);

    dst = put_out(p, p->n * sizeof(float), sizeof(float));
    k->ram(dst, b, x, w, n_inputs, t, p->n);
    ref()->ram(want, raw_b(p), plain, w, n_inputs, t, p->n);
    same_floats("ram", k, p, dst, want, 0);
}

static void test_linear(void **state)
{
    everywhere(state, sizeof(float), one_linear);
}

/* ---- gta ---- */

static void gta_case(const struct tvk_table *k, const struct place *p,
                     size_t n_donors)
{
    static const double lambdas[] = {1.0, 0.5, 0.3, -1.1, 0.0};
    double coef[N_DONORS];
    double weight[N_DONORS];
    const float *x[N_DONORS];
    const float *plain[N_DONORS];
    const uint64_t *masks[N_DONORS];
    const uint64_t *plain_masks[N_DONORS];
    const uint64_t choice = rng_u64(&rng);
    const int masked = (int)(choice & 1);
    struct tvk_gta g = {n_donors,
                        coef,
                        weight,
                        (int)(choice >> 1 & 1),
                        (int)(choice >> 2 & 1),
                        lambdas[(choice >> 3) % 5]};

    for (unsigned j = 0; j < n_donors; j++) {
        const int skip_mask = rng_below(&rng, 4) == 0;
        x[j] = put_x(p, j);
        plain[j] = raw_x(p, j);
        masks[j] = skip_mask ? NULL : put_mask(p, j);
        plain_masks[j] = skip_mask ? NULL : pool_mask[j];
        /* Equal and opposite weights make sums that are exactly zero, tenths
         * those that only rounding keeps from it. */
        weight[j] = p->n % 2 ? (double)rng_below(&rng, 5) / 2.0 - 1.0
                             : ((double)rng_below(&rng, 7) - 3.0) / 10.0;
        coef[j] = rng_below(&rng, 2) ? weight[j] : weight[j] / 0.3;
    }
    const float *const b = put_b(p);
    float *const dst = put_out(p, p->n * sizeof(float), sizeof(float));
    k->gta(dst, b, x, masked ? masks : NULL, &g, p->n);
    ref()->gta(want, raw_b(p), plain, masked ? plain_masks : NULL, &g, p->n);
    same_floats("gta", k, p, dst, want, 0);
}

static void one_gta(const struct tvk_table *k, const struct place *p)
{
    gta_case(k, p, (size_t)rng_below(&rng, 6));
    gta_case(k, p, 1 + (size_t)rng_below(&rng, N_DONORS));
}

static void test_gta(void **state)
{
    everywhere(state, sizeof(float), one_gta);
}

/* The most donors there can be. */
static void test_gta_many(void **state)
{
    const struct tvk_table *const k = row_of(state);
    double coef[TVK_DONORS_MAX];
    const float *x[TVK_DONORS_MAX];
    const uint64_t *masks[TVK_DONORS_MAX];
    const struct place p = {0, 77, GUARD_AFTER, 0, 3};
    struct tvk_gta g = {TVK_DONORS_MAX, coef, coef, 0, 1, 0.7};

    for (unsigned j = 0; j < TVK_DONORS_MAX; j++) {
        x[j] = raw_x(&p, j % N_DONORS);
        masks[j] = pool_mask[(j + 1) % N_DONORS];
        coef[j] = (double)rng_unit(&rng);
    }
    for (g.consensus = 0; g.consensus < 2; g.consensus++) {
        float *const dst = put_out(&p, p.n * sizeof(float), sizeof(float));
        k->gta(dst, raw_b(&p), x, masks, &g, p.n);
        ref()->gta(want, raw_b(&p), x, masks, &g, p.n);
        same_floats("gta", k, &p, dst, want, 0);
    }
}

/* ---- top-k ---- */

static uint32_t magnitude_of(const float *x, const float *b, size_t i)
{
    const float d = b != NULL ? x[i] - b[i] : x[i];
    return isnan(d) ? 0x7f800001u : bits_of(d) & 0x7fffffffu;
}

/* A pattern that may well be the k-th, or an extreme one. */
static uint32_t some_pattern(const struct place *p, const float *x,
                             const float *b)
{
    static const uint32_t extreme[] = {
        0, 1, 0x7f800000, 0x7f800001, 0x7fffffff, 0x80000000, 0xffffffff};
    const uint64_t r = rng_below(&rng, 16);
    if (r < 7)
        return extreme[r];
    if (p->n == 0)
        return 0;
    return magnitude_of(x, b, (size_t)rng_below(&rng, p->n));
}

static void one_topk(const struct tvk_table *k, const struct place *p)
{
    const int has_base = (int)rng_below(&rng, 3) != 0;
    const float *const x = put_x(p, 0);
    const float *const b = has_base ? put_b(p) : NULL;
    const float *const plain_b = has_base ? raw_b(p) : NULL;
    const uint32_t pattern = some_pattern(p, raw_x(p, 0), plain_b);

    assert_true(k->count_eq(x, b, pattern, p->n) ==
                ref()->count_eq(raw_x(p, 0), plain_b, pattern, p->n));

    uint32_t *const keys =
        put_out(p, p->n * sizeof(uint32_t), sizeof(uint32_t));
    static uint32_t want_keys[N_LARGEST];
    assert_int_equal(k->magnitudes(keys, x, b, p->n),
                     ref()->magnitudes(want_keys, raw_x(p, 0), plain_b, p->n));
    assert_same_bytes("magnitudes", keys, want_keys, p->n * 4);
    guard_buffer_check(&out);

    const uint64_t seen = rng_below(&rng, 10);
    const uint64_t limit = rng_below(&rng, seen + p->n + 2);
    uint64_t got_seen = seen;
    uint64_t want_seen = seen;
    uint64_t *const mask =
        put_out(p, words(p->n) * sizeof(uint64_t), sizeof(uint64_t));
    const uint64_t got =
        k->topk_mask(mask, x, b, pattern, &got_seen, limit, p->n);
    const uint64_t expected = ref()->topk_mask(
        want_mask, raw_x(p, 0), plain_b, pattern, &want_seen, limit, p->n);
    assert_same_bytes("topk_mask", mask, want_mask, words(p->n) * 8);
    guard_buffer_check(&out);
    assert_true(got == expected);
    assert_true(got_seen == want_seen);
}

static void test_topk(void **state)
{
    everywhere(state, sizeof(float), one_topk);
}

static size_t n_hist_calls;

/* Counts pile up over the calls: looking at all buckets each time is slow. */
static void one_hist_hi(const struct tvk_table *k, const struct place *p)
{
    const int has_base = (int)rng_below(&rng, 3) != 0;
    const float *const x = put_x(p, 0);
    const float *const b = has_base ? put_b(p) : NULL;
    uint32_t *const got = (uint32_t *)(void *)hist.data;

    k->hist_hi(got, x, b, p->n);
    ref()->hist_hi(want_hist, raw_x(p, 0), has_base ? raw_b(p) : NULL, p->n);
    n_hist_calls++;
    if (n_hist_calls % 32 == 0 || p->n == N_LARGEST)
        assert_same_bytes("hist_hi", got, want_hist, sizeof(want_hist));
    guard_buffer_check(&hist);
}

static void one_hist_lo(const struct tvk_table *k, const struct place *p)
{
    const int has_base = (int)rng_below(&rng, 3) != 0;
    const float *const x = put_x(p, 0);
    const float *const b = has_base ? put_b(p) : NULL;
    const float *const plain_b = has_base ? raw_b(p) : NULL;
    const uint32_t hi = some_pattern(p, raw_x(p, 0), plain_b) >> 15;
    uint32_t *const got = (uint32_t *)(void *)hist.data;

    k->hist_lo(got, hi, x, b, p->n);
    ref()->hist_lo(want_hist, hi, raw_x(p, 0), plain_b, p->n);
    n_hist_calls++;
    if (n_hist_calls % 32 == 0 || p->n == N_LARGEST)
        assert_same_bytes("hist_lo", got, want_hist,
                          TVK_HIST_LO * sizeof(uint32_t));
    guard_buffer_check(&hist);
}

static void one_hist_range(const struct tvk_table *k, const struct place *p)
{
    const int has_base = (int)rng_below(&rng, 3) != 0;
    const float *const x = put_x(p, 0);
    const float *const b = has_base ? put_b(p) : NULL;
    const float *const plain_b = has_base ? raw_b(p) : NULL;
    const uint32_t any = some_pattern(p, raw_x(p, 0), plain_b);
    const uint32_t at = any < 0x7f800001u ? any : 0x7f800001u;
    const uint32_t width = 1 + (uint32_t)rng_below(&rng, TVK_HIST_HI);
    const uint32_t before = (uint32_t)rng_below(&rng, width + 1);
    const uint32_t first = at > before ? at - before : 1;
    uint32_t *const got = (uint32_t *)(void *)hist.data;

    assert_int_equal(
        k->hist_range(got, first, width, x, b, p->n),
        ref()->hist_range(want_hist, first, width, raw_x(p, 0), plain_b, p->n));
    n_hist_calls++;
    if (n_hist_calls % 32 == 0 || p->n == N_LARGEST)
        assert_same_bytes("hist_range", got, want_hist,
                          TVK_HIST_HI * sizeof(uint32_t));
    guard_buffer_check(&hist);
}

/* ---- bf16 ---- */

/* The upper halves of the values of input j (the base: N_DONORS), at any
 * multiple of 2; *plain is what they are in fp32. */
static const void *put_halves(const struct place *p, unsigned j,
                              const float **plain)
{
    static float wide[N_DONORS + 1][N_LARGEST];
    const float *from = j < N_DONORS ? raw_x(p, j) : raw_b(p);
    unsigned char *const dst = guard_buffer_place(
        j < N_DONORS ? &in[j] : &base, 2 * p->n, p->side,
        p->side == GUARD_BEFORE ? (p->offset + 20 * j) % 64 : p->offset);

    for (size_t i = 0; i < p->n; i++) {
        const uint16_t h = (uint16_t)(bits_of(from[i]) >> 16);
        memcpy(dst + 2 * i, &h, sizeof h);
    }
    (void)ref()->bf16_to_f32(wide[j], dst, p->n);
    *plain = wide[j];
    return dst;
}

static void one_select_bf16(const struct tvk_table *k, const struct place *p)
{
    const float *plain_x = NULL;
    const float *plain_b = NULL;
    const void *const x = put_halves(p, 0, &plain_x);
    const void *const b = put_halves(p, N_DONORS, &plain_b);
    const uint32_t pattern = some_pattern(p, plain_x, plain_b);
    const uint32_t at = pattern < 0x7f800001u ? pattern : 0x7f800001u;
    const uint32_t width = 1 + (uint32_t)rng_below(&rng, TVK_HIST_HI);
    const uint32_t before = (uint32_t)rng_below(&rng, width + 1);
    const uint32_t first = at > before ? at - before : 1;
    uint32_t *const got_hist = (uint32_t *)(void *)hist.data;

    assert_int_equal(k->count_nonfinite_bf16(x, p->n),
                     ref()->count_nonfinite(plain_x, p->n));
    assert_int_equal(
        k->hist_range_bf16(got_hist, first, width, x, b, p->n),
        ref()->hist_range(want_hist, first, width, plain_x, plain_b, p->n));
    n_hist_calls++;
    if (n_hist_calls % 32 == 0 || p->n == N_LARGEST)
        assert_same_bytes("hist_range_bf16", got_hist, want_hist,
                          TVK_HIST_HI * sizeof(uint32_t));
    guard_buffer_check(&hist);

    const uint64_t seen = rng_below(&rng, 10);
    const uint64_t limit = rng_below(&rng, seen + p->n + 2);
    uint64_t got_seen = seen;
    uint64_t want_seen = seen;
    uint64_t *const mask =
        put_out(p, words(p->n) * sizeof(uint64_t), sizeof(uint64_t));
    assert_int_equal(
        k->topk_mask_bf16(mask, x, b, pattern, &got_seen, limit, p->n),
        ref()->topk_mask(want_mask, plain_x, plain_b, pattern, &want_seen,
                         limit, p->n));
    assert_same_bytes("topk_mask_bf16", mask, want_mask, words(p->n) * 8);
    guard_buffer_check(&out);
    assert_true(got_seen == want_seen);
}

static void one_gta_bf16(const struct tvk_table *k, const struct place *p)
{
    const size_t n_donors = (size_t)rng_below(&rng, N_DONORS + 1);
    const uint64_t choice = rng_u64(&rng);
    double weight[N_DONORS];
    const void *x[N_DONORS];
    const float *plain[N_DONORS];
    const uint64_t *masks[N_DONORS];
    const float *plain_b = NULL;
    const struct tvk_gta g = {n_donors,
                              weight,
                              weight,
                              (int)(choice >> 1 & 1),
                              (int)(choice >> 2 & 1),
                              choice >> 3 & 1 ? 1.0 : 0.3};
    static unsigned char expected[2 * N_LARGEST];

    for (unsigned j = 0; j < n_donors; j++) {
        x[j] = put_halves(p, j, &plain[j]);
        masks[j] = rng_below(&rng, 4) == 0 ? NULL : put_mask(p, j);
        weight[j] = (double)rng_below(&rng, 5) / 2.0 - 1.0;
    }
    const void *const b = put_halves(p, N_DONORS, &plain_b);
    unsigned char *const dst = put_out(p, 2 * p->n, 2);
    const uint64_t bad =
        k->gta_bf16(dst, b, x, choice & 1 ? masks : NULL, &g, p->n);
    ref()->gta(want, plain_b, plain, choice & 1 ? masks : NULL, &g, p->n);
    assert_int_equal(bad, ref()->f32_to_bf16(expected, want, p->n));
    for (size_t i = 0; i < p->n; i++)
        if (!isnan(want[i]))
            assert_memory_equal(dst + 2 * i, expected + 2 * i, 2);
    guard_buffer_check(&out);
}

/* ---- merges of bf16 that only a look at all 53 bits decides ----
 * Coarse numbers give sums that cancel, votes that tie and results midway
 * between two bf16; others are of all sizes, arbitrary or not numbers. */

enum { N_CLOSE = 777 };

static uint16_t half_of(float v)
{
    uint16_t h = 0;
    (void)ref()->f32_to_bf16(&h, &v, 1);
    return h;
}

static float of_half(uint16_t h)
{
    float v = 0.0f;
    (void)ref()->bf16_to_f32(&v, &h, 1);
    return v;
}

static uint16_t close_base(unsigned kind)
{
    const uint16_t any = (uint16_t)rng_u64(&rng);

    switch (kind) {
    case 0:
        return (uint16_t)((any & 0x807f) | (110 + rng_below(&rng, 20)) << 7);
    case 1:
        return (uint16_t)((any & 0x8000) | rng_below(&rng, 0x300));
    case 2:
        return half_of(((float)rng_below(&rng, 33) - 16.0f) / 16.0f);
    default:
        return any;
    }
}

static uint16_t close_to(uint16_t from, unsigned kind)
{
    const float b = of_half(from);
    const float step = (float)rng_below(&rng, 33) - 16.0f;

    switch (kind) {
    case 0:
        return (uint16_t)(from + rng_below(&rng, 9) - 4);
    case 1:
        return half_of(b + b * step / 32.0f);
    case 2:
        return half_of(-b - b * step / 512.0f);
    case 3:
        return half_of(b + step * 0x1p-9f);
    case 4:
        return half_of(ldexpf(b, 2 * (int)step));
    default:
        return close_base((unsigned)rng_below(&rng, 4));
    }
}

static double close_weight(unsigned kind)
{
    switch (kind) {
    case 0:
        return 1.0;
    case 1:
        return (double)(1 + rng_below(&rng, 12)) / 10.0;
    case 2:
        return ldexp(1.0, (int)rng_below(&rng, 6) - 3);
    case 3:
        return (double)(1 + rng_below(&rng, 1u << 30)) * 0x1p-30;
    default:
        return (double)rng_below(&rng, 21) / 8.0 - 0.75;
    }
}

static void one_close(const struct tvk_table *k)
{
    static uint16_t b[N_CLOSE], x[5][N_CLOSE], got[N_CLOSE], expected[N_CLOSE];
    static uint64_t mask[5][N_CLOSE / 64 + 1];
    const size_t n_donors = 2 + (size_t)rng_below(&rng, 4);
    const unsigned kind = (unsigned)rng_below(&rng, 5);
    const unsigned kind_b = (unsigned)rng_below(&rng, 6);
    const unsigned kind_x = (unsigned)rng_below(&rng, 8);
    const double rescale = (double)(1 + rng_below(&rng, 10)) / 10.0;
    const double alike = close_weight(kind);
    const uint64_t choice = rng_u64(&rng);
    double coef[5], weight[5];
    const void *donors[5];
    const uint64_t *masks[5];
    const struct tvk_gta g = {
        n_donors,
        coef,
        weight,
        1,
        (choice & 3) != 0,
        choice & 4 ? 1.0 : (double)rng_below(&rng, 40) / 8.0 - 1.25};

    for (size_t j = 0; j < n_donors; j++) {
        weight[j] = choice & 8 ? alike : close_weight(kind);
        coef[j] = choice & 16 ? weight[j] / rescale : weight[j];
        if ((choice >> 5 & 7) == 0)
            coef[j] = ldexp(coef[j], (int)rng_below(&rng, 36) - 18);
        for (size_t i = 0; i < N_CLOSE / 64 + 1; i++)
            mask[j][i] = choice & 256 ? rng_u64(&rng) : ~UINT64_C(0);
        donors[j] = x[j];
        masks[j] = rng_below(&rng, 8) == 0 ? NULL : mask[j];
    }
    for (size_t i = 0; i < N_CLOSE; i++) {
        b[i] = close_base(kind_b < 4 ? kind_b : (unsigned)rng_below(&rng, 4));
        for (size_t j = 0; j < n_donors; j++)
            x[j][i] = close_to(b[i], kind_x < 6 ? kind_x
                                                : (unsigned)rng_below(&rng, 6));
    }
    const uint64_t *const *const m = choice & 512 ? masks : NULL;
    assert_int_equal(k->gta_bf16(got, b, donors, m, &g, N_CLOSE),
                     ref()->gta_bf16(expected, b, donors, m, &g, N_CLOSE));
    for (size_t i = 0; i < N_CLOSE; i++)
        if (!isnan(of_half(expected[i])))
            assert_int_equal(got[i], expected[i]);
}

static void test_gta_bf16_close(void **state)
{
    const struct tvk_table *const k = row_of(state);

    for (unsigned i = 0; i < 2000; i++)
        one_close(k);
}

static void hist_clear(size_t n_buckets)
{
    void *const got =
        guard_buffer_place(&hist, n_buckets * sizeof(uint32_t), GUARD_AFTER, 0);
    memset(got, 0, n_buckets * sizeof(uint32_t));
    memset(want_hist, 0, sizeof(want_hist));
}

static void test_hist_hi(void **state)
{
    hist_clear(TVK_HIST_HI);
    everywhere(state, sizeof(float), one_hist_hi);
}

static void test_hist_lo(void **state)
{
    hist_clear(TVK_HIST_LO);
    everywhere(state, sizeof(float), one_hist_lo);
}

static void test_hist_range(void **state)
{
    hist_clear(TVK_HIST_HI);
    everywhere(state, sizeof(float), one_hist_range);
}

static void test_select_bf16(void **state)
{
    hist_clear(TVK_HIST_HI);
    everywhere(state, 2, one_select_bf16);
}

static void test_gta_bf16(void **state)
{
    everywhere(state, 2, one_gta_bf16);
}

/* ---- random masks ---- */

static void one_philox(const struct tvk_table *k, const struct place *p)
{
    static const uint64_t thresholds[] = {0,          1,          0x80000000,
                                          0xffffffff, 1ull << 32, 1ull << 33};
    uint64_t start = rng_u64(&rng) / 64 * 64;
    uint64_t threshold = rng_u32(&rng);
    const uint64_t key = rng_u64(&rng);
    const uint64_t name = rng_u64(&rng);

    /* Around 2^34 the counter carries into its upper word. */
    if (rng_below(&rng, 2))
        start = (1ull << 34) - 64 * rng_below(&rng, 5);
    if (rng_below(&rng, 4) == 0)
        threshold = thresholds[rng_below(&rng, 6)];
    uint64_t *const mask =
        put_out(p, words(p->n) * sizeof(uint64_t), sizeof(uint64_t));
    const uint64_t got =
        k->philox_mask(mask, start, key, name, threshold, p->n);
    const uint64_t expected =
        ref()->philox_mask(want_mask, start, key, name, threshold, p->n);
    assert_same_bytes("philox_mask", mask, want_mask, words(p->n) * 8);
    guard_buffer_check(&out);
    uint32_t want_words[N_LARGEST];
    uint32_t *const got_words =
        put_out(p, p->n * sizeof(uint32_t), sizeof(uint32_t));
    start += rng_below(&rng, 64);
    k->philox_words(got_words, start, key, name, p->n);
    ref()->philox_words(want_words, start, key, name, p->n);
    assert_same_bytes("philox_words", got_words, want_words, p->n * 4);
    guard_buffer_check(&out);
    assert_true(got == expected);
}

static void test_philox(void **state)
{
    everywhere(state, sizeof(uint64_t), one_philox);
}

/* Keys as differences of bf16 numbers have them, as any have, and rows of which
 * most are equal, are 0 or share a bucket. */
static uint32_t some_key(uint64_t kind)
{
    const uint32_t any = rng_u32(&rng);

    switch (kind) {
    case 0:
        return any % 0x7f800002u;
    case 1: /* few values with no lower bits, others now and then */
        return 0x3b000000u + (any % 24 << 16) +
               (any >> 28 == 0 ? any >> 8 & 0xffffu : 0);
    case 2: /* mostly zeros, a little far below the largest */
        return any % 4 != 0 ? 0 : any % 8 == 0 ? 0x3b000000u : any >> 3;
    case 3:
        return 0x3c010000u;
    case 4: /* one bucket, all different */
        return 0x3c000000u + (any & 0xffffu);
    default:
        return 0x3b000000u + (any & 0x03ffffffu);
    }
}

static void one_rank(const struct tvk_table *k, const struct place *p)
{
    static const double least[] = {0.4, 0.0, 1.0, 0.9999999999999, 1e-11, 0.5};
    static const double span[] = {0.2, 1.0, 0.0, 1e-13, 1e-9, 1e-9};
    static _Alignas(
        64) unsigned char scratch[TVK_RANK_EACH * N_LARGEST + TVK_RANK_FIXED];
    const uint64_t kind = rng_below(&rng, 6);
    const uint64_t of = rng_below(&rng, 10);
    const struct tvk_odds odds = {of < 6 ? least[of] : 0.1 * (double)of - 0.4,
                                  of < 6 ? span[of] : 0.3};
    uint32_t *const keys =
        guard_buffer_place(&in[0], 4 * p->n, p->side, p->offset);
    uint32_t *const drawn =
        guard_buffer_place(&in[1], 4 * p->n, p->side, p->offset);
    uint32_t most = 0;

    for (size_t i = 0; i < p->n; i++) {
        keys[i] = some_key(kind);
        most = keys[i] > most ? keys[i] : most;
        drawn[i] = rng_u32(&rng);
    }
    uint64_t *const mask =
        put_out(p, words(p->n) * sizeof(uint64_t), sizeof(uint64_t));
    k->rank_mask(mask, keys, drawn, &odds, scratch, most, p->n);
    ref()->rank_mask(want_mask, keys, drawn, &odds, scratch, most, p->n);
    assert_same_bytes("rank_mask", mask, want_mask, words(p->n) * 8);
    guard_buffer_check(&out);
}

static void test_rank(void **state)
{
    everywhere(state, sizeof(uint64_t), one_rank);
}

/* ---- reductions ---- */

static void same_dots(const struct tvk_table *k, const struct place *p,
                      const struct tvk_dots *got,
                      const struct tvk_dots *expected)
{
    same_double("dots.aa", k, p, got->aa, expected->aa);
    same_double("dots.bb", k, p, got->bb, expected->bb);
    same_double("dots.ab", k, p, got->ab, expected->ab);
}

static void one_reduction(const struct tvk_table *k, const struct place *p)
{
    const float *const x = put_x(p, 0);
    const float *const b = put_b(p);
    const uint64_t *const mask = put_mask(p, 0);
    const float *const px = raw_x(p, 0);
    const float *const pb = raw_b(p);
    const uint64_t *const pm = pool_mask[0];
    struct tvk_dots got, expected;

    k->dots(&got, x, b, p->n);
    ref()->dots(&expected, px, pb, p->n);
    same_dots(k, p, &got, &expected);
    k->dots(&got, x, x, p->n);
    ref()->dots(&expected, px, px, p->n);
    same_dots(k, p, &got, &expected);

    for (unsigned masked = 0; masked < 2; masked++) {
        double all = 0.0, kept = 0.0;
        k->abs_sums(&all, &kept, x, b, masked ? mask : NULL, p->n);
        same_double("abs_sums all", k, p, all,
                    ref()->abs_sum(px, pb, NULL, p->n));
        same_double("abs_sums kept", k, p, kept,
                    ref()->abs_sum(px, pb, masked ? pm : NULL, p->n));
    }
    same_double("square_sum", k, p, k->square_sum(x, b, NULL, p->n),
                ref()->square_sum(px, pb, NULL, p->n));
    same_double("square_sum mask", k, p, k->square_sum(x, NULL, mask, p->n),
                ref()->square_sum(px, NULL, pm, p->n));
    same_double("square_sum base mask", k, p, k->square_sum(x, b, mask, p->n),
                ref()->square_sum(px, pb, pm, p->n));
    same_double("abs_sum", k, p, k->abs_sum(x, NULL, NULL, p->n),
                ref()->abs_sum(px, NULL, NULL, p->n));
    same_double("abs_sum base", k, p, k->abs_sum(x, b, NULL, p->n),
                ref()->abs_sum(px, pb, NULL, p->n));
    same_double("abs_sum mask", k, p, k->abs_sum(x, NULL, mask, p->n),
                ref()->abs_sum(px, NULL, pm, p->n));
    same_double("abs_sum base mask", k, p, k->abs_sum(x, b, mask, p->n),
                ref()->abs_sum(px, pb, pm, p->n));

    assert_true(k->count_nonfinite(x, p->n) ==
                ref()->count_nonfinite(px, p->n));

    struct tvk_stats s, t;
    k->stats(&s, x, p->n);
    ref()->stats(&t, px, p->n);
    same_double("stats.sum", k, p, s.sum, t.sum);
    same_double("stats.sum_sq", k, p, s.sum_sq, t.sum_sq);
    assert_int_equal(bits_of(s.min), bits_of(t.min));
    assert_int_equal(bits_of(s.max), bits_of(t.max));
    assert_true(s.n_nonfinite == t.n_nonfinite);
    assert_true(s.n_zero == t.n_zero);
}

static void test_reductions(void **state)
{
    everywhere(state, sizeof(float), one_reduction);
}

static void test_whole_leaf(void **state)
{
    const struct tvk_table *const k = row_of(state);
    const struct place p = {0, TVK_LEAF, GUARD_AFTER, 0, 0};
    struct tvk_dots got, expected;
    struct tvk_stats s, t;

    k->dots(&got, leaf_a, leaf_b, TVK_LEAF);
    ref()->dots(&expected, leaf_a, leaf_b, TVK_LEAF);
    same_dots(k, &p, &got, &expected);
    same_double("abs_sum", k, &p, k->abs_sum(leaf_a, leaf_b, NULL, TVK_LEAF),
                ref()->abs_sum(leaf_a, leaf_b, NULL, TVK_LEAF));
    k->stats(&s, leaf_a, TVK_LEAF);
    ref()->stats(&t, leaf_a, TVK_LEAF);
    same_double("stats.sum", k, &p, s.sum, t.sum);
    same_double("stats.sum_sq", k, &p, s.sum_sq, t.sum_sq);
}

/* Only zeros of both signs: the extremes are +0 whatever came first. */
static void test_stats_zeros(void **state)
{
    const struct tvk_table *const k = row_of(state);
    float x[70];
    struct tvk_stats s;

    for (size_t n = 1; n <= 70; n++) {
        for (size_t i = 0; i < n; i++)
            x[i] = n % 2 == 1 || rng_below(&rng, 2) ? -0.0f : 0.0f;
        k->stats(&s, x, n);
        assert_int_equal(bits_of(s.min), 0);
        assert_int_equal(bits_of(s.max), 0);
        assert_true(s.n_zero == n && s.n_nonfinite == 0);
    }
}

/* ---- several task vectors ---- */

static void one_several(const struct tvk_table *k, const struct place *p)
{
    static const double weight[N_DONORS] = {0.3, 0.0, 1.1,  -0.2, 0.7,
                                            0.4, 2.0, 0.25, 0.1};
    static const double epsilon[] = {1e-3, 0.0, 0.25};
    const size_t n_donors = 1 + (size_t)rng_below(&rng, N_DONORS);
    const float *x[N_DONORS];
    const float *px[N_DONORS];
    const float *const b = put_b(p);
    const float *const pb = raw_b(p);
    const uint64_t *const mask = put_mask(p, 0);
    float *const dst = put_out(p, p->n * sizeof(float), sizeof(float));

    for (unsigned j = 0; j < n_donors; j++) {
        x[j] = put_x(p, j);
        px[j] = raw_x(p, j);
    }
    k->variance(dst, b, x, n_donors, p->n);
    ref()->variance(want, pb, px, n_donors, p->n);
    same_floats("variance", k, p, dst, want, 0);

    k->elect(dst, b, x, NULL, weight, n_donors, p->n);
    ref()->elect(want, pb, px, NULL, weight, n_donors, p->n);
    same_floats("elect", k, p, dst, want, 0);
    k->elect(dst, b, x, mask, weight, n_donors, p->n);
    ref()->elect(want, pb, px, pool_mask[0], weight, n_donors, p->n);
    same_floats("elect mask", k, p, dst, want, 0);

    const double least = epsilon[p->kind];
    k->ram(dst, b, x, weight, n_donors, least, p->n);
    ref()->ram(want, pb, px, weight, n_donors, least, p->n);
    same_floats("ram", k, p, dst, want, 0);
    k->nearswap(dst, b, x[0], least, p->n);
    ref()->nearswap(want, pb, px[0], least, p->n);
    same_floats("nearswap", k, p, dst, want, 0);

    if (p->n > 0) {
        memcpy(dst, px[0], p->n * sizeof(float));
        memcpy(want, px[0], p->n * sizeof(float));
    }
    k->keep(dst, mask, p->n);
    ref()->keep(want, pool_mask[0], p->n);
    same_floats("keep", k, p, dst, want, 1);
}

static void test_several(void **state)
{
    everywhere(state, sizeof(float), one_several);
}

/* ---- rows as distributions ---- */

/* Around values of e^x of all sizes, now and then something special. */
static double some_exp(void)
{
    if (rng_below(&rng, 50) == 0)
        return (double)special();
    return ldexp(1.0 + (double)rng_unit(&rng), -(int)rng_below(&rng, 60));
}

static void one_row(const struct tvk_table *k, const struct place *p)
{
    static double e[N_LARGEST], f[N_LARGEST];
    const float *const x = put_x(p, 0);
    const float *const b = put_b(p);
    const float *const px = raw_x(p, 0);
    const float *const pb = raw_b(p);
    float *const dst = put_out(p, p->n * sizeof(float), sizeof(float));
    const double most = (double)ref()->highest(px, p->n);

    k->change_by(dst, x, b, 1.7, p->n);
    ref()->change_by(want, px, pb, 1.7, p->n);
    same_floats("change_by", k, p, dst, want, 0);
    assert_int_equal(bits_of(k->highest(x, p->n)),
                     bits_of(ref()->highest(px, p->n)));

    double *const to =
        guard_buffer_place(&exps[0], p->n * sizeof(double), p->side, 0);
    same_double("softmax", k, p, k->softmax(to, x, most, p->n),
                ref()->softmax(e, px, most, p->n));
    for (size_t i = 0; i < p->n; i++)
        same_double("exp", k, p, to[i], e[i]);

    for (size_t i = 0; i < p->n; i++) {
        f[i] = some_exp();
        to[i] = p->kind == 0 ? f[i] * (1.0 + 0.01 * (double)px[i]) : some_exp();
        e[i] = to[i];
    }
    double *const other =
        guard_buffer_place(&exps[1], p->n * sizeof(double), p->side, 0);
    if (p->n > 0)
        memcpy(other, f, p->n * sizeof(double));
    same_double("divergence", k, p, k->divergence(to, other, 3.0, 2.7, p->n),
                ref()->divergence(e, f, 3.0, 2.7, p->n));
    guard_buffer_check(&exps[0]);
}

static void test_row(void **state)
{
    everywhere(state, sizeof(float), one_row);
}

/* ---- low rank ---- */

static void one_lowrank(const struct tvk_table *k, const struct place *p)
{
    static const size_t ranks[] = {0, 1, 2, 3, 8, 17};
    static const size_t widths[] = {1, 3, 7, 8, 15, 16, 64, 67, 200};
    const size_t rank = ranks[rng_below(&rng, 6)];
    const size_t cols = widths[rng_below(&rng, 9)];
    const uint64_t start = rng_below(&rng, 2 * cols);
    const size_t rows = p->n == 0 ? 0 : (size_t)((start + p->n - 1) / cols + 1);
    const double scale = (double)rng_unit(&rng);
    float *const dst = put_out(p, p->n * sizeof(float), sizeof(float));

    if (rows * rank > TVK_LEAF)
        return;
    /* The factors sit right in front of a page that faults. */
    float *const r =
        guard_buffer_place(&in[1], rank * cols * sizeof(float), GUARD_AFTER, 0);
    const float *const from = pool_x[p->kind][1];
    if (rank > 0)
        memcpy(r, from, rank * cols * sizeof(float));
    const float *const l = p->kind == 0 ? leaf_a : NULL;
    static float any[TVK_LEAF];
    if (l == NULL)
        for (size_t i = 0; i < rows * rank; i++)
            any[i] = pool_x[p->kind][2][i % N_POOL];
    if (p->n > 0) {
        memcpy(dst, raw_x(p, 0), p->n * sizeof(float));
        memcpy(want, raw_x(p, 0), p->n * sizeof(float));
    }
    k->lowrank_add(dst, l != NULL ? l : any, r, scale, rank, cols, start, p->n);
    ref()->lowrank_add(want, l != NULL ? l : any, from, scale, rank, cols,
                       start, p->n);
    same_floats("lowrank_add", k, p, dst, want, 0);
}

static void test_lowrank(void **state)
{
    everywhere(state, sizeof(float), one_lowrank);
}

/* ---- parts make the whole ---- */

static void one_split(const struct tvk_table *k, const struct place *p)
{
    if (p->side == GUARD_AFTER)
        return;
    const size_t cut = p->n == 0 ? 0 : (size_t)rng_below(&rng, p->n + 1);
    const size_t word_cut = cut / 64 * 64;
    const float *const x[2] = {raw_x(p, 0), raw_x(p, 1)};
    const float *const x2[2] = {x[0] + cut, x[1] + cut};
    const float *const xw[2] = {x[0] + word_cut, x[1] + word_cut};
    const float *const b = raw_b(p);
    const double w[2] = {0.3, 0.9};
    const uint64_t *const m[2] = {pool_mask[0], pool_mask[1]};
    const uint64_t *const m2[2] = {m[0] + word_cut / 64, m[1] + word_cut / 64};
    const struct tvk_gta g = {2, w, w, 1, 1, 0.5};
    float *const dst = put_out(p, p->n * sizeof(float), sizeof(float));

    k->weighted_sum(dst, x, w, 2, 1.2, cut);
    k->weighted_sum(dst + cut, x2, w, 2, 1.2, p->n - cut);
    k->weighted_sum(want, x, w, 2, 1.2, p->n);
    same_floats("weighted_sum in parts", k, p, dst, want, 0);

    k->gta(dst, b, x, m, &g, word_cut);
    k->gta(dst + word_cut, b + word_cut, xw, m2, &g, p->n - word_cut);
    k->gta(want, b, x, m, &g, p->n);
    same_floats("gta in parts", k, p, dst, want, 0);

    memcpy(dst, x[0], p->n * sizeof(float));
    memcpy(want, x[0], p->n * sizeof(float));
    k->lowrank_add(dst, leaf_a, leaf_b, 0.1, 5, 61, 7, cut);
    k->lowrank_add(dst + cut, leaf_a, leaf_b, 0.1, 5, 61, 7 + cut, p->n - cut);
    k->lowrank_add(want, leaf_a, leaf_b, 0.1, 5, 61, 7, p->n);
    same_floats("lowrank_add in parts", k, p, dst, want, 0);

    uint64_t *const mask =
        put_out(p, words(p->n) * sizeof(uint64_t), sizeof(uint64_t));
    uint64_t kept = k->philox_mask(mask, 640, 1, 2, 1u << 30, word_cut);
    kept += k->philox_mask(mask + word_cut / 64, 640 + word_cut, 1, 2, 1u << 30,
                           p->n - word_cut);
    assert_true(kept == k->philox_mask(want_mask, 640, 1, 2, 1u << 30, p->n));
    assert_same_bytes("philox in parts", mask, want_mask, words(p->n) * 8);

    const uint32_t pattern = some_pattern(p, x[0], b);
    const uint64_t limit = rng_below(&rng, p->n + 1);
    uint64_t seen = 0;
    uint64_t whole_seen = 0;
    kept = k->topk_mask(mask, x[0], b, pattern, &seen, limit, word_cut);
    kept += k->topk_mask(mask + word_cut / 64, xw[0], b + word_cut, pattern,
                         &seen, limit, p->n - word_cut);
    assert_true(kept == k->topk_mask(want_mask, x[0], b, pattern, &whole_seen,
                                     limit, p->n));
    assert_true(seen == whole_seen);
    assert_same_bytes("topk in parts", mask, want_mask, words(p->n) * 8);
}

static void test_split(void **state)
{
    everywhere(state, sizeof(uint64_t), one_split);
}

/* Nothing above was left to the CPU quietly. */
static void test_device(void **state)
{
    (void)state;
    if (!device_table)
        skip();
    still_works(device_table);
    assert_true(tvk_cuda_launches(device) > 10000);
}

/* test_variants [ROW]: "ref", "avx2", "avx512", "cuda"; all by default. */
int main(int argc, char **argv)
{
    static int row[N_ROWS] = {TVK_REF, TVK_AVX2, TVK_AVX512, ROW_CUDA};
    char filter[32];
#define ROWS(fn)                                                               \
    {#fn " ref", fn, NULL, NULL, &row[0]},                                     \
        {#fn " avx2", fn, NULL, NULL, &row[1]},                                \
        {#fn " avx512", fn, NULL, NULL, &row[2]},                              \
    {                                                                          \
#fn " cuda", fn, NULL, NULL, &row[3]                                   \
    }
    const struct CMUnitTest tests[] = {
        ROWS(test_convert),
        ROWS(test_split_bf16),
        ROWS(test_linear),
        ROWS(test_gta),
        ROWS(test_gta_many),
        ROWS(test_topk),
        ROWS(test_hist_hi),
        ROWS(test_hist_lo),
        ROWS(test_hist_range),
        ROWS(test_select_bf16),
        ROWS(test_gta_bf16),
        ROWS(test_gta_bf16_close),
        ROWS(test_philox),
        ROWS(test_rank),
        ROWS(test_rank),
        ROWS(test_reductions),
        ROWS(test_whole_leaf),
        ROWS(test_stats_zeros),
        ROWS(test_several),
        ROWS(test_row),
        ROWS(test_lowrank),
        ROWS(test_split),
        {"test_device cuda", test_device, NULL, NULL, NULL},
    };
    if (argc > 1) {
        (void)snprintf(filter, sizeof filter, "* %s", argv[1]);
        cmocka_set_test_filter(filter);
    }
    return cmocka_run_group_tests(tests, fixture_open, fixture_close);
}
