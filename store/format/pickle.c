/* SPDX-License-Identifier: Apache-2.0 */
/*
 * pickle.c - the pickle of a torch checkpoint, read without executing anything.
 *
 * A pickle is a program for a stack machine. This one knows the instructions
 * that torch.save of a state dict emits, and five callables that it does not
 * call but recognises: collections.OrderedDict, torch._utils
 * ._rebuild_tensor_v2, ._rebuild_parameter, and torch.*Storage inside a
 * persistent id. Every other instruction or name is refused by name. (torch's
 * own weights_only loader allows more, and was bypassed: CVE-2025-32434.)
 *
 * Values are nodes of one array; tuples, lists and dicts are chains of cells in
 * a second one. Every instruction makes at most one node and moves each stack
 * entry once, so memory and time are linear in the text. Nothing recurses;
 * containers that contain themselves are harmless.
 */
#include "tv/parse.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "json_util.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/format.h"

enum opcode {
    OP_MARK = '(',
    OP_STOP = '.',
    OP_BININT = 'J',
    OP_BININT1 = 'K',
    OP_BININT2 = 'M',
    OP_NONE = 'N',
    OP_BINPERSID = 'Q',
    OP_REDUCE = 'R',
    OP_BINUNICODE = 'X',
    OP_APPEND = 'a',
    OP_BUILD = 'b',
    OP_GLOBAL = 'c',
    OP_APPENDS = 'e',
    OP_BINGET = 'h',
    OP_LONG_BINGET = 'j',
    OP_EMPTY_LIST = ']',
    OP_BINPUT = 'q',
    OP_LONG_BINPUT = 'r',
    OP_SETITEM = 's',
    OP_TUPLE = 't',
    OP_EMPTY_TUPLE = ')',
    OP_SETITEMS = 'u',
    OP_EMPTY_DICT = '}',
    OP_PROTO = 0x80,
    OP_TUPLE1 = 0x85,
    OP_TUPLE2 = 0x86,
    OP_TUPLE3 = 0x87,
    OP_NEWTRUE = 0x88,
    OP_NEWFALSE = 0x89
};

enum kind {
    K_NONE,
    K_BOOL,
    K_INT,
    K_STR,
    K_TUPLE,
    K_LIST,
    K_DICT,
    K_ORDERED_DICT, /* the callable */
    K_REBUILD_TENSOR,
    K_REBUILD_PARAMETER,
    K_STORAGE_TYPE,
    K_STORAGE,
    K_TENSOR
};

struct node {
    enum kind kind;
    uint32_t depth; /* of tuples in tuples */
    union {
        int64_t i; /* BOOL, INT, STORAGE_TYPE (enum tv_dtype), TENSOR (index) */
        struct {
            uint32_t at, n; /* bytes of the pickle */
        } str;
        struct {
            uint32_t first, last, n; /* cells; a dict has key, value, ... */
        } seq;
        struct {
            uint64_t offset; /* byte in the file */
            uint32_t n_elems_lo, n_elems_hi;
            enum tv_dtype dtype;
        } storage;
    } u;
};

struct cell {
    uint32_t node;
    uint32_t next; /* NO_CELL at the end */
};

#define NO_CELL UINT32_MAX

struct tensor {
    enum tv_dtype dtype;
    unsigned rank;
    uint64_t shape[TV_RANK_MAX], stride[TV_RANK_MAX];
    uint64_t n_elems, bytes, offset, span;
    bool contiguous;
};

struct array { /* of uint32_t, nodes, cells or tensors */
    void *data;
    size_t n, cap, each;
};

struct vm {
    const unsigned char *code;
    size_t n_code, pc, op_at;
    const char *label;
    struct tv_error *err;
    tv_storage_fn find;
    void *find_arg;
    struct array nodes, cells, stack, memo, tensors;
    uint32_t marks[TV_PICKLE_DEPTH_MAX];
    size_t n_marks;
};

/* ---- arrays
 * ------------------------------------------------------------------ */

static enum tv_err array_add(struct vm *m, struct array *a, size_t max,
                             const void *value, const char *what)
{
    if (a->n == max)
        return tv_error_set(m->err, TV_E_CORRUPT,
                            "%s: pickle byte %zu: more than %zu %s", m->label,
                            m->op_at, max, what);
    if (a->n == a->cap) {
        const size_t cap = a->cap == 0 ? 64 : 2 * a->cap;
        void *grown = tv_realloc(a->data, cap * a->each);

        if (grown == NULL)
            return tv_error_set(m->err, TV_E_NOMEM, "%s: out of memory",
                                m->label);
        a->data = grown;
        a->cap = cap;
    }
    memcpy((char *)a->data + a->n * a->each, value, a->each);
    a->n++;
    return TV_OK;
}

static struct node *node_at(const struct vm *m, uint32_t i)
{
    return (struct node *)m->nodes.data + i;
}

static struct cell *cell_at(const struct vm *m, uint32_t i)
{
    return (struct cell *)m->cells.data + i;
}

static uint32_t *stack_at(const struct vm *m, size_t i)
{
    return (uint32_t *)m->stack.data + i;
}

/* ---- complaints
 * --------------------------------------------------------------- */

static enum tv_err bad(const struct vm *m, const char *what)
{
    return tv_error_set(m->err, TV_E_CORRUPT, "%s: pickle byte %zu: %s",
                        m->label, m->op_at, what);
}

static enum tv_err no_stack(const struct vm *m)
{
    return bad(m, "the stack is too short for this instruction");
}

/* ---- code
 * ---------------------------------------------------------------------- */

static enum tv_err fetch(struct vm *m, size_t n, const unsigned char **out)
{
    if (n > m->n_code - m->pc)
        return bad(m, "the pickle ends within an instruction");
    *out = m->code + m->pc;
    m->pc += n;
    return TV_OK;
}

/* ---- stack
 * ---------------------------------------------------------------------- */

static enum tv_err push(struct vm *m, uint32_t node)
{
    return array_add(m, &m->stack, TV_PICKLE_STACK_MAX, &node,
                     "values on the stack");
}

static enum tv_err push_new(struct vm *m, const struct node *v)
{
    const uint32_t at = (uint32_t)m->nodes.n;
    enum tv_err rc = array_add(m, &m->nodes, TV_PICKLE_NODES_MAX, v, "values");

    if (rc == TV_OK)
        rc = push(m, at);
    return rc;
}

static enum tv_err push_int(struct vm *m, enum kind kind, int64_t i)
{
    struct node v;

    memset(&v, 0, sizeof v);
    v.kind = kind;
    v.u.i = i;
    return push_new(m, &v);
}

static enum tv_err push_seq(struct vm *m, enum kind kind)
{
    struct node v;

    memset(&v, 0, sizeof v);
    v.kind = kind;
    v.u.seq.first = NO_CELL;
    v.u.seq.last = NO_CELL;
    return push_new(m, &v);
}

/* Lowest stack position that instructions may touch: above the last mark. */
static size_t floor_of(const struct vm *m)
{
    return m->n_marks == 0 ? 0 : m->marks[m->n_marks - 1];
}

static enum tv_err pop(struct vm *m, uint32_t *node)
{
    if (m->stack.n <= floor_of(m))
        return no_stack(m);
    m->stack.n--;
    *node = *stack_at(m, m->stack.n);
    return TV_OK;
}

static enum tv_err pop_mark(struct vm *m, size_t *from)
{
    if (m->n_marks == 0)
        return bad(m, "no MARK for this instruction");
    *from = m->marks[--m->n_marks];
    return TV_OK;
}

static enum tv_err seq_add(struct vm *m, uint32_t seq, uint32_t item)
{
    const struct cell c = {item, NO_CELL};
    const uint32_t at = (uint32_t)m->cells.n;
    struct node *v = NULL;
    enum tv_err rc = array_add(m, &m->cells, 2 * (size_t)TV_PICKLE_NODES_MAX,
                               &c, "container entries");

    if (rc != TV_OK)
        return rc;
    v = node_at(m, seq);
    if (v->u.seq.last == NO_CELL)
        v->u.seq.first = at;
    else
        cell_at(m, v->u.seq.last)->next = at;
    v->u.seq.last = at;
    v->u.seq.n++;
    return TV_OK;
}

/* The stack from position `from` becomes a tuple. */
static enum tv_err make_tuple(struct vm *m, size_t from)
{
    enum tv_err rc = TV_OK;
    const size_t n = m->stack.n - from;
    const uint32_t tuple = (uint32_t)m->nodes.n;
    uint32_t depth = 0;
    struct node v;

    memset(&v, 0, sizeof v);
    v.kind = K_TUPLE;
    v.u.seq.first = NO_CELL;
    v.u.seq.last = NO_CELL;
    TV_TRY(array_add(m, &m->nodes, TV_PICKLE_NODES_MAX, &v, "values"));
    for (size_t i = 0; i < n; i++) {
        const uint32_t item = *stack_at(m, from + i);

        if (node_at(m, item)->depth > depth)
            depth = node_at(m, item)->depth;
        TV_TRY(seq_add(m, tuple, item));
    }
    if (depth + 1 > TV_PICKLE_DEPTH_MAX)
        return bad(m, "tuples nested too deeply");
    node_at(m, tuple)->depth = depth + 1;
    m->stack.n = from;
    TV_TRY(push(m, tuple));
out:
    return rc;
}

/* Entries of a tuple or list into dst [cap]; false when there are more. */
static bool seq_read(const struct vm *m, uint32_t seq, uint32_t *dst,
                     size_t cap)
{
    const struct node *v = node_at(m, seq);
    uint32_t c = v->u.seq.first;

    if (v->u.seq.n > cap)
        return false;
    for (size_t i = 0; i < v->u.seq.n; i++) {
        dst[i] = cell_at(m, c)->node;
        c = cell_at(m, c)->next;
    }
    return true;
}

static bool str_is(const struct vm *m, uint32_t node, const char *s)
{
    const struct node *v = node_at(m, node);

    return v->kind == K_STR && v->u.str.n == strlen(s) &&
           memcmp(m->code + v->u.str.at, s, v->u.str.n) == 0;
}

/* Owned copy of a string without NUL. */
static enum tv_err str_copy(const struct vm *m, uint32_t node, char **out)
{
    const struct node *v = node_at(m, node);
    const char *s = (const char *)m->code + v->u.str.at;

    if (memchr(s, '\0', v->u.str.n) != NULL)
        return bad(m, "a name holds a NUL");
    *out = tv_strndup(s, v->u.str.n);
    if (*out == NULL)
        return tv_error_set(m->err, TV_E_NOMEM, "%s: out of memory", m->label);
    return TV_OK;
}

/* ---- names
 * ------------------------------------------------------------------------ */

static const struct {
    const char *name;
    enum kind kind;
    enum tv_dtype dtype;
} globals[] = {
    {"collections.OrderedDict", K_ORDERED_DICT, TV_DTYPE_NONE},
    {"torch._utils._rebuild_tensor_v2", K_REBUILD_TENSOR, TV_DTYPE_NONE},
    {"torch._utils._rebuild_parameter", K_REBUILD_PARAMETER, TV_DTYPE_NONE},
    {"torch.FloatStorage", K_STORAGE_TYPE, TV_F32},
    {"torch.DoubleStorage", K_STORAGE_TYPE, TV_F64},
    {"torch.HalfStorage", K_STORAGE_TYPE, TV_F16},
    {"torch.BFloat16Storage", K_STORAGE_TYPE, TV_BF16},
    {"torch.ByteStorage", K_STORAGE_TYPE, TV_U8},
    {"torch.CharStorage", K_STORAGE_TYPE, TV_I8},
    {"torch.ShortStorage", K_STORAGE_TYPE, TV_I16},
    {"torch.IntStorage", K_STORAGE_TYPE, TV_I32},
    {"torch.LongStorage", K_STORAGE_TYPE, TV_I64},
    {"torch.BoolStorage", K_STORAGE_TYPE, TV_BOOL},
    {"torch.ComplexFloatStorage", K_STORAGE_TYPE, TV_C64},
};

/* GLOBAL: "module\nname\n". */
static enum tv_err op_global(struct vm *m)
{
    char name[96];
    size_t n = 0;
    size_t lines = 0;
    struct tv_shown shown;

    while (lines < 2) {
        const unsigned char *c = NULL;
        const enum tv_err rc = fetch(m, 1, &c);

        if (rc != TV_OK)
            return rc;
        if (*c == '\n') {
            lines++;
            if (lines == 1 && n + 1 < sizeof name)
                name[n++] = '.';
        } else if (*c == '\0') {
            return bad(m, "a name holds a NUL");
        } else if (n + 1 < sizeof name) {
            name[n++] = (char)*c;
        } else {
            /* Longer than every name we know; its start is enough. */
            name[n] = '\0';
            return tv_error_set(m->err, TV_E_CORRUPT,
                                "%s: pickle byte %zu: refers to %s..., which "
                                "is not allowed in a checkpoint",
                                m->label, m->op_at, tv_show(name, &shown));
        }
    }
    name[n] = '\0';
    for (size_t i = 0; i < sizeof globals / sizeof *globals; i++) {
        if (strcmp(name, globals[i].name) == 0)
            return push_int(m, globals[i].kind, (int64_t)globals[i].dtype);
    }
    return tv_error_set(m->err, TV_E_CORRUPT,
                        "%s: pickle byte %zu: refers to %s, which is not "
                        "allowed in a checkpoint",
                        m->label, m->op_at, tv_show(name, &shown));
}

/* ---- storages and tensors
 * ----------------------------------------------------------- */

/* ("storage", TYPE, key, location, elements) */
static enum tv_err op_persid(struct vm *m)
{
    enum tv_err rc = TV_OK;
    uint32_t id = 0;
    uint32_t part[5] = {0};
    char *key = NULL;
    uint64_t offset = 0;
    uint64_t bytes = 0;
    uint64_t need = 0;
    uint64_t n_elems = 0;
    enum tv_dtype dtype = TV_DTYPE_NONE;
    struct node v;

    TV_TRY(pop(m, &id));
    if (node_at(m, id)->kind != K_TUPLE || node_at(m, id)->u.seq.n != 5 ||
        !seq_read(m, id, part, 5) || !str_is(m, part[0], "storage") ||
        node_at(m, part[1])->kind != K_STORAGE_TYPE ||
        node_at(m, part[2])->kind != K_STR ||
        node_at(m, part[3])->kind != K_STR ||
        node_at(m, part[4])->kind != K_INT || node_at(m, part[4])->u.i < 0) {
        rc = bad(m, "a persistent id that is no storage");
        goto out;
    }
    TV_TRY(str_copy(m, part[2], &key));
    dtype = (enum tv_dtype)node_at(m, part[1])->u.i;
    n_elems = (uint64_t)node_at(m, part[4])->u.i;
    if (!m->find(m->find_arg, key, &offset, &bytes)) {
        struct tv_shown shown;

        rc = tv_error_set(m->err, TV_E_CORRUPT,
                          "%s: pickle byte %zu: storage '%s' is not in the "
                          "file",
                          m->label, m->op_at, tv_show(key, &shown));
        goto out;
    }
    if (!tv_mul_u64(n_elems, tv_dtype_bits(dtype) / 8, &need) || need > bytes) {
        struct tv_shown shown;

        rc = tv_error_set(m->err, TV_E_CORRUPT,
                          "%s: pickle byte %zu: storage '%s' should have "
                          "%" PRIu64 " elements of %s, but has %" PRIu64
                          " bytes",
                          m->label, m->op_at, tv_show(key, &shown), n_elems,
                          tv_dtype_name(dtype), bytes);
        goto out;
    }
    memset(&v, 0, sizeof v);
    v.kind = K_STORAGE;
    v.u.storage.offset = offset;
    v.u.storage.n_elems_lo = (uint32_t)(n_elems & UINT32_MAX);
    v.u.storage.n_elems_hi = (uint32_t)(n_elems >> 32);
    v.u.storage.dtype = dtype;
    TV_TRY(push_new(m, &v));
out:
    tv_free(key);
    return rc;
}

static bool read_dims(const struct vm *m, uint32_t node, uint64_t *dst,
                      unsigned *rank)
{
    uint32_t part[TV_RANK_MAX];
    const struct node *v = node_at(m, node);

    if (v->kind != K_TUPLE || !seq_read(m, node, part, TV_RANK_MAX))
        return false;
    for (size_t i = 0; i < v->u.seq.n; i++) {
        const struct node *d = node_at(m, part[i]);

        if (d->kind != K_INT || d->u.i < 0)
            return false;
        dst[i] = (uint64_t)d->u.i;
    }
    *rank = v->u.seq.n;
    return true;
}

/* Row-major strides, dimensions of one element not counting. */
static bool is_contiguous(const struct tensor *t)
{
    uint64_t want = 1;

    if (t->n_elems == 0)
        return true;
    for (unsigned d = t->rank; d-- > 0;) {
        if (t->shape[d] == 1)
            continue;
        if (t->stride[d] != want)
            return false;
        want *= t->shape[d]; /* divides n_elems: no overflow */
    }
    return true;
}

/* args: (storage, offset, size, stride, requires_grad, hooks[, metadata]) */
static enum tv_err rebuild_tensor(struct vm *m, uint32_t args)
{
    enum tv_err rc = TV_OK;
    uint32_t part[7] = {0};
    const struct node *a = node_at(m, args);
    const struct node *s = NULL;
    struct tensor t;
    unsigned rank = 0;
    uint64_t begin = 0;
    uint64_t last = 0;
    uint64_t n_storage = 0;
    uint64_t width = 0;

    memset(&t, 0, sizeof t);
    if ((a->u.seq.n != 6 && a->u.seq.n != 7) || !seq_read(m, args, part, 7))
        return bad(m, "_rebuild_tensor_v2 with a wrong number of arguments");
    s = node_at(m, part[0]);
    if (s->kind != K_STORAGE || node_at(m, part[1])->kind != K_INT ||
        node_at(m, part[1])->u.i < 0 || node_at(m, part[4])->kind != K_BOOL)
        return bad(m, "_rebuild_tensor_v2 with wrong arguments");
    if (node_at(m, part[5])->kind != K_DICT ||
        node_at(m, part[5])->u.seq.n != 0)
        return bad(m, "a tensor with backward hooks");
    if (a->u.seq.n == 7 && node_at(m, part[6])->kind != K_NONE &&
        (node_at(m, part[6])->kind != K_DICT ||
         node_at(m, part[6])->u.seq.n != 0))
        return bad(m, "a tensor with metadata");
    if (!read_dims(m, part[2], t.shape, &t.rank) ||
        !read_dims(m, part[3], t.stride, &rank) || rank != t.rank)
        return bad(m, "a tensor whose size or stride is not a tuple of at "
                      "most 8 non-negative integers");
    t.dtype = s->u.storage.dtype;
    width = tv_dtype_bits(t.dtype) / 8;
    n_storage =
        (uint64_t)s->u.storage.n_elems_hi << 32 | s->u.storage.n_elems_lo;
    begin = (uint64_t)node_at(m, part[1])->u.i;
    rc = tv_shape_elems(t.shape, t.rank, &t.n_elems, m->err);
    if (rc == TV_OK)
        rc = tv_dtype_bytes(t.dtype, t.n_elems, &t.bytes, m->err);
    if (rc != TV_OK) {
        tv_error_context(m->err, "%s: pickle byte %zu", m->label, m->op_at);
        return rc;
    }
    if (t.n_elems == 0) {
        if (begin > n_storage)
            return bad(m, "a tensor outside its storage");
        last = begin;
    } else {
        last = begin;
        for (unsigned d = 0; d < t.rank; d++) {
            uint64_t step = 0;

            if (!tv_mul_u64(t.shape[d] - 1, t.stride[d], &step) ||
                !tv_add_u64(last, step, &last))
                return bad(m, "a tensor outside its storage");
        }
        if (last >= n_storage)
            return bad(m, "a tensor outside its storage");
    }
    t.contiguous = is_contiguous(&t);
    if (!t.contiguous && t.n_elems > n_storage)
        return bad(m, "a tensor that repeats its storage");
    t.offset = s->u.storage.offset + begin * width;
    t.span = t.n_elems == 0 ? 0 : (last - begin + 1) * width;
    {
        const int64_t index = (int64_t)m->tensors.n;

        TV_TRY(array_add(m, &m->tensors, TV_ST_TENSORS_MAX, &t, "tensors"));
        TV_TRY(push_int(m, K_TENSOR, index));
    }
out:
    return rc;
}

static enum tv_err op_reduce(struct vm *m)
{
    enum tv_err rc = TV_OK;
    uint32_t args = 0;
    uint32_t fn = 0;
    uint32_t part[3] = {0};

    TV_TRY(pop(m, &args));
    TV_TRY(pop(m, &fn));
    if (node_at(m, args)->kind != K_TUPLE)
        return bad(m, "REDUCE without an argument tuple");
    switch (node_at(m, fn)->kind) {
    case K_ORDERED_DICT:
        if (node_at(m, args)->u.seq.n != 0)
            return bad(m, "OrderedDict with arguments");
        TV_TRY(push_seq(m, K_DICT));
        break;
    case K_REBUILD_TENSOR:
        TV_TRY(rebuild_tensor(m, args));
        break;
    case K_REBUILD_PARAMETER:
        if (node_at(m, args)->u.seq.n != 3 || !seq_read(m, args, part, 3) ||
            node_at(m, part[0])->kind != K_TENSOR ||
            node_at(m, part[1])->kind != K_BOOL ||
            node_at(m, part[2])->kind != K_DICT ||
            node_at(m, part[2])->u.seq.n != 0)
            return bad(m, "_rebuild_parameter with wrong arguments");
        TV_TRY(push(m, part[0]));
        break;
    default:
        return bad(m, "REDUCE of something that is no allowed callable");
    }
out:
    return rc;
}

/* BUILD sets attributes. A state dict has one, _metadata (module versions),
 * which says nothing about weights: it is read and dropped. */
static enum tv_err op_build(struct vm *m)
{
    enum tv_err rc = TV_OK;
    uint32_t state = 0;
    uint32_t part[2] = {0};

    TV_TRY(pop(m, &state));
    if (m->stack.n <= floor_of(m))
        return no_stack(m);
    if (node_at(m, *stack_at(m, m->stack.n - 1))->kind != K_DICT ||
        node_at(m, state)->kind != K_DICT || node_at(m, state)->u.seq.n > 2 ||
        !seq_read(m, state, part, 2) ||
        (node_at(m, state)->u.seq.n == 2 && !str_is(m, part[0], "_metadata")))
        return bad(m, "BUILD of something other than a dict's _metadata");
out:
    return rc;
}

/* ---- the machine
 * ----------------------------------------------------------------------- */

static enum tv_err set_items(struct vm *m, size_t from, enum kind kind)
{
    enum tv_err rc = TV_OK;
    uint32_t into = 0;

    if (from <= floor_of(m) || from == 0)
        return no_stack(m);
    into = *stack_at(m, from - 1);
    if (node_at(m, into)->kind != kind)
        return bad(m, kind == K_DICT ? "items for something that is no dict"
                                     : "items for something that is no list");
    if (kind == K_DICT && (m->stack.n - from) % 2 != 0)
        return bad(m, "a dict key without a value");
    for (size_t i = from; i < m->stack.n; i++) {
        if (kind == K_DICT && (i - from) % 2 == 0 &&
            node_at(m, *stack_at(m, i))->kind != K_STR)
            return bad(m, "a dict key that is no string");
        TV_TRY(seq_add(m, into, *stack_at(m, i)));
    }
    m->stack.n = from;
out:
    return rc;
}

static enum tv_err put(struct vm *m, uint64_t index)
{
    uint32_t top = 0;

    if (m->stack.n <= floor_of(m))
        return no_stack(m);
    top = *stack_at(m, m->stack.n - 1);
    if (index < m->memo.n) {
        ((uint32_t *)m->memo.data)[index] = top;
        return TV_OK;
    }
    /* Every pickler numbers its memo in order: a gap is an attack on memory. */
    if (index > m->memo.n)
        return bad(m, "a memo number out of order");
    return array_add(m, &m->memo, TV_PICKLE_NODES_MAX, &top, "memo entries");
}

static enum tv_err get(struct vm *m, uint64_t index)
{
    if (index >= m->memo.n)
        return bad(m, "a memo number that was never set");
    return push(m, ((uint32_t *)m->memo.data)[index]);
}

static enum tv_err op_unicode(struct vm *m)
{
    enum tv_err rc = TV_OK;
    const unsigned char *p = NULL;
    uint32_t n = 0;
    struct node v;

    TV_TRY(fetch(m, 4, &p));
    n = tv_get_le32(p);
    TV_TRY(fetch(m, n, &p));
    if (!tv_utf8_valid((const char *)p, n))
        return bad(m, "a string that is not UTF-8");
    memset(&v, 0, sizeof v);
    v.kind = K_STR;
    v.u.str.at = (uint32_t)(p - m->code);
    v.u.str.n = n;
    TV_TRY(push_new(m, &v));
out:
    return rc;
}

static const char *opcode_name(unsigned char op, char *dst, size_t cap)
{
    /* Those an attacker or an unusual writer is likely to use. */
    static const struct {
        unsigned char op;
        const char *name;
    } known[] = {
        {'0', "POP"},
        {'1', "POP_MARK"},
        {'2', "DUP"},
        {'F', "FLOAT"},
        {'I', "INT"},
        {'L', "LONG"},
        {'P', "PERSID"},
        {'S', "STRING"},
        {'T', "BINSTRING"},
        {'U', "SHORT_BINSTRING"},
        {'V', "UNICODE"},
        {'i', "INST"},
        {'o', "OBJ"},
        {'d', "DICT"},
        {'l', "LIST"},
        {'g', "GET"},
        {'p', "PUT"},
        {'G', "BINFLOAT"},
        {'B', "BINBYTES"},
        {'C', "SHORT_BINBYTES"},
        {0x81, "NEWOBJ"},
        {0x82, "EXT1"},
        {0x83, "EXT2"},
        {0x84, "EXT4"},
        {0x8a, "LONG1"},
        {0x8b, "LONG4"},
        {0x8c, "SHORT_BINUNICODE"},
        {0x8d, "BINUNICODE8"},
        {0x8e, "BINBYTES8"},
        {0x8f, "EMPTY_SET"},
        {0x90, "ADDITEMS"},
        {0x91, "FROZENSET"},
        {0x92, "NEWOBJ_EX"},
        {0x93, "STACK_GLOBAL"},
        {0x94, "MEMOIZE"},
        {0x95, "FRAME"},
        {0x96, "BYTEARRAY8"},
        {0x97, "NEXT_BUFFER"},
        {0x98, "READONLY_BUFFER"},
    };
    struct tv_buf b;

    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (known[i].op == op)
            return known[i].name;
    }
    tv_buf_init(&b, cap);
    tv_buf_fmt(&b, "0x%02x", op);
    memcpy(dst, "?", 2);
    if (!b.failed && b.n_bytes < cap)
        memcpy(dst, b.data, b.n_bytes + 1);
    tv_buf_free(&b);
    return dst;
}

/* One instruction; *stop after STOP. */
static enum tv_err step(struct vm *m, bool *stop)
{
    enum tv_err rc = TV_OK;
    const unsigned char *p = NULL;
    size_t from = 0;
    unsigned char op = 0;
    char hex[8];

    m->op_at = m->pc;
    TV_TRY(fetch(m, 1, &p));
    op = *p;
    switch (op) {
    case OP_PROTO:
        TV_TRY(fetch(m, 1, &p));
        if (m->op_at != 0 || *p < 2 || *p > 5)
            rc = bad(m, "an unknown pickle protocol");
        break;
    case OP_STOP:
        *stop = true;
        break;
    case OP_MARK:
        if (m->n_marks == TV_PICKLE_DEPTH_MAX)
            return bad(m, "too many open MARKs");
        m->marks[m->n_marks++] = (uint32_t)m->stack.n;
        break;
    case OP_NONE:
        rc = push_int(m, K_NONE, 0);
        break;
    case OP_NEWTRUE:
    case OP_NEWFALSE:
        rc = push_int(m, K_BOOL, op == OP_NEWTRUE ? 1 : 0);
        break;
    case OP_BININT:
        TV_TRY(fetch(m, 4, &p));
        rc = push_int(m, K_INT, (int64_t)(int32_t)tv_get_le32(p));
        break;
    case OP_BININT1:
        TV_TRY(fetch(m, 1, &p));
        rc = push_int(m, K_INT, *p);
        break;
    case OP_BININT2:
        TV_TRY(fetch(m, 2, &p));
        rc = push_int(m, K_INT, tv_get_le16(p));
        break;
    case OP_BINUNICODE:
        rc = op_unicode(m);
        break;
    case OP_EMPTY_TUPLE:
        rc = make_tuple(m, m->stack.n);
        break;
    case OP_TUPLE1:
    case OP_TUPLE2:
    case OP_TUPLE3:
        from = (size_t)(op - OP_TUPLE1) + 1;
        if (m->stack.n - floor_of(m) < from)
            return no_stack(m);
        rc = make_tuple(m, m->stack.n - from);
        break;
    case OP_TUPLE:
        TV_TRY(pop_mark(m, &from));
        rc = make_tuple(m, from);
        break;
    case OP_EMPTY_LIST:
        rc = push_seq(m, K_LIST);
        break;
    case OP_EMPTY_DICT:
        rc = push_seq(m, K_DICT);
        break;
    case OP_APPEND:
        if (m->stack.n - floor_of(m) < 2)
            return no_stack(m);
        rc = set_items(m, m->stack.n - 1, K_LIST);
        break;
    case OP_SETITEM:
        if (m->stack.n - floor_of(m) < 3)
            return no_stack(m);
        rc = set_items(m, m->stack.n - 2, K_DICT);
        break;
    case OP_APPENDS:
    case OP_SETITEMS:
        TV_TRY(pop_mark(m, &from));
        rc = set_items(m, from, op == OP_APPENDS ? K_LIST : K_DICT);
        break;
    case OP_BINPUT:
        TV_TRY(fetch(m, 1, &p));
        rc = put(m, *p);
        break;
    case OP_LONG_BINPUT:
        TV_TRY(fetch(m, 4, &p));
        rc = put(m, tv_get_le32(p));
        break;
    case OP_BINGET:
        TV_TRY(fetch(m, 1, &p));
        rc = get(m, *p);
        break;
    case OP_LONG_BINGET:
        TV_TRY(fetch(m, 4, &p));
        rc = get(m, tv_get_le32(p));
        break;
    case OP_GLOBAL:
        rc = op_global(m);
        break;
    case OP_BINPERSID:
        rc = op_persid(m);
        break;
    case OP_REDUCE:
        rc = op_reduce(m);
        break;
    case OP_BUILD:
        rc = op_build(m);
        break;
    default:
        rc = tv_error_set(m->err, TV_E_CORRUPT,
                          "%s: pickle byte %zu: instruction %s is not allowed "
                          "in a checkpoint",
                          m->label, m->op_at, opcode_name(op, hex, sizeof hex));
        break;
    }
out:
    return rc;
}

/* ---- the result
 * ------------------------------------------------------------------------- */

struct key { /* of the root dict; borrowed from the pickle */
    const char *s;
    size_t n;
};

static int compare_key(const void *a, const void *b)
{
    const struct key *x = (const struct key *)a;
    const struct key *y = (const struct key *)b;
    const int c = memcmp(x->s, y->s, x->n < y->n ? x->n : y->n);

    return c != 0 ? c : (x->n > y->n) - (x->n < y->n);
}

/* A key costs two bytes once it is in the memo, its copy up to TV_NAME_MAX: so
 * the copies are only made when every key is there once, and then they take no
 * more than the strings in the pickle. */
static enum tv_err check_keys(struct vm *m, const struct node *root)
{
    enum tv_err rc = TV_OK;
    const size_t n = root->u.seq.n / 2;
    struct key *keys = NULL;
    size_t sum = 0;
    uint32_t c = root->u.seq.first;

    if (n > TV_ST_TENSORS_MAX)
        return tv_error_set(m->err, TV_E_CORRUPT,
                            "%s: %zu tensors, the limit is %u", m->label, n,
                            TV_ST_TENSORS_MAX);
    keys = (struct key *)tv_calloc(n + 1, sizeof *keys);
    if (keys == NULL)
        return tv_error_set(m->err, TV_E_NOMEM, "%s: out of memory", m->label);
    for (size_t i = 0; i < n; i++) {
        const struct node *key = node_at(m, cell_at(m, c)->node);

        keys[i].s = (const char *)m->code + key->u.str.at;
        keys[i].n = key->u.str.n;
        sum += keys[i].n;
        if (keys[i].n == 0 || keys[i].n > TV_NAME_MAX) {
            rc = tv_error_set(m->err, TV_E_CORRUPT,
                              "%s: a tensor name is empty or too long",
                              m->label);
            goto out;
        }
        c = cell_at(m, cell_at(m, c)->next)->next;
    }
    qsort(keys, n, sizeof *keys, compare_key);
    for (size_t i = 1; i < n; i++) {
        char name[TV_NAME_MAX + 1];
        struct tv_shown shown;

        if (compare_key(&keys[i - 1], &keys[i]) != 0)
            continue;
        memcpy(name, keys[i].s, keys[i].n);
        name[keys[i].n] = '\0';
        rc = tv_error_set(m->err, TV_E_CORRUPT, "%s: tensor '%s' occurs twice",
                          m->label, tv_show(name, &shown));
        goto out;
    }
    if (sum > m->n_code)
        rc = bad(m, "tensor names that are longer than the pickle");
out:
    tv_free(keys);
    return rc;
}

static enum tv_err collect(struct vm *m, struct tv_parsed_file *p)
{
    enum tv_err rc = TV_OK;
    const struct node *root = NULL;
    uint32_t c = NO_CELL;

    if (m->n_marks != 0 || m->stack.n != 1)
        return bad(m, "STOP with other values left on the stack");
    root = node_at(m, *stack_at(m, 0));
    if (root->kind != K_DICT)
        return bad(m, "the pickle does not hold a dict of tensors");
    TV_TRY(check_keys(m, root));
    p->items = (struct tv_parsed_tensor *)tv_calloc(root->u.seq.n / 2 + 1,
                                                    sizeof *p->items);
    if (p->items == NULL)
        return tv_error_set(m->err, TV_E_NOMEM, "%s: out of memory", m->label);
    c = root->u.seq.first;
    while (c != NO_CELL) {
        const uint32_t key = cell_at(m, c)->node;
        const uint32_t value = cell_at(m, cell_at(m, c)->next)->node;
        struct tv_parsed_tensor *t = &p->items[p->n];
        const struct tensor *from = NULL;
        struct tv_shown shown;

        c = cell_at(m, cell_at(m, c)->next)->next;
        TV_TRY(str_copy(m, key, &t->name));
        p->n++;
        if (node_at(m, value)->kind != K_TENSOR) {
            rc = tv_error_set(m->err, TV_E_CORRUPT,
                              "%s: entry '%s' is not a tensor (only a flat "
                              "state dict is a checkpoint)",
                              m->label, tv_show(t->name, &shown));
            goto out;
        }
        from = (const struct tensor *)m->tensors.data + node_at(m, value)->u.i;
        t->dtype = from->dtype;
        t->rank = from->rank;
        memcpy(t->shape, from->shape, sizeof t->shape);
        memcpy(t->stride, from->stride, sizeof t->stride);
        t->contiguous = from->contiguous;
        t->n_elems = from->n_elems;
        t->bytes = from->bytes;
        t->offset = from->offset;
        t->span = from->span;
    }
out:
    return rc;
}

static int compare_offset(const void *a, const void *b)
{
    const struct tv_parsed_tensor *x = (const struct tv_parsed_tensor *)a;
    const struct tv_parsed_tensor *y = (const struct tv_parsed_tensor *)b;

    if (x->offset != y->offset)
        return x->offset < y->offset ? -1 : 1;
    return strcmp(x->name, y->name);
}

enum tv_err tv_pickle_parse(const void *data, size_t n, const char *label,
                            tv_storage_fn find, void *arg, struct tv_error *err,
                            struct tv_parsed_file **out)
{
    enum tv_err rc = TV_OK;
    struct tv_parsed_file *p = NULL;
    bool stop = false;
    struct vm m;

    memset(&m, 0, sizeof m);
    *out = NULL;
    m.code = (const unsigned char *)data;
    m.n_code = n;
    m.label = label;
    m.err = err;
    m.find = find;
    m.find_arg = arg;
    m.nodes.each = sizeof(struct node);
    m.cells.each = sizeof(struct cell);
    m.stack.each = sizeof(uint32_t);
    m.memo.each = sizeof(uint32_t);
    m.tensors.each = sizeof(struct tensor);
    if (n > TV_PICKLE_MAX) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "%s: a pickle of %zu bytes, the limit is %u", label,
                          n, TV_PICKLE_MAX);
        goto out;
    }
    while (!stop)
        TV_TRY(step(&m, &stop));
    p = (struct tv_parsed_file *)tv_calloc(1, sizeof *p);
    if (p == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "%s: out of memory", label);
        goto out;
    }
    TV_TRY(collect(&m, p));
    qsort(p->items, p->n, sizeof *p->items, compare_offset);
    *out = p;
    p = NULL;
out:
    tv_free(m.nodes.data);
    tv_free(m.cells.data);
    tv_free(m.stack.data);
    tv_free(m.memo.data);
    tv_free(m.tensors.data);
    tv_parsed_free(p);
    return rc;
}
