/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_input.c - opened inputs: order, views, identity; the same for files and
 * for objects of a store; many threads; faults.
 */
#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "faults.h"
#include "format_files.h"
#include "test.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/pool.h"
#include "tv/sys.h"

static tv_input *open_ok(const char *path)
{
    tv_input *in = NULL;
    struct tv_error err;

    assert_ok(tv_input_open_path(path, &err, &in), &err);
    return in;
}

static struct tv_hash fingerprint(tv_input *in)
{
    struct tv_hash h = {0, 0};
    struct tv_error err;

    assert_ok(tv_input_fingerprint(in, &h, &err), &err);
    return h;
}

static struct tv_hash digest(tv_input *in)
{
    struct tv_hash h = {0, 0};
    struct tv_error err;

    assert_ok(tv_input_digest(in, &h, &err), &err);
    return h;
}

static void test_order(void **state)
{
    static const struct ff_tensor t[] = {
        {"layers.10.w", TV_U8, 1, {1}, 1},
        {"layers.9.w", TV_U8, 1, {1}, 2},
        {"layers.2.w", TV_U8, 1, {1}, 3},
        {"embed", TV_U8, 1, {0}, 4},
    };
    static const char *const want[] = {"embed", "layers.2.w", "layers.9.w",
                                       "layers.10.w"};
    char *dir = tmpdir_make();
    tv_input *in = NULL;
    struct tv_error err;
    struct tv_view v;

    (void)state;
    ff_write(dir, "model.safetensors", t, 4);
    in = open_ok(dir);
    for (size_t i = 0; i < 4; i++) {
        assert_string_equal(tv_input_tensor(in, i)->name, want[i]);
        assert_ptr_equal(tv_input_find(in, want[i]), tv_input_tensor(in, i));
    }
    assert_null(tv_input_find(in, "layers.3.w"));
    assert_null(tv_input_find(in, ""));
    ff_assert_tensors(in, t, 4);
    assert_ok(tv_input_view(in, tv_input_find(in, "embed"), &err, &v), &err);
    assert_int_equal(v.bytes, 0);
    assert_int_equal(v.n_chunks, 0);
    assert_true(v.chunk_bytes > 0);
    tv_input_release(in, &v);
    tv_input_release(in, &v); /* zeroed by now: nothing happens */
    tv_input_close(in);
    tmpdir_remove(dir);
}

static void test_identity(void **state)
{
    char *a = tmpdir_make();
    char *b = tmpdir_make();
    size_t n = 0;
    tv_input *x = NULL;
    tv_input *y = NULL;
    struct tv_hash f;
    struct timespec old[2] = {{1000000000, 0}, {1000000000, 5}};
    char *path = tv_path_join(a, "model.safetensors");

    (void)state;
    (void)ff_model(a, &n);
    (void)ff_model(b, &n);
    x = open_ok(a);
    y = open_ok(b);
    assert_true(tv_hash_equal(digest(x), digest(y)));
    f = fingerprint(x);
    assert_true(tv_hash_equal(f, fingerprint(x)));
    assert_false(tv_hash_equal(f, fingerprint(y))); /* other inode */
    tv_input_close(y);
    tv_input_close(x);
    /* Touching a file, or changing the config, is another input. */
    assert_int_equal(utimensat(AT_FDCWD, path, old, 0), 0);
    x = open_ok(a);
    assert_false(tv_hash_equal(f, fingerprint(x)));
    f = fingerprint(x);
    assert_int_equal(tv_input_file(x, 0)->mtime_ns,
                     UINT64_C(1000000000000000005));
    tv_input_close(x);
    ff_write_text(a, "config.json", "{}");
    x = open_ok(a);
    assert_false(tv_hash_equal(f, fingerprint(x)));
    f = fingerprint(x);
    tv_input_close(x);
    ff_write_text(a, "tokenizer.json", "{\"version\": \"9\"}");
    x = open_ok(a);
    assert_true(tv_hash_equal(f, fingerprint(x)));
    tv_input_close(x);
    tv_free(path);
    tmpdir_remove(a);
    tmpdir_remove(b);
}

/* ---- store objects
 * ----------------------------------------------------------- */

static tv_store *make_store(const char *dir)
{
    char *path = tv_path_join(dir, "store");
    tv_store *s = NULL;
    struct tv_error err;

    assert_ok(tv_store_create(path, 0, &err), &err);
    assert_ok(tv_store_open(path, NULL, &err, &s), &err);
    tv_free(path);
    return s;
}

static void import(tv_store *s, const char *name, const char *from, bool link)
{
    tv_input *in = open_ok(from);
    struct tv_transfer t;
    struct tv_error err;

    memset(&t, 0, sizeof t);
    t.link = link;
    assert_ok(tv_import(s, name, in, &t, &err), &err);
    tv_input_close(in);
}

static tv_input *open_object(tv_store *s, char *name)
{
    struct tv_ref_part part;
    tv_input *in = NULL;
    struct tv_error err;

    memset(&part, 0, sizeof part);
    part.object = name;
    assert_ok(tv_input_open(&part, s, &err, &in), &err);
    return in;
}

static void test_object(void **state)
{
    char *dir = tmpdir_make();
    char *model = tmpdir_make();
    size_t n = 0;
    const struct ff_tensor *t = ff_model(model, &n);
    tv_store *s = make_store(dir);
    char copied[] = "copied";
    char linked[] = "linked";
    tv_input *in = NULL;
    tv_input *links = NULL;
    tv_input *files = open_ok(model);
    struct tv_error err;
    struct tv_ref_part part;
    char absent[] = "absent";

    (void)state;
    import(s, copied, model, false);
    import(s, linked, model, true);
    in = open_object(s, copied);
    links = open_object(s, linked);
    assert_true(tv_input_is_store(in));
    assert_false(tv_input_is_store(files));
    assert_null(tv_input_dir(in));
    assert_string_equal(tv_input_label(in), "store:copied");
    assert_int_equal(tv_input_kind(in), TV_KIND_MODEL);
    assert_int_equal(tv_input_side_count(in), 3);
    ff_assert_tensors(in, t, n);
    ff_assert_tensors(links, t, n);
    for (size_t i = 0; i < n; i++)
        assert_string_equal(tv_input_tensor(in, i)->name,
                            tv_input_tensor(files, i)->name);
    assert_true(tv_hash_equal(digest(in), digest(files)));
    assert_true(tv_hash_equal(digest(links), digest(files)));
    assert_true(tv_input_tensor(in, 0)->checksum_known);
    assert_true(tv_hash_equal(fingerprint(in), fingerprint(in)));
    assert_true(tv_hash_equal(fingerprint(links), fingerprint(links)));
    {
        char *data = NULL;
        size_t n_data = 0;
        bool found = false;

        assert_ok(tv_input_side_read(in, "tokenizer.json", &found, &data,
                                     &n_data, &err),
                  &err);
        assert_true(found);
        assert_string_equal(data, "{\"version\": \"1.0\"}\n");
        tv_free(data);
    }
    tv_input_close(in);
    tv_input_close(links);
    memset(&part, 0, sizeof part);
    part.object = absent;
    assert_code(tv_input_open(&part, s, &err, &in), TV_E_NOTFOUND, &err);
    assert_code(tv_input_open(&part, NULL, &err, &in), TV_E_USAGE, &err);
    tv_input_close(files);
    tv_store_close(s);
    tmpdir_remove(model);
    tmpdir_remove(dir);
}

/* A linked file that changes is noticed by whoever looks next. */
static void test_changed_link(void **state)
{
    char *dir = tmpdir_make();
    char *model = tmpdir_make();
    size_t n = 0;
    tv_store *s = NULL;
    char name[] = "linked";
    tv_input *in = NULL;
    struct tv_error err;
    struct tv_view v;
    struct timespec old[2] = {{1000000000, 0}, {1000000000, 0}};
    char *path = tv_path_join(model, "model.safetensors");

    (void)state;
    (void)ff_model(model, &n);
    s = make_store(dir);
    import(s, name, model, true);
    assert_int_equal(utimensat(AT_FDCWD, path, old, 0), 0);
    in = open_object(s, name);
    assert_code(tv_input_view(in, tv_input_tensor(in, 0), &err, &v),
                TV_E_CORRUPT, &err);
    assert_message(&err, "model.safetensors");
    tv_input_close(in);
    tv_store_close(s);
    tv_free(path);
    tmpdir_remove(model);
    tmpdir_remove(dir);
}

/* Linked or not, a file that is another one than what was opened is named. */
static void test_unchanged(void **state)
{
    char *dir = tmpdir_make();
    char *model = tmpdir_make();
    size_t n = 0;
    char name[] = "linked";
    struct tv_error err;
    const struct timespec old[2] = {{1000000000, 0}, {1000000000, 0}};
    char *path = tv_path_join(model, "model.safetensors");

    (void)state;
    (void)ff_model(model, &n);
    tv_store *s = make_store(dir);
    import(s, name, model, true);
    tv_input *links = open_object(s, name);
    tv_input *files = open_ok(model);
    assert_ok(tv_input_unchanged(links, &err), &err);
    assert_ok(tv_input_unchanged(files, &err), &err);
    assert_int_equal(utimensat(AT_FDCWD, path, old, 0), 0);
    assert_code(tv_input_unchanged(links, &err), TV_E_CORRUPT, &err);
    assert_message(&err, "model.safetensors");
    assert_message(&err, "changed while it was being merged");
    assert_code(tv_input_unchanged(files, &err), TV_E_CORRUPT, &err);
    assert_message(&err, "model.safetensors");
    assert_message(&err, "changed while it was being merged");
    tv_input_close(links);
    tv_input_close(files);

    files = open_ok(model);
    assert_ok(tv_input_unchanged(files, &err), &err);
    assert_int_equal(unlink(path), 0);
    assert_code(tv_input_unchanged(files, &err), TV_E_CORRUPT, &err);
    assert_message(&err, "removed while it was being merged");
    tv_input_close(files);
    tv_store_close(s);
    tv_free(path);
    tmpdir_remove(model);
    tmpdir_remove(dir);
}

/* A linked tensor whose checksum is known is held against it. */
static void test_digest_of_link(void **state)
{
    char *dir = tmpdir_make();
    char *model = tmpdir_make();
    size_t n = 0;
    char name[] = "linked";
    struct tv_error err;
    struct tv_hash h = {0, 0};
    struct tv_object *o = NULL;
    tv_read *r = NULL;
    tv_batch *b = NULL;

    (void)state;
    (void)ff_model(model, &n);
    tv_store *s = make_store(dir);
    import(s, name, model, true);
    tv_input *in = open_object(s, name);
    assert_ok(tv_input_digest(in, &h, &err), &err);
    assert_ok(tv_read_begin(s, &err, &r), &err);
    assert_ok(tv_object_find(r, name, false, &err, &o), &err);
    tv_read_end(r);
    assert_ok(tv_batch_begin(s, true, &err, &b), &err);
    assert_ok(tv_tensor_checksum_put(b, o->id, tv_input_tensor(in, 0)->name,
                                     (struct tv_hash){1, 2}, &err),
              &err);
    assert_ok(tv_batch_commit(b, &err), &err);
    tv_object_free(o);
    tv_input_close(in);
    in = open_object(s, name);
    assert_code(tv_input_digest(in, &h, &err), TV_E_CORRUPT, &err);
    assert_message(&err, tv_input_tensor(in, 0)->name);
    tv_input_close(in);
    tv_store_close(s);
    tmpdir_remove(model);
    tmpdir_remove(dir);
}

struct crowd {
    tv_input *in;
    const struct ff_tensor *t;
    size_t n;
    unsigned char *bad; /* per item */
};

static void look(void *arg, size_t item, unsigned worker)
{
    struct crowd *c = arg;
    const struct ff_tensor *t = &c->t[item % c->n];
    const struct tv_input_tensor *x = tv_input_find(c->in, t->name);
    struct tv_view v;
    unsigned char got[1024];
    unsigned char again[1024];

    (void)worker;
    c->bad[item] = 1;
    if (x == NULL || x->bytes > sizeof got ||
        tv_input_view(c->in, x, NULL, &v) != TV_OK)
        return;
    tv_view_copy(&v, 0, v.bytes, got);
    tv_view_copy(&v, 0, v.bytes, again);
    c->bad[item] = memcmp(got, again, (size_t)x->bytes) != 0;
    if (v.leaves != NULL && !tv_hash_equal(tv_view_leaf(&v, 0), v.leaves[0]))
        c->bad[item] = 1;
    tv_input_release(c->in, &v);
}

static void test_threads(void **state)
{
    char *dir = tmpdir_make();
    char *model = tmpdir_make();
    size_t n = 0;
    const struct ff_tensor *t = ff_model(model, &n);
    tv_store *s = make_store(dir);
    char name[] = "m";
    struct crowd c = {NULL, t, n, NULL};
    const size_t items = 2000;
    tv_pool *pool = NULL;
    struct tv_error err;

    (void)state;
    import(s, name, model, false);
    c.bad = tv_calloc(items, 1);
    assert_non_null(c.bad);
    assert_ok(tv_pool_open(4, &err, &pool), &err);
    for (int kind = 0; kind < 2; kind++) {
        c.in = kind == 0 ? open_object(s, name) : open_ok(model);
        tv_pool_run(pool, items, look, &c);
        for (size_t i = 0; i < items; i++)
            assert_int_equal(c.bad[i], 0);
        tv_input_close(c.in);
    }
    tv_pool_close(pool);
    tv_free(c.bad);
    tv_store_close(s);
    tmpdir_remove(model);
    tmpdir_remove(dir);
}

/* ---- faults
 * ---------------------------------------------------------------------- */

static enum tv_err open_once(void *arg, struct tv_error *err)
{
    tv_input *in = NULL;
    struct tv_hash h;
    struct tv_view v;
    enum tv_err rc = tv_input_open_path(arg, err, &in);

    if (rc != TV_OK)
        return rc;
    rc = tv_input_fingerprint(in, &h, err);
    for (size_t i = 0; rc == TV_OK && i < tv_input_count(in); i++) {
        rc = tv_input_view(in, tv_input_tensor(in, i), err, &v);
        if (rc == TV_OK)
            tv_input_release(in, &v);
    }
    tv_input_close(in);
    return rc;
}

static void test_faults(void **state)
{
    char *dir = tmpdir_make();
    char *bin = tmpdir_make();
    size_t n = 0;

    (void)state;
    (void)ff_model(dir, &n);
    ff_copy("good/torch/tied.bin", bin, "pytorch_model.bin");
    /* A map that cannot be named in the registry still works. */
    assert_true(faults_loop_alloc(open_once, dir, true) > 50);
    assert_true(faults_loop_alloc(open_once, bin, true) > 30);
    assert_true(
        faults_loop_sys(open_once, dir,
                        FAULT_OPEN | FAULT_FSTAT | FAULT_MMAP | FAULT_PREAD,
                        EIO, TV_E_IO, false) >= 4);
    tmpdir_remove(bin);
    tmpdir_remove(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order),     cmocka_unit_test(test_identity),
        cmocka_unit_test(test_object),    cmocka_unit_test(test_changed_link),
        cmocka_unit_test(test_threads),   cmocka_unit_test(test_faults),
        cmocka_unit_test(test_unchanged), cmocka_unit_test(test_digest_of_link),
    };
    json_set_alloc_funcs(tv_alloc, tv_free);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
