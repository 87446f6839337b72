/* SPDX-License-Identifier: Apache-2.0 */
/*
 * test.c - asserts on error codes, and where test data is.
 */
#include "test.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/sys.h"

void test_check_code(const char *expr, enum tv_err got, enum tv_err want,
                     const struct tv_error *err, const char *file, int line)
{
    if (got != want) {
        print_error("%s: %s, expected %s: %s\n", expr, tv_err_name(got),
                    tv_err_name(want), err && got != TV_OK ? err->msg : "");
        _fail(file, line);
    }
    if (got == TV_OK || !err)
        return;
    if (err->code != got || err->msg[0] == '\0') {
        print_error("%s returned %s, but the error says %s, '%s'\n", expr,
                    tv_err_name(got), tv_err_name(err->code), err->msg);
        _fail(file, line);
    }
}

void test_check_message(const struct tv_error *err, const char *part,
                        const char *file, int line)
{
    if (strstr(err->msg, part))
        return;
    print_error("no '%s' in the message '%s'\n", part, err->msg);
    _fail(file, line);
}

char *test_data(const char *name)
{
    const char *dir = getenv("TV_TEST_DATA");
    if (!dir || dir[0] == '\0') {
        print_message("TV_TEST_DATA is not set; run this test by ctest\n");
        skip();
        return NULL;
    }
    char *path = tv_path_join(dir, name);
    assert_non_null(path);
    return path;
}

uint64_t test_heap_bytes(void)
{
    return tv_alloc_now();
}

unsigned test_open_fds(void)
{
    unsigned n = 0;
    DIR *dir = opendir("/proc/self/fd");
    assert_non_null(dir);
    while (readdir(dir))
        n++;
    (void)closedir(dir);
    return n;
}
