/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_cat.c - tvstore cat: a tensor, or a slice of it, on stdout.
 *
 * A slice is a box: per dimension a range [lo, hi). Its elements in row-major
 * order are runs of `run_elems` contiguous elements; the run length is the
 * product of the trailing dimensions that are taken whole, times the range of
 * the one before them.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "elements.h"
#include "store_open.h"
#include "tensor_read.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tvstore.h"

enum format { FORMAT_TEXT = 0, FORMAT_RAW, FORMAT_NPY };

struct opts {
    enum format format;
    const char *slice;
    bool bits;
};

enum { KEY_FORMAT = 0x2000, KEY_SLICE, KEY_BITS };

static error_t option(struct tvc *c, int key, const char *arg)
{
    static const char *const words[] = {"text", "raw", "npy"};
    struct opts *o = c->opt;
    int i = 0;
    switch (key) {
    case KEY_FORMAT:
        i = tvc_choose(c, "--format", arg, words, 3);
        if (i < 0)
            return EINVAL;
        o->format = (enum format)i;
        return 0;
    case KEY_SLICE:
        o->slice = arg;
        return 0;
    case KEY_BITS:
        o->bits = true;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* ---- slices
 * -------------------------------------------------------------------- */

struct box {
    unsigned rank;
    uint64_t lo[TV_RANK_MAX], n[TV_RANK_MAX];
    uint64_t n_elems;
};

/* A bound as Python has it: negative counts from the end, the range clamps. */
static const char *parse_bound(const char *p, uint64_t dim, uint64_t fallback,
                               uint64_t *out)
{
    const bool negative = *p == '-';
    const char *digits = p + negative;
    uint64_t v = 0;
    const char *q = digits;
    for (; *q >= '0' && *q <= '9'; q++)
        if (!tv_mul_u64(v, 10, &v) || !tv_add_u64(v, (uint64_t)(*q - '0'), &v))
            v = UINT64_MAX / 16; /* beyond every dimension */
    if (q == digits) {
        if (negative)
            return NULL;
        *out = fallback;
        return p;
    }
    if (negative)
        *out = v > dim ? 0 : dim - v;
    else
        *out = v > dim ? dim : v;
    return q;
}

static enum tv_err parse_slice(const char *text, const struct tv_tensor *t,
                               struct box *b, struct tv_error *err)
{
    const char *p = text ? text : "";
    b->rank = t->rank;
    b->n_elems = 1;
    for (unsigned d = 0; d < t->rank; d++) {
        uint64_t hi = t->shape[d];
        b->lo[d] = 0;
        if (*p) {
            p = parse_bound(p, t->shape[d], 0, &b->lo[d]);
            if (!p || *p++ != ':')
                goto bad;
            p = parse_bound(p, t->shape[d], t->shape[d], &hi);
            if (!p || (*p && *p != ','))
                goto bad;
            if (*p == ',' && !*++p)
                goto bad;
        }
        b->n[d] = hi > b->lo[d] ? hi - b->lo[d] : 0;
        /* No overflow: the whole tensor has a checked size. */
        b->n_elems *= b->n[d];
    }
    if (!*p)
        return TV_OK;
    if (text && (strchr(p, ':') != NULL)) {
        (void)tv_error_set(err, TV_E_USAGE,
                           "--slice '%s' has more parts than the %u dimensions "
                           "of %s",
                           text, t->rank, t->name);
        return TV_E_USAGE;
    }
bad:
    (void)tv_error_set(err, TV_E_USAGE, "--slice: '%s' is not a slice", text);
    tv_error_hint(err, "slices look like 0:4 or 0:4,-8: (bounds as in Python)");
    return TV_E_USAGE;
}

/* ---- writing
 * ------------------------------------------------------------------- */

#define PIECE_ELEMS 65536u

struct sink {
    struct tvc *c;
    enum format format;
    bool bits;
    const struct tv_tensor *t;
    const struct tvc_element *e;
    uint64_t row_elems;   /* text: elements per line */
    uint64_t block_elems; /* text: elements between blank lines, 0: never */
    uint64_t written;
    unsigned char *bytes; /* PIECE_ELEMS elements */
    float *values;        /* npy of bf16 */
};

static void text_of(const struct sink *s, char dst[80], const unsigned char *p)
{
    if (!s->bits) {
        s->e->text(dst, p);
        return;
    }
    uint64_t v = 0;
    for (size_t i = 0; i < s->e->bytes; i++)
        v |= (uint64_t)p[i] << (8 * i);
    (void)snprintf(dst, 80, "%" PRIu64, v);
}

static void write_text(struct sink *s, size_t n)
{
    struct tvc_print *out = &s->c->out;
    for (size_t i = 0; i < n && tvc_out_open(out); i++) {
        char text[81];
        text_of(s, text, s->bytes + i * s->e->bytes);
        s->written++;
        const bool line = s->written % s->row_elems == 0;
        const size_t len = strlen(text);
        text[len] = line ? '\n' : ' ';
        tvc_out_bytes(out, text, len + 1);
        if (line && s->block_elems && s->written % s->block_elems == 0)
            tvc_out_bytes(out, "\n", 1);
    }
}

static void write_piece(struct sink *s, size_t n)
{
    struct tvc_print *out = &s->c->out;
    if (s->format == FORMAT_TEXT) {
        write_text(s, n);
    } else if (s->values) {
        s->c->kernels->bf16_to_f32(s->values, s->bytes, n);
        tvc_out_bytes(out, s->values, n * sizeof *s->values);
    } else {
        tvc_out_bytes(out, s->bytes, n * s->e->bytes);
    }
}

/* NumPy's format 1.0: the header is padded so that data starts at 64 bytes. */
static void write_npy_header(struct sink *s, const struct box *b)
{
    char shape[24 * TV_RANK_MAX + 8] = "";
    char text[512];
    unsigned char head[10] = "\x93NUMPY\x01";
    size_t at = 0;
    for (unsigned d = 0; d < b->rank; d++)
        at += (size_t)snprintf(shape + at, sizeof shape - at, "%s%" PRIu64 "%s",
                               d ? ", " : "", b->n[d], b->rank == 1 ? "," : "");
    int n = snprintf(text, sizeof text,
                     "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }",
                     s->bits ? s->e->npy_bits : s->e->npy, shape);
    while ((sizeof head + (size_t)n + 1) % 64 != 0)
        text[n++] = ' ';
    text[n++] = '\n';
    tv_put_le16(head + 8, (uint16_t)n);
    tvc_out_bytes(&s->c->out, head, sizeof head);
    tvc_out_bytes(&s->c->out, text, (size_t)n);
}

static enum tv_err write_run(struct sink *s, struct tvc_reader *r,
                             uint64_t first, uint64_t n, struct tv_error *err)
{
    while (n > 0 && tvc_out_open(&s->c->out)) {
        const size_t now = (size_t)(n < PIECE_ELEMS ? n : PIECE_ELEMS);
        const enum tv_err rc = tvc_reader_read(
            r, first * s->e->bytes, now * s->e->bytes, s->bytes, err);
        if (rc != TV_OK)
            return rc;
        write_piece(s, now);
        first += now;
        n -= now;
    }
    return TV_OK;
}

static enum tv_err write_box(struct sink *s, struct tvc_reader *r,
                             const struct box *b, struct tv_error *err)
{
    const uint64_t *shape = s->t->shape;
    uint64_t at[TV_RANK_MAX] = {0};
    uint64_t run_elems = 1;
    unsigned outer = b->rank; /* dimensions that are stepped through */

    if (b->n_elems == 0)
        return TV_OK;
    while (outer > 0) {
        outer--;
        run_elems *= b->n[outer];
        if (b->n[outer] != shape[outer])
            break;
    }
    for (;;) {
        uint64_t first = 0;
        for (unsigned d = 0; d < b->rank; d++)
            first = first * shape[d] + b->lo[d] + (d < outer ? at[d] : 0);
        const enum tv_err rc = write_run(s, r, first, run_elems, err);
        if (rc != TV_OK || !tvc_out_open(&s->c->out))
            return rc;
        unsigned d = outer;
        while (d > 0 && ++at[d - 1] == b->n[d - 1])
            at[--d] = 0;
        if (d == 0)
            return TV_OK;
    }
}

/* Elements that share bytes can only be copied whole. */
static enum tv_err write_packed(struct tvc *c, struct tvc_reader *r,
                                const struct tv_tensor *t, struct tv_error *err)
{
    const struct opts *o = c->opt;
    unsigned char piece[16384];
    if (o->format != FORMAT_RAW || o->slice) {
        (void)tv_error_set(err, TV_E_UNSUPPORTED,
                           "%s: elements of type %s are narrower than a byte",
                           t->name, tv_dtype_name(t->dtype));
        tv_error_hint(err, "--format raw without --slice copies the bytes");
        return TV_E_UNSUPPORTED;
    }
    for (uint64_t at = 0; at < t->bytes && tvc_out_open(&c->out);
         at += sizeof piece) {
        const uint64_t left = t->bytes - at;
        const uint64_t n = left < sizeof piece ? left : sizeof piece;
        const enum tv_err rc = tvc_reader_read(r, at, n, piece, err);
        if (rc != TV_OK)
            return rc;
        tvc_out_bytes(&c->out, piece, (size_t)n);
    }
    return TV_OK;
}

static enum tv_err sink_open(struct sink *s, const struct box *b,
                             struct tv_error *err)
{
    const unsigned rank = b->rank;
    if (s->format == FORMAT_NPY && !s->bits && !s->e->npy) {
        (void)tv_error_set(err, TV_E_UNSUPPORTED,
                           "%s: numpy has no type for %s", s->t->name,
                           tv_dtype_name(s->t->dtype));
        tv_error_hint(err, "--bits gives the bytes as unsigned integers");
        return TV_E_UNSUPPORTED;
    }
    s->row_elems = rank >= 2 ? b->n[rank - 1] : 1;
    s->block_elems = rank >= 3 ? b->n[rank - 1] * b->n[rank - 2] : 0;
    s->bytes = tv_alloc_aligned(PIECE_ELEMS * s->e->bytes);
    if (s->format == FORMAT_NPY && !s->bits && s->t->dtype == TV_BF16)
        s->values = tv_alloc_aligned(PIECE_ELEMS * sizeof *s->values);
    if (!s->bytes || (s->format == FORMAT_NPY && !s->bits &&
                      s->t->dtype == TV_BF16 && !s->values))
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    return TV_OK;
}

static enum tv_err cat(struct tvc *c, tv_read *read, const struct tv_tensor *t,
                       const char *what)
{
    const struct opts *o = c->opt;
    struct sink s = {.c = c,
                     .format = o->format,
                     .bits = o->bits,
                     .t = t,
                     .e = tvc_element(t->dtype)};
    struct tvc_reader r = {0};
    struct tv_view view = {0};
    struct box b = {0};
    enum tv_err rc = TV_OK;

    TV_TRY(parse_slice(o->slice, t, &b, &c->err));
    TV_TRY(tv_tensor_view(read, t, &c->err, &view));
    TV_TRY(tvc_reader_open(&r, &view, what, &c->err));
    if (s.e->bytes == 0) {
        rc = write_packed(c, &r, t, &c->err);
        goto out;
    }
    TV_TRY(sink_open(&s, &b, &c->err));
    if (s.format == FORMAT_NPY)
        write_npy_header(&s, &b);
    rc = write_box(&s, &r, &b, &c->err);
out:
    tv_free(s.values);
    tv_free(s.bytes);
    tvc_reader_close(&r);
    return rc;
}

static int run(struct tvc *c)
{
    tv_store *store = NULL;
    tv_read *read = NULL;
    struct tv_object *object = NULL;
    struct tv_tensor t;
    enum tv_err rc = TV_OK;
    bool found = false;
    char *name = tv_strdup(c->pos[1]);
    char *tensor = name ? strchr(name, '/') : NULL;

    if (c->out.json) {
        (void)tvc_bad(c, "cat prints data and has no --json");
        rc = c->err.code;
        goto out;
    }
    if (!name) {
        rc = tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (!tensor || !tensor[1]) {
        (void)tvc_bad(c, "'%s' does not name a tensor", c->pos[1]);
        tv_error_hint(&c->err, "write NAME/TENSOR");
        rc = c->err.code;
        goto out;
    }
    *tensor++ = '\0';
    TV_TRY(tvc_store_open(c, c->pos[0], true, &c->err, &store));
    TV_TRY(tv_read_begin(store, &c->err, &read));
    TV_TRY(tv_object_find(read, name, true, &c->err, &object));
    TV_TRY(tv_tensor_get(read, object->id, tensor, &found, &t, &c->err));
    if (!found) {
        struct tv_tensor_list *list = NULL;
        TV_TRY(tv_tensor_list(read, object->id, &c->err, &list));
        rc = tvc_no_tensor(c, name, tensor, list);
        tv_tensor_list_free(list);
        goto out;
    }
    rc = cat(c, read, &t, c->pos[1]);
out:
    tv_object_free(object);
    tv_read_end(read);
    tv_store_close(store);
    tv_free(name);
    return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
}

static const struct argp_option options[] = {
    {"format", KEY_FORMAT, "FORMAT", 0, "text, raw or npy (default: text)", 0},
    {"slice", KEY_SLICE, "A:B[,C:D]", 0,
     "Rows A to B, columns C to D, as Python slices", 0},
    {"bits", KEY_BITS, NULL, 0,
     "The stored bits as unsigned integers (npy of BF16: u16)", 0},
    {0}};

const struct tvc_command tvc_cmd_cat = {
    .name = "cat",
    .summary = "print a tensor or a slice of it",
    .args_doc = "STORE NAME/TENSOR",
    .text = "text: one line per row, numbers that read back exactly. raw: the "
            "stored\nbytes. npy: a NumPy file; BF16 becomes float32.",
    .examples =
        "tvstore cat models.tv base/model.norm.weight\n"
        "tvstore cat models.tv base/lm_head.weight --slice 0:4,-8:\n"
        "tvstore cat models.tv base/lm_head.weight --format npy > head.npy",
    .options = options,
    .opt_bytes = sizeof(struct opts),
    .option = option,
    .min_pos = 2,
    .max_pos = 2,
    .run = run,
};
