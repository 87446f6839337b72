/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gta_state.c - the state of a tensor while it is merged: a place for every
 * donor that is thinned, and what is known of it before the first pass (random
 * masks need none, nor do masks of an earlier run; with trim_scope the
 * threshold is that of a layer or of the model, found by gta_survey.c).
 */
#include "gta_parts.h"

#include <math.h>

#include "compat.h"
#include "tv/checked.h"

#define RANGE_MAX       ((size_t)8) /* selections; 4 MiB per worker */
#define RANGE_ELEMS_MIN ((uint64_t)2 << 20)
#define RESCALE_MIN     1e-7 /* mergekit: smaller sums are not rescaled */

size_t gta_group_size(const struct gta_state *st)
{
    return st->n_hist < GTA_GROUP_MAX ? st->n_hist : GTA_GROUP_MAX;
}

bool gta_in_group(const struct gta_state *st, const struct gta_donor *d)
{
    return d->keep == GTA_KEEP_TOP && d->slot >= st->first &&
           d->slot - st->first < GTA_GROUP_MAX;
}

bool gta_takes_sample(const struct tvm_tensor *t, const struct gta_state *st)
{
    return st->n_hist > 0 && st->n_hist <= RANGE_MAX &&
           t->n_elems >= RANGE_ELEMS_MIN;
}

static size_t lay_out(const struct tvm_job *job, void *base,
                      struct gta_state *st)
{
    struct tvm_carver c = {base, 0};
    const size_t k = st->n_donors;
    const size_t top = st->n_top;
    const uint64_t w = job->n_workers;

    (void)tvm_carve(&c, 1, sizeof *st);
    st->coef = tvm_carve(&c, k, sizeof *st->coef);
    st->weight = tvm_carve(&c, k, sizeof *st->weight);
    st->donor = tvm_carve(&c, st->n_select, sizeof *st->donor);
    st->hist_words =
        gta_takes_sample(job->tensor, st) ? GTA_RANGE_WIDTH : TVK_HIST_HI;
    st->hist = tvm_carve(&c, w * gta_group_size(st) * st->hist_words,
                         sizeof *st->hist);
    if (gta_takes_sample(job->tensor, st))
        st->atoms = tvm_carve(&c, job->n_tiles * st->n_hist * GTA_N_ATOMS,
                              sizeof *st->atoms);
    st->above = tvm_carve(&c, w * top, sizeof *st->above);
    st->eq = tvm_carve(&c, job->n_tiles * top, sizeof *st->eq);
    st->eq_seen = tvm_carve(&c, w * top, sizeof *st->eq_seen);
    if (st->match_l1) {
        st->sum_all = tvm_carve(&c, top * job->n_leaves, sizeof *st->sum_all);
        st->sum_kept = tvm_carve(&c, top * job->n_leaves, sizeof *st->sum_kept);
        st->block =
            tvm_carve(&c, 2 * w * top * GTA_BLOCKS_PER_LEAF, sizeof *st->block);
    }
    if (gta_detail_of(job->tensor)->mergekit) {
        st->scale = tvm_carve(&c, k, sizeof *st->scale);
        st->delta =
            tvm_carve(&c, w * st->n_select * TVM_BLOCK, sizeof *st->delta);
        st->mt_tile =
            tvm_carve(&c, job->n_tiles * st->n_random, sizeof *st->mt_tile);
        st->mt = tvm_carve(&c, w * st->n_random, sizeof *st->mt);
    }
    return c.used;
}

static void count_parts(const struct tvm_tensor *t, struct gta_state *st)
{
    st->n_donors = gta_count_donors(t, &st->n_hist, &st->n_random);
    st->n_top = st->n_hist;
    if (gta_is_scoped(t)) /* the thresholds are given */
        st->n_hist = 0;
    st->n_select = st->n_donors;
    if (gta_sparsify_of(t) == GTA_OUTLIERS)
        st->n_select += st->n_top / 2;
    if (gta_detail_of(t)->mergekit)
        st->n_top += st->n_random;
    /* With statistics the factor is a least-squares one, made before. */
    st->match_l1 = st->n_top > 0 && !gta_is_scoped(t) &&
                   !gta_by_statistics(t) && tvm_shared(t, GTA_RESCALE) != 0.0;
}

size_t gta_state_bytes(const struct tvm_job *job)
{
    struct gta_state st = {.n_donors = 0};

    count_parts(job->tensor, &st);
    return lay_out(job, NULL, &st);
}

/* ---- what is known of a donor at first ----------------------------------- */

static void set_random(const struct tvm_job *job, struct gta_donor *d,
                       size_t position, double density)
{
    unsigned char bytes[12];

    tv_put_le64(bytes, job->seed);
    tv_put_le32(bytes + 8, (uint32_t)position);
    d->key = tv_hash64(bytes, sizeof bytes);
    d->threshold = (uint64_t)round(density * 4294967296.0);
}

static void set_top(const struct tvm_job *job, struct gta_donor *d,
                    size_t *slot, double density)
{
    d->slot = (*slot)++;
    d->k = (uint64_t)(density * (double)job->tensor->n_elems);
    if (d->k == 0)
        d->k = 1;
    d->eq_limit = UINT64_MAX;
}

double gta_rescaled(double weight, double all, double kept)
{
    /* Not finite: an infinite entry must not turn the others into NaN. */
    if (all >= RESCALE_MIN && kept >= RESCALE_MIN && isfinite(all))
        return weight * (all / kept);
    return weight;
}

/* A threshold that several tensors have in common. */
static void set_scoped(const struct tvm_job *job, struct gta_donor *d, size_t j,
                       size_t *slot)
{
    struct gta_state *st = job->state;
    const struct tvm_cut *cut = &job->tensor->cuts[d->source];

    d->slot = (*slot)++;
    d->pattern = cut->pattern;
    d->eq_limit = cut->eq_limit;
    d->needs_count = cut->eq_limit != UINT64_MAX;
    st->any_count = st->any_count || d->needs_count;
    if (tvm_shared(job->tensor, GTA_RESCALE) != 0.0)
        st->coef[j] = gta_rescaled(st->weight[j], cut->sum_all, cut->sum_kept);
}

/* Ascending positions [bot, bot + target) of n, top above them: the target +
 * top largest but the top largest. */
static void set_outliers(const struct tvm_job *job, struct gta_donor *d,
                         struct gta_donor *less, size_t *slot, double density)
{
    const struct tvm_tensor *t = job->tensor;
    const double n = (double)t->n_elems;
    const double gamma = tvm_of(t, d->source, GTA_EXTRA, t->method->n_params);
    const uint64_t target = (uint64_t)(density * n);
    const uint64_t top = (uint64_t)(gamma * n);

    d->slot = *slot;
    d->k = top < t->n_elems - target ? target + top : t->n_elems;
    d->eq_limit = UINT64_MAX;
    if (d->k > target) {
        *less = *d;
        less->slot = *slot + 1;
        less->k = d->k - target;
        d->less = (size_t)(less - ((struct gta_state *)job->state)->donor);
    }
    /* Two slots always: a pair then never falls into two groups. */
    *slot += 2;
}

/* mergekit's order: all of one donor, then all of the next. */
static void find_draws(const struct tvm_job *job)
{
    struct gta_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    uint64_t at = t->draw_at;
    size_t draw = 0;

    for (size_t j = 0; j < st->n_donors; j++) {
        struct gta_donor *d = &st->donor[j];
        const double density =
            tvm_of(t, d->source, GTA_DENSITY, t->method->n_params);
        struct tvm_mt mt;
        if (!(density < 1.0))
            continue;
        if (d->keep == GTA_KEEP_RANDOM) {
            d->draw = draw++;
            d->slot = d->draw;
            d->p = t->compute == TV_BF16
                       ? tvm_compat_round1(job->k, TV_BF16, density)
                       : (float)density;
            tvm_mt_stream_seek(job->stream, at, &mt);
            for (uint64_t i = 0; i < job->n_tiles; i++) {
                st->mt_tile[(size_t)i * st->n_random + d->draw] = mt;
                tvm_mt_skip(&mt, job->tile_elems);
            }
        }
        at += t->n_elems;
    }
}

void gta_set_up(struct tvm_job *job)
{
    struct gta_state *st = job->state;
    const struct tvm_tensor *t = job->tensor;
    size_t slot = 0;
    size_t j = 0;

    count_parts(t, st);
    (void)lay_out(job, st, st);
    for (size_t s = 0; s < t->n_sources; s++) {
        if ((int)s == t->base)
            continue;
        struct gta_donor *d = &st->donor[j];
        const double density = tvm_of(t, s, GTA_DENSITY, t->method->n_params);
        d->source = s;
        d->keep = gta_keep_of(t, s);
        st->weight[j] = gta_weight_of(t, s);
        st->coef[j] = st->weight[j];
        if (d->keep == GTA_KEEP_RANDOM && !gta_detail_of(t)->mergekit) {
            set_random(job, d, t->sources[s].position, density);
            if (tvm_shared(t, GTA_RESCALE) != 0.0)
                st->coef[j] = st->weight[j] / density;
        }
        if (d->keep == GTA_KEEP_TOP && job->trim && job->trim[s].known) {
            d->keep = GTA_KEEP_KNOWN;
            if (st->match_l1)
                st->coef[j] = gta_rescaled(st->weight[j], job->trim[s].sum_all,
                                           job->trim[s].sum_kept);
        }
        if (d->keep == GTA_KEEP_TOP && gta_is_scoped(t))
            set_scoped(job, d, j, &slot);
        else if (d->keep == GTA_KEEP_TOP && gta_sparsify_of(t) == GTA_OUTLIERS)
            set_outliers(job, d, &st->donor[st->n_donors + slot / 2], &slot,
                         density);
        else if (d->keep == GTA_KEEP_TOP)
            set_top(job, d, &slot, density);
        j++;
    }
    st->n_measured = gta_is_scoped(t) ? 0 : slot;
    if (gta_detail_of(t)->mergekit && st->n_random > 0)
        find_draws(job);
    st->call = (struct tvk_gta){
        .n_donors = st->n_donors,
        .coef = st->coef,
        .weight = st->weight,
        .consensus = gta_detail_of(t)->consensus,
        .normalize = tvm_shared(t, GTA_NORMALIZE) != 0.0,
        .lambda = tvm_shared(t, GTA_LAMBDA),
    };
}
