/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_recipe.c - reading recipes: what is accepted, and where each mistake is
 * said to be. No model is opened here.
 */
#include "test.h"

#include <stdio.h>
#include <string.h>

#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/merge.h"
#include "tv/text.h"

static char *dir;

static int setup(void **state)
{
    (void)state;
    dir = tmpdir_make();
    return dir == NULL;
}

static int teardown(void **state)
{
    (void)state;
    tmpdir_remove(dir);
    return 0;
}

struct loaded {
    enum tv_err rc;
    tvm_recipe *r;
    struct tvm_problems problems;
    struct tv_error err;
};

static void load_bytes(struct loaded *l, const void *text, size_t n)
{
    char *const path = tmpdir_write(dir, "r.yml", text, n);
    memset(l, 0, sizeof(*l));
    tvm_problems_init(&l->problems);
    l->rc = tvm_recipe_load(path, &l->problems, &l->err, &l->r);
    tv_free(path);
    assert_true(l->rc != TV_OK || l->r != NULL);
}

static void load(struct loaded *l, const char *text)
{
    load_bytes(l, text, strlen(text));
}

static void unload(struct loaded *l)
{
    tvm_recipe_free(l->r);
    tvm_problems_free(&l->problems);
}

static void print_problems(const struct tvm_problems *p)
{
    for (size_t i = 0; i < p->n; i++)
        print_message("  %s %s: %s\n", p->items[i].is_error ? "error" : "note",
                      p->items[i].where, p->items[i].message);
}

/* A problem at "r.yml:AT" whose message has `part`. */
static void expect(const struct loaded *l, bool is_error, const char *at,
                   const char *part)
{
    for (size_t i = 0; i < l->problems.n; i++) {
        const struct tvm_problem *const p = &l->problems.items[i];
        const char *const name = strstr(p->where, "r.yml:");
        if (p->is_error == is_error && name != NULL &&
            strcmp(name + 6, at) == 0 && strstr(p->message, part) != NULL)
            return;
    }
    print_problems(&l->problems);
    fail_msg("no %s at %s with '%s'", is_error ? "error" : "warning", at, part);
}

static void refused(const char *text, enum tv_err code, const char *at,
                    const char *part)
{
    struct loaded l;
    load(&l, text);
    if (l.rc != code)
        print_problems(&l.problems);
    assert_int_equal(l.rc, code);
    assert_message(&l.err, part);
    expect(&l, true, at, part);
    unload(&l);
}

static void accepted(const char *text, size_t n_warnings)
{
    struct loaded l;
    load(&l, text);
    if (l.rc != TV_OK || l.problems.n != n_warnings)
        print_problems(&l.problems);
    assert_int_equal(l.rc, TV_OK);
    assert_int_equal(l.problems.n_errors, 0);
    assert_int_equal(l.problems.n, n_warnings);
    unload(&l);
}

static void warned(const char *text, const char *at, const char *part)
{
    struct loaded l;
    load(&l, text);
    if (l.rc != TV_OK)
        print_problems(&l.problems);
    assert_int_equal(l.rc, TV_OK);
    expect(&l, false, at, part);
    unload(&l);
}

#define HEAD "merge_method: linear\n"
#define AB                                                                     \
    "models:\n- model: a\n  parameters: {weight: 1}\n- model: b\n"             \
    "  parameters: {weight: 0.5}\n"

static void test_forms(void **state)
{
    (void)state;
    accepted(HEAD AB, 0);
    accepted(HEAD AB "dtype: bfloat16\nout_dtype: torch.float32\n", 0);
    accepted("\xef\xbb\xbf# a comment\n---\n" HEAD AB "...\n", 0);
    accepted("{merge_method: linear, models: [{model: a, parameters: "
             "{weight: 1}}]}",
             0);
    accepted("{\"merge_method\": \"linear\", \"models\": [{\"model\": \"a\", "
             "\"parameters\": {\"weight\": 1e-4}}], \"dtype\": \"float16\"}",
             0);
    accepted("merge_method: passthrough\nslices:\n"
             "- sources: [{model: a, layer_range: [0, 4]}]\n"
             "- sources:\n  - model: b\n    layer_range: [2, 6]\n"
             "    parameters:\n      scale:\n      - filter: o_proj\n"
             "        value: 0\n      - value: 1\n"
             "  base_model: a\n  residual_weight: 1\n"
             "- sources: [{model: b, layer_range: [6, 6]}]\n",
             0);
    accepted("merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: "
             "b}]\nparameters:\n  t:\n  - filter: self_attn\n    value: [0, "
             "0.5, 1]\n  - value: 0.5\n",
             0);
    accepted("merge_method: ties\nbase_model:\n  model: {path: a, revision: "
             "main}\nmodels:\n- model: {model: {path: b}, lora: c}\n"
             "  parameters: {weight: 1, density: [1, 0.5]}\n"
             "parameters: {normalize: true, int8_mask: yes, lambda: 1.2}\n",
             0);
    accepted(HEAD "models:\r\n- model: C:\\models\\a\r\n  parameters: "
                  "{weight: 1}\r\n",
             0);
    /* Empty sections count as absent. */
    accepted(HEAD AB "slices:\nparameters:\nbase_model: null\n", 0);
}

static void test_yaml_1_1(void **state)
{
    static const char *const numbers[] = {
        "1e-4",  "1.0e-4", "0.5", "\"0.5\"", ".5",  "1.",   "-1", "+2",
        "1_000", "0x10",   "017", "0b11",    "1E5", "true", "off"};
    static const char *const not_numbers[] = {"abc",  "1e",   "0x",    "1:30",
                                              ".inf", ".nan", "1e999", "--1",
                                              "\"\"", "1 2",  "{a: 1}"};
    static const char *const bools[] = {"yes", "No", "ON",       "off",
                                        "1",   "0",  "\"true\"", "True"};
    static const char *const not_bools[] = {"0.5", "2", "y", "maybe", "[1, 2]"};
    char text[256];
    (void)state;
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) {
        (void)snprintf(text, sizeof(text),
                       HEAD "models:\n- model: a\n  parameters:\n"
                            "    weight: %s\n",
                       numbers[i]);
        accepted(text, 0);
    }
    for (size_t i = 0; i < sizeof(not_numbers) / sizeof(not_numbers[0]); i++) {
        struct loaded l;
        (void)snprintf(text, sizeof(text),
                       HEAD "models:\n- model: a\n  parameters:\n"
                            "    weight: %s\n",
                       not_numbers[i]);
        load(&l, text);
        assert_int_equal(l.rc, TV_E_USAGE);
        expect(&l, true, "5:13", "");
        unload(&l);
    }
    for (size_t i = 0; i < sizeof(bools) / sizeof(bools[0]); i++) {
        (void)snprintf(text, sizeof(text),
                       HEAD AB "parameters:\n  normalize: %s\n", bools[i]);
        accepted(text, 0);
    }
    for (size_t i = 0; i < sizeof(not_bools) / sizeof(not_bools[0]) - 1; i++) {
        (void)snprintf(text, sizeof(text),
                       HEAD AB "parameters:\n  normalize: %s\n", not_bools[i]);
        refused(text, TV_E_USAGE, "8:14", "parameter 'normalize'");
    }
    refused(HEAD AB "parameters:\n  normalize: [1, 2]\n", TV_E_USAGE, "8:18",
            "'2' is not true or false");
}

static void test_settings(void **state)
{
    (void)state;
    refused(HEAD AB "parameters:\n  weight: [1, {value: 2}]\n", TV_E_USAGE,
            "8:15", "numbers only");
    refused(HEAD AB "parameters:\n  weight: [{value: 2}, 1]\n", TV_E_USAGE,
            "8:24", "not both");
    refused(HEAD AB "parameters:\n  weight: [{filter: mlp}]\n", TV_E_USAGE,
            "8:12", "needs 'value'");
    refused(HEAD AB "parameters:\n  weight: {value: {value: 1}}\n", TV_E_USAGE,
            "8:19", "scalar or a list");
    refused(HEAD AB "parameters:\n  weight: {value: 1, filter: [a]}\n",
            TV_E_USAGE, "8:30", "piece of a tensor name");
    refused(HEAD AB "parameters:\n  weight: [0.1, x]\n", TV_E_USAGE, "8:17",
            "'x' is not a number");
    refused(HEAD AB "parameters: [1]\n", TV_E_USAGE, "7:13", "must be a map");
    warned(HEAD AB "parameters:\n  weight: {value: 1, filtr: mlp}\n", "8:22",
           "did you mean 'filter'?");
    accepted(HEAD AB "parameters:\n  weight: []\n", 0);
    accepted(HEAD AB "parameters:\n  weight: {value: [1, 2], filter: '*'}\n",
             0);
}

static void test_unknown_keys(void **state)
{
    (void)state;
    warned(HEAD AB "base_modle: a\n", "7:1",
           "unknown key 'base_modle' is ignored; did you mean 'base_model'?");
    warned(HEAD AB "foo: a\n", "7:1", "unknown key 'foo' is ignored");
    warned(HEAD "models:\n- model: a\n  paramters: {weight: 1}\n", "4:3",
           "did you mean 'parameters'?");
    warned(HEAD "models:\n- model: a\n  weight: 1\n", "4:3",
           "parameters belong under 'parameters:'");
    warned("merge_method: passthrough\nslices:\n- source: 1\n  sources:\n"
           "  - model: a\n    layer_range: [0, 1]\n    layer_rang: 2\n",
           "3:3", "did you mean 'sources'?");
    warned("merge_method: passthrough\nslices:\n- sources:\n"
           "  - model: a\n    layer_range: [0, 1]\n    layer_rang: 2\n",
           "6:5", "did you mean 'layer_range'?");
    warned(HEAD AB "parameters: {normalise: true}\n", "7:14",
           "linear has no parameter 'normalise', it is ignored; did you mean "
           "'normalize'?");
    warned(HEAD AB "parameters: {zzz: true}\n", "7:14",
           "it takes: weight, normalize");
    warned(HEAD AB "base_model: {model: {path: a, revison: x}}\n", "7:31",
           "did you mean 'revision'?");
    /* What recipes of 2024 carry without effect. */
    warned(HEAD AB "name: x\n", "7:1", "'name' has no effect");
    warned(HEAD AB "input_model_parameters: {a: 1}\n", "7:1", "no effect");
    warned(HEAD AB "parameters: {embed_slerp: true, consensus_method: sum}\n",
           "7:14", "no effect");
}

static void test_methods(void **state)
{
    (void)state;
    refused("merge_method: dare-ties\n" AB, TV_E_USAGE, "1:15",
            "unknown merge_method 'dare-ties'; did you mean 'dare_ties'?");
    refused("merge_method: liner\n" AB, TV_E_USAGE, "1:15",
            "did you mean 'linear'?");
    refused("merge_method: zzzzzz\n" AB, TV_E_USAGE, "1:15",
            "known: linear, slerp");
    refused("merge_method: [linear]\n" AB, TV_E_USAGE, "1:15", "a name");
    refused(AB, TV_E_USAGE, "1:1", "'merge_method' is missing");
    refused("base_model: a\nexperts: [{source_model: b}]\n", TV_E_USAGE, "1:1",
            "mergekit-moe");
    refused("genome: {models: [a, b]}\n", TV_E_USAGE, "1:1", "mergekit-evolve");
}

static void test_dtypes(void **state)
{
    (void)state;
    refused(HEAD AB "dtype: bf16\n", TV_E_USAGE, "7:8",
            "did you mean 'bfloat16'?");
    refused(HEAD AB "out_dtype: float61\n", TV_E_USAGE, "7:12",
            "unknown dtype 'float61'");
    accepted(HEAD AB "dtype: float64\n", 1);
    accepted(HEAD AB "dtype: torch.float64\nout_dtype: float16\n", 0);
    refused(HEAD AB "dtype: torch.int64\n", TV_E_UNSUPPORTED, "7:8",
            "whole number");
    refused(HEAD AB "dtype: [float32]\n", TV_E_USAGE, "7:8", "a dtype is");
    accepted(HEAD AB "dtype: torch.float16\n", 0);
}

static void test_later(void **state)
{
    (void)state;
    accepted(HEAD AB "tokenizer_source: union\n", 0);
    accepted(HEAD AB "tokenizer:\n  source: base\n", 0);
    accepted(HEAD AB "chat_template: auto\n", 0);
    refused(HEAD AB "chat_template: auto1\n", TV_E_USAGE, "7:16",
            "did you mean");
    accepted(HEAD "modules:\n  text_decoder:\n    models:\n    - {model: a, "
                  "parameters: {weight: 1}}\n",
             0);
    refused(HEAD "modules:\n  text_decoder:\n    models: []\n", TV_E_USAGE,
            "4:13", "must be a list");
    accepted(HEAD "models:\n- model: {model: a, override_architecture: X}\n"
                  "  parameters: {weight: 1}\n",
             0);
    refused(HEAD "models:\n- model: {model: a, override_architecture: [X]}\n",
            TV_E_USAGE, "3:44", "must be a name");
}

static void test_documents(void **state)
{
    struct loaded l;
    (void)state;
    load(&l, "name: one\n" HEAD AB "---\n" HEAD
             "models: [{model: one+x, parameters: {weight: 1}}]\n---\n");
    assert_int_equal(l.rc, TV_OK);
    assert_int_equal(l.problems.n, 0);
    assert_non_null(tvm_recipe_next(l.r));
    assert_null(tvm_recipe_next(tvm_recipe_next(l.r)));
    unload(&l);
    /* An anchor ends with its document. */
    refused("name: one\nx: &x 1\n" HEAD AB "---\n" HEAD AB "y: *x\n",
            TV_E_USAGE, "16:4", "unknown anchor");
    refused(HEAD AB "---\n" HEAD AB, TV_E_USAGE, "8:1", "no 'name'");
    refused("name: one\n" HEAD AB "---\nname: one\n" HEAD AB, TV_E_USAGE, "9:7",
            "two documents");
    refused("name: a\n" HEAD "models: [{model: a, parameters: {weight: 1}}]\n"
            "---\n" HEAD AB,
            TV_E_USAGE, "1:7", "its own result");
    refused("name: .a\n" HEAD AB "---\n" HEAD AB, TV_E_USAGE, "1:7", "letters");
    refused("name: one\noutput: adapter\n" HEAD AB "---\n" HEAD AB,
            TV_E_UNSUPPORTED, "2:1", "adapters");
}

static void test_structure(void **state)
{
    (void)state;
    refused("", TV_E_USAGE, "1:1", "empty");
    refused("# nothing\n", TV_E_USAGE, "1:1", "empty");
    refused("- a\n", TV_E_USAGE, "1:1", "a recipe is a map");
    refused(HEAD, TV_E_USAGE, "1:1", "'models' or 'slices' is missing");
    refused(HEAD AB "slices: [{sources: []}]\n", TV_E_USAGE, "7:1", "not both");
    refused(HEAD "models: a\n", TV_E_USAGE, "2:9", "must be a list");
    refused(HEAD "models: [a]\n", TV_E_USAGE, "2:10", "an entry is a map");
    refused(HEAD "models: [{parameters: {weight: 1}}]\n", TV_E_USAGE, "2:10",
            "needs 'model'");
    refused(HEAD "models: [{model: ''}]\n", TV_E_USAGE, "2:18", "is empty");
    refused(HEAD "models: [{model: [a]}]\n", TV_E_USAGE, "2:18",
            "model reference");
    refused(HEAD "models:\n- model: a\n- model: b\n- model: a\n", TV_E_USAGE,
            "5:10", "'a' is listed twice (first in line 3)");
    warned(HEAD "models: [{model: a, layer_range: [0, 1]}]\n", "2:21",
           "layer_range is ignored here");
    refused(HEAD "slices: [{base_model: a}]\n", TV_E_USAGE, "2:10",
            "needs 'sources'");
    refused(HEAD "slices: [a]\n", TV_E_USAGE, "2:10", "a slice is a map");
}

#define SLICE "merge_method: passthrough\nslices:\n- sources:\n  - model: a\n"

static void test_ranges(void **state)
{
    (void)state;
    refused(SLICE, TV_E_USAGE, "4:5", "needs layer_range");
    refused(SLICE "    layer_range: [0]\n", TV_E_USAGE, "5:18", "two whole");
    refused(SLICE "    layer_range: [0, 1.5]\n", TV_E_USAGE, "5:18",
            "two whole");
    refused(SLICE "    layer_range: 3\n", TV_E_USAGE, "5:18", "two whole");
    refused(SLICE "    layer_range: [0, -1]\n", TV_E_USAGE, "5:18",
            "negative or run backwards");
    refused(SLICE "    layer_range: [3, 2]\n", TV_E_USAGE, "5:18",
            "run backwards");
    refused("merge_method: linear\nslices:\n- sources:\n"
            "  - {model: a, layer_range: [0, 2]}\n"
            "  - {model: b, layer_range: [0, 3]}\n",
            TV_E_USAGE, "5:29", "this one has 3 layers, the first has 2");
    refused("merge_method: linear\nslices:\n- sources:\n"
            "  - {model: a, layer_range: [0, 2]}\n"
            "  - {model: a, layer_range: [2, 4]}\n",
            TV_E_USAGE, "5:13", "listed twice in this slice");
}

static void test_syntax(void **state)
{
    struct loaded l;
    (void)state;
    refused(HEAD "models: [\n", TV_E_USAGE, "3:1", "not valid YAML");
    refused(HEAD "\tmodels: x\n", TV_E_USAGE, "2:1", "not valid YAML");
    refused(HEAD "models: 'a\n", TV_E_USAGE, "3:1", "not valid YAML");
    refused(HEAD "dtype: float16\n" AB "dtype: float32\n", TV_E_USAGE, "8:1",
            "key 'dtype' appears twice (first in line 2)");
    refused(HEAD "? [a, b]\n: 1\n", TV_E_USAGE, "2:3", "single word");
    refused(HEAD "models: !!python/object:os.system [a]\n", TV_E_USAGE, "2:9",
            "tags");
    refused(HEAD "models: !foo [a]\n", TV_E_USAGE, "2:9", "tags");
    accepted("merge_method: !!str linear\n" AB, 0);
    load_bytes(&l,
               HEAD "dtype: a\xff"
                    "b\n",
               sizeof(HEAD) - 1 + 11);
    assert_int_equal(l.rc, TV_E_USAGE);
    expect(&l, true, "2:9", "not valid YAML");
    unload(&l);
    load_bytes(&l, HEAD "dtype: \"a\\0b\"\n", sizeof(HEAD) - 1 + 14);
    assert_int_equal(l.rc, TV_E_USAGE);
    unload(&l);
}

static void test_aliases(void **state)
{
    (void)state;
    accepted(HEAD "models:\n- model: a\n  parameters: &p {weight: 1}\n"
                  "- model: b\n  parameters: *p\n",
             0);
    accepted(HEAD "models:\n- model: a\n  parameters: &p {weight: 1}\n"
                  "- model: b\n  parameters:\n    <<: *p\n",
             0);
    refused(HEAD "models: *nowhere\n", TV_E_USAGE, "2:9", "unknown anchor");
    refused(HEAD "models: &a [*a]\n", TV_E_USAGE, "2:13", "unknown anchor");
    refused(HEAD "parameters:\n  <<: 3\n", TV_E_USAGE, "3:7", "'<<' takes");
}

/* 10 aliases of 10 aliases of ...: small text, 10^9 values written out. */
static void test_bombs(void **state)
{
    struct tv_buf b;
    struct loaded l;
    (void)state;
    tv_buf_init(&b, 4u << 20);
    tv_buf_str(&b, "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n");
    for (int i = 1; i < 10; i++) {
        tv_buf_fmt(&b, "a%d: &a%d [", i, i);
        for (int k = 0; k < 10; k++)
            tv_buf_fmt(&b, "%s*a%d", k == 0 ? "" : ",", i - 1);
        tv_buf_str(&b, "]\n");
    }
    load(&l, b.data);
    assert_int_equal(l.rc, TV_E_USAGE);
    assert_message(&l.err, "too large");
    unload(&l);
    tv_buf_free(&b);

    tv_buf_init(&b, 4u << 20);
    tv_buf_str(&b, "a: ");
    for (int i = 0; i < 100000; i++)
        tv_buf_str(&b, "[");
    load(&l, b.data);
    assert_int_equal(l.rc, TV_E_USAGE);
    assert_message(&l.err, "nested too deeply");
    unload(&l);
    tv_buf_free(&b);

    tv_buf_init(&b, 4u << 20);
    tv_buf_str(&b, "a: &a0 [1]\nb:\n");
    for (int i = 1; i < 80; i++)
        tv_buf_fmt(&b, "- &a%d [*a%d]\n", i, i - 1);
    load(&l, b.data);
    assert_int_equal(l.rc, TV_E_USAGE);
    assert_message(&l.err, "nested too deeply");
    unload(&l);
    tv_buf_free(&b);

    tv_buf_init(&b, 4u << 20);
    tv_buf_str(&b, "a: [");
    for (int i = 0; i < 110000; i++)
        tv_buf_str(&b, "1,");
    tv_buf_str(&b, "1]\n");
    load(&l, b.data);
    assert_int_equal(l.rc, TV_E_USAGE);
    assert_message(&l.err, "too large");
    unload(&l);
    tv_buf_free(&b);

    tv_buf_init(&b, 4u << 20);
    for (int i = 0; i < 2000; i++)
        tv_buf_fmt(&b, "- &a%d 1\n", i);
    load(&l, b.data);
    assert_int_equal(l.rc, TV_E_USAGE);
    assert_message(&l.err, "too many anchors");
    unload(&l);
    tv_buf_free(&b);

    tv_buf_init(&b, 4u << 20);
    while (b.n_bytes < (1u << 20) + 1)
        tv_buf_str(&b, "# padding padding padding padding padding\n");
    load(&l, b.data);
    assert_int_equal(l.rc, TV_E_USAGE);
    assert_message(&l.err, "1 MiB");
    unload(&l);
    tv_buf_free(&b);
}

static void test_all_at_once(void **state)
{
    struct loaded l;
    (void)state;
    load(&l, "merge_method: lineer\nmodels:\n- model: a\n  x: 1\n- model: a\n"
             "dtype: bf16\ntokenizer_source: [1]\nfoo: 1\n");
    assert_int_equal(l.rc, TV_E_USAGE);
    assert_int_equal(l.problems.n_errors, 4);
    expect(&l, true, "1:15", "linear");
    expect(&l, true, "5:10", "twice");
    expect(&l, true, "6:8", "bfloat16");
    expect(&l, true, "7:19", "a model reference");
    expect(&l, false, "4:3", "unknown key 'x'");
    expect(&l, false, "8:1", "unknown key 'foo'");
    unload(&l);
}

static void test_missing_file(void **state)
{
    struct tvm_problems p;
    struct tv_error err;
    tvm_recipe *r = NULL;
    (void)state;
    tvm_problems_init(&p);
    assert_code(tvm_recipe_load("no-such-recipe.yml", &p, &err, &r), TV_E_INPUT,
                &err);
    assert_message(&err, "no-such-recipe.yml");
    assert_null(r);
    tvm_problems_free(&p);
}

static void test_text(void **state)
{
    static const char text[] = HEAD AB "# the end";
    struct loaded l;
    size_t n = 0;
    (void)state;
    load(&l, text);
    assert_int_equal(l.rc, TV_OK);
    const char *const got = tvm_recipe_text(l.r, &n);
    assert_int_equal(n, sizeof(text) - 1);
    assert_memory_equal(got, text, n);
    unload(&l);
}

static void test_problem_order(void **state)
{
    struct tvm_problems p;
    (void)state;
    tvm_problems_init(&p);
    assert_int_equal(tvm_problems_code(&p), TV_OK);
    tvm_problem_add(&p, false, TV_E_USAGE, "w", "only a warning");
    assert_int_equal(tvm_problems_code(&p), TV_OK);
    tvm_problem_add(&p, true, TV_E_IO, "", "x");
    assert_int_equal(tvm_problems_code(&p), TV_E_IO);
    tvm_problem_add(&p, true, TV_E_NOSPACE, "", "x");
    assert_int_equal(tvm_problems_code(&p), TV_E_NOSPACE);
    tvm_problem_add(&p, true, TV_E_CORRUPT, "", "x");
    assert_int_equal(tvm_problems_code(&p), TV_E_CORRUPT);
    tvm_problem_add(&p, true, TV_E_UNSUPPORTED, NULL, "%d", 1);
    tvm_problem_add(&p, true, TV_E_INPUT, "", "x");
    assert_int_equal(tvm_problems_code(&p), TV_E_UNSUPPORTED);
    tvm_problem_add(&p, true, TV_E_USAGE, "", "x");
    assert_int_equal(tvm_problems_code(&p), TV_E_USAGE);
    assert_int_equal(p.n, 7);
    assert_int_equal(p.n_errors, 6);
    assert_string_equal(p.items[4].where, "");
    assert_string_equal(p.items[4].message, "1");
    tvm_problems_free(&p);
}

/* Every allocation of a load fails once: an error, nothing leaked. */
static void test_no_memory(void **state)
{
    static const char text[] =
        "merge_method: ties\nbase_model: {model: {path: b, revision: r}}\n"
        "models:\n- model: a\n  parameters: &p {weight: [1, 2], x: 3}\n"
        "- model: c\n  parameters: {<<: *p, density: 0.5}\nfoo: 1\n";
    char *const path = tmpdir_write(dir, "m.yml", text, sizeof(text) - 1);
    (void)state;
    for (uint64_t n = 1;; n++) {
        struct tvm_problems p;
        struct tv_error err;
        tvm_recipe *r = NULL;
        const uint64_t held = test_heap_bytes();
        tvm_problems_init(&p);
        tv_alloc_fail_at(n, 1);
        const enum tv_err rc = tvm_recipe_load(path, &p, &err, &r);
        const uint64_t fired = tv_alloc_fired();
        tv_alloc_fail_at(0, 0);
        /* Losing the text of a warning is no failure of the recipe. */
        assert_true(rc == TV_OK || rc == TV_E_NOMEM);
        assert_true((rc == TV_OK) == (r != NULL));
        tvm_recipe_free(r);
        tvm_problems_free(&p);
        assert_int_equal(test_heap_bytes(), held);
        if (fired == 0) {
            assert_int_equal(rc, TV_OK);
            assert_true(n > 10);
            break;
        }
    }
    tv_free(path);
}

/* What can be planned is given out although it is wrong, other things not. */
static void test_given_out(void **state)
{
    static const char *const some[] = {
        "merge_method: tise\nmodels: [{model: a}]\n",
        "merge_method: nothing-like-it\nmodels: [{model: a}]\n",
        HEAD "models: 3\n", HEAD "models: [{model: [x]}, 5]\ndtype: f\n", "{}"};
    static const char *const none[] = {"[a]", "a: [", "", "x"};
    struct loaded l;
    (void)state;
    for (size_t i = 0; i < sizeof(some) / sizeof(some[0]); i++) {
        load(&l, some[i]);
        assert_int_equal(l.rc, TV_E_USAGE);
        assert_non_null(l.r);
        unload(&l);
    }
    for (size_t i = 0; i < sizeof(none) / sizeof(none[0]); i++) {
        load(&l, none[i]);
        assert_int_not_equal(l.rc, TV_OK);
        assert_null(l.r);
        unload(&l);
    }
    /* Values are judged although the method is unknown. */
    refused("merge_method: nothing-like-it\nmodels:\n- model: a\n"
            "  parameters: {weight: abc, other: abc}\n",
            TV_E_USAGE, "1:15", "unknown merge_method");
    load(&l, "merge_method: nothing-like-it\nmodels:\n- model: a\n"
             "  parameters: {weight: abc, other: abc}\n");
    expect(&l, true, "4:24", "'abc' is not a number");
    assert_int_equal(l.problems.n, 2);
    unload(&l);
}

static void replaced(const char *text, const char *want)
{
    char *const path = tmpdir_write(dir, "as.yml", text, strlen(text));
    struct tvm_problems p;
    struct tv_error err;
    tvm_recipe *r = NULL;
    size_t n = 0;

    tvm_problems_init(&p);
    const enum tv_err rc =
        tvm_recipe_load_as(path, "ties", "none", &p, &err, &r);
    if (want == NULL) {
        assert_int_equal(rc, TV_E_USAGE);
        assert_null(r);
    } else {
        assert_non_null(r);
        const char *const got = tvm_recipe_text(r, &n);
        assert_int_equal(n, strlen(want));
        assert_memory_equal(got, want, n);
    }
    tvm_recipe_free(r);
    tvm_problems_free(&p);
    tv_free(path);
}

/* Another method in the same text: only the values change, wherever they are
 * and however they are written. */
static void test_load_as(void **state)
{
    (void)state;
    replaced("merge_method: linear # x\nmodels: [{model: a}]\n",
             "\"parameters\": {\"sparsify\": \"none\"}\n"
             "merge_method: ties # x\nmodels: [{model: a}]\n");
    /* Where there is no `sparsify` it is added, as the map is written. */
    replaced("merge_method: linear\nparameters:\n    density: 1\n    weight: "
             "1\nmodels: [{model: a}]\n",
             "merge_method: ties\nparameters:\n    \"sparsify\": \"none\"\n"
             "    density: 1\n    weight: 1\nmodels: [{model: a}]\n");
    replaced("{\"parameters\": {\"weight\": 1}, \"merge_method\": \"linear\", "
             "\"models\": [{\"model\": \"a\"}]}",
             "{\"parameters\": {\"sparsify\": \"none\", \"weight\": 1}, "
             "\"merge_method\": ties, \"models\": [{\"model\": \"a\"}]}");
    replaced("{merge_method: linear, models: [{model: a}]}",
             "{\"parameters\": {\"sparsify\": \"none\"}, merge_method: ties, "
             "models: [{model: a}]}");
    replaced(
        "\xc3\xa9: {\xc3\xa9: 1}\n"
        "models: [{model: \xe2\x82\xac, parameters: {sparsify: \"random\", "
        "weight: 1}}, {model: b}]\n"
        "parameters: {sparsify: 'magnitude'}\nmerge_method: 'linear'\n",
        "\xc3\xa9: {\xc3\xa9: 1}\n"
        "models: [{model: \xe2\x82\xac, parameters: {sparsify: none, "
        "weight: 1}}, {model: b}]\n"
        "parameters: {sparsify: none}\nmerge_method: ties\n");
    /* What a value stands for is not where it is written. */
    replaced("x: &m linear\nmerge_method: *m\nmodels: [{model: a}]\n", NULL);
    replaced("merge_method: \"lin\\x65ar\"\nmodels: [{model: a}]\n", NULL);
}

/* Values of more entries than are gone through at once. */
static void test_load_as_many(void **state)
{
    struct tv_buf text;
    struct tv_buf want;
    (void)state;
    tv_buf_init(&text, 1u << 20);
    tv_buf_init(&want, 1u << 20);
    tv_buf_str(&text, "merge_method: linear\nmodels:\n");
    tv_buf_str(&want, "merge_method: ties\nmodels:\n");
    for (unsigned i = 0; i < 150; i++) {
        tv_buf_fmt(&text, "- {model: m%u, parameters: {sparsify: x%u}}\n", i,
                   i * 7919);
        tv_buf_fmt(&want, "- {model: m%u, parameters: {sparsify: none}}\n", i);
    }
    assert_false(text.failed || want.failed);
    replaced(text.data, want.data);
    tv_buf_free(&text);
    tv_buf_free(&want);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_load_as),   cmocka_unit_test(test_load_as_many),
        cmocka_unit_test(test_forms),     cmocka_unit_test(test_yaml_1_1),
        cmocka_unit_test(test_settings),  cmocka_unit_test(test_unknown_keys),
        cmocka_unit_test(test_methods),   cmocka_unit_test(test_dtypes),
        cmocka_unit_test(test_later),     cmocka_unit_test(test_documents),
        cmocka_unit_test(test_structure), cmocka_unit_test(test_ranges),
        cmocka_unit_test(test_syntax),    cmocka_unit_test(test_aliases),
        cmocka_unit_test(test_bombs),     cmocka_unit_test(test_all_at_once),
        cmocka_unit_test(test_given_out), cmocka_unit_test(test_missing_file),
        cmocka_unit_test(test_text),      cmocka_unit_test(test_problem_order),
        cmocka_unit_test(test_no_memory),
    };
    return cmocka_run_group_tests_name("recipe", tests, setup, teardown);
}
