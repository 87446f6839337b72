/* SPDX-License-Identifier: Apache-2.0 */
/* test_payload.c - chunks, alignment, sharing by content, copying in. */
#include "store_fixture.h"

#include <stdio.h>
#include <string.h>

#include "rng.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/sys.h"

static tv_batch *begin(struct fx *f, bool lazy)
{
    tv_batch *b = NULL;
    assert_ok(tv_batch_begin(f->s, lazy, &f->err, &b), &f->err);
    return b;
}

static uint64_t create(struct fx *f, tv_batch *b, const char *name,
                       enum tv_kind kind)
{
    uint64_t id = 0;
    bool resumed = false;
    assert_ok(tv_object_create(b, name, kind, "", "", (struct tv_hash){1, 2},
                               &id, &resumed, &f->err),
              &f->err);
    return id;
}

static void commit(struct fx *f, tv_batch *b)
{
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
}

static struct tv_store_stat stat_of(struct fx *f)
{
    struct tv_store_stat st;
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    return st;
}

/* Shapes at every edge, all dtypes, all aligned, all back bit for bit. */
static void every_shape_round_trips(void **state)
{
    struct fx *f = (struct fx *)*state;
    static const struct {
        uint64_t rows, cols;
    } shapes[] = {{0, 0},   {1, 0},   {0, 5},    {7, 0},      {3, 4},
                  {1, 500}, {64, 64}, {1000, 3}, {16384, 16}, {5, 100000}};
    const size_t n_shapes = sizeof shapes / sizeof shapes[0];
    uint64_t shape[2];
    char name[40];
    tv_batch *b = begin(f, true);
    const uint64_t id = create(f, b, "m", TV_KIND_MODEL);
    for (int t = TV_BOOL; t < TV_DTYPE_COUNT; t++) {
        for (size_t i = 0; i < n_shapes; i++) {
            (void)snprintf(name, sizeof name, "t.%d.%zu", t, i);
            struct tv_tensor_desc d = fx_desc(
                name, (enum tv_dtype)t, shapes[i].rows, shapes[i].cols, shape);
            if (i == 2)
                d.rank = 2; /* [0, 5] */
            uint64_t n = 0, bytes = 0;
            assert_ok(tv_shape_elems(d.shape, d.rank, &n, &f->err), &f->err);
            if (tv_dtype_bytes(d.dtype, n, &bytes, NULL) != TV_OK)
                continue; /* a broken last byte: no such tensor exists */
            assert_ok(fx_copy_in(&b, id, &d, (uint64_t)t * 100 + i, &f->err),
                      &f->err);
        }
    }
    assert_ok(tv_object_complete(b, id, false, &f->err), &f->err);
    commit(f, b);
    tv_read *r = NULL;
    struct tv_tensor_list *l = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_tensor_list(r, id, &f->err, &l), &f->err);
    assert_true(l->n > 150);
    for (size_t i = 0; i < l->n; i++) {
        const struct tv_tensor *t = &l->items[i];
        struct tv_view v;
        unsigned dtype = 0, which = 0;
        assert_int_equal(sscanf(t->name, "t.%u.%u", &dtype, &which), 2);
        assert_int_equal(t->dtype, dtype);
        assert_ok(fx_compare(r, id, t->name, dtype * 100 + which, &f->err),
                  &f->err);
        assert_ok(tv_tensor_view(r, t, &f->err, &v), &f->err);
        for (size_t c = 0; c < v.n_chunks; c++) {
            const char *file = NULL, *extent = NULL;
            assert_int_equal((uintptr_t)v.chunks[c] % 64, 0);
            /* In place: the address is one of the map, not of a copy. */
            assert_true(tv_map_describe(v.chunks[c], &file, &extent));
            assert_non_null(strstr(file, "data.mdb"));
        }
        assert_int_equal(v.n_chunks == 0, v.bytes == 0);
    }
    tv_tensor_list_free(l);
    tv_read_end(r);
    fx_verify(f);
}

/* A tensor of many chunks, written through several batches. */
static void copying_keeps_the_dirty_limit(void **state)
{
    struct fx *f = (struct fx *)*state;
    const struct tv_store_options opt = {.dirty_bytes_max = 1u << 20};
    uint64_t shape[2];
    fx_close(f);
    fx_open(f, &opt);
    assert_int_equal(tv_store_dirty_max(f->s), 1u << 20);
    tv_batch *b = begin(f, true);
    const uint64_t id = create(f, b, "m", TV_KIND_MODEL);
    /* 5 MB in rows of 1000 bytes, whose chunks cross the borders of leaves. */
    const struct tv_tensor_desc d = fx_desc("w", TV_F32, 5000, 250, shape);
    assert_ok(fx_copy_in(&b, id, &d, 9, &f->err), &f->err);
    assert_true(tv_batch_dirty(b) <= 1u << 20);
    assert_ok(tv_object_complete(b, id, false, &f->err), &f->err);
    commit(f, b);
    assert_ok(tv_store_sync(f->s, &f->err), &f->err);
    tv_read *r = NULL;
    struct tv_tensor t;
    struct tv_view v;
    bool found = false;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_tensor_get(r, id, "w", &found, &t, &f->err), &f->err);
    assert_ok(tv_tensor_view(r, &t, &f->err, &v), &f->err);
    assert_true(v.n_chunks >= 5);
    assert_int_equal(v.chunk_bytes % 1000, 0);
    assert_ok(fx_compare(r, id, "w", 9, &f->err), &f->err);
    tv_read_end(r);
    fx_verify(f);
}

/* ---- sharing --------------------------------------------------------------
 */

static uint64_t payload_of(struct fx *f, uint64_t object, const char *name)
{
    tv_read *r = NULL;
    struct tv_tensor t;
    bool found = false;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_tensor_get(r, object, name, &found, &t, &f->err), &f->err);
    assert_true(found);
    tv_read_end(r);
    return t.payload_id;
}

static void equal_content_is_kept_once(void **state)
{
    struct fx *f = (struct fx *)*state;
    uint64_t shape[2], other[2];
    tv_batch *b = begin(f, false);
    const uint64_t x = create(f, b, "x", TV_KIND_MODEL);
    const uint64_t y = create(f, b, "y", TV_KIND_MERGE);
    const struct tv_tensor_desc e = fx_desc("embed", TV_F32, 100, 50, shape);
    const struct tv_tensor_desc h = fx_desc("head", TV_F32, 100, 50, shape);
    /* The same bytes in another shape or type are other content. */
    const struct tv_tensor_desc s = fx_desc("turned", TV_F32, 50, 100, other);
    const struct tv_tensor_desc u = fx_desc("ints", TV_I32, 100, 50, shape);
    assert_ok(fx_copy_in(&b, x, &e, 1, &f->err), &f->err);
    assert_ok(fx_copy_in(&b, x, &h, 1, &f->err), &f->err);
    assert_ok(fx_copy_in(&b, x, &s, 1, &f->err), &f->err);
    assert_ok(fx_copy_in(&b, x, &u, 1, &f->err), &f->err);
    assert_ok(fx_copy_in(&b, y, &e, 1, &f->err), &f->err);
    assert_ok(fx_copy_in(&b, y, &h, 2, &f->err), &f->err);
    assert_ok(tv_object_complete(b, x, false, &f->err), &f->err);
    assert_ok(tv_object_complete(b, y, false, &f->err), &f->err);
    commit(f, b);
    const uint64_t id = payload_of(f, x, "embed");
    assert_int_equal(payload_of(f, x, "head"), id);
    assert_int_equal(payload_of(f, y, "embed"), id);
    assert_true(payload_of(f, x, "turned") != id);
    assert_true(payload_of(f, x, "ints") != id);
    assert_true(payload_of(f, y, "head") != id);
    struct tv_store_stat st = stat_of(f);
    assert_int_equal(st.weights, 3 * 20000);
    assert_int_equal(st.outputs, 20000); /* only what models do not share */
    assert_int_equal(st.dedup_saved_bytes, 2 * 20000);
    assert_int_equal(st.n_objects, 2);
    fx_verify(f);

    /* It stays as long as one user is left. */
    assert_ok(fx_remove(f->s, "x", &f->err), &f->err);
    st = stat_of(f);
    assert_int_equal(st.weights, 0);
    assert_int_equal(st.outputs, 2 * 20000);
    tv_read *r = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(fx_compare(r, y, "embed", 1, &f->err), &f->err);
    tv_read_end(r);
    fx_verify(f);
    assert_ok(fx_remove(f->s, "y", &f->err), &f->err);
    assert_int_equal(stat_of(f).outputs, 0);
    fx_verify(f);
    /* And is not found any more. */
    b = begin(f, false);
    const uint64_t z = create(f, b, "z", TV_KIND_MODEL);
    assert_ok(fx_copy_in(&b, z, &e, 1, &f->err), &f->err);
    commit(f, b);
    assert_true(payload_of(f, z, "embed") > id);
    fx_verify(f);
}

/* An entry put again takes the place of the old one. */
static void putting_again_replaces(void **state)
{
    struct fx *f = (struct fx *)*state;
    uint64_t shape[2];
    tv_batch *b = begin(f, false);
    const uint64_t id = create(f, b, "m", TV_KIND_MODEL);
    struct tv_tensor_desc d = fx_desc("w", TV_F32, 10, 10, shape);
    assert_ok(fx_copy_in(&b, id, &d, 1, &f->err), &f->err);
    assert_ok(fx_copy_in(&b, id, &d, 1, &f->err), &f->err); /* itself */
    assert_ok(fx_copy_in(&b, id, &d, 2, &f->err), &f->err);
    d = fx_desc("w", TV_F32, 20, 10, shape);
    assert_ok(fx_copy_in(&b, id, &d, 3, &f->err), &f->err);
    assert_ok(tv_object_complete(b, id, false, &f->err), &f->err);
    commit(f, b);
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_object_find(r, "m", false, &f->err, &o), &f->err);
    assert_int_equal(o->n_tensors, 1);
    assert_int_equal(o->bytes, 800);
    assert_ok(fx_compare(r, id, "w", 3, &f->err), &f->err);
    tv_object_free(o);
    tv_read_end(r);
    assert_int_equal(stat_of(f).weights, 800);
    fx_verify(f);
}

/* ---- by hand --------------------------------------------------------------
 */

/* What a merge does: chunk by chunk, finishing equal content included. */
static void chunks_by_hand(void **state)
{
    struct fx *f = (struct fx *)*state;
    const uint64_t shape[1] = {1000};
    const struct tv_tensor_desc d = {
        .name = "w", .dtype = TV_F32, .rank = 1, .shape = shape};
    unsigned char bytes[4000];
    struct tv_hash leaf;
    struct tv_payload p;
    uint64_t ids[2] = {0, 0}, object = 0;
    fx_bytes(4, bytes, sizeof bytes);
    leaf = tv_hash128(bytes, sizeof bytes);
    for (int k = 0; k < 2; k++) {
        tv_batch *b = begin(f, false);
        if (k == 0)
            object = create(f, b, "m", TV_KIND_MERGE);
        assert_ok(tv_payload_begin(b, &d, 1500, &p, &f->err), &f->err);
        assert_int_equal(p.chunk_bytes, 1472);
        assert_int_equal(p.n_chunks, 3);
        for (size_t c = 0; c < p.n_chunks; c++) {
            void *data = NULL;
            size_t n = 0;
            assert_ok(tv_chunk_reserve(b, &p, c, &data, &n, &f->err), &f->err);
            assert_int_equal(n, c < 2 ? 1472 : 4000 - 2 * 1472);
            memcpy(data, bytes + c * 1472, n);
            assert_ok(tv_chunk_seal(b, &p, c, &f->err), &f->err);
            if (c == 1) { /* a payload may span batches */
                commit(f, b);
                b = begin(f, false);
            }
        }
        assert_ok(tv_payload_finish(b, &p, &leaf, &ids[k], &f->err), &f->err);
        const struct tv_tensor_desc named = {.name = k == 0 ? "w" : "w2",
                                             .dtype = TV_F32,
                                             .rank = 1,
                                             .shape = shape};
        assert_ok(tv_tensor_put(b, object, &named, ids[k], &f->err), &f->err);
        commit(f, b);
    }
    assert_int_equal(ids[0], ids[1]);
    assert_true(p.id != ids[1]);
    tv_read *r = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(fx_compare(r, object, "w", 4, &f->err), &f->err);
    assert_ok(fx_compare(r, object, "w2", 4, &f->err), &f->err);
    tv_read_end(r);
    fx_verify(f);
}

/* Mistakes of a caller are refused, and spoil the batch. */
static void misuse_is_refused(void **state)
{
    struct fx *f = (struct fx *)*state;
    const uint64_t shape[1] = {1000};
    const struct tv_tensor_desc d = {
        .name = "w", .dtype = TV_F32, .rank = 1, .shape = shape};
    const struct tv_tensor_desc wrong = {
        .name = "w", .dtype = TV_I32, .rank = 1, .shape = shape};
    struct tv_hash leaf = {1, 1};
    struct tv_payload p;
    uint64_t id = 0;
    void *data = NULL;
    size_t n = 0;

    tv_batch *b = begin(f, false);
    const uint64_t object = create(f, b, "m", TV_KIND_MODEL);
    assert_ok(tv_payload_begin(b, &d, 0, &p, &f->err), &f->err);
    assert_code(tv_tensor_put(b, object, &d, p.id, &f->err), TV_E_INTERNAL,
                &f->err); /* not finished */
    assert_code(tv_chunk_reserve(b, &p, 1, &data, &n, &f->err), TV_E_INTERNAL,
                &f->err);
    assert_code(tv_payload_finish(b, &p, &leaf, &id, &f->err), TV_E_CORRUPT,
                &f->err); /* its chunk is missing */
    assert_ok(tv_chunk_reserve(b, &p, 0, &data, &n, &f->err), &f->err);
    assert_code(tv_payload_begin(b, &d, 0, &p, &f->err), TV_E_INTERNAL,
                &f->err); /* not sealed */
    assert_code(tv_batch_commit(b, &f->err), TV_E_INTERNAL, &f->err);

    b = begin(f, false);
    const uint64_t o2 = create(f, b, "m", TV_KIND_MODEL);
    assert_ok(tv_payload_begin(b, &d, 0, &p, &f->err), &f->err);
    assert_ok(tv_chunk_reserve(b, &p, 0, &data, &n, &f->err), &f->err);
    memset(data, 7, n);
    assert_ok(tv_chunk_seal(b, &p, 0, &f->err), &f->err);
    leaf = tv_hash128(data, n);
    assert_ok(tv_payload_finish(b, &p, &leaf, &id, &f->err), &f->err);
    assert_code(tv_tensor_put(b, o2, &wrong, id, &f->err), TV_E_INTERNAL,
                &f->err);
    assert_code(tv_tensor_put(b, o2 + 50, &d, id, &f->err), TV_E_NOTFOUND,
                &f->err);
    assert_code(tv_payload_finish(b, &p, &leaf, &id, &f->err), TV_E_INTERNAL,
                &f->err); /* twice */
    assert_ok(tv_tensor_put(b, o2, &d, id, &f->err), &f->err);
    commit(f, b);
    b = begin(f, false);
    assert_code(tv_chunk_seal(b, &p, 0, &f->err), TV_E_INTERNAL, &f->err);
    assert_code(tv_batch_commit(b, &f->err), TV_E_INTERNAL, &f->err);
    fx_verify(f);
}

/* Bytes that do not fit their checksums, or their description. */
static void wrong_leaves_are_refused(void **state)
{
    struct fx *f = (struct fx *)*state;
    uint64_t shape[2];
    unsigned char bytes[4000];
    const unsigned char *one[1];
    const struct tv_hash lie = {1, 2};
    const struct tv_tensor_desc d = fx_desc("w", TV_U8, 4000, 0, shape);
    fx_bytes(1, bytes, sizeof bytes);
    struct tv_view v = fx_view(&d, bytes, one);
    v.leaves = &lie;
    tv_batch *b = begin(f, false);
    const uint64_t id = create(f, b, "m", TV_KIND_MODEL);
    assert_code(tv_tensor_copy_in(&b, id, &d, &v, NULL, &f->err), TV_E_CORRUPT,
                &f->err);
    assert_message(&f->err, "tensor 'w'");
    tv_batch_abort(b);
    /* The caller's own, of a file that has changed since. */
    v.leaves = NULL;
    b = begin(f, false);
    const uint64_t again = create(f, b, "m", TV_KIND_MODEL);
    assert_code(tv_tensor_copy_in(&b, again, &d, &v, &lie, &f->err),
                TV_E_CORRUPT, &f->err);
    assert_message(&f->err, "changed while they were copied");
    tv_batch_abort(b);
    const struct tv_tensor_desc other = fx_desc("w", TV_U8, 3999, 0, shape);
    b = begin(f, false);
    assert_code(tv_tensor_copy_in(&b, id, &other, &v, NULL, &f->err),
                TV_E_INTERNAL, &f->err);
    tv_batch_abort(b);
}

/* ---- what killed writers leave --------------------------------------------
 */

static void unfinished_payloads_go(void **state)
{
    struct fx *f = (struct fx *)*state;
    uint64_t shape[2], freed = 0;
    struct tv_payload p;
    void *data = NULL;
    size_t n = 0;
    const struct tv_tensor_desc d = fx_desc("w", TV_U8, 1000000, 0, shape);
    tv_batch *b = begin(f, false);
    assert_ok(tv_payload_begin(b, &d, 100000, &p, &f->err), &f->err);
    for (size_t c = 0; c < 5; c++) {
        assert_ok(tv_chunk_reserve(b, &p, c, &data, &n, &f->err), &f->err);
        memset(data, (int)c, n);
        assert_ok(tv_chunk_seal(b, &p, c, &f->err), &f->err);
    }
    commit(f, b);
    fx_verify(f); /* not damage */
    /* Our own unfinished work is left alone by other writes of this handle. */
    assert_ok(tv_store_lock(f->s, "import", 0, &f->err), &f->err);
    assert_ok(fx_object(f->s, "m", 1, 10, &f->err), &f->err);
    b = begin(f, false);
    assert_ok(tv_chunk_reserve(b, &p, 5, &data, &n, &f->err), &f->err);
    memset(data, 5, n);
    assert_ok(tv_chunk_seal(b, &p, 5, &f->err), &f->err);
    commit(f, b);
    uint64_t before = stat_of(f).free_bytes;
    /* That of a process which is gone is dropped by the next writer. */
    fx_close(f);
    fx_open(f, NULL);
    assert_ok(tv_store_lock(f->s, "import", 0, &f->err), &f->err);
    assert_ok(fx_object(f->s, "m2", 2, 10, &f->err), &f->err);
    assert_true(stat_of(f).free_bytes > before + 500000);
    /* gc takes ours too. */
    b = begin(f, false);
    assert_ok(tv_payload_begin(b, &d, 100000, &p, &f->err), &f->err);
    assert_ok(tv_chunk_reserve(b, &p, 0, &data, &n, &f->err), &f->err);
    memset(data, 0, n);
    assert_ok(tv_chunk_seal(b, &p, 0, &f->err), &f->err);
    commit(f, b);
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    assert_true(freed >= 100000);
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    assert_true(freed < 100000);
    assert_ok(fx_object_compare(f->s, "m", 1, &f->err), &f->err);
    fx_verify(f);
}

/* A snapshot keeps what another handle's batch removes. */
static void snapshot_outlives_removal(void **state)
{
    struct fx *f = (struct fx *)*state;
    assert_ok(fx_object(f->s, "m", 1, 2000, &f->err), &f->err);
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    assert_ok(tv_read_begin(f->s, &f->err, &r), &f->err);
    assert_ok(tv_object_find(r, "m", false, &f->err, &o), &f->err);
    assert_ok(fx_remove(f->s, "m", &f->err), &f->err);
    for (uint64_t i = 0; i < 5; i++)
        assert_ok(fx_object(f->s, "n", i + 10, 2000, &f->err), &f->err);
    assert_ok(fx_compare(r, o->id, "w", 1, &f->err), &f->err);
    tv_object_free(o);
    tv_read_end(r);
    fx_verify(f);
}

/* Removing and adding for long does not make the file grow for ever. */
static void space_is_used_again(void **state)
{
    struct fx *f = (struct fx *)*state;
    uint64_t high = 0;
    for (uint64_t i = 0; i < 40; i++) {
        assert_ok(fx_object(f->s, "m", i, 1500 + 100 * (i % 5), &f->err),
                  &f->err);
        const uint64_t now = stat_of(f).file_bytes;
        if (i < 15 && now > high)
            high = now;
    }
    assert_true(stat_of(f).file_bytes <= high);
    fx_verify(f);
}

#define T(name) cmocka_unit_test_setup_teardown(name, fx_setup, fx_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(every_shape_round_trips),
        T(copying_keeps_the_dirty_limit),
        T(equal_content_is_kept_once),
        T(putting_again_replaces),
        T(chunks_by_hand),
        T(misuse_is_refused),
        T(wrong_leaves_are_refused),
        T(unfinished_payloads_go),
        T(snapshot_outlives_removal),
        T(space_is_used_again),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
