/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_params.c - the value every parameter gets, rule by rule of mergekit's
 * language: filters, scopes, gradients, types. Seen through plans of tiny
 * models with 4 layers (a, b, c) and 1 layer (one, uno).
 */
#include "plan_fixture.h"

#include <stdio.h>
#include <string.h>

#include "params.h"
#include "tv/alloc.h"

static char *dir;

static void model(const char *name, unsigned layers, uint64_t seed)
{
    struct tiny_model m;
    tiny_model_init(&m);
    m.layers = layers;
    m.seed = seed;
    tv_free(tiny_model_write(dir, name, &m));
}

static int setup(void **state)
{
    (void)state;
    dir = tmpdir_make();
    if (dir == NULL)
        return 1;
    model("a", 4, 1);
    model("b", 4, 2);
    model("c", 4, 3);
    model("one", 1, 4);
    model("uno", 1, 5);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    tmpdir_remove(dir);
    return 0;
}

#define LAYER(l, rest) "model.layers." #l "." rest ".weight"
#define Q(l)           LAYER(l, "self_attn.q_proj")
#define UP(l)          LAYER(l, "mlp.up_proj")
#define EMBED          "model.embed_tokens.weight"
#define NORM           "model.norm.weight"
#define HEAD           "lm_head.weight"

static void near(double got, double want)
{
    if (!(got > want - 1e-12 && got < want + 1e-12))
        fail_msg("%.17g is not %.17g", got, want);
}

static void test_filters(void **state)
{
    struct planned p;
    (void)state;
    plan_good(&p, dir,
              "merge_method: linear\nmodels:\n- model: $/a\n  parameters:\n"
              "    weight:\n    - {filter: mlp, value: 0.25}\n"
              "    - {filter: layers.1, value: 0.5}\n"
              "    - {filter: up_proj, value: 9}\n"
              "    - {value: 2}\n"
              "- model: $/b\n  parameters: {weight: {filter: '*', value: 3}}\n",
              NULL);
    near(planned_of(&p, UP(0), 0, "weight"), 0.25);
    /* The first match wins, also over a later, longer one. */
    near(planned_of(&p, UP(1), 0, "weight"), 0.25);
    near(planned_of(&p, Q(1), 0, "weight"), 0.5);
    near(planned_of(&p, Q(0), 0, "weight"), 2);
    near(planned_of(&p, EMBED, 0, "weight"), 2);
    near(planned_of(&p, Q(3), 1, "weight"), 3);
    planned_free(&p);
    /* Substrings, no patterns. */
    plan_good(&p, dir,
              "merge_method: linear\nmodels:\n- model: $/a\n  parameters:\n"
              "    weight: [{filter: 'q_pro.', value: 5}, {filter: 'l.l', "
              "value: 6}, {value: 7}]\n",
              NULL);
    near(planned_of(&p, Q(0), 0, "weight"), 6);
    near(planned_of(&p, HEAD, 0, "weight"), 7);
    planned_free(&p);
}

static void test_scopes(void **state)
{
    struct planned p;
    (void)state;
    plan_good(
        &p, dir,
        "merge_method: ties\nbase_model: $/a\nparameters:\n  density: 0.1\n"
        "  weight: 0.2\n  lambda: 1.5\n  normalize: false\n"
        "slices:\n- sources:\n"
        "  - {model: $/a, layer_range: [0, 2]}\n"
        "  - model: $/b\n    layer_range: [0, 2]\n"
        "    parameters: {density: 0.9, lambda: 7}\n"
        "  - {model: $/c, layer_range: [0, 2]}\n"
        "  parameters: {density: 0.5, normalize: true}\n"
        "- sources:\n"
        "  - {model: $/a, layer_range: [2, 4]}\n"
        "  - {model: $/b, layer_range: [2, 4]}\n",
        NULL);
    near(planned_of(&p, Q(0), 1, "density"), 0.9); /* source */
    near(planned_of(&p, Q(0), 2, "density"), 0.5); /* slice */
    near(planned_of(&p, Q(2), 1, "density"), 0.1); /* global */
    near(planned_of(&p, Q(0), 1, "weight"), 0.2);
    near(planned_shared(&p, Q(0), "normalize"), 1); /* slice over global */
    near(planned_shared(&p, Q(2), "normalize"), 0);
    near(planned_shared(&p, Q(0), "lambda"), 1.5); /* no source level */
    near(planned_shared(&p, Q(0), "rescale"), 0);  /* default */
    /* PRE follows the first slice, POST the last. */
    near(planned_shared(&p, EMBED, "normalize"), 1);
    near(planned_shared(&p, HEAD, "normalize"), 0);
    near(planned_shared(&p, NORM, "normalize"), 0);
    /* NON_BASE: never for the base. */
    assert_true(planned_tensor(&p, Q(0))->sources[0].is_base);
    assert_false(planned_tensor(&p, Q(0))->per_source_set[0]);
    planned_free(&p);
}

static void test_fall_through(void **state)
{
    struct planned p;
    (void)state;
    /* No filter matches, an empty list, null: the next scope decides. */
    plan_good(
        &p, dir,
        "merge_method: linear\nparameters:\n"
        "  weight: [{filter: q_proj, value: 4}, {value: 8}]\n"
        "  normalize: []\n"
        "models:\n"
        "- model: $/a\n  parameters: {weight: [{filter: mlp, value: 1}]}\n"
        "- model: $/b\n  parameters: {weight: []}\n"
        "- model: $/c\n  parameters: {weight: null}\n",
        NULL);
    near(planned_of(&p, UP(0), 0, "weight"), 1);
    near(planned_of(&p, Q(0), 0, "weight"), 4);
    near(planned_of(&p, NORM, 0, "weight"), 8);
    near(planned_of(&p, Q(0), 1, "weight"), 4);
    near(planned_of(&p, UP(2), 2, "weight"), 8);
    near(planned_shared(&p, Q(0), "normalize"), 1); /* the default */
    planned_free(&p);
}

static void test_gradients(void **state)
{
    struct planned p;
    (void)state;
    plan_good(&p, dir,
              "merge_method: slerp\nbase_model: $/a\n"
              "models: [{model: $/a}, {model: $/b}]\n"
              "parameters:\n  t:\n"
              "  - {filter: q_proj, value: [0, 0.5, 0.3, 0.7, 1]}\n"
              "  - {filter: up_proj, value: [1, 0]}\n"
              "  - {filter: down_proj, value: [0.3]}\n"
              "  - {value: [0.1, 0.2, 0.3, 0.4]}\n",
              NULL);
    /* 5 values over 4 layers: s = k/3*4. */
    near(planned_shared(&p, Q(0), "t"), 0);
    near(planned_shared(&p, Q(1), "t"), 0.5 + (4.0 / 3 - 1) * (0.3 - 0.5));
    near(planned_shared(&p, Q(2), "t"), 0.3 + (8.0 / 3 - 2) * (0.7 - 0.3));
    near(planned_shared(&p, Q(3), "t"), 1);
    near(planned_shared(&p, UP(0), "t"), 1);
    near(planned_shared(&p, UP(1), "t"), 2.0 / 3);
    near(planned_shared(&p, UP(3), "t"), 0);
    near(planned_shared(&p, LAYER(2, "mlp.down_proj"), "t"), 0.3);
    near(planned_shared(&p, LAYER(2, "self_attn.k_proj"), "t"), 0.3);
    /* Outside layers always the first value. */
    near(planned_shared(&p, EMBED, "t"), 0.1);
    near(planned_shared(&p, NORM, "t"), 0.1);
    near(planned_shared(&p, HEAD, "t"), 0.1);
    planned_free(&p);
}

static void test_gradient_of_one_layer(void **state)
{
    struct planned p;
    (void)state;
    plan_good(&p, dir,
              "merge_method: linear\nparameters: {weight: [1, 2, 5]}\n"
              "models: [{model: $/one}, {model: $/uno}]\n",
              NULL);
    near(planned_of(&p, Q(0), 0, "weight"), 5); /* the last value */
    near(planned_of(&p, EMBED, 0, "weight"), 1);
    planned_free(&p);
}

static void test_gradient_per_slice(void **state)
{
    struct planned p;
    (void)state;
    plan_good(&p, dir,
              "merge_method: passthrough\nparameters: {scale: [1, 2]}\n"
              "slices:\n"
              "- sources: [{model: $/a, layer_range: [0, 3]}]\n"
              "- sources: [{model: $/b, layer_range: [2, 4]}]\n",
              NULL);
    near(planned_of(&p, Q(0), 0, "scale"), 1);
    near(planned_of(&p, Q(1), 0, "scale"), 1.5);
    near(planned_of(&p, Q(2), 0, "scale"), 2);
    near(planned_of(&p, Q(3), 0, "scale"), 1); /* starts again */
    near(planned_of(&p, Q(4), 0, "scale"), 2);
    near(planned_of(&p, NORM, 0, "scale"), 1);
    planned_free(&p);
}

static void test_bool_gradient_steps(void **state)
{
    struct planned p;
    (void)state;
    plan_good(&p, dir,
              "merge_method: linear\nmodels: [{model: $/a}, {model: $/b}]\n"
              "parameters: {weight: 1, normalize: [true, false]}\n",
              NULL);
    near(planned_shared(&p, Q(0), "normalize"), 1);
    near(planned_shared(&p, Q(1), "normalize"), 1);
    near(planned_shared(&p, Q(2), "normalize"), 1);
    near(planned_shared(&p, Q(3), "normalize"), 0);
    planned_free(&p);
}

static void test_names(void **state)
{
    struct planned p;
    (void)state;
    /* Shared parameters see the output name, per-input ones the input's own:
     * output layers 0..1 are layers 2..3 of a and 1..2 of b. */
    plan_good(
        &p, dir,
        "merge_method: linear\nparameters:\n"
        "  normalize: [{filter: layers.0., value: false}, {value: true}]\n"
        "  weight: [{filter: layers.2., value: 20}, {filter: layers.1., "
        "value: 10}, {value: 1}]\n"
        "slices:\n- sources:\n"
        "  - {model: $/a, layer_range: [2, 4]}\n"
        "  - {model: $/b, layer_range: [1, 3]}\n",
        NULL);
    near(planned_shared(&p, Q(0), "normalize"), 0);
    near(planned_shared(&p, Q(1), "normalize"), 1);
    near(planned_of(&p, Q(0), 0, "weight"), 20);
    near(planned_of(&p, Q(0), 1, "weight"), 10);
    near(planned_of(&p, Q(1), 0, "weight"), 1);
    near(planned_of(&p, Q(1), 1, "weight"), 20);
    planned_free(&p);
}

static void test_types(void **state)
{
    struct planned p;
    (void)state;
    plan_good(&p, dir,
              "merge_method: linear\nmodels:\n"
              "- model: $/a\n  parameters: {weight: 1e-4}\n"
              "- model: $/b\n  parameters: {weight: '2.5'}\n"
              "- model: $/c\n  parameters: {weight: true}\n"
              "parameters: {normalize: 'off'}\n",
              NULL);
    near(planned_of(&p, Q(0), 0, "weight"), 1e-4);
    near(planned_of(&p, Q(0), 1, "weight"), 2.5);
    near(planned_of(&p, Q(0), 2, "weight"), 1);
    near(planned_shared(&p, Q(0), "normalize"), 0);
    planned_free(&p);
}

static void test_required(void **state)
{
    struct planned p;
    (void)state;
    plan_text(&p, dir,
              "merge_method: linear\nmodels:\n- model: $/a\n"
              "  parameters: {weight: 1}\n- model: $/b\n- model: $/c\n"
              "  parameters: {weight: [{filter: mlp, value: 1}]}\n",
              NULL);
    expect_problem(&p, true, TV_E_USAGE, "recipe.yml:5:10",
                   "missing required parameter 'weight' for '");
    expect_problem(&p, true, TV_E_USAGE, "recipe.yml:6:10",
                   "missing required parameter 'weight' for '");
    /* Listed once per model, with the first tensor only. */
    assert_int_equal(count_problems(&p, true, "missing required"), 2);
    assert_int_equal(p.problems.n_errors, 2);
    planned_free(&p);

    plan_text(&p, dir,
              "merge_method: slerp\nbase_model: $/a\n"
              "models: [{model: $/a}, {model: $/b}]\n",
              NULL);
    expect_problem(&p, true, TV_E_USAGE, "recipe.yml:1:15",
                   "missing required parameter 't' of slerp");
    planned_free(&p);

    /* An appended base of linear is one more input that needs a weight. */
    plan_text(&p, dir,
              "merge_method: linear\nbase_model: $/c\nmodels:\n"
              "- model: $/a\n  parameters: {weight: 1}\n",
              NULL);
    expect_problem(&p, true, TV_E_USAGE, "recipe.yml:2:13",
                   "counts as one more input");
    planned_free(&p);

    /* Optional and absent: not set. */
    plan_good(&p, dir, "merge_method: passthrough\nmodels: [{model: $/a}]\n",
              NULL);
    assert_false(planned_tensor(&p, Q(0))->per_source_set[0]);
    planned_free(&p);
}

/* No method of this version has an integer parameter: checked and resolved
 * directly. */
static void test_integers(void **state)
{
    static const struct tvm_param p = {.name = "n",
                                       .scope = TVM_SHARED,
                                       .type = TVM_INT,
                                       .has_default = true,
                                       .fallback = 7};
    static const char text[] = "ok: {n: [1, 4]}\nwhole: {n: \"3\"}\n"
                               "bad: {n: 1.5}\nalso: {n: [1, 2.5]}\n";
    struct tvm_arena arena = {NULL, 0, 0};
    struct tvm_problems problems;
    struct tvm_recipe r;
    struct tv_error err;
    const struct tvm_node *root = NULL;
    const struct tvm_node *level = NULL;
    struct tvm_value v;
    (void)state;

    memset(&r, 0, sizeof(r));
    r.path = (char *)"x.yml";
    r.method = tvm_method_at(0);
    r.info.name = "some";
    r.info.params = &p;
    r.info.n_params = 1;
    tvm_problems_init(&problems);
    assert_ok(tvm_yaml_parse("x.yml", text, sizeof(text) - 1, &arena, &problems,
                             &err, &root),
              &err);
    for (const struct tvm_node *e = root->first; e != NULL; e = e->next)
        tvm_params_check(&r, e, &problems);
    assert_int_equal(problems.n_errors, 2);
    assert_string_equal(problems.items[0].where, "x.yml:3:10");
    assert_non_null(strstr(problems.items[0].message, "not an integer"));
    assert_string_equal(problems.items[1].where, "x.yml:4:15");

    level = tvm_node_find(root, "ok");
    v = tvm_param_resolve(&p, &level, 1, "x", tvm_gradient_at(1, 4));
    assert_true(v.set && !v.fraction);
    near(v.value, 2);
    v = tvm_param_resolve(&p, &level, 1, "x", tvm_gradient_at(1, 3));
    assert_true(v.set && v.fraction);
    near(v.value, 2.5);
    level = tvm_node_find(root, "whole");
    v = tvm_param_resolve(&p, &level, 1, "x", 0);
    near(v.value, 3);
    level = NULL;
    v = tvm_param_resolve(&p, &level, 1, "x", 0);
    assert_true(v.set && v.from == NULL);
    near(v.value, 7);
    tvm_arena_free(&arena);
    tvm_problems_free(&problems);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_filters),
        cmocka_unit_test(test_scopes),
        cmocka_unit_test(test_fall_through),
        cmocka_unit_test(test_gradients),
        cmocka_unit_test(test_gradient_of_one_layer),
        cmocka_unit_test(test_gradient_per_slice),
        cmocka_unit_test(test_bool_gradient_steps),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_types),
        cmocka_unit_test(test_required),
        cmocka_unit_test(test_integers),
    };
    return cmocka_run_group_tests_name("params", tests, setup, teardown);
}
