/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gta_tiles.c - blocks of a tile: what a pass measures of them, masks of what
 * is kept, and the sum. Donors are fp32 values, or bf16 as it is where one look
 * at most elements is enough.
 */
#include "gta_parts.h"

#include <string.h>

#include "compat_gta.h"

void gta_tile_begin(struct tvm_job *job, struct tvm_tile *tile)
{
    const struct gta_state *st = job->state;

    for (size_t j = 0; st->step == GTA_STEP_RANGE && j < st->n_select; j++) {
        const struct gta_donor *d = &st->donor[j];
        if (d->keep == GTA_KEEP_TOP)
            tvm_atoms_begin(gta_atoms_of(st, tile->tile, d),
                            gta_hist_of(st, tile->worker, d->slot), d->first,
                            GTA_RANGE_WIDTH);
    }
    if (st->n_top > 0 && st->step == GTA_STEP_KEPT)
        memcpy(st->eq_seen + (size_t)tile->worker * st->n_top,
               st->eq + (size_t)tile->tile * st->n_top,
               st->n_top * sizeof *st->eq_seen);
    if (gta_detail_of(job->tensor)->mergekit && st->n_random > 0)
        memcpy(st->mt + (size_t)tile->worker * st->n_random,
               st->mt_tile + (size_t)tile->tile * st->n_random,
               st->n_random * sizeof *st->mt);
}

/* Joins |d| of the blocks of a leaf; a leaf is a power of two of blocks, so the
 * shape of the tree is that of tvk_sum_tree over all blocks. */
static void put_sum(const struct tvm_job *job, const struct tvm_tile *tile,
                    size_t slot, double *leaves, double sum, size_t n)
{
    const struct gta_state *st = job->state;
    double *block = st->block + (2 * ((size_t)tile->worker * st->n_top + slot) +
                                 (leaves == st->sum_kept)) *
                                    GTA_BLOCKS_PER_LEAF;
    const size_t in_leaf = (size_t)(tile->start % TVK_LEAF / TVM_BLOCK);

    block[in_leaf] = sum;
    if (in_leaf + 1 == GTA_BLOCKS_PER_LEAF ||
        tile->start + n == job->tensor->n_elems)
        leaves[slot * (size_t)job->n_leaves +
               (size_t)(tile->start / TVK_LEAF)] =
            tvk_sum_tree(block, in_leaf + 1);
}

/* ---- masks --------------------------------------------------------------- */

/* What a donor's mask is made from; base NULL: nothing to be taken off. */
struct values {
    const void *x, *base;
    bool is_bf16;
};

static void top_mask(const struct tvm_job *job, const struct tvm_tile *tile,
                     const struct gta_donor *d, uint64_t *mask,
                     const struct values *v, size_t n)
{
    const struct gta_state *st = job->state;
    const struct tvk_table *k = job->k;
    uint64_t *const seen =
        &st->eq_seen[(size_t)tile->worker * st->n_top + d->slot];

    if (v->is_bf16)
        (void)k->topk_mask_bf16(mask, v->x, v->base, d->pattern, seen,
                                d->eq_limit, n);
    else
        (void)k->topk_mask(mask, v->x, v->base, d->pattern, seen, d->eq_limit,
                           n);
}

/* What a donor's mask is made from: its values with *base to be taken off, or
 * with mergekit's roundings the difference itself and no base. */
static const float *donor_values(const struct tvm_job *job,
                                 const struct tvm_tile *tile, size_t j,
                                 const float *const *x, size_t n,
                                 const float **base)
{
    const struct gta_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    const float *xj = x[st->donor[j].source];

    *base = x[t->base];
    if (!gta_detail_of(t)->mergekit)
        return xj;
    float *d =
        st->delta + ((size_t)tile->worker * st->n_select + j) * TVM_BLOCK;
    gta_compat_delta(job->k, t->compute, d, xj, *base, n);
    *base = NULL;
    return d;
}

/* The entries of a donor that are kept. */
static void kept_mask(const struct tvm_job *job, const struct tvm_tile *tile,
                      const struct gta_donor *d, uint64_t *mask,
                      const struct values *v, size_t n)
{
    const struct gta_state *st = job->state;
    uint64_t less[GTA_BLOCK_WORDS];

    top_mask(job, tile, d, mask, v, n);
    if (d->less == 0)
        return;
    top_mask(job, tile, &st->donor[d->less], less, v, n);
    for (size_t i = 0; i < (n + 63) / 64; i++)
        mask[i] &= ~less[i];
}

static void random_mask(const struct tvm_job *job, const struct tvm_tile *tile,
                        const struct gta_donor *d, uint64_t *mask, size_t n)
{
    const struct gta_state *st = job->state;

    if (gta_detail_of(job->tensor)->mergekit)
        tvm_mt_mask(&st->mt[(size_t)tile->worker * st->n_random + d->draw],
                    mask, d->p, n);
    else
        (void)job->k->philox_mask(mask, tile->start, d->key,
                                  job->tensor->name_hash, d->threshold, n);
}

/* ---- measuring ----------------------------------------------------------- */

/* After the last block of a tile. */
static void end_range(const struct tvm_job *job, const struct tvm_tile *tile,
                      const struct gta_donor *d, size_t n)
{
    const struct gta_state *st = job->state;

    if (tile->start + n == tile->first + tile->n)
        tvm_atoms_end(gta_atoms_of(st, tile->tile, d),
                      gta_hist_of(st, tile->worker, d->slot), d->first,
                      GTA_RANGE_WIDTH);
}

void gta_measure(struct tvm_job *job, struct tvm_tile *tile,
                 const float *const *x, size_t n)
{
    const struct gta_state *st = job->state;
    const struct tvk_table *k = job->k;
    const float *base = NULL;

    for (size_t j = 0; j < st->n_select; j++) {
        const struct gta_donor *d = &st->donor[j];
        uint64_t *mask = tile->mask_words + j * GTA_BLOCK_WORDS;
        if (!gta_has_slot(job, d))
            continue;
        /* What is taken off has the histogram of its donor, and no sums. */
        if (j >= st->n_donors &&
            (st->step == GTA_STEP_SAMPLE || st->step == GTA_STEP_HIGH ||
             st->step == GTA_STEP_KEPT))
            break;
        const float *xj = donor_values(job, tile, j, x, n, &base);
        switch (st->step) {
        case GTA_STEP_SAMPLE:
            k->hist_hi(gta_hist_of(st, tile->worker, d->slot), xj, base, n);
            break;
        case GTA_STEP_RANGE:
            st->above[(size_t)tile->worker * st->n_top + d->slot] +=
                k->hist_range(gta_hist_of(st, tile->worker, d->slot), d->first,
                              GTA_RANGE_WIDTH, xj, base, n);
            end_range(job, tile, d, n);
            if (st->match_l1 && j < st->n_donors)
                put_sum(job, tile, d->slot, st->sum_all,
                        k->abs_sum(xj, base, NULL, n), n);
            break;
        case GTA_STEP_HIGH:
            if (!gta_in_group(st, d))
                break;
            k->hist_hi(gta_hist_of(st, tile->worker, d->slot), xj, base, n);
            if (st->match_l1)
                put_sum(job, tile, d->slot, st->sum_all,
                        k->abs_sum(xj, base, NULL, n), n);
            break;
        case GTA_STEP_LOW:
            if (d->needs_low)
                k->hist_lo(gta_hist_of(st, tile->worker, d->slot), d->hi, xj,
                           base, n);
            break;
        case GTA_STEP_COUNT:
            if (d->needs_count)
                st->eq[(size_t)tile->tile * st->n_top + d->slot] +=
                    k->count_eq(xj, base, d->pattern, n);
            break;
        case GTA_STEP_KEPT:
            if (d->keep == GTA_KEEP_RANDOM) {
                random_mask(job, tile, d, mask, n);
                put_sum(job, tile, d->slot, st->sum_all,
                        k->abs_sum(xj, base, NULL, n), n);
            } else {
                const struct values v = {xj, base, false};
                kept_mask(job, tile, d, mask, &v, n);
            }
            put_sum(job, tile, d->slot, st->sum_kept,
                    k->abs_sum(xj, base, mask, n), n);
            break;
        }
    }
}

/* ---- combining ----------------------------------------------------------- */

static void mix(const struct tvm_job *job, const struct tvm_tile *tile,
                const float *base, const uint64_t *const *masks, float *dst,
                size_t n)
{
    const struct gta_state *st = job->state;
    float *delta[TVK_DONORS_MAX];
    const struct gta_mix m = {
        .compute = job->tensor->compute,
        .thin = gta_thin_dtype(job->tensor),
        .n_donors = st->n_donors,
        .weight = st->weight,
        .scale = st->scale,
        .consensus = st->call.consensus != 0,
        .normalize = st->call.normalize != 0,
        .lambda = st->call.lambda,
    };

    for (size_t j = 0; j < st->n_donors; j++)
        delta[j] =
            st->delta + ((size_t)tile->worker * st->n_select + j) * TVM_BLOCK;
    gta_compat_mix(job->k, &m, dst, base, delta, masks, n);
}

/* Masks of all donors; masks[j] NULL: all is kept. False when all of all is. */
static bool make_masks(const struct tvm_job *job, const struct tvm_tile *tile,
                       const struct values *v, const uint64_t **masks, size_t n)
{
    const struct gta_state *st = job->state;
    bool any = false;

    for (size_t j = 0; j < st->n_donors; j++) {
        const struct gta_donor *d = &st->donor[j];
        uint64_t *mask = tile->mask_words + j * GTA_BLOCK_WORDS;
        masks[j] = mask;
        any = any || d->keep != GTA_KEEP_ALL;
        switch (d->keep) {
        case GTA_KEEP_ALL:
            masks[j] = NULL;
            break;
        case GTA_KEEP_NONE:
            memset(mask, 0, GTA_BLOCK_WORDS * sizeof *mask);
            break;
        case GTA_KEEP_TOP:
            kept_mask(job, tile, d, mask, &v[j], n);
            if (tile->made && d->less == 0)
                tile->made[d->source] = mask;
            break;
        case GTA_KEEP_KNOWN:
            masks[j] = tile->known[d->source];
            break;
        case GTA_KEEP_RANDOM:
            random_mask(job, tile, d, mask, n);
            break;
        }
    }
    return any;
}

void gta_combine(struct tvm_job *job, struct tvm_tile *tile,
                 const float *const *x, float *dst, size_t n)
{
    const struct gta_state *st = job->state;
    const float *base = NULL;
    const float *donors[TVK_DONORS_MAX];
    const uint64_t *masks[TVK_DONORS_MAX];
    struct values v[TVK_DONORS_MAX];

    for (size_t j = 0; j < st->n_donors; j++) {
        donors[j] = donor_values(job, tile, j, x, n, &base);
        v[j] = (struct values){donors[j], base, false};
    }
    const bool any = make_masks(job, tile, v, masks, n);
    if (gta_detail_of(job->tensor)->mergekit)
        mix(job, tile, x[job->tensor->base], any ? masks : NULL, dst, n);
    else
        job->k->gta(dst, x[job->tensor->base], donors, any ? masks : NULL,
                    &st->call, n);
}

/* ---- bf16 as it is ------------------------------------------------------- */

/* Measuring: only what takes one look at most elements. */
bool gta_takes_bf16(const struct tvm_job *job, bool combine)
{
    const struct gta_state *st = job->state;

    return combine || (st->step == GTA_STEP_RANGE && !st->match_l1);
}

void gta_measure_bf16(struct tvm_job *job, struct tvm_tile *tile,
                      const void *const *x, size_t n)
{
    const struct gta_state *st = job->state;

    for (size_t j = 0; j < st->n_select; j++) {
        const struct gta_donor *d = &st->donor[j];
        if (d->keep != GTA_KEEP_TOP)
            continue;
        st->above[(size_t)tile->worker * st->n_top + d->slot] +=
            job->k->hist_range_bf16(gta_hist_of(st, tile->worker, d->slot),
                                    d->first, GTA_RANGE_WIDTH, x[d->source],
                                    x[job->tensor->base], n);
        end_range(job, tile, d, n);
    }
}

uint64_t gta_combine_bf16(struct tvm_job *job, struct tvm_tile *tile,
                          const void *const *x, void *dst, size_t n)
{
    const struct gta_state *st = job->state;
    const void *base = x[job->tensor->base];
    const void *donors[TVK_DONORS_MAX];
    const uint64_t *masks[TVK_DONORS_MAX];
    struct values v[TVK_DONORS_MAX];

    for (size_t j = 0; j < st->n_donors; j++) {
        donors[j] = x[st->donor[j].source];
        v[j] = (struct values){donors[j], base, true};
    }
    const bool any = make_masks(job, tile, v, masks, n);
    return job->k->gta_bf16(dst, base, donors, any ? masks : NULL, &st->call,
                            n);
}
