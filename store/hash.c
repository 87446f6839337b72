/* SPDX-License-Identifier: Apache-2.0 */
/*
 * hash.c - XXH3 behind our own types; tv/hash.h says what is hashed how.
 *
 * The streaming state lives in memory of tv_alloc, not of xxHash, so that
 * allocation faults and the peak counter see it. It must be 64-byte aligned.
 */
#include "tv/hash.h"

#include <string.h>

#include "xxh.h"

#include "tv/alloc.h"
#include "tv/checked.h"

struct tv_hasher {
    XXH3_state_t state;
};

static struct tv_hash from_xxh(XXH128_hash_t h)
{
    return (struct tv_hash){.lo = h.low64, .hi = h.high64};
}

uint64_t tv_hash64(const void *data, size_t n)
{
    return XXH3_64bits(data, n);
}

struct tv_hash tv_hash128(const void *data, size_t n)
{
    return from_xxh(XXH3_128bits(data, n));
}

int tv_hash_equal(struct tv_hash a, struct tv_hash b)
{
    return a.lo == b.lo && a.hi == b.hi;
}

char *tv_hash_hex(struct tv_hash h, char dst[33])
{
    static const char digits[] = "0123456789abcdef";
    for (int i = 0; i < 16; i++) {
        dst[i] = digits[(h.hi >> (60 - 4 * i)) & 15];
        dst[16 + i] = digits[(h.lo >> (60 - 4 * i)) & 15];
    }
    dst[32] = '\0';
    return dst;
}

int tv_hash_from_hex(const char *hex, struct tv_hash *out)
{
    uint64_t half[2] = {0, 0};
    for (int i = 0; i < 32; i++) {
        const char c = hex[i];
        unsigned v = 0;
        if (c >= '0' && c <= '9')
            v = (unsigned)(c - '0');
        else if (c >= 'a' && c <= 'f')
            v = (unsigned)(c - 'a') + 10;
        else if (c >= 'A' && c <= 'F')
            v = (unsigned)(c - 'A') + 10;
        else
            return -1;
        half[i / 16] = (half[i / 16] << 4) | v;
    }
    if (hex[32] != '\0')
        return -1;
    *out = (struct tv_hash){.lo = half[1], .hi = half[0]};
    return 0;
}

void tv_hash_put(void *dst16, struct tv_hash h)
{
    unsigned char *p = (unsigned char *)dst16;
    tv_put_le64(p, h.lo);
    tv_put_le64(p + 8, h.hi);
}

struct tv_hash tv_hash_get(const void *src16)
{
    const unsigned char *p = (const unsigned char *)src16;
    return (struct tv_hash){.lo = tv_get_le64(p), .hi = tv_get_le64(p + 8)};
}

enum tv_err tv_hasher_open(struct tv_error *err, tv_hasher **out)
{
    *out = NULL;
    tv_hasher *h = (tv_hasher *)tv_alloc_aligned(sizeof *h);
    if (h == NULL)
        return tv_error_set(err, TV_E_NOMEM, "no memory for a hash state");
    memset(h, 0, sizeof *h);
    XXH3_128bits_reset(&h->state);
    *out = h;
    return TV_OK;
}

void tv_hasher_add(tv_hasher *h, const void *data, size_t n)
{
    if (n != 0)
        XXH3_128bits_update(&h->state, data, n);
}

struct tv_hash tv_hasher_value(const tv_hasher *h)
{
    return from_xxh(XXH3_128bits_digest(&h->state));
}

void tv_hasher_reset(tv_hasher *h)
{
    XXH3_128bits_reset(&h->state);
}

void tv_hasher_close(tv_hasher *h)
{
    tv_free(h);
}

uint64_t tv_leaf_count(uint64_t bytes)
{
    return bytes / TV_LEAF_BYTES + (bytes % TV_LEAF_BYTES != 0);
}

uint64_t tv_hash64_leaves(const void *data, size_t n, size_t skip,
                          const struct tv_hash *want, size_t n_want,
                          size_t *n_same)
{
    const unsigned char *p = (const unsigned char *)data;
    XXH3_state_t st;
    size_t at = skip;
    size_t same = 0;
    memset(&st, 0, sizeof st);
    XXH3_64bits_reset(&st);
    XXH3_64bits_update(&st, p, skip);
    for (size_t i = 0; i < n_want; i++) {
        const size_t part = n - at < TV_LEAF_BYTES ? n - at : TV_LEAF_BYTES;
        if (same == i && tv_hash_equal(tv_hash128(p + at, part), want[i]))
            same++;
        XXH3_64bits_update(&st, p + at, part);
        at += part;
    }
    XXH3_64bits_update(&st, p + at, n - at);
    *n_same = same;
    return XXH3_64bits_digest(&st);
}

struct tv_hash tv_leaves_checksum(const struct tv_hash *leaves, size_t n)
{
    XXH3_state_t st;
    memset(&st, 0, sizeof st);
    XXH3_128bits_reset(&st);
    for (size_t i = 0; i < n; i++) {
        unsigned char b[16];
        tv_hash_put(b, leaves[i]);
        XXH3_128bits_update(&st, b, sizeof b);
    }
    return from_xxh(XXH3_128bits_digest(&st));
}

void tv_digest_add(tv_hasher *h, const char *name, enum tv_dtype dtype,
                   const uint64_t *shape, unsigned rank,
                   struct tv_hash checksum)
{
    const size_t len = strlen(name);
    unsigned char b[16];
    tv_put_le32(b, (uint32_t)len);
    tv_hasher_add(h, b, 4);
    tv_hasher_add(h, name, len);
    memset(b, 0, sizeof b);
    const char *dn = tv_dtype_name(dtype);
    const size_t dlen = strlen(dn);
    memcpy(b, dn, dlen < sizeof b ? dlen : sizeof b);
    tv_hasher_add(h, b, sizeof b);
    tv_put_le32(b, rank);
    tv_hasher_add(h, b, 4);
    for (unsigned i = 0; i < rank; i++) {
        tv_put_le64(b, shape[i]);
        tv_hasher_add(h, b, 8);
    }
    tv_hash_put(b, checksum);
    tv_hasher_add(h, b, sizeof b);
}
