/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_pickle.c - what good pickles mean; memory and time of hostile ones; ten
 * thousand mutations. (One attack per file: test_badfiles.c.)
 */
#include <stdlib.h>
#include <string.h>

#include "faults.h"
#include "rng.h"
#include "test.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/parse.h"
#include "tv/sys.h"

/* Storage "0": 64 bytes at 1000; "1": 16 bytes at 2000. */
static bool find_storage(void *arg, const char *key, uint64_t *offset,
                         uint64_t *bytes)
{
    (void)arg;
    if (strcmp(key, "0") != 0 && strcmp(key, "1") != 0)
        return false;
    *offset = key[0] == '0' ? 1000 : 2000;
    *bytes = key[0] == '0' ? 64 : 16;
    return true;
}

static char *read_good(const char *name, size_t *n)
{
    char *path = test_data(name);
    char *data = NULL;
    struct tv_error err;

    assert_ok(tv_file_read(path, 1 << 20, &err, &data, n), &err);
    tv_free(path);
    return data;
}

static struct tv_parsed_file *parse_good(const char *name)
{
    size_t n = 0;
    char *data = read_good(name, &n);
    struct tv_parsed_file *p = NULL;
    struct tv_error err;

    assert_ok(tv_pickle_parse(data, n, name, find_storage, NULL, &err, &p),
              &err);
    tv_free(data);
    return p;
}

static void test_layouts(void **state)
{
    struct tv_parsed_file *p = parse_good("good/pickle/state_dict.pkl");

    (void)state;
    assert_int_equal(p->n, 1);
    assert_string_equal(p->items[0].name, "w");
    assert_int_equal(p->items[0].dtype, TV_F32);
    assert_int_equal(p->items[0].rank, 2);
    assert_int_equal(p->items[0].bytes, 64);
    assert_int_equal(p->items[0].offset, 1000);
    assert_int_equal(p->items[0].span, 64);
    assert_true(p->items[0].contiguous);
    tv_parsed_free(p);

    p = parse_good("good/pickle/transposed.pkl");
    assert_false(p->items[0].contiguous);
    assert_int_equal(p->items[0].stride[0], 1);
    assert_int_equal(p->items[0].stride[1], 4);
    tv_parsed_free(p);

    p = parse_good("good/pickle/slice.pkl"); /* [1:3, 1:4] of 4 x 4 */
    assert_false(p->items[0].contiguous);
    assert_int_equal(p->items[0].offset, 1000 + 5 * 4);
    assert_int_equal(p->items[0].span, 7 * 4);
    assert_int_equal(p->items[0].bytes, 6 * 4);
    tv_parsed_free(p);

    p = parse_good("good/pickle/scalar.pkl");
    assert_int_equal(p->items[0].rank, 0);
    assert_int_equal(p->items[0].n_elems, 1);
    assert_int_equal(p->items[0].bytes, 4);
    tv_parsed_free(p);

    p = parse_good("good/pickle/no_elements.pkl");
    assert_int_equal(p->items[0].n_elems, 0);
    assert_int_equal(p->items[0].span, 0);
    assert_true(p->items[0].contiguous);
    tv_parsed_free(p);
}

static void test_sharing(void **state)
{
    struct tv_parsed_file *p = parse_good("good/pickle/tied.pkl");

    (void)state;
    assert_int_equal(p->n, 2);
    assert_string_equal(p->items[0].name, "a");
    assert_string_equal(p->items[1].name, "b");
    assert_int_equal(p->items[0].offset, p->items[1].offset);
    tv_parsed_free(p);
    p = parse_good("good/pickle/long_memo.pkl");
    assert_int_equal(p->n, 2);
    tv_parsed_free(p);
    p = parse_good("good/pickle/two_storages.pkl");
    assert_int_equal(p->items[0].offset, 1000);
    assert_string_equal(p->items[1].name, "a");
    assert_int_equal(p->items[1].dtype, TV_BF16);
    assert_int_equal(p->items[1].offset, 2000);
    tv_parsed_free(p);
    p = parse_good("good/pickle/parameter.pkl");
    assert_int_equal(p->n, 1);
    tv_parsed_free(p);
}

static void test_types(void **state)
{
    static const struct {
        const char *name;
        enum tv_dtype dtype;
    } want[] = {
        {"FloatStorage", TV_F32},        {"DoubleStorage", TV_F64},
        {"HalfStorage", TV_F16},         {"BFloat16Storage", TV_BF16},
        {"ByteStorage", TV_U8},          {"CharStorage", TV_I8},
        {"ShortStorage", TV_I16},        {"IntStorage", TV_I32},
        {"LongStorage", TV_I64},         {"BoolStorage", TV_BOOL},
        {"ComplexFloatStorage", TV_C64},
    };
    struct tv_parsed_file *p = parse_good("good/pickle/all_types.pkl");
    size_t hits = 0;

    (void)state;
    assert_int_equal(p->n, sizeof want / sizeof *want);
    for (size_t i = 0; i < p->n; i++) {
        for (size_t k = 0; k < p->n; k++) {
            if (strcmp(p->items[i].name, want[k].name) == 0) {
                assert_int_equal(p->items[i].dtype, want[k].dtype);
                hits++;
            }
        }
    }
    assert_int_equal(hits, p->n);
    tv_parsed_free(p);
}

/* One instruction repeated: refused, within a small multiple of the text. */
static void flood(const char *head, const char *body, size_t n_body,
                  size_t repeat)
{
    const size_t n_head = strlen(head);
    const size_t n = 2 + n_head + n_body * repeat;
    char *code = malloc(n);
    struct tv_parsed_file *p = NULL;
    struct tv_error err;
    uint64_t before = 0;

    assert_non_null(code);
    memcpy(code, "\x80\x02", 2);
    memcpy(code + 2, head, n_head);
    for (size_t i = 0; i < repeat; i++)
        memcpy(code + 2 + n_head + i * n_body, body, n_body);
    tv_alloc_peak_reset();
    before = tv_alloc_peak();
    assert_code(tv_pickle_parse(code, n, "f", find_storage, NULL, &err, &p),
                TV_E_CORRUPT, &err);
    assert_true(tv_alloc_peak() - before <= 128 * n + (1u << 16));
    free(code);
}

static void test_floods(void **state)
{
    (void)state;
    flood("", ")", 1, 2000000);
    flood("", "}", 1, 2000000);
    flood("", "(", 1, 100000);
    flood("}", "q\x00", 2, 200000);
    flood("}q", "h\x00", 2, 1500000); /* refers to nothing: refused at once */
    flood("}q\x01", "N", 1, 1000000);
    flood("](", "N", 1, 2000000);
    flood("]", "Na", 2, 2200000);
    flood(")", "\x85", 1, 100000);
    {
        const size_t n = (size_t)TV_PICKLE_MAX + 1;
        char *zeros = calloc(n, 1);
        struct tv_parsed_file *p = NULL;
        struct tv_error err;

        assert_non_null(zeros);
        assert_code(
            tv_pickle_parse(zeros, n, "f", find_storage, NULL, &err, &p),
            TV_E_CORRUPT, &err);
        assert_message(&err, "the limit is");
        free(zeros);
    }
}

/* One long name and one tensor, put into the dict again and again. */
static void same_entry(size_t repeat, const char *part)
{
    static const char tensor[] =
        "ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\n"
        "FloatStorage\nX\1\0\0\0"
        "0X\3\0\0\0cpuK\1tQK\0K\1\x85K\1\x85\x89"
        "ccollections\nOrderedDict\n)RtRq\1s";
    const size_t n_name = TV_NAME_MAX;
    const size_t n =
        2 + 1 + 5 + n_name + 2 + sizeof tensor - 1 + 5 * repeat + 1;
    char *code = malloc(n);
    char *at = code;
    struct tv_parsed_file *p = NULL;
    struct tv_error err;
    uint64_t before = 0;

    assert_non_null(code);
    memcpy(at, "\x80\x02}X\0\x10\0\0", 8);
    memset(at + 8, 'n', n_name);
    at += 8 + n_name;
    memcpy(at, "q\0", 2);
    at += 2;
    memcpy(at, tensor, sizeof tensor - 1);
    at += sizeof tensor - 1;
    for (size_t i = 0; i < repeat; i++, at += 5)
        memcpy(at, "h\0h\1s", 5);
    *at++ = '.';
    assert_int_equal(at - code, n);
    tv_alloc_peak_reset();
    before = tv_alloc_peak();
    if (part == NULL) {
        assert_ok(tv_pickle_parse(code, n, "f", find_storage, NULL, &err, &p),
                  &err);
        assert_int_equal(p->n, 1);
        tv_parsed_free(p);
    } else {
        assert_code(tv_pickle_parse(code, n, "f", find_storage, NULL, &err, &p),
                    TV_E_CORRUPT, &err);
        assert_message(&err, part);
    }
    assert_true(tv_alloc_peak() - before <= 128 * n + (1u << 16));
    free(code);
}

static void test_same_entry(void **state)
{
    (void)state;
    same_entry(0, NULL);
    same_entry(1, "occurs twice");
    same_entry(200000, "occurs twice");
    same_entry(TV_ST_TENSORS_MAX, "the limit is");
}

/* A list that holds itself is strange, but nothing follows it. */
static void test_cycle(void **state)
{
    static const char code[] = "\x80\x02]q\x00h\x00"
                               "a.";
    struct tv_parsed_file *p = NULL;
    struct tv_error err;

    (void)state;
    assert_code(tv_pickle_parse(code, sizeof code - 1, "f", find_storage, NULL,
                                &err, &p),
                TV_E_CORRUPT, &err);
    assert_message(&err, "does not hold a dict");
}

static void check_invariants(const struct tv_parsed_file *p)
{
    for (size_t i = 0; i < p->n; i++) {
        const struct tv_parsed_tensor *t = &p->items[i];
        const bool first = t->offset >= 1000 && t->offset + t->span <= 1064;
        const bool second = t->offset >= 2000 && t->offset + t->span <= 2016;

        assert_true(first || second);
        assert_true(t->name[0] != '\0');
        assert_true(!t->contiguous || t->span == t->bytes);
        assert_true(t->bytes <= 64 * 2);
    }
}

static void test_mutations(void **state)
{
    static const char *const seeds[] = {
        "good/pickle/state_dict.pkl", "good/pickle/slice.pkl",
        "good/pickle/tied.pkl", "good/pickle/all_types.pkl"};
    static const unsigned char ops[] = "(.JKMNQRXabcehj]qrst)u}\x80\x85\x86"
                                       "\x87\x88\x89";
    struct rng r;
    size_t accepted = 0;
    const uint64_t heap = test_heap_bytes();

    (void)state;
    rng_open(&r, 2);
    for (int i = 0; i < 10000; i++) {
        size_t n = 0;
        char *data = read_good(seeds[i % 4], &n);
        char *exact = malloc(n);
        const size_t edits = 1 + (size_t)rng_below(&r, 3);
        struct tv_parsed_file *p = NULL;
        struct tv_error err;
        enum tv_err rc = TV_OK;

        assert_non_null(exact);
        for (size_t k = 0; k < edits; k++) {
            const size_t at = (size_t)rng_below(&r, n);

            switch (rng_below(&r, 4)) {
            case 0:
                data[at] = (char)rng_u32(&r);
                break;
            case 1:
                data[at] = (char)ops[rng_below(&r, sizeof ops - 1)];
                break;
            case 2:
                data[at] = (char)(data[at] + (rng_below(&r, 2) ? 1 : -1));
                break;
            default:
                if (n > 1) {
                    memmove(data + at, data + at + 1, n - at - 1);
                    n--;
                }
                break;
            }
        }
        memcpy(exact, data, n);
        tv_error_clear(&err);
        rc = tv_pickle_parse(exact, n, "f", find_storage, NULL, &err, &p);
        if (rc == TV_OK) {
            check_invariants(p);
            accepted++;
        } else {
            assert_int_equal(rc, TV_E_CORRUPT);
            assert_true(err.msg[0] != '\0');
        }
        tv_parsed_free(p);
        free(exact);
        tv_free(data);
    }
    assert_int_equal(test_heap_bytes(), heap);
    assert_true(accepted > 10 && accepted < 9900);
}

struct work {
    const char *data;
    size_t n;
};

static enum tv_err parse_once(void *arg, struct tv_error *err)
{
    const struct work *w = arg;
    struct tv_parsed_file *p = NULL;
    const enum tv_err rc =
        tv_pickle_parse(w->data, w->n, "f", find_storage, NULL, err, &p);

    tv_parsed_free(p);
    return rc;
}

static void test_no_memory(void **state)
{
    size_t n = 0;
    char *data = read_good("good/pickle/all_types.pkl", &n);
    struct work w = {data, n};

    (void)state;
    assert_true(faults_loop_alloc(parse_once, &w, false) > 10);
    tv_free(data);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_layouts),    cmocka_unit_test(test_sharing),
        cmocka_unit_test(test_types),      cmocka_unit_test(test_floods),
        cmocka_unit_test(test_same_entry), cmocka_unit_test(test_cycle),
        cmocka_unit_test(test_mutations),  cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
