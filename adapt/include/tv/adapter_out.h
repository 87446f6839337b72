/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/adapter_out.h - writes a directory that PEFT loads.
 *
 *   OUT/.tvmerge/             lock, and what is not finished
 *   OUT/adapter_model.safetensors, side files, tvmerge.json
 *   OUT/adapter_config.json   last: before it nothing loads the directory
 *
 * A killed run leaves .tvmerge; the next one begins again and gives the same
 * bytes (an adapter is small, so there is nothing worth continuing from). One
 * that fails leaves an OUT that was missing or empty as it was.
 *
 * Thread rule: a tva_out is used by one thread at a time.
 */
#ifndef TV_ADAPTER_OUT_H
#define TV_ADAPTER_OUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/dtype.h"
#include "tv/error.h"
#include "tv/hash.h"
#include "tv/kernels.h"

typedef struct tva_out tva_out;

struct tva_out_done { /* of a finished directory */
    bool complete;    /* it holds the result of `plan` already */
    size_t n_tensors;
    struct tv_hash digest;
};

/* INPUT when `dir`, which is to be written, is where the input `label` lies
 * (input_dir; NULL: in a store). */
TV_NODISCARD enum tv_err tva_out_apart(const char *dir, const char *input_dir,
                                       const char *label, struct tv_error *err);
/* What tva_out_open would say of the directory, and whether it can be written;
 * nothing is. */
TV_NODISCARD enum tv_err tva_out_check(const char *dir, struct tv_hash plan,
                                       bool force, struct tv_error *err);
/* Takes the directory (made when missing). `plan` is the hash of everything
 * that the bytes depend on: with a finished result of the same plan
 * done->complete is set and *out is NULL. EXISTS when the directory holds
 * something else, CHANGED when another result of ours, both but for `force`,
 * with which finishing removes what an earlier merge made and the weights of
 * other models; EXISTS in any case for what is no place of an output
 * (tv_out_dir_check); LOCKED when another process works on it. */
TV_NODISCARD enum tv_err tva_out_open(const char *dir, struct tv_hash plan,
                                      bool force, bool sync,
                                      struct tva_out_done *done,
                                      struct tv_error *err, tva_out **out);
/* Adds a tensor, values [n] in row-major order, rounded to dtype. */
TV_NODISCARD enum tv_err tva_out_tensor(tva_out *o, const struct tvk_table *k,
                                        const char *name, unsigned rank,
                                        const uint64_t *shape,
                                        enum tv_dtype dtype, const float *data,
                                        struct tv_error *err);
/* A side file; the texts are kept. */
TV_NODISCARD enum tv_err tva_out_file(tva_out *o, const char *name,
                                      const char *data, size_t n,
                                      struct tv_error *err);
/* Publishes everything, `config` [n_config] as adapter_config.json. */
TV_NODISCARD enum tv_err tva_out_finish(tva_out *o, const char *config,
                                        size_t n_config,
                                        struct tva_out_done *done,
                                        struct tv_error *err);
uint64_t tva_out_bytes(const tva_out *o); /* written, tensors only */
void tva_out_close(tva_out *o);           /* NULL allowed */
#endif
