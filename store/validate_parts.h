/* SPDX-License-Identifier: Apache-2.0 */
/*
 * validate_parts.h - what the files of verify share (private to validate*.c).
 *
 *   validate.c          the order of tables, and the report
 *   validate_walk.c     a table's tree as LMDB shows it: order, counts, pages
 *   validate_entries.c  what each record says, and what it refers to
 *   validate_bytes.c    the bytes of payloads, by all cores
 *
 * Damage is reported and looked past (verify_note); only what ends the walk,
 * such as a disk that fails, is returned. One thread, but for the hashing.
 */
#ifndef STORE_VALIDATE_PARTS_H
#define STORE_VALIDATE_PARTS_H

#include "store_priv.h"
#include "tv/pool.h"

struct verify {
    struct txn t;
    tv_read *read; /* lends its snapshot to t */
    tv_verify_fn on_problem;
    tv_bytes_fn progress;
    void *arg;
    uint64_t done, total, n_problems, next_id;
    uint64_t *uses; /* payload ids of all inline tensors, sorted */
    size_t n_uses, cap_uses;
    unsigned char *free_pages; /* a bit per page, NULL when unknown */
    uint64_t n_pages;
    tv_pool *pool;             /* NULL: no threads could be had */
    struct gathered *gathered; /* [GATHERED] */
    size_t n_gathered;
    uint64_t gathered_bytes;
    struct piece *pieces;
    size_t n_pieces, cap_pieces;
};

/* ---- validate.c ---------------------------------------------------------- */

/* Reports one; object and tensor may be "". */
void verify_problem(struct verify *v, const char *object, const char *tensor,
                    const char *fmt, ...) TV_PRINTF(4, 5);
void verify_advance(struct verify *v, uint64_t bytes);
/* Damage becomes a problem and the walk goes on; anything else ends it. */
TV_NODISCARD enum tv_err verify_note(struct verify *v, enum tv_err rc,
                                     const char *object, const char *tensor,
                                     struct tv_error *err);

/* ---- validate_walk.c ----------------------------------------------------- */

typedef enum tv_err (*verify_fn)(struct verify *v, const struct walk *w,
                                 struct tv_error *err);

/* Which pages are free, into v->free_pages; unknown where the list is damaged.
 */
TV_NODISCARD enum tv_err verify_free_read(struct verify *v,
                                          struct tv_error *err);
/* True when a value lies on a page that LMDB would give away. */
bool verify_on_free_page(const struct verify *v, const MDB_val *val);
/* Every entry of a table, given to fn. */
TV_NODISCARD enum tv_err verify_each(struct verify *v, enum db db, verify_fn fn,
                                     struct tv_error *err);
bool verify_key_is(const struct walk *w, const struct rec_key *k);
/* Can an object or payload have this id? */
bool verify_known_id(struct verify *v, uint64_t id);

/* ---- validate_entries.c -------------------------------------------------- */

/* What looks at the entries of a table. */
verify_fn verify_entry_of(enum db db);
/* Only LMDB's own part, for tables that are looked at elsewhere
 * (derived_verify), or not now. */
TV_NODISCARD enum tv_err verify_no_entry(struct verify *v, const struct walk *w,
                                         struct tv_error *err);
/* Reports a damaged payload under the name of every tensor that uses it. */
TV_NODISCARD enum tv_err verify_payload_problem(struct verify *v, uint64_t id,
                                                const char *what,
                                                struct tv_error *err);

/* ---- validate_bytes.c ---------------------------------------------------- */

/* NOMEM. Without threads it takes longer. */
TV_NODISCARD enum tv_err
verify_bytes_begin(struct verify *v, unsigned n_threads, struct tv_error *err);
/* Also after a begin that failed. */
void verify_bytes_end(struct verify *v);
/* verify_fn of payloads: gathers them. */
TV_NODISCARD enum tv_err verify_payload_entry(struct verify *v,
                                              const struct walk *w,
                                              struct tv_error *err);
/* Looks at what is gathered. */
TV_NODISCARD enum tv_err verify_payloads_end(struct verify *v,
                                             struct tv_error *err);

#endif
