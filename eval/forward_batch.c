/* SPDX-License-Identifier: Apache-2.0 */
/*
 * forward_batch.c - which windows go through the model together, and where
 * their activations lie: in memory, in a scratch file, or on a device.
 */
#include "forward_parts.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/sys.h"

enum tv_err tve_scratch_charge(tve_model *m, uint64_t bytes,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;

    bytes = (bytes + 4095) & ~UINT64_C(4095);
    if (!m->quota_of || bytes <= m->charged_bytes)
        return TV_OK;
    rc = tv_store_scratch_set(m->quota_of, bytes, err);
    if (rc == TV_OK)
        m->charged_bytes = bytes;
    return rc;
}

void tve_scratch_unmap(tve_model *m, float *p, size_t bytes)
{
    tv_sys()->munmap(p, bytes);
    m->scratch_bytes -= bytes;
}

enum tv_err tve_scratch_map(tve_model *m, size_t bytes, float **out,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    /* unique while it has a name: one model maps one file at a time */
    char *const path = tv_asprintf("%s/tveval-scratch.%ld.%p", m->scratch_dir,
                                   (long)getpid(), (const void *)m);
    int fd = -1;
    void *p = NULL;

    if (!path)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    TV_TRY(tve_scratch_charge(m, m->scratch_bytes + bytes, err));
    fd = tv_sys()->open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) {
        rc = tv_error_sys(err, errno, "cannot create scratch file %s", path);
        goto out;
    }
    tv_sys()->unlink(path);
    /* Reserved now, so that a full disk is an error and no SIGBUS later. */
    if (tv_sys()->fallocate(fd, 0, 0, (off_t)bytes) != 0 &&
        errno != EOPNOTSUPP) {
        rc = tv_error_sys(err, errno, "scratch file of %zu bytes in %s", bytes,
                          m->scratch_dir);
        goto out;
    }
    if (tv_sys()->ftruncate(fd, (off_t)bytes) != 0) {
        rc = tv_error_sys(err, errno, "scratch file in %s", m->scratch_dir);
        goto out;
    }
    p = tv_sys()->mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) {
        rc = tv_error_sys(err, errno, "mapping a scratch file of %zu bytes",
                          bytes);
        goto out;
    }
    m->scratch_bytes += bytes;
    *out = p;
out:
    if (fd >= 0)
        tv_sys()->close(fd);
    tv_free(path);
    return rc;
}

size_t tve_batch_row_floats(const struct tve_spec *s, struct tve_batch *b)
{
    const size_t heads = s->n_heads * s->head_dim;

    b->wide = s->hidden > s->embed_dim ? s->hidden : s->embed_dim;
    b->qkv_width = heads + 2 * s->n_kv * s->head_dim;
    b->head_width = heads;
    b->inner_width = s->gated ? 2 * s->inner : s->inner;
    b->space = b->qkv_width + b->head_width;
    if (b->inner_width > b->space)
        b->space = b->inner_width;
    return s->hidden + 2 * b->wide + b->space;
}

uint64_t tve_activation_budget(const tve_model *m)
{
    const uint64_t per_worker = (8u << 20) + TVE_GROUP_ROWS * 1024u * 4u;
    const uint64_t workers = tv_pool_threads(m->pool) * per_worker +
                             (m->device ? TVE_DEVICE_PINNED : 0) +
                             tve_split_slab(m);

    return m->memory_bytes > 2 * workers ? m->memory_bytes - workers
                                         : m->memory_bytes / 2;
}

/* ---- what rows need beside weights --------------------------------------- */

static enum tv_err make_rotations(struct tve_batch *b, struct tv_error *err)
{
    const struct tve_spec *const s = b->spec;

    for (unsigned r = 0; r < 2; r++) {
        const struct tve_rope *const rope = &s->rope[r];
        const size_t half = tve_rope_half(rope);
        float *inv = NULL;

        if (half == 0)
            continue;
        inv = tv_calloc(half, sizeof(*inv));
        b->cos_rows[r] = tv_calloc(b->longest * half, sizeof(float));
        b->sin_rows[r] = tv_calloc(b->longest * half, sizeof(float));
        if (!inv || !b->cos_rows[r] || !b->sin_rows[r]) {
            tv_free(inv);
            return tv_error_set(err, TV_E_NOMEM, "out of memory");
        }
        tve_rope_frequencies(rope, b->longest, inv);
        for (size_t p = 0; p < b->longest; p++) {
            for (size_t i = 0; i < half; i++) {
                /* the product is rounded to fp32, as models are trained */
                const double angle = (double)((float)p * inv[i]);
                b->cos_rows[r][p * half + i] =
                    (float)cos(angle) * (float)rope->scale;
                b->sin_rows[r][p * half + i] =
                    (float)sin(angle) * (float)rope->scale;
            }
        }
        tv_free(inv);
    }
    return TV_OK;
}

/* ALiBi (Press et al., ICLR 2022): a geometric series; heads beyond a power of
 * two take every other term of the next finer one. */
static enum tv_err make_slopes(struct tve_batch *b, struct tv_error *err)
{
    const size_t n = b->spec->n_heads;
    size_t power = 1;

    if (b->spec->positions != TVE_ALIBI)
        return TV_OK;
    b->slopes = tv_calloc(n, sizeof(float));
    if (!b->slopes)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    while (power * 2 <= n)
        power *= 2;
    for (size_t i = 0; i < n; i++) {
        const double terms = i < power ? (double)power : 2.0 * (double)power;
        const double exponent =
            i < power ? (double)(i + 1) : (double)(2 * (i - power) + 1);

        b->slopes[i] = (float)pow(2.0, -8.0 / terms * exponent);
    }
    return TV_OK;
}

/* ---- batches ------------------------------------------------------------- */

/* What batch_fill allocates. */
static void batch_empty(struct tve_batch *b)
{
    tv_free(b->starts);
    tv_free(b->position);
    tv_free(b->ids);
    tv_free(b->groups);
    b->starts = NULL;
    b->position = NULL;
    b->ids = NULL;
    b->groups = NULL;
    for (int r = 0; r < 2; r++) {
        tv_free(b->cos_rows[r]);
        tv_free(b->sin_rows[r]);
        b->cos_rows[r] = NULL;
        b->sin_rows[r] = NULL;
    }
    tv_free(b->slopes);
    b->slopes = NULL;
    b->rows = b->n_windows = b->n_groups = b->longest = 0;
}

void tve_batch_close(struct tve_batch *b)
{
    batch_empty(b);
    if (b->mapped)
        tve_scratch_unmap(b->m, b->memory, b->memory_bytes);
    else
        tv_free(b->memory);
}

size_t tve_group_windows(const struct tve_window *w, size_t from, size_t n)
{
    size_t rows = w[from].n, i = from + 1;

    while (i < n && w[i].n == w[from].n && rows + w[i].n <= TVE_GROUP_ROWS)
        rows += w[i++].n;
    return i - from;
}

static bool depends_on_length(const struct tve_spec *s)
{
    for (int r = 0; r < 2; r++)
        if (s->rope[r].dims > 0 && (s->rope[r].type == TVE_ROPE_DYNAMIC ||
                                    s->rope[r].type == TVE_ROPE_LONG))
            return true;
    return false;
}

/* Puts as many groups of w into b as `most` rows allow, at least one. */
static enum tv_err batch_fill(struct tve_batch *b, const struct tve_window *w,
                              size_t n_windows, uint64_t most,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const bool same_length = depends_on_length(b->spec);

    b->windows = w;
    b->groups = tv_calloc(n_windows, sizeof(*b->groups));
    if (!b->groups)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    while (b->n_windows < n_windows) {
        const size_t n = tve_group_windows(w, b->n_windows, n_windows);
        const size_t rows = n * w[b->n_windows].n;

        if (b->n_groups > 0 &&
            (b->rows + rows > TVE_BATCH_ROWS || b->rows + rows > most ||
             (same_length && w[b->n_windows].n != w[0].n)))
            break;
        b->groups[b->n_groups++] = (struct tve_group){b->rows, rows};
        b->rows += rows;
        b->n_windows += n;
    }
    b->starts = tv_calloc(b->n_windows + 1, sizeof(*b->starts));
    b->position = tv_calloc(b->rows, sizeof(*b->position));
    b->ids = tv_calloc(b->rows, sizeof(*b->ids));
    if (!b->starts || !b->position || !b->ids)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    for (size_t i = 0; i < b->n_windows; i++) {
        const size_t at = b->starts[i];

        b->starts[i + 1] = at + w[i].n;
        b->longest = w[i].n > b->longest ? w[i].n : b->longest;
        memcpy(b->ids + at, w[i].ids, w[i].n * sizeof(*b->ids));
        for (size_t k = 0; k < w[i].n; k++)
            b->position[at + k] = (uint32_t)k;
    }
    TV_TRY(make_rotations(b, err));
    TV_TRY(make_slopes(b, err));
out:
    return rc;
}

/* A batch on the device, smaller when it has less memory than it is allowed to
 * have. BUDGET: not even a group fits. */
static enum tv_err batch_there(struct tve_batch *b, const struct tve_window *w,
                               size_t n_windows, size_t floats, bool walk,
                               struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    size_t longest = 0, most = 0, rows = 0;

    for (size_t i = 0; i < n_windows; i++) {
        longest = w[i].n > longest ? w[i].n : longest;
        rows += w[i].n;
    }
    const size_t least = longest > TVE_GROUP_ROWS ? longest : TVE_GROUP_ROWS;
    const size_t group = rows < least ? rows : least;
    TV_TRY(tve_there_fits(b->m, floats,
                          tve_group_windows(w, 0, n_windows) * w[0].n, w[0].n,
                          walk, err));
    TV_TRY(tve_there_rows(b->m, floats, longest, group, walk, &most, err));
    do {
        batch_empty(b);
        TV_TRY(batch_fill(b, w, n_windows, most, err));
        const struct tve_there_start start = {
            .rows = b->rows,
            .floats = floats,
            .longest = b->longest,
            .group = group,
            .position = b->position,
            .cos_rows = {b->cos_rows[0], b->cos_rows[1]},
            .sin_rows = {b->sin_rows[0], b->sin_rows[1]},
            .slopes = b->slopes,
        };
        rc = tve_there_open(b->m, &start, &b->there, err);
        most = b->rows / 2;
    } while (rc == TV_E_BUDGET && b->n_groups > 1);
    if (rc == TV_OK)
        b->is_there = true;
out:
    return rc;
}

size_t tve_batch_embedding_floats(const struct tve_spec *s,
                                  const struct tve_param *globals)
{
    const size_t wide = s->hidden > s->embed_dim ? s->hidden : s->embed_dim;

    return globals[TVE_PROJECT_IN].w.t ? wide : 0;
}

enum tv_err tve_batch_open(tve_model *m, const struct tve_window *w,
                           size_t n_windows, uint64_t budget, float *h,
                           enum tve_place place, struct tve_batch *b,
                           struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct tve_spec *const s = &m->spec;
    struct tv_error why = {.code = TV_OK};
    size_t floats = 0, bytes = 0;

    memset(b, 0, sizeof(*b));
    b->m = m;
    b->spec = s;
    floats = tve_batch_row_floats(s, b);
    if (place == TVE_THERE ? m->device != NULL
                           : place == TVE_ANYWHERE && tve_there_wanted(m)) {
        /* who looks at inputs needs some of the device too */
        rc = batch_there(b, w, n_windows, floats, place == TVE_THERE, &why);
        if (rc == TV_OK) {
            b->h = b->there.memory;
            goto lay_out;
        }
        if (rc != TV_E_BUDGET || place == TVE_THERE) {
            if (err)
                *err = why;
            goto out;
        }
        batch_empty(b);
        tve_there_give_up(m, &why);
    }
    floats -= h ? s->hidden : 0;
    if (place == TVE_EMBEDDED)
        floats = tve_batch_embedding_floats(s, m->globals);
    if (!tv_mul_size(floats, sizeof(float), &bytes)) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(batch_fill(b, w, n_windows, bytes ? budget / bytes : SIZE_MAX, err));
    if (!tv_mul_size(b->rows, bytes, &b->memory_bytes)) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (b->memory_bytes > budget) {
        TV_TRY(tve_scratch_map(m, b->memory_bytes, &b->memory, err));
        b->mapped = true;
    } else {
        b->memory = tv_alloc_aligned(b->memory_bytes ? b->memory_bytes : 1);
        if (!b->memory) {
            rc = tv_error_set(err, TV_E_NOMEM,
                              "out of memory (%zu bytes of activations)",
                              b->memory_bytes);
            goto out;
        }
    }
    b->h = h ? h : b->memory;
lay_out:
    b->x = h && !b->is_there ? b->memory : b->h + b->rows * s->hidden;
    if (place == TVE_EMBEDDED)
        goto out;
    b->y = b->x + b->rows * b->wide;
    b->s = b->y + b->rows * b->wide;
out:
    return rc;
}
