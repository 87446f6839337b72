/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_fixture.h - a CUDA device for a test: the driver of fake_cuda.c where
 * its folder is in LD_LIBRARY_PATH, as in CTest, else this machine's.
 */
#ifndef CUDA_FIXTURE_H
#define CUDA_FIXTURE_H

#include <stdbool.h>

#include "fake_cuda.h"
#include "tv/cuda.h"

/* Of the fake; NULL with a real driver, or before the first call below. */
extern fake_cuda_set_fn *fake_set;
extern fake_cuda_get_fn *fake_get;

/* Is the driver the fake? */
bool fake_cuda_is_there(void);
/* Options of a device: any code will do for the fake, which has its own. */
struct tvk_cuda_options cuda_device_options(void);
/* For main: device 0, or the end of the program with the reason. */
tvk_cuda *cuda_device_open(void);

#endif
