/* SPDX-License-Identifier: Apache-2.0 */
/*
 * dispatch.c - builds the kernel table once and hands out its rows.
 *
 * Knows nothing of any instruction set but its name and its place in the
 * order; cpu_<arch>.c says what runs here and fills the rows. The environment
 * is never read: capping (TV_CPU) is the business of the programs.
 */
#include "rows.h"

#include <pthread.h>
#include <string.h>

static const char *const isa_names[TVK_ISA_COUNT] = {"ref", "avx2", "avx512",
                                                     "amx"};

/* Written once under the guard, read-only afterwards. */
static struct tvk_table rows[TVK_ISA_COUNT];
static int supported[TVK_ISA_COUNT];
static pthread_once_t rows_once = PTHREAD_ONCE_INIT;

static void rows_build(void)
{
    tvk_row_ref(&rows[TVK_REF]);
    supported[TVK_REF] = 1;
    for (int i = TVK_REF + 1; i < TVK_ISA_COUNT; i++) {
        rows[i] = rows[i - 1];
        /* An ISA counts only on top of the lower ones: their entries are the
         * fallback for what it does not have. */
        if (!supported[i - 1] || !tvk_cpu_supports((enum tvk_isa)i))
            continue;
        supported[i] = 1;
        rows[i].isa = (enum tvk_isa)i;
        rows[i].name = isa_names[i];
        tvk_cpu_override((enum tvk_isa)i, &rows[i]);
    }
}

const struct tvk_table *tvk_table_for(enum tvk_isa cap)
{
    pthread_once(&rows_once, rows_build);
    int i = (int)cap;
    if (i < TVK_REF)
        i = TVK_REF;
    if (i >= TVK_ISA_COUNT)
        i = TVK_ISA_COUNT - 1;
    while (!supported[i])
        i--;
    return &rows[i];
}

const struct tvk_table *tvk_table_best(void)
{
    return tvk_table_for((enum tvk_isa)(TVK_ISA_COUNT - 1));
}

int tvk_isa_supported(enum tvk_isa isa)
{
    pthread_once(&rows_once, rows_build);
    const int i = (int)isa;
    return i >= 0 && i < TVK_ISA_COUNT && supported[i];
}

int tvk_isa_from_name(const char *name, enum tvk_isa *isa)
{
    for (int i = 0; i < TVK_ISA_COUNT; i++) {
        if (strcmp(name, isa_names[i]) == 0) {
            *isa = (enum tvk_isa)i;
            return 0;
        }
    }
    return -1;
}

const char *tvk_cpu_features(char *dst, size_t cap)
{
    size_t used = 0;

    if (cap == 0)
        return dst;
    for (unsigned i = 0; tvk_cpu_feature(i) != NULL; i++) {
        const char *const name = tvk_cpu_feature(i);
        const size_t len = strlen(name);
        const size_t gap = used > 0 ? 1 : 0;
        if (len + gap >= cap - used)
            break;
        if (gap)
            dst[used] = ' ';
        memcpy(dst + used + gap, name, len);
        used += gap + len;
    }
    dst[used] = '\0';
    return dst;
}
