/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_merge.h - what the files that merge adapters into an adapter share
 * (private to merge/).
 *
 *   adapter_merge.c    modules of the output, planning, running
 *   adapter_recipe.c   the recipe, its adapters
 *   adapter_core.c     factors of one module: cat, svd, Core Space
 *   adapter_peft.c     PEFT's combination types
 *   adapter_config.c   adapter_config.json of the result
 *   product_sum.c      factors of sums of low-rank products
 */
#ifndef TVM_ADAPTER_MERGE_H
#define TVM_ADAPTER_MERGE_H

#include "arena.h"
#include "product_sum.h"
#include "tv/adapters.h"
#include "yaml_tree.h"

struct json_t;

enum am_kind { AM_CAT, AM_SVD, AM_CORE, AM_PEFT };

/* How PEFT combines: what happens to each stack, and on what. */
struct tvm_peft_type {
    enum {
        PEFT_SUM,
        PEFT_CAT,
        PEFT_SVD
    } on; /* factors, side by side, deltas */
    bool prunes, random, elects;
};
#define TVM_PEFT_TYPES                                                         \
    "linear, cat, svd, ties, ties_svd, dare_linear, dare_linear_svd, "         \
    "dare_ties, dare_ties_svd, magnitude_prune, magnitude_prune_svd"

struct am_input {
    struct tv_ref *ref;
    tv_input *in;
    tv_adapter *adapter;
    double weight;
    struct json_t *config;
    struct tv_hash fingerprint;
};

struct am_module {
    const struct tv_adapter_module *like; /* of the first adapter that has it */
    const struct tv_adapter_module **of;  /* [n_inputs], NULL: it has not */
    size_t cols;                          /* sum of ranks */
    uint64_t max_rank, rank;              /* of the inputs; of the output */
};

struct tvm_adapters {
    struct tvm_options options;
    struct tvm_problems *problems; /* while planning */
    const struct tvk_table *kernels;
    char *path, *text;
    size_t n_text;
    struct tvm_arena arena;
    const char *method;
    enum am_kind kind;
    bool peft;
    struct tvm_peft_type type;
    double density;
    bool frequency;
    uint64_t rank; /* asked for; 0: not */
    uint64_t out_rank;
    enum tv_dtype dtype;
    struct am_input *inputs;
    size_t n_inputs;
    struct am_module *modules; /* in layer order */
    const struct tv_adapter_module **of;
    size_t n_modules;
    uint64_t scratch, bytes_read, bytes_written;
    struct tv_hash hash;
    char *shown[2]; /* names lent by tvm_adapters_tensor */
};

static inline enum tv_err am_no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory");
}

static inline uint64_t am_least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

/* ---- adapter_recipe.c ---------------------------------------------------- */

/* An error in the recipe; at NULL: nowhere in it. */
void am_problem(struct tvm_adapters *a, const struct tvm_node *at,
                enum tv_err code, const char *message);
/* *text is owned, also on failure; *root NULL: no YAML, as problems say. */
TV_NODISCARD enum tv_err am_parse(const char *path, struct tvm_arena *arena,
                                  struct tvm_problems *problems,
                                  struct tv_error *err, char **text, size_t *n,
                                  const struct tvm_node **root);
/* Method, rank, dtype; problems are added. */
void am_recipe_read(struct tvm_adapters *a, const struct tvm_node *root);
/* The adapters of `models:`; what is wrong with one is a problem. */
TV_NODISCARD enum tv_err am_open_inputs(struct tvm_adapters *a,
                                        const struct tvm_node *root,
                                        struct tv_error *err);

/* ---- adapter_core.c: fa [rank, in], fb [out, rank], zeroed by the caller - */

/* Factors side by side: A rows times the weight, B as it is. */
TV_NODISCARD enum tv_err am_make_cat(struct tvm_adapters *a,
                                     const struct am_module *m, float *fa,
                                     float *fb, struct tv_error *err);
/* The weighted sum of a module at its rank. */
TV_NODISCARD enum tv_err tvm_adapters_svd(struct tvm_adapters *a,
                                          const struct am_module *m, bool left,
                                          float *fa, float *fb,
                                          struct tv_error *err);
/* Factors of the core that the method gave. */
TV_NODISCARD enum tv_err am_make_core(struct tvm_adapters *a,
                                      const struct am_module *m,
                                      tv_input *merged, float *fa, float *fb,
                                      struct tv_error *err);
/* What is wrong with method and parameters, found with cores of zeros. */
TV_NODISCARD enum tv_err am_plan_cores(struct tvm_adapters *a,
                                       struct tv_error *err);
/* Runs the method over the cores; *out, owned, is its result. */
TV_NODISCARD enum tv_err am_merge_cores(struct tvm_adapters *a, tv_input **out,
                                        struct tvm_problems *problems,
                                        struct tv_error *err);

/* ---- adapter_config.c ---------------------------------------------------- */

/* adapter_config.json, owned text. */
TV_NODISCARD enum tv_err tvm_adapters_config(struct tvm_adapters *a, char **out,
                                             struct tv_error *err);

/* ---- adapter_peft.c ------------------------------------------------------ */

bool tvm_peft_type(const char *name, struct tvm_peft_type *out);
/* Conditions of PEFT's own; problems are added. */
void tvm_peft_check(struct tvm_adapters *a);
uint64_t tvm_peft_rank(const struct tvm_adapters *a, const struct am_module *m,
                       uint64_t widest);
uint64_t tvm_peft_bytes(const struct tvm_adapters *a,
                        const struct am_module *m);
TV_NODISCARD enum tv_err tvm_peft_module(struct tvm_adapters *a,
                                         const struct am_module *m, float *fa,
                                         float *fb, struct tv_error *err);
#endif
