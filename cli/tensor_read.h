/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tensor_read.h - reading a view with its checksums checked, and statistics
 * over one.
 */
#ifndef TVC_TENSOR_READ_H
#define TVC_TENSOR_READ_H

#include <stddef.h>
#include <stdint.h>

#include "cli.h"
#include "tv/kernels.h"
#include "tv/pool.h"
#include "tv/view.h"

/* Checks the leaves that [off, off + n) touches, where the view has leaves.
 * CORRUPT names `what` (object/tensor) and the place. Any thread. */
TV_NODISCARD enum tv_err tvc_leaves_check(const struct tv_view *v, uint64_t off,
                                          uint64_t n, const char *what,
                                          struct tv_error *err);

/* Reads pieces of one view in any order; each leaf is checked once. */
struct tvc_reader {
    const struct tv_view *view;
    const char *what;       /* borrowed */
    unsigned char *checked; /* one bit per leaf */
};
TV_NODISCARD enum tv_err tvc_reader_open(struct tvc_reader *r,
                                         const struct tv_view *view,
                                         const char *what,
                                         struct tv_error *err);
void tvc_reader_close(struct tvc_reader *r);
TV_NODISCARD enum tv_err tvc_reader_read(struct tvc_reader *r, uint64_t off,
                                         uint64_t n, void *dst,
                                         struct tv_error *err);

/* Statistics of every element; numbers that are not floats count as doubles.
 * UNSUPPORTED for dtypes without values (8-bit floats, complex). */
TV_NODISCARD enum tv_err tvc_view_stats(const struct tvk_table *k,
                                        tv_pool *pool, const struct tv_view *v,
                                        const char *what, struct tvk_stats *out,
                                        struct tv_error *err);

#endif
