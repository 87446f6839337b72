/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pool.c - worker threads that take items off one shared counter.
 *
 * A run is a generation: the caller publishes the job under the mutex, wakes
 * everybody, works along as worker 0, and waits until each of the others has
 * reported back for this generation. So when tv_pool_run returns, no worker
 * looks at the job any more, and what the items wrote is visible to the caller
 * (the mutex orders it).
 *
 * Workers block all signals but the ones that a fault raises: Ctrl-C is for
 * the main thread, SIGBUS must reach the handler of cli/.
 */
#include "tv/pool.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "tv/alloc.h"

#define THREADS_MAX 4096u

struct worker {
    tv_pool *pool;
    pthread_t thread;
    unsigned number;
};

struct tv_pool {
    unsigned n_threads;     /* the caller included */
    unsigned n_started;     /* threads to join */
    struct worker *workers; /* [n_threads]; entry 0 is the caller, unused */
    pthread_mutex_t mutex;
    pthread_cond_t wake, idle;
    /* Guarded by the mutex. */
    uint64_t generation;
    unsigned n_busy;
    bool closing;
    /* The job: written under the mutex before a generation starts. */
    size_t n_items;
    void (*fn)(void *arg, size_t item, unsigned worker);
    void *arg;
    atomic_size_t next;
};

static void take_items(tv_pool *pool, unsigned worker)
{
    for (;;) {
        const size_t item =
            atomic_fetch_add_explicit(&pool->next, 1, memory_order_relaxed);
        if (item >= pool->n_items)
            return;
        pool->fn(pool->arg, item, worker);
    }
}

static void *worker_main(void *arg)
{
    const struct worker *w = arg;
    tv_pool *pool = w->pool;
    uint64_t seen = 0;

    (void)pthread_mutex_lock(&pool->mutex);
    for (;;) {
        while (!pool->closing && pool->generation == seen)
            (void)pthread_cond_wait(&pool->wake, &pool->mutex);
        if (pool->closing)
            break;
        seen = pool->generation;
        (void)pthread_mutex_unlock(&pool->mutex);
        take_items(pool, w->number);
        (void)pthread_mutex_lock(&pool->mutex);
        if (--pool->n_busy == 0)
            (void)pthread_cond_signal(&pool->idle);
    }
    (void)pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

static int start_workers(tv_pool *pool)
{
    static const int faults[] = {SIGBUS,  SIGSEGV, SIGFPE, SIGILL,
                                 SIGTRAP, SIGABRT, SIGSYS};
    sigset_t blocked;
    sigset_t before;
    int failed = 0;

    (void)sigfillset(&blocked);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++)
        (void)sigdelset(&blocked, faults[i]);
    failed = pthread_sigmask(SIG_SETMASK, &blocked, &before);
    if (failed != 0)
        return failed;
    while (failed == 0 && pool->n_started + 1 < pool->n_threads) {
        struct worker *w = &pool->workers[pool->n_started + 1];
        w->pool = pool;
        w->number = pool->n_started + 1;
        failed = pthread_create(&w->thread, NULL, worker_main, w);
        if (failed == 0)
            pool->n_started++;
    }
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    return failed;
}

enum tv_err tv_pool_open(unsigned n_threads, struct tv_error *err,
                         tv_pool **out)
{
    enum tv_err rc = TV_OK;
    tv_pool *pool = NULL;

    *out = NULL;
    if (n_threads < 1 || n_threads > THREADS_MAX)
        return tv_error_set(err, TV_E_USAGE,
                            "%u threads asked for; 1 to %u are possible",
                            n_threads, THREADS_MAX);
    pool = tv_calloc(1, sizeof *pool);
    if (!pool)
        return tv_error_set(err, TV_E_NOMEM, "out of memory for %u threads",
                            n_threads);
    pool->n_threads = n_threads;
    atomic_init(&pool->next, 0);
    /* With default attributes these cannot fail on Linux. */
    (void)pthread_mutex_init(&pool->mutex, NULL);
    (void)pthread_cond_init(&pool->wake, NULL);
    (void)pthread_cond_init(&pool->idle, NULL);
    pool->workers = tv_calloc(n_threads, sizeof *pool->workers);
    if (!pool->workers) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory for %u threads",
                          n_threads);
        goto out;
    }
    const int failed = start_workers(pool);
    if (failed != 0) {
        rc = tv_error_sys(err, failed, "cannot start %u threads", n_threads);
        goto out;
    }
    *out = pool;
    pool = NULL;
out:
    tv_pool_close(pool);
    return rc;
}

void tv_pool_close(tv_pool *pool)
{
    if (!pool)
        return;
    (void)pthread_mutex_lock(&pool->mutex);
    pool->closing = true;
    (void)pthread_cond_broadcast(&pool->wake);
    (void)pthread_mutex_unlock(&pool->mutex);
    for (unsigned i = 1; i <= pool->n_started; i++)
        (void)pthread_join(pool->workers[i].thread, NULL);
    (void)pthread_cond_destroy(&pool->idle);
    (void)pthread_cond_destroy(&pool->wake);
    (void)pthread_mutex_destroy(&pool->mutex);
    tv_free(pool->workers);
    tv_free(pool);
}

unsigned tv_pool_threads(const tv_pool *pool)
{
    return pool->n_threads;
}

void tv_pool_run(tv_pool *pool, size_t n_items,
                 void (*fn)(void *arg, size_t item, unsigned worker), void *arg)
{
    if (n_items == 0)
        return;
    if (n_items == 1 || pool->n_threads == 1) {
        for (size_t i = 0; i < n_items; i++)
            fn(arg, i, 0);
        return;
    }
    (void)pthread_mutex_lock(&pool->mutex);
    pool->n_items = n_items;
    pool->fn = fn;
    pool->arg = arg;
    atomic_store_explicit(&pool->next, 0, memory_order_relaxed);
    pool->n_busy = pool->n_started;
    pool->generation++;
    (void)pthread_cond_broadcast(&pool->wake);
    (void)pthread_mutex_unlock(&pool->mutex);

    take_items(pool, 0);

    (void)pthread_mutex_lock(&pool->mutex);
    while (pool->n_busy > 0)
        (void)pthread_cond_wait(&pool->idle, &pool->mutex);
    (void)pthread_mutex_unlock(&pool->mutex);
}
