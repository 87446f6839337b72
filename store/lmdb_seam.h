/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lmdb_seam.h - every mdb_* function that we call, behind a table.
 *
 * A test replaces the table to make call N fail (tests/store/test_faults.c).
 * Production never writes it. No other file of this folder includes lmdb.h or
 * names an mdb_ function.
 */
#ifndef TV_LMDB_SEAM_H
#define TV_LMDB_SEAM_H

#include <stdbool.h>

#include <lmdb.h>

#include "tv/error.h"

struct tv_lmdb_table {
    int (*env_create)(MDB_env **env);
    int (*env_open)(MDB_env *env, const char *path, unsigned flags,
                    mdb_mode_t mode);
    void (*env_close)(MDB_env *env);
    int (*env_sync)(MDB_env *env, int force);
    int (*env_copyfd2)(MDB_env *env, mdb_filehandle_t fd, unsigned flags);
    int (*env_set_flags)(MDB_env *env, unsigned flags, int on);
    int (*env_set_mapsize)(MDB_env *env, size_t bytes);
    int (*env_set_maxdbs)(MDB_env *env, MDB_dbi n);
    int (*env_set_maxreaders)(MDB_env *env, unsigned n);
    int (*env_stat)(MDB_env *env, MDB_stat *st);
    int (*env_get_fd)(MDB_env *env, mdb_filehandle_t *fd);
    int (*env_info)(MDB_env *env, MDB_envinfo *info);
    int (*reader_check)(MDB_env *env, int *dead);
    int (*reader_list)(MDB_env *env, MDB_msg_func *fn, void *ctx);
    int (*txn_begin)(MDB_env *env, MDB_txn *parent, unsigned flags,
                     MDB_txn **txn);
    int (*txn_commit)(MDB_txn *txn);
    void (*txn_abort)(MDB_txn *txn);
    void (*txn_reset)(MDB_txn *txn);
    int (*txn_renew)(MDB_txn *txn);
    size_t (*txn_id)(MDB_txn *txn);
    int (*dbi_open)(MDB_txn *txn, const char *name, unsigned flags,
                    MDB_dbi *dbi);
    int (*stat)(MDB_txn *txn, MDB_dbi dbi, MDB_stat *st);
    int (*get)(MDB_txn *txn, MDB_dbi dbi, MDB_val *key, MDB_val *val);
    int (*put)(MDB_txn *txn, MDB_dbi dbi, MDB_val *key, MDB_val *val,
               unsigned flags);
    int (*del)(MDB_txn *txn, MDB_dbi dbi, MDB_val *key, MDB_val *val);
    int (*cursor_open)(MDB_txn *txn, MDB_dbi dbi, MDB_cursor **cursor);
    void (*cursor_close)(MDB_cursor *cursor);
    int (*cursor_get)(MDB_cursor *cursor, MDB_val *key, MDB_val *val,
                      MDB_cursor_op op);
};

const struct tv_lmdb_table *tv_lmdb(void);
/* Tests only: installs another table, NULL restores the real one. */
void tv_lmdb_replace(const struct tv_lmdb_table *table);

/* The table's sub-database 0, LMDB's own list of free pages. */
#define TV_LMDB_FREE_DBI ((MDB_dbi)0)

/* Is this all of a data file that LMDB has begun and nobody has committed to?
 * Its first write may reach the disk in part when the power goes; LMDB then
 * takes the file for a foreign one. */
bool tv_lmdb_is_unborn(const char *data_path);

/* Turns an LMDB or errno code into ours: full map, disk or quota NOSPACE,
 * damaged pages CORRUPT, memory NOMEM, readers' table full LOCKED, else IO.
 * `path` is the store directory: LMDB reports a short write as EIO, so a full
 * file system is told from a bad one by asking it. */
enum tv_err tv_lmdb_error(struct tv_error *err, int mdb_rc, const char *path,
                          const char *fmt, ...) TV_PRINTF(4, 5);

#endif
