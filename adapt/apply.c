/* SPDX-License-Identifier: Apache-2.0 */
/*
 * apply.c - changes of one base tensor, applied to ranges of its elements.
 *
 * A low-rank change is a row of matrices L R added to the tensor (one matrix,
 * or one per stacked expert):
 *
 *            cols                 L = B,   R = A     stored [out, in]
 *      +------------+             L = A^T, R = B^T   stored [in, out]
 *      |            | rows
 *      +------------+  x experts
 *
 * R is used in place when it lies in the file as aligned fp32 in this order,
 * else it is converted once; of L only the rows under a block are converted,
 * into the caller's scratch.
 *
 * DoRA (Liu et al., arXiv 2402.09353): after the sum every output row i is
 * multiplied by m_i / ||V_i||, V = W + s B A. The norms need one pass over the
 * base, made at opening. Output rows are columns where the base is stored
 * transposed.
 */
#include "tv/adapt.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/hash.h"

struct tva_term {
    const struct tv_adapter_use *use;
    struct tv_view a, b, magnitude;
    bool turned;
    double scale; /* scaling times weight, of sums */
    size_t rank;
    uint64_t rows, cols; /* of one matrix */
    uint64_t experts;
    const float *r; /* [experts, rank, cols] */
    float *r_owned; /* NULL when r points into the file */
    double *gain;   /* DoRA: per output feature; else NULL */
};

uint64_t tva_view_f32(const struct tvk_table *k, const struct tv_view *v,
                      uint64_t start, uint64_t n, float *dst)
{
    uint64_t bad = 0;
    const size_t each = tv_dtype_bits(v->dtype) / 8u;
    uint64_t off = start * each;

    while (n > 0) {
        uint64_t run = 0;
        const unsigned char *at = tv_view_at(v, off, &run);
        uint64_t whole = run / each;
        if (whole > n)
            whole = n;
        if (whole > 0) {
            bad += tvk_to_f32(k, v->dtype, dst, at, (size_t)whole);
        } else {
            /* An element cut in two by a chunk border. */
            unsigned char one[8];
            whole = 1;
            tv_view_copy(v, off, each, one);
            bad += tvk_to_f32(k, v->dtype, dst, one, 1);
        }
        dst += whole;
        off += whole * each;
        n -= whole;
    }
    return bad;
}

/* ---- sizes --------------------------------------------------------------- */

static uint64_t cols_of(const struct tv_adapter_module *m, bool turned)
{
    return turned ? m->out_features : m->in_features;
}

static uint64_t experts_of(const struct tv_adapter_module *m)
{
    return m->n_experts > 0 ? m->n_experts : 1;
}

static uint64_t r_bytes(const struct tv_adapter_module *m, bool turned)
{
    uint64_t bytes = 0;
    if (!tv_mul_u64(cols_of(m, turned), m->r, &bytes) ||
        !tv_mul_u64(bytes, experts_of(m), &bytes) ||
        !tv_mul_u64(bytes, sizeof(float), &bytes))
        return UINT64_MAX / 4;
    return bytes;
}

static bool only_sums(const struct tv_adapter_use *uses, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        const struct tv_adapter_module *m = uses[i].module;
        if (m->magnitude || m->kind == TV_CHANGE_REPLACE ||
            m->kind == TV_CHANGE_ROWS)
            return false;
    }
    return true;
}

static size_t l_floats(const struct tv_adapter_use *uses, size_t n,
                       const struct tv_input_tensor *base)
{
    uint64_t most = TVA_BLOCK;

    for (size_t i = 0; i < n; i++) {
        const struct tv_adapter_module *m = uses[i].module;
        if (m->kind != TV_CHANGE_LOW_RANK)
            continue;
        const uint64_t cols = cols_of(m, tv_adapter_turned(m, base));
        const uint64_t rows = TVA_BLOCK / (cols > 0 ? cols : 1) + 2;
        if (rows * m->r > most)
            most = rows * m->r;
    }
    return (size_t)((most + 15) / 16 * 16);
}

size_t tva_patch_floats(const struct tv_adapter_use *uses, size_t n,
                        const struct tv_input_tensor *base)
{
    if (n == 0)
        return 0;
    return l_floats(uses, n, base) +
           (only_sums(uses, n) ? 0 : 2 * (size_t)TVA_BLOCK);
}

static uint64_t copied_bytes(const struct tv_input_tensor *t)
{
    /* Views of strided tensors are copies. */
    return t && !t->contiguous ? t->bytes : 0;
}

uint64_t tva_patch_bytes(const struct tv_adapter_use *uses, size_t n,
                         const struct tv_input_tensor *base)
{
    uint64_t bytes = n * sizeof(struct tva_term);

    for (size_t i = 0; i < n; i++) {
        const struct tv_adapter_module *m = uses[i].module;
        bytes += copied_bytes(m->a) + copied_bytes(m->b) +
                 copied_bytes(m->magnitude);
        if (m->kind != TV_CHANGE_LOW_RANK)
            continue;
        bytes += r_bytes(m, tv_adapter_turned(m, base)) + 64;
        if (m->magnitude)
            bytes += m->out_features * (sizeof(double) + sizeof(float)) +
                     (tva_patch_floats(uses, n, base) + 2 * TVA_BLOCK) *
                         sizeof(float);
    }
    return bytes;
}

/* ---- applying ------------------------------------------------------------ */

/* `rows` rows of L of one expert from row `first`. */
static void load_l(const struct tva_term *t, const struct tvk_table *k,
                   uint64_t expert, uint64_t first, uint64_t rows, float *l)
{
    if (!t->turned && t->experts == 1) {
        tva_view_f32(k, &t->b, first * t->rank, rows * t->rank, l);
        return;
    }
    for (size_t i = 0; i < t->rank; i++)
        for (uint64_t row = first; row < first + rows; row++) {
            float *to = &l[(row - first) * t->rank + i];
            if (t->turned)
                tva_view_f32(k, &t->a, (expert * t->rank + i) * t->rows + row,
                             1, to);
            else
                tva_view_f32(k, &t->b,
                             (row * t->rank + i) * t->experts + expert, 1, to);
        }
}

static void add_low_rank(const struct tva_term *t, const struct tvk_table *k,
                         double scale, uint64_t start, size_t n, float *y,
                         float *l)
{
    const uint64_t each = t->rows * t->cols;

    while (n > 0) {
        const uint64_t expert = start / each;
        const uint64_t at = start - expert * each;
        const size_t now = each - at < n ? (size_t)(each - at) : n;
        const uint64_t first = at / t->cols;
        const uint64_t last = (at + now - 1) / t->cols;

        load_l(t, k, expert, first, last - first + 1, l);
        /* Row numbers count from `first`, so that L needs no other rows. */
        k->lowrank_add(y, l, t->r + expert * t->rank * t->cols, scale, t->rank,
                       t->cols, at - first * t->cols, now);
        start += now;
        y += now;
        n -= now;
    }
}

static void scale_rows(const struct tva_term *t, uint64_t start, size_t n,
                       float *x)
{
    uint64_t row = start / t->cols;
    uint64_t col = start % t->cols;

    for (size_t i = 0; i < n; i++) {
        x[i] = (float)(t->gain[t->turned ? col : row] * (double)x[i]);
        if (++col == t->cols) {
            col = 0;
            row++;
        }
    }
}

/* Puts the rows of trained tokens that lie in the range in their places. */
static void put_rows(const struct tva_term *t, const struct tvk_table *k,
                     uint64_t start, size_t n, float *x)
{
    const struct tv_adapter_module *m = t->use->module;
    const uint64_t cols = m->a->shape[1];

    for (size_t i = 0; i < m->n_rows; i++) {
        const uint64_t begin = m->rows[i] * cols;
        const uint64_t from = begin > start ? begin : start;
        uint64_t to = begin + cols;
        if (to > start + n)
            to = start + n;
        if (from < to)
            tva_view_f32(k, &t->a, i * cols + (from - begin), to - from,
                         x + (from - start));
    }
}

static void add_bias(const struct tva_term *t, const struct tvk_table *k,
                     double scale, uint64_t start, size_t n, float *x,
                     float *scratch)
{
    tva_view_f32(k, &t->a, start, n, scratch);
    for (size_t i = 0; i < n; i++)
        x[i] = (float)((double)x[i] + scale * (double)scratch[i]);
}

/* One change at weight 1, on its own values. DoRA's scaling last, when its
 * norms are known. */
static void change(const struct tva_term *t, const struct tvk_table *k,
                   uint64_t start, size_t n, float *x, float *scratch)
{
    const struct tv_adapter_module *m = t->use->module;

    switch (m->kind) {
    case TV_CHANGE_REPLACE:
        tva_view_f32(k, &t->a, start, n, x);
        break;
    case TV_CHANGE_ROWS:
        put_rows(t, k, start, n, x);
        break;
    case TV_CHANGE_ADD:
        add_bias(t, k, m->scaling, start, n, x, scratch);
        break;
    case TV_CHANGE_LOW_RANK:
        add_low_rank(t, k, m->scaling, start, n, x, scratch);
        if (t->gain)
            scale_rows(t, start, n, x);
        break;
    }
}

/* Changes from `first` on that are of the same adapter. */
static size_t group_end(const struct tva_patch *p, size_t first)
{
    size_t end = first + 1;
    while (end < p->n && p->terms[end].use->from == p->terms[first].use->from &&
           p->terms[end].use->module->kind >
               p->terms[end - 1].use->module->kind)
        end++;
    return end;
}

static void add_sums(const struct tva_patch *p, size_t from, size_t to,
                     const struct tvk_table *k, uint64_t start, size_t n,
                     float *y, float *scratch)
{
    for (size_t i = from; i < to; i++) {
        const struct tva_term *t = &p->terms[i];
        if (t->use->module->kind == TV_CHANGE_ADD)
            add_bias(t, k, t->scale, start, n, y, scratch);
        else
            add_low_rank(t, k, t->scale, start, n, y, scratch);
    }
}

static bool is_sum(const struct tva_term *t)
{
    const enum tv_change_kind kind = t->use->module->kind;
    return (kind == TV_CHANGE_ADD || kind == TV_CHANGE_LOW_RANK) && !t->gain;
}

void tva_patch_apply(const struct tva_patch *p, const struct tvk_table *k,
                     uint64_t start, size_t n, float *y, float *scratch)
{
    float *const base = scratch;
    float *const x = scratch + TVA_BLOCK;
    float *const rest = scratch + 2 * (size_t)TVA_BLOCK;

    if (n == 0 || p->n == 0)
        return;
    if (p->sums_only) {
        add_sums(p, 0, p->n, k, start, n, y, scratch);
        return;
    }
    memcpy(base, y, n * sizeof(float));
    for (size_t i = 0, end = 0; i < p->n; i = end) {
        const double weight = p->terms[i].use->weight;
        end = group_end(p, i);
        if (end == i + 1 && is_sum(&p->terms[i])) {
            add_sums(p, i, end, k, start, n, y, rest);
            continue;
        }
        memcpy(x, base, n * sizeof(float));
        for (size_t j = i; j < end; j++)
            change(&p->terms[j], k, start, n, x, rest);
        if (i == 0 && weight == 1.0) {
            memcpy(y, x, n * sizeof(float));
            continue;
        }
        for (size_t j = 0; j < n; j++)
            y[j] = (float)((double)y[j] +
                           weight * ((double)x[j] - (double)base[j]));
    }
}

/* ---- opening ------------------------------------------------------------- */

static enum tv_err open_view(tv_input *in, const struct tv_input_tensor *t,
                             bool verify, struct tv_view *out,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    if (!t)
        return TV_OK;
    TV_TRY(tv_input_view(in, t, err, out));
    for (uint64_t i = 0; verify && out->leaves && i < tv_leaf_count(out->bytes);
         i++)
        if (!tv_hash_equal(tv_view_leaf(out, i), out->leaves[i])) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "%s: tensor %s is damaged: MiB %" PRIu64
                              " does not have its checksum",
                              tv_input_label(in), t->name, i);
            goto out;
        }
out:
    return rc;
}

static enum tv_err load_r(struct tva_term *t, const struct tvk_table *k,
                          struct tv_error *err)
{
    const struct tv_adapter_module *m = t->use->module;
    const uint64_t bytes = r_bytes(m, t->turned);

    if (!t->turned && t->a.dtype == TV_F32 && t->a.n_chunks == 1 &&
        (uintptr_t)t->a.chunks[0] % sizeof(float) == 0) {
        t->r = (const float *)(const void *)t->a.chunks[0];
        return TV_OK;
    }
    t->r_owned = tv_alloc_aligned((size_t)bytes + 1);
    if (!t->r_owned)
        return tv_error_set(err, TV_E_NOMEM,
                            "out of memory for adapter module %s (%" PRIu64
                            " bytes)",
                            m->module, bytes);
    t->r = t->r_owned;
    if (!t->turned) {
        tva_view_f32(k, &t->a, 0, t->a.n_elems, t->r_owned);
        return TV_OK;
    }
    for (uint64_t e = 0; e < t->experts; e++)
        for (size_t i = 0; i < t->rank; i++)
            for (uint64_t o = 0; o < t->cols; o++)
                tva_view_f32(k, &t->b, (o * t->rank + i) * t->experts + e, 1,
                             &t->r_owned[(e * t->rank + i) * t->cols + o]);
    return TV_OK;
}

/* Sums of squares of the output rows of V, from first to last element. */
static void sum_squares(const struct tva_patch *p, size_t first, size_t term,
                        const struct tv_view *base, const struct tvk_table *k,
                        float *work, double *sums)
{
    const struct tva_term *t = &p->terms[term];
    float *const x = work;
    float *const scratch = work + TVA_BLOCK;

    for (uint64_t row = 0; row < t->rows; row++)
        for (uint64_t c = 0; c < t->cols; c += TVA_BLOCK) {
            const uint64_t start = row * t->cols + c;
            const size_t n =
                t->cols - c < TVA_BLOCK ? (size_t)(t->cols - c) : TVA_BLOCK;
            tva_view_f32(k, base, start, n, x);
            for (size_t j = first; j <= term; j++)
                change(&p->terms[j], k, start, n, x, scratch);
            if (t->turned) {
                for (size_t i = 0; i < n; i++)
                    sums[c + i] += (double)x[i] * (double)x[i];
            } else {
                struct tvk_dots d;
                k->dots(&d, x, x, n);
                sums[row] += d.aa;
            }
        }
}

static enum tv_err find_gain(struct tva_patch *p, size_t term,
                             const struct tv_input_tensor *tensor,
                             const struct tv_adapter_use *uses, size_t n_uses,
                             const struct tv_view *base,
                             const struct tvk_table *k, struct tv_error *err)
{
    struct tva_term *t = &p->terms[term];
    const size_t n = (size_t)t->use->module->out_features;
    const size_t floats = tva_patch_floats(uses, n_uses, tensor) + TVA_BLOCK;
    double *sums = tv_calloc(n, sizeof *sums);
    float *m = tv_alloc(n * sizeof *m);
    float *work = tv_alloc_aligned(floats * sizeof *work);
    size_t first = term;
    enum tv_err rc = TV_OK;

    if (!sums || !m || !work) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory for norms of %s",
                          t->use->module->module);
        goto out;
    }
    while (first > 0 && group_end(p, first - 1) > term)
        first--;
    sum_squares(p, first, term, base, k, work, sums);
    tva_view_f32(k, &t->magnitude, 0, n, m);
    for (size_t i = 0; i < n; i++)
        sums[i] = sums[i] > 0 ? (double)m[i] / sqrt(sums[i]) : 0;
    t->gain = sums;
    sums = NULL;
out:
    tv_free(work);
    tv_free(m);
    tv_free(sums);
    return rc;
}

static enum tv_err open_term(struct tva_term *t,
                             const struct tv_input_tensor *base,
                             const struct tvk_table *k, bool verify,
                             struct tv_error *err)
{
    const struct tv_adapter_module *m = t->use->module;
    tv_input *in = t->use->from;
    enum tv_err rc = TV_OK;

    if (!tv_dtype_is_math(base->dtype)) {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "%s: an adapter cannot change a tensor of type %s",
                          base->name, tv_dtype_name(base->dtype));
        goto out;
    }
    t->scale = m->scaling * t->use->weight;
    TV_TRY(open_view(in, m->a, verify, &t->a, err));
    TV_TRY(open_view(in, m->b, verify, &t->b, err));
    TV_TRY(open_view(in, m->magnitude, verify, &t->magnitude, err));
    if (m->kind != TV_CHANGE_LOW_RANK)
        goto out;
    t->turned = tv_adapter_turned(m, base);
    t->rank = (size_t)m->r;
    t->rows = t->turned ? m->in_features : m->out_features;
    t->cols = cols_of(m, t->turned);
    t->experts = experts_of(m);
    TV_TRY(load_r(t, k, err));
out:
    return rc;
}

enum tv_err tva_patch_open(struct tva_patch *out,
                           const struct tv_adapter_use *uses, size_t n,
                           const struct tv_input_tensor *base,
                           const struct tv_view *view,
                           const struct tvk_table *k, bool verify,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    *out = (struct tva_patch){.sums_only = only_sums(uses, n)};
    if (n == 0)
        return TV_OK;
    out->terms = tv_calloc(n, sizeof *out->terms);
    if (!out->terms)
        return tv_error_set(err, TV_E_NOMEM, "out of memory for %zu changes",
                            n);
    out->n = n;
    for (size_t i = 0; i < n; i++)
        out->terms[i].use = &uses[i];
    for (size_t i = 0; i < n; i++) {
        TV_TRY(open_term(&out->terms[i], base, k, verify, err));
        if (uses[i].module->magnitude)
            TV_TRY(find_gain(out, i, base, uses, n, view, k, err));
    }
out:
    return rc;
}

void tva_patch_close(struct tva_patch *p)
{
    for (size_t i = 0; i < p->n; i++) {
        struct tva_term *t = &p->terms[i];
        tv_free(t->r_owned);
        tv_free(t->gain);
        tv_input_release(t->use->from, &t->a);
        tv_input_release(t->use->from, &t->b);
        tv_input_release(t->use->from, &t->magnitude);
    }
    tv_free(p->terms);
    *p = (struct tva_patch){0};
}

/* ---- checking ------------------------------------------------------------ */

static enum tv_err check_finite(tv_input *in, const struct tv_input_tensor *t,
                                const struct tvk_table *k, float *block,
                                struct tv_error *err)
{
    struct tv_view v = {0};
    enum tv_err rc = TV_OK;

    if (!t)
        return TV_OK;
    TV_TRY(tv_input_view(in, t, err, &v));
    for (uint64_t at = 0; at < t->n_elems; at += TVA_BLOCK) {
        const size_t n =
            t->n_elems - at < TVA_BLOCK ? (size_t)(t->n_elems - at) : TVA_BLOCK;
        tva_view_f32(k, &v, at, n, block);
        if (k->count_nonfinite(block, n) > 0) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "%s: tensor '%s' holds values that are not "
                              "finite",
                              tv_input_label(in), t->name);
            goto out;
        }
    }
out:
    tv_input_release(in, &v);
    return rc;
}

enum tv_err tva_adapter_check(const tv_adapter *a, const struct tvk_table *k,
                              struct tv_error *err)
{
    float *block = tv_alloc(TVA_BLOCK * sizeof *block);
    enum tv_err rc = TV_OK;

    if (!block) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < tv_adapter_count(a); i++) {
        const struct tv_adapter_module *m = tv_adapter_module(a, i);
        tv_input *in = tv_adapter_input(a);
        if (m->kind == TV_CHANGE_REPLACE)
            continue; /* like a model's weights: counted when merged */
        TV_TRY(check_finite(in, m->a, k, block, err));
        TV_TRY(check_finite(in, m->b, k, block, err));
        TV_TRY(check_finite(in, m->magnitude, k, block, err));
    }
out:
    tv_free(block);
    return rc;
}
