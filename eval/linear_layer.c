/* SPDX-License-Identifier: Apache-2.0 */
/*
 * linear_layer.c - linear layers: y = x W^T + b.
 *
 *          in                     tile: up to tve_tile_rows output features
 *      +---------+                converted to fp32 once per batch, adapters
 *      |  tile 0 |  out           added, then one sgemm per group of rows
 *      +---------+
 *      |  tile 1 |                x: [rows, in], y: [rows, out]
 *      +---------+
 *
 * Workers take tiles. The shape of every sgemm call depends on the weight and
 * on the group alone, so neither threads nor memory change a bit. Conv1D
 * weights (stored [in, out]) are cut along their columns instead.
 *
 * With AMX, tiles of bf16 weights are done there before (linear_split.c); with
 * a CUDA device all go to that (linear_cuda.c).
 */
#include <string.h>

#include <cblas.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/hash.h"
#include "tv/text.h"

#include "linear_parts.h"

#define TILE_ELEMS (2u << 20)
#define TILE_MAX   1024u
#define TILE_STEP  64u

/* ---- reading ------------------------------------------------------------- */

struct verify {
    const struct tv_view *v;
    unsigned char *bad; /* per leaf */
};

static void verify_leaf(void *arg, size_t i, unsigned worker)
{
    const struct verify *const x = arg;

    (void)worker;
    x->bad[i] = !tv_hash_equal(tv_view_leaf(x->v, i), x->v->leaves[i]);
}

/* Place of t in the input, which keeps its tensors in name order. */
static size_t index_of(const tve_model *m, const struct tv_input_tensor *t)
{
    size_t lo = 0, hi = tv_input_count(m->in);

    while (hi - lo > 1) {
        const size_t mid = lo + (hi - lo) / 2;
        if (tv_name_compare(tv_input_tensor(m->in, mid)->name, t->name) <= 0)
            lo = mid;
        else
            hi = mid;
    }
    return lo;
}

enum tv_err tve_view(tve_model *m, const struct tv_input_tensor *t,
                     struct tv_view *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t i = index_of(m, t);
    struct verify x = {out, NULL};
    size_t n = 0;

    memset(out, 0, sizeof(*out));
    TV_TRY(tv_input_view(m->in, t, err, out));
    if (m->skip_verify || !out->leaves || m->verified[i])
        goto out;
    n = (size_t)tv_leaf_count(out->bytes);
    x.bad = tv_calloc(n ? n : 1, 1);
    if (!x.bad) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    tv_pool_run(m->pool, n, verify_leaf, &x);
    for (size_t k = 0; k < n; k++) {
        if (x.bad[k]) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "tensor \"%s\" of %s is damaged (checksum of "
                              "MiB %zu)",
                              t->name, tv_input_label(m->in), k);
            goto out;
        }
    }
    m->verified[i] = 1;
out:
    tv_free(x.bad);
    if (rc != TV_OK)
        tv_input_release(m->in, out);
    return rc;
}

static void replaced_view(const struct tve_replaced *other,
                          const struct tv_input_tensor *t, struct tv_view *out)
{
    memset(out, 0, sizeof(*out));
    out->dtype = other->dtype;
    out->rank = t->rank;
    memcpy(out->shape, t->shape, sizeof(out->shape));
    out->n_elems = t->n_elems;
    out->bytes = t->n_elems * (tv_dtype_bits(other->dtype) / 8u);
    out->chunk_bytes = out->bytes ? out->bytes : 1;
    out->n_chunks = out->bytes > 0;
    out->chunks = other->data;
}

enum tv_err tve_model_replace(tve_model *m, const char *tensor,
                              enum tv_dtype dtype, const void *data,
                              struct tv_error *err)
{
    const struct tv_input_tensor *const t = tv_input_find(m->in, tensor);
    const size_t n = tv_input_count(m->in);

    if (!t)
        return tv_error_set(err, TV_E_INPUT, "%s has no tensor \"%s\"",
                            tv_input_label(m->in), tensor);
    if (!tv_dtype_is_math(dtype))
        return tv_error_set(err, TV_E_UNSUPPORTED,
                            "weights of type %s for \"%s\"",
                            tv_dtype_name(dtype), tensor);
    if (!m->replaced) {
        m->replaced = tv_calloc(n ? n : 1, sizeof(*m->replaced));
        if (!m->replaced)
            return tv_error_set(err, TV_E_NOMEM, "out of memory");
    }
    m->replaced[index_of(m, t)] = (struct tve_replaced){{data}, dtype};
    return TV_OK;
}

bool tve_is_replaced(const tve_model *m, const struct tv_input_tensor *t)
{
    return m->replaced && m->replaced[index_of(m, t)].data[0];
}

enum tv_err tve_rows_open(struct tve_rows *r, tve_model *m,
                          const struct tve_weight *w, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const unsigned n = tv_pool_threads(m->pool);
    const struct tve_replaced *const other =
        tve_is_replaced(m, w->t) ? &m->replaced[index_of(m, w->t)] : NULL;
    const size_t n_changes = other ? 0 : w->n_changes;
    const size_t floats = tva_patch_floats(w->changes, n_changes, w->t);

    *r = (struct tve_rows){.m = m, .w = w, .replaced = other != NULL};
    if (other)
        replaced_view(other, w->t, &r->view);
    else
        TV_TRY(tve_view(m, w->t, &r->view, err));
    r->scratch = tv_calloc(n, sizeof(*r->scratch));
    if (!r->scratch) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (unsigned i = 0; i < n && floats > 0; i++) {
        r->scratch[i] = tv_alloc_aligned(floats * sizeof(float));
        if (!r->scratch[i]) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
            goto out;
        }
    }
    TV_TRY(tva_patch_open(&r->patch, w->changes, n_changes, w->t, &r->view,
                          m->kernels, !m->skip_verify, err));
out:
    return rc;
}

void tve_rows_close(struct tve_rows *r)
{
    if (!r->m)
        return;
    for (unsigned i = 0; r->scratch && i < tv_pool_threads(r->m->pool); i++)
        tv_free(r->scratch[i]);
    tv_free(r->scratch);
    tva_patch_close(&r->patch);
    if (!r->replaced)
        tv_input_release(r->m->in, &r->view);
    *r = (struct tve_rows){.m = NULL};
}

void tve_rows_read(const struct tve_rows *r, unsigned worker, uint64_t at,
                   size_t n, float *dst)
{
    const struct tvk_table *const k = r->m->kernels;

    tva_view_f32(k, &r->view, at, n, dst);
    for (size_t i = 0; r->patch.n > 0 && i < n; i += TVA_BLOCK)
        tva_patch_apply(&r->patch, k, at + i,
                        n - i < TVA_BLOCK ? n - i : TVA_BLOCK, dst + i,
                        r->scratch[worker]);
}

enum tv_err tve_load(tve_model *m, const struct tve_weight *w, float **out,
                     struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_rows r = {.m = NULL};
    size_t bytes = 0;
    float *p = NULL;

    *out = NULL;
    if (!w->t)
        return TV_OK;
    if (tv_mul_size((size_t)w->t->n_elems, sizeof(*p), &bytes))
        p = tv_alloc_aligned(bytes ? bytes : 1);
    if (!p) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(tve_rows_open(&r, m, w, err));
    if (w->t->n_elems > 0)
        tve_rows_read(&r, 0, 0, (size_t)w->t->n_elems, p);
    *out = p;
    p = NULL;
out:
    tve_rows_close(&r);
    tv_free(p);
    return rc;
}

/* ---- tiles --------------------------------------------------------------- */

size_t tve_linear_in(const tve_model *m, const struct tve_param *p)
{
    return m->spec.transposed && p != &m->globals[TVE_HEAD] ? p->w.rows
                                                            : p->w.cols;
}

size_t tve_linear_out(const tve_model *m, const struct tve_param *p)
{
    return m->spec.transposed && p != &m->globals[TVE_HEAD] ? p->w.cols
                                                            : p->w.rows;
}

size_t tve_tile_rows(size_t in, size_t out)
{
    size_t rows = TILE_ELEMS / (in ? in : 1) / TILE_STEP * TILE_STEP;

    if (rows < TILE_STEP)
        rows = TILE_STEP;
    if (rows > TILE_MAX)
        rows = TILE_MAX;
    /* at least a few tiles, so that several workers have something to do */
    while (rows > TILE_STEP * 2 && out < 4 * rows)
        rows /= 2;
    return rows;
}

enum tv_err tve_job_open(tve_model *m, const struct tve_param *p,
                         struct tve_job *j, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    j->in = tve_linear_in(m, p);
    j->out = tve_linear_out(m, p);
    j->columns = m->spec.transposed && p != &m->globals[TVE_HEAD];
    j->tile_rows = tve_tile_rows(j->in, j->out);
    j->n_tiles = (j->out + j->tile_rows - 1) / j->tile_rows;
    TV_TRY(tve_rows_open(&j->rows, m, &p->w, err));
    TV_TRY(tve_load(m, &p->b, &j->bias, err));
out:
    return rc;
}

void tve_job_close(struct tve_job *j)
{
    tve_rows_close(&j->rows);
    tv_free(j->bias);
}

/* dst: [n_out, in], or [in, n_out] when stored that way. */
static void job_tile(const struct tve_job *j, unsigned worker, size_t out0,
                     size_t n_out, float *dst)
{
    if (!j->columns) {
        tve_rows_read(&j->rows, worker, (uint64_t)out0 * j->in, n_out * j->in,
                      dst);
        return;
    }
    for (size_t row = 0; row < j->in; row++)
        tve_rows_read(&j->rows, worker, (uint64_t)row * j->out + out0, n_out,
                      dst + row * n_out);
}

static void job_gemm(const struct tve_job *j, size_t n_out, const float *tile,
                     const float *x, size_t ldx, size_t rows, float *y,
                     size_t ldy)
{
    cblas_sgemm(CblasRowMajor, CblasNoTrans,
                j->columns ? CblasNoTrans : CblasTrans, (blasint)rows,
                (blasint)n_out, (blasint)j->in, 1.0f, x, (blasint)ldx, tile,
                (blasint)(j->columns ? n_out : j->in), 0.0f, y, (blasint)ldy);
}

void tve_add_bias(float *y, size_t ldy, size_t rows, const float *bias,
                  size_t n)
{
    for (size_t r = 0; bias && r < rows; r++)
        for (size_t i = 0; i < n; i++)
            y[r * ldy + i] += bias[i];
}

void tve_finish_tile(const struct tve_run *r, const struct tve_job *j,
                     size_t index, size_t n_out, size_t row, size_t n, float *y,
                     size_t ldy)
{
    const size_t out0 = index * j->tile_rows;

    tve_add_bias(y, ldy, n, j->bias ? j->bias + out0 : NULL, n_out);
    if (!r->head)
        return;
    if (r->m->spec.logit_cap > 0)
        r->m->rows->cap_row(y, n_out * n, r->m->spec.logit_cap);
    const struct tve_head_tile t = {y, index, out0, n_out, row, n};
    r->head(r->arg, &t);
}

static void run_tile(void *arg, size_t item, unsigned worker)
{
    const struct tve_run *const r = arg;
    const struct tve_job *j = r->jobs;
    float *const tile = r->tiles[worker];

    if (r->done[item])
        return;
    while (item >= j->first_tile + j->n_tiles)
        j++;
    const size_t index = item - j->first_tile;
    const size_t out0 = index * j->tile_rows;
    const size_t n_out =
        j->out - out0 < j->tile_rows ? j->out - out0 : j->tile_rows;
    const struct tve_linear *const l = j->item;

    job_tile(j, worker, out0, n_out, tile);
    for (size_t g = 0; g < r->n_groups; g++) {
        const struct tve_group *const group = &r->groups[g];
        const float *const x = l->x + group->start * l->ldx;

        const size_t ldy = r->head ? n_out : l->ldy;
        float *const y =
            r->head ? r->logits[worker] : l->y + group->start * l->ldy + out0;

        job_gemm(j, n_out, tile, x, l->ldx, group->n, y, ldy);
        tve_finish_tile(r, j, index, n_out, group->start, group->n, y, ldy);
    }
}

static enum tv_err run_jobs(tve_model *m, const struct tve_linear *items,
                            size_t n_items, struct tve_run *r,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const unsigned n_workers = tv_pool_threads(m->pool);
    size_t n_tiles = 0, tile_floats = 1, rows = 0, logit_floats = 0;

    r->jobs = tv_calloc(n_items, sizeof(*r->jobs));
    r->tiles = tv_calloc(n_workers, sizeof(*r->tiles));
    r->logits = tv_calloc(n_workers, sizeof(*r->logits));
    if (!r->jobs || !r->tiles || !r->logits) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t g = 0; g < r->n_groups; g++)
        rows = r->groups[g].n > rows ? r->groups[g].n : rows;
    for (size_t i = 0; i < n_items; i++) {
        struct tve_job *const j = &r->jobs[i];

        j->item = &items[i];
        r->n_jobs++;
        TV_TRY(tve_job_open(m, items[i].p, j, err));
        j->first_tile = n_tiles;
        n_tiles += j->n_tiles;
        if (j->tile_rows * j->in > tile_floats)
            tile_floats = j->tile_rows * j->in;
        if (tve_split_tile_floats(m, j->in, j->out) > tile_floats)
            tile_floats = tve_split_tile_floats(m, j->in, j->out);
        if (r->head && j->tile_rows * rows > logit_floats)
            logit_floats = j->tile_rows * rows;
    }
    if (m->device) {
        rc = tve_device_run(m->device, r, err);
        goto out;
    }
    for (unsigned i = 0; i < n_workers; i++) {
        r->tiles[i] = tv_alloc_aligned(tile_floats * sizeof(float));
        r->logits[i] = tv_alloc_aligned((logit_floats + 1) * sizeof(float));
        if (!r->tiles[i] || !r->logits[i]) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
            goto out;
        }
    }
    r->done = tv_calloc(n_tiles ? n_tiles : 1, 1);
    if (!r->done) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (m->splits)
        TV_TRY(tve_split_run(r, n_tiles, err));
    tv_pool_run(m->pool, n_tiles, run_tile, r);
out:
    for (size_t i = 0; i < r->n_jobs; i++)
        tve_job_close(&r->jobs[i]);
    for (unsigned i = 0; r->tiles && i < n_workers; i++)
        tv_free(r->tiles[i]);
    for (unsigned i = 0; r->logits && i < n_workers; i++)
        tv_free(r->logits[i]);
    tv_free(r->jobs);
    tv_free(r->tiles);
    tv_free(r->logits);
    tv_free(r->done);
    return rc;
}

enum tv_err tve_linear_run(tve_model *m, const struct tve_linear *items,
                           size_t n_items, const struct tve_group *groups,
                           size_t n_groups, struct tv_error *err)
{
    struct tve_run r = {.m = m, .groups = groups, .n_groups = n_groups};

    return run_jobs(m, items, n_items, &r, err);
}

enum tv_err tve_head_run(tve_model *m, const struct tve_param *p,
                         const float *x, size_t ldx,
                         const struct tve_group *groups, size_t n_groups,
                         tve_head_fn fn, void *arg, struct tv_error *err)
{
    const struct tve_linear item = {.p = p, .x = x, .ldx = ldx};
    struct tve_run r = {
        .m = m, .groups = groups, .n_groups = n_groups, .head = fn, .arg = arg};

    return run_jobs(m, &item, 1, &r, err);
}
