/* SPDX-License-Identifier: Apache-2.0 */
/*
 * store_priv.h - handles and the calls between the files of this folder.
 *
 *   store.c       create, open, close, writer lock
 *   session.c     who has it open             hold.c        what they read
 *   txn.c         reads, batches, walks       lmdb_seam.c   LMDB itself
 *   record.c      records as bytes            pieces.c      long values
 *   catalog.c     tensors                     object.c      objects, side files
 *   payload.c     chunks, sharing, views      view.c        bytes over chunks
 *   copy.c        copying tensors in          source_file.c linked files
 *   journal.c     runs of merges              quota.c       room, stat
 *   trash.c       bounded removal, gc         compact.c     free pages go back
 *   tree_check.c  LMDB's trees, at opening    validate*.c   verify
 *   derive.c, derived*.c, evict.c, mask*.c    derived data (derived_priv.h)
 */
#ifndef TV_STORE_PRIV_H
#define TV_STORE_PRIV_H

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>

#include "lmdb_seam.h"
#include "record.h"
#include "tv/text.h"
#include "tv/store.h"
#include "tv/sys.h"

enum db {
    DB_META,
    DB_OBJECT,
    DB_OBJECT_ID,
    DB_TENSOR,
    DB_PAYLOAD,
    DB_LEAF,
    DB_CONTENT,
    DB_CHUNK,
    DB_BLOB,
    DB_SOURCE,
    DB_TRASH,
    DB_PIN,
    DB_RUN,
    DB_DONE,
    DB_MASK,
    DB_DELTA,
    DB_GROUP,
    DB_USE,
    DB_CHARGE,
    DB_STAT,
    DB_COUNT,
    /* Tables of format 1: every store has them. One that is added later goes
     * behind DB_DONE and is made when an older store is opened for writing. */
    DB_REQUIRED = DB_DONE + 1
};
const char *db_name(enum db db);

#define META_STORE   "store"
#define META_QUOTA   "quota"
#define META_NEXT_ID "next_id"
#define META_TICK    "tick"

struct source_map { /* one opened linked file; list owned by the store */
    struct source_map *next;
    uint64_t id;
    char *path;
    tv_map *map;               /* NULL until a view needs it */
    struct tv_extent *extents; /* names for a SIGBUS handler */
    size_t n_extents;
    char *extent_names;
    bool named; /* its extents were looked for */
};

struct tv_store {
    char *path, *data_path;
    MDB_env *env;
    MDB_dbi dbi[DB_COUNT];
    bool has[DB_COUNT]; /* false: older store opened read-only */
    bool read_only;
    bool check_all; /* tv_store_options */
    size_t page_bytes;
    uint64_t map_bytes, map_max, dirty_max;
    uint64_t map_quota;        /* the quota that the map was sized for */
    atomic_int commit_failure; /* LMDB's code for the last commit that failed */
    uint64_t session; /* tells our unfinished payloads from those of others */
    int lock_fd;      /* writer lock, -1 when not held */
    struct tv_wait wait;   /* who hears that it is waited for */
    int open_fd;           /* open.lock (session.c), -1 on read-only media */
    bool session_held;     /* others can see that our session lives */
    int map_slot;          /* tv_map_register */
    uintptr_t map_from;    /* where data.mdb is mapped, 0 when unknown */
    atomic_int n_txns;     /* live reads and batches: the map must not move */
    pthread_mutex_t mutex; /* guards sources */
    struct source_map *sources;
};

/* Memory that lives until its owner is cleared; 64-byte aligned. */
struct arena {
    struct arena_node *head;
};
void *arena_alloc(struct arena *a, uint64_t n);
void arena_clear(struct arena *a);

/* What read-side functions need; a batch can lend one of itself. */
struct txn {
    tv_store *s;
    MDB_txn *mdb;
};

struct tv_read {
    struct txn t;
    struct arena arena;
};

struct page_run {
    uint64_t page, n;
};
struct space {             /* owned: space_free */
    uint64_t end;          /* pages of the file in use */
    uint64_t later;        /* free, but a reader still sees them */
    uint64_t n_free;       /* free and reusable now */
    struct page_run *runs; /* of reusable pages, by page */
    size_t n_runs;
    /* Where looking for a run begins, for sizes of so many bits: those before
     * `at` are shorter than `pages`, since runs only shrink. */
    struct {
        uint64_t pages;
        size_t at;
    } seek[64];
};

struct tv_batch {
    struct txn t;
    bool lazy;
    bool failed;       /* a write went wrong: commit refuses */
    bool cleanup;      /* trash is left for after the commit */
    uint64_t n_writes; /* records changed so far */
    uint64_t dirty;
    uint64_t room; /* bytes that may be put; UINT64_MAX without quota */
    uint64_t end_pages, put_pages; /* of the file at the start; put since */
    struct tv_buf puts; /* u64 each: runs put before space was looked at */
    struct space space; /* what is left of it */
    bool space_known;
    uint64_t quota;
    uint64_t bound; /* quota less charges, 0: no quota */
    bool pending;   /* a chunk is reserved and not sealed */
    uint64_t pending_id, pending_bytes;
    size_t pending_chunk;
    unsigned char *pending_value;
};

/* ---- txn.c ----------------------------------------------------------------
 */

/* The value of a key, borrowed until the next write; *found false if absent. */
TV_NODISCARD enum tv_err db_get(const struct txn *t, enum db db,
                                const struct rec_key *k, bool *found,
                                MDB_val *val, struct tv_error *err);
/* The same for an enveloped record: opens and checks it. `what` names it. */
TV_NODISCARD enum tv_err db_get_rec(const struct txn *t, enum db db,
                                    enum rec_type type, const struct rec_key *k,
                                    bool *found, struct rec_body *body,
                                    const char *what, struct tv_error *err);
TV_NODISCARD enum tv_err db_put(tv_batch *b, enum db db,
                                const struct rec_key *k, const void *data,
                                size_t n, struct tv_error *err);
/* Ends the record in `buf` (rec_begin) and puts it; always frees buf. */
TV_NODISCARD enum tv_err db_put_rec(tv_batch *b, enum db db, enum rec_type type,
                                    const struct rec_key *k, struct tv_buf *buf,
                                    struct tv_error *err);
TV_NODISCARD enum tv_err db_del(tv_batch *b, enum db db,
                                const struct rec_key *k, bool *found,
                                struct tv_error *err);
/* Room of n bytes inside the store, to be filled at once. */
TV_NODISCARD enum tv_err db_reserve(tv_batch *b, enum db db,
                                    const struct rec_key *k, size_t n,
                                    void **data, struct tv_error *err);
/* Entries of a sub-database. */
TV_NODISCARD enum tv_err db_count(const struct txn *t, enum db db, uint64_t *n,
                                  struct tv_error *err);

/* A walk over keys that start with `prefix`, in order. Do not write during it
 * unless it is begun again. */
struct walk {
    const struct txn *t;
    enum db db;
    MDB_cursor *cur;
    struct rec_key prefix;
    bool started;
    MDB_val key, val;
};
TV_NODISCARD enum tv_err walk_begin(struct walk *w, const struct txn *t,
                                    enum db db, const struct rec_key *prefix,
                                    struct tv_error *err);
/* *more false at the end. */
TV_NODISCARD enum tv_err walk_next(struct walk *w, bool *more,
                                   struct tv_error *err);
void walk_end(struct walk *w); /* a zeroed walk is fine */

/* Opens and checks the record at a walk. */
TV_NODISCARD enum tv_err walk_rec(const struct walk *w, enum rec_type type,
                                  struct rec_body *body, struct tv_error *err);
/* "record ... is damaged: why". */
enum tv_err rec_damaged(const tv_store *s, const char *what, const char *why,
                        struct tv_error *err);

TV_NODISCARD enum tv_err next_id(tv_batch *b, uint64_t *id,
                                 struct tv_error *err);
/* Refuses writes on a batch that failed or has an unsealed chunk. */
TV_NODISCARD enum tv_err batch_check(tv_batch *b, struct tv_error *err);
/* Marks the batch as failed when rc is an error; returns rc. */
enum tv_err batch_result(tv_batch *b, enum tv_err rc);
/* The same at the end of a public call, when it changed something (`before` is
 * n_writes at its begin): half a change must not be committed. */
enum tv_err batch_end(tv_batch *b, uint64_t before, enum tv_err rc);
/* Commits; returns LMDB's code. */
TV_NODISCARD int txn_commit(tv_store *s, MDB_txn *txn);
/* Starts a transaction of LMDB, following a map that another process has
 * enlarged when nothing is borrowed. */
TV_NODISCARD enum tv_err txn_begin(tv_store *s, unsigned flags, MDB_txn **out,
                                   struct tv_error *err);
/* Printable, shortened name for messages. */
#define SHOW_BYTES 160u
const char *show(const char *name, char *dst);
const char *show_text(struct rec_text name, char *dst);
uint64_t key_get_id(const MDB_val *key, size_t at);

/* ---- write_back.c ---------------------------------------------------------
 */

struct write_back {
    bool running;
    int fd; /* of data.mdb, borrowed */
    pthread_t thread;
    pthread_mutex_t mutex; /* guards done */
    pthread_cond_t end;
    bool done;
};
/* Around a commit of about `bytes`: lets the disk begin while LMDB writes.
 * Never fails; the commit alone says what is durable. */
void write_back_begin(struct write_back *w, tv_store *s, uint64_t bytes);
void write_back_end(struct write_back *w);

/* ---- pieces.c -------------------------------------------------------------
 *
 * Values of `blob`, `run` and `leaf` are put, read and dropped here.
 */

/* In one row of pages, or in pieces where the file would have to grow. */
TV_NODISCARD enum tv_err long_put(tv_batch *b, enum db db, enum rec_type type,
                                  const struct rec_key *k, const void *data,
                                  size_t n, struct tv_error *err);
TV_NODISCARD enum tv_err long_del(tv_batch *b, enum db db,
                                  const struct rec_key *k,
                                  struct tv_error *err);
/* As db_get_rec; the body is borrowed from the map, or lies in the arena. */
TV_NODISCARD enum tv_err long_get(const struct txn *t, enum db db,
                                  enum rec_type type, const struct rec_key *k,
                                  struct arena *a, bool *found,
                                  struct rec_body *body, const char *what,
                                  struct tv_error *err);
/* The same of a value that is at hand. */
TV_NODISCARD enum tv_err long_open(const struct txn *t, enum db db,
                                   enum rec_type type, const struct rec_key *k,
                                   const MDB_val *val, struct arena *a,
                                   const char *what, struct rec_body *body,
                                   struct tv_error *err);
/* Is a key of these tables that of a piece? Its first piece_owner() bytes are
 * the key of the value. */
bool piece_key(enum db db, const void *key, size_t n);
size_t piece_owner(size_t key_bytes);
/* Is the value of its owner one of pieces, and not too short for this one? */
bool piece_belongs(const struct rec_key *owner, const MDB_val *head,
                   const void *key, size_t n);
/* Pages of a value in pieces, and their entries in the tree. */
uint64_t long_bytes(uint64_t bytes);

/* ---- store.c --------------------------------------------------------------
 */

/* Closes LMDB's side of a handle, and opens it again. In between, or when that
 * fails, everything but closing the handle gives IO. */
void store_close_data(tv_store *s);
TV_NODISCARD enum tv_err store_open_data(tv_store *s, struct tv_error *err);
/* Tells the SIGBUS registry where the map is now. */
void store_name_map(tv_store *s);

/* ---- session.c ------------------------------------------------------------
 *
 * STORE/open.lock: byte 0 is locked shared by every open handle and exclusively
 * by compact; a byte per session is locked while a handle owns pins or
 * unfinished derived items.
 */

TV_NODISCARD enum tv_err session_open(tv_store *s, struct tv_error *err);
void session_close(tv_store *s);
/* LOCKED when another handle is open anywhere. */
TV_NODISCARD enum tv_err session_exclusive(tv_store *s, struct tv_error *err);
/* Lets others open it again. */
void session_share(tv_store *s);
/* Makes our session visible as alive; false where that cannot be done. */
bool session_hold(tv_store *s);
bool session_alive(const tv_store *s, uint64_t session);

/* ---- compact.c ------------------------------------------------------------
 */

/* Ends a compact that was killed, if there was one. */
TV_NODISCARD enum tv_err compact_recover(tv_store *s, struct tv_error *err);
/* Drops a copy that was never finished. The caller has opened open.lock. */
void compact_tidy(const tv_store *s);
/* Makes the data file of an open handle smaller by `bytes`, dropping derived
 * data where its free pages do not do; *done false when that is not possible
 * now (somebody reads, no room for the copy, more than live_max to copy). */
TV_NODISCARD enum tv_err store_shrink(tv_store *s, uint64_t bytes,
                                      uint64_t live_max, bool *done,
                                      struct tv_error *err);

/* ---- quota.c --------------------------------------------------------------
 */

TV_NODISCARD enum tv_err quota_read(const struct txn *t, uint64_t *bytes,
                                    struct tv_error *err);
/* Bytes of data.mdb in use by the last commit, and of pages to be reused. */
TV_NODISCARD enum tv_err space_read(tv_store *s, MDB_txn *reader,
                                    uint64_t *end_bytes, uint64_t *free_bytes,
                                    struct tv_error *err);
/* The quota less what is charged to it; 0 without one. */
TV_NODISCARD enum tv_err quota_bound(const struct txn *t, uint64_t *quota,
                                     uint64_t *bound, struct tv_error *err);
/* all: pages that a reader still sees count as reusable. */
TV_NODISCARD enum tv_err space_runs(tv_store *s, MDB_txn *reader, bool all,
                                    struct space *out, struct tv_error *err);
void space_free(struct space *sp);
/* Pages by which the file grows when values of pages[n] are put in order, and
 * n_single pages of the tree. Uses the runs up. */
uint64_t space_growth(struct space *sp, const uint64_t *pages, size_t n,
                      uint64_t n_single);
/* Most pages that the file may have for the sake of derived data; UINT64_MAX
 * without quota. Less than what user data may have: removal needs room, and so
 * do the records of the next run with an output as large. */
uint64_t quota_pages(const tv_batch *b);
uint64_t quota_limit(uint64_t quota, uint64_t bound, size_t page_bytes);
/* The largest data.mdb that a quota allows; UINT64_MAX without one. */
uint64_t quota_file_max(uint64_t quota, size_t page_bytes);
/* Sets the map so that LMDB itself cannot pass the quota. */
TV_NODISCARD enum tv_err quota_apply(tv_store *s, uint64_t quota,
                                     struct tv_error *err);
TV_NODISCARD enum tv_err quota_room(tv_batch *b, struct tv_error *err);
/* Makes the chunks of a payload small enough for the runs of free pages, where
 * the quota does not let the file grow. */
TV_NODISCARD enum tv_err quota_chunks(tv_batch *b, struct rec_payload *r,
                                      struct tv_error *err);
/* Would the file pass the quota if it grew by a row of pages for so long a
 * value? */
bool quota_full(const tv_batch *b, uint64_t bytes);
/* A value of `bytes` was put: its pages are gone. */
void quota_put(tv_batch *b, uint64_t bytes);
/* Pages that the use of runs shorter than a chunk loses: a header in each. */
uint64_t space_loss(const struct space *sp);
/* NOSPACE when `bytes` more do not fit. */
TV_NODISCARD enum tv_err quota_check(tv_batch *b, uint64_t bytes,
                                     struct tv_error *err);

/* ---- object.c -------------------------------------------------------------
 */

TV_NODISCARD enum tv_err object_id_get(const struct txn *t, uint64_t id,
                                       bool *found, struct rec_object_id *r,
                                       char name[TV_OBJECT_NAME_MAX + 1],
                                       struct tv_error *err);
TV_NODISCARD enum tv_err object_id_put(tv_batch *b, uint64_t id,
                                       const struct rec_object_id *r,
                                       struct tv_error *err);
/* Finds an unfinished object that may be written to. */
TV_NODISCARD enum tv_err object_writable(tv_batch *b, uint64_t id,
                                         struct rec_object_id *r,
                                         char name[TV_OBJECT_NAME_MAX + 1],
                                         struct tv_error *err);

/* ---- payload.c ------------------------------------------------------------
 */

TV_NODISCARD enum tv_err payload_get(const struct txn *t, uint64_t id,
                                     bool *found, struct rec_payload *r,
                                     struct tv_error *err);
TV_NODISCARD enum tv_err payload_put(tv_batch *b, uint64_t id,
                                     const struct rec_payload *r,
                                     struct tv_error *err);
/* Reads a payload's leaves and checks them against its checksum. */
TV_NODISCARD enum tv_err payload_leaves(const struct txn *t, uint64_t id,
                                        const struct rec_payload *r,
                                        struct arena *a,
                                        const struct tv_hash **leaves,
                                        struct tv_error *err);
/* View of a payload's chunks; `align` copies what is not 64-byte aligned. */
TV_NODISCARD enum tv_err payload_view(const struct txn *t, uint64_t id,
                                      const struct rec_payload *r, bool align,
                                      struct arena *a, struct tv_view *out,
                                      struct tv_error *err);
/* One more and one less user; the last one dooms it. */
TV_NODISCARD enum tv_err payload_ref(tv_batch *b, uint64_t id,
                                     const struct tv_tensor_desc *d,
                                     struct rec_payload *r,
                                     struct tv_error *err);
TV_NODISCARD enum tv_err payload_unref(tv_batch *b, uint64_t id,
                                       struct tv_error *err);
/* tv_chunk_seal for who has hashed the chunk already. */
TV_NODISCARD enum tv_err chunk_seal(tv_batch *b, const struct tv_payload *p,
                                    size_t chunk, uint64_t hash,
                                    struct tv_error *err);
TV_NODISCARD enum tv_err payload_doom(tv_batch *b, uint64_t id,
                                      struct rec_payload *r,
                                      struct tv_error *err);

/* ---- trash.c --------------------------------------------------------------
 */

#define TRASH_CHUNKS  256u /* chunks dropped per batch */
#define TRASH_TENSORS 4096u

TV_NODISCARD enum tv_err trash_put(tv_batch *b, char what, uint64_t id,
                                   uint64_t session, struct tv_error *err);
/* Pages of payloads on the list: who writes next drops them. */
TV_NODISCARD enum tv_err trash_pages(const struct txn *t, uint64_t *pages,
                                     struct tv_error *err);
/* Drops one batch's worth. `all`: also unfinished payloads of this handle. */
TV_NODISCARD enum tv_err trash_step(tv_batch *b, bool all, bool *more,
                                    struct tv_error *err);

/* ---- catalog.c ------------------------------------------------------------
 */

/* Removes an entry's hold on its payload (not the entry). */
TV_NODISCARD enum tv_err tensor_release(tv_batch *b, const struct tv_tensor *t,
                                        struct tv_error *err);

/* ---- source_file.c
 * -------------------------------------------------------------
 */

TV_NODISCARD enum tv_err source_get(const struct txn *t, uint64_t id,
                                    bool *found, struct rec_source *r,
                                    struct tv_error *err);
TV_NODISCARD enum tv_err source_view(tv_read *r, const struct tv_tensor *t,
                                     struct tv_view *out, struct tv_error *err);
void source_close_all(tv_store *s);

/* ---- derived.c ------------------------------------------------------------
 */

typedef void (*derived_problem)(void *arg, const char *tensor,
                                const char *what);
/* Every record and byte of derived data. */
TV_NODISCARD enum tv_err derived_verify(const struct txn *t,
                                        derived_problem problem, void *arg,
                                        struct tv_error *err);
/* Drops what killed writers have left. */
TV_NODISCARD enum tv_err derived_gc(tv_batch *b, struct tv_error *err);
TV_NODISCARD enum tv_err derived_stat(const struct txn *t,
                                      struct tv_store_stat *out,
                                      struct tv_error *err);
/* Drops items until the free pages of the file are `bytes`, if it can. */
TV_NODISCARD enum tv_err derived_free(tv_store *s, uint64_t bytes,
                                      struct tv_error *err);
/* Pins that count as long as a session lives: '@' and 16 hex digits. */
#define PIN_HEAD 17u
void derived_pin_name(uint64_t session, char name[PIN_HEAD + 1]);
bool session_named(const char *name, size_t n, uint64_t *session);
/* The session of such a pin; false for that of a run. */
bool derived_pin_session(const MDB_val *key, uint64_t *session);

/* ---- journal.c ------------------------------------------------------------
 */

/* A run but `except`, or a living session, that pins an object; false when none
 * does. */
TV_NODISCARD enum tv_err pin_find(const struct txn *t, uint64_t object_id,
                                  const char *except, bool *pinned,
                                  char run[TV_REC_KEY_MAX + 1],
                                  struct tv_error *err);

#endif
