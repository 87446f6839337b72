/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tv/store.h - the LMDB-backed store: objects, tensors, payloads, side files,
 * links, and the journal of merges.
 *
 * Names
 *   object   a model, an adapter or a merge, under a name [A-Za-z0-9._-]{1,128}
 *   tensor   an entry of an object; its bytes are a payload or a linked extent
 *   payload  content of one or many tensors, in chunks; shared by content
 *            (dtype, shape, checksum, then bytes compared) and counted
 *   source   a read-only file that linked tensors point into
 *   blob     a side file (config.json, tokenizer.json), byte for byte
 *   run      journal of one merge: its state and its finished tensors
 *
 * Handles and lifetime
 *   tv_store   one per process and directory (an LMDB rule; a second opening is
 *              LOCKED); any thread. A forked child cannot use it, nor views of
 *              it, but may open the store itself.
 *   tv_read    a snapshot. Everything obtained through it is borrowed until
 *              tv_read_renew or tv_read_end. One thread at a time calls its
 *              functions; the bytes of its views may be read by any thread.
 *   tv_batch   a write transaction; one at a time, used by the thread that
 *              began it. commit and abort both consume it.
 *   Long work renews its read between tensors, else freed pages cannot be
 *   reused; pins keep what it still needs.
 *
 * Durability: a committed batch survives kill -9 and power loss. Batches of an
 * import may be `lazy` (no meta sync); tv_store_sync makes them durable, and
 * the object becomes visible only after that.
 *
 * Errors: NOTFOUND (no such store/object), LOCKED, NOSPACE (disk, quota, map),
 * CORRUPT (checksum, bad record: the message names tensor and store; a linked
 * file that is gone or not what was registered: the message names the file),
 * IO, NOMEM.
 */
#ifndef TV_STORE_H
#define TV_STORE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/dtype.h"
#include "tv/error.h"
#include "tv/hash.h"
#include "tv/lock.h"
#include "tv/sys.h"
#include "tv/view.h"

#define TV_STORE_FORMAT    2u /* newer is refused */
#define TV_OBJECT_NAME_MAX 128u
#define TV_CHUNK_BYTES     (16u << 20) /* nominal chunk payload */
#define TV_CHUNK_HEADER    48u

typedef struct tv_store tv_store;
typedef struct tv_read tv_read;
typedef struct tv_batch tv_batch;

enum tv_kind { TV_KIND_MODEL = 1, TV_KIND_ADAPTER = 2, TV_KIND_MERGE = 3 };
const char *tv_kind_name(enum tv_kind kind); /* "model", "adapter", "merge" */

/* ---- store ----------------------------------------------------------------
 */

struct tv_store_options {
    bool read_only; /* never writes; works on read-only media */
    bool check_all; /* of LMDB's pages, also what only writers look at: takes
                     * longer where there are many long values */
    uint64_t map_bytes;       /* 0: 1 TiB, less under an address-space limit */
    uint64_t dirty_bytes_max; /* dirty bytes per batch; 0: 64 MiB */
    struct tv_wait wait;      /* told when a lock of the store is not free */
};

/* Creates an empty store in a new or empty directory. EXISTS when path holds a
 * store or other files. quota_bytes 0: none. */
TV_NODISCARD enum tv_err tv_store_create(const char *path, uint64_t quota_bytes,
                                         struct tv_error *err);
/* opt may be NULL. Falls back to read-only, lock-free opening on read-only
 * media. CORRUPT when LMDB's trees are not sound: it would not survive them. */
TV_NODISCARD enum tv_err tv_store_open(const char *path,
                                       const struct tv_store_options *opt,
                                       struct tv_error *err, tv_store **out);
void tv_store_close(tv_store *s);
const char *tv_store_path(const tv_store *s);
uint64_t tv_store_dirty_max(const tv_store *s);
bool tv_store_is_read_only(const tv_store *s); /* asked for, or the media is */

/* The writer lock of long work (import, run, rm, ...): between processes, on
 * top of LMDB's own short one. Waits up to timeout_ms, then LOCKED naming the
 * holder. Not reentrant. */
TV_NODISCARD enum tv_err tv_store_lock(tv_store *s, const char *purpose,
                                       unsigned timeout_ms,
                                       struct tv_error *err);
/* Whether another handle holds it, and who says to; takes nothing and works on
 * a handle that is read-only. Filled: dst, "" when nobody does. */
bool tv_store_lock_holder(const tv_store *s, char *dst, size_t cap);
/* LOCKED, naming the holder, while another handle holds it. */
TV_NODISCARD enum tv_err tv_store_lock_check(const tv_store *s,
                                             struct tv_error *err);
void tv_store_unlock(tv_store *s);
/* Makes lazy batches durable. */
TV_NODISCARD enum tv_err tv_store_sync(tv_store *s, struct tv_error *err);

TV_NODISCARD enum tv_err tv_store_quota_get(tv_store *s, uint64_t *bytes,
                                            struct tv_error *err);
TV_NODISCARD enum tv_err tv_store_quota_set(tv_store *s, uint64_t bytes,
                                            struct tv_error *err);

struct tv_compact {
    uint64_t before_bytes, after_bytes; /* of the store directory */
};
/* Gives free pages back to the file system, by a copy in the store directory or
 * in `scratch` (may be NULL). LOCKED when anybody has the store open, this
 * process included; NOSPACE when the copy does not fit quota or disk. Killed
 * anywhere, the next opening of the store puts things right. */
TV_NODISCARD enum tv_err tv_store_compact(const char *path, const char *scratch,
                                          unsigned lock_timeout_ms,
                                          struct tv_compact *out,
                                          struct tv_error *err);

/* Bytes that a directory outside takes from the quota while a run fills it.
 * Kept across kills; a charge whose directory has no .tvmerge any more (the run
 * has finished, or somebody removed it) is dropped by the next call. */
TV_NODISCARD enum tv_err tv_store_charge_set(tv_store *s, const char *dir,
                                             uint64_t bytes,
                                             struct tv_error *err);
/* How many bytes would be missing for that, all that can go being gone. */
TV_NODISCARD enum tv_err tv_store_charge_check(tv_store *s, uint64_t bytes,
                                               uint64_t *missing,
                                               struct tv_error *err);
TV_NODISCARD enum tv_err tv_store_charge_clear(tv_store *s, const char *dir,
                                               struct tv_error *err);
/* The same for nameless scratch files of this handle's work: they count until
 * this is called with 0, or the handle is closed or its process gone. */
TV_NODISCARD enum tv_err tv_store_scratch_set(tv_store *s, uint64_t bytes,
                                              struct tv_error *err);

struct tv_store_stat {
    uint64_t quota_bytes; /* 0: none */
    uint64_t used_bytes;  /* allocated bytes of the store directory */
    uint64_t file_bytes;  /* size of data.mdb */
    uint64_t free_bytes;  /* pages inside data.mdb that can be reused */
    uint64_t weights, adapters, masks, statistics, task_vectors, outputs,
        journal; /* payload bytes by kind */
    uint64_t dedup_saved_bytes;
    uint64_t n_objects, n_readers;
    uint64_t n_masks, n_task_vectors, n_statistics;
    uint64_t charged_bytes; /* output directories of unfinished runs */
};
TV_NODISCARD enum tv_err tv_store_stat(tv_store *s, struct tv_store_stat *out,
                                       struct tv_error *err);

/* Walks all records and checks every checksum. One call of on_problem per
 * damaged thing (object and tensor may be ""); returns CORRUPT when any. A
 * disk that fails under the walk raises SIGBUS: call it in a child process that
 * opens the store, and take such a death for damage. on_problem and progress
 * may be NULL; n_threads 0: all CPUs. */
typedef void (*tv_verify_fn)(void *arg, const char *object, const char *tensor,
                             const char *what);
typedef void (*tv_bytes_fn)(void *arg, uint64_t done, uint64_t total);
TV_NODISCARD enum tv_err tv_store_verify(tv_store *s, unsigned n_threads,
                                         tv_verify_fn on_problem,
                                         tv_bytes_fn progress, void *arg,
                                         struct tv_error *err);
/* Only whether LMDB's trees hold together, for who is about to walk them all
 * and to write: CORRUPT when not. In a child process, like tv_store_verify. */
TV_NODISCARD enum tv_err tv_store_check_trees(tv_store *s,
                                              struct tv_error *err);
/* Drops chunks, payloads and blobs that nothing refers to (left by killed
 * writers). Caller holds the lock. */
TV_NODISCARD enum tv_err tv_store_gc(tv_store *s, uint64_t *freed_bytes,
                                     struct tv_error *err);

/* ---- reading --------------------------------------------------------------
 */

TV_NODISCARD enum tv_err tv_read_begin(tv_store *s, struct tv_error *err,
                                       tv_read **out);
TV_NODISCARD enum tv_err tv_read_renew(tv_read *r, struct tv_error *err);
void tv_read_end(tv_read *r);

struct tv_side_file { /* borrowed with the object */
    const char *name; /* file name, no directory part */
    uint64_t bytes;
    struct tv_hash digest;
};

struct tv_object { /* owned: tv_object_free */
    uint64_t id;
    char *name;
    enum tv_kind kind;
    bool complete;
    bool linked;        /* at least one tensor is a linked extent */
    char *architecture; /* "LlamaForCausalLM", "" when unknown */
    char *source_path;  /* where it was imported from, "" for merges */
    struct tv_hash source_fingerprint;
    uint64_t n_tensors, bytes; /* of tensors present, payload bytes */
    struct tv_side_file *files;
    size_t n_files;
};
void tv_object_free(struct tv_object *o); /* NULL allowed; frees o itself */

/* Complete objects only, unless `partial`. NOTFOUND names near misses. */
TV_NODISCARD enum tv_err tv_object_find(tv_read *r, const char *name,
                                        bool partial, struct tv_error *err,
                                        struct tv_object **out);
/* All objects in name order, owned array of owned entries. */
TV_NODISCARD enum tv_err tv_object_list(tv_read *r, bool partial,
                                        struct tv_error *err,
                                        struct tv_object ***out, size_t *n);

enum tv_storage { TV_INLINE = 1, TV_LINKED = 2 };

struct tv_tensor { /* strings borrowed from the array's owner */
    const char *name;
    enum tv_dtype dtype;
    unsigned rank;
    uint64_t shape[TV_RANK_MAX];
    uint64_t n_elems, bytes;
    enum tv_storage storage;
    bool checksum_known;
    struct tv_hash checksum;
    uint64_t payload_id; /* inline */
    uint64_t source_id;  /* linked */
    uint64_t offset;     /* linked: byte offset in the source file */
};

struct tv_tensor_list {      /* owned: tv_tensor_list_free */
    struct tv_tensor *items; /* in layer order (tv_name_compare) */
    size_t n;
    void *storage;
};
TV_NODISCARD enum tv_err tv_tensor_list(tv_read *r, uint64_t object_id,
                                        struct tv_error *err,
                                        struct tv_tensor_list **out);
void tv_tensor_list_free(struct tv_tensor_list *l);
/* One tensor by name; *found false when absent. name in *out is `name`. */
TV_NODISCARD enum tv_err tv_tensor_get(tv_read *r, uint64_t object_id,
                                       const char *name, bool *found,
                                       struct tv_tensor *out,
                                       struct tv_error *err);
/* A view of the tensor's bytes; linked tensors map their source (checked on
 * each call; changed, truncated or gone: CORRUPT). Chunk headers are checked
 * here, leaves by whoever reads them. The view's arrays are owned by r (freed
 * at renew/end). */
TV_NODISCARD enum tv_err tv_tensor_view(tv_read *r, const struct tv_tensor *t,
                                        struct tv_error *err,
                                        struct tv_view *out);
/* Linked: path of the source file, borrowed until the store closes. */
TV_NODISCARD enum tv_err tv_source_path(tv_read *r, uint64_t source_id,
                                        struct tv_error *err,
                                        const char **path);
/* Is the file at `path` one that tensors of the store are linked from, under
 * this or another name? A path with nothing there is not. */
TV_NODISCARD enum tv_err tv_source_is_used(tv_read *r, const char *path,
                                           bool *used, struct tv_error *err);
/* Bytes of a side file by digest, borrowed until renew/end; checked. */
TV_NODISCARD enum tv_err tv_blob_get(tv_read *r, struct tv_hash digest,
                                     const void **data, size_t *n,
                                     struct tv_error *err);
/* Digest of a complete object (tv/hash.h); computes missing checksums of
 * linked tensors by reading them. */
TV_NODISCARD enum tv_err tv_object_digest(tv_read *r, uint64_t object_id,
                                          struct tv_hash *out,
                                          struct tv_error *err);

/* ---- writing --------------------------------------------------------------
 */

/* lazy: commit without meta sync (bulk work that publishes at its end). */
TV_NODISCARD enum tv_err tv_batch_begin(tv_store *s, bool lazy,
                                        struct tv_error *err, tv_batch **out);
TV_NODISCARD enum tv_err tv_batch_commit(tv_batch *b, struct tv_error *err);
void tv_batch_abort(tv_batch *b); /* NULL allowed */
/* Payload bytes put since begin; commit before it passes tv_store_dirty_max. */
uint64_t tv_batch_dirty(const tv_batch *b);

/* Creates an invisible object. EXISTS when the name is taken by a complete
 * one; an unfinished one with the same fingerprint is continued (*resumed). */
TV_NODISCARD enum tv_err
tv_object_create(tv_batch *b, const char *name, enum tv_kind kind,
                 const char *architecture, const char *source_path,
                 struct tv_hash source_fingerprint, uint64_t *object_id,
                 bool *resumed, struct tv_error *err);
/* The same for --force: a complete object of that name stays visible until
 * tv_object_complete(.., replace = true) swaps them. LOCKED when it is pinned.
 */
TV_NODISCARD enum tv_err
tv_object_create_over(tv_batch *b, const char *name, enum tv_kind kind,
                      const char *architecture, const char *source_path,
                      struct tv_hash source_fingerprint, uint64_t *object_id,
                      bool *resumed, struct tv_error *err);
/* Makes it visible; with `replace`, drops a complete object of that name in the
 * same transaction. */
TV_NODISCARD enum tv_err tv_object_complete(tv_batch *b, uint64_t object_id,
                                            bool replace, struct tv_error *err);
/* Removes an object, complete or not, and an unfinished replacement of it;
 * LOCKED when a run pins it. It is gone for readers with the first commit.
 * Payloads go when their last user goes. Large objects: repeat while *more. */
TV_NODISCARD enum tv_err tv_object_remove(tv_batch *b, const char *name,
                                          bool *more, struct tv_error *err);
/* The same for an unfinished object alone; a complete one of that name stays.
 */
TV_NODISCARD enum tv_err tv_object_drop_partial(tv_batch *b, const char *name,
                                                bool *more,
                                                struct tv_error *err);
TV_NODISCARD enum tv_err tv_object_file_put(tv_batch *b, uint64_t object_id,
                                            const char *name, const void *data,
                                            size_t n, struct tv_error *err);

struct tv_tensor_desc {
    const char *name;
    enum tv_dtype dtype;
    unsigned rank;
    const uint64_t *shape;
};

/* A payload in the making. Chunks are written in order 0, 1, ...: reserve gives
 * memory to fill (any alignment; other threads may fill it) before the next
 * call on the batch; seal computes its header. A payload may span batches; an
 * unfinished one of a killed run is dropped by tv_run_recover/gc. */
struct tv_payload {
    uint64_t id;
    enum tv_dtype dtype;
    unsigned rank;
    uint64_t shape[TV_RANK_MAX];
    uint64_t n_elems, bytes, chunk_bytes;
    size_t n_chunks;
};
/* chunk_bytes_max 0: TV_CHUNK_BYTES; chunks hold whole rows where a row fits,
 * but for those that a quota makes smaller to find room in (quota_chunks).
 */
TV_NODISCARD enum tv_err tv_payload_begin(tv_batch *b,
                                          const struct tv_tensor_desc *d,
                                          uint64_t chunk_bytes_max,
                                          struct tv_payload *out,
                                          struct tv_error *err);
TV_NODISCARD enum tv_err tv_chunk_reserve(tv_batch *b,
                                          const struct tv_payload *p,
                                          size_t chunk, void **data, size_t *n,
                                          struct tv_error *err);
TV_NODISCARD enum tv_err tv_chunk_seal(tv_batch *b, const struct tv_payload *p,
                                       size_t chunk, struct tv_error *err);
/* Ends it. When equal content is already stored (found by checksum, compared
 * byte by byte) the new chunks are dropped and *id is the old payload's. */
TV_NODISCARD enum tv_err tv_payload_finish(tv_batch *b,
                                           const struct tv_payload *p,
                                           const struct tv_hash *leaves,
                                           uint64_t *id, struct tv_error *err);
/* Is content with this checksum stored? Compares bytes with `same`. */
TV_NODISCARD enum tv_err
tv_payload_lookup(tv_batch *b, const struct tv_tensor_desc *d,
                  struct tv_hash checksum, const struct tv_view *same,
                  bool *found, uint64_t *id, struct tv_error *err);
/* Adds an entry that uses the payload (its count rises). */
TV_NODISCARD enum tv_err tv_tensor_put(tv_batch *b, uint64_t object_id,
                                       const struct tv_tensor_desc *d,
                                       uint64_t payload_id,
                                       struct tv_error *err);

struct tv_source_desc { /* what must still be true when it is read */
    const char *path;   /* absolute */
    uint64_t bytes, mtime_ns, inode;
    struct tv_hash header_digest; /* XXH3-128 of the first header_bytes */
    uint64_t header_bytes;        /* 8 + header length */
};
/* Describes a mapped file as it is now; out->path is `path` (borrowed).
 * header_bytes must not exceed the file. */
void tv_source_describe(const tv_map *map, const char *path,
                        uint64_t header_bytes, struct tv_source_desc *out);
TV_NODISCARD enum tv_err tv_source_put(tv_batch *b,
                                       const struct tv_source_desc *d,
                                       uint64_t *source_id,
                                       struct tv_error *err);
TV_NODISCARD enum tv_err tv_tensor_link(tv_batch *b, uint64_t object_id,
                                        const struct tv_tensor_desc *d,
                                        uint64_t source_id, uint64_t offset,
                                        struct tv_error *err);
/* Fills in the checksum of a linked tensor after a complete read. */
TV_NODISCARD enum tv_err tv_tensor_checksum_put(tv_batch *b, uint64_t object_id,
                                                const char *name,
                                                struct tv_hash checksum,
                                                struct tv_error *err);

/* Copies one tensor of a view into the object: hashes, shares or writes, in as
 * many batches as the dirty limit needs (*b is committed and begun again, the
 * reason for the double pointer; after an error *b can only be aborted and may
 * be NULL). `known`: checksums of its leaves when the caller has taken them, or
 * NULL; they are compared with what is written, like the function's own. */
TV_NODISCARD enum tv_err tv_tensor_copy_in(tv_batch **b, uint64_t object_id,
                                           const struct tv_tensor_desc *d,
                                           const struct tv_view *from,
                                           const struct tv_hash *known,
                                           struct tv_error *err);

/* ---- journal --------------------------------------------------------------
 */
/*
 * One record per run id (a short name, chosen by the caller): `state` is an
 * opaque document (JSON) of merge/. Finished tensors are added in the batch
 * that makes them durable. The journal of `run RECIPE OUT` is a store of its
 * own in OUT/.tvmerge; that of `run --into` lives in the target store.
 */
struct tv_done {      /* one finished tensor */
    const char *name; /* borrowed in lists */
    uint64_t shard;   /* output file number, or payload id for --into */
    uint64_t offset, bytes;
    struct tv_hash checksum;
    uint64_t n_nonfinite_in, n_nonfinite_out;
};
struct tv_done_list {
    struct tv_done *items;
    size_t n;
    void *storage;
};
TV_NODISCARD enum tv_err tv_run_put(tv_batch *b, const char *run,
                                    const void *state, size_t n,
                                    struct tv_error *err);
/* *found false when there is none; state is owned (tv_free). */
TV_NODISCARD enum tv_err tv_run_get(tv_read *r, const char *run, bool *found,
                                    char **state, size_t *n,
                                    struct tv_error *err);
TV_NODISCARD enum tv_err tv_run_drop(tv_batch *b, const char *run,
                                     struct tv_error *err);
/* Names of all runs, owned array of owned strings (tv_dir_list_free). */
TV_NODISCARD enum tv_err tv_run_list(tv_read *r, struct tv_error *err,
                                     char ***names, size_t *n);
TV_NODISCARD enum tv_err tv_done_put(tv_batch *b, const char *run,
                                     const struct tv_done *d,
                                     struct tv_error *err);
TV_NODISCARD enum tv_err tv_done_list(tv_read *r, const char *run,
                                      struct tv_error *err,
                                      struct tv_done_list **out);
void tv_done_list_free(struct tv_done_list *l);
/* Pins an object for a run: rm refuses while the run exists. */
TV_NODISCARD enum tv_err tv_pin_put(tv_batch *b, const char *run,
                                    uint64_t object_id, struct tv_error *err);
/* Pins objects for this handle, of whoever reads without a run: rm and
 * replacement are LOCKED until tv_object_let_go, or until the handle is closed
 * or its process gone. Waits for nobody: *held false where it cannot be done
 * (read-only media, another process at work in the store, no room); then a
 * snapshot may do (tv_input_freeze). NOTFOUND when an object is gone. */
TV_NODISCARD enum tv_err tv_object_hold(tv_store *s, const uint64_t *ids,
                                        size_t n, bool *held,
                                        struct tv_error *err);
void tv_object_let_go(tv_store *s, const uint64_t *ids, size_t n);

#endif
