/* SPDX-License-Identifier: Apache-2.0 */
/*
 * extract.c - an adapter from a fine-tune: of every matrix D = W - W0 that is
 * not zero, the best factors of rank r.
 *
 * Small matrices are decomposed whole. Larger ones (or those that would not fit
 * into the budget) by subspace iteration on a random start (Halko, Martinsson,
 * Tropp, arXiv 0909.4061, algorithm 4.4 with a Rayleigh-Ritz step at the end):
 *
 *   Q = orth(D Omega);  POWER times: Q = orth(D orth(D^T Q));  D^T Q = V S U^T
 *
 * D is read in blocks of rows each time and never held; (out + in) (r + EXTRA)
 * numbers are. What the factors keep of ||D||_F^2 is exact for both.
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <jansson.h>

#include "tv/adapt.h"
#include "tv/adapter_out.h"
#include "tv/adapters.h"
#include "tv/alloc.h"
#include "tv/linalg.h"
#include "tv/model.h"
#include "tv/text.h"

#define FULL_MAX 1024u /* smaller side of matrices that are taken whole */
#define EXTRA    24u   /* columns of the subspace beyond the rank */
#define POWER    6u
#define BLOCK    (1u << 16) /* elements of D read at a time, at least a row */

struct side {
    struct tv_ref *ref;
    tv_input *in;
    struct tv_arch *arch;
};

struct extract {
    const struct tvm_extract *x;
    const struct tvm_options *o;
    const struct tvk_table *k;
    struct side model, base;
    enum tv_dtype dtype;
    tva_out *out;
    json_t *targets, *ranks, *saved;
    uint64_t top_rank, bytes_read;
    size_t n_left_out;
    char *spare; /* a matrix that did not change: for adapters without one */
    struct {
        size_t in, out;
    } spare_size;
};

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory");
}

static double now(void)
{
    struct timespec ts;
    (void)clock_gettime(CLOCK_MONOTONIC, &ts);
    return (double)ts.tv_sec + 1e-9 * (double)ts.tv_nsec;
}

/* ---- models -------------------------------------------------------------- */

static void side_close(struct side *s)
{
    tv_arch_free(s->arch);
    tv_input_close(s->in);
    tv_ref_free(s->ref);
}

static enum tv_err side_open(struct side *s, const char *text, tv_store *store,
                             struct tv_error *err)
{
    struct tv_arch_name *names = NULL;
    char *config = NULL;
    size_t n_config = 0, n = 0;
    bool found = false;
    enum tv_err rc = TV_OK;

    TV_TRY(tv_ref_resolve(text, err, &s->ref));
    if (s->ref->n_adapters > 0) {
        rc = tv_error_set(err, TV_E_INPUT,
                          "'%s' has adapters already; merge them first "
                          "(passthrough), or use them as they are",
                          text);
        goto out;
    }
    TV_TRY(tv_input_open(&s->ref->model, store, err, &s->in));
    if (tv_input_kind(s->in) == TV_KIND_ADAPTER) {
        rc = tv_error_set(err, TV_E_INPUT, "'%s' is an adapter, not a model",
                          text);
        goto out;
    }
    n = tv_input_count(s->in);
    names = tv_calloc(n + 1, sizeof *names);
    if (!names) {
        rc = no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < n; i++) {
        const struct tv_input_tensor *t = tv_input_tensor(s->in, i);
        names[i] = (struct tv_arch_name){t->name, t->rank, t->shape, t->dtype};
    }
    TV_TRY(tv_input_side_read(s->in, "config.json", &found, &config, &n_config,
                              err));
    TV_TRY(tv_arch_describe(found ? config : NULL, n_config, names, n, err,
                            &s->arch));
    TV_TRY(tv_arch_check_plain(s->arch, text, err));
out:
    tv_free(config);
    tv_free(names);
    return rc;
}

/* ---- one difference ------------------------------------------------------ */

struct diff { /* D = W - W0, [rows, cols] as stored */
    const struct tvk_table *k;
    tv_input *in[2];
    struct tv_view v[2];
    size_t rows, cols, step; /* rows read at a time */
    float *x, *y;            /* [step, cols] */
    double *d;               /* [cols, step]: the rows as columns */
};

static void diff_close(struct diff *f)
{
    for (int i = 0; i < 2; i++)
        if (f->in[i])
            tv_input_release(f->in[i], &f->v[i]);
    tv_free(f->x);
    tv_free(f->y);
    tv_free(f->d);
}

static enum tv_err diff_open(struct diff *f, const struct extract *e,
                             const struct tv_input_tensor *w,
                             const struct tv_input_tensor *w0,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    *f = (struct diff){.k = e->k, .in = {e->model.in, e->base.in}};
    f->rows = (size_t)w->shape[0];
    f->cols = f->rows ? (size_t)(w->n_elems / w->shape[0]) : 0;
    f->step = BLOCK / (f->cols ? f->cols : 1);
    f->step = f->step < 1 ? 1 : f->step > f->rows ? f->rows : f->step;
    f->x = tv_alloc((f->step * f->cols + 1) * sizeof *f->x);
    f->y = tv_alloc((f->step * f->cols + 1) * sizeof *f->y);
    f->d = tv_alloc_aligned((f->step * f->cols + 8) * sizeof *f->d);
    if (!f->x || !f->y || !f->d) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(tv_input_view(f->in[0], w, err, &f->v[0]));
    TV_TRY(tv_input_view(f->in[1], w0, err, &f->v[1]));
out:
    return rc;
}

/* Rows [at, at + n) as columns of f->d; returns n. */
static size_t diff_read(struct diff *f, size_t at)
{
    const size_t n = f->rows - at < f->step ? f->rows - at : f->step;

    tva_view_f32(f->k, &f->v[0], at * f->cols, n * f->cols, f->x);
    tva_view_f32(f->k, &f->v[1], at * f->cols, n * f->cols, f->y);
    for (size_t i = 0; i < n * f->cols; i++)
        f->d[i] = (double)f->x[i] - (double)f->y[i];
    return n;
}

/* Sum of squares; NaN or infinite when a value is. */
static double diff_energy(struct diff *f)
{
    double sum = 0;

    for (size_t at = 0; at < f->rows;) {
        const size_t n = diff_read(f, at);
        for (size_t i = 0; i < n * f->cols; i++)
            sum += f->d[i] * f->d[i];
        at += n;
    }
    return sum;
}

/* y [rows, l] = D x, x [cols, l]; part [step, l]. */
static void diff_times(struct diff *f, const double *x, size_t l, double *y,
                       double *part)
{
    for (size_t at = 0; at < f->rows;) {
        const size_t n = diff_read(f, at);
        tva_gemm(f->d, true, x, false, n, l, f->cols, part);
        for (size_t j = 0; j < l; j++)
            memcpy(y + j * f->rows + at, part + j * n, n * sizeof *y);
        at += n;
    }
}

/* x [cols, l] = D^T y, y [rows, l]; part [step, l] and [cols, l]. */
static void diff_t_times(struct diff *f, const double *y, size_t l, double *x,
                         double *part, double *sum)
{
    memset(x, 0, f->cols * l * sizeof *x);
    for (size_t at = 0; at < f->rows;) {
        const size_t n = diff_read(f, at);
        for (size_t j = 0; j < l; j++)
            memcpy(part + j * n, y + j * f->rows + at, n * sizeof *y);
        tva_gemm(f->d, false, part, false, f->cols, l, n, sum);
        for (size_t i = 0; i < f->cols * l; i++)
            x[i] += sum[i];
        at += n;
    }
}

/* ---- decompositions ------------------------------------------------------ */

struct svd { /* u [rows, k], s [k], vt [k, cols] */
    size_t k;
    double *u, *s, *vt;
};

static void svd_free(struct svd *s)
{
    tv_free(s->u);
    tv_free(s->s);
    tv_free(s->vt);
}

static double *doubles(size_t a, size_t b)
{
    return tv_alloc_aligned((a * b + 8) * sizeof(double));
}

static enum tv_err svd_full(struct diff *f, struct svd *out,
                            struct tv_error *err)
{
    double *m = doubles(f->rows, f->cols);
    enum tv_err rc = TV_OK;

    out->k = f->rows < f->cols ? f->rows : f->cols;
    out->u = doubles(f->rows, out->k);
    out->s = doubles(out->k, 1);
    out->vt = doubles(out->k, f->cols);
    if (!m || !out->u || !out->s || !out->vt) {
        rc = no_memory(err);
        goto out;
    }
    for (size_t at = 0; at < f->rows;) {
        const size_t n = diff_read(f, at);
        for (size_t i = 0; i < n; i++)
            for (size_t j = 0; j < f->cols; j++)
                m[j * f->rows + at + i] = f->d[i * f->cols + j];
        at += n;
    }
    rc = tva_svd(m, f->rows, f->cols, out->u, out->s, out->vt, err);
out:
    tv_free(m);
    return rc;
}

/* Uniform in (-1, 1), a function of the index alone. */
static void random_start(uint64_t seed, double *x, size_t n)
{
    uint64_t s = seed;

    for (size_t i = 0; i < n; i++) {
        uint64_t z = s += UINT64_C(0x9e3779b97f4a7c15); /* SplitMix64 */
        z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
        z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
        z ^= z >> 31;
        x[i] = (double)(int64_t)z * 0x1p-63;
    }
}

static enum tv_err svd_random(struct diff *f, size_t l, uint64_t seed,
                              struct svd *out, struct tv_error *err)
{
    double *y = doubles(f->rows, l), *x = doubles(f->cols, l);
    double *part = doubles(f->step > l ? f->step : l, l);
    double *sum = doubles(f->cols, l), *r = doubles(l, l);
    double *small = doubles(l, l);
    enum tv_err rc = TV_OK;

    out->k = l;
    out->u = doubles(f->rows, l);
    out->s = doubles(l, 1);
    out->vt = doubles(l, f->cols);
    if (!y || !x || !part || !sum || !r || !small || !out->u || !out->s ||
        !out->vt) {
        rc = no_memory(err);
        goto out;
    }
    random_start(seed, x, f->cols * l);
    diff_times(f, x, l, y, part);
    for (unsigned i = 0; i < POWER; i++) {
        TV_TRY(tva_qr(y, f->rows, l, r, err));
        diff_t_times(f, y, l, x, part, sum);
        TV_TRY(tva_qr(x, f->cols, l, r, err));
        diff_times(f, x, l, y, part);
    }
    TV_TRY(tva_qr(y, f->rows, l, r, err));
    diff_t_times(f, y, l, x, part, sum);
    /* x = D^T Q = V S Us^T, [cols, l] */
    TV_TRY(tva_svd(x, f->cols, l, sum, out->s, small, err));
    tva_gemm(y, false, small, true, f->rows, l, l, out->u);
    for (size_t j = 0; j < f->cols; j++)
        for (size_t i = 0; i < l; i++)
            out->vt[j * l + i] = sum[i * f->cols + j];
out:
    tv_free(small);
    tv_free(r);
    tv_free(sum);
    tv_free(part);
    tv_free(x);
    tv_free(y);
    return rc;
}

/* ---- one matrix ---------------------------------------------------------- */

static uint64_t full_bytes(const struct diff *f)
{
    const uint64_t k = f->rows < f->cols ? f->rows : f->cols;
    return 8 * (2 * (uint64_t)f->rows * f->cols + k * (f->rows + f->cols) +
                8 * k * k);
}

static uint64_t random_bytes(const struct diff *f, size_t l)
{
    return 8 * (uint64_t)l * (3 * f->rows + 5 * f->cols + 4 * l) +
           16 * (uint64_t)f->step * f->cols;
}

static enum tv_err decompose(struct extract *e, struct diff *f, struct svd *s,
                             const char *name, bool *randomized,
                             struct tv_error *err)
{
    const uint64_t budget = e->o->memory_bytes;
    const size_t k = f->rows < f->cols ? f->rows : f->cols;
    size_t l = (size_t)e->x->rank + EXTRA;
    char a[32], b[32];

    l = l > k ? k : l;
    *randomized =
        e->x->svd == 2 ||
        (e->x->svd == 0 && (k > FULL_MAX || full_bytes(f) > budget) && l < k);
    const uint64_t need = *randomized ? random_bytes(f, l) : full_bytes(f);
    if (need > budget)
        return tv_error_set(err, TV_E_BUDGET, "%s needs --memory %s, it is %s",
                            name, tv_format_bytes_arg(need, a, sizeof a),
                            tv_format_bytes(budget, b, sizeof b));
    if (!*randomized)
        return svd_full(f, s, err);
    return svd_random(f, l, e->x->seed ^ tv_hash64(name, strlen(name)), s, err);
}

static char *key_of(const char *module, const char *what)
{
    return tv_asprintf("base_model.model.%s.%s", module, what);
}

/* A from the right vectors, B from the left ones, the roots of the values on
 * both; the other way round for matrices stored [in, out]. */
static enum tv_err put_factors(struct extract *e, const struct diff *f,
                               const struct svd *s, size_t r, bool turned,
                               const char *module, struct tv_error *err)
{
    const size_t in = turned ? f->rows : f->cols;
    const size_t out = turned ? f->cols : f->rows;
    const uint64_t sa[2] = {r, in}, sb[2] = {out, r};
    float *a = tv_alloc((r * in + 1) * sizeof *a);
    float *b = tv_alloc((r * out + 1) * sizeof *b);
    char *na = key_of(module, "lora_A.weight");
    char *nb = key_of(module, "lora_B.weight");
    enum tv_err rc = TV_OK;

    if (!a || !b || !na || !nb) {
        rc = no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < r; i++) {
        const double root = sqrt(s->s[i]);
        for (size_t j = 0; j < in; j++)
            a[i * in + j] = (float)(root * (turned ? s->u[i * f->rows + j]
                                                   : s->vt[j * s->k + i]));
        for (size_t o = 0; o < out; o++)
            b[o * r + i] = (float)(root * (turned ? s->vt[o * s->k + i]
                                                  : s->u[i * f->rows + o]));
    }
    TV_TRY(tva_out_tensor(e->out, e->k, na, 2, sa, e->dtype, a, err));
    TV_TRY(tva_out_tensor(e->out, e->k, nb, 2, sb, e->dtype, b, err));
    if (json_array_append_new(e->targets, json_string(module)) != 0 ||
        json_object_set_new(e->ranks, module, json_integer((json_int_t)r)) != 0)
        rc = no_memory(err);
    if (r > e->top_rank)
        e->top_rank = r;
out:
    tv_free(nb);
    tv_free(na);
    tv_free(b);
    tv_free(a);
    return rc;
}

/* The module as transformers calls it: checkpoints of some families leave the
 * body's name out. */
static char *module_of(const struct extract *e, const char *tensor)
{
    const char *dot = strrchr(tensor, '.');
    const size_t n = (size_t)(dot - tensor);
    const bool bare = (strcmp(e->base.arch->family, "gpt2") == 0 ||
                       strcmp(e->base.arch->family, "bloom") == 0) &&
                      strncmp(tensor, "transformer.", 12) != 0 &&
                      strncmp(tensor, "lm_head.", 8) != 0;

    return tv_asprintf("%s%.*s", bare ? "transformer." : "", (int)n, tensor);
}

/* One matrix that did not change, as small as there is: see walk(). */
static enum tv_err keep_spare(struct extract *e,
                              const struct tv_input_tensor *w, bool turned,
                              struct tv_error *err)
{
    const size_t in = (size_t)w->shape[turned ? 0 : 1];
    const size_t out = (size_t)w->shape[turned ? 1 : 0];

    if (e->spare && in + out >= e->spare_size.in + e->spare_size.out)
        return TV_OK;
    tv_free(e->spare);
    e->spare = module_of(e, w->name);
    e->spare_size.in = in;
    e->spare_size.out = out;
    return e->spare ? TV_OK : no_memory(err);
}

/* Nothing but whole modules changed. Rank 0 is no LoRA to PEFT, nor is one
 * without a module: a product of zeros is, and adds nothing. */
static enum tv_err put_nothing(struct extract *e, struct tv_error *err)
{
    const struct diff none = {.rows = e->spare_size.out,
                              .cols = e->spare_size.in};
    double zero = 0;
    double *u = tv_calloc(none.rows, sizeof *u);
    double *vt = tv_calloc(none.cols, sizeof *vt);
    const struct svd s = {.s = &zero, .u = u, .vt = vt, .k = 1};
    enum tv_err rc = TV_OK;

    rc = u && vt ? put_factors(e, &none, &s, 1, false, e->spare, err)
                 : no_memory(err);
    tv_free(vt);
    tv_free(u);
    return rc;
}

static enum tv_err extract_matrix(struct extract *e, struct diff *f,
                                  double energy, bool turned,
                                  const char *module, tvm_extracted_fn each,
                                  void *arg, struct tv_error *err)
{
    struct svd s = {.k = 0};
    struct tvm_extracted done = {.module = module};
    double kept = 0;
    size_t r = 0;
    enum tv_err rc = TV_OK;

    TV_TRY(decompose(e, f, &s, module, &done.randomized, err));
    while (r < s.k && r < e->x->rank && s.s[r] > 0 &&
           (r == 0 || s.s[r] > e->x->sv_epsilon * s.s[0])) {
        kept += s.s[r] * s.s[r];
        r++;
    }
    done.rank = r;
    done.energy = kept / energy > 1 ? 1 : kept / energy;
    TV_TRY(put_factors(e, f, &s, r, turned, module, err));
    if (each)
        each(arg, &done);
out:
    svd_free(&s);
    return rc;
}

/* The fine-tune's values as they are. */
static enum tv_err save_whole(struct extract *e,
                              const struct tv_input_tensor *w,
                              const char *module, const char *suffix,
                              struct tv_error *err)
{
    struct tv_view v = {.n_chunks = 0};
    char *name = key_of(module, suffix);
    float *x = tv_alloc((size_t)w->n_elems * sizeof *x + 4);
    enum tv_err rc = TV_OK;

    if (!name || !x) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(tv_input_view(e->model.in, w, err, &v));
    tva_view_f32(e->k, &v, 0, w->n_elems, x);
    TV_TRY(tva_out_tensor(e->out, e->k, name, w->rank, w->shape, w->dtype, x,
                          err));
    /* Weight and bias of a module follow each other. */
    const size_t n_saved = json_array_size(e->saved);
    const char *last =
        n_saved > 0 ? json_string_value(json_array_get(e->saved, n_saved - 1))
                    : NULL;
    if (!last || strcmp(last, module) != 0)
        if (json_array_append_new(e->saved, json_string(module)) != 0)
            rc = no_memory(err);
out:
    tv_input_release(e->model.in, &v);
    tv_free(x);
    tv_free(name);
    return rc;
}

/* ---- all tensors --------------------------------------------------------- */

static bool is_vocabulary(enum tv_role r)
{
    return r == TV_ROLE_EMBED || r == TV_ROLE_LM_HEAD || r == TV_ROLE_POSITION;
}

static bool is_norm(enum tv_role r)
{
    return r == TV_ROLE_FINAL_NORM || r == TV_ROLE_INPUT_NORM ||
           r == TV_ROLE_POST_ATTN_NORM || r == TV_ROLE_OTHER_NORM ||
           r == TV_ROLE_EMBED_NORM;
}

/* Does the other tensor of the module (its bias, of a bias its weight) differ?
 * PEFT loads whole modules: one that changed is saved with both. */
static enum tv_err sibling_differs(struct extract *e, const char *name,
                                   bool *differs, struct tv_error *err)
{
    const char *dot = strrchr(name, '.');
    const bool is_bias = strcmp(dot, ".bias") == 0;
    char *other = tv_asprintf("%.*s%s", (int)(dot - name), name,
                              is_bias ? ".weight" : ".bias");
    struct diff f = {.rows = 0};
    enum tv_err rc = TV_OK;

    *differs = false;
    if (!other)
        return no_memory(err);
    const struct tv_input_tensor *w = tv_input_find(e->model.in, other);
    const struct tv_input_tensor *w0 = tv_input_find(e->base.in, other);
    /* What does not fit is reported when its own turn comes. */
    if (w && w0 && w->rank == w0->rank &&
        memcmp(w->shape, w0->shape, w->rank * sizeof *w->shape) == 0 &&
        tv_dtype_is_math(w->dtype) && tv_dtype_is_math(w0->dtype)) {
        TV_TRY(diff_open(&f, e, w, w0, err));
        *differs = diff_energy(&f) != 0;
    }
out:
    diff_close(&f);
    tv_free(other);
    return rc;
}

static enum tv_err one_tensor(struct extract *e, size_t index,
                              tvm_extracted_fn each, void *arg,
                              struct tv_error *err)
{
    const struct tv_arch_tensor *t = &e->model.arch->tensors[index];
    const struct tv_input_tensor *w = tv_input_tensor(e->model.in, index);
    const struct tv_input_tensor *w0 = tv_input_find(e->base.in, w->name);
    const char *dot = strrchr(w->name, '.');
    struct diff f = {.rows = 0};
    char *module = NULL;
    double energy = 0;
    enum tv_err rc = TV_OK;

    if (t->role == TV_ROLE_BUFFER || !dot || dot == w->name)
        return TV_OK;
    if (!w0) {
        return tv_error_set(err, TV_E_INPUT, "'%s' has no tensor %s",
                            e->x->base, w->name);
    }
    if (w->rank != w0->rank ||
        memcmp(w->shape, w0->shape, w->rank * sizeof *w->shape) != 0 ||
        !tv_dtype_is_math(w->dtype) || !tv_dtype_is_math(w0->dtype))
        return tv_error_set(err, TV_E_INPUT,
                            "%s differs in shape between '%s' and '%s', or is "
                            "no tensor of F32, F16 or BF16",
                            w->name, e->x->model, e->x->base);
    TV_TRY(diff_open(&f, e, w, w0, err));
    e->bytes_read += w->bytes + w0->bytes;
    energy = diff_energy(&f);
    const bool whole = (is_vocabulary(t->role) && e->x->embeddings) ||
                       (is_norm(t->role) && e->x->norms);
    bool differs = energy != 0;
    if (!differs && whole)
        TV_TRY(sibling_differs(e, w->name, &differs, err));
    const bool turned =
        e->base.arch->linear_transposed && t->role != TV_ROLE_LM_HEAD;
    const bool matrix = w->rank == 2 && strcmp(dot, ".weight") == 0 &&
                        !is_norm(t->role) && t->role != TV_ROLE_EMBED &&
                        t->role != TV_ROLE_POSITION;
    if (!differs) {
        if (matrix && !whole)
            rc = keep_spare(e, w, turned, err);
        goto out;
    }
    if (!isfinite(energy)) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "%s holds values that are not finite", w->name);
        goto out;
    }
    module = module_of(e, w->name);
    if (!module) {
        rc = no_memory(err);
        goto out;
    }
    if (whole)
        rc = save_whole(e, w, module, dot + 1, err);
    else if (matrix)
        rc = extract_matrix(e, &f, energy, turned, module, each, arg, err);
    else
        e->n_left_out++;
out:
    tv_free(module);
    diff_close(&f);
    return rc;
}

static enum tv_err check_names(const struct extract *e, struct tv_error *err)
{
    for (size_t i = 0; i < tv_input_count(e->base.in); i++) {
        const char *name = tv_input_tensor(e->base.in, i)->name;
        if (e->base.arch->tensors[i].role != TV_ROLE_BUFFER &&
            !e->base.arch->tensors[i].optional &&
            !tv_input_find(e->model.in, name))
            return tv_error_set(err, TV_E_INPUT, "'%s' has no tensor %s",
                                e->x->model, name);
    }
    return TV_OK;
}

static char *config_text(struct extract *e)
{
    const char *module = NULL;
    json_t *rank = NULL, *doc = NULL;
    void *next = NULL;
    char *raw = NULL, *text = NULL;

    json_object_foreach_safe(e->ranks, next, module, rank)
    {
        if ((uint64_t)json_integer_value(rank) == e->top_rank)
            (void)json_object_del(e->ranks, module);
    }
    doc = json_pack(
        "{s:s, s:n, s:s, s:s, s:b, s:b, s:b, s:I, s:f, s:O?, s:I, s:O, s:O, "
        "s:O, s:b, s:b, s:s}",
        "peft_type", "LORA", "auto_mapping", "base_model_name_or_path",
        e->x->base, "bias", "none", "fan_in_fan_out",
        (int)e->base.arch->linear_transposed, "inference_mode", 1,
        "init_lora_weights", 1, "lora_alpha", (json_int_t)e->top_rank,
        "lora_dropout", 0.0, "modules_to_save",
        json_array_size(e->saved) ? e->saved : NULL, "r",
        (json_int_t)e->top_rank, "rank_pattern", e->ranks, "alpha_pattern",
        e->ranks, "target_modules", e->targets, "use_rslora", 0, "use_dora", 0,
        "task_type", "CAUSAL_LM");
    raw = doc ? tv_json_text(doc, JSON_INDENT(2)) : NULL;
    if (raw)
        text = tv_asprintf("%s\n", raw);
    tv_free(raw);
    json_decref(doc);
    return text;
}

static enum tv_err identify(const struct extract *e, struct tv_hash *out,
                            struct tv_error *err)
{
    struct tv_hash m = {0, 0}, b = {0, 0};
    struct tv_buf t;
    enum tv_err rc = TV_OK;

    tv_buf_init(&t, 4096);
    TV_TRY(tv_input_fingerprint(e->model.in, &m, err));
    TV_TRY(tv_input_fingerprint(e->base.in, &b, err));
    tv_buf_fmt(&t, "extract/1 %llu %.17g %d %d %d %d %llu ",
               (unsigned long long)e->x->rank, e->x->sv_epsilon,
               (int)e->x->embeddings, (int)e->x->norms, (int)e->dtype,
               e->x->svd, (unsigned long long)e->x->seed);
    tv_buf_le64(&t, m.lo);
    tv_buf_le64(&t, m.hi);
    tv_buf_le64(&t, b.lo);
    tv_buf_le64(&t, b.hi);
    TV_TRY(tv_buf_ok(&t, err));
    *out = tv_hash128(t.data, t.n_bytes);
out:
    tv_buf_free(&t);
    return rc;
}

static enum tv_err walk(struct extract *e, const struct tvm_run_hooks *hooks,
                        tvm_extracted_fn each, void *arg, struct tv_error *err)
{
    const size_t n = tv_input_count(e->model.in);
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < n; i++) {
        if (hooks && hooks->cancel && *hooks->cancel != 0)
            return tv_error_set(err, TV_E_INTERRUPTED, "interrupted");
        TV_TRY(one_tensor(e, i, each, arg, err));
        if (hooks && hooks->progress) {
            const struct tvm_progress p = {.n_done = i + 1, .n_tensors = n};
            hooks->progress(hooks->arg, &p);
        }
    }
    if (e->top_rank == 0 && json_array_size(e->saved) == 0)
        rc = tv_error_set(err, TV_E_INPUT,
                          "'%s' and '%s' do not differ in anything that an "
                          "adapter could hold",
                          e->x->model, e->x->base);
    else if (e->top_rank == 0 && e->spare)
        rc = put_nothing(e, err);
out:
    return rc;
}

enum tv_err tvm_extract_lora(const struct tvm_extract *x,
                             const struct tvm_options *o,
                             const struct tvm_run_hooks *hooks,
                             tvm_extracted_fn each, void *arg,
                             struct tvm_result *result, struct tv_error *err)
{
    struct extract e = {.x = x, .o = o};
    struct tva_out_done done = {.complete = false};
    struct tv_hash plan = {0, 0};
    char *config = NULL;
    const double t0 = now();
    enum tv_err rc = TV_OK;

    *result = (struct tvm_result){.n_tensors = 0};
    tv_alloc_peak_reset();
    e.k = o->kernels ? o->kernels : tvk_table_best();
    e.dtype = x->dtype == TV_DTYPE_NONE ? TV_F32 : x->dtype;
    e.targets = json_array();
    e.ranks = json_object();
    e.saved = json_array();
    if (!e.targets || !e.ranks || !e.saved) {
        rc = no_memory(err);
        goto out;
    }
    if (!tva_linalg_built()) {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "this build has no OpenBLAS, which SVD needs");
        goto out;
    }
    TV_TRY(side_open(&e.model, x->model, o->store, err));
    TV_TRY(side_open(&e.base, x->base, o->store, err));
    TV_TRY(check_names(&e, err));
    TV_TRY(identify(&e, &plan, err));
    TV_TRY(tva_out_apart(o->out_dir, tv_input_dir(e.model.in), x->model, err));
    TV_TRY(tva_out_apart(o->out_dir, tv_input_dir(e.base.in), x->base, err));
    if (o->force)
        TV_TRY(tv_out_dir_links(o->out_dir, o->store, err));
    TV_TRY(
        tva_out_open(o->out_dir, plan, o->force, o->sync, &done, err, &e.out));
    if (done.complete) {
        result->already_done = true;
        result->n_resumed = done.n_tensors;
        goto out;
    }
    TV_TRY(walk(&e, hooks, each, arg, err));
    TV_TRY(tv_input_unchanged(e.model.in, err));
    TV_TRY(tv_input_unchanged(e.base.in, err));
    result->bytes_read = e.bytes_read;
    result->bytes_written = tva_out_bytes(e.out);
    config = config_text(&e);
    if (!config) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(tva_out_finish(e.out, config, strlen(config), &done, err));
out:
    if (rc == TV_OK) {
        result->digest = done.digest;
        result->n_tensors = done.n_tensors;
        result->n_left_out = e.n_left_out;
    }
    tva_out_close(e.out);
    tv_free(e.spare);
    tv_free(config);
    json_decref(e.saved);
    json_decref(e.ranks);
    json_decref(e.targets);
    side_close(&e.model);
    side_close(&e.base);
    result->seconds = now() - t0;
    result->peak_scratch_bytes = tv_alloc_peak();
    return rc;
}
