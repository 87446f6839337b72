/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recipe_read.h - what the files that read recipes share (private to
 * recipe*.c).
 *
 *   recipe.c            a file: its documents, their keys in order
 *   recipe_pieces.c     messages; references, dtypes, parameters, calibration
 *   recipe_sources.c    models, slices, modules
 *   recipe_vocab.c      tokenizer and chat template
 *   recipe_documents.c  which document needs which
 *   recipe_text.c       the same recipe with another method
 *
 * Readers report problems with their place and go on; what they return is empty
 * then, and nobody looks at it: the recipe has errors.
 */
#ifndef TVM_RECIPE_READ_H
#define TVM_RECIPE_READ_H

#include "recipe.h"

#define N_OF(a) (sizeof(a) / sizeof((a)[0]))

struct recipe_reader {
    struct tvm_recipe *r;
    struct tvm_problems *problems;
    bool several; /* documents in the file */
    bool oom;
};

/* ---- recipe_pieces.c ----------------------------------------------------- */

void recipe_error_at(struct recipe_reader *rd, enum tv_err code, unsigned line,
                     unsigned col, const char *message);
void recipe_error_node(struct recipe_reader *rd, const struct tvm_node *node,
                       const char *message);
void recipe_error_key(struct recipe_reader *rd, enum tv_err code,
                      const struct tvm_node *entry, const char *message);
/* The warning of one of them. */
void recipe_unknown_key(struct recipe_reader *rd, const struct tvm_node *e,
                        const char *const *known, size_t n_known);
/* Warns of keys that a map has and does not know, with a suggestion. */
void recipe_unknown_keys(struct recipe_reader *rd, const struct tvm_node *map,
                         const char *const *known, size_t n_known);

/* A present, non-null entry. */
const struct tvm_node *recipe_given(const struct tvm_node *map,
                                    const char *key);
/* Two of what a recipe has one of: for mergekit an empty one is not there. */
void recipe_leave_filled(const struct tvm_node **a, const struct tvm_node **b);
/* A scalar that is not empty and has no NUL. */
bool recipe_is_text(const struct tvm_node *node);
struct tvm_recipe_ref recipe_read_ref(struct recipe_reader *rd,
                                      const struct tvm_node *node);
const struct tvm_node *recipe_read_parameters(struct recipe_reader *rd,
                                              const struct tvm_node *map,
                                              bool *bad);
enum tv_dtype recipe_read_dtype(struct recipe_reader *rd,
                                const struct tvm_node *node);
/* Sums run in fp64 whatever a recipe says; files hold at most float32. */
void recipe_note_float64(struct recipe_reader *rd, const struct tvm_node *root);
void recipe_read_range(struct recipe_reader *rd, const struct tvm_node *map,
                       struct tvm_recipe_source *s);
void recipe_read_count(struct recipe_reader *rd, const struct tvm_node *map,
                       const char *key, uint64_t least, uint64_t *out);
bool recipe_read_layer(const struct tvm_node *node, int64_t *out);
/* calibration: {text: FILE | [FILE, ...], samples, context} or {random: true}
 */
const struct tvm_calibration *
recipe_read_calibration(struct recipe_reader *rd, const struct tvm_node *map);

/* ---- the others ---------------------------------------------------------- */

/* Models, slices or modules. */
void recipe_read_what(struct recipe_reader *rd, const struct tvm_node *root);
void recipe_read_vocab(struct recipe_reader *rd, const struct tvm_node *root);
/* Reports what is wrong between the documents of a file. */
void recipe_check_documents(struct recipe_reader *rd, struct tvm_recipe *first);
/* Gives every `key` the value; add: puts it under parameters where there is
 * none. NULL: nothing to do. A text that is no recipe stays as it is: reading
 * it says why. USAGE where the text cannot be changed in place. */
TV_NODISCARD enum tv_err recipe_replace(struct tvm_recipe *r, const char *key,
                                        const char *value, bool add,
                                        struct tv_error *err);

#endif
