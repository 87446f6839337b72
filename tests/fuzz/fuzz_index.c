/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_index.c - any bytes are an index or an error with a message; its file
 * names stay in their directory.
 */
#include "fuzz.h"

#include <string.h>

#include "tv/parse.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct tv_index *x = NULL;
    struct tv_error err;

    tv_error_clear(&err);
    if (tv_index_parse((const char *)data, size, "f", ".safetensors", &err,
                       &x) != TV_OK) {
        FUZZ_CHECK(err.msg[0] != '\0' && x == NULL);
        return 0;
    }
    FUZZ_CHECK(x->n > 0 && x->n_files > 0);
    for (size_t i = 0; i < x->n_files; i++) {
        FUZZ_CHECK(strchr(x->files[i], '/') == NULL && x->files[i][0] != '.');
        FUZZ_CHECK(i == 0 || strcmp(x->files[i - 1], x->files[i]) < 0);
    }
    for (size_t i = 0; i < x->n; i++) {
        FUZZ_CHECK(x->items[i].file < x->n_files);
        FUZZ_CHECK(i == 0 ||
                   strcmp(x->items[i - 1].name, x->items[i].name) < 0);
    }
    tv_index_free(x);
    return 0;
}
