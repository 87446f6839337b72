/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pins.c - keeps the stored inputs of unfinished merges, and lets go of them.
 *
 * A merge into an object pins under the object's name, which the store drops
 * together with the object. A merge into a directory is a run of the store its
 * inputs come from: the id is the directory's path, which no object name can
 * be (it begins with '/') and which tells people what holds their object. Its
 * journal is in the directory, so the pin is worth something for as long as
 * the journal of that very plan is there, or somebody is at work; nobody needs
 * to clean up after kill -9.
 */
#include "pins.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <jansson.h>

#include "state.h"
#include "tv/alloc.h"

#define ID_PATH_MAX 120u /* longer paths are cut; a run id has 128 bytes */
#define ID_TAIL     80u
#define SCHEMA      "tvmerge.pins/1"

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory");
}

static char *run_id(const char *path)
{
    const size_t n = strlen(path);
    char hex[33];

    if (n <= ID_PATH_MAX)
        return tv_strdup(path);
    return tv_asprintf("/%s...%s", tv_hash_hex(tv_hash128(path, n), hex),
                       path + n - ID_TAIL);
}

static enum tv_err add_input(tv_batch *b, const char *run, const tv_input *in,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    if (!in || !tv_input_is_store(in))
        return TV_OK;
    rc = tv_pin_put(b, run, tv_input_object_id(in), err);
    if (rc != TV_OK)
        tv_error_context(err, "%s", tv_input_label(in));
    return rc;
}

enum tv_err tvm_pins_add(tv_batch *b, const char *run, const struct tvm_plan *p,
                         struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < p->n_inputs; i++) {
        const struct tvm_plan_input *in = &p->inputs[i];
        TV_TRY(add_input(b, run, in->input, err));
        for (size_t a = 0; a < in->n_adapters; a++)
            TV_TRY(add_input(b, run, tv_adapter_input(in->adapters[a]), err));
    }
out:
    return rc;
}

static bool reads_store(const struct tvm_plan *p)
{
    for (size_t i = 0; i < p->n_inputs; i++) {
        const struct tvm_plan_input *in = &p->inputs[i];
        if (in->input && tv_input_is_store(in->input))
            return true;
        for (size_t a = 0; a < in->n_adapters; a++)
            if (tv_input_is_store(tv_adapter_input(in->adapters[a])))
                return true;
    }
    return false;
}

/* ---- merges into directories ----------------------------------------------
 */

/* Owned (tv_free), NULL when out of memory. */
static char *state_make(const struct tvm_plan *p, const char *path)
{
    char hex[33];
    char *text = NULL;
    json_t *doc = json_pack("{s:s, s:s%, s:I, s:s}", "schema", SCHEMA, "out",
                            path, strlen(path), "pid", (json_int_t)getpid(),
                            "plan_hash", tv_hash_hex(p->hash, hex));

    /* A path need not be UTF-8; such a one is told by its id alone and its pin
     * stays until the run ends. */
    if (!doc)
        doc = json_pack("{s:s, s:I}", "schema", SCHEMA, "pid",
                        (json_int_t)getpid());
    if (doc)
        text = tv_json_text(doc, JSON_COMPACT);
    json_decref(doc);
    return text;
}

enum tv_err tvm_pins_put(const struct tvm_plan *p, const char *out,
                         struct tv_error *err, char **run)
{
    enum tv_err rc = TV_OK;
    tv_store *store = p->options.store;
    tv_batch *b = NULL;
    char path[PATH_MAX];
    char *id = NULL;
    char *text = NULL;
    bool locked = false;

    *run = NULL;
    if (!store || tv_store_is_read_only(store) || !reads_store(p))
        return TV_OK;
    if (!realpath(out, path)) {
        rc = tv_error_sys(err, errno, "cannot resolve %s", out);
        goto out;
    }
    id = run_id(path);
    text = id ? state_make(p, path) : NULL;
    if (!text) {
        rc = no_memory(err);
        goto out;
    }
    /* A merge into a directory only reads the store, and readers never wait:
     * while another process writes, it goes on without pins. */
    if (tv_store_lock(store, "tvmerge run", 0, NULL) != TV_OK)
        goto out;
    locked = true;
    TV_TRY(tv_batch_begin(store, !p->options.sync, err, &b));
    TV_TRY(tv_run_drop(b, id, err));
    TV_TRY(tv_run_put(b, id, text, strlen(text), err));
    TV_TRY(tvm_pins_add(b, id, p, err));
    rc = tv_batch_commit(b, err);
    b = NULL;
    TV_TRY(rc);
    *run = id;
    id = NULL;
out:
    tv_batch_abort(b);
    if (locked)
        tv_store_unlock(store);
    tv_free(text);
    tv_free(id);
    return rc;
}

enum tv_err tvm_pins_drop(tv_store *store, const char *run,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;

    /* As above; a pin that stays is stale and goes with the next sweep. */
    if (tv_store_lock(store, "tvmerge run", 0, NULL) != TV_OK)
        return TV_OK;
    TV_TRY(tv_batch_begin(store, false, err, &b));
    TV_TRY(tv_run_drop(b, run, err));
    rc = tv_batch_commit(b, err);
    b = NULL;
out:
    tv_batch_abort(b);
    tv_store_unlock(store);
    return rc;
}

/* ---- sweeping --------------------------------------------------------------
 */

/* What the directory of a run holds now, and whether that is the merge that the
 * run was put for. False: it cannot be told. *dir (owned) may be NULL. */
static bool dir_look(const char *text, size_t n, char **dir,
                     struct tvm_status *status, bool *same)
{
    json_t *doc = NULL;
    struct tv_hash hash = {0, 0};
    bool told = false;

    if (tv_json_parse(text, n, "run", NULL, &doc) != TV_OK)
        return false;
    const char *out = json_string_value(json_object_get(doc, "out"));
    const char *hex = json_string_value(json_object_get(doc, "plan_hash"));
    if (out && hex && tv_hash_from_hex(hex, &hash) == 0 &&
        tvm_status(out, status, NULL) == TV_OK) {
        told = true;
        *same = tv_hash_equal(status->plan_hash, hash);
        if (dir)
            *dir = tv_strdup(out);
    }
    json_decref(doc);
    return told;
}

/* Does the directory still hold the merge that the run was put for? Whatever
 * cannot be told counts as yes. */
static bool dir_lives(const char *text, size_t n)
{
    struct tvm_status status;
    bool same = false;

    return !dir_look(text, n, NULL, &status, &same) || status.running ||
           (status.state == TVM_UNFINISHED && same);
}

enum tv_err tvm_pins_dir(tv_read *r, const char *run, struct tvm_status *status,
                         char **dir, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *text = NULL;
    size_t n = 0;
    bool found = false;
    bool same = false;

    *dir = NULL;
    TV_TRY(tv_run_get(r, run, &found, &text, &n, err));
    if (found && dir_look(text, n, dir, status, &same) && !same) {
        tv_free(*dir);
        *dir = NULL;
    }
out:
    tv_free(text);
    return rc;
}

static bool object_lives(struct tv_object *const *list, size_t n,
                         const char *name)
{
    for (size_t i = 0; i < n; i++)
        if (!list[i]->complete && strcmp(list[i]->name, name) == 0)
            return true;
    return false;
}

static enum tv_err sweep_run(tv_batch *b, tv_read *r, const char *run,
                             struct tv_object *const *list, size_t n_list,
                             bool *dropped, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *text = NULL;
    size_t n = 0;
    bool found = false;

    TV_TRY(tv_run_get(r, run, &found, &text, &n, err));
    if (!found ||
        (run[0] == '/' ? dir_lives(text, n) : object_lives(list, n_list, run)))
        goto out;
    TV_TRY(tv_run_drop(b, run, err));
    *dropped = true;
out:
    tv_free(text);
    return rc;
}

enum tv_err tvm_runs_sweep(tv_store *store, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_batch *b = NULL;
    tv_read *r = NULL;
    char **runs = NULL;
    size_t n_runs = 0;
    struct tv_object **list = NULL;
    size_t n_list = 0;
    bool dropped = false;

    TV_TRY(tv_read_begin(store, err, &r));
    TV_TRY(tv_run_list(r, err, &runs, &n_runs));
    if (n_runs == 0)
        goto out;
    tv_dir_list_free(runs, n_runs);
    runs = NULL;
    n_runs = 0;
    /* Looked at inside a batch: nobody puts a run meanwhile that is dropped by
     * what was true before. */
    TV_TRY(tv_batch_begin(store, false, err, &b));
    TV_TRY(tv_read_renew(r, err));
    TV_TRY(tv_run_list(r, err, &runs, &n_runs));
    TV_TRY(tv_object_list(r, true, err, &list, &n_list));
    for (size_t i = 0; i < n_runs; i++)
        TV_TRY(sweep_run(b, r, runs[i], list, n_list, &dropped, err));
    if (dropped) {
        rc = tv_batch_commit(b, err);
        b = NULL;
    }
out:
    tv_batch_abort(b);
    for (size_t i = 0; i < n_list; i++)
        tv_object_free(list[i]);
    tv_free(list);
    tv_dir_list_free(runs, n_runs);
    tv_read_end(r);
    return rc;
}
