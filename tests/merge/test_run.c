/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs that are interrupted, repeated, refused, and runs into a store.
 */
#include "test.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "faults.h"
#include "fixture.h"
#include "rng.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/sys.h"

static const struct fx_tensor shapes[] = {
    {"model.embed_tokens.weight", TV_BF16, 2, {600, 1024}},
    {"model.layers.0.a", TV_BF16, 2, {70, 333}},
    {"model.layers.0.b", TV_F32, 2, {512, 1025}},
    {"model.layers.1.a", TV_BF16, 2, {70, 333}},
    {"model.layers.1.b", TV_F16, 2, {512, 1025}},
    {"model.layers.1.c", TV_F32, 1, {7}},
    {"model.layers.2.ids", TV_I64, 1, {300000}},
    {"model.norm", TV_BF16, 1, {1024}},
};
#define N_SHAPES (sizeof shapes / sizeof *shapes)

static const struct fx_param params[] = {{"weight", FX_ALL, 0.5},
                                         {"density", FX_ALL, 0.3},
                                         {"normalize", FX_ALL, 0}};
#define N_PARAMS (sizeof params / sizeof *params)

struct state {
    struct fx f;
    struct tv_hash digest; /* of an undisturbed run */
    unsigned n_outs;
};

static void plan(struct state *s, double weight)
{
    struct fx_param p[N_PARAMS];
    memcpy(p, params, sizeof p);
    p[0].value = weight;
    fx_plan(&s->f, "ties", 0, p, N_PARAMS, TV_DTYPE_NONE);
    s->f.plan.options.threads = 2;
    s->f.plan.options.memory_bytes = 16u << 20;
    s->f.plan.options.lock_timeout_ms = 100;
}

static void new_out(struct state *s)
{
    char name[32];
    (void)snprintf(name, sizeof name, "x%04u", s->n_outs++);
    fx_out(&s->f, name);
}

static int set_up(void **state)
{
    struct state *s = tv_calloc(1, sizeof *s);
    fx_open(&s->f);
    for (int i = 0; i < 3; i++)
        fx_model(&s->f, shapes, N_SHAPES, NULL);
    plan(s, 0.5);
    s->digest = fx_run(&s->f);
    new_out(s);
    *state = s;
    return 0;
}

static int tear_down(void **state)
{
    struct state *s = *state;
    fx_close(&s->f);
    tv_free(s);
    return 0;
}

static bool has(const struct fx *f, const char *name)
{
    char *path = tv_path_join(f->plan.options.out_dir, name);
    const bool yes = tv_path_exists(path);
    tv_free(path);
    return yes;
}

static void put(const struct fx *f, const char *name, const char *text)
{
    tv_free(tmpdir_write(f->plan.options.out_dir, name, text, strlen(text)));
}

/* The result is complete and nothing of the work is left. */
static void assert_published(struct state *s)
{
    struct tv_error err;
    struct tv_hash h;
    struct tvm_status st;
    tv_input *in = NULL;
    const char *out = s->f.plan.options.out_dir;

    assert_true(has(&s->f, "config.json"));
    assert_true(has(&s->f, "tvmerge.json"));
    assert_true(has(&s->f, "README.md"));
    assert_false(has(&s->f, ".tvmerge"));
    assert_ok(tv_input_open_path(out, &err, &in), &err);
    assert_ok(tv_input_digest(in, &h, &err), &err);
    tv_input_close(in);
    assert_true(tv_hash_equal(h, s->digest));
    assert_ok(tvm_status(out, &st, &err), &err);
    assert_int_equal(st.state, TVM_FINISHED);
    assert_int_equal(st.n_done, N_SHAPES);
    assert_int_equal(st.n_tensors, N_SHAPES);
    assert_true(tv_hash_equal(st.digest, s->digest));
    assert_false(st.running);
}

static struct tvm_result run_ok(struct state *s)
{
    struct tv_error err;
    struct tvm_result r;
    assert_ok(tvm_run(&s->f.plan, NULL, &r, &err), &err);
    assert_true(tv_hash_equal(r.digest, s->digest));
    assert_published(s);
    return r;
}

/* ---- cancel -------------------------------------------------------------- */

struct cancel {
    atomic_int flag;
    size_t after, seen;
};

static void count_down(void *arg, const struct tvm_progress *p)
{
    struct cancel *c = arg;
    assert_true(p->n_done <= p->n_tensors);
    assert_true(p->bytes_done <= p->bytes_total);
    if (++c->seen == c->after)
        c->flag = 1;
}

static void cancelled_runs_go_on(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;
    struct tvm_status st;

    plan(s, 0.5);
    for (size_t after = 1; after < N_SHAPES - 1; after++) {
        struct cancel c = {.after = after};
        const struct tvm_run_hooks hooks = {
            .progress = count_down, .arg = &c, .cancel = &c.flag};
        new_out(s);
        assert_code(tvm_run(&s->f.plan, &hooks, &r, &err), TV_E_INTERRUPTED,
                    &err);
        assert_false(has(&s->f, "config.json"));
        assert_false(has(&s->f, "tvmerge.json"));
        assert_ok(tvm_status(s->f.plan.options.out_dir, &st, &err), &err);
        assert_int_equal(st.state, TVM_UNFINISHED);
        assert_true(st.n_done >= after);
        assert_int_equal(st.n_tensors, N_SHAPES);
        assert_false(st.running);
        const size_t before = st.n_done;
        r = run_ok(s);
        assert_int_equal(r.n_resumed, before);
        r = run_ok(s);
        assert_true(r.already_done);
        assert_int_equal(r.n_resumed, N_SHAPES);
        assert_int_equal(r.bytes_written, 0);
    }
}

static void cancelled_before_it_starts(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;
    struct cancel c = {.flag = 1};
    const struct tvm_run_hooks hooks = {.cancel = &c.flag};

    plan(s, 0.5);
    new_out(s);
    assert_code(tvm_run(&s->f.plan, &hooks, &r, &err), TV_E_INTERRUPTED, &err);
    (void)run_ok(s);
}

/* ---- kill ---------------------------------------------------------------- */

/* Runs the plan in a child that is killed after some time, or that kills itself
 * at a system call. Returns true when it was killed. */
static bool run_killed(struct state *s, unsigned delay_us)
{
    const pid_t child = fork();
    int status = 0;

    assert_true(child >= 0);
    if (child == 0) {
        struct tv_error err;
        struct tvm_result r;
        _exit(tvm_run(&s->f.plan, NULL, &r, &err) == TV_OK ? 0 : 1);
    }
    const struct timespec ts = {0, (long)delay_us * 1000};
    (void)nanosleep(&ts, NULL);
    (void)kill(child, SIGKILL);
    assert_int_equal(waitpid(child, &status, 0), child);
    if (WIFSIGNALED(status))
        return true;
    assert_int_equal(WEXITSTATUS(status), 0);
    return false;
}

static void killed_at_random(void **state)
{
    struct state *s = *state;
    struct rng rng;
    unsigned n_killed = 0;

    plan(s, 0.5);
    rng_open(&rng, 1);
    for (int i = 0; i < 8; i++) {
        new_out(s);
        while (run_killed(s, (unsigned)rng_below(&rng, 60000)) &&
               rng_below(&rng, 3) > 0)
            n_killed++;
        (void)run_ok(s);
    }
    assert_true(n_killed > 0);
}

/* ---- killed at every call that changes a file -----------------------------
 */

static const struct tv_sys_table *real_sys;
static _Atomic unsigned calls_left; /* any worker may write */

static void count_or_die(void)
{
    if (calls_left-- == 1)
        (void)raise(SIGKILL);
}

static int dying_rename(const char *from, const char *to)
{
    count_or_die();
    return real_sys->rename(from, to);
}

static int dying_unlink(const char *path)
{
    count_or_die();
    return real_sys->unlink(path);
}

static int dying_mkdir(const char *path, mode_t mode)
{
    count_or_die();
    return real_sys->mkdir(path, mode);
}

static int dying_rmdir(const char *path)
{
    count_or_die();
    return real_sys->rmdir(path);
}

static ssize_t dying_pwrite(int fd, const void *buf, size_t n, off_t off)
{
    count_or_die();
    return real_sys->pwrite(fd, buf, n, off);
}

static int dying_fallocate(int fd, int mode, off_t off, off_t n)
{
    count_or_die();
    return real_sys->fallocate(fd, mode, off, n);
}

/* The child dies before the n-th such call; the next run completes the merge.
 * Returns false when the child did not get so far. */
static bool die_at(struct state *s, unsigned n)
{
    struct tv_sys_table table = *tv_sys();
    const pid_t child = fork();
    int status = 0;

    assert_true(child >= 0);
    if (child == 0) {
        struct tv_error err;
        struct tvm_result r;
        real_sys = tv_sys();
        calls_left = n;
        table.rename = dying_rename;
        table.unlink = dying_unlink;
        table.mkdir = dying_mkdir;
        table.rmdir = dying_rmdir;
        table.fallocate = dying_fallocate;
        table.pwrite = dying_pwrite;
        tv_sys_replace(&table);
        _exit(tvm_run(&s->f.plan, NULL, &r, &err) == TV_OK ? 0 : 1);
    }
    assert_int_equal(waitpid(child, &status, 0), child);
    if (!WIFSIGNALED(status))
        assert_int_equal(WEXITSTATUS(status), 0);
    return WIFSIGNALED(status);
}

static void killed_at_every_change(void **state)
{
    struct state *s = *state;
    unsigned n = 0;

    plan(s, 0.5);
    do {
        new_out(s);
        n++;
    } while (die_at(s, n) && (run_ok(s), true));
    assert_true(n > 30);
    assert_published(s);
}

/* The same over an older result that --force replaces. At any moment OUT has
 * the old model, or none, or the new one. */
static void killed_while_replacing(void **state)
{
    struct state *s = *state;
    unsigned n = 0;
    bool killed = true;

    while (killed) {
        new_out(s);
        n++;
        plan(s, 0.25);
        struct tv_error err;
        struct tvm_result r;
        char name[32];
        (void)snprintf(name, sizeof name, "x%04u", s->n_outs - 1);
        fx_out(&s->f, name);
        assert_ok(tvm_run(&s->f.plan, NULL, &r, &err), &err);
        put(&s->f, "model-00001-of-00077.safetensors", "stale");
        plan(s, 0.5);
        fx_out(&s->f, name);
        s->f.plan.options.force = true;
        killed = die_at(s, n);
        /* Killed early, nothing of the old is gone: still another merge. */
        s->f.plan.options.force = killed &&
                                  !has(&s->f, ".tvmerge/previous.json") &&
                                  has(&s->f, "tvmerge.json");
        (void)run_ok(s);
        assert_false(has(&s->f, "model-00001-of-00077.safetensors"));
    }
    assert_true(n > 10);
}

/* ---- refusals ------------------------------------------------------------ */

static void another_plan_is_refused(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;
    struct cancel c = {.after = 2};
    const struct tvm_run_hooks hooks = {
        .progress = count_down, .arg = &c, .cancel = &c.flag};
    char name[32];

    plan(s, 0.25);
    new_out(s);
    (void)snprintf(name, sizeof name, "x%04u", s->n_outs - 1);
    assert_code(tvm_run(&s->f.plan, &hooks, &r, &err), TV_E_INTERRUPTED, &err);
    plan(s, 0.5);
    fx_out(&s->f, name);
    /* Against an unfinished one. */
    assert_code(tvm_run(&s->f.plan, NULL, &r, &err), TV_E_CHANGED, &err);
    assert_message(&err, "parameters[weight.-1].value was 0.25, is 0.5");
    assert_true(strlen(err.hint) > 0);
    s->f.plan.options.force = true;
    (void)run_ok(s);
    /* Against a finished one. */
    plan(s, 0.75);
    fx_out(&s->f, name);
    assert_code(tvm_run(&s->f.plan, NULL, &r, &err), TV_E_CHANGED, &err);
    assert_message(&err, "value was 0.5, is 0.75");
    plan(s, 0.5);
    fx_out(&s->f, name);
    r = run_ok(s);
    assert_true(r.already_done);
}

static void other_files_are_refused(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;

    plan(s, 0.5);
    new_out(s);
    assert_ok(tv_dir_make(s->f.plan.options.out_dir, &err), &err);
    put(&s->f, "precious.txt", "x");
    put(&s->f, "model.safetensors", "old weights");
    put(&s->f, "config.json", "old config");
    assert_code(tvm_run(&s->f.plan, NULL, &r, &err), TV_E_EXISTS, &err);
    assert_false(has(&s->f, ".tvmerge"));
    s->f.plan.options.force = true;
    (void)run_ok(s);
    assert_true(has(&s->f, "precious.txt"));
    assert_false(has(&s->f, "model.safetensors"));
}

static void a_finished_merge_that_lost_a_file(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;

    plan(s, 0.5);
    new_out(s);
    (void)run_ok(s);
    char *path = tv_path_join(s->f.plan.options.out_dir, "README.md");
    assert_int_equal(unlink(path), 0);
    tv_free(path);
    assert_code(tvm_run(&s->f.plan, NULL, &r, &err), TV_E_EXISTS, &err);
    assert_message(&err, "README.md");
    s->f.plan.options.force = true;
    (void)run_ok(s);
}

static void a_damaged_journal_is_refused(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;
    struct cancel c = {.after = 2};
    const struct tvm_run_hooks hooks = {
        .progress = count_down, .arg = &c, .cancel = &c.flag};

    plan(s, 0.5);
    new_out(s);
    assert_code(tvm_run(&s->f.plan, &hooks, &r, &err), TV_E_INTERRUPTED, &err);
    put(&s->f, ".tvmerge/journal/data.mdb", "this is no database");
    assert_true(tvm_run(&s->f.plan, NULL, &r, &err) != TV_OK);
    assert_message(&err, s->f.plan.options.out_dir);
    s->f.plan.options.force = true;
    (void)run_ok(s);
}

static void two_runs_exclude_each_other(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;
    struct tvm_status st;

    plan(s, 0.5);
    new_out(s);
    assert_ok(tv_dir_make(s->f.plan.options.out_dir, &err), &err);
    char *dir = tv_path_join(s->f.plan.options.out_dir, ".tvmerge");
    assert_ok(tv_dir_make(dir, &err), &err);
    char *path = tv_path_join(dir, "lock");
    const int fd = open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    assert_true(fd >= 0);
    assert_int_equal(flock(fd, LOCK_EX), 0);
    assert_code(tvm_run(&s->f.plan, NULL, &r, &err), TV_E_LOCKED, &err);
    assert_ok(tvm_status(s->f.plan.options.out_dir, &st, &err), &err);
    assert_true(st.running);
    (void)close(fd);
    (void)run_ok(s);
    tv_free(path);
    tv_free(dir);
}

/* ---- faults -------------------------------------------------------------- */

static void a_full_disk_shows_first(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;

    plan(s, 0.5);
    new_out(s);
    faults_sys_arm(FAULT_FALLOCATE, 2, 1, ENOSPC);
    assert_code(tvm_run(&s->f.plan, NULL, &r, &err), TV_E_NOSPACE, &err);
    faults_sys_off();
    assert_false(tv_path_exists(s->f.plan.options.out_dir));
    (void)run_ok(s);
}

static void a_disk_that_fills_up_later(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;

    plan(s, 0.5);
    for (unsigned at = 5; at < 16; at++) {
        new_out(s);
        faults_sys_arm(FAULT_PWRITE, at, 1, ENOSPC);
        assert_code(tvm_run(&s->f.plan, NULL, &r, &err), TV_E_NOSPACE, &err);
        faults_sys_off();
        (void)run_ok(s);
    }
}

/* ---- into a store ---------------------------------------------------------
 */

struct into {
    char *path;
    tv_store *store;
};

static struct into open_store(struct state *s, const char *name, bool create)
{
    struct tv_error err;
    struct into in = {tv_path_join(s->f.dir, name), NULL};
    const struct tv_store_options opt = {.dirty_bytes_max = 4u << 20};

    if (create)
        assert_ok(tv_store_create(in.path, 0, &err), &err);
    assert_ok(tv_store_open(in.path, &opt, &err, &in.store), &err);
    s->f.plan.options.store = in.store;
    s->f.plan.options.into = "merged";
    return in;
}

static void close_store(struct into *in)
{
    tv_store_close(in->store);
    tv_free(in->path);
}

static void assert_stored(struct state *s, tv_store *store)
{
    struct tv_error err;
    struct tv_hash h;
    struct tv_object *o = NULL;
    tv_read *r = NULL;
    char **runs = NULL;
    size_t n = 0;

    assert_ok(tv_store_verify(store, 0, NULL, NULL, NULL, &err), &err);
    assert_ok(tv_read_begin(store, &err, &r), &err);
    assert_ok(tv_object_find(r, "merged", false, &err, &o), &err);
    assert_int_equal(o->kind, TV_KIND_MERGE);
    assert_int_equal(o->n_tensors, N_SHAPES);
    assert_int_equal(o->n_files, 3);
    assert_ok(tv_object_digest(r, o->id, &h, &err), &err);
    assert_true(tv_hash_equal(h, s->digest));
    assert_ok(tv_run_list(r, &err, &runs, &n), &err);
    assert_int_equal(n, 0);
    tv_dir_list_free(runs, n);
    tv_object_free(o);
    tv_read_end(r);
}

static void into_a_store(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;

    for (unsigned threads = 1; threads <= 3; threads++) {
        char name[16];
        (void)snprintf(name, sizeof name, "store%u", threads);
        plan(s, 0.5);
        s->f.plan.options.threads = threads;
        struct into in = open_store(s, name, true);
        assert_ok(tvm_run(&s->f.plan, NULL, &r, &err), &err);
        assert_true(tv_hash_equal(r.digest, s->digest));
        assert_stored(s, in.store);
        assert_ok(tvm_run(&s->f.plan, NULL, &r, &err), &err);
        assert_true(r.already_done);
        assert_true(tv_hash_equal(r.digest, s->digest));
        /* Another merge of that name needs --force. */
        plan(s, 0.25);
        s->f.plan.options.store = in.store;
        s->f.plan.options.into = "merged";
        assert_code(tvm_run(&s->f.plan, NULL, &r, &err), TV_E_CHANGED, &err);
        assert_message(&err, "parameters[weight.-1]");
        s->f.plan.options.force = true;
        assert_ok(tvm_run(&s->f.plan, NULL, &r, &err), &err);
        assert_false(tv_hash_equal(r.digest, s->digest));
        close_store(&in);
    }
}

static void into_a_store_cancelled(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;

    for (size_t after = 1; after < N_SHAPES - 1; after += 2) {
        struct cancel c = {.after = after};
        const struct tvm_run_hooks hooks = {
            .progress = count_down, .arg = &c, .cancel = &c.flag};
        char name[16];
        (void)snprintf(name, sizeof name, "cstore%zu", after);
        plan(s, 0.5);
        struct into in = open_store(s, name, true);
        assert_code(tvm_run(&s->f.plan, &hooks, &r, &err), TV_E_INTERRUPTED,
                    &err);
        /* Another plan does not continue it. */
        plan(s, 0.25);
        s->f.plan.options.store = in.store;
        s->f.plan.options.into = "merged";
        assert_code(tvm_run(&s->f.plan, NULL, &r, &err), TV_E_CHANGED, &err);
        close_store(&in);
        plan(s, 0.5);
        in = open_store(s, name, false);
        assert_ok(tvm_run(&s->f.plan, NULL, &r, &err), &err);
        assert_true(r.n_resumed >= after);
        assert_true(tv_hash_equal(r.digest, s->digest));
        assert_stored(s, in.store);
        close_store(&in);
    }
}

static void into_a_store_killed(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;
    struct rng rng;
    char name[24];

    rng_open(&rng, 2);
    for (int i = 0; i < 6; i++) {
        (void)snprintf(name, sizeof name, "kstore%d", i);
        plan(s, 0.5);
        struct into in = open_store(s, name, true);
        close_store(&in);
        const pid_t child = fork();
        if (child == 0) {
            in = open_store(s, name, false);
            _exit(tvm_run(&s->f.plan, NULL, &r, &err) == TV_OK ? 0 : 1);
        }
        const struct timespec ts = {0, (long)rng_below(&rng, 80000) * 1000};
        (void)nanosleep(&ts, NULL);
        (void)kill(child, SIGKILL);
        int status = 0;
        assert_int_equal(waitpid(child, &status, 0), child);
        in = open_store(s, name, false);
        assert_ok(tvm_run(&s->f.plan, NULL, &r, &err), &err);
        assert_true(tv_hash_equal(r.digest, s->digest));
        assert_stored(s, in.store);
        close_store(&in);
    }
}

/* ---- inputs that change -------------------------------------------------- */

struct changer {
    const char *path;
    size_t after; /* tensors */
    bool done;
};

/* Twice is as before, but for the time. */
static void flip_byte(const char *path)
{
    unsigned char byte = 0;
    const int fd = open(path, O_RDWR);

    assert_true(fd >= 0);
    assert_int_equal(pread(fd, &byte, 1, 5000), 1);
    byte ^= 1;
    assert_int_equal(pwrite(fd, &byte, 1, 5000), 1);
    assert_int_equal(close(fd), 0);
}

static void change_input(void *arg, const struct tvm_progress *p)
{
    struct changer *c = arg;

    if (c->done || p->n_done < c->after)
        return;
    c->done = true;
    flip_byte(c->path);
}

/* Nothing of a mixture is kept: neither what was finished after the change nor,
 * least of all, a result. */
static void a_changed_input_is_refused(void **state)
{
    struct state *s = *state;
    struct fx *f = &s->f;
    struct tv_error err;
    struct tvm_result r;
    struct tvm_status st;

    for (int into = 0; into < 2; into++) {
        struct into in = {.store = NULL};
        plan(s, 0.5);
        if (into)
            in = open_store(s, "changing.tv", true);
        else
            new_out(s);
        f->plan.options.group_bytes = 1u << 30; /* one commit, at the end */
        char *path = tv_path_join(f->model[1], "model.safetensors");
        struct changer c = {.path = path, .after = 2};
        const struct tvm_run_hooks hooks = {.progress = change_input,
                                            .arg = &c};
        tv_error_clear(&err);
        assert_int_equal(tvm_run(&f->plan, &hooks, &r, &err), TV_E_CORRUPT);
        assert_true(c.done);
        assert_non_null(strstr(err.msg, "model1/model.safetensors"));
        assert_non_null(strstr(err.msg, "changed while it was being merged"));
        if (into) {
            struct tv_object *o = NULL;
            tv_read *read = NULL;
            assert_ok(tv_read_begin(in.store, &err, &read), &err);
            assert_code(tv_object_find(read, "merged", false, &err, &o),
                        TV_E_NOTFOUND, &err);
            tv_read_end(read);
            close_store(&in);
        } else {
            assert_false(has(f, "config.json"));
            assert_ok(tvm_status(f->plan.options.out_dir, &st, &err), &err);
            assert_int_equal(st.state, TVM_UNFINISHED);
            assert_int_equal(st.n_done, 0);
        }
        flip_byte(path);
        tv_free(path);
        tv_input_close(f->input[1]);
        assert_ok(tv_input_open_path(f->model[1], &err, &f->input[1]), &err);
    }
    plan(s, 0.5);
}

/* ---- pins of inputs -------------------------------------------------------
 */

struct pinned {
    struct into in;
    tv_input *input;
};

/* The first model comes from a store. */
static struct pinned open_pinned(struct state *s, const char *name,
                                 bool read_only)
{
    struct tv_error err;
    struct pinned p = {.input = NULL};
    struct tv_ref *ref = NULL;
    struct tv_transfer t = {.lock_timeout_ms = 100};
    const struct tv_store_options opt = {.read_only = read_only};

    plan(s, 0.5);
    p.in.path = tv_path_join(s->f.dir, name);
    if (!tv_path_exists(p.in.path)) {
        assert_ok(tv_store_create(p.in.path, 0, &err), &err);
        assert_ok(tv_store_open(p.in.path, NULL, &err, &p.in.store), &err);
        assert_ok(tv_import(p.in.store, "a", s->f.input[0], &t, &err), &err);
        tv_store_close(p.in.store);
    }
    assert_ok(tv_store_open(p.in.path, &opt, &err, &p.in.store), &err);
    assert_ok(tv_ref_resolve("store:a", &err, &ref), &err);
    assert_ok(tv_input_open(&ref->model, p.in.store, &err, &p.input), &err);
    tv_ref_free(ref);
    struct tvm_plan *to = &s->f.plan;
    to->options.store = p.in.store;
    to->inputs[0].input = p.input;
    for (size_t i = 0; i < to->n_tensors; i++)
        to->tensors[i].sources[0].tensor =
            tv_input_find(p.input, to->tensors[i].name);
    return p;
}

static void close_pinned(struct pinned *p)
{
    tv_input_close(p->input);
    close_store(&p->in);
}

static size_t count_runs(tv_store *store)
{
    struct tv_error err;
    tv_read *r = NULL;
    char **runs = NULL;
    size_t n = 0;

    assert_ok(tv_read_begin(store, &err, &r), &err);
    assert_ok(tv_run_list(r, &err, &runs, &n), &err);
    tv_dir_list_free(runs, n);
    tv_read_end(r);
    return n;
}

/* Tries to remove the input and leaves it. */
static enum tv_err try_remove(tv_store *store, struct tv_error *err)
{
    tv_batch *b = NULL;
    bool more = false;

    assert_ok(tv_batch_begin(store, false, err, &b), err);
    const enum tv_err rc = tv_object_remove(b, "a", &more, err);
    tv_batch_abort(b);
    return rc;
}

static void interrupt(struct state *s)
{
    struct tv_error err;
    struct tvm_result r;
    struct cancel c = {.after = 2};
    const struct tvm_run_hooks hooks = {
        .progress = count_down, .arg = &c, .cancel = &c.flag};

    assert_code(tvm_run(&s->f.plan, &hooks, &r, &err), TV_E_INTERRUPTED, &err);
}

static void inputs_are_pinned(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;
    struct pinned p = open_pinned(s, "pins", false);

    new_out(s);
    interrupt(s);
    assert_int_equal(count_runs(p.in.store), 1);
    assert_code(try_remove(p.in.store, &err), TV_E_LOCKED, &err);
    assert_message(&err, s->f.plan.options.out_dir);
    assert_ok(tvm_runs_sweep(p.in.store, &err), &err);
    assert_code(try_remove(p.in.store, &err), TV_E_LOCKED, &err);
    r = run_ok(s);
    assert_true(r.n_resumed >= 2);
    assert_int_equal(count_runs(p.in.store), 0);
    assert_ok(try_remove(p.in.store, &err), &err);
    r = run_ok(s);
    assert_true(r.already_done);
    assert_int_equal(count_runs(p.in.store), 0);

    /* Undone before it began. */
    new_out(s);
    faults_sys_arm(FAULT_FALLOCATE, 2, 1, ENOSPC);
    assert_code(tvm_run(&s->f.plan, NULL, &r, &err), TV_E_NOSPACE, &err);
    faults_sys_off();
    assert_int_equal(count_runs(p.in.store), 0);

    /* The output was removed by hand. */
    new_out(s);
    interrupt(s);
    assert_ok(tv_dir_remove(s->f.plan.options.out_dir, &err), &err);
    assert_code(try_remove(p.in.store, &err), TV_E_LOCKED, &err);
    assert_ok(tvm_runs_sweep(p.in.store, &err), &err);
    assert_int_equal(count_runs(p.in.store), 0);
    assert_ok(try_remove(p.in.store, &err), &err);
    close_pinned(&p);
}

static void a_read_only_store_has_no_pins(void **state)
{
    struct state *s = *state;
    struct pinned p = open_pinned(s, "pins-ro", false);

    close_pinned(&p);
    p = open_pinned(s, "pins-ro", true);
    new_out(s);
    interrupt(s);
    assert_int_equal(count_runs(p.in.store), 0);
    (void)run_ok(s);
    close_pinned(&p);
}

/* The object that is replaced may be among the inputs. */
static void into_one_of_its_inputs(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;
    struct pinned p = open_pinned(s, "pins-self", false);

    s->f.plan.options.into = "a";
    s->f.plan.options.force = true;
    interrupt(s);
    assert_int_equal(count_runs(p.in.store), 1);
    assert_ok(tvm_run(&s->f.plan, NULL, &r, &err), &err);
    assert_true(tv_hash_equal(r.digest, s->digest));
    assert_true(r.n_resumed >= 2);
    assert_int_equal(count_runs(p.in.store), 0);
    close_pinned(&p);
}

/* An unfinished object takes its run along. */
static void removing_what_is_unfinished(void **state)
{
    struct state *s = *state;
    struct tv_error err;
    struct tvm_result r;
    struct pinned p = open_pinned(s, "pins-into", false);
    tv_batch *b = NULL;
    bool more = true;

    s->f.plan.options.into = "merged";
    interrupt(s);
    assert_code(try_remove(p.in.store, &err), TV_E_LOCKED, &err);
    assert_message(&err, "merged");
    assert_ok(tv_batch_begin(p.in.store, false, &err, &b), &err);
    assert_ok(tv_object_remove(b, "merged", &more, &err), &err);
    assert_ok(tv_batch_commit(b, &err), &err);
    assert_int_equal(count_runs(p.in.store), 0);
    assert_ok(try_remove(p.in.store, &err), &err);
    assert_ok(tvm_run(&s->f.plan, NULL, &r, &err), &err);
    assert_int_equal(r.n_resumed, 0);
    assert_stored(s, p.in.store);
    close_pinned(&p);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(cancelled_runs_go_on),
        cmocka_unit_test(cancelled_before_it_starts),
        cmocka_unit_test(killed_at_random),
        cmocka_unit_test(killed_at_every_change),
        cmocka_unit_test(killed_while_replacing),
        cmocka_unit_test(another_plan_is_refused),
        cmocka_unit_test(other_files_are_refused),
        cmocka_unit_test(a_finished_merge_that_lost_a_file),
        cmocka_unit_test(a_damaged_journal_is_refused),
        cmocka_unit_test(two_runs_exclude_each_other),
        cmocka_unit_test(a_full_disk_shows_first),
        cmocka_unit_test(a_disk_that_fills_up_later),
        cmocka_unit_test(a_changed_input_is_refused),
        cmocka_unit_test(into_a_store),
        cmocka_unit_test(into_a_store_cancelled),
        cmocka_unit_test(into_a_store_killed),
        cmocka_unit_test(inputs_are_pinned),
        cmocka_unit_test(a_read_only_store_has_no_pins),
        cmocka_unit_test(into_one_of_its_inputs),
        cmocka_unit_test(removing_what_is_unfinished),
    };
    return cmocka_run_group_tests(tests, set_up, tear_down);
}
