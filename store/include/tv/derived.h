/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/derived.h - what a store keeps only to save work: masks, task vectors and
 * input statistics.
 *
 * An item belongs to one tensor and one score key. The score key is a hash of
 * everything that the item depends on (rule, density, contents of base and
 * donor), made by whoever computes it; equal keys mean equal items, bit for
 * bit. So items can be dropped at any time and made again: that is what happens
 * when a quota needs room, the longest unused first. User data is never
 * dropped.
 *
 *   mask    the kept elements of a task vector, as roaring bitmaps (mask.h)
 *   delta   the donor's values at the kept elements, packed, in its own dtype:
 *           with base and mask that is the sparse task vector, and the same
 *           arithmetic on it gives the same bits. Useless without its mask: the
 *           two are dropped together when the mask goes. A task vector that
 *           keeps everything is its donor and is not stored.
 *   stat    sums over the inputs of a layer (tv/calibrate.h): an array of fp64
 *           or fp32, filed under the first weight that takes the input
 *
 * Items come in groups (one base, donor, rule and density: the same for all
 * tensors of a model) described by a document that this folder does not read.
 *
 * A run pins the items that it is going to use. A pin lasts until
 * tv_derived_release or until its process is gone. Writing works on a store
 * that is open for writing; no lock of long work is needed, since every step is
 * one transaction and half an item is invisible.
 */
#ifndef TV_DERIVED_H
#define TV_DERIVED_H

#include "tv/store.h"

#define TV_DELTA_BLOCK 1024u /* elements between entry points of a delta */

enum tv_derived_kind { TV_MASK = 1, TV_DELTA = 2, TV_STAT = 3 };

struct tv_derived_key {
    enum tv_derived_kind kind;
    struct tv_hash score;
    const char *tensor;
};

struct tv_derived {
    struct tv_derived_key key;
    uint64_t id, group;
    uint64_t n_elems, n_set;
    uint64_t bytes;         /* of its records */
    uint64_t created, used; /* ticks: compare, nothing else */
    enum tv_dtype dtype;    /* of the values of a delta or statistic */
    bool has_sums;          /* which of these it has: */
    union {
        struct { /* sums of |d| over all and over kept elements */
            double sum_all, sum_kept;
        };
        double notes[2]; /* of who stored it; not read here */
    };
    uint64_t n_nonfinite; /* of the donor */
    uint64_t n_rows;      /* statistics: rows summed over */
    bool pinned;          /* lists only */
    const char *about;    /* lists only: the group's document */
};

/* ---- reading --------------------------------------------------------------
 */

/* out->key.tensor is key->tensor. Unfinished items are not found, nor are those
 * of another version of CRoaring. */
TV_NODISCARD enum tv_err tv_derived_find(tv_read *r,
                                         const struct tv_derived_key *key,
                                         bool *found, struct tv_derived *out,
                                         struct tv_error *err);

struct tv_derived_list {      /* owned: tv_derived_list_free */
    struct tv_derived *items; /* by group, kind, tensor in layer order */
    size_t n;
    void *storage;
};
/* All finished items, with their groups' documents; nothing is opened. */
TV_NODISCARD enum tv_err tv_derived_list(tv_read *r, struct tv_error *err,
                                         struct tv_derived_list **out);
void tv_derived_list_free(struct tv_derived_list *l);

/* A mask opened for reading; its bytes are borrowed from r until renew or end,
 * the handle is owned. All checksums have been verified: CORRUPT names the
 * tensor. Any thread may call the functions below. */
typedef struct tv_mask tv_mask;
TV_NODISCARD enum tv_err tv_mask_open(tv_read *r, struct tv_hash score,
                                      const char *tensor, bool *found,
                                      struct tv_error *err, tv_mask **out);
void tv_mask_close(tv_mask *m);         /* NULL allowed */
uint64_t tv_mask_set(const tv_mask *m); /* elements in it */
/* Words (tv/kernels.h) of elements [start, start + n): start is a multiple of
 * 64 and the range lies within one aligned run of 65,536. Points into the map
 * where a bitset lies there, else to scratch, filled. */
const uint64_t *tv_mask_words(const tv_mask *m, uint64_t start, uint32_t n,
                              uint64_t *scratch);
/* Elements in both masks, of equal size. */
uint64_t tv_mask_and(const tv_mask *a, const tv_mask *b);
/* Roaring containers by type: bitset, array, run. */
void tv_mask_containers(const tv_mask *m, uint64_t n[3]);
/* Heap bytes that opening takes. */
uint64_t tv_mask_open_bytes(uint64_t n_elems);

/* A delta opened for reading, on the terms of a mask. */
typedef struct tv_delta tv_delta;
TV_NODISCARD enum tv_err tv_delta_open(tv_read *r, struct tv_hash score,
                                       const char *tensor, bool *found,
                                       struct tv_error *err, tv_delta **out);
void tv_delta_close(tv_delta *d); /* NULL allowed */
enum tv_dtype tv_delta_dtype(const tv_delta *d);
/* Packed values of elements [start, start + n_elems): start is a multiple of
 * TV_DELTA_BLOCK, the end one too or the tensor's, and both lie within one
 * aligned run of 2^20. *n of them, aligned to the element. */
const void *tv_delta_values(const tv_delta *d, uint64_t start, size_t n_elems,
                            size_t *n);

/* Copies n_elems values of `dtype` to dst, filled, all checksums verified. An
 * item of another size or type is not found; nothing is written then. */
TV_NODISCARD enum tv_err tv_stat_read(tv_read *r, struct tv_hash score,
                                      const char *tensor, enum tv_dtype dtype,
                                      uint64_t n_elems, bool *found,
                                      uint64_t *n_rows, void *dst,
                                      struct tv_error *err);

/* ---- writing --------------------------------------------------------------
 */

struct tv_derived_new {
    struct tv_derived_key key;
    const char *about;
    uint64_t n_elems;
    const uint64_t *words;  /* masks: bits past n_elems are 0 */
    enum tv_dtype dtype;    /* deltas, statistics: of values; whole bytes */
    const void *values;     /* deltas: [before[n_blocks]]; statistics: [n_elems]
                             */
    const uint64_t *before; /* deltas: [n_blocks + 1] values before a block */
    bool has_sums;          /* which of these, as in struct tv_derived: */
    union {
        struct {
            double sum_all, sum_kept;
        };
        double notes[2];
    };
    uint64_t n_nonfinite;
    uint64_t n_rows; /* statistics */
    bool stored;     /* result: it is there now */
    bool left_out;   /* result: tried, found no room */
};
/* Stores items in as few commits as dirty_bytes allows, evicting what is older
 * than this process where the quota needs it, but leaving keep_free bytes. An
 * item that is there already counts as stored. What finds no room is left out:
 * TV_OK, stored false. */
TV_NODISCARD enum tv_err tv_derived_store(tv_store *s,
                                          struct tv_derived_new *items,
                                          size_t n, uint64_t dirty_bytes,
                                          uint64_t keep_free,
                                          struct tv_error *err);
/* Pins items for this handle; those that are not there are passed over. */
TV_NODISCARD enum tv_err tv_derived_pin(tv_store *s,
                                        const struct tv_derived_key *keys,
                                        size_t n, struct tv_error *err);
/* Notes that `keys` were used now; pins stay. */
TV_NODISCARD enum tv_err tv_derived_used(tv_store *s,
                                         const struct tv_derived_key *keys,
                                         size_t n, struct tv_error *err);
/* Drops the pins of this handle and notes that `keys` were used now. */
TV_NODISCARD enum tv_err tv_derived_release(tv_store *s,
                                            const struct tv_derived_key *keys,
                                            size_t n, struct tv_error *err);

/* ---- room -----------------------------------------------------------------
 */

struct tv_derived_room {
    uint64_t evictable; /* bytes of items that nobody has pinned */
    uint64_t pinned;
    uint64_t trash; /* left by killed writers; goes with the next write */
    uint64_t user; /* of user data that fit the quota when all that is evictable
                      has gone, by its least pages; UINT64_MAX without quota */
};
TV_NODISCARD enum tv_err
tv_derived_room(tv_read *r, struct tv_derived_room *out, struct tv_error *err);
/* Bytes of pages that a side file or the state of a run takes at most. */
uint64_t tv_derived_long(uint64_t bytes);
/* Evicts, oldest use first, until `bytes` more of user data fit the quota, and
 * as much of `spare` more as there is. NOSPACE says how much is missing and
 * what could go; then nothing has gone in vain. */
TV_NODISCARD enum tv_err tv_derived_reserve(tv_store *s, uint64_t bytes,
                                            uint64_t spare,
                                            struct tv_error *err);
/* Drops everything that is not pinned. */
TV_NODISCARD enum tv_err tv_derived_evict_all(tv_store *s, uint64_t *n_items,
                                              struct tv_error *err);

#endif
