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
 */
#include <string.h>

#include <cblas.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/hash.h"
#include "tv/text.h"

#include "decoder.h"

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

void tve_convert(const struct tvk_table *k, const struct tv_view *v,
                 uint64_t at, size_t n, float *dst)
{
    const uint64_t each = tv_dtype_bits(v->dtype) / 8;

    while (n > 0) {
        uint64_t run = 0;
        const unsigned char *const p = tv_view_at(v, at * each, &run);
        size_t got = (size_t)(run / each);
        unsigned char one[8];

        if (got == 0) { /* an element over a chunk border */
            tv_view_copy(v, at * each, each, one);
            tvk_to_f32(k, v->dtype, dst, one, 1);
            got = 1;
        } else {
            if (got > n)
                got = n;
            tvk_to_f32(k, v->dtype, dst, p, got);
        }
        at += got;
        dst += got;
        n -= got;
    }
}

static enum tv_err load_from(const struct tvk_table *k, tv_input *in,
                             const struct tv_input_tensor *t, float **out,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_view v = {.n_chunks = 0};
    size_t bytes = 0;
    float *p = NULL;

    *out = NULL;
    if (!tv_dtype_is_math(t->dtype)) {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "tensor \"%s\" is %s; only F32, F16 and BF16 can be "
                          "evaluated",
                          t->name, tv_dtype_name(t->dtype));
        goto out;
    }
    if (tv_mul_size((size_t)t->n_elems, sizeof(*p), &bytes))
        p = tv_alloc_aligned(bytes ? bytes : 1);
    if (!p) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(tv_input_view(in, t, err, &v));
    for (uint64_t i = 0; v.leaves && i < tv_leaf_count(v.bytes); i++) {
        if (!tv_hash_equal(tv_view_leaf(&v, i), v.leaves[i])) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "tensor \"%s\" of %s is damaged (checksum)",
                              t->name, tv_input_label(in));
            goto out;
        }
    }
    if (t->n_elems > 0)
        tve_convert(k, &v, 0, (size_t)t->n_elems, p);
    *out = p;
    p = NULL;
out:
    tv_input_release(in, &v);
    tv_free(p);
    return rc;
}

enum tv_err tve_load(tve_model *m, const struct tv_input_tensor *t, float **out,
                     struct tv_error *err)
{
    *out = NULL;
    return t ? load_from(m->kernels, m->in, t, out, err) : TV_OK;
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

struct lowrank { /* fp32 factors of one adapter module, as lowrank_add wants */
    float *l, *r;
    size_t rank;
    double scale;
};

struct job { /* one weight, ready to be cut into tiles */
    const struct tve_linear *item;
    const struct tve_weight *w;
    struct tv_view view;
    float *bias;
    struct lowrank *lr;
    size_t n_lr, in, out, tile_rows, n_tiles, first_tile;
    bool columns; /* stored [in, out] */
};

static void transpose(const float *src, size_t rows, size_t cols, float *dst)
{
    for (size_t i = 0; i < rows; i++)
        for (size_t k = 0; k < cols; k++)
            dst[k * rows + i] = src[i * cols + k];
}

/* delta = s B A for [out, in]; stored [in, out] it is s A^T B^T. */
static enum tv_err open_lowrank(tve_model *m, const struct tve_lora *lora,
                                bool columns, struct lowrank *out,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_adapter_module *const mod = lora->module;
    const size_t rank = (size_t)mod->r;
    float *a = NULL, *b = NULL;

    out->rank = rank;
    out->scale = lora->scale;
    TV_TRY(load_from(m->kernels, lora->input, mod->a, &a, err));
    TV_TRY(load_from(m->kernels, lora->input, mod->b, &b, err));
    if (!columns) {
        out->l = b;
        out->r = a;
        a = b = NULL;
        goto out;
    }
    out->l = tv_alloc_aligned((size_t)mod->in_features * rank * sizeof(float));
    out->r = tv_alloc_aligned((size_t)mod->out_features * rank * sizeof(float));
    if (!out->l || !out->r) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    transpose(a, rank, (size_t)mod->in_features, out->l);
    transpose(b, (size_t)mod->out_features, rank, out->r);
out:
    tv_free(a);
    tv_free(b);
    return rc;
}

static enum tv_err job_open(tve_model *m, const struct tve_param *p,
                            struct job *j, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    j->w = &p->w;
    j->in = tve_linear_in(m, p);
    j->out = tve_linear_out(m, p);
    j->columns = m->spec.transposed && p != &m->globals[TVE_HEAD];
    j->tile_rows = tve_tile_rows(j->in, j->out);
    j->n_tiles = (j->out + j->tile_rows - 1) / j->tile_rows;
    TV_TRY(tve_view(m, p->w.t, &j->view, err));
    TV_TRY(tve_load(m, p->b.t, &j->bias, err));
    j->lr = tv_calloc(p->w.n_lora ? p->w.n_lora : 1, sizeof(*j->lr));
    if (!j->lr) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (; j->n_lr < p->w.n_lora; j->n_lr++)
        TV_TRY(open_lowrank(m, &p->w.lora[j->n_lr], j->columns, &j->lr[j->n_lr],
                            err));
out:
    return rc;
}

static void job_close(tve_model *m, struct job *j)
{
    tv_input_release(m->in, &j->view);
    tv_free(j->bias);
    for (size_t i = 0; j->lr && i < j->w->n_lora; i++) {
        tv_free(j->lr[i].l);
        tv_free(j->lr[i].r);
    }
    tv_free(j->lr);
}

/* dst: [n_out, in], or [in, n_out] when stored that way. */
static void job_tile(const tve_model *m, const struct job *j, size_t out0,
                     size_t n_out, float *dst)
{
    const struct tvk_table *const k = m->kernels;

    if (!j->columns) {
        const uint64_t at = (uint64_t)out0 * j->in;

        tve_convert(k, &j->view, at, n_out * j->in, dst);
        for (size_t i = 0; i < j->n_lr; i++)
            k->lowrank_add(dst, j->lr[i].l, j->lr[i].r, j->lr[i].scale,
                           j->lr[i].rank, j->in, at, n_out * j->in);
        return;
    }
    for (size_t row = 0; row < j->in; row++) {
        const uint64_t at = (uint64_t)row * j->out + out0;
        float *const to = dst + row * n_out;

        tve_convert(k, &j->view, at, n_out, to);
        for (size_t i = 0; i < j->n_lr; i++)
            k->lowrank_add(to, j->lr[i].l, j->lr[i].r, j->lr[i].scale,
                           j->lr[i].rank, j->out, at, n_out);
    }
}

static void job_gemm(const struct job *j, size_t n_out, const float *tile,
                     const float *x, size_t ldx, size_t rows, float *y,
                     size_t ldy)
{
    cblas_sgemm(CblasRowMajor, CblasNoTrans,
                j->columns ? CblasNoTrans : CblasTrans, (blasint)rows,
                (blasint)n_out, (blasint)j->in, 1.0f, x, (blasint)ldx, tile,
                (blasint)(j->columns ? n_out : j->in), 0.0f, y, (blasint)ldy);
}

static void add_bias(float *y, size_t ldy, size_t rows, const float *bias,
                     size_t n)
{
    for (size_t r = 0; bias && r < rows; r++)
        for (size_t i = 0; i < n; i++)
            y[r * ldy + i] += bias[i];
}

struct run {
    const tve_model *m;
    struct job *jobs;
    size_t n_jobs;
    const struct tve_group *groups;
    size_t n_groups;
    float **tiles; /* per worker */
    float **logits;
    tve_head_fn head;
    void *arg;
};

static void run_tile(void *arg, size_t item, unsigned worker)
{
    const struct run *const r = arg;
    const struct job *j = r->jobs;
    float *const tile = r->tiles[worker];

    while (item >= j->first_tile + j->n_tiles)
        j++;
    const size_t index = item - j->first_tile;
    const size_t out0 = index * j->tile_rows;
    const size_t n_out =
        j->out - out0 < j->tile_rows ? j->out - out0 : j->tile_rows;
    const struct tve_linear *const l = j->item;

    job_tile(r->m, j, out0, n_out, tile);
    for (size_t g = 0; g < r->n_groups; g++) {
        const struct tve_group *const group = &r->groups[g];
        const float *const x = l->x + group->start * l->ldx;

        if (!r->head) {
            float *const y = l->y + group->start * l->ldy + out0;
            job_gemm(j, n_out, tile, x, l->ldx, group->n, y, l->ldy);
            add_bias(y, l->ldy, group->n, j->bias ? j->bias + out0 : NULL,
                     n_out);
            continue;
        }
        float *const y = r->logits[worker];
        job_gemm(j, n_out, tile, x, l->ldx, group->n, y, n_out);
        add_bias(y, n_out, group->n, j->bias ? j->bias + out0 : NULL, n_out);
        if (r->m->spec.logit_cap > 0)
            r->m->rows->cap_row(y, n_out * group->n, r->m->spec.logit_cap);
        const struct tve_head_tile t = {y,     index,        out0,
                                        n_out, group->start, group->n};
        r->head(r->arg, &t);
    }
}

static enum tv_err run_jobs(tve_model *m, const struct tve_linear *items,
                            size_t n_items, struct run *r, struct tv_error *err)
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
        struct job *const j = &r->jobs[i];

        j->item = &items[i];
        r->n_jobs++;
        TV_TRY(job_open(m, items[i].p, j, err));
        j->first_tile = n_tiles;
        n_tiles += j->n_tiles;
        if (j->tile_rows * j->in > tile_floats)
            tile_floats = j->tile_rows * j->in;
        if (r->head && j->tile_rows * rows > logit_floats)
            logit_floats = j->tile_rows * rows;
    }
    for (unsigned i = 0; i < n_workers; i++) {
        r->tiles[i] = tv_alloc_aligned(tile_floats * sizeof(float));
        r->logits[i] = tv_alloc_aligned((logit_floats + 1) * sizeof(float));
        if (!r->tiles[i] || !r->logits[i]) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
            goto out;
        }
    }
    tv_pool_run(m->pool, n_tiles, run_tile, r);
out:
    for (size_t i = 0; i < r->n_jobs; i++)
        job_close(m, &r->jobs[i]);
    for (unsigned i = 0; r->tiles && i < n_workers; i++)
        tv_free(r->tiles[i]);
    for (unsigned i = 0; r->logits && i < n_workers; i++)
        tv_free(r->logits[i]);
    tv_free(r->jobs);
    tv_free(r->tiles);
    tv_free(r->logits);
    return rc;
}

enum tv_err tve_linear_run(tve_model *m, const struct tve_linear *items,
                           size_t n_items, const struct tve_group *groups,
                           size_t n_groups, struct tv_error *err)
{
    struct run r = {.m = m, .groups = groups, .n_groups = n_groups};

    return run_jobs(m, items, n_items, &r, err);
}

enum tv_err tve_head_run(tve_model *m, const struct tve_param *p,
                         const float *x, size_t ldx,
                         const struct tve_group *groups, size_t n_groups,
                         tve_head_fn fn, void *arg, struct tv_error *err)
{
    const struct tve_linear item = {.p = p, .x = x, .ldx = ldx};
    struct run r = {
        .m = m, .groups = groups, .n_groups = n_groups, .head = fn, .arg = arg};

    return run_jobs(m, &item, 1, &r, err);
}
