/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_tsv.c - the leading singular vectors of every task vector, made
 * orthogonal to each other before they are added up.
 *
 * Of every weighted task vector T_t [m, n], m >= n (else of its transpose), t
 * of K, the k = max(1, floor(n / K)) largest singular triples u, s, v are kept
 * and put side by side: U [m, K k], S, V [n, K k]. Then
 *
 *   merged = P(U) S P(V)^T,     P(M) = M (M^T M)^-1/2, the polar factor
 *
 * Gargiulo et al., "Task Singular Vectors: Reducing Task Interference in Model
 * Merging", CVPR 2025, arXiv 2412.00081 (TSV-M, algorithm 1).
 *
 * Only eigenvectors of small symmetric matrices are taken: of T_t^T T_t for V
 * and S (U = T V S^-1), of U^T U and V^T V for the inverse roots. Two cases in
 * which a decomposition would pick any vectors at all are settled: triples
 * with a singular value below 2^-20 of the largest are none (a task vector of
 * low rank has fewer), and directions that several tasks share to 1e-5 count
 * once. Signs and rotations of singular vectors cancel.
 *
 *   pass 1   item t: V_t, S_t, panels of U_t
 *   pass 2   (U^T U)^-1/2, (V^T V)^-1/2
 *   pass 3   B = V (V^T V)^-1/2 S (U^T U)^-1/2     [n, K k]
 *   pass 4   panels of U B^T
 */
#include "method.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "matrix.h"
#include "tv/linalg.h"

enum { N_PARAMS = TVM_MATRIX_PARAMS };
#define RANK_EPSILON   (1.0 / 1048576.0)
#define SHARED_EPSILON 1e-10 /* of squares */

static const struct tvm_param params[N_PARAMS] = {TVM_MATRIX_PARAM_ROWS};

struct tsv_state {
    struct tvm_matrices m;
    size_t k, kk;    /* triples of one task, of all */
    double *u;       /* [m][kk]: rows side by side */
    double *v;       /* [n, kk], later B */
    double *s;       /* [kk] */
    double *root[2]; /* [kk, kk]: of U, of V */
    double *core;    /* [kk, kk] */
    double *scratch; /* [n_workers][each] */
    size_t each;
};

static size_t max3(size_t a, size_t b, size_t c)
{
    const size_t m = a > b ? a : b;
    return m > c ? m : c;
}

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct tsv_state *st)
{
    struct tvm_carver c = {base, 0};

    (void)tvm_carve(&c, 1, sizeof *st);
    if (!tvm_matrix_is(job->tensor))
        return c.used;
    const struct tvm_matrix a = tvm_matrix_tall(job->tensor, NULL);
    const size_t n_tasks = tvm_donor_count(job->tensor);
    st->k = a.n / n_tasks > 0 ? a.n / n_tasks : 1;
    st->kk = st->k * n_tasks;
    tvm_matrix_carve(&st->m, &c, job, false);
    st->u = tvm_carve(&c, a.m * st->kk, sizeof(double));
    st->v = tvm_carve(&c, a.n * st->kk, sizeof(double));
    st->s = tvm_carve(&c, st->kk, sizeof(double));
    st->root[0] = tvm_carve(&c, st->kk * st->kk, sizeof(double));
    st->root[1] = tvm_carve(&c, st->kk * st->kk, sizeof(double));
    st->core = tvm_carve(&c, st->kk * st->kk, sizeof(double));
    /* Pass 1: Gram, its eigenvalues, LAPACK's or two panels. Pass 2: the same
     * for a matrix [kk, kk]. Passes 3 and 4: B, a panel. */
    const size_t n = a.n > st->kk ? a.n : st->kk;
    st->each =
        n * n + n + max3(tva_eigh_work(n), 2u * TVM_PANEL * n, a.n * st->kk);
    st->scratch = tvm_carve(&c, job->n_workers * st->each, sizeof(double));
    return c.used;
}

static size_t state_bytes(const struct tvm_job *job)
{
    struct tsv_state st;

    return lay_out(job, NULL, &st);
}

static bool next_phase(struct tvm_job *job)
{
    if (job->phase == 0)
        (void)lay_out(job, job->state, job->state);
    return tvm_matrix_next_phase(job, 4);
}

static size_t work_items(const struct tvm_job *job)
{
    const struct tsv_state *const st = job->state;
    const struct tvm_matrix a = tvm_matrix_tall(job->tensor, NULL);

    switch (job->phase) {
    case 0:
        return 0;
    case 1:
        return st->m.n;
    case 2:
        return 2;
    case 3:
        return 1;
    default:
        return tvm_matrix_panels(&a);
    }
}

/* Singular triples of one task vector into their columns of u, s and v, which
 * are zeros where there are fewer than k. */
static enum tv_err split(struct tsv_state *st, const struct tvm_tensor *t,
                         size_t task, double *scratch, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_matrix a =
        tvm_matrix_tall(t, st->m.delta + task * t->n_elems);
    const size_t n = a.n;
    double *const g = scratch;
    double *const values = g + n * n;
    double *const panel = values + n;
    double *const out = panel + TVM_PANEL * n;
    double *const v = st->v + task * st->k * n;
    double *const s = st->s + task * st->k;

    memset(g, 0, n * n * sizeof *g);
    tvm_matrix_gram(&a, 1.0, g, panel);
    TV_TRY(tva_eigh(g, n, values, panel, err));
    const double most = values[n - 1] > 0.0 ? sqrt(values[n - 1]) : 0.0;
    size_t found = 0;
    for (; found < st->k && found < n; found++) {
        const double square = values[n - 1 - found];
        const double value = square > 0.0 ? sqrt(square) : 0.0;
        if (most == 0.0 || value <= RANK_EPSILON * most)
            break;
        s[found] = value;
        memcpy(v + found * n, g + (n - 1 - found) * n, n * sizeof *v);
    }
    for (size_t i = 0; i < tvm_matrix_panels(&a); i++) {
        size_t from = 0;
        const size_t count = tvm_matrix_panel(&a, i, &from);
        tvm_matrix_get(&a, from, count, panel);
        /* [found, count] = V^T T^T */
        tva_gemm(v, true, panel, false, found, count, n, out);
        for (size_t r = 0; r < count; r++)
            for (size_t j = 0; j < found; j++)
                st->u[(from + r) * st->kk + task * st->k + j] =
                    out[r * found + j] / s[j];
    }
out:
    return rc;
}

/* g [n, n] symmetric, not negative -> root [n, n] = g^-1/2, on the space where
 * it is not 0. */
static enum tv_err inverse_root(double *g, size_t n, double *values,
                                double *work, double *root,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    TV_TRY(tva_eigh(g, n, values, work, err));
    size_t first = n;
    while (first > 0 && values[first - 1] > SHARED_EPSILON * values[n - 1])
        first--;
    for (size_t j = first; j < n; j++) {
        const double f = pow(values[j], -0.25);
        for (size_t i = 0; i < n; i++)
            g[j * n + i] *= f;
    }
    tva_syrk_add(1.0, g + first * n, false, n, n - first, root);
    tva_mirror(root, n);
out:
    return rc;
}

static enum tv_err find_root(struct tsv_state *st, const struct tvm_matrix *a,
                             size_t which, double *scratch,
                             struct tv_error *err)
{
    const size_t kk = st->kk;
    double *const g = scratch;
    double *const values = g + kk * kk;

    memset(g, 0, kk * kk * sizeof *g);
    if (which == 0)
        tva_syrk_add(1.0, st->u, false, kk, a->m, g);
    else
        tva_syrk_add(1.0, st->v, true, kk, a->n, g);
    return inverse_root(g, kk, values, values + kk, st->root[which], err);
}

/* v becomes B. */
static void find_b(struct tsv_state *st, size_t n, double *scratch)
{
    const size_t kk = st->kk;

    for (size_t j = 0; j < kk; j++)
        for (size_t i = 0; i < kk; i++)
            st->root[1][j * kk + i] *= st->s[j];
    tva_gemm(st->root[1], false, st->root[0], false, kk, kk, kk, st->core);
    tva_gemm(st->v, false, st->core, false, n, kk, kk, scratch);
    memcpy(st->v, scratch, n * kk * sizeof *scratch);
}

static enum tv_err work(struct tvm_job *job, size_t item, unsigned worker,
                        struct tv_error *err)
{
    struct tsv_state *const st = job->state;
    const struct tvm_matrix a = tvm_matrix_tall(job->tensor, st->m.delta);
    double *const scratch = st->scratch + (size_t)worker * st->each;
    size_t from = 0;

    switch (job->phase) {
    case 1:
        return split(st, job->tensor, item, scratch, err);
    case 2:
        return find_root(st, &a, item, scratch, err);
    case 3:
        find_b(st, a.n, scratch);
        return TV_OK;
    default:
        break;
    }
    const size_t count = tvm_matrix_panel(&a, item, &from);
    tva_gemm(st->v, false, st->u + from * st->kk, false, a.n, count, st->kk,
             scratch);
    tvm_matrix_put(&a, from, count, scratch);
    return TV_OK;
}

const struct tvm_method tvm_method_tsv = {
    .name = "tsv",
    .summary = "leading singular vectors of all task vectors, made orthogonal",
    .paper = "TSV-M, Gargiulo et al. 2025, arXiv 2412.00081",
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
