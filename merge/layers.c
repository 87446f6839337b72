/* SPDX-License-Identifier: Apache-2.0 */
/*
 * layers.c - what each way to prune costs each layer (tvm_layers).
 *
 * Per model that runs: first over the other text, whose X^T X goes into a
 * scratch file without a name; then over the calibration text, where each layer
 * is pruned in every way and the errors under both matrices are taken. The
 * error is tr(D H D^T) with D = T - P and H = X^T X, undamped.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <sys/mman.h>

#include "calibrated.h"
#include "calibrated_parts.h"
#include "prune.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/cuda_math.h"
#include "tv/hash.h"
#include "tv/layer.h"
#include "tv/sys.h"
#include "tv/text.h"

#define MODEL_LEAST (2 * TVM_MODEL_LEAST)

struct way {
    const char *name;
    bool random;
    struct tvm_trim_rule rule; /* density is filled in */
};

/* What an option of the recipe may be called in each. */
static const struct way ways[] = {
    {"magnitude", false, {.calibrated = true, .score = TVM_SCORE_MAGNITUDE}},
    {"random", true, {.calibrated = true}},
    {"importance", false, {.calibrated = true, .score = TVM_SCORE_DIAGONAL}},
    {"cholesky",
     false,
     {.calibrated = true,
      .score = TVM_SCORE_CHOLESKY,
      .compare = TVM_COMPARE_LAYER}},
    {"sparsegpt",
     false,
     {.calibrated = true,
      .score = TVM_SCORE_CHOLESKY,
      .compare = TVM_COMPARE_LOOP}},
    {"obs",
     false,
     {.calibrated = true,
      .score = TVM_SCORE_CHOLESKY,
      .correct = TVM_CORRECT_OBS}},
    {"cg",
     false,
     {.calibrated = true,
      .score = TVM_SCORE_DIAGONAL,
      .correct = TVM_CORRECT_CG}},
    {"obs+cg",
     false,
     {.calibrated = true,
      .score = TVM_SCORE_CHOLESKY,
      .correct = TVM_CORRECT_OBS_CG}},
};
#define N_WAYS (sizeof ways / sizeof *ways)

struct scan {
    const struct tvm_plan *p;
    const struct tvm_layers_options *o;
    const struct tvm_run_hooks *hooks;
    tvm_layer_fn fn;
    void *arg;
    size_t donor, model; /* inputs */
    const char *ref;
    bool other; /* the pass over the other text */
    const tve_calibration *c;
    uint64_t *at; /* [inputs]: in the file; UINT64_MAX: not there */
    int fd;
    uint64_t used;
    const unsigned char *map;
    uint64_t need; /* memory, of all donors */
};

static double setting(const struct tvm_tensor *t, const char *name,
                      double fallback)
{
    for (size_t i = 0; i < t->method->n_params; i++)
        if (strcmp(t->method->params[i].name, name) == 0)
            return t->shared_set[i] ? t->shared[i] : fallback;
    return fallback;
}

static bool is_measured(const struct scan *s, const struct tvm_tensor *t)
{
    return t->has_inputs && t->base >= 0 && t->n_elems > 0 &&
           (!s->o->prefix ||
            strncmp(t->name, s->o->prefix, strlen(s->o->prefix)) == 0);
}

static size_t model_of(const struct tvm_tensor *t, size_t source)
{
    const bool base = setting(t, "statistics", 0) == (double)TVM_INPUTS_BASE;
    return t->sources[base ? (size_t)t->base : source].input;
}

static const char *weight_of(const struct scan *s, const struct tvm_tensor *t,
                             size_t source)
{
    const bool own = t->sources[source].input == s->model;
    return t->sources[own ? source : (size_t)t->base].tensor->name;
}

/* The next source of this pass at or behind (*i, *k). */
static bool next(const struct scan *s, size_t *i, size_t *k)
{
    for (; *i < s->p->n_tensors; (*i)++, *k = 0) {
        const struct tvm_tensor *t = &s->p->tensors[*i];
        for (; is_measured(s, t) && *k < t->n_sources; (*k)++)
            if ((int)*k != t->base && t->sources[*k].input == s->donor &&
                model_of(t, *k) == s->model)
                return true;
    }
    return false;
}

/* ---- errors -------------------------------------------------------------- */

struct measured {
    struct tvm_layer *l;
    float *t, *p, *d, *work; /* T, P [rows, cols]; rows of D */
    const float *gram, *other;
    float *h;    /* NULL: a device has it */
    size_t tile; /* rows of d */
};

/* tr(D H D^T), D = T - P, or T for p NULL. */
static enum tv_err error_under(const struct measured *m, const float *gram,
                               const float *p, double *out,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda *const cuda = m->l->p->options.cuda;
    const size_t cols = m->l->cols;
    tvk_cuda_layer *device = NULL;
    double unused = 0;

    *out = 0;
    if (cuda)
        TV_TRY(tvk_cuda_layer_open(cuda, 0, cols, err, &device));
    if (m->h)
        tvm_gram_unpack(m->h, gram, cols);
    else
        TV_TRY(tvk_cuda_layer_gram(device, gram, NULL, err));
    if (m->h && device)
        TV_TRY(tvk_cuda_layer_square(device, m->h, err));
    for (size_t row = 0, n = 0; row < m->l->rows; row += n) {
        const float *t = m->t + row * cols;
        n = m->l->rows - row;
        n = n < m->tile ? n : m->tile;
        for (size_t i = 0; i < n * cols; i++)
            m->d[i] = p ? t[i] - p[row * cols + i] : t[i];
        if (device)
            TV_TRY(tvk_cuda_layer_product(device, m->d, m->d, n, out, &unused,
                                          &unused, err));
        else
            tvk_gram_product(m->d, m->d, m->h, n, cols, out, &unused, &unused,
                             m->work);
    }
out:
    tvk_cuda_layer_close(device);
    return rc;
}

/* The mask that DARE draws, without its factor. */
static uint64_t thin(const struct scan *s, const struct measured *m,
                     size_t source, double density)
{
    const struct tvm_tensor *t = m->l->t;
    unsigned char bytes[12];
    uint64_t words[TVM_BLOCK / 64];
    uint64_t kept = 0;

    tv_put_le64(bytes, s->p->options.seed);
    tv_put_le32(bytes + 8, (uint32_t)t->sources[source].position);
    const uint64_t key = tv_hash64(bytes, sizeof bytes);
    for (uint64_t from = 0; from < t->n_elems; from += TVM_BLOCK) {
        const uint64_t left = t->n_elems - from;
        const size_t n = left < TVM_BLOCK ? (size_t)left : TVM_BLOCK;
        (void)m->l->k->philox_mask(words, from, key, t->name_hash,
                                   (uint64_t)(density * 4294967296.0 + 0.5), n);
        for (size_t i = 0; i < n; i++) {
            const uint64_t e = from + i;
            const size_t at = t->in_first
                                  ? (size_t)(e % m->l->rows) * m->l->cols +
                                        (size_t)(e / m->l->rows)
                                  : (size_t)e;
            const bool keep = words[i / 64] >> (i % 64) & 1u;
            m->p[at] = keep ? m->t[at] : 0.0f;
            kept += m->p[at] != 0.0f;
        }
    }
    return kept;
}

static enum tv_err measure_way(const struct scan *s, const struct measured *m,
                               size_t source, const struct way *way,
                               double density, double whole,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_tensor *t = m->l->t;
    const size_t n = m->l->rows * m->l->cols;
    const struct tvm_stats stats = {
        .n = m->l->cols, .gram = m->gram, .cuda = s->p->options.cuda};
    const struct tvm_prune_again again = {tvm_layer_rows, m->l};
    struct tvm_trim_rule rule = way->rule;
    struct tvm_pruned got = {.n_kept = 0};
    struct tvm_layer_error e = {.name = t->name,
                                .donor = s->p->inputs[s->donor].ref,
                                .method = way->name,
                                .density = density};

    rule.density = density;
    rule.as_sparsegpt = true; /* so that all keep as much as the loop */
    rule.damping = setting(t, "damping", 0.01);
    rule.cg_steps = (unsigned)setting(t, "cg_steps", 3);
    if (density >= 1.0) {
        memcpy(m->p, m->t, n * sizeof *m->p);
        for (size_t i = 0; i < n; i++)
            got.n_kept += m->t[i] != 0.0f;
    } else if (way->random) {
        got.n_kept = thin(s, m, source, density);
    } else {
        memcpy(m->p, m->t, n * sizeof *m->p);
        TV_TRY(tvm_prune(&rule, m->p, m->l->rows, m->l->cols, &stats, &again,
                         &got, err));
    }
    e.kept = got.n_kept;
    e.damping = got.damping > rule.damping ? got.damping : 0;
    e.n_unseen = got.n_unseen;
    TV_TRY(error_under(m, m->gram, m->p, &e.error, err));
    e.relative = whole > 0 ? e.error / whole : 0;
    e.has_other = m->other != NULL;
    if (m->other)
        TV_TRY(error_under(m, m->other, m->p, &e.error_other, err));
    s->fn(s->arg, &e);
out:
    return rc;
}

/* H is on the host: without a device, and where that has no memory for it. */
static bool gram_here(const tvk_cuda *cuda, size_t cols)
{
    return !cuda || !tvk_cuda_layer_factors(cuda, 0, cols);
}

static uint64_t layer_bytes(const struct tvm_tensor *t, const tvk_cuda *cuda)
{
    size_t rows = 0;
    size_t cols = 0;
    uint64_t most = 0;

    tvm_layer_shape(t, &rows, &cols);
    for (size_t i = 0; i < N_WAYS; i++) {
        const uint64_t b = tvm_prune_bytes(&ways[i].rule, rows, cols, cuda);
        most = b > most ? b : most;
    }
    most += 2 * t->n_elems * sizeof(float);
    if (gram_here(cuda, cols))
        most += (uint64_t)cols * cols * sizeof(float);
    if (cuda)
        return most + TVK_CUDA_CG_ROWS * (uint64_t)cols * sizeof(float);
    return most +
           (TVK_CG_ROWS * (uint64_t)cols + tvk_cg_work(cols)) * sizeof(float);
}

static enum tv_err measure(const struct scan *s, const struct tvm_tensor *t,
                           size_t source, const struct tve_stat_input *in,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_layer l;
    struct measured m = {.l = &l, .gram = in->gram};
    const size_t at = tve_calibration_find(s->c, in->tensors[0]);
    const tvk_cuda *const cuda = s->p->options.cuda;
    double whole = 0;

    m.tile = cuda ? TVK_CUDA_CG_ROWS : TVK_CG_ROWS;
    TV_TRY(tvm_layer_open(&l, s->p, t, source, err));
    if (in->n != l.cols) {
        rc = tv_error_set(err, TV_E_INTERNAL, "%s: %zu inputs for %zu columns",
                          t->name, in->n, l.cols);
        goto out;
    }
    m.t = tv_alloc_aligned((size_t)t->n_elems * sizeof(float));
    m.p = tv_alloc_aligned((size_t)t->n_elems * sizeof(float));
    m.d = tv_alloc_aligned(m.tile * l.cols * sizeof(float));
    if (gram_here(cuda, l.cols))
        m.h = tv_alloc_aligned(l.cols * l.cols * sizeof(float));
    if (!cuda)
        m.work = tv_alloc_aligned(tvk_cg_work(l.cols) * sizeof(float));
    if (!m.t || !m.p || !m.d || (gram_here(cuda, l.cols) && !m.h) ||
        (!cuda && !m.work)) {
        rc = tv_error_set(err, TV_E_NOMEM, "%s: out of memory", t->name);
        goto out;
    }
    if (s->map && s->at[at] != UINT64_MAX)
        m.other = (const float *)(const void *)(s->map + s->at[at]);
    tvm_layer_rows(&l, 0, l.rows, m.t);
    TV_TRY(error_under(&m, m.gram, NULL, &whole, err));
    for (size_t d = 0; d < s->o->n_densities; d++)
        for (size_t w = 0; w < N_WAYS; w++)
            TV_TRY(measure_way(s, &m, source, &ways[w], s->o->densities[d],
                               whole, err));
out:
    tv_free(m.work);
    tv_free(m.d);
    tv_free(m.h);
    tv_free(m.p);
    tv_free(m.t);
    tvm_layer_close(&l);
    return rc;
}

/* ---- passes -------------------------------------------------------------- */

static enum tv_err put_other(struct scan *s, const struct tve_stat_input *in,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n = tve_stat_size(TVE_STAT_GRAM, in->n) * sizeof(float);

    TV_TRY(tv_pwrite_all(s->fd, in->gram, n, s->used, "the scratch file", err));
    s->at[tve_calibration_find(s->c, in->tensors[0])] = s->used;
    s->used = (s->used + n + 63) / 64 * 64;
out:
    return rc;
}

static enum tv_err on_input(void *arg, const struct tve_stat_input *in,
                            struct tv_error *err)
{
    struct scan *const s = arg;
    enum tv_err rc = TV_OK;
    size_t i = 0;
    size_t k = 0;

    if (s->other)
        return put_other(s, in, err);
    for (; next(s, &i, &k); k++)
        for (size_t n = 0; n < in->n_tensors; n++)
            if (strcmp(in->tensors[n], weight_of(s, &s->p->tensors[i], k)) == 0)
                TV_TRY(measure(s, &s->p->tensors[i], k, in, err));
out:
    return rc;
}

static void on_step(void *arg, uint64_t done, uint64_t total)
{
    const struct scan *const s = arg;

    if (s->hooks && s->hooks->calibrating)
        s->hooks->calibrating(s->hooks->arg, s->ref, done, total);
}

/* The inputs that a donor is measured with, owned. */
static enum tv_err mark_wanted(const struct scan *s, const tve_calibration *c,
                               struct tv_error *err, bool **out)
{
    const size_t n = tve_calibration_count(c);
    bool *want = tv_calloc(n + 1, sizeof *want);
    size_t i = 0;
    size_t k = 0;

    if (!want)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (; next(s, &i, &k); k++) {
        const char *name = weight_of(s, &s->p->tensors[i], k);
        const size_t at = tve_calibration_find(c, name);
        if (at == n) {
            tv_free(want);
            return tv_error_set(err, TV_E_UNSUPPORTED,
                                "%s: running '%s' does not show the inputs of "
                                "this tensor",
                                name, s->p->inputs[s->model].ref);
        }
        want[at] = true;
    }
    *out = want;
    return TV_OK;
}

static enum tv_err pass(struct scan *s, const struct tvm_calibration *cal,
                        uint64_t memory, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_calibration_options opt = {
        .kind = TVE_STAT_GRAM,
        .store = s->p->options.no_cache ? NULL : s->p->options.store};
    const struct tve_progress progress = {on_step, s,
                                          s->hooks ? s->hooks->cancel : NULL};
    struct tve_samples samples = {.n = 0};
    tve_calibration *c = NULL;
    tve_model *m = NULL;
    bool *want = NULL;

    TV_TRY(tvm_layer_model(s->p, s->model, memory, err, &m));
    TV_TRY(tvm_layer_samples(s->p, s->model, m, cal, &samples, err));
    TV_TRY(tve_calibration_open(m, &samples, &opt, err, &c));
    TV_TRY(mark_wanted(s, c, err, &want));
    const size_t n = tve_calibration_count(c);
    if (!s->at) {
        s->at = tv_alloc((n + 1) * sizeof *s->at);
        for (size_t j = 0; s->at && j < n; j++)
            s->at[j] = UINT64_MAX;
    }
    if (!s->at) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    s->c = c;
    TV_TRY(tve_calibration_run(c, want, &progress, on_input, s, NULL, err));
out:
    s->c = NULL;
    tv_free(want);
    tve_calibration_close(c);
    tve_samples_free(&samples);
    tve_model_close(m);
    return rc;
}

static enum tv_err open_scratch(struct scan *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const char *tmp = getenv("TMPDIR");
    char *path =
        tv_asprintf("%s/tvmerge-layers.%ld.%p", tmp && *tmp ? tmp : P_tmpdir,
                    (long)getpid(), (void *)s);

    if (!path)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    s->fd = tv_sys()->open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (s->fd < 0)
        rc = tv_error_sys(err, errno, "cannot create scratch file %s", path);
    else
        (void)tv_sys()->unlink(path);
    tv_free(path);
    return rc;
}

static enum tv_err map_scratch(struct scan *s, struct tv_error *err)
{
    if (s->used == 0)
        return TV_OK;
    void *at =
        tv_sys()->mmap(NULL, (size_t)s->used, PROT_READ, MAP_SHARED, s->fd, 0);
    if (at == MAP_FAILED)
        return tv_error_sys(err, errno, "mapping a scratch file");
    s->map = at;
    return TV_OK;
}

/* The other text, cut as the calibration's. */
static struct tvm_calibration other_text(const struct tvm_layers_options *o,
                                         const struct tvm_calibration *cal)
{
    static const char *place = "--other-text";
    struct tvm_calibration other = *cal;

    other.random = false;
    other.texts = (const char **)(uintptr_t)&o->other;
    other.places = &place;
    other.n_texts = 1;
    return other;
}

/* Will a text do? Before any model runs. */
static enum tv_err check_text(const struct scan *s,
                              const struct tvm_calibration *cal,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_text_extent x;
    char why[160];

    for (size_t i = 0; i < cal->n_texts; i++) {
        char *text = NULL;
        size_t n = 0;
        rc = tvm_text_read(cal, i, err, &text, &n);
        tv_free(text);
        if (rc != TV_OK) {
            tv_error_context(err, "%s", cal->places[i]);
            goto out;
        }
    }
    TV_TRY(tvm_calibrated_texts(s->p, s->model, cal, &x, err));
    if (tvm_text_lacks(&x, why, sizeof why)) {
        rc = tv_error_set(err, TV_E_INPUT, "calibration of '%s': %s",
                          s->p->inputs[s->model].ref, why);
        if (cal->n_texts > 0)
            tv_error_context(err, "%s", cal->places[0]);
    }
out:
    return rc;
}

/* What a donor's largest layer takes beside the model that runs. */
static uint64_t layer_most(const struct scan *s)
{
    uint64_t most = 0;
    size_t i = 0;
    size_t k = 0;

    for (; next(s, &i, &k); k++) {
        const uint64_t b = layer_bytes(&s->p->tensors[i], s->p->options.cuda);
        most = b > most ? b : most;
    }
    return most;
}

/* The most that the sums of one block's inputs take. */
static uint64_t sums_most(const tve_calibration *c, const bool *want)
{
    uint64_t most = 0, block = 0;
    size_t layer = SIZE_MAX;

    for (size_t j = 0; j < tve_calibration_count(c); j++) {
        const struct tve_stat_input *in = tve_calibration_input(c, j);
        if (in->kind != TVE_STAT_GRAM || !want[j])
            continue;
        if (in->layer != layer)
            block = 0;
        layer = in->layer;
        block += tve_stat_size(TVE_STAT_GRAM, in->n) * sizeof(double);
        most = block > most ? block : most;
    }
    return most;
}

/* Memory for a donor, so that it is told at once and for all of them. */
static enum tv_err add_need(struct scan *s, const struct tvm_calibration *cal,
                            struct tv_error *err)
{
    const struct tve_calibration_options opt = {.kind = TVE_STAT_GRAM};
    struct tve_samples samples = {.n = 0};
    tve_calibration *c = NULL;
    tve_model *m = NULL;
    bool *want = NULL;
    enum tv_err rc = TV_OK;

    TV_TRY(tvm_layer_model(s->p, s->model, MODEL_LEAST, err, &m));
    TV_TRY(tvm_layer_samples(s->p, s->model, m, cal, &samples, err));
    TV_TRY(tve_calibration_open(m, &samples, &opt, err, &c));
    TV_TRY(mark_wanted(s, c, err, &want));
    uint64_t model =
        tve_model_least(m, TVE_PASS_STATISTICS, samples.context, 1) +
        sums_most(c, want);
    model = model > MODEL_LEAST ? model : MODEL_LEAST;
    if (layer_most(s) + model > s->need)
        s->need = layer_most(s) + model;
out:
    tv_free(want);
    tve_calibration_close(c);
    tve_samples_free(&samples);
    tve_model_close(m);
    return rc;
}

/* Can a donor be measured? Before any model runs. */
static enum tv_err check_donor(struct scan *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan_input *in = &s->p->inputs[s->donor];

    if (!in->calibration)
        return tv_error_set(err, TV_E_USAGE,
                            "no calibration text for '%s': add 'calibration: "
                            "{text: FILE}' to the model, or --text %s=FILE",
                            in->ref, in->ref);
    TV_TRY(check_text(s, in->calibration, err));
    if (s->o->other) {
        const struct tvm_calibration other = other_text(s->o, in->calibration);
        TV_TRY(check_text(s, &other, err));
    }
    rc = add_need(s, in->calibration, err);
out:
    return rc;
}

/* Both texts of one donor. */
static enum tv_err scan_donor(struct scan *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan_input *in = &s->p->inputs[s->donor];
    const uint64_t most = layer_most(s);

    s->ref = s->p->inputs[s->model].ref;
    if (s->o->other) {
        const struct tvm_calibration other = other_text(s->o, in->calibration);
        TV_TRY(open_scratch(s, err));
        s->other = true;
        TV_TRY(pass(s, &other, s->p->options.memory_bytes - most, err));
        TV_TRY(map_scratch(s, err));
    }
    s->other = false;
    TV_TRY(pass(s, in->calibration, s->p->options.memory_bytes - most, err));
out:
    if (s->map)
        (void)tv_sys()->munmap((void *)(uintptr_t)s->map, (size_t)s->used);
    if (s->fd >= 0)
        (void)tv_sys()->close(s->fd);
    tv_free(s->at);
    s->at = NULL;
    s->map = NULL;
    s->fd = -1;
    s->used = 0;
    return rc;
}

/* For every donor and the model that runs for it. */
static enum tv_err each_donor(struct scan *s,
                              enum tv_err (*one)(struct scan *s,
                                                 struct tv_error *err),
                              bool *any, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    for (s->donor = 0; s->donor < s->p->n_inputs; s->donor++)
        for (s->model = 0; s->model < s->p->n_inputs; s->model++) {
            size_t i = 0;
            size_t k = 0;
            if (!next(s, &i, &k))
                continue;
            *any = true;
            TV_TRY(one(s, err));
        }
out:
    return rc;
}

enum tv_err tvm_layers(const struct tvm_plan *p,
                       const struct tvm_layers_options *o,
                       const struct tvm_run_hooks *hooks, tvm_layer_fn fn,
                       void *arg, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct scan s = {
        .p = p, .o = o, .hooks = hooks, .fn = fn, .arg = arg, .fd = -1};
    bool any = false;

    if (tvm_calibrated_walks(p)) {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "layers are measured one by one: not with statistics "
                          "of the model merged so far");
        tv_error_hint(err, "write 'statistics: own' or 'base'");
        goto out;
    }
    TV_TRY(each_donor(&s, check_donor, &any, err));
    if (s.need > p->options.memory_bytes) {
        char a[32], b[32];
        rc =
            tv_error_set(err, TV_E_BUDGET,
                         "measuring these layers needs at least --memory %s "
                         "(%llu bytes), it is %s",
                         tv_format_bytes_arg(s.need, a, sizeof a),
                         (unsigned long long)s.need,
                         tv_format_bytes(p->options.memory_bytes, b, sizeof b));
        goto out;
    }
    TV_TRY(each_donor(&s, scan_donor, &any, err));
    if (!any)
        rc = tv_error_set(
            err, TV_E_INPUT, "the recipe has no linear layers with a base%s%s",
            o->prefix ? " below " : "", o->prefix ? o->prefix : "");
out:
    return rc;
}
