/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/split_gemm.h - products of fp32 rows with bf16 weights on AMX tiles.
 *
 * The tiles multiply bf16 numbers and add up in fp32, 16 times as fast as
 * AVX-512 does fp32 ones. bf16 weights are exact there, and a float is the sum
 * of three bf16 numbers of 8 bits each (tvk_table::split_bf16), so
 *
 *   x W^T = x2 W^T + x1 W^T + x0 W^T        x = x0 + x1 + x2 exactly
 *
 * with products that are exact and sums rounded in fp32: three fast products
 * for a slow one, as accurate as sgemm. The products are oneDNN's, which is
 * looked for at run time (libdnnl.so.2) and needs no more than its headers to
 * be built with.
 *
 * One tile of weights [out, in] is cut into blocks [n_block, k_block], padded
 * with zeros, which oneDNN stores in an order of its own. Rows come in pieces
 * of TVK_SPLIT_ROWS or TVK_SPLIT_FEW, also padded:
 *
 *   pieces  [in / k_block] [3] [rows] [k_block]  bf16
 *   result  [rows, n_block]                      fp32
 *
 * Numerics: a result depends on its row, the weights, `in` and which of the two
 * kinds of piece the row is in. Per block of k, smallest first, each of the
 * three is summed in fp32 and added to what is there. Subnormal bf16 numbers
 * count as zero. NaN and infinity in a row come out as from sgemm; those in
 * weights do not (0 * infinity), so whoever has such calls sgemm.
 *
 * Thread rule: one split may be used by several threads, each as a worker of
 * its own. OpenMP's number of threads is set to one around the calls.
 */
#ifndef TV_SPLIT_GEMM_H
#define TV_SPLIT_GEMM_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/error.h"
#include "tv/kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TVK_SPLIT_ROWS 128u
#define TVK_SPLIT_FEW  32u

/* What does the products ("oneDNN 2.6.3 AMX"), NULL where nothing does: built
 * without, not installed, another processor. Loads the library. Results are the
 * same bytes where this is the same text. */
const char *tvk_split_core(void);
/* The same for a row of kernels, NULL for the best: nothing below TVK_AMX. */
const char *tvk_split_core_of(const struct tvk_table *k);

struct tvk_split_shape {
    size_t in, out;          /* of a tile of weights */
    size_t k_block, n_block; /* multiples of 64 */
    size_t n_k, n_n;         /* blocks */
};
struct tvk_split_shape tvk_split_shape(size_t in, size_t out);
/* Bytes of tvk_split_rows's result. */
size_t tvk_split_row_bytes(const struct tvk_split_shape *s, size_t rows);
/* Bytes that a worker needs. */
size_t tvk_split_work_bytes(const struct tvk_split_shape *s);

typedef struct tvk_split tvk_split;
/* For tiles up to `out`; UNSUPPORTED when there is no core or it has no product
 * of this shape on AMX, which depends on the shape alone. */
TV_NODISCARD enum tv_err tvk_split_open(size_t in, size_t out,
                                        unsigned n_workers,
                                        struct tv_error *err,
                                        tvk_split **out_s);
void tvk_split_close(tvk_split *s); /* NULL allowed */
const struct tvk_split_shape *tvk_split_shape_of(const tvk_split *s);

/* x [n, ldx] -> pieces of `rows` rows (one of the two constants, n at most
 * that), aligned to 64. Any thread, without a worker's number. */
void tvk_split_rows(const struct tvk_split_shape *s, const struct tvk_table *k,
                    const float *x, size_t ldx, size_t n, size_t rows,
                    uint16_t *pieces);

/* work: the worker's own, tvk_split_work_bytes, aligned to 64.
 * To set up a tile: for every block fill stage [n_block, k_block], zeros where
 * there are no weights, and take it. */
uint16_t *tvk_split_stage(const tvk_split *s, void *work);
/* *finite becomes false when the block has a NaN or an infinity, and is left
 * alone otherwise. False: oneDNN failed, out of memory. */
TV_NODISCARD bool tvk_split_take(tvk_split *s, unsigned worker, void *work,
                                 size_t n, size_t k, bool *finite);
/* Rows times the weights of block column n; the result lies in work until the
 * next call. NULL: as above. */
const float *tvk_split_product(tvk_split *s, unsigned worker, void *work,
                               const uint16_t *pieces, size_t rows, size_t n);

#ifdef __cplusplus
}
#endif
#endif
