/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_none.c - what a build without the CUDA toolkit has instead of kernels:
 * the reason.
 */
#include "cuda/cuda_parts.h"

const void *tvk_cuda_image(void)
{
    return NULL;
}

const char *tvk_cuda_image_missing(void)
{
    return "this program was built without CUDA";
}
