/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_identity.c - everything the output bytes depend on, as canonical JSON.
 *
 * A resumed run compares its hash with the journal's; when they differ, the two
 * documents say what changed: method, seed, an input, a setting. Tensors are
 * hashed one by one to keep the document small; the settings behind them stand
 * beside in readable form, but are not hashed, since two spellings may mean the
 * same. Not in it: places (only the
 * last part of absolute references), threads, memory, and texts that only
 * describe the run (model card, copy of the recipe).
 */
#include "gather.h"
#include "plan_parts.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include <jansson.h>

#include "tv/alloc.h"
#include "tv/cuda_math.h"
#include "tv/linalg.h"
#include "tv/split_gemm.h"
#include "tv/text.h"

#define IDENTITY_FORMAT 2

/* The reference with absolute paths cut to their last part. */
static char *portable_ref(const char *ref)
{
    struct tv_buf b;
    char *s = NULL;
    tv_buf_init(&b, 1u << 20);
    while (*ref != '\0') {
        size_t n = strcspn(ref, "+");
        size_t from = 0;
        if (ref[0] == '/') {
            size_t end = n;
            while (end > 1 && ref[end - 1] == '/')
                end--;
            from = end;
            while (from > 0 && ref[from - 1] != '/')
                from--;
        }
        tv_buf_add(&b, ref + from, n - from);
        if (ref[n] == '+')
            tv_buf_add(&b, &ref[n++], 1);
        ref += n;
    }
    if (!b.failed)
        s = tv_strdup(b.data == NULL ? "" : b.data);
    tv_buf_free(&b);
    return s;
}

static void add_double(struct tv_buf *b, double v)
{
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof(bits));
    tv_buf_le64(b, bits);
}

static void add_string(struct tv_buf *b, const char *s)
{
    const size_t n = strlen(s);
    tv_buf_le32(b, (uint32_t)n);
    tv_buf_add(b, s, n);
}

/* What one tensor's bytes depend on, apart from the contents of the inputs. */
static void describe_tensor(struct tv_buf *b, const struct tvm_tensor *t)
{
    const size_t n = t->method->n_params;
    add_string(b, t->name);
    add_string(b, t->method->name);
    tv_buf_le32(b, (uint32_t)t->action);
    tv_buf_le32(b, t->action == TVM_COPY ? (uint32_t)t->copy_of : 0);
    tv_buf_le32(b, (uint32_t)t->dtype);
    if (t->compute != TV_DTYPE_NONE) {
        tv_buf_le32(b, (uint32_t)t->compute);
        tv_buf_le32(b, (uint32_t)t->lora_dtype);
        tv_buf_le64(b, t->draw_at);
    }
    tv_buf_le32(b, t->rank);
    for (unsigned d = 0; d < t->rank; d++)
        tv_buf_le64(b, t->shape[d]);
    tv_buf_le32(b, (uint32_t)t->base);
    for (size_t p = 0; p < n && p < TVM_PARAMS_MAX; p++) {
        tv_buf_le32(b, t->shared_set[p]);
        add_double(b, t->shared_set[p] ? t->shared[p] : 0);
    }
    tv_buf_le64(b, t->n_sources);
    for (size_t s = 0; s < t->n_sources; s++) {
        const struct tvm_source *const src = &t->sources[s];
        tv_buf_le64(b, src->input);
        tv_buf_le64(b, src->position);
        add_string(b, src->tensor->name);
        tv_buf_le64(b, src->n_adapters);
        for (size_t i = 0; src->gather != NULL && i < src->gather->n_from;
             i++) {
            const struct tvm_source *const from = &src->gather->from[i];
            tv_buf_le64(b, src->gather->rows->hash.lo);
            tv_buf_le64(b, src->gather->rows->hash.hi);
            tv_buf_le64(b, from->input);
            add_string(b, from->tensor->name);
        }
        for (size_t p = 0; p < n; p++) {
            const bool set = t->per_source_set[s * n + p];
            tv_buf_le32(b, set);
            add_double(b, set ? t->per_source[s * n + p] : 0);
        }
    }
}

static json_t *tensors_json(const struct tvm_plan *plan)
{
    json_t *const map = json_object();
    for (size_t i = 0; map != NULL && i < plan->n_tensors; i++) {
        struct tv_buf b;
        char hex[33];
        bool ok = false;
        tv_buf_init(&b, 16u << 20);
        describe_tensor(&b, &plan->tensors[i]);
        if (!b.failed) {
            tv_hash_hex(tv_hash128(b.data, b.n_bytes), hex);
            ok = json_object_set_new(map, plan->tensors[i].name,
                                     json_string(hex)) == 0;
        }
        tv_buf_free(&b);
        if (!ok) {
            json_decref(map);
            return NULL;
        }
    }
    return map;
}

static json_t *inputs_json(const struct tvm_plan *plan)
{
    json_t *const list = json_array();
    for (size_t i = 0; list != NULL && i < plan->n_inputs; i++) {
        char hex[33];
        char *const ref = portable_ref(plan->inputs[i].ref);
        json_t *one = NULL;
        if (ref != NULL)
            one = json_pack("{s:s, s:s}", "ref", ref, "fingerprint",
                            tv_hash_hex(plan->inputs[i].fingerprint, hex));
        tv_free(ref);
        if (one == NULL || json_array_append_new(list, one) != 0) {
            json_decref(list);
            return NULL;
        }
    }
    return list;
}

/* ---- the recipe, to be read -----------------------------------------------
 */

/* A setting without its spelling: numbers, booleans, lists, {filter, value}. */
static json_t *setting_json(const struct tvm_node *node)
{
    json_t *j = NULL;
    bool b = false;
    double v = 0;

    if (tvm_node_is_null(node))
        return json_null();
    if (node->kind == TVM_NODE_SCALAR) {
        if (tvm_node_bool(node, &b))
            return json_boolean(b);
        if (!tvm_node_number(node, &v))
            return json_stringn(node->text, node->n_text);
        if (v == floor(v) && fabs(v) < 9007199254740992.0)
            return json_integer((json_int_t)v);
        return json_real(v);
    }
    j = node->kind == TVM_NODE_LIST ? json_array() : json_object();
    for (const struct tvm_node *e = node->first; j != NULL && e != NULL;
         e = e->next) {
        const bool list = node->kind == TVM_NODE_LIST;
        json_t *filter = NULL;
        if (!list && strcmp(e->key, "filter") != 0 &&
            strcmp(e->key, "value") != 0)
            continue;
        /* A filter is text, whatever it looks like. */
        if (!list && e->key[0] == 'f' && !tvm_node_is_null(e))
            filter = json_stringn(e->text, e->n_text);
        json_t *const one = filter != NULL ? filter : setting_json(e);
        if ((list ? json_array_append_new(j, one)
                  : json_object_set_new(j, e->key, one)) != 0) {
            json_decref(j);
            j = NULL;
        }
    }
    return j;
}

/* Sets "parameters" to what the method knows of a map, if there is any. */
static bool put_parameters(json_t *to, const struct tvm_recipe *r,
                           const struct tvm_node *map)
{
    json_t *const j = json_object();
    bool ok = j != NULL;
    for (size_t i = 0; ok && i < r->info.n_params; i++) {
        const char *const name = r->info.params[i].name;
        const struct tvm_node *const e = tvm_node_find(map, name);
        if (!tvm_node_is_null(e))
            ok = json_object_set_new(j, name, setting_json(e)) == 0;
    }
    if (ok && json_object_size(j) > 0)
        return json_object_set_new(to, "parameters", j) == 0;
    json_decref(j);
    return ok;
}

static bool put_ref(json_t *to, const char *key, const char *ref)
{
    if (ref == NULL)
        return true;
    char *const portable = portable_ref(ref);
    const bool ok = portable != NULL &&
                    json_object_set_new(to, key, json_string(portable)) == 0;
    tv_free(portable);
    return ok;
}

static json_t *sources_json(const struct tvm_recipe *r,
                            const struct tvm_recipe_slice *s)
{
    json_t *const list = json_array();
    bool ok = list != NULL;
    for (size_t i = 0; ok && i < s->n_sources; i++) {
        const struct tvm_recipe_source *const src = &s->sources[i];
        json_t *const one = json_object();
        ok = one != NULL && put_ref(one, "model", src->model.text) &&
             put_parameters(one, r, src->parameters) &&
             (!src->has_range ||
              json_object_set_new(one, "layer_range",
                                  json_pack("[I, I]", (json_int_t)src->from,
                                            (json_int_t)src->to)) == 0);
        if (ok)
            ok = json_array_append_new(list, one) == 0;
        else
            json_decref(one);
    }
    if (ok)
        return list;
    json_decref(list);
    return NULL;
}

/* Slices [first, first + n) under "models" or "slices". */
static bool put_slices(json_t *to, const struct tvm_recipe *r, size_t first,
                       size_t n)
{
    if (n > 0 && r->slices[first].whole)
        return json_object_set_new(to, "models",
                                   sources_json(r, &r->slices[first])) == 0;
    json_t *const list = json_array();
    bool ok = list != NULL;
    for (size_t i = first; ok && i < first + n; i++) {
        const struct tvm_recipe_slice *const s = &r->slices[i];
        json_t *const one = json_object();
        ok = one != NULL && put_ref(one, "base_model", s->base.text) &&
             put_parameters(one, r, s->parameters) &&
             json_object_set_new(one, "sources", sources_json(r, s)) == 0;
        if (ok)
            ok = json_array_append_new(list, one) == 0;
        else
            json_decref(one);
    }
    if (ok)
        return json_object_set_new(to, "slices", list) == 0;
    json_decref(list);
    return false;
}

static bool put_modules(json_t *to, const struct tvm_recipe *r)
{
    json_t *const map = json_object();
    bool ok = map != NULL;
    for (size_t i = 0; ok && i < r->n_modules; i++) {
        const struct tvm_recipe_module *const m = &r->modules[i];
        json_t *const one = json_object();
        ok = one != NULL && put_parameters(one, r, m->parameters) &&
             put_slices(one, r, m->first, m->n);
        if (ok)
            ok = json_object_set_new(map, m->name, one) == 0;
        else
            json_decref(one);
    }
    if (ok)
        return json_object_set_new(to, "modules", map) == 0;
    json_decref(map);
    return false;
}

/* Where a token's row comes from, as one line. */
static json_t *token_json(const struct tvm_recipe_token *t)
{
    char *const ref =
        t->model.text == NULL ? NULL : portable_ref(t->model.text);
    const char *const force = t->force ? ", forced" : "";
    json_t *j = NULL;
    if (t->from == TVM_TOKEN_OTHER && t->other != NULL)
        j = json_sprintf("'%s' of %s%s", t->other, ref, force);
    else if (t->from == TVM_TOKEN_OTHER)
        j = json_sprintf("%lld of %s%s", (long long)t->other_id, ref, force);
    else
        j = json_sprintf("%s%s",
                         t->from == TVM_TOKEN_ZERO    ? "zero"
                         : t->from == TVM_TOKEN_MODEL ? ref
                                                      : "default",
                         force);
    tv_free(ref);
    return j;
}

static bool put_vocab(json_t *to, const struct tvm_recipe_vocab *v)
{
    static const char *const sources[] = {"none", "union", "base", "model"};
    json_t *const j = json_object();
    json_t *const tokens = json_object();
    bool ok = j != NULL && tokens != NULL &&
              json_object_set_new(j, "source",
                                  json_string(sources[v->source])) == 0 &&
              put_ref(j, "model", v->model.text) &&
              json_object_set_new(j, "pad_to_multiple_of",
                                  json_integer(v->pad_to)) == 0;
    for (size_t i = 0; ok && i < v->n_tokens; i++)
        ok = json_object_set_new(tokens, v->tokens[i].token,
                                 token_json(&v->tokens[i])) == 0;
    ok = ok && json_object_set(j, "tokens", tokens) == 0;
    json_decref(tokens);
    if (ok && v->chat_template != NULL)
        ok = json_object_set_new(to, "chat_template",
                                 json_string(v->chat_template)) == 0;
    if (ok && v->source != TVM_VOCAB_NONE)
        return json_object_set_new(to, "tokenizer", j) == 0;
    json_decref(j);
    return ok;
}

static json_t *recipe_json(const struct tvm_recipe *r)
{
    json_t *const j = json_object();
    if (j != NULL && put_ref(j, "base_model", r->base.text) &&
        put_parameters(j, r, r->parameters) &&
        (r->n_modules > 0 ? put_modules(j, r)
                          : put_slices(j, r, 0, r->n_slices)) &&
        put_vocab(j, &r->vocab))
        return j;
    json_decref(j);
    return NULL;
}

/* ---- the document ---------------------------------------------------------
 */

/* Copied and edited files; the others are made from what is here already. */
static json_t *files_json(const struct tvm_plan *plan)
{
    json_t *const map = json_object();
    for (size_t i = 0; map != NULL && i < plan->n_files; i++) {
        const struct tvm_side_file *const f = &plan->files[i];
        char hex[33];
        if (f->from[0] == '\0')
            continue;
        if (json_object_set_new(map, f->name,
                                json_string(tv_hash_hex(
                                    tv_hash128(f->data, f->n), hex))) != 0) {
            json_decref(map);
            return NULL;
        }
    }
    return map;
}

/* Texts that masks come from, and what their bytes depend on beside. */
static bool put_calibration(json_t *to, const struct tvm_plan *plan)
{
    json_t *list = NULL;
    bool ok = true;
    for (size_t i = 0; ok && i < plan->n_inputs; i++) {
        const struct tvm_plan_input *const in = &plan->inputs[i];
        char hex[33];
        if (!in->calibrated)
            continue;
        if (list == NULL)
            list = json_array();
        char *const ref = portable_ref(in->ref);
        ok = list != NULL && ref != NULL &&
             json_array_append_new(
                 list, json_pack("{s:s, s:s}", "ref", ref, "texts",
                                 tv_hash_hex(in->calibration_hash, hex))) == 0;
        tv_free(ref);
    }
    if (list == NULL)
        return ok;
    return ok && json_object_set_new(to, "calibration", list) == 0;
}

static const char *dtype_text(enum tv_dtype t)
{
    return t == TV_DTYPE_NONE ? "" : tv_dtype_torch_name(t);
}

/* Canonical text, owned; NULL: out of memory. */
static char *dump(const json_t *j, size_t *n)
{
    char *const text = tv_json_text(j, JSON_COMPACT | JSON_SORT_KEYS);
    *n = text == NULL ? 0 : strlen(text);
    return text;
}

static bool uses_blas(const struct tvm_plan *plan)
{
    for (size_t i = 0; i < plan->n_tensors; i++)
        if (plan->tensors[i].action == TVM_MERGE && plan->tensors[i].method &&
            plan->tensors[i].method->work)
            return true;
    for (size_t i = 0; i < plan->n_inputs; i++)
        if (plan->inputs[i].calibrated)
            return true;
    return false;
}

/* Forward passes have other bits where bf16 weights are multiplied on AMX. */
static bool put_products(json_t *to, const struct tvm_plan *plan)
{
    const char *core = NULL;

    for (size_t i = 0; i < plan->n_inputs; i++)
        if (plan->inputs[i].calibrated)
            core = tvk_split_core_of(plan->options.kernels);
    return !core || json_object_set_new(to, "products", json_string(core)) == 0;
}

/* Results of BLAS depend on which of its kernels do the work, and on which GPU
 * where there is one and how much of the work it has memory for. Element-wise
 * work has the same bits everywhere. */
static bool put_numerics(json_t *to, const struct tvm_plan *plan)
{
    char core[128];
    char device[192];
    size_t n_factors = 0;

    if (!uses_blas(plan))
        return true;
    if (json_object_set_new(to, "blas", json_string(tva_linalg_core())) != 0)
        return false;
    if (!put_products(to, plan))
        return false;
    if (plan->options.cuda == NULL)
        return true;
    (void)tvk_cuda_math_core(plan->options.cuda, core, sizeof(core));
    const size_t n_here = plan_host_factors(plan, &n_factors);
    (void)snprintf(device, sizeof(device), "%s", core);
    if (n_here > 0)
        (void)snprintf(device, sizeof(device),
                       "%s, %zu of %zu factors by the CPU", core, n_here,
                       n_factors);
    return json_object_set_new(to, "device", json_string(device)) == 0;
}

/* Hash of what the weights depend on, wherever and in whatever shards they are
 * put. */
static enum tv_err hash_weights(struct planner *pl, const json_t *root)
{
    static const char *const keys[] = {
        "format",      "seed", "compat", "inputs",   "tensors",
        "calibration", "blas", "device", "products", "verify_inputs"};
    json_t *const part = json_object();
    char *text = NULL;
    size_t n = 0;
    bool ok = part != NULL;

    for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++) {
        json_t *const value = json_object_get(root, keys[i]);
        if (value != NULL)
            ok = ok && json_object_set(part, keys[i], value) == 0;
    }
    text = ok ? dump(part, &n) : NULL;
    if (text != NULL)
        pl->plan->weights_hash = tv_hash128(text, n);
    json_decref(part);
    tv_free(text);
    return text != NULL ? TV_OK : plan_oom(pl);
}

enum tv_err plan_identity_make(struct planner *pl)
{
    struct tvm_plan *const plan = pl->plan;
    const struct tvm_options *const o = &plan->options;
    json_t *root = NULL;
    char *hashed = NULL;
    char seed[24];
    size_t n = 0;
    enum tv_err rc = TV_OK;

    (void)snprintf(seed, sizeof(seed), "%llu", (unsigned long long)o->seed);
    /* The seed is text: JSON integers end at 2^63. */
    root = json_pack("{s:i, s:s, s:s, s:s, s:s, s:I, s:b, s:b, s:o, s:o, s:o}",
                     "format", IDENTITY_FORMAT, "method", plan->method_name,
                     "seed", seed, "dtype", dtype_text(pl->r->dtype),
                     "out_dtype", dtype_text(pl->r->out_dtype), "shard_bytes",
                     (json_int_t)(o->into != NULL || o->shard_bytes > INT64_MAX
                                      ? 0
                                      : o->shard_bytes),
                     "copy_tokenizer", o->copy_tokenizer, "model_card",
                     o->write_model_card, "inputs", inputs_json(plan), "files",
                     files_json(plan), "tensors", tensors_json(plan));
    if (root == NULL)
        return tv_error_set(pl->err, TV_E_NOMEM,
                            "out of memory, or a name in the inputs is not "
                            "UTF-8");
    if (o->compat_mergekit &&
        json_object_set_new(root, "compat", json_string("mergekit")) != 0) {
        rc = plan_oom(pl);
        goto out;
    }
    if (!put_calibration(root, plan)) {
        rc = plan_oom(pl);
        goto out;
    }
    if (!put_numerics(root, plan)) {
        rc = plan_oom(pl);
        goto out;
    }
    /* Fingerprints are other ones with it; a refusal must say so. */
    if (o->verify_inputs &&
        json_object_set_new(root, "verify_inputs", json_true()) != 0) {
        rc = plan_oom(pl);
        goto out;
    }
    hashed = dump(root, &n);
    if (hashed == NULL) {
        rc = plan_oom(pl);
        goto out;
    }
    plan->hash = tv_hash128(hashed, n);
    TV_TRY(hash_weights(pl, root));
    if (json_object_set_new(root, "recipe", recipe_json(pl->r)) == 0)
        plan->identity = dump(root, &n);
    if (plan->identity == NULL)
        rc = plan_oom(pl);
out:
    tv_free(hashed);
    json_decref(root);
    return rc;
}
