/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_layer.c - the Gram matrix of a layer's inputs, and tv/layer.h's work
 * with it, on the device: see tv/cuda_math.h, kernels/layer.c and cuda_obs.c.
 *
 *   h    [cols, cols]   H, or its factor U; or a panel of rows of what the host
 *        has of them
 *   m    the other operand: the packed triangle that becomes H; H in fp64 that
 *        becomes R, and a tile of R^-1 behind it; T in the loop, or tiles of
 *        it; the tiles of refinement
 *   err  [rows, 512]    of the loop
 *
 * Products are cut the same way whether their operands are there as a whole or
 * not, so that no bit depends on the memory: 512 rows of T, 2,048 of H. But
 * whether the factor is made here at all does; see tvk_cuda_layer_factors.
 *
 * U is the CPU's by the same reversal: the flat reversal of H is potrf's
 * operand, and R is inverted by solves with columns of the identity (cuBLAS has
 * no trtri for one matrix), which are rounded to fp32 as they are reversed
 * again. potrf and the solves are in fp64 (see gram_factor.c).
 */
#include "cuda/cuda_layer_parts.h"

#include <assert.h>
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "cuda/cu_matrix.h"
#include "tv/alloc.h"

/* ---- the Gram matrix ----------------------------------------------------- */

/* Products are [STRIP, COLS] at most, whatever the memory: no bit depends on
 * it.
 *
 *         j0      COLS
 *     +--------+--------+---+   sums of a strip's rows, packed, are on the
 *  i0 |\\ strip            |   device as a whole or, where they come from the
 *     | \\      |        |   |   host and have no room, fewer at a time: then
 *     +--\\-----+--------+---+   each product is made once for every part
 */
struct gram {
    tvk_cuda_math *m;
    tvk_cuda_ptr x, work;
    size_t ldx, rows, n;
};

/* Rows of sums that go to the device at a time, at least. */
#define GRAM_LEAST 64u

static size_t strip_rows(const struct gram *g, size_t i0)
{
    return tvk_cuda_least(TVK_CUDA_GRAM_STRIP, g->n - i0);
}

/* Entries of `rows` packed rows, of which the first has n. */
static size_t packed_entries(size_t rows, size_t n)
{
    return rows * n - rows * (rows - (rows > 0)) / 2;
}

size_t tvk_cuda_gram_work(size_t n)
{
    return tvk_cuda_least(TVK_CUDA_GRAM_STRIP, n) *
           tvk_cuda_least(TVK_CUDA_GRAM_COLS, n) * sizeof(float);
}

uint64_t tvk_cuda_gram_least(size_t n)
{
    return tvk_cuda_gram_work(n) +
           packed_entries(tvk_cuda_least(GRAM_LEAST, n), n) * sizeof(double);
}

/* Adds to rows [first, first + height) of the strip at i0, whose packed sums
 * begin at `sums`. */
static enum tv_err gram_rows(const struct gram *g, size_t i0, size_t first,
                             size_t height, tvk_cuda_ptr sums,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    for (size_t row = 0; row < g->rows; row += TVK_CUDA_GRAM_CHUNK) {
        const tvk_cuda_ptr x = tvk_cuda_float(g->x, row * g->ldx);

        for (size_t j0 = i0; j0 < g->n; j0 += TVK_CUDA_GRAM_COLS) {
            const size_t nj = tvk_cuda_least(TVK_CUDA_GRAM_COLS, g->n - j0);
            const struct tvk_cuda_gemm p = {
                .trans_a = true,
                .m = strip_rows(g, i0),
                .n = nj,
                .k = tvk_cuda_least(TVK_CUDA_GRAM_CHUNK, g->rows - row),
                .alpha = 1.0f,
                .a = tvk_cuda_float(x, i0),
                .lda = g->ldx,
                .b = tvk_cuda_float(x, j0),
                .ldb = g->ldx,
                .c = g->work,
                .ldc = nj};
            struct tvk_cu_gram_sum sum = {
                .sums = tvk_cuda_address(sums),
                .product =
                    tvk_cuda_address(tvk_cuda_float(g->work, first * nj)),
                .height = height,
                .width = nj,
                .row = i0 + first,
                .col = j0,
                .n = g->n};

            if (j0 + nj <= sum.row) /* left of the diagonal */
                continue;
            TV_TRY(tvk_cuda_gemm(g->m, &p, err));
            TV_TRY(tvk_cuda_over(g->m->stream, "tv_gram_sum", height * nj,
                                 TVK_CUDA_THREADS, &sum, err));
        }
    }
out:
    return rc;
}

/* Room for packed rows of a strip, fewer of them where there is little. */
static enum tv_err gram_room(const struct gram *g, size_t *rows, size_t *bytes,
                             tvk_cuda_ptr *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    *rows = strip_rows(g, 0);
    for (;; *rows = *rows / 2 < GRAM_LEAST ? GRAM_LEAST : *rows / 2) {
        *bytes = packed_entries(*rows, g->n) * sizeof(double);
        rc = tvk_cuda_alloc(g->m->device, *bytes, "sums of inputs", err, out);
        if (rc != TV_E_BUDGET || *rows <= GRAM_LEAST)
            return rc;
        tv_error_clear(err);
    }
}

/* Sums on the host come and go. */
static enum tv_err gram_on_host(const struct gram *g, double *sums,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_stream *const s = g->m->stream;
    size_t each = 0, bytes = 0;
    tvk_cuda_ptr there = 0;

    TV_TRY(gram_room(g, &each, &bytes, &there, err));
    for (size_t i0 = 0; i0 < g->n; i0 += TVK_CUDA_GRAM_STRIP)
        for (size_t f = 0; f < strip_rows(g, i0); f += each) {
            const size_t h = tvk_cuda_least(each, strip_rows(g, i0) - f);
            const size_t n = packed_entries(h, g->n - i0 - f);

            TV_TRY(tvk_cuda_upload(s, there, sums, n * sizeof *sums, err));
            TV_TRY(gram_rows(g, i0, f, h, there, err));
            TV_TRY(tvk_cuda_download(s, sums, there, n * sizeof *sums, err));
            TV_TRY(tvk_cuda_sync(s, err));
            sums += n;
        }
out:
    if (rc != TV_OK)
        tvk_cuda_settle(s);
    tvk_cuda_free(g->m->device, there, bytes);
    return rc;
}

enum tv_err tvk_cuda_gram_add(tvk_cuda_math *m, double *sums, tvk_cuda_ptr at,
                              tvk_cuda_ptr work, tvk_cuda_ptr x, size_t ldx,
                              size_t rows, size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct gram g = {m, x, work, ldx, rows, n};

    if (rows == 0 || n == 0)
        return TV_OK;
    if (at == 0)
        return gram_on_host(&g, sums, err);
    for (size_t i0 = 0; i0 < n; i0 += TVK_CUDA_GRAM_STRIP) {
        const size_t ni = strip_rows(&g, i0);

        TV_TRY(gram_rows(&g, i0, 0, ni, at, err));
        at += packed_entries(ni, n - i0) * sizeof(double);
    }
out:
    return rc;
}

/* ---- one layer ----------------------------------------------------------- */

/* Room for potrf's own workspace, which lies in H's place where it has so much;
 * what it asks for beyond is taken from the budget. */
#define SOLVER_LEAST ((uint64_t)16 << 20)
/* A tile of refinement: T, P, residual, direction, its product; keep. */
#define TILE_ARRAYS  5u
/* Columns of R^-1 that one solve makes. */
#define INVERSE_COLS 256u

/* Rows of H that one product takes, and most of H or U that a panel holds. */
#define PANEL        2048u
/* Rows of T that the stage holds. */
#define STAGE_ROWS   64u

/* Where T is: there as a whole; in tiles, two that take turns, or one. */
static const unsigned ways[] = {0, 2, 1};
#define N_WAYS (sizeof ways / sizeof *ways)

static uint64_t h_floats(size_t cols, bool on_host)
{
    return (uint64_t)cols * (on_host && cols > PANEL ? PANEL : cols);
}

static uint64_t m_floats(size_t rows, size_t cols, bool on_host,
                         unsigned n_tiles)
{
    const uint64_t square =
        on_host ? 0
                : 2 * ((uint64_t)cols * cols + (uint64_t)INVERSE_COLS * cols);
    const uint64_t t =
        n_tiles == 0 ? (uint64_t)rows * cols
                     : (uint64_t)rows * TVK_OBS_GROUP +
                           (uint64_t)n_tiles *
                               tvk_cuda_least(rows, TVK_CUDA_CG_ROWS) * cols;
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

static uint64_t layer_bytes(size_t rows, size_t cols, bool on_host,
                            unsigned n_tiles)
{
    const uint64_t h = h_floats(cols, on_host) * sizeof(float);

    return h +
           (m_floats(rows, cols, on_host, n_tiles) +
            (uint64_t)rows * TVK_OBS_GROUP) *
               sizeof(float) +
           small_size(rows, cols) +
           (on_host || h >= SOLVER_LEAST ? 0 : SOLVER_LEAST);
}

static uint64_t least_bytes(const tvk_cuda *d, size_t rows, size_t cols,
                            bool on_host)
{
    uint64_t least = UINT64_MAX;

    for (size_t i = 0; i < N_WAYS; i++) {
        const uint64_t bytes = layer_bytes(rows, cols, on_host, ways[i]);

        least = bytes < least ? bytes : least;
    }
    return least + tvk_cuda_workspace(d);
}

uint64_t tvk_cuda_layer_bytes(const tvk_cuda *d, size_t rows, size_t cols)
{
    return layer_bytes(rows, cols, false, 0) + tvk_cuda_workspace(d);
}

/* By a budget, which stays what it is, not by what is left of it. */
bool tvk_cuda_layer_factors(const tvk_cuda *d, size_t rows, size_t cols)
{
    return least_bytes(d, rows, cols, false) <= d->info.factor_bytes;
}

uint64_t tvk_cuda_layer_least(const tvk_cuda *d, size_t rows, size_t cols)
{
    return least_bytes(d, rows, cols, !tvk_cuda_layer_factors(d, rows, cols));
}

size_t tvk_cuda_layer_staging(size_t cols)
{
    return 2 * (size_t)STAGE_ROWS * cols * sizeof(float);
}

static tvk_cuda_ptr carve(tvk_cuda_ptr *at, size_t bytes)
{
    const tvk_cuda_ptr mine = *at;

    *at += aligned(bytes);
    return mine;
}

/* Owned by the layer; what is there already is let go by the caller. */
static enum tv_err take_memory(tvk_cuda_layer *l, unsigned n_tiles,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda *const d = l->device;

    l->n_tiles = n_tiles;
    l->h_bytes = (size_t)h_floats(l->cols, l->on_host) * sizeof(float);
    l->m_bytes =
        (size_t)m_floats(l->rows, l->cols, l->on_host, n_tiles) * sizeof(float);
    l->err_bytes = l->rows * TVK_OBS_GROUP * sizeof(float);
    l->small_bytes = (size_t)small_size(l->rows, l->cols);
    TV_TRY(tvk_cuda_alloc(d, l->h_bytes, "X^T X of a layer", err, &l->h));
    TV_TRY(tvk_cuda_alloc(d, l->m_bytes, "a layer", err, &l->m));
    TV_TRY(tvk_cuda_alloc(d, l->err_bytes, "errors of a layer", err, &l->err));
    TV_TRY(tvk_cuda_alloc(d, l->small_bytes, "a layer", err, &l->small));
out:
    return rc;
}

static void give_memory(tvk_cuda_layer *l)
{
    /* All calls wait for the stream: nobody uses the memory. */
    tvk_cuda_free(l->device, l->h, l->h_bytes);
    tvk_cuda_free(l->device, l->m, l->m_bytes);
    tvk_cuda_free(l->device, l->err, l->err_bytes);
    tvk_cuda_free(l->device, l->small, l->small_bytes);
    l->h = l->m = l->err = l->small = 0;
}

/* The first way that there is memory for. */
static enum tv_err choose_way(tvk_cuda_layer *l, struct tv_error *err)
{
    enum tv_err rc = TV_E_BUDGET;
    uint64_t least = UINT64_MAX;

    for (size_t i = 0; i < N_WAYS && rc == TV_E_BUDGET; i++) {
        const uint64_t bytes =
            layer_bytes(l->rows, l->cols, l->on_host, ways[i]);
        const uint64_t left = tvk_cuda_left(l->device);

        if (bytes >= least)
            continue;
        least = bytes;
        tv_error_clear(err);
        if (bytes > left) {
            rc = tv_error_set(err, TV_E_BUDGET,
                              "a layer [%zu, %zu] needs %" PRIu64
                              " bytes of device memory, %" PRIu64
                              " are left (--device-memory)",
                              l->rows, l->cols, bytes, left);
            continue;
        }
        rc = take_memory(l, ways[i], err);
        if (rc != TV_OK)
            give_memory(l);
    }
    return rc;
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
    l->on_host = !tvk_cuda_layer_factors(d, rows, cols);
    TV_TRY(tvk_cuda_math_of(d, err, &l->math));
    l->stream = l->math->stream;
    TV_TRY(choose_way(l, err));
    if (cols > 0 && (l->on_host || l->n_tiles > 0))
        TV_TRY(
            tvk_cuda_stage_open(d, (size_t)STAGE_ROWS * cols, err, &l->stage));
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
    tvk_cuda_stage_close(&l->stage);
    give_memory(l);
    tv_free(l);
}

bool tvk_cuda_layer_on_host(const tvk_cuda_layer *l)
{
    return l->on_host;
}

unsigned tvk_cuda_layer_tiles(const tvk_cuda_layer *l)
{
    return l->n_tiles;
}

/* ---- H and U ------------------------------------------------------------- */

enum tv_err tvk_cuda_layer_square(tvk_cuda_layer *l, const float *square,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    float *const diagonal = l->stage.host[0];

    assert(l->on_host);
    l->square = square;
    l->from = l->to = 0;
    if (l->cols == 0)
        return TV_OK;
    for (size_t j = 0; j < l->cols; j++)
        diagonal[j] = square[j * l->cols + j];
    TV_TRY(tvk_cuda_upload(l->stream, l->diagonal, diagonal,
                           l->cols * sizeof *diagonal, err));
out:
    return tvk_cuda_layer_finish(l, rc, err);
}

enum tv_err tvk_cuda_layer_panel(tvk_cuda_layer *l, size_t from, size_t to,
                                 struct tv_error *err, tvk_cuda_ptr *at)
{
    enum tv_err rc = TV_OK;

    *at = tvk_cuda_float(l->h, from * l->cols);
    if (!l->on_host)
        return TV_OK;
    if (from < l->from || to > l->to) {
        /* What it may take, as much of it as there is. */
        const size_t n = tvk_cuda_least(PANEL, l->cols - from);

        assert(to - from <= n && l->square);
        l->from = l->to = 0;
        TV_TRY(tvk_cuda_sync(l->stream, err)); /* who used the one before */
        TV_TRY(tvk_cuda_stage_up(&l->stage, l->h, l->square + from * l->cols,
                                 l->cols, n, l->cols, err));
        l->from = from;
        l->to = from + n;
    }
    *at = tvk_cuda_float(l->h, (from - l->from) * l->cols);
out:
    return rc;
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
    TV_TRY(tvk_cuda_over(l->stream, "tv_unpack", n * n, TVK_CUDA_THREADS, &a,
                         err));
out:
    return rc;
}

enum tv_err tvk_cuda_layer_finish(tvk_cuda_layer *l, enum tv_err rc,
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

    return tvk_cuda_over(l->stream, "tv_diagonal", l->cols, TVK_CUDA_THREADS,
                         &a, err);
}

enum tv_err tvk_cuda_layer_gram(tvk_cuda_layer *l, const float *packed,
                                const float *diagonal, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    assert(!l->on_host);
    if (l->cols == 0)
        return TV_OK;
    TV_TRY(unpack(l, packed, diagonal, err));
    TV_TRY(take_diagonal(l, err));
out:
    return tvk_cuda_layer_finish(l, rc, err);
}

static enum tv_err potrf(tvk_cuda_layer *l, int *info, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_math *const m = l->math;
    double *const a = tvk_cuda_address(l->m);
    const int n = (int)l->cols;
    int n_work = 0;
    tvk_cuda_ptr more = 0;

    *info = 0;
    TV_TRY(tvk_cuda_enter(l->device, err));
    TV_TRY(tvk_cuda_solver_done(m,
                                (int)m->solver->dpotrf_size(m->solver_handle,
                                                            TVK_CB_UPPER, n, a,
                                                            n, &n_work),
                                "cusolverDnDpotrf_bufferSize", err));
    /* H's own place is free from here on, and enough for large layers. */
    const size_t bytes = (size_t)n_work * sizeof(double);
    if (bytes > l->h_bytes)
        TV_TRY(tvk_cuda_alloc(l->device, bytes, "the workspace of cuSOLVER",
                              err, &more));
    /* Upper by columns is ours, lower, by rows. */
    TV_TRY(tvk_cuda_solver_done(
        m,
        (int)m->solver->dpotrf(m->solver_handle, TVK_CB_UPPER, n, a, n,
                               tvk_cuda_address(more ? more : l->h), n_work,
                               tvk_cuda_address(l->info)),
        "cusolverDnDpotrf", err));
    TV_TRY(tvk_cuda_download(l->stream, info, l->info, sizeof *info, err));
    TV_TRY(tvk_cuda_sync(l->stream, err));
    if (*info < 0) /* a parameter of ours is wrong */
        rc = tvk_cuda_broken(l->device, "cusolverDnDpotrf", *info, err);
out:
    if (rc != TV_OK)
        tvk_cuda_settle(l->stream);
    tvk_cuda_free(l->device, more, (size_t)n_work * sizeof(double));
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
        const size_t to = tvk_cuda_least(from + INVERSE_COLS, n);

        a.from = from;
        a.to = to;
        TV_TRY(tvk_cuda_over(l->stream, "tv_unit", (to - from) * to,
                             TVK_CUDA_THREADS, &a, err));
        TV_TRY(tvk_cuda_blas_done(
            m,
            (int)m->blas->dtrsm(m->blas_handle, TVK_CB_LEFT, TVK_CB_UPPER,
                                TVK_CB_N, TVK_CB_NON_UNIT, (int)to,
                                (int)(to - from), &one, tvk_cuda_address(l->m),
                                (int)n, a.tile, (int)to),
            "cublasDtrsm", err));
        TV_TRY(tvk_cuda_over(l->stream, "tv_take", (to - from) * n,
                             TVK_CUDA_THREADS, &a, err));
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

    assert(!l->on_host);
    *definite = true;
    if (n == 0)
        return TV_OK;
    diagonal = tv_alloc(n * sizeof *diagonal);
    if (diagonal == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    TV_TRY(tvk_cuda_over(l->stream, "tv_flip", n * n, TVK_CUDA_THREADS, &flip,
                         err));
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

/* ---- refinement ---------------------------------------------------------- */

/* Array i of a tile. */
static tvk_cuda_ptr tile(const tvk_cuda_layer *l, unsigned i)
{
    return tvk_cuda_float(l->m, (size_t)i * TVK_CUDA_CG_ROWS * l->cols);
}

/* y [rows, cols] = x h, PANEL columns at a time: H is symmetric. */
static enum tv_err times_gram(tvk_cuda_layer *l, tvk_cuda_ptr y, tvk_cuda_ptr x,
                              size_t rows, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    for (size_t j = 0; j < l->cols; j += PANEL) {
        const size_t end = tvk_cuda_least(j + PANEL, l->cols);
        struct tvk_cuda_gemm g = {.trans_b = true,
                                  .m = rows,
                                  .n = end - j,
                                  .k = l->cols,
                                  .alpha = 1.0f,
                                  .a = x,
                                  .lda = l->cols,
                                  .ldb = l->cols,
                                  .c = tvk_cuda_float(y, j),
                                  .ldc = l->cols};

        TV_TRY(tvk_cuda_layer_panel(l, j, end, err, &g.b));
        TV_TRY(tvk_cuda_gemm(l->math, &g, err));
    }
out:
    return rc;
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
    TV_TRY(tvk_cuda_over(l->stream, "tv_cg_begin", rows * l->cols,
                         TVK_CUDA_THREADS, &a, err));
    TV_TRY(times_gram(l, tile(l, 2), tile(l, 3), rows, err));
    TV_TRY(tvk_cuda_over(l->stream, "tv_cg_first", rows * TVK_CU_LINE,
                         TVK_CU_LINE, &a, err));
    for (unsigned step = 0; step < n_steps; step++) {
        double *const before = a.rz_next;

        a.rz_next = doubles + (step % 2 == 0 ? 2 : 1) * TVK_CUDA_CG_ROWS;
        a.rz = before;
        TV_TRY(times_gram(l, tile(l, 4), tile(l, 3), rows, err));
        TV_TRY(tvk_cuda_over(l->stream, "tv_cg_step", rows * TVK_CU_LINE,
                             TVK_CU_LINE, &a, err));
    }
    TV_TRY(tvk_cuda_download(l->stream, p, tile(l, 0), bytes, err));
out:
    return tvk_cuda_layer_finish(l, rc, err);
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
    TV_TRY(tvk_cuda_over(l->stream, "tv_traces", rows * TVK_CU_LINE,
                         TVK_CU_LINE, &a, err));
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
