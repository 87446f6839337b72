/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/merge.h - recipe -> plan -> run.
 *
 *   recipe  the YAML file as a tree with line numbers (mergekit's language)
 *   plan    one entry per output tensor: method, resolved parameters, inputs,
 *           shape, dtype, place in the output. Made from headers only; all
 *           problems are collected, not just the first
 *   run     tiles over worker threads, journalled, resumable
 *
 * The bytes of a merge are a function of inputs, recipe and seed alone.
 * Ownership: a plan owns its inputs and must outlive a run; it borrows the
 * recipe and what its options point at.
 * Thread rule: each handle is used by one thread at a time; a run has threads
 * of its own, and only `cancel` may be written from outside meanwhile.
 */
#ifndef TV_MERGE_H
#define TV_MERGE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/cuda.h"
#include "tv/dtype.h"
#include "tv/error.h"
#include "tv/format.h"
#include "tv/hash.h"
#include "tv/kernels.h"
#include "tv/lock.h"
#include "tv/model.h"
#include "tv/store.h"

/* ---- problems ---------------------------------------------------------------
 */

struct tvm_problem {
    bool is_error;    /* else a warning */
    enum tv_err code; /* of errors: decides the exit status */
    char *where;      /* "recipe.yml:3:7", tensor or file name; may be "" */
    char *message;
    bool is_note; /* of warnings: for who plans, nothing to act on */
    /* Of what a method finds in a tensor: the parameter, and the source whose
     * (SIZE_MAX: shared), so that the planner can name its place. */
    bool of_param;
    size_t param, source;
};
struct tvm_problems {
    struct tvm_problem *items;
    size_t n, cap, n_errors;
};
void tvm_problems_init(struct tvm_problems *p);
void tvm_problems_free(struct tvm_problems *p); /* ready for another use */
/* Adds one, its texts copied; without memory it is only counted. */
void tvm_problem_add(struct tvm_problems *p, bool is_error, enum tv_err code,
                     const char *where, const char *fmt, ...) TV_PRINTF(5, 6);
/* A warning that only a plan shows, not every run. */
void tvm_problem_note(struct tvm_problems *p, const char *where,
                      const char *fmt, ...) TV_PRINTF(3, 4);
/* Code of the whole list, by exit status order 2, 4, 12, 5; TV_OK when it holds
 * no error. */
enum tv_err tvm_problems_code(const struct tvm_problems *p);

/* ---- methods
 * ------------------------------------------------------------------ */

enum tvm_scope { TVM_SHARED = 0, TVM_INPUT = 1, TVM_NON_BASE = 2 };
enum tvm_type { TVM_FLOAT = 0, TVM_INT = 1, TVM_BOOL = 2, TVM_CHOICE = 3 };
enum tvm_base {
    TVM_BASE_NONE = 0,
    TVM_BASE_OPTIONAL = 1,
    TVM_BASE_REQUIRED = 2
};
#define TVM_PARAMS_MAX 16u

struct tvm_param {
    const char *name;
    enum tvm_scope scope;
    enum tvm_type type;
    bool required, has_default;
    double fallback; /* default; bools 0/1, choices their index */
    const char *help;
    const char *const *choices; /* TVM_CHOICE: names, NULL at the end */
    bool has_min, has_max;      /* bounds of what a recipe may say, inclusive */
    double min, max;
};
#define TVM_FROM(a)      .has_min = true, .min = (a)
#define TVM_WITHIN(a, b) TVM_FROM(a), .has_max = true, .max = (b)

struct tvm_method; /* merge/method.h */
size_t tvm_method_count(void);
const struct tvm_method *tvm_method_at(size_t i);
const struct tvm_method *tvm_method_find(const char *name); /* NULL: unknown */
/* Nearest name for a typing mistake, or NULL. */
const char *tvm_method_suggest(const char *name);
struct tvm_method_info { /* strings static */
    const char *name, *summary, *paper;
    enum tvm_base base;
    bool needs_statistics;
    const struct tvm_param *params;
    size_t n_params;
};
void tvm_method_info(const struct tvm_method *m, struct tvm_method_info *out);

/* ---- recipe
 * ------------------------------------------------------------------- */

typedef struct tvm_recipe tvm_recipe;
/* Syntax errors (YAML, unknown method, wrong types) go into problems with
 * file:line:col; unknown keys are warnings with a suggestion. With errors the
 * return value is tvm_problems_code; *out is set even then, so that
 * tvm_plan_make can find what else is wrong, unless the file cannot be read or
 * is no YAML map. */
TV_NODISCARD enum tv_err tvm_recipe_load(const char *path,
                                         struct tvm_problems *problems,
                                         struct tv_error *err,
                                         tvm_recipe **out);
/* The same with another merge_method in the text, and every `sparsify` in it
 * set to `sparsify`, added where it is missing and the method would do
 * something else; NULL leaves what is written. USAGE when one of them is
 * written in a way (anchors, tags) that cannot be replaced. */
TV_NODISCARD enum tv_err
tvm_recipe_load_as(const char *path, const char *method, const char *sparsify,
                   struct tvm_problems *problems, struct tv_error *err,
                   tvm_recipe **out);
void tvm_recipe_free(tvm_recipe *r); /* with those behind it */
/* The next document of the file (stages.h), NULL: there is none. */
tvm_recipe *tvm_recipe_next(const tvm_recipe *r);
/* The file's bytes, borrowed. */
const char *tvm_recipe_text(const tvm_recipe *r, size_t *n);

/* ---- plan
 * --------------------------------------------------------------------- */

#define TVM_DEVICE_MAX 16u     /* bytes of a device's name */
struct tvm_device {            /* that a merge began with */
    char name[TVM_DEVICE_MAX]; /* "": not known */
    uint64_t memory_bytes;     /* it went by (tvk_cuda_info.factor_bytes) */
};

struct tvm_text { /* calibration text of the model NAME */
    const char *name, *path;
};
struct tvm_options {
    tv_store *store;       /* for store:NAME and --into; may be NULL */
    const char *out_dir;   /* NULL when planning only or --into */
    const char *into;      /* object name, else NULL */
    uint64_t seed;         /* --random-seed, default 0 */
    uint64_t shard_bytes;  /* --out-shard-size; 0: 5 GB */
    uint64_t quota_bytes;  /* --quota; 0: none */
    uint64_t memory_bytes; /* --memory; default 512 MiB */
    unsigned threads;      /* 0: tv_cpu_count */
    const struct tvk_table *kernels; /* NULL: best */
    bool copy_tokenizer;             /* default true */
    bool write_model_card;           /* default true */
    bool sync;                       /* default true; --no-sync clears it */
    bool force, strict;
    bool verify_reads; /* default true: of inputs, and of what is resumed */
    bool verify_inputs;
    bool accept_numerics; /* go on with what another BLAS core type or device
                           * began, whose last bits are other ones */
    bool truncate_embeddings; /* --unsafe-truncate-embeddings */
    unsigned lock_timeout_ms; /* default 10000 */
    uint64_t group_bytes;     /* most bytes worth one commit; 0: default */
    bool no_cache;            /* leave masks and task vectors of the store
                               * alone */
    bool compat_mergekit;     /* its arithmetic, roundings and random stream */
    const struct tvm_text *texts; /* [n_texts] --text NAME=FILE; borrowed */
    size_t n_texts;
    bool keep_statistics;     /* --keep-statistics: in the store */
    enum tv_dtype lora_dtype; /* with it: what adapters are merged into;
                               * TV_DTYPE_NONE: the model's own */
    /* What matrix-scope methods compute on, NULL: the CPU (element-wise work is
     * where `kernels` says); borrowed. device: the same by name, "cpu" ("" too)
     * or "cuda:N", kept with the run so that it goes on as it began. */
    tvk_cuda *cuda;
    char device[TVM_DEVICE_MAX];
    const struct tvm_stage_ref *stages; /* [n_stages] names of results */
    size_t n_stages;
    bool many_methods; /* the recipe serves several: calibration that one of
                        * them does not look at is no mistake */
    bool of_several;   /* quota_bytes and the disk are looked at for all
                        * documents of a file together, not here */
};
/* The result of another merge, as a model reference. It is known by that
 * merge's plan, not by the files, so that a plan does not change when they are
 * made anew. */
struct tvm_stage_ref {
    const char *name, *dir;
    struct tv_hash plan_hash;
};
/* The defaults of `tvmerge run` without options. */
void tvm_options_init(struct tvm_options *o);

struct tvm_gather;
struct tvm_source { /* one input of one output tensor */
    size_t input;   /* index into plan->inputs */
    const struct tv_input_tensor *tensor;
    bool is_base;
    size_t position; /* among the non-base models of the slice in
                        recipe order, with this tensor or without */
    const struct tv_adapter_use *adapters; /* [n_adapters] to add, in order */
    size_t n_adapters;
    const struct tvm_gather *gather; /* merge/gather.h: rows in the order of
                                        the output's tokens; NULL: as they
                                        are */
};

enum tvm_action {
    TVM_COPY = 0, /* bytes of sources[copy_of] as they are */
    TVM_MERGE = 1 /* method->combine */
};

struct tvm_tensor {
    const char *name; /* output name */
    const struct tvm_method *method;
    enum tvm_action action;
    size_t copy_of;             /* TVM_COPY: index into sources */
    struct tvm_source *sources; /* recipe order */
    size_t n_sources;
    int base;        /* index into sources, -1 when none */
    size_t n_models; /* of the slice, without the base: with this tensor or
                        without */
    /* values[p] of parameter p: SHARED in shared[p]; else of source s in
     * per_source[s * n_params + p]. Bools are 0/1. is-set flags beside. */
    double shared[TVM_PARAMS_MAX];
    bool shared_set[TVM_PARAMS_MAX];
    double *per_source;
    bool *per_source_set;
    /* A weight [out, in] of a linear layer of a block: not an embedding, output
     * head, norm, bias or stack of experts. in_first: stored [in, out], as a
     * token embedding is. */
    bool is_linear, in_first, is_embedding;
    enum tv_dtype dtype; /* of the output */
    /* TV_DTYPE_NONE, or with --compat mergekit the dtype that inputs are
     * rounded to and that arithmetic is done in; and where in its stream of
     * random numbers this tensor's begin. */
    enum tv_dtype compute, lora_dtype;
    uint64_t draw_at, n_draws;
    unsigned rank;
    uint64_t shape[TV_RANK_MAX];
    bool has_inputs; /* the weight of a linear layer of a block, whose inputs
                      * calibration can look at */
    uint64_t n_elems, bytes;
    size_t shard; /* place in the output directory */
    uint64_t offset;
    uint64_t name_hash; /* XXH3-64 of name, for Philox */
    int64_t layer;      /* in the output, -1 outside layers */
    /* [n_sources] what was found out of several tensors (merge/survey.h), set
     * while a plan runs; NULL: nothing. */
    const struct tvm_cut *cuts;
};

struct tvm_calibration { /* text of a model's task; strings borrowed */
    const char **texts;  /* [n_texts] files */
    const char **places; /* [n_texts] where each is asked for: file:line:col
                          * of the recipe, or the option */
    size_t n_texts;
    bool random;               /* tokens drawn at random instead */
    uint64_t samples, context; /* 0: defaults */
};

struct tvm_plan_input {
    const char *ref;                           /* as written in the recipe */
    const struct tvm_calibration *calibration; /* NULL: none */
    bool calibrated;                           /* some tensor needs it; then: */
    struct tv_hash calibration_hash; /* of the texts and how they are cut */
    tv_input *input;                 /* the model without adapters */
    struct tv_arch *arch;
    struct tv_hash fingerprint; /* of model and adapters */
    tv_adapter **adapters;      /* of ref+adapter */
    double *adapter_weights;
    size_t n_adapters;
};

struct tvm_vocabulary { /* of the output, when a recipe says how to make it */
    const char *source; /* "union", "base", a model; "truncated" */
    const char *from;   /* ref of the model whose tokenizer it begins with */
    uint64_t n_tokens, n_rows, n_added; /* added: beyond that tokenizer */
    const char *const *notes;           /* what was decided, for people */
    size_t n_notes;
};

struct tvm_side_file { /* what goes beside the weights, config.json last */
    const char *name;
    const char *data;
    size_t n;
    const char *from; /* ref it was copied from, or "" when made */
};

struct tvm_plan { /* owned: tvm_plan_free */
    struct tvm_options options;
    const char *method_name; /* top-level merge_method */
    struct tvm_plan_input *inputs;
    size_t n_inputs;
    struct tvm_tensor *tensors; /* in output (layer) order */
    size_t n_tensors;
    struct tv_shards *shards; /* layout of a directory output */
    struct tvm_side_file *files;
    size_t n_files;
    const char *architecture;                /* of the output */
    const struct tvm_vocabulary *vocabulary; /* NULL: not touched */
    uint64_t bytes_read, bytes_written;
    uint64_t peak_scratch_bytes, peak_disk_bytes;
    uint64_t n_draws; /* random numbers in mergekit's order, all tensors */
    /* Everything the bytes depend on; `identity` is the JSON that was hashed
     * and, not hashed, the recipe's settings in readable form: kept in the
     * journal so that a refusal can name what changed. */
    struct tv_hash hash;
    struct tv_hash weights_hash; /* of the part that weights depend on */
    char *identity;
    const tvm_recipe *recipe; /* borrowed */
    void *storage;
};
/* Plans; *out may be non-NULL together with problems (for printing) but is only
 * runnable when problems->n_errors == 0. `problems` holds those of
 * tvm_recipe_load already; a recipe with errors is planned as far as possible.
 * Returns TV_OK whenever planning itself worked; look at problems. */
TV_NODISCARD enum tv_err tvm_plan_make(const tvm_recipe *r,
                                       const struct tvm_options *o,
                                       struct tvm_problems *problems,
                                       struct tv_error *err,
                                       struct tvm_plan **out);
void tvm_plan_free(struct tvm_plan *p); /* NULL allowed */
/* What the plan's method was told to be for a shared parameter that takes
 * names, static; NULL when it has none of that name. */
const char *tvm_plan_choice(const struct tvm_plan *p, const char *name);
/* Parameters of layers whose inputs are looked at, which is work for a device;
 * 0: none of this plan is. */
uint64_t tvm_plan_device_elems(const struct tvm_plan *p);

/* ---- run
 * ---------------------------------------------------------------------- */

struct tvm_progress {
    size_t n_done, n_tensors;         /* finished tensors, resumed included */
    uint64_t bytes_done, bytes_total; /* output bytes */
    uint64_t bytes_read;
    const char *tensor; /* the one just finished, or NULL */
};
struct tvm_run_hooks {
    void (*progress)(void *arg, const struct tvm_progress *p); /* may be NULL;
                                    called from one thread at a time */
    /* A model running over its calibration text, in tokens; may be NULL. */
    void (*calibrating)(void *arg, const char *model, uint64_t done,
                        uint64_t total);
    void *arg;
    const atomic_int *cancel; /* non-zero: commit the group and stop */
    struct tv_wait wait;      /* told when another run holds OUT */
};
struct tvm_cache_use { /* masks and task vectors of the store */
    size_t masks_used, masks_stored;
    size_t task_vectors_used, task_vectors_stored;
};
struct tvm_damped { /* a layer whose X^T X took more damping than asked for */
    const char *tensor, *donor; /* borrowed */
    double damping;             /* that it took; 0: none was enough, so it is
                                 * masked by the diagonal */
    size_t n_raised;            /* times ten */
    size_t n_unseen;            /* inputs that were 0 in all of the text */
};
struct tvm_calibration_use { /* masks by input statistics */
    size_t n_models;         /* that ran over their text */
    uint64_t n_tokens;       /* of them all */
    size_t n_made, n_found;  /* masks made, masks that the store had */
    size_t n_resumed;        /* masks that an interrupted run had made */
    size_t n_statistics_found, n_statistics_kept; /* inputs, in the store */
    size_t n_damped;      /* layers that took more damping ... */
    double most_damping;  /* ... at most so much */
    size_t n_uncorrected; /* ... or were not corrected in the end */
    double seconds;
    bool random; /* random tokens instead of text */
};
struct tvm_result {
    size_t n_tensors, n_resumed;
    size_t n_remade; /* of an earlier run, with bytes that it did not write:
                        merged again */
    struct tvm_calibration_use calibration;
    uint64_t bytes_read, bytes_written;
    double seconds;
    uint64_t peak_scratch_bytes;
    struct tv_hash digest;
    uint64_t n_nonfinite_in, n_nonfinite_out;
    bool already_done; /* the same merge was complete before */
    size_t n_left_out; /* extract-lora: tensors that differ, but have no place
                        * in the adapter */
    struct tvm_cache_use cache;
    double t_read, t_compute, t_write, t_sync; /* seconds summed over workers */
};
/* Runs or resumes. INTERRUPTED after cancel; CHANGED when OUT holds state of
 * another plan (the message names the difference); EXISTS when OUT holds
 * something that is not ours; NOSPACE, LOCKED, CORRUPT as usual. */
TV_NODISCARD enum tv_err tvm_run(struct tvm_plan *p,
                                 const struct tvm_run_hooks *hooks,
                                 struct tvm_result *result,
                                 struct tv_error *err);

/* What tvm_run would refuse about the place of the output (CHANGED, EXISTS), or
 * would have to wait for (LOCKED). Changes nothing. TV_OK without an output. */
TV_NODISCARD enum tv_err tvm_run_check(struct tvm_plan *p,
                                       struct tv_error *err);

/* ---- layers -----------------------------------------------------------------
 * What each way to prune costs a layer: ||X (T - P)^T||_F^2 over the inputs X
 * of its calibration text, and of another text that chose nothing. */
struct tvm_layers_options {
    const double *densities; /* [n_densities] */
    size_t n_densities;
    const char *prefix; /* tensors whose names begin so; NULL: all */
    const char *other;  /* file; NULL: none */
};
struct tvm_layer_error {
    const char *name, *donor, *method; /* magnitude, random, importance, obs,
                                        * cg, obs+cg; sparsegpt: the mask of
                                        * obs; cholesky: t^2 / U_jj^2 */
    double density, error, relative;   /* relative to ||X T^T||_F^2 */
    bool has_other;
    double error_other;
    uint64_t kept;
    double damping;  /* that it took; 0: none needed */
    size_t n_unseen; /* inputs that were 0 in all of the text */
};
typedef void (*tvm_layer_fn)(void *arg, const struct tvm_layer_error *one);
/* Calls fn for every layer, donor, density and method, in the order of layers
 * of one donor after the other. Nothing is written. USAGE when a donor has no
 * calibration text, BUDGET. */
TV_NODISCARD enum tv_err tvm_layers(const struct tvm_plan *p,
                                    const struct tvm_layers_options *o,
                                    const struct tvm_run_hooks *hooks,
                                    tvm_layer_fn fn, void *arg,
                                    struct tv_error *err);

struct tvm_status {
    enum { TVM_ABSENT = 0, TVM_UNFINISHED = 1, TVM_FINISHED = 2 } state;
    size_t n_done, n_tensors;
    uint64_t bytes_done, bytes_total;
    bool running;             /* a process holds the lock */
    struct tvm_device device; /* it began with */
    struct tv_hash plan_hash, digest;
    /* Masks by input statistics: all, those there are, those whose layers took
     * more damping, or were not corrected in the end. */
    size_t n_masks, n_masks_made, n_damped, n_uncorrected;
    double most_damping;
    bool random; /* some were made with random tokens */
};
/* How far the merge into a directory is, by its journal or its record; ABSENT
 * when there is neither. Changes and locks nothing. CORRUPT names the file. */
TV_NODISCARD enum tv_err tvm_status(const char *out_dir, struct tvm_status *out,
                                    struct tv_error *err);
/* Calls fn for every layer that took more damping. */
TV_NODISCARD enum tv_err
tvm_status_damped(const char *out_dir,
                  void (*fn)(void *arg, const struct tvm_damped *d), void *arg,
                  struct tv_error *err);
/* The same for the merge of that name in a store; ABSENT when there is none. fn
 * may be NULL. */
TV_NODISCARD enum tv_err
tvm_status_into(tv_store *store, const char *name, struct tvm_status *out,
                void (*fn)(void *arg, const struct tvm_damped *d), void *arg,
                struct tv_error *err);
/* Calls fn for every unfinished merge that a store knows of: of those into its
 * objects by their names, of those into directories (is_dir) that read it. */
typedef void (*tvm_status_fn)(void *arg, const char *name, bool is_dir,
                              const struct tvm_status *s);
TV_NODISCARD enum tv_err tvm_status_store(tv_store *store, tvm_status_fn fn,
                                          void *arg, struct tv_error *err);
/* The device that the merge of that name in a store, finished or not, began
 * with; "": there is none. */
void tvm_into_device(tv_store *store, const char *name, struct tvm_device *dst);
/* Drops runs of the store, and with them their pins, that can never go on: the
 * unfinished object or output directory is gone, or is another plan's. To be
 * called before a removal that pins may refuse. */
TV_NODISCARD enum tv_err tvm_runs_sweep(tv_store *store, struct tv_error *err);

#endif
