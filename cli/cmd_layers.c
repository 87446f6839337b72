/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_layers.c - tvmerge layers: what each way to prune costs each layer.
 */
#include <stdlib.h>
#include <string.h>

#include "progress.h"
#include "signals.h"
#include "tv/alloc.h"
#include "tv/text.h"
#include "tvmerge.h"

#define DENSITIES_MAX 32u
#define UNLIMITED     (UINT64_C(1) << 50)

enum {
    KEY_DENSITIES = 0x3000,
    KEY_LAYER,
    KEY_OTHER,
    KEY_STORE,
    KEY_TEXT,
    KEY_SEED
};

/* What run has comes first: tvc_merge_prepare finds it there. */
struct opts {
    struct tvc_merge_opts merge;
    double densities[DENSITIES_MAX];
    struct tvm_layers_options layers;
};

static void init(struct tvc *c)
{
    struct opts *o = c->opt;
    static const double usual[] = {0.1, 0.2, 0.3, 0.5};

    tvc_merge_init(c);
    memcpy(o->densities, usual, sizeof usual);
    o->layers = (struct tvm_layers_options){
        .densities = o->densities, .n_densities = sizeof usual / sizeof *usual};
}

static error_t option_densities(struct tvc *c, const char *arg)
{
    struct opts *o = c->opt;
    const char *at = arg;

    o->layers.n_densities = 0;
    for (;;) {
        char *end = NULL;
        const double d = strtod(at, &end);
        if (end == at || !(d > 0.0) || d > 1.0 || (*end && *end != ','))
            return tvc_bad(c,
                           "--densities: '%s' is not a list of numbers above 0 "
                           "and at most 1",
                           arg);
        if (o->layers.n_densities == DENSITIES_MAX)
            return tvc_bad(c, "--densities: more than %u", DENSITIES_MAX);
        o->densities[o->layers.n_densities++] = d;
        if (!*end)
            return 0;
        at = end + 1;
    }
}

static error_t option(struct tvc *c, int key, const char *arg)
{
    struct opts *o = c->opt;

    switch (key) {
    case KEY_DENSITIES:
        return option_densities(c, arg);
    case KEY_LAYER:
        o->layers.prefix = arg;
        return 0;
    case KEY_OTHER:
        o->layers.other = arg;
        return 0;
    case KEY_STORE:
        o->merge.store_path = arg;
        o->merge.store_given = true;
        return 0;
    case KEY_TEXT:
        return tvc_option_text(c, arg);
    case KEY_SEED:
        return tvc_parse_u64(c, "--random-seed", arg, INT64_MAX,
                             &o->merge.options.seed);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

struct shown {
    struct tvc *c;
    struct tvc_progress *bar;
    const char *model;
    json_t *list;
    struct tvc_table table;
    bool any; /* rows */
};

static void on_calibrating(void *arg, const char *model, uint64_t done,
                           uint64_t total)
{
    struct shown *const s = arg;
    if (s->model != model) {
        tvc_progress_end(s->bar);
        s->bar = tvc_progress_begin(&s->c->out, "calibrate", "tokens");
        s->model = model;
    }
    tvc_progress_set(s->bar, done, total, 0, 0);
}

static void on_layer(void *arg, const struct tvm_layer_error *e)
{
    struct shown *const s = arg;

    if (s->c->out.json) {
        (void)json_array_append_new(
            s->list,
            json_pack(
                "{s:o, s:o, s:o, s:s, s:o, s:o, s:o, s:o, s:o, s:o}", "name",
                tvc_json_string(e->name), "donor", tvc_json_string(e->donor),
                "density", tvc_json_real(e->density), "method", e->method,
                "error", tvc_json_real(e->error), "relative",
                tvc_json_real(e->relative), "error_other_text",
                e->has_other ? tvc_json_real(e->error_other) : json_null(),
                "kept", tvc_json_u64(e->kept), "damping",
                e->damping > 0 ? tvc_json_real(e->damping) : json_null(),
                "unseen_inputs", tvc_json_u64(e->n_unseen)));
        return;
    }
    tvc_table_cell(&s->table, "%s", e->name);
    tvc_table_cell(&s->table, "%s", e->donor);
    tvc_table_cell(&s->table, "%g", e->density);
    s->any = true;
    tvc_table_cell(&s->table, "%s", e->method);
    tvc_table_cell(&s->table, "%.6g", e->error);
    tvc_table_cell(&s->table, "%.4f", e->relative);
    if (e->has_other)
        tvc_table_cell(&s->table, "%.6g", e->error_other);
    else
        tvc_table_cell(&s->table, "-");
    tvc_table_cell(&s->table, "%llu", (unsigned long long)e->kept);
}

static int run(struct tvc *c)
{
    static const char *const headers[] = {"LAYER",      "DONOR", "DENSITY",
                                          "METHOD",     "ERROR", "RELATIVE",
                                          "OTHER TEXT", "KEPT"};
    struct opts *o = c->opt;
    struct shown s = {.c = c};
    const struct tvm_run_hooks hooks = {
        .calibrating = on_calibrating, .arg = &s, .cancel = tvc_cancel_flag()};
    struct tvc_merge m = {0};
    enum tv_err rc = TV_OK;
    int status = 0;

    TV_TRY(tvc_merge_prepare(c, true));
    o->merge.options.many_methods = true; /* its own */
    /* Nothing is merged: what that would need is no limit. */
    o->merge.options.memory_bytes = UNLIMITED;
    TV_TRY(tvc_merge_plan(c, &m));
    tvc_problems_print(c, &m.problems, false);
    if (m.problems.n_errors > 0) {
        status = tvc_problems_fail(c, &m.problems);
        goto out;
    }
    m.plan->options.memory_bytes = c->memory_bytes;
    if (c->out.json)
        s.list = json_array();
    else
        tvc_table_begin(&s.table, "llrlrrrr", headers);
    rc = tvm_layers(m.plan, &o->layers, &hooks, on_layer, &s, &c->err);
    tvc_progress_end(s.bar);
    if (c->out.json && rc == TV_OK) {
        tvc_out_json(&c->out, json_pack("{s:s, s:o}", "schema",
                                        "tvmerge.layers/1", "layers", s.list));
        s.list = NULL;
    } else if (!c->out.json && !s.any) {
        tvc_table_free(&s.table); /* an error, and nothing to show beside it */
    } else if (!c->out.json) {
        struct tv_error unused;
        const enum tv_err shown =
            tvc_table_end(&c->out, &s.table, rc == TV_OK ? &c->err : &unused);
        rc = rc == TV_OK ? shown : rc;
    }
out:
    json_decref(s.list);
    if (rc != TV_OK)
        status = tvc_fail(c, &c->err);
    else if (status == 0)
        status = tvc_done(c, 0);
    tvc_merge_free(&m);
    tvc_merge_opts_free(&o->merge);
    return status;
}

static const struct argp_option options[] = {
    {"densities", KEY_DENSITIES, "LIST", 0,
     "Kept fractions (default: 0.1,0.2,0.3,0.5)", 0},
    {"layer", KEY_LAYER, "PREFIX", 0, "Only tensors whose names begin so", 0},
    {"other-text", KEY_OTHER, "FILE", 0,
     "Errors on the inputs of this text too, which chose nothing", 0},
    {"text", KEY_TEXT, "NAME=FILE", 0,
     "Calibration text of model NAME; may be repeated", 0},
    {"store", KEY_STORE, "STORE", 0,
     "Store of store:NAME references, and of statistics (default: $TV_STORE)",
     0},
    {"random-seed", KEY_SEED, "N", 0, "Seed of random masks (default: 0)", 0},
    {0},
};

const struct tvc_command tvc_cmd_layers = {
    .name = "layers",
    .summary = "what each way to prune costs each layer",
    .args_doc = "RECIPE",
    .text =
        "Per layer and donor of a recipe with calibration texts: the "
        "error\n||X (T - P)^T||_F^2 of what magnitude, random and importance "
        "masks, SparseGPT\n(obs) and conjugate gradients (cg) leave of the "
        "task vector T. Writes nothing.",
    .examples = "tvmerge layers recipe.yml --densities 0.1,0.2\n"
                "tvmerge layers recipe.yml --layer model.layers.3. --json\n"
                "tvmerge layers recipe.yml --text ft=task.txt --other-text "
                "other.txt",
    .options = options,
    .opt_bytes = sizeof(struct opts),
    .init = init,
    .option = option,
    .min_pos = 1,
    .max_pos = 1,
    .cancellable = true,
    .run = run,
};
