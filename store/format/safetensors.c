/* SPDX-License-Identifier: Apache-2.0 */
/*
 * safetensors.c - the reader of untrusted .safetensors files.
 *
 *   0   u64  N, little-endian
 *   8   N bytes of JSON: {"__metadata__": {string: string}, NAME: {"dtype":
 *       "BF16", "shape": [...], "data_offsets": [begin, end]}, ...}
 *   8+N the buffer that the offsets count in; covered by the tensors without
 *       hole or overlap to the last byte of the file
 *
 * Accepted as the reference reader does (huggingface/safetensors, tensor.rs):
 * leading and trailing spaces, unknown fields, tensors without elements,
 * scalars, `{}`, payload of any alignment. Refused beyond it: duplicate keys,
 * empty names, names with a NUL, headers above our limits.
 *
 * This file knows bytes only; input.c maps files.
 */
#include "tv/parse.h"

#include <inttypes.h>
#include <jansson.h>
#include <stdlib.h>
#include <string.h>

#include "json_util.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/format.h"

static const struct tv_json_limits header_limits = {
    .bytes_max = TV_ST_HEADER_MAX,
    .depth_max = TV_JSON_DEPTH_MAX,
    .members_max = TV_ST_TENSORS_MAX + 1, /* and __metadata__ */
    .values_per_member = 32,
    .values_free = 1u << 16,
};

struct reader {
    const char *label;
    uint64_t header_bytes, buffer_bytes;
    struct tv_error *err;
};

void tv_parsed_free(struct tv_parsed_file *p)
{
    if (p == NULL)
        return;
    for (size_t i = 0; i < p->n; i++)
        tv_free(p->items[i].name);
    tv_free(p->items);
    tv_free(p);
}

static enum tv_err bad_tensor(const struct reader *r, const char *name,
                              const char *what)
{
    struct tv_shown shown;

    return tv_error_set(r->err, TV_E_CORRUPT, "%s: tensor '%s': %s", r->label,
                        tv_show(name, &shown), what);
}

static enum tv_err read_metadata(const struct reader *r, const json_t *value)
{
    const char *key = NULL;
    json_t *v = NULL;
    struct tv_shown shown;

    if (!json_is_object(value))
        return tv_error_set(r->err, TV_E_CORRUPT,
                            "%s: __metadata__ is not an object", r->label);
    json_object_foreach((json_t *)(uintptr_t)value, key, v)
    {
        if (!json_is_string(v))
            return tv_error_set(r->err, TV_E_CORRUPT,
                                "%s: __metadata__ '%s' is not a string",
                                r->label, tv_show(key, &shown));
    }
    return TV_OK;
}

static enum tv_err read_shape(const struct reader *r, const char *name,
                              const json_t *shape, struct tv_parsed_tensor *t)
{
    enum tv_err rc = TV_OK;
    uint64_t stride = 1;

    if (!json_is_array(shape))
        return bad_tensor(r, name, "shape is missing or not a list");
    if (json_array_size(shape) > TV_RANK_MAX)
        return bad_tensor(r, name, "shape has more than 8 dimensions");
    t->rank = (unsigned)json_array_size(shape);
    for (unsigned d = 0; d < t->rank; d++) {
        const json_t *v = json_array_get(shape, d);

        if (!json_is_integer(v) || json_integer_value(v) < 0)
            return bad_tensor(r, name,
                              "shape holds something other than a "
                              "non-negative integer");
        t->shape[d] = (uint64_t)json_integer_value(v);
    }
    TV_TRY(tv_shape_elems(t->shape, t->rank, &t->n_elems, r->err));
    TV_TRY(tv_dtype_bytes(t->dtype, t->n_elems, &t->bytes, r->err));
    t->contiguous = true;
    for (unsigned d = t->rank; d-- > 0;) {
        t->stride[d] = stride;
        /* Only a shape with a zero could overflow here, where strides do not
         * matter. */
        if (!tv_mul_u64(stride, t->shape[d], &stride))
            stride = 0;
    }
out:
    if (rc != TV_OK) {
        struct tv_shown shown;

        tv_error_context(r->err, "%s: tensor '%s'", r->label,
                         tv_show(name, &shown));
    }
    return rc;
}

static enum tv_err read_tensor(const struct reader *r, const char *name,
                               const json_t *value, struct tv_parsed_tensor *t)
{
    const json_t *dtype = NULL;
    const json_t *offsets = NULL;
    uint64_t begin = 0;
    uint64_t end = 0;
    struct tv_shown shown;

    if (name[0] == '\0')
        return bad_tensor(r, name, "empty name");
    if (strlen(name) > TV_NAME_MAX)
        return bad_tensor(r, name, "name longer than 4096 bytes");
    if (!json_is_object(value))
        return bad_tensor(r, name, "its entry is not an object");
    dtype = json_object_get(value, "dtype");
    if (!json_is_string(dtype))
        return bad_tensor(r, name, "dtype is missing or not a string");
    t->dtype = tv_dtype_from_name(json_string_value(dtype));
    if (t->dtype == TV_DTYPE_NONE) {
        struct tv_shown type;

        return tv_error_set(r->err, TV_E_CORRUPT,
                            "%s: tensor '%s': unknown dtype '%s'", r->label,
                            tv_show(name, &shown),
                            tv_show(json_string_value(dtype), &type));
    }
    {
        const enum tv_err rc =
            read_shape(r, name, json_object_get(value, "shape"), t);
        if (rc != TV_OK)
            return rc;
    }
    offsets = json_object_get(value, "data_offsets");
    if (!json_is_array(offsets) || json_array_size(offsets) != 2 ||
        !json_is_integer(json_array_get(offsets, 0)) ||
        !json_is_integer(json_array_get(offsets, 1)) ||
        json_integer_value(json_array_get(offsets, 0)) < 0 ||
        json_integer_value(json_array_get(offsets, 1)) < 0)
        return bad_tensor(r, name,
                          "data_offsets is not a pair of non-negative "
                          "integers");
    begin = (uint64_t)json_integer_value(json_array_get(offsets, 0));
    end = (uint64_t)json_integer_value(json_array_get(offsets, 1));
    if (end < begin || end > r->buffer_bytes)
        return tv_error_set(
            r->err, TV_E_CORRUPT,
            "%s: tensor '%s': data_offsets [%" PRIu64 ", %" PRIu64
            "] do not lie in the %" PRIu64 " data bytes of the file",
            r->label, tv_show(name, &shown), begin, end, r->buffer_bytes);
    if (end - begin != t->bytes)
        return tv_error_set(
            r->err, TV_E_CORRUPT,
            "%s: tensor '%s': data_offsets [%" PRIu64 ", %" PRIu64
            "] hold %" PRIu64 " bytes, shape and dtype need %" PRIu64,
            r->label, tv_show(name, &shown), begin, end, end - begin, t->bytes);
    t->offset = r->header_bytes + begin;
    t->span = t->bytes;
    t->name = tv_strdup(name);
    if (t->name == NULL)
        return tv_error_set(r->err, TV_E_NOMEM, "%s: out of memory", r->label);
    return TV_OK;
}

static int compare_offset(const void *a, const void *b)
{
    const struct tv_parsed_tensor *x = (const struct tv_parsed_tensor *)a;
    const struct tv_parsed_tensor *y = (const struct tv_parsed_tensor *)b;

    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    if (x->bytes != y->bytes) /* empty tensors before the one that follows */
        return x->bytes < y->bytes ? -1 : 1;
    return strcmp(x->name, y->name);
}

static enum tv_err check_cover(const struct reader *r,
                               const struct tv_parsed_file *p)
{
    uint64_t at = r->header_bytes;

    for (size_t i = 0; i < p->n; i++) {
        const struct tv_parsed_tensor *t = &p->items[i];
        struct tv_shown shown;

        if (t->offset != at)
            return tv_error_set(
                r->err, TV_E_CORRUPT,
                "%s: tensor '%s' begins at data byte %" PRIu64
                ", the one before it ends at %" PRIu64 " (%s)",
                r->label, tv_show(t->name, &shown), t->offset - r->header_bytes,
                at - r->header_bytes, t->offset < at ? "overlap" : "hole");
        at += t->bytes;
    }
    if (at - r->header_bytes != r->buffer_bytes)
        return tv_error_set(r->err, TV_E_CORRUPT,
                            "%s: the tensors end at data byte %" PRIu64
                            ", the file has %" PRIu64 " data bytes",
                            r->label, at - r->header_bytes, r->buffer_bytes);
    return TV_OK;
}

/* What a file is that cannot be a safetensors file, by its first bytes. */
static const char *other_kind(const char *bytes, uint64_t n)
{
    static const char lfs[] = "version https://git-lfs";

    if (n >= sizeof lfs - 1 && memcmp(bytes, lfs, sizeof lfs - 1) == 0)
        return "a Git LFS pointer, not the file itself ('git lfs pull' or 'hf "
               "download' fetches it)";
    if (n >= 4 && memcmp(bytes, "PK\3\4", 4) == 0)
        return "a zip archive, as torch.save writes them, not a safetensors "
               "file (give it the name *.bin)";
    /* A header begins with a brace, or is cut off before it. */
    return n > 8 && bytes[8] == '{' ? NULL : "no safetensors file";
}

enum tv_err tv_safetensors_parse(const void *data, uint64_t n,
                                 const char *label, struct tv_error *err,
                                 struct tv_parsed_file **out)
{
    enum tv_err rc = TV_OK;
    const char *bytes = (const char *)data;
    struct reader r = {label, 0, 0, err};
    struct tv_parsed_file *p = NULL;
    json_t *root = NULL;
    const char *key = NULL;
    json_t *value = NULL;
    uint64_t n_header = 0;

    *out = NULL;
    if (n < 8)
        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: %" PRIu64 " bytes, too short for the header "
                            "length at byte 0",
                            label, n);
    n_header = tv_get_le64(bytes);
    if (n_header > TV_ST_HEADER_MAX) {
        const char *const kind = other_kind(bytes, n);
        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: %s%sheader length %" PRIu64
                            " at byte 0 is above the limit of %u",
                            label, kind == NULL ? "" : kind,
                            kind == NULL ? "" : ": ", n_header,
                            TV_ST_HEADER_MAX);
    }
    if (n_header > n - 8)
        return tv_error_set(err, TV_E_CORRUPT,
                            "%s: header length %" PRIu64
                            " at byte 0, but only %" PRIu64 " bytes follow",
                            label, n_header, n - 8);
    r.header_bytes = 8 + n_header;
    r.buffer_bytes = n - r.header_bytes;
    TV_TRY(tv_json_load(bytes + 8, (size_t)n_header, label, 8, &header_limits,
                        err, &root));
    p = (struct tv_parsed_file *)tv_calloc(1, sizeof *p);
    if (p == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
        goto out;
    }
    p->items = (struct tv_parsed_tensor *)tv_calloc(json_object_size(root) + 1,
                                                    sizeof *p->items);
    if (p->items == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
        goto out;
    }
    json_object_foreach(root, key, value)
    {
        if (strcmp(key, "__metadata__") == 0) {
            TV_TRY(read_metadata(&r, value));
        } else if (p->n == TV_ST_TENSORS_MAX) {
            rc = tv_error_set(err, TV_E_CORRUPT, "%s: more than %u tensors",
                              label, TV_ST_TENSORS_MAX);
            goto out;
        } else {
            TV_TRY(read_tensor(&r, key, value, &p->items[p->n]));
            p->n++;
        }
    }
    qsort(p->items, p->n, sizeof *p->items, compare_offset);
    TV_TRY(check_cover(&r, p));
    p->header_bytes = r.header_bytes;
    p->header_digest = tv_hash128(data, (size_t)r.header_bytes);
    *out = p;
    p = NULL;
out:
    json_decref(root);
    tv_parsed_free(p);
    return rc;
}
