/* SPDX-License-Identifier: Apache-2.0 */
/*
 * status.h - what tvmerge status shows beside a merge.
 */
#ifndef TVC_STATUS_H
#define TVC_STATUS_H

#include "tvmerge.h"

#define TVC_COMPARE_STATE ".tvcompare" /* in the OUT of a comparison */
/* In it: {"entries": [{"name", "kind": "base|model|merge", "ref" (null of
 * merges)}]}, in the order of work. No entry's record is called so, for they
 * begin otherwise. */
#define TVC_COMPARE_LIST  ".entries.json"

/* "absent", "unfinished", "finished". */
const char *tvc_state_name(const struct tvm_status *s);
/* Prints how far the comparison in a directory is. */
TV_NODISCARD enum tv_err tvc_status_compare(struct tvc *c, const char *out);

#endif
