/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_arch.c - configs that are wrong, and tensors that contradict them; each
 * must give its code and a message that names the culprit. Also: every
 * allocation fails once.
 */
#include <stdlib.h>
#include <string.h>

#include "test.h"

#include "describe.h"
#include "tv/alloc.h"

static const struct named names[] = {
    {"model.embed_tokens.weight", 64, 8},
    {"model.layers.0.self_attn.q_proj.weight", 8, 8},
    {"model.layers.2.self_attn.q_proj.weight", 8, 8},
    {"model.norm.weight", 8, 0},
    {"lm_head.weight", 64, 8},
    {NULL, 0, 0},
};

struct bad {
    const char *config;
    enum tv_err code;
    const char *in_message;
};

static void test_bad_configs(void **state)
{
    (void)state;
    static const struct bad cases[] = {
        {"", TV_E_CORRUPT, "config.json"},
        {"[1]", TV_E_CORRUPT, "object"},
        {"{\"a\":1,\"a\":2}", TV_E_CORRUPT, "duplicate"},
        {"{\"model_type\":\"llama\"", TV_E_CORRUPT, "byte 21"},
        {"{\"hidden_size\":-1}", TV_E_CORRUPT, "hidden_size"},
        {"{\"hidden_size\":0}", TV_E_CORRUPT, "hidden_size"},
        {"{\"hidden_size\":\"8\"}", TV_E_CORRUPT, "hidden_size"},
        {"{\"hidden_size\":8.5}", TV_E_CORRUPT, "hidden_size"},
        {"{\"hidden_size\":NaN}", TV_E_CORRUPT, "hidden_size"},
        {"{\"hidden_size\":[]}", TV_E_CORRUPT, "hidden_size"},
        {"{\"hidden_size\":[8,\"8\"]}", TV_E_CORRUPT, "hidden_size"},
        {"{\"a\":nan}", TV_E_CORRUPT, "byte"},
        {"{\"a\":Infinityx}", TV_E_CORRUPT, "byte"},
        {"{\"vocab_size\":9007199254740993}", TV_E_CORRUPT, "vocab_size"},
        {"{\"n_layer\":100001}", TV_E_CORRUPT, "n_layer"},
        {"{\"num_hidden_layers\":1e30}", TV_E_CORRUPT, "num_hidden_layers"},
        {"{\"hidden_size\":10,\"num_attention_heads\":4}", TV_E_CORRUPT,
         "heads"},
        {"{\"num_attention_heads\":8,\"num_key_value_heads\":3}", TV_E_CORRUPT,
         "heads"},
        {"{\"model_type\":\"llama\"}", TV_E_CORRUPT, "layer count"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":2}", TV_E_INPUT,
         "model.layers.2.self_attn.q_proj.weight"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":3,"
         "\"vocab_size\":65}",
         TV_E_INPUT, "model.embed_tokens.weight"},
        {"{\"model_type\":\"llama\",\"num_hidden_layers\":3,"
         "\"hidden_size\":16}",
         TV_E_INPUT, "model.embed_tokens.weight"},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct tv_error err = {0};
        struct tv_arch *a = NULL;
        const enum tv_err rc = describe(cases[i].config, names, &err, &a);

        if (rc != cases[i].code || !strstr(err.msg, cases[i].in_message))
            fail_msg("%s: code %d, \"%s\"", cases[i].config, (int)rc, err.msg);
        assert_null(a);
        /* err may be NULL */
        assert_int_equal(describe(cases[i].config, names, NULL, &a), rc);
    }
}

/* What real models have in their configs. */
static void test_odd_configs(void **state)
{
    (void)state;
    static const struct {
        const char *config;
        int64_t heads, kv, inner;
    } cases[] = {
        /* one value per layer (Gemma 3n, OpenELM) */
        {"{\"num_hidden_layers\":3,\"intermediate_size\":[16,32,16]}", 0, 0, 0},
        {"{\"num_hidden_layers\":3,\"num_attention_heads\":[2,2,4],"
         "\"num_key_value_heads\":[1,1,2]}",
         0, 0, 0},
        /* heads that are no equal shares (GLM-4.7-Flash) */
        {"{\"num_hidden_layers\":3,\"hidden_size\":8,"
         "\"num_attention_heads\":5,\"qk_nope_head_dim\":3}",
         5, 5, 0},
        /* what Python writes */
        {"{\"num_hidden_layers\":3,\"time_step_limit\":[0.0, Infinity],"
         "\"x\":NaN}",
         0, 0, 0},
    };

    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct tv_error err = {0};
        struct tv_arch *a = NULL;

        if (describe(cases[i].config, names, &err, &a) != TV_OK)
            fail_msg("%s: %s", cases[i].config, err.msg);
        assert_int_equal(a->n_heads, cases[i].heads);
        assert_int_equal(a->n_kv_heads, cases[i].kv);
        assert_int_equal(a->intermediate, cases[i].inner);
        tv_arch_free(a);
    }
}

static void test_deep_config(void **state)
{
    (void)state;
    struct tv_error err = {0};
    struct tv_arch *a = NULL;
    char *const deep = tv_alloc(200001);

    memset(deep, '[', 200000);
    deep[200000] = '\0';
    assert_int_equal(describe(deep, names, &err, &a), TV_E_CORRUPT);
    tv_free(deep);
}

static void test_spellings(void **state)
{
    (void)state;
    struct tv_error err = {0};
    struct tv_arch *a = NULL;

    assert_int_equal(describe("{\"architectures\":[\"LlamaForCausalLM\"],"
                              "\"num_hidden_layers\":3.0,\"hidden_size\":8,"
                              "\"num_attention_heads\":2,"
                              "\"torch_dtype\":\"float32\","
                              "\"tie_word_embeddings\":true}",
                              names, &err, &a),
                     TV_OK);
    assert_string_equal(a->family, "llama"); /* by class */
    assert_string_equal(a->model_type, "");
    assert_int_equal(a->n_layers, 3);
    assert_int_equal(a->head_dim, 4);
    assert_int_equal(a->n_kv_heads, 2);
    assert_true(a->tied);
    assert_string_equal(a->dtype, "float32");
    assert_false(a->dtype_key_new);
    tv_arch_free(a);

    assert_int_equal(describe("{\"model_type\":\"llama\","
                              "\"num_hidden_layers\":3,"
                              "\"dtype\":\"bfloat16\","
                              "\"torch_dtype\":\"float32\"}",
                              names, &err, &a),
                     TV_OK);
    assert_string_equal(a->dtype, "bfloat16");
    assert_true(a->dtype_key_new);
    assert_false(a->tied);
    tv_arch_free(a);
}

static void test_allocations(void **state)
{
    (void)state;
    static const char config[] =
        "{\"model_type\":\"llama\",\"num_hidden_layers\":3}";

    for (int inferred = 0; inferred < 2; inferred++) {
        for (uint64_t k = 1;; k++) {
            struct tv_error err = {0};
            struct tv_arch *a = NULL;
            const uint64_t before = tv_alloc_now();

            tv_alloc_fail_at(k, 1);
            const enum tv_err rc =
                describe(inferred ? NULL : config, names, &err, &a);
            const uint64_t fired = tv_alloc_fired();
            tv_alloc_fail_at(0, 0);
            if (!fired) {
                assert_int_equal(rc, TV_OK);
                assert_true(k > 3);
                tv_arch_free(a);
                break;
            }
            assert_int_equal(rc, TV_E_NOMEM);
            assert_null(a);
            assert_int_equal(tv_alloc_now(), before);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_bad_configs), cmocka_unit_test(test_odd_configs),
        cmocka_unit_test(test_deep_config), cmocka_unit_test(test_spellings),
        cmocka_unit_test(test_allocations),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
