/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_peft.c - add_weighted_adapter of PEFT 0.21, for --compat peft.
 *
 *   linear, ties, dare_*, magnitude_prune   act on the stack of A and on the
 *       stack of B apart, with weights sqrt|w_t s_t| (the sign on A). Products
 *       of different adapters appear in B A: that is PEFT's convention, no
 *       merge of deltas
 *   cat   exact sum side by side
 *   svd   sum of w_t Delta_t, truncated; singular values on B
 *   *_svd merge of the full deltas, then that; needs [out, in] in memory
 *
 * Pruning keeps int(density n) entries per matrix (equal magnitudes: lowest
 * index first), signs are elected on what is left unweighted, the divisor is
 * the number of agreeing entries. Random masks are Philox's, not torch's: they
 * agree in distribution. One rank for every module, zeros where there is less.
 */
#include "adapter_merge.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tv/adapt.h"
#include "tv/alloc.h"
#include "tv/linalg.h"

bool tvm_peft_type(const char *name, struct tvm_peft_type *out)
{
    static const struct {
        const char *name;
        struct tvm_peft_type type;
    } types[] = {
        {"linear", {PEFT_SUM, false, false, false}},
        {"cat", {PEFT_CAT, false, false, false}},
        {"svd", {PEFT_SVD, false, false, false}},
        {"ties", {PEFT_SUM, true, false, true}},
        {"ties_svd", {PEFT_SVD, true, false, true}},
        {"dare_linear", {PEFT_SUM, true, true, false}},
        {"dare_linear_svd", {PEFT_SVD, true, true, false}},
        {"dare_ties", {PEFT_SUM, true, true, true}},
        {"dare_ties_svd", {PEFT_SVD, true, true, true}},
        {"magnitude_prune", {PEFT_SUM, true, false, false}},
        {"magnitude_prune_svd", {PEFT_SVD, true, false, false}},
    };

    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (strcmp(types[i].name, name) == 0) {
            *out = types[i].type;
            return true;
        }
    return false;
}

void tvm_peft_check(struct tvm_adapters *a)
{
    if (a->n_inputs == 1) /* PEFT: always linear */
        a->type = (struct tvm_peft_type){PEFT_SUM, false, false, false};
    if (a->type.on != PEFT_SUM)
        return;
    for (size_t i = 0; i < a->n_modules; i++)
        for (size_t k = 0; k < a->n_inputs; k++) {
            const struct am_module *m = &a->modules[i];
            if (!m->of[k] || m->of[k]->r == m->max_rank)
                continue;
            tvm_problem_add(a->problems, true, TV_E_INPUT, "",
                            "module '%s' has different ranks in the adapters, "
                            "which PEFT's %s cannot combine (cat, svd and "
                            "*_svd can)",
                            m->like->module, a->method);
            return;
        }
}

uint64_t tvm_peft_rank(const struct tvm_adapters *a, const struct am_module *m,
                       uint64_t widest)
{
    if (a->type.on == PEFT_SUM)
        return m->max_rank;
    if (a->type.on == PEFT_CAT)
        return m->cols;
    return a->rank > 0 ? a->rank : widest;
}

static bool on_deltas(const struct tvm_adapters *a)
{
    return a->type.on == PEFT_SVD && (a->type.prunes || a->type.elects);
}

uint64_t tvm_peft_bytes(const struct tvm_adapters *a, const struct am_module *m)
{
    const uint64_t out = m->like->out_features, in = m->like->in_features;
    const uint64_t k = out < in ? out : in;

    if (!on_deltas(a))
        return (a->n_inputs + 1) * 4 * m->max_rank * (out > in ? out : in);
    return out * in * (4 * a->n_inputs + 4 + 8) + 8 * k * (out + in + 8 * k);
}

/* ---- one stack ----------------------------------------------------------- */

static int by_magnitude(const void *x, const void *y)
{
    const float a = *(const float *)x, b = *(const float *)y;
    return a > b ? -1 : a < b;
}

/* Zeros all but the `keep` largest of x [n]; room [n]. */
static void keep_largest(float *x, size_t n, size_t keep, float *room)
{
    float limit = 0;
    size_t equal = 0;

    if (keep >= n)
        return;
    for (size_t i = 0; i < n; i++)
        room[i] = fabsf(x[i]);
    qsort(room, n, sizeof *room, by_magnitude);
    limit = keep > 0 ? room[keep - 1] : INFINITY;
    for (size_t i = 0; i < keep; i++)
        equal += room[i] == limit;
    for (size_t i = 0; i < n; i++) {
        if (fabsf(x[i]) > limit)
            continue;
        if (fabsf(x[i]) == limit && equal > 0)
            equal--;
        else
            x[i] = 0;
    }
}

static void drop(const struct tvm_adapters *a, float *x, size_t n, size_t input,
                 const char *name)
{
    const double scaled = a->density * 4294967296.0;
    const uint64_t threshold = (uint64_t)(scaled + 0.5);
    unsigned char key[12];
    uint64_t mask[TVA_BLOCK / 64];

    for (unsigned i = 0; i < 8; i++)
        key[i] = (unsigned char)(a->options.seed >> (8 * i));
    for (unsigned i = 0; i < 4; i++)
        key[8 + i] = (unsigned char)(input >> (8 * i));
    for (size_t at = 0; at < n; at += TVA_BLOCK) {
        const size_t now = n - at < TVA_BLOCK ? n - at : TVA_BLOCK;
        (void)a->kernels->philox_mask(mask, at, tv_hash64(key, sizeof key),
                                      tv_hash64(name, strlen(name)), threshold,
                                      now);
        for (size_t i = 0; i < now; i++)
            x[at + i] = mask[i / 64] >> (i % 64) & 1
                            ? (float)((double)x[at + i] / a->density)
                            : 0;
    }
}

/* PEFT's merge of x[t] [n] with weights w into y; x is destroyed. */
static enum tv_err combine(const struct tvm_adapters *a, float *const *x,
                           const double *w, const size_t *input, size_t n_x,
                           size_t n, const char *name, float *y,
                           struct tv_error *err)
{
    float *room = NULL;

    if (a->type.prunes && a->density < 1) {
        room = tv_alloc((n + 1) * sizeof *room);
        if (!room)
            return tv_error_set(err, TV_E_NOMEM, "out of memory");
        for (size_t t = 0; t < n_x; t++) {
            if (a->type.random)
                drop(a, x[t], n, input[t], name);
            else
                keep_largest(x[t], n, (size_t)(a->density * (double)n), room);
        }
        tv_free(room);
    }
    for (size_t i = 0; i < n; i++) {
        double vote = 0, sum = 0;
        size_t agreeing = 0;
        for (size_t t = 0; t < n_x && a->type.elects; t++)
            vote += a->frequency ? (double)((x[t][i] > 0) - (x[t][i] < 0))
                                 : (double)x[t][i];
        for (size_t t = 0; t < n_x; t++) {
            const bool agrees =
                !a->type.elects || (vote >= 0 ? x[t][i] > 0 : x[t][i] < 0);
            if (!agrees)
                continue;
            sum += w[t] * (double)x[t][i];
            agreeing++;
        }
        y[i] = (float)(a->type.elects && agreeing > 1 ? sum / (double)agreeing
                                                      : sum);
    }
    return TV_OK;
}

/* ---- factors ------------------------------------------------------------- */

static enum tv_err load(const struct tvm_adapters *a, size_t input,
                        const struct tv_input_tensor *t, float *to,
                        struct tv_error *err)
{
    tv_input *in = a->inputs[input].in;
    struct tv_view v = {.n_chunks = 0};
    const enum tv_err rc = tv_input_view(in, t, err, &v);

    if (rc == TV_OK)
        tva_view_f32(a->kernels, &v, 0, t->n_elems, to);
    tv_input_release(in, &v);
    return rc;
}

static enum tv_err combine_stack(struct tvm_adapters *a,
                                 const struct am_module *m, bool b, float *y,
                                 struct tv_error *err)
{
    const size_t n_in = a->n_inputs;
    const size_t n = (size_t)(m->max_rank * (b ? m->like->out_features
                                               : m->like->in_features));
    float **x = tv_calloc(n_in, sizeof(float *));
    double *w = tv_calloc(n_in, sizeof *w);
    size_t *input = tv_calloc(n_in, sizeof *input);
    size_t k = 0;
    enum tv_err rc = TV_OK;

    if (!x || !w || !input) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < n_in; i++) {
        const struct tv_adapter_module *of = m->of[i];
        if (!of)
            continue;
        const double c = a->inputs[i].weight * of->scaling;
        x[k] = tv_alloc((n + 1) * sizeof(float));
        if (!x[k]) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
            goto out;
        }
        w[k] = sqrt(fabs(c)) * (!b && c < 0 ? -1 : 1);
        input[k] = i;
        k++;
        TV_TRY(load(a, i, b ? of->b : of->a, x[k - 1], err));
    }
    TV_TRY(combine(a, x, w, input, k, n,
                   b ? m->like->b->name : m->like->a->name, y, err));
out:
    for (size_t i = 0; x && i < k; i++)
        tv_free(x[i]);
    tv_free(input);
    tv_free(w);
    tv_free(x);
    return rc;
}

/* B [out, r] of rank r into the first columns of [out, wide]. */
static void widen(float *b, size_t out, size_t r, size_t wide)
{
    for (size_t o = out; r < wide && o-- > 0;) {
        memmove(b + o * wide, b + o * r, r * sizeof *b);
        memset(b + o * wide + r, 0, (wide - r) * sizeof *b);
    }
}

static enum tv_err make_cat(struct tvm_adapters *a, const struct am_module *m,
                            float *fa, float *fb, struct tv_error *err)
{
    const size_t out = (size_t)m->like->out_features;
    const size_t in = (size_t)m->like->in_features;
    float *part = NULL;
    size_t row = 0;
    enum tv_err rc = TV_OK;

    part = tv_alloc((out * (size_t)m->max_rank + 1) * sizeof *part);
    if (!part)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t i = 0; i < a->n_inputs; i++) {
        const struct tv_adapter_module *x = m->of[i];
        if (!x)
            continue;
        const double c = a->inputs[i].weight * x->scaling;
        const size_t r = (size_t)x->r;
        TV_TRY(load(a, i, x->a, fa + row * in, err));
        for (size_t j = 0; j < r * in; j++)
            fa[row * in + j] = (float)(c * (double)fa[row * in + j]);
        TV_TRY(load(a, i, x->b, part, err));
        for (size_t o = 0; o < out; o++)
            memcpy(fb + o * m->rank + row, part + o * r, r * sizeof *fb);
        row += r;
    }
out:
    tv_free(part);
    return rc;
}

/* ---- deltas -------------------------------------------------------------- */

static enum tv_err load_delta(struct tvm_adapters *a, const struct am_module *m,
                              size_t input, float *to, struct tv_error *err)
{
    const struct tv_adapter_module *x = m->of[input];
    const size_t out = (size_t)x->out_features, in = (size_t)x->in_features;
    const size_t r = (size_t)x->r;
    float *fa = tv_alloc((r * in + 1) * sizeof *fa);
    float *fb = tv_alloc((r * out + 1) * sizeof *fb);
    enum tv_err rc = TV_OK;

    if (!fa || !fb) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(load(a, input, x->a, fa, err));
    TV_TRY(load(a, input, x->b, fb, err));
    memset(to, 0, out * in * sizeof *to);
    a->kernels->lowrank_add(to, fb, fa, x->scaling, r, in, 0, out * in);
out:
    tv_free(fb);
    tv_free(fa);
    return rc;
}

/* The best rank-r factors of a dense delta [out, in], values on B. */
static enum tv_err factor_dense(const float *delta, size_t out, size_t in,
                                size_t rank, float *fa, float *fb,
                                struct tv_error *err)
{
    const size_t k = out < in ? out : in;
    double *x = tv_alloc_aligned((out * in + 8) * sizeof *x);
    double *u = tv_alloc_aligned((out * k + 8) * sizeof *u);
    double *vt = tv_alloc_aligned((k * in + 8) * sizeof *vt);
    double *s = tv_alloc((k + 1) * sizeof *s);
    enum tv_err rc = TV_OK;

    if (!x || !u || !vt || !s) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t o = 0; o < out; o++)
        for (size_t j = 0; j < in; j++)
            x[j * out + o] = (double)delta[o * in + j];
    TV_TRY(tva_svd(x, out, in, u, s, vt, err));
    for (size_t i = 0; i < rank && i < k; i++) {
        for (size_t o = 0; o < out; o++)
            fb[o * rank + i] = (float)(u[i * out + o] * s[i]);
        for (size_t j = 0; j < in; j++)
            fa[i * in + j] = (float)vt[j * k + i];
    }
out:
    tv_free(s);
    tv_free(vt);
    tv_free(u);
    tv_free(x);
    return rc;
}

static enum tv_err combine_deltas(struct tvm_adapters *a,
                                  const struct am_module *m, float *fa,
                                  float *fb, struct tv_error *err)
{
    const size_t out = (size_t)m->like->out_features;
    const size_t in = (size_t)m->like->in_features;
    float **x = tv_calloc(a->n_inputs, sizeof(float *));
    double *w = tv_calloc(a->n_inputs, sizeof *w);
    size_t *input = tv_calloc(a->n_inputs, sizeof *input);
    float *y = tv_alloc((out * in + 1) * sizeof *y);
    size_t k = 0;
    enum tv_err rc = TV_OK;

    if (!x || !w || !input || !y) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < a->n_inputs; i++) {
        if (!m->of[i])
            continue;
        x[k] = tv_alloc((out * in + 1) * sizeof(float));
        if (!x[k]) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
            goto out;
        }
        w[k] = a->inputs[i].weight;
        input[k] = i;
        k++;
        TV_TRY(load_delta(a, m, i, x[k - 1], err));
    }
    TV_TRY(combine(a, x, w, input, k, out * in, m->like->target, y, err));
    TV_TRY(factor_dense(y, out, in, (size_t)m->rank, fa, fb, err));
out:
    for (size_t i = 0; x && i < k; i++)
        tv_free(x[i]);
    tv_free(y);
    tv_free(input);
    tv_free(w);
    tv_free(x);
    return rc;
}

enum tv_err tvm_peft_module(struct tvm_adapters *a, const struct am_module *m,
                            float *fa, float *fb, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    if (on_deltas(a))
        return combine_deltas(a, m, fa, fb, err);
    if (a->type.on == PEFT_SVD)
        return tvm_adapters_svd(a, m, true, fa, fb, err);
    if (a->type.on == PEFT_CAT)
        return make_cat(a, m, fa, fb, err);
    TV_TRY(combine_stack(a, m, false, fa, err));
    TV_TRY(combine_stack(a, m, true, fb, err));
    widen(fb, (size_t)m->like->out_features, (size_t)m->max_rank,
          (size_t)m->rank);
out:
    return rc;
}
