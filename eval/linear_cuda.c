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
 * and are widened there; everything else is made fp32 here. Activations between
 * the layers stay on the host. Pieces depend on the groups alone: x that does
 * not fit goes in several slices of whole pieces, weights then once for each,
 * and no result depends on it. Not run on a GPU so far (tv/cuda_math.h).
 */
#include <string.h>

#include "tv/alloc.h"

#include "linear_parts.h"

#define PIECE   2048u /* rows of one product */
#define ROWS_AT 64u   /* rows that one item of host work takes */

struct pair { /* two buffers here and there */
    size_t bytes;
    void *host[2];
    tvk_cuda_ptr device[2];
};

struct tve_device {
    tvk_cuda *cuda;
    tvk_cuda_math *math;
    struct pair weights, outputs;
    tvk_cuda_ptr raw; /* a tile of 16-bit weights */
    size_t raw_bytes;
};

/* ---- memory -------------------------------------------------------------- */

static void pair_free(struct tve_device *d, struct pair *p)
{
    for (int i = 0; i < 2; i++) {
        tvk_cuda_unpin(d->cuda, p->host[i]);
        tvk_cuda_free(d->cuda, p->device[i], p->bytes);
    }
    *p = (struct pair){.bytes = 0};
}

static enum tv_err pair_need(struct tve_device *d, struct pair *p, size_t bytes,
                             const char *what, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    if (bytes <= p->bytes)
        return TV_OK;
    pair_free(d, p);
    p->bytes = bytes;
    for (int i = 0; i < 2; i++) {
        TV_TRY(tvk_cuda_pin(d->cuda, bytes, err, &p->host[i]));
        TV_TRY(tvk_cuda_alloc(d->cuda, bytes, what, err, &p->device[i]));
    }
out:
    if (rc != TV_OK)
        pair_free(d, p);
    return rc;
}

static enum tv_err raw_need(struct tve_device *d, size_t bytes,
                            struct tv_error *err)
{
    if (bytes <= d->raw_bytes)
        return TV_OK;
    tvk_cuda_free(d->cuda, d->raw, d->raw_bytes);
    d->raw_bytes = 0;
    const enum tv_err rc =
        tvk_cuda_alloc(d->cuda, bytes, "a tile of weights", err, &d->raw);
    if (rc == TV_OK)
        d->raw_bytes = bytes;
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
    pair_free(d, &d->weights);
    pair_free(d, &d->outputs);
    tvk_cuda_free(d->cuda, d->raw, d->raw_bytes);
    d->raw = 0;
    d->raw_bytes = 0;
}

void tve_device_close(struct tve_device *d)
{
    if (!d)
        return;
    tve_device_shrink(d);
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
    TV_TRY(tvk_cuda_upload(s, t->raw ? d->raw : d->weights.device[i], t->to,
                           n * (t->raw ? 2 : sizeof(float)), err));
    TV_TRY(tvk_cuda_sync(s, err));
    /* What used the raw bytes before was waited for by the first product of
     * the tile before. */
    if (t->raw)
        TV_TRY(tvk_cuda_widen(d->math, t->j->rows.view.dtype == TV_BF16,
                              d->weights.device[i], d->raw, n, err));
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
    TV_TRY(raw_need(d, raw, err));
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
