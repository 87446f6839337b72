/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/cuda_math.h - matrices on a CUDA device: products, the Gram matrix of a
 * layer's inputs, and what tv/layer.h does with it.
 *
 * cuBLAS and cuSOLVER are loaded when a handle is first opened, as the
 * driver is. Arithmetic is fp32 as the CPU's, never TF32; sums have another
 * order, so results differ from the CPU's within rounding. They depend on the
 * shapes, the GPU and the libraries, and on how much device memory there is
 * only as tvk_cuda_layer_factors says. So far all of this has run on emulations
 * only (tests/support/fake_cuda.c, fake_cublas.c), not on a GPU.
 *
 * Matrices are row-major fp32 as in tv/layer.h. A device has one handle, which
 * belongs to one thread at a time; everything happens in the order of its
 * stream. Errors are
 * tv/cuda.h's: BUDGET when device memory does not suffice, else the device is
 * lost (IO).
 */
#ifndef TV_CUDA_MATH_H
#define TV_CUDA_MATH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/cuda.h"
#include "tv/error.h"
#include "tv/layer.h"

typedef struct tvk_cuda_math tvk_cuda_math;

/* TV_OK when the libraries are there; else UNSUPPORTED with the reason. */
TV_NODISCARD enum tv_err tvk_cuda_math_find(struct tv_error *err);
/* The device's, made by the first call; borrowed until tvk_cuda_close. */
TV_NODISCARD enum tv_err tvk_cuda_math_of(tvk_cuda *d, struct tv_error *err,
                                          tvk_cuda_math **out);
tvk_cuda *tvk_cuda_math_device(const tvk_cuda_math *m);
/* Borrowed: of products and kernels; of uploads beside them. */
tvk_cuda_stream *tvk_cuda_math_stream(const tvk_cuda_math *m);
tvk_cuda_stream *tvk_cuda_math_copies(const tvk_cuda_math *m);
/* Waits for both, whatever their state: before memory that they use goes. */
void tvk_cuda_math_settle(tvk_cuda_math *m);
/* What results depend on: the GPU's name, and from Hopper on whether
 * factor_bytes are 512 MiB. Filled, returns dst. */
const char *tvk_cuda_math_core(const tvk_cuda *d, char *dst, size_t cap);

/* Small problems with known answers: products, a factor, the loop, attention,
 * losses. UNSUPPORTED, with what was wrong, when the device is not to be
 * relied on; else errors of the work. Makes the handle. */
TV_NODISCARD enum tv_err tvk_cuda_check(tvk_cuda *d, struct tv_error *err);

/* c [m, n] = alpha op(a) op(b) + beta c; op(a) [m, k], op(b) [k, n]. */
struct tvk_cuda_gemm {
    bool trans_a, trans_b;
    size_t m, n, k;
    float alpha, beta;
    tvk_cuda_ptr a, b, c;
    size_t lda, ldb, ldc;
};
TV_NODISCARD enum tv_err tvk_cuda_gemm(tvk_cuda_math *m,
                                       const struct tvk_cuda_gemm *g,
                                       struct tv_error *err);

/* dst [n] fp32 = src [n] of 16 bits each: bf16, else fp16. Exact. */
TV_NODISCARD enum tv_err tvk_cuda_widen(tvk_cuda_math *m, bool bf16,
                                        tvk_cuda_ptr dst, tvk_cuda_ptr src,
                                        size_t n, struct tv_error *err);

/* ---- the Gram matrix ----------------------------------------------------- */

/* Rows of x that are summed in fp32 before they join the fp64 sums; rows and
 * columns of the matrix that one product makes. */
#define TVK_CUDA_GRAM_CHUNK 1024u
#define TVK_CUDA_GRAM_STRIP 1024u
#define TVK_CUDA_GRAM_COLS  2048u

/* Bytes of `work`, at most 8 MiB. */
size_t tvk_cuda_gram_work(size_t n);
/* That, and the least that sums on the host need there. */
uint64_t tvk_cuda_gram_least(size_t n);
/* Adds x^T x of x [rows, n] (on the device, row stride ldx) to sums: the packed
 * upper triangle [n (n + 1) / 2], fp64, as in tv/eval.h. `at` != 0: sums are
 * there, `sums` is not looked at, and the call returns at once (tv/cuda.h). 0:
 * they are on the host and come and go, as many rows as there is room for; same
 * bits. Chunks begin at x. */
TV_NODISCARD enum tv_err tvk_cuda_gram_add(tvk_cuda_math *m, double *sums,
                                           tvk_cuda_ptr at, tvk_cuda_ptr work,
                                           tvk_cuda_ptr x, size_t ldx,
                                           size_t rows, size_t n,
                                           struct tv_error *err);

/* ---- one layer: tv/layer.h on the device --------------------------------- */

/* T [rows, cols] and H or its factor U [cols, cols], both on the device. */
typedef struct tvk_cuda_layer tvk_cuda_layer;

/* Rows that tvk_cuda_layer_refine and _product take at a time. */
#define TVK_CUDA_CG_ROWS 512u

/* The budget with which all of a layer is there, beside what the handle takes.
 */
uint64_t tvk_cuda_layer_bytes(const tvk_cuda *d, size_t rows, size_t cols);
/* Is the factor of such a layer made on the device? Where the budget (or
 * factor_bytes of its options) does not suffice for that (12 cols^2 bytes and
 * some), the host makes it and H and U come in panels of 2,048 rows: less
 * exactly the same numbers, and the only way in which results depend on the
 * budget. */
bool tvk_cuda_layer_factors(const tvk_cuda *d, size_t rows, size_t cols);
/* The least budget with which a layer can be worked on: T, too, is then on the
 * host but for 512 columns of it and a tile of 512 rows. */
uint64_t tvk_cuda_layer_least(const tvk_cuda *d, size_t rows, size_t cols);
/* Host memory that is pinned for panels and tiles, at most. */
size_t tvk_cuda_layer_staging(size_t cols);

/* T stays on the host in as far as there is no memory for it. BUDGET: not even
 * for the least. */
TV_NODISCARD enum tv_err tvk_cuda_layer_open(tvk_cuda *d, size_t rows,
                                             size_t cols, struct tv_error *err,
                                             tvk_cuda_layer **out);
void tvk_cuda_layer_close(tvk_cuda_layer *l); /* NULL allowed */
/* H and U are the host's (!tvk_cuda_layer_factors); tiles of T that the device
 * has at a time, 0: T is there as a whole. */
bool tvk_cuda_layer_on_host(const tvk_cuda_layer *l);
unsigned tvk_cuda_layer_tiles(const tvk_cuda_layer *l);

/* On the host only, instead of the two below: H with its diagonal damped, or U,
 * [cols, cols], both triangles of H, zeros below U's diagonal; borrowed until
 * the next one or close, and must not change meanwhile. */
TV_NODISCARD enum tv_err tvk_cuda_layer_square(tvk_cuda_layer *l,
                                               const float *square,
                                               struct tv_error *err);
/* H from its packed upper triangle [cols (cols + 1) / 2] with `diagonal` [cols]
 * in place of its own (NULL: its own). */
TV_NODISCARD enum tv_err tvk_cuda_layer_gram(tvk_cuda_layer *l,
                                             const float *packed,
                                             const float *diagonal,
                                             struct tv_error *err);
/* H becomes U (tvk_gram_factor), in fp64 but for rounding U itself. *definite
 * false: H was not positive definite and is of no use. u_diagonal [cols], NULL
 * allowed: U's. */
TV_NODISCARD enum tv_err tvk_cuda_layer_factor(tvk_cuda_layer *l,
                                               bool *definite,
                                               float *u_diagonal,
                                               struct tv_error *err);
/* tvk_obs_prune with U: t [rows, cols] on the host in: T, out: P. */
TV_NODISCARD enum tv_err tvk_cuda_layer_obs(tvk_cuda_layer *l, float *t,
                                            const struct tvk_obs *how,
                                            struct tv_error *err);
/* tvk_cg_rows with H on up to TVK_CUDA_CG_ROWS rows, all on the host. Entries
 * of p that are 0 are pruned. */
TV_NODISCARD enum tv_err tvk_cuda_layer_refine(tvk_cuda_layer *l, float *p,
                                               const float *t, size_t rows,
                                               unsigned n_steps,
                                               struct tv_error *err);
/* tvk_gram_product with H on up to TVK_CUDA_CG_ROWS rows, all on the host. */
TV_NODISCARD enum tv_err tvk_cuda_layer_product(tvk_cuda_layer *l,
                                                const float *t, const float *p,
                                                size_t rows, double *tt,
                                                double *tp, double *pp,
                                                struct tv_error *err);

#endif
