/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_plan.c - plans of tiny models: which tensor comes from where, as what,
 * into which file; and every reason to refuse.
 */
#include "plan_fixture.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>

#include <jansson.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "exec.h"
#include "state.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"

static char *dir;

static void model(const char *name, const struct tiny_model *m)
{
    tv_free(tiny_model_write(dir, name, m));
}

static int setup(void **state)
{
    struct tiny_model m;
    (void)state;
    dir = tmpdir_make();
    if (dir == NULL)
        return 1;
    tiny_model_init(&m);
    m.layers = 4;
    m.tokenizer = true;
    model("a", &m);
    m.tokenizer = false;
    m.seed = 2;
    model("b", &m);
    m.seed = 3;
    model("c", &m);
    tv_free(tiny_adapter_write(dir, "lora", &m, 2, 4, 9));
    tv_free(tiny_adapter_write(dir, "lora2", &m, 3, 3, 10));
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    tmpdir_remove(dir);
    return 0;
}

#define Q(l)   "model.layers." #l ".self_attn.q_proj.weight"
#define EMBED  "model.embed_tokens.weight"
#define NORM   "model.norm.weight"
#define HEAD   "lm_head.weight"
#define LINEAR "merge_method: linear\nparameters: {weight: 1}\n"
#define TIES   "merge_method: ties\nparameters: {weight: 1, density: 0.5}\n"
#define AB     "models: [{model: $/a}, {model: $/b}]\n"

/* ---- what comes from where ------------------------------------------------
 */

static void test_whole_models(void **state)
{
    struct planned p;
    uint64_t bytes = 0;
    (void)state;
    plan_good(&p, dir, LINEAR AB, NULL);
    /* 3 + 4 * 9 tensors, in layer order. */
    assert_int_equal(p.plan->n_tensors, 39);
    for (size_t i = 1; i < p.plan->n_tensors; i++)
        assert_true(tv_name_compare(p.plan->tensors[i - 1].name,
                                    p.plan->tensors[i].name) < 0);
    const struct tvm_tensor *const t = planned_tensor(&p, Q(3));
    assert_int_equal(t->n_sources, 2);
    assert_int_equal(t->sources[0].input, 0);
    assert_int_equal(t->sources[1].input, 1);
    assert_string_equal(t->sources[1].tensor->name, Q(3));
    assert_int_equal(t->base, -1);
    assert_int_equal(t->action, TVM_MERGE);
    assert_int_equal(t->dtype, TV_BF16);
    assert_int_equal(t->rank, 2);
    assert_int_equal(t->shape[0], 8);
    assert_int_equal(t->n_elems, 64);
    assert_int_equal(t->bytes, 128);
    assert_true(t->name_hash == tv_hash64(Q(3), strlen(Q(3))));
    for (size_t i = 0; i < p.plan->n_tensors; i++)
        bytes += p.plan->tensors[i].bytes;
    assert_int_equal(p.plan->bytes_written, bytes);
    assert_int_equal(p.plan->bytes_read, 2 * bytes);
    assert_true(p.plan->peak_disk_bytes > bytes);
    assert_true(p.plan->peak_scratch_bytes > 0);
    assert_string_equal(p.plan->architecture, "LlamaForCausalLM");
    assert_string_equal(p.plan->method_name, "linear");
    planned_free(&p);
}

static void test_base(void **state)
{
    struct planned p;
    (void)state;
    /* Appended when it is not listed, */
    plan_good(&p, dir, TIES "base_model: $/c\n" AB, NULL);
    const struct tvm_tensor *t = planned_tensor(&p, EMBED);
    assert_int_equal(t->n_sources, 3);
    assert_int_equal(t->base, 2);
    assert_true(t->sources[2].is_base);
    assert_string_equal(p.plan->inputs[t->sources[2].input].ref +
                            strlen(p.plan->inputs[2].ref) - 1,
                        "c");
    planned_free(&p);
    /* in its place when it is. */
    plan_good(&p, dir, TIES "base_model: $/a\n" AB, NULL);
    t = planned_tensor(&p, EMBED);
    assert_int_equal(t->n_sources, 2);
    assert_int_equal(t->base, 0);
    planned_free(&p);
    /* A base alone is copied. */
    plan_good(&p, dir, TIES "base_model: $/a\nmodels: [{model: $/a}]\n", NULL);
    t = planned_tensor(&p, EMBED);
    assert_int_equal(t->action, TVM_COPY);
    planned_free(&p);
    /* Another spelling of the same place is another model. */
    plan_good(&p, dir, TIES "base_model: $/./a\n" AB, NULL);
    assert_int_equal(planned_tensor(&p, EMBED)->n_sources, 3);
    expect_problem(&p, false, TV_OK, "recipe.yml:3:13", "the same files");
    planned_free(&p);
}

static void test_slices(void **state)
{
    struct planned p;
    (void)state;
    plan_good(&p, dir,
              "merge_method: passthrough\nslices:\n"
              "- sources: [{model: $/a, layer_range: [0, 3]}]\n"
              "- sources: [{model: $/b, layer_range: [1, 4]}]\n",
              NULL);
    assert_int_equal(p.plan->n_tensors, 3 + 6 * 9);
    const struct tvm_tensor *t = planned_tensor(&p, Q(3));
    assert_int_equal(t->action, TVM_COPY);
    assert_int_equal(t->sources[0].input, 1);
    assert_string_equal(t->sources[0].tensor->name, Q(1));
    t = planned_tensor(&p, Q(2));
    assert_int_equal(t->sources[0].input, 0);
    assert_string_equal(t->sources[0].tensor->name, Q(2));
    assert_false(planned_has(&p, Q(6)));
    assert_int_equal(planned_tensor(&p, EMBED)->sources[0].input, 0);
    assert_int_equal(planned_tensor(&p, NORM)->sources[0].input, 1);
    assert_int_equal(planned_tensor(&p, HEAD)->sources[0].input, 1);
    const struct tvm_side_file *const config = planned_file(&p, "config.json");
    assert_non_null(strstr(config->data, "\"num_hidden_layers\": 6"));
    planned_free(&p);

    /* An empty last slice chooses who supplies the head; all its sources do
     * (mergekit drops those beyond the first slice's number). */
    plan_good(&p, dir,
              LINEAR "slices:\n"
                     "- sources: [{model: $/a, layer_range: [0, 4]}]\n"
                     "- sources: [{model: $/b, layer_range: [4, 4]}, "
                     "{model: $/c, layer_range: [4, 4]}]\n",
              NULL);
    t = planned_tensor(&p, HEAD);
    assert_int_equal(t->n_sources, 2);
    assert_int_equal(t->sources[1].input, 2);
    assert_int_equal(planned_tensor(&p, EMBED)->n_sources, 1);
    assert_int_equal(p.plan->n_tensors, 39);
    planned_free(&p);
}

static void test_layer_lists(void **state)
{
    struct planned p;
    struct tiny_model m;
    json_t *j = NULL;
    struct tv_error err;
    (void)state;
    tiny_model_init(&m);
    m.layers = 3;
    m.config_more = "\"layer_types\": [\"x\", \"y\", \"z\"], "
                    "\"eos_token_id\": [1, 2, 3]";
    model("typed", &m);
    m.config_more = "\"layer_types\": [\"a\", \"b\", \"c\"]";
    model("typed2", &m);
    plan_good(&p, dir,
              "merge_method: passthrough\nslices:\n"
              "- sources: [{model: $/typed, layer_range: [1, 3]}]\n"
              "- sources: [{model: $/typed2, layer_range: [0, 2]}]\n",
              NULL);
    const struct tvm_side_file *const f = planned_file(&p, "config.json");
    assert_ok(tv_json_parse_exact(f->data, f->n, "config.json", &err, &j),
              &err);
    json_t *const want = json_pack("[s, s, s, s]", "y", "z", "a", "b");
    assert_true(json_equal(json_object_get(j, "layer_types"), want));
    assert_int_equal(json_array_size(json_object_get(j, "eos_token_id")), 3);
    json_decref(want);
    json_decref(j);
    planned_free(&p);
    /* A model without the list. */
    plan_good(&p, dir,
              "merge_method: passthrough\nslices:\n"
              "- sources: [{model: $/typed, layer_range: [1, 3]}]\n"
              "- sources: [{model: $/b, layer_range: [0, 2]}]\n",
              NULL);
    expect_problem(&p, false, TV_OK, "config.json", "'layer_types' has one");
    planned_free(&p);
}

static void test_adapters(void **state)
{
    struct planned p;
    (void)state;
    plan_good(&p, dir,
              TIES "base_model: $/a\nmodels:\n- model: $/a+$/lora\n"
                   "- model: $/a+$/lora2*0.5+$/lora\n- model: $/a+$/lora*0\n",
              NULL);
    assert_int_equal(p.plan->n_inputs, 4);
    assert_ptr_equal(p.plan->inputs[0].input, p.plan->inputs[3].input);
    const struct tvm_tensor *t = planned_tensor(&p, Q(1));
    assert_int_equal(t->n_sources, 4);
    assert_int_equal(t->sources[0].n_adapters, 1);
    const struct tv_adapter_use *l = &t->sources[0].adapters[0];
    assert_string_equal(l->module->module, "model.layers.1.self_attn.q_proj");
    assert_int_equal(l->module->r, 2);
    assert_true(l->weight == 1 && l->module->scaling == 2);
    assert_ptr_equal(tv_input_find(l->from, l->module->a->name), l->module->a);
    assert_int_equal(t->sources[1].n_adapters, 2);
    assert_int_equal(t->sources[1].adapters[0].module->r, 3);
    assert_true(t->sources[1].adapters[0].weight == 0.5);
    assert_int_equal(t->sources[1].adapters[1].module->r, 2);
    assert_int_equal(t->sources[2].n_adapters, 0); /* factor 0 */
    assert_int_equal(t->sources[3].n_adapters, 0);
    assert_int_equal(planned_tensor(&p, EMBED)->sources[0].n_adapters, 0);
    /* Inputs differ by adapter and by its factor. */
    assert_false(tv_hash_equal(p.plan->inputs[0].fingerprint,
                               p.plan->inputs[3].fingerprint));
    assert_false(tv_hash_equal(p.plan->inputs[0].fingerprint,
                               p.plan->inputs[1].fingerprint));
    assert_false(tv_hash_equal(p.plan->inputs[0].fingerprint,
                               p.plan->inputs[2].fingerprint));
    /* mergekit knows neither factors nor two adapters. */
    assert_null(planned_file(&p, "mergekit_config.yml"));
    planned_free(&p);

    plan_good(&p, dir,
              "merge_method: passthrough\nmodels: [{model: $/a+$/lora}]\n",
              NULL);
    assert_int_equal(planned_tensor(&p, Q(0))->action, TVM_MERGE);
    assert_int_equal(planned_tensor(&p, EMBED)->action, TVM_COPY);
    assert_non_null(planned_file(&p, "mergekit_config.yml"));
    planned_free(&p);

    plan_text(&p, dir, LINEAR "models: [{model: $/lora}, {model: $/a+$/b}]\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, "recipe.yml:3:18", "is an adapter");
    expect_problem(&p, true, TV_E_INPUT, "recipe.yml:3:", "is no adapter");
    planned_free(&p);
}

static void test_adapter_does_not_fit(void **state)
{
    struct planned p;
    struct tiny_model m;
    (void)state;
    tiny_model_init(&m);
    m.layers = 6;
    tv_free(tiny_adapter_write(dir, "deep", &m, 2, 4, 9));
    plan_text(&p, dir, LINEAR "models: [{model: $/a+$/deep}]\n", NULL);
    expect_problem(&p, true, TV_E_INPUT, "recipe.yml:3:18", "layers.4");
    planned_free(&p);
}

/* ---- tied heads -----------------------------------------------------------
 */

static void test_tied(void **state)
{
    struct planned p;
    struct tiny_model m;
    (void)state;
    tiny_model_init(&m);
    m.layers = 4;
    m.tied = true;
    m.seed = 11;
    model("t1", &m);
    m.seed = 12;
    model("t2", &m);

    plan_good(&p, dir, LINEAR "models: [{model: $/t1}, {model: $/t2}]\n", NULL);
    assert_false(planned_has(&p, HEAD));
    assert_non_null(strstr(planned_file(&p, "config.json")->data,
                           "\"tie_word_embeddings\": true"));
    planned_free(&p);

    /* One untied: the tied one lends its embedding, and the config says so.
     * Filters see the head's name. */
    plan_good(&p, dir,
              "merge_method: linear\nparameters: {weight: [{filter: lm_head, "
              "value: 3}, {value: 1}]}\n"
              "models: [{model: $/t1}, {model: $/b}]\n",
              NULL);
    const struct tvm_tensor *const t = planned_tensor(&p, HEAD);
    assert_int_equal(t->n_sources, 2);
    assert_string_equal(t->sources[0].tensor->name, EMBED);
    assert_string_equal(t->sources[1].tensor->name, HEAD);
    assert_true(planned_of(&p, HEAD, 0, "weight") == 3);
    assert_true(planned_of(&p, EMBED, 0, "weight") == 1);
    assert_non_null(strstr(planned_file(&p, "config.json")->data,
                           "\"tie_word_embeddings\": false"));
    expect_problem(&p, false, TV_OK, "config.json", "becomes false");
    planned_free(&p);

    /* The donor's config stays when it was untied already. */
    plan_good(&p, dir, LINEAR "models: [{model: $/b}, {model: $/t1}]\n", NULL);
    assert_int_equal(count_problems(&p, false, "tie_word"), 0);
    planned_free(&p);

    /* Tied, but stored all the same with other values: those count. */
    m.keep_head = true;
    m.seed = 13;
    model("t3", &m);
    plan_good(&p, dir, LINEAR "models: [{model: $/t3}, {model: $/t1}]\n", NULL);
    assert_int_equal(planned_tensor(&p, HEAD)->n_sources, 2);
    assert_string_equal(planned_tensor(&p, HEAD)->sources[0].tensor->name,
                        HEAD);
    assert_string_equal(planned_tensor(&p, HEAD)->sources[1].tensor->name,
                        EMBED);
    expect_problem(&p, false, TV_OK, "t3", "with other values");
    expect_problem(&p, false, TV_OK, "config.json", "becomes false");
    planned_free(&p);

    /* Tied and stored with the same values: no head. */
    {
        unsigned char same[16 * 8 * 2];
        const struct tiny_extra head = {HEAD, TV_BF16, 2, {16, 8}, same};
        for (uint64_t i = 0; i < 16 * 8; i++) {
            const float f = (float)tiny_value(14, EMBED, i);
            memcpy(&same[2 * i], (const unsigned char *)&f + 2, 2);
        }
        m.keep_head = false;
        m.seed = 14;
        m.extra = &head;
        m.n_extra = 1;
        model("t4", &m);
    }
    plan_good(&p, dir, LINEAR "models: [{model: $/t4}, {model: $/t1}]\n", NULL);
    assert_false(planned_has(&p, HEAD));
    assert_non_null(strstr(planned_file(&p, "config.json")->data,
                           "\"tie_word_embeddings\": true"));
    planned_free(&p);
    plan_good(&p, dir, LINEAR "models: [{model: $/t4}, {model: $/b}]\n", NULL);
    assert_string_equal(planned_tensor(&p, HEAD)->sources[0].tensor->name,
                        EMBED);
    planned_free(&p);

    /* Head from an untied slice under a tied donor. */
    plan_good(&p, dir,
              "merge_method: passthrough\nslices:\n"
              "- sources: [{model: $/t1, layer_range: [0, 2]}]\n"
              "- sources: [{model: $/b, layer_range: [2, 4]}]\n",
              NULL);
    expect_problem(&p, false, TV_OK, "config.json", "becomes false");
    planned_free(&p);
    plan_good(&p, dir,
              "merge_method: passthrough\nslices:\n"
              "- sources: [{model: $/b, layer_range: [0, 2]}]\n"
              "- sources: [{model: $/t1, layer_range: [2, 4]}]\n",
              NULL);
    assert_string_equal(planned_tensor(&p, HEAD)->sources[0].tensor->name,
                        EMBED);
    assert_string_equal(
        p.plan->inputs[planned_tensor(&p, HEAD)->sources[0].input].ref +
            strlen(dir),
        "/t1");
    assert_int_equal(count_problems(&p, false, "tie_word"), 0);
    planned_free(&p);

    /* Two tied models over each other: the upper one's embedding is the head.
     */
    plan_good(&p, dir,
              "merge_method: passthrough\nslices:\n"
              "- sources: [{model: $/t1, layer_range: [0, 2]}]\n"
              "- sources: [{model: $/t2, layer_range: [2, 4]}]\n",
              NULL);
    assert_string_equal(
        p.plan->inputs[planned_tensor(&p, HEAD)->sources[0].input].ref +
            strlen(dir),
        "/t2");
    expect_problem(&p, false, TV_OK, "config.json", "becomes false");
    planned_free(&p);
}

/* ---- dtypes ---------------------------------------------------------------
 */

static void test_dtypes(void **state)
{
    struct planned p;
    struct tiny_model m;
    (void)state;
    tiny_model_init(&m);
    m.layers = 4;
    m.seed = 21;
    m.dtype = TV_F16;
    m.dtype_key = "dtype";
    model("half", &m);
    m.dtype = TV_F32;
    m.dtype_key = NULL;
    model("full", &m);

    plan_good(&p, dir, LINEAR AB "dtype: float32\n", NULL);
    assert_int_equal(planned_tensor(&p, Q(0))->dtype, TV_F32);
    assert_non_null(strstr(planned_file(&p, "config.json")->data,
                           "\"torch_dtype\": \"float32\""));
    planned_free(&p);
    plan_good(&p, dir, LINEAR AB "dtype: float32\nout_dtype: float16\n", NULL);
    assert_int_equal(planned_tensor(&p, Q(0))->dtype, TV_F16);
    planned_free(&p);
    /* bf16 + f16 -> f32; the key that is there is edited. */
    plan_good(&p, dir, LINEAR "models: [{model: $/half}, {model: $/a}]\n",
              NULL);
    assert_int_equal(planned_tensor(&p, Q(0))->dtype, TV_F32);
    const char *config = planned_file(&p, "config.json")->data;
    assert_non_null(strstr(config, "\"dtype\": \"float32\""));
    assert_null(strstr(config, "torch_dtype"));
    planned_free(&p);
    plan_good(&p, dir, LINEAR "models: [{model: $/half}, {model: $/full}]\n",
              NULL);
    assert_int_equal(planned_tensor(&p, Q(0))->dtype, TV_F32);
    planned_free(&p);
    /* No key, no edit. */
    plan_good(&p, dir, LINEAR "models: [{model: $/full}]\ndtype: float16\n",
              NULL);
    config = planned_file(&p, "config.json")->data;
    assert_null(strstr(config, "dtype"));
    assert_non_null(strstr(config, "1e-05")); /* byte for byte */
    /* A fold with another dtype is no copy. */
    assert_int_equal(planned_tensor(&p, Q(0))->action, TVM_MERGE);
    planned_free(&p);
    plan_good(&p, dir, LINEAR "models: [{model: $/full}]\n", NULL);
    assert_int_equal(planned_tensor(&p, Q(0))->action, TVM_COPY);
    planned_free(&p);
}

static void extra_model(const char *name, enum tv_dtype t, const void *data,
                        const char *tensor, uint64_t seed)
{
    struct tiny_model m;
    const struct tiny_extra e = {tensor, t, 1, {4, 0, 0, 0}, data};
    tiny_model_init(&m);
    m.layers = 4;
    m.seed = seed;
    m.extra = &e;
    m.n_extra = 1;
    model(name, &m);
}

static void test_not_numbers(void **state)
{
    static const int64_t one[4] = {1, 2, 3, 4};
    static const int64_t two[4] = {1, 2, 3, 5};
    static const double f64[4] = {1, 2, 3, 4};
    static const double g64[4] = {1, 2, 3, 8};
    struct planned p;
    (void)state;
    extra_model("i1", TV_I64, one, "model.layers.0.ids", 31);
    extra_model("i2", TV_I64, one, "model.layers.0.ids", 32);
    extra_model("i3", TV_I64, two, "model.layers.0.ids", 33);
    plan_good(&p, dir,
              LINEAR "models: [{model: $/i1}, {model: $/i2}]\ndtype: float32\n",
              NULL);
    const struct tvm_tensor *t = planned_tensor(&p, "model.layers.0.ids");
    assert_int_equal(t->action, TVM_COPY);
    assert_int_equal(t->dtype, TV_I64);
    planned_free(&p);
    plan_text(&p, dir, LINEAR "models: [{model: $/i1}, {model: $/i3}]\n", NULL);
    expect_problem(&p, true, TV_E_UNSUPPORTED, "model.layers.0.ids", "I64");
    planned_free(&p);

    extra_model("d1", TV_F64, f64, "model.layers.0.scale", 34);
    extra_model("d2", TV_F64, g64, "model.layers.0.scale", 35);
    plan_text(&p, dir, LINEAR "models: [{model: $/d1}, {model: $/d2}]\n", NULL);
    expect_problem(&p, true, TV_E_UNSUPPORTED, "model.layers.0.scale",
                   "only F16, BF16 and F32");
    planned_free(&p);
    /* The method takes one of them as it is: fine. */
    plan_good(&p, dir,
              "merge_method: slerp\nbase_model: $/d1\nmodels: [{model: $/d1}, "
              "{model: $/d2}]\nparameters: {t: 1}\n",
              NULL);
    t = planned_tensor(&p, "model.layers.0.scale");
    assert_int_equal(t->action, TVM_COPY);
    assert_int_equal(t->copy_of, 1);
    assert_int_equal(t->dtype, TV_F64);
    planned_free(&p);

    /* Rotary caches are no weights: the base's, whatever the recipe says. */
    extra_model("r1", TV_F32, one, "model.rotary_emb.inv_freq", 36);
    extra_model("r2", TV_F32, two, "model.rotary_emb.inv_freq", 37);
    plan_good(&p, dir,
              LINEAR "models: [{model: $/r1}, {model: $/r2}]\ndtype: float16\n",
              NULL);
    t = planned_tensor(&p, "model.rotary_emb.inv_freq");
    assert_int_equal(t->action, TVM_COPY);
    assert_int_equal(t->dtype, TV_F32);
    assert_int_equal(count_problems(&p, false, "buffer differs"), 0);
    planned_free(&p);
    extra_model("r3", TV_F32, f64, "model.rotary_emb.inv_freq", 38);
    plan_good(&p, dir, LINEAR "models: [{model: $/r1}, {model: $/r3}]\n", NULL);
    expect_problem(&p, false, TV_OK, "inv_freq", "buffer differs");
    planned_free(&p);
}

/* ---- refusals -------------------------------------------------------------
 */

static void test_missing_and_shapes(void **state)
{
    struct planned p;
    struct tiny_model m;
    (void)state;
    tiny_model_init(&m);
    m.layers = 4;
    m.skip = Q(2);
    model("holed", &m);
    plan_text(&p, dir, LINEAR "models: [{model: $/a}, {model: $/holed}]\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, Q(2), "has no such tensor");
    assert_int_equal(p.problems.n_errors, 1);
    planned_free(&p);
    /* The first model lacking it does not hide it either. */
    plan_text(&p, dir, LINEAR "models: [{model: $/holed}, {model: $/a}]\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, Q(2), "has no such tensor");
    planned_free(&p);

    m.skip = NULL;
    m.narrow = Q(1);
    model("narrow", &m);
    plan_text(&p, dir, LINEAR "models: [{model: $/a}, {model: $/narrow}]\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, Q(1), "[8, 8] in '");
    expect_problem(&p, true, TV_E_INPUT, Q(1), "[7, 8] in '");
    assert_int_equal(count_problems(&p, true, "vocabular"), 0);
    planned_free(&p);

    m.narrow = NULL;
    m.vocab = 20;
    model("words", &m);
    plan_text(&p, dir, LINEAR "models: [{model: $/a}, {model: $/words}]\n",
              NULL);
    assert_int_equal(count_problems(&p, true, "vocabular"), 2);
    expect_problem(&p, true, TV_E_INPUT, EMBED, "[16, 8] in '");
    expect_problem(&p, true, TV_E_INPUT, HEAD, "[20, 8] in '");
    planned_free(&p);

    /* Wider everywhere: 20 listed, the others counted. */
    m.vocab = 16;
    m.hidden = 10;
    model("wide", &m);
    plan_text(&p, dir, LINEAR "models: [{model: $/a}, {model: $/wide}]\n",
              NULL);
    assert_int_equal(count_problems(&p, true, "shapes differ"), 20);
    assert_int_equal(count_problems(&p, true, "19 more: shape mismatches"), 1);
    planned_free(&p);
}

static void test_optional(void **state)
{
    static const float zeros[8] = {0};
    struct planned p;
    struct tiny_model m;
    const struct tiny_extra bias = {
        "model.layers.1.self_attn.q_proj.bias", TV_F32, 1, {8, 0, 0, 0}, zeros};
    (void)state;
    tiny_model_init(&m);
    m.layers = 4;
    m.seed = 41;
    m.extra = &bias;
    m.n_extra = 1;
    model("biased", &m);
    plan_good(&p, dir, LINEAR "models: [{model: $/biased}, {model: $/a}]\n",
              NULL);
    assert_int_equal(planned_tensor(&p, bias.name)->n_sources, 1);
    planned_free(&p);
    /* Its config.json would make loaders ignore the bias. */
    plan_text(&p, dir, LINEAR "models: [{model: $/a}, {model: $/biased}]\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, bias.name, "loaders would ignore it");
    planned_free(&p);
    plan_good(
        &p, dir,
        "merge_method: slerp\nbase_model: $/biased\nmodels: [{model: $/a}, "
        "{model: $/biased}]\nparameters: {t: 0.5}\n",
        NULL);
    assert_int_equal(planned_tensor(&p, bias.name)->action, TVM_COPY);
    planned_free(&p);
    plan_text(&p, dir, TIES "base_model: $/a\nmodels: [{model: $/biased}]\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, bias.name, "ties needs it there");
    planned_free(&p);
    plan_good(&p, dir, TIES "base_model: $/biased\nmodels: [{model: $/a}]\n",
              NULL);
    assert_int_equal(planned_tensor(&p, bias.name)->action, TVM_COPY);
    planned_free(&p);
}

static void test_architectures(void **state)
{
    struct planned p;
    struct tiny_model m;
    (void)state;
    tiny_model_init(&m);
    m.layers = 4;
    m.architecture = "MistralForCausalLM";
    m.model_type = "mistral";
    model("mistral", &m);
    plan_text(&p, dir, LINEAR "models: [{model: $/a}, {model: $/mistral}]\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, "", "is LlamaForCausalLM");
    expect_problem(&p, true, TV_E_INPUT, "", "is MistralForCausalLM");
    assert_int_equal(p.problems.n_errors, 1);
    planned_free(&p);

    /* Unknown families: the names decide. */
    m.architecture = "StrangeForCausalLM";
    m.model_type = "strange";
    model("s1", &m);
    m.seed = 51;
    model("s2", &m);
    plan_good(&p, dir, LINEAR "models: [{model: $/s1}, {model: $/s2}]\n", NULL);
    assert_int_equal(p.plan->n_tensors, 39);
    planned_free(&p);
    m.skip = NORM;
    model("s3", &m);
    plan_text(&p, dir, LINEAR "models: [{model: $/s1}, {model: $/s3}]\n", NULL);
    expect_problem(&p, true, TV_E_INPUT, "recipe.yml:3:", NORM);
    planned_free(&p);

    /* No config: the names decide as well, and there is none to write. */
    m.skip = NULL;
    m.config = false;
    m.seed = 52;
    model("bare", &m);
    plan_good(&p, dir,
              LINEAR "models: [{model: $/bare/model.safetensors}, "
                     "{model: $/b}]\n",
              NULL);
    assert_int_equal(p.plan->n_tensors, 39);
    assert_non_null(planned_file(&p, "config.json"));
    planned_free(&p);
    plan_good(&p, dir, LINEAR "models: [{model: $/bare/model.safetensors}]\n",
              NULL);
    assert_null(planned_file(&p, "config.json"));
    expect_problem(&p, false, TV_OK, "", "no input has a config.json");
    planned_free(&p);
}

static void test_layers(void **state)
{
    struct planned p;
    struct tiny_model m;
    (void)state;
    tiny_model_init(&m);
    m.layers = 2;
    model("short", &m);
    plan_text(&p, dir, LINEAR "models: [{model: $/a}, {model: $/short}]\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, "recipe.yml:3:", "has 2 layers");
    assert_int_equal(p.problems.n_errors, 1);
    planned_free(&p);
    plan_text(&p, dir,
              "merge_method: passthrough\nslices:\n"
              "- sources: [{model: $/a, layer_range: [2, 5]}]\n"
              "- sources: [{model: $/short, layer_range: [0, 2]}]\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, "recipe.yml:3:", "has 4 layers");
    assert_int_equal(p.problems.n_errors, 1);
    planned_free(&p);
    /* Different depths may be stacked. */
    plan_good(&p, dir,
              "merge_method: passthrough\nslices:\n"
              "- sources: [{model: $/a, layer_range: [0, 4]}]\n"
              "- sources: [{model: $/short, layer_range: [0, 2]}]\n",
              NULL);
    assert_int_equal(p.plan->n_tensors, 3 + 6 * 9);
    planned_free(&p);
}

static void test_roles(void **state)
{
    struct planned p;
    (void)state;
    plan_text(&p, dir, TIES AB, NULL);
    expect_problem(&p, true, TV_E_USAGE, "recipe.yml:1:15",
                   "ties needs base_model");
    planned_free(&p);
    plan_text(&p, dir,
              TIES "base_model: $/c\nslices:\n"
                   "- sources: [{model: $/a, layer_range: [0, 4]}]\n",
              NULL);
    expect_problem(&p, true, TV_E_USAGE, "recipe.yml:5:3",
                   "must be one of the sources");
    planned_free(&p);
    /* Also where a base is a choice: without it the result is another one. */
    plan_text(&p, dir,
              "merge_method: multislerp\nbase_model: $/c\nslices:\n"
              "- sources: [{model: $/a, layer_range: [0, 4]}]\n"
              "parameters: {weight: 1}\n",
              NULL);
    expect_problem(&p, true, TV_E_USAGE, "recipe.yml:4:3",
                   "must be one of the sources");
    planned_free(&p);
    plan_text(&p, dir,
              "merge_method: slerp\nbase_model: $/a\nparameters: {t: 0.5}\n"
              "models: [{model: $/a}, {model: $/b}, {model: $/c}]\n",
              NULL);
    expect_problem(&p, true, TV_E_USAGE, "recipe.yml:4:9",
                   "slerp takes exactly 2 models, the base counted, there are "
                   "3");
    planned_free(&p);
    plan_text(&p, dir,
              "merge_method: passthrough\nbase_model: $/b\n"
              "models: [{model: $/a}]\n",
              NULL);
    expect_problem(&p, true, TV_E_USAGE, "recipe.yml:3:9",
                   "base_model is not in the list and counts as one more");
    planned_free(&p);
    /* A slice may have a base of its own. */
    plan_good(&p, dir,
              TIES "base_model: $/c\nslices:\n"
                   "- sources: [{model: $/a, layer_range: [0, 4]}, {model: "
                   "$/b, layer_range: [0, 4]}]\n"
                   "  base_model: $/b\n",
              NULL);
    assert_int_equal(planned_tensor(&p, Q(0))->base, 1);
    planned_free(&p);
}

static void test_not_found(void **state)
{
    struct planned p;
    (void)state;
    plan_text(&p, dir,
              "merge_method: linear\nmodels:\n- model: $/nowhere\n"
              "  parameters: {weight: 1}\n- model: $/a\n- model: $/b\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, "recipe.yml:3:10", "nowhere");
    /* and still everything else that is wrong. */
    expect_problem(&p, true, TV_E_USAGE, "recipe.yml:5:10", "missing required");
    expect_problem(&p, true, TV_E_USAGE, "recipe.yml:6:10", "missing required");
    assert_int_equal(tvm_problems_code(&p.problems), TV_E_USAGE);
    planned_free(&p);
}

static void test_damaged(void **state)
{
    struct planned p;
    char *bad = tv_path_join(dir, "bad");
    (void)state;
    assert_int_equal(tv_dir_make(bad, NULL), TV_OK);
    tv_free(tmpdir_write(bad, "model.safetensors", "\xff\xff\xff\xff\xff", 5));
    plan_text(&p, dir, LINEAR "models: [{model: $/bad}, {model: $/a}]\n", NULL);
    expect_problem(&p, true, TV_E_CORRUPT, "recipe.yml:3:18", "model.safe");
    planned_free(&p);
    tv_free(bad);
}

static void test_notes(void **state)
{
    struct planned p;
    (void)state;
    /* A method's own complaint, once and with its place. */
    plan_text(&p, dir,
              "merge_method: linear\nmodels:\n"
              "- {model: $/a, parameters: {weight: 1}}\n"
              "- {model: $/b, parameters: {weight: -1}}\n",
              NULL);
    expect_problem(&p, true, TV_E_USAGE,
                   "recipe.yml:3:", "the weights sum to 0");
    assert_int_equal(p.problems.n_errors, 1);
    planned_free(&p);
    plan_text(&p, dir,
              "merge_method: multislerp\nmodels:\n"
              "- {model: $/a, parameters: {weight: 0.1}}\n"
              "- {model: $/b, parameters: {weight: 0.2}}\n"
              "- {model: $/c, parameters: {weight: -0.3}}\n",
              NULL);
    expect_problem(&p, true, TV_E_USAGE,
                   "recipe.yml:3:", "the weights sum to 0");
    planned_free(&p);
    plan_good(&p, dir,
              "merge_method: dare_linear\nbase_model: $/a\n" AB
              "parameters: {weight: 1, density: 0.5}\n",
              NULL);
    assert_int_equal(count_problems(&p, false, "rescale divides by density"),
                     1);
    assert_true(p.problems.items[0].is_note);
    planned_free(&p);
}

/* What is wrong with the recipe does not hide what is wrong with the rest. */
static void test_all_at_once(void **state)
{
    struct tvm_options o;
    struct planned p;
    (void)state;
    tvm_options_init(&o);
    o.quota_bytes = 1000;
    o.memory_bytes = 1000;
    plan_text(&p, dir,
              "merge_method: linaer\ndtype: bflaot16\nmodels:\n"
              "- {model: $/nope, parameters: {weight: abc}}\n- model: $/a\n"
              "- model: $/gone\n- {model: $/b, parameters: {weight: [x]}}\n",
              &o);
    expect_problem(&p, true, TV_E_USAGE, "yml:1:15", "did you mean 'linear'");
    expect_problem(&p, true, TV_E_USAGE, "yml:2:8", "unknown dtype");
    expect_problem(&p, true, TV_E_USAGE, "yml:4:", "'abc' is not a number");
    expect_problem(&p, true, TV_E_INPUT, "yml:4:", "nope");
    expect_problem(&p, true, TV_E_INPUT, "yml:6:10", "gone");
    expect_problem(&p, true, TV_E_USAGE, "yml:7:", "'x' is not a number");
    /* What a method needs depends on which is meant. */
    assert_int_equal(count_problems(&p, true, "missing required"), 0);
    assert_int_equal(p.problems.n_errors, 6);
    assert_null(p.plan->identity);
    planned_free(&p);
    /* Room is checked beside other errors. */
    plan_text(&p, dir,
              "merge_method: linear\nparameters: {weight: 1}\nmodels:\n"
              "- model: $/nope\n- {model: $/a, parameters: {weight: x}}\n",
              &o);
    expect_problem(&p, true, TV_E_INPUT, "yml:4:10", "nope");
    expect_problem(&p, true, TV_E_USAGE, "yml:5:", "'x' is not a number");
    expect_problem(&p, true, TV_E_NOSPACE, "", "quota");
    expect_problem(&p, true, TV_E_BUDGET, "", "needs at least --memory");
    assert_int_equal(p.problems.n_errors, 4);
    assert_int_equal(tvm_problems_code(&p.problems), TV_E_USAGE);
    planned_free(&p);
    /* Nothing is known of the method: what the models say is still checked. */
    plan_text(&p, dir,
              "merge_method: nothing-like-it\nbase_model: $/gone\nslices:\n"
              "- sources: [{model: $/a, layer_range: [0, 9]}]\n"
              "- sources: [{model: $/a, layer_range: 3}, {model: [], "
              "layer_range: [0, 1]}]\n- sources: []\n- 7\n",
              NULL);
    expect_problem(&p, true, TV_E_INPUT, "yml:2:13", "gone");
    expect_problem(&p, true, TV_E_INPUT, "yml:4:", "goes past the end");
    expect_problem(&p, true, TV_E_USAGE, "yml:5:", "two whole numbers");
    assert_int_equal(p.plan->n_tensors, 0);
    planned_free(&p);
    /* Wrong kinds of things in every place. */
    plan_text(&p, dir,
              "merge_method: ties\nbase_model: []\nparameters: 3\nmodels:\n"
              "- {model: $/a, parameters: [1]}\n- 3\n- {model: $/b, "
              "parameters: {density: {filter: [a], value: 1}}}\n",
              NULL);
    assert_int_equal(count_problems(&p, true, "missing required"), 0);
    assert_int_equal(count_problems(&p, true, "needs base_model"), 0);
    planned_free(&p);
    plan_text(&p, dir, "merge_method: 3\n", NULL);
    planned_free(&p);
    plan_text(&p, dir, "{}", NULL);
    planned_free(&p);
}

/* OUT that is, holds or lies in an input. */
static void test_out_place(void **state)
{
    static const struct {
        const char *out, *says;
    } bad[] = {{"a", "is the directory of"},    {"a/", "is the directory of"},
               {"./b", "is the directory of"},  {"a/new", "lies inside"},
               {"b/../a/x/y", "lies inside"},   {".", "holds"},
               {"lora", "is the directory of"}, {"link", "is the directory"}};
    static const char *const good[] = {"ab", "new/a", "c"};
    char *const link = tv_path_join(dir, "link");
    char *const target = tv_path_join(dir, "b");
    struct tvm_options o;
    struct planned p;
    (void)state;
    assert_int_equal(symlink(target, link), 0);
    tvm_options_init(&o);
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        char *const out = tv_path_join(dir, bad[i].out);
        o.out_dir = out;
        plan_text(&p, dir,
                  LINEAR "models: [{model: $/a+$/lora}, {model: $/b}]\n", &o);
        expect_problem(&p, true, TV_E_INPUT, "", bad[i].says);
        expect_problem(&p, true, TV_E_INPUT, "", out);
        planned_free(&p);
        tv_free(out);
    }
    for (size_t i = 0; i < sizeof(good) / sizeof(good[0]); i++) {
        char *const out = tv_path_join(dir, good[i]);
        o.out_dir = out;
        plan_good(&p, dir, LINEAR AB, &o);
        planned_free(&p);
        tv_free(out);
    }
    /* A file's neighbours are not that file. */
    char *const beside = tv_path_join(dir, "a/beside");
    o.out_dir = beside;
    plan_text(&p, dir,
              LINEAR "models: [{model: $/a/model.safetensors}, {model: $/b}]\n",
              &o);
    assert_int_equal(count_problems(&p, true, "OUT"), 0);
    planned_free(&p);
    tv_free(beside);
    tv_free(link);
    tv_free(target);
}

/* Donors keep their number where one of them lacks a tensor. */
static void test_positions(void **state)
{
    struct planned p;
    (void)state;
    plan_good(&p, dir,
              "merge_method: dare_linear\nbase_model: $/b\n"
              "models: [{model: $/a}, {model: $/b}, {model: $/c}]\n"
              "parameters: {weight: 1, density: 0.5}\n",
              NULL);
    const struct tvm_tensor *const t = planned_tensor(&p, NORM);
    assert_int_equal(t->n_sources, 3);
    assert_int_equal(t->sources[0].position, 0);
    assert_int_equal(t->sources[2].position, 1);
    planned_free(&p);
    struct tiny_model m;
    static const float zeros[8] = {0};
    const struct tiny_extra bias = {
        "model.layers.1.self_attn.q_proj.bias", TV_F32, 1, {8, 0, 0, 0}, zeros};
    tiny_model_init(&m);
    m.layers = 4;
    m.extra = &bias;
    m.n_extra = 1;
    m.seed = 51;
    model("has1", &m);
    m.seed = 52;
    model("has2", &m);
    plan_good(&p, dir,
              "merge_method: dare_linear\nbase_model: $/has1\n"
              "models: [{model: $/a}, {model: $/has2}]\n"
              "parameters: {weight: 1, density: 0.5}\n",
              NULL);
    const struct tvm_tensor *const lone = planned_tensor(&p, bias.name);
    assert_int_equal(lone->n_sources, 2);
    assert_int_equal(lone->base, 1);
    assert_int_equal(lone->sources[0].position, 1);
    planned_free(&p);
}

/* ---- space and memory -----------------------------------------------------
 */

static void test_space(void **state)
{
    struct tvm_options o;
    struct planned p;
    char *out = tv_path_join(dir, "new/out");
    (void)state;
    tvm_options_init(&o);
    o.out_dir = out;
    plan_good(&p, dir, LINEAR AB, &o);
    const uint64_t need = p.plan->peak_disk_bytes;
    assert_string_equal(p.plan->options.out_dir, out);
    assert_false(tv_path_exists(out));
    planned_free(&p);
    o.quota_bytes = need;
    plan_good(&p, dir, LINEAR AB, &o);
    planned_free(&p);
    o.quota_bytes = need - 1;
    plan_text(&p, dir, LINEAR AB, &o);
    expect_problem(&p, true, TV_E_NOSPACE, "", "(1 bytes) are missing");
    planned_free(&p);
    o.quota_bytes = 0;
    o.memory_bytes = 1;
    plan_text(&p, dir, LINEAR AB, &o);
    expect_problem(&p, true, TV_E_BUDGET, "", "needs at least --memory");
    planned_free(&p);
    tv_free(out);
}

static void test_into(void **state)
{
    struct tvm_options o;
    struct planned p;
    struct tv_error err;
    char *path = tv_path_join(dir, "store");
    (void)state;
    tvm_options_init(&o);
    o.into = "merged";
    plan_text(&p, dir, LINEAR AB, &o);
    expect_problem(&p, true, TV_E_USAGE, "", "needs the store");
    planned_free(&p);
    assert_ok(tv_store_create(path, 4u << 20, &err), &err);
    assert_ok(tv_store_open(path, NULL, &err, &o.store), &err);
    plan_good(&p, dir, LINEAR AB, &o);
    assert_null(p.plan->shards);
    planned_free(&p);
    assert_ok(tv_store_quota_set(o.store, 256u << 10, &err), &err);
    plan_text(&p, dir, LINEAR AB, &o);
    expect_problem(&p, true, TV_E_NOSPACE, "", "quota of the store");
    planned_free(&p);
    tv_store_close(o.store);
    tv_free(path);
}

static void test_shards(void **state)
{
    struct tvm_options o;
    struct planned p;
    uint64_t end = 0;
    size_t shard = 0;
    (void)state;
    tvm_options_init(&o);
    o.shard_bytes = 2048;
    plan_good(&p, dir, LINEAR AB, &o);
    assert_true(p.plan->shards->n > 2);
    for (size_t i = 0; i < p.plan->n_tensors; i++) {
        const struct tvm_tensor *const t = &p.plan->tensors[i];
        if (i > 0 && t->shard != shard) {
            assert_int_equal(t->shard, shard + 1);
            assert_int_equal(end, p.plan->shards->file_bytes[shard]);
            end = 0;
        }
        if (end == 0)
            end = p.plan->shards->header_bytes[t->shard];
        assert_int_equal(t->offset, end);
        end += t->bytes;
        shard = t->shard;
    }
    assert_int_equal(shard + 1, p.plan->shards->n);
    planned_free(&p);
}

/* ---- side files and identity ----------------------------------------------
 */

static void test_files(void **state)
{
    struct tvm_options o;
    struct planned p;
    size_t n = 0;
    (void)state;
    plan_good(&p, dir, LINEAR "dtype: bfloat16\n" AB, NULL);
    assert_string_equal(p.plan->files[p.plan->n_files - 1].name, "config.json");
    assert_non_null(planned_file(&p, "tokenizer.json"));
    assert_string_equal(planned_file(&p, "tokenizer.json")->from,
                        p.plan->inputs[0].ref);
    const struct tvm_side_file *f = planned_file(&p, "tvmerge_config.yml");
    assert_string_equal(f->data, tvm_recipe_text(p.recipe, &n));
    assert_int_equal(f->n, n);
    f = planned_file(&p, "README.md");
    assert_int_equal(strncmp(f->data, "---\nbase_model: []\n", 19), 0);
    assert_non_null(strstr(f->data, "\n- merge\n- tvmerge\n- linear\n"));
    assert_non_null(strstr(f->data, "arxiv.org/abs/2203.05482"));
    assert_non_null(strstr(f->data, "\n```yaml\nmerge_method: linear\n"));
    assert_int_equal(strlen(f->data), f->n);
    /* Nothing to change: the base's bytes. */
    assert_non_null(strstr(planned_file(&p, "config.json")->data, "1e-05"));
    planned_free(&p);

    /* The first input that has a tokenizer lends it. */
    plan_good(&p, dir, LINEAR "models: [{model: $/b}, {model: $/a}]\n", NULL);
    expect_problem(&p, false, TV_OK, "", "has no tokenizer files");
    assert_string_equal(planned_file(&p, "tokenizer.json")->from,
                        p.plan->inputs[1].ref);
    planned_free(&p);
    plan_good(&p, dir, LINEAR "models: [{model: $/b}]\n", NULL);
    expect_problem(&p, false, TV_OK, "", "no tokenizer files found");
    planned_free(&p);

    tvm_options_init(&o);
    o.copy_tokenizer = false;
    o.write_model_card = false;
    plan_good(&p, dir, LINEAR AB, &o);
    assert_null(planned_file(&p, "tokenizer.json"));
    assert_null(planned_file(&p, "README.md"));
    planned_free(&p);
}

static void test_licences(void **state)
{
    static const char card[] =
        "---\nlicense: apache-2.0\ntags: [x]\n---\n# M\n";
    struct planned p;
    struct tiny_model m;
    (void)state;
    tiny_model_init(&m);
    m.layers = 4;
    char *const path = tiny_model_write(dir, "carded", &m);
    tv_free(tmpdir_write(path, "README.md", card, sizeof(card) - 1));
    tv_free(path);
    plan_good(&p, dir, LINEAR "models: [{model: $/carded}, {model: $/b}]\n",
              NULL);
    const char *const text = planned_file(&p, "README.md")->data;
    assert_non_null(strstr(text, "licence: `apache-2.0`"));
    assert_non_null(strstr(text, "licence: not stated"));
    planned_free(&p);
}

static struct tv_hash hash_of(const char *text, const struct tvm_options *o)
{
    struct planned p;
    plan_good(&p, dir, text, o);
    const struct tv_hash h = p.plan->hash;
    assert_non_null(p.plan->identity);
    assert_null(strstr(p.plan->identity, dir));
    planned_free(&p);
    return h;
}

static void differs(struct tv_hash h, const char *text,
                    const struct tvm_options *o, bool want)
{
    assert_int_equal(!tv_hash_equal(h, hash_of(text, o)), want);
}

/* One byte of the weights becomes another one, and the time stays. */
static void change_quietly(const char *path)
{
    struct stat st;
    unsigned char byte = 0;
    const int fd = open(path, O_RDWR);

    assert_true(fd >= 0);
    assert_int_equal(fstat(fd, &st), 0);
    assert_int_equal(pread(fd, &byte, 1, st.st_size - 1), 1);
    byte ^= 1;
    assert_int_equal(pwrite(fd, &byte, 1, st.st_size - 1), 1);
    const struct timespec times[2] = {st.st_atim, st.st_mtim};
    assert_int_equal(futimens(fd, times), 0);
    assert_int_equal(close(fd), 0);
}

static void test_verify_inputs(void **state)
{
    static const char text[] =
        LINEAR "models: [{model: $/quiet+$/quiet-lora}, {model: $/b}]\n";
    static const char *const files[] = {"quiet/model.safetensors",
                                        "quiet-lora/adapter_model.safetensors"};
    struct tvm_options o;
    struct tiny_model m;
    char why[512];
    (void)state;
    tiny_model_init(&m);
    m.layers = 4;
    model("quiet", &m);
    tv_free(tiny_adapter_write(dir, "quiet-lora", &m, 2, 4, 9));
    tvm_options_init(&o);
    o.verify_inputs = true;
    for (size_t i = 0; i < 2; i++) {
        struct planned before;
        struct planned after;
        char *const path = tv_path_join(dir, files[i]);
        const struct tv_hash plain = hash_of(text, NULL);
        plan_good(&before, dir, text, &o);
        differs(plain, text, &o, true);
        differs(before.plan->hash, text, &o, false);
        change_quietly(path);
        differs(plain, text, NULL, false);
        plan_good(&after, dir, text, &o);
        assert_false(tv_hash_equal(before.plan->hash, after.plan->hash));
        tvm_identity_difference(before.plan->identity, after.plan->identity,
                                why, sizeof(why));
        assert_non_null(strstr(why, "quiet"));
        planned_free(&after);
        /* Without the option it is another question. */
        plan_good(&after, dir, text, NULL);
        tvm_identity_difference(before.plan->identity, after.plan->identity,
                                why, sizeof(why));
        assert_non_null(strstr(why, "verify_inputs"));
        planned_free(&after);
        planned_free(&before);
        tv_free(path);
    }
}

/* Strided tensors are gathered in memory, copied ones too. */
static void test_strided_memory(void **state)
{
    const uint64_t bytes = 8u << 20;
    struct planned p;
    (void)state;
    plan_good(&p, dir, LINEAR AB, NULL);
    struct tvm_tensor *const t = &p.plan->tensors[0];
    struct tv_input_tensor strided = *t->sources[0].tensor;
    bool fits = false;
    uint64_t before = 0;
    uint64_t needed = 0;
    strided.contiguous = false;
    strided.bytes = bytes;
    for (int copy = 0; copy < 2; copy++) {
        const struct tv_input_tensor *const real = t->sources[0].tensor;
        t->action = copy ? TVM_COPY : TVM_MERGE;
        p.plan->options.memory_bytes = bytes;
        (void)tvm_exec_scratch(p.plan, &fits, &before);
        assert_true(fits);
        t->sources[0].tensor = &strided;
        (void)tvm_exec_scratch(p.plan, &fits, &needed);
        t->sources[0].tensor = real;
        assert_false(fits);
        assert_true(needed >= bytes && needed <= before + bytes);
    }
    planned_free(&p);
}

static void test_identity(void **state)
{
    struct tvm_options o;
    const struct tv_hash h = hash_of(LINEAR AB, NULL);
    (void)state;
    /* The same meaning, */
    differs(h, LINEAR AB, NULL, false);
    differs(h,
            "# note\n" AB "merge_method: linear\nparameters:\n  weight: 1.0\n",
            NULL, false);
    tvm_options_init(&o);
    o.threads = 7;
    o.memory_bytes = 64u << 20;
    char *const out = tv_path_join(dir, "elsewhere");
    o.out_dir = out;
    o.sync = false;
    differs(h, LINEAR AB, &o, false);
    tv_free(out);
    /* and every other one. */
    differs(h, LINEAR "models: [{model: $/b}, {model: $/a}]\n", NULL, true);
    differs(h, LINEAR "models: [{model: $/a}, {model: $/c}]\n", NULL, true);
    differs(h, LINEAR AB "dtype: float32\n", NULL, true);
    differs(h, "merge_method: linear\nparameters: {weight: 2}\n" AB, NULL,
            true);
    differs(
        h,
        "merge_method: linear\nparameters: {weight: [{filter: layers.3.mlp, "
        "value: 2}, {value: 1}]}\n" AB,
        NULL, true);
    tvm_options_init(&o);
    o.seed = 1;
    differs(h, LINEAR AB, &o, true);
    tvm_options_init(&o);
    o.shard_bytes = 4096;
    differs(h, LINEAR AB, &o, true);
}

static void expect_said(const char *before, const char *after,
                        const struct tvm_options *o, const char *said)
{
    struct planned a;
    struct planned b;
    char text[400];
    plan_good(&a, dir, before, NULL);
    plan_good(&b, dir, after, o);
    assert_string_equal(tvm_identity_difference(a.plan->identity,
                                                b.plan->identity, text,
                                                sizeof(text)),
                        said);
    planned_free(&a);
    planned_free(&b);
}

/* A refusal to go on with another merge names what was changed. */
static void test_difference(void **state)
{
    static const char *const ties =
        "merge_method: ties\nbase_model: $/a\nparameters: {weight: 1}\n"
        "models: [{model: $/b, parameters: {density: 0.3}}, {model: $/c}]\n";
    struct tvm_options o;
    (void)state;
    expect_said(ties,
                "merge_method: ties\nbase_model: $/a\n"
                "parameters: {weight: 1}\nmodels: [{model: $/b, parameters: "
                "{density: 0.4}}, {model: $/c}]\n",
                NULL, "models[b].parameters.density was 0.3, is 0.4");
    expect_said(ties,
                "merge_method: ties\nbase_model: $/a\nparameters: {weight: 1, "
                "normalize: no}\nmodels: [{model: $/b, parameters: {density: "
                "0.3}}, {model: $/c}]\n",
                NULL, "parameters.normalize was not set, is false");
    expect_said(ties,
                "merge_method: ties\nbase_model: $/b\nparameters: {weight: 1}\n"
                "models: [{model: $/b, parameters: {density: 0.3}}, "
                "{model: $/c}]\n",
                NULL, "base_model was \"a\", is \"b\"");
    expect_said(LINEAR AB, LINEAR "models: [{model: $/a}, {model: $/c}]\n",
                NULL, "models[1].model was \"b\", is \"c\"");
    expect_said(LINEAR AB, LINEAR AB "dtype: float32\n", NULL,
                "dtype was \"\", is \"float32\"");
    expect_said("merge_method: linear\nparameters: {weight: [{filter: mlp, "
                "value: 0.1}, {value: 1}]}\n" AB,
                "merge_method: linear\nparameters: {weight: [{filter: mlp, "
                "value: 0.25}, {value: 1}]}\n" AB,
                NULL, "parameters.weight[0].value was 0.1, is 0.25");
    tvm_options_init(&o);
    o.seed = 7;
    o.shard_bytes = 4096;
    expect_said(LINEAR AB, LINEAR AB, &o,
                "seed was \"0\", is \"7\"; shard_bytes was 0, is 4096");
}

static void test_difference_of_documents(void **state)
{
    char text[400];
    (void)state;
    assert_string_equal(
        tvm_identity_difference(
            "{\"inputs\":[{\"ref\":\"m\",\"fingerprint\":\"1\"}],"
            "\"tensors\":{\"a\":\"1\"}}",
            "{\"inputs\":[{\"ref\":\"m\",\"fingerprint\":\"2\"}],"
            "\"tensors\":{\"a\":\"2\"}}",
            text, sizeof(text)),
        "input 'm' has changed (size, time, header or contents of its files)");
    assert_string_equal(
        tvm_identity_difference(
            "{\"tensors\":{\"a\":\"1\",\"b\":\"2\",\"c\":\"3\"}}",
            "{\"tensors\":{\"a\":\"1\",\"b\":\"3\"}}", text, sizeof(text)),
        "2 tensors would come out differently, first of all b");
    /* Long values are cut between characters. */
    (void)tvm_identity_difference(
        "{\"x\":\"123456789012345678901234567890123456789012345\u00e9\u00e9"
        "\u00e9\"}",
        "{\"x\":[\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaa\"]}",
        text, sizeof(text));
    assert_string_equal(
        text, "x was \"123456789012345678901234567890123456789012345\xc3\xa9"
              "..., is [\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...");
}

/* ---- cost -----------------------------------------------------------------
 */

static void test_no_memory(void **state)
{
    static const char text[] =
        TIES "base_model: $/a\nmodels: [{model: $/b+$/lora}, {model: $/c}]\n";
    struct planned p;
    struct tvm_options o;
    uint64_t step = 1;
    (void)state;
    tvm_options_init(&o);
    plan_good(&p, dir, text, NULL);
    tvm_plan_free(p.plan);
    p.plan = NULL;
    for (uint64_t n = 1;; n += step) {
        struct tvm_problems problems;
        struct tvm_plan *plan = NULL;
        struct tv_error err;
        const uint64_t held = test_heap_bytes();
        const unsigned fds = test_open_fds();
        tvm_problems_init(&problems);
        tv_alloc_fail_at(n, 1);
        const enum tv_err rc =
            tvm_plan_make(p.recipe, &o, &problems, &err, &plan);
        const uint64_t fired = tv_alloc_fired();
        tv_alloc_fail_at(0, 0);
        assert_true((rc == TV_OK) == (plan != NULL));
        if (fired > 0 && rc != TV_OK)
            assert_int_equal(rc, TV_E_NOMEM);
        tvm_plan_free(plan);
        tvm_problems_free(&problems);
        assert_int_equal(test_heap_bytes(), held);
        assert_int_equal(test_open_fds(), fds);
        if (fired == 0) {
            assert_int_equal(rc, TV_OK);
            assert_true(n > 50);
            break;
        }
        /* All of the first, then a sample of the many alike. */
        if (n > 400)
            step = 7;
    }
    planned_free(&p);
}

static void test_fast(void **state)
{
    struct planned p;
    struct timespec a;
    struct timespec b;
    (void)state;
    assert_int_equal(clock_gettime(CLOCK_MONOTONIC, &a), 0);
    plan_text(&p, dir,
              "merge_method: linear\nmodels: [{model: $/a}, {model: $/no}]\n",
              NULL);
    assert_int_equal(clock_gettime(CLOCK_MONOTONIC, &b), 0);
    assert_true(p.problems.n_errors > 0);
    planned_free(&p);
    /* The promise is 0.2 s; a loaded machine gets ten times that. */
    assert_true((double)(b.tv_sec - a.tv_sec) +
                    1e-9 * (double)(b.tv_nsec - a.tv_nsec) <
                2.0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_whole_models),
        cmocka_unit_test(test_base),
        cmocka_unit_test(test_slices),
        cmocka_unit_test(test_layer_lists),
        cmocka_unit_test(test_adapters),
        cmocka_unit_test(test_adapter_does_not_fit),
        cmocka_unit_test(test_tied),
        cmocka_unit_test(test_dtypes),
        cmocka_unit_test(test_not_numbers),
        cmocka_unit_test(test_missing_and_shapes),
        cmocka_unit_test(test_optional),
        cmocka_unit_test(test_architectures),
        cmocka_unit_test(test_layers),
        cmocka_unit_test(test_roles),
        cmocka_unit_test(test_not_found),
        cmocka_unit_test(test_damaged),
        cmocka_unit_test(test_notes),
        cmocka_unit_test(test_space),
        cmocka_unit_test(test_into),
        cmocka_unit_test(test_shards),
        cmocka_unit_test(test_files),
        cmocka_unit_test(test_licences),
        cmocka_unit_test(test_all_at_once),
        cmocka_unit_test(test_out_place),
        cmocka_unit_test(test_positions),
        cmocka_unit_test(test_difference),
        cmocka_unit_test(test_difference_of_documents),
        cmocka_unit_test(test_identity),
        cmocka_unit_test(test_no_memory),
        cmocka_unit_test(test_verify_inputs),
        cmocka_unit_test(test_strided_memory),
        cmocka_unit_test(test_fast),
    };
    return cmocka_run_group_tests_name("plan", tests, setup, teardown);
}
