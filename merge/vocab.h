/* SPDX-License-Identifier: Apache-2.0 */
/*
 * vocab.h - the tokens of one tokenizer.json, compact (private to merge/).
 *
 * What planning has to know of a tokenizer: which token has which id, which are
 * added tokens, how words are built (merges), and of which kind it is. Tokens
 * compare as strings, and that means something only within one kind: a leading
 * space is U+0120 in byte-level vocabularies and U+2581 in metaspace ones.
 *
 * Thread rule: immutable after tvm_vocab_read.
 */
#ifndef TVM_VOCAB_H
#define TVM_VOCAB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "arena.h"
#include "tv/error.h"
#include "tv/hash.h"

#define TVM_TOKENS_MAX (1u << 22)

struct tvm_token {
    const char *s;
    uint32_t n;
    int32_t id;
    bool added;
    bool single_word, lstrip, rstrip, normalized, special; /* added ones */
};

struct tvm_merge { /* left and right become left right; indices of tokens */
    uint32_t left, right;
};

enum tvm_spaces { /* how a space is written in the tokens */
                  TVM_SPACES_PLAIN = 0,
                  TVM_SPACES_BYTE_LEVEL = 1,
                  TVM_SPACES_METASPACE = 2
};

struct tvm_vocab {
    struct tvm_arena arena;
    const char *type; /* "BPE", "Unigram", "WordPiece", "WordLevel" */
    enum tvm_spaces spaces;
    struct tv_hash rules;     /* of normalizer and pre-tokenizer */
    struct tvm_token *tokens; /* those of the model, then added ones */
    size_t n, n_model;
    uint32_t *slots; /* index + 1 by hash */
    size_t n_slots;
    uint32_t *by_id; /* [n_ids] index + 1, 0: no token has the id */
    size_t n_ids;    /* highest id + 1 */
    struct tvm_merge *merges;
    size_t n_merges;
};

/* CORRUPT with label when root is no tokenizer. *out is freed by
 * tvm_vocab_free whatever the result. */
TV_NODISCARD enum tv_err tvm_vocab_read(const json_t *root, const char *label,
                                        struct tv_error *err,
                                        struct tvm_vocab *out);
void tvm_vocab_free(struct tvm_vocab *v);
/* NULL: there is no such token. */
const struct tvm_token *tvm_vocab_find(const struct tvm_vocab *v, const char *s,
                                       size_t n);
const struct tvm_token *tvm_vocab_at(const struct tvm_vocab *v, int64_t id);
/* "byte-level BPE", "metaspace Unigram", ... into dst; returns dst. */
const char *tvm_vocab_kind(const struct tvm_vocab *v, char dst[64]);
/* The halves of an entry of "merges", "a b" or ["a", "b"]. */
bool tvm_merge_halves(const json_t *m, const char **left, size_t *n_left,
                      const char **right, size_t *n_right);

#endif
