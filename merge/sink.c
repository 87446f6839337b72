/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sink.c - a merge into a directory.
 *
 *   OUT/.tvmerge/lock       flock: one run at a time
 *   OUT/.tvmerge/journal/   store: state of the run, finished tensors
 *   OUT/.tvmerge/<shard>    shards in the making, at their whole size
 *   OUT/.tvmerge/previous.json  the tvmerge.json that --force will replace
 *   OUT/tvmerge.json        of a finished merge: what it was made of
 *
 * Order of events, each step durable before the next (but with --no-sync):
 *   1. journal with state          4. state: publishing = true
 *   2. shards at full size         5. old files go, shards are renamed into OUT
 *   3. per group: data, then the   6. index and side files but config.json
 *      `done` records              7. tvmerge.json   8. .tvmerge is removed
 *                                  9. config.json
 * Killed before 7, the same command goes on: a shard that has been renamed is
 * moved back and published again. Killed after it, the merge is complete but
 * for config.json, which the same command adds. So OUT never holds both
 * config.json and .tvmerge, unless an older model is there that --force will
 * replace.
 */
#include "sink.h"

#include <errno.h>
#include <string.h>

#include "pins.h"
#include "sink_dir.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/sys.h"

#define STATE_DIR    ".tvmerge"
#define COMMIT_BYTES (256u << 20)

/* ---- what is there ------------------------------------------------------- */

static enum tv_err load_record(struct sink_dir *s, bool *found,
                               struct tvm_record *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(s->out, SINK_RECORD_FILE);
    char *text = NULL;
    size_t n = 0;

    *found = false;
    if (!path)
        return sink_no_memory(err);
    TV_TRY(sink_probe(s->out, SINK_RECORD_FILE, found, err));
    if (*found) {
        *found = false;
        TV_TRY(tv_file_read(path, SINK_RECORD_MAX, err, &text, &n));
        rc = tvm_record_parse(text, n, out, err);
        if (rc != TV_OK)
            tv_error_context(err, "%s", path);
        *found = rc == TV_OK;
    }
out:
    tv_free(text);
    tv_free(path);
    return rc;
}

/* First file of the record that is not as it was, or NULL. The last one to be
 * written is only reported as *no_config. */
static const char *missing_file(const struct sink_dir *s,
                                const struct tvm_record *r, bool *no_config)
{
    *no_config = false;
    for (size_t i = 0; i < r->n_files; i++) {
        const char *name = r->files[i].name;
        const int64_t bytes = sink_file_bytes(s->out, name);
        if (bytes < 0 && strcmp(name, SINK_CONFIG_FILE) == 0)
            *no_config = true;
        else if (bytes != (int64_t)r->files[i].bytes)
            return name;
    }
    return NULL;
}

/* A finished merge that --force does not replace: the same, or another
 * (CHANGED)? */
static enum tv_err judge_record(const struct sink_dir *s,
                                const struct tvm_record *r, bool *no_config,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_plan *p = s->base.plan;
    char why[512];
    bool numerics = false;

    if (!tv_hash_equal(r->plan_hash, p->hash) &&
        !tvm_identity_accept(p, r->plan_hash, r->identity, &numerics)) {
        /* Adapters say nothing of what they were made of. */
        const bool said = r->identity && strncmp(r->identity, "{}", 2) != 0;
        rc = tv_error_set(err, TV_E_CHANGED,
                          "%s holds the result of another merge%s%s", s->out,
                          said ? ": " : ", an adapter",
                          said ? tvm_identity_difference(
                                     r->identity, p->identity, why, sizeof why)
                               : "");
        tv_error_hint(err, numerics ? "--force replaces it, --accept-numerics "
                                      "takes it as it is"
                                    : "--force replaces it");
        goto out;
    }
    const char *name = missing_file(s, r, no_config);
    if (name) {
        rc = tv_error_set(err, TV_E_EXISTS,
                          "%s holds this merge, but %s is missing or has "
                          "another size",
                          s->out, name);
        tv_error_hint(err, "--force makes it again");
    }
out:
    return rc;
}

static enum tv_err meet_record(struct sink_dir *s, const struct tvm_record *r,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    bool no_config = false;

    if (s->base.plan->options.force) {
        /* From here on OUT counts as unfinished. */
        rc = sink_rename(s->out, SINK_RECORD_FILE, s->dir, SINK_PREVIOUS, err);
        goto out;
    }
    TV_TRY(judge_record(s, r, &no_config, err));
    s->add_config = no_config; /* killed between steps 7 and 9 */
    s->base.already_done = true;
    s->base.totals = r->totals;
out:
    return rc;
}

/* Anything in OUT that is not ours to overwrite? */
static enum tv_err meet_files(const struct sink_dir *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char **names = NULL;
    size_t n = 0;

    TV_TRY(tv_dir_list(s->out, err, &names, &n));
    for (size_t i = 0; i < n; i++) {
        if (strcmp(names[i], STATE_DIR) == 0)
            continue;
        rc = tv_error_set(err, TV_E_EXISTS,
                          "%s is not empty and not made by tvmerge (it holds "
                          "%s)",
                          s->out, names[i]);
        tv_error_hint(err, "choose another directory, or use --force");
        break;
    }
out:
    tv_dir_list_free(names, n);
    return rc;
}

/* ---- opening ------------------------------------------------------------- */

static void dir_close(struct tvm_sink *sink)
{
    struct sink_dir *s = sink_dir_of(sink);

    for (size_t i = 0; s->fd && i < sink_n_shards(s); i++)
        if (s->fd[i] >= 0)
            (void)tv_sys()->close(s->fd[i]);
    tv_store_close(s->journal);
    if (s->fresh && s->lock_fd >= 0 && tv_dir_remove(s->dir, NULL) == TV_OK &&
        s->made_out)
        (void)tv_sys()->rmdir(s->out);
    /* Nothing is left to go on with: published, or undone. */
    if (s->pins && !tv_path_exists(s->dir))
        (void)!tvm_pins_drop(s->base.plan->options.store, s->pins, NULL);
    if (s->lock_fd >= 0)
        (void)tv_sys()->close(s->lock_fd);
    (void)pthread_mutex_destroy(&s->mutex);
    tv_free(s->pins);
    tv_free(s->n_left);
    tv_free(s->touched);
    tv_free(s->fd);
    tv_free(s->dir);
    tv_free(s->out);
    tv_free(s->base.calibration);
    tv_free(s->base.done);
    tv_free(s);
}

static const struct tvm_sink_ops dir_ops = {
    .write = sink_dir_write,
    .commit = sink_dir_commit,
    .note = sink_dir_note,
    .finish = sink_dir_finish,
    .close = dir_close,
};

/* Decides with the lock held whether this is a new merge, one to go on with, or
 * one that is complete. */
static enum tv_err meet_state(struct sink_dir *s, bool *resume,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const bool force = s->base.plan->options.force;
    struct tvm_record record = {.n_files = 0};
    bool found = false;

    *resume = false;
    rc = load_record(s, &found, &record, err);
    if (rc == TV_E_CORRUPT && force) {
        TV_TRY(sink_remove(s->out, SINK_RECORD_FILE, err));
        rc = TV_OK;
    }
    TV_TRY(rc);
    if (found) {
        TV_TRY(meet_record(s, &record, err));
        /* A run that was killed while tidying up. */
        TV_TRY(sink_clear_state(s, SINK_PREVIOUS, err));
        s->replace = true;
        goto out;
    }
    TV_TRY(sink_probe(s->dir, SINK_JOURNAL_DIR, &found, err));
    if (found) {
        rc = sink_open_journal(s, false, err);
        if (rc == TV_OK)
            rc = sink_read_journal(s, err);
        *resume = rc == TV_OK;
        if (rc == TV_OK || !force || rc == TV_E_NOMEM)
            goto out;
        /* The older state goes, finished or not. */
        tv_store_close(s->journal);
        s->journal = NULL;
        rc = sink_clear_state(s, SINK_PREVIOUS, err);
        s->replace = true;
        goto out;
    }
    TV_TRY(sink_clear_state(s, SINK_PREVIOUS, err));
    TV_TRY(sink_probe(s->dir, SINK_PREVIOUS, &found, err));
    if (force || found)
        s->replace = true;
    else
        rc = meet_files(s, err);
out:
    tvm_record_free(&record);
    return rc;
}

/* The names of OUT and of .tvmerge in it are as durable as what they hold. */
static enum tv_err sync_parents(struct sink_dir *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *parent = NULL;

    if (!s->sync)
        return TV_OK;
    TV_TRY(tv_dir_sync(s->out, err));
    if (!s->made_out)
        goto out;
    parent = tv_path_join(s->out, "..");
    rc = parent ? tv_dir_sync(parent, err) : sink_no_memory(err);
out:
    tv_free(parent);
    return rc;
}

static enum tv_err prepare(struct sink_dir *s,
                           const struct tvm_run_hooks *hooks,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;
    bool resume = false;
    bool *ok = NULL;

    TV_TRY(meet_state(s, &resume, err));
    if (s->add_config) {
        TV_TRY(tv_dir_remove(s->dir, err));
        TV_TRY(sink_write_config(s, err));
    }
    if (s->base.already_done)
        goto out;
    ok = tv_calloc(sink_n_shards(s) + 1, sizeof *ok);
    if (!ok) {
        rc = sink_no_memory(err);
        goto out;
    }
    s->fresh = !resume && !s->replace;
    if (!resume) {
        TV_TRY(sink_make_journal(s, err));
        TV_TRY(sink_open_journal(s, false, err));
        TV_TRY(sync_parents(s, err));
    }
    TV_TRY(tvm_pins_put(p, s->out, err, &s->pins));
    TV_TRY(sink_prepare_shards(s, ok, err));
    s->fresh = false;
    if (s->publishing) {
        s->publishing = false;
        TV_TRY(sink_put_state(s, s->journal, err));
    }
    if (resume) {
        TV_TRY(sink_read_done(s, ok, err));
        TV_TRY(sink_recheck(s, hooks, err));
    }
    for (size_t i = 0; i < p->n_tensors; i++)
        if (!s->base.done[i].done)
            s->n_left[p->tensors[i].shard]++;
out:
    tv_free(ok);
    return rc;
}

/* Refuses a directory of somebody else without leaving a trace in it. */
static enum tv_err look_before(struct sink_dir *s, bool *had_state,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    bool found = false;

    rc = tv_out_dir_check(s->out, err, &found);
    if (rc == TV_E_EXISTS && sink_file_bytes(s->out, "data.mdb") >= 0)
        tv_error_hint(err,
                      "'--into NAME --store %s' in place of OUT merges into an "
                      "object of it",
                      s->out);
    TV_TRY(rc);
    s->made_out = !found;
    if (s->made_out)
        goto out;
    TV_TRY(sink_probe(s->out, STATE_DIR, had_state, err));
    TV_TRY(sink_probe(s->out, SINK_RECORD_FILE, &found, err));
    if (!s->base.plan->options.force && !*had_state && !found)
        rc = meet_files(s, err);
out:
    return rc;
}

static enum tv_err dir_new(struct tvm_plan *plan, struct tv_error *err,
                           struct sink_dir **out)
{
    struct sink_dir *s = tv_calloc(1, sizeof *s);

    *out = NULL;
    if (!s)
        return sink_no_memory(err);
    s->base.ops = &dir_ops;
    s->base.plan = plan;
    s->base.commit_bytes =
        plan->options.group_bytes ? plan->options.group_bytes : COMMIT_BYTES;
    s->lock_fd = -1;
    s->sync = plan->options.sync;
    (void)pthread_mutex_init(&s->mutex, NULL);
    s->out = tv_strdup(plan->options.out_dir);
    s->dir = tv_path_join(plan->options.out_dir, STATE_DIR);
    s->base.done = tv_calloc(plan->n_tensors + 1, sizeof *s->base.done);
    s->fd = tv_alloc((sink_n_shards(s) + 1) * sizeof *s->fd);
    s->touched = tv_calloc(sink_n_shards(s) + 1, sizeof *s->touched);
    s->n_left = tv_calloc(sink_n_shards(s) + 1, sizeof *s->n_left);
    for (size_t i = 0; s->fd && i < sink_n_shards(s); i++)
        s->fd[i] = -1;
    if (!s->out || !s->dir || !s->base.done || !s->fd || !s->touched ||
        !s->n_left) {
        dir_close(&s->base);
        return sink_no_memory(err);
    }
    *out = s;
    return TV_OK;
}

enum tv_err tvm_sink_dir_open(struct tvm_plan *plan,
                              const struct tvm_run_hooks *hooks,
                              struct tv_error *err, struct tvm_sink **out)
{
    enum tv_err rc = TV_OK;
    struct sink_dir *s = NULL;
    bool had_state = false;

    *out = NULL;
    TV_TRY(dir_new(plan, err, &s));
    TV_TRY(look_before(s, &had_state, err));
    if (s->made_out)
        TV_TRY(tv_dir_make(s->out, err));
    TV_TRY(sink_lock(s, hooks, err));
    rc = prepare(s, hooks, err);
    /* Nothing of ours was here and nothing has begun: leave it as it was. */
    if ((rc != TV_OK && !had_state && !s->journal && !s->replace) ||
        s->base.already_done)
        s->fresh = true;
    TV_TRY(rc);
    *out = &s->base;
    s = NULL;
out:
    if (s)
        dir_close(&s->base);
    return rc;
}

enum tv_err tvm_sink_dir_check(struct tvm_plan *plan, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const bool force = plan->options.force;
    struct sink_dir *s = NULL;
    struct tvm_record record = {.n_files = 0};
    bool had_state = false;
    bool found = false;
    bool no_config = false;

    TV_TRY(dir_new(plan, err, &s));
    TV_TRY(look_before(s, &had_state, err));
    if (s->made_out)
        goto out;
    TV_TRY(sink_check_lock(s, err));
    /* Whatever is there otherwise. */
    if (force)
        goto out;
    TV_TRY(load_record(s, &found, &record, err));
    if (found) {
        rc = judge_record(s, &record, &no_config, err);
        goto out;
    }
    TV_TRY(sink_probe(s->dir, SINK_JOURNAL_DIR, &found, err));
    if (found) {
        TV_TRY(sink_open_journal(s, true, err));
        rc = sink_read_journal(s, err);
        goto out;
    }
    TV_TRY(sink_probe(s->dir, SINK_PREVIOUS, &found, err));
    if (!found)
        rc = meet_files(s, err);
out:
    tvm_record_free(&record);
    if (s)
        dir_close(&s->base);
    return rc;
}

void tvm_sink_close(struct tvm_sink *s)
{
    if (s)
        s->ops->close(s);
}
