/* SPDX-License-Identifier: Apache-2.0 */
/*
 * statistics.c - sums over the inputs of linear layers: squares of each
 * channel, or X^T X.
 *
 *            J ->
 *      +---+---+---+      items are tiles of the upper triangle; a worker
 *    I | * | * | * |      multiplies CHUNK rows at a time (sgemm) and adds the
 *      +---+---+---+      product to the packed fp64 sums, whose rows end at
 *      |   | * | * |      the right edge
 *      +---+---+---+
 *
 * Chunks begin with groups of windows (forward.c). Tiles, groups and chunks
 * depend on shapes alone: neither threads nor memory change a bit. Sums of one
 * block's inputs are in memory at a time; a finished Gram matrix is rounded to
 * fp32 in its place.
 *
 * With a CUDA device the sums are made there, where the inputs are, and come
 * back when the layer is done; those of X^T X that have no room there come and
 * go (same bits).
 */
#include <stdatomic.h>
#include <string.h>

#include <cblas.h>

#include "tv/alloc.h"
#include "tv/calibrate.h"
#include "tv/checked.h"
#include "tv/cuda_eval.h"

#include "decoder.h"

#define TILE  256u
#define CHUNK 1024u

size_t tve_stat_size(enum tve_stat kind, size_t n)
{
    size_t twice = 0;

    if (kind != TVE_STAT_GRAM)
        return n;
    return n < SIZE_MAX && tv_mul_size(n, n + 1, &twice) ? twice / 2 : 0;
}

/* ---- inputs of a model --------------------------------------------------- */

/* Slots whose modules take one input, in the order of forward.c. */
static const struct shared {
    enum tve_slot slots[TVE_SHARED_MAX];
    size_t n;
} shared[] = {
    {{TVE_QKV}, 1},     {{TVE_Q, TVE_K, TVE_V}, 3}, {{TVE_O}, 1},
    {{TVE_GATE_UP}, 1}, {{TVE_GATE, TVE_UP}, 2},    {{TVE_DOWN}, 1},
};
#define SITES_MAX (sizeof(shared) / sizeof(shared[0])) /* of a layer */

enum tv_err tve_sites(const tve_model *m, struct tve_site **out, size_t *n,
                      struct tv_error *err)
{
    size_t total = 0;

    *out = NULL;
    *n = 0;
    if (!tv_mul_size(m->spec.n_layers, SITES_MAX, &total) ||
        !(*out = tv_calloc(total ? total : 1, sizeof(**out))))
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t l = 0; l < m->spec.n_layers; l++)
        for (size_t s = 0; s < SITES_MAX; s++) {
            struct tve_site site = {.layer = l};

            for (size_t i = 0; i < shared[s].n; i++) {
                const struct tve_param *const p =
                    tve_layer_param(m, l, shared[s].slots[i]);
                if (!p->w.t)
                    continue;
                site.params[site.n_tensors] = p;
                site.tensors[site.n_tensors++] = p->w.t->name;
                site.n = tve_linear_in(m, p);
            }
            if (site.n_tensors > 0)
                (*out)[(*n)++] = site;
        }
    return TV_OK;
}

/* ---- sums ---------------------------------------------------------------- */

struct sums {
    tve_model *m;
    enum tve_stat kind;
    float **product; /* per worker: [TILE, TILE]; TVE_STAT_GRAM */
    /* wanted sites of the layer at hand, and where their sums are */
    const struct tve_site *sites[SITES_MAX];
    double *at[SITES_MAX];
    tvk_cuda_ptr there[SITES_MAX]; /* on the device; 0: not yet, or no room */
    bool no_room[SITES_MAX];
    size_t n_sites;
    /* the input at hand */
    double *sums;
    const float *x;
    size_t ldx, n, n_tiles;
    const struct tve_group *groups;
    size_t n_groups;
};

static void diag_item(void *arg, size_t item, unsigned worker)
{
    const struct sums *const s = arg;
    const size_t from = item * TILE;
    const size_t n = s->n - from < TILE ? s->n - from : TILE;
    double *const to = s->sums + from;

    (void)worker;
    for (size_t g = 0; g < s->n_groups; g++) {
        const struct tve_group *const group = &s->groups[g];

        for (size_t row = 0; row < group->n; row++) {
            const float *const x = s->x + (group->start + row) * s->ldx + from;
            for (size_t i = 0; i < n; i++)
                to[i] += (double)x[i] * (double)x[i];
        }
    }
}

/* Where row i of the packed triangle would have its column 0. */
static double *packed_row(double *sums, size_t n, size_t i)
{
    return sums + i * n - i * (i + 1) / 2;
}

static void gram_chunk(const struct sums *s, const float *x, size_t rows,
                       size_t i0, size_t j0, float *product)
{
    const size_t ni = s->n - i0 < TILE ? s->n - i0 : TILE;
    const size_t nj = s->n - j0 < TILE ? s->n - j0 : TILE;

    cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, (blasint)ni,
                (blasint)nj, (blasint)rows, 1.0f, x + i0, (blasint)s->ldx,
                x + j0, (blasint)s->ldx, 0.0f, product, (blasint)nj);
    for (size_t i = 0; i < ni; i++) {
        double *const to = packed_row(s->sums, s->n, i0 + i) + j0;
        for (size_t j = i0 == j0 ? i : 0; j < nj; j++)
            to[j] += (double)product[i * nj + j];
    }
}

static void gram_item(void *arg, size_t item, unsigned worker)
{
    const struct sums *const s = arg;
    size_t ti = 0, left = item;

    while (left >= s->n_tiles - ti) { /* tiles of a row: n_tiles - ti */
        left -= s->n_tiles - ti;
        ti++;
    }
    for (size_t g = 0; g < s->n_groups; g++) {
        const struct tve_group *const group = &s->groups[g];

        for (size_t row = 0; row < group->n; row += CHUNK)
            gram_chunk(s, s->x + (group->start + row) * s->ldx,
                       group->n - row < CHUNK ? group->n - row : CHUNK,
                       ti * TILE, (ti + left) * TILE, s->product[worker]);
    }
}

static size_t sum_bytes(const struct sums *s, size_t site)
{
    return tve_stat_size(s->kind, s->sites[site]->n) * sizeof(double);
}

/* Room for the sums of site i on the device, if there is any. */
static enum tv_err take_there(struct sums *s, size_t i, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_math *const m = tve_device_math(s->m->device);
    tvk_cuda *const d = tvk_cuda_math_device(m);
    const size_t bytes = sum_bytes(s, i);

    if (s->there[i] || s->no_room[i])
        return TV_OK;
    /* Half is left to products and to what comes after. */
    s->no_room[i] = s->kind == TVE_STAT_GRAM && bytes > tvk_cuda_left(d) / 2;
    if (s->no_room[i])
        return TV_OK;
    rc = tvk_cuda_alloc(d, bytes, "sums of inputs", err, &s->there[i]);
    if (rc == TV_E_BUDGET && s->kind == TVE_STAT_GRAM) {
        tv_error_clear(err);
        s->no_room[i] = true;
        return TV_OK;
    }
    if (rc == TV_OK)
        rc = tvk_cuda_fill(tvk_cuda_math_stream(m), s->there[i], 0, bytes, err);
    return rc;
}

/* Adds the input at hand, which is on the device. */
static enum tv_err add_there(struct sums *s, size_t i, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_math *const m = tve_device_math(s->m->device);
    tvk_cuda_ptr work = 0;

    if (s->kind == TVE_STAT_GRAM)
        TV_TRY(tve_there_work(s->m, tvk_cuda_gram_work(s->n), &work, err));
    TV_TRY(take_there(s, i, err));
    for (size_t g = 0; g < s->n_groups; g++) {
        const tvk_cuda_ptr x = tve_there(s->x + s->groups[g].start * s->ldx);

        TV_TRY(s->kind == TVE_STAT_GRAM
                   ? tvk_cuda_gram_add(m, s->sums, s->there[i], work, x, s->ldx,
                                       s->groups[g].n, s->n, err)
                   : tvk_cuda_add_squares(m, s->there[i], x, s->ldx,
                                          s->groups[g].n, s->n, err));
    }
out:
    return rc;
}

/* What the sums need there is taken before a batch takes the rest. */
static enum tv_err prepare_there(struct sums *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_ptr work = 0;
    size_t most = 0;

    if (!s->m->device || s->n_sites == 0)
        return TV_OK;
    for (size_t i = 0; i < s->n_sites; i++) {
        const size_t n = s->sites[i]->n;

        if (s->kind == TVE_STAT_GRAM)
            most = n > most ? n : most;
        else
            TV_TRY(take_there(s, i, err));
    }
    if (most > 0)
        TV_TRY(tve_there_work(s->m, tvk_cuda_gram_work(most), &work, err));
out:
    return rc;
}

static void free_there(struct sums *s)
{
    if (!s->m->device)
        return;
    tvk_cuda_math_settle(tve_device_math(s->m->device));
    for (size_t i = 0; i < s->n_sites; i++) {
        tvk_cuda_free(tvk_cuda_math_device(tve_device_math(s->m->device)),
                      s->there[i], sum_bytes(s, i));
        s->there[i] = 0;
        s->no_room[i] = false;
    }
    tve_device_shrink(s->m->device);
}

/* All sums of the layer are on the host, and the device is free for others. */
static enum tv_err come_back(struct sums *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    if (!s->m->device)
        return TV_OK;
    tvk_cuda_stream *const stream =
        tvk_cuda_math_stream(tve_device_math(s->m->device));
    for (size_t i = 0; i < s->n_sites; i++)
        if (s->there[i])
            TV_TRY(tvk_cuda_download(stream, s->at[i], s->there[i],
                                     sum_bytes(s, i), err));
    TV_TRY(tvk_cuda_sync(stream, err));
out:
    free_there(s);
    return rc;
}

static enum tv_err see(void *arg, const struct tve_linear *items,
                       size_t n_items, const struct tve_group *groups,
                       size_t n_groups, bool there, struct tv_error *err)
{
    struct sums *const s = arg;
    size_t i = 0;

    (void)n_items;
    while (i < s->n_sites && s->sites[i]->params[0] != items[0].p)
        i++;
    if (i == s->n_sites)
        return TV_OK; /* nobody wants it */
    s->sums = s->at[i];
    s->x = items[0].x;
    s->ldx = items[0].ldx;
    s->n = s->sites[i]->n;
    s->n_tiles = (s->n + TILE - 1) / TILE;
    s->groups = groups;
    s->n_groups = n_groups;
    if (there)
        return add_there(s, i, err);
    if (s->kind == TVE_STAT_GRAM)
        tv_pool_run(s->m->pool, s->n_tiles * (s->n_tiles + 1) / 2, gram_item,
                    s);
    else
        tv_pool_run(s->m->pool, s->n_tiles, diag_item, s);
    return TV_OK;
}

/* n sums become fp32 where they are. */
static const float *round_down(double *sums, size_t n)
{
    unsigned char *const bytes = (unsigned char *)sums;

    for (size_t i = 0; i < n; i++) {
        double wide = 0;
        memcpy(&wide, bytes + i * sizeof(wide), sizeof(wide));
        const float narrow = (float)wide;
        memcpy(bytes + i * sizeof(narrow), &narrow, sizeof(narrow));
    }
    return (const float *)(const void *)bytes;
}

/* ---- layers -------------------------------------------------------------- */

struct statistics {
    struct sums sums;
    struct tve_site *sites;
    size_t n_sites;
    const bool *want;
    double *memory;
    size_t bytes; /* of the layer that needs most */
    size_t last;  /* layers to walk through */
    uint64_t n_rows;
    tve_site_fn fn;
    void *arg;
    const struct tve_progress *progress;
    uint64_t done, total; /* rows times layers */
};

static bool wanted(const struct statistics *t, size_t site)
{
    return !t->want || t->want[site];
}

/* Sizes of a layer's sums begin at multiples of 64 bytes. */
static bool add_sums(size_t *bytes, enum tve_stat kind, size_t n)
{
    const size_t entries = tve_stat_size(kind, n);
    size_t more = 0;

    return entries > 0 && entries < SIZE_MAX - 8 &&
           tv_mul_size((entries + 7) / 8 * 8, sizeof(double), &more) &&
           tv_add_size(*bytes, more, bytes);
}

static enum tv_err measure(struct statistics *t, struct tv_error *err)
{
    const uint64_t budget = t->sums.m->memory_bytes;

    for (size_t i = 0, next = 0; i < t->n_sites; i = next) {
        const size_t layer = t->sites[i].layer;
        size_t bytes = 0;
        bool fits = true;

        for (; next < t->n_sites && t->sites[next].layer == layer; next++) {
            if (!wanted(t, next))
                continue;
            t->last = layer + 1;
            fits = fits && add_sums(&bytes, t->sums.kind, t->sites[next].n);
        }
        if (!fits || bytes > budget)
            return tv_error_set(err, TV_E_BUDGET,
                                "statistics of layer %zu (of \"%s\" and "
                                "others) take %zu bytes, the memory budget is "
                                "%llu",
                                layer, t->sites[i].tensors[0],
                                fits ? bytes : SIZE_MAX,
                                (unsigned long long)budget);
        if (bytes > t->bytes)
            t->bytes = bytes;
    }
    return TV_OK;
}

static enum tv_err count_rows(void *arg, uint64_t rows, struct tv_error *err)
{
    struct statistics *const t = arg;
    const struct tve_progress *const p = t->progress;

    t->done += rows;
    if (p && p->step)
        p->step(p->arg, t->done / t->last, t->total / t->last);
    if (p && p->cancel && *p->cancel)
        return tv_error_set(err, TV_E_INTERRUPTED, "interrupted");
    return TV_OK;
}

/* Layer `l`, whose first site is `first`. `look`: it is still the next one of
 * the walk behind. */
static enum tv_err one_layer(struct statistics *t, struct tve_walk *walk,
                             size_t l, size_t first, bool look,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct sums *const s = &t->sums;
    const struct tve_tap tap = {see, s};
    const struct tve_walk_progress progress = {count_rows, t};
    size_t numbers[SITES_MAX], bytes = 0;

    s->n_sites = 0;
    for (size_t i = first; i < t->n_sites && t->sites[i].layer == l; i++) {
        if (!wanted(t, i))
            continue;
        s->sites[s->n_sites] = &t->sites[i];
        s->at[s->n_sites] = t->memory + bytes / sizeof(double);
        numbers[s->n_sites++] = i;
        (void)add_sums(&bytes, s->kind, t->sites[i].n);
    }
    memset(t->memory, 0, bytes);
    TV_TRY(prepare_there(s, err));
    TV_TRY(
        look ? tve_walk_look(walk, &tap, err)
             : tve_walk_layer(walk, s->n_sites ? &tap : NULL, &progress, err));
    TV_TRY(come_back(s, err));
    for (size_t i = 0; i < s->n_sites; i++) {
        const struct tve_site *const site = s->sites[i];
        const bool gram = s->kind == TVE_STAT_GRAM;
        const struct tve_stat_input in = {
            .kind = s->kind,
            .layer = l,
            .tensors = site->tensors,
            .n_tensors = site->n_tensors,
            .n = site->n,
            .n_rows = t->n_rows,
            .sums = gram ? NULL : s->at[i],
            .gram = gram ? round_down(s->at[i], tve_stat_size(s->kind, site->n))
                         : NULL,
        };
        TV_TRY(t->fn(t->arg, numbers[i], &in, err));
    }
out:
    free_there(s);
    return rc;
}

static enum tv_err all_layers(struct statistics *t, const struct tve_window *w,
                              size_t n_windows, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_walk *walk = NULL;
    size_t site = 0;

    TV_TRY(tve_walk_open(t->sums.m, w, n_windows, t->bytes, UINT64_MAX, err,
                         &walk));
    for (size_t l = 0; l < t->last; l++) {
        while (site < t->n_sites && t->sites[site].layer < l)
            site++;
        TV_TRY(one_layer(t, walk, l, site, false, err));
    }
out:
    tve_walk_close(walk);
    return rc;
}

/* What a layer's sums need: sizes of the sites. */
static enum tv_err prepare(struct statistics *t, const struct tve_window *w,
                           size_t n_windows, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    if (n_windows == 0)
        return tv_error_set(err, TV_E_INPUT, "no windows");
    TV_TRY(measure(t, err));
    for (size_t i = 0; i < n_windows; i++)
        t->n_rows += w[i].n;
    t->total = t->n_rows * t->last;
out:
    return rc;
}

static void release(struct statistics *t)
{
    const unsigned n_workers = tv_pool_threads(t->sums.m->pool);

    for (unsigned i = 0; t->sums.product && i < n_workers; i++)
        tv_free(t->sums.product[i]);
    tv_free(t->sums.product);
    tv_free(t->memory);
    t->sums.product = NULL;
    t->memory = NULL;
}

/* Memory of the sums. */
static enum tv_err acquire(struct statistics *t, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const unsigned n_workers = tv_pool_threads(t->sums.m->pool);

    t->memory = tv_alloc_aligned(t->bytes ? t->bytes : 1);
    t->sums.product = tv_calloc(n_workers, sizeof(*t->sums.product));
    if (!t->memory || !t->sums.product)
        goto no_memory;
    /* With a device, products are made there. */
    const bool here = t->sums.kind == TVE_STAT_GRAM && !t->sums.m->device;
    for (unsigned i = 0; i < n_workers && here; i++) {
        t->sums.product[i] = tv_alloc_aligned(TILE * TILE * sizeof(float));
        if (!t->sums.product[i])
            goto no_memory;
    }
    goto out;
no_memory:
    rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
out:
    return rc;
}

enum tv_err tve_site_admit(tve_model *m, const struct tve_window *w,
                           size_t n_windows, enum tve_stat kind,
                           const bool *want, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct statistics t = {.sums = {.m = m, .kind = kind}, .want = want};

    TV_TRY(tve_sites(m, &t.sites, &t.n_sites, err));
    TV_TRY(measure(&t, err));
    if (t.last > 0)
        rc = tve_walk_admit(m, w, n_windows, t.bytes, err);
out:
    tv_free(t.sites);
    return rc;
}

enum tv_err tve_calibration_scratch(tve_model *m, enum tve_stat kind, size_t n,
                                    size_t context,
                                    const struct tve_sequence_options *opt,
                                    struct tv_error *err,
                                    struct tve_scratch *out)
{
    enum tv_err rc = TV_OK;
    struct statistics t = {.sums = {.m = m, .kind = kind}};
    uint64_t look = 0;

    *out = (struct tve_scratch){0};
    TV_TRY(tve_sites(m, &t.sites, &t.n_sites, err));
    for (size_t i = 0; i < t.n_sites && kind == TVE_STAT_GRAM; i++) {
        const uint64_t bytes = tvk_cuda_gram_least(t.sites[i].n);

        look = bytes > look ? bytes : look;
    }
    tve_there_look(m, look);
    if (context > 0)
        TV_TRY(tve_walk_fits(m, n, context, err));
    /* All sites together may be too large where those wanted are not. */
    const bool fits = measure(&t, NULL) == TV_OK;
    if (context > 0)
        tve_walk_scratch(m, n, context, fits ? t.bytes : UINT64_MAX,
                         opt ? opt->stream_bytes : UINT64_MAX, opt != NULL,
                         out);
out:
    tv_free(t.sites);
    return rc;
}

enum tv_err tve_site_statistics(tve_model *m, const struct tve_window *w,
                                size_t n_windows, enum tve_stat kind,
                                const bool *want,
                                const struct tve_progress *progress,
                                tve_site_fn fn, void *arg, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct statistics t = {.sums = {.m = m, .kind = kind},
                           .want = want,
                           .fn = fn,
                           .arg = arg,
                           .progress = progress};

    TV_TRY(tve_sites(m, &t.sites, &t.n_sites, err));
    TV_TRY(prepare(&t, w, n_windows, err));
    if (t.last == 0)
        goto out; /* nothing is wanted */
    TV_TRY(acquire(&t, err));
    TV_TRY(all_layers(&t, w, n_windows, err));
out:
    release(&t);
    tv_free(t.sites);
    return rc;
}

struct forward { /* to a function that does not ask for numbers */
    tve_stat_fn fn;
    void *arg;
};

static enum tv_err forward(void *arg, size_t site,
                           const struct tve_stat_input *in,
                           struct tv_error *err)
{
    const struct forward *const f = arg;

    (void)site;
    return f->fn(f->arg, in, err);
}

enum tv_err tve_statistics(tve_model *m, const struct tve_window *w,
                           size_t n_windows, enum tve_stat kind,
                           const struct tve_progress *progress, tve_stat_fn fn,
                           void *arg, struct tv_error *err)
{
    struct forward f = {fn, arg};

    return tve_site_statistics(m, w, n_windows, kind, NULL, progress, forward,
                               &f, err);
}

/* ---- block by block ------------------------------------------------------ */

struct tve_sequence {
    struct statistics t;
    struct tve_walk *walk;
    bool *want; /* [n_sites] */
    const atomic_int *cancel;
    size_t layer, site; /* next layer, its first site */
};

void tve_sequence_close(tve_sequence *s)
{
    if (!s)
        return;
    tve_walk_close(s->walk);
    release(&s->t);
    tv_free(s->t.sites);
    tv_free(s->want);
    tv_free(s);
}

static enum tv_err mark_wanted(tve_sequence *s,
                               const struct tve_sequence_options *opt,
                               struct tv_error *err)
{
    s->want = tv_calloc(s->t.n_sites ? s->t.n_sites : 1, sizeof(*s->want));
    if (!s->want)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t i = 0; i < s->t.n_sites; i++) {
        const struct tve_site *const site = &s->t.sites[i];

        s->want[i] = !opt->wants;
        for (size_t k = 0; opt->wants && k < site->n_tensors; k++)
            s->want[i] = s->want[i] || opt->wants(opt->arg, site->tensors[k]);
    }
    s->t.want = s->want;
    return TV_OK;
}

enum tv_err tve_sequence_open(tve_model *m, const struct tve_samples *samples,
                              const struct tve_sequence_options *opt,
                              struct tv_error *err, tve_sequence **out)
{
    enum tv_err rc = TV_OK;
    tve_sequence *s = tv_calloc(1, sizeof(*s));

    *out = NULL;
    if (!s)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    s->t.sums = (struct sums){.m = m, .kind = opt->kind};
    s->cancel = opt->cancel;
    TV_TRY(tve_sites(m, &s->t.sites, &s->t.n_sites, err));
    TV_TRY(mark_wanted(s, opt, err));
    TV_TRY(prepare(&s->t, samples->windows, samples->n, err));
    TV_TRY(tve_walk_open(m, samples->windows, samples->n, s->t.bytes,
                         opt->stream_bytes, err, &s->walk));
    *out = s;
    s = NULL;
out:
    tve_sequence_close(s);
    return rc;
}

size_t tve_sequence_layer(const tve_sequence *s)
{
    return s->layer;
}

enum tv_err tve_sequence_look(tve_sequence *s, tve_stat_fn fn, void *arg,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct forward f = {fn, arg};
    bool any = false;

    for (size_t i = s->site;
         i < s->t.n_sites && s->t.sites[i].layer == s->layer; i++)
        any = any || s->want[i];
    if (!any)
        return TV_OK;
    s->t.fn = forward;
    s->t.arg = &f;
    TV_TRY(acquire(&s->t, err));
    TV_TRY(one_layer(&s->t, s->walk, s->layer, s->site, true, err));
out:
    release(&s->t);
    return rc;
}

static enum tv_err stop_when_cancelled(void *arg, uint64_t rows,
                                       struct tv_error *err)
{
    const tve_sequence *const s = arg;

    (void)rows;
    if (s->cancel && *s->cancel)
        return tv_error_set(err, TV_E_INTERRUPTED, "interrupted");
    return TV_OK;
}

enum tv_err tve_sequence_advance(tve_sequence *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_walk_progress progress = {stop_when_cancelled, s};

    TV_TRY(tve_walk_layer(s->walk, NULL, &progress, err));
    s->layer++;
    while (s->site < s->t.n_sites && s->t.sites[s->site].layer < s->layer)
        s->site++;
out:
    return rc;
}
