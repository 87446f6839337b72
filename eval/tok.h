/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok.h - the parts of a tokenizer and the seams between their files.
 *
 *   text -> added tokens found in the raw text (tok_added.c)
 *        -> normalizer, per piece between them (tok_normalize.c)
 *        -> added tokens found in the normalized text
 *        -> pre-tokenizers, a chain of splitters (tok_pre.c, tok_regex.c)
 *        -> BPE per word (tok_bpe.c) -> post-processor (tokenizer.c)
 *
 * Behaviour follows the Rust library `tokenizers` (0.23), whose results are the
 * specification; tests compare with what it gives.
 */
#ifndef TVE_TOK_H
#define TVE_TOK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <jansson.h>

#include "tv/error.h"
#include "tv/eval.h"
#include "tv/text.h"

/* ---- characters ---------------------------------------------------------- */

/* Decodes one character of valid UTF-8 at s; its length in bytes. */
size_t tve_char(const char *s, uint32_t *cp);
size_t tve_char_put(uint32_t cp, char *dst); /* dst [4] */
size_t tve_char_bytes(unsigned char lead);
bool tve_is_space(uint32_t cp);   /* White_Space */
bool tve_is_word(uint32_t cp);    /* \w of Unicode regular expressions */
bool tve_is_numeric(uint32_t cp); /* N* */
bool tve_is_punct(uint32_t cp);   /* P*, and all ASCII punctuation */
/* GPT-2's table from bytes to printable characters. */
uint32_t tve_byte_char(unsigned char b);
/* Appends the bytes s [n] as characters of that table. */
void tve_bytes_map(const char *s, size_t n, struct tv_buf *out);

/* ---- regular expressions ------------------------------------------------- */

typedef struct tve_regex tve_regex;
/* pattern in the dialect of Oniguruma, as tokenizer.json has it. */
TV_NODISCARD enum tv_err tve_regex_open(const char *pattern, bool literal,
                                        struct tv_error *err, tve_regex **out);
void tve_regex_close(tve_regex *re);
/* First non-empty match at or after `at`: 1 with [*start, *end), 0 for none, or
 * a negative number on failure (tve_regex_error explains it). */
int tve_regex_next(tve_regex *re, const char *s, size_t n, size_t at,
                   size_t *start, size_t *end);
enum tv_err tve_regex_error(int code, struct tv_error *err);

/* ---- added tokens -------------------------------------------------------- */

struct tve_added {
    char *content; /* owned; as matched (normalized when `normalized`) */
    size_t n;
    int32_t id;
    bool single_word, lstrip, rstrip, normalized, special;
};
struct tve_trie_node {
    uint32_t child, sibling; /* 0: none (the root is nobody's child) */
    int32_t token;           /* index of the added token that ends here, -1 */
    unsigned char byte;
};
struct tve_trie {
    struct tve_trie_node *nodes;
    size_t n, cap;
    uint32_t first[256]; /* children of the root */
};
TV_NODISCARD enum tv_err tve_trie_add(struct tve_trie *t, const char *s,
                                      size_t n, int32_t token,
                                      struct tv_error *err);
void tve_trie_free(struct tve_trie *t);
/* Next occurrence at or after *at, with its stripped spaces; false: none.
 * `from` is where the last one ended. *at moves behind the bare token. */
bool tve_trie_next(const struct tve_trie *t, const struct tve_added *tokens,
                   const char *s, size_t n, size_t *at, size_t from,
                   size_t *start, size_t *end, int32_t *token);

/* ---- normalizer ---------------------------------------------------------- */

enum tve_norm_kind {
    TVE_NORM_NFC,
    TVE_NORM_NFD,
    TVE_NORM_NFKC,
    TVE_NORM_NFKD,
    TVE_NORM_PREPEND,
    TVE_NORM_REPLACE,
    TVE_NORM_LOWERCASE,
    TVE_NORM_STRIP
};
struct tve_norm {
    enum tve_norm_kind kind;
    tve_regex *regex; /* REPLACE */
    char *text;       /* PREPEND, REPLACE: owned */
    size_t n;
    bool left, right; /* STRIP */
};
struct tve_norms {
    struct tve_norm *items;
    size_t n;
    struct tv_buf a, b; /* working text */
};
TV_NODISCARD enum tv_err tve_norms_load(const json_t *j, struct tve_norms *out,
                                        struct tv_error *err);
void tve_norms_free(struct tve_norms *ns);
/* *out is borrowed until the next call (or s itself). */
TV_NODISCARD enum tv_err tve_norms_run(struct tve_norms *ns, const char *s,
                                       size_t n, const char **out,
                                       size_t *n_out, struct tv_error *err);

/* ---- BPE ----------------------------------------------------------------- */

typedef struct tve_bpe tve_bpe;
TV_NODISCARD enum tv_err tve_bpe_open(const json_t *model, bool byte_level,
                                      struct tv_error *err, tve_bpe **out);
void tve_bpe_close(tve_bpe *b);
int32_t tve_bpe_id(const tve_bpe *b, const char *s, size_t n);
int32_t tve_bpe_max_id(const tve_bpe *b);
/* Appends the ids of one word. With byte_level the word is raw bytes that still
 * have to go through GPT-2's table. `keep`: remember it (the caller does not).
 */
TV_NODISCARD enum tv_err tve_bpe_word(tve_bpe *b, const char *s, size_t n,
                                      bool keep, struct tve_ids *out,
                                      struct tv_error *err);

/* ---- merges -------------------------------------------------------------- */

#define TVE_MERGES_MAX (1u << 24)

typedef struct tve_merges tve_merges;
/* Room for n pairs, which tve_merges_put adds (a later one replaces its like):
 * left and right become id, the lower ranks first. */
TV_NODISCARD enum tv_err tve_merges_open(size_t n, struct tv_error *err,
                                         tve_merges **out);
void tve_merges_close(tve_merges *m);
void tve_merges_put(tve_merges *m, int32_t left, int32_t right, uint32_t rank,
                    int32_t id);
/* Merges the symbols ids [*n] of one word in place; *n becomes what is left. */
TV_NODISCARD enum tv_err tve_merges_run(tve_merges *m, int32_t *ids, size_t *n,
                                        struct tv_error *err);

/* ---- words seen before --------------------------------------------------- */

#define TVE_WORD_MAX 255u /* bytes of a word worth keeping */

typedef struct tve_words tve_words;
struct tve_place { /* of a word that was not found */
    uint64_t hash;
    size_t n;
};
TV_NODISCARD enum tv_err tve_words_open(struct tv_error *err, tve_words **out);
void tve_words_close(tve_words *w);
/* Appends the ids of a word that is known; else *place is for tve_words_put. */
TV_NODISCARD enum tv_err tve_words_get(const tve_words *w, const char *s,
                                       size_t n, struct tve_place *place,
                                       bool *found, struct tve_ids *out,
                                       struct tv_error *err);
void tve_words_put(tve_words *w, const struct tve_place *place, const char *s,
                   const int32_t *ids, size_t n_ids);

/* ---- ids ----------------------------------------------------------------- */

TV_NODISCARD enum tv_err tve_ids_room(struct tve_ids *out, size_t n,
                                      struct tv_error *err);
TV_NODISCARD enum tv_err tve_ids_add(struct tve_ids *out, int32_t id,
                                     struct tv_error *err);

/* ---- pre-tokenizers ------------------------------------------------------ */

enum tve_pre_kind {
    TVE_PRE_BYTE_LEVEL, /* maps bytes to characters, unless it comes last */
    TVE_PRE_SPLIT,      /* regex (also ByteLevel's own, Whitespace) */
    TVE_PRE_CLASS,      /* by a character class */
    TVE_PRE_METASPACE
};
enum tve_behavior {
    TVE_REMOVED,
    TVE_ISOLATED,
    TVE_MERGED_PREVIOUS,
    TVE_MERGED_NEXT,
    TVE_CONTIGUOUS
};
struct tve_pre {
    enum tve_pre_kind kind;
    enum tve_behavior behavior;
    bool invert;
    tve_regex *regex;              /* SPLIT, owned */
    bool makes_words;              /* SPLIT: not by a literal text */
    bool (*is_class)(uint32_t cp); /* CLASS */
    bool ascii[128];               /* CLASS: what is_class says of them */
    bool maps; /* BYTE_LEVEL: bytes to characters, not left to the BPE */
    bool prefix_space; /* BYTE_LEVEL */
    char rep[5];       /* METASPACE: replacement */
    int prepend;       /* 0 never, 1 first, 2 always */
    bool split;
    struct tv_buf prefixed, changed; /* working texts of this step */
};
struct tve_pres {
    struct tve_pre *items;
    size_t n;
    bool byte_level; /* the last step maps bytes: left to the BPE */
    /* What comes to this step is a word already and the steps from here on look
     * at nothing else, so their ids are kept; n: there are no such steps. */
    size_t cached_step;
    tve_words *words;
};
TV_NODISCARD enum tv_err tve_pres_load(const json_t *j, struct tve_pres *out,
                                       struct tv_error *err);
void tve_pres_free(struct tve_pres *p);
/* Splits s and appends the ids of its words; `first`: s begins the text. */
TV_NODISCARD enum tv_err tve_pres_run(struct tve_pres *p, tve_bpe *bpe,
                                      const char *s, size_t n, bool first,
                                      struct tve_ids *out,
                                      struct tv_error *err);

/* ---- JSON helpers -------------------------------------------------------- */

/* A key's value; defaults when absent or null, CORRUPT for another type. */
TV_NODISCARD enum tv_err tve_json_bool(const json_t *o, const char *key,
                                       bool otherwise, bool *out,
                                       struct tv_error *err);
TV_NODISCARD enum tv_err tve_json_str(const json_t *o, const char *key,
                                      const char **out, size_t *n,
                                      struct tv_error *err); /* NULL: absent */
#endif
