/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hash_ahead.c - see hash_ahead.h.
 *
 * Two buffers of leaves: the importing thread reads one while the helper fills
 * the other, and tv_hash_ahead_take exchanges them. Both are as large as the
 * largest tensor needs and allocated before, so the helper cannot fail.
 */
#include "hash_ahead.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/pool.h"

#define LEAST_BYTES ((uint64_t)4 << 20)
#define NONE        SIZE_MAX

struct tv_hash_ahead {
    tv_input *in;
    const size_t *todo;
    size_t n_todo;
    tv_hash_ahead_fn fn;
    void *arg;
    enum tv_err rc;
    struct tv_hash *leaves[2];
    atomic_bool stop;
    pthread_mutex_t mutex; /* guards what follows */
    pthread_cond_t changed;
    size_t filled;  /* buffer of the helper, 0 or 1 */
    size_t claimed; /* in todo, NONE: nothing to be taken */
    bool ready;     /* what is claimed has been hashed */
    size_t begun;   /* tensors that the importing thread has come to */
};

/* False: stopped in between. */
static bool hash_tensor(struct tv_hash_ahead *a, size_t k, struct tv_hash *out)
{
    const struct tv_input_tensor *t = tv_input_tensor(a->in, a->todo[k]);
    struct tv_view v;

    /* Views of contiguous tensors in files are pointers. */
    if (!t->contiguous || tv_input_view(a->in, t, NULL, &v) != TV_OK)
        return false;
    const uint64_t n = tv_leaf_count(v.bytes);
    bool whole = true;
    for (uint64_t i = 0; whole && i < n; i++) {
        out[i] = tv_view_leaf(&v, i);
        whole = !atomic_load(&a->stop);
    }
    tv_input_release(a->in, &v);
    return whole;
}

static void help(struct tv_hash_ahead *a)
{
    size_t next = 0;

    (void)pthread_mutex_lock(&a->mutex);
    for (;;) {
        if (next < a->begun)
            next = a->begun;
        /* Not before the end: whoever leaves takes the pool's next item, which
         * the importing thread must find. */
        if (atomic_load(&a->stop))
            break;
        if (next >= a->n_todo || a->claimed != NONE) {
            (void)pthread_cond_wait(&a->changed, &a->mutex);
            continue;
        }
        struct tv_hash *out = a->leaves[a->filled];
        a->claimed = next;
        a->ready = false;
        (void)pthread_mutex_unlock(&a->mutex);
        const bool done = hash_tensor(a, next++, out);
        (void)pthread_mutex_lock(&a->mutex);
        a->ready = done;
        if (!done)
            a->claimed = NONE;
        (void)pthread_cond_signal(&a->changed);
    }
    (void)pthread_mutex_unlock(&a->mutex);
}

const struct tv_hash *tv_hash_ahead_take(struct tv_hash_ahead *a, size_t k)
{
    const struct tv_hash *found = NULL;

    if (!a)
        return NULL;
    (void)pthread_mutex_lock(&a->mutex);
    a->begun = k + 1;
    while (a->claimed == k && !a->ready)
        (void)pthread_cond_wait(&a->changed, &a->mutex);
    if (a->claimed == k) {
        found = a->leaves[a->filled];
        a->filled = 1 - a->filled;
        a->claimed = NONE;
    }
    (void)pthread_cond_signal(&a->changed);
    (void)pthread_mutex_unlock(&a->mutex);
    return found;
}

/* The store's batch belongs to the calling thread, which is worker 0 and may
 * find the other item taken or not. */
static void run_item(void *arg, size_t item, unsigned worker)
{
    struct tv_hash_ahead *a = arg;

    (void)item;
    if (worker != 0) {
        help(a);
        return;
    }
    if (atomic_load(&a->stop)) /* both items are this thread's */
        return;
    a->rc = a->fn(a->arg, a);
    (void)pthread_mutex_lock(&a->mutex);
    atomic_store(&a->stop, true);
    (void)pthread_cond_signal(&a->changed);
    (void)pthread_mutex_unlock(&a->mutex);
}

enum tv_err tv_hash_ahead_run(tv_input *in, const size_t *todo, size_t n_todo,
                              tv_hash_ahead_fn fn, void *arg,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    uint64_t bytes = 0;
    uint64_t most = 0;
    tv_pool *pool = NULL;
    struct tv_hash_ahead a = {.in = in,
                              .todo = todo,
                              .n_todo = n_todo,
                              .fn = fn,
                              .arg = arg,
                              .claimed = NONE};

    for (size_t i = 0; i < n_todo; i++) {
        const struct tv_input_tensor *t = tv_input_tensor(in, todo[i]);
        bytes += t->bytes;
        if (t->bytes > most)
            most = t->bytes;
    }
    if (bytes < LEAST_BYTES || tv_input_is_store(in) || tv_cpu_count() < 2)
        return fn(arg, NULL);
    (void)pthread_mutex_init(&a.mutex, NULL);
    (void)pthread_cond_init(&a.changed, NULL);
    for (size_t i = 0; i < 2; i++) {
        a.leaves[i] =
            tv_calloc((size_t)tv_leaf_count(most), sizeof *a.leaves[i]);
        if (!a.leaves[i]) {
            rc = tv_error_set(err, TV_E_NOMEM, "no memory for checksums");
            goto out;
        }
    }
    TV_TRY(tv_pool_open(2, err, &pool));
    tv_pool_run(pool, 2, run_item, &a);
    rc = a.rc;
out:
    tv_pool_close(pool);
    tv_free(a.leaves[0]);
    tv_free(a.leaves[1]);
    (void)pthread_cond_destroy(&a.changed);
    (void)pthread_mutex_destroy(&a.mutex);
    return rc;
}
