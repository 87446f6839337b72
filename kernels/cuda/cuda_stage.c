/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_stage.c - parts of a host matrix to the device and back: see
 * cuda_layer_parts.h.
 */
#include "cuda/cuda_layer_parts.h"

#include <assert.h>
#include <string.h>

enum tv_err tvk_cuda_stage_open(tvk_cuda *d, size_t floats,
                                struct tv_error *err, struct tvk_cuda_stage *s)
{
    enum tv_err rc = TV_OK;

    s->device = d;
    s->floats = floats;
    for (unsigned i = 0; i < 2; i++) {
        TV_TRY(tvk_cuda_pin(d, floats * sizeof(float), err, &s->host[i]));
        TV_TRY(tvk_cuda_stream_open(d, err, &s->stream[i]));
    }
out:
    return rc;
}

void tvk_cuda_stage_close(struct tvk_cuda_stage *s)
{
    for (unsigned i = 0; i < 2; i++) {
        tvk_cuda_stream_close(s->stream[i]);
        tvk_cuda_unpin(s->device, s->host[i]);
    }
    *s = (struct tvk_cuda_stage){.floats = 0};
}

/* Both are idle: their buffers are of no use to what failed. */
static enum tv_err settled(struct tvk_cuda_stage *s, enum tv_err rc)
{
    if (rc != TV_OK)
        for (unsigned i = 0; i < 2; i++)
            tvk_cuda_settle(s->stream[i]);
    return rc;
}

static size_t rows_at_once(const struct tvk_cuda_stage *s, size_t width)
{
    assert(width > 0 && width <= s->floats);
    return s->floats / width;
}

enum tv_err tvk_cuda_stage_up(struct tvk_cuda_stage *s, tvk_cuda_ptr to,
                              const float *from, size_t ld, size_t rows,
                              size_t width, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t each = rows_at_once(s, width);

    for (size_t row = 0, k = 0; row < rows; row += each, k++) {
        const size_t n = tvk_cuda_least(each, rows - row);
        float *const host = s->host[k % 2];

        TV_TRY(tvk_cuda_sync(s->stream[k % 2], err));
        for (size_t r = 0; r < n; r++)
            memcpy(host + r * width, from + (row + r) * ld,
                   width * sizeof *host);
        TV_TRY(tvk_cuda_upload(s->stream[k % 2],
                               tvk_cuda_float(to, row * width), host,
                               n * width * sizeof *host, err));
    }
    for (unsigned i = 0; i < 2; i++)
        TV_TRY(tvk_cuda_sync(s->stream[i], err));
out:
    return settled(s, rc);
}

enum tv_err tvk_cuda_stage_down(struct tvk_cuda_stage *s, float *to, size_t ld,
                                tvk_cuda_ptr from, size_t rows, size_t width,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const size_t each = rows_at_once(s, width);
    const size_t n_parts = (rows + each - 1) / each;

    /* Part k is fetched while k - 1 is unpacked. */
    for (size_t k = 0; k <= n_parts; k++) {
        if (k < n_parts)
            TV_TRY(tvk_cuda_download(s->stream[k % 2], s->host[k % 2],
                                     tvk_cuda_float(from, k * each * width),
                                     tvk_cuda_least(each, rows - k * each) *
                                         width * sizeof(float),
                                     err));
        if (k == 0)
            continue;
        const size_t row = (k - 1) * each;
        const float *const host = s->host[(k - 1) % 2];

        TV_TRY(tvk_cuda_sync(s->stream[(k - 1) % 2], err));
        for (size_t r = 0; r < tvk_cuda_least(each, rows - row); r++)
            memcpy(to + (row + r) * ld, host + r * width, width * sizeof *to);
    }
out:
    return settled(s, rc);
}
