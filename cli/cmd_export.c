/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_export.c - tvstore export: an object as a directory that transformers
 * and PEFT load.
 */
#include <inttypes.h>

#include "progress.h"
#include "signals.h"
#include "store_open.h"
#include "tv/format.h"
#include "tv/text.h"
#include "tvstore.h"

struct opts {
    bool force, no_sync;
    uint64_t shard_bytes;
};

enum { KEY_FORCE = 0x2000, KEY_SHARD, KEY_NO_SYNC };

static const struct argp_option options[] = {
    {"out-shard-size", KEY_SHARD, "SIZE", 0,
     "Most bytes per safetensors file (default: 5GB)", 0},
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
        return tvc_parse_size(c, "--out-shard-size", arg, true,
                              &o->shard_bytes);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static void on_bytes(void *arg, uint64_t done, uint64_t total)
{
    tvc_progress_set(arg, 0, 0, done, total);
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
                                        tvc_json_real(seconds)));
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
    .args_doc = "STORE NAME DIR",
    .text = "Tensors and side files are written byte for byte; config.json "
            "comes last.",
    .examples = "tvstore export models.tv merged ./merged\n"
                "tvstore export models.tv merged ./merged "
                "--out-shard-size 2GB",
    .options = options,
    .opt_bytes = sizeof(struct opts),
    .option = option,
    .min_pos = 3,
    .max_pos = 3,
    .cancellable = true,
    .run = run,
};
