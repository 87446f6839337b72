/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/pool.h - a small pthread pool. Results never depend on its size: callers
 * give each item its own output, and reduce in item order afterwards.
 */
#ifndef TV_POOL_H
#define TV_POOL_H

#include <stddef.h>

#include "tv/error.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tv_pool tv_pool;

/* n_threads >= 1 workers; the calling thread is one of them. */
TV_NODISCARD enum tv_err tv_pool_open(unsigned n_threads, struct tv_error *err,
                                      tv_pool **out);
void tv_pool_close(tv_pool *pool);             /* NULL allowed */
unsigned tv_pool_threads(const tv_pool *pool); /* the caller included */
/* Runs fn(arg, item, worker) for every item in [0, n_items), in no order;
 * returns when all are done. worker < tv_pool_threads. Not reentrant. */
void tv_pool_run(tv_pool *pool, size_t n_items,
                 void (*fn)(void *arg, size_t item, unsigned worker),
                 void *arg);
/* Cores that affinity and the cgroup CPU quota allow; at least 1. */
unsigned tv_cpu_count(void);

#ifdef __cplusplus
}
#endif
#endif
