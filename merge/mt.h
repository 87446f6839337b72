/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mt.h - MT19937 as torch's CPU generator uses it, for --compat mergekit.
 *
 * mergekit takes every random number of a merge from one generator, in the
 * order in which it works through the tensors. Here each tensor knows from the
 * plan where its numbers begin, and finds the generator's state there: a stream
 * keeps the state at a few places, so that no tensor walks far, whatever was
 * done before, in which order and by how many threads.
 */
#ifndef TVM_MT_H
#define TVM_MT_H

#include <stddef.h>
#include <stdint.h>

#include "tv/error.h"

#define TVM_MT_WORDS 624u

struct tvm_mt {
    uint32_t word[TVM_MT_WORDS];
    uint32_t next; /* of the words, TVM_MT_WORDS: make new ones first */
};

/* Matsumoto's init_genrand. */
void tvm_mt_seed(struct tvm_mt *mt, uint32_t seed);
uint32_t tvm_mt_next(struct tvm_mt *mt);
void tvm_mt_skip(struct tvm_mt *mt, uint64_t n);
/* torch.bernoulli of n elements: bit i is set when u < p, u the low 24 bits of
 * the next number over 2^24. Clears the other bits of the words it touches. */
void tvm_mt_mask(struct tvm_mt *mt, uint64_t *mask, float p, size_t n);
/* The same with a probability for each element. */
void tvm_mt_mask_each(struct tvm_mt *mt, uint64_t *mask, const float *p,
                      size_t n);

struct tvm_mt_stream;
/* Bytes that a stream of n_draws numbers takes; 0 for none. */
uint64_t tvm_mt_stream_bytes(uint64_t n_draws);
/* Walks the stream once. NULL for n_draws == 0. */
TV_NODISCARD enum tv_err tvm_mt_stream_open(uint64_t seed, uint64_t n_draws,
                                            struct tv_error *err,
                                            struct tvm_mt_stream **out);
void tvm_mt_stream_close(struct tvm_mt_stream *s); /* NULL allowed */
/* The generator that gives number `at` (from 0) next; at <= n_draws. */
void tvm_mt_stream_seek(const struct tvm_mt_stream *s, uint64_t at,
                        struct tvm_mt *out);

#endif
