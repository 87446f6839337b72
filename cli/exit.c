/* SPDX-License-Identifier: Apache-2.0 */
/*
 * exit.c - the only place that knows exit statuses (README, "Exit codes").
 */
#include "cli.h"
#include "signals.h"
#include "tv/alloc.h"

int tvc_exit_status(enum tv_err code)
{
    static const struct {
        enum tv_err code;
        int status;
    } table[] = {
        {TV_OK, 0},         {TV_E_INTERNAL, 1},    {TV_E_IO, 1},
        {TV_E_NOMEM, 1},    {TV_E_USAGE, 2},       {TV_E_NONFINITE, 3},
        {TV_E_INPUT, 4},    {TV_E_CHANGED, 4},     {TV_E_EXISTS, 4},
        {TV_E_NUMERICS, 4}, {TV_E_UNSUPPORTED, 4}, {TV_E_NOSPACE, 5},
        {TV_E_BUDGET, 5},   {TV_E_NOTFOUND, 10},   {TV_E_LOCKED, 11},
        {TV_E_CORRUPT, 12},
    };
    if (code == TV_E_INTERRUPTED)
        return tvc_signal_status();
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if (table[i].code == code)
            return table[i].status;
    return 1;
}

int tvc_fail(struct tvc *c, const struct tv_error *e)
{
    struct tv_error lost = {0};
    struct tv_error unknown = {0};
    /* Whoever fails without a reason must not end with 0. */
    if (e->code == TV_OK) {
        (void)tv_error_set(&unknown, TV_E_INTERNAL, "failed without a reason");
        e = &unknown;
    }
    /* Data already made still belongs before the message about the end. */
    if (tvc_out_flush(&c->out, &lost) != TV_OK)
        tvc_warn(&c->out, "%s", lost.msg);
    tvc_error(&c->out, e);
    return tvc_exit_status(e->code);
}

/* The line to repeat is no place to save space, so people get it whole and not
 * as a hint, which is short. */
int tvc_interrupted(struct tvc *c)
{
    char *line = tvc_command_line(c);
    const char *again = line ? line : "the same command";
    if (c->out.json)
        tv_error_hint(&c->err, "resume with: %s", again);
    tvc_error(&c->out, &c->err);
    if (!c->out.json)
        tvc_notice(&c->out, "resume with: %s", again);
    tv_free(line);
    return tvc_done(c, tvc_exit_status(TV_E_INTERRUPTED));
}

int tvc_done(struct tvc *c, int status)
{
    struct tv_error err = {0};
    const enum tv_err rc = tvc_out_flush(&c->out, &err);
    if (rc == TV_OK)
        return status;
    tvc_error(&c->out, &err);
    return tvc_exit_status(rc);
}
