/* SPDX-License-Identifier: Apache-2.0 */
/*
 * npy.c - see npy.h.
 */
#include <stdlib.h>
#include <string.h>

#include "test.h"

#include "npy.h"
#include "tv/checked.h"
#include "tv/sys.h"

void npy_read(const char *path, const char *type, struct npy *out)
{
    struct tv_error err = {0};
    size_t n = 0;

    memset(out, 0, sizeof(*out));
    assert_ok(tv_file_read(path, 1u << 24, &err, &out->file, &n), &err);
    assert_true(n > 10 && !memcmp(out->file, "\x93NUMPY\x01", 7));
    const size_t header = tv_get_le16(out->file + 8);
    assert_true(header + 10 <= n);
    assert_non_null(strstr(out->file + 10, type));
    assert_non_null(strstr(out->file + 10, "'fortran_order': False"));
    const char *p = strstr(out->file + 10, "'shape': (");
    assert_non_null(p);
    for (p += 10; *p != ')'; p += strcspn(p, "0123456789)")) {
        char *end = NULL;
        assert_true(out->n_dims < 3);
        out->shape[out->n_dims++] = strtoul(p, &end, 10);
        p = end;
    }
    out->data = out->file + 10 + header;
}
