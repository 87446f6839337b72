/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/sys.h - the system calls we make, behind a table a test can replace.
 *
 * All folders call the kernel through `tv_sys()->...` so that one fault
 * injector reaches every file operation (LMDB's own calls are behind its seam).
 * The table is set once by tests before any work; production never writes it.
 *
 * Below it: small helpers built on the table (read-only maps with a registry
 * that a SIGBUS handler can ask, whole-file reads, durable renames).
 *
 * Thread rule: a tv_map is immutable but for tv_map_set_extents; registering
 * and describing maps may go on in several threads; files are the caller's to
 * keep apart.
 */
#ifndef TV_SYS_H
#define TV_SYS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <sys/types.h>

#include "tv/error.h"

#ifdef __cplusplus
extern "C" {
#endif

struct tv_sys_table {
    int (*open)(const char *path, int flags, mode_t mode);
    int (*close)(int fd);
    ssize_t (*pread)(int fd, void *buf, size_t n, off_t off);
    ssize_t (*pwrite)(int fd, const void *buf, size_t n, off_t off);
    int (*fstat)(int fd, struct stat *st);
    int (*stat)(const char *path, struct stat *st);
    int (*ftruncate)(int fd, off_t n);
    int (*fallocate)(int fd, int mode, off_t off, off_t n);
    int (*fsync)(int fd);
    int (*fdatasync)(int fd);
    int (*sync_file_range)(int fd, off_t off, off_t n, unsigned flags);
    int (*rename)(const char *from, const char *to);
    int (*unlink)(const char *path);
    int (*mkdir)(const char *path, mode_t mode);
    int (*rmdir)(const char *path);
    void *(*mmap)(void *at, size_t n, int prot, int flags, int fd, off_t off);
    int (*munmap)(void *at, size_t n);
    int (*lstat)(const char *path, struct stat *st);
};

const struct tv_sys_table *tv_sys(void);
/* Tests only: installs another table, NULL restores the real one. */
void tv_sys_replace(const struct tv_sys_table *table);

/* ---- read-only maps ------------------------------------------------------ */

struct tv_extent { /* a named byte range of a mapped file */
    uint64_t offset, bytes;
    const char *name; /* borrowed from whoever owns the extent table */
};

typedef struct tv_map tv_map;

/* Maps a regular file read-only. A zero-length file is legal (data NULL). */
TV_NODISCARD enum tv_err tv_map_open(const char *path, struct tv_error *err,
                                     tv_map **out);
void tv_map_close(tv_map *map); /* NULL allowed */
/* Borrowed until tv_map_close. */
const unsigned char *tv_map_data(const tv_map *map);
uint64_t tv_map_bytes(const tv_map *map);
const char *tv_map_path(const tv_map *map);
/* What fstat said when the file was opened. */
const struct stat *tv_map_stat(const tv_map *map);
/* Names byte ranges for tv_map_describe; `sorted` by offset, borrowed until
 * tv_map_close. */
void tv_map_set_extents(tv_map *map, const struct tv_extent *sorted, size_t n);
/* Registers a map that another library made (LMDB's), for describe only.
 * The label is copied; returns a slot for tv_map_unregister, or -1. */
int tv_map_register(const void *data, uint64_t bytes, const char *label);
void tv_map_unregister(int slot); /* -1: no-op */
/* Async-signal-safe: which registered map holds addr. Writes "FILE" and the
 * extent name (may be NULL) and returns true, or false when none does. */
bool tv_map_describe(const void *addr, const char **file, const char **extent);

/* ---- files --------------------------------------------------------------- */

/* Reads a whole file of at most max_bytes into owned NUL-terminated memory
 * (the NUL is not counted). Larger: TV_E_CORRUPT. Missing: TV_E_INPUT. */
TV_NODISCARD enum tv_err tv_file_read(const char *path, uint64_t max_bytes,
                                      struct tv_error *err, char **data,
                                      size_t *n_bytes);
/* pwrite until done (short writes, EINTR handled). */
TV_NODISCARD enum tv_err tv_pwrite_all(int fd, const void *data, size_t n,
                                       uint64_t off, const char *path,
                                       struct tv_error *err);
/* Writes path via path+".tmp", fsync and rename: the old or the new content is
 * there. Which one is certain after tv_dir_sync of its directory. */
TV_NODISCARD enum tv_err tv_file_replace(const char *path, const void *data,
                                         size_t n, bool do_sync,
                                         struct tv_error *err);
/* The same, with the fsync of the directory. */
TV_NODISCARD enum tv_err tv_file_write_atomic(const char *path,
                                              const void *data, size_t n,
                                              bool do_sync,
                                              struct tv_error *err);
/* fsync of a directory. */
TV_NODISCARD enum tv_err tv_dir_sync(const char *path, struct tv_error *err);
/* mkdir -p; an existing directory is fine, names that are new are durable. */
TV_NODISCARD enum tv_err tv_dir_make(const char *path, struct tv_error *err);
/* rm -r of a directory that we own; missing is fine. Does not follow links. */
TV_NODISCARD enum tv_err tv_dir_remove(const char *path, struct tv_error *err);
/* Sorted names in a directory ("." and ".." left out), owned array of owned
 * strings, released by tv_dir_list_free. */
TV_NODISCARD enum tv_err tv_dir_list(const char *path, struct tv_error *err,
                                     char ***names, size_t *n);
void tv_dir_list_free(char **names, size_t n);
/* As stat sees it: links are followed, what cannot be looked at is not there.
 */
bool tv_path_exists(const char *path);
bool tv_path_is_dir(const char *path);
/* The path, or the nearest one upwards that exists, owned; NULL when out of
 * memory. */
char *tv_path_existing(const char *path);
/* A path that is there and is written almost like this one, which is not; owned
 * or NULL. */
char *tv_path_suggest(const char *path);
/* Gives an error a hint with that path, if there is one. */
void tv_error_hint_path(struct tv_error *err, const char *path);
/* dir/name, owned; NULL when out of memory. */
char *tv_path_join(const char *dir, const char *name);
/* Can files be made in this directory, as far as can be told without making
 * one? INPUT with the reason when not. */
TV_NODISCARD enum tv_err tv_dir_check_writable(const char *path,
                                               struct tv_error *err);
/* Free bytes a non-root user may use on path's file system. */
TV_NODISCARD enum tv_err tv_disk_free(const char *path, uint64_t *bytes,
                                      struct tv_error *err);
/* Bytes allocated on disk (st_blocks) by a directory tree; missing is 0. */
TV_NODISCARD enum tv_err tv_disk_used(const char *path, uint64_t *bytes,
                                      struct tv_error *err);

#ifdef __cplusplus
}
#endif
#endif
