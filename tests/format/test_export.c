/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_export.c - directories that come out of a store: the same bytes, the
 * right names, the configuration last, and nothing left behind by a failure.
 */
#include <dirent.h>
#include <errno.h>
#include <jansson.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "faults.h"
#include "format_files.h"
#include "test.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/sys.h"

static char *dir;   /* holds the store and outputs */
static char *model; /* holds the source */
static char *lora;
static char *out; /* where the tests write */
static const struct ff_tensor *tensors;
static size_t n_tensors;
static tv_store *store;

static void import(const char *name, const char *from, bool link)
{
    tv_input *in = NULL;
    struct tv_transfer t;
    struct tv_error err;

    memset(&t, 0, sizeof t);
    t.link = link;
    assert_ok(tv_input_open_path(from, &err, &in), &err);
    assert_ok(tv_import(store, name, in, &t, &err), &err);
    tv_input_close(in);
}

static int setup(void **state)
{
    struct tv_error err;
    char *path = NULL;

    (void)state;
    dir = tmpdir_make();
    model = tmpdir_make();
    lora = tmpdir_make();
    path = tv_path_join(dir, "store");
    out = tv_path_join(dir, "out");
    tensors = ff_model(model, &n_tensors);
    ff_adapter(lora);
    assert_ok(tv_store_create(path, 0, &err), &err);
    assert_ok(tv_store_open(path, NULL, &err, &store), &err);
    tv_free(path);
    import("copied", model, false);
    import("linked", model, true);
    import("lora", lora, false);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    tv_store_close(store);
    tv_free(out);
    tmpdir_remove(lora);
    tmpdir_remove(model);
    tmpdir_remove(dir);
    return 0;
}

static size_t count_files(const char *path)
{
    char **names = NULL;
    size_t n = 0;
    struct tv_error err;

    if (!tv_path_exists(path))
        return 0;
    assert_ok(tv_dir_list(path, &err, &names, &n), &err);
    tv_dir_list_free(names, n);
    return n;
}

static void remove_out(void)
{
    struct tv_error err;

    assert_ok(tv_dir_remove(out, &err), &err);
}

static void check_out(void)
{
    tv_input *in = NULL;
    struct tv_error err;

    assert_ok(tv_input_open_path(out, &err, &in), &err);
    ff_assert_tensors(in, tensors, n_tensors);
    tv_input_close(in);
    ff_assert_same_file(model, out, "config.json");
    ff_assert_same_file(model, out, "generation_config.json");
    ff_assert_same_file(model, out, "tokenizer.json");
}

static void test_round_trip(void **state)
{
    static const char *const names[] = {"copied", "linked"};
    struct tv_transfer t;
    struct tv_error err;

    (void)state;
    for (size_t i = 0; i < 2; i++) {
        memset(&t, 0, sizeof t);
        t.sync = i == 0;
        assert_ok(tv_export(store, names[i], out, &t, &err), &err);
        assert_int_equal(t.n_tensors, n_tensors);
        check_out();
        assert_int_equal(count_files(out), 4);
        remove_out();
    }
}

/* Really trained models: import, export, compare file by file. */
static void test_quickstart(void **state)
{
    static const char *const names[] = {"base", "ft-code", "lora-jargon"};
    char *top = test_data("quickstart");

    (void)state;
    for (size_t i = 0; i < 3; i++) {
        char *from = tv_path_join(top, names[i]);
        struct tv_transfer t;
        struct tv_error err;
        char **files = NULL;
        size_t n = 0;

        memset(&t, 0, sizeof t);
        import(names[i], from, i == 1);
        assert_ok(tv_export(store, names[i], out, &t, &err), &err);
        assert_true(tv_hash_equal(ff_digest(from), ff_digest(out)));
        assert_ok(tv_dir_list(from, &err, &files, &n), &err);
        assert_true(n >= 2);
        for (size_t k = 0; k < n; k++) {
            if (strstr(files[k], ".json") != NULL)
                ff_assert_same_file(from, out, files[k]);
        }
        tv_dir_list_free(files, n);
        tv_free(from);
        remove_out();
    }
    tv_free(top);
}

static void test_shards(void **state)
{
    struct tv_transfer t;
    struct tv_error err;
    tv_input *in = NULL;

    (void)state;
    memset(&t, 0, sizeof t);
    t.shard_bytes = 300;
    assert_ok(tv_export(store, "copied", out, &t, &err), &err);
    check_out();
    assert_true(ff_exists(out, "model.safetensors.index.json"));
    assert_true(ff_exists(out, "model-00001-of-00003.safetensors"));
    assert_false(ff_exists(out, "model.safetensors"));
    assert_ok(tv_input_open_path(out, &err, &in), &err);
    assert_int_equal(tv_input_file_count(in), 3);
    tv_input_close(in);
    remove_out();
}

static void test_adapter(void **state)
{
    struct tv_transfer t;
    struct tv_error err;
    tv_input *in = NULL;
    tv_adapter *a = NULL;

    (void)state;
    memset(&t, 0, sizeof t);
    t.shard_bytes = 1; /* adapters are never split */
    assert_ok(tv_export(store, "lora", out, &t, &err), &err);
    assert_int_equal(count_files(out), 3);
    ff_assert_same_file(lora, out, "adapter_config.json");
    ff_assert_same_file(lora, out, "README.md");
    ff_assert_same_file(lora, out, "adapter_model.safetensors");
    assert_ok(tv_input_open_path(out, &err, &in), &err);
    assert_ok(tv_adapter_open(in, &err, &a), &err);
    tv_adapter_close(a);
    tv_input_close(in);
    remove_out();
}

static void test_existing(void **state)
{
    struct tv_transfer t;
    struct tv_error err;

    (void)state;
    memset(&t, 0, sizeof t);
    assert_ok(tv_dir_make(out, &err), &err);
    assert_ok(tv_export(store, "copied", out, &t, &err), &err); /* empty */
    assert_code(tv_export(store, "copied", out, &t, &err), TV_E_EXISTS, &err);
    assert_message(&err, "is not empty");
    check_out();
    /* What an earlier model left is gone, other files stay. */
    ff_write_text(out, "model-00001-of-00002.safetensors", "old");
    ff_write_text(out, "model.safetensors.index.json", "old");
    ff_write_text(out, "pytorch_model.bin", "old");
    ff_write_text(out, "vocab.json", "old");
    ff_write_text(out, "adapter_config.json", "old");
    ff_write_text(out, "notes.txt", "mine");
    ff_write_text(out, "model-card.txt", "mine");
    t.force = true;
    assert_ok(tv_export(store, "copied", out, &t, &err), &err);
    check_out();
    assert_int_equal(count_files(out), 6);
    assert_true(ff_exists(out, "notes.txt"));
    assert_true(ff_exists(out, "model-card.txt"));
    /* From many shards to one and back. */
    t.shard_bytes = 300;
    assert_ok(tv_export(store, "copied", out, &t, &err), &err);
    check_out();
    assert_false(ff_exists(out, "model.safetensors"));
    t.shard_bytes = 0;
    assert_ok(tv_export(store, "linked", out, &t, &err), &err);
    check_out();
    assert_int_equal(count_files(out), 6);
    remove_out();
    ff_write_text(dir, "out", "a file");
    t.force = false;
    assert_code(tv_export(store, "copied", out, &t, &err), TV_E_EXISTS, &err);
    assert_int_equal(remove(out), 0);
    assert_code(tv_export(store, "absent", out, &t, &err), TV_E_NOTFOUND, &err);
    assert_false(tv_path_exists(out));
}

/* The files that an object is linked from are not written over. */
static void test_over_source(void **state)
{
    struct tv_transfer t;
    struct tv_error err;
    char *from = tv_path_join(model, "model.safetensors");
    char *to = tv_path_join(out, "model-00001-of-00009.safetensors");
    const struct tv_hash before = ff_digest(model);
    const size_t n = count_files(model);

    (void)state;
    memset(&t, 0, sizeof t);
    t.force = true;
    assert_code(tv_export(store, "linked", model, &t, &err), TV_E_INPUT, &err);
    assert_message(&err, "belongs to a linked object");
    assert_code(tv_export(store, "lora", model, &t, &err), TV_E_INPUT, &err);
    assert_int_equal(count_files(model), n);
    assert_true(tv_hash_equal(ff_digest(model), before));
    /* Under another name, too. */
    assert_ok(tv_dir_make(out, &err), &err);
    assert_int_equal(link(from, to), 0);
    assert_code(tv_export(store, "copied", out, &t, &err), TV_E_INPUT, &err);
    assert_int_equal(count_files(out), 1);
    assert_int_equal(unlink(to), 0);
    assert_ok(tv_export(store, "linked", out, &t, &err), &err);
    check_out();
    remove_out();
    tv_free(to);
    tv_free(from);
}

/* A killed export leaves NAME.partial: no obstacle, and swept away. */
static void test_leftovers(void **state)
{
    struct tv_transfer t;
    struct tv_error err;

    (void)state;
    memset(&t, 0, sizeof t);
    assert_ok(tv_dir_make(out, &err), &err);
    ff_write_text(out, "model.safetensors.partial", "half");
    ff_write_text(out, "model-00001-of-00009.safetensors.partial", "half");
    ff_write_text(out, "tokenizer.json.partial", "half");
    assert_ok(tv_export(store, "copied", out, &t, &err), &err);
    check_out();
    assert_int_equal(count_files(out), 4);
    remove_out();
    assert_ok(tv_dir_make(out, &err), &err);
    ff_write_text(out, "thesis.partial", "mine");
    assert_code(tv_export(store, "copied", out, &t, &err), TV_E_EXISTS, &err);
    assert_true(ff_exists(out, "thesis.partial"));
    remove_out();
}

/* ---- order
 * --------------------------------------------------------------------- */

static const struct tv_sys_table *real;
static struct tv_sys_table spy;
static char last[4096];
static bool synced_late; /* the directory, after the last rename */
static size_t n_renames;

static int spy_rename(const char *from, const char *to)
{
    ff_print(last, sizeof last, "%s", to);
    n_renames++;
    synced_late = false;
    /* While any other file is missing there is no model. */
    assert_false(ff_exists(out, "config.json"));
    return real->rename(from, to);
}

static int spy_fsync(int fd)
{
    synced_late = true;
    return real->fsync(fd);
}

static void test_config_last(void **state)
{
    struct tv_transfer t;
    struct tv_error err;

    (void)state;
    real = tv_sys();
    spy = *real;
    spy.rename = spy_rename;
    spy.fsync = spy_fsync;
    memset(&t, 0, sizeof t);
    t.sync = true;
    for (int round = 0; round < 2; round++) {
        n_renames = 0;
        t.force = round == 1;
        tv_sys_replace(&spy);
        assert_ok(tv_export(store, "copied", out, &t, &err), &err);
        tv_sys_replace(NULL);
        assert_int_equal(n_renames, 4);
        assert_non_null(strstr(last, "/config.json"));
        assert_true(synced_late);
        check_out();
    }
    remove_out();
}

/* ---- failures
 * -------------------------------------------------------------------- */

static void on_bytes(void *arg, uint64_t done, uint64_t total)
{
    atomic_int *cancel = arg;

    (void)total;
    if (done > 500)
        *cancel = 1;
}

static void test_cancel(void **state)
{
    struct tv_transfer t;
    struct tv_error err;
    atomic_int cancel = 0;

    (void)state;
    memset(&t, 0, sizeof t);
    t.progress = on_bytes;
    t.progress_arg = (void *)(uintptr_t)&cancel;
    t.cancel = &cancel;
    assert_code(tv_export(store, "copied", out, &t, &err), TV_E_INTERRUPTED,
                &err);
    assert_false(tv_path_exists(out));
}

/* Removes `out` by calls that no fault is armed for. */
static void raw_remove(void)
{
    DIR *d = opendir(out);
    char path[4096];

    assert_non_null(d);
    for (struct dirent *e = readdir(d); e != NULL; e = readdir(d)) {
        ff_print(path, sizeof path, "%s/%s", out, e->d_name);
        if (e->d_name[0] != '.')
            assert_int_equal(unlink(path), 0);
    }
    assert_int_equal(closedir(d), 0);
    assert_int_equal(rmdir(out), 0);
}

static enum tv_err export_once(void *arg, struct tv_error *err)
{
    struct tv_transfer t;
    enum tv_err rc = TV_OK;

    memset(&t, 0, sizeof t);
    t.sync = true;
    t.shard_bytes = 300;
    rc = tv_export(store, arg, out, &t, err);
    if (rc == TV_OK)
        raw_remove();
    return rc;
}

/* The same, into a directory of a finished model. */
static enum tv_err export_over(void *arg, struct tv_error *err)
{
    struct tv_transfer t;

    memset(&t, 0, sizeof t);
    t.sync = true;
    t.force = true;
    return tv_export(store, arg, out, &t, err);
}

static void test_failures(void **state)
{
    char copied[] = "copied";
    struct tv_transfer t;
    struct tv_error err;
    const unsigned writes =
        FAULT_OPEN | FAULT_PWRITE | FAULT_FSYNC | FAULT_FALLOCATE | FAULT_MKDIR;

    (void)state;
    assert_true(faults_loop_alloc(export_once, copied, true) > 50);
    remove_out();
    assert_true(faults_loop_sys(export_once, copied, writes, ENOSPC,
                                TV_E_NOSPACE, true) > 10);
    remove_out();
    assert_true(faults_loop_sys(export_once, copied,
                                FAULT_RENAME | FAULT_PWRITE | FAULT_FSYNC, EIO,
                                TV_E_IO, true) > 10);
    remove_out();
    faults_sys_arm(FAULT_PWRITE, 2, 1, ENOSPC);
    assert_code(export_once(copied, &err), TV_E_NOSPACE, &err);
    faults_sys_off();
    assert_false(tv_path_exists(out));

    /* Whatever happens to an export with force: a loadable directory is a
     * complete one. */
    memset(&t, 0, sizeof t);
    assert_ok(tv_export(store, "copied", out, &t, &err), &err);
    for (uint64_t step = 1;; step++) {
        bool fired = false;

        faults_sys_arm(writes | FAULT_RENAME | FAULT_UNLINK, step, 1, EIO);
        (void)export_over(copied, &err);
        fired = faults_sys_fired() > 0;
        faults_sys_off();
        if (ff_exists(out, "config.json"))
            check_out();
        if (!fired)
            break;
    }
    check_out();
    remove_out();
}

static void test_damage(void **state)
{
    struct tv_transfer t;
    struct tv_error err;
    char *path = tv_path_join(model, "model.safetensors");
    char *data = NULL;
    size_t n = 0;

    (void)state;
    /* A linked file that was rewritten is not exported as if it were ours. */
    data = ff_read(model, "model.safetensors", &n);
    data[n - 1] ^= 1;
    tv_free(tmpdir_write(model, "model.safetensors", data, n));
    memset(&t, 0, sizeof t);
    assert_code(tv_export(store, "linked", out, &t, &err), TV_E_CORRUPT, &err);
    assert_message(&err, "model.safetensors");
    assert_false(tv_path_exists(out));
    tv_free(data);
    tv_free(path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trip), cmocka_unit_test(test_shards),
        cmocka_unit_test(test_quickstart), cmocka_unit_test(test_adapter),
        cmocka_unit_test(test_existing),   cmocka_unit_test(test_over_source),
        cmocka_unit_test(test_leftovers),  cmocka_unit_test(test_config_last),
        cmocka_unit_test(test_cancel),     cmocka_unit_test(test_failures),
        cmocka_unit_test(test_damage), /* spoils the source: last */
    };
    json_set_alloc_funcs(tv_alloc, tv_free);
    return cmocka_run_group_tests(tests, setup, teardown);
}
