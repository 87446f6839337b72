/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_methods.c - tvmerge methods: what can be written behind merge_method.
 */
#include <stdio.h>
#include <string.h>

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

static json_t *method_json(const struct tvm_method_info *m)
{
    json_t *params = json_array();
    for (size_t i = 0; i < m->n_params; i++) {
        const struct tvm_param *p = &m->params[i];
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
    return json_pack("{s:s, s:s, s:b, s:o, s:s, s:s}", "name", m->name, "base",
                     base_name(m->base), "needs_statistics",
                     m->needs_statistics, "parameters", params, "summary",
                     m->summary ? m->summary : "", "paper",
                     m->paper ? m->paper : "");
}

static enum tv_err table(struct tvc *c)
{
    static const char *const headers[] = {"METHOD", "BASE", "SUMMARY"};
    struct tvc_table t;
    tvc_table_begin(&t, "lll", headers);
    for (size_t i = 0; i < tvm_method_count(); i++) {
        struct tvm_method_info m;
        tvm_method_info(tvm_method_at(i), &m);
        tvc_table_cell(&t, "%s", m.name);
        tvc_table_cell(&t, "%s", base_name(m.base));
        tvc_table_cell(&t, "%s", m.summary);
    }
    return tvc_table_end(&c->out, &t, &c->err);
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
    if (p->has_min && p->has_max)
        (void)snprintf(dst, cap, "%.10g to %.10g", p->min, p->max);
    else if (p->has_min)
        (void)snprintf(dst, cap, "from %.10g", p->min);
    else
        (void)snprintf(dst, cap, "-");
}

static enum tv_err one(struct tvc *c, const struct tvm_method_info *m)
{
    static const char *const headers[] = {"PARAMETER", "SCOPE", "TYPE",
                                          "DEFAULT",   "RANGE", "MEANING"};
    struct tvc_table t;
    tvc_out(&c->out, "%s: %s\n", m->name, m->summary);
    if (m->paper && *m->paper)
        tvc_out(&c->out, "paper: %s\n", m->paper);
    tvc_out(&c->out, "base model: %s\n", base_name(m->base));
    if (m->needs_statistics)
        tvc_out(&c->out, "needs input statistics (tveval calibrate)\n");
    if (m->n_params == 0)
        return TV_OK;
    tvc_out(&c->out, "\n");
    tvc_table_begin(&t, "llllll", headers);
    for (size_t i = 0; i < m->n_params; i++) {
        char text[40];
        char range[64];
        default_text(&m->params[i], text, sizeof text);
        tvc_table_cell(&t, "%s", m->params[i].name);
        tvc_table_cell(&t, "%s", scope_name(m->params[i].scope));
        tvc_table_cell(&t, "%s", type_name(m->params[i].type));
        tvc_table_cell(&t, "%s", text);
        range_text(&m->params[i], range, sizeof range);
        tvc_table_cell(&t, "%s", range);
        tvc_table_cell(&t, "%s", m->params[i].help ? m->params[i].help : "");
    }
    return tvc_table_end(&c->out, &t, &c->err);
}

static const struct tvm_method *named(struct tvc *c)
{
    const struct tvm_method *m = tvm_method_find(c->pos[0]);
    if (m)
        return m;
    const char *near = tvm_method_suggest(c->pos[0]);
    (void)tvc_bad(c, "unknown method '%s'", c->pos[0]);
    if (near)
        tv_error_hint(&c->err, "did you mean %s?", near);
    else
        tv_error_hint(&c->err, "'tvmerge methods' lists them");
    return NULL;
}

static int run(struct tvc *c)
{
    const struct tvm_method *only = NULL;
    struct tvm_method_info m;
    enum tv_err rc = TV_OK;

    if (c->n_pos > 0) {
        only = named(c);
        if (!only)
            return tvc_fail(c, &c->err);
    }
    if (c->out.json) {
        json_t *all = json_array();
        for (size_t i = 0; i < tvm_method_count(); i++) {
            if (only && tvm_method_at(i) != only)
                continue;
            tvm_method_info(tvm_method_at(i), &m);
            (void)json_array_append_new(all, method_json(&m));
        }
        tvc_out_json(&c->out, json_pack("{s:s, s:o}", "schema",
                                        "tvmerge.methods/1", "methods", all));
    } else if (only) {
        tvm_method_info(only, &m);
        rc = one(c, &m);
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
