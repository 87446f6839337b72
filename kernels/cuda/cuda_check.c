/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_check.c - does a device compute what it should? See tv/cuda_math.h.
 *
 * One small problem of every kind, with an answer that plain loops in fp64
 * know: products, X^T X, a factor, the loop, attention, losses. A GPU, driver
 * or library that is not fit for the work shows here, before anybody relies on
 * its numbers.
 */
#include "cuda/cuda_math_parts.h"

#include <math.h>

#include "tv/alloc.h"
#include "tv/cuda_eval.h"

enum { ROWS = 70, COLS = 150, HEAD = 16, HEADS = 2 };
#define FLOATS ((size_t)COLS * COLS)
#define BYTES  (FLOATS * sizeof(float))

struct check {
    tvk_cuda *device;
    tvk_cuda_math *math;
    tvk_cuda_stream *stream;
    float *x, *h, *y; /* [FLOATS]: inputs, H, what came back */
    double *wide;     /* [FLOATS] */
    tvk_cuda_ptr dx, dy, work;
    size_t work_bytes;
};

/* Numbers between -1 and 1, always the same (Knuth's MMIX generator). */
static void numbers(float *x, size_t n)
{
    uint64_t state = 1;

    for (size_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x[i] = (float)(state >> 40) * 0x1p-23f - 1.0f;
    }
}

static enum tv_err wrong(const struct check *c, const char *what, double got,
                         double want, struct tv_error *err)
{
    return tv_error_set(err, TV_E_UNSUPPORTED,
                        "CUDA device %d (%s) does not compute what it should: "
                        "%s gives %g instead of %g",
                        c->device->info.index, c->device->info.name, what, got,
                        want);
}

static bool near(double got, double want, double within)
{
    return fabs(got - want) <= within; /* false for a NaN */
}

static enum tv_err bring(struct check *c, float *to, tvk_cuda_ptr from,
                         size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    TV_TRY(tvk_cuda_download(c->stream, to, from, n * sizeof *to, err));
    TV_TRY(tvk_cuda_sync(c->stream, err));
out:
    return rc;
}

/* y [ROWS, ROWS] = x x^T, then x^T x [COLS, COLS], which becomes H. */
static enum tv_err check_products(struct check *c, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n_sums = (size_t)COLS * (COLS + 1) / 2;
    const struct tvk_cuda_gemm g = {.trans_b = true,
                                    .m = ROWS,
                                    .n = ROWS,
                                    .k = COLS,
                                    .alpha = 1.0f,
                                    .a = c->dx,
                                    .lda = COLS,
                                    .b = c->dx,
                                    .ldb = COLS,
                                    .c = c->dy,
                                    .ldc = ROWS};

    TV_TRY(tvk_cuda_gemm(c->math, &g, err));
    TV_TRY(bring(c, c->y, c->dy, (size_t)ROWS * ROWS, err));
    for (size_t i = 0; i < ROWS; i++)
        for (size_t j = 0; j < ROWS; j++) {
            double want = 0;
            for (size_t k = 0; k < COLS; k++)
                want += (double)c->x[i * COLS + k] * (double)c->x[j * COLS + k];
            if (!near((double)c->y[i * ROWS + j], want, 1e-4))
                return wrong(c, "a product", (double)c->y[i * ROWS + j], want,
                             err);
        }
    for (size_t i = 0; i < n_sums; i++)
        c->wide[i] = 0;
    TV_TRY(tvk_cuda_gram_add(c->math, c->wide, 0, c->work, c->dx, COLS, ROWS,
                             COLS, err));
    for (size_t i = 0, e = 0; i < COLS; i++)
        for (size_t j = i; j < COLS; j++, e++) {
            double want = 0;
            for (size_t r = 0; r < ROWS; r++)
                want += (double)c->x[r * COLS + i] * (double)c->x[r * COLS + j];
            if (!near(c->wide[e], want, 1e-4))
                return wrong(c, "X^T X", c->wide[e], want, err);
            c->h[e] = (float)(i == j ? want + 10.0 : want);
        }
out:
    return rc;
}

/* A corner of the factor, which a formula knows, and how many entries the loop
 * keeps of a layer. */
static enum tv_err check_layer(struct check *c, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvk_obs how = {.density = 0.5};
    tvk_cuda_layer *l = NULL;
    bool definite = false;
    float diagonal[COLS];
    size_t n_kept = 0;

    TV_TRY(tvk_cuda_layer_open(c->device, ROWS, COLS, err, &l));
    if (tvk_cuda_layer_on_host(l)) /* too little memory to check more */
        goto out;
    TV_TRY(tvk_cuda_layer_gram(l, c->h, NULL, err));
    TV_TRY(tvk_cuda_layer_factor(l, &definite, diagonal, err));
    /* The last entry of U is that of a plain Cholesky factor of the reversed H:
     * 1 / sqrt(H_nn). */
    const double last = (double)c->h[(size_t)COLS * (COLS + 1) / 2 - 1];
    const double want = 1.0 / sqrt(last);
    if (!definite || !near((double)diagonal[COLS - 1], want, 1e-5)) {
        rc = wrong(c, "a factor", (double)diagonal[COLS - 1], want, err);
        goto out;
    }
    for (size_t i = 0; i < (size_t)ROWS * COLS; i++)
        c->y[i] = c->x[i];
    TV_TRY(tvk_cuda_layer_obs(l, c->y, &how, err));
    for (size_t i = 0; i < (size_t)ROWS * COLS; i++)
        n_kept += c->y[i] != 0.0f;
    /* Blocks of 128 and 22 columns. */
    if (n_kept != (size_t)ROWS * COLS / 2)
        rc = wrong(c, "SparseGPT's loop", (double)n_kept, ROWS * COLS / 2.0,
                   err);
out:
    tvk_cuda_layer_close(l);
    return rc;
}

/* Two heads of queries, keys and values that are x's columns: output of the
 * last position, whose query sees all. */
static enum tv_err check_attention(struct check *c, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvk_cuda_attention a = {.qkv = c->dx,
                                         .out = c->dy,
                                         .ld = COLS,
                                         .ld_out = HEADS * HEAD,
                                         .n_windows = 1,
                                         .length = ROWS,
                                         .n_heads = HEADS,
                                         .n_kv = HEADS,
                                         .head_dim = HEAD,
                                         .q_step = HEAD,
                                         .k0 = HEADS * HEAD,
                                         .k_step = HEAD,
                                         .v0 = 2 * HEADS * HEAD,
                                         .v_step = HEAD,
                                         .scale = 0.25f,
                                         .work = c->work};
    const float *const q = c->x + (size_t)(ROWS - 1) * COLS;

    TV_TRY(tvk_cuda_attend(c->math, &a, err));
    TV_TRY(bring(c, c->y, c->dy, (size_t)ROWS * HEADS * HEAD, err));
    for (size_t h = 0; h < HEADS; h++)
        for (size_t i = 0; i < HEAD; i++) {
            const double got =
                (double)c->y[(size_t)(ROWS - 1) * HEADS * HEAD + h * HEAD + i];
            double sum = 0, want = 0;
            for (size_t r = 0; r < ROWS; r++) {
                const float *const k =
                    c->x + r * COLS + (HEADS + h) * (size_t)HEAD;
                const float *const v = k + (size_t)HEADS * HEAD;
                double score = 0;
                for (size_t d = 0; d < HEAD; d++)
                    score += (double)q[h * HEAD + d] * (double)k[d];
                sum += exp(score * 0.25);
                want += exp(score * 0.25) * (double)v[i];
            }
            if (!near(got, want / sum, 1e-5))
                return wrong(c, "attention", got, want / sum, err);
        }
out:
    return rc;
}

/* Of the first rows of x as logits, with target 3. */
static enum tv_err check_losses(struct check *c, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvk_cuda_loss loss[ROWS];
    uint32_t targets[ROWS];
    const struct tvk_cuda_losses a = {.logits = c->dx,
                                      .losses = c->dy,
                                      .targets = c->work,
                                      .rows = ROWS,
                                      .n = COLS,
                                      .ld = COLS};

    for (size_t r = 0; r < ROWS; r++)
        targets[r] = 3;
    TV_TRY(tvk_cuda_upload(c->stream, c->work, targets, sizeof targets, err));
    TV_TRY(tvk_cuda_add_losses(c->math, &a, err));
    TV_TRY(tvk_cuda_download(c->stream, loss, c->dy, sizeof loss, err));
    TV_TRY(tvk_cuda_sync(c->stream, err));
    for (size_t r = 0; r < ROWS; r++) {
        double want = 0;
        const double got =
            (double)loss[r].max + log(loss[r].sum) - (double)loss[r].target;
        for (size_t i = 0; i < COLS; i++)
            want += exp((double)c->x[r * COLS + i]);
        want = log(want) - (double)c->x[r * COLS + 3];
        if (!near(got, want, 1e-5))
            return wrong(c, "a loss", got, want, err);
    }
out:
    if (rc != TV_OK)
        tvk_cuda_settle(c->stream);
    return rc;
}

enum tv_err tvk_cuda_check(tvk_cuda *d, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct check c = {.device = d};
    const size_t gram = tvk_cuda_gram_work(COLS);

    c.work_bytes = tvk_cuda_attention_bytes(ROWS, ROWS, HEADS);
    c.work_bytes = c.work_bytes > gram ? c.work_bytes : gram;
    TV_TRY(tvk_cuda_math_of(d, err, &c.math));
    c.stream = tvk_cuda_math_stream(c.math);
    c.x = tv_alloc(BYTES);
    c.h = tv_alloc(BYTES);
    c.y = tv_alloc(BYTES);
    c.wide = tv_alloc(2 * BYTES);
    if (!c.x || !c.h || !c.y || !c.wide) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(tvk_cuda_alloc(d, BYTES, "a check", err, &c.dx));
    TV_TRY(tvk_cuda_alloc(d, BYTES, "a check", err, &c.dy));
    TV_TRY(tvk_cuda_alloc(d, c.work_bytes, "a check", err, &c.work));
    numbers(c.x, FLOATS);
    TV_TRY(tvk_cuda_upload(c.stream, c.dx, c.x, BYTES, err));
    TV_TRY(tvk_cuda_sync(c.stream, err));
    TV_TRY(check_products(&c, err));
    TV_TRY(check_layer(&c, err));
    TV_TRY(check_attention(&c, err));
    TV_TRY(check_losses(&c, err));
out:
    tvk_cuda_free(d, c.dx, BYTES);
    tvk_cuda_free(d, c.dy, BYTES);
    tvk_cuda_free(d, c.work, c.work_bytes);
    tv_free(c.x);
    tv_free(c.h);
    tv_free(c.y);
    tv_free(c.wide);
    return rc;
}
