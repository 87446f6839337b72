/* SPDX-License-Identifier: Apache-2.0 */
/*
 * record.h - what the bytes in the store's sub-databases mean.
 *
 * Every value but a chunk begins with the same 16 bytes:
 *
 *     0 type u8 | 1 version u8 | 2 zero u16 | 4 body bytes u32
 *     8 XXH3-64 of the body, seeded by XXH3-64 of the key and the first 8 bytes
 *    16 body
 *
 * so that a flipped bit in key or value, or a value filed under a wrong key, is
 * noticed before it is used. Encoders append to a tv_buf; decoders check
 * everything, point into the value (borrowed) and never read past it.
 *
 * Keys are big-endian so that cursors walk in order:
 *
 *     meta      name
 *     object    name | name 0 'p' while unfinished
 *     object_id object id u64
 *     tensor    object id u64, sortable prefix of the name, XXH3-64 of the name
 *     payload   payload id u64            leaf     payload id u64
 *     content   checksum [16], payload id u64
 *     chunk     payload id u64, number u32
 *     blob      digest [16]               source   source id u64
 *     trash     'o' object id | 'p' payload id
 *     run       run name                  pin      run name 0, object id u64
 *     done      run name 0, sortable prefix of the tensor's name, its XXH3-64
 *     mask      score [16], prefix and XXH3-64 of the tensor's name: the item;
 *               the same and chunk number u32: its chunks      delta  the same
 *     group     group id u64              use      last use u64
 *     charge    XXH3-128 of a path [16]
 *
 * A value of blob, run or leaf may lie in pieces: pieces.c.
 */
#ifndef TV_RECORD_H
#define TV_RECORD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "tv/dtype.h"
#include "tv/error.h"
#include "tv/hash.h"
#include "tv/store.h"
#include "tv/text.h"

#define TV_REC_HEAD      16u
#define TV_REC_KEY_MAX   511u /* LMDB's limit */
#define TV_REC_BODY_MAX  (1u << 30)
#define TV_CHUNK_MAGIC   0x6b635674u /* "tVck" */
#define TV_CHUNK_VERSION 1u
#define TV_CHUNK_PAYLOAD 1u /* kind of a chunk: tensor bytes */
#define TV_CHUNK_MASK    2u /* mask.h; flags say in which form */
#define TV_CHUNK_DELTA   3u /* kept values of a task vector: derived.c */
#define TV_CHUNK_STAT    4u /* sums of a layer's inputs: derived.c */

enum rec_type {
    REC_STORE = 1,
    REC_NUMBER = 2, /* quota, counters */
    REC_OBJECT = 3,
    REC_OBJECT_ID = 4,
    REC_TENSOR = 5,
    REC_PAYLOAD = 6,
    REC_LEAVES = 7,
    REC_CONTENT = 8,
    REC_BLOB = 9,
    REC_SOURCE = 10,
    REC_TRASH = 11,
    REC_RUN = 12,
    REC_DONE = 13,
    REC_PIN = 14,
    REC_DERIVED = 15,
    REC_GROUP = 16,
    REC_USE = 17,
    REC_CHARGE = 18,
    REC_PIECES = 19,
    REC_PIECE = 20
};

struct rec_key {
    size_t n;
    unsigned char b[TV_REC_KEY_MAX + 1];
};

void key_str(struct rec_key *k, const char *s);
void key_object(struct rec_key *k, const char *name, bool partial);
void key_id(struct rec_key *k, uint64_t id);
void key_tensor(struct rec_key *k, uint64_t object_id, const char *name);
void key_chunk(struct rec_key *k, uint64_t payload_id, uint32_t chunk);
void key_content(struct rec_key *k, struct tv_hash sum, uint64_t payload_id);
void key_digest(struct rec_key *k, struct tv_hash digest);
void key_trash(struct rec_key *k, char what, uint64_t id);
void key_run_prefix(struct rec_key *k, const char *run);
void key_pin(struct rec_key *k, const char *run, uint64_t object_id);
void key_done(struct rec_key *k, const char *run, const char *tensor);
/* Of a derived item; with the number of one of its chunks appended. */
void key_derived(struct rec_key *k, struct tv_hash score, const char *tensor);
void key_derived_chunk(struct rec_key *k, const struct rec_key *item,
                       uint32_t chunk);

/* The checked body of a value: NULL and a reason when it is damaged. */
struct rec_body {
    const unsigned char *p;
    size_t n;
};
bool rec_open(enum rec_type type, const void *key, size_t key_bytes,
              const void *val, size_t val_bytes, struct rec_body *out,
              const char **why);
/* Begins a value in `b` (16 bytes reserved), ends it (fills them in). */
void rec_begin(struct tv_buf *b);
void rec_end(struct tv_buf *b, enum rec_type type, const struct rec_key *key);

enum rec_state { REC_PARTIAL = 1, REC_COMPLETE = 2, REC_DOOMED = 3 };

struct rec_store {
    uint32_t format;
    uint32_t page_bytes;
    unsigned char uuid[16];
    uint64_t created_ns;
};
void rec_store_put(struct tv_buf *b, const struct rec_store *r);
bool rec_store_get(struct rec_body body, struct rec_store *r, const char **why);

void rec_number_put(struct tv_buf *b, uint64_t v);
bool rec_number_get(struct rec_body body, uint64_t *v, const char **why);

/* Strings of decoded records are not NUL-terminated. */
struct rec_text {
    const char *s;
    size_t n;
};

struct rec_object {
    uint64_t id;
    uint8_t kind, state;
    struct tv_hash fingerprint;
    struct rec_text architecture, source_path;
    uint32_t n_files;
    const unsigned char *files; /* n_files entries, see rec_file_next */
    size_t files_bytes;
};
struct rec_file {
    struct tv_hash digest;
    uint64_t bytes;
    struct rec_text name;
};
void rec_object_put(struct tv_buf *b, const struct rec_object *r);
void rec_file_put(struct tv_buf *b, const struct rec_file *f);
bool rec_object_get(struct rec_body body, struct rec_object *r,
                    const char **why);
/* Walks files of a decoded (hence checked) object; false at the end. */
bool rec_file_next(struct rec_body *files, struct rec_file *f);

struct rec_object_id { /* what changes with every tensor */
    uint8_t state;
    uint64_t n_tensors, n_linked, bytes;
    struct rec_text name;
};
void rec_object_id_put(struct tv_buf *b, const struct rec_object_id *r);
bool rec_object_id_get(struct rec_body body, struct rec_object_id *r,
                       const char **why);

struct rec_tensor {
    struct tv_tensor t; /* t.name is NULL: see name */
    struct rec_text name;
};
void rec_tensor_put(struct tv_buf *b, const struct rec_tensor *r);
bool rec_tensor_get(struct rec_body body, struct rec_tensor *r,
                    const char **why);

struct rec_payload {
    enum tv_dtype dtype;
    uint8_t state; /* PARTIAL while chunks are written */
    unsigned rank;
    uint64_t shape[TV_RANK_MAX];
    uint64_t n_elems, bytes, chunk_bytes, n_chunks, refs;
    struct tv_hash checksum;
};
void rec_payload_put(struct tv_buf *b, const struct rec_payload *r);
bool rec_payload_get(struct rec_body body, struct rec_payload *r,
                     const char **why);

void rec_leaves_put(struct tv_buf *b, const struct tv_hash *leaves, size_t n);

struct rec_source {
    uint64_t bytes, mtime_ns, inode, header_bytes;
    struct tv_hash header_digest;
    struct rec_text path;
};
void rec_source_put(struct tv_buf *b, const struct rec_source *r);
bool rec_source_get(struct rec_body body, struct rec_source *r,
                    const char **why);

struct rec_done {
    uint64_t shard, offset, bytes, n_nonfinite_in, n_nonfinite_out;
    struct tv_hash checksum;
    struct rec_text name;
};
void rec_done_put(struct tv_buf *b, const struct rec_done *r);
bool rec_done_get(struct rec_body body, struct rec_done *r, const char **why);

struct rec_derived {     /* a mask, a task vector or a statistic */
    uint8_t state;       /* PARTIAL while its chunks are written */
    enum tv_dtype dtype; /* of values; NONE for masks */
    bool has_sums;
    uint64_t id, group, session;
    uint64_t n_elems, n_set, bytes, chunk_elems;
    uint64_t created, used; /* ticks */
    uint64_t n_nonfinite;   /* of a statistic: rows summed over */
    double sum_all, sum_kept;
    struct rec_text name;
};
void rec_derived_put(struct tv_buf *b, const struct rec_derived *r);
bool rec_derived_get(struct rec_body body, struct rec_derived *r,
                     const char **why);

struct rec_group { /* what a set of items was made from, as JSON */
    uint64_t n_items;
    struct rec_text about;
};
void rec_group_put(struct tv_buf *b, const struct rec_group *r);
bool rec_group_get(struct rec_body body, struct rec_group *r, const char **why);

struct rec_use { /* the item that was used at a tick */
    uint8_t kind;
    struct rec_key item;
};
void rec_use_put(struct tv_buf *b, const struct rec_use *r);
bool rec_use_get(struct rec_body body, struct rec_use *r, const char **why);

struct rec_charge { /* bytes outside that count against the quota */
    uint64_t bytes;
    struct rec_text path;
};
void rec_charge_put(struct tv_buf *b, const struct rec_charge *r);
bool rec_charge_get(struct rec_body body, struct rec_charge *r,
                    const char **why);

struct rec_pieces { /* a value that is cut, of a type of its own */
    uint8_t type;
    uint32_t piece_bytes;
    uint64_t bytes;
};
void rec_pieces_put(struct tv_buf *b, const struct rec_pieces *r);
bool rec_pieces_get(struct rec_body body, struct rec_pieces *r,
                    const char **why);

/* ---- chunks ---------------------------------------------------------------
 */

struct rec_chunk {
    enum tv_dtype dtype;
    uint32_t number;
    uint64_t bytes, n_elems;
    uint64_t payload_hash;
};
/* Fills the 48 bytes at dst. */
void rec_chunk_put(void *dst, const struct rec_chunk *c);
bool rec_chunk_get(const void *val, size_t val_bytes, struct rec_chunk *c,
                   const char **why);
/* The same for chunks of derived data, which have a kind and flags; their dtype
 * is NONE for masks. */
struct rec_part {
    uint8_t kind;
    uint32_t flags;
    struct rec_chunk c;
};
void rec_part_put(void *dst, const struct rec_part *p);
bool rec_part_get(const void *val, size_t val_bytes, struct rec_part *p,
                  const char **why);
/* Size of the value that holds `bytes` of payload: at least half a page, so
 * that LMDB puts it on overflow pages and the payload is 64-byte aligned. */
uint64_t rec_chunk_value_bytes(uint64_t bytes, size_t page_bytes);

/* Geometry of a new payload: bytes per chunk for a shape. */
TV_NODISCARD enum tv_err rec_geometry(const struct tv_tensor_desc *d,
                                      uint64_t chunk_bytes_max,
                                      struct rec_payload *out,
                                      struct tv_error *err);
/* Smaller chunks for one: whole elements, wherever rows end. */
void rec_geometry_cut(struct rec_payload *r, uint64_t chunk_bytes_max);

#endif
