/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/checked.h - overflow-checked arithmetic and explicit little-endian bytes.
 *
 * Every product or sum of numbers that come from outside goes through these.
 */
#ifndef TV_CHECKED_H
#define TV_CHECKED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* True on success; *out is untouched on overflow. */
static inline bool tv_mul_u64(uint64_t a, uint64_t b, uint64_t *out)
{
    uint64_t r = 0;
    if (__builtin_mul_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

static inline bool tv_add_u64(uint64_t a, uint64_t b, uint64_t *out)
{
    uint64_t r = 0;
    if (__builtin_add_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

static inline bool tv_mul_size(size_t a, size_t b, size_t *out)
{
    size_t r = 0;
    if (__builtin_mul_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

static inline bool tv_add_size(size_t a, size_t b, size_t *out)
{
    size_t r = 0;
    if (__builtin_add_overflow(a, b, &r))
        return false;
    *out = r;
    return true;
}

static inline uint16_t tv_get_le16(const void *p)
{
    const unsigned char *b = (const unsigned char *)p;
    return (uint16_t)(b[0] | (b[1] << 8));
}

static inline uint32_t tv_get_le32(const void *p)
{
    const unsigned char *b = (const unsigned char *)p;
    return (uint32_t)b[0] | ((uint32_t)b[1] << 8) | ((uint32_t)b[2] << 16) |
           ((uint32_t)b[3] << 24);
}

static inline uint64_t tv_get_le64(const void *p)
{
    const unsigned char *b = (const unsigned char *)p;
    return (uint64_t)tv_get_le32(b) | ((uint64_t)tv_get_le32(b + 4) << 32);
}

static inline void tv_put_le16(void *p, uint16_t v)
{
    unsigned char *b = (unsigned char *)p;
    b[0] = (unsigned char)(v & 0xff);
    b[1] = (unsigned char)(v >> 8);
}

static inline void tv_put_le32(void *p, uint32_t v)
{
    unsigned char *b = (unsigned char *)p;
    for (int i = 0; i < 4; i++)
        b[i] = (unsigned char)((v >> (8 * i)) & 0xff);
}

static inline void tv_put_le64(void *p, uint64_t v)
{
    unsigned char *b = (unsigned char *)p;
    for (int i = 0; i < 8; i++)
        b[i] = (unsigned char)((v >> (8 * i)) & 0xff);
}

/* Big-endian writers are for LMDB keys only: cursors then walk in order. */
static inline void tv_put_be32(void *p, uint32_t v)
{
    unsigned char *b = (unsigned char *)p;
    for (int i = 0; i < 4; i++)
        b[i] = (unsigned char)((v >> (24 - 8 * i)) & 0xff);
}

static inline void tv_put_be64(void *p, uint64_t v)
{
    unsigned char *b = (unsigned char *)p;
    for (int i = 0; i < 8; i++)
        b[i] = (unsigned char)((v >> (56 - 8 * i)) & 0xff);
}

static inline uint32_t tv_get_be32(const void *p)
{
    const unsigned char *b = (const unsigned char *)p;
    return (uint32_t)b[3] | ((uint32_t)b[2] << 8) | ((uint32_t)b[1] << 16) |
           ((uint32_t)b[0] << 24);
}

static inline uint64_t tv_get_be64(const void *p)
{
    const unsigned char *b = (const unsigned char *)p;
    return (uint64_t)tv_get_be32(b + 4) | ((uint64_t)tv_get_be32(b) << 32);
}

#endif
