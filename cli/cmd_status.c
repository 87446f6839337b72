/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_status.c - tvmerge status: how far the merge in a directory is.
 */
#include <inttypes.h>
#include <stdio.h>

#include "tv/alloc.h"
#include "tv/sys.h"
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

/* ---- recipes of several documents --------------------------------------- */

typedef void (*on_stage)(struct tvc *c, void *arg, const char *name,
                         const struct tvm_status *s);

/* Merges in OUT.stages; *n: how many. */
static enum tv_err each_stage(struct tvc *c, on_stage fn, void *arg, size_t *n)
{
    enum tv_err rc = TV_OK;
    char *const dir = tvm_stages_dir(c->pos[0]);
    char **names = NULL;
    size_t n_names = 0;

    *n = 0;
    if (dir == NULL)
        return tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
    if (!tv_path_exists(dir))
        goto out;
    TV_TRY(tv_dir_list(dir, &c->err, &names, &n_names));
    for (size_t i = 0; i < n_names; i++) {
        struct tvm_status s = {0};
        /* A stage that is being removed has a dot in front. */
        char *const path =
            names[i][0] == '.' ? NULL : tv_path_join(dir, names[i]);
        if (path != NULL && tvm_status(path, &s, NULL) == TV_OK &&
            s.state != TVM_ABSENT) {
            fn(c, arg, names[i], &s);
            ++*n;
        }
        tv_free(path);
    }
out:
    tv_dir_list_free(names, n_names);
    tv_free(dir);
    return rc;
}

static void add_stage(struct tvc *c, void *arg, const char *name,
                      const struct tvm_status *s)
{
    (void)c;
    (void)json_array_append_new(
        arg, json_pack("{s:o, s:s, s:o, s:o, s:o, s:o, s:b}", "name",
                       tvc_json_string(name), "state", state_name(s), "n_done",
                       tvc_json_u64(s->n_done), "n_tensors",
                       tvc_json_u64(s->n_tensors), "bytes_done",
                       tvc_json_u64(s->bytes_done), "bytes_total",
                       tvc_json_u64(s->bytes_total), "running", s->running));
}

static void print_stage(struct tvc *c, void *arg, const char *name,
                        const struct tvm_status *s)
{
    (void)arg;
    tvc_out(&c->out, "document %s: %s%s, %zu of %zu tensors", name,
            state_name(s), s->running ? ", running now" : "", s->n_done,
            s->n_tensors);
    if (s->n_masks_made < s->n_masks)
        tvc_out(&c->out, ", calibration: %zu of %zu masks", s->n_masks_made,
                s->n_masks);
    tvc_out(&c->out, "\n");
}

static void document(struct tvc *c, const struct tvm_status *s, json_t *damped,
                     json_t *stages)
{
    tvc_out_json(
        &c->out,
        json_pack(
            "{s:s, s:s, s:o, s:o, s:o, s:o, s:b, s:o, s:o, s:o, s:o}", "schema",
            "tvmerge.status/1", "state", state_name(s), "n_done",
            tvc_json_u64(s->n_done), "n_tensors", tvc_json_u64(s->n_tensors),
            "bytes_done", tvc_json_u64(s->bytes_done), "bytes_total",
            tvc_json_u64(s->bytes_total), "running", s->running, "plan_hash",
            hash_json(s->plan_hash), "digest", hash_json(s->digest),
            "calibration", calibration(s, damped), "documents", stages));
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
    enum tv_err rc = TV_OK;
    json_t *const damped = json_array();
    json_t *stages = json_array();
    size_t n = 0;

    TV_TRY(tvm_status(c->pos[0], &s, &c->err));
    TV_TRY(each_stage(c, add_stage, stages, &n));
    /* Its first documents are being merged; OUT comes last. */
    const bool early = s.state == TVM_ABSENT && n > 0;
    if (early)
        s.state = TVM_UNFINISHED;
    if (c->out.json) {
        if (s.n_masks > 0)
            TV_TRY(tvm_status_damped(c->pos[0], add_damped, damped, &c->err));
        document(c, &s, json_incref(damped), json_incref(stages));
    } else {
        if (early)
            tvc_out(&c->out, "%s: unfinished, not begun itself\n", c->pos[0]);
        else
            lines(c, &s);
        TV_TRY(each_stage(c, print_stage, NULL, &n));
    }
    if (s.state == TVM_ABSENT)
        rc = tv_error_set(&c->err, TV_E_NOTFOUND, "%s holds no merge",
                          c->pos[0]);
out:
    json_decref(damped);
    json_decref(stages);
    return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
}

const struct tvc_command tvc_cmd_status = {
    .name = "status",
    .summary = "how far an interrupted or running merge is",
    .args_doc = "OUT",
    .text =
        "Of a merge that is calibrated: masks made so far, and layers whose "
        "X^T X took\nmore damping than asked for (--json names them). "
        "Of a recipe of several\ndocuments: those that stand in OUT.stages. "
        "Exit code 10 when OUT holds no merge\nof this tool.",
    .examples = "tvmerge status ./merged\n"
                "tvmerge status ./merged --json",
    .min_pos = 1,
    .max_pos = 1,
    .run = run,
};
