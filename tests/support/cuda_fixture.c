/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_fixture.c - finds the fake driver; see cuda_fixture.h.
 */
#include "cuda_fixture.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

fake_cuda_set_fn *fake_set;
fake_cuda_get_fn *fake_get;

bool fake_cuda_is_there(void)
{
    /* Loaded for good, as by the kernels. */
    void *const driver = dlopen("libcuda.so.1", RTLD_NOW);
    void *const set = driver ? dlsym(driver, "fake_cuda_set") : NULL;
    void *const get = driver ? dlsym(driver, "fake_cuda_get") : NULL;

    if (!set || !get)
        return false;
    memcpy(&fake_set, &set, sizeof fake_set);
    memcpy(&fake_get, &get, sizeof fake_get);
    return true;
}

struct tvk_cuda_options cuda_device_options(void)
{
    struct tvk_cuda_options o;

    tvk_cuda_options_init(&o);
    if (fake_cuda_is_there())
        o.image = "kernels of the emulated grid";
    return o;
}

tvk_cuda *cuda_device_open(void)
{
    const struct tvk_cuda_options o = cuda_device_options();
    struct tv_error err = {.code = TV_OK};
    tvk_cuda *d = NULL;

    if (tvk_cuda_open(&o, &err, &d) != TV_OK) {
        (void)fprintf(stderr, "%s\n", err.msg);
        exit(1);
    }
    (void)printf("on %s\n", tvk_cuda_about(d)->name);
    return d;
}
