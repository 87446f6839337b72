/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fake_cusolver.c - the Cholesky factorisation of cuSOLVER as a plain loop; see
 * fake_cublas.c.
 */
#include <math.h>
#include <stdlib.h>

#include "cuda/cuda_blas_abi.h"
#include "fake_library.h"

#define INVALID 3 /* CUSOLVER_STATUS_INVALID_VALUE */
#define FAILED  6 /* CUSOLVER_STATUS_EXECUTION_FAILED */
#define N_WORK  96

#define DECLARE(field, symbol, params)                                         \
    EXPORT tvk_cb_solver_status symbol params;
TVK_CUDA_CUSOLVER(DECLARE)

struct handle {
    void *stream;
};

tvk_cb_solver_status cusolverDnCreate(tvk_cb_solver *h)
{
    *h = find_driver() ? calloc(1, sizeof(struct handle)) : NULL;
    return *h ? TVK_CB_OK : 1;
}

tvk_cb_solver_status cusolverDnDestroy(tvk_cb_solver h)
{
    free(h);
    return TVK_CB_OK;
}

tvk_cb_solver_status cusolverDnSetStream(tvk_cb_solver h, tvk_cb_stream s)
{
    struct handle *const x = h;

    x->stream = s;
    return TVK_CB_OK;
}

tvk_cb_solver_status cusolverDnDpotrf_bufferSize(tvk_cb_solver h,
                                                 tvk_cb_fill fill, int n,
                                                 double *a, int lda,
                                                 int *n_work)
{
    (void)h;
    *n_work = N_WORK;
    return fill == TVK_CB_UPPER && is_matrix(a, sizeof *a, n, n, lda)
               ? TVK_CB_OK
               : INVALID;
}

struct factor {
    size_t n, ld;
    double *a, *work;
    int *info;
};

/* a = r^T r, r upper; column by column. */
static void factorise(const void *args)
{
    const struct factor *const f = args;

    memset(f->work, 0x3c, N_WORK * sizeof *f->work);
    *f->info = 0;
    for (size_t j = 0; j < f->n; j++) {
        double *const cj = f->a + j * f->ld;
        for (size_t i = 0; i <= j; i++) {
            const double *const ci = f->a + i * f->ld;
            double sum = cj[i];
            for (size_t l = 0; l < i; l++)
                sum -= ci[l] * cj[l];
            if (i < j) {
                cj[i] = sum / ci[i];
            } else if (sum > 0) {
                cj[j] = sqrt(sum);
            } else { /* a NaN too */
                *f->info = (int)j + 1;
                return;
            }
        }
    }
}

tvk_cb_solver_status cusolverDnDpotrf(tvk_cb_solver h, tvk_cb_fill fill, int n,
                                      double *a, int lda, double *work,
                                      int n_work, int *info)
{
    const struct handle *const x = h;
    const struct factor f = {(size_t)n, (size_t)lda, a, work, info};

    if (!x->stream || fill != TVK_CB_UPPER ||
        !is_matrix(a, sizeof *a, n, n, lda) || n_work < N_WORK ||
        !fake_holds(work, N_WORK * sizeof *work) ||
        !fake_holds(info, sizeof *info))
        return INVALID;
    return fake_call(x->stream, factorise, &f, sizeof f) ? FAILED : TVK_CB_OK;
}
