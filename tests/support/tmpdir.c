/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tmpdir.c - scratch directories for tests.
 *
 * The list of live directories uses the plain C heap: tests measure the bytes
 * that tv_alloc holds, and must not see ours.
 */
#include "tmpdir.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "test.h"
#include "tv/alloc.h"
#include "tv/sys.h"

struct entry {
    struct entry *next;
    char path[];
};

static struct entry *live;
static pid_t owner;

static void remove_left_over(void)
{
    const char *keep = getenv("TV_TEST_KEEP");
    if (getpid() != owner)
        return;
    tv_sys_replace(NULL);
    tv_alloc_fail_at(0, 0);
    while (live) {
        struct entry *e = live;
        live = e->next;
        if (!keep && tv_dir_remove(e->path, NULL) != TV_OK)
            (void)fprintf(stderr, "cannot remove %s\n", e->path);
        free(e);
    }
}

char *tmpdir_make(void)
{
    const char *top = getenv("TMPDIR");
    if (!top || top[0] == '\0')
        top = P_tmpdir;
    static const char pattern[] = "/tv-test-XXXXXX";
    const size_t n = strlen(top) + sizeof pattern;
    struct entry *e = malloc(sizeof *e + n);
    assert_non_null(e);
    (void)snprintf(e->path, n, "%s%s", top, pattern);
    if (!mkdtemp(e->path)) {
        print_error("cannot make a directory like %s\n", e->path);
        free(e);
        fail();
        return NULL;
    }
    if (owner != getpid()) {
        owner = getpid();
        live = NULL;
        (void)atexit(remove_left_over);
    }
    e->next = live;
    live = e;
    return e->path;
}

void tmpdir_remove(char *path)
{
    struct tv_error err;
    if (!path)
        return;
    for (struct entry **at = &live; *at; at = &(*at)->next) {
        struct entry *e = *at;
        if (e->path != path)
            continue;
        if (!getenv("TV_TEST_KEEP"))
            assert_ok(tv_dir_remove(path, &err), &err);
        *at = e->next;
        free(e);
        return;
    }
    fail_msg("%s was not made by tmpdir_make", path);
}

char *tmpdir_write(const char *dir, const char *name, const void *data,
                   size_t n_bytes)
{
    char *path = tv_path_join(dir, name);
    assert_non_null(path);
    FILE *f = fopen(path, "wb");
    if (!f)
        fail_msg("cannot create %s", path);
    if (n_bytes > 0)
        assert_int_equal(fwrite(data, 1, n_bytes, f), n_bytes);
    assert_int_equal(fclose(f), 0);
    return path;
}
