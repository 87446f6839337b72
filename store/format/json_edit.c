/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_edit.c - changes JSON documents and keeps the rest as it was written.
 *
 * jansson rounds fractions to double, prints them its own way and refuses
 * integers beyond 64 bits (tokenizer_config.json often has a model_max_length
 * of 10^30). So such numbers are handed to it as strings with a mark in front
 * and written back as they stood. So are NaN and Infinity, which are no JSON
 * but what Python writes (time_step_limit of Mamba 2). Text that needs no
 * change is handed back byte for byte.
 */
#include <string.h>

#include "json_util.h"
#include "tv/alloc.h"
#include "tv/format.h"

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory editing JSON");
}

/* Applies one edit; *changed is set when the document differs after it. */
static enum tv_err apply(json_t *root, const struct tv_json_edit *e,
                         bool *changed, struct tv_error *err)
{
    const json_t *old = json_object_get(root, e->key);
    json_t *now = NULL;

    if (e->kind == TV_EDIT_REMOVE) {
        if (old != NULL && json_object_del(root, e->key) == 0)
            *changed = true;
        return TV_OK;
    }
    if (old == NULL && e->only_if_present)
        return TV_OK;
    if (e->kind == TV_EDIT_INT)
        now = json_integer((json_int_t)e->i);
    else if (e->kind == TV_EDIT_BOOL)
        now = json_boolean(e->i != 0);
    else
        now = json_string(e->s);
    if (now == NULL)
        return no_memory(err);
    if (old != NULL && json_equal(old, now)) {
        json_decref(now);
        return TV_OK;
    }
    if (json_object_set_new(root, e->key, now) != 0)
        return no_memory(err);
    *changed = true;
    return TV_OK;
}

/* ---- numbers as they are written -------------------------------------------
 */

/* No tokenizer or config has such a text; a document that does would get a
 * number where it had a string of one. */
#define MARK       "\xee\x80\x80number:"
#define N_MARK     (sizeof(MARK) - 1)
#define DIGITS_MAX 18u /* fit 64 bits whatever they are */

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

static size_t digits(const char *s, size_t n)
{
    size_t i = 0;

    while (i < n && is_digit(s[i]))
        i++;
    return i;
}

/* Length of the word for a number that is none at s, 0: there is no such. */
static size_t word_at(const char *s, size_t n)
{
    static const char *const words[] = {"NaN", "Infinity", "-Infinity"};

    for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++) {
        const size_t m = strlen(words[i]);
        if (m <= n && !memcmp(s, words[i], m) &&
            (m == n || memchr(" \t\r\n,]}", s[m], 7) != NULL))
            return m;
    }
    return 0;
}

/* Is s a number, and one that jansson would not keep as it is? */
static bool is_fragile(const char *s, size_t n)
{
    const size_t sign = n > 0 && s[0] == '-' ? 1 : 0;
    const size_t whole = digits(s + sign, n - sign);
    size_t at = sign + whole;
    bool plain = whole <= DIGITS_MAX && !(sign == 1 && s[1] == '0');

    if (n > 0 && word_at(s, n) == n)
        return true;
    if (whole == 0 || (whole > 1 && s[sign] == '0'))
        return false;
    if (at < n && s[at] == '.') {
        const size_t more = digits(s + at + 1, n - at - 1);
        if (more == 0)
            return false;
        at += 1 + more;
        plain = false;
    }
    if (at < n && (s[at] == 'e' || s[at] == 'E')) {
        at++;
        if (at < n && (s[at] == '+' || s[at] == '-'))
            at++;
        const size_t more = digits(s + at, n - at);
        if (more == 0)
            return false;
        at += more;
        plain = false;
    }
    return at == n && !plain;
}

/* Behind the string that begins with the quote at i. */
static size_t behind_string(const char *s, size_t n, size_t i)
{
    for (i++; i < n && s[i] != '"'; i++)
        if (s[i] == '\\')
            i++;
    return i < n ? i + 1 : n;
}

/* Length of the number or the word for one at s. */
static size_t number_at(const char *s, size_t n)
{
    size_t end = word_at(s, n);

    while (end < n && (is_digit(s[end]) || s[end] == '-' || s[end] == '+' ||
                       s[end] == '.' || s[end] == 'e' || s[end] == 'E'))
        end++;
    return end;
}

/* Parses with numbers marked, all that jansson would not keep or words only. */
static enum tv_err parse_marked(const char *data, size_t n, const char *label,
                                bool only_words, struct tv_error *err,
                                struct json_t **out)
{
    enum tv_err rc = TV_OK;
    struct tv_buf b;
    size_t from = 0;

    tv_buf_init(&b, (size_t)TV_JSON_MAX);
    for (size_t i = 0; i < n;) {
        if (data[i] == '"') {
            i = behind_string(data, n, i);
            continue;
        }
        const size_t end = i + number_at(data + i, n - i);
        if (end > i && (only_words ? word_at(data + i, end - i) == end - i
                                   : is_fragile(data + i, end - i))) {
            tv_buf_add(&b, data + from, i - from);
            tv_buf_str(&b, "\"" MARK);
            tv_buf_add(&b, data + i, end - i);
            tv_buf_str(&b, "\"");
            from = end;
        }
        i = end > i ? end : i + 1;
    }
    if (from == 0) {
        rc = tv_json_load(data, n, label, 0, &tv_json_side_limits, err, out);
        goto out;
    }
    tv_buf_add(&b, data + from, n - from);
    if (b.too_long) {
        rc = tv_error_set(err, TV_E_CORRUPT, "%s: more than %u bytes of JSON",
                          label, TV_JSON_MAX);
        goto out;
    }
    TV_TRY(tv_buf_ok(&b, err));
    rc = tv_json_load(b.data, b.n_bytes, label, 0, &tv_json_side_limits, err,
                      out);
out:
    tv_buf_free(&b);
    return rc;
}

enum tv_err tv_json_parse(const char *data, size_t n, const char *label,
                          struct tv_error *err, struct json_t **out)
{
    return parse_marked(data, n, label, true, err, out);
}

enum tv_err tv_json_parse_exact(const char *data, size_t n, const char *label,
                                struct tv_error *err, struct json_t **out)
{
    return parse_marked(data, n, label, false, err, out);
}

enum tv_err tv_json_write_exact(const struct json_t *json, struct tv_error *err,
                                char **out, size_t *n_out)
{
    enum tv_err rc = TV_OK;
    struct tv_buf b;
    size_t to = 0;

    tv_buf_init(&b, 4 * (size_t)TV_JSON_MAX);
    tv_json_dump(json, JSON_INDENT(2), &b);
    tv_buf_str(&b, "\n");
    TV_TRY(tv_buf_ok(&b, err));
    /* In place: taking marks off only makes it shorter. */
    for (size_t i = 0; i < b.n_bytes;) {
        size_t end = i + 1;
        size_t skip = 0;

        if (b.data[i] == '"')
            end = behind_string(b.data, b.n_bytes, i);
        if (end - i > N_MARK + 2 && !memcmp(b.data + i + 1, MARK, N_MARK) &&
            b.data[end] != ':' &&
            is_fragile(b.data + i + 1 + N_MARK, end - i - 2 - N_MARK))
            skip = 1;
        const size_t at = skip ? i + 1 + N_MARK : i;
        const size_t keep = skip ? end - 1 - at : end - at;
        memmove(b.data + to, b.data + at, keep);
        to += keep;
        i = end;
    }
    b.data[to] = '\0';
    *out = b.data;
    *n_out = to;
    tv_buf_init(&b, 1);
out:
    tv_buf_free(&b);
    return rc;
}

enum tv_err tv_json_edit(const char *data, size_t n,
                         const struct tv_json_edit *edits, size_t n_edits,
                         struct tv_error *err, char **out, size_t *n_out)
{
    enum tv_err rc = TV_OK;
    json_t *root = NULL;
    bool changed = false;
    struct tv_buf b;

    tv_buf_init(&b, n + 1);
    TV_TRY(tv_json_parse_exact(data, n, "JSON document", err, &root));
    for (size_t i = 0; i < n_edits; i++)
        TV_TRY(apply(root, &edits[i], &changed, err));
    if (changed) {
        rc = tv_json_write_exact(root, err, out, n_out);
        goto out;
    }
    tv_buf_add(&b, data, n);
    TV_TRY(tv_buf_ok(&b, err));
    *out = b.data;
    *n_out = b.n_bytes;
    tv_buf_init(&b, 1);
out:
    json_decref(root);
    tv_buf_free(&b);
    return rc;
}
