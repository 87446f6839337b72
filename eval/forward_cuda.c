/* SPDX-License-Identifier: Apache-2.0 */
/*
 * forward_cuda.c - the steps of forward.c on a CUDA device, where a batch's
 * activations stay from the embedding to the losses: ids, weights and tables of
 * rotations go in, losses come out. Products are linear_cuda.c's.
 *
 *   device   tiles of weights | norms, biases | batch: h x y s, positions,
 *            (linear_cuda.c)    (kept)          rotations, scores, losses
 *
 * The batch gets what the budget leaves beside the rest; with fewer rows there
 * are more batches, and no result depends on that.
 */
#include <math.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/cuda_eval.h"

#include "linear_parts.h"

#define ALIGN   256u
#define ROWS_AT 16u
#define PIECE   2048u /* rows of one product of linear_cuda.c */

static size_t aligned(size_t bytes)
{
    return (bytes + ALIGN - 1) / ALIGN * ALIGN;
}

static tvk_cuda_stream *stream_of(const tve_model *m)
{
    return tvk_cuda_math_stream(m->device->math);
}

/* ---- memory -------------------------------------------------------------- */

/* Of a batch whose groups have up to so many rows, but for its own rows. */
static size_t shared_bytes(const tve_model *m, size_t longest, size_t rows)
{
    size_t bytes =
        aligned(tvk_cuda_attention_bytes(longest, rows, m->spec.n_heads)) +
        aligned(m->spec.n_heads * sizeof(float));

    for (int r = 0; r < 2; r++)
        bytes += 2 * aligned(longest * tve_rope_half(&m->spec.rope[r]) *
                             sizeof(float));
    return bytes;
}

/* Of a row: activations, position, index, target, loss. */
static size_t row_bytes(size_t floats)
{
    return floats * sizeof(float) + 3 * sizeof(uint32_t) +
           sizeof(struct tvk_cuda_loss);
}

/* Norms and biases. */
static uint64_t all_small_bytes(const tve_model *m)
{
    uint64_t bytes = 0;

    for (size_t i = 0; i < m->spec.n_layers * TVE_SLOTS; i++) {
        const struct tve_param *const p = &m->layers[i];
        if (p->w.t && p->w.t->rank < 2)
            bytes += p->w.t->n_elems * sizeof(float);
        if (p->b.t)
            bytes += p->b.t->n_elems * sizeof(float);
    }
    for (int i = 0; i < TVE_GLOBALS; i++) {
        const struct tve_param *const p = &m->globals[i];
        if (p->w.t && p->w.t->rank < 2)
            bytes += p->w.t->n_elems * sizeof(float);
        if (p->b.t)
            bytes += p->b.t->n_elems * sizeof(float);
    }
    return bytes;
}

/* Those that are not there yet. */
static uint64_t small_bytes(const tve_model *m)
{
    uint64_t bytes = all_small_bytes(m);

    for (size_t i = 0; i < m->device->n_kept; i++)
        bytes -= m->device->kept[i].piece.bytes;
    return bytes;
}

bool tve_there_wanted(const tve_model *m)
{
    return m->device && !m->device->host_only;
}

void tve_there_give_up(tve_model *m, const struct tv_error *why)
{
    tve_device_shrink(m->device);
    m->device->host_only = true;
    m->device->why = *why;
}

const char *tve_model_not_there(const tve_model *m)
{
    return m->device && m->device->host_only ? m->device->why.msg : NULL;
}

/* What there is, and what this model holds of it. */
static uint64_t there_is(const struct tve_device *d)
{
    uint64_t bytes = tvk_cuda_left(d->cuda) + 2 * d->weights.bytes +
                     2 * d->outputs.bytes + d->raw[0].bytes + d->raw[1].bytes +
                     d->logits.bytes + d->batch.bytes + d->work.bytes +
                     tve_device_resident_bytes(d);

    for (size_t i = 0; i < d->n_kept; i++)
        bytes += d->kept[i].piece.bytes;
    return bytes;
}

enum tv_err tve_there_fits(const tve_model *m, size_t floats, size_t rows,
                           size_t longest, bool walk, struct tv_error *err)
{
    uint64_t needed = 0, left = 0;

    if (!m->device)
        return TV_OK;
    needed = tve_device_buffer_bytes(m, !walk) + all_small_bytes(m) +
             shared_bytes(m, longest, rows) + 16 * ALIGN +
             rows * row_bytes(floats) + (walk ? m->device->look_bytes : 0);
    left = there_is(m->device);
    if (needed <= left)
        return TV_OK;
    return tv_error_set(err, TV_E_BUDGET,
                        "windows of %zu tokens need %llu bytes of device "
                        "memory, %llu are there (--device-memory)",
                        longest, (unsigned long long)needed,
                        (unsigned long long)left);
}

/* Every allocation may be rounded up. */
static uint64_t weights_slack(const tve_model *m)
{
    return (m->spec.n_layers * TVE_SLOTS + TVE_GLOBALS) * (uint64_t)ALIGN;
}

enum tv_err tve_there_rows(tve_model *m, size_t floats, size_t longest,
                           size_t group, bool walk, size_t *out,
                           struct tv_error *err)
{
    struct tve_device *const d = m->device;
    const size_t shared = shared_bytes(m, longest, group) + 16 * ALIGN;
    const enum tv_err rc = tve_device_buffers(d, m, !walk, err);
    const size_t wide =
        m->spec.hidden > m->spec.embed_dim ? m->spec.hidden : m->spec.embed_dim;
    uint64_t left = 0, others = 0;

    if (rc != TV_OK)
        return rc;
    left = tvk_cuda_left(d->cuda) + d->batch.bytes;
    others = small_bytes(m);
    /* Logits that are wanted themselves are made by tve_head_run. */
    if (!walk)
        others += (d->outputs.bytes ? 0 : 2 * d->logits.bytes) +
                  PIECE * wide * sizeof(float);
    left = left > others ? left - others : 0;
    if (walk) { /* who looks at inputs needs the other half */
        left /= 2;
    } else { /* weights stay where batches lose less than half by it */
        const uint64_t all = tve_device_weight_bytes(m) + weights_slack(m);
        const uint64_t there = tve_device_resident_bytes(d);
        const uint64_t more = all > there ? all - there : 0;

        d->keeps = there > 0 || more <= left / 2;
        if (d->keeps)
            left = left > more ? left - more : 0;
    }
    *out = left > shared ? (size_t)((left - shared) / row_bytes(floats)) : 0;
    return TV_OK;
}

static tvk_cuda_ptr part(tvk_cuda_ptr *at, size_t bytes)
{
    const tvk_cuda_ptr p = *at;

    *at += aligned(bytes);
    return p;
}

enum tv_err tve_there_open(tve_model *m, const struct tve_there_start *s,
                           struct tve_batch_there *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_device *const d = m->device;
    tvk_cuda_stream *const copies = tvk_cuda_math_copies(d->math);
    const size_t bytes = shared_bytes(m, s->longest, s->group) + 16 * ALIGN +
                         s->rows * row_bytes(s->floats);
    tvk_cuda_ptr at = 0;

    TV_TRY(tve_there_sync(m, err)); /* nobody uses the batch before */
    TV_TRY(tve_piece_need(d, &d->batch, bytes, "activations of a batch", err));
    at = d->batch.at;
    out->memory =
        (float *)(uintptr_t)part(&at, s->rows * s->floats * sizeof(float));
    out->losses = part(&at, s->rows * sizeof(struct tvk_cuda_loss));
    out->position = part(&at, s->rows * sizeof(uint32_t));
    out->index = part(&at, s->rows * sizeof(uint32_t));
    out->targets = part(&at, s->rows * sizeof(uint32_t));
    out->work = part(
        &at, tvk_cuda_attention_bytes(s->longest, s->group, m->spec.n_heads));
    out->slopes = 0;
    TV_TRY(tvk_cuda_upload(copies, out->position, s->position,
                           s->rows * sizeof(uint32_t), err));
    for (int r = 0; r < 2; r++) {
        const size_t n =
            s->longest * tve_rope_half(&m->spec.rope[r]) * sizeof(float);

        out->cosine[r] = part(&at, n);
        out->sine[r] = part(&at, n);
        if (!s->cos_rows[r])
            continue;
        TV_TRY(tvk_cuda_upload(copies, out->cosine[r], s->cos_rows[r], n, err));
        TV_TRY(tvk_cuda_upload(copies, out->sine[r], s->sin_rows[r], n, err));
    }
    if (s->slopes) {
        const size_t n = m->spec.n_heads * sizeof(float);

        out->slopes = part(&at, n);
        TV_TRY(tvk_cuda_upload(copies, out->slopes, s->slopes, n, err));
    }
    TV_TRY(tvk_cuda_sync(copies, err));
out:
    return rc;
}

bool tve_there_pin(tve_model *m, size_t bytes, float **out)
{
    void *p = NULL;

    if (tvk_cuda_pin(m->device->cuda, bytes, NULL, &p) != TV_OK)
        return false;
    *out = p;
    return true;
}

void tve_there_unpin(tve_model *m, float *p)
{
    tvk_cuda_math_settle(m->device->math);
    tvk_cuda_unpin(m->device->cuda, p);
}

enum tv_err tve_there_put(tve_model *m, float *to, const float *from,
                          size_t floats, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    TV_TRY(tvk_cuda_upload(stream_of(m), tve_there(to), from,
                           floats * sizeof(float), err));
    TV_TRY(tve_there_sync(m, err));
out:
    return rc;
}

enum tv_err tve_there_get(tve_model *m, float *to, const float *from,
                          size_t floats, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    TV_TRY(tvk_cuda_download(stream_of(m), to, tve_there(from),
                             floats * sizeof(float), err));
    TV_TRY(tve_there_sync(m, err));
out:
    return rc;
}

void tve_there_look(tve_model *m, uint64_t bytes)
{
    if (m->device)
        m->device->look_bytes = bytes;
}

enum tv_err tve_there_work(tve_model *m, size_t bytes, tvk_cuda_ptr *out,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_device *const d = m->device;

    if (bytes > d->work.bytes) {
        TV_TRY(tve_there_sync(m, err));
        TV_TRY(tve_piece_need(d, &d->work, bytes, "a product of inputs", err));
    }
    *out = d->work.at;
out:
    return rc;
}

enum tv_err tve_there_sync(tve_model *m, struct tv_error *err)
{
    return tvk_cuda_sync(stream_of(m), err);
}

/* ---- embeddings ---------------------------------------------------------- */

struct lookup {
    const struct tve_rows *table;
    const struct tve_spec *spec;
    const int32_t *ids; /* NULL: rows from `first` on */
    uint64_t first;
    size_t rows, width;
    float *to; /* pinned [rows, width] */
};

static void look_up(void *arg, size_t item, unsigned worker)
{
    const struct lookup *const l = arg;
    const float scale = l->spec->embed_scale;

    for (size_t r = item * ROWS_AT; r < l->rows && r < (item + 1) * ROWS_AT;
         r++) {
        const uint64_t row = l->ids ? (uint64_t)l->ids[r] : l->first + r;
        float *const to = l->to + r * l->width;

        tve_rows_read(l->table, worker, row * l->width, l->width, to);
        if (l->ids && scale != 1.0f)
            for (size_t i = 0; i < l->width; i++)
                to[i] *= scale;
    }
}

/* Rows of a table to `to` [rows, width] on the device: read into one pinned
 * buffer while the other one travels. */
static enum tv_err bring_rows(tve_model *m, const struct tve_weight *w,
                              const int32_t *ids, uint64_t first, size_t rows,
                              size_t width, float *to, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_device *const d = m->device;
    tvk_cuda_stream *const copies = tvk_cuda_math_copies(d->math);
    const size_t most = d->weights.bytes / (width * sizeof(float));
    struct tve_rows table = {.m = NULL};

    if (most == 0)
        return tv_error_set(err, TV_E_BUDGET,
                            "a row of an embedding is more than a tile");
    TV_TRY(tve_rows_open(&table, m, w, err));
    TV_TRY(tve_there_sync(m, err)); /* the buffers are nobody's */
    for (size_t at = 0; at < rows; at += most, d->n_tiles++) {
        struct lookup l = {&table,
                           &m->spec,
                           ids ? ids + at : NULL,
                           first + at,
                           rows - at < most ? rows - at : most,
                           width,
                           d->weights.host[d->n_tiles % 2]};

        tv_pool_run(m->pool, (l.rows + ROWS_AT - 1) / ROWS_AT, look_up, &l);
        TV_TRY(tvk_cuda_sync(copies, err)); /* the other one has arrived */
        TV_TRY(tvk_cuda_upload(copies, tve_there(to + at * width), l.to,
                               l.rows * width * sizeof(float), err));
    }
    TV_TRY(tvk_cuda_sync(copies, err));
out:
    if (rc != TV_OK)
        tvk_cuda_math_settle(d->math);
    tve_rows_close(&table);
    return rc;
}

enum tv_err tve_there_embed(tve_model *m, const struct tve_batch_there *b,
                            const int32_t *ids, size_t rows, float *to,
                            struct tv_error *err)
{
    const struct tve_resident *const table =
        tve_device_table(m->device, m, &m->globals[TVE_EMBED].w, m->spec.vocab);

    if (table) { /* as the output head's weight: only ids travel */
        const struct tvk_cuda_lookup l = {.dst = tve_there(to),
                                          .table = table->piece.at,
                                          .index = b->index,
                                          .type = !table->raw ? TVK_LOOKUP_F32
                                                  : table->dtype == TV_BF16
                                                      ? TVK_LOOKUP_BF16
                                                      : TVK_LOOKUP_F16,
                                          .rows = rows,
                                          .n = m->spec.embed_dim,
                                          .scale = m->spec.embed_scale};
        enum tv_err rc = tvk_cuda_upload(stream_of(m), b->index, ids,
                                         rows * sizeof(*ids), err);

        if (rc == TV_OK)
            rc = tvk_cuda_look_up(m->device->math, &l, err);
        return rc == TV_OK ? tve_there_sync(m, err) : rc;
    }
    return bring_rows(m, &m->globals[TVE_EMBED].w, ids, 0, rows,
                      m->spec.embed_dim, to, err);
}

enum tv_err tve_there_positions(tve_model *m, const struct tve_batch_there *b,
                                float *h, float *room, size_t rows,
                                size_t longest, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t hidden = m->spec.hidden;
    const struct tvk_cuda_rows add = {.dst = tve_there(h),
                                      .src = tve_there(room),
                                      .rows = rows,
                                      .n = hidden,
                                      .ld = hidden,
                                      .lds = hidden};

    TV_TRY(bring_rows(m, &m->globals[TVE_POSITION].w, NULL,
                      m->spec.position_offset, longest, hidden, room, err));
    TV_TRY(tvk_cuda_take_rows(m->device->math, &add, b->position, true, err));
out:
    return rc;
}

/* ---- steps --------------------------------------------------------------- */

static enum tvk_cuda_norm_type norm_type(enum tve_norm_type t)
{
    return t == TVE_RMS            ? TVK_NORM_RMS
           : t == TVE_RMS_PLUS_ONE ? TVK_NORM_PLUS_ONE
                                   : TVK_NORM_LAYER;
}

enum tv_err tve_there_norm(tve_model *m, const struct tve_param *p,
                           const float *from, float *to, size_t ld, size_t rows,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvk_cuda_norm n = {.type = norm_type(m->spec.norm),
                              .eps = m->spec.eps,
                              .x = tve_there(from),
                              .dst = tve_there(to),
                              .ldx = ld,
                              .ld = ld,
                              .rows = rows,
                              .parts = 1,
                              .n = m->spec.hidden};

    TV_TRY(tve_device_param(m->device, m, &p->w, &n.w, err));
    TV_TRY(tve_device_param(m->device, m, &p->b, &n.b, err));
    TV_TRY(tvk_cuda_norm_rows(m->device->math, &n, err));
out:
    return rc;
}

static struct tvk_cuda_rows to_h(const tve_model *m, float *h,
                                 const float *from, size_t ld, size_t rows)
{
    const size_t hidden = m->spec.hidden;
    const struct tvk_cuda_rows r = {.dst = tve_there(h),
                                    .src = tve_there(from),
                                    .rows = rows,
                                    .n = hidden,
                                    .ld = hidden,
                                    .lds = ld};
    return r;
}

enum tv_err tve_there_add(tve_model *m, float *h, const float *from, size_t ld,
                          size_t rows, struct tv_error *err)
{
    const struct tvk_cuda_rows r = to_h(m, h, from, ld, rows);
    return tvk_cuda_add_rows(m->device->math, &r, err);
}

enum tv_err tve_there_copy(tve_model *m, float *h, const float *from, size_t ld,
                           size_t rows, struct tv_error *err)
{
    const struct tvk_cuda_rows r = to_h(m, h, from, ld, rows);
    return tvk_cuda_copy_rows(m->device->math, &r, err);
}

enum tv_err tve_there_act(tve_model *m, float *s, size_t ld, size_t rows,
                          struct tv_error *err)
{
    static const enum tvk_cuda_act_type acts[] = {
        [TVE_SILU] = TVK_ACT_SILU,
        [TVE_GELU] = TVK_ACT_GELU,
        [TVE_GELU_TANH] = TVK_ACT_GELU_TANH,
        [TVE_RELU] = TVK_ACT_RELU,
        [TVE_QUICK_GELU] = TVK_ACT_QUICK_GELU,
    };
    const size_t inner = m->spec.inner;

    return tvk_cuda_act_rows(m->device->math, acts[m->spec.act], tve_there(s),
                             m->spec.gated ? tve_there(s + inner) : 0, rows,
                             inner, ld, err);
}

enum tv_err tve_there_heads(tve_model *m, const struct tve_batch_there *b,
                            size_t layer, float *qkv, size_t ld, size_t rows,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_spec *const s = &m->spec;
    const bool per_head = s->qkv == TVE_QKV_HEADS;
    const size_t hd = s->head_dim, step = per_head ? 3 * hd : hd;
    const unsigned rope = s->layers[layer].rope;

    for (int i = 0; i < 2; i++) { /* queries, keys */
        float *const x = qkv + (i == 0 ? 0 : per_head ? hd : s->n_heads * hd);
        const size_t n_heads = i == 0 ? s->n_heads : s->n_kv;
        struct tvk_cuda_norm n = {.type = norm_type(s->norm),
                                  .eps = s->eps,
                                  .x = tve_there(x),
                                  .dst = tve_there(x),
                                  .ldx = ld,
                                  .ld = ld,
                                  .rows = rows,
                                  .parts = n_heads,
                                  .step = step,
                                  .n = hd};
        const struct tvk_cuda_rotate r = {.x = tve_there(x),
                                          .rows = rows,
                                          .ld = ld,
                                          .n_heads = n_heads,
                                          .step = step,
                                          .half = tve_rope_half(&s->rope[rope]),
                                          .position = b->position,
                                          .cosine = b->cosine[rope],
                                          .sine = b->sine[rope]};

        if (s->qk_norm)
            TV_TRY(tve_device_param(
                m->device, m,
                &tve_layer_param(m, layer, i == 0 ? TVE_NQ : TVE_NK)->w, &n.w,
                err));
        if (n.w)
            TV_TRY(tvk_cuda_norm_rows(m->device->math, &n, err));
        if (s->positions == TVE_ROPE)
            TV_TRY(tvk_cuda_rotate_rows(m->device->math, &r, err));
    }
out:
    return rc;
}

enum tv_err tve_there_attention(tve_model *m, const struct tve_batch_there *b,
                                const struct tve_attention *a,
                                const size_t *starts, size_t n_windows,
                                const struct tve_group *groups, size_t n_groups,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    size_t w = 0;

    for (size_t g = 0; g < n_groups; g++) {
        const size_t first = w, row = groups[g].start;

        while (w < n_windows && starts[w] < row + groups[g].n)
            w++;
        const struct tvk_cuda_attention there = {
            .qkv = tve_there(a->qkv + row * a->ld),
            .out = tve_there(a->out + row * a->ld_out),
            .ld = a->ld,
            .ld_out = a->ld_out,
            .n_windows = w - first,
            .length = starts[first + 1] - starts[first],
            .n_heads = a->n_heads,
            .n_kv = a->n_kv,
            .head_dim = a->head_dim,
            .window = a->window,
            .q0 = a->q0,
            .q_step = a->q_step,
            .k0 = a->k0,
            .k_step = a->k_step,
            .v0 = a->v0,
            .v_step = a->v_step,
            .scale = a->scale,
            .cap = a->cap,
            .slopes = b->slopes,
            .work = b->work,
        };
        TV_TRY(tvk_cuda_attend(m->device->math, &there, err));
    }
out:
    return rc;
}

/* ---- losses -------------------------------------------------------------- */

struct scored { /* rows, one behind the other */
    uint32_t *index, *targets;
    struct tve_group *groups;
    struct tvk_cuda_loss *losses;
    size_t n, n_groups;
};

static void scored_free(struct scored *r)
{
    tv_free(r->index);
    tv_free(r->targets);
    tv_free(r->groups);
    tv_free(r->losses);
}

static enum tv_err find_scored(const struct tve_scored *s, struct scored *r,
                               struct tv_error *err)
{
    const size_t rows = s->starts[s->n_windows];
    size_t w = 0;

    r->index = tv_calloc(rows, sizeof(*r->index));
    r->targets = tv_calloc(rows, sizeof(*r->targets));
    r->groups = tv_calloc(s->n_groups, sizeof(*r->groups));
    if (!r->index || !r->targets || !r->groups)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t g = 0; g < s->n_groups; g++) {
        struct tve_group *const to = &r->groups[r->n_groups];
        const size_t end = s->groups[g].start + s->groups[g].n;

        to->start = r->n;
        for (; w < s->n_windows && s->starts[w] < end; w++)
            for (size_t k = s->windows[w].score_from; k < s->windows[w].n;
                 k++) {
                r->index[r->n] = (uint32_t)(s->starts[w] + k - 1);
                r->targets[r->n++] = (uint32_t)s->windows[w].ids[k];
            }
        to->n = r->n - to->start;
        r->n_groups += to->n > 0;
    }
    r->losses = tv_calloc(r->n + 1, sizeof(*r->losses));
    return r->losses ? TV_OK : tv_error_set(err, TV_E_NOMEM, "out of memory");
}

enum tv_err tve_there_score(tve_model *m, const struct tve_batch_there *b,
                            const struct tve_scored *s, double *nll,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_math *const math = m->device->math;
    tvk_cuda_stream *const stream = stream_of(m);
    struct scored r = {.n = 0};

    TV_TRY(find_scored(s, &r, err));
    if (r.n == 0)
        goto out;
    const size_t bytes = r.n * sizeof(uint32_t);
    const struct tvk_cuda_rows take = {.dst = tve_there(s->room),
                                       .src = tve_there(s->x),
                                       .rows = r.n,
                                       .n = s->ld,
                                       .ld = s->ld,
                                       .lds = s->ld};
    const struct tve_there_losses losses = {.x = tve_there(s->room),
                                            .losses = b->losses,
                                            .targets = b->targets,
                                            .ldx = s->ld,
                                            .groups = r.groups,
                                            .n_groups = r.n_groups};
    TV_TRY(tvk_cuda_upload(stream, b->index, r.index, bytes, err));
    TV_TRY(tvk_cuda_upload(stream, b->targets, r.targets, bytes, err));
    TV_TRY(tvk_cuda_take_rows(math, &take, b->index, false, err));
    TV_TRY(tve_there_losses(m, &losses, err));
    TV_TRY(tvk_cuda_download(stream, r.losses, b->losses,
                             r.n * sizeof(*r.losses), err));
    TV_TRY(tvk_cuda_sync(stream, err));
    for (size_t i = 0; i < r.n; i++)
        nll[i] = (double)r.losses[i].max + log(r.losses[i].sum) -
                 (double)r.losses[i].target;
out:
    if (rc != TV_OK)
        tvk_cuda_math_settle(math);
    scored_free(&r);
    return rc;
}
