/* SPDX-License-Identifier: Apache-2.0 */
/*
 * source.c - views, dtype conversion, adapters and gathered rows as one stream
 * of fp32.
 *
 * An adapter's contribution is never formed as a matrix: what it makes of a
 * block of the base is computed when the block is read (tv/adapt.h).
 */
#include "source.h"

#include <inttypes.h>
#include <string.h>

#include "gather.h"
#include "method.h"
#include "tv/alloc.h"
#include "tv/checked.h"

static size_t math_bytes(enum tv_dtype t)
{
    return tv_dtype_is_math(t) ? tv_dtype_bits(t) / 8u : 0;
}

_Static_assert(TVM_BLOCK <= TVA_BLOCK, "a block is patched in one call");

/* ---- adapters ------------------------------------------------------------ */

uint64_t tvm_source_bytes_of(const struct tvm_source *s)
{
    if (s->gather)
        return tvm_gather_bytes(s->gather);
    const uint64_t bytes =
        tva_patch_bytes(s->adapters, s->n_adapters, s->tensor);

    /* Views of strided tensors are copies. */
    return bytes + (s->tensor->contiguous ? 0 : s->tensor->bytes);
}

size_t tvm_source_l_floats_of(const struct tvm_source *s)
{
    if (s->gather)
        return tvm_gather_l_floats(s->gather);
    return tva_patch_floats(s->adapters, s->n_adapters, s->tensor);
}

uint64_t tvm_source_bytes(const struct tvm_tensor *t, size_t source)
{
    return tvm_source_bytes_of(&t->sources[source]);
}

size_t tvm_source_l_floats(const struct tvm_tensor *t, size_t source)
{
    return tvm_source_l_floats_of(&t->sources[source]);
}

/* ---- readers ------------------------------------------------------------- */

enum tv_err tvm_reader_open_source(struct tvm_reader *out,
                                   const struct tvm_plan *plan,
                                   const struct tvm_tensor *t,
                                   const struct tvm_source *s,
                                   const struct tvk_table *k, bool verify,
                                   struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    *out = (struct tvm_reader){
        .tensor = s->tensor->name,
        .input = plan->inputs[s->input].input,
        .elem_bytes = math_bytes(s->tensor->dtype),
    };
    out->label = tv_input_label(out->input);
    if (s->gather) {
        TV_TRY(tvm_gather_open(out, plan, t, s->gather, k, verify, err));
        goto out;
    }
    TV_TRY(tv_input_view(out->input, s->tensor, err, &out->view));
    if (t->action == TVM_COPY || s->n_adapters == 0)
        goto out;
    TV_TRY(tva_patch_open(&out->patch, s->adapters, s->n_adapters, s->tensor,
                          &out->view, k, verify, err));
out:
    if (rc != TV_OK)
        tv_error_context(err, "%s", t->name);
    return rc;
}

enum tv_err tvm_reader_open(struct tvm_reader *out, const struct tvm_plan *plan,
                            const struct tvm_tensor *t, size_t source,
                            const struct tvk_table *k, bool verify,
                            struct tv_error *err)
{
    return tvm_reader_open_source(out, plan, t, &t->sources[source], k, verify,
                                  err);
}

void tvm_reader_close(struct tvm_reader *r)
{
    tvm_gather_close(r);
    tva_patch_close(&r->patch);
    if (r->input)
        tv_input_release(r->input, &r->view);
    memset(r, 0, sizeof *r);
}

static const float *count_bad(const struct tvk_table *k, const float *x,
                              size_t n, uint64_t *bad)
{
    if (bad)
        *bad += k->count_nonfinite(x, n);
    return x;
}

const float *tvm_reader_block(const struct tvm_reader *r,
                              const struct tvk_table *k, uint64_t start,
                              size_t n, float *scratch, float *l_scratch,
                              uint64_t *bad)
{
    if (r->gather)
        return count_bad(
            k, tvm_gather_block(r, k, start, n, scratch, l_scratch), n, bad);
    if (r->view.dtype == TV_F32 && r->patch.n == 0) {
        uint64_t run = 0;
        const unsigned char *at =
            tv_view_at(&r->view, start * sizeof(float), &run);
        if (run >= n * sizeof(float) && (uintptr_t)at % sizeof(float) == 0)
            return count_bad(k, (const float *)(const void *)at, n, bad);
    }
    const uint64_t here = tva_view_f32(k, &r->view, start, n, scratch);
    if (r->patch.n > 0) {
        tva_patch_apply(&r->patch, k, start, n, scratch, l_scratch);
        return count_bad(k, scratch, n, bad);
    }
    if (bad)
        *bad += here;
    return scratch;
}

bool tvm_reader_is_bf16(const struct tvm_reader *r)
{
    return r->view.dtype == TV_BF16 && !r->gather && r->patch.n == 0;
}

const void *tvm_reader_bf16(const struct tvm_reader *r, uint64_t start,
                            size_t n, void *scratch)
{
    uint64_t run = 0;
    const void *at = tv_view_at(&r->view, 2 * start, &run);

    if (run >= 2 * n)
        return at;
    tv_view_copy(&r->view, 2 * start, 2 * n, scratch);
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
