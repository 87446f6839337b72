/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sink_dir.h - what the files of a merge into a directory share (private to
 * them).
 *
 *   sink.c          opening: what is there, and whether it may be gone on with
 *   sink_files.c    small file operations in OUT
 *   sink_lock.c     one run at a time
 *   sink_journal.c  the state of the run; what an earlier one has finished
 *   sink_shards.c   weights: shards in the making, groups made durable
 *   sink_publish.c  the end: shards, side files and record take their places
 *
 * One thread, but for writes, of which any worker makes any.
 */
#ifndef TVM_SINK_DIR_H
#define TVM_SINK_DIR_H

#include <pthread.h>

#include "sink.h"
#include "state.h"

#define SINK_LOCK_FILE   "lock"
#define SINK_JOURNAL_DIR "journal"
#define SINK_PREVIOUS    "previous.json"
#define SINK_RECORD_FILE "tvmerge.json"
#define SINK_CONFIG_FILE "config.json"
#define SINK_RUN_ID      "run" /* in the journal */
#define SINK_RECORD_MAX  (64u << 20)

struct sink_dir {
    struct tvm_sink base;
    char *out, *dir; /* OUT and OUT/.tvmerge */
    int lock_fd;
    tv_store *journal;
    bool made_out; /* OUT did not exist before */
    bool fresh;    /* nothing of value yet: undo on failure */
    bool replace, publishing;
    bool add_config; /* complete but for config.json */
    bool sync;
    char *pins;            /* run of the store that holds our inputs, or NULL */
    pthread_mutex_t mutex; /* guards opening of fd */
    int *fd;               /* [n_shards], -1: closed */
    bool *touched;         /* [n_shards] since the last sync */
    size_t *n_left;        /* [n_shards] tensors not committed */
};

static inline size_t sink_n_shards(const struct sink_dir *s)
{
    return s->base.plan->shards ? s->base.plan->shards->n : 0;
}

static inline struct sink_dir *sink_dir_of(struct tvm_sink *s)
{
    return (struct sink_dir *)(void *)s;
}

static inline enum tv_err sink_no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory");
}

/* ---- sink_files.c -------------------------------------------------------- */

/* Size of a regular file, or -1. */
int64_t sink_file_bytes(const char *dir, const char *name);
/* Is it there? A disk that fails must not be taken for an empty directory. */
TV_NODISCARD enum tv_err sink_probe(const char *dir, const char *name,
                                    bool *found, struct tv_error *err);
/* Replaces what is there. */
TV_NODISCARD enum tv_err sink_rename(const char *from_dir, const char *from,
                                     const char *to_dir, const char *to,
                                     struct tv_error *err);
/* Missing is fine. */
TV_NODISCARD enum tv_err sink_remove(const char *dir, const char *name,
                                     struct tv_error *err);
/* Before anything that makes OUT less than a model (or less than the adapter
 * that it was): what loads it must not find it, also after a power cut. */
TV_NODISCARD enum tv_err sink_remove_config(struct sink_dir *s,
                                            struct tv_error *err);
/* Everything in OUT/.tvmerge but the lock that we hold and `keep`. */
TV_NODISCARD enum tv_err sink_clear_state(struct sink_dir *s, const char *keep,
                                          struct tv_error *err);

/* ---- sink_lock.c --------------------------------------------------------- */

/* Takes the lock, as long as the plan lets it wait. LOCKED, INTERRUPTED. */
TV_NODISCARD enum tv_err sink_lock(struct sink_dir *s,
                                   const struct tvm_run_hooks *hooks,
                                   struct tv_error *err);
/* LOCKED while another run holds OUT. */
TV_NODISCARD enum tv_err sink_check_lock(const struct sink_dir *s,
                                         struct tv_error *err);

/* ---- sink_journal.c ------------------------------------------------------ */

/* Writes the state of the run into a journal, durably with options.sync. */
TV_NODISCARD enum tv_err sink_put_state(struct sink_dir *s, tv_store *store,
                                        struct tv_error *err);
/* The journal appears under its name with its state inside or not at all. */
TV_NODISCARD enum tv_err sink_make_journal(struct sink_dir *s,
                                           struct tv_error *err);
/* CORRUPT: what is there is no journal. */
TV_NODISCARD enum tv_err sink_open_journal(struct sink_dir *s, bool read_only,
                                           struct tv_error *err);
/* Takes over what an earlier run of the same plan has done. CHANGED when it was
 * another plan. */
TV_NODISCARD enum tv_err sink_read_journal(struct sink_dir *s,
                                           struct tv_error *err);
/* Marks the tensors of the journal whose shard is there. */
TV_NODISCARD enum tv_err
sink_read_done(struct sink_dir *s, const bool *shard_ok, struct tv_error *err);
/* Are the bytes that the journal calls finished the ones it has checksums of?
 * A disk may have turned one, and no later step would look at them again. What
 * is not is made again. */
TV_NODISCARD enum tv_err sink_recheck(struct sink_dir *s,
                                      const struct tvm_run_hooks *hooks,
                                      struct tv_error *err);

/* struct tvm_sink_ops */
TV_NODISCARD enum tv_err sink_dir_note(struct tvm_sink *sink,
                                       const char *calibration,
                                       struct tv_error *err);

/* ---- sink_shards.c ------------------------------------------------------- */

/* Makes the shards that are not there; ok[i] tells which were. */
TV_NODISCARD enum tv_err sink_prepare_shards(struct sink_dir *s, bool *ok,
                                             struct tv_error *err);
/* Makes all shards durable, and closes them. */
TV_NODISCARD enum tv_err sink_sync_shards(struct sink_dir *s,
                                          struct tv_error *err);

/* struct tvm_sink_ops */
TV_NODISCARD enum tv_err sink_dir_write(struct tvm_sink *sink, size_t t,
                                        uint64_t off, const void *data,
                                        size_t n, struct tv_error *err);
TV_NODISCARD enum tv_err sink_dir_commit(struct tvm_sink *sink,
                                         const size_t *tensors, size_t n,
                                         struct tv_error *err);

/* ---- sink_publish.c ------------------------------------------------------ */

/* Last of all: config.json makes OUT a model. */
TV_NODISCARD enum tv_err sink_write_config(struct sink_dir *s,
                                           struct tv_error *err);

/* struct tvm_sink_ops */
TV_NODISCARD enum tv_err sink_dir_finish(struct tvm_sink *sink,
                                         const struct tvm_totals *totals,
                                         struct tv_error *err);

#endif
