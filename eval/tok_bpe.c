/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_bpe.c - byte pair encoding of one word (Sennrich et al., ACL 2016).
 *
 * A word begins as its characters and the pair with the lowest rank, leftmost
 * of equals, is merged until no pair has a rank. Short words scan for it; long
 * ones keep a heap over a linked list of symbols.
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

#define SCAN_MAX       48u /* symbols that are scanned, not heaped */
#define CUT_MIN        32u /* characters from which cutting is tried */
#define CACHE_SLOTS    (1u << 16)
#define CACHE_WORDS    (1u << 15)
#define CACHE_WORD_MAX 255u /* bytes of a word worth keeping */
#define CACHE_BYTES    (4u << 20)
#define CACHE_IDS      (1u << 19)
#define WORD_MAX       (1u << 30)

struct vocab_entry {
    uint32_t at, n; /* in chars */
    int32_t id;
};

struct merge {
    uint64_t pair; /* left << 32 | right */
    uint32_t rank;
    int32_t id; /* -1: empty slot */
};

struct cache_entry {
    uint32_t key_at, ids_at;
    uint32_t tag; /* upper half of the hash */
    uint16_t n_key, n_ids;
    uint32_t stamp; /* of the generation that wrote it */
};

struct symbol {
    int32_t id; /* -1: gone */
    int32_t prev, next;
};

struct heap_item {
    uint32_t rank;
    int32_t at, id;
};

struct tve_bpe {
    bool byte_level, ignore_merges, byte_fallback, fuse_unk;
    char *prefix, *suffix; /* NULL when none */
    size_t n_prefix, n_suffix;
    int32_t unk;           /* -1: none */
    int32_t byte_ids[256]; /* "<0xNN>" */
    bool all_bytes;
    int32_t first_ids[256]; /* byte-level: of the byte; else of ASCII */
    int32_t max_id;

    char *chars;
    struct vocab_entry *entries;
    uint32_t *slots; /* index + 1 */
    size_t n_entries, n_slots;
    struct merge *merges;
    size_t n_merge_slots;
    uint64_t *pairs; /* neighbours inside merged tokens; 0: empty slot */
    size_t n_pair_slots;

    struct cache_entry *cache;
    char *cache_keys;
    int32_t *cache_ids;
    size_t n_cached, n_cache_keys, n_cache_ids;
    uint32_t generation;

    struct symbol *symbols;
    struct heap_item *heap;
    size_t cap_symbols, cap_heap;
    struct tv_buf mapped;
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

static const struct merge *find_merge(const tve_bpe *b, int32_t left,
                                      int32_t right)
{
    const uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    size_t i = mix(pair) & (b->n_merge_slots - 1);

    while (b->merges[i].id >= 0) {
        if (b->merges[i].pair == pair)
            return &b->merges[i];
        i = (i + 1) & (b->n_merge_slots - 1);
    }
    return NULL;
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
    if (n > INT32_MAX) {
        rc = malformed(err, "too many merges");
        goto out;
    }
    b->n_merge_slots = slots_for(n);
    b->merges = tv_alloc(b->n_merge_slots * sizeof(*b->merges));
    if (!b->merges) {
        rc = nomem(err);
        goto out;
    }
    for (size_t i = 0; i < b->n_merge_slots; i++)
        b->merges[i].id = -1;
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
            const uint64_t pair = (uint64_t)(uint32_t)l << 32 | (uint32_t)r;
            size_t slot = mix(pair) & (b->n_merge_slots - 1);
            while (b->merges[slot].id >= 0 && b->merges[slot].pair != pair)
                slot = (slot + 1) & (b->n_merge_slots - 1);
            b->merges[slot] = (struct merge){pair, (uint32_t)i, id};
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

static void load_bytes(tve_bpe *b)
{
    static const char hex[] = "0123456789ABCDEF";

    b->all_bytes = true;
    for (unsigned i = 0; i < 256; i++) {
        const char name[6] = {'<', '0', 'x', hex[i >> 4], hex[i & 15], '>'};
        char text[4] = {(char)i, 0, 0, 0};
        size_t n = 1;

        b->byte_ids[i] = tve_bpe_id(b, name, sizeof(name));
        if (b->byte_level)
            n = tve_char_put(tve_byte_char((unsigned char)i), text);
        b->first_ids[i] =
            i < 0x80 || b->byte_level ? tve_bpe_id(b, text, n) : -1;
        if (b->first_ids[i] < 0)
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
    b->byte_level = byte_level;
    b->unk = b->max_id = -1;
    b->generation = 1;
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
    b->cache = tv_calloc(CACHE_SLOTS, sizeof(*b->cache));
    b->cache_keys = tv_alloc(CACHE_BYTES);
    b->cache_ids = tv_alloc(CACHE_IDS * sizeof(*b->cache_ids));
    if (!b->cache || !b->cache_keys || !b->cache_ids) {
        rc = nomem(err);
        goto out;
    }
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
    tv_free(b->merges);
    tv_free(b->pairs);
    tv_free(b->cache);
    tv_free(b->cache_keys);
    tv_free(b->cache_ids);
    tv_free(b->symbols);
    tv_free(b->heap);
    tv_buf_free(&b->mapped);
    tv_free(b);
}

/* ---- symbols of a word --------------------------------------------------- */

static enum tv_err room(tve_bpe *b, size_t n_symbols, struct tv_error *err)
{
    if (n_symbols > b->cap_symbols) {
        const size_t cap = n_symbols + n_symbols / 2 + 64;
        struct symbol *const p = tv_realloc(b->symbols, cap * sizeof(*p));
        if (!p)
            return nomem(err);
        b->symbols = p;
        b->cap_symbols = cap;
    }
    return TV_OK;
}

struct unk_state {
    bool pending;
};

/* Appends the symbols of one character s [n] as the vocabulary spells it. */
static void add_char(tve_bpe *b, const char *s, size_t n, size_t *count,
                     struct unk_state *unk)
{
    const int32_t id = n == 1 && !b->byte_level && (unsigned char)s[0] < 0x80
                           ? b->first_ids[(unsigned char)s[0]]
                           : tve_bpe_id(b, s, n);

    if (id >= 0) {
        if (unk->pending)
            b->symbols[(*count)++].id = b->unk;
        unk->pending = false;
        b->symbols[(*count)++].id = id;
        return;
    }
    if (b->byte_fallback) {
        bool all = true;
        for (size_t i = 0; i < n; i++)
            all = all && b->byte_ids[(unsigned char)s[i]] >= 0;
        for (size_t i = 0; all && i < n; i++)
            b->symbols[(*count)++].id = b->byte_ids[(unsigned char)s[i]];
        if (all)
            return;
    }
    if (b->unk < 0)
        return;
    if (unk->pending && !b->fuse_unk)
        b->symbols[(*count)++].id = b->unk;
    unk->pending = true;
}

/* s: characters (byte-level words are mapped already). */
static enum tv_err char_symbols(tve_bpe *b, const char *s, size_t n,
                                size_t *count, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct unk_state unk = {false};
    struct tv_buf text;

    tv_buf_init(&text, WORD_MAX);
    *count = 0;
    /* A character gives at most one symbol per byte, affixes included, plus
     * one unknown token. */
    TV_TRY(room(b, 2 * (n + b->n_prefix * n + b->n_suffix) + 2, err));
    for (size_t i = 0; i < n;) {
        const size_t len = tve_char_bytes((unsigned char)s[i]);
        const bool with_prefix = b->prefix && i > 0;
        const bool with_suffix = b->suffix && i + len == n;

        if (with_prefix || with_suffix) {
            text.n_bytes = 0;
            if (with_prefix)
                tv_buf_add(&text, b->prefix, b->n_prefix);
            tv_buf_add(&text, s + i, len);
            if (with_suffix)
                tv_buf_add(&text, b->suffix, b->n_suffix);
            TV_TRY(tv_buf_ok(&text, err));
            add_char(b, text.data, text.n_bytes, count, &unk);
        } else {
            add_char(b, s + i, len, count, &unk);
        }
        i += len;
    }
    if (unk.pending)
        b->symbols[(*count)++].id = b->unk;
out:
    tv_buf_free(&text);
    return rc;
}

/* ---- merging ------------------------------------------------------------- */

static size_t merge_by_scan(const tve_bpe *b, size_t n)
{
    const struct merge *found[SCAN_MAX];
    struct symbol *const s = b->symbols;

    for (size_t i = 0; i + 1 < n; i++)
        found[i] = find_merge(b, s[i].id, s[i + 1].id);
    while (n > 1) {
        size_t best = n;
        uint32_t rank = UINT32_MAX;

        for (size_t i = 0; i + 1 < n; i++) {
            if (found[i] && found[i]->rank < rank) {
                rank = found[i]->rank;
                best = i;
            }
        }
        if (best == n)
            break;
        s[best].id = found[best]->id;
        n--;
        for (size_t i = best + 1; i < n; i++)
            s[i].id = s[i + 1].id;
        for (size_t i = best + 1; i + 1 < n; i++)
            found[i] = found[i + 1];
        if (best + 1 < n)
            found[best] = find_merge(b, s[best].id, s[best + 1].id);
        if (best > 0)
            found[best - 1] = find_merge(b, s[best - 1].id, s[best].id);
    }
    return n;
}

static bool heap_before(const struct heap_item *a, const struct heap_item *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->at < b->at;
}

static void heap_push(tve_bpe *b, size_t *n, struct heap_item x)
{
    size_t i = (*n)++;

    while (i > 0 && heap_before(&x, &b->heap[(i - 1) / 2])) {
        b->heap[i] = b->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    b->heap[i] = x;
}

static struct heap_item heap_pop(tve_bpe *b, size_t *n)
{
    const struct heap_item top = b->heap[0];
    const struct heap_item x = b->heap[--*n];
    size_t i = 0;

    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= *n)
            break;
        if (child + 1 < *n && heap_before(&b->heap[child + 1], &b->heap[child]))
            child++;
        if (!heap_before(&b->heap[child], &x))
            break;
        b->heap[i] = b->heap[child];
        i = child;
    }
    b->heap[i] = x;
    return top;
}

static void push_pair(tve_bpe *b, size_t *n_heap, int32_t at)
{
    const struct symbol *const s = &b->symbols[at];
    const struct merge *m = NULL;

    if (s->next < 0)
        return;
    m = find_merge(b, s->id, b->symbols[s->next].id);
    if (m)
        heap_push(b, n_heap, (struct heap_item){m->rank, at, m->id});
}

static enum tv_err merge_by_heap(tve_bpe *b, size_t *n, struct tv_error *err)
{
    struct symbol *const s = b->symbols;
    size_t n_heap = 0, kept = 0;

    if (*n > INT32_MAX / 4)
        return tv_error_set(err, TV_E_UNSUPPORTED,
                            "a word of %zu characters is too long", *n);
    /* Each merge pushes at most two pairs. */
    if (*n * 3 > b->cap_heap) {
        struct heap_item *const p = tv_realloc(b->heap, *n * 3 * sizeof(*p));
        if (!p)
            return nomem(err);
        b->heap = p;
        b->cap_heap = *n * 3;
    }
    for (size_t i = 0; i < *n; i++) {
        s[i].prev = (int32_t)i - 1;
        s[i].next = i + 1 < *n ? (int32_t)i + 1 : -1;
    }
    for (size_t i = 0; i + 1 < *n; i++)
        push_pair(b, &n_heap, (int32_t)i);
    while (n_heap > 0) {
        const struct heap_item top = heap_pop(b, &n_heap);
        struct symbol *const left = &s[top.at];
        const struct merge *m = NULL;

        if (left->id < 0 || left->next < 0)
            continue;
        /* Stale unless the pair still gives what it promised. */
        m = find_merge(b, left->id, s[left->next].id);
        if (!m || m->id != top.id)
            continue;
        struct symbol *const right = &s[left->next];
        left->id = m->id;
        left->next = right->next;
        right->id = -1;
        if (left->next >= 0)
            s[left->next].prev = top.at;
        if (left->prev >= 0)
            push_pair(b, &n_heap, left->prev);
        push_pair(b, &n_heap, top.at);
    }
    for (size_t i = 0; i < *n; i++)
        if (s[i].id >= 0)
            s[kept++].id = s[i].id;
    *n = kept;
    return TV_OK;
}

enum tv_err tve_ids_add(struct tve_ids *out, const int32_t *ids, size_t n,
                        struct tv_error *err)
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
    if (n > 0)
        memcpy(out->ids + out->n, ids, n * sizeof(*ids));
    out->n += n;
    return TV_OK;
}

/* ---- cache --------------------------------------------------------------- */

static const struct cache_entry *cache_find(const tve_bpe *b, uint64_t hash,
                                            const char *s, size_t n,
                                            size_t *slot)
{
    size_t i = (size_t)hash & (CACHE_SLOTS - 1);

    while (b->cache[i].stamp == b->generation) {
        const struct cache_entry *const e = &b->cache[i];
        if (e->tag == (uint32_t)(hash >> 32) && e->n_key == n &&
            !memcmp(b->cache_keys + e->key_at, s, n))
            return e;
        i = (i + 1) & (CACHE_SLOTS - 1);
    }
    *slot = i;
    return NULL;
}

static void cache_put(tve_bpe *b, uint64_t hash, size_t slot, const char *s,
                      size_t n, const int32_t *ids, size_t n_ids)
{
    if (b->n_cached == CACHE_WORDS || b->n_cache_keys + n > CACHE_BYTES ||
        b->n_cache_ids + n_ids > CACHE_IDS) {
        b->generation++;
        b->n_cached = b->n_cache_keys = b->n_cache_ids = 0;
        slot = (size_t)hash & (CACHE_SLOTS - 1);
    }
    memcpy(b->cache_keys + b->n_cache_keys, s, n);
    if (n_ids > 0)
        memcpy(b->cache_ids + b->n_cache_ids, ids, n_ids * sizeof(*ids));
    b->cache[slot] = (struct cache_entry){
        (uint32_t)b->n_cache_keys, (uint32_t)b->n_cache_ids,
        (uint32_t)(hash >> 32),    (uint16_t)n,
        (uint16_t)n_ids,           b->generation};
    b->n_cached++;
    b->n_cache_keys += n;
    b->n_cache_ids += n_ids;
}

/* ---- words --------------------------------------------------------------- */

/* Merges the symbols of s, which no cut divides any more. */
static enum tv_err merge_word(tve_bpe *b, const char *s, size_t n, bool keep,
                              struct tve_ids *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    size_t count = 0, slot = 0, before = out->n;
    uint64_t hash = 0;

    keep = keep && n <= CACHE_WORD_MAX;
    if (keep) {
        hash = tv_hash64(s, n);
        const struct cache_entry *const e = cache_find(b, hash, s, n, &slot);
        if (e)
            return tve_ids_add(out, b->cache_ids + e->ids_at, e->n_ids, err);
    }
    if (b->byte_level && b->all_bytes && !b->prefix && !b->suffix) {
        TV_TRY(room(b, n, err));
        for (size_t i = 0; i < n; i++)
            b->symbols[i].id = b->first_ids[(unsigned char)s[i]];
        count = n;
    } else if (b->byte_level) {
        b->mapped.n_bytes = 0;
        for (size_t i = 0; i < n; i++) {
            char text[4];
            const uint32_t cp = tve_byte_char((unsigned char)s[i]);
            tv_buf_add(&b->mapped, text, tve_char_put(cp, text));
        }
        TV_TRY(tv_buf_ok(&b->mapped, err));
        TV_TRY(char_symbols(b, b->mapped.data, b->mapped.n_bytes, &count, err));
    } else {
        TV_TRY(char_symbols(b, s, n, &count, err));
    }
    if (count <= SCAN_MAX)
        count = merge_by_scan(b, count);
    else
        TV_TRY(merge_by_heap(b, &count, err));
    for (size_t i = 0; i < count; i++)
        TV_TRY(tve_ids_add(out, &b->symbols[i].id, 1, err));
    if (keep)
        cache_put(b, hash, slot, s, n, out->ids + before, count);
out:
    return rc;
}

static bool is_known(const tve_bpe *b, const char *s, size_t n)
{
    return b->byte_level ? b->all_bytes : tve_bpe_id(b, s, n) >= 0;
}

/* Next character as merges see it. */
static size_t next_char(const tve_bpe *b, const char *s, uint32_t *cp)
{
    if (!b->byte_level)
        return tve_char(s, cp);
    *cp = tve_byte_char((unsigned char)*s);
    return 1;
}

static enum tv_err cut_word(tve_bpe *b, const char *s, size_t n,
                            struct tve_ids *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    uint32_t left = 0, right = 0;
    size_t start = 0, len = 0;
    /* Parts are no words: ignore_merges does not look at them, so they may not
     * stand in its cache. */
    const bool keep = !b->ignore_merges;

    for (size_t i = 0, before = 0; i < n; before = i, i += len, left = right) {
        len = next_char(b, s + i, &right);
        /* Unknown characters are dropped or fused with others of their kind,
         * so that more than the neighbour counts: no cut beside them. */
        if (i > start && !neighbours(b, left, right) &&
            is_known(b, s + i, len) && is_known(b, s + before, i - before)) {
            TV_TRY(merge_word(b, s + start, i - start, keep, out, err));
            start = i;
        }
    }
    TV_TRY(merge_word(b, s + start, n - start, keep, out, err));
out:
    return rc;
}

enum tv_err tve_bpe_word(tve_bpe *b, const char *s, size_t n,
                         struct tve_ids *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    if (b->ignore_merges) {
        const char *text = s;
        size_t n_text = n, slot = 0;
        int32_t id = 0;
        const bool keep = n <= CACHE_WORD_MAX;
        const uint64_t hash = keep ? tv_hash64(s, n) : 0;
        const struct cache_entry *const e =
            keep ? cache_find(b, hash, s, n, &slot) : NULL;

        if (e) {
            rc = tve_ids_add(out, b->cache_ids + e->ids_at, e->n_ids, err);
            goto out;
        }

        if (b->byte_level) {
            b->mapped.n_bytes = 0;
            for (size_t i = 0; i < n; i++) {
                char one[4];
                const uint32_t cp = tve_byte_char((unsigned char)s[i]);
                tv_buf_add(&b->mapped, one, tve_char_put(cp, one));
            }
            TV_TRY(tv_buf_ok(&b->mapped, err));
            text = b->mapped.data;
            n_text = b->mapped.n_bytes;
        }
        id = tve_bpe_id(b, text, n_text);
        if (id >= 0) {
            if (keep)
                cache_put(b, hash, slot, s, n, &id, 1);
            rc = tve_ids_add(out, &id, 1, err);
            goto out;
        }
    }
    if (n >= CUT_MIN && !b->prefix && !b->suffix)
        rc = cut_word(b, s, n, out, err);
    else
        rc = merge_word(b, s, n, true, out, err);
out:
    return rc;
}
