/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sink_publish.c - the end of a merge into a directory (steps 4 to 9 of
 * sink.c): what loads a model finds nothing in OUT, or all of it.
 */
#include "sink_dir.h"

#include <errno.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/sys.h"

#define INDEX_FILE "model.safetensors.index.json"

static bool is_ours(const struct tvm_plan *p, const char *name)
{
    for (size_t i = 0; i < p->shards->n; i++)
        if (strcmp(p->shards->file_names[i], name) == 0)
            return true;
    for (size_t i = 0; i < p->n_files; i++)
        if (strcmp(p->files[i].name, name) == 0)
            return true;
    return p->shards->index_json && strcmp(name, INDEX_FILE) == 0;
}

/* What --force replaces: files that the earlier merge made, weights of whatever
 * model was there, and its config.json first of all. */
static enum tv_err remove_stale(struct sink_dir *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;
    struct tvm_record old = {.n_files = 0};
    char *path = tv_path_join(s->dir, SINK_PREVIOUS);
    char *text = NULL;
    char **names = NULL;
    size_t n_names = 0;
    size_t n = 0;

    if (!path) {
        rc = sink_no_memory(err);
        goto out;
    }
    TV_TRY(sink_remove_config(s, err));
    TV_TRY(sink_remove(s->out, INDEX_FILE, err));
    if (tv_path_exists(path)) {
        TV_TRY(tv_file_read(path, SINK_RECORD_MAX, err, &text, &n));
        /* A damaged list is no reason to stop: it only says what to tidy. */
        if (tvm_record_parse(text, n, &old, NULL) != TV_OK)
            old.n_files = 0;
    }
    for (size_t i = 0; i < old.n_files; i++)
        if (!is_ours(p, old.files[i].name))
            TV_TRY(sink_remove(s->out, old.files[i].name, err));
    TV_TRY(tv_dir_list(s->out, err, &names, &n_names));
    for (size_t i = 0; i < n_names; i++)
        if (tv_out_is_weights(names[i]) && !is_ours(p, names[i]))
            TV_TRY(sink_remove(s->out, names[i], err));
out:
    tv_dir_list_free(names, n_names);
    tvm_record_free(&old);
    tv_free(text);
    tv_free(path);
    return rc;
}

/* A file of OUT; its name is durable after the next sync of OUT. */
static enum tv_err replace_file(struct sink_dir *s, const char *name,
                                const char *data, size_t n,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(s->out, name);

    if (!path)
        return sink_no_memory(err);
    rc = tv_file_replace(path, data, n, s->sync, err);
    tv_free(path);
    return rc;
}

static enum tv_err write_file(struct sink_dir *s, const char *name,
                              const char *data, size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    TV_TRY(replace_file(s, name, data, n, err));
    if (s->sync)
        rc = tv_dir_sync(s->out, err);
out:
    return rc;
}

static enum tv_err write_side_files(struct sink_dir *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;

    if (p->shards->index_json)
        TV_TRY(replace_file(s, INDEX_FILE, p->shards->index_json,
                            p->shards->index_bytes, err));
    for (size_t i = 0; i < p->n_files; i++) {
        const struct tvm_side_file *f = &p->files[i];
        if (strcmp(f->name, SINK_CONFIG_FILE) != 0)
            TV_TRY(replace_file(s, f->name, f->data, f->n, err));
    }
    if (s->sync)
        rc = tv_dir_sync(s->out, err);
out:
    return rc;
}

enum tv_err sink_write_config(struct sink_dir *s, struct tv_error *err)
{
    const struct tvm_plan *p = s->base.plan;

    for (size_t i = 0; i < p->n_files; i++)
        if (strcmp(p->files[i].name, SINK_CONFIG_FILE) == 0)
            return write_file(s, SINK_CONFIG_FILE, p->files[i].data,
                              p->files[i].n, err);
    return TV_OK;
}

static enum tv_err write_record(struct sink_dir *s,
                                const struct tvm_totals *totals,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_plan *p = s->base.plan;
    struct tvm_record_file *files = NULL;
    char *text = NULL;
    size_t n = 0;

    files = tv_calloc(p->shards->n + p->n_files + 1, sizeof *files);
    if (!files) {
        rc = sink_no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < p->shards->n; i++)
        files[n++] = (struct tvm_record_file){p->shards->file_names[i],
                                              p->shards->file_bytes[i]};
    if (p->shards->index_json)
        files[n++] =
            (struct tvm_record_file){INDEX_FILE, p->shards->index_bytes};
    for (size_t i = 0; i < p->n_files; i++)
        files[n++] = (struct tvm_record_file){p->files[i].name, p->files[i].n};
    text = tvm_record_make(p, totals, s->base.calibration, files, n);
    if (!text) {
        rc = sink_no_memory(err);
        goto out;
    }
    rc = write_file(s, SINK_RECORD_FILE, text, strlen(text), err);
out:
    tv_free(text);
    tv_free(files);
    return rc;
}

enum tv_err sink_dir_finish(struct tvm_sink *sink,
                            const struct tvm_totals *totals,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct sink_dir *s = sink_dir_of(sink);
    const struct tv_shards *shards = sink->plan->shards;

    TV_TRY(sink_sync_shards(s, err));
    s->publishing = true;
    TV_TRY(sink_put_state(s, s->journal, err));
    if (s->replace)
        TV_TRY(remove_stale(s, err));
    for (size_t i = 0; i < sink_n_shards(s); i++)
        TV_TRY(sink_rename(s->dir, shards->file_names[i], s->out,
                           shards->file_names[i], err));
    if (s->sync) {
        TV_TRY(tv_dir_sync(s->dir, err));
        TV_TRY(tv_dir_sync(s->out, err));
    }
    TV_TRY(write_side_files(s, err));
    TV_TRY(write_record(s, totals, err));
    tv_store_close(s->journal);
    s->journal = NULL;
    TV_TRY(tv_dir_remove(s->dir, err));
    rc = sink_write_config(s, err);
out:
    return rc;
}
