/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fake_cublas.c - cuBLAS made of plain loops over the fake driver's memory.
 *
 * Column-major as the real one, on a stream as the real one: nothing happens
 * before the stream gets there. Stricter: operands must lie in device memory as
 * a whole, and only pedantic arithmetic with a workspace of ours is accepted,
 * which results need to be the same each time. Sums of a product are cut into
 * parts by its shape, as the real one chooses kernels by it: whoever promises
 * the same bits must ask for the same products.
 */
#include <stdint.h>
#include <stdlib.h>

#include "cuda/cuda_blas_abi.h"
#include "fake_library.h"

#define INVALID                        7  /* CUBLAS_STATUS_INVALID_VALUE */
#define FAILED                         13 /* CUBLAS_STATUS_EXECUTION_FAILED */

#define DECLARE(field, symbol, params) EXPORT tvk_cb_status symbol params;
TVK_CUDA_CUBLAS(DECLARE)

/* FAKE_CUBLAS_WRONG=1: one of a product's numbers is. */
static bool is_wrong;

struct handle {
    void *stream;
    bool has_workspace, pedantic;
};

tvk_cb_status cublasCreate_v2(tvk_cb_handle *h)
{
    const char *const text = getenv("FAKE_CUBLAS_WRONG");

    is_wrong = text && *text == '1';
    *h = find_driver() ? calloc(1, sizeof(struct handle)) : NULL;
    return *h ? TVK_CB_OK : 1;
}

tvk_cb_status cublasDestroy_v2(tvk_cb_handle h)
{
    free(h);
    return TVK_CB_OK;
}

tvk_cb_status cublasSetStream_v2(tvk_cb_handle h, tvk_cb_stream s)
{
    struct handle *const x = h;

    x->stream = s;
    x->has_workspace = false; /* as the real one */
    return TVK_CB_OK;
}

tvk_cb_status cublasSetWorkspace_v2(tvk_cb_handle h, void *at, size_t bytes)
{
    struct handle *const x = h;

    x->has_workspace = fake_holds(at, bytes) != 0;
    return x->has_workspace ? TVK_CB_OK : INVALID;
}

tvk_cb_status cublasSetMathMode(tvk_cb_handle h, tvk_cb_math mode)
{
    struct handle *const x = h;

    x->pedantic = mode == TVK_CB_PEDANTIC;
    return TVK_CB_OK;
}

static bool is_ready(const struct handle *x)
{
    return x->stream && x->has_workspace && x->pedantic;
}

struct product {
    bool ta, tb;
    size_t m, n, k, lda, ldb, ldc;
    float alpha, beta;
    const float *a, *b;
    float *c;
};

#define AT_ONCE 64u /* sums of a column, each in its own order of l */

/* sums += of l in [from, to), for rows [i0, i0 + n) of column j. Operands were
 * looked at as a whole (is_matrix); each element again would take most of the
 * time of tests with sanitizers. */
__attribute__((no_sanitize("address", "undefined"))) static void
add_part(const struct product *p, size_t j, size_t i0, size_t n, size_t from,
         size_t to, float *sums)
{
    const size_t by_l = p->tb ? p->ldb : 1;
    const float *const b = p->b + (p->tb ? j : j * p->ldb);
    float part[AT_ONCE] = {0};

    for (size_t i = 0; i < n && p->ta; i++) {
        const float *const a = p->a + (i0 + i) * p->lda;
        for (size_t l = from; l < to; l++)
            part[i] += a[l] * b[l * by_l];
    }
    for (size_t l = from; l < to && !p->ta; l++) {
        const float *const a = p->a + l * p->lda + i0;
        for (size_t i = 0; i < n; i++)
            part[i] += a[i] * b[l * by_l];
    }
    for (size_t i = 0; i < n; i++)
        sums[i] += part[i];
}

static void multiply(const void *args)
{
    const struct product *const p = args;
    const size_t n_parts = 1 + (p->m * 7919 ^ p->n * 104729 ^ p->k) / 8 % 3;

    for (size_t j = 0; j < p->n; j++)
        for (size_t i0 = 0; i0 < p->m; i0 += AT_ONCE) {
            const size_t n = p->m - i0 < AT_ONCE ? p->m - i0 : AT_ONCE;
            float *const c = &p->c[j * p->ldc + i0];
            float sums[AT_ONCE] = {0};

            for (size_t part = 0; part < n_parts; part++)
                add_part(p, j, i0, n, p->k * part / n_parts,
                         p->k * (part + 1) / n_parts, sums);
            /* beta 0 means that c may hold anything. */
            for (size_t i = 0; i < n; i++)
                c[i] = p->alpha * sums[i] + (p->beta != 0 ? p->beta * c[i] : 0);
        }
    if (is_wrong && p->m > 0 && p->n > 0)
        p->c[(p->n - 1) * p->ldc + p->m / 2] += 0.5f;
}

tvk_cb_status cublasSgemm_v2(tvk_cb_handle h, tvk_cb_op ta, tvk_cb_op tb, int m,
                             int n, int k, const float *alpha, const float *a,
                             int lda, const float *b, int ldb,
                             const float *beta, float *c, int ldc)
{
    const struct handle *const x = h;
    const bool is_ta = ta == TVK_CB_T, is_tb = tb == TVK_CB_T;

    if (!is_ready(x) ||
        !is_matrix(a, sizeof *a, is_ta ? k : m, is_ta ? m : k, lda) ||
        !is_matrix(b, sizeof *b, is_tb ? n : k, is_tb ? k : n, ldb) ||
        !is_matrix(c, sizeof *c, m, n, ldc))
        return INVALID;
    const struct product p = {is_ta,     is_tb,       (size_t)m,   (size_t)n,
                              (size_t)k, (size_t)lda, (size_t)ldb, (size_t)ldc,
                              *alpha,    *beta,       a,           b,
                              c};
    return fake_call(x->stream, multiply, &p, sizeof p) ? FAILED : TVK_CB_OK;
}

struct batch { /* addresses are read when it runs, as the real one does */
    struct product p;
    const float *const *a, *const *b;
    float *const *c;
    size_t n;
};

static void multiply_all(const void *args)
{
    const struct batch *const x = args;
    struct product p = x->p;

    for (size_t i = 0; i < x->n; i++) {
        p.a = x->a[i];
        p.b = x->b[i];
        p.c = x->c[i];
        multiply(&p);
    }
}

tvk_cb_status cublasSgemmBatched(tvk_cb_handle h, tvk_cb_op ta, tvk_cb_op tb,
                                 int m, int n, int k, const float *alpha,
                                 const float *const *a, int lda,
                                 const float *const *b, int ldb,
                                 const float *beta, float *const *c, int ldc,
                                 int n_problems)
{
    const struct handle *const x = h;
    const size_t bytes = (size_t)n_problems * sizeof(void *);

    /* A device is lost by addresses that are not aligned. */
    if (((uintptr_t)a | (uintptr_t)b | (uintptr_t)c) % sizeof(void *) != 0)
        return INVALID;
    if (!is_ready(x) || n_problems < 1 || !fake_holds(a, bytes) ||
        !fake_holds(b, bytes) || !fake_holds(c, bytes))
        return INVALID;
    const struct batch all = {{ta == TVK_CB_T, tb == TVK_CB_T, (size_t)m,
                               (size_t)n, (size_t)k, (size_t)lda, (size_t)ldb,
                               (size_t)ldc, *alpha, *beta, NULL, NULL, NULL},
                              a,
                              b,
                              c,
                              (size_t)n_problems};
    return fake_call(x->stream, multiply_all, &all, sizeof all) ? FAILED
                                                                : TVK_CB_OK;
}

struct solution {
    size_t m, n, lda, ldb;
    double alpha;
    const double *a;
    double *b;
};

/* Columns of b, from the last row of the upper triangle to the first. */
static void solve(const void *args)
{
    const struct solution *const p = args;

    for (size_t j = 0; j < p->n; j++) {
        double *const b = p->b + j * p->ldb;
        for (size_t i = p->m; i-- > 0;) {
            double sum = p->alpha * b[i];
            for (size_t l = i + 1; l < p->m; l++)
                sum -= p->a[l * p->lda + i] * b[l];
            b[i] = sum / p->a[i * p->lda + i];
        }
    }
}

tvk_cb_status cublasDtrsm_v2(tvk_cb_handle h, tvk_cb_side side,
                             tvk_cb_fill fill, tvk_cb_op ta, tvk_cb_diag diag,
                             int m, int n, const double *alpha, const double *a,
                             int lda, double *b, int ldb)
{
    const struct handle *const x = h;

    if (!is_ready(x) || side != TVK_CB_LEFT || fill != TVK_CB_UPPER ||
        ta != TVK_CB_N || diag != TVK_CB_NON_UNIT ||
        !is_matrix(a, sizeof *a, m, m, lda) ||
        !is_matrix(b, sizeof *b, m, n, ldb))
        return INVALID;
    const struct solution p = {
        (size_t)m, (size_t)n, (size_t)lda, (size_t)ldb, *alpha, a, b};
    return fake_call(x->stream, solve, &p, sizeof p) ? FAILED : TVK_CB_OK;
}
