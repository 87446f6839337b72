/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_load.c - finds the CUDA driver at run time.
 *
 * Only libcuda.so.1, which comes with the kernel module; the toolkit's run-time
 * library is not needed. A driver that lacks a symbol is older than CUDA 12.
 */
#include "cuda/cuda_parts.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#define DRIVER "libcuda.so.1"

/* Written once under the guard, read-only afterwards. */
static struct tvk_cuda_api driver;
static const char *reason;
static char reason_text[160];
static pthread_once_t driver_once = PTHREAD_ONCE_INIT;

/* Stores a function's address; false when the library has none. POSIX lets an
 * object pointer from dlsym hold it, ISO C has no cast for that. */
static bool take(void *library, const char *symbol, void *field)
{
    void *const at = dlsym(library, symbol);

    if (at == NULL) {
        (void)snprintf(reason_text, sizeof reason_text,
                       "the CUDA driver has no %s: it is older than CUDA 12",
                       symbol);
        reason = reason_text;
        return false;
    }
    memcpy(field, &at, sizeof at);
    return true;
}

static void load(void)
{
    void *const library = dlopen(DRIVER, RTLD_NOW | RTLD_LOCAL);

    if (library == NULL) {
        reason = "no CUDA driver (" DRIVER ") is installed";
        return;
    }
#define TAKE(field, symbol, params)                                            \
    if (!take(library, #symbol, &driver.field))                                \
        return;
    TVK_CUDA_DRIVER(TAKE)
#undef TAKE
    const tvk_cu_result code = driver.init(0);
    if (code == TVK_CU_OK)
        return;
    const char *name = NULL;
    if (code == TVK_CU_NO_DEVICE) {
        reason = "the CUDA driver finds no GPU";
        return;
    }
    if (driver.error_name(code, &name) != TVK_CU_OK || name == NULL)
        name = "unknown error";
    (void)snprintf(reason_text, sizeof reason_text,
                   "the CUDA driver does not start: %s (%d)", name, (int)code);
    reason = reason_text;
}

const struct tvk_cuda_api *tvk_cuda_driver(const char **why)
{
    (void)pthread_once(&driver_once, load);
    if (reason != NULL) {
        *why = reason;
        return NULL;
    }
    return &driver;
}
