/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_cuda_math.c - matrices on the device against the CPU: products in every
 * layout, Gram matrices, one layer's pruning and refinement; what does not fit,
 * a lost device.
 *
 * On the fake driver and libraries (tests/support), which CTest sees to, or on
 * a GPU (tools/gpu-check), which is not lost. Bounds are I2's: sums have
 * another order than OpenBLAS's.
 */
#include "test.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_fixture.h"
#include "rng.h"
#include "tv/cuda_math.h"
#include "ulp.h"

static void *zeroed(size_t n, size_t each)
{
    void *p = calloc(n + 1, each);

    assert_non_null(p);
    return p;
}

static float *normal(size_t n, uint64_t stream)
{
    float *const x = zeroed(n, sizeof *x);
    struct rng r;

    rng_open(&r, stream);
    for (size_t i = 0; i < n; i++)
        x[i] = rng_normal(&r);
    return x;
}

static tvk_cuda *device_open(size_t bytes, unsigned long lose_at)
{
    const struct fake_cuda f = {.total_bytes = bytes, .lose_at = lose_at};
    struct tv_error err = {.code = TV_OK};
    struct tvk_cuda_options o = cuda_device_options();
    tvk_cuda *d = NULL;

    if (fake_set)
        fake_set(&f);
    else
        o.memory_bytes = bytes;
    assert_ok(tvk_cuda_open(&o, &err, &d), &err);
    return d;
}

/* Everything was given back. */
static void device_close(tvk_cuda *d)
{
    struct fake_cuda f;

    tvk_cuda_close(d);
    if (!fake_get)
        return;
    fake_get(&f);
    assert_int_equal(f.used_bytes, 0);
    assert_int_equal(f.n_pinned, 0);
}

static tvk_cuda_math *math_of(tvk_cuda *d)
{
    struct tv_error err = {.code = TV_OK};
    tvk_cuda_math *m = NULL;

    assert_ok(tvk_cuda_math_of(d, &err, &m), &err);
    return m;
}

static tvk_cuda_ptr to_device(tvk_cuda *d, const void *x, size_t bytes)
{
    struct tv_error err = {.code = TV_OK};
    tvk_cuda_stream *const s = tvk_cuda_math_stream(math_of(d));
    tvk_cuda_ptr p = 0;

    assert_ok(tvk_cuda_alloc(d, bytes, "an operand", &err, &p), &err);
    assert_ok(tvk_cuda_upload(s, p, x, bytes, &err), &err);
    return p;
}

/* ---- products ------------------------------------------------------------ */

enum { GM = 5, GN = 7, GK = 3, LD = 9 };

static void test_gemm(void **state)
{
    struct tv_error err = {.code = TV_OK};
    tvk_cuda *const d = device_open(64u << 20, 0);
    tvk_cuda_math *const m = math_of(d);
    float *const a = normal((size_t)LD * LD, 1);
    float *const b = normal((size_t)LD * LD, 2);
    float *const c = normal((size_t)LD * LD, 3);
    const size_t bytes = (size_t)LD * LD * sizeof *a;
    const tvk_cuda_ptr da = to_device(d, a, bytes), db = to_device(d, b, bytes);

    (void)state;
    for (unsigned way = 0; way < 8; way++) {
        const bool ta = way & 1, tb = way & 2;
        const float beta = way & 4 ? 0.5f : 0.0f;
        const tvk_cuda_ptr dc = to_device(d, c, bytes);
        const struct tvk_cuda_gemm g = {ta, tb, GM, GN, GK, -2.0f, beta,
                                        da, db, dc, LD, LD, LD};
        float got[LD * LD];

        assert_ok(tvk_cuda_gemm(m, &g, &err), &err);
        assert_ok(
            tvk_cuda_download(tvk_cuda_math_stream(m), got, dc, bytes, &err),
            &err);
        assert_ok(tvk_cuda_sync(tvk_cuda_math_stream(m), &err), &err);
        for (size_t i = 0; i < LD; i++)
            for (size_t j = 0; j < LD; j++) {
                double want = (double)c[i * LD + j];

                if (i < GM && j < GN) {
                    want *= (double)beta;
                    for (size_t k = 0; k < GK; k++)
                        want -= 2.0 * (double)a[ta ? k * LD + i : i * LD + k] *
                                (double)b[tb ? j * LD + k : k * LD + j];
                }
                if (fabs((double)got[i * LD + j] - want) > 1e-5)
                    fail_msg("way %u: c[%zu,%zu] is %g, not %g", way, i, j,
                             (double)got[i * LD + j], want);
            }
        tvk_cuda_free(d, dc, bytes);
    }
    tvk_cuda_free(d, da, bytes);
    tvk_cuda_free(d, db, bytes);
    device_close(d);
    free(a);
    free(b);
    free(c);
}

static void test_check(void **state)
{
    struct tv_error err = {.code = TV_OK};
    tvk_cuda *d = device_open(64u << 20, 0);

    (void)state;
    assert_ok(tvk_cuda_check(d, &err), &err);
    device_close(d);
    if (!fake_get)
        return;
    assert_int_equal(setenv("FAKE_CUBLAS_WRONG", "1", 1), 0);
    d = device_open(64u << 20, 0);
    assert_int_equal(tvk_cuda_check(d, &err), TV_E_UNSUPPORTED);
    assert_non_null(strstr(err.msg, "does not compute what it should: a "
                                    "product gives"));
    device_close(d);
    assert_int_equal(unsetenv("FAKE_CUBLAS_WRONG"), 0);
}

/* ---- Gram matrices ------------------------------------------------------- */

/* X^T X of x, twice. Device memory that is left for sums of the host; 0: all.
 * Owned. */
static double *gram_of(const float *x, size_t rows, size_t n, size_t ldx,
                       bool sums_there, size_t room)
{
    struct tv_error err = {.code = TV_OK};
    tvk_cuda *const d = device_open(64u << 20, 0);
    tvk_cuda_math *const m = math_of(d);
    tvk_cuda_stream *const s = tvk_cuda_math_stream(m);
    const size_t bytes = n * (n + 1) / 2 * sizeof(double);
    const size_t work_bytes = tvk_cuda_gram_work(n);
    double *const sums = zeroed(n * (n + 1) / 2, sizeof *sums);
    const tvk_cuda_ptr dx = to_device(d, x, rows * ldx * sizeof *x);
    const tvk_cuda_ptr at = sums_there ? to_device(d, sums, bytes) : 0;
    tvk_cuda_ptr work = 0, rest = 0;
    size_t taken = 0;

    assert_ok(tvk_cuda_alloc(d, work_bytes, "work", &err, &work), &err);
    if (room > 0) {
        taken = (size_t)tvk_cuda_left(d) - room;
        assert_ok(tvk_cuda_alloc(d, taken, "others", &err, &rest), &err);
    }
    for (int twice = 0; twice < 2; twice++)
        assert_ok(tvk_cuda_gram_add(m, sums_there ? NULL : sums, at, work, dx,
                                    ldx, rows, n, &err),
                  &err);
    if (sums_there)
        assert_ok(tvk_cuda_download(s, sums, at, bytes, &err), &err);
    assert_ok(tvk_cuda_sync(s, &err), &err);
    if (room > 0) { /* and not even one part */
        tvk_cuda_free(d, rest, taken);
        taken += room - 256;
        assert_ok(tvk_cuda_alloc(d, taken, "others", &err, &rest), &err);
        assert_int_equal(
            tvk_cuda_gram_add(m, sums, 0, work, dx, ldx, rows, n, &err),
            TV_E_BUDGET);
        assert_non_null(strstr(err.msg, "--device-memory"));
        assert_int_equal(tvk_cuda_trouble(d, &err), TV_OK);
    }
    tvk_cuda_free(d, rest, taken);
    tvk_cuda_free(d, work, work_bytes);
    tvk_cuda_free(d, dx, rows * ldx * sizeof *x);
    tvk_cuda_free(d, at, bytes);
    device_close(d);
    return sums;
}

static void gram_case(size_t rows, size_t n, size_t ldx)
{
    float *const x = normal(rows * ldx, rows);
    const size_t bytes = n * (n + 1) / 2 * sizeof(double);
    double *const here = gram_of(x, rows, n, ldx, false, 0);
    double *const there = gram_of(x, rows, n, ldx, true, 0);

    assert_same_bytes("sums on the device", there, here, bytes);
    for (size_t i = 0, e = 0; i < n; i++)
        for (size_t j = i; j < n; j++, e++) {
            double want = 0;

            for (size_t r = 0; r < rows; r++)
                want += 2.0 * (double)x[r * ldx + i] * (double)x[r * ldx + j];
            if (fabs(here[e] - want) > 1e-5 * (double)rows)
                fail_msg("[%zu,%zu] is %g, not %g", i, j, here[e], want);
        }
    free(x);
    free(here);
    free(there);
}

static void test_gram(void **state)
{
    (void)state;
    gram_case(1, 1, 1);
    gram_case(37, 19, 23);
    gram_case(2 * TVK_CUDA_GRAM_CHUNK + 5, 11, 11); /* several chunks */
    gram_case(2, TVK_CUDA_GRAM_COLS + 6, TVK_CUDA_GRAM_COLS + 9); /* pieces */
}

/* Rows of sums a few at a time: the same bytes. */
static void test_gram_memory(void **state)
{
    enum { N = 700, ROWS = 3 };
    const size_t bytes = (size_t)N * (N + 1) / 2 * sizeof(double);
    const size_t least = (size_t)tvk_cuda_gram_least(N) - tvk_cuda_gram_work(N);
    float *const x = normal((size_t)ROWS * N, 5);
    double *const roomy = gram_of(x, ROWS, N, N, false, 0);
    double *const some = gram_of(x, ROWS, N, N, false, 3 * least);
    double *const tight = gram_of(x, ROWS, N, N, false, least);

    (void)state;
    assert_same_bytes("three parts", some, roomy, bytes);
    assert_same_bytes("the least", tight, roomy, bytes);
    free(x);
    free(roomy);
    free(some);
    free(tight);
}

/* ---- one layer ----------------------------------------------------------- */

struct layer_case {
    size_t rows, cols;
    float *t, *h, *u, *packed, *diagonal, *p, *work;
};

/* H = X^T X of correlated inputs, damped, and what the CPU makes of it;
 * identity: H is 1, so that every score is t^2. */
static void case_open(struct layer_case *c, size_t rows, size_t cols,
                      bool identity)
{
    const size_t n = cols;
    float *const x = normal(2 * n * n, n);

    *c = (struct layer_case){.rows = rows, .cols = cols};
    c->t = normal(rows * cols, rows);
    c->h = zeroed(n * n, sizeof *c->h);
    c->u = zeroed(tvk_gram_floats(n), sizeof *c->u);
    c->p = zeroed(rows * n, sizeof *c->p);
    c->packed = zeroed(n * (n + 1) / 2, sizeof *c->packed);
    c->diagonal = zeroed(n, sizeof *c->diagonal);
    c->work =
        zeroed(tvk_obs_work(rows, cols) + tvk_cg_work(cols) + tvk_gram_work(n),
               sizeof *c->work);
    for (size_t k = 0; k < 2 * n && !identity; k++)
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < n; j++)
                c->h[i * n + j] += (x[k * n + i] + 0.5f * x[k * n]) *
                                   (x[k * n + j] + 0.5f * x[k * n]);
    for (size_t i = 0; i < n && identity; i++)
        c->h[i * n + i] = 1.0f;
    for (size_t i = 0, e = 0; i < n; i++) {
        c->diagonal[i] = c->h[i * n + i];
        for (size_t j = i; j < n; j++)
            c->packed[e++] = c->h[i * n + j];
    }
    if (!identity) {
        const double amount = tvk_gram_damp(c->h, n, 0.01);
        assert_true(tvk_diagonal_damp(c->diagonal, n, 0.01) == amount);
    }
    memcpy(c->u, c->h, n * n * sizeof *c->u);
    assert_int_equal(tvk_gram_factor(c->u, n, c->work), 0);
    free(x);
}

static void case_close(struct layer_case *c)
{
    free(c->t);
    free(c->h);
    free(c->u);
    free(c->p);
    free(c->packed);
    free(c->diagonal);
    free(c->work);
}

static tvk_cuda_layer *layer_open(tvk_cuda *d, const struct layer_case *c)
{
    struct tv_error err = {.code = TV_OK};
    tvk_cuda_layer *l = NULL;
    bool definite = false;

    assert_ok(tvk_cuda_layer_open(d, c->rows, c->cols, &err, &l), &err);
    assert_ok(tvk_cuda_layer_gram(l, c->packed, c->diagonal, &err), &err);
    assert_ok(tvk_cuda_layer_factor(l, &definite, NULL, &err), &err);
    assert_true(definite);
    return l;
}

/* Frobenius norm of x - y by that of y. */
static double difference(const float *x, const float *y, size_t n)
{
    double sum = 0, all = 0;

    for (size_t i = 0; i < n; i++) {
        sum += ((double)x[i] - (double)y[i]) * ((double)x[i] - (double)y[i]);
        all += (double)y[i] * (double)y[i];
    }
    return sqrt(sum / (all > 0 ? all : 1));
}

static void test_factor(void **state)
{
    static const size_t sizes[] = {1, 2, 33, 150, 300};

    (void)state;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        struct tv_error err = {.code = TV_OK};
        const size_t n = sizes[s];
        struct layer_case c;
        tvk_cuda_layer *l = NULL;
        tvk_cuda *const d = device_open(64u << 20, 0);
        float *const diagonal = zeroed(n, sizeof *diagonal);
        bool definite = false;

        case_open(&c, 3, n, false);
        assert_ok(tvk_cuda_layer_open(d, 3, n, &err, &l), &err);
        assert_ok(tvk_cuda_layer_gram(l, c.packed, c.diagonal, &err), &err);
        assert_ok(tvk_cuda_layer_factor(l, &definite, diagonal, &err), &err);
        assert_true(definite);
        for (size_t i = 0; i < n; i++)
            assert_true(fabsf(diagonal[i] / c.u[i * n + i] - 1) < 1e-6f);
        /* Not definite: nothing is broken. */
        c.packed[0] = -1.0f;
        assert_ok(tvk_cuda_layer_gram(l, c.packed, NULL, &err), &err);
        assert_ok(tvk_cuda_layer_factor(l, &definite, diagonal, &err), &err);
        assert_false(definite);
        c.packed[0] = NAN;
        assert_ok(tvk_cuda_layer_gram(l, c.packed, NULL, &err), &err);
        assert_ok(tvk_cuda_layer_factor(l, &definite, diagonal, &err), &err);
        assert_false(definite);
        tvk_cuda_layer_close(l);
        device_close(d);
        free(diagonal);
        case_close(&c);
    }
}

/* What is kept, beside the CPU's of the case. I2: 99.9% of the mask (a swap
 * moves its row); all of it where `exactly`. */
static size_t n_chosen_otherwise(const float *got, const struct layer_case *c,
                                 bool exactly)
{
    const size_t n = c->rows * c->cols;
    size_t n_other = 0;

    for (size_t i = 0; i < n; i++)
        n_other += (got[i] != 0) != (c->p[i] != 0);
    if ((double)n_other > (exactly ? 0.0 : 1e-3 * (double)n))
        fail_msg("%zu of %zu entries are chosen otherwise", n_other, n);
    return n_other;
}

static void obs_case(size_t rows, size_t cols, bool identity, bool ties,
                     const struct tvk_obs *how)
{
    struct tv_error err = {.code = TV_OK};
    struct layer_case c;
    tvk_cuda *const d = device_open(64u << 20, 0);

    case_open(&c, rows, cols, identity);
    float *const got = zeroed(rows * cols, sizeof *got);
    for (size_t i = 0; i < rows * cols && ties; i++)
        c.t[i] = roundf(c.t[i] * 4.0f) / 4.0f;
    memcpy(c.p, c.t, rows * cols * sizeof *c.p);
    memcpy(got, c.t, rows * cols * sizeof *got);
    (void)tvk_obs_prune(c.p, c.u, rows, cols, how, c.work);
    tvk_cuda_layer *const l = layer_open(d, &c);
    assert_ok(tvk_cuda_layer_obs(l, got, how, &err), &err);
    if (n_chosen_otherwise(got, &c, identity) == 0 &&
        difference(got, c.p, rows * cols) > 1e-4)
        fail_msg("relative difference %g", difference(got, c.p, rows * cols));
    tvk_cuda_layer_close(l);
    device_close(d);
    free(got);
    case_close(&c);
}

static void test_obs(void **state)
{
    static const struct tvk_obs half = {.density = 0.5}, none = {.density = 0},
                                all = {.density = 1}, few = {.density = 0.1};
    static const struct tvk_obs two_four = {.n_pruned = 2, .group = 4},
                                wide = {.n_pruned = 40, .group = 64};

    (void)state;
    obs_case(1, 1, false, false, &half);
    obs_case(33, 200, false, false, &half);
    obs_case(20, 200, false, false, &few);
    obs_case(9, 130, false, false, &none);
    obs_case(9, 130, false, false, &all);
    obs_case(7, 530, true, true, &half); /* beyond a group */
    obs_case(7, 530, false, false, &two_four);
    obs_case(17, 140, false, false, &two_four);
    obs_case(11, 150, false, false, &wide);
    /* The first of equal scores go, row by row. */
    obs_case(300, 133, true, true, &half);
    obs_case(300, 133, true, true, &few);
}

/* Conjugate gradients on what `keep` [rows, cols] keeps of T, as the CPU's. */
static void refines(tvk_cuda_layer *l, const struct layer_case *c,
                    const uint8_t *keep, unsigned steps, float *got)
{
    struct tv_error err = {.code = TV_OK};
    const size_t n = c->rows * c->cols;

    for (size_t i = 0; i < n; i++)
        c->p[i] = got[i] = keep[i] ? c->t[i] : 0.0f;
    tvk_cg_rows(c->p, c->t, keep, c->h, c->rows, c->cols, steps, c->work);
    assert_ok(tvk_cuda_layer_refine(l, got, c->t, c->rows, steps, &err), &err);
    if (difference(got, c->p, n) > 1e-5)
        fail_msg("%u steps: relative difference %g", steps,
                 difference(got, c->p, n));
}

/* Traces with T and P, as the CPU's. */
static void multiplies(tvk_cuda_layer *l, const struct layer_case *c)
{
    struct tv_error err = {.code = TV_OK};
    double want[3] = {0}, sums[3] = {0};

    tvk_gram_product(c->t, c->p, c->h, c->rows, c->cols, &want[0], &want[1],
                     &want[2], c->work);
    assert_ok(tvk_cuda_layer_product(l, c->t, c->p, c->rows, &sums[0], &sums[1],
                                     &sums[2], &err),
              &err);
    for (size_t i = 0; i < 3; i++)
        assert_true(fabs(sums[i] / want[i] - 1) < 1e-5);
}

static void test_refine(void **state)
{
    struct tv_error err = {.code = TV_OK};
    enum { ROWS = 40, COLS = 150, N = ROWS * COLS };
    struct layer_case c;
    tvk_cuda *const d = device_open(64u << 20, 0);
    tvk_cuda_layer *l = NULL;
    uint8_t *const keep = zeroed(N, 1);
    float *const got = zeroed(N, sizeof *got);

    (void)state;
    case_open(&c, ROWS, COLS, false);
    for (size_t i = 0; i < N; i++)
        keep[i] = i % 3 == 0 || i / COLS == 7;
    assert_ok(tvk_cuda_layer_open(d, ROWS, COLS, &err, &l), &err);
    assert_ok(tvk_cuda_layer_gram(l, c.packed, c.diagonal, &err), &err);
    for (unsigned steps = 0; steps < 5; steps++)
        refines(l, &c, keep, steps, got);
    multiplies(l, &c);
    tvk_cuda_layer_close(l);
    device_close(d);
    free(keep);
    free(got);
    case_close(&c);
}

/* ---- a layer that does not fit ------------------------------------------- */

/* Few correlated inputs, H well away from singular. */
static void few_inputs(struct layer_case *c, size_t rows, size_t cols)
{
    const size_t n = cols;
    enum { INPUTS = 12 };
    float *const x = normal(INPUTS * n, n);

    *c = (struct layer_case){.rows = rows, .cols = cols};
    c->t = normal(rows * cols, rows);
    c->h = zeroed(n * n, sizeof *c->h);
    c->u = zeroed(tvk_gram_floats(n), sizeof *c->u);
    c->p = zeroed(rows * n, sizeof *c->p);
    c->packed = zeroed(n * (n + 1) / 2, sizeof *c->packed);
    c->diagonal = zeroed(n, sizeof *c->diagonal);
    c->work =
        zeroed(tvk_obs_work(rows, cols) + tvk_cg_work(cols) + tvk_gram_work(n),
               sizeof *c->work);
    for (size_t i = 0; i < n; i++)
        c->h[i * n + i] = 4.0f;
    for (size_t k = 0; k < INPUTS; k++)
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < n; j++)
                c->h[i * n + j] += x[k * n + i] * x[k * n + j];
    for (size_t i = 0, e = 0; i < n; i++) {
        c->diagonal[i] = c->h[i * n + i];
        for (size_t j = i; j < n; j++)
            c->packed[e++] = c->h[i * n + j];
    }
    memcpy(c->u, c->h, n * n * sizeof *c->u);
    assert_int_equal(tvk_gram_factor(c->u, n, c->work), 0);
    free(x);
}

/* A device of so much memory, all of it the budget's. */
static tvk_cuda *device_of(uint64_t total, uint64_t budget)
{
    const struct fake_cuda f = {.total_bytes = (size_t)total};
    struct tv_error err = {.code = TV_OK};
    struct tvk_cuda_options o = cuda_device_options();
    tvk_cuda *d = NULL;

    if (fake_set)
        fake_set(&f);
    o.memory_bytes = budget;
    assert_ok(tvk_cuda_open(&o, &err, &d), &err);
    return d;
}

/* H, or its factor: made here, or taken from the host. */
static void layer_square(tvk_cuda_layer *l, const struct layer_case *c,
                         bool factor)
{
    struct tv_error err = {.code = TV_OK};
    bool definite = true;

    if (tvk_cuda_layer_on_host(l)) {
        assert_ok(tvk_cuda_layer_square(l, factor ? c->u : c->h, &err), &err);
        return;
    }
    assert_ok(tvk_cuda_layer_gram(l, c->packed, c->diagonal, &err), &err);
    if (factor)
        assert_ok(tvk_cuda_layer_factor(l, &definite, NULL, &err), &err);
    assert_true(definite);
}

static void obs_with(tvk_cuda *d, const struct layer_case *c, bool on_host,
                     unsigned n_tiles, const struct tvk_obs *how, float *got)
{
    struct tv_error err = {.code = TV_OK};
    tvk_cuda_layer *l = NULL;

    memcpy(got, c->t, c->rows * c->cols * sizeof *got);
    assert_ok(tvk_cuda_layer_open(d, c->rows, c->cols, &err, &l), &err);
    assert_int_equal(tvk_cuda_layer_on_host(l), on_host);
    assert_int_equal(tvk_cuda_layer_tiles(l), n_tiles);
    layer_square(l, c, true);
    assert_ok(tvk_cuda_layer_obs(l, got, how, &err), &err);
    tvk_cuda_layer_close(l);
    device_close(d);
}

/* T in two tiles and in one: not a bit is different. With H and U on the
 * device and on the host, where they are the CPU's. */
static void test_obs_tiles(void **state)
{
    enum { ROWS = 3600, COLS = 1060, N = ROWS * COLS };
    const struct tvk_obs half = {.density = 0.5};
    const uint64_t solver = 16u << 20;
    tvk_cuda *const asked = device_open(64u << 20, 0);
    const uint64_t all = tvk_cuda_layer_bytes(asked, ROWS, COLS);
    const uint64_t saved = (N - ROWS * 512 - 2 * 512 * COLS) * sizeof(float);
    struct layer_case c;
    float *const want = zeroed(N, sizeof *want);
    float *const got = zeroed(N, sizeof *got);
    const size_t bytes = N * sizeof *want;

    (void)state;
    device_close(asked);
    few_inputs(&c, ROWS, COLS);
    obs_with(device_of(all, all), &c, false, 0, &half, want);
    obs_with(device_of(all, all - 1), &c, false, 2, &half, got);
    assert_same_bytes("two tiles", got, want, bytes);
    obs_with(device_of(all, all - saved - 1), &c, false, 1, &half, got);
    assert_same_bytes("one tile", got, want, bytes);
    if (fake_set) { /* the device has less than its budget */
        obs_with(device_of(all - solver - 1, all), &c, false, 2, &half, got);
        assert_same_bytes("two tiles", got, want, bytes);
    }
    const uint64_t here = all - solver;
    obs_with(device_of(here, here), &c, true, 0, &half, want);
    obs_with(device_of(here, here - saved - 1), &c, true, 1, &half, got);
    assert_same_bytes("one tile, U on the host", got, want, bytes);

    memcpy(c.p, c.t, bytes);
    (void)tvk_obs_prune(c.p, c.u, ROWS, COLS, &half, c.work);
    (void)n_chosen_otherwise(got, &c, false);
    free(want);
    free(got);
    case_close(&c);
}

/* H and U in panels, with no more memory than the layer says it needs. */
static void test_panels(void **state)
{
    enum { ROWS = 9, COLS = 2100, N = ROWS * COLS };
    const struct tvk_obs two_four = {.n_pruned = 2, .group = 4};
    struct tv_error err = {.code = TV_OK};
    struct layer_case c;
    float *const got = zeroed(N, sizeof *got);
    uint8_t *const keep = zeroed(N, 1);
    tvk_cuda_layer *l = NULL;

    (void)state;
    few_inputs(&c, ROWS, COLS);
    tvk_cuda *d = device_of(64u << 20, 40u << 20);
    const uint64_t least = tvk_cuda_layer_least(d, ROWS, COLS);
    assert_true(least < tvk_cuda_layer_bytes(d, ROWS, COLS));
    tvk_cuda_close(d);
    d = device_of(64u << 20, least - 1);
    assert_int_equal(tvk_cuda_layer_least(d, ROWS, COLS), least);
    assert_int_equal(tvk_cuda_layer_open(d, ROWS, COLS, &err, &l), TV_E_BUDGET);
    assert_non_null(strstr(err.msg, "--device-memory"));
    device_close(d);

    d = device_of(64u << 20, least);
    obs_with(d, &c, true, 0, &two_four, got);
    memcpy(c.p, c.t, N * sizeof *c.p);
    (void)tvk_obs_prune(c.p, c.u, ROWS, COLS, &two_four, c.work);
    (void)n_chosen_otherwise(got, &c, true);
    assert_true(difference(got, c.p, N) < 1e-5);

    d = device_of(64u << 20, least);
    assert_ok(tvk_cuda_layer_open(d, ROWS, COLS, &err, &l), &err);
    layer_square(l, &c, false);
    for (size_t i = 0; i < N; i++)
        keep[i] = got[i] != 0;
    refines(l, &c, keep, 3, got);
    multiplies(l, &c);
    tvk_cuda_layer_close(l);
    device_close(d);
    free(keep);
    free(got);
    case_close(&c);
}

/* What a layer says it needs is enough, and a little less is not. */
static void test_layer_memory(void **state)
{
    struct tv_error err = {.code = TV_OK};
    struct layer_case c;
    tvk_cuda *const d = device_open(64u << 20, 0);
    tvk_cuda_layer *l = NULL;
    tvk_cuda_ptr rest = 0;

    (void)state;
    case_open(&c, 40, 300, false);
    (void)math_of(d);
    const size_t handle =
        (size_t)(tvk_cuda_about(d)->budget_bytes - tvk_cuda_left(d));
    const size_t needed = (size_t)tvk_cuda_layer_bytes(d, 40, 300) - handle;
    const size_t taken = (size_t)tvk_cuda_left(d) - needed;
    assert_ok(tvk_cuda_alloc(d, taken, "others", &err, &rest), &err);
    l = layer_open(d, &c);
    tvk_cuda_layer_close(l);
    tvk_cuda_ptr more = 0;
    const size_t too_much = needed - 1000;
    assert_ok(tvk_cuda_alloc(d, too_much, "others", &err, &more), &err);
    assert_int_equal(tvk_cuda_layer_open(d, 40, 300, &err, &l), TV_E_BUDGET);
    assert_null(l);
    assert_int_equal(tvk_cuda_trouble(d, &err), TV_OK);
    tvk_cuda_free(d, more, too_much);
    tvk_cuda_free(d, rest, taken);
    device_close(d);
    case_close(&c);
}

/* All of a layer's work; its first error. */
static enum tv_err work_through(tvk_cuda *d, const struct layer_case *c,
                                float *t, struct tv_error *err)
{
    const struct tvk_obs half = {.density = 0.5};
    enum tv_err rc = TV_OK;
    tvk_cuda_layer *l = NULL;
    tvk_cuda_math *m = NULL;
    double sums[3] = {0};
    double *const gram = zeroed(c->cols * c->cols, sizeof *gram);
    const size_t t_bytes = c->rows * c->cols * sizeof *t;
    const size_t work_bytes = tvk_cuda_gram_work(c->cols);
    tvk_cuda_ptr x = 0, work = 0;
    bool definite = false;

    memcpy(t, c->t, t_bytes);
    TV_TRY(tvk_cuda_math_of(d, err, &m));
    TV_TRY(tvk_cuda_alloc(d, t_bytes, "inputs", err, &x));
    TV_TRY(tvk_cuda_alloc(d, work_bytes, "work", err, &work));
    TV_TRY(tvk_cuda_upload(tvk_cuda_math_stream(m), x, c->t, t_bytes, err));
    TV_TRY(
        tvk_cuda_gram_add(m, gram, 0, work, x, c->cols, c->rows, c->cols, err));
    tvk_cuda_free(d, x, t_bytes);
    tvk_cuda_free(d, work, work_bytes);
    x = work = 0;
    TV_TRY(tvk_cuda_layer_open(d, c->rows, c->cols, err, &l));
    if (tvk_cuda_layer_on_host(l)) {
        TV_TRY(tvk_cuda_layer_square(l, c->u, err));
    } else {
        TV_TRY(tvk_cuda_layer_gram(l, c->packed, c->diagonal, err));
        TV_TRY(tvk_cuda_layer_factor(l, &definite, NULL, err));
    }
    TV_TRY(tvk_cuda_layer_obs(l, t, &half, err));
    if (tvk_cuda_layer_on_host(l))
        TV_TRY(tvk_cuda_layer_square(l, c->h, err));
    else
        TV_TRY(tvk_cuda_layer_gram(l, c->packed, c->diagonal, err));
    TV_TRY(tvk_cuda_layer_refine(l, t, c->t, c->rows, 2, err));
    TV_TRY(tvk_cuda_layer_product(l, c->t, t, c->rows, &sums[0], &sums[1],
                                  &sums[2], err));
out:
    tvk_cuda_layer_close(l);
    tvk_cuda_free(d, x, t_bytes);
    tvk_cuda_free(d, work, work_bytes);
    free(gram);
    return rc;
}

/* With H and U on the device, then on the host. */
static void test_lost(void **state)
{
    struct layer_case c;
    struct fake_cuda f;
    float *t = NULL;

    (void)state;
    if (!fake_cuda_is_there())
        skip();
    case_open(&c, 6, 140, false);
    t = zeroed(c.rows * c.cols, sizeof *t);
    for (size_t i = 0; i < 2; i++) {
        const size_t bytes = (size_t)(i == 0 ? 64 : 12) << 20;
        struct tv_error err = {.code = TV_OK};
        tvk_cuda *d = device_open(bytes, 0);
        assert_ok(work_through(d, &c, t, &err), &err);
        fake_get(&f);
        const unsigned long n = f.n_launches;
        assert_true(n > 20);
        device_close(d);
        for (unsigned long at = 1; at <= n; at += at < 8 ? 1 : 5) {
            tv_error_clear(&err);
            d = device_open(bytes, at);
            assert_int_equal(work_through(d, &c, t, &err), TV_E_IO);
            assert_non_null(strstr(err.msg, "Fake GPU 0"));
            assert_int_equal(tvk_cuda_trouble(d, &err), TV_E_IO);
            device_close(d);
        }
    }
    free(t);
    case_close(&c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_check),  cmocka_unit_test(test_gemm),
        cmocka_unit_test(test_gram),   cmocka_unit_test(test_gram_memory),
        cmocka_unit_test(test_factor), cmocka_unit_test(test_obs),
        cmocka_unit_test(test_refine), cmocka_unit_test(test_obs_tiles),
        cmocka_unit_test(test_panels), cmocka_unit_test(test_layer_memory),
        cmocka_unit_test(test_lost),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
