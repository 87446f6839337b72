/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_vocab.h - what is decided about the vocabulary (private to the planner).
 *
 *   plan_vocab.c   reads the tokenizers, decides the tokens of the output,
 *                  their ids, the number of rows; chat template
 *   plan_rows.c    which row of which model every output row comes from
 *   vocab_files.c  tokenizer.json and what stands beside it; ids of config.json
 */
#ifndef TVM_PLAN_VOCAB_H
#define TVM_PLAN_VOCAB_H

#include "gather.h"
#include "plan_parts.h"
#include "vocab.h"

struct plan_vocab_of {         /* of plan->inputs[i] */
    const struct tvm_vocab *v; /* the one of `from` when it has none itself */
    uint64_t rows;             /* its tokens have ids below this */
    bool merged;               /* a source of a slice, or the base */
};

struct plan_token { /* of the output */
    const char *s;  /* borrowed from a vocabulary or the recipe */
    uint32_t n;
    int32_t id;
    const struct tvm_token *is_new; /* not in the first tokenizer: whose entry;
                                       NULL: it is, or the recipe adds it */
    bool added;                     /* an added token */
    bool promoted; /* an ordinary token that another model has as added one */
    const struct tvm_recipe_token *rule;
};

struct plan_vocab {
    struct tvm_vocab *owned;  /* [n_owned], of distinct tokenizers ... */
    struct tv_hash *owned_by; /* ... by their text */
    size_t n_owned;
    struct plan_vocab_of *of;  /* [n_inputs] */
    bool truncate;             /* no tokens at all: rows are cut off */
    size_t from;               /* input whose tokenizer is the start */
    size_t base;               /* input whose rows are the default; SIZE_MAX */
    struct plan_token *tokens; /* in order of ids */
    size_t n_tokens;
    uint32_t *slots; /* index + 1 by hash */
    size_t n_slots;
    size_t n_kept;    /* of the first tokenizer; those behind are new */
    size_t n_dropped; /* of the first tokenizer: beyond its rows */
    size_t n_promoted;
    size_t n_ordinary; /* new ones that are no added tokens */
    uint64_t n_ids;    /* highest id + 1 */
    uint64_t n_rows;
    /* Of planning: the largest tokenizer as text and trees, and what is kept of
     * all of them. */
    uint64_t most_bytes, kept_bytes;
    bool keep_padding; /* padding rows stay what they are where all have them */
    struct plan_rows_set *sets;
    struct tvm_vocabulary shown;
    const char **notes;
};

/* Does the output keep the tokenizer.json of pl->vocab->from as it is? */
static inline bool plan_vocab_unchanged(const struct plan_vocab *v)
{
    return v->n_dropped == 0 && v->n_promoted == 0 && v->n_tokens == v->n_kept;
}

/* The output's token, NULL when it has none of this text. */
const struct plan_token *plan_vocab_find(const struct plan_vocab *v,
                                         const char *s, size_t n);
/* Is the text a token of the first tokenizer that has no row there? */
bool plan_vocab_beyond(const struct plan_vocab *v, const char *s, size_t n);
/* ... and that the output lacks, since no other model has one either? */
bool plan_vocab_dropped(const struct plan_vocab *v, const char *s, size_t n);
/* Adds a line to what is shown of the vocabulary, and a note to the plan. */
void plan_vocab_note(struct planner *pl, const char *fmt, ...) TV_PRINTF(2, 3);

/* Sets the gather of every source of a tensor over tokens, dimension 0, and its
 * shape. *ok is cleared after a problem. */
TV_NODISCARD enum tv_err plan_rows_gather(struct planner *pl,
                                          const struct tv_arch_tensor *like,
                                          struct tvm_tensor *t, bool *ok);

/* What one tokenizer file of the output holds: *out is owned, or NULL when the
 * bytes can stay as they are; *leave_out when the file would contradict the
 * others. `input` is the model that data comes from. */
TV_NODISCARD enum tv_err plan_vocab_file(struct planner *pl, const char *name,
                                         const char *data, size_t n, char **out,
                                         size_t *n_out, bool *leave_out);
/* Ids and vocabulary size in config.json, or ids in generation_config.json,
 * with data from input `from`; *out owned, NULL when nothing changes. */
TV_NODISCARD enum tv_err plan_vocab_config(struct planner *pl, size_t from,
                                           bool generation, const char *data,
                                           size_t n, char **out, size_t *n_out);

#endif
