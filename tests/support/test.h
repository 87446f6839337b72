/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test.h - the one include of every test program: cmocka with what it needs in
 * front of it, and asserts that know struct tv_error.
 */
#ifndef TEST_H
#define TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "tv/error.h"

/* 1 under ASan or TSan, which need address space, replace the allocator and
 * wrap functions: a test that cannot live with that skips. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TEST_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define TEST_SANITIZED 1
#endif
#endif
#ifndef TEST_SANITIZED
#define TEST_SANITIZED 0
#endif

/* expr must be TV_OK; shows the message of err (struct tv_error *) if not. */
#define assert_ok(expr, err)                                                   \
    test_check_code(#expr, (expr), TV_OK, (err), __FILE__, __LINE__)
/* expr must be `want`; when it is an error, err must say the same code and
 * have a message. err may be NULL. */
#define assert_code(expr, want, err)                                           \
    test_check_code(#expr, (expr), (want), (err), __FILE__, __LINE__)
/* The message of err must contain `part`. */
#define assert_message(err, part)                                              \
    test_check_message((err), (part), __FILE__, __LINE__)

void test_check_code(const char *expr, enum tv_err got, enum tv_err want,
                     const struct tv_error *err, const char *file, int line);
void test_check_message(const struct tv_error *err, const char *part,
                        const char *file, int line);

/* Path of a file under tests/data, owned (tv_free). The directory comes from
 * TV_TEST_DATA, which CTest sets; without it the running test is skipped. */
char *test_data(const char *name);
/* Bytes that the heap holds and descriptors that are open now; a test compares
 * the values from before and after. */
uint64_t test_heap_bytes(void);
unsigned test_open_fds(void);

#endif
