/* SPDX-License-Identifier: Apache-2.0 */
/*
 * quantized.c - does a checkpoint store its weights quantised?
 *
 * Then its tensors are codes, scales and zero points in place of weights, and
 * arithmetic on them gives nonsense, even where a dtype would allow it (the
 * scales are ordinary floats). config.json says so under
 * "quantization_config"; checkpoints that lost it, or single files, still show
 * it by the names of what stands beside the codes. And the key stays behind
 * when a model is dequantised and saved, as after QLoRA: where no name shows it
 * and every tensor is of floats, the weights are weights.
 */
#include <string.h>

#include <jansson.h>

#include "family.h"

enum place { ENDS, HOLDS };

/* What only quantised checkpoints have in a name, and who writes it. */
static const struct {
    enum place place;
    const char *text;
    const char *method;
} marks[] = {
    {ENDS, "_scale_inv", "fp8"}, /* blocks of DeepSeek-V3, and packed experts */
    {ENDS, ".weight_scale", "fp8 or int8"},
    {ENDS, ".weight_scale_2", "modelopt"},
    {ENDS, ".weight_packed", "compressed-tensors"},
    {ENDS, ".weight_zero_point", "compressed-tensors"},
    {ENDS, ".weight_global_scale", "compressed-tensors"},
    {ENDS, "_proj_blocks", "mxfp4"}, /* gpt-oss */
    {ENDS, "_proj_scales", "mxfp4"},
    {ENDS, ".qweight", "gptq or awq"},
    {ENDS, ".qzeros", "gptq or awq"},
    {ENDS, ".SCB", "bitsandbytes"},
    {ENDS, ".weight.absmax", "bitsandbytes"},
    {ENDS, ".weight.quant_map", "bitsandbytes"},
    {HOLDS, ".quant_state.bitsandbytes__", "bitsandbytes"},
    {ENDS, ".W_q", "hqq"},
    {ENDS, ".weight._data", "quanto"},
    {ENDS, ".weight_qdata", "torchao"},
    {ENDS, ".codebooks", "aqlm"},
};

static bool is_marked(const char *name, size_t mark)
{
    const char *const text = marks[mark].text;
    const size_t n = strlen(name);
    const size_t m = strlen(text);

    if (marks[mark].place == HOLDS)
        return strstr(name, text) != NULL;
    return n > m && !strcmp(name + n - m, text);
}

/* The method that config.json names, NULL when it names none. */
static const char *method_of(const json_t *config, bool *nested)
{
    static const char *const keys[] = {"quantization_config",
                                       "compression_config"};
    static const char *const scopes[] = {NULL, "text_config"};

    for (size_t s = 0; s < 2; s++) {
        const json_t *const o =
            scopes[s] ? json_object_get(config, scopes[s]) : config;
        for (size_t k = 0; k < 2; k++) {
            const json_t *const q = json_object_get(o, keys[k]);
            const char *const method =
                json_string_value(json_object_get(q, "quant_method"));
            if (json_object_size(q) == 0)
                continue;
            *nested = s > 0;
            if (method)
                return method;
            /* bitsandbytes wrote no method at first, and says what it does
             * not do as well. */
            const json_t *const four = json_object_get(q, "load_in_4bit");
            const json_t *const eight = json_object_get(q, "load_in_8bit");
            if (json_is_true(four) || json_is_true(eight))
                return "bitsandbytes";
            if (!four && !eight)
                return "an unnamed method";
        }
    }
    return NULL;
}

static bool all_floats(const struct tv_arch_name *names, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (!tv_dtype_is_math(names[i].dtype))
            return false;
    }
    return true;
}

const char *tv_quantized_by(const struct tv_config *c,
                            const struct tv_arch_name *names, size_t n,
                            size_t *at, bool *before)
{
    bool nested = false;
    const char *const said = c->present ? method_of(c->root, &nested) : NULL;

    *at = SIZE_MAX;
    *before = false;
    for (size_t i = 0; i < n; i++) {
        for (size_t m = 0; m < sizeof(marks) / sizeof(marks[0]); m++) {
            if (!is_marked(names[i].name, m))
                continue;
            *at = i;
            return said ? said : marks[m].method;
        }
    }
    if (!said || nested || n == 0 || !all_floats(names, n))
        return said;
    /* BitNet's forward pass rounds weights that are stored as floats: the key
     * says so, and stays. */
    *before = strcmp(said, "bitnet") != 0;
    return NULL;
}

enum tv_err tv_arch_check_plain(const struct tv_arch *a, const char *label,
                                struct tv_error *err)
{
    if (!a->quantized)
        return TV_OK;
    if (a->quantized_at == SIZE_MAX) {
        (void)tv_error_set(err, TV_E_INPUT,
                           "config.json of '%s' says that its weights are "
                           "quantised (%s)",
                           label, a->quantized);
        tv_error_hint(
            err, "if its tensors are weights after all, remove "
                 "\"quantization_config\" from its config.json; else take the "
                 "model as it was before");
        return TV_E_INPUT;
    }
    (void)tv_error_set(err, TV_E_INPUT,
                       "'%s' is quantised (%s, see \"%s\"): it stores codes "
                       "and scales in place of weights",
                       label, a->quantized, a->tensors[a->quantized_at].name);
    tv_error_hint(err, "take the model as it was before, or let transformers "
                       "dequantise it and save that");
    return TV_E_INPUT;
}
