/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/adapters.h - adapters merged into an adapter, without their base.
 *
 * A recipe asks for it with `output: adapter`, or by naming nothing but
 * adapters. merge_method is then
 *   cat    factors side by side: sum of w_t s_t B_t A_t exactly, rank sum r_t
 *   svd    the same sum at rank `rank` (default: the largest input rank); QR of
 *          both stacks and an SVD of the core, never [out, in]
 *   a method of the registry, in Core Space (Panariello et al., 2025, "Accurate
 *          and Efficient Low-Rank Model Merging in Core Space"): bases U, V of
 *          the stacks of B and A, cores U^T (s_t B_t A_t) V merged by the
 *          method as any tensors are, U M V^T factored again; exact when
 *          `rank` is not given
 * and with `--compat peft` one of PEFT's combination types (tv_peft_types).
 * The result has scaling 1 (lora_alpha = r) in every module.
 *
 * Thread rule: a plan is used by one thread at a time.
 */
#ifndef TV_ADAPTERS_H
#define TV_ADAPTERS_H

#include <stdbool.h>

#include "tv/merge.h"

struct tvm_adapters; /* a plan */

struct tvm_adapters_info { /* borrowed from the plan */
    const char *method;
    size_t n_inputs, n_modules, n_tensors;
    uint64_t bytes_read, bytes_written, peak_scratch_bytes, peak_disk_bytes;
};
struct tvm_adapters_tensor {
    const char *name;
    enum tv_dtype dtype;
    unsigned rank;
    uint64_t shape[TV_RANK_MAX];
};

/* Does the recipe ask for an adapter? False as well for what is no recipe:
 * tvm_recipe_load says why. */
TV_NODISCARD enum tv_err tvm_adapters_wanted(const char *path,
                                             const struct tvm_options *o,
                                             bool *yes, struct tv_error *err);
/* Opens the adapters. All problems are listed; *out, owned
 * (tvm_adapters_free), may be set beside them, and can be run without errors
 * only. peft: merge_method is one of PEFT's combination types. */
TV_NODISCARD enum tv_err
tvm_adapters_plan(const char *path, const struct tvm_options *o, bool peft,
                  struct tvm_problems *problems, struct tv_error *err,
                  struct tvm_adapters **out);
void tvm_adapters_info(const struct tvm_adapters *a,
                       struct tvm_adapters_info *out);
/* Tensor i of the output; its name is borrowed until the next call for one of
 * the same side (A: even, B: odd). */
void tvm_adapters_tensor(const struct tvm_adapters *a, size_t i,
                         struct tvm_adapters_tensor *out);
/* What tvm_adapters_run would refuse about OUT (EXISTS, CHANGED, INPUT,
 * LOCKED); without an OUT nothing. */
TV_NODISCARD enum tv_err tvm_adapters_check(const struct tvm_adapters *a,
                                            struct tv_error *err);
/* Writes the adapter into options.out_dir, or finds it there
 * (already_done). Errors of tvm_adapters_check; INTERRUPTED, NONFINITE, CORRUPT
 * when an input changed meanwhile. What is half done is made again. */
TV_NODISCARD enum tv_err tvm_adapters_run(struct tvm_adapters *a,
                                          const struct tvm_run_hooks *hooks,
                                          struct tvm_result *result,
                                          struct tv_error *err);
void tvm_adapters_free(struct tvm_adapters *a); /* NULL allowed */

/* ---- names ---------------------------------------------------------------
 * Methods that have no meaning for models, those of the registry left out. */
struct tvm_adapter_method { /* static */
    const char *name, *summary;
    bool peft; /* PEFT's, with --compat peft */
    const struct tvm_param *params;
    size_t n_params;
};
size_t tvm_adapter_method_count(void);
const struct tvm_adapter_method *tvm_adapter_method_at(size_t i);
/* NULL: unknown. */
const struct tvm_adapter_method *tvm_adapter_method_find(const char *name);

/* ---- extraction ----------------------------------------------------------
 * An adapter from a fine-tune: per matrix the best rank-r factors of W - W0. */
struct tvm_extract {
    const char *model, *base; /* references */
    uint64_t rank;
    double sv_epsilon;   /* drop singular values <= this times the largest */
    bool embeddings;     /* embeddings and head as modules_to_save */
    bool norms;          /* norms (and other vectors) as modules_to_save */
    enum tv_dtype dtype; /* of the factors; TV_DTYPE_NONE: F32 */
    int svd;             /* 0: by size, 1: full, 2: randomized */
    uint64_t seed;       /* of the randomized SVD's test matrix */
};
struct tvm_extracted { /* one matrix */
    const char *module;
    uint64_t rank;
    double energy; /* kept part of ||W - W0||_F^2, 1 when it is zero */
    bool randomized;
};
typedef void (*tvm_extracted_fn)(void *arg, const struct tvm_extracted *one);
/* Uses store, out_dir, memory_bytes, kernels, force, sync of the options. */
TV_NODISCARD enum tv_err
tvm_extract_lora(const struct tvm_extract *x, const struct tvm_options *o,
                 const struct tvm_run_hooks *hooks, tvm_extracted_fn each,
                 void *arg, struct tvm_result *result, struct tv_error *err);
#endif
