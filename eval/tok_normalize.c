/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_normalize.c - normalizers of tokenizer.json, a flat chain.
 */
#include <string.h>

#include <utf8proc.h>

#include "tv/alloc.h"

#include "tok.h"

#define NORMS_MAX 64u
#define TEXT_MAX  ((size_t)1 << 40)

static enum tv_err bad(const char *type, struct tv_error *err)
{
    return tv_error_set(err, TV_E_CORRUPT,
                        "tokenizer.json: malformed normalizer \"%s\"", type);
}

static enum tv_err copy_text(const json_t *v, const char *type,
                             struct tve_norm *out, struct tv_error *err)
{
    if (!json_is_string(v))
        return bad(type, err);
    out->n = json_string_length(v);
    out->text = tv_strndup(json_string_value(v), out->n);
    if (!out->text)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    return TV_OK;
}

static enum tv_err load_replace(const json_t *j, struct tve_norm *out,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const json_t *const pattern = json_object_get(j, "pattern");
    const char *text = NULL;
    size_t n = 0;
    bool literal = true;

    TV_TRY(tve_json_str(pattern, "String", &text, &n, err));
    if (!text) {
        literal = false;
        TV_TRY(tve_json_str(pattern, "Regex", &text, &n, err));
    }
    if (!text) {
        rc = bad("Replace", err);
        goto out;
    }
    TV_TRY(copy_text(json_object_get(j, "content"), "Replace", out, err));
    TV_TRY(tve_regex_open(text, literal, err, &out->regex));
out:
    return rc;
}

static enum tv_err load_one(const json_t *j, struct tve_norms *out,
                            unsigned depth, struct tv_error *err)
{
    static const struct {
        const char *name;
        enum tve_norm_kind kind;
    } kinds[] = {
        {"NFC", TVE_NORM_NFC},         {"NFD", TVE_NORM_NFD},
        {"NFKC", TVE_NORM_NFKC},       {"NFKD", TVE_NORM_NFKD},
        {"Prepend", TVE_NORM_PREPEND}, {"Replace", TVE_NORM_REPLACE},
        {"Strip", TVE_NORM_STRIP},     {"Lowercase", TVE_NORM_LOWERCASE},
    };
    enum tv_err rc = TV_OK;
    const char *type = NULL;
    size_t n = 0;
    struct tve_norm *norm = NULL;

    TV_TRY(tve_json_str(j, "type", &type, &n, err));
    if (!type) {
        rc = bad("?", err);
        goto out;
    }
    if (!strcmp(type, "Sequence")) {
        const json_t *const list = json_object_get(j, "normalizers");
        if (!json_is_array(list) || depth > 8) {
            rc = bad(type, err);
            goto out;
        }
        for (size_t i = 0; i < json_array_size(list); i++)
            TV_TRY(load_one(json_array_get(list, i), out, depth + 1, err));
        goto out;
    }
    if (out->n == NORMS_MAX) {
        rc = bad(type, err);
        goto out;
    }
    norm = &out->items[out->n];
    for (size_t i = 0; i < sizeof(kinds) / sizeof(kinds[0]); i++) {
        if (strcmp(type, kinds[i].name))
            continue;
        norm->kind = kinds[i].kind;
        out->n++; /* from here on tve_norms_free releases it */
        if (norm->kind == TVE_NORM_PREPEND)
            TV_TRY(copy_text(json_object_get(j, "prepend"), type, norm, err));
        if (norm->kind == TVE_NORM_REPLACE)
            TV_TRY(load_replace(j, norm, err));
        if (norm->kind == TVE_NORM_STRIP) {
            TV_TRY(tve_json_bool(j, "strip_left", true, &norm->left, err));
            TV_TRY(tve_json_bool(j, "strip_right", true, &norm->right, err));
        }
        goto out;
    }
    rc = tv_error_set(err, TV_E_UNSUPPORTED,
                      "tokenizer.json: normalizer \"%.100s\" is not supported",
                      type);
out:
    return rc;
}

enum tv_err tve_norms_load(const json_t *j, struct tve_norms *out,
                           struct tv_error *err)
{
    tv_buf_init(&out->a, TEXT_MAX);
    tv_buf_init(&out->b, TEXT_MAX);
    if (!j || json_is_null(j))
        return TV_OK;
    out->items = tv_calloc(NORMS_MAX, sizeof(*out->items));
    if (!out->items)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    return load_one(j, out, 0, err);
}

void tve_norms_free(struct tve_norms *ns)
{
    for (size_t i = 0; i < ns->n; i++) {
        tve_regex_close(ns->items[i].regex);
        tv_free(ns->items[i].text);
    }
    tv_free(ns->items);
    tv_buf_free(&ns->a);
    tv_buf_free(&ns->b);
    memset(ns, 0, sizeof(*ns));
}

static bool is_ascii(const char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)s[i] >= 0x80)
            return false;
    return true;
}

static enum tv_err normal_form(enum tve_norm_kind kind, const char *s, size_t n,
                               struct tv_buf *out, struct tv_error *err)
{
    int options = UTF8PROC_STABLE;
    utf8proc_uint8_t *result = NULL;
    utf8proc_ssize_t len = 0;

    if (is_ascii(s, n)) {
        tv_buf_add(out, s, n);
        return tv_buf_ok(out, err);
    }
    if (kind == TVE_NORM_NFC || kind == TVE_NORM_NFKC)
        options |= UTF8PROC_COMPOSE;
    else
        options |= UTF8PROC_DECOMPOSE;
    if (kind == TVE_NORM_NFKC || kind == TVE_NORM_NFKD)
        options |= UTF8PROC_COMPAT;
    len = utf8proc_map((const utf8proc_uint8_t *)s, (utf8proc_ssize_t)n,
                       &result, (utf8proc_option_t)options);
    if (len < 0)
        return tv_error_set(
            err, len == UTF8PROC_ERROR_NOMEM ? TV_E_NOMEM : TV_E_CORRUPT,
            "normalizing text: %s", utf8proc_errmsg(len));
    tv_buf_add(out, result, (size_t)len);
    /* utf8proc allocates with malloc and asks its caller to release. */
    (free)(result);
    return tv_buf_ok(out, err);
}

static enum tv_err replace(struct tve_norm *norm, const char *s, size_t n,
                           struct tv_buf *out, struct tv_error *err)
{
    size_t at = 0, start = 0, end = 0;
    int found = 0;

    while (at < n &&
           (found = tve_regex_next(norm->regex, s, n, at, &start, &end)) > 0) {
        tv_buf_add(out, s + at, start - at);
        tv_buf_add(out, norm->text, norm->n);
        at = end;
    }
    if (found < 0)
        return tve_regex_error(found, err);
    tv_buf_add(out, s + at, n - at);
    return tv_buf_ok(out, err);
}

static void lowercase(const char *s, size_t n, struct tv_buf *out)
{
    for (size_t i = 0; i < n;) {
        uint32_t cp = 0;
        char text[4];

        i += tve_char(s + i, &cp);
        if (cp == 0x130) { /* the one that becomes two characters */
            tv_buf_str(out, "i\xcc\x87");
            continue;
        }
        cp = (uint32_t)utf8proc_tolower((utf8proc_int32_t)cp);
        tv_buf_add(out, text, tve_char_put(cp, text));
    }
}

static void strip(const struct tve_norm *norm, const char **s, size_t *n)
{
    while (norm->left && *n > 0) {
        uint32_t cp = 0;
        const size_t len = tve_char(*s, &cp);
        if (!tve_is_space(cp))
            break;
        *s += len;
        *n -= len;
    }
    while (norm->right && *n > 0) {
        size_t p = *n;
        uint32_t cp = 0;
        do
            p--;
        while (p > 0 && ((unsigned char)(*s)[p] & 0xc0) == 0x80);
        tve_char(*s + p, &cp);
        if (!tve_is_space(cp))
            break;
        *n = p;
    }
}

enum tv_err tve_norms_run(struct tve_norms *ns, const char *s, size_t n,
                          const char **out, size_t *n_out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tv_buf *from = NULL; /* holds s */

    for (size_t i = 0; i < ns->n; i++) {
        struct tve_norm *const norm = &ns->items[i];
        struct tv_buf *const b = from == &ns->a ? &ns->b : &ns->a;

        if (norm->kind == TVE_NORM_STRIP) {
            strip(norm, &s, &n);
            continue;
        }
        b->n_bytes = 0;
        switch (norm->kind) {
        case TVE_NORM_NFC:
        case TVE_NORM_NFD:
        case TVE_NORM_NFKC:
        case TVE_NORM_NFKD:
            TV_TRY(normal_form(norm->kind, s, n, b, err));
            break;
        case TVE_NORM_PREPEND:
            if (n > 0)
                tv_buf_add(b, norm->text, norm->n);
            tv_buf_add(b, s, n);
            break;
        case TVE_NORM_REPLACE:
            TV_TRY(replace(norm, s, n, b, err));
            break;
        case TVE_NORM_LOWERCASE:
            lowercase(s, n, b);
            break;
        case TVE_NORM_STRIP:
            break;
        }
        TV_TRY(tv_buf_ok(b, err));
        s = b->data ? b->data : "";
        n = b->n_bytes;
        from = b;
    }
    *out = s;
    *n_out = n;
out:
    return rc;
}
