/* SPDX-License-Identifier: Apache-2.0 */
/*
 * json_edit.c - changes top-level keys of config.json.
 *
 * jansson prints reals with 17 digits (1e-05 becomes 1.0000000000000001e-5);
 * the least precision that reads back as the same document is used. Text that
 * needs no change is handed back byte for byte.
 */
#include <string.h>

#include "json_util.h"
#include "tv/alloc.h"
#include "tv/format.h"

static enum tv_err no_memory(struct tv_error *err)
{
    return tv_error_set(err, TV_E_NOMEM, "out of memory editing JSON");
}

/* Applies one edit; *changed is set when the document differs after it. */
static enum tv_err apply(json_t *root, const struct tv_json_edit *e,
                         bool *changed, struct tv_error *err)
{
    const json_t *old = json_object_get(root, e->key);
    json_t *now = NULL;

    if (e->kind == TV_EDIT_REMOVE) {
        if (old != NULL && json_object_del(root, e->key) == 0)
            *changed = true;
        return TV_OK;
    }
    if (old == NULL && e->only_if_present)
        return TV_OK;
    if (e->kind == TV_EDIT_INT)
        now = json_integer((json_int_t)e->i);
    else if (e->kind == TV_EDIT_BOOL)
        now = json_boolean(e->i != 0);
    else
        now = json_string(e->s);
    if (now == NULL)
        return no_memory(err);
    if (old != NULL && json_equal(old, now)) {
        json_decref(now);
        return TV_OK;
    }
    if (json_object_set_new(root, e->key, now) != 0)
        return no_memory(err);
    *changed = true;
    return TV_OK;
}

/* Dumps root with the fewest digits that keep every real. */
static enum tv_err dump_shortest(const json_t *root, struct tv_buf *b,
                                 struct tv_error *err)
{
    enum tv_err rc = TV_OK;
    json_t *again = NULL;

    for (size_t digits = 15; digits <= 17; digits++) {
        bool same = false;

        tv_buf_free(b);
        tv_buf_init(b, 2 * (size_t)TV_JSON_MAX);
        tv_json_dump(root, JSON_INDENT(2) | JSON_REAL_PRECISION(digits), b);
        TV_TRY(tv_buf_ok(b, err));
        if (digits == 17)
            break;
        TV_TRY(tv_json_load(b->data, b->n_bytes, "edited JSON", 0,
                            &tv_json_side_limits, err, &again));
        same = json_equal(again, root) != 0;
        json_decref(again);
        if (same)
            break;
    }
    tv_buf_str(b, "\n");
    rc = tv_buf_ok(b, err);
out:
    return rc;
}

enum tv_err tv_json_edit(const char *data, size_t n,
                         const struct tv_json_edit *edits, size_t n_edits,
                         struct tv_error *err, char **out, size_t *n_out)
{
    enum tv_err rc = TV_OK;
    json_t *root = NULL;
    bool changed = false;
    struct tv_buf b;

    tv_buf_init(&b, 1);
    TV_TRY(tv_json_load(data, n, "JSON document", 0, &tv_json_side_limits, err,
                        &root));
    for (size_t i = 0; i < n_edits; i++)
        TV_TRY(apply(root, &edits[i], &changed, err));
    if (changed) {
        TV_TRY(dump_shortest(root, &b, err));
    } else {
        tv_buf_init(&b, n + 1);
        tv_buf_add(&b, data, n);
        TV_TRY(tv_buf_ok(&b, err));
    }
    *out = b.data;
    *n_out = b.n_bytes;
    tv_buf_init(&b, 1);
out:
    json_decref(root);
    tv_buf_free(&b);
    return rc;
}
