/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_emr.c - elect, mask and rescale.
 *
 * With task vectors D_i = w_i (x_i - b), S their sum, u(e) the largest |D_i(e)|
 * among those with the sign of S(e), signed like it (0 where S is 0):
 *
 *   task 0   y = b + lambda u, the unified model
 *   task t   y = b + lambda l_t u where D_t(e) u(e) > 0, else b: what model t
 *            is rebuilt as, with l_t = sum |D_t| / sum |u where D_t u > 0| over
 *            all tensors of the output that are merged
 *
 * Huang et al., "EMR-Merging: Tuning-Free High-Performance Model Merging",
 * NeurIPS 2024, arXiv 2405.17461; weights and lambda are 1 there. l_t is over
 * the whole model as in the paper, not a mean of means of tensors.
 */
#include "method.h"

#include <math.h>
#include <stddef.h>

enum { P_WEIGHT, P_LAMBDA, P_TASK, N_PARAMS };

static const struct tvm_param params[N_PARAMS] = {
    [P_WEIGHT] = {.name = "weight",
                  .scope = TVM_NON_BASE,
                  .type = TVM_FLOAT,
                  .has_default = true,
                  .fallback = 1.0,
                  .help = "factor of the task vector"},
    [P_LAMBDA] = {.name = "lambda",
                  .scope = TVM_SHARED,
                  .type = TVM_FLOAT,
                  .has_default = true,
                  .fallback = 1.0,
                  .help = "factor of the merged task vector"},
    [P_TASK] = {.name = "task",
                .scope = TVM_SHARED,
                .type = TVM_INT,
                .has_default = true,
                .fallback = 0.0,
                TVM_FROM(0.0),
                .help = "rebuild the model of this number; 0: none"},
};

#define NOBODY SIZE_MAX

/* Source of the model that is rebuilt. */
static size_t task_source(const struct tvm_tensor *t)
{
    const double task = tvm_shared(t, P_TASK);

    for (size_t s = 0; task > 0.0 && s < t->n_sources; s++)
        if ((int)s != t->base && (double)t->sources[s].position + 1.0 == task)
            return s;
    return NOBODY;
}

static void check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    const double task = tvm_shared(t, P_TASK);

    tvm_check_finite(t, problems);
    if (task > (double)t->n_models)
        tvm_param_problem(t, P_TASK, SIZE_MAX, problems,
                          "task is %g: it takes the number of a model from 1 "
                          "to %zu, or 0",
                          task, t->n_models);
}

static int fold(const struct tvm_tensor *t)
{
    if (t->base < 0)
        return -1;
    if (t->n_sources == 1 || tvm_shared(t, P_LAMBDA) == 0.0 ||
        (tvm_shared(t, P_TASK) > 0.0 && task_source(t) == NOBODY))
        return t->base;
    return -1;
}

static double weight_of(const struct tvm_tensor *t, size_t source)
{
    return tvm_of(t, source, P_WEIGHT, N_PARAMS);
}

/* u [n] */
static void unify(const struct tvm_tensor *t, const float *const *x, double *u,
                  size_t n)
{
    const float *base = x[t->base];
    double sum[TVM_BLOCK] = {0.0};

    for (size_t s = 0; s < t->n_sources; s++) {
        const double w = weight_of(t, s);
        for (size_t i = 0; (int)s != t->base && i < n; i++)
            sum[i] += w * ((double)x[s][i] - (double)base[i]);
    }
    for (size_t i = 0; i < n; i++)
        u[i] = isnan(sum[i]) ? sum[i] : 0.0;
    for (size_t s = 0; s < t->n_sources; s++) {
        const double w = weight_of(t, s);
        if ((int)s == t->base)
            continue;
        for (size_t i = 0; i < n; i++) {
            const double d = w * ((double)x[s][i] - (double)base[i]);
            if ((sum[i] > 0.0 && d > u[i]) || (sum[i] < 0.0 && d < u[i]))
                u[i] = d;
        }
    }
}

/* Is u part of what the model keeps? What is not a number is never hidden. */
static bool is_kept(double d, double u)
{
    return (d > 0.0 && u > 0.0) || (d < 0.0 && u < 0.0) || isnan(d) || isnan(u);
}

static double factor_of(const struct tvm_tensor *t, size_t task)
{
    const struct tvm_cut *cut = &t->cuts[task];
    return cut->sum_kept > 0.0 && isfinite(cut->sum_all) &&
                   isfinite(cut->sum_kept)
               ? cut->sum_all / cut->sum_kept
               : 1.0;
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const struct tvm_tensor *t = job->tensor;
    const float *base = x[t->base];
    const double lambda = tvm_shared(t, P_LAMBDA);
    const size_t task = task_source(t);
    double u[TVM_BLOCK];

    (void)tile;
    unify(t, x, u, n);
    if (task != NOBODY) {
        const double w = weight_of(t, task);
        const double by = factor_of(t, task);
        for (size_t i = 0; i < n; i++) {
            const double d = w * ((double)x[task][i] - (double)base[i]);
            u[i] = is_kept(d, u[i]) ? by * u[i] : 0.0;
        }
    }
    /* Without a change the base's own bits, the sign of zero included. */
    for (size_t i = 0; i < n; i++)
        dst[i] =
            u[i] != 0.0 ? (float)((double)base[i] + lambda * u[i]) : base[i];
}

/* ---- l_t, over the model ------------------------------------------------- */

struct sums {
    double all, kept;
};

struct emr_survey {
    struct sums sums;
    double *all, *kept; /* [most_leaves] of the tensor at hand */
};

static enum tvm_reach reach(const struct tvm_tensor *t)
{
    return task_source(t) != NOBODY ? TVM_REACH_MODEL : TVM_REACH_TENSOR;
}

static size_t lay_out(const struct tvm_group *g, void *base,
                      struct emr_survey *st)
{
    struct tvm_carver c = {base, 0};

    (void)tvm_carve(&c, 1, sizeof *st);
    st->all = tvm_carve(&c, g->most_leaves, sizeof *st->all);
    st->kept = tvm_carve(&c, g->most_leaves, sizeof *st->kept);
    return c.used;
}

static size_t survey_bytes(const struct tvm_group *g)
{
    struct emr_survey st;
    return lay_out(g, NULL, &st);
}

static bool survey_next(struct tvm_group *g)
{
    struct emr_survey *st = g->state;

    if (g->phase == 0)
        (void)lay_out(g, st, st);
    return g->phase == 0;
}

static bool survey_wants(const struct tvm_group *g, const struct tvm_tensor *t,
                         size_t source)
{
    (void)g;
    (void)t;
    (void)source;
    return true;
}

/* A leaf is read in order by one worker, so its sum does not depend on who. */
static void survey_measure(struct tvm_group *g, size_t at, uint64_t start,
                           unsigned worker, const float *const *x, size_t n)
{
    const struct emr_survey *st = g->state;
    const struct tvm_tensor *t = &g->plan->tensors[g->tensors[at]];
    const size_t task = task_source(t);
    const size_t leaf = (size_t)(start / TVK_LEAF);
    const double w = weight_of(t, task);
    struct sums sums = {0.0, 0.0};
    double u[TVM_BLOCK];

    (void)worker;
    unify(t, x, u, n);
    for (size_t i = 0; i < n; i++) {
        const double d = w * ((double)x[task][i] - (double)x[t->base][i]);
        sums.all += fabs(d);
        sums.kept += is_kept(d, u[i]) ? fabs(u[i]) : 0.0;
    }
    if (start % TVK_LEAF == 0)
        st->all[leaf] = st->kept[leaf] = 0.0;
    st->all[leaf] += sums.all;
    st->kept[leaf] += sums.kept;
}

static void survey_end_tensor(struct tvm_group *g, size_t at)
{
    struct emr_survey *st = g->state;
    const uint64_t n = g->plan->tensors[g->tensors[at]].n_elems;
    const size_t leaves = (size_t)(n / TVK_LEAF + (n % TVK_LEAF != 0));

    st->sums.all += tvk_sum_tree(st->all, leaves);
    st->sums.kept += tvk_sum_tree(st->kept, leaves);
}

static void survey_give(struct tvm_group *g, size_t at, struct tvm_cut *cuts)
{
    const struct emr_survey *st = g->state;
    const size_t task = task_source(&g->plan->tensors[g->tensors[at]]);

    cuts[task].sum_all = st->sums.all;
    cuts[task].sum_kept = st->sums.kept;
}

static const struct tvm_surveyor surveyor = {
    .bytes = survey_bytes,
    .next = survey_next,
    .wants = survey_wants,
    .measure = survey_measure,
    .end_tensor = survey_end_tensor,
    .give = survey_give,
};

const struct tvm_method tvm_method_emr = {
    .name = "emr",
    .summary =
        "elected signs with the largest magnitudes, or one model of them",
    .paper = "EMR-Merging, Huang et al. 2024, arXiv 2405.17461",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 0,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_PARAMS,
    .check = check,
    .fold = fold,
    .combine = combine,
    .reach = reach,
    .surveyor = &surveyor,
};
