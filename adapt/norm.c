/* SPDX-License-Identifier: Apache-2.0 */
/*
 * norm.c - how much a change changes, without forming it.
 *
 *   ||s B A||_F^2 = s^2 tr((B^T B)(A A^T)) = s^2 sum over i, j of
 *                   (B^T B)_ij (A A^T)_ij
 *
 * so two Gram matrices of the rank squared are enough; of stacked experts the
 * blocks on the diagonal count.
 */
#include "tv/adapt.h"

#include <math.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/linalg.h"

#define ROWS 256u /* of B at a time */

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory for a norm");
}

static double *doubles(uint64_t a, uint64_t b)
{
    uint64_t n = 0;
    if (!tv_mul_u64(a, b, &n) || n > SIZE_MAX / 16)
        return NULL;
    return tv_alloc_aligned((size_t)n * sizeof(double) + 64);
}

/* `n` elements from `at` as fp64; room [n]. */
static void load(const struct tvk_table *k, const struct tv_view *v,
                 uint64_t at, size_t n, float *room, double *to)
{
    tva_view_f32(k, v, at, n, room);
    for (size_t i = 0; i < n; i++)
        to[i] = (double)room[i];
}

/* g [n, n] = A A^T for A [n, in]. */
static enum tv_err gram_a(const struct tvk_table *k, const struct tv_view *v,
                          size_t n, size_t in, double *g, struct tv_error *err)
{
    double *x = doubles(n, in);
    float *room = tv_alloc(in * sizeof *room + 4);
    enum tv_err rc = TV_OK;

    if (!x || !room) {
        rc = no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < n; i++)
        load(k, v, (uint64_t)i * in, in, room, x + i * in);
    tva_gemm(x, true, x, false, n, n, in, g);
out:
    tv_free(room);
    tv_free(x);
    return rc;
}

/* g [n, n] = B^T B for B [out, n]. */
static enum tv_err gram_b(const struct tvk_table *k, const struct tv_view *v,
                          size_t n, size_t out, double *g, struct tv_error *err)
{
    double *x = doubles(ROWS, n), *part = doubles(n, n);
    float *room = tv_alloc(ROWS * n * sizeof *room + 4);
    enum tv_err rc = TV_OK;

    if (!x || !part || !room) {
        rc = no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < n * n; i++)
        g[i] = 0;
    for (size_t at = 0; at < out; at += ROWS) {
        const size_t rows = out - at < ROWS ? out - at : ROWS;
        load(k, v, (uint64_t)at * n, rows * n, room, x);
        tva_gemm(x, false, x, true, n, n, rows, part);
        for (size_t i = 0; i < n * n; i++)
            g[i] += part[i];
    }
out:
    tv_free(room);
    tv_free(part);
    tv_free(x);
    return rc;
}

static enum tv_err product_norm(const struct tvk_table *k,
                                const struct tv_adapter_module *m,
                                const struct tv_view *a,
                                const struct tv_view *b, double *norm,
                                struct tv_error *err)
{
    const size_t e = m->n_experts > 0 ? (size_t)m->n_experts : 1;
    const size_t r = (size_t)m->r, n = r * e;
    double *ga = doubles(n, n), *gb = doubles(n, n);
    double sum = 0;
    enum tv_err rc = TV_OK;

    if (!ga || !gb) {
        rc = no_memory(err);
        goto out;
    }
    TV_TRY(gram_a(k, a, n, (size_t)m->in_features, ga, err));
    TV_TRY(gram_b(k, b, n, (size_t)m->out_features, gb, err));
    for (size_t x = 0; x < e; x++)
        for (size_t i = 0; i < r; i++)
            for (size_t j = 0; j < r; j++)
                sum += ga[(x * r + i) * n + x * r + j] *
                       gb[(i * e + x) * n + j * e + x];
    *norm = fabs(m->scaling) * sqrt(sum > 0 ? sum : 0);
out:
    tv_free(gb);
    tv_free(ga);
    return rc;
}

enum tv_err tva_change_norm(const struct tv_adapter_module *m, tv_input *from,
                            const struct tvk_table *k, bool *known,
                            double *norm, struct tv_error *err)
{
    struct tv_view a = {.n_chunks = 0}, b = {.n_chunks = 0};
    struct tvk_dots d;
    float *room = NULL;
    enum tv_err rc = TV_OK;

    *known = !m->magnitude &&
             (m->kind == TV_CHANGE_LOW_RANK || m->kind == TV_CHANGE_ADD);
    *norm = 0;
    if (!*known)
        return TV_OK;
    TV_TRY(tv_input_view(from, m->a, err, &a));
    if (m->kind == TV_CHANGE_LOW_RANK) {
        TV_TRY(tv_input_view(from, m->b, err, &b));
        rc = product_norm(k, m, &a, &b, norm, err);
        goto out;
    }
    room = tv_alloc(TVA_BLOCK * sizeof *room);
    if (!room) {
        rc = no_memory(err);
        goto out;
    }
    for (uint64_t at = 0; at < m->a->n_elems; at += TVA_BLOCK) {
        const size_t n = m->a->n_elems - at < TVA_BLOCK
                             ? (size_t)(m->a->n_elems - at)
                             : TVA_BLOCK;
        tva_view_f32(k, &a, at, n, room);
        k->dots(&d, room, room, n);
        *norm += d.aa;
    }
    *norm = fabs(m->scaling) * sqrt(*norm);
out:
    tv_free(room);
    tv_input_release(from, &b);
    tv_input_release(from, &a);
    return rc;
}
