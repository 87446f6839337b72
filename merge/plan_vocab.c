/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_vocab.c - the tokens of the output, their ids, the number of rows.
 *
 * The first tokenizer (of the base, or of the model that `source` names) keeps
 * its tokens and ids. `union` puts behind them, model by model in the order of
 * the recipe, the ordinary tokens and then the added tokens that it lacks. A
 * token whose id is beyond the rows of its model's embedding has no row: it
 * counts as absent. Embeddings never get fewer rows than the first model (for
 * union: than any) has, unless pad_to_multiple_of asks for it.
 */
#include "plan_vocab.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "chat.h"
#include "tv/alloc.h"
#include "tv/format.h"
#include "tv/text.h"

#define NOTES_MAX 64u
#define NAMES_MAX 5u

/* ---- notes ----------------------------------------------------------------
 */

void plan_vocab_note(struct planner *pl, const char *fmt, ...)
{
    struct plan_vocab *const v = pl->vocab;
    char text[1024];
    va_list ap;
    const char *kept = NULL;

    va_start(ap, fmt);
    (void)vsnprintf(text, sizeof(text), fmt, ap);
    va_end(ap);
    tvm_problem_note(pl->problems, "vocabulary", "%s", text);
    if (v->shown.n_notes == NOTES_MAX)
        return;
    kept = tvm_arena_strdup(plan_arena(pl), text);
    if (kept == NULL) {
        pl->oom = true;
        return;
    }
    v->notes[v->shown.n_notes++] = kept;
}

/* "'a', 'b' and 3 more" of what `add` is called for. */
struct names {
    struct tv_buf b;
    size_t n;
};

static void names_add(struct names *l, const char *s)
{
    char text[64];
    if (l->n++ < NAMES_MAX)
        tv_buf_fmt(&l->b, "%s'%s'", l->n == 1 ? "" : ", ",
                   tv_text_printable(s, text, sizeof(text)));
}

static const char *names_text(struct names *l)
{
    if (l->n > NAMES_MAX)
        tv_buf_fmt(&l->b, " and %zu more", l->n - NAMES_MAX);
    return l->b.failed || l->b.data == NULL ? "" : l->b.data;
}

/* ---- tokenizers of the inputs ---------------------------------------------
 */

static const char *ref_of(const struct planner *pl, size_t input)
{
    return pl->plan->inputs[input].ref;
}

/* Rows that every tensor over tokens has; 0: there is no such tensor. */
static uint64_t rows_of(const struct planner *pl, size_t input)
{
    const struct tvm_plan_input *const in = &pl->plan->inputs[input];
    uint64_t least = 0;
    for (size_t i = 0; i < in->arch->n_tensors; i++) {
        const struct tv_input_tensor *const t = tv_input_tensor(in->input, i);
        if (in->arch->tensors[i].vocab_dim != 0 || t->rank == 0)
            continue;
        if (least == 0 || t->shape[0] < least)
            least = t->shape[0];
    }
    return least;
}

static bool has_side(const struct planner *pl, size_t input, const char *name)
{
    const tv_input *const in = pl->plan->inputs[input].input;
    for (size_t i = 0; i < tv_input_side_count(in); i++) {
        if (strcmp(tv_input_side_name(in, i), name) == 0)
            return true;
    }
    return false;
}

/* What an input has instead of a tokenizer.json, or NULL. */
static const char *other_tokenizer(const struct planner *pl, size_t input)
{
    static const char *const names[] = {"tokenizer.model", "vocab.json",
                                        "vocab.txt", "spiece.model",
                                        "tekken.json"};
    for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
        if (has_side(pl, input, names[i]))
            return names[i];
    }
    return NULL;
}

static void report_missing(struct planner *pl, size_t input)
{
    const char *const other = other_tokenizer(pl, input);
    plan_report(pl, "tokenizers", 10, true, TV_E_INPUT,
                plan_where(pl, pl->refs[input].where),
                "'%s' has no tokenizer.json%s%s%s; vocabularies are aligned "
                "by it. AutoTokenizer.from_pretrained(DIR)"
                ".save_pretrained(DIR) of transformers makes one",
                ref_of(pl, input), other == NULL ? "" : " (only ",
                other == NULL ? "" : other, other == NULL ? "" : ")");
}

/* A parsed tokenizer takes about four times its text, an edited one eight
 * times. Small ones go into the fixed overhead that --memory allows. */
#define PER_BYTE 8u
static bool fits_memory(const struct planner *pl, size_t n_text)
{
    return n_text < (size_t)4 << 20 ||
           PER_BYTE * (uint64_t)n_text <= pl->plan->options.memory_bytes;
}

static void report_memory(struct planner *pl, size_t input, size_t n_text)
{
    char a[32];
    char b[32];
    const uint64_t need = PER_BYTE * (uint64_t)n_text;
    plan_report(
        pl, "memory for tokenizers", 1, true, TV_E_BUDGET, ref_of(pl, input),
        "aligning a tokenizer.json of %s needs --memory %s (%llu "
        "bytes)",
        tv_format_bytes(n_text, a, sizeof(a)),
        tv_format_bytes_arg(need, b, sizeof(b)), (unsigned long long)need);
}

/* Reads the tokenizer of an input, once per contents; *out NULL when it has
 * none, or after a problem, which sets *bad. `quiet`: what cannot be read is
 * nothing to report. */
static enum tv_err read_one(struct planner *pl, size_t input, bool quiet,
                            const struct tvm_vocab **out, bool *bad)
{
    struct plan_vocab *const v = pl->vocab;
    tv_input *const in = pl->plan->inputs[input].input;
    struct tv_error e;
    struct tv_hash hash;
    char *data = NULL;
    json_t *root = NULL;
    size_t n = 0;
    bool found = false;
    enum tv_err rc = TV_OK;

    *out = NULL;
    tv_error_clear(&e);
    TV_TRY(tv_input_side_read(in, "tokenizer.json", &found, &data, &n, &e));
    if (!found)
        goto out;
    hash = tv_hash128(data, n);
    for (size_t i = 0; i < v->n_owned; i++) {
        if (tv_hash_equal(v->owned_by[i], hash)) {
            *out = &v->owned[i];
            goto out;
        }
    }
    if (!fits_memory(pl, n)) {
        *bad = true;
        if (!quiet)
            report_memory(pl, input, n);
        goto out;
    }
    TV_TRY(tv_json_parse_exact(data, n, "tokenizer.json", &e, &root));
    /* One is parsed or edited at a time, beside what is kept of the others. */
    v->kept_bytes += n;
    if (PER_BYTE * (uint64_t)n > v->most_bytes)
        v->most_bytes = PER_BYTE * (uint64_t)n;
    v->owned_by[v->n_owned] = hash;
    rc = tvm_vocab_read(root, "tokenizer.json", &e, &v->owned[v->n_owned++]);
    if (rc == TV_OK)
        *out = &v->owned[v->n_owned - 1];
out:
    json_decref(root);
    tv_free(data);
    if (rc == TV_OK)
        return TV_OK;
    if (plan_fatal(rc)) {
        if (pl->err != NULL)
            *pl->err = e;
        return rc;
    }
    *bad = true;
    if (!quiet)
        plan_report(pl, "tokenizers", 10, true, rc, ref_of(pl, input), "%s",
                    e.msg);
    return TV_OK;
}

/* A model without a tokenizer is taken to have the first one's. */
static void assume(struct planner *pl, size_t input, bool *bad)
{
    struct plan_vocab *const v = pl->vocab;
    if (other_tokenizer(pl, input) != NULL ||
        v->of[input].rows != v->of[v->from].rows) {
        *bad = true;
        report_missing(pl, input);
        return;
    }
    v->of[input].v = v->of[v->from].v;
    plan_report(pl, "assumed tokenizers", 10, false, TV_OK, ref_of(pl, input),
                "'%s' has no tokenizer; it is taken to be that of '%s', which "
                "has as many rows",
                ref_of(pl, input), ref_of(pl, v->from));
}

static void check_kind(struct planner *pl, size_t input, bool *bad)
{
    struct plan_vocab *const v = pl->vocab;
    const struct tvm_vocab *const a = v->of[v->from].v;
    const struct tvm_vocab *const b = v->of[input].v;
    char ka[64];
    char kb[64];

    /* A file that does not say how spaces are written may be of any kind. */
    if (strcmp(a->type, b->type) != 0 ||
        (a->spaces != b->spaces && a->spaces != TVM_SPACES_PLAIN &&
         b->spaces != TVM_SPACES_PLAIN)) {
        *bad = true;
        plan_report(pl, "kinds of tokenizers", 10, true, TV_E_INPUT,
                    plan_where(pl, pl->refs[input].where),
                    "the tokenizers of '%s' (%s) and '%s' (%s) are of "
                    "different kinds: the same token is written differently, "
                    "so their rows cannot be matched",
                    ref_of(pl, v->from), tvm_vocab_kind(a, ka),
                    ref_of(pl, input), tvm_vocab_kind(b, kb));
    } else if (!tv_hash_equal(a->rules, b->rules)) {
        plan_report(pl, "rules of tokenizers", 3, false, TV_OK,
                    ref_of(pl, input),
                    "'%s' normalizes or splits text in another way than '%s', "
                    "whose rules are used",
                    ref_of(pl, input), ref_of(pl, v->from));
    }
}

static enum tv_err read_all(struct planner *pl, bool *bad)
{
    struct plan_vocab *const v = pl->vocab;
    const size_t n = pl->plan->n_inputs;
    enum tv_err rc = TV_OK;

    v->owned = tv_calloc(n + 1, sizeof(*v->owned));
    v->owned_by = tv_calloc(n + 1, sizeof(*v->owned_by));
    if (v->owned == NULL || v->owned_by == NULL)
        return plan_oom(pl);
    TV_TRY(read_one(pl, v->from, false, &v->of[v->from].v, bad));
    if (v->of[v->from].v == NULL) {
        if (!*bad)
            report_missing(pl, v->from);
        *bad = true;
        goto out;
    }
    for (size_t i = 0; i < n; i++) {
        if (v->of[i].v != NULL)
            continue;
        bool broken = false;
        TV_TRY(read_one(pl, i, false, &v->of[i].v, &broken));
        if (v->of[i].v == NULL && !broken)
            assume(pl, i, &broken);
        if (v->of[i].v != NULL && i != v->from)
            check_kind(pl, i, &broken);
        *bad = *bad || broken;
    }
    for (size_t i = 0; i < n && !*bad; i++) {
        if (v->of[i].rows == 0)
            v->of[i].rows = v->of[i].v->n_ids;
    }
out:
    return rc;
}

/* ---- tokens of the output -------------------------------------------------
 */

static size_t slot_of(const struct plan_vocab *v, const char *s, size_t n)
{
    size_t i = (size_t)tv_hash64(s, n) & (v->n_slots - 1);
    while (v->slots[i] != 0) {
        const struct plan_token *const t = &v->tokens[v->slots[i] - 1];
        if (t->n == n && memcmp(t->s, s, n) == 0)
            break;
        i = (i + 1) & (v->n_slots - 1);
    }
    return i;
}

static struct plan_token *find(const struct plan_vocab *v, const char *s,
                               size_t n)
{
    const size_t i = slot_of(v, s, n);
    return v->slots[i] == 0 ? NULL : &v->tokens[v->slots[i] - 1];
}

const struct plan_token *plan_vocab_find(const struct plan_vocab *v,
                                         const char *s, size_t n)
{
    return find(v, s, n);
}

bool plan_vocab_beyond(const struct plan_vocab *v, const char *s, size_t n)
{
    const struct tvm_token *const t = tvm_vocab_find(v->of[v->from].v, s, n);
    return t != NULL && (uint64_t)t->id >= v->of[v->from].rows;
}

bool plan_vocab_dropped(const struct plan_vocab *v, const char *s, size_t n)
{
    return plan_vocab_beyond(v, s, n) && find(v, s, n) == NULL;
}

static struct plan_token *add(struct plan_vocab *v, const char *s, size_t n,
                              int64_t id, bool added)
{
    struct plan_token *const t = &v->tokens[v->n_tokens++];
    t->s = s;
    t->n = (uint32_t)n;
    t->id = (int32_t)id;
    t->added = added;
    v->slots[slot_of(v, s, n)] = (uint32_t)v->n_tokens;
    if ((uint64_t)id >= v->n_ids)
        v->n_ids = (uint64_t)id + 1;
    return t;
}

static enum tv_err room_for_tokens(struct planner *pl)
{
    struct plan_vocab *const v = pl->vocab;
    size_t most = pl->r->vocab.n_tokens + 1;
    for (size_t i = 0; i < v->n_owned; i++)
        most += v->owned[i].n;
    v->n_slots = 64;
    while (v->n_slots < 2 * most)
        v->n_slots *= 2;
    v->tokens = tv_calloc(most, sizeof(*v->tokens));
    v->slots = tv_calloc(v->n_slots, sizeof(*v->slots));
    return v->tokens == NULL || v->slots == NULL ? plan_oom(pl) : TV_OK;
}

/* The first tokenizer's tokens that have rows. */
static void keep_first(struct planner *pl)
{
    struct plan_vocab *const v = pl->vocab;
    const struct tvm_vocab *const first = v->of[v->from].v;
    struct names gone = {.n = 0};

    tv_buf_init(&gone.b, 4096);
    for (size_t id = 0; id < first->n_ids; id++) {
        const struct tvm_token *const t = tvm_vocab_at(first, (int64_t)id);
        if (t == NULL)
            continue;
        if (id < v->of[v->from].rows) {
            (void)add(v, t->s, t->n, t->id, t->added);
        } else {
            v->n_dropped++;
            names_add(&gone, t->s);
        }
    }
    v->n_kept = v->n_tokens;
    if (v->n_dropped > 0)
        plan_report(pl, "tokens without rows", 5, false, TV_OK,
                    ref_of(pl, v->from),
                    "%zu token%s of the tokenizer of '%s' %s beyond the %llu "
                    "rows of its embedding and left out unless another model "
                    "has %s: %s",
                    v->n_dropped, v->n_dropped == 1 ? "" : "s",
                    ref_of(pl, v->from), v->n_dropped == 1 ? "is" : "are",
                    (unsigned long long)v->of[v->from].rows,
                    v->n_dropped == 1 ? "it" : "them", names_text(&gone));
    tv_buf_free(&gone.b);
}

static bool same_flags(const struct tvm_token *a, const struct tvm_token *b)
{
    return a->single_word == b->single_word && a->lstrip == b->lstrip &&
           a->rstrip == b->rstrip && a->normalized == b->normalized &&
           a->special == b->special;
}

/* A token that is there already: who has it as added token first decides. */
static void meet(struct planner *pl, size_t input, const struct tvm_token *t,
                 struct plan_token *there)
{
    struct plan_vocab *const v = pl->vocab;
    const struct tvm_token *const before =
        there->is_new != NULL
            ? there->is_new
            : tvm_vocab_find(v->of[v->from].v, there->s, there->n);
    char text[64];

    if (!t->added || before == NULL)
        return;
    if (!there->added) {
        there->added = true;
        there->is_new = t;
        there->promoted = there < v->tokens + v->n_kept;
        if (there->promoted)
            v->n_promoted++;
        else
            v->n_ordinary--;
        plan_vocab_note(pl, "'%s' becomes an added token, as in '%s'",
                        tv_text_printable(t->s, text, sizeof(text)),
                        ref_of(pl, input));
    } else if (!same_flags(before, t)) {
        plan_note(pl, "settings of added tokens", 5, ref_of(pl, input),
                  "the added token '%s' has other settings (special, strip, "
                  "normalized) than in the models before; the first ones "
                  "are used",
                  tv_text_printable(t->s, text, sizeof(text)));
    }
}

static void unite(struct planner *pl, bool added)
{
    struct plan_vocab *const v = pl->vocab;
    for (size_t i = 0; i < pl->plan->n_inputs; i++) {
        const struct plan_vocab_of *const of = &v->of[i];
        bool seen = i == v->from || !of->merged;
        /* Equal tokenizers over more rows have more tokens. */
        for (size_t k = 0; k < pl->plan->n_inputs && !seen; k++)
            seen = (k == v->from || (k < i && v->of[k].merged)) &&
                   v->of[k].v == of->v && v->of[k].rows >= of->rows;
        for (size_t id = 0; id < of->v->n_ids && id < of->rows && !seen; id++) {
            const struct tvm_token *const t = tvm_vocab_at(of->v, (int64_t)id);
            if (t == NULL || t->added != added)
                continue;
            struct plan_token *const there = find(v, t->s, t->n);
            if (there != NULL) {
                meet(pl, i, t, there);
                continue;
            }
            const struct tvm_token *const twin =
                tvm_vocab_find(v->of[v->from].v, t->s, t->n);
            if (twin != NULL && (uint64_t)twin->id < v->of[v->from].rows)
                continue; /* shares its id with another token there */
            add(v, t->s, t->n, (int64_t)v->n_ids, added)->is_new = t;
            if (!added)
                v->n_ordinary++;
        }
    }
}

static void apply_rules(struct planner *pl)
{
    struct plan_vocab *const v = pl->vocab;
    const struct tvm_recipe_vocab *const r = &pl->r->vocab;
    for (size_t i = 0; i < r->n_tokens; i++) {
        const struct tvm_recipe_token *const rule = &r->tokens[i];
        const size_t n = strlen(rule->token);
        if (n == 0)
            continue;
        struct plan_token *t = find(v, rule->token, n);
        if (t == NULL)
            t = add(v, rule->token, n, (int64_t)v->n_ids, true);
        t->rule = rule;
    }
}

static void warn_without_rows(struct planner *pl)
{
    struct plan_vocab *const v = pl->vocab;
    struct names none = {.n = 0};

    tv_buf_init(&none.b, 4096);
    for (size_t i = 0; i < v->n_tokens; i++) {
        const struct plan_token *const t = &v->tokens[i];
        bool has = t->rule != NULL && t->rule->from != TVM_TOKEN_DEFAULT;
        for (size_t k = 0; k < pl->plan->n_inputs && !has; k++) {
            const struct tvm_token *const x =
                v->of[k].merged ? tvm_vocab_find(v->of[k].v, t->s, t->n) : NULL;
            has = x != NULL && (uint64_t)x->id < v->of[k].rows;
        }
        if (!has)
            names_add(&none, t->s);
    }
    if (none.n > 0)
        plan_report(pl, "tokens of no model", 1, false, TV_OK, "tokenizer",
                    "%zu token%s in no model that is merged and get%s zeros: "
                    "%s",
                    none.n, none.n == 1 ? " is" : "s are",
                    none.n == 1 ? "s" : "", names_text(&none));
    tv_buf_free(&none.b);
}

/* ---- rows -----------------------------------------------------------------
 */

static void choose_rows(struct planner *pl)
{
    struct plan_vocab *const v = pl->vocab;
    const uint64_t pad = (uint64_t)pl->r->vocab.pad_to;
    uint64_t had = v->of[v->from].rows;

    for (size_t i = 0; i < pl->plan->n_inputs; i++) {
        if (pl->r->vocab.source == TVM_VOCAB_UNION && v->of[i].merged &&
            v->of[i].rows > had)
            had = v->of[i].rows;
    }
    v->keep_padding = pad == 0;
    v->n_rows = pad == 0 ? (v->n_ids > had ? v->n_ids : had)
                         : (v->n_ids + pad - 1) / pad * pad;
    if (v->n_rows < had)
        plan_note(pl, "fewer rows", 1, "tokenizer",
                  "pad_to_multiple_of: %lld makes the embeddings smaller: "
                  "%llu rows instead of %llu",
                  (long long)pl->r->vocab.pad_to, (unsigned long long)v->n_rows,
                  (unsigned long long)had);
}

static void show(struct planner *pl)
{
    struct plan_vocab *const v = pl->vocab;
    static const char *const sources[] = {"", "union", "base", ""};
    struct names added = {.n = 0};

    v->shown.source = pl->r->vocab.source == TVM_VOCAB_MODEL
                          ? ref_of(pl, v->from)
                          : sources[pl->r->vocab.source];
    v->shown.from = ref_of(pl, v->from);
    v->shown.n_tokens = v->n_tokens;
    v->shown.n_rows = v->n_rows;
    v->shown.n_added = v->n_tokens - v->n_kept;
    tv_buf_init(&added.b, 4096);
    for (size_t i = v->n_kept; i < v->n_tokens; i++)
        names_add(&added, v->tokens[i].s);
    plan_vocab_note(pl, "tokens and ids of '%s' (%zu), %s%zu added%s%s",
                    ref_of(pl, v->from), v->n_kept,
                    v->n_dropped > 0 ? "some left out, " : "", added.n,
                    added.n > 0 ? ": " : "", names_text(&added));
    tv_buf_free(&added.b);
    plan_vocab_note(pl, "%llu rows: %zu for tokens, %llu of padding",
                    (unsigned long long)v->n_rows, v->n_tokens,
                    (unsigned long long)(v->n_rows - v->n_tokens));
    if (v->n_ordinary > 0)
        plan_vocab_note(pl,
                        "%zu of the added are ordinary tokens: words may be "
                        "split otherwise than by '%s'",
                        v->n_ordinary, ref_of(pl, v->from));
}

/* ---- chat template --------------------------------------------------------
 */

/* The chat template of an input, owned, or NULL. */
static enum tv_err template_of(struct planner *pl, size_t input, char **out)
{
    tv_input *const in = pl->plan->inputs[input].input;
    struct tv_error e;
    json_t *root = NULL;
    const json_t *t = NULL;
    char *data = NULL;
    size_t n = 0;
    bool found = false;
    enum tv_err rc = TV_OK;

    *out = NULL;
    tv_error_clear(&e);
    if (in == NULL)
        return TV_OK; /* reported already */
    TV_TRY(
        tv_input_side_read(in, "chat_template.jinja", &found, &data, &n, &e));
    if (found) {
        *out = data;
        data = NULL;
        goto out;
    }
    TV_TRY(
        tv_input_side_read(in, "tokenizer_config.json", &found, &data, &n, &e));
    if (!found)
        goto out;
    TV_TRY(tv_json_parse_exact(data, n, "tokenizer_config.json", &e, &root));
    t = json_object_get(root, "chat_template");
    /* Several under names: the default one. */
    for (size_t i = 0; i < json_array_size(t); i++) {
        const json_t *const one = json_array_get(t, i);
        const char *const name =
            json_string_value(json_object_get(one, "name"));
        if (name != NULL && strcmp(name, "default") == 0) {
            t = json_object_get(one, "template");
            break;
        }
    }
    if (json_is_string(t)) {
        *out = tv_strdup(json_string_value(t));
        if (*out == NULL)
            rc = tv_error_set(&e, TV_E_NOMEM, "out of memory");
    }
out:
    json_decref(root);
    tv_free(data);
    if (rc != TV_OK && plan_fatal(rc)) {
        if (pl->err != NULL)
            *pl->err = e;
        return rc;
    }
    return TV_OK; /* one that cannot be read is as good as none */
}

/* Length without the white space at both ends; *s is moved. */
static size_t stripped(const char **s)
{
    static const char space[] = " \t\r\n";
    *s += strspn(*s, space);
    size_t n = strlen(*s);
    while (n > 0 && strchr(space, (*s)[n - 1]) != NULL)
        n--;
    return n;
}

/* The template that most models have, the first of equals. */
static enum tv_err auto_template(struct planner *pl)
{
    const size_t n = pl->plan->n_inputs;
    char **const all = tv_calloc(n + 1, sizeof(*all));
    size_t best = 0;
    size_t best_count = 0;
    enum tv_err rc = TV_OK;

    if (all == NULL)
        return plan_oom(pl);
    for (size_t i = 0; i < n; i++)
        TV_TRY(template_of(pl, i, &all[i]));
    for (size_t i = 0; i < n; i++) {
        size_t count = 0;
        for (size_t k = 0; k < n && all[i] != NULL; k++) {
            const char *a = all[i];
            const char *b = all[k];
            const size_t n_a = stripped(&a);
            if (b != NULL && n_a == stripped(&b) && strncmp(a, b, n_a) == 0)
                count++;
        }
        if (count > best_count) {
            best = i;
            best_count = count;
        }
    }
    if (best_count == 0) {
        plan_report(pl, "chat template", 1, false, TV_OK, "chat_template",
                    "no model has a chat template; the output has none");
        goto out;
    }
    const char *text = all[best];
    const size_t n_text = stripped(&text);
    pl->chat_template = tvm_arena_strndup(plan_arena(pl), text, n_text);
    if (pl->chat_template == NULL)
        rc = plan_oom(pl);
    tvm_problem_note(pl->problems, "chat_template",
                     "that of '%s', which %zu of %zu models have",
                     ref_of(pl, best), best_count, n);
out:
    for (size_t i = 0; i < n; i++)
        tv_free(all[i]);
    tv_free(all);
    return rc;
}

/* A named template whose marks are no tokens teaches a model nothing. */
static void warn_marks(struct planner *pl, const struct tvm_chat *chat)
{
    for (size_t i = 0; i < 4 && chat->tokens[i] != NULL; i++) {
        const char *const s = chat->tokens[i];
        if (pl->vocab == NULL || pl->vocab->truncate ||
            plan_vocab_find(pl->vocab, s, strlen(s)) != NULL)
            continue;
        plan_report(pl, "marks of the chat template", 4, false, TV_OK,
                    "chat_template",
                    "the template writes '%s', which is no token of the "
                    "output; 'tokenizer: {tokens: {\"%s\": ...}}' can add it",
                    s, s);
    }
}

static enum tv_err choose_template(struct planner *pl)
{
    const char *const given = pl->r->vocab.chat_template;
    const struct tvm_chat *const named =
        given == NULL ? NULL : tvm_chat_template(given);
    if (given == NULL)
        return TV_OK;
    if (strcmp(given, "auto") == 0)
        return auto_template(pl);
    pl->chat_template = named == NULL ? given : named->jinja;
    if (named != NULL)
        warn_marks(pl, named);
    return TV_OK;
}

/* ---- without a block -------------------------------------------------------
 */

/* Rows of equal number are merged whatever they stand for: say so when they
 * stand for different tokens. */
static void compare_tokens(struct planner *pl, size_t input,
                           const struct tvm_vocab *a, const struct tvm_vocab *b)
{
    const uint64_t rows = rows_of(pl, input);
    struct names differ = {.n = 0};

    tv_buf_init(&differ.b, 4096);
    for (size_t id = 0; id < a->n_ids && id < b->n_ids && id < rows; id++) {
        const struct tvm_token *const x = tvm_vocab_at(a, (int64_t)id);
        const struct tvm_token *const y = tvm_vocab_at(b, (int64_t)id);
        if (x != NULL && y != NULL &&
            (x->n != y->n || memcmp(x->s, y->s, x->n) != 0))
            names_add(&differ, y->s);
    }
    if (differ.n > 0)
        plan_report(pl, "different tokens", 5, false, TV_OK, ref_of(pl, input),
                    "the same ids are other tokens than in '%s': %s; rows are "
                    "merged by number. 'tokenizer: {source: union}' in the "
                    "recipe matches them by token",
                    ref_of(pl, pl->st->donor), names_text(&differ));
    tv_buf_free(&differ.b);
}

/* Equal bytes, or nothing to compare. */
static enum tv_err same_tokenizer(struct planner *pl, size_t a, size_t b,
                                  bool *same)
{
    const size_t which[] = {a, b};
    struct tv_hash hash[2] = {{0, 0}, {0, 0}};
    bool all = true;

    for (size_t i = 0; i < 2 && all; i++) {
        struct tv_error e;
        char *data = NULL;
        size_t n = 0;
        bool found = false;
        const enum tv_err rc =
            tv_input_side_read(pl->plan->inputs[which[i]].input,
                               "tokenizer.json", &found, &data, &n, &e);
        if (rc != TV_OK && plan_fatal(rc)) {
            if (pl->err != NULL)
                *pl->err = e;
            return rc;
        }
        all = rc == TV_OK && found;
        if (all)
            hash[i] = tv_hash128(data, n);
        tv_free(data);
    }
    *same = !all || tv_hash_equal(hash[0], hash[1]);
    return TV_OK;
}

static enum tv_err look_at_tokens(struct planner *pl)
{
    struct plan_vocab *const v =
        tvm_arena_get(plan_arena(pl), 1, sizeof(*pl->vocab));
    const size_t n = pl->plan->n_inputs;
    const size_t donor = pl->st->donor;
    const struct tvm_vocab *first = NULL;
    bool bad = false;
    enum tv_err rc = TV_OK;

    if (v == NULL)
        return plan_oom(pl);
    pl->vocab = v;
    v->owned = tv_calloc(n + 1, sizeof(*v->owned));
    v->owned_by = tv_calloc(n + 1, sizeof(*v->owned_by));
    if (v->owned == NULL || v->owned_by == NULL) {
        rc = plan_oom(pl);
        goto out;
    }
    for (size_t i = 0; i < n && donor < n; i++) {
        const struct tvm_vocab *other = NULL;
        bool same = false;
        if (i == donor || !pl->refs[i].usable || !pl->refs[donor].usable)
            continue;
        TV_TRY(same_tokenizer(pl, donor, i, &same));
        if (same)
            continue;
        if (first == NULL && !bad)
            TV_TRY(read_one(pl, donor, true, &first, &bad));
        if (first == NULL)
            break;
        TV_TRY(read_one(pl, i, true, &other, &bad));
        if (other != NULL && other != first)
            compare_tokens(pl, i, first, other);
    }
out:
    plan_vocab_free(v);
    pl->vocab = NULL;
    return rc;
}

/* ---- all ------------------------------------------------------------------
 */

/* --unsafe-truncate-embeddings: the rows that all have. */
static void truncate_rows(struct planner *pl)
{
    struct plan_vocab *const v = pl->vocab;
    uint64_t most = 0;
    v->truncate = true;
    v->n_rows = 0;
    for (size_t i = 0; i < pl->plan->n_inputs; i++) {
        const uint64_t rows = v->of[i].rows;
        if (rows > most)
            most = rows;
        if (rows > 0 && (v->n_rows == 0 || rows < v->n_rows))
            v->n_rows = rows;
    }
    v->shown.source = "truncated";
    v->shown.from = ref_of(pl, v->from);
    v->shown.n_rows = v->shown.n_tokens = v->n_rows;
    if (v->n_rows < most)
        plan_report(pl, "truncated", 1, false, TV_OK, "",
                    "--unsafe-truncate-embeddings: only the first %llu of up "
                    "to %llu rows of the vocabulary are kept, whatever tokens "
                    "they stand for",
                    (unsigned long long)v->n_rows, (unsigned long long)most);
}

static enum tv_err mark_inputs(struct planner *pl, bool *bad)
{
    struct plan_vocab *const v = pl->vocab;
    const size_t n = pl->plan->n_inputs;

    v->of = tv_calloc(n + 1, sizeof(*v->of));
    v->notes = tvm_arena_get(plan_arena(pl), NOTES_MAX, sizeof(*v->notes));
    if (v->of == NULL || v->notes == NULL)
        return plan_oom(pl);
    v->shown.notes = v->notes;
    for (size_t i = 0; i < n; i++) {
        if (!pl->refs[i].usable) {
            *bad = true; /* reported where it was opened */
            return TV_OK;
        }
        v->of[i].rows = rows_of(pl, i);
    }
    for (size_t s = 0; s < pl->n_slices; s++) {
        for (size_t i = 0; i < pl->slices[s].n; i++) {
            if (pl->slices[s].input[i] != SIZE_MAX)
                v->of[pl->slices[s].input[i]].merged = true;
        }
    }
    v->base = pl->r->base.text == NULL ? SIZE_MAX
                                       : plan_input_find(pl, pl->r->base.text);
    if (v->base != SIZE_MAX)
        v->of[v->base].merged = true;
    v->from = pl->st->donor;
    if (pl->r->vocab.source == TVM_VOCAB_MODEL &&
        pl->r->vocab.model.text != NULL)
        v->from = plan_input_find(pl, pl->r->vocab.model.text);
    *bad = v->from >= n;
    return TV_OK;
}

enum tv_err plan_vocab_make(struct planner *pl)
{
    const bool truncate = pl->plan->options.truncate_embeddings;
    bool bad = false;
    enum tv_err rc = TV_OK;

    if (pl->r->vocab.source == TVM_VOCAB_NONE && !truncate) {
        TV_TRY(look_at_tokens(pl));
        return choose_template(pl);
    }
    pl->vocab = tvm_arena_get(plan_arena(pl), 1, sizeof(*pl->vocab));
    if (pl->vocab == NULL)
        return plan_oom(pl);
    TV_TRY(mark_inputs(pl, &bad));
    if (!bad && pl->r->vocab.source == TVM_VOCAB_NONE) {
        truncate_rows(pl);
    } else if (!bad) {
        TV_TRY(read_all(pl, &bad));
        if (!bad) {
            TV_TRY(room_for_tokens(pl));
            keep_first(pl);
            if (pl->r->vocab.source == TVM_VOCAB_UNION) {
                unite(pl, false);
                unite(pl, true);
            }
            apply_rules(pl);
            warn_without_rows(pl);
            choose_rows(pl);
            show(pl);
        }
    }
    pl->vocab_bad = bad;
    if (bad)
        goto out;
    pl->plan->vocabulary = &pl->vocab->shown;
    TV_TRY(choose_template(pl));
out:
    return rc;
}

void plan_vocab_free(struct plan_vocab *v)
{
    if (v == NULL)
        return;
    for (size_t i = 0; i < v->n_owned; i++)
        tvm_vocab_free(&v->owned[i]);
    tv_free(v->owned);
    tv_free(v->owned_by);
    tv_free(v->of);
    tv_free(v->tokens);
    tv_free(v->slots);
    v->owned = NULL;
    v->owned_by = NULL;
    v->of = NULL;
    v->tokens = NULL;
    v->slots = NULL;
    v->n_owned = 0;
}
