/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_badfiles.c - every file of tests/data/bad gives the error that its
 * EXPECT line promises, with the position or name in the message; every file of
 * tests/data/good is accepted. Each is parsed in a heap block of its exact
 * size, and cut short at every length: never a crash, never a leak.
 */
#include <stdlib.h>
#include <string.h>

#include "test.h"
#include "tv/alloc.h"
#include "tv/parse.h"
#include "tv/sys.h"

/* The two storages that raw pickles are read against. */
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

static enum tv_err parse(const char *path, const void *data, size_t n,
                         struct tv_error *err)
{
    enum tv_err rc = TV_E_INTERNAL;
    struct tv_parsed_file *file = NULL;
    struct tv_index *index = NULL;
    struct tv_lora_config *config = NULL;

    if (strncmp(path, "safetensors/", 12) == 0)
        rc = tv_safetensors_parse(data, n, path, err, &file);
    else if (strncmp(path, "torch/", 6) == 0)
        rc = tv_torch_parse(data, n, path, err, &file);
    else if (strncmp(path, "pickle/", 7) == 0)
        rc = tv_pickle_parse(data, n, path, find_storage, NULL, err, &file);
    else if (strncmp(path, "index/", 6) == 0)
        rc = tv_index_parse(data, n, path, ".safetensors", err, &index);
    else if (strncmp(path, "adapter/", 8) == 0)
        rc = tv_lora_config_parse(data, n, path, err, &config);
    tv_parsed_free(file);
    tv_index_free(index);
    tv_lora_config_free(config);
    return rc;
}

/* The same in a block that ends with the last byte. */
static enum tv_err parse_exact(const char *path, const char *data, size_t n,
                               struct tv_error *err)
{
    char *copy = malloc(n == 0 ? 1 : n);
    enum tv_err rc = TV_OK;

    assert_non_null(copy);
    if (n > 0)
        memcpy(copy, data, n);
    rc = parse(path, copy, n, err);
    free(copy);
    return rc;
}

static void check_file(const char *dir, const char *path, const char *code,
                       const char *part)
{
    char *full = tv_path_join(dir, path);
    char *data = NULL;
    size_t n = 0;
    struct tv_error err;
    enum tv_err rc = TV_OK;

    assert_non_null(full);
    assert_ok(tv_file_read(full, 1 << 20, &err, &data, &n), &err);
    tv_error_clear(&err);
    rc = parse_exact(path, data, n, &err);
    if (strcmp(tv_err_name(rc), code) != 0) {
        print_error("%s: got '%s' (%s), want '%s'\n", path, tv_err_name(rc),
                    err.msg, code);
        fail();
    }
    if (rc != TV_OK) {
        assert_int_equal(err.code, rc);
        if (strstr(err.msg, path) == NULL || strstr(err.msg, part) == NULL) {
            print_error("%s: message '%s' lacks '%s'\n", path, err.msg, part);
            fail();
        }
    }
    for (size_t cut = 0; cut < n; cut += n / 300 + 1) {
        tv_error_clear(&err);
        rc = parse_exact(path, data, cut, &err);
        assert_true(rc == TV_OK || err.msg[0] != '\0');
    }
    tv_free(data);
    tv_free(full);
}

/* Every file must have its line, else a defect would go untested. */
static size_t count_files(const char *dir)
{
    size_t total = 0;
    char **kinds = NULL;
    size_t n_kinds = 0;

    assert_ok(tv_dir_list(dir, NULL, &kinds, &n_kinds), NULL);
    for (size_t i = 0; i < n_kinds; i++) {
        char *sub = tv_path_join(dir, kinds[i]);
        char **names = NULL;
        size_t n = 0;

        assert_non_null(sub);
        if (tv_path_is_dir(sub)) {
            assert_ok(tv_dir_list(sub, NULL, &names, &n), NULL);
            total += n;
            tv_dir_list_free(names, n);
        }
        tv_free(sub);
    }
    tv_dir_list_free(kinds, n_kinds);
    return total;
}

static void check_tree(const char *tree)
{
    const uint64_t heap = test_heap_bytes();
    char *dir = test_data(tree);
    char *expect = tv_path_join(dir, "EXPECT");
    char *text = NULL;
    size_t n = 0;
    size_t lines = 0;
    struct tv_error err;
    char *save = NULL;

    assert_ok(tv_file_read(expect, 1 << 20, &err, &text, &n), &err);
    for (char *line = strtok_r(text, "\n", &save); line != NULL;
         line = strtok_r(NULL, "\n", &save)) {
        char *code = strchr(line, '\t');
        char *part = code == NULL ? NULL : strchr(code + 1, '\t');

        assert_non_null(part);
        *code++ = '\0';
        *part++ = '\0';
        check_file(dir, line, code, part);
        lines++;
    }
    assert_true(lines > 10);
    assert_int_equal(lines, count_files(dir));
    tv_free(text);
    tv_free(expect);
    tv_free(dir);
    assert_int_equal(test_heap_bytes(), heap);
}

static void test_bad(void **state)
{
    (void)state;
    check_tree("bad");
}

static void test_good(void **state)
{
    (void)state;
    check_tree("good");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad),
        cmocka_unit_test(test_good),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
