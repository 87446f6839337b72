/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sink_lock.c - OUT/.tvmerge/lock: a flock, so that one run at a time writes to
 * OUT. The run that ends removes the file with its directory: whoever waited
 * for it holds the lock of a file without a name then, and tries again.
 */
#include "sink_dir.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <time.h>

#include "tv/alloc.h"
#include "tv/lock.h"
#include "tv/sys.h"

#define POLL_MS 20

static void nap(void)
{
    const struct timespec ts = {0, POLL_MS * 1000000L};
    (void)nanosleep(&ts, NULL);
}

/* Is fd still the file that the path names? A run that ends removes it. */
static bool is_same_file(int fd, const char *path)
{
    struct stat a;
    struct stat b;
    return tv_sys()->fstat(fd, &a) == 0 && tv_sys()->stat(path, &b) == 0 &&
           a.st_ino == b.st_ino && a.st_dev == b.st_dev;
}

static enum tv_err in_use(const struct sink_dir *s, const char *holder,
                          struct tv_error *err)
{
    (void)tv_error_set(err, TV_E_LOCKED, "%s is being written by %s", s->out,
                       holder);
    tv_error_hint(err, "'tvmerge status' says how far it is; wait until it "
                       "ends, or give a longer --lock-timeout");
    return TV_E_LOCKED;
}

enum tv_err sink_lock(struct sink_dir *s, const struct tvm_run_hooks *hooks,
                      struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const unsigned timeout = s->base.plan->options.lock_timeout_ms;
    char *path = tv_path_join(s->dir, SINK_LOCK_FILE);
    char holder[160] = "another run";
    int fd = -1;

    if (!path)
        return sink_no_memory(err);
    for (unsigned waited = 0;; waited += POLL_MS) {
        if (tv_sys()->mkdir(s->dir, 0777) != 0 && errno != EEXIST) {
            rc = tv_error_sys(err, errno, "cannot create %s", s->dir);
            break;
        }
        fd = tv_sys()->open(path, O_RDWR | O_CREAT, 0666);
        if (fd < 0 && errno != ENOENT) {
            rc = tv_error_sys(err, errno, "cannot open %s", path);
            break;
        }
        if (fd >= 0 && flock(fd, LOCK_EX | LOCK_NB) == 0 &&
            is_same_file(fd, path)) {
            tv_lock_sign(fd, "tvmerge run");
            s->lock_fd = fd;
            fd = -1;
            break;
        }
        if (fd >= 0) {
            tv_lock_holder(fd, holder, sizeof holder);
            (void)tv_sys()->close(fd);
        }
        fd = -1;
        if (waited >= timeout) {
            rc = in_use(s, holder, err);
            break;
        }
        if (waited == 0 && hooks && hooks->wait.fn)
            hooks->wait.fn(hooks->wait.arg, s->out, holder, timeout);
        if (hooks && hooks->cancel && *hooks->cancel) {
            rc = tv_error_set(err, TV_E_INTERRUPTED, "interrupted");
            break;
        }
        nap();
    }
    tv_free(path);
    return rc;
}

enum tv_err sink_check_lock(const struct sink_dir *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(s->dir, SINK_LOCK_FILE);
    char holder[160];

    if (!path)
        return sink_no_memory(err);
    const int fd = tv_sys()->open(path, O_RDONLY, 0);
    if (fd >= 0 && flock(fd, LOCK_SH | LOCK_NB) != 0) {
        tv_lock_holder(fd, holder, sizeof holder);
        rc = in_use(s, holder, err);
    }
    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_free(path);
    return rc;
}
