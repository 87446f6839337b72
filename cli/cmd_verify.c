/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_verify.c - tvstore verify: structure and every checksum.
 *
 * The pages of LMDB's tree carry no checksums: walking a damaged one can read
 * anywhere. So the walk happens in a child process, which reports each finding
 * as a JSON line through a pipe and ends with a verdict; a child that dies
 * without one has met damage that it could not survive.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "progress.h"
#include "tv/format.h"
#include "tv/text.h"
#include "tvstore.h"

struct child {
    struct tvc *c;
    FILE *pipe;
    struct tvc_progress *bar;
};

static void send_line(struct child *w, json_t *doc)
{
    if (doc) {
        (void)json_dumpf(doc, w->pipe, JSON_COMPACT);
        (void)fputs("\n", w->pipe);
        (void)fflush(w->pipe);
    }
    json_decref(doc);
}

static void on_problem(void *arg, const char *object, const char *tensor,
                       const char *what)
{
    send_line(arg,
              json_pack("{s:o, s:o, s:o}", "object", tvc_json_string(object),
                        "tensor", tvc_json_string(tensor), "message",
                        tvc_json_string(what)));
}

static void on_bytes(void *arg, uint64_t done, uint64_t total)
{
    struct child *w = arg;
    tvc_progress_set(w->bar, 0, 0, done, total);
}

/* Never returns to the caller's stack: the parent's buffers are not ours. */
static void child_main(struct tvc *c, int fd)
{
    struct child w = {.c = c};
    tv_store *store = NULL;
    enum tv_err rc = TV_OK;

    (void)prctl(PR_SET_PDEATHSIG, SIGKILL);
    w.pipe = fdopen(fd, "w");
    if (!w.pipe)
        _exit(1);
    /* What no writer could open is damaged, though it can be read. */
    const struct tv_store_options opt = {.read_only = true, .check_all = true};
    rc = tv_store_open(c->pos[0], &opt, &c->err, &store);
    if (rc == TV_OK) {
        w.bar = tvc_progress_begin(&c->out, "verify", NULL);
        rc = tv_store_verify(store, tvc_threads(c), on_problem, on_bytes, &w,
                             &c->err);
        tvc_progress_end(w.bar);
    }
    send_line(&w,
              json_pack("{s:i, s:o, s:o}", "end", (int)rc, "message",
                        tvc_json_string(rc == TV_OK ? "" : c->err.msg), "hint",
                        tvc_json_string(rc == TV_OK ? "" : c->err.hint)));
    tv_store_close(store);
    _exit(0);
}

struct outcome {
    json_t *problems;
    bool ended;
    enum tv_err code;
};

static const char *text_in(const json_t *doc, const char *key)
{
    const char *s = json_string_value(json_object_get(doc, key));
    return s ? s : "";
}

static void take_line(struct tvc *c, const char *line, struct outcome *o)
{
    json_t *doc = NULL;
    if (tv_json_parse(line, strlen(line), "report", NULL, &doc) != TV_OK)
        return;
    if (json_object_get(doc, "end")) {
        o->ended = true;
        o->code = (enum tv_err)json_integer_value(json_object_get(doc, "end"));
        if (o->code != TV_OK) {
            (void)tv_error_set(&c->err, o->code, "%s", text_in(doc, "message"));
            tv_error_hint(&c->err, "%s", text_in(doc, "hint"));
        }
        json_decref(doc);
        return;
    }
    (void)json_array_append_new(o->problems, doc);
}

/* The child never gives more than this; what is beyond would be its bug. */
#define REPORT_MAX (256u << 20)

static void take_all(struct tvc *c, int fd, struct outcome *o)
{
    char piece[16384];
    struct tv_buf all;
    tv_buf_init(&all, REPORT_MAX);
    for (;;) {
        const ssize_t n = read(fd, piece, sizeof piece);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            break;
        tv_buf_add(&all, piece, (size_t)n);
    }
    (void)close(fd);
    char *line = all.data;
    while (line) {
        char *end = strchr(line, '\n');
        if (!end)
            break;
        *end = '\0';
        take_line(c, line, o);
        line = end + 1;
    }
    tv_buf_free(&all);
}

static void add_crash(struct tvc *c, struct outcome *o, int status)
{
    char what[160];
    /* Somebody's kill, or the kernel's for want of memory, is no damage. */
    if (WIFSIGNALED(status) &&
        (WTERMSIG(status) == SIGKILL || WTERMSIG(status) == SIGTERM)) {
        o->code =
            tv_error_set(&c->err, TV_E_IO, "verify was ended by signal %d",
                         WTERMSIG(status));
        return;
    }
    if (WIFSIGNALED(status))
        (void)snprintf(what, sizeof what,
                       "the store's tree is damaged: reading it ended with "
                       "signal %d",
                       WTERMSIG(status));
    else
        (void)snprintf(what, sizeof what,
                       "the store's tree is damaged: reading it could not be "
                       "finished");
    (void)json_array_append_new(o->problems,
                                json_pack("{s:s, s:s, s:s}", "object", "",
                                          "tensor", "", "message", what));
    o->code = TV_E_CORRUPT;
}

static int report(struct tvc *c, struct outcome *o)
{
    if (o->code == TV_E_CORRUPT && json_array_size(o->problems) == 0)
        (void)json_array_append_new(
            o->problems, json_pack("{s:s, s:s, s:o}", "object", "", "tensor",
                                   "", "message", tvc_json_string(c->err.msg)));
    const size_t n = json_array_size(o->problems);
    if (c->out.json) {
        tvc_out_json(&c->out,
                     json_pack("{s:s, s:b, s:O}", "schema", "tvstore.verify/1",
                               "ok", o->code == TV_OK, "problems",
                               o->problems));
    } else {
        for (size_t i = 0; i < n; i++) {
            const json_t *p = json_array_get(o->problems, i);
            const char *object = text_in(p, "object");
            const char *tensor = text_in(p, "tensor");
            tvc_out(&c->out, "damaged: %s%s%s%s%s\n", object,
                    *object && *tensor ? "/" : "", tensor,
                    *object || *tensor ? ": " : "", text_in(p, "message"));
        }
        if (o->code == TV_OK)
            tvc_say(&c->out, "%s: everything is as it was written", c->pos[0]);
    }
    if (o->code == TV_OK)
        return tvc_done(c, 0);
    if (n > 0)
        (void)tv_error_set(&c->err, o->code, "%s is damaged (%zu problem%s)",
                           c->pos[0], n, n == 1 ? "" : "s");
    return tvc_fail(c, &c->err);
}

static int run(struct tvc *c)
{
    struct outcome o = {.problems = json_array()};
    int fds[2] = {-1, -1};
    int status = 0;
    int exit_status = 1;

    if (!o.problems || pipe(fds) != 0) {
        (void)tv_error_sys(&c->err, errno, "cannot make a pipe");
        json_decref(o.problems);
        return tvc_fail(c, &c->err);
    }
    const pid_t pid = fork();
    if (pid == 0) {
        (void)close(fds[0]);
        child_main(c, fds[1]);
    }
    const int fork_errno = errno;
    (void)close(fds[1]);
    if (pid < 0) {
        (void)close(fds[0]);
        (void)tv_error_sys(&c->err, fork_errno, "cannot start a process");
        json_decref(o.problems);
        return tvc_fail(c, &c->err);
    }
    take_all(c, fds[0], &o);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR)
        ;
    if (!o.ended)
        add_crash(c, &o, status);
    /* After the first damage LMDB may call the rest a mistake of ours. */
    if (o.code == TV_E_INTERNAL ||
        (o.code != TV_OK && json_array_size(o.problems) > 0))
        o.code = TV_E_CORRUPT;
    /* What kept the store from being looked at is no finding. */
    if (o.code != TV_OK && o.code != TV_E_CORRUPT &&
        json_array_size(o.problems) == 0)
        exit_status = tvc_fail(c, &c->err);
    else
        exit_status = report(c, &o);
    json_decref(o.problems);
    return exit_status;
}

const struct tvc_command tvc_cmd_verify = {
    .name = "verify",
    .summary = "check structure and every checksum",
    .args_doc = "STORE",
    .text = "Names each damaged tensor; exit code 12 when there is one.",
    .examples = "tvstore verify models.tv\n"
                "tvstore verify models.tv --json",
    .min_pos = 1,
    .max_pos = 1,
    .run = run,
};
