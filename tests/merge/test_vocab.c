/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_vocab.c - tokenizer blocks: tokens, ids, rows and files of the output,
 * and that its bytes depend on nothing else.
 *
 * Models are tiny_model.h's with tokenizers written here: "<unk>", "<s>",
 * "</s>", "t3", "t4", ... and added tokens behind them.
 */
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

#include <jansson.h>

#include "faults.h"
#include "fixture.h"
#include "plan_fixture.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"

#define EMBED "model.embed_tokens.weight"
#define HEAD  "lm_head.weight"
#define WIDTH 8u

static char *dir;

static int set_up(void **state)
{
    (void)state;
    dir = tmpdir_make();
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    tmpdir_remove(dir);
    return 0;
}

static void write_text(const char *model, const char *name, const char *text)
{
    tv_free(tmpdir_write(model, name, text, strlen(text)));
}

static void put_tokenizer(const char *model, unsigned n,
                          const char *const *added, unsigned n_added,
                          const char *type)
{
    struct tv_buf b;
    tv_buf_init(&b, 1u << 16);
    tv_buf_fmt(&b, "{\"version\": \"1.0\", \"model\": {\"type\": \"%s\", ",
               type);
    tv_buf_str(&b, "\"merges\": [], \"dropout\": 1e-01, \"vocab\": {\"<unk>\": "
                   "0, \"<s>\": 1, \"</s>\": 2");
    for (unsigned i = 3; i < n; i++)
        tv_buf_fmt(&b, ", \"t%u\": %u", i, i);
    tv_buf_str(&b, "}}, \"added_tokens\": [");
    for (unsigned i = 0; i < n_added; i++)
        tv_buf_fmt(&b, "%s{\"id\": %u, \"content\": \"%s\", \"special\": true}",
                   i == 0 ? "" : ", ", n + i, added[i]);
    tv_buf_str(&b, "]}");
    assert_false(b.failed);
    write_text(model, "tokenizer.json", b.data);
    tv_buf_free(&b);
    write_text(model, "tokenizer_config.json",
               "{\"bos_token\": \"<s>\", \"pad_token\": \"<pad>\", "
               "\"model_max_length\": 1000000000000000019884624838656}\n");
}

/* Of the config.json of models to come. */
static const char *more = "";

/* A model of `rows` rows whose tokenizer has n ordinary tokens. */
static void put_model(const char *name, unsigned rows, unsigned n,
                      const char *const *added, unsigned n_added, uint64_t seed,
                      bool tied)
{
    struct tiny_model m;
    tiny_model_init(&m);
    m.layers = 1;
    m.vocab = rows;
    m.seed = seed;
    m.tied = tied;
    char *const keys =
        tv_asprintf("\"bos_token_id\": 1, \"eos_token_id\": [2, 15]%s", more);
    assert_non_null(keys);
    m.config_more = keys;
    char *const path = tiny_model_write(dir, name, &m);
    tv_free(keys);
    put_tokenizer(path, n, added, n_added, "BPE");
    tv_free(path);
}

static const char *const chatml[] = {"<|im_start|>", "<|im_end|>"};
static const char *const unused[] = {"<u0>", "<u1>"};
static const char *const padded[] = {"<pad>"};

static void put_models(void)
{
    put_model("base", 16, 16, NULL, 0, 1, false);
    put_model("chatml", 18, 16, chatml, 2, 2, false);
    put_model("beyond", 16, 16, unused, 2, 3, false);
    put_model("padded", 24, 16, padded, 1, 4, false);
}

/* Plans, runs into dir/name, and leaves the plan for looking into. */
static void merge(struct planned *p, const char *name, const char *recipe,
                  struct tvm_options *o)
{
    struct tvm_options defaults;
    struct tvm_result result;
    struct tv_error err;
    char *const out = tv_path_join(dir, name);

    if (o == NULL) {
        tvm_options_init(&defaults);
        o = &defaults;
    }
    o->sync = false;
    o->out_dir = out;
    plan_good(p, dir, recipe, o);
    assert_ok(tvm_run(p->plan, NULL, &result, &err), &err);
    tv_free(out);
}

static float *read_of(const char *model, const char *tensor, uint64_t *n_rows)
{
    uint64_t n = 0;
    char *const path = tv_path_join(dir, model);
    float *const x = fx_read(path, tensor, &n);
    *n_rows = n / WIDTH;
    tv_free(path);
    return x;
}

/* Row of an output equals `weight` times that of a model. */
static void assert_row(const char *out, uint64_t row, const char *model,
                       uint64_t from, const char *tensor)
{
    uint64_t n_out = 0;
    uint64_t n_model = 0;
    float *const a = read_of(out, tensor, &n_out);
    float *const b = read_of(model, tensor, &n_model);
    assert_true(row < n_out && from < n_model);
    for (unsigned i = 0; i < WIDTH; i++)
        assert_true(a[row * WIDTH + i] == b[from * WIDTH + i]);
    tv_free(a);
    tv_free(b);
}

static uint64_t n_rows(const char *out)
{
    uint64_t n = 0;
    uint64_t m = 0;
    float *const a = read_of(out, EMBED, &n);
    float *const b = read_of(out, HEAD, &m);
    assert_int_equal(n, m);
    tv_free(a);
    tv_free(b);
    return n;
}

static json_t *json_of(const struct planned *p, const char *name)
{
    const struct tvm_side_file *const f = planned_file(p, name);
    struct tv_error err;
    json_t *j = NULL;
    assert_non_null(f);
    assert_ok(tv_json_parse_exact(f->data, f->n, name, &err, &j), &err);
    return j;
}

/* Id of a token in the output's tokenizer.json, -1 when it has none. */
static int id_of(const struct planned *p, const char *token)
{
    json_t *const j = json_of(p, "tokenizer.json");
    const json_t *const added = json_object_get(j, "added_tokens");
    const json_t *id = json_object_get(
        json_object_get(json_object_get(j, "model"), "vocab"), token);
    for (size_t i = 0; i < json_array_size(added) && id == NULL; i++) {
        const json_t *const a = json_array_get(added, i);
        if (strcmp(json_string_value(json_object_get(a, "content")), token) ==
            0)
            id = json_object_get(a, "id");
    }
    const int n = id == NULL ? -1 : (int)json_integer_value(id);
    json_decref(j);
    return n;
}

static int64_t config_int(const struct planned *p, const char *key)
{
    json_t *const j = json_of(p, "config.json");
    const int64_t n = json_integer_value(json_object_get(j, key));
    json_decref(j);
    return n;
}

#define LINEAR3                                                                \
    "merge_method: linear\nbase_model: $/base\nparameters: {weight: 1}\n"      \
    "models: [{model: $/base}, {model: $/beyond}, {model: $/chatml}]\n"
#define LINEAR2                                                                \
    "merge_method: linear\nbase_model: $/base\nparameters: {weight: 1}\n"      \
    "models: [{model: $/base}, {model: $/chatml}]\n"

/* ---- sources --------------------------------------------------------------
 */

static void test_union(void **state)
{
    struct planned p;
    (void)state;
    put_models();
    merge(&p, "out", LINEAR3 "tokenizer_source: union\n", NULL);
    assert_int_equal(n_rows("out"), 18);
    assert_int_equal(id_of(&p, "<|im_start|>"), 16);
    assert_int_equal(id_of(&p, "<|im_end|>"), 17);
    assert_int_equal(id_of(&p, "<u0>"), -1);
    assert_int_equal(config_int(&p, "vocab_size"), 18);
    /* Only one model has them: in all three they are its rows. */
    assert_row("out", 16, "chatml", 16, EMBED);
    assert_row("out", 17, "chatml", 17, HEAD);
    assert_int_equal(p.plan->vocabulary->n_tokens, 18);
    assert_int_equal(p.plan->vocabulary->n_added, 2);
    assert_int_equal(count_problems(&p, true, ""), 0);
    planned_free(&p);
}

static void test_base(void **state)
{
    struct planned p;
    (void)state;
    put_models();
    merge(&p, "out", LINEAR3 "tokenizer: {source: base}\n", NULL);
    assert_int_equal(n_rows("out"), 16);
    assert_int_equal(id_of(&p, "<|im_start|>"), -1);
    /* The tokenizer needs no change and keeps its bytes. */
    {
        char *const path = tv_path_join(dir, "base/tokenizer.json");
        const struct tvm_side_file *const f =
            planned_file(&p, "tokenizer.json");
        struct tv_error err;
        char *data = NULL;
        size_t n = 0;
        assert_ok(tv_file_read(path, 1u << 20, &err, &data, &n), &err);
        assert_int_equal(n, f->n);
        assert_memory_equal(data, f->data, n);
        tv_free(data);
        tv_free(path);
    }
    planned_free(&p);
}

static void test_model(void **state)
{
    struct planned p;
    json_t *j = NULL;
    (void)state;
    put_models();
    write_text(dir, "chatml/generation_config.json", "{\"eos_token_id\": 17}");
    merge(&p, "out", LINEAR3 "tokenizer_source: $/chatml\n", NULL);
    assert_int_equal(n_rows("out"), 18);
    assert_int_equal(id_of(&p, "<|im_end|>"), 17);
    assert_row("out", 17, "chatml", 17, EMBED);
    /* What begins and ends a text follows the tokenizer. */
    j = json_of(&p, "generation_config.json");
    assert_int_equal(json_integer_value(json_object_get(j, "eos_token_id")),
                     17);
    json_decref(j);
    planned_free(&p);
}

/* Only the base's row beside a donor's own: task vectors must be zero. */
static void test_task_vector(void **state)
{
    struct planned p;
    (void)state;
    put_models();
    merge(&p, "out",
          "merge_method: task_arithmetic\nbase_model: $/base\n"
          "models: [{model: $/chatml, parameters: {weight: 0.3}}]\n"
          "tokenizer_source: union\n",
          NULL);
    assert_row("out", 16, "chatml", 16, EMBED);
    assert_row("out", 17, "chatml", 17, EMBED);
    planned_free(&p);
}

/* Present in two donors, not in the base. */
static void test_mean(void **state)
{
    struct planned p;
    uint64_t n = 0;
    float *a = NULL;
    float *b = NULL;
    float *c = NULL;
    (void)state;
    put_models();
    put_model("chatml2", 18, 16, chatml, 2, 9, false);
    merge(&p, "out",
          "merge_method: task_arithmetic\nbase_model: $/base\n"
          "models: [{model: $/chatml, parameters: {weight: 1}},\n"
          "         {model: $/chatml2, parameters: {weight: 0}}]\n"
          "dtype: float32\ntokenizer_source: union\n",
          NULL);
    a = read_of("chatml", EMBED, &n);
    b = read_of("chatml2", EMBED, &n);
    c = read_of("out", EMBED, &n);
    /* mean + 1 * (chatml - mean) + 0 * (...) */
    for (unsigned i = 16 * WIDTH; i < 18 * WIDTH; i++)
        assert_true(c[i] == a[i]);
    tv_free(a);
    tv_free(b);
    tv_free(c);
    planned_free(&p);
}

static void test_padding(void **state)
{
    struct planned p;
    uint64_t n = 0;
    float *x = NULL;
    (void)state;
    put_models();
    merge(&p, "out",
          LINEAR2 "dtype: float32\n"
                  "tokenizer: {source: union, pad_to_multiple_of: 10}\n",
          NULL);
    assert_int_equal(n_rows("out"), 20);
    x = read_of("out", HEAD, &n);
    for (unsigned c = 0; c < WIDTH; c++) {
        double sum = 0;
        for (unsigned r = 0; r < 18; r++)
            sum += (double)x[r * WIDTH + c];
        for (unsigned r = 18; r < 20; r++)
            assert_float_equal(x[r * WIDTH + c], sum / 18, 1e-6);
    }
    tv_free(x);
    planned_free(&p);

    /* Padded embeddings stay padded, with the rows that they have ... */
    merge(&p, "out2",
          "merge_method: linear\nparameters: {weight: 1}\n"
          "models: [{model: $/padded}]\ntokenizer: {source: base}\n",
          NULL);
    assert_int_equal(n_rows("out2"), 24);
    assert_int_equal(config_int(&p, "vocab_size"), 24);
    assert_row("out2", 23, "padded", 23, EMBED);
    assert_int_equal(planned_tensor(&p, EMBED)->action, TVM_COPY);
    planned_free(&p);
    /* ... also where another model has fewer ... */
    merge(&p, "out3",
          "merge_method: linear\nbase_model: $/base\nparameters: {weight: 1}\n"
          "models: [{model: $/base}, {model: $/padded}]\n"
          "tokenizer: {source: union}\n",
          NULL);
    assert_int_equal(n_rows("out3"), 24);
    assert_int_equal(id_of(&p, "<pad>"), 16);
    assert_row("out3", 16, "padded", 16, EMBED);
    planned_free(&p);
    /* ... unless the recipe says how many. */
    plan_good(&p, dir,
              "merge_method: linear\nparameters: {weight: 1}\n"
              "models: [{model: $/padded}]\n"
              "tokenizer: {source: base, pad_to_multiple_of: 4}\n",
              NULL);
    assert_int_equal(planned_tensor(&p, EMBED)->shape[0], 20);
    expect_problem(&p, false, TV_OK, "tokenizer", "20 rows instead of 24");
    planned_free(&p);
}

/* ---- rules for tokens -----------------------------------------------------
 */

static void test_tokens(void **state)
{
    struct planned p;
    uint64_t n = 0;
    float *x = NULL;
    (void)state;
    put_models();
    merge(&p, "out",
          LINEAR2 "tokenizer:\n  source: union\n  tokens:\n"
                  "    t10: {source: $/chatml, force: true}\n"
                  "    t11: {source: $/base, force: true}\n"
                  "    t12: {source: {kind: zero}, force: true}\n"
                  "    t13: {source: {kind: model_token, model: $/chatml, "
                  "token_id: 17}, force: true}\n"
                  "    <new>: {source: {kind: model_token, model: $/base, "
                  "token: \"</s>\"}}\n"
                  "    <|im_end|>: {source: {kind: zero}}\n"
                  "    <none>:\n",
          NULL);
    assert_int_equal(n_rows("out"), 20);
    assert_row("out", 10, "chatml", 10, EMBED);
    assert_row("out", 11, "base", 11, HEAD);
    assert_row("out", 13, "chatml", 17, EMBED);
    assert_int_equal(id_of(&p, "<new>"), 18);
    assert_row("out", 18, "base", 2, EMBED);
    x = read_of("out", EMBED, &n);
    {
        float *const c = read_of("chatml", EMBED, &n);
        for (unsigned i = 0; i < WIDTH; i++) {
            assert_true(x[12 * WIDTH + i] == 0);
            assert_true(x[19 * WIDTH + i] == 0);
            /* Own row in chatml, zeros where it is missing. */
            assert_true(x[17 * WIDTH + i] == c[17 * WIDTH + i] / 2);
        }
        tv_free(c);
    }
    tv_free(x);
    expect_problem(&p, false, TV_OK, "tokenizer", "'<none>'");
    planned_free(&p);
}

static void test_bad_rules(void **state)
{
    struct planned p;
    (void)state;
    put_models();
    plan_text(&p, dir,
              LINEAR2 "tokenizer:\n  tokens:\n"
                      "    <|im_end|>: {source: $/base, force: true}\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, ":7:", "has no such token");
    planned_free(&p);
    plan_text(&p, dir,
              LINEAR2 "tokenizer:\n  tokens:\n"
                      "    t3: {source: {kind: model_token, model: $/base, "
                      "token_id: 16}, force: true}\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, ":7:", "no row of that token_id");
    planned_free(&p);
    plan_text(&p, dir,
              LINEAR2 "tokenizer: {source: union, pad_to_multiple_of: 0,\n"
                      "  tokens: {t3: {source: {kind: nil}}, t4: 7,\n"
                      "    t5: {source: {kind: model_token, model: $/base}}}}\n"
                      "tokenizer_source: base\n",
              NULL);
    expect_problem(&p, true, TV_E_USAGE, ":5:", "from 1 to");
    expect_problem(&p, true, TV_E_USAGE, ":6:", "zero or model_token");
    expect_problem(&p, true, TV_E_USAGE, ":6:", "takes a map");
    expect_problem(&p, true, TV_E_USAGE, ":7:", "either 'token' or");
    expect_problem(&p, true, TV_E_USAGE, ":8:", "not both");
    planned_free(&p);
}

/* ---- refusals -------------------------------------------------------------
 */

static void test_no_block(void **state)
{
    struct planned p;
    struct tvm_options o;
    (void)state;
    put_models();
    plan_text(&p, dir, LINEAR2, NULL);
    expect_problem(&p, true, TV_E_INPUT, EMBED, "tokenizer: {source: union}");
    planned_free(&p);
    tvm_options_init(&o);
    o.truncate_embeddings = true;
    merge(&p, "out", LINEAR2, &o);
    assert_int_equal(n_rows("out"), 16);
    assert_int_equal(config_int(&p, "vocab_size"), 16);
    planned_free(&p);
}

/* A stack has the embedding of its first slice and the head of its last one. */
static void test_stack(void **state)
{
#define STACK                                                                  \
    "merge_method: passthrough\nslices:\n"                                     \
    "- sources: [{model: $/base, layer_range: [0, 1]}]\n"                      \
    "- sources: [{model: $/chatml, layer_range: [0, 1]}]\n"
    struct planned p;
    struct tvm_options o;
    (void)state;
    put_models();
    plan_text(&p, dir, STACK, NULL);
    expect_problem(&p, true, TV_E_INPUT, HEAD, "tokenizer: {source: union}");
    assert_int_equal(count_problems(&p, true, ""), 1);
    planned_free(&p);
    merge(&p, "out", STACK "tokenizer: {source: union}\n", NULL);
    assert_int_equal(n_rows("out"), 18);
    assert_row("out", 15, "base", 15, EMBED);
    assert_row("out", 15, "chatml", 15, HEAD);
    assert_row("out", 16, "chatml", 16, EMBED);
    planned_free(&p);
    tvm_options_init(&o);
    o.truncate_embeddings = true;
    merge(&p, "out2", STACK, &o);
    assert_int_equal(n_rows("out2"), 16);
    assert_int_equal(config_int(&p, "vocab_size"), 16);
    planned_free(&p);
    /* Everything of one model, config.json of another. */
    plan_text(&p, dir,
              "merge_method: passthrough\nbase_model: $/base\nslices:\n"
              "- sources: [{model: $/chatml, layer_range: [0, 1]}]\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, EMBED, "tokenizer: {source: union}");
    planned_free(&p);
}

/* Equal sizes, other tokens: rows are merged by number, and a warning says
 * so. */
static void test_other_tokens(void **state)
{
    static const char *const other[] = {"<|im_end|>", "<|im_start|>"};
    struct planned p;
    (void)state;
    put_models();
    put_model("turned", 18, 16, other, 2, 6, false);
    plan_good(&p, dir,
              "merge_method: linear\nparameters: {weight: 1}\n"
              "models: [{model: $/chatml}, {model: $/turned}]\n",
              NULL);
    expect_problem(&p, false, TV_OK, "turned",
                   "'<|im_end|>', '<|im_start|>'; rows are merged by number");
    planned_free(&p);
    /* By token: nothing is mixed. */
    merge(&p, "out",
          "merge_method: linear\nparameters: {weight: 1}\n"
          "models: [{model: $/chatml, parameters: {weight: 0}},\n"
          "         {model: $/turned}]\ntokenizer_source: union\n",
          NULL);
    assert_row("out", 16, "turned", 17, EMBED);
    assert_row("out", 17, "turned", 16, HEAD);
    planned_free(&p);
}

/* Whatever names a token by its id follows it: in config.json, also where a
 * larger model says which token an image is, and in generation_config.json. */
static void test_ids(void **state)
{
    static const char *const other[] = {"<|im_end|>", "<|im_start|>"};
    static const char generation[] =
        "{\"eos_token_id\": [2, 17], \"suppress_tokens\": [3, 16, 99],\n"
        " \"begin_suppress_tokens\": [17], \"forced_eos_token_id\": 17,\n"
        " \"bad_words_ids\": [[16, 5], [17]], \"max_length\": 17,\n"
        " \"forced_decoder_ids\": [[17, 16]]}";
    static const char *const wants[] = {
        "\"eos_token_id\": [2, 16]",          "\"suppress_tokens\": [3, 17]",
        "\"begin_suppress_tokens\": [16]",    "\"forced_eos_token_id\": 16",
        "\"bad_words_ids\": [[17, 5], [16]]", "\"max_length\": 17",
        "\"forced_decoder_ids\": [[17, 17]]"};
    struct planned p;
    (void)state;
    more = ", \"image_token_index\": 16, \"audio_token_id\": 17, "
           "\"codebook_pad_token_id\": 16, \"video_token_id\": 99";
    put_models();
    more = "";
    put_model("turned", 18, 16, other, 2, 6, false);
    write_text(dir, "chatml/generation_config.json", generation);
    plan_good(&p, dir,
              "merge_method: linear\nparameters: {weight: 1}\n"
              "models: [{model: $/chatml}, {model: $/turned}]\n"
              "tokenizer: {source: $/turned}\n",
              NULL);
    assert_int_equal(config_int(&p, "image_token_index"), 17);
    assert_int_equal(config_int(&p, "audio_token_id"), 16);
    assert_int_equal(config_int(&p, "codebook_pad_token_id"), 16);
    assert_int_equal(config_int(&p, "video_token_id"), 99); /* had no row */
    {
        json_t *const j = json_of(&p, "generation_config.json");
        char *const text = tv_json_text(j, 0);
        assert_non_null(text);
        for (size_t i = 0; i < sizeof(wants) / sizeof(*wants); i++) {
            if (strstr(text, wants[i]) == NULL)
                fail_msg("no %s in %s", wants[i], text);
        }
        tv_free(text);
        json_decref(j);
    }
    planned_free(&p);
    /* A model that looks for a token that is gone sees no image again. */
    plan_text(&p, dir,
              "merge_method: linear\nparameters: {weight: 1}\n"
              "models: [{model: $/chatml}, {model: $/base}]\n"
              "tokenizer: {source: $/base}\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, "config.json",
                   "'image_token_index' 16 is '<|im_start|>'");
    planned_free(&p);
    plan_good(&p, dir,
              "merge_method: linear\nparameters: {weight: 1}\n"
              "models: [{model: $/chatml}, {model: $/base}]\n"
              "tokenizer: {source: $/base, tokens: {<|im_end|>: {source: "
              "$/chatml}, <|im_start|>: {source: $/chatml}}}\n",
              NULL);
    assert_int_equal(config_int(&p, "image_token_index"), 17);
    planned_free(&p);
}

/* What prepares images belongs to the model that gives config.json, whoever
 * gives the tokenizer, and whether or not anybody has one. */
static void test_processors(void **state)
{
    static const char name[] = "preprocessor_config.json";
    static const char *const recipes[] = {LINEAR2, LINEAR2
                                          "tokenizer: {source: $/chatml}\n"};
    struct planned p;
    (void)state;
    put_models();
    write_text(dir, "base/preprocessor_config.json", "{\"size\": 1}");
    write_text(dir, "chatml/preprocessor_config.json", "{\"size\": 2}");
    write_text(dir, "chatml/processor_config.json", "{\"size\": 3}");
    for (size_t i = 0; i < 3; i++) {
        struct tvm_options o;
        tvm_options_init(&o);
        o.truncate_embeddings = i != 1;
        if (i == 2) {
            static const char *const gone[] = {"base", "chatml"};
            for (size_t k = 0; k < 2; k++) {
                char *const path = tv_asprintf("%s/%s", dir, gone[k]);
                for (size_t f = 0; f < 2; f++) {
                    char *const file =
                        tv_path_join(path, f == 0 ? "tokenizer.json"
                                                  : "tokenizer_config.json");
                    assert_int_equal(remove(file), 0);
                    tv_free(file);
                }
                tv_free(path);
            }
        }
        plan_good(&p, dir, recipes[i % 2], &o);
        const struct tvm_side_file *const f = planned_file(&p, name);
        assert_non_null(f);
        assert_memory_equal(f->data, "{\"size\": 1}", 11);
        assert_null(planned_file(&p, "processor_config.json"));
        planned_free(&p);
    }
}

/* Tokenizers are held in memory, and --memory bounds it. */
static void test_memory(void **state)
{
    struct planned p;
    struct tvm_options o;
    struct tv_buf b;
    (void)state;
    put_models();
    tv_buf_init(&b, 16u << 20);
    tv_buf_str(&b, "{\"model\": {\"vocab\": {\"a\": 0}}, \"x\": \"");
    for (unsigned i = 0; i < 5u << 18; i++)
        tv_buf_str(&b, "xxxx");
    tv_buf_str(&b, "\"}");
    write_text(dir, "base/tokenizer.json", b.data);
    tv_buf_free(&b);
    tvm_options_init(&o);
    o.memory_bytes = 16u << 20;
    plan_text(&p, dir, LINEAR2 "tokenizer_source: union\n", &o);
    expect_problem(&p, true, TV_E_BUDGET, "base", "needs --memory 40");
    planned_free(&p);
}

static void test_kinds(void **state)
{
    struct planned p;
    char *path = NULL;
    (void)state;
    put_models();
    path = tv_path_join(dir, "chatml");
    put_tokenizer(path, 16, chatml, 2, "WordPiece");
    plan_text(&p, dir, LINEAR2 "tokenizer_source: union\n", NULL);
    expect_problem(&p, true, TV_E_INPUT, "", "different kinds");
    assert_int_equal(tvm_problems_code(&p.problems), TV_E_INPUT);
    planned_free(&p);
    {
        static const char *const ways[] = {"ByteLevel", "Metaspace"};
        static const char *const names[] = {"base", "chatml"};
        for (unsigned i = 0; i < 2; i++) {
            char text[200];
            char *const place = tv_path_join(dir, names[i]);
            (void)snprintf(text, sizeof(text),
                           "{\"decoder\": {\"type\": \"%s\"}, \"model\": "
                           "{\"vocab\": {\"a\": 0}}}",
                           ways[i]);
            write_text(place, "tokenizer.json", text);
            tv_free(place);
        }
    }
    plan_text(&p, dir, LINEAR2 "tokenizer_source: union\n", NULL);
    expect_problem(&p, true, TV_E_INPUT, "", "(byte-level BPE)");
    expect_problem(&p, true, TV_E_INPUT, "", "(metaspace BPE)");
    planned_free(&p);
    write_text(path, "tokenizer.json", "{\"model\": {\"vocab\": {\"a\": -1}}}");
    plan_text(&p, dir, LINEAR2 "tokenizer_source: union\n", NULL);
    expect_problem(&p, true, TV_E_CORRUPT, "chatml", "impossible id");
    planned_free(&p);
    tv_free(path);
    /* GPT-2's files without tokenizer.json. */
    path = tv_path_join(dir, "base");
    write_text(path, "vocab.json", "{}");
    {
        char *const file = tv_path_join(path, "tokenizer.json");
        assert_int_equal(remove(file), 0);
        tv_free(file);
    }
    plan_text(&p, dir, LINEAR2 "tokenizer_source: base\n", NULL);
    expect_problem(&p, true, TV_E_INPUT, ":4:", "(only vocab.json)");
    planned_free(&p);
    tv_free(path);
}

/* Tokens that have no row do not come back through the other files. */
static void test_beyond(void **state)
{
    struct planned p;
    json_t *j = NULL;
    (void)state;
    put_models();
    {
        static const char *const extra[] = {"<pad>"};
        put_model("short", 16, 16, extra, 1, 5, false);
    }
    write_text(dir, "short/special_tokens_map.json",
               "{\"pad_token\": {\"content\": \"<pad>\"}, \"bos_token\": "
               "\"<s>\", \"additional_special_tokens\": [\"<pad>\", \"t3\"]}");
    plan_good(&p, dir,
              "merge_method: linear\nparameters: {weight: 1}\n"
              "models: [{model: $/short}]\ntokenizer: {source: base}\n",
              NULL);
    assert_int_equal(id_of(&p, "<pad>"), -1);
    expect_problem(&p, false, TV_OK, "short", "beyond the 16 rows");
    j = json_of(&p, "tokenizer_config.json");
    assert_null(json_object_get(j, "pad_token"));
    assert_non_null(json_object_get(j, "bos_token"));
    json_decref(j);
    /* Numbers stay what they were. */
    assert_non_null(strstr(planned_file(&p, "tokenizer_config.json")->data,
                           ": 1000000000000000019884624838656"));
    assert_non_null(
        strstr(planned_file(&p, "tokenizer.json")->data, ": 1e-01"));
    j = json_of(&p, "special_tokens_map.json");
    assert_null(json_object_get(j, "pad_token"));
    assert_int_equal(
        json_array_size(json_object_get(j, "additional_special_tokens")), 1);
    json_decref(j);
    planned_free(&p);
}

/* The base's tokenizer knows tokens that only the donor has rows for; one of
 * them gets another id. Also where both have the same file. */
static void test_come_back(void **state)
{
    static const char *const three[] = {"<pad>", "<x>", "<|im_end|>"};
    struct planned p;
    (void)state;
    put_models();
    put_model("base3", 16, 16, three, 3, 6, false);
    put_model("full3", 19, 16, three, 3, 7, false);
    write_text(dir, "base3/tokenizer_config.json",
               "{\"eos_token\": \"<|im_end|>\", \"pad_token\": \"<pad>\", "
               "\"added_tokens_decoder\": {\"16\": {\"content\": \"<pad>\"}, "
               "\"17\": {\"content\": \"<x>\"}, "
               "\"18\": {\"content\": \"<|im_end|>\"}}}");
    merge(&p, "out",
          "merge_method: linear\nparameters: {weight: 1}\n"
          "models: [{model: $/base3}, {model: $/chatml}]\n"
          "tokenizer_source: union\n",
          NULL);
    assert_int_equal(id_of(&p, "<|im_start|>"), 16);
    assert_int_equal(id_of(&p, "<|im_end|>"), 17);
    assert_int_equal(id_of(&p, "<pad>"), -1);
    assert_int_equal(n_rows("out"), 18);
    assert_row("out", 17, "chatml", 17, EMBED);
    {
        json_t *j = json_of(&p, "tokenizer.json");
        assert_int_equal(json_array_size(json_object_get(j, "added_tokens")),
                         2);
        json_decref(j);
        j = json_of(&p, "tokenizer_config.json");
        assert_non_null(json_object_get(j, "eos_token"));
        assert_null(json_object_get(j, "pad_token"));
        const json_t *const map = json_object_get(j, "added_tokens_decoder");
        assert_int_equal(json_object_size(map), 2);
        assert_string_equal(json_string_value(json_object_get(
                                json_object_get(map, "17"), "content")),
                            "<|im_end|>");
        json_decref(j);
    }
    planned_free(&p);
    merge(&p, "out2",
          "merge_method: linear\nparameters: {weight: 1}\n"
          "models: [{model: $/base3}, {model: $/full3}]\n"
          "tokenizer_source: union\n",
          NULL);
    assert_int_equal(n_rows("out2"), 19);
    assert_int_equal(id_of(&p, "<|im_end|>"), 18);
    assert_row("out2", 18, "full3", 18, HEAD);
    planned_free(&p);
}

/* ---- bytes ----------------------------------------------------------------
 */

/* Two byte-level tokenizers against the union that was checked with the Rust
 * library (tools/check_vocabulary.py). */
static void test_bpe_union(void **state)
{
    static const char *const names[] = {"a", "b"};
    struct planned p;
    struct tv_error err;
    char *want = NULL;
    size_t n_want = 0;
    (void)state;
    for (unsigned i = 0; i < 2; i++) {
        struct tiny_model m;
        char name[40];
        char *data = NULL;
        size_t n = 0;
        tiny_model_init(&m);
        m.layers = 1;
        m.vocab = 340;
        char *const path = tiny_model_write(dir, names[i], &m);
        (void)snprintf(name, sizeof(name), "tokenizers/union-%s.json",
                       names[i]);
        char *const file = test_data(name);
        assert_ok(tv_file_read(file, 1u << 20, &err, &data, &n), &err);
        tv_free(tmpdir_write(path, "tokenizer.json", data, n));
        tv_free(data);
        tv_free(file);
        tv_free(path);
    }
    plan_good(&p, dir,
              "merge_method: linear\nparameters: {weight: 1}\n"
              "models: [{model: $/a}, {model: $/b}]\n"
              "tokenizer: {source: union}\n",
              NULL);
    char *const file = test_data("tokenizers/union.json");
    assert_ok(tv_file_read(file, 1u << 20, &err, &want, &n_want), &err);
    const struct tvm_side_file *const f = planned_file(&p, "tokenizer.json");
    assert_int_equal(f->n, n_want);
    assert_memory_equal(f->data, want, n_want);
    tv_free(want);
    tv_free(file);
    planned_free(&p);
}

static void test_independence(void **state)
{
    static const char recipe[] =
        "merge_method: ties\nbase_model: $/base\nparameters: {density: 0.5}\n"
        "models: [{model: $/chatml, parameters: {weight: 0.6}},\n"
        "         {model: $/padded, parameters: {weight: 0.4}}]\n"
        "tokenizer: {source: union, pad_to_multiple_of: 32}\n";
    struct tv_hash first = {0, 0};
    struct tv_hash plan_hash = {0, 0};
    (void)state;
    put_models();
    for (unsigned i = 0; i < 4; i++) {
        struct planned p;
        struct tvm_options o;
        struct tvm_result result;
        struct tv_error err;
        char name[16];
        tvm_options_init(&o);
        o.sync = false;
        o.threads = 1 + i;
        o.memory_bytes = i % 2 == 0 ? 16u << 20 : 512u << 20;
        o.kernels = i < 2 ? tvk_table_for(TVK_REF) : NULL;
        (void)snprintf(name, sizeof(name), "i%u", i);
        char *const out = tv_path_join(dir, name);
        o.out_dir = out;
        plan_good(&p, dir, recipe, &o);
        assert_ok(tvm_run(p.plan, NULL, &result, &err), &err);
        if (i == 0) {
            first = result.digest;
            plan_hash = p.plan->hash;
        }
        assert_true(tv_hash_equal(first, result.digest));
        assert_true(tv_hash_equal(plan_hash, p.plan->hash));
        /* The same again: nothing to do. */
        planned_free(&p);
        plan_good(&p, dir, recipe, &o);
        assert_ok(tvm_run(p.plan, NULL, &result, &err), &err);
        assert_true(result.already_done);
        planned_free(&p);
        tv_free(out);
    }
    {
        struct planned p;
        /* Another rule is another plan. */
        plan_good(&p, dir,
                  "merge_method: ties\nbase_model: $/base\n"
                  "parameters: {density: 0.5}\n"
                  "models: [{model: $/chatml, parameters: {weight: 0.6}},\n"
                  "         {model: $/padded, parameters: {weight: 0.4}}]\n"
                  "tokenizer: {source: union, pad_to_multiple_of: 32,\n"
                  "  tokens: {t3: {source: $/chatml, force: true}}}\n",
                  NULL);
        assert_false(tv_hash_equal(plan_hash, p.plan->hash));
        planned_free(&p);
    }
}

static void stop(void *arg, const struct tvm_progress *p)
{
    if (p->n_done == 5)
        *(atomic_int *)arg = 1;
}

/* Stopped and resumed, from a store, into a store: the same bytes. */
static void test_ways(void **state)
{
    static const char text[] =
        "merge_method: linear\nbase_model: %sbase\nparameters: {weight: 1}\n"
        "models: [{model: %sbase}, {model: %spadded}, {model: %schatml}]\n"
        "tokenizer: {source: union, pad_to_multiple_of: 5}\n";
    static const char *const names[] = {"base", "chatml", "padded"};
    atomic_int cancel = 0;
    const struct tvm_run_hooks hooks = {
        .progress = stop, .arg = (void *)&cancel, .cancel = &cancel};
    char recipe[512];
    struct tvm_options o;
    struct planned p;
    struct tvm_result result;
    struct tv_error err;
    struct tv_hash want;
    tv_store *store = NULL;
    (void)state;

    put_models();
    (void)snprintf(recipe, sizeof(recipe), text, "$/", "$/", "$/", "$/");
    merge(&p, "out", recipe, NULL);
    planned_free(&p);
    tvm_options_init(&o);
    char *const out = tv_path_join(dir, "out2");
    o.out_dir = out;
    o.sync = false;
    o.group_bytes = 1;
    o.threads = 1;
    plan_good(&p, dir, recipe, &o);
    assert_code(tvm_run(p.plan, &hooks, &result, &err), TV_E_INTERRUPTED, &err);
    planned_free(&p);
    plan_good(&p, dir, recipe, &o);
    assert_ok(tvm_run(p.plan, NULL, &result, &err), &err);
    assert_true(result.n_resumed > 0);
    want = result.digest;
    planned_free(&p);
    /* Another block is another merge, and a refusal names it. */
    (void)snprintf(recipe, sizeof(recipe),
                   "merge_method: linear\nbase_model: $/base\n"
                   "parameters: {weight: 1}\nmodels: [{model: $/base}, "
                   "{model: $/padded}, {model: $/chatml}]\n"
                   "tokenizer: {source: union, pad_to_multiple_of: 7}\n");
    plan_good(&p, dir, recipe, &o);
    assert_code(tvm_run(p.plan, NULL, &result, &err), TV_E_CHANGED, &err);
    assert_message(&err, "pad_to_multiple_of");
    planned_free(&p);
    tv_free(out);
    assert_row("out2", 16, "padded", 16, EMBED);

    char *const path = tv_path_join(dir, "s");
    assert_ok(tv_store_create(path, 0, &err), &err);
    assert_ok(tv_store_open(path, NULL, &err, &store), &err);
    for (unsigned i = 0; i < 3; i++) {
        struct tv_transfer t = {.sync = false};
        tv_input *in = NULL;
        char *const model = tv_path_join(dir, names[i]);
        assert_ok(tv_input_open_path(model, &err, &in), &err);
        assert_ok(tv_import(store, names[i], in, &t, &err), &err);
        tv_input_close(in);
        tv_free(model);
    }
    (void)snprintf(recipe, sizeof(recipe), text,
                   "store:", "store:", "store:", "store:");
    tvm_options_init(&o);
    o.store = store;
    o.into = "merged";
    plan_good(&p, dir, recipe, &o);
    assert_ok(tvm_run(p.plan, NULL, &result, &err), &err);
    assert_true(tv_hash_equal(result.digest, want));
    planned_free(&p);
    tv_store_close(store);
    tv_free(path);
}

/* ---- no memory ------------------------------------------------------------
 */

struct want { /* of a plan with all the memory that it asks for */
    char *recipe;
    struct tv_hash hash;
};

static enum tv_err plan_once(void *arg, struct tv_error *err)
{
    struct want *const w = arg;
    struct tvm_problems problems;
    struct tvm_options o;
    struct tvm_plan *plan = NULL;
    tvm_recipe *r = NULL;
    enum tv_err rc = TV_OK;

    tvm_problems_init(&problems);
    tvm_options_init(&o);
    rc = tvm_recipe_load(w->recipe, &problems, err, &r);
    if (rc == TV_OK)
        rc = tvm_plan_make(r, &o, &problems, err, &plan);
    if (rc == TV_OK) {
        /* Whoever goes on without some memory decides the same. */
        if (problems.n_errors > 0)
            print_problems(&problems);
        assert_int_equal(problems.n_errors, 0);
        if (w->hash.lo == 0 && w->hash.hi == 0)
            w->hash = plan->hash;
        assert_true(tv_hash_equal(w->hash, plan->hash));
    }
    tvm_plan_free(plan);
    tvm_recipe_free(r);
    tvm_problems_free(&problems);
    return rc;
}

static void test_no_memory(void **state)
{
    static const char text[] =
        "merge_method: linear\nparameters: {weight: 1}\n"
        "models: [{model: %s/base3}, {model: %s/chatml}]\n"
        "chat_template: auto\n"
        "tokenizer: {source: union, tokens: {t4: {source: {kind: zero}}}}\n";
    static const char *const three[] = {"<pad>", "<x>", "<|im_end|>"};
    struct want w = {NULL, {0, 0}};
    struct tv_error err;
    char recipe[1024];
    (void)state;

    put_model("base3", 5, 5, three, 3, 6, false);
    put_model("chatml", 7, 5, chatml, 2, 2, false);
    write_text(dir, "base3/tokenizer_config.json",
               "{\"pad_token\": \"<pad>\", \"chat_template\": \"{{ x }}\", "
               "\"added_tokens_decoder\": {\"5\": {\"content\": \"<pad>\"}}}");
    (void)snprintf(recipe, sizeof(recipe), text, dir, dir);
    w.recipe = tmpdir_write(dir, "r.yml", recipe, strlen(recipe));
    assert_ok(plan_once(&w, &err), &err);
    assert_true(faults_loop_alloc(plan_once, &w, true) > 300);
    tv_free(w.recipe);
}

/* ---- chat templates -------------------------------------------------------
 */

static void test_chat(void **state)
{
    struct planned p;
    json_t *j = NULL;
    (void)state;
    put_models();
    plan_good(&p, dir,
              LINEAR2 "tokenizer_source: union\nchat_template: chatml\n", NULL);
    assert_non_null(
        strstr(planned_file(&p, "chat_template.jinja")->data, "<|im_start|>"));
    j = json_of(&p, "tokenizer_config.json");
    assert_string_equal(json_string_value(json_object_get(j, "chat_template")),
                        planned_file(&p, "chat_template.jinja")->data);
    json_decref(j);
    assert_int_equal(count_problems(&p, false, "no token of the output"), 0);
    planned_free(&p);
    plan_good(&p, dir,
              LINEAR2 "tokenizer_source: base\nchat_template: chatml\n", NULL);
    assert_int_equal(count_problems(&p, false, "no token of the output"), 2);
    planned_free(&p);
    write_text(dir, "base/chat_template.jinja", "{{ one }}");
    write_text(dir, "chatml/tokenizer_config.json",
               "{\"chat_template\": \"{{ two }}\"}");
    write_text(dir, "beyond/tokenizer_config.json",
               "{\"chat_template\": [{\"name\": \"default\", \"template\": "
               "\" {{ two }}\\n\"}]}");
    plan_good(&p, dir, LINEAR3 "tokenizer_source: base\nchat_template: auto\n",
              NULL);
    assert_string_equal(planned_file(&p, "chat_template.jinja")->data,
                        "{{ two }}");
    planned_free(&p);
    plan_text(&p, dir,
              LINEAR2 "tokenizer_source: base\nchat_template: chatlm\n", NULL);
    expect_problem(&p, true, TV_E_USAGE, ":6:", "did you mean 'chatml'");
    planned_free(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_union, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_base, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_model, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_task_vector, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_mean, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_padding, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_tokens, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_bad_rules, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_no_block, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_stack, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_other_tokens, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_ids, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_processors, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_memory, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_kinds, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_beyond, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_come_back, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_bpe_union, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_independence, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_ways, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_no_memory, set_up, tear_down),
        cmocka_unit_test_setup_teardown(test_chat, set_up, tear_down),
    };
    json_set_alloc_funcs(tv_alloc, tv_free);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
