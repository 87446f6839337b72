/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_diff.c - tvstore diff: two models, tensor by tensor.
 *
 * Both sides are model references, adapters included: a tensor with adapters
 * is what it would be after rounding to its own dtype, so `base+lora` equals
 * the merge of the two. Elements differ when their bits do (when their values
 * do, if the dtypes differ). max abs, relative Frobenius ||A-B|| / ||A|| and
 * cosine are over the elements that are finite on both sides, in fp64.
 *
 * Work is split into units that begin at multiples of a checksum leaf of both
 * sides; sums are combined in unit order, whatever the thread count.
 */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "elements.h"
#include "progress.h"
#include "store_open.h"
#include "tensor_read.h"
#include "tv/adapt.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/hash.h"
#include "tv/pool.h"
#include "tv/text.h"
#include "tvstore.h"

/* ---- one side
 * ------------------------------------------------------------------- */

struct adapter {
    tv_input *input;
    tv_adapter *adapter;
    size_t *targets; /* per module: index of the model's tensor */
    double weight;
};

struct side {
    const char *text;
    struct tv_ref *ref;
    tv_input *input;
    struct adapter *adapters;
    size_t n_adapters;
};

static enum tv_err adapter_open(struct adapter *a,
                                const struct tv_ref_part *part,
                                const tv_input *model, tv_store *store,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    a->weight = part->weight;
    TV_TRY(tv_input_open(part, store, err, &a->input));
    TV_TRY(tv_adapter_open(a->input, err, &a->adapter));
    a->targets = tv_calloc(tv_adapter_count(a->adapter), sizeof *a->targets);
    if (!a->targets) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(tv_adapter_bind(a->adapter, model, a->targets, err));
out:
    return rc;
}

static enum tv_err side_open(struct side *s, const char *text, tv_store *store,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    s->text = text;
    TV_TRY(tv_ref_resolve(text, err, &s->ref));
    TV_TRY(tv_input_open(&s->ref->model, store, err, &s->input));
    s->adapters = tv_calloc(s->ref->n_adapters, sizeof *s->adapters);
    if (!s->adapters) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    s->n_adapters = s->ref->n_adapters;
    for (size_t i = 0; i < s->n_adapters; i++)
        TV_TRY(adapter_open(&s->adapters[i], &s->ref->adapters[i], s->input,
                            store, err));
out:
    return rc;
}

static void side_close(struct side *s)
{
    for (size_t i = 0; i < s->n_adapters; i++) {
        tv_free(s->adapters[i].targets);
        tv_adapter_close(s->adapters[i].adapter);
        tv_input_close(s->adapters[i].input);
    }
    tv_free(s->adapters);
    tv_input_close(s->input);
    tv_ref_free(s->ref);
}

/* ---- one tensor of one side
 * ------------------------------------------------------ */

struct operand {
    tv_input *input;
    const struct tv_input_tensor *t;
    const struct tvc_element *e;
    struct tv_view view;
    struct tv_adapter_use *uses;
    size_t n_uses;
    struct tva_patch patch;
    char *what;
};

static void operand_close(struct operand *o)
{
    tva_patch_close(&o->patch);
    tv_free(o->uses);
    tv_free(o->what);
    if (o->input)
        tv_input_release(o->input, &o->view);
    *o = (struct operand){0};
}

static enum tv_err operand_open(const struct tvk_table *k, struct side *s,
                                size_t index, struct operand *o,
                                struct tv_error *err)
{
    const struct tv_input_tensor *t = tv_input_tensor(s->input, index);
    size_t n_modules = 0;
    enum tv_err rc = TV_OK;

    *o = (struct operand){.t = t, .e = tvc_element(t->dtype)};
    o->what = tv_asprintf("%s/%s", tv_input_label(s->input), t->name);
    for (size_t i = 0; i < s->n_adapters; i++)
        n_modules += tv_adapter_count(s->adapters[i].adapter);
    o->uses = tv_calloc(n_modules + 1, sizeof *o->uses);
    if (!o->what || !o->uses) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < s->n_adapters; i++) {
        const struct adapter *a = &s->adapters[i];
        for (size_t j = 0; j < tv_adapter_count(a->adapter); j++) {
            if (a->targets[j] != index)
                continue;
            if (!tv_dtype_is_math(t->dtype)) {
                rc = tv_error_set(err, TV_E_UNSUPPORTED,
                                  "%s: an adapter cannot change a tensor of "
                                  "type %s",
                                  o->what, tv_dtype_name(t->dtype));
                goto out;
            }
            if (a->weight != 0)
                o->uses[o->n_uses++] = (struct tv_adapter_use){
                    tv_adapter_module(a->adapter, j), a->input, a->weight};
        }
    }
    TV_TRY(tv_input_view(s->input, t, err, &o->view));
    o->input = s->input;
    TV_TRY(tva_patch_open(&o->patch, o->uses, o->n_uses, t, &o->view, k, true,
                          err));
out:
    if (rc != TV_OK)
        operand_close(o);
    return rc;
}

/* ---- comparing
 * -------------------------------------------------------------------- */

#define PIECE TVK_LEAF

/* How a pair of tensors can be compared. */
enum path { PATH_KERNEL, PATH_DOUBLE, PATH_BYTES, PATH_BITS };

struct sums {
    struct tvk_dots ab; /* over pairs that are finite */
    double dd;          /* sum of (a-b)^2 over them */
    double max_abs;
    uint64_t n_differing, n_nonfinite;
};

struct worker {
    unsigned char *bytes[2];
    float *values[2];
    float *scratch[2]; /* of adapters */
    float *delta;
    struct tv_error err;
};

struct job {
    const struct tvk_table *k;
    struct operand *side; /* [2] */
    enum path path;
    uint64_t unit_elems;
    uint64_t n_elems;
    struct sums *parts;
    struct worker *workers;
};

/* Elements [at, at + n) of one side as stored bytes, adapters applied. */
static void load(const struct job *j, const struct operand *o, struct worker *w,
                 int i, uint64_t at, size_t n)
{
    tv_view_copy(&o->view, at * o->e->bytes, n * o->e->bytes, w->bytes[i]);
    if (j->path != PATH_KERNEL)
        return;
    tvk_to_f32(j->k, o->t->dtype, w->values[i], w->bytes[i], n);
    if (o->n_uses == 0)
        return;
    for (size_t a = 0; a < n; a += TVA_BLOCK)
        tva_patch_apply(&o->patch, j->k, at + a,
                        n - a < TVA_BLOCK ? n - a : TVA_BLOCK, w->values[i] + a,
                        w->scratch[i]);
    tvk_from_f32(j->k, o->t->dtype, w->bytes[i], w->values[i], n);
    tvk_to_f32(j->k, o->t->dtype, w->values[i], w->bytes[i], n);
}

static uint64_t count_bytes(const unsigned char *a, const unsigned char *b,
                            size_t each, size_t n)
{
    uint64_t differing = 0;
    if (memcmp(a, b, each * n) == 0)
        return 0;
    for (size_t i = 0; i < n; i++)
        differing += memcmp(a + i * each, b + i * each, each) != 0;
    return differing;
}

static void piece_kernel(const struct job *j, struct worker *w, struct sums *s,
                         size_t n)
{
    float *a = w->values[0];
    float *b = w->values[1];
    const bool same_type = j->side[0].t->dtype == j->side[1].t->dtype;
    struct tvk_dots dots;
    struct tvk_dots delta;

    if (same_type) {
        s->n_differing +=
            count_bytes(w->bytes[0], w->bytes[1], j->side[0].e->bytes, n);
    } else {
        for (size_t i = 0; i < n; i++)
            s->n_differing += !(a[i] == b[i] || (isnan(a[i]) && isnan(b[i])));
    }
    if (j->k->count_nonfinite(a, n) + j->k->count_nonfinite(b, n) > 0)
        for (size_t i = 0; i < n; i++)
            if (!isfinite(a[i]) || !isfinite(b[i])) {
                s->n_nonfinite++;
                a[i] = b[i] = 0;
            }
    j->k->dots(&dots, a, b, n);
    j->k->delta(w->delta, a, b, n);
    j->k->dots(&delta, w->delta, w->delta, n);
    s->ab.aa += dots.aa;
    s->ab.bb += dots.bb;
    s->ab.ab += dots.ab;
    s->dd += delta.aa;
    for (size_t i = 0; i < n; i++) {
        const double d = fabs((double)a[i] - (double)b[i]);
        s->max_abs = d > s->max_abs ? d : s->max_abs;
    }
}

static void piece_double(const struct job *j, struct worker *w, struct sums *s,
                         size_t n)
{
    const struct tvc_element *ea = j->side[0].e;
    const struct tvc_element *eb = j->side[1].e;
    if (ea == eb)
        s->n_differing += count_bytes(w->bytes[0], w->bytes[1], ea->bytes, n);
    for (size_t i = 0; i < n; i++) {
        const double a = ea->value(w->bytes[0] + i * ea->bytes);
        const double b = eb->value(w->bytes[1] + i * eb->bytes);
        if (ea != eb)
            s->n_differing += !(a == b || (isnan(a) && isnan(b)));
        if (!isfinite(a) || !isfinite(b)) {
            s->n_nonfinite++;
            continue;
        }
        const double d = fabs(a - b);
        s->ab.aa += a * a;
        s->ab.bb += b * b;
        s->ab.ab += a * b;
        s->dd += d * d;
        s->max_abs = d > s->max_abs ? d : s->max_abs;
    }
}

static void unit_elements(struct job *j, size_t unit, struct worker *w)
{
    const uint64_t first = unit * j->unit_elems;
    const uint64_t left = j->n_elems - first;
    const uint64_t n = left < j->unit_elems ? left : j->unit_elems;
    struct sums *s = &j->parts[unit];

    for (int i = 0; i < 2; i++) {
        const struct operand *o = &j->side[i];
        if (tvc_leaves_check(&o->view, first * o->e->bytes, n * o->e->bytes,
                             o->what, &w->err) != TV_OK)
            return;
    }
    for (uint64_t at = 0; at < n; at += PIECE) {
        const size_t now = (size_t)(n - at < PIECE ? n - at : PIECE);
        load(j, &j->side[0], w, 0, first + at, now);
        load(j, &j->side[1], w, 1, first + at, now);
        if (j->path == PATH_KERNEL)
            piece_kernel(j, w, s, now);
        else if (j->path == PATH_DOUBLE)
            piece_double(j, w, s, now);
        else
            s->n_differing +=
                count_bytes(w->bytes[0], w->bytes[1], j->side[0].e->bytes, now);
    }
}

static unsigned bits_at(const unsigned char *p, uint64_t bit, unsigned n)
{
    unsigned v = 0;
    for (unsigned i = 0; i < n; i++)
        v |= (unsigned)(p[(bit + i) >> 3] >> ((bit + i) & 7) & 1) << i;
    return v;
}

/* Elements narrower than a byte: a unit is three leaves, so that 4 and 6 bit
 * elements begin at its begin. */
static void unit_bits(struct job *j, size_t unit, struct worker *w)
{
    const struct operand *o = j->side;
    const unsigned bits = tv_dtype_bits(o[0].t->dtype);
    const uint64_t begin = unit * 3 * (uint64_t)TV_LEAF_BYTES;
    const uint64_t end = o[0].view.bytes;
    const uint64_t n = end - begin < 3 * (uint64_t)TV_LEAF_BYTES
                           ? end - begin
                           : 3 * (uint64_t)TV_LEAF_BYTES;
    struct sums *s = &j->parts[unit];

    for (int i = 0; i < 2; i++)
        if (tvc_leaves_check(&o[i].view, begin, n, o[i].what, &w->err) != TV_OK)
            return;
    for (uint64_t at = 0; at < n; at += 3 * 1024) {
        const size_t now = (size_t)(n - at < 3 * 1024 ? n - at : 3 * 1024);
        tv_view_copy(&o[0].view, begin + at, now, w->bytes[0]);
        tv_view_copy(&o[1].view, begin + at, now, w->bytes[1]);
        if (memcmp(w->bytes[0], w->bytes[1], now) == 0)
            continue;
        for (uint64_t b = 0; b + bits <= 8 * (uint64_t)now; b += bits)
            s->n_differing +=
                bits_at(w->bytes[0], b, bits) != bits_at(w->bytes[1], b, bits);
    }
}

static void unit_run(void *arg, size_t unit, unsigned worker)
{
    struct job *j = arg;
    struct worker *w = &j->workers[worker];
    if (w->err.code != TV_OK)
        return;
    if (j->path == PATH_BITS)
        unit_bits(j, unit, w);
    else
        unit_elements(j, unit, w);
}

static enum path path_of(const struct operand *a, const struct operand *b)
{
    if (tv_dtype_is_math(a->t->dtype) && tv_dtype_is_math(b->t->dtype))
        return PATH_KERNEL;
    if (tv_dtype_is_float(a->t->dtype) && tv_dtype_is_float(b->t->dtype) &&
        a->e->value && b->e->value)
        return PATH_DOUBLE;
    return a->e->bytes ? PATH_BYTES : PATH_BITS;
}

static void sums_add(struct sums *into, const struct sums *more)
{
    into->ab.aa += more->ab.aa;
    into->ab.bb += more->ab.bb;
    into->ab.ab += more->ab.ab;
    into->dd += more->dd;
    into->n_differing += more->n_differing;
    into->n_nonfinite += more->n_nonfinite;
    if (more->max_abs > into->max_abs)
        into->max_abs = more->max_abs;
}

static enum tv_err workers_open(struct job *j, unsigned n, struct tv_error *err)
{
    j->workers = tv_calloc(n, sizeof *j->workers);
    if (!j->workers)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (unsigned i = 0; i < n; i++) {
        struct worker *w = &j->workers[i];
        bool ok = true;
        for (int s = 0; s < 2; s++) {
            w->bytes[s] = tv_alloc_aligned(PIECE * 8);
            w->values[s] = tv_alloc_aligned(PIECE * sizeof(float));
            ok = ok && w->bytes[s] && w->values[s];
        }
        w->delta = tv_alloc_aligned(PIECE * sizeof(float));
        if (!ok || !w->delta)
            return tv_error_set(err, TV_E_NOMEM, "out of memory");
    }
    return TV_OK;
}

static void workers_close(struct job *j, unsigned n)
{
    for (unsigned i = 0; j->workers && i < n; i++) {
        for (int s = 0; s < 2; s++) {
            tv_free(j->workers[i].bytes[s]);
            tv_free(j->workers[i].values[s]);
            tv_free(j->workers[i].scratch[s]);
        }
        tv_free(j->workers[i].delta);
    }
    tv_free(j->workers);
    j->workers = NULL;
}

/* Scratch for the adapters of this pair of tensors. */
static enum tv_err scratch_open(struct job *j, unsigned n, struct tv_error *err)
{
    for (unsigned i = 0; i < n; i++) {
        for (int s = 0; s < 2; s++) {
            const struct operand *o = &j->side[s];
            float **at = &j->workers[i].scratch[s];
            tv_free(*at);
            *at = NULL;
            if (o->n_uses == 0)
                continue;
            *at = tv_alloc_aligned(tva_patch_floats(o->uses, o->n_uses, o->t) *
                                   sizeof(float));
            if (!*at)
                return tv_error_set(err, TV_E_NOMEM, "out of memory");
        }
    }
    return TV_OK;
}

/* Both have the same shape; dtypes that cannot be compared are the same. */
static enum tv_err compare(struct job *j, tv_pool *pool, struct sums *out,
                           struct tv_error *err)
{
    const struct operand *o = j->side;
    enum tv_err rc = TV_OK;
    size_t units = 0;

    j->n_elems = o[0].t->n_elems;
    j->path = path_of(&o[0], &o[1]);
    if (j->path == PATH_BITS) {
        const uint64_t unit = 3 * (uint64_t)TV_LEAF_BYTES;
        units = (size_t)((o[0].view.bytes + unit - 1) / unit);
    } else {
        const size_t each =
            o[0].e->bytes < o[1].e->bytes ? o[0].e->bytes : o[1].e->bytes;
        j->unit_elems = TV_LEAF_BYTES / each;
        units = (size_t)((j->n_elems + j->unit_elems - 1) / j->unit_elems);
    }
    rc = scratch_open(j, tv_pool_threads(pool), err);
    if (rc != TV_OK)
        return rc;
    j->parts = tv_calloc(units, sizeof *j->parts);
    if (!j->parts)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    tv_pool_run(pool, units, unit_run, j);
    for (unsigned i = 0; i < tv_pool_threads(pool) && rc == TV_OK; i++)
        if (j->workers[i].err.code != TV_OK) {
            rc = j->workers[i].err.code;
            if (err)
                *err = j->workers[i].err;
        }
    for (size_t i = 0; i < units; i++)
        sums_add(out, &j->parts[i]);
    tv_free(j->parts);
    j->parts = NULL;
    return rc;
}

/* ---- the report
 * -------------------------------------------------------------------- */

struct line {
    const char *name, *status; /* equal, different, shape, dtype, only-a, .. */
    size_t at[2];              /* index in each input */
    const struct tv_input_tensor *a, *b;
    bool has_numbers, has_count;
    struct sums sums;
};

struct diff {
    struct tvc *c;
    struct side side[2];
    tv_pool *pool;
    struct job job;
    json_t *list;
    struct tvc_table table;
    size_t n_tensors, n_different;
    struct tvc_progress *bar;
    uint64_t bytes_done, bytes_total;
};

static json_t *shape_json(const struct tv_input_tensor *t)
{
    if (!t)
        return json_null();
    json_t *a = json_array();
    for (unsigned i = 0; i < t->rank; i++)
        (void)json_array_append_new(a, tvc_json_u64(t->shape[i]));
    return a;
}

static json_t *dtype_json(const struct tv_input_tensor *t)
{
    return t ? json_string(tv_dtype_name(t->dtype)) : json_null();
}

static double relative_of(const struct sums *s)
{
    if (s->dd == 0)
        return 0;
    return s->ab.aa > 0 ? sqrt(s->dd / s->ab.aa) : INFINITY;
}

static double cosine_of(const struct sums *s)
{
    if (s->dd == 0)
        return 1;
    const double n = sqrt(s->ab.aa) * sqrt(s->ab.bb);
    return n > 0 ? s->ab.ab / n : NAN;
}

static void line_json(struct diff *d, const struct line *l)
{
    const struct sums *s = &l->sums;
    json_t *o = json_pack("{s:o, s:s, s:o, s:o, s:o, s:o}", "name",
                          tvc_json_string(l->name), "status", l->status,
                          "dtype", dtype_json(l->a ? l->a : l->b), "shape",
                          shape_json(l->a ? l->a : l->b), "dtype_b",
                          dtype_json(l->b), "shape_b", shape_json(l->b));
    (void)json_object_set_new(
        o, "max_abs", l->has_numbers ? tvc_json_real(s->max_abs) : json_null());
    (void)json_object_set_new(o, "relative_frobenius",
                              l->has_numbers ? tvc_json_real(relative_of(s))
                                             : json_null());
    (void)json_object_set_new(o, "cosine",
                              l->has_numbers ? tvc_json_real(cosine_of(s))
                                             : json_null());
    (void)json_object_set_new(o, "differing_elements",
                              l->has_count ? tvc_json_u64(s->n_differing)
                                           : json_null());
    (void)json_object_set_new(o, "n_nonfinite",
                              l->has_numbers ? tvc_json_u64(s->n_nonfinite)
                                             : json_null());
    (void)json_array_append_new(d->list, o);
}

static void line_row(struct diff *d, const struct line *l)
{
    struct tvc_table *t = &d->table;
    const struct sums *s = &l->sums;
    char count[32];
    tvc_table_cell(t, "%s", l->name);
    tvc_table_cell(t, "%s", l->status);
    if (l->has_numbers) {
        tvc_table_cell(t, "%.6g", s->max_abs);
        tvc_table_cell(t, "%.6g", relative_of(s));
        tvc_table_cell(t, "%.9f", cosine_of(s));
    } else {
        for (int i = 0; i < 3; i++)
            tvc_table_cell(t, "-");
    }
    tvc_table_cell(t, "%s",
                   l->has_count ? tvc_count(s->n_differing, count, sizeof count)
                                : "-");
}

static void line_put(struct diff *d, const struct line *l)
{
    const bool equal = strcmp(l->status, "equal") == 0;
    d->n_tensors++;
    d->n_different += !equal;
    if (d->c->out.json)
        line_json(d, l);
    else if (!equal || d->c->out.verbose > 0)
        line_row(d, l);
}

static bool same_shape(const struct tv_input_tensor *a,
                       const struct tv_input_tensor *b)
{
    return a->rank == b->rank &&
           memcmp(a->shape, b->shape, a->rank * sizeof *a->shape) == 0;
}

static enum tv_err diff_pair(struct diff *d, struct line *l)
{
    const struct tvk_table *k = d->c->kernels;
    struct tv_error *err = &d->c->err;
    struct operand o[2] = {{0}};
    enum tv_err rc = TV_OK;

    TV_TRY(operand_open(k, &d->side[0], l->at[0], &o[0], err));
    TV_TRY(operand_open(k, &d->side[1], l->at[1], &o[1], err));
    d->job.k = k;
    d->job.side = o;
    const enum path path = path_of(&o[0], &o[1]);
    const bool same_type = l->a->dtype == l->b->dtype;
    l->status = "dtype";
    if (!same_type && path != PATH_KERNEL && path != PATH_DOUBLE)
        goto out;
    TV_TRY(compare(&d->job, d->pool, &l->sums, err));
    l->has_count = true;
    l->has_numbers = path == PATH_KERNEL || path == PATH_DOUBLE;
    if (same_type)
        l->status = l->sums.n_differing ? "different" : "equal";
out:
    operand_close(&o[0]);
    operand_close(&o[1]);
    return rc;
}

static enum tv_err diff_line(struct diff *d, struct line *l)
{
    enum tv_err rc = TV_OK;
    l->name = l->a ? l->a->name : l->b->name;
    if (!l->a || !l->b) {
        l->status = l->a ? "only-a" : "only-b";
    } else if (!same_shape(l->a, l->b)) {
        l->status = "shape";
    } else {
        rc = diff_pair(d, l);
        d->bytes_done += l->a->bytes + l->b->bytes;
    }
    if (rc != TV_OK)
        return rc;
    line_put(d, l);
    tvc_progress_set(d->bar, d->n_tensors, tv_input_count(d->side[0].input),
                     d->bytes_done, d->bytes_total);
    return TV_OK;
}

static enum tv_err diff_all(struct diff *d)
{
    tv_input *a = d->side[0].input;
    tv_input *b = d->side[1].input;
    enum tv_err rc = TV_OK;
    size_t i = 0;
    size_t j = 0;

    for (size_t n = 0; n < tv_input_count(a); n++)
        d->bytes_total += 2 * tv_input_tensor(a, n)->bytes;
    /* Both are in layer order: one walk meets every name once. */
    while (rc == TV_OK && (i < tv_input_count(a) || j < tv_input_count(b))) {
        const struct tv_input_tensor *x =
            i < tv_input_count(a) ? tv_input_tensor(a, i) : NULL;
        const struct tv_input_tensor *y =
            j < tv_input_count(b) ? tv_input_tensor(b, j) : NULL;
        const int order = !x ? 1 : !y ? -1 : tv_name_compare(x->name, y->name);
        struct line l = {.a = order <= 0 ? x : NULL,
                         .b = order >= 0 ? y : NULL,
                         .at = {i, j}};
        rc = diff_line(d, &l);
        i += order <= 0;
        j += order >= 0;
    }
    return rc;
}

static enum tv_err diff_report(struct diff *d)
{
    struct tvc *c = d->c;
    if (c->out.json) {
        tvc_out_json(
            &c->out,
            json_pack("{s:s, s:o, s:o, s:b, s:o, s:o, s:O}", "schema",
                      "tvstore.diff/1", "a", tvc_json_string(c->pos[1]), "b",
                      tvc_json_string(c->pos[2]), "equal", d->n_different == 0,
                      "n_tensors", tvc_json_u64(d->n_tensors), "n_different",
                      tvc_json_u64(d->n_different), "tensors", d->list));
        return TV_OK;
    }
    enum tv_err rc = TV_OK;
    if (d->table.n > d->table.n_columns)
        rc = tvc_table_end(&c->out, &d->table, &c->err);
    if (rc == TV_OK && d->n_different)
        tvc_out(&c->out, "%zu of %zu tensors differ\n", d->n_different,
                d->n_tensors);
    else if (rc == TV_OK)
        tvc_out(&c->out, "%zu tensors, all equal\n", d->n_tensors);
    return rc;
}

static int run(struct tvc *c)
{
    static const char *const headers[] = {
        "TENSOR", "STATUS", "MAX ABS", "REL FROBENIUS", "COSINE", "DIFFERING"};
    struct diff d = {.c = c};
    tv_store *store = NULL;
    enum tv_err rc = TV_OK;
    const unsigned threads = tvc_threads(c);

    d.list = json_array();
    tvc_table_begin(&d.table, "llrrrr", headers);
    TV_TRY(tvc_store_open(c, c->pos[0], true, &c->err, &store));
    TV_TRY(side_open(&d.side[0], c->pos[1], store, &c->err));
    TV_TRY(side_open(&d.side[1], c->pos[2], store, &c->err));
    TV_TRY(tv_pool_open(threads, &c->err, &d.pool));
    TV_TRY(workers_open(&d.job, tv_pool_threads(d.pool), &c->err));
    d.bar = tvc_progress_begin(&c->out, "diff", "tensors");
    TV_TRY(diff_all(&d));
    tvc_progress_end(d.bar);
    d.bar = NULL;
    TV_TRY(diff_report(&d));
out:
    tvc_progress_end(d.bar);
    workers_close(&d.job, d.pool ? tv_pool_threads(d.pool) : 0);
    tv_pool_close(d.pool);
    side_close(&d.side[1]);
    side_close(&d.side[0]);
    tv_store_close(store);
    tvc_table_free(&d.table);
    json_decref(d.list);
    if (rc != TV_OK)
        return tvc_fail(c, &c->err);
    return tvc_done(c, d.n_different ? 3 : 0);
}

const struct tvc_command tvc_cmd_diff = {
    .name = "diff",
    .summary = "compare two models tensor by tensor",
    .args_doc = "STORE A B",
    .text = "A and B are model references: store:NAME, a directory or file, "
            "ORG/NAME in\nthe local Hugging Face cache, each with +ADAPTER. "
            "Exit code 3 when they\ndiffer. -v also lists equal tensors.",
    .examples = "tvstore diff models.tv store:base ./Llama-3.2-1B\n"
                "tvstore diff models.tv store:base store:merged --json\n"
                "tvstore diff models.tv ./merged store:base+./lora-jargon",
    .min_pos = 3,
    .max_pos = 3,
    .run = run,
};
