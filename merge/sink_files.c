/* SPDX-License-Identifier: Apache-2.0 */
/*
 * sink_files.c - files of OUT and OUT/.tvmerge by directory and name.
 */
#include "sink_dir.h"

#include <errno.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/sys.h"

int64_t sink_file_bytes(const char *dir, const char *name)
{
    struct stat st;
    char *path = tv_path_join(dir, name);
    int64_t n = -1;

    if (path && tv_sys()->stat(path, &st) == 0 && S_ISREG(st.st_mode))
        n = (int64_t)st.st_size;
    tv_free(path);
    return n;
}

enum tv_err sink_probe(const char *dir, const char *name, bool *found,
                       struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct stat st;
    char *path = tv_path_join(dir, name);

    *found = false;
    if (!path)
        return sink_no_memory(err);
    if (tv_sys()->stat(path, &st) == 0)
        *found = true;
    else if (errno != ENOENT && errno != ENOTDIR)
        rc = tv_error_sys(err, errno, "cannot look at %s", path);
    tv_free(path);
    return rc;
}

enum tv_err sink_rename(const char *from_dir, const char *from,
                        const char *to_dir, const char *to,
                        struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *a = tv_path_join(from_dir, from);
    char *b = tv_path_join(to_dir, to);

    if (!a || !b)
        rc = sink_no_memory(err);
    else if (tv_sys()->rename(a, b) != 0)
        rc = tv_error_sys(err, errno, "cannot rename %s to %s", a, b);
    tv_free(a);
    tv_free(b);
    return rc;
}

enum tv_err sink_remove(const char *dir, const char *name, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char *path = tv_path_join(dir, name);

    if (!path)
        rc = sink_no_memory(err);
    else if (tv_sys()->unlink(path) != 0 && errno != ENOENT)
        rc = tv_error_sys(err, errno, "cannot remove %s", path);
    tv_free(path);
    return rc;
}

static enum tv_err remove_entry(const char *dir, const char *name,
                                struct tv_error *err)
{
    char *path = tv_path_join(dir, name);
    enum tv_err rc = TV_OK;

    if (!path)
        return sink_no_memory(err);
    if (tv_path_is_dir(path))
        rc = tv_dir_remove(path, err);
    else
        rc = sink_remove(dir, name, err);
    tv_free(path);
    return rc;
}

enum tv_err sink_remove_config(struct sink_dir *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    /* Synced even when there is none: a killed run may have removed it. */
    TV_TRY(sink_remove(s->out, SINK_CONFIG_FILE, err));
    TV_TRY(sink_remove(s->out, "adapter_config.json", err));
    if (s->sync)
        rc = tv_dir_sync(s->out, err);
out:
    return rc;
}

enum tv_err sink_clear_state(struct sink_dir *s, const char *keep,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    char **names = NULL;
    size_t n = 0;

    TV_TRY(tv_dir_list(s->dir, err, &names, &n));
    for (size_t i = 0; i < n; i++)
        if (strcmp(names[i], SINK_LOCK_FILE) != 0 &&
            (!keep || strcmp(names[i], keep) != 0))
            TV_TRY(remove_entry(s->dir, names[i], err));
out:
    tv_dir_list_free(names, n);
    return rc;
}
