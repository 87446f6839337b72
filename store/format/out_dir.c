/* SPDX-License-Identifier: Apache-2.0 */
/*
 * out_dir.c - the directory that an output is written into: what is no place
 * for one, and which files of an earlier output would be taken for a part of
 * the new one.
 */
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/sys.h"
#include "tv/text.h"

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory");
}

/* EXISTS when dir holds `name`, which makes it `what`. */
static enum tv_err refuse(const char *dir, const char *name, const char *what,
                          struct tv_error *err)
{
    struct stat st;
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(dir, name);

    if (!path)
        return no_memory(err);
    if (tv_sys()->stat(path, &st) == 0) {
        rc = tv_error_set(err, TV_E_EXISTS, "%s is %s", dir, what);
        tv_error_hint(err, "give another directory; --force writes into none "
                           "that holds more than one output");
    } else if (errno != ENOENT) {
        rc = tv_error_sys(err, errno, "cannot look at %s", path);
    }
    tv_free(path);
    return rc;
}

/* Others use LMDB too: a data.mdb alone is no store of ours. */
static enum tv_err look_for_store(const char *dir, bool *is_store,
                                  struct tv_error *err)
{
    char *data = tv_path_join(dir, "data.mdb");
    char *lock = tv_path_join(dir, "open.lock");
    const enum tv_err rc = data && lock ? TV_OK : no_memory(err);

    *is_store = rc == TV_OK && tv_path_exists(data) && tv_path_exists(lock);
    tv_free(lock);
    tv_free(data);
    return rc;
}

/* A store's directory is its own, with all that is below. */
static enum tv_err refuse_inside(const char *dir, bool exists,
                                 struct tv_error *err)
{
    char *from = exists ? tv_path_join(dir, "..") : tv_path_existing(dir);
    struct stat here, before = {.st_ino = 0};
    struct tv_buf path;
    enum tv_err rc = TV_OK;
    bool inside = false;

    tv_buf_init(&path, 1u << 16);
    tv_buf_str(&path, from ? from : "");
    for (unsigned i = 0; i < 1000; i++) {
        if (!from || path.failed)
            rc = no_memory(err);
        else
            rc = look_for_store(path.data, &inside, err);
        if (rc != TV_OK || inside || tv_sys()->stat(path.data, &here) != 0 ||
            (i > 0 && here.st_dev == before.st_dev &&
             here.st_ino == before.st_ino))
            break;
        before = here;
        tv_buf_str(&path, "/..");
    }
    if (inside) {
        rc = tv_error_set(err, TV_E_EXISTS, "%s lies inside a store", dir);
        tv_error_hint(err, "give another directory");
    }
    tv_buf_free(&path);
    tv_free(from);
    return rc;
}

enum tv_err tv_out_dir_check(const char *dir, struct tv_error *err,
                             bool *exists)
{
    struct stat st;
    enum tv_err rc = TV_OK;

    *exists = false;
    if (strncmp(dir, "store:", 6) == 0) {
        tv_error_set(err, TV_E_INPUT,
                     "'%s' names an object of a store, no directory", dir);
        tv_error_hint(err,
                      "'tvmerge run --into %s --store STORE' merges into a "
                      "store; './%s' is a directory",
                      dir + 6, dir);
        return TV_E_INPUT;
    }
    if (tv_sys()->stat(dir, &st) != 0) {
        if (errno == ENOTDIR)
            return tv_error_set(err, TV_E_EXISTS,
                                "%s cannot be made: a part of its path is "
                                "not a directory",
                                dir);
        if ((errno == ENOENT || errno == ELOOP) &&
            tv_sys()->lstat(dir, &st) == 0)
            return tv_error_set(err, TV_E_EXISTS,
                                "%s is a symbolic link that leads nowhere",
                                dir);
        return errno == ENOENT
                   ? refuse_inside(dir, false, err)
                   : tv_error_sys(err, errno, "cannot look at %s", dir);
    }
    if (!S_ISDIR(st.st_mode))
        return tv_error_set(err, TV_E_EXISTS, "%s is not a directory", dir);
    TV_TRY(refuse(dir, "data.mdb", "a store", err));
    TV_TRY(refuse(dir, ".tvcompare", "a comparison of 'tvmerge compare'", err));
    TV_TRY(refuse_inside(dir, true, err));
    *exists = true;
out:
    return rc;
}

enum tv_err tv_out_dir_links(const char *dir, tv_store *store,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tv_read *read = NULL;
    char **names = NULL;
    char *path = NULL;
    size_t n = 0;

    if (!store || !tv_path_is_dir(dir))
        return TV_OK;
    TV_TRY(tv_read_begin(store, err, &read));
    TV_TRY(tv_dir_list(dir, err, &names, &n));
    for (size_t i = 0; i < n; i++) {
        bool used = false;

        tv_free(path);
        path = tv_path_join(dir, names[i]);
        if (!path) {
            rc = no_memory(err);
            goto out;
        }
        TV_TRY(tv_source_is_used(read, path, &used, err));
        if (!used)
            continue;
        rc = tv_error_set(err, TV_E_INPUT,
                          "%s belongs to a linked object of the store %s and "
                          "is not replaced",
                          path, tv_store_path(store));
        tv_error_hint(err, "write into another directory");
        goto out;
    }
out:
    tv_free(path);
    tv_dir_list_free(names, n);
    tv_read_end(read);
    return rc;
}

static bool ends_with(const char *s, const char *suffix)
{
    const size_t n = strlen(s);
    const size_t k = strlen(suffix);

    return n >= k && strcmp(s + n - k, suffix) == 0;
}

bool tv_out_is_config(const char *name)
{
    return strcmp(name, "config.json") == 0 ||
           strcmp(name, "adapter_config.json") == 0;
}

bool tv_out_is_weights(const char *name)
{
    static const char *const starts[] = {"model-", "model.safetensors",
                                         "adapter_model.", "pytorch_model-",
                                         "pytorch_model.bin"};
    bool starts_well = false;

    for (size_t i = 0; i < sizeof starts / sizeof *starts; i++)
        starts_well =
            starts_well || strncmp(name, starts[i], strlen(starts[i])) == 0;
    return starts_well &&
           (ends_with(name, ".safetensors") || ends_with(name, ".bin") ||
            ends_with(name, ".index.json"));
}
