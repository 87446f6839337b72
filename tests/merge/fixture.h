/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fixture.h - small models on disk and plans built by hand, for tests of the
 * engine that shall not depend on recipes.
 */
#ifndef MERGE_FIXTURE_H
#define MERGE_FIXTURE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/dtype.h"
#include "tv/format.h"
#include "tv/merge.h"

#define FX_MODELS_MAX 8
#define FX_ALL        (-1) /* every source, or a shared parameter */

struct fx_tensor {
    const char *name;
    enum tv_dtype dtype;
    unsigned rank;
    uint64_t shape[TV_RANK_MAX];
};

struct fx_param {
    const char *name;
    int source;
    double value;
};

struct fx { /* everything goes with fx_close */
    char *dir;
    size_t n_models;
    char *model[FX_MODELS_MAX];
    tv_input *input[FX_MODELS_MAX];
    struct tvm_plan plan;
    struct tvm_source *sources;
    struct tv_st_entry *entries;
    double *values;
    bool *set;
    unsigned n_runs;
};

void fx_open(struct fx *f);
void fx_close(struct fx *f);
/* Adds a model; values come from `fill`, or from a stream of their own when it
 * is NULL: base weights for model 0, model 0 plus small changes for others. */
typedef float (*fx_fill)(size_t model, size_t tensor, uint64_t element);
void fx_model(struct fx *f, const struct fx_tensor *tensors, size_t n,
              fx_fill fill);
/* Plans all tensors of model 0 from all models in order; base < 0: none. The
 * output dtype is `dtype`, or the input's for TV_DTYPE_NONE. Replaces an
 * earlier plan. */
void fx_plan(struct fx *f, const char *method, int base,
             const struct fx_param *params, size_t n_params,
             enum tv_dtype dtype);
/* Where the plan writes: f->dir/name, borrowed until the next call. */
void fx_out(struct fx *f, const char *name);
/* Runs the plan into a new directory; returns the digest. */
struct tv_hash fx_run(struct fx *f);
/* Runs it and reads one tensor of the result, owned (tv_free). */
float *fx_merged(struct fx *f, const char *name, uint64_t *n);
/* Tensor t of a directory as fp32, owned (tv_free). */
float *fx_read(const char *dir, const char *name, uint64_t *n);
/* The same of an input. */
float *fx_values(struct fx *f, size_t model, const char *name, uint64_t *n);

#endif
