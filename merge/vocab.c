/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vocab.c - tokenizer.json -> tokens, ids, merges.
 *
 * An added token that the model knows too has the model's id, as in the library
 * `tokenizers`. The tree is not kept: it takes ten times the memory.
 */
#include "vocab.h"

#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/hash.h"

static enum tv_err nomem(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory for a vocabulary");
}

static enum tv_err malformed(struct tv_error *err, const char *label,
                             const char *what)
{
    return tv_error_set(err, TV_E_CORRUPT, "%s: %s", label, what);
}

/* ---- tables -------------------------------------------------------------- */

static size_t slot_of(const struct tvm_vocab *v, const char *s, size_t n)
{
    size_t i = (size_t)tv_hash64(s, n) & (v->n_slots - 1);
    while (v->slots[i] != 0) {
        const struct tvm_token *const t = &v->tokens[v->slots[i] - 1];
        if (t->n == n && memcmp(t->s, s, n) == 0)
            break;
        i = (i + 1) & (v->n_slots - 1);
    }
    return i;
}

const struct tvm_token *tvm_vocab_find(const struct tvm_vocab *v, const char *s,
                                       size_t n)
{
    if (v->n_slots == 0)
        return NULL;
    const size_t i = slot_of(v, s, n);
    return v->slots[i] == 0 ? NULL : &v->tokens[v->slots[i] - 1];
}

const struct tvm_token *tvm_vocab_at(const struct tvm_vocab *v, int64_t id)
{
    if (id < 0 || (uint64_t)id >= v->n_ids || v->by_id[id] == 0)
        return NULL;
    return &v->tokens[v->by_id[id] - 1];
}

static enum tv_err tables_make(struct tvm_vocab *v, size_t most,
                               struct tv_error *err)
{
    v->n_slots = 64;
    while (v->n_slots < 2 * most)
        v->n_slots *= 2;
    v->tokens = tv_calloc(most + 1, sizeof(*v->tokens));
    v->slots = tv_calloc(v->n_slots, sizeof(*v->slots));
    return v->tokens == NULL || v->slots == NULL ? nomem(err) : TV_OK;
}

/* A token that is there already is returned as it is. */
static enum tv_err token_add(struct tvm_vocab *v, const char *s, size_t n,
                             int64_t id, const char *label,
                             struct tv_error *err, struct tvm_token **out)
{
    const size_t slot = slot_of(v, s, n);
    if (v->slots[slot] != 0) {
        *out = &v->tokens[v->slots[slot] - 1];
        return TV_OK;
    }
    /* Bounded, because tables are indexed by it. */
    if (id < 0 || id >= (int64_t)TVM_TOKENS_MAX)
        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: a token has the impossible id %lld", label,
                            (long long)id);
    struct tvm_token *const t = &v->tokens[v->n];
    t->s = tvm_arena_strndup(&v->arena, s, n);
    if (t->s == NULL)
        return nomem(err);
    t->n = (uint32_t)n;
    t->id = (int32_t)id;
    v->slots[slot] = (uint32_t)++v->n;
    if ((size_t)id >= v->n_ids)
        v->n_ids = (size_t)id + 1;
    *out = t;
    return TV_OK;
}

/* ---- kind ---------------------------------------------------------------- */

static bool is_type(const json_t *j, const char *type)
{
    const char *const s = json_string_value(json_object_get(j, "type"));
    return s != NULL && strcmp(s, type) == 0;
}

/* Is there a step of this type, or a text that holds `text`, anywhere in j? */
static bool mentions(const json_t *j, const char *type, const char *text)
{
    const char *key = NULL;
    json_t *value = NULL;
    size_t i = 0;
    if (json_is_string(j))
        return text != NULL && strstr(json_string_value(j), text) != NULL;
    if (json_is_array(j)) {
        json_array_foreach(j, i, value)
        {
            if (mentions(value, type, text))
                return true;
        }
        return false;
    }
    if (!json_is_object(j))
        return false;
    if (is_type(j, type))
        return true;
    json_object_foreach((json_t *)j, key, value)
    {
        if (mentions(value, type, text))
            return true;
    }
    return false;
}

static enum tvm_spaces spaces_of(const json_t *root)
{
    static const char *const parts[] = {"normalizer", "pre_tokenizer",
                                        "decoder"};
    /* Some byte-level files name it as post-processor or decoder only. */
    for (size_t i = 0; i < 3; i++) {
        if (mentions(json_object_get(root, parts[i]), "ByteLevel", NULL))
            return TVM_SPACES_BYTE_LEVEL;
    }
    for (size_t i = 0; i < 3; i++) {
        if (mentions(json_object_get(root, parts[i]), "Metaspace",
                     "\xe2\x96\x81"))
            return TVM_SPACES_METASPACE;
    }
    return TVM_SPACES_PLAIN;
}

static enum tv_err hash_rules(struct tvm_vocab *v, const json_t *root,
                              struct tv_error *err)
{
    static const char *const parts[] = {"normalizer", "pre_tokenizer"};
    struct tv_hash h[2] = {{0, 0}, {0, 0}};
    for (size_t i = 0; i < 2; i++) {
        const json_t *const part = json_object_get(root, parts[i]);
        const size_t flags = JSON_COMPACT | JSON_SORT_KEYS | JSON_ENCODE_ANY;
        char *const text =
            part == NULL ? tv_strdup("") : tv_json_text(part, flags);
        if (text == NULL)
            return nomem(err);
        h[i] = tv_hash128(text, strlen(text));
        tv_free(text);
    }
    v->rules.lo = h[0].lo ^ (h[1].lo << 1 | h[1].lo >> 63);
    v->rules.hi = h[0].hi ^ (h[1].hi << 1 | h[1].hi >> 63);
    return TV_OK;
}

const char *tvm_vocab_kind(const struct tvm_vocab *v, char dst[64])
{
    (void)snprintf(dst, 64, "%s%.40s",
                   v->spaces == TVM_SPACES_BYTE_LEVEL  ? "byte-level "
                   : v->spaces == TVM_SPACES_METASPACE ? "metaspace "
                                                       : "",
                   v->type);
    return dst;
}

/* ---- reading ------------------------------------------------------------- */

static enum tv_err read_model(struct tvm_vocab *v, json_t *vocab,
                              const char *label, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_token *t = NULL;
    const char *key = NULL;
    json_t *value = NULL;
    size_t i = 0;

    json_object_foreach(vocab, key, value)
    {
        if (!json_is_integer(value))
            return malformed(err, label, "a token has no id");
        TV_TRY(token_add(v, key, strlen(key), json_integer_value(value), label,
                         err, &t));
    }
    json_array_foreach(vocab, i, value) /* Unigram: [token, score] */
    {
        const json_t *const s = json_array_get(value, 0);
        if (!json_is_string(s))
            return malformed(err, label, "a token is no text");
        TV_TRY(token_add(v, json_string_value(s), json_string_length(s),
                         (int64_t)i, label, err, &t));
    }
    v->n_model = v->n;
out:
    return rc;
}

static enum tv_err read_added(struct tvm_vocab *v, const json_t *list,
                              const char *label, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tvm_token *t = NULL;
    size_t i = 0;
    json_t *one = NULL;

    json_array_foreach(list, i, one)
    {
        const json_t *const s = json_object_get(one, "content");
        const json_t *const id = json_object_get(one, "id");
        if (!json_is_string(s) || !json_is_integer(id))
            return malformed(err, label,
                             "an added token has no content or no id");
        if (json_string_length(s) == 0)
            continue;
        TV_TRY(token_add(v, json_string_value(s), json_string_length(s),
                         json_integer_value(id), label, err, &t));
        t->added = true;
        t->special = json_is_true(json_object_get(one, "special"));
        t->single_word = json_is_true(json_object_get(one, "single_word"));
        t->lstrip = json_is_true(json_object_get(one, "lstrip"));
        t->rstrip = json_is_true(json_object_get(one, "rstrip"));
        const json_t *const normal = json_object_get(one, "normalized");
        t->normalized = normal == NULL ? !t->special : json_is_true(normal);
    }
out:
    return rc;
}

bool tvm_merge_halves(const json_t *m, const char **left, size_t *n_left,
                      const char **right, size_t *n_right)
{
    if (json_is_string(m)) {
        const char *const s = json_string_value(m);
        const char *const space = strchr(s, ' ');
        if (space == NULL || strchr(space + 1, ' ') != NULL)
            return false;
        *left = s;
        *n_left = (size_t)(space - s);
        *right = space + 1;
        *n_right = strlen(space + 1);
        return true;
    }
    const json_t *const a = json_array_get(m, 0);
    const json_t *const b = json_array_get(m, 1);
    if (json_array_size(m) != 2 || !json_is_string(a) || !json_is_string(b))
        return false;
    *left = json_string_value(a);
    *n_left = json_string_length(a);
    *right = json_string_value(b);
    *n_right = json_string_length(b);
    return true;
}

static enum tv_err read_merges(struct tvm_vocab *v, const json_t *list,
                               const char *label, struct tv_error *err)
{
    const size_t n = json_array_size(list);
    if (n == 0)
        return TV_OK;
    v->merges = tv_calloc(n, sizeof(*v->merges));
    if (v->merges == NULL)
        return nomem(err);
    for (size_t i = 0; i < n; i++) {
        const char *l = NULL;
        const char *r = NULL;
        size_t n_l = 0;
        size_t n_r = 0;
        if (!tvm_merge_halves(json_array_get(list, i), &l, &n_l, &r, &n_r))
            return tv_error_set(err, TV_E_CORRUPT, "%s: merge %zu is malformed",
                                label, i);
        const struct tvm_token *const a = tvm_vocab_find(v, l, n_l);
        const struct tvm_token *const b = tvm_vocab_find(v, r, n_r);
        if (a == NULL || b == NULL)
            return tv_error_set(err, TV_E_CORRUPT,
                                "%s: merge %zu has a part that is no token",
                                label, i);
        v->merges[i].left = (uint32_t)(a - v->tokens);
        v->merges[i].right = (uint32_t)(b - v->tokens);
    }
    v->n_merges = n;
    return TV_OK;
}

/* Of two tokens with one id the first is the one a row stands for. */
static enum tv_err index_ids(struct tvm_vocab *v, struct tv_error *err)
{
    v->by_id = tv_calloc(v->n_ids + 1, sizeof(*v->by_id));
    if (v->by_id == NULL)
        return nomem(err);
    for (size_t i = 0; i < v->n; i++) {
        uint32_t *const at = &v->by_id[v->tokens[i].id];
        if (*at == 0)
            *at = (uint32_t)i + 1;
    }
    return TV_OK;
}

enum tv_err tvm_vocab_read(const json_t *root, const char *label,
                           struct tv_error *err, struct tvm_vocab *out)
{
    enum tv_err rc = TV_OK;
    const json_t *const model = json_object_get(root, "model");
    json_t *const vocab = json_object_get(model, "vocab");
    const json_t *const added = json_object_get(root, "added_tokens");
    const char *const type = json_string_value(json_object_get(model, "type"));
    size_t most = 0;

    memset(out, 0, sizeof(*out));
    if (!json_is_object(vocab) && !json_is_array(vocab)) {
        rc = malformed(err, label, "there is no vocabulary");
        goto out;
    }
    if (added != NULL && !json_is_null(added) && !json_is_array(added)) {
        rc = malformed(err, label, "\"added_tokens\" is no list");
        goto out;
    }
    most = json_array_size(added) + (json_is_array(vocab)
                                         ? json_array_size(vocab)
                                         : json_object_size(vocab));
    if (most > TVM_TOKENS_MAX) {
        rc = malformed(err, label, "too many tokens");
        goto out;
    }
    /* Old files do not name the type. */
    out->type = type != NULL           ? tvm_arena_strdup(&out->arena, type)
                : json_is_array(vocab) ? "Unigram"
                                       : "BPE";
    if (out->type == NULL) {
        rc = nomem(err);
        goto out;
    }
    out->spaces = spaces_of(root);
    TV_TRY(hash_rules(out, root, err));
    TV_TRY(tables_make(out, most, err));
    TV_TRY(read_model(out, vocab, label, err));
    TV_TRY(read_added(out, added, label, err));
    TV_TRY(read_merges(out, json_object_get(model, "merges"), label, err));
    TV_TRY(index_ids(out, err));
out:
    return rc;
}

void tvm_vocab_free(struct tvm_vocab *v)
{
    tv_free(v->tokens);
    tv_free(v->slots);
    tv_free(v->by_id);
    tv_free(v->merges);
    tvm_arena_free(&v->arena);
    memset(v, 0, sizeof(*v));
}
