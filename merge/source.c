/* SPDX-License-Identifier: Apache-2.0 */
/*
 * source.c - views, dtype conversion and adapters as one stream of fp32.
 *
 * An adapter's contribution is never formed as a matrix: of L only the few rows
 * under a block are converted (into the worker's scratch), R is used in place
 * when it lies in the file as aligned fp32 and is converted once per tensor
 * otherwise. PEFT LoRA: Hu et al., arXiv 2106.09685; W + s B A, with L = B and
 * R = A, or their transposes for weights stored [in, out].
 */
#include "source.h"

#include <inttypes.h>
#include <string.h>

#include "method.h"
#include "tv/alloc.h"
#include "tv/checked.h"

static size_t math_bytes(enum tv_dtype t)
{
    return tv_dtype_is_math(t) ? tv_dtype_bits(t) / 8u : 0;
}

static bool is_aligned_f32(const struct tv_view *v)
{
    return v->dtype == TV_F32 && v->n_chunks == 1 &&
           (uintptr_t)v->chunks[0] % sizeof(float) == 0;
}

/* Elements [start, start + n) of a view as fp32. */
static void view_to_f32(const struct tv_view *v, const struct tvk_table *k,
                        uint64_t start, uint64_t n, float *dst)
{
    const size_t each = math_bytes(v->dtype);
    uint64_t off = start * each;

    while (n > 0) {
        uint64_t run = 0;
        const unsigned char *at = tv_view_at(v, off, &run);
        uint64_t whole = run / each;
        if (whole > n)
            whole = n;
        if (whole > 0) {
            tvk_to_f32(k, v->dtype, dst, at, (size_t)whole);
        } else {
            /* An element cut in two by a chunk border. */
            unsigned char one[8];
            whole = 1;
            tv_view_copy(v, off, each, one);
            tvk_to_f32(k, v->dtype, dst, one, 1);
        }
        dst += whole;
        off += whole * each;
        n -= whole;
    }
}

/* ---- adapters ------------------------------------------------------------ */

static uint64_t cols_of(const struct tv_adapter_module *m)
{
    return m->transposed ? m->out_features : m->in_features;
}

/* Rows of L that a block of TVM_BLOCK elements can touch. */
static uint64_t rows_per_block(const struct tv_adapter_module *m)
{
    const uint64_t cols = cols_of(m);
    return TVM_BLOCK / (cols > 0 ? cols : 1) + 2;
}

static uint64_t factor_bytes(const struct tv_adapter_module *m)
{
    uint64_t bytes = 0;
    if (!tv_mul_u64(cols_of(m), m->r, &bytes) ||
        !tv_mul_u64(bytes, sizeof(float), &bytes))
        return UINT64_MAX / 4;
    return bytes;
}

uint64_t tvm_source_bytes(const struct tvm_tensor *t, size_t source)
{
    const struct tvm_source *s = &t->sources[source];
    uint64_t bytes = s->n_adapters * sizeof(struct reader_adapter);

    /* Views of strided tensors are copies. */
    if (!s->tensor->contiguous)
        bytes += s->tensor->bytes;
    for (size_t i = 0; i < s->n_adapters; i++) {
        const struct tv_adapter_module *m = s->adapters[i].module;
        bytes += factor_bytes(m);
        if (!m->a->contiguous)
            bytes += m->a->bytes;
        if (!m->b->contiguous)
            bytes += m->b->bytes;
    }
    return bytes;
}

size_t tvm_source_l_floats(const struct tvm_tensor *t, size_t source)
{
    const struct tvm_source *s = &t->sources[source];
    uint64_t most = 0;

    for (size_t i = 0; i < s->n_adapters; i++) {
        const struct tv_adapter_module *m = s->adapters[i].module;
        const uint64_t n = rows_per_block(m) * m->r;
        if (n > most)
            most = n;
    }
    return (size_t)most;
}

static enum tv_err verify_view(const struct tv_view *v, const char *label,
                               const char *tensor, struct tv_error *err)
{
    if (v->leaves == NULL)
        return TV_OK;
    for (uint64_t i = 0; i < tv_leaf_count(v->bytes); i++)
        if (!tv_hash_equal(tv_view_leaf(v, i), v->leaves[i]))
            return tv_error_set(err, TV_E_CORRUPT,
                                "%s: tensor %s is damaged: MiB %" PRIu64
                                " does not have its checksum",
                                label, tensor, i);
    return TV_OK;
}

static enum tv_err open_adapter(struct reader_adapter *a,
                                const struct tvm_low_rank *from,
                                const struct tvk_table *k, bool verify,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_adapter_module *m = from->module;
    const struct tv_input_tensor *l = m->transposed ? m->a : m->b;
    const struct tv_input_tensor *r = m->transposed ? m->b : m->a;
    const char *label = tv_input_label(from->from);

    a->module = m;
    a->from = from->from;
    a->transposed = m->transposed;
    a->scale = m->scaling * from->weight;
    a->rank = (size_t)m->r;
    a->cols = cols_of(m);
    if (!tv_dtype_is_math(l->dtype) || !tv_dtype_is_math(r->dtype))
        return tv_error_set(err, TV_E_UNSUPPORTED,
                            "%s: module %s has factors of type %s", label,
                            m->module, tv_dtype_name(l->dtype));
    TV_TRY(tv_input_view(from->from, l, err, &a->l_view));
    TV_TRY(tv_input_view(from->from, r, err, &a->r_view));
    if (verify) {
        TV_TRY(verify_view(&a->l_view, label, l->name, err));
        TV_TRY(verify_view(&a->r_view, label, r->name, err));
    }
    if (!m->transposed && is_aligned_f32(&a->r_view)) {
        a->r = (const float *)(const void *)a->r_view.chunks[0];
        return TV_OK;
    }
    a->r_owned = tv_alloc_aligned((size_t)factor_bytes(m) + 1);
    if (!a->r_owned) {
        rc = tv_error_set(err, TV_E_NOMEM,
                          "out of memory for adapter module %s (%" PRIu64
                          " bytes)",
                          m->module, factor_bytes(m));
        goto out;
    }
    a->r = a->r_owned;
    if (!m->transposed) {
        view_to_f32(&a->r_view, k, 0, a->r_view.n_elems, a->r_owned);
        goto out;
    }
    for (uint64_t o = 0; o < a->cols; o++)
        for (size_t i = 0; i < a->rank; i++)
            view_to_f32(&a->r_view, k, o * a->rank + i, 1,
                        &a->r_owned[i * a->cols + o]);
out:
    return rc;
}

static void add_adapter(const struct reader_adapter *a,
                        const struct tvk_table *k, uint64_t start, size_t n,
                        float *y, float *l_scratch)
{
    const uint64_t first = start / a->cols;
    const uint64_t last = (start + n - 1) / a->cols;
    const uint64_t rows = last - first + 1;

    if (!a->transposed) {
        view_to_f32(&a->l_view, k, first * a->rank, rows * a->rank, l_scratch);
    } else {
        const uint64_t stride = a->module->in_features;
        for (size_t i = 0; i < a->rank; i++)
            for (uint64_t row = 0; row < rows; row++)
                view_to_f32(&a->l_view, k, i * stride + first + row, 1,
                            &l_scratch[row * a->rank + i]);
    }
    /* Row numbers count from `first`, so that L needs no other rows. */
    k->lowrank_add(y, l_scratch, a->r, a->scale, a->rank, a->cols,
                   start - first * a->cols, n);
}

/* ---- readers ------------------------------------------------------------- */

enum tv_err tvm_reader_open(struct tvm_reader *out, const struct tvm_plan *plan,
                            const struct tvm_tensor *t, size_t source,
                            const struct tvk_table *k, bool verify,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_source *s = &t->sources[source];

    *out = (struct tvm_reader){
        .tensor = s->tensor->name,
        .input = plan->inputs[s->input].input,
        .elem_bytes = math_bytes(s->tensor->dtype),
    };
    out->label = tv_input_label(out->input);
    TV_TRY(tv_input_view(out->input, s->tensor, err, &out->view));
    if (t->action == TVM_COPY || s->n_adapters == 0)
        goto out;
    out->adapters = tv_calloc(s->n_adapters, sizeof *out->adapters);
    if (!out->adapters) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory for %zu adapters",
                          s->n_adapters);
        goto out;
    }
    for (size_t i = 0; i < s->n_adapters; i++) {
        out->n_adapters = i + 1;
        TV_TRY(
            open_adapter(&out->adapters[i], &s->adapters[i], k, verify, err));
    }
out:
    if (rc != TV_OK)
        tv_error_context(err, "%s", t->name);
    return rc;
}

void tvm_reader_close(struct tvm_reader *r)
{
    for (size_t i = 0; i < r->n_adapters; i++) {
        struct reader_adapter *a = &r->adapters[i];
        tv_free(a->r_owned);
        if (a->from) {
            tv_input_release(a->from, &a->l_view);
            tv_input_release(a->from, &a->r_view);
        }
    }
    tv_free(r->adapters);
    if (r->input)
        tv_input_release(r->input, &r->view);
    memset(r, 0, sizeof *r);
}

const float *tvm_reader_block(const struct tvm_reader *r,
                              const struct tvk_table *k, uint64_t start,
                              size_t n, float *scratch, float *l_scratch)
{
    if (r->view.dtype == TV_F32 && r->n_adapters == 0) {
        uint64_t run = 0;
        const unsigned char *at =
            tv_view_at(&r->view, start * sizeof(float), &run);
        if (run >= n * sizeof(float) && (uintptr_t)at % sizeof(float) == 0)
            return (const float *)(const void *)at;
    }
    view_to_f32(&r->view, k, start, n, scratch);
    for (size_t i = 0; i < r->n_adapters; i++)
        add_adapter(&r->adapters[i], k, start, n, scratch, l_scratch);
    return scratch;
}

enum tv_err tvm_reader_verify(const struct tvm_reader *r, uint64_t off,
                              uint64_t n, struct tv_error *err)
{
    if (r->view.leaves == NULL)
        return TV_OK;
    for (uint64_t at = off; at < off + n; at += TV_LEAF_BYTES) {
        const uint64_t leaf = at / TV_LEAF_BYTES;
        if (!tv_hash_equal(tv_view_leaf(&r->view, leaf), r->view.leaves[leaf]))
            return tvm_reader_damaged(r, leaf, err);
    }
    return TV_OK;
}

enum tv_err tvm_reader_damaged(const struct tvm_reader *r, uint64_t leaf,
                               struct tv_error *err)
{
    return tv_error_set(err, TV_E_CORRUPT,
                        "%s: tensor %s is damaged: MiB %" PRIu64
                        " does not have its checksum",
                        r->label, r->tensor, leaf);
}

enum tv_err tvm_inputs_unchanged(const struct tvm_plan *p, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < p->n_inputs; i++) {
        const struct tvm_plan_input *in = &p->inputs[i];
        TV_TRY(tv_input_unchanged(in->input, err));
        for (size_t a = 0; a < in->n_adapters; a++)
            TV_TRY(tv_input_unchanged(tv_adapter_input(in->adapters[a]), err));
    }
out:
    return rc;
}
