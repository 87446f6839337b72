/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recipe_text.c - another value put into the text of a recipe (compare runs
 * one recipe with several methods).
 *
 * The text is edited, not the tree: what is journalled, hashed and shown is
 * then what a user could have written. Places come from the tree of the text as
 * it was, so values are replaced from the last one to the first.
 */
#include "recipe_read.h"

#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/text.h"

/* Where line and column (from 1, in characters) are in the text. */
static size_t offset_of(const struct tvm_recipe *r, unsigned line, unsigned col)
{
    size_t at = 0;
    for (unsigned l = 1; l < line && at < r->n_text; at++)
        l += r->text[at] == '\n';
    for (unsigned c = 1; c < col && at < r->n_text; c++) {
        at++;
        while (at < r->n_text && ((unsigned char)r->text[at] & 0xc0u) == 0x80u)
            at++;
    }
    return at;
}

/* Puts `value` in the place of a scalar, quotes included. */
static enum tv_err replace_scalar(struct tvm_recipe *r,
                                  const struct tvm_node *node,
                                  const char *value, struct tv_error *err)
{
    const size_t at = offset_of(r, node->line, node->col);
    const size_t n = strlen(value);
    size_t from = at;
    size_t old = node->n_text;
    const bool quoted =
        at < r->n_text && (r->text[at] == '"' || r->text[at] == '\'');

    if (quoted) {
        from++;
        old += 2;
    }
    if (node->kind != TVM_NODE_SCALAR || from + node->n_text > r->n_text ||
        memcmp(r->text + from, node->text, node->n_text) != 0 ||
        (quoted && r->text[from + node->n_text] != r->text[at]))
        return tv_error_set(err, TV_E_USAGE,
                            "%s:%u:%u: this value cannot be replaced by '%s'; "
                            "write it plainly",
                            r->path, node->line, node->col, value);
    char *const text = tv_alloc(r->n_text - old + n + 1);
    if (text == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    memcpy(text, r->text, at);
    memcpy(text + at, value, n);
    memcpy(text + at + n, r->text + at + old, r->n_text - at - old + 1);
    tv_free(r->text);
    r->text = text;
    r->n_text += n - old;
    return TV_OK;
}

/* Replaces the last value of key in the tree first, so that places of those
 * before it stay what they are. */
static enum tv_err replace_all(struct tvm_recipe *r,
                               const struct tvm_node *node, const char *key,
                               const char *value, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tvm_node *list[64];
    size_t n = 0;

    if (node == NULL)
        return TV_OK;
    if (node->key != NULL && strcmp(node->key, key) == 0 &&
        node->kind == TVM_NODE_SCALAR)
        return replace_scalar(r, node, value, err);
    /* Children in pieces from the last one: a list has no way back. */
    for (size_t end = node->n; end > 0 && rc == TV_OK;) {
        const size_t from = end > N_OF(list) ? end - N_OF(list) : 0;
        size_t i = 0;
        n = 0;
        for (const struct tvm_node *e = node->first; e != NULL && i < end;
             e = e->next, i++)
            if (i >= from)
                list[n++] = e;
        while (n > 0 && rc == TV_OK)
            rc = replace_all(r, list[--n], key, value, err);
        end = from;
    }
    return rc;
}

/* Puts `add` into the text. */
static enum tv_err insert(struct tvm_recipe *r, size_t at, const char *add,
                          struct tv_error *err)
{
    const size_t n = strlen(add);
    char *const text = tv_alloc(r->n_text + n + 1);

    if (text == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    memcpy(text, r->text, at);
    memcpy(text + at, add, n);
    memcpy(text + at + n, r->text + at, r->n_text - at + 1);
    tv_free(r->text);
    r->text = text;
    r->n_text += n;
    return TV_OK;
}

/* Gives a map that has entries one more, before its first: `key: value` as the
 * map is written, in braces or by indentation. */
static enum tv_err add_entry(struct tvm_recipe *r, const struct tvm_node *map,
                             const char *entry, struct tv_error *err)
{
    const size_t at = offset_of(r, map->line, map->col);
    const bool braces = at < r->n_text && r->text[at] == '{';
    char text[160];

    if (braces)
        (void)snprintf(text, sizeof(text), "%s, ", entry);
    else
        (void)snprintf(text, sizeof(text), "%s\n%*s", entry,
                       (int)(map->first->key_col - 1), "");
    return insert(r,
                  braces
                      ? at + 1
                      : offset_of(r, map->first->key_line, map->first->key_col),
                  text, err);
}

/* Is there a value of this key anywhere? */
static bool has_key(const struct tvm_node *node, const char *key)
{
    if (node->key != NULL && strcmp(node->key, key) == 0)
        return true;
    for (const struct tvm_node *e = node->first; e != NULL; e = e->next)
        if (has_key(e, key))
            return true;
    return false;
}

/* A parameter that the recipe does not mention. */
static enum tv_err add_parameter(struct tvm_recipe *r,
                                 const struct tvm_node *root, const char *key,
                                 const char *value, struct tv_error *err)
{
    const struct tvm_node *const p = tvm_node_find(root, "parameters");
    char entry[100];

    if (root->kind != TVM_NODE_MAP || root->first == NULL)
        return TV_OK;
    if (p != NULL && p->kind == TVM_NODE_MAP && p->first != NULL) {
        (void)snprintf(entry, sizeof(entry), "\"%s\": \"%s\"", key, value);
        return add_entry(r, p, entry, err);
    }
    if (p != NULL)
        return tv_error_set(err, TV_E_USAGE,
                            "%s:%u:%u: no place for '%s: %s' here", r->path,
                            p->line, p->col, key, value);
    (void)snprintf(entry, sizeof(entry), "\"parameters\": {\"%s\": \"%s\"}",
                   key, value);
    return add_entry(r, root, entry, err);
}

enum tv_err recipe_replace(struct tvm_recipe *r, const char *key,
                           const char *value, bool add, struct tv_error *err)
{
    struct tvm_arena arena;
    struct tvm_problems unused;
    const struct tvm_node *root = NULL;
    enum tv_err rc = TV_OK;

    if (value == NULL)
        return TV_OK;
    memset(&arena, 0, sizeof(arena));
    tvm_problems_init(&unused);
    TV_TRY(tvm_yaml_parse(r->path, r->text, r->n_text, &arena, &unused, err,
                          &root));
    if (root != NULL && add && !has_key(root, key))
        TV_TRY(add_parameter(r, root, key, value, err));
    else
        TV_TRY(replace_all(r, root, key, value, err));
out:
    tvm_problems_free(&unused);
    tvm_arena_free(&arena);
    return rc;
}
