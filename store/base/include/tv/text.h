/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/text.h - growable buffers, sizes, suggestions, name order.
 *
 * Thread rule: a buffer is used by one thread at a time; the rest are functions
 * of their arguments.
 */
#ifndef TV_TEXT_H
#define TV_TEXT_H

#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/error.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Growable bytes, always NUL-terminated once non-empty. Given its maximum at
 * birth; a failed append sets `failed` and later appends do nothing, so callers
 * check once at the end with tv_buf_ok. */
struct tv_buf {
    char *data;
    size_t n_bytes, cap_bytes, max_bytes;
    bool failed;
    bool too_long; /* failed because of max_bytes, not for lack of memory */
};
void tv_buf_init(struct tv_buf *b, size_t max_bytes);
void tv_buf_free(struct tv_buf *b); /* a zeroed one: no-op */
/* Append: bytes, a string, printf, little-endian numbers. */
void tv_buf_add(struct tv_buf *b, const void *data, size_t n);
void tv_buf_str(struct tv_buf *b, const char *s);
void tv_buf_fmt(struct tv_buf *b, const char *fmt, ...) TV_PRINTF(2, 3);
void tv_buf_le32(struct tv_buf *b, uint32_t v);
void tv_buf_le64(struct tv_buf *b, uint64_t v);
/* NOMEM when an append failed; INPUT when it was one beyond the maximum. */
TV_NODISCARD enum tv_err tv_buf_ok(const struct tv_buf *b,
                                   struct tv_error *err);

/* Strict UTF-8 (no surrogates, no overlong forms, at most U+10FFFF). */
bool tv_utf8_valid(const char *s, size_t n);
/* Bytes of s that fit a terminal: control characters become '?'; filled. */
char *tv_text_printable(const char *s, char *dst, size_t cap);

/* "500M" 10^6, "500MB" 10^6, "500MiB" 2^20, "5B" of mergekit = 5*10^9 only
 * when `mergekit_b`, plain bytes; case-insensitive; TV_E_USAGE otherwise. */
TV_NODISCARD enum tv_err tv_parse_bytes(const char *s, bool mergekit_b,
                                        uint64_t *bytes, struct tv_error *err);
/* "1.2 GiB" into dst (cap >= 32); returns dst. */
char *tv_format_bytes(uint64_t bytes, char *dst, size_t cap);
/* The same rounded up, for what somebody has to give at least. */
char *tv_format_bytes_up(uint64_t bytes, char *dst, size_t cap);
/* The same as one word for a command line: "1.2GiB". */
char *tv_format_bytes_arg(uint64_t bytes, char *dst, size_t cap);

/* The entry of `words` nearest to `word` by Damerau distance, when near enough
 * to be a typing mistake; else NULL. Borrowed from `words`. */
const char *tv_suggest(const char *word, const char *const *words, size_t n);

/* Layer order: like strcmp, but runs of digits compare as numbers, so that
 * layers.2 comes before layers.10. Total order (equal only when identical). */
int tv_name_compare(const char *a, const char *b);

#ifdef __cplusplus
}
#endif
#endif
