/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_run.c - run and plan of recipes whose output is an adapter.
 */
#include <string.h>

#include "progress.h"
#include "signals.h"
#include "tv/adapters.h"
#include "tv/alloc.h"
#include "tv/text.h"
#include "tvmerge.h"

static void on_progress(void *arg, const struct tvm_progress *p)
{
    tvc_progress_set(arg, p->n_done, p->n_tensors, p->bytes_done,
                     p->bytes_total);
}

/* The document of `tvmerge run`, without what only models have. */
json_t *tvc_adapter_result_json(const char *schema, const char *out,
                                const struct tvm_result *r)
{
    char hex[33];
    return json_pack("{s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:s, s:o}",
                     "schema", schema, "out", tvc_json_string(out), "n_tensors",
                     tvc_json_u64(r->n_tensors), "n_resumed",
                     tvc_json_u64(r->n_resumed), "bytes_read",
                     tvc_json_u64(r->bytes_read), "bytes_written",
                     tvc_json_u64(r->bytes_written), "seconds",
                     tvc_json_measured(r->seconds), "peak_scratch_bytes",
                     tvc_json_u64(r->peak_scratch_bytes), "digest",
                     tv_hash_hex(r->digest, hex), "already_done",
                     json_boolean(r->already_done));
}

void tvc_adapter_summary(struct tvc *c, const char *out,
                         const struct tvm_result *r)
{
    char time[32], memory[32], hex[33];

    if (r->already_done)
        tvc_say(&c->out, "%s is complete already: nothing to do", out);
    else
        tvc_say(&c->out, "wrote %zu tensors in %s, peak memory %s",
                r->n_tensors, tvc_duration(r->seconds, time, sizeof time),
                tv_format_bytes(r->peak_scratch_bytes, memory, sizeof memory));
    tvc_say(&c->out, "digest %s", tv_hash_hex(r->digest, hex));
    tvc_say(&c->out, "adapter in %s", out);
}

static json_t *tensors_json(const struct tvm_adapters *a, size_t n,
                            const char *method)
{
    json_t *list = json_array();

    for (size_t i = 0; i < n; i++) {
        struct tvm_adapters_tensor t;
        json_t *shape = json_array();
        tvm_adapters_tensor(a, i, &t);
        for (unsigned d = 0; d < t.rank; d++)
            (void)json_array_append_new(shape, tvc_json_u64(t.shape[d]));
        (void)json_array_append_new(
            list, json_pack("{s:o, s:s, s:{}, s:[], s:s, s:o}", "name",
                            tvc_json_string(t.name), "method", method,
                            "parameters", "inputs", "dtype",
                            tv_dtype_name(t.dtype), "shape", shape));
    }
    return list;
}

static void plan_document(struct tvc *c, const struct tvm_adapters *a,
                          const struct tvm_problems *p)
{
    struct tvm_adapters_info i = {.method = ""};
    const bool ok = a && p->n_errors == 0;

    if (ok)
        tvm_adapters_info(a, &i);
    tvc_out_json(
        &c->out,
        json_pack("{s:s, s:b, s:o, s:o, s:o, s:o, s:o, s:s, s:s, s:o}",
                  "schema", "tvmerge.plan/1", "ok", (int)ok, "problems",
                  tvc_problems_json(p, true), "bytes_read",
                  tvc_json_u64(i.bytes_read), "bytes_written",
                  tvc_json_u64(i.bytes_written), "peak_scratch_bytes",
                  tvc_json_u64(i.peak_scratch_bytes), "peak_disk_bytes",
                  tvc_json_u64(i.peak_disk_bytes), "output", "adapter",
                  "method", i.method, "tensors",
                  ok ? tensors_json(a, i.n_tensors, i.method) : json_array()));
}

static void plan_text(struct tvc *c, const struct tvm_adapters *a)
{
    struct tvm_adapters_info i;
    char b[32];

    tvm_adapters_info(a, &i);
    tvc_out(&c->out, "output         adapter\n");
    tvc_out(&c->out, "method         %s\n", i.method);
    tvc_out(&c->out, "inputs         %zu adapter%s\n", i.n_inputs,
            i.n_inputs == 1 ? "" : "s");
    tvc_out(&c->out, "modules        %zu\n", i.n_modules);
    tvc_out(&c->out, "reads          %s\n",
            tv_format_bytes(i.bytes_read, b, sizeof b));
    tvc_out(&c->out, "writes         %s\n",
            tv_format_bytes(i.bytes_written, b, sizeof b));
    tvc_out(&c->out, "peak memory    %s\n",
            tv_format_bytes(i.peak_scratch_bytes, b, sizeof b));
    tvc_out(&c->out, "peak disk      %s\n",
            tv_format_bytes(i.peak_disk_bytes, b, sizeof b));
}

static enum tv_err run_it(struct tvc *c, struct tvm_adapters *a)
{
    const struct tvc_merge_opts *o = c->opt;
    struct tvc_progress *bar = tvc_progress_begin(&c->out, "merge", "tensors");
    const struct tvm_run_hooks hooks = {
        .progress = on_progress, .arg = bar, .cancel = tvc_cancel_flag()};
    struct tvm_result r = {0};
    const enum tv_err rc = tvm_adapters_run(a, &hooks, &r, &c->err);

    tvc_progress_end(bar);
    if (rc != TV_OK)
        return rc;
    if (c->out.json)
        tvc_out_json(&c->out, tvc_adapter_result_json("tvmerge.run/1",
                                                      o->options.out_dir, &r));
    else
        tvc_adapter_summary(c, o->options.out_dir, &r);
    return rc;
}

enum tv_err tvc_adapters(struct tvc *c, bool planning, bool *handled,
                         int *status)
{
    struct tvc_merge_opts *o = c->opt;
    struct tvm_problems problems;
    struct tvm_adapters *a = NULL;
    enum tv_err rc = TV_OK;

    tvm_problems_init(&problems);
    TV_TRY(tvm_adapters_wanted(c->pos[0], &o->options, handled, &c->err));
    if (!*handled) {
        if (o->peft)
            rc = tv_error_set(&c->err, TV_E_USAGE,
                              "--compat peft is for recipes whose output is "
                              "an adapter");
        goto out;
    }
    rc = tvm_adapters_plan(c->pos[0], &o->options, o->peft, &problems, &c->err,
                           &a);
    if (problems.n_errors > 0)
        rc = TV_OK;
    TV_TRY(rc);
    if (planning && a && problems.n_errors == 0)
        tvc_place_problem(&problems, tvm_adapters_check(a, &c->err), &c->err);
    if (planning && c->out.json)
        plan_document(c, a, &problems);
    else if (planning && a && problems.n_errors == 0)
        plan_text(c, a);
    tvc_problems_print(c, &problems, planning);
    if (problems.n_errors > 0) {
        *status = tvc_problems_fail(c, &problems);
        goto out;
    }
    if (!planning)
        TV_TRY(run_it(c, a));
    *status = tvc_done(c, 0);
out:
    tvm_adapters_free(a);
    tvm_problems_free(&problems);
    return rc;
}
