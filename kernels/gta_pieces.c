/* SPDX-License-Identifier: Apache-2.0 */
/*
 * gta_pieces.c - gta of bf16 numbers through fp32 pieces that stay in the L1
 * cache.
 *
 * Arithmetic is in fp64, whose vectors are filled best from fp32 in memory; but
 * a block at a time would first wait for all of its memory and then compute.
 * Pieces are so small that what their conversion asks for (it reads ahead)
 * arrives while the one before is computed.
 */
#include "rows.h"

#include <assert.h>

uint64_t tvk_gta_by_pieces(enum tvk_isa row, void *TVK_RESTRICT dst,
                           const void *b, const void *const *x,
                           const uint64_t *const *masks,
                           const struct tvk_gta *p, size_t n)
{
    const struct tvk_table *k = tvk_table_for(row);
    const size_t each = tvk_piece_elems(p->n_donors);
    float in[TVK_PIECE_FLOATS];
    float out[TVK_PIECE_ELEMS];
    const float *donors[TVK_DONORS_MAX];
    const uint64_t *kept[TVK_DONORS_MAX];
    uint64_t bad = 0;

    assert(p->n_donors <= TVK_DONORS_MAX);
    for (size_t j = 0; j < p->n_donors; j++)
        donors[j] = in + (j + 1) * each;
    for (size_t i = 0; i < n; i += each) {
        const size_t some = n - i < each ? n - i : each;
        /* What is written only is read before, line by line. */
        for (size_t at = i; at < i + some; at += 32)
            __builtin_prefetch((const unsigned char *)dst + 2 * at);
        (void)k->bf16_to_f32(in, (const unsigned char *)b + 2 * i, some);
        for (size_t j = 0; j < p->n_donors; j++) {
            (void)k->bf16_to_f32(in + (j + 1) * each,
                                 (const unsigned char *)x[j] + 2 * i, some);
            if (masks != NULL)
                kept[j] = masks[j] != NULL ? masks[j] + i / 64 : NULL;
        }
        k->gta(out, in, donors, masks != NULL ? kept : NULL, p, some);
        bad += k->f32_to_bf16((unsigned char *)dst + 2 * i, out, some);
    }
    return bad;
}
