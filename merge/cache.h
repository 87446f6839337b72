/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cache.h - masks and task vectors of earlier runs, used and kept (private to
 * merge/).
 *
 * A store that a run is given also keeps what the run had to find out: which
 * elements of a task vector a trimming method keeps (the mask), and, from the
 * second use on, the donor's values there (the task vector). Both are functions
 * of base, donor and density alone, so a run gives the same bytes with an
 * empty, a warm, or a partly evicted cache; and no failure here is one of the
 * merge, except that a damaged item is reported like any damaged input.
 *
 * Life: open (computes keys, looks up, pins) - per tensor: begin, tiles, end -
 * flush by the writer whenever it may write - close (notes what was used).
 */
#ifndef TVM_CACHE_H
#define TVM_CACHE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "method.h"
#include "tv/derived.h"
#include "tv/merge.h"

struct tvm_cache;
struct tvm_cache_entry;

struct tvm_cached_source {
    struct tvm_cache_entry *entry; /* NULL: not trimmed */
    tv_mask *mask;                 /* known before */
    tv_delta *delta;               /* read in place of the donor */
    /* The same of a run's own (calibrated.h), borrowed. */
    const uint64_t *fixed_words, *fixed_before;
    const float *fixed_values;
    uint64_t *words;       /* the mask in the making */
    unsigned char *values; /* the task vector in the making */
    uint64_t *before;
    enum tv_dtype dtype;          /* of values */
    _Atomic uint64_t n_nonfinite; /* of the donor */
};

struct tvm_cached { /* of one tensor in work */
    tv_read *read;
    size_t n;
    struct tvm_cached_source *src; /* [n], NULL when there is none */
    struct tvm_trim *trim;         /* [n] */
    uint64_t bytes;                /* of the budget */
};

/* budget: most bytes of heap that it may take. *out is NULL when the plan has
 * nothing for it, or no store, or no room. */
TV_NODISCARD enum tv_err tvm_cache_open(const struct tvm_plan *p,
                                        uint64_t budget, struct tv_error *err,
                                        struct tvm_cache **out);
/* Ends it; `write`: the store may be written to. NULL allowed. */
void tvm_cache_close(struct tvm_cache *c, bool write);
void tvm_cache_stats(struct tvm_cache *c, struct tvm_cache_use *out);

/* Any thread. After begin, trim is what the method is given. CORRUPT when what
 * is there is damaged. */
TV_NODISCARD enum tv_err tvm_cached_begin(struct tvm_cache *c, size_t tensor,
                                          struct tvm_cached *out,
                                          struct tv_error *err);
/* Gives back what was only read; `done`: the tensor is finished, so what was
 * made of it is put into the queue. A zeroed one is fine. */
void tvm_cached_end(struct tvm_cache *c, size_t tensor, struct tvm_cached *t,
                    bool done);

/* Tiles. Words of the mask of a block, when it is known. */
const uint64_t *tvm_cached_mask(const struct tvm_cached *t, size_t source,
                                uint64_t start, size_t n, uint64_t *scratch);
/* Elements of a donor from its task vector: 0 where it is not kept. packed has
 * TVM_BLOCK floats. Returns the bytes read. */
size_t tvm_cached_expand(const struct tvm_cached *t, size_t source,
                         const struct tvk_table *k, uint64_t start, size_t n,
                         const uint64_t *mask, float *packed, float *dst);
/* Keeps what the block has shown: the mask that was made, and the donor's
 * values under a known one. */
void tvm_cached_keep_mask(struct tvm_cached *t, size_t source, uint64_t start,
                          size_t n, const uint64_t *made);
void tvm_cached_keep_values(struct tvm_cached *t, size_t source,
                            const struct tvk_table *k, uint64_t start, size_t n,
                            const uint64_t *mask, const float *x,
                            float *packed);

/* Calibrated masks, before the workers start. Does the store have the mask of
 * a source, with its values where it needs them? */
bool tvm_cache_has(struct tvm_cache *c, size_t tensor, size_t source);
/* Keeps one, with values [before[n_blocks]] or NULL, and more damping that it
 * took (NULL: none), if keep_free bytes of the quota stay free; true: it is
 * there, and pinned for this run. */
bool tvm_cache_add(struct tvm_cache *c, size_t tensor, size_t source,
                   const uint64_t *words, const float *values,
                   const uint64_t *before, const struct tvm_damped *damped,
                   uint64_t keep_free);
/* Did the mask that the store has take more damping? Numbers only. */
bool tvm_cache_damped(struct tvm_cache *c, size_t tensor, size_t source,
                      struct tvm_damped *out);

/* Keeps the store's lock from call to call; false: not to be had. */
bool tvm_cache_hold(struct tvm_cache *c, bool on);

/* Writer thread, outside of any batch of the store. */
bool tvm_cache_pending(struct tvm_cache *c, bool all);
void tvm_cache_flush(struct tvm_cache *c, uint64_t keep_free);

#endif
