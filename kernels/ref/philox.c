/* SPDX-License-Identifier: Apache-2.0 */
/*
 * philox.c - random masks from a counter-based generator.
 *
 * Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
 * easy as 1, 2, 3", SC 2011, here in its authors' implementation. A bit is a
 * pure function of (key, name, element index), so a mask needs no storage and
 * no order. Masks of one key are nested in the threshold.
 */
#include "rows.h"

#include <assert.h>

#include <Random123/philox.h>

static uint64_t philox_mask(uint64_t *TVK_RESTRICT mask, uint64_t start,
                            uint64_t key, uint64_t name_hash,
                            uint64_t threshold, size_t n)
{
    const philox4x32_key_t k = {{(uint32_t)key, (uint32_t)(key >> 32)}};
    philox4x32_ctr_t words = {{0, 0, 0, 0}};
    uint64_t kept = 0;

    assert(start % 64 == 0);
    for (size_t i = 0; i < n; i++) {
        if (i % 64 == 0)
            mask[i >> 6] = 0;
        if (i % 4 == 0) {
            const uint64_t c = (start + i) >> 2;
            const philox4x32_ctr_t ctr = {{(uint32_t)c, (uint32_t)(c >> 32),
                                           (uint32_t)name_hash,
                                           (uint32_t)(name_hash >> 32)}};
            words = philox4x32_R(10, ctr, k);
        }
        if (words.v[i % 4] < threshold) {
            mask[i >> 6] |= UINT64_C(1) << (i & 63);
            kept++;
        }
    }
    return kept;
}

void tvk_philox_words(uint32_t *dst, uint64_t start, uint64_t key,
                      uint64_t name_hash, size_t n)
{
    const philox4x32_key_t k = {{(uint32_t)key, (uint32_t)(key >> 32)}};
    philox4x32_ctr_t words = {{0, 0, 0, 0}};

    for (size_t i = 0; i < n; i++) {
        const uint64_t e = start + i;
        if (i == 0 || e % 4 == 0) {
            const uint64_t c = e >> 2;
            const philox4x32_ctr_t ctr = {{(uint32_t)c, (uint32_t)(c >> 32),
                                           (uint32_t)name_hash,
                                           (uint32_t)(name_hash >> 32)}};
            words = philox4x32_R(10, ctr, k);
        }
        dst[i] = words.v[e % 4];
    }
}

void tvk_ref_philox(struct tvk_table *t)
{
    t->philox_mask = philox_mask;
    t->philox_words = tvk_philox_words;
}
