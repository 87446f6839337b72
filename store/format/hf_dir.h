/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hf_dir.h - what lies in a model or adapter directory. Looks at names only,
 * and reads the index when there is one.
 */
#ifndef TV_HF_DIR_H
#define TV_HF_DIR_H

#include <stdbool.h>
#include <stddef.h>

#include "tv/error.h"
#include "tv/parse.h"
#include "tv/store.h"

struct tv_model_files { /* owned: tv_model_files_free */
    enum tv_kind kind;
    char *dir;    /* the directory; of a single file: its own */
    bool torch;   /* .bin files */
    char **paths; /* weight files */
    size_t n_paths;
    struct tv_index *index; /* NULL for a single file; files as paths */
    char **sides;           /* names of the side files present */
    size_t n_sides;
};
/* path: directory or file. INPUT when there is no model. */
TV_NODISCARD enum tv_err tv_model_files_find(const char *path,
                                             struct tv_error *err,
                                             struct tv_model_files **out);
void tv_model_files_free(struct tv_model_files *f); /* NULL allowed */

/* Names of side files that travel with a model or an adapter. */
const char *const *tv_side_names(size_t *n);
/* The absolute path without links, owned; NULL when there is none. */
char *tv_absolute_path(const char *path);
/* True for a plain file name: no directory part, not "." or "..". */
bool tv_plain_name(const char *name);
#endif
