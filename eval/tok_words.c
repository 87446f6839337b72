/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tok_words.c - words that were seen before and their ids.
 *
 * Text repeats its words, so most of them are looked up here and not merged.
 * An open-addressed table over two areas, one of texts and one of ids. Most of
 * a search goes over tags, the upper half of the hash (0: free), which are
 * small enough to stay near the processor. When anything is full everything is
 * forgotten at once.
 */
#include <string.h>

#include "tv/alloc.h"
#include "tv/hash.h"

#include "tok.h"

#define SLOTS      (1u << 16)
#define WORDS_MAX  (1u << 15)
#define TEXT_BYTES (4u << 20)
#define IDS_MAX    (1u << 19)
#define FEW_IDS    8u /* copied without counting them */

struct entry {
    uint32_t text_at, ids_at;
    uint16_t n_text, n_ids;
};

struct tve_words {
    uint32_t *tags;        /* [SLOTS] */
    struct entry *entries; /* [SLOTS] */
    char *text;
    int32_t *ids;
    size_t n, n_text, n_ids;
};

enum tv_err tve_words_open(struct tv_error *err, tve_words **out)
{
    tve_words *w = tv_calloc(1, sizeof(*w));

    *out = NULL;
    if (w) {
        w->tags = tv_calloc(SLOTS, sizeof(*w->tags));
        w->entries = tv_alloc(SLOTS * sizeof(*w->entries));
        w->text = tv_alloc(TEXT_BYTES);
        w->ids = tv_alloc((IDS_MAX + FEW_IDS) * sizeof(*w->ids));
    }
    if (!w || !w->tags || !w->entries || !w->text || !w->ids) {
        tve_words_close(w);
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    }
    *out = w;
    return TV_OK;
}

void tve_words_close(tve_words *w)
{
    if (!w)
        return;
    tv_free(w->tags);
    tv_free(w->entries);
    tv_free(w->text);
    tv_free(w->ids);
    tv_free(w);
}

static inline bool same(const char *a, const char *b, size_t n)
{
    uint64_t x[2] = {0, 0}, y[2] = {0, 0};

    if (n > 16)
        return !memcmp(a, b, n);
    /* Both ends, which overlap: no call for words of usual lengths. */
    if (n >= 8) {
        memcpy(&x[0], a, 8);
        memcpy(&y[0], b, 8);
        memcpy(&x[1], a + n - 8, 8);
        memcpy(&y[1], b + n - 8, 8);
    } else if (n >= 4) {
        memcpy(&x[0], a, 4);
        memcpy(&y[0], b, 4);
        memcpy(&x[1], a + n - 4, 4);
        memcpy(&y[1], b + n - 4, 4);
    } else if (n > 0) {
        return a[0] == b[0] && a[n / 2] == b[n / 2] && a[n - 1] == b[n - 1];
    }
    return x[0] == y[0] && x[1] == y[1];
}

static inline uint32_t tag_of(uint64_t hash)
{
    const uint32_t tag = (uint32_t)(hash >> 32);

    return tag ? tag : 1;
}

enum tv_err tve_words_get(const tve_words *w, const char *s, size_t n,
                          struct tve_place *place, bool *found,
                          struct tve_ids *out, struct tv_error *err)
{
    const struct entry *e = NULL;
    uint32_t tag = 0;
    size_t i = 0;

    *found = false;
    *place = (struct tve_place){0, TVE_WORD_MAX + 1};
    if (n > TVE_WORD_MAX)
        return TV_OK;
    *place = (struct tve_place){tv_hash64(s, n), n};
    tag = tag_of(place->hash);
    for (i = (size_t)place->hash & (SLOTS - 1);; i = (i + 1) & (SLOTS - 1)) {
        if (!w->tags[i])
            return TV_OK;
        e = &w->entries[i];
        if (w->tags[i] == tag && e->n_text == n &&
            same(w->text + e->text_at, s, n))
            break;
    }
    *found = true;
    const enum tv_err rc =
        tve_ids_room(out, e->n_ids > FEW_IDS ? e->n_ids : FEW_IDS, err);
    if (rc != TV_OK)
        return rc;
    if (e->n_ids <= FEW_IDS)
        memcpy(out->ids + out->n, w->ids + e->ids_at,
               FEW_IDS * sizeof(*w->ids));
    else
        memcpy(out->ids + out->n, w->ids + e->ids_at,
               e->n_ids * sizeof(*w->ids));
    out->n += e->n_ids;
    return TV_OK;
}

void tve_words_put(tve_words *w, const struct tve_place *place, const char *s,
                   const int32_t *ids, size_t n_ids)
{
    const size_t n = place->n;
    size_t i = (size_t)place->hash & (SLOTS - 1);

    if (n > TVE_WORD_MAX || n_ids > UINT16_MAX)
        return;
    if (w->n == WORDS_MAX || w->n_text + n > TEXT_BYTES ||
        w->n_ids + n_ids > IDS_MAX) {
        memset(w->tags, 0, SLOTS * sizeof(*w->tags));
        w->n = w->n_text = w->n_ids = 0;
    }
    while (w->tags[i])
        i = (i + 1) & (SLOTS - 1);
    memcpy(w->text + w->n_text, s, n);
    if (n_ids > 0)
        memcpy(w->ids + w->n_ids, ids, n_ids * sizeof(*ids));
    w->tags[i] = tag_of(place->hash);
    w->entries[i] = (struct entry){(uint32_t)w->n_text, (uint32_t)w->n_ids,
                                   (uint16_t)n, (uint16_t)n_ids};
    w->n++;
    w->n_text += n;
    w->n_ids += n_ids;
}
