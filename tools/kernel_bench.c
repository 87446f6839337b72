/* SPDX-License-Identifier: Apache-2.0 */
/*
 * kernel_bench.c - how fast each kernel goes, and how fast memory would let it.
 *
 *   tv_kernel_bench [--mib N] [--repeats N]
 *
 * Prints one line of JSON per kernel and instruction set: bytes that it must
 * move, its best time, and the best time of the roofline: the same bytes moved
 * by memcpy (which moves as many as it reads and writes). Arrays are larger
 * than any cache. They are timed in pieces, and the best of the repeats counts
 * for each piece: other work on the machine only ever adds, and what it
 * disturbs are a few pieces at a time.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tv/alloc.h"
#include "tv/kernels.h"

#define DONORS 2u

struct arrays {
    size_t n;
    float *b, *x[DONORS], *dst;
    /* 2 bytes per element: of b, of both x, a result; then as large as all
     * others. */
    unsigned char *half, *half_x[DONORS], *half_dst;
    void *copy;
    uint64_t *mask[DONORS];
    uint32_t *hist;
    double *best; /* seconds of each piece: of each row, then of copying */
};

struct kernel {
    const char *name;
    size_t bytes; /* per element */
    void (*run)(const struct tvk_table *k, const struct arrays *a, size_t at,
                size_t n);
};

/* Elements per call: what the engine feeds; per piece that is timed. */
#define BLOCK 2048u
#define PIECE 65536u

static const double weights[DONORS] = {0.7, 0.5};

static struct tvk_gta gta_call(int consensus)
{
    return (struct tvk_gta){.n_donors = DONORS,
                            .coef = weights,
                            .weight = weights,
                            .consensus = consensus,
                            .normalize = consensus,
                            .lambda = 1.0};
}

static void run_widen(const struct tvk_table *k, const struct arrays *a,
                      size_t at, size_t n)
{
    (void)k->bf16_to_f32(a->dst + at, a->half + 2 * at, n);
}

static void run_widen_f16(const struct tvk_table *k, const struct arrays *a,
                          size_t at, size_t n)
{
    (void)k->f16_to_f32(a->dst + at, a->half + 2 * at, n);
}

static void run_narrow(const struct tvk_table *k, const struct arrays *a,
                       size_t at, size_t n)
{
    (void)k->f32_to_bf16(a->half_dst + 2 * at, a->b + at, n);
}

static void run_narrow_f16(const struct tvk_table *k, const struct arrays *a,
                           size_t at, size_t n)
{
    (void)k->f32_to_f16(a->half_dst + 2 * at, a->b + at, n);
}

static void run_sum(const struct tvk_table *k, const struct arrays *a,
                    size_t at, size_t n)
{
    const float *const x[DONORS] = {a->x[0] + at, a->x[1] + at};
    k->weighted_sum(a->dst + at, x, weights, DONORS, 1.0, n);
}

static void run_delta(const struct tvk_table *k, const struct arrays *a,
                      size_t at, size_t n)
{
    k->delta(a->dst + at, a->x[0] + at, a->b + at, n);
}

static void run_gta(const struct tvk_table *k, const struct arrays *a,
                    size_t at, size_t n)
{
    const float *const x[DONORS] = {a->x[0] + at, a->x[1] + at};
    const struct tvk_gta call = gta_call(0);
    k->gta(a->dst + at, a->b + at, x, NULL, &call, n);
}

static void run_elect(const struct tvk_table *k, const struct arrays *a,
                      size_t at, size_t n)
{
    const float *const x[DONORS] = {a->x[0] + at, a->x[1] + at};
    const uint64_t *const m[DONORS] = {a->mask[0] + at / 64,
                                       a->mask[1] + at / 64};
    const struct tvk_gta call = gta_call(1);
    k->gta(a->dst + at, a->b + at, x, m, &call, n);
}

static void run_nearswap(const struct tvk_table *k, const struct arrays *a,
                         size_t at, size_t n)
{
    k->nearswap(a->dst + at, a->b + at, a->x[0] + at, 1e-3, n);
}

static void run_ram(const struct tvk_table *k, const struct arrays *a,
                    size_t at, size_t n)
{
    const float *const x[DONORS] = {a->x[0] + at, a->x[1] + at};
    k->ram(a->dst + at, a->b + at, x, weights, DONORS, 1e-3, n);
}

static void run_hist(const struct tvk_table *k, const struct arrays *a,
                     size_t at, size_t n)
{
    k->hist_hi(a->hist, a->x[0] + at, a->b + at, n);
}

static void run_range(const struct tvk_table *k, const struct arrays *a,
                      size_t at, size_t n)
{
    /* |x - b| of about 0.0026, sigma 0.002: some 0.5% of the entries */
    (void)k->hist_range(a->hist, 0x3b2a0000u, 0x10000u, a->x[0] + at, a->b + at,
                        n);
}

static void run_topk(const struct tvk_table *k, const struct arrays *a,
                     size_t at, size_t n)
{
    uint64_t seen = 0;
    (void)k->topk_mask(a->mask[0] + at / 64, a->x[0] + at, a->b + at,
                       0x3b280000u, &seen, UINT64_MAX, n);
}

static void run_elect_bf16(const struct tvk_table *k, const struct arrays *a,
                           size_t at, size_t n)
{
    const void *const x[DONORS] = {a->half_x[0] + 2 * at,
                                   a->half_x[1] + 2 * at};
    const uint64_t *const m[DONORS] = {a->mask[0] + at / 64,
                                       a->mask[1] + at / 64};
    const struct tvk_gta call = gta_call(1);
    (void)k->gta_bf16(a->half_dst + 2 * at, a->half + 2 * at, x, m, &call, n);
}

static void run_sum_bf16(const struct tvk_table *k, const struct arrays *a,
                         size_t at, size_t n)
{
    const void *const x[DONORS] = {a->half_x[0] + 2 * at,
                                   a->half_x[1] + 2 * at};
    const struct tvk_gta call = gta_call(0);
    (void)k->gta_bf16(a->half_dst + 2 * at, a->half + 2 * at, x, NULL, &call,
                      n);
}

static void run_range_bf16(const struct tvk_table *k, const struct arrays *a,
                           size_t at, size_t n)
{
    (void)k->hist_range_bf16(a->hist, 0x3b2a0000u, 0x10000u,
                             a->half_x[0] + 2 * at, a->half + 2 * at, n);
}

static void run_philox(const struct tvk_table *k, const struct arrays *a,
                       size_t at, size_t n)
{
    (void)k->philox_mask(a->mask[0] + at / 64, at, 1, 2, 0x80000000u, n);
}

static void run_dots(const struct tvk_table *k, const struct arrays *a,
                     size_t at, size_t n)
{
    struct tvk_dots d;
    k->dots(&d, a->x[0] + at, a->x[1] + at, n);
}

static void run_abs_sum(const struct tvk_table *k, const struct arrays *a,
                        size_t at, size_t n)
{
    volatile double sum = k->abs_sum(a->x[0] + at, a->b + at, NULL, n);
    (void)sum;
}

static void run_count(const struct tvk_table *k, const struct arrays *a,
                      size_t at, size_t n)
{
    volatile uint64_t bad = k->count_nonfinite(a->b + at, n);
    (void)bad;
}

static const struct kernel kernels[] = {
    {"bf16_to_f32", 6, run_widen},
    {"f16_to_f32", 6, run_widen_f16},
    {"f32_to_bf16", 6, run_narrow},
    {"f32_to_f16", 6, run_narrow_f16},
    {"weighted_sum, 2", 12, run_sum},
    {"delta", 12, run_delta},
    {"gta sum, 2", 16, run_gta},
    {"gta elect, 2, masks", 16, run_elect},
    {"nearswap", 12, run_nearswap},
    {"ram, 2", 16, run_ram},
    {"hist_hi", 8, run_hist},
    {"hist_range", 8, run_range},
    {"topk_mask", 8, run_topk},
    {"gta_bf16 sum, 2", 8, run_sum_bf16},
    {"gta_bf16 elect, 2, masks", 8, run_elect_bf16},
    {"hist_range_bf16", 4, run_range_bf16},
    {"philox_mask", 0, run_philox},
    {"dots", 8, run_dots},
    {"abs_sum", 8, run_abs_sum},
    {"count_nonfinite", 4, run_count},
};

static double now(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

static void keep_best(double *best, double seconds, int is_first)
{
    if (is_first || seconds < *best)
        *best = seconds;
}

static void run_once(const struct tvk_table *t, const struct kernel *k,
                     const struct arrays *a, double *best, int is_first)
{
    for (size_t i = 0; i < a->n; i += PIECE) {
        const double t0 = now();
        for (size_t at = i; at < i + PIECE; at += BLOCK)
            k->run(t, a, at, BLOCK);
        keep_best(&best[i / PIECE], now() - t0, is_first);
    }
}

/* Moves as many bytes: half of them read, half written. */
static void copy_once(const struct kernel *k, const struct arrays *a,
                      double *best, int is_first)
{
    const size_t each = k->bytes * PIECE / 2;

    for (size_t i = 0; i < a->n / PIECE; i++) {
        const double t0 = now();
        memcpy((unsigned char *)a->copy + i * each,
               (const unsigned char *)a->b + i * each, each);
        keep_best(&best[i], now() - t0, is_first);
    }
}

static double sum_of(const double *best, size_t n)
{
    double sum = 0;
    for (size_t i = 0; i < n; i++)
        sum += best[i];
    return sum;
}

static void measure(const struct kernel *k, const struct arrays *a,
                    unsigned repeats)
{
    const size_t n = a->n / PIECE;
    double *const floor = a->best + (TVK_AVX512 + 1) * n;

    /* In turn, so that a slow second of the machine hits all alike. */
    for (unsigned r = 0; r < repeats; r++) {
        copy_once(k, a, floor, r == 0);
        for (size_t isa = 0; isa <= TVK_AVX512; isa++)
            if (tvk_isa_supported((enum tvk_isa)isa))
                run_once(tvk_table_for((enum tvk_isa)isa), k, a,
                         a->best + isa * n, r == 0);
    }
    for (size_t isa = 0; isa <= TVK_AVX512; isa++)
        if (tvk_isa_supported((enum tvk_isa)isa))
            printf("{\"kernel\": \"%s\", \"isa\": \"%s\", \"elements\": %zu, "
                   "\"bytes\": %zu, \"seconds\": %.9f, "
                   "\"roofline_seconds\": %.9f}\n",
                   k->name, tvk_table_for((enum tvk_isa)isa)->name, a->n,
                   k->bytes * a->n, sum_of(a->best + isa * n, n),
                   sum_of(floor, n));
}

static void fill(const struct arrays *a)
{
    uint64_t s = 1;
    for (size_t i = 0; i < a->n; i++) {
        double v[3];
        for (int j = 0; j < 3; j++) {
            s = s * 6364136223846793005u + 1442695040888963407u;
            /* The sum of four uniform parts is near enough to a normal. */
            v[j] = ((double)(s >> 52) + (double)(s >> 40 & 0xfff) +
                    (double)(s >> 28 & 0xfff) + (double)(s >> 16 & 0xfff)) /
                       8190.0 -
                   1.0;
        }
        a->b[i] = (float)(0.035 * v[0]);
        a->x[0][i] = (float)(a->b[i] + 0.0035 * v[1]);
        a->x[1][i] = (float)(a->b[i] + 0.0035 * v[2]);
    }
    (void)tvk_table_best()->f32_to_bf16(a->half, a->b, a->n);
    for (size_t j = 0; j < DONORS; j++)
        (void)tvk_table_best()->f32_to_bf16(a->half_x[j], a->x[j], a->n);
    for (size_t i = 0; i < a->n / 64; i++) {
        s = s * 6364136223846793005u + 1442695040888963407u;
        a->mask[0][i] = s ^ s >> 31;
        a->mask[1][i] = s * 3;
    }
}

int main(int argc, char **argv)
{
    struct arrays a = {.n = 0};
    unsigned long mib = 64;
    unsigned long repeats = 5;

    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--mib") == 0)
            mib = strtoul(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--repeats") == 0)
            repeats = strtoul(argv[i + 1], NULL, 10);
    }
    if (mib < 1 || mib > 4096 || repeats < 1) {
        fprintf(stderr, "usage: tv_kernel_bench [--mib N] [--repeats N]\n");
        return 2;
    }
    a.n = (size_t)mib << 18;
    /* copy_once reads b as a source of up to 8 n bytes: x[0] follows it. */
    a.b = tv_alloc_aligned(4 * a.n * sizeof *a.b);
    a.copy = tv_alloc_aligned(8 * a.n);
    a.half = tv_alloc_aligned((2 + DONORS) * 2 * a.n);
    a.mask[0] = tv_alloc_aligned(a.n / 4);
    a.hist = tv_calloc(TVK_HIST_HI, sizeof *a.hist);
    a.best = tv_calloc((TVK_AVX512 + 2) * a.n / PIECE, sizeof *a.best);
    int rc = 1;
    if (a.b && a.copy && a.half && a.mask[0] && a.hist && a.best) {
        a.x[0] = a.b + a.n;
        a.x[1] = a.b + 2 * a.n;
        a.dst = a.b + 3 * a.n;
        for (size_t j = 0; j < DONORS; j++)
            a.half_x[j] = a.half + (1 + j) * 2 * a.n;
        a.half_dst = a.half + (1 + DONORS) * 2 * a.n;
        memset(a.half_dst, 0, 2 * a.n);
        a.mask[1] = a.mask[0] + a.n / 64;
        memset(a.copy, 0, 8 * a.n);
        memset(a.dst, 0, a.n * sizeof *a.dst);
        fill(&a);
        for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
            measure(&kernels[i], &a, (unsigned)repeats);
        rc = 0;
    }
    tv_free(a.b);
    tv_free(a.copy);
    tv_free(a.half);
    tv_free(a.mask[0]);
    tv_free(a.hist);
    tv_free(a.best);
    return rc;
}
