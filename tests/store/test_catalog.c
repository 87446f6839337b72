/* SPDX-License-Identifier: Apache-2.0 */
/* test_catalog.c - objects, side files, tensor lists, replacement, removal. */
#include "store_fixture.h"

#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/text.h"

static uint64_t create(struct fx *f, tv_batch *b, const char *name,
                       uint64_t print, bool *resumed)
{
    uint64_t id = 0;
    bool again = false;
    assert_ok(tv_object_create(b, name, TV_KIND_MODEL, "Arch", "/src",
                               (struct tv_hash){print, 0}, &id,
                               resumed != NULL ? resumed : &again, &f->err),
              &f->err);
    return id;
}

static tv_batch *begin(struct fx *f)
{
    tv_batch *b = NULL;
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    return b;
}

static tv_read *reader(struct fx *f)
{
    tv_read *r = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    return r;
}

static void names_are_checked(void **state)
{
    struct fx *f = (struct fx *)*state;
    static const char *const bad[] = {"", "a/b", "a b", "a\nb", "\xc3\xa9"};
    char longest[TV_OBJECT_NAME_MAX + 2];
    uint64_t id = 0;
    bool resumed = false;
    tv_batch *b = begin(f);
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++)
        assert_code(tv_object_create(b, bad[i], TV_KIND_MODEL, "", "",
                                     (struct tv_hash){0, 0}, &id, &resumed,
                                     &f->err),
                    TV_E_USAGE, &f->err);
    memset(longest, 'a', sizeof longest);
    longest[TV_OBJECT_NAME_MAX + 1] = '\0';
    assert_code(tv_object_create(b, longest, TV_KIND_MODEL, "", "",
                                 (struct tv_hash){0, 0}, &id, &resumed,
                                 &f->err),
                TV_E_USAGE, &f->err);
    longest[TV_OBJECT_NAME_MAX] = '\0';
    (void)create(f, b, longest, 1, NULL);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
}

static void invisible_until_complete(void **state)
{
    struct fx *f = (struct fx *)*state;
    struct tv_object *o = NULL, **list = NULL;
    size_t n = 0;
    uint64_t shape[2];
    tv_batch *b = begin(f);
    const uint64_t id = create(f, b, "m", 1, NULL);
    struct tv_tensor_desc d = fx_desc("w", TV_F32, 3, 4, shape);
    assert_ok(fx_copy_in(&b, id, &d, 1, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);

    tv_read *r = reader(f);
    assert_code(tv_object_find(r, "m", false, &f->err, &o), TV_E_NOTFOUND,
                &f->err);
    assert_ok(tv_object_list(r, false, &f->err, &list, &n), &f->err);
    assert_int_equal(n, 0);
    tv_free(list);
    assert_ok(tv_object_find(r, "m", true, &f->err, &o), &f->err);
    assert_false(o->complete);
    assert_int_equal(o->n_tensors, 1);
    assert_int_equal(o->bytes, 48);
    tv_object_free(o);

    b = begin(f);
    assert_ok(tv_object_complete(b, id, false, &f->err), &f->err);
    /* Not before the commit, and not for an old snapshot. */
    assert_code(tv_object_find(r, "m", false, &f->err, &o), TV_E_NOTFOUND,
                &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    assert_code(tv_object_find(r, "m", false, &f->err, &o), TV_E_NOTFOUND,
                &f->err);
    assert_ok(tv_read_renew(r, &f->err), &f->err);
    assert_ok(tv_object_find(r, "m", false, &f->err, &o), &f->err);
    assert_true(o->complete);
    assert_string_equal(o->architecture, "Arch");
    assert_string_equal(o->source_path, "/src");
    assert_int_equal(o->kind, TV_KIND_MODEL);
    assert_int_equal(o->id, id);
    tv_object_free(o);
    tv_read_end(r);

    /* Complete objects are closed. */
    b = begin(f);
    d = fx_desc("w2", TV_F32, 3, 4, shape);
    assert_code(fx_copy_in(&b, id, &d, 1, &f->err), TV_E_INTERNAL, &f->err);
    tv_batch_abort(b);
}

static void partial_objects_resume(void **state)
{
    struct fx *f = (struct fx *)*state;
    uint64_t shape[2];
    bool resumed = true;
    tv_batch *b = begin(f);
    const uint64_t id = create(f, b, "m", 7, &resumed);
    assert_false(resumed);
    struct tv_tensor_desc d = fx_desc("w", TV_F32, 3, 4, shape);
    assert_ok(fx_copy_in(&b, id, &d, 1, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    fx_close(f);
    fx_open(f, NULL);
    b = begin(f);
    assert_int_equal(create(f, b, "m", 7, &resumed), id);
    assert_true(resumed);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    tv_read *r = reader(f);
    assert_ok(fx_compare(r, id, "w", 1, &f->err), &f->err);
    tv_read_end(r);
    /* Another source begins anew, and the old parts go. */
    b = begin(f);
    const uint64_t id2 = create(f, b, "m", 8, &resumed);
    assert_false(resumed);
    assert_true(id2 > id); /* ids are not used twice */
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    struct tv_store_stat st;
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.weights, 0);
    fx_verify(f);
}

static void replace_swaps_at_once(void **state)
{
    struct fx *f = (struct fx *)*state;
    uint64_t id = 0, shape[2];
    bool resumed = false;
    assert_ok(fx_object(f->s, "m", 1, 200, &f->err), &f->err);
    tv_batch *b = begin(f);
    assert_code(tv_object_create(b, "m", TV_KIND_MODEL, "", "",
                                 (struct tv_hash){9, 9}, &id, &resumed,
                                 &f->err),
                TV_E_EXISTS, &f->err);
    assert_ok(tv_object_create_over(b, "m", TV_KIND_MODEL, "", "",
                                    (struct tv_hash){9, 9}, &id, &resumed,
                                    &f->err),
              &f->err);
    struct tv_tensor_desc d = fx_desc("new", TV_F32, 3, 4, shape);
    assert_ok(fx_copy_in(&b, id, &d, 77, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    /* The old one is there until the swap ... */
    assert_ok(fx_object_compare(f->s, "m", 1, &f->err), &f->err);
    b = begin(f);
    assert_code(tv_object_complete(b, id, false, &f->err), TV_E_EXISTS,
                &f->err);
    assert_ok(tv_object_complete(b, id, true, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    /* ... and its space is given back. */
    tv_read *r = reader(f);
    struct tv_object *o = NULL;
    assert_ok(tv_object_find(r, "m", false, &f->err, &o), &f->err);
    assert_int_equal(o->id, id);
    assert_int_equal(o->n_files, 0);
    assert_ok(fx_compare(r, id, "new", 77, &f->err), &f->err);
    tv_object_free(o);
    tv_read_end(r);
    struct tv_store_stat st;
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.weights, 48);
    assert_int_equal(st.n_objects, 1);
    uint64_t freed = 1;
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    fx_verify(f);
}

static void lists_are_in_layer_order(void **state)
{
    struct fx *f = (struct fx *)*state;
    char longer[600];
    memset(longer, 'q', sizeof longer);
    longer[sizeof longer - 1] = '\0';
    static char same_prefix[2][TV_NAME_MAX + 1];
    for (int i = 0; i < 2; i++) {
        memset(same_prefix[i], 'z', TV_NAME_MAX);
        same_prefix[i][TV_NAME_MAX - 1] = i == 0 ? 'b' : 'a';
    }
    const char *names[] = {
        "model.layers.10.w",
        "model.layers.2.w",
        "lm_head",
        "model.layers.1.w",
        "model.layers.01.w",
        "model.layers.001.w",
        longer,
        same_prefix[0],
        same_prefix[1],
        "model.layers.2",
        "a",
        "\xc3\xa9t\xc3\xa9",
    };
    const size_t n = sizeof names / sizeof names[0];
    uint64_t shape[2];
    tv_batch *b = begin(f);
    const uint64_t id = create(f, b, "m", 1, NULL);
    for (size_t i = 0; i < n; i++) {
        const struct tv_tensor_desc d = fx_desc(names[i], TV_U8, 8, 0, shape);
        assert_ok(fx_copy_in(&b, id, &d, i, &f->err), &f->err);
    }
    const struct tv_tensor_desc no_name = fx_desc("", TV_U8, 8, 0, shape);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    b = begin(f);
    assert_code(fx_copy_in(&b, id, &no_name, 1, &f->err), TV_E_CORRUPT,
                &f->err);
    tv_batch_abort(b);

    tv_read *r = reader(f);
    struct tv_tensor_list *l = NULL;
    assert_ok(tv_tensor_list(r, id, &f->err, &l), &f->err);
    assert_int_equal(l->n, n);
    for (size_t i = 1; i < n; i++)
        assert_true(tv_name_compare(l->items[i - 1].name, l->items[i].name) <
                    0);
    for (size_t i = 0; i < n; i++)
        assert_ok(fx_compare(r, id, names[i], i, &f->err), &f->err);
    bool found = true;
    struct tv_tensor t;
    assert_ok(tv_tensor_get(r, id, "model.layers.3.w", &found, &t, &f->err),
              &f->err);
    assert_false(found);
    tv_tensor_list_free(l);
    assert_ok(tv_tensor_list(r, id + 1, &f->err, &l), &f->err);
    assert_int_equal(l->n, 0);
    tv_tensor_list_free(l);
    tv_read_end(r);
    fx_verify(f);
}

/* The digest does not depend on the order of arrival. */
static void digest_of_an_object(void **state)
{
    struct fx *f = (struct fx *)*state;
    static const char *const order[2][3] = {{"b", "a.10", "a.9"},
                                            {"a.9", "b", "a.10"}};
    uint64_t shape[2];
    struct tv_hash got[2];
    for (int k = 0; k < 2; k++) {
        tv_batch *b = begin(f);
        const uint64_t id = create(f, b, k == 0 ? "x" : "y", 1, NULL);
        for (int i = 0; i < 3; i++) {
            const struct tv_tensor_desc d =
                fx_desc(order[k][i], TV_F16, 5, 7, shape);
            assert_ok(fx_copy_in(&b, id, &d,
                                 (uint64_t)order[k][i][0] + strlen(order[k][i]),
                                 &f->err),
                      &f->err);
        }
        assert_ok(tv_batch_commit(b, &f->err), &f->err);
        tv_read *r = reader(f);
        assert_ok(tv_object_digest(r, id, &got[k], &f->err), &f->err);
        if (k == 1) {
            /* By hand: bytewise order puts a.10 before a.9. */
            static const char *const sorted[3] = {"a.10", "a.9", "b"};
            tv_hasher *h = NULL;
            assert_ok(tv_hasher_open(&f->err, &h), &f->err);
            for (int i = 0; i < 3; i++) {
                struct tv_tensor t;
                bool found = false;
                assert_ok(tv_tensor_get(r, id, sorted[i], &found, &t, &f->err),
                          &f->err);
                assert_true(found);
                tv_digest_add(h, t.name, t.dtype, t.shape, t.rank, t.checksum);
            }
            assert_true(tv_hash_equal(tv_hasher_value(h), got[1]));
            tv_hasher_close(h);
        }
        tv_read_end(r);
    }
    assert_true(tv_hash_equal(got[0], got[1]));
}

static void side_files(void **state)
{
    struct fx *f = (struct fx *)*state;
    static char big[300000];
    fx_bytes(3, big, sizeof big);
    tv_batch *b = begin(f);
    const uint64_t x = create(f, b, "x", 1, NULL);
    const uint64_t y = create(f, b, "y", 2, NULL);
    assert_ok(tv_object_file_put(b, x, "config.json", "{}", 2, &f->err),
              &f->err);
    assert_ok(
        tv_object_file_put(b, x, "tokenizer.json", big, sizeof big, &f->err),
        &f->err);
    assert_ok(tv_object_file_put(b, x, "empty", "", 0, &f->err), &f->err);
    assert_ok(tv_object_file_put(b, y, "t2.json", big, sizeof big, &f->err),
              &f->err);
    /* Putting again replaces. */
    assert_ok(tv_object_file_put(b, x, "config.json", "[1]", 3, &f->err),
              &f->err);
    assert_ok(tv_object_complete(b, x, false, &f->err), &f->err);
    assert_ok(tv_object_complete(b, y, false, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    static const char *const bad[] = {"", ".", "..", "a/b"};
    b = begin(f);
    const uint64_t z = create(f, b, "z", 1, NULL);
    for (int i = 0; i < 4; i++)
        assert_code(tv_object_file_put(b, z, bad[i], "x", 1, &f->err),
                    TV_E_USAGE, &f->err);
    tv_batch_abort(b);

    tv_read *r = reader(f);
    struct tv_object *o = NULL;
    const void *data = NULL;
    size_t n = 0;
    assert_ok(tv_object_find(r, "x", false, &f->err, &o), &f->err);
    assert_int_equal(o->n_files, 3);
    bool seen = false;
    struct tv_hash gone = tv_hash128("{}", 2), shared = {0, 0};
    for (size_t i = 0; i < 3; i++) {
        assert_ok(tv_blob_get(r, o->files[i].digest, &data, &n, &f->err),
                  &f->err);
        assert_int_equal(n, o->files[i].bytes);
        if (strcmp(o->files[i].name, "tokenizer.json") == 0) {
            assert_int_equal(n, sizeof big);
            assert_memory_equal(data, big, n);
            shared = o->files[i].digest;
            seen = true;
        }
        if (strcmp(o->files[i].name, "config.json") == 0)
            assert_memory_equal(data, "[1]", 3);
    }
    assert_true(seen);
    assert_code(tv_blob_get(r, gone, &data, &n, &f->err), TV_E_CORRUPT,
                &f->err);
    tv_object_free(o);
    fx_verify(f);
    /* A file goes with its last user. */
    assert_ok(fx_remove(f->s, "x", &f->err), &f->err);
    assert_ok(tv_read_renew(r, &f->err), &f->err);
    assert_ok(tv_blob_get(r, shared, &data, &n, &f->err), &f->err);
    assert_ok(fx_remove(f->s, "y", &f->err), &f->err);
    assert_ok(tv_read_renew(r, &f->err), &f->err);
    assert_code(tv_blob_get(r, shared, &data, &n, &f->err), TV_E_CORRUPT,
                &f->err);
    tv_read_end(r);
    fx_verify(f);
}

static void near_misses_are_named(void **state)
{
    struct fx *f = (struct fx *)*state;
    struct tv_object *o = NULL;
    tv_batch *b = NULL;
    bool more = true;
    assert_ok(fx_object(f->s, "mistral-base", 1, 3, &f->err), &f->err);
    tv_read *r = reader(f);
    assert_code(tv_object_find(r, "mistral-bsae", false, &f->err, &o),
                TV_E_NOTFOUND, &f->err);
    assert_non_null(strstr(f->err.hint, "mistral-base"));
    tv_read_end(r);
    b = begin(f);
    assert_code(tv_object_remove(b, "mistral-bsae", &more, &f->err),
                TV_E_NOTFOUND, &f->err);
    assert_false(more);
    tv_batch_abort(b);
}

/* More tensors than one removal batch takes. */
static void removal_in_bounded_batches(void **state)
{
    struct fx *f = (struct fx *)*state;
    uint64_t shape[2];
    char name[32];
    uint64_t id = 0;
    bool resumed = false;
    tv_batch *b = NULL;
    assert_ok(tv_batch_begin(f->s, true, &f->err, &b), &f->err);
    assert_ok(tv_object_create(b, "big", TV_KIND_MODEL, "", "",
                               (struct tv_hash){1, 1}, &id, &resumed, &f->err),
              &f->err);
    for (unsigned i = 0; i < 700; i++) {
        (void)snprintf(name, sizeof name, "t.%u", i);
        const struct tv_tensor_desc d = fx_desc(name, TV_U8, 64, 0, shape);
        assert_ok(fx_copy_in(&b, id, &d, i, &f->err), &f->err);
    }
    assert_ok(tv_object_complete(b, id, false, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    bool more = false;
    b = begin(f);
    assert_ok(tv_object_remove(b, "big", &more, &f->err), &f->err);
    /* 700 chunks, 256 at a time: the rest goes with the commit, after which a
     * second call would find nothing. */
    assert_false(more);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    b = begin(f);
    assert_code(tv_object_remove(b, "big", &more, &f->err), TV_E_NOTFOUND,
                &f->err);
    tv_batch_abort(b);
    /* Gone for readers with the first batch; finished by whoever comes. */
    tv_read *r = reader(f);
    struct tv_object *o = NULL;
    assert_code(tv_object_find(r, "big", true, &f->err, &o), TV_E_NOTFOUND,
                &f->err);
    tv_read_end(r);
    fx_verify(f);
    uint64_t freed = 0;
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    fx_verify(f);
    struct tv_store_stat st;
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.weights, 0);
    /* Nothing is left but the tables themselves. */
    assert_true(st.free_bytes > st.file_bytes * 3 / 4);
}

/* More linked tensors than a step takes: nothing is left to the commit. */
static void removal_of_many_links(void **state)
{
    struct fx *f = (struct fx *)*state;
    const struct tv_source_desc source = {.path = "/nowhere/model.safetensors",
                                          .bytes = 4096};
    uint64_t shape[2], id = 0, source_id = 0;
    char name[32];
    bool resumed = false, more = false;
    unsigned calls = 0;
    tv_batch *b = begin(f);
    assert_ok(tv_object_create(b, "links", TV_KIND_MODEL, "", "",
                               (struct tv_hash){1, 1}, &id, &resumed, &f->err),
              &f->err);
    assert_ok(tv_source_put(b, &source, &source_id, &f->err), &f->err);
    for (unsigned i = 0; i < 5000; i++) {
        (void)snprintf(name, sizeof name, "t.%u", i);
        const struct tv_tensor_desc d = fx_desc(name, TV_U8, 64, 0, shape);
        assert_ok(tv_tensor_link(b, id, &d, source_id, 0, &f->err), &f->err);
    }
    assert_ok(tv_object_complete(b, id, false, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    do {
        b = begin(f);
        assert_ok(tv_object_remove(b, "links", &more, &f->err), &f->err);
        assert_ok(tv_batch_commit(b, &f->err), &f->err);
        calls++;
    } while (more);
    assert_int_equal(calls, 2);
    fx_verify(f);
}

#define T(name) cmocka_unit_test_setup_teardown(name, fx_setup, fx_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(names_are_checked),
        T(invisible_until_complete),
        T(partial_objects_resume),
        T(replace_swaps_at_once),
        T(lists_are_in_layer_order),
        T(digest_of_an_object),
        T(side_files),
        T(near_misses_are_named),
        T(removal_in_bounded_batches),
        T(removal_of_many_links),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
