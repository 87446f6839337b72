/* SPDX-License-Identifier: Apache-2.0 */
/*
 * forward.c - the forward pass over windows, layer by layer.
 *
 * Windows are put into groups (consecutive, equally long, about 2,048 rows) and
 * groups into batches that fit the memory budget; a batch goes through the
 * whole model, so its weights are read once per batch. Only batches depend on
 * the budget, and no arithmetic depends on batches.
 *
 *   rows of a batch     h  [rows, hidden]   residual stream
 *                       x  [rows, wide]     input of a block
 *                       y  [rows, wide]     its output
 *                       s  [rows, space]    q, k, v and heads' outputs, or the
 *                                           inner activations of the MLP
 * One block of memory holds all four; a group that exceeds the budget gets it
 * from an unlinked scratch file. With a CUDA device they lie there, if a group
 * has room: the order of steps is this file's, the steps are forward_cuda.c's.
 *
 * A walk goes the other way round: it holds h of all windows, and every layer
 * takes them batch by batch, so that something can be learnt from all inputs of
 * a layer before the next one begins.
 */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tv/alloc.h"
#include "tv/calibrate.h"
#include "tv/checked.h"
#include "tv/sys.h"

#include "decoder.h"

#define GROUP_ROWS 2048u
#define BATCH_ROWS 65536u
#define ROWS_AT    16u /* rows that one item of row work takes */
#define CHUNK_LOGITS                                                           \
    (16u << 20) /* elements that a logits sink gets at once                    \
                 */

struct batch {
    tve_model *m;
    const struct tve_spec *spec;
    const struct tve_window *windows;
    size_t n_windows, rows;
    size_t *starts;     /* [n_windows + 1] */
    uint32_t *position; /* [rows] */
    int32_t *ids;       /* [rows] */
    struct tve_group *groups;
    size_t n_groups;
    size_t wide, qkv_width, head_width, inner_width, space;
    float *memory;
    size_t memory_bytes;
    bool mapped;
    bool is_there; /* on the device: so are h, x, y and s */
    struct tve_batch_there there;
    float *h, *x, *y, *s;
    size_t longest;
    float *cos_rows[2], *sin_rows[2]; /* [longest, pairs] */
    float *slopes;
    /* what the row work at hand uses */
    const float *w, *b, *w2;
    const float *from;
    float *to;
    size_t n, ld;
    const struct tve_rows *table; /* of embeddings or positions */
    size_t layer;
    const struct tve_tap *tap; /* NULL: nobody looks at inputs */
};

struct partial { /* of one row and tile: sum of exp(logit - max) */
    double sum;
    float max;
};

/* ---- memory -------------------------------------------------------------- */

/* What was charged once stays so until the model is closed: batches come and
 * go. */
static enum tv_err charge(tve_model *m, uint64_t bytes, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    bytes = (bytes + 4095) & ~UINT64_C(4095);
    if (!m->quota_of || bytes <= m->charged_bytes)
        return TV_OK;
    rc = tv_store_scratch_set(m->quota_of, bytes, err);
    if (rc == TV_OK)
        m->charged_bytes = bytes;
    return rc;
}

static void unmap_scratch(tve_model *m, float *p, size_t bytes)
{
    tv_sys()->munmap(p, bytes);
    m->scratch_bytes -= bytes;
}

static enum tv_err map_scratch(tve_model *m, size_t bytes, float **out,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    /* unique while it has a name: one model maps one file at a time */
    char *const path = tv_asprintf("%s/tveval-scratch.%ld.%p", m->scratch_dir,
                                   (long)getpid(), (const void *)m);
    int fd = -1;
    void *p = NULL;

    if (!path)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    TV_TRY(charge(m, m->scratch_bytes + bytes, err));
    fd = tv_sys()->open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        rc = tv_error_sys(err, errno, "cannot create scratch file %s", path);
        goto out;
    }
    tv_sys()->unlink(path);
    /* Reserved now, so that a full disk is an error and no SIGBUS later. */
    if (tv_sys()->fallocate(fd, 0, 0, (off_t)bytes) != 0 &&
        errno != EOPNOTSUPP) {
        rc = tv_error_sys(err, errno, "scratch file of %zu bytes in %s", bytes,
                          m->scratch_dir);
        goto out;
    }
    if (tv_sys()->ftruncate(fd, (off_t)bytes) != 0) {
        rc = tv_error_sys(err, errno, "scratch file in %s", m->scratch_dir);
        goto out;
    }
    p = tv_sys()->mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) {
        rc = tv_error_sys(err, errno, "mapping a scratch file of %zu bytes",
                          bytes);
        goto out;
    }
    m->scratch_bytes += bytes;
    *out = p;
out:
    if (fd >= 0)
        tv_sys()->close(fd);
    tv_free(path);
    return rc;
}

static size_t row_floats(const struct tve_spec *s, struct batch *b)
{
    const size_t heads = s->n_heads * s->head_dim;

    b->wide = s->hidden > s->embed_dim ? s->hidden : s->embed_dim;
    b->qkv_width = heads + 2 * s->n_kv * s->head_dim;
    b->head_width = heads;
    b->inner_width = s->gated ? 2 * s->inner : s->inner;
    b->space = b->qkv_width + b->head_width;
    if (b->inner_width > b->space)
        b->space = b->inner_width;
    return s->hidden + 2 * b->wide + b->space;
}

/* Bytes that a batch's activations may take. */
static uint64_t activation_budget(const tve_model *m)
{
    const uint64_t per_worker = (8u << 20) + GROUP_ROWS * 1024u * 4u;
    const uint64_t workers = tv_pool_threads(m->pool) * per_worker +
                             (m->device ? TVE_DEVICE_PINNED : 0) +
                             tve_split_slab(m);

    return m->memory_bytes > 2 * workers ? m->memory_bytes - workers
                                         : m->memory_bytes / 2;
}

/* ---- row work ------------------------------------------------------------ */

typedef void (*row_fn)(struct batch *b, size_t row);
struct row_run {
    struct batch *b;
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

static void run_rows(struct batch *b, row_fn fn)
{
    struct row_run r = {b, fn};

    tv_pool_run(b->m->pool, (b->rows + ROWS_AT - 1) / ROWS_AT, row_item, &r);
}

static void row_norm(struct batch *b, size_t row)
{
    b->m->rows->norm_row(b->spec->norm, b->spec->eps, b->w, b->b,
                         b->from + row * b->ld, b->to + row * b->ld,
                         b->spec->hidden);
}

static void row_add(struct batch *b, size_t row)
{
    float *const h = b->h + row * b->spec->hidden;
    const float *const y = b->from + row * b->ld;

    for (size_t i = 0; i < b->spec->hidden; i++)
        h[i] += y[i];
}

static void row_copy_to_h(struct batch *b, size_t row)
{
    memcpy(b->h + row * b->spec->hidden, b->from + row * b->ld,
           b->spec->hidden * sizeof(float));
}

static void row_act(struct batch *b, size_t row)
{
    float *const s = b->s + row * b->inner_width;

    b->m->rows->act_row(b->spec->act, s,
                        b->spec->gated ? s + b->spec->inner : NULL,
                        b->spec->inner);
}

static void row_embed(struct batch *b, size_t row, unsigned worker)
{
    const struct tve_spec *const s = b->spec;
    float *const to = b->to + row * b->ld;

    tve_rows_read(b->table, worker, (uint64_t)b->ids[row] * s->embed_dim,
                  s->embed_dim, to);
    if (s->embed_scale != 1.0f)
        for (size_t i = 0; i < s->embed_dim; i++)
            to[i] *= s->embed_scale;
}

static void row_position(struct batch *b, size_t row, unsigned worker)
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
    struct batch *const b = arg;

    for (size_t i = item * ROWS_AT; i < b->rows && i < (item + 1) * ROWS_AT;
         i++)
        row_embed(b, i, worker);
}

static void position_item(void *arg, size_t item, unsigned worker)
{
    struct batch *const b = arg;

    for (size_t i = item * ROWS_AT; i < b->rows && i < (item + 1) * ROWS_AT;
         i++)
        row_position(b, i, worker);
}

/* Norms (w: queries, w2: keys) and rotation of all heads of a row. */
static void row_heads(struct batch *b, size_t row)
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
static enum tv_err norm(struct batch *b, const struct tve_param *p,
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

static enum tv_err add(struct batch *b, const float *from, size_t ld,
                       struct tv_error *err)
{
    if (b->is_there)
        return tve_there_add(b->m, b->h, from, ld, b->rows, err);
    b->from = from;
    b->ld = ld;
    run_rows(b, row_add);
    return TV_OK;
}

static enum tv_err copy_to_h(struct batch *b, const float *from, size_t ld,
                             struct tv_error *err)
{
    if (b->is_there)
        return tve_there_copy(b->m, b->h, from, ld, b->rows, err);
    b->from = from;
    b->ld = ld;
    run_rows(b, row_copy_to_h);
    return TV_OK;
}

static enum tv_err linear(struct batch *b, const struct tve_linear *items,
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
static enum tv_err heads_of(struct batch *b, struct tv_error *err)
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

static enum tv_err attention(struct batch *b, const float *x, size_t ldx,
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

static enum tv_err mlp(struct batch *b, const float *x, size_t ldx,
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

static enum tv_err layer(struct batch *b, struct tv_error *err)
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

static enum tv_err embed_there(struct batch *b, struct tv_error *err)
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

static enum tv_err embed(struct batch *b, struct tv_error *err)
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

/* Input of the output head in x or y, [rows, *ld]. */
static enum tv_err finish(struct batch *b, const float **out, size_t *ld,
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

static enum tv_err make_rotations(struct batch *b, struct tv_error *err)
{
    const struct tve_spec *const s = b->spec;

    for (unsigned r = 0; r < 2; r++) {
        const struct tve_rope *const rope = &s->rope[r];
        const size_t half = tve_rope_half(rope);
        float *inv = NULL;

        if (half == 0)
            continue;
        inv = tv_calloc(half, sizeof(*inv));
        b->cos_rows[r] = tv_calloc(b->longest * half, sizeof(float));
        b->sin_rows[r] = tv_calloc(b->longest * half, sizeof(float));
        if (!inv || !b->cos_rows[r] || !b->sin_rows[r]) {
            tv_free(inv);
            return tv_error_set(err, TV_E_NOMEM, "out of memory");
        }
        tve_rope_frequencies(rope, b->longest, inv);
        for (size_t p = 0; p < b->longest; p++) {
            for (size_t i = 0; i < half; i++) {
                /* the product is rounded to fp32, as models are trained */
                const double angle = (double)((float)p * inv[i]);
                b->cos_rows[r][p * half + i] =
                    (float)cos(angle) * (float)rope->scale;
                b->sin_rows[r][p * half + i] =
                    (float)sin(angle) * (float)rope->scale;
            }
        }
        tv_free(inv);
    }
    return TV_OK;
}

/* ALiBi (Press et al., ICLR 2022): a geometric series; heads beyond a power of
 * two take every other term of the next finer one. */
static enum tv_err make_slopes(struct batch *b, struct tv_error *err)
{
    const size_t n = b->spec->n_heads;
    size_t power = 1;

    if (b->spec->positions != TVE_ALIBI)
        return TV_OK;
    b->slopes = tv_calloc(n, sizeof(float));
    if (!b->slopes)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    while (power * 2 <= n)
        power *= 2;
    for (size_t i = 0; i < n; i++) {
        const double terms = i < power ? (double)power : 2.0 * (double)power;
        const double exponent =
            i < power ? (double)(i + 1) : (double)(2 * (i - power) + 1);

        b->slopes[i] = (float)pow(2.0, -8.0 / terms * exponent);
    }
    return TV_OK;
}

/* ---- what cannot go to a file ---------------------------------------------
 */

/* Rows of a group of windows of n ids. */
static size_t group_rows(size_t n)
{
    return n == 0 || n >= GROUP_ROWS ? n : GROUP_ROWS / n * n;
}

/* Rows of logits that a sink gets at once. */
static size_t logits_rows(size_t vocab, size_t seq)
{
    size_t n = CHUNK_LOGITS / vocab;
    n = n < 1 ? 1 : n > GROUP_ROWS ? GROUP_ROWS : n;
    return n < seq ? n : seq ? seq : 1;
}

static uint64_t tile_floats(const tve_model *m, const struct tve_param *p)
{
    const size_t in = tve_linear_in(m, p), out = tve_linear_out(m, p);
    const uint64_t floats = (uint64_t)tve_tile_rows(in, out) * in;
    const size_t split = tve_split_tile_floats(m, in, out);

    return floats > split ? floats : split;
}

uint64_t tve_model_least(const tve_model *m, enum tve_pass pass, size_t n,
                         unsigned n_threads)
{
    const struct tve_spec *const s = &m->spec;
    const struct tve_param *const head = &m->globals[TVE_HEAD];
    const size_t head_rows = tve_tile_rows(head->w.cols, head->w.rows);
    uint64_t rows = group_rows(n);
    uint64_t worker = tve_attention_floats(n), shared = 0;

    for (size_t i = 0; i < s->n_layers * TVE_SLOTS; i++) {
        const struct tve_param *const p = &m->layers[i];
        if (p->w.t && p->w.t->rank == 2 && tile_floats(m, p) > worker)
            worker = tile_floats(m, p);
    }
    if (pass == TVE_PASS_LOGITS) {
        rows = logits_rows(s->vocab, n);
        shared = rows * s->vocab;
    } else if (pass == TVE_PASS_SCORES) {
        const uint64_t n_tiles = (head->w.rows + head_rows - 1) / head_rows;
        shared = rows * n_tiles * (sizeof(struct partial) / sizeof(float));
    }
    if (pass != TVE_PASS_STATISTICS &&
        tile_floats(m, head) + head_rows * rows > worker)
        worker = tile_floats(m, head) + head_rows * rows;
    for (int r = 0; r < 2; r++)
        shared += 2 * (uint64_t)n * tve_rope_half(&s->rope[r]);
    return (n_threads * worker + shared) * sizeof(float) + tve_split_least(m);
}

/* ---- batches ------------------------------------------------------------- */

/* What batch_fill allocates. */
static void batch_empty(struct batch *b)
{
    tv_free(b->starts);
    tv_free(b->position);
    tv_free(b->ids);
    tv_free(b->groups);
    b->starts = NULL;
    b->position = NULL;
    b->ids = NULL;
    b->groups = NULL;
    for (int r = 0; r < 2; r++) {
        tv_free(b->cos_rows[r]);
        tv_free(b->sin_rows[r]);
        b->cos_rows[r] = NULL;
        b->sin_rows[r] = NULL;
    }
    tv_free(b->slopes);
    b->slopes = NULL;
    b->rows = b->n_windows = b->n_groups = b->longest = 0;
}

static void batch_close(struct batch *b)
{
    batch_empty(b);
    if (b->mapped)
        unmap_scratch(b->m, b->memory, b->memory_bytes);
    else
        tv_free(b->memory);
}

/* Windows of the group that begins at `from`. */
static size_t group_windows(const struct tve_window *w, size_t from, size_t n)
{
    size_t rows = w[from].n, i = from + 1;

    while (i < n && w[i].n == w[from].n && rows + w[i].n <= GROUP_ROWS)
        rows += w[i++].n;
    return i - from;
}

static bool depends_on_length(const struct tve_spec *s)
{
    for (int r = 0; r < 2; r++)
        if (s->rope[r].dims > 0 && (s->rope[r].type == TVE_ROPE_DYNAMIC ||
                                    s->rope[r].type == TVE_ROPE_LONG))
            return true;
    return false;
}

/* Puts as many groups of w into b as `most` rows allow, at least one. */
static enum tv_err batch_fill(struct batch *b, const struct tve_window *w,
                              size_t n_windows, uint64_t most,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const bool same_length = depends_on_length(b->spec);

    b->windows = w;
    b->groups = tv_calloc(n_windows, sizeof(*b->groups));
    if (!b->groups)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    while (b->n_windows < n_windows) {
        const size_t n = group_windows(w, b->n_windows, n_windows);
        const size_t rows = n * w[b->n_windows].n;

        if (b->n_groups > 0 &&
            (b->rows + rows > BATCH_ROWS || b->rows + rows > most ||
             (same_length && w[b->n_windows].n != w[0].n)))
            break;
        b->groups[b->n_groups++] = (struct tve_group){b->rows, rows};
        b->rows += rows;
        b->n_windows += n;
    }
    b->starts = tv_calloc(b->n_windows + 1, sizeof(*b->starts));
    b->position = tv_calloc(b->rows, sizeof(*b->position));
    b->ids = tv_calloc(b->rows, sizeof(*b->ids));
    if (!b->starts || !b->position || !b->ids)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t i = 0; i < b->n_windows; i++) {
        const size_t at = b->starts[i];

        b->starts[i + 1] = at + w[i].n;
        b->longest = w[i].n > b->longest ? w[i].n : b->longest;
        memcpy(b->ids + at, w[i].ids, w[i].n * sizeof(*b->ids));
        for (size_t k = 0; k < w[i].n; k++)
            b->position[at + k] = (uint32_t)k;
    }
    TV_TRY(make_rotations(b, err));
    TV_TRY(make_slopes(b, err));
out:
    return rc;
}

/* A batch on the device, smaller when it has less memory than it is allowed to
 * have. BUDGET: not even a group fits. */
static enum tv_err batch_there(struct batch *b, const struct tve_window *w,
                               size_t n_windows, size_t floats, bool walk,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    size_t longest = 0, most = 0, rows = 0;

    for (size_t i = 0; i < n_windows; i++) {
        longest = w[i].n > longest ? w[i].n : longest;
        rows += w[i].n;
    }
    const size_t least = longest > GROUP_ROWS ? longest : GROUP_ROWS;
    const size_t group = rows < least ? rows : least;
    TV_TRY(tve_there_fits(b->m, floats, group_windows(w, 0, n_windows) * w[0].n,
                          w[0].n, walk, err));
    TV_TRY(tve_there_rows(b->m, floats, longest, group, walk, &most, err));
    do {
        batch_empty(b);
        TV_TRY(batch_fill(b, w, n_windows, most, err));
        const struct tve_there_start start = {
            .rows = b->rows,
            .floats = floats,
            .longest = b->longest,
            .group = group,
            .position = b->position,
            .cos_rows = {b->cos_rows[0], b->cos_rows[1]},
            .sin_rows = {b->sin_rows[0], b->sin_rows[1]},
            .slopes = b->slopes,
        };
        rc = tve_there_open(b->m, &start, &b->there, err);
        most = b->rows / 2;
    } while (rc == TV_E_BUDGET && b->n_groups > 1);
    if (rc == TV_OK)
        b->is_there = true;
out:
    return rc;
}

/* Where a batch may be. */
enum place {
    ANYWHERE, /* on the device, else here */
    EMBEDDED, /* here, for the embedding alone: h and what x it takes */
    THERE     /* with a device, nowhere else */
};

/* Of a row of x that the embedding takes. */
static size_t embedding_floats(const struct tve_spec *s,
                               const struct tve_param *globals)
{
    const size_t wide = s->hidden > s->embed_dim ? s->hidden : s->embed_dim;

    return globals[TVE_PROJECT_IN].w.t ? wide : 0;
}

/* Fills b with as many groups of w as the budget allows, at least one. With h
 * (of w) that is the residual stream of a batch that is here; else it has its
 * own. */
static enum tv_err batch_open(tve_model *m, const struct tve_window *w,
                              size_t n_windows, uint64_t budget, float *h,
                              enum place place, struct batch *b,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_spec *const s = &m->spec;
    struct tv_error why = {.code = TV_OK};
    size_t floats = 0, bytes = 0;

    memset(b, 0, sizeof(*b));
    b->m = m;
    b->spec = s;
    floats = row_floats(s, b);
    if (place == THERE ? m->device != NULL
                       : place == ANYWHERE && tve_there_wanted(m)) {
        /* who looks at inputs needs some of the device too */
        rc = batch_there(b, w, n_windows, floats, place == THERE, &why);
        if (rc == TV_OK) {
            b->h = b->there.memory;
            goto lay_out;
        }
        if (rc != TV_E_BUDGET || place == THERE) {
            if (err)
                *err = why;
            goto out;
        }
        batch_empty(b);
        tve_there_give_up(m, &why);
    }
    floats -= h ? s->hidden : 0;
    if (place == EMBEDDED)
        floats = embedding_floats(s, m->globals);
    if (!tv_mul_size(floats, sizeof(float), &bytes)) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(batch_fill(b, w, n_windows, bytes ? budget / bytes : SIZE_MAX, err));
    if (!tv_mul_size(b->rows, bytes, &b->memory_bytes)) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (b->memory_bytes > budget) {
        TV_TRY(map_scratch(m, b->memory_bytes, &b->memory, err));
        b->mapped = true;
    } else {
        b->memory = tv_alloc_aligned(b->memory_bytes ? b->memory_bytes : 1);
        if (!b->memory) {
            rc = tv_error_set(err, TV_E_NOMEM,
                              "out of memory (%zu bytes of activations)",
                              b->memory_bytes);
            goto out;
        }
    }
    b->h = h ? h : b->memory;
lay_out:
    b->x = h && !b->is_there ? b->memory : b->h + b->rows * s->hidden;
    if (place == EMBEDDED)
        goto out;
    b->y = b->x + b->rows * b->wide;
    b->s = b->y + b->rows * b->wide;
out:
    return rc;
}

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

typedef enum tv_err (*batch_fn)(struct batch *b, void *arg,
                                struct tv_error *err);

/* Everything up to the output head, batch by batch. */
static enum tv_err run_batches(tve_model *m, const struct tve_window *w,
                               size_t n, const struct tve_progress *progress,
                               batch_fn fn, void *arg, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tally t = {progress, 0, 0, m->spec.n_layers + 1};
    struct batch b = {.m = NULL};
    size_t at = 0;

    TV_TRY(tve_check_windows(m, w, n, err));
    for (size_t i = 0; i < n; i++)
        t.total += w[i].n * t.steps;
    while (at < n) {
        TV_TRY(batch_open(m, w + at, n - at, activation_budget(m), NULL,
                          ANYWHERE, &b, err));
        TV_TRY(embed(&b, err));
        for (b.layer = 0; b.layer < m->spec.n_layers; b.layer++) {
            TV_TRY(layer(&b, err));
            if (b.is_there)
                TV_TRY(tve_there_sync(m, err));
            TV_TRY(step(&t, b.rows, err));
        }
        TV_TRY(fn(&b, arg, err));
        TV_TRY(step(&t, b.rows, err));
        at += b.n_windows;
        batch_close(&b);
        memset(&b, 0, sizeof(b));
    }
out:
    batch_close(&b);
    return rc;
}

/* ---- walks --------------------------------------------------------------- */

struct tve_walk {
    tve_model *m;
    const struct tve_window *windows;
    size_t n_windows, rows;
    float *h; /* [rows, hidden] */
    size_t h_bytes;
    bool mapped, pinned;
    uint64_t budget; /* of a batch */
    size_t layer;    /* the next one */
};

void tve_walk_close(struct tve_walk *k)
{
    if (!k)
        return;
    if (k->mapped)
        unmap_scratch(k->m, k->h, k->h_bytes);
    else if (k->pinned)
        tve_there_unpin(k->m, k->h);
    else
        tv_free(k->h);
    tv_free(k);
}

/* Runs the embedding (tap NULL) or a layer over all windows. `keep`: h stays
 * what it was, outputs go nowhere. */
static enum tv_err walk_batches(struct tve_walk *k, bool embedding, bool keep,
                                const struct tve_tap *tap,
                                const struct tve_walk_progress *progress,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct batch b = {.m = NULL};
    const size_t hidden = k->m->spec.hidden;

    for (size_t at = 0, row = 0; at < k->n_windows;) {
        float *const h = k->h + row * hidden;

        TV_TRY(batch_open(k->m, k->windows + at, k->n_windows - at, k->budget,
                          keep ? NULL : h, embedding ? EMBEDDED : THERE, &b,
                          err));
        if (b.is_there)
            TV_TRY(tve_there_put(k->m, b.h, h, b.rows * hidden, err));
        else if (keep)
            memcpy(b.h, h, b.rows * hidden * sizeof(*h));
        b.layer = k->layer;
        b.tap = tap;
        TV_TRY(embedding ? embed(&b, err) : layer(&b, err));
        if (b.is_there && !keep)
            TV_TRY(tve_there_get(k->m, h, b.h, b.rows * hidden, err));
        at += b.n_windows;
        row += b.rows;
        if (progress)
            TV_TRY(progress->step(progress->arg, b.rows, err));
        batch_close(&b);
        memset(&b, 0, sizeof(b));
    }
out:
    batch_close(&b);
    return rc;
}

/* Bytes of a row that a walk's batches have here, beside the streams; with a
 * device it is the embedding's alone. */
static uint64_t walk_row(const tve_model *m, bool look)
{
    struct batch b = {.m = NULL};
    const size_t floats =
        m->device ? embedding_floats(&m->spec, m->globals)
                  : row_floats(&m->spec, &b) - (look ? 0 : m->spec.hidden);

    return (uint64_t)floats * sizeof(float);
}

/* As tve_walk_open and batch_open will do it: several groups side by side only
 * within the budget, so that one alone may be too large. */
enum tv_err tve_walk_admit(tve_model *m, const struct tve_window *w, size_t n,
                           uint64_t reserve, struct tv_error *err)
{
    const uint64_t all = activation_budget(m);
    const size_t hidden = m->spec.hidden;
    const uint64_t row = walk_row(m, false);
    uint64_t budget = all > reserve ? all - reserve : 0;
    uint64_t h = 0, most = 0;

    for (size_t i = 0; i < n; i++)
        h += (uint64_t)w[i].n * hidden * sizeof(float);
    if (h <= budget / 2) {
        budget -= h;
        h = 0;
    }
    for (size_t i = 0; i < n;) {
        const size_t windows = group_windows(w, i, n);
        const uint64_t bytes = (uint64_t)windows * w[i].n * row;
        most = bytes > budget && bytes > most ? bytes : most;
        i += windows;
    }
    return charge(m, most + h, err);
}

enum tv_err tve_walk_fits(const tve_model *m, size_t n, size_t context,
                          struct tv_error *err)
{
    struct batch b = {.m = NULL};
    const size_t together = context < GROUP_ROWS ? GROUP_ROWS / context : 1;

    return tve_there_fits(m, row_floats(&m->spec, &b),
                          (n < together ? n : together) * context, context,
                          true, err);
}

static uint64_t whole_pages(uint64_t bytes)
{
    return (bytes + 4095) & ~UINT64_C(4095);
}

void tve_walk_scratch(const tve_model *m, size_t n, size_t context,
                      uint64_t reserve, uint64_t most, bool look,
                      struct tve_scratch *out)
{
    const uint64_t all = activation_budget(m);
    const uint64_t budget = all > reserve ? all - reserve : 0;
    const size_t hidden = m->spec.hidden;
    const uint64_t row = walk_row(m, look);
    const uint64_t together = context < GROUP_ROWS ? GROUP_ROWS / context : 1;
    const uint64_t group = (n < together ? n : together) * context * row;
    uint64_t h = 0;

    if (!tv_mul_u64((uint64_t)context * hidden * sizeof(float), n, &h))
        h = UINT64_MAX / 4; /* more than there is of anything */
    /* Half of the rest at most is for streams in memory, with more memory
     * too; longer ones than `most` never are there. */
    const uint64_t rest =
        h > most ? budget : budget - (h < budget / 2 ? h : budget / 2);
    out->streams = h > budget / 2 || h > most ? whole_pages(h) : 0;
    out->batch = group > rest ? whole_pages(group) : 0;
    /* As many whole groups as there is room for. */
    const uint64_t rows = n < BATCH_ROWS / context ? n * context : BATCH_ROWS;
    const uint64_t batch = row == 0 || rows < rest / row ? rows * row : rest;
    const uint64_t workers =
        m->device ? tve_device_host_bytes(m) : m->memory_bytes - all;
    out->heap = reserve < all ? reserve : all;
    out->heap += workers + (group > rest ? 0 : batch > group ? batch : group);
    out->heap += out->streams > 0 ? 0 : h;
}

enum tv_err tve_walk_open(tve_model *m, const struct tve_window *w, size_t n,
                          uint64_t reserve, uint64_t most, struct tv_error *err,
                          struct tve_walk **out)
{
    enum tv_err rc = TV_OK;
    struct tve_walk *const k = tv_calloc(1, sizeof(*k));
    const uint64_t all = activation_budget(m);
    size_t row_bytes = 0;

    *out = NULL;
    if (!k)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    k->m = m;
    k->windows = w;
    k->n_windows = n;
    k->budget = all > reserve ? all - reserve : 0;
    TV_TRY(tve_check_windows(m, w, n, err));
    for (size_t i = 0; i < n; i++)
        k->rows += w[i].n;
    if (!tv_mul_size(m->spec.hidden, sizeof(*k->h), &row_bytes) ||
        !tv_mul_size(k->rows, row_bytes, &k->h_bytes)) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (k->h_bytes > k->budget / 2 || k->h_bytes > most) {
        TV_TRY(map_scratch(m, k->h_bytes, &k->h, err));
        k->mapped = true;
    } else {
        /* pinned, copies to and from a device take a fraction of the time */
        k->pinned = m->device && tve_there_pin(m, k->h_bytes, &k->h);
        if (!k->pinned)
            k->h = tv_alloc_aligned(k->h_bytes ? k->h_bytes : 1);
        if (!k->h) {
            rc = tv_error_set(err, TV_E_NOMEM,
                              "out of memory (%zu bytes of activations)",
                              k->h_bytes);
            goto out;
        }
        k->budget -= k->h_bytes;
    }
    TV_TRY(walk_batches(k, true, false, NULL, NULL, err));
    *out = k;
out:
    if (rc != TV_OK)
        tve_walk_close(k);
    return rc;
}

enum tv_err tve_walk_look(struct tve_walk *k, const struct tve_tap *tap,
                          struct tv_error *err)
{
    return walk_batches(k, false, true, tap, NULL, err);
}

enum tv_err tve_walk_layer(struct tve_walk *k, const struct tve_tap *tap,
                           const struct tve_walk_progress *progress,
                           struct tv_error *err)
{
    const enum tv_err rc = walk_batches(k, false, false, tap, progress, err);

    if (rc == TV_OK)
        k->layer++;
    return rc;
}

/* ---- scores -------------------------------------------------------------- */

struct scores {
    const struct batch *b;
    size_t vocab, n_tiles, rows; /* rows that are scored, in this group */
    struct partial *parts;       /* [rows, n_tiles] */
    int32_t *targets;            /* [rows] */
    float *target_logits;        /* [rows] */
    double *nll;                 /* where the next batch's go */
};

static void score_tile(void *arg, const struct tve_head_tile *t)
{
    const struct scores *const s = arg;
    const size_t left = s->vocab > t->out0 ? s->vocab - t->out0 : 0;
    const size_t n = left < t->n_out ? left : t->n_out;

    for (size_t i = 0; i < t->n; i++) {
        /* the tile belongs to this worker until it returns */
        float *const row = (float *)(uintptr_t)t->logits + i * t->n_out;
        const size_t r = t->row0 + i;
        const size_t target = (size_t)s->targets[r];
        struct partial *const p = &s->parts[r * s->n_tiles + t->tile];

        if (target >= t->out0 && target < t->out0 + n)
            s->target_logits[r] = row[target - t->out0];
        p->max = s->b->m->rows->max_row(row, n);
        p->sum = s->b->m->rows->exp_row(row, n, p->max);
    }
}

static double row_nll(const struct scores *s, size_t row)
{
    const struct partial *const p = &s->parts[row * s->n_tiles];
    float max = p[0].max;
    double sum = 0;

    for (size_t t = 1; t < s->n_tiles; t++)
        max = p[t].max > max ? p[t].max : max;
    for (size_t t = 0; t < s->n_tiles; t++)
        sum += p[t].sum * exp((double)p[t].max - (double)max);
    return (double)max + log(sum) - (double)s->target_logits[row];
}

/* Rows of x that predict scored ids, moved together in place, per group. */
static enum tv_err score_batch(struct batch *b, void *arg, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct scores *const s = arg;
    const struct tve_param *const head = &b->m->globals[TVE_HEAD];
    const float *from = NULL;
    float *x = NULL;
    size_t ld = 0, w = 0;
    const size_t tile_rows = tve_tile_rows(head->w.cols, head->w.rows);

    s->b = b;
    s->vocab = b->spec->vocab;
    /* tiles behind the vocabulary (spare rows) are never looked at */
    s->n_tiles = (head->w.rows + tile_rows - 1) / tile_rows;
    TV_TRY(finish(b, &from, &ld, err));
    if (b->is_there) {
        const struct tve_scored there = {
            .x = from,
            .room = from == b->y ? b->x : b->y,
            .ld = ld,
            .windows = b->windows,
            .starts = b->starts,
            .n_windows = b->n_windows,
            .groups = b->groups,
            .n_groups = b->n_groups,
        };
        TV_TRY(tve_there_score(b->m, &b->there, &there, s->nll, err));
        for (size_t i = 0; i < b->n_windows; i++)
            s->nll += b->windows[i].n > b->windows[i].score_from
                          ? b->windows[i].n - b->windows[i].score_from
                          : 0;
        goto out;
    }
    x = (float *)(uintptr_t)from;
    for (size_t g = 0; g < b->n_groups; g++) {
        const struct tve_group *const group = &b->groups[g];
        struct tve_group scored = {group->start, 0};
        const size_t first = w;

        for (; w < b->n_windows && b->starts[w] < group->start + group->n;
             w++) {
            const struct tve_window *const win = &b->windows[w];
            for (size_t k = win->score_from; k < win->n; k++)
                memmove(x + (scored.start + scored.n++) * ld,
                        x + (b->starts[w] + k - 1) * ld, ld * sizeof(*x));
        }
        if (scored.n == 0)
            continue;
        tv_free(s->parts);
        tv_free(s->targets);
        tv_free(s->target_logits);
        s->parts = tv_calloc(scored.n * s->n_tiles, sizeof(*s->parts));
        s->targets = tv_calloc(scored.n, sizeof(*s->targets));
        s->target_logits = tv_calloc(scored.n, sizeof(*s->target_logits));
        if (!s->parts || !s->targets || !s->target_logits) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
            goto out;
        }
        s->rows = 0;
        for (size_t i = first; i < w; i++)
            for (size_t k = b->windows[i].score_from; k < b->windows[i].n; k++)
                s->targets[s->rows++] = b->windows[i].ids[k];
        const struct tve_group all = {0, scored.n};
        TV_TRY(tve_head_run(b->m, head, x + scored.start * ld, ld, &all, 1,
                            score_tile, s, err));
        for (size_t i = 0; i < s->rows; i++)
            *s->nll++ = row_nll(s, i);
    }
out:
    return rc;
}

enum tv_err tve_score(tve_model *m, const struct tve_window *w,
                      size_t n_windows, const struct tve_progress *progress,
                      double *nll, struct tv_error *err)
{
    struct scores s = {.nll = nll};
    const enum tv_err rc =
        run_batches(m, w, n_windows, progress, score_batch, &s, err);

    tv_free(s.parts);
    tv_free(s.targets);
    tv_free(s.target_logits);
    return rc;
}

/* ---- logits -------------------------------------------------------------- */

struct logits {
    tve_logits_fn sink;
    void *arg;
    size_t at, vocab;
    float *rows; /* [chunk, vocab] */
    size_t chunk;
};

static void logits_tile(void *arg, const struct tve_head_tile *t)
{
    const struct logits *const l = arg;
    const size_t left = l->vocab > t->out0 ? l->vocab - t->out0 : 0;
    const size_t n = left < t->n_out ? left : t->n_out;

    for (size_t i = 0; i < t->n && n > 0; i++)
        memcpy(l->rows + (t->row0 + i) * l->vocab + t->out0,
               t->logits + i * t->n_out, n * sizeof(float));
}

static enum tv_err logits_batch(struct batch *b, void *arg,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct logits *const l = arg;
    const float *x = NULL;
    float *host = NULL; /* rows of x that came back from the device */
    size_t ld = 0;

    TV_TRY(finish(b, &x, &ld, err));
    if (b->is_there) {
        host = tv_alloc_aligned(l->chunk * ld * sizeof(*host));
        if (!host) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
            goto out;
        }
    }
    /* Chunks begin at windows, so that batches do not show in them. */
    for (size_t w = 0; w < b->n_windows; w++) {
        for (size_t k = 0; k < b->windows[w].n; k += l->chunk) {
            const size_t left = b->windows[w].n - k;
            const struct tve_group g = {0, left < l->chunk ? left : l->chunk};
            const float *const rows = x + (b->starts[w] + k) * ld;

            if (host)
                TV_TRY(tve_there_get(b->m, host, rows, g.n * ld, err));
            TV_TRY(tve_head_run(b->m, &b->m->globals[TVE_HEAD],
                                host ? host : rows, ld, &g, 1, logits_tile, l,
                                err));
            TV_TRY(l->sink(l->arg, l->at, g.n, l->rows, err));
            l->at += g.n;
        }
    }
out:
    tv_free(host);
    return rc;
}

enum tv_err tve_logits(tve_model *m, const int32_t *ids, size_t batch,
                       size_t seq, const struct tve_progress *progress,
                       tve_logits_fn sink, void *arg, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_window *const w = tv_calloc(batch ? batch : 1, sizeof(*w));
    struct logits l = {.sink = sink, .arg = arg, .vocab = m->spec.vocab};

    l.chunk = logits_rows(l.vocab, seq);
    l.rows = tv_alloc_aligned(l.chunk * l.vocab * sizeof(float));
    if (!w || !l.rows) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < batch; i++)
        w[i] = (struct tve_window){ids + i * seq, seq, 1};
    rc = run_batches(m, w, batch, progress, logits_batch, &l, err);
out:
    tv_free(l.rows);
    tv_free(w);
    return rc;
}
