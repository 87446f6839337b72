/* SPDX-License-Identifier: Apache-2.0 */
/*
 * derived_priv.h - between derived.c (reading), derive.c (writing), evict.c
 * (room, eviction), derived_pins.c (who uses what) and derived_gc.c (what
 * killed writers left).
 */
#ifndef TV_DERIVED_PRIV_H
#define TV_DERIVED_PRIV_H

#include "mask.h"
#include "store_priv.h"
#include "tv/derived.h"

#define DELTA_CHUNK_ELEMS (1u << 20)
#define STAT_CHUNK_ELEMS  (1u << 20)

static const enum tv_derived_kind derived_kinds[] = {TV_MASK, TV_DELTA,
                                                     TV_STAT};
#define DERIVED_KINDS (sizeof derived_kinds / sizeof derived_kinds[0])

/* Bytes of a delta chunk's table, padded so that values are aligned. */
static inline size_t delta_table_bytes(size_t n_blocks)
{
    return ((n_blocks + 1) * sizeof(uint32_t) + 63u) & ~(size_t)63u;
}

/* ---- derived.c ------------------------------------------------------------
 */

enum db derived_db(enum tv_derived_kind kind);
/* Is this number of a record a kind that we know? */
bool derived_kind_known(uint8_t kind);
uint8_t derived_chunk_kind(enum tv_derived_kind kind);
const char *derived_word(enum tv_derived_kind kind);
uint64_t derived_chunks(const struct rec_derived *r);
TV_NODISCARD enum tv_err derived_get(const struct txn *t,
                                     enum tv_derived_kind kind,
                                     const struct rec_key *k, bool *found,
                                     struct rec_derived *r,
                                     struct tv_error *err);
TV_NODISCARD enum tv_err derived_put(tv_batch *b, enum tv_derived_kind kind,
                                     const struct rec_key *k,
                                     const struct rec_derived *r,
                                     struct tv_error *err);
bool derived_is_chunk(const MDB_val *key, const struct rec_key *item);
void derived_key_copy(struct rec_key *k, const MDB_val *key);
/* Calls fn for every item record; for one that is damaged, and for chunks
 * without an item, with r == NULL and a reason. fn must not write. */
typedef enum tv_err (*derived_fn)(void *arg, enum tv_derived_kind kind,
                                  const struct rec_key *k,
                                  const struct rec_derived *r, const char *why,
                                  struct tv_error *err);
TV_NODISCARD enum tv_err derived_each(const struct txn *t,
                                      enum tv_derived_kind kind, derived_fn fn,
                                      void *arg, struct tv_error *err);
/* The same over all kinds. */
TV_NODISCARD enum tv_err derived_each_kind(const struct txn *t, derived_fn fn,
                                           void *arg, struct tv_error *err);

/* ---- evict.c --------------------------------------------------------------
 */

TV_NODISCARD enum tv_err derived_group_get(const struct txn *t, uint64_t id,
                                           bool *found, struct rec_group *g,
                                           struct tv_error *err);
/* Writes the record of a group; about [n]. */
TV_NODISCARD enum tv_err derived_group_put(tv_batch *b, uint64_t id,
                                           const char *about, size_t n,
                                           uint64_t n_items,
                                           struct tv_error *err);
/* One more item of a document; *id names the group. */
TV_NODISCARD enum tv_err derived_group_join(tv_batch *b, const char *about,
                                            uint64_t *id, struct tv_error *err);
TV_NODISCARD enum tv_err next_tick(tv_batch *b, uint64_t *tick,
                                   struct tv_error *err);
/* Sets an item's last use to a new tick; writes its record. */
TV_NODISCARD enum tv_err derived_touch(tv_batch *b, enum tv_derived_kind kind,
                                       const struct rec_key *k,
                                       struct rec_derived *r,
                                       struct tv_error *err);
/* Removes an item, its chunks and what points to it. */
TV_NODISCARD enum tv_err derived_drop_one(tv_batch *b,
                                          enum tv_derived_kind kind,
                                          const struct rec_key *k,
                                          const struct rec_derived *r,
                                          struct tv_error *err);
/* The same, and of a mask the delta that is noise without it. */
TV_NODISCARD enum tv_err derived_drop(tv_batch *b, enum tv_derived_kind kind,
                                      const struct rec_key *k,
                                      const struct rec_derived *r,
                                      struct tv_error *err);

/* A batch in which values of pages[n] fit, after evicting what has to go for
 * them (never what this handle has stored); *out NULL when they do not. */
TV_NODISCARD enum tv_err derived_batch(tv_store *s, const uint64_t *pages,
                                       size_t n, uint64_t n_single,
                                       uint64_t keep_pages, tv_batch **out,
                                       struct space *space,
                                       struct tv_error *err);
#define TREE_PAGES 24u /* copied by any commit of ours */
/* Pages of a value of `bytes` behind a chunk's header. */
uint64_t value_pages(uint64_t bytes, size_t page_bytes);

/* ---- derived_pins.c -------------------------------------------------------
 */

struct derived_pins { /* ids that living sessions have pinned, sorted */
    uint64_t *ids;
    size_t n, cap;
};
TV_NODISCARD enum tv_err derived_pins_read(const struct txn *t,
                                           struct derived_pins *out,
                                           struct tv_error *err);
bool derived_pinned(const struct derived_pins *p, uint64_t id);
void derived_pins_free(struct derived_pins *p);
/* Pins of this session (own), or of sessions that are gone. */
TV_NODISCARD enum tv_err derived_drop_pins(tv_batch *b, bool own,
                                           struct tv_error *err);

#endif
