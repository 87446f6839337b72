/* SPDX-License-Identifier: Apache-2.0 */
/*
 * index.c - the index of a sharded checkpoint: {"metadata": {...},
 * "weight_map": {tensor: file}}. Only plain file names of the right kind are
 * accepted, so that an index cannot point outside its directory. Whether files
 * and tensors exist is input.c's business.
 */
#include <stdlib.h>
#include <string.h>

#include "json_util.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/parse.h"

static const struct tv_json_limits index_limits = {
    .bytes_max = TV_JSON_MAX,
    .depth_max = TV_JSON_DEPTH_MAX,
    .members_max = 1u << 10,
    .values_per_member = 0,
    .values_free = TV_INDEX_TENSORS_MAX + (1u << 10),
};

struct storage {
    char **names;
    size_t n;
};

static void strings_free(char **s, size_t n)
{
    for (size_t i = 0; s != NULL && i < n; i++)
        tv_free(s[i]);
    tv_free(s);
}

void tv_index_free(struct tv_index *x)
{
    if (x == NULL)
        return;
    if (x->storage != NULL) {
        struct storage *st = (struct storage *)x->storage;

        strings_free(st->names, st->n);
        tv_free(st);
    }
    strings_free(x->files, x->n_files);
    tv_free(x->items);
    tv_free(x);
}

static bool ends_with(const char *s, const char *suffix)
{
    const size_t n = strlen(s);
    const size_t k = strlen(suffix);

    return n > k && strcmp(s + n - k, suffix) == 0;
}

static int compare_strings(const void *a, const void *b)
{
    const char *const *x = (const char *const *)a;
    const char *const *y = (const char *const *)b;

    return strcmp(*x, *y);
}

static int compare_entries(const void *a, const void *b)
{
    const struct tv_index_entry *x = (const struct tv_index_entry *)a;
    const struct tv_index_entry *y = (const struct tv_index_entry *)b;

    return strcmp(x->name, y->name);
}

static enum tv_err no_memory(const char *label, struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
}

/* Distinct file names, sorted. */
static enum tv_err collect_files(const json_t *map, const char *label,
                                 const char *suffix, struct tv_index *x,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const char **all = NULL;
    size_t n = 0;
    const char *key = NULL;
    json_t *v = NULL;

    all = (const char **)tv_calloc(json_object_size(map) + 1, sizeof *all);
    if (all == NULL)
        return no_memory(label, err);
    json_object_foreach((json_t *)(uintptr_t)map, key, v)
    {
        struct tv_shown name;
        struct tv_shown file;
        const char *f = json_string_value(v);

        if (key[0] == '\0' || strlen(key) > TV_NAME_MAX) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "%s: weight_map has a tensor name that is empty "
                              "or too long: '%s'",
                              label, tv_show(key, &name));
            goto out;
        }
        if (f == NULL) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "%s: weight_map '%s' is not a file name", label,
                              tv_show(key, &name));
            goto out;
        }
        if (strchr(f, '/') != NULL || strchr(f, '\\') != NULL || f[0] == '.' ||
            strlen(f) > 255 || !ends_with(f, suffix)) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "%s: weight_map '%s' names '%s', which is no "
                              "plain *%s file name",
                              label, tv_show(key, &name), tv_show(f, &file),
                              suffix);
            goto out;
        }
        all[n++] = f;
    }
    qsort(all, n, sizeof *all, compare_strings);
    for (size_t i = 0; i < n; i++) {
        if (i > 0 && strcmp(all[i], all[i - 1]) == 0)
            continue;
        if (x->n_files == TV_INDEX_FILES_MAX) {
            rc = tv_error_set(err, TV_E_CORRUPT,
                              "%s: weight_map names more than %u files", label,
                              TV_INDEX_FILES_MAX);
            goto out;
        }
        if (x->files == NULL)
            x->files = (char **)tv_calloc(
                n < TV_INDEX_FILES_MAX ? n : TV_INDEX_FILES_MAX,
                sizeof *x->files);
        if (x->files == NULL ||
            (x->files[x->n_files] = tv_strdup(all[i])) == NULL) {
            rc = no_memory(label, err);
            goto out;
        }
        x->n_files++;
    }
out:
    tv_free(all);
    return rc;
}

static enum tv_err collect_entries(const json_t *map, const char *label,
                                   struct tv_index *x, struct tv_error *err)
{
    struct storage *st = (struct storage *)tv_calloc(1, sizeof *st);
    const char *key = NULL;
    json_t *v = NULL;

    x->storage = st;
    if (st == NULL)
        return no_memory(label, err);
    st->names =
        (char **)tv_calloc(json_object_size(map) + 1, sizeof *st->names);
    x->items = (struct tv_index_entry *)tv_calloc(json_object_size(map) + 1,
                                                  sizeof *x->items);
    if (st->names == NULL || x->items == NULL)
        return no_memory(label, err);
    json_object_foreach((json_t *)(uintptr_t)map, key, v)
    {
        const char *f = json_string_value(v);
        const char *const *hit = (const char *const *)bsearch(
            &f, x->files, x->n_files, sizeof *x->files, compare_strings);

        st->names[st->n] = tv_strdup(key);
        if (st->names[st->n] == NULL || hit == NULL)
            return no_memory(label, err);
        x->items[x->n].name = st->names[st->n++];
        x->items[x->n++].file = (size_t)(hit - (const char *const *)x->files);
    }
    qsort(x->items, x->n, sizeof *x->items, compare_entries);
    return TV_OK;
}

enum tv_err tv_index_parse(const char *data, size_t n, const char *label,
                           const char *suffix, struct tv_error *err,
                           struct tv_index **out)
{
    enum tv_err rc = TV_OK;
    struct tv_index *x = NULL;
    json_t *root = NULL;
    const json_t *map = NULL;

    *out = NULL;
    TV_TRY(tv_json_load(data, n, label, 0, &index_limits, err, &root));
    map = json_object_get(root, "weight_map");
    if (!json_is_object(map)) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "%s: weight_map is missing or not an object", label);
        goto out;
    }
    if (json_object_size(map) == 0) {
        rc = tv_error_set(err, TV_E_CORRUPT, "%s: weight_map is empty", label);
        goto out;
    }
    x = (struct tv_index *)tv_calloc(1, sizeof *x);
    if (x == NULL) {
        rc = no_memory(label, err);
        goto out;
    }
    TV_TRY(collect_files(map, label, suffix, x, err));
    TV_TRY(collect_entries(map, label, x, err));
    *out = x;
    x = NULL;
out:
    json_decref(root);
    tv_index_free(x);
    return rc;
}
