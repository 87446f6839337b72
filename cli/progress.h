/* SPDX-License-Identifier: Apache-2.0 */
/*
 * progress.h - how far long work is, on stderr.
 *
 * A reporter thread prints on its own clock, so a tensor that takes a minute
 * does not look like a hang and SIGUSR1 is answered at once.
 */
#ifndef TVC_PROGRESS_H
#define TVC_PROGRESS_H

#include <stdint.h>

#include "print.h"

struct tvc_progress;

/* verb: "merge", "import". unit: "tensors", or NULL when only bytes count.
 * NULL when there is no memory or thread for it: all functions take that. */
struct tvc_progress *tvc_progress_begin(struct tvc_print *p, const char *verb,
                                        const char *unit);
void tvc_progress_set(struct tvc_progress *g, uint64_t items,
                      uint64_t items_total, uint64_t bytes,
                      uint64_t bytes_total);
/* Stops the thread and takes the bar away. */
void tvc_progress_end(struct tvc_progress *g);

double tvc_seconds(void); /* monotonic */
/* The field of /proc/self/status ("VmRSS", "VmHWM") in bytes; 0: unknown. */
uint64_t tvc_memory(const char *field);

#endif
