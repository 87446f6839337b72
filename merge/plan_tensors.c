/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_tensors.c - one entry per output tensor.
 *
 * Every tensor of every source of every slice gets an output name (its layer
 * renumbered) and equal names are one output tensor: nothing that an input has
 * is dropped. Then, per output tensor: who supplies it, do shapes and dtypes
 * fit, the value of every parameter, and copy or merge.
 */
#include "plan_vocab.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "params.h"
#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/text.h"

#define LISTED 20u /* problems of one cause */

struct cand { /* a source's tensor under its output name */
    const char *name;
    size_t slice, source, index; /* index: tensor of the input */
    int64_t k;                   /* layer within the slice, -1 outside */
    int64_t n_k;                 /* of so many */
};

struct cands {
    struct cand *items;
    size_t n, cap;
};

/* ---- candidates -----------------------------------------------------------
 */

static enum tv_err cand_add(struct planner *pl, struct cands *c,
                            struct cand one)
{
    if (c->n == c->cap) {
        const size_t cap = c->cap == 0 ? 256 : 2 * c->cap;
        struct cand *const more = tv_realloc(c->items, cap * sizeof(*more));
        if (more == NULL)
            return plan_oom(pl);
        c->items = more;
        c->cap = cap;
    }
    c->items[c->n++] = one;
    return TV_OK;
}

static const char *output_name(struct planner *pl,
                               const struct tv_arch_tensor *t, int64_t layer)
{
    char *renamed = NULL;
    const char *name = NULL;
    if (layer < 0 || layer == t->layer || t->layer_len == 0)
        return t->name;
    renamed = tv_arch_rename(t, layer);
    if (renamed != NULL)
        name = tvm_arena_strdup(plan_arena(pl), renamed);
    tv_free(renamed);
    return name;
}

static enum tv_err collect_source(struct planner *pl, size_t slice,
                                  size_t source, struct cands *out)
{
    const struct plan_slice *const s = &pl->slices[slice];
    const struct tv_arch *const a = pl->plan->inputs[s->input[source]].arch;
    const bool *const hidden = pl->refs[s->input[source]].hidden;
    const size_t n = plan_count(pl, s->input[source]);
    enum tv_err rc = TV_OK;
    for (size_t i = 0; i < n; i++) {
        const struct tv_arch_tensor *const t =
            plan_describe(pl, s->input[source], i);
        struct cand c = {NULL, slice, source, i, -1, s->n_layers};
        const bool is_main =
            s->module != NULL || (t->module == 0 && a->modules[0].is_main);
        int64_t layer = -1; /* of the output */
        if (hidden != NULL && i < a->n_tensors && hidden[i])
            continue; /* made ones stand for it */
        if (!plan_in_slice(s, a, t))
            continue;
        if (t->role == TV_ROLE_LM_HEAD && !t->is_bias &&
            pl->refs[s->input[source]].tied)
            continue; /* its embedding by another name */
        if (t->part == TV_PART_LAYER && t->layer >= 0 && is_main) {
            if (t->layer < s->from[source] ||
                t->layer >= s->from[source] + s->n_layers)
                continue;
            c.k = t->layer - s->from[source];
            layer = s->out_from + c.k;
        } else if (t->part == TV_PART_LAYER && t->layer >= 0) {
            /* Of another module, which is there as a whole. */
            if (!s->is_first)
                continue;
            c.k = t->layer;
            c.n_k = a->modules[t->module].n_layers;
        } else if (t->part == TV_PART_POST ? !s->is_last : !s->is_first) {
            continue;
        } else if (t->beyond >= 0) {
            layer = s->n_out + t->beyond;
        }
        c.name = output_name(pl, t, layer);
        if (c.name == NULL) {
            rc = plan_oom(pl);
            goto out;
        }
        TV_TRY(cand_add(pl, out, c));
    }
    if (s->is_last && pl->lend_head && pl->refs[s->input[source]].tied &&
        plan_in_slice(s, a, &a->tensors[pl->refs[s->input[source]].embed]))
        TV_TRY(cand_add(pl, out,
                        (struct cand){pl->head_name, slice, source,
                                      pl->refs[s->input[source]].embed, -1,
                                      s->n_layers}));
out:
    return rc;
}

static int cand_compare(const void *a, const void *b)
{
    const struct cand *const x = a;
    const struct cand *const y = b;
    const int c = tv_name_compare(x->name, y->name);
    if (c != 0)
        return c;
    if (x->slice != y->slice)
        return x->slice < y->slice ? -1 : 1;
    if (x->source != y->source)
        return x->source < y->source ? -1 : 1;
    return x->index < y->index ? -1 : x->index > y->index;
}

/* ---- sources of one tensor ------------------------------------------------
 */

struct build {
    struct planner *pl;
    const struct plan_slice *slice;
    const struct cand *cands; /* of this name */
    size_t n_cands;
    const struct tv_arch_tensor *like; /* description of the first one */
    struct tvm_tensor *t;
    size_t *at; /* [t->n_sources] source of the slice */
    /* Where the value of parameter p was written, [slice->n + 1][n_params], the
     * last row of shared ones; NULL entries: a default. */
    const struct tvm_node **from;
    bool is_head;
    bool ok;
    bool refused; /* a setting, which was said; its default stands in */
};

static const char *ref_of(const struct build *b, size_t slice_source)
{
    return b->pl->plan->inputs[b->slice->input[slice_source]].ref;
}

static const char *source_ref(const struct build *b, size_t i)
{
    return ref_of(b, b->at[i]);
}

static bool find_index(const struct tv_arch *a, const char *name, size_t *out)
{
    for (size_t i = 0; i < a->n_tensors; i++) {
        if (strcmp(a->tensors[i].name, name) == 0) {
            *out = i;
            return true;
        }
    }
    return false;
}

void plan_source_fill(struct planner *pl, size_t input, size_t index,
                      struct tvm_source *s)
{
    const struct plan_ref *const ref = &pl->refs[input];
    size_t lo = 0;
    size_t hi = ref->n_bound;

    const size_t n_own = pl->plan->inputs[input].arch->n_tensors;

    memset(s, 0, sizeof(*s));
    s->input = input;
    if (index >= n_own) {
        const struct plan_made *const m = &ref->made[index - n_own];
        s->tensor = m->tensor;
        s->gather = m->gather;
        index = m->index;
    }
    if (index == SIZE_MAX)
        return; /* adapters are on what it is put together from */
    s->tensor = tv_input_tensor(pl->plan->inputs[input].input, index);
    while (lo < hi) {
        const size_t mid = lo + (hi - lo) / 2;
        if (ref->bound[mid].target < index)
            lo = mid + 1;
        else
            hi = mid;
    }
    while (lo + s->n_adapters < ref->n_bound &&
           ref->bound[lo + s->n_adapters].target == index)
        s->n_adapters++;
    s->adapters = s->n_adapters == 0 ? NULL : &ref->low_rank[lo];
}

static void add_source(struct build *b, size_t slice_source, size_t index)
{
    struct tvm_tensor *const t = b->t;
    struct tvm_source *const s = &t->sources[t->n_sources];

    plan_source_fill(b->pl, b->slice->input[slice_source], index, s);
    s->is_base = (int)slice_source == b->slice->base;
    if (s->is_base)
        t->base = (int)t->n_sources;
    s->position = slice_source;
    if (b->slice->base >= 0 && slice_source > (size_t)b->slice->base)
        s->position--;
    b->at[t->n_sources] = slice_source;
    t->n_sources++;
}

/* The sources in recipe order. A source that lacks the tensor supplies what it
 * is tied to, is left out when the tensor is optional, else it is an error. */
static void find_sources(struct build *b)
{
    struct planner *const pl = b->pl;
    size_t c = 0;
    for (size_t s = 0; s < b->slice->n; s++) {
        const size_t input = b->slice->input[s];
        size_t index = 0;
        if (!b->slice->usable[s])
            continue;
        if (c < b->n_cands && b->cands[c].source == s) {
            add_source(b, s, b->cands[c].index);
            for (c++; c < b->n_cands && b->cands[c].source == s; c++) {
                b->ok = false;
                plan_report(
                    pl, "names that become equal", LISTED, true, TV_E_INPUT,
                    b->t->name,
                    "two tensors of '%s' would get this name: '%s' "
                    "and '%s'",
                    ref_of(b, s),
                    plan_describe(pl, input, b->cands[c - 1].index)->name,
                    plan_describe(pl, input, b->cands[c].index)->name);
            }
            continue;
        }
        if (b->like->tied_to != NULL && find_index(pl->plan->inputs[input].arch,
                                                   b->like->tied_to, &index)) {
            add_source(b, s, index);
            continue;
        }
        if (b->is_head && pl->refs[input].embed != SIZE_MAX) {
            add_source(b, s, pl->refs[input].embed); /* by another name */
            continue;
        }
        if (b->like->optional)
            continue;
        b->ok = false;
        plan_report(pl, "missing tensors", LISTED, true, TV_E_INPUT, b->t->name,
                    "'%s' has no such tensor, '%s' has it", ref_of(b, s),
                    ref_of(b, b->cands[0].source));
    }
}

/* How many of the present sources the method counts. */
static size_t count_donors(const struct tvm_method *m, size_t n_sources,
                           int base)
{
    return m->base_counts || base < 0 ? n_sources : n_sources - 1;
}

/* Only where an optional tensor is missing somewhere: counts of the whole slice
 * are checked before. */
static void check_present(struct build *b)
{
    const struct tvm_tensor *const t = b->t;
    const struct tvm_method *const m = t->method;
    /* Buffers (rotary caches of old checkpoints) are copied in any case. */
    if (b->slice->broken || t->n_sources == b->slice->n ||
        b->like->role == TV_ROLE_BUFFER)
        return;
    if (m->missing == TVM_MISSING_COPY_ONLY && t->n_sources == 1)
        return;
    if (m->missing == TVM_MISSING_COPY_BASE && t->base >= 0)
        return;
    if (m->base == TVM_BASE_REQUIRED && t->base < 0) {
        b->ok = false;
        plan_report(b->pl, "tensors that the base lacks", LISTED, true,
                    TV_E_INPUT, t->name,
                    "the base model has no such tensor, and %s needs it there",
                    m->name);
    } else if (count_donors(m, t->n_sources, t->base) < m->min_donors) {
        b->ok = false;
        plan_report(b->pl, "tensors that too few inputs have", LISTED, true,
                    TV_E_INPUT, t->name,
                    "only %zu of %zu inputs have this tensor, too few for %s",
                    t->n_sources, b->slice->n, m->name);
    }
}

/* Has the model that gives config.json a tensor like this in some layer? */
static bool donor_has(const struct planner *pl, const struct tv_arch_tensor *t)
{
    const struct tv_arch *const a = pl->plan->inputs[pl->st->donor].arch;
    const char *const rest = t->name + t->layer_at + t->layer_len;
    for (size_t i = 0; i < a->n_tensors; i++) {
        const struct tv_arch_tensor *const o = &a->tensors[i];
        if (o->is_bias && o->role == t->role && o->module == t->module &&
            strcmp(o->name + o->layer_at + o->layer_len, rest) == 0)
            return true;
    }
    return false;
}

/* Biases that not every input has. A config says whether loaders look for
 * them: one that comes from a model without them would drop them silently. */
static void check_biases(struct build *b)
{
    struct planner *const pl = b->pl;
    const struct tv_arch_tensor *const like = b->like;
    if (!b->ok || !like->is_bias || !like->optional ||
        like->role < TV_ROLE_ATTN_Q || like->role > TV_ROLE_ROUTER ||
        b->t->n_sources == 0)
        return;
    if (pl->refs[pl->st->donor].usable &&
        pl->plan->inputs[pl->st->donor].arch->has_config &&
        !donor_has(pl, like)) {
        b->ok = false;
        plan_report(pl, "biases without a config", 5, true, TV_E_INPUT,
                    b->t->name,
                    "'%s' has this bias, but config.json comes from '%s', "
                    "which has none: loaders would ignore it (name the model "
                    "with biases as base_model, or first)",
                    source_ref(b, 0), pl->plan->inputs[pl->st->donor].ref);
    } else if (b->t->n_sources < b->slice->n && !b->slice->broken) {
        plan_report(pl, "biases of some", 1, false, TV_OK, b->t->name,
                    "only %zu of %zu models have biases like this one; the "
                    "others count for nothing there",
                    b->t->n_sources, b->slice->n);
    }
}

/* ---- shape and dtype ------------------------------------------------------
 */

/* Is dimension d one of tokens that the planner puts in order itself? */
static bool is_aligned(const struct build *b, unsigned d)
{
    return b->pl->vocab != NULL && b->like->vocab_dim == 0 && d == 0;
}

/* Can it stand in a recipe without quotes, and is it no word of its own? */
static bool is_plain(const char *ref)
{
    return *ref != '\0' &&
           ref[strspn(ref, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxy"
                           "z0123456789_./-+@")] == '\0' &&
           strchr("-@", *ref) == NULL && strcmp(ref, "union") != 0;
}

/* What to add to a recipe of models with different vocabularies; a recipe
 * without a base is not told of one. */
static const char *add_block(struct build *b)
{
    struct planner *const pl = b->pl;
    const char *const donor = pl->plan->inputs[pl->st->donor].ref;
    const char *const source =
        pl->r->base.text != NULL || !is_plain(donor) ? "base" : donor;
    const char *const s = tvm_arena_fmt(
        plan_arena(pl),
        " (different vocabularies: add 'tokenizer: {source: union}' to the "
        "recipe to match rows by token, or 'tokenizer: {source: %s}' to keep "
        "only the tokens of '%s')",
        source, donor);

    pl->oom = pl->oom || s == NULL;
    return s == NULL ? "" : s;
}

static void check_shapes(struct build *b)
{
    const struct tv_input_tensor *const a = b->t->sources[0].tensor;
    for (size_t i = 1; i < b->t->n_sources; i++) {
        const struct tv_input_tensor *const o = b->t->sources[i].tensor;
        char sa[24 * TV_RANK_MAX + 8];
        char so[24 * TV_RANK_MAX + 8];
        const bool ranks = a->rank == o->rank;
        bool same = ranks;
        bool only_vocab = ranks && b->like->vocab_dim >= 0;
        for (unsigned d = 0; ranks && d < a->rank; d++) {
            const bool equal = a->shape[d] == o->shape[d] || is_aligned(b, d);
            same = same && equal;
            only_vocab = only_vocab && (equal || (int)d == b->like->vocab_dim);
        }
        if (same)
            continue;
        b->ok = false;
        plan_report(b->pl, "shape mismatches", LISTED, true, TV_E_INPUT,
                    b->t->name, "shapes differ: %s in '%s', %s in '%s'%s",
                    tv_shape_format(a->shape, a->rank, sa, sizeof(sa)),
                    source_ref(b, 0),
                    tv_shape_format(o->shape, o->rank, so, sizeof(so)),
                    source_ref(b, i), only_vocab ? add_block(b) : "");
    }
    b->t->rank = a->rank;
    memcpy(b->t->shape, a->shape, sizeof(a->shape));
    b->t->n_elems = a->n_elems;
}

/* config.json speaks of one number of tokens, so a tensor over tokens has as
 * many as the model that gives it, also where that one supplies nothing. */
static void check_tokens(struct build *b)
{
    struct planner *const pl = b->pl;
    const size_t donor = pl->st->donor;
    const struct plan_ref *const ref = &pl->refs[donor];
    const int dim = b->like->vocab_dim;
    struct tvm_source theirs;
    size_t index = SIZE_MAX;
    char sa[24 * TV_RANK_MAX + 8];
    char so[24 * TV_RANK_MAX + 8];

    if (pl->vocab != NULL || dim < 0 || !b->ok || !ref->usable ||
        b->t->n_sources == 0 || dim >= (int)b->t->rank)
        return;
    for (size_t i = 0; i < b->t->n_sources; i++) {
        if (b->t->sources[i].input == donor)
            return;
    }
    for (size_t i = 0; i < plan_count(pl, donor) && index == SIZE_MAX; i++) {
        if (strcmp(plan_describe(pl, donor, i)->name, b->t->name) == 0)
            index = i;
    }
    if (index == SIZE_MAX && b->is_head)
        index = ref->tied ? ref->embed : ref->head;
    if (index == SIZE_MAX)
        return;
    plan_source_fill(pl, donor, index, &theirs);
    if (theirs.tensor->rank != b->t->rank ||
        theirs.tensor->shape[dim] == b->t->shape[dim])
        return;
    b->ok = false;
    plan_report(pl, "shape mismatches", LISTED, true, TV_E_INPUT, b->t->name,
                "shapes differ: %s in '%s', %s in '%s', whose config.json the "
                "output has%s",
                tv_shape_format(b->t->shape, b->t->rank, sa, sizeof(sa)),
                source_ref(b, 0),
                tv_shape_format(theirs.tensor->shape, theirs.tensor->rank, so,
                                sizeof(so)),
                pl->plan->inputs[donor].ref, add_block(b));
}

/* Rows in the order of the output's tokens. */
static enum tv_err align_rows(struct build *b)
{
    if (b->pl->vocab == NULL || b->like->vocab_dim != 0 || b->t->rank == 0)
        return TV_OK;
    if (b->pl->vocab_bad || !b->ok) {
        b->ok = false;
        return TV_OK;
    }
    return plan_rows_gather(b->pl, b->like, b->t, &b->ok);
}

static bool all_math(const struct tvm_tensor *t)
{
    for (size_t i = 0; i < t->n_sources; i++) {
        if (!tv_dtype_is_math(t->sources[i].tensor->dtype))
            return false;
    }
    return true;
}

static enum tv_dtype promoted(const struct tvm_tensor *t)
{
    enum tv_dtype all = TV_DTYPE_NONE;
    for (size_t i = 0; i < t->n_sources; i++) {
        const enum tv_dtype one = t->sources[i].tensor->dtype;
        if (t->method != NULL && t->method->aside != NULL &&
            t->method->aside(t, i))
            continue;
        if (all != TV_DTYPE_NONE && one != all)
            return TV_F32;
        all = one;
    }
    return all == TV_DTYPE_NONE ? TV_F32 : all;
}

enum tv_err plan_views_equal(struct planner *pl, const struct tvm_source *a,
                             const struct tvm_source *b, struct tv_error *err,
                             bool *equal)
{
    tv_input *const ia = pl->plan->inputs[a->input].input;
    tv_input *const ib = pl->plan->inputs[b->input].input;
    struct tv_view va;
    struct tv_view vb;
    enum tv_err rc = TV_OK;

    memset(&va, 0, sizeof(va));
    memset(&vb, 0, sizeof(vb));
    TV_TRY(tv_input_view(ia, a->tensor, err, &va));
    TV_TRY(tv_input_view(ib, b->tensor, err, &vb));
    *equal = tv_view_equal(&va, &vb);
out:
    tv_input_release(ib, &vb);
    tv_input_release(ia, &va);
    return rc;
}

static enum tv_err all_equal(struct build *b, bool *equal)
{
    struct tv_error e;
    const struct tvm_tensor *const t = b->t;
    enum tv_err rc = TV_OK;
    tv_error_clear(&e);
    *equal = true;
    for (size_t i = 1; i < t->n_sources && *equal; i++) {
        if (t->sources[i].tensor == t->sources[0].tensor)
            continue;
        if (t->sources[i].tensor->dtype != t->sources[0].tensor->dtype) {
            *equal = false;
            break;
        }
        rc = plan_views_equal(b->pl, &t->sources[0], &t->sources[i], &e, equal);
        if (rc == TV_OK)
            continue;
        if (plan_fatal(rc)) {
            if (b->pl->err != NULL)
                *b->pl->err = e;
            return rc;
        }
        b->ok = false;
        *equal = false;
        plan_report(b->pl, "unreadable tensors", LISTED, true, rc, t->name,
                    "%s", e.msg);
    }
    return TV_OK;
}

static void copy_from(struct tvm_tensor *t, size_t source)
{
    t->action = TVM_COPY;
    t->copy_of = source;
    t->dtype = t->sources[source].tensor->dtype;
}

/* Tensors that are no weights to merge: buffers, integers, narrow floats. */
static enum tv_err plan_verbatim(struct build *b)
{
    struct tvm_tensor *const t = b->t;
    const bool buffer = b->like->role == TV_ROLE_BUFFER;
    bool equal = false;
    int fold = -1;
    enum tv_err rc = TV_OK;

    for (size_t i = 0; i < t->n_sources; i++) {
        if (t->sources[i].gather == NULL)
            continue;
        b->ok = false;
        plan_report(b->pl, "experts of other dtypes", LISTED, true,
                    TV_E_UNSUPPORTED, t->name,
                    "'%s' stores its experts in another layout and as %s; only "
                    "F16, BF16 and F32 can be put in another one",
                    source_ref(b, i),
                    tv_dtype_name(t->sources[i].tensor->dtype));
        return TV_OK;
    }
    for (size_t i = 0; i < t->n_sources; i++) {
        if (t->sources[i].n_adapters == 0)
            continue;
        b->ok = false;
        plan_report(b->pl, "adapters on tensors of other dtypes", LISTED, true,
                    TV_E_UNSUPPORTED, t->name,
                    "'%s' adapts this tensor, but its dtype is %s",
                    source_ref(b, i),
                    tv_dtype_name(t->sources[i].tensor->dtype));
        return TV_OK;
    }
    copy_from(t, t->base >= 0 ? (size_t)t->base : 0);
    rc = all_equal(b, &equal);
    if (rc != TV_OK || equal || !b->ok)
        return rc;
    if (buffer) {
        plan_report(b->pl, "buffers that differ", 3, false, TV_OK, t->name,
                    "this buffer differs between the inputs; the one of '%s' "
                    "is kept",
                    source_ref(b, t->copy_of));
        return TV_OK;
    }
    if (!b->slice->broken && t->method->fold != NULL)
        fold = t->method->fold(t);
    if (fold >= 0) {
        copy_from(t, (size_t)fold);
        return TV_OK;
    }
    b->ok = false;
    plan_report(b->pl, "dtypes that cannot be merged", LISTED, true,
                TV_E_UNSUPPORTED, t->name,
                "the inputs differ in this %s tensor; only F16, BF16 and F32 "
                "can be merged",
                tv_dtype_name(t->sources[0].tensor->dtype));
    return TV_OK;
}

/* ---- parameters -----------------------------------------------------------
 */

enum { N_LEVELS = 4 }; /* source, slice, module, recipe */

/* Where a value may be written, the nearest first; source SIZE_MAX: of a shared
 * parameter. What the recipe does not speak of has none of its parameters. */
static void fill_levels(const struct build *b, size_t source,
                        const struct tvm_node **levels)
{
    const struct plan_slice *const s = b->slice;
    memset(levels, 0, N_LEVELS * sizeof(*levels));
    if (s->is_copy)
        return;
    levels[0] = source == SIZE_MAX ? NULL : s->parameters[source];
    levels[1] = s->recipe->parameters;
    levels[2] = s->of == NULL ? NULL : s->of->parameters;
    levels[3] = b->pl->r->parameters;
}

/* Is it written, but only for what filters match? */
static bool filtered_out(const struct build *b, size_t source, const char *name)
{
    const struct tvm_node *levels[N_LEVELS];

    fill_levels(b, source, levels);
    for (size_t i = 0; i < N_LEVELS; i++) {
        const struct tvm_node *const n =
            levels[i] == NULL ? NULL : tvm_node_find(levels[i], name);
        if (n != NULL && n->kind == TVM_NODE_LIST && n->first != NULL &&
            n->first->kind == TVM_NODE_MAP)
            return true;
    }
    return false;
}

static void missing_parameter(struct build *b, const struct tvm_param *p,
                              size_t source)
{
    char cause[320];
    struct planner *const pl = b->pl;
    const char *const filtered =
        filtered_out(b, source == SIZE_MAX ? SIZE_MAX : b->at[source], p->name)
            ? "; no filter matches it: add an entry without one, {value: ...}"
            : "";
    const size_t s = source == SIZE_MAX ? 0 : b->at[source];
    const bool appended =
        source != SIZE_MAX && s >= b->slice->recipe->n_sources;

    if (source == SIZE_MAX) {
        const struct tvm_recipe_ref at = {"", pl->r->method_line,
                                          pl->r->method_col};
        (void)snprintf(cause, sizeof(cause), "missing parameter '%s'", p->name);
        plan_report(pl, cause, 1, true, TV_E_USAGE, plan_where(pl, &at),
                    "missing required parameter '%s' of %s (first needed for "
                    "%s%s)",
                    p->name, b->t->method->name, b->t->name, filtered);
        return;
    }
    (void)snprintf(cause, sizeof(cause), "missing parameter '%s' for '%.200s'",
                   p->name, source_ref(b, source));
    plan_report(
        pl, cause, 1, true, TV_E_USAGE,
        plan_where(pl, appended ? pl->refs[b->slice->input[s]].where
                                : &b->slice->recipe->sources[s].model),
        "missing required parameter '%s' for '%s' (first needed for %s%s)%s",
        p->name, source_ref(b, source), b->t->name, filtered,
        appended ? "; base_model is not among the models and counts as one "
                   "more input"
                 : "");
}

/* Leaves out the levels whose setting of p was refused with the recipe; true
 * when there are any. */
static bool drop_refused(const struct build *b, const struct tvm_param *p,
                         size_t source, const struct tvm_node **levels)
{
    const struct tvm_recipe *const r = b->pl->r;
    const struct tvm_recipe_slice *const rs = b->slice->recipe;
    bool any = false;
    if (!r->has_errors)
        return false;
    any = r->bad_parameters || rs->bad_parameters ||
          (b->slice->of != NULL && b->slice->of->bad_parameters) ||
          (source < rs->n_sources && rs->sources[source].bad_parameters);
    for (size_t i = 0; i < N_LEVELS; i++) {
        const struct tvm_node *const e = tvm_node_find(levels[i], p->name);
        if (e == NULL || tvm_setting_ok(r, p, e))
            continue;
        levels[i] = NULL;
        any = true;
    }
    return any;
}

static double take(struct build *b, const struct tvm_param *p,
                   const struct tvm_value *v, size_t source, bool refused,
                   bool *set)
{
    *set = v->set;
    if (refused && p->has_default) {
        b->refused = true;
    } else if (refused) {
        b->ok = false;
    } else if (!v->set && p->required) {
        b->ok = false;
        missing_parameter(b, p, source);
    }
    if (v->set && v->fraction) {
        char cause[128];
        const struct tvm_recipe_ref at = {"", v->from->line, v->from->col};
        b->ok = false;
        (void)snprintf(cause, sizeof(cause), "fractions for '%s'", p->name);
        plan_report(b->pl, cause, 3, true, TV_E_USAGE, plan_where(b->pl, &at),
                    "parameter '%s' takes integers, but between the values of "
                    "this list it becomes %g for %s",
                    p->name, v->value, b->t->name);
    }
    return v->value;
}

static enum tv_err resolve_parameters(struct build *b, int64_t k, int64_t n_k)
{
    struct tvm_tensor *const t = b->t;
    struct planner *const pl = b->pl;
    const size_t n = t->method == NULL ? 0 : t->method->n_params;
    const double at = tvm_gradient_at(k, n_k);

    t->per_source =
        tvm_arena_get(plan_arena(pl), t->n_sources * n, sizeof(double));
    t->per_source_set =
        tvm_arena_get(plan_arena(pl), t->n_sources * n, sizeof(bool));
    b->from = tv_calloc((b->slice->n + 1) * n + 1, sizeof(*b->from));
    if (t->per_source == NULL || t->per_source_set == NULL || b->from == NULL)
        return plan_oom(pl);
    for (size_t i = 0; i < n && i < TVM_PARAMS_MAX; i++) {
        const struct tvm_param *const p = &t->method->params[i];
        const struct tvm_node *levels[N_LEVELS] = {NULL};
        if (p->scope == TVM_SHARED) {
            fill_levels(b, SIZE_MAX, levels);
            const bool refused = drop_refused(b, p, SIZE_MAX, levels);
            const struct tvm_value v =
                tvm_param_resolve(p, levels, N_LEVELS, t->name, at);
            t->shared[i] = take(b, p, &v, SIZE_MAX, refused, &t->shared_set[i]);
            b->from[b->slice->n * n + i] = v.from;
            continue;
        }
        for (size_t s = 0; s < t->n_sources; s++) {
            const char *name = t->sources[s].tensor->name;
            if (p->scope == TVM_NON_BASE && t->sources[s].is_base)
                continue;
            /* A tied input lends its embedding; filters still see the head. */
            if (b->is_head)
                name = t->name;
            fill_levels(b, b->at[s], levels);
            const bool refused = drop_refused(b, p, b->at[s], levels);
            const struct tvm_value v =
                tvm_param_resolve(p, levels, N_LEVELS, name, at);
            t->per_source[s * n + i] =
                take(b, p, &v, s, refused, &t->per_source_set[s * n + i]);
            b->from[s * n + i] = v.from;
        }
    }
    return TV_OK;
}

/* Of a value of a parameter: where it was written, or what has it as a default:
 * the model, or the method. */
static const char *param_where(struct build *b, const struct tvm_problem *p)
{
    struct planner *const pl = b->pl;
    const size_t row = p->source == SIZE_MAX ? b->slice->n : p->source;
    const struct tvm_node *const from =
        b->from[row * b->t->method->n_params + p->param];
    const struct tvm_recipe_slice *const rs = b->slice->recipe;
    struct tvm_recipe_ref at = {"", pl->r->method_line, pl->r->method_col};
    if (from != NULL) {
        at.line = from->line;
        at.col = from->col;
    } else if (p->source != SIZE_MAX && b->at[p->source] < rs->n_sources &&
               rs->sources[b->at[p->source]].model.line > 0) {
        at = rs->sources[b->at[p->source]].model;
    }
    return plan_where(pl, &at);
}

/* What the method says about this tensor, one message per cause. What is wrong
 * with a value of the recipe is wrong for many tensors: said once, with the
 * first of them. */
static void ask_method(struct build *b)
{
    struct tvm_problems found;
    if (b->t->method->check == NULL)
        return;
    tvm_problems_init(&found);
    b->t->method->check(b->t, &found);
    for (size_t i = 0; i < found.n; i++) {
        const struct tvm_problem *const p = &found.items[i];
        if (p->of_param) {
            const char *const where = param_where(b, p);
            const char *const cause =
                tvm_arena_fmt(plan_arena(b->pl), "%s %s", where, p->message);
            if (cause == NULL)
                b->pl->oom = true;
            else
                plan_report(b->pl, cause, 1, true, p->code, where,
                            "%s (first for %s)", p->message, p->where);
            continue;
        }
        if (p->is_note)
            plan_note(b->pl, p->message, 1, "", "%s", p->message);
        else
            plan_report(b->pl, p->message, p->is_error ? 3 : 1, p->is_error,
                        p->code, p->is_error ? p->where : "", "%s", p->message);
    }
    if (found.n_errors > 0)
        b->ok = false;
    if (found.n_errors > found.n)
        b->pl->oom = true;
    tvm_problems_free(&found);
}

/* ---- one tensor -----------------------------------------------------------
 */

/* One source is the result, but not byte for byte: its rows in order. */
static enum tv_err pass_rows(struct build *b, size_t source)
{
    struct tvm_tensor *const t = b->t;
    const size_t n = tvm_method_passthrough.n_params;

    t->sources[0] = t->sources[source];
    b->at[0] = b->at[source];
    t->n_sources = 1;
    t->base = -1;
    t->method = &tvm_method_passthrough;
    memset(t->shared_set, 0, sizeof(t->shared_set));
    t->per_source = tvm_arena_get(plan_arena(b->pl), n, sizeof(double));
    t->per_source_set = tvm_arena_get(plan_arena(b->pl), n, sizeof(bool));
    if (t->per_source == NULL || t->per_source_set == NULL)
        return plan_oom(b->pl);
    return TV_OK;
}

static enum tv_err choose_dtype(struct build *b)
{
    struct tvm_tensor *const t = b->t;
    const struct tvm_recipe *const r = b->pl->r;
    int fold = -1;

    if (b->like->role == TV_ROLE_BUFFER || !all_math(t))
        return plan_verbatim(b);
    t->action = TVM_MERGE;
    t->dtype = r->out_dtype != TV_DTYPE_NONE ? r->out_dtype
               : r->dtype != TV_DTYPE_NONE   ? r->dtype
                                             : promoted(t);
    if (t->compute != TV_DTYPE_NONE && t->method->compat_wide &&
        t->n_sources > 1 && r->out_dtype == TV_DTYPE_NONE)
        t->dtype = TV_F32;
    if (t->dtype == TV_F64) /* said with the recipe */
        t->dtype = TV_F32;
    if (b->slice->broken || !b->ok)
        return TV_OK;
    if (t->method->fold != NULL)
        fold = t->method->fold(t);
    if (fold >= 0 && t->sources[fold].gather != NULL)
        return pass_rows(b, (size_t)fold);
    if (fold >= 0 && t->sources[fold].n_adapters == 0 &&
        t->sources[fold].tensor->dtype == t->dtype) {
        t->action = TVM_COPY;
        t->copy_of = (size_t)fold;
    }
    return TV_OK;
}

static enum tv_err count_bytes(struct build *b)
{
    struct tvm_tensor *const t = b->t;
    struct tv_error e;
    uint64_t read = 0;
    tv_error_clear(&e);
    const enum tv_err rc = tv_dtype_bytes(t->dtype, t->n_elems, &t->bytes, &e);
    if (rc != TV_OK) {
        b->ok = false;
        plan_report(b->pl, "sizes", LISTED, true, rc, t->name, "%s", e.msg);
        return TV_OK;
    }
    for (size_t i = 0; i < t->n_sources; i++) {
        const struct tvm_source *const s = &t->sources[i];
        /* As a run counts it: what each source feeds. */
        if (s->gather != NULL)
            read += t->n_elems * (tv_dtype_bits(s->tensor->dtype) / 8u);
        else if (t->action != TVM_COPY || i == t->copy_of)
            read += s->tensor->bytes;
    }
    if (!tv_add_u64(b->pl->plan->bytes_read, read, &b->pl->plan->bytes_read) ||
        !tv_add_u64(b->pl->plan->bytes_written, t->bytes,
                    &b->pl->plan->bytes_written))
        return tv_error_set(b->pl->err, TV_E_CORRUPT,
                            "the models are too large");
    return TV_OK;
}

/* --compat mergekit: the method's variant, in the dtype mergekit works in. */
static void compat_arithmetic(struct build *b)
{
    struct tvm_tensor *const t = b->t;
    /* Without a method the recipe is wrong, which has been said. */
    if (t->method == NULL || !b->pl->plan->options.compat_mergekit ||
        b->like->role == TV_ROLE_BUFFER || !all_math(t))
        return;
    if (b->pl->r->dtype == TV_F64) {
        plan_report(b->pl, "float64 as mergekit", 1, false, TV_OK, "",
                    "--compat mergekit does not reproduce dtype float64: sums "
                    "run in fp64 with one rounding, masks are this program's");
        return;
    }
    t->compute =
        b->pl->r->dtype != TV_DTYPE_NONE ? b->pl->r->dtype : promoted(t);
    t->lora_dtype = b->pl->plan->options.lora_dtype;
    if (t->method->compat != NULL) {
        t->method = t->method->compat;
        return;
    }
    plan_note(b->pl, "no compatible variant", 1, "",
              "--compat mergekit: %s casts its inputs as mergekit does, but "
              "keeps this program's arithmetic",
              t->method->name);
}

/* Is it what a linear layer multiplies its inputs with? */
static bool is_linear(const struct tv_arch_tensor *a, unsigned rank)
{
    if (rank != 2 || a->is_bias || a->vocab_dim >= 0)
        return false;
    switch (a->role) {
    case TV_ROLE_EMBED:
    case TV_ROLE_POSITION:
    case TV_ROLE_EMBED_NORM:
    case TV_ROLE_LM_HEAD:
    case TV_ROLE_FINAL_NORM:
    case TV_ROLE_INPUT_NORM:
    case TV_ROLE_POST_ATTN_NORM:
    case TV_ROLE_OTHER_NORM:
    case TV_ROLE_BUFFER:
        return false;
    default:
        return true;
    }
}

/* Is it the weight of a linear layer of a block? */
static void describe_inputs(struct build *b)
{
    const enum tv_role role = b->like->role;

    b->t->has_inputs = b->t->rank == 2 && b->like->layer >= 0 &&
                       !b->like->is_bias && role >= TV_ROLE_ATTN_Q &&
                       role <= TV_ROLE_MLP_DOWN;
    b->t->is_embedding = b->t->rank == 2 && role == TV_ROLE_EMBED &&
                         !b->like->is_bias && b->like->vocab_dim == 0;
    b->t->in_first = b->t->in_first || b->t->is_embedding;
}

static enum tv_err build_tensor(struct planner *pl, const struct cand *cands,
                                size_t n, struct tvm_tensor *t)
{
    const struct plan_slice *const slice = &pl->slices[cands[0].slice];
    struct build b;
    enum tv_err rc = TV_OK;

    memset(&b, 0, sizeof(b));
    b.pl = pl;
    b.slice = slice;
    b.cands = cands;
    b.n_cands = n;
    b.like = plan_describe(pl, slice->input[cands[0].source], cands[0].index);
    /* What a tied input lends is described as an embedding. */
    for (size_t i = 1; i < n && b.like->role == TV_ROLE_EMBED; i++) {
        const struct tv_arch_tensor *const other =
            plan_describe(pl, slice->input[cands[i].source], cands[i].index);
        if (other->role == TV_ROLE_LM_HEAD)
            b.like = other;
    }
    b.is_head =
        pl->head_name != NULL && strcmp(cands[0].name, pl->head_name) == 0;
    b.t = t;
    t->name = cands[0].name;
    t->method = slice->is_copy && pl->r->method != NULL
                    ? &tvm_method_passthrough
                    : pl->r->method;
    /* Nobody to ask when the recipe names none. */
    b.ok = t->method != NULL;
    t->base = -1;
    t->n_models = slice->n - (slice->base >= 0);
    t->layer = cands[0].k < 0 ? -1 : slice->out_from + cands[0].k;
    t->name_hash = tv_hash64(t->name, strlen(t->name));
    t->sources = tvm_arena_get(plan_arena(pl), slice->n, sizeof(*t->sources));
    b.at = tv_calloc(slice->n, sizeof(*b.at));
    if (t->sources == NULL || b.at == NULL) {
        rc = plan_oom(pl);
        goto out;
    }
    find_sources(&b);
    check_present(&b);
    check_biases(&b);
    check_shapes(&b);
    check_tokens(&b);
    t->is_linear = is_linear(b.like, t->rank);
    t->in_first =
        pl->plan->inputs[slice->input[cands[0].source]].arch->linear_transposed;
    describe_inputs(&b);
    TV_TRY(align_rows(&b));
    TV_TRY(resolve_parameters(&b, cands[0].k, cands[0].n_k));
    compat_arithmetic(&b);
    if (b.ok && !slice->broken && all_math(t) && b.like->role != TV_ROLE_BUFFER)
        ask_method(&b);
    b.ok = b.ok && !b.refused;
    TV_TRY(choose_dtype(&b));
    TV_TRY(count_bytes(&b));
    if (b.is_head)
        pl->st->head_written = true;
out:
    tv_free(b.from);
    tv_free(b.at);
    return rc;
}

/* mergekit works through the tensors by the largest name that an input has for
 * them, as text; those of an aligned vocabulary come first. */
static const char *draw_key(const struct tvm_tensor *t)
{
    const char *key = "";
    for (size_t s = 0; s < t->n_sources; s++) {
        if (t->sources[s].gather != NULL &&
            t->sources[s].gather->rows->n_tokens > 0)
            return "";
        if (strcmp(t->sources[s].tensor->name, key) > 0)
            key = t->sources[s].tensor->name;
    }
    return key;
}

static int draw_compare(const void *a, const void *b)
{
    const struct tvm_tensor *const x = *(struct tvm_tensor *const *)a;
    const struct tvm_tensor *const y = *(struct tvm_tensor *const *)b;
    const int c = strcmp(draw_key(x), draw_key(y));
    if (c != 0)
        return c;
    return x < y ? -1 : x > y;
}

/* Where each tensor's random numbers begin. */
static enum tv_err order_draws(struct tvm_plan *plan, struct tv_error *err)
{
    struct tvm_tensor **order = NULL;
    size_t n = 0;
    enum tv_err rc = TV_OK;

    order = tv_calloc(plan->n_tensors + 1, sizeof(struct tvm_tensor *));
    if (order == NULL)
        return tv_error_set(err, TV_E_NOMEM, "out of memory while planning");
    for (size_t i = 0; i < plan->n_tensors; i++) {
        struct tvm_tensor *const t = &plan->tensors[i];
        if (t->action == TVM_MERGE && t->method->draws != NULL)
            t->n_draws = t->method->draws(t);
        if (t->n_draws > 0)
            order[n++] = t;
    }
    qsort(order, n, sizeof(struct tvm_tensor *), draw_compare);
    for (size_t i = 0; i < n; i++) {
        order[i]->draw_at = plan->n_draws;
        if (!tv_add_u64(plan->n_draws, order[i]->n_draws, &plan->n_draws)) {
            rc = tv_error_set(err, TV_E_CORRUPT, "the models are too large");
            break;
        }
    }
    tv_free(order);
    return rc;
}

enum tv_err plan_tensors_make(struct planner *pl)
{
    struct tvm_plan *const plan = pl->plan;
    struct cands all = {NULL, 0, 0};
    size_t n = 0;
    enum tv_err rc = TV_OK;

    if (pl->n_slices > 0)
        TV_TRY(plan_ties_make(pl));
    for (size_t s = 0; s < pl->n_slices; s++) {
        for (size_t i = 0; i < pl->slices[s].n; i++) {
            if (pl->slices[s].usable[i])
                TV_TRY(collect_source(pl, s, i, &all));
        }
    }
    if (all.n == 0)
        goto out;
    qsort(all.items, all.n, sizeof(*all.items), cand_compare);
    for (size_t i = 0; i < all.n; i++)
        n += i == 0 || strcmp(all.items[i].name, all.items[i - 1].name) != 0;
    plan->tensors = tvm_arena_get(plan_arena(pl), n, sizeof(*plan->tensors));
    if (plan->tensors == NULL) {
        rc = plan_oom(pl);
        goto out;
    }
    for (size_t i = 0; i < all.n;) {
        size_t end = i + 1;
        size_t same = i + 1;
        while (end < all.n &&
               strcmp(all.items[end].name, all.items[i].name) == 0)
            end++;
        /* Equal names from two slices: parts disagree between the models. The
         * first slice that has the name supplies it. */
        while (same < end && all.items[same].slice == all.items[i].slice)
            same++;
        TV_TRY(build_tensor(pl, &all.items[i], same - i,
                            &plan->tensors[plan->n_tensors++]));
        i = end;
    }
    if (plan->options.compat_mergekit && pl->problems->n_errors == 0)
        TV_TRY(order_draws(plan, pl->err));
out:
    tv_free(all.items);
    return rc;
}
