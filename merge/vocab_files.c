/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vocab_files.c - the tokenizer's files and the ids in config.json for the
 * vocabulary that was decided.
 *
 * Files of the first tokenizer are edited, not made anew; a file that needs no
 * change keeps its bytes. Ids are pinned: the library `tokenizers` numbers
 * added tokens itself unless the model's vocabulary knows them, and would
 * number otherwise once ordinary tokens stand behind added ones.
 */
#include "plan_vocab.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/text.h"

struct editor {
    struct planner *pl;
    struct plan_vocab *v;
    json_t *root;
    bool changed, failed; /* failed: out of memory */
};

static void put(struct editor *ed, json_t *object, const char *key,
                json_t *value)
{
    if (value == NULL || json_object_set_new(object, key, value) != 0)
        ed->failed = true;
    ed->changed = true;
}

static void append(struct editor *ed, json_t *array, json_t *value)
{
    if (value == NULL || json_array_append_new(array, value) != 0)
        ed->failed = true;
    ed->changed = true;
}

static json_t *text_of(const struct plan_token *t)
{
    return json_stringn(t->s, t->n);
}

static const struct tvm_vocab *first_of(const struct plan_vocab *v)
{
    return v->of[v->from].v;
}

static bool is_beyond(const struct plan_vocab *v, const json_t *s)
{
    return json_is_string(s) &&
           plan_vocab_beyond(v, json_string_value(s), json_string_length(s));
}

static bool is_dropped(const struct plan_vocab *v, const json_t *s)
{
    return json_is_string(s) &&
           plan_vocab_dropped(v, json_string_value(s), json_string_length(s));
}

/* Tokens without a row leave the files first; those that another model has come
 * back as new ones, with their new ids. */

/* ---- tokenizer.json: the model --------------------------------------------
 */

static void drop_tokens(struct editor *ed, json_t *vocab)
{
    const struct plan_vocab *const v = ed->v;
    const struct tvm_vocab *const first = first_of(v);
    if (v->n_dropped == 0)
        return;
    for (size_t i = 0; i < first->n; i++) {
        const struct tvm_token *const t = &first->tokens[i];
        if (plan_vocab_beyond(v, t->s, t->n) &&
            json_object_del(vocab, t->s) == 0)
            ed->changed = true;
    }
    /* Ids of a list are places in it, and those beyond the rows are its end. */
    while (json_is_array(vocab) &&
           json_array_size(vocab) > v->of[v->from].rows) {
        (void)json_array_remove(vocab, json_array_size(vocab) - 1);
        ed->changed = true;
    }
}

static void drop_merges(struct editor *ed, json_t *merges)
{
    const struct plan_vocab *const v = ed->v;
    json_t *kept = NULL;
    if (v->n_dropped == 0 || json_array_size(merges) == 0)
        return;
    kept = json_array();
    for (size_t i = 0; i < json_array_size(merges) && kept != NULL; i++) {
        json_t *const m = json_array_get(merges, i);
        const char *l = NULL;
        const char *r = NULL;
        size_t n_l = 0;
        size_t n_r = 0;
        char *joined = NULL;
        bool gone = true;
        if (tvm_merge_halves(m, &l, &n_l, &r, &n_r)) {
            joined = tv_asprintf("%.*s%.*s", (int)n_l, l, (int)n_r, r);
            ed->failed = ed->failed || joined == NULL;
            gone = plan_vocab_beyond(v, l, n_l) ||
                   plan_vocab_beyond(v, r, n_r) ||
                   (joined != NULL && plan_vocab_beyond(v, joined, n_l + n_r));
        }
        tv_free(joined);
        if (!gone && json_array_append(kept, m) != 0)
            ed->failed = true;
    }
    if (kept == NULL || json_array_clear(merges) != 0 ||
        json_array_extend(merges, kept) != 0)
        ed->failed = true;
    json_decref(kept);
    ed->changed = true;
}

/* The merges that make new ordinary tokens, behind the first model's: those of
 * the models in order, each in its own order. */
static void add_merges(struct editor *ed, json_t *model)
{
    struct plan_vocab *const v = ed->v;
    json_t *merges = json_object_get(model, "merges");
    const json_t *const prefix =
        json_object_get(model, "continuing_subword_prefix");
    const size_t n_prefix =
        json_is_string(prefix) ? json_string_length(prefix) : 0;
    const bool pairs = json_is_array(json_array_get(merges, 0));

    if (v->n_ordinary == 0 || strcmp(first_of(v)->type, "BPE") != 0)
        return;
    if (merges == NULL) {
        merges = json_array();
        put(ed, model, "merges", merges);
    }
    for (size_t i = 0; i < ed->pl->plan->n_inputs && !ed->failed; i++) {
        const struct tvm_vocab *const x = v->of[i].v;
        bool seen = i == v->from || !v->of[i].merged;
        for (size_t k = 0; k < i && !seen; k++)
            seen = k != v->from && v->of[k].merged && v->of[k].v == x;
        for (size_t m = 0; m < x->n_merges && !seen && !ed->failed; m++) {
            const struct tvm_token *const l = &x->tokens[x->merges[m].left];
            const struct tvm_token *const r = &x->tokens[x->merges[m].right];
            char *const joined =
                r->n < n_prefix ? NULL
                                : tv_asprintf("%s%s", l->s, r->s + n_prefix);
            const struct plan_token *made = NULL;
            if (joined != NULL)
                made = plan_vocab_find(v, joined, strlen(joined));
            /* Each new token has the merges of the model it came from first. */
            const bool wanted = made != NULL && made->is_new != NULL &&
                                !made->added && made->is_new >= x->tokens &&
                                made->is_new < x->tokens + x->n &&
                                plan_vocab_find(v, l->s, l->n) != NULL &&
                                plan_vocab_find(v, r->s, r->n) != NULL;
            tv_free(joined);
            if (!wanted)
                continue;
            if (pairs || strchr(l->s, ' ') != NULL || strchr(r->s, ' ') != NULL)
                append(ed, merges, json_pack("[s, s]", l->s, r->s));
            else
                append(ed, merges, json_sprintf("%s %s", l->s, r->s));
        }
    }
}

static void add_ordinary(struct editor *ed, json_t *vocab)
{
    const struct plan_vocab *const v = ed->v;
    for (size_t i = v->n_kept; i < v->n_tokens; i++) {
        if (!v->tokens[i].added && json_is_object(vocab))
            put(ed, vocab, v->tokens[i].s, json_integer(v->tokens[i].id));
    }
}

/* ---- tokenizer.json: added tokens -----------------------------------------
 */

static json_t *added_entry(const struct plan_token *t, bool with_id)
{
    const struct tvm_token *const x = t->is_new;
    json_t *const e = json_pack(
        "{s:o, s:b, s:b, s:b, s:b, s:b}", "content", text_of(t), "single_word",
        x != NULL && x->single_word, "lstrip", x != NULL && x->lstrip, "rstrip",
        x != NULL && x->rstrip, "normalized", x != NULL && x->normalized,
        "special", x != NULL && x->special);
    json_t *all = NULL;
    if (e == NULL || !with_id)
        return e;
    all = json_pack("{s:i}", "id", (int)t->id);
    if (all != NULL && json_object_update(all, e) != 0) {
        json_decref(all);
        all = NULL;
    }
    json_decref(e);
    return all;
}

static bool is_new_added(const struct plan_vocab *v, size_t i)
{
    return v->tokens[i].promoted || (i >= v->n_kept && v->tokens[i].added);
}

static void edit_added(struct editor *ed)
{
    const struct plan_vocab *const v = ed->v;
    json_t *list = json_object_get(ed->root, "added_tokens");
    if (!json_is_array(list)) {
        list = json_array();
        put(ed, ed->root, "added_tokens", list);
    }
    for (size_t i = json_array_size(list); i-- > 0;) {
        if (is_beyond(v, json_object_get(json_array_get(list, i), "content"))) {
            (void)json_array_remove(list, i);
            ed->changed = true;
        }
    }
    for (size_t i = 0; i < v->n_tokens; i++) {
        if (is_new_added(v, i))
            append(ed, list, added_entry(&v->tokens[i], true));
    }
}

/* Ids that `tokenizers` would give otherwise go into the model's vocabulary; it
 * looks there first. */
static void pin_ids(struct editor *ed, json_t *vocab)
{
    const json_t *const list = json_object_get(ed->root, "added_tokens");
    const bool is_list = json_is_array(vocab);
    const int64_t n_vocab =
        (int64_t)(is_list ? json_array_size(vocab) : json_object_size(vocab));
    int64_t highest = -1;
    bool off = false;

    for (size_t i = 0; i < json_array_size(list) && !off; i++) {
        const json_t *const e = json_array_get(list, i);
        const char *const s = json_string_value(json_object_get(e, "content"));
        const int64_t id = json_integer_value(json_object_get(e, "id"));
        if (s == NULL || s[0] == '\0' ||
            (!is_list && json_object_get(vocab, s) != NULL))
            continue;
        if (is_list && id < n_vocab)
            continue;
        off = id != (highest >= n_vocab ? highest + 1 : n_vocab);
        highest = id;
    }
    if (!off)
        return;
    if (is_list) {
        plan_report(ed->pl, "ids of added tokens", 1, true, TV_E_UNSUPPORTED,
                    "tokenizer.json",
                    "the ids of the added tokens would not follow those of the "
                    "Unigram vocabulary without a gap");
        return;
    }
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *const e = json_array_get(list, i);
        const char *const s = json_string_value(json_object_get(e, "content"));
        const int64_t id = json_integer_value(json_object_get(e, "id"));
        if (s != NULL && s[0] != '\0' && json_object_get(vocab, s) == NULL)
            put(ed, vocab, s, json_integer(id));
    }
}

/* ---- tokenizer.json: what stands around a text ----------------------------
 */

/* The new id of a token that had no row; false: the output lacks it. */
static bool new_id(struct editor *ed, const json_t *token, json_t *array,
                   size_t at)
{
    const struct plan_token *o = NULL;
    if (!is_beyond(ed->v, token))
        return true;
    o = plan_vocab_find(ed->v, json_string_value(token),
                        json_string_length(token));
    if (o != NULL && at < json_array_size(array)) {
        if (json_array_set_new(array, at, json_integer(o->id)) != 0)
            ed->failed = true;
        ed->changed = true;
    }
    return o != NULL;
}

static void drop_piece(struct editor *ed, json_t *pieces, const char *id)
{
    for (size_t i = json_array_size(pieces); i-- > 0;) {
        const char *const s = json_string_value(json_object_get(
            json_object_get(json_array_get(pieces, i), "SpecialToken"), "id"));
        if (s != NULL && strcmp(s, id) == 0) {
            (void)json_array_remove(pieces, i);
            ed->changed = true;
        }
    }
}

/* Tokens that TemplateProcessing writes around a text. */
static void edit_pieces(struct editor *ed, json_t *post)
{
    json_t *const map = json_object_get(post, "special_tokens");
    const char *key = NULL;
    json_t *value = NULL;
    void *tmp = NULL;

    json_object_foreach_safe(map, tmp, key, value)
    {
        const json_t *const tokens = json_object_get(value, "tokens");
        json_t *const ids = json_object_get(value, "ids");
        bool has = true;
        for (size_t i = 0; i < json_array_size(tokens); i++)
            has = new_id(ed, json_array_get(tokens, i), ids, i) && has;
        if (has)
            continue;
        drop_piece(ed, json_object_get(post, "single"), key);
        drop_piece(ed, json_object_get(post, "pair"), key);
        (void)json_object_del(map, key);
        ed->changed = true;
    }
}

/* False: it cannot do without a token that is gone. */
static bool edit_post(struct editor *ed, json_t *post)
{
    json_t *const list = json_object_get(post, "processors");
    json_t *const sep = json_object_get(post, "sep");
    json_t *const cls = json_object_get(post, "cls");

    for (size_t i = json_array_size(list); i-- > 0;) {
        json_t *const one = json_array_get(list, i);
        /* Sequences are not nested. */
        edit_pieces(ed, one);
        if (!new_id(ed, json_array_get(json_object_get(one, "sep"), 0),
                    json_object_get(one, "sep"), 1) ||
            !new_id(ed, json_array_get(json_object_get(one, "cls"), 0),
                    json_object_get(one, "cls"), 1)) {
            (void)json_array_remove(list, i);
            ed->changed = true;
        }
    }
    edit_pieces(ed, post);
    return new_id(ed, json_array_get(sep, 0), sep, 1) &&
           new_id(ed, json_array_get(cls, 0), cls, 1);
}

/* Tokens without a row that other parts of the file name. */
static void edit_named(struct editor *ed, json_t *model)
{
    json_t *const padding = json_object_get(ed->root, "padding");
    const json_t *const pad = json_object_get(padding, "pad_token");

    if (ed->v->n_dropped == 0)
        return;
    if (!edit_post(ed, json_object_get(ed->root, "post_processor")))
        put(ed, ed->root, "post_processor", json_null());
    if (is_dropped(ed->v, json_object_get(model, "unk_token")))
        put(ed, model, "unk_token", json_null());
    if (is_dropped(ed->v, pad)) {
        put(ed, ed->root, "padding", json_null());
    } else if (is_beyond(ed->v, pad)) {
        const struct plan_token *const o = plan_vocab_find(
            ed->v, json_string_value(pad), json_string_length(pad));
        put(ed, padding, "pad_id", json_integer(o->id));
    }
}

static void edit_tokenizer(struct editor *ed)
{
    struct plan_vocab *const v = ed->v;
    json_t *const model = json_object_get(ed->root, "model");
    json_t *const vocab = json_object_get(model, "vocab");

    if (plan_vocab_unchanged(v))
        return;
    if (v->n_ordinary > 0 && json_is_array(vocab)) {
        plan_report(ed->pl, "Unigram union", 1, true, TV_E_UNSUPPORTED,
                    "tokenizer.json",
                    "the models' Unigram vocabularies differ in %zu ordinary "
                    "tokens, which cannot be united; use 'tokenizer: {source: "
                    "base}'",
                    v->n_ordinary);
        return;
    }
    drop_tokens(ed, vocab);
    drop_merges(ed, json_object_get(model, "merges"));
    add_ordinary(ed, vocab);
    add_merges(ed, model);
    edit_added(ed);
    edit_named(ed, model);
    pin_ids(ed, vocab);
}

/* ---- tokenizer_config.json, special_tokens_map.json, added_tokens.json ----
 */

/* Removes what names a dropped token: loaders would add it again, with an id
 * beyond the embedding. */
static void drop_special(struct editor *ed, const char *file)
{
    const struct plan_vocab *const v = ed->v;
    const char *key = NULL;
    json_t *value = NULL;
    void *tmp = NULL;

    json_object_foreach_safe(ed->root, tmp, key, value)
    {
        const size_t n = strlen(key);
        const json_t *s = value;
        if (json_is_object(value))
            s = json_object_get(value, "content");
        if (n > 6 && strcmp(key + n - 6, "_token") == 0 && is_dropped(v, s)) {
            plan_report(ed->pl, "special tokens without rows", 5, false, TV_OK,
                        file, "'%s' is removed: its token '%s' has no row", key,
                        json_string_value(s));
            (void)json_object_del(ed->root, key);
            ed->changed = true;
            continue;
        }
        for (size_t i = json_array_size(value); i-- > 0;) {
            const json_t *one = json_array_get(value, i);
            if (json_is_object(one))
                one = json_object_get(one, "content");
            if (is_dropped(v, one)) {
                (void)json_array_remove(value, i);
                ed->changed = true;
            }
        }
    }
}

static void edit_decoder(struct editor *ed)
{
    const struct plan_vocab *const v = ed->v;
    json_t *const map = json_object_get(ed->root, "added_tokens_decoder");
    const char *key = NULL;
    json_t *value = NULL;
    void *tmp = NULL;

    if (!json_is_object(map))
        return;
    json_object_foreach_safe(map, tmp, key, value)
    {
        if (is_beyond(v, json_object_get(value, "content"))) {
            (void)json_object_del(map, key);
            ed->changed = true;
        }
    }
    for (size_t i = 0; i < v->n_tokens; i++) {
        char id[24];
        if (!is_new_added(v, i))
            continue;
        (void)snprintf(id, sizeof(id), "%d", (int)v->tokens[i].id);
        put(ed, map, id, added_entry(&v->tokens[i], false));
    }
}

/* Models whose tokenizer_config.json has a template get it there too: loaders
 * read either. */
static void edit_template(struct editor *ed)
{
    const char *const chat = ed->pl->chat_template;
    const json_t *const old = json_object_get(ed->root, "chat_template");
    if (chat == NULL ||
        (json_is_string(old) && strcmp(json_string_value(old), chat) == 0))
        return;
    put(ed, ed->root, "chat_template", json_string(chat));
}

static void edit_added_map(struct editor *ed)
{
    const struct plan_vocab *const v = ed->v;
    const char *key = NULL;
    json_t *value = NULL;
    void *tmp = NULL;

    json_object_foreach_safe(ed->root, tmp, key, value)
    {
        if (!plan_vocab_beyond(v, key, strlen(key)))
            continue;
        (void)json_object_del(ed->root, key);
        ed->changed = true;
    }
    for (size_t i = 0; i < v->n_tokens; i++) {
        if (is_new_added(v, i))
            put(ed, ed->root, v->tokens[i].s, json_integer(v->tokens[i].id));
    }
}

/* ---- files ----------------------------------------------------------------
 */

/* Files that hold the ordinary tokens in another form. */
static bool is_twin(const char *name)
{
    static const char *const names[] = {
        "tokenizer.model", "vocab.json",   "merges.txt",
        "vocab.txt",       "spiece.model", "sentencepiece.bpe.model"};
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
        if (strcmp(names[i], name) == 0)
            return true;
    }
    return false;
}

static enum tv_err finish(struct editor *ed, enum tv_err rc,
                          const struct tv_error *e, const char *name,
                          char **out, size_t *n_out)
{
    struct planner *const pl = ed->pl;
    if (rc == TV_OK && ed->failed)
        rc = plan_oom(pl);
    else if (rc == TV_OK && ed->changed)
        rc = tv_json_write_exact(ed->root, pl->err, out, n_out);
    else if (rc != TV_OK && !plan_fatal(rc)) {
        plan_report(pl, name, 1, true, rc, name, "%s", e->msg);
        rc = TV_OK;
    } else if (rc != TV_OK && pl->err != NULL) {
        *pl->err = *e;
    }
    json_decref(ed->root);
    return rc;
}

enum tv_err plan_vocab_file(struct planner *pl, const char *name,
                            const char *data, size_t n, char **out,
                            size_t *n_out, bool *leave_out)
{
    struct editor ed = {.pl = pl, .v = pl->vocab};
    const bool aligned =
        pl->vocab != NULL && !pl->vocab_bad && !pl->vocab->truncate;
    struct tv_error e;
    enum tv_err rc = TV_OK;

    tv_error_clear(&e);
    *out = NULL;
    *leave_out = false;
    if (is_twin(name)) {
        const bool differs =
            aligned && (pl->vocab->n_ordinary > 0 || pl->vocab->n_dropped > 0);
        *leave_out = differs;
        if (differs)
            plan_note(pl, name, 1, name,
                      "left out: it does not have the tokens of the output; "
                      "tokenizer.json does");
        return TV_OK;
    }
    if (strcmp(name, "tokenizer_config.json") == 0) {
        rc = tv_json_parse_exact(data, n, name, &e, &ed.root);
        if (rc == TV_OK) {
            if (aligned) {
                drop_special(&ed, name);
                edit_decoder(&ed);
            }
            edit_template(&ed);
        }
    } else if (aligned && !plan_vocab_unchanged(pl->vocab) &&
               (strcmp(name, "tokenizer.json") == 0 ||
                strcmp(name, "special_tokens_map.json") == 0 ||
                strcmp(name, "added_tokens.json") == 0)) {
        rc = tv_json_parse_exact(data, n, name, &e, &ed.root);
        if (rc == TV_OK && strcmp(name, "tokenizer.json") == 0)
            edit_tokenizer(&ed);
        else if (rc == TV_OK && strcmp(name, "added_tokens.json") == 0)
            edit_added_map(&ed);
        else if (rc == TV_OK)
            drop_special(&ed, name);
    } else if (pl->chat_template != NULL &&
               (strcmp(name, "chat_template.jinja") == 0 ||
                strcmp(name, "chat_template.json") == 0)) {
        /* The new one is written by whoever lists the files. */
        *leave_out = true;
        return TV_OK;
    }
    return finish(&ed, rc, &e, name, out, n_out);
}

/* ---- config.json ----------------------------------------------------------
 */

/* An id of the donor as an id of the output, -1: its token is not there. */
static int64_t mapped_id(const struct plan_vocab *v, size_t from, int64_t id)
{
    if (v->truncate)
        return (uint64_t)id < v->n_rows ? id : -1;
    const struct tvm_token *const t = tvm_vocab_at(v->of[from].v, id);
    /* A row without a token: padding that some configs point at. */
    if (t == NULL)
        return (uint64_t)id < v->n_rows && from == v->from ? id : -1;
    const struct plan_token *const o = plan_vocab_find(v, t->s, t->n);
    return o == NULL ? -1 : o->id;
}

static void warn_id(struct editor *ed, const char *file, const char *key,
                    int64_t id)
{
    plan_note(ed->pl, "ids without tokens", 5, file,
              "'%s' %" PRId64 " is left out: the output has no such token", key,
              id);
}

/* The same list with the output's ids; false: one is not in the output. `pair`:
 * only the second number is an id. */
static bool mapped_list(struct editor *ed, size_t from, const json_t *list,
                        bool pair, json_t **out)
{
    *out = json_array();
    for (size_t i = 0; i < json_array_size(list) && *out != NULL; i++) {
        const json_t *const one = json_array_get(list, i);
        const int64_t id = json_integer_value(one);
        const int64_t now = !json_is_integer(one) || id < 0 || (pair && i == 0)
                                ? id
                                : mapped_id(ed->v, from, id);
        if (now < 0 && id >= 0)
            return false;
        if (!json_is_integer(one) ||
            json_array_append_new(*out, json_integer(now)) != 0)
            ed->failed = true;
    }
    ed->failed = ed->failed || *out == NULL;
    return true;
}

static void edit_id(struct editor *ed, size_t from, json_t *object,
                    const char *key, const char *file)
{
    json_t *const value = json_object_get(object, key);
    const bool pairs = strcmp(key, "forced_decoder_ids") == 0;
    const size_t n = json_is_array(value) ? json_array_size(value)
                                          : (size_t)json_is_integer(value);
    json_t *list = NULL;
    bool differs = false;

    if (n == 0)
        return;
    list = json_array();
    for (size_t i = 0; i < n && list != NULL; i++) {
        const json_t *const one =
            json_is_array(value) ? json_array_get(value, i) : value;
        const int64_t id = json_integer_value(one);
        int64_t now = id;
        json_t *words = NULL;
        bool has = true;
        if (json_is_array(one))
            has = mapped_list(ed, from, one, pairs, &words);
        else if (id >= 0 && json_is_integer(one))
            now = mapped_id(ed->v, from, id);
        has = has && (now >= 0 || id < 0);
        if (!has)
            warn_id(ed, file, key,
                    words == NULL ? id
                                  : json_integer_value(json_array_get(one, 0)));
        else if (json_array_append_new(list, words == NULL
                                                 ? json_integer(now)
                                                 : json_incref(words)) != 0)
            ed->failed = true;
        differs = differs || !has || now != id ||
                  (words != NULL && !json_equal(words, one));
        json_decref(words);
    }
    if (list == NULL) {
        ed->failed = true;
    } else if (differs && json_array_size(list) == 0) {
        put(ed, object, key, json_null());
    } else if (differs) {
        put(ed, object, key,
            json_is_array(value) ? json_incref(list)
                                 : json_incref(json_array_get(list, 0)));
    }
    json_decref(list);
}

static bool ends_with(const char *s, const char *end)
{
    const size_t n = strlen(s);
    const size_t n_end = strlen(end);
    return n >= n_end && strcmp(s + n - n_end, end) == 0;
}

static bool is_one_of(const char *key, const char *const *keys, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (strcmp(key, keys[i]) == 0)
            return true;
    }
    return false;
}

/* Which tokens begin and end; every model has some of these. */
static const char *const common_ids[] = {
    "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "unk_token_id", "decoder_start_token_id"};
#define N_COMMON (sizeof(common_ids) / sizeof(*common_ids))

/* Other keys of ids: of images and the like, of generation. Codes of sound are
 * no tokens of the tokenizer. */
static bool names_tokens(const char *key)
{
    static const char *const lists[] = {"suppress_tokens",
                                        "begin_suppress_tokens",
                                        "bad_words_ids", "forced_decoder_ids"};
    if (strncmp(key, "codebook_", strlen("codebook_")) == 0)
        return false;
    return is_one_of(key, common_ids, N_COMMON) ||
           is_one_of(key, lists, sizeof(lists) / sizeof(*lists)) ||
           ends_with(key, "_token_id") || ends_with(key, "_token_ids") ||
           ends_with(key, "_token_index");
}

/* An id that a larger model looks for in its input (where an image stands): no
 * token, no images any more. */
static void check_id(struct editor *ed, size_t from, const json_t *object,
                     const char *key)
{
    const json_t *const value = json_object_get(object, key);
    const int64_t id = json_integer_value(value);
    const struct tvm_token *const t =
        json_is_integer(value) && id >= 0 && !ed->v->truncate
            ? tvm_vocab_at(ed->v->of[from].v, id)
            : NULL;
    char text[64];

    if (t == NULL || is_one_of(key, common_ids, N_COMMON) ||
        mapped_id(ed->v, from, id) >= 0)
        return;
    (void)tv_text_printable(t->s, text, sizeof(text));
    plan_report(ed->pl, "ids without tokens of the config", 5, true, TV_E_INPUT,
                "config.json",
                "'%s' %" PRId64 " is '%s' in '%s', and the output has no such "
                "token; 'tokenizer: {tokens: {\"%s\": {source: MODEL}}}' adds "
                "it",
                key, id, text, ed->pl->plan->inputs[from].ref, text);
}

/* Which tokens begin and end is a matter of the tokenizer: where that comes
 * from another model than the rest of the config, `other` is that model's. */
static const json_t *common_of(const json_t *other, const char *key)
{
    const json_t *const id = json_object_get(other, key);
    return id != NULL
               ? id
               : json_object_get(json_object_get(other, "text_config"), key);
}

static void edit_ids(struct editor *ed, size_t from, json_t *object,
                     const json_t *other, const char *file)
{
    const char *key = NULL;
    json_t *value = NULL;
    void *tmp = NULL;

    json_object_foreach_safe(object, tmp, key, value)
    {
        const bool common = is_one_of(key, common_ids, N_COMMON);
        const json_t *const theirs = common ? common_of(other, key) : NULL;
        if (theirs != NULL) {
            if (!json_equal(theirs, value))
                put(ed, object, key, json_deep_copy(theirs));
            edit_id(ed, ed->v->from, object, key, file);
            continue;
        }
        /* What had no row there was never of use, and stays. */
        if (!names_tokens(key) ||
            (!common && json_is_integer(value) &&
             (uint64_t)json_integer_value(value) >= ed->v->of[from].rows))
            continue;
        if (strcmp(file, "config.json") == 0)
            check_id(ed, from, object, key);
        edit_id(ed, from, object, key, file);
    }
}

/* What only the tokenizer's model has. */
static void add_ids(struct editor *ed, const json_t *other)
{
    for (size_t i = 0; i < N_COMMON; i++) {
        const json_t *const theirs = common_of(other, common_ids[i]);
        if (theirs == NULL || common_of(ed->root, common_ids[i]) != NULL)
            continue;
        put(ed, ed->root, common_ids[i], json_deep_copy(theirs));
        edit_id(ed, ed->v->from, ed->root, common_ids[i], "config.json");
    }
}

static void edit_size(struct editor *ed, json_t *object)
{
    static const char *const keys[] = {"vocab_size", "padded_vocab_size"};
    for (size_t i = 0; i < sizeof(keys) / sizeof(*keys); i++) {
        json_t *const old = json_object_get(object, keys[i]);
        if (json_is_integer(old) &&
            json_integer_value(old) != (json_int_t)ed->v->n_rows)
            put(ed, object, keys[i], json_integer((json_int_t)ed->v->n_rows));
    }
}

/* config.json of the model that the tokenizer comes from, when the rest comes
 * from another one; *out owned or NULL. */
static enum tv_err read_other(struct planner *pl, size_t from,
                              struct tv_error *e, json_t **out)
{
    const struct plan_vocab *const v = pl->vocab;
    char *data = NULL;
    size_t n = 0;
    bool found = false;
    enum tv_err rc = TV_OK;

    if (v->truncate || from == v->from)
        return TV_OK;
    TV_TRY(tv_input_side_read(pl->plan->inputs[v->from].input, "config.json",
                              &found, &data, &n, e));
    if (found)
        rc = tv_json_parse_exact(data, n, "config.json", e, out);
out:
    tv_free(data);
    return rc;
}

enum tv_err plan_vocab_config(struct planner *pl, size_t from, bool generation,
                              const char *data, size_t n, char **out,
                              size_t *n_out)
{
    const char *const name =
        generation ? "generation_config.json" : "config.json";
    struct editor ed = {.pl = pl, .v = pl->vocab};
    struct tv_error e;
    json_t *other = NULL;
    enum tv_err rc = TV_OK;

    *out = NULL;
    tv_error_clear(&e);
    rc = tv_json_parse_exact(data, n, name, &e, &ed.root);
    if (rc == TV_OK && !generation)
        rc = read_other(pl, from, &e, &other);
    if (rc == TV_OK) {
        json_t *const scopes[] = {ed.root,
                                  json_object_get(ed.root, "text_config")};
        for (size_t s = 0; s < 2 && scopes[s] != NULL; s++) {
            edit_ids(&ed, from, scopes[s], other, name);
            if (!generation)
                edit_size(&ed, scopes[s]);
        }
        add_ids(&ed, other);
    }
    json_decref(other);
    return finish(&ed, rc, &e, name, out, n_out);
}
