/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_compare.c - tvmerge compare: several merges of one set of inputs, and
 * what each is worth.
 *
 *   OUT/NAME/               a merge, as tvmerge run makes it
 *   OUT/.tvcompare/         records of what is known (compare_records.c)
 *   OUT/.tvcompare/store    masks and task vectors that merges share, when no
 *                           store is given
 *   OUT/.tvcompare/lock     held while somebody works here
 *   OUT/compare.md, .json   the table, once everything is known
 *
 * compare_entries.c says what is compared, compare_run.c does it,
 * compare_report.c makes the table.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>

#include "compare.h"
#include "signals.h"
#include "store_open.h"
#include "tv/alloc.h"
#include "tv/cuda_math.h"
#include "tv/sys.h"
#include "tv/text.h"
#include "tveval.h"

/* ---- opening and closing ------------------------------------------------- */

enum tv_err tvc_compare_oom(struct tvc *c)
{
    return tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
}

static enum tv_err take_lock(struct tvc_compare *p)
{
    struct tvc *c = p->c;
    char *path = tv_path_join(p->state, "lock");

    if (!path)
        return tvc_compare_oom(c);
    p->lock = tv_sys()->open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    const int failed = errno;
    if (p->lock < 0) {
        const enum tv_err rc =
            tv_error_sys(&c->err, failed, "cannot open %s", path);
        tv_free(path);
        return rc;
    }
    tv_free(path);
    if (flock(p->lock, LOCK_EX | LOCK_NB) != 0)
        return tv_error_set(&c->err, TV_E_LOCKED,
                            "another comparison works on %s", p->opts->out);
    return TV_OK;
}

/* Merges are made and scored where --device says, as tvmerge run and tveval do
 * it. */
static enum tv_err choose_device(struct tvc_compare *p)
{
    struct tvc *c = p->c;
    struct tvm_options *m = &p->opts->options;

    /* A comparison is long, and goes on on the device it began with: not on one
     * that may be there or not. */
    if (c->device == TVC_DEVICE_AUTO)
        c->device = TVC_DEVICE_CPU;
    const enum tv_err rc = tvc_device_kernels(c, &m->kernels);
    if (rc != TV_OK)
        return rc;
    m->cuda = c->cuda;
    tvc_device_name(c, m->device, sizeof m->device);
    if (c->cuda)
        (void)tvk_cuda_math_core(c->cuda, p->device, sizeof p->device);
    return TV_OK;
}

/* ---- the whole ----------------------------------------------------------- */

static enum tv_err read_texts(struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    const struct compare_opts *o = p->opts;

    p->text = tv_calloc(o->n_texts, sizeof *p->text);
    p->text_bytes = tv_calloc(o->n_texts, sizeof *p->text_bytes);
    p->text_hash = tv_calloc(o->n_texts, sizeof *p->text_hash);
    if (!p->text || !p->text_bytes || !p->text_hash)
        return tvc_compare_oom(p->c);
    for (size_t i = 0; i < o->n_texts; i++) {
        rc = tv_file_read(o->texts[i], UINT64_C(1) << 34, &p->c->err,
                          &p->text[i], &p->text_bytes[i]);
        if (rc == TV_E_NOMEM)
            goto out;
        if (rc != TV_OK) { /* listed with whatever else is wrong */
            tvm_problem_add(&p->problems, true, rc, "--text", "%s",
                            p->c->err.msg);
            tv_error_clear(&p->c->err);
            rc = TV_OK;
            continue;
        }
        p->text_hash[i] = tv_hash128(p->text[i], p->text_bytes[i]);
    }
out:
    return rc;
}

/* Can the models be scored on the texts? With other problems it is one more. */
static enum tv_err check_models(struct tvc_compare *p)
{
    struct tv_error *err = &p->c->err;
    const bool others = p->problems.n_errors > 0;
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < p->opts->n_texts; i++)
        if (!p->text[i])
            return TV_OK;
    rc = tvc_compare_models(p);
    if (rc == TV_OK || !others || rc == TV_E_NOMEM || rc == TV_E_INTERRUPTED)
        return rc;
    tvm_problem_add(&p->problems, true, rc, "", "%s", err->msg);
    tv_error_clear(err);
    return TV_OK;
}

/* An OUT that holds something else is not ours to fill. */
static enum tv_err check_place(const struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;
    char **names = NULL;
    size_t n = 0;

    if (!tv_path_exists(p->opts->out) || tv_path_is_dir(p->state))
        goto out;
    TV_TRY(tv_dir_list(p->opts->out, &c->err, &names, &n));
    if (n > 0) {
        rc = tv_error_set(&c->err, TV_E_EXISTS,
                          "%s is not empty and no comparison (it holds %s)",
                          p->opts->out, names[0]);
        tv_error_hint(&c->err, "give another directory");
    }
out:
    tv_dir_list_free(names, n);
    return rc;
}

/* A store from the environment that is not there is no fault of a command line
 * that does not name it. */
static enum tv_err open_store(struct tvc_compare *p)
{
    struct tvc *c = p->c;
    struct compare_opts *o = p->opts;

    if (!o->store_path)
        return TV_OK;
    const enum tv_err rc =
        tvc_store_open(c, o->store_path, false, &c->err, &o->options.store);
    if (rc != TV_E_NOTFOUND || o->store_given)
        return rc;
    tvc_warn(&c->out, "TV_STORE: %s", c->err.msg);
    tv_error_clear(&c->err);
    return TV_OK;
}

/* Without a given store, one of our own: what one merge finds out of a task
 * vector serves the next. What is in it can all be found again, so one that
 * cannot be read is begun anew. Under a quota there is none: room belongs to
 * the merges then. */
static enum tv_err open_shared(struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;
    struct tvm_options *m = &p->opts->options;
    char *path = NULL;

    if (m->store || m->no_cache || m->quota_bytes > 0)
        return TV_OK;
    path = tv_path_join(p->state, "store");
    if (!path)
        return tvc_compare_oom(c);
    if (tv_path_exists(path)) {
        rc = tvc_store_open(c, path, false, &c->err, &p->shared);
        if (rc == TV_OK || rc == TV_E_NOMEM || rc == TV_E_LOCKED)
            goto out;
        tv_error_clear(&c->err);
        TV_TRY(tv_dir_remove(path, &c->err));
    }
    TV_TRY(tv_store_create(path, 0, &c->err));
    rc = tvc_store_open(c, path, false, &c->err, &p->shared);
out:
    m->store = p->shared;
    tv_free(path);
    return rc;
}

static enum tv_err begin(struct tvc_compare *p)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;
    struct compare_opts *o = p->opts;
    struct tvm_options *m = &o->options;

    p->lock = -1;
    p->state = tv_path_join(o->out, TVC_COMPARE_STATE);
    if (!p->state)
        return tvc_compare_oom(c);
    m->memory_bytes = c->memory_bytes;
    m->threads = tvc_threads(c);
    TV_TRY(choose_device(p));
    m->texts = o->tasks;
    m->n_texts = o->n_tasks;
    TV_TRY(read_texts(p));
    TV_TRY(open_store(p));
    TV_TRY(check_place(p));
    TV_TRY(tvc_compare_collect(p));
    TV_TRY(check_models(p));
    if (p->problems.n_errors > 0)
        goto out;
    TV_TRY(tv_dir_make(p->state, &c->err));
    TV_TRY(take_lock(p));
    TV_TRY(open_shared(p));
    TV_TRY(tvc_records_list(p));
    for (size_t i = 0; i < p->n_entries; i++)
        TV_TRY(tvc_record_load(p, &p->entries[i]));
out:
    return rc;
}

static void finish(struct tvc_compare *p)
{
    for (size_t i = 0; i < p->n_entries; i++) {
        struct entry *e = &p->entries[i];
        tv_free(e->name);
        tv_free(e->dir);
        tv_free(e->ref);
        tv_free(e->method);
        json_decref(e->record);
    }
    tv_free(p->entries);
    for (size_t i = 0; p->text && i < p->opts->n_texts; i++)
        tv_free(p->text[i]);
    tv_free(p->text);
    tv_free(p->text_bytes);
    tv_free(p->text_hash);
    tvc_compare_ids_free(p);
    tv_free(p->base);
    tv_free(p->state);
    if (p->lock >= 0)
        (void)tv_sys()->close(p->lock);
    tvm_problems_free(&p->problems);
    tv_store_close(p->opts->options.store);
}

static int run(struct tvc *c)
{
    struct compare_opts *o = c->opt;
    struct tvc_compare p = {.c = c, .opts = o, .lock = -1};
    enum tv_err rc = TV_OK;
    int status = 0;

    tvm_problems_init(&p.problems);
    TV_TRY(tvc_compare_check(c));
    TV_TRY(begin(&p));
    tvc_problems_print(c, &p.problems, false);
    if (p.problems.n_errors > 0) {
        status = tvc_problems_fail(c, &p.problems);
        goto out;
    }
    tvc_say(&c->out, "%zu entries on %zu text%s -> %s", p.n_entries, o->n_texts,
            o->n_texts == 1 ? "" : "s", o->out);
    TV_TRY(tvc_compare_all(&p));
    if (p.oom) {
        rc = tvc_compare_oom(c);
        goto out;
    }
    TV_TRY(tvc_compare_report(&p, tvc_compare_best(&p)));
out:
    if (rc == TV_E_INTERRUPTED)
        status = tvc_interrupted(c);
    else if (rc != TV_OK)
        status = tvc_fail(c, &c->err);
    else if (status == 0)
        status = tvc_done(c, 0);
    finish(&p);
    return status;
}

const struct tvc_command tvc_cmd_compare = {
    .name = "compare",
    .summary = "merge by several methods or recipes, and score each",
    .args_doc = "RECIPE... -o OUT --text FILE",
    .text =
        "One RECIPE is merged by every method of --methods (default: "
        "ties,dare_ties,\nsparsegpt_ties); several are merged as they are "
        "written. Each merge goes to\nOUT/<merge>_<sparsify>, and with the "
        "base, every model and plain task\narithmetic it is scored on every "
        "text. The table, in Markdown, is printed and\nkept in "
        "OUT/compare.md, as JSON in OUT/compare.json. Continues after any\n"
        "interruption when repeated; what is known is not done again.",
    .examples =
        "tvmerge compare recipe.yml -o cmp --text prose.txt --text code.txt\n"
        "tvmerge compare recipe.yml -o cmp --text a.txt --methods "
        "ties,tsv,iso_c --keep best\n"
        "tvmerge compare recipe.yml -o cmp --text a.txt --text "
        "ft-code=code.txt\n"
        "tvmerge compare one.yml two.yml -o cmp --text a.txt --json",
    .options = tvc_compare_options,
    .opt_bytes = sizeof(struct compare_opts),
    .init = tvc_compare_init,
    .option = tvc_compare_option,
    .min_pos = 1,
    .max_pos = 64,
    .cancellable = true,
    .run = run,
};
