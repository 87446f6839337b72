/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_pickle.c - any bytes are a torch checkpoint or an error with a message.
 * Input that begins like a zip is read as a whole archive, other input as a
 * bare pickle against two storages of 64 and 16 bytes. No tensor leaves its
 * storage.
 */
#include "fuzz.h"

#include <string.h>

#include "tv/parse.h"

static bool find_storage(void *arg, const char *key, uint64_t *offset,
                         uint64_t *bytes)
{
    (void)arg;
    if (strcmp(key, "0") != 0 && strcmp(key, "1") != 0)
        return false;
    *offset = key[0] == '0' ? 1000 : 2000;
    *bytes = key[0] == '0' ? 64 : 16;
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    const bool zip = size >= 2 && data[0] == 'P' && data[1] == 'K';
    struct tv_parsed_file *p = NULL;
    struct tv_error err;
    enum tv_err rc = TV_OK;

    tv_error_clear(&err);
    if (zip)
        rc = tv_torch_parse(data, size, "f", &err, &p);
    else
        rc = tv_pickle_parse(data, size, "f", find_storage, NULL, &err, &p);
    if (rc != TV_OK) {
        FUZZ_CHECK(err.msg[0] != '\0' && p == NULL);
        return 0;
    }
    for (size_t i = 0; i < p->n; i++) {
        const struct tv_parsed_tensor *t = &p->items[i];

        FUZZ_CHECK(t->name[0] != '\0' && t->rank <= TV_RANK_MAX);
        FUZZ_CHECK(!t->contiguous || t->span == t->bytes);
        if (zip)
            FUZZ_CHECK(t->offset <= size && t->span <= size - t->offset);
        else if (t->offset < 2000)
            FUZZ_CHECK(t->offset >= 1000 && t->offset + t->span <= 1064);
        else
            FUZZ_CHECK(t->offset + t->span <= 2016);
    }
    tv_parsed_free(p);
    return 0;
}
