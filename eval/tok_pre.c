/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_pre.c - pre-tokenizers: text to words.
 *
 * The steps form a chain; each cuts its piece and hands every part to the next
 * step, the last one to the BPE. So a text is walked once and no list of pieces
 * is kept. A step that changes text has a buffer of its own, which stays valid
 * while the steps behind it run.
 *
 * A final ByteLevel step does not map bytes to characters here: the BPE does,
 * and only for words it has not seen (tve_pres.byte_level).
 */
#include <string.h>

#include "tv/alloc.h"

#include "tok.h"

#define PRES_MAX 64u
#define TEXT_MAX ((size_t)1 << 40)

#define GPT2_PATTERN                                                           \
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|"       \
    "\\s+(?!\\S)|\\s+"

/* ---- loading ------------------------------------------------------------- */

static enum tv_err bad(const char *type, struct tv_error *err)
{
    return tv_error_set(err, TV_E_CORRUPT,
                        "tokenizer.json: malformed pre-tokenizer \"%s\"", type);
}

static enum tv_err add_step(struct tve_pres *out, enum tve_pre_kind kind,
                            struct tve_pre **p, struct tv_error *err)
{
    if (out->n == PRES_MAX)
        return tv_error_set(err, TV_E_UNSUPPORTED,
                            "tokenizer.json: more than %u pre-tokenizers",
                            PRES_MAX);
    *p = &out->items[out->n++];
    (*p)->kind = kind;
    (*p)->behavior = TVE_ISOLATED;
    tv_buf_init(&(*p)->prefixed, TEXT_MAX);
    tv_buf_init(&(*p)->changed, TEXT_MAX);
    return TV_OK;
}

static enum tv_err load_behavior(const json_t *j, const char *type,
                                 enum tve_behavior otherwise,
                                 enum tve_behavior *out, struct tv_error *err)
{
    static const char *const names[] = {"Removed", "Isolated",
                                        "MergedWithPrevious", "MergedWithNext",
                                        "Contiguous"};
    const char *name = NULL;
    size_t n = 0;
    const enum tv_err rc = tve_json_str(j, "behavior", &name, &n, err);

    if (rc != TV_OK)
        return rc;
    *out = otherwise;
    if (!name)
        return TV_OK;
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        if (!strcmp(name, names[i])) {
            *out = (enum tve_behavior)i;
            return TV_OK;
        }
    }
    return bad(type, err);
}

static enum tv_err load_split(const json_t *j, struct tve_pres *out,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const json_t *const pattern = json_object_get(j, "pattern");
    struct tve_pre *p = NULL;
    const char *text = NULL;
    size_t n = 0;
    bool literal = true;

    TV_TRY(tve_json_str(pattern, "String", &text, &n, err));
    if (!text) {
        literal = false;
        TV_TRY(tve_json_str(pattern, "Regex", &text, &n, err));
    }
    if (!text) {
        rc = bad("Split", err);
        goto out;
    }
    TV_TRY(add_step(out, TVE_PRE_SPLIT, &p, err));
    TV_TRY(load_behavior(j, "Split", TVE_ISOLATED, &p->behavior, err));
    TV_TRY(tve_json_bool(j, "invert", false, &p->invert, err));
    p->makes_words = !literal;
    TV_TRY(tve_regex_open(text, literal, err, &p->regex));
out:
    return rc;
}

static enum tv_err load_byte_level(const json_t *j, struct tve_pres *out,
                                   struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_pre *p = NULL;
    bool prefix_space = false, use_regex = true;

    TV_TRY(tve_json_bool(j, "add_prefix_space", true, &prefix_space, err));
    TV_TRY(tve_json_bool(j, "use_regex", true, &use_regex, err));
    /* Three things in one: prefix, split, mapping. The prefix goes first. */
    if (use_regex) {
        TV_TRY(add_step(out, TVE_PRE_SPLIT, &p, err));
        p->prefix_space = prefix_space;
        p->makes_words = true;
        TV_TRY(tve_regex_open(GPT2_PATTERN, false, err, &p->regex));
        prefix_space = false;
    }
    TV_TRY(add_step(out, TVE_PRE_BYTE_LEVEL, &p, err));
    p->prefix_space = prefix_space;
    p->maps = true;
out:
    return rc;
}

static enum tv_err load_metaspace(const json_t *j, struct tve_pres *out,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_pre *p = NULL;
    const char *rep = NULL, *scheme = NULL;
    size_t n = 0, n_scheme = 0;
    bool prefix = true;

    TV_TRY(add_step(out, TVE_PRE_METASPACE, &p, err));
    p->behavior = TVE_MERGED_NEXT;
    TV_TRY(tve_json_str(j, "replacement", &rep, &n, err));
    TV_TRY(tve_json_str(j, "prepend_scheme", &scheme, &n_scheme, err));
    TV_TRY(tve_json_bool(j, "add_prefix_space", true, &prefix, err));
    TV_TRY(tve_json_bool(j, "split", true, &p->split, err));
    if (!rep || n == 0 || n != tve_char_bytes((unsigned char)rep[0])) {
        rc = bad("Metaspace", err);
        goto out;
    }
    memcpy(p->rep, rep, n);
    if (scheme) {
        if (!strcmp(scheme, "always"))
            p->prepend = 2;
        else if (!strcmp(scheme, "first"))
            p->prepend = 1;
        else if (strcmp(scheme, "never"))
            rc = bad("Metaspace", err);
    } else {
        p->prepend = prefix ? 2 : 0;
    }
out:
    return rc;
}

static enum tv_err load_class(const json_t *j, const char *type,
                              struct tve_pres *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_pre *p = NULL;

    TV_TRY(add_step(out, TVE_PRE_CLASS, &p, err));
    if (!strcmp(type, "Digits")) {
        bool individual = false;
        TV_TRY(tve_json_bool(j, "individual_digits", false, &individual, err));
        p->is_class = tve_is_numeric;
        p->behavior = individual ? TVE_ISOLATED : TVE_CONTIGUOUS;
    } else if (!strcmp(type, "Punctuation")) {
        p->is_class = tve_is_punct;
        TV_TRY(load_behavior(j, type, TVE_ISOLATED, &p->behavior, err));
    } else {
        p->is_class = tve_is_space;
        p->behavior = TVE_REMOVED;
    }
    for (uint32_t c = 0; c < 128; c++)
        p->ascii[c] = p->is_class(c);
out:
    return rc;
}

static enum tv_err load_whitespace(struct tve_pres *out, struct tv_error *err)
{
    struct tve_pre *p = NULL;
    enum tv_err rc = add_step(out, TVE_PRE_SPLIT, &p, err);

    if (rc != TV_OK)
        return rc;
    p->behavior = TVE_REMOVED;
    p->invert = true;
    p->makes_words = true;
    /* Words of Rust's dialect, where the join controls belong to \\w. */
    return tve_regex_open("[\\w\\x{200C}\\x{200D}]+|"
                          "[^\\w\\s\\x{200C}\\x{200D}]+",
                          false, err, &p->regex);
}

static enum tv_err load_one(const json_t *j, struct tve_pres *out,
                            unsigned depth, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const char *type = NULL;
    size_t n = 0;

    TV_TRY(tve_json_str(j, "type", &type, &n, err));
    if (!type) {
        rc = bad("?", err);
        goto out;
    }
    if (!strcmp(type, "Sequence")) {
        const json_t *const list = json_object_get(j, "pretokenizers");
        if (!json_is_array(list) || depth > 8) {
            rc = bad(type, err);
            goto out;
        }
        for (size_t i = 0; i < json_array_size(list); i++)
            TV_TRY(load_one(json_array_get(list, i), out, depth + 1, err));
    } else if (!strcmp(type, "ByteLevel")) {
        rc = load_byte_level(j, out, err);
    } else if (!strcmp(type, "Split")) {
        rc = load_split(j, out, err);
    } else if (!strcmp(type, "Metaspace")) {
        rc = load_metaspace(j, out, err);
    } else if (!strcmp(type, "Digits") || !strcmp(type, "Punctuation") ||
               !strcmp(type, "WhitespaceSplit")) {
        rc = load_class(j, type, out, err);
    } else if (!strcmp(type, "Whitespace")) {
        rc = load_whitespace(out, err);
    } else {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "tokenizer.json: pre-tokenizer \"%.100s\" is not "
                          "supported",
                          type);
    }
out:
    return rc;
}

/* The step behind the first that makes words, when there is one and no later
 * step asks whether its piece begins the text. */
static size_t find_cached_step(const struct tve_pres *p)
{
    size_t step = 0;

    while (step < p->n && !p->items[step].makes_words)
        step++;
    if (step == p->n)
        return p->n;
    for (size_t i = step + 1; i < p->n; i++)
        if (p->items[i].kind == TVE_PRE_METASPACE && p->items[i].prepend == 1)
            return p->n;
    return step + 1;
}

enum tv_err tve_pres_load(const json_t *j, struct tve_pres *out,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    out->items = tv_calloc(PRES_MAX, sizeof(*out->items));
    if (!out->items)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    if (j && !json_is_null(j))
        TV_TRY(load_one(j, out, 0, err));
    out->byte_level =
        out->n > 0 && out->items[out->n - 1].kind == TVE_PRE_BYTE_LEVEL;
    if (out->byte_level) {
        struct tve_pre *const last = &out->items[out->n - 1];
        last->maps = false;
        if (!last->prefix_space)
            out->n--; /* nothing else is left of it */
    }
    out->cached_step = find_cached_step(out);
    if (out->cached_step < out->n)
        TV_TRY(tve_words_open(err, &out->words));
out:
    return rc;
}

void tve_pres_free(struct tve_pres *p)
{
    for (size_t i = 0; i < p->n; i++) {
        tve_regex_close(p->items[i].regex);
        tv_buf_free(&p->items[i].prefixed);
        tv_buf_free(&p->items[i].changed);
    }
    tv_free(p->items);
    tve_words_close(p->words);
    memset(p, 0, sizeof(*p));
}

/* ---- running ------------------------------------------------------------- */

struct run {
    struct tve_pres *pres;
    tve_bpe *bpe;
    struct tve_ids *out;
    struct tv_error *err;
};

static enum tv_err run_step(const struct run *r, size_t step, const char *s,
                            size_t n, bool first);

/* Turns a stream of matches and gaps into pieces, by one of the behaviours. */
struct cutter {
    const struct run *run;
    size_t step; /* that gets the pieces */
    const char *s;
    bool first;
    enum tve_behavior behavior;
    bool invert;
    bool previous; /* the last part was a match */
    bool held;     /* [start, end) waits for what follows */
    size_t start, end;
};

static enum tv_err cut_emit(const struct cutter *c, size_t start, size_t end)
{
    if (end == start)
        return TV_OK;
    return run_step(c->run, c->step, c->s + start, end - start,
                    c->first && start == 0);
}

static enum tv_err cut_flush(struct cutter *c)
{
    if (!c->held)
        return TV_OK;
    c->held = false;
    return cut_emit(c, c->start, c->end);
}

static enum tv_err cut_part(struct cutter *c, size_t start, size_t end,
                            bool match)
{
    enum tv_err rc = TV_OK;
    bool joins = false;

    match ^= c->invert;
    switch (c->behavior) {
    case TVE_ISOLATED:
        return cut_emit(c, start, end);
    case TVE_REMOVED:
        return match ? TV_OK : cut_emit(c, start, end);
    case TVE_CONTIGUOUS:
        joins = c->held && match == c->previous;
        break;
    case TVE_MERGED_PREVIOUS:
        joins = c->held && match && !c->previous;
        break;
    case TVE_MERGED_NEXT:
        joins = c->held && !match && c->previous;
        break;
    }
    if (joins) {
        c->end = end;
    } else {
        TV_TRY(cut_flush(c));
        c->held = true;
        c->start = start;
        c->end = end;
    }
    c->previous = match;
out:
    return rc;
}

static enum tv_err split_regex(const struct run *r, struct cutter *c,
                               tve_regex *re, size_t n)
{
    enum tv_err rc = TV_OK;
    size_t at = 0, start = 0, end = 0;
    int found = 0;

    while (at < n &&
           (found = tve_regex_next(re, c->s, n, at, &start, &end)) > 0) {
        if (start > at)
            TV_TRY(cut_part(c, at, start, false));
        TV_TRY(cut_part(c, start, end, true));
        at = end;
    }
    if (found < 0) {
        rc = tve_regex_error(found, r->err);
        goto out;
    }
    if (at < n)
        TV_TRY(cut_part(c, at, n, false));
    TV_TRY(cut_flush(c));
out:
    return rc;
}

static enum tv_err split_class(struct cutter *c, const struct tve_pre *p,
                               size_t n)
{
    enum tv_err rc = TV_OK;
    size_t gap = 0;

    for (size_t i = 0; i < n;) {
        uint32_t cp = 0;
        const size_t len = tve_char(c->s + i, &cp);

        if (cp < 128 ? p->ascii[cp] : p->is_class(cp)) {
            if (i > gap)
                TV_TRY(cut_part(c, gap, i, false));
            TV_TRY(cut_part(c, i, i + len, true));
            gap = i + len;
        }
        i += len;
    }
    if (gap < n)
        TV_TRY(cut_part(c, gap, n, false));
    TV_TRY(cut_flush(c));
out:
    return rc;
}

/* Pieces that begin with the replacement character. */
static enum tv_err split_metaspace(struct cutter *c, const char *rep, size_t n)
{
    enum tv_err rc = TV_OK;
    const size_t len = strlen(rep);
    size_t at = 0;

    while (at < n) {
        const char *const p = memmem(c->s + at, n - at, rep, len);
        const size_t start = p ? (size_t)(p - c->s) : n;

        if (start > at)
            TV_TRY(cut_part(c, at, start, false));
        if (p)
            TV_TRY(cut_part(c, start, start + len, true));
        at = p ? start + len : n;
    }
    TV_TRY(cut_flush(c));
out:
    return rc;
}

static void metaspace_text(struct tve_pre *p, const char *s, size_t n,
                           bool first)
{
    const size_t len = strlen(p->rep);

    p->changed.n_bytes = 0;
    if ((p->prepend == 2 || (p->prepend == 1 && first)) && s[0] != ' ' &&
        (n < len || memcmp(s, p->rep, len)))
        tv_buf_add(&p->changed, p->rep, len);
    for (size_t i = 0; i < n;) {
        const char *const space = memchr(s + i, ' ', n - i);
        const size_t end = space ? (size_t)(space - s) : n;

        tv_buf_add(&p->changed, s + i, end - i);
        if (space)
            tv_buf_add(&p->changed, p->rep, len);
        i = end + 1;
    }
}

static enum tv_err take_step(const struct run *r, size_t step, const char *s,
                             size_t n, bool first)
{
    enum tv_err rc = TV_OK;
    struct tve_pre *const p = &r->pres->items[step];

    if (p->prefix_space && s[0] != ' ') {
        p->prefixed.n_bytes = 0;
        tv_buf_str(&p->prefixed, " ");
        tv_buf_add(&p->prefixed, s, n);
        TV_TRY(tv_buf_ok(&p->prefixed, r->err));
        s = p->prefixed.data;
        n = p->prefixed.n_bytes;
    }
    struct cutter c = {.run = r,
                       .step = step + 1,
                       .s = s,
                       .first = first,
                       .behavior = p->behavior,
                       .invert = p->invert};
    switch (p->kind) {
    case TVE_PRE_SPLIT:
        rc = split_regex(r, &c, p->regex, n);
        break;
    case TVE_PRE_CLASS:
        rc = split_class(&c, p, n);
        break;
    case TVE_PRE_METASPACE:
        metaspace_text(p, s, n, first);
        TV_TRY(tv_buf_ok(&p->changed, r->err));
        c.s = p->changed.data;
        n = p->changed.n_bytes;
        if (p->split)
            rc = split_metaspace(&c, p->rep, n);
        else
            rc = run_step(r, step + 1, c.s, n, first);
        break;
    case TVE_PRE_BYTE_LEVEL:
        if (p->maps) {
            p->changed.n_bytes = 0;
            tve_bytes_map(s, n, &p->changed);
            TV_TRY(tv_buf_ok(&p->changed, r->err));
            s = p->changed.data;
            n = p->changed.n_bytes;
        }
        rc = run_step(r, step + 1, s, n, first);
        break;
    }
out:
    return rc;
}

static enum tv_err run_step(const struct run *r, size_t step, const char *s,
                            size_t n, bool first)
{
    enum tv_err rc = TV_OK;
    const struct tve_pres *const p = r->pres;
    struct tve_place place;
    const size_t before = r->out->n;
    bool found = false;

    if (n == 0)
        goto out;
    if (step == p->n) {
        /* Words are kept once: here or by the BPE. */
        rc = tve_bpe_word(r->bpe, s, n, !p->words, r->out, r->err);
        goto out;
    }
    if (step != p->cached_step) {
        rc = take_step(r, step, s, n, first);
        goto out;
    }
    TV_TRY(tve_words_get(p->words, s, n, &place, &found, r->out, r->err));
    if (found)
        goto out;
    TV_TRY(take_step(r, step, s, n, first));
    tve_words_put(p->words, &place, s, r->out->ids + before,
                  r->out->n - before);
out:
    return rc;
}

enum tv_err tve_pres_run(struct tve_pres *p, tve_bpe *bpe, const char *s,
                         size_t n, bool first, struct tve_ids *out,
                         struct tv_error *err)
{
    const struct run r = {p, bpe, out, err};

    return run_step(&r, 0, s, n, first);
}
