/* SPDX-License-Identifier: Apache-2.0 */
/*
 * state.h - the JSON documents of a merge: the journal's state of an unfinished
 * one and OUT/tvmerge.json of a finished one (private to merge/).
 */
#ifndef TVM_STATE_H
#define TVM_STATE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "sink.h"
#include "tv/merge.h"

struct tvm_state { /* owned: tvm_state_free */
    struct tv_hash plan_hash;
    uint64_t n_tensors, bytes_total;
    bool publishing;   /* shards are being moved to their final place */
    bool replace;      /* made with --force over other files */
    char *identity;    /* JSON */
    char *calibration; /* JSON of calibration_state.h; NULL: none yet */
    struct tvm_device device;
};
/* Owned text (tv_free), or NULL when out of memory. */
char *tvm_state_make(const struct tvm_plan *p, bool publishing, bool replace,
                     const char *calibration);
/* CORRUPT when it is not such a document, UNSUPPORTED when newer. */
TV_NODISCARD enum tv_err tvm_state_parse(const char *text, size_t n,
                                         struct tvm_state *out,
                                         struct tv_error *err);
void tvm_state_free(struct tvm_state *s);

struct tvm_record_file {
    const char *name;
    uint64_t bytes;
};
struct tvm_record { /* owned: tvm_record_free */
    struct tv_hash plan_hash;
    struct tvm_totals totals;
    uint64_t n_tensors, bytes_total, seed;
    struct tvm_device device;
    struct tvm_record_file *files;
    size_t n_files;
    char *identity;
    char *calibration; /* as of tvm_state, without what only a journal needs */
    void *storage;
};
char *tvm_record_make(const struct tvm_plan *p, const struct tvm_totals *totals,
                      const char *calibration,
                      const struct tvm_record_file *files, size_t n_files);
TV_NODISCARD enum tv_err tvm_record_parse(const char *text, size_t n,
                                          struct tvm_record *out,
                                          struct tv_error *err);
void tvm_record_free(struct tvm_record *r);
/* What an object of a store was made of; *found false for one that is no merge,
 * or has a record that is not readable. */
#define TVM_RECORD_FILE "tvmerge.json"
TV_NODISCARD enum tv_err tvm_record_of(tv_read *r, const struct tv_object *o,
                                       bool *found, struct tvm_record *out,
                                       struct tv_error *err);

/* Do two identities differ in the BLAS core type or the device, and in nothing
 * else? */
bool tvm_identity_numerics(const char *before, const char *after);
/* Is what was begun the same merge, but on another BLAS core type or device?
 * *differs says so. Where the plan accepts that, it becomes the earlier one and
 * the result is true. */
bool tvm_identity_accept(struct tvm_plan *p, struct tv_hash hash,
                         const char *identity, bool *differs);
/* For the hint of a refusal. */
#define TVM_NUMERICS_HINT                                                      \
    "run it where the earlier one ran, or with --accept-numerics: bytes may "  \
    "then differ in their last bits"
/* What differs between two identities, as a phrase for an error message:
 * "seed was 0, is 1; input 'X' has changed". Returns dst. */
char *tvm_identity_difference(const char *before, const char *after, char *dst,
                              size_t cap);
#endif
