/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_status.c - tvmerge status: how far the merge in a directory is, or those
 * in a store, or a comparison (status_compare.c).
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "status.h"
#include "store_open.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"
#include "tvmerge.h"

const char *tvc_state_name(const struct tvm_status *s)
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
                       tvc_json_string(name), "state", tvc_state_name(s),
                       "n_done", tvc_json_u64(s->n_done), "n_tensors",
                       tvc_json_u64(s->n_tensors), "bytes_done",
                       tvc_json_u64(s->bytes_done), "bytes_total",
                       tvc_json_u64(s->bytes_total), "running", s->running));
}

static void print_stage(struct tvc *c, void *arg, const char *name,
                        const struct tvm_status *s)
{
    (void)arg;
    tvc_out(&c->out, "document %s: %s%s, %zu of %zu tensors", name,
            tvc_state_name(s), s->running ? ", running now" : "", s->n_done,
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
            "tvmerge.status/1", "state", tvc_state_name(s), "n_done",
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

static void lines(struct tvc *c, const char *name, const struct tvm_status *s)
{
    char done[32];
    char total[32];
    char masks[80] = "";
    char hex[33];
    if (s->state == TVM_FINISHED) {
        tvc_out(&c->out, "%s: finished, %zu tensors, digest %s\n", name,
                s->n_tensors, tv_hash_hex(s->digest, hex));
        notes(c, s);
        return;
    }
    if (s->state == TVM_ABSENT)
        return;
    if (s->n_masks_made < s->n_masks)
        (void)snprintf(masks, sizeof masks, ", calibration: %zu of %zu masks",
                       s->n_masks_made, s->n_masks);
    tvc_out(&c->out, "%s: unfinished%s%s, %zu of %zu tensors, %s of %s\n", name,
            s->running ? ", running now" : "", masks, s->n_done, s->n_tensors,
            tv_format_bytes(s->bytes_done, done, sizeof done),
            tv_format_bytes(s->bytes_total, total, sizeof total));
    notes(c, s);
}

/* ---- stores -------------------------------------------------------------- */

struct seen {
    struct tvc *c;
    json_t *list; /* NULL: lines are printed */
    size_t n;
};

static void one_of_store(void *arg, const char *name, bool is_dir,
                         const struct tvm_status *s)
{
    struct seen *const seen = arg;
    char shown[512];

    seen->n++;
    if (!seen->list) {
        (void)snprintf(shown, sizeof shown, "%s%s",
                       is_dir ? "" : "store:", name);
        lines(seen->c, shown, s);
        return;
    }
    (void)json_array_append_new(
        seen->list,
        json_pack("{s:o, s:b, s:s, s:o, s:o, s:o, s:o, s:b, s:o, s:o, s:o}",
                  "name", tvc_json_string(name), "directory", (int)is_dir,
                  "state", tvc_state_name(s), "n_done", tvc_json_u64(s->n_done),
                  "n_tensors", tvc_json_u64(s->n_tensors), "bytes_done",
                  tvc_json_u64(s->bytes_done), "bytes_total",
                  tvc_json_u64(s->bytes_total), "running", (int)s->running,
                  "n_masks", tvc_json_u64(s->n_masks), "n_masks_made",
                  tvc_json_u64(s->n_masks_made), "plan_hash",
                  hash_json(s->plan_hash)));
}

static enum tv_err all_of_store(struct tvc *c, tv_store *store)
{
    struct seen seen = {.c = c, .list = c->out.json ? json_array() : NULL};
    const enum tv_err rc =
        tvm_status_store(store, one_of_store, &seen, &c->err);

    if (rc != TV_OK)
        json_decref(seen.list);
    else if (seen.list)
        tvc_out_json(&c->out,
                     json_pack("{s:s, s:o, s:o}", "schema", "tvmerge.status/1",
                               "store", tvc_json_string(tv_store_path(store)),
                               "merges", seen.list));
    else if (seen.n == 0)
        tvc_out(&c->out, "%s: no unfinished merge\n", tv_store_path(store));
    return rc;
}

static enum tv_err one_into(struct tvc *c, tv_store *store, const char *name)
{
    enum tv_err rc = TV_OK;
    struct tvm_status s;
    char shown[512];
    json_t *const damped = json_array();

    TV_TRY(tvm_status_into(store, name, &s, add_damped, damped, &c->err));
    if (s.state == TVM_ABSENT) {
        rc =
            tv_error_set(&c->err, TV_E_NOTFOUND, "store %s holds no merge '%s'",
                         tv_store_path(store), name);
        goto out;
    }
    (void)snprintf(shown, sizeof shown, "store:%s", name);
    if (c->out.json)
        document(c, &s, json_incref(damped), json_array());
    else
        lines(c, shown, &s);
out:
    json_decref(damped);
    return rc;
}

static enum tv_err of_store(struct tvc *c, const char *path, const char *into)
{
    enum tv_err rc = TV_OK;
    tv_store *store = NULL;

    TV_TRY(tvc_store_open(c, path, true, &c->err, &store));
    rc = into ? one_into(c, store, into) : all_of_store(c, store);
out:
    tv_store_close(store);
    return rc;
}

/* ---- directories --------------------------------------------------------- */

static enum tv_err of_dir(struct tvc *c, const char *dir)
{
    struct tvm_status s = {0};
    enum tv_err rc = TV_OK;
    json_t *const damped = json_array();
    json_t *stages = json_array();
    size_t n = 0;

    TV_TRY(tvm_status(dir, &s, &c->err));
    TV_TRY(each_stage(c, add_stage, stages, &n));
    /* Its first documents are being merged; OUT comes last. */
    const bool early = s.state == TVM_ABSENT && n > 0;
    if (early)
        s.state = TVM_UNFINISHED;
    if (c->out.json) {
        if (s.n_masks > 0)
            TV_TRY(tvm_status_damped(dir, add_damped, damped, &c->err));
        document(c, &s, json_incref(damped), json_incref(stages));
    } else {
        if (early)
            tvc_out(&c->out, "%s: unfinished, not begun itself\n", dir);
        else
            lines(c, dir, &s);
        TV_TRY(each_stage(c, print_stage, NULL, &n));
    }
    if (s.state == TVM_ABSENT) {
        rc = tv_error_set(&c->err, TV_E_NOTFOUND, "%s holds no merge", dir);
        tv_error_hint_path(&c->err, dir);
    }
out:
    json_decref(damped);
    json_decref(stages);
    return rc;
}

static bool holds(const char *dir, const char *name)
{
    char *const path = tv_path_join(dir, name);
    const bool yes = path && tv_path_exists(path);

    tv_free(path);
    return yes;
}

/* ---- the command --------------------------------------------------------- */

enum { KEY_STORE = 0x2000, KEY_INTO };

struct status_opts {
    const char *store, *into;
};

static const struct argp_option options[] = {
    {"store", KEY_STORE, "STORE", 0,
     "Show the unfinished merges of this store (default with --into: "
     "$TV_STORE)",
     0},
    {"into", KEY_INTO, "NAME", 0,
     "Show the merge into this object of the store, finished or not", 0},
    {0}};

static error_t option(struct tvc *c, int key, const char *arg)
{
    struct status_opts *o = c->opt;

    if (key == KEY_STORE)
        o->store = arg;
    else if (key == KEY_INTO)
        o->into = arg;
    else
        return ARGP_ERR_UNKNOWN;
    return 0;
}

static int run(struct tvc *c)
{
    const struct status_opts *o = c->opt;
    const char *const out = c->n_pos > 0 ? c->pos[0] : NULL;
    const char *store = o->store;
    enum tv_err rc = TV_OK;

    if (!store && (o->into || !out))
        store = out && o->into ? out : tvc_default_store();
    if (out && store && store != out)
        rc = tv_error_set(&c->err, TV_E_USAGE,
                          "OUT and --store exclude each other (of a merge into "
                          "an object: --into NAME --store STORE)");
    else if (!out && !store)
        rc = tv_error_set(&c->err, TV_E_USAGE,
                          o->into ? "--into needs --store STORE (or TV_STORE)"
                                  : "OUT or --store STORE is missing");
    else if (store || holds(out, "data.mdb"))
        rc = of_store(c, store ? store : out, o->into);
    else if (holds(out, TVC_COMPARE_STATE))
        rc = tvc_status_compare(c, out);
    else
        rc = of_dir(c, out);
    return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
}

const struct tvc_command tvc_cmd_status = {
    .name = "status",
    .summary = "how far an interrupted or running merge is",
    .args_doc = "OUT\n--store STORE [--into NAME]",
    .text =
        "Of a merge that is calibrated: masks made so far, and layers whose "
        "X^T X took\nmore damping than asked for (--json names them). "
        "Of a recipe of several\ndocuments: those that stand in OUT.stages. "
        "Of a comparison (compare -o OUT):\nwhat is merged, scored and still "
        "to be done. Of a store (OUT may be one): the\nunfinished merges into "
        "its objects, and into directories that read it. Exit\ncode 10 when "
        "there is no merge of this tool.",
    .examples = "tvmerge status ./merged\n"
                "tvmerge status ./merged --json\n"
                "tvmerge status --store models.tv\n"
                "tvmerge status --store models.tv --into merged",
    .options = options,
    .opt_bytes = sizeof(struct status_opts),
    .option = option,
    .min_pos = 0,
    .max_pos = 1,
    .run = run,
};
