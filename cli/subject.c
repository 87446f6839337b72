/* SPDX-License-Identifier: Apache-2.0 */
/*
 * subject.c - see tveval.h.
 */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "progress.h"
#include "store_open.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/sys.h"
#include "tv/text.h"
#include "tveval.h"

#define IDS_BYTES_MAX  (UINT64_C(1) << 34)
#define TEXT_BYTES_MAX (UINT64_C(1) << 34)

static bool needs_store(const struct tv_ref *ref)
{
    if (ref->model.object)
        return true;
    for (size_t i = 0; i < ref->n_adapters; i++)
        if (ref->adapters[i].object)
            return true;
    return false;
}

static enum tv_err open_parts(struct tvc *c, tv_store *store,
                              struct tvc_subject *s)
{
    enum tv_err rc = TV_OK;
    TV_TRY(tv_input_open(&s->ref->model, store, &c->err, &s->input));
    const size_t n = s->ref->n_adapters;
    s->adapter_inputs = tv_calloc(n ? n : 1, sizeof *s->adapter_inputs);
    s->adapters = tv_calloc(n ? n : 1, sizeof *s->adapters);
    if (!s->adapter_inputs || !s->adapters) {
        rc = tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    s->n_adapters = n;
    for (size_t i = 0; i < n; i++) {
        TV_TRY(tv_input_open(&s->ref->adapters[i], store, &c->err,
                             &s->adapter_inputs[i]));
        TV_TRY(tv_adapter_open(s->adapter_inputs[i], &c->err,
                               &s->adapters[i].adapter));
        s->adapters[i].weight = s->ref->adapters[i].weight;
    }
out:
    return rc;
}

/* Nobody may remove what is being read: it is pinned, or, where that cannot be
 * done now, read from one snapshot. */
static enum tv_err keep(struct tvc *c, tv_store *store, struct tvc_subject *s)
{
    enum tv_err rc = TV_OK;
    const size_t n = s->n_adapters;
    bool held = false;

    if (!store)
        return TV_OK;
    s->kept = tv_calloc(n + 1, sizeof *s->kept);
    if (!s->kept) {
        rc = tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i <= n; i++) {
        const tv_input *in = i < n ? s->adapter_inputs[i] : s->input;
        if (tv_input_is_store(in))
            s->kept[s->n_kept++] = tv_input_object_id(in);
    }
    s->kept_in = store;
    TV_TRY(tv_object_hold(store, s->kept, s->n_kept, &held, &c->err));
    for (size_t i = 0; !held && i <= n; i++)
        TV_TRY(
            tv_input_freeze(i < n ? s->adapter_inputs[i] : s->input, &c->err));
    if (!held)
        s->n_kept = 0;
out:
    return rc;
}

enum tv_err tvc_subject_open_in(struct tvc *c, const char *text,
                                tv_store *store, struct tvc_subject *s)
{
    enum tv_err rc = TV_OK;
    memset(s, 0, sizeof *s);
    TV_TRY(tv_ref_resolve(text, &c->err, &s->ref));
    TV_TRY(open_parts(c, store, s));
    TV_TRY(keep(c, store, s));
out:
    return rc;
}

enum tv_err tvc_subject_open(struct tvc *c, const char *text, const char *store,
                             struct tvc_subject *s)
{
    enum tv_err rc = TV_OK;
    memset(s, 0, sizeof *s);
    TV_TRY(tv_ref_resolve(text, &c->err, &s->ref));
    if (needs_store(s->ref)) {
        const char *path = store ? store : tvc_default_store();
        if (!path) {
            rc = tv_error_set(&c->err, TV_E_USAGE,
                              "'%s' names an object of a store, but no store "
                              "is given",
                              text);
            tv_error_hint(&c->err, "add --store STORE or set TV_STORE");
            goto out;
        }
        /* Writable where it can be: what is read is pinned. */
        TV_TRY(tvc_store_open(c, path, false, &c->err, &s->store));
    }
    TV_TRY(open_parts(c, s->store, s));
    TV_TRY(keep(c, s->store, s));
out:
    return rc;
}

void tvc_subject_close(struct tvc_subject *s)
{
    for (size_t i = 0; i < s->n_adapters; i++) {
        tv_adapter_close(s->adapters[i].adapter);
        tv_input_close(s->adapter_inputs[i]);
    }
    tv_free(s->adapters);
    tv_free(s->adapter_inputs);
    tv_input_close(s->input);
    if (s->kept_in)
        tv_object_let_go(s->kept_in, s->kept, s->n_kept);
    tv_free(s->kept);
    tv_store_close(s->store);
    tv_ref_free(s->ref);
    memset(s, 0, sizeof *s);
}

static uint64_t parameters(const tv_input *in)
{
    uint64_t n = 0;

    for (size_t i = 0; i < tv_input_count(in); i++)
        n += tv_input_tensor(in, i)->n_elems;
    return n;
}

static enum tv_err open_model(struct tvc *c, struct tvc_subject *s,
                              unsigned n_threads, tve_model **out)
{
    const char *tmp = getenv("TMPDIR");
    struct tve_model_options opt = {
        .n_threads = n_threads,
        .memory_bytes = c->memory_bytes,
        .kernels = c->kernels,
        .scratch_dir = tmp && *tmp ? tmp : NULL,
        .quota_of = s->kept_in,
    };
    enum tv_err rc = tvc_subject_runs(c, s);
    if (rc != TV_OK)
        return rc;
    rc = tvc_device_for(c, parameters(s->input), &opt.cuda);
    if (rc != TV_OK)
        return rc;
    return tve_model_open(s->input, s->adapters, s->n_adapters, &opt, &c->err,
                          out);
}

enum tv_err tvc_subject_model(struct tvc *c, struct tvc_subject *s,
                              tve_model **out)
{
    return open_model(c, s, tvc_threads(c), out);
}

void tvc_subject_told(struct tvc *c, const tve_model *model)
{
    const char *const why = tve_model_not_there(model);

    if (why)
        tvc_note(&c->out,
                 "only linear layers were computed on the device, the rest on "
                 "the CPU: %s",
                 why);
}

enum tv_err tvc_subject_fit(struct tvc *c, struct tvc_subject *s,
                            enum tve_pass pass, size_t n, tve_model **model)
{
    const size_t positions = tve_model_positions(*model);
    unsigned threads = tvc_threads(c);
    char a[32], b[32];

    /* Longer windows are refused for what they are. */
    if (positions > 0 && n > positions)
        n = positions;
    while (threads > 0 &&
           tve_model_least(*model, pass, n, threads) > c->memory_bytes)
        threads--;
    if (threads == tvc_threads(c))
        return TV_OK;
    if (threads > 0) { /* slower, the same results */
        tve_model_close(*model);
        return open_model(c, s, threads, model);
    }
    const uint64_t least = tve_model_least(*model, pass, n, 1);
    return tv_error_set(&c->err, TV_E_BUDGET,
                        "windows of %zu tokens need at least --memory %s (%llu "
                        "bytes), it is %s",
                        n, tv_format_bytes_arg(least, a, sizeof a),
                        (unsigned long long)least,
                        tv_format_bytes(c->memory_bytes, b, sizeof b));
}

/* ---- adapters alone, texts ----------------------------------------------- */

/* What an adapter says of its base, owned; "" when nothing. */
static char *base_named(tv_input *in)
{
    bool found = false;
    char *text = NULL;
    char *name = NULL;
    size_t n = 0;
    json_t *root = NULL;

    if (tv_input_side_read(in, "adapter_config.json", &found, &text, &n,
                           NULL) == TV_OK &&
        found)
        root = json_loadb(text, n, 0, NULL);
    const char *base =
        json_string_value(json_object_get(root, "base_model_name_or_path"));
    name = tv_strdup(base ? base : "");
    json_decref(root);
    tv_free(text);
    return name;
}

enum tv_err tvc_subject_runs(struct tvc *c, const struct tvc_subject *s)
{
    if (tv_input_kind(s->input) != TV_KIND_ADAPTER)
        return TV_OK;
    char *base = base_named(s->input);
    (void)tv_error_set(&c->err, TV_E_INPUT, "%s is an adapter, not a model",
                       s->ref->text);
    tv_error_hint(
        &c->err, "write BASE+%s, BASE the model it was trained on%s%s%s",
        s->ref->text, base && *base ? " ('" : "", base && *base ? base : "",
        base && *base ? "' in its adapter_config.json)" : "");
    tv_free(base);
    return TV_E_INPUT;
}

static enum tv_err read_stdin(char **text, size_t *n, struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct tv_buf b;
    char part[65536];

    tv_buf_init(&b, TEXT_BYTES_MAX);
    for (;;) {
        const ssize_t got = read(STDIN_FILENO, part, sizeof part);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            rc = tv_error_sys(err, errno, "cannot read stdin");
            goto out;
        }
        if (got == 0)
            break;
        tv_buf_add(&b, part, (size_t)got);
    }
    tv_buf_add(&b, "", 1);
    TV_TRY(tv_buf_ok(&b, err));
    *text = b.data;
    *n = b.n_bytes - 1;
    b.data = NULL;
out:
    tv_buf_free(&b);
    return rc;
}

enum tv_err tvc_text_read(const char *path, char **text, size_t *n,
                          struct tv_error *err)
{
    return strcmp(path, "-") == 0
               ? read_stdin(text, n, err)
               : tv_file_read(path, TEXT_BYTES_MAX, err, text, n);
}

error_t tvc_parse_bos(struct tvc *c, const char *arg, int32_t *bos)
{
    uint64_t id = 0;
    if (strcmp(arg, "none") == 0) {
        *bos = -1;
        return 0;
    }
    const error_t e = tvc_parse_u64(c, "--bos", arg, INT32_MAX - 1, &id);
    if (e == 0)
        *bos = (int32_t)id;
    return e;
}

void tvc_eval_step(void *arg, uint64_t done, uint64_t total)
{
    tvc_progress_set(arg, done, total, 0, 0);
}

/* ---- .npy ---- */

struct npy {
    const unsigned char *data;
    size_t n_bytes; /* of data */
    size_t each;
    size_t shape[2], n_dims;
};

/* The dictionary of the header, "{'descr': '<i8', ...}": keys in any order. */
static bool npy_shape(const char *text, struct npy *out)
{
    const char *p = strstr(text, "'shape':");
    if (!p)
        return false;
    p = strchr(p, '(');
    for (p = p ? p + 1 : NULL; p && *p && *p != ')';) {
        char *end = NULL;
        errno = 0;
        const unsigned long long v = strtoull(p, &end, 10);
        if (end == p || errno || v > SIZE_MAX || out->n_dims == 2)
            return false;
        out->shape[out->n_dims++] = (size_t)v;
        p = end + strspn(end, ", L");
    }
    return p && *p == ')';
}

static enum tv_err npy_parse(const char *path, const char *file, size_t n,
                             struct npy *out, struct tv_error *err)
{
    const unsigned char *b = (const unsigned char *)file;
    size_t at = 10;
    size_t header = 0;
    char text[1024];

    if (n < 12 || memcmp(b, "\x93NUMPY", 6) != 0)
        return tv_error_set(err, TV_E_CORRUPT, "%s is no .npy file", path);
    if (b[6] == 1) {
        header = tv_get_le16(b + 8);
    } else {
        header = tv_get_le32(b + 8);
        at = 12;
    }
    if (header > n - at || header >= sizeof text)
        return tv_error_set(err, TV_E_CORRUPT, "%s: impossible header length",
                            path);
    memcpy(text, b + at, header);
    text[header] = '\0';
    if (strstr(text, "'<i8'"))
        out->each = 8;
    else if (strstr(text, "'<i4'"))
        out->each = 4;
    if (!out->each || !strstr(text, "'fortran_order': False") ||
        !npy_shape(text, out))
        return tv_error_set(err, TV_E_INPUT,
                            "%s: not an int64 or int32 array of one or two "
                            "dimensions in C order",
                            path);
    out->data = b + at + header;
    out->n_bytes = n - at - header;
    return TV_OK;
}

enum tv_err tvc_ids_read(const char *path, struct tvc_ids *out,
                         struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    struct npy a = {0};
    char *file = NULL;
    size_t n = 0;
    size_t bytes = 0;

    memset(out, 0, sizeof *out);
    TV_TRY(tv_file_read(path, IDS_BYTES_MAX, err, &file, &n));
    TV_TRY(npy_parse(path, file, n, &a, err));
    out->batch = a.n_dims == 2 ? a.shape[0] : 1;
    out->seq = a.n_dims ? a.shape[a.n_dims - 1] : 1;
    out->rows = a.n_dims == 2;
    if (!tv_mul_size(out->batch, out->seq, &n) ||
        !tv_mul_size(n, a.each, &bytes) || bytes != a.n_bytes) {
        rc = tv_error_set(err, TV_E_CORRUPT,
                          "%s: its shape does not fit its %zu data bytes", path,
                          a.n_bytes);
        goto out;
    }
    out->ids = tv_calloc(n ? n : 1, sizeof *out->ids);
    if (!out->ids) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    for (size_t i = 0; i < n; i++) {
        const int64_t v = a.each == 8
                              ? (int64_t)tv_get_le64(a.data + 8 * i)
                              : (int64_t)(int32_t)tv_get_le32(a.data + 4 * i);
        if (v < 0 || v > INT32_MAX) {
            rc = tv_error_set(err, TV_E_INPUT,
                              "%s: id %lld at %zu is outside any vocabulary",
                              path, (long long)v, i);
            goto out;
        }
        out->ids[i] = (int32_t)v;
    }
out:
    tv_free(file);
    if (rc != TV_OK)
        tvc_ids_free(out);
    return rc;
}

void tvc_ids_free(struct tvc_ids *ids)
{
    tv_free(ids->ids);
    memset(ids, 0, sizeof *ids);
}

void tvc_npy_header(char dst[TVC_NPY_HEADER], const char *descr,
                    const size_t *shape, size_t n_dims)
{
    char dims[72] = "";
    size_t at = 0;

    for (size_t i = 0; i < n_dims; i++)
        at += (size_t)snprintf(dims + at, sizeof dims - at, "%zu%s", shape[i],
                               n_dims == 1      ? ","
                               : i + 1 < n_dims ? ", "
                                                : "");
    memset(dst, ' ', TVC_NPY_HEADER);
    memcpy(dst, "\x93NUMPY\x01\x00", 8);
    tv_put_le16(dst + 8, TVC_NPY_HEADER - 10);
    const int n = snprintf(dst + 10, TVC_NPY_HEADER - 11,
                           "{'descr': '%s', 'fortran_order': False, "
                           "'shape': (%s), }",
                           descr, dims);
    dst[10 + n] = ' ';
    dst[TVC_NPY_HEADER - 1] = '\n';
}
