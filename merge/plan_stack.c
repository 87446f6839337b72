/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_stack.c - what config.json says about layers by number follows them.
 *
 * A stack renumbers layers. Whatever a config says of layer 7 must then be said
 * of the layers that were layer 7:
 *
 *   lists          one entry per layer (layer_types, ...)
 *   leading        "the first N layers are ..." (first_k_dense_replace)
 *   indices        "layers 0, 3, 5 are ..." (mlp_only_layers)
 *   periods        "every N-th layer is ..." (decoder_sparse_step)
 *
 * What cannot be said of the output is refused where it would load other
 * tensors than the output has, and a warning where only arithmetic differs.
 * Where slices merge several models, their base's (or first model's) config
 * counts.
 */
#include "plan_parts.h"

#include <string.h>

#include <jansson.h>

#include "tv/alloc.h"
#include "tv/format.h"

struct origin { /* of an output layer */
    size_t input;
    int64_t layer;
};

struct stack {
    struct planner *pl;
    json_t **configs;       /* [n_inputs], NULL where there is none */
    const char *scope;      /* of the layers' keys, NULL: the top level */
    struct origin *origins; /* [n] */
    int64_t n;              /* layers of the output */
    size_t from;            /* input whose config is edited */
    const char *module;     /* of plan_slice */
    const struct tv_arch_module *as; /* the module in `from` */
};

enum effect { ARITHMETIC, TENSORS };

struct rule {
    const char *key;
    enum effect effect;
    const char *unless; /* a list that says it for every layer */
};

static const struct rule leading[] = {
    {"first_k_dense_replace", TENSORS, NULL},
    {"moe_layer_start_index", TENSORS, NULL}, /* ERNIE 4.5 */
    {"num_dense_layers", TENSORS, NULL},      /* LFM2, AFMoE */
    {"max_window_layers", ARITHMETIC, "layer_types"},
    {NULL, ARITHMETIC, NULL},
};
static const struct rule indices[] = {
    {"mlp_only_layers", TENSORS, NULL},
    {"moe_layers", TENSORS, NULL},             /* Llama 4 */
    {"full_attn_idxs", TENSORS, NULL},         /* LFM2 */
    {"attn_layer_indices", TENSORS, NULL},     /* Bamba */
    {"cross_attention_layers", TENSORS, NULL}, /* Llama 3.2 Vision */
    {NULL, ARITHMETIC, NULL},
};
static const struct rule periods[] = {
    {"decoder_sparse_step", TENSORS, NULL},
    {"moe_layer_freq", TENSORS, NULL},
    {"moe_layer_interval", TENSORS, NULL},
    {"interleave_moe_layer_step", TENSORS, "moe_layers"},
    {"attn_layer_period", TENSORS, NULL},
    {"expert_layer_period", TENSORS, NULL},
    {"full_attention_interval", TENSORS, "layer_types"},
    {"sliding_window_pattern", ARITHMETIC, "layer_types"},
    {"no_rope_layer_interval", ARITHMETIC, "no_rope_layers"},
    {NULL, ARITHMETIC, NULL},
};

/* Keys of models with a tensor outside the layers that holds a piece for each
 * of them (Gemma 3n's per-layer embeddings): such pieces do not move. */
static const struct rule pieces[] = {
    {"hidden_size_per_layer_input", TENSORS, NULL},
    {NULL, ARITHMETIC, NULL},
};

/* ---- inputs ---------------------------------------------------------------
 */

/* The config of an input as a tree, NULL when it has none. */
static enum tv_err config_of(struct planner *pl, size_t input, json_t **out)
{
    char *data = NULL;
    size_t n = 0;
    bool found = false;
    enum tv_err rc = TV_OK;

    *out = NULL;
    TV_TRY(tv_input_side_read(pl->plan->inputs[input].input, "config.json",
                              &found, &data, &n, pl->err));
    if (found)
        TV_TRY(tv_json_parse_exact(data, n, "config.json", pl->err, out));
out:
    tv_free(data);
    return rc;
}

/* What the config that a layer came with says under a key. */
static json_t *said(const struct stack *s, const struct origin *o,
                    const char *scope, const char *key)
{
    const json_t *c = o->input == SIZE_MAX ? NULL : s->configs[o->input];
    const json_t *const inner =
        scope == NULL ? NULL : json_object_get(c, scope);
    /* A language model alone says of itself what a larger one says of its text
     * module. */
    if (inner != NULL || scope == NULL || strcmp(scope, "text_config") != 0)
        c = scope == NULL ? c : inner;
    return json_object_get(c, key);
}

static bool in_stack(const struct stack *s, const struct plan_slice *slice)
{
    return s->module == NULL || strcmp(slice->module, s->module) == 0;
}

/* Layers of the stack in a model. */
static int64_t depth_of(const struct stack *s, size_t input)
{
    const struct tv_arch *const a = s->pl->plan->inputs[input].arch;
    const struct tv_arch_module *const m = plan_module_of(a, s->as->name);
    return m == NULL ? -1 : m->n_layers;
}

static void fill_origins(struct stack *s)
{
    size_t at = 0;
    for (size_t i = 0; i < s->pl->n_slices; i++) {
        const struct plan_slice *const slice = &s->pl->slices[i];
        if (!in_stack(s, slice))
            continue;
        const size_t source = slice->base >= 0 ? (size_t)slice->base : 0;
        for (int64_t k = 0; k < slice->n_layers; k++) {
            s->origins[at].input =
                source < slice->n ? slice->input[source] : SIZE_MAX;
            s->origins[at++].layer =
                source < slice->n ? slice->from[source] + k : k;
        }
    }
}

static void report(struct stack *s, const struct rule *r, const char *what)
{
    const bool is_error = r->effect == TENSORS;
    plan_report(s->pl, r->key, 1, is_error, is_error ? TV_E_UNSUPPORTED : TV_OK,
                "config.json", "'%s' cannot say of this stack which layers %s",
                r->key, what);
}

/* ---- lists ----------------------------------------------------------------
 */

/* Entry of an output layer's list, NULL when its model has no such list. */
static json_t *list_entry(const struct stack *s, const struct origin *o,
                          const char *scope, const char *key)
{
    const json_t *const list = said(s, o, scope, key);
    if (!json_is_array(list) ||
        (int64_t)json_array_size(list) != depth_of(s, o->input))
        return NULL;
    return json_array_get(list, (size_t)o->layer);
}

static bool is_index_list(const char *key)
{
    for (const struct rule *r = indices; r->key != NULL; r++) {
        if (strcmp(key, r->key) == 0)
            return true;
    }
    return false;
}

/* Lists with one entry per layer (layer_types, ...) follow the layers. */
static bool restack(struct stack *s, const char *scope, json_t *object)
{
    struct planner *const pl = s->pl;
    const int64_t n_layers = s->as->n_layers;
    bool changed = false;
    void *tmp = NULL;
    const char *key = NULL;
    json_t *value = NULL;

    json_object_foreach_safe(object, tmp, key, value)
    {
        json_t *list = NULL;
        bool known = true;
        /* Other lists may have as many entries by chance. */
        if (!json_is_array(value) || n_layers < 2 ||
            json_array_size(value) != (size_t)n_layers ||
            strstr(key, "token_id") != NULL ||
            strcmp(key, "architectures") == 0 || is_index_list(key))
            continue;
        list = json_array();
        for (int64_t i = 0; i < s->n && known; i++) {
            json_t *const one = list_entry(s, &s->origins[i], scope, key);
            known = one != NULL;
            if (known && json_array_append(list, one) != 0)
                pl->oom = true;
        }
        if (!known || list == NULL) {
            json_decref(list);
            plan_report(pl, "lists in config.json", 5, false, TV_OK,
                        "config.json",
                        "'%s' has one entry per layer; it is copied as it is "
                        "and no longer fits the new number of layers",
                        key);
            continue;
        }
        if (json_equal(list, value)) {
            json_decref(list);
            continue;
        }
        changed = true;
        if (json_object_set_new(object, key, list) != 0)
            pl->oom = true;
    }
    return changed;
}

/* ---- numbers --------------------------------------------------------------
 */

static bool is_ruled_out(const struct rule *r, const json_t *object)
{
    return r->unless != NULL &&
           json_is_array(json_object_get(object, r->unless));
}

static bool set(struct stack *s, json_t *object, const char *key, json_t *value)
{
    if (json_equal(value, json_object_get(object, key))) {
        json_decref(value);
        return false;
    }
    if (json_object_set_new(object, key, value) != 0)
        s->pl->oom = true;
    return true;
}

/* "The first N layers": so many of the output, if they still come first. */
static bool set_leading(struct stack *s, json_t *object, const struct rule *r)
{
    const json_t *const old = json_object_get(object, r->key);
    const int64_t n = s->n;
    int64_t first = 0;
    bool mixed = false;

    if (!json_is_integer(old))
        return false;
    for (int64_t i = 0; i < n; i++) {
        const json_t *const v = said(s, &s->origins[i], s->scope, r->key);
        const bool in =
            json_is_integer(v) && s->origins[i].layer < json_integer_value(v);
        mixed = mixed || (in && first < i);
        first += in && first == i;
    }
    /* Qwen2 has the number also where it means nothing. */
    if (mixed && !is_ruled_out(r, object) &&
        (r->effect == TENSORS ||
         json_is_true(json_object_get(object, "use_sliding_window")))) {
        report(s, r, "come first: they no longer do");
        return false;
    }
    if (first == n && json_integer_value(old) >= n)
        return false;
    return set(s, object, r->key, json_integer((json_int_t)first));
}

/* "Up to layer N": the last one of the output, if it still is so. -1 is the
 * last one of every model. */
static bool set_ending(struct stack *s, json_t *object)
{
    static const struct rule r = {"moe_layer_end_index", TENSORS, NULL};
    const json_t *const old = json_object_get(object, r.key);
    int64_t n = 0;

    if (!json_is_integer(old))
        return false;
    for (int64_t i = 0; i < s->n; i++) {
        const json_t *const v = said(s, &s->origins[i], s->scope, r.key);
        const json_int_t end = json_is_integer(v) ? json_integer_value(v) : -1;
        const bool in = end < 0 || s->origins[i].layer <= end;
        if (in && n < i) {
            report(s, &r, "come last: they no longer do");
            return false;
        }
        n += in;
    }
    if (json_integer_value(old) < 0 && n == s->n)
        return false;
    return set(s, object, r.key, json_integer((json_int_t)n - 1));
}

static bool has_index(const json_t *list, int64_t layer)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        if (json_integer_value(json_array_get(list, i)) == layer)
            return true;
    }
    return false;
}

/* "Layers 0, 3, 5": their numbers in the output. */
static bool set_indices(struct stack *s, json_t *object, const struct rule *r)
{
    json_t *list = NULL;
    if (!json_is_array(json_object_get(object, r->key)))
        return false;
    list = json_array();
    for (int64_t i = 0; i < s->n; i++) {
        if (has_index(said(s, &s->origins[i], s->scope, r->key),
                      s->origins[i].layer) &&
            json_array_append_new(list, json_integer((json_int_t)i)) != 0)
            s->pl->oom = true;
    }
    return set(s, object, r->key, list);
}

/* "Every N-th layer": true of the output only if every layer keeps its place
 * within the period. */
static void check_period(struct stack *s, const json_t *object,
                         const struct rule *r)
{
    const json_int_t p = json_integer_value(json_object_get(object, r->key));
    if (p < 2 || is_ruled_out(r, object))
        return;
    for (int64_t i = 0; i < s->n; i++) {
        const json_int_t q =
            json_integer_value(said(s, &s->origins[i], s->scope, r->key));
        if (p == q && i % p == s->origins[i].layer % p)
            continue;
        report(s, r, "it means: they no longer come regularly");
        return;
    }
}

static void check_pieces(struct stack *s, const json_t *object,
                         const struct rule *r)
{
    bool moved = s->n != s->as->n_layers;
    for (int64_t i = 0; i < s->n && !moved; i++)
        moved = s->origins[i].layer != i;
    if (moved && json_integer_value(json_object_get(object, r->key)) > 0)
        plan_report(s->pl, r->key, 1, true, TV_E_UNSUPPORTED, "config.json",
                    "layers of this model cannot be stacked: it keeps a piece "
                    "for each of them in one tensor (%s)",
                    r->key);
}

static bool set_numbers(struct stack *s, json_t *object)
{
    bool changed = false;
    for (const struct rule *r = leading; r->key != NULL; r++)
        changed = set_leading(s, object, r) || changed;
    changed = set_ending(s, object) || changed;
    for (const struct rule *r = indices; r->key != NULL; r++)
        changed = set_indices(s, object, r) || changed;
    for (const struct rule *r = periods; r->key != NULL; r++)
        check_period(s, object, r);
    for (const struct rule *r = pieces; r->key != NULL; r++)
        check_pieces(s, object, r);
    return changed;
}

/* The count itself, unless it is set with the other edits. */
static bool set_count(struct stack *s, json_t *object)
{
    const struct tv_arch *const a = s->pl->plan->inputs[s->from].arch;
    const bool is_main = s->as == &a->modules[0];
    if ((is_main && a->layers_key != NULL) || s->n == s->as->n_layers)
        return false;
    if (s->as->layers_key == NULL || object == NULL) {
        if (!is_main)
            plan_report(s->pl, s->as->name, 1, false, TV_OK, "config.json",
                        "the output has %lld layers of %s, but no key of "
                        "config.json is known to hold their number (%lld); "
                        "adapt it by hand",
                        (long long)s->n, s->as->name,
                        (long long)s->as->n_layers);
        return false;
    }
    return set(s, object, s->as->layers_key, json_integer((json_int_t)s->n));
}

enum tv_err plan_stack_config(struct planner *pl, size_t from,
                              const char *module, const char *data, size_t n,
                              char **out, size_t *n_out)
{
    const struct tv_arch *const a = pl->plan->inputs[from].arch;
    const size_t n_inputs = pl->plan->n_inputs;
    struct stack s = {.pl = pl, .from = from, .module = module};
    json_t *root = NULL;
    json_t *object = NULL;
    bool changed = false;
    enum tv_err rc = TV_OK;

    s.as = module == NULL ? &a->modules[0] : plan_module_of(a, module);
    if (s.as == NULL)
        return TV_OK;
    s.scope = s.as->scope;
    for (size_t i = 0; i < pl->n_slices; i++) {
        if (in_stack(&s, &pl->slices[i]))
            s.n += pl->slices[i].n_layers;
    }
    s.configs = tv_calloc(n_inputs + 1, sizeof(*s.configs));
    s.origins = tv_calloc((size_t)s.n + 1, sizeof(*s.origins));
    if (s.configs == NULL || s.origins == NULL) {
        rc = plan_oom(pl);
        goto out;
    }
    fill_origins(&s);
    for (size_t i = 0; i < n_inputs; i++)
        TV_TRY(config_of(pl, i, &s.configs[i]));
    TV_TRY(tv_json_parse_exact(data, n, "config.json", pl->err, &root));
    object = s.scope == NULL ? root : json_object_get(root, s.scope);
    if (s.as == &a->modules[0]) {
        changed = restack(&s, NULL, root);
        changed =
            restack(&s, "text_config", json_object_get(root, "text_config")) ||
            changed;
    } else if (s.scope != NULL) {
        changed = restack(&s, s.scope, object);
    }
    changed = set_count(&s, object) || changed;
    if (s.as == &a->modules[0] || s.scope != NULL)
        changed = set_numbers(&s, object) || changed;
    if (changed && !pl->oom)
        TV_TRY(tv_json_write_exact(root, pl->err, out, n_out));
out:
    for (size_t i = 0; s.configs != NULL && i < n_inputs; i++)
        json_decref(s.configs[i]);
    tv_free(s.configs);
    tv_free(s.origins);
    json_decref(root);
    return rc;
}
