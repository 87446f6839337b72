/* SPDX-License-Identifier: Apache-2.0 */
/*
 * compat.c - rounding as torch rounds.
 */
#include "compat.h"

#include <string.h>

void tvm_compat_round(const struct tvk_table *k, enum tv_dtype dtype, float *x,
                      size_t n)
{
    uint16_t narrow[TVM_BLOCK];

    if (dtype == TV_F32)
        return;
    tvk_from_f32(k, dtype, narrow, x, n);
    tvk_to_f32(k, dtype, x, narrow, n);
}

float tvm_compat_round1(const struct tvk_table *k, enum tv_dtype dtype,
                        double v)
{
    float f = (float)v;
    tvm_compat_round(k, dtype, &f, 1);
    return f;
}

const float *tvm_compat_input(const struct tvk_table *k,
                              const struct tvm_tensor *t, size_t source,
                              const float *x, float *scratch, size_t n)
{
    const struct tvm_source *const s = &t->sources[source];
    const bool adapted = s->n_adapters > 0;

    if (!adapted && (t->compute == TV_F32 ||
                     (t->compute == s->tensor->dtype && s->gather == NULL)))
        return x;
    if (x != scratch)
        memcpy(scratch, x, n * sizeof *scratch);
    if (adapted)
        tvm_compat_round(k,
                         t->lora_dtype != TV_DTYPE_NONE ? t->lora_dtype
                                                        : s->tensor->dtype,
                         scratch, n);
    tvm_compat_round(k, t->compute, scratch, n);
    return scratch;
}

float tvm_compat_sum(const float *v, size_t n)
{
    float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    const size_t whole = n / 4 * 4;

    for (size_t i = 0; i < whole; i++)
        part[i % 4] += v[i];
    for (size_t i = whole; i < n; i++)
        part[0] += v[i];
    for (size_t i = 1; i < 4; i++)
        part[0] += part[i];
    return part[0];
}
