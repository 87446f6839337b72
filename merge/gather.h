/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gather.h - the reader that puts rows of a vocabulary in another order
 * (private to merge/).
 *
 *   output row:   0 .. 63      64        65          66 .. 79
 *   comes from:   own 0..63    zero      row 7 of    mean of all
 *                                        model b     rows before
 *
 * It also puts the experts of a layer into one tensor, or takes one out of it
 * (plan_layout.c): their rows one after the other.
 *
 * It stands on the readers of source.c: adapters and dtypes of what it takes
 * rows from are theirs. A method sees rows of one vocabulary and runs
 * unchanged. Rows are kept as runs, so an almost equal vocabulary costs almost
 * nothing.
 */
#ifndef TVM_GATHER_H
#define TVM_GATHER_H

#include "source.h"

enum tvm_run_kind {
    TVM_RUN_ROWS = 0, /* row, row + 1, ... of from */
    TVM_RUN_ZERO = 1,
    TVM_RUN_MEAN = 2, /* one output row: mean of items [row, row + n_items) */
    TVM_RUN_PAD = 3   /* mean of the rows that stand for tokens */
};

struct tvm_run { /* output rows [first, first + n) */
    uint64_t first, n;
    enum tvm_run_kind kind;
    bool is_token; /* its rows stand for tokens */
    uint32_t from; /* index into tvm_gather.from */
    uint32_t n_items;
    uint64_t row;
};

struct tvm_row {
    uint32_t from;
    uint64_t row;
};

struct tvm_rows { /* shared by tensors of one vocabulary; in the plan's arena */
    struct tvm_run *runs;
    size_t n_runs;
    struct tvm_row *items; /* of means */
    size_t n_items;
    uint64_t n_rows, n_tokens; /* n_tokens: rows that stand for tokens */
    bool pads;                 /* there is a TVM_RUN_PAD */
    struct tv_hash hash;
};

struct tvm_gather {
    const struct tvm_rows *rows;
    uint64_t cols;                 /* elements of a row */
    const struct tvm_source *from; /* [n_from], none gathered itself */
    size_t n_from;
    /* The only part of from[0] that is used, of its elements; n_used 0: all of
     * every one. */
    uint64_t used_from, n_used;
};

uint64_t tvm_gather_bytes(const struct tvm_gather *g);
size_t tvm_gather_l_floats(const struct tvm_gather *g);
TV_NODISCARD enum tv_err
tvm_gather_open(struct tvm_reader *out, const struct tvm_plan *plan,
                const struct tvm_tensor *t, const struct tvm_gather *g,
                const struct tvk_table *k, bool verify, struct tv_error *err);
void tvm_gather_close(struct tvm_reader *r);
const float *tvm_gather_block(const struct tvm_reader *r,
                              const struct tvk_table *k, uint64_t start,
                              size_t n, float *scratch, float *l_scratch);
/* Checks the `tile`-th of n_tiles shares of the leaves of all that rows come
 * from (of the part that is used): every leaf is in one share. */
TV_NODISCARD enum tv_err tvm_gather_verify(const struct tvm_reader *r,
                                           uint64_t tile, uint64_t n_tiles,
                                           struct tv_error *err);

#endif
