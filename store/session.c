/* SPDX-License-Identifier: Apache-2.0 */
/*
 * session.c - who has a store open, in any process.
 *
 * STORE/open.lock holds no data, only byte-range locks of open file
 * descriptions (they go with the descriptor, hence with a killed process, and
 * work between handles of one process as between processes):
 *
 *     byte 0       shared by every open handle, exclusive while compact
 *                  replaces the data file
 *     other bytes  one per session, from its number: held while the session
 *                  owns pins or unfinished derived items, so that others can
 *                  tell a slow owner from a dead one
 *
 * A process number would not do: it is reused, and means nothing in another
 * container.
 */
#include "store_priv.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "tv/alloc.h"

#define OPEN_FILE    "open.lock"
#define WAIT_MS      10000
#define POLL_MS      20
#define SESSION_MASK (((uint64_t)1 << 61) - 1)

static struct flock range(short type, uint64_t at)
{
    return (struct flock){
        .l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)at, .l_len = 1};
}

static uint64_t byte_of(uint64_t session)
{
    return (session & SESSION_MASK) + 1;
}

static bool cannot_write(int e)
{
    return e == EROFS || e == EACCES || e == EPERM;
}

enum tv_err session_open(tv_store *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(s->path, OPEN_FILE);
    int fd = -1;
    if (path == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a path");
    fd = tv_sys()->open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 && cannot_write(errno))
        fd = tv_sys()->open(path, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0) {
        /* Read-only media on which the file was never made: nobody can
         * replace the data there either. */
        if (!cannot_write(errno) && errno != ENOENT)
            rc = tv_error_sys(err, errno, "cannot open %s", path);
        goto out;
    }
    for (int waited = 0;; waited += POLL_MS) {
        const struct timespec nap = {0, POLL_MS * 1000000L};
        struct flock l = range(F_RDLCK, 0);
        if (fcntl(fd, F_OFD_SETLK, &l) == 0)
            break;
        if (errno != EAGAIN && errno != EACCES)
            break; /* a file system without locks: as LMDB itself, go on */
        if (waited >= WAIT_MS) {
            rc = tv_error_set(err, TV_E_LOCKED,
                              "store %s is being compacted by another process",
                              s->path);
            goto out;
        }
        (void)nanosleep(&nap, NULL);
    }
    s->open_fd = fd;
    fd = -1;
out:
    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_free(path);
    return rc;
}

void session_close(tv_store *s)
{
    if (s->open_fd >= 0)
        (void)tv_sys()->close(s->open_fd);
    s->open_fd = -1;
    s->session_held = false;
}

enum tv_err session_exclusive(tv_store *s, struct tv_error *err)
{
    struct flock l = range(F_WRLCK, 0);
    if (s->open_fd >= 0 && fcntl(s->open_fd, F_OFD_SETLK, &l) == 0)
        return TV_OK;
    if (s->open_fd >= 0 && (errno == EAGAIN || errno == EACCES)) {
        tv_error_set(err, TV_E_LOCKED, "store %s is open in another process",
                     s->path);
        tv_error_hint(err, "wait until it ends, and repeat");
        return TV_E_LOCKED;
    }
    return tv_error_sys(err, s->open_fd >= 0 ? errno : EROFS,
                        "cannot lock store %s for itself", s->path);
}

void session_share(tv_store *s)
{
    struct flock l = range(F_RDLCK, 0);
    if (s->open_fd >= 0)
        (void)fcntl(s->open_fd, F_OFD_SETLK, &l); /* to a weaker lock */
}

bool session_hold(tv_store *s)
{
    struct flock l = range(F_WRLCK, byte_of(s->session));
    if (!s->session_held && s->open_fd >= 0)
        s->session_held = fcntl(s->open_fd, F_OFD_SETLK, &l) == 0;
    return s->session_held;
}

bool session_alive(const tv_store *s, uint64_t session)
{
    struct flock l = range(F_WRLCK, byte_of(session));
    if (session == s->session)
        return s->session_held;
    return s->open_fd >= 0 && fcntl(s->open_fd, F_OFD_GETLK, &l) == 0 &&
           l.l_type != F_UNLCK;
}
