/* SPDX-License-Identifier: Apache-2.0 */
/*
 * text.c - growable buffers, UTF-8, sizes, suggestions, name order.
 *
 * UTF-8 follows the Unicode standard's table of well-formed sequences (3-7).
 * Suggestions use the optimal string alignment distance (Damerau 1964): swaps
 * of neighbours count one, which is what mistyped words are made of.
 */
#include "tv/text.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

/* ---- growable buffers ---------------------------------------------------- */

void tv_buf_init(struct tv_buf *b, size_t max_bytes)
{
    *b = (struct tv_buf){.max_bytes = max_bytes};
}

void tv_buf_free(struct tv_buf *b)
{
    tv_free(b->data);
    *b = (struct tv_buf){.max_bytes = b->max_bytes};
}

/* Room for n more bytes and the NUL; on failure the buffer is marked. */
static bool make_room(struct tv_buf *b, size_t n)
{
    size_t want = 0;
    if (b->failed)
        return false;
    if (n > b->max_bytes - b->n_bytes || !tv_add_size(b->n_bytes, n, &want) ||
        !tv_add_size(want, 1, &want)) {
        b->failed = true;
        b->too_long = true;
        return false;
    }
    if (want <= b->cap_bytes)
        return true;
    size_t cap = b->cap_bytes < 64 ? 64 : b->cap_bytes;
    while (cap < want && cap <= SIZE_MAX / 2)
        cap *= 2;
    if (cap < want)
        cap = want;
    char *data = tv_realloc(b->data, cap);
    if (!data) {
        b->failed = true;
        return false;
    }
    b->data = data;
    b->cap_bytes = cap;
    return true;
}

void tv_buf_add(struct tv_buf *b, const void *data, size_t n)
{
    if (!make_room(b, n))
        return;
    if (n > 0)
        memcpy(b->data + b->n_bytes, data, n);
    b->n_bytes += n;
    b->data[b->n_bytes] = '\0';
}

void tv_buf_str(struct tv_buf *b, const char *s)
{
    tv_buf_add(b, s, strlen(s));
}

void tv_buf_fmt(struct tv_buf *b, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    const int n = vsnprintf(NULL, 0, fmt, ap);
    va_end(ap);
    if (n < 0) {
        b->failed = true;
        return;
    }
    if (!make_room(b, (size_t)n))
        return;
    va_start(ap, fmt);
    (void)vsnprintf(b->data + b->n_bytes, (size_t)n + 1, fmt, ap);
    va_end(ap);
    b->n_bytes += (size_t)n;
}

void tv_buf_le32(struct tv_buf *b, uint32_t v)
{
    unsigned char bytes[4];
    tv_put_le32(bytes, v);
    tv_buf_add(b, bytes, sizeof bytes);
}

void tv_buf_le64(struct tv_buf *b, uint64_t v)
{
    unsigned char bytes[8];
    tv_put_le64(bytes, v);
    tv_buf_add(b, bytes, sizeof bytes);
}

enum tv_err tv_buf_ok(const struct tv_buf *b, struct tv_error *err)
{
    if (!b->failed)
        return TV_OK;
    if (b->too_long)
        return tv_error_set(err, TV_E_INPUT,
                            "a text grew beyond its limit of %zu bytes",
                            b->max_bytes);
    return tv_error_set(err, TV_E_NOMEM,
                        "out of memory for a text of over %zu bytes",
                        b->n_bytes);
}

/* ---- UTF-8 --------------------------------------------------------------- */

/* Length of the well-formed sequence at s, 0 when there is none. */
static size_t utf8_length(const unsigned char *s, size_t n)
{
    static const struct {
        unsigned char lead_lo, lead_hi, next_lo, next_hi, length;
    } forms[] = {
        {0x00, 0x7f, 0x80, 0xbf, 1}, {0xc2, 0xdf, 0x80, 0xbf, 2},
        {0xe0, 0xe0, 0xa0, 0xbf, 3}, {0xe1, 0xec, 0x80, 0xbf, 3},
        {0xed, 0xed, 0x80, 0x9f, 3}, {0xee, 0xef, 0x80, 0xbf, 3},
        {0xf0, 0xf0, 0x90, 0xbf, 4}, {0xf1, 0xf3, 0x80, 0xbf, 4},
        {0xf4, 0xf4, 0x80, 0x8f, 4},
    };
    if (n == 0)
        return 0;
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        if (s[0] < forms[i].lead_lo || s[0] > forms[i].lead_hi)
            continue;
        const size_t length = forms[i].length;
        if (length > n)
            return 0;
        if (length > 1 && (s[1] < forms[i].next_lo || s[1] > forms[i].next_hi))
            return 0;
        for (size_t k = 2; k < length; k++)
            if (s[k] < 0x80 || s[k] > 0xbf)
                return 0;
        return length;
    }
    return 0;
}

bool tv_utf8_valid(const char *s, size_t n)
{
    const unsigned char *p = (const unsigned char *)s;
    while (n > 0) {
        const size_t length = utf8_length(p, n);
        if (length == 0)
            return false;
        p += length;
        n -= length;
    }
    return true;
}

/* Controls, and the marks that reorder text on a terminal. */
static bool is_unprintable(const unsigned char *s, size_t length)
{
    if (length == 1)
        return s[0] < 0x20 || s[0] == 0x7f;
    if (length == 2)
        return s[0] == 0xc2 && s[1] < 0xa0; /* U+0080..U+009F */
    if (length == 3 && s[0] == 0xe2 && s[1] == 0x80)
        return s[2] >= 0xa8 && s[2] <= 0xae; /* U+2028..U+202E */
    if (length == 3 && s[0] == 0xe2 && s[1] == 0x81)
        return s[2] >= 0xa6 && s[2] <= 0xa9; /* U+2066..U+2069 */
    return false;
}

char *tv_text_printable(const char *s, char *dst, size_t cap)
{
    const unsigned char *p = (const unsigned char *)s;
    size_t n = strlen(s);
    size_t used = 0;
    if (cap == 0)
        return dst;
    while (n > 0) {
        const size_t length = utf8_length(p, n);
        const bool bad = length == 0 || is_unprintable(p, length);
        const size_t eaten = length == 0 ? 1 : length;
        const size_t made = bad ? 1 : length;
        if (made >= cap - used)
            break;
        if (bad)
            dst[used] = '?';
        else
            memcpy(dst + used, p, made);
        used += made;
        p += eaten;
        n -= eaten;
    }
    dst[used] = '\0';
    return dst;
}

/* ---- sizes --------------------------------------------------------------- */

static char lower(char c)
{
    return c >= 'A' && c <= 'Z' ? (char)(c - 'A' + 'a') : c;
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* What one unit is worth, 0 when the suffix is unknown. */
static uint64_t unit_of(const char *suffix, bool mergekit_b)
{
    static const char letters[] = "kmgtpe";
    char unit[4] = "";
    const size_t n = strlen(suffix);
    if (n == 0)
        return 1;
    if (n >= sizeof unit)
        return 0;
    for (size_t i = 0; i < n; i++)
        unit[i] = lower(suffix[i]);
    if (strcmp(unit, "b") == 0)
        return mergekit_b ? UINT64_C(1000000000) : 0;
    const char *at = strchr(letters, unit[0]);
    if (!at)
        return 0;
    uint64_t step = 0;
    if (unit[1] == '\0' || strcmp(unit + 1, "b") == 0)
        step = 1000;
    else if (strcmp(unit + 1, "i") == 0 || strcmp(unit + 1, "ib") == 0)
        step = 1024;
    else
        return 0;
    uint64_t worth = 1;
    for (const char *p = letters; p <= at; p++)
        worth *= step;
    return worth;
}

enum tv_err tv_parse_bytes(const char *s, bool mergekit_b, uint64_t *bytes,
                           struct tv_error *err)
{
    const char *p = s;
    uint64_t whole = 0;
    uint64_t part = 0;
    uint64_t part_scale = 1;
    bool too_big = false;
    bool any = false;

    for (; is_digit(*p); p++) {
        any = true;
        if (!tv_mul_u64(whole, 10, &whole) ||
            !tv_add_u64(whole, (uint64_t)(*p - '0'), &whole))
            too_big = true;
    }
    if (any && *p == '.') {
        p++;
        any = is_digit(*p);
        for (; is_digit(*p); p++) {
            /* Digits past the 18th are below one byte of any unit. */
            if (part_scale >= UINT64_C(1000000000000000000))
                continue;
            part = part * 10 + (uint64_t)(*p - '0');
            part_scale *= 10;
        }
    }
    if (any && *p == ' ')
        p++;
    const uint64_t unit = any ? unit_of(p, mergekit_b) : 0;
    if (unit == 0 || (unit == 1 && part != 0)) {
        const enum tv_err rc =
            tv_error_set(err, TV_E_USAGE, "'%s' is not a size", s);
        tv_error_hint(err, "sizes look like 500M, 500MB, 1.5GiB or 4096");
        return rc;
    }
    uint64_t total = 0;
    if (too_big || !tv_mul_u64(whole, unit, &total) ||
        !tv_add_u64(total,
                    (uint64_t)((unsigned __int128)part * unit / part_scale),
                    &total))
        return tv_error_set(err, TV_E_USAGE,
                            "the size '%s' does not fit 64 bits", s);
    *bytes = total;
    return TV_OK;
}

static char *format_bytes(uint64_t bytes, bool up, char *dst, size_t cap)
{
    static const char *const units[] = {"KiB", "MiB", "GiB",
                                        "TiB", "PiB", "EiB"};
    if (cap == 0)
        return dst;
    if (bytes < 1024) {
        (void)snprintf(dst, cap, "%" PRIu64 " B", bytes);
        return dst;
    }
    /* Tenths, rounded half up or up, one unit after the other; a value that
     * rounds to 1024.0 moves on to the next unit. */
    unsigned shift = 10;
    size_t i = 0;
    for (;;) {
        const uint64_t one = UINT64_C(1) << shift;
        const uint64_t whole = bytes >> shift;
        const uint64_t rest = bytes & (one - 1);
        const uint64_t tenths = (uint64_t)(((unsigned __int128)rest * 10 +
                                            (up ? one - 1 : one / 2)) >>
                                           shift);
        const uint64_t all = whole * 10 + tenths;
        if (all < 10240 || i + 1 == sizeof units / sizeof *units) {
            (void)snprintf(dst, cap, "%" PRIu64 ".%" PRIu64 " %s", all / 10,
                           all % 10, units[i]);
            return dst;
        }
        shift += 10;
        i++;
    }
}

char *tv_format_bytes(uint64_t bytes, char *dst, size_t cap)
{
    return format_bytes(bytes, false, dst, cap);
}

char *tv_format_bytes_up(uint64_t bytes, char *dst, size_t cap)
{
    return format_bytes(bytes, true, dst, cap);
}

char *tv_format_bytes_arg(uint64_t bytes, char *dst, size_t cap)
{
    char *space = NULL;

    format_bytes(bytes, true, dst, cap);
    space = cap > 0 ? strchr(dst, ' ') : NULL;
    if (space && strcmp(space, " B") == 0)
        *space = '\0'; /* a B alone may be mergekit's 10^9 */
    else if (space)
        memmove(space, space + 1, strlen(space + 1) + 1);
    return dst;
}

/* ---- suggestions --------------------------------------------------------- */

#define WORD_MAX 63u

/* People mix up case and the two dashes; neither counts as a mistake. */
static char fold(char c)
{
    return c == '-' ? '_' : lower(c);
}

static unsigned min_u(unsigned a, unsigned b)
{
    return a < b ? a : b;
}

/* Optimal string alignment distance; both at most WORD_MAX bytes. */
static unsigned distance(const char *a, size_t n, const char *b, size_t m)
{
    unsigned rows[3][WORD_MAX + 1];
    unsigned *before = rows[0];
    unsigned *above = rows[1];
    unsigned *row = rows[2];

    for (size_t j = 0; j <= m; j++)
        above[j] = (unsigned)j;
    for (size_t j = 0; j <= m; j++)
        before[j] = 0;
    for (size_t i = 1; i <= n; i++) {
        row[0] = (unsigned)i;
        for (size_t j = 1; j <= m; j++) {
            const char x = fold(a[i - 1]);
            const char y = fold(b[j - 1]);
            unsigned d = min_u(above[j] + 1, row[j - 1] + 1);
            d = min_u(d, above[j - 1] + (x != y));
            if (i > 1 && j > 1 && x == fold(b[j - 2]) && fold(a[i - 2]) == y)
                d = min_u(d, before[j - 2] + 1);
            row[j] = d;
        }
        unsigned *const spare = before;
        before = above;
        above = row;
        row = spare;
    }
    return above[m];
}

const char *tv_suggest(const char *word, const char *const *words, size_t n)
{
    const char *best = NULL;
    unsigned best_distance = 0;
    const size_t length = strlen(word);
    if (length == 0 || length > WORD_MAX)
        return NULL;
    for (size_t i = 0; i < n; i++) {
        const size_t other = strlen(words[i]);
        if (other == 0 || other > WORD_MAX)
            continue;
        /* A third of the shorter word, but one mistake even in short ones. */
        const size_t shorter = length < other ? length : other;
        const unsigned limit = shorter < 2   ? 0
                               : shorter < 6 ? 1
                                             : (unsigned)(shorter / 3);
        const unsigned d = distance(word, length, words[i], other);
        if (d <= limit && (!best || d < best_distance)) {
            best = words[i];
            best_distance = d;
        }
    }
    return best;
}

/* ---- name order ---------------------------------------------------------- */

/* Compares the runs of digits at *a and *b as numbers of any length and steps
 * over them. */
static int compare_runs(const char **a, const char **b)
{
    const char *x = *a;
    const char *y = *b;
    while (*x == '0')
        x++;
    while (*y == '0')
        y++;
    size_t n = 0;
    size_t m = 0;
    while (is_digit(x[n]))
        n++;
    while (is_digit(y[m]))
        m++;
    *a = x + n;
    *b = y + m;
    if (n != m)
        return n < m ? -1 : 1;
    return n == 0 ? 0 : memcmp(x, y, n);
}

int tv_name_compare(const char *a, const char *b)
{
    const char *x = a;
    const char *y = b;
    while (*x && *y) {
        if (is_digit(*x) && is_digit(*y)) {
            const int order = compare_runs(&x, &y);
            if (order != 0)
                return order;
            continue;
        }
        if (*x != *y)
            break;
        x++;
        y++;
    }
    if (*x != *y)
        return (unsigned char)*x < (unsigned char)*y ? -1 : 1;
    /* Equal as numbers: leading zeros decide, so that only identical names
     * are equal. */
    return strcmp(a, b);
}
