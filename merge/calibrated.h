/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibrated.h - masks that depend on the inputs of layers, made before the
 * tiles of a run (private to merge/).
 *
 * A model runs over its task's text; for each of its linear layers the task
 * vector is pruned with the statistics of the layer's inputs while these are in
 * memory (prune.h). What comes out, a mask and for error correction the values
 * that it leaves, is the same whatever it is merged with: it goes into the
 * store, where later runs find it, and what finds no room there into a scratch
 * file of this run. From then on such a mask is one that is known.
 */
#ifndef TVM_CALIBRATED_H
#define TVM_CALIBRATED_H

#include "cache.h"
#include "method.h"
#include "sink.h"
#include "tv/text.h"

/* Of what a mask means; part of its key. */
#define TVM_CALIBRATED_VERSION 1u

struct tvm_calibrated;

const char *tvm_rule_name(const struct tvm_trim_rule *r);
/* Adds what the statistics depend on: model, text, how it is cut. */
TV_NODISCARD enum tv_err
tvm_calibrated_key(const struct tvm_plan *p, const struct tvm_tensor *t,
                   size_t source, const struct tvm_trim_rule *r,
                   struct tv_buf *to, struct tv_error *err);
/* What is to be made of a source before the run; false: nothing. */
bool tvm_calibrated_rule(const struct tvm_tensor *t, size_t source,
                         struct tvm_trim_rule *rule);
/* Does the plan need any? Then *needed: least bytes of memory. */
bool tvm_calibrated_wanted(const struct tvm_plan *p, uint64_t *needed,
                           uint64_t *disk);
/* Bytes of scratch files with the activations of calibrated models, and of heap
 * while these run, at most, at one moment. Reads no weights. */
TV_NODISCARD enum tv_err tvm_calibrated_scratch(const struct tvm_plan *p,
                                                uint64_t *bytes, uint64_t *heap,
                                                struct tv_error *err);
/* Input of the plan whose calibration text counts for a source; n_inputs: none.
 * *model: the one that runs over it. */
size_t tvm_calibration_owner(const struct tvm_plan *p,
                             const struct tvm_tensor *t, size_t source,
                             const struct tvm_trim_rule *r, size_t *model);
/* Are the statistics of a source those of random tokens? */
bool tvm_calibrated_random(const struct tvm_plan *p, const struct tvm_tensor *t,
                           size_t source, const struct tvm_trim_rule *r);
/* Can the model be run at all, in the way that the rule asks for? Reads no
 * weights. UNSUPPORTED, INPUT. */
TV_NODISCARD enum tv_err tvm_calibrated_check(const struct tvm_plan *p,
                                              size_t input,
                                              const struct tvm_trim_rule *r,
                                              struct tv_error *err);
/* Does anything in it depend on the inputs that the merged model gives? */
bool tvm_calibrated_walks(const struct tvm_plan *p);

struct tvm_text_extent { /* of a calibration text */
    size_t window;       /* tokens of one */
    bool fits;           /* into the positions of the model */
    size_t positions;
    bool fills;      /* some text has tokens for one, or all are random */
    size_t n_tokens; /* else: of all texts */
};
/* The text for a model that runs over it. Reads no weights, and makes tokens of
 * as much text as it takes. INPUT without a tokenizer. */
TV_NODISCARD enum tv_err tvm_calibrated_texts(const struct tvm_plan *p,
                                              size_t model,
                                              const struct tvm_calibration *cal,
                                              struct tvm_text_extent *out,
                                              struct tv_error *err);
/* Why it is not enough, as a sentence; NULL: it is. */
const char *tvm_text_lacks(const struct tvm_text_extent *x, char *dst,
                           size_t cap);
/* A text of it, owned. INPUT when it cannot be read or is empty, CORRUPT when
 * it is not UTF-8. */
TV_NODISCARD enum tv_err tvm_text_read(const struct tvm_calibration *cal,
                                       size_t text, struct tv_error *err,
                                       char **data, size_t *n);

/* Makes what neither the sink nor the store has, nor an interrupted run has
 * made; the sink's journal learns of it. *out NULL: nothing needed. */
TV_NODISCARD enum tv_err
tvm_calibrated_make(const struct tvm_plan *p, struct tvm_sink *sink,
                    struct tvm_cache *cache, const struct tvm_run_hooks *hooks,
                    struct tvm_calibration_use *use, struct tv_error *err,
                    struct tvm_calibrated **out);
void tvm_calibrated_free(struct tvm_calibrated *c); /* NULL allowed */
/* Gives a tensor in work its masks; INTERNAL when one is nowhere. */
TV_NODISCARD enum tv_err tvm_calibrated_attach(const struct tvm_calibrated *c,
                                               const struct tvm_plan *p,
                                               size_t tensor,
                                               struct tvm_cached *to,
                                               struct tv_error *err);
/* X^T X [n (n + 1) / 2] as tve_stat_input has it, over *n_rows tokens, for a
 * method that needs it (tvm_method::needs_gram). Borrowed until the end of the
 * run; NULL: there is none. */
const float *tvm_calibrated_gram(const struct tvm_calibrated *c, size_t tensor,
                                 size_t source, uint64_t *n_rows);
#endif
