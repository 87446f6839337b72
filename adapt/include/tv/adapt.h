/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/adapt.h - adapters applied to weights that are being read.
 *
 * A patch is what one base tensor gets from the adapters of a reference: opened
 * once, then applied to any range of elements by any number of threads. Nothing
 * of the size of the tensor is ever formed. With base values W and the changes
 * of adapter i giving C_i(W) alone, the result is
 *
 *     W + sum over i of weight_i (C_i(W) - W)
 *
 * so several adapters add up as task vectors do, also those that are no sums
 * (DoRA, replaced values), and their order matters only for rounding.
 *
 * Numerics: low-rank sums as tvk_table::lowrank_add; DoRA's norms are taken in
 * fp64 over fp32 values of W + s B A in index order; every step rounds to fp32
 * once. Same bits for any split of the ranges, threads and instruction set.
 */
#ifndef TV_ADAPT_H
#define TV_ADAPT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/error.h"
#include "tv/format.h"
#include "tv/kernels.h"
#include "tv/view.h"

/* Most elements of one call of tva_patch_apply. */
#define TVA_BLOCK 2048u

struct tva_term; /* one change, opened */

struct tva_patch { /* zeroed: none; tva_patch_close */
    struct tva_term *terms;
    size_t n;
    bool sums_only; /* nothing but low-rank sums and added biases */
};

/* Elements [start, start + n) of a view of a math dtype as fp32. Returns how
 * many are not finite. */
uint64_t tva_view_f32(const struct tvk_table *k, const struct tv_view *v,
                      uint64_t start, uint64_t n, float *dst);

/* Heap bytes that opening takes at most, and floats of scratch that applying
 * needs. */
uint64_t tva_patch_bytes(const struct tv_adapter_use *uses, size_t n,
                         const struct tv_input_tensor *base);
size_t tva_patch_floats(const struct tv_adapter_use *uses, size_t n,
                        const struct tv_input_tensor *base);
/* Opens the changes `uses` [n] (kept; those of one adapter side by side) of the
 * tensor `base`, whose values `view` shows: read now, when norms are needed,
 * and not kept. With `verify` the adapters' tensors are checked against their
 * leaves: CORRUPT. *out is closed by tva_patch_close whatever the result. */
TV_NODISCARD enum tv_err
tva_patch_open(struct tva_patch *out, const struct tv_adapter_use *uses,
               size_t n, const struct tv_input_tensor *base,
               const struct tv_view *view, const struct tvk_table *k,
               bool verify, struct tv_error *err);
void tva_patch_close(struct tva_patch *p);
/* y [n]: elements [start, start + n) of the base; gets what they become. n is
 * at most TVA_BLOCK; scratch as tva_patch_floats says. */
void tva_patch_apply(const struct tva_patch *p, const struct tvk_table *k,
                     uint64_t start, size_t n, float *y, float *scratch);

/* Frobenius norm of what a change adds (LoRA, biases of lora_B), from Gram
 * matrices of its factors. *known false: DoRA and replaced values, which the
 * base decides. */
TV_NODISCARD enum tv_err tva_change_norm(const struct tv_adapter_module *m,
                                         tv_input *from,
                                         const struct tvk_table *k, bool *known,
                                         double *norm, struct tv_error *err);

/* Are all factors and magnitudes finite? Else CORRUPT names the tensor. */
TV_NODISCARD enum tv_err tva_adapter_check(const tv_adapter *a,
                                           const struct tvk_table *k,
                                           struct tv_error *err);
#endif
