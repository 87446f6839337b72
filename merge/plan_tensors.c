/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_tensors.c - one entry per output tensor.
 *
 * Every tensor of every source of every slice gets an output name (its layer
 * renumbered) and equal names are one output tensor: nothing that an input has
 * is dropped. Then, per output tensor: who supplies it, do shapes and dtypes
 * fit, the value of every parameter, and copy or merge.
 */
#include "plan_build.h"

#include <stdlib.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/text.h"

struct plan_cands {
    struct plan_cand *items;
    size_t n, cap;
};

/* ---- candidates -----------------------------------------------------------
 */

static enum tv_err cand_add(struct planner *pl, struct plan_cands *c,
                            struct plan_cand one)
{
    if (c->n == c->cap) {
        const size_t cap = c->cap == 0 ? 256 : 2 * c->cap;
        struct plan_cand *const more =
            tv_realloc(c->items, cap * sizeof(*more));
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
                                  size_t source, struct plan_cands *out)
{
    const struct plan_slice *const s = &pl->slices[slice];
    const struct tv_arch *const a = pl->plan->inputs[s->input[source]].arch;
    const bool *const hidden = pl->refs[s->input[source]].hidden;
    const size_t n = plan_count(pl, s->input[source]);
    enum tv_err rc = TV_OK;
    for (size_t i = 0; i < n; i++) {
        const struct tv_arch_tensor *const t =
            plan_describe(pl, s->input[source], i);
        struct plan_cand c = {NULL, slice, source, i, -1, s->n_layers};
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
                        (struct plan_cand){pl->head_name, slice, source,
                                           pl->refs[s->input[source]].embed, -1,
                                           s->n_layers}));
out:
    return rc;
}

static int cand_compare(const void *a, const void *b)
{
    const struct plan_cand *const x = a;
    const struct plan_cand *const y = b;
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

static void add_source(struct plan_build *b, size_t slice_source, size_t index)
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
static void find_sources(struct plan_build *b)
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
                    pl, "names that become equal", PLAN_LISTED, true,
                    TV_E_INPUT, b->t->name,
                    "two tensors of '%s' would get this name: '%s' "
                    "and '%s'",
                    plan_ref_of(b, s),
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
        plan_report(pl, "missing tensors", PLAN_LISTED, true, TV_E_INPUT,
                    b->t->name, "'%s' has no such tensor, '%s' has it",
                    plan_ref_of(b, s), plan_ref_of(b, b->cands[0].source));
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
static void check_present(struct plan_build *b)
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
        plan_report(b->pl, "tensors that the base lacks", PLAN_LISTED, true,
                    TV_E_INPUT, t->name,
                    "the base model has no such tensor, and %s needs it there",
                    m->name);
    } else if (count_donors(m, t->n_sources, t->base) < m->min_donors) {
        b->ok = false;
        plan_report(b->pl, "tensors that too few inputs have", PLAN_LISTED,
                    true, TV_E_INPUT, t->name,
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
static void check_biases(struct plan_build *b)
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
                    plan_source_ref(b, 0), pl->plan->inputs[pl->st->donor].ref);
    } else if (b->t->n_sources < b->slice->n && !b->slice->broken) {
        plan_report(pl, "biases of some", 1, false, TV_OK, b->t->name,
                    "only %zu of %zu models have biases like this one; the "
                    "others count for nothing there",
                    b->t->n_sources, b->slice->n);
    }
}

/* ---- one tensor -----------------------------------------------------------
 */

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
static void describe_inputs(struct plan_build *b)
{
    const enum tv_role role = b->like->role;

    b->t->has_inputs = b->t->rank == 2 && b->like->layer >= 0 &&
                       !b->like->is_bias && role >= TV_ROLE_ATTN_Q &&
                       role <= TV_ROLE_MLP_DOWN;
    b->t->is_embedding = b->t->rank == 2 && role == TV_ROLE_EMBED &&
                         !b->like->is_bias && b->like->vocab_dim == 0;
    b->t->in_first = b->t->in_first || b->t->is_embedding;
}

static enum tv_err build_tensor(struct planner *pl,
                                const struct plan_cand *cands, size_t n,
                                struct tvm_tensor *t)
{
    const struct plan_slice *const slice = &pl->slices[cands[0].slice];
    struct plan_build b;
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
    plan_check_shapes(&b);
    plan_check_tokens(&b);
    t->is_linear = is_linear(b.like, t->rank);
    t->in_first =
        pl->plan->inputs[slice->input[cands[0].source]].arch->linear_transposed;
    describe_inputs(&b);
    TV_TRY(plan_align_rows(&b));
    TV_TRY(plan_resolve_parameters(&b, cands[0].k, cands[0].n_k));
    plan_compat_arithmetic(&b);
    if (b.ok && !slice->broken && plan_all_math(t) &&
        b.like->role != TV_ROLE_BUFFER)
        plan_ask_method(&b);
    b.ok = b.ok && !b.refused;
    TV_TRY(plan_choose_dtype(&b));
    TV_TRY(plan_count_bytes(&b));
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
    struct plan_cands all = {NULL, 0, 0};
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
