/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_tiles.c - see cuda_tiles.h.
 *
 * Tiles are multiples of 64 elements, so that the words of masks are not
 * shared. Where tiles are cut never shows in a result: kernels look at their
 * element only, or add integers, or are not cut (`whole`).
 */
#include "cuda/cuda_tiles.h"

#include <assert.h>
#include <string.h>

#include "tv/alloc.h"

#define N_SLOTS    2u
#define LANES_MAX  8u
#define LEAST_TILE 64u
/* A slot grows to this without being asked for more. */
#define SLOT_BYTES (2u << 20)
#define ALIGN      256u

struct slot {
    unsigned char *host;
    tvk_cuda_ptr device;
    size_t bytes;
    tvk_cuda_stream *stream;
    bool busy; /* a tile is on its way, `first` and `n` of it */
    uint64_t first, n;
    size_t result_at, out_at;
};

struct lane {
    bool taken;
    struct slot slots[N_SLOTS];
};

struct tvk_tiles {
    tvk_cuda *device;
    size_t slot_bytes; /* most that one slot may stage */
    unsigned n_lanes;
    pthread_mutex_t mutex; /* guards `taken` */
    pthread_cond_t free_lane;
    struct lane lanes[LANES_MAX];
};

struct layout { /* of a slot for tiles of `elems` elements */
    size_t result, out, scratch, end;
    size_t up_bytes, host_bytes; /* scratch is on the device only */
};

static size_t round_up(size_t n, size_t to)
{
    return (n + to - 1) / to * to;
}

/* Bytes of `n` elements, n a multiple of 8 or the last of a call. */
static size_t bytes_of(uint32_t bits, uint64_t n)
{
    if (bits == 1) /* words of a mask */
        return (size_t)((n + 63) / 64 * 8);
    return (size_t)(n * (bits / 8));
}

static size_t part_bytes(const struct tvk_tile_part *p, uint64_t n)
{
    return p->bits == 0 ? p->bytes : bytes_of(p->bits, n);
}

static struct layout lay_out(const struct tvk_tile_op *op, uint64_t elems)
{
    struct layout l = {.result = 0};
    size_t at = 0;

    for (size_t i = 0; i < op->n_in; i++)
        at += round_up(part_bytes(&op->in[i], elems), ALIGN);
    l.result = at;
    at += round_up(op->result_bytes, ALIGN);
    l.up_bytes = at;
    l.out = at;
    at += round_up(bytes_of(op->out_bits, elems), ALIGN);
    l.host_bytes = at;
    l.scratch = at;
    at += round_up((size_t)(op->scratch_bits * elems / 8), ALIGN);
    l.end = at;
    return l;
}

/* The smallest tile that the operation allows. */
static uint64_t least_tile(const struct tvk_tile_op *op)
{
    return op->whole || op->n < LEAST_TILE ? op->n : LEAST_TILE;
}

/* The largest tile, a multiple of 64 or all, that a slot of `bytes` holds;
 * 0: not even the least. */
static uint64_t largest_tile(const struct tvk_tile_op *op, size_t bytes)
{
    uint64_t n = op->n;

    if (lay_out(op, least_tile(op)).end > bytes)
        return 0;
    while (lay_out(op, n).end > bytes)
        n = n / 2 <= LEAST_TILE ? least_tile(op) : round_up(n / 2, LEAST_TILE);
    return n;
}

bool tvk_tiles_fit(const struct tvk_tiles *t, const struct tvk_tile_op *op)
{
    return lay_out(op, least_tile(op)).end <= t->slot_bytes;
}

/* ---- lanes --------------------------------------------------------------- */

struct tvk_tiles *tvk_tiles_open(tvk_cuda *d)
{
    struct tvk_tiles *t = tv_calloc(1, sizeof *t);
    size_t staging = d->options.staging_bytes;

    if (t == NULL)
        return NULL;
    t->device = d;
    /* A device with little memory is no reason for tiles that do not fit. */
    if (staging > d->info.budget_bytes)
        staging = (size_t)d->info.budget_bytes;
    t->n_lanes = (unsigned)(staging / (N_SLOTS * (size_t)SLOT_BYTES));
    if (t->n_lanes > LANES_MAX)
        t->n_lanes = LANES_MAX;
    if (t->n_lanes < 1)
        t->n_lanes = 1;
    t->slot_bytes = staging / N_SLOTS / t->n_lanes / ALIGN * ALIGN;
    (void)pthread_mutex_init(&t->mutex, NULL);
    (void)pthread_cond_init(&t->free_lane, NULL);
    return t;
}

size_t tvk_tiles_staging(const struct tvk_tiles *t)
{
    return t->n_lanes * N_SLOTS * t->slot_bytes;
}

static void slot_shrink(struct tvk_tiles *t, struct slot *s)
{
    tvk_cuda_free(t->device, s->device, s->bytes);
    tvk_cuda_unpin(t->device, s->host);
    s->device = 0;
    s->host = NULL;
    s->bytes = 0;
}

void tvk_tiles_close(struct tvk_tiles *t)
{
    if (t == NULL)
        return;
    for (unsigned i = 0; i < t->n_lanes; i++)
        for (unsigned k = 0; k < N_SLOTS; k++) {
            struct slot *s = &t->lanes[i].slots[k];
            tvk_cuda_stream_close(s->stream);
            slot_shrink(t, s);
        }
    (void)pthread_cond_destroy(&t->free_lane);
    (void)pthread_mutex_destroy(&t->mutex);
    tv_free(t);
}

void tvk_tiles_reclaim(struct tvk_tiles *t)
{
    (void)pthread_mutex_lock(&t->mutex);
    for (unsigned i = 0; i < t->n_lanes; i++)
        for (unsigned k = 0; k < N_SLOTS && !t->lanes[i].taken; k++)
            slot_shrink(t, &t->lanes[i].slots[k]);
    (void)pthread_mutex_unlock(&t->mutex);
}

static struct lane *lane_take(struct tvk_tiles *t)
{
    struct lane *got = NULL;

    (void)pthread_mutex_lock(&t->mutex);
    while (got == NULL) {
        for (unsigned i = 0; i < t->n_lanes && got == NULL; i++)
            if (!t->lanes[i].taken)
                got = &t->lanes[i];
        if (got == NULL)
            (void)pthread_cond_wait(&t->free_lane, &t->mutex);
    }
    got->taken = true;
    (void)pthread_mutex_unlock(&t->mutex);
    return got;
}

static void lane_give(struct tvk_tiles *t, struct lane *lane)
{
    (void)pthread_mutex_lock(&t->mutex);
    lane->taken = false;
    (void)pthread_cond_signal(&t->free_lane);
    (void)pthread_mutex_unlock(&t->mutex);
}

/* Makes a slot hold `bytes`. */
static enum tv_err slot_grow(struct tvk_tiles *t, struct slot *s, size_t bytes,
                             const char *what, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    void *host = NULL;

    if (s->stream == NULL)
        TV_TRY(tvk_cuda_stream_open(t->device, err, &s->stream));
    if (s->bytes >= bytes)
        goto out;
    slot_shrink(t, s);
    TV_TRY(tvk_cuda_alloc(t->device, bytes, what, err, &s->device));
    s->bytes = bytes;
    TV_TRY(tvk_cuda_pin(t->device, bytes, err, &host));
    s->host = host;
out:
    return rc;
}

/* Both slots for tiles of *elems elements; fewer when there is no room. */
static enum tv_err lane_prepare(struct tvk_tiles *t, struct lane *lane,
                                const struct tvk_tile_op *op, uint64_t *elems,
                                struct tv_error *err)
{
    enum tv_err rc = TV_E_BUDGET;
    uint64_t n = largest_tile(op, t->slot_bytes);

    assert(n > 0);
    while (rc == TV_E_BUDGET) {
        size_t bytes = round_up(lay_out(op, n).end, 4096);
        if (bytes > t->slot_bytes)
            bytes = t->slot_bytes;
        const unsigned n_slots = n < op->n && !op->in_order ? N_SLOTS : 1;
        rc = TV_OK;
        for (unsigned k = 0; k < n_slots && rc == TV_OK; k++)
            rc = slot_grow(t, &lane->slots[k], bytes, op->name, err);
        *elems = n;
        if (rc != TV_E_BUDGET || n == least_tile(op))
            break;
        /* What the lane holds is part of what is missing. */
        for (unsigned k = 0; k < N_SLOTS; k++)
            slot_shrink(t, &lane->slots[k]);
        n = n / 2 <= LEAST_TILE || op->whole ? least_tile(op)
                                             : round_up(n / 2, LEAST_TILE);
    }
    return rc;
}

/* ---- tiles --------------------------------------------------------------- */

/* Packs a tile, and starts its way. */
static enum tv_err tile_start(struct slot *s, const struct tvk_tile_op *op,
                              uint64_t first, uint64_t n, tvk_cuda_ptr *in,
                              struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const struct layout l = lay_out(op, n);
    size_t at = 0;

    for (size_t i = 0; i < op->n_in; i++) {
        const struct tvk_tile_part *p = &op->in[i];
        const size_t bytes = part_bytes(p, n);
        const unsigned char *from = p->host;
        if (p->bits == 1)
            from += first / 8;
        else if (p->bits != 0)
            from += first * (p->bits / 8);
        if (bytes > 0)
            memcpy(s->host + at, from, bytes);
        in[i] = s->device + at;
        at += round_up(bytes, ALIGN);
    }
    if (op->result_bytes > 0)
        memset(s->host + l.result, 0, op->result_bytes);
    s->first = first;
    s->n = n;
    s->result_at = l.result;
    s->out_at = l.out;
    const struct tvk_tile tile = {
        .first = first,
        .n = n,
        .in = in,
        .result = s->device + l.result,
        .out = s->device + l.out,
        .scratch = s->device + l.scratch,
        .stream = s->stream,
    };
    TV_TRY(tvk_cuda_upload(s->stream, s->device, s->host, l.up_bytes, err));
    TV_TRY(op->launch(op->arg, &tile, err));
    TV_TRY(tvk_cuda_download(s->stream, s->host + l.result,
                             s->device + l.result, l.host_bytes - l.result,
                             err));
    s->busy = true;
out:
    return rc;
}

/* Waits for a tile and brings what it made to its place. */
static enum tv_err tile_end(struct slot *s, const struct tvk_tile_op *op,
                            struct tv_error *err)
{
    if (!s->busy)
        return TV_OK;
    s->busy = false;
    const enum tv_err rc = tvk_cuda_sync(s->stream, err);
    if (rc != TV_OK)
        return rc;
    if (op->take != NULL)
        op->take(op->arg, s->host + s->result_at);
    const size_t bytes = bytes_of(op->out_bits, s->n);
    unsigned char *to = op->out;
    if (bytes > 0) {
        to += op->out_bits == 1 ? s->first / 8 : s->first * (op->out_bits / 8);
        memcpy(to, s->host + s->out_at, bytes);
    }
    return rc;
}

enum tv_err tvk_tiles_run(struct tvk_tiles *t, const struct tvk_tile_op *op,
                          struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    tvk_cuda_ptr in[TVK_TILE_PARTS];
    uint64_t elems = 0;
    unsigned turn = 0;

    assert(op->n > 0 && op->n_in <= TVK_TILE_PARTS);
    struct lane *lane = lane_take(t);
    for (unsigned k = 0; k < N_SLOTS; k++)
        lane->slots[k].busy = false;
    TV_TRY(lane_prepare(t, lane, op, &elems, err));
    for (uint64_t first = 0; first < op->n; first += elems) {
        const uint64_t n = op->n - first < elems ? op->n - first : elems;
        struct slot *s = &lane->slots[turn];
        TV_TRY(tile_end(s, op, err));
        TV_TRY(tile_start(s, op, first, n, in, err));
        if (op->in_order)
            TV_TRY(tile_end(s, op, err));
        else
            turn = elems < op->n ? (turn + 1) % N_SLOTS : 0;
    }
    /* The older one first. */
    for (unsigned k = 0; k < N_SLOTS; k++)
        TV_TRY(tile_end(&lane->slots[(turn + k) % N_SLOTS], op, err));
out:
    /* What is still on its way must not meet the next call's tiles. */
    for (unsigned k = 0; rc != TV_OK && k < N_SLOTS; k++)
        if (lane->slots[k].stream != NULL) {
            const enum tv_err unused =
                tvk_cuda_sync(lane->slots[k].stream, NULL);
            (void)unused;
        }
    lane_give(t, lane);
    return rc;
}
