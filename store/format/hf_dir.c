/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hf_dir.c - discovery in a Hugging Face directory, in mergekit's order: an
 * index wins over a single file, safetensors over .bin; adapter_config.json
 * makes it an adapter. No other weight files are ever picked.
 */
#include "hf_dir.h"

#include <errno.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "json_util.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/sys.h"

static const char *const side_names[] = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    /* adapters only: */
    "adapter_config.json",
    "README.md",
};
#define N_SIDE_NAMES  (sizeof side_names / sizeof *side_names)
#define N_MODEL_SIDES (N_SIDE_NAMES - 2)

const char *const *tv_side_names(size_t *n)
{
    *n = N_SIDE_NAMES;
    return side_names;
}

char *tv_absolute_path(const char *path)
{
    char real[PATH_MAX];

    return realpath(path, real) == NULL ? NULL : tv_strdup(real);
}

bool tv_plain_name(const char *name)
{
    return name[0] != '\0' && strchr(name, '/') == NULL &&
           strcmp(name, ".") != 0 && strcmp(name, "..") != 0;
}

void tv_model_files_free(struct tv_model_files *f)
{
    if (f == NULL)
        return;
    for (size_t i = 0; f->paths != NULL && i < f->n_paths; i++)
        tv_free(f->paths[i]);
    for (size_t i = 0; f->sides != NULL && i < f->n_sides; i++)
        tv_free(f->sides[i]);
    tv_free(f->paths);
    tv_free(f->sides);
    tv_free(f->dir);
    tv_index_free(f->index);
    tv_free(f);
}

static enum tv_err no_memory(const char *path, struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "%s: out of memory", path);
}

static bool is_file(const char *path)
{
    struct stat st;

    return tv_sys()->stat(path, &st) == 0 && S_ISREG(st.st_mode);
}

/* A file that is there but cannot be read as one is not the same as none: so
 * look the links of a half-downloaded Hugging Face cache. */
static enum tv_err probe(const char *path, bool *found, struct tv_error *err)
{
    struct stat st;

    *found = false;
    if (tv_sys()->lstat(path, &st) != 0)
        return errno == ENOENT || errno == ENOTDIR
                   ? TV_OK
                   : tv_error_sys(err, errno, "cannot examine %s", path);
    if (tv_sys()->stat(path, &st) != 0) {
        const int e = errno;

        if (e != ENOENT && e != ELOOP && e != ENOTDIR)
            return tv_error_sys(err, e, "cannot examine %s", path);
        tv_error_set(err, TV_E_CORRUPT, "%s is a link to a file that is gone",
                     path);
        tv_error_hint(err, "was its download finished?");
        return TV_E_CORRUPT;
    }
    if (!S_ISREG(st.st_mode))
        return tv_error_set(err, TV_E_CORRUPT, "%s is not a regular file",
                            path);
    *found = true;
    return TV_OK;
}

static bool has_suffix(const char *s, const char *suffix)
{
    const size_t n = strlen(s);
    const size_t k = strlen(suffix);

    return n >= k && strcmp(s + n - k, suffix) == 0;
}

/* Adds dir/name when it is there. */
static enum tv_err try_single(struct tv_model_files *f, const char *name,
                              bool *found, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(f->dir, name);

    *found = false;
    if (path == NULL)
        return no_memory(f->dir, err);
    rc = probe(path, found, err);
    if (!*found) {
        tv_free(path);
        return rc;
    }
    f->paths[0] = path;
    f->n_paths = 1;
    return TV_OK;
}

/* An index may be left over from a model that was there before. */
static void hint_whole(const struct tv_model_files *f, struct tv_error *err)
{
    char *path = tv_path_join(f->dir, "model.safetensors");

    if (path != NULL && is_file(path))
        tv_error_hint(err, "model.safetensors is there too: if the index is of "
                           "an older model, remove it");
    tv_free(path);
}

static enum tv_err try_index(struct tv_model_files *f, const char *name,
                             const char *suffix, bool *found,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(f->dir, name);
    char *text = NULL;
    size_t n = 0;
    bool present = false;

    *found = false;
    if (path == NULL) {
        rc = no_memory(f->dir, err);
        goto out;
    }
    TV_TRY(probe(path, &present, err));
    if (!present)
        goto out;
    TV_TRY(tv_file_read(path, TV_JSON_MAX, err, &text, &n));
    TV_TRY(tv_index_parse(text, n, path, suffix, err, &f->index));
    tv_free(f->paths);
    f->paths = (char **)tv_calloc(f->index->n_files, sizeof *f->paths);
    if (f->paths == NULL) {
        rc = no_memory(f->dir, err);
        goto out;
    }
    for (size_t i = 0; i < f->index->n_files; i++) {
        f->paths[i] = tv_path_join(f->dir, f->index->files[i]);
        if (f->paths[i] == NULL) {
            rc = no_memory(f->dir, err);
            goto out;
        }
        f->n_paths++;
        if (!is_file(f->paths[i])) {
            struct tv_shown shown;

            rc = tv_error_set(err, TV_E_INPUT,
                              "%s: the shard %s that the index names is "
                              "missing",
                              f->dir, tv_show(f->index->files[i], &shown));
            hint_whole(f, err);
            goto out;
        }
    }
    *found = true;
out:
    tv_free(text);
    tv_free(path);
    return rc;
}

/* Shards that no index speaks of, an adapter without its configuration. */
static void hint_shards(const struct tv_model_files *f, struct tv_error *err)
{
    char **names = NULL;
    size_t n = 0;

    if (tv_dir_list(f->dir, NULL, &names, &n) != TV_OK)
        return;
    for (size_t i = 0; i < n; i++) {
        struct tv_shown shown;
        const bool shard = strncmp(names[i], "model-", 6) == 0;
        const bool adapter = strncmp(names[i], "adapter_model.", 14) == 0;
        if ((!shard && !adapter) || !tv_out_is_weights(names[i]))
            continue;
        tv_error_hint(err, "%s is there, but no %s, which says what is in it",
                      tv_show(names[i], &shown),
                      shard ? "model.safetensors.index.json"
                            : "adapter_config.json");
        break;
    }
    tv_dir_list_free(names, n);
}

static enum tv_err find_sides(struct tv_model_files *f, struct tv_error *err)
{
    const size_t n = f->kind == TV_KIND_ADAPTER ? N_SIDE_NAMES : N_MODEL_SIDES;

    f->sides = (char **)tv_calloc(n, sizeof *f->sides);
    if (f->sides == NULL)
        return no_memory(f->dir, err);
    for (size_t i = 0; i < n; i++) {
        enum tv_err rc = TV_OK;
        char *path = tv_path_join(f->dir, side_names[i]);
        bool present = false;

        if (path == NULL)
            return no_memory(f->dir, err);
        rc = probe(path, &present, err);
        tv_free(path);
        if (rc != TV_OK)
            return rc;
        if (!present)
            continue;
        f->sides[f->n_sides] = tv_strdup(side_names[i]);
        if (f->sides[f->n_sides] == NULL)
            return no_memory(f->dir, err);
        f->n_sides++;
    }
    return TV_OK;
}

static enum tv_err find_in_dir(struct tv_model_files *f, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    bool adapter = false;
    bool found = false;
    char *config = tv_path_join(f->dir, "adapter_config.json");

    if (config == NULL)
        return no_memory(f->dir, err);
    rc = probe(config, &adapter, err);
    tv_free(config);
    if (rc != TV_OK)
        return rc;
    f->kind = adapter ? TV_KIND_ADAPTER : TV_KIND_MODEL;
    TV_TRY(find_sides(f, err));
    if (adapter) {
        TV_TRY(try_single(f, "adapter_model.safetensors", &found, err));
        if (!found) {
            f->torch = true;
            TV_TRY(try_single(f, "adapter_model.bin", &found, err));
        }
    } else {
        TV_TRY(try_index(f, "model.safetensors.index.json", ".safetensors",
                         &found, err));
        if (!found)
            TV_TRY(try_single(f, "model.safetensors", &found, err));
        if (!found) {
            f->torch = true;
            TV_TRY(try_index(f, "pytorch_model.bin.index.json", ".bin", &found,
                             err));
        }
        if (!found)
            TV_TRY(try_single(f, "pytorch_model.bin", &found, err));
    }
    if (!found) {
        rc = tv_error_set(err, TV_E_INPUT, "%s: no %s here (looked for %s)",
                          f->dir, adapter ? "adapter weights" : "model",
                          adapter
                              ? "adapter_model.safetensors, adapter_model.bin"
                              : "model.safetensors[.index.json], "
                                "pytorch_model.bin[.index.json]");
        if (!adapter)
            hint_shards(f, err);
        goto out;
    }
out:
    return rc;
}

static enum tv_err find_single_file(struct tv_model_files *f, const char *path,
                                    struct tv_error *err)
{
    const char *slash = strrchr(path, '/');

    f->kind = TV_KIND_MODEL;
    f->torch = has_suffix(path, ".bin") || has_suffix(path, ".pt") ||
               has_suffix(path, ".pth");
    f->dir = slash == NULL   ? tv_strdup(".")
             : slash == path ? tv_strdup("/")
                             : tv_strndup(path, (size_t)(slash - path));
    f->paths[0] = tv_strdup(path);
    if (f->dir == NULL || f->paths[0] == NULL)
        return no_memory(path, err);
    f->n_paths = 1;
    return TV_OK;
}

enum tv_err tv_model_files_find(const char *path, struct tv_error *err,
                                struct tv_model_files **out)
{
    enum tv_err rc = TV_OK;
    struct tv_model_files *f = (struct tv_model_files *)tv_calloc(1, sizeof *f);

    *out = NULL;
    if (f == NULL ||
        (f->paths = (char **)tv_calloc(1, sizeof *f->paths)) == NULL) {
        rc = no_memory(path, err);
        goto out;
    }
    if (tv_path_is_dir(path)) {
        f->dir = tv_strdup(path);
        if (f->dir == NULL) {
            rc = no_memory(path, err);
            goto out;
        }
        TV_TRY(find_in_dir(f, err));
    } else if (tv_path_exists(path)) {
        TV_TRY(find_single_file(f, path, err));
    } else {
        rc = tv_error_set(err, TV_E_INPUT, "%s: no such file or directory",
                          path);
        goto out;
    }
    *out = f;
    f = NULL;
out:
    tv_model_files_free(f);
    return rc;
}
