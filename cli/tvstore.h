/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tvstore.h - the commands of tvstore, one table row each.
 */
#ifndef TVC_TVSTORE_H
#define TVC_TVSTORE_H

#include "cli.h"

extern const struct tvc_command tvc_cmd_init, tvc_cmd_import, tvc_cmd_ls,
    tvc_cmd_info, tvc_cmd_cat, tvc_cmd_export, tvc_cmd_diff, tvc_cmd_stat,
    tvc_cmd_quota, tvc_cmd_verify, tvc_cmd_rm, tvc_cmd_gc, tvc_cmd_mask,
    tvc_cmd_compact;

#endif
