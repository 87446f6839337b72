/* SPDX-License-Identifier: Apache-2.0 */
/*
 * compare_run.c - the work of a comparison: scores, merges, what is kept.
 *
 * Entries are done one after the other: the base, every other model, plain
 * task arithmetic, then the merges. A merge resumes by its own journal, a score
 * is in a record (compare_records.c) or not there at all, so after a kill the
 * same command goes on where it was.
 */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

#include "compare.h"
#include "progress.h"
#include "signals.h"
#include "store_open.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"
#include "tveval.h"

/* ---- figures ------------------------------------------------------------- */

/* The texts as ids of a tokenizer, in p->ids. They are those of the model
 * before unless it has another tokenizer. */
static enum tv_err encode_all(struct tvc_compare *p, tve_tokenizer *t)
{
    enum tv_err rc = TV_OK;
    const struct compare_opts *o = p->opts;
    const struct tv_hash hash = tve_tokenizer_hash(t);

    if (p->ids && tv_hash_equal(hash, p->ids_of))
        return TV_OK;
    tvc_compare_ids_free(p);
    p->ids = tv_calloc(o->n_texts, sizeof *p->ids);
    if (!p->ids)
        return tvc_compare_oom(p->c);
    for (size_t i = 0; i < o->n_texts; i++) {
        rc = tve_tokenizer_encode(t, p->text[i], p->text_bytes[i],
                                  tve_protocol_special(o->eval.ppl.protocol),
                                  &p->ids[i], &p->c->err);
        if (rc != TV_OK) {
            tv_error_context(&p->c->err, "%s", o->texts[i]);
            tvc_compare_ids_free(p);
            return rc;
        }
    }
    p->ids_of = hash;
    return TV_OK;
}

void tvc_compare_ids_free(struct tvc_compare *p)
{
    for (size_t i = 0; p->ids && i < p->opts->n_texts; i++)
        tve_ids_free(&p->ids[i]);
    tv_free(p->ids);
    p->ids = NULL;
}

/* A model's own tokenizer, else the base's. */
static enum tv_err tokenizer_for(struct tvc_compare *p, tv_input *input,
                                 int32_t *bos, tve_tokenizer **out)
{
    struct tvc *c = p->c;
    enum tv_err rc =
        tve_tokenizer_of(input, p->opts->eval.tokenizer, bos, &c->err, out);

    if (rc != TV_E_INPUT || p->opts->eval.tokenizer || !p->base)
        return rc;
    struct tvc_subject base = {0};
    tv_error_clear(&c->err);
    rc = tvc_subject_open_in(c, p->base, p->opts->options.store, &base);
    if (rc == TV_OK)
        rc = tve_tokenizer_of(base.input, NULL, bos, &c->err, out);
    tvc_subject_close(&base);
    return rc;
}

static json_t *text_json(const char *file, const struct tve_ppl *r)
{
    return json_pack("{s:o, s:o, s:o, s:o, s:o}", "file", tvc_json_string(file),
                     "tokens_scored", tvc_json_u64(r->n_scored), "nll_mean",
                     tvc_json_real(r->nll_mean), "ppl", tvc_json_real(r->ppl),
                     "stderr", tvc_json_real(r->ppl_stderr));
}

static enum tv_err score(struct tvc_compare *p, struct entry *e)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;
    const struct compare_opts *o = p->opts;
    struct tvc_subject s = {0};
    tve_model *model = NULL;
    tve_tokenizer *tokenizer = NULL;
    struct tve_ppl_options ppl = o->eval.ppl;
    json_t *texts = json_array();
    double logs = 0;
    int32_t bos = -1;
    const double t0 = tvc_seconds();

    if (!texts) {
        rc = tvc_compare_oom(c);
        goto out;
    }
    TV_TRY(
        tvc_subject_open_in(c, e->dir ? e->dir : e->ref, o->options.store, &s));
    TV_TRY(tokenizer_for(p, s.input, &bos, &tokenizer));
    if (ppl.bos == -2)
        ppl.bos = bos;
    TV_TRY(encode_all(p, tokenizer));
    TV_TRY(tvc_subject_model(c, &s, &model));
    for (size_t i = 0; i < o->n_texts; i++) {
        struct tvc_progress *bar =
            tvc_progress_begin(&c->out, e->name, "tokens");
        const struct tve_progress progress = {tvc_eval_step, bar,
                                              tvc_cancel_flag()};
        struct tve_ppl r;
        rc = tve_perplexity(model, p->ids[i].ids, p->ids[i].n, &ppl, &progress,
                            &r, &c->err);
        tvc_progress_end(bar);
        if (rc != TV_OK) {
            tv_error_context(&c->err, "%s", o->texts[i]);
            goto out;
        }
        logs += r.nll_mean;
        (void)json_array_append_new(texts, text_json(o->texts[i], &r));
        tvc_record_put(p, e, "context", tvc_json_u64(r.context));
    }
    tvc_subject_told(c, model);
    tvc_record_put(p, e, "geometric_mean",
                   tvc_json_real(exp(logs / (double)o->n_texts)));
    tvc_record_put(p, e, "eval_seconds", tvc_json_measured(tvc_seconds() - t0));
    tvc_record_put(p, e, "bos",
                   ppl.bos < 0 ? json_null() : json_integer(ppl.bos));
    tvc_record_put(p, e, "texts", json_incref(texts));
    TV_TRY(tvc_record_save(p, e));
out:
    json_decref(texts);
    tve_model_close(model);
    tve_tokenizer_close(tokenizer);
    tvc_subject_close(&s);
    if (rc != TV_OK && rc != TV_E_INTERRUPTED)
        tv_error_context(&c->err, "%s", e->name);
    return rc;
}

static enum tv_err check_model(struct tvc_compare *p, const struct entry *e)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;
    const struct compare_opts *o = p->opts;
    struct tve_ppl_options ppl = o->eval.ppl;
    struct tvc_subject s = {0};
    tve_tokenizer *tokenizer = NULL;
    tve_model *model = NULL;
    int32_t bos = -1;

    TV_TRY(tvc_subject_open_in(c, e->ref, o->options.store, &s));
    TV_TRY(tokenizer_for(p, s.input, &bos, &tokenizer));
    if (ppl.bos == -2)
        ppl.bos = bos;
    TV_TRY(tvc_subject_model(c, &s, &model));
    TV_TRY(encode_all(p, tokenizer));
    for (size_t i = 0; i < o->n_texts; i++) {
        rc = tve_perplexity_check(model, p->ids[i].ids, p->ids[i].n, &ppl,
                                  &c->err);
        if (rc != TV_OK) {
            tv_error_context(&c->err, "%s", o->texts[i]);
            goto out;
        }
    }
out:
    tve_model_close(model);
    tve_tokenizer_close(tokenizer);
    tvc_subject_close(&s);
    if (rc != TV_OK)
        tv_error_context(&c->err, "%s", e->ref);
    return rc;
}

enum tv_err tvc_compare_models(struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < p->n_entries; i++)
        if (p->entries[i].kind != ENTRY_MERGE)
            TV_TRY(check_model(p, &p->entries[i]));
out:
    return rc;
}

/* ---- merges -------------------------------------------------------------- */

static void on_progress(void *arg, const struct tvm_progress *g)
{
    tvc_progress_set(arg, g->n_done, g->n_tensors, g->bytes_done,
                     g->bytes_total);
}

/* Sizes of the files of an entry's directory: unlike blocks, the same on every
 * file system. */
static enum tv_err size_of(struct tvc_compare *p, const struct entry *e,
                           uint64_t *bytes)
{
    enum tv_err rc = TV_OK;
    char **names = NULL;
    size_t n = 0;

    *bytes = 0;
    TV_TRY(tv_dir_list(e->dir, &p->c->err, &names, &n));
    for (size_t i = 0; i < n; i++) {
        struct stat st;
        char *path = tv_path_join(e->dir, names[i]);
        if (!path) {
            rc = tvc_compare_oom(p->c);
            goto out;
        }
        if (tv_sys()->stat(path, &st) == 0 && S_ISREG(st.st_mode))
            *bytes += (uint64_t)st.st_size;
        tv_free(path);
    }
out:
    tv_dir_list_free(names, n);
    return rc;
}

/* What the quota leaves for an entry's directory. */
static enum tv_err room_for(struct tvc_compare *p, const struct entry *e,
                            uint64_t *room)
{
    enum tv_err rc = TV_OK;
    const uint64_t quota = p->opts->options.quota_bytes;
    uint64_t used = 0;
    uint64_t own = 0;

    *room = 0;
    if (quota == 0)
        goto out;
    TV_TRY(tv_disk_used(p->opts->out, &used, &p->c->err));
    TV_TRY(tv_disk_used(e->dir, &own, &p->c->err));
    used -= own;
    if (used >= quota)
        rc = tv_error_set(&p->c->err, TV_E_NOSPACE,
                          "%s takes %llu bytes already, --quota allows %llu",
                          p->opts->out, (unsigned long long)used,
                          (unsigned long long)quota);
    *room = used < quota ? quota - used : 1;
out:
    return rc;
}

/* What it cost to know what to keep, or that earlier merges knew. */
static json_t *calibration_json(const struct tvm_calibration_use *u)
{
    return json_pack(
        "{s:o, s:o, s:o, s:o}", "models", tvc_json_u64(u->n_models),
        "masks_made", tvc_json_u64(u->n_made), "masks_found",
        tvc_json_u64(u->n_found), "seconds", tvc_json_measured(u->seconds));
}

static enum tv_err merge(struct tvc_compare *p, struct entry *e)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;
    struct tvc_merge m = {0};
    struct tvm_result r = {0};
    uint64_t room = 0;
    uint64_t disk = 0;
    char hex[33];

    TV_TRY(room_for(p, e, &room));
    TV_TRY(tvc_compare_plan(p, e, room, &m));
    if (m.problems.n_errors > 0) {
        for (size_t i = 0; i < m.problems.n; i++)
            if (m.problems.items[i].is_error) {
                rc = tv_error_set(&c->err, tvm_problems_code(&m.problems), "%s",
                                  m.problems.items[i].message);
                break;
            }
        goto out;
    }
    if (!m.plan || !tv_hash_equal(m.plan->hash, e->plan)) {
        rc = tv_error_set(&c->err, TV_E_CHANGED,
                          "the inputs change while they are compared");
        goto out;
    }
    struct tvc_progress *bar = tvc_progress_begin(&c->out, e->name, "tensors");
    const struct tvm_run_hooks hooks = {.progress = on_progress,
                                        .arg = bar,
                                        .cancel = tvc_cancel_flag(),
                                        .wait = tvc_wait(c)};
    rc = tvm_run(m.plan, &hooks, &r, &c->err);
    tvc_progress_end(bar);
    /* What helps tvmerge run may be an option that is not there here. */
    if (rc == TV_E_CHANGED && strstr(c->err.hint, "--accept-numerics"))
        tv_error_hint(&c->err, "run it where it was begun, give another OUT, "
                               "or --force to begin again");
    TV_TRY(rc);
    if (tvc_record_has(e, "digest"))
        goto out; /* made again to be kept: its figures are there */
    TV_TRY(size_of(p, e, &disk));
    tvc_record_put(p, e, "seconds",
                   r.already_done ? json_null() : tvc_json_measured(r.seconds));
    tvc_record_put(p, e, "peak_memory_bytes",
                   r.already_done ? json_null()
                                  : tvc_json_u64(r.peak_scratch_bytes));
    tvc_record_put(p, e, "disk_bytes", tvc_json_u64(disk));
    if (r.calibration.n_made + r.calibration.n_found > 0)
        tvc_record_put(p, e, "calibration", calibration_json(&r.calibration));
    tvc_record_put(p, e, "digest", json_string(tv_hash_hex(r.digest, hex)));
    TV_TRY(tvc_record_save(p, e));
out:
    if (rc != TV_OK && rc != TV_E_INTERRUPTED)
        tv_error_context(&c->err, "%s", e->name);
    tvc_merge_free(&m);
    return rc;
}

static double mean_of(const struct entry *e)
{
    const json_t *v = json_object_get(e->record, "geometric_mean");

    return json_is_number(v) ? json_number_value(v) : INFINITY;
}

struct entry *tvc_compare_best(struct tvc_compare *p)
{
    struct entry *best = NULL;

    for (size_t i = 0; i < p->n_entries; i++) {
        struct entry *e = &p->entries[i];
        if (e->kind == ENTRY_MERGE && tvc_record_has(e, "texts") &&
            (!best || mean_of(e) < mean_of(best)))
            best = e;
    }
    return best;
}

/* Drops the outputs that are scored and not wanted any more. */
static enum tv_err tidy(struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    const struct entry *best = tvc_compare_best(p);

    if (p->opts->keep == KEEP_ALL)
        goto out;
    for (size_t i = 0; i < p->n_entries; i++) {
        struct entry *e = &p->entries[i];
        if (e->kind != ENTRY_MERGE || !tvc_record_has(e, "texts") ||
            (p->opts->keep == KEEP_BEST && e == best))
            continue;
        TV_TRY(tv_dir_remove(e->dir, &p->c->err));
    }
out:
    return rc;
}

static enum tv_err is_there(struct tvc_compare *p, const struct entry *e,
                            bool *there)
{
    struct tvm_status s = {0};
    const enum tv_err rc = tvm_status(e->dir, &s, &p->c->err);

    *there = rc == TV_OK && s.state == TVM_FINISHED;
    return rc;
}

enum tv_err tvc_compare_all(struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    bool there = false;

    for (size_t i = 0; i < p->n_entries; i++) {
        struct entry *e = &p->entries[i];
        const bool scored = tvc_record_has(e, "texts");
        if (scored && (e->kind != ENTRY_MERGE || p->opts->keep != KEEP_ALL))
            continue;
        if (e->kind == ENTRY_MERGE) {
            TV_TRY(is_there(p, e, &there));
            if (!there || !tvc_record_has(e, "digest"))
                TV_TRY(merge(p, e));
        }
        if (!scored)
            TV_TRY(score(p, e));
        TV_TRY(tidy(p));
    }
    struct entry *best = tvc_compare_best(p);
    if (p->opts->keep == KEEP_BEST && best) {
        /* It is gone when an earlier run was told to keep nothing. */
        TV_TRY(is_there(p, best, &there));
        if (!there)
            TV_TRY(merge(p, best));
    }
    TV_TRY(tidy(p));
out:
    return rc;
}
