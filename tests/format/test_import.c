/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_import.c - all or nothing: what readers see before, during and after an
 * import; continuing one that was cancelled, failed or killed; links; force.
 */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faults.h"
#include "format_files.h"
#include "test.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/sys.h"

static char *dir;   /* holds the store */
static char *model; /* holds the source */
static const struct ff_tensor *tensors;
static size_t n_tensors;
static tv_store *store;

static tv_store *open_store(void)
{
    char *path = tv_path_join(dir, "store");
    /* Small batches, so that a killed import has left something behind. */
    const struct tv_store_options opt = {.dirty_bytes_max = 1};
    tv_store *s = NULL;
    struct tv_error err;

    if (!tv_path_exists(path))
        assert_ok(tv_store_create(path, 0, &err), &err);
    assert_ok(tv_store_open(path, &opt, &err, &s), &err);
    tv_free(path);
    return s;
}

static int setup(void **state)
{
    (void)state;
    dir = tmpdir_make();
    model = tmpdir_make();
    tensors = ff_model(model, &n_tensors);
    store = open_store();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    tv_store_close(store);
    store = NULL;
    tmpdir_remove(model);
    tmpdir_remove(dir);
    return 0;
}

static tv_input *open_object(const char *name)
{
    struct tv_ref_part part;
    tv_input *in = NULL;
    struct tv_error err;
    char *copy = tv_strdup(name);

    memset(&part, 0, sizeof part);
    part.object = copy;
    assert_ok(tv_input_open(&part, store, &err, &in), &err);
    tv_free(copy);
    return in;
}

/* An object of that name that readers see. */
static bool visible(const char *name)
{
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    struct tv_error err;
    enum tv_err rc = TV_OK;

    assert_ok(tv_read_begin(store, &err, &r), &err);
    rc = tv_object_find(r, name, false, &err, &o);
    tv_object_free(o);
    tv_read_end(r);
    assert_true(rc == TV_OK || rc == TV_E_NOTFOUND);
    return rc == TV_OK;
}

static enum tv_err import(const char *name, const char *from,
                          struct tv_transfer *t, struct tv_error *err)
{
    tv_input *in = NULL;
    enum tv_err rc = tv_input_open_path(from, err, &in);

    if (rc == TV_OK)
        rc = tv_import(store, name, in, t, err);
    tv_input_close(in);
    return rc;
}

static void import_ok(const char *name, const char *from, struct tv_transfer *t)
{
    struct tv_error err;

    assert_ok(import(name, from, t, &err), &err);
}

static void check_object(const char *name)
{
    tv_input *in = open_object(name);

    ff_assert_tensors(in, tensors, n_tensors);
    for (size_t i = 0; i < tv_input_side_count(in); i++) {
        const char *side = tv_input_side_name(in, i);
        struct tv_error err;
        char *got = NULL;
        size_t n_got = 0;
        size_t n_want = 0;
        bool found = false;
        char *want = ff_read(model, side, &n_want);

        assert_ok(tv_input_side_read(in, side, &found, &got, &n_got, &err),
                  &err);
        assert_int_equal(n_got, n_want);
        assert_memory_equal(got, want, n_want);
        tv_free(got);
        tv_free(want);
    }
    assert_int_equal(tv_input_side_count(in), 3);
    tv_input_close(in);
}

static void verify_store(void)
{
    struct tv_error err;

    assert_ok(tv_store_verify(store, 0, NULL, NULL, NULL, &err), &err);
}

struct watch {
    uint64_t done, total, calls;
    bool seen; /* the object was visible before the end */
    int cancel_at;
    atomic_int cancel;
    int kill_at;
    const char *touch;
};

static void on_bytes(void *arg, uint64_t done, uint64_t total)
{
    struct watch *w = arg;

    assert_true(done >= w->done);
    w->done = done;
    w->total = total;
    w->calls++;
    if (w->cancel_at != 0 && w->calls == (uint64_t)w->cancel_at)
        w->cancel = 1;
    if (w->kill_at != 0 && w->calls == (uint64_t)w->kill_at)
        (void)raise(SIGKILL);
    if (w->touch != NULL && w->calls == 1) {
        const struct timespec old[2] = {{1000000000, 0}, {1000000000, 0}};

        assert_int_equal(utimensat(AT_FDCWD, w->touch, old, 0), 0);
    }
    if (done < total)
        w->seen = w->seen || visible("m");
}

static void test_copy(void **state)
{
    struct tv_transfer t;
    struct watch w;
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    struct tv_error err;
    char *real = realpath(model, NULL);

    (void)state;
    memset(&t, 0, sizeof t);
    memset(&w, 0, sizeof w);
    t.progress = on_bytes;
    t.progress_arg = &w;
    import_ok("m", model, &t);
    assert_int_equal(t.n_tensors, n_tensors);
    assert_int_equal(t.n_resumed, 0);
    assert_int_equal(w.calls, n_tensors);
    assert_int_equal(w.done, w.total);
    assert_int_equal(t.bytes, w.total);
    assert_false(w.seen);
    check_object("m");
    verify_store();
    assert_ok(tv_read_begin(store, &err, &r), &err);
    assert_ok(tv_object_find(r, "m", false, &err, &o), &err);
    assert_string_equal(o->architecture, "LlamaForCausalLM");
    assert_string_equal(o->source_path, real);
    assert_int_equal(o->kind, TV_KIND_MODEL);
    assert_false(o->linked);
    tv_object_free(o);
    tv_read_end(r);
    free(real);

    /* The same content again is shared. */
    t.progress = NULL;
    import_ok("again", model, &t);
    assert_int_equal(t.bytes_shared, t.bytes);
    check_object("again");
}

static void test_link(void **state)
{
    struct tv_transfer t;
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    struct tv_error err;
    char *bin = tmpdir_make();

    (void)state;
    memset(&t, 0, sizeof t);
    t.link = true;
    import_ok("m", model, &t);
    check_object("m");
    assert_ok(tv_read_begin(store, &err, &r), &err);
    assert_ok(tv_object_find(r, "m", false, &err, &o), &err);
    assert_true(o->linked);
    tv_object_free(o);
    tv_read_end(r);

    ff_copy("good/torch/plain.bin", bin, "pytorch_model.bin");
    assert_code(import("bin", bin, &t, &err), TV_E_UNSUPPORTED, &err);
    assert_message(&err, "only safetensors files can be linked");
    t.link = false;
    import_ok("bin", bin, &t);
    assert_false(visible("absent"));
    {
        tv_input *in = open_object("m");

        t.link = true;
        assert_code(tv_import(store, "other", in, &t, &err), TV_E_UNSUPPORTED,
                    &err);
        t.link = false;
        assert_ok(tv_import(store, "other", in, &t, &err), &err);
        tv_input_close(in);
    }
    check_object("other");
    tmpdir_remove(bin);
}

static void test_adapter(void **state)
{
    char *lora = tmpdir_make();
    struct tv_transfer t;
    tv_input *in = NULL;
    tv_adapter *a = NULL;
    struct tv_error err;

    (void)state;
    memset(&t, 0, sizeof t);
    ff_adapter(lora);
    import_ok("lora", lora, &t);
    in = open_object("lora");
    assert_int_equal(tv_input_kind(in), TV_KIND_ADAPTER);
    assert_ok(tv_adapter_open(in, &err, &a), &err);
    assert_int_equal(tv_adapter_count(a), 1);
    assert_float_equal(tv_adapter_module(a, 0)->scaling, 2, 0);
    tv_adapter_close(a);
    tv_input_close(in);
    tmpdir_remove(lora);
}

/* What no merge could use is refused when it comes in. */
static void test_bad_adapter(void **state)
{
    static const char *const bad[] = {
        "{\"r\": 0}",
        "{\"r\": 1099511627776}",
        "{\"r\": 3}",
        "{\"r\": 2, \"rank_pattern\": {\"(a\": 2}}",
    };
    struct tv_transfer t;
    struct tv_error err;

    (void)state;
    memset(&t, 0, sizeof t);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char *lora = tmpdir_make();
        enum tv_err rc = TV_OK;

        ff_adapter(lora);
        ff_write_text(lora, "adapter_config.json", bad[i]);
        rc = import("lora", lora, &t, &err);
        assert_true(rc == TV_E_CORRUPT || rc == TV_E_INPUT);
        assert_false(visible("lora"));
        tmpdir_remove(lora);
    }
}

static void test_exists(void **state)
{
    struct tv_transfer t;
    struct tv_error err;
    char *second = tmpdir_make();
    static const struct ff_tensor other[] = {{"x", TV_F32, 1, {5}, 77}};
    tv_input *in = NULL;

    (void)state;
    memset(&t, 0, sizeof t);
    ff_write(second, "model.safetensors", other, 1);
    import_ok("m", model, &t);
    assert_code(import("m", second, &t, &err), TV_E_EXISTS, &err);
    check_object("m");
    t.force = true;
    import_ok("m", second, &t);
    in = open_object("m");
    ff_assert_tensors(in, other, 1);
    assert_int_equal(tv_input_side_count(in), 0);
    tv_input_close(in);
    import_ok("new", second, &t); /* force without anything to replace */
    t.force = false;
    assert_code(import("a/b", second, &t, &err), TV_E_USAGE, &err);
    assert_code(import("", second, &t, &err), TV_E_USAGE, &err);
    verify_store();
    tmpdir_remove(second);
}

static void test_cancel(void **state)
{
    struct tv_transfer t;
    struct watch w;
    struct tv_error err;

    (void)state;
    for (int at = 1; at < (int)n_tensors; at++) {
        memset(&t, 0, sizeof t);
        memset(&w, 0, sizeof w);
        w.cancel_at = at;
        t.progress = on_bytes;
        t.progress_arg = &w;
        t.cancel = &w.cancel;
        t.force = true;
        t.link = at % 2 == 0;
        assert_code(import("m", model, &t, &err), TV_E_INTERRUPTED, &err);
        assert_message(&err, "interrupted");
        assert_true(visible("m") == (at > 1));
        memset(&t, 0, sizeof t);
        t.force = true;
        t.link = at % 2 == 0;
        import_ok("m", model, &t);
        assert_int_equal(t.n_resumed, at);
        assert_int_equal(t.n_tensors, n_tensors);
        check_object("m");
    }
    verify_store();
}

/* Enough bytes for a second thread that hashes ahead, some of them shared; the
 * first run is cancelled while that one is at work. */
static void test_large(void **state)
{
    static const struct ff_tensor large[] = {
        {"a", TV_BF16, 2, {700, 1024}, 1},  {"b", TV_BF16, 2, {600, 1000}, 2},
        {"c", TV_BF16, 2, {0, 1000}, 3},    {"d", TV_F32, 2, {700, 1024}, 4},
        {"e", TV_BF16, 2, {700, 1024}, 1},  {"f", TV_F32, 1, {1}, 5},
        {"g", TV_BF16, 2, {1000, 1024}, 6}, {"h", TV_BF16, 2, {77, 1024}, 7},
    };
    const size_t n = sizeof large / sizeof *large;
    struct tv_transfer t;
    struct tv_error err;
    char *from = tmpdir_make();

    (void)state;
    ff_write(from, "model.safetensors", large, n);
    ff_write_text(from, "config.json", "{}");
    for (int at = 1; at < (int)n; at += 2) {
        struct watch w = {.cancel_at = at};
        memset(&t, 0, sizeof t);
        t.force = true;
        t.progress = on_bytes;
        t.progress_arg = &w;
        t.cancel = &w.cancel;
        assert_code(import("m", from, &t, &err), TV_E_INTERRUPTED, &err);
        t.cancel = NULL;
        t.progress = NULL;
        import_ok("m", from, &t);
        assert_int_equal(t.n_resumed, at);
        tv_input *in = open_object("m");
        ff_assert_tensors(in, large, n);
        tv_input_close(in);
    }
    verify_store();
    tmpdir_remove(from);
}

static bool is_linked(const char *name)
{
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    struct tv_error err;
    bool linked = false;

    assert_ok(tv_read_begin(store, &err, &r), &err);
    assert_ok(tv_object_find(r, name, false, &err, &o), &err);
    linked = o->linked;
    tv_object_free(o);
    tv_read_end(r);
    return linked;
}

/* Links and copies are not mixed in one object. */
static void test_other_mode(void **state)
{
    struct tv_transfer t;
    struct watch w;
    struct tv_error err;

    (void)state;
    for (int link = 0; link < 2; link++) {
        memset(&t, 0, sizeof t);
        memset(&w, 0, sizeof w);
        w.cancel_at = 2;
        t.progress = on_bytes;
        t.progress_arg = &w;
        t.cancel = &w.cancel;
        t.link = link == 0;
        t.force = true;
        assert_code(import("m", model, &t, &err), TV_E_INTERRUPTED, &err);
        memset(&t, 0, sizeof t);
        t.link = link == 1;
        t.force = true;
        import_ok("m", model, &t);
        assert_int_equal(t.n_resumed, 0);
        assert_true(is_linked("m") == t.link);
        check_object("m");
    }
    verify_store();
}

/* Another source under the same name does not inherit the leftovers. */
static void test_other_source(void **state)
{
    struct tv_transfer t;
    struct watch w;
    struct tv_error err;

    (void)state;
    memset(&t, 0, sizeof t);
    memset(&w, 0, sizeof w);
    w.cancel_at = 2;
    t.progress = on_bytes;
    t.progress_arg = &w;
    t.cancel = &w.cancel;
    assert_code(import("m", model, &t, &err), TV_E_INTERRUPTED, &err);
    ff_write_text(model, "config.json", "{\"architectures\": [\"Other\"]}");
    memset(&t, 0, sizeof t);
    import_ok("m", model, &t);
    assert_int_equal(t.n_resumed, 0);
    check_object("m");
    verify_store();
}

static void test_changed(void **state)
{
    struct tv_transfer t;
    struct watch w;
    struct tv_error err;
    char *path = tv_path_join(model, "model.safetensors");

    (void)state;
    memset(&t, 0, sizeof t);
    memset(&w, 0, sizeof w);
    w.touch = path;
    t.progress = on_bytes;
    t.progress_arg = &w;
    assert_code(import("m", model, &t, &err), TV_E_CHANGED, &err);
    assert_message(&err, "changed while it was imported");
    assert_false(visible("m"));
    t.progress = NULL;
    import_ok("m", model, &t);
    check_object("m");
    tv_free(path);
}

static void test_bad_config(void **state)
{
    struct tv_transfer t;
    struct tv_error err;

    (void)state;
    memset(&t, 0, sizeof t);
    ff_write_text(model, "config.json", "{\"architectures\": ");
    assert_code(import("m", model, &t, &err), TV_E_CORRUPT, &err);
    assert_message(&err, "config.json");
    assert_false(visible("m"));
}

/* Killed after each tensor in turn; the next attempt always succeeds. */
static void test_killed(void **state)
{
    size_t resumed = 0;

    (void)state;
    tv_store_close(store);
    store = NULL;
    for (int at = 1; at <= (int)n_tensors; at++) {
        struct tv_transfer t;
        const pid_t pid = fork();
        int status = 0;

        assert_true(pid >= 0);
        if (pid == 0) {
            struct watch w;
            struct tv_error err;

            store = open_store();
            memset(&t, 0, sizeof t);
            memset(&w, 0, sizeof w);
            w.kill_at = at;
            t.progress = on_bytes;
            t.progress_arg = &w;
            t.force = true;
            t.link = at % 2 == 0;
            (void)import("m", model, &t, &err);
            _exit(9);
        }
        assert_int_equal(waitpid(pid, &status, 0), pid);
        assert_true(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
        store = open_store();
        assert_true(visible("m") == (at > 1));
        memset(&t, 0, sizeof t);
        t.force = true;
        import_ok("m", model, &t);
        resumed += t.n_resumed;
        check_object("m");
        verify_store();
        tv_store_close(store);
        store = NULL;
    }
    (void)resumed; /* how much a kill leaves is up to the batches */
    store = open_store();
}

/* Every attempt has a name of its own; whether it may be seen is checked when
 * no fault is armed any more. */
#define ATTEMPTS_MAX 4000
static enum tv_err outcome[ATTEMPTS_MAX];
static size_t n_attempts;

static void attempt_name(size_t i, char *dst, size_t cap)
{
    ff_print(dst, cap, "m%zu", i);
}

static enum tv_err import_once(void *arg, struct tv_error *err)
{
    struct tv_transfer t;
    char name[32];
    const size_t i = n_attempts++;

    assert_true(i < ATTEMPTS_MAX);
    attempt_name(i, name, sizeof name);
    memset(&t, 0, sizeof t);
    t.link = arg != NULL;
    outcome[i] = import(name, model, &t, err);
    return outcome[i];
}

static void check_attempts(void)
{
    size_t seen = 0;

    for (size_t i = 0; i < n_attempts; i++) {
        char name[32];

        attempt_name(i, name, sizeof name);
        if (outcome[i] == TV_OK) {
            check_object(name);
            seen++;
        } else {
            assert_false(visible(name));
        }
    }
    assert_true(seen > 0 && seen < n_attempts);
}

static void test_failures(void **state)
{
    char link[] = "link";

    (void)state;
    n_attempts = 0;
    assert_true(faults_loop_alloc(import_once, NULL, true) > 100);
    assert_true(faults_loop_alloc(import_once, link, true) > 100);
    assert_true(
        faults_loop_sys(import_once, NULL,
                        FAULT_OPEN | FAULT_MMAP | FAULT_PREAD | FAULT_FSTAT,
                        EIO, TV_E_IO, true) > 3);
    check_attempts();
    verify_store();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_copy, setup, teardown),
        cmocka_unit_test_setup_teardown(test_link, setup, teardown),
        cmocka_unit_test_setup_teardown(test_adapter, setup, teardown),
        cmocka_unit_test_setup_teardown(test_bad_adapter, setup, teardown),
        cmocka_unit_test_setup_teardown(test_exists, setup, teardown),
        cmocka_unit_test_setup_teardown(test_cancel, setup, teardown),
        cmocka_unit_test_setup_teardown(test_large, setup, teardown),
        cmocka_unit_test_setup_teardown(test_other_source, setup, teardown),
        cmocka_unit_test_setup_teardown(test_other_mode, setup, teardown),
        cmocka_unit_test_setup_teardown(test_changed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_bad_config, setup, teardown),
        cmocka_unit_test_setup_teardown(test_killed, setup, teardown),
        cmocka_unit_test_setup_teardown(test_failures, setup, teardown),
    };
    json_set_alloc_funcs(tv_alloc, tv_free);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
