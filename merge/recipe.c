/* SPDX-License-Identifier: Apache-2.0 */
/*
 * recipe.c - mergekit's recipe language: tree -> checked recipe.
 *
 * Everything that can be judged without opening a model is judged here, with
 * line and column. What mergekit ignores silently (unknown keys) is a warning
 * with a suggestion; what it reads and we do not is refused, because the result
 * would differ.
 */
#include "recipe.h"

#include <string.h>

#include "recipe_read.h"
#include "tv/adapters.h"
#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"

/* ---- the document ---------------------------------------------------------
 */

static void read_method(struct recipe_reader *rd, const struct tvm_node *root)
{
    const struct tvm_node *const m = recipe_given(root, "merge_method");
    struct tv_buf list;
    char name[64];
    char where[TVM_WHERE_MAX];
    const char *like = NULL;
    if (m == NULL && recipe_given(root, "experts") != NULL) {
        recipe_error_node(
            rd, root,
            "this is a recipe for mergekit-moe: mixtures of experts are "
            "not made here");
        return;
    }
    if (m == NULL && recipe_given(root, "genome") != NULL) {
        recipe_error_node(
            rd, root,
            "this is a recipe for mergekit-evolve: there is no search "
            "for parameters here");
        return;
    }
    if (m == NULL) {
        recipe_error_node(rd, root, "'merge_method' is missing");
        return;
    }
    rd->r->method_line = m->line;
    rd->r->method_col = m->col;
    if (m->kind != TVM_NODE_SCALAR) {
        recipe_error_node(rd, m, "'merge_method' must be a name");
        return;
    }
    rd->r->method = tvm_method_find(m->text);
    if (rd->r->method != NULL) {
        tvm_method_info(rd->r->method, &rd->r->info);
        return;
    }
    tv_buf_init(&list, 8192);
    for (size_t i = 0; i < tvm_method_count(); i++) {
        struct tvm_method_info info;
        tvm_method_info(tvm_method_at(i), &info);
        tv_buf_fmt(&list, "%s%s", i == 0 ? "" : ", ", info.name);
    }
    if (tvm_adapter_method_find(m->text) != NULL) {
        tv_buf_free(&list);
        tvm_problem_add(
            rd->problems, true, TV_E_USAGE,
            tvm_where(where, sizeof(where), rd->r->path, m->line, m->col),
            "merge_method '%s' merges adapters into an adapter: add 'output: "
            "adapter', and name adapters alone",
            m->text);
        return;
    }
    like = tvm_method_suggest(m->text);
    tvm_problem_add(
        rd->problems, true, TV_E_USAGE,
        tvm_where(where, sizeof(where), rd->r->path, m->line, m->col),
        "unknown merge_method '%s'%s%s%s",
        tv_text_printable(m->text, name, sizeof(name)),
        like == NULL ? " (known: " : "; did you mean '",
        like != NULL  ? like
        : list.failed ? ""
                      : list.data,
        like == NULL ? ")" : "'?");
    tv_buf_free(&list);
}

/* Methods that mergekit has under these names, for mergekit_config.yml. */
static bool mergekit_knows(const char *method)
{
    static const char *const names[] = {
        "linear",           "slerp",       "nuslerp",      "multislerp",
        "karcher",          "ties",        "dare_ties",    "dare_linear",
        "breadcrumbs",      "della",       "della_linear", "model_stock",
        "breadcrumbs_ties", "sce",         "ram",          "ramplus_tl",
        "task_arithmetic",  "passthrough", "nearswap",     "arcee_fusion"};
    for (size_t i = 0; i < N_OF(names); i++) {
        if (strcmp(names[i], method) == 0)
            return true;
    }
    return false;
}

/* A document's name becomes the name of a directory. */
static void read_name(struct recipe_reader *rd, const struct tvm_node *root)
{
    static const char safe[] = "abcdefghijklmnopqrstuvwxyz"
                               "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-";
    const struct tvm_node *const e = recipe_given(root, "name");
    if (!rd->several || e == NULL)
        return;
    if (!recipe_is_text(e) || e->text[0] == '.' || e->n_text > 128 ||
        strspn(e->text, safe) != e->n_text) {
        recipe_error_node(
            rd, e,
            "the name of a document has up to 128 letters, digits, '_', "
            "'-' and '.', and does not begin with a '.'");
        return;
    }
    rd->r->name.text = e->text;
    rd->r->name.line = e->line;
    rd->r->name.col = e->col;
}

static void read_document(struct recipe_reader *rd, const struct tvm_node *root)
{
    static const char *const keys[] = {
        "merge_method", "models", "slices", "modules", "base_model", "dtype",
        "out_dtype", "parameters", "tokenizer", "chat_template",
        "tokenizer_source", "calibration",
        /* of adapters, adapter_merge.c */
        "output", "rank", "svd_rank",
        /* of several documents */
        "name"};
    struct tvm_recipe *const r = rd->r;
    const struct tvm_node *e = NULL;

    if (root->kind != TVM_NODE_MAP) {
        recipe_error_node(rd, root,
                          "a recipe is a map: merge_method, models, ...");
        return;
    }
    /* First: the method decides which parameters are known. */
    read_method(rd, root);
    read_name(rd, root);
    recipe_unknown_keys(rd, root, keys, N_OF(keys) - (rd->several ? 0 : 1));
    if (rd->several && recipe_given(root, "output") != NULL)
        recipe_error_key(
            rd, TV_E_UNSUPPORTED, recipe_given(root, "output"),
            "adapters are not merged in a file of several documents");
    r->mergekit_syntax =
        !rd->several && r->method != NULL && mergekit_knows(r->info.name);

    recipe_read_vocab(rd, root);
    recipe_read_what(rd, root);

    e = recipe_given(root, "base_model");
    if (e != NULL)
        r->base = recipe_read_ref(rd, e);
    e = recipe_given(root, "dtype");
    if (e != NULL) {
        r->dtype = recipe_read_dtype(rd, e);
        r->bad_dtype = r->dtype == TV_DTYPE_NONE;
    }
    e = recipe_given(root, "out_dtype");
    if (e != NULL) {
        r->out_dtype = recipe_read_dtype(rd, e);
        r->bad_dtype = r->bad_dtype || r->out_dtype == TV_DTYPE_NONE;
    }
    recipe_note_float64(rd, root);
    r->parameters = recipe_read_parameters(rd, root, &r->bad_parameters);
    r->calibration = recipe_read_calibration(rd, root);
}

/* ---- loading --------------------------------------------------------------
 */

static enum tv_err read_all(struct recipe_reader *rd, struct tvm_recipe *first,
                            const struct tvm_node *root, struct tv_error *err)
{
    struct tvm_recipe *r = first;
    rd->several = root->next != NULL;
    for (const struct tvm_node *n = root; n != NULL; n = n->next) {
        if (n != root) {
            r->next = tv_calloc(1, sizeof(*r));
            if (r->next == NULL)
                return tv_error_set(err, TV_E_NOMEM, "out of memory");
            r = r->next;
            r->path = first->path;
            r->text = first->text;
            r->n_text = first->n_text;
        }
        r->line = n->line;
        rd->r = r;
        read_document(rd, n);
    }
    if (rd->several)
        recipe_check_documents(rd, first);
    return TV_OK;
}

enum tv_err tvm_recipe_load(const char *path, struct tvm_problems *problems,
                            struct tv_error *err, tvm_recipe **out)
{
    return tvm_recipe_load_as(path, NULL, NULL, problems, err, out);
}

/* Must a recipe of the method be told? */
static bool says_more(const char *method, const char *sparsify)
{
    if (strstr(method, "sparsegpt") != NULL)
        return false;
    return strcmp(sparsify,
                  strcmp(method, "ties") == 0 ? "magnitude" : "none") != 0;
}

enum tv_err tvm_recipe_load_as(const char *path, const char *method,
                               const char *sparsify,
                               struct tvm_problems *problems,
                               struct tv_error *err, tvm_recipe **out)
{
    struct tvm_recipe *r = NULL;
    const struct tvm_node *root = NULL;
    struct recipe_reader rd = {NULL, problems, false, false};
    const size_t errors_before = problems->n_errors;
    enum tv_err rc = TV_OK;

    *out = NULL;
    r = tv_calloc(1, sizeof(*r));
    if (r == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory");
    r->is_first = true;
    r->other_method = method != NULL;
    r->path = tv_strdup(path);
    if (r->path == NULL) {
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory");
        goto out;
    }
    if (tv_path_is_dir(path)) {
        rc =
            tv_error_set(err, TV_E_INPUT, "%s is a directory, no recipe", path);
        tv_error_hint(err, "the recipe comes first, then where the result "
                           "goes: RECIPE OUT");
        goto out;
    }
    rc = tv_file_read(path, TVM_YAML_BYTES_MAX, err, &r->text, &r->n_text);
    if (rc == TV_E_CORRUPT)
        rc = tv_error_set(err, TV_E_USAGE, "%s is no recipe: larger than 1 MiB",
                          path);
    if (rc != TV_OK)
        goto out;
    TV_TRY(recipe_replace(r, "merge_method", method, false, err));
    /* Without one it is what most methods do anyway. */
    TV_TRY(recipe_replace(r, "sparsify", sparsify,
                          sparsify != NULL && method != NULL &&
                              says_more(method, sparsify),
                          err));
    TV_TRY(tvm_yaml_parse(path, r->text, r->n_text, &r->arena, problems, err,
                          &root));
    if (root != NULL)
        TV_TRY(read_all(&rd, r, root, err));
    if (rd.oom)
        rc = tv_error_set(err, TV_E_NOMEM, "out of memory while reading %s",
                          path);
    else if (problems->n_errors > errors_before)
        rc = tvm_problems_code(problems);
    if (rc != TV_OK) {
        for (size_t i = 0; i < problems->n; i++) {
            if (!rd.oom && problems->items[i].is_error &&
                problems->items[i].code == rc) {
                rc = tv_error_set(err, rc, "%s: %s", problems->items[i].where,
                                  problems->items[i].message);
                break;
            }
        }
        for (struct tvm_recipe *d = r; d != NULL; d = d->next)
            d->has_errors = true;
        if (rd.oom || root == NULL || root->kind != TVM_NODE_MAP)
            goto out;
    }
    *out = r;
    r = NULL;
out:
    tvm_recipe_free(r);
    return rc;
}

void tvm_recipe_free(tvm_recipe *r)
{
    while (r != NULL) {
        struct tvm_recipe *const next = r->next;
        tvm_arena_free(&r->arena);
        if (r->is_first) {
            tv_free(r->text);
            tv_free(r->path);
        }
        tv_free(r);
        r = next;
    }
}

const char *tvm_recipe_text(const tvm_recipe *r, size_t *n)
{
    *n = r->n_text;
    return r->text;
}
