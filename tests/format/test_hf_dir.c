/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_hf_dir.c - what is picked in a directory, which side files travel, and
 * how an index must agree with its shards.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "format_files.h"
#include "test.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/sys.h"

#define S1 "model-00001-of-00002.safetensors"
#define S2 "model-00002-of-00002.safetensors"

static const struct ff_tensor one[] = {{"a", TV_F32, 1, {3}, 1},
                                       {"b", TV_F32, 1, {2}, 2}};
static const struct ff_tensor two[] = {{"c", TV_BF16, 1, {4}, 3}};
static const struct ff_tensor other[] = {{"x", TV_F32, 1, {1}, 9}};

static void expect_error(const char *path, enum tv_err code, const char *part)
{
    tv_input *in = NULL;
    struct tv_error err;

    tv_error_clear(&err);
    assert_code(tv_input_open_path(path, &err, &in), code, &err);
    assert_message(&err, part);
    assert_null(in);
}

static tv_input *open_ok(const char *path)
{
    tv_input *in = NULL;
    struct tv_error err;

    assert_ok(tv_input_open_path(path, &err, &in), &err);
    return in;
}

static void write_index(const char *dir, const char *name, const char *map)
{
    char text[2048];

    ff_print(text, sizeof text, "{\"weight_map\": {%s}}", map);
    ff_write_text(dir, name, text);
}

static void test_order(void **state)
{
    char *dir = tmpdir_make();
    tv_input *in = NULL;

    (void)state;
    expect_error(dir, TV_E_INPUT, "no model here");
    ff_copy("good/torch/plain.bin", dir, "pytorch_model.bin");
    in = open_ok(dir);
    assert_non_null(tv_input_find(in, "w"));
    tv_input_close(in);
    ff_write(dir, "model.safetensors", other, 1);
    in = open_ok(dir);
    assert_non_null(tv_input_find(in, "x"));
    assert_int_equal(tv_input_count(in), 1);
    tv_input_close(in);
    ff_write(dir, S1, one, 2);
    ff_write(dir, S2, two, 1);
    write_index(dir, "model.safetensors.index.json",
                "\"a\": \"" S1 "\", \"b\": \"" S1 "\", \"c\": \"" S2 "\"");
    in = open_ok(dir);
    assert_int_equal(tv_input_count(in), 3);
    assert_int_equal(tv_input_file_count(in), 2);
    assert_int_equal(tv_input_find(in, "c")->file, 1);
    assert_int_equal(tv_input_kind(in), TV_KIND_MODEL);
    ff_assert_tensors(in, (const struct ff_tensor[]){one[0], one[1], two[0]},
                      3);
    tv_input_close(in);
    /* Nothing else is ever picked. */
    {
        char *path = tv_path_join(dir, "model.safetensors.index.json");

        assert_int_equal(unlink(path), 0);
        tv_free(path);
        path = tv_path_join(dir, "model.safetensors");
        assert_int_equal(unlink(path), 0);
        tv_free(path);
    }
    in = open_ok(dir);
    assert_non_null(tv_input_find(in, "w"));
    tv_input_close(in);
    tmpdir_remove(dir);
}

static void test_index(void **state)
{
    char *dir = tmpdir_make();
    const char *index = "model.safetensors.index.json";

    (void)state;
    ff_write(dir, S1, one, 2);
    write_index(dir, index,
                "\"a\": \"" S1 "\", \"b\": \"" S1 "\", \"c\": \"" S2 "\"");
    expect_error(dir, TV_E_INPUT,
                 "the shard " S2 " that the index names is missing");
    ff_write(dir, S2, two, 1);
    write_index(dir, index, "\"a\": \"" S1 "\", \"c\": \"" S2 "\"");
    expect_error(dir, TV_E_CORRUPT,
                 "tensor 'b' of " S1 " is not listed in the index");
    write_index(dir, index,
                "\"a\": \"" S2 "\", \"b\": \"" S1 "\", \"c\": \"" S2 "\"");
    expect_error(dir, TV_E_CORRUPT,
                 "the index puts tensor 'a' into " S2 ", which does not");
    write_index(dir, index,
                "\"a\": \"" S1 "\", \"b\": \"" S1 "\", \"c\": \"" S2
                "\", \"d\": \"" S2 "\"");
    expect_error(dir, TV_E_CORRUPT, "the index puts tensor 'd' into " S2);
    ff_write(dir, S2, (const struct ff_tensor[]){two[0], one[0]}, 2);
    write_index(dir, index,
                "\"a\": \"" S1 "\", \"b\": \"" S1 "\", \"c\": \"" S2 "\"");
    expect_error(dir, TV_E_CORRUPT, "tensor 'a' is in ");
    write_index(dir, index, "\"a\": \"../" S1 "\"");
    expect_error(dir, TV_E_CORRUPT, "no plain");
    ff_write_text(dir, S2, "garbage");
    write_index(dir, index,
                "\"a\": \"" S1 "\", \"b\": \"" S1 "\", \"c\": \"" S2 "\"");
    expect_error(dir, TV_E_CORRUPT, S2);
    tmpdir_remove(dir);
}

static void test_bin_index(void **state)
{
    char *dir = tmpdir_make();
    tv_input *in = NULL;

    (void)state;
    ff_copy("good/torch/plain.bin", dir, "pytorch_model-00001-of-00002.bin");
    ff_copy("good/torch/tied.bin", dir, "pytorch_model-00002-of-00002.bin");
    write_index(dir, "pytorch_model.bin.index.json",
                "\"w\": \"pytorch_model-00001-of-00002.bin\","
                "\"a\": \"pytorch_model-00002-of-00002.bin\","
                "\"b\": \"pytorch_model-00002-of-00002.bin\","
                "\"c\": \"pytorch_model-00002-of-00002.bin\"");
    in = open_ok(dir);
    assert_int_equal(tv_input_count(in), 4);
    tv_input_close(in);
    write_index(dir, "pytorch_model.bin.index.json",
                "\"w\": \"model-00001-of-00002.safetensors\"");
    expect_error(dir, TV_E_CORRUPT, "no plain *.bin file name");
    tmpdir_remove(dir);
}

static void test_single_files(void **state)
{
    char *dir = tmpdir_make();
    char *path = NULL;
    tv_input *in = NULL;

    (void)state;
    ff_write(dir, "whatever.safetensors", one, 2);
    ff_write_text(dir, "config.json", "{}");
    path = tv_path_join(dir, "whatever.safetensors");
    in = open_ok(path);
    assert_int_equal(tv_input_count(in), 2);
    assert_int_equal(tv_input_side_count(in), 0);
    assert_string_equal(tv_input_dir(in), dir);
    tv_input_close(in);
    tv_free(path);
    ff_copy("good/torch/plain.bin", dir, "whatever.bin");
    path = tv_path_join(dir, "whatever.bin");
    in = open_ok(path);
    assert_int_equal(tv_input_count(in), 1);
    tv_input_close(in);
    tv_free(path);
    path = tv_path_join(dir, "config.json");
    expect_error(path, TV_E_CORRUPT, "config.json");
    tv_free(path);
    path = tv_path_join(dir, "absent");
    expect_error(path, TV_E_INPUT, "no such file");
    tv_free(path);
    path = tv_path_join(dir, "fifo.safetensors");
    assert_int_equal(mkfifo(path, 0600), 0);
    expect_error(path, TV_E_INPUT, "fifo.safetensors");
    tv_free(path);
    tmpdir_remove(dir);
}

static void test_adapter(void **state)
{
    char *dir = tmpdir_make();
    tv_input *in = NULL;

    (void)state;
    ff_write_text(dir, "adapter_config.json", "{}");
    expect_error(dir, TV_E_INPUT, "no adapter weights here");
    ff_copy("good/torch/plain.bin", dir, "adapter_model.bin");
    in = open_ok(dir);
    assert_int_equal(tv_input_kind(in), TV_KIND_ADAPTER);
    assert_non_null(tv_input_find(in, "w"));
    tv_input_close(in);
    ff_adapter(dir);
    /* A model beside it does not count. */
    ff_write(dir, "model.safetensors", one, 2);
    in = open_ok(dir);
    assert_int_equal(tv_input_kind(in), TV_KIND_ADAPTER);
    assert_int_equal(tv_input_count(in), 2);
    assert_int_equal(tv_input_side_count(in), 2);
    assert_string_equal(tv_input_side_name(in, 0), "adapter_config.json");
    assert_string_equal(tv_input_side_name(in, 1), "README.md");
    tv_input_close(in);
    tmpdir_remove(dir);
}

static void test_sides(void **state)
{
    static const char *const names[] = {"config.json",
                                        "generation_config.json",
                                        "tokenizer.json",
                                        "tokenizer.model",
                                        "tokenizer_config.json",
                                        "special_tokens_map.json",
                                        "added_tokens.json",
                                        "vocab.json",
                                        "merges.txt",
                                        "chat_template.jinja",
                                        "chat_template.json",
                                        "preprocessor_config.json",
                                        "processor_config.json",
                                        "video_preprocessor_config.json"};
    const size_t n = sizeof names / sizeof *names;
    char *dir = tmpdir_make();
    tv_input *in = NULL;
    struct tv_error err;
    char *data = NULL;
    size_t n_data = 0;
    bool found = true;

    (void)state;
    ff_write(dir, "model.safetensors", one, 2);
    for (size_t i = 0; i < n; i++)
        ff_write_text(dir, names[i], names[i]);
    ff_write_text(dir, "README.md", "not copied");
    ff_write_text(dir, "training_args.bin", "not copied");
    in = open_ok(dir);
    assert_int_equal(tv_input_side_count(in), n);
    for (size_t i = 0; i < n; i++) {
        assert_string_equal(tv_input_side_name(in, i), names[i]);
        assert_ok(
            tv_input_side_read(in, names[i], &found, &data, &n_data, &err),
            &err);
        assert_true(found);
        assert_int_equal(n_data, strlen(names[i]));
        assert_string_equal(data, names[i]);
        tv_free(data);
    }
    assert_ok(tv_input_side_read(in, "README.md", &found, &data, &n_data, &err),
              &err);
    assert_false(found);
    assert_null(data);
    tv_input_close(in);
    tmpdir_remove(dir);
}

/* There, but no file that can be read: named, not passed over. */
static void test_unreadable(void **state)
{
    static const char *const names[] = {
        "config.json", "tokenizer.json", "adapter_config.json",
        "model.safetensors", "model.safetensors.index.json"};

    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char *dir = tmpdir_make();
        char *path = tv_path_join(dir, names[i]);
        char *target = tv_path_join(dir, "blob");

        ff_copy("good/torch/plain.bin", dir, "pytorch_model.bin");
        tv_input_close(open_ok(dir));
        assert_int_equal(symlink("blob", path), 0);
        expect_error(dir, TV_E_CORRUPT, "is a link to a file that is gone");
        expect_error(dir, TV_E_CORRUPT, names[i]);
        assert_int_equal(mkfifo(target, 0600), 0);
        expect_error(dir, TV_E_CORRUPT, "is not a regular file");
        assert_int_equal(unlink(target), 0);
        assert_int_equal(unlink(path), 0);
        assert_int_equal(mkdir(path, 0700), 0);
        expect_error(dir, TV_E_CORRUPT, "is not a regular file");
        tv_free(target);
        tv_free(path);
        tmpdir_remove(dir);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_order),      cmocka_unit_test(test_index),
        cmocka_unit_test(test_bin_index),  cmocka_unit_test(test_single_files),
        cmocka_unit_test(test_adapter),    cmocka_unit_test(test_sides),
        cmocka_unit_test(test_unreadable),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
