/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_eval.c - see tv/cuda_eval.h.
 *
 * Attention, for every block of QUERIES positions of all windows at once:
 *
 *   problems   head 0 | head 1 | ... of window 0, then of window 1 ...
 *   scores     [QUERIES, keys] of as many problems as SCORES floats hold
 *              = Q K^T (one batched product), softmax row by row,
 *              out = P V (one batched product)
 *
 * Keys end with the last query of the block and begin where the sliding window
 * of the first one does.
 */
#include "tv/cuda_eval.h"

#include <limits.h>

#include "cuda/cu_eval.h"
#include "cuda/cuda_math_parts.h"

#define QUERIES  128u
#define SCORES   ((size_t)4 << 20)
#define PROBLEMS 4096u /* at one time, at most */
#define ARRAYS   5u    /* of pointers: Q, K, V, scores, outputs */
#define GRID_MAX 65536u

/* Blocks for `rows` rows, which they share. */
static unsigned blocks_for(size_t rows)
{
    return rows < GRID_MAX ? (unsigned)rows : GRID_MAX;
}

/* A kernel that has one block for each row must be given them all. */
static enum tv_err too_many(struct tv_error *err)
{
    return tv_error_set(err, TV_E_UNSUPPORTED,
                        "more than 2^31 rows in one call of a device");
}

enum tv_err tvk_cuda_norm_rows(tvk_cuda_math *m, const struct tvk_cuda_norm *a,
                               struct tv_error *err)
{
    struct tvk_cu_norm k = {.x = tvk_cuda_address(a->x),
                            .dst = tvk_cuda_address(a->dst),
                            .w = tvk_cuda_address(a->w),
                            .b = tvk_cuda_address(a->b),
                            .ldx = a->ldx,
                            .ld = a->ld,
                            .parts = a->parts,
                            .step = a->step,
                            .n = a->n,
                            .eps = a->eps,
                            .type = (uint32_t)a->type};

    _Static_assert((unsigned)TVK_NORM_LAYER == TVK_CU_NORM_LAYER, "order");
    if (a->rows == 0 || a->parts == 0)
        return TV_OK;
    if (a->rows > INT_MAX / a->parts)
        return too_many(err);
    return tvk_cuda_launch(m->stream, "tv_norm", (unsigned)(a->rows * a->parts),
                           1, TVK_CU_ROW_LANES, 0, &k, err);
}

static enum tv_err on_rows(tvk_cuda_math *m, const char *kernel,
                           const struct tvk_cuda_rows *a, struct tv_error *err)
{
    struct tvk_cu_rows k = {.dst = tvk_cuda_address(a->dst),
                            .src = tvk_cuda_address(a->src),
                            .rows = a->rows,
                            .n = a->n,
                            .ld = a->ld,
                            .lds = a->lds};

    if (a->rows == 0)
        return TV_OK;
    return tvk_cuda_launch(m->stream, kernel, blocks_for(a->rows), 1,
                           TVK_CU_ROW_WIDE, 0, &k, err);
}

enum tv_err tvk_cuda_add_rows(tvk_cuda_math *m, const struct tvk_cuda_rows *a,
                              struct tv_error *err)
{
    return on_rows(m, "tv_rows_add", a, err);
}

enum tv_err tvk_cuda_copy_rows(tvk_cuda_math *m, const struct tvk_cuda_rows *a,
                               struct tv_error *err)
{
    return on_rows(m, "tv_rows_copy", a, err);
}

enum tv_err tvk_cuda_take_rows(tvk_cuda_math *m, const struct tvk_cuda_rows *a,
                               tvk_cuda_ptr index, bool add,
                               struct tv_error *err)
{
    struct tvk_cu_take_rows k = {.dst = tvk_cuda_address(a->dst),
                                 .src = tvk_cuda_address(a->src),
                                 .index = tvk_cuda_address(index),
                                 .rows = a->rows,
                                 .n = a->n,
                                 .ld = a->ld,
                                 .lds = a->lds,
                                 .add = add};

    if (a->rows == 0)
        return TV_OK;
    return tvk_cuda_launch(m->stream, "tv_rows_take", blocks_for(a->rows), 1,
                           TVK_CU_ROW_WIDE, 0, &k, err);
}

enum tv_err tvk_cuda_look_up(tvk_cuda_math *m, const struct tvk_cuda_lookup *a,
                             struct tv_error *err)
{
    struct tvk_cu_lookup k = {.dst = tvk_cuda_address(a->dst),
                              .table = tvk_cuda_address(a->table),
                              .index = tvk_cuda_address(a->index),
                              .rows = a->rows,
                              .n = a->n,
                              .scale = a->scale,
                              .type = (uint32_t)a->type};

    if (a->rows == 0)
        return TV_OK;
    return tvk_cuda_launch(m->stream, "tv_look_up", blocks_for(a->rows), 1,
                           TVK_CU_ROW_WIDE, 0, &k, err);
}

enum tv_err tvk_cuda_act_rows(tvk_cuda_math *m, enum tvk_cuda_act_type act,
                              tvk_cuda_ptr x, tvk_cuda_ptr gate_by, size_t rows,
                              size_t n, size_t ld, struct tv_error *err)
{
    struct tvk_cu_act k = {.x = tvk_cuda_address(x),
                           .gate_by = tvk_cuda_address(gate_by),
                           .rows = rows,
                           .n = n,
                           .ld = ld,
                           .act = (uint32_t)act};

    _Static_assert((unsigned)TVK_ACT_QUICK_GELU == TVK_CU_ACT_QUICK_GELU,
                   "order");
    if (rows == 0)
        return TV_OK;
    return tvk_cuda_launch(m->stream, "tv_act", blocks_for(rows), 1,
                           TVK_CU_ROW_WIDE, 0, &k, err);
}

enum tv_err tvk_cuda_rotate_rows(tvk_cuda_math *m,
                                 const struct tvk_cuda_rotate *a,
                                 struct tv_error *err)
{
    struct tvk_cu_rotate k = {.x = tvk_cuda_address(a->x),
                              .position = tvk_cuda_address(a->position),
                              .cosine = tvk_cuda_address(a->cosine),
                              .sine = tvk_cuda_address(a->sine),
                              .rows = a->rows,
                              .ld = a->ld,
                              .n_heads = a->n_heads,
                              .step = a->step,
                              .half = a->half};

    if (a->rows == 0 || a->half == 0)
        return TV_OK;
    return tvk_cuda_launch(m->stream, "tv_rotate", blocks_for(a->rows), 1,
                           TVK_CU_ROW_WIDE, 0, &k, err);
}

/* ---- attention ----------------------------------------------------------- */

/* Room for scores: for all of them where they are few. */
static size_t score_floats(size_t length, size_t rows, size_t n_heads)
{
    const size_t one = QUERIES * length;
    const size_t some = one > SCORES ? one : SCORES;

    const size_t all =
        some / length / n_heads < rows ? some : length * rows * n_heads;

    return (all + 63) / 64 * 64; /* addresses follow */
}

static size_t array_bytes(size_t rows, size_t n_heads)
{
    const size_t n = PROBLEMS / n_heads < rows ? PROBLEMS : rows * n_heads;

    return n * sizeof(void *);
}

size_t tvk_cuda_attention_bytes(size_t length, size_t rows, size_t n_heads)
{
    return score_floats(length, rows, n_heads) * sizeof(float) +
           ARRAYS * array_bytes(rows, n_heads);
}

/* c [m, n] = alpha a op(b) for n_problems addresses of each. */
struct batched {
    bool trans_b;
    size_t m, n, k, lda, ldb, ldc, n_problems;
    float alpha;
    const float **a, **b;
    float **c;
};

/* Row-major as tvk_cuda_gemm: the operands change places. */
static enum tv_err multiply(tvk_cuda_math *m, const struct batched *p,
                            struct tv_error *err)
{
    const float zero = 0.0f;
    const enum tv_err rc = tvk_cuda_enter(m->device, err);

    if (rc != TV_OK)
        return rc;
    const int code = (int)m->blas->sgemm_batched(
        m->blas_handle, p->trans_b ? TVK_CB_T : TVK_CB_N, TVK_CB_N, (int)p->n,
        (int)p->m, (int)p->k, &p->alpha, p->b, (int)p->ldb, p->a, (int)p->lda,
        &zero, p->c, (int)p->ldc, (int)p->n_problems);
    return tvk_cuda_blas_done(m, code, "cublasSgemmBatched", err);
}

/* Problems that k names. */
static enum tv_err attend_some(tvk_cuda_math *m,
                               const struct tvk_cuda_attention *a,
                               struct tvk_cu_heads *k, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct batched scores = {.trans_b = true,
                                   .m = k->n_queries,
                                   .n = k->n_keys,
                                   .k = a->head_dim,
                                   .lda = a->ld,
                                   .ldb = a->ld,
                                   .ldc = k->n_keys,
                                   .n_problems = k->n,
                                   .alpha = a->scale,
                                   .a = k->q,
                                   .b = k->k,
                                   .c = k->s};
    const struct batched out = {.m = k->n_queries,
                                .n = a->head_dim,
                                .k = k->n_keys,
                                .lda = k->n_keys,
                                .ldb = a->ld,
                                .ldc = a->ld_out,
                                .n_problems = k->n,
                                .alpha = 1.0f,
                                .a = (const float **)(void *)k->s,
                                .b = k->v,
                                .c = k->o};

    TV_TRY(tvk_cuda_launch(
        m->stream, "tv_heads",
        (unsigned)((k->n + TVK_CU_ROW_WIDE - 1) / TVK_CU_ROW_WIDE), 1,
        TVK_CU_ROW_WIDE, 0, k, err));
    TV_TRY(multiply(m, &scores, err));
    TV_TRY(tvk_cuda_launch(m->stream, "tv_softmax",
                           (unsigned)(k->n * k->n_queries), 1, TVK_CU_ROW_LANES,
                           0, k, err));
    TV_TRY(multiply(m, &out, err));
out:
    return rc;
}

enum tv_err tvk_cuda_attend(tvk_cuda_math *m,
                            const struct tvk_cuda_attention *a,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n_problems = a->n_windows * a->n_heads;
    const size_t rows = a->n_windows * a->length;
    const size_t room = score_floats(a->length, rows, a->n_heads);
    const size_t array = array_bytes(rows, a->n_heads);
    const tvk_cuda_ptr arrays = a->work + room * sizeof(float);
    struct tvk_cu_heads k = {
        .qkv = tvk_cuda_address(a->qkv),
        .out = tvk_cuda_address(a->out),
        .scores = tvk_cuda_address(a->work),
        .q = tvk_cuda_address(arrays),
        .k = tvk_cuda_address(arrays + array),
        .v = tvk_cuda_address(arrays + 2 * array),
        .s = tvk_cuda_address(arrays + 3 * array),
        .o = tvk_cuda_address(arrays + 4 * array),
        .slopes = tvk_cuda_address(a->slopes),
        .ld = a->ld,
        .ld_out = a->ld_out,
        .q0 = a->q0,
        .q_step = a->q_step,
        .k0 = a->k0,
        .k_step = a->k_step,
        .v0 = a->v0,
        .v_step = a->v_step,
        .head_dim = a->head_dim,
        .n_heads = a->n_heads,
        .share = a->n_heads / a->n_kv,
        .length = a->length,
        .window = a->window,
        .cap = a->cap,
    };

    if (a->length > INT_MAX || a->ld > INT_MAX || a->ld_out > INT_MAX)
        return too_many(err);
    for (size_t q = 0; q < a->length; q += QUERIES) {
        const size_t left = a->length - q;

        k.query = q;
        k.n_queries = left < QUERIES ? left : QUERIES;
        k.key = a->window > 0 && q + 1 > a->window ? q + 1 - a->window : 0;
        k.n_keys = q + k.n_queries - k.key;
        size_t each = room / (k.n_queries * k.n_keys);
        each = each < PROBLEMS ? each : PROBLEMS;
        for (k.first = 0; k.first < n_problems; k.first += k.n) {
            k.n = n_problems - k.first < each ? n_problems - k.first : each;
            TV_TRY(attend_some(m, a, &k, err));
        }
    }
out:
    return rc;
}

/* ---- statistics ---------------------------------------------------------- */

enum tv_err tvk_cuda_add_squares(tvk_cuda_math *m, tvk_cuda_ptr sums,
                                 tvk_cuda_ptr x, size_t ld, size_t rows,
                                 size_t n, struct tv_error *err)
{
    struct tvk_cu_squares k = {.sums = tvk_cuda_address(sums),
                               .x = tvk_cuda_address(x),
                               .rows = rows,
                               .n = n,
                               .ld = ld};

    if (n == 0)
        return TV_OK;
    return tvk_cuda_launch(
        m->stream, "tv_squares",
        blocks_for((n + TVK_CU_SQUARES - 1) / TVK_CU_SQUARES), 1,
        TVK_CU_SQUARES, 0, &k, err);
}

/* ---- losses -------------------------------------------------------------- */

enum tv_err tvk_cuda_add_losses(tvk_cuda_math *m,
                                const struct tvk_cuda_losses *a,
                                struct tv_error *err)
{
    struct tvk_cu_losses k = {.logits = tvk_cuda_address(a->logits),
                              .rows = tvk_cuda_address(a->losses),
                              .targets = tvk_cuda_address(a->targets),
                              .n = a->n,
                              .ld = a->ld,
                              .from = a->from,
                              .cap = a->cap};

    _Static_assert(sizeof(struct tvk_cuda_loss) == sizeof(struct tvk_cu_loss),
                   "one layout");
    if (a->rows == 0 || a->n == 0)
        return TV_OK;
    if (a->rows > INT_MAX)
        return too_many(err);
    return tvk_cuda_launch(m->stream, "tv_losses", (unsigned)a->rows, 1,
                           TVK_CU_ROW_LANES, 0, &k, err);
}
