/* SPDX-License-Identifier: Apache-2.0 */
/*
 * fuzz_text.c - the helpers of tv/text.h keep their promises for any bytes:
 * printable text is valid UTF-8 without controls, names have one order,
 * messages are one line, sizes are read or refused.
 *
 * The input is cut at its first NUL byte; the rest is a second string.
 */
#include "fuzz.h"

#include <string.h>

#include "tv/alloc.h"
#include "tv/text.h"

static int sign_of(int v)
{
    return (v > 0) - (v < 0);
}

static void check_printable(const char *s)
{
    char dst[200];
    tv_text_printable(s, dst, sizeof dst);
    const size_t n = strlen(dst);
    FUZZ_CHECK(n < sizeof dst);
    FUZZ_CHECK(tv_utf8_valid(dst, n));
    for (size_t i = 0; i < n; i++)
        FUZZ_CHECK((unsigned char)dst[i] >= 0x20 && dst[i] != 0x7f);
    if (tv_utf8_valid(s, strlen(s))) {
        struct tv_error err;
        tv_error_set(&err, TV_E_INPUT, "%s", s);
        tv_error_context(&err, "%s", s);
        FUZZ_CHECK(tv_utf8_valid(err.msg, strlen(err.msg)));
        FUZZ_CHECK(!strchr(err.msg, '\n'));
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    char *a = tv_strndup((const char *)data, size);
    FUZZ_CHECK(a);
    const size_t n = strlen(a);
    char *b = n < size ? tv_strndup((const char *)data + n + 1, size - n - 1)
                       : tv_strdup("");
    FUZZ_CHECK(b);

    (void)tv_utf8_valid((const char *)data, size);
    check_printable(a);
    check_printable(b);
    const int order = sign_of(tv_name_compare(a, b));
    FUZZ_CHECK(order == -sign_of(tv_name_compare(b, a)));
    FUZZ_CHECK((order == 0) == (strcmp(a, b) == 0));

    uint64_t bytes = 7;
    struct tv_error err;
    if (tv_parse_bytes(a, true, &bytes, &err) != TV_OK) {
        FUZZ_CHECK(bytes == 7);
        FUZZ_CHECK(err.code == TV_E_USAGE && err.msg[0]);
    }
    const char *const words[] = {b, "linear", "ties"};
    const char *found = tv_suggest(a, words, 3);
    FUZZ_CHECK(!found || found == words[0] || found == words[1] ||
               found == words[2]);
    tv_free(a);
    tv_free(b);
    return 0;
}
