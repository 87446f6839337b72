/* SPDX-License-Identifier: Apache-2.0 */
/*
 * split_gemm.c - oneDNN's bf16 products, found at run time.
 *
 * The library is opened only when a model is to be run: it is large and would
 * slow every start. Its version 2 and 3 have different interfaces; the headers
 * say which of them this is built for (2), and the name that is opened
 * (libdnnl.so.2) goes with them.
 *
 *   work of a worker   weights  [n_n, n_k] blocks as oneDNN wants them
 *                      stage    [n_block, k_block] bf16
 *                      result   [TVK_SPLIT_ROWS, n_block] fp32
 *                      scratch  oneDNN's
 *
 * Blocks of 512 x 512 with 128 rows stay in 2 MiB of cache; that was the
 * fastest of all that were tried on two cores of a Sapphire Rapids.
 */
#include "tv/split_gemm.h"

#include <assert.h>
#include <string.h>

#define BLOCK_MOST    512u
#define BLOCK_STEP    64u
#define SCRATCH_BYTES ((size_t)256 << 10)

/* ---- shapes -------------------------------------------------------------- */

/* Equal blocks, as few as there can be. */
static void cut(size_t n, size_t *n_blocks, size_t *block)
{
    const size_t most = n ? n : 1;

    *n_blocks = (most + BLOCK_MOST - 1) / BLOCK_MOST;
    *block = ((most + *n_blocks - 1) / *n_blocks + BLOCK_STEP - 1) /
             BLOCK_STEP * BLOCK_STEP;
}

struct tvk_split_shape tvk_split_shape(size_t in, size_t out)
{
    struct tvk_split_shape s = {.in = in, .out = out};

    cut(in, &s.n_k, &s.k_block);
    cut(out, &s.n_n, &s.n_block);
    return s;
}

size_t tvk_split_row_bytes(const struct tvk_split_shape *s, size_t rows)
{
    return s->n_k * 3 * rows * s->k_block * sizeof(uint16_t);
}

static size_t block_bytes(const struct tvk_split_shape *s)
{
    return s->n_block * s->k_block * sizeof(uint16_t);
}

static size_t stage_at(const struct tvk_split_shape *s)
{
    return s->n_n * s->n_k * block_bytes(s);
}

static size_t result_at(const struct tvk_split_shape *s)
{
    return stage_at(s) + block_bytes(s);
}

static size_t scratch_at(const struct tvk_split_shape *s)
{
    return result_at(s) + TVK_SPLIT_ROWS * s->n_block * sizeof(float);
}

size_t tvk_split_work_bytes(const struct tvk_split_shape *s)
{
    return scratch_at(s) + SCRATCH_BYTES;
}

uint16_t *tvk_split_stage(const tvk_split *s, void *work)
{
    return (uint16_t *)(void *)((unsigned char *)work +
                                stage_at(tvk_split_shape_of(s)));
}

void tvk_split_rows(const struct tvk_split_shape *s, const struct tvk_table *k,
                    const float *x, size_t ldx, size_t n, size_t rows,
                    uint16_t *pieces)
{
    const size_t plane = rows * s->k_block;

    assert(n <= rows);
    for (size_t b = 0; b < s->n_k; b++, pieces += 3 * plane) {
        const size_t at = b * s->k_block;
        const size_t left = s->in > at ? s->in - at : 0;
        const size_t width = left < s->k_block ? left : s->k_block;

        if (n < rows || width < s->k_block)
            memset(pieces, 0, 3 * plane * sizeof(*pieces));
        for (size_t r = 0; r < n; r++)
            k->split_bf16(pieces + r * s->k_block, plane, x + r * ldx + at,
                          width);
    }
}

const char *tvk_split_core_of(const struct tvk_table *k)
{
    if (!k)
        k = tvk_table_best();
    return k->isa >= TVK_AMX ? tvk_split_core() : NULL;
}

#ifndef TVK_HAVE_ONEDNN

const char *tvk_split_core(void)
{
    return NULL;
}

enum tv_err tvk_split_open(size_t in, size_t out, unsigned n_workers,
                           struct tv_error *err, tvk_split **out_s)
{
    (void)in;
    (void)out;
    (void)n_workers;
    *out_s = NULL;
    return tv_error_set(err, TV_E_UNSUPPORTED, "built without oneDNN");
}

void tvk_split_close(tvk_split *s)
{
    (void)s;
}

const struct tvk_split_shape *tvk_split_shape_of(const tvk_split *s)
{
    return (const struct tvk_split_shape *)(const void *)s;
}

bool tvk_split_take(tvk_split *s, unsigned worker, void *work, size_t n,
                    size_t k, bool *finite)
{
    (void)s;
    (void)worker;
    (void)work;
    (void)n;
    (void)k;
    (void)finite;
    return false;
}

const float *tvk_split_product(tvk_split *s, unsigned worker, void *work,
                               const uint16_t *pieces, size_t rows, size_t n)
{
    (void)s;
    (void)worker;
    (void)work;
    (void)pieces;
    (void)rows;
    (void)n;
    return NULL;
}

#else

#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>

#include <oneapi/dnnl/dnnl.h>

#include "tv/alloc.h"

#define LIBRARY     "libdnnl.so.2"

/* ---- the library --------------------------------------------------------- */

/* clang-format off */
#define FUNCTIONS(x) x(version) x(engine_create) x(engine_destroy)             \
    x(stream_create) x(stream_destroy) x(stream_wait)                          \
    x(memory_desc_init_by_strides) x(memory_desc_init_by_tag)                  \
    x(memory_desc_get_size) x(matmul_desc_init) x(primitive_attr_create)       \
    x(primitive_attr_destroy) x(primitive_attr_set_scratchpad_mode)            \
    x(primitive_attr_set_post_ops) x(post_ops_create) x(post_ops_destroy)      \
    x(post_ops_append_sum) x(primitive_desc_create)                            \
    x(primitive_desc_destroy) x(primitive_desc_query)                          \
    x(primitive_desc_query_md) x(primitive_create) x(primitive_destroy)        \
    x(primitive_execute) x(reorder_primitive_desc_create) x(memory_create)     \
    x(memory_destroy) x(memory_set_data_handle)
/* clang-format on */

/* Written once under the guard, read-only afterwards. */
static struct {
#define FIELD(name) __typeof__(dnnl_##name) *name;
    FUNCTIONS(FIELD)
#undef FIELD
    void (*set_threads)(int); /* OpenMP's; NULL: the library has no threads */
    int (*max_threads)(void);
    dnnl_engine_t engine;
    char core[48];
} dnn;
static pthread_once_t once = PTHREAD_ONCE_INIT;

/* POSIX lets an object pointer from dlsym hold a function's address, ISO C has
 * no cast for that. */
static bool find(void *library, const char *symbol, void *field)
{
    void *const at = dlsym(library, symbol);

    memcpy(field, &at, sizeof at);
    return at != NULL;
}

/* Our workers call side by side. Returns what to set it to afterwards. */
static int alone(void)
{
    const int was = dnn.max_threads ? dnn.max_threads() : 1;

    if (was != 1)
        dnn.set_threads(1);
    return was;
}

static void not_alone(int was)
{
    if (was != 1)
        dnn.set_threads(was);
}

/* What one product of `rows` by a block of weights takes. */
static bool product_desc(const struct tvk_split_shape *s, size_t rows, bool add,
                         dnnl_primitive_desc_t *out, dnnl_memory_desc_t *x,
                         dnnl_memory_desc_t *y)
{
    const dnnl_dim_t m = (dnnl_dim_t)rows, n = (dnnl_dim_t)s->n_block,
                     k = (dnnl_dim_t)s->k_block;
    const dnnl_dims_t x_dims = {m, k}, w_dims = {k, n}, y_dims = {m, n};
    const dnnl_dims_t x_strides = {k, 1}, y_strides = {n, 1};
    dnnl_memory_desc_t w;
    dnnl_matmul_desc_t product;
    dnnl_primitive_attr_t attr = NULL;
    dnnl_post_ops_t ops = NULL;
    bool ok = true;

    *out = NULL;
    ok = ok && dnn.memory_desc_init_by_strides(x, 2, x_dims, dnnl_bf16,
                                               x_strides) == dnnl_success;
    ok = ok && dnn.memory_desc_init_by_tag(&w, 2, w_dims, dnnl_bf16,
                                           dnnl_format_tag_any) == dnnl_success;
    ok = ok && dnn.memory_desc_init_by_strides(y, 2, y_dims, dnnl_f32,
                                               y_strides) == dnnl_success;
    ok = ok && dnn.matmul_desc_init(&product, x, &w, NULL, y) == dnnl_success;
    ok = ok && dnn.primitive_attr_create(&attr) == dnnl_success;
    ok = ok && dnn.primitive_attr_set_scratchpad_mode(
                   attr, dnnl_scratchpad_mode_user) == dnnl_success;
    ok = ok && dnn.post_ops_create(&ops) == dnnl_success;
    ok = ok && (!add || dnn.post_ops_append_sum(ops, 1.0f) == dnnl_success);
    ok = ok && dnn.primitive_attr_set_post_ops(attr, ops) == dnnl_success;
    ok = ok && dnn.primitive_desc_create(out, &product, attr, dnn.engine,
                                         NULL) == dnnl_success;
    if (ops)
        (void)dnn.post_ops_destroy(ops);
    if (attr)
        (void)dnn.primitive_attr_destroy(attr);
    return ok;
}

static bool on_tiles(dnnl_primitive_desc_t d)
{
    const char *name = NULL;

    return dnn.primitive_desc_query(d, dnnl_query_impl_info_str, 0, &name) ==
               dnnl_success &&
           name != NULL && strstr(name, "amx") != NULL;
}

static void load(void)
{
    const struct tvk_split_shape least = tvk_split_shape(64, 64);
    void *library = NULL;
    dnnl_primitive_desc_t d = NULL;
    dnnl_memory_desc_t x, y;
    bool ok = true;

    /* Where there are no tiles, the library need not be looked for. */
    if (!tvk_isa_supported(TVK_AMX))
        return;
    library = dlopen(LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL)
        return;
#define FIND(name) ok = ok && find(library, "dnnl_" #name, &dnn.name);
    FUNCTIONS(FIND)
#undef FIND
    if (!ok)
        return;
    const dnnl_version_t *const v = dnn.version();
    if (v->major != DNNL_VERSION_MAJOR)
        return;
    if (v->cpu_runtime == DNNL_RUNTIME_OMP) {
        if (!find(library, "omp_set_num_threads", &dnn.set_threads) ||
            !find(library, "omp_get_max_threads", &dnn.max_threads))
            return;
    } else if (v->cpu_runtime != DNNL_RUNTIME_SEQ) {
        return;
    }
    if (dnn.engine_create(&dnn.engine, dnnl_cpu, 0) != dnnl_success)
        return;
    const int was = alone();
    if (product_desc(&least, TVK_SPLIT_FEW, true, &d, &x, &y) && on_tiles(d))
        (void)snprintf(dnn.core, sizeof dnn.core, "oneDNN %d.%d.%d AMX",
                       v->major, v->minor, v->patch);
    if (d)
        (void)dnn.primitive_desc_destroy(d);
    not_alone(was);
}

const char *tvk_split_core(void)
{
    (void)pthread_once(&once, load);
    return dnn.core[0] ? dnn.core : NULL;
}

/* ---- one shape ----------------------------------------------------------- */

enum kind { ROWS, FEW, KINDS };

struct worker {
    dnnl_stream_t stream;
    dnnl_memory_t stage, block, scratch;
    dnnl_memory_t x[KINDS], y[KINDS];
};

struct tvk_split {
    struct tvk_split_shape shape;
    dnnl_primitive_t product[KINDS][2]; /* the second adds */
    dnnl_primitive_t reorder;
    struct worker *workers;
    unsigned n_workers;
};

const struct tvk_split_shape *tvk_split_shape_of(const tvk_split *s)
{
    return &s->shape;
}

static void memory_free(dnnl_memory_t m)
{
    if (m)
        (void)dnn.memory_destroy(m);
}

static void primitive_free(dnnl_primitive_t p)
{
    if (p)
        (void)dnn.primitive_destroy(p);
}

void tvk_split_close(tvk_split *s)
{
    if (!s)
        return;
    for (unsigned i = 0; s->workers && i < s->n_workers; i++) {
        struct worker *const w = &s->workers[i];

        memory_free(w->stage);
        memory_free(w->block);
        memory_free(w->scratch);
        for (int k = 0; k < KINDS; k++) {
            memory_free(w->x[k]);
            memory_free(w->y[k]);
        }
        if (w->stream)
            (void)dnn.stream_destroy(w->stream);
    }
    for (int k = 0; k < KINDS; k++)
        for (int add = 0; add < 2; add++)
            primitive_free(s->product[k][add]);
    primitive_free(s->reorder);
    tv_free(s->workers);
    tv_free(s);
}

struct descs {
    dnnl_memory_desc_t x[KINDS], y[KINDS], stage, block, scratch;
};

/* The four products; all of them must want weights in one order, which fills
 * a block and no more. */
static enum tv_err make_products(struct tvk_split *s, struct descs *d,
                                 struct tv_error *err)
{
    static const size_t rows[KINDS] = {TVK_SPLIT_ROWS, TVK_SPLIT_FEW};
    const dnnl_dims_t scratch_dims = {(dnnl_dim_t)SCRATCH_BYTES};
    const dnnl_dims_t scratch_strides = {1};
    enum tv_err rc = TV_OK;

    if (dnn.memory_desc_init_by_strides(&d->scratch, 1, scratch_dims, dnnl_u8,
                                        scratch_strides) != dnnl_success)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (int i = 0; i < 2 * KINDS && rc == TV_OK; i++) {
        const int kind = i / 2;
        dnnl_primitive_desc_t p = NULL;

        if (!product_desc(&s->shape, rows[kind], i % 2, &p, &d->x[kind],
                          &d->y[kind]) ||
            !on_tiles(p)) {
            rc = tv_error_set(err, TV_E_UNSUPPORTED,
                              "oneDNN has no product of this shape");
        } else {
            const dnnl_memory_desc_t *const w =
                dnn.primitive_desc_query_md(p, dnnl_query_weights_md, 0);
            const dnnl_memory_desc_t *const scratch =
                dnn.primitive_desc_query_md(p, dnnl_query_scratchpad_md, 0);

            if (i == 0)
                d->block = *w;
            if (dnn.memory_desc_get_size(w) != block_bytes(&s->shape) ||
                memcmp(w, &d->block, sizeof(*w)) != 0 ||
                dnn.memory_desc_get_size(scratch) > SCRATCH_BYTES)
                rc = tv_error_set(err, TV_E_UNSUPPORTED,
                                  "oneDNN wants weights in an unknown order");
            else if (dnn.primitive_create(&s->product[kind][i % 2], p) !=
                     dnnl_success)
                rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        }
        if (p)
            (void)dnn.primitive_desc_destroy(p);
    }
    return rc;
}

static bool make_reorder(struct tvk_split *s, struct descs *d)
{
    const dnnl_dim_t n = (dnnl_dim_t)s->shape.n_block,
                     k = (dnnl_dim_t)s->shape.k_block;
    const dnnl_dims_t dims = {k, n}, strides = {1, k};
    dnnl_primitive_desc_t p = NULL;
    bool ok = dnn.memory_desc_init_by_strides(&d->stage, 2, dims, dnnl_bf16,
                                              strides) == dnnl_success;

    ok = ok &&
         dnn.reorder_primitive_desc_create(&p, &d->stage, dnn.engine, &d->block,
                                           dnn.engine, NULL) == dnnl_success;
    ok = ok && dnn.primitive_create(&s->reorder, p) == dnnl_success;
    if (p)
        (void)dnn.primitive_desc_destroy(p);
    return ok;
}

static bool make_memory(dnnl_memory_t *out, const dnnl_memory_desc_t *d)
{
    return dnn.memory_create(out, d, dnn.engine, DNNL_MEMORY_NONE) ==
           dnnl_success;
}

static bool make_worker(struct worker *w, const struct descs *d)
{
    bool ok = dnn.stream_create(&w->stream, dnn.engine,
                                dnnl_stream_default_flags) == dnnl_success;

    ok = ok && make_memory(&w->stage, &d->stage);
    ok = ok && make_memory(&w->block, &d->block);
    ok = ok && make_memory(&w->scratch, &d->scratch);
    for (int k = 0; k < KINDS; k++)
        ok = ok && make_memory(&w->x[k], &d->x[k]) &&
             make_memory(&w->y[k], &d->y[k]);
    return ok;
}

enum tv_err tvk_split_open(size_t in, size_t out, unsigned n_workers,
                           struct tv_error *err, tvk_split **out_s)
{
    enum tv_err rc = TV_OK;
    struct tvk_split *s = NULL;
    struct descs d;

    *out_s = NULL;
    if (tvk_split_core() == NULL)
        return tv_error_set(err, TV_E_UNSUPPORTED, "no oneDNN with AMX");
    const int was = alone();
    memset(&d, 0, sizeof d);
    s = tv_calloc(1, sizeof(*s));
    if (s)
        s->workers = tv_calloc(n_workers, sizeof(*s->workers));
    if (!s || !s->workers) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    s->n_workers = n_workers;
    s->shape = tvk_split_shape(in, out);
    TV_TRY(make_products(s, &d, err));
    if (!make_reorder(s, &d)) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (unsigned i = 0; i < n_workers; i++) {
        if (!make_worker(&s->workers[i], &d)) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
            goto out;
        }
    }
    *out_s = s;
    s = NULL;
out:
    tvk_split_close(s);
    not_alone(was);
    return rc;
}

/* ---- work ---------------------------------------------------------------- */

static bool run(const struct worker *w, dnnl_primitive_t p,
                const dnnl_exec_arg_t *args, int n)
{
    const int was = alone();
    const bool ok =
        dnn.primitive_execute(p, w->stream, n, args) == dnnl_success &&
        dnn.stream_wait(w->stream) == dnnl_success;

    not_alone(was);
    return ok;
}

/* Where block (n, k) of the weights is. */
static void *block_of(const tvk_split *s, void *work, size_t n, size_t k)
{
    return (unsigned char *)work +
           (n * s->shape.n_k + k) * block_bytes(&s->shape);
}

/* Four bf16 numbers at a time: one more than an exponent of ones runs over into
 * the sign's place. */
static bool all_finite(const uint16_t *x, size_t n)
{
    const uint64_t exponent = UINT64_C(0x7f807f807f807f80);
    const uint64_t low = UINT64_C(0x0080008000800080);
    uint64_t carry = 0;

    assert(n % 4 == 0);
    for (size_t i = 0; i < n; i += 4) {
        uint64_t v = 0;

        memcpy(&v, x + i, sizeof v);
        carry |= (v & exponent) + low;
    }
    return (carry & UINT64_C(0x8000800080008000)) == 0;
}

bool tvk_split_take(tvk_split *s, unsigned worker, void *work, size_t n,
                    size_t k, bool *finite)
{
    struct worker *const w = &s->workers[worker];
    uint16_t *const stage = tvk_split_stage(s, work);
    const dnnl_exec_arg_t args[] = {{DNNL_ARG_FROM, w->stage},
                                    {DNNL_ARG_TO, w->block}};

    assert(n < s->shape.n_n && k < s->shape.n_k);
    if (!all_finite(stage, s->shape.n_block * s->shape.k_block))
        *finite = false;
    return dnn.memory_set_data_handle(w->stage, stage) == dnnl_success &&
           dnn.memory_set_data_handle(w->block, block_of(s, work, n, k)) ==
               dnnl_success &&
           run(w, s->reorder, args, 2);
}

const float *tvk_split_product(tvk_split *s, unsigned worker, void *work,
                               const uint16_t *pieces, size_t rows, size_t n)
{
    struct worker *const w = &s->workers[worker];
    const enum kind kind = rows == TVK_SPLIT_ROWS ? ROWS : FEW;
    const size_t plane = rows * s->shape.k_block;
    unsigned char *const base = work;
    float *const y = (float *)(void *)(base + result_at(&s->shape));
    const dnnl_exec_arg_t args[] = {{DNNL_ARG_SRC, w->x[kind]},
                                    {DNNL_ARG_WEIGHTS, w->block},
                                    {DNNL_ARG_DST, w->y[kind]},
                                    {DNNL_ARG_SCRATCHPAD, w->scratch}};
    bool ok = true;

    assert(rows == TVK_SPLIT_ROWS || rows == TVK_SPLIT_FEW);
    ok = dnn.memory_set_data_handle(w->y[kind], y) == dnnl_success &&
         dnn.memory_set_data_handle(w->scratch, base + scratch_at(&s->shape)) ==
             dnnl_success;
    for (size_t k = 0; ok && k < s->shape.n_k; k++) {
        ok = dnn.memory_set_data_handle(w->block, block_of(s, work, n, k)) ==
             dnnl_success;
        for (size_t j = 3; ok && j-- > 0;) {
            /* oneDNN takes no const; it only reads them. */
            void *const x = (void *)(uintptr_t)(pieces + (3 * k + j) * plane);

            ok = dnn.memory_set_data_handle(w->x[kind], x) == dnnl_success &&
                 run(w, s->product[kind][k > 0 || j < 2], args, 4);
        }
    }
    return ok ? y : NULL;
}

#endif
