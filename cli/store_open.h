/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store_open.h - opening the store that a command line names.
 */
#ifndef TVC_STORE_OPEN_H
#define TVC_STORE_OPEN_H

#include "cli.h"
#include "tv/store.h"

/* Opens with the memory options of the command line. */
TV_NODISCARD enum tv_err tvc_store_open(struct tvc *c, const char *path,
                                        bool read_only, struct tv_error *err,
                                        tv_store **out);
/* Says whom a command waits for. */
struct tv_wait tvc_wait(struct tvc *c);
/* "NAME" alone, in the JSON form that ls and info share. New reference. */
json_t *tvc_object_json(const struct tv_object *o);

#endif
