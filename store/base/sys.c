/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sys.c - the table of system calls, and file helpers built on it.
 *
 * Sections: the table; error mapping; whole files; directories; disk space.
 * Everything that reads, writes, creates or removes goes through the table, so
 * that a test can make the N-th call fail. Only directory listing (readdir)
 * and questions about disk space are outside it.
 *
 * A path that is not there is the caller's input being wrong (TV_E_INPUT), any
 * other failure is TV_E_IO or what tv_error_sys makes of it.
 */
#include "tv/sys.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <linux/magic.h>
#include <sys/statfs.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/text.h"

/* ---- the table ----------------------------------------------------------- */

static int real_open(const char *path, int flags, mode_t mode)
{
    return open(path, flags | O_CLOEXEC, mode);
}

static int real_sync_file_range(int fd, off_t off, off_t n, unsigned flags)
{
    return sync_file_range(fd, off, n, flags);
}

static const struct tv_sys_table real_table = {
    .open = real_open,
    .close = close,
    .pread = pread,
    .pwrite = pwrite,
    .fstat = fstat,
    .stat = stat,
    .ftruncate = ftruncate,
    .fallocate = fallocate,
    .fsync = fsync,
    .fdatasync = fdatasync,
    .sync_file_range = real_sync_file_range,
    .rename = rename,
    .unlink = unlink,
    .mkdir = mkdir,
    .rmdir = rmdir,
    .mmap = mmap,
    .munmap = munmap,
    .lstat = lstat,
};

static const struct tv_sys_table *_Atomic current_table = &real_table;

const struct tv_sys_table *tv_sys(void)
{
    return atomic_load_explicit(&current_table, memory_order_acquire);
}

void tv_sys_replace(const struct tv_sys_table *table)
{
    atomic_store_explicit(&current_table, table ? table : &real_table,
                          memory_order_release);
}

/* ---- errors -------------------------------------------------------------- */

static enum tv_err path_error(struct tv_error *err, int sys_errno,
                              const char *verb, const char *path)
{
    if (sys_errno == ENOENT || sys_errno == ENOTDIR) {
        const enum tv_err code =
            tv_error_set(err, TV_E_INPUT, "cannot %s %s: %s", verb, path,
                         sys_errno == ENOENT ? "no such file or directory"
                                             : "not a directory");
        if (err)
            err->sys_errno = sys_errno;
        return code;
    }
    return tv_error_sys(err, sys_errno, "cannot %s %s", verb, path);
}

/* Closing a descriptor that was only read from: nothing can be lost. */
static void close_quietly(int fd)
{
    if (fd >= 0)
        (void)tv_sys()->close(fd);
}

/* ---- whole files --------------------------------------------------------- */

enum tv_err tv_file_read(const char *path, uint64_t max_bytes,
                         struct tv_error *err, char **data, size_t *n_bytes)
{
    enum tv_err rc = TV_OK;
    int fd = -1;
    char *buf = NULL;
    size_t have = 0;
    size_t cap = 0;
    struct stat st;

    if (max_bytes > (uint64_t)SIZE_MAX / 4)
        max_bytes = (uint64_t)SIZE_MAX / 4;
    /* Without O_NONBLOCK, opening a FIFO would wait for a writer. */
    fd = tv_sys()->open(path, O_RDONLY | O_NONBLOCK, 0);
    if (fd < 0) {
        const int why = errno;
        rc = path_error(err, why, "open", path);
        if (why == ENOENT)
            tv_error_hint_path(err, path);
        goto out;
    }
    if (tv_sys()->fstat(fd, &st) != 0) {
        rc = path_error(err, errno, "read", path);
        goto out;
    }
    if (!S_ISREG(st.st_mode)) {
        rc = tv_error_set(err, TV_E_INPUT, "%s is not a regular file", path);
        goto out;
    }
    if (st.st_size < 0 || (uint64_t)st.st_size > max_bytes) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "%s has %" PRIu64 " bytes, more than the %" PRIu64
                          " allowed",
                          path, (uint64_t)st.st_size, max_bytes);
        goto out;
    }
    /* One byte more than asked for shows that a file has grown; files of the
     * kernel say that they have no bytes and must be read to their end. */
    cap = (size_t)st.st_size + 2;
    for (;;) {
        char *more = tv_realloc(buf, cap);
        if (!more) {
            rc =
                tv_error_set(err, TV_E_NOMEM,
                             "out of memory reading %s (%zu bytes)", path, cap);
            goto out;
        }
        buf = more;
        while (have < cap - 1) {
            const ssize_t got =
                tv_sys()->pread(fd, buf + have, cap - 1 - have, (off_t)have);
            if (got < 0 && errno == EINTR)
                continue;
            if (got < 0) {
                rc = path_error(err, errno, "read", path);
                goto out;
            }
            if (got == 0)
                goto whole;
            have += (size_t)got;
        }
        if (have > max_bytes) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "%s has more than the %" PRIu64 " bytes allowed",
                              path, max_bytes);
            goto out;
        }
        cap = 2 * cap < 4096 ? 4096 : 2 * cap;
        if (cap > max_bytes + 2)
            cap = (size_t)max_bytes + 2;
    }
whole:
    buf[have] = '\0';
    *data = buf;
    *n_bytes = have;
    buf = NULL;
out:
    tv_free(buf);
    close_quietly(fd);
    return rc;
}

enum tv_err tv_pwrite_all(int fd, const void *data, size_t n, uint64_t off,
                          const char *path, struct tv_error *err)
{
    const unsigned char *p = data;
    uint64_t end = 0;
    if (!tv_add_u64(off, n, &end) || end > (uint64_t)INT64_MAX)
        return tv_error_sys(err, EFBIG, "cannot write %s", path);
    while (n > 0) {
        const ssize_t done = tv_sys()->pwrite(fd, p, n, (off_t)off);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return tv_error_sys(err, done < 0 ? errno : EIO,
                                "cannot write %zu bytes at offset %" PRIu64
                                " of %s",
                                n, off, path);
        p += (size_t)done;
        n -= (size_t)done;
        off += (uint64_t)done;
    }
    return TV_OK;
}

static int fsync_retry(int fd)
{
    int r = 0;
    do {
        r = tv_sys()->fsync(fd);
    } while (r != 0 && errno == EINTR);
    return r;
}

/* The directory that holds path, owned; NULL when out of memory. */
static char *parent_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    if (!slash)
        return tv_strdup(".");
    if (slash == path)
        return tv_strdup("/");
    return tv_strndup(path, (size_t)(slash - path));
}

enum tv_err tv_file_replace(const char *path, const void *data, size_t n,
                            bool do_sync, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    int fd = -1;
    bool made = false;
    char *tmp = tv_asprintf("%s.tmp", path);

    if (!tmp) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory writing %s", path);
        goto out;
    }
    fd = tv_sys()->open(tmp, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW, 0666);
    if (fd < 0) {
        rc = path_error(err, errno, "create", tmp);
        goto out;
    }
    made = true;
    TV_TRY(tv_pwrite_all(fd, data, n, 0, tmp, err));
    if (do_sync && fsync_retry(fd) != 0) {
        rc = tv_error_sys(err, errno, "cannot sync %s", tmp);
        goto out;
    }
    /* Linux releases the descriptor even when close fails: never again. */
    const int closed = tv_sys()->close(fd);
    fd = -1;
    if (closed != 0 && errno != EINTR) {
        rc = tv_error_sys(err, errno, "cannot write %s", tmp);
        goto out;
    }
    if (tv_sys()->rename(tmp, path) != 0) {
        rc = tv_error_sys(err, errno, "cannot rename %s to %s", tmp, path);
        goto out;
    }
    made = false;
out:
    close_quietly(fd);
    if (made)
        (void)tv_sys()->unlink(tmp);
    tv_free(tmp);
    return rc;
}

enum tv_err tv_file_write_atomic(const char *path, const void *data, size_t n,
                                 bool do_sync, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *dir = parent_of(path);

    if (!dir) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory writing %s", path);
        goto out;
    }
    TV_TRY(tv_file_replace(path, data, n, do_sync, err));
    if (do_sync)
        rc = tv_dir_sync(dir, err);
out:
    tv_free(dir);
    return rc;
}

/* ---- directories --------------------------------------------------------- */

enum tv_err tv_dir_sync(const char *path, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const int fd = tv_sys()->open(path, O_RDONLY | O_DIRECTORY, 0);
    if (fd < 0)
        return path_error(err, errno, "open", path);
    /* EINVAL: a file system that keeps no directories of its own to sync. */
    if (fsync_retry(fd) != 0 && errno != EINVAL)
        rc = tv_error_sys(err, errno, "cannot sync directory %s", path);
    close_quietly(fd);
    return rc;
}

/* A new directory is worth what is durable of its name. */
static enum tv_err sync_parent(const char *path, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *dir = parent_of(path);

    if (!dir)
        return tv_error_set(err, TV_E_NOMEM, "out of memory creating %s", path);
    rc = tv_dir_sync(dir, err);
    tv_free(dir);
    return rc;
}

enum tv_err tv_dir_make(const char *path, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *part = NULL;
    if (path[0] == '\0')
        return path_error(err, ENOENT, "create directory", "\"\"");
    part = tv_strdup(path);
    if (!part)
        return tv_error_set(err, TV_E_NOMEM, "out of memory creating %s", path);
    for (char *p = part + 1;; p++) {
        const char kept = *p;
        if (kept != '\0' && kept != '/')
            continue;
        *p = '\0';
        if (tv_sys()->mkdir(part, 0777) != 0) {
            const int why = errno;
            /* Not only EEXIST: a read-only parent that exists may say EROFS
             * or EACCES, and is as good. */
            if (!tv_path_is_dir(part)) {
                rc = why == EEXIST
                         ? tv_error_set(err, TV_E_INPUT,
                                        "cannot create directory %s: %s is "
                                        "not a directory",
                                        path, part)
                         : path_error(err, why, "create directory", part);
                goto out;
            }
        } else {
            TV_TRY(sync_parent(part, err));
        }
        *p = kept;
        if (kept == '\0')
            break;
    }
out:
    tv_free(part);
    return rc;
}

static int compare_names(const void *a, const void *b)
{
    const char *const *x = a;
    const char *const *y = b;
    return strcmp(*x, *y);
}

/* Takes over fd. */
static enum tv_err list_fd(int fd, const char *path, struct tv_error *err,
                           char ***names, size_t *n)
{
    enum tv_err rc = TV_OK;
    char **list = NULL;
    size_t have = 0;
    size_t cap = 0;
    DIR *dir = fdopendir(fd);

    if (!dir) {
        rc = path_error(err, errno, "list", path);
        close_quietly(fd);
        goto out;
    }
    for (;;) {
        errno = 0;
        const struct dirent *entry = readdir(dir);
        if (!entry) {
            if (errno != 0) {
                rc = path_error(err, errno, "list", path);
                goto out;
            }
            break;
        }
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        if (have == cap) {
            const size_t more = cap ? 2 * cap : 16;
            char **grown = tv_realloc(list, more * sizeof *list);
            if (!grown) {
                rc = tv_error_set(err, TV_E_NOMEM, "out of memory listing %s",
                                  path);
                goto out;
            }
            list = grown;
            cap = more;
        }
        list[have] = tv_strdup(entry->d_name);
        if (!list[have]) {
            rc =
                tv_error_set(err, TV_E_NOMEM, "out of memory listing %s", path);
            goto out;
        }
        have++;
    }
    if (have > 1)
        qsort(list, have, sizeof *list, compare_names);
    *names = list;
    *n = have;
    list = NULL;
    have = 0;
out:
    tv_dir_list_free(list, have);
    if (dir)
        (void)closedir(dir);
    return rc;
}

enum tv_err tv_dir_list(const char *path, struct tv_error *err, char ***names,
                        size_t *n)
{
    const int fd = tv_sys()->open(path, O_RDONLY | O_DIRECTORY, 0);
    if (fd < 0)
        return path_error(err, errno, "list", path);
    return list_fd(fd, path, err, names, n);
}

void tv_dir_list_free(char **names, size_t n)
{
    for (size_t i = 0; i < n; i++)
        tv_free(names[i]);
    tv_free(names);
}

/* Removes what is inside an open directory (fd is taken over), then path
 * itself. O_NOFOLLOW at every level: a link is removed, never entered. */
static enum tv_err remove_tree(int fd, const char *path, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char **names = NULL;
    size_t n = 0;
    char *sub = NULL;

    TV_TRY(list_fd(fd, path, err, &names, &n));
    for (size_t i = 0; i < n; i++) {
        tv_free(sub);
        sub = tv_path_join(path, names[i]);
        if (!sub) {
            rc = tv_error_set(err, TV_E_NOMEM, "out of memory removing %s",
                              path);
            goto out;
        }
        const int sub_fd =
            tv_sys()->open(sub, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0);
        if (sub_fd >= 0) {
            TV_TRY(remove_tree(sub_fd, sub, err));
        } else if (errno == ENOTDIR || errno == ELOOP) {
            if (tv_sys()->unlink(sub) != 0 && errno != ENOENT) {
                rc = tv_error_sys(err, errno, "cannot remove %s", sub);
                goto out;
            }
        } else if (errno != ENOENT) {
            rc = tv_error_sys(err, errno, "cannot remove %s", sub);
            goto out;
        }
    }
    if (tv_sys()->rmdir(path) != 0 && errno != ENOENT)
        rc = tv_error_sys(err, errno, "cannot remove directory %s", path);
out:
    tv_free(sub);
    tv_dir_list_free(names, n);
    return rc;
}

enum tv_err tv_dir_remove(const char *path, struct tv_error *err)
{
    const int fd = tv_sys()->open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0);
    if (fd >= 0)
        return remove_tree(fd, path, err);
    if (errno == ENOENT)
        return TV_OK;
    if (errno == ENOTDIR || errno == ELOOP)
        return tv_error_set(err, TV_E_INPUT,
                            "%s is not a directory; not removed", path);
    return tv_error_sys(err, errno, "cannot remove %s", path);
}

bool tv_path_exists(const char *path)
{
    struct stat st;
    return tv_sys()->stat(path, &st) == 0;
}

bool tv_path_is_dir(const char *path)
{
    struct stat st;
    return tv_sys()->stat(path, &st) == 0 && S_ISDIR(st.st_mode);
}

char *tv_path_join(const char *dir, const char *name)
{
    const size_t n = strlen(dir);
    if (n == 0)
        return tv_strdup(name);
    return tv_asprintf("%s%s%s", dir, dir[n - 1] == '/' ? "" : "/", name);
}

/* ---- disk space ---------------------------------------------------------- */

/* A file system whose answer is that it has no blocks: a tmpfs without a limit,
 * a ramfs and what FUSE says by default hold files all the same. */
static bool is_uncounted(const char *path)
{
    struct statfs fs;

    return statfs(path, &fs) == 0 && fs.f_blocks == 0 &&
           (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC ||
            fs.f_type == FUSE_SUPER_MAGIC);
}

char *tv_path_existing(const char *path)
{
    char *p = tv_strdup(path);
    while (p != NULL && !tv_path_exists(p)) {
        char *const slash = strrchr(p, '/');
        if (slash == NULL || (slash == p && p[1] == '\0')) {
            tv_free(p);
            return tv_strdup(slash == NULL ? "." : "/");
        }
        if (slash == p)
            p[1] = '\0';
        else
            *slash = '\0';
    }
    return p;
}

/* dir (with its '/', or ""), a name in it that is near to `name`, rest. */
static char *near_in(const char *dir, const char *name, const char *rest)
{
    char **names = NULL;
    char *path = NULL;
    size_t n = 0;

    if (tv_dir_list(*dir ? dir : ".", NULL, &names, &n) == TV_OK) {
        const char *near = tv_suggest(name, (const char *const *)names, n);
        if (near)
            path = tv_asprintf("%s%s%s", dir, near, rest);
    }
    tv_dir_list_free(names, n);
    return path;
}

/* The first part that is not there is the mistyped one. */
char *tv_path_suggest(const char *path)
{
    char *near = NULL;

    for (size_t from = strspn(path, "/"), n = 0; path[from]; from += n) {
        n = strcspn(path + from, "/");
        char *head = tv_strndup(path, from + n);
        const bool there = head && tv_path_exists(head);
        n += strspn(path + from + n, "/");
        if (there) {
            tv_free(head);
            continue;
        }
        char *dir = tv_strndup(path, from);
        if (head && dir)
            near = near_in(dir, head + from, path + strlen(head));
        tv_free(dir);
        tv_free(head);
        break;
    }
    if (near && !tv_path_exists(near)) {
        tv_free(near);
        near = NULL;
    }
    return near;
}

void tv_error_hint_path(struct tv_error *err, const char *path)
{
    char *near = err ? tv_path_suggest(path) : NULL;

    if (near)
        tv_error_hint(err, "did you mean '%s'?", near);
    tv_free(near);
}

enum tv_err tv_dir_check_writable(const char *path, struct tv_error *err)
{
    struct statvfs fs;

    if (!tv_path_is_dir(path))
        return tv_error_set(err, TV_E_INPUT, "%s is not a directory", path);
    if (faccessat(AT_FDCWD, path, W_OK | X_OK, AT_EACCESS) != 0) {
        (void)tv_error_sys(err, errno, "%s cannot be written to", path);
        if (err != NULL)
            err->code = TV_E_INPUT;
        return TV_E_INPUT;
    }
    /* Such as /proc, where the owner may write, but nothing new. */
    if (statvfs(path, &fs) == 0 && fs.f_blocks == 0 && fs.f_bfree == 0 &&
        fs.f_files == 0 && !is_uncounted(path))
        return tv_error_set(err, TV_E_INPUT,
                            "the file system of %s keeps no files", path);
    return TV_OK;
}

enum tv_err tv_disk_free(const char *path, uint64_t *bytes,
                         struct tv_error *err)
{
    struct statvfs fs;
    int r = 0;
    do {
        r = statvfs(path, &fs);
    } while (r != 0 && errno == EINTR);
    if (r != 0)
        return path_error(err, errno, "ask for the free space of", path);
    uint64_t n = 0;
    /* Some network file systems answer with numbers that mean "plenty". */
    if (!tv_mul_u64(fs.f_bavail, fs.f_frsize, &n) ||
        (fs.f_blocks == 0 && is_uncounted(path)))
        n = UINT64_MAX;
    *bytes = n;
    return TV_OK;
}

/* `at` is a directory descriptor or AT_FDCWD; a file that disappears while we
 * walk counts nothing. */
static enum tv_err used_tree(int at, const char *name, const char *path,
                             uint64_t *sum, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct stat st;
    char **names = NULL;
    size_t n = 0;
    int fd = -1;
    char *sub = NULL;

    if (fstatat(at, name, &st, AT_SYMLINK_NOFOLLOW) != 0) {
        if (errno != ENOENT)
            rc = tv_error_sys(err, errno, "cannot read %s", path);
        goto out;
    }
    uint64_t bytes = 0;
    if (!tv_mul_u64((uint64_t)st.st_blocks, 512, &bytes) ||
        !tv_add_u64(*sum, bytes, sum)) {
        rc = tv_error_set(err, TV_E_INTERNAL,
                          "the disk usage of %s overflows 64 bits", path);
        goto out;
    }
    if (!S_ISDIR(st.st_mode))
        goto out;
    fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) {
        if (errno != ENOENT)
            rc = tv_error_sys(err, errno, "cannot list %s", path);
        goto out;
    }
    const int list = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (list < 0) {
        rc = tv_error_sys(err, errno, "cannot list %s", path);
        goto out;
    }
    TV_TRY(list_fd(list, path, err, &names, &n));
    for (size_t i = 0; i < n; i++) {
        tv_free(sub);
        sub = tv_path_join(path, names[i]);
        if (!sub) {
            rc =
                tv_error_set(err, TV_E_NOMEM, "out of memory listing %s", path);
            goto out;
        }
        TV_TRY(used_tree(fd, names[i], sub, sum, err));
    }
out:
    tv_free(sub);
    tv_dir_list_free(names, n);
    close_quietly(fd);
    return rc;
}

enum tv_err tv_disk_used(const char *path, uint64_t *bytes,
                         struct tv_error *err)
{
    uint64_t sum = 0;
    const enum tv_err rc = used_tree(AT_FDCWD, path, path, &sum, err);
    if (rc == TV_OK)
        *bytes = sum;
    return rc;
}
