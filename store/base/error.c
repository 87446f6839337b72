/* SPDX-License-Identifier: Apache-2.0 */
/*
 * error.c - filling and extending struct tv_error.
 *
 * Messages quote names out of untrusted files, so every message is made fit
 * for one terminal line here, once: control characters become '?', and a
 * message that is too long is cut between characters, never inside one.
 * Formatting goes to a scratch array first, because callers may quote the
 * message that they are replacing.
 */
#include "tv/error.h"

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

/* Drops an incomplete UTF-8 sequence at the end of s. */
static void drop_cut_character(char *s)
{
    const size_t n = strlen(s);
    size_t back = 0;
    while (back < 3 && back < n &&
           ((unsigned char)s[n - 1 - back] & 0xc0) == 0x80)
        back++;
    if (back == n)
        return;
    const unsigned char lead = (unsigned char)s[n - 1 - back];
    size_t want = 0;
    if (lead >= 0xf0)
        want = 3;
    else if (lead >= 0xe0)
        want = 2;
    else if (lead >= 0xc0)
        want = 1;
    if (want > back)
        s[n - 1 - back] = '\0';
}

static void one_line(char *s)
{
    for (; *s; s++) {
        const unsigned char c = (unsigned char)*s;
        if (c < 0x20 || c == 0x7f)
            *s = '?';
    }
}

static void store_text(char *dst, size_t cap, const char *src)
{
    size_t n = strlen(src);
    const bool cut = n >= cap;
    if (cut)
        n = cap - 1;
    memmove(dst, src, n);
    dst[n] = '\0';
    if (cut)
        drop_cut_character(dst);
    one_line(dst);
}

void tv_error_clear(struct tv_error *err)
{
    if (!err)
        return;
    err->code = TV_OK;
    err->sys_errno = 0;
    err->msg[0] = '\0';
    err->hint[0] = '\0';
}

enum tv_err tv_error_set(struct tv_error *err, enum tv_err code,
                         const char *fmt, ...)
{
    if (!err)
        return code;
    char text[2 * sizeof err->msg] = "";
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    tv_error_clear(err);
    err->code = code;
    store_text(err->msg, sizeof err->msg, text);
    return code;
}

static enum tv_err code_of_errno(int sys_errno)
{
    switch (sys_errno) {
    case ENOSPC:
    case EDQUOT:
    case EFBIG: /* also: more than this process may write into one file */
        return TV_E_NOSPACE;
    case ENOMEM:
        return TV_E_NOMEM;
    default:
        return TV_E_IO;
    }
}

enum tv_err tv_error_sys(struct tv_error *err, int sys_errno, const char *fmt,
                         ...)
{
    const enum tv_err code = code_of_errno(sys_errno);
    if (!err)
        return code;
    char text[2 * sizeof err->msg] = "";
    char why[128] = "";
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    /* The GNU variant: it may answer with a constant instead of `why`. */
    const char *reason = strerror_r(sys_errno, why, sizeof why);

    tv_error_clear(err);
    err->code = code;
    err->sys_errno = sys_errno;
    /* The reason is what the reader needs: a long text gives way to it. */
    const size_t room = sizeof err->msg - 2 - strlen(reason);
    store_text(err->msg, room, text);
    const size_t n = strlen(err->msg);
    (void)snprintf(err->msg + n, sizeof err->msg - n, ": %s", reason);
    return code;
}

void tv_error_context(struct tv_error *err, const char *fmt, ...)
{
    if (!err)
        return;
    char text[2 * sizeof err->msg] = "";
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof err->msg - 2, fmt, ap);
    va_end(ap);
    drop_cut_character(text);
    const size_t n = strlen(text);
    (void)snprintf(text + n, sizeof text - n, "%s%s", err->msg[0] ? ": " : "",
                   err->msg);
    store_text(err->msg, sizeof err->msg, text);
}

void tv_error_hint(struct tv_error *err, const char *fmt, ...)
{
    if (!err)
        return;
    char text[2 * sizeof err->hint] = "";
    va_list ap;
    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    store_text(err->hint, sizeof err->hint, text);
}

const char *tv_err_name(enum tv_err code)
{
    switch (code) {
    case TV_OK:
        return "ok";
    case TV_E_INTERNAL:
        return "internal";
    case TV_E_IO:
        return "io";
    case TV_E_NOMEM:
        return "no-memory";
    case TV_E_USAGE:
        return "usage";
    case TV_E_INPUT:
        return "input";
    case TV_E_CHANGED:
        return "changed";
    case TV_E_EXISTS:
        return "exists";
    case TV_E_NOSPACE:
        return "no-space";
    case TV_E_BUDGET:
        return "budget";
    case TV_E_NOTFOUND:
        return "not-found";
    case TV_E_LOCKED:
        return "locked";
    case TV_E_CORRUPT:
        return "corrupt";
    case TV_E_UNSUPPORTED:
        return "unsupported";
    case TV_E_INTERRUPTED:
        return "interrupted";
    case TV_E_NONFINITE:
        return "non-finite";
    case TV_E_NUMERICS:
        return "numerics";
    }
    return "unknown";
}
