/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_info.h - what an adapter of a store does, for ls and info.
 */
#ifndef TVC_ADAPTER_INFO_H
#define TVC_ADAPTER_INFO_H

#include "cli.h"
#include "tv/store.h"

/* {"rank","alpha","scaling","target_modules","norm","modules":[{"name","kind",
 * "target","rank","alpha","scaling","dora","norm"}]} of an adapter object; null
 * values where modules differ or a norm needs the base. NULL with a warning
 * when the adapter is none that we can apply. */
TV_NODISCARD enum tv_err tvc_adapter_json(struct tvc *c, tv_store *store,
                                          const char *name, json_t **out);
/* The same as lines and a table. */
TV_NODISCARD enum tv_err tvc_adapter_lines(struct tvc *c, const json_t *j);

#endif
