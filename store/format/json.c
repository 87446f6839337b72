/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json.c - thin helpers over jansson.
 *
 * jansson recurses 2048 levels and builds a tree of about ten times the text,
 * so hostile text is bounded first by a scan that knows only strings, brackets
 * and commas: depth, members of the outermost object, values in all. The scan
 * accepts more than JSON; jansson alone decides what is JSON.
 */
#include "json_util.h"

#include <pthread.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/format.h"

const struct tv_json_limits tv_json_side_limits = {
    .bytes_max = TV_JSON_MAX,
    .depth_max = TV_JSON_DEPTH_MAX,
    .members_max = 1u << 16,
    .values_per_member = 0,
    .values_free = 1u << 22,
};

/*
 * jansson's lexer ignores that its token buffer could not grow (load.c,
 * lex_save; up to 2.14 at least). A character is left out then, and the parse
 * goes on with another name, another number, or past the end of a string. So
 * its allocator is watched while we parse. After the first failure the buffer's
 * requests, which are powers of two from 32, are served from a reserve that is
 * large enough for the longest token; all others fail, which jansson handles,
 * and the result is thrown away. Otherwise the functions that were set before
 * stay in charge.
 */
struct ward { /* of one tv_json_load */
    char *reserve;
    size_t n, used;
    bool starved;
};

static pthread_once_t watch_once = PTHREAD_ONCE_INIT;
static json_malloc_t real_malloc;
static json_free_t real_free;
static _Thread_local struct ward *ward;

static void *watched_malloc(size_t n)
{
    void *p = NULL;

    if (ward == NULL || !ward->starved)
        p = real_malloc(n);
    if (p != NULL || ward == NULL)
        return p;
    ward->starved = true;
    if (n < 32 || (n & (n - 1)) != 0 || n > ward->n - ward->used)
        return NULL;
    p = ward->reserve + ward->used;
    ward->used += n;
    return p;
}

static void watched_free(void *p)
{
    if (ward != NULL && (uintptr_t)p >= (uintptr_t)ward->reserve &&
        (uintptr_t)p < (uintptr_t)ward->reserve + ward->n)
        return;
    real_free(p);
}

static void watch_begin(void)
{
    json_get_alloc_funcs(&real_malloc, &real_free);
    json_set_alloc_funcs(watched_malloc, watched_free);
}

/* json_loadb; *starved when memory was short, and then the result is NULL. */
static json_t *load(const char *data, size_t n, size_t longest,
                    json_error_t *je, bool *starved)
{
    struct ward w = {NULL, 4 * longest + 4096, 0, false};
    json_t *root = NULL;

    (void)pthread_once(&watch_once, watch_begin);
    w.reserve = (char *)tv_alloc_aligned(w.n);
    if (w.reserve == NULL) {
        *starved = true;
        return NULL;
    }
    ward = &w;
    root = json_loadb(data, n, JSON_REJECT_DUPLICATES, je);
    if (w.starved) {
        json_decref(root);
        root = NULL;
    }
    ward = NULL;
    *starved = w.starved;
    tv_free(w.reserve);
    return root;
}

static enum tv_err scan(const char *data, size_t n, const char *label,
                        size_t base, const struct tv_json_limits *lim,
                        size_t *longest, struct tv_error *err)
{
    unsigned depth = 0;
    bool in_string = false;
    size_t members = 1;
    size_t values = 1;
    size_t token = 0; /* where the string, or the text behind a mark, began */

    *longest = 0;
    for (size_t i = 0; i < n; i++) {
        const char c = data[i];

        if (i - token > *longest)
            *longest = i - token;
        if (in_string) {
            if (c == '\\')
                i++;
            else if (c == '"')
                in_string = false;
            continue;
        }
        switch (c) {
        case '"':
            in_string = true;
            token = i;
            break;
        case ':':
        case ' ':
        case '\t':
        case '\n':
        case '\r':
            token = i;
            break;
        case '{':
        case '[':
            token = i;
            depth++;
            values++;
            if (depth > lim->depth_max)
                return tv_error_set(err, TV_E_CORRUPT,
                                    "%s: JSON nested deeper than %u levels at "
                                    "byte %zu",
                                    label, lim->depth_max, base + i);
            break;
        case '}':
        case ']':
            token = i;
            if (depth > 0)
                depth--;
            break;
        case ',':
            token = i;
            values++;
            if (depth == 1 && ++members > lim->members_max)
                return tv_error_set(err, TV_E_CORRUPT,
                                    "%s: JSON object has more than %zu members "
                                    "(byte %zu)",
                                    label, lim->members_max, base + i);
            break;
        default:
            break;
        }
    }
    if (n - token > *longest)
        *longest = n - token;
    /* Cannot overflow: members <= members_max, both limits are constants. */
    if (values > lim->values_free + lim->values_per_member * members)
        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: JSON has %zu values, too many for %zu members",
                            label, values, members);
    return TV_OK;
}

/* Byte position of the first character that is no UTF-8, for the message. */
static size_t utf8_bad_at(const char *data, size_t n)
{
    size_t good = 0;

    while (good < n) {
        size_t len = 1;
        bool ok = false;

        for (len = 1; len <= 4 && len <= n - good && !ok; len++)
            ok = tv_utf8_valid(data + good, len);
        if (!ok)
            return good;
        good += len - 1;
    }
    return n;
}

enum tv_err tv_json_load(const char *data, size_t n, const char *label,
                         size_t base, const struct tv_json_limits *lim,
                         struct tv_error *err, json_t **out)
{
    json_error_t je;
    json_t *root = NULL;
    size_t longest = 0;
    bool starved = false;

    memset(&je, 0, sizeof je);
    if (n > lim->bytes_max)
        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: %zu bytes of JSON, the limit is %zu", label, n,
                            lim->bytes_max);
    if (!tv_utf8_valid(data, n))
        return tv_error_set(err, TV_E_CORRUPT, "%s: not UTF-8 at byte %zu",
                            label, base + utf8_bad_at(data, n));
    {
        const enum tv_err rc = scan(data, n, label, base, lim, &longest, err);
        if (rc != TV_OK)
            return rc;
    }
    root = load(data, n, longest, &je, &starved);
    if (starved)
        return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
    if (root == NULL) {
        struct tv_shown shown;

        return tv_error_set(err, TV_E_CORRUPT, "%s: bad JSON at byte %zu: %s",
                            label,
                            base + (je.position > 0 ? (size_t)je.position : 0),
                            tv_show(je.text, &shown));
    }
    if (!json_is_object(root)) {
        json_decref(root);
        return tv_error_set(err, TV_E_CORRUPT, "%s: not a JSON object", label);
    }
    *out = root;
    return TV_OK;
}

static int dump_piece(const char *buffer, size_t n, void *arg)
{
    struct tv_buf *b = (struct tv_buf *)arg;

    tv_buf_add(b, buffer, n);
    return b->failed ? -1 : 0;
}

void tv_json_dump(const json_t *json, size_t flags, struct tv_buf *b)
{
    if (json_dump_callback(json, dump_piece, b, flags) != 0)
        b->failed = true;
}

char *tv_json_text(const json_t *json, size_t flags)
{
    struct tv_buf b;

    tv_buf_init(&b, (size_t)1 << 32);
    tv_json_dump(json, flags, &b);
    tv_buf_add(&b, "", 1);
    if (b.failed) {
        tv_buf_free(&b);
        return NULL;
    }
    return b.data;
}

const char *tv_show(const char *name, struct tv_shown *buf)
{
    if (strlen(name) < sizeof buf->s)
        return tv_text_printable(name, buf->s, sizeof buf->s);
    tv_text_printable(name, buf->s, sizeof buf->s - 3);
    memcpy(buf->s + strlen(buf->s), "...", 4);
    return buf->s;
}
