/* SPDX-License-Identifier: Apache-2.0 */
/*
 * tree_check.c - are LMDB's trees sound enough to be walked?
 *
 * LMDB believes its pages: a damaged one can send it anywhere in memory, or in
 * circles. So every page that a snapshot consists of is looked at once before
 * LMDB follows it: heads, offsets and sizes of entries, order of keys, numbers
 * of pages, and that no page is used twice or is free and used. What lies in
 * the values is not looked at: records and payloads have checksums of their
 * own, and one that is damaged shall not close the rest of the store.
 *
 * The file is read, not mapped: a page that is not there is an error, no
 * SIGBUS. A reader's transaction keeps the snapshot in place meanwhile.
 *
 * Layout of LMDB 0.9, in the machine's byte order:
 *
 *   page    0 number u64, 8 pad u16, 10 flags u16, then 12 lower u16, 14 upper
 *           u16, 16 offsets u16 [(lower - 16) / 2]; overflow: 12 pages u32
 *   entry   0 size of the value u32 (branch: low 32 bits of the child), 4 flags
 *           u16 (branch: high 16 bits), 6 size of the key u16, 8 key, value;
 *           entries take even sizes and lie packed at the end of their page
 *   tree    0 pad u32, 4 flags u16, 6 depth u16, 8 branch, leaf, overflow pages
 *           u64, 32 entries u64, 40 root u64
 *   meta    at 16 of pages 0 and 1: 0 magic u32, 4 version u32, 8 address u64,
 *           16 map size u64, 24 tree of free pages (its pad is the page size),
 *           72 tree of tables, 120 last page u64, 128 number of the transaction
 */
#include "tree_check.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <string.h>

#include "tv/alloc.h"

#define HEAD_BYTES      16u
#define ENTRY_BYTES     8u
#define TREE_BYTES      48u
#define META_BYTES      136u
#define META_MAGIC      0xBEEFC0DEu
#define PAGE_LEAST      512u
#define PAGE_MOST       32768u
#define DEPTH_MAX       32u
#define TABLES_MAX      64u
#define KEY_MAX         511u
#define NO_PAGE         UINT64_MAX
#define FREE_TREE_FLAGS 8u /* keys are integers */
/* A file may end before the last page that its header knows of: pages that one
 * transaction took and gave back are never written. They are not this many. */
#define MISSING_MOST    ((uint64_t)16 << 30)
/* A writer may replace the header that was to be read. */
#define ATTEMPTS        8

enum page_flag { PAGE_BRANCH = 1, PAGE_LEAF = 2, PAGE_OVERFLOW = 4, META = 8 };
enum entry_flag { ENTRY_BIG = 1, ENTRY_TREE = 2 };

struct tree {
    unsigned flags, depth;
    uint64_t n_entries, root;
};

struct key {
    const unsigned char *at;
    size_t n;
};

struct meta {
    uint32_t magic, page_bytes;
    struct tree free, tables;
    uint64_t last_page, txn;
};

struct check {
    const char *path;
    int fd;
    size_t page_bytes;
    uint64_t n_pages;      /* of the snapshot */
    uint64_t n_file_pages; /* of the file */
    unsigned char *used;   /* a bit per page of the file */
    unsigned char *levels; /* a page for every level of a tree */
    unsigned char *list;   /* a list of free pages, read piece by piece */
    bool writes; /* look into what only a writer believes: lists of free
                  * pages, and the heads of long values */
    struct tree tables[TABLES_MAX];
    size_t n_tables;
    const struct tree *tree; /* being walked */
    uint64_t n_entries;      /* seen in it */
    bool is_free, is_main;
    uint64_t page;   /* where something was found */
    const char *why; /* what; NULL: nothing */
    bool cut;        /* a page lies behind the end of the file */
    int sys_errno;   /* reading failed */
};

static uint16_t get16(const unsigned char *p)
{
    uint16_t v = 0;
    memcpy(&v, p, sizeof v);
    return v;
}

static uint32_t get32(const unsigned char *p)
{
    uint32_t v = 0;
    memcpy(&v, p, sizeof v);
    return v;
}

static uint64_t get64(const unsigned char *p)
{
    uint64_t v = 0;
    memcpy(&v, p, sizeof v);
    return v;
}

static struct tree get_tree(const unsigned char *p)
{
    return (struct tree){.flags = get16(p + 4),
                         .depth = get16(p + 6),
                         .n_entries = get64(p + 32),
                         .root = get64(p + 40)};
}

static bool bad(struct check *c, uint64_t page, const char *why)
{
    if (c->why == NULL) {
        c->page = page;
        c->why = why;
    }
    return false;
}

/* ---- reading --------------------------------------------------------------
 */

/* Reads n bytes; false: they are not there, or an error. */
static bool read_at(struct check *c, uint64_t off, void *to, size_t n)
{
    size_t have = 0;
    while (have < n) {
        const ssize_t got = tv_sys()->pread(c->fd, (char *)to + have, n - have,
                                            (off_t)(off + have));
        if (got < 0) {
            c->sys_errno = errno;
            return false;
        }
        if (got == 0) {
            c->cut = true;
            return false;
        }
        have += (size_t)got;
    }
    return true;
}

static bool get_meta(struct check *c, unsigned number, struct meta *out)
{
    unsigned char raw[HEAD_BYTES + META_BYTES];
    if (!read_at(c, (uint64_t)number * c->page_bytes, raw, sizeof raw))
        return false;
    const unsigned char *m = raw + HEAD_BYTES;
    *out = (struct meta){.magic = get32(m),
                         .page_bytes = get32(m + 24),
                         .free = get_tree(m + 24),
                         .tables = get_tree(m + 72),
                         .last_page = get64(m + 120),
                         .txn = get64(m + 128)};
    return true;
}

/* Marks pages as used. */
static bool take(struct check *c, uint64_t from, uint64_t first, uint64_t n)
{
    if (first < 2 || n == 0 || first >= c->n_pages || n > c->n_pages - first)
        return bad(c, from, "it leads to a page that does not exist");
    if (first + n > c->n_file_pages) {
        c->cut = true;
        return false;
    }
    for (uint64_t p = first; p < first + n; p++) {
        if ((c->used[p / 8] >> (p % 8) & 1) != 0)
            return bad(c, p, "it is used twice, or free and used");
        c->used[p / 8] |= (unsigned char)(1u << (p % 8));
    }
    return true;
}

/* ---- lists of free pages --------------------------------------------------
 */

/* The value of an entry of the tree of free pages: how many, then their
 * numbers. It starts at `off` of the file. */
static bool free_list(struct check *c, uint64_t page, uint64_t off,
                      uint64_t bytes)
{
    unsigned char head[8];
    if (bytes < sizeof head)
        return bad(c, page, "its list of free pages is too short");
    if (!read_at(c, off, head, sizeof head))
        return false;
    uint64_t left = get64(head);
    if (left > bytes / 8 - 1)
        return bad(c, page, "its list of free pages is too short");
    off += 8;
    while (left > 0) {
        const uint64_t most = c->page_bytes / 8;
        const size_t n = (size_t)(left < most ? left : most);
        if (!read_at(c, off, c->list, n * 8))
            return false;
        for (size_t i = 0; i < n; i++) {
            const uint64_t p = get64(c->list + i * 8);
            if (p < 2 || p >= c->n_pages)
                return bad(c, page, "it lists a page that does not exist");
            /* One that was never written needs no mark: no tree has it. */
            if (p < c->n_file_pages && !take(c, page, p, 1))
                return false;
        }
        off += n * 8;
        left -= n;
    }
    return true;
}

/* ---- entries and pages ----------------------------------------------------
 */

/* LMDB's order of byte strings; of integers in the tree of free pages. */
static int key_order(const struct check *c, struct key a, struct key b)
{
    if (c->is_free) {
        const uint64_t x = get64(a.at);
        const uint64_t y = get64(b.at);
        return (x > y) - (x < y);
    }
    const int order = memcmp(a.at, b.at, a.n < b.n ? a.n : b.n);
    return order != 0 ? order : (a.n > b.n) - (a.n < b.n);
}

/* How many pages a value of its own pages has. Its head says so to whoever
 * frees them; a reader goes by the size of the value alone, and there may be
 * very many to read. */
static bool long_value(struct check *c, uint64_t page, uint64_t first,
                       uint32_t bytes, uint64_t *n)
{
    unsigned char head[HEAD_BYTES];
    const uint64_t least =
        ((uint64_t)bytes + HEAD_BYTES + c->page_bytes - 1) / c->page_bytes;
    if (first < 2 || first >= c->n_pages)
        return bad(c, page, "it leads to a page that does not exist");
    *n = least;
    if (!c->writes)
        return true;
    if (!read_at(c, first * c->page_bytes, head, sizeof head))
        return false;
    *n = get32(head + 12);
    if (get64(head) != first || get16(head + 10) != PAGE_OVERFLOW || *n < least)
        return bad(c, first, "its head is not that of a long value");
    return true;
}

/* A value: of pages of its own, a table, a list of free pages, or a record. */
static bool check_value(struct check *c, uint64_t page, const unsigned char *at,
                        unsigned flags, uint64_t off, uint32_t bytes)
{
    uint64_t from = off;
    if ((flags & ENTRY_BIG) != 0) {
        const uint64_t first = get64(at);
        uint64_t n = 0;
        if (!long_value(c, page, first, bytes, &n) || !take(c, page, first, n))
            return false;
        from = first * c->page_bytes + HEAD_BYTES;
    }
    if (c->is_main) {
        if (flags != ENTRY_TREE || bytes != TREE_BYTES)
            return bad(c, page, "it has an entry that is no table");
        if (c->n_tables == TABLES_MAX)
            return bad(c, page, "there are too many tables");
        c->tables[c->n_tables++] = get_tree(at);
    } else if ((flags & ENTRY_TREE) != 0) {
        return bad(c, page, "it has a table where records are");
    }
    return !c->is_free || !c->writes || free_list(c, page, from, bytes);
}

struct entry {
    struct key key;
    unsigned flags;
    uint32_t bytes; /* of the value */
    uint64_t child;
    const unsigned char *value;
};

/* Reads entry i of a page; `upper` is where entries begin. Returns its size,
 * 0 when it is damaged. */
static size_t get_entry(struct check *c, const unsigned char *page, size_t i,
                        bool leaf, struct entry *out)
{
    const size_t upper = get16(page + 14);
    const size_t at = get16(page + HEAD_BYTES + 2 * i);
    if (at < upper || at % 2 != 0 || at + ENTRY_BYTES > c->page_bytes)
        return 0;
    const unsigned char *p = page + at;
    *out = (struct entry){.flags = get16(p + 4),
                          .bytes = get32(p),
                          .key = {p + ENTRY_BYTES, get16(p + 6)}};
    size_t n = ENTRY_BYTES + out->key.n;
    if (out->key.n > KEY_MAX || at + n > c->page_bytes)
        return 0;
    out->value = p + n;
    out->child = get32(p) | (uint64_t)out->flags << 32;
    if (leaf) {
        if ((out->flags & ~(unsigned)(ENTRY_BIG | ENTRY_TREE)) != 0)
            return 0;
        const size_t inside = (out->flags & ENTRY_BIG) != 0 ? 8 : out->bytes;
        if (inside > c->page_bytes - at - n)
            return 0;
        n += inside;
    }
    return n + n % 2;
}

/* Keys of a page lie in [lo, hi) and rise; an end that is NULL is open. */
static bool check_key(struct check *c, uint64_t number, struct key key,
                      const struct key *last, const struct key *lo,
                      const struct key *hi)
{
    if (key.n == 0 || (c->is_free && key.n != 8))
        return bad(c, number, "a key has an impossible size");
    if ((last != NULL && key_order(c, *last, key) >= 0) ||
        (lo != NULL && key_order(c, *lo, key) > 0) ||
        (hi != NULL && key_order(c, key, *hi) >= 0))
        return bad(c, number, "its keys are not in order");
    return true;
}

static bool check_head(struct check *c, const unsigned char *page,
                       uint64_t number, bool leaf)
{
    const size_t lower = get16(page + 12);
    const size_t upper = get16(page + 14);
    const size_t n = lower < HEAD_BYTES ? 0 : (lower - HEAD_BYTES) / 2;
    /* LMDB insists on two children, but for the tree of free pages. */
    const size_t least = leaf || c->is_free ? 1 : 2;
    if (get64(page) != number ||
        get16(page + 10) != (leaf ? PAGE_LEAF : PAGE_BRANCH) ||
        lower % 2 != 0 || lower > upper || upper > c->page_bytes || n < least)
        return bad(c, number, "its head is damaged");
    return true;
}

static bool check_page(struct check *c, uint64_t from, uint64_t number,
                       unsigned level, const struct key *lo,
                       const struct key *hi)
{
    unsigned char *page = c->levels + (size_t)level * c->page_bytes;
    const bool leaf = level + 1 == c->tree->depth;
    if (!take(c, from, number, 1) ||
        !read_at(c, number * c->page_bytes, page, c->page_bytes) ||
        !check_head(c, page, number, leaf))
        return false;
    const size_t n = (get16(page + 12) - HEAD_BYTES) / 2u;
    struct key last = {NULL, 0};
    struct entry e;
    size_t total = 0;
    for (size_t i = 0; i < n; i++) {
        const size_t bytes = get_entry(c, page, i, leaf, &e);
        if (bytes == 0)
            return bad(c, number, "an entry is damaged");
        total += bytes;
        /* Nobody looks at the first key of a branch. */
        if (!leaf && i == 0)
            continue;
        if (!check_key(c, number, e.key, last.at != NULL ? &last : NULL, lo,
                       hi))
            return false;
        last = e.key;
    }
    if (total != c->page_bytes - get16(page + 14))
        return bad(c, number, "its entries overlap");
    for (size_t i = 0; i < n; i++) {
        (void)get_entry(c, page, i, leaf, &e);
        if (leaf) {
            c->n_entries++;
            if (!check_value(c, number, e.value, e.flags,
                             number * c->page_bytes +
                                 (uint64_t)(e.value - page),
                             e.bytes))
                return false;
            continue;
        }
        struct entry next;
        if (i + 1 < n)
            (void)get_entry(c, page, i + 1, leaf, &next);
        if (!check_page(c, number, e.child, level + 1, i == 0 ? lo : &e.key,
                        i + 1 < n ? &next.key : hi))
            return false;
    }
    return true;
}

static bool check_tree(struct check *c, const struct tree *t, unsigned flags)
{
    c->tree = t;
    c->n_entries = 0;
    if (t->flags != flags)
        return bad(c, 0, "a table has flags that it was not made with");
    if (t->root == NO_PAGE)
        return (t->depth == 0 && t->n_entries == 0) ||
               bad(c, 0, "a table without pages has entries");
    if (t->depth == 0 || t->depth > DEPTH_MAX)
        return bad(c, 0, "a table has an impossible depth");
    if (!check_page(c, 0, t->root, 0, NULL, NULL))
        return false;
    return c->n_entries == t->n_entries ||
           bad(c, t->root,
               "its tree has another number of entries than "
               "the table says");
}

/* ---- the whole ------------------------------------------------------------
 */

static bool check_snapshot(struct check *c, const struct meta *m)
{
    c->is_free = true;
    c->is_main = false;
    if (!check_tree(c, &m->free, FREE_TREE_FLAGS))
        return false;
    c->is_free = false;
    c->is_main = true;
    c->n_tables = 0;
    if (!check_tree(c, &m->tables, 0))
        return false;
    c->is_main = false;
    for (size_t i = 0; i < c->n_tables; i++)
        if (!check_tree(c, &c->tables[i], 0))
            return false;
    return true;
}

/* What was found, as an error; TV_OK when nothing was. */
static enum tv_err verdict(const struct check *c, const struct meta *m,
                           struct tv_error *err)
{
    if (c->sys_errno != 0)
        return tv_error_sys(err, c->sys_errno, "cannot read store %s", c->path);
    if (c->cut)
        return tv_error_set(err, TV_E_CORRUPT,
                            "store %s: data.mdb is cut short: %" PRIu64
                            " bytes, but its header says %" PRIu64,
                            c->path, c->n_file_pages * c->page_bytes,
                            (m->last_page + 1) * c->page_bytes);
    if (c->why != NULL) {
        tv_error_set(err, TV_E_CORRUPT,
                     "store %s: page %" PRIu64 " of data.mdb is damaged: %s",
                     c->path, c->page, c->why);
        tv_error_hint(err, "restore the store from a copy, or import again "
                           "into a new one");
        return TV_E_CORRUPT;
    }
    return TV_OK;
}

static enum tv_err damaged_header(const char *path, struct tv_error *err)
{
    return tv_error_set(err, TV_E_CORRUPT,
                        "store %s: the header of data.mdb is damaged", path);
}

/* The header that the transaction began with. Both were valid once: a number
 * next to which the other is not is none of LMDB's. The other is the older one,
 * or that of a writer who has written it and not yet told readers so. */
static bool find_meta(struct check *c, uint64_t txn, struct meta *out)
{
    struct meta other;
    if (!get_meta(c, (unsigned)(txn & 1), out) ||
        !get_meta(c, (unsigned)(~txn & 1), &other))
        return false;
    return out->magic == META_MAGIC && out->page_bytes == c->page_bytes &&
           out->txn == txn &&
           (other.txn + 1 == txn || other.txn == txn + 1 ||
            (txn == 0 && other.txn == 0));
}

enum tv_err store_header_check(tv_store *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct check c = {.path = s->path, .page_bytes = 0};
    struct meta m;
    struct stat st;
    c.fd = tv_sys()->open(s->data_path, O_RDONLY | O_CLOEXEC, 0);
    if (c.fd < 0)
        return TV_OK; /* LMDB says why */
    if (tv_sys()->fstat(c.fd, &st) != 0 || !get_meta(&c, 0, &m) ||
        m.magic != META_MAGIC)
        goto out;
    c.page_bytes = m.page_bytes;
    const uint64_t file = (uint64_t)st.st_size;
    for (unsigned i = 0; i < 2 && rc == TV_OK; i++) {
        if (m.page_bytes != c.page_bytes || m.page_bytes < PAGE_LEAST ||
            m.page_bytes > PAGE_MOST ||
            (m.page_bytes & (m.page_bytes - 1)) != 0 ||
            m.last_page > (file + MISSING_MOST) / m.page_bytes)
            rc = damaged_header(s->path, err);
        else if (i == 0 && !get_meta(&c, 1, &m))
            break;
    }
out:
    (void)tv_sys()->close(c.fd);
    return rc;
}

enum tv_err store_tree_check(tv_store *s, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct check c = {.path = s->path, .writes = !s->read_only || s->check_all};
    struct meta m = {.magic = 0};
    MDB_txn *txn = NULL;
    MDB_stat ms;
    struct stat st;
    bool found = false;
    const int e = tv_lmdb()->env_stat(s->env, &ms);
    if (e != 0)
        return tv_lmdb_error(err, e, s->path, "asking for its size");
    c.page_bytes = ms.ms_psize;
    c.fd = tv_sys()->open(s->data_path, O_RDONLY | O_CLOEXEC, 0);
    if (c.fd < 0)
        return tv_error_sys(err, errno, "cannot open store %s", s->path);
    for (int i = 0; i < ATTEMPTS && !found && c.sys_errno == 0; i++) {
        if (txn != NULL) {
            tv_lmdb()->txn_abort(txn);
            atomic_fetch_sub(&s->n_txns, 1);
            txn = NULL;
        }
        TV_TRY(txn_begin(s, MDB_RDONLY, &txn, err));
        found = find_meta(&c, tv_lmdb()->txn_id(txn), &m);
    }
    if (c.sys_errno != 0 || c.cut) {
        rc = verdict(&c, &m, err);
        goto out;
    }
    /* After the header: a writer makes the file grow first. */
    if (!found || tv_sys()->fstat(c.fd, &st) != 0) {
        rc = found ? tv_error_sys(err, errno, "cannot read store %s", s->path)
                   : damaged_header(s->path, err);
        goto out;
    }
    c.n_pages = m.last_page + 1;
    c.n_file_pages = (uint64_t)st.st_size / c.page_bytes;
    c.used = (unsigned char *)tv_calloc((size_t)(c.n_file_pages / 8 + 1), 1);
    c.levels = (unsigned char *)tv_calloc(DEPTH_MAX + 1, c.page_bytes);
    if (c.used == NULL || c.levels == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "no memory to check store %s",
                          s->path);
        goto out;
    }
    c.list = c.levels + DEPTH_MAX * c.page_bytes;
    (void)check_snapshot(&c, &m);
    rc = verdict(&c, &m, err);
out:
    if (txn != NULL) {
        tv_lmdb()->txn_abort(txn);
        atomic_fetch_sub(&s->n_txns, 1);
    }
    tv_free(c.used);
    tv_free(c.levels);
    (void)tv_sys()->close(c.fd);
    return rc;
}
