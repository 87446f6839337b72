/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibrated_run.c - a model runs over its text, and every entry of the group
 * is made while the statistics of its layer's inputs are in memory: one model
 * alone, or all that walk through merged blocks together (sequential.h).
 */
#include "calibrated_entries.h"

#include <string.h>

#include "room.h"
#include "sequential.h"
#include "tv/alloc.h"

static enum tv_err on_input(void *arg, const struct tve_stat_input *in,
                            struct tv_error *err)
{
    struct calibrated_work *const w = arg;
    const struct tvm_stats stats = {.n = in->n,
                                    .diag = in->sums,
                                    .gram = in->gram,
                                    .cuda = w->p->options.cuda};

    w->n_rows = in->n_rows;
    return calibrated_see(w, &stats, in->tensors, in->n_tensors, err);
}

static void on_step(void *arg, uint64_t done, uint64_t total)
{
    const struct calibrated_work *const w = arg;

    if (w->hooks && w->hooks->calibrating)
        w->hooks->calibrating(w->hooks->arg, w->ref, done, total);
}

/* Inputs that entries of the group need. */
static enum tv_err mark_wanted(const struct calibrated_work *w,
                               const tve_calibration *c, bool **out,
                               struct tv_error *err)
{
    const size_t n = tve_calibration_count(c);
    bool *want = tv_calloc(n + 1, sizeof *want);

    *out = want;
    if (!want)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t i = 0; i < w->c->n; i++) {
        const struct calibrated_entry *e = &w->c->entries[i];
        if (!calibrated_wants(w, e))
            continue;
        const size_t at = tve_calibration_find(c, calibrated_weight(w, e));
        if (at == n)
            return tv_error_set(
                err, TV_E_UNSUPPORTED,
                "%s: running '%s' does not show the inputs of this tensor",
                w->p->tensors[e->tensor].name, w->ref);
        want[at] = true;
    }
    return TV_OK;
}

/* Bytes for the layer that takes most, beside the model. */
static uint64_t most_bytes(const struct calibrated_work *w)
{
    uint64_t most = 0;

    for (size_t i = 0; i < w->c->n; i++) {
        const struct calibrated_entry *e = &w->c->entries[i];
        if (!calibrated_wants(w, e))
            continue;
        const uint64_t bytes =
            calibrated_entry_bytes(w->p, &w->p->tensors[e->tensor], &e->rule);
        most = bytes > most ? bytes : most;
    }
    return most;
}

static enum tv_err too_little(const struct tvm_plan *p, uint64_t needed,
                              struct tv_error *err)
{
    return tv_error_set(err, TV_E_BUDGET,
                        "calibration needs %llu bytes of memory, --memory "
                        "allows %llu",
                        (unsigned long long)needed,
                        (unsigned long long)p->options.memory_bytes);
}

enum tv_err calibrated_run_group(struct calibrated_work *w,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = w->p;
    const uint64_t most = most_bytes(w);
    struct tve_samples samples = {.n = 0};
    struct tve_calibration_use use = {.n_found = 0};
    struct tve_calibration_options opt = {.store = p->options.store};
    tve_calibration *c = NULL;
    tve_model *m = NULL;
    bool *want = NULL;

    if (p->options.no_cache)
        opt.store = NULL;
    w->ref = p->inputs[w->model].ref;
    if (most + TVM_MODEL_LEAST > p->options.memory_bytes) {
        rc = too_little(p, most + TVM_MODEL_LEAST, err);
        goto out;
    }
    opt.kind = w->gram ? TVE_STAT_GRAM : TVE_STAT_DIAG;
    if (p->options.keep_statistics && !w->sink->busy &&
        tvm_cache_hold(w->cache, true)) {
        opt.keep = TVE_KEEP_IF_ROOM;
        opt.keep_free = tvm_room_left(p, w->sink->done);
    }
    TV_TRY(
        tvm_layer_model(p, w->model, p->options.memory_bytes - most, err, &m));
    TV_TRY(tvm_layer_samples(p, w->model, m, p->inputs[w->owner].calibration,
                             &samples, err));
    TV_TRY(tve_calibration_open(m, &samples, &opt, err, &c));
    TV_TRY(mark_wanted(w, c, &want, err));
    const struct tve_progress progress = {on_step, w,
                                          w->hooks ? w->hooks->cancel : NULL};
    TV_TRY(tve_calibration_run(c, want, &progress, on_input, w, &use, err));
    w->use->n_statistics_found += use.n_found;
    w->use->n_statistics_kept += use.n_kept;
    /* Tokens are counted without running anything. */
    const bool ran = use.n_computed > (want[0] ? 1u : 0u);
    w->use->n_models += ran;
    w->use->n_tokens += ran ? samples.n_tokens : 0;
    w->use->random = w->use->random || samples.random;
out:
    if (opt.keep != TVE_KEEP_NOT)
        tvm_cache_hold(w->cache, false);
    tv_free(want);
    tve_calibration_close(c);
    tve_samples_free(&samples);
    tve_model_close(m);
    return rc;
}

/* ---- behind merged blocks ------------------------------------------------ */

struct walk {
    struct calibrated_work *w;
    struct tvm_sequential_text *texts; /* [n_entries] at most */
};

static void choose_text(const struct walk *k, size_t text)
{
    k->w->model = k->texts[text].input;
    k->w->owner = k->texts[text].input;
    k->w->gram = k->texts[text].gram;
    k->w->ref = k->w->p->inputs[k->w->model].ref;
}

static bool any_entry(const struct walk *k, size_t text, const char *tensor,
                      bool lacking)
{
    const struct tvm_calibrated *c = k->w->c;

    choose_text(k, text);
    for (size_t i = 0; i < c->n; i++) {
        const struct calibrated_entry *e = &c->entries[i];
        if (calibrated_wants(k->w, e) && (e->lacking || !lacking) &&
            strcmp(calibrated_weight(k->w, e), tensor) == 0)
            return true;
    }
    return false;
}

static bool walk_wants(void *arg, size_t text, const char *tensor)
{
    return any_entry(arg, text, tensor, false);
}

static bool walk_lacks(void *arg, size_t text, const char *tensor)
{
    return any_entry(arg, text, tensor, true);
}

static enum tv_err walk_see(void *arg, size_t text,
                            const struct tve_stat_input *in,
                            struct tv_error *err)
{
    const struct walk *const k = arg;

    choose_text(k, text);
    return on_input(k->w, in, err);
}

static enum tv_err walk_ready(void *arg, struct tv_error *err)
{
    const struct walk *const k = arg;

    return calibrated_map(k->w->c, err);
}

/* Adds the text of an entry, if it is a new one. */
static void add_text(struct tvm_sequential *s,
                     struct tvm_sequential_text *texts,
                     const struct calibrated_entry *e)
{
    const bool gram = tvm_rule_needs_gram(&e->rule);

    for (size_t i = 0; i < s->n_texts; i++)
        if (texts[i].input == e->model && texts[i].gram == gram)
            return;
    texts[s->n_texts++] = (struct tvm_sequential_text){e->model, gram};
}

enum tv_err calibrated_run_merged(struct calibrated_work *w,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct walk k = {.w = w};
    struct tvm_sequential s = {.plan = w->p,
                               .cache = w->cache,
                               .calibrated = w->c,
                               .hooks = w->hooks,
                               .arg = &k,
                               .wants = walk_wants,
                               .lacks = walk_lacks,
                               .see = walk_see,
                               .ready = walk_ready};
    bool lacking = false;

    for (size_t i = 0; i < w->c->n; i++)
        lacking = lacking || w->c->entries[i].lacking;
    if (!lacking)
        return TV_OK;
    k.texts = tv_calloc(w->c->n + 1, sizeof *k.texts);
    if (!k.texts)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    w->merged = true;
    s.texts = k.texts;
    for (size_t i = 0; i < w->c->n; i++) {
        const struct calibrated_entry *e = &w->c->entries[i];
        if (e->rule.inputs != TVM_INPUTS_MERGED)
            continue;
        add_text(&s, k.texts, e);
        const uint64_t bytes =
            calibrated_entry_bytes(w->p, &w->p->tensors[e->tensor], &e->rule);
        s.reserve = bytes > s.reserve ? bytes : s.reserve;
    }
    if (s.reserve + TVM_MODEL_LEAST > w->p->options.memory_bytes) {
        rc = too_little(w->p, s.reserve + TVM_MODEL_LEAST, err);
        goto out;
    }
    TV_TRY(tvm_sequential_run(&s, err));
    w->use->n_models += s.n_texts;
    w->use->n_tokens += s.n_tokens;
    w->use->random = w->use->random || s.random;
out:
    w->merged = false;
    tv_free(k.texts);
    return rc;
}
