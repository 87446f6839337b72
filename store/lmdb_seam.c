/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lmdb_seam.c - the only caller of mdb_*, and the mapping of its codes.
 *
 * The mapping is made of three groups: LMDB's own negative codes, errno values
 * that mean "no room", and the rest. EIO is ambiguous: mdb_env_write turns a
 * short write of a full disk into EIO, hence the question to the file system.
 */
#include "lmdb_seam.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/sys.h"

static const struct tv_lmdb_table real_table = {
    .env_create = mdb_env_create,
    .env_open = mdb_env_open,
    .env_close = mdb_env_close,
    .env_sync = mdb_env_sync,
    .env_copyfd2 = mdb_env_copyfd2,
    .env_set_flags = mdb_env_set_flags,
    .env_set_mapsize = mdb_env_set_mapsize,
    .env_set_maxdbs = mdb_env_set_maxdbs,
    .env_set_maxreaders = mdb_env_set_maxreaders,
    .env_stat = mdb_env_stat,
    .env_get_fd = mdb_env_get_fd,
    .env_info = mdb_env_info,
    .reader_check = mdb_reader_check,
    .reader_list = mdb_reader_list,
    .txn_begin = mdb_txn_begin,
    .txn_commit = mdb_txn_commit,
    .txn_abort = mdb_txn_abort,
    .txn_reset = mdb_txn_reset,
    .txn_renew = mdb_txn_renew,
    .txn_id = mdb_txn_id,
    .dbi_open = mdb_dbi_open,
    .stat = mdb_stat,
    .get = mdb_get,
    .put = mdb_put,
    .del = mdb_del,
    .cursor_open = mdb_cursor_open,
    .cursor_close = mdb_cursor_close,
    .cursor_get = mdb_cursor_get,
};

static const struct tv_lmdb_table *current = &real_table;

const struct tv_lmdb_table *tv_lmdb(void)
{
    return current;
}

void tv_lmdb_replace(const struct tv_lmdb_table *table)
{
    current = table != NULL ? table : &real_table;
}

/* ---- a data file that was only begun --------------------------------------
 */

/* Of LMDB 0.9's meta page: two of them begin the file. */
#define META_PAGES   2
#define META_MAGIC   0xBEEFC0DEu
#define MAGIC_AT     16
#define TXNID_AT     144
#define SECTOR_BYTES 512

/* A page as LMDB first writes it, or as a disk that never got it has it. */
static bool page_is_unborn(const unsigned char *page)
{
    static const unsigned char zero[SECTOR_BYTES];

    return memcmp(page, zero, sizeof zero) == 0 ||
           (tv_get_le32(page + MAGIC_AT) == META_MAGIC &&
            tv_get_le64(page + TXNID_AT) == 0);
}

bool tv_lmdb_is_unborn(const char *data_path)
{
    unsigned char page[SECTOR_BYTES];
    const off_t page_bytes = (off_t)sysconf(_SC_PAGESIZE);
    struct stat st;
    bool yes = false;
    const int fd = tv_sys()->open(data_path, O_RDONLY, 0);

    if (fd < 0)
        return false;
    if (tv_sys()->fstat(fd, &st) == 0 && S_ISREG(st.st_mode) &&
        st.st_size <= META_PAGES * page_bytes) {
        yes = true;
        for (off_t at = 0; yes && at < st.st_size; at += page_bytes) {
            memset(page, 0, sizeof page);
            yes = tv_sys()->pread(fd, page, sizeof page, at) >= 0 &&
                  page_is_unborn(page);
        }
    }
    (void)tv_sys()->close(fd);
    return yes;
}

/* ---- codes -----------------------------------------------------------------
 */

/* A file system with less than this left cannot take a batch. */
#define NEARLY_FULL_BYTES (1u << 20)

static bool disk_is_full(const char *path)
{
    uint64_t left = 0;
    return tv_disk_free(path, &left, NULL) == TV_OK && left < NEARLY_FULL_BYTES;
}

/* A short write also happens where this process may not make files longer. */
static bool file_is_at_limit(const char *path)
{
    struct rlimit lim;
    struct stat st;
    if (getrlimit(RLIMIT_FSIZE, &lim) != 0 || lim.rlim_cur == RLIM_INFINITY)
        return false;
    char *file = tv_path_join(path, "data.mdb");
    const bool at = file != NULL && tv_sys()->stat(file, &st) == 0 &&
                    (uint64_t)st.st_size >= lim.rlim_cur;
    tv_free(file);
    return at;
}

enum tv_err tv_lmdb_error(struct tv_error *err, int mdb_rc, const char *path,
                          const char *fmt, ...)
{
    enum tv_err code = TV_E_IO;
    switch (mdb_rc) {
    case MDB_MAP_FULL:
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        code = TV_E_NOSPACE;
        break;
    case EIO:
    case MDB_PANIC: /* after a meta page that could not be written */
        code = disk_is_full(path) || file_is_at_limit(path) ? TV_E_NOSPACE
                                                            : TV_E_IO;
        break;
    case ENOMEM:
        code = TV_E_NOMEM;
        break;
    case MDB_READERS_FULL:
    case MDB_MAP_RESIZED:
        code = TV_E_LOCKED;
        break;
    case MDB_CORRUPTED:
    case MDB_PAGE_NOTFOUND:
    case MDB_INVALID:
    case MDB_VERSION_MISMATCH:
    case MDB_CURSOR_FULL:
    case MDB_INCOMPATIBLE:
    case MDB_NOTFOUND:
        code = TV_E_CORRUPT;
        break;
    case MDB_BAD_TXN:
    case MDB_BAD_VALSIZE:
    case MDB_BAD_DBI:
    case MDB_TXN_FULL:
    case MDB_KEYEXIST:
    case EINVAL:
        code = TV_E_INTERNAL;
        break;
    default:
        break;
    }
    char what[400] = "";
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(what, sizeof what, fmt, ap);
    va_end(ap);
    tv_error_set(err, code, "store %s: %s: %s", path, what,
                 code == TV_E_NOSPACE && (mdb_rc == EIO || mdb_rc == MDB_PANIC)
                     ? "no space left on the file system"
                     : mdb_strerror(mdb_rc));
    if (err != NULL) {
        if (mdb_rc > 0)
            err->sys_errno = mdb_rc;
        if (mdb_rc == MDB_MAP_RESIZED)
            tv_error_hint(err, "another process has enlarged the store; close "
                               "it and open it again");
    }
    return code;
}
