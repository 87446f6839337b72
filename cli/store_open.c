/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store_open.c - see store_open.h.
 */
#include "store_open.h"

static void waiting(void *arg, const char *what, const char *holder,
                    unsigned timeout_ms)
{
    if (timeout_ms > 0)
        tvc_note(arg, "%s is in use by %s: waiting %g s at most", what, holder,
                 timeout_ms / 1000.0);
}

struct tv_wait tvc_wait(struct tvc *c)
{
    return (struct tv_wait){waiting, &c->out};
}

enum tv_err tvc_store_open(struct tvc *c, const char *path, bool read_only,
                           struct tv_error *err, tv_store **out)
{
    /* design.md: dirty values are anonymous memory, at most a quarter of it. */
    const uint64_t quarter = c->memory_bytes / 4;
    const uint64_t most = UINT64_C(64) << 20;
    const struct tv_store_options opt = {
        .wait = tvc_wait(c),
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
