/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tmpdir.h - scratch directories for tests, under TMPDIR or the system's.
 *
 * A directory that a failed test leaves behind is removed when the program
 * ends (not in children that it forked). TV_TEST_KEEP=1 keeps all of them.
 */
#ifndef TMPDIR_H
#define TMPDIR_H

#include <stddef.h>

/* A new empty directory; the path is released by tmpdir_remove. */
char *tmpdir_make(void);
/* Removes the directory with all in it, and releases the path. NULL allowed. */
void tmpdir_remove(char *path);
/* Writes dir/name; returns its path, owned (tv_free). */
char *tmpdir_write(const char *dir, const char *name, const void *data,
                   size_t n_bytes);

#endif
