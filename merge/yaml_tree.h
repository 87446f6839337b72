/* SPDX-License-Identifier: Apache-2.0 */
/*
 * yaml_tree.h - a YAML document as a tree that remembers lines and columns.
 *
 * Nothing here knows what a recipe is. Scalars keep their text; what they mean
 * is decided by whoever asks (YAML 1.1 as PyYAML reads it, plus `1e-4`).
 */
#ifndef TVM_YAML_TREE_H
#define TVM_YAML_TREE_H

#include <stdbool.h>
#include <stddef.h>

#include "arena.h"
#include "tv/merge.h"

#define TVM_YAML_BYTES_MAX (1u << 20) /* of a recipe file */
#define TVM_YAML_DEPTH_MAX 64u
#define TVM_YAML_NODES_MAX                                                     \
    100000u /* aliases counted as what they stand for                          \
             */
#define TVM_YAML_ANCHORS_MAX 1000u
#define TVM_YAML_DOCS_MAX    64u

enum tvm_node_kind { TVM_NODE_SCALAR = 0, TVM_NODE_LIST = 1, TVM_NODE_MAP = 2 };

struct tvm_node {
    enum tvm_node_kind kind;
    unsigned line, col; /* from 1 */
    const char *key;    /* of map entries, else NULL */
    unsigned key_line, key_col;
    const char *text; /* scalars */
    size_t n_text;
    bool plain;                   /* neither quoted nor tagged !!str */
    const struct tvm_node *first; /* children */
    const struct tvm_node *next;  /* sibling */
    size_t n;                     /* children */
    size_t n_nodes;               /* of the subtree, itself included */
    unsigned depth;               /* levels of the subtree, 1 for a scalar */
};

/* Parses a file; of several documents the roots are each other's `next`. Syntax
 * problems go into `problems` as `path:l:c`; *out is NULL then and TV_OK is
 * returned. Fails only for lack of memory. */
TV_NODISCARD enum tv_err tvm_yaml_parse(const char *path, const char *data,
                                        size_t n, struct tvm_arena *arena,
                                        struct tvm_problems *problems,
                                        struct tv_error *err,
                                        const struct tvm_node **out);

/* Value of a key of a map; NULL when absent or node is no map. */
const struct tvm_node *tvm_node_find(const struct tvm_node *node,
                                     const char *key);
/* Plain ~, null or nothing; also true for NULL. */
bool tvm_node_is_null(const struct tvm_node *node);
/* true/false, yes/no, on/off in YAML's spellings; quoted too. */
bool tvm_node_bool(const struct tvm_node *node, bool *out);
/* Decimal, 0x, 0b and 0-octal integers, decimals with or without a dot,
 * underscores, quoted or not. Infinities and NaN are no numbers here. */
bool tvm_node_number(const struct tvm_node *node, double *out);
/* "path:line:col" into dst; returns dst. */
const char *tvm_where(char *dst, size_t cap, const char *path, unsigned line,
                      unsigned col);
#define TVM_WHERE_MAX 4160u

#endif
