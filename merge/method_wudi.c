/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_wudi.c - the change that disturbs no task where it acts.
 *
 * Of the weighted task vectors T_t [out, in] with C_t = T_t^T T_t / |T_t|^2,
 * what the rows of T_t say about the inputs of task t, and S = sum of T_t:
 *
 *   merged = argmin_P  sum of |(P - T_t) T_t^T|^2 / |T_t|^2  +  e |P - S|^2
 *          = (sum of T_t C_t + e S) (sum of C_t + e)^-1
 *   e = regularization * mean of the diagonal of sum C_t
 *
 * Cheng et al., "Whoever Started the Interference Should End It: Guiding
 * Data-Free Model Merging via Task Vectors", ICML 2025, arXiv 2503.08099
 * (WUDI, equation 8). The paper descends from S for 300 steps; this is where it
 * would end, but for the term with e, which decides where no task vector acts
 * and takes the place of stopping early.
 *
 * With A = the T_t / |T_t| on top of each other [q, in], q = K out, two ways:
 *
 *   q > in:  sums of C_t [in, in] and of T_t C_t, one Cholesky factorisation
 *            passes 1 .. 2K  C_t; panels of the sum of T_t C_t
 *            pass 2K + 1     factor
 *            pass 2K + 2     panels of the solution
 *   q <= in: merged = S + Q (A A^T + e)^-1 A, where Q = [(T_t - S) T_t^T /
 *            |T_t|] [out, q] is made of blocks of A A^T [q, q]
 *            pass 1          A A^T
 *            pass 2          Q, factor, solution Z [out, q]
 *            pass 3          panels of S + Z A
 */
#include "method.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "matrix.h"
#include "tv/linalg.h"

enum { P_REGULARIZATION = TVM_MATRIX_PARAMS, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    TVM_MATRIX_PARAM_ROWS,
    [P_REGULARIZATION] = {.name = "regularization",
                          .scope = TVM_SHARED,
                          .type = TVM_FLOAT,
                          .has_default = true,
                          .fallback = 0.01,
                          TVM_FROM(1e-10),
                          .help = "pull towards the sum of task vectors"},
};

struct wudi_state {
    struct tvm_matrices m;
    size_t out, in, q;
    double *norm;   /* [K] |T_t| */
    double *gram;   /* [in, in]: C_t; or A A^T [q, q] */
    double *sum;    /* [in, in]: of C_t */
    double *rhs;    /* [out][in]: sum of T_t C_t; or Z [out][q] */
    double *panels; /* [n_workers][each] */
    size_t each;
};

static bool is_dual(const struct wudi_state *st)
{
    return st->q <= st->in;
}

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct wudi_state *st)
{
    struct tvm_carver c = {base, 0};

    (void)tvm_carve(&c, 1, sizeof *st);
    if (!tvm_matrix_is(job->tensor))
        return c.used;
    const struct tvm_matrix a = tvm_matrix_out_in(job->tensor, NULL);
    const size_t k = tvm_donor_count(job->tensor);
    st->out = a.m;
    st->in = a.n;
    st->q = k * a.m;
    tvm_matrix_carve(&st->m, &c, job, false);
    st->norm = tvm_carve(&c, k, sizeof(double));
    if (is_dual(st)) {
        st->gram = tvm_carve(&c, st->q * st->q, sizeof(double));
        st->rhs = tvm_carve(&c, st->out * st->q, sizeof(double));
        /* A panel of all task vectors, one of the result, one of input. */
        st->each = TVM_PANEL * (st->q + 2u * st->out);
    } else {
        st->gram = tvm_carve(&c, a.n * a.n, sizeof(double));
        st->sum = tvm_carve(&c, a.n * a.n, sizeof(double));
        st->rhs = tvm_carve(&c, a.m * a.n, sizeof(double));
        st->each = TVM_PANEL * a.n;
    }
    st->panels = tvm_carve(&c, job->n_workers * st->each, sizeof(double));
    return c.used;
}

static size_t state_bytes(const struct tvm_job *job)
{
    struct wudi_state st;

    return lay_out(job, NULL, &st);
}

static bool next_phase(struct tvm_job *job)
{
    struct wudi_state *const st = job->state;

    if (job->phase == 0)
        (void)lay_out(job, st, st);
    return tvm_matrix_next_phase(
        job, is_dual(st) ? 3u : (unsigned)(2 * st->m.n + 2));
}

static size_t work_items(const struct tvm_job *job)
{
    const struct wudi_state *const st = job->state;
    const size_t k = st->m.n;
    const bool dual = is_dual(st);

    if (job->phase == 0)
        return 0;
    if (dual ? job->phase < 3
             : job->phase == 2 * k + 1 ||
                   (job->phase <= 2 * k && job->phase % 2 == 1))
        return 1;
    /* Rows of the result; or of its transpose. */
    return ((dual ? st->in : st->out) + TVM_PANEL - 1) / TVM_PANEL;
}

/* Of sum C_t, whose trace is the number of tasks that changed anything. */
static double damping(const struct tvm_job *job)
{
    const struct wudi_state *const st = job->state;
    double tasks = 0.0;

    for (size_t t = 0; t < st->m.n; t++)
        tasks += st->norm[t] > 0.0;
    return tvm_shared(job->tensor, P_REGULARIZATION) * tasks / (double)st->in;
}

/* ---- more task vectors than inputs --------------------------------------- */

static struct tvm_matrix task(const struct tvm_job *job, size_t t)
{
    const struct wudi_state *const st = job->state;

    return tvm_matrix_out_in(job->tensor,
                             st->m.delta + t * job->tensor->n_elems);
}

static void add_gram(const struct tvm_job *job, size_t t)
{
    struct wudi_state *const st = job->state;
    const struct tvm_matrix a = task(job, t);
    const size_t n = a.n;
    double square = 0.0;

    memset(st->gram, 0, n * n * sizeof *st->gram);
    tvm_matrix_gram(&a, 1.0, st->gram, st->panels);
    for (size_t i = 0; i < n; i++)
        square += st->gram[i * n + i];
    st->norm[t] = sqrt(square);
    tva_mirror(st->gram, n);
    for (size_t i = 0; square > 0.0 && i < n * n; i++) {
        st->gram[i] /= square;
        st->sum[i] += st->gram[i];
    }
}

static void add_rhs(const struct tvm_job *job, size_t t, size_t item,
                    double *panel)
{
    struct wudi_state *const st = job->state;
    const struct tvm_matrix a = task(job, t);
    size_t from = 0;
    const size_t count = tvm_matrix_panel(&a, item, &from);

    if (st->norm[t] == 0.0)
        return;
    tvm_matrix_get(&a, from, count, panel);
    tva_gemm_add(1.0, st->gram, false, panel, false, a.n, count, a.n,
                 st->rhs + from * a.n);
}

/* Rows of the result into the place of the first task vector. */
static enum tv_err solve(const struct tvm_job *job, size_t item, double *panel,
                         struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct wudi_state *const st = job->state;
    const struct tvm_matrix first = task(job, 0);
    const double e = damping(job);
    size_t from = 0;
    const size_t count = tvm_matrix_panel(&first, item, &from);
    double *const rhs = st->rhs + from * first.n;

    for (size_t t = 0; t < st->m.n; t++) {
        const struct tvm_matrix a = task(job, t);
        tvm_matrix_get(&a, from, count, panel);
        for (size_t i = 0; i < count * a.n; i++)
            rhs[i] += e * panel[i];
    }
    TV_TRY(tva_cholesky_solve(st->sum, first.n, rhs, count, err));
    tvm_matrix_put(&first, from, count, rhs);
out:
    return rc;
}

/* ---- fewer --------------------------------------------------------------- */

/* Inputs [from, from + count) of all task vectors: [count][q], each T_t as it
 * is or by its norm; plain [count][out]: their sum; may be NULL. */
static void get_all(const struct tvm_job *job, size_t from, size_t count,
                    double *all, double *one, double *plain)
{
    const struct wudi_state *const st = job->state;

    for (size_t t = 0; t < st->m.n; t++) {
        struct tvm_matrix a = task(job, t);
        const double f = st->norm[t] > 0.0 ? 1.0 / st->norm[t] : 0.0;
        a = (struct tvm_matrix){a.x, a.n, a.m, !a.flip};
        tvm_matrix_get(&a, from, count, one);
        for (size_t i = 0; i < count; i++)
            for (size_t j = 0; j < st->out; j++)
                all[i * st->q + t * st->out + j] = one[i * st->out + j] * f;
        for (size_t i = 0; plain && i < count * st->out; i++)
            plain[i] = (t > 0 ? plain[i] : 0.0) + one[i];
    }
}

static void find_norms(const struct tvm_job *job)
{
    struct wudi_state *const st = job->state;

    for (size_t t = 0; t < st->m.n; t++) {
        const float *const x = st->m.delta + t * job->tensor->n_elems;
        double square = 0.0;
        for (size_t i = 0; i < job->tensor->n_elems; i++)
            square += (double)x[i] * (double)x[i];
        st->norm[t] = sqrt(square);
    }
}

static void outer_gram(const struct tvm_job *job)
{
    struct wudi_state *const st = job->state;

    find_norms(job);
    for (size_t from = 0; from < st->in; from += TVM_PANEL) {
        const size_t count =
            st->in - from < TVM_PANEL ? st->in - from : TVM_PANEL;
        get_all(job, from, count, st->panels, st->panels + TVM_PANEL * st->q,
                NULL);
        tva_syrk_add(1.0, st->panels, false, st->q, count, st->gram);
    }
    tva_mirror(st->gram, st->q);
}

/* Row i of Q: block t is |T_t| M_tt - sum over s of |T_s| M_st, M = A A^T. */
static enum tv_err outer_solve(const struct tvm_job *job, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct wudi_state *const st = job->state;
    const size_t q = st->q;
    const double e = damping(job);

    for (size_t i = 0; i < st->out; i++)
        for (size_t t = 0; t < st->m.n; t++)
            for (size_t j = 0; j < st->out; j++) {
                const double *const column = st->gram + (t * st->out + j) * q;
                double sum = st->norm[t] * column[t * st->out + i];
                for (size_t s = 0; s < st->m.n; s++)
                    sum -= st->norm[s] * column[s * st->out + i];
                st->rhs[i * q + t * st->out + j] = sum;
            }
    /* Nothing changed: nothing to solve. */
    if (e == 0.0)
        goto out;
    for (size_t i = 0; i < q; i++)
        st->gram[i * q + i] += e;
    TV_TRY(tva_cholesky(st->gram, q, err));
    TV_TRY(tva_cholesky_solve(st->gram, q, st->rhs, st->out, err));
out:
    return rc;
}

static void outer_put(const struct tvm_job *job, size_t item, double *panel)
{
    const struct wudi_state *const st = job->state;
    struct tvm_matrix a = task(job, 0);
    double *const one = panel + TVM_PANEL * st->q;
    double *const sum = one + TVM_PANEL * st->out;
    size_t from = 0;

    a = (struct tvm_matrix){a.x, a.n, a.m, !a.flip};
    const size_t count = tvm_matrix_panel(&a, item, &from);
    get_all(job, from, count, panel, one, sum);
    tva_gemm_add(1.0, st->rhs, true, panel, false, st->out, count, st->q, sum);
    tvm_matrix_put(&a, from, count, sum);
}

static enum tv_err work(struct tvm_job *job, size_t item, unsigned worker,
                        struct tv_error *err)
{
    struct wudi_state *const st = job->state;
    double *const panel = st->panels + (size_t)worker * st->each;
    const size_t k = st->m.n;

    if (is_dual(st)) {
        if (job->phase == 1)
            outer_gram(job);
        else if (job->phase == 2)
            return outer_solve(job, err);
        else
            outer_put(job, item, panel);
        return TV_OK;
    }
    if (job->phase <= 2 * k) {
        const size_t t = (job->phase - 1) / 2;
        if (job->phase % 2 == 1)
            add_gram(job, t);
        else
            add_rhs(job, t, item, panel);
        return TV_OK;
    }
    if (job->phase > 2 * k + 1)
        return damping(job) == 0.0 ? TV_OK : solve(job, item, panel, err);
    const double e = damping(job);
    for (size_t i = 0; i < st->in; i++)
        st->sum[i * st->in + i] += e;
    return e == 0.0 ? TV_OK : tva_cholesky(st->sum, st->in, err);
}

const struct tvm_method tvm_method_wudi = {
    .name = "wudi",
    .summary = "change that disturbs no task vector in its own row space",
    .paper = "WUDI, Cheng et al. 2025, arXiv 2503.08099, in closed form",
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
