/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_mask.c - tvstore mask ls, info, overlap: what merges have kept to save
 * work.
 *
 * A set is the masks of one donor against one base at one density, over all
 * tensors; it is named by the hex digits of its number, of which the first few
 * are enough.
 */
#include <inttypes.h>
#include <string.h>

#include "store_open.h"
#include "tv/alloc.h"
#include "tv/derived.h"
#include "tv/text.h"
#include "tvstore.h"

struct set { /* items [from, to) of the list */
    uint64_t id;
    const char *about;
    size_t from, to;
    uint64_t n_masks, n_vectors, elems, kept, bytes, vector_bytes;
};

struct sets {
    tv_store *store;
    tv_read *read;
    struct tv_derived_list *list;
    struct set *all;
    size_t n;
};

static double ratio(uint64_t a, uint64_t b)
{
    return b ? (double)a / (double)b : 0;
}

static void add_item(struct set *s, const struct tv_derived *d)
{
    if (d->key.kind == TV_DELTA) {
        s->n_vectors++;
        s->vector_bytes += d->bytes;
        return;
    }
    s->n_masks++;
    s->elems += d->n_elems;
    s->kept += d->n_set;
    s->bytes += d->bytes;
}

static void sets_close(struct sets *s)
{
    tv_free(s->all);
    tv_derived_list_free(s->list);
    tv_read_end(s->read);
    tv_store_close(s->store);
}

static enum tv_err sets_open(struct tvc *c, const char *path, struct sets *s)
{
    enum tv_err rc = TV_OK;
    TV_TRY(tvc_store_open(c, path, true, &c->err, &s->store));
    TV_TRY(tv_read_begin(s->store, &c->err, &s->read));
    TV_TRY(tv_derived_list(s->read, &c->err, &s->list));
    s->all = tv_calloc(s->list->n + 1, sizeof *s->all);
    if (!s->all) {
        rc = tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < s->list->n; i++) {
        const struct tv_derived *d = &s->list->items[i];
        if (d->key.kind == TV_STAT)
            continue; /* in groups of their own */
        if (s->n == 0 || s->all[s->n - 1].id != d->group)
            s->all[s->n++] =
                (struct set){.id = d->group, .about = d->about, .from = i};
        s->all[s->n - 1].to = i + 1;
        add_item(&s->all[s->n - 1], d);
    }
out:
    return rc;
}

static const char *id_of(const struct set *s, char dst[17])
{
    (void)snprintf(dst, 17, "%016" PRIx64, s->id);
    return dst;
}

/* What a set's document says, as a new reference. */
static json_t *about_json(const struct set *s)
{
    json_t *doc = json_loads(s->about, 0, NULL);
    return doc ? doc : json_object();
}

static json_t *set_json(const struct set *s)
{
    char id[17];
    return json_pack("{s:s, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o}", "id",
                     id_of(s, id), "about", about_json(s), "n_tensors",
                     tvc_json_u64(s->n_masks), "elements",
                     tvc_json_u64(s->elems), "kept", tvc_json_u64(s->kept),
                     "density", tvc_json_real(ratio(s->kept, s->elems)),
                     "bytes", tvc_json_u64(s->bytes), "bits_per_weight",
                     tvc_json_real(8 * ratio(s->bytes, s->elems)),
                     "n_task_vectors", tvc_json_u64(s->n_vectors),
                     "task_vector_bytes", tvc_json_u64(s->vector_bytes));
}

/* One member of the document as text. */
static const char *about_text(const json_t *doc, const char *key, char *dst,
                              size_t cap)
{
    const json_t *v = json_object_get(doc, key);
    if (json_is_string(v))
        (void)snprintf(dst, cap, "%s", json_string_value(v));
    else if (json_is_number(v))
        (void)snprintf(dst, cap, "%g", json_number_value(v));
    else
        (void)snprintf(dst, cap, "-");
    return dst;
}

/* ---- ls -------------------------------------------------------------------
 */

static enum tv_err ls_table(struct tvc *c, const struct sets *s)
{
    static const char *const headers[] = {
        "SET",     "DONOR", "BASE",        "DENSITY",     "TENSORS",
        "WEIGHTS", "SIZE",  "BITS/WEIGHT", "TASK VECTORS"};
    struct tvc_table t;
    tvc_table_begin(&t, "lllrrrrrr", headers);
    for (size_t i = 0; i < s->n; i++) {
        const struct set *x = &s->all[i];
        json_t *doc = about_json(x);
        char text[128], id[17], a[32];
        tvc_table_cell(&t, "%.8s", id_of(x, id));
        tvc_table_cell(&t, "%s", about_text(doc, "donor", text, sizeof text));
        tvc_table_cell(&t, "%s", about_text(doc, "base", text, sizeof text));
        tvc_table_cell(&t, "%.4f", ratio(x->kept, x->elems));
        tvc_table_cell(&t, "%" PRIu64, x->n_masks);
        tvc_table_cell(&t, "%s", tvc_count(x->elems, a, sizeof a));
        tvc_table_cell(&t, "%s", tv_format_bytes(x->bytes, a, sizeof a));
        tvc_table_cell(&t, "%.3f", 8 * ratio(x->bytes, x->elems));
        tvc_table_cell(
            &t, "%s",
            x->n_vectors ? tv_format_bytes(x->vector_bytes, a, sizeof a) : "-");
        json_decref(doc);
    }
    return tvc_table_end(&c->out, &t, &c->err);
}

static enum tv_err run_ls(struct tvc *c, const struct sets *s)
{
    char id[17];
    if (!c->out.json && !c->out.quiet)
        return ls_table(c, s);
    json_t *list = json_array();
    for (size_t i = 0; i < s->n; i++) {
        if (c->out.json)
            (void)json_array_append_new(list, set_json(&s->all[i]));
        else
            tvc_out(&c->out, "%s\n", id_of(&s->all[i], id));
    }
    if (c->out.json)
        tvc_out_json(&c->out, json_pack("{s:s, s:o}", "schema",
                                        "tvstore.mask.ls/1", "sets", list));
    else
        json_decref(list);
    return TV_OK;
}

/* ---- info -----------------------------------------------------------------
 */

/* The one set that a prefix of its number, or its donor, names. */
static enum tv_err pick(struct tvc *c, const struct sets *s, const char *name,
                        const struct set **out)
{
    size_t n = 0;
    for (size_t i = 0; i < s->n; i++) {
        json_t *doc = about_json(&s->all[i]);
        char id[17], donor[4096];
        if (!name || strncmp(id_of(&s->all[i], id), name, strlen(name)) == 0 ||
            strcmp(about_text(doc, "donor", donor, sizeof donor), name) == 0) {
            *out = &s->all[i];
            n++;
        }
        json_decref(doc);
    }
    if (n == 1)
        return TV_OK;
    if (n == 0)
        (void)tv_error_set(&c->err, TV_E_NOTFOUND,
                           name ? "no set of masks '%s' in store %s"
                                : "no masks%s in store %s",
                           name ? name : "", tv_store_path(s->store));
    else
        (void)tv_error_set(&c->err, TV_E_USAGE,
                           "%zu sets of masks%s%s: name one by its number", n,
                           name ? " match " : "", name ? name : "");
    tv_error_hint(&c->err, "'tvstore mask ls %s' lists them",
                  tv_store_path(s->store));
    return c->err.code;
}

/* Bytes of the task vector of the same tensor. */
static uint64_t vector_of(const struct sets *s, const struct set *x,
                          const struct tv_derived *mask)
{
    for (size_t i = x->from; i < x->to; i++) {
        const struct tv_derived *d = &s->list->items[i];
        if (d->key.kind == TV_DELTA &&
            tv_hash_equal(d->key.score, mask->key.score) &&
            strcmp(d->key.tensor, mask->key.tensor) == 0)
            return d->bytes;
    }
    return 0;
}

static enum tv_err containers_of(struct tvc *c, const struct sets *s,
                                 const struct tv_derived *d, uint64_t n[3])
{
    enum tv_err rc = TV_OK;
    tv_mask *m = NULL;
    bool found = false;
    n[0] = n[1] = n[2] = 0;
    TV_TRY(tv_mask_open(s->read, d->key.score, d->key.tensor, &found, &c->err,
                        &m));
    if (found)
        tv_mask_containers(m, n);
out:
    tv_mask_close(m);
    return rc;
}

static enum tv_err info_table(struct tvc *c, const struct sets *s,
                              const struct set *x)
{
    static const char *const headers[] = {
        "NAME",  "WEIGHTS",     "KEPT",       "DENSITY",
        "BYTES", "BITS/WEIGHT", "TASK VECTOR"};
    struct tvc_table t;
    tvc_table_begin(&t, "lrrrrrr", headers);
    for (size_t i = x->from; i < x->to; i++) {
        const struct tv_derived *d = &s->list->items[i];
        if (d->key.kind != TV_MASK)
            continue;
        const uint64_t vector = vector_of(s, x, d);
        tvc_table_cell(&t, "%s", d->key.tensor);
        tvc_table_cell(&t, "%" PRIu64, d->n_elems);
        tvc_table_cell(&t, "%" PRIu64, d->n_set);
        tvc_table_cell(&t, "%.4f", ratio(d->n_set, d->n_elems));
        tvc_table_cell(&t, "%" PRIu64, d->bytes);
        tvc_table_cell(&t, "%.3f", 8 * ratio(d->bytes, d->n_elems));
        if (vector)
            tvc_table_cell(&t, "%" PRIu64, vector);
        else
            tvc_table_cell(&t, "-");
    }
    return tvc_table_end(&c->out, &t, &c->err);
}

static enum tv_err run_info(struct tvc *c, const struct sets *s)
{
    enum tv_err rc = TV_OK;
    const struct set *x = NULL;
    json_t *list = NULL;
    TV_TRY(pick(c, s, c->n_pos > 2 ? c->pos[2] : NULL, &x));
    if (!c->out.json)
        return info_table(c, s, x);
    list = json_array();
    for (size_t i = x->from; i < x->to; i++) {
        const struct tv_derived *d = &s->list->items[i];
        uint64_t n[3];
        if (d->key.kind != TV_MASK)
            continue;
        TV_TRY(containers_of(c, s, d, n));
        (void)json_array_append_new(
            list,
            json_pack("{s:o, s:o, s:o, s:o, s:o, s:o, s:{s:o, s:o, s:o}, s:o, "
                      "s:b}",
                      "name", tvc_json_string(d->key.tensor), "elements",
                      tvc_json_u64(d->n_elems), "kept", tvc_json_u64(d->n_set),
                      "density", tvc_json_real(ratio(d->n_set, d->n_elems)),
                      "bytes", tvc_json_u64(d->bytes), "bits_per_weight",
                      tvc_json_real(8 * ratio(d->bytes, d->n_elems)),
                      "containers", "bitset", tvc_json_u64(n[0]), "array",
                      tvc_json_u64(n[1]), "run", tvc_json_u64(n[2]),
                      "task_vector_bytes", tvc_json_u64(vector_of(s, x, d)),
                      "pinned", d->pinned));
    }
    tvc_out_json(&c->out,
                 json_pack("{s:s, s:o, s:o}", "schema", "tvstore.mask.info/1",
                           "set", set_json(x), "tensors", list));
    list = NULL;
out:
    json_decref(list);
    return rc;
}

/* ---- overlap --------------------------------------------------------------
 */

struct overlap {
    uint64_t both, either;
    size_t n_tensors;
};

static const struct tv_derived *same_tensor(const struct sets *s,
                                            const struct set *in,
                                            const struct tv_derived *like)
{
    for (size_t i = in->from; i < in->to; i++) {
        const struct tv_derived *d = &s->list->items[i];
        if (d->key.kind == TV_MASK && d->n_elems == like->n_elems &&
            strcmp(d->key.tensor, like->key.tensor) == 0)
            return d;
    }
    return NULL;
}

static enum tv_err overlap_of(struct tvc *c, const struct sets *s,
                              const struct tv_derived *x,
                              const struct tv_derived *y, uint64_t *both)
{
    enum tv_err rc = TV_OK;
    tv_mask *a = NULL;
    tv_mask *b = NULL;
    bool found = false;
    *both = 0;
    TV_TRY(tv_mask_open(s->read, x->key.score, x->key.tensor, &found, &c->err,
                        &a));
    TV_TRY(tv_mask_open(s->read, y->key.score, y->key.tensor, &found, &c->err,
                        &b));
    if (a && b)
        *both = tv_mask_and(a, b);
out:
    tv_mask_close(a);
    tv_mask_close(b);
    return rc;
}

/* tensors: array to append to, or NULL. */
static enum tv_err overlap_sets(struct tvc *c, const struct sets *s,
                                const struct set *a, const struct set *b,
                                struct overlap *out, json_t *tensors)
{
    enum tv_err rc = TV_OK;
    *out = (struct overlap){.both = 0};
    for (size_t i = a->from; i < a->to; i++) {
        const struct tv_derived *x = &s->list->items[i];
        uint64_t both = 0;
        if (x->key.kind != TV_MASK)
            continue;
        const struct tv_derived *y = same_tensor(s, b, x);
        if (!y)
            continue;
        TV_TRY(overlap_of(c, s, x, y, &both));
        const uint64_t either = x->n_set + y->n_set - both;
        out->both += both;
        out->either += either;
        out->n_tensors++;
        if (tensors)
            (void)json_array_append_new(
                tensors,
                json_pack("{s:o, s:o, s:o, s:o}", "name",
                          tvc_json_string(x->key.tensor), "both",
                          tvc_json_u64(both), "either", tvc_json_u64(either),
                          "jaccard", tvc_json_real(ratio(both, either))));
    }
out:
    return rc;
}

static void pair_row(struct tvc_table *t, const struct set *a,
                     const struct set *b, const struct overlap *o)
{
    char id[17], x[32];
    tvc_table_cell(t, "%.8s", id_of(a, id));
    tvc_table_cell(t, "%.8s", id_of(b, id));
    tvc_table_cell(t, "%zu", o->n_tensors);
    tvc_table_cell(t, "%s", tvc_count(o->both, x, sizeof x));
    tvc_table_cell(t, "%s", tvc_count(o->either, x, sizeof x));
    tvc_table_cell(t, "%.4f", ratio(o->both, o->either));
}

static json_t *pair_json(const struct set *a, const struct set *b,
                         const struct overlap *o, json_t *tensors)
{
    char x[17], y[17];
    return json_pack(
        "{s:s, s:s, s:o, s:o, s:o, s:o, s:o}", "a", id_of(a, x), "b",
        id_of(b, y), "n_tensors", tvc_json_u64(o->n_tensors), "both",
        tvc_json_u64(o->both), "either", tvc_json_u64(o->either), "jaccard",
        tvc_json_real(ratio(o->both, o->either)), "tensors", tensors);
}

static enum tv_err run_overlap(struct tvc *c, const struct sets *s)
{
    static const char *const headers[] = {"A",    "B",      "TENSORS",
                                          "BOTH", "EITHER", "JACCARD"};
    enum tv_err rc = TV_OK;
    const struct set *one = NULL;
    const struct set *two = NULL;
    struct tvc_table t;
    json_t *pairs = json_array();
    json_t *tensors = NULL;
    tvc_table_begin(&t, "llrrrr", headers);
    if (c->n_pos > 2)
        TV_TRY(pick(c, s, c->pos[2], &one));
    if (c->n_pos > 3)
        TV_TRY(pick(c, s, c->pos[3], &two));
    for (size_t i = 0; i < s->n; i++)
        for (size_t k = i + 1; k < s->n; k++) {
            const struct set *a = &s->all[i];
            const struct set *b = &s->all[k];
            struct overlap o;
            if ((one && one != a && one != b) || (two && two != a && two != b))
                continue;
            tensors = c->out.json ? json_array() : NULL;
            TV_TRY(overlap_sets(c, s, a, b, &o, tensors));
            if (c->out.json)
                (void)json_array_append_new(pairs,
                                            pair_json(a, b, &o, tensors));
            else
                pair_row(&t, a, b, &o);
            tensors = NULL;
        }
    if (c->out.json) {
        tvc_out_json(&c->out,
                     json_pack("{s:s, s:o}", "schema", "tvstore.mask.overlap/1",
                               "pairs", pairs));
        pairs = NULL;
        tvc_table_free(&t);
    } else {
        rc = tvc_table_end(&c->out, &t, &c->err);
    }
    json_decref(pairs);
    return rc;
out:
    tvc_table_free(&t);
    json_decref(tensors);
    json_decref(pairs);
    return rc;
}

/* ---- the command ----------------------------------------------------------
 */

static int run(struct tvc *c)
{
    static const struct {
        const char *name;
        size_t max_pos;
        enum tv_err (*fn)(struct tvc *, const struct sets *);
    } actions[] = {
        {"ls", 2, run_ls}, {"info", 3, run_info}, {"overlap", 4, run_overlap}};
    static const char *const names[] = {"ls", "info", "overlap", NULL};
    struct sets s = {.n = 0};
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < sizeof actions / sizeof *actions; i++) {
        if (strcmp(c->pos[0], actions[i].name) != 0)
            continue;
        if (c->n_pos > actions[i].max_pos) {
            (void)tvc_bad(c, "mask %s takes at most %zu arguments",
                          actions[i].name, actions[i].max_pos - 1);
            return tvc_fail(c, &c->err);
        }
        rc = sets_open(c, c->pos[1], &s);
        if (rc == TV_OK)
            rc = actions[i].fn(c, &s);
        sets_close(&s);
        return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
    }
    (void)tvc_bad(c, "mask: '%s' is not known; ls, info and overlap are",
                  c->pos[0]);
    const char *near = tv_suggest(c->pos[0], names, 3);
    if (near)
        tv_error_hint(&c->err, "did you mean '%s'?", near);
    return tvc_fail(c, &c->err);
}

const struct tvc_command tvc_cmd_mask = {
    .name = "mask",
    .summary = "show the masks that merges have kept",
    .args_doc = "ls STORE\ninfo STORE [SET]\noverlap STORE [SET [SET]]",
    .text = "A merge that is given a store keeps there which elements of a "
            "task vector it\nhas found to be the largest, one set per donor, "
            "base and density; later merges\nuse them. 'info' shows the "
            "density per tensor, 'overlap' the Jaccard index of\npairs of "
            "sets. SET is the beginning of its number, or its donor.",
    .examples = "tvstore mask ls models.tv\n"
                "tvstore mask info models.tv 3fa9\n"
                "tvstore mask overlap models.tv --json",
    .min_pos = 2,
    .max_pos = 4,
    .run = run,
};
