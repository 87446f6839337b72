/* SPDX-License-Identifier: Apache-2.0 */
/*
 * xxh.h - xxHash as the store uses it (private).
 *
 * A distribution's library is compiled for the oldest processor it supports.
 * On x86-64 it may also hold the same functions for AVX2 and AVX-512, chosen
 * when they are called: twice as fast, and hashing is a third of what a linear
 * merge computes. The values are the same.
 */
#ifndef TV_XXH_H
#define TV_XXH_H

#define XXH_STATIC_LINKING_ONLY
#include <xxhash.h>
#if TV_XXH_DISPATCH
#include <xxh_x86dispatch.h>
#endif

#endif
