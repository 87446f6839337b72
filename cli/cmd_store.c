/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_store.c - tvstore init, stat, quota, rm, gc: the store as a whole.
 */
#include <errno.h>
#include <inttypes.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "store_open.h"
#include "tv/derived.h"
#include "tv/merge.h"
#include "tv/text.h"
#include "tvstore.h"

struct opts {
    uint64_t quota_bytes;
    unsigned lock_timeout_ms;
    bool derived;
};

enum { KEY_QUOTA = 0x2000, KEY_LOCK_TIMEOUT, KEY_DERIVED };

static void opts_init(struct tvc *c)
{
    struct opts *o = c->opt;
    *o = (struct opts){.lock_timeout_ms = 10000};
}

static error_t opts_option(struct tvc *c, int key, const char *arg)
{
    struct opts *o = c->opt;
    switch (key) {
    case KEY_QUOTA:
        return tvc_parse_quota(c, "--quota", arg, &o->quota_bytes);
    case KEY_DERIVED:
        o->derived = true;
        return 0;
    case KEY_LOCK_TIMEOUT:
        return tvc_parse_ms(c, "--lock-timeout", arg, &o->lock_timeout_ms);
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

static const struct argp_option lock_options[] = {
    {"lock-timeout", KEY_LOCK_TIMEOUT, "SECONDS", 0,
     "How long to wait for another writer (default: 10)", 0},
    {0}};

static const char *quota_text(uint64_t bytes, char *dst, size_t cap)
{
    return bytes ? tv_format_bytes(bytes, dst, cap) : "none";
}

/* ---- init
 * -------------------------------------------------------------------- */

static int run_init(struct tvc *c)
{
    const struct opts *o = c->opt;
    char text[32];
    if (tv_store_create(c->pos[0], o->quota_bytes, &c->err) != TV_OK)
        return tvc_fail(c, &c->err);
    if (c->out.json)
        tvc_out_json(&c->out,
                     json_pack("{s:s, s:o, s:o}", "schema", "tvstore.init/1",
                               "store", tvc_json_string(c->pos[0]),
                               "quota_bytes", tvc_json_u64(o->quota_bytes)));
    else
        tvc_say(&c->out, "created store %s (quota: %s)", c->pos[0],
                quota_text(o->quota_bytes, text, sizeof text));
    return tvc_done(c, 0);
}

static const struct argp_option init_options[] = {
    {"quota", KEY_QUOTA, "SIZE", 0,
     "Most bytes the store may take on disk (default, 0 and none: no limit)",
     0},
    {0}};

const struct tvc_command tvc_cmd_init = {
    .name = "init",
    .summary = "create an empty store",
    .args_doc = "STORE",
    .examples = "tvstore init models.tv\n"
                "tvstore init models.tv --quota 50GB",
    .options = init_options,
    .opt_bytes = sizeof(struct opts),
    .init = opts_init,
    .option = opts_option,
    .min_pos = 1,
    .max_pos = 1,
    .run = run_init,
};

/* ---- stat
 * -------------------------------------------------------------------- */

static void stat_row(struct tvc_table *t, const char *name, uint64_t bytes)
{
    char human[32];
    char exact[32];
    tvc_table_cell(t, "%s", name);
    tvc_table_cell(t, "%s", tv_format_bytes(bytes, human, sizeof human));
    tvc_table_cell(t, "%s", tvc_count(bytes, exact, sizeof exact));
}

static enum tv_err stat_table(struct tvc *c, const struct tv_store_stat *s)
{
    static const char *const headers[] = {"WHAT", "SIZE", "BYTES"};
    struct tvc_table t;
    tvc_table_begin(&t, "lrr", headers);
    if (s->quota_bytes) {
        stat_row(&t, "quota", s->quota_bytes);
    } else {
        tvc_table_cell(&t, "quota");
        tvc_table_cell(&t, "none");
        tvc_table_cell(&t, "-");
    }
    stat_row(&t, "used", s->used_bytes);
    stat_row(&t, "data file", s->file_bytes);
    stat_row(&t, "  weights", s->weights);
    stat_row(&t, "  adapters", s->adapters);
    stat_row(&t, "  masks", s->masks);
    stat_row(&t, "  statistics", s->statistics);
    stat_row(&t, "  task vectors", s->task_vectors);
    stat_row(&t, "  outputs", s->outputs);
    stat_row(&t, "  journal", s->journal);
    stat_row(&t, "  free", s->free_bytes);
    stat_row(&t, "saved by sharing", s->dedup_saved_bytes);
    if (s->charged_bytes)
        stat_row(&t, "outputs and scratch files", s->charged_bytes);
    return tvc_table_end(&c->out, &t, &c->err);
}

static int run_stat(struct tvc *c)
{
    struct tv_store_stat s = {0};
    tv_store *store = NULL;
    enum tv_err rc = TV_OK;

    TV_TRY(tvc_store_open(c, c->pos[0], true, &c->err, &store));
    TV_TRY(tv_store_stat(store, &s, &c->err));
    if (!c->out.json) {
        rc = stat_table(c, &s);
        goto out;
    }
    json_t *kinds = json_pack(
        "{s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "weights",
        tvc_json_u64(s.weights), "adapters", tvc_json_u64(s.adapters), "masks",
        tvc_json_u64(s.masks), "statistics", tvc_json_u64(s.statistics),
        "task_vectors", tvc_json_u64(s.task_vectors), "outputs",
        tvc_json_u64(s.outputs), "journal", tvc_json_u64(s.journal), "free",
        tvc_json_u64(s.free_bytes));
    tvc_out_json(&c->out,
                 json_pack("{s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, "
                           "s:o, s:o, s:o}",
                           "schema", "tvstore.stat/1", "quota_bytes",
                           tvc_json_u64(s.quota_bytes), "used_bytes",
                           tvc_json_u64(s.used_bytes), "file_bytes",
                           tvc_json_u64(s.file_bytes), "kinds", kinds,
                           "dedup_saved_bytes",
                           tvc_json_u64(s.dedup_saved_bytes), "n_objects",
                           tvc_json_u64(s.n_objects), "n_masks",
                           tvc_json_u64(s.n_masks), "n_task_vectors",
                           tvc_json_u64(s.n_task_vectors), "n_statistics",
                           tvc_json_u64(s.n_statistics), "reserved_bytes",
                           tvc_json_u64(s.charged_bytes)));
out:
    tv_store_close(store);
    return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
}

const struct tvc_command tvc_cmd_stat = {
    .name = "stat",
    .summary = "show quota, bytes by kind and what sharing saves",
    .args_doc = "STORE",
    .examples = "tvstore stat models.tv\n"
                "tvstore stat models.tv --json",
    .min_pos = 1,
    .max_pos = 1,
    .run = run_stat,
};

/* ---- quota
 * ------------------------------------------------------------------- */

static int run_quota(struct tvc *c)
{
    const struct opts *o = c->opt;
    struct tv_store_stat s = {0};
    tv_store *store = NULL;
    enum tv_err rc = TV_OK;
    bool locked = false;
    uint64_t bytes = 0;
    char quota[32];
    char used[32];
    const bool set = c->n_pos > 1;

    if (set && tvc_parse_quota(c, "SIZE", c->pos[1], &bytes) != 0)
        return tvc_fail(c, &c->err);
    TV_TRY(tvc_store_open(c, c->pos[0], !set, &c->err, &store));
    if (set) {
        TV_TRY(tv_store_lock(store, "quota", o->lock_timeout_ms, &c->err));
        locked = true;
        TV_TRY(tv_store_quota_set(store, bytes, &c->err));
    }
    TV_TRY(tv_store_quota_get(store, &bytes, &c->err));
    TV_TRY(tv_store_stat(store, &s, &c->err));
    if (c->out.json)
        tvc_out_json(&c->out,
                     json_pack("{s:s, s:o, s:o}", "schema", "tvstore.quota/1",
                               "quota_bytes", tvc_json_u64(bytes), "used_bytes",
                               tvc_json_u64(s.used_bytes)));
    else
        tvc_out(&c->out, "quota %s, used %s\n",
                quota_text(bytes, quota, sizeof quota),
                tv_format_bytes(s.used_bytes, used, sizeof used));
out:
    if (locked)
        tv_store_unlock(store);
    tv_store_close(store);
    return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
}

const struct tvc_command tvc_cmd_quota = {
    .name = "quota",
    .summary = "show or set the hard quota",
    .args_doc = "STORE [SIZE]",
    .text =
        "The quota bounds what the store takes on disk. 'none' (or 0) is no "
        "limit.",
    .examples = "tvstore quota models.tv\n"
                "tvstore quota models.tv 18GB",
    .options = lock_options,
    .opt_bytes = sizeof(struct opts),
    .init = opts_init,
    .option = opts_option,
    .min_pos = 1,
    .max_pos = 2,
    .run = run_quota,
};

/* ---- rm
 * ---------------------------------------------------------------------- */

static enum tv_err remove_object(tv_store *store, const char *name,
                                 struct tv_error *err)
{
    bool more = true;
    for (bool first = true; more; first = false) {
        tv_batch *b = NULL;
        enum tv_err rc = tv_batch_begin(store, false, err, &b);
        if (rc == TV_OK) {
            rc = tv_object_remove(b, name, &more, err);
            if (rc == TV_OK)
                rc = tv_batch_commit(b, err);
            else
                tv_batch_abort(b);
        }
        if (rc == TV_E_NOTFOUND && !first) {
            /* The commit before has already freed what was left. */
            tv_error_clear(err);
            return TV_OK;
        }
        if (rc != TV_OK)
            return rc;
    }
    return TV_OK;
}

static int run_rm(struct tvc *c)
{
    const struct opts *o = c->opt;
    tv_store *store = NULL;
    enum tv_err rc = TV_OK;
    bool locked = false;

    TV_TRY(tvc_store_open(c, c->pos[0], false, &c->err, &store));
    TV_TRY(tv_store_lock(store, "rm", o->lock_timeout_ms, &c->err));
    locked = true;
    TV_TRY(tvm_runs_sweep(store, &c->err));
    TV_TRY(remove_object(store, c->pos[1], &c->err));
    if (c->out.json)
        tvc_out_json(&c->out, json_pack("{s:s, s:o}", "schema", "tvstore.rm/1",
                                        "name", tvc_json_string(c->pos[1])));
    else
        tvc_say(&c->out, "removed %s", c->pos[1]);
out:
    if (locked)
        tv_store_unlock(store);
    tv_store_close(store);
    return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
}

const struct tvc_command tvc_cmd_rm = {
    .name = "rm",
    .summary = "remove an object",
    .args_doc = "STORE NAME",
    .text = "Bytes shared with other objects stay. An object that a running "
            "or\nunfinished merge reads is refused.",
    .examples = "tvstore rm models.tv old-merge",
    .options = lock_options,
    .opt_bytes = sizeof(struct opts),
    .init = opts_init,
    .option = opts_option,
    .min_pos = 2,
    .max_pos = 2,
    .run = run_rm,
};

/* ---- gc
 * ---------------------------------------------------------------------- */

struct gc_result { /* what the child says */
    enum tv_err rc;
    struct tv_error err;
    uint64_t freed, n_evicted;
};

static enum tv_err gc_work(struct tvc *c, struct gc_result *r)
{
    const struct opts *o = c->opt;
    tv_store *store = NULL;
    enum tv_err rc = TV_OK;
    bool locked = false;
    struct tv_error *err = &r->err;
    struct tv_store_stat before = {0};
    struct tv_store_stat after = {0};

    TV_TRY(tvc_store_open(c, c->pos[0], false, err, &store));
    TV_TRY(tv_store_lock(store, "gc", o->lock_timeout_ms, err));
    locked = true;
    TV_TRY(tv_store_check_trees(store, err));
    TV_TRY(tv_store_stat(store, &before, err));
    if (o->derived)
        TV_TRY(tv_derived_evict_all(store, &r->n_evicted, err));
    TV_TRY(tvm_runs_sweep(store, err));
    TV_TRY(tv_store_gc(store, &r->freed, err));
    TV_TRY(tv_store_stat(store, &after, err));
    /* Together: gc alone does not see what was evicted before it. */
    if (after.free_bytes > before.free_bytes + r->freed)
        r->freed = after.free_bytes - before.free_bytes;
out:
    if (locked)
        tv_store_unlock(store);
    tv_store_close(store);
    return rc;
}

/* gc walks and changes every tree, and LMDB's pages have no checksums: a
 * damaged one can end the process that touches it. That one is a child; what it
 * had not committed is as if it never was. */
static enum tv_err gc_in_child(struct tvc *c, struct gc_result *out)
{
    struct gc_result r;
    int fds[2] = {-1, -1};
    int status = 0;
    memset(&r, 0, sizeof r);
    if (pipe(fds) != 0)
        return tv_error_sys(&c->err, errno, "cannot make a pipe");
    const pid_t pid = fork();
    if (pid == 0) {
        (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
        (void)signal(SIGBUS, SIG_DFL);
        (void)close(fds[0]);
        tv_error_clear(&r.err);
        r.rc = gc_work(c, &r);
        _exit(write(fds[1], &r, sizeof r) == (ssize_t)sizeof r ? 0 : 1);
    }
    const int fork_errno = errno;
    (void)close(fds[1]);
    size_t n = 0;
    while (pid > 0 && n < sizeof r) {
        const ssize_t got = read(fds[0], (char *)&r + n, sizeof r - n);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            break;
        n += (size_t)got;
    }
    (void)close(fds[0]);
    if (pid < 0)
        return tv_error_sys(&c->err, fork_errno, "cannot start a process");
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (n == sizeof r) {
        c->err = r.err;
        *out = r;
        return r.rc;
    }
    /* Somebody's kill, or the kernel's for want of memory, is no damage. */
    if (WIFSIGNALED(status) &&
        (WTERMSIG(status) == SIGKILL || WTERMSIG(status) == SIGTERM))
        return tv_error_set(&c->err, TV_E_IO, "gc was ended by signal %d",
                            WTERMSIG(status));
    (void)tv_error_set(&c->err, TV_E_CORRUPT,
                       "store %s is damaged: reading it ended with signal %d",
                       c->pos[0], WIFSIGNALED(status) ? WTERMSIG(status) : 0);
    tv_error_hint(&c->err, "'tvstore verify %s' lists what is damaged",
                  c->pos[0]);
    return TV_E_CORRUPT;
}

static int run_gc(struct tvc *c)
{
    struct gc_result r = {.rc = TV_OK};
    char text[32];

    if (gc_in_child(c, &r) != TV_OK)
        return tvc_fail(c, &c->err);
    if (c->out.json)
        tvc_out_json(&c->out,
                     json_pack("{s:s, s:o, s:o}", "schema", "tvstore.gc/1",
                               "freed_bytes", tvc_json_u64(r.freed),
                               "n_evicted", tvc_json_u64(r.n_evicted)));
    else
        tvc_say(&c->out, "freed %s inside the store",
                tv_format_bytes(r.freed, text, sizeof text));
    return tvc_done(c, 0);
}

static const struct argp_option gc_options[] = {
    {"derived", KEY_DERIVED, NULL, 0,
     "Also drop masks and task vectors that no running merge uses", 0},
    {"lock-timeout", KEY_LOCK_TIMEOUT, "SECONDS", 0,
     "How long to wait for another writer (default: 10)", 0},
    {0}};

const struct tvc_command tvc_cmd_gc = {
    .name = "gc",
    .summary = "drop what nothing refers to",
    .args_doc = "STORE",
    .text = "Freed pages are used again by the next writes; 'tvstore compact' "
            "gives them\nback to the file system.",
    .examples = "tvstore gc models.tv\n"
                "tvstore gc models.tv --derived",
    .options = gc_options,
    .opt_bytes = sizeof(struct opts),
    .init = opts_init,
    .option = opts_option,
    .min_pos = 1,
    .max_pos = 1,
    .run = run_gc,
};
