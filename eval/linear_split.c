/* SPDX-License-Identifier: Apache-2.0 */
/*
 * linear_split.c - linear layers on AMX tiles: the tiles of linear_layer.c
 * whose weights are bf16, stored [out, in], without adapters.
 *
 *   rows of all groups   | 128 | 128 | ... | 32 | 32 | 128 | ...    pieces
 *                        '------- slab ------'
 *
 * The workers split a slab of pieces into bf16 numbers (tv/split_gemm.h), then
 * take tiles: weights in oneDNN's order once per slab, all pieces of it by
 * them. Pieces begin at groups, and a tile with a NaN or an infinity is left to
 * sgemm, so neither threads nor memory change a bit.
 */
#include <stdatomic.h>
#include <string.h>

#include "tv/alloc.h"

#include "linear_parts.h"

#define SLAB_MOST  ((uint64_t)128 << 20)
#define SHAPES_MAX 32u

struct tve_splits {
    tvk_split *known[SHAPES_MAX]; /* by the shape of their tiles */
    size_t n;
};

struct piece {
    size_t row, n, rows; /* n rows of the input, padded to `rows` */
    size_t at;           /* bytes inside the slab */
};

struct slab {
    struct tve_run *run;
    const struct piece *pieces;
    size_t n_pieces;
    unsigned char *bytes;
    atomic_bool failed;
};

/* ---- shapes -------------------------------------------------------------- */

enum tv_err tve_splits_open(struct tv_error *err, struct tve_splits **out)
{
    *out = NULL;
    if (!tvk_split_core())
        return TV_OK;
    *out = tv_calloc(1, sizeof(**out));
    return *out ? TV_OK : tv_error_set(err, TV_E_NOMEM, "out of memory");
}

void tve_splits_close(struct tve_splits *s)
{
    for (size_t i = 0; s && i < s->n; i++)
        tvk_split_close(s->known[i]);
    tv_free(s);
}

/* Outputs of a tile, or all of them. */
static size_t tile_out(size_t in, size_t out)
{
    const size_t rows = tve_tile_rows(in, out);

    return rows < out ? rows : out;
}

/* *out NULL: sgemm does these. */
static enum tv_err split_of(const tve_model *m, const struct tve_job *j,
                            struct tv_error *err, tvk_split **out)
{
    struct tve_splits *const all = m->splits;
    struct tv_error why = {0};
    enum tv_err rc = TV_OK;

    *out = NULL;
    for (size_t i = 0; i < all->n; i++) {
        const struct tvk_split_shape *const s =
            tvk_split_shape_of(all->known[i]);

        if (s->in == j->in && s->out == tile_out(j->in, j->out)) {
            *out = all->known[i];
            return TV_OK;
        }
    }
    if (all->n == SHAPES_MAX)
        return TV_OK;
    rc = tvk_split_open(j->in, tile_out(j->in, j->out),
                        tv_pool_threads(m->pool), &why, out);
    if (rc == TV_OK)
        all->known[all->n++] = *out;
    else if (rc != TV_E_UNSUPPORTED)
        return tv_error_set(err, rc, "%s", why.msg);
    return TV_OK;
}

static bool exact(const struct tve_job *j)
{
    return j->rows.view.dtype == TV_BF16 && j->rows.patch.n == 0 &&
           !j->columns && j->in > 0 && j->out > 0;
}

/* ---- memory -------------------------------------------------------------- */

static size_t most_piece(const tve_model *m)
{
    size_t in = 0;

    for (size_t i = 0; i < m->spec.n_layers * TVE_SLOTS; i++) {
        const struct tve_param *const p = &m->layers[i];

        if (p->w.t && p->w.t->rank == 2 && tve_linear_in(m, p) > in)
            in = tve_linear_in(m, p);
    }
    for (size_t i = 0; i < TVE_GLOBALS; i++)
        if (m->globals[i].w.t && m->globals[i].w.t->rank == 2 &&
            m->globals[i].w.cols > in)
            in = m->globals[i].w.cols;
    const struct tvk_split_shape s = tvk_split_shape(in, 1);
    return tvk_split_row_bytes(&s, TVK_SPLIT_ROWS);
}

uint64_t tve_split_slab(const tve_model *m)
{
    const uint64_t least = m->splits ? most_piece(m) : 0;
    const uint64_t share = m->memory_bytes / 8;
    const uint64_t some = share > SLAB_MOST ? SLAB_MOST : share;

    if (!m->splits)
        return 0;
    return some > least ? some : least; /* a piece is never cut */
}

uint64_t tve_split_least(const tve_model *m)
{
    return m->splits ? most_piece(m) : 0;
}

size_t tve_split_tile_floats(const tve_model *m, size_t in, size_t out)
{
    const struct tvk_split_shape s = tvk_split_shape(in, tile_out(in, out));

    return m->splits ? tvk_split_work_bytes(&s) / sizeof(float) : 0;
}

/* ---- work ---------------------------------------------------------------- */

static void split_piece(void *arg, size_t item, unsigned worker)
{
    const struct slab *const s = arg;
    const struct piece *const p = &s->pieces[item];
    const struct tve_linear *const l = s->run->jobs[0].item;
    const struct tvk_split_shape shape = tvk_split_shape(s->run->jobs[0].in, 1);

    (void)worker;
    tvk_split_rows(&shape, s->run->m->kernels, l->x + p->row * l->ldx, l->ldx,
                   p->n, p->rows,
                   (uint16_t *)(void *)(s->bytes + (p->at - s->pieces->at)));
}

/* Rows [out0 + n * n_block, ...) of the weights, columns of block k. */
static void fill_stage(const struct tve_job *j,
                       const struct tvk_split_shape *shape, size_t out0,
                       size_t n_out, size_t n, size_t k, uint16_t *stage)
{
    const size_t row0 = n * shape->n_block, col0 = k * shape->k_block;
    const size_t rows_left = n_out > row0 ? n_out - row0 : 0;
    const size_t cols_left = j->in > col0 ? j->in - col0 : 0;
    const size_t rows = rows_left < shape->n_block ? rows_left : shape->n_block;
    const size_t cols = cols_left < shape->k_block ? cols_left : shape->k_block;

    if (rows < shape->n_block || cols < shape->k_block)
        memset(stage, 0, shape->n_block * shape->k_block * sizeof(*stage));
    for (size_t r = 0; r < rows && cols > 0; r++)
        tv_view_copy(&j->rows.view,
                     ((uint64_t)(out0 + row0 + r) * j->in + col0) *
                         sizeof(*stage),
                     cols * sizeof(*stage), stage + r * shape->k_block);
}

static bool multiply(const struct slab *s, const struct tve_job *j,
                     unsigned worker, const struct piece *p, size_t index,
                     size_t n_out)
{
    const struct tve_run *const r = s->run;
    const struct tvk_split_shape *const shape = tvk_split_shape_of(j->split);
    const struct tve_linear *const l = j->item;
    const size_t out0 = index * j->tile_rows;
    const size_t ldy = r->head ? n_out : l->ldy;
    float *const y =
        r->head ? r->logits[worker] : l->y + p->row * l->ldy + out0;
    const uint16_t *const x =
        (const uint16_t *)(const void *)(s->bytes + (p->at - s->pieces->at));

    for (size_t n = 0; n * shape->n_block < n_out; n++) {
        const size_t at = n * shape->n_block;
        const size_t width =
            n_out - at < shape->n_block ? n_out - at : shape->n_block;
        const float *const from = tvk_split_product(
            j->split, worker, r->tiles[worker], x, p->rows, n);

        if (!from)
            return false;
        for (size_t i = 0; i < p->n; i++)
            memcpy(y + i * ldy + at, from + i * shape->n_block,
                   width * sizeof(*y));
    }
    tve_finish_tile(r, j, index, n_out, p->row, p->n, y, ldy);
    return true;
}

static void multiply_tile(void *arg, size_t item, unsigned worker)
{
    struct slab *const s = arg;
    struct tve_run *const r = s->run;
    const struct tve_job *j = r->jobs;

    while (item >= j->first_tile + j->n_tiles)
        j++;
    if (!r->done[item])
        return;
    const size_t index = item - j->first_tile;
    const size_t out0 = index * j->tile_rows;
    const size_t n_out =
        j->out - out0 < j->tile_rows ? j->out - out0 : j->tile_rows;
    const struct tvk_split_shape *const shape = tvk_split_shape_of(j->split);
    void *const work = r->tiles[worker];
    bool finite = true, ok = true;

    for (size_t n = 0; ok && finite && n * shape->n_block < n_out; n++) {
        for (size_t k = 0; ok && finite && k < shape->n_k; k++) {
            fill_stage(j, shape, out0, n_out, n, k,
                       tvk_split_stage(j->split, work));
            ok = tvk_split_take(j->split, worker, work, n, k, &finite);
        }
    }
    if (!finite)
        r->done[item] = 0;
    for (size_t i = 0; ok && finite && i < s->n_pieces; i++)
        ok = multiply(s, j, worker, &s->pieces[i], index, n_out);
    if (!ok)
        atomic_store(&s->failed, true);
}

/* Whole pieces of every group, then smaller ones. */
static size_t cut_pieces(const struct tve_run *r,
                         const struct tvk_split_shape *shape, struct piece *out)
{
    size_t n = 0, at = 0;

    for (size_t g = 0; g < r->n_groups; g++) {
        const struct tve_group *const group = &r->groups[g];

        for (size_t row = 0; row < group->n;) {
            const size_t left = group->n - row;
            const size_t rows =
                left >= TVK_SPLIT_ROWS ? TVK_SPLIT_ROWS : TVK_SPLIT_FEW;
            const size_t take = left < rows ? left : rows;

            if (out)
                out[n] = (struct piece){group->start + row, take, rows, at};
            at += tvk_split_row_bytes(shape, rows);
            row += take;
            n++;
        }
    }
    if (out)
        out[n].at = at;
    return n;
}

enum tv_err tve_split_run(struct tve_run *r, size_t n_tiles,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_model *const m = r->m;
    const uint64_t most = tve_split_slab(m);
    struct slab s = {.run = r, .failed = false};
    struct piece *pieces = NULL;
    size_t n = 0, bytes = 0;

    for (size_t i = 0; i < r->n_jobs; i++) {
        struct tve_job *const j = &r->jobs[i];

        if (exact(j))
            TV_TRY(split_of(m, j, err, &j->split));
        if (j->split)
            memset(r->done + j->first_tile, 1, j->n_tiles);
        n += j->split != NULL;
    }
    if (n == 0)
        goto out;
    /* All projections of a call have one input. */
    const struct tvk_split_shape shape = tvk_split_shape(r->jobs[0].in, 1);
    n = cut_pieces(r, &shape, NULL);
    pieces = tv_calloc(n + 1, sizeof(*pieces));
    if (!pieces) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    (void)cut_pieces(r, &shape, pieces);
    bytes = pieces[n].at < most ? pieces[n].at : (size_t)most;
    s.bytes = tv_alloc_aligned(bytes ? bytes : 1);
    if (!s.bytes) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t from = 0, to = 0; from < n; from = to) {
        while (to < n && pieces[to + 1].at - pieces[from].at <= bytes)
            to++;
        s.pieces = pieces + from;
        s.n_pieces = to - from;
        tv_pool_run(m->pool, s.n_pieces, split_piece, &s);
        tv_pool_run(m->pool, n_tiles, multiply_tile, &s);
        if (atomic_load(&s.failed)) {
            rc = tv_error_set(err, TV_E_NOMEM, "oneDNN is out of memory");
            goto out;
        }
    }
out:
    tv_free(pieces);
    tv_free(s.bytes);
    return rc;
}
