/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_names.c - methods that a recipe can name only where adapters are
 * merged into an adapter (tv/adapters.h): what `tvmerge methods` says of them.
 */
#include <string.h>

#include "tv/adapters.h"

#define N_OF(a) (sizeof(a) / sizeof *(a))

#define WEIGHT                                                                 \
    {                                                                          \
        .name = "weight", .scope = TVM_INPUT, .type = TVM_FLOAT,               \
        .has_default = true, .fallback = 1,                                    \
        .help = "factor of the adapter's change",                              \
    }
#define RANK                                                                   \
    {                                                                          \
        .name = "rank", .scope = TVM_SHARED, .type = TVM_INT, TVM_FROM(1),     \
        .help = "beside merge_method; without it the largest of the inputs",   \
    }
#define DENSITY                                                                \
    {                                                                          \
        .name = "density", .scope = TVM_SHARED, .type = TVM_FLOAT,             \
        .required = true, TVM_FROM(0), .help = "kept part of every matrix",    \
    }

static const char *const signs[] = {"total", "frequency", NULL};
#define SIGNS                                                                  \
    {                                                                          \
        .name = "majority_sign_method", .scope = TVM_SHARED,                   \
        .type = TVM_CHOICE, .choices = signs, .has_default = true,             \
        .help = "what elects a sign: the sum, or how many",                    \
    }

static const struct tvm_param sums[] = {WEIGHT};
static const struct tvm_param ranks[] = {WEIGHT, RANK};
static const struct tvm_param prunes[] = {WEIGHT, DENSITY};
static const struct tvm_param prunes_rank[] = {WEIGHT, DENSITY, RANK};
static const struct tvm_param elects_rank[] = {WEIGHT, DENSITY, SIGNS, RANK};

static const struct tvm_adapter_method methods[] = {
    {"cat", "weighted sum of the adapters, exactly: ranks add up", false, sums,
     N_OF(sums)},
    {"svd", "the best adapter of a rank for the weighted sum", false, ranks,
     N_OF(ranks)},
    {"ties_svd", "TIES of the full deltas, then svd", true, elects_rank,
     N_OF(elects_rank)},
    {"dare_linear_svd", "sum of randomly thinned deltas, then svd", true,
     prunes_rank, N_OF(prunes_rank)},
    {"dare_ties_svd", "TIES of randomly thinned deltas, then svd", true,
     elects_rank, N_OF(elects_rank)},
    {"magnitude_prune", "sum of the largest entries of the factors", true,
     prunes, N_OF(prunes)},
    {"magnitude_prune_svd",
     "sum of the largest entries of the deltas, then svd", true, prunes_rank,
     N_OF(prunes_rank)},
};

size_t tvm_adapter_method_count(void)
{
    return N_OF(methods);
}

const struct tvm_adapter_method *tvm_adapter_method_at(size_t i)
{
    return &methods[i];
}

const struct tvm_adapter_method *tvm_adapter_method_find(const char *name)
{
    for (size_t i = 0; i < N_OF(methods); i++)
        if (strcmp(methods[i].name, name) == 0)
            return &methods[i];
    return NULL;
}
