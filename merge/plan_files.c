/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_files.c - what goes beside the weights.
 *
 * config.json comes from the base (or the first model) byte for byte; only what
 * must change is edited: dtype, number of layers, tie_word_embeddings. It is
 * the last file, since a directory without it loads nowhere.
 */
#include "plan_vocab.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

#include <jansson.h>

#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/text.h"

#define N_OF(a)   (sizeof(a) / sizeof((a)[0]))
#define FILES_MAX 40u
#define OWNED_MAX (2 * FILES_MAX + 2)

/* Any of the first N_TELLING files makes an input one "with a tokenizer". */
#define N_TELLING 7u
static const char *const tokenizer_files[] = {
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
};

/* How a model of several modalities prepares its other inputs. */
static const char *const processor_files[] = {
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
};

static enum tv_err add_file(struct planner *pl, const char *name,
                            const char *data, size_t n, const char *from)
{
    struct tvm_plan *const plan = pl->plan;
    if (plan->n_files == FILES_MAX)
        return tv_error_set(pl->err, TV_E_INTERNAL, "too many side files");
    struct tvm_side_file *const f = &plan->files[plan->n_files++];
    f->name = name;
    f->data = data;
    f->n = n;
    f->from = from;
    return TV_OK;
}

/* Keeps bytes until the plan is freed; takes them over in any case. */
static enum tv_err own(struct planner *pl, char *data)
{
    struct plan_storage *const st = pl->st;
    if (st->owned == NULL)
        st->owned = tv_calloc(OWNED_MAX, sizeof(*st->owned));
    if (st->owned == NULL || st->n_owned == OWNED_MAX) {
        tv_free(data);
        return plan_oom(pl);
    }
    st->owned[st->n_owned++] = data;
    return TV_OK;
}

static enum tv_err read_side(struct planner *pl, size_t input, const char *name,
                             bool *found, char **data, size_t *n)
{
    const struct tvm_plan_input *const in = &pl->plan->inputs[input];
    struct tv_error e;
    enum tv_err rc = TV_OK;
    tv_error_clear(&e);
    *found = false;
    *data = NULL;
    rc = tv_input_side_read(in->input, name, found, data, n, &e);
    if (rc == TV_OK && *found)
        return own(pl, *data);
    if (rc != TV_OK && plan_fatal(rc)) {
        if (pl->err != NULL)
            *pl->err = e;
        return rc;
    }
    if (rc != TV_OK)
        plan_report(pl, name, 1, true, rc, in->ref, "%s", e.msg);
    *found = false;
    return TV_OK;
}

/* Puts an edited text in the place of data. */
static enum tv_err replace(struct planner *pl, char *edited, size_t n_edited,
                           char **data, size_t *n)
{
    struct plan_storage *const st = pl->st;
    if (edited == NULL)
        return TV_OK;
    /* The last one owned is what was edited. */
    if (st->n_owned > 0 && st->owned[st->n_owned - 1] == *data)
        tv_free(st->owned[--st->n_owned]);
    *data = edited;
    *n = n_edited;
    return own(pl, edited);
}

/* Copies a side file of an input into the list when it has one. */
static enum tv_err copy_side(struct planner *pl, size_t input, const char *name,
                             bool *found)
{
    char *data = NULL;
    size_t n = 0;
    const enum tv_err rc = read_side(pl, input, name, found, &data, &n);
    if (rc != TV_OK || !*found)
        return rc;
    return add_file(pl, name, data, n, pl->plan->inputs[input].ref);
}

/* ---- tokenizer ------------------------------------------------------------
 */

static bool has_side(const struct planner *pl, size_t input, const char *name)
{
    const tv_input *const in = pl->plan->inputs[input].input;
    for (size_t i = 0; i < tv_input_side_count(in); i++) {
        if (strcmp(tv_input_side_name(in, i), name) == 0)
            return true;
    }
    return false;
}

static bool has_tokenizer(const struct planner *pl, size_t input)
{
    for (size_t i = 0; i < N_TELLING; i++) {
        if (has_side(pl, input, tokenizer_files[i]))
            return true;
    }
    return false;
}

/* Has the vocabulary been decided? */
static bool has_vocab(const struct planner *pl)
{
    return pl->vocab != NULL && !pl->vocab_bad;
}

static bool is_aligned(const struct planner *pl)
{
    return has_vocab(pl) && !pl->vocab->truncate;
}

/* A file of the tokenizer with the output's tokens and chat template. */
static enum tv_err tokenizer_file(struct planner *pl, size_t from,
                                  const char *name)
{
    char *data = NULL;
    char *edited = NULL;
    size_t n = 0;
    size_t n_edited = 0;
    bool found = false;
    bool leave_out = false;
    enum tv_err rc = TV_OK;

    TV_TRY(read_side(pl, from, name, &found, &data, &n));
    if (!found)
        goto out;
    TV_TRY(plan_vocab_file(pl, name, data, n, &edited, &n_edited, &leave_out));
    TV_TRY(replace(pl, edited, n_edited, &data, &n));
    if (!leave_out)
        rc = add_file(pl, name, data, n, pl->plan->inputs[from].ref);
out:
    return rc;
}

static enum tv_err add_tokenizer(struct planner *pl)
{
    const struct tvm_plan *const plan = pl->plan;
    size_t from = is_aligned(pl) ? pl->vocab->from : pl->st->donor;
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < plan->n_inputs && !has_tokenizer(pl, from); i++) {
        if (has_tokenizer(pl, i))
            from = i;
    }
    if (!has_tokenizer(pl, from)) {
        plan_report(pl, "tokenizer", 1, false, TV_OK, "",
                    "no tokenizer files found in any input; the output has "
                    "none");
        return TV_OK;
    }
    if (from != pl->st->donor && !is_aligned(pl))
        plan_note(pl, "tokenizer", 1, "",
                  "'%s' has no tokenizer files; those of '%s' are copied",
                  plan->inputs[pl->st->donor].ref, plan->inputs[from].ref);
    for (size_t i = 0; i < N_OF(tokenizer_files); i++) {
        if (has_side(pl, from, tokenizer_files[i]))
            TV_TRY(tokenizer_file(pl, from, tokenizer_files[i]));
    }
    if (pl->chat_template != NULL)
        TV_TRY(add_file(pl, "chat_template.jinja", pl->chat_template,
                        strlen(pl->chat_template), "the recipe"));
out:
    return rc;
}

static bool has_processor(const struct planner *pl, size_t input)
{
    for (size_t i = 0; i < N_OF(processor_files); i++) {
        if (has_side(pl, input, processor_files[i]))
            return true;
    }
    return false;
}

/* They go with config.json, not with the tokenizer. */
static enum tv_err add_processors(struct planner *pl)
{
    size_t from = pl->st->donor;
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < pl->plan->n_inputs && !has_processor(pl, from);
         i++) {
        if (has_processor(pl, i))
            from = i;
    }
    for (size_t i = 0; i < N_OF(processor_files); i++) {
        bool found = false;
        if (has_side(pl, from, processor_files[i]))
            TV_TRY(copy_side(pl, from, processor_files[i], &found));
    }
out:
    return rc;
}

/* ---- config.json ----------------------------------------------------------
 */

/* The dtype of most bytes among the tensors that are numbers to merge. */
static enum tv_dtype output_dtype(const struct tvm_plan *plan)
{
    uint64_t bytes[TV_DTYPE_COUNT] = {0};
    enum tv_dtype best = TV_DTYPE_NONE;
    for (size_t i = 0; i < plan->n_tensors; i++) {
        if (tv_dtype_is_math(plan->tensors[i].dtype))
            bytes[plan->tensors[i].dtype] += plan->tensors[i].bytes;
    }
    for (int t = 0; t < TV_DTYPE_COUNT; t++) {
        if (bytes[t] > bytes[best])
            best = (enum tv_dtype)t;
    }
    return best;
}

/* The class that the recipe takes the donor for. */
static enum tv_err set_class(struct planner *pl, const char *architecture,
                             const char *data, size_t n, char **out,
                             size_t *n_out)
{
    json_t *root = NULL;
    enum tv_err rc = TV_OK;

    TV_TRY(tv_json_parse_exact(data, n, "config.json", pl->err, &root));
    if (json_object_set_new(root, "architectures",
                            json_pack("[s]", architecture)) != 0) {
        rc = plan_oom(pl);
        goto out;
    }
    TV_TRY(tv_json_write_exact(root, pl->err, out, n_out));
out:
    json_decref(root);
    return rc;
}

/* Loaders compare vocab_size with the embedding, and padding counts (but not
 * in all models of several modalities: Llama 3.2 Vision has 8 rows more). */
static void check_rows(struct planner *pl, size_t from)
{
    const struct tvm_plan_input *const in = &pl->plan->inputs[from];
    const size_t embed = pl->refs[from].embed;
    const struct tv_input_tensor *t = NULL;

    if (is_aligned(pl) || in->arch->vocab == 0 || embed == SIZE_MAX ||
        in->arch->inferred || in->arch->n_modules != 1)
        return;
    t = tv_input_tensor(in->input, embed);
    if (t->rank == 2 && t->shape[0] > (uint64_t)in->arch->vocab)
        plan_report(pl, "rows beyond vocab_size", 1, false, TV_OK,
                    "config.json",
                    "vocab_size of '%s' is %lld, but its embedding has %llu "
                    "rows: it does not load, and the output will not either",
                    in->ref, (long long)in->arch->vocab,
                    (unsigned long long)t->shape[0]);
}

struct config_edits { /* of config.json, in the order of being made */
    struct tv_json_edit items[6];
    size_t n;
};

static struct tv_json_edit *edit_add(struct config_edits *e, const char *key,
                                     enum tv_edit_kind kind)
{
    assert(e->n < N_OF(e->items));
    struct tv_json_edit *const at = &e->items[e->n++];
    *at = (struct tv_json_edit){.key = key, .kind = kind};
    return at;
}

static void edit_dtype(const struct tvm_plan *plan, const struct tv_arch *a,
                       struct config_edits *e)
{
    static const char *const names[] = {"dtype", "torch_dtype"};
    const enum tv_dtype dtype = output_dtype(plan);

    if (dtype == TV_DTYPE_NONE || tv_dtype_from_torch(a->dtype) == dtype)
        return;
    for (size_t i = 0; i < N_OF(names); i++) {
        struct tv_json_edit *const at = edit_add(e, names[i], TV_EDIT_STRING);
        at->s = tv_dtype_torch_name(dtype);
        at->only_if_present = true;
    }
}

static void edit_layers(struct planner *pl, const struct tv_arch *a,
                        struct config_edits *e)
{
    if (pl->n_layers == a->n_layers)
        return;
    if (a->layers_key != NULL)
        edit_add(e, a->layers_key, TV_EDIT_INT)->i = pl->n_layers;
    else if (a->modules[0].layers_key == NULL)
        plan_report(pl, "layer count", 1, true, TV_E_UNSUPPORTED, "config.json",
                    "the output has %lld layers, but no key of config.json is "
                    "known to hold their number (%lld), so it would not load",
                    (long long)pl->n_layers, (long long)a->n_layers);
}

/* mergekit leaves the flag alone: a written head would then be ignored by
 * whoever loads the model. */
static void edit_tied(struct planner *pl, const struct tv_arch *a,
                      struct config_edits *e)
{
    const bool written = pl->st->head_written;
    const bool wrong = written ? a->tied : pl->tied && !a->tied;

    if (!wrong)
        return;
    edit_add(e, "tie_word_embeddings", TV_EDIT_BOOL)->i = written ? 0 : 1;
    plan_note(pl, "tied", 1, "config.json",
              "tie_word_embeddings becomes %s, because the output has "
              "%s lm_head of its own",
              written ? "false" : "true", written ? "an" : "no");
}

static void edit_quantized(const struct tv_arch *a, struct config_edits *e)
{
    if (!a->quantized_before)
        return;
    (void)edit_add(e, "quantization_config", TV_EDIT_REMOVE);
    (void)edit_add(e, "compression_config", TV_EDIT_REMOVE);
}

/* Edits *data; false in *ok: they cannot be made, and a problem says so. */
static enum tv_err apply_edits(struct planner *pl, const struct config_edits *e,
                               char **data, size_t *n, bool *ok)
{
    char *edited = NULL;
    size_t n_edited = 0;
    struct tv_error why;

    *ok = true;
    if (e->n == 0)
        return TV_OK;
    tv_error_clear(&why);
    const enum tv_err rc =
        tv_json_edit(*data, *n, e->items, e->n, &why, &edited, &n_edited);
    if (rc == TV_OK)
        return replace(pl, edited, n_edited, data, n);
    *ok = false;
    if (plan_fatal(rc)) {
        if (pl->err != NULL)
            *pl->err = why;
        return rc;
    }
    plan_report(pl, "config", 1, true, rc, "config.json", "%s", why.msg);
    return TV_OK;
}

/* What the rest of the recipe says about an input's config.json: its class, the
 * layers of slices, the vocabulary. */
static enum tv_err apply_recipe(struct planner *pl, size_t from, char **data,
                                size_t *n)
{
    const struct tvm_recipe_override *const override =
        tvm_recipe_override_of(pl->r, pl->plan->inputs[from].ref);
    char *edited = NULL;
    size_t n_edited = 0;
    enum tv_err rc = TV_OK;

    if (override != NULL) {
        TV_TRY(set_class(pl, override->architecture, *data, *n, &edited,
                         &n_edited));
        TV_TRY(replace(pl, edited, n_edited, data, n));
    }
    for (size_t i = 0; i < pl->n_slices; i++) {
        if (!pl->slices[i].is_first || pl->slices[i].recipe->whole)
            continue;
        edited = NULL;
        TV_TRY(plan_stack_config(pl, from, pl->slices[i].module, *data, *n,
                                 &edited, &n_edited));
        TV_TRY(replace(pl, edited, n_edited, data, n));
    }
    if (has_vocab(pl)) {
        edited = NULL;
        TV_TRY(
            plan_vocab_config(pl, from, false, *data, *n, &edited, &n_edited));
        TV_TRY(replace(pl, edited, n_edited, data, n));
    }
out:
    return rc;
}

/* The input whose config.json the output's is made of. */
static size_t config_input(const struct planner *pl)
{
    const struct tvm_plan *const plan = pl->plan;
    size_t from = pl->st->donor;

    for (size_t i = 0;
         i < plan->n_inputs && !plan->inputs[from].arch->has_config; i++) {
        if (plan->inputs[i].arch->has_config)
            from = i;
    }
    return from;
}

static enum tv_err add_config(struct planner *pl)
{
    const struct tvm_plan *const plan = pl->plan;
    const size_t from = config_input(pl);
    const struct tv_arch *const a = plan->inputs[from].arch;
    struct config_edits edits = {.n = 0};
    char *data = NULL;
    size_t n = 0;
    bool found = false;
    bool ok = true;
    enum tv_err rc = TV_OK;

    TV_TRY(read_side(pl, from, "config.json", &found, &data, &n));
    if (!found) {
        plan_report(pl, "config", 1, false, TV_OK, "",
                    "no input has a config.json; the output has none and does "
                    "not load as a model directory");
        goto out;
    }
    check_rows(pl, from);
    edit_dtype(plan, a, &edits);
    edit_layers(pl, a, &edits);
    edit_tied(pl, a, &edits);
    edit_quantized(a, &edits);
    TV_TRY(apply_edits(pl, &edits, &data, &n, &ok));
    if (!ok)
        goto out;
    TV_TRY(apply_recipe(pl, from, &data, &n));
    TV_TRY(add_file(pl, "config.json", data, n, plan->inputs[from].ref));
out:
    return rc;
}

static enum tv_err add_generation(struct planner *pl)
{
    static const char name[] = "generation_config.json";
    size_t from = pl->st->donor;
    char *data = NULL;
    char *edited = NULL;
    size_t n = 0;
    size_t n_edited = 0;
    bool found = false;
    enum tv_err rc = TV_OK;

    if (is_aligned(pl) && has_side(pl, pl->vocab->from, name))
        from = pl->vocab->from;
    if (!has_vocab(pl))
        return copy_side(pl, from, name, &found);
    TV_TRY(read_side(pl, from, name, &found, &data, &n));
    if (!found)
        goto out;
    TV_TRY(plan_vocab_config(pl, from, true, data, n, &edited, &n_edited));
    TV_TRY(replace(pl, edited, n_edited, &data, &n));
    rc = add_file(pl, name, data, n, pl->plan->inputs[from].ref);
out:
    return rc;
}

/* What is told by names and shapes alone, since no table has this class. */
static void note_guessed(struct planner *pl)
{
    const size_t donor = pl->st->donor;
    const struct tv_arch *const a = pl->plan->inputs[donor].arch;
    const struct plan_ref *const ref = &pl->refs[donor];
    const struct tv_arch_tensor *in_layer = NULL;
    char names[3][100] = {"", "none", "none"};
    const size_t at[] = {SIZE_MAX, ref->embed, ref->head};

    if (!a->inferred)
        return;
    for (size_t i = 0; i < a->n_tensors && in_layer == NULL; i++) {
        if (a->tensors[i].layer >= 0 && a->tensors[i].module == 0)
            in_layer = &a->tensors[i];
    }
    for (size_t i = 1; i < 3; i++) {
        if (at[i] != SIZE_MAX)
            (void)tv_text_printable(a->tensors[at[i]].name, names[i],
                                    sizeof(names[i]));
    }
    if (in_layer != NULL) {
        (void)tv_text_printable(in_layer->name, names[0], sizeof(names[0]));
        if (in_layer->layer_at < sizeof(names[0]))
            names[0][in_layer->layer_at] = '\0';
    }
    pl->guessed = tvm_arena_fmt(
        plan_arena(pl),
        "no table of names has '%s': %lld layers in '%s', embedding '%s' and "
        "head '%s' are told by names and shapes",
        a->architecture[0] == '\0' ? a->model_type : a->architecture,
        (long long)a->n_layers, names[0], names[1], names[2]);
    if (pl->guessed == NULL)
        pl->oom = true;
    else
        tvm_problem_note(pl->problems, pl->plan->inputs[donor].ref, "%s",
                         pl->guessed);
}

enum tv_err plan_files_make(struct planner *pl)
{
    struct tvm_plan *const plan = pl->plan;
    const char *card = NULL;
    size_t n = 0;
    enum tv_err rc = TV_OK;

    plan->files =
        tvm_arena_get(plan_arena(pl), FILES_MAX, sizeof(*plan->files));
    if (plan->files == NULL)
        return plan_oom(pl);
    note_guessed(pl);
    TV_TRY(add_generation(pl));
    if (plan->options.copy_tokenizer || is_aligned(pl))
        TV_TRY(add_tokenizer(pl));
    else if (pl->chat_template != NULL)
        plan_report(pl, "chat template", 1, false, TV_OK, "chat_template",
                    "not written: the tokenizer files are left out");
    TV_TRY(add_processors(pl));
    if (plan->options.write_model_card) {
        TV_TRY(plan_card_make(pl, &card, &n));
        TV_TRY(add_file(pl, "README.md", card, n, ""));
    }
    TV_TRY(add_file(pl, "tvmerge_config.yml", pl->r->text, pl->r->n_text, ""));
    if (pl->r->mergekit_syntax)
        TV_TRY(add_file(pl, "mergekit_config.yml", pl->r->text, pl->r->n_text,
                        ""));
    TV_TRY(add_config(pl));
out:
    return rc;
}
