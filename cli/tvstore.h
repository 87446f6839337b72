/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tvstore.h - the commands of tvstore, one table row each.
 */
#ifndef TVC_TVSTORE_H
#define TVC_TVSTORE_H

#include "cli.h"
#include "tv/store.h"

extern const struct tvc_command tvc_cmd_init, tvc_cmd_import, tvc_cmd_ls,
    tvc_cmd_info, tvc_cmd_cat, tvc_cmd_export, tvc_cmd_diff, tvc_cmd_stat,
    tvc_cmd_quota, tvc_cmd_verify, tvc_cmd_rm, tvc_cmd_gc, tvc_cmd_mask,
    tvc_cmd_compact;

/* NOTFOUND of a tensor, with one of a like name as hint. */
TV_NODISCARD enum tv_err tvc_no_tensor(struct tvc *c, const char *object,
                                       const char *tensor,
                                       const struct tv_tensor_list *list);

#endif
