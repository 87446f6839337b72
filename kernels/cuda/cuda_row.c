/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cuda_row.c - the row of the kernel table that computes on a device.
 *
 * Each entry says what goes up, which kernel runs and what comes down, and
 * leaves tiles, copies and streams to cuda_tiles.c. An entry has no way to
 * fail: what the device does not do, the row below does, with the same bits,
 * and the table's `trouble` tells the caller.
 *
 * Almost all operations wait for memory, on a CPU too: bringing their operands
 * to the pinned memory alone costs as much as doing the work there. So by
 * default the device gets those that compute much on what they move: random
 * numbers, and low-rank products from RANK_LEAST on. With least_elems = 0 it
 * gets them all, which is how the row is tested.
 *
 * Entries have no argument for the device, so one device at a time is bound to
 * the row.
 */
#include "cuda/cu_ops.h"
#include "cuda/cuda_parts.h"
#include "cuda/cuda_tiles.h"

#include <assert.h>
#include <stdatomic.h>
#include <string.h>

#include "rows.h"
#include "tv/alloc.h"

/* Multiplications for each element moved that are worth the way. */
#define RANK_LEAST 32u

struct tvk_cuda_row {
    tvk_cuda *device;
    struct tvk_tiles *tiles;
    struct tvk_table table, below;
};

/* The row whose device is bound. Set by tvk_cuda_table, cleared by close. */
static struct tvk_cuda_row *_Atomic bound;

static const struct tvk_table *below(void)
{
    return &atomic_load(&bound)->below;
}

/* Parameters of kernels in device memory, an array each. */
static struct tvk_tile_part fixed(const void *host, size_t bytes)
{
    return (struct tvk_tile_part){.host = host, .bytes = bytes};
}

static struct tvk_tile_part floats(const float *host)
{
    return (struct tvk_tile_part){.host = host, .bits = 32};
}

static struct tvk_tile_part mask_words(const uint64_t *host)
{
    return (struct tvk_tile_part){.host = host, .bits = 1};
}

/* Did the device do it? */
static bool run(const struct tvk_tile_op *op)
{
    struct tvk_cuda_row *const r = atomic_load(&bound);
    struct tv_error err = {.code = TV_OK};

    const size_t least = r->device->options.least_elems;

    if (op->n == 0 || (least > 0 && (!op->heavy || op->n < least)) ||
        !tvk_tiles_fit(r->tiles, op))
        return false;
    const enum tv_err rc = tvk_tiles_run(r->tiles, op, &err);
    if (rc == TV_E_BUDGET) {
        /* The run ends with it, as with a broken device. */
        (void)pthread_mutex_lock(&r->device->mutex);
        if (r->device->trouble.code == TV_OK)
            r->device->trouble = err;
        (void)pthread_mutex_unlock(&r->device->mutex);
    }
    /* NOMEM: no memory to stage in, which the row below does not need. */
    return rc == TV_OK;
}

/* One kernel over n elements (or words, groups) of a tile. */
static enum tv_err launch_over(const struct tvk_tile *t, const char *name,
                               uint64_t n, void *args, struct tv_error *err)
{
    const uint64_t blocks = (n + TVK_CU_BLOCK - 1) / TVK_CU_BLOCK;
    const unsigned most = 65535;

    return tvk_cuda_launch(t->stream, name,
                           blocks < most ? (unsigned)blocks : most, 1,
                           TVK_CU_BLOCK, 0, args, err);
}

/* Device addresses are pointers to kernels, and to nobody here. */
static void *at(tvk_cuda_ptr p)
{
    return (void *)(uintptr_t)p;
}

/* ---- counts of a call: tiles add up -------------------------------------- */

static void take_count(void *total, const void *result)
{
    uint64_t n = 0;

    memcpy(&n, result, sizeof n);
    *(uint64_t *)total += n;
}

/* ---- conversion ---------------------------------------------------------- */

struct convert {
    uint64_t n_bad; /* first: take_count */
    const char *kernel;
};

static enum tv_err launch_convert(void *arg, const struct tvk_tile *t,
                                  struct tv_error *err)
{
    const struct convert *c = arg;
    struct tvk_cu_convert a = {.dst = at(t->out),
                               .src = at(t->in[0]),
                               .n_bad = at(t->result),
                               .n = t->n};

    return launch_over(t, c->kernel, t->n, &a, err);
}

static bool convert(const char *kernel, void *dst, uint32_t dst_bits,
                    const void *src, uint32_t src_bits, size_t n,
                    uint64_t *n_bad)
{
    struct convert c = {0, kernel};
    const struct tvk_tile_part in = {.host = src, .bits = src_bits};
    const struct tvk_tile_op op = {
        .name = kernel,
        .in = &in,
        .n_in = 1,
        .out = dst,
        .out_bits = dst_bits,
        .result_bytes = sizeof(uint64_t),
        .n = n,
        .launch = launch_convert,
        .take = take_count,
        .arg = &c,
    };

    if (!run(&op))
        return false;
    *n_bad = c.n_bad;
    return true;
}

#define CONVERSION(name, to, to_bits, from, from_bits)                         \
    static uint64_t name(to *TVK_RESTRICT dst, const from *TVK_RESTRICT src,   \
                         size_t n)                                             \
    {                                                                          \
        uint64_t n_bad = 0;                                                    \
                                                                               \
        if (!convert("tv_" #name, dst, to_bits, src, from_bits, n, &n_bad))    \
            return below()->name(dst, src, n);                                 \
        return n_bad;                                                          \
    }
CONVERSION(bf16_to_f32, float, 32, void, 16)
CONVERSION(f16_to_f32, float, 32, void, 16)
CONVERSION(f32_to_bf16, void, 16, float, 32)
CONVERSION(f32_to_f16, void, 16, float, 32)
#undef CONVERSION

/* ---- linear -------------------------------------------------------------- */

/* Inputs of a tile lie one behind the other, equally far apart. */
static uint64_t stride_of(const struct tvk_tile *t, size_t first, size_t n)
{
    return n > 1 ? (t->in[first + 1] - t->in[first]) / sizeof(float) : 0;
}

struct sum {
    size_t n_inputs;
    double divisor;
};

static enum tv_err launch_sum(void *arg, const struct tvk_tile *t,
                              struct tv_error *err)
{
    const struct sum *s = arg;
    struct tvk_cu_sum a = {
        .dst = at(t->out),
        .x = at(t->in[1]),
        .w = at(t->in[0]),
        .stride = stride_of(t, 1, s->n_inputs),
        .n_inputs = s->n_inputs,
        .n = t->n,
        .divisor = s->divisor,
    };

    return launch_over(t, "tv_weighted_sum", t->n, &a, err);
}

static void weighted_sum(float *TVK_RESTRICT dst, const float *const *x,
                         const double *w, size_t n_inputs, double divisor,
                         size_t n)
{
    struct sum s = {n_inputs, divisor};
    struct tvk_tile_part in[TVK_TILE_PARTS];
    const struct tvk_tile_op op = {
        .name = "weighted_sum",
        .in = in,
        .n_in = n_inputs + 1,
        .out = dst,
        .out_bits = 32,
        .n = n,
        .launch = launch_sum,
        .arg = &s,
    };

    if (n_inputs + 1 > TVK_TILE_PARTS) {
        below()->weighted_sum(dst, x, w, n_inputs, divisor, n);
        return;
    }
    in[0] = fixed(w, n_inputs * sizeof *w);
    for (size_t j = 0; j < n_inputs; j++)
        in[j + 1] = floats(x[j]);
    if (!run(&op))
        below()->weighted_sum(dst, x, w, n_inputs, divisor, n);
}

struct pair {
    const char *kernel;
    double t;
};

static enum tv_err launch_pair(void *arg, const struct tvk_tile *t,
                               struct tv_error *err)
{
    const struct pair *p = arg;
    struct tvk_cu_pair a = {.dst = at(t->out),
                            .x = at(t->in[0]),
                            .b = at(t->in[1]),
                            .n = t->n,
                            .t = p->t};

    return launch_over(t, p->kernel, t->n, &a, err);
}

static bool pair(const char *kernel, float *dst, const float *x, const float *b,
                 double t, size_t n)
{
    struct pair p = {kernel, t};
    const struct tvk_tile_part in[] = {floats(x), floats(b)};
    const struct tvk_tile_op op = {
        .name = kernel,
        .in = in,
        .n_in = 2,
        .out = dst,
        .out_bits = 32,
        .n = n,
        .launch = launch_pair,
        .arg = &p,
    };

    return run(&op);
}

static void delta(float *TVK_RESTRICT dst, const float *TVK_RESTRICT x,
                  const float *TVK_RESTRICT b, size_t n)
{
    if (!pair("tv_delta", dst, x, b, 0.0, n))
        below()->delta(dst, x, b, n);
}

static void nearswap(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                     const float *TVK_RESTRICT x, double t, size_t n)
{
    if (!pair("tv_nearswap", dst, x, b, t, n))
        below()->nearswap(dst, b, x, t, n);
}

/* ---- task vectors -------------------------------------------------------- */

/* Parts: coef, weight, mask_at, base, donors, masks. Words between the first
 * mask and that of donor j depend on the tile, so mask_at counts masks, and
 * the kernel is given their distance by `launch`. */
struct gta {
    const struct tvk_gta *p;
    double total;
    size_t n_masks;
    uint64_t mask_at[TVK_DONORS_MAX];
};

static enum tv_err launch_gta(void *arg, const struct tvk_tile *t,
                              struct tv_error *err)
{
    const struct gta *g = arg;
    const size_t n = g->p->n_donors;
    const tvk_cuda_ptr *const masks = t->in + 4 + n;
    struct tvk_cu_gta a = {
        .dst = at(t->out),
        .b = at(t->in[3]),
        .x = at(n > 0 ? t->in[4] : 0),
        .masks = at(g->n_masks > 0 ? masks[0] : 0),
        .mask_at = at(t->in[2]),
        .coef = at(t->in[0]),
        .weight = at(t->in[1]),
        .stride = stride_of(t, 4, n),
        .mask_stride =
            g->n_masks > 1 ? (masks[1] - masks[0]) / sizeof(uint64_t) : 0,
        .n_donors = n,
        .n = t->n,
        .total = g->total,
        .lambda = g->p->lambda,
        .least = tvk_gta_least_divisor(g->p),
        .consensus = g->p->consensus,
        .normalize = g->p->normalize,
    };

    return launch_over(t, "tv_gta", t->n, &a, err);
}

/* As in kernels/ref/gta.c. */
static double total_weight(const struct tvk_gta *p)
{
    double sum = 0.0;

    for (size_t j = 0; j < p->n_donors; j++)
        sum = sum + p->weight[j];
    return sum > -1e-8 && sum < 1e-8 ? 1.0 : sum;
}

static void gta(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                const float *const *x, const uint64_t *const *masks,
                const struct tvk_gta *p, size_t n)
{
    const size_t n_donors = p->n_donors;
    struct gta g = {.p = p, .total = total_weight(p)};
    struct tvk_tile_part in[TVK_TILE_PARTS];

    assert(n_donors <= TVK_DONORS_MAX);
    in[0] = fixed(p->coef, n_donors * sizeof *p->coef);
    in[1] = fixed(p->weight, n_donors * sizeof *p->weight);
    in[2] = fixed(g.mask_at, n_donors * sizeof *g.mask_at);
    in[3] = floats(b);
    for (size_t j = 0; j < n_donors; j++) {
        in[4 + j] = floats(x[j]);
        g.mask_at[j] = TVK_CU_NO_MASK;
        if (masks != NULL && masks[j] != NULL) {
            g.mask_at[j] = g.n_masks;
            in[4 + n_donors + g.n_masks++] = mask_words(masks[j]);
        }
    }
    const struct tvk_tile_op op = {
        .name = "gta",
        .in = in,
        .n_in = 4 + n_donors + g.n_masks,
        .out = dst,
        .out_bits = 32,
        .n = n,
        .launch = launch_gta,
        .arg = &g,
    };
    if (!run(&op))
        below()->gta(dst, b, x, masks, p, n);
}

struct ram {
    size_t n_donors;
    double epsilon;
};

static enum tv_err launch_ram(void *arg, const struct tvk_tile *t,
                              struct tv_error *err)
{
    const struct ram *r = arg;
    struct tvk_cu_ram a = {
        .dst = at(t->out),
        .b = at(t->in[1]),
        .x = at(r->n_donors > 0 ? t->in[2] : 0),
        .alone = at(t->in[0]),
        .stride = stride_of(t, 2, r->n_donors),
        .n_donors = r->n_donors,
        .n = t->n,
        .epsilon = r->epsilon,
    };

    return launch_over(t, "tv_ram", t->n, &a, err);
}

static void ram(float *TVK_RESTRICT dst, const float *TVK_RESTRICT b,
                const float *const *x, const double *alone, size_t n_donors,
                double epsilon, size_t n)
{
    struct ram r = {n_donors, epsilon};
    struct tvk_tile_part in[TVK_TILE_PARTS];
    const struct tvk_tile_op op = {
        .name = "ram",
        .in = in,
        .n_in = n_donors + 2,
        .out = dst,
        .out_bits = 32,
        .n = n,
        .launch = launch_ram,
        .arg = &r,
    };

    if (n_donors + 2 > TVK_TILE_PARTS) {
        below()->ram(dst, b, x, alone, n_donors, epsilon, n);
        return;
    }
    in[0] = fixed(alone, n_donors * sizeof *alone);
    in[1] = floats(b);
    for (size_t j = 0; j < n_donors; j++)
        in[j + 2] = floats(x[j]);
    if (!run(&op))
        below()->ram(dst, b, x, alone, n_donors, epsilon, n);
}

/* ---- exact top-k --------------------------------------------------------- */

struct hist {
    const char *kernel;
    uint32_t *hist; /* [n_buckets], added to */
    size_t n_buckets;
    uint64_t number;
    uint32_t first, width;
    bool has_base;
};

/* Result: the number, then the buckets. */
static enum tv_err launch_hist(void *arg, const struct tvk_tile *t,
                               struct tv_error *err)
{
    const struct hist *h = arg;
    struct tvk_cu_hist a = {
        .hist = at(t->result + sizeof(uint64_t)),
        .number = at(t->result),
        .x = at(t->in[0]),
        .b = h->has_base ? at(t->in[1]) : NULL,
        .n = t->n,
        .first = h->first,
        .width = h->width,
    };

    return launch_over(t, h->kernel, t->n, &a, err);
}

static void take_hist(void *arg, const void *result)
{
    struct hist *h = arg;
    uint64_t number = 0;

    memcpy(&number, result, sizeof number);
    h->number += number;
    const uint32_t *const more =
        (const uint32_t *)(const void *)((const unsigned char *)result +
                                         sizeof number);
    for (size_t i = 0; i < h->n_buckets; i++)
        h->hist[i] += more[i];
}

static bool hist(struct hist *h, const float *x, const float *b, size_t n)
{
    const struct tvk_tile_part in[] = {floats(x), floats(b)};
    const struct tvk_tile_op op = {
        .name = h->kernel,
        .in = in,
        .n_in = b != NULL ? 2 : 1,
        .result_bytes = sizeof(uint64_t) + h->n_buckets * sizeof(uint32_t),
        .n = n,
        /* Buckets that were added to cannot be taken back: all or nothing. */
        .whole = h->n_buckets > 0,
        .launch = launch_hist,
        .take = take_hist,
        .arg = h,
    };

    h->has_base = b != NULL;
    return run(&op);
}

static void hist_hi(uint32_t *TVK_RESTRICT buckets, const float *x,
                    const float *b, size_t n)
{
    struct hist h = {
        .kernel = "tv_hist_hi", .hist = buckets, .n_buckets = TVK_HIST_HI};

    if (!hist(&h, x, b, n))
        below()->hist_hi(buckets, x, b, n);
}

static void hist_lo(uint32_t *TVK_RESTRICT buckets, uint32_t hi, const float *x,
                    const float *b, size_t n)
{
    struct hist h = {.kernel = "tv_hist_lo",
                     .hist = buckets,
                     .n_buckets = TVK_HIST_LO,
                     .first = hi};

    if (!hist(&h, x, b, n))
        below()->hist_lo(buckets, hi, x, b, n);
}

static uint64_t hist_range(uint32_t *TVK_RESTRICT buckets, uint32_t first,
                           uint32_t width, const float *x, const float *b,
                           size_t n)
{
    struct hist h = {.kernel = "tv_hist_range",
                     .hist = buckets,
                     .n_buckets = width,
                     .first = first,
                     .width = width};

    if (!hist(&h, x, b, n))
        return below()->hist_range(buckets, first, width, x, b, n);
    return h.number;
}

static uint64_t count_eq(const float *x, const float *b, uint32_t pattern,
                         size_t n)
{
    struct hist h = {.kernel = "tv_count_eq", .first = pattern};

    if (!hist(&h, x, b, n))
        return below()->count_eq(x, b, pattern, n);
    return h.number;
}

struct topk {
    uint64_t seen, limit, kept;
    uint32_t pattern;
    bool has_base;
};

static enum tv_err launch_topk(void *arg, const struct tvk_tile *t,
                               struct tv_error *err)
{
    const struct topk *k = arg;
    struct tvk_cu_topk a = {
        .mask = at(t->out),
        .counts = at(t->scratch),
        .kept = at(t->result),
        .n_equal = at(t->result + sizeof(uint64_t)),
        .x = at(t->in[0]),
        .b = k->has_base ? at(t->in[1]) : NULL,
        .n = t->n,
        .seen = k->seen,
        .limit = k->limit,
        .pattern = k->pattern,
    };
    const uint64_t words = tvk_cu_words(t->n);

    enum tv_err rc = launch_over(t, "tv_topk_count", words, &a, err);
    if (rc == TV_OK)
        rc = tvk_cuda_launch(t->stream, "tv_topk_scan", 1, 1, TVK_CU_SCAN, 0,
                             &a, err);
    if (rc == TV_OK)
        rc = launch_over(t, "tv_topk_mask", words, &a, err);
    return rc;
}

static void take_topk(void *arg, const void *result)
{
    struct topk *k = arg;
    uint64_t got[2];

    memcpy(got, result, sizeof got);
    k->kept += got[0];
    k->seen += got[1];
}

static uint64_t topk_mask(uint64_t *TVK_RESTRICT mask, const float *x,
                          const float *b, uint32_t pattern, uint64_t *eq_seen,
                          uint64_t eq_limit, size_t n)
{
    struct topk k = {.seen = *eq_seen,
                     .limit = eq_limit,
                     .pattern = pattern,
                     .has_base = b != NULL};
    const struct tvk_tile_part in[] = {floats(x), floats(b)};
    const struct tvk_tile_op op = {
        .name = "topk_mask",
        .in = in,
        .n_in = b != NULL ? 2 : 1,
        .out = mask,
        .out_bits = 1,
        .scratch_bits = 1, /* 32 of the 64 bits of a word's elements */
        .result_bytes = 2 * sizeof(uint64_t),
        .n = n,
        .in_order = true,
        .launch = launch_topk,
        .take = take_topk,
        .arg = &k,
    };

    if (!run(&op))
        return below()->topk_mask(mask, x, b, pattern, eq_seen, eq_limit, n);
    *eq_seen = k.seen;
    return k.kept;
}

/* ---- random masks -------------------------------------------------------- */

struct philox {
    uint64_t kept; /* first: take_count */
    uint64_t start, key, name_hash, threshold;
};

static enum tv_err launch_philox(const struct philox *p, bool is_mask,
                                 const struct tvk_tile *t, struct tv_error *err)
{
    struct tvk_cu_philox a = {
        .mask = is_mask ? at(t->out) : NULL,
        .words = is_mask ? NULL : at(t->out),
        .kept = at(t->result),
        .start = p->start + t->first,
        .key = p->key,
        .name_hash = p->name_hash,
        .threshold = p->threshold,
        .n = t->n,
    };

    if (is_mask)
        return launch_over(t, "tv_philox_mask", tvk_cu_words(t->n), &a, err);
    return launch_over(t, "tv_philox_words", t->n / 4 + 2, &a, err);
}

static enum tv_err launch_philox_mask(void *arg, const struct tvk_tile *t,
                                      struct tv_error *err)
{
    return launch_philox(arg, true, t, err);
}

static enum tv_err launch_philox_words(void *arg, const struct tvk_tile *t,
                                       struct tv_error *err)
{
    return launch_philox(arg, false, t, err);
}

static uint64_t philox_mask(uint64_t *TVK_RESTRICT mask, uint64_t start,
                            uint64_t key, uint64_t name_hash,
                            uint64_t threshold, size_t n)
{
    struct philox p = {0, start, key, name_hash, threshold};
    const struct tvk_tile_op op = {
        .name = "philox_mask",
        .out = mask,
        .out_bits = 1,
        .result_bytes = sizeof(uint64_t),
        .n = n,
        .heavy = true,
        .launch = launch_philox_mask,
        .take = take_count,
        .arg = &p,
    };

    assert(start % 64 == 0);
    if (!run(&op))
        return below()->philox_mask(mask, start, key, name_hash, threshold, n);
    return p.kept;
}

static void philox_words(uint32_t *TVK_RESTRICT dst, uint64_t start,
                         uint64_t key, uint64_t name_hash, size_t n)
{
    struct philox p = {0, start, key, name_hash, 0};
    const struct tvk_tile_op op = {
        .name = "philox_words",
        .out = dst,
        .out_bits = 32,
        .n = n,
        .heavy = true,
        .launch = launch_philox_words,
        .arg = &p,
    };

    if (!run(&op))
        below()->philox_words(dst, start, key, name_hash, n);
}

/* ---- reductions: a leaf each --------------------------------------------- */

struct reduce {
    const char *kernel;
    bool has_b, has_mask;
    union {
        double sums[3];
        struct tvk_cu_stats stats;
    } got;
};

static enum tv_err launch_leaf(void *arg, const struct tvk_tile *t,
                               struct tv_error *err)
{
    const struct reduce *r = arg;
    struct tvk_cu_reduce a = {
        .out = at(t->result),
        .stats = at(t->result),
        .a = at(t->in[0]),
        .b = r->has_b ? at(t->in[1]) : NULL,
        .mask = r->has_mask ? at(t->in[r->has_b ? 2 : 1]) : NULL,
        .n = t->n,
    };

    return tvk_cuda_launch(t->stream, r->kernel, 1, 1, TVK_CU_LEAF, 0, &a, err);
}

static void take_leaf(void *arg, const void *result)
{
    struct reduce *r = arg;

    memcpy(&r->got, result, sizeof r->got);
}

static bool leaf(struct reduce *r, const float *a, const float *b,
                 const uint64_t *mask, size_t n)
{
    struct tvk_tile_part in[3] = {floats(a)};
    size_t n_in = 1;

    r->has_b = b != NULL;
    r->has_mask = mask != NULL;
    if (b != NULL)
        in[n_in++] = floats(b);
    if (mask != NULL)
        in[n_in++] = mask_words(mask);
    const struct tvk_tile_op op = {
        .name = r->kernel,
        .in = in,
        .n_in = n_in,
        .result_bytes = sizeof r->got,
        .n = n,
        .whole = true,
        .launch = launch_leaf,
        .take = take_leaf,
        .arg = r,
    };

    assert(n <= TVK_LEAF);
    return run(&op);
}

static void dots(struct tvk_dots *out, const float *a, const float *b, size_t n)
{
    struct reduce r = {.kernel = "tv_dots"};

    if (!leaf(&r, a, b, NULL, n)) {
        below()->dots(out, a, b, n);
        return;
    }
    out->aa = r.got.sums[0];
    out->bb = r.got.sums[1];
    out->ab = r.got.sums[2];
}

static double abs_sum(const float *x, const float *b, const uint64_t *mask,
                      size_t n)
{
    struct reduce r = {.kernel = "tv_abs_sum"};

    if (!leaf(&r, x, b, mask, n))
        return below()->abs_sum(x, b, mask, n);
    return r.got.sums[0];
}

static void stats(struct tvk_stats *out, const float *x, size_t n)
{
    struct reduce r = {.kernel = "tv_stats"};

    if (!leaf(&r, x, NULL, NULL, n)) {
        below()->stats(out, x, n);
        return;
    }
    out->sum = r.got.stats.sum;
    out->sum_sq = r.got.stats.sum_sq;
    out->min = r.got.stats.min;
    out->max = r.got.stats.max;
    out->n_nonfinite = r.got.stats.n_nonfinite;
    out->n_zero = r.got.stats.n_zero;
}

static enum tv_err launch_count(void *arg, const struct tvk_tile *t,
                                struct tv_error *err)
{
    struct tvk_cu_reduce a = {
        .n_bad = at(t->result), .a = at(t->in[0]), .n = t->n};

    (void)arg;
    return launch_over(t, "tv_count_nonfinite", t->n, &a, err);
}

static uint64_t count_nonfinite(const float *x, size_t n)
{
    uint64_t n_bad = 0;
    const struct tvk_tile_part in = floats(x);
    const struct tvk_tile_op op = {
        .name = "count_nonfinite",
        .in = &in,
        .n_in = 1,
        .result_bytes = sizeof(uint64_t),
        .n = n,
        .launch = launch_count,
        .take = take_count,
        .arg = &n_bad,
    };

    if (!run(&op))
        return below()->count_nonfinite(x, n);
    return n_bad;
}

/* ---- low rank ------------------------------------------------------------ */

struct lowrank {
    double scale;
    size_t rank;
    uint64_t cols, start;
};

static enum tv_err launch_lowrank(void *arg, const struct tvk_tile *t,
                                  struct tv_error *err)
{
    const struct lowrank *w = arg;
    struct tvk_cu_lowrank a = {
        .dst = at(t->out),
        .y = at(t->in[0]),
        .l = at(t->in[1]),
        .r = at(t->in[2]),
        .scale = w->scale,
        .rank = w->rank,
        .cols = w->cols,
        .start = w->start + t->first,
        .n = t->n,
    };

    return launch_over(t, "tv_lowrank_add", t->n, &a, err);
}

static void lowrank_add(float *TVK_RESTRICT y, const float *TVK_RESTRICT l,
                        const float *TVK_RESTRICT r, double scale, size_t rank,
                        uint64_t cols, uint64_t start, size_t n)
{
    const size_t first = (size_t)(start / cols);
    const size_t rows =
        n > 0 ? (size_t)((start + n - 1) / cols) + 1 - first : 0;
    struct lowrank w = {scale, rank, cols, start % cols};
    const struct tvk_tile_part in[] = {
        floats(y),
        fixed(l + first * rank, rows * rank * sizeof *l),
        fixed(r, rank * (size_t)cols * sizeof *r),
    };
    const struct tvk_tile_op op = {
        .name = "lowrank_add",
        .in = in,
        .n_in = 3,
        .out = y,
        .out_bits = 32,
        .n = n,
        /* In place: half done cannot be done again. */
        .whole = true,
        .heavy = rank >= RANK_LEAST,
        .launch = launch_lowrank,
        .arg = &w,
    };

    if (!run(&op))
        below()->lowrank_add(y, l, r, scale, rank, cols, start, n);
}

/* ---- the row ------------------------------------------------------------- */

static enum tv_err trouble(struct tv_error *err)
{
    return tvk_cuda_trouble(atomic_load(&bound)->device, err);
}

static void fill(struct tvk_table *t)
{
    t->name = "cuda";
    t->trouble = trouble;
    t->bf16_to_f32 = bf16_to_f32;
    t->f16_to_f32 = f16_to_f32;
    t->f32_to_bf16 = f32_to_bf16;
    t->f32_to_f16 = f32_to_f16;
    t->weighted_sum = weighted_sum;
    t->delta = delta;
    t->gta = gta;
    t->nearswap = nearswap;
    t->ram = ram;
    t->hist_hi = hist_hi;
    t->hist_lo = hist_lo;
    t->hist_range = hist_range;
    t->count_eq = count_eq;
    t->topk_mask = topk_mask;
    t->philox_mask = philox_mask;
    t->philox_words = philox_words;
    t->dots = dots;
    t->abs_sum = abs_sum;
    t->count_nonfinite = count_nonfinite;
    t->stats = stats;
    t->lowrank_add = lowrank_add;
}

size_t tvk_cuda_staging(const tvk_cuda *d)
{
    return d->row == NULL ? 0 : tvk_tiles_staging(d->row->tiles);
}

enum tv_err tvk_cuda_table(tvk_cuda *d, const struct tvk_table *from,
                           struct tv_error *err, const struct tvk_table **out)
{
    struct tvk_cuda_row *r = NULL;
    struct tvk_cuda_row *none = NULL;

    *out = NULL;
    if (d->row != NULL) {
        *out = &d->row->table;
        return TV_OK;
    }
    r = tv_calloc(1, sizeof *r);
    if (r != NULL) {
        r->device = d;
        r->below = *from;
        r->table = *from;
        fill(&r->table);
        r->tiles = tvk_tiles_open(d);
    }
    if (r == NULL || r->tiles == NULL) {
        tv_free(r);
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    }
    if (!atomic_compare_exchange_strong(&bound, &none, r)) {
        tvk_tiles_close(r->tiles);
        tv_free(r);
        return tv_error_set(err, TV_E_INTERNAL,
                            "two CUDA devices at a time have no table");
    }
    d->row = r;
    *out = &r->table;
    return TV_OK;
}

void tvk_cuda_row_reclaim(struct tvk_cuda_row *r)
{
    if (r != NULL)
        tvk_tiles_reclaim(r->tiles);
}

void tvk_cuda_row_free(struct tvk_cuda_row *r)
{
    if (r == NULL)
        return;
    atomic_store(&bound, NULL);
    tvk_tiles_close(r->tiles);
    tv_free(r);
}
