/* SPDX-License-Identifier: Apache-2.0 */
/*
 * linalg.c - the only file of adapt/ that calls BLAS and LAPACK.
 *
 * LAPACK is part of OpenBLAS; its Fortran entry points are declared here. They
 * report bad arguments (our bugs) and SVDs that do not converge.
 */
#include "tv/linalg.h"

#include <assert.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

#ifdef TVA_HAVE_OPENBLAS

#include <cblas.h>

void dgeqrf_(const blasint *m, const blasint *n, double *a, const blasint *lda,
             double *tau, double *work, const blasint *lwork, blasint *info);
void dorgqr_(const blasint *m, const blasint *n, const blasint *k, double *a,
             const blasint *lda, const double *tau, double *work,
             const blasint *lwork, blasint *info);
void dgesdd_(const char *jobz, const blasint *m, const blasint *n, double *a,
             const blasint *lda, double *s, double *u, const blasint *ldu,
             double *vt, const blasint *ldvt, double *work,
             const blasint *lwork, blasint *iwork, blasint *info);

void dsyevd_(const char *jobz, const char *uplo, const blasint *n, double *a,
             const blasint *lda, double *w, double *work, const blasint *lwork,
             blasint *iwork, const blasint *liwork, blasint *info);
void dpotrf_(const char *uplo, const blasint *n, double *a, const blasint *lda,
             blasint *info);
void dpotrs_(const char *uplo, const blasint *n, const blasint *nrhs,
             const double *a, const blasint *lda, double *b, const blasint *ldb,
             blasint *info);

bool tva_linalg_built(void)
{
    return true;
}

const char *tva_linalg_core(void)
{
    return openblas_get_corename();
}

void tva_gemm_add(double alpha, const double *a, bool ta, const double *b,
                  bool tb, size_t m, size_t n, size_t k, double *c)
{
    if (m == 0 || n == 0 || k == 0)
        return;
    openblas_set_num_threads(1);
    cblas_dgemm(CblasColMajor, ta ? CblasTrans : CblasNoTrans,
                tb ? CblasTrans : CblasNoTrans, (blasint)m, (blasint)n,
                (blasint)k, alpha, a, (blasint)(ta ? k : m), b,
                (blasint)(tb ? n : k), 1.0, c, (blasint)m);
}

void tva_syrk_add(double alpha, const double *a, bool transposed, size_t n,
                  size_t k, double *c)
{
    if (n == 0 || k == 0)
        return;
    openblas_set_num_threads(1);
    cblas_dsyrk(CblasColMajor, CblasLower,
                transposed ? CblasTrans : CblasNoTrans, (blasint)n, (blasint)k,
                alpha, a, (blasint)(transposed ? k : n), 1.0, c, (blasint)n);
}

void tva_gemm(const double *a, bool ta, const double *b, bool tb, size_t m,
              size_t n, size_t k, double *c)
{
    if (m == 0 || n == 0)
        return;
    if (k == 0) {
        memset(c, 0, m * n * sizeof *c);
        return;
    }
    openblas_set_num_threads(1);
    cblas_dgemm(CblasColMajor, ta ? CblasTrans : CblasNoTrans,
                tb ? CblasTrans : CblasNoTrans, (blasint)m, (blasint)n,
                (blasint)k, 1.0, a, (blasint)(ta ? k : m), b,
                (blasint)(tb ? n : k), 0.0, c, (blasint)m);
}

/* Workspace of the size that the first call, with lwork -1, asked for. */
static double *workspace(double asked, blasint *lwork)
{
    *lwork = asked < 1 ? 1 : (blasint)asked;
    return tv_alloc((size_t)*lwork * sizeof(double));
}

static enum tv_err failed(const char *what, blasint info, struct tv_error *err)
{
    return tv_error_set(err, TV_E_INTERNAL, "%s gave up (info %d)", what,
                        (int)info);
}

enum tv_err tva_qr(double *m, size_t rows, size_t cols, double *r,
                   struct tv_error *err)
{
    const size_t k = rows < cols ? rows : cols;
    const blasint bm = (blasint)rows, bn = (blasint)cols, bk = (blasint)k;
    double *tau = tv_alloc((k + 1) * sizeof *tau);
    double *work = NULL;
    double asked[2] = {0, 0};
    blasint lwork = -1, info = 0;
    enum tv_err rc = TV_OK;

    openblas_set_num_threads(1);
    if (!tau)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    if (k == 0)
        goto out;
    dgeqrf_(&bm, &bn, m, &bm, tau, &asked[0], &lwork, &info);
    dorgqr_(&bm, &bk, &bk, m, &bm, tau, &asked[1], &lwork, &info);
    work = workspace(asked[0] > asked[1] ? asked[0] : asked[1], &lwork);
    if (!work) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    dgeqrf_(&bm, &bn, m, &bm, tau, work, &lwork, &info);
    if (info != 0) {
        rc = failed("dgeqrf", info, err);
        goto out;
    }
    for (size_t c = 0; c < cols; c++)
        for (size_t i = 0; i < k; i++)
            r[c * k + i] = i <= c ? m[c * rows + i] : 0;
    dorgqr_(&bm, &bk, &bk, m, &bm, tau, work, &lwork, &info);
    if (info != 0)
        rc = failed("dorgqr", info, err);
out:
    tv_free(work);
    tv_free(tau);
    return rc;
}

enum tv_err tva_svd(double *m, size_t rows, size_t cols, double *u, double *s,
                    double *vt, struct tv_error *err)
{
    const size_t k = rows < cols ? rows : cols;
    const blasint bm = (blasint)rows, bn = (blasint)cols, bk = (blasint)k;
    blasint *iwork = tv_alloc((8 * k + 1) * sizeof *iwork);
    double *work = NULL;
    double asked = 0;
    blasint lwork = -1, info = 0;
    enum tv_err rc = TV_OK;

    openblas_set_num_threads(1);
    if (!iwork)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    if (k == 0)
        goto out;
    dgesdd_("S", &bm, &bn, m, &bm, s, u, &bm, vt, &bk, &asked, &lwork, iwork,
            &info);
    work = workspace(asked, &lwork);
    if (!work) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    dgesdd_("S", &bm, &bn, m, &bm, s, u, &bm, vt, &bk, work, &lwork, iwork,
            &info);
    if (info != 0)
        rc = failed("dgesdd", info, err);
out:
    tv_free(work);
    tv_free(iwork);
    return rc;
}

size_t tva_eigh_work(size_t n)
{
    /* dsyevd's 1 + 6 n + 2 n^2 doubles and 3 + 5 n integers. */
    return (1 + 6 * n + 2 * n * n) +
           ((3 + 5 * n) * sizeof(blasint) + sizeof(double) - 1) /
               sizeof(double);
}

enum tv_err tva_eigh(double *a, size_t n, double *w, double *work,
                     struct tv_error *err)
{
    const blasint bn = (blasint)n;
    const blasint lwork = (blasint)(1 + 6 * n + 2 * n * n);
    const blasint liwork = (blasint)(3 + 5 * n);
    blasint info = 0;

    if (n == 0)
        return TV_OK;
    openblas_set_num_threads(1);
    dsyevd_("V", "L", &bn, a, &bn, w, work, &lwork,
            (blasint *)(void *)(work + lwork), &liwork, &info);
    return info == 0 ? TV_OK : failed("dsyevd", info, err);
}

enum tv_err tva_cholesky(double *a, size_t n, struct tv_error *err)
{
    const blasint bn = (blasint)n;
    blasint info = 0;

    if (n == 0)
        return TV_OK;
    openblas_set_num_threads(1);
    dpotrf_("L", &bn, a, &bn, &info);
    if (info > 0)
        return tv_error_set(err, TV_E_INPUT,
                            "a matrix of %zu columns is not positive definite",
                            n);
    return info == 0 ? TV_OK : failed("dpotrf", info, err);
}

enum tv_err tva_cholesky_solve(const double *factor, size_t n, double *b,
                               size_t k, struct tv_error *err)
{
    const blasint bn = (blasint)n, bk = (blasint)k;
    blasint info = 0;

    if (n == 0 || k == 0)
        return TV_OK;
    openblas_set_num_threads(1);
    dpotrs_("L", &bn, &bk, factor, &bn, b, &bn, &info);
    return info == 0 ? TV_OK : failed("dpotrs", info, err);
}

#else

bool tva_linalg_built(void)
{
    return false;
}

const char *tva_linalg_core(void)
{
    return "";
}

void tva_gemm_add(double alpha, const double *a, bool ta, const double *b,
                  bool tb, size_t m, size_t n, size_t k, double *c)
{
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < m; i++)
            for (size_t l = 0; l < k; l++)
                c[j * m + i] += alpha * (ta ? a[i * k + l] : a[l * m + i]) *
                                (tb ? b[l * n + j] : b[j * k + l]);
}

void tva_syrk_add(double alpha, const double *a, bool transposed, size_t n,
                  size_t k, double *c)
{
    for (size_t j = 0; j < n; j++)
        for (size_t i = j; i < n; i++)
            for (size_t l = 0; l < k; l++)
                c[j * n + i] += alpha *
                                (transposed ? a[i * k + l] : a[l * n + i]) *
                                (transposed ? a[j * k + l] : a[l * n + j]);
}

void tva_gemm(const double *a, bool ta, const double *b, bool tb, size_t m,
              size_t n, size_t k, double *c)
{
    for (size_t j = 0; j < n; j++)
        for (size_t i = 0; i < m; i++) {
            double sum = 0;
            for (size_t l = 0; l < k; l++)
                sum += (ta ? a[i * k + l] : a[l * m + i]) *
                       (tb ? b[l * n + j] : b[j * k + l]);
            c[j * m + i] = sum;
        }
}

static enum tv_err missing(struct tv_error *err)
{
    return tv_error_set(err, TV_E_UNSUPPORTED,
                        "this build has no OpenBLAS, which LAPACK comes with");
}

enum tv_err tva_qr(double *m, size_t rows, size_t cols, double *r,
                   struct tv_error *err)
{
    (void)m, (void)rows, (void)cols, (void)r;
    return missing(err);
}

enum tv_err tva_svd(double *m, size_t rows, size_t cols, double *u, double *s,
                    double *vt, struct tv_error *err)
{
    (void)m, (void)rows, (void)cols, (void)u, (void)s, (void)vt;
    return missing(err);
}

size_t tva_eigh_work(size_t n)
{
    (void)n;
    return 0;
}

enum tv_err tva_eigh(double *a, size_t n, double *w, double *work,
                     struct tv_error *err)
{
    (void)a, (void)n, (void)w, (void)work;
    return missing(err);
}

enum tv_err tva_cholesky(double *a, size_t n, struct tv_error *err)
{
    (void)a, (void)n;
    return missing(err);
}

enum tv_err tva_cholesky_solve(const double *factor, size_t n, double *b,
                               size_t k, struct tv_error *err)
{
    (void)factor, (void)n, (void)b, (void)k;
    return missing(err);
}

#endif

void tva_mirror(double *c, size_t n)
{
    for (size_t j = 0; j < n; j++)
        for (size_t i = j + 1; i < n; i++)
            c[i * n + j] = c[j * n + i];
}
