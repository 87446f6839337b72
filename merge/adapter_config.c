/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_config.c - adapter_config.json of a merged adapter: that of the first
 * input, with everything that ranks, scaling and targets depend on replaced.
 *
 * lora_alpha = r in every module (patterns where the rank differs), so the
 * scaling is 1. Targets: the union of the inputs' lists; when one of them is no
 * plain list, or restricts layers, the full names of the modules.
 */
#include "adapter_merge.h"

#include <string.h>

#include <jansson.h>

#include "tv/alloc.h"

static bool is_null(const json_t *v)
{
    return !v || json_is_null(v) || json_is_false(v) ||
           (json_is_array(v) && json_array_size(v) == 0) ||
           (json_is_object(v) && json_object_size(v) == 0);
}

/* Only a list that holds for all layers means the same in a union. */
static bool plain_targets(const struct tvm_adapters *a)
{
    for (size_t i = 0; i < a->n_inputs; i++) {
        const json_t *c = a->inputs[i].config;
        if (!json_is_array(json_object_get(c, "target_modules")) ||
            !is_null(json_object_get(c, "layers_to_transform")) ||
            !is_null(json_object_get(c, "exclude_modules")))
            return false;
    }
    return true;
}

static bool has(const json_t *list, const char *name)
{
    for (size_t i = 0; i < json_array_size(list); i++)
        if (strcmp(json_string_value(json_array_get(list, i)), name) == 0)
            return true;
    return false;
}

static int add(json_t *list, const char *name)
{
    if (!name || has(list, name))
        return 0;
    return json_array_append_new(list, json_string(name));
}

static json_t *targets(const struct tvm_adapters *a)
{
    json_t *list = json_array();
    int bad = list == NULL;

    if (plain_targets(a)) {
        for (size_t i = 0; i < a->n_inputs; i++) {
            const json_t *of =
                json_object_get(a->inputs[i].config, "target_modules");
            for (size_t k = 0; k < json_array_size(of) && !bad; k++)
                bad = add(list, json_string_value(json_array_get(of, k)));
        }
    } else {
        for (size_t i = 0; i < a->n_modules && !bad; i++)
            bad = json_array_append_new(
                list, json_string(a->modules[i].like->module));
    }
    if (bad) {
        json_decref(list);
        return NULL;
    }
    return list;
}

static json_t *rank_pattern(const struct tvm_adapters *a)
{
    json_t *map = json_object();

    for (size_t i = 0; i < a->n_modules; i++) {
        const struct am_module *m = &a->modules[i];
        if (m->rank == a->out_rank)
            continue;
        if (json_object_set_new(map, m->like->module,
                                json_integer((json_int_t)m->rank)) != 0) {
            json_decref(map);
            return NULL;
        }
    }
    return map;
}

enum tv_err tvm_adapters_config(struct tvm_adapters *a, char **out,
                                struct tv_error *err)
{
    static const char *const cleared[] = {"layers_to_transform",
                                          "layers_pattern", "exclude_modules"};
    json_t *c = json_copy(a->inputs[0].config);
    char *raw = NULL;
    int bad = c == NULL;

    *out = NULL;
    bad |= json_object_set_new(c, "r", json_integer((json_int_t)a->out_rank));
    bad |= json_object_set_new(c, "lora_alpha",
                               json_integer((json_int_t)a->out_rank));
    bad |= json_object_set_new(c, "use_rslora", json_false());
    bad |= json_object_set_new(c, "init_lora_weights", json_true());
    bad |= json_object_set_new(c, "inference_mode", json_true());
    bad |= json_object_set_new(c, "peft_type", json_string("LORA"));
    bad |= json_object_set_new(c, "rank_pattern", rank_pattern(a));
    bad |= json_object_set_new(c, "alpha_pattern", rank_pattern(a));
    bad |= json_object_set_new(c, "target_modules", targets(a));
    for (size_t i = 0; i < sizeof cleared / sizeof *cleared; i++)
        bad |= json_object_set_new(c, cleared[i], json_null());
    if (bad == 0)
        raw = tv_json_text(c, JSON_INDENT(2));
    if (raw)
        *out = tv_asprintf("%s\n", raw);
    tv_free(raw);
    json_decref(c);
    return *out ? TV_OK : tv_error_set(err, TV_E_NOMEM, "out of memory");
}
