/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exec.h - runs the tensors of a plan over worker threads, tile by tile
 * (private to merge/).
 */
#ifndef TVM_EXEC_H
#define TVM_EXEC_H

#include <stdbool.h>
#include <stdint.h>

#include "sink.h"
#include "tv/merge.h"

/* Most bytes of heap that running the plan takes. *fits is false when even one
 * worker with the smallest tiles needs more than options.memory_bytes; *needed
 * is then (and otherwise too) the least that would do. */
uint64_t tvm_exec_scratch(const struct tvm_plan *p, bool *fits,
                          uint64_t *needed);

/* The same of a whole run (run.c): of that, and of what goes before it. */
uint64_t tvm_run_scratch(const struct tvm_plan *p, bool *fits,
                         uint64_t *needed);

struct tvm_exec_stats {
    uint64_t bytes_read, bytes_written; /* by this run */
    double t_read, t_compute, t_write, t_sync;
    struct tvm_cache_use cache;
    struct tvm_calibration_use calibration;
};
struct tvm_cache;
struct tvm_calibrated;

/* A plan for running some of its tensors while others hold memory: *part is a
 * copy that shares everything but the options. Returns how much of the budget
 * these may hold. */
uint64_t tvm_exec_part_plan(const struct tvm_plan *p, struct tvm_plan *part);
/* Runs what an unordered sink has not, with masks as they are now; nothing goes
 * into the store or into progress. Of a part plan. */
TV_NODISCARD enum tv_err
tvm_exec_part(struct tvm_plan *part, struct tvm_sink *sink,
              struct tvm_cache *cache, struct tvm_calibrated *calibrated,
              const struct tvm_run_hooks *hooks, struct tv_error *err);

/* Does what the sink does not have yet. INTERRUPTED after hooks->cancel; on any
 * error what was finished before is committed first. */
TV_NODISCARD enum tv_err tvm_exec(struct tvm_plan *p, struct tvm_sink *sink,
                                  const struct tvm_run_hooks *hooks,
                                  struct tvm_exec_stats *stats,
                                  struct tv_error *err);
#endif
