/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_adapter.c - any bytes are an adapter_config.json or an error with a
 * message, and its patterns can be matched in bounded time.
 */
#include "fuzz.h"

#include "tv/parse.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct tv_lora_config *c = NULL;
    struct tv_error err;
    uint64_t r = 0;
    double alpha = 0;

    tv_error_clear(&err);
    if (tv_lora_config_parse((const char *)data, size, "f", &err, &c) !=
        TV_OK) {
        FUZZ_CHECK(err.msg[0] != '\0' && c == NULL);
        return 0;
    }
    FUZZ_CHECK(c->r > 0);
    if (tv_lora_config_for(c, "model.layers.0.self_attn.q_proj", &r, &alpha,
                           &err) == TV_OK)
        FUZZ_CHECK(r > 0);
    tv_lora_config_free(c);
    return 0;
}
