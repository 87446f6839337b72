/* SPDX-License-Identifier: Apache-2.0 */
/*
 * forward.c - the forward pass over windows, layer by layer: a batch goes
 * through the whole model, so its weights are read once per batch. The order of
 * steps is this file's; on a CUDA device the steps are forward_cuda.c's.
 */
#include "forward_parts.h"

#include <string.h>

#include "tv/alloc.h"

#define ROWS_AT 16u /* rows that one item of row work takes */

/* ---- row work ------------------------------------------------------------ */

typedef void (*row_fn)(struct tve_batch *b, size_t row);
struct row_run {
    struct tve_batch *b;
    row_fn fn;
};

static void row_item(void *arg, size_t item, unsigned worker)
{
    const struct row_run *const r = arg;
    const size_t from = item * ROWS_AT;
    const size_t to = r->b->rows - from < ROWS_AT ? r->b->rows : from + ROWS_AT;

    (void)worker;
    for (size_t row = from; row < to; row++)
        r->fn(r->b, row);
}

static void run_rows(struct tve_batch *b, row_fn fn)
{
    struct row_run r = {b, fn};

    tv_pool_run(b->m->pool, (b->rows + ROWS_AT - 1) / ROWS_AT, row_item, &r);
}

static void row_norm(struct tve_batch *b, size_t row)
{
    b->m->rows->norm_row(b->spec->norm, b->spec->eps, b->w, b->b,
                         b->from + row * b->ld, b->to + row * b->ld,
                         b->spec->hidden);
}

static void row_add(struct tve_batch *b, size_t row)
{
    float *const h = b->h + row * b->spec->hidden;
    const float *const y = b->from + row * b->ld;

    for (size_t i = 0; i < b->spec->hidden; i++)
        h[i] += y[i];
}

static void row_copy_to_h(struct tve_batch *b, size_t row)
{
    memcpy(b->h + row * b->spec->hidden, b->from + row * b->ld,
           b->spec->hidden * sizeof(float));
}

static void row_act(struct tve_batch *b, size_t row)
{
    float *const s = b->s + row * b->inner_width;

    b->m->rows->act_row(b->spec->act, s,
                        b->spec->gated ? s + b->spec->inner : NULL,
                        b->spec->inner);
}

static void row_embed(struct tve_batch *b, size_t row, unsigned worker)
{
    const struct tve_spec *const s = b->spec;
    float *const to = b->to + row * b->ld;

    tve_rows_read(b->table, worker, (uint64_t)b->ids[row] * s->embed_dim,
                  s->embed_dim, to);
    if (s->embed_scale != 1.0f)
        for (size_t i = 0; i < s->embed_dim; i++)
            to[i] *= s->embed_scale;
}

static void row_position(struct tve_batch *b, size_t row, unsigned worker)
{
    const struct tve_spec *const s = b->spec;
    float *const h = b->h + row * s->hidden;
    float part[256];
    const uint64_t at =
        (uint64_t)(b->position[row] + s->position_offset) * s->hidden;

    for (size_t i = 0; i < s->hidden; i += 256) {
        const size_t n = s->hidden - i < 256 ? s->hidden - i : 256;
        tve_rows_read(b->table, worker, at + i, n, part);
        for (size_t k = 0; k < n; k++)
            h[i + k] += part[k];
    }
}

static void embed_item(void *arg, size_t item, unsigned worker)
{
    struct tve_batch *const b = arg;

    for (size_t i = item * ROWS_AT; i < b->rows && i < (item + 1) * ROWS_AT;
         i++)
        row_embed(b, i, worker);
}

static void position_item(void *arg, size_t item, unsigned worker)
{
    struct tve_batch *const b = arg;

    for (size_t i = item * ROWS_AT; i < b->rows && i < (item + 1) * ROWS_AT;
         i++)
        row_position(b, i, worker);
}

/* Norms (w: queries, w2: keys) and rotation of all heads of a row. */
static void row_heads(struct tve_batch *b, size_t row)
{
    const struct tve_spec *const s = b->spec;
    const unsigned which = s->layers[b->layer].rope;
    const bool per_head = s->qkv == TVE_QKV_HEADS;
    const size_t step = per_head ? 3 * s->head_dim : s->head_dim;
    float *const q = b->s + row * b->qkv_width;
    float *const k = q + (per_head ? s->head_dim : s->n_heads * s->head_dim);
    const size_t half = tve_rope_half(&s->rope[which]);

    for (size_t i = 0; i < s->n_heads + s->n_kv; i++) {
        const bool is_q = i < s->n_heads;
        float *const head = is_q ? q + i * step : k + (i - s->n_heads) * step;
        const float *const w = is_q ? b->w : b->w2;

        if (w)
            b->m->rows->norm_row(s->norm, s->eps, w, NULL, head, head,
                                 s->head_dim);
        if (s->positions == TVE_ROPE) {
            const size_t at = b->position[row] * half;
            b->m->rows->rotate(head, b->cos_rows[which] + at,
                               b->sin_rows[which] + at, half);
        }
    }
}

/* ---- blocks -------------------------------------------------------------- */

/* to = norm(from); both [rows, ld]. A missing norm weight is one without
 * affine part; missing altogether (`skip_absent`) copies nothing. */
static enum tv_err norm(struct tve_batch *b, const struct tve_param *p,
                        const float *from, float *to, size_t ld,
                        struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    float *w = NULL, *bias = NULL;

    if (b->is_there)
        return tve_there_norm(b->m, p, from, to, ld, b->rows, err);
    TV_TRY(tve_load(b->m, &p->w, &w, err));
    TV_TRY(tve_load(b->m, &p->b, &bias, err));
    b->w = w;
    b->b = bias;
    b->from = from;
    b->to = to;
    b->ld = ld;
    run_rows(b, row_norm);
out:
    tv_free(w);
    tv_free(bias);
    return rc;
}

static enum tv_err add(struct tve_batch *b, const float *from, size_t ld,
                       struct tv_error *err)
{
    if (b->is_there)
        return tve_there_add(b->m, b->h, from, ld, b->rows, err);
    b->from = from;
    b->ld = ld;
    run_rows(b, row_add);
    return TV_OK;
}

static enum tv_err copy_to_h(struct tve_batch *b, const float *from, size_t ld,
                             struct tv_error *err)
{
    if (b->is_there)
        return tve_there_copy(b->m, b->h, from, ld, b->rows, err);
    b->from = from;
    b->ld = ld;
    run_rows(b, row_copy_to_h);
    return TV_OK;
}

static enum tv_err linear(struct tve_batch *b, const struct tve_linear *items,
                          size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    if (b->tap)
        TV_TRY(b->tap->fn(b->tap->arg, items, n, b->groups, b->n_groups,
                          b->is_there, err));
    TV_TRY(b->is_there
               ? tve_there_linear(b->m, items, n, b->groups, b->n_groups, err)
               : tve_linear_run(b->m, items, n, b->groups, b->n_groups, err));
out:
    return rc;
}

/* Norms and rotation of the heads of q and k. */
static enum tv_err heads_of(struct tve_batch *b, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_spec *const s = b->spec;
    float *wq = NULL, *wk = NULL;

    if (b->is_there)
        return tve_there_heads(b->m, &b->there, b->layer, b->s, b->qkv_width,
                               b->rows, err);
    if (s->qk_norm) {
        TV_TRY(tve_load(b->m, &tve_layer_param(b->m, b->layer, TVE_NQ)->w, &wq,
                        err));
        TV_TRY(tve_load(b->m, &tve_layer_param(b->m, b->layer, TVE_NK)->w, &wk,
                        err));
    }
    b->w = wq;
    b->w2 = wk;
    if (s->qk_norm || s->positions == TVE_ROPE)
        run_rows(b, row_heads);
out:
    tv_free(wq);
    tv_free(wk);
    return rc;
}

static enum tv_err attention(struct tve_batch *b, const float *x, size_t ldx,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_spec *const s = b->spec;
    const struct tve_layer_spec *const ls = &s->layers[b->layer];
    const size_t hd = s->head_dim, qw = s->n_heads * hd, kw = s->n_kv * hd;
    const struct tve_param *const fused =
        tve_layer_param(b->m, b->layer, TVE_QKV);
    const bool per_head = s->qkv == TVE_QKV_HEADS;
    float *const qkv = b->s;
    float *const heads = b->s + b->rows * b->qkv_width;

    if (fused->w.t) {
        const struct tve_linear l = {fused, x, ldx, qkv, b->qkv_width};
        TV_TRY(linear(b, &l, 1, err));
    } else {
        const struct tve_linear l[3] = {
            {tve_layer_param(b->m, b->layer, TVE_Q), x, ldx, qkv, b->qkv_width},
            {tve_layer_param(b->m, b->layer, TVE_K), x, ldx, qkv + qw,
             b->qkv_width},
            {tve_layer_param(b->m, b->layer, TVE_V), x, ldx, qkv + qw + kw,
             b->qkv_width},
        };
        TV_TRY(linear(b, l, 3, err));
    }
    TV_TRY(heads_of(b, err));
    const struct tve_attention a = {
        .n_heads = s->n_heads,
        .n_kv = s->n_kv,
        .head_dim = hd,
        .window = ls->window,
        .qkv = qkv,
        .ld = b->qkv_width,
        .q0 = 0,
        .q_step = per_head ? 3 * hd : hd,
        .k0 = per_head ? hd : qw,
        .k_step = per_head ? 3 * hd : hd,
        .v0 = per_head ? 2 * hd : qw + kw,
        .v_step = per_head ? 3 * hd : hd,
        .scale = ls->attn_scale,
        .cap = s->attn_cap,
        .slopes = b->slopes,
        .out = heads,
        .ld_out = b->head_width,
    };
    TV_TRY(b->is_there
               ? tve_there_attention(b->m, &b->there, &a, b->starts,
                                     b->n_windows, b->groups, b->n_groups, err)
               : tve_attention_run(b->m, &a, b->starts, b->n_windows, err));
    const struct tve_linear o = {tve_layer_param(b->m, b->layer, TVE_O), heads,
                                 b->head_width, b->y, b->wide};
    TV_TRY(linear(b, &o, 1, err));
out:
    return rc;
}

static enum tv_err mlp(struct tve_batch *b, const float *x, size_t ldx,
                       struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_spec *const s = b->spec;
    const struct tve_param *const fused =
        tve_layer_param(b->m, b->layer, TVE_GATE_UP);
    const struct tve_param *const up = tve_layer_param(b->m, b->layer, TVE_UP);
    const size_t ld = b->inner_width;

    if (fused->w.t) {
        const struct tve_linear l = {fused, x, ldx, b->s, ld};
        TV_TRY(linear(b, &l, 1, err));
    } else if (s->gated) {
        const struct tve_linear l[2] = {
            {tve_layer_param(b->m, b->layer, TVE_GATE), x, ldx, b->s, ld},
            {up, x, ldx, b->s + s->inner, ld},
        };
        TV_TRY(linear(b, l, 2, err));
    } else {
        const struct tve_linear l = {up, x, ldx, b->s, ld};
        TV_TRY(linear(b, &l, 1, err));
    }
    if (b->is_there)
        TV_TRY(tve_there_act(b->m, b->s, ld, b->rows, err));
    else
        run_rows(b, row_act);
    const struct tve_linear down = {tve_layer_param(b->m, b->layer, TVE_DOWN),
                                    b->s, ld, b->y, b->wide};
    TV_TRY(linear(b, &down, 1, err));
out:
    return rc;
}

enum tv_err tve_batch_layer(struct tve_batch *b, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_spec *const s = b->spec;
    const struct tve_param *const p = tve_layer_param(b->m, b->layer, TVE_N1);
    const size_t wide = b->wide, hidden = s->hidden;

    /* norms read h [rows, hidden] but x and y are [rows, wide]; these differ
     * only for OPT models with projections, whose h is the narrower */
    switch (s->residual) {
    case TVE_PRE_NORM:
        TV_TRY(norm(b, &p[TVE_N1], b->h, b->x, hidden, err));
        TV_TRY(attention(b, b->x, hidden, err));
        TV_TRY(add(b, b->y, wide, err));
        TV_TRY(norm(b, &p[TVE_N2], b->h, b->x, hidden, err));
        TV_TRY(mlp(b, b->x, hidden, err));
        TV_TRY(add(b, b->y, wide, err));
        break;
    case TVE_PARALLEL:
        TV_TRY(norm(b, &p[TVE_N1], b->h, b->x, hidden, err));
        TV_TRY(attention(b, b->x, hidden, err));
        TV_TRY(norm(b, &p[TVE_N2], b->h, b->x, hidden, err));
        TV_TRY(add(b, b->y, wide, err));
        TV_TRY(mlp(b, b->x, hidden, err));
        TV_TRY(add(b, b->y, wide, err));
        break;
    case TVE_SANDWICH:
        TV_TRY(norm(b, &p[TVE_N1], b->h, b->x, hidden, err));
        TV_TRY(attention(b, b->x, hidden, err));
        TV_TRY(norm(b, &p[TVE_N2], b->y, b->y, wide, err));
        TV_TRY(add(b, b->y, wide, err));
        TV_TRY(norm(b, &p[TVE_N3], b->h, b->x, hidden, err));
        TV_TRY(mlp(b, b->x, hidden, err));
        TV_TRY(norm(b, &p[TVE_N4], b->y, b->y, wide, err));
        TV_TRY(add(b, b->y, wide, err));
        break;
    case TVE_POST_NORM:
        TV_TRY(attention(b, b->h, hidden, err));
        TV_TRY(add(b, b->y, wide, err));
        TV_TRY(norm(b, &p[TVE_N1], b->h, b->h, hidden, err));
        TV_TRY(mlp(b, b->h, hidden, err));
        TV_TRY(add(b, b->y, wide, err));
        TV_TRY(norm(b, &p[TVE_N2], b->h, b->h, hidden, err));
        break;
    case TVE_NORM_RESIDUAL:
        for (int half = 0; half < 2; half++) {
            TV_TRY(
                norm(b, &p[half ? TVE_N2 : TVE_N1], b->h, b->x, hidden, err));
            TV_TRY(copy_to_h(b, b->x, hidden, err));
            TV_TRY(half ? mlp(b, b->x, hidden, err)
                        : attention(b, b->x, hidden, err));
            TV_TRY(add(b, b->y, wide, err));
        }
        break;
    }
out:
    return rc;
}

/* ---- before and behind the layers ---------------------------------------- */

static enum tv_err embed_there(struct tve_batch *b, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_spec *const s = b->spec;
    const struct tve_param *const g = b->m->globals;
    const bool projected = g[TVE_PROJECT_IN].w.t;

    TV_TRY(tve_there_embed(b->m, &b->there, b->ids, b->rows,
                           projected ? b->x : b->h, err));
    if (projected) {
        const struct tve_linear l = {&g[TVE_PROJECT_IN], b->x, s->embed_dim,
                                     b->h, s->hidden};
        TV_TRY(linear(b, &l, 1, err));
    }
    if (s->positions == TVE_LEARNED)
        TV_TRY(tve_there_positions(b->m, &b->there, b->h, b->y, b->rows,
                                   b->longest, err));
    if (g[TVE_EMBED_NORM].w.t)
        TV_TRY(norm(b, &g[TVE_EMBED_NORM], b->h, b->h, s->hidden, err));
out:
    return rc;
}

enum tv_err tve_batch_embed(struct tve_batch *b, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_spec *const s = b->spec;
    const struct tve_param *const g = b->m->globals;
    const size_t n_items = (b->rows + ROWS_AT - 1) / ROWS_AT;
    struct tve_rows table = {.m = NULL}, positions = {.m = NULL};

    if (b->is_there)
        return embed_there(b, err);
    TV_TRY(tve_rows_open(&table, b->m, &g[TVE_EMBED].w, err));
    b->table = &table;
    b->to = g[TVE_PROJECT_IN].w.t ? b->x : b->h;
    b->ld = g[TVE_PROJECT_IN].w.t ? b->wide : s->hidden;
    tv_pool_run(b->m->pool, n_items, embed_item, b);
    if (g[TVE_PROJECT_IN].w.t) {
        const struct tve_linear l = {&g[TVE_PROJECT_IN], b->x, b->wide, b->h,
                                     s->hidden};
        TV_TRY(linear(b, &l, 1, err));
    }
    if (s->positions == TVE_LEARNED) {
        TV_TRY(tve_rows_open(&positions, b->m, &g[TVE_POSITION].w, err));
        b->table = &positions;
        tv_pool_run(b->m->pool, n_items, position_item, b);
    }
    if (g[TVE_EMBED_NORM].w.t)
        TV_TRY(norm(b, &g[TVE_EMBED_NORM], b->h, b->h, s->hidden, err));
out:
    tve_rows_close(&table);
    tve_rows_close(&positions);
    return rc;
}

enum tv_err tve_batch_finish(struct tve_batch *b, const float **out, size_t *ld,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_spec *const s = b->spec;
    const struct tve_param *const g = b->m->globals;

    *out = b->h;
    *ld = s->hidden;
    if (g[TVE_FINAL_NORM].w.t ||
        (!s->norm_affine && s->residual != TVE_POST_NORM)) {
        TV_TRY(norm(b, &g[TVE_FINAL_NORM], b->h, b->x, s->hidden, err));
        *out = b->x;
    }
    if (g[TVE_PROJECT_OUT].w.t) {
        const struct tve_linear l = {&g[TVE_PROJECT_OUT], *out, s->hidden, b->y,
                                     b->wide};
        TV_TRY(linear(b, &l, 1, err));
        *out = b->y;
        *ld = b->wide;
    }
out:
    return rc;
}

/* ---- batches ------------------------------------------------------------- */

enum tv_err tve_check_windows(const tve_model *m, const struct tve_window *w,
                              size_t n, struct tv_error *err)
{
    const struct tve_spec *const s = &m->spec;

    for (size_t i = 0; i < n; i++) {
        if (w[i].n == 0 || w[i].n > INT32_MAX || w[i].score_from < 1)
            return tv_error_set(err, TV_E_INPUT, "window %zu is empty", i);
        if (!tve_model_takes(m, w[i].n))
            return tv_error_set(err, TV_E_INPUT,
                                "a context of %zu tokens, but the model has "
                                "%zu positions",
                                w[i].n, s->max_positions);
        for (size_t k = 0; k < w[i].n; k++)
            if (w[i].ids[k] < 0 || (size_t)w[i].ids[k] >= s->vocab)
                return tv_error_set(err, TV_E_INPUT,
                                    "id %ld at position %zu of window %zu is "
                                    "outside the vocabulary (%zu)",
                                    (long)w[i].ids[k], k, i, s->vocab);
    }
    return TV_OK;
}

struct tally {
    const struct tve_progress *progress;
    uint64_t done, total; /* rows times steps */
    uint64_t steps;       /* of a row: layers and the head */
};

static enum tv_err step(struct tally *t, uint64_t rows, struct tv_error *err)
{
    t->done += rows;
    if (!t->progress)
        return TV_OK;
    if (t->progress->step)
        t->progress->step(t->progress->arg, t->done / t->steps,
                          t->total / t->steps);
    if (t->progress->cancel && *t->progress->cancel)
        return tv_error_set(err, TV_E_INTERRUPTED, "interrupted");
    return TV_OK;
}

enum tv_err tve_run_batches(tve_model *m, const struct tve_window *w, size_t n,
                            const struct tve_progress *progress,
                            tve_batch_fn fn, void *arg, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tally t = {progress, 0, 0, m->spec.n_layers + 1};
    struct tve_batch b = {.m = NULL};
    size_t at = 0;

    TV_TRY(tve_check_windows(m, w, n, err));
    for (size_t i = 0; i < n; i++)
        t.total += w[i].n * t.steps;
    while (at < n) {
        TV_TRY(tve_batch_open(m, w + at, n - at, tve_activation_budget(m), NULL,
                              TVE_ANYWHERE, &b, err));
        TV_TRY(tve_batch_embed(&b, err));
        for (b.layer = 0; b.layer < m->spec.n_layers; b.layer++) {
            TV_TRY(tve_batch_layer(&b, err));
            if (b.is_there)
                TV_TRY(tve_there_sync(m, err));
            TV_TRY(step(&t, b.rows, err));
        }
        TV_TRY(fn(&b, arg, err));
        TV_TRY(step(&t, b.rows, err));
        at += b.n_windows;
        tve_batch_close(&b);
        memset(&b, 0, sizeof(b));
    }
out:
    tve_batch_close(&b);
    return rc;
}
