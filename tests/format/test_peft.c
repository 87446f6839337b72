/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_peft.c - adapters: scaling by every rule, refusal of every variant by
 * its tensors, and binding to a base. (Refusal by config key: test_badfiles.c.)
 */
#include <jansson.h>
#include <math.h>
#include <string.h>

#include "faults.h"
#include "format_files.h"
#include "test.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/parse.h"

#define P "base_model.model.model.layers."

static const struct ff_tensor base[] = {
    {"model.layers.0.self_attn.q_proj.weight", TV_BF16, 2, {12, 8}, 1},
    {"model.layers.0.self_attn.k_proj.weight", TV_BF16, 2, {6, 8}, 2},
    {"model.layers.1.self_attn.q_proj.weight", TV_BF16, 2, {12, 8}, 3},
    {"model.layers.1.self_attn.k_proj.weight", TV_BF16, 2, {6, 8}, 4},
    {"model.layers.10.self_attn.q_proj.weight", TV_BF16, 2, {12, 8}, 5},
    {"lm_head.weight", TV_BF16, 2, {32, 8}, 6},
};

static const struct ff_tensor pair[] = {
    {P "0.self_attn.q_proj.lora_A.weight", TV_F32, 2, {4, 8}, 1},
    {P "0.self_attn.q_proj.lora_B.weight", TV_F32, 2, {12, 4}, 2},
};

static char *dir;

static int setup(void **state)
{
    (void)state;
    dir = tmpdir_make();
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    tmpdir_remove(dir);
    return 0;
}

static void config(const char *text)
{
    ff_write_text(dir, "adapter_config.json", text);
}

static void tensors(const struct ff_tensor *t, size_t n)
{
    ff_write(dir, "adapter_model.safetensors", t, n);
}

static tv_input *open_input(const char *path)
{
    tv_input *in = NULL;
    struct tv_error err;

    assert_ok(tv_input_open_path(path, &err, &in), &err);
    return in;
}

static tv_adapter *open_adapter(void)
{
    tv_adapter *a = NULL;
    struct tv_error err;

    assert_ok(tv_adapter_open(open_input(dir), &err, &a), &err);
    return a;
}

static void close_adapter(tv_adapter *a)
{
    tv_input *in = tv_adapter_input(a);

    tv_adapter_close(a);
    tv_input_close(in);
}

static void refuse(enum tv_err code, const char *part)
{
    tv_input *in = open_input(dir);
    tv_adapter *a = NULL;
    struct tv_error err;

    tv_error_clear(&err);
    assert_code(tv_adapter_open(in, &err, &a), code, &err);
    assert_message(&err, part);
    assert_null(a);
    tv_input_close(in);
}

static void test_plain(void **state)
{
    static const struct ff_tensor t[] = {
        {P "10.self_attn.q_proj.lora_B.weight", TV_F32, 2, {12, 4}, 1},
        {P "10.self_attn.q_proj.lora_A.weight", TV_F32, 2, {4, 8}, 2},
        {P "2.self_attn.k_proj.lora_A.weight", TV_BF16, 2, {4, 8}, 3},
        {P "2.self_attn.k_proj.lora_B.weight", TV_F16, 2, {6, 4}, 4},
    };
    tv_adapter *a = NULL;
    const struct tv_adapter_module *m = NULL;

    (void)state;
    config("{\"peft_type\": \"LORA\", \"r\": 4, \"lora_alpha\": 6}");
    tensors(t, 4);
    a = open_adapter();
    assert_int_equal(tv_adapter_count(a), 2);
    m = tv_adapter_module(a, 0); /* layer order */
    assert_string_equal(m->module, "model.layers.2.self_attn.k_proj");
    assert_string_equal(m->a->name, t[2].name);
    assert_string_equal(m->b->name, t[3].name);
    assert_int_equal(m->r, 4);
    assert_int_equal(m->in_features, 8);
    assert_int_equal(m->out_features, 6);
    assert_float_equal(m->alpha, 6, 0);
    assert_float_equal(m->scaling, 1.5, 0);
    assert_false(m->transposed);
    m = tv_adapter_module(a, 1);
    assert_string_equal(m->module, "model.layers.10.self_attn.q_proj");
    assert_int_equal(m->out_features, 12);
    close_adapter(a);
}

static void test_scaling(void **state)
{
    static const struct ff_tensor t[] = {
        {P "0.self_attn.q_proj.lora_A.weight", TV_F32, 2, {2, 8}, 1},
        {P "0.self_attn.q_proj.lora_B.weight", TV_F32, 2, {12, 2}, 2},
        {P "1.self_attn.q_proj.lora_A.weight", TV_F32, 2, {4, 8}, 3},
        {P "1.self_attn.q_proj.lora_B.weight", TV_F32, 2, {12, 4}, 4},
        {P "1.xq_proj.lora_A.weight", TV_F32, 2, {8, 8}, 5},
        {P "1.xq_proj.lora_B.weight", TV_F32, 2, {12, 8}, 6},
    };
    tv_adapter *a = NULL;

    (void)state;
    tensors(t, 6);
    /* The first pattern that matches at a dot; "q_proj" is no part of
     * "xq_proj". */
    config("{\"r\": 8, \"lora_alpha\": 16, \"use_rslora\": true,"
           "\"rank_pattern\": {\"layers.0.self_attn.q_proj\": 2,"
           "\"q_proj\": 4, \"layers\\\\.[01]\\\\..*\": 64},"
           "\"alpha_pattern\": {\"model.*1.self_attn.q_proj\": 3.5}}");
    refuse(TV_E_INPUT, "1.xq_proj.lora_A.weight' has rank 8, "
                       "adapter_config.json says 64");
    config("{\"r\": 8, \"lora_alpha\": 16, \"use_rslora\": true,"
           "\"rank_pattern\": {\"layers.0.self_attn.q_proj\": 2,"
           "\"q_proj\": 4},"
           "\"alpha_pattern\": {\"model.*1.self_attn.q_proj\": 3.5}}");
    a = open_adapter();
    assert_int_equal(tv_adapter_count(a), 3);
    assert_true(tv_adapter_module(a, 0)->scaling == 16 / sqrt(2.0));
    assert_true(tv_adapter_module(a, 1)->alpha == 3.5);
    assert_true(tv_adapter_module(a, 1)->scaling == 3.5 / 2);
    assert_true(tv_adapter_module(a, 2)->scaling == 16 / sqrt(8.0));
    close_adapter(a);
}

static void test_patterns(void **state)
{
    static const struct {
        const char *pattern, *module;
        bool match;
    } cases[] = {
        {"q_proj", "model.layers.0.self_attn.q_proj", true},
        {"q_proj", "q_proj", true},
        {"q_proj", "model.q_proj.inner", false},
        {"q_proj", "model.xq_proj", false},
        {"model.layers.0.*", "model.layers.0.mlp.up_proj", true},
        {"layers.(1|3).mlp", "model.layers.3.mlp", true},
        {"layers.(1|3).mlp", "model.layers.2.mlp", false},
        {"a|b", "x.b", true},
        {"^layers", "model.layers", false},
        {"[kq]_proj", "h.k_proj", true},
    };
    struct tv_lora_config *c = NULL;
    struct tv_error err;

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[256];
        uint64_t r = 0;
        double alpha = 0;

        ff_print(text, sizeof text, "{\"r\": 1, \"rank_pattern\": {\"%s\": 7}}",
                 cases[i].pattern);
        assert_ok(tv_lora_config_parse(text, strlen(text), "c", &err, &c),
                  &err);
        assert_ok(tv_lora_config_for(c, cases[i].module, &r, &alpha, &err),
                  &err);
        if (r != (cases[i].match ? 7u : 1u))
            fail_msg("'%s' and '%s'", cases[i].pattern, cases[i].module);
        tv_lora_config_free(c);
    }
}

/* PEFT 0.10 to 0.13: the first key of both maps that matches, dot in front,
 * is looked up in both; found with adapters that those versions wrote. */
static void test_joint_patterns(void **state)
{
    static const char both[] =
        "{\"r\": 3, \"lora_alpha\": 5, \"loftq_config\": {}%s,"
        "\"rank_pattern\": {\"b.q\": 4, \"^model.*v\": 2, \"m.x\": 6},"
        "\"alpha_pattern\": {\"q\": 7, \"m.x\": 9}}";
    static const struct {
        const char *module;
        uint64_t old_r, r;
        double old_alpha, alpha;
    } cases[] = {
        {"model.b.q", 4, 4, 5, 7}, /* alpha is not looked up by "q" */
        {"model.a.q", 3, 3, 7, 7},
        {"model.a.v", 3, 2, 5, 5}, /* "^" after ".*\." never matches */
        {"h.m.x", 6, 6, 9, 9},
        {"m.x", 6, 6, 9, 9}, /* by its whole name */
    };
    struct tv_lora_config *c = NULL;
    struct tv_error err;

    (void)state;
    for (size_t i = 0; i < 2 * (sizeof cases / sizeof *cases); i++) {
        const bool old = i % 2 == 0;
        char text[512];
        uint64_t r = 0;
        double alpha = 0;

        ff_print(text, sizeof text, both, old ? "" : ", \"lora_bias\": false");
        assert_ok(tv_lora_config_parse(text, strlen(text), "c", &err, &c),
                  &err);
        assert_ok(tv_lora_config_for(c, cases[i / 2].module, &r, &alpha, &err),
                  &err);
        assert_int_equal(r, old ? cases[i / 2].old_r : cases[i / 2].r);
        assert_true(alpha ==
                    (old ? cases[i / 2].old_alpha : cases[i / 2].alpha));
        tv_lora_config_free(c);
    }
}

/* A pattern made to run for years is stopped. */
static void test_slow_pattern(void **state)
{
    static const char text[] = "{\"rank_pattern\": {\"(a+a+)+[bc]\": 7}}";
    struct tv_lora_config *c = NULL;
    struct tv_error err;
    char module[4001];
    uint64_t r = 0;
    double alpha = 0;

    (void)state;
    memset(module, 'a', sizeof module - 1);
    module[sizeof module - 1] = '\0';
    assert_ok(tv_lora_config_parse(text, sizeof text - 1, "c", &err, &c), &err);
    assert_code(tv_lora_config_for(c, module, &r, &alpha, &err), TV_E_CORRUPT,
                &err);
    assert_message(&err, "c: the pattern");
    assert_message(&err, "takes too long");
    tv_lora_config_free(c);
}

static void test_spellings(void **state)
{
    static const struct ff_tensor t[] = {
        {P "0.self_attn.q_proj.lora_A.default.weight", TV_F32, 2, {4, 8}, 1},
        {P "0.self_attn.q_proj.lora_B.default.weight", TV_F32, 2, {12, 4}, 2},
        {"lm_head.lora_A.weight", TV_F32, 2, {4, 8}, 3},
        {"lm_head.lora_B.weight", TV_F32, 2, {32, 4}, 4},
    };
    static const struct ff_tensor twice[] = {
        {P "0.self_attn.q_proj.lora_A.default.weight", TV_F32, 2, {4, 8}, 1},
        {P "0.self_attn.q_proj.lora_B.default.weight", TV_F32, 2, {12, 4}, 2},
        {P "0.self_attn.q_proj.lora_A.weight", TV_F32, 2, {4, 8}, 3},
        {P "0.self_attn.q_proj.lora_B.weight", TV_F32, 2, {12, 4}, 4},
    };
    tv_adapter *a = NULL;

    (void)state;
    config("{\"r\": 4}");
    tensors(t, 4);
    a = open_adapter();
    assert_int_equal(tv_adapter_count(a), 2);
    assert_string_equal(tv_adapter_module(a, 0)->module, "lm_head");
    assert_string_equal(tv_adapter_module(a, 1)->module,
                        "model.layers.0.self_attn.q_proj");
    assert_float_equal(tv_adapter_module(a, 0)->scaling, 2, 0);
    close_adapter(a);
    tensors(twice, 4);
    refuse(TV_E_CORRUPT, "occurs a second time");
}

static void test_broken(void **state)
{
    struct ff_tensor t[3];

    (void)state;
    config("{\"r\": 4}");
    tensors(pair, 1);
    refuse(TV_E_CORRUPT, "q_proj.lora_A.weight' has no lora_B beside it");
    tensors(pair + 1, 1);
    refuse(TV_E_CORRUPT, "q_proj.lora_B.weight' has no lora_A beside it");
    memcpy(t, pair, sizeof pair);
    t[1].shape[1] = 3;
    tensors(t, 2);
    refuse(TV_E_CORRUPT, "lora_A.weight' has rank 4, its lora_B has 3");
    t[0].shape[0] = 3;
    tensors(t, 2);
    refuse(TV_E_INPUT, "has rank 3, adapter_config.json says 4");
    memcpy(t, pair, sizeof pair);
    t[0].rank = 1;
    tensors(t, 2);
    refuse(TV_E_CORRUPT, "is no matrix with elements");
    memcpy(t, pair, sizeof pair);
    t[1].shape[0] = 0;
    tensors(t, 2);
    refuse(TV_E_CORRUPT, "is no matrix with elements");
    memcpy(t, pair, sizeof pair);
    t[1].dtype = TV_I32;
    tensors(t, 2);
    refuse(TV_E_UNSUPPORTED, "is neither F32, F16 nor BF16");
    memcpy(t, pair, sizeof pair);
    t[0].rank = 4;
    t[0].shape[2] = t[0].shape[3] = 1;
    tensors(t, 2);
    refuse(TV_E_CORRUPT, "has not as many dimensions as its lora_A");
    t[1].rank = 4;
    t[1].shape[2] = 1;
    t[1].shape[3] = 3;
    tensors(t, 2);
    refuse(TV_E_UNSUPPORTED, "is a convolution that is wider than 1");
    tensors(pair, 0);
    refuse(TV_E_INPUT, "the adapter has no tensors");
}

/* Names that are no part of any change. */
static void test_refused(void **state)
{
    static const struct {
        const char *name, *part;
    } cases[] = {
        {P "0.self_attn.q_proj.lora_A.bias", "a bias in lora_A"},
        {P "0.mlp.experts.base_layer.lora_C.weight", "unknown LoRA variant"},
        {P "0.self_attn.q_proj.bias", "neither modules_to_save nor bias"},
        {"base_model.model.head.weight", "neither modules_to_save nor bias"},
        {P "0.self_attn.q_proj.lora_diag.weight", "KaSA"},
        {P "0.self_attn.q_proj.lora_C.weight", "unknown LoRA variant"},
        {P "0.self_attn.q_proj.lora_A.other.weight", "unknown LoRA variant"},
        {"base_model.model.e.token_adapter.base_layer.weight",
         "trained tokens"},
    };

    (void)state;
    config("{\"r\": 4}");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct ff_tensor t[3];
        char part[256];

        memcpy(t, pair, sizeof pair);
        t[2] = (struct ff_tensor){cases[i].name, TV_F32, 1, {4}, 9};
        tensors(t, 3);
        refuse(TV_E_UNSUPPORTED, cases[i].part);
        ff_print(part, sizeof part, "tensor '%s'", cases[i].name);
        refuse(TV_E_UNSUPPORTED, part);
    }
}

/* Parts that do not belong together. */
static void test_incomplete(void **state)
{
    static const struct {
        const char *config, *name;
        enum tv_err code;
        const char *part;
        unsigned rank;
        uint64_t shape[2];
    } cases[] = {
        {"{\"r\": 4}",
         P "0.self_attn.q_proj.lora_magnitude_vector",
         TV_E_INPUT,
         "belongs to DoRA",
         1,
         {12}},
        {"{\"r\": 4, \"use_dora\": true}",
         P "0.self_attn.q_proj.lora_magnitude_vector",
         TV_E_CORRUPT,
         "one element per output feature",
         1,
         {8}},
        {"{\"r\": 4, \"use_dora\": true}",
         P "1.self_attn.q_proj.lora_magnitude_vector.default.weight",
         TV_E_INPUT,
         "has no lora_magnitude_vector beside it",
         1,
         {12}},
        {"{\"r\": 4}",
         P "1.self_attn.q_proj.lora_magnitude_vector",
         TV_E_CORRUPT,
         "has no lora_A beside it",
         1,
         {12}},
        {"{\"r\": 4}",
         P "0.self_attn.q_proj.lora_B.bias",
         TV_E_INPUT,
         "lora_bias",
         1,
         {12}},
        {"{\"r\": 4, \"lora_bias\": true}",
         P "0.self_attn.q_proj.lora_B.bias",
         TV_E_CORRUPT,
         "one element per output feature",
         1,
         {8}},
        {"{\"r\": 4}",
         "base_model.model.embed_tokens.lora_embedding_A",
         TV_E_CORRUPT,
         "has no lora_embedding_B",
         2,
         {4, 8}},
        {"{\"r\": 4}",
         "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta",
         TV_E_INPUT,
         "trainable_token_indices",
         2,
         {2, 8}},
        {"{\"r\": 4, \"trainable_token_indices\": [1]}",
         "base_model.model.embed_tokens.token_adapter.trainable_tokens_delta",
         TV_E_CORRUPT,
         "one row per token",
         2,
         {2, 8}},
    };

    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct ff_tensor t[3];

        config(cases[i].config);
        memcpy(t, pair, sizeof pair);
        t[2] = (struct ff_tensor){cases[i].name,
                                  TV_F32,
                                  cases[i].rank,
                                  {cases[i].shape[0], cases[i].shape[1]},
                                  9};
        tensors(t, 3);
        refuse(cases[i].code, cases[i].part);
    }
    tensors(pair, 2);
    config("{\"r\": 4, \"use_dora\": true}");
    refuse(TV_E_INPUT, "says DoRA (use_dora)");
    config("{\"r\": 4, \"lora_bias\": true}");
    refuse(TV_E_INPUT, "says lora_bias");
    config("{\"r\": 3, \"target_parameters\": [\"q_proj.w\"]}");
    refuse(TV_E_INPUT, "says 3 for each expert");
}

/* Every kind of change: kind, target, order. */
static void test_changes(void **state)
{
    static const struct ff_tensor t[] = {
        {P "0.self_attn.q_proj.lora_A.weight", TV_F32, 2, {4, 8}, 1},
        {P "0.self_attn.q_proj.lora_B.weight", TV_F32, 2, {12, 4}, 2},
        {P "0.self_attn.q_proj.lora_B.bias", TV_F32, 1, {12}, 3},
        {P "0.self_attn.q_proj.lora_magnitude_vector", TV_F32, 1, {12}, 4},
        {P "0.self_attn.q_proj.base_layer.bias", TV_F32, 1, {12}, 5},
        {"base_model.model.model.embed_tokens.lora_embedding_A.default",
         TV_F32,
         2,
         {4, 32},
         6},
        {"base_model.model.model.embed_tokens.lora_embedding_B.default",
         TV_F32,
         2,
         {8, 4},
         7},
        {"base_model.model.model.embed_tokens.lora_magnitude_vector.default."
         "weight",
         TV_F32,
         1,
         {8},
         8},
        {"base_model.model.model.embed_tokens.base_layer.weight",
         TV_F32,
         2,
         {32, 8},
         9},
        {"base_model.model.model.embed_tokens.token_adapter."
         "trainable_tokens_delta",
         TV_F32,
         2,
         {2, 8},
         10},
        {"base_model.model.lm_head.modules_to_save.default.weight",
         TV_F32,
         2,
         {32, 8},
         11},
    };
    static const struct {
        const char *target;
        enum tv_change_kind kind;
    } want[] = {
        {"lm_head.weight", TV_CHANGE_REPLACE},
        {"model.embed_tokens.weight", TV_CHANGE_REPLACE},
        {"model.embed_tokens.weight", TV_CHANGE_ROWS},
        {"model.embed_tokens.weight", TV_CHANGE_LOW_RANK},
        {"model.layers.0.self_attn.q_proj.bias", TV_CHANGE_REPLACE},
        {"model.layers.0.self_attn.q_proj.bias", TV_CHANGE_ADD},
        {"model.layers.0.self_attn.q_proj.weight", TV_CHANGE_LOW_RANK},
    };
    const size_t n = sizeof want / sizeof *want;
    tv_adapter *a = NULL;

    (void)state;
    config("{\"r\": 4, \"lora_alpha\": 6, \"lora_bias\": true,"
           "\"use_dora\": true, \"bias\": \"lora_only\","
           "\"modules_to_save\": [\"lm_head\"],"
           "\"trainable_token_indices\": {\"embed_tokens\": [7, 31]}}");
    tensors(t, sizeof t / sizeof *t);
    a = open_adapter();
    assert_int_equal(tv_adapter_count(a), n);
    for (size_t i = 0; i < n; i++) {
        const struct tv_adapter_module *m = tv_adapter_module(a, i);

        assert_string_equal(m->target, want[i].target);
        assert_int_equal(m->kind, want[i].kind);
        assert_true((m->magnitude != NULL) == (m->kind == TV_CHANGE_LOW_RANK));
    }
    assert_int_equal(tv_adapter_module(a, 2)->n_rows, 2);
    assert_int_equal(tv_adapter_module(a, 2)->rows[1], 31);
    assert_true(tv_adapter_module(a, 3)->transposed);
    assert_float_equal(tv_adapter_module(a, 5)->scaling, 1.5, 0);
    close_adapter(a);
}

/* ---- binding
 * ------------------------------------------------------------------- */

static enum tv_err bind_to(const struct ff_tensor *t, size_t n, size_t *targets,
                           struct tv_error *err)
{
    char *model = tmpdir_make();
    tv_input *b = NULL;
    tv_adapter *a = open_adapter();
    enum tv_err rc = TV_OK;

    ff_write(model, "model.safetensors", t, n);
    b = open_input(model);
    rc = tv_adapter_bind(a, b, targets, err);
    if (rc == TV_OK) {
        /* Names instead of places: the order of an input is its own. */
        for (size_t i = 0; i < tv_adapter_count(a); i++) {
            const char *name = tv_input_tensor(b, targets[i])->name;

            for (size_t k = 0; k < n; k++) {
                if (strcmp(t[k].name, name) == 0) {
                    targets[i] = k;
                    break;
                }
            }
        }
    }
    tv_input_close(b);
    close_adapter(a);
    tmpdir_remove(model);
    return rc;
}

/* What peft writes when the embedding was resized before training: saved
 * modules under both spellings, and the base's beside them. */
static void test_saved_twice(void **state)
{
    struct ff_tensor t[] = {
        {"base_model.model.lm_head.modules_to_save.weight",
         TV_F32,
         2,
         {34, 8},
         1},
        {"base_model.model.lm_head.original_module.weight",
         TV_F32,
         2,
         {34, 8},
         2},
        {"base_model.model.lm_head.weight", TV_F32, 2, {34, 8}, 1},
    };
    static const struct ff_tensor b[1] = {
        {"lm_head.weight", TV_F32, 2, {32, 8}, 4}};
    size_t targets[1] = {0};
    struct tv_error err;
    tv_adapter *a = NULL;

    (void)state;
    config("{\"r\": 4, \"modules_to_save\": [\"lm_head\"]}");
    tensors(t, 3);
    a = open_adapter();
    assert_int_equal(tv_adapter_count(a), 1);
    assert_string_equal(tv_adapter_module(a, 0)->target, "lm_head.weight");
    close_adapter(a);
    assert_code(bind_to(b, 1, targets, &err), TV_E_INPUT, &err);
    assert_message(&err, "resized to 34 rows first");
    t[2].seed = 3;
    tensors(t, 3);
    refuse(TV_E_CORRUPT, "occurs a second time under another spelling");
}

static void test_bind(void **state)
{
    static const struct ff_tensor t[] = {
        {P "1.self_attn.q_proj.lora_A.weight", TV_F32, 2, {4, 8}, 1},
        {P "1.self_attn.q_proj.lora_B.weight", TV_F32, 2, {12, 4}, 2},
        {"base_model.model.lm_head.lora_A.weight", TV_F32, 2, {4, 8}, 3},
        {"base_model.model.lm_head.lora_B.weight", TV_F32, 2, {32, 4}, 4},
    };
    struct ff_tensor renamed[6];
    size_t targets[4] = {0};
    struct tv_error err;

    (void)state;
    config("{\"r\": 4}");
    tensors(t, 4);
    assert_ok(bind_to(base, 6, targets, &err), &err);
    assert_int_equal(targets[0], 5);
    assert_int_equal(targets[1], 2);
    /* A base without "model." in front, and one with more of it. */
    memcpy(renamed, base, sizeof base);
    renamed[2].name = "layers.1.self_attn.q_proj.weight";
    assert_ok(bind_to(renamed, 6, targets, &err), &err);
    assert_int_equal(targets[1], 2);
    renamed[2].name = "language_model.model.layers.1.self_attn.q_proj.weight";
    assert_ok(bind_to(renamed, 6, targets, &err), &err);
    assert_int_equal(targets[1], 2);
    /* Never another layer, nor two candidates. */
    renamed[2].name = "other.weight";
    assert_code(bind_to(renamed, 6, targets, &err), TV_E_INPUT, &err);
    assert_message(&err, "layers.1.self_attn.q_proj.weight, which is not in");
    renamed[2].name = "x.model.layers.1.self_attn.q_proj.weight";
    renamed[0].name = "y.model.layers.1.self_attn.q_proj.weight";
    assert_code(bind_to(renamed, 6, targets, &err), TV_E_INPUT, &err);
    assert_message(&err, "could be several tensors");
    renamed[0].name = "model.layers.1.self_attn.q_proj.weight"; /* itself */
    assert_ok(bind_to(renamed, 6, targets, &err), &err);
    assert_int_equal(targets[1], 0);
    /* "x_lm_head.weight" does not end in the component "lm_head". */
    memcpy(renamed, base, sizeof base);
    renamed[5].name = "x_lm_head.weight";
    assert_code(bind_to(renamed, 6, targets, &err), TV_E_INPUT, &err);
    assert_message(&err, "changes lm_head.weight, which is not in");
}

static void test_bind_shapes(void **state)
{
    struct ff_tensor b[1] = {
        {"model.layers.0.self_attn.q_proj.weight", TV_BF16, 2, {8, 12}, 1}};
    size_t targets[1] = {0};
    struct tv_error err;

    (void)state;
    config("{\"r\": 4}");
    tensors(pair, 2);
    assert_code(bind_to(b, 1, targets, &err), TV_E_INPUT, &err);
    assert_message(&err, "changes a weight [12, 8], but "
                         "model.layers.0.self_attn.q_proj.weight in");
    assert_message(&err, "is [8, 12]");
    config("{\"r\": 4, \"fan_in_fan_out\": true}");
    assert_ok(bind_to(b, 1, targets, &err), &err);
    b[0].shape[0] = 12;
    b[0].shape[1] = 8;
    assert_code(bind_to(b, 1, targets, &err), TV_E_INPUT, &err);
    b[0].rank = 1;
    assert_code(bind_to(b, 1, targets, &err), TV_E_INPUT, &err);
}

/* Stacked experts: the shape says which parameter and which way. */
static void test_experts(void **state)
{
    static const struct ff_tensor t[] = {
        {P "0.mlp.experts.base_layer.lora_A.weight", TV_F32, 2, {6, 8}, 1},
        {P "0.mlp.experts.base_layer.lora_B.weight", TV_F32, 2, {10, 6}, 2},
        {P "0.mlp.experts.lora_A.weight", TV_F32, 2, {6, 5}, 3},
        {P "0.mlp.experts.lora_B.weight", TV_F32, 2, {8, 6}, 4},
    };
    struct ff_tensor b[] = {
        {"model.layers.0.mlp.experts.gate_up_proj", TV_F32, 3, {3, 10, 8}, 1},
        {"model.layers.0.mlp.experts.down_proj", TV_F32, 3, {3, 5, 8}, 2},
    };
    size_t targets[2] = {0};
    tv_adapter *a = NULL;
    struct tv_error err;

    (void)state;
    config("{\"r\": 2, \"lora_alpha\": 4, \"target_parameters\":"
           "[\"experts.down_proj\", \"mlp.experts.gate_up_proj\"]}");
    tensors(t, 4);
    a = open_adapter();
    assert_int_equal(tv_adapter_count(a), 2);
    assert_int_equal(tv_adapter_module(a, 0)->n_experts, 3);
    assert_int_equal(tv_adapter_module(a, 0)->r, 2);
    assert_int_equal(tv_adapter_module(a, 0)->in_features, 5);
    assert_float_equal(tv_adapter_module(a, 0)->scaling, 2, 0);
    close_adapter(a);
    assert_ok(bind_to(b, 2, targets, &err), &err);
    assert_int_equal(targets[0], 1);
    assert_int_equal(targets[1], 0);
    b[0].shape[0] = 4;
    assert_code(bind_to(b, 2, targets, &err), TV_E_INPUT, &err);
    assert_message(&err, "of each expert");
    b[0].shape[0] = 3;
    b[1].name = "model.layers.0.mlp.experts.w2";
    assert_code(bind_to(b, 2, targets, &err), TV_E_INPUT, &err);
    /* Both parameters fit both levels. */
    b[1].name = "model.layers.0.mlp.experts.down_proj";
    b[1].shape[1] = 10;
    assert_code(bind_to(b, 2, targets, &err), TV_E_INPUT, &err);
    tensors(t, 2);
    assert_code(bind_to(b, 2, targets, &err), TV_E_UNSUPPORTED, &err);
    assert_message(&err, "in more than one way");
    config("{\"r\": 2}");
    refuse(TV_E_UNSUPPORTED, "target_parameters");
}

/* Changes that are no products: shapes, rows, biases that are not there. */
static void test_bind_changes(void **state)
{
    static const struct ff_tensor t[] = {
        {"base_model.model.lm_head.weight", TV_F32, 2, {32, 8}, 1},
        {"base_model.model.model.embed_tokens.token_adapter."
         "trainable_tokens_delta",
         TV_F32,
         2,
         {2, 8},
         2},
    };
    struct ff_tensor b[] = {
        {"lm_head.weight", TV_BF16, 2, {32, 8}, 1},
        {"model.embed_tokens.weight", TV_BF16, 2, {32, 8}, 2},
        {"model.layers.0.self_attn.q_proj.weight", TV_BF16, 2, {12, 8}, 3},
    };
    static const struct ff_tensor bias[] = {
        {P "0.self_attn.q_proj.lora_A.weight", TV_F32, 2, {4, 8}, 1},
        {P "0.self_attn.q_proj.lora_B.weight", TV_F32, 2, {12, 4}, 2},
        {P "0.self_attn.q_proj.lora_B.bias", TV_F32, 1, {12}, 3},
    };
    size_t targets[2] = {0};
    struct tv_error err;

    (void)state;
    config("{\"trainable_token_indices\": [0, 31]}");
    tensors(t, 2);
    assert_ok(bind_to(b, 3, targets, &err), &err);
    assert_int_equal(targets[0], 0);
    assert_int_equal(targets[1], 1);
    config("{\"trainable_token_indices\": [0, 32]}");
    assert_code(bind_to(b, 3, targets, &err), TV_E_INPUT, &err);
    assert_message(&err, "has trained tokens [2, 8], but "
                         "model.embed_tokens.weight in");
    config("{\"trainable_token_indices\": [0, 31]}");
    b[0].shape[0] = 33;
    assert_code(bind_to(b, 3, targets, &err), TV_E_INPUT, &err);
    assert_message(&err, "changes a weight [32, 8], but lm_head.weight in");
    config("{\"r\": 4, \"lora_bias\": true}");
    tensors(bias, 3);
    assert_code(bind_to(b, 3, targets, &err), TV_E_INPUT, &err);
    assert_message(&err, "q_proj.bias, which is not in");
}

static void test_bind_twice(void **state)
{
    static const struct ff_tensor t[] = {
        {"base_model.model.model.layers.0.q.lora_A.weight",
         TV_F32,
         2,
         {4, 8},
         1},
        {"base_model.model.model.layers.0.q.lora_B.weight",
         TV_F32,
         2,
         {12, 4},
         2},
        {"base_model.model.layers.0.q.lora_A.weight", TV_F32, 2, {4, 8}, 3},
        {"base_model.model.layers.0.q.lora_B.weight", TV_F32, 2, {12, 4}, 4},
    };
    static const struct ff_tensor b[] = {
        {"model.layers.0.q.weight", TV_F32, 2, {12, 8}, 1}};
    size_t targets[2] = {0};
    struct tv_error err;

    (void)state;
    config("{\"r\": 4}");
    tensors(t, 4);
    assert_code(bind_to(b, 1, targets, &err), TV_E_INPUT, &err);
    assert_message(&err, "another module changes already");
}

static void test_no_adapter(void **state)
{
    char *model = tmpdir_make();
    size_t n = 0;
    tv_input *in = NULL;
    tv_adapter *a = NULL;
    struct tv_error err;

    (void)state;
    (void)ff_model(model, &n);
    in = open_input(model);
    assert_code(tv_adapter_open(in, &err, &a), TV_E_INPUT, &err);
    assert_message(&err, "is not an adapter");
    tv_input_close(in);
    tmpdir_remove(model);
}

static enum tv_err open_once(void *arg, struct tv_error *err)
{
    tv_input *in = NULL;
    tv_adapter *a = NULL;
    tv_input *b = NULL;
    size_t targets[4] = {0};
    enum tv_err rc = tv_input_open_path(dir, err, &in);

    if (rc == TV_OK)
        rc = tv_adapter_open(in, err, &a);
    if (rc == TV_OK)
        rc = tv_input_open_path(arg, err, &b);
    if (rc == TV_OK)
        rc = tv_adapter_bind(a, b, targets, err);
    tv_input_close(b);
    tv_adapter_close(a);
    tv_input_close(in);
    return rc;
}

static void test_no_memory(void **state)
{
    char *model = tmpdir_make();

    (void)state;
    config("{\"r\": 3, \"rank_pattern\": {\"q_proj\": 4}}");
    tensors(pair, 2);
    ff_write(model, "model.safetensors", base, 6);
    assert_true(faults_loop_alloc(open_once, model, true) > 50);
    tmpdir_remove(model);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_plain, setup, teardown),
        cmocka_unit_test_setup_teardown(test_scaling, setup, teardown),
        cmocka_unit_test(test_patterns),
        cmocka_unit_test(test_joint_patterns),
        cmocka_unit_test(test_slow_pattern),
        cmocka_unit_test_setup_teardown(test_spellings, setup, teardown),
        cmocka_unit_test_setup_teardown(test_broken, setup, teardown),
        cmocka_unit_test_setup_teardown(test_refused, setup, teardown),
        cmocka_unit_test_setup_teardown(test_incomplete, setup, teardown),
        cmocka_unit_test_setup_teardown(test_changes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_experts, setup, teardown),
        cmocka_unit_test_setup_teardown(test_bind_changes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_saved_twice, setup, teardown),
        cmocka_unit_test_setup_teardown(test_bind, setup, teardown),
        cmocka_unit_test_setup_teardown(test_bind_shapes, setup, teardown),
        cmocka_unit_test_setup_teardown(test_bind_twice, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_adapter, setup, teardown),
        cmocka_unit_test_setup_teardown(test_no_memory, setup, teardown),
    };
    json_set_alloc_funcs(tv_alloc, tv_free);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
