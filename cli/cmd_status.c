/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_status.c - tvmerge status: how far the merge in a directory is.
 */
#include <inttypes.h>

#include "tv/text.h"
#include "tvmerge.h"

static const char *state_name(const struct tvm_status *s)
{
    switch (s->state) {
    case TVM_UNFINISHED:
        return "unfinished";
    case TVM_FINISHED:
        return "finished";
    case TVM_ABSENT:
        break;
    }
    return "absent";
}

static json_t *hash_json(struct tv_hash h)
{
    char hex[33];
    return h.lo || h.hi ? json_string(tv_hash_hex(h, hex)) : json_null();
}

static void document(struct tvc *c, const struct tvm_status *s)
{
    tvc_out_json(&c->out,
                 json_pack("{s:s, s:s, s:o, s:o, s:o, s:o, s:b, s:o, s:o}",
                           "schema", "tvmerge.status/1", "state", state_name(s),
                           "n_done", tvc_json_u64(s->n_done), "n_tensors",
                           tvc_json_u64(s->n_tensors), "bytes_done",
                           tvc_json_u64(s->bytes_done), "bytes_total",
                           tvc_json_u64(s->bytes_total), "running", s->running,
                           "plan_hash", hash_json(s->plan_hash), "digest",
                           hash_json(s->digest)));
}

static void lines(struct tvc *c, const struct tvm_status *s)
{
    char done[32];
    char total[32];
    char hex[33];
    if (s->state == TVM_FINISHED) {
        tvc_out(&c->out, "%s: finished, %zu tensors, digest %s\n", c->pos[0],
                s->n_tensors, tv_hash_hex(s->digest, hex));
        return;
    }
    if (s->state == TVM_ABSENT)
        return;
    tvc_out(&c->out, "%s: unfinished%s, %zu of %zu tensors, %s of %s\n",
            c->pos[0], s->running ? ", running now" : "", s->n_done,
            s->n_tensors, tv_format_bytes(s->bytes_done, done, sizeof done),
            tv_format_bytes(s->bytes_total, total, sizeof total));
}

static int run(struct tvc *c)
{
    struct tvm_status s = {0};
    if (tvm_status(c->pos[0], &s, &c->err) != TV_OK)
        return tvc_fail(c, &c->err);
    if (c->out.json)
        document(c, &s);
    else
        lines(c, &s);
    if (s.state == TVM_ABSENT) {
        (void)tv_error_set(&c->err, TV_E_NOTFOUND, "%s holds no merge",
                           c->pos[0]);
        return tvc_fail(c, &c->err);
    }
    return tvc_done(c, 0);
}

const struct tvc_command tvc_cmd_status = {
    .name = "status",
    .summary = "how far an interrupted or running merge is",
    .args_doc = "OUT",
    .text = "Exit code 10 when OUT holds no merge of this tool.",
    .examples = "tvmerge status ./merged\n"
                "tvmerge status ./merged --json",
    .min_pos = 1,
    .max_pos = 1,
    .run = run,
};
