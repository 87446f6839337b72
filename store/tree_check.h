/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tree_check.h - damage in LMDB's own pages, found before LMDB meets it.
 */
#ifndef TV_TREE_CHECK_H
#define TV_TREE_CHECK_H

#include "store_priv.h"

/* Before the environment is opened: sizes in the header that LMDB computes with
 * unseen. CORRUPT, or TV_OK (also for what LMDB itself will refuse). */
enum tv_err store_header_check(tv_store *s, struct tv_error *err);
/* After that and before anything else: every page of the newest snapshot but
 * the insides of values, and, when the store may be written, the lists of free
 * pages. CORRUPT names the page. Costs a read of all pages but those of
 * values. */
enum tv_err store_tree_check(tv_store *s, struct tv_error *err);

#endif
