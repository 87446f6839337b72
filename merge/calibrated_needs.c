/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibrated_needs.c - what planning asks of calibrated masks: whose text and
 * which model they come from, what they depend on, the memory and disk that
 * making them takes. Reads no weights.
 */
#include "calibrated_entries.h"

#include "sequential.h"
#include "tv/alloc.h"
#include "tv/cuda_math.h"
#include "tv/linalg.h"
#include "tv/split_gemm.h"

size_t tvm_calibration_owner(const struct tvm_plan *p,
                             const struct tvm_tensor *t, size_t source,
                             const struct tvm_trim_rule *r, size_t *model)
{
    const size_t own = t->sources[source].input;
    const size_t base = t->sources[t->base].input;

    *model = r->inputs == TVM_INPUTS_BASE ? base : own;
    if (p->inputs[own].calibration)
        return own;
    if (r->inputs == TVM_INPUTS_BASE && p->inputs[base].calibration)
        return base;
    return p->n_inputs;
}

bool tvm_calibrated_random(const struct tvm_plan *p, const struct tvm_tensor *t,
                           size_t source, const struct tvm_trim_rule *r)
{
    size_t model = 0;
    const size_t owner = tvm_calibration_owner(p, t, source, r, &model);

    return owner < p->n_inputs && p->inputs[owner].calibration->random;
}

enum tv_err tvm_calibrated_key(const struct tvm_plan *p,
                               const struct tvm_tensor *t, size_t source,
                               const struct tvm_trim_rule *r, struct tv_buf *to,
                               struct tv_error *err)
{
    size_t model = 0;
    const size_t owner = tvm_calibration_owner(p, t, source, r, &model);

    if (owner >= p->n_inputs)
        return tv_error_set(err, TV_E_INTERNAL, "%s: no calibration text",
                            t->name);
    tv_buf_le64(to, p->inputs[model].fingerprint.lo);
    tv_buf_le64(to, p->inputs[model].fingerprint.hi);
    tv_buf_le64(to, p->inputs[owner].calibration_hash.lo);
    tv_buf_le64(to, p->inputs[owner].calibration_hash.hi);
    tv_buf_str(to, tva_linalg_core());
    const char *const products =
        p->options.cuda ? NULL : tvk_split_core_of(p->options.kernels);
    if (products)
        tv_buf_str(to, products);
    /* All that the merged blocks in front can depend on, and more. */
    if (r->inputs == TVM_INPUTS_MERGED) {
        tv_buf_str(to, "merged");
        tv_buf_le64(to, p->weights_hash.lo);
        tv_buf_le64(to, p->weights_hash.hi);
    }
    if (p->options.cuda) {
        char core[128];
        size_t rows = 0;
        size_t cols = 0;
        tv_buf_str(to, tvk_cuda_math_core(p->options.cuda, core, sizeof core));
        tvm_layer_shape(t, &rows, &cols);
        if (tvm_rule_needs_gram(r) &&
            !tvk_cuda_layer_factors(p->options.cuda, rows, cols))
            tv_buf_str(to, "factor by the CPU");
    }
    return TV_OK;
}

bool tvm_calibrated_walks(const struct tvm_plan *p)
{
    struct tvm_trim_rule r;

    for (size_t i = 0; i < p->n_tensors; i++)
        for (size_t s = 0; s < p->tensors[i].n_sources; s++)
            if (tvm_calibrated_rule(&p->tensors[i], s, &r) &&
                r.inputs == TVM_INPUTS_MERGED)
                return true;
    return false;
}

/* ---- memory and disk ----------------------------------------------------- */

static uint64_t kept_most(const struct tvm_trim_rule *r, uint64_t n)
{
    const double kept = r->density * (double)n + 65536.0;
    return kept < (double)n ? (uint64_t)kept : n;
}

uint64_t calibrated_entry_bytes(const struct tvm_plan *p,
                                const struct tvm_tensor *t,
                                const struct tvm_trim_rule *r)
{
    size_t rows = 0;
    size_t cols = 0;

    if (r->gram_only)
        return 0;
    tvm_layer_shape(t, &rows, &cols);
    /* A table is never in memory as a whole. */
    uint64_t bytes =
        (r->counts ? cols * sizeof(double) : t->n_elems * sizeof(float)) +
        t->n_elems / 8 + tvm_prune_bytes(r, rows, cols, p->options.cuda) +
        2 * TVM_BLOCK * sizeof(float);
    if (tvm_rule_makes_values(r))
        bytes += kept_most(r, t->n_elems) * sizeof(float) +
                 (t->n_elems / TV_DELTA_BLOCK + 2) * sizeof(uint64_t);
    for (size_t s = 0; s < t->n_sources; s++)
        bytes +=
            tvm_source_bytes(t, s) + tvm_source_l_floats(t, s) * sizeof(float);
    return bytes;
}

static uint64_t stat_bytes(const struct tvm_tensor *t,
                           const struct tvm_trim_rule *r)
{
    size_t rows = 0;
    size_t cols = 0;

    tvm_layer_shape(t, &rows, &cols);
    return tvm_rule_needs_gram(r) ? (uint64_t)cols * (cols + 1) / 2 * 12
                                  : cols * sizeof(double);
}

bool tvm_calibrated_wanted(const struct tvm_plan *p, uint64_t *needed,
                           uint64_t *disk)
{
    bool any = false;
    uint64_t most_entry = 0;
    uint64_t most_stat = 0;

    *disk = 0;
    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *t = &p->tensors[i];
        struct tvm_trim_rule r;
        for (size_t s = 0; s < t->n_sources; s++) {
            if (!tvm_calibrated_rule(t, s, &r))
                continue;
            any = true;
            if (calibrated_entry_bytes(p, t, &r) > most_entry)
                most_entry = calibrated_entry_bytes(p, t, &r);
            if (stat_bytes(t, &r) > most_stat)
                most_stat = stat_bytes(t, &r);
            if (r.gram_only) {
                /* Layers that share their inputs share this. */
                *disk += stat_bytes(t, &r) / 3 + CALIBRATED_ALIGN;
                continue;
            }
            *disk += t->n_elems / 8 + CALIBRATED_ALIGN;
            if (tvm_rule_makes_values(&r))
                *disk += kept_most(&r, t->n_elems) * sizeof(float) +
                         t->n_elems / 64 + 2 * CALIBRATED_ALIGN;
        }
    }
    *needed = most_entry + most_stat + TVM_MODEL_LEAST;
    if (any && tvm_calibrated_walks(p))
        *disk += tvm_sequential_disk(p);
    return any;
}

/* Models that run over a text: one after the other, or all of those that walk
 * through merged blocks together. */
struct pass {
    size_t model, owner;
    bool gram, merged;
    uint64_t entry; /* bytes of the largest */
};

static void add_pass(struct pass *all, size_t *n, const struct pass *one)
{
    size_t i = 0;

    while (i < *n && !(all[i].model == one->model && all[i].gram == one->gram &&
                       all[i].merged == one->merged &&
                       (one->merged || all[i].owner == one->owner)))
        i++;
    if (i == *n) {
        all[(*n)++] = *one;
        return;
    }
    if (one->entry > all[i].entry)
        all[i].entry = one->entry;
}

enum tv_err tvm_calibrated_scratch(const struct tvm_plan *p, uint64_t *bytes,
                                   uint64_t *heap, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct pass *all = NULL;
    struct tvm_sequential_text *texts = NULL;
    size_t n = 0;
    size_t n_texts = 0;
    uint64_t reserve = 0;
    uint64_t together = 0;
    struct tvm_trim_rule r;

    *bytes = *heap = 0;
    for (size_t i = 0; i < p->n_tensors; i++)
        n += p->tensors[i].n_sources;
    all = tv_calloc(n + 1, sizeof *all);
    texts = tv_calloc(n + 1, sizeof *texts);
    if (!all || !texts) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    n = 0;
    for (size_t i = 0; i < p->n_tensors; i++)
        for (size_t s = 0; s < p->tensors[i].n_sources; s++) {
            const struct tvm_tensor *t = &p->tensors[i];
            if (!tvm_calibrated_rule(t, s, &r))
                continue;
            struct pass one = {.gram = tvm_rule_needs_gram(&r),
                               .merged = r.inputs == TVM_INPUTS_MERGED,
                               .entry = calibrated_entry_bytes(p, t, &r)};
            one.owner = tvm_calibration_owner(p, t, s, &r, &one.model);
            if (one.owner < p->n_inputs)
                add_pass(all, &n, &one);
        }
    for (size_t i = 0; i < n; i++) {
        const uint64_t memory = p->options.memory_bytes;
        struct tve_scratch x;
        if (all[i].merged) {
            texts[n_texts++] =
                (struct tvm_sequential_text){all[i].model, all[i].gram};
            reserve = all[i].entry > reserve ? all[i].entry : reserve;
            continue;
        }
        TV_TRY(tvm_layer_scratch(
            p, all[i].model, p->inputs[all[i].owner].calibration, all[i].gram,
            memory > all[i].entry ? memory - all[i].entry : 1, NULL, err, &x));
        if (x.streams + x.batch > *bytes)
            *bytes = x.streams + x.batch;
        if (x.heap + all[i].entry > *heap)
            *heap = x.heap + all[i].entry;
    }
    TV_TRY(tvm_sequential_scratch(p, texts, n_texts, reserve, &together, err));
    *bytes = together > *bytes ? together : *bytes;
    /* Models that walk together share what there is. */
    if (n_texts > 0 || *heap > p->options.memory_bytes)
        *heap = p->options.memory_bytes;
out:
    tv_free(texts);
    tv_free(all);
    return rc;
}

enum tv_err tvm_calibrated_check(const struct tvm_plan *p, size_t input,
                                 const struct tvm_trim_rule *r,
                                 struct tv_error *err)
{
    if (r->inputs == TVM_INPUTS_MERGED)
        return tvm_sequential_check(p, input, err);
    tve_model *m = NULL;
    const enum tv_err rc = tvm_layer_model(p, input, TVM_MODEL_LEAST, err, &m);

    tve_model_close(m);
    return rc;
}
