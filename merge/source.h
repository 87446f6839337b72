/* SPDX-License-Identifier: Apache-2.0 */
/*
 * source.h - one input of one output tensor as blocks of fp32 values.
 *
 * A reader stacks what lies between the bytes of a view and a method: chunk
 * borders, dtype conversion, adapters added on the fly, and on top of these
 * rows of a vocabulary in another order (gather.h). It is opened once per
 * tensor and then read by all workers at the same time, each with scratch of
 * its own.
 */
#ifndef TVM_SOURCE_H
#define TVM_SOURCE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/adapt.h"
#include "tv/format.h"
#include "tv/kernels.h"
#include "tv/merge.h"

struct tvm_reader {
    const char *tensor; /* output name, for messages */
    const char *label;  /* input's label */
    tv_input *input;
    struct tv_view view;
    size_t elem_bytes;               /* 0: not a math dtype, copied only */
    struct tva_patch patch;          /* what adapters change */
    const struct tvm_gather *gather; /* NULL: the view's own order */
    struct tvm_reader *below;        /* [n_below] what rows come from */
    size_t n_below;
    float *pad; /* the padding row, NULL when none */
};

/* Heap bytes that opening a reader of the source takes. */
uint64_t tvm_source_bytes(const struct tvm_tensor *t, size_t source);
/* Floats of scratch that applying its adapters to a block takes. */
size_t tvm_source_l_floats(const struct tvm_tensor *t, size_t source);

/* The same of a source by itself. */
uint64_t tvm_source_bytes_of(const struct tvm_source *s);
size_t tvm_source_l_floats_of(const struct tvm_source *s);

/* Opens views, prepares adapters. With `verify` the factors of adapters are
 * checked against their leaves: CORRUPT. *out is closed by tvm_reader_close
 * whatever the result. */
TV_NODISCARD enum tv_err
tvm_reader_open(struct tvm_reader *out, const struct tvm_plan *plan,
                const struct tvm_tensor *t, size_t source,
                const struct tvk_table *k, bool verify, struct tv_error *err);
TV_NODISCARD enum tv_err
tvm_reader_open_source(struct tvm_reader *out, const struct tvm_plan *plan,
                       const struct tvm_tensor *t, const struct tvm_source *s,
                       const struct tvk_table *k, bool verify,
                       struct tv_error *err);
void tvm_reader_close(struct tvm_reader *r);

/* Elements [start, start + n), n <= TVM_BLOCK: a pointer into the view when it
 * holds them as aligned fp32, else into scratch [n]. l_scratch has
 * tvm_source_l_floats floats. *bad, if not NULL, grows by the elements that are
 * not finite. */
const float *tvm_reader_block(const struct tvm_reader *r,
                              const struct tvk_table *k, uint64_t start,
                              size_t n, float *scratch, float *l_scratch,
                              uint64_t *bad);

/* Is every block of it a run of bf16 in the view, or two? */
bool tvm_reader_is_bf16(const struct tvm_reader *r);
/* Such a block as it is, or scratch [n] with a copy. */
const void *tvm_reader_bf16(const struct tvm_reader *r, uint64_t start,
                            size_t n, void *scratch);

/* Checks the leaves of bytes [off, off + n); off is a multiple of
 * TV_LEAF_BYTES, the end one too or the tensor's. Leaves not known: TV_OK. */
TV_NODISCARD enum tv_err tvm_reader_verify(const struct tvm_reader *r,
                                           uint64_t off, uint64_t n,
                                           struct tv_error *err);
/* Are the files of all inputs the ones that were opened? What has been read
 * until now is of one state of them when this returns TV_OK; else CORRUPT names
 * the file. */
TV_NODISCARD enum tv_err tvm_inputs_unchanged(const struct tvm_plan *p,
                                              struct tv_error *err);
/* The error for leaf i that does not have the checksum it should have. */
enum tv_err tvm_reader_damaged(const struct tvm_reader *r, uint64_t leaf,
                               struct tv_error *err);
#endif
