/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sink_journal.c - OUT/.tvmerge/journal: what is being made, and of an earlier
 * run what it has finished, whose bytes are read once more before they count.
 */
#include "sink_dir.h"

#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/sys.h"

#define JOURNAL_NEW "journal.new"

enum tv_err sink_put_state(struct sink_dir *s, tv_store *store,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    char *text = tvm_state_make(s->base.plan, s->publishing, s->replace,
                                s->base.calibration);

    if (!text) {
        rc = sink_no_memory(err);
        goto out;
    }
    TV_TRY(tv_batch_begin(store, !s->sync, err, &b));
    TV_TRY(tv_run_put(b, SINK_RUN_ID, text, strlen(text), err));
    rc = tv_batch_commit(b, err);
    b = NULL;
out:
    tv_batch_abort(b);
    tv_free(text);
    return rc;
}

enum tv_err sink_make_journal(struct sink_dir *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_store *store = NULL;
    char *path = tv_path_join(s->dir, JOURNAL_NEW);

    if (!path) {
        rc = sink_no_memory(err);
        goto out;
    }
    TV_TRY(tv_store_create(path, 0, err));
    TV_TRY(tv_store_open(path, NULL, err, &store));
    TV_TRY(sink_put_state(s, store, err));
    tv_store_close(store);
    store = NULL;
    TV_TRY(sink_rename(s->dir, JOURNAL_NEW, s->dir, SINK_JOURNAL_DIR, err));
    /* The journal counts for nothing while the name of its directory may be
     * lost. */
    if (s->sync) {
        TV_TRY(tv_dir_sync(s->dir, err));
        TV_TRY(tv_dir_sync(s->out, err));
    }
out:
    tv_store_close(store);
    tv_free(path);
    return rc;
}

enum tv_err sink_open_journal(struct sink_dir *s, bool read_only,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_store_options opt = {.read_only = read_only};
    char *path = tv_path_join(s->dir, SINK_JOURNAL_DIR);

    if (!path)
        return sink_no_memory(err);
    rc = tv_store_open(path, &opt, err, &s->journal);
    if (rc != TV_OK)
        tv_error_context(err, "the journal of an unfinished merge in %s",
                         s->out);
    tv_free(path);
    return rc;
}

enum tv_err sink_dir_note(struct tvm_sink *sink, const char *calibration,
                          struct tv_error *err)
{
    char *copy = tv_strdup(calibration);

    if (!copy)
        return sink_no_memory(err);
    tv_free(sink->calibration);
    sink->calibration = copy;
    return sink_put_state(sink_dir_of(sink), sink_dir_of(sink)->journal, err);
}

/* ---- an earlier run ------------------------------------------------------ */

enum tv_err sink_read_journal(struct sink_dir *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_plan *p = s->base.plan;
    struct tvm_state state = {.n_tensors = 0};
    bool numerics = false;
    tv_read *r = NULL;
    char *text = NULL;
    size_t n = 0;
    bool found = false;
    char why[512];

    TV_TRY(tv_read_begin(s->journal, err, &r));
    TV_TRY(tv_run_get(r, SINK_RUN_ID, &found, &text, &n, err));
    if (!found) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "the journal in %s has no state of a merge", s->dir);
        goto out;
    }
    TV_TRY(tvm_state_parse(text, n, &state, err));
    if (!tv_hash_equal(state.plan_hash, p->hash) &&
        !tvm_identity_accept(p, state.plan_hash, state.identity, &numerics)) {
        rc = tv_error_set(err, TV_E_CHANGED,
                          "%s holds an unfinished merge of another plan: %s",
                          s->out,
                          tvm_identity_difference(state.identity, p->identity,
                                                  why, sizeof why));
        tv_error_hint(err, numerics ? TVM_NUMERICS_HINT
                                    : "repeat the earlier command to finish "
                                      "it, or --force to start anew");
        goto out;
    }
    s->publishing = state.publishing;
    s->replace = state.replace;
    s->base.calibration = state.calibration;
    state.calibration = NULL;
out:
    tvm_state_free(&state);
    tv_free(text);
    tv_read_end(r);
    return rc;
}

struct by_name {
    const char *name;
    size_t index;
};

static int compare_names(const void *a, const void *b)
{
    return strcmp(((const struct by_name *)a)->name,
                  ((const struct by_name *)b)->name);
}

enum tv_err sink_read_done(struct sink_dir *s, const bool *shard_ok,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;
    struct by_name *names = NULL;
    struct tv_done_list *list = NULL;
    tv_read *r = NULL;

    names = tv_calloc(p->n_tensors + 1, sizeof *names);
    if (!names) {
        rc = sink_no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < p->n_tensors; i++)
        names[i] = (struct by_name){p->tensors[i].name, i};
    qsort(names, p->n_tensors, sizeof *names, compare_names);
    TV_TRY(tv_read_begin(s->journal, err, &r));
    TV_TRY(tv_done_list(r, SINK_RUN_ID, err, &list));
    for (size_t i = 0; i < list->n; i++) {
        const struct tv_done *d = &list->items[i];
        const struct by_name key = {d->name, 0};
        const struct by_name *at =
            bsearch(&key, names, p->n_tensors, sizeof *names, compare_names);
        const struct tvm_tensor *t = at ? &p->tensors[at->index] : NULL;
        if (!t || t->shard != d->shard || t->offset != d->offset ||
            t->bytes != d->bytes) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "the journal in %s lists %s, which is not where "
                              "the plan has it",
                              s->dir, d->name);
            goto out;
        }
        if (shard_ok[t->shard])
            s->base.done[at->index] = (struct tvm_tensor_done){
                .done = true,
                .resumed = true,
                .checksum = d->checksum,
                .n_nonfinite_in = d->n_nonfinite_in,
                .n_nonfinite_out = d->n_nonfinite_out,
            };
    }
out:
    tv_done_list_free(list);
    tv_read_end(r);
    tv_free(names);
    return rc;
}

static struct tv_hash checksum_of(tv_hasher *leaves, const unsigned char *data,
                                  uint64_t n)
{
    unsigned char raw[16];

    tv_hasher_reset(leaves);
    for (uint64_t at = 0; at < n; at += TV_LEAF_BYTES) {
        const size_t some =
            (size_t)(n - at < TV_LEAF_BYTES ? n - at : TV_LEAF_BYTES);
        tv_hash_put(raw, tv_hash128(data + at, some));
        tv_hasher_add(leaves, raw, sizeof raw);
    }
    return tv_hasher_value(leaves);
}

enum tv_err sink_recheck(struct sink_dir *s, const struct tvm_run_hooks *hooks,
                         struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;
    struct tvm_progress now = {.n_tensors = p->n_tensors,
                               .bytes_total = p->bytes_written};
    tv_map *map = NULL;
    tv_hasher *leaves = NULL;
    size_t shard = SIZE_MAX;

    if (!p->options.verify_reads)
        return TV_OK;
    TV_TRY(tv_hasher_open(err, &leaves));
    for (size_t i = 0; i < p->n_tensors; i++) {
        const struct tvm_tensor *t = &p->tensors[i];
        struct tvm_tensor_done *d = &s->base.done[i];
        if (!d->done)
            continue;
        if (hooks && hooks->cancel && *hooks->cancel) {
            rc = tv_error_set(err, TV_E_INTERRUPTED, "interrupted");
            goto out;
        }
        if (t->shard != shard) {
            char *path = tv_path_join(s->dir, p->shards->file_names[t->shard]);
            tv_map_close(map);
            map = NULL;
            rc = path ? tv_map_open(path, err, &map) : sink_no_memory(err);
            tv_free(path);
            TV_TRY(rc);
            shard = t->shard;
        }
        if (t->offset > tv_map_bytes(map) ||
            t->bytes > tv_map_bytes(map) - t->offset) {
            rc = tv_error_set(err, TV_E_CORRUPT, "%s has been cut off",
                              tv_map_path(map));
            goto out;
        }
        if (!tv_hash_equal(
                checksum_of(leaves, tv_map_data(map) + t->offset, t->bytes),
                d->checksum)) {
            *d = (struct tvm_tensor_done){.done = false};
            s->base.n_remade++;
        }
        now.n_done++;
        now.bytes_done += t->bytes;
        if (hooks && hooks->progress)
            hooks->progress(hooks->arg, &now);
    }
out:
    tv_hasher_close(leaves);
    tv_map_close(map);
    return rc;
}
