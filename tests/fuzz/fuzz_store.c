/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_store.c - a store whose data.mdb holds any bytes opens or is refused
 * with a message; one that opens can be read, verified and written to.
 *
 * An input is not a file, which would be mostly payload, but what is done to
 * one: the first byte says whether the store is opened for writing, and then
 * every five bytes are a place (24 bits, little-endian, modulo the size), what
 * to do there (0: end the file, 1: exchange a byte, 2: copy a page from the
 * page that the value names) and the value. The store has a linked and a stored
 * model, a mask, a run whose state lies in pieces, and free pages.
 */
#include "fuzz.h"

#include <stdbool.h>
#include <string.h>

#include "tinymodel.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/derived.h"
#include "tv/format.h"
#include "tv/store.h"
#include "tv/sys.h"
#include "tv/text.h"

#define PAGE_BYTES 4096u
#define EDIT_BYTES 5u
#define EDITS_MAX  64u

static struct {
    char *dir, *path, *data_path, *lock_path;
    unsigned char *bytes; /* of data.mdb as it was made */
    unsigned char *edited;
    size_t n;
} base;

static void must(enum tv_err rc, const struct tv_error *err)
{
    if (rc != TV_OK)
        (void)fprintf(stderr, "%s\n", err->msg);
    FUZZ_CHECK(rc == TV_OK);
}

static void add_models(tv_store *s)
{
    struct tiny_model m;
    struct tv_error err;

    tiny_model_init(&m);
    for (unsigned i = 0; i < 3; i++) {
        static const char *const names[] = {"linked", "stored", "gone"};
        m.seed = i;
        char *model = tiny_model_write(base.dir, names[i], &m);
        tv_input *in = NULL;
        struct tv_transfer t = {.link = i == 0};
        must(tv_input_open_path(model, &err, &in), &err);
        must(tv_import(s, names[i], in, &t, &err), &err);
        tv_input_close(in);
        tv_free(model);
    }
}

/* A mask, a run with a finished tensor and a pin, and pages that are free. */
static void add_rest(tv_store *s)
{
    static char state[400000];
    static const uint64_t words[2] = {0x0123456789abcdefu, 0x55u};
    struct tv_derived_new mask = {
        .key = {.kind = TV_MASK, .score = {1, 2}, .tensor = "w"},
        .about = "{}",
        .n_elems = 100,
        .words = words};
    const struct tv_done done = {.name = "w", .shard = 1, .bytes = 8};
    struct tv_object *o = NULL;
    struct tv_error err;
    tv_batch *b = NULL;
    tv_read *r = NULL;
    bool more = true;

    must(tv_read_begin(s, &err, &r), &err);
    must(tv_object_find(r, "stored", false, &err, &o), &err);
    tv_read_end(r);
    must(tv_batch_begin(s, false, &err, &b), &err);
    must(tv_run_put(b, "run", state, sizeof state, &err), &err);
    must(tv_done_put(b, "run", &done, &err), &err);
    must(tv_pin_put(b, "run", o->id, &err), &err);
    must(tv_batch_commit(b, &err), &err);
    tv_object_free(o);
    /* Its pages are free then, and the file may grow no more. */
    must(tv_store_quota_set(s, 256u << 10, &err), &err);
    must(tv_batch_begin(s, false, &err, &b), &err);
    must(tv_run_put(b, "run", state, 20000, &err), &err);
    must(tv_batch_commit(b, &err), &err);
    must(tv_store_quota_set(s, 0, &err), &err);
    must(tv_derived_store(s, &mask, 1, 1u << 20, 0, &err), &err);
    while (more) {
        must(tv_batch_begin(s, false, &err, &b), &err);
        must(tv_object_remove(b, "gone", &more, &err), &err);
        must(tv_batch_commit(b, &err), &err);
    }
}

static void make_base(void)
{
    struct tv_error err;
    tv_store *s = NULL;

    base.dir = tmpdir_make();
    FUZZ_CHECK(base.dir != NULL);
    base.path = tv_path_join(base.dir, "store");
    base.data_path = tv_path_join(base.path, "data.mdb");
    base.lock_path = tv_path_join(base.path, "lock.mdb");
    FUZZ_CHECK(base.path && base.data_path && base.lock_path);
    must(tv_store_create(base.path, 0, &err), &err);
    must(tv_store_open(base.path, NULL, &err, &s), &err);
    add_models(s);
    add_rest(s);
    tv_store_close(s);

    FILE *f = fopen(base.data_path, "rb");
    FUZZ_CHECK(f != NULL && fseek(f, 0, SEEK_END) == 0);
    base.n = (size_t)ftell(f);
    base.bytes = tv_alloc(base.n);
    base.edited = tv_alloc(base.n);
    FUZZ_CHECK(base.bytes && base.edited && fseek(f, 0, SEEK_SET) == 0);
    FUZZ_CHECK(fread(base.bytes, 1, base.n, f) == base.n);
    (void)fclose(f);
}

/* Returns the length of the edited file. */
static size_t edit(const uint8_t *data, size_t size)
{
    size_t n = base.n;

    memcpy(base.edited, base.bytes, base.n);
    for (size_t i = 0; i < EDITS_MAX && size >= EDIT_BYTES; i++) {
        const size_t at =
            (data[0] | (size_t)data[1] << 8 | (size_t)data[2] << 16) % base.n;
        const size_t page = at - at % PAGE_BYTES;
        switch (data[3] % 3) {
        case 0:
            n = at;
            break;
        case 1:
            base.edited[at] = data[4];
            break;
        default:
            memcpy(base.edited + page,
                   base.bytes + data[4] % (base.n / PAGE_BYTES) * PAGE_BYTES,
                   PAGE_BYTES);
            break;
        }
        data += EDIT_BYTES;
        size -= EDIT_BYTES;
    }
    return n;
}

static void check(enum tv_err rc, const struct tv_error *err)
{
    FUZZ_CHECK(rc == TV_OK || err->msg[0] != '\0');
}

static void read_all(tv_store *s)
{
    struct tv_object **objects = NULL;
    struct tv_done_list *done = NULL;
    struct tv_error err;
    char **runs = NULL, *doc = NULL;
    tv_read *r = NULL;
    size_t n = 0;
    bool found = false;

    tv_error_clear(&err);
    check(tv_store_verify(s, 0, NULL, NULL, NULL, &err), &err);
    if (tv_read_begin(s, &err, &r) != TV_OK)
        return;
    if (tv_object_list(r, true, &err, &objects, &n) == TV_OK) {
        for (size_t i = 0; i < n; i++) {
            struct tv_tensor_list *list = NULL;
            struct tv_hash digest;
            check(tv_object_digest(r, objects[i]->id, &digest, &err), &err);
            if (tv_tensor_list(r, objects[i]->id, &err, &list) == TV_OK)
                tv_tensor_list_free(list);
            tv_object_free(objects[i]);
        }
        tv_free(objects);
    }
    if (tv_run_list(r, &err, &runs, &n) == TV_OK)
        tv_dir_list_free(runs, n);
    check(tv_run_get(r, "run", &found, &doc, &n, &err), &err);
    tv_free(doc);
    if (tv_done_list(r, "run", &err, &done) == TV_OK)
        tv_done_list_free(done);
    tv_read_end(r);
}

static void write_all(tv_store *s)
{
    struct tv_error err;
    tv_batch *b = NULL;
    uint64_t n = 0;
    bool more = true;

    tv_error_clear(&err);
    if (tv_batch_begin(s, true, &err, &b) == TV_OK) {
        const enum tv_err rc = tv_run_drop(b, "run", &err);
        check(rc, &err);
        if (rc == TV_OK)
            check(tv_batch_commit(b, &err), &err);
        else
            tv_batch_abort(b);
    }
    for (int i = 0; i < 8 && more; i++) {
        more = false;
        if (tv_batch_begin(s, true, &err, &b) != TV_OK)
            break;
        if (tv_object_remove(b, "stored", &more, &err) == TV_OK)
            check(tv_batch_commit(b, &err), &err);
        else
            tv_batch_abort(b);
    }
    check(tv_derived_evict_all(s, &n, &err), &err);
    check(tv_store_gc(s, &n, &err), &err);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct tv_store_options o = {.map_bytes = (uint64_t)64 << 20};
    struct tv_error err;
    tv_store *s = NULL;

    if (base.n == 0)
        make_base();
    if (size == 0)
        return 0;
    o.read_only = data[0] % 2 == 0;
    const size_t n = edit(data + 1, size - 1);
    FILE *f = fopen(base.data_path, "wb");
    FUZZ_CHECK(f != NULL && fwrite(base.edited, 1, n, f) == n);
    FUZZ_CHECK(fclose(f) == 0);
    (void)remove(base.lock_path);
    tv_error_clear(&err);
    if (tv_store_open(base.path, &o, &err, &s) != TV_OK) {
        FUZZ_CHECK(err.msg[0] != '\0' && s == NULL);
        return 0;
    }
    read_all(s);
    if (!o.read_only)
        write_all(s);
    tv_store_close(s);
    return 0;
}
