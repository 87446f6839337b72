/* SPDX-License-Identifier: Apache-2.0 */
/*
 * status.c - how far a merge into a directory or a store is, from its journal
 * or its record. Only reads; a run in another process is not disturbed.
 */
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>

#include "calibration_state.h"
#include "pins.h"
#include "sink.h"
#include "state.h"
#include "tv/alloc.h"
#include "tv/merge.h"
#include "tv/sys.h"

#define RECORD_MAX (64u << 20)

static bool is_locked(const char *dir)
{
    char *path = tv_path_join(dir, "lock");
    const int fd = path ? tv_sys()->open(path, O_RDONLY, 0) : -1;
    const bool yes = fd >= 0 && flock(fd, LOCK_SH | LOCK_NB) != 0;

    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_free(path);
    return yes;
}

struct damped { /* who wants to hear of them; NULL: nobody */
    void (*fn)(void *arg, const struct tvm_damped *d);
    void *arg;
};

static enum tv_err read_calibration(const char *text, struct tvm_status *out,
                                    const struct damped *to,
                                    struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_calibration_state s;

    TV_TRY(tvm_calibration_state_parse(text, &s, err));
    out->n_masks = s.n_masks;
    out->n_masks_made = s.n_made;
    out->random = s.random;
    for (size_t i = 0; i < s.n_damped; i++) {
        const struct tvm_damped *d = &s.damped[i];
        out->n_damped += d->damping > 0;
        out->n_uncorrected += !(d->damping > 0);
        if (d->damping > out->most_damping)
            out->most_damping = d->damping;
        if (to)
            to->fn(to->arg, d);
    }
    tvm_calibration_state_free(&s);
out:
    return rc;
}

/* A run of a journal; ABSENT is left where there is none of that name. */
static enum tv_err read_run(tv_read *r, const char *run, struct tvm_status *out,
                            const struct damped *to, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_state state = {.n_tensors = 0};
    struct tv_done_list *list = NULL;
    char *text = NULL;
    size_t n = 0;
    bool found = false;

    TV_TRY(tv_run_get(r, run, &found, &text, &n, err));
    if (!found)
        goto out;
    TV_TRY(tvm_state_parse(text, n, &state, err));
    TV_TRY(tv_done_list(r, run, err, &list));
    out->state = TVM_UNFINISHED;
    out->plan_hash = state.plan_hash;
    out->n_tensors = (size_t)state.n_tensors;
    out->bytes_total = state.bytes_total;
    out->device = state.device;
    out->n_done = list->n;
    for (size_t i = 0; i < list->n; i++)
        out->bytes_done += list->items[i].bytes;
    TV_TRY(read_calibration(state.calibration, out, to, err));
out:
    tvm_state_free(&state);
    tv_done_list_free(list);
    tv_free(text);
    return rc;
}

static enum tv_err read_journal(const char *path, struct tvm_status *out,
                                const struct damped *to, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_store_options opt = {.read_only = true};
    tv_store *store = NULL;
    tv_read *r = NULL;

    TV_TRY(tv_store_open(path, &opt, err, &store));
    TV_TRY(tv_read_begin(store, err, &r));
    rc = read_run(r, "run", out, to, err);
out:
    tv_read_end(r);
    tv_store_close(store);
    return rc;
}

static enum tv_err take_record(const struct tvm_record *record,
                               struct tvm_status *out, const struct damped *to,
                               struct tv_error *err)
{
    out->state = TVM_FINISHED;
    out->plan_hash = record->plan_hash;
    out->digest = record->totals.digest;
    out->device = record->device;
    out->n_done = out->n_tensors = (size_t)record->n_tensors;
    out->bytes_done = out->bytes_total = record->bytes_total;
    return read_calibration(record->calibration, out, to, err);
}

/* config.json is what a merge adds last: killed just before it, the same
 * command goes on, and nobody may take what is there for a model. */
static enum tv_err lacks_config(const char *out_dir,
                                const struct tvm_record *record, bool *lacks,
                                struct tv_error *err)
{
    char *path = NULL;

    *lacks = false;
    for (size_t i = 0; i < record->n_files; i++)
        *lacks = *lacks || strcmp(record->files[i].name, "config.json") == 0;
    if (!*lacks)
        return TV_OK;
    path = tv_path_join(out_dir, "config.json");
    if (!path)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    *lacks = !tv_path_exists(path);
    tv_free(path);
    return TV_OK;
}

static enum tv_err read_record(const char *out_dir, const char *path,
                               struct tvm_status *out, const struct damped *to,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_record record = {.n_files = 0};
    char *text = NULL;
    size_t n = 0;
    bool lacks = false;

    TV_TRY(tv_file_read(path, RECORD_MAX, err, &text, &n));
    rc = tvm_record_parse(text, n, &record, err);
    if (rc != TV_OK) {
        tv_error_context(err, "%s", path);
        goto out;
    }
    TV_TRY(lacks_config(out_dir, &record, &lacks, err));
    TV_TRY(take_record(&record, out, to, err));
    if (lacks)
        out->state = TVM_UNFINISHED;
out:
    tvm_record_free(&record);
    tv_free(text);
    return rc;
}

static enum tv_err look(const char *out_dir, struct tvm_status *out,
                        const struct damped *to, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *dir = tv_path_join(out_dir, ".tvmerge");
    char *record = tv_path_join(out_dir, "tvmerge.json");
    char *journal = dir ? tv_path_join(dir, "journal") : NULL;

    memset(out, 0, sizeof *out);
    if (!dir || !record || !journal) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    out->running = is_locked(dir);
    if (tv_path_exists(record)) {
        rc = read_record(out_dir, record, out, to, err);
        goto out;
    }
    if (!tv_path_exists(dir))
        goto out;
    out->state = TVM_UNFINISHED;
    if (tv_path_exists(journal))
        rc = read_journal(journal, out, to, err);
out:
    tv_free(journal);
    tv_free(record);
    tv_free(dir);
    return rc;
}

enum tv_err tvm_status(const char *out_dir, struct tvm_status *out,
                       struct tv_error *err)
{
    return look(out_dir, out, NULL, err);
}

enum tv_err tvm_status_damped(const char *out_dir,
                              void (*fn)(void *arg, const struct tvm_damped *d),
                              void *arg, struct tv_error *err)
{
    const struct damped to = {fn, arg};
    struct tvm_status status;

    return look(out_dir, &status, &to, err);
}

/* ---- stores ---------------------------------------------------------------
 */

/* Is the merge into that object the one that holds the lock of the store? */
static bool is_at_work(const tv_store *store, const char *name)
{
    char holder[256];
    char purpose[TVM_PURPOSE_MAX];
    size_t n = 0;

    tvm_into_purpose(name, purpose);
    n = strlen(purpose);
    return tv_store_lock_holder(store, holder, sizeof holder) &&
           strncmp(holder, purpose, n) == 0 &&
           (holder[n] == '\0' || holder[n] == ' ');
}

enum tv_err tvm_status_into(tv_store *store, const char *name,
                            struct tvm_status *out,
                            void (*fn)(void *arg, const struct tvm_damped *d),
                            void *arg, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct damped to = {fn, arg};
    const struct damped *const hears = fn ? &to : NULL;
    struct tvm_record record = {.n_files = 0};
    struct tv_object *o = NULL;
    tv_read *r = NULL;
    bool found = false;

    memset(out, 0, sizeof *out);
    out->running = is_at_work(store, name);
    TV_TRY(tv_read_begin(store, err, &r));
    TV_TRY(read_run(r, name, out, hears, err));
    if (out->state != TVM_ABSENT)
        goto out;
    rc = tv_object_find(r, name, false, err, &o);
    if (rc == TV_E_NOTFOUND) {
        tv_error_clear(err);
        rc = TV_OK;
        goto out;
    }
    TV_TRY(rc);
    TV_TRY(tvm_record_of(r, o, &found, &record, err));
    if (found)
        rc = take_record(&record, out, hears, err);
out:
    tvm_record_free(&record);
    tv_object_free(o);
    tv_read_end(r);
    return rc;
}

static enum tv_err each_run(tv_store *store, tv_read *r, const char *run,
                            tvm_status_fn fn, void *arg, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_status s = {.state = TVM_ABSENT};
    char *dir = NULL;

    if (run[0] == '/') {
        TV_TRY(tvm_pins_dir(r, run, &s, &dir, err));
        if (dir && s.state == TVM_UNFINISHED)
            fn(arg, dir, true, &s);
        goto out;
    }
    s.running = is_at_work(store, run);
    TV_TRY(read_run(r, run, &s, NULL, err));
    if (s.state == TVM_UNFINISHED)
        fn(arg, run, false, &s);
out:
    tv_free(dir);
    return rc;
}

enum tv_err tvm_status_store(tv_store *store, tvm_status_fn fn, void *arg,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_read *r = NULL;
    char **runs = NULL;
    size_t n = 0;

    TV_TRY(tv_read_begin(store, err, &r));
    TV_TRY(tv_run_list(r, err, &runs, &n));
    for (size_t i = 0; i < n; i++)
        TV_TRY(each_run(store, r, runs[i], fn, arg, err));
out:
    tv_dir_list_free(runs, n);
    tv_read_end(r);
    return rc;
}
