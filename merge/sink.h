/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sink.h - where merged tensors go (private to merge/).
 *
 * Two sinks: a directory (sink.c) whose shards are written in place at any
 * offset by any worker, and an object of a store (sink_into.c) whose chunks are
 * written in order by one thread. Both know what an earlier, interrupted run
 * has finished, and make groups of tensors durable together with the record
 * that says so.
 *
 * Life: open (locks, resumes or prepares, reserves the space) - write,
 * end_tensor, commit - finish when all tensors are done - close.
 */
#ifndef TVM_SINK_H
#define TVM_SINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "sums.h"
#include "tv/merge.h"

struct tvm_tensor_done {
    bool done;
    bool resumed; /* an earlier run did it */
    struct tv_hash checksum;
    uint64_t n_nonfinite_in, n_nonfinite_out;
};

struct tvm_totals { /* what a finished merge says about itself */
    struct tv_hash digest;
    uint64_t n_nonfinite_in, n_nonfinite_out;
};

struct tvm_sink;

struct tvm_sink_ops {
    /* Puts the side files, once there is room; NULL: they come last. Before
     * anything else; one thread. */
    enum tv_err (*files)(struct tvm_sink *s, struct tv_error *err);
    /* Bytes [off, off + n) of tensor t. Any thread; with `ordered`: the writer
     * thread only, tensor after tensor in the order of their start, bytes in
     * order. */
    enum tv_err (*write)(struct tvm_sink *s, size_t t, uint64_t off,
                         const void *data, size_t n, struct tv_error *err);
    /* Ordered sinks: all bytes are there. Writer thread. */
    enum tv_err (*end_tensor)(struct tvm_sink *s, size_t t,
                              const struct tv_hash *leaves, size_t n_leaves,
                              struct tv_error *err);
    /* Makes tensors [n] durable and recorded. Writer thread. */
    enum tv_err (*commit)(struct tvm_sink *s, const size_t *tensors, size_t n,
                          struct tv_error *err);
    /* Makes what calibration has come to (JSON of calibration_state.h) part of
     * the journal. Before the first tensor; one thread. */
    enum tv_err (*note)(struct tvm_sink *s, const char *calibration,
                        struct tv_error *err);
    /* Publishes. One thread, after all tensors are committed. */
    enum tv_err (*finish)(struct tvm_sink *s, const struct tvm_totals *totals,
                          struct tv_error *err);
    void (*close)(struct tvm_sink *s);
};

struct tvm_sink {
    const struct tvm_sink_ops *ops;
    struct tvm_plan *plan;
    bool ordered;
    bool stopping;                /* set before the last commit of a run that
                                     ends early: what is half done is lost */
    uint64_t commit_bytes;        /* group size that is worth a commit */
    bool busy;                    /* has a batch of the plan's store open */
    struct tvm_tensor_done *done; /* [plan->n_tensors] */
    size_t n_remade;              /* tensors of an earlier run whose bytes are
                                     not what it wrote: to be made again */
    bool already_done;            /* the same merge is complete */
    struct tvm_totals totals;     /* of it */
    char *calibration;            /* owned: noted last; NULL: never */
    struct tvm_sums *sums;        /* for the next commit, into a store */
};

/* Going on with an earlier run reads what that has finished: hooks as those of
 * tvm_run. */
TV_NODISCARD enum tv_err tvm_sink_dir_open(struct tvm_plan *plan,
                                           const struct tvm_run_hooks *hooks,
                                           struct tv_error *err,
                                           struct tvm_sink **out);
/* What opening would refuse, without waiting for anybody or changing anything:
 * LOCKED at once when another run is at work there. */
TV_NODISCARD enum tv_err tvm_sink_dir_check(struct tvm_plan *plan,
                                            struct tv_error *err);
TV_NODISCARD enum tv_err tvm_sink_into_check(struct tvm_plan *plan,
                                             struct tv_error *err);
TV_NODISCARD enum tv_err tvm_sink_into_open(struct tvm_plan *plan,
                                            struct tv_error *err,
                                            struct tvm_sink **out);
void tvm_sink_close(struct tvm_sink *s); /* NULL allowed */

/* What a merge into an object holds the lock of the store for. */
#define TVM_PURPOSE_MAX 160u
void tvm_into_purpose(const char *name, char dst[TVM_PURPOSE_MAX]);
#endif
