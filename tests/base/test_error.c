/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test_error.c - messages: NULL errors, cutting, one line, errno mapping.
 */
#include "test.h"

#include <errno.h>
#include <string.h>

#include "tv/text.h"

static void test_null_error_is_allowed(void **state)
{
    (void)state;
    tv_error_clear(NULL);
    assert_int_equal(tv_error_set(NULL, TV_E_CORRUPT, "x %d", 1), TV_E_CORRUPT);
    assert_int_equal(tv_error_sys(NULL, ENOSPC, "x"), TV_E_NOSPACE);
    tv_error_context(NULL, "x");
    tv_error_hint(NULL, "x");
}

static void test_set_replaces_everything(void **state)
{
    (void)state;
    struct tv_error err;
    memset(&err, 0x55, sizeof err);
    assert_int_equal(tv_error_set(&err, TV_E_INPUT, "tensor %s, %d", "a.b", 7),
                     TV_E_INPUT);
    assert_int_equal(err.code, TV_E_INPUT);
    assert_int_equal(err.sys_errno, 0);
    assert_string_equal(err.msg, "tensor a.b, 7");
    assert_string_equal(err.hint, "");
    tv_error_clear(&err);
    assert_int_equal(err.code, TV_OK);
    assert_string_equal(err.msg, "");
}

static void test_message_may_quote_itself(void **state)
{
    (void)state;
    struct tv_error err;
    tv_error_set(&err, TV_E_INPUT, "inner");
    tv_error_set(&err, TV_E_CORRUPT, "outer (%s)", err.msg);
    assert_string_equal(err.msg, "outer (inner)");
}

static void test_errno_decides_the_code(void **state)
{
    (void)state;
    struct tv_error err;
    assert_int_equal(tv_error_sys(&err, ENOSPC, "write %s", "f"), TV_E_NOSPACE);
    assert_string_equal(err.msg, "write f: No space left on device");
    assert_int_equal(err.sys_errno, ENOSPC);
    assert_int_equal(tv_error_sys(&err, EDQUOT, "w"), TV_E_NOSPACE);
    assert_int_equal(tv_error_sys(&err, ENOMEM, "w"), TV_E_NOMEM);
    assert_int_equal(tv_error_sys(&err, EIO, "w"), TV_E_IO);
    assert_int_equal(err.code, TV_E_IO);
    assert_int_equal(tv_error_sys(&err, 99999, "w"), TV_E_IO);
    assert_message(&err, "99999");
}

static void test_the_reason_survives_a_long_text(void **state)
{
    (void)state;
    struct tv_error err;
    char name[4000];
    memset(name, 'n', sizeof name);
    name[sizeof name - 1] = '\0';
    tv_error_sys(&err, ENOENT, "cannot open %s", name);
    assert_message(&err, "cannot open nnn");
    assert_message(&err, ": No such file or directory");
    assert_true(strlen(err.msg) < sizeof err.msg);
}

static void test_context_goes_in_front(void **state)
{
    (void)state;
    struct tv_error err;
    tv_error_set(&err, TV_E_CORRUPT, "bad magic");
    tv_error_hint(&err, "run %s", "verify");
    tv_error_context(&err, "chunk %d", 3);
    tv_error_context(&err, "store %s", "s");
    assert_string_equal(err.msg, "store s: chunk 3: bad magic");
    assert_string_equal(err.hint, "run verify");
    assert_int_equal(err.code, TV_E_CORRUPT);

    tv_error_clear(&err);
    tv_error_context(&err, "alone");
    assert_string_equal(err.msg, "alone");

    char big[2000];
    memset(big, 'c', sizeof big);
    big[sizeof big - 1] = '\0';
    for (int i = 0; i < 5; i++)
        tv_error_context(&err, "%s", big);
    assert_int_equal(strlen(err.msg), sizeof err.msg - 3 + 2);
    tv_error_hint(&err, "%s", big);
    assert_int_equal(strlen(err.hint), sizeof err.hint - 1);
}

static void test_messages_are_one_clean_line(void **state)
{
    (void)state;
    struct tv_error err;
    tv_error_set(&err, TV_E_INPUT, "a\nb\x1b[31mc\td\x7f");
    assert_string_equal(err.msg, "a?b?[31mc?d?");
    tv_error_sys(&err, EIO, "x\ny");
    assert_message(&err, "x?y: ");
}

static void test_cut_between_characters(void **state)
{
    (void)state;
    struct tv_error err;
    /* Every way in which the end of the message can fall inside one. */
    for (size_t pad = 0; pad < 5; pad++) {
        char text[3000] = "";
        memset(text, 'x', pad);
        size_t n = pad;
        while (n + 4 < sizeof text) {
            memcpy(text + n, "\xf0\x9f\x98\x80", 5);
            n += 4;
        }
        tv_error_set(&err, TV_E_INPUT, "%s", text);
        assert_true(strlen(err.msg) + 4 >= sizeof err.msg - 1);
        assert_true(tv_utf8_valid(err.msg, strlen(err.msg)));
        tv_error_context(&err, "%s", text);
        assert_true(tv_utf8_valid(err.msg, strlen(err.msg)));
        tv_error_hint(&err, "%s", text);
        assert_true(tv_utf8_valid(err.hint, strlen(err.hint)));
    }
}

static void test_every_code_has_its_name(void **state)
{
    (void)state;
    for (int a = 0; a >= TV_E_NUMERICS; a--) {
        const char *name = tv_err_name((enum tv_err)a);
        assert_string_not_equal(name, "unknown");
        for (int b = 0; b > a; b--)
            assert_string_not_equal(name, tv_err_name((enum tv_err)b));
    }
    assert_string_equal(tv_err_name((enum tv_err) - 999), "unknown");
    assert_string_equal(tv_err_name(TV_E_NOSPACE), "no-space");
}

static enum tv_err try_it(enum tv_err first, int *steps)
{
    enum tv_err rc = TV_OK;
    TV_TRY(first);
    ++*steps;
out:
    ++*steps;
    return rc;
}

static void test_try_jumps_on_errors_only(void **state)
{
    (void)state;
    int steps = 0;
    assert_int_equal(try_it(TV_OK, &steps), TV_OK);
    assert_int_equal(steps, 2);
    assert_int_equal(try_it(TV_E_LOCKED, &steps), TV_E_LOCKED);
    assert_int_equal(steps, 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_null_error_is_allowed),
        cmocka_unit_test(test_set_replaces_everything),
        cmocka_unit_test(test_message_may_quote_itself),
        cmocka_unit_test(test_errno_decides_the_code),
        cmocka_unit_test(test_the_reason_survives_a_long_text),
        cmocka_unit_test(test_context_goes_in_front),
        cmocka_unit_test(test_messages_are_one_clean_line),
        cmocka_unit_test(test_cut_between_characters),
        cmocka_unit_test(test_every_code_has_its_name),
        cmocka_unit_test(test_try_jumps_on_errors_only),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
