/* SPDX-License-Identifier: Apache-2.0 */
/*
 * describe.c - see describe.h.
 */
#include <stdlib.h>
#include <string.h>

#include "test.h"

#include "describe.h"

enum tv_err describe(const char *config, const struct named *list,
                     struct tv_error *err, struct tv_arch **out)
{
    static uint64_t shapes[128][2];
    static struct tv_arch_name names[128];
    size_t n = 0;

    for (; list[n].name; n++) {
        assert_true(n < 128);
        shapes[n][0] = list[n].rows;
        shapes[n][1] = list[n].cols;
        names[n].name = list[n].name;
        names[n].rank = list[n].cols ? 2 : 1;
        names[n].shape = shapes[n];
    }
    return tv_arch_describe(config, config ? strlen(config) : 0, names, n, err,
                            out);
}

const struct tv_arch_tensor *entry(const struct tv_arch *a, const char *name)
{
    for (size_t i = 0; i < a->n_tensors; i++)
        if (!strcmp(a->tensors[i].name, name))
            return &a->tensors[i];
    fail_msg("no tensor %s", name);
    return NULL;
}

void expect(const struct tv_arch *a, const char *name, enum tv_role role,
            enum tv_part part, int64_t layer)
{
    const struct tv_arch_tensor *const t = entry(a, name);

    if (t->role != role || t->part != part || t->layer != layer)
        fail_msg("%s: role %s, part %d, layer %lld; expected %s, %d, %lld",
                 name, tv_role_name(t->role), (int)t->part, (long long)t->layer,
                 tv_role_name(role), (int)part, (long long)layer);
    if (layer >= 0) {
        assert_true(t->layer_len > 0);
        assert_int_equal(strtoll(name + t->layer_at, NULL, 10), layer);
    }
}
