/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gta_quick.c - which merges fp32 estimates, with what bounds; and the elements
 * that it leaves in doubt.
 */
#include "rows.h"
#include "gta_quick.h"

#include <assert.h>
#include <math.h>
#include <string.h>

static int is_sized(double v)
{
    return v >= 0x1p-16 && v <= 0x1p16;
}

/* Adding in the order of donors, as the reference does. */
static void sum_weights(double sum[TVK_QUICK_SETS], const struct tvk_gta *p)
{
    sum[0] = 0.0;
    for (size_t j = 0; j < p->n_donors; j++)
        for (size_t set = 0; set < (size_t)1 << j; set++)
            sum[set | (size_t)1 << j] = sum[set] + p->weight[j];
}

/* Is this a call for fp32? Then it has begun. */
static int begin(struct tvk_quick *q, struct tvk_doubts *doubts,
                 size_t most_donors)
{
    const struct tvk_gta *const p = q->p;
    const double by = TVK_QUICK_ULPS(p->n_donors) * 0x1p-24;
    const double least = tvk_gta_least_divisor(p);
    double sum[TVK_QUICK_SETS];

    assert(most_donors <= TVK_QUICK_DONORS);
    if (!p->consensus || p->n_donors < 2 || p->n_donors > most_donors)
        return 0;
    for (size_t j = 0; j < p->n_donors; j++) {
        if (!is_sized(p->coef[j]))
            return 0;
        q->coef[j] = (float)p->coef[j];
    }
    sum_weights(sum, p);
    for (size_t set = 1; set < (size_t)1 << p->n_donors; set++) {
        const double divisor =
            p->normalize && fabs(sum[set]) > least ? sum[set] : 1.0;
        const double factor = p->lambda / divisor;
        if (!is_sized(fabs(factor)))
            return 0;
        q->low[set] = (float)(factor * (1.0 - by));
        q->high[set] = (float)(factor * (1.0 + by));
    }
    q->low[0] = -1.0f;
    q->high[0] = -1.0f;
    q->doubts = doubts;
    q->n_doubts = 0;
    q->bad = 0;
    doubts->count = 0;
    memset(doubts->kept, 0, sizeof(doubts->kept));
    return 1;
}

static float widened(const unsigned char *src, size_t i)
{
    uint16_t h = 0;
    float v = 0.0f;

    memcpy(&h, src + 2 * i, sizeof(h));
    const uint32_t u = (uint32_t)h << 16;
    memcpy(&v, &u, sizeof(v));
    return v;
}

static uint64_t is_kept(const struct tvk_quick *q, size_t j, size_t i)
{
    if (q->masks == NULL || q->masks[j] == NULL)
        return 1;
    return q->masks[j][i >> 6] >> (i & 63) & 1u;
}

void tvk_quick_doubt(struct tvk_quick *q, unsigned which, size_t i)
{
    struct tvk_doubts *const d = q->doubts;

    assert(which <= 0xffffu);
    if (d->count > TVK_DOUBTS - 16)
        tvk_quick_settle(q);
    for (; which != 0; which &= which - 1) {
        const size_t at = i + (size_t)__builtin_ctz(which);
        const size_t k = d->count++;
        q->n_doubts++;
        d->at[k] = at;
        d->b[k] = widened(q->b, at);
        for (size_t j = 0; j < q->p->n_donors; j++) {
            d->x[j][k] = widened(q->x[j], at);
            d->kept[j] |= is_kept(q, j, at) << k;
        }
    }
}

void tvk_quick_settle(struct tvk_quick *q)
{
    const struct tvk_table *const row = tvk_table_for(q->row);
    struct tvk_doubts *const d = q->doubts;
    const float *x[TVK_QUICK_DONORS];
    const uint64_t *kept[TVK_QUICK_DONORS];
    float out[TVK_DOUBTS];
    uint16_t half[TVK_DOUBTS];

    for (size_t j = 0; j < q->p->n_donors; j++) {
        x[j] = d->x[j];
        kept[j] = &d->kept[j];
    }
    row->gta(out, d->b, x, kept, q->p, d->count);
    q->bad += row->f32_to_bf16(half, out, d->count);
    for (size_t k = 0; k < d->count; k++)
        memcpy(q->dst + 2 * d->at[k], &half[k], sizeof(half[k]));
    d->count = 0;
    memset(d->kept, 0, sizeof(d->kept));
}

uint64_t tvk_quick_gta(const struct tvk_quick_row *row, void *TVK_RESTRICT dst,
                       const void *b, const void *const *x,
                       const uint64_t *const *masks, const struct tvk_gta *p,
                       size_t n)
{
    struct tvk_quick q = {.row = row->isa,
                          .dst = dst,
                          .b = b,
                          .x = (const unsigned char *const *)(const void *)x,
                          .masks = masks,
                          .p = p};
    struct tvk_doubts doubts;
    size_t done = 0;

    if (n >= 64 && begin(&q, &doubts, row->most_donors))
        done = row->quick(&q, n);
    if (done < n)
        q.bad += row->in_fp64(dst, b, x, masks, p, done, n);
    return q.bad;
}
