/* SPDX-License-Identifier: Apache-2.0 */
/*
 * status_compare.c - how far a comparison is: from the list that it has left in
 * OUT/.tvcompare, its records, and the journals of its merges. Only reads.
 */
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>

#include "status.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/sys.h"
#include "tv/text.h"

static enum tv_err no_memory(struct tvc *c)
{
    return tv_error_set(&c->err, TV_E_NOMEM, "out of memory");
}

static bool is_running(const char *state)
{
    char *const path = tv_path_join(state, "lock");
    const int fd = path ? tv_sys()->open(path, O_RDONLY | O_CLOEXEC, 0) : -1;
    const bool yes = fd >= 0 && flock(fd, LOCK_SH | LOCK_NB) != 0;

    if (fd >= 0)
        (void)tv_sys()->close(fd);
    tv_free(path);
    return yes;
}

/* A document in the state directory; *out NULL where there is none. */
static enum tv_err load(struct tvc *c, const char *state, const char *name,
                        json_t **out)
{
    enum tv_err rc = TV_OK;
    char *const path = tv_path_join(state, name);
    char *text = NULL;
    size_t n = 0;

    *out = NULL;
    if (!path)
        return no_memory(c);
    if (tv_path_exists(path)) {
        TV_TRY(tv_file_read(path, 16u << 20, &c->err, &text, &n));
        rc = tv_json_parse(text, n, path, &c->err, out);
    }
out:
    tv_free(text);
    tv_free(path);
    return rc;
}

struct line { /* of the table */
    const char *name, *kind, *ref, *state;
    struct tvm_status merge;
    double mean; /* geometric, 0: not scored */
};

static enum tv_err look(struct tvc *c, const char *out, const char *state,
                        const json_t *entry, struct line *l)
{
    enum tv_err rc = TV_OK;
    json_t *record = NULL;
    char *file = NULL;
    char *dir = NULL;

    *l = (struct line){
        .name = json_string_value(json_object_get(entry, "name")),
        .kind = json_string_value(json_object_get(entry, "kind")),
        .ref = json_string_value(json_object_get(entry, "ref")),
        .state = "waiting",
    };
    if (!l->name || !l->kind)
        return tv_error_set(&c->err, TV_E_CORRUPT, "%s/%s is damaged", state,
                            TVC_COMPARE_LIST);
    file = tv_asprintf("%s.json", l->name);
    dir = tv_path_join(out, l->name);
    if (!file || !dir) {
        rc = no_memory(c);
        goto out;
    }
    TV_TRY(load(c, state, file, &record));
    if (strcmp(l->kind, "merge") == 0 && tv_path_is_dir(dir))
        TV_TRY(tvm_status(dir, &l->merge, &c->err));
    if (json_object_get(record, "texts")) {
        l->state = "done";
        l->mean = json_number_value(json_object_get(record, "geometric_mean"));
    } else if (l->merge.state != TVM_ABSENT) {
        l->state = l->merge.state == TVM_FINISHED ? "merged" : "merging";
    }
out:
    json_decref(record);
    tv_free(file);
    tv_free(dir);
    return rc;
}

static json_t *line_json(const struct line *l)
{
    const bool merge = l->merge.state != TVM_ABSENT;

    return json_pack(
        "{s:o, s:s, s:o, s:s, s:o, s:o, s:o, s:o, s:o}", "name",
        tvc_json_string(l->name), "kind", l->kind, "ref",
        l->ref ? tvc_json_string(l->ref) : json_null(), "state", l->state,
        "n_done", merge ? tvc_json_u64(l->merge.n_done) : json_null(),
        "n_tensors", merge ? tvc_json_u64(l->merge.n_tensors) : json_null(),
        "bytes_done", merge ? tvc_json_u64(l->merge.bytes_done) : json_null(),
        "bytes_total", merge ? tvc_json_u64(l->merge.bytes_total) : json_null(),
        "geometric_mean", l->mean > 0 ? tvc_json_real(l->mean) : json_null());
}

static void print(struct tvc *c, const struct line *l)
{
    char more[160] = "";

    if (l->mean > 0)
        (void)snprintf(more, sizeof more, ", geometric mean %.4f", l->mean);
    else if (l->merge.n_masks_made < l->merge.n_masks)
        (void)snprintf(more, sizeof more, ", calibration: %zu of %zu masks",
                       l->merge.n_masks_made, l->merge.n_masks);
    else if (l->merge.state == TVM_UNFINISHED)
        (void)snprintf(more, sizeof more, ", %zu of %zu tensors",
                       l->merge.n_done, l->merge.n_tensors);
    else if (l->merge.state == TVM_FINISHED)
        (void)snprintf(more, sizeof more, ", not scored yet");
    tvc_out(&c->out, "  %s%s%s%s: %s%s\n", l->name, l->ref ? " (" : "",
            l->ref ? l->ref : "", l->ref ? ")" : "", l->state, more);
}

enum tv_err tvc_status_compare(struct tvc *c, const char *out)
{
    enum tv_err rc = TV_OK;
    char *const state = tv_path_join(out, TVC_COMPARE_STATE);
    json_t *doc = NULL;
    json_t *const shown = json_array();
    struct line *lines = NULL;
    size_t n_done = 0;

    if (!state) {
        rc = no_memory(c);
        goto out;
    }
    TV_TRY(load(c, state, TVC_COMPARE_LIST, &doc));
    const json_t *const list = json_object_get(doc, "entries");
    const bool running = is_running(state);
    const size_t n = json_array_size(list);
    lines = tv_calloc(n + 1, sizeof *lines);
    if (!lines) {
        rc = no_memory(c);
        goto out;
    }
    for (size_t i = 0; i < n; i++) {
        TV_TRY(look(c, out, state, json_array_get(list, i), &lines[i]));
        n_done += strcmp(lines[i].state, "done") == 0;
        (void)json_array_append_new(shown, line_json(&lines[i]));
    }
    const bool finished = n > 0 && n_done == n && !running;
    if (c->out.json) {
        tvc_out_json(&c->out,
                     json_pack("{s:s, s:s, s:b, s:o, s:o, s:O}", "schema",
                               "tvmerge.status/1", "state",
                               finished ? "finished" : "unfinished", "running",
                               (int)running, "n_done", tvc_json_u64(n_done),
                               "n_entries", tvc_json_u64(n), "entries", shown));
        goto out;
    }
    tvc_out(&c->out, "%s: comparison %s%s, %zu of %zu entries done\n", out,
            finished ? "finished" : "unfinished",
            running ? ", running now" : "", n_done, n);
    for (size_t i = 0; i < n; i++)
        print(c, &lines[i]);
out:
    tv_free(lines);
    json_decref(shown);
    json_decref(doc);
    tv_free(state);
    return rc;
}
