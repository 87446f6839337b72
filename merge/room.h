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
/* Bytes on disk of the output and its journal, as planned. */
uint64_t tvm_room_output(const struct tvm_plan *p);
/* Bytes of the output of a merge into a store that the store has already, of an
 * interrupted run or of a finished one (then all: UINT64_MAX). */
uint64_t tvm_room_there(const struct tvm_plan *p);
/* What is still to come into the store: planning admits it and a run takes it,
 * so that what is planned can be run. */
uint64_t tvm_room_inside(const struct tvm_plan *p);
/* Of a merge into the store what derived data must leave room for: tensors that
 * are not done, or `bytes` of them, the record that comes last, and what pages
 * and headers may add. 0 for others. */
uint64_t tvm_room_left(const struct tvm_plan *p,
                       const struct tvm_tensor_done *done);
uint64_t tvm_room_rest(const struct tvm_plan *p, uint64_t bytes);
/* Makes room in the store for what is still to come into it, by dropping
 * derived data. */
TV_NODISCARD enum tv_err tvm_room_into(const struct tvm_plan *p,
                                       struct tv_error *err);
#endif
