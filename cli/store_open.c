/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store_open.c - see store_open.h.
 */
#include "store_open.h"

enum tv_err tvc_store_open(const struct tvc *c, const char *path,
                           bool read_only, struct tv_error *err, tv_store **out)
{
    /* design.md: dirty values are anonymous memory, at most a quarter of it. */
    const uint64_t quarter = c->memory_bytes / 4;
    const uint64_t most = UINT64_C(64) << 20;
    const struct tv_store_options opt = {
        .read_only = read_only,
        .dirty_bytes_max = quarter < most ? quarter : most,
    };
    return tv_store_open(path, &opt, err, out);
}

json_t *tvc_object_json(const struct tv_object *o)
{
    return json_pack("{s:o, s:s, s:o, s:o, s:o, s:b, s:b}", "name",
                     tvc_json_string(o->name), "kind", tv_kind_name(o->kind),
                     "architecture", tvc_json_string(o->architecture),
                     "n_tensors", tvc_json_u64(o->n_tensors), "bytes",
                     tvc_json_u64(o->bytes), "linked", o->linked, "complete",
                     o->complete);
}
