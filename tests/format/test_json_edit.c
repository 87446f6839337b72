/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_json_edit.c - edits of config.json: the rest stays, numbers keep their
 * shortest form, and no change means no byte changes.
 */
#include <jansson.h>
#include <string.h>

#include "faults.h"
#include "test.h"
#include "tv/alloc.h"
#include "tv/format.h"

static const char config[] = "{\"z\": 1, \"eps\": 1e-05, \"theta\": 10000.0,"
                             "\"third\": 0.1, \"long\": 0.30000000000000004,\n"
                             "\"text\": \"gr\\u00fc\\u00df\", \"a\": [1, 2]}";

static char *edit(const char *text, const struct tv_json_edit *e, size_t n)
{
    char *out = NULL;
    size_t n_out = 0;
    struct tv_error err;

    assert_ok(tv_json_edit(text, strlen(text), e, n, &err, &out, &n_out), &err);
    assert_int_equal(strlen(out), n_out);
    return out;
}

static void test_untouched(void **state)
{
    static const struct tv_json_edit same[] = {
        {"z", TV_EDIT_INT, 1, NULL, false},
        {"missing", TV_EDIT_REMOVE, 0, NULL, false},
        {"gone", TV_EDIT_STRING, 0, "x", true},
    };
    char *out = edit(config, same, 3);

    (void)state;
    assert_string_equal(out, config);
    tv_free(out);
    out = edit(config, NULL, 0);
    assert_string_equal(out, config);
    tv_free(out);
}

static void test_edits(void **state)
{
    static const struct tv_json_edit edits[] = {
        {"z", TV_EDIT_INT, 7, NULL, false},
        {"dtype", TV_EDIT_STRING, 0, "bfloat16", false},
        {"tied", TV_EDIT_BOOL, 1, NULL, false},
        {"text", TV_EDIT_REMOVE, 0, NULL, false},
    };
    static const char want[] =
        "{\n  \"z\": 7,\n  \"eps\": 1e-05,\n  \"theta\": 10000.0,\n"
        "  \"third\": 0.1,\n"
        "  \"long\": 0.30000000000000004,\n"
        "  \"a\": [\n    1,\n    2\n  ],\n"
        "  \"dtype\": \"bfloat16\",\n  \"tied\": true\n}\n";
    char *out = edit(config, edits, 4);

    (void)state;
    assert_string_equal(out, want);
    tv_free(out);

    out = edit("{\"eps\": 1e-05, \"third\": 0.1, \"t\": 500000.0}", edits, 1);
    assert_string_equal(out, "{\n  \"eps\": 1e-05,\n  \"third\": 0.1,\n"
                             "  \"t\": 500000.0,\n  \"z\": 7\n}\n");
    tv_free(out);
}

/* Numbers that jansson cannot hold, and what only looks like one. */
static void test_numbers(void **state)
{
    static const struct tv_json_edit edits[] = {
        {"z", TV_EDIT_INT, 7, NULL, false},
    };
    static const char text[] =
        "{\n  \"max\": 1000000000000000019884624838656,\n"
        "  \"many\": [\n    -0,\n    1E+2,\n    -1.50e-07,\n    12\n  ],\n"
        "  \"limit\": [\n    0.0,\n    Infinity,\n    -Infinity,\n    NaN\n"
        "  ],\n  \"word\": \"[NaN, Infinity]\",\n"
        "  \"text\": \"1.5, \\\"2.5\\\" \\\\\",\n"
        "  \"1.0\": \"1e5\",\n  \"z\": 7\n}\n";
    char *out = edit(text, edits, 1);

    (void)state;
    assert_string_equal(out, text);
    tv_free(out);
    {
        static const struct tv_json_edit other[] = {
            {"z", TV_EDIT_INT, 8, NULL, false},
        };
        char *want = tv_strdup(text);
        want[strlen(want) - 4] = '8';
        out = edit(text, other, 1);
        assert_string_equal(out, want);
        tv_free(want);
        tv_free(out);
    }
}

static void test_refused(void **state)
{
    char *out = NULL;
    size_t n = 0;
    struct tv_error err;

    (void)state;
    assert_code(tv_json_edit("[]", 2, NULL, 0, &err, &out, &n), TV_E_CORRUPT,
                &err);
    assert_code(tv_json_edit("{", 1, NULL, 0, &err, &out, &n), TV_E_CORRUPT,
                &err);
    assert_code(tv_json_edit("", 0, NULL, 0, &err, &out, &n), TV_E_CORRUPT,
                &err);
    assert_code(tv_json_edit("{\"a\": 1.}", 9, NULL, 0, &err, &out, &n),
                TV_E_CORRUPT, &err);
    assert_code(tv_json_edit("{\"a\": 01.5}", 11, NULL, 0, &err, &out, &n),
                TV_E_CORRUPT, &err);
    assert_null(out);
}

static enum tv_err edit_once(void *arg, struct tv_error *err)
{
    static const struct tv_json_edit edits[] = {
        {"z", TV_EDIT_INT, 7, NULL, false},
        {"dtype", TV_EDIT_STRING, 0, "bfloat16", false},
    };
    char *out = NULL;
    size_t n = 0;
    const enum tv_err rc =
        tv_json_edit(config, sizeof config - 1, edits, 2, err, &out, &n);

    if (rc == TV_OK) {
        assert_string_equal(out, (const char *)arg);
        tv_free(out);
    }
    return rc;
}

static void test_no_memory(void **state)
{
    static const struct tv_json_edit edits[] = {
        {"z", TV_EDIT_INT, 7, NULL, false},
        {"dtype", TV_EDIT_STRING, 0, "bfloat16", false},
    };
    char *want = edit(config, edits, 2);

    (void)state;
    /* jansson can do without some of it (a larger hash table). */
    assert_true(faults_loop_alloc(edit_once, want, true) > 10);
    tv_free(want);
}

struct text {
    const json_t *doc;
    char *want;
};

static enum tv_err text_once(void *arg, struct tv_error *err)
{
    const struct text *t = arg;
    char *got = tv_json_text(t->doc, JSON_INDENT(1));

    if (got == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no text");
    assert_string_equal(got, t->want);
    tv_free(got);
    return TV_OK;
}

/* The text is whole or there is none, wherever memory ends: json_dumps leaves
 * out a key then. Long keys, so that the buffer grows inside of them. */
static void test_whole_text(void **state)
{
    json_t *doc = json_object();
    struct text t = {doc, NULL};
    char key[200];

    (void)state;
    for (int i = 0; i < 26; i++) {
        memset(key, 'a' + i, sizeof key - 1);
        key[sizeof key - 1] = '\0';
        (void)json_object_set_new(doc, key, json_pack("[i,{s:s}]", i, key, ""));
    }
    t.want = tv_json_text(doc, JSON_INDENT(1));
    assert_non_null(t.want);
    assert_true(faults_loop_alloc(text_once, &t, false) > 20);
    tv_free(t.want);
    json_decref(doc);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_untouched), cmocka_unit_test(test_edits),
        cmocka_unit_test(test_numbers),   cmocka_unit_test(test_refused),
        cmocka_unit_test(test_no_memory), cmocka_unit_test(test_whole_text),
    };
    json_set_alloc_funcs(tv_alloc, tv_free);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
