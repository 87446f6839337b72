/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_map.c - read-only maps and what a SIGBUS handler can learn of them.
 */
#include "test.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faults.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/sys.h"

static int set_up(void **state)
{
    *state = tmpdir_make();
    return 0;
}

static int tear_down(void **state)
{
    faults_sys_off();
    tmpdir_remove(*state);
    return 0;
}

static void test_open_and_describe(void **state)
{
    struct tv_error err;
    tv_map *map = NULL;
    const char *file = NULL;
    const char *extent = "unset";
    char *path = tmpdir_write(*state, "m", "0123456789", 10);
    assert_ok(tv_map_open(path, &err, &map), &err);
    assert_int_equal(tv_map_bytes(map), 10);
    assert_memory_equal(tv_map_data(map), "0123456789", 10);
    assert_string_equal(tv_map_path(map), path);
    assert_int_equal(tv_map_stat(map)->st_size, 10);
    const unsigned char *p = tv_map_data(map);
    assert_true(tv_map_describe(p, &file, &extent));
    assert_string_equal(file, path);
    assert_null(extent);

    /* A gap at 0, an empty extent at the start of another, a gap at 9. */
    const struct tv_extent extents[] = {
        {1, 2, "a"},      {3, 0, "empty"}, {3, 4, "b"},
        {7, 0, "empty2"}, {7, 2, "c"},
    };
    tv_map_set_extents(map, extents, 5);
    static const char *const want[] = {NULL, "a", "a", "b", "b",
                                       "b",  "b", "c", "c", NULL};
    for (size_t i = 0; i < 10; i++) {
        assert_true(tv_map_describe(p + i, &file, &extent));
        if (want[i])
            assert_string_equal(extent, want[i]);
        else
            assert_null(extent);
    }
    assert_false(tv_map_describe(p + 10, &file, &extent));
    assert_false(tv_map_describe(p - 1, &file, &extent));
    assert_false(tv_map_describe(NULL, &file, &extent));
    const struct tv_extent swapped[] = {{3, 4, "b"}, {3, 0, "empty"}};
    tv_map_set_extents(map, swapped, 2);
    assert_true(tv_map_describe(p + 4, &file, &extent));
    assert_string_equal(extent, "b");
    tv_map_set_extents(map, NULL, 0);
    assert_true(tv_map_describe(p + 4, &file, &extent));
    assert_null(extent);
    tv_map_close(map);
    assert_false(tv_map_describe(p, &file, &extent));
    tv_map_close(NULL);
    tv_free(path);
}

static void test_empty_file(void **state)
{
    struct tv_error err;
    tv_map *map = NULL;
    char *path = tmpdir_write(*state, "m", "", 0);
    assert_ok(tv_map_open(path, &err, &map), &err);
    assert_null(tv_map_data(map));
    assert_int_equal(tv_map_bytes(map), 0);
    const struct tv_extent e = {0, 0, "x"};
    tv_map_set_extents(map, &e, 1);
    tv_map_close(map);
    tv_free(path);
}

static void test_refusals(void **state)
{
    struct tv_error err;
    tv_map *map = (tv_map *)&err;
    char *dir = *state;
    char *none = tv_path_join(dir, "none");
    assert_code(tv_map_open(none, &err, &map), TV_E_INPUT, &err);
    assert_null(map);
    assert_int_equal(err.sys_errno, ENOENT);
    assert_message(&err, "none");
    assert_code(tv_map_open(none, NULL, &map), TV_E_INPUT, NULL);
    assert_code(tv_map_open(dir, &err, &map), TV_E_INPUT, &err);
    assert_message(&err, "not a regular file");
    assert_int_equal(mkfifo(none, 0600), 0);
    assert_code(tv_map_open(none, &err, &map), TV_E_INPUT, &err);
    tv_free(none);
}

static enum tv_err work_open(void *arg, struct tv_error *err)
{
    tv_map *map = NULL;
    const enum tv_err rc = tv_map_open(arg, err, &map);
    if (rc != TV_OK)
        assert_null(map);
    tv_map_close(map);
    return rc;
}

static void test_faults(void **state)
{
    char *path = tmpdir_write(*state, "m", "abc", 3);
    assert_int_equal(faults_loop_alloc(work_open, path, false), 2);
    assert_int_equal(faults_loop_sys(work_open, path, FAULT_OPEN | FAULT_FSTAT,
                                     EACCES, TV_E_IO, false),
                     2);
    assert_int_equal(
        faults_loop_sys(work_open, path, FAULT_MMAP, ENOMEM, TV_E_NOMEM, false),
        1);
    tv_free(path);
}

static void test_foreign_maps(void **state)
{
    (void)state;
    static char memory[100];
    const char *file = NULL;
    const char *extent = NULL;
    char label[] = "the store";
    const uint64_t heap = test_heap_bytes();
    const int slot = tv_map_register(memory, sizeof memory, label);
    assert_true(slot >= 0);
    label[0] = 'X';
    assert_true(tv_map_describe(memory + 99, &file, &extent));
    assert_string_equal(file, "the store");
    assert_null(extent);
    assert_false(tv_map_describe(memory + 100, &file, &extent));
    tv_map_unregister(slot);
    assert_false(tv_map_describe(memory, &file, &extent));
    tv_map_unregister(-1);
    tv_map_unregister(1 << 30);
    assert_int_equal(tv_map_register(NULL, 5, "x"), -1);
    assert_int_equal(tv_map_register(memory, 0, "x"), -1);
    assert_int_equal(tv_map_register(memory, UINT64_MAX, "x"), -1);
    tv_alloc_fail_at(1, 1);
    assert_int_equal(tv_map_register(memory, 5, "x"), -1);
    tv_alloc_fail_at(0, 0);
    assert_true(test_heap_bytes() == heap);
}

static void test_more_maps_than_slots(void **state)
{
    struct tv_error err;
    static char memory[10000];
    static int slots[10000];
    const char *file = NULL;
    const char *extent = NULL;
    size_t n = 0;
    while (n < sizeof memory &&
           (slots[n] = tv_map_register(memory + n, 1, "one")) >= 0)
        n++;
    assert_true(n >= 1000 && n < sizeof memory);
    /* A map without a slot works, it just has no name. */
    char *path = tmpdir_write(*state, "m", "abc", 3);
    tv_map *map = NULL;
    assert_ok(tv_map_open(path, &err, &map), &err);
    assert_memory_equal(tv_map_data(map), "abc", 3);
    const struct tv_extent e = {0, 3, "x"};
    tv_map_set_extents(map, &e, 1);
    assert_false(tv_map_describe(tv_map_data(map), &file, &extent));
    tv_map_close(map);
    assert_true(tv_map_describe(memory + n - 1, &file, &extent));
    for (size_t i = 0; i < n; i++)
        tv_map_unregister(slots[i]);
    assert_false(tv_map_describe(memory, &file, &extent));
    assert_ok(tv_map_open(path, &err, &map), &err);
    assert_true(tv_map_describe(tv_map_data(map), &file, &extent));
    tv_map_close(map);
    tv_free(path);
}

static atomic_bool stop;

static void *open_and_close(void *arg)
{
    while (!atomic_load(&stop)) {
        tv_map *map = NULL;
        if (tv_map_open(arg, NULL, &map) != TV_OK)
            return arg;
        const struct tv_extent e = {0, 1, "other"};
        tv_map_set_extents(map, &e, 1);
        tv_map_close(map);
    }
    return NULL;
}

static void test_describe_while_others_come_and_go(void **state)
{
    struct tv_error err;
    char *path = tmpdir_write(*state, "m", "abc", 3);
    char *other = tmpdir_write(*state, "o", "defg", 4);
    tv_map *map = NULL;
    pthread_t t[2];
    assert_ok(tv_map_open(path, &err, &map), &err);
    const struct tv_extent e = {0, 3, "mine"};
    tv_map_set_extents(map, &e, 1);
    for (int i = 0; i < 2; i++)
        assert_int_equal(pthread_create(&t[i], NULL, open_and_close, other), 0);
    for (int i = 0; i < 2000; i++) {
        const char *file = NULL;
        const char *extent = NULL;
        assert_true(tv_map_describe(tv_map_data(map) + 1, &file, &extent));
        assert_string_equal(file, path);
        assert_string_equal(extent, "mine");
    }
    atomic_store(&stop, true);
    for (int i = 0; i < 2; i++) {
        void *failed = NULL;
        assert_int_equal(pthread_join(t[i], &failed), 0);
        assert_null(failed);
    }
    tv_map_close(map);
    tv_free(path);
    tv_free(other);
}

static void on_bus_error(int sig, siginfo_t *info, void *context)
{
    const char *file = NULL;
    const char *extent = NULL;
    (void)sig;
    (void)context;
    if (tv_map_describe(info->si_addr, &file, &extent) && extent &&
        strcmp(extent, "tail") == 0)
        _exit(12);
    _exit(1);
}

static void test_a_shrunk_file_is_named(void **state)
{
    struct tv_error err;
    static char data[20000];
    char *path = tmpdir_write(*state, "m", data, sizeof data);
    const pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        struct sigaction sa = {.sa_sigaction = on_bus_error,
                               .sa_flags = SA_SIGINFO};
        tv_map *map = NULL;
        const struct tv_extent e[] = {{0, 10000, "head"},
                                      {10000, 10000, "tail"}};
        if (sigaction(SIGBUS, &sa, NULL) != 0 ||
            tv_map_open(path, &err, &map) != TV_OK)
            _exit(2);
        tv_map_set_extents(map, e, 2);
        if (truncate(path, 100) != 0)
            _exit(3);
        const volatile unsigned char *p = tv_map_data(map);
        _exit(p[19000] == 77 ? 4 : 5);
    }
    int status = 0;
    assert_int_equal(waitpid(pid, &status, 0), pid);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 12);
    tv_free(path);
}

#define T(f) cmocka_unit_test_setup_teardown(f, set_up, tear_down)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(test_open_and_describe),
        T(test_empty_file),
        T(test_refusals),
        T(test_faults),
        T(test_foreign_maps),
        T(test_more_maps_than_slots),
        T(test_describe_while_others_come_and_go),
        T(test_a_shrunk_file_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
