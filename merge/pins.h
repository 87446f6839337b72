/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pins.h - what an unfinished merge keeps from removal (private to merge/).
 */
#ifndef TVM_PINS_H
#define TVM_PINS_H

#include "tv/merge.h"

/* Pins every object of options.store that the plan reads. */
TV_NODISCARD enum tv_err tvm_pins_add(tv_batch *b, const char *run,
                                      const struct tvm_plan *p,
                                      struct tv_error *err);
/* The same for a merge into the directory `out`, in a batch of its own that
 * replaces the pins of an earlier plan there. *run is then the run that holds
 * them (owned, tv_free), NULL when there is nothing to pin or the store cannot
 * be written to. */
TV_NODISCARD enum tv_err tvm_pins_put(const struct tvm_plan *p, const char *out,
                                      struct tv_error *err, char **run);
/* The directory (owned, tv_free) of a run of tvm_pins_put that still holds that
 * merge, and how far it is; NULL when it does not. */
TV_NODISCARD enum tv_err tvm_pins_dir(tv_read *r, const char *run,
                                      struct tvm_status *status, char **dir,
                                      struct tv_error *err);
/* What a failure leaves is stale, and tvm_runs_sweep drops it. */
TV_NODISCARD enum tv_err tvm_pins_drop(tv_store *store, const char *run,
                                       struct tv_error *err);
#endif
