/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_split_gemm.c - floats as sums of three bf16 numbers, and products of
 * them on AMX against sums in double, with the error that fp32 sums may have.
 */
#include "test.h"

#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "rng.h"
#include "tv/alloc.h"
#include "tv/split_gemm.h"

static float of_bf16(uint16_t h)
{
    const uint32_t u = (uint32_t)h << 16;
    float v = 0;

    memcpy(&v, &u, sizeof v);
    return v;
}

static const struct tvk_table *ref(void)
{
    return tvk_table_for(TVK_REF);
}

/* ---- the pieces ---------------------------------------------------------- */

static void check_sum(float v)
{
    uint16_t p[3];
    ref()->split_bf16(p, 1, &v, 1);
    const double sum =
        (double)of_bf16(p[0]) + (double)of_bf16(p[1]) + (double)of_bf16(p[2]);

    if (isnan(v)) {
        assert_true(isnan(of_bf16(p[0])));
        assert_int_equal(p[1] | p[2], 0);
    } else if (isinf(v)) {
        assert_true(of_bf16(p[0]) == v);
        assert_int_equal(p[1] | p[2], 0);
    } else if (fabsf(v) >= 0x1p-110f) {
        if (sum != (double)v)
            fail_msg("%a became %a + %a + %a", (double)v, (double)of_bf16(p[0]),
                     (double)of_bf16(p[1]), (double)of_bf16(p[2]));
    } else {
        assert_true(fabs(sum - (double)v) <= 0x1p-134);
    }
}

static void test_exact(void **state)
{
    static const float some[] = {
        0.0f,        1.0f,         0x1.fffffep0f,   0x1.fffffep127f,
        0x1.fep127f, 0x1.ff8p127f, 0x1.01p0f,       0x1.018002p-110f,
        0x1p-126f,   0x1p-149f,    0x1.fffffcp-127f};
    struct rng r;

    (void)state;
    for (size_t i = 0; i < sizeof some / sizeof *some; i++) {
        check_sum(some[i]);
        check_sum(-some[i]);
    }
    check_sum(INFINITY);
    check_sum(-INFINITY);
    check_sum(NAN);
    rng_open(&r, 1);
    for (int i = 0; i < 1000000; i++)
        check_sum(rng_any_f32(&r));
}

/* ---- products ------------------------------------------------------------ */

struct product { /* y = x w^T by the module; all owned */
    size_t m, n, k;
    float *x, *y;
    uint16_t *w;
    bool finite;
};

static void *zeroed(size_t n, size_t each)
{
    void *const p = calloc(n + 1, each);

    assert_non_null(p);
    return p;
}

static void product_open(struct product *p, size_t m, size_t n, size_t k,
                         uint64_t seed)
{
    struct rng r;

    *p = (struct product){.m = m, .n = n, .k = k};
    p->x = zeroed(m * k, sizeof *p->x);
    p->y = zeroed(m * n, sizeof *p->y);
    p->w = zeroed(n * k, sizeof *p->w);
    rng_open(&r, seed);
    for (size_t i = 0; i < m * k; i++)
        p->x[i] = rng_normal(&r);
    for (size_t i = 0; i < n * k; i++) {
        const float w = 0.02f * rng_normal(&r);
        (void)ref()->f32_to_bf16(&p->w[i], &w, 1);
    }
}

static void product_close(struct product *p)
{
    free(p->x);
    free(p->y);
    free(p->w);
}

static void product_run(struct product *p, tvk_split *s, unsigned worker)
{
    const struct tvk_split_shape shape = *tvk_split_shape_of(s);
    void *const work = tv_alloc_aligned(tvk_split_work_bytes(&shape));
    uint16_t *const pieces =
        tv_alloc_aligned(tvk_split_row_bytes(&shape, TVK_SPLIT_ROWS));

    assert_true(work && pieces);
    /* What nobody fills must not matter. */
    memset(work, 0xff, tvk_split_work_bytes(&shape));
    memset(pieces, 0xff, tvk_split_row_bytes(&shape, TVK_SPLIT_ROWS));
    p->finite = true;
    for (size_t n = 0; n < shape.n_n; n++) {
        for (size_t k = 0; k < shape.n_k; k++) {
            uint16_t *const stage = tvk_split_stage(s, work);
            for (size_t i = 0; i < shape.n_block; i++) {
                for (size_t c = 0; c < shape.k_block; c++) {
                    const size_t row = n * shape.n_block + i,
                                 col = k * shape.k_block + c;
                    stage[i * shape.k_block + c] =
                        row < p->n && col < p->k ? p->w[row * p->k + col] : 0;
                }
            }
            assert_true(tvk_split_take(s, worker, work, n, k, &p->finite));
        }
    }
    for (size_t row = 0; row < p->m;) {
        const size_t left = p->m - row;
        const size_t rows =
            left >= TVK_SPLIT_ROWS ? TVK_SPLIT_ROWS : TVK_SPLIT_FEW;
        const size_t take = left < rows ? left : rows;

        tvk_split_rows(&shape, ref(), p->x + row * p->k, p->k, take, rows,
                       pieces);
        for (size_t n = 0; n < shape.n_n; n++) {
            const float *const y =
                tvk_split_product(s, worker, work, pieces, rows, n);
            assert_non_null(y);
            for (size_t i = 0; i < take; i++)
                for (size_t c = 0; c < shape.n_block; c++)
                    if (n * shape.n_block + c < p->n)
                        p->y[(row + i) * p->n + n * shape.n_block + c] =
                            y[i * shape.n_block + c];
        }
        row += take;
    }
    tv_free(work);
    tv_free(pieces);
}

static tvk_split *open_or_skip(size_t in, size_t out, unsigned n_workers)
{
    struct tv_error err = {0};
    tvk_split *s = NULL;

    if (!tvk_split_core()) {
        assert_code(tvk_split_open(in, out, n_workers, &err, &s),
                    TV_E_UNSUPPORTED, &err);
        assert_null(s);
        print_message("no oneDNN, or no AMX\n");
        skip();
    }
    assert_ok(tvk_split_open(in, out, n_workers, &err, &s), &err);
    return s;
}

/* Sums of k terms in fp32, one after the other, would be within k * 2^-24 of
 * the sum of magnitudes; blocked ones are far below. */
static void test_products(void **state)
{
    static const size_t shapes[][3] = {
        {1, 1, 1},       {5, 40, 24},     {33, 64, 64},
        {128, 64, 64},   {40, 100, 36},   {131, 61, 70},
        {200, 513, 600}, {17, 130, 2050}, {160, 256, 352}};

    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        const size_t m = shapes[i][0], n = shapes[i][1], k = shapes[i][2];
        tvk_split *const s = open_or_skip(k, n, 1);
        struct product p;

        product_open(&p, m, n, k, i);
        product_run(&p, s, 0);
        assert_true(p.finite);
        for (size_t r = 0; r < m; r++) {
            for (size_t c = 0; c < n; c++) {
                double sum = 0, size = 0;
                for (size_t j = 0; j < k; j++) {
                    const double t = (double)p.x[r * k + j] *
                                     (double)of_bf16(p.w[c * k + j]);
                    sum += t;
                    size += fabs(t);
                }
                const double e = fabs((double)p.y[r * n + c] - sum);
                if (!(e <= 4 * 0x1p-24 * size))
                    fail_msg("[%zu, %zu] of %zu x %zu x %zu is %.9g, expected "
                             "%.9g",
                             r, c, m, n, k, (double)p.y[r * n + c], sum);
            }
        }
        product_close(&p);
        tvk_split_close(s);
    }
}

static void test_not_finite(void **state)
{
    tvk_split *const s = open_or_skip(600, 70, 1);
    struct product p;

    (void)state;
    product_open(&p, 7, 70, 600, 1);
    p.x[2 * 600 + 599] = INFINITY;
    p.x[3 * 600] = NAN;
    p.x[4 * 600 + 1] = 0x1.fffffep127f;
    memset(p.x + 5 * 600, 0, 600 * sizeof *p.x);
    p.w[8 * 600 + 1] = 0x3f80; /* 1 */
    product_run(&p, s, 0);
    assert_true(p.finite);
    for (size_t c = 0; c < 70; c++) {
        assert_true(isfinite(p.y[0 * 70 + c]) && isfinite(p.y[1 * 70 + c]));
        assert_true(isinf(p.y[2 * 70 + c]) &&
                    (p.y[2 * 70 + c] > 0) == (of_bf16(p.w[c * 600 + 599]) > 0));
        assert_true(isnan(p.y[3 * 70 + c]));
        assert_true(p.y[5 * 70 + c] == 0);
        assert_true(isfinite(p.y[6 * 70 + c]));
    }
    /* too large to be rounded to bf16, and not infinite for that */
    assert_true(p.y[4 * 70 + 8] == 0x1.fffffep127f);
    p.w[69 * 600 + 599] = 0x7f80;
    product_run(&p, s, 0);
    assert_false(p.finite);
    p.w[69 * 600 + 599] = 0xff81;
    product_run(&p, s, 0);
    assert_false(p.finite);
    p.w[69 * 600 + 599] = 0xff7f;
    product_run(&p, s, 0);
    assert_true(p.finite);
    product_close(&p);
    tvk_split_close(s);
}

struct one_worker {
    struct product p;
    tvk_split *s;
    unsigned worker;
};

static void *work(void *arg)
{
    struct one_worker *const w = arg;

    product_run(&w->p, w->s, w->worker);
    return NULL;
}

static void test_workers_agree(void **state)
{
    enum { WORKERS = 4 };
    tvk_split *const s = open_or_skip(300, 200, WORKERS);
    struct one_worker all[WORKERS];
    pthread_t id[WORKERS];

    (void)state;
    for (unsigned i = 0; i < WORKERS; i++) {
        all[i].s = s;
        all[i].worker = i;
        product_open(&all[i].p, 150, 200, 300, 5);
        assert_int_equal(pthread_create(&id[i], NULL, work, &all[i]), 0);
    }
    for (unsigned i = 0; i < WORKERS; i++)
        assert_int_equal(pthread_join(id[i], NULL), 0);
    for (unsigned i = 1; i < WORKERS; i++)
        assert_memory_equal(all[i].p.y, all[0].p.y,
                            (size_t)150 * 200 * sizeof(float));
    for (unsigned i = 0; i < WORKERS; i++)
        product_close(&all[i].p);
    tvk_split_close(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exact),
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_not_finite),
        cmocka_unit_test(test_workers_agree),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
