/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_infer.c - models that no table knows: layers, roles and parts from names
 * alone.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "test.h"

#include "describe.h"
#include "tv/alloc.h"

#define PRE  TV_PART_PRE
#define LAY  TV_PART_LAYER
#define POST TV_PART_POST

static struct tv_arch *model(const char *config, const struct named *list)
{
    struct tv_error err = {0};
    struct tv_arch *a = NULL;

    if (describe(config, list, &err, &a) != TV_OK)
        fail_msg("%s", err.msg);
    assert_string_equal(a->family, "inferred");
    assert_true(a->inferred);
    return a;
}

/* A made-up family with experts: "net.blocks.N." has most members. */
static const struct named made_up[] = {
    {"net.tok_embed.weight", 100, 8},
    {"net.pos_embed.weight", 32, 8},
    {"net.type_embed.weight", 2, 8},
    {"net.blocks.0.norm1.weight", 8, 0},
    {"net.blocks.0.attn.qkv.weight", 24, 8},
    {"net.blocks.0.attn.qkv.bias", 24, 0},
    {"net.blocks.0.attn.out_proj.weight", 8, 8},
    {"net.blocks.0.norm2.weight", 8, 0},
    {"net.blocks.0.experts.0.fc1.weight", 16, 8},
    {"net.blocks.0.experts.1.fc1.weight", 16, 8},
    {"net.blocks.0.experts.2.fc1.weight", 16, 8},
    {"net.blocks.10.attn.qkv.weight", 24, 8},
    {"net.blocks.10.mystery", 3, 0},
    {"net.heads.0.weight", 4, 8},
    {"net.rotary.inv_freq", 4, 0},
    {"net.final_norm.weight", 8, 0},
    {"lm_head.weight", 100, 8},
    {"extra.stuff", 7, 0},
    {NULL, 0, 0},
};

static void check_made_up(const struct tv_arch *a)
{
    expect(a, "net.tok_embed.weight", TV_ROLE_EMBED, PRE, -1);
    expect(a, "net.pos_embed.weight", TV_ROLE_POSITION, PRE, -1);
    expect(a, "net.type_embed.weight", TV_ROLE_OTHER, PRE, -1);
    expect(a, "net.blocks.0.norm1.weight", TV_ROLE_INPUT_NORM, LAY, 0);
    expect(a, "net.blocks.0.attn.qkv.weight", TV_ROLE_ATTN_QKV, LAY, 0);
    expect(a, "net.blocks.0.attn.out_proj.weight", TV_ROLE_ATTN_O, LAY, 0);
    expect(a, "net.blocks.0.norm2.weight", TV_ROLE_POST_ATTN_NORM, LAY, 0);
    expect(a, "net.blocks.0.experts.2.fc1.weight", TV_ROLE_MLP_UP, LAY, 0);
    expect(a, "net.blocks.10.attn.qkv.weight", TV_ROLE_ATTN_QKV, LAY, 10);
    expect(a, "net.blocks.10.mystery", TV_ROLE_OTHER, LAY, 10);
    expect(a, "net.heads.0.weight", TV_ROLE_OTHER, POST, -1);
    expect(a, "net.rotary.inv_freq", TV_ROLE_BUFFER, PRE, -1);
    expect(a, "net.final_norm.weight", TV_ROLE_FINAL_NORM, POST, -1);
    expect(a, "lm_head.weight", TV_ROLE_LM_HEAD, POST, -1);
    expect(a, "extra.stuff", TV_ROLE_OTHER, POST, -1);
    assert_int_equal(a->n_layers, 11);
    assert_int_equal(entry(a, "net.tok_embed.weight")->vocab_dim, 0);
    assert_int_equal(entry(a, "lm_head.weight")->vocab_dim, 0);
    assert_int_equal(entry(a, "net.type_embed.weight")->vocab_dim, -1);
    assert_int_equal(entry(a, "net.pos_embed.weight")->vocab_dim, -1);
    assert_string_equal(entry(a, "lm_head.weight")->tied_to,
                        "net.tok_embed.weight");
    assert_true(entry(a, "net.blocks.0.attn.qkv.bias")->is_bias);
    char *const other =
        tv_arch_rename(entry(a, "net.blocks.0.experts.2.fc1.weight"), 3);
    assert_string_equal(other, "net.blocks.3.experts.2.fc1.weight");
    tv_free(other);
}

static void test_made_up(void **state)
{
    (void)state;
    struct tv_arch *a = model(NULL, made_up);

    assert_false(a->has_config);
    assert_false(a->tied); /* it has a head of its own */
    check_made_up(a);
    assert_null(a->layers_key);
    tv_arch_free(a);

    a = model("{\"model_type\":\"madeup\",\"num_layers\":11,"
              "\"vocab_size\":100,\"architectures\":[\"MadeUpModel\"]}",
              made_up);
    check_made_up(a);
    assert_string_equal(a->layers_key, "num_layers");
    assert_string_equal(a->architecture, "MadeUpModel");
    tv_arch_free(a);

    /* a count that the names do not bear out is not one we may edit */
    a = model("{\"model_type\":\"madeup\",\"num_layers\":12}", made_up);
    check_made_up(a);
    assert_null(a->layers_key);
    tv_arch_free(a);
}

/* More tensors share "layers.0.experts." than lie in any other layer; the key
 * in front of the layer number still has more. */
static void test_experts_are_not_layers(void **state)
{
    (void)state;
    static struct named list[70];
    static char text[70][64];
    size_t n = 0;

    for (int e = 0; e < 60; e++) {
        snprintf(text[n], sizeof(text[n]), "layers.0.experts.%d.w1.weight", e);
        list[n] = (struct named){text[n], 4, 4};
        n++;
    }
    for (int l = 1; l < 4; l++) {
        snprintf(text[n], sizeof(text[n]), "layers.%d.attention.wq.weight", l);
        list[n] = (struct named){text[n], 4, 4};
        n++;
    }
    list[n].name = NULL;
    struct tv_arch *const a = model(NULL, list);
    assert_int_equal(a->n_layers, 4);
    expect(a, "layers.0.experts.59.w1.weight", TV_ROLE_MLP_GATE, LAY, 0);
    expect(a, "layers.3.attention.wq.weight", TV_ROLE_ATTN_Q, LAY, 3);
    assert_true(a->tied); /* no head: something must supply it */
    tv_arch_free(a);
}

static void test_no_layers(void **state)
{
    (void)state;
    static const struct named list[] = {
        {"weight", 4, 4},
        {"a.99999999999999999999.b", 4, 0}, /* no layer index */
        {"7", 4, 0},
        {"", 1, 0},
        {NULL, 0, 0},
    };
    static const struct named none[] = {{NULL, 0, 0}};
    struct tv_arch *a = model(NULL, list);

    assert_int_equal(a->n_layers, 0);
    for (size_t i = 0; i < a->n_tensors; i++)
        expect(a, list[i].name, TV_ROLE_OTHER, POST, -1);
    tv_arch_free(a);
    a = model(NULL, none);
    assert_int_equal(a->n_tensors, 0);
    tv_arch_free(a);
}

/* ChatGLM's names and size, and other ways to call a table of tokens. */
static void test_token_tables(void **state)
{
    (void)state;
    static const char *const pairs[][2] = {
        {"transformer.embedding.word_embeddings.weight",
         "transformer.output_layer.weight"},
        {"tok_emb.weight", "unembed.weight"},
        {"net.token_emb.weight", "output.weight"},
    };
    for (size_t i = 0; i < sizeof(pairs) / sizeof(*pairs); i++) {
        const struct named list[] = {
            {pairs[i][0], 20, 8},
            {pairs[i][1], 20, 8},
            {"h.0.output_layer.weight", 20, 8}, /* of a layer */
            {"h.0.norm1.weight", 8, 0},
            {"proj.output_layer.weight", 8, 8}, /* too short */
            {NULL, 0, 0},
        };
        struct tv_arch *const a =
            model("{\"model_type\":\"chatglm\",\"num_layers\":1,"
                  "\"padded_vocab_size\":20}",
                  list);
        assert_int_equal(a->vocab, 20);
        expect(a, pairs[i][0], TV_ROLE_EMBED, PRE, -1);
        expect(a, pairs[i][1], TV_ROLE_LM_HEAD, POST, -1);
        assert_int_equal(entry(a, pairs[i][0])->vocab_dim, 0);
        assert_int_equal(entry(a, pairs[i][1])->vocab_dim, 0);
        expect(a, "h.0.output_layer.weight", TV_ROLE_OTHER, LAY, 0);
        expect(a, "proj.output_layer.weight", TV_ROLE_OTHER, POST, -1);
        tv_arch_free(a);
    }
}

/* A leading number is a layer too (module lists saved on their own). */
static void test_leading_number(void **state)
{
    (void)state;
    static const struct named list[] = {
        {"0.attn.q_proj.weight", 4, 4},
        {"1.attn.q_proj.weight", 4, 4},
        {NULL, 0, 0},
    };
    struct tv_arch *const a = model(NULL, list);
    char *other = NULL;

    expect(a, "1.attn.q_proj.weight", TV_ROLE_ATTN_Q, LAY, 1);
    other = tv_arch_rename(&a->tensors[1], 12);
    assert_string_equal(other, "12.attn.q_proj.weight");
    tv_free(other);
    tv_arch_free(a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_made_up),
        cmocka_unit_test(test_token_tables),
        cmocka_unit_test(test_experts_are_not_layers),
        cmocka_unit_test(test_no_layers),
        cmocka_unit_test(test_leading_number),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
