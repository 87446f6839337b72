/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tokenizer.c - tokenizer.json as a whole: loading, the way of a text through
 * the parts (tok.h), post-processors.
 */
#include <string.h>
#include <stdlib.h>

#include "tv/alloc.h"
#include "tv/sys.h"

#include "tok.h"

#define POST_MAX  256u
#define POST_TEXT (-1) /* where the text's own ids go */

struct tve_tokenizer {
    struct tve_added *added;
    size_t n_added;
    struct tve_trie raw, normal;
    struct tve_norms norms;
    struct tve_pres pres;
    tve_bpe *bpe;
    int32_t post[POST_MAX]; /* ids and one POST_TEXT */
    size_t n_post;
    int32_t max_id;
    struct tv_hash hash;
};

void tve_ids_free(struct tve_ids *ids)
{
    tv_free(ids->ids);
    memset(ids, 0, sizeof(*ids));
}

static enum tv_err malformed(const char *what, struct tv_error *err)
{
    return tv_error_set(err, TV_E_CORRUPT, "tokenizer.json: %s", what);
}

/* ---- added tokens -------------------------------------------------------- */

static enum tv_err load_added_one(tve_tokenizer *t, const json_t *j,
                                  struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_added *const a = &t->added[t->n_added];
    const json_t *const id = json_object_get(j, "id");
    const char *content = NULL, *text = NULL;
    size_t n = 0, n_text = 0;

    TV_TRY(tve_json_str(j, "content", &content, &n, err));
    if (!content || !json_is_integer(id) || json_integer_value(id) < 0 ||
        json_integer_value(id) >= INT32_MAX) {
        rc = malformed("an added token has no content or no id", err);
        goto out;
    }
    TV_TRY(tve_json_bool(j, "single_word", false, &a->single_word, err));
    TV_TRY(tve_json_bool(j, "lstrip", false, &a->lstrip, err));
    TV_TRY(tve_json_bool(j, "rstrip", false, &a->rstrip, err));
    TV_TRY(tve_json_bool(j, "special", false, &a->special, err));
    TV_TRY(tve_json_bool(j, "normalized", !a->special, &a->normalized, err));
    if (n == 0)
        goto out;
    /* The model's own id wins over the file's, as in `tokenizers`. */
    a->id = tve_bpe_id(t->bpe, content, n);
    if (a->id < 0)
        a->id = (int32_t)json_integer_value(id);
    if (a->id > t->max_id)
        t->max_id = a->id;
    text = content;
    n_text = n;
    if (a->normalized)
        TV_TRY(tve_norms_run(&t->norms, content, n, &text, &n_text, err));
    a->content = tv_strndup(content, n);
    if (!a->content) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    a->n = n;
    t->n_added++;
    TV_TRY(tve_trie_add(a->normalized ? &t->normal : &t->raw, text, n_text,
                        (int32_t)(t->n_added - 1), err));
out:
    return rc;
}

/* `tokenizers` numbers special tokens first when it builds its tries; that
 * decides which of two equal contents counts. */
static enum tv_err load_added(tve_tokenizer *t, const json_t *list,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t n = json_array_size(list);

    if (list && !json_is_null(list) && !json_is_array(list))
        return malformed("\"added_tokens\" is not a list", err);
    t->added = tv_calloc(n + 1, sizeof(*t->added));
    if (!t->added)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (int special = 1; special >= 0; special--) {
        for (size_t i = 0; i < n; i++) {
            const json_t *const j = json_array_get(list, i);
            bool is_special = false;
            TV_TRY(tve_json_bool(j, "special", false, &is_special, err));
            if (is_special == (special == 1))
                TV_TRY(load_added_one(t, j, err));
        }
    }
out:
    return rc;
}

/* ---- post-processors ----------------------------------------------------- */

static enum tv_err post_put(tve_tokenizer *t, int64_t id, struct tv_error *err)
{
    if (t->n_post == POST_MAX || id < POST_TEXT || id >= INT32_MAX)
        return malformed("malformed post-processor", err);
    t->post[t->n_post++] = (int32_t)id;
    return TV_OK;
}

/* Puts what stands in `inner` in the place of the text. */
static enum tv_err post_nest(tve_tokenizer *t, const int32_t *inner,
                             size_t n_inner, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    int32_t outer[POST_MAX];
    const size_t n = t->n_post;

    memcpy(outer, t->post, n * sizeof(*outer));
    t->n_post = 0;
    for (size_t i = 0; i < n; i++) {
        if (outer[i] != POST_TEXT) {
            TV_TRY(post_put(t, outer[i], err));
            continue;
        }
        for (size_t k = 0; k < n_inner; k++)
            TV_TRY(post_put(t, inner[k], err));
    }
out:
    return rc;
}

static enum tv_err load_template(tve_tokenizer *t, const json_t *j,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const json_t *const single = json_object_get(j, "single");
    const json_t *const specials = json_object_get(j, "special_tokens");

    if (!json_is_array(single)) {
        rc = malformed("malformed post-processor \"TemplateProcessing\"", err);
        goto out;
    }
    t->n_post = 0;
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *const part = json_array_get(single, i);
        const json_t *const token = json_object_get(part, "SpecialToken");
        const char *name = NULL;
        size_t n = 0;

        if (json_object_get(part, "Sequence")) {
            TV_TRY(post_put(t, POST_TEXT, err));
            continue;
        }
        TV_TRY(tve_json_str(token, "id", &name, &n, err));
        const json_t *const ids = json_object_get(
            name ? json_object_get(specials, name) : NULL, "ids");
        if (!json_is_array(ids)) {
            rc = malformed("a template names a token without ids", err);
            goto out;
        }
        for (size_t k = 0; k < json_array_size(ids); k++) {
            const json_t *const id = json_array_get(ids, k);
            if (!json_is_integer(id) || json_integer_value(id) < 0) {
                rc = malformed("a template has an impossible id", err);
                goto out;
            }
            TV_TRY(post_put(t, json_integer_value(id), err));
        }
    }
out:
    return rc;
}

/* ["</s>", 2] */
static enum tv_err post_pair(tve_tokenizer *t, const json_t *pair,
                             struct tv_error *err)
{
    const json_t *const id = json_array_get(pair, 1);

    if (!json_is_integer(id) || json_integer_value(id) < 0)
        return malformed("malformed post-processor", err);
    return post_put(t, json_integer_value(id), err);
}

static enum tv_err load_post(tve_tokenizer *t, const json_t *j, unsigned depth,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const char *type = NULL;
    size_t n = 0, n_inner = 0;
    int32_t inner[POST_MAX];

    if (!j || json_is_null(j))
        goto out;
    TV_TRY(tve_json_str(j, "type", &type, &n, err));
    if (!type || depth > 8) {
        rc = malformed("malformed post-processor", err);
        goto out;
    }
    if (!strcmp(type, "ByteLevel"))
        goto out; /* changes offsets only */
    n_inner = t->n_post;
    memcpy(inner, t->post, n_inner * sizeof(*inner));
    if (!strcmp(type, "Sequence")) {
        const json_t *const list = json_object_get(j, "processors");
        if (!json_is_array(list)) {
            rc = malformed("malformed post-processor \"Sequence\"", err);
            goto out;
        }
        for (size_t i = 0; i < json_array_size(list); i++)
            TV_TRY(load_post(t, json_array_get(list, i), depth + 1, err));
    } else if (!strcmp(type, "TemplateProcessing")) {
        TV_TRY(load_template(t, j, err));
        TV_TRY(post_nest(t, inner, n_inner, err));
    } else if (!strcmp(type, "BertProcessing") ||
               !strcmp(type, "RobertaProcessing")) {
        t->n_post = 0;
        TV_TRY(post_pair(t, json_object_get(j, "cls"), err));
        TV_TRY(post_put(t, POST_TEXT, err));
        TV_TRY(post_pair(t, json_object_get(j, "sep"), err));
        TV_TRY(post_nest(t, inner, n_inner, err));
    } else {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "tokenizer.json: post-processor \"%.100s\" is not "
                          "supported",
                          type);
    }
out:
    return rc;
}

/* ---- opening ------------------------------------------------------------- */

enum tv_err tve_tokenizer_open(const char *json, size_t n, struct tv_error *err,
                               tve_tokenizer **out)
{
    enum tv_err rc = TV_OK;
    tve_tokenizer *t = NULL;
    json_error_t je;
    json_t *const j =
        json_loadb(json, n, JSON_REJECT_DUPLICATES | JSON_ALLOW_NUL, &je);

    *out = NULL;
    if (!j) {
        rc = json_error_code(&je) == json_error_out_of_memory
                 ? tv_error_set(err, TV_E_NOMEM, "out of memory")
                 : tv_error_set(err, TV_E_CORRUPT,
                                "tokenizer.json, line %d, column %d: %s",
                                je.line, je.column, je.text);
        goto out;
    }
    if (!json_is_object(j)) {
        rc = malformed("not a JSON object", err);
        goto out;
    }
    t = tv_calloc(1, sizeof(*t));
    if (!t) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    t->hash = tv_hash128(json, n);
    TV_TRY(tve_norms_load(json_object_get(j, "normalizer"), &t->norms, err));
    TV_TRY(tve_pres_load(json_object_get(j, "pre_tokenizer"), &t->pres, err));
    TV_TRY(tve_bpe_open(json_object_get(j, "model"), t->pres.byte_level, err,
                        &t->bpe));
    t->max_id = tve_bpe_max_id(t->bpe);
    TV_TRY(load_added(t, json_object_get(j, "added_tokens"), err));
    t->post[t->n_post++] = POST_TEXT;
    TV_TRY(load_post(t, json_object_get(j, "post_processor"), 0, err));
    *out = t;
    t = NULL;
out:
    tve_tokenizer_close(t);
    json_decref(j);
    return rc;
}

void tve_tokenizer_close(tve_tokenizer *t)
{
    if (!t)
        return;
    for (size_t i = 0; t->added && i < t->n_added; i++)
        tv_free(t->added[i].content);
    tv_free(t->added);
    tve_trie_free(&t->raw);
    tve_trie_free(&t->normal);
    tve_norms_free(&t->norms);
    tve_pres_free(&t->pres);
    tve_bpe_close(t->bpe);
    tv_free(t);
}

int32_t tve_tokenizer_id(const tve_tokenizer *t, const char *content)
{
    const size_t n = strlen(content);

    for (size_t i = 0; i < t->n_added; i++)
        if (t->added[i].n == n && !memcmp(t->added[i].content, content, n))
            return t->added[i].id;
    return tve_bpe_id(t->bpe, content, n);
}

size_t tve_tokenizer_vocab(const tve_tokenizer *t)
{
    return (size_t)(t->max_id + 1);
}

struct tv_hash tve_tokenizer_hash(const tve_tokenizer *t)
{
    return t->hash;
}

/* ---- encoding ------------------------------------------------------------ */

typedef enum tv_err (*piece_fn)(tve_tokenizer *t, const char *s, size_t n,
                                bool first, struct tve_ids *out,
                                struct tv_error *err);

/* Cuts s at the added tokens of a trie and gives the rest to fn. */
static enum tv_err at_added(tve_tokenizer *t, const struct tve_trie *trie,
                            const char *s, size_t n, bool first, piece_fn fn,
                            struct tve_ids *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    size_t at = 0, from = 0, start = 0, end = 0;
    int32_t token = -1;

    while (
        tve_trie_next(trie, t->added, s, n, &at, from, &start, &end, &token)) {
        if (start > from)
            TV_TRY(fn(t, s + from, start - from, first && from == 0, out, err));
        TV_TRY(tve_ids_add(out, t->added[token].id, err));
        from = end;
    }
    if (from < n)
        TV_TRY(fn(t, s + from, n - from, first && from == 0, out, err));
out:
    return rc;
}

static enum tv_err normal_piece(tve_tokenizer *t, const char *s, size_t n,
                                bool first, struct tve_ids *out,
                                struct tv_error *err)
{
    return tve_pres_run(&t->pres, t->bpe, s, n, first, out, err);
}

static enum tv_err raw_piece(tve_tokenizer *t, const char *s, size_t n,
                             bool first, struct tve_ids *out,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const char *text = NULL;
    size_t n_text = 0;

    TV_TRY(tve_norms_run(&t->norms, s, n, &text, &n_text, err));
    TV_TRY(
        at_added(t, &t->normal, text, n_text, first, normal_piece, out, err));
out:
    return rc;
}

static size_t bad_byte(const char *s, size_t n)
{
    size_t lo = 0, hi = n;

    /* The longest valid prefix, up to a cut character. */
    while (lo < hi) {
        const size_t mid = lo + (hi - lo + 1) / 2;
        bool ok = false;
        for (size_t cut = 0; cut < 4 && cut < mid && !ok; cut++)
            ok = tv_utf8_valid(s, mid - cut);
        if (ok)
            lo = mid;
        else
            hi = mid - 1;
    }
    while (lo > 0 && !tv_utf8_valid(s, lo))
        lo--;
    return lo;
}

enum tv_err tve_tokenizer_encode(tve_tokenizer *t, const char *text, size_t n,
                                 bool special, struct tve_ids *out,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    if (!tv_utf8_valid(text, n)) {
        rc =
            tv_error_set(err, TV_E_CORRUPT, "the text is not UTF-8 at byte %zu",
                         bad_byte(text, n));
        goto out;
    }
    for (size_t i = 0; i < t->n_post; i++) {
        if (t->post[i] == POST_TEXT)
            TV_TRY(at_added(t, &t->raw, text, n, true, raw_piece, out, err));
        else if (special)
            TV_TRY(tve_ids_add(out, t->post[i], err));
    }
out:
    return rc;
}

/* ---- the tokenizer of a model -------------------------------------------- */

static enum tv_err read_side(tv_input *model, const char *dir, const char *name,
                             bool *found, char **data, size_t *n,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = NULL;

    *found = false;
    if (!dir)
        return tv_input_side_read(model, name, found, data, n, err);
    path = tv_path_join(dir, name);
    if (!path)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    if (tv_path_exists(path)) {
        rc = tv_file_read(path, TV_JSON_MAX, err, data, n);
        *found = rc == TV_OK;
    }
    tv_free(path);
    return rc;
}

/* bos_token is a string, or an added token object with "content". */
static enum tv_err bos_of_tokenizer(const char *data, size_t n,
                                    const tve_tokenizer *t, int32_t *bos,
                                    struct tv_error *err)
{
    json_t *j = NULL;
    /* Its model_max_length may be too large for jansson. */
    const enum tv_err rc =
        tv_json_parse_exact(data, n, "tokenizer_config.json", err, &j);
    const json_t *v = json_object_get(j, "bos_token");

    if (rc != TV_OK)
        return rc;
    if (json_is_object(v))
        v = json_object_get(v, "content");
    if (json_is_string(v))
        *bos = tve_tokenizer_id(t, json_string_value(v));
    json_decref(j);
    return TV_OK;
}

static enum tv_err bos_of_config(const char *data, size_t n, int32_t *bos,
                                 struct tv_error *err)
{
    json_t *j = NULL;
    const enum tv_err rc = tv_json_parse_exact(data, n, "config.json", err, &j);
    const json_t *v = json_object_get(j, "bos_token_id");

    if (rc != TV_OK)
        return rc;
    if (!v)
        v = json_object_get(json_object_get(j, "text_config"), "bos_token_id");
    if (json_is_array(v))
        v = json_array_get(v, 0);
    if (json_is_integer(v) && json_integer_value(v) >= 0 &&
        json_integer_value(v) < INT32_MAX)
        *bos = (int32_t)json_integer_value(v);
    json_decref(j);
    return TV_OK;
}

enum tv_err tve_bos_of(tv_input *model, int32_t *bos, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *data = NULL;
    size_t n = 0;
    bool found = false;

    *bos = -1;
    TV_TRY(tv_input_side_read(model, "config.json", &found, &data, &n, err));
    if (found)
        TV_TRY(bos_of_config(data, n, bos, err));
out:
    tv_free(data);
    return rc;
}

enum tv_err tve_tokenizer_of(tv_input *model, const char *path, int32_t *bos,
                             struct tv_error *err, tve_tokenizer **out)
{
    enum tv_err rc = TV_OK;
    tve_tokenizer *t = NULL;
    char *data = NULL, *dir = NULL;
    size_t n = 0;
    bool found = false;

    *out = NULL;
    *bos = -1;
    if (path && !tv_path_is_dir(path)) {
        const char *const slash = strrchr(path, '/');

        TV_TRY(tv_file_read(path, TV_JSON_MAX, err, &data, &n));
        found = true;
        dir = slash ? tv_strndup(path, (size_t)(slash - path) + 1)
                    : tv_strdup(".");
    } else {
        if (path)
            dir = tv_strdup(path);
        TV_TRY(read_side(model, dir, "tokenizer.json", &found, &data, &n, err));
    }
    if (path && !dir) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (!found) {
        rc = tv_error_set(err, TV_E_INPUT, "%s has no tokenizer.json",
                          path ? path : tv_input_label(model));
        tv_error_hint(err, "name a directory or file that has one with "
                           "--tokenizer");
        goto out;
    }
    rc = tve_tokenizer_open(data, n, err, &t);
    if (rc != TV_OK)
        tv_error_context(err, "%s", path ? path : tv_input_label(model));
    TV_TRY(rc);
    tv_free(data);
    data = NULL;
    TV_TRY(
        read_side(model, dir, "tokenizer_config.json", &found, &data, &n, err));
    if (found)
        TV_TRY(bos_of_tokenizer(data, n, t, bos, err));
    if (*bos < 0 && model)
        TV_TRY(tve_bos_of(model, bos, err));
    *out = t;
    t = NULL;
out:
    tve_tokenizer_close(t);
    tv_free(data);
    tv_free(dir);
    return rc;
}
