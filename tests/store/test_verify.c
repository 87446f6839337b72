/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_verify.c - damage: one flipped bit anywhere in data.mdb is either
 * reported, or without any effect on what a reader gets.
 *
 * Each flip is tried in a child process, since a damaged tree may make LMDB
 * crash; a crash counts as a report (tv/store.h), a hang does not.
 */
#include "store_fixture.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "rng.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/sys.h"

struct damaged { /* a store on disk as it should be, and a copy to damage */
    struct fx *f;
    char *copy, *copy_data;
    char *bytes;
    size_t n;
};

/* Two objects, one shared tensor, a run with pins: every table has entries. */
static void fill(struct fx *f)
{
    tv_batch *b = NULL;
    uint64_t id = 0, shape[2];
    bool resumed = false;
    assert_ok(fx_object(f->s, "one", 1, 100, &f->err), &f->err);
    assert_ok(fx_object(f->s, "two", 1, 100, &f->err), &f->err);
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(tv_object_create(b, "three", TV_KIND_MERGE, "", "",
                               (struct tv_hash){3, 3}, &id, &resumed, &f->err),
              &f->err);
    for (unsigned i = 0; i < 40; i++) {
        char name[40];
        (void)snprintf(name, sizeof name, "model.layers.%u.weight", i);
        const struct tv_tensor_desc d = fx_desc(name, TV_F32, 20, 30, shape);
        assert_ok(fx_copy_in(&b, id, &d, 1000 + i, &f->err), &f->err);
    }
    assert_ok(tv_object_complete(b, id, false, &f->err), &f->err);
    assert_ok(tv_run_put(b, "run", "{\"a\": 1}", 8, &f->err), &f->err);
    assert_ok(tv_pin_put(b, "run", id, &f->err), &f->err);
    const struct tv_done done = {.name = "w", .bytes = 5};
    assert_ok(tv_done_put(b, "run", &done, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    assert_ok(fx_remove(f->s, "two", &f->err), &f->err);
    /* LMDB keeps the last two states; make both say the same. */
    for (int i = 0; i < 2; i++)
        assert_ok(tv_store_quota_set(f->s, 1u << 30, &f->err), &f->err);
}

static int setup(void **state)
{
    struct damaged *d = (struct damaged *)test_calloc(1, sizeof *d);
    fx_setup(state);
    d->f = (struct fx *)*state;
    fill(d->f);
    fx_verify(d->f);
    fx_close(d->f);
    char *data = tv_path_join(d->f->path, "data.mdb");
    assert_ok(tv_file_read(data, 1u << 30, &d->f->err, &d->bytes, &d->n),
              &d->f->err);
    tv_free(data);
    d->copy = tv_path_join(d->f->dir, "copy");
    assert_ok(tv_dir_make(d->copy, &d->f->err), &d->f->err);
    d->copy_data = tmpdir_write(d->copy, "data.mdb", d->bytes, d->n);
    *state = d;
    return 0;
}

static int teardown(void **state)
{
    struct damaged *d = (struct damaged *)*state;
    void *f = d->f;
    tv_free(d->copy);
    tv_free(d->copy_data);
    tv_free(d->bytes);
    test_free(d);
    return fx_teardown(&f);
}

static void poke(const struct damaged *d, size_t at, char c)
{
    const int fd = open(d->copy_data, O_WRONLY);
    assert_true(fd >= 0);
    assert_int_equal(pwrite(fd, &c, 1, (off_t)at), 1);
    assert_int_equal(close(fd), 0);
}

enum { RIGHT = 0, REPORTED = 1, SILENT = 2, HANG = 3 };

/* Everything that was put, read back. */
static enum tv_err read_all(tv_store *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_read *r = NULL;
    struct tv_object **list = NULL;
    struct tv_tensor_list *l = NULL;
    char *doc = NULL;
    size_t n = 0, n_doc = 0;
    bool found = false;
    TV_TRY(tv_read_begin(s, err, &r));
    TV_TRY(tv_object_list(r, true, err, &list, &n));
    if (n != 2 || strcmp(list[0]->name, "one") != 0 ||
        strcmp(list[1]->name, "three") != 0) {
        rc = TV_E_INTERNAL;
        goto out;
    }
    TV_TRY(tv_tensor_list(r, list[1]->id, err, &l));
    if (l->n != 40) {
        rc = TV_E_INTERNAL;
        goto out;
    }
    for (unsigned i = 0; i < 40; i++) {
        char name[40];
        (void)snprintf(name, sizeof name, "model.layers.%u.weight", i);
        if (strcmp(l->items[i].name, name) != 0 ||
            l->items[i].dtype != TV_F32 || l->items[i].shape[0] != 20 ||
            l->items[i].shape[1] != 30) {
            rc = TV_E_INTERNAL;
            goto out;
        }
        TV_TRY(fx_compare(r, list[1]->id, name, 1000 + i, err));
    }
    TV_TRY(tv_run_get(r, "run", &found, &doc, &n_doc, err));
    if (!found || n_doc != 8 || memcmp(doc, "{\"a\": 1}", 8) != 0)
        rc = TV_E_INTERNAL;
out:
    for (size_t i = 0; i < n; i++)
        tv_object_free(list[i]);
    tv_free(list);
    tv_free(doc);
    tv_tensor_list_free(l);
    tv_read_end(r);
    return rc;
}

static void to_stderr(void *arg, const char *object, const char *tensor,
                      const char *what)
{
    char line[1000];
    const int n =
        snprintf(line, sizeof line, "%s/%s: %s\n", object, tensor, what);
    (void)!write(*(int *)arg, line, n > 0 ? (size_t)n : 0);
}

static int examine(const char *path, int out)
{
    tv_store *s = NULL;
    struct tv_error err;
    /* cmocka's handlers would make an exit status of a crash. */
    static const int crashes[] = {SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL};
    for (size_t i = 0; i < sizeof crashes / sizeof crashes[0]; i++)
        (void)signal(crashes[i], SIG_DFL);
    (void)alarm(20);
    const int null = open("/dev/null", O_WRONLY);
    (void)dup2(null, 2);
    if (tv_store_open(path, NULL, &err, &s) != TV_OK)
        return REPORTED;
    if (tv_store_verify(s, 0, to_stderr, NULL, &out, &err) != TV_OK)
        return REPORTED;
    if (fx_object_compare(s, "one", 1, &err) != TV_OK ||
        read_all(s, &err) != TV_OK)
        return SILENT;
    tv_store_close(s);
    return RIGHT;
}

static int examine_in_child(const struct damaged *d, char *said, size_t cap)
{
    int up[2];
    int status = 0;
    assert_int_equal(pipe(up), 0);
    const pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0) {
        (void)close(up[0]);
        _exit(examine(d->copy, up[1]));
    }
    (void)close(up[1]);
    size_t n = 0;
    ssize_t got = 0;
    char drop[256];
    while ((got = n + 1 < cap ? read(up[0], said + n, cap - 1 - n)
                              : read(up[0], drop, sizeof drop)) > 0)
        n += n + 1 < cap ? (size_t)got : 0;
    said[n] = '\0';
    (void)close(up[0]);
    assert_int_equal(waitpid(pid, &status, 0), pid);
    if (WIFSIGNALED(status))
        return WTERMSIG(status) == SIGALRM ? HANG : REPORTED;
    return WIFEXITED(status) ? WEXITSTATUS(status) : HANG;
}

static void undamaged_is_right(void **state)
{
    struct damaged *d = (struct damaged *)*state;
    char said[200];
    assert_int_equal(examine_in_child(d, said, sizeof said), RIGHT);
    assert_string_equal(said, "");
}

static void flips_anywhere(void **state)
{
    struct damaged *d = (struct damaged *)*state;
    struct rng r;
    char said[200];
    unsigned seen[4] = {0, 0, 0, 0};
    rng_open(&r, 1);
    for (int i = 0; i < 500; i++) {
        const size_t at = (size_t)rng_below(&r, d->n);
        const char flip = (char)(1 << rng_below(&r, 8));
        poke(d, at, (char)(d->bytes[at] ^ flip));
        const int what = examine_in_child(d, said, sizeof said);
        if (what != RIGHT && what != REPORTED)
            print_error("byte %zu ^ %d: %d\n", at, flip, what);
        assert_true(what == RIGHT || what == REPORTED);
        seen[what]++;
        poke(d, at, d->bytes[at]);
    }
    assert_true(seen[REPORTED] > 50);
    assert_int_equal(examine_in_child(d, said, sizeof said), RIGHT);
}

/* The same where it hurts most: the first bytes of every page. */
static void flips_in_page_heads(void **state)
{
    struct damaged *d = (struct damaged *)*state;
    struct rng r;
    char said[200];
    rng_open(&r, 2);
    for (int i = 0; i < 300; i++) {
        const size_t page = (size_t)rng_below(&r, d->n / 4096);
        const size_t at = page * 4096 + (size_t)rng_below(&r, 160);
        poke(d, at, (char)(d->bytes[at] ^ (1 << rng_below(&r, 8))));
        const int what = examine_in_child(d, said, sizeof said);
        if (what != RIGHT && what != REPORTED)
            print_error("byte %zu: %d\n", at, what);
        assert_true(what == RIGHT || what == REPORTED);
        poke(d, at, d->bytes[at]);
    }
}

/* Where the payload of a seed lies: behind a chunk header. (Its bytes may also
 * be found elsewhere, in unused parts of pages.) */
static size_t find_payload(const struct damaged *d, uint64_t seed)
{
    unsigned char want[64];
    fx_bytes(seed, want, sizeof want);
    size_t at = 0, n = 0;
    for (size_t i = 64; i + 64 <= d->n; i += 64) {
        if (memcmp(d->bytes + i, want, 64) == 0 &&
            memcmp(d->bytes + i - 48, "tVck", 4) == 0) {
            at = i;
            n++;
        }
    }
    assert_int_equal(n, 1);
    return at;
}

/* A payload byte: reported under the name of object and tensor. */
static void payload_flip_names_the_tensor(void **state)
{
    struct damaged *d = (struct damaged *)*state;
    char said[2000];
    struct rng r;
    rng_open(&r, 3);
    for (int i = 0; i < 20; i++) {
        const unsigned which = (unsigned)rng_below(&r, 40);
        char name[60];
        const size_t at =
            find_payload(d, 1000 + which) + (size_t)rng_below(&r, 2400);
        poke(d, at, (char)(d->bytes[at] ^ 1));
        assert_int_equal(examine_in_child(d, said, sizeof said), REPORTED);
        (void)snprintf(name, sizeof name,
                       "three/model.layers.%u.weight:", which);
        if (strstr(said, name) == NULL)
            print_error("%s", said);
        assert_non_null(strstr(said, name));
        poke(d, at, d->bytes[at]);
    }
}

/* A side file's byte: by verify with the object's name, and by the reader. */
static void side_file_flip(void **state)
{
    struct damaged *d = (struct damaged *)*state;
    char said[2000];
    const uint64_t seed = 1; /* its eight bytes are the file */
    size_t at = 0;
    /* The blob is the only record whose head says 8 bytes of type 9. */
    static const unsigned char head[8] = {9, 1, 0, 0, 8, 0, 0, 0};
    bool found = false;
    for (at = 0; !found && at + 24 <= d->n; at++)
        found = memcmp(d->bytes + at, head, sizeof head) == 0 &&
                memcmp(d->bytes + at + 16, &seed, sizeof seed) == 0;
    assert_true(found);
    /* Old copies of the page may lie about: damage all of them. */
    for (size_t i = 0; i + 24 <= d->n; i++)
        if (memcmp(d->bytes + i, head, sizeof head) == 0 &&
            memcmp(d->bytes + i + 16, &seed, sizeof seed) == 0)
            poke(d, i + 17, 'x');
    assert_int_equal(examine_in_child(d, said, sizeof said), REPORTED);
    assert_non_null(strstr(said, "one/: "));
    assert_non_null(strstr(said, "config.json"));
}

/* The reader of a damaged tensor finds it by its leaves, even without verify.
 */
static void reader_sees_damage(void **state)
{
    struct damaged *d = (struct damaged *)*state;
    struct fx *f = d->f;
    tv_store *s = NULL;
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    const size_t at = find_payload(d, 1007) + 100;
    poke(d, at, (char)(d->bytes[at] ^ 32));
    assert_ok(tv_store_open(d->copy, NULL, &f->err, &s), &f->err);
    assert_ok(tv_read_begin(s, &f->err, &r), &f->err);
    assert_ok(tv_object_find(r, "three", false, &f->err, &o), &f->err);
    assert_ok(fx_compare(r, o->id, "model.layers.6.weight", 1006, &f->err),
              &f->err);
    assert_code(fx_compare(r, o->id, "model.layers.7.weight", 1007, &f->err),
                TV_E_CORRUPT, &f->err);
    /* A damaged chunk is not shared with: a sound copy is written. */
    uint64_t id = 0, shape[2];
    bool resumed = false;
    tv_batch *b = NULL;
    assert_ok(tv_batch_begin(s, false, &f->err, &b), &f->err);
    assert_ok(tv_object_create(b, "again", TV_KIND_MODEL, "", "",
                               (struct tv_hash){8, 8}, &id, &resumed, &f->err),
              &f->err);
    const struct tv_tensor_desc t = fx_desc("w", TV_F32, 20, 30, shape);
    assert_ok(fx_copy_in(&b, id, &t, 1007, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    assert_ok(tv_read_renew(r, &f->err), &f->err);
    assert_ok(fx_compare(r, id, "w", 1007, &f->err), &f->err);
    /* A damaged header is refused at the view. */
    poke(d, find_payload(d, 1007) - 48 + 9, 1);
    assert_code(fx_compare(r, o->id, "model.layers.7.weight", 1007, &f->err),
                TV_E_CORRUPT, &f->err);
    assert_message(&f->err, "model.layers.7.weight");
    assert_message(&f->err, d->copy);
    tv_object_free(o);
    tv_read_end(r);
    tv_store_close(s);
}

static void problems_do_not_stop_it(void **state)
{
    struct damaged *d = (struct damaged *)*state;
    char said[4000];
    for (unsigned i = 3; i < 40; i += 9) {
        const size_t at = find_payload(d, 1000 + i) + 5 * i;
        poke(d, at, (char)(d->bytes[at] ^ 2));
    }
    assert_int_equal(examine_in_child(d, said, sizeof said), REPORTED);
    for (unsigned i = 3; i < 40; i += 9) {
        char name[60];
        (void)snprintf(name, sizeof name, "layers.%u.weight:", i);
        assert_non_null(strstr(said, name));
    }
}

static void count_bytes(void *arg, uint64_t done, uint64_t total)
{
    uint64_t *last = (uint64_t *)arg;
    assert_true(done >= *last && done <= total);
    *last = done;
}

static void progress_reaches_the_end(void **state)
{
    struct damaged *d = (struct damaged *)*state;
    struct fx *f = d->f;
    uint64_t last = 0;
    struct tv_store_stat st;
    fx_open(f, NULL);
    assert_ok(tv_store_verify(f->s, 0, NULL, count_bytes, &last, &f->err),
              &f->err);
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(last, st.weights + st.outputs);
}

static unsigned n_tasks(void)
{
    unsigned n = 0;
    DIR *d = opendir("/proc/self/task");
    assert_non_null(d);
    while (readdir(d) != NULL)
        n++;
    assert_int_equal(closedir(d), 0);
    return n;
}

static void count_threads(void *arg, uint64_t done, uint64_t total)
{
    unsigned *most = (unsigned *)arg;
    const unsigned n = n_tasks();
    (void)done;
    (void)total;
    *most = n > *most ? n : *most;
}

static void threads_as_asked_for(void **state)
{
    struct damaged *d = (struct damaged *)*state;
    struct fx *f = d->f;
    fx_open(f, NULL);
    for (unsigned n = 1; n <= 5; n += 2) {
        const unsigned before = n_tasks();
        unsigned most = 0;
        assert_ok(tv_store_verify(f->s, n, NULL, count_threads, &most, &f->err),
                  &f->err);
        assert_int_equal(most, before + n - 1);
    }
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(undamaged_is_right),      T(flips_anywhere),
        T(flips_in_page_heads),     T(payload_flip_names_the_tensor),
        T(side_file_flip),          T(reader_sees_damage),
        T(problems_do_not_stop_it), T(progress_reaches_the_end),
        T(threads_as_asked_for),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
