/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fixture.c - writes small models and fills in plans by hand.
 */
#include "fixture.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rng.h"
#include "test.h"
#include "tmpdir.h"
#include "tv/alloc.h"
#include "tv/sys.h"

void fx_open(struct fx *f)
{
    memset(f, 0, sizeof *f);
    f->dir = tmpdir_make();
}

static void drop_plan(struct fx *f)
{
    tv_free((void *)(uintptr_t)f->plan.options.out_dir);
    tv_shards_free(f->plan.shards);
    tv_free(f->plan.tensors);
    tv_free(f->plan.inputs);
    tv_free(f->plan.files);
    tv_free(f->plan.identity);
    tv_free(f->sources);
    tv_free(f->entries);
    tv_free(f->values);
    tv_free(f->set);
    memset(&f->plan, 0, sizeof f->plan);
    f->sources = NULL;
    f->entries = NULL;
    f->values = NULL;
    f->set = NULL;
}

void fx_close(struct fx *f)
{
    drop_plan(f);
    for (size_t i = 0; i < f->n_models; i++) {
        tv_input_close(f->input[i]);
        tv_free(f->model[i]);
    }
    tmpdir_remove(f->dir);
}

static float value_of(size_t model, struct rng *base, struct rng *own)
{
    const float b = rng_unit(base) * 0.05f;
    return model == 0 ? b : b + rng_unit(own) * 0.002f;
}

static unsigned char *fill_tensor(size_t model, size_t tensor,
                                  const struct fx_tensor *t, uint64_t n,
                                  uint64_t bytes, fx_fill fill)
{
    const struct tvk_table *k = tvk_table_for(TVK_REF);
    unsigned char *data = tv_calloc(1, bytes + 1);
    struct rng base;
    struct rng own;

    assert_non_null(data);
    rng_open(&base, tensor);
    rng_open(&own, 1000 * (model + 1) + tensor);
    if (!tv_dtype_is_math(t->dtype)) {
        rng_bytes(&base, data, bytes);
        return data;
    }
    const size_t each = tv_dtype_bits(t->dtype) / 8u;
    for (uint64_t i = 0; i < n; i++) {
        const float v =
            fill ? fill(model, tensor, i) : value_of(model, &base, &own);
        tvk_from_f32(k, t->dtype, data + i * each, &v, 1);
    }
    return data;
}

void fx_model(struct fx *f, const struct fx_tensor *tensors, size_t n,
              fx_fill fill)
{
    struct tv_error err;
    const size_t m = f->n_models++;
    struct tv_st_entry *e = tv_calloc(n + 1, sizeof *e);
    struct tv_shards *shards = NULL;
    char name[32];

    assert_true(m < FX_MODELS_MAX);
    assert_non_null(e);
    for (size_t i = 0; i < n; i++) {
        uint64_t elems = 0;
        e[i] = (struct tv_st_entry){.name = tensors[i].name,
                                    .dtype = tensors[i].dtype,
                                    .rank = tensors[i].rank,
                                    .shape = tensors[i].shape};
        assert_ok(
            tv_shape_elems(tensors[i].shape, tensors[i].rank, &elems, &err),
            &err);
        assert_ok(tv_dtype_bytes(tensors[i].dtype, elems, &e[i].bytes, &err),
                  &err);
    }
    assert_ok(tv_shards_plan(e, n, "model", 0, &err, &shards), &err);
    unsigned char *file = tv_calloc(1, shards->file_bytes[0] + 1);
    assert_non_null(file);
    memcpy(file, shards->headers[0], shards->header_bytes[0]);
    for (size_t i = 0; i < n; i++) {
        uint64_t elems = 0;
        assert_ok(
            tv_shape_elems(tensors[i].shape, tensors[i].rank, &elems, &err),
            &err);
        unsigned char *data =
            fill_tensor(m, i, &tensors[i], elems, e[i].bytes, fill);
        memcpy(file + e[i].offset, data, e[i].bytes);
        tv_free(data);
    }
    (void)snprintf(name, sizeof name, "model%zu", m);
    f->model[m] = tv_path_join(f->dir, name);
    assert_ok(tv_dir_make(f->model[m], &err), &err);
    tv_free(tmpdir_write(f->model[m], "model.safetensors", file,
                         shards->file_bytes[0]));
    assert_ok(tv_input_open_path(f->model[m], &err, &f->input[m]), &err);
    tv_free(file);
    tv_shards_free(shards);
    tv_free(e);
}

static void set_params(struct fx *f, struct tvm_tensor *t,
                       const struct tvm_method_info *info,
                       const struct fx_param *params, size_t n_params)
{
    for (size_t p = 0; p < info->n_params; p++) {
        const struct tvm_param *def = &info->params[p];
        for (size_t s = 0; s < f->n_models; s++) {
            t->per_source[s * info->n_params + p] = def->fallback;
            t->per_source_set[s * info->n_params + p] = def->has_default;
        }
        t->shared[p] = def->fallback;
        t->shared_set[p] = def->has_default;
        for (size_t i = 0; i < n_params; i++) {
            if (strcmp(params[i].name, def->name) != 0)
                continue;
            t->shared[p] = params[i].value;
            t->shared_set[p] = true;
            for (size_t s = 0; s < f->n_models; s++)
                if (params[i].source == FX_ALL ||
                    (size_t)params[i].source == s) {
                    t->per_source[s * info->n_params + p] = params[i].value;
                    t->per_source_set[s * info->n_params + p] = true;
                }
        }
    }
}

/* A made-up identity that depends on what the caller has asked for. */
static char *identity_of(const char *method, int base,
                         const struct fx_param *params, size_t n_params,
                         enum tv_dtype dtype)
{
    char *text = tv_asprintf("{\"method\":\"%s\",\"base\":%d,\"dtype\":%d,"
                             "\"parameters\":[",
                             method, base, (int)dtype);
    for (size_t i = 0; i < n_params; i++) {
        char *more = tv_asprintf("%s%s{\"name\":\"%s.%d\",\"value\":%.17g}",
                                 text, i ? "," : "", params[i].name,
                                 params[i].source, params[i].value);
        tv_free(text);
        text = more;
    }
    char *whole = tv_asprintf("%s]}", text);
    tv_free(text);
    return whole;
}

/* "l.7.w" is of layer 7. */
static int64_t layer_of(const char *name)
{
    return strncmp(name, "l.", 2) == 0 ? strtol(name + 2, NULL, 10) : -1;
}

void fx_plan(struct fx *f, const char *method, int base,
             const struct fx_param *params, size_t n_params,
             enum tv_dtype dtype)
{
    static const struct tvm_side_file config = {"config.json", "{}\n", 3, ""};
    static const struct tvm_side_file readme = {"README.md", "# x\n", 4, ""};
    struct tv_error err;
    struct tvm_method_info info;
    const struct tvm_method *m = tvm_method_find(method);
    const size_t n = tv_input_count(f->input[0]);
    const size_t k = f->n_models;

    drop_plan(f);
    assert_non_null(m);
    tvm_method_info(m, &info);
    struct tvm_plan *p = &f->plan;
    tvm_options_init(&p->options);
    p->options.sync = false;
    p->method_name = method;
    p->architecture = "";
    p->inputs = tv_calloc(k, sizeof *p->inputs);
    p->n_inputs = k;
    for (size_t i = 0; i < k; i++)
        p->inputs[i] =
            (struct tvm_plan_input){.ref = f->model[i], .input = f->input[i]};
    p->tensors = tv_calloc(n + 1, sizeof *p->tensors);
    p->n_tensors = n;
    f->sources = tv_calloc(n * k + 1, sizeof *f->sources);
    f->entries = tv_calloc(n + 1, sizeof *f->entries);
    f->values = tv_calloc(n * k * TVM_PARAMS_MAX + 1, sizeof *f->values);
    f->set = tv_calloc(n * k * TVM_PARAMS_MAX + 1, sizeof *f->set);
    for (size_t i = 0; i < n; i++) {
        const struct tv_input_tensor *in = tv_input_tensor(f->input[0], i);
        struct tvm_tensor *t = &p->tensors[i];
        t->name = in->name;
        t->method = m;
        t->action = tv_dtype_is_math(in->dtype) ? TVM_MERGE : TVM_COPY;
        t->sources = f->sources + i * k;
        t->n_sources = k;
        t->base = base;
        t->n_models = k - (base >= 0);
        t->per_source = f->values + i * k * TVM_PARAMS_MAX;
        t->per_source_set = f->set + i * k * TVM_PARAMS_MAX;
        t->dtype = dtype != TV_DTYPE_NONE && t->action == TVM_MERGE ? dtype
                                                                    : in->dtype;
        t->rank = in->rank;
        memcpy(t->shape, in->shape, sizeof t->shape);
        t->n_elems = in->n_elems;
        t->name_hash = tv_hash64(t->name, strlen(t->name));
        t->layer = layer_of(t->name);
        assert_ok(tv_dtype_bytes(t->dtype, t->n_elems, &t->bytes, &err), &err);
        for (size_t s = 0; s < k; s++)
            t->sources[s] = (struct tvm_source){
                .input = s,
                .tensor = tv_input_find(f->input[s], t->name),
                .is_base = (int)s == base,
                .position = base >= 0 && s > (size_t)base ? s - 1 : s};
        set_params(f, t, &info, params, n_params);
        f->entries[i] = (struct tv_st_entry){.name = t->name,
                                             .dtype = t->dtype,
                                             .rank = t->rank,
                                             .shape = t->shape,
                                             .bytes = t->bytes};
        p->bytes_written += t->bytes;
    }
    assert_ok(
        tv_shards_plan(f->entries, n, "model", 3u << 20, &err, &p->shards),
        &err);
    for (size_t i = 0; i < n; i++) {
        p->tensors[i].shard = f->entries[i].shard;
        p->tensors[i].offset = f->entries[i].offset;
    }
    p->files = tv_calloc(2, sizeof *p->files);
    p->files[0] = config;
    p->files[1] = readme;
    p->n_files = 2;
    p->identity = identity_of(method, base, params, n_params, dtype);
    p->hash = tv_hash128(p->identity, strlen(p->identity));
    fx_out(f, "out");
}

void fx_out(struct fx *f, const char *name)
{
    tv_free((void *)(uintptr_t)f->plan.options.out_dir);
    f->plan.options.out_dir = tv_path_join(f->dir, name);
}

struct tv_hash fx_run(struct fx *f)
{
    struct tv_error err;
    struct tvm_result r;
    char name[32];

    (void)snprintf(name, sizeof name, "run%u", f->n_runs++);
    fx_out(f, name);
    assert_ok(tvm_run(&f->plan, NULL, &r, &err), &err);
    return r.digest;
}

float *fx_merged(struct fx *f, const char *name, uint64_t *n)
{
    (void)fx_run(f);
    return fx_read(f->plan.options.out_dir, name, n);
}

static float *values_of(tv_input *in, const char *name, uint64_t *n)
{
    struct tv_error err;
    struct tv_view v;
    const struct tv_input_tensor *t = tv_input_find(in, name);

    assert_non_null(t);
    assert_ok(tv_input_view(in, t, &err, &v), &err);
    unsigned char *raw = tv_alloc(t->bytes + 1);
    float *out = tv_alloc((t->n_elems + 1) * sizeof *out);
    if (t->bytes > 0)
        tv_view_copy(&v, 0, t->bytes, raw);
    tvk_to_f32(tvk_table_for(TVK_REF), t->dtype, out, raw, t->n_elems);
    *n = t->n_elems;
    tv_free(raw);
    tv_input_release(in, &v);
    return out;
}

float *fx_read(const char *dir, const char *name, uint64_t *n)
{
    struct tv_error err;
    tv_input *in = NULL;

    assert_ok(tv_input_open_path(dir, &err, &in), &err);
    float *out = values_of(in, name, n);
    tv_input_close(in);
    return out;
}

float *fx_values(struct fx *f, size_t model, const char *name, uint64_t *n)
{
    return values_of(f->input[model], name, n);
}
