/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibrated_off.c - calibrated.h in a build without the forward pass (no
 * OpenBLAS, PCRE2 or utf8proc): planning refuses what would need it.
 */
#include "calibrated.h"

enum tv_err tvm_calibrated_key(const struct tvm_plan *p,
                               const struct tvm_tensor *t, size_t source,
                               const struct tvm_trim_rule *r, struct tv_buf *to,
                               struct tv_error *err)
{
    (void)p;
    (void)source;
    (void)r;
    (void)to;
    return tv_error_set(err, TV_E_UNSUPPORTED,
                        "%s: calibration is not built in", t->name);
}

bool tvm_calibrated_walks(const struct tvm_plan *p)
{
    (void)p;
    return false;
}

bool tvm_calibrated_wanted(const struct tvm_plan *p, uint64_t *needed,
                           uint64_t *disk)
{
    (void)p;
    *needed = 0;
    *disk = 0;
    return false;
}

bool tvm_calibrated_random(const struct tvm_plan *p, const struct tvm_tensor *t,
                           size_t source, const struct tvm_trim_rule *r)
{
    (void)p;
    (void)t;
    (void)source;
    (void)r;
    return false;
}

enum tv_err tvm_calibrated_scratch(const struct tvm_plan *p, uint64_t *bytes,
                                   uint64_t *heap, struct tv_error *err)
{
    *heap = 0;
    (void)p;
    (void)err;
    *bytes = 0;
    return TV_OK;
}

size_t tvm_calibration_owner(const struct tvm_plan *p,
                             const struct tvm_tensor *t, size_t source,
                             const struct tvm_trim_rule *r, size_t *model)
{
    (void)r;
    *model = t->sources[source].input;
    return p->n_inputs;
}

enum tv_err tvm_calibrated_check(const struct tvm_plan *p, size_t input,
                                 const struct tvm_trim_rule *r,
                                 struct tv_error *err)
{
    (void)p;
    (void)input;
    (void)r;
    return tv_error_set(err, TV_E_UNSUPPORTED,
                        "calibration is not built in: it needs OpenBLAS, PCRE2 "
                        "and utf8proc");
}

enum tv_err tvm_calibrated_texts(const struct tvm_plan *p, size_t model,
                                 const struct tvm_calibration *cal,
                                 struct tvm_text_extent *out,
                                 struct tv_error *err)
{
    (void)cal;
    *out = (struct tvm_text_extent){0};
    return tvm_calibrated_check(p, model, NULL, err);
}

enum tv_err tvm_calibrated_make(const struct tvm_plan *p, struct tvm_sink *sink,
                                struct tvm_cache *cache,
                                const struct tvm_run_hooks *hooks,
                                struct tvm_calibration_use *use,
                                struct tv_error *err,
                                struct tvm_calibrated **out)
{
    (void)p;
    (void)sink;
    (void)cache;
    (void)hooks;
    (void)use;
    (void)err;
    *out = NULL;
    return TV_OK;
}

void tvm_calibrated_free(struct tvm_calibrated *c)
{
    (void)c;
}

enum tv_err tvm_calibrated_attach(const struct tvm_calibrated *c,
                                  const struct tvm_plan *p, size_t tensor,
                                  struct tvm_cached *to, struct tv_error *err)
{
    (void)c;
    (void)p;
    (void)tensor;
    (void)to;
    (void)err;
    return TV_OK;
}

enum tv_err tvm_layers(const struct tvm_plan *p,
                       const struct tvm_layers_options *o,
                       const struct tvm_run_hooks *hooks, tvm_layer_fn fn,
                       void *arg, struct tv_error *err)
{
    (void)p;
    (void)o;
    (void)hooks;
    (void)fn;
    (void)arg;
    return tv_error_set(err, TV_E_UNSUPPORTED,
                        "calibration is not built in: it needs OpenBLAS, PCRE2 "
                        "and utf8proc");
}

const float *tvm_calibrated_gram(const struct tvm_calibrated *c, size_t tensor,
                                 size_t source, uint64_t *n_rows)
{
    (void)c;
    (void)tensor;
    (void)source;
    *n_rows = 0;
    return NULL;
}
