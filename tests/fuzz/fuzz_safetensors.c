/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_safetensors.c - any bytes are a safetensors file or an error with a
 * message; what is accepted covers the file exactly.
 */
#include "fuzz.h"

#include "tv/format.h"
#include "tv/parse.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct tv_parsed_file *p = NULL;
    struct tv_error err;
    uint64_t at = 0;

    tv_error_clear(&err);
    if (tv_safetensors_parse(data, size, "f", &err, &p) != TV_OK) {
        FUZZ_CHECK(err.msg[0] != '\0' && p == NULL);
        return 0;
    }
    at = p->header_bytes;
    FUZZ_CHECK(p->n <= TV_ST_TENSORS_MAX);
    for (size_t i = 0; i < p->n; i++) {
        const struct tv_parsed_tensor *t = &p->items[i];

        FUZZ_CHECK(t->offset == at && t->bytes <= size - at);
        FUZZ_CHECK(t->name[0] != '\0' && t->rank <= TV_RANK_MAX);
        at += t->bytes;
    }
    FUZZ_CHECK(at == size);
    tv_parsed_free(p);
    return 0;
}
