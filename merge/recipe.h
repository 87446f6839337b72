/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recipe.h - a checked recipe: what params.c and plan.c work from.
 *
 * `models:` and `slices:` end up in one form, a list of slices; a `models:`
 * recipe is one slice whose sources have no layer range yet (the models are
 * not opened here). With `modules:` the list holds the slices of one module
 * after the other. Model references are strings and compare as strings, as in
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

/* A model that a recipe takes for one of another class. */
struct tvm_recipe_override {
    const char *ref, *architecture;
    unsigned line, col;
    const struct tvm_recipe_override *next;
};

struct tvm_recipe_source {
    struct tvm_recipe_ref model;
    bool has_range;
    int64_t from, to; /* layers [from, to) */
    unsigned range_line, range_col;
    const struct tvm_node *parameters;         /* map, or NULL */
    bool bad_parameters;                       /* given, but no map */
    const struct tvm_calibration *calibration; /* NULL: not given */
};

struct tvm_recipe_module { /* of `modules:` */
    const char *name;
    unsigned line, col;
    const struct tvm_node *parameters; /* map, or NULL */
    bool bad_parameters;
    size_t first, n; /* slices */
};

struct tvm_recipe_slice {
    unsigned line, col;
    bool whole; /* all layers of its models: written as `models:` */
    struct tvm_recipe_source *sources;
    size_t n_sources;
    struct tvm_recipe_ref base;        /* of this slice; line 0: global */
    const struct tvm_node *parameters; /* map, or NULL */
    bool bad_parameters;
};

enum tvm_token_from { /* whose row a token gets where its own is not taken */
                      TVM_TOKEN_DEFAULT =
                          0, /* the only one, the base's, the mean */
                      TVM_TOKEN_ZERO = 1,
                      TVM_TOKEN_MODEL = 2, /* the same token of a model */
                      TVM_TOKEN_OTHER = 3  /* another token of a model */
};

struct tvm_recipe_token {
    const char *token;
    unsigned line, col;
    enum tvm_token_from from;
    struct tvm_recipe_ref model;
    const char *other; /* TVM_TOKEN_OTHER: text, or NULL: other_id */
    int64_t other_id;
    bool force; /* in every model */
};

enum tvm_vocab_source {
    TVM_VOCAB_NONE = 0, /* no alignment asked for */
    TVM_VOCAB_UNION = 1,
    TVM_VOCAB_BASE = 2,
    TVM_VOCAB_MODEL = 3
};

struct tvm_recipe_vocab {
    enum tvm_vocab_source source;
    unsigned line, col;
    struct tvm_recipe_ref model; /* TVM_VOCAB_MODEL */
    struct tvm_recipe_token *tokens;
    size_t n_tokens;
    int64_t pad_to;            /* 0: not given */
    const char *chat_template; /* "auto", a name, Jinja; NULL: not given */
    unsigned chat_line, chat_col;
};

/* Of a file of several documents each is a recipe; the first one owns path and
 * text, and the others by `next`. */
struct tvm_recipe {
    char *path; /* as given */
    char *text; /* the file's bytes, NUL-terminated */
    size_t n_text;
    struct tvm_arena arena;
    struct tvm_recipe *next;
    bool is_first;
    unsigned line;              /* where the document begins */
    struct tvm_recipe_ref name; /* of a document that others refer to */
    struct tvm_recipe **needs;  /* [n_needs] documents it refers to */
    size_t n_needs;
    bool seen;                       /* while these are followed */
    const struct tvm_method *method; /* NULL: unknown, which has been said */
    struct tvm_method_info info;
    unsigned method_line, method_col;
    struct tvm_recipe_ref base;
    enum tv_dtype dtype, out_dtype; /* TV_DTYPE_NONE: not given */
    const struct tvm_node *parameters;
    bool bad_parameters;
    const struct tvm_calibration *calibration; /* of models without their own */
    bool bad_dtype;    /* dtype or out_dtype is given, but none */
    bool other_method; /* than is written: so asked for by the caller */
    bool has_errors;   /* some of the above is not as written */
    bool whole_models; /* written as `models:` */
    struct tvm_recipe_slice *slices;
    size_t n_slices;
    struct tvm_recipe_module *modules; /* of `modules:` */
    size_t n_modules;
    struct tvm_recipe_vocab vocab;
    const struct tvm_recipe_override *overrides;
    bool mergekit_syntax; /* mergekit itself could read it */
};

/* What a recipe says of the class of a model, NULL: nothing. */
const struct tvm_recipe_override *
tvm_recipe_override_of(const struct tvm_recipe *r, const char *ref);

/* Does a model reference mean the document of this name? */
bool tvm_recipe_means(const char *ref, const char *name);

#endif
