/* SPDX-License-Identifier: Apache-2.0 */
/*
 * record.c - encoding and checking of everything the store keeps.
 *
 * The wire structs below are the drawing: only byte arrays, little-endian, so
 * that they have no padding on any machine. Decoders trust nothing: even behind
 * a good hash they check lengths, ranges and sums, since the hash is not
 * cryptographic and an old bug may have written the record.
 */
#include "record.h"

#include <stddef.h>
#include <string.h>

#include "xxh.h"

#include "tv/checked.h"

typedef uint8_t w8[1];
typedef uint8_t w16[2];
typedef uint8_t w32[4];
typedef uint8_t w64[8];
typedef uint8_t w128[16];

struct wire_head {
    w8 type, version;
    w16 zero;
    w32 body_bytes;
    w64 hash;
};
_Static_assert(sizeof(struct wire_head) == TV_REC_HEAD, "record head");
_Static_assert(offsetof(struct wire_head, hash) == 8, "record head");

struct wire_store {
    w32 format, page_bytes;
    w128 uuid;
    w64 created_ns;
};
_Static_assert(sizeof(struct wire_store) == 32, "store record");

struct wire_object { /* then architecture, source path, files */
    w64 id;
    w8 kind, state;
    w16 zero;
    w32 n_files;
    w128 fingerprint;
    w32 architecture_bytes, source_bytes;
};
_Static_assert(sizeof(struct wire_object) == 40, "object record");
_Static_assert(offsetof(struct wire_object, fingerprint) == 16,
               "object record");

struct wire_file { /* then the name */
    w128 digest;
    w64 bytes;
    w32 name_bytes;
};
_Static_assert(sizeof(struct wire_file) == 28, "side file entry");

struct wire_object_id { /* then the name */
    w64 n_tensors, n_linked, bytes;
    w8 state, zero;
    w16 name_bytes;
};
_Static_assert(sizeof(struct wire_object_id) == 28, "object id record");

struct wire_tensor { /* then the name */
    w8 dtype, rank, storage, checksum_known;
    w32 name_bytes;
    w64 n_elems, bytes;
    w128 checksum;
    w64 place, offset; /* payload id, or source id and byte offset */
    w64 shape[TV_RANK_MAX];
};
_Static_assert(sizeof(struct wire_tensor) == 120, "tensor record");
_Static_assert(offsetof(struct wire_tensor, shape) == 56, "tensor record");

struct wire_payload {
    w8 dtype, rank, state, zero;
    w32 zero2;
    w64 n_elems, bytes, chunk_bytes, n_chunks, refs;
    w128 checksum;
    w64 shape[TV_RANK_MAX];
};
_Static_assert(sizeof(struct wire_payload) == 128, "payload record");
_Static_assert(offsetof(struct wire_payload, shape) == 64, "payload record");

struct wire_source { /* then the path */
    w64 bytes, mtime_ns, inode, header_bytes;
    w128 header_digest;
    w32 path_bytes;
};
_Static_assert(sizeof(struct wire_source) == 52, "source record");

struct wire_done { /* then the name */
    w64 shard, offset, bytes, n_nonfinite_in, n_nonfinite_out;
    w128 checksum;
    w32 name_bytes;
};
_Static_assert(sizeof(struct wire_done) == 60, "done record");

struct wire_chunk {
    w32 magic;
    w16 version;
    w8 kind, dtype;
    w32 number, flags;
    w64 bytes, n_elems, payload_hash, head_hash;
};
_Static_assert(sizeof(struct wire_chunk) == TV_CHUNK_HEADER, "chunk header");
_Static_assert(offsetof(struct wire_chunk, number) == 8, "chunk header");
_Static_assert(offsetof(struct wire_chunk, bytes) == 16, "chunk header");
_Static_assert(offsetof(struct wire_chunk, payload_hash) == 32, "chunk header");
_Static_assert(offsetof(struct wire_chunk, head_hash) == 40, "chunk header");

struct wire_derived { /* then the name */
    w8 state, dtype, has_sums, zero;
    w32 name_bytes;
    w64 id, group, session, n_elems, n_set, bytes, chunk_elems, created, used,
        n_nonfinite, sum_all, sum_kept;
};
_Static_assert(sizeof(struct wire_derived) == 104, "derived record");
_Static_assert(offsetof(struct wire_derived, id) == 8, "derived record");

struct wire_group { /* then the description */
    w64 n_items;
    w32 about_bytes;
};
_Static_assert(sizeof(struct wire_group) == 12, "group record");

struct wire_use { /* then the item's key */
    w8 kind, zero;
    w16 key_bytes;
};
_Static_assert(sizeof(struct wire_use) == 4, "use record");

struct wire_charge { /* then the path */
    w64 bytes;
    w32 path_bytes;
};
_Static_assert(sizeof(struct wire_charge) == 12, "charge record");

struct wire_pieces {
    w8 type, zero;
    w16 zero2;
    w32 piece_bytes;
    w64 bytes;
};
_Static_assert(sizeof(struct wire_pieces) == 16, "record of pieces");

_Static_assert(TV_DTYPE_COUNT <= 256 && TV_RANK_MAX <= 255, "one byte each");

/* ---- keys -----------------------------------------------------------------
 */

static void key_add(struct rec_key *k, const void *p, size_t n)
{
    if (n > TV_REC_KEY_MAX - k->n)
        n = TV_REC_KEY_MAX - k->n;
    memcpy(k->b + k->n, p, n);
    k->n += n;
}

static void key_u64(struct rec_key *k, uint64_t v)
{
    unsigned char b[8];
    tv_put_be64(b, v);
    key_add(k, b, sizeof b);
}

static bool is_digit(char c)
{
    return c >= '0' && c <= '9';
}

/* Bytewise order of the result is layer order of the names: a run of digits
 * becomes '0', the count of its digits without leading zeros, those digits. The
 * final NUL puts "a" before "a.b". What does not fit is cut off: lists are
 * sorted once more by whoever needs the exact order. */
static void key_name_upto(struct rec_key *k, const char *name, size_t end)
{
    const char *s = name;
    while (*s != '\0' && k->n < end) {
        if (!is_digit(*s)) {
            k->b[k->n++] = (unsigned char)*s++;
            continue;
        }
        while (*s == '0')
            s++;
        size_t run = 0;
        while (is_digit(s[run]))
            run++;
        const unsigned char head[2] = {'0', run < 255 ? (unsigned char)run
                                                      : (unsigned char)255};
        for (size_t i = 0; i < 2 && k->n < end; i++)
            k->b[k->n++] = head[i];
        for (size_t i = 0; i < run && k->n < end; i++)
            k->b[k->n++] = (unsigned char)s[i];
        s += run;
    }
    if (k->n < end)
        k->b[k->n++] = 0;
    key_u64(k, tv_hash64(name, strlen(name)));
}

static void key_name(struct rec_key *k, const char *name)
{
    key_name_upto(k, name, TV_REC_KEY_MAX - 8);
}

void key_str(struct rec_key *k, const char *s)
{
    k->n = 0;
    key_add(k, s, strlen(s));
}

void key_object(struct rec_key *k, const char *name, bool partial)
{
    key_str(k, name);
    if (partial)
        key_add(k, "\0p", 2);
}

void key_id(struct rec_key *k, uint64_t id)
{
    k->n = 0;
    key_u64(k, id);
}

void key_tensor(struct rec_key *k, uint64_t object_id, const char *name)
{
    key_id(k, object_id);
    key_name(k, name);
}

void key_chunk(struct rec_key *k, uint64_t payload_id, uint32_t chunk)
{
    unsigned char b[4];
    key_id(k, payload_id);
    tv_put_be32(b, chunk);
    key_add(k, b, sizeof b);
}

void key_content(struct rec_key *k, struct tv_hash sum, uint64_t payload_id)
{
    k->n = 16;
    tv_hash_put(k->b, sum);
    key_u64(k, payload_id);
}

void key_digest(struct rec_key *k, struct tv_hash digest)
{
    k->n = 16;
    tv_hash_put(k->b, digest);
}

void key_trash(struct rec_key *k, char what, uint64_t id)
{
    k->n = 0;
    key_add(k, &what, 1);
    key_u64(k, id);
}

void key_run_prefix(struct rec_key *k, const char *run)
{
    key_str(k, run);
    key_add(k, "", 1);
}

void key_pin(struct rec_key *k, const char *run, uint64_t object_id)
{
    key_run_prefix(k, run);
    key_u64(k, object_id);
}

void key_done(struct rec_key *k, const char *run, const char *tensor)
{
    key_run_prefix(k, run);
    key_name(k, tensor);
}

void key_derived(struct rec_key *k, struct tv_hash score, const char *tensor)
{
    k->n = 16;
    tv_hash_put(k->b, score);
    key_name_upto(k, tensor, TV_REC_KEY_MAX - 8 - 4);
}

void key_derived_chunk(struct rec_key *k, const struct rec_key *item,
                       uint32_t chunk)
{
    unsigned char b[4];
    *k = *item;
    tv_put_be32(b, chunk);
    key_add(k, b, sizeof b);
}

/* ---- envelope -------------------------------------------------------------
 */

static uint64_t body_hash(const void *key, size_t key_bytes, const void *head8,
                          const void *body, size_t n)
{
    const uint64_t seed =
        XXH3_64bits(key, key_bytes) ^ tv_get_le64(head8) * 0x9e3779b97f4a7c15u;
    return XXH3_64bits_withSeed(body, n, seed);
}

static bool bad(const char **why, const char *reason)
{
    *why = reason;
    return false;
}

bool rec_open(enum rec_type type, const void *key, size_t key_bytes,
              const void *val, size_t val_bytes, struct rec_body *out,
              const char **why)
{
    if (val_bytes < TV_REC_HEAD)
        return bad(why, "record shorter than its head");
    const unsigned char *p = (const unsigned char *)val;
    const size_t n = val_bytes - TV_REC_HEAD;
    if (p[0] != (unsigned char)type)
        return bad(why, "record of another type");
    if (p[1] != 1)
        return bad(why, "record of an unknown version");
    if (p[2] != 0 || p[3] != 0 || tv_get_le32(p + 4) != n)
        return bad(why, "record length does not match its head");
    if (tv_get_le64(p + 8) != body_hash(key, key_bytes, p, p + TV_REC_HEAD, n))
        return bad(why, "record checksum mismatch");
    *out = (struct rec_body){.p = p + TV_REC_HEAD, .n = n};
    return true;
}

void rec_begin(struct tv_buf *b)
{
    static const unsigned char zero[TV_REC_HEAD];
    tv_buf_init(b, TV_REC_BODY_MAX);
    tv_buf_add(b, zero, sizeof zero);
}

void rec_end(struct tv_buf *b, enum rec_type type, const struct rec_key *key)
{
    if (b->failed || b->n_bytes < TV_REC_HEAD)
        return;
    unsigned char *p = (unsigned char *)b->data;
    const size_t n = b->n_bytes - TV_REC_HEAD;
    p[0] = (unsigned char)type;
    p[1] = 1;
    tv_put_le32(p + 4, (uint32_t)n);
    tv_put_le64(p + 8, body_hash(key->b, key->n, p, p + TV_REC_HEAD, n));
}

/* ---- bodies ---------------------------------------------------------------
 */

static bool take(struct rec_body *b, void *dst, size_t n)
{
    if (b->n < n)
        return false;
    memcpy(dst, b->p, n);
    b->p += n;
    b->n -= n;
    return true;
}

static bool take_text(struct rec_body *b, uint64_t n, struct rec_text *out)
{
    if (b->n < n)
        return false;
    *out = (struct rec_text){.s = (const char *)b->p, .n = (size_t)n};
    b->p += n;
    b->n -= (size_t)n;
    return memchr(out->s, '\0', out->n) == NULL;
}

void rec_store_put(struct tv_buf *b, const struct rec_store *r)
{
    struct wire_store w;
    memset(&w, 0, sizeof w);
    tv_put_le32(w.format, r->format);
    tv_put_le32(w.page_bytes, r->page_bytes);
    memcpy(w.uuid, r->uuid, sizeof w.uuid);
    tv_put_le64(w.created_ns, r->created_ns);
    tv_buf_add(b, &w, sizeof w);
}

bool rec_store_get(struct rec_body body, struct rec_store *r, const char **why)
{
    struct wire_store w;
    /* Longer is allowed: a newer format may say more, and must stay readable
     * far enough to be refused by its number. */
    if (!take(&body, &w, sizeof w))
        return bad(why, "wrong size");
    r->format = tv_get_le32(w.format);
    r->page_bytes = tv_get_le32(w.page_bytes);
    memcpy(r->uuid, w.uuid, sizeof w.uuid);
    r->created_ns = tv_get_le64(w.created_ns);
    return true;
}

void rec_number_put(struct tv_buf *b, uint64_t v)
{
    tv_buf_le64(b, v);
}

bool rec_number_get(struct rec_body body, uint64_t *v, const char **why)
{
    if (body.n != 8)
        return bad(why, "wrong size");
    *v = tv_get_le64(body.p);
    return true;
}

void rec_object_put(struct tv_buf *b, const struct rec_object *r)
{
    struct wire_object w;
    memset(&w, 0, sizeof w);
    tv_put_le64(w.id, r->id);
    w.kind[0] = r->kind;
    w.state[0] = r->state;
    tv_put_le32(w.n_files, r->n_files);
    tv_hash_put(w.fingerprint, r->fingerprint);
    tv_put_le32(w.architecture_bytes, (uint32_t)r->architecture.n);
    tv_put_le32(w.source_bytes, (uint32_t)r->source_path.n);
    tv_buf_add(b, &w, sizeof w);
    tv_buf_add(b, r->architecture.s, r->architecture.n);
    tv_buf_add(b, r->source_path.s, r->source_path.n);
    tv_buf_add(b, r->files, r->files_bytes);
}

void rec_file_put(struct tv_buf *b, const struct rec_file *f)
{
    struct wire_file w;
    tv_hash_put(w.digest, f->digest);
    tv_put_le64(w.bytes, f->bytes);
    tv_put_le32(w.name_bytes, (uint32_t)f->name.n);
    tv_buf_add(b, &w, sizeof w);
    tv_buf_add(b, f->name.s, f->name.n);
}

bool rec_file_next(struct rec_body *files, struct rec_file *f)
{
    struct wire_file w;
    if (!take(files, &w, sizeof w))
        return false;
    f->digest = tv_hash_get(w.digest);
    f->bytes = tv_get_le64(w.bytes);
    return take_text(files, tv_get_le32(w.name_bytes), &f->name);
}

bool rec_object_get(struct rec_body body, struct rec_object *r,
                    const char **why)
{
    struct wire_object w;
    if (!take(&body, &w, sizeof w))
        return bad(why, "wrong size");
    r->id = tv_get_le64(w.id);
    r->kind = w.kind[0];
    r->state = w.state[0];
    r->n_files = tv_get_le32(w.n_files);
    r->fingerprint = tv_hash_get(w.fingerprint);
    if (r->kind < TV_KIND_MODEL || r->kind > TV_KIND_MERGE ||
        (r->state != REC_PARTIAL && r->state != REC_COMPLETE))
        return bad(why, "unknown kind or state");
    if (!take_text(&body, tv_get_le32(w.architecture_bytes),
                   &r->architecture) ||
        !take_text(&body, tv_get_le32(w.source_bytes), &r->source_path))
        return bad(why, "text runs past the end");
    r->files = body.p;
    r->files_bytes = body.n;
    struct rec_file f;
    uint32_t n = 0;
    while (rec_file_next(&body, &f)) {
        if (f.name.n == 0 || memchr(f.name.s, '/', f.name.n) != NULL)
            return bad(why, "bad side file name");
        n++;
    }
    if (body.n != 0 || n != r->n_files)
        return bad(why, "side files do not add up");
    return true;
}

void rec_object_id_put(struct tv_buf *b, const struct rec_object_id *r)
{
    struct wire_object_id w;
    memset(&w, 0, sizeof w);
    tv_put_le64(w.n_tensors, r->n_tensors);
    tv_put_le64(w.n_linked, r->n_linked);
    tv_put_le64(w.bytes, r->bytes);
    w.state[0] = r->state;
    tv_put_le16(w.name_bytes, (uint16_t)r->name.n);
    tv_buf_add(b, &w, sizeof w);
    tv_buf_add(b, r->name.s, r->name.n);
}

bool rec_object_id_get(struct rec_body body, struct rec_object_id *r,
                       const char **why)
{
    struct wire_object_id w;
    if (!take(&body, &w, sizeof w))
        return bad(why, "wrong size");
    r->n_tensors = tv_get_le64(w.n_tensors);
    r->n_linked = tv_get_le64(w.n_linked);
    r->bytes = tv_get_le64(w.bytes);
    r->state = w.state[0];
    if (r->state < REC_PARTIAL || r->state > REC_DOOMED)
        return bad(why, "unknown state");
    const uint16_t n = tv_get_le16(w.name_bytes);
    if (n == 0 || n > TV_OBJECT_NAME_MAX || !take_text(&body, n, &r->name) ||
        body.n != 0)
        return bad(why, "bad name");
    return true;
}

/* Checks rank, dims, element and byte counts against each other. */
static bool shape_ok(enum tv_dtype dtype, unsigned rank, const uint64_t *shape,
                     uint64_t n_elems, uint64_t bytes)
{
    uint64_t elems = 0, want = 0;
    return tv_shape_elems(shape, rank, &elems, NULL) == TV_OK &&
           elems == n_elems &&
           tv_dtype_bytes(dtype, elems, &want, NULL) == TV_OK && want == bytes;
}

static bool shape_get(const w64 *wire, unsigned rank, uint64_t *shape)
{
    for (unsigned i = 0; i < TV_RANK_MAX; i++) {
        shape[i] = tv_get_le64(wire[i]);
        if (i >= rank && shape[i] != 0)
            return false;
    }
    return true;
}

void rec_tensor_put(struct tv_buf *b, const struct rec_tensor *r)
{
    const struct tv_tensor *t = &r->t;
    struct wire_tensor w;
    memset(&w, 0, sizeof w);
    w.dtype[0] = (uint8_t)t->dtype;
    w.rank[0] = (uint8_t)t->rank;
    w.storage[0] = (uint8_t)t->storage;
    w.checksum_known[0] = t->checksum_known ? 1 : 0;
    tv_put_le32(w.name_bytes, (uint32_t)r->name.n);
    tv_put_le64(w.n_elems, t->n_elems);
    tv_put_le64(w.bytes, t->bytes);
    tv_hash_put(w.checksum, t->checksum);
    tv_put_le64(w.place,
                t->storage == TV_INLINE ? t->payload_id : t->source_id);
    tv_put_le64(w.offset, t->offset);
    for (unsigned i = 0; i < t->rank; i++)
        tv_put_le64(w.shape[i], t->shape[i]);
    tv_buf_add(b, &w, sizeof w);
    tv_buf_add(b, r->name.s, r->name.n);
}

bool rec_tensor_get(struct rec_body body, struct rec_tensor *r,
                    const char **why)
{
    struct wire_tensor w;
    if (!take(&body, &w, sizeof w))
        return bad(why, "wrong size");
    memset(r, 0, sizeof *r);
    struct tv_tensor *t = &r->t;
    if (w.dtype[0] == TV_DTYPE_NONE || w.dtype[0] >= TV_DTYPE_COUNT ||
        w.rank[0] > TV_RANK_MAX ||
        (w.storage[0] != TV_INLINE && w.storage[0] != TV_LINKED) ||
        w.checksum_known[0] > 1)
        return bad(why, "unknown dtype, rank or storage");
    t->dtype = (enum tv_dtype)w.dtype[0];
    t->rank = w.rank[0];
    t->storage = (enum tv_storage)w.storage[0];
    t->checksum_known = w.checksum_known[0] == 1;
    t->n_elems = tv_get_le64(w.n_elems);
    t->bytes = tv_get_le64(w.bytes);
    t->checksum = tv_hash_get(w.checksum);
    t->offset = tv_get_le64(w.offset);
    if (t->storage == TV_INLINE)
        t->payload_id = tv_get_le64(w.place);
    else
        t->source_id = tv_get_le64(w.place);
    if (!shape_get(w.shape, t->rank, t->shape) ||
        !shape_ok(t->dtype, t->rank, t->shape, t->n_elems, t->bytes))
        return bad(why, "shape and size do not agree");
    const uint32_t n = tv_get_le32(w.name_bytes);
    if (n == 0 || n > TV_NAME_MAX || !take_text(&body, n, &r->name) ||
        body.n != 0)
        return bad(why, "bad name");
    return true;
}

void rec_payload_put(struct tv_buf *b, const struct rec_payload *r)
{
    struct wire_payload w;
    memset(&w, 0, sizeof w);
    w.dtype[0] = (uint8_t)r->dtype;
    w.rank[0] = (uint8_t)r->rank;
    w.state[0] = r->state;
    tv_put_le64(w.n_elems, r->n_elems);
    tv_put_le64(w.bytes, r->bytes);
    tv_put_le64(w.chunk_bytes, r->chunk_bytes);
    tv_put_le64(w.n_chunks, r->n_chunks);
    tv_put_le64(w.refs, r->refs);
    tv_hash_put(w.checksum, r->checksum);
    for (unsigned i = 0; i < r->rank; i++)
        tv_put_le64(w.shape[i], r->shape[i]);
    tv_buf_add(b, &w, sizeof w);
}

bool rec_payload_get(struct rec_body body, struct rec_payload *r,
                     const char **why)
{
    struct wire_payload w;
    if (body.n != sizeof w || !take(&body, &w, sizeof w))
        return bad(why, "wrong size");
    memset(r, 0, sizeof *r);
    if (w.dtype[0] == TV_DTYPE_NONE || w.dtype[0] >= TV_DTYPE_COUNT ||
        w.rank[0] > TV_RANK_MAX || w.state[0] < REC_PARTIAL ||
        w.state[0] > REC_DOOMED)
        return bad(why, "unknown dtype, rank or state");
    r->dtype = (enum tv_dtype)w.dtype[0];
    r->rank = w.rank[0];
    r->state = w.state[0];
    r->n_elems = tv_get_le64(w.n_elems);
    r->bytes = tv_get_le64(w.bytes);
    r->chunk_bytes = tv_get_le64(w.chunk_bytes);
    r->n_chunks = tv_get_le64(w.n_chunks);
    r->refs = tv_get_le64(w.refs);
    r->checksum = tv_hash_get(w.checksum);
    if (!shape_get(w.shape, r->rank, r->shape) ||
        !shape_ok(r->dtype, r->rank, r->shape, r->n_elems, r->bytes))
        return bad(why, "shape and size do not agree");
    if (r->chunk_bytes == 0 || r->chunk_bytes > UINT32_MAX / 2 ||
        r->n_chunks !=
            r->bytes / r->chunk_bytes + (r->bytes % r->chunk_bytes != 0) ||
        r->n_chunks > UINT32_MAX)
        return bad(why, "chunks do not add up");
    return true;
}

void rec_leaves_put(struct tv_buf *b, const struct tv_hash *leaves, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        unsigned char h[16];
        tv_hash_put(h, leaves[i]);
        tv_buf_add(b, h, sizeof h);
    }
}

void rec_source_put(struct tv_buf *b, const struct rec_source *r)
{
    struct wire_source w;
    tv_put_le64(w.bytes, r->bytes);
    tv_put_le64(w.mtime_ns, r->mtime_ns);
    tv_put_le64(w.inode, r->inode);
    tv_put_le64(w.header_bytes, r->header_bytes);
    tv_hash_put(w.header_digest, r->header_digest);
    tv_put_le32(w.path_bytes, (uint32_t)r->path.n);
    tv_buf_add(b, &w, sizeof w);
    tv_buf_add(b, r->path.s, r->path.n);
}

bool rec_source_get(struct rec_body body, struct rec_source *r,
                    const char **why)
{
    struct wire_source w;
    if (!take(&body, &w, sizeof w))
        return bad(why, "wrong size");
    r->bytes = tv_get_le64(w.bytes);
    r->mtime_ns = tv_get_le64(w.mtime_ns);
    r->inode = tv_get_le64(w.inode);
    r->header_bytes = tv_get_le64(w.header_bytes);
    r->header_digest = tv_hash_get(w.header_digest);
    const uint32_t n = tv_get_le32(w.path_bytes);
    if (n == 0 || !take_text(&body, n, &r->path) || body.n != 0)
        return bad(why, "bad path");
    if (r->header_bytes > r->bytes)
        return bad(why, "header larger than its file");
    return true;
}

void rec_done_put(struct tv_buf *b, const struct rec_done *r)
{
    struct wire_done w;
    tv_put_le64(w.shard, r->shard);
    tv_put_le64(w.offset, r->offset);
    tv_put_le64(w.bytes, r->bytes);
    tv_put_le64(w.n_nonfinite_in, r->n_nonfinite_in);
    tv_put_le64(w.n_nonfinite_out, r->n_nonfinite_out);
    tv_hash_put(w.checksum, r->checksum);
    tv_put_le32(w.name_bytes, (uint32_t)r->name.n);
    tv_buf_add(b, &w, sizeof w);
    tv_buf_add(b, r->name.s, r->name.n);
}

bool rec_done_get(struct rec_body body, struct rec_done *r, const char **why)
{
    struct wire_done w;
    if (!take(&body, &w, sizeof w))
        return bad(why, "wrong size");
    r->shard = tv_get_le64(w.shard);
    r->offset = tv_get_le64(w.offset);
    r->bytes = tv_get_le64(w.bytes);
    r->n_nonfinite_in = tv_get_le64(w.n_nonfinite_in);
    r->n_nonfinite_out = tv_get_le64(w.n_nonfinite_out);
    r->checksum = tv_hash_get(w.checksum);
    const uint32_t n = tv_get_le32(w.name_bytes);
    if (n == 0 || n > TV_NAME_MAX || !take_text(&body, n, &r->name) ||
        body.n != 0)
        return bad(why, "bad name");
    return true;
}

static uint64_t double_bits(double v)
{
    uint64_t bits = 0;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

static double double_of(uint64_t bits)
{
    double v = 0;
    memcpy(&v, &bits, sizeof v);
    return v;
}

void rec_derived_put(struct tv_buf *b, const struct rec_derived *r)
{
    struct wire_derived w;
    memset(&w, 0, sizeof w);
    w.state[0] = r->state;
    w.dtype[0] = (uint8_t)r->dtype;
    w.has_sums[0] = r->has_sums ? 1 : 0;
    tv_put_le32(w.name_bytes, (uint32_t)r->name.n);
    tv_put_le64(w.id, r->id);
    tv_put_le64(w.group, r->group);
    tv_put_le64(w.session, r->session);
    tv_put_le64(w.n_elems, r->n_elems);
    tv_put_le64(w.n_set, r->n_set);
    tv_put_le64(w.bytes, r->bytes);
    tv_put_le64(w.chunk_elems, r->chunk_elems);
    tv_put_le64(w.created, r->created);
    tv_put_le64(w.used, r->used);
    tv_put_le64(w.n_nonfinite, r->n_nonfinite);
    tv_put_le64(w.sum_all, double_bits(r->sum_all));
    tv_put_le64(w.sum_kept, double_bits(r->sum_kept));
    tv_buf_add(b, &w, sizeof w);
    tv_buf_add(b, r->name.s, r->name.n);
}

bool rec_derived_get(struct rec_body body, struct rec_derived *r,
                     const char **why)
{
    struct wire_derived w;
    if (!take(&body, &w, sizeof w))
        return bad(why, "wrong size");
    if ((w.state[0] != REC_PARTIAL && w.state[0] != REC_COMPLETE) ||
        w.dtype[0] >= TV_DTYPE_COUNT || w.has_sums[0] > 1)
        return bad(why, "unknown state or dtype");
    r->state = w.state[0];
    r->dtype = (enum tv_dtype)w.dtype[0];
    r->has_sums = w.has_sums[0] == 1;
    r->id = tv_get_le64(w.id);
    r->group = tv_get_le64(w.group);
    r->session = tv_get_le64(w.session);
    r->n_elems = tv_get_le64(w.n_elems);
    r->n_set = tv_get_le64(w.n_set);
    r->bytes = tv_get_le64(w.bytes);
    r->chunk_elems = tv_get_le64(w.chunk_elems);
    r->created = tv_get_le64(w.created);
    r->used = tv_get_le64(w.used);
    r->n_nonfinite = tv_get_le64(w.n_nonfinite);
    r->sum_all = double_of(tv_get_le64(w.sum_all));
    r->sum_kept = double_of(tv_get_le64(w.sum_kept));
    const uint32_t n = tv_get_le32(w.name_bytes);
    if (n == 0 || n > TV_NAME_MAX || !take_text(&body, n, &r->name) ||
        body.n != 0)
        return bad(why, "bad name");
    /* Masks of 2^23 elements, values of 2^20: whole roaring containers. */
    if (r->chunk_elems == 0 || r->chunk_elems % 65536 != 0 ||
        r->chunk_elems > (1u << 23) || r->n_set > r->n_elems ||
        r->n_elems / r->chunk_elems >= UINT32_MAX)
        return bad(why, "its sizes do not agree");
    return true;
}

void rec_group_put(struct tv_buf *b, const struct rec_group *r)
{
    struct wire_group w;
    tv_put_le64(w.n_items, r->n_items);
    tv_put_le32(w.about_bytes, (uint32_t)r->about.n);
    tv_buf_add(b, &w, sizeof w);
    tv_buf_add(b, r->about.s, r->about.n);
}

bool rec_group_get(struct rec_body body, struct rec_group *r, const char **why)
{
    struct wire_group w;
    if (!take(&body, &w, sizeof w))
        return bad(why, "wrong size");
    r->n_items = tv_get_le64(w.n_items);
    if (!take_text(&body, tv_get_le32(w.about_bytes), &r->about) || body.n != 0)
        return bad(why, "bad description");
    return true;
}

void rec_use_put(struct tv_buf *b, const struct rec_use *r)
{
    struct wire_use w;
    memset(&w, 0, sizeof w);
    w.kind[0] = r->kind;
    tv_put_le16(w.key_bytes, (uint16_t)r->item.n);
    tv_buf_add(b, &w, sizeof w);
    tv_buf_add(b, r->item.b, r->item.n);
}

bool rec_use_get(struct rec_body body, struct rec_use *r, const char **why)
{
    struct wire_use w;
    if (!take(&body, &w, sizeof w))
        return bad(why, "wrong size");
    r->kind = w.kind[0];
    r->item.n = tv_get_le16(w.key_bytes);
    if (r->item.n != body.n || r->item.n > TV_REC_KEY_MAX || r->item.n < 24)
        return bad(why, "bad key");
    memcpy(r->item.b, body.p, body.n);
    return true;
}

void rec_charge_put(struct tv_buf *b, const struct rec_charge *r)
{
    struct wire_charge w;
    tv_put_le64(w.bytes, r->bytes);
    tv_put_le32(w.path_bytes, (uint32_t)r->path.n);
    tv_buf_add(b, &w, sizeof w);
    tv_buf_add(b, r->path.s, r->path.n);
}

bool rec_charge_get(struct rec_body body, struct rec_charge *r,
                    const char **why)
{
    struct wire_charge w;
    if (!take(&body, &w, sizeof w))
        return bad(why, "wrong size");
    r->bytes = tv_get_le64(w.bytes);
    if (!take_text(&body, tv_get_le32(w.path_bytes), &r->path) || body.n != 0)
        return bad(why, "bad path");
    return true;
}

void rec_pieces_put(struct tv_buf *b, const struct rec_pieces *r)
{
    struct wire_pieces w;
    memset(&w, 0, sizeof w);
    w.type[0] = r->type;
    tv_put_le32(w.piece_bytes, r->piece_bytes);
    tv_put_le64(w.bytes, r->bytes);
    tv_buf_add(b, &w, sizeof w);
}

bool rec_pieces_get(struct rec_body body, struct rec_pieces *r,
                    const char **why)
{
    struct wire_pieces w;
    if (!take(&body, &w, sizeof w) || body.n != 0)
        return bad(why, "wrong size");
    r->type = w.type[0];
    r->piece_bytes = tv_get_le32(w.piece_bytes);
    r->bytes = tv_get_le64(w.bytes);
    if (r->bytes > TV_REC_BODY_MAX || r->piece_bytes == 0)
        return bad(why, "bad sizes");
    return true;
}

/* ---- chunks ---------------------------------------------------------------
 */

void rec_part_put(void *dst, const struct rec_part *p)
{
    const struct rec_chunk *c = &p->c;
    struct wire_chunk w;
    memset(&w, 0, sizeof w);
    tv_put_le32(w.magic, TV_CHUNK_MAGIC);
    tv_put_le16(w.version, TV_CHUNK_VERSION);
    w.kind[0] = p->kind;
    w.dtype[0] = (uint8_t)c->dtype;
    tv_put_le32(w.number, c->number);
    tv_put_le32(w.flags, p->flags);
    tv_put_le64(w.bytes, c->bytes);
    tv_put_le64(w.n_elems, c->n_elems);
    tv_put_le64(w.payload_hash, c->payload_hash);
    tv_put_le64(w.head_hash,
                XXH3_64bits(&w, offsetof(struct wire_chunk, head_hash)));
    memcpy(dst, &w, sizeof w);
}

bool rec_part_get(const void *val, size_t val_bytes, struct rec_part *p,
                  const char **why)
{
    struct rec_chunk *c = &p->c;
    struct wire_chunk w;
    if (val_bytes < sizeof w)
        return bad(why, "chunk shorter than its header");
    memcpy(&w, val, sizeof w);
    if (tv_get_le32(w.magic) != TV_CHUNK_MAGIC)
        return bad(why, "chunk header has no magic number");
    if (tv_get_le64(w.head_hash) !=
        XXH3_64bits(&w, offsetof(struct wire_chunk, head_hash)))
        return bad(why, "chunk header checksum mismatch");
    if (tv_get_le16(w.version) != TV_CHUNK_VERSION)
        return bad(why, "chunk of an unknown version or kind");
    if (w.dtype[0] >= TV_DTYPE_COUNT)
        return bad(why, "chunk of an unknown dtype");
    p->kind = w.kind[0];
    p->flags = tv_get_le32(w.flags);
    c->dtype = (enum tv_dtype)w.dtype[0];
    c->number = tv_get_le32(w.number);
    c->bytes = tv_get_le64(w.bytes);
    c->n_elems = tv_get_le64(w.n_elems);
    c->payload_hash = tv_get_le64(w.payload_hash);
    if (c->bytes > val_bytes - sizeof w)
        return bad(why, "chunk payload runs past its record");
    return true;
}

void rec_chunk_put(void *dst, const struct rec_chunk *c)
{
    const struct rec_part p = {.kind = TV_CHUNK_PAYLOAD, .c = *c};
    rec_part_put(dst, &p);
}

bool rec_chunk_get(const void *val, size_t val_bytes, struct rec_chunk *c,
                   const char **why)
{
    struct rec_part p;
    if (!rec_part_get(val, val_bytes, &p, why))
        return false;
    if (p.kind != TV_CHUNK_PAYLOAD || p.flags != 0)
        return bad(why, "chunk of an unknown version or kind");
    if (p.c.dtype == TV_DTYPE_NONE)
        return bad(why, "chunk of an unknown dtype");
    *c = p.c;
    return true;
}

uint64_t rec_chunk_value_bytes(uint64_t bytes, size_t page_bytes)
{
    const uint64_t least = page_bytes / 2 > 2048 ? page_bytes / 2 : 2048;
    const uint64_t total = bytes + TV_CHUNK_HEADER;
    return total > least ? total : least;
}

/* Smallest byte count that holds a whole number of elements and is a multiple
 * of 64: 6-bit elements come four to three bytes. */
static uint64_t element_group_bytes(enum tv_dtype t)
{
    return tv_dtype_bits(t) % 8 == 6 ? 192 : 64;
}

void rec_geometry_cut(struct rec_payload *r, uint64_t chunk_bytes_max)
{
    const uint64_t group = element_group_bytes(r->dtype);
    r->chunk_bytes = chunk_bytes_max > group
                         ? chunk_bytes_max - chunk_bytes_max % group
                         : group;
    r->n_chunks = r->bytes / r->chunk_bytes + (r->bytes % r->chunk_bytes != 0);
}

enum tv_err rec_geometry(const struct tv_tensor_desc *d,
                         uint64_t chunk_bytes_max, struct rec_payload *out,
                         struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct rec_payload r;
    memset(&r, 0, sizeof r);
    uint64_t row_elems = 1;
    if (d->rank > TV_RANK_MAX)
        return tv_error_set(err, TV_E_INTERNAL, "rank %u above %u", d->rank,
                            TV_RANK_MAX);
    r.dtype = d->dtype;
    r.rank = d->rank;
    for (unsigned i = 0; i < d->rank; i++)
        r.shape[i] = d->shape[i];
    TV_TRY(tv_shape_elems(d->shape, d->rank, &r.n_elems, err));
    TV_TRY(tv_dtype_bytes(d->dtype, r.n_elems, &r.bytes, err));

    uint64_t cap = chunk_bytes_max != 0 ? chunk_bytes_max : TV_CHUNK_BYTES;
    if (cap > (1u << 30))
        cap = 1u << 30;
    const uint64_t group = element_group_bytes(d->dtype);
    if (cap < group)
        cap = group;
    r.chunk_bytes = cap - cap % group;
    if (d->rank > 1 && r.n_elems != 0) {
        row_elems = r.n_elems / d->shape[0];
        const unsigned bits = tv_dtype_bits(d->dtype);
        /* Rows of 4- and 6-bit elements may end inside a byte: as many rows
         * as reach a byte border count as one. */
        uint64_t rows = 1, row_bits = 0;
        while (rows < 8 && tv_mul_u64(row_elems * rows, bits, &row_bits) &&
               row_bits % 8 != 0)
            rows *= 2;
        if (tv_mul_u64(row_elems * rows, bits, &row_bits) &&
            row_bits / 8 <= cap)
            r.chunk_bytes = cap - cap % (row_bits / 8);
    }
    r.n_chunks = r.bytes / r.chunk_bytes + (r.bytes % r.chunk_bytes != 0);
    if (r.n_chunks > UINT32_MAX) {
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "a tensor of %llu bytes has too many chunks",
                          (unsigned long long)r.bytes);
        goto out;
    }
    r.state = REC_PARTIAL;
    *out = r;
out:
    return rc;
}
