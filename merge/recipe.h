/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recipe.h - a checked recipe: what params.c and plan.c work from.
 *
 * `models:` and `slices:` end up in one form, a list of slices; a `models:`
 * recipe is one slice whose sources have no layer range yet (the models are
 * not opened here). Model references are strings and compare as strings, as in
 * mergekit: `m` and `./m` are different models.
 */
#ifndef TVM_RECIPE_H
#define TVM_RECIPE_H

#include "arena.h"
#include "tv/merge.h"
#include "yaml_tree.h"

struct tvm_recipe_ref {
    const char *text;   /* NULL: none, or wrong */
    unsigned line, col; /* 0: not given */
};

struct tvm_recipe_source {
    struct tvm_recipe_ref model;
    bool has_range;
    int64_t from, to; /* layers [from, to) */
    unsigned range_line, range_col;
    const struct tvm_node *parameters; /* map, or NULL */
    bool bad_parameters;               /* given, but no map */
};

struct tvm_recipe_slice {
    unsigned line, col;
    struct tvm_recipe_source *sources;
    size_t n_sources;
    struct tvm_recipe_ref base;        /* of this slice; line 0: global */
    const struct tvm_node *parameters; /* map, or NULL */
    bool bad_parameters;
};

struct tvm_recipe {
    char *path; /* as given */
    char *text; /* the file's bytes, NUL-terminated */
    size_t n_text;
    struct tvm_arena arena;
    const struct tvm_method *method; /* after a typing mistake the likely one;
                                        NULL: unknown */
    struct tvm_method_info info;
    unsigned method_line, method_col;
    struct tvm_recipe_ref base;
    enum tv_dtype dtype, out_dtype; /* TV_DTYPE_NONE: not given */
    const struct tvm_node *parameters;
    bool bad_parameters;
    bool bad_dtype;    /* dtype or out_dtype is given, but none */
    bool has_errors;   /* some of the above is not as written */
    bool whole_models; /* written as `models:` */
    struct tvm_recipe_slice *slices;
    size_t n_slices;
    bool mergekit_syntax; /* mergekit itself could read it */
};

#endif
