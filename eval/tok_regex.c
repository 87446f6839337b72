/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_regex.c - regular expressions of tokenizer.json on PCRE2.
 *
 * The files are written for Oniguruma (Ruby syntax). The dialects agree on
 * nearly everything that tokenizers use; the rest is rewritten here:
 *   \w          Oniguruma: letters, marks, digits, connectors; PCRE2 leaves
 *               marks out
 *   \uHHHH      written \x{HHHH}
 *   \h          hexadecimal digit, not horizontal space
 *   [a[bc]d]    a union; brackets inside a class are dropped
 *   ^ $         match at line ends always (PCRE2_MULTILINE)
 * and what has another meaning without a rewriting is refused: intersections
 * ("&&"), negated classes inside classes, intervals followed by "+" (possessive
 * in PCRE2, a loop in Ruby).
 */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/text.h"

#include "tok.h"

#define JIT_STACK_MAX (8u << 20)
#define WORD_CLASS    "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}"

struct tve_regex {
    pcre2_general_context *general;
    pcre2_code *code;
    pcre2_match_data *match;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
    bool jit;
};

static void *regex_alloc(size_t n, void *arg)
{
    (void)arg;
    return tv_alloc(n);
}

static void regex_free(void *p, void *arg)
{
    (void)arg;
    tv_free(p);
}

static enum tv_err refuse(const char *pattern, const char *what,
                          struct tv_error *err)
{
    return tv_error_set(err, TV_E_UNSUPPORTED,
                        "tokenizer.json: the regular expression \"%.200s\" "
                        "uses %s, which is not supported",
                        pattern, what);
}

/* Length of an interval "{n}", "{n,}" or "{n,m}" at s, 0 when it is none. */
static size_t interval(const char *s)
{
    size_t i = 1, digits = 0;

    for (; (s[i] >= '0' && s[i] <= '9') || s[i] == ','; i++)
        digits++;
    return digits > 0 && s[i] == '}' ? i + 1 : 0;
}

static enum tv_err rewrite(const char *p, struct tv_buf *out,
                           struct tv_error *err)
{
    const char *const pattern = p;
    unsigned depth = 0; /* of character classes */

    while (*p) {
        const size_t n = tve_char_bytes((unsigned char)*p);

        if (*p == '\\' && p[1]) {
            if (p[1] == 'w') {
                tv_buf_str(out, depth ? WORD_CLASS : "[" WORD_CLASS "]");
            } else if (p[1] == 'W' && !depth) {
                tv_buf_str(out, "[^" WORD_CLASS "]");
            } else if (p[1] == 'h') {
                tv_buf_str(out, depth ? "0-9a-fA-F" : "[0-9a-fA-F]");
            } else if (p[1] == 'u') {
                if (strspn(p + 2, "0123456789abcdefABCDEF") < 4)
                    return refuse(pattern, "a malformed \\u", err);
                tv_buf_fmt(out, "\\x{%.4s}", p + 2);
                p += 4;
            } else if (p[1] == 'H' || (p[1] == 'W' && depth) || p[1] == 'b' ||
                       p[1] == 'B') {
                const char what[3] = {'\\', p[1], '\0'};
                return refuse(pattern, what, err);
            } else if ((p[1] == 'p' || p[1] == 'P' || p[1] == 'x') &&
                       p[2] == '{') {
                const char *const end = strchr(p, '}');
                if (!end)
                    return refuse(pattern, "an unterminated \\p{", err);
                tv_buf_add(out, p, (size_t)(end + 1 - p));
                p = end + 1;
                continue;
            } else {
                const size_t m = tve_char_bytes((unsigned char)p[1]);
                tv_buf_add(out, p, 1 + m);
                p += 1 + m;
                continue;
            }
            p += 2;
        } else if (depth == 0) {
            if (*p == '{') {
                const size_t len = interval(p);
                if (len && p[len] == '+')
                    return refuse(pattern, "an interval followed by +", err);
            }
            tv_buf_add(out, p, n);
            if (*p != '[') {
                p += n;
                continue;
            }
            depth = 1;
            if (*++p == '^')
                tv_buf_add(out, p++, 1);
            if (*p == ']') { /* first in a class: a literal */
                tv_buf_str(out, "\\]");
                p++;
            }
        } else if (*p == '[' && p[1] == ':') {
            const char *const end = strstr(p, ":]");
            if (!end)
                return refuse(pattern, "an unterminated [:", err);
            tv_buf_add(out, p, (size_t)(end + 2 - p));
            p = end + 2;
        } else if (*p == '[') {
            if (p[1] == '^')
                return refuse(pattern, "a negated class inside a class", err);
            depth++;
            p++;
        } else if (*p == ']') {
            if (--depth == 0)
                tv_buf_add(out, p, 1);
            p++;
        } else if (*p == '&' && p[1] == '&') {
            return refuse(pattern, "an intersection of classes (&&)", err);
        } else {
            tv_buf_add(out, p, n);
            p += n;
        }
    }
    return tv_buf_ok(out, err);
}

enum tv_err tve_regex_open(const char *pattern, bool literal,
                           struct tv_error *err, tve_regex **out)
{
    enum tv_err rc = TV_OK;
    tve_regex *re = tv_calloc(1, sizeof(*re));
    struct tv_buf text;
    int code = 0;
    PCRE2_SIZE at = 0;

    *out = NULL;
    tv_buf_init(&text, 1u << 20);
    if (!re) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (literal)
        tv_buf_str(&text, pattern);
    else
        TV_TRY(rewrite(pattern, &text, err));
    TV_TRY(tv_buf_ok(&text, err));
    re->general = pcre2_general_context_create(regex_alloc, regex_free, NULL);
    if (re->general) {
        pcre2_compile_context *const cc =
            pcre2_compile_context_create(re->general);
        if (cc) {
            re->code = pcre2_compile(
                (PCRE2_SPTR)(text.data ? text.data : ""), text.n_bytes,
                literal ? PCRE2_UTF | PCRE2_LITERAL
                        : PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE |
                              PCRE2_NEVER_BACKSLASH_C,
                &code, &at, cc);
            pcre2_compile_context_free(cc);
            if (!re->code && code != PCRE2_ERROR_NOMEMORY && code != 121) {
                PCRE2_UCHAR why[128] = "";
                pcre2_get_error_message(code, why, sizeof(why));
                rc = tv_error_set(err, TV_E_CORRUPT,
                                  "tokenizer.json: regular expression "
                                  "\"%.200s\": %s at offset %zu",
                                  pattern, (const char *)why, at);
                goto out;
            }
        }
    }
    if (re->code) {
        re->match = pcre2_match_data_create_from_pattern(re->code, re->general);
        re->context = pcre2_match_context_create(re->general);
    }
    if (!re->match || !re->context) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    /* Without executable memory the interpreter does it, only slower. */
    if (pcre2_jit_compile(re->code, PCRE2_JIT_COMPLETE) == 0) {
        re->stack =
            pcre2_jit_stack_create(32u << 10, JIT_STACK_MAX, re->general);
        if (re->stack) {
            pcre2_jit_stack_assign(re->context, NULL, re->stack);
            re->jit = true;
        }
    }
    *out = re;
    re = NULL;
out:
    tve_regex_close(re);
    tv_buf_free(&text);
    return rc;
}

void tve_regex_close(tve_regex *re)
{
    if (!re)
        return;
    pcre2_jit_stack_free(re->stack);
    pcre2_match_context_free(re->context);
    pcre2_match_data_free(re->match);
    pcre2_code_free(re->code);
    pcre2_general_context_free(re->general);
    tv_free(re);
}

int tve_regex_next(tve_regex *re, const char *s, size_t n, size_t at,
                   size_t *start, size_t *end)
{
    for (;;) {
        const PCRE2_SIZE *v = NULL;
        int rc = 0;

        if (re->jit)
            rc = pcre2_jit_match(re->code, (PCRE2_SPTR)s, n, at,
                                 PCRE2_NO_UTF_CHECK, re->match, re->context);
        else
            rc = pcre2_match(re->code, (PCRE2_SPTR)s, n, at, PCRE2_NO_UTF_CHECK,
                             re->match, re->context);
        if (rc == PCRE2_ERROR_NOMATCH)
            return 0;
        if (rc < 0)
            return rc;
        v = pcre2_get_ovector_pointer(re->match);
        if (v[1] > v[0]) {
            *start = v[0];
            *end = v[1];
            return 1;
        }
        if (v[1] >= n)
            return 0;
        at = v[1] + tve_char_bytes((unsigned char)s[v[1]]);
    }
}

enum tv_err tve_regex_error(int code, struct tv_error *err)
{
    PCRE2_UCHAR why[128] = "";

    pcre2_get_error_message(code, why, sizeof(why));
    return tv_error_set(
        err, code == PCRE2_ERROR_NOMEMORY ? TV_E_NOMEM : TV_E_UNSUPPORTED,
        "a regular expression of tokenizer.json gives up on "
        "this text: %s",
        (const char *)why);
}
