/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_compact.c - tvstore compact: free pages back to the file system.
 */
#include "store_open.h"
#include "tv/text.h"
#include "tvstore.h"

struct opts {
    const char *scratch;
    unsigned lock_timeout_ms;
};

enum { KEY_SCRATCH = 0x2000, KEY_LOCK_TIMEOUT };

static void init(struct tvc *c)
{
    struct opts *o = c->opt;
    *o = (struct opts){.lock_timeout_ms = 10000};
}

static error_t option(struct tvc *c, int key, const char *arg)
{
    struct opts *o = c->opt;
    switch (key) {
    case KEY_SCRATCH:
        o->scratch = arg;
        return 0;
    case KEY_LOCK_TIMEOUT:
        return tvc_parse_ms(c, "--lock-timeout", arg, &o->lock_timeout_ms);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static int run(struct tvc *c)
{
    const struct opts *o = c->opt;
    struct tv_compact r;
    char a[32];
    char b[32];
    if (tv_store_compact(c->pos[0], o->scratch, o->lock_timeout_ms, &r,
                         &c->err) != TV_OK)
        return tvc_fail(c, &c->err);
    if (c->out.json)
        tvc_out_json(&c->out,
                     json_pack("{s:s, s:o, s:o}", "schema", "tvstore.compact/1",
                               "before_bytes", tvc_json_u64(r.before_bytes),
                               "after_bytes", tvc_json_u64(r.after_bytes)));
    else
        tvc_say(&c->out, "the store took %s, it now takes %s",
                tv_format_bytes(r.before_bytes, a, sizeof a),
                tv_format_bytes(r.after_bytes, b, sizeof b));
    return tvc_done(c, 0);
}

static const struct argp_option options[] = {
    {"scratch", KEY_SCRATCH, "DIR", 0, "Make the copy in DIR, on another disk",
     0},
    {"lock-timeout", KEY_LOCK_TIMEOUT, "SECONDS", 0,
     "How long to wait for another writer (default: 10)", 0},
    {0}};

const struct tvc_command tvc_cmd_compact = {
    .name = "compact",
    .summary = "give free pages back to the file system",
    .args_doc = "STORE",
    .text = "Makes a copy without free pages and puts it in the place of the "
            "data. Nobody\nelse may have the store open. Without --scratch "
            "quota and disk must have room\nfor the copy beside the data.",
    .examples = "tvstore compact models.tv\n"
                "tvstore compact models.tv --scratch /mnt/other",
    .options = options,
    .opt_bytes = sizeof(struct opts),
    .init = init,
    .option = option,
    .min_pos = 1,
    .max_pos = 1,
    .run = run,
};
