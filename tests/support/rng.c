/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rng.c - splitmix64, and the seed that a failed run shows.
 */
#include "rng.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#include "tv/checked.h"

#define DEFAULT_SEED UINT64_C(20240229)

static uint64_t mix(uint64_t z)
{
    z = (z ^ (z >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ (z >> 27)) * UINT64_C(0x94d049bb133111eb);
    return z ^ (z >> 31);
}

static void show_seed(int status, void *arg)
{
    (void)arg;
    if (status != 0)
        (void)fprintf(stderr,
                      "random seed %" PRIu64
                      "; repeat with TV_TEST_SEED=%" PRIu64 "\n",
                      rng_seed(), rng_seed());
}

uint64_t rng_seed(void)
{
    static bool known;
    static uint64_t seed;
    if (known)
        return seed;
    const char *text = getenv("TV_TEST_SEED");
    seed = DEFAULT_SEED;
    if (text && strcmp(text, "random") == 0) {
        if (getrandom(&seed, sizeof seed, 0) != (ssize_t)sizeof seed)
            seed = DEFAULT_SEED;
    } else if (text && text[0] != '\0') {
        seed = strtoull(text, NULL, 10);
    }
    known = true;
    /* on_exit and not atexit: it is told whether the program failed. */
    (void)on_exit(show_seed, NULL);
    return seed;
}

void rng_open(struct rng *r, uint64_t stream)
{
    r->state = mix(rng_seed() + UINT64_C(0x9e3779b97f4a7c15)) ^ mix(~stream);
}

uint64_t rng_u64(struct rng *r)
{
    r->state += UINT64_C(0x9e3779b97f4a7c15);
    return mix(r->state);
}

uint32_t rng_u32(struct rng *r)
{
    return (uint32_t)(rng_u64(r) >> 32);
}

uint64_t rng_below(struct rng *r, uint64_t n)
{
    /* Rejecting the first 2^64 mod n values leaves no bias. */
    const uint64_t skip = (0 - n) % n;
    uint64_t x = rng_u64(r);
    while (x < skip)
        x = rng_u64(r);
    return x % n;
}

float rng_unit(struct rng *r)
{
    const int32_t v = (int32_t)(rng_u64(r) >> 40) - (1 << 23);
    return (float)v / (float)(1 << 23);
}

float rng_normal(struct rng *r)
{
    /* Twelve uniforms in [-1/2, 1/2) have variance 1 together. */
    float sum = 0.0f;
    for (int i = 0; i < 12; i++)
        sum += 0.5f * rng_unit(r);
    return sum;
}

float rng_any_f32(struct rng *r)
{
    const uint32_t bits = rng_u32(r);
    float v = 0.0f;
    memcpy(&v, &bits, sizeof v);
    return v;
}

void rng_bytes(struct rng *r, void *dst, size_t n_bytes)
{
    unsigned char *p = dst;
    unsigned char word[8];
    while (n_bytes > 0) {
        const size_t n = n_bytes < sizeof word ? n_bytes : sizeof word;
        tv_put_le64(word, rng_u64(r));
        memcpy(p, word, n);
        p += n;
        n_bytes -= n;
    }
}
