/* SPDX-License-Identifier: Apache-2.0 */
/*
 * guard_buffer.h - memory between two pages that must not be touched.
 *
 *     | no access |  canary ... data ... canary  | no access |
 *
 * GUARD_AFTER puts the end of the data `offset` bytes before the upper page
 * (0: the next byte faults); GUARD_BEFORE puts its start `offset` bytes after
 * the lower page. The bytes next to the data are a canary pattern, so a stray
 * write that does not fault is seen by guard_buffer_check. One buffer serves
 * many placements; placing does not clear the data.
 */
#ifndef GUARD_BUFFER_H
#define GUARD_BUFFER_H

#include <stddef.h>

enum guard_side { GUARD_AFTER, GUARD_BEFORE };

struct guard_buffer {
    unsigned char *data; /* the current placement */
    size_t n_bytes;
    unsigned char *room; /* everything between the two pages */
    size_t room_bytes;
};

/* Room for placements with n_bytes + offset <= max_bytes. Fails the test when
 * the system has no memory. */
void guard_buffer_open(struct guard_buffer *g, size_t max_bytes);
/* Returns the place for n_bytes; valid until the next placement or close. */
void *guard_buffer_place(struct guard_buffer *g, size_t n_bytes,
                         enum guard_side side, size_t offset);
/* Fails the test when a canary byte next to the data has changed. */
void guard_buffer_check(const struct guard_buffer *g);
void guard_buffer_close(struct guard_buffer *g);

#endif
