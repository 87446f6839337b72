/* SPDX-License-Identifier: Apache-2.0 */
/*
 * matrix.c - see matrix.h.
 */
#include "matrix.h"

#include <string.h>

#include "tv/linalg.h"

/* LAPACK counts its workspace, 2 n^2, in int. */
#define MOST 32000u

bool tvm_matrix_is(const struct tvm_tensor *t)
{
    return (t->method->needs_gram ? t->has_inputs : t->is_linear) &&
           t->n_elems > 0 && t->base >= 0 && tvm_donor_count(t) > 0;
}

void tvm_matrix_carve(struct tvm_matrices *m, struct tvm_carver *c,
                      const struct tvm_job *job, bool sum_only)
{
    const size_t n = tvm_donor_count(job->tensor);
    float *const at =
        tvm_carve(c, (sum_only ? 1 : n) * job->tensor->n_elems, sizeof(float));

    m->n = n;
    m->delta = at;
    m->sum = sum_only ? at : NULL;
}

struct tvm_matrix tvm_matrix_tall(const struct tvm_tensor *t, float *x)
{
    const size_t rows = (size_t)t->shape[0];
    const size_t cols = (size_t)t->shape[1];

    if (rows >= cols)
        return (struct tvm_matrix){x, rows, cols, false};
    return (struct tvm_matrix){x, cols, rows, true};
}

struct tvm_matrix tvm_matrix_out_in(const struct tvm_tensor *t, float *x)
{
    const size_t rows = (size_t)t->shape[0];
    const size_t cols = (size_t)t->shape[1];

    if (t->in_first)
        return (struct tvm_matrix){x, cols, rows, true};
    return (struct tvm_matrix){x, rows, cols, false};
}

size_t tvm_matrix_panels(const struct tvm_matrix *a)
{
    return (a->m + TVM_PANEL - 1) / TVM_PANEL;
}

size_t tvm_matrix_panel(const struct tvm_matrix *a, size_t i, size_t *from)
{
    *from = i * TVM_PANEL;
    return a->m - *from < TVM_PANEL ? a->m - *from : TVM_PANEL;
}

void tvm_matrix_get(const struct tvm_matrix *a, size_t from, size_t count,
                    double *panel)
{
    if (!a->flip) {
        const float *x = a->x + from * a->n;
        for (size_t e = 0; e < count * a->n; e++)
            panel[e] = (double)x[e];
        return;
    }
    for (size_t j = 0; j < a->n; j++)
        for (size_t i = 0; i < count; i++)
            panel[i * a->n + j] = (double)a->x[j * a->m + from + i];
}

void tvm_matrix_put(const struct tvm_matrix *a, size_t from, size_t count,
                    const double *panel)
{
    if (!a->flip) {
        float *x = a->x + from * a->n;
        for (size_t e = 0; e < count * a->n; e++)
            x[e] = (float)panel[e];
        return;
    }
    for (size_t j = 0; j < a->n; j++)
        for (size_t i = 0; i < count; i++)
            a->x[j * a->m + from + i] = (float)panel[i * a->n + j];
}

void tvm_matrix_gram(const struct tvm_matrix *a, double scale, double *g,
                     double *panel)
{
    for (size_t i = 0; i < tvm_matrix_panels(a); i++) {
        size_t from = 0;
        const size_t count = tvm_matrix_panel(a, i, &from);
        tvm_matrix_get(a, from, count, panel);
        tva_syrk_add(scale, panel, false, a->n, count, g);
    }
}

void tvm_matrix_check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    tvm_check_finite(t, problems);
    if (!tva_linalg_built())
        tvm_problem_add(problems, true, TV_E_UNSUPPORTED, t->name,
                        "this build has no OpenBLAS, which %s needs",
                        t->method->name);
    if (t->is_linear && (t->shape[0] > MOST || t->shape[1] > MOST))
        tvm_problem_add(problems, true, TV_E_UNSUPPORTED, t->name,
                        "%s takes matrices of at most %u rows and columns",
                        t->method->name, MOST);
    if (!tvm_matrix_is(t) && tvm_donor_count(t) > 0)
        tvm_problem_note(problems, t->name,
                         "what is no weight matrix of a linear layer "
                         "(embeddings, output head, norms, biases, stacks of "
                         "experts) gets the mean of the task vectors");
}

int tvm_matrix_fold(const struct tvm_tensor *t)
{
    return t->base >= 0 && t->n_sources == 1 ? t->base : -1;
}

bool tvm_matrix_next_phase(struct tvm_job *job, unsigned n_passes)
{
    struct tvm_matrices *const m = job->state;

    if (!tvm_matrix_is(job->tensor))
        return false;
    return job->phase == 0 ||
           (job->phase <= n_passes && atomic_load(&m->n_bad) == 0);
}

static bool weighs_models(const struct tvm_tensor *t)
{
    const struct tvm_matrix_detail *const d = t->method->detail;

    return d && d->weighs_models;
}

static double weight(const struct tvm_tensor *t, size_t s)
{
    return tvm_of(t, s, TVM_MATRIX_WEIGHT, t->method->n_params);
}

void tvm_matrix_measure(struct tvm_job *job, struct tvm_tile *tile,
                        const float *const *x, size_t n)
{
    struct tvm_matrices *const m = job->state;
    const struct tvm_tensor *const t = job->tensor;
    const float *const base = x[t->base];
    double sum[TVM_BLOCK] = {0.0};
    uint64_t bad = 0;
    size_t at = 0;

    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        const double w = weighs_models(t) ? 1.0 : weight(t, s);
        float *const out = m->delta + at++ * t->n_elems + tile->start;
        for (size_t i = 0; i < n; i++) {
            const double d = w * ((double)x[s][i] - (double)base[i]);
            if (m->sum)
                sum[i] += d;
            else
                out[i] = (float)d;
        }
        if (!m->sum)
            bad += job->k->count_nonfinite(out, n);
    }
    if (m->sum) {
        float *const out = m->sum + tile->start;
        for (size_t i = 0; i < n; i++)
            out[i] = (float)sum[i];
        bad = job->k->count_nonfinite(out, n);
    }
    if (bad > 0)
        atomic_fetch_add(&m->n_bad, 1);
}

static void mean(const struct tvm_tensor *t, const float *const *x, float *dst,
                 size_t n)
{
    const float *const base = x[t->base];
    const double lambda = tvm_shared(t, TVM_MATRIX_LAMBDA);
    double divisor = 0.0;
    double sum[TVM_BLOCK] = {0.0};

    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        const double w = weight(t, s);
        divisor += weighs_models(t) ? w : 1.0;
        for (size_t i = 0; i < n; i++)
            sum[i] += w * ((double)x[s][i] - (double)base[i]);
    }
    const double each = 1.0 / divisor;
    for (size_t i = 0; i < n; i++)
        dst[i] = sum[i] != 0.0
                     ? (float)((double)base[i] + lambda * (each * sum[i]))
                     : base[i];
}

void tvm_matrix_combine(struct tvm_job *job, struct tvm_tile *tile,
                        const float *const *x, float *dst, size_t n)
{
    const struct tvm_tensor *const t = job->tensor;
    const struct tvm_matrices *const m = job->state;

    if (!tvm_matrix_is(t) || atomic_load(&m->n_bad) > 0) {
        mean(t, x, dst, n);
        return;
    }
    const float *const base = x[t->base];
    const float *const merged = m->delta + tile->start;
    const double lambda = tvm_shared(t, TVM_MATRIX_LAMBDA);
    for (size_t i = 0; i < n; i++)
        dst[i] = merged[i] != 0.0f
                     ? (float)((double)base[i] + lambda * (double)merged[i])
                     : base[i];
}
