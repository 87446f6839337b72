/* SPDX-License-Identifier: Apache-2.0 */
/* test_links.c - linked tensors, and files that change under them. */
#include "store_fixture.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/sys.h"

#define FILE_BYTES   100000u
#define HEADER_BYTES 1000u

struct link { /* a store with an object "linked" of two tensors in one file */
    struct fx *f;
    char *file;
    uint64_t object, source;
};

static void write_file(const char *path, const void *data, size_t n)
{
    const int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    assert_true(fd >= 0);
    assert_int_equal(write(fd, data, n), n);
    assert_int_equal(close(fd), 0);
}

static struct tv_source_desc describe(struct fx *f, const char *path)
{
    tv_map *map = NULL;
    struct tv_source_desc d;
    assert_ok(tv_map_open(path, &f->err, &map), &f->err);
    tv_source_describe(map, path, HEADER_BYTES, &d);
    tv_map_close(map);
    return d;
}

static void link_object(struct link *l)
{
    struct fx *f = l->f;
    static unsigned char bytes[FILE_BYTES];
    uint64_t shape[2], again = 0;
    bool resumed = false;
    tv_batch *b = NULL;
    fx_bytes(11, bytes, sizeof bytes);
    l->file = tv_path_join(f->dir, "model.safetensors");
    write_file(l->file, bytes, sizeof bytes);
    const struct tv_source_desc src = describe(f, l->file);
    assert_int_equal(src.bytes, FILE_BYTES);
    assert_true(
        tv_hash_equal(src.header_digest, tv_hash128(bytes, HEADER_BYTES)));
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(tv_object_create(b, "linked", TV_KIND_MODEL, "", l->file,
                               (struct tv_hash){1, 1}, &l->object, &resumed,
                               &f->err),
              &f->err);
    assert_ok(tv_source_put(b, &src, &l->source, &f->err), &f->err);
    assert_ok(tv_source_put(b, &src, &again, &f->err), &f->err);
    assert_int_equal(again, l->source);
    const struct tv_tensor_desc w = fx_desc("w", TV_F32, 100, 50, shape);
    /* Odd offset: files align to 8 bytes at best. */
    assert_ok(
        tv_tensor_link(b, l->object, &w, l->source, HEADER_BYTES + 1, &f->err),
        &f->err);
    const struct tv_tensor_desc e = fx_desc("last", TV_U8, 16, 0, shape);
    assert_ok(
        tv_tensor_link(b, l->object, &e, l->source, FILE_BYTES - 16, &f->err),
        &f->err);
    assert_ok(tv_object_complete(b, l->object, false, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
}

static int setup(void **state)
{
    struct link *l = (struct link *)test_calloc(1, sizeof *l);
    fx_setup(state);
    l->f = (struct fx *)*state;
    link_object(l);
    *state = l;
    return 0;
}

static int teardown(void **state)
{
    struct link *l = (struct link *)*state;
    void *f = l->f;
    tv_free(l->file);
    test_free(l);
    return fx_teardown(&f);
}

static enum tv_err view_of(struct link *l, tv_read *r, const char *name,
                           struct tv_view *v)
{
    struct tv_tensor t;
    bool found = false;
    const enum tv_err rc =
        tv_tensor_get(r, l->object, name, &found, &t, &l->f->err);
    if (rc != TV_OK)
        return rc;
    assert_true(found);
    return tv_tensor_view(r, &t, &l->f->err, v);
}

static void reopen(struct link *l)
{
    fx_close(l->f);
    fx_open(l->f, NULL);
}

static tv_read *reader(struct link *l)
{
    tv_read *r = NULL;
    assert_ok(tv_read_begin(l->f->s, &l->f->err, &r), &l->f->err);
    return r;
}

static void bytes_come_from_the_file(void **state)
{
    struct link *l = (struct link *)*state;
    struct fx *f = l->f;
    static unsigned char bytes[FILE_BYTES], got[20000];
    struct tv_view v;
    const char *path = NULL, *file = NULL, *extent = NULL;
    fx_bytes(11, bytes, sizeof bytes);
    tv_read *r = reader(l);
    assert_ok(view_of(l, r, "w", &v), &f->err);
    assert_int_equal(v.bytes, 20000);
    assert_null(v.leaves);
    tv_view_copy(&v, 0, v.bytes, got);
    assert_memory_equal(got, bytes + HEADER_BYTES + 1, v.bytes);
    assert_true(tv_map_describe(v.chunks[0] + 77, &file, &extent));
    assert_string_equal(file, l->file);
    assert_string_equal(extent, "w");
    assert_ok(view_of(l, r, "last", &v), &f->err);
    assert_memory_equal(v.chunks[0], bytes + FILE_BYTES - 16, 16);
    assert_ok(tv_source_path(r, l->source, &f->err, &path), &f->err);
    assert_string_equal(path, l->file);
    struct tv_object *o = NULL;
    assert_ok(tv_object_find(r, "linked", false, &f->err, &o), &f->err);
    assert_true(o->linked);
    assert_int_equal(o->n_tensors, 2);
    assert_int_equal(o->bytes, 20016);
    tv_object_free(o);
    tv_read_end(r);
    fx_verify(f);
    struct tv_store_stat st;
    assert_ok(tv_store_stat(f->s, &st, &f->err), &f->err);
    assert_int_equal(st.weights, 0); /* linked bytes are not ours */
}

/* A copy of the same tensors has the same digest; a checksum filled in later
 * changes nothing. */
static void digest_equals_that_of_a_copy(void **state)
{
    struct link *l = (struct link *)*state;
    struct fx *f = l->f;
    static unsigned char bytes[FILE_BYTES];
    const unsigned char *one[1];
    uint64_t id = 0, shape[2];
    bool resumed = false;
    tv_batch *b = NULL;
    fx_bytes(11, bytes, sizeof bytes);
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(tv_object_create(b, "copy", TV_KIND_MODEL, "", "",
                               (struct tv_hash){2, 2}, &id, &resumed, &f->err),
              &f->err);
    const struct tv_tensor_desc w = fx_desc("w", TV_F32, 100, 50, shape);
    struct tv_view v = fx_view(&w, bytes + HEADER_BYTES + 1, one);
    assert_ok(tv_tensor_copy_in(&b, id, &w, &v, NULL, &f->err), &f->err);
    const struct tv_tensor_desc e = fx_desc("last", TV_U8, 16, 0, shape);
    v = fx_view(&e, bytes + FILE_BYTES - 16, one);
    assert_ok(tv_tensor_copy_in(&b, id, &e, &v, NULL, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    tv_read *r = reader(l);
    struct tv_hash x, y, z;
    struct tv_tensor t;
    bool found = false;
    assert_ok(tv_object_digest(r, id, &x, &f->err), &f->err);
    assert_ok(tv_object_digest(r, l->object, &y, &f->err), &f->err);
    assert_true(tv_hash_equal(x, y));
    assert_ok(tv_tensor_get(r, id, "w", &found, &t, &f->err), &f->err);
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(tv_tensor_checksum_put(b, l->object, "w", t.checksum, &f->err),
              &f->err);
    assert_code(tv_tensor_checksum_put(b, l->object, "w",
                                       (struct tv_hash){1, 1}, &f->err),
                TV_E_CORRUPT, &f->err);
    assert_code(
        tv_tensor_checksum_put(b, l->object, "none", t.checksum, &f->err),
        TV_E_NOTFOUND, &f->err);
    assert_code(tv_tensor_checksum_put(b, id, "w", t.checksum, &f->err),
                TV_E_NOTFOUND, &f->err); /* not a linked one */
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    assert_ok(tv_read_renew(r, &f->err), &f->err);
    assert_ok(tv_tensor_get(r, l->object, "w", &found, &t, &f->err), &f->err);
    assert_true(t.checksum_known);
    assert_ok(tv_object_digest(r, l->object, &z, &f->err), &f->err);
    assert_true(tv_hash_equal(x, z));
    tv_read_end(r);
    fx_verify(f);
}

static void expect_changed(struct link *l, const char *part)
{
    struct fx *f = l->f;
    struct tv_view v;
    /* By a handle that has the file open, and by a new one. */
    for (int k = 0; k < 2; k++) {
        tv_read *r = reader(l);
        assert_code(view_of(l, r, "w", &v), TV_E_CORRUPT, &f->err);
        assert_message(&f->err, l->file);
        assert_message(&f->err, part);
        assert_non_null(strstr(f->err.hint, "--force"));
        tv_read_end(r);
        assert_code(tv_store_verify(f->s, 0, NULL, NULL, NULL, &f->err),
                    TV_E_CORRUPT, &f->err);
        reopen(l);
    }
}

static void touch_view(struct link *l)
{
    struct tv_view v;
    tv_read *r = reader(l);
    assert_ok(view_of(l, r, "w", &v), &l->f->err);
    tv_read_end(r);
}

static void changed_file(void **state)
{
    struct link *l = (struct link *)*state;
    struct timespec t[2] = {{0, UTIME_OMIT}, {1234567890, 5}};
    touch_view(l);
    assert_int_equal(utimensat(AT_FDCWD, l->file, t, 0), 0);
    expect_changed(l, "changed or replaced");
}

static void truncated_file(void **state)
{
    struct link *l = (struct link *)*state;
    touch_view(l);
    assert_int_equal(truncate(l->file, FILE_BYTES / 2), 0);
    expect_changed(l, "50000 bytes");
}

static void grown_file(void **state)
{
    struct link *l = (struct link *)*state;
    touch_view(l);
    assert_int_equal(truncate(l->file, FILE_BYTES + 1), 0);
    expect_changed(l, "100001 bytes");
}

static void gone_file(void **state)
{
    struct link *l = (struct link *)*state;
    touch_view(l);
    assert_int_equal(unlink(l->file), 0);
    struct fx *f = l->f;
    struct tv_view v;
    tv_read *r = reader(l);
    assert_code(view_of(l, r, "w", &v), TV_E_CORRUPT, &f->err);
    assert_message(&f->err, "is gone");
    assert_message(&f->err, l->file);
    tv_read_end(r);
    reopen(l);
    r = reader(l);
    assert_code(view_of(l, r, "w", &v), TV_E_CORRUPT, &f->err);
    assert_message(&f->err, l->file);
    tv_read_end(r);
}

/* Another file under the name, of the same size and time. */
static void replaced_file(void **state)
{
    struct link *l = (struct link *)*state;
    static unsigned char bytes[FILE_BYTES];
    struct stat st;
    touch_view(l);
    assert_int_equal(stat(l->file, &st), 0);
    char *other = tv_path_join(l->f->dir, "other");
    write_file(other, bytes, sizeof bytes);
    assert_int_equal(rename(other, l->file), 0);
    const struct timespec t[2] = {st.st_atim, st.st_mtim};
    assert_int_equal(utimensat(AT_FDCWD, l->file, t, 0), 0);
    tv_free(other);
    expect_changed(l, "changed or replaced");
}

/* Even with size, time and inode restored, the header betrays it. */
static void other_header(void **state)
{
    struct link *l = (struct link *)*state;
    struct fx *f = l->f;
    struct stat st;
    struct tv_view v;
    assert_int_equal(stat(l->file, &st), 0);
    const int fd = open(l->file, O_WRONLY);
    assert_int_equal(pwrite(fd, "!", 1, 500), 1);
    assert_int_equal(close(fd), 0);
    const struct timespec t[2] = {st.st_atim, st.st_mtim};
    assert_int_equal(utimensat(AT_FDCWD, l->file, t, 0), 0);
    reopen(l);
    tv_read *r = reader(l);
    assert_code(view_of(l, r, "w", &v), TV_E_CORRUPT, &f->err);
    assert_message(&f->err, "another header");
    tv_read_end(r);
}

/* A flipped byte behind unchanged metadata: found where a checksum is known. */
static void verify_reads_linked_bytes(void **state)
{
    struct link *l = (struct link *)*state;
    struct fx *f = l->f;
    struct stat st;
    struct tv_view v;
    tv_batch *b = NULL;
    tv_read *r = reader(l);
    assert_ok(view_of(l, r, "w", &v), &f->err);
    const struct tv_hash leaf = tv_view_leaf(&v, 0);
    tv_read_end(r);
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(tv_tensor_checksum_put(b, l->object, "w",
                                     tv_leaves_checksum(&leaf, 1), &f->err),
              &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    fx_verify(f);
    assert_int_equal(stat(l->file, &st), 0);
    const int fd = open(l->file, O_RDWR);
    char c = 0;
    assert_int_equal(pread(fd, &c, 1, 5000), 1);
    c = (char)(c ^ 4);
    assert_int_equal(pwrite(fd, &c, 1, 5000), 1);
    assert_int_equal(close(fd), 0);
    const struct timespec t[2] = {st.st_atim, st.st_mtim};
    assert_int_equal(utimensat(AT_FDCWD, l->file, t, 0), 0);
    assert_code(tv_store_verify(f->s, 0, NULL, NULL, NULL, &f->err),
                TV_E_CORRUPT, &f->err);
}

static void bad_links_are_refused(void **state)
{
    struct link *l = (struct link *)*state;
    struct fx *f = l->f;
    uint64_t id = 0, shape[2], src = 0;
    bool resumed = false;
    tv_batch *b = NULL;
    struct tv_source_desc s = describe(f, l->file);
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(tv_object_create(b, "x", TV_KIND_MODEL, "", "",
                               (struct tv_hash){2, 2}, &id, &resumed, &f->err),
              &f->err);
    const struct tv_tensor_desc d = fx_desc("w", TV_U8, 100, 0, shape);
    assert_code(tv_tensor_link(b, id, &d, 9999, 0, &f->err), TV_E_INTERNAL,
                &f->err);
    assert_code(tv_tensor_link(b, id, &d, l->source, FILE_BYTES - 99, &f->err),
                TV_E_CORRUPT, &f->err);
    assert_code(tv_tensor_link(b, id, &d, l->source, UINT64_MAX, &f->err),
                TV_E_CORRUPT, &f->err);
    s.path = "relative/path";
    assert_code(tv_source_put(b, &s, &src, &f->err), TV_E_INTERNAL, &f->err);
    tv_batch_abort(b);
}

/* Removing the object leaves the file; gc forgets it. */
static void removal_leaves_the_file(void **state)
{
    struct link *l = (struct link *)*state;
    struct fx *f = l->f;
    uint64_t freed = 0;
    const char *path = NULL;
    assert_ok(fx_remove(f->s, "linked", &f->err), &f->err);
    assert_true(tv_path_exists(l->file));
    assert_ok(tv_store_gc(f->s, &freed, &f->err), &f->err);
    reopen(l);
    tv_read *r = reader(l);
    assert_code(tv_source_path(r, l->source, &f->err, &path), TV_E_CORRUPT,
                &f->err);
    tv_read_end(r);
    fx_verify(f);
}

#define T(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(bytes_come_from_the_file),
        T(digest_equals_that_of_a_copy),
        T(changed_file),
        T(truncated_file),
        T(grown_file),
        T(gone_file),
        T(replaced_file),
        T(other_header),
        T(verify_reads_linked_bytes),
        T(bad_links_are_refused),
        T(removal_leaves_the_file),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
