/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_regmean.c - the layer whose outputs are nearest to every model's own,
 * each on the inputs of its own task.
 *
 * With task vectors T_t [out, in] and G_t the mean of x x^T over the inputs x
 * that the layer has in model t when that runs over its text, entries off the
 * diagonal times `non_diagonal`, weights w_t, M = sum w_t T_t / sum w_t:
 *
 *   merged = argmin_P  sum of w_t |(P - T_t) G_t^1/2|^2  +  e |P - M|^2
 *          = M + (sum of w_t (T_t - M) G_t) (sum of w_t G_t + e)^-1
 *   e = regularization * mean of the diagonal of sum w_t G_t
 *
 * Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language
 * Models", ICLR 2023, arXiv 2212.09849 (RegMean, equation 2), on differences to
 * the base, which gives the same weights. The term with e, which the paper has
 * not, decides about inputs that are always 0. Other tensors get M.
 *
 * regmean++ (Nguyen et al., arXiv 2508.03121): the same, but the inputs x of a
 * block are those that the merged blocks below it give, passed through model
 * t's own block (sequential.h).
 *
 *   passes 1 .. 2K  G_t; panels of the sum of w_t (T_t - M) G_t
 *   pass 2K + 1     Cholesky factor
 *   pass 2K + 2     panels of the solution
 */
#include "method.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

#include "calibrated.h"
#include "matrix.h"
#include "tv/linalg.h"

enum { P_NON_DIAGONAL = TVM_MATRIX_PARAMS, P_REGULARIZATION, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    TVM_MATRIX_PARAM_ROWS,
    [P_NON_DIAGONAL] = {.name = "non_diagonal",
                        .scope = TVM_SHARED,
                        .type = TVM_FLOAT,
                        .has_default = true,
                        .fallback = 0.9,
                        TVM_WITHIN(0.0, 1.0),
                        .help = "factor of what two inputs have in common"},
    [P_REGULARIZATION] = {.name = "regularization",
                          .scope = TVM_SHARED,
                          .type = TVM_FLOAT,
                          .has_default = true,
                          .fallback = 1e-8,
                          TVM_FROM(1e-12),
                          .help = "pull towards the mean of task vectors"},
};

static const struct tvm_matrix_detail detail = {.weighs_models = true};

struct regmean_state {
    struct tvm_matrices m;
    size_t out, in;
    double *gram;   /* [in, in]: G_t */
    double *sum;    /* [in, in]: of w_t G_t */
    double *rhs;    /* [out][in] */
    double *panels; /* [n_workers][2][TVM_PANEL][in] */
    double e;
};

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct regmean_state *st)
{
    struct tvm_carver c = {base, 0};

    (void)tvm_carve(&c, 1, sizeof *st);
    if (!tvm_matrix_is(job->tensor))
        return c.used;
    const struct tvm_matrix a = tvm_matrix_out_in(job->tensor, NULL);
    st->out = a.m;
    st->in = a.n;
    tvm_matrix_carve(&st->m, &c, job, false);
    st->gram = tvm_carve(&c, a.n * a.n, sizeof(double));
    st->sum = tvm_carve(&c, a.n * a.n, sizeof(double));
    st->rhs = tvm_carve(&c, a.m * a.n, sizeof(double));
    st->panels =
        tvm_carve(&c, 2u * job->n_workers * TVM_PANEL * a.n, sizeof(double));
    return c.used;
}

static void check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    double sum = 0.0;

    tvm_matrix_check(t, problems);
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        const double w = tvm_of(t, s, TVM_MATRIX_WEIGHT, N_PARAMS);
        sum += w;
        if (w < 0.0)
            tvm_param_problem(t, TVM_MATRIX_WEIGHT, s, problems,
                              "%s takes no negative weights", t->method->name);
    }
    if (tvm_donor_count(t) > 0 && !(sum > 0.0))
        tvm_param_problem(t, TVM_MATRIX_WEIGHT, t->base == 0 ? 1 : 0, problems,
                          "the weights of %s add up to nothing",
                          t->method->name);
}

static size_t state_bytes(const struct tvm_job *job)
{
    struct regmean_state st;

    return lay_out(job, NULL, &st);
}

static bool next_phase(struct tvm_job *job)
{
    struct regmean_state *const st = job->state;

    if (job->phase == 0)
        (void)lay_out(job, st, st);
    return tvm_matrix_next_phase(job, (unsigned)(2 * st->m.n + 2));
}

static size_t work_items(const struct tvm_job *job)
{
    const struct regmean_state *const st = job->state;
    const size_t k = st->m.n;

    if (job->phase == 0)
        return 0;
    if (job->phase == 2 * k + 1 || (job->phase <= 2 * k && job->phase % 2 == 1))
        return 1;
    return (st->out + TVM_PANEL - 1) / TVM_PANEL;
}

/* Which source task vector t came from. */
static size_t source_of(const struct tvm_tensor *t, size_t task)
{
    for (size_t s = 0; s < t->n_sources; s++)
        if ((int)s != t->base && task-- == 0)
            return s;
    return t->n_sources;
}

static double weight_of(const struct tvm_job *job, size_t task)
{
    return tvm_of(job->tensor, source_of(job->tensor, task), TVM_MATRIX_WEIGHT,
                  N_PARAMS);
}

static struct tvm_matrix task_of(const struct tvm_job *job, size_t task)
{
    const struct regmean_state *const st = job->state;

    return tvm_matrix_out_in(job->tensor,
                             st->m.delta + task * job->tensor->n_elems);
}

static enum tv_err add_gram(const struct tvm_job *job, size_t task,
                            struct tv_error *err)
{
    struct regmean_state *const st = job->state;
    const double off = tvm_shared(job->tensor, P_NON_DIAGONAL);
    const double w = weight_of(job, task);
    const size_t n = st->in;
    uint64_t n_rows = 0;
    const float *packed = tvm_calibrated_gram(
        job->calibrated, job->index, source_of(job->tensor, task), &n_rows);

    if (!packed || n_rows == 0)
        return tv_error_set(err, TV_E_INTERNAL,
                            "no statistics of the inputs of model %zu",
                            task + 1);
    for (size_t i = 0; i < n; i++)
        for (size_t j = i; j < n; j++) {
            const double g =
                (double)*packed++ / (double)n_rows * (i == j ? 1.0 : off);
            st->gram[i * n + j] = st->gram[j * n + i] = g;
        }
    for (size_t i = 0; i < n * n; i++)
        st->sum[i] += w * st->gram[i];
    return TV_OK;
}

/* Rows [from, from + count) of M. */
static void get_mean(const struct tvm_job *job, size_t from, size_t count,
                     double *one, double *mean)
{
    const struct regmean_state *const st = job->state;
    double weights = 0.0;

    for (size_t t = 0; t < st->m.n; t++)
        weights += weight_of(job, t);
    for (size_t t = 0; t < st->m.n; t++) {
        const struct tvm_matrix a = task_of(job, t);
        const double f = weight_of(job, t) / weights;
        tvm_matrix_get(&a, from, count, one);
        for (size_t i = 0; i < count * a.n; i++)
            mean[i] = (t > 0 ? mean[i] : 0.0) + f * one[i];
    }
}

static void add_rhs(const struct tvm_job *job, size_t task, size_t item,
                    double *one, double *mean)
{
    struct regmean_state *const st = job->state;
    const struct tvm_matrix a = task_of(job, task);
    size_t from = 0;
    const size_t count = tvm_matrix_panel(&a, item, &from);

    get_mean(job, from, count, one, mean);
    tvm_matrix_get(&a, from, count, one);
    for (size_t i = 0; i < count * a.n; i++)
        one[i] -= mean[i];
    tva_gemm_add(weight_of(job, task), st->gram, false, one, false, a.n, count,
                 a.n, st->rhs + from * a.n);
}

static enum tv_err factor(const struct tvm_job *job, struct tv_error *err)
{
    struct regmean_state *const st = job->state;
    double trace = 0.0;

    for (size_t i = 0; i < st->in; i++)
        trace += st->sum[i * st->in + i];
    /* Without any input only the mean is left; the factor is that of 1. */
    st->e = tvm_shared(job->tensor, P_REGULARIZATION) *
            (trace > 0.0 ? trace / (double)st->in : 1.0);
    for (size_t i = 0; i < st->in; i++)
        st->sum[i * st->in + i] += st->e;
    return tva_cholesky(st->sum, st->in, err);
}

static enum tv_err solve(const struct tvm_job *job, size_t item, double *one,
                         double *mean, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct regmean_state *const st = job->state;
    const struct tvm_matrix a = task_of(job, 0);
    size_t from = 0;
    const size_t count = tvm_matrix_panel(&a, item, &from);
    double *const rhs = st->rhs + from * a.n;

    TV_TRY(tva_cholesky_solve(st->sum, a.n, rhs, count, err));
    get_mean(job, from, count, one, mean);
    for (size_t i = 0; i < count * a.n; i++)
        mean[i] += rhs[i];
    tvm_matrix_put(&a, from, count, mean);
out:
    return rc;
}

static enum tv_err work(struct tvm_job *job, size_t item, unsigned worker,
                        struct tv_error *err)
{
    struct regmean_state *const st = job->state;
    double *const one = st->panels + (size_t)worker * 2u * TVM_PANEL * st->in;
    double *const mean = one + TVM_PANEL * st->in;
    const size_t k = st->m.n;

    if (job->phase == 2 * k + 1)
        return factor(job, err);
    if (job->phase > 2 * k)
        return solve(job, item, one, mean, err);
    const size_t task = (job->phase - 1) / 2;
    if (job->phase % 2 == 1)
        return add_gram(job, task, err);
    add_rhs(job, task, item, one, mean);
    return TV_OK;
}

#define REGMEAN_SHARED_FUNCTIONS                                               \
    .base = TVM_BASE_REQUIRED, .needs_statistics = true, .min_donors = 0,      \
    .max_donors = TVK_DONORS_MAX, .params = params, .n_params = N_PARAMS,      \
    .detail = &detail, .check = check, .fold = tvm_matrix_fold,                \
    .state_bytes = state_bytes, .next_phase = next_phase,                      \
    .measure = tvm_matrix_measure, .work_items = work_items, .work = work,     \
    .combine = tvm_matrix_combine, .needs_gram = tvm_matrix_is

const struct tvm_method tvm_method_regmean = {
    .name = "regmean",
    .summary = "outputs of linear layers nearest to every model's on its text",
    .paper = "RegMean, Jin et al. 2023, arXiv 2212.09849",
    REGMEAN_SHARED_FUNCTIONS,
};

const struct tvm_method tvm_method_regmean_plus = {
    .name = "regmean++",
    .summary = "regmean with inputs as the merged layers below give them",
    .paper = "RegMean++, Nguyen et al. 2025, arXiv 2508.03121",
    .gram_inputs = TVM_INPUTS_MERGED,
    REGMEAN_SHARED_FUNCTIONS,
};
