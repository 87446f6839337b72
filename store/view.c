/* SPDX-License-Identifier: Apache-2.0 */
/*
 * view.c - walking a tensor's bytes over chunk borders.
 *
 * A leaf (1 MiB) may lie in several chunks; it is then hashed in pieces, with
 * the state on the stack, so that reading never allocates.
 */
#include "tv/view.h"

#include <assert.h>
#include <string.h>

#include "xxh.h"

void tv_view_copy(const struct tv_view *v, uint64_t off, uint64_t n, void *dst)
{
    assert(off <= v->bytes && n <= v->bytes - off);
    unsigned char *to = (unsigned char *)dst;
    while (n > 0) {
        uint64_t run = 0;
        const unsigned char *from = tv_view_at(v, off, &run);
        if (run > n)
            run = n;
        memcpy(to, from, (size_t)run);
        to += run;
        off += run;
        n -= run;
    }
}

bool tv_view_equal(const struct tv_view *a, const struct tv_view *b)
{
    uint64_t off = 0;

    if (a->bytes != b->bytes)
        return false;
    while (off < a->bytes) {
        uint64_t na = 0;
        uint64_t nb = 0;
        const unsigned char *const pa = tv_view_at(a, off, &na);
        const unsigned char *const pb = tv_view_at(b, off, &nb);
        const uint64_t n = na < nb ? na : nb;
        if (memcmp(pa, pb, (size_t)n) != 0)
            return false;
        off += n;
    }
    return true;
}

struct tv_hash tv_view_leaf(const struct tv_view *v, uint64_t i)
{
    uint64_t off = i * TV_LEAF_BYTES;
    assert(off < v->bytes);
    uint64_t left = v->bytes - off;
    if (left > TV_LEAF_BYTES)
        left = TV_LEAF_BYTES;
    uint64_t run = 0;
    const unsigned char *p = tv_view_at(v, off, &run);
    if (run >= left)
        return tv_hash128(p, (size_t)left);
    XXH3_state_t st;
    memset(&st, 0, sizeof st);
    XXH3_128bits_reset(&st);
    while (left > 0) {
        p = tv_view_at(v, off, &run);
        if (run > left)
            run = left;
        XXH3_128bits_update(&st, p, (size_t)run);
        off += run;
        left -= run;
    }
    const XXH128_hash_t h = XXH3_128bits_digest(&st);
    return (struct tv_hash){.lo = h.low64, .hi = h.high64};
}
