/* SPDX-License-Identifier: Apache-2.0 */
/*
 * linear_cuda.c - linear layers on a CUDA device: the tiles of linear_layer.c,
 * one product for each tile and piece of rows.
 *
 *   host   x ------------------> x                                    upload
 *          tile t -> pinned ---> w[t % 2] ---> y[u % 2] = x w^T       device
 *          y <- pinned <--------------------- y[u % 2]                download
 *
 * While product u runs, the host takes over the outputs of u - 1 and makes the
 * next tile ready. 16-bit weights without adapters travel as they are stored
 * and are widened there; everything else is made fp32 here. Pieces depend on
 * the groups alone: x that does not fit goes in several slices of whole pieces,
 * weights then once for each, and no result depends on it. So it is when the
 * activations of a batch have no room there; else they stay there between the
 * layers (forward_cuda.c, and the end of this file), and weights stay there too
 * for later batches if there is room for all. Not run on a GPU so far
 * (tv/cuda_math.h).
 */
#include <string.h>

#include "tv/alloc.h"

#include "linear_parts.h"

#define PIECE   2048u /* rows of one product */
#define ROWS_AT 64u   /* rows that one item of host work takes */

/* ---- memory -------------------------------------------------------------- */

static void piece_free(struct tve_device *d, struct tve_piece *p)
{
    tvk_cuda_free(d->cuda, p->at, p->bytes);
    *p = (struct tve_piece){.bytes = 0};
}

static void pair_free(struct tve_device *d, struct tve_pair *p)
{
    for (int i = 0; i < 2; i++) {
        tvk_cuda_unpin(d->cuda, p->host[i]);
        tvk_cuda_free(d->cuda, p->device[i], p->bytes);
    }
    *p = (struct tve_pair){.bytes = 0};
}

static void residents_free(struct tve_device *d)
{
    for (size_t i = 0; i < d->n_residents; i++)
        piece_free(d, &d->residents[i].piece);
    d->n_residents = 0;
    d->keeps = false;
}

/* As tvk_cuda_alloc; weights that stay go if it cannot be had otherwise. */
static enum tv_err need(struct tve_device *d, size_t bytes, const char *what,
                        tvk_cuda_ptr *out, struct tv_error *err)
{
    const enum tv_err rc = tvk_cuda_alloc(d->cuda, bytes, what, err, out);

    if (rc != TV_E_BUDGET || d->n_residents == 0)
        return rc;
    tv_error_clear(err);
    tvk_cuda_math_settle(d->math);
    residents_free(d);
    return tvk_cuda_alloc(d->cuda, bytes, what, err, out);
}

static enum tv_err pair_need(struct tve_device *d, struct tve_pair *p,
                             size_t bytes, const char *what,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    if (bytes <= p->bytes)
        return TV_OK;
    pair_free(d, p);
    p->bytes = bytes;
    for (int i = 0; i < 2; i++) {
        TV_TRY(tvk_cuda_pin(d->cuda, bytes, err, &p->host[i]));
        TV_TRY(need(d, bytes, what, &p->device[i], err));
    }
out:
    if (rc != TV_OK)
        pair_free(d, p);
    return rc;
}

enum tv_err tve_piece_need(struct tve_device *d, struct tve_piece *p,
                           size_t bytes, const char *what, struct tv_error *err)
{
    if (bytes <= p->bytes)
        return TV_OK;
    piece_free(d, p);
    const enum tv_err rc = need(d, bytes, what, &p->at, err);
    if (rc == TV_OK)
        p->bytes = bytes;
    return rc;
}

enum tv_err tve_device_open(tvk_cuda *cuda, struct tv_error *err,
                            struct tve_device **out)
{
    enum tv_err rc = TV_OK;
    struct tve_device *d = NULL;
    tvk_cuda_math *math = NULL;

    *out = NULL;
    TV_TRY(tvk_cuda_math_of(cuda, err, &math));
    d = tv_calloc(1, sizeof(*d));
    if (!d)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    d->cuda = cuda;
    d->math = math;
    *out = d;
out:
    return rc;
}

void tve_device_shrink(struct tve_device *d)
{
    /* Nobody may still use what is given back. */
    tvk_cuda_math_settle(d->math);
    pair_free(d, &d->weights);
    pair_free(d, &d->outputs);
    piece_free(d, &d->raw[0]);
    piece_free(d, &d->raw[1]);
    piece_free(d, &d->logits);
    piece_free(d, &d->batch);
    piece_free(d, &d->work);
    for (size_t i = 0; i < d->n_kept; i++)
        piece_free(d, &d->kept[i].piece);
    d->n_kept = 0;
    residents_free(d);
}

void tve_device_close(struct tve_device *d)
{
    if (!d)
        return;
    tve_device_shrink(d);
    tv_free(d->kept);
    tv_free(d->residents);
    tv_free(d);
}

tvk_cuda_math *tve_device_math(const struct tve_device *d)
{
    return d->math;
}

/* ---- a tile of weights --------------------------------------------------- */

struct tile {
    const struct tve_job *j;
    size_t out0, n_out;
    bool raw; /* 16 bits as they are stored */
    void *to; /* pinned */
};

static bool is_raw(const struct tve_job *j)
{
    const enum tv_dtype t = j->rows.view.dtype;

    return !j->columns && j->rows.patch.n == 0 && (t == TV_BF16 || t == TV_F16);
}

/* Rows of the weight, or of the tile's columns of it. */
static void read_rows(void *arg, size_t item, unsigned worker)
{
    const struct tile *const t = arg;
    const struct tve_job *const j = t->j;
    const size_t all = j->columns ? j->in : t->n_out;
    const size_t from = item * ROWS_AT;
    const size_t n = all - from < ROWS_AT ? all - from : ROWS_AT;
    float *const to = t->to;

    if (t->raw) {
        tv_view_copy(&j->rows.view, (uint64_t)(t->out0 + from) * j->in * 2,
                     (uint64_t)n * j->in * 2,
                     (unsigned char *)t->to + from * j->in * 2);
        return;
    }
    if (!j->columns) {
        tve_rows_read(&j->rows, worker, (uint64_t)(t->out0 + from) * j->in,
                      n * j->in, to + from * j->in);
        return;
    }
    for (size_t row = from; row < from + n; row++)
        tve_rows_read(&j->rows, worker, (uint64_t)row * j->out + t->out0,
                      t->n_out, to + row * t->n_out);
}

/* The tile on the device, in buffer i. Nobody uses that one any more. */
static enum tv_err bring_tile(struct tve_device *d, const struct tve_run *r,
                              const struct tile *t, int i, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_stream *const s = tvk_cuda_math_copies(d->math);
    const size_t n = t->n_out * t->j->in;
    const size_t rows = t->j->columns ? t->j->in : t->n_out;

    tv_pool_run(r->m->pool, (rows + ROWS_AT - 1) / ROWS_AT, read_rows,
                (void *)(uintptr_t)t);
    TV_TRY(tvk_cuda_upload(s, t->raw ? d->raw[i].at : d->weights.device[i],
                           t->to, n * (t->raw ? 2 : sizeof(float)), err));
    TV_TRY(tvk_cuda_sync(s, err));
    if (t->raw)
        TV_TRY(tvk_cuda_widen(d->math, t->j->rows.view.dtype == TV_BF16,
                              d->weights.device[i], d->raw[i].at, n, err));
out:
    return rc;
}

/* ---- outputs ------------------------------------------------------------- */

struct unit { /* one product */
    const struct tve_run *r;
    struct tile tile;
    size_t index;       /* of the tile in its job */
    size_t row, n, ldx; /* of x */
    float *y;           /* pinned [n, n_out] */
};

static void take_rows(void *arg, size_t item, unsigned worker)
{
    const struct unit *const u = arg;
    const struct tve_run *const r = u->r;
    const struct tve_job *const j = u->tile.j;
    const size_t from = item * ROWS_AT, n_out = u->tile.n_out;
    const size_t n = u->n - from < ROWS_AT ? u->n - from : ROWS_AT;
    const size_t out0 = u->tile.out0;
    float *const y = u->y + from * n_out;

    (void)worker;
    tve_add_bias(y, n_out, n, j->bias ? j->bias + out0 : NULL, n_out);
    if (!r->head) {
        const struct tve_linear *const l = j->item;
        for (size_t i = 0; i < n; i++)
            memcpy(l->y + (u->row + from + i) * l->ldy + out0, y + i * n_out,
                   n_out * sizeof(*y));
        return;
    }
    if (r->m->spec.logit_cap > 0)
        r->m->rows->cap_row(y, n_out * n, r->m->spec.logit_cap);
    const struct tve_head_tile t = {y, u->index, out0, n_out, u->row + from, n};
    r->head(r->arg, &t);
}

static void deliver(const struct unit *u)
{
    if (u->r)
        tv_pool_run(u->r->m->pool, (u->n + ROWS_AT - 1) / ROWS_AT, take_rows,
                    (void *)(uintptr_t)u);
}

static enum tv_err multiply(struct tve_device *d, const struct unit *u,
                            tvk_cuda_ptr x, int w, int y, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n_out = u->tile.n_out, in = u->tile.j->in;
    const bool columns = u->tile.j->columns;
    const struct tvk_cuda_gemm g = {.trans_b = !columns,
                                    .m = u->n,
                                    .n = n_out,
                                    .k = in,
                                    .alpha = 1.0f,
                                    .a = x,
                                    .lda = u->ldx,
                                    .b = d->weights.device[w],
                                    .ldb = columns ? n_out : in,
                                    .c = d->outputs.device[y],
                                    .ldc = n_out};

    TV_TRY(tvk_cuda_gemm(d->math, &g, err));
    TV_TRY(tvk_cuda_download(tvk_cuda_math_stream(d->math), u->y,
                             d->outputs.device[y], u->n * n_out * sizeof(float),
                             err));
out:
    return rc;
}

/* ---- a run --------------------------------------------------------------- */

struct slice { /* pieces whose x is on the device at one time */
    const struct tve_group *pieces;
    size_t n;
    tvk_cuda_ptr x;
};

static enum tv_err run_slice(struct tve_device *d, struct tve_run *r,
                             const struct slice *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_stream *const stream = tvk_cuda_math_stream(d->math);
    struct unit before = {.r = NULL};
    const size_t ldx = r->jobs[0].item->ldx;
    size_t t = 0, n_units = 0;

    for (size_t i = 0; i < r->n_jobs; i++) {
        const struct tve_job *const j = &r->jobs[i];
        for (size_t k = 0; k < j->n_tiles; k++, t++) {
            const size_t out0 = k * j->tile_rows;
            const size_t left = j->out - out0;
            const struct tile tile = {j, out0,
                                      left < j->tile_rows ? left : j->tile_rows,
                                      is_raw(j), d->weights.host[t % 2]};

            TV_TRY(bring_tile(d, r, &tile, (int)(t % 2), err));
            for (size_t p = 0; p < s->n; p++, n_units++) {
                const size_t row = s->pieces[p].start;
                const struct unit u = {r,
                                       tile,
                                       k,
                                       row,
                                       s->pieces[p].n,
                                       ldx,
                                       d->outputs.host[n_units % 2]};

                /* Also frees the other buffers of weights and outputs. */
                TV_TRY(tvk_cuda_sync(stream, err));
                TV_TRY(multiply(d, &u,
                                s->x + (row - s->pieces[0].start) * ldx *
                                           sizeof(float),
                                (int)(t % 2), (int)(n_units % 2), err));
                deliver(&before);
                before = u;
            }
        }
    }
    TV_TRY(tvk_cuda_sync(stream, err));
    deliver(&before);
out:
    return rc;
}

/* Groups cut into pieces; owned. */
static struct tve_group *cut(const struct tve_run *r, size_t *n)
{
    struct tve_group *pieces = NULL;

    *n = 0;
    for (size_t g = 0; g < r->n_groups; g++)
        *n += (r->groups[g].n + PIECE - 1) / PIECE;
    pieces = tv_calloc(*n + 1, sizeof(*pieces));
    *n = 0;
    for (size_t g = 0; pieces && g < r->n_groups; g++)
        for (size_t at = 0; at < r->groups[g].n; at += PIECE) {
            const size_t left = r->groups[g].n - at;
            pieces[(*n)++] = (struct tve_group){r->groups[g].start + at,
                                                left < PIECE ? left : PIECE};
        }
    return pieces;
}

/* Pieces from `at` on whose x takes no more than `bytes`, at least one. */
static size_t pieces_in(const struct tve_group *pieces, size_t at, size_t n,
                        size_t row_bytes, uint64_t bytes)
{
    const size_t first = pieces[at].start;
    size_t i = at + 1;

    while (i < n &&
           (uint64_t)(pieces[i].start + pieces[i].n - first) * row_bytes <=
               bytes)
        i++;
    return i - at;
}

static enum tv_err buffers(struct tve_device *d, const struct tve_run *r,
                           size_t rows, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    size_t weights = 1, outputs = 1, raw = 0;

    for (size_t i = 0; i < r->n_jobs; i++) {
        const struct tve_job *const j = &r->jobs[i];
        const size_t tile = j->tile_rows < j->out ? j->tile_rows : j->out;
        const size_t out = rows * tile * sizeof(float);

        if (tile * j->in * sizeof(float) > weights)
            weights = tile * j->in * sizeof(float);
        if (is_raw(j) && tile * j->in * 2 > raw)
            raw = tile * j->in * 2;
        outputs = out > outputs ? out : outputs;
    }
    TV_TRY(pair_need(d, &d->weights, weights, "tiles of weights", err));
    TV_TRY(pair_need(d, &d->outputs, outputs, "outputs of a layer", err));
    for (int i = 0; i < 2; i++)
        TV_TRY(tve_piece_need(d, &d->raw[i], raw, "tiles of weights", err));
out:
    return rc;
}

enum tv_err tve_device_run(struct tve_device *d, struct tve_run *r,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_stream *const stream = tvk_cuda_math_stream(d->math);
    const float *const x = r->jobs[0].item->x;
    const size_t ldx = r->jobs[0].item->ldx, in = r->jobs[0].in;
    size_t n = 0, most = 0;
    struct tve_group *const pieces = cut(r, &n);
    size_t bytes = 0;
    tvk_cuda_ptr at = 0;

    if (!pieces)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t i = 0; i < n; i++)
        most = pieces[i].n > most ? pieces[i].n : most;
    if (most == 0)
        goto out;
    TV_TRY(buffers(d, r, most, err));
    for (size_t i = 0, k = 0; i < n; i += k) {
        k = pieces_in(pieces, i, n, ldx * sizeof(float),
                      tvk_cuda_left(d->cuda));
        const size_t last = i + k - 1;
        const size_t rows =
            pieces[last].start + pieces[last].n - pieces[i].start;

        bytes = ((rows - 1) * ldx + in) * sizeof(float);
        rc = tvk_cuda_alloc(d->cuda, bytes, "inputs of a layer", err, &at);
        if (rc == TV_E_BUDGET && k > 1) {
            /* The device has less than it is allowed to have. */
            tv_error_clear(err);
            k = 1;
            bytes = ((pieces[i].n - 1) * ldx + in) * sizeof(float);
            rc = tvk_cuda_alloc(d->cuda, bytes, "inputs of a layer", err, &at);
        }
        if (rc != TV_OK)
            goto out;
        const struct slice s = {pieces + i, k, at};
        TV_TRY(
            tvk_cuda_upload(stream, at, x + pieces[i].start * ldx, bytes, err));
        TV_TRY(run_slice(d, r, &s, err));
        tvk_cuda_free(d->cuda, at, bytes);
        at = 0;
    }
out:
    if (rc != TV_OK)
        tvk_cuda_math_settle(d->math);
    tvk_cuda_free(d->cuda, at, bytes);
    tv_free(pieces);
    return rc;
}

/* ---- activations on the device ------------------------------------------- */

/* Tiles as above, but x and y are there: nothing but weights travels. While the
 * products of a tile run, the next one (of this layer, or of a later one while
 * attention runs) is read and copied; before products join the stream, it is
 * waited for, so that the tile before has given its buffers back.
 *
 *   host      read t+1 ------------> read t+2
 *   copies        '-- upload t+1 ---.    '-- upload t+2
 *   stream    products of t         '-- products of t+1
 */

static size_t tile_of(const tve_model *m, const struct tve_param *p)
{
    const size_t in = tve_linear_in(m, p), out = tve_linear_out(m, p);
    const size_t rows = tve_tile_rows(in, out);

    return (rows < out ? rows : out) * in;
}

static size_t largest_tile(const tve_model *m)
{
    size_t most = tile_of(m, &m->globals[TVE_HEAD]);

    for (size_t i = 0; i < m->spec.n_layers * TVE_SLOTS; i++) {
        const struct tve_param *const p = &m->layers[i];
        if (p->w.t && p->w.t->rank == 2 && tile_of(m, p) > most)
            most = tile_of(m, p);
    }
    for (int i = TVE_PROJECT_IN; i <= TVE_PROJECT_OUT; i++) {
        const struct tve_param *const p = &m->globals[i];
        if (p->w.t && tile_of(m, p) > most)
            most = tile_of(m, p);
    }
    return most;
}

static size_t logits_bytes(const tve_model *m)
{
    const struct tve_param *const head = &m->globals[TVE_HEAD];

    return PIECE * tve_tile_rows(head->w.cols, head->w.rows) * sizeof(float);
}

uint64_t tve_device_host_bytes(const tve_model *m)
{
    const struct tve_param *const in = &m->globals[TVE_PROJECT_IN];
    const size_t cols = in->w.t ? tve_linear_in(m, in) : 0;
    const size_t rows = in->w.t ? tve_linear_out(m, in) : 0;

    /* The embedding's projection takes x and gives y here. */
    return 2 * sizeof(float) *
           (largest_tile(m) +
            (in->w.t ? (uint64_t)PIECE * tve_tile_rows(cols, rows) : 0));
}

uint64_t tve_device_buffer_bytes(const tve_model *m, bool logits)
{
    return largest_tile(m) * 2 * (sizeof(float) + 2) +
           (logits ? logits_bytes(m) : 0);
}

enum tv_err tve_device_buffers(struct tve_device *d, const tve_model *m,
                               bool logits, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t most = largest_tile(m);

    TV_TRY(pair_need(d, &d->weights, most * sizeof(float), "tiles of weights",
                     err));
    for (int i = 0; i < 2; i++)
        TV_TRY(
            tve_piece_need(d, &d->raw[i], most * 2, "tiles of weights", err));
    if (logits)
        TV_TRY(tve_piece_need(d, &d->logits, logits_bytes(m),
                              "a tile of logits", err));
out:
    return rc;
}

static struct tve_kept *kept_for(struct tve_device *d,
                                 const struct tv_input_tensor *t)
{
    for (size_t i = 0; i < d->n_kept; i++)
        if (d->kept[i].t == t)
            return &d->kept[i];
    if (d->n_kept == d->cap_kept) {
        const size_t cap = d->cap_kept ? 2 * d->cap_kept : 64;
        struct tve_kept *const more = tv_calloc(cap, sizeof(*more));
        if (!more)
            return NULL;
        if (d->n_kept > 0)
            memcpy(more, d->kept, d->n_kept * sizeof(*more));
        tv_free(d->kept);
        d->kept = more;
        d->cap_kept = cap;
    }
    d->kept[d->n_kept] = (struct tve_kept){.t = t};
    return &d->kept[d->n_kept++];
}

enum tv_err tve_device_param(struct tve_device *d, tve_model *m,
                             const struct tve_weight *w, tvk_cuda_ptr *out,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_stream *const copies = tvk_cuda_math_copies(d->math);
    float *here = NULL;

    *out = 0;
    if (!w->t)
        return TV_OK;
    const bool replaced = tve_is_replaced(m, w->t);
    struct tve_kept *const k = kept_for(d, w->t);
    const size_t bytes = (size_t)w->t->n_elems * sizeof(float);
    if (!k)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    if (k->piece.at && !k->replaced && !replaced) {
        *out = k->piece.at;
        return TV_OK;
    }
    TV_TRY(tve_load(m, w, &here, err));
    if (k->piece.at) /* it may be in use */
        TV_TRY(tvk_cuda_sync(tvk_cuda_math_stream(d->math), err));
    TV_TRY(tve_piece_need(d, &k->piece, bytes, "a norm or a bias", err));
    k->replaced = true; /* in case of an error */
    TV_TRY(tvk_cuda_upload(copies, k->piece.at, here, bytes, err));
    TV_TRY(tvk_cuda_sync(copies, err));
    k->replaced = replaced;
    *out = k->piece.at;
out:
    tv_free(here);
    return rc;
}

/* ---- weights that stay --------------------------------------------------- */

static uint64_t stored_bytes(const struct tve_param *p)
{
    const enum tv_dtype t = p->w.t ? p->w.t->dtype : TV_F32;
    const bool raw = p->w.n_changes == 0 && (t == TV_BF16 || t == TV_F16);

    return p->w.t && p->w.t->rank == 2 ? p->w.t->n_elems * (raw ? 2 : 4) : 0;
}

uint64_t tve_device_weight_bytes(const tve_model *m)
{
    uint64_t bytes = stored_bytes(&m->globals[TVE_HEAD]);

    for (size_t i = 0; i < m->spec.n_layers * TVE_SLOTS; i++)
        bytes += stored_bytes(&m->layers[i]);
    for (int i = TVE_PROJECT_IN; i <= TVE_PROJECT_OUT; i++)
        bytes += stored_bytes(&m->globals[i]);
    return bytes;
}

uint64_t tve_device_resident_bytes(const struct tve_device *d)
{
    uint64_t bytes = 0;

    for (size_t i = 0; i < d->n_residents; i++)
        bytes += d->residents[i].piece.bytes;
    return bytes;
}

static struct tve_resident *resident_of(const struct tve_device *d,
                                        const struct tv_input_tensor *t)
{
    for (size_t i = 0; i < d->n_residents; i++)
        if (d->residents[i].t == t)
            return &d->residents[i];
    return NULL;
}

const struct tve_resident *tve_device_table(const struct tve_device *d,
                                            const tve_model *m,
                                            const struct tve_weight *w,
                                            size_t rows)
{
    const struct tve_resident *const r = resident_of(d, w->t);
    const size_t each = tve_tile_rows(w->cols, w->rows);

    return r && r->piece.at && r->n_there * each >= rows &&
                   !tve_is_replaced(m, w->t)
               ? r
               : NULL;
}

/* Room for the weight of j, made by the first call; NULL: it does not stay. */
static enum tv_err resident_for(struct tve_device *d, const tve_model *m,
                                const struct tve_job *j,
                                struct tve_resident **out, struct tv_error *err)
{
    const struct tv_input_tensor *const t = j->item->p->w.t;
    struct tve_resident *r = resident_of(d, t);
    enum tv_err rc = TV_OK;

    *out = NULL;
    if (!d->keeps || tve_is_replaced(m, t))
        return TV_OK;
    if (!r) {
        if (d->n_residents == d->cap_residents) {
            const size_t cap = d->cap_residents ? 2 * d->cap_residents : 64;
            struct tve_resident *const more = tv_calloc(cap, sizeof(*more));
            if (!more)
                return tv_error_set(err, TV_E_NOMEM, "out of memory");
            if (d->n_residents > 0)
                memcpy(more, d->residents, d->n_residents * sizeof(*more));
            tv_free(d->residents);
            d->residents = more;
            d->cap_residents = cap;
        }
        r = &d->residents[d->n_residents++];
        *r = (struct tve_resident){
            .t = t, .raw = is_raw(j), .dtype = j->rows.view.dtype};
        const size_t bytes = j->in * j->out * (r->raw ? 2 : 4);
        rc = tvk_cuda_alloc(d->cuda, bytes, "weights", err, &r->piece.at);
        if (rc == TV_OK)
            r->piece.bytes = bytes;
        if (rc == TV_E_BUDGET) { /* the device has less than it may have */
            tv_error_clear(err);
            rc = TV_OK;
        }
    }
    if (rc == TV_OK && r->piece.at)
        *out = r;
    return rc;
}

/* The k-th tile of j in *at, ready for products. */
static enum tv_err next_tile(struct tve_device *d, const struct tve_run *r,
                             const struct tve_job *j, size_t k,
                             struct tile *tile, tvk_cuda_ptr *at,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_stream *const stream = tvk_cuda_math_stream(d->math);
    const int i = (int)(d->n_tiles++ % 2);
    const size_t out0 = k * j->tile_rows, left = j->out - out0;
    struct tve_resident *stays = NULL;

    *tile = (struct tile){j, out0, left < j->tile_rows ? left : j->tile_rows,
                          is_raw(j), d->weights.host[i]};
    *at = d->weights.device[i];
    TV_TRY(resident_for(d, r->m, j, &stays, err));
    const size_t n = tile->n_out * j->in, each = stays && !stays->raw ? 4 : 2;
    const tvk_cuda_ptr there =
        stays ? stays->piece.at + out0 * j->in * each : 0;
    if (stays && k < stays->n_there) {
        d->n_queued++;
        if (!stays->raw)
            *at = there;
        else
            TV_TRY(tvk_cuda_widen(d->math, stays->dtype == TV_BF16, *at, there,
                                  n, err));
        goto out;
    }
    /* Of what is queued, the last tile alone has other buffers. */
    if (d->n_queued > 1)
        TV_TRY(tvk_cuda_sync(stream, err));
    TV_TRY(bring_tile(d, r, tile, i, err));
    TV_TRY(tvk_cuda_sync(stream, err));
    d->n_queued = 1;
    if (stays && k == stays->n_there) {
        TV_TRY(tvk_cuda_copy(stream, there, tile->raw ? d->raw[i].at : *at,
                             n * each, err));
        stays->n_there++;
    }
out:
    return rc;
}

/* y = x w^T of n rows; addresses of the first. */
static enum tv_err product(struct tve_device *d, const struct tile *tile,
                           tvk_cuda_ptr w, tvk_cuda_ptr x, size_t ldx,
                           tvk_cuda_ptr y, size_t ldy, size_t n,
                           struct tv_error *err)
{
    const bool columns = tile->j->columns;
    const struct tvk_cuda_gemm g = {.trans_b = !columns,
                                    .m = n,
                                    .n = tile->n_out,
                                    .k = tile->j->in,
                                    .alpha = 1.0f,
                                    .a = x,
                                    .lda = ldx,
                                    .b = w,
                                    .ldb = columns ? tile->n_out : tile->j->in,
                                    .c = y,
                                    .ldc = ldy};

    return tvk_cuda_gemm(d->math, &g, err);
}

static tvk_cuda_ptr float_at(tvk_cuda_ptr p, size_t i)
{
    return p + i * sizeof(float);
}

static enum tv_err linear_there(struct tve_device *d, const struct tve_run *r,
                                const struct tve_job *j, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_linear *const l = j->item;
    const tvk_cuda_ptr x = tve_there(l->x), y = tve_there(l->y);
    tvk_cuda_ptr bias = 0;

    for (size_t k = 0; k < j->n_tiles; k++) {
        struct tile tile;
        tvk_cuda_ptr w = 0;

        TV_TRY(next_tile(d, r, j, k, &tile, &w, err));
        for (size_t i = 0; i < r->n_groups; i++) {
            const size_t row = r->groups[i].start;
            TV_TRY(product(d, &tile, w, float_at(x, row * l->ldx), l->ldx,
                           float_at(y, row * l->ldy + tile.out0), l->ldy,
                           r->groups[i].n, err));
        }
    }
    TV_TRY(tve_device_param(d, r->model, &l->p->b, &bias, err));
    for (size_t i = 0; bias && i < r->n_groups; i++) {
        const struct tvk_cuda_rows add = {
            .dst = float_at(y, r->groups[i].start * l->ldy),
            .src = bias,
            .rows = r->groups[i].n,
            .n = j->out,
            .ld = l->ldy};
        TV_TRY(tvk_cuda_add_rows(d->math, &add, err));
    }
out:
    return rc;
}

enum tv_err tve_there_linear(tve_model *m, const struct tve_linear *items,
                             size_t n_items, const struct tve_group *groups,
                             size_t n_groups, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_run r = {
        .m = m, .model = m, .groups = groups, .n_groups = n_groups};
    size_t n_pieces = 0;
    struct tve_group *const pieces = cut(&r, &n_pieces);

    if (!pieces)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    r.groups = pieces;
    r.n_groups = n_pieces;
    for (size_t i = 0; i < n_items; i++) {
        struct tve_job j = {.item = &items[i]};

        rc = tve_job_open(m, items[i].p, &j, err);
        if (rc == TV_OK)
            rc = linear_there(m->device, &r, &j, err);
        tve_job_close(&j);
        if (rc != TV_OK)
            goto out;
    }
out:
    tv_free(pieces);
    return rc;
}

enum tv_err tve_there_losses(tve_model *m, const struct tve_there_losses *a,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_device *const d = m->device;
    const struct tve_param *const head = &m->globals[TVE_HEAD];
    const struct tve_linear item = {.p = head};
    struct tve_run r = {
        .m = m, .model = m, .groups = a->groups, .n_groups = a->n_groups};
    struct tve_job j = {.item = &item};
    size_t n_pieces = 0;
    struct tve_group *const pieces = cut(&r, &n_pieces);
    tvk_cuda_ptr bias = 0;

    if (!pieces)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    r.groups = pieces;
    r.n_groups = n_pieces;
    TV_TRY(tve_job_open(m, head, &j, err));
    TV_TRY(tve_device_param(d, m, &head->b, &bias, err));
    for (size_t k = 0; k < j.n_tiles && k * j.tile_rows < m->spec.vocab; k++) {
        struct tile tile;
        tvk_cuda_ptr w = 0;

        TV_TRY(next_tile(d, &r, &j, k, &tile, &w, err));
        const size_t left = m->spec.vocab - tile.out0;
        for (size_t i = 0; i < r.n_groups; i++) {
            const size_t row = pieces[i].start;
            const struct tvk_cuda_rows add = {.dst = d->logits.at,
                                              .src = float_at(bias, tile.out0),
                                              .rows = pieces[i].n,
                                              .n = tile.n_out,
                                              .ld = tile.n_out};
            const struct tvk_cuda_losses losses = {
                .logits = d->logits.at,
                .losses = a->losses + row * sizeof(struct tvk_cuda_loss),
                .targets = a->targets + row * sizeof(uint32_t),
                .rows = pieces[i].n,
                .n = left < tile.n_out ? left : tile.n_out,
                .ld = tile.n_out,
                .from = tile.out0,
                .cap = m->spec.logit_cap};

            TV_TRY(product(d, &tile, w, float_at(a->x, row * a->ldx), a->ldx,
                           d->logits.at, tile.n_out, pieces[i].n, err));
            if (bias)
                TV_TRY(tvk_cuda_add_rows(d->math, &add, err));
            TV_TRY(tvk_cuda_add_losses(d->math, &losses, err));
        }
    }
out:
    tve_job_close(&j);
    tv_free(pieces);
    return rc;
}
