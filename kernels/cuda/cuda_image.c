/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_image.c - the device code in the binary.
 *
 * TVK_CUDA_FATBIN names the file that nvcc made: a machine code for each
 * architecture asked for, and PTX of the newest, which the driver compiles for
 * GPUs that came later. The assembler takes it in as it is.
 */
#include "cuda/cuda_parts.h"

__asm__(".pushsection .rodata\n"
        ".balign 64\n"
        ".hidden tvk_cuda_fatbin\n"
        ".globl tvk_cuda_fatbin\n"
        "tvk_cuda_fatbin:\n"
        ".incbin \"" TVK_CUDA_FATBIN "\"\n"
        ".balign 64\n"
        ".popsection\n");

extern const unsigned char tvk_cuda_fatbin[];

const void *tvk_cuda_image(void)
{
    return tvk_cuda_fatbin;
}

const char *tvk_cuda_image_missing(void)
{
    return "";
}
