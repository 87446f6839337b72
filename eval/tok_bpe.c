/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_bpe.c - byte pair encoding of one word (Sennrich et al., ACL 2016): the
 * vocabulary, the characters a word begins as, and where it may be cut. The
 * merging itself is tok_merge.c.
 *
 * Words that have no spaces at all (SentencePiece-like models take the whole
 * text as one) are first cut where no merge can reach: a token that spans two
 * neighbouring characters contains them side by side, so two characters that
 * are never neighbours in any result of a merge are a safe place to cut. The
 * result is the same, and parts are short and repeat, so that the cache of
 * words works for them too.
 *
 * Words of byte-level models arrive as raw bytes; GPT-2's table from bytes to
 * characters is applied to their first symbols only.
 */
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/hash.h"

#include "tok.h"

#define CUT_MIN  32u /* bytes from which cutting is tried */
#define WORD_MAX (1u << 30)
#define PAGE     256u /* characters of a page */
#define N_PAGES  (0x110000u / PAGE)

struct vocab_entry {
    uint32_t at, n; /* in chars */
    int32_t id;
};

struct tve_bpe {
    bool byte_level, ignore_merges, byte_fallback, fuse_unk;
    char *prefix, *suffix; /* NULL when none */
    size_t n_prefix, n_suffix;
    int32_t unk;           /* -1: none */
    int32_t byte_ids[256]; /* "<0xNN>" */
    bool all_bytes;
    int32_t byte_symbols[256]; /* byte-level: of the byte */
    int32_t max_id;

    char *chars;
    struct vocab_entry *entries;
    uint32_t *slots; /* index + 1 */
    size_t n_entries, n_slots;
    tve_merges *merges;
    uint64_t *pairs; /* neighbours inside merged tokens; 0: empty slot */
    size_t n_pair_slots;
    /* Ids of tokens of one character: pages[page_of[c / PAGE]][c % PAGE]. Page
     * 0 has none. */
    uint16_t *page_of;
    int32_t (*pages)[PAGE];

    tve_words *words;
    struct tv_buf mapped, affixed;
};

/* ---- tables -------------------------------------------------------------- */

static size_t slots_for(size_t n)
{
    size_t s = 64;

    while (s < n * 2)
        s *= 2;
    return s;
}

static size_t vocab_slot(const tve_bpe *b, const char *s, size_t n)
{
    size_t i = (size_t)tv_hash64(s, n) & (b->n_slots - 1);

    while (b->slots[i]) {
        const struct vocab_entry *const e = &b->entries[b->slots[i] - 1];
        if (e->n == n && !memcmp(b->chars + e->at, s, n))
            break;
        i = (i + 1) & (b->n_slots - 1);
    }
    return i;
}

int32_t tve_bpe_id(const tve_bpe *b, const char *s, size_t n)
{
    const size_t i = vocab_slot(b, s, n);

    return b->slots[i] ? b->entries[b->slots[i] - 1].id : -1;
}

int32_t tve_bpe_max_id(const tve_bpe *b)
{
    return b->max_id;
}

static inline size_t mix(uint64_t key)
{
    /* Fibonacci hashing of small integers; the upper bits are good. */
    key *= UINT64_C(0x9e3779b97f4a7c15);
    return (size_t)(key >> 29);
}

/* Character pairs are never 0: no token holds two NULs that a merge made
 * (a key of 0 would only lose a cut). */
static inline uint64_t pair_key(uint32_t left, uint32_t right)
{
    return ((uint64_t)left << 32 | right) + 1;
}

static bool neighbours(const tve_bpe *b, uint32_t left, uint32_t right)
{
    const uint64_t key = pair_key(left, right);
    size_t i = mix(key) & (b->n_pair_slots - 1);

    while (b->pairs[i]) {
        if (b->pairs[i] == key)
            return true;
        i = (i + 1) & (b->n_pair_slots - 1);
    }
    return false;
}

static enum tv_err malformed(struct tv_error *err, const char *what)
{
    return tv_error_set(err, TV_E_CORRUPT, "tokenizer.json: %s", what);
}

static enum tv_err nomem(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory");
}

static enum tv_err load_vocab(tve_bpe *b, json_t *vocab, struct tv_error *err)
{
    const char *key = NULL;
    size_t n = 0, n_chars = 0, at = 0, i = 0;
    json_t *v = NULL;

    json_object_foreach(vocab, key, v) n_chars += strlen(key);
    n = json_object_size(vocab);
    if (n_chars > UINT32_MAX || n > INT32_MAX)
        return malformed(err, "the vocabulary is too large");
    b->n_slots = slots_for(n);
    b->chars = tv_alloc(n_chars ? n_chars : 1);
    b->entries = tv_calloc(n ? n : 1, sizeof(*b->entries));
    b->slots = tv_calloc(b->n_slots, sizeof(*b->slots));
    if (!b->chars || !b->entries || !b->slots)
        return nomem(err);
    json_object_foreach(vocab, key, v)
    {
        const size_t len = strlen(key);
        const json_int_t id = json_integer_value(v);

        if (!json_is_integer(v) || id < 0 || id >= INT32_MAX)
            return tv_error_set(err, TV_E_CORRUPT,
                                "tokenizer.json: token \"%.100s\" has an "
                                "impossible id",
                                key);
        memcpy(b->chars + at, key, len);
        b->entries[i] =
            (struct vocab_entry){(uint32_t)at, (uint32_t)len, (int32_t)id};
        const size_t slot = vocab_slot(b, key, len);
        b->slots[slot] = (uint32_t)++i;
        at += len;
        if (id > b->max_id)
            b->max_id = (int32_t)id;
    }
    b->n_entries = i;
    return TV_OK;
}

/* The two halves of a merge, "a b" or ["a", "b"]. */
static bool merge_halves(const json_t *m, const char **left, size_t *n_left,
                         const char **right, size_t *n_right)
{
    if (json_is_string(m)) {
        const char *const s = json_string_value(m);
        const char *const space = strchr(s, ' ');

        if (!space || strchr(space + 1, ' '))
            return false;
        *left = s;
        *n_left = (size_t)(space - s);
        *right = space + 1;
        *n_right = strlen(space + 1);
        return true;
    }
    if (!json_is_array(m) || json_array_size(m) != 2 ||
        !json_is_string(json_array_get(m, 0)) ||
        !json_is_string(json_array_get(m, 1)))
        return false;
    *left = json_string_value(json_array_get(m, 0));
    *n_left = json_string_length(json_array_get(m, 0));
    *right = json_string_value(json_array_get(m, 1));
    *n_right = json_string_length(json_array_get(m, 1));
    return true;
}

static void add_pairs(tve_bpe *b, const char *s, size_t n)
{
    uint32_t left = 0, right = 0;

    for (size_t i = 0; i < n; left = right) {
        const bool first = i == 0;
        i += tve_char(s + i, &right);
        if (first || neighbours(b, left, right))
            continue;
        const uint64_t key = pair_key(left, right);
        size_t slot = mix(key) & (b->n_pair_slots - 1);
        while (b->pairs[slot])
            slot = (slot + 1) & (b->n_pair_slots - 1);
        b->pairs[slot] = key;
    }
}

static enum tv_err load_merges(tve_bpe *b, const json_t *merges,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n = json_array_size(merges);
    struct tv_buf text;
    size_t n_pairs = 0;

    tv_buf_init(&text, 1u << 20);
    if (n > TVE_MERGES_MAX) {
        rc = malformed(err, "too many merges");
        goto out;
    }
    TV_TRY(tve_merges_open(n, err, &b->merges));
    for (int pass = 0; pass < 2; pass++) {
        for (size_t i = 0; i < n; i++) {
            const char *left = NULL, *right = NULL;
            size_t n_left = 0, n_right = 0;

            if (!merge_halves(json_array_get(merges, i), &left, &n_left, &right,
                              &n_right) ||
                n_right < b->n_prefix) {
                rc = tv_error_set(err, TV_E_CORRUPT,
                                  "tokenizer.json: merge %zu is malformed", i);
                goto out;
            }
            text.n_bytes = 0;
            tv_buf_add(&text, left, n_left);
            tv_buf_add(&text, right + b->n_prefix, n_right - b->n_prefix);
            TV_TRY(tv_buf_ok(&text, err));
            if (pass == 1) {
                add_pairs(b, text.data ? text.data : "", text.n_bytes);
                continue;
            }
            const int32_t l = tve_bpe_id(b, left, n_left);
            const int32_t r = tve_bpe_id(b, right, n_right);
            const int32_t id =
                tve_bpe_id(b, text.data ? text.data : "", text.n_bytes);
            if (l < 0 || r < 0 || id < 0) {
                rc = tv_error_set(err, TV_E_CORRUPT,
                                  "tokenizer.json: merge %zu (\"%.60s\", "
                                  "\"%.60s\") is not in the vocabulary",
                                  i, left, right);
                goto out;
            }
            n_pairs += text.n_bytes;
            tve_merges_put(b->merges, l, r, (uint32_t)i, id);
        }
        if (pass == 0) {
            /* Distinct pairs are far fewer than characters of all tokens, but
             * bounded by them. */
            b->n_pair_slots = slots_for(n_pairs);
            b->pairs = tv_calloc(b->n_pair_slots, sizeof(*b->pairs));
            if (!b->pairs) {
                rc = nomem(err);
                goto out;
            }
        }
    }
out:
    tv_buf_free(&text);
    return rc;
}

static enum tv_err load_pages(tve_bpe *b, struct tv_error *err)
{
    uint16_t n = 1;

    b->page_of = tv_calloc(N_PAGES, sizeof(*b->page_of));
    if (!b->page_of)
        return nomem(err);
    for (int pass = 0; pass < 2; pass++) {
        for (size_t i = 0; i < b->n_entries; i++) {
            const struct vocab_entry *const e = &b->entries[i];
            const char *const s = b->chars + e->at;
            uint32_t c = 0;

            if (e->n == 0 || e->n != tve_char(s, &c))
                continue;
            if (pass == 1)
                b->pages[b->page_of[c / PAGE]][c % PAGE] = e->id;
            else if (!b->page_of[c / PAGE])
                b->page_of[c / PAGE] = n++;
        }
        if (pass == 1)
            break;
        b->pages = tv_alloc(n * sizeof(*b->pages));
        if (!b->pages)
            return nomem(err);
        memset(b->pages, 0xff, n * sizeof(*b->pages)); /* -1 */
    }
    return TV_OK;
}

static int32_t char_id(const tve_bpe *b, uint32_t c)
{
    return b->pages[b->page_of[c / PAGE]][c % PAGE];
}

static void load_bytes(tve_bpe *b)
{
    static const char hex[] = "0123456789ABCDEF";

    b->all_bytes = true;
    for (unsigned i = 0; i < 256; i++) {
        const char name[6] = {'<', '0', 'x', hex[i >> 4], hex[i & 15], '>'};

        b->byte_ids[i] = tve_bpe_id(b, name, sizeof(name));
        b->byte_symbols[i] = char_id(b, tve_byte_char((unsigned char)i));
        if (b->byte_symbols[i] < 0)
            b->all_bytes = false;
    }
}

static enum tv_err get_affix(const json_t *j, const char *key, char **out,
                             size_t *n_out, struct tv_error *err)
{
    const char *s = NULL;
    size_t n = 0;
    const enum tv_err rc = tve_json_str(j, key, &s, &n, err);

    if (rc != TV_OK || !s || n == 0)
        return rc;
    *out = tv_strndup(s, n);
    *n_out = n;
    return *out ? TV_OK : nomem(err);
}

enum tv_err tve_bpe_open(const json_t *j, bool byte_level, struct tv_error *err,
                         tve_bpe **out)
{
    enum tv_err rc = TV_OK;
    tve_bpe *b = tv_calloc(1, sizeof(*b));
    const char *type = NULL, *unk = NULL;
    size_t n = 0;
    json_t *vocab = NULL;
    const json_t *merges = NULL, *dropout = NULL;

    *out = NULL;
    if (!b) {
        rc = nomem(err);
        goto out;
    }
    tv_buf_init(&b->mapped, WORD_MAX);
    tv_buf_init(&b->affixed, WORD_MAX);
    b->byte_level = byte_level;
    b->unk = b->max_id = -1;
    if (!json_is_object(j)) {
        rc = malformed(err, "there is no model");
        goto out;
    }
    TV_TRY(tve_json_str(j, "type", &type, &n, err));
    vocab = json_object_get(j, "vocab");
    merges = json_object_get(j, "merges");
    /* Old files do not name the type; only BPE has merges. */
    if (type ? strcmp(type, "BPE") != 0 : !merges) {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "tokenizer.json: model \"%.100s\" is not supported, "
                          "only BPE is",
                          type ? type : "?");
        goto out;
    }
    dropout = json_object_get(j, "dropout");
    if (json_is_number(dropout) && json_number_value(dropout) != 0) {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "tokenizer.json: BPE dropout is not supported");
        goto out;
    }
    if (!json_is_object(vocab) || !json_is_array(merges)) {
        rc = malformed(err, "the BPE model has no vocab or no merges");
        goto out;
    }
    TV_TRY(tve_json_bool(j, "ignore_merges", false, &b->ignore_merges, err));
    TV_TRY(tve_json_bool(j, "byte_fallback", false, &b->byte_fallback, err));
    TV_TRY(tve_json_bool(j, "fuse_unk", false, &b->fuse_unk, err));
    TV_TRY(get_affix(j, "continuing_subword_prefix", &b->prefix, &b->n_prefix,
                     err));
    TV_TRY(get_affix(j, "end_of_word_suffix", &b->suffix, &b->n_suffix, err));
    TV_TRY(load_vocab(b, vocab, err));
    TV_TRY(load_merges(b, merges, err));
    TV_TRY(load_pages(b, err));
    load_bytes(b);
    TV_TRY(tve_json_str(j, "unk_token", &unk, &n, err));
    if (unk) {
        b->unk = tve_bpe_id(b, unk, n);
        if (b->unk < 0) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "tokenizer.json: the unknown token \"%.100s\" is "
                              "not in the vocabulary",
                              unk);
            goto out;
        }
    }
    TV_TRY(tve_words_open(err, &b->words));
    *out = b;
    b = NULL;
out:
    tve_bpe_close(b);
    return rc;
}

void tve_bpe_close(tve_bpe *b)
{
    if (!b)
        return;
    tv_free(b->prefix);
    tv_free(b->suffix);
    tv_free(b->chars);
    tv_free(b->entries);
    tv_free(b->slots);
    tve_merges_close(b->merges);
    tv_free(b->pairs);
    tv_free(b->page_of);
    tv_free(b->pages);
    tve_words_close(b->words);
    tv_buf_free(&b->mapped);
    tv_buf_free(&b->affixed);
    tv_free(b);
}

/* ---- symbols of a word --------------------------------------------------- */

/* Where symbols go: the end of the caller's ids, which has room. */
struct symbols {
    int32_t *ids;
    size_t n;
    bool unk_pending;
};

static void put(struct symbols *y, int32_t id)
{
    y->ids[y->n++] = id;
}

/* Appends the symbols of the character s [n] with the given id or -1. */
static void add_char(const tve_bpe *b, const char *s, size_t n, int32_t id,
                     struct symbols *y)
{
    if (id >= 0) {
        if (y->unk_pending)
            put(y, b->unk);
        y->unk_pending = false;
        put(y, id);
        return;
    }
    if (b->byte_fallback) {
        bool all = true;
        for (size_t i = 0; i < n; i++)
            all = all && b->byte_ids[(unsigned char)s[i]] >= 0;
        for (size_t i = 0; all && i < n; i++)
            put(y, b->byte_ids[(unsigned char)s[i]]);
        if (all)
            return;
    }
    if (b->unk < 0)
        return;
    if (y->unk_pending && !b->fuse_unk)
        put(y, b->unk);
    y->unk_pending = true;
}

static enum tv_err add_affixed(const tve_bpe *b, const char *s, size_t n,
                               bool with_prefix, bool with_suffix,
                               struct tv_buf *text, struct symbols *y,
                               struct tv_error *err)
{
    text->n_bytes = 0;
    if (with_prefix)
        tv_buf_add(text, b->prefix, b->n_prefix);
    tv_buf_add(text, s, n);
    if (with_suffix)
        tv_buf_add(text, b->suffix, b->n_suffix);
    const enum tv_err rc = tv_buf_ok(text, err);
    if (rc == TV_OK)
        add_char(b, text->data, text->n_bytes,
                 tve_bpe_id(b, text->data, text->n_bytes), y);
    return rc;
}

/* s: characters (byte-level words are mapped already). *n_out symbols are put
 * behind what *out has, and not counted there yet. */
static enum tv_err char_symbols(tve_bpe *b, const char *s, size_t n,
                                struct tve_ids *out, size_t *n_out,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct symbols y = {NULL, 0, false};
    struct tv_buf *const text = &b->affixed;

    /* A character gives at most one symbol per byte, affixes included, plus
     * one unknown token. */
    TV_TRY(tve_ids_room(out, 2 * (n + b->n_prefix * n + b->n_suffix) + 2, err));
    y.ids = out->ids + out->n;
    for (size_t i = 0; i < n;) {
        uint32_t c = 0;
        const size_t len = tve_char(s + i, &c);
        const bool with_prefix = b->prefix && i > 0;
        const bool with_suffix = b->suffix && i + len == n;

        if (with_prefix || with_suffix)
            TV_TRY(add_affixed(b, s + i, len, with_prefix, with_suffix, text,
                               &y, err));
        else
            add_char(b, s + i, len, char_id(b, c), &y);
        i += len;
    }
    if (y.unk_pending)
        put(&y, b->unk);
    *n_out = y.n;
out:
    return rc;
}

enum tv_err tve_ids_room(struct tve_ids *out, size_t n, struct tv_error *err)
{
    if (n > out->cap - out->n) {
        const size_t cap = out->cap + out->cap / 2 + n + 256;
        size_t bytes = 0;
        int32_t *p = NULL;

        if (tv_mul_size(cap, sizeof(*p), &bytes))
            p = tv_realloc(out->ids, bytes);
        if (!p)
            return nomem(err);
        out->ids = p;
        out->cap = cap;
    }
    return TV_OK;
}

enum tv_err tve_ids_add(struct tve_ids *out, int32_t id, struct tv_error *err)
{
    const enum tv_err rc = tve_ids_room(out, 1, err);

    if (rc == TV_OK)
        out->ids[out->n++] = id;
    return rc;
}

/* ---- words --------------------------------------------------------------- */

/* Bytes as the characters of GPT-2's table, in b->mapped. */
static enum tv_err map_word(tve_bpe *b, const char *s, size_t n,
                            struct tv_error *err)
{
    b->mapped.n_bytes = 0;
    tve_bytes_map(s, n, &b->mapped);
    return tv_buf_ok(&b->mapped, err);
}

/* Merges the symbols of s, which no cut divides any more. */
static enum tv_err merge_word(tve_bpe *b, const char *s, size_t n,
                              struct tve_ids *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    size_t count = 0;

    if (b->byte_level && b->all_bytes && !b->prefix && !b->suffix) {
        TV_TRY(tve_ids_room(out, n, err));
        for (size_t i = 0; i < n; i++)
            out->ids[out->n + i] = b->byte_symbols[(unsigned char)s[i]];
        count = n;
    } else if (b->byte_level) {
        TV_TRY(map_word(b, s, n, err));
        TV_TRY(char_symbols(b, b->mapped.data, b->mapped.n_bytes, out, &count,
                            err));
    } else {
        TV_TRY(char_symbols(b, s, n, out, &count, err));
    }
    TV_TRY(tve_merges_run(b->merges, out->ids + out->n, &count, err));
    out->n += count;
out:
    return rc;
}

/* A part of a word, kept by itself. */
static enum tv_err merge_part(tve_bpe *b, const char *s, size_t n,
                              struct tve_ids *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_place place;
    bool found = false;
    const size_t before = out->n;

    /* Parts are no words: ignore_merges does not look at them, so they may not
     * stand in its cache. */
    if (b->ignore_merges)
        return merge_word(b, s, n, out, err);
    TV_TRY(tve_words_get(b->words, s, n, &place, &found, out, err));
    if (found)
        goto out;
    TV_TRY(merge_word(b, s, n, out, err));
    tve_words_put(b->words, &place, s, out->ids + before, out->n - before);
out:
    return rc;
}

static bool is_known(const tve_bpe *b, uint32_t c)
{
    return b->byte_level ? b->all_bytes : char_id(b, c) >= 0;
}

/* Next character as merges see it. */
static size_t next_char(const tve_bpe *b, const char *s, uint32_t *c)
{
    if (!b->byte_level)
        return tve_char(s, c);
    *c = tve_byte_char((unsigned char)*s);
    return 1;
}

static enum tv_err cut_word(tve_bpe *b, const char *s, size_t n,
                            struct tve_ids *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    uint32_t left = 0, right = 0;
    size_t start = 0, len = 0;

    for (size_t i = 0; i < n; i += len, left = right) {
        len = next_char(b, s + i, &right);
        /* Unknown characters are dropped or fused with others of their kind,
         * so that more than the neighbour counts: no cut beside them. */
        if (i > start && !neighbours(b, left, right) && is_known(b, right) &&
            is_known(b, left)) {
            TV_TRY(merge_part(b, s + start, i - start, out, err));
            start = i;
        }
    }
    TV_TRY(merge_part(b, s + start, n - start, out, err));
out:
    return rc;
}

/* The word itself, when ignore_merges lets it stand for its merges: -1 when it
 * is no token. */
static enum tv_err whole_word(tve_bpe *b, const char *s, size_t n, int32_t *id,
                              struct tv_error *err)
{
    *id = -1;
    if (b->byte_level) {
        const enum tv_err rc = map_word(b, s, n, err);
        if (rc != TV_OK)
            return rc;
        s = b->mapped.data;
        n = b->mapped.n_bytes;
    }
    *id = tve_bpe_id(b, s, n);
    return TV_OK;
}

enum tv_err tve_bpe_word(tve_bpe *b, const char *s, size_t n, bool keep,
                         struct tve_ids *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const bool cuts = n >= CUT_MIN && !b->prefix && !b->suffix;
    const size_t before = out->n;
    struct tve_place place;
    bool found = false;
    int32_t id = -1;

    /* Parts of long words repeat, the words themselves hardly. */
    keep = keep && (!cuts || b->ignore_merges);
    if (keep) {
        TV_TRY(tve_words_get(b->words, s, n, &place, &found, out, err));
        if (found)
            goto out;
    }
    if (b->ignore_merges)
        TV_TRY(whole_word(b, s, n, &id, err));
    if (id >= 0)
        TV_TRY(tve_ids_add(out, id, err));
    else if (cuts)
        TV_TRY(cut_word(b, s, n, out, err));
    else
        TV_TRY(merge_word(b, s, n, out, err));
    if (keep)
        tve_words_put(b->words, &place, s, out->ids + before, out->n - before);
out:
    return rc;
}
