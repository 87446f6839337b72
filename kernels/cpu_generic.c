/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cpu_generic.c - processors without vector rows: the reference row only.
 */
#include "rows.h"

int tvk_cpu_supports(enum tvk_isa isa)
{
    return isa == TVK_REF;
}

void tvk_cpu_override(enum tvk_isa isa, struct tvk_table *t)
{
    (void)isa;
    (void)t;
}

const char *tvk_cpu_feature(unsigned i)
{
    (void)i;
    return NULL;
}
