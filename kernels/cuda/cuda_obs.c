/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_obs.c - SparseGPT's loop on the device: see tv/cuda_math.h and
 * kernels/layer.c.
 *
 *           g     g_end
 *   T  +----+-----+-----------+
 *      |    |     | tile 0    |
 *      |done|group+-----------+
 *      |    |     | tile 1 ...|
 *      +----+-----+-----------+
 *
 * With all of T on the device, `group` is a part of it. Else T stays on the
 * host, and 512 columns of it come and go as a whole: the limit of a block is
 * over all rows, so all of them are needed at once. What is right of them gets
 * the errors of the group in tiles of 512 rows: one goes up while another is
 * multiplied and a third comes back. In a group the host is asked for nothing:
 * limits are searched, ties are counted and strips are corrected by kernels.
 */
#include "cuda/cuda_layer_parts.h"

#include <assert.h>
#include <math.h>

#include "cuda/cu_matrix.h"

_Static_assert(TVK_CU_OBS_BLOCK == TVK_OBS_BLOCK, "blocks of columns");
_Static_assert(TVK_CU_OBS_LD == TVK_OBS_GROUP, "stride of errors");

#define STRIP 32u /* as kernels/layer.c */

struct group { /* of columns, [from, to) */
    tvk_cuda_layer *l;
    const struct tvk_obs *how;
    size_t from, to;
    tvk_cuda_ptr t; /* its first column; row stride ldt */
    size_t ldt;
    tvk_cuda_ptr u; /* its first row, from column 0 */
};

/* Entries of a block that are pruned, by their scores' bits. */
static enum tv_err mark_block(tvk_cuda_layer *l, struct tvk_cu_obs *a,
                              double density, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const uint64_t n = a->rows * a->width;

    a->n_prune = (uint32_t)floor((double)n * (1.0 - density));
    TV_TRY(tvk_cuda_fill(l->stream, l->limit, 0,
                         sizeof(struct tvk_cu_obs_limit), err));
    TV_TRY(
        tvk_cuda_fill(l->stream, l->equal, 0, l->rows * sizeof(uint32_t), err));
    for (a->lower = 0; a->n_prune > 0 && a->lower < 2; a->lower++) {
        TV_TRY(tvk_cuda_fill(l->stream, l->buckets, 0,
                             TVK_CU_OBS_BUCKETS * sizeof(uint32_t), err));
        TV_TRY(tvk_cuda_over(l->stream, "tv_obs_count", n, TVK_CUDA_THREADS, a,
                             err));
        TV_TRY(tvk_cuda_over(l->stream, "tv_obs_find", TVK_CU_FIND, TVK_CU_FIND,
                             a, err));
    }
    if (a->n_prune > 0) {
        TV_TRY(tvk_cuda_over(l->stream, "tv_obs_equal", n, TVK_CUDA_THREADS, a,
                             err));
        TV_TRY(tvk_cuda_over(l->stream, "tv_obs_scan", TVK_CU_FIND, TVK_CU_FIND,
                             a, err));
    }
    TV_TRY(
        tvk_cuda_over(l->stream, "tv_obs_mark", a->rows, TVK_CU_ROWS, a, err));
out:
    return rc;
}

/* t [rows, to..end) -= e [rows, from..mid) u [from..mid, mid..end), columns of
 * the matrix; t and e are given at columns `mid` and `from`. */
static enum tv_err spread(const struct group *g, tvk_cuda_ptr t, size_t ldt,
                          size_t row, size_t rows, size_t from, size_t mid,
                          size_t end, struct tv_error *err)
{
    const tvk_cuda_layer *const l = g->l;
    const struct tvk_cuda_gemm p = {
        .m = rows,
        .n = end > mid ? end - mid : 0,
        .k = mid - from,
        .alpha = -1.0f,
        .beta = 1.0f,
        .a = tvk_cuda_float(l->err, row * TVK_OBS_GROUP + (from - g->from)),
        .lda = TVK_OBS_GROUP,
        .b = tvk_cuda_float(g->u, (from - g->from) * l->cols + mid),
        .ldb = l->cols,
        .c = t,
        .ldc = ldt};

    return tvk_cuda_gemm(l->math, &p, err);
}

/* All rows of columns that lie beside the group's. */
static enum tv_err spread_here(const struct group *g, size_t from, size_t mid,
                               size_t end, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    for (size_t row = 0; row < g->l->rows; row += TVK_CUDA_CG_ROWS)
        TV_TRY(spread(g, tvk_cuda_float(g->t, row * g->ldt + (mid - g->from)),
                      g->ldt, row,
                      tvk_cuda_least(TVK_CUDA_CG_ROWS, g->l->rows - row), from,
                      mid, end, err));
out:
    return rc;
}

static enum tv_err block(const struct group *g, size_t i, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_layer *const l = g->l;
    const struct tvk_obs *const how = g->how;
    const size_t end = tvk_cuda_least(i + TVK_OBS_BLOCK, g->to);
    const size_t strip = how->group > STRIP ? TVK_OBS_BLOCK : STRIP;
    const size_t at = i - g->from;
    struct tvk_cu_obs a = {
        .t = tvk_cuda_address(tvk_cuda_float(g->t, at)),
        .u = tvk_cuda_address(tvk_cuda_float(g->u, at * l->cols + i)),
        .err = tvk_cuda_address(tvk_cuda_float(l->err, at)),
        .buckets = tvk_cuda_address(l->buckets),
        .equal = tvk_cuda_address(l->equal),
        .limit = tvk_cuda_address(l->limit),
        .rows = l->rows,
        .cols = l->cols,
        .ldt = g->ldt,
        .width = (uint32_t)(end - i),
        .group = how->group,
        .n_pruned = how->n_pruned};

    if (how->group == 0)
        TV_TRY(mark_block(l, &a, how->density, err));
    for (size_t s = i; s < end; s += strip) {
        const size_t s_end = tvk_cuda_least(s + strip, end);

        a.from = (uint32_t)(s - i);
        a.to = (uint32_t)(s_end - i);
        TV_TRY(tvk_cuda_over(l->stream, "tv_obs_strip", a.rows, TVK_CU_ROWS, &a,
                             err));
        TV_TRY(spread_here(g, s, s_end, end, err));
    }
    TV_TRY(spread_here(g, i, end, g->to, err));
out:
    return rc;
}

/* What is right of the group, on the host: t [rows, cols]. */
static enum tv_err spread_tiles(const struct group *g, float *t,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_layer *const l = g->l;
    const size_t rows = tvk_cuda_least(TVK_CUDA_CG_ROWS, l->rows);
    const size_t width = l->cols - g->to;
    const size_t n = width > 0 ? (l->rows + rows - 1) / rows : 0;
    const tvk_cuda_ptr tiles =
        tvk_cuda_float(l->m, l->rows * (size_t)TVK_OBS_GROUP);

    /* Tile k goes up and k - 2 comes back beside the product of k - 1. */
    for (size_t k = 0; k <= n && n > 0; k++) {
        const size_t n_here =
            k < n ? tvk_cuda_least(rows, l->rows - k * rows) : 0;
        const tvk_cuda_ptr here =
            tvk_cuda_float(tiles, k % l->n_tiles * rows * l->cols);
        float *const from = t + k * rows * l->cols + g->to;

        if (k < n && l->n_tiles > 1)
            TV_TRY(tvk_cuda_stage_up(&l->stage, here, from, l->cols, n_here,
                                     width, err));
        TV_TRY(tvk_cuda_sync(l->stream, err));
        if (k < n && l->n_tiles > 1)
            TV_TRY(spread(g, here, width, k * rows, n_here, g->from, g->to,
                          l->cols, err));
        if (k > 0)
            TV_TRY(tvk_cuda_stage_down(
                &l->stage, from - rows * l->cols, l->cols,
                tvk_cuda_float(tiles, (k - 1) % l->n_tiles * rows * l->cols),
                tvk_cuda_least(rows, l->rows - (k - 1) * rows), width, err));
        if (k < n && l->n_tiles == 1) {
            TV_TRY(tvk_cuda_stage_up(&l->stage, here, from, l->cols, n_here,
                                     width, err));
            TV_TRY(spread(g, here, width, k * rows, n_here, g->from, g->to,
                          l->cols, err));
        }
    }
out:
    return rc;
}

static enum tv_err prune_group(struct group *g, float *t, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_layer *const l = g->l;
    const bool tiled = l->n_tiles > 0;

    TV_TRY(tvk_cuda_layer_panel(l, g->from, g->to, err, &g->u));
    g->t = tiled ? l->m : tvk_cuda_float(l->m, g->from);
    g->ldt = tiled ? g->to - g->from : l->cols;
    if (tiled)
        TV_TRY(tvk_cuda_stage_up(&l->stage, g->t, t + g->from, l->cols, l->rows,
                                 g->ldt, err));
    for (size_t i = g->from; i < g->to; i += TVK_OBS_BLOCK)
        TV_TRY(block(g, i, err));
    if (!tiled) {
        TV_TRY(spread_here(g, g->from, g->to, l->cols, err));
        goto out;
    }
    TV_TRY(tvk_cuda_sync(l->stream, err));
    TV_TRY(tvk_cuda_stage_down(&l->stage, t + g->from, l->cols, g->t, l->rows,
                               g->ldt, err));
    TV_TRY(spread_tiles(g, t, err));
out:
    return rc;
}

enum tv_err tvk_cuda_layer_obs(tvk_cuda_layer *l, float *t,
                               const struct tvk_obs *how, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t bytes = l->rows * l->cols * sizeof *t;
    const bool tiled = l->n_tiles > 0;

    assert(how->density >= 0 && how->density <= 1);
    assert(how->group == 0 || TVK_OBS_BLOCK % how->group == 0);
    if (bytes == 0)
        return TV_OK;
    if (!tiled)
        TV_TRY(tvk_cuda_upload(l->stream, l->m, t, bytes, err));
    for (size_t from = 0; from < l->cols; from += TVK_OBS_GROUP) {
        struct group g = {.l = l,
                          .how = how,
                          .from = from,
                          .to = tvk_cuda_least(from + TVK_OBS_GROUP, l->cols)};

        TV_TRY(prune_group(&g, t, err));
    }
    if (!tiled)
        TV_TRY(tvk_cuda_download(l->stream, t, l->m, bytes, err));
out:
    return tvk_cuda_layer_finish(l, rc, err);
}
