/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sums.h - checksums of linked tensors that a merge has read completely
 * (private to merge/).
 *
 * Linking costs no pass over the data, so the store learns what a linked tensor
 * has by way of checksum from the first merge that reads all of it; whoever
 * reads it later compares. Not in the hash of a plan: a linked tensor counts by
 * its file.
 */
#ifndef TVM_SUMS_H
#define TVM_SUMS_H

#include <stddef.h>

#include "tv/merge.h"

struct tvm_sum {
    uint64_t object_id;
    const char *tensor; /* of the input, borrowed */
    struct tv_hash checksum;
};
struct tvm_sums {
    struct tvm_sum *items;
    size_t n, cap;
};

/* Is a tensor of this input one that gets its checksum so, or has it? */
bool tvm_sums_wanted(const struct tvm_plan *p, const struct tvm_source *s);
/* Compares with the checksum that is known: CORRUPT names input and tensor.
 * One that is not known is kept; without memory for it, it is forgotten. */
TV_NODISCARD enum tv_err tvm_sums_take(struct tvm_sums *sums,
                                       const struct tvm_plan *p,
                                       const struct tvm_source *s,
                                       struct tv_hash checksum,
                                       struct tv_error *err);
/* Notes all in the store, and forgets them. What somebody has removed since is
 * left out. CORRUPT when another process has read other bytes. */
TV_NODISCARD enum tv_err tvm_sums_put(struct tvm_sums *sums, tv_batch *b,
                                      struct tv_error *err);
/* Appends from's to to's and empties it. */
void tvm_sums_move(struct tvm_sums *to, struct tvm_sums *from);
void tvm_sums_free(struct tvm_sums *sums);

#endif
