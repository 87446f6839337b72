/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_safetensors.c - what a header means, its limits, and 10,000 mutations of
 * a valid one. (One defect per file: test_badfiles.c.)
 */
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "faults.h"
#include "rng.h"
#include "test.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/format.h"
#include "tv/parse.h"
#include "tv/sys.h"
#include "tv/text.h"

static char *read_good(const char *name, size_t *n)
{
    char *path = test_data(name);
    char *data = NULL;
    struct tv_error err;

    assert_ok(tv_file_read(path, 1 << 20, &err, &data, n), &err);
    tv_free(path);
    return data;
}

static const struct tv_parsed_tensor *find(const struct tv_parsed_file *p,
                                           const char *name)
{
    for (size_t i = 0; i < p->n; i++) {
        if (strcmp(p->items[i].name, name) == 0)
            return &p->items[i];
    }
    return NULL;
}

static void test_all_dtypes(void **state)
{
    size_t n = 0;
    char *data = read_good("good/safetensors/all_dtypes.safetensors", &n);
    struct tv_parsed_file *p = NULL;
    struct tv_error err;
    uint64_t at = 0;

    (void)state;
    assert_ok(tv_safetensors_parse(data, n, "f", &err, &p), &err);
    assert_int_equal(p->n, TV_DTYPE_COUNT - 1);
    assert_int_equal(p->header_bytes, 8 + tv_get_le64(data));
    assert_true(tv_hash_equal(p->header_digest,
                              tv_hash128(data, (size_t)p->header_bytes)));
    at = p->header_bytes;
    for (size_t i = 0; i < p->n; i++) {
        const struct tv_parsed_tensor *t = &p->items[i];

        assert_memory_equal(t->name, "t.", 2);
        assert_int_equal(t->dtype, tv_dtype_from_name(t->name + 2));
        assert_int_equal(t->rank, 2);
        assert_int_equal(t->shape[0], 2);
        assert_int_equal(t->shape[1], 4);
        assert_int_equal(t->stride[0], 4);
        assert_int_equal(t->stride[1], 1);
        assert_true(t->contiguous);
        assert_int_equal(t->n_elems, 8);
        assert_int_equal(t->bytes, tv_dtype_bits(t->dtype));
        assert_int_equal(t->offset, at);
        at += t->bytes;
    }
    assert_int_equal(at, n);
    tv_parsed_free(p);
    tv_free(data);
}

static void test_shapes(void **state)
{
    size_t n = 0;
    char *data = read_good("good/safetensors/zero_size.safetensors", &n);
    struct tv_parsed_file *p = NULL;
    struct tv_error err;
    const struct tv_parsed_tensor *t = NULL;

    (void)state;
    assert_ok(tv_safetensors_parse(data, n, "f", &err, &p), &err);
    t = find(p, "z");
    assert_non_null(t);
    assert_int_equal(t->n_elems, 0);
    assert_int_equal(t->bytes, 0);
    assert_int_equal(t->rank, 2);
    tv_parsed_free(p);
    tv_free(data);
    data = read_good("good/safetensors/scalar.safetensors", &n);
    assert_ok(tv_safetensors_parse(data, n, "f", &err, &p), &err);
    t = find(p, "s");
    assert_non_null(t);
    assert_int_equal(t->rank, 0);
    assert_int_equal(t->n_elems, 1);
    assert_int_equal(t->bytes, 4);
    tv_parsed_free(p);
    tv_free(data);
    data = read_good("good/safetensors/unsorted.safetensors", &n);
    assert_ok(tv_safetensors_parse(data, n, "f", &err, &p), &err);
    assert_string_equal(p->items[0].name, "a"); /* file order */
    assert_int_equal(p->items[1].offset, p->header_bytes + 8);
    tv_parsed_free(p);
    tv_free(data);
}

/* A header with n_tensors empty tensors. */
static char *many(size_t n_tensors, size_t *n)
{
    struct tv_buf b;
    char length[8] = {0};

    tv_buf_init(&b, 64u << 20);
    tv_buf_add(&b, length, 8);
    tv_buf_str(&b, "{");
    for (size_t i = 0; i < n_tensors; i++)
        tv_buf_fmt(&b,
                   "%s\"t%zu\":{\"dtype\":\"U8\",\"shape\":[0],"
                   "\"data_offsets\":[0,0]}",
                   i == 0 ? "" : ",", i);
    tv_buf_str(&b, "}");
    assert_ok(tv_buf_ok(&b, NULL), NULL);
    tv_put_le64(b.data, b.n_bytes - 8);
    *n = b.n_bytes;
    return b.data;
}

static void test_counts(void **state)
{
    size_t n = 0;
    char *data = many(3000, &n);
    struct tv_parsed_file *p = NULL;
    struct tv_error err;

    (void)state;
    assert_ok(tv_safetensors_parse(data, n, "f", &err, &p), &err);
    assert_int_equal(p->n, 3000);
    tv_parsed_free(p);
    tv_free(data);

    /* One too many is seen before anything is built. */
    data = many(TV_ST_TENSORS_MAX + 2, &n);
    tv_alloc_peak_reset();
    {
        const uint64_t before = tv_alloc_peak();

        assert_code(tv_safetensors_parse(data, n, "f", &err, &p), TV_E_CORRUPT,
                    &err);
        assert_message(&err, "more than 262145 members");
        assert_null(p);
        assert_true(tv_alloc_peak() - before < (1u << 20));
    }
    tv_free(data);
}

/* {"a":{"x":[[],[],...]}}: 3 bytes of text ask for 130 bytes of tree. */
static void test_flood(void **state)
{
    struct tv_buf b;
    char length[8] = {0};
    struct tv_parsed_file *p = NULL;
    struct tv_error err;
    uint64_t before = 0;

    (void)state;
    tv_buf_init(&b, TV_ST_HEADER_MAX);
    tv_buf_add(&b, length, 8);
    tv_buf_str(&b, "{\"a\":{\"x\":[");
    while (b.n_bytes < TV_ST_HEADER_MAX - 16)
        tv_buf_str(&b, "[],");
    tv_buf_str(&b, "[]]}}");
    assert_ok(tv_buf_ok(&b, NULL), NULL);
    tv_put_le64(b.data, b.n_bytes - 8);
    tv_alloc_peak_reset();
    before = tv_alloc_peak();
    assert_code(tv_safetensors_parse(b.data, b.n_bytes, "f", &err, &p),
                TV_E_CORRUPT, &err);
    assert_message(&err, "too many for 1 members");
    assert_true(tv_alloc_peak() - before < (1u << 20));
    tv_buf_free(&b);
}

/* What people take for one. */
static void test_other_kinds(void **state)
{
    static const struct {
        const char *bytes, *message;
    } cases[] = {
        {"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"},
        {"PK\3\4zip, torch.save", "a zip archive, as torch.save writes"},
        {"merge_method: ties\nmodels:\n", "no safetensors file"},
    };
    struct tv_parsed_file *p = NULL;
    struct tv_error err;

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_code(tv_safetensors_parse(cases[i].bytes, strlen(cases[i].bytes),
                                         "f", &err, &p),
                    TV_E_CORRUPT, &err);
        assert_message(&err, cases[i].message);
    }
}

static void test_limit(void **state)
{
    const size_t n = ((size_t)TV_ST_HEADER_MAX) + 64;
    char *data = tv_calloc(n, 1);
    struct tv_parsed_file *p = NULL;
    struct tv_error err;

    (void)state;
    assert_non_null(data);
    memset(data, ' ', n);
    data[8] = '{';
    data[n - 1] = '}';
    tv_put_le64(data, TV_ST_HEADER_MAX + 1);
    assert_code(tv_safetensors_parse(data, n, "f", &err, &p), TV_E_CORRUPT,
                &err);
    assert_message(&err, "above the limit of 33554432");
    /* The largest header that is allowed, all spaces. */
    data[TV_ST_HEADER_MAX + 7] = '}';
    tv_put_le64(data, TV_ST_HEADER_MAX);
    assert_ok(tv_safetensors_parse(data, TV_ST_HEADER_MAX + 8, "f", &err, &p),
              &err);
    assert_int_equal(p->n, 0);
    tv_parsed_free(p);
    tv_free(data);
}

/* Whatever is accepted obeys the format. */
static void check_invariants(const struct tv_parsed_file *p, uint64_t n)
{
    uint64_t at = p->header_bytes;

    for (size_t i = 0; i < p->n; i++) {
        const struct tv_parsed_tensor *t = &p->items[i];
        uint64_t elems = 0;
        uint64_t bytes = 0;

        assert_int_equal(t->offset, at);
        assert_true(t->name[0] != '\0');
        assert_ok(tv_shape_elems(t->shape, t->rank, &elems, NULL), NULL);
        assert_ok(tv_dtype_bytes(t->dtype, elems, &bytes, NULL), NULL);
        assert_int_equal(bytes, t->bytes);
        at += t->bytes;
    }
    assert_int_equal(at, n);
}

static void mutate(struct rng *r, char *data, size_t *n, size_t cap)
{
    static const char *const bits[] = {"\"a\"",
                                       "[",
                                       "]",
                                       "{",
                                       "}",
                                       ",",
                                       ":",
                                       "0",
                                       "-1",
                                       "1e9",
                                       "18446744073709551615",
                                       "\"dtype\"",
                                       "\"F32\"",
                                       "\\ud800",
                                       "\xff",
                                       "null",
                                       "99999999",
                                       "\"__metadata__\"",
                                       "\\u0000",
                                       " "};
    const size_t edits = 1 + (size_t)rng_below(r, 4);

    for (size_t k = 0; k < edits; k++) {
        const size_t at = (size_t)rng_below(r, *n);
        const char *bit = bits[rng_below(r, sizeof bits / sizeof *bits)];
        const size_t len = strlen(bit);
        const size_t cut = 1 + (size_t)rng_below(r, 8);

        switch (rng_below(r, 5)) {
        case 0:
            data[at] = (char)rng_u32(r);
            break;
        case 1: /* insert */
            if (*n + len <= cap) {
                memmove(data + at + len, data + at, *n - at);
                memcpy(data + at, bit, len);
                *n += len;
            }
            break;
        case 2: /* overwrite */
            memcpy(data + at, bit, len < *n - at ? len : *n - at);
            break;
        case 3: /* delete */
            if (cut < *n - at) {
                memmove(data + at, data + at + cut, *n - at - cut);
                *n -= cut;
            }
            break;
        default:
            data[at] ^= (char)(1u << rng_below(r, 8));
            break;
        }
    }
    /* Most of the time the length still fits, so that the JSON is reached. */
    if (rng_below(r, 8) != 0 && *n > 600)
        tv_put_le64(data, tv_get_le64(data) % (*n - 7));
}

static void test_mutations(void **state)
{
    size_t n_good = 0;
    char *good = read_good("good/safetensors/all_dtypes.safetensors", &n_good);
    const size_t cap = n_good + 256;
    char *work = tv_alloc(cap);
    const uint64_t heap = test_heap_bytes();
    struct rng r;
    size_t accepted = 0;

    (void)state;
    assert_non_null(work);
    rng_open(&r, 1);
    for (int i = 0; i < 10000; i++) {
        size_t n = n_good;
        struct tv_parsed_file *p = NULL;
        struct tv_error err;
        enum tv_err rc = TV_OK;
        char *exact = NULL;

        memcpy(work, good, n_good);
        mutate(&r, work, &n, cap);
        exact = malloc(n);
        assert_non_null(exact);
        memcpy(exact, work, n);
        tv_error_clear(&err);
        rc = tv_safetensors_parse(exact, n, "f", &err, &p);
        if (rc == TV_OK) {
            check_invariants(p, n);
            accepted++;
        } else {
            assert_int_equal(rc, TV_E_CORRUPT);
            assert_true(err.msg[0] != '\0');
            assert_null(p);
        }
        tv_parsed_free(p);
        free(exact);
    }
    assert_int_equal(test_heap_bytes(), heap);
    assert_true(accepted > 10 && accepted < 9900);
    tv_free(work);
    tv_free(good);
}

struct work {
    const char *data;
    size_t n;
};

static enum tv_err parse_once(void *arg, struct tv_error *err)
{
    const struct work *w = arg;
    struct tv_parsed_file *p = NULL;
    const enum tv_err rc = tv_safetensors_parse(w->data, w->n, "f", err, &p);

    tv_parsed_free(p);
    return rc;
}

static void test_no_memory(void **state)
{
    size_t n = 0;
    char *data = read_good("good/safetensors/all_dtypes.safetensors", &n);
    struct work w = {data, n};

    (void)state;
    assert_true(faults_loop_alloc(parse_once, &w, false) > 50);
    tv_free(data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_all_dtypes), cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_counts),     cmocka_unit_test(test_flood),
        cmocka_unit_test(test_limit),      cmocka_unit_test(test_other_kinds),
        cmocka_unit_test(test_mutations),  cmocka_unit_test(test_no_memory),
    };
    json_set_alloc_funcs(tv_alloc, tv_free);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
