/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_plan.c - tvmerge plan: everything that run would do, without writing.
 *
 * People get one row per distinct way of making a tensor (method, inputs,
 * parameters, dtype), the document has every tensor.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/text.h"
#include "tvmerge.h"

#define ROWS_MAX 40u /* without -v */

/* ---- the document
 * ------------------------------------------------------------------ */

static json_t *value_json(const struct tvm_param *p, bool set, double v)
{
    if (!set)
        return json_null();
    if (p->type == TVM_BOOL)
        return json_boolean(v != 0);
    if (p->type == TVM_INT)
        return json_integer((json_int_t)v);
    if (p->type == TVM_CHOICE)
        return json_string(p->choices[(size_t)v]);
    return tvc_json_real(v);
}

/* A shared parameter is a value, one of the inputs an array in their order. */
static json_t *parameters_json(const struct tvm_tensor *t,
                               const struct tvm_method_info *m)
{
    json_t *o = json_object();
    for (size_t p = 0; p < m->n_params; p++) {
        const struct tvm_param *x = &m->params[p];
        if (x->scope == TVM_SHARED) {
            (void)json_object_set_new(
                o, x->name, value_json(x, t->shared_set[p], t->shared[p]));
            continue;
        }
        json_t *a = json_array();
        for (size_t s = 0; s < t->n_sources; s++) {
            const size_t at = s * m->n_params + p;
            (void)json_array_append_new(
                a, value_json(x, t->per_source_set[at], t->per_source[at]));
        }
        (void)json_object_set_new(o, x->name, a);
    }
    return o;
}

static json_t *tensor_json(const struct tvm_plan *p, const struct tvm_tensor *t)
{
    struct tvm_method_info m;
    json_t *inputs = json_array();
    json_t *shape = json_array();
    tvm_method_info(t->method, &m);
    for (size_t s = 0; s < t->n_sources; s++)
        (void)json_array_append_new(
            inputs, tvc_json_string(p->inputs[t->sources[s].input].ref));
    for (unsigned d = 0; d < t->rank; d++)
        (void)json_array_append_new(shape, tvc_json_u64(t->shape[d]));
    return json_pack(
        "{s:o, s:s, s:o, s:o, s:s, s:o, s:s, s:o, s:o}", "name",
        tvc_json_string(t->name), "method", m.name, "parameters",
        parameters_json(t, &m), "inputs", inputs, "dtype",
        tv_dtype_name(t->dtype), "shape", shape, "action",
        t->action == TVM_COPY ? "copy" : "merge", "base",
        t->base >= 0 ? tvc_json_string(p->inputs[t->sources[t->base].input].ref)
                     : json_null(),
        "bytes", tvc_json_u64(t->bytes));
}

static json_t *vocabulary_json(const struct tvm_vocabulary *v)
{
    if (!v)
        return json_null();
    json_t *notes = json_array();
    for (size_t i = 0; i < v->n_notes; i++)
        (void)json_array_append_new(notes, tvc_json_string(v->notes[i]));
    return json_pack("{s:o, s:o, s:o, s:o, s:o, s:o}", "source",
                     tvc_json_string(v->source), "from",
                     tvc_json_string(v->from), "tokens",
                     tvc_json_u64(v->n_tokens), "rows", tvc_json_u64(v->n_rows),
                     "added", tvc_json_u64(v->n_added), "notes", notes);
}

static void document(struct tvc *c, const struct tvc_merge *m)
{
    const struct tvm_plan *p = m->plan;
    const struct tvm_stages *s = m->stages;
    json_t *tensors = json_array();
    for (size_t i = 0; p && i < p->n_tensors; i++)
        (void)json_array_append_new(tensors, tensor_json(p, &p->tensors[i]));
    json_t *doc =
        json_pack("{s:s, s:b, s:o, s:o, s:o, s:o, s:o}", "schema",
                  "tvmerge.plan/1", "ok", m->problems.n_errors == 0, "problems",
                  tvc_problems_json(&m->problems, true), "bytes_read",
                  tvc_json_u64(s   ? s->bytes_read
                               : p ? p->bytes_read
                                   : 0),
                  "bytes_written",
                  tvc_json_u64(s   ? s->bytes_written
                               : p ? p->bytes_written
                                   : 0),
                  "peak_scratch_bytes",
                  tvc_json_u64(s   ? s->peak_scratch_bytes
                               : p ? p->peak_scratch_bytes
                                   : 0),
                  "peak_disk_bytes",
                  tvc_json_u64(s   ? s->peak_disk_bytes
                               : p ? p->peak_disk_bytes
                                   : 0));
    if (s)
        (void)json_object_set_new(doc, "documents", tvc_stages_json(m));
    if (p) {
        char hex[33];
        (void)json_object_set_new(doc, "method",
                                  tvc_json_string(p->method_name));
        (void)json_object_set_new(doc, "vocabulary",
                                  vocabulary_json(p->vocabulary));
        (void)json_object_set_new(doc, "seed", tvc_json_u64(p->options.seed));
        (void)json_object_set_new(doc, "plan_hash",
                                  json_string(tv_hash_hex(p->hash, hex)));
    }
    (void)json_object_set_new(doc, "tensors", tensors);
    tvc_out_json(&c->out, doc);
}

/* ---- the table
 * ---------------------------------------------------------------------- */

static void add_value(struct tv_buf *b, const struct tvm_param *p, bool set,
                      double v)
{
    if (!set)
        tv_buf_str(b, "-");
    else if (p->type == TVM_CHOICE)
        tv_buf_str(b, p->choices[(size_t)v]);
    else if (p->type == TVM_BOOL)
        tv_buf_str(b, v != 0 ? "true" : "false");
    else
        tv_buf_fmt(b, "%.6g", v);
}

static void add_parameters(struct tv_buf *b, const struct tvm_tensor *t,
                           const struct tvm_method_info *m)
{
    for (size_t p = 0; p < m->n_params; p++) {
        const struct tvm_param *x = &m->params[p];
        tv_buf_fmt(b, "%s%s=", p ? " " : "", x->name);
        if (x->scope == TVM_SHARED) {
            add_value(b, x, t->shared_set[p], t->shared[p]);
            continue;
        }
        const char *sep = "";
        for (size_t s = 0; s < t->n_sources; s++) {
            if (x->scope == TVM_NON_BASE && (int)s == t->base)
                continue;
            tv_buf_str(b, sep);
            add_value(b, x, t->per_source_set[s * m->n_params + p],
                      t->per_source[s * m->n_params + p]);
            sep = ",";
        }
    }
}

static void add_inputs(struct tv_buf *b, const struct tvm_plan *p,
                       const struct tvm_tensor *t)
{
    if (t->action == TVM_COPY) {
        tv_buf_str(b, p->inputs[t->sources[t->copy_of].input].ref);
        return;
    }
    for (size_t s = 0; s < t->n_sources; s++)
        tv_buf_fmt(b, "%s%s%s", s ? ", " : "",
                   p->inputs[t->sources[s].input].ref,
                   (int)s == t->base ? " (base)" : "");
}

struct group {
    char *key; /* what the row says, but the counts */
    char *how, *parameters, *inputs;
    const char *dtype;
    size_t n;
    uint64_t bytes;
};
struct groups {
    struct group *items;
    size_t n, cap;
};

static void groups_free(struct groups *g)
{
    for (size_t i = 0; i < g->n; i++) {
        tv_free(g->items[i].key);
        tv_free(g->items[i].how);
        tv_free(g->items[i].parameters);
        tv_free(g->items[i].inputs);
    }
    tv_free(g->items);
    *g = (struct groups){0};
}

static bool groups_room(struct groups *g)
{
    if (g->n < g->cap)
        return true;
    const size_t cap = g->cap ? 2 * g->cap : 16;
    struct group *more = tv_realloc(g->items, cap * sizeof *more);
    if (!more)
        return false;
    g->items = more;
    g->cap = cap;
    return true;
}

static enum tv_err groups_add(struct groups *g, const struct tvm_plan *p,
                              const struct tvm_tensor *t, struct tv_error *err)
{
    struct tvm_method_info m;
    struct tv_buf how;
    struct tv_buf inputs;
    struct group new = {.dtype = tv_dtype_name(t->dtype)};
    enum tv_err rc = TV_OK;

    tvm_method_info(t->method, &m);
    tv_buf_init(&how, 1 << 16);
    tv_buf_init(&inputs, 1 << 20);
    tv_buf_str(&how, "");
    add_inputs(&inputs, p, t);
    if (t->action == TVM_MERGE)
        add_parameters(&how, t, &m);
    TV_TRY(tv_buf_ok(&how, err));
    TV_TRY(tv_buf_ok(&inputs, err));
    new.how = tv_strdup(t->action == TVM_COPY ? "copy" : m.name);
    new.parameters = tv_strdup(how.n_bytes ? how.data : "");
    new.inputs = tv_strdup(inputs.n_bytes ? inputs.data : "");
    if (!new.how || !new.parameters || !new.inputs)
        goto memory;
    new.key = tv_asprintf("%s|%s|%s|%s", new.how, new.dtype, new.inputs,
                          new.parameters);
    if (!new.key)
        goto memory;
    for (size_t i = g->n; i > 0; i--)
        if (strcmp(g->items[i - 1].key, new.key) == 0) {
            g->items[i - 1].n++;
            g->items[i - 1].bytes += t->bytes;
            goto out;
        }
    if (!groups_room(g))
        goto memory;
    new.n = 1;
    new.bytes = t->bytes;
    g->items[g->n++] = new;
    new = (struct group){0};
    goto out;
memory:
    rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
out:
    tv_free(new.key);
    tv_free(new.how);
    tv_free(new.parameters);
    tv_free(new.inputs);
    tv_buf_free(&how);
    tv_buf_free(&inputs);
    return rc;
}

static enum tv_err table(struct tvc *c, const struct tvm_plan *p)
{
    static const char *const headers[] = {"TENSORS", "BYTES",  "METHOD",
                                          "DTYPE",   "INPUTS", "PARAMETERS"};
    struct groups g = {0};
    struct tvc_table t;
    enum tv_err rc = TV_OK;
    size_t left_out = 0;

    for (size_t i = 0; i < p->n_tensors; i++)
        TV_TRY(groups_add(&g, p, &p->tensors[i], &c->err));
    tvc_table_begin(&t, "rrllll", headers);
    for (size_t i = 0; i < g.n; i++) {
        char bytes[32];
        const struct group *x = &g.items[i];
        if (i >= ROWS_MAX && c->out.verbose == 0) {
            left_out += x->n;
            continue;
        }
        tvc_table_cell(&t, "%zu", x->n);
        tvc_table_cell(&t, "%s",
                       tv_format_bytes(x->bytes, bytes, sizeof bytes));
        tvc_table_cell(&t, "%s", x->how);
        tvc_table_cell(&t, "%s", x->dtype);
        tvc_table_cell(&t, "%s", x->inputs);
        tvc_table_cell(&t, "%s", x->parameters);
    }
    TV_TRY(tvc_table_end(&c->out, &t, &c->err));
    if (left_out)
        tvc_out(&c->out, "... and %zu more tensors (-v shows all)\n", left_out);
out:
    groups_free(&g);
    return rc;
}

/* What is made before the output, and what all of it takes. */
static void stages(struct tvc *c, const struct tvm_stages *s)
{
    char a[32];
    for (size_t i = 0; i + 1 < s->n; i++) {
        const struct tvm_stage *x = &s->items[i];
        tvc_out(&c->out, "%s %s: %s of %zu inputs, %zu tensors, %s%s%s%s\n",
                i ? "              " : "documents     ", x->name,
                x->plan->method_name, x->plan->n_inputs, x->plan->n_tensors,
                tv_format_bytes(x->plan->bytes_written, a, sizeof a),
                x->needed ? "" : " (not made: it is there, or not needed)",
                x->dir ? " in " : "", x->dir ? x->dir : "");
    }
    tvc_out(&c->out, "reads in all   %s\n",
            tv_format_bytes(s->bytes_read, a, sizeof a));
    tvc_out(&c->out, "writes in all  %s\n",
            tv_format_bytes(s->bytes_written, a, sizeof a));
    tvc_out(&c->out, "memory, all    %s\n",
            tv_format_bytes(s->peak_scratch_bytes, a, sizeof a));
    tvc_out(&c->out, "peak disk, all %s\n",
            tv_format_bytes(s->peak_disk_bytes, a, sizeof a));
}

static void totals(struct tvc *c, const struct tvm_plan *p)
{
    char a[32];
    char hex[33];
    tvc_out(&c->out, "\nmethod         %s\n", p->method_name);
    for (size_t i = 0; i < p->n_inputs; i++)
        tvc_out(&c->out, "input          %s (fingerprint %s)\n",
                p->inputs[i].ref, tv_hash_hex(p->inputs[i].fingerprint, hex));
    if (p->vocabulary)
        tvc_out(&c->out,
                "vocabulary     %" PRIu64 " tokens, %" PRIu64 " rows (%s)\n",
                p->vocabulary->n_tokens, p->vocabulary->n_rows,
                p->vocabulary->source);
    tvc_out(&c->out, "tensors        %zu\n", p->n_tensors);
    tvc_out(&c->out, "reads          %s\n",
            tv_format_bytes(p->bytes_read, a, sizeof a));
    tvc_out(&c->out, "writes         %s in %zu file%s\n",
            tv_format_bytes(p->bytes_written, a, sizeof a),
            p->shards ? p->shards->n : 1,
            p->shards && p->shards->n != 1 ? "s" : "");
    tvc_out(&c->out, "peak memory    %s\n",
            tv_format_bytes(p->peak_scratch_bytes, a, sizeof a));
    tvc_out(&c->out, "peak disk      %s\n",
            tv_format_bytes(p->peak_disk_bytes, a, sizeof a));
    if (p->options.quota_bytes)
        tvc_out(&c->out, "quota          %s\n",
                tv_format_bytes(p->options.quota_bytes, a, sizeof a));
    for (size_t i = 0; i < p->n_files; i++)
        tvc_out(&c->out, "%s %s%s%s\n", i ? "              " : "side files    ",
                p->files[i].name, *p->files[i].from ? " from " : "",
                p->files[i].from);
}

void tvc_place_problem(struct tvm_problems *p, enum tv_err rc,
                       struct tv_error *e)
{
    if (rc != TV_OK)
        tvm_problem_add(p, true, rc, "", "%s%s%s%s", e->msg,
                        e->hint[0] ? " (" : "", e->hint, e->hint[0] ? ")" : "");
    tv_error_clear(e);
}

/* What run would refuse once it looks at OUT. */
static void place(struct tvc_merge *m)
{
    struct tv_error e = {0};
    const enum tv_err rc = m->problems.n_errors > 0 || !m->plan ? TV_OK
                           : m->stages ? tvm_stages_check(m->stages, &e)
                                       : tvm_run_check(m->plan, &e);
    tvc_place_problem(&m->problems, rc, &e);
}

static int run(struct tvc *c)
{
    struct tvc_merge_opts *o = c->opt;
    struct tvc_merge m = {0};
    enum tv_err rc = TV_OK;
    bool handled = false;
    int status = 0;

    TV_TRY(tvc_merge_prepare(c, true));
    TV_TRY(tvc_adapters(c, true, &handled, &status));
    if (handled)
        goto out;
    TV_TRY(tvc_merge_plan(c, &m));
    place(&m);
    if (c->out.json) {
        document(c, &m);
    } else if (m.plan && m.problems.n_errors == 0) {
        TV_TRY(table(c, m.plan));
        totals(c, m.plan);
        if (m.stages)
            stages(c, m.stages);
    }
    tvc_problems_print(c, &m.problems, true);
    if (m.problems.n_errors > 0)
        status = tvc_problems_fail(c, &m.problems);
    else
        status = tvc_done(c, 0);
out:
    if (rc != TV_OK)
        status = tvc_fail(c, &c->err);
    tvc_merge_free(&m);
    tvc_merge_opts_free(o);
    return status;
}

const struct tvc_command tvc_cmd_plan = {
    .name = "plan",
    .summary = "show what run would do, and every problem, without writing",
    .args_doc = "RECIPE [OUT]",
    .text = "Takes all options of run. The exit code is that of the problems "
            "found.\nWith OUT (or --into) also of what that holds already: "
            "another merge, other\nfiles, a run that is at work there. A "
            "warning wants a decision, a note does\nnot (with --json it is a "
            "warning whose \"note\" is true).",
    .examples = "tvmerge plan recipe.yml\n"
                "tvmerge plan recipe.yml ./merged --quota 20GB --json",
    .options = tvc_merge_options,
    .opt_bytes = sizeof(struct tvc_merge_opts),
    .init = tvc_merge_init,
    .option = tvc_merge_option,
    .min_pos = 1,
    .max_pos = 2,
    .run = run,
};
