/* SPDX-License-Identifier: Apache-2.0 */
/*
 * lock.c - see tv/lock.h.
 */
#include "tv/lock.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "tv/sys.h"
#include "tv/text.h"

#define HOLDER_MAX 224u

void tv_lock_sign(int fd, const char *purpose)
{
    char text[HOLDER_MAX];
    const int n = snprintf(text, sizeof text, "%.160s (process %ld)\n", purpose,
                           (long)getpid());

    if (tv_sys()->ftruncate(fd, 0) == 0 && n > 0)
        (void)!tv_sys()->pwrite(fd, text, (size_t)n, 0);
}

void tv_lock_holder(int fd, char *dst, size_t cap)
{
    char raw[HOLDER_MAX];
    const ssize_t n = tv_sys()->pread(fd, raw, sizeof raw - 1, 0);

    raw[n > 0 ? n : 0] = '\0';
    raw[strcspn(raw, "\n")] = '\0';
    tv_text_printable(raw[0] != '\0' ? raw : "another process", dst, cap);
}
