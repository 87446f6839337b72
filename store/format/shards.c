/* SPDX-License-Identifier: Apache-2.0 */
/*
 * shards.c - lays tensors out in safetensors files: which shard, at which
 * offset, under which header; and the index of several shards.
 *
 * The layout is a pure function of the entries and the limit, so it is known
 * before a byte is written and a resumed writer computes it again. Headers are
 * padded with spaces to 8 bytes, as every writer does, so the payload is
 * aligned to 8.
 */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "json_util.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/format.h"

#define SHARD_BYTES_DEFAULT UINT64_C(5000000000)
/* Upper bound of one entry's JSON apart from its name. */
#define ENTRY_TEXT_MAX      320u

#ifndef TV_VERSION
#define TV_VERSION "unknown"
#endif

void tv_shards_free(struct tv_shards *s)
{
    if (s == NULL)
        return;
    for (size_t i = 0; i < s->n; i++) {
        if (s->file_names != NULL)
            tv_free(s->file_names[i]);
        if (s->headers != NULL)
            tv_free(s->headers[i]);
    }
    tv_free(s->file_names);
    tv_free(s->headers);
    tv_free(s->header_bytes);
    tv_free(s->file_bytes);
    tv_free(s->index_json);
    tv_free(s);
}

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory laying out shards");
}

/* Fills shard of every entry; *n_shards is at least 1. */
static enum tv_err assign(struct tv_st_entry *entries, size_t n, uint64_t max,
                          size_t *n_shards, struct tv_error *err)
{
    size_t shard = 0;
    uint64_t data = 0;
    size_t text = 0;
    size_t count = 0;

    for (size_t i = 0; i < n; i++) {
        const struct tv_st_entry *e = &entries[i];
        size_t name = 0;
        uint64_t next = 0;

        if (e->rank > TV_RANK_MAX || e->name[0] == '\0' ||
            strlen(e->name) > TV_NAME_MAX)
            return tv_error_set(err, TV_E_INTERNAL,
                                "tensor %zu has no valid name or rank", i);
        /* Escapes take at most six bytes for one. */
        name = 6 * strlen(e->name) + ENTRY_TEXT_MAX;
        if (count > 0 && (!tv_add_u64(data, e->bytes, &next) || next > max ||
                          text + name > TV_ST_HEADER_MAX - 4096 ||
                          count == TV_ST_TENSORS_MAX)) {
            shard++;
            data = 0;
            text = 0;
            count = 0;
        }
        data += e->bytes;
        text += name;
        count++;
        entries[i].shard = shard;
    }
    *n_shards = shard + 1;
    return TV_OK;
}

static json_t *entry_json(const struct tv_st_entry *e, uint64_t begin)
{
    json_t *shape = json_array();
    json_t *o = NULL;

    for (unsigned d = 0; shape != NULL && d < e->rank; d++) {
        if (json_array_append_new(shape,
                                  json_integer((json_int_t)e->shape[d])) != 0) {
            json_decref(shape);
            shape = NULL;
        }
    }
    if (shape != NULL)
        o = json_pack("{s:s, s:o, s:[I, I]}", "dtype", tv_dtype_name(e->dtype),
                      "shape", shape, "data_offsets", (json_int_t)begin,
                      (json_int_t)(begin + e->bytes));
    return o;
}

/* Entries [first, last) make the header of shard s. */
static enum tv_err make_header(struct tv_st_entry *entries, size_t first,
                               size_t last, struct tv_shards *s, size_t shard,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_buf b;
    uint64_t at = 0;
    json_t *root = json_pack("{s:{s:s}}", "__metadata__", "format", "pt");
    static const char pad[9] = "        ";

    tv_buf_init(&b, (size_t)TV_ST_HEADER_MAX + 16);
    if (root == NULL) {
        rc = no_memory(err);
        goto out;
    }
    for (size_t i = first; i < last; i++) {
        struct tv_st_entry *e = &entries[i];
        uint64_t end = 0;

        if (json_object_get(root, e->name) != NULL) {
            struct tv_shown shown;

            rc = tv_error_set(err, TV_E_INPUT, "tensor '%s' occurs twice",
                              tv_show(e->name, &shown));
            goto out;
        }
        if (!tv_add_u64(at, e->bytes, &end) || end > (uint64_t)INT64_MAX / 2) {
            rc = tv_error_set(err, TV_E_INPUT, "shard %zu is too large", shard);
            goto out;
        }
        if (json_object_set_new(root, e->name, entry_json(e, at)) != 0) {
            rc = no_memory(err);
            goto out;
        }
        e->offset = at; /* the header's length is added below */
        at = end;
    }
    {
        char length[8] = {0};

        tv_buf_add(&b, length, sizeof length);
        tv_json_dump(root, JSON_COMPACT, &b);
        tv_buf_add(&b, pad, (8 - b.n_bytes % 8) % 8);
    }
    TV_TRY(tv_buf_ok(&b, err));
    tv_put_le64(b.data, b.n_bytes - 8);
    for (size_t i = first; i < last; i++)
        entries[i].offset += b.n_bytes;
    s->headers[shard] = b.data;
    s->header_bytes[shard] = b.n_bytes;
    s->file_bytes[shard] = b.n_bytes + at;
    tv_buf_init(&b, 1); /* the bytes belong to s now */
out:
    json_decref(root);
    tv_buf_free(&b);
    return rc;
}

static enum tv_err make_index(const struct tv_st_entry *entries, size_t n,
                              struct tv_shards *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_buf b;
    uint64_t elems = 0;
    json_t *root = NULL;
    json_t *map = NULL;

    tv_buf_init(&b, (size_t)1 << 30);
    for (size_t i = 0; i < n; i++) {
        uint64_t k = 0;

        TV_TRY(tv_shape_elems(entries[i].shape, entries[i].rank, &k, err));
        if (!tv_add_u64(elems, k, &elems))
            elems = UINT64_MAX / 2;
    }
    root =
        json_pack("{s:{s:I, s:I, s:s}, s:{}}", "metadata", "total_parameters",
                  (json_int_t)elems, "total_size", (json_int_t)s->total_bytes,
                  "tvmerge_version", TV_VERSION, "weight_map");
    map = json_object_get(root, "weight_map");
    if (map == NULL) {
        rc = no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < n; i++) {
        if (json_object_set_new(map, entries[i].name,
                                json_string(s->file_names[entries[i].shard])) !=
            0) {
            rc = no_memory(err);
            goto out;
        }
    }
    if (json_object_size(map) != n) {
        rc = tv_error_set(err, TV_E_INPUT, "a tensor name occurs twice");
        goto out;
    }
    tv_json_dump(root, JSON_INDENT(2) | JSON_SORT_KEYS | JSON_ENSURE_ASCII, &b);
    tv_buf_str(&b, "\n");
    TV_TRY(tv_buf_ok(&b, err));
    s->index_json = b.data;
    s->index_bytes = b.n_bytes;
    tv_buf_init(&b, 1);
out:
    json_decref(root);
    tv_buf_free(&b);
    return rc;
}

enum tv_err tv_shards_plan(struct tv_st_entry *entries, size_t n,
                           const char *stem, uint64_t max_shard_bytes,
                           struct tv_error *err, struct tv_shards **out)
{
    enum tv_err rc = TV_OK;
    struct tv_shards *s = NULL;
    size_t first = 0;
    size_t n_shards = 0;

    *out = NULL;
    TV_TRY(assign(entries, n,
                  max_shard_bytes == 0 ? SHARD_BYTES_DEFAULT : max_shard_bytes,
                  &n_shards, err));
    s = (struct tv_shards *)tv_calloc(1, sizeof *s);
    if (s == NULL) {
        rc = no_memory(err);
        goto out;
    }
    s->n = n_shards;
    s->file_names = (char **)tv_calloc(n_shards, sizeof *s->file_names);
    s->headers = (char **)tv_calloc(n_shards, sizeof *s->headers);
    s->header_bytes = (size_t *)tv_calloc(n_shards, sizeof *s->header_bytes);
    s->file_bytes = (uint64_t *)tv_calloc(n_shards, sizeof *s->file_bytes);
    if (s->file_names == NULL || s->headers == NULL ||
        s->header_bytes == NULL || s->file_bytes == NULL) {
        rc = no_memory(err);
        goto out;
    }
    for (size_t i = 0; i < n_shards; i++) {
        size_t last = first;

        s->file_names[i] = n_shards == 1
                               ? tv_asprintf("%s.safetensors", stem)
                               : tv_asprintf("%s-%05zu-of-%05zu.safetensors",
                                             stem, i + 1, n_shards);
        if (s->file_names[i] == NULL) {
            rc = no_memory(err);
            goto out;
        }
        while (last < n && entries[last].shard == i)
            last++;
        TV_TRY(make_header(entries, first, last, s, i, err));
        if (!tv_add_u64(s->total_bytes, s->file_bytes[i] - s->header_bytes[i],
                        &s->total_bytes) ||
            s->total_bytes > (uint64_t)INT64_MAX / 2) {
            rc = tv_error_set(err, TV_E_INPUT, "the model is too large");
            goto out;
        }
        first = last;
    }
    if (n_shards > 1)
        TV_TRY(make_index(entries, n, s, err));
    *out = s;
    s = NULL;
out:
    tv_shards_free(s);
    return rc;
}
