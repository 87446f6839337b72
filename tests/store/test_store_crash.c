/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_store_crash.c - a writer killed at random moments.
 *
 * The child replaces objects again and again and says through a pipe what it
 * begins and what it has committed. After each kill the store must open, be
 * free of damage, hold what was said to be committed, or what was begun after
 * it, whole; and go on.
 */
#include "store_fixture.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "rng.h"
#include "tv/alloc.h"
#include "tv/sys.h"

#define N_KILLS 40
#define N_SLOTS 3

struct note {
    uint32_t slot, kind; /* 0 begun, 1 committed, 2 removal begun */
    uint64_t seed;
};

static int say(int fd, uint32_t slot, uint32_t kind, uint64_t seed)
{
    const struct note n = {slot, kind, seed};
    return write(fd, &n, sizeof n) == sizeof n ? 0 : -1;
}

static void slot_name(char name[8], uint64_t slot)
{
    name[0] = 'm';
    name[1] = (char)('0' + slot);
    name[2] = '\0';
}

/* Works until it is killed; returns a status only when something is wrong. */
static int writer(const char *path, uint64_t seed, int out)
{
    const struct tv_store_options opt = {.dirty_bytes_max = 128u << 10};
    tv_store *s = NULL;
    struct tv_error err;
    char name[8];
    if (tv_store_open(path, &opt, &err, &s) != TV_OK)
        return 10;
    /* The lock died with its last holder. */
    if (tv_store_lock(s, "crash test", 1000, &err) != TV_OK)
        return 11;
    for (;; seed++) {
        const uint32_t slot = (uint32_t)(seed % N_SLOTS);
        slot_name(name, slot);
        if (say(out, slot, 0, seed) != 0)
            return 12;
        /* Up to 400 KB in batches of 128 KiB. */
        if (fx_object(s, name, seed, 300 + seed % 2700, &err) != TV_OK)
            return 13;
        if (say(out, slot, 1, seed) != 0)
            return 12;
        if (seed % 7 == 0) {
            if (say(out, slot, 2, seed) != 0)
                return 12;
            if (fx_remove(s, name, &err) != TV_OK)
                return 14;
        }
    }
}

/* The seed that the object of a slot was made from; 0 when there is none. */
static uint64_t seed_of(struct fx *f, uint64_t slot)
{
    char name[8];
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    const void *data = NULL;
    size_t n = 0;
    uint64_t seed = 0;
    slot_name(name, slot);
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    const enum tv_err rc = tv_object_find(r, name, false, &f->err, &o);
    if (rc == TV_OK) {
        assert_ok(tv_blob_get(r, o->files[0].digest, &data, &n, &f->err),
                  &f->err);
        assert_int_equal(n, sizeof seed);
        memcpy(&seed, data, n);
        tv_object_free(o);
    } else {
        assert_int_equal(rc, TV_E_NOTFOUND);
    }
    tv_read_end(r);
    return seed;
}

/* Until so many notes are there to read: on a slow machine a writer is killed
 * at work too, and some after a commit. */
static void wait_for_notes(int fd, int n)
{
    int bytes = 0;
    for (int ms = 0; ms < 20000; ms++) {
        if (ioctl(fd, FIONREAD, &bytes) != 0 ||
            bytes >= n * (int)sizeof(struct note))
            return;
        (void)usleep(1000);
    }
}

static void killed_writer_loses_nothing(void **state)
{
    struct fx *f = (struct fx *)*state;
    uint64_t done[N_SLOTS] = {0}, begun[N_SLOTS] = {0};
    bool going[N_SLOTS] = {false}; /* removal begun */
    uint64_t next = 1, n_done = 0, n_moved = 0;
    struct rng r;
    rng_open(&r, 1);
    fx_close(f);
    for (int kill_no = 0; kill_no < N_KILLS; kill_no++) {
        int up[2], status = 0;
        struct note n;
        assert_int_equal(pipe(up), 0);
        const pid_t pid = fork();
        assert_true(pid >= 0);
        if (pid == 0) {
            (void)close(up[0]);
            _exit(writer(f->path, next, up[1]));
        }
        (void)close(up[1]);
        wait_for_notes(up[0], kill_no % 4);
        (void)usleep((useconds_t)(2000 + rng_below(&r, 50000)));
        assert_int_equal(kill(pid, SIGKILL), 0);
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFSIGNALED(status));
        while (read(up[0], &n, sizeof n) == sizeof n) {
            assert_true(n.slot < N_SLOTS);
            if (n.kind == 0)
                begun[n.slot] = n.seed;
            if (n.kind == 1)
                done[n.slot] = n.seed;
            going[n.slot] = n.kind == 2 || (n.kind == 0 && going[n.slot]);
            n_done += n.kind == 1;
            next = n.seed + 1;
        }
        (void)close(up[0]);

        fx_open(f, NULL);
        fx_verify(f);
        for (uint64_t slot = 0; slot < N_SLOTS; slot++) {
            char name[8];
            slot_name(name, slot);
            const uint64_t is = seed_of(f, slot);
            if (is == 0) {
                assert_true(done[slot] == 0 || going[slot]);
                continue;
            }
            assert_true(is == done[slot] || is == begun[slot]);
            n_moved += is != done[slot];
            done[slot] = is;
            assert_ok(fx_object_compare(f->s, name, is, &f->err), &f->err);
        }
        if (kill_no % 8 == 7) {
            uint64_t freed = 0;
            assert_ok(tv_store_lock(f->s, "gc", 1000, &f->err), &f->err);
            assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
            fx_verify(f);
        }
        fx_close(f);
    }
    print_message("%d kills, %llu commits, %llu of them without a word\n",
                  N_KILLS, (unsigned long long)n_done,
                  (unsigned long long)n_moved);
    assert_true(n_done > 0);
    /* What dead writers left does not pile up. */
    uint64_t freed = 0;
    struct tv_store_stat st;
    fx_open(f, NULL);
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_true(st.file_bytes < 20u << 20);
    fx_verify(f);
}

#define T(name) cmocka_unit_test_setup_teardown(name, fx_setup, fx_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {T(killed_writer_loses_nothing)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
