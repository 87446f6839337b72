/* SPDX-License-Identifier: Apache-2.0 */
/*
 * write_back.c - the disk begins while LMDB still writes.
 *
 * LMDB's commit hands all dirty pages to the page cache and then waits in
 * fdatasync for the disk, which has had nothing to do until then. While a large
 * commit runs, a thread asks every other millisecond for write-back of what has
 * arrived, so that copying and the disk overlap: 1.2x to 1.3x for an import.
 *
 * It promises nothing: fdatasync of the commit has the last word on what is
 * durable, and on errors (asking does not take them off the file). So whatever
 * goes wrong here only means that the disk begins later.
 */
#include "store_priv.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <time.h>

#include "tv/sys.h"

/* What is written faster than a thread is worth. */
#define LEAST_BYTES ((uint64_t)8 << 20)
#define PAUSE_NS    2000000L

static void after_pause(struct timespec *t)
{
    (void)clock_gettime(CLOCK_MONOTONIC, t);
    t->tv_nsec += PAUSE_NS;
    if (t->tv_nsec >= 1000000000L) {
        t->tv_nsec -= 1000000000L;
        t->tv_sec++;
    }
}

static void *ask(void *arg)
{
    struct write_back *w = arg;
    struct timespec next;

    (void)pthread_mutex_lock(&w->mutex);
    while (!w->done) {
        after_pause(&next);
        int e = 0;
        while (!w->done && e != ETIMEDOUT)
            e = pthread_cond_timedwait(&w->end, &w->mutex, &next);
        if (w->done)
            break;
        (void)pthread_mutex_unlock(&w->mutex);
        const int failed =
            tv_sys()->sync_file_range(w->fd, 0, 0, SYNC_FILE_RANGE_WRITE);
        (void)pthread_mutex_lock(&w->mutex);
        if (failed)
            break;
    }
    (void)pthread_mutex_unlock(&w->mutex);
    return NULL;
}

void write_back_begin(struct write_back *w, tv_store *s, uint64_t bytes)
{
    sigset_t all, before;
    pthread_condattr_t clock;

    memset(w, 0, sizeof *w);
    if (bytes < LEAST_BYTES || tv_lmdb()->env_get_fd(s->env, &w->fd) != 0)
        return;
    if (pthread_condattr_init(&clock) != 0)
        return;
    (void)pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
    (void)pthread_mutex_init(&w->mutex, NULL);
    (void)pthread_cond_init(&w->end, &clock);
    (void)pthread_condattr_destroy(&clock);
    /* Ctrl-C is for the threads that wait for it. */
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    w->running = pthread_create(&w->thread, NULL, ask, w) == 0;
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (!w->running) {
        (void)pthread_cond_destroy(&w->end);
        (void)pthread_mutex_destroy(&w->mutex);
    }
}

void write_back_end(struct write_back *w)
{
    if (!w->running)
        return;
    (void)pthread_mutex_lock(&w->mutex);
    w->done = true;
    (void)pthread_cond_signal(&w->end);
    (void)pthread_mutex_unlock(&w->mutex);
    (void)pthread_join(w->thread, NULL);
    (void)pthread_cond_destroy(&w->end);
    (void)pthread_mutex_destroy(&w->mutex);
    w->running = false;
}
