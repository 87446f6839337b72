/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hash_ahead.h - checksums of the tensors that an import comes to next
 * (private).
 *
 * A store commits in one thread, which waits for the disk or copies. Meanwhile
 * another one reads and hashes the next tensor, at most one ahead. Nothing
 * depends on how far it came: what it has not begun, the import hashes itself.
 */
#ifndef TV_HASH_AHEAD_H
#define TV_HASH_AHEAD_H

#include "tv/format.h"
#include "tv/hash.h"

struct tv_hash_ahead;

/* Calls fn(arg, ahead) in this thread, with a helper beside it that hashes
 * the tensors todo[0..n_todo) of a model in files, in this order. Returns what
 * fn returned. Where no helper is worth it (one core, little to read, a model
 * of a store, whose tensors have their checksums) `ahead` is NULL. */
typedef enum tv_err (*tv_hash_ahead_fn)(void *arg, struct tv_hash_ahead *ahead);
TV_NODISCARD enum tv_err tv_hash_ahead_run(tv_input *in, const size_t *todo,
                                           size_t n_todo, tv_hash_ahead_fn fn,
                                           void *arg, struct tv_error *err);
/* Leaves of tensor todo[k], borrowed until the next call; NULL when nobody has
 * begun with it, or `ahead` is NULL. k grows from call to call. */
const struct tv_hash *tv_hash_ahead_take(struct tv_hash_ahead *ahead, size_t k);

#endif
