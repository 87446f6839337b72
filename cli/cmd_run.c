/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_run.c - tvmerge run: a merge, with its header, progress and summary.
 */
#include <inttypes.h>
#include <stdio.h>

#include "progress.h"
#include "signals.h"
#include "store_open.h"
#include "tv/alloc.h"
#include "tv/text.h"
#include "tvmerge.h"

static const char *target_of(const struct tvm_options *o)
{
    return o->into ? o->into : o->out_dir;
}

/* What will be done, before it is done. */
static void header(struct tvc *c, const struct tvm_plan *p)
{
    const struct tvm_options *o = &p->options;
    char a[32];
    char b[32];
    size_t copied = 0;
    for (size_t i = 0; i < p->n_tensors; i++)
        copied += p->tensors[i].action == TVM_COPY;
    tvc_say(&c->out, "%s of %zu input%s: %zu tensors (%zu copied) -> %s%s",
            p->method_name, p->n_inputs, p->n_inputs == 1 ? "" : "s",
            p->n_tensors, copied, o->into ? "store:" : "", target_of(o));
    tvc_say(&c->out, "reads %s, writes %s in %zu file%s",
            tv_format_bytes(p->bytes_read, a, sizeof a),
            tv_format_bytes(p->bytes_written, b, sizeof b),
            p->shards ? p->shards->n : 1,
            p->shards && p->shards->n != 1 ? "s" : "");
    tvc_say(&c->out, "needs %s of memory at most, %s on disk",
            tv_format_bytes(p->peak_scratch_bytes, a, sizeof a),
            tv_format_bytes(p->peak_disk_bytes, b, sizeof b));
    if (c->out.verbose > 0) {
        for (size_t i = 0; i < p->n_inputs; i++) {
            char hex[33];
            tvc_say(&c->out, "input %s (fingerprint %s)", p->inputs[i].ref,
                    tv_hash_hex(p->inputs[i].fingerprint, hex));
        }
        tvc_say(&c->out, "%u threads, %s kernels", o->threads,
                o->kernels->name);
    }
}

static bool reads_store(const struct tvm_plan *p)
{
    for (size_t i = 0; i < p->n_inputs; i++) {
        const struct tvm_plan_input *in = &p->inputs[i];
        bool yes = tv_input_is_store(in->input);
        for (size_t a = 0; a < in->n_adapters; a++)
            yes = yes || tv_input_is_store(tv_adapter_input(in->adapters[a]));
        if (yes)
            return true;
    }
    return false;
}

struct shown { /* one bar at a time: models that calibrate, then the merge */
    struct tvc *c;
    const struct tvm_plan *plan;
    struct tvc_progress *bar;
    const char *model; /* of the bar; NULL: the merge's, or none yet */
    bool merging;
};

static void on_progress(void *arg, const struct tvm_progress *p)
{
    struct shown *const s = arg;
    if (!s->merging) {
        tvc_progress_end(s->bar);
        s->bar = tvc_progress_begin(&s->c->out, "merge", "tensors");
        s->merging = true;
    }
    tvc_progress_set(s->bar, p->n_done, p->n_tensors, p->bytes_done,
                     p->bytes_total);
}

static void on_calibrating(void *arg, const char *model, uint64_t done,
                           uint64_t total)
{
    struct shown *const s = arg;
    if (s->model != model) {
        tvc_progress_end(s->bar);
        tvc_say(&s->c->out, "calibrating %s: %llu tokens", model,
                (unsigned long long)total);
        s->bar = tvc_progress_begin(&s->c->out, "calibrate", "tokens");
        s->model = model;
    }
    tvc_progress_set(s->bar, done, total, 0, 0);
}

static void calibration(struct tvc *c, const struct tvm_calibration_use *u)
{
    char time[32];
    char resumed[64] = "";
    if (u->n_made + u->n_found + u->n_resumed == 0)
        return;
    if (u->n_resumed > 0)
        (void)snprintf(resumed, sizeof resumed,
                       ", %zu from the interrupted run", u->n_resumed);
    if (u->n_models == 0)
        tvc_say(&c->out,
                "calibration: none, %zu masks from the store, %zu made from "
                "statistics in the store%s",
                u->n_found, u->n_made, resumed);
    else
        tvc_say(&c->out,
                "calibration: %llu tokens through %zu model%s in %s, %zu masks "
                "made, %zu from the store%s",
                (unsigned long long)u->n_tokens, u->n_models,
                u->n_models == 1 ? "" : "s",
                tvc_duration(u->seconds, time, sizeof time), u->n_made,
                u->n_found, resumed);
    if (u->random)
        tvc_warn(&c->out, "calibrated with random tokens");
    if (u->n_damped > 0)
        tvc_warn(&c->out,
                 "%zu layers took more damping, up to %g (tvmerge.json and "
                 "status --json name them)",
                 u->n_damped, u->most_damping);
    if (u->n_uncorrected > 0)
        tvc_warn(&c->out,
                 "%zu layers have no usable X^T X: masked by its diagonal, not "
                 "corrected",
                 u->n_uncorrected);
}

static double rate_of(const struct tvm_result *r)
{
    return r->seconds > 0 ? (double)r->bytes_written / r->seconds : 0;
}

static void summary(struct tvc *c, const struct tvm_plan *p,
                    const struct tvm_result *r)
{
    char time[32];
    char memory[32];
    char hex[33];
    if (r->already_done) {
        tvc_say(&c->out, "%s%s is complete already: nothing to do",
                p->options.into ? "store:" : "", target_of(&p->options));
    } else {
        tvc_say(&c->out, "merged %zu tensors in %s, %.0f MB/s, peak memory %s",
                r->n_tensors, tvc_duration(r->seconds, time, sizeof time),
                rate_of(r) / 1e6,
                tv_format_bytes(r->peak_scratch_bytes, memory, sizeof memory));
        if (r->n_resumed)
            tvc_say(&c->out, "%zu of them were finished before", r->n_resumed);
    }
    calibration(c, &r->calibration);
    const struct tvm_cache_use *u = &r->cache;
    if (u->masks_used + u->masks_stored)
        tvc_say(&c->out,
                "cache: %zu masks used, %zu stored; %zu task vectors used, "
                "%zu stored",
                u->masks_used, u->masks_stored, u->task_vectors_used,
                u->task_vectors_stored);
    if (c->out.verbose > 0)
        tvc_say(&c->out, "read %.2fs, compute %.2fs, write %.2fs, sync %.2fs",
                r->t_read, r->t_compute, r->t_write, r->t_sync);
    tvc_say(&c->out, "digest %s", tv_hash_hex(r->digest, hex));
    tvc_say(&c->out, "result in %s%s", p->options.into ? "store:" : "",
            target_of(&p->options));
}

static void document(struct tvc *c, const struct tvc_merge *m,
                     const struct tvm_result *r)
{
    const struct tvm_options *o = &m->plan->options;
    char hex[33];
    json_t *doc = json_pack(
        "{s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:s}", "schema",
        "tvmerge.run/1", "out",
        o->out_dir ? tvc_json_string(o->out_dir) : json_null(), "n_tensors",
        tvc_json_u64(r->n_tensors), "n_resumed", tvc_json_u64(r->n_resumed),
        "bytes_read", tvc_json_u64(r->bytes_read), "bytes_written",
        tvc_json_u64(r->bytes_written), "seconds",
        tvc_json_measured(r->seconds), "peak_scratch_bytes",
        tvc_json_u64(r->peak_scratch_bytes), "digest",
        tv_hash_hex(r->digest, hex));
    if (o->into)
        (void)json_object_set_new(doc, "into", tvc_json_string(o->into));
    (void)json_object_set_new(doc, "method",
                              tvc_json_string(m->plan->method_name));
    (void)json_object_set_new(doc, "seed", tvc_json_u64(o->seed));
    (void)json_object_set_new(doc, "already_done",
                              json_boolean(r->already_done));
    (void)json_object_set_new(doc, "n_nonfinite_in",
                              tvc_json_u64(r->n_nonfinite_in));
    (void)json_object_set_new(doc, "n_nonfinite_out",
                              tvc_json_u64(r->n_nonfinite_out));
    (void)json_object_set_new(doc, "plan_hash",
                              json_string(tv_hash_hex(m->plan->hash, hex)));
    (void)json_object_set_new(
        doc, "stages",
        json_pack("{s:o, s:o, s:o, s:o}", "read", tvc_json_real(r->t_read),
                  "compute", tvc_json_real(r->t_compute), "write",
                  tvc_json_real(r->t_write), "sync", tvc_json_real(r->t_sync)));
    (void)json_object_set_new(
        doc, "cache",
        json_pack("{s:o, s:o, s:o, s:o}", "masks_used",
                  tvc_json_u64(r->cache.masks_used), "masks_stored",
                  tvc_json_u64(r->cache.masks_stored), "task_vectors_used",
                  tvc_json_u64(r->cache.task_vectors_used),
                  "task_vectors_stored",
                  tvc_json_u64(r->cache.task_vectors_stored)));
    const struct tvm_calibration_use *u = &r->calibration;
    (void)json_object_set_new(
        doc, "calibration",
        json_pack(
            "{s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:b, s:o}",
            "statistics_found", tvc_json_u64(u->n_statistics_found),
            "statistics_kept", tvc_json_u64(u->n_statistics_kept), "models",
            tvc_json_u64(u->n_models), "tokens", tvc_json_u64(u->n_tokens),
            "masks_made", tvc_json_u64(u->n_made), "masks_found",
            tvc_json_u64(u->n_found), "masks_resumed",
            tvc_json_u64(u->n_resumed), "layers_damped",
            tvc_json_u64(u->n_damped), "most_damping",
            tvc_json_real(u->most_damping), "layers_uncorrected",
            tvc_json_u64(u->n_uncorrected), "random", u->random, "seconds",
            tvc_json_measured(u->seconds)));
    (void)json_object_set_new(doc, "problems",
                              tvc_problems_json(&m->problems, false));
    if (m->stages)
        (void)json_object_set_new(doc, "documents", tvc_stages_json(m));
    tvc_out_json(&c->out, doc);
}

/* Among the problems of the document; said here unless an error says it. */
static void nonfinite(struct tvc *c, struct tvc_merge *m,
                      const struct tvm_result *r, bool say)
{
    char text[128];
    (void)snprintf(text, sizeof text,
                   "%" PRIu64 " NaN or infinite values in the inputs, %" PRIu64
                   " in the result",
                   r->n_nonfinite_in, r->n_nonfinite_out);
    tvm_problem_add(&m->problems, false, TV_OK, "", "%s", text);
    if (say)
        tvc_warn(&c->out, "%s", text);
}

/* Nothing is wrong with the result; with the disk there may be. */
static void remade(struct tvc *c, struct tvc_merge *m,
                   const struct tvm_result *r)
{
    char text[160];
    (void)snprintf(text, sizeof text,
                   "%zu tensors of the interrupted run had other bytes than "
                   "it wrote and were merged again; is the disk sound?",
                   r->n_remade);
    tvm_problem_add(&m->problems, false, TV_OK, "", "%s", text);
    tvc_warn(&c->out, "%s", text);
}

/* Stage `stage` of several documents, or the only one. */
static enum tv_err run_one(struct tvc *c, struct tvc_merge *m, size_t stage,
                           struct tvm_result *r)
{
    struct tvm_plan *const p =
        m->stages ? m->stages->items[stage].plan : m->plan;
    struct shown shown = {.c = c, .plan = p};
    const struct tvm_run_hooks hooks = {.progress = on_progress,
                                        .calibrating = on_calibrating,
                                        .arg = &shown,
                                        .cancel = tvc_cancel_flag(),
                                        .wait = tvc_wait(c)};
    bool calibrates = false;
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < p->n_inputs; i++)
        calibrates = calibrates || p->inputs[i].calibrated;
    if (!calibrates)
        on_progress(&shown,
                    &(struct tvm_progress){.n_tensors = p->n_tensors,
                                           .bytes_total = p->bytes_written});
    if (!m->stages) {
        rc = tvm_run(m->plan, &hooks, r, &c->err);
    } else {
        rc = tvm_stages_run(m->stages, stage, &hooks, &c->err);
        *r = m->stages->items[stage].result;
    }
    tvc_progress_end(shown.bar);
    return rc;
}

/* All but the last document; its plan is made anew with what they gave. */
static enum tv_err run_stages(struct tvc *c, struct tvc_merge *m)
{
    const size_t n = m->stages ? m->stages->n - 1 : 0;

    for (size_t i = 0; i < n; i++) {
        const struct tvm_stage *x = &m->stages->items[i];
        struct tvm_result r;
        char time[32];
        if (x->needed)
            tvc_say(&c->out, "document %s: %s of %zu inputs -> %s", x->name,
                    x->plan->method_name, x->plan->n_inputs, x->dir);
        const enum tv_err rc = run_one(c, m, i, &r);
        if (rc != TV_OK)
            return rc;
        if (x->needed)
            tvc_say(&c->out, "document %s: %zu tensors in %s", x->name,
                    r.n_tensors, tvc_duration(r.seconds, time, sizeof time));
    }
    return TV_OK;
}

static enum tv_err merge(struct tvc *c, struct tvc_merge *m)
{
    struct tvm_result r = {0};
    char memory[32];
    char disk[32];
    if (m->stages && m->stages->peak_disk_bytes)
        tvc_say(&c->out,
                "with all documents before it: %s of memory at most, %s on "
                "disk",
                tv_format_bytes(m->stages->peak_scratch_bytes, memory,
                                sizeof memory),
                tv_format_bytes(m->stages->peak_disk_bytes, disk, sizeof disk));
    enum tv_err rc = run_stages(c, m);
    if (rc != TV_OK)
        return rc;
    rc = run_one(c, m, m->stages ? m->stages->n - 1 : 0, &r);
    if (m->stages)
        m->plan = m->stages->items[m->stages->n - 1].plan;
    /* With --strict such values are an error of a merge that is done. */
    if (rc != TV_OK && rc != TV_E_NONFINITE)
        return rc;
    if (r.n_remade > 0)
        remade(c, m, &r);
    if (r.n_nonfinite_in + r.n_nonfinite_out > 0)
        nonfinite(c, m, &r, rc == TV_OK);
    if (c->out.json)
        document(c, m, &r);
    else
        summary(c, m->plan, &r);
    return rc;
}

static int run(struct tvc *c)
{
    struct tvc_merge_opts *o = c->opt;
    struct tvc_merge m = {0};
    enum tv_err rc = TV_OK;
    bool handled = false;
    int status = 0;

    TV_TRY(tvc_merge_prepare(c, false));
    TV_TRY(tvc_adapters(c, false, &handled, &status));
    if (handled)
        goto out;
    TV_TRY(tvc_merge_plan(c, &m));
    tvc_problems_print(c, &m.problems, false);
    if (m.problems.n_errors > 0) {
        status = tvc_problems_fail(c, &m.problems);
        goto out;
    }
    if (o->options.store && tv_store_is_read_only(o->options.store) &&
        reads_store(m.plan))
        tvc_note(&c->out,
                 "store %s is read-only: nothing keeps others from "
                 "removing the inputs meanwhile",
                 tv_store_path(o->options.store));
    header(c, m.plan);
    rc = merge(c, &m);
out:
    if (rc == TV_E_INTERRUPTED)
        status = tvc_interrupted(c);
    else if (rc != TV_OK)
        status = tvc_fail(c, &c->err);
    else if (status == 0 && !handled)
        status = tvc_done(c, 0);
    tvc_merge_free(&m);
    tvc_merge_opts_free(o);
    return status;
}

const struct tvc_command tvc_cmd_run = {
    .name = "run",
    .summary = "merge by recipe into a directory or the store",
    .args_doc = "RECIPE OUT\nRECIPE --into NAME --store STORE",
    .text = "Continues after any interruption when repeated. 'tvmerge RECIPE "
            "OUT' is short\nfor 'tvmerge run RECIPE OUT'. Recipes are "
            "mergekit's.",
    .examples = "tvmerge run recipe.yml ./merged\n"
                "tvmerge run recipe.yml ./merged --out-shard-size 2GB --json\n"
                "tvmerge run recipe.yml --into merged --store models.tv\n"
                "TV_STORE=models.tv tvmerge recipe.yml ./merged --memory 64MiB",
    .options = tvc_merge_options,
    .opt_bytes = sizeof(struct tvc_merge_opts),
    .init = tvc_merge_init,
    .option = tvc_merge_option,
    .min_pos = 1,
    .max_pos = 2,
    .cancellable = true,
    .run = run,
};
