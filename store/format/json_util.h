/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_util.h - what store/format adds around jansson: limits checked before
 * jansson sees a byte, one way to dump, and safe names in messages.
 */
#ifndef TV_JSON_UTIL_H
#define TV_JSON_UTIL_H

#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>

#include "tv/error.h"
#include "tv/text.h"

struct tv_json_limits {
    size_t bytes_max;
    unsigned depth_max;
    size_t members_max;       /* of the outermost object */
    size_t values_per_member; /* average over the outermost object ... */
    size_t values_free;       /* ... on top of which so many are free */
};
/* Limits of side files (config.json, adapter_config.json, an index). */
extern const struct tv_json_limits tv_json_side_limits;

/* Parses a JSON object; strict UTF-8, duplicate keys refused. CORRUPT with
 * label and byte position (base + offset in data). json_decref(*out). */
TV_NODISCARD enum tv_err tv_json_load(const char *data, size_t n,
                                      const char *label, size_t base,
                                      const struct tv_json_limits *lim,
                                      struct tv_error *err, json_t **out);
/* Appends the dump to b (check with tv_buf_ok). */
void tv_json_dump(const json_t *json, size_t flags, struct tv_buf *b);

/* A foreign name made fit for a message: control characters replaced, cut. */
#define TV_SHOW_MAX 168
struct tv_shown {
    char s[TV_SHOW_MAX];
};
const char *tv_show(const char *name, struct tv_shown *buf);
#endif
