/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sink_shards.c - the weights of a merge into a directory: files of their final
 * size in OUT/.tvmerge, written at any offset by any worker, and groups of
 * tensors made durable: data first, then the records that say so.
 */
#include "sink_dir.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>

#include "tv/alloc.h"
#include "tv/sys.h"

static enum tv_err shard_fd(struct sink_dir *s, size_t shard, int *fd,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = NULL;

    (void)pthread_mutex_lock(&s->mutex);
    if (s->fd[shard] < 0) {
        path = tv_path_join(s->dir, s->base.plan->shards->file_names[shard]);
        s->fd[shard] = path ? tv_sys()->open(path, O_RDWR, 0) : -1;
        if (!path)
            rc = sink_no_memory(err);
        else if (s->fd[shard] < 0)
            rc = tv_error_sys(err, errno, "cannot open %s", path);
    }
    s->touched[shard] = true;
    *fd = s->fd[shard];
    (void)pthread_mutex_unlock(&s->mutex);
    tv_free(path);
    return rc;
}

static enum tv_err close_shard(struct sink_dir *s, size_t shard,
                               struct tv_error *err)
{
    const int fd = s->fd[shard];

    s->fd[shard] = -1;
    if (fd >= 0 && tv_sys()->close(fd) != 0)
        return tv_error_sys(err, errno, "cannot write %s",
                            s->base.plan->shards->file_names[shard]);
    return TV_OK;
}

/* Opens a shard in the making, at its whole size with its header. The header of
 * one that is there already is written again: a power cut may have kept the
 * size and lost it. */
static enum tv_err make_shard(struct sink_dir *s, size_t i, bool is_there,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_shards *shards = s->base.plan->shards;
    char *path = tv_path_join(s->dir, shards->file_names[i]);
    const uint64_t bytes = shards->file_bytes[i];
    int fd = -1;

    if (!path) {
        rc = sink_no_memory(err);
        goto out;
    }
    fd =
        tv_sys()->open(path, O_RDWR | O_CREAT | (is_there ? 0 : O_TRUNC), 0666);
    if (fd < 0) {
        rc = tv_error_sys(err, errno, "cannot create %s", path);
        goto out;
    }
    if (!is_there && bytes > 0 &&
        tv_sys()->fallocate(fd, 0, 0, (off_t)bytes) != 0) {
        /* Not every file system can; then a full disk shows later. */
        if (errno != EOPNOTSUPP && errno != ENOSYS) {
            rc = tv_error_sys(err, errno,
                              "cannot reserve %" PRIu64 " bytes for %s", bytes,
                              path);
            goto out;
        }
        if (tv_sys()->ftruncate(fd, (off_t)bytes) != 0) {
            rc = tv_error_sys(err, errno, "cannot extend %s", path);
            goto out;
        }
    }
    rc = tv_pwrite_all(fd, shards->headers[i], shards->header_bytes[i], 0, path,
                       err);
out:
    if (fd >= 0 && tv_sys()->close(fd) != 0 && rc == TV_OK)
        rc = tv_error_sys(err, errno, "cannot write %s", path);
    tv_free(path);
    return rc;
}

enum tv_err sink_prepare_shards(struct sink_dir *s, bool *ok,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_shards *shards = s->base.plan->shards;
    bool made = false;

    for (size_t i = 0; i < sink_n_shards(s); i++) {
        const char *name = shards->file_names[i];
        const int64_t bytes = (int64_t)shards->file_bytes[i];
        ok[i] = sink_file_bytes(s->dir, name) == bytes;
        if (!ok[i] && s->publishing && sink_file_bytes(s->out, name) == bytes) {
            TV_TRY(sink_remove_config(s, err));
            TV_TRY(sink_rename(s->out, name, s->dir, name, err));
            ok[i] = true;
        }
        made = made || !ok[i];
        TV_TRY(make_shard(s, i, ok[i], err));
    }
    if (made && s->sync)
        rc = tv_dir_sync(s->dir, err);
out:
    return rc;
}

enum tv_err sink_dir_write(struct tvm_sink *sink, size_t t, uint64_t off,
                           const void *data, size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct sink_dir *s = sink_dir_of(sink);
    const struct tvm_tensor *tensor = &sink->plan->tensors[t];
    const uint64_t at = tensor->offset + off;
    int fd = -1;

    TV_TRY(shard_fd(s, tensor->shard, &fd, err));
    TV_TRY(tv_pwrite_all(fd, data, n, at,
                         sink->plan->shards->file_names[tensor->shard], err));
    /* Only a hint, so that the later fdatasync has little left to do. */
    if (s->sync)
        (void)tv_sys()->sync_file_range(fd, (off_t)at, (off_t)n,
                                        SYNC_FILE_RANGE_WRITE);
out:
    return rc;
}

static enum tv_err sync_touched(struct sink_dir *s, struct tv_error *err)
{
    for (size_t i = 0; i < sink_n_shards(s); i++) {
        (void)pthread_mutex_lock(&s->mutex);
        const bool touched = s->touched[i];
        const int fd = s->fd[i];
        s->touched[i] = false;
        (void)pthread_mutex_unlock(&s->mutex);
        if (touched && s->sync && tv_sys()->fdatasync(fd) != 0)
            return tv_error_sys(err, errno, "cannot write %s to disk",
                                s->base.plan->shards->file_names[i]);
    }
    return TV_OK;
}

enum tv_err sink_dir_commit(struct tvm_sink *sink, const size_t *tensors,
                            size_t n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct sink_dir *s = sink_dir_of(sink);
    tv_batch *b = NULL;

    TV_TRY(sync_touched(s, err));
    TV_TRY(tv_batch_begin(s->journal, !s->sync, err, &b));
    for (size_t i = 0; i < n; i++) {
        const struct tvm_tensor *t = &sink->plan->tensors[tensors[i]];
        const struct tvm_tensor_done *d = &sink->done[tensors[i]];
        const struct tv_done done = {
            .name = t->name,
            .shard = t->shard,
            .offset = t->offset,
            .bytes = t->bytes,
            .checksum = d->checksum,
            .n_nonfinite_in = d->n_nonfinite_in,
            .n_nonfinite_out = d->n_nonfinite_out,
        };
        TV_TRY(tv_done_put(b, SINK_RUN_ID, &done, err));
    }
    rc = tv_batch_commit(b, err);
    b = NULL;
    for (size_t i = 0; rc == TV_OK && i < n; i++) {
        const size_t shard = sink->plan->tensors[tensors[i]].shard;
        if (--s->n_left[shard] == 0)
            rc = close_shard(s, shard, err);
    }
out:
    tv_batch_abort(b);
    return rc;
}

enum tv_err sink_sync_shards(struct sink_dir *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    int fd = -1;

    for (size_t i = 0; i < sink_n_shards(s); i++) {
        TV_TRY(shard_fd(s, i, &fd, err));
        if (s->sync && tv_sys()->fdatasync(fd) != 0) {
            rc = tv_error_sys(err, errno, "cannot write %s to disk",
                              s->base.plan->shards->file_names[i]);
            goto out;
        }
        TV_TRY(close_shard(s, i, err));
    }
out:
    return rc;
}
