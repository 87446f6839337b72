/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_gta.h - what the methods of generalised task arithmetic share
 * (method_gta.c). A method of the family is a constant struct tvm_method whose
 * `detail` is a struct gta_detail; parameters and functions are common.
 */
#ifndef TVM_METHOD_GTA_H
#define TVM_METHOD_GTA_H

#include "method.h"

enum gta_sparsify {
    GTA_NONE = 0,
    GTA_MAGNITUDE = 1,
    GTA_RANDOM = 2,
    GTA_OUTLIERS = 3,
    GTA_IMPORTANCE = 4, /* by input statistics: */
    GTA_SPARSEGPT = 5
};

struct gta_detail {
    enum gta_sparsify sparsify;
    bool consensus;
    bool mergekit; /* its roundings, L1 factors and random stream */
    bool choose;   /* the recipe says how to sparsify */
    bool scoped;   /* has trim_scope, as parameter GTA_SCOPE */
};

enum {
    GTA_WEIGHT,
    GTA_DENSITY,
    GTA_NORMALIZE,
    GTA_RESCALE,
    GTA_LAMBDA,
    GTA_INT8_MASK,
    GTA_N_PARAMS,
    GTA_EXTRA = GTA_N_PARAMS,    /* gamma or epsilon, where a method has it */
    GTA_SPARSIFY = GTA_N_PARAMS, /* with gta_detail::choose */
    GTA_CORRECT,
    GTA_COMPARE,
    GTA_PATTERN,
    GTA_INPUTS,
    GTA_DAMPING,
    GTA_CG_STEPS,
    GTA_OTHERS,
    GTA_EMBEDDINGS,
    GTA_N_CHOOSE,
    GTA_SCOPE = GTA_N_CHOOSE /* with gta_detail::scoped, behind the others */
};

enum gta_choice { /* of GTA_SPARSIFY */
                  GTA_CHOICE_NONE,
                  GTA_CHOICE_MAGNITUDE,
                  GTA_CHOICE_RANDOM,
                  GTA_CHOICE_IMPORTANCE,
                  GTA_CHOICE_SPARSEGPT
};

extern const char *const gta_sparsifiers[],
    *const gta_corrections[], *const gta_compares[],
                                  *const gta_patterns[],
                                      *const gta_inputs[],
                                          *const gta_others[],
                                              *const gta_embeddings[];

enum gta_keep {
    GTA_KEEP_ALL,
    GTA_KEEP_NONE,
    GTA_KEEP_TOP,
    GTA_KEEP_KNOWN,
    GTA_KEEP_RANDOM
};
/* How a donor of the tensor is thinned (never KNOWN). */
enum gta_keep gta_keep_of(const struct tvm_tensor *t, size_t source);

/* trim_scope: one selection over a layer or the model (gta_survey.c). */
enum tvm_reach gta_reach(const struct tvm_tensor *t);
extern const struct tvm_surveyor gta_surveyor;

/* The parameters with a method's own defaults; int8_mask saves memory in
 * mergekit and never changes a result, so it is accepted and ignored. */
#define GTA_PARAMS(normalize_default, rescale_default)                         \
    {                                                                          \
        GTA_PARAM_LIST(normalize_default, rescale_default)                     \
    }
#define GTA_PARAM_LIST(normalize_default, rescale_default)                     \
    [GTA_WEIGHT] = {.name = "weight",                                          \
                    .scope = TVM_NON_BASE,                                     \
                    .type = TVM_FLOAT,                                         \
                    .required = true,                                          \
                    .help = "factor of this task vector"},                     \
    [GTA_DENSITY] = {.name = "density",                                        \
                     .scope = TVM_NON_BASE,                                    \
                     .type = TVM_FLOAT,                                        \
                     .has_default = true,                                      \
                     .fallback = 1.0,                                          \
                     TVM_WITHIN(0.0, 1.0),                                     \
                     .help = "fraction of the task vector to keep"},           \
    [GTA_NORMALIZE] = {.name = "normalize",                                    \
                       .scope = TVM_SHARED,                                    \
                       .type = TVM_BOOL,                                       \
                       .has_default = true,                                    \
                       .fallback = (normalize_default),                        \
                       .help = "divide by the weights that took part"},        \
    [GTA_RESCALE] = {.name = "rescale",                                        \
                     .scope = TVM_SHARED,                                      \
                     .type = TVM_BOOL,                                         \
                     .has_default = true,                                      \
                     .fallback = (rescale_default),                            \
                     .help = "make up for what was dropped"},                  \
    [GTA_LAMBDA] = {.name = "lambda",                                          \
                    .scope = TVM_SHARED,                                       \
                    .type = TVM_FLOAT,                                         \
                    .has_default = true,                                       \
                    .fallback = 1.0,                                           \
                    .help = "factor of the merged task vector"},               \
    [GTA_INT8_MASK] = {.name = "int8_mask",                                    \
                       .scope = TVM_SHARED,                                    \
                       .type = TVM_BOOL,                                       \
                       .has_default = true,                                    \
                       .fallback = 0.0,                                        \
                       .help = "accepted for mergekit; changes nothing"},

#define GTA_CHOOSE_PARAMS(normalize_default, sparsify_default)                 \
    {                                                                          \
        GTA_CHOOSE_LIST(normalize_default, sparsify_default)                   \
    }
#define GTA_CHOOSE_LIST(normalize_default, sparsify_default)                   \
    GTA_PARAM_LIST(normalize_default, 0.0)                                     \
    [GTA_SPARSIFY] = {.name = "sparsify",                                      \
                      .scope = TVM_SHARED,                                     \
                      .type = TVM_CHOICE,                                      \
                      .has_default = true,                                     \
                      .fallback = (sparsify_default),                          \
                      .choices = gta_sparsifiers,                              \
                      .help = "which entries of a task vector density keeps"}, \
    [GTA_CORRECT] = {.name = "error_correction",                               \
                     .scope = TVM_SHARED,                                      \
                     .type = TVM_CHOICE,                                       \
                     .has_default = true,                                      \
                     .fallback = (0),                                          \
                     .choices = gta_corrections,                               \
                     .help = "importance, sparsegpt: change what is kept "     \
                             "to make up for the rest"},                       \
    [GTA_COMPARE] = {.name = "importance_scope",                               \
                     .scope = TVM_SHARED,                                      \
                     .type = TVM_CHOICE,                                       \
                     .has_default = true,                                      \
                     .fallback = (0),                                          \
                     .choices = gta_compares,                                  \
                     .help = "importance: entries that compete for a place"},  \
    [GTA_PATTERN] = {.name = "pattern",                                        \
                     .scope = TVM_SHARED,                                      \
                     .type = TVM_CHOICE,                                       \
                     .has_default = true,                                      \
                     .fallback = (0),                                          \
                     .choices = gta_patterns,                                  \
                     .help = "importance, sparsegpt: keep n of every m "       \
                             "inputs instead of density"},                     \
    [GTA_INPUTS] =                                                             \
        {.name = "statistics",                                                 \
         .scope = TVM_SHARED,                                                  \
         .type = TVM_CHOICE,                                                   \
         .has_default = true,                                                  \
         .fallback = (0),                                                      \
         .choices = gta_inputs,                                                \
         .help = "whose inputs are looked at: the model's own, the base's or " \
                 "the merged model's, block by block"},                        \
    [GTA_DAMPING] = {.name = "damping",                                        \
                     .scope = TVM_SHARED,                                      \
                     .type = TVM_FLOAT,                                        \
                     .has_default = true,                                      \
                     .fallback = 0.01,                                         \
                     TVM_WITHIN(1e-12, 1e3),                                   \
                     .help = "part of the mean of the diagonal of X^T X "      \
                             "that is added to it"},                           \
    [GTA_CG_STEPS] = {.name = "cg_steps",                                      \
                      .scope = TVM_SHARED,                                     \
                      .type = TVM_INT,                                         \
                      .has_default = true,                                     \
                      .fallback = 3.0,                                         \
                      TVM_WITHIN(1.0, 1e3),                                    \
                      .help = "steps of error_correction: cg"},                \
    [GTA_OTHERS] = {.name = "others",                                          \
                    .scope = TVM_SHARED,                                       \
                    .type = TVM_CHOICE,                                        \
                    .has_default = true,                                       \
                    .fallback = (0),                                           \
                    .choices = gta_others,                                     \
                    .help = "importance, sparsegpt: tensors that are no "      \
                            "linear layer of a block"},                        \
    [GTA_EMBEDDINGS] = {.name = "embeddings",                                  \
                        .scope = TVM_SHARED,                                   \
                        .type = TVM_CHOICE,                                    \
                        .has_default = true,                                   \
                        .fallback = (0),                                       \
                        .choices = gta_embeddings,                             \
                        .help =                                                \
                            "importance, sparsegpt: the token embedding "      \
                            "as others, or by how often its tokens occur"},

/* Random numbers that a tensor takes from mergekit's stream. */
uint64_t gta_draws(const struct tvm_tensor *t);
void gta_check(const struct tvm_tensor *t, struct tvm_problems *problems);
int gta_fold(const struct tvm_tensor *t);
size_t gta_state_bytes(const struct tvm_job *job);
bool gta_next_phase(struct tvm_job *job);
bool gta_trims(const struct tvm_tensor *t, size_t source,
               struct tvm_trim_rule *rule);
void gta_tile_begin(struct tvm_job *job, struct tvm_tile *tile);
void gta_measure(struct tvm_job *job, struct tvm_tile *tile,
                 const float *const *x, size_t n);
void gta_combine(struct tvm_job *job, struct tvm_tile *tile,
                 const float *const *x, float *dst, size_t n);
bool gta_takes_bf16(const struct tvm_job *job, bool combine);
void gta_measure_bf16(struct tvm_job *job, struct tvm_tile *tile,
                      const void *const *x, size_t n);
uint64_t gta_combine_bf16(struct tvm_job *job, struct tvm_tile *tile,
                          const void *const *x, void *dst, size_t n);

#define GTA_FUNCTIONS                                                          \
    .n_params = GTA_N_PARAMS, .check = gta_check, GTA_SHARED_FUNCTIONS

/* For methods whose recipe may say how to sparsify. */
#define GTA_CHOOSE_FUNCTIONS                                                   \
    .n_params = GTA_N_CHOOSE, .check = gta_check, GTA_SHARED_FUNCTIONS

#define GTA_SHARED_FUNCTIONS                                                   \
    .base = TVM_BASE_REQUIRED, .min_donors = 0, .max_donors = TVK_DONORS_MAX,  \
    .fold = gta_fold, .state_bytes = gta_state_bytes,                          \
    .next_phase = gta_next_phase, .tile_begin = gta_tile_begin,                \
    .measure = gta_measure, .combine = gta_combine,                            \
    .takes_bf16 = gta_takes_bf16, .measure_bf16 = gta_measure_bf16,            \
    .combine_bf16 = gta_combine_bf16, .trims = gta_trims

/* The variant for --compat mergekit of a method with those; never folded to a
 * copy, since adding a difference back rounds. */
#define GTA_COMPAT_CHOOSE_FUNCTIONS                                            \
    .n_params = GTA_N_CHOOSE, GTA_COMPAT_SHARED_FUNCTIONS
#define GTA_COMPAT_FUNCTIONS                                                   \
    .n_params = GTA_N_PARAMS, GTA_COMPAT_SHARED_FUNCTIONS

#define GTA_COMPAT_SHARED_FUNCTIONS                                            \
    .base = TVM_BASE_REQUIRED, .min_donors = 0, .max_donors = TVK_DONORS_MAX,  \
    .check = gta_check, .state_bytes = gta_state_bytes,                        \
    .next_phase = gta_next_phase, .tile_begin = gta_tile_begin,                \
    .measure = gta_measure, .combine = gta_combine, .draws = gta_draws

#endif
