/* SPDX-License-Identifier: Apache-2.0 */
/*
 * plan_shapes.c - shape and dtype of one output tensor: do its sources fit each
 * other (rows may follow the vocabulary), is it copied bit for bit, and what is
 * it stored as.
 */
#include "plan_build.h"

#include <stdio.h>
#include <string.h>

#include "tv/alloc.h"
#include "tv/checked.h"
#include "tv/text.h"

/* Is dimension d one of tokens that the planner puts in order itself? */
static bool is_aligned(const struct plan_build *b, unsigned d)
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
static const char *add_block(struct plan_build *b)
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

void plan_check_shapes(struct plan_build *b)
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
        plan_report(b->pl, "shape mismatches", PLAN_LISTED, true, TV_E_INPUT,
                    b->t->name, "shapes differ: %s in '%s', %s in '%s'%s",
                    tv_shape_format(a->shape, a->rank, sa, sizeof(sa)),
                    plan_source_ref(b, 0),
                    tv_shape_format(o->shape, o->rank, so, sizeof(so)),
                    plan_source_ref(b, i), only_vocab ? add_block(b) : "");
    }
    b->t->rank = a->rank;
    memcpy(b->t->shape, a->shape, sizeof(a->shape));
    b->t->n_elems = a->n_elems;
}

void plan_check_tokens(struct plan_build *b)
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
    plan_report(pl, "shape mismatches", PLAN_LISTED, true, TV_E_INPUT,
                b->t->name,
                "shapes differ: %s in '%s', %s in '%s', whose config.json the "
                "output has%s",
                tv_shape_format(b->t->shape, b->t->rank, sa, sizeof(sa)),
                plan_source_ref(b, 0),
                tv_shape_format(theirs.tensor->shape, theirs.tensor->rank, so,
                                sizeof(so)),
                pl->plan->inputs[donor].ref, add_block(b));
}

enum tv_err plan_align_rows(struct plan_build *b)
{
    if (b->pl->vocab == NULL || b->like->vocab_dim != 0 || b->t->rank == 0)
        return TV_OK;
    if (b->pl->vocab_bad || !b->ok) {
        b->ok = false;
        return TV_OK;
    }
    return plan_rows_gather(b->pl, b->like, b->t, &b->ok);
}

/* ---- copy or merge ------------------------------------------------------- */

bool plan_all_math(const struct tvm_tensor *t)
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

static enum tv_err all_equal(struct plan_build *b, bool *equal)
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
        plan_report(b->pl, "unreadable tensors", PLAN_LISTED, true, rc, t->name,
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
static enum tv_err plan_verbatim(struct plan_build *b)
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
        plan_report(b->pl, "experts of other dtypes", PLAN_LISTED, true,
                    TV_E_UNSUPPORTED, t->name,
                    "'%s' stores its experts in another layout and as %s; only "
                    "F16, BF16 and F32 can be put in another one",
                    plan_source_ref(b, i),
                    tv_dtype_name(t->sources[i].tensor->dtype));
        return TV_OK;
    }
    for (size_t i = 0; i < t->n_sources; i++) {
        if (t->sources[i].n_adapters == 0)
            continue;
        b->ok = false;
        plan_report(b->pl, "adapters on tensors of other dtypes", PLAN_LISTED,
                    true, TV_E_UNSUPPORTED, t->name,
                    "'%s' adapts this tensor, but its dtype is %s",
                    plan_source_ref(b, i),
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
                    plan_source_ref(b, t->copy_of));
        return TV_OK;
    }
    if (!b->slice->broken && t->method->fold != NULL)
        fold = t->method->fold(t);
    if (fold >= 0) {
        copy_from(t, (size_t)fold);
        return TV_OK;
    }
    b->ok = false;
    plan_report(b->pl, "dtypes that cannot be merged", PLAN_LISTED, true,
                TV_E_UNSUPPORTED, t->name,
                "the inputs differ in this %s tensor; only F16, BF16 and F32 "
                "can be merged",
                tv_dtype_name(t->sources[0].tensor->dtype));
    return TV_OK;
}

/* One source is the result, but not byte for byte: its rows in order. */
static enum tv_err pass_rows(struct plan_build *b, size_t source)
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

enum tv_err plan_choose_dtype(struct plan_build *b)
{
    struct tvm_tensor *const t = b->t;
    const struct tvm_recipe *const r = b->pl->r;
    int fold = -1;

    if (b->like->role == TV_ROLE_BUFFER || !plan_all_math(t))
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

enum tv_err plan_count_bytes(struct plan_build *b)
{
    struct tvm_tensor *const t = b->t;
    struct tv_error e;
    uint64_t read = 0;
    tv_error_clear(&e);
    const enum tv_err rc = tv_dtype_bytes(t->dtype, t->n_elems, &t->bytes, &e);
    if (rc != TV_OK) {
        b->ok = false;
        plan_report(b->pl, "sizes", PLAN_LISTED, true, rc, t->name, "%s",
                    e.msg);
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

void plan_compat_arithmetic(struct plan_build *b)
{
    struct tvm_tensor *const t = b->t;
    /* Without a method the recipe is wrong, which has been said. */
    if (t->method == NULL || !b->pl->plan->options.compat_mergekit ||
        b->like->role == TV_ROLE_BUFFER || !plan_all_math(t))
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
