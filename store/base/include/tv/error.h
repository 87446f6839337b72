/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/error.h - the one error vocabulary of all folders.
 *
 * Every function that can fail returns enum tv_err and fills a caller-owned
 * struct tv_error (which may be NULL). The place that finds a fault sets the
 * code and a message with names and numbers; callers may add context in front,
 * they never replace the code. Results leave through `out` pointers which are
 * written only on success. Libraries never print, exit or abort on bad input;
 * cli/ maps codes to exit statuses (docs: README, "Exit codes").
 *
 * Thread rule: a struct tv_error belongs to one thread at a time.
 */
#ifndef TV_ERROR_H
#define TV_ERROR_H

#include <stdarg.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Append only; the numbers are stable. In brackets: the exit status of cli/. */
enum tv_err {
    TV_OK = 0,
    TV_E_INTERNAL = -1,  /* [1] a bug of ours, reported instead of crashing */
    TV_E_IO = -2,        /* [1] a system call failed; sys_errno says how */
    TV_E_NOMEM = -3,     /* [1] the allocator returned NULL */
    TV_E_USAGE = -4,     /* [2] bad argument or recipe syntax */
    TV_E_INPUT = -5,     /* [4] inputs incompatible or not found */
    TV_E_CHANGED = -6,   /* [4] saved state belongs to another plan/input */
    TV_E_EXISTS = -7,    /* [4] refuses to overwrite without --force */
    TV_E_NOSPACE = -8,   /* [5] disk or quota */
    TV_E_BUDGET = -9,    /* [5] memory budget */
    TV_E_NOTFOUND = -10, /* [10] no such store or object */
    TV_E_LOCKED = -11,   /* [11] another writer holds the lock */
    TV_E_CORRUPT = -12,  /* [12] malformed or damaged data */
    TV_E_UNSUPPORTED = -13, /* [4] well-formed, but not something we handle */
    TV_E_INTERRUPTED = -14, /* [130/143] cancelled by the caller, state saved */
    TV_E_NONFINITE = -15,   /* [3] NaN/Inf met under --strict */
    TV_E_NUMERICS = -16     /* [4] resumed with different arithmetic */
};

struct tv_error {
    enum tv_err code;
    int sys_errno;  /* 0 when no system call was involved */
    char msg[768];  /* one line, no trailing newline */
    char hint[256]; /* what the user could do; "" when nothing to say */
};

#if defined(__GNUC__)
#define TV_NODISCARD    __attribute__((warn_unused_result))
#define TV_PRINTF(a, b) __attribute__((format(printf, a, b)))
#else
#define TV_NODISCARD
#define TV_PRINTF(a, b)
#endif

/* Jumps to the function's `out:` label when expr fails; needs a local
 * `enum tv_err rc`. The only macro here that hides control flow. */
#define TV_TRY(expr)                                                           \
    do {                                                                       \
        rc = (expr);                                                           \
        if (rc != TV_OK)                                                       \
            goto out;                                                          \
    } while (0)

/* Clears *err (NULL allowed). */
void tv_error_clear(struct tv_error *err);
/* Sets code and message, returns code. err may be NULL. */
enum tv_err tv_error_set(struct tv_error *err, enum tv_err code,
                         const char *fmt, ...) TV_PRINTF(3, 4);
/* The same for a failed system call: appends ": strerror(sys_errno)" and, for
 * ENOSPC/EDQUOT, turns the code into TV_E_NOSPACE; ENOMEM into TV_E_NOMEM. */
enum tv_err tv_error_sys(struct tv_error *err, int sys_errno, const char *fmt,
                         ...) TV_PRINTF(3, 4);
/* Puts "fmt: " in front of the message; keeps the code. */
void tv_error_context(struct tv_error *err, const char *fmt, ...)
    TV_PRINTF(2, 3);
/* Sets the hint. */
void tv_error_hint(struct tv_error *err, const char *fmt, ...) TV_PRINTF(2, 3);
/* Short stable machine name ("corrupt", "no-space", ...); never NULL. */
const char *tv_err_name(enum tv_err code);

#ifdef __cplusplus
}
#endif
#endif
