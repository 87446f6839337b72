/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sequential.h - the model merged so far, block by block (private to merge/).
 *
 *   for each block:  every donor's text, behind the merged blocks below, runs
 *                    through the donor's own block: statistics of its inputs
 *                    (see), from which the caller makes what merging it takes;
 *                    the block is merged into a scratch file; every text runs
 *                    through the merged block
 *
 * So the inputs of a block are those that the merged model gives it, as
 * SparseGPT prunes (arXiv 2301.00774) and RegMean++ averages (arXiv
 * 2508.03121). The merged weights are in the output's dtype: what will be
 * computed with. The blocks are merged again with the others when the output is
 * written: what is here ends with the run.
 *
 * Results depend on plan and texts alone. Memory: merged weights are in a
 * mapped file, residual streams too unless a quarter of the budget holds them.
 */
#ifndef TVM_SEQUENTIAL_H
#define TVM_SEQUENTIAL_H

#include "exec.h"
#include "tv/calibrate.h"
#include "tv/merge.h"

struct tvm_sequential_text {
    size_t input; /* of the plan: its model runs over its text */
    bool gram;
};

struct tvm_sequential {
    const struct tvm_plan *plan;
    const struct tvm_sequential_text *texts; /* [n_texts] */
    size_t n_texts;
    uint64_t reserve; /* bytes of the budget that `see` takes */
    struct tvm_cache *cache;
    struct tvm_calibrated *calibrated;
    const struct tvm_run_hooks *hooks;
    void *arg;
    /* Are the inputs of a model's tensor looked at? `lacks`: is it for these
     * that the model runs? Behind the last such block nothing is. */
    bool (*wants)(void *arg, size_t text, const char *tensor);
    bool (*lacks)(void *arg, size_t text, const char *tensor);
    enum tv_err (*see)(void *arg, size_t text, const struct tve_stat_input *in,
                       struct tv_error *err);
    /* All texts were seen for a block: its merge is next. */
    enum tv_err (*ready)(void *arg, struct tv_error *err);
    uint64_t n_tokens; /* out: of all texts */
    bool random;       /* out: some text is of random tokens */
};

/* Can this input's model be run with merged blocks? Reads no weights.
 * UNSUPPORTED where the output is no model of the same shape. */
TV_NODISCARD enum tv_err tvm_sequential_check(const struct tvm_plan *p,
                                              size_t input,
                                              struct tv_error *err);
TV_NODISCARD enum tv_err tvm_sequential_run(struct tvm_sequential *s,
                                            struct tv_error *err);
/* Bytes of the scratch file of its merged blocks. */
uint64_t tvm_sequential_disk(const struct tvm_plan *p);
/* Of those with activations, at most: residual streams of all texts and a batch
 * of one. Reads no weights. */
TV_NODISCARD enum tv_err
tvm_sequential_scratch(const struct tvm_plan *p,
                       const struct tvm_sequential_text *texts, size_t n_texts,
                       uint64_t reserve, uint64_t *bytes, struct tv_error *err);
#endif
