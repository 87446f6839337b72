/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_export.c - tvstore export: an object as a directory that transformers
 * and PEFT load.
 */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "progress.h"
#include "signals.h"
#include "store_open.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/merge.h"
#include "tv/sys.h"
#include "tv/text.h"
#include "tvstore.h"

struct opts {
    bool force, no_sync;
    uint64_t shard_bytes;
};

enum { KEY_FORCE = 0x2000, KEY_SHARD, KEY_NO_SYNC };

static const struct argp_option options[] = {
    {"out-shard-size", KEY_SHARD, "SIZE", 0,
     "Most bytes per safetensors file (default: 5GB; 0: no limit)", 0},
    {"force", KEY_FORCE, NULL, 0, "Write into a directory that has files", 0},
    {"no-sync", KEY_NO_SYNC, NULL, 0, "Do not wait for the disk", 0},
    {0}};

static error_t option(struct tvc *c, int key, const char *arg)
{
    struct opts *o = c->opt;
    switch (key) {
    case KEY_FORCE:
        o->force = true;
        return 0;
    case KEY_NO_SYNC:
        o->no_sync = true;
        return 0;
    case KEY_SHARD:
        return tvc_parse_shard(c, arg, &o->shard_bytes);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void on_bytes(void *arg, uint64_t done, uint64_t total)
{
    tvc_progress_set(arg, 0, 0, done, total);
}

/* ---- a model with adapters ---------------------------------------------- */

/* One part of A+B*0.5 as a reference: names of the store get "store:". */
static enum tv_err add_part(struct tvc *c, tv_read *read, const char *part,
                            size_t n, struct tv_buf *out)
{
    struct tv_object *o = NULL;
    char *name = tv_strndup(part, n);
    char *star = NULL;
    enum tv_err rc = TV_OK;

    if (!name)
        return tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
    star = strrchr(name, '*');
    if (star)
        *star = '\0';
    if (strncmp(name, "store:", 6) != 0) {
        rc = tv_object_find(read, name, false, &c->err, &o);
        if (rc == TV_OK) {
            tv_buf_str(out, "store:");
        } else if (rc == TV_E_NOTFOUND && !strchr(name, '/') &&
                   !strchr(name, '@') && !tv_path_exists(name)) {
            tv_free(name);
            c->err.code = TV_E_INPUT; /* a path could have stood there too */
            return TV_E_INPUT;
        }
        rc = TV_OK;
        tv_error_clear(&c->err);
    }
    tv_object_free(o);
    for (size_t i = 0; i < n; i++) {
        tv_buf_add(out, &part[i], 1);
        if (part[i] == '\'') /* inside single quotes of YAML */
            tv_buf_str(out, "'");
    }
    tv_free(name);
    return rc;
}

static enum tv_err recipe_text(struct tvc *c, tv_store *store, const char *name,
                               struct tv_buf *out)
{
    tv_read *read = NULL;
    const char *s = name;
    enum tv_err rc = TV_OK;

    tv_buf_str(out, "merge_method: passthrough\nmodels:\n- model: '");
    TV_TRY(tv_read_begin(store, &c->err, &read));
    for (;;) {
        const char *plus = strchr(s, '+');
        const size_t n = plus ? (size_t)(plus - s) : strlen(s);
        TV_TRY(add_part(c, read, s, n, out));
        if (!plus)
            break;
        tv_buf_str(out, "+");
        s = plus + 1;
    }
    tv_buf_str(out, "'\n");
    rc = tv_buf_ok(out, &c->err);
out:
    tv_read_end(read);
    return rc;
}

static void on_tensors(void *arg, const struct tvm_progress *p)
{
    tvc_progress_set(arg, p->n_done, p->n_tensors, p->bytes_done,
                     p->bytes_total);
}

/* A passthrough merge, whose recipe is a file only for its reader's sake. */
static enum tv_err export_applied(struct tvc *c, tv_store *store,
                                  struct tv_transfer *t)
{
    char path[] = P_tmpdir "/tvstore-XXXXXX";
    const int fd = mkstemp(path);
    const struct tvm_run_hooks hooks = {.progress = on_tensors,
                                        .arg = t->progress_arg,
                                        .cancel = tvc_cancel_flag()};
    struct tvm_problems problems;
    struct tvm_options o;
    struct tvm_result r = {0};
    struct tv_buf text;
    tvm_recipe *recipe = NULL;
    struct tvm_plan *plan = NULL;
    enum tv_err rc = TV_OK;

    tvm_problems_init(&problems);
    tv_buf_init(&text, 1u << 20);
    if (fd < 0) {
        rc = tv_error_set(&c->err, TV_E_IO, "cannot write %s", path);
        goto out;
    }
    TV_TRY(recipe_text(c, store, c->pos[1], &text));
    TV_TRY(tv_pwrite_all(fd, text.data, text.n_bytes, 0, path, &c->err));
    rc = tvm_recipe_load(path, &problems, &c->err, &recipe);
    if (recipe) {
        tvm_options_init(&o);
        o.store = store;
        o.out_dir = c->pos[2];
        o.shard_bytes = t->shard_bytes;
        o.memory_bytes = c->memory_bytes;
        o.threads = tvc_threads(c);
        o.kernels = c->kernels;
        o.force = t->force;
        o.sync = t->sync;
        o.write_model_card = false;
        o.no_cache = true;
        rc = tvm_plan_make(recipe, &o, &problems, &c->err, &plan);
    }
    for (size_t i = 0; i < problems.n; i++)
        if (problems.items[i].is_error) {
            rc = tv_error_set(&c->err, tvm_problems_code(&problems), "%s",
                              problems.items[i].message);
            break;
        }
    TV_TRY(rc);
    TV_TRY(tvm_run(plan, &hooks, &r, &c->err));
    t->n_tensors = r.n_tensors;
    t->bytes = plan->bytes_written;
out:
    if (fd >= 0) {
        (void)tv_sys()->close(fd);
        (void)tv_sys()->unlink(path);
    }
    tvm_plan_free(plan);
    tvm_recipe_free(recipe);
    tvm_problems_free(&problems);
    tv_buf_free(&text);
    return rc;
}

static int run(struct tvc *c)
{
    const struct opts *o = c->opt;
    const double begin = tvc_seconds();
    struct tvc_progress *bar = NULL;
    tv_store *store = NULL;
    enum tv_err rc = TV_OK;
    struct tv_transfer t = {.force = o->force,
                            .shard_bytes = o->shard_bytes,
                            .sync = !o->no_sync,
                            .progress = on_bytes,
                            .cancel = tvc_cancel_flag()};
    char bytes[32];
    char time[32];

    TV_TRY(tvc_store_open(c, c->pos[0], true, &c->err, &store));
    bar = tvc_progress_begin(&c->out, "export", NULL);
    t.progress_arg = bar;
    if (strchr(c->pos[1], '+'))
        TV_TRY(export_applied(c, store, &t));
    else
        TV_TRY(tv_export(store, c->pos[1], c->pos[2], &t, &c->err));
    tvc_progress_end(bar);
    bar = NULL;
    const double seconds = tvc_seconds() - begin;
    if (c->out.json)
        tvc_out_json(&c->out, json_pack("{s:s, s:o, s:o, s:o, s:o, s:o}",
                                        "schema", "tvstore.export/1", "name",
                                        tvc_json_string(c->pos[1]), "dir",
                                        tvc_json_string(c->pos[2]), "n_tensors",
                                        tvc_json_u64(t.n_tensors), "bytes",
                                        tvc_json_u64(t.bytes), "seconds",
                                        tvc_json_measured(seconds)));
    else
        tvc_say(&c->out, "exported %s to %s: %zu tensors, %s in %s", c->pos[1],
                c->pos[2], t.n_tensors,
                tv_format_bytes(t.bytes, bytes, sizeof bytes),
                tvc_duration(seconds, time, sizeof time));
out:
    tvc_progress_end(bar);
    tv_store_close(store);
    return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
}

const struct tvc_command tvc_cmd_export = {
    .name = "export",
    .summary = "write an object as a directory that transformers or PEFT load",
    .args_doc = "STORE NAME DIR\nSTORE NAME+ADAPTER[*WEIGHT]... DIR",
    .text = "Tensors and side files are written byte for byte; config.json "
            "comes last.\nWith adapters the model that they make of NAME is "
            "written.",
    .examples = "tvstore export models.tv merged ./merged\n"
                "tvstore export models.tv merged ./merged "
                "--out-shard-size 2GB\n"
                "tvstore export models.tv base+lora ./applied",
    .options = options,
    .opt_bytes = sizeof(struct opts),
    .option = option,
    .min_pos = 3,
    .max_pos = 3,
    .cancellable = true,
    .run = run,
};
