/* SPDX-License-Identifier: Apache-2.0 */
/*
 * copy.c - copying a tensor into the store.
 *
 * Two passes: the first hashes, so that content which is there already is not
 * written again; the second writes chunk by chunk, committing whenever the
 * dirty limit is reached. Leaves are computed anew from the bytes as written:
 * a source file that changes between the passes is an error, never a tensor
 * whose checksum does not fit.
 */
#include "store_priv.h"

#include <string.h>

#include "tv/alloc.h"

static enum tv_err view_fits(const struct tv_tensor_desc *d,
                             const struct tv_view *from, struct tv_error *err)
{
    uint64_t n = 0, bytes = 0;
    enum tv_err rc = tv_shape_elems(d->shape, d->rank, &n, err);
    if (rc == TV_OK)
        rc = tv_dtype_bytes(d->dtype, n, &bytes, err);
    if (rc == TV_OK && bytes != from->bytes)
        rc = tv_error_set(
            err, TV_E_INTERNAL, "a view of %llu bytes for a tensor of %llu",
            (unsigned long long)from->bytes, (unsigned long long)bytes);
    return rc;
}

static enum tv_err hash_leaves(const struct tv_view *from,
                               struct tv_hash *leaves, uint64_t n,
                               struct tv_error *err)
{
    for (uint64_t i = 0; i < n; i++) {
        leaves[i] = tv_view_leaf(from, i);
        if (from->leaves != NULL && !tv_hash_equal(leaves[i], from->leaves[i]))
            return tv_error_set(err, TV_E_CORRUPT,
                                "checksum mismatch in MiB %llu",
                                (unsigned long long)i);
    }
    return TV_OK;
}

/* Leaves of bytes that come in pieces of any length. */
struct leaf_run {
    tv_hasher *h;
    uint64_t in_leaf, leaf;
    const struct tv_hash *want;
    bool same;
};

static void leaf_end(struct leaf_run *l)
{
    if (!tv_hash_equal(tv_hasher_value(l->h), l->want[l->leaf]))
        l->same = false;
    tv_hasher_reset(l->h);
    l->in_leaf = 0;
    l->leaf++;
}

static void leaf_add(struct leaf_run *l, const unsigned char *p, size_t n)
{
    while (n > 0) {
        const uint64_t room = TV_LEAF_BYTES - l->in_leaf;
        const size_t part = n < room ? n : (size_t)room;
        tv_hasher_add(l->h, p, part);
        l->in_leaf += part;
        p += part;
        n -= part;
        if (l->in_leaf == TV_LEAF_BYTES)
            leaf_end(l);
    }
}

/* Leaves of a chunk that has been written, and its XXH3-64. The part of a leaf
 * at either end goes with the rest of it in the chunk next to it. */
static uint64_t chunk_hash(struct leaf_run *l, const unsigned char *p, size_t n)
{
    const size_t head =
        l->in_leaf == 0 ? 0 : (size_t)(TV_LEAF_BYTES - l->in_leaf);
    const size_t skip = head < n ? head : n;
    leaf_add(l, p, skip);
    const size_t whole = (n - skip) / TV_LEAF_BYTES;
    size_t n_same = 0;
    const uint64_t hash =
        tv_hash64_leaves(p, n, skip, l->want + l->leaf, whole, &n_same);
    if (n_same < whole)
        l->same = false;
    l->leaf += whole;
    const size_t done = skip + whole * TV_LEAF_BYTES;
    leaf_add(l, p + done, n - done);
    return hash;
}

static enum tv_err renew_batch(tv_batch **b, struct tv_error *err)
{
    tv_store *s = (*b)->t.s;
    const bool lazy = (*b)->lazy;
    const enum tv_err rc = tv_batch_commit(*b, err);
    *b = NULL;
    return rc == TV_OK ? tv_batch_begin(s, lazy, err, b) : rc;
}

static enum tv_err write_chunks(tv_batch **b, const struct tv_payload *p,
                                const struct tv_view *from,
                                const struct tv_hash *leaves,
                                struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct leaf_run l = {.h = NULL, .want = leaves, .same = true};
    uint64_t off = 0;
    TV_TRY(tv_hasher_open(err, &l.h));
    for (size_t i = 0; i < p->n_chunks; i++) {
        void *to = NULL;
        size_t n = 0;
        const uint64_t left = p->bytes - off;
        const uint64_t next = left < p->chunk_bytes ? left : p->chunk_bytes;
        const uint64_t dirty = tv_batch_dirty(*b);
        if (dirty > 0 && dirty + next > tv_store_dirty_max((*b)->t.s))
            TV_TRY(renew_batch(b, err));
        TV_TRY(tv_chunk_reserve(*b, p, i, &to, &n, err));
        tv_view_copy(from, off, n, to);
        TV_TRY(chunk_seal(*b, p, i, chunk_hash(&l, to, n), err));
        off += n;
    }
    if (l.in_leaf > 0)
        leaf_end(&l);
    if (!l.same) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "its bytes changed while they were copied");
        tv_error_hint(err, "is another program writing the input file?");
    }
out:
    tv_hasher_close(l.h);
    return rc;
}

enum tv_err tv_tensor_copy_in(tv_batch **b, uint64_t object_id,
                              const struct tv_tensor_desc *d,
                              const struct tv_view *from,
                              const struct tv_hash *known, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_hash *own = NULL;
    const struct tv_hash *leaves = known;
    struct tv_payload p;
    bool found = false;
    uint64_t id = 0;
    char shown[SHOW_BYTES];
    TV_TRY(view_fits(d, from, err));
    const uint64_t n = tv_leaf_count(from->bytes);
    if (known == NULL) {
        own = (struct tv_hash *)tv_calloc((size_t)n, sizeof *own);
        if (own == NULL) {
            rc = tv_error_set(err, TV_E_NOMEM, "no memory for checksums");
            goto out;
        }
        TV_TRY(hash_leaves(from, own, n, err));
        leaves = own;
    }
    TV_TRY(tv_payload_lookup(*b, d, tv_leaves_checksum(leaves, (size_t)n), from,
                             &found, &id, err));
    if (!found) {
        TV_TRY(tv_payload_begin(*b, d, 0, &p, err));
        TV_TRY(write_chunks(b, &p, from, leaves, err));
        TV_TRY(tv_payload_finish(*b, &p, leaves, &id, err));
    }
    TV_TRY(tv_tensor_put(*b, object_id, d, id, err));
out:
    if (rc != TV_OK) {
        if (*b != NULL)
            (*b)->failed = true;
        tv_error_context(err, "tensor '%s'", show(d->name, shown));
    }
    tv_free(own);
    return rc;
}
