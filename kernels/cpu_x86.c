/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cpu_x86.c - what this x86-64 processor and its operating system can run.
 *
 * A vector extension is usable only if CPUID reports it and the operating
 * system saves its registers (OSXSAVE, then XCR0 through XGETBV). Intel SDM
 * volume 1, sections 14.3, 14.7.1 and 15.2. Called by dispatch.c under its
 * guard and, read-only, afterwards.
 */
#include "rows.h"
#include "x86/x86_rows.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    /* CPUID.1:ECX */
    BIT_POPCNT = 1 << 23,
    BIT_OSXSAVE = 1 << 27,
    BIT_AVX = 1 << 28,
    BIT_F16C = 1 << 29,
    /* CPUID.7.0:EBX */
    BIT_AVX2 = 1 << 5,
    BIT_AVX512F = 1 << 16,
    BIT_AVX512DQ = 1 << 17,
    BIT_AVX512BW = 1 << 30,
    /* XCR0: SSE and AVX state; opmask and both halves of ZMM state */
    XCR0_AVX = 0x06,
    XCR0_AVX512 = 0xe6,
    /* configuration and data of the AMX tiles */
    XCR0_AMX = 0x60000,
    /* CPUID.7.0:EDX */
    BIT_AMX_BF16 = 1 << 22,
    BIT_AMX_TILE = 1 << 24
};
#define BIT_AVX512VL        (1u << 31)

/* Linux (arch/x86/include/uapi/asm/prctl.h): which states a process may ask
 * for. Whoever uses tiles asks; here it is only whether that can succeed. */
#define ARCH_GET_XCOMP_SUPP 0x1021
#define XCOMP_TILE_DATA     18

enum feature {
    POPCNT,
    F16C,
    AVX2,
    AVX512F,
    AVX512BW,
    AVX512DQ,
    AVX512VL,
    AMX_BF16
};
enum { FEATURE_COUNT = AMX_BF16 + 1 };

static const char *const feature_names[FEATURE_COUNT] = {
    "popcnt",   "f16c",     "avx2",     "avx512f",
    "avx512bw", "avx512dq", "avx512vl", "amx_bf16"};

static unsigned xcr0_low(void)
{
    unsigned eax = 0;
    unsigned edx = 0;
    /* The intrinsic would need -mxsave, which must not reach this file. */
    __asm__ volatile("xgetbv" : "=a"(eax), "=d"(edx) : "c"(0));
    return eax;
}

static int tiles_allowed(void)
{
    unsigned long states = 0;

    return syscall(SYS_arch_prctl, ARCH_GET_XCOMP_SUPP, &states) == 0 &&
           (states >> XCOMP_TILE_DATA & 1u) != 0;
}

/* Bit set of enum feature. */
static unsigned features_read(void)
{
    unsigned a = 0, b = 0, c1 = 0, d = 0, b7 = 0, c7 = 0, d7 = 0;
    unsigned xcr0 = 0;
    unsigned f = 0;

    if (!__get_cpuid(1, &a, &b, &c1, &d))
        return 0;
    if (!__get_cpuid_count(7, 0, &a, &b7, &c7, &d7))
        b7 = d7 = 0;
    if (c1 & BIT_OSXSAVE)
        xcr0 = xcr0_low();
    if (c1 & BIT_POPCNT)
        f |= 1u << POPCNT;
    if ((xcr0 & XCR0_AVX) != XCR0_AVX || !(c1 & BIT_AVX))
        return f;
    if (c1 & BIT_F16C)
        f |= 1u << F16C;
    if (b7 & BIT_AVX2)
        f |= 1u << AVX2;
    if ((xcr0 & XCR0_AVX512) != XCR0_AVX512 || !(b7 & BIT_AVX512F))
        return f;
    f |= 1u << AVX512F;
    if (b7 & BIT_AVX512BW)
        f |= 1u << AVX512BW;
    if (b7 & BIT_AVX512DQ)
        f |= 1u << AVX512DQ;
    if (b7 & BIT_AVX512VL)
        f |= 1u << AVX512VL;
    if ((xcr0 & XCR0_AMX) == XCR0_AMX && (d7 & BIT_AMX_TILE) &&
        (d7 & BIT_AMX_BF16) && tiles_allowed())
        f |= 1u << AMX_BF16;
    return f;
}

int tvk_cpu_supports(enum tvk_isa isa)
{
    const unsigned need_avx2 = 1u << POPCNT | 1u << F16C | 1u << AVX2;
    const unsigned need_avx512 = need_avx2 | 1u << AVX512F | 1u << AVX512BW |
                                 1u << AVX512DQ | 1u << AVX512VL;
    const unsigned have = features_read();

    switch (isa) {
    case TVK_REF:
        return 1;
    case TVK_AVX2:
        return (have & need_avx2) == need_avx2;
    case TVK_AVX512:
        return (have & need_avx512) == need_avx512;
    case TVK_AMX:
        return (have & (need_avx512 | 1u << AMX_BF16)) ==
               (need_avx512 | 1u << AMX_BF16);
    default:
        return 0;
    }
}

void tvk_cpu_override(enum tvk_isa isa, struct tvk_table *t)
{
    if (isa == TVK_AVX2)
        tvk_row_avx2(t);
    else if (isa == TVK_AVX512)
        tvk_row_avx512(t);
}

const char *tvk_cpu_feature(unsigned i)
{
    const unsigned have = features_read();

    for (unsigned f = 0; f < FEATURE_COUNT; f++) {
        if (!(have & 1u << f))
            continue;
        if (i == 0)
            return feature_names[f];
        i--;
    }
    return NULL;
}
