/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_text.c - buffers at their limits, bad UTF-8, sizes, typing mistakes,
 * and the order of layer names as a total order.
 */
#include "test.h"

#include <string.h>

#include "faults.h"
#include "rng.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/text.h"

/* ---- buffers ------------------------------------------------------------- */

static void test_buffer_grows(void **state)
{
    (void)state;
    struct tv_error err;
    struct tv_buf b;
    tv_buf_init(&b, 100000);
    assert_ok(tv_buf_ok(&b, &err), &err);
    tv_buf_str(&b, "");
    assert_string_equal(b.data, "");
    for (int i = 0; i < 1000; i++) {
        tv_buf_add(&b, "ab\0c", 4);
        tv_buf_fmt(&b, "%d,%s", i, "x");
        tv_buf_le32(&b, 0x04030201);
        tv_buf_le64(&b, UINT64_C(0x0807060504030201));
        assert_int_equal(b.data[b.n_bytes], 0);
    }
    assert_ok(tv_buf_ok(&b, &err), &err);
    assert_memory_equal(b.data, "ab\0c0,x\1\2\3\4\1\2\3\4\5\6\7\10ab\0c1,x",
                        26);
    tv_buf_free(&b);
    assert_null(b.data);
    tv_buf_str(&b, "again");
    assert_string_equal(b.data, "again");
    tv_buf_free(&b);
    tv_buf_free(&b);
}

static void test_buffer_limit(void **state)
{
    (void)state;
    struct tv_error err;
    struct tv_buf b;
    tv_buf_init(&b, 10);
    tv_buf_str(&b, "0123456789");
    assert_ok(tv_buf_ok(&b, &err), &err);
    tv_buf_str(&b, "");
    assert_ok(tv_buf_ok(&b, &err), &err);
    tv_buf_str(&b, "x");
    assert_code(tv_buf_ok(&b, &err), TV_E_INPUT, &err);
    assert_message(&err, "10 bytes");
    assert_string_equal(b.data, "0123456789");
    tv_buf_free(&b);

    tv_buf_init(&b, 10);
    tv_buf_fmt(&b, "%s", "0123456789x");
    assert_true(b.failed);
    tv_buf_str(&b, "ok"); /* too late: half a text is no text */
    assert_int_equal(b.n_bytes, 0);
    assert_code(tv_buf_ok(&b, NULL), TV_E_INPUT, NULL);
    tv_buf_free(&b);

    tv_buf_init(&b, SIZE_MAX);
    tv_buf_str(&b, "abc");
    volatile size_t huge = SIZE_MAX - 2;
    tv_buf_add(&b, "", huge);
    assert_true(b.failed);
    assert_string_equal(b.data, "abc");
    tv_buf_free(&b);
    tv_buf_init(&b, 0);
    tv_buf_str(&b, "a");
    assert_true(b.failed);
    tv_buf_free(&b);
}

static enum tv_err work_buffer(void *arg, struct tv_error *err)
{
    struct tv_buf b;
    (void)arg;
    tv_buf_init(&b, 10000);
    for (int i = 0; i < 300; i++)
        tv_buf_fmt(&b, "%d", i);
    const enum tv_err rc = tv_buf_ok(&b, err);
    tv_buf_free(&b);
    return rc;
}

static void test_buffer_faults(void **state)
{
    (void)state;
    assert_true(faults_loop_alloc(work_buffer, NULL, false) >= 3);
}

/* ---- UTF-8 --------------------------------------------------------------- */

static void test_utf8(void **state)
{
    (void)state;
    static const char *const good[] = {
        "",
        "plain",
        "h\xc3\xa9",
        "\xe2\x82\xac",
        "\xf0\x9f\x98\x80",
        "\xc2\x80",
        "\xdf\xbf",
        "\xe0\xa0\x80",
        "\xef\xbf\xbf",
        "\xed\x9f\xbf",
        "\xee\x80\x80",
        "\xf0\x90\x80\x80",
        "\xf4\x8f\xbf\xbf",
    };
    static const char *const bad[] = {
        "\x80",
        "\xbf",
        "\xc0\x80",
        "\xc1\xbf",
        "\xc3",
        "\xc3(",
        "\xe2\x82",
        "\xe2(\xa1",
        "\xe2\x82(",
        "\xe0\x80\x80",
        "\xe0\x9f\xbf",
        "\xed\xa0\x80",
        "\xed\xbf\xbf",
        "\xf0\x8f\xbf\xbf",
        "\xf0\x9f\x98",
        "\xf4\x90\x80\x80",
        "\xf5\x80\x80\x80",
        "\xff",
        "\xfe",
        "ok\xe2\x82",
        "\xf8\x88\x80\x80\x80",
    };
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        assert_true(tv_utf8_valid(good[i], strlen(good[i])));
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        if (tv_utf8_valid(bad[i], strlen(bad[i])))
            fail_msg("bad sequence %zu was accepted", i);
    assert_true(tv_utf8_valid("a\0b", 3));
    /* The length counts, not what stands behind it. */
    assert_false(tv_utf8_valid("\xe2\x82\xac", 2));
    assert_true(tv_utf8_valid(NULL, 0));
}

/* Every code point, encoded by the textbook, against the table. */
static void test_utf8_all_code_points(void **state)
{
    (void)state;
    for (uint32_t c = 0; c < 0x120000; c++) {
        unsigned char s[4];
        size_t n = 0;
        if (c < 0x80) {
            s[n++] = (unsigned char)c;
        } else if (c < 0x800) {
            s[n++] = (unsigned char)(0xc0 | (c >> 6));
            s[n++] = (unsigned char)(0x80 | (c & 0x3f));
        } else if (c < 0x10000) {
            s[n++] = (unsigned char)(0xe0 | (c >> 12));
            s[n++] = (unsigned char)(0x80 | ((c >> 6) & 0x3f));
            s[n++] = (unsigned char)(0x80 | (c & 0x3f));
        } else {
            s[n++] = (unsigned char)(0xf0 | (c >> 18));
            s[n++] = (unsigned char)(0x80 | ((c >> 12) & 0x3f));
            s[n++] = (unsigned char)(0x80 | ((c >> 6) & 0x3f));
            s[n++] = (unsigned char)(0x80 | (c & 0x3f));
        }
        const bool want = c < 0xd800 || (c > 0xdfff && c < 0x110000);
        if (tv_utf8_valid((const char *)s, n) != want)
            fail_msg("U+%04X is wrong", (unsigned)c);
    }
}

static void test_printable(void **state)
{
    (void)state;
    char dst[64];
    static const char *const cases[][2] = {
        {"plain text", "plain text"},
        {"a\nb\tc\x1b[0m", "a?b?c?[0m"},
        {"h\xc3\xa9 \xf0\x9f\x98\x80", "h\xc3\xa9 \xf0\x9f\x98\x80"},
        {"\xff\xc3(", "?\?("},
        {"c1 \xc2\x9b x", "c1 ? x"},
        {"rtl \xe2\x80\xae x", "rtl ? x"},
        {"iso \xe2\x81\xa6 x", "iso ? x"},
        {"\x7f", "?"},
        {"", ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_string_equal(tv_text_printable(cases[i][0], dst, sizeof dst),
                            cases[i][1]);
    assert_string_equal(tv_text_printable("abcdef", dst, 4), "abc");
    assert_string_equal(tv_text_printable("ab\xc3\xa9", dst, 4), "ab");
    assert_string_equal(tv_text_printable("ab\xc3\xa9", dst, 5), "ab\xc3\xa9");
    assert_string_equal(tv_text_printable("abc", dst, 1), "");
    tv_text_printable("abc", dst, 0);
}

/* ---- sizes --------------------------------------------------------------- */

static void test_parse_sizes(void **state)
{
    (void)state;
    struct tv_error err;
    static const struct {
        const char *text;
        uint64_t plain, mergekit; /* UINT64_MAX: refused */
    } cases[] = {
        {"0", 0, 0},
        {"4096", 4096, 4096},
        {"500M", 500000000, 500000000},
        {"500MB", 500000000, 500000000},
        {"500mb", 500000000, 500000000},
        {"500MiB", 524288000, 524288000},
        {"500Mi", 524288000, 524288000},
        {"500 MiB", 524288000, 524288000},
        {"1.5GiB", 1610612736, 1610612736},
        {"1.5k", 1500, 1500},
        {"0.1K", 100, 100},
        {"2T", 2000000000000, 2000000000000},
        {"1PiB", UINT64_C(1) << 50, UINT64_C(1) << 50},
        {"15EiB", UINT64_C(15) << 60, UINT64_C(15) << 60},
        {"16EiB", UINT64_MAX, UINT64_MAX},
        {"5B", UINT64_MAX, 5000000000},
        {"5b", UINT64_MAX, 5000000000},
        {"1.5B", UINT64_MAX, 1500000000},
        {"0.3333333333333333333333333GiB", 357913941, 357913941},
        {"18446744073709551614", UINT64_MAX - 1, UINT64_MAX - 1},
        {"18446744073709551616", UINT64_MAX, UINT64_MAX},
        {"99999999999999999999999999", UINT64_MAX, UINT64_MAX},
        {"18446744073709551614K", UINT64_MAX, UINT64_MAX},
        {"18.9E", UINT64_MAX, UINT64_MAX},
        {"", UINT64_MAX, UINT64_MAX},
        {" 5", UINT64_MAX, UINT64_MAX},
        {"5 ", 5, 5},
        {"-5", UINT64_MAX, UINT64_MAX},
        {"+5", UINT64_MAX, UINT64_MAX},
        {"1.5", UINT64_MAX, UINT64_MAX},
        {"1.0", 1, 1},
        {"1.M", UINT64_MAX, UINT64_MAX},
        {".5M", UINT64_MAX, UINT64_MAX},
        {"M", UINT64_MAX, UINT64_MAX},
        {"5X", UINT64_MAX, UINT64_MAX},
        {"5MBB", UINT64_MAX, UINT64_MAX},
        {"5MiBs", UINT64_MAX, UINT64_MAX},
        {"5iB", UINT64_MAX, UINT64_MAX},
        {"5e3", UINT64_MAX, UINT64_MAX},
        {"0x10", UINT64_MAX, UINT64_MAX},
        {"1,5M", UINT64_MAX, UINT64_MAX},
        {"nan", UINT64_MAX, UINT64_MAX},
        {"5M 5", UINT64_MAX, UINT64_MAX},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        for (int mergekit = 0; mergekit < 2; mergekit++) {
            const uint64_t want = mergekit ? cases[i].mergekit : cases[i].plain;
            uint64_t got = 12345;
            const enum tv_err rc =
                tv_parse_bytes(cases[i].text, mergekit != 0, &got, &err);
            if (want == UINT64_MAX) {
                if (rc != TV_E_USAGE)
                    fail_msg("'%s' was accepted", cases[i].text);
                assert_int_equal(got, 12345);
                assert_message(&err, cases[i].text);
                continue;
            }
            if (rc != TV_OK || got != want)
                fail_msg("'%s' gave %llu", cases[i].text,
                         (unsigned long long)got);
        }
    }
    uint64_t n = 0;
    assert_code(tv_parse_bytes("x", false, &n, NULL), TV_E_USAGE, NULL);
}

static void test_format_sizes(void **state)
{
    (void)state;
    char dst[32];
    static const struct {
        uint64_t n;
        const char *want;
    } cases[] = {
        {0, "0 B"},
        {1023, "1023 B"},
        {1024, "1.0 KiB"},
        {1536, "1.5 KiB"},
        {1048575, "1.0 MiB"}, /* not 1024.0 KiB */
        {1048524, "1023.9 KiB"},
        {1288490189, "1.2 GiB"},
        {UINT64_C(1) << 40, "1.0 TiB"},
        {UINT64_C(1) << 50, "1.0 PiB"},
        {UINT64_MAX, "16.0 EiB"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_string_equal(tv_format_bytes(cases[i].n, dst, sizeof dst),
                            cases[i].want);
    tv_format_bytes(5, dst, 0);
    assert_string_equal(tv_format_bytes_up(1024, dst, sizeof dst), "1.0 KiB");
    assert_string_equal(tv_format_bytes_up(1025, dst, sizeof dst), "1.1 KiB");
    assert_string_equal(tv_format_bytes_up(1048575, dst, sizeof dst),
                        "1.0 MiB");
    assert_string_equal(tv_format_bytes_up(17, dst, sizeof dst), "17 B");
    assert_string_equal(tv_format_bytes_arg(1025, dst, sizeof dst), "1.1KiB");
    assert_string_equal(tv_format_bytes_arg(17, dst, sizeof dst), "17");
    tv_format_bytes_arg(5, dst, 0);
    /* What we print, we read: within the rounding of the last digit. */
    struct rng r;
    rng_open(&r, 3);
    for (int i = 0; i < 1000; i++) {
        const uint64_t n = rng_u64(&r) >> (4 + rng_below(&r, 50));
        uint64_t back = 0;
        if (n < 1024)
            continue;
        tv_format_bytes(n, dst, sizeof dst);
        assert_ok(tv_parse_bytes(dst, false, &back, NULL), NULL);
        const uint64_t off = back > n ? back - n : n - back;
        assert_true(off <= n / 16);
    }
}

/* ---- suggestions --------------------------------------------------------- */

static void test_suggestions(void **state)
{
    (void)state;
    static const char *const words[] = {
        "linear",    "slerp",       "task_arithmetic", "ties",
        "dare_ties", "dare_linear", "passthrough",     "t",
    };
    static const char *const cases[][2] = {
        {"liner", "linear"},
        {"lniear", "linear"},
        {"TIES", "ties"},
        {"tise", "ties"},
        {"dare-ties", "dare_ties"},
        {"dare_lienar", "dare_linear"},
        {"task_aritmetic", "task_arithmetic"},
        {"passtrough", "passthrough"},
        {"slurp", "slerp"},
        {"linear", "linear"},
        {"T", "t"},
    };
    static const char *const none[] = {"",      "quantize", "x",  "bananas",
                                       "tarot", "li",       "zip"};
    const size_t n = sizeof words / sizeof *words;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *got = tv_suggest(cases[i][0], words, n);
        if (!got || strcmp(got, cases[i][1]) != 0)
            fail_msg("'%s' suggests %s", cases[i][0], got ? got : "nothing");
    }
    for (size_t i = 0; i < sizeof none / sizeof *none; i++) {
        const char *got = tv_suggest(none[i], words, n);
        if (got)
            fail_msg("'%s' suggests %s", none[i], got);
    }
    static const char *const commands[] = {"rm", "ls", "import"};
    assert_string_equal(tv_suggest("lss", commands, 3), "ls");
    assert_null(tv_suggest("m", commands, 3));
    assert_null(tv_suggest("lsss", commands, 3));
    assert_null(tv_suggest("xy", commands, 3));
    assert_null(tv_suggest("linear", NULL, 0));
    char long_word[3000];
    memset(long_word, 'a', sizeof long_word - 1);
    long_word[sizeof long_word - 1] = '\0';
    assert_null(tv_suggest(long_word, words, n));
    const char *const long_words[] = {long_word};
    assert_null(tv_suggest("aaaa", long_words, 1));
    /* The longest that is looked at. */
    long_word[63] = '\0';
    const char *const edge[] = {long_word};
    assert_ptr_equal(tv_suggest(long_word, edge, 1), long_word);
}

/* ---- name order ---------------------------------------------------------- */

static void test_layer_order(void **state)
{
    (void)state;
    static const char *const sorted[] = {
        "",
        "0",
        "00",
        "01",
        "1",
        "2",
        "10",
        "18446744073709551615",
        "18446744073709551616",
        "100000000000000000000000000000",
        "lm_head.weight",
        "model.embed",
        "model.layers",
        "model.layers.",
        "model.layers.0.a",
        "model.layers.0.b",
        "model.layers.2.mlp.w1",
        "model.layers.2.mlp.w2",
        "model.layers.2.mlp.w10",
        "model.layers.10.mlp.w1",
        "model.layers.a",
        "model.norm",
        "z\xc3\xa9",
    };
    const size_t n = sizeof sorted / sizeof *sorted;
    for (size_t i = 0; i < n; i++) {
        for (size_t k = 0; k < n; k++) {
            const int got = tv_name_compare(sorted[i], sorted[k]);
            const int want = i < k ? -1 : i > k;
            if ((got > 0) - (got < 0) != want)
                fail_msg("'%s' and '%s' compare as %d", sorted[i], sorted[k],
                         got);
        }
    }
}

static int sign_of(int v)
{
    return (v > 0) - (v < 0);
}

static void test_order_is_total(void **state)
{
    (void)state;
    enum { N = 220 };
    static char names[N][8];
    struct rng r;
    rng_open(&r, 4);
    /* Few letters, so that near misses are common. */
    for (size_t i = 0; i < N; i++) {
        const size_t n = (size_t)rng_below(&r, 7);
        for (size_t k = 0; k < n; k++)
            names[i][k] = "0019.a\xff"[rng_below(&r, 7)];
        names[i][n] = '\0';
    }
    for (size_t i = 0; i < N; i++) {
        for (size_t j = 0; j < N; j++) {
            const int ij = sign_of(tv_name_compare(names[i], names[j]));
            assert_int_equal(ij, -sign_of(tv_name_compare(names[j], names[i])));
            assert_int_equal(ij == 0, strcmp(names[i], names[j]) == 0);
            if (ij > 0)
                continue;
            for (size_t k = 0; k < N; k++)
                if (tv_name_compare(names[j], names[k]) <= 0 &&
                    tv_name_compare(names[i], names[k]) > 0)
                    fail_msg("'%s' <= '%s' <= '%s', but not the outer two",
                             names[i], names[j], names[k]);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_buffer_grows),
        cmocka_unit_test(test_buffer_limit),
        cmocka_unit_test(test_buffer_faults),
        cmocka_unit_test(test_utf8),
        cmocka_unit_test(test_utf8_all_code_points),
        cmocka_unit_test(test_printable),
        cmocka_unit_test(test_parse_sizes),
        cmocka_unit_test(test_format_sizes),
        cmocka_unit_test(test_suggestions),
        cmocka_unit_test(test_layer_order),
        cmocka_unit_test(test_order_is_total),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
