/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/stages.h - a file of several recipes, in which one uses the results of
 * others by name (as mergekit-multi).
 *
 * Named documents are stages, the one without a name (else the last one) gives
 * the output. A stage is made in a directory of its own, DIR/NAME, as any
 * merge: journalled, resumable, skipped when it is there already. It goes away
 * as soon as no stage that is left needs it, unless the directory was asked
 * for.
 *
 * Everything is planned before anything is made: a result that does not exist
 * yet is stood in for by its headers and side files, with holes for weights, in
 * a temporary directory. It counts as what its plan says (struct
 * tvm_stage_ref), so plans are the same before and after, and a finished output
 * needs no stage.
 *
 * Thread rule: the stages of a file are used by one thread at a time.
 */
#ifndef TV_STAGES_H
#define TV_STAGES_H

#include "tv/merge.h"

struct tvm_stage {
    const char *name; /* NULL: the output */
    const char *dir;  /* where it is made; NULL: nowhere, or the output */
    struct tvm_plan *plan;
    bool needed; /* false: it is there, or nothing that is left needs it */
    struct tvm_result result;
};
struct tvm_stages {
    struct tvm_stage *items; /* in the order of work, the output last */
    size_t n;
    uint64_t bytes_read, bytes_written; /* of those needed */
    uint64_t peak_scratch_bytes;
    uint64_t peak_disk_bytes; /* of stages and output together */
    void *storage;
};

/* Plans all documents of a file; `first` is borrowed, *out owned
 * (tvm_stages_free). dir: where stages are kept, NULL: beside the output, while
 * needed. Problems of all documents; *out is set unless planning itself fails.
 * A stage without a plan could not be planned for what `problems` says. */
TV_NODISCARD enum tv_err
tvm_stages_make(tvm_recipe *first, const struct tvm_options *o, const char *dir,
                struct tvm_problems *problems, struct tv_error *err,
                struct tvm_stages **out);
/* tvm_run_check of the output and of the stages that are to be made. */
TV_NODISCARD enum tv_err tvm_stages_check(const struct tvm_stages *s,
                                          struct tv_error *err);
/* Makes stage i, those before it being made; fills its result. Plans it again,
 * now with the real inputs. */
TV_NODISCARD enum tv_err tvm_stages_run(struct tvm_stages *s, size_t i,
                                        const struct tvm_run_hooks *hooks,
                                        struct tv_error *err);
/* Where the stages of a merge into `out` stand without a directory of their
 * own: OUT.stages. Owned by the caller (tv_free); NULL: no memory. */
char *tvm_stages_dir(const char *out);
void tvm_stages_free(struct tvm_stages *s); /* NULL allowed */

#endif
