/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tensor_read.c - see tensor_read.h. Work is split at multiples of both the
 * checksum leaf (bytes) and the reduction leaf (elements), so every byte is
 * hashed once and sums have one shape whatever the thread count.
 */
#include "tensor_read.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "elements.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/hash.h"

static enum tv_err leaf_check(const struct tv_view *v, uint64_t leaf,
                              const char *what, struct tv_error *err)
{
    if (!v->leaves || tv_hash_equal(tv_view_leaf(v, leaf), v->leaves[leaf]))
        return TV_OK;
    return tv_error_set(err, TV_E_CORRUPT,
                        "%s: checksum error in the 1 MiB at byte %" PRIu64,
                        what, leaf * TV_LEAF_BYTES);
}

enum tv_err tvc_leaves_check(const struct tv_view *v, uint64_t off, uint64_t n,
                             const char *what, struct tv_error *err)
{
    if (n == 0 || !v->leaves)
        return TV_OK;
    for (uint64_t i = off / TV_LEAF_BYTES; i <= (off + n - 1) / TV_LEAF_BYTES;
         i++) {
        const enum tv_err rc = leaf_check(v, i, what, err);
        if (rc != TV_OK)
            return rc;
    }
    return TV_OK;
}

enum tv_err tvc_reader_open(struct tvc_reader *r, const struct tv_view *view,
                            const char *what, struct tv_error *err)
{
    const uint64_t leaves = tv_leaf_count(view->bytes);
    *r = (struct tvc_reader){.view = view, .what = what};
    r->checked = tv_calloc((size_t)(leaves / 8 + 1), 1);
    if (!r->checked)
        return tv_error_set(err, TV_E_NOMEM, "out of memory reading %s", what);
    return TV_OK;
}

void tvc_reader_close(struct tvc_reader *r)
{
    tv_free(r->checked);
    *r = (struct tvc_reader){0};
}

enum tv_err tvc_reader_read(struct tvc_reader *r, uint64_t off, uint64_t n,
                            void *dst, struct tv_error *err)
{
    if (n == 0)
        return TV_OK;
    for (uint64_t i = off / TV_LEAF_BYTES; i <= (off + n - 1) / TV_LEAF_BYTES;
         i++) {
        const unsigned char bit = (unsigned char)(1u << (i & 7));
        if (r->checked[i >> 3] & bit)
            continue;
        const enum tv_err rc = leaf_check(r->view, i, r->what, err);
        if (rc != TV_OK)
            return rc;
        r->checked[i >> 3] |= bit;
    }
    tv_view_copy(r->view, off, n, dst);
    return TV_OK;
}

/* ---- statistics ------------------------------------------------------------
 */

struct stats_job {
    const struct tvk_table *k;
    const struct tv_view *v;
    const char *what;
    const struct tvc_element *element;
    uint64_t unit_elems;
    struct tvk_stats *parts; /* one per unit */
    struct tvc_stats_worker {
        float *values;        /* TVK_LEAF */
        unsigned char *bytes; /* TVK_LEAF elements */
        struct tv_error err;
    } * workers;
};

static void stats_none(struct tvk_stats *s)
{
    *s = (struct tvk_stats){.min = INFINITY, .max = -INFINITY};
}

/* Integers and F64 do not fit fp32; min and max are rounded to it. */
static void stats_scalar(struct tvk_stats *s, const struct tvc_element *e,
                         const unsigned char *p, size_t n)
{
    stats_none(s);
    for (size_t i = 0; i < n; i++) {
        const double x = e->value(p + i * e->bytes);
        if (!isfinite(x)) {
            s->n_nonfinite++;
            continue;
        }
        s->n_zero += x == 0;
        s->sum += x;
        s->sum_sq += x * x;
        s->min = (float)x < s->min ? (float)x : s->min;
        s->max = (float)x > s->max ? (float)x : s->max;
    }
}

static void stats_unit(void *arg, size_t unit, unsigned worker)
{
    struct stats_job *j = arg;
    struct tvc_stats_worker *w = &j->workers[worker];
    const uint64_t first = unit * j->unit_elems;
    const uint64_t left = j->v->n_elems - first;
    const uint64_t n = left < j->unit_elems ? left : j->unit_elems;
    const size_t each = j->element->bytes;

    if (w->err.code != TV_OK || tvc_leaves_check(j->v, first * each, n * each,
                                                 j->what, &w->err) != TV_OK)
        return;
    stats_none(&j->parts[unit]);
    for (uint64_t at = 0; at < n; at += TVK_LEAF) {
        struct tvk_stats leaf;
        const size_t now = (size_t)(n - at < TVK_LEAF ? n - at : TVK_LEAF);
        tv_view_copy(j->v, (first + at) * each, now * each, w->bytes);
        if (tv_dtype_is_math(j->v->dtype)) {
            tvk_to_f32(j->k, j->v->dtype, w->values, w->bytes, now);
            j->k->stats(&leaf, w->values, now);
        } else {
            stats_scalar(&leaf, j->element, w->bytes, now);
        }
        tvk_stats_merge(&j->parts[unit], &leaf);
    }
}

enum tv_err tvc_view_stats(const struct tvk_table *k, tv_pool *pool,
                           const struct tv_view *v, const char *what,
                           struct tvk_stats *out, struct tv_error *err)
{
    struct stats_job j = {.k = k, .v = v, .what = what};
    const unsigned n_workers = tv_pool_threads(pool);
    enum tv_err rc = TV_OK;

    j.element = tvc_element(v->dtype);
    if (!j.element->value)
        return tv_error_set(err, TV_E_UNSUPPORTED,
                            "%s: no statistics for elements of type %s", what,
                            tv_dtype_name(v->dtype));
    j.unit_elems = TV_LEAF_BYTES / j.element->bytes;
    const size_t units =
        (size_t)((v->n_elems + j.unit_elems - 1) / j.unit_elems);
    j.parts = tv_calloc(units, sizeof *j.parts);
    j.workers = tv_calloc(n_workers, sizeof *j.workers);
    if (!j.parts || !j.workers)
        goto memory;
    for (unsigned i = 0; i < n_workers; i++) {
        j.workers[i].values = tv_alloc_aligned(TVK_LEAF * sizeof(float));
        j.workers[i].bytes = tv_alloc_aligned(TVK_LEAF * j.element->bytes);
        if (!j.workers[i].values || !j.workers[i].bytes)
            goto memory;
    }
    tv_pool_run(pool, units, stats_unit, &j);
    for (unsigned i = 0; i < n_workers && rc == TV_OK; i++)
        if (j.workers[i].err.code != TV_OK) {
            rc = j.workers[i].err.code;
            if (err)
                *err = j.workers[i].err;
        }
    if (rc == TV_OK) {
        stats_none(out);
        for (size_t i = 0; i < units; i++)
            tvk_stats_merge(out, &j.parts[i]);
    }
    goto out;
memory:
    rc = tv_error_set(err, TV_E_NOMEM, "out of memory reading %s", what);
out:
    for (unsigned i = 0; j.workers && i < n_workers; i++) {
        tv_free(j.workers[i].values);
        tv_free(j.workers[i].bytes);
    }
    tv_free(j.workers);
    tv_free(j.parts);
    return rc;
}
