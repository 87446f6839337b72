/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibrated.c - see calibrated.h.
 *
 *   plan entries (tensor, source) with a calibrated rule
 *     - in the sink or the store already: nothing to do
 *     - else grouped by (model that runs, whose text, kind of statistics): one
 *       pass of the model over the windows; per input of linear layers, every
 *       entry that has it:
 *
 *         statistics + T -> prune -> mask words [+ values] -> store or scratch
 *
 * Memory: one layer's task vector and statistics; the model gets what the
 * budget leaves.
 */
#include "calibrated.h"

#include "calibrated_entries.h"
#include "tv/alloc.h"
#include "tv/sys.h"

/* ---- entries ------------------------------------------------------------- */

static enum tv_err collect(struct tvm_calibrated *c, const struct tvm_plan *p,
                           struct tvm_cache *cache,
                           struct tvm_calibration_use *use,
                           struct tv_error *err)
{
    size_t n = 0;
    struct tvm_trim_rule r;

    for (size_t i = 0; i < p->n_tensors; i++)
        for (size_t s = 0; s < p->tensors[i].n_sources; s++)
            n += tvm_calibrated_rule(&p->tensors[i], s, &r);
    c->entries = tv_calloc(n + 1, sizeof *c->entries);
    c->first = tv_calloc(p->n_tensors + 1, sizeof *c->first);
    if (!c->entries || !c->first)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *t = &p->tensors[i];
        c->first[i] = c->n;
        for (size_t s = 0; s < t->n_sources; s++) {
            struct calibrated_entry *e = &c->entries[c->n];
            if (!tvm_calibrated_rule(t, s, &e->rule))
                continue;
            e->tensor = i;
            e->source = s;
            e->owner = tvm_calibration_owner(p, t, s, &e->rule, &e->model);
            e->made = !e->rule.gram_only && tvm_cache_has(cache, i, s);
            use->n_found += e->made;
            if (e->made && tvm_cache_damped(cache, i, s, &e->damped))
                calibrated_name_damped(p, e);
            c->n++;
        }
    }
    c->first[p->n_tensors] = c->n;
    return TV_OK;
}

/* What is left to do, behind what store and journal have. */
static void mark(struct tvm_calibrated *c, const struct tvm_plan *p,
                 const struct tvm_sink *sink)
{
    const bool walks = tvm_calibrated_walks(p);

    for (size_t i = 0; i < c->n; i++) {
        struct calibrated_entry *e = &c->entries[i];
        const bool done = e->made || sink->done[e->tensor].done;
        e->lacking = !done && e->rule.inputs == TVM_INPUTS_MERGED;
        /* Those of finished tensors too: blocks are merged once more for the
         * ones behind them. */
        if (!walks)
            e->made = done;
    }
}

/* ---- what an interrupted run has made ------------------------------------ */

static void count_damped(const struct tvm_calibrated *c,
                         struct tvm_calibration_use *use)
{
    for (size_t i = 0; i < c->n; i++) {
        const struct tvm_damped *d = &c->entries[i].damped;
        if (!d->tensor)
            continue;
        use->n_damped += d->damping > 0;
        use->n_uncorrected += !(d->damping > 0);
        if (d->damping > use->most_damping)
            use->most_damping = d->damping;
    }
}

/* ---- all ----------------------------------------------------------------- */

void tvm_calibrated_free(struct tvm_calibrated *c)
{
    if (!c)
        return;
    calibrated_unmap(c);
    if (c->fd >= 0)
        (void)tv_sys()->close(c->fd);
    tv_free(c->entries);
    tv_free(c->first);
    tv_free(c);
}

enum tv_err tvm_calibrated_make(const struct tvm_plan *p, struct tvm_sink *sink,
                                struct tvm_cache *cache,
                                const struct tvm_run_hooks *hooks,
                                struct tvm_calibration_use *use,
                                struct tv_error *err,
                                struct tvm_calibrated **out)
{
    enum tv_err rc = TV_OK;
    struct tvm_calibrated *c = NULL;
    uint64_t needed = 0;
    uint64_t disk = 0;
    const double t0 = calibrated_now();
    struct calibrated_work w = {
        .p = p, .cache = cache, .sink = sink, .hooks = hooks, .use = use};

    *out = NULL;
    if (!tvm_calibrated_wanted(p, &needed, &disk))
        return TV_OK;
    c = tv_calloc(1, sizeof *c);
    if (!c)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    c->fd = -1;
    w.c = c;
    TV_TRY(collect(c, p, cache, use, err));
    TV_TRY(calibrated_take_over(c, p, sink, use, err));
    mark(c, p, sink);
    /* Before the first second is over, for those who ask how far it is. */
    TV_TRY(calibrated_tell(&w, true, err));
    /* Tables go with the layers of their model; those that are left, after. */
    for (size_t i = 0; i < 2 * c->n; i++) {
        const struct calibrated_entry *e = &c->entries[i % c->n];
        if (e->made || e->rule.inputs == TVM_INPUTS_MERGED ||
            (e->rule.counts && i < c->n))
            continue;
        w.model = e->model;
        w.owner = e->owner;
        w.gram = tvm_rule_needs_gram(&e->rule);
        TV_TRY(calibrated_run_group(&w, err));
    }
    /* What these have made is part of merged blocks, where both occur. */
    TV_TRY(calibrated_map(c, err));
    TV_TRY(calibrated_run_merged(&w, err));
    TV_TRY(calibrated_map(c, err));
    TV_TRY(calibrated_tell(&w, true, err));
    count_damped(c, use);
    use->seconds = calibrated_now() - t0;
    *out = c;
    c = NULL;
out:
    /* Stopped or failed: the run that goes on has what there is. */
    if (c && w.news && calibrated_tell(&w, true, NULL) != TV_OK)
        w.news = false;
    tvm_calibrated_free(c);
    return rc;
}

enum tv_err tvm_calibrated_attach(const struct tvm_calibrated *c,
                                  const struct tvm_plan *p, size_t tensor,
                                  struct tvm_cached *to, struct tv_error *err)
{
    const struct tvm_tensor *t = &p->tensors[tensor];

    if (!c || c->first[tensor] == c->first[tensor + 1] ||
        c->entries[c->first[tensor]].rule.gram_only)
        return TV_OK;
    if (to->n == 0) {
        to->src = tv_calloc(t->n_sources, sizeof *to->src);
        to->trim = tv_calloc(t->n_sources, sizeof *to->trim);
        to->n = t->n_sources;
        if (!to->src || !to->trim)
            return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", t->name);
    }
    for (size_t i = c->first[tensor]; i < c->first[tensor + 1]; i++) {
        const struct calibrated_entry *e = &c->entries[i];
        struct tvm_cached_source *s = &to->src[e->source];
        if (e->in_scratch) {
            const unsigned char *m = c->map;
            s->fixed_words = (const void *)(m + e->at.words_at);
            if (e->has_values) {
                s->fixed_before = (const void *)(m + e->at.before_at);
                s->fixed_values = (const void *)(m + e->at.values_at);
            }
            to->trim[e->source] = (struct tvm_trim){.known = true};
        }
        if (!to->trim[e->source].known)
            return tv_error_set(err, TV_E_INTERNAL,
                                "%s: the mask that was made is gone from the "
                                "store; run again",
                                t->name);
    }
    return TV_OK;
}

const float *tvm_calibrated_gram(const struct tvm_calibrated *c, size_t tensor,
                                 size_t source, uint64_t *n_rows)
{
    *n_rows = 0;
    for (size_t i = c ? c->first[tensor] : 0; c && i < c->first[tensor + 1];
         i++) {
        const struct calibrated_entry *e = &c->entries[i];
        if (e->source != source || !e->rule.gram_only || !e->in_scratch)
            continue;
        *n_rows = e->at.n_rows;
        return (const float *)(const void *)(c->map + e->at.words_at);
    }
    return NULL;
}
