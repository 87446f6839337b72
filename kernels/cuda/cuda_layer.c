/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_layer.c - the Gram matrix of a layer's inputs, and tv/layer.h's work
 * with it, on the device: see tv/cuda_math.h and kernels/layer.c.
 *
 *   h    [cols, cols]   H, or its factor U
 *   m    the other operand: the packed triangle that becomes H; H in fp64 that
 *        becomes R, and a tile of R^-1 behind it; T in the loop, the tiles of
 *        refinement
 *   err  [rows, 512]    of the loop
 *
 * The loop asks nothing of the host: limits are searched, ties are counted and
 * strips are corrected by kernels, and the stream is waited for once, at the
 * end. U is the CPU's by the same reversal: the flat reversal of H is potrf's
 * operand, and R is inverted by solves with columns of the identity (cuBLAS has
 * no trtri for one matrix), which are rounded to fp32 as they are reversed
 * again. potrf and the solves are in fp64 (see gram_factor.c).
 */
#include "cuda/cuda_math_parts.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "cuda/cu_matrix.h"
#include "tv/alloc.h"

_Static_assert(TVK_CU_OBS_BLOCK == TVK_OBS_BLOCK, "blocks of columns");
_Static_assert(TVK_CU_OBS_LD == TVK_OBS_GROUP, "stride of errors");

#define STRIP    32u /* as kernels/layer.c */
#define THREADS  256u
#define GRID_MAX 4096u

/* ---- launching ----------------------------------------------------------- */

/* Enough blocks of `threads` for n items, which the kernel loops over. */
static enum tv_err over(tvk_cuda_stream *s, const char *name, uint64_t n,
                        unsigned threads, void *args, struct tv_error *err)
{
    const uint64_t blocks = (n + threads - 1) / threads;

    if (n == 0)
        return TV_OK;
    return tvk_cuda_launch(s, name,
                           blocks < GRID_MAX ? (unsigned)blocks : GRID_MAX, 1,
                           threads, 0, args, err);
}

static size_t min_size(size_t a, size_t b)
{
    return a < b ? a : b;
}

/* Floats behind an address. */
static tvk_cuda_ptr at_float(tvk_cuda_ptr p, size_t n)
{
    return p + n * sizeof(float);
}

/* ---- the Gram matrix ----------------------------------------------------- */

struct gram {
    tvk_cuda_math *m;
    const float *x;
    size_t ldx, rows, n;
    tvk_cuda_ptr chunk[2]; /* x as it lies, [CHUNK, ldx] */
    unsigned n_chunks;     /* buffers: one when there is no memory for two */
    size_t chunk_bytes;
    tvk_cuda_ptr product; /* [STRIP, n] */
    size_t product_bytes;
};

static size_t strip_entries(size_t n, size_t i0)
{
    const size_t ni = min_size(TVK_CUDA_GRAM_STRIP, n - i0);

    return ni * (n - i0) - ni * (ni - 1) / 2;
}

static enum tv_err gram_open(struct gram *g, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda *const d = g->m->device;
    const size_t rows = min_size(g->rows, TVK_CUDA_GRAM_CHUNK);

    g->chunk_bytes = ((rows - 1) * g->ldx + g->n) * sizeof(float);
    g->product_bytes =
        min_size(TVK_CUDA_GRAM_STRIP, g->n) * g->n * sizeof(float);
    TV_TRY(tvk_cuda_alloc(d, g->product_bytes, "a product of inputs", err,
                          &g->product));
    TV_TRY(tvk_cuda_alloc(d, g->chunk_bytes, "inputs of a layer", err,
                          &g->chunk[0]));
    g->n_chunks = 1;
    if (g->rows <= TVK_CUDA_GRAM_CHUNK)
        goto out;
    rc = tvk_cuda_alloc(d, g->chunk_bytes, "inputs of a layer", err,
                        &g->chunk[1]);
    if (rc == TV_OK)
        g->n_chunks = 2;
    if (rc == TV_E_BUDGET) {
        tv_error_clear(err);
        rc = TV_OK;
    }
out:
    return rc;
}

static void gram_close(struct gram *g)
{
    tvk_cuda *const d = g->m->device;

    /* Nobody may still read what is given back. */
    tvk_cuda_settle(g->m->copies);
    tvk_cuda_settle(g->m->stream);
    tvk_cuda_free(d, g->chunk[0], g->chunk_bytes);
    tvk_cuda_free(d, g->chunk[1], g->chunk_bytes);
    tvk_cuda_free(d, g->product, g->product_bytes);
}

/* Strips [from, to) of the matrix, whose sums begin at `sums`. Uploads run
 * beside the products of the chunk before. */
static enum tv_err gram_strips(struct gram *g, size_t from, size_t to,
                               tvk_cuda_ptr sums, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_stream *const s = g->m->stream;

    for (size_t row = 0, k = 0; row < g->rows;
         row += TVK_CUDA_GRAM_CHUNK, k++) {
        const size_t rows = min_size(TVK_CUDA_GRAM_CHUNK, g->rows - row);
        const tvk_cuda_ptr x = g->chunk[k % g->n_chunks];
        tvk_cuda_ptr to_sums = sums;

        if (g->n_chunks == 1)
            TV_TRY(tvk_cuda_sync(s, err));
        TV_TRY(tvk_cuda_upload(g->m->copies, x, g->x + row * g->ldx,
                               ((rows - 1) * g->ldx + g->n) * sizeof(float),
                               err));
        TV_TRY(tvk_cuda_sync(g->m->copies, err));
        /* The other buffer is free for the next chunk then. */
        TV_TRY(tvk_cuda_sync(s, err));
        for (size_t i0 = from; i0 < to; i0 += TVK_CUDA_GRAM_STRIP) {
            const size_t ni = min_size(TVK_CUDA_GRAM_STRIP, g->n - i0);
            const struct tvk_cuda_gemm p = {.trans_a = true,
                                            .m = ni,
                                            .n = g->n - i0,
                                            .k = rows,
                                            .alpha = 1.0f,
                                            .a = at_float(x, i0),
                                            .lda = g->ldx,
                                            .b = at_float(x, i0),
                                            .ldb = g->ldx,
                                            .c = g->product,
                                            .ldc = g->n - i0};
            struct tvk_cu_gram_sum sum = {.sums = tvk_cuda_address(to_sums),
                                          .product =
                                              tvk_cuda_address(g->product),
                                          .height = ni,
                                          .width = g->n - i0};

            TV_TRY(tvk_cuda_gemm(g->m, &p, err));
            TV_TRY(
                over(s, "tv_gram_sum", ni * (g->n - i0), THREADS, &sum, err));
            to_sums += strip_entries(g->n, i0) * sizeof(double);
        }
    }
out:
    return rc;
}

/* Sums on the host come and go strip by strip. */
static enum tv_err gram_on_host(struct gram *g, double *sums,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda *const d = g->m->device;
    const size_t bytes = strip_entries(g->n, 0) * sizeof(double);
    tvk_cuda_ptr strip = 0;

    TV_TRY(tvk_cuda_alloc(d, bytes, "sums of inputs", err, &strip));
    for (size_t i0 = 0; i0 < g->n; i0 += TVK_CUDA_GRAM_STRIP) {
        const size_t n = strip_entries(g->n, i0);

        TV_TRY(
            tvk_cuda_upload(g->m->stream, strip, sums, n * sizeof *sums, err));
        TV_TRY(gram_strips(g, i0, min_size(i0 + TVK_CUDA_GRAM_STRIP, g->n),
                           strip, err));
        TV_TRY(tvk_cuda_download(g->m->stream, sums, strip, n * sizeof *sums,
                                 err));
        TV_TRY(tvk_cuda_sync(g->m->stream, err));
        sums += n;
    }
out:
    if (rc != TV_OK)
        tvk_cuda_settle(g->m->stream);
    tvk_cuda_free(d, strip, bytes);
    return rc;
}

enum tv_err tvk_cuda_gram_add(tvk_cuda_math *m, double *sums, tvk_cuda_ptr at,
                              const float *x, size_t ldx, size_t rows, size_t n,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct gram g = {.m = m, .x = x, .ldx = ldx, .rows = rows, .n = n};

    if (rows == 0 || n == 0)
        return TV_OK;
    TV_TRY(gram_open(&g, err));
    if (at != 0) {
        TV_TRY(gram_strips(&g, 0, n, at, err));
        TV_TRY(tvk_cuda_sync(m->stream, err));
    } else {
        TV_TRY(gram_on_host(&g, sums, err));
    }
out:
    gram_close(&g);
    return rc;
}

/* ---- one layer ----------------------------------------------------------- */

struct tvk_cuda_layer {
    tvk_cuda_math *math;
    tvk_cuda *device;
    tvk_cuda_stream *stream;
    size_t rows, cols;
    tvk_cuda_ptr h, m, err, small;
    size_t h_bytes, m_bytes, err_bytes, small_bytes;
    /* parts of small */
    tvk_cuda_ptr diagonal, buckets, equal, limit, info, doubles;
};

/* Room for potrf's own workspace; what it asks for is taken from the budget. */
#define SOLVER_LEAST ((uint64_t)16 << 20)
/* A tile of refinement: T, P, residual, direction, its product; keep. */
#define TILE_ARRAYS  5u
/* Columns of R^-1 that one solve makes. */
#define INVERSE_COLS 256u

static uint64_t m_floats(size_t rows, size_t cols)
{
    const uint64_t square =
        2 * ((uint64_t)cols * cols + (uint64_t)INVERSE_COLS * cols);
    const uint64_t t = (uint64_t)rows * cols;
    const uint64_t tile =
        ((uint64_t)TILE_ARRAYS * TVK_CUDA_CG_ROWS + TVK_CUDA_CG_ROWS / 4) *
        cols;
    const uint64_t most = square > t ? square : t;

    return most > tile ? most : tile;
}

static uint64_t aligned(uint64_t bytes)
{
    return (bytes + 255) / 256 * 256;
}

static uint64_t small_size(size_t rows, size_t cols)
{
    return aligned(cols * sizeof(float)) +
           aligned(TVK_CU_OBS_BUCKETS * sizeof(uint32_t)) +
           aligned(rows * sizeof(uint32_t)) + 2 * aligned(8) +
           aligned(3 * TVK_CUDA_CG_ROWS * sizeof(double));
}

uint64_t tvk_cuda_layer_bytes(size_t rows, size_t cols)
{
    return ((uint64_t)cols * cols + m_floats(rows, cols) +
            (uint64_t)rows * TVK_OBS_GROUP) *
               sizeof(float) +
           small_size(rows, cols) + SOLVER_LEAST;
}

static tvk_cuda_ptr carve(tvk_cuda_ptr *at, size_t bytes)
{
    const tvk_cuda_ptr mine = *at;

    *at += aligned(bytes);
    return mine;
}

enum tv_err tvk_cuda_layer_open(tvk_cuda *d, size_t rows, size_t cols,
                                struct tv_error *err, tvk_cuda_layer **out)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_layer *l = tv_calloc(1, sizeof *l);

    assert(cols <= TVK_LAYER_COLS);
    *out = NULL;
    if (l == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    l->device = d;
    l->rows = rows;
    l->cols = cols;
    l->h_bytes = cols * cols * sizeof(float);
    l->m_bytes = (size_t)m_floats(rows, cols) * sizeof(float);
    l->err_bytes = rows * TVK_OBS_GROUP * sizeof(float);
    l->small_bytes = (size_t)small_size(rows, cols);
    TV_TRY(tvk_cuda_math_of(d, err, &l->math));
    l->stream = l->math->stream;
    TV_TRY(tvk_cuda_alloc(d, l->h_bytes, "X^T X of a layer", err, &l->h));
    TV_TRY(tvk_cuda_alloc(d, l->m_bytes, "a layer", err, &l->m));
    TV_TRY(tvk_cuda_alloc(d, l->err_bytes, "errors of a layer", err, &l->err));
    TV_TRY(tvk_cuda_alloc(d, l->small_bytes, "a layer", err, &l->small));
    tvk_cuda_ptr at = l->small;
    l->diagonal = carve(&at, cols * sizeof(float));
    l->buckets = carve(&at, TVK_CU_OBS_BUCKETS * sizeof(uint32_t));
    l->equal = carve(&at, rows * sizeof(uint32_t));
    l->limit = carve(&at, sizeof(struct tvk_cu_obs_limit));
    l->info = carve(&at, sizeof(int));
    l->doubles = carve(&at, 3 * TVK_CUDA_CG_ROWS * sizeof(double));
    *out = l;
    l = NULL;
out:
    tvk_cuda_layer_close(l);
    return rc;
}

void tvk_cuda_layer_close(tvk_cuda_layer *l)
{
    if (l == NULL)
        return;
    /* All calls wait for the stream: nobody uses the memory. */
    tvk_cuda_free(l->device, l->h, l->h_bytes);
    tvk_cuda_free(l->device, l->m, l->m_bytes);
    tvk_cuda_free(l->device, l->err, l->err_bytes);
    tvk_cuda_free(l->device, l->small, l->small_bytes);
    tv_free(l);
}

static enum tv_err unpack(tvk_cuda_layer *l, const float *packed,
                          const float *diagonal, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n = l->cols;
    struct tvk_cu_unpack a = {
        .h = tvk_cuda_address(l->h),
        .packed = tvk_cuda_address(l->m),
        .diagonal = diagonal ? tvk_cuda_address(l->diagonal) : NULL,
        .n = n};

    TV_TRY(tvk_cuda_upload(l->stream, l->m, packed,
                           n * (n + 1) / 2 * sizeof *packed, err));
    if (diagonal)
        TV_TRY(tvk_cuda_upload(l->stream, l->diagonal, diagonal,
                               n * sizeof *diagonal, err));
    TV_TRY(over(l->stream, "tv_unpack", n * n, THREADS, &a, err));
out:
    return rc;
}

/* The host's memory may change again. */
static enum tv_err finish(tvk_cuda_layer *l, enum tv_err rc,
                          struct tv_error *err)
{
    if (rc == TV_OK)
        return tvk_cuda_sync(l->stream, err);
    tvk_cuda_settle(l->stream);
    return rc;
}

static enum tv_err take_diagonal(tvk_cuda_layer *l, struct tv_error *err)
{
    struct tvk_cu_square a = {.dst = tvk_cuda_address(l->diagonal),
                              .src = tvk_cuda_address(l->h),
                              .n = l->cols};

    return over(l->stream, "tv_diagonal", l->cols, THREADS, &a, err);
}

enum tv_err tvk_cuda_layer_gram(tvk_cuda_layer *l, const float *packed,
                                const float *diagonal, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    if (l->cols == 0)
        return TV_OK;
    TV_TRY(unpack(l, packed, diagonal, err));
    TV_TRY(take_diagonal(l, err));
out:
    return finish(l, rc, err);
}

static enum tv_err potrf(tvk_cuda_layer *l, int *info, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_math *const m = l->math;
    double *const a = tvk_cuda_address(l->m);
    const int n = (int)l->cols;
    int n_work = 0;
    tvk_cuda_ptr work = 0;

    *info = 0;
    TV_TRY(tvk_cuda_enter(l->device, err));
    TV_TRY(tvk_cuda_solver_done(m,
                                (int)m->solver->dpotrf_size(m->solver_handle,
                                                            TVK_CB_UPPER, n, a,
                                                            n, &n_work),
                                "cusolverDnDpotrf_bufferSize", err));
    TV_TRY(tvk_cuda_alloc(l->device, (size_t)n_work * sizeof(double),
                          "the workspace of cuSOLVER", err, &work));
    /* Upper by columns is ours, lower, by rows. */
    TV_TRY(tvk_cuda_solver_done(
        m,
        (int)m->solver->dpotrf(m->solver_handle, TVK_CB_UPPER, n, a, n,
                               tvk_cuda_address(work), n_work,
                               tvk_cuda_address(l->info)),
        "cusolverDnDpotrf", err));
    TV_TRY(tvk_cuda_download(l->stream, info, l->info, sizeof *info, err));
    TV_TRY(tvk_cuda_sync(l->stream, err));
out:
    if (rc != TV_OK)
        tvk_cuda_settle(l->stream);
    tvk_cuda_free(l->device, work, (size_t)n_work * sizeof(double));
    return rc;
}

/* U from R, tile by tile. */
static enum tv_err invert(tvk_cuda_layer *l, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_math *const m = l->math;
    const size_t n = l->cols;
    const double one = 1.0;
    struct tvk_cu_inverse a = {
        .tile = tvk_cuda_address(l->m + n * n * sizeof(double)),
        .u = tvk_cuda_address(l->h),
        .n = n};

    for (size_t from = 0; from < n; from += INVERSE_COLS) {
        const size_t to = min_size(from + INVERSE_COLS, n);

        a.from = from;
        a.to = to;
        TV_TRY(over(l->stream, "tv_unit", (to - from) * to, THREADS, &a, err));
        TV_TRY(tvk_cuda_blas_done(
            m,
            (int)m->blas->dtrsm(m->blas_handle, TVK_CB_LEFT, TVK_CB_UPPER,
                                TVK_CB_N, TVK_CB_NON_UNIT, (int)to,
                                (int)(to - from), &one, tvk_cuda_address(l->m),
                                (int)n, a.tile, (int)to),
            "cublasDtrsm", err));
        TV_TRY(over(l->stream, "tv_take", (to - from) * n, THREADS, &a, err));
    }
out:
    return rc;
}

enum tv_err tvk_cuda_layer_factor(tvk_cuda_layer *l, bool *definite,
                                  float *u_diagonal, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n = l->cols;
    struct tvk_cu_wide flip = {
        .dst = tvk_cuda_address(l->m), .src = tvk_cuda_address(l->h), .n = n};
    float *diagonal = NULL;
    int info = 0;

    *definite = true;
    if (n == 0)
        return TV_OK;
    diagonal = tv_alloc(n * sizeof *diagonal);
    if (diagonal == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    TV_TRY(over(l->stream, "tv_flip", n * n, THREADS, &flip, err));
    TV_TRY(potrf(l, &info, err));
    if (info != 0) {
        *definite = false;
        goto out;
    }
    TV_TRY(invert(l, err));
    TV_TRY(take_diagonal(l, err));
    TV_TRY(tvk_cuda_download(l->stream, diagonal, l->diagonal,
                             n * sizeof *diagonal, err));
    TV_TRY(tvk_cuda_sync(l->stream, err));
    /* A NaN always reaches the diagonal. */
    for (size_t j = 0; j < n && *definite; j++)
        *definite = isfinite(diagonal[j]) && diagonal[j] > 0;
    if (u_diagonal && *definite)
        memcpy(u_diagonal, diagonal, n * sizeof *diagonal);
out:
    if (rc != TV_OK)
        tvk_cuda_settle(l->stream);
    tv_free(diagonal);
    return rc;
}

/* ---- the loop ------------------------------------------------------------ */

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
        TV_TRY(over(l->stream, "tv_obs_count", n, THREADS, a, err));
        TV_TRY(
            over(l->stream, "tv_obs_find", TVK_CU_FIND, TVK_CU_FIND, a, err));
    }
    if (a->n_prune > 0) {
        TV_TRY(over(l->stream, "tv_obs_equal", n, THREADS, a, err));
        TV_TRY(
            over(l->stream, "tv_obs_scan", TVK_CU_FIND, TVK_CU_FIND, a, err));
    }
    TV_TRY(over(l->stream, "tv_obs_mark", a->rows, TVK_CU_ROWS, a, err));
out:
    return rc;
}

/* As `spread` of kernels/layer.c. */
static enum tv_err spread(tvk_cuda_layer *l, size_t origin, size_t from,
                          size_t to, size_t end, struct tv_error *err)
{
    const struct tvk_cuda_gemm g = {.m = l->rows,
                                    .n = end > to ? end - to : 0,
                                    .k = to - from,
                                    .alpha = -1.0f,
                                    .beta = 1.0f,
                                    .a = at_float(l->err, from - origin),
                                    .lda = TVK_OBS_GROUP,
                                    .b = at_float(l->h, from * l->cols + to),
                                    .ldb = l->cols,
                                    .c = at_float(l->m, to),
                                    .ldc = l->cols};

    return tvk_cuda_gemm(l->math, &g, err);
}

static enum tv_err block(tvk_cuda_layer *l, size_t g, size_t i,
                         const struct tvk_obs *how, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t end = min_size(i + TVK_OBS_BLOCK, l->cols);
    const size_t strip = how->group > STRIP ? TVK_OBS_BLOCK : STRIP;
    struct tvk_cu_obs a = {
        .t = tvk_cuda_address(at_float(l->m, i)),
        .u = tvk_cuda_address(at_float(l->h, i * l->cols + i)),
        .err = tvk_cuda_address(at_float(l->err, i - g)),
        .buckets = tvk_cuda_address(l->buckets),
        .equal = tvk_cuda_address(l->equal),
        .limit = tvk_cuda_address(l->limit),
        .rows = l->rows,
        .cols = l->cols,
        .width = (uint32_t)(end - i),
        .group = how->group,
        .n_pruned = how->n_pruned};

    if (how->group == 0)
        TV_TRY(mark_block(l, &a, how->density, err));
    for (size_t s = i; s < end; s += strip) {
        const size_t s_end = min_size(s + strip, end);

        a.from = (uint32_t)(s - i);
        a.to = (uint32_t)(s_end - i);
        TV_TRY(over(l->stream, "tv_obs_strip", a.rows, TVK_CU_ROWS, &a, err));
        TV_TRY(spread(l, g, s, s_end, end, err));
    }
out:
    return rc;
}

enum tv_err tvk_cuda_layer_obs(tvk_cuda_layer *l, float *t,
                               const struct tvk_obs *how, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t bytes = l->rows * l->cols * sizeof *t;

    assert(how->density >= 0 && how->density <= 1);
    assert(how->group == 0 || TVK_OBS_BLOCK % how->group == 0);
    if (bytes == 0)
        return TV_OK;
    TV_TRY(tvk_cuda_upload(l->stream, l->m, t, bytes, err));
    for (size_t g = 0; g < l->cols; g += TVK_OBS_GROUP) {
        const size_t g_end = min_size(g + TVK_OBS_GROUP, l->cols);

        for (size_t i = g; i < g_end; i += TVK_OBS_BLOCK) {
            TV_TRY(block(l, g, i, how, err));
            TV_TRY(spread(l, g, i, min_size(i + TVK_OBS_BLOCK, l->cols), g_end,
                          err));
        }
        TV_TRY(spread(l, g, g, g_end, l->cols, err));
    }
    TV_TRY(tvk_cuda_download(l->stream, t, l->m, bytes, err));
out:
    return finish(l, rc, err);
}

/* ---- refinement ---------------------------------------------------------- */

/* Array i of a tile. */
static tvk_cuda_ptr tile(const tvk_cuda_layer *l, unsigned i)
{
    return at_float(l->m, (size_t)i * TVK_CUDA_CG_ROWS * l->cols);
}

/* y [rows, cols] = x h */
static enum tv_err times_gram(tvk_cuda_layer *l, tvk_cuda_ptr y, tvk_cuda_ptr x,
                              size_t rows, struct tv_error *err)
{
    const struct tvk_cuda_gemm g = {.m = rows,
                                    .n = l->cols,
                                    .k = l->cols,
                                    .alpha = 1.0f,
                                    .a = x,
                                    .lda = l->cols,
                                    .b = l->h,
                                    .ldb = l->cols,
                                    .c = y,
                                    .ldc = l->cols};

    return tvk_cuda_gemm(l->math, &g, err);
}

enum tv_err tvk_cuda_layer_refine(tvk_cuda_layer *l, float *p, const float *t,
                                  size_t rows, unsigned n_steps,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t bytes = rows * l->cols * sizeof *p;
    double *const doubles = tvk_cuda_address(l->doubles);
    struct tvk_cu_cg a = {.p = tvk_cuda_address(tile(l, 0)),
                          .t = tvk_cuda_address(tile(l, 1)),
                          .res = tvk_cuda_address(tile(l, 2)),
                          .dir = tvk_cuda_address(tile(l, 3)),
                          .dir_h = tvk_cuda_address(tile(l, 4)),
                          .diagonal = tvk_cuda_address(l->diagonal),
                          .keep = tvk_cuda_address(tile(l, 5)),
                          .first = doubles,
                          .rz = doubles + 2 * TVK_CUDA_CG_ROWS,
                          .rz_next = doubles + TVK_CUDA_CG_ROWS,
                          .rows = rows,
                          .cols = l->cols};

    assert(rows <= TVK_CUDA_CG_ROWS);
    if (bytes == 0)
        return TV_OK;
    TV_TRY(tvk_cuda_upload(l->stream, tile(l, 0), p, bytes, err));
    TV_TRY(tvk_cuda_upload(l->stream, tile(l, 1), t, bytes, err));
    TV_TRY(over(l->stream, "tv_cg_begin", rows * l->cols, THREADS, &a, err));
    TV_TRY(times_gram(l, tile(l, 2), tile(l, 3), rows, err));
    TV_TRY(over(l->stream, "tv_cg_first", rows * TVK_CU_LINE, TVK_CU_LINE, &a,
                err));
    for (unsigned step = 0; step < n_steps; step++) {
        double *const before = a.rz_next;

        a.rz_next = doubles + (step % 2 == 0 ? 2 : 1) * TVK_CUDA_CG_ROWS;
        a.rz = before;
        TV_TRY(times_gram(l, tile(l, 4), tile(l, 3), rows, err));
        TV_TRY(over(l->stream, "tv_cg_step", rows * TVK_CU_LINE, TVK_CU_LINE,
                    &a, err));
    }
    TV_TRY(tvk_cuda_download(l->stream, p, tile(l, 0), bytes, err));
out:
    return finish(l, rc, err);
}

enum tv_err tvk_cuda_layer_product(tvk_cuda_layer *l, const float *t,
                                   const float *p, size_t rows, double *tt,
                                   double *tp, double *pp, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t bytes = rows * l->cols * sizeof *p;
    double sums[3 * TVK_CUDA_CG_ROWS];
    struct tvk_cu_traces a = {.t = tvk_cuda_address(tile(l, 0)),
                              .p = tvk_cuda_address(tile(l, 1)),
                              .th = tvk_cuda_address(tile(l, 2)),
                              .ph = tvk_cuda_address(tile(l, 3)),
                              .sums = tvk_cuda_address(l->doubles),
                              .cols = l->cols};

    assert(rows <= TVK_CUDA_CG_ROWS);
    if (bytes == 0)
        return TV_OK;
    TV_TRY(tvk_cuda_upload(l->stream, tile(l, 0), t, bytes, err));
    TV_TRY(tvk_cuda_upload(l->stream, tile(l, 1), p, bytes, err));
    TV_TRY(times_gram(l, tile(l, 2), tile(l, 0), rows, err));
    TV_TRY(times_gram(l, tile(l, 3), tile(l, 1), rows, err));
    TV_TRY(
        over(l->stream, "tv_traces", rows * TVK_CU_LINE, TVK_CU_LINE, &a, err));
    TV_TRY(tvk_cuda_download(l->stream, sums, l->doubles,
                             rows * 3 * sizeof *sums, err));
    TV_TRY(tvk_cuda_sync(l->stream, err));
    for (size_t r = 0; r < rows; r++) {
        *tt += sums[3 * r];
        *tp += sums[3 * r + 1];
        *pp += sums[3 * r + 2];
    }
out:
    /* The sums are on our stack. */
    if (rc != TV_OK)
        tvk_cuda_settle(l->stream);
    return rc;
}
