/* SPDX-License-Identifier: Apache-2.0 */
/*
 * rope.c - rotary position embeddings (Su et al., arXiv 2104.09864) and the
 * ways to stretch them: position interpolation (linear, arXiv 2306.15595),
 * NTK-aware (dynamic), YaRN (arXiv 2309.00071), Llama 3.1's, LongRoPE
 * (arXiv 2402.13753). Formulas as transformers evaluates them, since models are
 * trained with that.
 *
 * Settings come from "rope_parameters" (transformers 5) or "rope_theta" and
 * "rope_scaling" (4), and from older names of some families.
 */
#include <math.h>
#include <string.h>

#include "tv/alloc.h"

#include "decoder.h"

#define TWO_PI 6.283185307179586

/* First number under one of the keys of a or b; else `otherwise`. */
static double number(const json_t *a, const json_t *b, const char *key,
                     double otherwise)
{
    const json_t *v = json_object_get(a, key);

    if (!json_is_number(v))
        v = json_object_get(b, key);
    return json_is_number(v) ? json_number_value(v) : otherwise;
}

static enum tv_err bad(struct tv_error *err, const char *what)
{
    return tv_error_set(err, TV_E_CORRUPT, "config.json: rope: %s", what);
}

static enum tv_err load_factors(const json_t *list, size_t n, double **out,
                                struct tv_error *err)
{
    if (!json_is_array(list) || json_array_size(list) != n)
        return bad(err, "long_factor and short_factor need one number per "
                        "rotated pair");
    *out = tv_calloc(n, sizeof(**out));
    if (!*out)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t i = 0; i < n; i++) {
        (*out)[i] = json_number_value(json_array_get(list, i));
        if (!((*out)[i] > 0))
            return bad(err, "a factor is not positive");
    }
    return TV_OK;
}

static double yarn_mscale(double factor, double m)
{
    return factor <= 1 ? 1 : 0.1 * m * log(factor) + 1;
}

static enum tv_err load_scaling(const json_t *config, const json_t *p,
                                const char *type, struct tve_rope *r,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const double given = number(p, NULL, "attention_factor", 0);

    r->factor = number(p, NULL, "factor", 0);
    r->original = number(p, config, "original_max_position_embeddings", 0);
    if (!strcmp(type, "linear") || !strcmp(type, "dynamic")) {
        r->type = type[0] == 'l' ? TVE_ROPE_LINEAR : TVE_ROPE_DYNAMIC;
        r->original = r->max_positions;
    } else if (!strcmp(type, "llama3")) {
        r->type = TVE_ROPE_LLAMA3;
        r->low = number(p, NULL, "low_freq_factor", 1);
        r->high = number(p, NULL, "high_freq_factor", 4);
        if (!(r->high > r->low) || !(r->low > 0) || !(r->original > 0))
            rc = bad(err, "impossible llama3 parameters");
    } else if (!strcmp(type, "yarn")) {
        const double m = number(p, NULL, "mscale", 0);
        const double m_all = number(p, NULL, "mscale_all_dim", 0);

        r->type = TVE_ROPE_YARN;
        if (!(r->original > 0))
            r->original = r->max_positions;
        if (!(r->factor > 0) && r->original > 0)
            r->factor = r->max_positions / r->original;
        r->beta_fast = number(p, NULL, "beta_fast", 32);
        r->beta_slow = number(p, NULL, "beta_slow", 1);
        r->truncate = !json_is_false(json_object_get(p, "truncate"));
        if (given > 0)
            r->scale = given;
        else if (m != 0 && m_all != 0)
            r->scale =
                yarn_mscale(r->factor, m) / yarn_mscale(r->factor, m_all);
        else
            r->scale = yarn_mscale(r->factor, 1);
        if (!(r->original > 0))
            rc = bad(err, "yarn needs the original number of positions");
    } else if (!strcmp(type, "longrope") || !strcmp(type, "su")) {
        r->type = TVE_ROPE_LONG;
        TV_TRY(load_factors(json_object_get(p, "long_factor"), tve_rope_half(r),
                            &r->long_factors, err));
        TV_TRY(load_factors(json_object_get(p, "short_factor"),
                            tve_rope_half(r), &r->short_factors, err));
        if (!(r->original > 0))
            r->original = r->max_positions;
        if (!(r->factor > 0))
            r->factor = r->original > 0 ? r->max_positions / r->original : 1;
        if (!(r->factor > 0))
            r->factor = 1;
        r->scale = given;
        if (!(given > 0))
            r->scale = r->factor <= 1
                           ? 1
                           : sqrt(1 + log(r->factor) / log(r->original));
    } else if (strcmp(type, "default")) {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "config.json: rope type \"%.60s\" is not supported",
                          type);
        goto out;
    }
    if (rc == TV_OK && r->type != TVE_ROPE_DEFAULT && !(r->factor > 0))
        rc = bad(err, "the scaling factor is not positive");
out:
    return rc;
}

enum tv_err tve_rope_load(const json_t *config, bool local, size_t head_dim,
                          double max_positions, struct tve_rope *out,
                          struct tv_error *err)
{
    const json_t *p = json_object_get(config, "rope_parameters");
    const json_t *type = NULL, *nested = NULL;
    double part = 0;
    struct tve_rope *const r = out;

    static const char *const places[] = {"rope_parameters", "rope_scaling"};
    for (size_t i = 0; i < 2; i++) {
        const json_t *const v = json_object_get(config, places[i]);
        if (v && !json_is_object(v) && !json_is_null(v))
            return tv_error_set(err, TV_E_CORRUPT,
                                "config.json: \"%s\" is no object", places[i]);
    }
    /* Gemma 3 in the new spelling: one set per kind of layer. */
    nested = json_object_get(p, local ? "sliding_attention" : "full_attention");
    if (json_is_object(nested))
        p = nested;
    else if (local && json_object_get(config, "rope_local_base_freq"))
        p = NULL;
    else if (!json_is_object(p))
        p = json_object_get(config, "rope_scaling");
    r->type = TVE_ROPE_DEFAULT;
    r->scale = 1;
    r->max_positions = max_positions;
    r->base = number(p, config, "rope_theta",
                     number(config, NULL, "rotary_emb_base", 10000));
    if (local && !json_is_object(nested))
        r->base = number(config, NULL, "rope_local_base_freq", r->base);
    part = number(p, config, "partial_rotary_factor",
                  number(config, NULL, "rotary_pct", 1));
    if (!(r->base > 0) || !(part > 0) || part > 1)
        return bad(err, "impossible base or partial factor");
    r->dims = (size_t)((double)head_dim * part);
    if (r->dims == 0 || 2 * tve_rope_half(r) > head_dim)
        return bad(err, "the heads cannot be rotated in pairs");
    type = json_object_get(p, "rope_type");
    if (!json_is_string(type))
        type = json_object_get(p, "type");
    if (!json_is_string(type))
        return TV_OK;
    return load_scaling(config, p, json_string_value(type), r, err);
}

void tve_rope_free(struct tve_rope *r)
{
    tv_free(r->long_factors);
    tv_free(r->short_factors);
    memset(r, 0, sizeof(*r));
}

static double yarn_dim(const struct tve_rope *r, double rotations)
{
    return (double)r->dims * log(r->original / (rotations * TWO_PI)) /
           (2 * log(r->base));
}

static void yarn_frequencies(const struct tve_rope *r, float *inv_freq)
{
    double low = yarn_dim(r, r->beta_fast), high = yarn_dim(r, r->beta_slow);

    if (r->truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = low > 0 ? low : 0;
    high = high < (double)r->dims - 1 ? high : (double)r->dims - 1;
    if (low == high)
        high += 0.001;
    for (size_t i = 0; i < tve_rope_half(r); i++) {
        const double f = pow(r->base, 2.0 * (double)i / (double)r->dims);
        double ramp = ((double)i - low) / (high - low);

        ramp = ramp < 0 ? 0 : ramp > 1 ? 1 : ramp;
        inv_freq[i] = (float)(ramp / (r->factor * f) + (1 - ramp) / f);
    }
}

static double llama3_frequency(const struct tve_rope *r, double f)
{
    const double wave = TWO_PI / f;
    double smooth = 0;

    if (wave > r->original / r->low)
        return f / r->factor;
    if (wave < r->original / r->high)
        return f;
    smooth = (r->original / wave - r->low) / (r->high - r->low);
    return (1 - smooth) * f / r->factor + smooth * f;
}

void tve_rope_frequencies(const struct tve_rope *r, size_t n, float *inv_freq)
{
    double base = r->base;
    const double dims = (double)r->dims;

    if (r->type == TVE_ROPE_YARN) {
        yarn_frequencies(r, inv_freq);
        return;
    }
    if (r->type == TVE_ROPE_DYNAMIC && r->max_positions > 0 &&
        (double)n > r->max_positions && r->dims > 2)
        base *= pow(r->factor * (double)n / r->max_positions - (r->factor - 1),
                    dims / (dims - 2));
    for (size_t i = 0; i < tve_rope_half(r); i++) {
        double f = 1.0 / pow(base, 2.0 * (double)i / dims);

        if (r->type == TVE_ROPE_LINEAR)
            f /= r->factor;
        else if (r->type == TVE_ROPE_LLAMA3)
            f = llama3_frequency(r, f);
        else if (r->type == TVE_ROPE_LONG)
            f /= ((double)n > r->original ? r->long_factors
                                          : r->short_factors)[i];
        inv_freq[i] = (float)f;
    }
}
