/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_build.h - one output tensor while it is planned (private to
 * plan_tensors.c and these).
 *
 *   plan_tensors.c  which tensors there are, who supplies them, in which order
 *   plan_shapes.c   do they fit; copies, the dtype, the bytes
 *   plan_values.c   the value of every parameter; what the method says
 *
 * Steps report what is wrong and clear b->ok; those that follow go on with what
 * is usable.
 */
#ifndef TVM_PLAN_BUILD_H
#define TVM_PLAN_BUILD_H

#include "plan_vocab.h"

#define PLAN_LISTED 20u /* problems of one cause */

struct plan_cand { /* a source's tensor under its output name */
    const char *name;
    size_t slice, source, index; /* index: tensor of the input */
    int64_t k;                   /* layer within the slice, -1 outside */
    int64_t n_k;                 /* of so many */
};

struct plan_build {
    struct planner *pl;
    const struct plan_slice *slice;
    const struct plan_cand *cands; /* of this name */
    size_t n_cands;
    const struct tv_arch_tensor *like; /* description of the first one */
    struct tvm_tensor *t;
    size_t *at; /* [t->n_sources] source of the slice */
    /* Where the value of parameter p was written, [slice->n + 1][n_params], the
     * last row of shared ones; NULL entries: a default. */
    const struct tvm_node **from;
    bool is_head;
    bool ok;
    bool refused; /* a setting, which was said; its default stands in */
};

/* References of sources as the recipe has them: of the slice, of the tensor. */
static inline const char *plan_ref_of(const struct plan_build *b,
                                      size_t slice_source)
{
    return b->pl->plan->inputs[b->slice->input[slice_source]].ref;
}

static inline const char *plan_source_ref(const struct plan_build *b, size_t i)
{
    return plan_ref_of(b, b->at[i]);
}

/* ---- plan_shapes.c ------------------------------------------------------- */

/* The shape of the output, of sources that agree. */
void plan_check_shapes(struct plan_build *b);
/* config.json speaks of one number of tokens, so a tensor over tokens has as
 * many as the model that gives it, also where that one supplies nothing. */
void plan_check_tokens(struct plan_build *b);
/* Rows in the order of the output's tokens. */
TV_NODISCARD enum tv_err plan_align_rows(struct plan_build *b);
/* Are all sources of types that arithmetic takes? */
bool plan_all_math(const struct tvm_tensor *t);
/* --compat mergekit: the method's variant, in the dtype mergekit works in. */
void plan_compat_arithmetic(struct plan_build *b);
/* Copy or merge, and the dtype of the output. */
TV_NODISCARD enum tv_err plan_choose_dtype(struct plan_build *b);
/* Elements, bytes, cost. */
TV_NODISCARD enum tv_err plan_count_bytes(struct plan_build *b);

/* ---- plan_values.c ------------------------------------------------------- */

/* Layer k of n_k of the slice; k -1: outside layers. */
TV_NODISCARD enum tv_err plan_resolve_parameters(struct plan_build *b,
                                                 int64_t k, int64_t n_k);
/* What the method says about this tensor, one message per cause. What is wrong
 * with a value of the recipe is wrong for many tensors: said once, with the
 * first of them. */
void plan_ask_method(struct plan_build *b);

#endif
