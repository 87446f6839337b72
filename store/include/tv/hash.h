/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/hash.h - the checksums of design.md, over xxHash (XXH3, not
 * cryptographic: content found by hash is always compared byte by byte).
 *
 *   leaf             XXH3-128 of each 1 MiB of a tensor's payload
 *   tensor checksum  XXH3-128 over its leaves in order (16 bytes each)
 *   model digest     XXH3-128 over the tensors sorted bytewise by name, each as
 *                    u32 name length, name, dtype name padded with NUL to 16
 *                    bytes, u32 rank, u64 dims, checksum
 * A 128-bit value is stored little-endian: low half, then high half. Its hex
 * form is the usual one of xxhsum: 32 digits, high half first.
 *
 * Thread rule: a tv_hasher is used by one thread at a time; the rest are
 * functions of their arguments.
 */
#ifndef TV_HASH_H
#define TV_HASH_H

#include <stddef.h>
#include <stdint.h>

#include "tv/dtype.h"
#include "tv/error.h"

#define TV_LEAF_BYTES (1u << 20)

struct tv_hash {
    uint64_t lo, hi;
};

uint64_t tv_hash64(const void *data, size_t n);        /* XXH3-64, seed 0 */
struct tv_hash tv_hash128(const void *data, size_t n); /* XXH3-128, seed 0 */
int tv_hash_equal(struct tv_hash a, struct tv_hash b);
/* 32 hex digits and a NUL into dst [33]; returns dst. */
char *tv_hash_hex(struct tv_hash h, char dst[33]);
/* Reads 32 hex digits; 0 on success, -1 otherwise. */
int tv_hash_from_hex(const char *hex, struct tv_hash *out);
/* 16 bytes as they are stored, at any address. */
void tv_hash_put(void *dst16, struct tv_hash h);
struct tv_hash tv_hash_get(const void *src16);

/* Streaming XXH3-128: of all bytes added since opening or the last reset; value
 * may be asked for in between. */
typedef struct tv_hasher tv_hasher;
TV_NODISCARD enum tv_err tv_hasher_open(struct tv_error *err, tv_hasher **out);
void tv_hasher_add(tv_hasher *h, const void *data, size_t n);
struct tv_hash tv_hasher_value(const tv_hasher *h);
void tv_hasher_reset(tv_hasher *h);
void tv_hasher_close(tv_hasher *h); /* NULL allowed */

/* Number of leaves of a payload; 0 bytes have none. */
uint64_t tv_leaf_count(uint64_t bytes);
/* tv_hash64 of data, and in the same pass over memory a look at leaves: piece i
 * of TV_LEAF_BYTES from byte `skip` on (the last one may be shorter) should
 * have the hash want[i]. *n_same: how many do before the first that has not. */
uint64_t tv_hash64_leaves(const void *data, size_t n, size_t skip,
                          const struct tv_hash *want, size_t n_want,
                          size_t *n_same);
/* Tensor checksum from leaves [n]; fine for n = 0. */
struct tv_hash tv_leaves_checksum(const struct tv_hash *leaves, size_t n);

/* Model digest: feed tensors in bytewise name order, then take the value. */
void tv_digest_add(tv_hasher *h, const char *name, enum tv_dtype dtype,
                   const uint64_t *shape, unsigned rank,
                   struct tv_hash checksum);
#endif
