/* SPDX-License-Identifier: Apache-2.0 */
/*
 * cmd_list.c - tvstore ls and info: what is in a store.
 */
#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "progress.h"
#include "store_open.h"
#include "tensor_read.h"
#include "adapter_info.h"
#include "tv/alloc.h"
#include "tv/model.h"
#include "tv/text.h"
#include "tvstore.h"

struct opts {
    const char *layer;
    bool stats, digest;
};

enum { KEY_LAYER = 0x2000, KEY_STATS, KEY_DIGEST };

static error_t option(struct tvc *c, int key, const char *arg)
{
    struct opts *o = c->opt;
    switch (key) {
    case KEY_LAYER:
        o->layer = arg;
        return 0;
    case KEY_STATS:
        o->stats = true;
        return 0;
    case KEY_DIGEST:
        o->digest = true;
        return 0;
    default:
        return ARGP_ERR_UNKNOWN;
    }
}

/* A prefix that ends in a number means that number: layers.1 is not
 * layers.10. */
static bool has_prefix(const char *name, const char *prefix)
{
    const size_t n = strlen(prefix);
    if (strncmp(name, prefix, n) != 0)
        return false;
    if (n == 0)
        return true;
    const char last = prefix[n - 1];
    const char next = name[n];
    return !(last >= '0' && last <= '9' && next >= '0' && next <= '9');
}

static const char *storage_name(enum tv_storage s)
{
    return s == TV_LINKED ? "linked" : "inline";
}

static json_t *shape_json(const uint64_t *shape, unsigned rank)
{
    json_t *a = json_array();
    for (unsigned i = 0; a && i < rank; i++)
        (void)json_array_append_new(a, tvc_json_u64(shape[i]));
    return a;
}

static json_t *checksum_json(const struct tv_tensor *t)
{
    char hex[33];
    return t->checksum_known ? json_string(tv_hash_hex(t->checksum, hex))
                             : json_null();
}

static json_t *tensor_json(const struct tv_tensor *t)
{
    return json_pack("{s:o, s:s, s:o, s:o, s:o, s:s}", "name",
                     tvc_json_string(t->name), "dtype", tv_dtype_name(t->dtype),
                     "shape", shape_json(t->shape, t->rank), "bytes",
                     tvc_json_u64(t->bytes), "checksum", checksum_json(t),
                     "storage", storage_name(t->storage));
}

/* ---- ls: objects
 * ---------------------------------------------------------------- */

static enum tv_err objects_table(struct tvc *c, struct tv_object **all,
                                 size_t n)
{
    static const char *const headers[] = {"NAME",    "KIND", "ARCHITECTURE",
                                          "TENSORS", "SIZE", "STATE"};
    struct tvc_table t;
    tvc_table_begin(&t, "lllrrl", headers);
    for (size_t i = 0; i < n; i++) {
        const struct tv_object *o = all[i];
        char bytes[32];
        tvc_table_cell(&t, "%s", o->name);
        tvc_table_cell(&t, "%s", tv_kind_name(o->kind));
        tvc_table_cell(&t, "%s", *o->architecture ? o->architecture : "-");
        tvc_table_cell(&t, "%" PRIu64, o->n_tensors);
        tvc_table_cell(&t, "%s",
                       tv_format_bytes(o->bytes, bytes, sizeof bytes));
        tvc_table_cell(&t, "%s%s", o->complete ? "complete" : "unfinished",
                       o->linked ? ", linked" : "");
    }
    return tvc_table_end(&c->out, &t, &c->err);
}

static enum tv_err ls_objects(struct tvc *c, tv_read *read)
{
    struct tv_object **all = NULL;
    size_t n = 0;
    enum tv_err rc = tv_object_list(read, true, &c->err, &all, &n);
    if (rc != TV_OK)
        return rc;
    if (c->out.json) {
        json_t *list = json_array();
        for (size_t i = 0; i < n; i++)
            (void)json_array_append_new(list, tvc_object_json(all[i]));
        tvc_out_json(&c->out, json_pack("{s:s, s:o}", "schema", "tvstore.ls/1",
                                        "objects", list));
    } else if (c->out.quiet) {
        for (size_t i = 0; i < n; i++)
            tvc_out(&c->out, "%s\n", all[i]->name);
    } else {
        rc = objects_table(c, all, n);
    }
    for (size_t i = 0; i < n; i++)
        tv_object_free(all[i]);
    tv_free(all);
    return rc;
}

/* ---- ls: tensors
 * ---------------------------------------------------------------- */

static enum tv_err tensors_table(struct tvc *c, const struct tv_tensor_list *l,
                                 const char *layer)
{
    static const char *const headers[] = {"NAME",  "DTYPE",   "SHAPE",
                                          "BYTES", "STORAGE", "CHECKSUM"};
    struct tvc_table t;
    tvc_table_begin(&t, "lllrll", headers);
    for (size_t i = 0; i < l->n; i++) {
        const struct tv_tensor *x = &l->items[i];
        char shape[24 * TV_RANK_MAX + 3];
        char hex[33] = "-";
        if (!has_prefix(x->name, layer))
            continue;
        if (x->checksum_known)
            tv_hash_hex(x->checksum, hex);
        tvc_table_text(&t, x->name);
        tvc_table_text(&t, tv_dtype_name(x->dtype));
        tvc_table_text(&t,
                       tv_shape_format(x->shape, x->rank, shape, sizeof shape));
        tvc_table_cell(&t, "%" PRIu64, x->bytes);
        tvc_table_text(&t, storage_name(x->storage));
        tvc_table_text(&t, hex);
    }
    return tvc_table_end(&c->out, &t, &c->err);
}

static enum tv_err ls_tensors(struct tvc *c, tv_store *store, tv_read *read,
                              const char *name)
{
    const struct opts *o = c->opt;
    const char *layer = o->layer ? o->layer : "";
    struct tv_object *object = NULL;
    struct tv_tensor_list *list = NULL;
    json_t *adapter = NULL;
    enum tv_err rc = TV_OK;

    TV_TRY(tv_object_find(read, name, true, &c->err, &object));
    TV_TRY(tv_tensor_list(read, object->id, &c->err, &list));
    if (object->complete && object->kind == TV_KIND_ADAPTER && !c->out.quiet)
        TV_TRY(tvc_adapter_json(c, store, object->name, &adapter));
    if (c->out.json) {
        json_t *all = json_array();
        for (size_t i = 0; i < list->n; i++)
            if (has_prefix(list->items[i].name, layer))
                (void)json_array_append_new(all, tensor_json(&list->items[i]));
        json_t *doc =
            json_pack("{s:s, s:o, s:o}", "schema", "tvstore.ls/1", "object",
                      tvc_object_json(object), "tensors", all);
        if (adapter)
            (void)json_object_set(doc, "adapter", adapter);
        tvc_out_json(&c->out, doc);
    } else if (c->out.quiet) {
        for (size_t i = 0; i < list->n; i++)
            if (has_prefix(list->items[i].name, layer))
                tvc_out(&c->out, "%s\n", list->items[i].name);
    } else {
        rc = tensors_table(c, list, layer);
        if (rc == TV_OK && adapter) {
            tvc_out(&c->out, "\n");
            rc = tvc_adapter_lines(c, adapter);
        }
    }
out:
    json_decref(adapter);
    tv_tensor_list_free(list);
    tv_object_free(object);
    return rc;
}

static int run_ls(struct tvc *c)
{
    const struct opts *o = c->opt;
    tv_store *store = NULL;
    tv_read *read = NULL;
    enum tv_err rc = TV_OK;

    if (o->layer && c->n_pos < 2) {
        (void)tvc_bad(c, "--layer needs the NAME of an object");
        return tvc_fail(c, &c->err);
    }
    TV_TRY(tvc_store_open(c, c->pos[0], true, &c->err, &store));
    TV_TRY(tv_read_begin(store, &c->err, &read));
    if (c->n_pos > 1)
        rc = ls_tensors(c, store, read, c->pos[1]);
    else
        rc = ls_objects(c, read);
out:
    tv_read_end(read);
    tv_store_close(store);
    return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
}

static const struct argp_option ls_options[] = {
    {"layer", KEY_LAYER, "PREFIX", 0,
     "Only tensors whose name begins with PREFIX", 0},
    {0}};

const struct tvc_command tvc_cmd_ls = {
    .name = "ls",
    .summary = "list objects, or one object's tensors in layer order",
    .args_doc = "STORE [NAME]",
    .text = "With -q only the names.",
    .examples = "tvstore ls models.tv\n"
                "tvstore ls models.tv base --layer model.layers.1\n"
                "tvstore ls models.tv base --json",
    .options = ls_options,
    .opt_bytes = sizeof(struct opts),
    .option = option,
    .min_pos = 1,
    .max_pos = 2,
    .run = run_ls,
};

/* ---- info
 * ----------------------------------------------------------------------- */

static json_t *stats_json(const struct tvk_stats *s, uint64_t n_elems)
{
    const double n = (double)(n_elems - s->n_nonfinite);
    return json_pack(
        "{s:o, s:o, s:o, s:o, s:o, s:o}", "min", tvc_json_real((double)s->min),
        "max", tvc_json_real((double)s->max), "mean",
        tvc_json_real(n > 0 ? s->sum / n : NAN), "norm",
        tvc_json_real(sqrt(s->sum_sq)), "n_nonfinite",
        tvc_json_u64(s->n_nonfinite), "n_zero", tvc_json_u64(s->n_zero));
}

struct info {
    struct tvc *c;
    tv_store *store;
    tv_read *read;
    struct tv_object *object;
    struct tv_tensor_list *list;
    struct tv_arch *arch; /* NULL when it cannot be told */
    tv_pool *pool;        /* with --stats */
};

/* Side file NAME of the object, borrowed; NULL when there is none. */
static enum tv_err side_file(struct info *in, const char *name,
                             const void **data, size_t *n)
{
    *data = NULL;
    *n = 0;
    for (size_t i = 0; i < in->object->n_files; i++)
        if (strcmp(in->object->files[i].name, name) == 0)
            return tv_blob_get(in->read, in->object->files[i].digest, data, n,
                               &in->c->err);
    return TV_OK;
}

/* What cannot be described is still listed: a contradiction between config and
 * tensors is a note, not a failure of info. */
static enum tv_err describe(struct info *in)
{
    const void *config = NULL;
    size_t n_config = 0;
    struct tv_error why = {0};
    struct tv_arch_name *names = NULL;
    enum tv_err rc = TV_OK;

    if (in->object->kind == TV_KIND_ADAPTER)
        return TV_OK;
    TV_TRY(side_file(in, "config.json", &config, &n_config));
    names = tv_calloc(in->list->n, sizeof *names);
    if (!names) {
        rc = tv_error_set(&in->c->err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < in->list->n; i++)
        names[i] = (struct tv_arch_name){.name = in->list->items[i].name,
                                         .rank = in->list->items[i].rank,
                                         .shape = in->list->items[i].shape,
                                         .dtype = in->list->items[i].dtype};
    if (tv_arch_describe(config, n_config, names, in->list->n, &why,
                         &in->arch) != TV_OK)
        tvc_warn(&in->c->out, "%s: %s", in->object->name, why.msg);
out:
    tv_free(names);
    return rc;
}

static enum tv_err stats_of(struct info *in, const struct tv_tensor *t,
                            struct tvk_stats *out, bool *known)
{
    struct tvc *c = in->c;
    struct tv_view view = {0};
    char *what = tv_asprintf("%s/%s", in->object->name, t->name);
    enum tv_err rc = TV_OK;
    if (!what)
        return tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
    *known = true;
    TV_TRY(tv_tensor_view(in->read, t, &c->err, &view));
    rc = tvc_view_stats(c->kernels, in->pool, &view, what, out, &c->err);
    if (rc == TV_E_UNSUPPORTED) {
        *known = false;
        tv_error_clear(&c->err);
        rc = TV_OK;
    }
out:
    tv_free(what);
    return rc;
}

static json_t *dtypes_json(const struct tv_tensor_list *l)
{
    json_t *o = json_object();
    for (int t = 1; t < TV_DTYPE_COUNT; t++) {
        uint64_t n = 0;
        for (size_t i = 0; i < l->n; i++)
            n += l->items[i].dtype == (enum tv_dtype)t;
        if (n)
            (void)json_object_set_new(o, tv_dtype_name((enum tv_dtype)t),
                                      tvc_json_u64(n));
    }
    return o;
}

static uint64_t parameters_of(const struct tv_tensor_list *l)
{
    uint64_t n = 0;
    for (size_t i = 0; i < l->n; i++)
        n += l->items[i].n_elems;
    return n;
}

static json_t *arch_json(const struct tv_arch *a)
{
    if (!a)
        return json_null();
    return json_pack("{s:o, s:I, s:I, s:I, s:b}", "family",
                     tvc_json_string(a->family), "n_layers",
                     (json_int_t)a->n_layers, "hidden", (json_int_t)a->hidden,
                     "vocab", (json_int_t)a->vocab, "tied", a->tied);
}

static json_t *files_json(const struct tv_object *o)
{
    json_t *a = json_array();
    char hex[33];
    for (size_t i = 0; i < o->n_files; i++)
        (void)json_array_append_new(
            a, json_pack("{s:o, s:o, s:s}", "name",
                         tvc_json_string(o->files[i].name), "bytes",
                         tvc_json_u64(o->files[i].bytes), "digest",
                         tv_hash_hex(o->files[i].digest, hex)));
    return a;
}

/* Statistics of every tensor, as the document's member or as a table. */
static enum tv_err object_stats(struct info *in, json_t *doc)
{
    static const char *const headers[] = {"NAME", "MIN",  "MAX",
                                          "MEAN", "NORM", "NON-FINITE"};
    struct tvc *c = in->c;
    json_t *all = doc ? json_array() : NULL;
    struct tvc_table t = {0};
    enum tv_err rc = TV_OK;

    if (!doc)
        tvc_table_begin(&t, "lrrrrr", headers);
    for (size_t i = 0; i < in->list->n && rc == TV_OK; i++) {
        const struct tv_tensor *x = &in->list->items[i];
        struct tvk_stats s;
        bool known = false;
        rc = stats_of(in, x, &s, &known);
        if (rc != TV_OK)
            break;
        if (doc) {
            json_t *one = tensor_json(x);
            (void)json_object_set_new(
                one, "stats", known ? stats_json(&s, x->n_elems) : json_null());
            (void)json_array_append_new(all, one);
            continue;
        }
        tvc_table_cell(&t, "%s", x->name);
        if (!known) {
            for (int k = 0; k < 5; k++)
                tvc_table_cell(&t, "-");
            continue;
        }
        const double n = (double)(x->n_elems - s.n_nonfinite);
        tvc_table_cell(&t, "%.6g", (double)s.min);
        tvc_table_cell(&t, "%.6g", (double)s.max);
        tvc_table_cell(&t, "%.6g", n > 0 ? s.sum / n : NAN);
        tvc_table_cell(&t, "%.6g", sqrt(s.sum_sq));
        tvc_table_cell(&t, "%" PRIu64, s.n_nonfinite);
    }
    if (doc) {
        (void)json_object_set_new(doc, "tensors", all);
        return rc;
    }
    struct tv_error ignored = {0};
    const enum tv_err printed =
        tvc_table_end(&c->out, &t, rc == TV_OK ? &c->err : &ignored);
    return rc == TV_OK ? printed : rc;
}

static void object_lines(struct info *in, const char *digest)
{
    struct tvc *c = in->c;
    const struct tv_object *o = in->object;
    char bytes[32];
    char count[32];

    tvc_out(&c->out, "name          %s\n", o->name);
    tvc_out(&c->out, "kind          %s%s\n", tv_kind_name(o->kind),
            o->complete ? "" : " (unfinished)");
    if (*o->architecture)
        tvc_out(&c->out, "architecture  %s\n", o->architecture);
    if (in->arch)
        tvc_out(&c->out,
                "family        %s, %" PRId64 " layers, hidden %" PRId64
                ", vocabulary %" PRId64 "%s\n",
                in->arch->family, in->arch->n_layers, in->arch->hidden,
                in->arch->vocab, in->arch->tied ? ", tied" : "");
    tvc_out(&c->out, "tensors       %zu", in->list->n);
    json_t *types = dtypes_json(in->list);
    const char *key = NULL;
    json_t *value = NULL;
    const char *sep = " (";
    json_object_foreach(types, key, value)
    {
        tvc_out(&c->out, "%s%s %lld", sep, key,
                (long long)json_integer_value(value));
        sep = ", ";
    }
    tvc_out(&c->out, "%s\n", json_object_size(types) ? ")" : "");
    json_decref(types);
    tvc_out(&c->out, "parameters    %s\n",
            tvc_count(parameters_of(in->list), count, sizeof count));
    tvc_out(&c->out, "bytes         %s (%s)\n",
            tvc_count(o->bytes, count, sizeof count),
            tv_format_bytes(o->bytes, bytes, sizeof bytes));
    tvc_out(&c->out, "storage       %s\n", o->linked ? "linked" : "inline");
    if (*o->source_path)
        tvc_out(&c->out, "source        %s\n", o->source_path);
    if (o->complete)
        tvc_out(&c->out, "digest        %s\n",
                *digest ? digest : "unknown until it is read (--digest)");
    for (size_t i = 0; i < o->n_files; i++)
        tvc_out(&c->out, "%s  %s (%s)\n", i ? "            " : "side files  ",
                o->files[i].name,
                tv_format_bytes(o->files[i].bytes, bytes, sizeof bytes));
}

/* {"schema": ..., everything of `fields`}; takes over `fields`. */
static json_t *info_document(json_t *fields)
{
    json_t *doc = json_pack("{s:s}", "schema", "tvstore.info/1");
    (void)json_object_update(doc, fields);
    json_decref(fields);
    return doc;
}

static enum tv_err info_object(struct info *in)
{
    const struct opts *opt = in->c->opt;
    struct tvc *c = in->c;
    const struct tv_object *o = in->object;
    struct tv_hash digest = {0};
    char hex[33] = "";
    json_t *adapter = NULL;
    enum tv_err rc = TV_OK;

    /* Linked tensors that nobody has read yet would have to be read now. */
    bool known = true;
    for (size_t i = 0; i < in->list->n; i++)
        known = known && in->list->items[i].checksum_known;
    if (o->complete && (known || opt->digest || opt->stats)) {
        rc = tv_object_digest(in->read, o->id, &digest, &c->err);
        if (rc != TV_OK)
            return rc;
        tv_hash_hex(digest, hex);
    }
    if (o->complete && o->kind == TV_KIND_ADAPTER) {
        rc = tvc_adapter_json(c, in->store, o->name, &adapter);
        if (rc != TV_OK)
            return rc;
    }
    if (!c->out.json) {
        object_lines(in, hex);
        if (adapter)
            rc = tvc_adapter_lines(c, adapter);
        json_decref(adapter);
        if (rc != TV_OK || !opt->stats)
            return rc;
        tvc_out(&c->out, "\n");
        return object_stats(in, NULL);
    }
    json_t *object = tvc_object_json(o);
    (void)json_object_set_new(object, "parameters",
                              tvc_json_u64(parameters_of(in->list)));
    (void)json_object_set_new(object, "dtypes", dtypes_json(in->list));
    (void)json_object_set_new(object, "storage",
                              json_string(o->linked ? "linked" : "inline"));
    (void)json_object_set_new(object, "source",
                              *o->source_path ? tvc_json_string(o->source_path)
                                              : json_null());
    (void)json_object_set_new(object, "digest",
                              *hex ? json_string(hex) : json_null());
    (void)json_object_set_new(object, "model", arch_json(in->arch));
    if (o->kind == TV_KIND_ADAPTER)
        (void)json_object_set_new(object, "adapter",
                                  adapter ? adapter : json_null());
    (void)json_object_set_new(object, "files", files_json(o));
    json_t *doc = info_document(object);
    if (opt->stats)
        rc = object_stats(in, doc);
    if (rc == TV_OK)
        tvc_out_json(&c->out, doc);
    else
        json_decref(doc);
    return rc;
}

static const struct tv_arch_tensor *role_of(const struct info *in,
                                            const char *name)
{
    for (size_t i = 0; in->arch && i < in->arch->n_tensors; i++)
        if (strcmp(in->arch->tensors[i].name, name) == 0)
            return &in->arch->tensors[i];
    return NULL;
}

static void tensor_lines(struct info *in, const struct tv_tensor *t,
                         const char *source, const struct tvk_stats *s)
{
    struct tvc *c = in->c;
    const struct tv_arch_tensor *role = role_of(in, t->name);
    char shape[24 * TV_RANK_MAX + 3];
    char hex[33] = "unknown until it is read";
    char count[32];

    if (t->checksum_known)
        tv_hash_hex(t->checksum, hex);
    tvc_out(&c->out, "object        %s\n", in->object->name);
    tvc_out(&c->out, "tensor        %s\n", t->name);
    if (role && role->role != TV_ROLE_OTHER)
        tvc_out(&c->out, "role          %s\n", tv_role_name(role->role));
    if (role && role->layer >= 0)
        tvc_out(&c->out, "layer         %" PRId64 "\n", role->layer);
    tvc_out(&c->out, "dtype         %s\n", tv_dtype_name(t->dtype));
    tvc_out(&c->out, "shape         %s\n",
            tv_shape_format(t->shape, t->rank, shape, sizeof shape));
    tvc_out(&c->out, "elements      %s\n",
            tvc_count(t->n_elems, count, sizeof count));
    tvc_out(&c->out, "bytes         %s\n",
            tvc_count(t->bytes, count, sizeof count));
    tvc_out(&c->out, "storage       %s\n", storage_name(t->storage));
    if (source)
        tvc_out(&c->out, "source        %s, byte %" PRIu64 "\n", source,
                t->offset);
    tvc_out(&c->out, "checksum      %s\n", hex);
    if (!s)
        return;
    const double n = (double)(t->n_elems - s->n_nonfinite);
    tvc_out(&c->out, "min           %.9g\n", (double)s->min);
    tvc_out(&c->out, "max           %.9g\n", (double)s->max);
    tvc_out(&c->out, "mean          %.9g\n", n > 0 ? s->sum / n : NAN);
    tvc_out(&c->out, "norm          %.9g\n", sqrt(s->sum_sq));
    tvc_out(&c->out, "non-finite    %" PRIu64 "\n", s->n_nonfinite);
}

enum tv_err tvc_no_tensor(struct tvc *c, const char *object, const char *tensor,
                          const struct tv_tensor_list *list)
{
    const char **names = tv_calloc(list->n + 1, sizeof *names);
    const char *near = NULL;

    for (size_t i = 0; names && i < list->n; i++)
        names[i] = list->items[i].name;
    if (names)
        near = tv_suggest(tensor, names, list->n);
    (void)tv_error_set(&c->err, TV_E_NOTFOUND, "%s has no tensor '%s'", object,
                       tensor);
    if (near)
        tv_error_hint(&c->err, "did you mean '%s'?", near);
    else
        tv_error_hint(&c->err, "'tvstore ls %s %s' lists its tensors",
                      c->pos[0], object);
    tv_free((void *)names);
    return TV_E_NOTFOUND;
}

static const struct tv_tensor *tensor_of(struct info *in, const char *name)
{
    for (size_t i = 0; i < in->list->n; i++)
        if (strcmp(in->list->items[i].name, name) == 0)
            return &in->list->items[i];
    (void)!tvc_no_tensor(in->c, in->object->name, name, in->list);
    return NULL;
}

static enum tv_err info_tensor(struct info *in, const char *name)
{
    const struct opts *opt = in->c->opt;
    struct tvc *c = in->c;
    const char *source = NULL;
    struct tvk_stats s = {0};
    bool known = false;
    enum tv_err rc = TV_OK;
    const struct tv_tensor *t = tensor_of(in, name);

    if (!t)
        return c->err.code;
    if (t->storage == TV_LINKED)
        rc = tv_source_path(in->read, t->source_id, &c->err, &source);
    if (rc == TV_OK && opt->stats)
        rc = stats_of(in, t, &s, &known);
    if (rc != TV_OK)
        return rc;
    if (!c->out.json) {
        tensor_lines(in, t, source, known ? &s : NULL);
        if (opt->stats && !known)
            tvc_note(&c->out, "no statistics for elements of type %s",
                     tv_dtype_name(t->dtype));
        return TV_OK;
    }
    json_t *tensor = tensor_json(t);
    const struct tv_arch_tensor *role = role_of(in, t->name);
    (void)json_object_set_new(tensor, "n_elems", tvc_json_u64(t->n_elems));
    (void)json_object_set_new(tensor, "role",
                              role ? json_string(tv_role_name(role->role))
                                   : json_null());
    (void)json_object_set_new(tensor, "layer",
                              role && role->layer >= 0
                                  ? json_integer((json_int_t)role->layer)
                                  : json_null());
    if (source) {
        (void)json_object_set_new(tensor, "source", tvc_json_string(source));
        (void)json_object_set_new(tensor, "offset", tvc_json_u64(t->offset));
    }
    if (opt->stats)
        (void)json_object_set_new(
            tensor, "stats", known ? stats_json(&s, t->n_elems) : json_null());
    (void)json_object_set_new(tensor, "object", tvc_object_json(in->object));
    tvc_out_json(&c->out, info_document(tensor));
    return TV_OK;
}

static int run_info(struct tvc *c)
{
    const struct opts *o = c->opt;
    struct info in = {.c = c};
    tv_store *store = NULL;
    enum tv_err rc = TV_OK;
    char *name = tv_strdup(c->pos[1]);
    char *tensor = name ? strchr(name, '/') : NULL;

    if (!name) {
        rc = tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (tensor)
        *tensor++ = '\0';
    TV_TRY(tvc_store_open(c, c->pos[0], true, &c->err, &store));
    in.store = store;
    TV_TRY(tv_read_begin(store, &c->err, &in.read));
    TV_TRY(tv_object_find(in.read, name, true, &c->err, &in.object));
    TV_TRY(tv_tensor_list(in.read, in.object->id, &c->err, &in.list));
    TV_TRY(describe(&in));
    if (o->stats)
        TV_TRY(tv_pool_open(tvc_threads(c), &c->err, &in.pool));
    rc = tensor ? info_tensor(&in, tensor) : info_object(&in);
out:
    tv_pool_close(in.pool);
    tv_arch_free(in.arch);
    tv_tensor_list_free(in.list);
    tv_object_free(in.object);
    tv_read_end(in.read);
    tv_store_close(store);
    tv_free(name);
    return rc == TV_OK ? tvc_done(c, 0) : tvc_fail(c, &c->err);
}

static const struct argp_option info_options[] = {
    {"stats", KEY_STATS, NULL, 0,
     "Read the values: min, max, mean, norm, non-finite count", 0},
    {"digest", KEY_DIGEST, NULL, 0,
     "Read linked files when the digest of the object needs them", 0},
    {0}};

const struct tvc_command tvc_cmd_info = {
    .name = "info",
    .summary = "describe an object or one of its tensors",
    .args_doc = "STORE NAME[/TENSOR]",
    .examples = "tvstore info models.tv base\n"
                "tvstore info models.tv base/model.norm.weight --stats",
    .options = info_options,
    .opt_bytes = sizeof(struct opts),
    .option = option,
    .min_pos = 2,
    .max_pos = 2,
    .run = run_info,
};
