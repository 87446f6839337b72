/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_char.c - characters and their classes, and small JSON helpers.
 *
 * Classes are those of the Rust standard library and its regex crate, because
 * the `tokenizers` library uses them; categories come from utf8proc.
 */
#include <string.h>

#include <utf8proc.h>

#include "tok.h"

size_t tve_char_bytes(unsigned char lead)
{
    if (lead < 0x80)
        return 1;
    if (lead < 0xe0)
        return 2;
    return lead < 0xf0 ? 3 : 4;
}

size_t tve_char(const char *s, uint32_t *cp)
{
    const unsigned char *const b = (const unsigned char *)s;

    if (b[0] < 0x80) {
        *cp = b[0];
        return 1;
    }
    if (b[0] < 0xe0) {
        *cp = ((uint32_t)(b[0] & 0x1f) << 6) | (b[1] & 0x3fu);
        return 2;
    }
    if (b[0] < 0xf0) {
        *cp = ((uint32_t)(b[0] & 0x0f) << 12) | ((uint32_t)(b[1] & 0x3f) << 6) |
              (b[2] & 0x3fu);
        return 3;
    }
    *cp = ((uint32_t)(b[0] & 0x07) << 18) | ((uint32_t)(b[1] & 0x3f) << 12) |
          ((uint32_t)(b[2] & 0x3f) << 6) | (b[3] & 0x3fu);
    return 4;
}

size_t tve_char_put(uint32_t cp, char *dst)
{
    return (size_t)utf8proc_encode_char((utf8proc_int32_t)cp,
                                        (utf8proc_uint8_t *)dst);
}

bool tve_is_space(uint32_t cp)
{
    return (cp >= 9 && cp <= 13) || cp == 0x20 || cp == 0x85 || cp == 0xa0 ||
           cp == 0x1680 || (cp >= 0x2000 && cp <= 0x200a) || cp == 0x2028 ||
           cp == 0x2029 || cp == 0x202f || cp == 0x205f || cp == 0x3000;
}

bool tve_is_word(uint32_t cp)
{
    switch (utf8proc_category((utf8proc_int32_t)cp)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
        return true;
    default:
        /* Other_Alphabetic symbols (circled and squared letters) and the join
         * controls. */
        return (cp >= 0x24b6 && cp <= 0x24e9) ||
               (cp >= 0x1f130 && cp <= 0x1f149) ||
               (cp >= 0x1f150 && cp <= 0x1f169) ||
               (cp >= 0x1f170 && cp <= 0x1f189) || cp == 0x200c || cp == 0x200d;
    }
}

bool tve_is_numeric(uint32_t cp)
{
    const utf8proc_category_t c = utf8proc_category((utf8proc_int32_t)cp);

    return c == UTF8PROC_CATEGORY_ND || c == UTF8PROC_CATEGORY_NL ||
           c == UTF8PROC_CATEGORY_NO;
}

bool tve_is_punct(uint32_t cp)
{
    const utf8proc_category_t c = utf8proc_category((utf8proc_int32_t)cp);

    if (cp < 0x80)
        return (cp >= 33 && cp <= 47) || (cp >= 58 && cp <= 64) ||
               (cp >= 91 && cp <= 96) || (cp >= 123 && cp <= 126);
    return c >= UTF8PROC_CATEGORY_PC && c <= UTF8PROC_CATEGORY_PO;
}

uint32_t tve_byte_char(unsigned char b)
{
    /* Printable bytes stand for themselves, the others follow from U+0100 in
     * byte order (GPT-2's bytes_to_unicode). */
    if ((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174)
        return b;
    if (b <= 32)
        return 0x100u + b;
    if (b <= 160)
        return 0x100u + 33u + (b - 127u);
    return 0x100u + 67u; /* 173 */
}

void tve_bytes_map(const char *s, size_t n, struct tv_buf *out)
{
    char part[128];
    size_t used = 0;

    for (size_t i = 0; i < n; i++) {
        const uint32_t c = tve_byte_char((unsigned char)s[i]);

        if (used + 2 > sizeof(part)) {
            tv_buf_add(out, part, used);
            used = 0;
        }
        /* none is above U+0143 */
        if (c < 0x80) {
            part[used++] = (char)c;
        } else {
            part[used++] = (char)(0xc0 | c >> 6);
            part[used++] = (char)(0x80 | (c & 0x3f));
        }
    }
    tv_buf_add(out, part, used);
}

enum tv_err tve_json_bool(const json_t *o, const char *key, bool otherwise,
                          bool *out, struct tv_error *err)
{
    const json_t *const v = json_object_get(o, key);

    if (v && !json_is_null(v) && !json_is_boolean(v))
        return tv_error_set(err, TV_E_CORRUPT,
                            "tokenizer.json: \"%s\" is not true or false", key);
    *out = json_is_boolean(v) ? json_is_true(v) : otherwise;
    return TV_OK;
}

enum tv_err tve_json_str(const json_t *o, const char *key, const char **out,
                         size_t *n, struct tv_error *err)
{
    const json_t *const v = json_object_get(o, key);

    if (v && !json_is_null(v) && !json_is_string(v))
        return tv_error_set(err, TV_E_CORRUPT,
                            "tokenizer.json: \"%s\" is not a string", key);
    *out = json_string_value(v);
    *n = *out ? json_string_length(v) : 0;
    return TV_OK;
}
