/* SPDX-License-Identifier: Apache-2.0 */
/*
 * describe.h - short descriptions for the tests of this folder: a model is a
 * config text and a list of names, each with the two dimensions it needs.
 */
#ifndef TV_TEST_DESCRIBE_H
#define TV_TEST_DESCRIBE_H

#include <stdint.h>

#include "tv/model.h"

struct named {
    const char *name;
    uint64_t rows, cols; /* cols 0: one dimension */
};

/* config may be NULL; the list ends with a NULL name. */
enum tv_err describe(const char *config, const struct named *list,
                     struct tv_error *err, struct tv_arch **out);
/* The entry of that name; fails the test when there is none. */
const struct tv_arch_tensor *entry(const struct tv_arch *a, const char *name);
/* Fails the test unless name has that role, part and layer. */
void expect(const struct tv_arch *a, const char *name, enum tv_role role,
            enum tv_part part, int64_t layer);
#endif
