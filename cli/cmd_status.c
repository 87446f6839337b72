/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_status.c - tvmerge status: how far the merge in a directory is.
 */
#include <inttypes.h>
#include <stdio.h>

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

static void add_damped(void *arg, const struct tvm_damped *d)
{
    json_t *const list = arg;

    (void)json_array_append_new(
        list,
        json_pack("{s:o, s:o, s:o, s:o, s:o}", "tensor",
                  tvc_json_string(d->tensor), "donor",
                  tvc_json_string(d->donor), "damping",
                  d->damping > 0 ? tvc_json_real(d->damping) : json_null(),
                  "raised", tvc_json_u64(d->n_raised), "unseen_inputs",
                  tvc_json_u64(d->n_unseen)));
}

/* Null for a merge whose masks do not depend on inputs. */
static json_t *calibration(const struct tvm_status *s, json_t *damped)
{
    if (s->n_masks == 0) {
        json_decref(damped);
        return json_null();
    }
    return json_pack("{s:o, s:o, s:b, s:o}", "masks", tvc_json_u64(s->n_masks),
                     "made", tvc_json_u64(s->n_masks_made), "random", s->random,
                     "damped", damped);
}

static void document(struct tvc *c, const struct tvm_status *s, json_t *damped)
{
    tvc_out_json(&c->out,
                 json_pack("{s:s, s:s, s:o, s:o, s:o, s:o, s:b, s:o, s:o, s:o}",
                           "schema", "tvmerge.status/1", "state", state_name(s),
                           "n_done", tvc_json_u64(s->n_done), "n_tensors",
                           tvc_json_u64(s->n_tensors), "bytes_done",
                           tvc_json_u64(s->bytes_done), "bytes_total",
                           tvc_json_u64(s->bytes_total), "running", s->running,
                           "plan_hash", hash_json(s->plan_hash), "digest",
                           hash_json(s->digest), "calibration",
                           calibration(s, damped)));
}

static void notes(struct tvc *c, const struct tvm_status *s)
{
    if (s->random)
        tvc_out(&c->out, "calibrated with random tokens\n");
    if (s->n_damped > 0)
        tvc_out(&c->out, "%zu layers took more damping, up to %g\n",
                s->n_damped, s->most_damping);
    if (s->n_uncorrected > 0)
        tvc_out(&c->out,
                "%zu layers have no usable X^T X: masked by its diagonal, not "
                "corrected\n",
                s->n_uncorrected);
}

static void lines(struct tvc *c, const struct tvm_status *s)
{
    char done[32];
    char total[32];
    char masks[80] = "";
    char hex[33];
    if (s->state == TVM_FINISHED) {
        tvc_out(&c->out, "%s: finished, %zu tensors, digest %s\n", c->pos[0],
                s->n_tensors, tv_hash_hex(s->digest, hex));
        notes(c, s);
        return;
    }
    if (s->state == TVM_ABSENT)
        return;
    if (s->n_masks_made < s->n_masks)
        (void)snprintf(masks, sizeof masks, ", calibration: %zu of %zu masks",
                       s->n_masks_made, s->n_masks);
    tvc_out(&c->out, "%s: unfinished%s%s, %zu of %zu tensors, %s of %s\n",
            c->pos[0], s->running ? ", running now" : "", masks, s->n_done,
            s->n_tensors, tv_format_bytes(s->bytes_done, done, sizeof done),
            tv_format_bytes(s->bytes_total, total, sizeof total));
    notes(c, s);
}

static int run(struct tvc *c)
{
    struct tvm_status s = {0};
    if (tvm_status(c->pos[0], &s, &c->err) != TV_OK)
        return tvc_fail(c, &c->err);
    if (c->out.json) {
        json_t *const damped = json_array();
        if (s.n_masks > 0 && tvm_status_damped(c->pos[0], add_damped, damped,
                                               &c->err) != TV_OK) {
            json_decref(damped);
            return tvc_fail(c, &c->err);
        }
        document(c, &s, damped);
    } else
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
    .text =
        "Of a merge that is calibrated: masks made so far, and layers whose "
        "X^T X took\nmore damping than asked for (--json names them). Exit "
        "code 10 when OUT holds no merge of this tool.",
    .examples = "tvmerge status ./merged\n"
                "tvmerge status ./merged --json",
    .min_pos = 1,
    .max_pos = 1,
    .run = run,
};
