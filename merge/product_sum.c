/* SPDX-License-Identifier: Apache-2.0 */
/*
 * product_sum.c - sums of low-rank products, factored without forming them.
 *
 *   sum of B_t A_t = [B_1 ... B_K] [A_1; ...; A_K] = Ub (Rb Ra^T) Ua^T
 *
 * so its singular values and vectors are those of the small core Rb Ra^T, of
 * the sum of ranks squared: the truncation is the best one (Eckart-Young), for
 * about 2 (out + in) cols^2 operations and (out + in) cols numbers.
 */
#include "product_sum.h"

#include <math.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/linalg.h"

static double *doubles(size_t a, size_t b)
{
    size_t n = 0;
    if (!tv_mul_size(a, b, &n) || !tv_mul_size(n, sizeof(double), &n))
        return NULL;
    return tv_alloc_aligned(n + 64);
}

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory for factors");
}

/* stack [rows, cols] -> *u [rows, k], *r [k, cols]. Takes the stack over. */
static enum tv_err basis(double *stack, size_t rows, size_t cols, double **u,
                         double **r, struct tv_error *err)
{
    const size_t k = rows < cols ? rows : cols;
    double *t = doubles(k, cols), *copy = doubles(k, cols);
    double *tu = doubles(k, k), *s = doubles(k, 1), *vt = doubles(k, cols);
    enum tv_err rc = TV_OK;

    *u = doubles(rows, k);
    *r = doubles(k, cols);
    if (!t || !copy || !tu || !s || !vt || !*u || !*r) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(tva_qr(stack, rows, cols, t, err));
    memcpy(copy, t, k * cols * sizeof *t);
    TV_TRY(tva_svd(copy, k, cols, tu, s, vt, err));
    tva_gemm(stack, false, tu, false, rows, k, k, *u);
    tva_gemm(tu, true, t, false, k, cols, k, *r);
out:
    tv_free(vt);
    tv_free(s);
    tv_free(tu);
    tv_free(copy);
    tv_free(t);
    tv_free(stack);
    return rc;
}

enum tv_err tvm_core_make(struct tvm_core *c, double *b, double *a_t,
                          size_t out, size_t in, size_t cols,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    *c = (struct tvm_core){.out = out, .in = in, .cols = cols};
    c->kb = out < cols ? out : cols;
    c->ka = in < cols ? in : cols;
    rc = basis(b, out, cols, &c->ub, &c->rb, err);
    if (rc != TV_OK) {
        tv_free(a_t);
        return rc;
    }
    return basis(a_t, in, cols, &c->ua, &c->ra, err);
}

void tvm_core_free(struct tvm_core *c)
{
    tv_free(c->ub);
    tv_free(c->rb);
    tv_free(c->ua);
    tv_free(c->ra);
    *c = (struct tvm_core){.out = 0};
}

void tvm_core_product(const struct tvm_core *c, size_t from, size_t to,
                      double *m)
{
    tva_gemm(c->rb + from * c->kb, false, c->ra + from * c->ka, true, c->kb,
             c->ka, to - from, m);
}

enum tv_err tvm_core_factor(const struct tvm_core *c, double *m, size_t r,
                            bool left, float *a, float *b, struct tv_error *err)
{
    const size_t k = c->kb < c->ka ? c->kb : c->ka;
    double *u = doubles(c->kb, k), *s = doubles(k, 1), *vt = doubles(k, c->ka);
    double *wide = doubles(c->out > c->in ? c->out : c->in, k);
    enum tv_err rc = TV_OK;

    if (!u || !s || !vt || !wide) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(tva_svd(m, c->kb, c->ka, u, s, vt, err));
    tva_gemm(c->ub, false, u, false, c->out, k, c->kb, wide);
    for (size_t i = 0; i < r; i++) {
        const double f = left ? s[i] : sqrt(s[i]);
        for (size_t o = 0; o < c->out; o++)
            b[o * r + i] = (float)(wide[i * c->out + o] * f);
    }
    tva_gemm(c->ua, false, vt, true, c->in, k, c->ka, wide);
    for (size_t i = 0; i < r; i++) {
        const double f = left ? 1 : sqrt(s[i]);
        for (size_t j = 0; j < c->in; j++)
            a[i * c->in + j] = (float)(wide[i * c->in + j] * f);
    }
out:
    tv_free(wide);
    tv_free(vt);
    tv_free(s);
    tv_free(u);
    return rc;
}
