/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recipe_vocab.c - `tokenizer:` (or `tokenizer_source:`) and `chat_template:`.
 */
#include "recipe_read.h"

#include <stdio.h>
#include <string.h>

#include "chat.h"
#include "tv/text.h"

static void read_vocab_source(struct recipe_reader *rd,
                              const struct tvm_node *node)
{
    struct tvm_recipe_vocab *const v = &rd->r->vocab;
    v->line = node->line;
    v->col = node->col;
    if (node->kind == TVM_NODE_SCALAR && strcmp(node->text, "union") == 0) {
        v->source = TVM_VOCAB_UNION;
    } else if (node->kind == TVM_NODE_SCALAR &&
               strcmp(node->text, "base") == 0) {
        v->source = TVM_VOCAB_BASE;
    } else {
        v->source = TVM_VOCAB_MODEL;
        v->model = recipe_read_ref(rd, node);
    }
}

/* {kind: zero} or {kind: model_token, model, token | token_id} */
static void read_token_kind(struct recipe_reader *rd,
                            const struct tvm_node *node,
                            struct tvm_recipe_token *t)
{
    static const char *const keys[] = {"kind", "model", "token", "token_id"};
    const struct tvm_node *const kind = recipe_given(node, "kind");
    const struct tvm_node *const model = recipe_given(node, "model");
    const struct tvm_node *const token = recipe_given(node, "token");
    const struct tvm_node *const id = recipe_given(node, "token_id");

    recipe_unknown_keys(rd, node, keys, N_OF(keys));
    if (kind->kind == TVM_NODE_SCALAR && strcmp(kind->text, "zero") == 0) {
        t->from = TVM_TOKEN_ZERO;
        return;
    }
    if (kind->kind != TVM_NODE_SCALAR ||
        strcmp(kind->text, "model_token") != 0) {
        recipe_error_node(rd, kind, "'kind' is zero or model_token");
        return;
    }
    t->from = TVM_TOKEN_OTHER;
    if (model == NULL)
        recipe_error_node(rd, node, "model_token needs 'model'");
    else
        t->model = recipe_read_ref(rd, model);
    if ((token == NULL) == (id == NULL)) {
        recipe_error_node(rd, node,
                          "model_token needs either 'token' or 'token_id'");
    } else if (token != NULL) {
        if (recipe_is_text(token))
            t->other = token->text;
        else
            recipe_error_node(rd, token, "'token' must be a text");
    } else if (!recipe_read_layer(id, &t->other_id) || t->other_id < 0) {
        recipe_error_node(rd, id, "'token_id' must be a whole number from 0");
    }
}

static void read_token(struct recipe_reader *rd, const struct tvm_node *node,
                       struct tvm_recipe_token *t)
{
    static const char *const keys[] = {"source", "force"};
    const struct tvm_node *source = NULL;
    const struct tvm_node *force = NULL;

    t->token = node->key;
    t->line = node->key_line;
    t->col = node->key_col;
    if (node->key[0] == '\0')
        recipe_error_key(rd, TV_E_USAGE, node, "a token is empty");
    if (tvm_node_is_null(node))
        return;
    if (node->kind != TVM_NODE_MAP) {
        recipe_error_node(rd, node, "a token takes a map: {source, force}");
        return;
    }
    recipe_unknown_keys(rd, node, keys, N_OF(keys));
    source = recipe_given(node, "source");
    force = recipe_given(node, "force");
    if (force != NULL && !tvm_node_bool(force, &t->force))
        recipe_error_node(rd, force, "'force' is true or false");
    if (source == NULL)
        return;
    if (source->kind == TVM_NODE_MAP && recipe_given(source, "kind") != NULL) {
        read_token_kind(rd, source, t);
        return;
    }
    t->from = TVM_TOKEN_MODEL;
    t->model = recipe_read_ref(rd, source);
}

static void read_tokens(struct recipe_reader *rd, const struct tvm_node *map)
{
    struct tvm_recipe_vocab *const v = &rd->r->vocab;
    if (map->kind != TVM_NODE_MAP) {
        recipe_error_node(rd, map,
                          "'tokens' must be a map of tokens to {source}");
        return;
    }
    v->tokens = tvm_arena_get(&rd->r->arena, map->n, sizeof(*v->tokens));
    if (v->tokens == NULL) {
        rd->oom = true;
        return;
    }
    for (const struct tvm_node *e = map->first; e != NULL; e = e->next)
        read_token(rd, e, &v->tokens[v->n_tokens++]);
}

static void read_chat_template(struct recipe_reader *rd,
                               const struct tvm_node *node)
{
    struct tvm_recipe_vocab *const v = &rd->r->vocab;
    const char *const names[] = {"auto",
                                 tvm_chat_templates[0],
                                 tvm_chat_templates[1],
                                 tvm_chat_templates[2],
                                 tvm_chat_templates[3],
                                 tvm_chat_templates[4]};
    const char *like = NULL;
    char message[300];
    char text[64];

    v->chat_line = node->line;
    v->chat_col = node->col;
    if (!recipe_is_text(node)) {
        recipe_error_node(rd, node, "'chat_template' must be a text");
        return;
    }
    if (strcmp(node->text, "auto") == 0 ||
        tvm_chat_template(node->text) != NULL || strchr(node->text, '{')) {
        v->chat_template = node->text;
        return;
    }
    like = tv_suggest(node->text, names, N_OF(names));
    (void)snprintf(message, sizeof(message),
                   "chat_template '%s' is neither auto, alpaca, chatml, "
                   "exaone, llama3 or mistral nor a Jinja template%s%s%s",
                   tv_text_printable(node->text, text, sizeof(text)),
                   like == NULL ? "" : "; did you mean '",
                   like == NULL ? "" : like, like == NULL ? "" : "'?");
    recipe_error_node(rd, node, message);
}

void recipe_read_vocab(struct recipe_reader *rd, const struct tvm_node *root)
{
    static const char *const keys[] = {"source", "tokens",
                                       "pad_to_multiple_of"};
    struct tvm_recipe_vocab *const v = &rd->r->vocab;
    const struct tvm_node *const block = recipe_given(root, "tokenizer");
    const struct tvm_node *const legacy =
        recipe_given(root, "tokenizer_source");
    const struct tvm_node *const chat = recipe_given(root, "chat_template");
    const struct tvm_node *e = NULL;

    if (chat != NULL)
        read_chat_template(rd, chat);
    if (block != NULL && legacy != NULL)
        recipe_error_key(
            rd, TV_E_USAGE, legacy,
            "a recipe has either 'tokenizer' or 'tokenizer_source', not "
            "both");
    if (legacy != NULL && block == NULL)
        read_vocab_source(rd, legacy);
    if (block == NULL)
        return;
    if (block->kind != TVM_NODE_MAP) {
        recipe_error_node(rd, block,
                          "'tokenizer' is a map: {source, tokens, "
                          "pad_to_multiple_of}; the short form is "
                          "'tokenizer_source: union'");
        return;
    }
    recipe_unknown_keys(rd, block, keys, N_OF(keys));
    v->source = TVM_VOCAB_UNION;
    v->line = block->line;
    v->col = block->col;
    e = recipe_given(block, "source");
    if (e != NULL)
        read_vocab_source(rd, e);
    e = recipe_given(block, "tokens");
    if (e != NULL)
        read_tokens(rd, e);
    e = recipe_given(block, "pad_to_multiple_of");
    if (e != NULL && (!recipe_read_layer(e, &v->pad_to) || v->pad_to < 1 ||
                      v->pad_to > 1 << 20)) {
        v->pad_to = 0;
        recipe_error_node(
            rd, e,
            "'pad_to_multiple_of' must be a whole number from 1 to "
            "1048576");
    }
}
