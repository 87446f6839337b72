/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_blas.c - the handle of tv/cuda_math.h: cuBLAS and cuSOLVER, found at run
 * time.
 *
 * Both come with the toolkit or with pip's nvidia-* wheels, not with the
 * driver; the names are those of CUDA 13 and 12. They work in the primary
 * context, which cuda_device.c uses too, and on one stream of ours. cuBLAS gets
 * its workspace from our budget: one buffer for one stream makes its results
 * the same from run to run.
 *
 * Row-major c = a b is column-major c^T = b^T a^T: the operands change places,
 * nothing is copied.
 */
#include "cuda/cuda_math_parts.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "cuda/cu_ops.h"
#include "tv/alloc.h"

static const char *const blas_names[] = {"libcublas.so.13", "libcublas.so.12"};
static const char *const solver_names[] = {"libcusolver.so.12",
                                           "libcusolver.so.11"};

#define COUNTER 256u /* behind the workspace: of conversions */

/* Written once under the guard, read-only afterwards. */
static struct tvk_cublas_api blas;
static struct tvk_cusolver_api solver;
static char reason[160]; /* "": both are there */
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* Where the toolkit puts them, and not every installation tells the loader. */
#define TOOLKIT "/usr/local/cuda/lib64/"

static void *library(const char *const *names, size_t n)
{
    char path[64];

    for (size_t i = 0; i < 2 * n; i++) {
        (void)snprintf(path, sizeof path, "%s%s", i < n ? "" : TOOLKIT,
                       names[i % n]);
        void *const l = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (l != NULL)
            return l;
    }
    return NULL;
}

/* As in cuda_load.c. */
static bool take(void *from, const char *symbol, void *field)
{
    void *const at = dlsym(from, symbol);

    if (at == NULL) {
        (void)snprintf(reason, sizeof reason, "%s is missing: CUDA is too old",
                       symbol);
        return false;
    }
    memcpy(field, &at, sizeof at);
    return true;
}

static void load(void)
{
    void *const b = library(blas_names, 2);
    void *const s = b != NULL ? library(solver_names, 2) : NULL;

    if (s == NULL) {
        (void)snprintf(reason, sizeof reason, "%s (%s or %s) is not installed",
                       b == NULL ? "cuBLAS" : "cuSOLVER",
                       b == NULL ? blas_names[0] : solver_names[0],
                       b == NULL ? blas_names[1] : solver_names[1]);
        return;
    }
#define TAKE(field, symbol, params)                                            \
    if (!take(b, #symbol, &blas.field))                                        \
        return;
    TVK_CUDA_CUBLAS(TAKE)
#undef TAKE
#define TAKE(field, symbol, params)                                            \
    if (!take(s, #symbol, &solver.field))                                      \
        return;
    TVK_CUDA_CUSOLVER(TAKE)
#undef TAKE
}

enum tv_err tvk_cuda_math_find(struct tv_error *err)
{
    (void)pthread_once(&once, load);
    if (reason[0] != '\0')
        return tv_error_set(err, TV_E_UNSUPPORTED, "%s", reason);
    return TV_OK;
}

/* ---- errors -------------------------------------------------------------- */

/* From Hopper on NVIDIA advises 32 MiB of workspace, and products are slower
 * with less; before, 4. Results may depend on it, so who has little memory (by
 * what a run keeps, not by what is free now) is another core. */
#define LITTLE ((uint64_t)512 << 20)

static bool has_little(const tvk_cuda *d)
{
    return d->info.major >= 9 && d->info.factor_bytes < LITTLE;
}

static size_t workspace_bytes(const tvk_cuda *d)
{
    return (size_t)(d->info.major >= 9 && !has_little(d) ? 32 : 4) << 20;
}

uint64_t tvk_cuda_workspace(const tvk_cuda *d)
{
    return workspace_bytes(d) + COUNTER;
}

/* Codes of the libraries tell little; the driver has the reason, if it is one
 * of the device's. */
static enum tv_err refused(tvk_cuda_math *m, int code, bool no_memory,
                           const char *call, struct tv_error *err)
{
    tvk_cuda *const d = m->device;
    tvk_cu_result why = TVK_CU_OK;

    if (code == TVK_CB_OK)
        return TV_OK;
    why = d->api->stream_sync((tvk_cu_stream)tvk_cuda_stream_raw(m->stream));
    if (why != TVK_CU_OK)
        return tvk_cuda_refused(d, why, call, err);
    if (no_memory)
        return tv_error_set(err, TV_E_BUDGET,
                            "CUDA device %d (%s) has no memory left: %s",
                            d->info.index, d->info.name, call);
    return tvk_cuda_broken(d, call, code, err);
}

enum tv_err tvk_cuda_blas_done(tvk_cuda_math *m, int code, const char *call,
                               struct tv_error *err)
{
    return refused(m, code, code == TVK_CB_NO_MEMORY, call, err);
}

enum tv_err tvk_cuda_solver_done(tvk_cuda_math *m, int code, const char *call,
                                 struct tv_error *err)
{
    return refused(m, code, code == TVK_CB_SOLVER_NO_MEMORY, call, err);
}

/* ---- the handle ---------------------------------------------------------- */

enum tv_err tvk_cuda_math_of(tvk_cuda *d, struct tv_error *err,
                             tvk_cuda_math **out)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_math *m = NULL;

    *out = d->math;
    if (d->math != NULL)
        return tvk_cuda_trouble(d, err);
    TV_TRY(tvk_cuda_math_find(err));
    m = tv_calloc(1, sizeof *m);
    if (m == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    m->device = d;
    m->blas = &blas;
    m->solver = &solver;
    TV_TRY(tvk_cuda_stream_open(d, err, &m->stream));
    TV_TRY(tvk_cuda_stream_open(d, err, &m->copies));
    TV_TRY(tvk_cuda_enter(d, err));
    TV_TRY(tvk_cuda_blas_done(m, (int)blas.create(&m->blas_handle),
                              "cublasCreate", err));
    TV_TRY(tvk_cuda_solver_done(m, (int)solver.create(&m->solver_handle),
                                "cusolverDnCreate", err));
    void *const raw = tvk_cuda_stream_raw(m->stream);
    TV_TRY(tvk_cuda_blas_done(m, (int)blas.set_stream(m->blas_handle, raw),
                              "cublasSetStream", err));
    TV_TRY(tvk_cuda_alloc(d, workspace_bytes(d) + COUNTER,
                          "the workspace of cuBLAS", err, &m->workspace));
    TV_TRY(tvk_cuda_blas_done(
        m,
        (int)blas.set_workspace(m->blas_handle, tvk_cuda_address(m->workspace),
                                workspace_bytes(d)),
        "cublasSetWorkspace", err));
    TV_TRY(tvk_cuda_blas_done(
        m, (int)blas.set_math(m->blas_handle, TVK_CB_PEDANTIC),
        "cublasSetMathMode", err));
    TV_TRY(tvk_cuda_solver_done(m,
                                (int)solver.set_stream(m->solver_handle, raw),
                                "cusolverDnSetStream", err));
    *out = d->math = m;
    m = NULL;
out:
    tvk_cuda_math_close(m);
    return rc;
}

void tvk_cuda_math_close(tvk_cuda_math *m)
{
    if (m == NULL)
        return;
    /* Streams first wait for what uses the rest. */
    tvk_cuda_stream_close(m->copies);
    if (m->stream != NULL)
        tvk_cuda_settle(m->stream);
    if (m->solver_handle != NULL)
        (void)m->solver->destroy(m->solver_handle);
    if (m->blas_handle != NULL)
        (void)m->blas->destroy(m->blas_handle);
    tvk_cuda_stream_close(m->stream);
    tvk_cuda_free(m->device, m->workspace,
                  workspace_bytes(m->device) + COUNTER);
    tv_free(m);
}

tvk_cuda *tvk_cuda_math_device(const tvk_cuda_math *m)
{
    return m->device;
}

tvk_cuda_stream *tvk_cuda_math_stream(const tvk_cuda_math *m)
{
    return m->stream;
}

tvk_cuda_stream *tvk_cuda_math_copies(const tvk_cuda_math *m)
{
    return m->copies;
}

void tvk_cuda_math_settle(tvk_cuda_math *m)
{
    tvk_cuda_settle(m->copies);
    tvk_cuda_settle(m->stream);
}

const char *tvk_cuda_math_core(const tvk_cuda *d, char *dst, size_t cap)
{
    (void)snprintf(dst, cap, "%s%s", d->info.name,
                   has_little(d) ? " with less than 512 MiB" : "");
    return dst;
}

/* ---- conversion ---------------------------------------------------------- */

enum tv_err tvk_cuda_widen(tvk_cuda_math *m, bool bf16, tvk_cuda_ptr dst,
                           tvk_cuda_ptr src, size_t n, struct tv_error *err)
{
    const size_t blocks = (n + TVK_CU_BLOCK - 1) / TVK_CU_BLOCK;
    struct tvk_cu_convert a = {
        .dst = tvk_cuda_address(dst),
        .src = tvk_cuda_address(src),
        .n_bad = tvk_cuda_address(m->workspace + workspace_bytes(m->device)),
        .n = n};

    if (n == 0)
        return TV_OK;
    return tvk_cuda_launch(m->stream, bf16 ? "tv_bf16_to_f32" : "tv_f16_to_f32",
                           blocks < 4096 ? (unsigned)blocks : 4096, 1,
                           TVK_CU_BLOCK, 0, &a, err);
}

/* ---- products ------------------------------------------------------------ */

enum tv_err tvk_cuda_gemm(tvk_cuda_math *m, const struct tvk_cuda_gemm *g,
                          struct tv_error *err)
{
    if (g->m == 0 || g->n == 0)
        return TV_OK;
    if (g->m > INT_MAX || g->n > INT_MAX || g->k > INT_MAX ||
        g->lda > INT_MAX || g->ldb > INT_MAX || g->ldc > INT_MAX)
        return tv_error_set(err, TV_E_UNSUPPORTED,
                            "a product of more than 2^31 rows or columns");
    const enum tv_err rc = tvk_cuda_enter(m->device, err);
    if (rc != TV_OK)
        return rc;
    const int code = (int)m->blas->sgemm(
        m->blas_handle, g->trans_b ? TVK_CB_T : TVK_CB_N,
        g->trans_a ? TVK_CB_T : TVK_CB_N, (int)g->n, (int)g->m, (int)g->k,
        &g->alpha, tvk_cuda_address(g->b), (int)g->ldb, tvk_cuda_address(g->a),
        (int)g->lda, &g->beta, tvk_cuda_address(g->c), (int)g->ldc);
    return tvk_cuda_blas_done(m, code, "cublasSgemm", err);
}
