/* SPDX-License-Identifier: Apache-2.0 */
/*
 * print.h - everything that reaches stdout or stderr goes through here.
 *
 * Data on stdout, all else on stderr. Text that may come from files is made
 * printable first, so that no tensor name can move a cursor or fake a line.
 * With --json stdout carries exactly one document, and stderr nothing but
 * error documents and progress that was asked for.
 *
 * Thread rule: stdout belongs to the main thread; lines on stderr may come
 * from any thread and never mix with the progress line.
 */
#ifndef TVC_PRINT_H
#define TVC_PRINT_H

#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "tv/error.h"

enum tvc_progress_mode {
    TVC_PROGRESS_AUTO = 0,
    TVC_PROGRESS_BAR,
    TVC_PROGRESS_PLAIN,
    TVC_PROGRESS_JSON,
    TVC_PROGRESS_NONE
};
enum tvc_color_mode { TVC_COLOR_AUTO = 0, TVC_COLOR_ALWAYS, TVC_COLOR_NEVER };

struct tvc_print {
    const char *tool;
    bool json, quiet;
    int verbose;
    enum tvc_progress_mode progress;
    enum tvc_color_mode color_mode;
    bool color;      /* resolved by tvc_print_ready */
    bool bar_shown;  /* a progress line stands on the terminal */
    bool out_closed; /* the reader of stdout went away */
    int out_errno;   /* first failed write to stdout */
    pthread_mutex_t lock;
};
void tvc_print_init(struct tvc_print *p, const char *tool);
void tvc_print_free(struct tvc_print *p);
/* Settles colour and progress from options, environment and terminal. */
void tvc_print_ready(struct tvc_print *p);

/* ---- stdout ---------------------------------------------------------------
 */

/* Line ends belong at the begin and the end of fmt; what arguments bring is
 * made printable. The same holds for all that take fmt. */
void tvc_out(struct tvc_print *p, const char *fmt, ...) TV_PRINTF(2, 3);
/* Bytes as they are. */
void tvc_out_bytes(struct tvc_print *p, const void *data, size_t n);
/* One JSON document and a newline; takes over the reference. */
void tvc_out_json(struct tvc_print *p, json_t *doc);
/* Numbers of 0 and more in decimal with `between` (at most 16 bytes) between
 * them. printf and jansson take longer for each than the tokenizer does. */
void tvc_out_ids(struct tvc_print *p, const int32_t *ids, size_t n,
                 const char *between);
/* tvc_out_json of doc with ids as its last member `key`, the same bytes: only
 * the numbers are not jansson's. */
void tvc_out_json_ids(struct tvc_print *p, json_t *doc, const char *key,
                      const int32_t *ids, size_t n);
/* False when nobody can receive more output: long printing may stop. */
bool tvc_out_open(const struct tvc_print *p);
/* Writes what is buffered. IO (with the reason) when output was lost, but OK
 * when the reader closed its end: it has what it wanted. */
TV_NODISCARD enum tv_err tvc_out_flush(struct tvc_print *p,
                                       struct tv_error *err);

/* ---- stderr ---------------------------------------------------------------
 */

/* A line for people: not with -q, not with --json. */
void tvc_say(struct tvc_print *p, const char *fmt, ...) TV_PRINTF(2, 3);
/* The same, but also with -q: what must not be missed. Not with --json. */
void tvc_notice(struct tvc_print *p, const char *fmt, ...) TV_PRINTF(2, 3);
/* "tool: note: ..." under the same rule. */
void tvc_note(struct tvc_print *p, const char *fmt, ...) TV_PRINTF(2, 3);
/* "tool: warning: ..." also with -q, not with --json. */
void tvc_warn(struct tvc_print *p, const char *fmt, ...) TV_PRINTF(2, 3);
/* "WHERE: error: MESSAGE", or the tool's name where `where` is "". */
enum tvc_grade { TVC_ERROR, TVC_WARNING, TVC_NOTE };
void tvc_problem(struct tvc_print *p, enum tvc_grade grade, const char *where,
                 const char *message);
/* Error with its hint; a JSON document with --json. problems (may be NULL) is
 * taken over and becomes its member "problems". */
void tvc_error_full(struct tvc_print *p, const struct tv_error *e,
                    json_t *problems);
void tvc_error(struct tvc_print *p, const struct tv_error *e);
/* Bytes straight to stderr: for signal handlers, which may not use stdio. */
void tvc_raw_stderr(const char *data, size_t n);
/* Progress line for a terminal: replaces the one before; NULL removes it. */
void tvc_bar(struct tvc_print *p, const char *text);
/* One progress line of its own, also with --json. */
void tvc_progress_line(struct tvc_print *p, const char *text);

/* ---- tables ---------------------------------------------------------------
 */

struct tvc_table {
    const char *align; /* one letter per column: l or r */
    size_t n_columns;
    char **cells; /* header row first */
    size_t n, cap;
    bool failed;
};
/* headers: n_columns strings. */
void tvc_table_begin(struct tvc_table *t, const char *align,
                     const char *const *headers);
void tvc_table_cell(struct tvc_table *t, const char *fmt, ...) TV_PRINTF(2, 3);
/* Prints to stdout (or, where asked, to stderr as tvc_say) and frees. */
void tvc_table_text(struct tvc_table *t, const char *text);
TV_NODISCARD enum tv_err tvc_table_end(struct tvc_print *p, struct tvc_table *t,
                                       struct tv_error *err);
void tvc_table_free(struct tvc_table *t); /* of one that is not printed */

/* ---- values ---------------------------------------------------------------
 */

/* "1,234,567" into dst (cap >= 32); returns dst. */
char *tvc_count(uint64_t n, char *dst, size_t cap);
/* "3m12s", "1h05m", "4.2s" into dst (cap >= 32). */
char *tvc_duration(double seconds, char *dst, size_t cap);
/* Strings of any bytes: what is no UTF-8 becomes U+FFFD. New reference. */
json_t *tvc_json_string(const char *s);
json_t *tvc_json_u64(uint64_t v);
/* null for NaN and infinities, which JSON has not. */
json_t *tvc_json_real(double v);
/* A time or a rate, to a tenth of a millisecond: what the clock says shall not
 * decide with how many digits the other numbers of a document are written. */
json_t *tvc_json_measured(double v);

#endif
