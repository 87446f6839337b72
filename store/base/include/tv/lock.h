/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/lock.h - who holds a lock file, and telling who waits for it.
 *
 * A lock is a flock on a file; what the file says about its holder is a
 * courtesy and counts for nothing.
 */
#ifndef TV_LOCK_H
#define TV_LOCK_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Called once when a lock is not free and is waited for: what is locked, by
 * whom, and how long that is waited for at most. */
struct tv_wait {
    void (*fn)(void *arg, const char *what, const char *holder,
               unsigned timeout_ms); /* NULL: nobody is told */
    void *arg;
};

/* Writes "PURPOSE (process N)" into a lock file that the caller has locked. */
void tv_lock_sign(int fd, const char *purpose);
/* What its holder wrote, printable; "another process" when nothing. */
void tv_lock_holder(int fd, char *dst, size_t cap);

#ifdef __cplusplus
}
#endif
#endif
