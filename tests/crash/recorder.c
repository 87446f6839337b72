/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recorder.c - an LD_PRELOAD library between a program and the kernel.
 *
 * It counts the calls that change files under one directory, and can
 *   - record them with their data, so that powerloss.py can build every state
 *     that a disk may be in when the power goes;
 *   - end the process with SIGKILL before, in the middle of or after call K;
 *   - make call K (and those after it) fail, or transfer half and then fail;
 *   - make allocation K fail, of whatever library.
 * LMDB, jansson and libyaml are covered like our own code, which a replaceable
 * table inside the program could not do. What a program writes through a
 * shared map is not seen: LMDB without WRITEMAP so changes its lock file only.
 *
 * Environment
 *   TVREC_DIR     absolute path; calls on files below it count ("/" for all)
 *   TVREC_LOG     record into this file (appending), format below
 *   TVREC_STAT    file for `struct counts`, kept also when we are killed
 *   TVREC_KILL    K, with TVREC_WHEN=before|half|after
 *   TVREC_STOP    K: SIGSTOP before this call; SIGCONT lets it go on
 *   TVREC_FAIL    K, with TVREC_ERRNO (a number), TVREC_REPEAT (0: for ever),
 *                 TVREC_SHORT=1 (call K writes half, the next one fails)
 *   TVREC_READS   1: calls that only read count too
 *   TVREC_ALLOC   K: this allocation after the start of main fails
 *   TVREC_SLOW    microseconds added to each write into a *.safetensors file:
 *                 gives the program time to commit groups of a small model
 *
 * Log: struct event, then two paths and the data, lengths in the event.
 *
 * Invariants: nothing here allocates; one mutex makes the order of the log the
 * order of the calls; a forked child goes on counting and recording.
 */
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define LOG_FD   900
#define IOV_MOST 1024

enum op {
    OP_CREATE = 1,
    OP_WRITE,
    OP_TRUNCATE,
    OP_ALLOCATE,
    OP_SYNC,
    OP_DATASYNC,
    OP_SYNC_RANGE,
    OP_RENAME,
    OP_UNLINK,
    OP_MKDIR,
    OP_RMDIR,
    OP_LINK,
    OP_OPEN,
    OP_READ,
    OP_STAT,
    OP_MAP,
    OP_CLOSE,
    OP_LOCK,
    OP_LIST
};

enum { EV_DSYNC = 1, EV_DIR = 2 };

struct event { /* little-endian, as the machine */
    uint32_t magic, op;
    uint64_t ino, off, len;
    uint32_t flags; /* EV_, and above 8 bits the number of the call */
    uint32_t path_bytes, path2_bytes, data_bytes;
};
_Static_assert(sizeof(struct event) == 48, "layout known to powerloss.py");
#define EVENT_MAGIC 0x56455654u

struct counts { /* shared by processes, read by the drivers */
    _Atomic uint64_t calls, fired, allocs, allocs_fired;
    uint32_t last_op;
    char last_path[1020];
};

static struct counts own_counts;
static struct counts *counts = &own_counts;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static char dir[PATH_MAX];
static size_t dir_bytes;
static bool armed, logging, with_reads, short_first;
static uint64_t kill_at, stop_at, fail_at, fail_repeat, alloc_at;
static int fail_errno = EIO;
static long slow_us;
static enum { KILL_BEFORE, KILL_HALF, KILL_AFTER } kill_when;

/* ---- small things ---------------------------------------------------------
 */

static uint64_t number(const char *name, uint64_t otherwise)
{
    const char *s = getenv(name);
    return s && *s ? strtoull(s, NULL, 10) : otherwise;
}

static void die(void)
{
    (void)syscall(SYS_kill, (long)getpid(), (long)SIGKILL);
    for (;;)
        (void)syscall(SYS_pause);
}

static bool is_below(const char *path)
{
    if (dir_bytes == 1)
        return path[0] == '/' && strncmp(path, "/proc/", 6) != 0 &&
               strncmp(path, "/sys/", 5) != 0 &&
               (strncmp(path, "/dev/", 5) != 0 ||
                strncmp(path, "/dev/shm/", 9) == 0);
    return strncmp(path, dir, dir_bytes) == 0 &&
           (path[dir_bytes] == '/' || path[dir_bytes] == '\0');
}

/* Path of a descriptor, as the kernel knows it now; false: not ours. */
static bool path_of_fd(int fd, char dst[PATH_MAX])
{
    char proc[64];

    if (!armed || dir_bytes == 0 || fd < 3 || fd == LOG_FD)
        return false;
    (void)snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd);
    const ssize_t n =
        syscall(SYS_readlinkat, AT_FDCWD, proc, dst, (size_t)PATH_MAX - 1);
    if (n <= 0)
        return false;
    dst[n] = '\0';
    return is_below(dst);
}

/* Absolute form of a name that need not exist; its directory must. */
static bool path_of_name(int at, const char *name, char dst[PATH_MAX])
{
    char parent[PATH_MAX];
    char proc[64];
    const char *slash = strrchr(name, '/');
    const char *base = slash ? slash + 1 : name;

    if (!armed || dir_bytes == 0 || strlen(name) >= PATH_MAX)
        return false;
    if (slash == name) {
        (void)snprintf(parent, sizeof parent, "/");
    } else if (slash) {
        memcpy(parent, name, (size_t)(slash - name));
        parent[slash - name] = '\0';
    } else {
        (void)snprintf(parent, sizeof parent, ".");
    }
    const int flags = O_PATH | O_DIRECTORY | O_CLOEXEC;
    const int fd = (int)syscall(SYS_openat, at, parent, flags, 0);
    if (fd < 0)
        return false;
    (void)snprintf(proc, sizeof proc, "/proc/self/fd/%d", fd);
    ssize_t n =
        syscall(SYS_readlinkat, AT_FDCWD, proc, dst, (size_t)PATH_MAX - 1);
    (void)syscall(SYS_close, fd);
    if (n <= 0 || (size_t)n + strlen(base) + 2 > PATH_MAX)
        return false;
    if (n > 1 && *base)
        dst[n++] = '/';
    memcpy(dst + n, base, strlen(base) + 1);
    return is_below(dst);
}

static uint64_t inode_of(int fd)
{
    struct stat st;
    return syscall(SYS_fstat, fd, &st) == 0 ? st.st_ino : 0;
}

static uint64_t inode_at(const char *path)
{
    struct stat st;
    return syscall(SYS_newfstatat, AT_FDCWD, path, &st, AT_SYMLINK_NOFOLLOW)
               ? 0
               : st.st_ino;
}

/* ---- log ------------------------------------------------------------------
 */

static void put(const void *data, size_t n)
{
    const char *p = data;
    while (n > 0) {
        const ssize_t k = syscall(SYS_write, LOG_FD, p, n);
        if (k <= 0)
            die();
        p += k;
        n -= (size_t)k;
    }
}

static void log_event(enum op op, uint64_t ino, const char *path,
                      const char *path2, uint64_t off, uint64_t len,
                      uint32_t flags)
{
    const struct event e = {.magic = EVENT_MAGIC,
                            .op = op,
                            .ino = ino,
                            .off = off,
                            .len = len,
                            .flags = flags | (uint32_t)counts->calls << 8,
                            .path_bytes = (uint32_t)strlen(path),
                            .path2_bytes = path2 ? (uint32_t)strlen(path2) : 0,
                            .data_bytes = op == OP_WRITE ? (uint32_t)len : 0};
    if (!logging)
        return;
    put(&e, sizeof e);
    put(path, e.path_bytes);
    if (path2)
        put(path2, e.path2_bytes);
}

/* ---- one call -------------------------------------------------------------
 */

enum verdict { GO, FAIL, SHORT };

/* Counts a call; the mutex is held until after(). */
static enum verdict before(enum op op, const char *path, bool *last)
{
    (void)pthread_mutex_lock(&mutex);
    const uint64_t k = atomic_fetch_add(&counts->calls, 1) + 1;
    counts->last_op = op;
    (void)snprintf(counts->last_path, sizeof counts->last_path, "%s", path);
    if (stop_at == k) {
        (void)atomic_fetch_add(&counts->fired, 1);
        (void)syscall(SYS_kill, (long)getpid(), (long)SIGSTOP);
    }
    *last = kill_at == k;
    if (*last && (kill_when == KILL_BEFORE ||
                  (kill_when == KILL_HALF && op != OP_WRITE))) {
        (void)atomic_fetch_add(&counts->fired, 1);
        die();
    }
    if (fail_at == 0 || k < fail_at ||
        (fail_repeat != 0 && k >= fail_at + fail_repeat + short_first))
        return *last && kill_when == KILL_HALF ? SHORT : GO;
    (void)atomic_fetch_add(&counts->fired, 1);
    return short_first && k == fail_at && op == OP_WRITE ? SHORT : FAIL;
}

static void after(bool last)
{
    if (last) {
        (void)atomic_fetch_add(&counts->fired, 1);
        die();
    }
    (void)pthread_mutex_unlock(&mutex);
}

static void fail(bool last)
{
    after(last);
    errno = fail_errno;
}

static void *next(const char *name)
{
    void *p = dlsym(RTLD_NEXT, name);
    if (!p)
        die();
    return p;
}

/* ---- start ----------------------------------------------------------------
 */

typedef int (*main_fn)(int, char **, char **);
static main_fn real_main;

static int begin(int argc, char **argv, char **envp)
{
    const char *s = getenv("TVREC_DIR");
    const char *stat_path = getenv("TVREC_STAT");
    const char *log_path = getenv("TVREC_LOG");
    const char *when = getenv("TVREC_WHEN");

    if (s && strlen(s) < sizeof dir) {
        memcpy(dir, s, strlen(s) + 1);
        dir_bytes = strlen(s);
    }
    kill_at = number("TVREC_KILL", 0);
    stop_at = number("TVREC_STOP", 0);
    fail_at = number("TVREC_FAIL", 0);
    fail_repeat = number("TVREC_REPEAT", 1);
    fail_errno = (int)number("TVREC_ERRNO", EIO);
    short_first = number("TVREC_SHORT", 0) != 0;
    with_reads = number("TVREC_READS", 0) != 0;
    alloc_at = number("TVREC_ALLOC", 0);
    slow_us = (long)number("TVREC_SLOW", 0);
    if (when)
        kill_when = strcmp(when, "half") == 0    ? KILL_HALF
                    : strcmp(when, "after") == 0 ? KILL_AFTER
                                                 : KILL_BEFORE;
    if (stat_path) {
        const int fd = (int)syscall(SYS_openat, AT_FDCWD, stat_path,
                                    O_RDWR | O_CREAT | O_CLOEXEC, 0644);
        if (fd < 0 || syscall(SYS_ftruncate, fd, sizeof *counts) != 0)
            die();
        void *p = (void *)syscall(SYS_mmap, NULL, sizeof *counts,
                                  PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0L);
        if (p == MAP_FAILED)
            die();
        counts = p;
        (void)syscall(SYS_close, fd);
    }
    if (log_path) {
        const int fd = (int)syscall(SYS_openat, AT_FDCWD, log_path,
                                    O_WRONLY | O_CREAT | O_APPEND, 0644);
        if (fd < 0 || syscall(SYS_dup3, fd, LOG_FD, O_CLOEXEC) != LOG_FD)
            die();
        (void)syscall(SYS_close, fd);
        logging = true;
    }
    armed = true;
    const int status = real_main(argc, argv, envp);
    armed = false;
    return status;
}

int __libc_start_main(main_fn fn, int argc, char **argv, void (*init)(void),
                      void (*fini)(void), void (*rtld)(void), void *stack);
int __libc_start_main(main_fn fn, int argc, char **argv, void (*init)(void),
                      void (*fini)(void), void (*rtld)(void), void *stack)
{
    int (*real)(main_fn, int, char **, void (*)(void), void (*)(void),
                void (*)(void), void *);
    *(void **)&real = next("__libc_start_main");
    real_main = fn;
    return real(begin, argc, argv, init, fini, rtld, stack);
}

/* ---- allocations ----------------------------------------------------------
 */

#ifdef TVREC_NEXT_ALLOCATOR
/* ThreadSanitizer's allocator, which frees what it has given out only. */
#define FORWARD(type, name, ...)                                               \
    static _Atomic(type) real;                                                 \
    type f = atomic_load(&real);                                               \
    if (!f) {                                                                  \
        *(void **)&f = next(name);                                             \
        atomic_store(&real, f);                                                \
    }                                                                          \
    return f(__VA_ARGS__)

typedef void *(*malloc_fn)(size_t);
typedef void *(*calloc_fn)(size_t, size_t);
typedef void *(*realloc_fn)(void *, size_t);

static void *real_malloc(size_t n)
{
    FORWARD(malloc_fn, "malloc", n);
}

static void *real_calloc(size_t n, size_t each)
{
    FORWARD(calloc_fn, "calloc", n, each);
}

static void *real_realloc(void *p, size_t n)
{
    FORWARD(realloc_fn, "realloc", p, n);
}

static void *real_memalign(size_t align, size_t n)
{
    FORWARD(calloc_fn, "memalign", align, n);
}
#else
void *__libc_malloc(size_t n);
void *__libc_calloc(size_t n, size_t each);
void *__libc_realloc(void *p, size_t n);
void *__libc_memalign(size_t align, size_t n);
#define real_malloc   __libc_malloc
#define real_calloc   __libc_calloc
#define real_realloc  __libc_realloc
#define real_memalign __libc_memalign
#endif

static bool no_memory(void)
{
    if (!armed || alloc_at == 0)
        return false;
    if (atomic_fetch_add(&counts->allocs, 1) + 1 != alloc_at)
        return false;
    (void)atomic_fetch_add(&counts->allocs_fired, 1);
    errno = ENOMEM;
    return true;
}

void *malloc(size_t n)
{
    return no_memory() ? NULL : real_malloc(n);
}

void *calloc(size_t n, size_t each)
{
    return no_memory() ? NULL : real_calloc(n, each);
}

void *realloc(void *p, size_t n)
{
    return no_memory() ? NULL : real_realloc(p, n);
}

void *aligned_alloc(size_t align, size_t n)
{
    return no_memory() ? NULL : real_memalign(align, n);
}

int posix_memalign(void **out, size_t align, size_t n)
{
    if (no_memory())
        return ENOMEM;
    *out = real_memalign(align, n);
    return *out ? 0 : ENOMEM;
}

/* ---- writing --------------------------------------------------------------
 */

static bool is_weights(const char *path)
{
    const size_t n = strlen(path);
    return n > 12 && strcmp(path + n - 12, ".safetensors") == 0;
}

/* All forms of write; off < 0: at the file's position. */
static ssize_t do_write(int fd, const struct iovec *iov, int n_iov, off_t off)
{
    char path[PATH_MAX];
    bool last = false;
    size_t total = 0;

    if (!path_of_fd(fd, path))
        return off < 0 ? syscall(SYS_writev, fd, iov, n_iov)
                       : syscall(SYS_pwritev, fd, iov, n_iov, off, 0L);
    for (int i = 0; i < n_iov; i++)
        total += iov[i].iov_len;
    const enum verdict v = before(OP_WRITE, path, &last);
    if (v == FAIL) {
        fail(last);
        return -1;
    }
    size_t left = v == SHORT ? total / 2 : total;
    const off_t at = off < 0 ? lseek(fd, 0, SEEK_CUR) : off;
    struct iovec part[IOV_MOST];
    int n = 0;
    for (; n < n_iov && n < IOV_MOST && left > 0; n++) {
        part[n] = iov[n];
        if (part[n].iov_len > left)
            part[n].iov_len = left;
        left -= part[n].iov_len;
    }
    const ssize_t done = off < 0 ? syscall(SYS_writev, fd, part, n)
                                 : syscall(SYS_pwritev, fd, part, n, off, 0L);
    const int why = errno;
    if (done > 0 && logging) {
        const int flags = (int)syscall(SYS_fcntl, fd, F_GETFL, 0);
        size_t rest = (size_t)done;
        log_event(OP_WRITE, inode_of(fd), path, NULL, (uint64_t)at,
                  (uint64_t)done, flags & O_DSYNC ? EV_DSYNC : 0);
        for (int i = 0; i < n && rest > 0; i++) {
            const size_t some = part[i].iov_len < rest ? part[i].iov_len : rest;
            put(part[i].iov_base, some);
            rest -= some;
        }
    }
    after(last);
    if (slow_us > 0 && is_weights(path))
        (void)usleep((useconds_t)slow_us);
    errno = why;
    return done;
}

static ssize_t write_one(int fd, const void *data, size_t n, off_t off)
{
    const struct iovec iov = {.iov_base = (void *)(uintptr_t)data,
                              .iov_len = n};
    return do_write(fd, &iov, 1, off);
}

ssize_t write(int fd, const void *data, size_t n)
{
    return write_one(fd, data, n, -1);
}

ssize_t pwrite(int fd, const void *data, size_t n, off_t off)
{
    return write_one(fd, data, n, off);
}

ssize_t writev(int fd, const struct iovec *iov, int n)
{
    return do_write(fd, iov, n, -1);
}

ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t off)
{
    return do_write(fd, iov, n, off);
}

/* A call on a descriptor that changes or syncs: number, two arguments. */
static int on_fd(enum op op, int fd, uint64_t off, uint64_t len, long nr,
                 long a, long b, long c)
{
    char path[PATH_MAX];
    bool last = false;

    if (!path_of_fd(fd, path))
        return (int)syscall(nr, fd, a, b, c);
    if (before(op, path, &last) != GO) {
        fail(last);
        return -1;
    }
    const int r = (int)syscall(nr, fd, a, b, c);
    const int why = errno;
    if (r == 0) {
        struct stat st;
        const bool is_dir =
            syscall(SYS_fstat, fd, &st) == 0 && S_ISDIR(st.st_mode);
        log_event(op, inode_of(fd), path, NULL, off, len, is_dir ? EV_DIR : 0);
    }
    after(last);
    errno = why;
    return r;
}

int ftruncate(int fd, off_t n)
{
    return on_fd(OP_TRUNCATE, fd, 0, (uint64_t)n, SYS_ftruncate, n, 0, 0);
}

int fallocate(int fd, int mode, off_t off, off_t n)
{
    return on_fd(OP_ALLOCATE, fd, (uint64_t)off, (uint64_t)n, SYS_fallocate,
                 mode, off, n);
}

int fsync(int fd)
{
    return on_fd(OP_SYNC, fd, 0, 0, SYS_fsync, 0, 0, 0);
}

int fdatasync(int fd)
{
    return on_fd(OP_DATASYNC, fd, 0, 0, SYS_fdatasync, 0, 0, 0);
}

int sync_file_range(int fd, off_t off, off_t n, unsigned flags)
{
    return on_fd(OP_SYNC_RANGE, fd, (uint64_t)off, (uint64_t)n,
                 SYS_sync_file_range, off, n, (long)flags);
}

/* ---- names ----------------------------------------------------------------
 */

static int on_name(enum op op, const char *name, long nr, long a, long b)
{
    char path[PATH_MAX];
    bool last = false;

    if (!path_of_name(AT_FDCWD, name, path))
        return (int)syscall(nr, name, a, b);
    if (before(op, path, &last) != GO) {
        fail(last);
        return -1;
    }
    const uint64_t was = inode_at(path);
    const int r = (int)syscall(nr, name, a, b);
    const int why = errno;
    if (r == 0)
        log_event(op, op == OP_MKDIR ? inode_at(path) : was, path, NULL, 0, 0,
                  0);
    after(last);
    errno = why;
    return r;
}

int unlink(const char *name)
{
    return on_name(OP_UNLINK, name, SYS_unlink, 0, 0);
}

int rmdir(const char *name)
{
    return on_name(OP_RMDIR, name, SYS_rmdir, 0, 0);
}

int mkdir(const char *name, mode_t mode)
{
    return on_name(OP_MKDIR, name, SYS_mkdir, (long)mode, 0);
}

static int on_two(enum op op, const char *from, const char *to, long nr)
{
    char a[PATH_MAX];
    char b[PATH_MAX];
    bool last = false;
    const bool ours = path_of_name(AT_FDCWD, from, a);

    if (!path_of_name(AT_FDCWD, to, b) && !ours)
        return (int)syscall(nr, from, to);
    if (before(op, b, &last) != GO) {
        fail(last);
        return -1;
    }
    const uint64_t ino = inode_at(a);
    const int r = (int)syscall(nr, from, to);
    const int why = errno;
    if (r == 0)
        log_event(op, ino, a, b, 0, 0, 0);
    after(last);
    errno = why;
    return r;
}

int rename(const char *from, const char *to)
{
    return on_two(OP_RENAME, from, to, SYS_rename);
}

int link(const char *from, const char *to)
{
    return on_two(OP_LINK, from, to, SYS_link);
}

static int do_open(int at, const char *name, int flags, mode_t mode)
{
    char path[PATH_MAX];
    bool last = false;
    const bool changes = (flags & (O_CREAT | O_TRUNC)) != 0;

    if ((!changes && !with_reads) || !path_of_name(at, name, path))
        return (int)syscall(SYS_openat, at, name, flags, mode);
    struct stat st;
    const bool existed = syscall(SYS_newfstatat, AT_FDCWD, path, &st, 0) == 0;
    /* Opening a file that is there changes nothing: not counted. */
    if (!with_reads && existed && !(flags & O_TRUNC))
        return (int)syscall(SYS_openat, at, name, flags, mode);
    if (before(existed ? OP_OPEN : OP_CREATE, path, &last) != GO) {
        fail(last);
        return -1;
    }
    const int fd = (int)syscall(SYS_openat, at, name, flags, mode);
    const int why = errno;
    if (fd >= 0 && changes) {
        if (!existed)
            log_event(OP_CREATE, inode_of(fd), path, NULL, 0, 0, 0);
        else if (flags & O_TRUNC)
            log_event(OP_TRUNCATE, inode_of(fd), path, NULL, 0, 0, 0);
    }
    after(last);
    errno = why;
    return fd;
}

static mode_t mode_of(int flags, va_list ap)
{
    return (flags & O_CREAT) ? (mode_t)va_arg(ap, int) : 0;
}

int open(const char *name, int flags, ...)
{
    va_list ap;
    va_start(ap, flags);
    const mode_t mode = mode_of(flags, ap);
    va_end(ap);
    return do_open(AT_FDCWD, name, flags, mode);
}

int openat(int at, const char *name, int flags, ...)
{
    va_list ap;
    va_start(ap, flags);
    const mode_t mode = mode_of(flags, ap);
    va_end(ap);
    return do_open(at, name, flags, mode);
}

/* ---- reading: only to make it fail ----------------------------------------
 */

/* True when the call must fail (errno is set). */
static bool read_fails(enum op op, int fd)
{
    char path[PATH_MAX];
    bool last = false;

    if (!with_reads || !path_of_fd(fd, path))
        return false;
    if (before(op, path, &last) == GO) {
        after(last);
        return false;
    }
    fail(last);
    return true;
}

ssize_t read(int fd, void *buf, size_t n)
{
    return read_fails(OP_READ, fd) ? -1 : syscall(SYS_read, fd, buf, n);
}

ssize_t pread(int fd, void *buf, size_t n, off_t off)
{
    return read_fails(OP_READ, fd) ? -1 : syscall(SYS_pread64, fd, buf, n, off);
}

void *mmap(void *at, size_t n, int prot, int flags, int fd, off_t off)
{
    if (fd >= 0 && read_fails(OP_MAP, fd))
        return MAP_FAILED;
    return (void *)syscall(SYS_mmap, at, n, prot, flags, fd, off);
}

int fstat(int fd, struct stat *st)
{
    return read_fails(OP_STAT, fd) ? -1 : (int)syscall(SYS_fstat, fd, st);
}

static int stat_at(int at, const char *name, struct stat *st, int flags)
{
    char path[PATH_MAX];
    bool last = false;

    if (with_reads && path_of_name(at, name, path)) {
        if (before(OP_STAT, path, &last) != GO) {
            fail(last);
            return -1;
        }
        after(last);
    }
    return (int)syscall(SYS_newfstatat, at, name, st, flags);
}

int stat(const char *name, struct stat *st)
{
    return stat_at(AT_FDCWD, name, st, 0);
}

int fstatat(int at, const char *name, struct stat *st, int flags)
{
    return stat_at(at, name, st, flags);
}

int flock(int fd, int what);
int flock(int fd, int what)
{
    return read_fails(OP_LOCK, fd) ? -1 : (int)syscall(SYS_flock, fd, what);
}

/* Closing releases even when it says that it failed. */
int close(int fd)
{
    const bool failed = read_fails(OP_CLOSE, fd);
    const int why = errno;
    const int r = (int)syscall(SYS_close, fd);

    if (!failed)
        return r;
    errno = why;
    return -1;
}

/* ---- the same under the names of 64-bit offsets ---------------------------
 */

_Static_assert(sizeof(struct stat) == sizeof(struct stat64) &&
                   sizeof(off_t) == 8,
               "one call serves both names");
#define SAME(name) __attribute__((alias(#name)))
int open64(const char *name, int flags, ...) SAME(open);
int openat64(int at, const char *name, int flags, ...) SAME(openat);
ssize_t pread64(int fd, void *buf, size_t n, off_t off) SAME(pread);
ssize_t pwrite64(int fd, const void *d, size_t n, off_t off) SAME(pwrite);
ssize_t pwritev64(int fd, const struct iovec *v, int n, off_t off)
    SAME(pwritev);
int ftruncate64(int fd, off_t n) SAME(ftruncate);
int fallocate64(int fd, int mode, off_t off, off_t n) SAME(fallocate);
void *mmap64(void *at, size_t n, int prot, int flags, int fd, off_t off)
    SAME(mmap);

int fstat64(int fd, struct stat64 *st)
{
    return fstat(fd, (struct stat *)(void *)st);
}

int stat64(const char *name, struct stat64 *st)
{
    return stat_at(AT_FDCWD, name, (struct stat *)(void *)st, 0);
}

int fstatat64(int at, const char *name, struct stat64 *st, int flags)
{
    return stat_at(at, name, (struct stat *)(void *)st, flags);
}
