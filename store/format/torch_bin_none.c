/* SPDX-License-Identifier: Apache-2.0 */
/*
 * torch_bin_none.c - in place of torch_bin.c where minizip is not installed:
 * says so.
 */
#include "tv/parse.h"

enum tv_err tv_torch_parse(const void *data, uint64_t n, const char *label,
                           struct tv_error *err, struct tv_parsed_file **out)
{
    (void)data;
    (void)n;
    *out = NULL;
    return tv_error_set(err, TV_E_UNSUPPORTED,
                        "%s: this build has no minizip and cannot read .bin "
                        "checkpoints",
                        label);
}
