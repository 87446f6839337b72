/* SPDX-License-Identifier: Apache-2.0 */
/*
 * regression_main.c - replays a fuzz corpus without a fuzzer.
 *
 * Arguments: files, or directories of files. Each is given to the target whole
 * and cut short at many places (a truncated file is the most common damage),
 * every time in a heap block of exactly its size. No file at all is a failure:
 * a replay that tests nothing must not pass.
 */
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "fuzz.h"

/* Cuts per file: every length of small files, evenly spread over large ones. */
#define CUTS_MAX 256u

static void run_one(const unsigned char *data, size_t n)
{
    unsigned char *copy = malloc(n ? n : 1);
    if (!copy) {
        (void)fprintf(stderr, "out of memory\n");
        exit(1);
    }
    if (n > 0)
        memcpy(copy, data, n);
    /* One byte of room is needed to have a pointer; empty input gets it. */
    (void)LLVMFuzzerTestOneInput(copy, n);
    free(copy);
}

static void run_file(const char *path)
{
    FILE *f = fopen(path, "rb");
    struct stat st;
    if (!f || stat(path, &st) != 0) {
        perror(path);
        exit(1);
    }
    const size_t n = (size_t)st.st_size;
    unsigned char *data = malloc(n + 1);
    if (!data || fread(data, 1, n, f) != n) {
        (void)fprintf(stderr, "cannot read %s\n", path);
        exit(1);
    }
    (void)fclose(f);
    (void)fprintf(stderr, "%s\n", path);
    const size_t step = n / CUTS_MAX + 1;
    for (size_t cut = 0; cut < n; cut += step)
        run_one(data, cut);
    run_one(data, n);
    free(data);
}

static unsigned run_path(const char *path)
{
    struct stat st;
    if (stat(path, &st) == 0 && !S_ISDIR(st.st_mode)) {
        run_file(path);
        return 1;
    }
    struct dirent **entries = NULL;
    const int n = scandir(path, &entries, NULL, alphasort);
    if (n < 0) {
        perror(path);
        exit(1);
    }
    unsigned n_files = 0;
    for (int i = 0; i < n; i++) {
        if (entries[i]->d_name[0] != '.') {
            char sub[4096];
            (void)snprintf(sub, sizeof sub, "%s/%s", path, entries[i]->d_name);
            run_file(sub);
            n_files++;
        }
        free(entries[i]);
    }
    free(entries);
    return n_files;
}

int main(int argc, char **argv)
{
    unsigned n_files = 0;
    for (int i = 1; i < argc; i++)
        n_files += run_path(argv[i]);
    (void)fprintf(stderr, "%u files replayed\n", n_files);
    return n_files > 0 ? 0 : 1;
}
