/* SPDX-License-Identifier: Apache-2.0 */
/*
 * calibration_state.c - see calibration_state.h. Over jansson.
 */
#include "calibration_state.h"

#include <string.h>

#include <jansson.h>

#include "tv/alloc.h"
#include "tv/format.h"

/* ---- writing ------------------------------------------------------------- */

static json_t *damped_json(const struct tvm_damped *d)
{
    return json_pack("{s:s, s:s, s:o, s:I, s:I}", "tensor", d->tensor, "donor",
                     d->donor, "damping",
                     d->damping > 0 ? json_real(d->damping) : json_null(),
                     "raised", (json_int_t)d->n_raised, "unseen_inputs",
                     (json_int_t)d->n_unseen);
}

static json_t *kept_json(const struct tvm_kept_mask *k)
{
    char hex[33];

    return json_pack("{s:I, s:I, s:I, s:I, s:I, s:I, s:s}", "entry",
                     (json_int_t)k->entry, "words", (json_int_t)k->words_at,
                     "before", (json_int_t)k->before_at, "values",
                     (json_int_t)k->values_at, "n_values",
                     (json_int_t)k->n_values, "n_rows", (json_int_t)k->n_rows,
                     "checksum", tv_hash_hex(k->checksum, hex));
}

char *tvm_calibration_state_make(const struct tvm_calibration_state *s)
{
    json_t *damped = json_array();
    json_t *kept = json_array();
    json_t *doc = NULL;
    char *text = NULL;
    bool ok = damped && kept;

    for (size_t i = 0; ok && i < s->n_damped; i++)
        ok = json_array_append_new(damped, damped_json(&s->damped[i])) == 0;
    for (size_t i = 0; ok && i < s->n_kept; i++)
        ok = json_array_append_new(kept, kept_json(&s->kept[i])) == 0;
    if (ok)
        doc = json_pack("{s:I, s:I, s:b, s:O, s:O}", "masks",
                        (json_int_t)s->n_masks, "made", (json_int_t)s->n_made,
                        "random", s->random, "damped", damped, "kept", kept);
    text = doc ? tv_json_text(doc, JSON_COMPACT) : NULL;
    json_decref(doc);
    json_decref(kept);
    json_decref(damped);
    return text;
}

/* ---- reading ------------------------------------------------------------- */

static bool get_u64(const json_t *o, const char *key, uint64_t *to)
{
    const json_t *j = json_object_get(o, key);

    *to = json_is_integer(j) ? (uint64_t)json_integer_value(j) : 0;
    return json_is_integer(j) && json_integer_value(j) >= 0;
}

static bool get_size(const json_t *o, const char *key, size_t *to)
{
    uint64_t v = 0;
    const bool ok = get_u64(o, key, &v) && v <= SIZE_MAX;

    *to = (size_t)v;
    return ok;
}

static bool get_damped(const json_t *o, struct tvm_damped *d)
{
    const json_t *damping = json_object_get(o, "damping");

    d->tensor = json_string_value(json_object_get(o, "tensor"));
    d->donor = json_string_value(json_object_get(o, "donor"));
    d->damping = json_number_value(damping);
    return d->tensor && d->donor && d->damping >= 0 &&
           (json_is_number(damping) || json_is_null(damping)) &&
           get_size(o, "raised", &d->n_raised) &&
           get_size(o, "unseen_inputs", &d->n_unseen);
}

static bool get_kept(const json_t *o, struct tvm_kept_mask *k)
{
    const char *hex = json_string_value(json_object_get(o, "checksum"));

    return get_size(o, "entry", &k->entry) &&
           get_u64(o, "words", &k->words_at) &&
           get_u64(o, "before", &k->before_at) &&
           get_u64(o, "values", &k->values_at) &&
           get_u64(o, "n_values", &k->n_values) &&
           get_u64(o, "n_rows", &k->n_rows) && hex && strlen(hex) == 32 &&
           tv_hash_from_hex(hex, &k->checksum) == 0;
}

enum tv_err tvm_calibration_state_parse(const char *text,
                                        struct tvm_calibration_state *out,
                                        struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    json_t *doc = NULL;

    *out = (struct tvm_calibration_state){.n_masks = 0};
    if (!text ||
        tv_json_parse(text, strlen(text), "calibration", NULL, &doc) != TV_OK)
        return TV_OK;
    const json_t *damped = json_object_get(doc, "damped");
    const json_t *kept = json_object_get(doc, "kept");
    bool ok = get_size(doc, "masks", &out->n_masks);

    /* A finished merge does not say it again. */
    if (!get_size(doc, "made", &out->n_made))
        out->n_made = out->n_masks;
    out->random = json_is_true(json_object_get(doc, "random"));
    out->damped = tv_calloc(json_array_size(damped) + 1, sizeof *out->damped);
    out->kept = tv_calloc(json_array_size(kept) + 1, sizeof *out->kept);
    out->storage = doc;
    if (!out->damped || !out->kept) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; ok && i < json_array_size(damped); i++)
        ok = get_damped(json_array_get(damped, i),
                        &out->damped[out->n_damped++]);
    for (size_t i = 0; ok && i < json_array_size(kept); i++)
        ok = get_kept(json_array_get(kept, i), &out->kept[out->n_kept++]);
    if (ok)
        return TV_OK;
out:
    tvm_calibration_state_free(out);
    return rc;
}

void tvm_calibration_state_free(struct tvm_calibration_state *s)
{
    tv_free(s->damped);
    tv_free(s->kept);
    json_decref(s->storage);
    *s = (struct tvm_calibration_state){.n_masks = 0};
}
