/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_tree_check.c - a store with damaged pages of LMDB is refused when it is
 * opened, or it can be read and written to: no damage ends the process.
 */
#include "store_fixture.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "store_priv.h"
#include "tree_check.h"
#include "tv/alloc.h"
#include "tv/sys.h"

#define PAGE       4096u
#define META       16u
#define FREE_TREE  (META + 24)
#define TABLES     (META + 72)
#define LAST_PAGE  (META + 120)
#define TXN        (META + 128)
#define TREE_DEPTH 6u
#define TREE_ROOT  40u

struct image { /* data.mdb as it was, and where the newest header is */
    char *path, *lock;
    unsigned char *data;
    size_t n;
    unsigned char *meta;
};

static uint64_t get64(const unsigned char *p)
{
    uint64_t v = 0;
    memcpy(&v, p, sizeof v);
    return v;
}

/* Objects whose tables need branch pages, and free pages of a removed one. */
static void make_image(struct fx *f, struct image *im)
{
    tv_batch *b = NULL;
    uint64_t id = 0;
    bool resumed = false;
    assert_ok(fx_object(f->s, "m", 1, 300, &f->err), &f->err);
    assert_ok(fx_object(f->s, "gone", 2, 900, &f->err), &f->err);
    assert_ok(fx_remove(f->s, "gone", &f->err), &f->err);
    assert_ok(tv_batch_begin(f->s, false, &f->err, &b), &f->err);
    assert_ok(tv_object_create(b, "many", TV_KIND_MODEL, "", "",
                               (struct tv_hash){1, 1}, &id, &resumed, &f->err),
              &f->err);
    for (unsigned i = 0; i < 60; i++) {
        char name[32];
        uint64_t shape[2];
        (void)snprintf(name, sizeof name, "tensor.%u.of.many", i);
        const struct tv_tensor_desc d = fx_desc(name, TV_F32, 2, 2, shape);
        assert_ok(fx_copy_in(&b, id, &d, i, &f->err), &f->err);
    }
    assert_ok(tv_object_complete(b, id, false, &f->err), &f->err);
    assert_ok(tv_batch_commit(b, &f->err), &f->err);
    fx_close(f);

    im->path = tv_path_join(f->path, "data.mdb");
    im->lock = tv_path_join(f->path, "lock.mdb");
    FILE *file = fopen(im->path, "rb");
    assert_non_null(file);
    assert_int_equal(fseek(file, 0, SEEK_END), 0);
    im->n = (size_t)ftell(file);
    im->data = tv_alloc(im->n);
    assert_non_null(im->data);
    rewind(file);
    assert_int_equal(fread(im->data, 1, im->n, file), im->n);
    assert_int_equal(fclose(file), 0);
    im->meta = im->data;
    if (get64(im->data + PAGE + TXN) > get64(im->data + TXN))
        im->meta = im->data + PAGE;
}

static void write_image(const struct image *im)
{
    FILE *file = fopen(im->path, "wb");
    assert_non_null(file);
    assert_int_equal(fwrite(im->data, 1, im->n, file), im->n);
    assert_int_equal(fclose(file), 0);
    (void)unlink(im->lock);
}

static void free_image(struct image *im)
{
    tv_free(im->path);
    tv_free(im->lock);
    tv_free(im->data);
}

/* Opens the image; false: refused as damaged. Any other error is wrong. */
static bool opens(struct fx *f, const struct image *im, bool read_only,
                  tv_store **out)
{
    const struct tv_store_options o = {.read_only = read_only};
    write_image(im);
    const enum tv_err rc = tv_store_open(f->path, &o, &f->err, out);
    if (rc != TV_OK) {
        assert_code(rc, TV_E_CORRUPT, &f->err);
        return false;
    }
    return true;
}

/* As verify opens it. */
static bool opens_all(struct fx *f, const struct image *im)
{
    const struct tv_store_options o = {.read_only = true, .check_all = true};
    tv_store *s = NULL;
    write_image(im);
    const enum tv_err rc = tv_store_open(f->path, &o, &f->err, &s);
    tv_store_close(s);
    if (rc != TV_OK)
        assert_code(rc, TV_E_CORRUPT, &f->err);
    return rc == TV_OK;
}

static void refused(struct fx *f, const struct image *im, const char *why)
{
    for (int read_only = 0; read_only < 2; read_only++) {
        tv_store *s = NULL;
        assert_false(opens(f, im, read_only != 0, &s));
        assert_message(&f->err, why);
    }
}

/* ---- one kind of damage after the other ------------------------------------
 */

static unsigned char *root_page(const struct image *im, size_t tree)
{
    return im->data + get64(im->meta + tree + TREE_ROOT) * PAGE;
}

static void swap64(unsigned char *at, uint64_t v)
{
    memcpy(at, &v, sizeof v);
}

static void names_what_is_damaged(void **state)
{
    struct fx *f = (struct fx *)*state;
    struct image im;
    make_image(f, &im);
    unsigned char *root = root_page(&im, TABLES);
    unsigned char keep[PAGE];
    memcpy(keep, im.meta, PAGE);

    im.meta[TABLES + TREE_DEPTH] ^= 4;
    refused(f, &im, "is damaged");
    memcpy(im.meta, keep, PAGE);
    swap64(im.meta + TABLES + TREE_ROOT, (uint64_t)1 << 40);
    refused(f, &im, "does not exist");
    memcpy(im.meta, keep, PAGE);
    swap64(im.meta + LAST_PAGE, (uint64_t)1 << 50);
    refused(f, &im, "header");
    memcpy(im.meta, keep, PAGE);
    swap64(im.meta + TXN, get64(im.meta + TXN) + 64);
    refused(f, &im, "header");
    memcpy(im.meta, keep, PAGE);
    im.data[FREE_TREE] = 1; /* the size of a page */
    refused(f, &im, "header");
    im.data[FREE_TREE] = 0;

    memcpy(keep, root, PAGE);
    root[10] ^= 0x10; /* a page that LMDB would take for its own memory */
    refused(f, &im, "its head is damaged");
    memcpy(root, keep, PAGE);
    root[16] ^= 1;
    refused(f, &im, "an entry is damaged");
    memcpy(root, keep, PAGE);
    memcpy(root + 16, keep + 18, 2);
    memcpy(root + 18, keep + 16, 2);
    refused(f, &im, "not in order");
    memcpy(root, keep, PAGE);
    memcpy(root + 16, keep + 18, 2);
    refused(f, &im, "is damaged");
    memcpy(root, keep, PAGE);

    tv_store *s = NULL;
    assert_true(opens(f, &im, false, &s));
    f->s = s;
    assert_ok(fx_object_compare(f->s, "m", 1, &f->err), &f->err);
    fx_verify(f);
    free_image(&im);
}

/* A list of free pages that has a page of a tree would make LMDB overwrite it.
 */
static void free_page_in_use(void **state)
{
    struct fx *f = (struct fx *)*state;
    struct image im;
    tv_store *s = NULL;
    make_image(f, &im);
    unsigned char *page = root_page(&im, FREE_TREE);
    const uint64_t used = get64(im.meta + TABLES + TREE_ROOT);
    uint16_t at = 0;
    memcpy(&at, page + 16, sizeof at);
    unsigned char *list = page + at + 8 + 8;
    assert_true(get64(list) > 0);
    swap64(list + 8, used);
    assert_false(opens(f, &im, false, &s));
    assert_message(&f->err, "free");
    /* Nobody who only reads looks at it. */
    assert_true(opens(f, &im, true, &s));
    f->s = s;
    assert_ok(fx_object_compare(f->s, "m", 1, &f->err), &f->err);
    fx_close(f);
    assert_false(opens_all(f, &im));
    free_image(&im);
}

/* Nor at the heads of long values, which have checksums for readers. */
static void head_of_a_long_value(void **state)
{
    struct fx *f = (struct fx *)*state;
    struct image im;
    bool found = false;
    make_image(f, &im);
    assert_true(opens_all(f, &im));
    for (size_t page = 2; page < im.n / PAGE && !found; page++) {
        unsigned char *const head = im.data + page * PAGE;
        tv_store *s = NULL;
        if (get64(head) != page || head[10] != 4 || head[11] != 0)
            continue;
        head[10] ^= 1;
        found = !opens(f, &im, false, &s);
        tv_store_close(s);
        if (found) { /* else the page is free */
            assert_message(&f->err, "head");
            assert_false(opens_all(f, &im));
            assert_message(&f->err, "head");
            assert_true(opens(f, &im, true, &s));
            assert_ok(fx_object_compare(s, "m", 1, &f->err), &f->err);
            tv_store_close(s);
        }
        head[10] ^= 1;
    }
    assert_true(found);
    free_image(&im);
}

/* ---- bytes where LMDB looks -------------------------------------------
 */

/* What comes of each call is not the point: all of them return. */
static unsigned use(tv_store *s, bool write, struct tv_error *err)
{
    uint64_t freed = 0;
    unsigned n = 0;
    n += tv_store_verify(s, 0, NULL, NULL, NULL, err) != TV_OK;
    n += fx_object_compare(s, "m", 1, err) != TV_OK;
    if (!write)
        return n;
    n += fx_remove(s, "many", err) != TV_OK;
    n += tv_store_gc(s, &freed, err) != TV_OK;
    n += fx_object(s, "new", 9, 50, err) != TV_OK;
    return n;
}

static void any_byte_of_any_page(void **state)
{
    static const unsigned char masks[] = {0x01, 0x10, 0x80, 0xff};
    struct fx *f = (struct fx *)*state;
    struct image im;
    unsigned n_refused = 0, n_opened = 0, n_errors = 0;
    make_image(f, &im);
    for (size_t page = 0; page < im.n / PAGE; page++) {
        const size_t end = page < 2 ? META + 136 : 48;
        for (size_t i = page < 2 ? page : page % 16; i < end;
             i += page < 2 ? 3 : 16) {
            unsigned char *at = im.data + page * PAGE + i;
            const unsigned char was = *at;
            const bool write = (i / 16 + page) % 4 == 0;
            tv_store *s = NULL;
            *at ^= masks[(i + page) % sizeof masks];
            write_image(&im);
            /* As verify opens it; readers, who leave the heads of long values
             * out, are put to use on what it refuses too. */
            const struct tv_store_options all = {.read_only = true,
                                                 .check_all = true};
            if (!write) {
                n_refused += tv_store_open(f->path, &all, &f->err, &s) != TV_OK;
                tv_store_close(s);
                s = NULL;
            }
            const struct tv_store_options o = {.read_only = !write};
            if (tv_store_open(f->path, &o, &f->err, &s) == TV_OK) {
                n_errors += use(s, write, &f->err);
                n_opened++;
            } else {
                n_refused += write;
            }
            tv_store_close(s);
            *at = was;
        }
    }
    print_message("%u refused, %u opened, %u calls with an error\n", n_refused,
                  n_opened, n_errors);
    assert_true(n_refused > 100 && n_opened > 100);
    free_image(&im);
}

/* Where lock.mdb has the number of the last transaction. */
static off_t number_at(struct fx *f, int fd)
{
    MDB_envinfo info;
    off_t at = 0;
    assert_int_equal(tv_lmdb()->env_info(f->s->env, &info), 0);
    for (off_t off = 8; off < 128; off += 8) {
        uint64_t word = 0;
        assert_int_equal(pread(fd, &word, sizeof word, off), sizeof word);
        if (word == info.me_last_txnid) {
            assert_int_equal(at, 0);
            at = off;
        }
    }
    assert_int_not_equal(at, 0);
    return at;
}

static void set_number(int fd, off_t at, uint64_t txn)
{
    assert_int_equal(pwrite(fd, &txn, sizeof txn, at), sizeof txn);
}

/* A writer has written its header but not yet told readers of it: for as long
 * as the disk takes, or the writer is stopped. They begin with the one before,
 * not with an older one: its pages may be gone. */
static void header_ahead_of_readers(void **state)
{
    struct fx *f = (struct fx *)*state;
    uint64_t txn = 0;
    char *lock = tv_path_join(f->path, "lock.mdb");
    for (unsigned seed = 0; seed < 10; seed++)
        assert_ok(fx_object(f->s, "m", seed, 30, &f->err), &f->err);
    const int fd = open(lock, O_RDWR | O_CLOEXEC);
    assert_true(fd >= 0);
    const off_t at = number_at(f, fd);
    assert_int_equal(pread(fd, &txn, sizeof txn, at), sizeof txn);
    set_number(fd, at, txn - 1);
    const enum tv_err ahead = store_tree_check(f->s, &f->err);
    set_number(fd, at, txn - 2);
    const enum tv_err far = store_tree_check(f->s, NULL);
    set_number(fd, at, txn);
    assert_ok(ahead, &f->err);
    assert_int_equal(far, TV_E_CORRUPT);
    assert_ok(store_tree_check(f->s, &f->err), &f->err);
    assert_int_equal(close(fd), 0);
    tv_free(lock);
}

#define T(name) cmocka_unit_test_setup_teardown(name, fx_setup, fx_teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(names_what_is_damaged),   T(free_page_in_use),
        T(head_of_a_long_value),    T(any_byte_of_any_page),
        T(header_ahead_of_readers),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
