/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rng.h - repeatable random numbers for tests (splitmix64).
 *
 * The seed is a constant unless TV_TEST_SEED gives another (a number, or
 * "random"). When a test program that used it ends with a failure, the seed is
 * printed with the way to repeat the run. Not thread-safe per struct rng.
 *
 * Paper: Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
 * OOPSLA 2014.
 */
#ifndef RNG_H
#define RNG_H

#include <stddef.h>
#include <stdint.h>

struct rng {
    uint64_t state;
};

/* The seed of this program run. */
uint64_t rng_seed(void);
/* A stream of its own for each number. */
void rng_open(struct rng *r, uint64_t stream);
uint64_t rng_u64(struct rng *r);
uint32_t rng_u32(struct rng *r);
/* Uniform in [0, n); n > 0. */
uint64_t rng_below(struct rng *r, uint64_t n);
/* Uniform in [-1, 1). */
float rng_unit(struct rng *r);
/* About normal(0, 1), the shape that weights have. */
float rng_normal(struct rng *r);
/* Any bit pattern: subnormals, infinities and NaNs are all likely. */
float rng_any_f32(struct rng *r);
void rng_bytes(struct rng *r, void *dst, size_t n_bytes);

#endif
