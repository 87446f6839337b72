/* SPDX-License-Identifier: Apache-2.0 */
/*
 * compare_records.c - what a comparison knows of an entry, from run to run.
 *
 *   OUT/.tvcompare/NAME.json  of a merge first its cost, then with the
 *                             perplexities all of it
 *   OUT/.tvcompare/.entries.json  what the last command compares, in the order
 *                             of work
 *
 * A record is written whole or not at all (rename), and carries a hash of
 * everything its figures depend on; one that belongs to something else is
 * refused.
 */
#include <stdio.h>
#include <string.h>

#include "compare.h"
#include "tv/alloc.h"
#include "tv/sys.h"

static char *record_path(const struct tvc_compare *p, const struct entry *e)
{
    char *name = tv_alloc(strlen(e->name) + 6);
    char *path = NULL;

    if (name) {
        (void)snprintf(name, strlen(e->name) + 6, "%s.json", e->name);
        path = tv_path_join(p->state, name);
    }
    tv_free(name);
    return path;
}

enum tv_err tvc_record_load(struct tvc_compare *p, struct entry *e)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;
    char *path = record_path(p, e);
    char *text = NULL;
    char hex[33];
    size_t n = 0;

    if (!path) {
        rc = tvc_compare_oom(c);
        goto out;
    }
    if (!tv_path_exists(path))
        goto out;
    TV_TRY(tv_file_read(path, 16u << 20, &c->err, &text, &n));
    e->record = json_loadb(text, n, 0, NULL);
    const char *key = json_string_value(json_object_get(e->record, "key"));
    if (!key) {
        rc = tv_error_set(&c->err, TV_E_CORRUPT, "%s is damaged", path);
        tv_error_hint(&c->err, "remove it: its figures are taken again");
        goto out;
    }
    if (strcmp(key, tv_hash_hex(e->key, hex)) == 0)
        goto out;
    json_decref(e->record);
    e->record = NULL;
    if (!p->opts->options.force) {
        rc = tv_error_set(&c->err, TV_E_CHANGED,
                          "%s: what %s holds of '%s' was taken of other "
                          "inputs, recipes, texts or settings, or on another "
                          "device",
                          p->opts->out, TVC_COMPARE_STATE, e->name);
        tv_error_hint(&c->err, "give another OUT, or --force to begin again");
    }
out:
    tv_free(path);
    tv_free(text);
    return rc;
}

/* Either may be NULL: then there was no memory for it. */
static enum tv_err write_whole(struct tvc_compare *p, const char *path,
                               const json_t *doc)
{
    size_t n = 0;
    char *const text = path && doc ? tvc_compare_text(doc, &n) : NULL;
    const enum tv_err rc =
        text ? tv_file_write_atomic(path, text, n, p->opts->options.sync,
                                    &p->c->err)
             : tvc_compare_oom(p->c);

    tv_free(text);
    return rc;
}

enum tv_err tvc_record_save(struct tvc_compare *p, struct entry *e)
{
    char *const path = record_path(p, e);
    const enum tv_err rc = write_whole(p, path, e->record);

    tv_free(path);
    return rc;
}

enum tv_err tvc_records_list(struct tvc_compare *p)
{
    static const char *const kinds[] = {[ENTRY_BASE] = "base",
                                        [ENTRY_DONOR] = "model",
                                        [ENTRY_MERGE] = "merge"};
    json_t *const list = json_array();
    json_t *const doc = json_pack("{s:O}", "entries", list);
    char *const path = tv_path_join(p->state, TVC_COMPARE_LIST);

    for (size_t i = 0; i < p->n_entries; i++) {
        const struct entry *e = &p->entries[i];
        (void)json_array_append_new(
            list, json_pack("{s:o, s:s, s:o}", "name", tvc_json_string(e->name),
                            "kind", kinds[e->kind], "ref",
                            e->ref ? tvc_json_string(e->ref) : json_null()));
    }
    const enum tv_err rc = write_whole(p, path, doc);

    tv_free(path);
    json_decref(doc);
    json_decref(list);
    return rc;
}

void tvc_record_put(struct tvc_compare *p, struct entry *e, const char *key,
                    json_t *value)
{
    if (!e->record) {
        char hex[33];
        e->record = json_pack("{s:s}", "key", tv_hash_hex(e->key, hex));
    }
    if (json_object_set_new(e->record, key, value) != 0)
        p->oom = true;
}

bool tvc_record_has(const struct entry *e, const char *key)
{
    return json_object_get(e->record, key) != NULL;
}
