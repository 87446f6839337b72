/* SPDX-License-Identifier: Apache-2.0 */
/*
 * card.c - README.md of a merged model: the Hugging Face model card.
 *
 * Front matter for the hub (the tag `merge` marks a merge there; base_model
 * takes hub names only), then what a reader needs to repeat the merge. Licences
 * of the inputs are quoted, never concluded from.
 */
#include "plan_parts.h"

#include <stdio.h>
#include <string.h>

#include <yaml.h>

#include "tv/alloc.h"
#include "tv/sys.h"
#include "tv/text.h"

#define CARD_MAX (4u << 20)
#define KEPT_MAX 5u
#define N_OF(a)  (sizeof(a) / sizeof((a)[0]))

/* ---- front matter ---------------------------------------------------------
 */

static int write_to_buf(void *arg, unsigned char *data, size_t n)
{
    struct tv_buf *const b = arg;
    tv_buf_add(b, data, n);
    return b->failed ? 0 : 1;
}

static bool emit_scalar(yaml_emitter_t *em, const char *s)
{
    yaml_event_t e;
    return yaml_scalar_event_initialize(&e, NULL, NULL, (const yaml_char_t *)s,
                                        (int)strlen(s), 1, 1,
                                        YAML_ANY_SCALAR_STYLE) != 0 &&
           yaml_emitter_emit(em, &e) != 0;
}

static bool emit_pair(yaml_emitter_t *em, const char *key, const char *value)
{
    return emit_scalar(em, key) && emit_scalar(em, value);
}

static bool emit_list(yaml_emitter_t *em, const char *key,
                      const char *const *items, size_t n)
{
    yaml_event_t e;
    if (!emit_scalar(em, key) ||
        yaml_sequence_start_event_initialize(
            &e, NULL, NULL, 1,
            n == 0 ? YAML_FLOW_SEQUENCE_STYLE : YAML_BLOCK_SEQUENCE_STYLE) ==
            0 ||
        yaml_emitter_emit(em, &e) == 0)
        return false;
    for (size_t i = 0; i < n; i++) {
        if (!emit_scalar(em, items[i]))
            return false;
    }
    return yaml_sequence_end_event_initialize(&e) != 0 &&
           yaml_emitter_emit(em, &e) != 0;
}

static bool emit_front(yaml_emitter_t *em, const char *const *bases,
                       size_t n_bases, const char *const *tags, size_t n_tags)
{
    yaml_event_t e;
    return yaml_stream_start_event_initialize(&e, YAML_UTF8_ENCODING) != 0 &&
           yaml_emitter_emit(em, &e) != 0 &&
           yaml_document_start_event_initialize(&e, NULL, NULL, NULL, 1) != 0 &&
           yaml_emitter_emit(em, &e) != 0 &&
           yaml_mapping_start_event_initialize(&e, NULL, NULL, 1,
                                               YAML_BLOCK_MAPPING_STYLE) != 0 &&
           yaml_emitter_emit(em, &e) != 0 &&
           emit_list(em, "base_model", bases, n_bases) &&
           emit_pair(em, "base_model_relation", "merge") &&
           emit_pair(em, "library_name", "transformers") &&
           emit_pair(em, "pipeline_tag", "text-generation") &&
           emit_list(em, "tags", tags, n_tags) &&
           yaml_mapping_end_event_initialize(&e) != 0 &&
           yaml_emitter_emit(em, &e) != 0 &&
           yaml_document_end_event_initialize(&e, 1) != 0 &&
           yaml_emitter_emit(em, &e) != 0 &&
           yaml_stream_end_event_initialize(&e) != 0 &&
           yaml_emitter_emit(em, &e) != 0;
}

static enum tv_err front_matter(struct planner *pl, struct tv_buf *b)
{
    const struct tvm_plan *const plan = pl->plan;
    const char *tags[4] = {"merge", "tvmerge", plan->method_name, NULL};
    size_t n_tags = 3;
    const char **bases = NULL;
    size_t n_bases = 0;
    yaml_emitter_t em;
    bool ok = false;

    bases = tvm_arena_get(plan_arena(pl), plan->n_inputs, sizeof(*bases));
    if (bases == NULL || yaml_emitter_initialize(&em) == 0)
        return plan_oom(pl);
    for (size_t i = 0; i < plan->n_inputs; i++) {
        bool listed = pl->refs[i].hub == NULL;
        for (size_t k = 0; k < n_bases && !listed; k++)
            listed = strcmp(bases[k], pl->refs[i].hub) == 0;
        if (!listed)
            bases[n_bases++] = pl->refs[i].hub;
    }
    if (pl->r->mergekit_syntax)
        tags[n_tags++] = "mergekit";
    yaml_emitter_set_output(&em, write_to_buf, b);
    yaml_emitter_set_unicode(&em, 1);
    tv_buf_str(b, "---\n");
    ok = emit_front(&em, bases, n_bases, tags, n_tags);
    yaml_emitter_delete(&em);
    tv_buf_str(b, "---\n\n");
    return ok ? TV_OK : plan_oom(pl);
}

/* ---- licences -------------------------------------------------------------
 */

/* README.md is no side file of models in a directory: read from there. */
static bool read_card(tv_input *in, char **data, size_t *n)
{
    const char *const dir = tv_input_dir(in);
    char *const path = dir == NULL ? NULL : tv_path_join(dir, "README.md");
    struct tv_error e;
    bool found = false;
    tv_error_clear(&e);
    if (path != NULL)
        found = tv_path_exists(path) &&
                tv_file_read(path, TVM_YAML_BYTES_MAX, &e, data, n) == TV_OK;
    else if (tv_input_side_read(in, "README.md", &found, data, n, &e) != TV_OK)
        found = false;
    tv_free(path);
    return found;
}

/* `license:` of an input's README.md, NULL when it does not say. */
static enum tv_err licence_of(struct planner *pl, size_t input,
                              const char **out)
{
    struct tvm_problems ignored;
    struct tvm_arena arena = {NULL, 0, 0};
    const struct tvm_node *root = NULL;
    const struct tvm_node *name = NULL;
    char *data = NULL;
    size_t n = 0;
    const char *end = NULL;
    enum tv_err rc = TV_OK;

    *out = NULL;
    tvm_problems_init(&ignored);
    /* A card is decoration: one that cannot be read is as good as none. */
    if (!read_card(pl->plan->inputs[input].input, &data, &n) || n < 8 ||
        strncmp(data, "---\n", 4) != 0)
        goto out;
    end = strstr(data + 4, "\n---");
    if (end == NULL || (size_t)(end - data) > TVM_YAML_BYTES_MAX)
        goto out;
    TV_TRY(tvm_yaml_parse("README.md", data + 4, (size_t)(end - data) - 3,
                          &arena, &ignored, pl->err, &root));
    name = tvm_node_find(root, "license");
    if (name != NULL && name->kind == TVM_NODE_SCALAR && name->n_text > 0) {
        *out = tvm_arena_strdup(plan_arena(pl), name->text);
        if (*out == NULL)
            rc = plan_oom(pl);
    }
out:
    tvm_arena_free(&arena);
    tvm_problems_free(&ignored);
    tv_free(data);
    return rc;
}

/* ---- body -----------------------------------------------------------------
 */

/* `text` as inline code, whatever it holds. */
static void inline_code(struct tv_buf *b, const char *text)
{
    char s[300];
    (void)tv_text_printable(text, s, sizeof(s));
    tv_buf_str(b, strchr(s, '`') == NULL ? "`" : "`` ");
    tv_buf_str(b, s);
    tv_buf_str(b, strchr(s, '`') == NULL ? "`" : " ``");
}

/* A fence longer than any run of backticks in the recipe. */
static void fenced(struct tv_buf *b, const char *text, size_t n)
{
    size_t run = 0;
    size_t longest = 2;
    for (size_t i = 0; i < n; i++) {
        run = text[i] == '`' ? run + 1 : 0;
        if (run > longest)
            longest = run;
    }
    for (size_t i = 0; i <= longest; i++)
        tv_buf_str(b, "`");
    tv_buf_str(b, "yaml\n");
    tv_buf_add(b, text, n);
    if (n > 0 && text[n - 1] != '\n')
        tv_buf_str(b, "\n");
    for (size_t i = 0; i <= longest; i++)
        tv_buf_str(b, "`");
    tv_buf_str(b, "\n");
}

static void method_line(const struct planner *pl, struct tv_buf *b)
{
    const struct tvm_method_info *const m = &pl->r->info;
    const char *arxiv = m->paper == NULL ? NULL : strstr(m->paper, "arXiv ");
    const char *doi = m->paper == NULL ? NULL : strstr(m->paper, "doi ");
    tv_buf_fmt(b, "Method: `%s`, %s", m->name, m->summary);
    if (m->paper != NULL)
        tv_buf_fmt(b, " (%s)", m->paper);
    tv_buf_str(b, ".\n");
    for (; arxiv != NULL; arxiv = strstr(arxiv, "arXiv ")) {
        arxiv += 6;
        tv_buf_fmt(b, "<https://arxiv.org/abs/%.*s>\n",
                   (int)strspn(arxiv, "0123456789."), arxiv);
    }
    if (doi != NULL)
        tv_buf_fmt(b, "<https://doi.org/%.*s>\n", (int)strcspn(doi + 4, " ,;"),
                   doi + 4);
}

static enum tv_err models_part(struct planner *pl, struct tv_buf *b)
{
    const struct tvm_plan *const plan = pl->plan;
    enum tv_err rc = TV_OK;
    tv_buf_str(b, "\n## Models\n\n");
    for (size_t i = 0; i < plan->n_inputs; i++) {
        char hex[33];
        const char *licence = NULL;
        TV_TRY(licence_of(pl, i, &licence));
        tv_buf_str(b, "- ");
        inline_code(b, plan->inputs[i].ref);
        if (pl->r->base.text != NULL &&
            strcmp(pl->r->base.text, plan->inputs[i].ref) == 0)
            tv_buf_str(b, ", the base");
        if (pl->refs[i].revision != NULL) {
            tv_buf_str(b, ", revision ");
            inline_code(b, pl->refs[i].revision);
        }
        tv_buf_str(b, ", licence: ");
        if (licence == NULL)
            tv_buf_str(b, "not stated");
        else
            inline_code(b, licence);
        tv_buf_fmt(b, ", fingerprint `%s`\n",
                   tv_hash_hex(plan->inputs[i].fingerprint, hex));
    }
out:
    return rc;
}

static void vocabulary_part(const struct tvm_vocabulary *v, struct tv_buf *b)
{
    if (v == NULL)
        return;
    tv_buf_str(b, "\n## Vocabulary\n\nSource: ");
    inline_code(b, v->source);
    tv_buf_fmt(b, "; %llu tokens, %llu rows.\n",
               (unsigned long long)v->n_tokens, (unsigned long long)v->n_rows);
    if (v->n_notes > 0)
        tv_buf_str(b, "\n");
    for (size_t i = 0; i < v->n_notes; i++) {
        tv_buf_str(b, "- ");
        inline_code(b, v->notes[i]);
        tv_buf_str(b, "\n");
    }
}

/* What became of the tensors; names of those that are no weights to merge. */
static void tensors_part(const struct planner *pl, struct tv_buf *b)
{
    const struct tvm_plan *const plan = pl->plan;
    size_t n_copied = 0;
    size_t n_kept = 0;

    for (size_t i = 0; i < plan->n_tensors; i++)
        n_copied += plan->tensors[i].action == TVM_COPY;
    tv_buf_fmt(b,
               "\n## Tensors\n\n%zu tensors: %zu merged, %zu copied from one "
               "model.\n",
               plan->n_tensors, plan->n_tensors - n_copied, n_copied);
    if (pl->guessed != NULL) {
        tv_buf_str(b, "\n- ");
        inline_code(b, pl->guessed);
        tv_buf_str(b, "\n");
    }
    for (size_t i = 0; i < plan->n_tensors; i++) {
        const struct tvm_tensor *const t = &plan->tensors[i];
        if (t->action != TVM_COPY || tv_dtype_is_math(t->dtype))
            continue;
        if (n_kept < KEPT_MAX) {
            tv_buf_str(b, n_kept == 0 ? "\n- no weights, copied: " : ", ");
            inline_code(b, t->name);
        }
        n_kept++;
    }
    if (n_kept > KEPT_MAX)
        tv_buf_fmt(b, " and %zu more", n_kept - KEPT_MAX);
    if (n_kept > 0)
        tv_buf_str(b, "\n");
}

enum tv_err plan_card_make(struct planner *pl, const char **out, size_t *n)
{
    const struct tvm_plan *const plan = pl->plan;
    struct tv_buf b;
    enum tv_err rc = TV_OK;

    tv_buf_init(&b, CARD_MAX);
    TV_TRY(front_matter(pl, &b));
    tv_buf_str(&b, "# Merged model\n\n");
    tv_buf_str(&b, "Made with tvmerge " TV_VERSION ".\n");
    method_line(pl, &b);
    TV_TRY(models_part(pl, &b));
    tensors_part(pl, &b);
    vocabulary_part(plan->vocabulary, &b);
    tv_buf_str(&b, "\n## Recipe\n\n");
    fenced(&b, pl->r->text, pl->r->n_text);
    tv_buf_fmt(&b, "\nRandom seed: %llu.\n",
               (unsigned long long)plan->options.seed);
    TV_TRY(tv_buf_ok(&b, pl->err));
    *out = tvm_arena_strndup(plan_arena(pl), b.data, b.n_bytes);
    *n = b.n_bytes;
    if (*out == NULL)
        rc = plan_oom(pl);
out:
    tv_buf_free(&b);
    return rc;
}
