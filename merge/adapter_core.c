/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_core.c - the factors of one module: stacks side by side, their sum at
 * a rank, and Core Space (Panariello et al. 2025), in which a method of the
 * registry merges small matrices in place of deltas.
 *
 *   stacks  B [out, cols], A^T [in, cols]   of all adapters, cols: sum of ranks
 *   cores   Qb^T B_i A_i Qa of each adapter i, with the bases of the stacks
 *
 * The cores of all adapters are written as small models beside each other, the
 * method's own plan and run merge them, and what comes out is factored back
 * through the same bases.
 */
#include "adapter_merge.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "recipe.h"
#include "tv/adapt.h"
#include "tv/adapter_out.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"

/* b [out, r] row-major -> columns. */
static enum tv_err load_b(struct tvm_adapters *a, size_t input,
                          const struct tv_adapter_module *m, double *to,
                          struct tv_error *err)
{
    const size_t out = (size_t)m->out_features, r = (size_t)m->r;
    struct tv_view v = {.n_chunks = 0};
    float *row = tv_alloc((r + 1) * sizeof *row);
    enum tv_err rc = TV_OK;

    if (!row) {
        rc = am_no_memory(err);
        goto out;
    }
    TV_TRY(tv_input_view(a->inputs[input].in, m->b, err, &v));
    for (size_t o = 0; o < out; o++) {
        tva_view_f32(a->kernels, &v, o * r, r, row);
        for (size_t k = 0; k < r; k++)
            to[k * out + o] = (double)row[k];
    }
out:
    tv_input_release(a->inputs[input].in, &v);
    tv_free(row);
    return rc;
}

/* a [r, in] row-major is its transpose column-major; `scale` times. */
static enum tv_err load_a(struct tvm_adapters *a, size_t input,
                          const struct tv_adapter_module *m, double scale,
                          double *to, struct tv_error *err)
{
    const size_t in = (size_t)m->in_features;
    struct tv_view v = {.n_chunks = 0};
    float *row = tv_alloc((in + 1) * sizeof *row);
    enum tv_err rc = TV_OK;

    if (!row) {
        rc = am_no_memory(err);
        goto out;
    }
    TV_TRY(tv_input_view(a->inputs[input].in, m->a, err, &v));
    for (size_t k = 0; k < m->r; k++) {
        tva_view_f32(a->kernels, &v, k * in, in, row);
        for (size_t j = 0; j < in; j++)
            to[k * in + j] = scale * (double)row[j];
    }
out:
    tv_input_release(a->inputs[input].in, &v);
    tv_free(row);
    return rc;
}

/* Both stacks of a module; with weights, each adapter's factor of the sum, else
 * its scaling alone. */
static enum tv_err stacks(struct tvm_adapters *a, const struct am_module *m,
                          bool weights, double **b, double **at,
                          struct tv_error *err)
{
    const size_t out = (size_t)m->like->out_features;
    const size_t in = (size_t)m->like->in_features;
    size_t col = 0;
    enum tv_err rc = TV_OK;

    *b = tv_alloc_aligned((out * m->cols + 8) * sizeof **b);
    *at = tv_alloc_aligned((in * m->cols + 8) * sizeof **at);
    if (!*b || !*at) {
        rc = am_no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < a->n_inputs; i++) {
        const struct tv_adapter_module *x = m->of[i];
        if (!x)
            continue;
        TV_TRY(load_b(a, i, x, *b + col * out, err));
        TV_TRY(load_a(a, i, x, x->scaling * (weights ? a->inputs[i].weight : 1),
                      *at + col * in, err));
        col += (size_t)x->r;
    }
out:
    if (rc != TV_OK) {
        tv_free(*b);
        tv_free(*at);
        *b = *at = NULL;
    }
    return rc;
}

enum tv_err am_make_cat(struct tvm_adapters *a, const struct am_module *m,
                        float *fa, float *fb, struct tv_error *err)
{
    const size_t out = (size_t)m->like->out_features;
    const size_t in = (size_t)m->like->in_features;
    double *b = NULL, *at = NULL;
    enum tv_err rc = stacks(a, m, true, &b, &at, err);

    if (rc != TV_OK)
        return rc;
    for (size_t k = 0; k < m->cols; k++) {
        for (size_t j = 0; j < in; j++)
            fa[k * in + j] = (float)at[k * in + j];
        for (size_t o = 0; o < out; o++)
            fb[o * m->rank + k] = (float)b[k * out + o];
    }
    tv_free(b);
    tv_free(at);
    return TV_OK;
}

/* ---- cores --------------------------------------------------------------- */

static size_t core_rows(const struct am_module *m)
{
    return (size_t)am_least(m->cols, m->like->out_features);
}

static size_t core_cols(const struct am_module *m)
{
    return (size_t)am_least(m->cols, m->like->in_features);
}

static enum tv_err core_of(struct tvm_adapters *a, const struct am_module *m,
                           bool weights, struct tvm_core *c,
                           struct tv_error *err)
{
    double *b = NULL, *at = NULL;
    enum tv_err rc = stacks(a, m, weights, &b, &at, err);

    if (rc != TV_OK)
        return rc;
    return tvm_core_make(c, b, at, (size_t)m->like->out_features,
                         (size_t)m->like->in_features, m->cols, err);
}

enum tv_err tvm_adapters_svd(struct tvm_adapters *a, const struct am_module *m,
                             bool left, float *fa, float *fb,
                             struct tv_error *err)
{
    struct tvm_core c = {.out = 0};
    double *core = NULL;
    const size_t k = (size_t)am_least(core_rows(m), core_cols(m));
    enum tv_err rc = TV_OK;

    TV_TRY(core_of(a, m, true, &c, err));
    core = tv_alloc_aligned((c.kb * c.ka + 8) * sizeof *core);
    if (!core) {
        rc = am_no_memory(err);
        goto out;
    }
    tvm_core_product(&c, 0, c.cols, core);
    if (m->rank <= k) {
        TV_TRY(tvm_core_factor(&c, core, (size_t)m->rank, left, fa, fb, err));
        goto out;
    }
    /* Zeros behind what there is; the caller's memory is zeroed. */
    const size_t out = (size_t)m->like->out_features;
    float *narrow = tv_alloc((out * k + 1) * sizeof *narrow);
    if (!narrow) {
        rc = am_no_memory(err);
        goto out;
    }
    rc = tvm_core_factor(&c, core, k, left, fa, narrow, err);
    for (size_t o = 0; rc == TV_OK && o < out; o++)
        memcpy(fb + o * m->rank, narrow + o * k, k * sizeof *fb);
    tv_free(narrow);
out:
    tv_free(core);
    tvm_core_free(&c);
    return rc;
}

enum tv_err am_make_core(struct tvm_adapters *a, const struct am_module *m,
                         tv_input *merged, float *fa, float *fb,
                         struct tv_error *err)
{
    const struct tv_input_tensor *t = tv_input_find(merged, m->like->target);
    const size_t rows = core_rows(m), cols = core_cols(m);
    struct tvm_core c = {.out = 0};
    struct tv_view v = {.n_chunks = 0};
    double *core = tv_alloc_aligned((rows * cols + 8) * sizeof *core);
    float *row = tv_alloc((cols + 1) * sizeof *row);
    enum tv_err rc = TV_OK;

    if (!core || !row) {
        rc = am_no_memory(err);
        goto out;
    }
    if (!t || t->rank != 2 || t->shape[0] != rows || t->shape[1] != cols) {
        rc = tv_error_set(err, TV_E_INTERNAL, "%s: the merged core is missing",
                          m->like->target);
        goto out;
    }
    TV_TRY(tv_input_view(merged, t, err, &v));
    for (size_t i = 0; i < rows; i++) {
        tva_view_f32(a->kernels, &v, i * cols, cols, row);
        for (size_t j = 0; j < cols; j++) {
            core[j * rows + i] = (double)row[j];
            if (!isfinite(row[j])) {
                rc = tv_error_set(err, TV_E_NONFINITE,
                                  "%s: the merged core is not finite",
                                  m->like->target);
                goto out;
            }
        }
    }
    TV_TRY(core_of(a, m, false, &c, err));
    TV_TRY(tvm_core_factor(&c, core, (size_t)m->rank, false, fa, fb, err));
out:
    tvm_core_free(&c);
    tv_input_release(merged, &v);
    tv_free(row);
    tv_free(core);
    return rc;
}

/* ---- a merge of cores ---------------------------------------------------- */

/* Writes the cores of one adapter (SIZE_MAX: zeros) as a small model. `real`:
 * values, else zeros, for planning. */
static enum tv_err write_core(struct tvm_adapters *a, tva_out *o,
                              const struct am_module *m, size_t input,
                              const struct tvm_core *c, struct tv_error *err)
{
    const size_t rows = core_rows(m), cols = core_cols(m);
    const uint64_t shape[2] = {rows, cols};
    double *x = tv_calloc(rows * cols + 1, sizeof *x);
    float *y = tv_calloc(rows * cols + 1, sizeof *y);
    size_t from = 0;
    enum tv_err rc = TV_OK;

    if (!x || !y) {
        rc = am_no_memory(err);
        goto out;
    }
    if (c && input != SIZE_MAX && m->of[input]) {
        for (size_t i = 0; i < input; i++)
            from += m->of[i] ? (size_t)m->of[i]->r : 0;
        tvm_core_product(c, from, from + (size_t)m->of[input]->r, x);
    }
    for (size_t i = 0; i < rows; i++)
        for (size_t j = 0; j < cols; j++)
            y[i * cols + j] = (float)x[j * rows + i];
    TV_TRY(tva_out_tensor(o, a->kernels, m->like->target, 2, shape, TV_F32, y,
                          err));
out:
    tv_free(y);
    tv_free(x);
    return rc;
}

static enum tv_err write_cores(struct tvm_adapters *a, const char *dir,
                               bool real, struct tv_error *err)
{
    const struct tv_hash none = {0, 0};
    const size_t n = a->n_inputs + 1;
    tva_out **o = tv_calloc(n, sizeof(tva_out *));
    struct tva_out_done done;
    enum tv_err rc = TV_OK;

    if (!o)
        return am_no_memory(err);
    for (size_t i = 0; i < n; i++) {
        char *sub = i + 1 < n ? tv_asprintf("%s/core-%zu", dir, i)
                              : tv_asprintf("%s/core-base", dir);
        rc = sub ? tva_out_open(sub, none, true, false, &done, err, &o[i])
                 : am_no_memory(err);
        tv_free(sub);
        if (rc != TV_OK)
            goto out;
    }
    for (size_t m = 0; m < a->n_modules; m++) {
        struct tvm_core c = {.out = 0};
        if (real)
            rc = core_of(a, &a->modules[m], false, &c, err);
        for (size_t i = 0; i < n && rc == TV_OK; i++)
            rc = write_core(a, o[i], &a->modules[m], i + 1 < n ? i : SIZE_MAX,
                            real ? &c : NULL, err);
        tvm_core_free(&c);
        if (rc != TV_OK)
            goto out;
    }
    for (size_t i = 0; i < n; i++)
        TV_TRY(tva_out_finish(o[i], "{}\n", 3, &done, err));
out:
    for (size_t i = 0; i < n; i++)
        tva_out_close(o[i]);
    tv_free(o);
    return rc;
}

static enum tv_err core_paths(struct tvm_adapters *a, const char *dir,
                              struct tvm_recipe *r, struct tv_error *err)
{
    const size_t n = r->n_slices > 0 ? r->slices[0].n_sources : 0;

    for (size_t i = 0; i < n && i < a->n_inputs; i++) {
        r->slices[0].sources[i].model.text = tvm_arena_fmt(
            &r->arena, "%s/core-%zu/adapter_model.safetensors", dir, i);
        if (!r->slices[0].sources[i].model.text)
            return am_no_memory(err);
    }
    r->base.text = NULL;
    r->base.line = 0;
    if (r->method && r->info.base == TVM_BASE_REQUIRED) {
        r->base.text = tvm_arena_fmt(
            &r->arena, "%s/core-base/adapter_model.safetensors", dir);
        r->base.line = r->method_line;
        r->base.col = r->method_col;
        if (!r->base.text)
            return am_no_memory(err);
    }
    r->dtype = r->out_dtype = TV_F32;
    return TV_OK;
}

static void core_options(const struct tvm_adapters *a, const char *out,
                         struct tvm_options *o)
{
    *o = a->options;
    o->store = NULL;
    o->no_cache = true;
    o->into = NULL;
    o->out_dir = out;
    o->sync = false;
    o->write_model_card = false;
    o->copy_tokenizer = false;
    o->quota_bytes = 0;
    o->shard_bytes = UINT64_MAX / 2;
    o->force = true;
}

/* Messages of the inner plan that say nothing to who wrote the recipe: warnings
 * without a place in it. */
static bool is_inner(const struct tvm_adapters *a, const struct tvm_problem *p)
{
    const size_t n = strlen(a->path);
    return !p->is_error &&
           (strncmp(p->where, a->path, n) != 0 || p->where[n] != ':');
}

enum tv_err am_plan_cores(struct tvm_adapters *a, struct tv_error *err)
{
    char *dir = tv_asprintf("%s/tvmerge-XXXXXX", P_tmpdir);
    struct tvm_problems found;
    struct tvm_recipe *r = NULL;
    struct tvm_plan *p = NULL;
    struct tvm_options o;
    bool made = false;
    enum tv_err rc = TV_OK;

    tvm_problems_init(&found);
    if (!dir) {
        rc = am_no_memory(err);
        goto out;
    }
    made = mkdtemp(dir) != NULL;
    if (!made) {
        rc = tv_error_set(err, TV_E_IO, "cannot make a directory %s", dir);
        goto out;
    }
    TV_TRY(write_cores(a, dir, false, err));
    rc = tvm_recipe_load(a->path, &found, err, &r);
    if (r) {
        TV_TRY(core_paths(a, dir, r, err));
        core_options(a, NULL, &o);
        rc = tvm_plan_make(r, &o, &found, err, &p);
    }
    if (found.n_errors > 0)
        rc = TV_OK;
    for (size_t i = 0; i < found.n; i++)
        if (!is_inner(a, &found.items[i]))
            tvm_problem_add(a->problems, found.items[i].is_error,
                            found.items[i].code, found.items[i].where, "%s",
                            found.items[i].message);
    if (p && p->peak_scratch_bytes > a->scratch)
        a->scratch = p->peak_scratch_bytes;
out:
    tvm_plan_free(p);
    tvm_recipe_free(r);
    tvm_problems_free(&found);
    if (made && tv_dir_remove(dir, NULL) != TV_OK && rc == TV_OK)
        rc = tv_error_set(err, TV_E_IO, "cannot remove %s", dir);
    tv_free(dir);
    return rc;
}

enum tv_err am_merge_cores(struct tvm_adapters *a, tv_input **out,
                           struct tvm_problems *problems, struct tv_error *err)
{
    char *work = tv_path_join(a->options.out_dir, ".tvmerge");
    char *merged = work ? tv_path_join(work, "merged") : NULL;
    char *file = merged ? tv_path_join(merged, "model.safetensors") : NULL;
    struct tvm_recipe *r = NULL;
    struct tvm_plan *p = NULL;
    struct tvm_options o;
    struct tvm_result result;
    const struct tvm_run_hooks none = {.cancel = NULL};
    enum tv_err rc = TV_OK;

    if (!work || !merged || !file) {
        rc = am_no_memory(err);
        goto out;
    }
    TV_TRY(write_cores(a, work, true, err));
    TV_TRY(tvm_recipe_load(a->path, problems, err, &r));
    TV_TRY(core_paths(a, work, r, err));
    core_options(a, merged, &o);
    TV_TRY(tvm_plan_make(r, &o, problems, err, &p));
    if (problems->n_errors > 0) {
        rc = tv_error_set(err, tvm_problems_code(problems), "%s",
                          problems->items[problems->n - 1].message);
        goto out;
    }
    TV_TRY(tvm_run(p, &none, &result, err));
    TV_TRY(tv_input_open_path(file, err, out));
out:
    tvm_plan_free(p);
    tvm_recipe_free(r);
    tv_free(file);
    tv_free(merged);
    tv_free(work);
    return rc;
}
