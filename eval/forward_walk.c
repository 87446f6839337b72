/* SPDX-License-Identifier: Apache-2.0 */
/*
 * forward_walk.c - a pass that goes the other way round: it holds h of all
 * windows, and every layer takes them batch by batch, so that something can be
 * learnt from all inputs of a layer before the next one begins.
 */
#include "forward_parts.h"

#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"

struct tve_walk {
    tve_model *m;
    const struct tve_window *windows;
    size_t n_windows, rows;
    float *h; /* [rows, hidden] */
    size_t h_bytes;
    bool mapped, pinned;
    uint64_t budget; /* of a batch */
    size_t layer;    /* the next one */
};

void tve_walk_close(struct tve_walk *k)
{
    if (!k)
        return;
    if (k->mapped)
        tve_scratch_unmap(k->m, k->h, k->h_bytes);
    else if (k->pinned)
        tve_there_unpin(k->m, k->h);
    else
        tv_free(k->h);
    tv_free(k);
}

/* Runs the embedding (tap NULL) or a layer over all windows. `keep`: h stays
 * what it was, outputs go nowhere. */
static enum tv_err walk_batches(struct tve_walk *k, bool embedding, bool keep,
                                const struct tve_tap *tap,
                                const struct tve_walk_progress *progress,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tve_batch b = {.m = NULL};
    const size_t hidden = k->m->spec.hidden;

    for (size_t at = 0, row = 0; at < k->n_windows;) {
        float *const h = k->h + row * hidden;

        TV_TRY(tve_batch_open(k->m, k->windows + at, k->n_windows - at,
                              k->budget, keep ? NULL : h,
                              embedding ? TVE_EMBEDDED : TVE_THERE, &b, err));
        if (b.is_there)
            TV_TRY(tve_there_put(k->m, b.h, h, b.rows * hidden, err));
        else if (keep)
            memcpy(b.h, h, b.rows * hidden * sizeof(*h));
        b.layer = k->layer;
        b.tap = tap;
        TV_TRY(embedding ? tve_batch_embed(&b, err) : tve_batch_layer(&b, err));
        if (b.is_there && !keep)
            TV_TRY(tve_there_get(k->m, h, b.h, b.rows * hidden, err));
        at += b.n_windows;
        row += b.rows;
        if (progress)
            TV_TRY(progress->step(progress->arg, b.rows, err));
        tve_batch_close(&b);
        memset(&b, 0, sizeof(b));
    }
out:
    tve_batch_close(&b);
    return rc;
}

/* ---- what it takes ------------------------------------------------------- */

/* Bytes of a row that a walk's batches have here, beside the streams; with a
 * device it is the embedding's alone. */
static uint64_t walk_row(const tve_model *m, bool look)
{
    struct tve_batch b = {.m = NULL};
    const size_t floats =
        m->device
            ? tve_batch_embedding_floats(&m->spec, m->globals)
            : tve_batch_row_floats(&m->spec, &b) - (look ? 0 : m->spec.hidden);

    return (uint64_t)floats * sizeof(float);
}

/* As tve_walk_open and tve_batch_open will do it: several groups side by side
 * only within the budget, so that one alone may be too large. */
enum tv_err tve_walk_admit(tve_model *m, const struct tve_window *w, size_t n,
                           uint64_t reserve, struct tv_error *err)
{
    const uint64_t all = tve_activation_budget(m);
    const size_t hidden = m->spec.hidden;
    const uint64_t row = walk_row(m, false);
    uint64_t budget = all > reserve ? all - reserve : 0;
    uint64_t h = 0, most = 0;

    for (size_t i = 0; i < n; i++)
        h += (uint64_t)w[i].n * hidden * sizeof(float);
    if (h <= budget / 2) {
        budget -= h;
        h = 0;
    }
    for (size_t i = 0; i < n;) {
        const size_t windows = tve_group_windows(w, i, n);
        const uint64_t bytes = (uint64_t)windows * w[i].n * row;
        most = bytes > budget && bytes > most ? bytes : most;
        i += windows;
    }
    return tve_scratch_charge(m, most + h, err);
}

enum tv_err tve_walk_fits(const tve_model *m, size_t n, size_t context,
                          struct tv_error *err)
{
    struct tve_batch b = {.m = NULL};
    const size_t together =
        context < TVE_GROUP_ROWS ? TVE_GROUP_ROWS / context : 1;

    return tve_there_fits(m, tve_batch_row_floats(&m->spec, &b),
                          (n < together ? n : together) * context, context,
                          true, err);
}

static uint64_t whole_pages(uint64_t bytes)
{
    return (bytes + 4095) & ~UINT64_C(4095);
}

void tve_walk_scratch(const tve_model *m, size_t n, size_t context,
                      uint64_t reserve, uint64_t most, bool look,
                      struct tve_scratch *out)
{
    const uint64_t all = tve_activation_budget(m);
    const uint64_t budget = all > reserve ? all - reserve : 0;
    const size_t hidden = m->spec.hidden;
    const uint64_t row = walk_row(m, look);
    const uint64_t together =
        context < TVE_GROUP_ROWS ? TVE_GROUP_ROWS / context : 1;
    const uint64_t group = (n < together ? n : together) * context * row;
    uint64_t h = 0;

    if (!tv_mul_u64((uint64_t)context * hidden * sizeof(float), n, &h))
        h = UINT64_MAX / 4; /* more than there is of anything */
    /* Half of the rest at most is for streams in memory, with more memory
     * too; longer ones than `most` never are there. */
    const uint64_t rest =
        h > most ? budget : budget - (h < budget / 2 ? h : budget / 2);
    out->streams = h > budget / 2 || h > most ? whole_pages(h) : 0;
    out->batch = group > rest ? whole_pages(group) : 0;
    /* As many whole groups as there is room for. */
    const uint64_t rows =
        n < TVE_BATCH_ROWS / context ? n * context : TVE_BATCH_ROWS;
    const uint64_t batch = row == 0 || rows < rest / row ? rows * row : rest;
    const uint64_t workers =
        m->device ? tve_device_host_bytes(m) : m->memory_bytes - all;
    out->heap = reserve < all ? reserve : all;
    out->heap += workers + (group > rest ? 0 : batch > group ? batch : group);
    out->heap += out->streams > 0 ? 0 : h;
}

/* ---- walking ------------------------------------------------------------- */

enum tv_err tve_walk_open(tve_model *m, const struct tve_window *w, size_t n,
                          uint64_t reserve, uint64_t most, struct tv_error *err,
                          struct tve_walk **out)
{
    enum tv_err rc = TV_OK;
    struct tve_walk *const k = tv_calloc(1, sizeof(*k));
    const uint64_t all = tve_activation_budget(m);
    size_t row_bytes = 0;

    *out = NULL;
    if (!k)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    k->m = m;
    k->windows = w;
    k->n_windows = n;
    k->budget = all > reserve ? all - reserve : 0;
    TV_TRY(tve_check_windows(m, w, n, err));
    for (size_t i = 0; i < n; i++)
        k->rows += w[i].n;
    if (!tv_mul_size(m->spec.hidden, sizeof(*k->h), &row_bytes) ||
        !tv_mul_size(k->rows, row_bytes, &k->h_bytes)) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (k->h_bytes > k->budget / 2 || k->h_bytes > most) {
        TV_TRY(tve_scratch_map(m, k->h_bytes, &k->h, err));
        k->mapped = true;
    } else {
        /* pinned, copies to and from a device take a fraction of the time */
        k->pinned = m->device && tve_there_pin(m, k->h_bytes, &k->h);
        if (!k->pinned)
            k->h = tv_alloc_aligned(k->h_bytes ? k->h_bytes : 1);
        if (!k->h) {
            rc = tv_error_set(err, TV_E_NOMEM,
                              "out of memory (%zu bytes of activations)",
                              k->h_bytes);
            goto out;
        }
        k->budget -= k->h_bytes;
    }
    TV_TRY(walk_batches(k, true, false, NULL, NULL, err));
    *out = k;
out:
    if (rc != TV_OK)
        tve_walk_close(k);
    return rc;
}

enum tv_err tve_walk_look(struct tve_walk *k, const struct tve_tap *tap,
                          struct tv_error *err)
{
    return walk_batches(k, false, true, tap, NULL, err);
}

enum tv_err tve_walk_layer(struct tve_walk *k, const struct tve_tap *tap,
                           const struct tve_walk_progress *progress,
                           struct tv_error *err)
{
    const enum tv_err rc = walk_batches(k, false, false, tap, progress, err);

    if (rc == TV_OK)
        k->layer++;
    return rc;
}
