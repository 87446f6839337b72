/* SPDX-License-Identifier: Apache-2.0 */
/*
 * room.h - what a run takes from the quota of its store (private to merge/).
 */
#ifndef TVM_ROOM_H
#define TVM_ROOM_H

#include <stdbool.h>

#include "sink.h"
#include "tv/merge.h"

/* True when OUT holds a finished merge that this plan would leave alone. */
bool tvm_room_is_finished(const struct tvm_plan *p);
/* Counts the output directory against the quota of the store for as long as it
 * is unfinished. *charged: what to give to the second; NULL when there is
 * nothing to count. NOSPACE says how much is missing. */
TV_NODISCARD enum tv_err tvm_room_take(const struct tvm_plan *p,
                                       struct tv_error *err, char **charged);
/* done: the output is finished, hence the user's. */
void tvm_room_give(const struct tvm_plan *p, char *charged, bool done);
/* Bytes of the side files that the store of a merge into it does not have;
 * *bytes owned. */
TV_NODISCARD enum tv_err tvm_room_files(const struct tvm_plan *p,
                                        struct tv_error *err, uint64_t **bytes,
                                        size_t *n);
/* Bytes of tensors that a merge into the store still needs of it; 0 for others.
 */
uint64_t tvm_room_left(const struct tvm_plan *p,
                       const struct tvm_tensor_done *done);
/* The same with what pages, tails and headers may add. */
uint64_t tvm_room_spare(uint64_t bytes);
/* Makes room in the store for what is not done yet of a merge into it, by
 * dropping derived data. */
TV_NODISCARD enum tv_err tvm_room_into(const struct tvm_plan *p,
                                       const struct tvm_tensor_done *done,
                                       struct tv_error *err);
#endif
