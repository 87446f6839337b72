/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_shards.c - layout of output files: names, offsets, headers that our own
 * reader accepts, and the index of conventions.md section 5 byte for byte.
 */
#include <jansson.h>
#include <string.h>

#include "faults.h"
#include "format_files.h"
#include "test.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/format.h"
#include "tv/parse.h"

static const uint64_t shape_a[] = {2, 3};
static const uint64_t shape_b[] = {4};

static void fill(struct tv_st_entry *e, const char *name, uint64_t bytes)
{
    memset(e, 0, sizeof *e);
    e->name = name;
    e->dtype = TV_U8;
    e->rank = 1;
    e->shape = &e->bytes;
    e->bytes = bytes;
}

/* Shard i followed by zeros is a file that the reader accepts, with the tensors
 * where the plan says. */
static void check_shard(const struct tv_shards *s, size_t shard,
                        const struct tv_st_entry *e, size_t n)
{
    struct tv_parsed_file *p = NULL;
    struct tv_error err;
    char *whole = tv_calloc((size_t)s->file_bytes[shard], 1);
    size_t found = 0;

    assert_non_null(whole);
    memcpy(whole, s->headers[shard], s->header_bytes[shard]);
    assert_int_equal(s->header_bytes[shard] % 8, 0);
    assert_int_equal(tv_get_le64(whole), s->header_bytes[shard] - 8);
    assert_ok(tv_safetensors_parse(whole, s->file_bytes[shard], "f", &err, &p),
              &err);
    for (size_t i = 0; i < n; i++) {
        if (e[i].shard != shard)
            continue;
        for (size_t k = 0; k < p->n; k++) {
            if (strcmp(p->items[k].name, e[i].name) == 0) {
                assert_int_equal(p->items[k].offset, e[i].offset);
                assert_int_equal(p->items[k].bytes, e[i].bytes);
                found++;
            }
        }
    }
    assert_int_equal(found, p->n);
    tv_parsed_free(p);
    tv_free(whole);
}

static void test_one_shard(void **state)
{
    struct tv_st_entry e[2];
    struct tv_shards *s = NULL;
    struct tv_error err;
    static const char header[] =
        "{\"__metadata__\":{\"format\":\"pt\"},"
        "\"b\":{\"dtype\":\"BF16\",\"shape\":[2,3],\"data_offsets\":[0,12]},"
        "\"a\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[12,28]}}";

    (void)state;
    memset(e, 0, sizeof e);
    e[0] = (struct tv_st_entry){"b", TV_BF16, 2, shape_a, 12, 9, 9};
    e[1] = (struct tv_st_entry){"a", TV_F32, 1, shape_b, 16, 9, 9};
    assert_ok(tv_shards_plan(e, 2, "model", 0, &err, &s), &err);
    assert_int_equal(s->n, 1);
    assert_string_equal(s->file_names[0], "model.safetensors");
    assert_null(s->index_json);
    assert_int_equal(s->total_bytes, 28);
    assert_int_equal(e[0].shard, 0);
    assert_memory_equal(s->headers[0] + 8, header, sizeof header - 1);
    for (size_t i = 8 + sizeof header - 1; i < s->header_bytes[0]; i++)
        assert_int_equal(s->headers[0][i], ' ');
    assert_int_equal(e[0].offset, s->header_bytes[0]);
    assert_int_equal(e[1].offset, s->header_bytes[0] + 12);
    assert_int_equal(s->file_bytes[0], s->header_bytes[0] + 28);
    check_shard(s, 0, e, 2);
    tv_shards_free(s);
}

static void test_limits(void **state)
{
    struct tv_st_entry e[6];
    struct tv_shards *s = NULL;
    struct tv_error err;
    static const size_t want[] = {0, 0, 1, 2, 3, 3};

    (void)state;
    fill(&e[0], "a", 60);
    fill(&e[1], "b", 40); /* exactly full */
    fill(&e[2], "c", 1);
    fill(&e[3], "d", 500); /* alone */
    fill(&e[4], "e", 1);
    fill(&e[5], "f", 0);
    assert_ok(tv_shards_plan(e, 6, "model", 100, &err, &s), &err);
    assert_int_equal(s->n, 4);
    assert_string_equal(s->file_names[0], "model-00001-of-00004.safetensors");
    assert_string_equal(s->file_names[3], "model-00004-of-00004.safetensors");
    for (size_t i = 0; i < 6; i++)
        assert_int_equal(e[i].shard, want[i]);
    for (size_t i = 0; i < 4; i++)
        check_shard(s, i, e, 6);
    tv_shards_free(s);
}

static void test_index(void **state)
{
    struct tv_st_entry e[2];
    struct tv_shards *s = NULL;
    struct tv_index *x = NULL;
    struct tv_error err;
    static const char want[] =
        "{\n  \"metadata\": {\n    \"total_parameters\": 10,\n"
        "    \"total_size\": 28,\n    \"tvmerge_version\": \"";
    static const char tail[] =
        "\"\n  },\n  \"weight_map\": {\n"
        "    \"a\": \"model-00002-of-00002.safetensors\",\n"
        "    \"b\": \"model-00001-of-00002.safetensors\"\n  }\n}\n";

    (void)state;
    memset(e, 0, sizeof e);
    e[0] = (struct tv_st_entry){"b", TV_BF16, 2, shape_a, 12, 0, 0};
    e[1] = (struct tv_st_entry){"a", TV_F32, 1, shape_b, 16, 0, 0};
    assert_ok(tv_shards_plan(e, 2, "model", 12, &err, &s), &err);
    assert_int_equal(s->n, 2);
    assert_memory_equal(s->index_json, want, sizeof want - 1);
    assert_string_equal(s->index_json + s->index_bytes - (sizeof tail - 1),
                        tail);
    assert_ok(tv_index_parse(s->index_json, s->index_bytes, "i", ".safetensors",
                             &err, &x),
              &err);
    assert_int_equal(x->n, 2);
    assert_int_equal(x->n_files, 2);
    assert_string_equal(x->items[0].name, "a");
    assert_string_equal(x->files[x->items[0].file], s->file_names[1]);
    tv_index_free(x);
    tv_shards_free(s);
}

static void test_names(void **state)
{
    struct tv_st_entry e[3];
    struct tv_shards *s = NULL;
    struct tv_error err;

    (void)state;
    /* Quotes, controls and other alphabets come back as they were. */
    fill(&e[0], "quote\" back\\slash\n", 3);
    fill(&e[1], "gr\xc3\xb6\xc3\x9f\x65 \xf0\x9f\xa6\x99", 5);
    fill(&e[2], "__metadata", 0);
    assert_ok(tv_shards_plan(e, 3, "adapter_model", 0, &err, &s), &err);
    assert_string_equal(s->file_names[0], "adapter_model.safetensors");
    check_shard(s, 0, e, 3);
    tv_shards_free(s);

    assert_ok(tv_shards_plan(e, 0, "model", 0, &err, &s), &err);
    assert_int_equal(s->n, 1);
    check_shard(s, 0, e, 0);
    tv_shards_free(s);

    fill(&e[1], e[0].name, 5);
    assert_code(tv_shards_plan(e, 2, "model", 0, &err, &s), TV_E_INPUT, &err);
    assert_null(s);
    assert_code(tv_shards_plan(e, 2, "model", 4, &err, &s), TV_E_INPUT, &err);
    assert_message(&err, "twice");
}

/* Names so long that one header cannot hold them: a new shard begins. */
static void test_header_limit(void **state)
{
    const size_t n = 2000;
    struct tv_st_entry *e = tv_calloc(n, sizeof *e);
    char **names = tv_calloc(n, sizeof *names);
    struct tv_shards *s = NULL;
    struct tv_error err;

    (void)state;
    assert_non_null(e);
    assert_non_null(names);
    for (size_t i = 0; i < n; i++) {
        names[i] = tv_alloc(4000);
        assert_non_null(names[i]);
        memset(names[i], 'x', 3999);
        names[i][3999] = '\0';
        ff_print(names[i], 9, "%08zu", i);
        names[i][8] = 'x';
        fill(&e[i], names[i], 1);
    }
    assert_ok(tv_shards_plan(e, n, "model", 0, &err, &s), &err);
    assert_true(s->n >= 2);
    for (size_t i = 0; i < s->n; i++) {
        assert_true(s->header_bytes[i] - 8 <= TV_ST_HEADER_MAX);
        check_shard(s, i, e, n);
    }
    tv_shards_free(s);
    for (size_t i = 0; i < n; i++)
        tv_free(names[i]);
    tv_free(names);
    tv_free(e);
}

static enum tv_err plan_once(void *arg, struct tv_error *err)
{
    struct tv_st_entry e[3];
    struct tv_shards *s = NULL;
    enum tv_err rc = TV_OK;

    (void)arg;
    fill(&e[0], "a", 60);
    fill(&e[1], "b", 40);
    fill(&e[2], "c", 1);
    rc = tv_shards_plan(e, 3, "model", 50, err, &s);
    tv_shards_free(s);
    return rc;
}

static void test_no_memory(void **state)
{
    (void)state;
    assert_true(faults_loop_alloc(plan_once, NULL, false) > 30);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_one_shard),    cmocka_unit_test(test_limits),
        cmocka_unit_test(test_index),        cmocka_unit_test(test_names),
        cmocka_unit_test(test_header_limit), cmocka_unit_test(test_no_memory),
    };
    json_set_alloc_funcs(tv_alloc, tv_free);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
