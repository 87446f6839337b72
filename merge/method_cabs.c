/* SPDX-License-Identifier: Apache-2.0 */
/*
 * method_cabs.c - conflict-aware and balanced sparsification.
 *
 * The elements of a tensor in order form groups of m. The models take turns, in
 * the order of the recipe: of every group, each keeps its n_i largest |x_i - b|
 * among the places that no model before it has taken (equal magnitudes by
 * lowest index, zeros never). So no two models meet in a place:
 *
 *   y = b + lambda w_i (x_i - b) where model i has it, else b
 *
 * Yang et al., "CABS: Conflict-Aware and Balanced Sparsification for Enhancing
 * Model Merging", ICML 2025, arXiv 2503.01874. A shorter group at the end keeps
 * n_i in proportion, at least one. m is a power of two up to 2048, so a group
 * never lies across two blocks.
 */
#include "method.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

enum { P_WEIGHT, P_N, P_M, P_LAMBDA, N_PARAMS };

#define INF_BITS 0x7f800000u

static const struct tvm_param params[N_PARAMS] = {
    [P_WEIGHT] = {.name = "weight",
                  .scope = TVM_NON_BASE,
                  .type = TVM_FLOAT,
                  .required = true,
                  .help = "factor of this task vector"},
    [P_N] = {.name = "n",
             .scope = TVM_NON_BASE,
             .type = TVM_INT,
             .has_default = true,
             .fallback = 64.0,
             TVM_FROM(0.0),
             .help = "elements of every m that this model keeps"},
    [P_M] = {.name = "m",
             .scope = TVM_SHARED,
             .type = TVM_INT,
             .has_default = true,
             .fallback = 256.0,
             TVM_WITHIN(1.0, (double)TVM_BLOCK),
             .help = "elements of a group: a power of two up to 2048"},
    [P_LAMBDA] = {.name = "lambda",
                  .scope = TVM_SHARED,
                  .type = TVM_FLOAT,
                  .has_default = true,
                  .fallback = 1.0,
                  .help = "factor of the merged task vector"},
};

static double kept_of(const struct tvm_tensor *t, size_t source)
{
    return tvm_of(t, source, P_N, N_PARAMS);
}

static void check(const struct tvm_tensor *t, struct tvm_problems *problems)
{
    const double m = tvm_shared(t, P_M);
    bool fits = false;

    tvm_check_finite(t, problems);
    for (double p = 1.0; p <= (double)TVM_BLOCK; p *= 2.0)
        fits = fits || m == p;
    if (!fits)
        tvm_param_problem(t, P_M, SIZE_MAX, problems,
                          "m is %g: it takes a power of two up to %u", m,
                          TVM_BLOCK);
    for (size_t s = 0; fits && s < t->n_sources; s++)
        if ((int)s != t->base && kept_of(t, s) > m)
            tvm_param_problem(t, P_N, s, problems,
                              "n of model %zu is %g: it is at most m (%g)",
                              t->sources[s].position + 1, kept_of(t, s), m);
}

static int fold(const struct tvm_tensor *t)
{
    bool none = true;

    for (size_t s = 0; s < t->n_sources; s++)
        none = none && ((int)s == t->base || kept_of(t, s) == 0.0 ||
                        tvm_of(t, s, P_WEIGHT, N_PARAMS) == 0.0);
    return t->base >= 0 && (none || tvm_shared(t, P_LAMBDA) == 0.0) ? t->base
                                                                    : -1;
}

/* Bits of |fp32(x - b)|, ordered like the numbers (tv/kernels.h). */
static uint32_t magnitude(float x, float b)
{
    const float d = x - b;
    uint32_t u = 0;

    memcpy(&u, &d, sizeof u);
    u &= 0x7fffffffu;
    return u > INF_BITS ? INF_BITS + 1u : u;
}

static size_t count_from(const uint32_t *m, size_t n, uint32_t least)
{
    size_t count = 0;

    for (size_t i = 0; i < n; i++)
        count += m[i] >= least;
    return count;
}

/* The k-th largest of m [n], 1 <= k <= n: its bits from the top down, each set
 * when there are k that large. */
static uint32_t kth_largest(const uint32_t *m, size_t n, size_t k)
{
    uint32_t v = 0;

    for (uint32_t bit = UINT32_C(1) << 30; bit != 0; bit >>= 1)
        if (count_from(m, n, v | bit) >= k)
            v |= bit;
    return v;
}

/* Gives the places that donor keeps its number. taken [n]: 0 is free. */
static void take(const float *x, const float *b, unsigned char *taken,
                 unsigned char donor, size_t n, size_t k)
{
    uint32_t m[TVM_BLOCK];

    for (size_t i = 0; i < n; i++)
        m[i] = taken[i] != 0 ? 0 : magnitude(x[i], b[i]);
    if (k == 0)
        return;
    const uint32_t least = kth_largest(m, n, k);
    size_t equal = k - count_from(m, n, least + 1);
    for (size_t i = 0; i < n; i++) {
        bool keep = m[i] > least;
        if (m[i] == least && equal > 0) {
            keep = true;
            equal--;
        }
        if (keep && m[i] != 0)
            taken[i] = donor;
    }
}

static size_t share(double n, double m, size_t len)
{
    if ((double)len == m)
        return (size_t)n;
    const size_t k = (size_t)(n * (double)len / m);
    return k == 0 && n > 0.0 ? 1 : k;
}

static void combine(struct tvm_job *job, struct tvm_tile *tile,
                    const float *const *x, float *dst, size_t n)
{
    const struct tvm_tensor *t = job->tensor;
    const float *base = x[t->base];
    const double m = tvm_shared(t, P_M);
    const double lambda = tvm_shared(t, P_LAMBDA);
    const float *donors[TVK_DONORS_MAX];
    double coef[TVK_DONORS_MAX];
    double kept[TVK_DONORS_MAX];
    unsigned char taken[TVM_BLOCK] = {0}; /* by donor 1, 2, ... */
    size_t k = 0;

    (void)tile;
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        donors[k] = x[s];
        coef[k] = tvm_of(t, s, P_WEIGHT, N_PARAMS);
        kept[k++] = kept_of(t, s);
    }
    for (size_t at = 0; at < n; at += (size_t)m) {
        const size_t len = n - at < (size_t)m ? n - at : (size_t)m;
        for (size_t j = 0; j < k; j++)
            take(donors[j] + at, base + at, taken + at, (unsigned char)(j + 1),
                 len, share(kept[j], m, len));
    }
    for (size_t i = 0; i < n; i++) {
        const size_t j = taken[i];
        const double d =
            j == 0 ? 0.0
                   : coef[j - 1] *
                         ((double)donors[j - 1][i] - (double)base[i]) * lambda;
        dst[i] = d != 0.0 ? (float)((double)base[i] + d) : base[i];
    }
}

_Static_assert(TVK_DONORS_MAX < 256, "a donor's number fits into a byte");

const struct tvm_method tvm_method_cabs = {
    .name = "cabs",
    .summary = "models take the n largest of every m places in turn",
    .paper = "CABS, Yang et al. 2025, arXiv 2503.01874",
    .base = TVM_BASE_REQUIRED,
    .min_donors = 0,
    .max_donors = TVK_DONORS_MAX,
    .params = params,
    .n_params = N_PARAMS,
    .check = check,
    .fold = fold,
    .combine = combine,
};
