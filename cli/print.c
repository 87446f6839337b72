/* SPDX-License-Identifier: Apache-2.0 */
/*
 * print.c - the only writer to stdout and stderr. See print.h for the rules.
 */
#include "print.h"

#include <assert.h>
#include <errno.h>
#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "tv/alloc.h"
#include "tv/text.h"

#define RED    "\033[1;31m"
#define YELLOW "\033[1;33m"
#define CYAN   "\033[36m"
#define PLAIN  "\033[0m"

void tvc_print_init(struct tvc_print *p, const char *tool)
{
    *p = (struct tvc_print){.tool = tool};
    (void)pthread_mutex_init(&p->lock, NULL);
}

void tvc_print_free(struct tvc_print *p)
{
    (void)pthread_mutex_destroy(&p->lock);
}

void tvc_print_ready(struct tvc_print *p)
{
    const bool tty = isatty(STDERR_FILENO) == 1;
    const char *term = getenv("TERM");
    const char *no_color = getenv("NO_COLOR");
    const bool dumb = !term || strcmp(term, "dumb") == 0;

    if (p->color_mode == TVC_COLOR_AUTO)
        p->color = tty && !dumb && !(no_color && *no_color);
    else
        p->color = p->color_mode == TVC_COLOR_ALWAYS;
    if (p->progress == TVC_PROGRESS_AUTO) {
        if (p->quiet || (p->json && !tty))
            p->progress = TVC_PROGRESS_NONE;
        else
            p->progress = tty && !dumb ? TVC_PROGRESS_BAR : TVC_PROGRESS_PLAIN;
    }
}

/* ---- stdout ---------------------------------------------------------------
 */

void tvc_out_bytes(struct tvc_print *p, const void *data, size_t n)
{
    if (!tvc_out_open(p) || n == 0)
        return;
    errno = 0;
    if (fwrite(data, 1, n, stdout) == n)
        return;
    p->out_errno = errno ? errno : EIO;
    p->out_closed = p->out_errno == EPIPE;
}

bool tvc_out_open(const struct tvc_print *p)
{
    return p->out_errno == 0;
}

/* Only characters of ASCII that can be shown: nothing has to be looked up. */
static bool is_plain(const char *s, size_t n)
{
    bool plain = true;
    for (size_t i = 0; i < n; i++)
        plain = plain && s[i] >= ' ' && s[i] <= '~';
    return plain;
}

/* Controls become '?'; line ends too, but for the first `lead` and the last
 * `trail` bytes, which the caller wrote. Owned, NULL when out of memory. */
static char *clean_text(const char *s, size_t lead, size_t trail)
{
    const size_t n = strlen(s);
    if (is_plain(s + lead, n - lead - trail))
        return tv_strndup(s, n);
    char *clean = tv_alloc(n + 1);
    char *inner = tv_strndup(s + lead, n - lead - trail);
    if (!clean || !inner) {
        tv_free(clean);
        clean = NULL;
        goto out;
    }
    memcpy(clean, s, lead);
    tv_text_printable(inner, clean + lead, n + 1 - lead);
    const size_t used = lead + strlen(clean + lead);
    memcpy(clean + used, s + n - trail, trail + 1);
out:
    tv_free(inner);
    return clean;
}

/* Line ends at both ends of fmt are ours; all others come from arguments. */
static char *format_clean(const char *fmt, va_list ap)
{
    va_list again;
    char room[512];
    char *longer = NULL;
    va_copy(again, ap);
    const int n = vsnprintf(room, sizeof room, fmt, again);
    va_end(again);
    if (n < 0)
        return NULL;
    if ((size_t)n >= sizeof room) {
        longer = tv_alloc((size_t)n + 1);
        if (!longer)
            return NULL;
        (void)vsnprintf(longer, (size_t)n + 1, fmt, ap);
    }
    const size_t len = strlen(fmt);
    const size_t lead = strspn(fmt, "\n");
    const size_t trail = lead < len && fmt[len - 1] == '\n';
    char *clean = clean_text(longer ? longer : room, lead, trail);
    tv_free(longer);
    return clean;
}

void tvc_out(struct tvc_print *p, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    char *text = format_clean(fmt, ap);
    va_end(ap);
    if (text)
        tvc_out_bytes(p, text, strlen(text));
    else if (p->out_errno == 0)
        p->out_errno = ENOMEM;
    tv_free(text);
}

/* Fewest digits with which every real of the document reads back the same:
 * 0.3 shall not turn into 0.29999999999999999 where that buys nothing. */
static int real_digits(const json_t *v)
{
    int most = 15;
    if (json_is_real(v)) {
        char text[40];
        const double x = json_real_value(v);
        while (most < 17) {
            (void)snprintf(text, sizeof text, "%.*g", most, x);
            if (strtod(text, NULL) == x)
                break;
            most++;
        }
    } else if (json_is_array(v)) {
        for (size_t i = 0; i < json_array_size(v) && most < 17; i++) {
            const int d = real_digits(json_array_get(v, i));
            most = d > most ? d : most;
        }
    } else if (json_is_object(v)) {
        const char *key = NULL;
        json_t *value = NULL;
        json_object_foreach((json_t *)(uintptr_t)v, key, value)
        {
            const int d = real_digits(value);
            most = d > most ? d : most;
        }
    }
    return most;
}

static size_t json_flags(const json_t *doc, size_t indent)
{
    return JSON_INDENT(indent) | JSON_REAL_PRECISION((size_t)real_digits(doc));
}

static int json_to_stdout(const char *data, size_t n, void *arg)
{
    struct tvc_print *p = arg;
    tvc_out_bytes(p, data, n);
    return 0;
}

void tvc_out_json(struct tvc_print *p, json_t *doc)
{
    if (!doc ||
        json_dump_callback(doc, json_to_stdout, p, json_flags(doc, 2)) != 0) {
        if (p->out_errno == 0)
            p->out_errno = ENOMEM;
    }
    tvc_out_bytes(p, "\n", 1);
    json_decref(doc);
}

/* The digits of v, at the end of text; returns where they begin. */
static size_t put_digits(uint32_t v, char text[16])
{
    static const char pairs[] = "00010203040506070809"
                                "10111213141516171819"
                                "20212223242526272829"
                                "30313233343536373839"
                                "40414243444546474849"
                                "50515253545556575859"
                                "60616263646566676869"
                                "70717273747576777879"
                                "80818283848586878889"
                                "90919293949596979899";
    size_t at = 16;
    for (; v >= 100; v /= 100)
        memcpy(text + (at -= 2), pairs + 2 * (v % 100), 2);
    if (v >= 10)
        memcpy(text + (at -= 2), pairs + 2 * v, 2);
    else
        text[--at] = (char)('0' + v);
    return at;
}

void tvc_out_ids(struct tvc_print *p, const int32_t *ids, size_t n,
                 const char *between)
{
    enum { ROOM = 16384 };
    const size_t n_between = strlen(between);
    char part[ROOM + 32], text[32] = "";
    size_t at = 0;

    assert(n_between <= 16);
    for (size_t i = 0; i < n && tvc_out_open(p); i++) {
        assert(ids[i] >= 0);
        if (i > 0) {
            memcpy(part + at, between, n_between);
            at += n_between;
        }
        /* Sixteen bytes are copied with one instruction, ten with a call. */
        const size_t from = put_digits((uint32_t)ids[i], text);
        memcpy(part + at, text + from, 16);
        at += 16 - from;
        if (at > ROOM - 16) {
            tvc_out_bytes(p, part, at);
            at = 0;
        }
    }
    tvc_out_bytes(p, part, at);
}

static int json_to_buffer(const char *data, size_t n, void *arg)
{
    struct tv_buf *b = arg;
    tv_buf_add(b, data, n);
    return b->failed ? -1 : 0;
}

void tvc_out_json_ids(struct tvc_print *p, json_t *doc, const char *key,
                      const int32_t *ids, size_t n)
{
    /* What jansson writes for an empty list at the end of the document. */
    static const char end[] = "[]\n}";
    const size_t n_end = sizeof end - 1;
    struct tv_buf text;

    tv_buf_init(&text, (size_t)1 << 30);
    if (!doc || json_object_set_new(doc, key, json_array()) != 0 ||
        json_dump_callback(doc, json_to_buffer, &text, json_flags(doc, 2)) !=
            0) {
        if (p->out_errno == 0)
            p->out_errno = ENOMEM;
        goto out;
    }
    assert(text.n_bytes > n_end &&
           memcmp(text.data + text.n_bytes - n_end, end, n_end) == 0);
    if (n == 0) {
        tvc_out_bytes(p, text.data, text.n_bytes);
    } else {
        tvc_out_bytes(p, text.data, text.n_bytes - n_end);
        tvc_out_bytes(p, "[\n    ", 6);
        tvc_out_ids(p, ids, n, ",\n    ");
        tvc_out_bytes(p, "\n  ]\n}", 6);
    }
    tvc_out_bytes(p, "\n", 1);
out:
    tv_buf_free(&text);
    json_decref(doc);
}

enum tv_err tvc_out_flush(struct tvc_print *p, struct tv_error *err)
{
    errno = 0;
    if (fflush(stdout) != 0 && p->out_errno == 0)
        p->out_errno = errno ? errno : EIO;
    if (p->out_errno == EPIPE)
        p->out_closed = true;
    if (p->out_errno == 0 || p->out_closed)
        return TV_OK;
    /* Whatever the reason, output that was lost is status 1: the full disk of
     * a redirection is no disk of ours. */
    char why[128] = "";
    return tv_error_set(err, TV_E_IO, "cannot write standard output: %s",
                        strerror_r(p->out_errno, why, sizeof why));
}

/* ---- stderr ---------------------------------------------------------------
 */

void tvc_raw_stderr(const char *data, size_t n)
{
    while (n > 0) {
        const ssize_t done = write(STDERR_FILENO, data, n);
        if (done <= 0)
            return;
        data += done;
        n -= (size_t)done;
    }
}

/* The lock is held. */
static void bar_clear(struct tvc_print *p)
{
    if (!p->bar_shown)
        return;
    (void)fputs("\r\033[K", stderr);
    p->bar_shown = false;
}

static void line_put(struct tvc_print *p, const char *color, const char *head,
                     const char *tag, const char *text)
{
    (void)pthread_mutex_lock(&p->lock);
    bar_clear(p);
    if (head)
        (void)fprintf(stderr, "%s: ", head);
    if (tag && p->color)
        (void)fprintf(stderr, "%s%s:%s ", color, tag, PLAIN);
    else if (tag)
        (void)fprintf(stderr, "%s: ", tag);
    (void)fprintf(stderr, "%s\n", text);
    (void)fflush(stderr);
    (void)pthread_mutex_unlock(&p->lock);
}

static void line_fmt(struct tvc_print *p, const char *color, const char *head,
                     const char *tag, const char *fmt, va_list ap)
{
    char *text = format_clean(fmt, ap);
    line_put(p, color, head, tag, text ? text : "out of memory");
    tv_free(text);
}

void tvc_say(struct tvc_print *p, const char *fmt, ...)
{
    if (p->quiet || p->json)
        return;
    va_list ap;
    va_start(ap, fmt);
    line_fmt(p, "", NULL, NULL, fmt, ap);
    va_end(ap);
}

void tvc_notice(struct tvc_print *p, const char *fmt, ...)
{
    if (p->json)
        return;
    va_list ap;
    va_start(ap, fmt);
    line_fmt(p, "", NULL, NULL, fmt, ap);
    va_end(ap);
}

void tvc_note(struct tvc_print *p, const char *fmt, ...)
{
    if (p->quiet || p->json)
        return;
    va_list ap;
    va_start(ap, fmt);
    line_fmt(p, CYAN, p->tool, "note", fmt, ap);
    va_end(ap);
}

void tvc_warn(struct tvc_print *p, const char *fmt, ...)
{
    if (p->json)
        return;
    va_list ap;
    va_start(ap, fmt);
    line_fmt(p, YELLOW, p->tool, "warning", fmt, ap);
    va_end(ap);
}

void tvc_problem(struct tvc_print *p, enum tvc_grade grade, const char *where,
                 const char *message)
{
    static const char *const colors[] = {RED, YELLOW, CYAN};
    static const char *const tags[] = {"error", "warning", "note"};
    if (p->json)
        return;
    char head[512];
    tv_text_printable(*where ? where : p->tool, head, sizeof head);
    char *text = clean_text(message, 0, 0);
    line_put(p, colors[grade], head, tags[grade],
             text ? text : "out of memory");
    tv_free(text);
}

static void error_document(struct tvc_print *p, const struct tv_error *e,
                           json_t *problems)
{
    json_t *doc = json_pack(
        "{s:{s:s, s:o, s:o}}", "error", "code", tv_err_name(e->code), "message",
        tvc_json_string(e->msg), "hint", tvc_json_string(e->hint));
    if (problems)
        (void)json_object_set_new(json_object_get(doc, "error"), "problems",
                                  problems);
    (void)pthread_mutex_lock(&p->lock);
    bar_clear(p);
    if (doc)
        (void)json_dumpf(doc, stderr, json_flags(doc, 0));
    (void)fputs("\n", stderr);
    (void)fflush(stderr);
    (void)pthread_mutex_unlock(&p->lock);
    json_decref(doc);
}

void tvc_error_full(struct tvc_print *p, const struct tv_error *e,
                    json_t *problems)
{
    if (p->json) {
        error_document(p, e, problems);
        return;
    }
    json_decref(problems);
    tvc_problem(p, TVC_ERROR, "", e->msg[0] ? e->msg : tv_err_name(e->code));
    if (e->hint[0]) {
        char *hint = clean_text(e->hint, 0, 0);
        line_put(p, CYAN, NULL, "  hint", hint ? hint : "");
        tv_free(hint);
    }
}

void tvc_error(struct tvc_print *p, const struct tv_error *e)
{
    tvc_error_full(p, e, NULL);
}

void tvc_bar(struct tvc_print *p, const char *text)
{
    (void)pthread_mutex_lock(&p->lock);
    bar_clear(p);
    if (text) {
        (void)fprintf(stderr, "\r%s\033[K", text);
        p->bar_shown = true;
    }
    (void)fflush(stderr);
    (void)pthread_mutex_unlock(&p->lock);
}

void tvc_progress_line(struct tvc_print *p, const char *text)
{
    line_put(p, "", NULL, NULL, text);
}

/* ---- tables ---------------------------------------------------------------
 */

static void cell_put(struct tvc_table *t, char *text)
{
    if (text && t->n == t->cap) {
        const size_t cap = t->cap ? 2 * t->cap : 64;
        char **more = tv_realloc(t->cells, cap * sizeof *more);
        if (more) {
            t->cells = more;
            t->cap = cap;
        } else {
            tv_free(text);
            text = NULL;
        }
    }
    if (text)
        t->cells[t->n++] = text;
    else
        t->failed = true;
}

void tvc_table_begin(struct tvc_table *t, const char *align,
                     const char *const *headers)
{
    *t = (struct tvc_table){.align = align, .n_columns = strlen(align)};
    for (size_t i = 0; i < t->n_columns; i++)
        cell_put(t, tv_strdup(headers[i]));
}

void tvc_table_cell(struct tvc_table *t, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    char *text = t->failed ? NULL : format_clean(fmt, ap);
    va_end(ap);
    cell_put(t, text);
}

void tvc_table_text(struct tvc_table *t, const char *text)
{
    cell_put(t, t->failed ? NULL : clean_text(text, 0, 0));
}

/* Characters, not bytes, so that columns line up. */
static size_t text_width(const char *s)
{
    size_t n = 0;
    for (; *s; s++)
        n += ((unsigned char)*s & 0xc0) != 0x80;
    return n;
}

/* A line on its way out, in pieces that stdio need not see one by one. */
struct line {
    struct tvc_print *p;
    size_t n;
    char text[1024];
};

static void line_flush(struct line *l)
{
    tvc_out_bytes(l->p, l->text, l->n);
    l->n = 0;
}

static void line_add(struct line *l, const char *text, size_t n)
{
    if (n > sizeof l->text - l->n)
        line_flush(l);
    if (n > sizeof l->text) {
        tvc_out_bytes(l->p, text, n);
        return;
    }
    memcpy(l->text + l->n, text, n);
    l->n += n;
}

static void line_pad(struct line *l, size_t n)
{
    static const char blank[] = "                                ";
    while (n > 0) {
        const size_t now = n < sizeof blank - 1 ? n : sizeof blank - 1;
        line_add(l, blank, now);
        n -= now;
    }
}

static void row_print(struct line *l, const struct tvc_table *t,
                      const size_t *width, size_t first)
{
    for (size_t c = 0; c < t->n_columns; c++) {
        const char *text = t->cells[first + c];
        const size_t pad = width[c] - text_width(text);
        const bool last = c + 1 == t->n_columns;
        if (t->align[c] == 'r')
            line_pad(l, pad);
        line_add(l, text, strlen(text));
        if (t->align[c] != 'r' && !last)
            line_pad(l, pad);
        if (!last)
            line_add(l, "  ", 2);
    }
    line_add(l, "\n", 1);
}

void tvc_table_free(struct tvc_table *t)
{
    for (size_t i = 0; i < t->n; i++)
        tv_free(t->cells[i]);
    tv_free(t->cells);
    *t = (struct tvc_table){0};
}

enum tv_err tvc_table_end(struct tvc_print *p, struct tvc_table *t,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct line l = {.p = p};
    size_t *width = tv_calloc(t->n_columns, sizeof *width);
    if (t->failed || !width) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory for a table");
        goto out;
    }
    for (size_t i = 0; i < t->n; i++) {
        const size_t w = text_width(t->cells[i]);
        if (w > width[i % t->n_columns])
            width[i % t->n_columns] = w;
    }
    for (size_t i = 0; i + t->n_columns <= t->n; i += t->n_columns)
        row_print(&l, t, width, i);
    line_flush(&l);
out:
    tv_free(width);
    tvc_table_free(t);
    return rc;
}

/* ---- values ---------------------------------------------------------------
 */

char *tvc_count(uint64_t n, char *dst, size_t cap)
{
    char digits[24];
    const int len = snprintf(digits, sizeof digits, "%" PRIu64, n);
    size_t used = 0;
    for (int i = 0; i < len && used + 2 < cap; i++) {
        if (i > 0 && (len - i) % 3 == 0)
            dst[used++] = ',';
        dst[used++] = digits[i];
    }
    dst[used] = '\0';
    return dst;
}

char *tvc_duration(double seconds, char *dst, size_t cap)
{
    if (!(seconds >= 0) || seconds > 1e9) {
        (void)snprintf(dst, cap, "?");
        return dst;
    }
    const unsigned long s = (unsigned long)(seconds + 0.5);
    if (seconds < 0.0995)
        (void)snprintf(dst, cap, "%.0f ms", seconds * 1e3);
    else if (seconds < 9.95)
        (void)snprintf(dst, cap, "%.1fs", seconds);
    else if (s < 60)
        (void)snprintf(dst, cap, "%lus", s);
    else if (s < 3600)
        (void)snprintf(dst, cap, "%lum%02lus", s / 60, s % 60);
    else
        (void)snprintf(dst, cap, "%luh%02lum", s / 3600, s / 60 % 60);
    return dst;
}

json_t *tvc_json_string(const char *s)
{
    static const char replacement[] = "\xef\xbf\xbd";
    const size_t n = strlen(s);
    if (tv_utf8_valid(s, n))
        return json_stringn(s, n);
    struct tv_buf b;
    tv_buf_init(&b, 4 * n + 4);
    for (size_t i = 0; i < n;) {
        size_t len = n - i < 4 ? n - i : 4;
        while (len > 0 && !(tv_utf8_valid(s + i, len) &&
                            (len == 1 || (unsigned char)s[i] >= 0x80)))
            len--;
        if (len > 0)
            tv_buf_add(&b, s + i, len);
        else
            tv_buf_str(&b, replacement);
        i += len > 0 ? len : 1;
    }
    json_t *v = b.failed ? NULL : json_stringn(b.data, b.n_bytes);
    tv_buf_free(&b);
    return v;
}

json_t *tvc_json_u64(uint64_t v)
{
    return json_integer(v > INT64_MAX ? INT64_MAX : (json_int_t)v);
}

json_t *tvc_json_real(double v)
{
    return isfinite(v) ? json_real(v) : json_null();
}

json_t *tvc_json_measured(double v)
{
    return tvc_json_real(round(v * 1e4) / 1e4);
}
