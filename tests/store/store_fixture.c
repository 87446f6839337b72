/* SPDX-License-Identifier: Apache-2.0 */
/* store_fixture.c - see store_fixture.h. */
#include "store_fixture.h"

#include <stdio.h>
#include <string.h>

#include "rng.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/sys.h"

struct fx_held { /* behind struct fx: what was held before the test */
    struct fx f;
    uint64_t heap;
    unsigned fds;
};

int fx_setup(void **state)
{
    struct fx_held *h = (struct fx_held *)test_calloc(1, sizeof *h);
    h->f.dir = tmpdir_make();
    h->f.path = tv_path_join(h->f.dir, "store");
    h->heap = test_heap_bytes();
    h->fds = test_open_fds();
    assert_ok(tv_store_create(h->f.path, 0, &h->f.err), &h->f.err);
    fx_open(&h->f, NULL);
    *state = &h->f;
    return 0;
}

int fx_teardown(void **state)
{
    struct fx_held *h = (struct fx_held *)*state;
    fx_close(&h->f);
    assert_int_equal(test_heap_bytes(), h->heap);
    assert_int_equal(test_open_fds(), h->fds);
    tv_free(h->f.path);
    tmpdir_remove(h->f.dir);
    test_free(h);
    return 0;
}

void fx_open(struct fx *f, const struct tv_store_options *opt)
{
    assert_null(f->s);
    assert_ok(tv_store_open(f->path, opt, &f->err, &f->s), &f->err);
}

void fx_close(struct fx *f)
{
    tv_store_close(f->s);
    f->s = NULL;
}

void fx_bytes(uint64_t seed, void *dst, size_t n)
{
    struct rng r = {.state = seed * 0x9e3779b97f4a7c15u + 1};
    rng_bytes(&r, dst, n);
}

struct tv_tensor_desc fx_desc(const char *name, enum tv_dtype dtype,
                              uint64_t rows, uint64_t cols, uint64_t *shape)
{
    shape[0] = rows;
    shape[1] = cols;
    return (struct tv_tensor_desc){.name = name,
                                   .dtype = dtype,
                                   .rank = cols != 0   ? 2u
                                           : rows != 0 ? 1u
                                                       : 0u,
                                   .shape = shape};
}

uint64_t fx_desc_bytes(const struct tv_tensor_desc *d)
{
    uint64_t n = 0, bytes = 0;
    if (tv_shape_elems(d->shape, d->rank, &n, NULL) != TV_OK ||
        tv_dtype_bytes(d->dtype, n, &bytes, NULL) != TV_OK)
        return 0;
    return bytes;
}

struct tv_view fx_view(const struct tv_tensor_desc *d, const void *bytes,
                       const unsigned char *one[1])
{
    struct tv_view v;
    memset(&v, 0, sizeof v);
    one[0] = (const unsigned char *)bytes;
    v.dtype = d->dtype;
    v.rank = d->rank;
    for (unsigned i = 0; i < d->rank; i++)
        v.shape[i] = d->shape[i];
    (void)!tv_shape_elems(d->shape, d->rank, &v.n_elems, NULL);
    v.bytes = fx_desc_bytes(d);
    v.chunk_bytes = v.bytes > 0 ? v.bytes : 1;
    v.n_chunks = v.bytes > 0;
    v.chunks = one;
    return v;
}

enum tv_err fx_copy_in(tv_batch **b, uint64_t object,
                       const struct tv_tensor_desc *d, uint64_t seed,
                       struct tv_error *err)
{
    const unsigned char *one[1];
    const size_t n = (size_t)fx_desc_bytes(d);
    void *bytes = tv_alloc(n);
    if (bytes == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory in a test");
    fx_bytes(seed, bytes, n);
    const struct tv_view v = fx_view(d, bytes, one);
    const enum tv_err rc = tv_tensor_copy_in(b, object, d, &v, NULL, err);
    tv_free(bytes);
    return rc;
}

enum tv_err fx_compare(tv_read *r, uint64_t object, const char *name,
                       uint64_t seed, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_tensor t;
    struct tv_view v;
    bool found = false;
    unsigned char *want = NULL, *got = NULL;
    TV_TRY(tv_tensor_get(r, object, name, &found, &t, err));
    if (!found)
        return tv_error_set(err, TV_E_NOTFOUND, "tensor %s is missing", name);
    TV_TRY(tv_tensor_view(r, &t, err, &v));
    want = (unsigned char *)tv_alloc((size_t)v.bytes);
    got = (unsigned char *)tv_alloc((size_t)v.bytes);
    if (want == NULL || got == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "no memory in a test");
        goto out;
    }
    fx_bytes(seed, want, (size_t)v.bytes);
    tv_view_copy(&v, 0, v.bytes, got);
    if (memcmp(want, got, (size_t)v.bytes) != 0)
        rc =
            tv_error_set(err, TV_E_INTERNAL, "tensor %s has other bytes", name);
    for (uint64_t i = 0; v.leaves != NULL && i < tv_leaf_count(v.bytes); i++)
        if (!tv_hash_equal(v.leaves[i], tv_view_leaf(&v, i)))
            rc = tv_error_set(err, TV_E_CORRUPT, "tensor %s: leaf mismatch",
                              name);
out:
    tv_free(want);
    tv_free(got);
    return rc;
}

enum tv_err fx_object(tv_store *s, const char *name, uint64_t seed,
                      uint64_t rows, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    uint64_t id = 0, shape[2];
    bool resumed = false;
    const struct tv_hash print = {seed, rows};
    TV_TRY(tv_batch_begin(s, true, err, &b));
    TV_TRY(tv_object_create_over(b, name, TV_KIND_MODEL, "TestForCausalLM",
                                 "/somewhere", print, &id, &resumed, err));
    TV_TRY(tv_object_file_put(b, id, "config.json", &seed, sizeof seed, err));
    struct tv_tensor_desc d = fx_desc("w", TV_BF16, rows, 64, shape);
    TV_TRY(fx_copy_in(&b, id, &d, seed, err));
    d = fx_desc("v", TV_F32, rows, 0, shape);
    TV_TRY(fx_copy_in(&b, id, &d, seed + 1, err));
    rc = tv_batch_commit(b, err);
    b = NULL;
    TV_TRY(rc);
    TV_TRY(tv_store_sync(s, err));
    TV_TRY(tv_batch_begin(s, false, err, &b));
    TV_TRY(tv_object_complete(b, id, true, err));
    rc = tv_batch_commit(b, err);
    b = NULL;
out:
    tv_batch_abort(b);
    return rc;
}

enum tv_err fx_object_compare(tv_store *s, const char *name, uint64_t seed,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_read *r = NULL;
    struct tv_object *o = NULL;
    const void *data = NULL;
    size_t n = 0;
    TV_TRY(tv_read_begin(s, err, &r));
    TV_TRY(tv_object_find(r, name, false, err, &o));
    if (o->n_tensors != 2 || o->n_files != 1) {
        rc = tv_error_set(err, TV_E_INTERNAL, "object %s is not whole", name);
        goto out;
    }
    TV_TRY(tv_blob_get(r, o->files[0].digest, &data, &n, err));
    if (n != sizeof seed || memcmp(data, &seed, n) != 0) {
        rc = tv_error_set(err, TV_E_INTERNAL, "object %s: other file", name);
        goto out;
    }
    TV_TRY(fx_compare(r, o->id, "w", seed, err));
    TV_TRY(fx_compare(r, o->id, "v", seed + 1, err));
out:
    tv_object_free(o);
    tv_read_end(r);
    return rc;
}

enum tv_err fx_remove(tv_store *s, const char *name, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    bool more = true;
    while (more) {
        TV_TRY(tv_batch_begin(s, false, err, &b));
        TV_TRY(tv_object_remove(b, name, &more, err));
        rc = tv_batch_commit(b, err);
        b = NULL;
        TV_TRY(rc);
    }
out:
    tv_batch_abort(b);
    return rc;
}

static void show_problem(void *arg, const char *object, const char *tensor,
                         const char *what)
{
    (void)arg;
    print_error("verify: %s/%s: %s\n", object, tensor, what);
}

void fx_verify(struct fx *f)
{
    assert_ok(tv_store_verify(f->s, 0, show_problem, NULL, NULL, &f->err),
              &f->err);
}
