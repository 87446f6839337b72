/* SPDX-License-Identifier: Apache-2.0 */
/*
 * adapter_info.c - rank, alpha, scaling, targets and norms of an adapter.
 */
#include "adapter_info.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "tv/adapt.h"
#include "tv/alloc.h"
#include "tv/format.h"

static const char *kind_name(const struct tv_adapter_module *m)
{
    switch (m->kind) {
    case TV_CHANGE_REPLACE:
        return "replaced";
    case TV_CHANGE_ROWS:
        return "tokens";
    case TV_CHANGE_ADD:
        return "bias";
    case TV_CHANGE_LOW_RANK:
        break;
    }
    return m->magnitude ? "dora" : m->n_experts ? "experts" : "lora";
}

static json_t *real_or_null(bool known, double x)
{
    return known ? tvc_json_real(x) : json_null();
}

static bool is_low_rank(const struct tv_adapter_module *m)
{
    return m->kind == TV_CHANGE_LOW_RANK;
}

static enum tv_err modules_json(struct tvc *c, const tv_adapter *a,
                                json_t *list, json_t *targets, double *norm,
                                bool *norm_known)
{
    double sum = 0;
    enum tv_err rc = TV_OK;

    *norm_known = true;
    for (size_t i = 0; i < tv_adapter_count(a); i++) {
        const struct tv_adapter_module *m = tv_adapter_module(a, i);
        const bool scaled = is_low_rank(m) || m->kind == TV_CHANGE_ADD;
        const char *dot = strrchr(m->module, '.');
        const char *last = dot ? dot + 1 : m->module;
        bool known = false, listed = false;
        double x = 0;

        TV_TRY(tva_change_norm(m, tv_adapter_input(a), c->kernels, &known, &x,
                               &c->err));
        *norm_known = *norm_known && known;
        sum += x * x;
        (void)json_array_append_new(
            list, json_pack("{s:o, s:s, s:o, s:o, s:o, s:o, s:o}", "name",
                            tvc_json_string(m->module), "kind", kind_name(m),
                            "target", tvc_json_string(m->target), "rank",
                            scaled ? tvc_json_u64(m->r) : json_null(), "alpha",
                            real_or_null(scaled, m->alpha), "scaling",
                            real_or_null(scaled, m->scaling), "norm",
                            real_or_null(known, x)));
        for (size_t k = 0; k < json_array_size(targets); k++)
            listed =
                listed || strcmp(json_string_value(json_array_get(targets, k)),
                                 last) == 0;
        if (is_low_rank(m) && !listed)
            (void)json_array_append_new(targets, tvc_json_string(last));
    }
    *norm = sqrt(sum);
out:
    return rc;
}

/* The value that all modules share, else null. */
static json_t *shared(const json_t *list, const char *key)
{
    json_t *first = NULL;

    for (size_t i = 0; i < json_array_size(list); i++) {
        json_t *v = json_object_get(json_array_get(list, i), key);
        if (json_is_null(v))
            continue;
        if (first && !json_equal(first, v))
            return json_null();
        first = v;
    }
    return first ? json_incref(first) : json_null();
}

enum tv_err tvc_adapter_json(struct tvc *c, tv_store *store, const char *name,
                             json_t **out)
{
    char *text = tv_asprintf("store:%s", name);
    struct tv_ref *ref = NULL;
    tv_input *in = NULL;
    tv_adapter *a = NULL;
    struct tv_error why;
    json_t *list = json_array(), *targets = json_array();
    double norm = 0;
    bool known = false;
    enum tv_err rc = TV_OK;

    *out = NULL;
    tv_error_clear(&why);
    if (!text || !list || !targets) {
        rc = tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(tv_ref_resolve(text, &c->err, &ref));
    TV_TRY(tv_input_open(&ref->model, store, &c->err, &in));
    if (tv_adapter_open(in, &why, &a) != TV_OK) {
        tvc_warn(&c->out, "%s", why.msg);
        goto out;
    }
    TV_TRY(modules_json(c, a, list, targets, &norm, &known));
    *out =
        json_pack("{s:o, s:o, s:o, s:O, s:o, s:O}", "rank",
                  shared(list, "rank"), "alpha", shared(list, "alpha"),
                  "scaling", shared(list, "scaling"), "target_modules", targets,
                  "norm", real_or_null(known, norm), "modules", list);
    if (!*out)
        rc = tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
out:
    json_decref(targets);
    json_decref(list);
    tv_adapter_close(a);
    tv_input_close(in);
    tv_ref_free(ref);
    tv_free(text);
    return rc;
}

static const char *number(const json_t *v, char dst[32])
{
    if (json_is_null(v))
        return "-";
    (void)snprintf(dst, 32, "%.6g", json_number_value(v));
    return dst;
}

enum tv_err tvc_adapter_lines(struct tvc *c, const json_t *j)
{
    static const char *const headers[] = {"MODULE", "KIND",    "RANK",
                                          "ALPHA",  "SCALING", "NORM"};
    static const char *const keys[] = {"rank", "alpha", "scaling", "norm"};
    const json_t *list = json_object_get(j, "modules");
    const json_t *targets = json_object_get(j, "target_modules");
    struct tvc_table t;
    char text[32];

    for (size_t i = 0; i < 4; i++) {
        const json_t *v = json_object_get(j, keys[i]);
        tvc_out(&c->out, "%-12s  %s\n", keys[i],
                json_is_null(v) ? (i < 3 ? "differs" : "needs the base")
                                : number(v, text));
    }
    tvc_out(&c->out, "targets     ");
    for (size_t i = 0; i < json_array_size(targets); i++)
        tvc_out(&c->out, "%s %s", i ? "," : " ",
                json_string_value(json_array_get(targets, i)));
    tvc_out(&c->out, "\n\n");
    tvc_table_begin(&t, "llrrrr", headers);
    for (size_t i = 0; i < json_array_size(list); i++) {
        const json_t *m = json_array_get(list, i);
        tvc_table_cell(&t, "%s", json_string_value(json_object_get(m, "name")));
        tvc_table_cell(&t, "%s", json_string_value(json_object_get(m, "kind")));
        for (size_t k = 0; k < 4; k++)
            tvc_table_cell(&t, "%s", number(json_object_get(m, keys[k]), text));
    }
    return tvc_table_end(&c->out, &t, &c->err);
}
