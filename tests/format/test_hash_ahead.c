/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_hash_ahead.c - the import's work is done once, by its own thread,
 * however late that comes; what is known ahead is what hashing gives.
 *
 * This program's pthread_mutex_unlock stands before the C library's, so that a
 * test may hold back the thread that has just woken the helper.
 */
#include <dlfcn.h>
#include <pthread.h>
#include <unistd.h>

#include "format_files.h"
#include "hash_ahead.h"
#include "test.h"
#include "tmpdir.h"
#include "tv/alloc.h"

#define ROWS 1024
#define COLS 1100 /* F32: more than what a helper is worth it for */

static _Thread_local bool slow; /* the next unlock of this thread */

#if !TEST_SANITIZED
int pthread_mutex_unlock(pthread_mutex_t *mutex)
{
    static int (*next)(pthread_mutex_t *);
    if (!next)
        *(void **)&next = dlsym(RTLD_NEXT, "pthread_mutex_unlock");
    const int rc = next(mutex);
    if (slow) {
        slow = false;
        (void)usleep(200000);
    }
    return rc;
}
#endif

struct seen {
    tv_input *in;
    size_t n_calls, n_known, n_wrong;
};

static enum tv_err look(void *arg, struct tv_hash_ahead *ahead)
{
    struct seen *s = arg;
    slow = false;
    s->n_calls++;
    assert_non_null(ahead);
    for (size_t k = 0; k < tv_input_count(s->in); k++) {
        const struct tv_hash *got = tv_hash_ahead_take(ahead, k);
        struct tv_view v;
        if (!got)
            continue;
        s->n_known++;
        assert_int_equal(
            tv_input_view(s->in, tv_input_tensor(s->in, k), NULL, &v), TV_OK);
        for (uint64_t i = 0; i < tv_leaf_count(v.bytes); i++)
            s->n_wrong += !tv_hash_equal(got[i], tv_view_leaf(&v, i));
        tv_input_release(s->in, &v);
    }
    return TV_OK;
}

static void run_once(bool late, size_t n_tensors)
{
    static const struct ff_tensor tensors[] = {
        {"a", TV_F32, 2, {ROWS, COLS}, 1},
        {"b", TV_F32, 2, {ROWS, COLS}, 2},
        {"c", TV_F32, 2, {ROWS, COLS}, 3},
    };
    static const size_t todo[] = {0, 1, 2};
    char *dir = tmpdir_make();
    struct tv_error err;
    struct seen s = {.n_calls = 0};

    ff_write(dir, "model.safetensors", tensors, n_tensors);
    assert_ok(tv_input_open_path(dir, &err, &s.in), &err);
    slow = late;
    assert_ok(tv_hash_ahead_run(s.in, todo, n_tensors, look, &s, &err), &err);
    assert_int_equal(s.n_calls, 1);
    assert_int_equal(s.n_wrong, 0);
    tv_input_close(s.in);
    tmpdir_remove(dir);
}

static void what_is_known_is_right(void **state)
{
    (void)state;
    for (size_t n = 1; n <= 3; n++)
        run_once(false, n);
}

/* The helper is through with all there is before the importing thread looks
 * for its item: it did that item as well, and nobody imported. */
static void a_late_importer_finds_its_work(void **state)
{
    (void)state;
#if TEST_SANITIZED
    skip(); /* sanitizers have the function themselves */
#endif
    (void)alarm(60); /* a hang is a failure */
    run_once(true, 1);
    run_once(true, 3);
    (void)alarm(0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(what_is_known_is_right),
        cmocka_unit_test(a_late_importer_finds_its_work),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
