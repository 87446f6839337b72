/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_methods.c - tvmerge methods: what can be written behind merge_method.
 */
#include <stdio.h>
#include <string.h>

#include "tv/adapters.h"
#include "tv/text.h"
#include "tvmerge.h"

static const char *base_name(enum tvm_base b)
{
    switch (b) {
    case TVM_BASE_NONE:
        return "none";
    case TVM_BASE_OPTIONAL:
        return "optional";
    case TVM_BASE_REQUIRED:
        break;
    }
    return "required";
}

static const char *scope_name(enum tvm_scope s)
{
    switch (s) {
    case TVM_SHARED:
        return "shared";
    case TVM_INPUT:
        return "input";
    case TVM_NON_BASE:
        break;
    }
    return "non_base";
}

static const char *type_name(enum tvm_type t)
{
    switch (t) {
    case TVM_FLOAT:
        return "float";
    case TVM_INT:
        return "int";
    case TVM_CHOICE:
        return "choice";
    case TVM_BOOL:
        break;
    }
    return "bool";
}

static json_t *default_json(const struct tvm_param *p)
{
    if (!p->has_default)
        return json_null();
    if (p->type == TVM_BOOL)
        return json_boolean(p->fallback != 0);
    if (p->type == TVM_INT)
        return json_integer((json_int_t)p->fallback);
    if (p->type == TVM_CHOICE)
        return json_string(p->choices[(size_t)p->fallback]);
    return tvc_json_real(p->fallback);
}

static json_t *choices_json(const struct tvm_param *p)
{
    json_t *names = json_array();
    for (size_t i = 0; p->choices[i]; i++)
        (void)json_array_append_new(names, json_string(p->choices[i]));
    return names;
}

static json_t *params_json(const struct tvm_param *list, size_t n)
{
    json_t *params = json_array();
    for (size_t i = 0; i < n; i++) {
        const struct tvm_param *p = &list[i];
        json_t *one =
            json_pack("{s:s, s:s, s:s, s:o, s:b, s:s, s:o, s:o}", "name",
                      p->name, "scope", scope_name(p->scope), "type",
                      type_name(p->type), "default", default_json(p),
                      "required", p->required, "help", p->help ? p->help : "",
                      "min", p->has_min ? tvc_json_real(p->min) : json_null(),
                      "max", p->has_max ? tvc_json_real(p->max) : json_null());
        if (p->type == TVM_CHOICE)
            (void)json_object_set_new(one, "choices", choices_json(p));
        (void)json_array_append_new(params, one);
    }
    return params;
}

static json_t *method_json(const struct tvm_method_info *m)
{
    return json_pack(
        "{s:s, s:s, s:b, s:o, s:s, s:s}", "name", m->name, "base",
        base_name(m->base), "needs_statistics", m->needs_statistics,
        "parameters", params_json(m->params, m->n_params), "summary",
        m->summary ? m->summary : "", "paper", m->paper ? m->paper : "");
}

/* One that only adapters can be merged by. */
static json_t *adapter_json(const struct tvm_adapter_method *m)
{
    return json_pack("{s:s, s:s, s:b, s:o, s:s, s:s, s:s, s:o}", "name",
                     m->name, "base", base_name(TVM_BASE_NONE),
                     "needs_statistics", 0, "parameters",
                     params_json(m->params, m->n_params), "summary", m->summary,
                     "paper", "", "output", "adapter", "compat",
                     m->peft ? json_string("peft") : json_null());
}

static enum tv_err table(struct tvc *c)
{
    static const char *const headers[] = {"METHOD", "BASE", "SUMMARY"};
    struct tvc_table t;
    enum tv_err rc = TV_OK;
    tvc_table_begin(&t, "lll", headers);
    for (size_t i = 0; i < tvm_method_count(); i++) {
        struct tvm_method_info m;
        tvm_method_info(tvm_method_at(i), &m);
        tvc_table_cell(&t, "%s", m.name);
        tvc_table_cell(&t, "%s", base_name(m.base));
        tvc_table_cell(&t, "%s", m.summary);
    }
    TV_TRY(tvc_table_end(&c->out, &t, &c->err));
    tvc_out(&c->out, "\nof adapters into an adapter also: ");
    for (size_t i = 0; i < tvm_adapter_method_count(); i++) {
        const struct tvm_adapter_method *a = tvm_adapter_method_at(i);
        const bool first = a->peft && !tvm_adapter_method_at(i - 1)->peft;
        tvc_out(&c->out, "%s%s",
                i == 0  ? ""
                : first ? "; with --compat peft: "
                        : ", ",
                a->name);
    }
    tvc_out(&c->out, "\n");
out:
    return rc;
}

static void default_text(const struct tvm_param *p, char *dst, size_t cap)
{
    if (p->required)
        (void)snprintf(dst, cap, "required");
    else if (!p->has_default)
        (void)snprintf(dst, cap, "-");
    else if (p->type == TVM_CHOICE)
        (void)snprintf(dst, cap, "%s", p->choices[(size_t)p->fallback]);
    else if (p->type == TVM_BOOL)
        (void)snprintf(dst, cap, "%s", p->fallback != 0 ? "true" : "false");
    else
        (void)snprintf(dst, cap, "%g", p->fallback);
}

static void range_text(const struct tvm_param *p, char *dst, size_t cap)
{
    size_t n = 0;

    for (size_t i = 0; p->type == TVM_CHOICE && p->choices[i]; i++) {
        const int more =
            snprintf(dst + n, cap - n, "%s%s", i ? ", " : "", p->choices[i]);
        n += (size_t)more < cap - n ? (size_t)more : cap - n - 1;
    }
    if (p->type == TVM_CHOICE)
        return;
    if (p->has_min && p->has_max)
        (void)snprintf(dst, cap, "%.10g to %.10g", p->min, p->max);
    else if (p->has_min)
        (void)snprintf(dst, cap, "from %.10g", p->min);
    else
        (void)snprintf(dst, cap, "-");
}

static enum tv_err params_table(struct tvc *c, const struct tvm_param *list,
                                size_t n)
{
    static const char *const headers[] = {"PARAMETER", "SCOPE", "TYPE",
                                          "DEFAULT",   "RANGE", "MEANING"};
    struct tvc_table t;
    if (n == 0)
        return TV_OK;
    tvc_out(&c->out, "\n");
    tvc_table_begin(&t, "llllll", headers);
    for (size_t i = 0; i < n; i++) {
        const struct tvm_param *const p = &list[i];
        char text[40];
        char range[256];
        default_text(p, text, sizeof text);
        tvc_table_cell(&t, "%s", p->name);
        tvc_table_cell(&t, "%s", scope_name(p->scope));
        tvc_table_cell(&t, "%s", type_name(p->type));
        tvc_table_cell(&t, "%s", text);
        range_text(p, range, sizeof range);
        tvc_table_cell(&t, "%s", range);
        tvc_table_cell(&t, "%s", p->help ? p->help : "");
    }
    return tvc_table_end(&c->out, &t, &c->err);
}

static enum tv_err one(struct tvc *c, const struct tvm_method_info *m)
{
    tvc_out(&c->out, "%s: %s\n", m->name, m->summary);
    if (m->paper && *m->paper)
        tvc_out(&c->out, "paper: %s\n", m->paper);
    tvc_out(&c->out, "base model: %s\n", base_name(m->base));
    if (m->needs_statistics)
        tvc_out(&c->out, "needs input statistics (tveval calibrate)\n");
    return params_table(c, m->params, m->n_params);
}

static enum tv_err one_of_adapters(struct tvc *c,
                                   const struct tvm_adapter_method *m)
{
    tvc_out(&c->out, "%s: %s\n", m->name, m->summary);
    tvc_out(&c->out, "merges adapters into an adapter (output: adapter)%s\n",
            m->peft ? ", as PEFT does, with --compat peft" : "");
    return params_table(c, m->params, m->n_params);
}

static int unknown(struct tvc *c)
{
    const char *const name = c->pos[0];
    const char *near = tvm_method_suggest(name);
    const char *others[16];
    size_t n = 0;

    for (; n < tvm_adapter_method_count() && n < 16; n++)
        others[n] = tvm_adapter_method_at(n)->name;
    if (!near)
        near = tv_suggest(name, others, n);
    (void)tvc_bad(c, "unknown method '%s'", name);
    if (near)
        tv_error_hint(&c->err, "did you mean %s?", near);
    else if (strncmp(name, "extract", 7) == 0)
        tv_error_hint(&c->err, "extract-lora is a command: 'tvmerge "
                               "extract-lora --help'");
    else
        tv_error_hint(&c->err, "'tvmerge methods' lists them");
    return tvc_fail(c, &c->err);
}

static int run(struct tvc *c)
{
    const char *const name = c->n_pos > 0 ? c->pos[0] : NULL;
    const struct tvm_method *only = name ? tvm_method_find(name) : NULL;
    const struct tvm_adapter_method *adapters =
        name ? tvm_adapter_method_find(name) : NULL;
    struct tvm_method_info m;
    enum tv_err rc = TV_OK;

    if (name && !only && !adapters)
        return unknown(c);
    if (c->out.json) {
        json_t *all = json_array();
        for (size_t i = 0; i < tvm_method_count(); i++) {
            if (name && tvm_method_at(i) != only)
                continue;
            tvm_method_info(tvm_method_at(i), &m);
            (void)json_array_append_new(all, method_json(&m));
        }
        if (adapters)
            (void)json_array_append_new(all, adapter_json(adapters));
        tvc_out_json(&c->out, json_pack("{s:s, s:o}", "schema",
                                        "tvmerge.methods/1", "methods", all));
    } else if (only) {
        tvm_method_info(only, &m);
        rc = one(c, &m);
    } else if (adapters) {
        rc = one_of_adapters(c, adapters);
    } else if (c->out.quiet) {
        for (size_t i = 0; i < tvm_method_count(); i++) {
            tvm_method_info(tvm_method_at(i), &m);
            tvc_out(&c->out, "%s\n", m.name);
        }
    } else {
        rc = table(c);
    }
    return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
}

const struct tvc_command tvc_cmd_methods = {
    .name = "methods",
    .summary = "list merge methods, or explain one",
    .args_doc = "[NAME]",
    .examples = "tvmerge methods\n"
                "tvmerge methods ties\n"
                "tvmerge methods --json",
    .max_pos = 1,
    .run = run,
};
