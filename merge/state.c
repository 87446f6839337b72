/* SPDX-License-Identifier: Apache-2.0 */
/*
 * state.c - journal state and tvmerge.json, over jansson.
 *
 * Both carry the plan's identity (the JSON that was hashed), so that a refusal
 * can say what has changed. Hashes and sizes beyond 2^63 do not occur; hashes
 * are written as hex.
 */
#include "state.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include <jansson.h>

#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/text.h"

#define STATE_SCHEMA  "tvmerge.state/1"
#define RECORD_SCHEMA "tvmerge.out/1"
#define NAMED_MAX     4u  /* differences that a message names */
#define VALUE_MAX     48u /* bytes of a value in a message */

/* ---- writing ------------------------------------------------------------- */

static json_t *hash_json(struct tv_hash h)
{
    char hex[33];
    return json_string(tv_hash_hex(h, hex));
}

/* An identity as a document; NULL when there is none, or no memory. */
static json_t *identity_load(const char *text)
{
    json_t *j = NULL;
    if (text &&
        tv_json_parse(text, strlen(text), "identity", NULL, &j) != TV_OK)
        j = NULL;
    return j;
}

static json_t *identity_json(const struct tvm_plan *p)
{
    return p->identity ? identity_load(p->identity) : json_object();
}

/* Puts what is known of calibrated masks, if anything is; consumes neither. */
static json_t *with_calibration(json_t *doc, const char *text, bool journal)
{
    json_t *j = doc && text ? identity_load(text) : NULL;

    if (j && !journal) {
        (void)json_object_del(j, "made");
        (void)json_object_del(j, "kept");
    }
    if (j && json_object_set_new(doc, "calibration", j) != 0) {
        json_decref(doc);
        doc = NULL;
    }
    return doc;
}

/* The member as text, owned; NULL when there is none. */
static char *member_text(const json_t *doc, const char *key)
{
    const json_t *j = json_object_get(doc, key);

    return j ? tv_json_text(j, JSON_COMPACT) : NULL;
}

/* Text of a document in our heap; consumes it. */
static char *text_of(json_t *doc, size_t flags)
{
    char *raw = doc ? tv_json_text(doc, flags) : NULL;
    char *text = raw ? tv_asprintf("%s\n", raw) : NULL;

    json_decref(doc);
    tv_free(raw);
    return text;
}

static uint64_t total_bytes(const struct tvm_plan *p)
{
    uint64_t n = 0;
    for (size_t i = 0; i < p->n_tensors; i++)
        n += p->tensors[i].bytes;
    return n;
}

/* By name, and what decided where factors are made. */
static bool put_device(json_t *doc, const struct tvm_plan *p)
{
    const char *const name = p->options.device[0] ? p->options.device : "cpu";
    const tvk_cuda *const cuda = p->options.cuda;

    return json_object_set_new(doc, "device", json_string(name)) == 0 &&
           (!cuda ||
            json_object_set_new(
                doc, "device_memory",
                json_integer((json_int_t)tvk_cuda_about(cuda)->factor_bytes)) ==
                0);
}

/* A document that begins with its schema and the device; NULL: out of memory.
 */
static json_t *document(const char *schema, const struct tvm_plan *p)
{
    json_t *const doc = json_pack("{s:s}", "schema", schema);

    if (doc && put_device(doc, p))
        return doc;
    json_decref(doc);
    return NULL;
}

/* doc and the rest in one; takes both. */
static json_t *joined(json_t *doc, json_t *rest)
{
    const bool ok = doc && rest && json_object_update(doc, rest) == 0;

    json_decref(rest);
    if (ok)
        return doc;
    json_decref(doc);
    return NULL;
}

char *tvm_state_make(const struct tvm_plan *p, bool publishing, bool replace,
                     const char *calibration)
{
    json_t *const doc = joined(
        document(STATE_SCHEMA, p),
        json_pack("{s:o, s:s, s:I, s:I, s:b, s:b, s:o}", "plan_hash",
                  hash_json(p->hash), "version", TV_VERSION, "n_tensors",
                  (json_int_t)p->n_tensors, "bytes_total",
                  (json_int_t)total_bytes(p), "publishing", (int)publishing,
                  "replace", (int)replace, "identity", identity_json(p)));

    return text_of(with_calibration(doc, calibration, true), JSON_COMPACT);
}

char *tvm_record_make(const struct tvm_plan *p, const struct tvm_totals *totals,
                      const char *calibration,
                      const struct tvm_record_file *files, size_t n_files)
{
    json_t *list = json_array();

    for (size_t i = 0; i < n_files; i++)
        if (json_array_append_new(list, json_pack("{s:s, s:I}", "name",
                                                  files[i].name, "bytes",
                                                  (json_int_t)files[i].bytes)))
            break;
    if (json_array_size(list) != n_files) {
        json_decref(list);
        return NULL;
    }
    json_t *const doc =
        joined(document(RECORD_SCHEMA, p),
               json_pack("{s:o, s:s, s:o, s:I, s:I, s:I, s:I, s:I, s:o, s:o}",
                         "plan_hash", hash_json(p->hash), "version", TV_VERSION,
                         "digest", hash_json(totals->digest), "seed",
                         (json_int_t)p->options.seed, "n_tensors",
                         (json_int_t)p->n_tensors, "bytes_total",
                         (json_int_t)total_bytes(p), "n_nonfinite_in",
                         (json_int_t)totals->n_nonfinite_in, "n_nonfinite_out",
                         (json_int_t)totals->n_nonfinite_out, "files", list,
                         "identity", identity_json(p)));

    return text_of(with_calibration(doc, calibration, false), JSON_INDENT(2));
}

/* ---- reading ------------------------------------------------------------- */

static enum tv_err load(const char *text, size_t n, const char *schema,
                        json_t **out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    json_t *doc = NULL;

    rc = tv_json_parse(text, n, "document", err, &doc);
    if (rc != TV_OK)
        return rc;
    const char *found = json_string_value(json_object_get(doc, "schema"));
    const size_t stem = strlen(schema) - 1;

    if (found && strcmp(found, schema) == 0) {
        *out = doc;
        return TV_OK;
    }
    if (found && strncmp(found, schema, stem) == 0)
        rc = tv_error_set(err, TV_E_UNSUPPORTED,
                          "made by another version of tvmerge (%s, this one "
                          "knows %s)",
                          found, schema);
    else
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "not a document of tvmerge: wrong schema");
    json_decref(doc);
    return rc;
}

static bool get_hash(const json_t *doc, const char *key, struct tv_hash *out)
{
    const char *hex = json_string_value(json_object_get(doc, key));
    return hex && strlen(hex) == 32 && tv_hash_from_hex(hex, out) == 0;
}

static bool get_count(const json_t *doc, const char *key, uint64_t *out)
{
    const json_t *j = json_object_get(doc, key);
    if (!json_is_integer(j) || json_integer_value(j) < 0)
        return false;
    *out = (uint64_t)json_integer_value(j);
    return true;
}

/* Documents from before there was a choice have none: it was the CPU. */
static void get_device(const json_t *doc, struct tvm_device *to)
{
    const char *name = json_string_value(json_object_get(doc, "device"));

    (void)snprintf(to->name, sizeof to->name, "%s", name ? name : "cpu");
    if (!get_count(doc, "device_memory", &to->memory_bytes))
        to->memory_bytes = 0;
}

enum tv_err tvm_state_parse(const char *text, size_t n, struct tvm_state *out,
                            struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    json_t *doc = NULL;

    memset(out, 0, sizeof *out);
    TV_TRY(load(text, n, STATE_SCHEMA, &doc, err));
    if (!get_hash(doc, "plan_hash", &out->plan_hash) ||
        !get_count(doc, "n_tensors", &out->n_tensors) ||
        !get_count(doc, "bytes_total", &out->bytes_total)) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "the state of the merge is incomplete");
        goto out;
    }
    get_device(doc, &out->device);
    out->publishing = json_is_true(json_object_get(doc, "publishing"));
    out->replace = json_is_true(json_object_get(doc, "replace"));
    out->calibration = member_text(doc, "calibration");
    out->identity =
        text_of(json_incref(json_object_get(doc, "identity")), JSON_COMPACT);
out:
    json_decref(doc);
    return rc;
}

void tvm_state_free(struct tvm_state *s)
{
    tv_free(s->calibration);
    tv_free(s->identity);
    memset(s, 0, sizeof *s);
}

/* Names come from a file that anybody may have edited; they are used as paths
 * inside OUT. */
static bool is_file_name(const char *name)
{
    return name && name[0] != '\0' && name[0] != '.' && !strchr(name, '/');
}

enum tv_err tvm_record_parse(const char *text, size_t n, struct tvm_record *out,
                             struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    json_t *doc = NULL;

    memset(out, 0, sizeof *out);
    TV_TRY(load(text, n, RECORD_SCHEMA, &doc, err));
    const json_t *files = json_object_get(doc, "files");
    if (!get_hash(doc, "plan_hash", &out->plan_hash) ||
        !get_hash(doc, "digest", &out->totals.digest) ||
        !get_count(doc, "n_tensors", &out->n_tensors) ||
        !get_count(doc, "bytes_total", &out->bytes_total) ||
        !get_count(doc, "n_nonfinite_in", &out->totals.n_nonfinite_in) ||
        !get_count(doc, "n_nonfinite_out", &out->totals.n_nonfinite_out) ||
        !json_is_array(files))
        goto bad;
    out->files = tv_calloc(json_array_size(files) + 1, sizeof *out->files);
    if (!out->files) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < json_array_size(files); i++) {
        const json_t *f = json_array_get(files, i);
        struct tvm_record_file *to = &out->files[i];
        to->name = json_string_value(json_object_get(f, "name"));
        if (!is_file_name(to->name) || !get_count(f, "bytes", &to->bytes))
            goto bad;
        out->n_files = i + 1;
    }
    out->identity =
        text_of(json_incref(json_object_get(doc, "identity")), JSON_COMPACT);
    out->calibration = member_text(doc, "calibration");
    get_device(doc, &out->device);
    out->storage = doc;
    doc = NULL;
    goto out;
bad:
    rc = tv_error_set(err, TV_E_CORRUPT,
                      "the record of the merge is "
                      "incomplete");
out:
    json_decref(doc);
    if (rc != TV_OK)
        tvm_record_free(out);
    return rc;
}

void tvm_record_free(struct tvm_record *r)
{
    tv_free(r->files);
    tv_free(r->identity);
    tv_free(r->calibration);
    json_decref(r->storage);
    memset(r, 0, sizeof *r);
}

/* ---- of a store ---------------------------------------------------------- */

enum tv_err tvm_record_of(tv_read *r, const struct tv_object *o, bool *found,
                          struct tvm_record *out, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    const void *data = NULL;
    size_t n = 0;

    *found = false;
    for (size_t i = 0; o->kind == TV_KIND_MERGE && i < o->n_files; i++) {
        if (strcmp(o->files[i].name, TVM_RECORD_FILE) != 0)
            continue;
        TV_TRY(tv_blob_get(r, o->files[i].digest, &data, &n, err));
        rc = tvm_record_parse(data, n, out, err);
        *found = rc == TV_OK;
        if (rc != TV_OK && rc != TV_E_NOMEM) {
            tv_error_clear(err);
            rc = TV_OK;
        }
        break;
    }
out:
    return rc;
}

/* ---- differences --------------------------------------------------------- */

struct diff {
    char *dst;
    size_t cap, used;
    unsigned n;
};

static void say(struct diff *d, const char *fmt, ...) TV_PRINTF(2, 3);
static void say(struct diff *d, const char *fmt, ...)
{
    va_list args;

    va_start(args, fmt);
    const int n = vsnprintf(d->dst + d->used, d->cap - d->used, fmt, args);
    va_end(args);
    if (n > 0)
        d->used +=
            (size_t)n < d->cap - d->used ? (size_t)n : d->cap - d->used - 1;
}

/* A value, cut where it is long. */
static void value_text(const json_t *j, size_t flags, char dst[VALUE_MAX + 4])
{
    char *raw =
        j ? tv_json_text(j, flags | JSON_ENCODE_ANY | JSON_COMPACT) : NULL;
    size_t n = 0;

    if (!raw) {
        (void)snprintf(dst, VALUE_MAX + 4, "%s", j ? "?" : "not set");
        return;
    }
    n = strlen(raw);
    if (n > VALUE_MAX) {
        n = VALUE_MAX;
        /* Not inside a UTF-8 sequence. */
        while (n > 0 && ((unsigned char)raw[n] & 0xc0u) == 0x80u)
            n--;
        memcpy(dst + n, "...", 4);
    } else {
        dst[n] = '\0';
    }
    memcpy(dst, raw, n);
    tv_free(raw);
}

static void add_difference(struct diff *d, const char *path, const json_t *a,
                           const json_t *b)
{
    char was[VALUE_MAX + 4];
    char is[VALUE_MAX + 4];

    if (d->n++ >= NAMED_MAX)
        return;
    /* As people write numbers, unless that hides the difference. */
    value_text(a, JSON_REAL_PRECISION(15), was);
    value_text(b, JSON_REAL_PRECISION(15), is);
    if (strcmp(was, is) == 0) {
        value_text(a, 0, was);
        value_text(b, 0, is);
    }
    say(d, "%s%s was %s, is %s", d->n > 1 ? "; " : "", path, was, is);
}

/* What an array entry is called: its own name, else its number. */
static void entry_path(const char *path, const json_t *a, const json_t *b,
                       size_t i, char *dst, size_t cap)
{
    static const char *const keys[] = {"ref", "name", "model"};

    for (size_t k = 0; k < sizeof keys / sizeof *keys; k++) {
        const char *x = json_string_value(json_object_get(a, keys[k]));
        const char *y = json_string_value(json_object_get(b, keys[k]));
        if (x && y && strcmp(x, y) == 0) {
            (void)snprintf(dst, cap, "%s[%s]", path, x);
            return;
        }
    }
    (void)snprintf(dst, cap, "%s[%zu]", path, i);
}

static void compare(struct diff *d, const char *path, const json_t *a,
                    const json_t *b, unsigned depth)
{
    char below[256];
    const char *key = NULL;
    const json_t *value = NULL;

    if (depth == 0 || !a || !b || json_typeof(a) != json_typeof(b) ||
        (!json_is_object(a) && !json_is_array(a))) {
        if (!a || !b || !json_equal(a, b))
            add_difference(d, path, a, b);
        return;
    }
    if (json_is_array(a)) {
        if (json_array_size(a) != json_array_size(b)) {
            (void)snprintf(below, sizeof below, "number of %s", path);
            json_t *x = json_integer((json_int_t)json_array_size(a));
            json_t *y = json_integer((json_int_t)json_array_size(b));
            add_difference(d, below, x, y);
            json_decref(x);
            json_decref(y);
            return;
        }
        for (size_t i = 0; i < json_array_size(a); i++) {
            const json_t *x = json_array_get(a, i);
            const json_t *y = json_array_get(b, i);
            entry_path(path, x, y, i, below, sizeof below);
            compare(d, below, x, y, depth - 1);
        }
        return;
    }
    const char *dot = path[0] ? "." : "";
    json_object_foreach((json_t *)(uintptr_t)b, key, value)
    {
        (void)snprintf(below, sizeof below, "%s%s%s", path, dot, key);
        compare(d, below, json_object_get(a, key), value, depth - 1);
    }
    json_object_foreach((json_t *)(uintptr_t)a, key, value)
    {
        if (json_object_get(b, key))
            continue;
        (void)snprintf(below, sizeof below, "%s%s%s", path, dot, key);
        add_difference(d, below, value, NULL);
    }
}

static const json_t *input_of(const json_t *list, const char *ref)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *x = json_array_get(list, i);
        const char *name = json_string_value(json_object_get(x, "ref"));
        if (name && strcmp(name, ref) == 0)
            return x;
    }
    return NULL;
}

/* Of inputs: which files, not which hash. That others are used has been said
 * with the recipe. */
static void compare_inputs(struct diff *d, const json_t *a, const json_t *b)
{
    for (size_t i = 0; i < json_array_size(b); i++) {
        const json_t *y = json_array_get(b, i);
        const char *ref = json_string_value(json_object_get(y, "ref"));
        const json_t *x = ref ? input_of(a, ref) : NULL;
        if (x && !json_equal(x, y) && d->n++ < NAMED_MAX)
            say(d,
                "%sinput '%s' has changed (size, time, header or contents of "
                "its files)",
                d->n > 1 ? "; " : "", ref);
    }
}

/* Of objects of hashes: how many differ, and the first. */
static void compare_hashes(struct diff *d, const char *what, const json_t *a,
                           const json_t *b)
{
    const char *first = NULL;
    const char *key = NULL;
    const json_t *value = NULL;
    size_t n = 0;

    json_object_foreach((json_t *)(uintptr_t)b, key, value)
    {
        const json_t *before = json_object_get(a, key);
        if (before && json_equal(before, value))
            continue;
        first = first ? first : key;
        n++;
    }
    json_object_foreach((json_t *)(uintptr_t)a, key, value)
    {
        if (json_object_get(b, key))
            continue;
        first = first ? first : key;
        n++;
    }
    if (n > 0 && d->n++ < NAMED_MAX)
        say(d, "%s%zu %s would come out differently, first of all %s",
            d->n > 1 ? "; " : "", n, what, first);
}

static void compare_identities(struct diff *d, const json_t *a, const json_t *b)
{
    static const char *const apart[] = {"recipe", "inputs", "files", "tensors"};
    const size_t n = sizeof apart / sizeof *apart;
    json_t *x = json_copy((json_t *)(uintptr_t)a);
    json_t *y = json_copy((json_t *)(uintptr_t)b);

    for (size_t i = 0; i < n && x && y; i++) {
        (void)json_object_del(x, apart[i]);
        (void)json_object_del(y, apart[i]);
    }
    if (x && y)
        compare(d, "", x, y, 16);
    json_decref(x);
    json_decref(y);
    if (json_object_get(a, "recipe") && json_object_get(b, "recipe"))
        compare(d, "", json_object_get(a, "recipe"),
                json_object_get(b, "recipe"), 16);
    /* With or without their contents, fingerprints differ in any case. */
    if (!json_object_get(a, "verify_inputs") ==
        !json_object_get(b, "verify_inputs"))
        compare_inputs(d, json_object_get(a, "inputs"),
                       json_object_get(b, "inputs"));
    /* Consequences of the above, nearly always. */
    if (d->n == 0)
        compare_hashes(d, "side files", json_object_get(a, "files"),
                       json_object_get(b, "files"));
    if (d->n == 0)
        compare_hashes(d, "tensors", json_object_get(a, "tensors"),
                       json_object_get(b, "tensors"));
}

char *tvm_identity_difference(const char *before, const char *after, char *dst,
                              size_t cap)
{
    json_t *a = identity_load(before);
    json_t *b = identity_load(after);
    struct diff d = {.dst = dst, .cap = cap};

    dst[0] = '\0';
    if (a && b)
        compare_identities(&d, a, b);
    if (d.n > NAMED_MAX)
        say(&d, "; and %u more", d.n - NAMED_MAX);
    if (d.n == 0)
        say(&d, "the plan differs");
    json_decref(a);
    json_decref(b);
    return dst;
}

bool tvm_identity_numerics(const char *before, const char *after)
{
    json_t *a = identity_load(before);
    json_t *b = identity_load(after);
    bool differs = false;

    if (a && b && !json_equal(a, b)) {
        static const char *const keys[] = {"blas", "device", "products"};
        for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
            (void)json_object_del(a, keys[i]);
            (void)json_object_del(b, keys[i]);
        }
        differs = json_equal(a, b);
    }
    json_decref(a);
    json_decref(b);
    return differs;
}

bool tvm_identity_accept(struct tvm_plan *p, struct tv_hash hash,
                         const char *identity, bool *differs)
{
    char *taken = NULL;

    *differs = tvm_identity_numerics(identity, p->identity);
    if (*differs && p->options.accept_numerics)
        taken = tv_strdup(identity);
    if (!taken)
        return false;
    tv_free(p->identity);
    p->identity = taken;
    p->hash = hash;
    return true;
}
