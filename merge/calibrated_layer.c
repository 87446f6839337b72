/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibrated_layer.c - the task vector of one layer, as pruning wants it: T
 * [out, in] in rows, whichever way it is stored, and back again into words and
 * values in stored order; and the models of a plan that run
 * (calibrated_parts.h).
 */
#include "calibrated_parts.h"

#include <stdlib.h>

#include "method.h"
#include "tv/alloc.h"
#include "tv/derived.h"
#include "tv/sys.h"
#include "tv/text.h"

void tvm_layer_shape(const struct tvm_tensor *t, size_t *rows, size_t *cols)
{
    *rows = (size_t)t->shape[t->in_first ? 1 : 0];
    *cols = (size_t)t->shape[t->in_first ? 0 : 1];
}

void tvm_layer_delta(const struct tvm_layer *l, uint64_t start, size_t n,
                     float *dst)
{
    for (size_t done = 0; done < n; done += TVM_BLOCK) {
        const size_t some = n - done < TVM_BLOCK ? n - done : TVM_BLOCK;
        const float *b = tvm_reader_block(&l->base, l->k, start + done, some,
                                          l->block, l->l_scratch, NULL);
        const float *x =
            tvm_reader_block(&l->donor, l->k, start + done, some,
                             l->block + TVM_BLOCK, l->l_scratch, NULL);
        for (size_t i = 0; i < some; i++)
            dst[done + i] = x[i] - b[i];
    }
}

/* Rows [row, row + n) of T [out, in]. */
void tvm_layer_rows(void *arg, size_t row, size_t n, float *dst)
{
    struct tvm_layer *const l = arg;
    float some[TVM_BLOCK];

    if (!l->t->in_first) {
        tvm_layer_delta(l, (uint64_t)row * l->cols, n * l->cols, dst);
        return;
    }
    /* Stored [in, out]: row r of T is column r. */
    for (size_t c = 0; c < l->cols; c++)
        for (size_t r = 0; r < n; r += TVM_BLOCK) {
            const size_t part = n - r < TVM_BLOCK ? n - r : TVM_BLOCK;
            tvm_layer_delta(l, (uint64_t)c * l->rows + row + r, part, some);
            for (size_t i = 0; i < part; i++)
                dst[(r + i) * l->cols + c] = some[i];
        }
}

/* Of element i as it is stored. */
static float pruned_at(const struct tvm_layer *l, const float *t, uint64_t i)
{
    if (!l->t->in_first)
        return t[i];
    return t[(size_t)(i % l->rows) * l->cols + (size_t)(i / l->rows)];
}

void tvm_layer_words(const struct tvm_layer *l, const float *t, uint64_t *words)
{
    for (uint64_t i = 0; i < l->t->n_elems; i++)
        if (pruned_at(l, t, i) != 0.0f)
            words[i / 64] |= (uint64_t)1 << (i % 64);
}

void tvm_layer_values(const struct tvm_layer *l, const float *t,
                      const uint64_t *words, float *values, uint64_t *before)
{
    uint64_t at = 0;

    for (uint64_t from = 0; from < l->t->n_elems; from += TV_DELTA_BLOCK) {
        const uint64_t left = l->t->n_elems - from;
        const size_t n = left < TV_DELTA_BLOCK ? (size_t)left : TV_DELTA_BLOCK;
        const float *b = tvm_reader_block(&l->base, l->k, from, n, l->block,
                                          l->l_scratch, NULL);
        before[from / TV_DELTA_BLOCK] = at;
        for (size_t i = 0; i < n; i++)
            if (words[(from + i) / 64] >> ((from + i) % 64) & 1u)
                values[at++] = b[i] + pruned_at(l, t, from + i);
    }
    before[(l->t->n_elems + TV_DELTA_BLOCK - 1) / TV_DELTA_BLOCK] = at;
}

enum tv_err tvm_layer_open(struct tvm_layer *l, const struct tvm_plan *p,
                           const struct tvm_tensor *t, size_t source,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const bool verify = p->options.verify_reads;
    size_t floats = tvm_source_l_floats(t, source);

    *l = (struct tvm_layer){.p = p, .t = t};
    l->k = p->options.kernels ? p->options.kernels : tvk_table_best();
    if (tvm_source_l_floats(t, (size_t)t->base) > floats)
        floats = tvm_source_l_floats(t, (size_t)t->base);
    tvm_layer_shape(t, &l->rows, &l->cols);
    l->block = tv_alloc_aligned((2 * TVM_BLOCK + floats + 16) * sizeof(float));
    if (!l->block)
        return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", t->name);
    l->l_scratch = l->block + 2 * TVM_BLOCK;
    TV_TRY(tvm_reader_open(&l->base, p, t, (size_t)t->base, l->k, verify, err));
    TV_TRY(tvm_reader_open(&l->donor, p, t, source, l->k, verify, err));
out:
    return rc;
}

void tvm_layer_close(struct tvm_layer *l)
{
    tvm_reader_close(&l->donor);
    tvm_reader_close(&l->base);
    tv_free(l->block);
}

enum tv_err tvm_layer_model(const struct tvm_plan *p, size_t input,
                            uint64_t memory, struct tv_error *err,
                            tve_model **out)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan_input *in = &p->inputs[input];
    const char *tmp = getenv("TMPDIR");
    char *scratch = NULL;
    struct tve_model_adapter *adapters = NULL;
    struct tve_model_options opt = {
        .n_threads = p->options.threads,
        .memory_bytes = memory,
        .kernels = p->options.kernels,
        .cuda = p->options.cuda,
        .scratch_dir = tmp && *tmp ? tmp : NULL,
        .skip_verify = !p->options.verify_reads,
    };

    *out = NULL;
    adapters = tv_calloc(in->n_adapters + 1, sizeof *adapters);
    if (p->options.out_dir && !p->options.into)
        scratch = tv_asprintf("%s/.tvmerge", p->options.out_dir);
    if (!adapters) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (scratch && tv_path_is_dir(scratch))
        opt.scratch_dir = scratch;
    for (size_t i = 0; i < in->n_adapters; i++)
        adapters[i] =
            (struct tve_model_adapter){in->adapters[i], in->adapter_weights[i]};
    rc = tve_model_open(in->input, adapters, in->n_adapters, &opt, err, out);
    if (rc != TV_OK)
        tv_error_context(err, "calibration of '%s'", in->ref);
out:
    tv_free(scratch);
    tv_free(adapters);
    return rc;
}
