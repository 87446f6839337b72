/* SPDX-License-Identifier: Apache-2.0 */
/*
 * compare_report.c - the result of tvmerge compare, as Markdown and JSON.
 *
 * Both are made of the records alone, so a run that was killed and went on ends
 * with the table that it would have ended with; of what it had finished before,
 * times and memory included.
 */
#include <stdio.h>
#include <string.h>

#include "compare.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"
#include "tveval.h"

char *tvc_compare_text(const json_t *doc, size_t *n)
{
    char *const text = tv_json_text(doc, JSON_INDENT(1));

    *n = text ? strlen(text) : 0;
    return text;
}

static const char *kind_name(const struct entry *e)
{
    switch (e->kind) {
    case ENTRY_BASE:
        return "base";
    case ENTRY_DONOR:
        return "model";
    case ENTRY_MERGE:
        break;
    }
    return "merge";
}

static json_t *row_json(const struct entry *e)
{
    json_t *row = json_pack("{s:o, s:s}", "name", tvc_json_string(e->name),
                            "kind", kind_name(e));
    const bool kept = e->dir && tv_path_is_dir(e->dir);

    if (e->ref)
        (void)json_object_set_new(row, "model", tvc_json_string(e->ref));
    if (e->method) {
        (void)json_object_set_new(row, "method", tvc_json_string(e->method));
        (void)json_object_set_new(row, "recipe", tvc_json_string(e->recipe));
        (void)json_object_set_new(row, "out",
                                  kept ? tvc_json_string(e->dir) : json_null());
        (void)json_object_set_new(row, "keeps_all", json_boolean(e->keeps_all));
        (void)json_object_set_new(row, "random", json_boolean(e->random));
    }
    (void)json_object_update(row, e->record);
    (void)json_object_del(row, "key");
    return row;
}

static json_t *document(const struct tvc_compare *p, const struct entry *best)
{
    const struct compare_opts *o = p->opts;
    json_t *rows = json_array();
    json_t *texts = json_array();

    for (size_t i = 0; i < o->n_texts; i++)
        (void)json_array_append_new(texts, tvc_json_string(o->texts[i]));
    for (size_t i = 0; i < p->n_entries; i++)
        (void)json_array_append_new(rows, row_json(&p->entries[i]));
    return json_pack(
        "{s:s, s:o, s:o, s:o, s:s, s:o, s:o, s:o}", "schema",
        "tvmerge.compare/1", "out", tvc_json_string(o->out), "base",
        p->base ? tvc_json_string(p->base) : json_null(), "texts", texts,
        "protocol", tve_protocol_name(o->eval.ppl.protocol), "seed",
        tvc_json_u64(o->options.seed), "best",
        best ? tvc_json_string(best->name) : json_null(), "rows", rows);
}

/* A cell's text must not end the cell. */
static void cell(struct tv_buf *b, const char *text)
{
    char plain[512];

    (void)tv_text_printable(text, plain, sizeof plain);
    tv_buf_str(b, " ");
    for (const char *q = plain; *q; q++)
        tv_buf_fmt(b, "%s%c", *q == '|' ? "\\" : "", *q);
    tv_buf_str(b, " |");
}

static const char *base_name(const char *path)
{
    const char *slash = strrchr(path, '/');

    return slash && slash[1] ? slash + 1 : path;
}

static void number(struct tv_buf *b, const json_t *v)
{
    if (json_is_number(v))
        tv_buf_fmt(b, " %.4f |", json_number_value(v));
    else
        tv_buf_str(b, " - |");
}

static void size_cell(struct tv_buf *b, const json_t *v)
{
    char text[32];

    if (json_is_integer(v))
        cell(b, tv_format_bytes((uint64_t)json_integer_value(v), text,
                                sizeof text));
    else
        tv_buf_str(b, " - |");
}

static void line(struct tv_buf *b, const struct entry *e)
{
    const json_t *r = e->record;
    const json_t *texts = json_object_get(r, "texts");
    const json_t *seconds = json_object_get(r, "seconds");
    char time[32];

    tv_buf_str(b, "|");
    if (e->kind == ENTRY_BASE) {
        tv_buf_str(b, " base:");
        cell(b, e->ref);
    } else if (e->kind == ENTRY_DONOR) {
        cell(b, e->ref);
    } else if (e->keeps_all || e->random) {
        char both[200];
        (void)snprintf(both, sizeof both, "%.140s%s%s", e->name,
                       e->keeps_all ? " (density 1)" : "",
                       e->random ? " (random calibration)" : "");
        cell(b, both);
    } else {
        cell(b, e->name);
    }
    for (size_t i = 0; i < json_array_size(texts); i++)
        number(b, json_object_get(json_array_get(texts, i), "ppl"));
    number(b, json_object_get(r, "geometric_mean"));
    if (json_is_number(seconds))
        cell(b, tvc_duration(json_number_value(seconds), time, sizeof time));
    else
        tv_buf_str(b, " - |");
    size_cell(b, json_object_get(r, "peak_memory_bytes"));
    size_cell(b, json_object_get(r, "disk_bytes"));
    tv_buf_str(b, "\n");
}

static void table(const struct tvc_compare *p, struct tv_buf *b)
{
    const struct compare_opts *o = p->opts;

    tv_buf_str(b, "| method |");
    for (size_t i = 0; i < o->n_texts; i++)
        cell(b, base_name(o->texts[i]));
    tv_buf_str(b, " geometric mean | time | peak memory | disk |\n|---|");
    for (size_t i = 0; i < o->n_texts + 4; i++)
        tv_buf_str(b, "---:|");
    tv_buf_str(b, "\n");
    for (size_t i = 0; i < p->n_entries; i++)
        line(b, &p->entries[i]);
    const json_t *r = p->n_entries > 0 ? p->entries[0].record : NULL;
    tv_buf_fmt(b, "\nPerplexity: protocol %s, context %lld, ",
               tve_protocol_name(o->eval.ppl.protocol),
               (long long)json_integer_value(json_object_get(r, "context")));
    if (json_is_integer(json_object_get(r, "bos")))
        tv_buf_fmt(b, "BOS %lld.\n",
                   (long long)json_integer_value(json_object_get(r, "bos")));
    else
        tv_buf_str(b, "no BOS.\n");
    for (size_t i = 0; i < p->n_entries; i++) {
        if (!p->entries[i].keeps_all)
            continue;
        tv_buf_str(b, "(density 1): the recipe names no density below 1, so "
                      "nothing is left out, however it is chosen.\n");
        break;
    }
}

static enum tv_err save(const struct tvc_compare *p, const char *name,
                        const char *data, size_t n)
{
    char *path = tv_path_join(p->opts->out, name);
    enum tv_err rc = TV_E_NOMEM;

    if (path)
        rc = tv_file_write_atomic(path, data, n, p->opts->options.sync,
                                  &p->c->err);
    else
        rc = tv_error_set(&p->c->err, TV_E_NOMEM, "out of memory");
    tv_free(path);
    return rc;
}

enum tv_err tvc_compare_report(struct tvc_compare *p, const struct entry *best)
{
    enum tv_err rc = TV_OK;
    struct tvc *c = p->c;
    json_t *doc = document(p, best);
    size_t n = 0;
    char *text = doc ? tvc_compare_text(doc, &n) : NULL;
    struct tv_buf b;

    tv_buf_init(&b, 16u << 20);
    table(p, &b);
    if (!text || b.failed) {
        rc = tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    TV_TRY(save(p, "compare.json", text, n));
    TV_TRY(save(p, "compare.md", b.data, b.n_bytes));
    if (c->out.json) {
        tvc_out_json(&c->out, doc);
        doc = NULL;
    } else {
        tvc_out_bytes(&c->out, b.data, b.n_bytes);
    }
    if (best)
        tvc_say(&c->out, "best: %s", best->name);
out:
    tv_buf_free(&b);
    tv_free(text);
    json_decref(doc);
    return rc;
}
