/* SPDX-License-Identifier: Apache-2.0 */
/* test_journal.c - runs, finished tensors, pins. */
#include "store_fixture.h"

#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/sys.h"

static tv_batch *begin(struct fx *f)
{
    tv_batch *b = NULL;
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    return b;
}

static void commit(struct fx *f, tv_batch *b)
{
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
}

static void put_done(struct fx *f, tv_batch *b, const char *run,
                     const char *name, uint64_t n)
{
    const struct tv_done d = {.name = name,
                              .shard = n,
                              .offset = n + 1,
                              .bytes = n + 2,
                              .checksum = {n + 3, n + 4},
                              .n_nonfinite_in = n + 5,
                              .n_nonfinite_out = n + 6};
    assert_ok(tv_done_put(b, run, &d, &f->err), &f->err);
}

static void state_round_trip(void **state)
{
    struct fx *f = (struct fx *)*state;
    static char doc[100000];
    char *got = NULL;
    size_t n = 0;
    bool found = true;
    fx_bytes(1, doc, sizeof doc);
    tv_batch *b = begin(f);
    assert_ok(tv_run_put(b, "run", "{}", 2, &f->err), &f->err);
    assert_ok(tv_run_put(b, "run", doc, sizeof doc, &f->err), &f->err);
    assert_ok(tv_run_put(b, "empty", "", 0, &f->err), &f->err);
    assert_code(tv_run_put(b, "", "", 0, &f->err), TV_E_INTERNAL, &f->err);
    commit(f, b);
    tv_read *r = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_run_get(r, "none", &found, &got, &n, &f->err), &f->err);
    assert_false(found);
    assert_null(got);
    assert_ok(tv_run_get(r, "run", &found, &got, &n, &f->err), &f->err);
    assert_true(found);
    assert_int_equal(n, sizeof doc);
    assert_memory_equal(got, doc, n);
    tv_free(got);
    assert_ok(tv_run_get(r, "empty", &found, &got, &n, &f->err), &f->err);
    assert_true(found);
    assert_int_equal(n, 0);
    tv_free(got);
    char **names = NULL;
    assert_ok(tv_run_list(r, &f->err, &names, &n), &f->err);
    assert_int_equal(n, 2);
    assert_string_equal(names[0], "empty");
    assert_string_equal(names[1], "run");
    tv_dir_list_free(names, n);
    tv_read_end(r);
    fx_verify(f);
}

static void many_runs_are_listed(void **state)
{
    struct fx *f = (struct fx *)*state;
    char name[32];
    char **names = NULL;
    size_t n = 1;
    tv_read *r = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_run_list(r, &f->err, &names, &n), &f->err);
    assert_int_equal(n, 0);
    tv_dir_list_free(names, n);
    tv_batch *b = begin(f);
    for (int i = 0; i < 40; i++) {
        (void)snprintf(name, sizeof name, "run-%02d", i);
        assert_ok(tv_run_put(b, name, name, strlen(name), &f->err), &f->err);
    }
    commit(f, b);
    assert_ok(tv_read_renew(r, &f->err), &f->err);
    assert_ok(tv_run_list(r, &f->err, &names, &n), &f->err);
    assert_int_equal(n, 40);
    assert_string_equal(names[39], "run-39");
    tv_dir_list_free(names, n);
    tv_read_end(r);
}

static void finished_tensors(void **state)
{
    struct fx *f = (struct fx *)*state;
    static const char *const names[] = {"m.10.w", "m.9.w", "m.09.w", "b", "a"};
    static const char *const order[] = {"a", "b", "m.9.w", "m.09.w", "m.10.w"};
    tv_batch *b = begin(f);
    assert_ok(tv_run_put(b, "run", "{}", 2, &f->err), &f->err);
    assert_ok(tv_run_put(b, "run2", "{}", 2, &f->err), &f->err);
    for (uint64_t i = 0; i < 5; i++)
        put_done(f, b, "run", names[i], 100 * i);
    put_done(f, b, "run2", "other", 7);
    put_done(f, b, "run", "a", 4000); /* again: the last one counts */
    const struct tv_done no_name = {.name = ""};
    assert_code(tv_done_put(b, "run", &no_name, &f->err), TV_E_INTERNAL,
                &f->err);
    commit(f, b);
    tv_read *r = NULL;
    struct tv_done_list *l = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_done_list(r, "run", &f->err, &l), &f->err);
    assert_int_equal(l->n, 5);
    for (size_t i = 0; i < 5; i++)
        if (strncmp(order[i], "m.9", 3) != 0 &&
            strncmp(order[i], "m.0", 3) != 0)
            assert_string_equal(l->items[i].name, order[i]);
    assert_int_equal(l->items[0].shard, 4000);
    assert_int_equal(l->items[0].offset, 4001);
    assert_int_equal(l->items[0].bytes, 4002);
    assert_true(
        tv_hash_equal(l->items[0].checksum, (struct tv_hash){4003, 4004}));
    assert_int_equal(l->items[0].n_nonfinite_in, 4005);
    assert_int_equal(l->items[0].n_nonfinite_out, 4006);
    tv_done_list_free(l);
    fx_verify(f);
    b = begin(f);
    assert_ok(tv_run_drop(b, "run", &f->err), &f->err);
    commit(f, b);
    assert_ok(tv_read_renew(r, &f->err), &f->err);
    assert_ok(tv_done_list(r, "run", &f->err, &l), &f->err);
    assert_int_equal(l->n, 0);
    tv_done_list_free(l);
    assert_ok(tv_done_list(r, "run2", &f->err, &l), &f->err);
    assert_int_equal(l->n, 1);
    assert_string_equal(l->items[0].name, "other");
    tv_done_list_free(l);
    tv_read_end(r);
    fx_verify(f);
}

/* What is not committed is not finished. */
static void abort_forgets(void **state)
{
    struct fx *f = (struct fx *)*state;
    tv_batch *b = begin(f);
    assert_ok(tv_run_put(b, "run", "{}", 2, &f->err), &f->err);
    put_done(f, b, "run", "w", 1);
    tv_batch_abort(b);
    tv_read *r = NULL;
    struct tv_done_list *l = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_done_list(r, "run", &f->err, &l), &f->err);
    assert_int_equal(l->n, 0);
    tv_done_list_free(l);
    tv_read_end(r);
}

static uint64_t id_of(struct fx *f, const char *name)
{
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_object_find(r, name, false, &f->err, &o), &f->err);
    const uint64_t id = o->id;
    tv_object_free(o);
    tv_read_end(r);
    return id;
}

static void pins_keep_objects(void **state)
{
    struct fx *f = (struct fx *)*state;
    bool more = false, resumed = false;
    uint64_t id = 0;
    assert_ok(fx_object(f->s, "a", 1, 10, &f->err), &f->err);
    assert_ok(fx_object(f->s, "b", 2, 10, &f->err), &f->err);
    tv_batch *b = begin(f);
    assert_ok(tv_run_put(b, "merge-of-a", "{}", 2, &f->err), &f->err);
    assert_ok(tv_pin_put(b, "merge-of-a", id_of(f, "a"), &f->err), &f->err);
    assert_code(tv_pin_put(b, "merge-of-a", 9999, &f->err), TV_E_NOTFOUND,
                &f->err);
    commit(f, b);
    b = begin(f);
    assert_code(tv_object_remove(b, "a", &more, &f->err), TV_E_LOCKED, &f->err);
    assert_message(&f->err, "merge-of-a");
    assert_message(&f->err, "'a'");
    /* Nor is it replaced. */
    assert_code(tv_object_create_over(b, "a", TV_KIND_MODEL, "", "",
                                      (struct tv_hash){5, 5}, &id, &resumed,
                                      &f->err),
                TV_E_LOCKED, &f->err);
    assert_ok(tv_object_remove(b, "b", &more, &f->err), &f->err);
    commit(f, b);
    assert_ok(fx_object_compare(f->s, "a", 1, &f->err), &f->err);
    uint64_t freed = 0;
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    b = begin(f);
    assert_code(tv_object_remove(b, "a", &more, &f->err), TV_E_LOCKED, &f->err);
    assert_ok(tv_run_drop(b, "merge-of-a", &f->err), &f->err);
    assert_ok(tv_object_remove(b, "a", &more, &f->err), &f->err);
    commit(f, b);
    fx_verify(f);
}

/* A pin whose run is not there (its record was dropped by hand) is a stray. */
static void gc_drops_strays(void **state)
{
    struct fx *f = (struct fx *)*state;
    uint64_t freed = 0;
    bool more = false;
    assert_ok(fx_object(f->s, "a", 1, 10, &f->err), &f->err);
    tv_batch *b = begin(f);
    assert_ok(tv_pin_put(b, "ghost", id_of(f, "a"), &f->err), &f->err);
    put_done(f, b, "ghost", "w", 1);
    commit(f, b);
    b = begin(f);
    assert_code(tv_object_remove(b, "a", &more, &f->err), TV_E_LOCKED, &f->err);
    tv_batch_abort(b);
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    b = begin(f);
    assert_ok(tv_object_remove(b, "a", &more, &f->err), &f->err);
    commit(f, b);
    tv_read *r = NULL;
    struct tv_done_list *l = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_done_list(r, "ghost", &f->err, &l), &f->err);
    assert_int_equal(l->n, 0);
    tv_done_list_free(l);
    tv_read_end(r);
}

#define T(name) cmocka_unit_test_setup_teardown(name, fx_setup, fx_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(state_round_trip), T(many_runs_are_listed), T(finished_tensors),
        T(abort_forgets),    T(pins_keep_objects),    T(gc_drops_strays),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
