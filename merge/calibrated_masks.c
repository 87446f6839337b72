/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibrated_masks.c - one entry made from the statistics of a layer's inputs:
 * a mask by pruning, with values where errors are corrected; a mask of a table
 * by how often its tokens occur; or X^T X as it is. It goes into the store, and
 * what finds no room there into the scratch file.
 */
#include "calibrated_entries.h"

#include <string.h>

#include "gather.h"
#include "room.h"
#include "tv/alloc.h"

static enum tv_err put_part(struct tvm_calibrated *c, const void *data,
                            uint64_t n, tv_hasher *h, uint64_t *at,
                            struct tv_error *err)
{
    tv_hasher_add(h, data, (size_t)n);
    return calibrated_put(c, data, n, at, err);
}

static enum tv_err keep(struct calibrated_work *w, struct calibrated_entry *e,
                        const uint64_t *words, uint64_t n_words,
                        const float *values, const uint64_t *before,
                        uint64_t n_blocks, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_hasher *h = NULL;

    e->made = true;
    w->news = true;
    w->use->n_made++;
    if (!w->sink->busy &&
        tvm_cache_add(w->cache, e->tensor, e->source, words, values, before,
                      e->damped.tensor ? &e->damped : NULL,
                      tvm_room_left(w->p, w->sink->done)))
        goto out;
    TV_TRY(calibrated_open(w->c, w->p, err));
    TV_TRY(tv_hasher_open(err, &h));
    e->at.entry = (size_t)(e - w->c->entries);
    TV_TRY(put_part(w->c, words, n_words * sizeof *words, h, &e->at.words_at,
                    err));
    if (values) {
        e->at.n_values = before[n_blocks];
        TV_TRY(put_part(w->c, before, (n_blocks + 1) * sizeof *before, h,
                        &e->at.before_at, err));
        TV_TRY(put_part(w->c, values, before[n_blocks] * sizeof *values, h,
                        &e->at.values_at, err));
        e->has_values = true;
    }
    e->at.checksum = tv_hasher_value(h);
    e->in_scratch = true;
out:
    tv_hasher_close(h);
    return rc;
}

static void note(const struct calibrated_work *w, struct calibrated_entry *e,
                 const struct tvm_pruned *got)
{
    if (!tvm_rule_needs_gram(&e->rule))
        return;
    if (got->uncorrected || got->n_raised > 0) {
        e->damped =
            (struct tvm_damped){.damping = got->uncorrected ? 0 : got->damping,
                                .n_raised = got->n_raised,
                                .n_unseen = got->n_unseen};
        calibrated_name_damped(w->p, e);
    }
}

/* ---- tables -------------------------------------------------------------- */

static void read_table(void *arg, uint64_t start, size_t n, float *dst)
{
    tvm_layer_delta(arg, start, n, dst);
}

/* How often the token of each row occurs, where rows are gathered from the
 * model's own and others; NULL: no memory. */
static double *gathered_counts(const struct tvm_source *s,
                               const struct tvm_stats *stats, size_t n_rows)
{
    double *counts = tv_calloc(n_rows + 1, sizeof *counts);
    const struct tvm_rows *rows = s->gather->rows;

    for (size_t i = 0; counts && i < rows->n_runs; i++) {
        const struct tvm_run *r = &rows->runs[i];
        for (uint64_t k = 0; r->kind == TVM_RUN_ROWS && k < r->n; k++)
            if (s->gather->from[r->from].input == s->input &&
                r->row + k < stats->n && r->first + k < n_rows)
                counts[r->first + k] = stats->diag[r->row + k];
    }
    return counts;
}

static enum tv_err verify(const struct tvm_source *s,
                          const struct tvm_reader *r, struct tv_error *err)
{
    return s->gather ? tvm_gather_verify(r, 0, 1, err)
                     : tvm_reader_verify(r, 0, r->view.bytes, err);
}

static enum tv_err make_by_counts(struct calibrated_work *w,
                                  struct calibrated_entry *e,
                                  const struct tvm_stats *stats,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_tensor *t = &w->p->tensors[e->tensor];
    const uint64_t n_words = (t->n_elems + 63) / 64;
    const struct tvm_source *s =
        &t->sources[e->rule.inputs == TVM_INPUTS_BASE ? (size_t)t->base
                                                      : e->source];
    struct tvm_stats of = {.n = stats->n, .diag = stats->diag};
    struct tvm_layer l;
    struct tvm_pruned got;
    double *counts = NULL;
    uint64_t *words = NULL;
    float *block = NULL;

    TV_TRY(tvm_layer_open(&l, w->p, t, e->source, err));
    words = tv_calloc((size_t)n_words, sizeof *words);
    block = tv_alloc(TVM_BLOCK * sizeof *block);
    if (s->gather) {
        counts = gathered_counts(s, stats, l.cols);
        of = (struct tvm_stats){.n = l.cols, .diag = counts};
    }
    if (!words || !block || !of.diag) {
        rc = tv_error_set(err, TV_E_NOMEM, "%s: out of memory", t->name);
        goto out;
    }
    if (of.n != l.cols) {
        rc = tv_error_set(err, TV_E_INTERNAL,
                          "%s: counts of %zu tokens for %zu rows", t->name,
                          of.n, l.cols);
        goto out;
    }
    if (w->p->options.verify_reads) {
        TV_TRY(verify(&t->sources[t->base], &l.base, err));
        TV_TRY(verify(&t->sources[e->source], &l.donor, err));
    }
    const struct tvm_prune_table table = {read_table, &l, block, TVM_BLOCK};
    TV_TRY(tvm_prune_by_counts(&e->rule, t->n_elems, l.rows, &of, &table, words,
                               &got, err));
    rc = keep(w, e, words, n_words, NULL, NULL, 0, err);
out:
    if (rc != TV_OK)
        tv_error_context(err, "calibration");
    tv_free(counts);
    tv_free(block);
    tv_free(words);
    tvm_layer_close(&l);
    return rc;
}

/* ---- layers -------------------------------------------------------------- */

static enum tv_err make(struct calibrated_work *w, struct calibrated_entry *e,
                        const struct tvm_stats *stats, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_tensor *t = &w->p->tensors[e->tensor];
    const uint64_t n_words = (t->n_elems + 63) / 64;
    const uint64_t n_blocks =
        (t->n_elems + TV_DELTA_BLOCK - 1) / TV_DELTA_BLOCK;
    struct tvm_layer l;
    struct tvm_pruned got;
    float *delta = NULL;
    float *values = NULL;
    uint64_t *words = NULL;
    uint64_t *before = NULL;

    TV_TRY(tvm_layer_open(&l, w->p, t, e->source, err));
    if (stats->n != l.cols) {
        rc = tv_error_set(err, TV_E_INTERNAL,
                          "%s: statistics of %zu inputs for %zu columns",
                          t->name, stats->n, l.cols);
        goto out;
    }
    delta = tv_alloc_aligned((size_t)t->n_elems * sizeof *delta);
    words = tv_calloc((size_t)n_words, sizeof *words);
    if (!delta || !words)
        goto no_memory;
    if (w->p->options.verify_reads) {
        TV_TRY(tvm_reader_verify(&l.base, 0, l.base.view.bytes, err));
        TV_TRY(tvm_reader_verify(&l.donor, 0, l.donor.view.bytes, err));
    }
    const struct tvm_prune_again again = {tvm_layer_rows, &l};
    tvm_layer_rows(&l, 0, l.rows, delta);
    TV_TRY(
        tvm_prune(&e->rule, delta, l.rows, l.cols, stats, &again, &got, err));
    note(w, e, &got);
    tvm_layer_words(&l, delta, words);
    if (tvm_rule_makes_values(&e->rule)) {
        values = tv_alloc((size_t)(got.n_kept + 1) * sizeof *values);
        before = tv_calloc((size_t)n_blocks + 1, sizeof *before);
        if (!values || !before)
            goto no_memory;
        tvm_layer_values(&l, delta, words, values, before);
    }
    TV_TRY(keep(w, e, words, n_words, values, before, n_blocks, err));
    goto out;
no_memory:
    rc = tv_error_set(err, TV_E_NOMEM, "%s: out of memory", t->name);
out:
    if (rc != TV_OK)
        tv_error_context(err, "calibration");
    tv_free(before);
    tv_free(values);
    tv_free(words);
    tv_free(delta);
    tvm_layer_close(&l);
    return rc;
}

bool calibrated_wants(const struct calibrated_work *w,
                      const struct calibrated_entry *e)
{
    /* A diagonal by itself is fp64, that of a Gram matrix fp32. */
    return !e->made && e->model == w->model && e->owner == w->owner &&
           (e->rule.counts || tvm_rule_needs_gram(&e->rule) == w->gram) &&
           (e->rule.inputs == TVM_INPUTS_MERGED) == w->merged;
}

const char *calibrated_weight(const struct calibrated_work *w,
                              const struct calibrated_entry *e)
{
    const struct tvm_tensor *t = &w->p->tensors[e->tensor];
    const size_t s =
        e->rule.inputs == TVM_INPUTS_BASE ? (size_t)t->base : e->source;
    return t->sources[s].tensor->name;
}

/* Those that take X^T X as it is. One copy for all of them. */
static enum tv_err keep_gram(struct calibrated_work *w,
                             const struct tvm_stats *stats,
                             const char *const *tensors, size_t n_tensors,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    uint64_t at = UINT64_MAX;
    tv_hasher *h = NULL;
    struct tv_hash sum = {0, 0};

    for (size_t i = 0; i < n_tensors; i++)
        for (size_t k = 0; k < w->c->n; k++) {
            struct calibrated_entry *e = &w->c->entries[k];
            size_t rows = 0;
            size_t cols = 0;
            if (!calibrated_wants(w, e) || !e->rule.gram_only ||
                strcmp(calibrated_weight(w, e), tensors[i]) != 0)
                continue;
            tvm_layer_shape(&w->p->tensors[e->tensor], &rows, &cols);
            if (stats->n != cols) {
                rc = tv_error_set(err, TV_E_INTERNAL,
                                  "%s: statistics of %zu inputs for %zu "
                                  "columns",
                                  tensors[i], stats->n, cols);
                goto out;
            }
            if (at == UINT64_MAX) {
                TV_TRY(calibrated_open(w->c, w->p, err));
                TV_TRY(tv_hasher_open(err, &h));
                TV_TRY(put_part(w->c, stats->gram,
                                (uint64_t)cols * (cols + 1) / 2 * sizeof(float),
                                h, &at, err));
                sum = tv_hasher_value(h);
            }
            e->at = (struct tvm_kept_mask){.entry = k,
                                           .words_at = at,
                                           .n_rows = w->n_rows,
                                           .checksum = sum};
            e->made = true;
            e->in_scratch = true;
            w->news = true;
        }
out:
    tv_hasher_close(h);
    return rc;
}

enum tv_err calibrated_see(struct calibrated_work *w,
                           const struct tvm_stats *stats,
                           const char *const *tensors, size_t n_tensors,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    if (w->gram)
        TV_TRY(keep_gram(w, stats, tensors, n_tensors, err));
    for (size_t i = 0; i < n_tensors; i++)
        for (size_t k = 0; k < w->c->n; k++) {
            struct calibrated_entry *e = &w->c->entries[k];
            if (calibrated_wants(w, e) &&
                strcmp(calibrated_weight(w, e), tensors[i]) == 0)
                TV_TRY(e->rule.counts ? make_by_counts(w, e, stats, err)
                                      : make(w, e, stats, err));
        }
    rc = calibrated_tell(w, false, err);
out:
    return rc;
}
