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
 * Tiles and chunks depend on the shape alone: neither threads nor memory change
 * a bit.
 */
#include <string.h>

#include <cblas.h>

#include "tv/alloc.h"
#include "tv/checked.h"

#include "decoder.h"

#define TILE  256u
#define CHUNK 1024u

size_t tve_stat_size(enum tve_stat kind, size_t n)
{
    size_t twice = 0;

    if (kind == TVE_STAT_DIAG)
        return n;
    return n < SIZE_MAX && tv_mul_size(n, n + 1, &twice) ? twice / 2 : 0;
}

struct sums {
    tve_model *m;
    enum tve_stat kind;
    tve_stat_fn fn;
    void *arg;
    double *sums;    /* of the input at hand */
    float **product; /* per worker: [TILE, TILE]; TVE_STAT_GRAM */
    /* the input at hand */
    const float *x;
    size_t ldx, n, rows, n_tiles;
};

static void diag_item(void *arg, size_t item, unsigned worker)
{
    const struct sums *const s = arg;
    const size_t from = item * TILE;
    const size_t n = s->n - from < TILE ? s->n - from : TILE;
    double *const to = s->sums + from;

    (void)worker;
    memset(to, 0, n * sizeof(*to));
    for (size_t row = 0; row < s->rows; row++) {
        const float *const x = s->x + row * s->ldx + from;
        for (size_t i = 0; i < n; i++)
            to[i] += (double)x[i] * (double)x[i];
    }
}

/* Where row i of the packed triangle would have its column 0. */
static double *packed_row(double *sums, size_t n, size_t i)
{
    return sums + i * n - i * (i + 1) / 2;
}

static void gram_item(void *arg, size_t item, unsigned worker)
{
    const struct sums *const s = arg;
    float *const product = s->product[worker];
    size_t ti = 0, left = item;

    while (left >= s->n_tiles - ti) { /* tiles of a row: n_tiles - ti */
        left -= s->n_tiles - ti;
        ti++;
    }
    const size_t i0 = ti * TILE, j0 = (ti + left) * TILE;
    const size_t ni = s->n - i0 < TILE ? s->n - i0 : TILE;
    const size_t nj = s->n - j0 < TILE ? s->n - j0 : TILE;

    for (size_t row = 0; row < s->rows; row += CHUNK) {
        const size_t n = s->rows - row < CHUNK ? s->rows - row : CHUNK;
        const float *const x = s->x + row * s->ldx;

        cblas_sgemm(CblasRowMajor, CblasTrans, CblasNoTrans, (blasint)ni,
                    (blasint)nj, (blasint)n, 1.0f, x + i0, (blasint)s->ldx,
                    x + j0, (blasint)s->ldx, 0.0f, product, (blasint)nj);
        for (size_t i = 0; i < ni; i++) {
            double *const to = packed_row(s->sums, s->n, i0 + i) + j0;
            for (size_t j = i0 == j0 ? i : 0; j < nj; j++)
                to[j] = (row > 0 ? to[j] : 0.0) + (double)product[i * nj + j];
        }
    }
}

static enum tv_err see(void *arg, size_t layer, const struct tve_linear *items,
                       size_t n_items, size_t rows, struct tv_error *err)
{
    struct sums *const s = arg;
    const char *names[3];
    struct tve_stat_input in = {
        .layer = layer, .tensors = names, .n_tensors = n_items};

    if (n_items > sizeof(names) / sizeof(names[0]))
        return tv_error_set(err, TV_E_INTERNAL, "%zu layers share an input",
                            n_items);
    for (size_t i = 0; i < n_items; i++)
        names[i] = items[i].p->w.t->name;
    s->x = items->x;
    s->ldx = items->ldx;
    s->rows = rows;
    s->n = tve_linear_in(s->m, items->p);
    s->n_tiles = (s->n + TILE - 1) / TILE;
    if (s->kind == TVE_STAT_DIAG)
        tv_pool_run(s->m->pool, s->n_tiles, diag_item, s);
    else
        tv_pool_run(s->m->pool, s->n_tiles * (s->n_tiles + 1) / 2, gram_item,
                    s);
    in.n = s->n;
    in.n_rows = rows;
    in.sums = s->sums;
    return s->fn(s->arg, &in, err);
}

/* The weight of a block with the widest input. */
static const struct tve_param *widest(const tve_model *m)
{
    const struct tve_param *best = NULL;

    for (size_t l = 0; l < m->spec.n_layers; l++)
        for (int slot = TVE_Q; slot < TVE_SLOTS; slot++) {
            const struct tve_param *const p =
                tve_layer_param(m, l, (enum tve_slot)slot);
            if (p->w.t &&
                (!best || tve_linear_in(m, p) > tve_linear_in(m, best)))
                best = p;
        }
    return best;
}

enum tv_err tve_statistics(tve_model *m, const struct tve_window *w,
                           size_t n_windows, enum tve_stat kind,
                           const struct tve_progress *progress, tve_stat_fn fn,
                           void *arg, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct sums s = {.m = m, .kind = kind, .fn = fn, .arg = arg};
    const struct tve_param *const p = widest(m);
    const unsigned n_workers = tv_pool_threads(m->pool);
    size_t n = 0, bytes = 0;

    if (n_windows == 0)
        return tv_error_set(err, TV_E_INPUT, "no windows");
    if (!p)
        return TV_OK; /* a model without layers has no inputs */
    n = tve_stat_size(kind, tve_linear_in(m, p));
    if (n == 0 || !tv_mul_size(n, sizeof(*s.sums), &bytes) ||
        bytes > m->memory_bytes)
        return tv_error_set(
            err, TV_E_BUDGET,
            "statistics of the %zu inputs of \"%s\" do not fit into a memory "
            "budget of %llu bytes",
            tve_linear_in(m, p), p->w.t->name,
            (unsigned long long)m->memory_bytes);
    s.sums = tv_alloc_aligned(bytes);
    s.product = tv_calloc(n_workers, sizeof(*s.product));
    if (!s.sums || !s.product)
        goto no_memory;
    for (unsigned i = 0; i < n_workers && kind == TVE_STAT_GRAM; i++) {
        s.product[i] = tv_alloc_aligned(TILE * TILE * sizeof(float));
        if (!s.product[i])
            goto no_memory;
    }
    const struct tve_tap tap = {see, &s, bytes};
    rc = tve_run_layers(m, w, n_windows, progress, &tap, err);
    goto out;
no_memory:
    rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
out:
    for (unsigned i = 0; s.product && i < n_workers; i++)
        tv_free(s.product[i]);
    tv_free(s.product);
    tv_free(s.sums);
    return rc;
}

enum tv_err tve_token_counts(const tve_model *m, const struct tve_window *w,
                             size_t n_windows, uint64_t *counts,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    TV_TRY(tve_check_windows(m, w, n_windows, err));
    memset(counts, 0, m->spec.vocab * sizeof(*counts));
    for (size_t i = 0; i < n_windows; i++)
        for (size_t k = 0; k < w[i].n; k++)
            counts[w[i].ids[k]]++;
out:
    return rc;
}
