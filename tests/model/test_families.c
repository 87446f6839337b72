/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_families.c - every family's table against tensor names as real
 * checkpoints have them, shapes of tiny models.
 */
#include <stdlib.h>
#include <string.h>

#include "test.h"

#include "describe.h"
#include "tv/alloc.h"

#define PRE  TV_PART_PRE
#define LAY  TV_PART_LAYER
#define POST TV_PART_POST

static struct tv_arch *model(const char *config, const struct named *list,
                             const char *family)
{
    struct tv_error err = {0};
    struct tv_arch *a = NULL;

    if (describe(config, list, &err, &a) != TV_OK)
        fail_msg("%s", err.msg);
    assert_string_equal(a->family, family);
    assert_false(a->inferred);
    assert_true(a->has_config);
    return a;
}

static const struct named llama_names[] = {
    {"lm_head.weight", 2048, 192},
    {"model.embed_tokens.weight", 2048, 192},
    {"model.layers.0.input_layernorm.weight", 192, 0},
    {"model.layers.0.mlp.down_proj.weight", 192, 416},
    {"model.layers.0.mlp.gate_proj.weight", 416, 192},
    {"model.layers.0.mlp.up_proj.weight", 416, 192},
    {"model.layers.0.post_attention_layernorm.weight", 192, 0},
    {"model.layers.0.self_attn.k_proj.weight", 96, 192},
    {"model.layers.0.self_attn.o_proj.weight", 192, 192},
    {"model.layers.0.self_attn.q_proj.weight", 192, 192},
    {"model.layers.0.self_attn.q_proj.bias", 192, 0},
    {"model.layers.0.self_attn.v_proj.weight", 96, 192},
    {"model.layers.0.self_attn.rotary_emb.inv_freq", 12, 0},
    {"model.layers.1.self_attn.q_proj.weight", 192, 192},
    {"model.layers.1.surprise.weight", 3, 4},
    {"model.norm.weight", 192, 0},
    {"model.something_else", 5, 0},
    {NULL, 0, 0},
};
static const char llama_config[] =
    "{\"architectures\":[\"LlamaForCausalLM\"],\"model_type\":\"llama\","
    "\"dtype\":\"bfloat16\",\"head_dim\":24,\"hidden_size\":192,"
    "\"intermediate_size\":416,\"max_position_embeddings\":256,"
    "\"num_attention_heads\":8,\"num_hidden_layers\":2,"
    "\"num_key_value_heads\":4,\"pad_token_id\":null,"
    "\"tie_word_embeddings\":false,\"vocab_size\":2048}";

static void test_llama(void **state)
{
    (void)state;
    struct tv_arch *const a = model(llama_config, llama_names, "llama");
    const char *const l0 = "model.layers.0.";

    assert_string_equal(a->architecture, "LlamaForCausalLM");
    assert_int_equal(a->n_layers, 2);
    assert_int_equal(a->hidden, 192);
    assert_int_equal(a->n_heads, 8);
    assert_int_equal(a->n_kv_heads, 4);
    assert_int_equal(a->head_dim, 24);
    assert_int_equal(a->intermediate, 416);
    assert_int_equal(a->vocab, 2048);
    assert_int_equal(a->max_positions, 256);
    assert_false(a->tied);
    assert_false(a->linear_transposed);
    assert_string_equal(a->layers_key, "num_hidden_layers");
    assert_string_equal(a->dtype, "bfloat16");
    assert_true(a->dtype_key_new);
    assert_int_equal(a->n_tensors, 17);
    assert_string_equal(a->tensors[0].name, "lm_head.weight");

    expect(a, "lm_head.weight", TV_ROLE_LM_HEAD, POST, -1);
    expect(a, "model.embed_tokens.weight", TV_ROLE_EMBED, PRE, -1);
    expect(a, "model.norm.weight", TV_ROLE_FINAL_NORM, POST, -1);
    static const struct {
        const char *module;
        enum tv_role role;
    } in_layer[] = {
        {"input_layernorm.weight", TV_ROLE_INPUT_NORM},
        {"mlp.down_proj.weight", TV_ROLE_MLP_DOWN},
        {"mlp.gate_proj.weight", TV_ROLE_MLP_GATE},
        {"mlp.up_proj.weight", TV_ROLE_MLP_UP},
        {"post_attention_layernorm.weight", TV_ROLE_POST_ATTN_NORM},
        {"self_attn.k_proj.weight", TV_ROLE_ATTN_K},
        {"self_attn.o_proj.weight", TV_ROLE_ATTN_O},
        {"self_attn.q_proj.weight", TV_ROLE_ATTN_Q},
        {"self_attn.q_proj.bias", TV_ROLE_ATTN_Q},
        {"self_attn.v_proj.weight", TV_ROLE_ATTN_V},
        {"self_attn.rotary_emb.inv_freq", TV_ROLE_BUFFER},
    };
    for (size_t i = 0; i < sizeof(in_layer) / sizeof(in_layer[0]); i++) {
        char *const name = tv_asprintf("%s%s", l0, in_layer[i].module);
        expect(a, name, in_layer[i].role, LAY, 0);
        tv_free(name);
    }
    expect(a, "model.layers.1.self_attn.q_proj.weight", TV_ROLE_ATTN_Q, LAY, 1);
    expect(a, "model.layers.1.surprise.weight", TV_ROLE_OTHER, LAY, 1);
    expect(a, "model.something_else", TV_ROLE_OTHER, POST, -1);

    const struct tv_arch_tensor *t = entry(a, "lm_head.weight");
    assert_true(t->optional);
    assert_string_equal(t->tied_to, "model.embed_tokens.weight");
    assert_int_equal(t->vocab_dim, 0);
    t = entry(a, "model.layers.0.self_attn.q_proj.bias");
    assert_true(t->is_bias);
    assert_true(t->optional);
    assert_int_equal(t->vocab_dim, -1);
    t = entry(a, "model.layers.0.self_attn.q_proj.weight");
    assert_false(t->is_bias);
    assert_false(t->optional);
    assert_null(t->tied_to);
    char *const other = tv_arch_rename(t, 17);
    assert_string_equal(other, "model.layers.17.self_attn.q_proj.weight");
    tv_free(other);
    tv_arch_free(a);
}

static void test_llama_relatives(void **state)
{
    (void)state;
    static const struct named names[] = {
        {"model.embed_tokens.weight", 64, 8},
        {"model.layers.1.self_attn.qkv_proj.weight", 24, 8},
        {"model.layers.1.self_attn.q_norm.weight", 4, 0},
        {"model.layers.1.mlp.gate_up_proj.weight", 32, 8},
        {"model.layers.1.pre_feedforward_layernorm.weight", 8, 0},
        {"model.layers.1.mlp.experts.13.up_proj.weight", 16, 8},
        {"model.layers.1.mlp.gate.weight", 4, 8},
        {"model.norm.weight", 8, 0},
        {NULL, 0, 0},
    };
    static const char *const types[] = {"mistral", "qwen2",  "qwen3",
                                        "gemma",   "gemma2", "gemma3_text",
                                        "phi3",    "mixtral"};
    for (size_t i = 0; i < sizeof(types) / sizeof(types[0]); i++) {
        char *const config = tv_asprintf(
            "{\"model_type\":\"%s\",\"torch_dtype\":\"float16\","
            "\"num_hidden_layers\":2,\"hidden_size\":8,\"vocab_size\":64}",
            types[i]);
        struct tv_arch *const a = model(config, names, "llama");

        expect(a, names[1].name, TV_ROLE_ATTN_QKV, LAY, 1);
        expect(a, names[2].name, TV_ROLE_OTHER_NORM, LAY, 1);
        expect(a, names[3].name, TV_ROLE_MLP_GATE_UP, LAY, 1);
        expect(a, names[4].name, TV_ROLE_OTHER_NORM, LAY, 1);
        expect(a, names[5].name, TV_ROLE_MLP_UP, LAY, 1);
        expect(a, names[6].name, TV_ROLE_ROUTER, LAY, 1);
        assert_int_equal(a->tied, !strncmp(types[i], "gemma", 5));
        assert_string_equal(a->dtype, "float16");
        assert_false(a->dtype_key_new);
        tv_arch_free(a);
        tv_free(config);
    }
}

static void test_nested_config(void **state)
{
    (void)state;
    static const struct named names[] = {
        {"language_model.model.embed_tokens.weight", 64, 8},
        {"language_model.model.layers.2.mlp.up_proj.weight", 16, 8},
        {"language_model.model.norm.weight", 8, 0},
        {"model.language_model.layers.0.mlp.up_proj.weight", 16, 8},
        {"vision_tower.encoder.layers.30.mlp.fc1.weight", 16, 8},
        {NULL, 0, 0},
    };
    struct tv_arch *const a =
        model("{\"architectures\":[\"Gemma3ForConditionalGeneration\"],"
              "\"model_type\":\"gemma3\",\"hidden_size\":99,"
              "\"text_config\":{\"hidden_size\":8,\"num_hidden_layers\":3,"
              "\"vocab_size\":64}}",
              names, "llama");

    assert_int_equal(a->hidden, 8);
    assert_int_equal(a->n_layers, 3);
    assert_null(a->layers_key);
    expect(a, names[0].name, TV_ROLE_EMBED, PRE, -1);
    expect(a, names[1].name, TV_ROLE_MLP_UP, LAY, 2);
    expect(a, names[2].name, TV_ROLE_FINAL_NORM, POST, -1);
    expect(a, names[3].name, TV_ROLE_MLP_UP, LAY, 0);
    /* Layers of another module: counted by themselves. */
    expect(a, names[4].name, TV_ROLE_MLP_UP, LAY, 30);
    assert_int_equal(a->n_modules, 2);
    assert_string_equal(a->modules[0].name, "text_decoder");
    assert_string_equal(a->modules[0].scope, "text_config");
    assert_string_equal(a->modules[0].layers_key, "num_hidden_layers");
    assert_true(a->modules[0].is_main);
    assert_string_equal(a->modules[1].name, "vision_tower");
    assert_int_equal(a->modules[1].n_layers, 31);
    assert_false(a->modules[1].is_main);
    assert_int_equal(a->tensors[4].module, 1);
    tv_arch_free(a);
}

static void test_gpt2(void **state)
{
    (void)state;
    static const char *const modules[] = {
        "h.0.attn.c_attn.bias",
        "h.0.attn.c_attn.weight",
        "h.0.attn.c_proj.bias",
        "h.0.attn.c_proj.weight",
        "h.0.ln_1.bias",
        "h.0.ln_1.weight",
        "h.0.ln_2.weight",
        "h.0.mlp.c_fc.bias",
        "h.0.mlp.c_fc.weight",
        "h.0.mlp.c_proj.weight",
        "h.0.attn.bias",
        "h.0.attn.masked_bias",
        "ln_f.bias",
        "ln_f.weight",
    };
    static const enum tv_role roles[] = {
        TV_ROLE_ATTN_QKV,       TV_ROLE_ATTN_QKV,   TV_ROLE_ATTN_O,
        TV_ROLE_ATTN_O,         TV_ROLE_INPUT_NORM, TV_ROLE_INPUT_NORM,
        TV_ROLE_POST_ATTN_NORM, TV_ROLE_MLP_UP,     TV_ROLE_MLP_UP,
        TV_ROLE_MLP_DOWN,       TV_ROLE_BUFFER,     TV_ROLE_BUFFER,
        TV_ROLE_FINAL_NORM,     TV_ROLE_FINAL_NORM,
    };
    enum { N = sizeof(modules) / sizeof(modules[0]) };

    for (int with_prefix = 0; with_prefix < 2; with_prefix++) {
        const char *const prefix = with_prefix ? "transformer." : "";
        struct named list[N + 3] = {{NULL, 0, 0}};
        for (int i = 0; i < N; i++)
            list[i].name = tv_asprintf("%s%s", prefix, modules[i]);
        list[N] = (struct named){tv_asprintf("%swte.weight", prefix), 50, 8};
        list[N + 1] =
            (struct named){tv_asprintf("%swpe.weight", prefix), 16, 8};
        for (int i = 0; i < N; i++)
            list[i].rows = 8;

        struct tv_arch *const a =
            model("{\"architectures\":[\"GPT2LMHeadModel\"],"
                  "\"model_type\":\"gpt2\",\"n_embd\":8,\"n_head\":2,"
                  "\"n_inner\":null,\"n_layer\":1,\"n_positions\":16,"
                  "\"n_ctx\":16,\"vocab_size\":50}",
                  list, "gpt2");
        for (int i = 0; i < N; i++)
            expect(a, list[i].name, roles[i], i >= N - 2 ? POST : LAY,
                   i >= N - 2 ? -1 : 0);
        expect(a, list[N].name, TV_ROLE_EMBED, PRE, -1);
        expect(a, list[N + 1].name, TV_ROLE_POSITION, PRE, -1);
        assert_true(entry(a, list[10].name)->optional);
        assert_false(entry(a, list[0].name)->optional);
        assert_true(a->linear_transposed);
        assert_true(a->tied);
        assert_int_equal(a->intermediate, 32);
        assert_int_equal(a->head_dim, 4);
        assert_int_equal(a->n_kv_heads, 2);
        assert_string_equal(a->layers_key, "n_layer");
        tv_arch_free(a);
        for (int i = 0; i < N + 2; i++)
            tv_free((void *)(uintptr_t)list[i].name);
    }
}

static void test_gpt_neox(void **state)
{
    (void)state;
    static const struct named names[] = {
        {"embed_out.weight", 2048, 96},
        {"gpt_neox.embed_in.weight", 2048, 96},
        {"gpt_neox.final_layer_norm.bias", 96, 0},
        {"gpt_neox.final_layer_norm.weight", 96, 0},
        {"gpt_neox.layers.0.attention.dense.bias", 96, 0},
        {"gpt_neox.layers.0.attention.dense.weight", 96, 96},
        {"gpt_neox.layers.0.attention.query_key_value.bias", 288, 0},
        {"gpt_neox.layers.0.attention.query_key_value.weight", 288, 96},
        {"gpt_neox.layers.0.input_layernorm.weight", 96, 0},
        {"gpt_neox.layers.0.mlp.dense_4h_to_h.weight", 96, 384},
        {"gpt_neox.layers.0.mlp.dense_h_to_4h.weight", 384, 96},
        {"gpt_neox.layers.0.post_attention_layernorm.weight", 96, 0},
        {"gpt_neox.layers.1.attention.bias", 1, 0},
        {"gpt_neox.layers.1.attention.masked_bias", 1, 0},
        {"gpt_neox.layers.1.attention.rotary_emb.inv_freq", 3, 0},
        {NULL, 0, 0},
    };
    struct tv_arch *const a =
        model("{\"architectures\":[\"GPTNeoXForCausalLM\"],"
              "\"model_type\":\"gpt_neox\",\"hidden_size\":96,"
              "\"intermediate_size\":384,\"num_attention_heads\":4,"
              "\"num_hidden_layers\":2,\"vocab_size\":2048,"
              "\"max_position_embeddings\":256}",
              names, "gpt_neox");

    expect(a, names[0].name, TV_ROLE_LM_HEAD, POST, -1);
    expect(a, names[1].name, TV_ROLE_EMBED, PRE, -1);
    expect(a, names[2].name, TV_ROLE_FINAL_NORM, POST, -1);
    expect(a, names[4].name, TV_ROLE_ATTN_O, LAY, 0);
    expect(a, names[6].name, TV_ROLE_ATTN_QKV, LAY, 0);
    expect(a, names[8].name, TV_ROLE_INPUT_NORM, LAY, 0);
    expect(a, names[9].name, TV_ROLE_MLP_DOWN, LAY, 0);
    expect(a, names[10].name, TV_ROLE_MLP_UP, LAY, 0);
    expect(a, names[11].name, TV_ROLE_POST_ATTN_NORM, LAY, 0);
    for (int i = 12; i < 15; i++)
        expect(a, names[i].name, TV_ROLE_BUFFER, LAY, 1);
    assert_false(a->tied);
    assert_string_equal(entry(a, names[0].name)->tied_to, names[1].name);
    assert_true(entry(a, names[4].name)->is_bias);
    tv_arch_free(a);
}

static void test_bloom(void **state)
{
    (void)state;
    static const struct named names[] = {
        {"transformer.h.0.input_layernorm.bias", 96, 0},
        {"transformer.h.0.mlp.dense_4h_to_h.weight", 96, 384},
        {"transformer.h.0.mlp.dense_h_to_4h.weight", 384, 96},
        {"transformer.h.0.post_attention_layernorm.weight", 96, 0},
        {"transformer.h.0.self_attention.dense.weight", 96, 96},
        {"transformer.h.0.self_attention.query_key_value.weight", 288, 96},
        {"transformer.ln_f.weight", 96, 0},
        {"transformer.word_embeddings.weight", 2048, 96},
        {"transformer.word_embeddings_layernorm.weight", 96, 0},
        {"h.1.self_attention.dense.bias", 96, 0}, /* without the prefix */
        {NULL, 0, 0},
    };
    struct tv_arch *const a =
        model("{\"architectures\":[\"BloomForCausalLM\"],"
              "\"model_type\":\"bloom\",\"n_embed\":96,\"n_layer\":2,"
              "\"num_attention_heads\":4,\"vocab_size\":2048}",
              names, "bloom");

    expect(a, names[0].name, TV_ROLE_INPUT_NORM, LAY, 0);
    expect(a, names[1].name, TV_ROLE_MLP_DOWN, LAY, 0);
    expect(a, names[2].name, TV_ROLE_MLP_UP, LAY, 0);
    expect(a, names[3].name, TV_ROLE_POST_ATTN_NORM, LAY, 0);
    expect(a, names[4].name, TV_ROLE_ATTN_O, LAY, 0);
    expect(a, names[5].name, TV_ROLE_ATTN_QKV, LAY, 0);
    expect(a, names[6].name, TV_ROLE_FINAL_NORM, POST, -1);
    expect(a, names[7].name, TV_ROLE_EMBED, PRE, -1);
    expect(a, names[8].name, TV_ROLE_EMBED_NORM, PRE, -1);
    expect(a, names[9].name, TV_ROLE_ATTN_O, LAY, 1);
    assert_true(a->tied);
    assert_int_equal(a->hidden, 96);
    assert_int_equal(a->intermediate, 384);
    tv_arch_free(a);
}

static void test_opt(void **state)
{
    (void)state;
    static const struct named names[] = {
        {"model.decoder.embed_tokens.weight", 64, 4},
        {"model.decoder.embed_positions.weight", 34, 8},
        {"model.decoder.project_in.weight", 8, 4},
        {"model.decoder.project_out.weight", 4, 8},
        {"model.decoder.final_layer_norm.weight", 8, 0},
        {"model.decoder.layers.3.final_layer_norm.bias", 8, 0},
        {"model.decoder.layers.3.self_attn_layer_norm.weight", 8, 0},
        {"model.decoder.layers.3.self_attn.out_proj.weight", 8, 8},
        {"model.decoder.layers.3.self_attn.q_proj.bias", 8, 0},
        {"model.decoder.layers.3.fc1.weight", 16, 8},
        {"model.decoder.layers.3.fc2.weight", 8, 16},
        {"decoder.layers.0.fc2.weight", 8, 16},
        {"lm_head.weight", 64, 4},
        {NULL, 0, 0},
    };
    struct tv_arch *const a = model(
        "{\"architectures\":[\"OPTForCausalLM\"],\"model_type\":\"opt\","
        "\"hidden_size\":8,\"word_embed_proj_dim\":4,\"ffn_dim\":16,"
        "\"num_attention_heads\":2,\"num_hidden_layers\":4,\"vocab_size\":64}",
        names, "opt");

    expect(a, names[0].name, TV_ROLE_EMBED, PRE, -1);
    expect(a, names[1].name, TV_ROLE_POSITION, PRE, -1);
    expect(a, names[2].name, TV_ROLE_OTHER, PRE, -1);
    expect(a, names[3].name, TV_ROLE_OTHER, POST, -1);
    expect(a, names[4].name, TV_ROLE_FINAL_NORM, POST, -1);
    expect(a, names[5].name, TV_ROLE_POST_ATTN_NORM, LAY, 3);
    expect(a, names[6].name, TV_ROLE_INPUT_NORM, LAY, 3);
    expect(a, names[7].name, TV_ROLE_ATTN_O, LAY, 3);
    expect(a, names[8].name, TV_ROLE_ATTN_Q, LAY, 3);
    expect(a, names[9].name, TV_ROLE_MLP_UP, LAY, 3);
    expect(a, names[10].name, TV_ROLE_MLP_DOWN, LAY, 3);
    expect(a, names[11].name, TV_ROLE_MLP_DOWN, LAY, 0);
    expect(a, names[12].name, TV_ROLE_LM_HEAD, POST, -1);
    assert_int_equal(a->intermediate, 16);
    assert_true(a->tied);
    tv_arch_free(a);
}

/* The list of names and the list of tables are two lists: each name must be a
 * family that describe() really gives. */
static void test_family_list(void **state)
{
    (void)state;
    static const char *const types[] = {
        "llama",  "gpt2", "gpt_neox", "bloom", "opt", "gpt_bigcode",
        "falcon", "phi",  "mamba",    "bert",  "t5",  "whisper"};
    static const struct named none[] = {{NULL, 0, 0}};
    const char *const *names = NULL;
    const size_t n = tv_arch_families(&names);

    assert_int_equal(n, sizeof(types) / sizeof(types[0]));
    for (size_t i = 0; i < n; i++) {
        char *const config = tv_asprintf(
            "{\"model_type\":\"%s\",\"num_hidden_layers\":1}", types[i]);
        struct tv_arch *const a = model(config, none, names[i]);
        tv_arch_free(a);
        tv_free(config);
    }
    for (int r = 0; r < TV_ROLE_COUNT; r++)
        assert_true(strlen(tv_role_name((enum tv_role)r)) > 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_llama),
        cmocka_unit_test(test_llama_relatives),
        cmocka_unit_test(test_nested_config),
        cmocka_unit_test(test_gpt2),
        cmocka_unit_test(test_gpt_neox),
        cmocka_unit_test(test_bloom),
        cmocka_unit_test(test_opt),
        cmocka_unit_test(test_family_list),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
