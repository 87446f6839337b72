/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_extract.c - tvmerge extract-lora: an adapter from a fine-tune.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "progress.h"
#include "signals.h"
#include "store_open.h"
#include "tv/adapters.h"
#include "tv/text.h"
#include "tvmerge.h"

struct opts {
    struct tvm_extract x;
    const char *store_path;
    bool force, no_sync;
};

enum {
    KEY_MODEL = 0x2000,
    KEY_BASE,
    KEY_RANK,
    KEY_EPSILON,
    KEY_EMBEDDINGS,
    KEY_NORMS,
    KEY_DTYPE,
    KEY_SVD,
    KEY_SEED,
    KEY_STORE,
    KEY_FORCE,
    KEY_NO_SYNC
};

static const struct argp_option options[] = {
    {"model", KEY_MODEL, "REF", 0, "The fine-tune (required)", 0},
    {"base", KEY_BASE, "REF", 0, "What it was made from (required)", 0},
    {"rank", KEY_RANK, "R", 0, "Most ranks per matrix (required)", 0},
    {"sv-epsilon", KEY_EPSILON, "E", 0,
     "Leave out singular values up to E times the largest (default: 0)", 0},
    {"embeddings", KEY_EMBEDDINGS, NULL, 0,
     "Embeddings and head whole, as modules_to_save", 0},
    {"norms", KEY_NORMS, NULL, 0, "Norms whole, as modules_to_save", 0},
    {"dtype", KEY_DTYPE, "TYPE", 0,
     "Of the factors: float32 (default), bfloat16, float16", 0},
    {"svd", KEY_SVD, "auto|full|randomized", 0,
     "How to decompose (auto: full up to 1024 rows or columns)", 0},
    {"random-seed", KEY_SEED, "N", 0, "Of the randomized SVD (default: 0)", 0},
    {"store", KEY_STORE, "STORE", 0,
     "For references store:NAME (default: TV_STORE)", 0},
    {"force", KEY_FORCE, NULL, 0, "Replace what OUT holds", 0},
    {"no-sync", KEY_NO_SYNC, NULL, 0, "Do not wait for the disk", 0},
    {0}};

static void init(struct tvc *c)
{
    struct opts *o = c->opt;
    *o = (struct opts){.store_path = getenv("TV_STORE")};
}

static bool number(const char *arg, double *out)
{
    char *end = NULL;
    *out = strtod(arg, &end);
    return *arg != '\0' && *end == '\0' && *out >= 0 && *out < 1e15;
}

static error_t option_value(struct tvc *c, struct opts *o, int key,
                            const char *arg)
{
    static const char *const ways[] = {"auto", "full", "randomized"};
    double x = 0;

    switch (key) {
    case KEY_RANK:
        if (!number(arg, &x) || x < 1 || x > 65536 || x != (double)(uint64_t)x)
            return tvc_bad(c, "--rank: '%s' is no number from 1 to 65536", arg);
        o->x.rank = (uint64_t)x;
        return 0;
    case KEY_EPSILON:
        if (!number(arg, &x) || x >= 1)
            return tvc_bad(c, "--sv-epsilon: '%s' is not in [0, 1)", arg);
        o->x.sv_epsilon = x;
        return 0;
    case KEY_SEED:
        if (!number(arg, &x) || x != (double)(uint64_t)x)
            return tvc_bad(c, "--random-seed: '%s' is no number", arg);
        o->x.seed = (uint64_t)x;
        return 0;
    case KEY_DTYPE:
        o->x.dtype = tv_dtype_from_torch(arg);
        if (!tv_dtype_is_math(o->x.dtype))
            return tvc_bad(c,
                           "--dtype: '%s' is not float32, bfloat16 or "
                           "float16",
                           arg);
        return 0;
    default:
        o->x.svd = tvc_choose(c, "--svd", arg, ways, 3);
        return o->x.svd < 0 ? EINVAL : 0;
    }
}

static error_t option(struct tvc *c, int key, const char *arg)
{
    struct opts *o = c->opt;
    switch (key) {
    case KEY_MODEL:
        o->x.model = arg;
        return 0;
    case KEY_BASE:
        o->x.base = arg;
        return 0;
    case KEY_STORE:
        o->store_path = arg;
        return 0;
    case KEY_EMBEDDINGS:
        o->x.embeddings = true;
        return 0;
    case KEY_NORMS:
        o->x.norms = true;
        return 0;
    case KEY_FORCE:
        o->force = true;
        return 0;
    case KEY_NO_SYNC:
        o->no_sync = true;
        return 0;
    case KEY_RANK:
    case KEY_EPSILON:
    case KEY_SEED:
    case KEY_DTYPE:
    case KEY_SVD:
        return option_value(c, o, key, arg);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

struct listing {
    json_t *layers;
    struct tvc_table table;
};

static void on_layer(void *arg, const struct tvm_extracted *x)
{
    struct listing *l = arg;

    (void)json_array_append_new(
        l->layers,
        json_pack("{s:o, s:o, s:o, s:b}", "name", tvc_json_string(x->module),
                  "rank", tvc_json_u64(x->rank), "energy",
                  tvc_json_real(x->energy), "randomized", (int)x->randomized));
    tvc_table_cell(&l->table, "%s", x->module);
    tvc_table_cell(&l->table, "%" PRIu64, x->rank);
    tvc_table_cell(&l->table, "%.4f", x->energy);
    tvc_table_cell(&l->table, "%s", x->randomized ? "randomized" : "full");
}

static void on_progress(void *arg, const struct tvm_progress *p)
{
    tvc_progress_set(arg, p->n_done, p->n_tensors, 0, 0);
}

static enum tv_err report(struct tvc *c, struct listing *l,
                          const struct tvm_result *r)
{
    enum tv_err rc = TV_OK;

    if (c->out.json) {
        json_t *doc =
            tvc_adapter_result_json("tvmerge.extract-lora/1", c->pos[0], r);
        (void)json_object_set(doc, "layers", l->layers);
        (void)json_object_set_new(doc, "n_left_out",
                                  tvc_json_u64(r->n_left_out));
        tvc_out_json(&c->out, doc);
        return rc;
    }
    if (!r->already_done)
        TV_TRY(tvc_table_end(&c->out, &l->table, &c->err));
    if (r->n_left_out)
        tvc_warn(&c->out,
                 "%zu tensors differ, but are no matrices of linear layers "
                 "and are left out (--embeddings, --norms)",
                 r->n_left_out);
    tvc_adapter_summary(c, c->pos[0], r);
out:
    return rc;
}

static int run(struct tvc *c)
{
    static const char *const headers[] = {"MODULE", "RANK", "ENERGY", "SVD"};
    const struct opts *o = c->opt;
    struct tvm_options m;
    struct tvm_result r = {0};
    struct listing l = {.layers = json_array()};
    struct tvc_progress *bar = NULL;
    enum tv_err rc = TV_OK;

    tvm_options_init(&m);
    tvc_table_begin(&l.table, "lrrl", headers);
    if (!o->x.model || !o->x.base || o->x.rank == 0) {
        rc = tv_error_set(&c->err, TV_E_USAGE,
                          "--model, --base and --rank are required");
        goto out;
    }
    m.out_dir = c->pos[0];
    m.memory_bytes = c->memory_bytes;
    m.kernels = c->kernels;
    m.force = o->force;
    m.sync = !o->no_sync;
    if (o->store_path)
        TV_TRY(tvc_store_open(c, o->store_path, true, &c->err, &m.store));
    bar = tvc_progress_begin(&c->out, "extract", "tensors");
    const struct tvm_run_hooks hooks = {
        .progress = on_progress, .arg = bar, .cancel = tvc_cancel_flag()};
    rc = tvm_extract_lora(&o->x, &m, &hooks, on_layer, &l, &r, &c->err);
    tvc_progress_end(bar);
    TV_TRY(rc);
    TV_TRY(report(c, &l, &r));
out:
    tvc_table_free(&l.table);
    json_decref(l.layers);
    tv_store_close(m.store);
    return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
}

const struct tvc_command tvc_cmd_extract = {
    .name = "extract-lora",
    .summary = "make an adapter from a fine-tune and its base",
    .args_doc = "--model M --base B --rank R OUT",
    .text =
        "Per matrix the best factors of the difference at rank R; OUT loads "
        "in PEFT.\nENERGY is the part of the squared norm that they keep.",
    .examples = "tvmerge extract-lora --model ft --base base --rank 16 out\n"
                "tvmerge extract-lora --model ft --base base --rank 64 "
                "--sv-epsilon 0.01 --embeddings --norms out --json",
    .options = options,
    .opt_bytes = sizeof(struct opts),
    .init = init,
    .option = option,
    .min_pos = 1,
    .max_pos = 1,
    .cancellable = true,
    .run = run,
};
