/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/cuda_eval.h - what a forward pass does between its products, on a CUDA
 * device: norms, activations, rotation, attention, losses.
 *
 * Everything lies in device memory and happens in the order of the handle's
 * stream (tv/cuda_math.h); calls return at once. Matrices are row-major fp32,
 * strides (ld) count floats. exp is eval/'s own, sums are fp64 in a fixed
 * order; products are cuBLAS's. Results depend on the shapes of a call alone.
 * Errors are tv/cuda.h's.
 */
#ifndef TV_CUDA_EVAL_H
#define TV_CUDA_EVAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/cuda_math.h"

enum tvk_cuda_norm_type { TVK_NORM_RMS, TVK_NORM_PLUS_ONE, TVK_NORM_LAYER };
enum tvk_cuda_act_type {
    TVK_ACT_SILU,
    TVK_ACT_GELU,
    TVK_ACT_GELU_TANH,
    TVK_ACT_RELU,
    TVK_ACT_QUICK_GELU
};

/* Each of `parts` stretches of a row, n elements every `step`, by itself. */
struct tvk_cuda_norm {
    enum tvk_cuda_norm_type type;
    float eps;
    tvk_cuda_ptr x, dst; /* may be the same */
    size_t ldx, ld, rows;
    size_t parts, step, n;
    tvk_cuda_ptr w, b; /* [n], 0: none */
};
TV_NODISCARD enum tv_err tvk_cuda_norm_rows(tvk_cuda_math *m,
                                            const struct tvk_cuda_norm *a,
                                            struct tv_error *err);

struct tvk_cuda_rows {
    tvk_cuda_ptr dst, src;
    size_t rows, n, ld, lds; /* lds 0: one row for all */
};
/* dst += src; dst = src. */
TV_NODISCARD enum tv_err tvk_cuda_add_rows(tvk_cuda_math *m,
                                           const struct tvk_cuda_rows *a,
                                           struct tv_error *err);
TV_NODISCARD enum tv_err tvk_cuda_copy_rows(tvk_cuda_math *m,
                                            const struct tvk_cuda_rows *a,
                                            struct tv_error *err);
/* Row r of dst is, or with `add` grows by, row index[r] (32 bits) of src. */
TV_NODISCARD enum tv_err tvk_cuda_take_rows(tvk_cuda_math *m,
                                            const struct tvk_cuda_rows *a,
                                            tvk_cuda_ptr index, bool add,
                                            struct tv_error *err);

/* dst [rows, n] = scale * row index[r] of a table as it is stored. */
enum tvk_cuda_lookup_type { TVK_LOOKUP_F32, TVK_LOOKUP_BF16, TVK_LOOKUP_F16 };
struct tvk_cuda_lookup {
    tvk_cuda_ptr dst, table, index; /* index: 32 bits */
    enum tvk_cuda_lookup_type type;
    size_t rows, n;
    float scale;
};
TV_NODISCARD enum tv_err tvk_cuda_look_up(tvk_cuda_math *m,
                                          const struct tvk_cuda_lookup *a,
                                          struct tv_error *err);

/* x [rows, n] = act(x); times gate_by of the same stride, unless 0. */
TV_NODISCARD enum tv_err tvk_cuda_act_rows(tvk_cuda_math *m,
                                           enum tvk_cuda_act_type act,
                                           tvk_cuda_ptr x, tvk_cuda_ptr gate_by,
                                           size_t rows, size_t n, size_t ld,
                                           struct tv_error *err);

/* Rotates the first 2 half dimensions of heads that begin every `step`. */
struct tvk_cuda_rotate {
    tvk_cuda_ptr x;
    size_t rows, ld, n_heads, step, half;
    tvk_cuda_ptr position;     /* [rows], 32 bits */
    tvk_cuda_ptr cosine, sine; /* [positions, half] */
};
TV_NODISCARD enum tv_err tvk_cuda_rotate_rows(tvk_cuda_math *m,
                                              const struct tvk_cuda_rotate *a,
                                              struct tv_error *err);

/* Causal attention of n_windows windows of `length` rows each, one behind the
 * other. Scores are made for blocks of queries and as many heads as there is
 * room for, which depends on that shape alone. */
struct tvk_cuda_attention {
    tvk_cuda_ptr qkv, out; /* at the first window's first row */
    size_t ld, ld_out, n_windows, length;
    size_t n_heads, n_kv, head_dim;
    size_t window; /* keys that a query sees; 0: all before it */
    size_t q0, q_step, k0, k_step, v0, v_step; /* floats inside a row */
    float scale, cap;                          /* cap 0: none */
    tvk_cuda_ptr slopes;                       /* [n_heads], 0: no ALiBi */
    tvk_cuda_ptr work;                         /* tvk_cuda_attention_bytes */
};
/* For n_windows * length rows; never less for longer windows or more rows. */
size_t tvk_cuda_attention_bytes(size_t length, size_t rows, size_t n_heads);
TV_NODISCARD enum tv_err tvk_cuda_attend(tvk_cuda_math *m,
                                         const struct tvk_cuda_attention *a,
                                         struct tv_error *err);

/* sums [n] fp64 += squares of x [rows, n], row by row: eval/'s bits. */
TV_NODISCARD enum tv_err tvk_cuda_add_squares(tvk_cuda_math *m,
                                              tvk_cuda_ptr sums, tvk_cuda_ptr x,
                                              size_t ld, size_t rows, size_t n,
                                              struct tv_error *err);

/* Of a row of logits, over the tiles seen so far: the loss is max + log(sum) -
 * target. */
struct tvk_cuda_loss {
    double sum;
    float max, target;
};
struct tvk_cuda_losses {
    tvk_cuda_ptr logits;  /* [rows, n], stride ld; capped in place */
    tvk_cuda_ptr losses;  /* [rows] of struct tvk_cuda_loss */
    tvk_cuda_ptr targets; /* [rows] ids, 32 bits */
    size_t rows, n, ld;
    size_t from; /* id of column 0; tiles come in order, from 0 */
    float cap;   /* 0: none */
};
TV_NODISCARD enum tv_err tvk_cuda_add_losses(tvk_cuda_math *m,
                                             const struct tvk_cuda_losses *a,
                                             struct tv_error *err);

#endif
