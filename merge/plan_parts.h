/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_parts.h - what the files of the planner share (private to plan*.c and
 * card.c).
 *
 *   plan.c           order of work
 *   plan_slices.c    inputs, slices and their layers
 *   plan_space.c     shards; memory, disk, quotas; the place of OUT
 *   plan_report.c    problems with a limit per cause
 *   plan_modules.c   slices of the modules of the output
 *   plan_inputs.c    references -> opened models, adapters, fingerprints
 *   plan_vocab.c     tokens, ids and rows of the output (plan_vocab.h)
 *   plan_layout.c    experts stored in another way than the output's
 *   plan_ties.c      does the output have a head of its own?
 *   plan_tensors.c   output tensors and their sources (plan_build.h)
 *   plan_shapes.c    ... their shapes, dtype, copy or merge
 *   plan_values.c    ... their parameters
 *   plan_calibration.c  texts for methods that look at the inputs of layers
 *   plan_files.c     side files, config.json edits
 *   plan_stack.c     what config.json says about layers by number
 *   plan_identity.c  what the bytes depend on, as JSON and hash
 *   card.c           README.md
 */
#ifndef TVM_PLAN_PARTS_H
#define TVM_PLAN_PARTS_H

#include "arena.h"
#include "method.h"
#include "recipe.h"
#include "tv/merge.h"

/* An opened model or adapter; several references may share it. */
struct plan_open {
    char *key; /* of the place: an inode or "store:NAME" */
    tv_input *input;
    struct tv_arch *arch; /* models */
    tv_adapter *adapter;  /* adapters */
    struct tv_hash fingerprint;
    bool failed; /* a problem was reported */
};

struct plan_bound { /* an adapter module on tensor `target` of the model */
    size_t target, order;
    struct tv_adapter_use low_rank;
};

struct plan_made {              /* a tensor that an input has in another form */
    struct tv_arch_tensor like; /* as it would be described */
    size_t index; /* of the tensor that only has another name, or SIZE_MAX: */
    const struct tv_input_tensor *tensor; /* what it would be, ... */
    const struct tvm_gather *gather;      /* ... put together from these */
};

struct plan_ref { /* beside plan->inputs[i] */
    const struct tvm_recipe_ref *where;
    const struct plan_bound *bound;  /* sorted by target, then order */
    struct tv_adapter_use *low_rank; /* the same order, what sources point at */
    size_t n_bound;
    bool usable;
    struct plan_made *made; /* indices from arch->n_tensors on; heap */
    size_t n_made, cap_made;
    bool *hidden; /* [arch->n_tensors] made ones stand for it; NULL: none */
    size_t embed, head;   /* tensors, SIZE_MAX: none */
    bool tied;            /* its head is its embedding */
    const char *hub;      /* "ORG/NAME" when it came from the hub cache */
    const char *revision; /* the commit when known, else as written, or NULL */
};

struct plan_slice {
    const struct tvm_recipe_slice *recipe;
    const struct tvm_recipe_module *of; /* of `modules:`, else NULL */
    const char *module;     /* NULL: of all modules, layers of the main one */
    bool is_first, is_last; /* of its module */
    bool is_copy;           /* of a module that the recipe does not name */
    int64_t n_out;          /* layers of its module in the output */
    size_t n;               /* sources, the appended base included */
    size_t *input;          /* [n] index into plan->inputs */
    int64_t *from;          /* [n] first layer */
    const struct tvm_node **parameters; /* [n] of the source, may be NULL */
    bool *usable;                       /* [n] opened, and its layers exist */
    int base; /* index of the base among the sources, or -1 */
    int64_t n_layers, out_from;
    bool broken; /* a source is unusable: no method checks */
};

struct plan_cause {
    const char *key;
    size_t n, limit;
    bool is_error, is_note;
    enum tv_err code;
};

struct plan_storage { /* plan->storage */
    struct tvm_arena arena;
    struct plan_open *opens;
    size_t n_opens, cap_opens;
    size_t donor;      /* input that gives config.json */
    bool head_written; /* the output has an lm_head */
    char **owned;      /* side files read from inputs */
    size_t n_owned;
};

struct plan_vocab;

struct planner {
    const struct tvm_recipe *r;
    struct tvm_plan *plan;
    struct plan_storage *st;
    struct tvm_problems *problems;
    struct tv_error *err; /* of failures that end planning */
    struct plan_ref *refs;
    size_t cap_refs;
    struct plan_slice *slices;
    size_t n_slices;
    int64_t n_layers;          /* of the output */
    bool agree;                /* the inputs are of one architecture */
    struct plan_vocab *vocab;  /* plan_vocab.h; NULL: nothing to align */
    bool vocab_bad;            /* it could not be decided: reported */
    const char *chat_template; /* of the output; NULL: as it is */
    const char *guessed;       /* what of an architecture; NULL: known */
    bool tied;                 /* the output has no head of its own */
    bool lend_head; /* tied inputs lend their embedding to a written head ... */
    const char *head_name; /* ... of this name, NULL when unknown */
    struct plan_cause *causes;
    size_t n_causes, cap_causes;
    bool oom;
};

/* ---- plan_report.c --------------------------------------------------------
 */

/* Adds a problem; of one cause (a short key) at most `limit` are listed. */
void plan_report(struct planner *pl, const char *cause, size_t limit,
                 bool is_error, enum tv_err code, const char *where,
                 const char *fmt, ...) TV_PRINTF(7, 8);
/* The same for what needs nobody to act: told where a merge is planned only. */
void plan_note(struct planner *pl, const char *cause, size_t limit,
               const char *where, const char *fmt, ...) TV_PRINTF(5, 6);
/* "... and N more" for causes that went over their limit. */
void plan_report_rest(struct planner *pl);
/* True for codes that say something about this process, not about the inputs:
 * planning ends with them. */
bool plan_fatal(enum tv_err code);
/* Place of a reference in the recipe, in the arena. */
const char *plan_where(struct planner *pl, const struct tvm_recipe_ref *ref);

/* ---- the steps ------------------------------------------------------------
 */

/* Opens what the recipe names. */
TV_NODISCARD enum tv_err plan_add_inputs(struct planner *pl);
/* Index of the input that a reference was opened as. */
size_t plan_input_index(const struct planner *pl, const char *ref);
/* Slices of the output with their sources and layers. */
TV_NODISCARD enum tv_err plan_make_slices(struct planner *pl);
/* Required parameters of sources that no tensor can be asked about, because the
 * models do not open or do not fit together. */
void plan_check_required(struct planner *pl);
/* Shards of the output, or nothing for one into a store. */
TV_NODISCARD enum tv_err plan_lay_out(struct planner *pl);
/* Writing into an input, or replacing what holds it, would destroy it. */
TV_NODISCARD enum tv_err plan_check_out_place(struct planner *pl);
/* Memory, disk and quotas, from the tensors that are planned. */
TV_NODISCARD enum tv_err plan_check_room(struct planner *pl);
/* Index of the input for a reference, opened at its first use; problems are
 * reported and leave it unusable. */
TV_NODISCARD enum tv_err plan_input_add(struct planner *pl,
                                        const struct tvm_recipe_ref *ref,
                                        size_t *index);
/* Do all usable inputs describe the same architecture? Sets pl->agree. */
TV_NODISCARD enum tv_err plan_inputs_agree(struct planner *pl);
/* Refuses tensors of quantised models that are not just copied. */
void plan_quantized_check(struct planner *pl);
/* Index of the input for a reference, SIZE_MAX when there is none. */
size_t plan_input_find(const struct planner *pl, const char *ref);
/* Gives every input the output's layout of experts: refs[].made, hidden. */
TV_NODISCARD enum tv_err plan_layout_make(struct planner *pl);
void plan_layout_free(struct planner *pl);
/* Tensors of an input, made ones behind its own, and what one is. */
size_t plan_count(const struct planner *pl, size_t input);
const struct tv_arch_tensor *plan_describe(const struct planner *pl,
                                           size_t input, size_t index);
/* Fills a source from input's tensor `index`, own or made, with the adapters on
 * it. */
void plan_source_fill(struct planner *pl, size_t input, size_t index,
                      struct tvm_source *s);
/* The slices, without their sources. */
TV_NODISCARD enum tv_err plan_modules_make(struct planner *pl);
/* Of an architecture, by its own name; NULL: it has none. */
const struct tv_arch_module *plan_module_of(const struct tv_arch *a,
                                            const char *name);
/* Is a tensor in the module of a slice? */
bool plan_in_slice(const struct plan_slice *s, const struct tv_arch *a,
                   const struct tv_arch_tensor *t);
/* Layers that a model has in the module of a slice. */
int64_t plan_slice_depth(const struct plan_slice *s, const struct tv_arch *a);
/* Tokens, ids and rows of the output, when the recipe asks for it; sets
 * pl->vocab and pl->chat_template. */
TV_NODISCARD enum tv_err plan_vocab_make(struct planner *pl);
void plan_vocab_free(struct plan_vocab *v); /* NULL allowed */
/* Tied or not: refs[].tied, pl->tied, lend_head, head_name. */
TV_NODISCARD enum tv_err plan_ties_make(struct planner *pl);
/* Have two tensors the same bytes? */
TV_NODISCARD enum tv_err plan_views_equal(struct planner *pl,
                                          const struct tvm_source *a,
                                          const struct tvm_source *b,
                                          struct tv_error *err, bool *equal);
TV_NODISCARD enum tv_err plan_tensors_make(struct planner *pl);
/* Which text calibrates what; files are read and hashed. */
TV_NODISCARD enum tv_err plan_calibration_find(struct planner *pl);
TV_NODISCARD enum tv_err plan_calibration_make(struct planner *pl);
/* Layers whose factor the CPU makes although there is a device, which has no
 * memory for it; of *n_all. */
size_t plan_host_factors(const struct tvm_plan *plan, size_t *n_all);
TV_NODISCARD enum tv_err plan_files_make(struct planner *pl);
/* config.json of input `from` for the stack that the output or one of its
 * modules (of plan_slice) is; *out owned, NULL when nothing changes. */
TV_NODISCARD enum tv_err plan_stack_config(struct planner *pl, size_t from,
                                           const char *module, const char *data,
                                           size_t n, char **out, size_t *n_out);
TV_NODISCARD enum tv_err plan_identity_make(struct planner *pl);
/* Owned by the arena; *out NULL-terminated. */
TV_NODISCARD enum tv_err plan_card_make(struct planner *pl, const char **out,
                                        size_t *n);
void plan_opens_close(struct plan_storage *st);

static inline struct tvm_arena *plan_arena(struct planner *pl)
{
    return &pl->st->arena;
}

TV_NODISCARD enum tv_err plan_oom(struct planner *pl);

#endif
