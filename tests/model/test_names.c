/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_names.c - every family's table against the tensor names that
 * transformers writes (tests/data/architectures, made by
 * tools/families/make_names.py, which also says what is expected of them):
 * role, place, module, layer, the dimension that counts tokens, ties. Nothing
 * is left to inference.
 */
#include <dirent.h>
#include <stdlib.h>
#include <string.h>

#include <jansson.h>

#include "test.h"

#include "tv/alloc.h"
#include "tv/model.h"

static const char *part_name(enum tv_part p)
{
    return p == TV_PART_PRE ? "pre" : p == TV_PART_LAYER ? "layer" : "post";
}

static const char *text_at(const json_t *list, size_t i)
{
    const char *const s = json_string_value(json_array_get(list, i));
    return s ? s : "";
}

/* What is wrong with t, as one line; the number of faults. */
static size_t compare(const char *file, const struct tv_arch *a,
                      const struct tv_arch_tensor *t, const json_t *want)
{
    const char *const role = tv_role_name(t->role);
    const char *const part = part_name(t->part);
    const char *const module = a->modules[t->module].name;
    const long long layer = json_integer_value(json_array_get(want, 4));
    const long long vocab = json_integer_value(json_array_get(want, 5));
    const char *const tied = t->tied_to ? t->tied_to : "";

    if (!strcmp(role, text_at(want, 1)) && !strcmp(part, text_at(want, 2)) &&
        !strcmp(module, text_at(want, 3)) && t->layer == layer &&
        t->vocab_dim == vocab && !strcmp(tied, text_at(want, 6)))
        return 0;
    print_message("%s: %s: %s %s '%s' %lld %d '%s', expected %s %s '%s' %lld "
                  "%lld '%s'\n",
                  file, t->name, role, part, module, (long long)t->layer,
                  t->vocab_dim, tied, text_at(want, 1), text_at(want, 2),
                  text_at(want, 3), layer, vocab, text_at(want, 6));
    return 1;
}

static size_t check_file(const char *file, const char *path)
{
    struct tv_error err = {0};
    struct tv_arch *a = NULL;
    json_error_t e;
    json_t *const doc = json_load_file(path, 0, &e);
    json_t *const tensors = json_object_get(doc, "tensors");
    const size_t n = json_object_size(tensors);
    struct tv_arch_name *const names = tv_calloc(n + 1, sizeof(*names));
    uint64_t *const shapes = tv_calloc(n + 1, 4 * sizeof(*shapes));
    char *const config = json_dumps(json_object_get(doc, "config"), 0);
    const char *name = NULL;
    json_t *want = NULL;
    size_t at = 0;
    size_t bad = 0;

    assert_non_null(doc);
    assert_true(n > 0);
    json_object_foreach(tensors, name, want)
    {
        const json_t *const shape = json_array_get(want, 0);
        names[at].name = name;
        names[at].rank = (unsigned)json_array_size(shape);
        names[at].shape = &shapes[4 * at];
        assert_true(names[at].rank <= 4);
        for (unsigned d = 0; d < names[at].rank; d++)
            shapes[4 * at + d] =
                (uint64_t)json_integer_value(json_array_get(shape, d));
        at++;
    }
    if (tv_arch_describe(config, strlen(config), names, n, &err, &a) != TV_OK)
        fail_msg("%s: %s", file, err.msg);
    bad += a->inferred;
    bad += strcmp(a->family,
                  json_string_value(json_object_get(doc, "family"))) != 0;
    bad += a->tied != json_is_true(json_object_get(doc, "tied"));
    bad += a->n_layers != json_integer_value(json_object_get(doc, "n_layers"));
    if (bad > 0)
        print_message("%s: family %s, %lld layers, tied %d\n", file, a->family,
                      (long long)a->n_layers, (int)a->tied);
    at = 0;
    json_object_foreach(tensors, name, want) bad +=
        compare(file, a, &a->tensors[at++], want);
    tv_arch_free(a);
    free(config);
    tv_free(shapes);
    tv_free(names);
    json_decref(doc);
    return bad;
}

static void test_names(void **state)
{
    (void)state;
    char *const dir = test_data("architectures");
    DIR *const d = opendir(dir);
    size_t n = 0;
    size_t bad = 0;

    assert_non_null(d);
    for (const struct dirent *e = readdir(d); e; e = readdir(d)) {
        char *path = NULL;
        if (e->d_name[0] == '.')
            continue;
        path = tv_asprintf("%s/%s", dir, e->d_name);
        bad += check_file(e->d_name, path);
        tv_free(path);
        n++;
    }
    (void)closedir(d);
    tv_free(dir);
    assert_true(n > 60);
    assert_int_equal(bad, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_names),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
