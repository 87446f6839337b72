/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_iso_c.c - the sum of task vectors with all singular values made equal.
 *
 * With U S V^T the singular value decomposition of D = sum of w_t T_t [m, n],
 * m >= n (else of its transpose):
 *
 *   merged = mean(S) U V^T,     mean over all n values
 *
 * Marczak et al., "No Task Left Behind: Isotropic Model Merging with Common and
 * Task-Specific Subspaces", ICML 2025, arXiv 2502.04959 (Iso-C, equation 6).
 *
 * U V^T = D V S^-1 V^T, so the eigenvectors of D^T D are all that is needed,
 * and the result is one product of D with a matrix [n, n]. Directions in which
 * D does nothing (singular value below 2^-20 of the largest) have no direction
 * to go to: they are left out, where a decomposition would pick any.
 *
 *   pass 1   D^T D, eigenvectors, Y = mean(S) V S^-1 V^T
 *   pass 2   panels of D Y
 */
#include "method.h"

#include <math.h>
#include <stddef.h>

#include "matrix.h"
#include "tv/linalg.h"

enum { N_PARAMS = TVM_MATRIX_PARAMS };
#define RANK_EPSILON (1.0 / 1048576.0)

static const struct tvm_param params[N_PARAMS] = {TVM_MATRIX_PARAM_ROWS};

struct iso_state {
    struct tvm_matrices m;
    double *gram, *y; /* [n, n] */
    double *values;   /* [n] */
    double *work;     /* of tva_eigh; then panels of the workers, two each */
};

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct iso_state *st)
{
    struct tvm_carver c = {base, 0};

    (void)tvm_carve(&c, 1, sizeof *st);
    if (!tvm_matrix_is(job->tensor))
        return c.used;
    const size_t n = tvm_matrix_tall(job->tensor, NULL).n;
    const size_t panels = 2u * job->n_workers * TVM_PANEL * n;
    const size_t eigh = tva_eigh_work(n);
    tvm_matrix_carve(&st->m, &c, job, true);
    st->gram = tvm_carve(&c, n * n, sizeof(double));
    st->y = tvm_carve(&c, n * n, sizeof(double));
    st->values = tvm_carve(&c, n, sizeof(double));
    st->work = tvm_carve(&c, eigh > panels ? eigh : panels, sizeof(double));
    return c.used;
}

static size_t state_bytes(const struct tvm_job *job)
{
    struct iso_state st;

    return lay_out(job, NULL, &st);
}

static bool next_phase(struct tvm_job *job)
{
    if (job->phase == 0)
        (void)lay_out(job, job->state, job->state);
    return tvm_matrix_next_phase(job, 2);
}

static size_t work_items(const struct tvm_job *job)
{
    const struct tvm_matrix a = tvm_matrix_tall(job->tensor, NULL);

    return job->phase == 0 ? 0 : job->phase == 1 ? 1 : tvm_matrix_panels(&a);
}

/* Y from D: the eigenvalues of D^T D are the squares of S. */
static enum tv_err find_y(struct iso_state *st, const struct tvm_matrix *d,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n = d->n;
    double *const g = st->gram;
    double total = 0.0;

    tvm_matrix_gram(d, 1.0, g, st->work);
    TV_TRY(tva_eigh(g, n, st->values, st->work, err));
    const double most = st->values[n - 1] > 0.0 ? sqrt(st->values[n - 1]) : 0.0;
    size_t first = n;
    while (first > 0 && most > 0.0 && st->values[first - 1] > 0.0 &&
           sqrt(st->values[first - 1]) > RANK_EPSILON * most)
        total += sqrt(st->values[--first]);
    /* V diag(1 / s) V^T as W W^T with W = V diag(s^-1/2). */
    for (size_t j = first; j < n; j++) {
        const double f = sqrt(total / (double)n / sqrt(st->values[j]));
        for (size_t i = 0; i < n; i++)
            g[j * n + i] *= f;
    }
    tva_syrk_add(1.0, g + first * n, false, n, n - first, st->y);
    tva_mirror(st->y, n);
out:
    return rc;
}

static enum tv_err work(struct tvm_job *job, size_t item, unsigned worker,
                        struct tv_error *err)
{
    struct iso_state *const st = job->state;
    const struct tvm_matrix d = tvm_matrix_tall(job->tensor, st->m.sum);
    double *const in = st->work + (size_t)worker * 2u * TVM_PANEL * d.n;
    double *const out = in + TVM_PANEL * d.n;
    size_t from = 0;

    if (job->phase == 1)
        return find_y(st, &d, err);
    const size_t count = tvm_matrix_panel(&d, item, &from);
    tvm_matrix_get(&d, from, count, in);
    tva_gemm(st->y, false, in, false, d.n, count, d.n, out);
    tvm_matrix_put(&d, from, count, out);
    return TV_OK;
}

const struct tvm_method tvm_method_iso_c = {
    .name = "iso_c",
    .summary = "sum of task vectors with all singular values made equal",
    .paper = "Iso-C, Marczak et al. 2025, arXiv 2502.04959",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 0,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_PARAMS,
    .check = tvm_matrix_check,
    .fold = tvm_matrix_fold,
    .state_bytes = state_bytes,
    .next_phase = next_phase,
    .measure = tvm_matrix_measure,
    .work_items = work_items,
    .work = work,
    .combine = tvm_matrix_combine,
};
