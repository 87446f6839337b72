/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibrated_parts.h - what making masks (calibrated*.c, sequential.c) and
 * measuring them (layers.c) share: task vectors of one layer, windows of text,
 * models that run (private to these files).
 */
#ifndef TVM_CALIBRATED_PARTS_H
#define TVM_CALIBRATED_PARTS_H

#include "source.h"
#include "tv/calibrate.h"
#include "tv/eval.h"
#include "tv/merge.h"

struct tvm_layer { /* task vector of a source, read when asked for */
    const struct tvm_plan *p;
    const struct tvm_tensor *t;
    const struct tvk_table *k;
    struct tvm_reader base, donor;
    float *l_scratch, *block; /* [2][TVM_BLOCK] */
    size_t rows, cols;        /* outputs, inputs */
};

/* Outputs and inputs of a linear layer. */
void tvm_layer_shape(const struct tvm_tensor *t, size_t *rows, size_t *cols);
/* Closed by tvm_layer_close whatever the result. */
TV_NODISCARD enum tv_err tvm_layer_open(struct tvm_layer *l,
                                        const struct tvm_plan *p,
                                        const struct tvm_tensor *t,
                                        size_t source, struct tv_error *err);
void tvm_layer_close(struct tvm_layer *l);
/* fp32 differences of n stored elements from start, into dst. */
void tvm_layer_delta(const struct tvm_layer *l, uint64_t start, size_t n,
                     float *dst);
/* arg: a struct tvm_layer. Rows [row, row + n) of T [out, in] into dst. */
void tvm_layer_rows(void *arg, size_t row, size_t n, float *dst);
/* Of t, a pruned T [out, in]: the bits of what is left, in stored order, set in
 * words that are zero. */
void tvm_layer_words(const struct tvm_layer *l, const float *t,
                     uint64_t *words);
/* The donor that has these differences: values where words say so, packed in
 * stored order, and how many stand before each TV_DELTA_BLOCK. */
void tvm_layer_values(const struct tvm_layer *l, const float *t,
                      const uint64_t *words, float *values, uint64_t *before);

/* Bytes of memory that a model is given at least. */
#define TVM_MODEL_LEAST ((uint64_t)16 << 20)
/* Name for a scratch file of a run, owned: beside the output's state or in
 * TMPDIR. NULL: out of memory. */
char *tvm_scratch_path(const struct tvm_options *o, const char *what,
                       const void *unique);

/* A model of the plan with its adapters. */
TV_NODISCARD enum tv_err tvm_layer_model(const struct tvm_plan *p, size_t input,
                                         uint64_t memory, struct tv_error *err,
                                         tve_model **out);
/* Windows of a calibration text for it. */
TV_NODISCARD enum tv_err tvm_layer_samples(const struct tvm_plan *p,
                                           size_t model, const tve_model *m,
                                           const struct tvm_calibration *cal,
                                           struct tve_samples *out,
                                           struct tv_error *err);
/* Of the scratch files of a pass over that text, at most: bytes of residual
 * streams and of a batch. opt NULL: no sequence. Reads no weights. */
struct tve_scratch;
struct tve_sequence_options;
TV_NODISCARD enum tv_err
tvm_layer_scratch(const struct tvm_plan *p, size_t model,
                  const struct tvm_calibration *cal, bool gram, uint64_t memory,
                  const struct tve_sequence_options *opt, struct tv_error *err,
                  struct tve_scratch *out);
#endif
